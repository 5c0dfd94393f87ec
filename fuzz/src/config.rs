//! A configuration file and an environment from anybody: refused in words or taken, never a panic; and what `--check-config`
//! prints of one that was taken loads again to the same.
//!
//! The first byte chooses the file's language. Everything up to a zero byte is the file; behind it stand variables, each
//! `NAME=value` up to the next zero byte.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use blipmq::access::KeyDigest;
use blipmq::config::{Config, ConfigError, Flags, Loaded, load_reading};

use super::memory;

/// What a key is printed as.
const HIDDEN: &str = "(hidden)";

pub fn run(input: &[u8]) {
    let [language, rest @ ..] = input else { return };
    let mut parts = rest.split(|byte| *byte == 0);
    let file = parts.next().unwrap_or_default();
    let variables = parts.filter_map(|variable| {
        let at = variable.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (variable[..at].to_vec(), variable[at + 1..].to_vec());
        let ours = name != b"BLIPMQ_CONFIG";
        ours.then(|| (OsString::from_vec(name), OsString::from_vec(value)))
    });
    let path = if language & 1 == 0 { "settings.toml" } else { "settings.yaml" };
    let result = memory::within(16 * 1024 * 1024 + 64 * rest.len(), || load(path, file, variables));
    let loaded = match result {
        Ok(loaded) => loaded,
        Err(error) => return in_words(&error),
    };
    let printed = loaded.to_toml();
    let printed = nameable(&printed, &loaded.config);
    let again = match load("printed.toml", printed.as_bytes(), []) {
        Ok(again) => again,
        Err(error) => panic!("what was printed is refused: {error}\n{printed}"),
    };
    assert_eq!(without_keys(again.config), without_keys(loaded.config), "{printed}");
    assert_eq!((again.listen, again.metrics_listen), (loaded.listen, loaded.metrics_listen));
}

/// Names are not looked up here: addresses are given.
fn load(
    path: &str,
    text: &[u8],
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, ConfigError> {
    let flags = Flags { config: Some(PathBuf::from(path)), bind: Some("127.0.0.1".to_owned()), ..Flags::default() };
    let metrics = (OsString::from("BLIPMQ_METRICS_ADDR"), OsString::from("127.0.0.1"));
    let read = |_: &Path| String::from_utf8(text.to_vec()).map_err(|error| io::Error::other(error.utf8_error()));
    load_reading(&flags, variables.into_iter().chain([metrics]), read)
}

/// One line that says something, and can be printed.
fn in_words(error: &ConfigError) {
    let text = error.to_string();
    assert!(text.split_whitespace().count() > 3, "{text:?}");
    assert!(!text.chars().any(|c| c.is_control()), "{text:?}");
    assert!(text.len() < 64 * 1024, "{} bytes", text.len());
}

/// Keys are printed as the same word; two equal keys would be refused. Gives each a number.
fn nameable(printed: &str, config: &Config) -> String {
    let keys = config.allowed_api_keys.len() + config.keys.len();
    if printed.matches(HIDDEN).count() != keys {
        return printed.to_owned();
    }
    let mut parts = printed.split(HIDDEN);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for (nth, part) in parts.enumerate() {
        text.push_str(&format!("key {nth}{part}"));
    }
    text
}

fn without_keys(mut config: Config) -> Config {
    let same = KeyDigest::of(b"");
    config.allowed_api_keys.iter_mut().for_each(|digest| *digest = same);
    config.keys.iter_mut().for_each(|key| key.digest = same);
    config
}
