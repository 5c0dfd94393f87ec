//! The keys of this run. Without a configured one, on a loopback address, a random key in `<store>/dev.key`.

use super::{ConfigError, Loaded};
use crate::access::{KeyDigest, KeyEntry, KeyRing};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// File name inside the store's directory.
pub const DEV_KEY_FILE: &str = "dev.key";
/// No key file is longer.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// The keys that may log in.
#[derive(Clone, Debug)]
pub struct Keys {
    pub ring: KeyRing,
    /// To be logged: which keys there are, and where the dev key lies.
    pub note: String,
}

impl Loaded {
    /// Reads or makes the dev key if no other is configured: the only thing here that writes to the disk, so not for
    /// `--check-config`. Call it after `preflight`, which says more about a directory that cannot be used.
    pub fn keys(&self) -> Result<Keys, ConfigError> {
        if self.config.has_keys() {
            let all = self.config.allowed_api_keys.iter().enumerate();
            let mut entries: Vec<KeyEntry> =
                all.map(|(i, digest)| KeyEntry::unrestricted(*digest, format!("allowed_api_keys[{i}]"))).collect();
            entries.extend(self.config.keys.iter().cloned());
            let note = format!("{} API keys may log in", entries.len());
            return Ok(Keys { ring: KeyRing::new(entries), note });
        }
        // A broker that others can reach never comes here without keys: `load` has refused it.
        assert!(self.listen.ip().is_loopback(), "no API key on an address others can reach");
        let path = Path::new(&self.config.wal_path).join(DEV_KEY_FILE);
        let (key, made) = read_or_make(&path).map_err(|error| {
            let origin = self.origins.get("wal_path").cloned();
            ConfigError::refused(origin, "wal_path", format!("cannot use {}: {error}", path.display()))
        })?;
        let ring = KeyRing::new(vec![KeyEntry::unrestricted(KeyDigest::of(key.as_bytes()), "dev".into())]);
        let verb = if made { "made one" } else { "using the one" };
        let shown = path.display();
        let note = format!("no API key is configured: {verb} in {shown}; clients use it with `--key-file {shown}`");
        Ok(Keys { ring, note })
    }
}

/// The key, and whether it is new.
fn read_or_make(path: &Path) -> io::Result<(String, bool)> {
    match fs::metadata(path) {
        Ok(found) if found.len() > KEY_FILE_BYTES_MAX => Err(io::Error::other("too long for a key")),
        Ok(_) => match fs::read_to_string(path)?.trim() {
            "" => Err(io::Error::other("the file is empty; delete it, and the next start makes a new key")),
            key => Ok((key.to_owned(), false)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path).map(|key| (key, true)),
        Err(error) => Err(error),
    }
}

/// Complete or absent: written beside, synced, then renamed.
fn make(path: &Path) -> io::Result<String> {
    let directory = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(format!("no random numbers: {error}")))?;
    let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let beside: PathBuf = path.with_extension("key.tmp");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    writeln!(file, "{key}")?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    fs::File::open(directory)?.sync_all()?;
    Ok(key)
}
