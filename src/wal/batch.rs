//! Packs records into frames: one batch, one write. The write side of one stream.
//!
//! Owns: where the next record goes, which segment is next, the index of every virtual shard, and the chain. Never: opens a
//! file, waits, decides when to sync.
//! Neighbours: the shard appends; the driver takes writes and hands in segments; `recovery` reads what comes out.
//!
//! The bytes of a record are laid down once, at their final position, so that its `LogRef` is known before it is written.
//! What a frame says about the rest of the log (watermark, chain) is filled in when it is taken to be written.

use std::collections::VecDeque;

use bytes::Bytes;

use super::format::{
    FRAME_HEADER, FrameHeader, FrameKind, SEGMENT_SIZE_MAX, SEGMENT_SIZE_MIN, SUB_BATCH_HEADER, Segment, SegmentHeader,
    StoreId, SubBatch, TERM, chain_start, lsn,
};
use super::record::{Record, RecoveryNote};
use crate::limits::{BATCH_BYTES_MAX, BATCH_BYTES_TARGET, BLOCK};
use crate::planted::planted;
use crate::time::WallMs;
use crate::types::{LogRef, Lsn, Slot, StreamId, VShard};

/// Segments a stream keeps in hand beyond the one it fills: a spare, and one for the time when there is no space.
pub const GRANTS_IN_HAND: usize = 2;

#[derive(Clone, Debug)]
pub struct LogConfig {
    pub store: StoreId,
    pub stream: StreamId,
    /// A multiple of [`BLOCK`]; the same in the whole store.
    pub segment_size: u32,
    /// Per virtual shard, its last index so far; 0: none.
    pub last_index: Vec<u64>,
    /// Becomes the first frame.
    pub opening: Option<RecoveryNote>,
}

/// A segment that the keeper gives to this stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    pub slot: Slot,
    pub salt: u64,
    pub created: WallMs,
}

/// Who gets the last segment when there is no space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Leaves the emergency segment alone.
    Publish,
    /// Acknowledgements, deletions and the like, by which space comes back.
    Control,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Appended {
    pub at: LogRef,
    /// Once the log is written (synced) up to this position, the record is: it is above the `end` of the write before the one
    /// that carries the record, and not above that one's.
    pub end: Lsn,
    /// Its index in its virtual shard; 0: it takes none.
    pub index: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AppendError {
    /// Worth another try when a segment was granted.
    #[error("the log has no segment left for this")]
    Full,
    /// No segment of this store will ever hold it.
    #[error("{bytes} bytes do not fit a batch of at most {max}")]
    TooLarge { bytes: usize, max: usize },
}

/// One frame, ready to be written in one piece.
#[derive(Clone, Debug)]
pub struct Write {
    pub slot: Slot,
    /// Where `bytes` go in the segment.
    pub offset: u32,
    /// A multiple of [`BLOCK`] long.
    pub bytes: Bytes,
    /// The position behind the frame.
    pub end: Lsn,
    /// `bytes` begin with the segment's header, and `offset` is 0.
    pub new_segment: bool,
    pub segment: Segment,
    /// Bytes of `bytes` that carry nothing.
    pub padding: u32,
    /// Records in it; 0: only the log's own.
    pub records: u32,
}

/// A segment in use.
#[derive(Clone, Copy, Debug)]
struct Use {
    slot: Slot,
    sequence: u64,
    salt: u64,
    created: WallMs,
    /// Entered with none in hand: for `Control` only, until another one is granted.
    emergency: bool,
}

/// A frame in the making, or made and waiting to be taken.
#[derive(Debug)]
struct Frame {
    segment: Use,
    /// Of the frame header in the segment.
    offset: u32,
    /// Room for the segment header if the frame opens the segment, room for the frame header, then the body.
    bytes: Vec<u8>,
    kind: FrameKind,
    records: u32,
    run: Option<Run>,
}

/// The sub-batch that the next record may join.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Of its header in `bytes`.
    at: usize,
    header: SubBatch,
}

impl Frame {
    fn new(segment: Use, offset: u32, capacity: usize) -> Frame {
        let before = if offset == BLOCK as u32 { BLOCK } else { 0 };
        let mut bytes = Vec::with_capacity(capacity.max(before + BLOCK));
        bytes.resize(before + FRAME_HEADER, 0);
        Frame { segment, offset, bytes, kind: FrameKind::Records, records: 0, run: None }
    }

    fn opens_segment(&self) -> bool {
        self.offset == BLOCK as u32
    }

    /// Bytes of `bytes` before the frame header.
    fn before(&self) -> usize {
        if self.opens_segment() { BLOCK } else { 0 }
    }

    fn frame_bytes(&self) -> usize {
        self.bytes.len() - self.before()
    }

    /// Offset in the segment behind the frame.
    fn end_offset(&self) -> u32 {
        self.offset + self.frame_bytes().next_multiple_of(BLOCK) as u32
    }

    fn is_empty(&self) -> bool {
        self.kind == FrameKind::Records && self.records == 0
    }

    fn finish_run(&mut self) {
        if let Some(run) = self.run.take() {
            run.header.encode(&mut self.bytes[run.at..run.at + SUB_BATCH_HEADER]);
        }
    }
}

/// The write side of one stream.
#[derive(Debug)]
pub struct Log {
    store: StoreId,
    stream: StreamId,
    segment_size: u32,
    last_index: Vec<u64>,
    open: Frame,
    sealed: VecDeque<Frame>,
    grants: VecDeque<Grant>,
    /// Bytes of the open frame promised to a group.
    group_left: usize,
    /// Of the last write taken.
    prev_end: Lsn,
    prev_chain: u64,
    /// Bytes of the last write taken: the best guess for the next one.
    last_bytes: usize,
}

impl Log {
    pub fn new(config: LogConfig, first: Grant) -> Log {
        let size = config.segment_size;
        assert!(
            (SEGMENT_SIZE_MIN..=SEGMENT_SIZE_MAX).contains(&size) && size.is_multiple_of(BLOCK as u32),
            "segment size"
        );
        // Until another segment is granted this one is the last, so only `Control` may use it.
        let segment = Use { slot: first.slot, sequence: 0, salt: first.salt, created: first.created, emergency: true };
        let mut log = Log {
            store: config.store,
            stream: config.stream,
            segment_size: size,
            last_index: config.last_index,
            open: Frame::new(segment, BLOCK as u32, 0),
            sealed: VecDeque::new(),
            grants: VecDeque::new(),
            group_left: 0,
            prev_end: lsn(0, size, BLOCK as u32),
            prev_chain: chain_start(config.store.tag(), config.stream),
            last_bytes: 0,
        };
        if let Some(note) = config.opening {
            assert!(note.encoded_len() <= log.body_max(), "the opening note does not fit a segment");
            note.encode(&mut log.open.bytes);
            log.open.kind = FrameKind::Recovery;
            log.seal();
        }
        log
    }

    /// What `record` may take at most, to be summed up for [`has_room`](Log::has_room) and [`begin_group`](Log::begin_group).
    pub fn cost(record: &Record<'_>) -> usize {
        SUB_BATCH_HEADER + record.padded_len()
    }

    /// Whether records that cost `bytes` together could be appended as one group now.
    pub fn has_room(&self, bytes: usize, class: Class) -> bool {
        self.place(bytes, class).is_ok()
    }

    /// The records appended from here on, up to `bytes` of [`cost`](Log::cost), will lie in one frame: all of them survive, or none.
    /// Their appends cannot fail. The promise ends when a write is taken.
    pub fn begin_group(&mut self, bytes: usize, class: Class) -> Result<(), AppendError> {
        self.group_left = 0;
        let placed = self.place(bytes, class)?;
        if planted!(GroupSplit) {
            return Ok(());
        }
        self.go_to(placed);
        self.group_left = bytes;
        Ok(())
    }

    /// Adds one record. On an error nothing has changed.
    pub fn append(
        &mut self,
        vshard: VShard,
        record: &Record<'_>,
        class: Class,
        now: WallMs,
    ) -> Result<Appended, AppendError> {
        let cost = Log::cost(record);
        if cost <= self.group_left {
            self.group_left -= cost;
        } else {
            self.group_left = 0;
            let placed = self.place(cost, class)?;
            self.go_to(placed);
        }
        let last = &mut self.last_index[usize::from(vshard.0)];
        let index = if record.is_entry() { *last + 1 } else { 0 };
        let open = &mut self.open;
        let joins = open.run.is_some_and(|run| {
            let next = if run.header.base == 0 { 0 } else { run.header.base + u64::from(run.header.records) };
            run.header.vshard == vshard && run.header.time == now && next == index
        });
        if !joins {
            open.finish_run();
            let header = SubBatch { vshard, records: 0, base: index, term: TERM, time: now };
            open.run = Some(Run { at: open.bytes.len(), header });
            open.bytes.extend_from_slice(&[0; SUB_BATCH_HEADER]);
        }
        let at = open.bytes.len();
        record.encode(&mut open.bytes);
        open.records += 1;
        open.run.as_mut().expect("just begun").header.records += 1;
        if record.is_entry() {
            *last = index;
        }
        let at = LogRef {
            slot: open.segment.slot,
            offset: open.offset + (at - open.before()) as u32,
            len: record.encoded_len() as u32,
        };
        Ok(Appended { at, end: self.appended(), index })
    }

    /// Gives the stream another segment.
    pub fn grant(&mut self, grant: Grant) {
        self.grants.push_back(grant);
        self.open.segment.emergency = false;
    }

    /// Segments the stream should be given.
    pub fn grants_wanted(&self) -> usize {
        GRANTS_IN_HAND.saturating_sub(self.grants.len())
    }

    /// An empty frame that carries the watermark (and the end of the log, if `Clean`).
    fn note(&mut self, kind: FrameKind) -> Result<(), AppendError> {
        self.group_left = 0;
        if !self.open.is_empty() {
            self.seal();
        }
        let placed = self.place(0, Class::Control)?;
        self.go_to(placed);
        self.open.kind = kind;
        self.seal();
        Ok(())
    }

    /// Asks for a frame without records: it only carries the watermark, so that rot in the last frame with records is not taken
    /// for a torn tail.
    pub fn marker(&mut self) -> Result<(), AppendError> {
        self.note(FrameKind::Marker)
    }

    /// Asks for the last frame of a stream that is stopped in order.
    pub fn clean(&mut self) -> Result<(), AppendError> {
        self.note(FrameKind::Clean)
    }

    /// The next frame to write, in log order. Writes may complete in any order; what they promise, they promise in this one.
    ///
    /// - `durable`: what is known synced now. Goes into the frame, as the witness for everything below it.
    pub fn next_write(&mut self, durable: Lsn, now: WallMs) -> Option<Write> {
        if self.sealed.is_empty() && !self.open.is_empty() {
            self.seal();
        }
        let mut frame = self.sealed.pop_front()?;
        assert!(durable <= self.prev_end, "durable {durable} is beyond what was taken, {}", self.prev_end);
        let segment = frame.segment;
        let frame_bytes = frame.frame_bytes();
        let header = FrameHeader {
            kind: frame.kind,
            frame_bytes: frame_bytes as u32,
            records: frame.records,
            store_tag: self.store.tag(),
            node: self.store.node,
            stream: self.stream,
            sequence: segment.sequence,
            salt: segment.salt,
            lsn: lsn(segment.sequence, self.segment_size, frame.offset),
            prev_end: self.prev_end,
            prev_chain: self.prev_chain,
            durable,
            time: now,
            term: TERM,
        };
        let before = frame.before();
        let sums = header.seal(&mut frame.bytes[before..]);
        self.prev_end = header.end();
        self.prev_chain = sums.chain(self.prev_chain);
        if frame.opens_segment() {
            let header = SegmentHeader {
                store: self.store,
                stream: self.stream,
                sequence: segment.sequence,
                salt: segment.salt,
                segment_size: self.segment_size,
                created: segment.created,
            };
            frame.bytes[..BLOCK].copy_from_slice(&header.encode());
        }
        let padded = frame.bytes.len().next_multiple_of(BLOCK);
        frame.bytes.resize(padded, 0);
        self.last_bytes = padded;
        if frame.bytes.capacity() > 2 * padded {
            // The buffer lives on as the tail cache: it must not hold what a larger batch before it needed.
            frame.bytes.shrink_to_fit();
        }
        Some(Write {
            slot: segment.slot,
            offset: frame.offset - before as u32,
            bytes: Bytes::from(frame.bytes),
            end: header.end(),
            new_segment: before > 0,
            segment: Segment {
                stream: self.stream,
                sequence: segment.sequence,
                slot: segment.slot,
                salt: segment.salt,
            },
            padding: header.padded_bytes() - header.frame_bytes,
            records: frame.records,
        })
    }

    /// The position behind everything appended so far.
    pub fn appended(&self) -> Lsn {
        if self.open.is_empty() {
            let last = self.sealed.back();
            return last.map_or(self.prev_end, |frame| self.lsn_in(frame, frame.end_offset()));
        }
        self.lsn_in(&self.open, self.open.end_offset())
    }

    /// As `appended`, and whatever is appended from now on lies behind it: nothing joins the open frame any more, whose last
    /// block may have room left.
    pub fn cut(&mut self) -> Lsn {
        if !self.open.is_empty() {
            self.seal();
        }
        self.appended()
    }

    /// The position behind the last write taken.
    pub fn taken(&self) -> Lsn {
        self.prev_end
    }

    /// Bytes appended and not yet taken.
    pub fn unwritten_bytes(&self) -> usize {
        let open = if self.open.is_empty() { 0 } else { self.open.frame_bytes() };
        open + self.sealed.iter().map(Frame::frame_bytes).sum::<usize>()
    }

    /// The last index of a virtual shard; 0: none.
    pub fn last_index(&self, vshard: VShard) -> u64 {
        self.last_index[usize::from(vshard.0)]
    }

    pub fn segment_size(&self) -> u32 {
        self.segment_size
    }

    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// What must hold after every call.
    pub fn invariants(&self) {
        let frames = self.sealed.iter().chain(std::iter::once(&self.open));
        let mut end = self.prev_end;
        for frame in frames {
            let at = self.lsn_in(frame, frame.offset);
            assert!(at >= end, "frames overlap: {at} before {end}");
            assert!(frame.is_empty() || frame.end_offset() <= self.segment_size, "a frame leaves its segment");
            end = if frame.is_empty() { at } else { self.lsn_in(frame, frame.end_offset()) };
        }
        assert!(self.sealed.iter().all(|frame| !frame.is_empty()), "an empty frame was sealed");
    }

    fn lsn_in(&self, frame: &Frame, offset: u32) -> Lsn {
        lsn(frame.segment.sequence, self.segment_size, offset)
    }

    /// Most bytes of body that any frame of this store can hold.
    pub fn body_max(&self) -> usize {
        (self.segment_size as usize - BLOCK - FRAME_HEADER).min(BATCH_BYTES_MAX)
    }

    /// Where `bytes` more of body would go. Changes nothing.
    fn place(&self, bytes: usize, class: Class) -> Result<Placed, AppendError> {
        let max = self.body_max();
        if bytes > max {
            return Err(AppendError::TooLarge { bytes, max });
        }
        let emergency = self.open.segment.emergency;
        if emergency && class == Class::Publish {
            return Err(AppendError::Full);
        }
        let size = self.segment_size as usize;
        let body = self.open.frame_bytes() - FRAME_HEADER;
        let joins = self.open.is_empty() || body + bytes <= BATCH_BYTES_TARGET;
        if joins && self.open.offset as usize + self.open.frame_bytes() + bytes <= size {
            return Ok(Placed::Open);
        }
        if !self.open.is_empty() && self.open.end_offset() as usize + FRAME_HEADER + bytes <= size {
            return Ok(Placed::NextFrame);
        }
        let left = self.grants.len();
        let enough = if class == Class::Publish { left >= GRANTS_IN_HAND } else { left >= 1 };
        if enough { Ok(Placed::NextSegment) } else { Err(AppendError::Full) }
    }

    fn go_to(&mut self, placed: Placed) {
        match placed {
            Placed::Open => {}
            Placed::NextFrame => self.seal(),
            Placed::NextSegment => {
                let grant = self.grants.pop_front().expect("placed");
                let segment = Use {
                    slot: grant.slot,
                    sequence: self.open.segment.sequence + 1,
                    salt: grant.salt,
                    created: grant.created,
                    emergency: self.grants.is_empty(),
                };
                let next = Frame::new(segment, BLOCK as u32, self.last_bytes);
                let mut frame = std::mem::replace(&mut self.open, next);
                if !frame.is_empty() {
                    frame.finish_run();
                    self.sealed.push_back(frame);
                }
            }
        }
    }

    /// Closes the open frame and begins the next one behind it. That one may begin at the very end of the segment: then nothing
    /// fits it, and the first append goes to the next segment.
    fn seal(&mut self) {
        assert!(!self.open.is_empty(), "nothing to seal");
        self.group_left = 0;
        let next = Frame::new(self.open.segment, self.open.end_offset(), self.last_bytes);
        let mut frame = std::mem::replace(&mut self.open, next);
        frame.finish_run();
        self.sealed.push_back(frame);
    }
}

#[derive(Clone, Copy, Debug)]
enum Placed {
    /// In the open frame.
    Open,
    /// In a new frame of the same segment.
    NextFrame,
    /// In the first frame of the next segment.
    NextSegment,
}

#[cfg(test)]
mod tests {
    use super::super::record::{Published, published_body};
    use super::*;
    use crate::types::Seq;

    const SIZE: u32 = 1024 * 1024;

    fn config(segment_size: u32) -> LogConfig {
        LogConfig {
            store: StoreId { uuid: [1; 16], node: 1 },
            stream: StreamId { incarnation: 1, core: 0 },
            segment_size,
            last_index: vec![0, 10],
            opening: None,
        }
    }

    fn grant(slot: u32) -> Grant {
        Grant { slot: Slot(slot), salt: u64::from(slot), created: WallMs(1) }
    }

    fn log(segment_size: u32) -> Log {
        let mut log = Log::new(config(segment_size), grant(1));
        log.grant(grant(2));
        log.grant(grant(3));
        log
    }

    fn message(payload: &[u8]) -> Record<'_> {
        Record::Published(Published {
            topic: 1,
            seq: Seq(1),
            published: WallMs(1),
            expires: WallMs(0),
            not_before: WallMs(0),
            priority: 0,
            identity: None,
            options: b"",
            payload,
        })
    }

    fn publish(log: &mut Log, payload: &[u8]) -> Result<Appended, AppendError> {
        log.append(VShard(1), &message(payload), Class::Publish, WallMs(2))
    }

    #[test]
    fn a_reference_leads_to_the_bytes_written() {
        let mut log = log(SIZE);
        let first = publish(&mut log, b"one").unwrap();
        let second = publish(&mut log, b"two").unwrap();
        assert_eq!((first.index, second.index, log.last_index(VShard(1))), (11, 12, 12));
        let write = log.next_write(Lsn(4096), WallMs(3)).unwrap();
        assert_eq!((write.offset, write.new_segment, write.records), (0, true, 2));
        assert_eq!((write.bytes.len(), write.end), (2 * BLOCK, Lsn(2 * BLOCK as u64)));
        for (appended, payload) in [(first, b"one"), (second, b"two")] {
            let LogRef { slot, offset, len } = appended.at;
            let body = published_body(&write.bytes.slice(offset as usize..(offset + len) as usize)).unwrap();
            assert_eq!((slot, body.payload()), (Slot(1), &payload[..]));
            assert_eq!(appended.end, write.end);
        }
        assert!(log.next_write(Lsn(4096), WallMs(3)).is_none());
        assert_eq!(log.appended(), write.end);

        let third = publish(&mut log, b"three").unwrap();
        let next = log.next_write(write.end, WallMs(4)).unwrap();
        assert_eq!((next.offset, next.new_segment), (2 * BLOCK as u32, false));
        let at = (third.at.offset - next.offset) as usize;
        assert_eq!(published_body(&next.bytes.slice(at..at + third.at.len as usize)).unwrap().payload(), b"three");
    }

    #[test]
    fn runs_of_one_virtual_shard_share_a_header() {
        let mut log = log(SIZE);
        let record = Record::TopicDeleted { topic: 1 };
        for (vshard, time) in [(0, 1), (0, 1), (1, 1), (1, 2)] {
            log.append(VShard(vshard), &record, Class::Control, WallMs(time)).unwrap();
        }
        let write = log.next_write(Lsn(4096), WallMs(3)).unwrap();
        let mut at = BLOCK + FRAME_HEADER;
        for (vshard, base, records, time) in [(0, 1, 2, 1), (1, 11, 1, 1), (1, 12, 1, 2)] {
            let sub = SubBatch::decode(&write.bytes[at..]).unwrap();
            let expected = SubBatch { vshard: VShard(vshard), records, base, term: TERM, time: WallMs(time) };
            assert_eq!(sub, expected);
            at += SUB_BATCH_HEADER + record.padded_len() * records as usize;
        }
    }

    #[test]
    fn relocated_messages_take_no_index() {
        let mut log = log(SIZE);
        let Record::Published(published) = message(b"old") else { unreachable!() };
        let moved = log.append(VShard(1), &Record::Relocated(published), Class::Control, WallMs(1)).unwrap();
        assert_eq!((moved.index, log.last_index(VShard(1))), (0, 10));
        assert_eq!(publish(&mut log, b"new").unwrap().index, 11);
    }

    #[test]
    fn a_full_batch_is_sealed_and_no_frame_leaves_its_segment() {
        let mut log = log(4 * SIZE);
        let payload = vec![7; 300 * 1024];
        for _ in 0..16 {
            publish(&mut log, &payload).unwrap();
            log.invariants();
        }
        let mut end = Lsn(0);
        let mut writes = 0;
        let mut rotations = 0;
        while let Some(write) = log.next_write(log.taken(), WallMs(1)) {
            assert!(write.records == 3 || write.end >= log.appended() || write.segment.sequence == 0);
            assert!(write.offset as usize + write.bytes.len() <= 4 * SIZE as usize);
            assert!(write.end > end);
            end = write.end;
            writes += 1;
            rotations += u32::from(write.new_segment);
        }
        assert_eq!((writes, rotations), (6, 2));
        assert_eq!(end, log.appended());
    }

    #[test]
    fn publishes_leave_the_emergency_segment_to_control() {
        let mut log = Log::new(config(16 * BLOCK as u32), grant(1));
        assert_eq!(log.grants_wanted(), 2);
        assert_eq!(publish(&mut log, b""), Err(AppendError::Full), "the only segment is the emergency one");
        log.grant(grant(2));
        let payload = vec![7; 8 * BLOCK];
        publish(&mut log, &payload).unwrap();
        assert_eq!(publish(&mut log, &payload), Err(AppendError::Full), "one in hand: not for publishes");
        log.grant(grant(3));
        assert_eq!(log.grants_wanted(), 0);
        assert!(log.has_room(8 * BLOCK, Class::Publish));
        publish(&mut log, &payload).unwrap();
        assert_eq!(log.grants_wanted(), 1);
        let before = (log.appended(), log.last_index(VShard(1)));
        assert_eq!(publish(&mut log, &payload), Err(AppendError::Full));
        assert_eq!((log.appended(), log.last_index(VShard(1))), before, "nothing has changed");
        log.append(VShard(1), &message(&payload), Class::Control, WallMs(1)).unwrap();
        assert_eq!(publish(&mut log, b""), Err(AppendError::Full), "the emergency segment has room, but not for it");
        log.append(VShard(1), &message(b""), Class::Control, WallMs(1)).unwrap();
        log.grant(grant(4));
        publish(&mut log, b"").unwrap();
    }

    #[test]
    fn what_no_segment_can_hold_is_too_large() {
        let mut log = log(16 * BLOCK as u32);
        let max = 15 * BLOCK - FRAME_HEADER;
        let fixed = Log::cost(&message(b""));
        let fits = vec![0; max - fixed];
        assert!(Log::cost(&message(&fits)) <= max);
        publish(&mut log, &fits).unwrap();
        let larger = vec![0; max - fixed + 8];
        assert_eq!(publish(&mut log, &larger), Err(AppendError::TooLarge { bytes: max + 8, max }));
    }

    #[test]
    fn a_group_lies_in_one_frame() {
        let mut log = log(16 * BLOCK as u32);
        let filler = vec![7; 14 * BLOCK];
        publish(&mut log, &filler).unwrap();
        let (big, small) = (vec![1; BLOCK], Record::Acked { sub: 1, ranges: vec![(Seq(1), Seq(1))] });
        let bytes = Log::cost(&message(&big)) + Log::cost(&small);
        assert!(log.has_room(bytes, Class::Control));
        log.begin_group(bytes, Class::Control).unwrap();
        let first = log.append(VShard(1), &message(&big), Class::Control, WallMs(1)).unwrap();
        let second = log.append(VShard(1), &small, Class::Control, WallMs(1)).unwrap();
        assert_eq!((first.at.slot, second.at.slot), (Slot(2), Slot(2)), "the rest of the segment was too small");
        assert_eq!(log.next_write(Lsn(4096), WallMs(1)).unwrap().records, 1);
        assert_eq!(log.next_write(Lsn(4096), WallMs(1)).unwrap().records, 2);
        let all = log.begin_group(17 * BLOCK, Class::Control);
        assert!(matches!(all, Err(AppendError::TooLarge { .. })));
    }

    #[test]
    fn the_logs_own_frames_carry_no_records() {
        let mut log = Log::new(LogConfig { opening: Some(RecoveryNote::default()), ..config(SIZE) }, grant(1));
        publish(&mut log, b"").unwrap_err();
        log.marker().unwrap();
        log.clean().unwrap();
        let mut kinds = Vec::new();
        while let Some(write) = log.next_write(log.taken(), WallMs(1)) {
            let skip = if write.new_segment { BLOCK } else { 0 };
            kinds.push(FrameHeader::decode(&write.bytes[skip..]).unwrap().0.kind);
            assert_eq!(write.records, 0);
        }
        assert_eq!(kinds, [FrameKind::Recovery, FrameKind::Marker, FrameKind::Clean]);
        assert_eq!(log.unwritten_bytes(), 0);
    }

    #[test]
    fn what_is_appended_after_a_cut_lies_behind_it() {
        let mut log = log(SIZE);
        let before = publish(&mut log, b"x").unwrap();
        assert_eq!(publish(&mut log, b"x").unwrap().end, before.end, "one block holds both");
        let cut = log.cut();
        assert_eq!((cut, log.cut()), (before.end, cut));
        assert!(publish(&mut log, b"x").unwrap().end > cut);
    }

    #[test]
    #[should_panic(expected = "beyond what was taken")]
    fn the_watermark_never_runs_ahead() {
        let mut log = log(SIZE);
        publish(&mut log, b"").unwrap();
        log.next_write(Lsn(2 * BLOCK as u64), WallMs(1));
    }
}
