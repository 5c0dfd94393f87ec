//! Bytes to records, and a verdict on the tail.
//!
//! Owns: which segments belong to the log, where each stream ends, and whether that end is a torn tail or a loss. Never: opens a
//! file, writes, repairs. The caller has locked and synced the segments before it asks (DURABILITY 2.5, 1).
//! Neighbours: `format` says what lies at one position; the shard applies what comes out; the keeper takes the free slots.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::checkpoint::{Checkpoint, SealedEnd};
use super::format::{
    BytesClass, FRAME_HEADER, Found, FrameHeader, FrameKind, FrameSums, HeaderBlock, Place, SUB_BATCH_HEADER, Segment,
    SegmentHeader, StoreId, SubBatch, chain_start, classify, lsn,
};
use super::record::{Discarded, Record, RecordError, RecoveryNote, SealedStream};
use crate::limits::BLOCK;
use crate::planted::{Bug, is, planted};
use crate::time::WallMs;
use crate::types::{LogRef, Lsn, Slot, StreamId, VShard};

/// Bytes one read asks for. A larger frame is read at once.
const READ_BYTES: u32 = 1024 * 1024;

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
    /// Stops at the first damage: nothing that was durable is ever skipped.
    Strict,
    /// Collects damage and goes on behind it: for `wal salvage` and `wal verify`. What it yields is not a log to continue.
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
    /// Slots that hold none, as far as this checkpoint knows: see [`Chosen::held`](super::checkpoint::Chosen).
    pub free: Vec<Slot>,
    /// In `Salvage` mode: what would have stopped a strict recovery.
    pub damage: Vec<RecoveryError>,
}

impl Recovered {
    /// The first frame of the new streams.
    pub fn note(&self) -> RecoveryNote {
        if planted!(NoOpeningNote) {
            return RecoveryNote::default();
        }
        RecoveryNote { sealed: self.sealed.clone() }
    }
}

/// A part of the log that was durable and is not readable any more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
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

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.slot {
            Some(Slot(slot)) => write!(f, "slot-{slot:04}.seg, offset {}: ", self.offset)?,
            None => write!(f, "segment {} of stream {} is missing: ", self.sequence, self.stream)?,
        }
        let Damage { stream, sequence, from, to, frames_before, records_before, frames_after, records_after, .. } =
            self;
        write!(f, "stream {stream}, segment {sequence}, log positions {from} to {to} were durable, and here ")?;
        f.write_str(match self.class {
            BytesClass::Torn => "is a damaged batch",
            BytesClass::Stale => "is what the file held in an earlier use",
            BytesClass::Foreign => "is a batch of another place or store",
            BytesClass::Zero => "are zeros, or the file of the next segment is missing",
            BytesClass::Garbage => "is no batch at all",
            BytesClass::SegmentEnd => "the segment ends; the file of the next one is missing",
            BytesClass::Missing => "is no file",
            BytesClass::Unreadable => "the disk gives nothing",
        })?;
        write!(
            f,
            "; before it {frames_before} batches with {records_before} records are whole, after it {frames_after} with \
             {records_after}; virtual shards of this stream:"
        )?;
        self.vshards.iter().try_for_each(|vshard| write!(f, " {}", vshard.0))
    }
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

/// Reads the log: yields its records in order and decides where each stream ends.
///
/// - `checkpoint`: the newest whole one. Its states are the caller's to load before. Of what they include, only messages are
///   yielded again (their positions are not in the states).
/// - `visit` gets every record as it is found, from one frame at a time. On an error, drop what it built.
pub fn recover<S: Segments + ?Sized>(
    shape: &StoreShape,
    segments: &S,
    checkpoint: Option<&Checkpoint>,
    mode: Mode,
    visit: &mut dyn FnMut(Entry<'_>),
) -> Result<Recovered, RecoveryError> {
    Recovery::new(*shape, segments, checkpoint, mode, visit).run()
}

/// With a mistake that the model plants, to see that it would notice it.
#[cfg(test)]
pub(super) fn recover_flawed<S: Segments + ?Sized>(
    shape: &StoreShape,
    segments: &S,
    checkpoint: Option<&Checkpoint>,
    flaw: Option<Bug>,
    visit: &mut dyn FnMut(Entry<'_>),
) -> Result<Recovered, RecoveryError> {
    let mut recovery = Recovery::new(*shape, segments, checkpoint, Mode::Strict, visit);
    recovery.flaw = flaw;
    recovery.run()
}

/// What is known of one stream before it is walked.
#[derive(Debug, Default)]
struct Plan {
    /// By sequence.
    segments: BTreeMap<u64, Segment>,
    /// The checkpoint's states include everything below.
    covered: Lsn,
    /// Everything below was once known to be synced.
    durable: Lsn,
    /// How an earlier recovery ended it.
    sealed: Option<SealedStream>,
}

/// Where the walk stands.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    sequence: u64,
    /// Of the next frame.
    offset: u32,
    /// Behind the last frame.
    end: Lsn,
    /// `None`: the frame before is not there to be asked.
    chain: Option<u64>,
}

/// What the rest of a stream holds.
#[derive(Clone, Copy, Debug, Default)]
struct Tail {
    found: Discarded,
    durable: Lsn,
}

enum Look {
    Frame(FrameHeader, FrameSums, Bytes),
    Not(BytesClass),
}

struct Recovery<'a, S: ?Sized> {
    shape: StoreShape,
    reader: Reader<'a, S>,
    checkpoint: Option<&'a Checkpoint>,
    mode: Mode,
    visit: &'a mut dyn FnMut(Entry<'_>),
    plans: BTreeMap<StreamId, Plan>,
    /// Slots whose header does not make them part of the log, with what the header says.
    others: Vec<(Slot, Option<SegmentHeader>)>,
    out: Recovered,
    #[cfg(test)]
    flaw: Option<Bug>,
}

impl<'a, S: Segments + ?Sized> Recovery<'a, S> {
    fn new(
        shape: StoreShape,
        segments: &'a S,
        checkpoint: Option<&'a Checkpoint>,
        mode: Mode,
        visit: &'a mut dyn FnMut(Entry<'_>),
    ) -> Recovery<'a, S> {
        Recovery {
            shape,
            reader: Reader::new(segments, shape.segment_size, mode),
            checkpoint,
            mode,
            visit,
            plans: BTreeMap::new(),
            others: Vec::new(),
            out: Recovered::default(),
            #[cfg(test)]
            flaw: None,
        }
    }

    fn run(mut self) -> Result<Recovered, RecoveryError> {
        self.begin()?;
        self.survey()?;
        self.read_notes()?;
        self.probe_others()?;
        let mut clean = None;
        for (stream, plan) in std::mem::take(&mut self.plans) {
            let stopped = self.walk(stream, &plan)?;
            clean = match clean {
                Some((incarnation, all)) if incarnation == stream.incarnation => Some((incarnation, all && stopped)),
                _ => Some((stream.incarnation, stopped)),
            };
        }
        self.out.clean = clean.is_some_and(|(_, all)| all);
        let live: BTreeSet<Slot> = self.out.live.iter().map(|segment| segment.slot).collect();
        self.out.free.retain(|slot| !live.contains(slot));
        // Also where the log had ended before: a start would stop at each of them.
        self.out.damage.extend(self.reader.unread.into_iter().map(RecoveryError::Read));
        Ok(self.out)
    }

    /// Takes over what the checkpoint knows.
    fn begin(&mut self) -> Result<(), RecoveryError> {
        self.out.last_index = vec![0; usize::from(self.shape.vshards)];
        let Some(checkpoint) = self.checkpoint else { return Ok(()) };
        let same = checkpoint.store == self.shape.store
            && checkpoint.segment_size == self.shape.segment_size
            && checkpoint.vshards.len() == usize::from(self.shape.vshards);
        if !same {
            return Err(RecoveryError::ForeignCheckpoint);
        }
        for (last, vshard) in self.out.last_index.iter_mut().zip(&checkpoint.vshards) {
            *last = vshard.last_index;
        }
        self.out.time = checkpoint.time;
        self.out.incarnation_max = checkpoint.incarnation;
        for state in &checkpoint.streams {
            self.out.incarnation_max = self.out.incarnation_max.max(state.stream.incarnation);
        }
        Ok(())
    }

    /// Reads the header of every slot and sorts the slots into streams.
    fn survey(&mut self) -> Result<(), RecoveryError> {
        let mut slots = self.reader.segments.slots();
        slots.sort_unstable();
        for slot in slots {
            let block = match self.reader.segments.read(slot, 0, BLOCK as u32) {
                Ok(block) => block,
                Err(error) => {
                    // Not known to be free: it stays out of every list.
                    self.fail(error.into())?;
                    continue;
                }
            };
            let header = match SegmentHeader::decode(&block) {
                HeaderBlock::Zero | HeaderBlock::Damaged => None,
                HeaderBlock::Unsupported { version } => {
                    self.fail(RecoveryError::Version { slot, version })?;
                    continue;
                }
                HeaderBlock::Whole(header) if header.store != self.shape.store && !planted!(NoStoreCheck) => {
                    self.fail(RecoveryError::ForeignSlot { slot })?;
                    continue;
                }
                HeaderBlock::Whole(header) if header.segment_size != self.shape.segment_size => {
                    let (found, expected) = (header.segment_size, self.shape.segment_size);
                    self.fail(RecoveryError::SegmentSize { slot, found, expected })?;
                    continue;
                }
                HeaderBlock::Whole(header) => Some(header),
            };
            self.out.free.push(slot);
            let Some(header) = header else {
                self.others.push((slot, None));
                continue;
            };
            if !planted!(IncarnationReused) {
                self.out.incarnation_max = self.out.incarnation_max.max(header.stream.incarnation);
            }
            self.out.time = self.out.time.max(header.created);
            let segment = Segment { stream: header.stream, sequence: header.sequence, slot, salt: header.salt };
            if self.is_freed(&segment) {
                self.others.push((slot, Some(header)));
                continue;
            }
            let plan = self.plan(header.stream);
            if let Some(first) = plan.segments.get(&header.sequence).copied() {
                let (stream, sequence) = (header.stream, header.sequence);
                self.fail(RecoveryError::Twice { stream, sequence, first: first.slot, second: slot })?;
                continue;
            }
            plan.segments.insert(header.sequence, segment);
        }
        self.require_live()
    }

    /// Whether the checkpoint says that nothing in this use of a slot is needed any more.
    fn is_freed(&self, segment: &Segment) -> bool {
        let Some(checkpoint) = self.checkpoint else { return false };
        if checkpoint.live.contains(segment) {
            return false;
        }
        match checkpoint.streams.iter().find(|state| state.stream == segment.stream) {
            // Segments of a stream are freed oldest first. A position in the middle of a segment keeps that segment.
            Some(state) => segment.sequence < state.covered.0 / u64::from(self.shape.segment_size),
            None => segment.stream.incarnation <= checkpoint.incarnation,
        }
    }

    /// Whether the checkpoint says that the whole stream is not needed any more.
    fn is_retired(&self, stream: StreamId) -> bool {
        self.checkpoint.is_some_and(|checkpoint| {
            stream.incarnation <= checkpoint.incarnation
                && checkpoint.streams.iter().all(|state| state.stream != stream)
        })
    }

    /// Every segment that the checkpoint needs must be there, as far as it was durable when the checkpoint was made.
    fn require_live(&mut self) -> Result<(), RecoveryError> {
        let Some(checkpoint) = self.checkpoint else { return Ok(()) };
        for segment in &checkpoint.live {
            let size = self.shape.segment_size;
            let from = lsn(segment.sequence, size, 0);
            let plan = self.plan(segment.stream);
            let to = plan.durable.min(lsn(segment.sequence.saturating_add(1), size, 0));
            if to <= from || plan.segments.get(&segment.sequence) == Some(segment) || planted!(MissingUnnoticed) {
                continue;
            }
            self.fail(RecoveryError::Corrupt(Box::new(Damage {
                stream: segment.stream,
                sequence: segment.sequence,
                slot: None,
                offset: 0,
                from,
                to,
                class: BytesClass::Missing,
                frames_before: 0,
                records_before: 0,
                frames_after: 0,
                records_after: 0,
                vshards: Vec::new(),
            })))?;
        }
        Ok(())
    }

    fn plan(&mut self, stream: StreamId) -> &mut Plan {
        let checkpoint = self.checkpoint;
        self.plans.entry(stream).or_insert_with(|| {
            let state = checkpoint.and_then(|all| all.streams.iter().find(|state| state.stream == stream));
            let Some(state) = state else { return Plan::default() };
            let sealed = state.sealed.map(|SealedEnd { end, chain }| SealedStream {
                stream,
                end,
                chain,
                discarded: Discarded::default(),
                class: BytesClass::SegmentEnd,
            });
            Plan { segments: BTreeMap::new(), covered: state.covered, durable: state.durable, sealed }
        })
    }

    /// The first frame of a stream says how the streams before it were sealed.
    fn read_notes(&mut self) -> Result<(), RecoveryError> {
        let mut notes = Vec::new();
        for (&stream, plan) in &self.plans {
            let Some(&segment) = plan.segments.get(&0) else { continue };
            let place = self.place(segment, BLOCK as u32);
            let start = chain_start(place.store_tag, stream);
            let block = self.reader.read(segment.slot, place.offset, BLOCK as u32)?;
            let Found::Live(header, sums) = classify(&block, &place) else { continue };
            if header.kind != FrameKind::Recovery || header.prev_chain != start {
                continue;
            }
            let frame = self.reader.get(segment.slot, place.offset, header.frame_bytes)?;
            if let Some(note) = RecoveryNote::decode(&frame[FRAME_HEADER..])
                && sums.body_matches(&frame[FRAME_HEADER..])
            {
                notes.extend(note.sealed.into_iter().filter(|sealed| sealed.stream.incarnation < stream.incarnation));
            }
        }
        for sealed in notes {
            if self.is_retired(sealed.stream) {
                continue;
            }
            let plan = self.plan(sealed.stream);
            if let Some(other) = plan.sealed
                && (other.end, other.chain) != (sealed.end, sealed.chain)
            {
                let stream = sealed.stream;
                self.fail(RecoveryError::SealedTwice { stream, first: other.end, second: sealed.end })?;
                continue;
            }
            plan.sealed = Some(sealed);
        }
        // What lies wholly behind a sealed end was discarded then; its slot may be in use again.
        let size = self.shape.segment_size;
        for plan in self.plans.values_mut() {
            if let Some(sealed) = plan.sealed {
                plan.segments.retain(|&sequence, _| lsn(sequence, size, BLOCK as u32) < sealed.end);
            }
        }
        Ok(())
    }

    /// Looks for witnesses in slots whose header is damaged, missing, or older than what follows it.
    ///
    /// Only the first frame is asked who it is: at every other position a client's payload could pose as a frame. What else is
    /// believed must then name the same use of the slot, salt included.
    fn probe_others(&mut self) -> Result<(), RecoveryError> {
        for (slot, header) in std::mem::take(&mut self.others) {
            let block = self.reader.read(slot, BLOCK as u32, BLOCK as u32)?;
            let Some((first, _)) = FrameHeader::decode(&block) else { continue };
            let known = header.is_some_and(|header| {
                (header.stream, header.sequence, header.salt) == (first.stream, first.sequence, first.salt)
            });
            if known || first.store_tag != self.shape.store.tag() {
                continue;
            }
            let segment = Segment { stream: first.stream, sequence: first.sequence, slot, salt: first.salt };
            self.out.incarnation_max = self.out.incarnation_max.max(first.stream.incarnation);
            if self.is_freed(&segment) || self.is_retired(first.stream) {
                continue;
            }
            let tail = self.scan_segment(segment, BLOCK as u32)?;
            let plan = self.plan(first.stream);
            plan.durable = plan.durable.max(tail.durable);
        }
        Ok(())
    }

    /// Walks one stream to its end. Returns whether it was stopped in order.
    fn walk(&mut self, stream: StreamId, plan: &Plan) -> Result<bool, RecoveryError> {
        let size = self.shape.segment_size;
        let mut at = self.start(stream, plan);
        let mut durable = plan.durable;
        let mut scanned = None;
        let mut walked = Walked::default();
        let sealed = loop {
            if let Some(sealed) = plan.sealed.filter(|sealed| at.end >= sealed.end) {
                if at.end > sealed.end || at.chain.is_some_and(|chain| chain != sealed.chain) {
                    let damage = self.damage(stream, plan, &at, sealed.end, BytesClass::Torn, &walked);
                    self.fail(RecoveryError::Corrupt(Box::new(damage)))?;
                }
                break sealed;
            }
            let class = match self.look(plan, &at)? {
                Look::Frame(header, sums, frame) => {
                    let segment = plan.segments[&at.sequence];
                    self.frame(segment, at.offset, &header, &frame, &mut walked)?;
                    at = Cursor {
                        sequence: at.sequence,
                        offset: at.offset + header.padded_bytes(),
                        end: header.end(),
                        chain: Some(sums.chain(header.prev_chain)),
                    };
                    durable = durable.max(header.durable);
                    continue;
                }
                Look::Not(class) => class,
            };
            if self.continues(plan, &at)? {
                at = Cursor { sequence: at.sequence + 1, offset: BLOCK as u32, ..at };
                continue;
            }
            let tail = match scanned {
                Some(tail) => tail,
                None => self.scan(plan, &at)?,
            };
            scanned = Some(tail);
            durable = durable.max(tail.durable);
            if self.has(Bug::NoWatermark) || (class == BytesClass::Zero && self.has(Bug::ZeroIsEnd)) {
                durable = Lsn(0);
            }
            if planted!(TruncateOffByOne) {
                durable = Lsn(durable.0.saturating_sub(BLOCK as u64));
            }
            let must_reach = plan.sealed.map_or(durable, |sealed| sealed.end);
            if at.end >= must_reach {
                // A torn tail, or just the end: nobody knew of anything behind it.
                self.out.truncated.frames += tail.found.frames;
                self.out.truncated.bytes += tail.found.bytes;
                self.out.truncated.records += tail.found.records;
                let chain = at.chain.unwrap_or(0);
                break SealedStream { stream, end: at.end, chain, discarded: tail.found, class };
            }
            let mut damage = self.damage(stream, plan, &at, must_reach, class, &walked);
            if class == BytesClass::SegmentEnd {
                // Nothing fits here any more: what is wrong is where the next segment should begin.
                let next = Cursor { sequence: at.sequence + 1, offset: BLOCK as u32, ..at };
                if let Look::Not(class) = self.look(plan, &next)? {
                    damage = self.damage(stream, plan, &next, must_reach, class, &walked);
                }
            }
            damage.frames_after = tail.found.frames;
            damage.records_after = tail.found.records;
            if self.mode == Mode::Strict {
                return Err(RecoveryError::Corrupt(Box::new(damage)));
            }
            // The last batches of the last run are confirmed before anything on the disk says that they are durable. In an earlier
            // run, what nobody says it of was cut off, and its indexes may have been given again.
            let last_run = plan.sealed.is_none() && stream.incarnation == self.out.incarnation_max;
            let before = if last_run { Lsn(u64::MAX) } else { must_reach };
            let next = self.next_whole(plan, &at, before)?;
            damage.to = next.map_or(must_reach, |next| next.end);
            self.fail(RecoveryError::Corrupt(Box::new(damage)))?;
            match next {
                Some(next) => at = next,
                None => {
                    break SealedStream {
                        stream,
                        end: must_reach,
                        chain: at.chain.unwrap_or(0),
                        discarded: Discarded::default(),
                        class,
                    };
                }
            }
        };
        self.out.sealed.push(sealed);
        self.out.frames += walked.frames;
        self.out.records += walked.records;
        let part = plan.segments.values().filter(|segment| lsn(segment.sequence, size, BLOCK as u32) < sealed.end);
        self.out.live.extend(part);
        Ok(walked.clean)
    }

    fn start(&self, stream: StreamId, plan: &Plan) -> Cursor {
        let size = self.shape.segment_size;
        let first = Lsn(BLOCK as u64);
        match plan.segments.first_key_value() {
            Some((0, _)) => {
                let chain = Some(chain_start(self.shape.store.tag(), stream));
                Cursor { sequence: 0, offset: BLOCK as u32, end: first, chain }
            }
            Some((&sequence, _)) if sequence <= plan.covered.0 / u64::from(size) => {
                Cursor { sequence, offset: BLOCK as u32, end: lsn(sequence, size, 0), chain: None }
            }
            // The segment where the log should begin is not there.
            _ => {
                let end = plan.covered.max(first);
                let (sequence, offset) = (end.0 / u64::from(size), (end.0 % u64::from(size)) as u32);
                Cursor { sequence, offset, end, chain: None }
            }
        }
    }

    /// The frame at the cursor, if it is whole and continues the log.
    fn look(&mut self, plan: &Plan, at: &Cursor) -> Result<Look, RecoveryError> {
        let Some(&segment) = plan.segments.get(&at.sequence) else { return Ok(Look::Not(BytesClass::Missing)) };
        let whole = self.whole_frame(segment, at.offset)?;
        Ok(match whole {
            Look::Frame(header, ..) if !self.follows(&header, at) => Look::Not(BytesClass::Torn),
            other => other,
        })
    }

    /// Whether `header` says that it comes right after the frame before the cursor.
    fn follows(&self, header: &FrameHeader, at: &Cursor) -> bool {
        let follows = |chain| header.prev_end == at.end && header.prev_chain == chain;
        at.chain.is_none_or(follows) || self.has(Bug::NoChainCheck)
    }

    /// Whether this mistake is planted: by the model (many of them run at one time), or in the whole process.
    fn has(&self, bug: Bug) -> bool {
        #[cfg(test)]
        if self.flaw == Some(bug) {
            return true;
        }
        is(bug)
    }

    /// A live frame with an undamaged body, wherever the log before it ends.
    fn whole_frame(&mut self, segment: Segment, offset: u32) -> Result<Look, RecoveryError> {
        if offset + FRAME_HEADER as u32 > self.shape.segment_size {
            return Ok(Look::Not(BytesClass::SegmentEnd));
        }
        let place = self.place(segment, offset);
        let block = self.reader.get(segment.slot, offset, BLOCK as u32)?;
        let found = self.classify(&block, &place);
        let Found::Live(header, sums) = found else {
            let unreadable = self.reader.unreadable.contains(&(segment.slot, offset));
            return Ok(Look::Not(if unreadable { BytesClass::Unreadable } else { found.class() }));
        };
        let frame = self.reader.get(segment.slot, offset, header.frame_bytes)?;
        if !sums.body_matches(&frame[FRAME_HEADER..]) && !self.has(Bug::NoBodyCrc) {
            return Ok(Look::Not(BytesClass::Torn));
        }
        Ok(Look::Frame(header, sums, frame))
    }

    fn classify(&self, block: &[u8], place: &Place) -> Found {
        let found = classify(block, place);
        if let Found::Stale(header) = found
            && self.has(Bug::NoSaltCheck)
        {
            let mut place = *place;
            place.segment.salt = header.salt;
            return classify(block, &place);
        }
        found
    }

    /// Whether the segment at hand simply ended here: the next one begins with a frame that says so.
    fn continues(&mut self, plan: &Plan, at: &Cursor) -> Result<bool, RecoveryError> {
        let Some(&next) = plan.segments.get(&(at.sequence + 1)) else { return Ok(false) };
        if at.chain.is_none() {
            return Ok(false);
        }
        let place = self.place(next, BLOCK as u32);
        let block = self.reader.get(next.slot, place.offset, BLOCK as u32)?;
        let Found::Live(header, _) = self.classify(&block, &place) else { return Ok(false) };
        Ok(self.follows(&header, at))
    }

    /// Everything at and behind the cursor that looks live, in this and all later segments.
    fn scan(&mut self, plan: &Plan, at: &Cursor) -> Result<Tail, RecoveryError> {
        let mut tail = Tail::default();
        for (&sequence, &segment) in plan.segments.range(at.sequence..) {
            if sequence > at.sequence && self.has(Bug::ScanOneSegment) {
                break;
            }
            let from = if sequence == at.sequence { at.offset } else { BLOCK as u32 };
            tail.add(self.scan_segment(segment, from)?);
        }
        Ok(tail)
    }

    fn scan_segment(&mut self, segment: Segment, from: u32) -> Result<Tail, RecoveryError> {
        let mut tail = Tail::default();
        for offset in (from..self.shape.segment_size).step_by(BLOCK) {
            let place = self.place(segment, offset);
            let block = self.reader.get(segment.slot, offset, BLOCK as u32)?;
            if let Found::Live(header, _) = self.classify(&block, &place) {
                self.out.time = self.out.time.max(header.time);
                tail.durable = tail.durable.max(header.durable);
                tail.found.frames += 1;
                tail.found.bytes += u64::from(header.padded_bytes());
                tail.found.records += u64::from(header.records);
            }
        }
        Ok(tail)
    }

    /// Where the log can be read again behind damage at the cursor, if that is below `before`.
    fn next_whole(&mut self, plan: &Plan, at: &Cursor, before: Lsn) -> Result<Option<Cursor>, RecoveryError> {
        let size = self.shape.segment_size;
        for (&sequence, &segment) in plan.segments.range(at.sequence..) {
            let from = if sequence == at.sequence { at.offset + BLOCK as u32 } else { BLOCK as u32 };
            for offset in (from..size).step_by(BLOCK) {
                if let Look::Frame(header, ..) = self.whole_frame(segment, offset)? {
                    let inside = header.lsn < before;
                    return Ok(inside.then_some(Cursor { sequence, offset, end: header.lsn, chain: None }));
                }
            }
        }
        Ok(None)
    }

    /// Yields the records of one frame of the log.
    fn frame(
        &mut self,
        segment: Segment,
        offset: u32,
        header: &FrameHeader,
        frame: &Bytes,
        walked: &mut Walked,
    ) -> Result<(), RecoveryError> {
        if !planted!(TimeForgotten) {
            self.out.time = self.out.time.max(header.time);
        }
        walked.frames += 1;
        walked.records += u64::from(header.records);
        walked.clean = header.kind == FrameKind::Clean;
        let (stream, lsn) = (segment.stream, header.lsn);
        let mut at = FRAME_HEADER;
        let mut left = header.records;
        while left > 0 {
            let sub = frame.get(at..).and_then(SubBatch::decode).filter(|sub| (1..=left).contains(&sub.records));
            let Some(sub) = sub else { return self.fail(RecoveryError::Count { stream, frame: lsn }) };
            if sub.vshard.0 >= self.shape.vshards {
                let (vshard, vshards) = (sub.vshard, self.shape.vshards);
                return self.fail(RecoveryError::VShard { vshard, vshards, stream, frame: lsn });
            }
            walked.vshards.insert(sub.vshard);
            at += SUB_BATCH_HEADER;
            left -= sub.records;
            for nth in 0..u64::from(sub.records) {
                let (record, used) = match Record::decode(&frame[at..]) {
                    Ok(decoded) => decoded,
                    Err(error) => return self.fail(RecoveryError::Record { stream, frame: lsn, error }),
                };
                if record.is_entry() != (sub.base > 0) {
                    return self.fail(RecoveryError::Count { stream, frame: lsn });
                }
                let index = (sub.base > 0).then(|| sub.base.saturating_add(nth));
                let at_ref =
                    LogRef { slot: segment.slot, offset: offset + at as u32, len: record.encoded_len() as u32 };
                at += used;
                if self.admit(sub.vshard, index, &record, stream, lsn)? {
                    (self.visit)(Entry {
                        vshard: sub.vshard,
                        index,
                        at: at_ref,
                        record,
                        time: sub.time,
                        stream,
                        frame: lsn,
                    });
                }
            }
        }
        if at != frame.len() && header.kind == FrameKind::Records {
            return self.fail(RecoveryError::Count { stream, frame: lsn });
        }
        Ok(())
    }

    /// Checks that indexes are dense. Returns whether the record is to be yielded.
    fn admit(
        &mut self,
        vshard: VShard,
        index: Option<u64>,
        record: &Record<'_>,
        stream: StreamId,
        frame: Lsn,
    ) -> Result<bool, RecoveryError> {
        let Some(index) = index else { return Ok(true) };
        let nth = usize::from(vshard.0);
        let covered = self.checkpoint.map_or(0, |checkpoint| checkpoint.vshards[nth].last_index);
        if index <= covered {
            return Ok(matches!(record, Record::Published(_)));
        }
        let expected = self.out.last_index[nth].saturating_add(1);
        if index != expected && !planted!(IndexGapUnnoticed) {
            self.fail(RecoveryError::IndexGap { vshard, expected, found: index, stream, frame })?;
        }
        self.out.last_index[nth] = index.max(expected - 1);
        Ok(true)
    }

    fn damage(
        &self,
        stream: StreamId,
        plan: &Plan,
        at: &Cursor,
        to: Lsn,
        class: BytesClass,
        walked: &Walked,
    ) -> Damage {
        Damage {
            stream,
            sequence: at.sequence,
            slot: plan.segments.get(&at.sequence).map(|segment| segment.slot),
            offset: at.offset,
            from: at.end,
            to,
            class,
            frames_before: walked.frames,
            records_before: walked.records,
            frames_after: 0,
            records_after: 0,
            vshards: walked.vshards.iter().copied().collect(),
        }
    }

    fn place(&self, segment: Segment, offset: u32) -> Place {
        Place { store_tag: self.shape.store.tag(), segment, segment_size: self.shape.segment_size, offset }
    }

    /// Stops a strict recovery; a salvage remembers it and goes on.
    fn fail(&mut self, error: RecoveryError) -> Result<(), RecoveryError> {
        match self.mode {
            Mode::Strict => Err(error),
            Mode::Salvage => {
                self.out.damage.push(error);
                Ok(())
            }
        }
    }
}

/// What one stream held so far.
#[derive(Debug, Default)]
struct Walked {
    frames: u64,
    records: u64,
    vshards: BTreeSet<VShard>,
    clean: bool,
}

impl Tail {
    fn add(&mut self, other: Tail) {
        self.durable = self.durable.max(other.durable);
        self.found.frames += other.found.frames;
        self.found.bytes += other.found.bytes;
        self.found.records += other.found.records;
    }
}

/// Reads in large pieces, keeps the last one.
struct Reader<'a, S: ?Sized> {
    segments: &'a S,
    segment_size: u32,
    mode: Mode,
    slot: Slot,
    start: u32,
    piece: Bytes,
    /// Blocks that a salvage could not read and took for zeros.
    unreadable: BTreeSet<(Slot, u32)>,
    /// And why.
    unread: Vec<ReadError>,
}

impl<'a, S: Segments + ?Sized> Reader<'a, S> {
    fn new(segments: &'a S, segment_size: u32, mode: Mode) -> Reader<'a, S> {
        let (unreadable, unread) = (BTreeSet::new(), Vec::new());
        Reader { segments, segment_size, mode, slot: Slot(0), start: 0, piece: Bytes::new(), unreadable, unread }
    }

    /// `len` bytes; `offset` is a multiple of [`BLOCK`] and the end inside the segment.
    fn get(&mut self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        let held = self.slot == slot
            && offset >= self.start
            && u64::from(offset) + u64::from(len) <= u64::from(self.start) + self.piece.len() as u64;
        if !held {
            let want = len.next_multiple_of(BLOCK as u32).max(READ_BYTES).min(self.segment_size - offset);
            self.piece = self.read(slot, offset, want)?;
            (self.slot, self.start) = (slot, offset);
        }
        let from = (offset - self.start) as usize;
        Ok(self.piece.slice(from..from + len as usize))
    }

    fn read(&mut self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        let error = match self.segments.read(slot, offset, len) {
            Ok(bytes) if bytes.len() == len as usize => return Ok(bytes),
            Ok(bytes) => ReadError { slot, offset, len, reason: format!("only {} came", bytes.len()) },
            Err(error) => error,
        };
        if self.mode == Mode::Strict {
            return if planted!(ReadErrorIsEnd) { Ok(Bytes::from(vec![0; len as usize])) } else { Err(error) };
        }
        let mut whole = Vec::with_capacity(len as usize);
        for at in (offset..offset + len).step_by(BLOCK) {
            match self.segments.read(slot, at, BLOCK as u32) {
                Ok(block) if block.len() == BLOCK => whole.extend_from_slice(&block),
                other => {
                    if self.unreadable.insert((slot, at)) {
                        let reason = other.err().map_or_else(|| error.reason.clone(), |error| error.reason);
                        self.unread.push(ReadError { slot, offset: at, len: BLOCK as u32, reason });
                    }
                    whole.resize(whole.len() + BLOCK, 0);
                }
            }
        }
        Ok(Bytes::from(whole))
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::{Class, Grant, Log, LogConfig};
    use super::super::checkpoint::{StreamState, VShardState};
    use super::super::format::SEGMENT_SIZE_MIN;
    use super::*;

    const SIZE: u32 = 4 * BLOCK as u32;
    const STREAM: StreamId = StreamId { incarnation: 1, core: 0 };

    fn shape() -> StoreShape {
        StoreShape { store: StoreId { uuid: [7; 16], node: 1 }, segment_size: SIZE, vshards: 2 }
    }

    fn log(stream: StreamId, slot: u32, salt: u64, opening: Option<RecoveryNote>) -> Log {
        let config = LogConfig { store: shape().store, stream, segment_size: SIZE, last_index: vec![0; 2], opening };
        Log::new(config, Grant { slot: Slot(slot), salt, created: WallMs(5) })
    }

    fn append(log: &mut Log, topic: u32) {
        log.append(VShard(1), &Record::TopicDeleted { topic }, Class::Control, WallMs(6)).unwrap();
    }

    /// Appends `count` frames of one record and writes them; each says that all before it is durable.
    fn write(log: &mut Log, disk: &mut [Vec<u8>], count: u32) {
        for topic in 0..count {
            append(log, topic);
            flush(log, disk);
        }
    }

    fn flush(log: &mut Log, disk: &mut [Vec<u8>]) {
        while let Some(write) = log.next_write(log.taken(), WallMs(7)) {
            let at = write.offset as usize;
            disk[write.slot.0 as usize][at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
    }

    fn disk(slots: usize) -> Vec<Vec<u8>> {
        vec![vec![0; SIZE as usize]; slots]
    }

    /// Five frames over two segments, slots 1 and 2.
    fn sample() -> Vec<Vec<u8>> {
        let mut disk = disk(4);
        let mut log = log(STREAM, 1, 11, None);
        log.grant(Grant { slot: Slot(2), salt: 12, created: WallMs(5) });
        write(&mut log, &mut disk, 5);
        disk
    }

    fn strict(disk: &Vec<Vec<u8>>) -> Result<(Recovered, Vec<u64>), RecoveryError> {
        let mut seen = Vec::new();
        let recovered = recover(&shape(), disk, None, Mode::Strict, &mut |entry| seen.extend(entry.index))?;
        Ok((recovered, seen))
    }

    fn corrupt(disk: &Vec<Vec<u8>>) -> Damage {
        match strict(disk) {
            Err(RecoveryError::Corrupt(damage)) => *damage,
            other => panic!("expected corruption: {other:?}"),
        }
    }

    fn salvage(disk: &Vec<Vec<u8>>) -> (Recovered, Vec<u64>) {
        let mut seen = Vec::new();
        let recovered = recover(&shape(), disk, None, Mode::Salvage, &mut |entry| seen.extend(entry.index)).unwrap();
        (recovered, seen)
    }

    #[test]
    fn an_empty_store_is_an_empty_log() {
        let (recovered, seen) = strict(&disk(2)).unwrap();
        assert_eq!((recovered.incarnation_max, seen.len(), recovered.live.len()), (0, 0, 0));
        assert_eq!((recovered.last_index, recovered.free), (vec![0, 0], vec![Slot(0), Slot(1)]));
    }

    #[test]
    fn records_come_back_in_order_over_segments() {
        let (recovered, seen) = strict(&sample()).unwrap();
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        assert_eq!(recovered.last_index, [0, 5]);
        assert_eq!((recovered.frames, recovered.records, recovered.time), (5, 5, WallMs(7)));
        assert_eq!(recovered.live.iter().map(|segment| segment.slot.0).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(recovered.free, [Slot(0), Slot(3)]);
        assert_eq!(recovered.sealed[0].end, Lsn(u64::from(SIZE) + 3 * BLOCK as u64));
        assert_eq!(recovered.sealed[0].class, BytesClass::Zero);
        assert!(!recovered.clean);
    }

    #[test]
    fn the_last_frame_may_be_torn_and_no_other() {
        let mut torn = sample();
        torn[2][2 * BLOCK + 130] ^= 1;
        let (recovered, seen) = strict(&torn).unwrap();
        assert_eq!(seen, [1, 2, 3, 4]);
        assert_eq!(recovered.truncated, Discarded { frames: 1, bytes: BLOCK as u64, records: 1 });
        assert_eq!(recovered.sealed[0].class, BytesClass::Torn);

        for (slot, block, class) in [(1, 1, BytesClass::Torn), (1, 3, BytesClass::Torn), (2, 1, BytesClass::Torn)] {
            let mut rotten = sample();
            rotten[slot][block * BLOCK + 130] ^= 1;
            assert_eq!(corrupt(&rotten).class, class);
            let mut zeroed = sample();
            zeroed[slot][block * BLOCK..][..BLOCK].fill(0);
            let damage = corrupt(&zeroed);
            assert_eq!((damage.class, damage.slot), (BytesClass::Zero, Some(Slot(slot as u32))));
            assert_eq!(damage.offset, (block * BLOCK) as u32);
        }
    }

    #[test]
    fn a_damage_report_says_what_is_lost() {
        let mut rotten = sample();
        rotten[1][2 * BLOCK..3 * BLOCK].fill(0xaa);
        let damage = corrupt(&rotten);
        assert_eq!((damage.from, damage.stream, damage.class), (Lsn(2 * BLOCK as u64), STREAM, BytesClass::Garbage));
        assert_eq!((damage.frames_before, damage.records_before), (1, 1));
        assert_eq!((damage.frames_after, damage.records_after), (3, 3));
        assert_eq!(damage.vshards, [VShard(1)]);
        assert!(damage.to >= Lsn(u64::from(SIZE)), "{damage}");

        let (recovered, seen) = salvage(&rotten);
        assert_eq!(seen, [1, 3, 4, 5]);
        assert_eq!(recovered.damage.len(), 2, "the bytes, and the gap they leave: {:?}", recovered.damage);
        let RecoveryError::Corrupt(damage) = &recovered.damage[0] else { panic!("{:?}", recovered.damage) };
        assert_eq!((damage.from, damage.to), (Lsn(2 * BLOCK as u64), Lsn(3 * BLOCK as u64)));
        assert_eq!(
            recovered.damage[1],
            RecoveryError::IndexGap {
                vshard: VShard(1),
                expected: 2,
                found: 3,
                stream: STREAM,
                frame: Lsn(3 * BLOCK as u64)
            }
        );
    }

    #[test]
    fn a_missing_segment_is_refused() {
        for slot in [1, 2] {
            let mut missing = sample();
            missing[slot].fill(0);
            if slot == 1 {
                assert_eq!(corrupt(&missing).class, BytesClass::Missing);
                assert_eq!(salvage(&missing).1, [4, 5]);
            } else {
                // Nothing left says that there was more: the limit of a log on one disk.
                assert_eq!(strict(&missing).unwrap().1, [1, 2, 3]);
            }
        }
        // Only the header is gone: the frames behind it still speak.
        let mut headless = sample();
        headless[2][..BLOCK].fill(0);
        assert_eq!(corrupt(&headless).class, BytesClass::Missing);
        headless = sample();
        headless[2][20] ^= 1;
        assert_eq!(corrupt(&headless).class, BytesClass::Missing);
    }

    #[test]
    fn frames_of_another_use_of_the_slot_are_not_news() {
        let mut disk = disk(1);
        write(&mut log(STREAM, 0, 11, None), &mut disk, 3);
        write(&mut log(STREAM, 0, 22, None), &mut disk, 1);
        let (recovered, seen) = strict(&disk).unwrap();
        assert_eq!((seen.len(), recovered.sealed[0].class), (1, BytesClass::Stale));
        // Without the salt, the third frame of the first use would look like a witness.
        let flawed = recover_flawed(&shape(), &disk, None, Some(Bug::NoSaltCheck), &mut |_| ());
        assert!(matches!(flawed, Err(RecoveryError::Corrupt(_))), "{flawed:?}");
    }

    #[test]
    fn other_stores_sizes_and_doubles_are_refused() {
        let mut disk = sample();
        let other = StoreShape { store: StoreId { uuid: [8; 16], node: 1 }, ..shape() };
        let refused = recover(&other, &disk, None, Mode::Strict, &mut |_| ());
        assert_eq!(refused, Err(RecoveryError::ForeignSlot { slot: Slot(1) }));
        let node = StoreShape { store: StoreId { uuid: [7; 16], node: 2 }, ..shape() };
        let refused = recover(&node, &disk, None, Mode::Strict, &mut |_| ());
        assert_eq!(refused, Err(RecoveryError::ForeignSlot { slot: Slot(1) }));
        let smaller = StoreShape { segment_size: SEGMENT_SIZE_MIN, ..shape() };
        let refused = recover(&smaller, &disk, None, Mode::Strict, &mut |_| ());
        assert!(matches!(refused, Err(RecoveryError::SegmentSize { slot: Slot(1), .. })));
        let fewer = StoreShape { vshards: 1, ..shape() };
        let refused = recover(&fewer, &disk, None, Mode::Strict, &mut |_| ());
        assert!(matches!(refused, Err(RecoveryError::VShard { vshard: VShard(1), .. })));
        disk[3] = disk[2].clone();
        assert!(matches!(strict(&disk), Err(RecoveryError::Twice { sequence: 1, .. })));
    }

    /// One block cannot be read.
    struct Bad(Vec<Vec<u8>>, Slot, u32);

    impl Segments for Bad {
        fn slots(&self) -> Vec<Slot> {
            self.0.slots()
        }

        fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
            if slot == self.1 && (offset..offset + len).contains(&self.2) {
                return Err(ReadError { slot, offset, len, reason: "injected".to_owned() });
            }
            self.0.read(slot, offset, len)
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_the_end() {
        for block in 0..4 {
            // Even behind the last frame: it might have been a frame.
            let bad = Bad(sample(), Slot(2), block * BLOCK as u32);
            let refused = recover(&shape(), &bad, None, Mode::Strict, &mut |_| ());
            assert!(matches!(refused, Err(RecoveryError::Read(_))), "block {block}: {refused:?}");
            // Found by fuzzing: behind the last frame a salvage passed over it, and `wal verify` called such a store whole.
            let salvaged = recover(&shape(), &bad, None, Mode::Salvage, &mut |_| ()).unwrap();
            assert!(salvaged.damage.iter().any(|damage| matches!(damage, RecoveryError::Read(_))), "block {block}");
        }
        let bad = Bad(sample(), Slot(1), 2 * BLOCK as u32);
        let mut seen = Vec::new();
        let recovered = recover(&shape(), &bad, None, Mode::Salvage, &mut |entry| seen.extend(entry.index)).unwrap();
        assert_eq!(seen, [1, 3, 4, 5]);
        let RecoveryError::Corrupt(damage) = &recovered.damage[0] else { panic!("{:?}", recovered.damage) };
        assert_eq!(damage.class, BytesClass::Unreadable);
    }

    #[test]
    fn a_sealed_tail_is_never_looked_at_again() {
        let mut disk = sample();
        disk[2][BLOCK + 130] ^= 1;
        disk[2][2 * BLOCK + 130] ^= 1;
        // Segment 2 holds no witness for its own first frame any more: its second frame's header does.
        assert_eq!(corrupt(&disk).from, Lsn(u64::from(SIZE)));
        disk[2][2 * BLOCK + 90] ^= 1;
        let (recovered, seen) = strict(&disk).unwrap();
        assert_eq!(seen, [1, 2, 3]);
        let next = StreamId { incarnation: recovered.incarnation_max + 1, core: 0 };
        let mut log = log(next, 3, 33, Some(recovered.note()));
        flush(&mut log, &mut disk);
        // What was thrown away comes back, as if it had been stuck in a cache: the note stands.
        disk[2][BLOCK + 130] ^= 1;
        disk[2][2 * BLOCK + 130] ^= 1;
        disk[2][2 * BLOCK + 90] ^= 1;
        let (again, seen) = strict(&disk).unwrap();
        assert_eq!(seen, [1, 2, 3]);
        assert_eq!(again.sealed[0], recovered.sealed[0]);
        assert_eq!(again.free, [Slot(0), Slot(2)]);
        // And a stream that ends before its seal is damaged.
        disk[1][3 * BLOCK + 130] ^= 1;
        assert_eq!(corrupt(&disk).to, recovered.sealed[0].end);
    }

    #[test]
    fn a_clean_stop_is_seen() {
        let mut disk = disk(1);
        let mut log = log(STREAM, 0, 11, Some(RecoveryNote::default()));
        append(&mut log, 1);
        log.clean().unwrap();
        flush(&mut log, &mut disk);
        assert!(strict(&disk).unwrap().0.clean);
    }

    #[test]
    fn the_checkpoint_stands_for_what_it_covers() {
        let disk = sample();
        let first = Segment { stream: STREAM, sequence: 0, slot: Slot(1), salt: 11 };
        let second = Segment { stream: STREAM, sequence: 1, slot: Slot(2), salt: 12 };
        let mut checkpoint = Checkpoint {
            store: shape().store,
            segment_size: SIZE,
            number: 1,
            incarnation: 1,
            time: WallMs(99),
            streams: vec![StreamState {
                stream: STREAM,
                covered: Lsn(u64::from(SIZE) + 2 * BLOCK as u64),
                durable: Lsn(u64::from(SIZE) + 2 * BLOCK as u64),
                sealed: None,
            }],
            live: vec![second],
            vshards: vec![VShardState::default(), VShardState { last_index: 4, state: Bytes::new() }],
        };
        let run = |checkpoint: &Checkpoint, disk: &Vec<Vec<u8>>| {
            let mut seen = Vec::new();
            let all = recover(&shape(), disk, Some(checkpoint), Mode::Strict, &mut |entry| seen.extend(entry.index))?;
            Ok::<_, RecoveryError>((all, seen))
        };
        let (recovered, seen) = run(&checkpoint, &disk).unwrap();
        assert_eq!((seen, recovered.last_index, recovered.time), (vec![5], vec![0, 5], WallMs(99)));
        assert_eq!(recovered.live, [second]);

        // Segment 0 is needed and there, or needed and gone.
        checkpoint.live.insert(0, first);
        assert_eq!(run(&checkpoint, &disk).unwrap().0.live, [first, second]);
        let mut gone = disk.clone();
        gone[1].fill(0);
        assert!(matches!(run(&checkpoint, &gone), Err(RecoveryError::Corrupt(d)) if d.class == BytesClass::Missing));
        checkpoint.live.remove(0);
        // All that the checkpoint knows to be durable must be there.
        let mut shorter = disk.clone();
        shorter[2][BLOCK..].fill(0);
        assert!(matches!(run(&checkpoint, &shorter), Err(RecoveryError::Corrupt(_))));
        // An index between checkpoint and log is missing.
        checkpoint.vshards[1].last_index = 3;
        assert_eq!(run(&checkpoint, &disk).unwrap().1, [4, 5]);
        checkpoint.vshards[1].last_index = 2;
        assert!(matches!(run(&checkpoint, &disk), Err(RecoveryError::IndexGap { expected: 3, found: 4, .. })));
        checkpoint.store.node = 2;
        assert_eq!(run(&checkpoint, &disk).unwrap_err(), RecoveryError::ForeignCheckpoint);
    }

    #[test]
    fn no_mutation_makes_it_panic_or_invent() {
        let original = sample();
        let mut state = 1_u64;
        let mut random = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % bound
        };
        for _ in 0..2_000 {
            let mut disk = original.clone();
            for _ in 0..1 + random(4) {
                let (slot, at) = (random(4), random(SIZE as usize));
                match random(3) {
                    0 => disk[slot][at] ^= 1 << random(8),
                    1 => {
                        let len = random(SIZE as usize - at) + 1;
                        disk[slot][at..at + len].fill(random(256) as u8);
                    }
                    _ => {
                        let (from, block) = (random(4), random(4) * BLOCK);
                        let bytes = disk[from][block..block + BLOCK].to_vec();
                        let to = random(4) * BLOCK;
                        disk[slot][to..to + BLOCK].copy_from_slice(&bytes);
                    }
                }
            }
            for mode in [Mode::Strict, Mode::Salvage] {
                let mut seen = Vec::new();
                let _ = recover(&shape(), &disk, None, mode, &mut |entry| seen.extend(entry.index));
                assert!(seen.is_sorted() && seen.iter().all(|index| (1..=5).contains(index)), "{seen:?}");
            }
        }
    }
}
