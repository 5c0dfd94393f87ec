//! Every setting of the broker: built-in default, then file, then `BLIPMQ_*` environment, then flags; checked once,
//! constant afterwards.
//!
//! Owns: names, defaults, where each value came from. Never: starts anything; a broker with a wrong setting does not run.
//! Neighbours: `keys` is the table of all settings; `file`, `env` and `flags` are the sources; `show` prints.

mod check;
pub mod devkey;
mod env;
mod error;
mod file;
mod flags;
mod keys;
mod show;
mod value;

pub use error::ConfigError;
pub use flags::Flags;
pub use value::{ByteSize, Overflow, Qos0Overflow, WalSync};

use crate::access::{KeyDigest, KeyEntry};
use crate::limits;
use crate::wal::commit::FsyncPolicy;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// All settings. Fields have the names of the keys; `config/blipmq.toml` explains each.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    pub bind_addr: String,
    /// 0: any free port.
    pub port: u16,
    pub metrics_addr: String,
    pub metrics_port: u16,
    /// The directory of the store. (A file in v1, hence the name.)
    pub wal_path: String,
    pub fsync_policy: FsyncPolicy,
    /// Deliveries in all, the first included.
    pub max_retries: u32,
    pub retry_backoff_ms: u64,
    /// Keys that may do everything.
    pub allowed_api_keys: Vec<KeyDigest>,
    pub enable_tokio_console: bool,
    pub storage: Storage,
    pub delivery: Delivery,
    pub net: Net,
    pub shards: Shards,
    /// Keys with permissions.
    pub keys: Vec<KeyEntry>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Storage {
    pub segment_size: ByteSize,
    /// Per core.
    pub spare_segments: u32,
    /// 0: none.
    pub disk_quota: ByteSize,
    /// Over all cores.
    pub memory_budget: ByteSize,
    pub checkpoint_interval_ms: u64,
    pub wal_sync: WalSync,
    pub allow_buffered_io: bool,
    pub idle_marker: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Delivery {
    /// Life of a v2 publish that names none. 0: never expires.
    pub ttl_ms: u64,
    /// Life of a v1 publish: v1 has no way to name one. 0: never expires.
    pub v1_ttl_ms: u64,
    /// Per subscription.
    pub qos0_queue_messages: u64,
    /// Per subscription.
    pub qos0_queue_bytes: ByteSize,
    pub qos0_overflow: Qos0Overflow,
    /// Per subscription; 0: no bound but the disk's.
    pub backlog_bytes: ByteSize,
    /// Per subscription; 0: no bound but the disk's.
    pub backlog_messages: u64,
    pub overflow: Overflow,
    pub dead_letter: bool,
    pub dead_letter_suffix: String,
    /// 0: never.
    pub dead_letter_ttl_ms: u64,
    /// Of v2 consumers; those of v1 have `retry_backoff_ms`.
    pub ack_timeout_ms: u64,
    pub orphan_queue_ttl_ms: u64,
    /// 0: never.
    pub durable_idle_ttl_ms: u64,
    /// 0: a POLL never waits.
    pub poll_park_ms: u64,
    pub dedup_window_ms: u64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Net {
    /// Over all cores.
    pub max_connections: u64,
    /// Requests read but not yet processed, per connection.
    pub connection_bytes: ByteSize,
    pub auth_deadline_ms: u64,
    /// 0: no pings.
    pub keepalive_ms: u64,
    /// 0: the kernel's own.
    pub tcp_user_timeout_ms: u64,
    /// Per core.
    pub unauthenticated_max: u64,
    /// Per core and address.
    pub unauthenticated_per_address_max: u64,
    /// 0: a frame may take as long as it likes.
    pub frame_timeout_ms: u64,
    pub drain_ms: u64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Shards {
    /// 0: one per allowed CPU.
    pub count: u16,
    /// Empty: all allowed.
    pub cpus: Vec<u16>,
    /// Fixed when the store is created.
    pub virtual_shards: u16,
    pub shard_ports: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            bind_addr: "127.0.0.1".into(),
            port: 5555,
            metrics_addr: "127.0.0.1".into(),
            metrics_port: 9100,
            wal_path: "blipmq.wal".into(),
            fsync_policy: FsyncPolicy::Always,
            max_retries: 3,
            retry_backoff_ms: 100,
            allowed_api_keys: Vec::new(),
            enable_tokio_console: false,
            storage: Storage {
                segment_size: ByteSize::mib(64),
                spare_segments: 1,
                disk_quota: ByteSize(0),
                memory_budget: ByteSize::mib(256),
                checkpoint_interval_ms: 1_000,
                wal_sync: WalSync::Dsync,
                allow_buffered_io: false,
                idle_marker: true,
            },
            delivery: Delivery {
                ttl_ms: 0,
                v1_ttl_ms: 60_000,
                qos0_queue_messages: 65_536,
                qos0_queue_bytes: ByteSize::mib(16),
                qos0_overflow: Qos0Overflow::DropOldest,
                backlog_bytes: ByteSize(0),
                backlog_messages: 0,
                overflow: Overflow::Reject,
                dead_letter: true,
                dead_letter_suffix: ".dlq".into(),
                dead_letter_ttl_ms: 7 * 24 * 3_600_000,
                ack_timeout_ms: 30_000,
                orphan_queue_ttl_ms: 300_000,
                durable_idle_ttl_ms: 0,
                poll_park_ms: 5_000,
                dedup_window_ms: 120_000,
            },
            net: Net {
                max_connections: 10_000,
                connection_bytes: ByteSize(limits::STALLED_BYTES_MAX as u64),
                auth_deadline_ms: limits::AUTH_DEADLINE_MS,
                keepalive_ms: 30_000,
                tcp_user_timeout_ms: 30_000,
                unauthenticated_max: limits::UNAUTHENTICATED_PER_CORE_MAX as u64,
                unauthenticated_per_address_max: limits::UNAUTHENTICATED_PER_ADDRESS_MAX as u64,
                frame_timeout_ms: 30_000,
                drain_ms: 2_000,
            },
            shards: Shards { count: 0, cpus: Vec::new(), virtual_shards: 64, shard_ports: false },
            keys: Vec::new(),
        }
    }
}

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    File {
        path: PathBuf,
        /// Both from 1; 0: the parser did not say.
        line: u32,
        column: u32,
    },
    Env(String),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line: 0, .. } => write!(f, "{}", path.display()),
            Origin::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Origin::Env(name) => write!(f, "environment variable {name}"),
            Origin::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// The settings of this run, and what is known about them.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// `bind_addr` and `port`, resolved.
    pub listen: SocketAddr,
    /// `metrics_addr` and `metrics_port`, resolved.
    pub metrics_listen: SocketAddr,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// To be logged once logging runs.
    pub notes: Vec<String>,
    /// Of each setting that is not a built-in default, by its key.
    origins: Origins,
}

type Origins = BTreeMap<&'static str, Origin>;

/// Settings while the sources are laid over each other.
#[derive(Default)]
struct Draft {
    config: Config,
    origins: Origins,
    notes: Vec<String>,
}

/// Reads all sources. `env` is usually `std::env::vars_os()`.
///
/// The first trouble found ends it: the broker must not run half-configured. Exit code then: `ConfigError::EXIT_CODE`.
pub fn load(flags: &Flags, env: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Loaded, ConfigError> {
    load_reading(flags, env, file::read)
}

/// The same, with whatever `read` says is in the file.
pub fn load_reading(
    flags: &Flags,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    read: impl Fn(&Path) -> io::Result<String>,
) -> Result<Loaded, ConfigError> {
    let mut draft = Draft::default();
    let variables = env::Variables::new(env)?;
    let file = match &flags.config {
        Some(path) => Some((path.clone(), "flag --config")),
        None => variables.config_path().map(|path| (path, "environment variable BLIPMQ_CONFIG")),
    };
    if let Some((path, named_by)) = &file {
        file::apply(path, read(path), named_by, &mut draft)?;
    }
    variables.apply(&mut draft)?;
    flags.apply(&mut draft)?;
    check::finish(draft, file.map(|(path, _)| path))
}

#[cfg(test)]
mod tests;
