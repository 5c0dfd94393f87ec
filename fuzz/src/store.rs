//! The life of a small store, drawn from an input: boots, cores, batches, syncs, checkpoints, recycled slots, crashes. The log in
//! it is written by the broker's own code and lands on a disk that is a few vectors.
//!
//! Owns: what was written, and what of it was durable. Never: judges (that is `segment_recovery`), beyond what must hold of a
//! store that nobody damaged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use blipmq::limits::BLOCK;
use blipmq::time::WallMs;
use blipmq::types::{LogRef, Lsn, Seq, Slot, StreamId, VShard};
use blipmq::wal::batch::{Class, Grant, Log, LogConfig, Write};
use blipmq::wal::checkpoint::{self, Checkpoint, SealedEnd, StreamState, VShardState};
use blipmq::wal::format::{FRAME_HEADER, FrameHeader, Segment, StoreId};
use blipmq::wal::record::{IdentityRef, KeyId, Published, Record, RecoveryNote, SubKind};
use blipmq::wal::recovery::{Entry, Mode, ReadError, Recovered, RecoveryError, Segments, StoreShape, recover};
use bytes::Bytes;

use super::draw::Draw;
use super::memory;

/// What a store may grow to: an input should be read in well under a millisecond.
const SLOTS_MAX: usize = 20;
const STEPS_MAX: usize = 60;
const SECTOR: usize = 512;
/// Where the payload of the first record of a frame begins in the frame.
const FIRST_PAYLOAD: usize = FRAME_HEADER + 32 + 48 + 2;

/// The encoded record, without padding.
pub type Content = Rc<[u8]>;

/// Slots as they are read: some may be short or gone, some blocks unreadable.
#[derive(Clone, Default)]
pub struct Image {
    pub slots: BTreeMap<u32, Vec<u8>>,
    pub unreadable: BTreeSet<(u32, u32)>,
}

impl Image {
    pub fn bytes(&self) -> usize {
        self.slots.values().map(Vec::len).sum()
    }

    /// What lies there, if all of it can be read.
    pub fn get(&self, slot: Slot, offset: usize, len: usize) -> Option<&[u8]> {
        let blocks = (offset / BLOCK) as u32..=((offset + len - 1) / BLOCK) as u32;
        let bytes = self.slots.get(&slot.0)?.get(offset..offset + len)?;
        blocks.into_iter().all(|block| !self.unreadable.contains(&(slot.0, block))).then_some(bytes)
    }
}

impl Segments for Image {
    fn slots(&self) -> Vec<Slot> {
        self.slots.keys().copied().map(Slot).collect()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        let bytes = self.get(slot, offset as usize, len as usize);
        let error = || ReadError { slot, offset, len, reason: "drawn".to_owned() };
        bytes.map(Bytes::copy_from_slice).ok_or_else(error)
    }
}

/// A frame that was written.
#[derive(Clone)]
pub struct Known {
    pub segment: Segment,
    pub offset: usize,
    pub header: FrameHeader,
    pub bytes: Bytes,
    /// What lay there before.
    pub before: Vec<u8>,
    /// The block before it, if it opens its segment.
    pub opening: Option<Bytes>,
}

/// A record as it was appended.
struct Sent {
    content: Content,
    with_next: bool,
}

struct Core {
    log: Log,
    durable: Lsn,
    /// Writes since the last sync, by their place in `known`.
    unsynced: Vec<usize>,
    undurable: VecDeque<(Lsn, VShard, u64)>,
}

/// What a recovery yields, in order.
pub struct Yielded {
    pub vshard: VShard,
    pub index: Option<u64>,
    pub content: Content,
}

pub struct Restart {
    pub recovered: Recovered,
    pub entries: Vec<Yielded>,
}

pub struct Store {
    pub shape: StoreShape,
    pub disk: Image,
    pub files: [Vec<u8>; 2],
    pub known: Vec<Known>,
    /// By virtual shard: what is in the log, by index.
    sent: Vec<Vec<Sent>>,
    /// By virtual shard and index: all that ever was, what went with a tail included. No index: relocated.
    every: BTreeSet<(u16, Option<u64>, Content)>,
    newest: usize,
    number: u64,
    now: u64,
    next_id: u64,
    next_salt: u64,
    incarnation: u64,
    /// The last one of which something was synced.
    durable_incarnation: u64,
    cores: Vec<Core>,
    pool: Vec<Slot>,
    segments: Vec<Segment>,
    sealed: BTreeMap<StreamId, SealedEnd>,
    gone: Vec<Segment>,
    live_before: Vec<Segment>,
    durable_index: Vec<u64>,
    /// By virtual shard, the last index that was handed to the disk.
    written_index: Vec<u64>,
    /// Nothing that was handed to the disk was lost in the last crash.
    lossless: bool,
}

/// Recovers `disk` and collects what comes out; every reference is read back.
pub fn restart(
    shape: &StoreShape,
    disk: &Image,
    checkpoint: Option<&Checkpoint>,
    mode: Mode,
) -> Result<Restart, RecoveryError> {
    let mut entries = Vec::new();
    let allowed = 4 * 1024 * 1024 + 16 * disk.bytes();
    let recovered = memory::within(allowed, || {
        recover(shape, disk, checkpoint, mode, &mut |entry: Entry<'_>| {
            let mut content = Vec::new();
            entry.record.encode(&mut content);
            content.truncate(entry.record.encoded_len());
            let LogRef { slot, offset, len } = entry.at;
            // A salvage takes what it cannot read for zeros, and it may have been zeros.
            match disk.get(slot, offset as usize, len as usize) {
                Some(there) => assert_eq!(Record::decode_alone(there), Ok(entry.record), "a reference leads elsewhere"),
                None => assert_eq!(mode, Mode::Salvage, "a reference leads nowhere"),
            }
            entries.push(Yielded { vshard: entry.vshard, index: entry.index, content: content.into() });
        })
    })?;
    Ok(Restart { recovered, entries })
}

impl Store {
    /// Lives as `draw` says. A store that nobody damaged recovers, wherever it crashed.
    pub fn live(draw: &mut Draw<'_>) -> Store {
        let mut store = Store::new(draw);
        let mut steps = STEPS_MAX;
        for _ in 0..1 + draw.below(4) {
            store.boot(draw);
            let opened = store.open(draw);
            while opened && steps > 0 && !draw.is_empty() {
                steps -= 1;
                if !store.step(draw) {
                    break;
                }
            }
            store.crash(draw);
        }
        store
    }

    fn new(draw: &mut Draw<'_>) -> Store {
        let vshards = 1 + draw.below(4) as u16;
        let segment_size = (2 + draw.below(7)) as u32 * BLOCK as u32;
        let slots = (0..draw.below(4) as u32).map(|slot| (slot, vec![0; segment_size as usize])).collect();
        let pool = (0..).map(Slot).take(BTreeMap::len(&slots)).collect();
        Store {
            shape: StoreShape { store: StoreId { uuid: *b"a store to break", node: 1 }, segment_size, vshards },
            disk: Image { slots, unreadable: BTreeSet::new() },
            files: [Vec::new(), Vec::new()],
            known: Vec::new(),
            sent: (0..vshards).map(|_| Vec::new()).collect(),
            every: BTreeSet::new(),
            newest: 1,
            number: 0,
            now: 0,
            next_id: 0,
            next_salt: 0,
            incarnation: 0,
            durable_incarnation: 0,
            cores: Vec::new(),
            pool,
            segments: Vec::new(),
            sealed: BTreeMap::new(),
            gone: Vec::new(),
            live_before: Vec::new(),
            durable_index: vec![0; usize::from(vshards)],
            written_index: vec![0; usize::from(vshards)],
            lossless: true,
        }
    }

    pub fn wall(&self) -> WallMs {
        WallMs(1_000 + self.now)
    }

    /// The checkpoint a start would use, of undamaged files.
    pub fn chosen(&self) -> checkpoint::Chosen {
        let file = |nth: usize| (!self.files[nth].is_empty()).then_some(&self.files[nth][..]);
        checkpoint::choose(file(0), file(1)).expect("undamaged")
    }

    /// As the disk is: nobody has damaged it.
    pub fn undamaged(&self) -> Restart {
        let chosen = self.chosen();
        let restart = restart(&self.shape, &self.disk, chosen.checkpoint.as_ref(), Mode::Strict)
            .unwrap_or_else(|error| panic!("false corruption: {error}"));
        self.check_whole(&restart, chosen.checkpoint.as_ref());
        restart
    }

    /// Densely from the checkpoint on, what was written and nothing else.
    pub fn check_whole(&self, restart: &Restart, checkpoint: Option<&Checkpoint>) {
        let covered: Vec<u64> = (0..self.sent.len())
            .map(|nth| checkpoint.map_or(0, |checkpoint| checkpoint.vshards[nth].last_index))
            .collect();
        let mut last = covered.clone();
        for Yielded { vshard, index, content } in &restart.entries {
            let nth = usize::from(vshard.0);
            let Some(index) = *index else {
                assert!(self.was_written(*vshard, None, content), "invented: relocated, {vshard:?}");
                continue;
            };
            if index > covered[nth] {
                assert_eq!(index, last[nth] + 1, "{vshard:?} has a gap");
                last[nth] = index;
            }
            let sent = self.sent[nth].get(index as usize - 1);
            assert!(sent.is_some_and(|sent| sent.content == *content), "invented: {vshard:?} {index}");
        }
        assert_eq!(last, restart.recovered.last_index);
        // What the checkpoint covers is read all the same: only the log knows where its messages lie.
        let recovered = &restart.recovered;
        let end =
            |stream: StreamId| recovered.sealed.iter().find(|sealed| sealed.stream == stream).map(|sealed| sealed.end);
        let whole = |known: &Known| {
            let len = known.header.frame_bytes as usize;
            self.disk.get(known.segment.slot, known.offset, len) == Some(&known.bytes[..len])
        };
        let frames = self.known.iter().filter(|known| {
            let of = |segment: &Segment| (segment.stream, segment.sequence, segment.salt);
            recovered.live.iter().any(|live| of(live) == of(&known.segment))
                && end(known.segment.stream).is_some_and(|end| known.header.end() <= end)
                && whole(known)
        });
        let (count, records) =
            frames.fold((0, 0), |(n, records), known| (n + 1, records + u64::from(known.header.records)));
        assert_eq!((recovered.frames, recovered.records), (count, records), "frames of the log were left out");
    }

    pub fn was_written(&self, vshard: VShard, index: Option<u64>, content: &Content) -> bool {
        self.every.contains(&(vshard.0, index, Rc::clone(content)))
    }

    fn boot(&mut self, draw: &mut Draw<'_>) {
        let Restart { recovered, .. } = self.undamaged();
        let chosen = self.chosen();
        for (nth, sent) in self.sent.iter_mut().enumerate() {
            let last = recovered.last_index[nth];
            assert!(
                last >= self.durable_index[nth],
                "virtual shard {nth}: durable {}, {last} came",
                self.durable_index[nth]
            );
            assert!(
                !self.lossless || last == self.written_index[nth],
                "virtual shard {nth}: all was written, {last} came"
            );
            assert!(last == 0 || !sent[last as usize - 1].with_next, "half of a group came back");
            sent.truncate(last as usize);
        }
        assert!(recovered.incarnation_max >= self.durable_incarnation && recovered.time <= self.wall());

        self.sealed.clear();
        for sealed in &recovered.sealed {
            self.sealed.insert(sealed.stream, SealedEnd { end: sealed.end, chain: sealed.chain });
        }
        self.segments = recovered.live.clone();
        let held = chosen.held.iter().copied();
        self.gone = held.filter(|held| recovered.free.contains(&held.slot)).collect();
        self.segments.extend(&self.gone);
        let used = |slot: &Slot| self.segments.iter().any(|segment| segment.slot == *slot);
        self.pool = recovered.free.iter().copied().filter(|slot| !used(slot)).collect();
        self.live_before = chosen.checkpoint.as_ref().map_or(Vec::new(), |c| c.live.clone());
        if let Some(checkpoint) = &chosen.checkpoint {
            let number = |nth: usize| Checkpoint::decode(&self.files[nth]).ok().map(|c| c.number);
            self.newest = usize::from(number(1) == Some(checkpoint.number));
            self.number = checkpoint.number;
        }
        self.durable_index.clone_from(&recovered.last_index);
        self.written_index.clone_from(&recovered.last_index);
        self.incarnation = recovered.incarnation_max + 1;
        let note = recovered.note();
        self.cores.clear();
        for core in 0..1 + draw.below(3) as u16 {
            let slot = self.take_slot(draw).unwrap_or_else(|| self.new_slot());
            let log = self.stream(core, slot, &note);
            self.cores.push(Core { log, durable: Lsn(BLOCK as u64), unsynced: Vec::new(), undurable: VecDeque::new() });
        }
    }

    fn stream(&mut self, core: u16, slot: Slot, note: &RecoveryNote) -> Log {
        let config = LogConfig {
            store: self.shape.store,
            stream: StreamId { incarnation: self.incarnation, core },
            segment_size: self.shape.segment_size,
            last_index: self.durable_index.clone(),
            opening: Some(note.clone()),
        };
        let salt = self.salt();
        Log::new(config, Grant { slot, salt, created: self.wall() })
    }

    fn salt(&mut self) -> u64 {
        self.next_salt += 1;
        self.next_salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn new_slot(&mut self) -> Slot {
        let slot = self.disk.slots.len() as u32;
        self.disk.slots.insert(slot, vec![0; self.shape.segment_size as usize]);
        Slot(slot)
    }

    fn take_slot(&mut self, draw: &mut Draw<'_>) -> Option<Slot> {
        if self.pool.is_empty() {
            return None;
        }
        let nth = draw.below(self.pool.len());
        Some(self.pool.swap_remove(nth))
    }

    /// Writes and syncs the first frame of every stream. `false`: the crash comes before that is done.
    fn open(&mut self, draw: &mut Draw<'_>) -> bool {
        for core in 0..self.cores.len() {
            self.write(core);
        }
        if draw.one_in(8) {
            return false;
        }
        for core in 0..self.cores.len() {
            self.sync(core);
            self.grant(core, draw);
        }
        true
    }

    /// `false`: the boot ends.
    fn step(&mut self, draw: &mut Draw<'_>) -> bool {
        self.now += 1;
        let core = draw.below(self.cores.len());
        match draw.below(16) {
            0..6 => self.append(core, draw),
            6..9 => self.write(core),
            9..11 => self.sync(core),
            11 => _ = self.cores[core].log.marker(),
            12 => self.grant(core, draw),
            13..15 => self.checkpoint(draw),
            _ => return !draw.one_in(2),
        }
        self.cores[core].log.invariants();
        true
    }

    fn grant(&mut self, core: usize, draw: &mut Draw<'_>) {
        while self.cores[core].log.grants_wanted() > 0 {
            let free = self.take_slot(draw);
            let slot = match free {
                Some(slot) => slot,
                None if self.disk.slots.len() < SLOTS_MAX => self.new_slot(),
                None => return,
            };
            let salt = self.salt();
            self.cores[core].log.grant(Grant { slot, salt, created: WallMs(1_000 + self.now) });
        }
    }

    fn append(&mut self, core: usize, draw: &mut Draw<'_>) {
        let cores = self.cores.len() as u16;
        let mine: Vec<VShard> =
            (0..self.shape.vshards).map(VShard).filter(|v| usize::from(v.core(cores).0) == core).collect();
        let Some(&vshard) = draw.pick(&mine) else { return };
        self.next_id += 2;
        let id = self.next_id;
        let payload = self.payload(id, draw);
        let message = published(&payload, id);
        let acked = Record::Acked { sub: id as u32 + 1, ranges: vec![(Seq(id), Seq(id + 3)); draw.below(4)] };
        match draw.below(12) {
            0 => {
                let copy = Record::Relocated(message);
                let now = self.wall();
                if self.cores[core].log.append(vshard, &copy, Class::Control, now).is_ok() {
                    self.every.insert((vshard.0, None, content(&copy)));
                }
            }
            1 | 2 => {
                let message = Record::Published(message);
                let bytes = Log::cost(&message) + Log::cost(&acked);
                let log = &mut self.cores[core].log;
                let fits = log.has_room(bytes, Class::Control);
                assert_eq!(log.begin_group(bytes, Class::Control).is_ok(), fits, "has_room and begin_group differ");
                if fits {
                    assert!(self.append_one(core, vshard, &message, Class::Control, true));
                    assert!(self.append_one(core, vshard, &acked, Class::Control, false));
                }
            }
            3 => _ = self.append_one(core, vshard, &acked, Class::Control, false),
            4 => {
                let name = id.to_string();
                let created = Record::TopicCreated { topic: id as u32, name: name.as_bytes() };
                self.append_one(core, vshard, &created, Class::Control, false);
            }
            5 => {
                let kind = match draw.below(3) {
                    0 => SubKind::DeadLetters,
                    1 => SubKind::Orphan { key: KeyId([id as u8; 16]) },
                    _ => SubKind::Durable { name: b"a name" },
                };
                let created =
                    Record::SubCreated { sub: id as u32, topic: 1, kind, start: Seq(id), created: WallMs(id) };
                self.append_one(core, vshard, &created, Class::Control, false);
            }
            6 => {
                let failed = Record::Failed { sub: id as u32, seq: Seq(id), failures: id as u16 };
                self.append_one(core, vshard, &failed, Class::Control, false);
            }
            7 => _ = self.append_one(core, vshard, &Record::TopicDeleted { topic: id as u32 }, Class::Control, false),
            8 => _ = self.append_one(core, vshard, &Record::SubDeleted { sub: id as u32 }, Class::Control, false),
            _ => _ = self.append_one(core, vshard, &Record::Published(message), Class::Publish, false),
        }
    }

    /// Mostly short; sometimes it holds the header of a frame that lies on this disk, where a frame could begin.
    fn payload(&mut self, id: u64, draw: &mut Draw<'_>) -> Vec<u8> {
        let mut bytes = id.to_le_bytes().to_vec();
        match draw.below(8) {
            0 => bytes.resize(8 + draw.below(9_000), id as u8),
            1 | 2 => bytes.resize(8 + draw.below(3_000), draw.byte()),
            3 => {
                let decoy = draw.pick(&self.known).map(|known| known.bytes.clone());
                bytes.resize(BLOCK - FIRST_PAYLOAD, 0);
                bytes.extend_from_slice(&decoy.unwrap_or_default());
                bytes.truncate(2 * BLOCK);
            }
            _ => bytes.resize(8 + draw.below(200), id as u8),
        }
        bytes
    }

    fn append_one(&mut self, core: usize, vshard: VShard, record: &Record<'_>, class: Class, with_next: bool) -> bool {
        let now = self.wall();
        let core = &mut self.cores[core];
        let Ok(appended) = core.log.append(vshard, record, class, now) else { return false };
        let sent = &mut self.sent[usize::from(vshard.0)];
        assert_eq!(appended.index, sent.len() as u64 + 1, "indexes are dense");
        let content = content(record);
        self.every.insert((vshard.0, Some(appended.index), Rc::clone(&content)));
        sent.push(Sent { content, with_next });
        core.undurable.push_back((appended.end, vshard, appended.index));
        true
    }

    /// Hands one frame to the disk.
    fn write(&mut self, core: usize) {
        let now = self.wall();
        let Core { log, durable, undurable, .. } = &mut self.cores[core];
        let Some(write) = log.next_write(*durable, now) else { return };
        for (end, vshard, index) in undurable.iter() {
            if *end <= write.end {
                self.written_index[usize::from(vshard.0)] = *index;
            }
        }
        self.land(&write, core);
    }

    fn land(&mut self, write: &Write, core: usize) {
        if write.new_segment {
            self.segments.push(write.segment);
        }
        let skip = if write.new_segment { BLOCK } else { 0 };
        let (header, _) = FrameHeader::decode(&write.bytes[skip..]).expect("just written");
        let slot = self.disk.slots.get_mut(&write.slot.0).expect("granted");
        let at = write.offset as usize;
        let before = slot[at..at + write.bytes.len()].to_vec();
        slot[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        self.cores[core].unsynced.push(self.known.len());
        self.known.push(Known {
            segment: write.segment,
            offset: at + skip,
            header,
            bytes: write.bytes.slice(skip..),
            before,
            opening: write.new_segment.then(|| write.bytes.slice(..BLOCK)),
        });
    }

    fn sync(&mut self, core: usize) {
        let core = &mut self.cores[core];
        core.durable = core.log.taken();
        self.durable_incarnation = self.incarnation;
        core.unsynced.clear();
        while let Some(&(_, vshard, index)) = core.undurable.front().filter(|(end, ..)| *end <= core.durable) {
            core.undurable.pop_front();
            self.durable_index[usize::from(vshard.0)] = index;
        }
    }

    /// A checkpoint in one piece; frees what neither it nor the one before it needs.
    fn checkpoint(&mut self, draw: &mut Draw<'_>) {
        let size = u64::from(self.shape.segment_size);
        let current: BTreeMap<StreamId, Lsn> =
            self.cores.iter().map(|core| (core.log.stream(), core.durable)).collect();
        let (mut live, mut freed) = (Vec::new(), Vec::new());
        let mut floors: BTreeMap<StreamId, u64> = BTreeMap::new();
        self.segments.sort();
        for segment in &self.segments {
            let freeable = match current.get(&segment.stream) {
                Some(durable) => segment.sequence < durable.0 / size,
                None => true,
            };
            let gone = self.gone.contains(segment);
            let floor = floors.entry(segment.stream).or_insert(segment.sequence);
            if (gone || freeable && !draw.one_in(3)) && *floor == segment.sequence {
                *floor += 1;
                freed.push(*segment);
            } else {
                live.push(*segment);
            }
        }
        let mut streams: Vec<StreamState> = current
            .iter()
            .map(|(&stream, &durable)| StreamState { stream, covered: durable, durable, sealed: None })
            .collect();
        for (&stream, &end) in &self.sealed {
            if live.iter().any(|segment| segment.stream == stream) {
                streams.push(StreamState { stream, covered: end.end, durable: end.end, sealed: Some(end) });
            }
        }
        self.number += 1;
        let states = self.durable_index.iter();
        let checkpoint = Checkpoint {
            store: self.shape.store,
            segment_size: self.shape.segment_size,
            number: self.number,
            incarnation: self.incarnation,
            time: self.wall(),
            streams,
            live: live.clone(),
            vshards: states
                .map(|&last_index| VShardState { last_index, state: Bytes::from_static(b"state") })
                .collect(),
        };
        self.newest = 1 - self.newest;
        self.files[self.newest] = checkpoint.encode();
        let before = std::mem::replace(&mut self.live_before, live);
        self.gone.clone_from(&freed);
        if self.number >= 2 {
            let (free, keep): (Vec<Segment>, Vec<Segment>) = std::mem::take(&mut self.segments)
                .into_iter()
                .partition(|segment| freed.contains(segment) && !before.contains(segment));
            self.segments = keep;
            self.pool.extend(free.iter().map(|segment| segment.slot));
        }
    }

    /// The boot ends: in order, or with whatever was not synced lost, torn or kept.
    fn crash(&mut self, draw: &mut Draw<'_>) {
        self.lossless = true;
        match draw.below(4) {
            0 => {
                for core in 0..self.cores.len() {
                    let _no_room = self.cores[core].log.clean();
                    while self.cores[core].log.unwritten_bytes() > 0 {
                        self.write(core);
                    }
                    self.sync(core);
                }
            }
            1 => {}
            _ => {
                self.lossless = false;
                for core in 0..self.cores.len() {
                    self.lose(core, draw);
                }
            }
        }
        for (nth, sent) in self.sent.iter_mut().enumerate() {
            sent.truncate(self.written_index[nth] as usize);
        }
    }

    /// Writes that were not synced: the last one first, since a slot is written over.
    fn lose(&mut self, core: usize, draw: &mut Draw<'_>) {
        for nth in std::mem::take(&mut self.cores[core].unsynced).into_iter().rev() {
            let known = &self.known[nth];
            let start = known.offset - if known.opening.is_some() { BLOCK } else { 0 };
            let slot = self.disk.slots.get_mut(&known.segment.slot.0).expect("written");
            let kind = draw.below(3);
            let (mut bits, mut left) = (0, 0);
            for (sector, before) in known.before.chunks(SECTOR).enumerate() {
                if left == 0 {
                    (bits, left) = (draw.byte(), 8);
                }
                let torn = bits & 1 == 1;
                (bits, left) = (bits >> 1, left - 1);
                if kind == 1 || kind == 2 && torn {
                    slot[start + sector * SECTOR..][..SECTOR].copy_from_slice(before);
                }
            }
        }
    }
}

/// Whichever file it is in: names carry no meaning.
pub fn is_same_use(a: &Segment, b: &Segment) -> bool {
    (a.stream, a.sequence, a.salt) == (b.stream, b.sequence, b.salt)
}

fn content(record: &Record<'_>) -> Content {
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    bytes.truncate(record.encoded_len());
    bytes.into()
}

fn published(payload: &[u8], id: u64) -> Published<'_> {
    let identity = match id % 6 {
        0 => Some(IdentityRef::MessageId(&payload[..8])),
        2 => Some(IdentityRef::Publisher { id: 7, sequence: id }),
        _ => None,
    };
    Published {
        topic: 1,
        seq: Seq(id),
        published: WallMs(id),
        expires: WallMs(0),
        not_before: WallMs(0),
        priority: (id % 10) as u8,
        identity,
        options: b"",
        payload,
    }
}
