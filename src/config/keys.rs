//! The table of all settings: name, what it takes, how it is read and shown.
//!
//! Defaults and meaning are in `Config` and `config/blipmq.toml`; a test keeps that file complete.

use super::Config;
use super::value::{Setting, Value};
use crate::limits;
use std::ops::RangeInclusive;

/// One setting.
pub(super) struct Key {
    /// `table.name`, or `name` at the top level.
    pub path: &'static str,
    /// Completes "expected …".
    pub expects: &'static str,
    /// The value is not repeated in errors.
    pub secret: bool,
    /// Stores the value. False: it does not fit, nothing has changed.
    pub read: fn(&mut Config, &Value) -> bool,
    /// The same for a variable or flag.
    pub read_text: fn(&mut Config, &str) -> bool,
    /// As a TOML value.
    pub show: fn(&Config) -> String,
}

impl Key {
    /// `storage.segment_size`: `BLIPMQ_STORAGE_SEGMENT_SIZE`.
    pub fn variable(&self) -> String {
        format!("BLIPMQ_{}", self.path.replace('.', "_").to_ascii_uppercase())
    }
}

pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Tables that hold settings. (`[[keys]]` holds API keys instead.)
pub(super) const TABLES: [&str; 4] = ["storage", "delivery", "net", "shards"];

fn fit<T: Setting>(value: Option<T>, range: RangeInclusive<u64>, target: &mut T) -> bool {
    match value {
        Some(value) if range.contains(&value.measure()) => {
            *target = value;
            true
        }
        _ => false,
    }
}

macro_rules! key {
    ($($field:ident).+, $range:expr, $expects:expr) => {
        Key {
            path: path!($($field).+),
            expects: $expects,
            secret: false,
            read: |config, value| fit(Setting::read(value), $range, &mut config.$($field).+),
            read_text: |config, text| fit(Setting::read_text(text), $range, &mut config.$($field).+),
            show: |config| config.$($field).+.show(),
        }
    };
}
macro_rules! path {
    ($field:ident) => {
        stringify!($field)
    };
    ($table:ident . $field:ident) => {
        concat!(stringify!($table), ".", stringify!($field))
    };
}

const ANY: RangeInclusive<u64> = 0..=u64::MAX;
const MS: &str = "milliseconds, 0 to 31622400000 (366 days)";
const MS_NOT_ZERO: &str = "milliseconds, 1 to 31622400000 (366 days)";
const MS_MAX: u64 = 366 * 24 * 3_600_000;
const FLAG: &str = "true or false";

/// Messages larger than a segment are refused with 413: small segments are for tests and small disks.
const SEGMENT_MIN: u64 = 1 << 20;
/// An offset in a segment is 32 bits.
const SEGMENT_MAX: u64 = 1 << 30;
// Numbers that the words "expected …" of API keys repeat.
const _: () = assert!(limits::API_KEYS_MAX == 1_024 && limits::API_KEY_LEN_MAX == 4_085);
const _: () = assert!(limits::PATTERNS_PER_KEY_MAX == 256 && limits::PATTERN_LEN_MAX == 1_024);

/// In the order `--check-config` prints them: those of the top level first, tables together.
pub(super) static KEYS: &[Key] = &[
    key!(bind_addr, 1..=255, "an IP address or host name, without port"),
    key!(port, ANY, "a port, 0 to 65535 (0: any free one)"),
    key!(metrics_addr, 1..=255, "an IP address or host name, without port"),
    key!(metrics_port, ANY, "a port, 0 to 65535 (0: any free one)"),
    key!(wal_path, 1..=4096, "the path of the store's directory"),
    key!(fsync_policy, ANY, "\"always\", \"none\", \"every_n:<records>\" or \"interval_ms:<milliseconds>\""),
    key!(max_retries, 1..=65_535, "deliveries per message, 1 to 65535"),
    key!(retry_backoff_ms, 1..=MS_MAX, MS_NOT_ZERO),
    Key {
        secret: true,
        ..key!(
            allowed_api_keys,
            0..=limits::API_KEYS_MAX as u64,
            "a list of at most 1024 API keys, each a text of 1 to 4085 bytes, or \"sha256:\" and 64 hex digits"
        )
    },
    Key {
        // v1's own rule for this variable: whatever is not a yes is a no (V1 B29).
        read_text: |config, text| {
            config.enable_tokio_console = bool::read_text(text).unwrap_or(false);
            true
        },
        ..key!(enable_tokio_console, ANY, FLAG)
    },
    key!(storage.segment_size, SEGMENT_MIN..=SEGMENT_MAX, "a size from \"1MiB\" to \"1GiB\""),
    key!(storage.spare_segments, 1..=64, "segments per core, 1 to 64"),
    key!(storage.disk_quota, ANY, "a size such as \"100GiB\", or 0 for none"),
    key!(storage.memory_budget, (32 << 20)..=u64::MAX, "a size from \"32MiB\""),
    key!(storage.checkpoint_interval_ms, 10..=3_600_000, "milliseconds, 10 to 3600000"),
    key!(storage.wal_sync, ANY, "\"dsync\" or \"fdatasync\""),
    key!(storage.allow_buffered_io, ANY, FLAG),
    key!(storage.idle_marker, ANY, FLAG),
    key!(delivery.ttl_ms, 0..=MS_MAX, MS),
    key!(delivery.v1_ttl_ms, 0..=MS_MAX, MS),
    key!(delivery.qos0_queue_messages, 1..=100_000_000, "messages, 1 to 100000000"),
    key!(delivery.qos0_queue_bytes, 1..=u64::MAX, "a size such as \"16MiB\""),
    key!(delivery.qos0_overflow, ANY, "\"drop_oldest\" or \"drop_new\""),
    key!(delivery.backlog_bytes, ANY, "a size such as \"1GiB\", or 0 for no limit"),
    key!(delivery.backlog_messages, ANY, "messages, or 0 for no limit"),
    key!(delivery.overflow, ANY, "\"reject\" or \"drop_oldest\""),
    key!(delivery.dead_letter, ANY, FLAG),
    key!(delivery.dead_letter_suffix, 1..=64, "a text of 1 to 64 bytes, such as \".dlq\""),
    key!(delivery.dead_letter_ttl_ms, 0..=MS_MAX, MS),
    key!(delivery.ack_timeout_ms, 1..=MS_MAX, MS_NOT_ZERO),
    key!(delivery.orphan_queue_ttl_ms, 0..=MS_MAX, MS),
    key!(delivery.durable_idle_ttl_ms, 0..=MS_MAX, MS),
    key!(delivery.poll_park_ms, 0..=MS_MAX, MS),
    key!(delivery.dedup_window_ms, 0..=MS_MAX, MS),
    key!(net.max_connections, 1..=1_000_000, "connections, 1 to 1000000"),
    key!(net.connection_bytes, (64 << 10)..=(1 << 30), "a size from \"64KiB\" to \"1GiB\""),
    key!(net.auth_deadline_ms, 1..=MS_MAX, MS_NOT_ZERO),
    key!(net.keepalive_ms, 0..=MS_MAX, MS),
    key!(net.tcp_user_timeout_ms, 0..=i32::MAX as u64, "milliseconds, 0 to 2147483647"),
    key!(net.unauthenticated_max, 1..=1_000_000, "connections per core, 1 to 1000000"),
    key!(net.unauthenticated_per_address_max, 1..=1_000_000, "connections per core and address, 1 to 1000000"),
    key!(net.frame_timeout_ms, 0..=MS_MAX, MS),
    key!(net.drain_ms, 0..=3_600_000, "milliseconds, 0 to 3600000"),
    key!(shards.count, ANY, "a number of cores, 0 to 65535 (0: one per allowed CPU)"),
    key!(shards.cpus, 0..=1_024, "a list of CPU numbers, such as [0, 2] (empty: all allowed)"),
    key!(shards.virtual_shards, 1..=4_096, "virtual shards, 1 to 4096"),
    key!(shards.shard_ports, ANY, FLAG),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_inside_its_own_range_and_reads_back_as_shown() {
        let defaults = Config::default();
        for key in KEYS {
            let mut config = defaults.clone();
            let document = format!("v = {}", (key.show)(&defaults));
            let node = super::super::file::parse_toml(&document).unwrap();
            assert!((key.read)(&mut config, &node[0].node.value), "{}: {document}", key.path);
            assert_eq!(config, defaults, "{}", key.path);
        }
    }

    #[test]
    fn paths_and_variables_are_unique_and_the_tables_known() {
        let mut variables: Vec<String> = KEYS.iter().map(Key::variable).collect();
        variables.sort();
        variables.dedup();
        assert_eq!(variables.len(), KEYS.len());
        for key in KEYS {
            if let Some((table, _)) = key.path.split_once('.') {
                assert!(TABLES.contains(&table), "{}", key.path);
            }
        }
    }
}
