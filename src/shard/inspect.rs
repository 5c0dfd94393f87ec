//! What a shard tells about itself when an operator asks.
//!
//! Owns: the answers' shape. Never: how they are spelt (the gateway writes JSON).

use bytes::Bytes;

use crate::types::{CoreId, Qos, Seq, SubId, VShard};

/// One topic.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TopicInfo {
    /// Its name, UTF-8.
    pub topic: Bytes,
    pub core: CoreId,
    pub vshard: VShard,
    /// Messages some subscription still waits for.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    pub subscriptions: u64,
    /// Accepted since this run of the broker started.
    pub published: u64,
    /// What the next message will be.
    pub next_seq: Seq,
}

/// One subscription.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SubInfo {
    pub id: SubId,
    /// Its topic's name, UTF-8.
    pub topic: Bytes,
    /// A durable one's name, UTF-8.
    pub name: Option<Bytes>,
    pub kind: SubInfoKind,
    pub qos: Qos,
    /// Connections attached to it.
    pub consumers: u64,
    /// Messages waiting, without those in flight.
    pub backlog: u64,
    pub in_flight: u64,
    /// Since this run of the broker started, like the next two.
    pub delivered: u64,
    pub acked: u64,
    /// Deliveries that timed out or were rejected.
    pub failed: u64,
}

/// How a subscription lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubInfoKind {
    Ephemeral,
    Durable,
    Orphan,
    DeadLetters,
}
