//! `BLIPMQ_*` variables: `BLIPMQ_<KEY>`, `BLIPMQ_<TABLE>_<KEY>`; they win over the file.

use super::error::{ConfigError, Problem, nearest};
use super::keys::{self, Key};
use super::{Draft, Origin};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// The variables that begin with `BLIPMQ_`. Sorted, so that the same environment gives the same error.
pub(super) struct Variables(BTreeMap<String, String>);

impl Variables {
    pub fn new(env: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Variables, ConfigError> {
        let mut ours = BTreeMap::new();
        for (name, value) in env {
            // A name that is not text cannot be one of ours.
            let Some(name) = name.to_str().filter(|name| name.starts_with("BLIPMQ_")) else { continue };
            let value = value.into_string().map_err(|_| {
                ConfigError::refused(Some(Origin::Env(name.to_owned())), "", "the value is not UTF-8".to_owned())
            })?;
            ours.insert(name.to_owned(), value);
        }
        Ok(Variables(ours))
    }

    pub fn config_path(&self) -> Option<PathBuf> {
        self.0.get("BLIPMQ_CONFIG").map(PathBuf::from)
    }

    pub fn apply(&self, draft: &mut Draft) -> Result<(), ConfigError> {
        for (name, text) in &self.0 {
            match keys::KEYS.iter().find(|key| key.variable() == *name) {
                Some(key) => read(key, text, Origin::Env(name.clone()), draft)?,
                None if name == "BLIPMQ_CONFIG" => {}
                None => foreign(name, draft)?,
            }
        }
        Ok(())
    }
}

/// A variable or flag that sets `key`.
pub(super) fn read(key: &Key, text: &str, origin: Origin, draft: &mut Draft) -> Result<(), ConfigError> {
    if !(key.read_text)(&mut draft.config, text) {
        let found = if key.secret { "a value that is not shown".to_owned() } else { super::value::quote(text) };
        let hint = (key.path == "port" && text.contains("://"))
            .then_some("Kubernetes sets this for a service called blipmq: use `enableServiceLinks: false`");
        let problem = Problem::Value { found, expects: key.expects.to_owned(), hint };
        return Err(ConfigError { origin: Some(origin), key: Some(key.path.to_owned()), problem });
    }
    draft.origins.insert(key.path, origin);
    Ok(())
}

/// A variable we do not know. Something like a setting is a mistake; anything else may belong to another program
/// (a client's API key, a service address of Kubernetes), and is only mentioned.
fn foreign(name: &str, draft: &mut Draft) -> Result<(), ConfigError> {
    let suffix = name.trim_start_matches("BLIPMQ_").to_ascii_lowercase();
    let names: Vec<String> = keys::KEYS.iter().map(|key| key.path.replace('.', "_")).collect();
    let near = nearest(&suffix, names.iter().map(String::as_str).chain(["config"]));
    let in_table = keys::TABLES.iter().any(|table| suffix.starts_with(&format!("{table}_")));
    if near.is_none() && !in_table {
        draft.notes.push(format!("environment variable {name} is no setting of the broker; ignored"));
        return Ok(());
    }
    let near = near.map(|near| format!("BLIPMQ_{}", near.to_ascii_uppercase()));
    let problem = Problem::Unknown { near };
    Err(ConfigError { origin: Some(Origin::Env(name.to_owned())), key: Some(name.to_owned()), problem })
}
