//! What is wrong with a configuration, in words an operator can act on.

use super::Origin;
use super::keys;
use std::fmt;

/// The first trouble found: where, which key, what was found, what would be right.
#[derive(Debug)]
pub struct ConfigError {
    pub(super) origin: Option<Origin>,
    pub(super) key: Option<String>,
    pub(super) problem: Problem,
}

#[derive(Debug)]
pub(super) enum Problem {
    /// The file cannot be read; says who named it.
    Unreadable { named_by: String, error: std::io::Error },
    /// Not TOML, not YAML.
    Syntax { language: &'static str, message: String },
    /// No such key; perhaps one of these was meant.
    Unknown { near: Option<String> },
    /// The key exists, the value does not fit.
    Value { found: String, expects: String, hint: Option<&'static str> },
    /// The values do not go together, or the machine says no.
    Refused(String),
}

impl ConfigError {
    /// EX_CONFIG of sysexits.h.
    pub const EXIT_CODE: i32 = 78;

    pub(super) fn refused(origin: Option<Origin>, key: &str, why: String) -> ConfigError {
        ConfigError { origin, key: Some(key.to_owned()), problem: Problem::Refused(why) }
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.say(&mut Printable(f))
    }
}

/// Keys and names are repeated as they were found: control characters among them are spelt out, so that an error stays one
/// line and a terminal shows it.
struct Printable<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Printable<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        printable(text).try_for_each(|c| fmt::Write::write_char(self.0, c))
    }
}

/// `text` with its control characters spelt out.
pub(super) fn printable(text: &str) -> impl Iterator<Item = char> {
    text.chars().flat_map(|c| {
        let (plain, escaped) = if c.is_control() { (None, Some(c.escape_default())) } else { (Some(c), None) };
        plain.into_iter().chain(escaped.into_iter().flatten())
    })
}

impl ConfigError {
    fn say(&self, f: &mut impl fmt::Write) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        let key = self.key.as_deref().unwrap_or_default();
        match &self.problem {
            Problem::Unreadable { named_by, error } => write!(f, "cannot be read: {error} (named by {named_by})"),
            Problem::Syntax { language, message } => write!(f, "not valid {language}: {message}"),
            Problem::Unknown { near } => {
                write!(f, "unknown setting `{key}`")?;
                match near {
                    Some(near) => write!(f, "; did you mean `{near}`?"),
                    None => f.write_str("; config/blipmq.toml lists every setting"),
                }
            }
            Problem::Value { found, expects, hint } => {
                write!(f, "`{key}`: found {found}, expected {expects}")?;
                hint.map_or(Ok(()), |hint| write!(f, " ({hint})"))
            }
            Problem::Refused(why) if key.is_empty() => f.write_str(why),
            Problem::Refused(why) => write!(f, "`{key}`: {why}"),
        }
    }
}

/// The known name closest to a wrong one, if close enough to be what was meant.
pub(super) fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wrong = wrong.to_ascii_lowercase().replace('-', "_");
    let leaf = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let allowed = 1.max(leaf(&wrong).chars().count() / 4);
    known
        .into_iter()
        .filter_map(|name| {
            let right = name.to_ascii_lowercase();
            // The right key in the wrong table is as near as a typing mistake in the right one.
            let off = distance(&right, &wrong).min(distance(&leaf(&right), &leaf(&wrong)) + 1);
            (off <= allowed).then_some((off, name))
        })
        .min_by_key(|(off, _)| *off)
        .map(|(_, name)| name)
}

/// The setting a wrong key of a file probably means.
pub(super) fn nearest_key(path: &str) -> Option<String> {
    let tables = keys::TABLES.iter().copied().chain(["keys"]);
    nearest(path, keys::KEYS.iter().map(|key| key.path).chain(tables)).map(str::to_owned)
}

/// Edits (insert, delete, change, swap of neighbours) from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut next = vec![i];
        for j in 1..=b.len() {
            let change = row[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(row[j] + 1).min(next[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        for (a, b, want) in
            [("", "", 0), ("port", "prot", 1), ("port", "ports", 1), ("kitten", "sitting", 3), ("", "ab", 2)]
        {
            assert_eq!(distance(a, b), want, "{a} {b}");
        }
    }

    /// Found by fuzzing: a key with a tab in it went to the terminal as it was.
    #[test]
    fn an_error_is_one_line_whatever_it_repeats() {
        let error = ConfigError {
            origin: Some(Origin::Env("BLIPMQ_PORT\n".into())),
            key: Some("a\tb\u{1b}[2J".into()),
            problem: Problem::Unknown { near: None },
        };
        assert_eq!(
            error.to_string(),
            "environment variable BLIPMQ_PORT\\n: unknown setting `a\\tb\\u{1b}[2J`; config/blipmq.toml lists every setting"
        );
    }

    #[test]
    fn near_names_are_offered_and_far_ones_are_not() {
        let offers = [
            ("prot", Some("port")),
            ("fsync_polcy", Some("fsync_policy")),
            ("fsync-policy", Some("fsync_policy")),
            ("segment_size", Some("storage.segment_size")),
            ("net.ttl_ms", Some("delivery.ttl_ms")),
            ("storag", Some("storage")),
            ("delivery.overflw", Some("delivery.overflow")),
            ("banana", None),
            ("host", None),
        ];
        for (wrong, right) in offers {
            assert_eq!(nearest_key(wrong).as_deref(), right, "{wrong}");
        }
    }
}
