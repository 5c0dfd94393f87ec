//! What a shard has to know of the configuration. Constant for the life of the process.

use bytes::Bytes;

use crate::limits;
use crate::time::Duration;
use crate::types::CoreId;

#[derive(Clone, Debug)]
pub struct Settings {
    pub core: CoreId,
    pub cores: u16,
    pub vshards: u16,
    /// Fixed in the store: it takes part in placement.
    pub dead_letter_suffix: Bytes,
    /// `false`: what would be dead-lettered is dropped, and counted.
    pub dead_letter: bool,
    /// How long a dead-letter topic keeps a message; zero: for ever.
    pub dead_letter_ttl: Duration,
    /// Life of a v1 publish; zero: for ever.
    pub v1_ttl: Duration,
    /// Life of a v2 publish that names none; zero: for ever.
    pub ttl: Duration,
    /// Failed deliveries after which a message is dead-lettered.
    pub max_retries: u16,
    /// Delay before the first redelivery; doubles with every further one. v1: also the redelivery timer.
    pub retry_backoff: Duration,
    /// v2: how long a delivery may stay unacknowledged, unless the subscriber says otherwise.
    pub ack_timeout: Duration,
    /// How long a v1 QoS1 queue waits for its subscriber to come back.
    pub orphan_ttl: Duration,
    /// How long a durable subscription may stay without consumer; zero: for ever.
    pub durable_idle_ttl: Duration,
    /// v1: how long a POLL waits for a message; zero: not at all.
    pub poll_park: Duration,
    /// How long an identity is remembered.
    pub dedup_window: Duration,
    pub qos0_messages: usize,
    pub qos0_bytes: usize,
    pub qos0_overflow: Overflow,
    /// Unfinished QoS1 messages one subscription may have; zero: no limit but the disk's.
    pub backlog_messages: u64,
    pub backlog_bytes: u64,
    pub backlog_overflow: BacklogOverflow,
    pub auth_deadline: Duration,
    /// v2: an idle connection is pinged after this; closed after three of them. Zero: never.
    pub keepalive: Duration,
    /// Bytes of the log's recent tail and of read-back chunks kept in memory by this core.
    pub cache_bytes: usize,
    /// Index entries this core may hold: its share of the memory budget.
    pub entries_max: usize,
    /// Connections of this core that have not logged in.
    pub unauthenticated_max: usize,
    /// Those of them that come from one address.
    pub unauthenticated_per_address_max: usize,
    /// A frame that has begun must bring `FRAME_PROGRESS_MIN` more bytes, or end, within each such time. Zero: never mind.
    pub frame_timeout: Duration,
    /// Bytes of requests a connection may have read but not yet processed.
    pub connection_bytes: usize,
    /// An idle log gets a last frame that carries the watermark.
    pub idle_marker: bool,
    /// Empty unless every core has a port of its own.
    pub ports: Vec<u16>,
}

impl Settings {
    /// Bytes on the way to the log, and to each other core, before publishers wait. They are memory too: a small budget does not
    /// allow all of the limit.
    pub fn in_flight_bytes_max(&self) -> u64 {
        (self.cache_bytes / 2).clamp(limits::IN_FLIGHT_BYTES_MIN, limits::IN_FLIGHT_BYTES_MAX) as u64
    }
}

/// What happens when a subscription's QoS0 queue is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Overflow {
    DropOldest,
    DropNew,
}

/// What happens when a subscription's QoS1 backlog is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BacklogOverflow {
    /// The publish is refused.
    Reject,
    /// The subscription's oldest message is given up.
    DropOldest,
}
