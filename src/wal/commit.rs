//! When a publish counts as safe. Pure.

use std::fmt;
use std::str::FromStr;

/// What an acknowledgement promises (DURABILITY.md 1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FsyncPolicy {
    /// Acknowledged when synced.
    #[default]
    Always,
    /// At most this many acknowledged records are not synced yet.
    EveryN(u64),
    /// No acknowledged record stays unsynced for longer than this many milliseconds.
    IntervalMs(u64),
    /// Acknowledged when written; never synced while running.
    None,
}

/// The text names no policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected \"always\", \"none\", \"every_n:<n>\" or \"interval_ms:<ms>\"")]
pub struct UnknownPolicy;

impl FromStr for FsyncPolicy {
    type Err = UnknownPolicy;

    /// Upper and lower case alike, blanks around are ignored (V1 B30).
    fn from_str(text: &str) -> Result<FsyncPolicy, UnknownPolicy> {
        let text = text.trim().to_ascii_lowercase();
        let number = |digits: &str| digits.trim().parse().ok().filter(|n| *n > 0).ok_or(UnknownPolicy);
        match text.split_once(':') {
            None if text == "always" => Ok(FsyncPolicy::Always),
            None if text == "none" => Ok(FsyncPolicy::None),
            Some(("every_n", n)) => number(n).map(FsyncPolicy::EveryN),
            Some(("interval_ms", ms)) => number(ms).map(FsyncPolicy::IntervalMs),
            _ => Err(UnknownPolicy),
        }
    }
}

impl fmt::Display for FsyncPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FsyncPolicy::Always => f.write_str("always"),
            FsyncPolicy::EveryN(n) => write!(f, "every_n:{n}"),
            FsyncPolicy::IntervalMs(ms) => write!(f, "interval_ms:{ms}"),
            FsyncPolicy::None => f.write_str("none"),
        }
    }
}
