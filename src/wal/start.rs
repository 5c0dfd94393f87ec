//! From a store's directory to the records in it, and to what the keeper and the new streams begin with.
//!
//! Owns: the order of a start (DURABILITY 2.5), and which slots are free at once. Never: writes.
//! Neighbours: `disk` locks, syncs and reads; `recovery` judges; the caller's visitor applies what it finds.

use std::fs;
use std::io;
use std::time::Instant;

use super::checkpoint::{self, Checkpoint, ChooseError};
use super::disk::{SlotFiles, checkpoint_paths};
use super::format::{HeaderBlock, Segment, SegmentHeader};
use super::recovery::{self, Entry, Mode, Recovered, RecoveryError, Segments as _, StoreShape};
use super::segments::{Policy, Segments};
use super::store::{Store, StoreError, io_at};
use crate::limits::BLOCK;
use crate::types::Slot;

/// A recovered store, ready for the keeper and for one new stream per core.
#[derive(Debug)]
pub struct RecoveredStore {
    pub recovered: Recovered,
    /// Of this run: larger than any ever seen in the store.
    pub incarnation: u64,
    /// Checkpoint files that were there and not whole.
    pub fallbacks: u32,
    pub took: std::time::Duration,
    /// Of the newest checkpoint; 0: none was ever whole.
    pub(super) checkpoint_number: u64,
    slots: Vec<(Slot, AtStart)>,
}

/// What a slot holds when a run begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum AtStart {
    /// Nothing that either checkpoint needs.
    Free,
    /// A part of the log, or of what the older checkpoint may need.
    Used(Segment),
    Unknown,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}; to save what is whole: `blipmq wal salvage DIR --accept-loss --out NEW_DIR`")]
    Recovery(#[from] RecoveryError),
    #[error("{0}; to save what is whole: `blipmq wal salvage DIR --accept-loss --out NEW_DIR`")]
    Checkpoints(#[from] ChooseError),
    /// The checkpoint is whole, but whoever loads the states cannot read one of them.
    #[error("{0}")]
    State(String),
}

impl StartError {
    /// As [`StoreError::exit_code`]; whatever recovery refuses is 65, unreadable parts of the log too: they are no end of it.
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::Store(error) => error.exit_code(),
            StartError::Recovery(_) | StartError::Checkpoints(_) | StartError::State(_) => 65,
        }
    }
}

/// Which of the two files counts, and what the other one still needs.
#[derive(Debug)]
pub struct Checkpoints {
    pub newest: Option<Checkpoint>,
    /// Recovery may fall back to it if the newest is damaged before the next one is written.
    pub older: Option<Checkpoint>,
    pub fallbacks: u32,
}

/// Reads both checkpoint files. A file that cannot be read is an error, not a missing file.
pub fn read_checkpoints(store: &Store) -> Result<Checkpoints, StartError> {
    let mut files = [None, None];
    for (file, path) in files.iter_mut().zip(checkpoint_paths(&store.ckpt_dir())) {
        *file = match fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io_at("read", &path)(error).into()),
        };
    }
    let [a, b] = &files;
    let chosen = checkpoint::choose(a.as_deref(), b.as_deref())?;
    let older = chosen.checkpoint.as_ref().and_then(|newest| {
        let other = files.iter().flatten().filter_map(|bytes| Checkpoint::decode(bytes).ok());
        other.into_iter().find(|older| older.number < newest.number)
    });
    Ok(Checkpoints { newest: chosen.checkpoint, older, fallbacks: chosen.fallbacks })
}

impl RecoveredStore {
    /// Of a store without a log.
    #[cfg(test)]
    pub(super) fn empty() -> RecoveredStore {
        RecoveredStore {
            recovered: Recovered::default(),
            incarnation: 1,
            fallbacks: 0,
            took: std::time::Duration::ZERO,
            checkpoint_number: 0,
            slots: Vec::new(),
        }
    }

    /// The keeper's table of slots.
    pub(super) fn segments(&self, policy: Policy, cores: u16) -> Segments {
        let mut segments = Segments::new(policy, self.incarnation, cores);
        for &(slot, state) in &self.slots {
            match state {
                AtStart::Free => segments.add_free(slot),
                AtStart::Used(segment) => segments.add_recovered(segment),
                AtStart::Unknown => segments.add_unknown(slot),
            }
        }
        segments
    }
}

/// What the pure half needs to know of a store.
pub fn shape(store: &Store) -> StoreShape {
    let identity = store.identity();
    StoreShape { store: store.id(), segment_size: identity.segment_size, vshards: identity.virtual_shards }
}

/// Reads the whole store (DURABILITY 2.5). Modifies nothing; may be interrupted and repeated at will.
///
/// - `load`: gets the newest checkpoint, if any, before the first record; its states are the caller's to keep.
/// - `visit`: gets every record since, and of the messages before it those that are still in a listed segment.
pub fn recover(
    store: &Store,
    load: &mut dyn FnMut(&Checkpoint) -> Result<(), String>,
    visit: &mut dyn FnMut(Entry<'_>),
) -> Result<RecoveredStore, StartError> {
    let started = Instant::now();
    let files = SlotFiles::open_synced(store)?;
    let Checkpoints { newest, older, fallbacks } = read_checkpoints(store)?;
    if let Some(checkpoint) = &newest {
        load(checkpoint).map_err(StartError::State)?;
    }
    let recovered = recovery::recover(&shape(store), &files, newest.as_ref(), Mode::Strict, visit)?;
    let slots = at_start(&files, store, &recovered.live, older.as_ref())?;
    let out = RecoveredStore {
        incarnation: recovered.incarnation_max + 1,
        checkpoint_number: newest.map_or(0, |checkpoint| checkpoint.number),
        fallbacks,
        took: started.elapsed(),
        recovered,
        slots,
    };
    let Recovered { truncated, frames, records, clean, .. } = &out.recovered;
    tracing::info!(
        frames,
        records,
        clean,
        fallbacks,
        incarnation = out.incarnation,
        segments = out.slots.len(),
        truncated_frames = truncated.frames,
        truncated_records = truncated.records,
        truncated_bytes = truncated.bytes,
        took_ms = u64::try_from(out.took.as_millis()).unwrap_or(u64::MAX),
        "the log is recovered"
    );
    Ok(out)
}

/// Sorts the slots. `live`: what recovery found to be a part of the log.
fn at_start(
    files: &SlotFiles,
    store: &Store,
    live: &[Segment],
    older: Option<&Checkpoint>,
) -> Result<Vec<(Slot, AtStart)>, RecoveryError> {
    let mut slots = Vec::new();
    for slot in files.slots() {
        let header = SegmentHeader::decode(&files.read(slot, 0, BLOCK as u32)?);
        let state = match (live.iter().find(|segment| segment.slot == slot), header) {
            (Some(segment), _) => AtStart::Used(*segment),
            (None, HeaderBlock::Zero) => AtStart::Free,
            (None, HeaderBlock::Whole(header)) => {
                let segment = Segment { stream: header.stream, sequence: header.sequence, slot, salt: header.salt };
                let free = older.is_some_and(|older| is_done(&segment, older, store.segment_size()));
                if free { AtStart::Free } else { AtStart::Used(segment) }
            }
            (None, HeaderBlock::Damaged | HeaderBlock::Unsupported { .. }) => AtStart::Unknown,
        };
        slots.push((slot, state));
    }
    Ok(slots)
}

/// Whether a start from this checkpoint would not look at the segment: written before it, covered by it, not listed in it.
fn is_done(segment: &Segment, checkpoint: &Checkpoint, segment_size: u32) -> bool {
    let end = (segment.sequence + 1).saturating_mul(u64::from(segment_size));
    let covered = segment.stream.incarnation < checkpoint.incarnation
        || checkpoint.streams.iter().any(|state| state.stream == segment.stream && end <= state.covered.0);
    covered && !checkpoint.live.contains(segment)
}
