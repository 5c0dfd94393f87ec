//! From a store's directory to the records in it, and to what the keeper and the new streams begin with.
//!
//! Owns: the order of a start (DURABILITY 2.5), and which slots are free at once. Never: writes.
//! Neighbours: `disk` locks, syncs and reads; `recovery` judges; the caller's visitor applies what it finds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::checkpoint::{self, Checkpoint, ChooseError};
use super::disk::{SlotFiles, checkpoint_paths};
use super::format::{HeaderBlock, Segment, SegmentHeader};
use super::recovery::{self, Entry, Mode, Recovered, RecoveryError, StoreShape};
use super::segments::{Policy, Segments};
use super::store::{Store, StoreError};
use crate::limits::BLOCK;
use crate::types::Slot;

/// A recovered store, ready for the keeper and for one new stream per core.
#[derive(PartialEq, Debug)]
pub struct RecoveredStore {
    pub recovered: Recovered,
    /// Of this run: larger than any ever seen in the store.
    pub incarnation: u64,
    /// Checkpoint files that were there and not whole.
    pub fallbacks: u32,
    pub took: std::time::Duration,
    /// Of the newest checkpoint; 0: none was ever whole.
    pub checkpoint_number: u64,
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
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    #[error(transparent)]
    Checkpoints(#[from] ChooseError),
    /// The disk does not give a checkpoint back.
    #[error("read checkpoint {path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    /// The checkpoint is whole, but whoever loads the states cannot read one of them.
    #[error("{0}")]
    State(String),
}

impl StartError {
    /// What to do about the store in `dir`: a clause to add.
    pub fn advice(&self, dir: &Path) -> String {
        match self {
            StartError::Store(_) | StartError::Unreadable { .. } | StartError::State(_) => String::new(),
            StartError::Recovery(_) | StartError::Checkpoints(_) => format!(
                ". Nothing was changed. To save what is whole: `blipmq wal salvage {0} --accept-loss --out {0}.saved`, then \
                 start with that as wal_path",
                dir.display()
            ),
        }
    }

    /// As [`StoreError::exit_code`]; whatever recovery refuses is 65, unreadable parts of the log too: they are no end of it.
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::Store(error) => error.exit_code(),
            StartError::Recovery(_)
            | StartError::Checkpoints(_)
            | StartError::Unreadable { .. }
            | StartError::State(_) => 65,
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
            Err(source) => return Err(StartError::Unreadable { path, source }),
        };
    }
    let [a, b] = &files;
    Ok(choose([a.as_deref(), b.as_deref()])?)
}

/// Of the two files' contents.
pub fn choose(files: [Option<&[u8]>; 2]) -> Result<Checkpoints, ChooseError> {
    let chosen = checkpoint::choose(files[0], files[1])?;
    let older = chosen.checkpoint.as_ref().and_then(|newest| {
        let mut other = files.iter().flatten().filter_map(|bytes| Checkpoint::decode(bytes).ok());
        other.find(|older| older.number < newest.number)
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
    pub fn segments(&self, policy: Policy, cores: u16) -> Segments {
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
    let mut out = recover_from(&shape(store), &files, read_checkpoints(store)?, load, visit)?;
    out.took = started.elapsed();
    let fallbacks = out.fallbacks;
    let Recovered { truncated, frames, records, clean, .. } = &out.recovered;
    tracing::debug!(
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

/// The part of a start that neither opens a file nor reads a clock. `files` are locked and synced.
pub fn recover_from(
    shape: &StoreShape,
    files: &dyn recovery::Segments,
    checkpoints: Checkpoints,
    load: &mut dyn FnMut(&Checkpoint) -> Result<(), String>,
    visit: &mut dyn FnMut(Entry<'_>),
) -> Result<RecoveredStore, StartError> {
    let Checkpoints { newest, older, fallbacks } = checkpoints;
    if let Some(checkpoint) = &newest {
        load(checkpoint).map_err(StartError::State)?;
    }
    let recovered = recovery::recover(shape, files, newest.as_ref(), Mode::Strict, visit)?;
    let slots = at_start(files, shape.segment_size, &recovered.live, older.as_ref())?;
    Ok(RecoveredStore {
        incarnation: recovered.incarnation_max + 1,
        checkpoint_number: newest.map_or(0, |checkpoint| checkpoint.number),
        fallbacks,
        took: std::time::Duration::ZERO,
        recovered,
        slots,
    })
}

/// Sorts the slots. `live`: what recovery found to be a part of the log.
fn at_start(
    files: &dyn recovery::Segments,
    segment_size: u32,
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
                let free = older.is_some_and(|older| is_done(&segment, older, segment_size));
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

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::time::WallMs;
    use crate::types::{Seq, StreamId, VShard};
    use crate::wal::checkpoint::VShardState;
    use crate::wal::disk::{slot_path, tests::scratch};
    use crate::wal::format::BytesClass;
    use crate::wal::record::{Published, Record};
    use crate::wal::rewrite::Rewriter;
    use crate::wal::store::tests::options;

    const PAYLOAD: usize = 10_000;
    pub const MESSAGES: u64 = 300;

    fn message(seq: u64, payload: &[u8]) -> Record<'_> {
        Record::Published(Published {
            topic: 1,
            seq: Seq(seq),
            published: WallMs(5),
            expires: WallMs(0),
            not_before: WallMs(0),
            priority: 0,
            identity: None,
            options: &[],
            payload,
        })
    }

    /// A store of 300 messages of 10 kB, in segments of 1 MiB. The last frames are padded and marked.
    pub fn filled(dir: &Path, states: Option<Vec<VShardState>>) -> Store {
        let options = options(dir.join("s.wal"));
        let mut rewriter = Rewriter::create(&options).unwrap();
        rewriter.append(VShard(2), &Record::TopicCreated { topic: 1, name: b"t" }, WallMs(5)).unwrap();
        for seq in 1..=MESSAGES {
            rewriter.append(VShard(2), &message(seq, &[seq as u8; PAYLOAD]), WallMs(5)).unwrap();
        }
        assert_eq!(rewriter.finish(states).unwrap(), options.path);
        Store::open(&options).unwrap()
    }

    fn read(store: &Store) -> Result<(RecoveredStore, Vec<u64>), StartError> {
        let mut seqs = Vec::new();
        let mut visit = |entry: Entry<'_>| {
            if let Record::Published(published) = &entry.record {
                assert_eq!(published.payload, [published.seq.0 as u8; PAYLOAD]);
                seqs.push(published.seq.0);
            }
        };
        let recovered = recover(store, &mut |_| Ok(()), &mut visit)?;
        Ok((recovered, seqs))
    }

    #[test]
    fn what_was_written_is_read() {
        let store = filled(&scratch("start-read"), None);
        let (recovered, seqs) = read(&store).unwrap();
        assert_eq!(seqs, (1..=MESSAGES).collect::<Vec<u64>>());
        assert_eq!((recovered.incarnation, recovered.checkpoint_number, recovered.fallbacks), (2, 0, 0));
        assert!(recovered.recovered.clean);
        assert_eq!(recovered.recovered.last_index[2], MESSAGES + 1);
        let free = recovered.slots.iter().filter(|(_, state)| *state == AtStart::Free).count();
        assert_eq!(recovered.recovered.live.len() + free, recovered.slots.len());
        assert!(recovered.recovered.live.len() >= 3);
        // And again: a start modifies nothing.
        assert_eq!(read(&store).unwrap().1.len(), seqs.len());
    }

    #[test]
    fn one_damaged_byte_is_refused_and_its_place_named() {
        let store = filled(&scratch("start-damage"), None);
        let path = slot_path(&store.wal_dir(), Slot(1));
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 500_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 500_000).unwrap();
        let error = read(&store).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        let StartError::Recovery(RecoveryError::Corrupt(damage)) = &error else { panic!("{error}") };
        assert_eq!((damage.slot, damage.sequence, damage.class), (Some(Slot(1)), 1, BytesClass::Torn));
        assert!(damage.offset <= 500_000 && error.to_string().contains("slot-0001.seg"), "{error}");
        assert!(error.advice(Path::new("/s")).contains("blipmq wal salvage /s --accept-loss"), "{error}");
    }

    #[test]
    fn a_missing_segment_is_refused() {
        let store = filled(&scratch("start-missing"), Some(vec![VShardState::default(); 8]));
        fs::remove_file(slot_path(&store.wal_dir(), Slot(1))).unwrap();
        let error = read(&store).unwrap_err();
        let StartError::Recovery(RecoveryError::Corrupt(damage)) = &error else { panic!("{error}") };
        assert_eq!((damage.slot, damage.sequence, damage.class), (None, 1, BytesClass::Missing), "listed");
        for path in checkpoint_paths(&store.ckpt_dir()) {
            if path.exists() {
                fs::remove_file(path).unwrap();
            }
        }
        let error = read(&store).unwrap_err();
        let StartError::Recovery(RecoveryError::Corrupt(damage)) = &error else { panic!("{error}") };
        let end_of_first = u64::from(store.segment_size());
        assert!(damage.from.0 <= end_of_first && damage.to.0 > end_of_first, "witnessed by what follows: {error}");
    }

    #[test]
    fn an_unreadable_checkpoint_is_no_missing_one() {
        let store = filled(&scratch("start-unreadable"), Some(vec![VShardState::default(); 8]));
        let path = checkpoint_paths(&store.ckpt_dir()).into_iter().find(|path| path.exists()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap(); // opens, and cannot be read
        let error = read(&store).unwrap_err();
        assert!(matches!(&error, StartError::Unreadable { path: of, .. } if *of == path), "{error}");
        assert_eq!(error.exit_code(), 65);
    }

    #[test]
    fn a_short_segment_is_refused() {
        let store = filled(&scratch("start-short"), None);
        let path = slot_path(&store.wal_dir(), Slot(1));
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let error = read(&store).unwrap_err();
        assert!(matches!(&error, StartError::Store(StoreError::Damaged { .. })), "{error}");
        assert!(error.to_string().contains("slot-0001.seg"), "{error}");
    }

    #[test]
    fn a_checkpoint_is_handed_over_before_the_records() {
        let mut states = vec![VShardState::default(); 8];
        states[2] = VShardState { last_index: 11, state: bytes::Bytes::from_static(b"blob") };
        let store = filled(&scratch("start-checkpoint"), Some(states));
        let mut loaded = Vec::new();
        let mut indexes = Vec::new();
        recover(
            &store,
            &mut |checkpoint| {
                loaded.push(checkpoint.vshards[2].clone());
                Ok(())
            },
            &mut |entry| indexes.push(entry.index.unwrap()),
        )
        .unwrap();
        assert_eq!(loaded, [VShardState { last_index: 11, state: bytes::Bytes::from_static(b"blob") }]);
        // The topic's creation is in the state, the messages are read off the segments again.
        assert_eq!(indexes, (2..=MESSAGES + 1).collect::<Vec<u64>>());
        let refused = recover(&store, &mut |_| Err("unreadable state".to_owned()), &mut |_| {}).unwrap_err();
        assert_eq!((refused.exit_code(), refused.to_string().as_str()), (65, "unreadable state"));
    }

    #[test]
    fn a_slot_that_neither_checkpoint_needs_is_free_at_once() {
        let stream = |incarnation| StreamId { incarnation, core: 0 };
        let by = |incarnation, sequence| Segment { stream: stream(incarnation), sequence, slot: Slot(0), salt: 1 };
        let size = 1 << 20;
        let checkpoint = Checkpoint {
            store: crate::wal::format::StoreId { uuid: [0; 16], node: 0 },
            segment_size: size,
            number: 4,
            incarnation: 3,
            time: WallMs(0),
            streams: vec![checkpoint::StreamState {
                stream: stream(3),
                covered: crate::types::Lsn(2 * u64::from(size) + 4096),
                durable: crate::types::Lsn(2 * u64::from(size) + 4096),
                sealed: None,
            }],
            live: vec![by(2, 7), by(3, 0)],
            vshards: Vec::new(),
        };
        let done = |segment| is_done(&segment, &checkpoint, size);
        assert!(done(by(2, 6)), "an earlier run's, not listed");
        assert!(!done(by(2, 7)), "listed");
        assert!(!done(by(3, 0)) && done(by(3, 1)), "covered, the first one listed");
        assert!(!done(by(3, 2)), "not covered to its end");
        assert!(!done(by(4, 0)), "written after the checkpoint");
    }
}
