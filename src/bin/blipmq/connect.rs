//! From the command line to a connected client.

use std::path::Path;
use std::time::Duration;

use blipmq::client::{Client, ClientOptions, ReconnectPolicy};
use blipmq::config::devkey::DEV_KEY_FILE;

use crate::Global;
use crate::failure::Failure;

/// Where the broker keeps its store unless told otherwise, and with it the key it makes for a first try.
const DEFAULT_STORE: &str = "blipmq.wal";
const KEY_VARIABLE: &str = "BLIPMQ_KEY";

/// Connects, or says what is wrong within a few seconds: somebody sits and waits.
pub async fn connect(global: &Global) -> Result<Client, Failure> {
    let key = key(global)?;
    let mut servers = global.server.iter();
    let first = servers.next().ok_or_else(|| Failure::new("--server names no address"))?;
    let policy = ReconnectPolicy {
        give_up_connect: Duration::from_secs(3),
        give_up_reconnect: Some(Duration::from_secs(60)),
        ..ReconnectPolicy::default()
    };
    let options = ClientOptions::new(first, key).name("blipmq").reconnect(policy);
    let options = servers.fold(options, |options, server| options.address(server));
    Ok(Client::connect(options).await?)
}

fn key(global: &Global) -> Result<String, Failure> {
    if let Some(key) = &global.key {
        return Ok(key.clone());
    }
    if let Some(file) = &global.key_file {
        return read_key(file);
    }
    if let Ok(key) = std::env::var(KEY_VARIABLE) {
        return Ok(key);
    }
    let made = Path::new(DEFAULT_STORE).join(DEV_KEY_FILE);
    if made.exists() {
        return read_key(&made);
    }
    Err(Failure::new(format!(
        "no API key: give --key, --key-file or {KEY_VARIABLE}, or run this where the broker's {} is",
        made.display()
    )))
}

fn read_key(file: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::new(format!("cannot read the key in {}: {error}", file.display())))?;
    match text.trim() {
        "" => Err(Failure::new(format!("{} is empty: it should hold an API key", file.display()))),
        key => Ok(key.to_owned()),
    }
}
