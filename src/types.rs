//! Ids and units. Every id is a newtype, so that a topic's sequence cannot be passed for a delivery tag.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One core of the broker in this run: 0..cores. Not a CPU number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct CoreId(pub u16);

/// A virtual shard: the unit of placement and of log order. Their count is fixed when the store is created;
/// which core owns one is computed at start (DURABILITY: day-one fields).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct VShard(pub u16);

impl VShard {
    /// The core that owns this virtual shard in a run with `cores` cores.
    pub fn core(self, cores: u16) -> CoreId {
        CoreId(self.0 % cores)
    }
}

/// One client connection; unique for the life of the process. The home core is in the upper 16 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnId(u64);

impl ConnId {
    pub fn new(core: CoreId, serial: u64) -> ConnId {
        assert!(serial < 1 << 48, "connection serial out of range");
        ConnId(u64::from(core.0) << 48 | serial)
    }

    /// The core the connection lives on.
    pub fn core(self) -> CoreId {
        CoreId((self.0 >> 48) as u16)
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.core().0, self.0 & ((1 << 48) - 1))
    }
}

/// A topic: its virtual shard and its number there. Stable for the life of the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TopicId {
    pub vshard: VShard,
    pub index: u32,
}

/// A subscription: its virtual shard and its number there. Stable for the life of the store if it is durable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SubId {
    pub vshard: VShard,
    pub index: u32,
}

/// The id a client knows its subscription by; valid only on the connection that made it. Non-zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ClientSub(pub u64);

/// Position of a message in its topic, from 1. QoS0 messages take numbers too; only those of QoS1 survive a restart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Seq(pub u64);

impl Seq {
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

/// What a client acknowledges a delivery by: counts from 1 per subscription, the same on redelivery.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DeliveryTag(pub u64);

/// Byte position in one stream of the log: `segment sequence * segment size + offset`. Only grows, never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The log of one core during one boot of the broker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct StreamId {
    /// Grows by one per start.
    pub incarnation: u64,
    pub core: u16,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.core)
    }
}

/// A segment file's number: the `NNNN` of `slot-NNNN.seg`. Says nothing about what is inside; its header does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Slot(pub u32);

/// Where one record's bytes lie on disk: enough to read them back without any other table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct LogRef {
    pub slot: Slot,
    /// Bytes from the start of the segment to the record's first byte.
    pub offset: u32,
    /// Bytes of the whole record, its header included.
    pub len: u32,
}

/// Quality of service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Qos {
    /// Kept in memory, may vanish.
    AtMostOnce = 0,
    /// Logged before it is delivered, redelivered until acknowledged.
    AtLeastOnce = 1,
}

impl Qos {
    pub fn from_byte(byte: u8) -> Option<Qos> {
        match byte {
            0 => Some(Qos::AtMostOnce),
            1 => Some(Qos::AtLeastOnce),
            _ => None,
        }
    }
}

/// How far an accepted publish had come when it was confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Durability {
    /// In the broker's memory.
    Memory = 0,
    /// The write to the log completed: survives the death of the process.
    Written = 1,
    /// The sync completed: survives power loss.
    Synced = 2,
}

/// Hands out subscription ids 1, 2, 3, … for the whole process, whichever core asks (V1 B9).
#[derive(Clone, Debug, Default)]
pub struct ClientSubIds(Arc<AtomicU64>);

impl ClientSubIds {
    pub fn next(&self) -> ClientSub {
        ClientSub(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }
}
