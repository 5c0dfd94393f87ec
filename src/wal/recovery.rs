//! Bytes to records, and a verdict on the tail.
//!
//! Owns: which segments belong to the log, where each stream ends, and whether that end is a torn tail or a loss. Never: opens a
//! file, writes, repairs. The caller has locked and synced the segments before it asks (DURABILITY 2.5, 1).
//! Neighbours: `format` says what lies at one position; the shard applies what comes out; the keeper takes the free slots.

use bytes::Bytes;

use super::checkpoint::Checkpoint;
use super::format::{BytesClass, Segment, StoreId};
use super::record::{Discarded, Record, RecordError, RecoveryNote, SealedStream};
use crate::time::WallMs;
use crate::types::{LogRef, Lsn, Slot, StreamId, VShard};

/// The slots of a store.
pub trait Segments {
    /// Every slot there is, in any order.
    fn slots(&self) -> Vec<Slot>;

    /// Exactly `len` bytes. A slot that is shorter is an error, never an end.
    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError>;
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("slot {}: {len} bytes at {offset} cannot be read: {reason}", slot.0)]
pub struct ReadError {
    pub slot: Slot,
    pub offset: u32,
    pub len: u32,
    pub reason: String,
}

/// What the store's own file says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreShape {
    pub store: StoreId,
    pub segment_size: u32,
    pub vshards: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Stops at the first damage.
    Strict,
    /// Collects damage and goes on behind it: for `wal salvage` and `wal verify`.
    Salvage,
}

/// One record, in the order of the log.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry<'a> {
    pub vshard: VShard,
    /// `None`: no log entry (a relocated message).
    pub index: Option<u64>,
    pub at: LogRef,
    pub record: Record<'a>,
    /// Broker time when it was appended.
    pub time: WallMs,
    pub stream: StreamId,
    /// Position of the frame it lies in.
    pub frame: Lsn,
}

/// What a start needs to know besides the records.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// By virtual shard; 0: none.
    pub last_index: Vec<u64>,
    /// The largest incarnation seen anywhere; the new one must be larger.
    pub incarnation_max: u64,
    /// How every stream with a live segment ends. The next streams begin with it.
    pub sealed: Vec<SealedStream>,
    /// The largest broker time seen anywhere.
    pub time: WallMs,
    /// What the tails cost in this recovery; streams sealed before do not count.
    pub truncated: Discarded,
    pub frames: u64,
    pub records: u64,
    /// Every stream of the last boot ends with a clean stop.
    pub clean: bool,
    /// Segments that hold a part of the log.
    pub live: Vec<Segment>,
    /// Slots that hold none.
    pub free: Vec<Slot>,
    /// In `Salvage` mode: what is lost.
    pub damage: Vec<Damage>,
}

impl Recovered {
    /// The first frame of the new streams.
    pub fn note(&self) -> RecoveryNote {
        RecoveryNote { sealed: self.sealed.clone() }
    }
}

/// A part of the log that was durable and is not readable any more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "stream {stream}: log positions {from}..{to} were durable and are lost (segment {sequence}, slot {slot:?}, \
     offset {offset}: {class:?} bytes); {frames_before} frames before, {frames_after} after; virtual shards {vshards:?}"
)]
pub struct Damage {
    pub stream: StreamId,
    pub sequence: u64,
    /// `None`: no slot holds the segment.
    pub slot: Option<Slot>,
    pub offset: u32,
    pub from: Lsn,
    /// The next frame that is whole, or how far the log is known to have been durable.
    pub to: Lsn,
    pub class: BytesClass,
    pub frames_before: u64,
    pub records_before: u64,
    pub frames_after: u64,
    pub records_after: u64,
    /// Virtual shards seen in this stream before the damage.
    pub vshards: Vec<VShard>,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Corrupt(Box<Damage>),
    #[error("slot {} belongs to another store or node", slot.0)]
    ForeignSlot { slot: Slot },
    #[error("the checkpoint belongs to another store or node, or was made with another segment size")]
    ForeignCheckpoint,
    #[error("slot {} is of format version {version}, which this program does not know", slot.0)]
    Version { slot: Slot, version: u32 },
    #[error("slot {} was made with segments of {found} bytes, the store has {expected}", slot.0)]
    SegmentSize { slot: Slot, found: u32, expected: u32 },
    #[error("slots {} and {} both claim to be segment {sequence} of stream {stream}", first.0, second.0)]
    Twice { stream: StreamId, sequence: u64, first: Slot, second: Slot },
    #[error("two recoveries disagree on the end of stream {stream}: {first} and {second}")]
    SealedTwice { stream: StreamId, first: Lsn, second: Lsn },
    #[error("virtual shard {}: expected log index {expected}, found {found} in stream {stream} at {frame}", vshard.0)]
    IndexGap { vshard: VShard, expected: u64, found: u64, stream: StreamId, frame: Lsn },
    #[error("stream {stream}: a whole frame at {frame} names virtual shard {}, there are {vshards}", vshard.0)]
    VShard { vshard: VShard, vshards: u16, stream: StreamId, frame: Lsn },
    #[error("stream {stream}: a whole frame at {frame} holds a bad record: {error}")]
    Record { stream: StreamId, frame: Lsn, error: RecordError },
    #[error("stream {stream}: a whole frame at {frame} does not hold the records it counts")]
    Count { stream: StreamId, frame: Lsn },
}
