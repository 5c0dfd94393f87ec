//! What the log remembers: one record per thing that happened to a virtual shard.

use crate::time::WallMs;
use crate::types::Seq;

/// A log record, borrowed from whoever has it: the shard that appends it, or the batch it was read from.
#[derive(Clone, PartialEq, Debug)]
pub enum Record<'a> {
    /// `topic`: the topic's number in its virtual shard.
    TopicCreated { topic: u32, name: &'a [u8] },
    TopicDeleted { topic: u32 },
    /// `start`: the first sequence the subscription gets.
    SubCreated { sub: u32, topic: u32, kind: SubKind<'a>, start: Seq, created: WallMs },
    SubDeleted { sub: u32 },
    Published(Published<'a>),
    /// Inclusive ranges; these messages are finished for this subscription (acknowledged, expired by choice, dead-lettered).
    Acked { sub: u32, ranges: Vec<(Seq, Seq)> },
    /// How often deliveries of `seq` have failed so far (timed out or rejected).
    Failed { sub: u32, seq: Seq, failures: u16 },
    /// A copy of a live message, moved forward so that its old segment can be freed. Not a log entry: takes no index.
    Relocated(Published<'a>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubKind<'a> {
    /// Lives until deleted or idle past its TTL.
    Durable { name: &'a [u8] },
    /// A v1 QoS1 subscription: without name, adopted by the next v1 subscriber with the same key.
    Orphan { key: KeyId },
    /// Holds a dead-letter topic's messages until somebody consumes them.
    DeadLetters,
}

/// Names an API key without being it: the first 16 bytes of its SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct KeyId(pub [u8; 16]);

#[derive(Clone, PartialEq, Debug)]
pub struct Published<'a> {
    pub topic: u32,
    pub seq: Seq,
    pub published: WallMs,
    /// 0: never.
    pub expires: WallMs,
    /// Not delivered before; 0: at once.
    pub not_before: WallMs,
    pub priority: u8,
    pub identity: Option<IdentityRef<'a>>,
    /// Encoded end-to-end options, without their length; at most `OPTIONS_LEN_MAX`.
    pub options: &'a [u8],
    pub payload: &'a [u8],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IdentityRef<'a> {
    MessageId(&'a [u8]),
    Publisher { id: u64, sequence: u64 },
}
