//! What one setting's range cannot say: settings that must go together, and addresses that must exist.

use super::{ByteSize, Config, ConfigError, Draft, Loaded};
use crate::limits;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

pub(super) fn finish(mut draft: Draft, file: Option<PathBuf>) -> Result<Loaded, ConfigError> {
    let refuse = |key: &str, why: String| Err(ConfigError::refused(draft.origins.get(key).cloned(), key, why));
    let config = &draft.config;
    if let Some((key, why)) = contradiction(config) {
        return refuse(key, why);
    }
    let listen = match resolve(&config.bind_addr, config.port) {
        Ok(address) => address,
        Err(why) => return refuse("bind_addr", why),
    };
    let metrics_listen = match resolve(&config.metrics_addr, config.metrics_port) {
        Ok(address) => address,
        Err(why) => return refuse("metrics_addr", why),
    };
    if listen == metrics_listen && listen.port() != 0 {
        return refuse("metrics_port", format!("clients and metrics cannot share {listen}"));
    }
    if !config.has_keys() && !listen.ip().is_loopback() {
        // A loopback address is the default, so it was `bind_addr` that asked for more.
        return refuse(
            "bind_addr",
            format!(
                "no API key is configured, and {listen} can be reached from other machines. Set `allowed_api_keys` or \
                 `[[keys]]`, or listen on 127.0.0.1, where a first start makes a key of its own"
            ),
        );
    }
    if config.enable_tokio_console {
        let note = "enable_tokio_console: there is no tokio here; `blipmq top` and /metrics show every core instead";
        draft.notes.push(note.to_owned());
    }
    let Draft { config, origins, notes } = draft;
    Ok(Loaded { config, listen, metrics_listen, file, notes, origins })
}

impl Config {
    /// False: only the key of `dev.key` can log in.
    pub fn has_keys(&self) -> bool {
        !self.allowed_api_keys.is_empty() || !self.keys.is_empty()
    }
}

/// The first two settings that do not go together: which one to change, and why.
fn contradiction(config: &Config) -> Option<(&'static str, String)> {
    let (storage, delivery, shards) = (&config.storage, &config.delivery, &config.shards);
    let segment = storage.segment_size;
    if !segment.0.is_multiple_of(limits::BLOCK as u64) {
        return Some(("storage.segment_size", format!("{segment} is not a multiple of {} bytes", limits::BLOCK)));
    }
    let least = ByteSize(segment.0.saturating_mul(4));
    if storage.disk_quota.0 != 0 && storage.disk_quota < least {
        let why = format!("{} is less than four segments of {segment} ({least})", storage.disk_quota);
        return Some(("storage.disk_quota", why));
    }
    if delivery.dead_letter_suffix.trim() != delivery.dead_letter_suffix {
        return Some(("delivery.dead_letter_suffix", "must not begin or end with a blank".into()));
    }
    if shards.count > shards.virtual_shards {
        let why = format!(
            "{} cores cannot share {} virtual shards; `shards.virtual_shards` is fixed when the store is created",
            shards.count, shards.virtual_shards
        );
        return Some(("shards.count", why));
    }
    let cpus: BTreeSet<u16> = shards.cpus.iter().copied().collect();
    if cpus.len() < shards.cpus.len() {
        return Some(("shards.cpus", "a CPU is named twice".into()));
    }
    contradicting_keys(config)
}

fn contradicting_keys(config: &Config) -> Option<(&'static str, String)> {
    if config.allowed_api_keys.len() + config.keys.len() > limits::API_KEYS_MAX {
        return Some(("keys", format!("more than {} API keys", limits::API_KEYS_MAX)));
    }
    let mut names = BTreeSet::new();
    let mut digests: BTreeSet<_> = config.allowed_api_keys.iter().copied().collect();
    if digests.len() < config.allowed_api_keys.len() {
        return Some(("allowed_api_keys", "the same API key is listed twice".into()));
    }
    for (index, key) in config.keys.iter().enumerate() {
        if !digests.insert(key.digest) {
            let why = format!("keys[{index}] ({:?}) is the same API key as another one, with other rights", key.name);
            return Some(("keys", why));
        }
        if !names.insert(key.name.as_str()) {
            return Some(("keys", format!("two keys have the name {:?}", key.name)));
        }
    }
    None
}

/// An address, or the first one a host name has (IPv4 before IPv6, so that `localhost` is what v1 clients dial).
fn resolve(host: &str, port: u16) -> Result<SocketAddr, String> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    if host.parse::<SocketAddr>().is_ok() {
        return Err(format!("found {host:?}, expected an address without port; the port is a setting of its own"));
    }
    let found: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return Err(format!("{host:?} is no IP address, and no host name that can be resolved: {error}")),
    };
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| format!("the host name {host:?} has no address"))
}
