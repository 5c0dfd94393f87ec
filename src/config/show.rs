//! `--check-config`: the effective settings as TOML, each with where it came from. API keys are never shown.

use super::error::printable;
use super::value::{Setting, quote};
use super::{Loaded, keys};
use std::fmt::Write;

impl Loaded {
    /// One line per setting; what is not a built-in default says in a comment who set it.
    pub fn to_toml(&self) -> String {
        let mut out =
            String::from("# Effective settings. A comment tells where a value comes from; none: built-in default.\n");
        let mut table = "";
        for key in keys::KEYS {
            let (in_table, name) = key.path.split_once('.').unwrap_or(("", key.path));
            if in_table != table {
                table = in_table;
                let _infallible = writeln!(out, "\n[{table}]");
            }
            let mut line = format!("{name} = {}", (key.show)(&self.config));
            if let Some(origin) = self.origins.get(key.path) {
                line.push_str("  # ");
                line.extend(printable(&origin.to_string()));
            }
            out.push_str(&line);
            out.push('\n');
        }
        for key in &self.config.keys {
            let _infallible = writeln!(
                out,
                "\n[[keys]]\nname = {}\nkey = {}\npublish = {}\nsubscribe = {}\nadmin = {}",
                quote(&key.name),
                key.digest.show(),
                key.publish.show(),
                key.subscribe.show(),
                key.admin,
            );
        }
        for note in &self.notes {
            out.push_str("\n# Note: ");
            out.extend(printable(note));
            out.push('\n');
        }
        out
    }
}
