//! Everything a shard can ask for. Each effect is safe to perform the moment it exists.

use bytes::Bytes;

use crate::protocol::reply::Reply;
use crate::protocol::request::Version;
use crate::shard::message::CoreBatch;
use crate::time::Instant;
use crate::types::{ConnId, CoreId, Lsn, Slot, VShard};

#[derive(Debug, Default)]
pub struct Effects {
    /// In order per connection.
    pub replies: Vec<(ConnId, Version, Reply)>,
    /// One batch per other core, indexed by core.
    pub to_core: Vec<CoreBatch>,
    /// After the replies.
    pub close: Vec<(ConnId, CloseReason)>,
    pub pause_reading: Vec<ConnId>,
    pub resume_reading: Vec<ConnId>,
    /// An AUTH has been answered: whether the connection is logged in now. Until then its reader decodes no further.
    pub auth_decided: Vec<(ConnId, bool)>,
    pub reads: Vec<BacklogRead>,
    pub to_keeper: Vec<ForKeeper>,
    /// The log holds something else than was written: the process must not go on.
    pub corrupt: Option<String>,
    /// The earliest deadline; looked at on every beat.
    pub wake_at: Option<Instant>,
}

impl Effects {
    pub fn new(cores: u16) -> Effects {
        Effects { to_core: (0..cores).map(|_| CoreBatch::default()).collect(), ..Effects::default() }
    }

    pub fn core(&mut self, core: CoreId) -> &mut CoreBatch {
        &mut self.to_core[usize::from(core.0)]
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// Bytes that are no frame.
    BadFrame,
    /// Not logged in within the deadline.
    AuthDeadline,
    /// Reads its replies too slowly.
    SlowConsumer,
    /// No sign of life.
    Silent,
    /// A frame that has begun does not go on.
    SlowFrame,
    /// Too many connections that have not logged in.
    TooManyUnauthenticated,
}

/// Aligned on both ends to `BLOCK`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BacklogRead {
    pub slot: Slot,
    pub offset: u32,
    pub len: u32,
}

#[derive(Debug)]
pub enum ForKeeper {
    WantGrant {
        count: usize,
    },
    Snapshot(Snapshot),
    /// Nothing was logged since the last snapshot.
    Unchanged,
    Relocated {
        slot: Slot,
    },
}

/// What this core's part of a checkpoint says. Everything in it is durable.
#[derive(Debug)]
pub struct Snapshot {
    /// The log up to here is contained in it.
    pub covered: Lsn,
    /// What of the log is known synced.
    pub durable: Lsn,
    /// Per virtual shard: last index and state.
    pub vshards: Vec<(VShard, u64, Bytes)>,
    /// Slots that hold messages somebody wants: how many, and their bytes.
    pub live: Vec<(Slot, u32, u64)>,
}
