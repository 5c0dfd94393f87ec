//! The recovery rule against a disk that loses, tears and forgets: one seed, one life of a store.
//!
//! The store in it is the real one (`batch`, `commit`, `checkpoint`, `recovery`); only the driver, the keeper and the disk are
//! models. A run fails with the name of the promise that was broken. Every planted mistake must make some run fail.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::batch::{Class, Grant, Log, LogConfig, Write};
use super::checkpoint::{self, Checkpoint, SealedEnd, StreamState, VShardState};
use super::commit::{Commit, FsyncPolicy};
use super::format::{FRAME_HEADER, FrameHeader, Segment, StoreId};
use super::record::{Published, Record, RecoveryNote, published_body};
use super::recovery::{
    Entry, Mode, ReadError, Recovered, RecoveryError, Segments, StoreShape, recover, recover_flawed,
};
use crate::limits::BLOCK;
use crate::planted;
use crate::time::{Instant, WallMs};
use crate::types::{LogRef, Lsn, Seq, Slot, StreamId, VShard};

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// A mistake to plant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bug {
    In(planted::Bug),
    /// Acknowledges what was only appended.
    AckBeforeWrite,
    /// Under `always`, acknowledges what was only written.
    AckBeforeSync,
    /// A sync is taken to cover what was written while it ran.
    SyncCoversLater,
    /// Frames claim that everything before them is durable.
    WatermarkAhead,
    /// Segments are used again as soon as a checkpoint that does not need them is begun.
    FreeEarly,
    /// A write that completed is taken to complete all before it.
    WrittenOutOfOrder,
}

const SECTOR: usize = 512;

/// A write that may still be lost.
struct Pending {
    id: u64,
    slot: Slot,
    offset: usize,
    bytes: Bytes,
    core: usize,
    completed: bool,
}

/// What survives a power loss, and what may.
struct Disk {
    platter: Vec<Vec<u8>>,
    pending: Vec<Pending>,
    next_id: u64,
}

impl Disk {
    fn submit(&mut self, core: usize, write: &Write) -> u64 {
        self.next_id += 1;
        let (slot, offset) = (write.slot, write.offset as usize);
        let id = self.next_id;
        self.pending.push(Pending { id, slot, offset, bytes: write.bytes.clone(), core, completed: false });
        id
    }

    fn land(&mut self, wanted: impl Fn(&Pending) -> bool) {
        let (now, later) = std::mem::take(&mut self.pending).into_iter().partition(wanted);
        self.pending = later;
        let now: Vec<Pending> = now;
        for write in now {
            self.platter[write.slot.0 as usize][write.offset..write.offset + write.bytes.len()]
                .copy_from_slice(&write.bytes);
        }
    }

    /// The process dies. With the power on, what was completed stays; what was under way may land whole, in part, or not.
    fn crash(&mut self, rng: &mut Rng, power: bool) {
        let keep = [0, 30, 70, 100][rng.below(4) as usize];
        let tear = [0, 20, 60][rng.below(3) as usize];
        for write in std::mem::take(&mut self.pending) {
            let slot = &mut self.platter[write.slot.0 as usize];
            let safe = write.completed && !power;
            if !safe && !rng.percent(keep) {
                continue;
            }
            let torn = !safe && rng.percent(tear);
            for (nth, sector) in write.bytes.chunks(SECTOR).enumerate() {
                if !torn || rng.percent(50) {
                    let at = write.offset + nth * SECTOR;
                    slot[at..at + SECTOR].copy_from_slice(sector);
                }
            }
        }
    }
}

impl Segments for Vec<Vec<u8>> {
    fn slots(&self) -> Vec<Slot> {
        (0..self.len() as u32).map(Slot).collect()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        Ok(Bytes::copy_from_slice(&self[slot.0 as usize][offset as usize..(offset + len) as usize]))
    }
}

/// What the clients know of one record.
#[derive(Clone, Copy, Debug)]
struct Sent {
    id: u64,
    len: usize,
    publish: bool,
    acked: Option<Instant>,
    stream: StreamId,
    /// Appended as one group with the record after it.
    with_next: bool,
}

fn payload(id: u64, len: usize) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.resize(8 + len, id as u8);
    bytes
}

fn published(bytes: &[u8]) -> Published<'_> {
    Published {
        topic: 1,
        seq: Seq(1),
        published: WallMs(1),
        expires: WallMs(0),
        not_before: WallMs(0),
        priority: 0,
        identity: None,
        options: b"",
        payload: bytes,
    }
}

struct Flight {
    id: u64,
    end: Lsn,
    records: u32,
    completed: bool,
}

/// One core's driver.
struct Core {
    log: Log,
    commit: Commit,
    flights: VecDeque<Flight>,
    /// Of the running sync: the writes it covers, and what that is worth.
    sync: Option<(Vec<u64>, Lsn)>,
    unacked: VecDeque<(Lsn, VShard, u64)>,
    undurable: VecDeque<(Lsn, VShard, u64)>,
}

/// Every frame that was ever submitted, to know what damage to it should lead to.
#[derive(Clone)]
struct Known {
    segment: Segment,
    offset: usize,
    header: FrameHeader,
    bytes: Bytes,
    before: Vec<u8>,
    /// The header block of its segment.
    opening: Option<Bytes>,
}

/// What a finished run saw.
#[derive(Default, Debug)]
struct Tally {
    boots: u64,
    frames: u64,
    acked: u64,
    lost: u64,
    refused: u64,
    truncated: u64,
    harmless: u64,
}

struct World {
    rng: Rng,
    bug: Option<Bug>,
    shape: StoreShape,
    policy: FsyncPolicy,
    depth: usize,
    dsync: bool,
    disk: Disk,
    files: [Vec<u8>; 2],
    /// The file that holds the newest whole checkpoint.
    newest: usize,
    number: u64,
    now: u64,
    sent: Vec<Vec<Sent>>,
    /// By virtual shard: what was sent, was not promised, and went with a tail.
    cut: Vec<Vec<Sent>>,
    next_id: u64,
    incarnation: u64,
    cores: Vec<Core>,
    pool: Vec<Slot>,
    /// Segments in use, or waiting to be freed.
    segments: Vec<Segment>,
    sealed: BTreeMap<StreamId, SealedEnd>,
    /// Those of them that a checkpoint did without: it must not need them again, or there would be gaps.
    gone: Vec<Segment>,
    /// What the last whole checkpoint needs.
    live_before: Vec<Segment>,
    writing: Option<Writing>,
    durable_index: Vec<u64>,
    known: Vec<Known>,
    /// What is durable for certain.
    durable: BTreeMap<StreamId, Lsn>,
    tally: Tally,
}

/// A checkpoint under way.
struct Writing {
    file: Vec<u8>,
    live: Vec<Segment>,
    /// What it decided not to need. A segment opened since then is in neither list.
    freed: Vec<Segment>,
}

type Verdict<T> = Result<T, String>;

macro_rules! promise {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err(format!($($text)+));
        }
    };
}

/// What a recovery of the model yields.
struct Restart {
    recovered: Recovered,
    chosen: checkpoint::Chosen,
    entries: Vec<(VShard, Option<u64>, LogRef, u64, usize, bool)>,
}

impl World {
    fn new(seed: u64, bug: Option<Bug>) -> World {
        let mut rng = Rng(seed);
        let policy = match rng.below(8) {
            0 => FsyncPolicy::EveryN(1 + rng.below(8) as u32),
            1 => FsyncPolicy::IntervalMs(4 + rng.below(30)),
            2 => FsyncPolicy::None,
            _ => FsyncPolicy::Always,
        };
        let segment_size = [5, 8, 12][rng.below(3) as usize] * BLOCK as u32;
        let slots = 16 + rng.below(20) as usize;
        let vshards = 1 + rng.below(5) as u16;
        let store = StoreId { uuid: rng.next().to_le_bytes().repeat(2).try_into().expect("16"), node: 1 };
        World {
            bug,
            shape: StoreShape { store, segment_size, vshards },
            depth: 1 + rng.below(8) as usize,
            dsync: policy == FsyncPolicy::Always && rng.percent(40),
            policy,
            disk: Disk { platter: vec![vec![0; segment_size as usize]; slots], pending: Vec::new(), next_id: 0 },
            files: [Vec::new(), Vec::new()],
            newest: 1,
            number: 0,
            now: 0,
            sent: vec![Vec::new(); usize::from(vshards)],
            cut: vec![Vec::new(); usize::from(vshards)],
            next_id: 0,
            incarnation: 0,
            cores: Vec::new(),
            pool: Vec::new(),
            segments: Vec::new(),
            sealed: BTreeMap::new(),
            gone: Vec::new(),
            live_before: Vec::new(),
            writing: None,
            durable_index: vec![0; usize::from(vshards)],
            known: Vec::new(),
            durable: BTreeMap::new(),
            tally: Tally::default(),
            rng,
        }
    }

    fn flaw(&self) -> Option<planted::Bug> {
        match self.bug {
            Some(Bug::In(flaw)) => Some(flaw),
            _ => None,
        }
    }

    fn instant(&self) -> Instant {
        Instant(self.now * 1_000_000)
    }

    fn wall(&self) -> WallMs {
        WallMs(1_000 + self.now)
    }

    /// The whole life: boots, work, crashes.
    fn live(&mut self) -> Verdict<()> {
        let boots = 2 + self.rng.below(3);
        for _ in 0..boots {
            self.boot()?;
            let opened = self.open()?;
            let steps = if opened { 20 + self.rng.below(120) } else { 0 };
            for _ in 0..steps {
                self.step()?;
            }
            self.end()?;
        }
        self.boot()
    }

    fn restart(&self, platter: &Vec<Vec<u8>>) -> Result<Restart, String> {
        let file = |nth: usize| (!self.files[nth].is_empty()).then_some(&self.files[nth][..]);
        let chosen = checkpoint::choose(file(0), file(1)).map_err(|error| format!("false corruption: {error}"))?;
        let mut entries = Vec::new();
        let checkpoint = chosen.checkpoint.as_ref();
        let recovered = recover_flawed(&self.shape, platter, checkpoint, self.flaw(), &mut |entry| {
            let (id, len, publish) = match &entry.record {
                Record::Published(message) | Record::Relocated(message) if message.payload.len() >= 8 => {
                    let id = u64::from_le_bytes(message.payload[..8].try_into().expect("8"));
                    let whole = payload(id, message.payload.len() - 8) == message.payload;
                    (if whole { id } else { u64::MAX }, message.payload.len() - 8, true)
                }
                Record::Acked { sub, ranges } => (u64::from(*sub), ranges.len(), false),
                _ => (u64::MAX, 0, false),
            };
            entries.push((entry.vshard, entry.index, entry.at, id, len, publish));
        })
        .map_err(|error: RecoveryError| format!("corruption: {error}"))?;
        Ok(Restart { recovered, chosen, entries })
    }

    /// What came back is what was sent: densely from the checkpoint on, nothing else, and readable where it says.
    fn check_prefix(&self, restart: &Restart, platter: &[Vec<u8>]) -> Verdict<()> {
        let covered = |vshard: usize| restart.chosen.checkpoint.as_ref().map_or(0, |c| c.vshards[vshard].last_index);
        let mut next: Vec<u64> = (0..self.sent.len()).map(|vshard| covered(vshard) + 1).collect();
        for &(vshard, index, at, id, len, publish) in &restart.entries {
            let nth = usize::from(vshard.0);
            if publish {
                let slot = &platter[at.slot.0 as usize];
                let bytes = Bytes::copy_from_slice(&slot[at.offset as usize..(at.offset + at.len) as usize]);
                let body = published_body(&bytes).map_err(|error| format!("a reference leads nowhere: {error}"))?;
                promise!(body.payload() == payload(id, len), "a reference leads to another message");
            }
            let Some(index) = index else { continue };
            if index > covered(nth) {
                promise!(index == next[nth], "index {index} of {vshard:?} instead of {}", next[nth]);
                next[nth] += 1;
            }
            let sent = self.sent[nth].get(index as usize - 1);
            promise!(
                sent.is_some_and(|sent| (sent.id, sent.len, sent.publish) == (id, len, publish)),
                "phantom: {vshard:?} {index} is {id}, sent was {sent:?}"
            );
        }
        for (nth, next) in next.into_iter().enumerate() {
            let last = restart.recovered.last_index[nth];
            promise!(next == last + 1, "virtual shard {nth}: {} yielded, last index is {last}", next - 1);
        }
        Ok(())
    }

    /// Starts after a crash: the image is what it is.
    fn boot(&mut self) -> Verdict<()> {
        let restart = self.restart(&self.disk.platter).map_err(|error| format!("false {error}"))?;
        self.check_prefix(&restart, &self.disk.platter)?;
        let recovered = &restart.recovered;
        for (nth, sent) in self.sent.iter_mut().enumerate() {
            let last = recovered.last_index[nth] as usize;
            promise!(last == 0 || !sent[last - 1].with_next, "half of a group survived");
            self.cut[nth].extend(sent.drain(last.min(sent.len())..));
        }
        if self.rng.percent(20) {
            let again = self.restart(&self.disk.platter)?;
            promise!(again.recovered == *recovered, "two recoveries of one image differ");
        }
        promise!(recovered.incarnation_max >= self.durable_incarnation(), "an incarnation was forgotten");
        promise!(recovered.time <= self.wall(), "time from the future");
        self.tally.boots += 1;
        self.tally.frames += recovered.frames;

        self.sealed.clear();
        for sealed in &recovered.sealed {
            self.sealed.insert(sealed.stream, SealedEnd { end: sealed.end, chain: sealed.chain });
            self.durable.insert(sealed.stream, sealed.end);
        }
        self.segments = recovered.live.clone();
        let held = restart.chosen.held.iter().copied();
        self.gone = held.filter(|held| recovered.free.contains(&held.slot)).collect();
        self.segments.extend(&self.gone);
        let used = |slot: &Slot| self.segments.iter().any(|segment| segment.slot == *slot);
        self.pool = recovered.free.iter().copied().filter(|slot| !used(slot)).collect();
        self.live_before = restart.chosen.checkpoint.as_ref().map_or(Vec::new(), |c| c.live.clone());
        if let Some(checkpoint) = &restart.chosen.checkpoint {
            let number = |nth: usize| Checkpoint::decode(&self.files[nth]).ok().map(|c| c.number);
            self.newest = usize::from(number(1) == Some(checkpoint.number));
            self.number = self.number.max(checkpoint.number);
        }
        self.durable_index = recovered.last_index.clone();
        self.incarnation = recovered.incarnation_max + 1;

        let cores = 1 + self.rng.below(3) as u16;
        let note: RecoveryNote = recovered.note();
        self.cores.clear();
        for core in 0..cores {
            let slot = self.take_slot().unwrap_or_else(|| self.new_slot());
            let config = LogConfig {
                store: self.shape.store,
                stream: StreamId { incarnation: self.incarnation, core },
                segment_size: self.shape.segment_size,
                last_index: self.durable_index.clone(),
                opening: Some(note.clone()),
            };
            let grant = Grant { slot, salt: self.rng.next(), created: self.wall() };
            self.cores.push(Core {
                log: Log::new(config, grant),
                commit: Commit::new(self.policy, Lsn(BLOCK as u64)),
                flights: VecDeque::new(),
                sync: None,
                unacked: VecDeque::new(),
                undurable: VecDeque::new(),
            });
        }
        Ok(())
    }

    fn durable_incarnation(&self) -> u64 {
        self.durable.keys().map(|stream| stream.incarnation).max().unwrap_or(0)
    }

    fn new_slot(&mut self) -> Slot {
        self.disk.platter.push(vec![0; self.shape.segment_size as usize]);
        Slot(self.disk.platter.len() as u32 - 1)
    }

    fn take_slot(&mut self) -> Option<Slot> {
        if self.pool.is_empty() {
            return None;
        }
        let nth = self.rng.below(self.pool.len() as u64) as usize;
        Some(self.pool.swap_remove(nth))
    }

    /// Writes and syncs the first frame of every stream. `false`: the crash comes before that is done.
    fn open(&mut self) -> Verdict<bool> {
        for core in 0..self.cores.len() {
            self.submit(core);
        }
        if self.rng.percent(15) {
            return Ok(false);
        }
        for core in 0..self.cores.len() {
            while self.complete(core) {}
            if self.rng.percent(5) {
                return Ok(false);
            }
            self.cores[core].commit.request_sync();
            if self.cores[core].commit.sync_wanted(self.instant()) {
                self.begin_sync(core);
                self.end_sync(core);
            }
            self.grant(core);
        }
        Ok(true)
    }

    fn step(&mut self) -> Verdict<()> {
        self.now += self.rng.below(3);
        let core = self.rng.below(self.cores.len() as u64) as usize;
        match self.rng.below(100) {
            0..35 => {
                for _ in 0..1 + self.rng.below(4) {
                    self.append(core)?;
                }
            }
            35..60 => self.submit(core),
            60..85 => {
                self.complete(core);
            }
            85..88 => {
                let now = self.instant();
                if self.rng.percent(50) || self.cores[core].commit.marker_wanted(now) {
                    let _ = self.cores[core].log.marker();
                } else {
                    self.cores[core].commit.request_sync();
                }
            }
            88..95 => self.checkpoint(),
            _ => self.grant(core),
        }
        for core in 0..self.cores.len() {
            let now = self.instant();
            if self.cores[core].sync.is_some() {
                if self.rng.percent(25) {
                    self.end_sync(core);
                }
            } else if self.cores[core].commit.sync_wanted(now) && self.rng.percent(70) {
                self.begin_sync(core);
            }
            self.acknowledge(core);
            self.cores[core].log.invariants();
        }
        Ok(())
    }

    fn grant(&mut self, core: usize) {
        while self.cores[core].log.grants_wanted() > 0 {
            let Some(slot) = self.take_slot() else { break };
            let grant = Grant { slot, salt: self.rng.next(), created: self.wall() };
            self.cores[core].log.grant(grant);
        }
    }

    fn append(&mut self, core: usize) -> Verdict<()> {
        let mine: Vec<u16> = (0..self.shape.vshards).filter(|v| usize::from(*v) % self.cores.len() == core).collect();
        if mine.is_empty() {
            return Ok(());
        }
        let vshard = VShard(mine[self.rng.below(mine.len() as u64) as usize]);
        let len = match self.rng.below(10) {
            0 => self.rng.below(12_000) as usize,
            1..4 => self.rng.below(3_000) as usize,
            _ => self.rng.below(200) as usize,
        };
        let now = self.wall();
        self.next_id += 2;
        let id = self.next_id;
        let bytes = payload(id, len);
        let message = Record::Published(published(&bytes));
        let acked = Record::Acked { sub: id as u32 + 1, ranges: vec![(Seq(1), Seq(2)); 3] };
        match self.rng.below(10) {
            0 => {
                let copy = Record::Relocated(published(&bytes));
                let _ = self.cores[core].log.append(vshard, &copy, Class::Control, now);
            }
            1 => {
                let log = &mut self.cores[core].log;
                let bytes = Log::cost(&message) + Log::cost(&acked);
                let fits = log.has_room(bytes, Class::Control);
                promise!(log.begin_group(bytes, Class::Control).is_ok() == fits, "has_room and begin_group differ");
                if fits {
                    self.append_one(core, vshard, &message, Class::Control, (id, len, true), true)?;
                    self.append_one(core, vshard, &acked, Class::Control, (id + 1, 3, false), false)?;
                }
            }
            2 => {
                let _ = self.append_one(core, vshard, &acked, Class::Control, (id + 1, 3, false), false);
            }
            _ => {
                let _ = self.append_one(core, vshard, &message, Class::Publish, (id, len, true), false);
            }
        }
        Ok(())
    }

    fn append_one(
        &mut self,
        core: usize,
        vshard: VShard,
        record: &Record<'_>,
        class: Class,
        (id, len, publish): (u64, usize, bool),
        with_next: bool,
    ) -> Verdict<()> {
        let now = self.wall();
        let core = &mut self.cores[core];
        let appended = core.log.append(vshard, record, class, now).map_err(|error| error.to_string())?;
        let sent = &mut self.sent[usize::from(vshard.0)];
        promise!(appended.index == sent.len() as u64 + 1, "index {} is not dense", appended.index);
        sent.push(Sent { id, len, publish, acked: None, stream: core.log.stream(), with_next });
        core.unacked.push_back((appended.end, vshard, appended.index));
        core.undurable.push_back((appended.end, vshard, appended.index));
        Ok(())
    }

    fn submit(&mut self, core: usize) {
        if self.cores[core].flights.len() >= self.depth {
            return;
        }
        let now = self.wall();
        let bug = self.bug;
        let Core { log, commit, .. } = &mut self.cores[core];
        let taken = log.taken();
        let durable = if bug == Some(Bug::WatermarkAhead) { taken } else { commit.durable() };
        let Some(write) = log.next_write(durable, now) else { return };
        if write.new_segment {
            self.segments.push(write.segment);
            if self.policy == FsyncPolicy::None {
                self.cores[core].commit.request_sync();
            }
        }
        let id = self.disk.submit(core, &write);
        self.cores[core].flights.push_back(Flight { id, end: write.end, records: write.records, completed: false });
        self.remember(&write);
    }

    fn remember(&mut self, write: &Write) {
        let skip = if write.new_segment { BLOCK } else { 0 };
        let (header, _) = FrameHeader::decode(&write.bytes[skip..]).expect("just written");
        let offset = write.offset as usize + skip;
        let bytes = write.bytes.slice(skip..);
        let before = self.disk.platter[write.slot.0 as usize][offset..offset + bytes.len()].to_vec();
        let opening = write.new_segment.then(|| write.bytes.slice(..BLOCK));
        self.known.push(Known { segment: write.segment, offset, header, bytes, before, opening });
    }

    /// One write under way completes, any of them.
    fn complete(&mut self, core: usize) -> bool {
        let now = self.instant();
        let open: Vec<usize> =
            (0..self.cores[core].flights.len()).filter(|&nth| !self.cores[core].flights[nth].completed).collect();
        if open.is_empty() {
            return false;
        }
        let nth = open[self.rng.below(open.len() as u64) as usize];
        let state = &mut self.cores[core];
        state.flights[nth].completed = true;
        let id = state.flights[nth].id;
        for write in &mut self.disk.pending {
            write.completed |= write.id == id;
        }
        if self.dsync {
            self.disk.land(|write| write.id == id);
        }
        let out_of_order = self.bug == Some(Bug::WrittenOutOfOrder);
        let mut left = if out_of_order { nth + 1 } else { usize::MAX };
        while left > 0 && state.flights.front().is_some_and(|flight| flight.completed || out_of_order) {
            left -= 1;
            let flight = state.flights.pop_front().expect("front");
            state.commit.on_written(flight.end, flight.records, now);
            if self.dsync {
                state.commit.on_synced(flight.end, now);
            }
        }
        self.note_durable(core);
        true
    }

    fn begin_sync(&mut self, core: usize) {
        let upto = self.cores[core].commit.on_sync_started();
        let covered = self.disk.pending.iter().filter(|write| write.core == core && write.completed);
        self.cores[core].sync = Some((covered.map(|write| write.id).collect(), upto));
    }

    fn end_sync(&mut self, core: usize) {
        let Some((covered, mut upto)) = self.cores[core].sync.take() else { return };
        self.disk.land(|write| covered.contains(&write.id));
        if self.bug == Some(Bug::SyncCoversLater) {
            upto = self.cores[core].commit.written();
        }
        let now = self.instant();
        self.cores[core].commit.on_synced(upto, now);
        self.note_durable(core);
    }

    fn note_durable(&mut self, core: usize) {
        let core = &mut self.cores[core];
        let durable = core.commit.durable();
        if durable > Lsn(BLOCK as u64) {
            self.durable.insert(core.log.stream(), durable);
        }
        while let Some(&(_, vshard, index)) = core.undurable.front().filter(|(end, ..)| *end <= durable) {
            core.undurable.pop_front();
            self.durable_index[usize::from(vshard.0)] = index;
        }
    }

    fn acknowledge(&mut self, core: usize) {
        let now = self.instant();
        let core = &mut self.cores[core];
        let upto = match self.bug {
            Some(Bug::AckBeforeWrite) => core.log.appended(),
            Some(Bug::AckBeforeSync) => core.commit.written(),
            _ => core.commit.ack_upto(),
        };
        while let Some(&(_, vshard, index)) = core.unacked.front().filter(|(end, ..)| *end <= upto) {
            core.unacked.pop_front();
            self.sent[usize::from(vshard.0)][index as usize - 1].acked = Some(now);
            self.tally.acked += 1;
        }
    }

    /// The keeper: begins a checkpoint, or finishes the one it writes.
    fn checkpoint(&mut self) {
        if self.writing.is_some() && self.rng.percent(50) {
            return;
        }
        if let Some(Writing { file, live, freed }) = self.writing.take() {
            let older = 1 - self.newest;
            self.files[older] = file;
            self.newest = older;
            let before = std::mem::replace(&mut self.live_before, live);
            self.gone.clone_from(&freed);
            if self.number >= 2 {
                self.free(&freed, &before);
            }
            return;
        }
        let size = u64::from(self.shape.segment_size);
        let current: BTreeMap<StreamId, Lsn> =
            self.cores.iter().map(|core| (core.log.stream(), core.commit.durable())).collect();
        let mut live = Vec::new();
        let mut freed = Vec::new();
        let mut floors: BTreeMap<StreamId, u64> = BTreeMap::new();
        let mut segments = self.segments.clone();
        segments.sort();
        for segment in segments {
            let freeable = match current.get(&segment.stream) {
                Some(durable) => segment.sequence < durable.0 / size,
                None => true,
            };
            let gone = self.gone.contains(&segment);
            let floor = floors.entry(segment.stream).or_insert(segment.sequence);
            if (gone || freeable && self.rng.percent(60)) && *floor == segment.sequence {
                *floor += 1;
                freed.push(segment);
            } else {
                live.push(segment);
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
        let checkpoint = Checkpoint {
            store: self.shape.store,
            segment_size: self.shape.segment_size,
            number: self.number,
            incarnation: self.incarnation,
            time: self.wall(),
            streams,
            live: live.clone(),
            vshards: self
                .durable_index
                .iter()
                .map(|&last_index| VShardState { last_index, state: Bytes::from_static(b"state") })
                .collect(),
        };
        if self.bug == Some(Bug::FreeEarly) {
            self.free(&freed, &[]);
        }
        self.writing = Some(Writing { file: checkpoint.encode(), live, freed });
    }

    /// Gives back what the newest checkpoint does not need, unless the one before it does.
    fn free(&mut self, freed: &[Segment], before: &[Segment]) {
        let (free, keep) = std::mem::take(&mut self.segments)
            .into_iter()
            .partition(|segment| freed.contains(segment) && !before.contains(segment));
        self.segments = keep;
        let free: Vec<Segment> = free;
        self.pool.extend(free.iter().map(|segment| segment.slot));
    }

    /// The boot ends: in order, by a kill, or by a loss of power.
    fn end(&mut self) -> Verdict<()> {
        let kind = self.rng.below(10);
        if kind == 0 {
            for core in 0..self.cores.len() {
                let _ = self.cores[core].log.clean();
                while !self.cores[core].flights.is_empty() || self.cores[core].log.unwritten_bytes() > 0 {
                    self.submit(core);
                    self.complete(core);
                }
                self.end_sync(core);
                self.cores[core].commit.request_sync();
                if self.cores[core].commit.sync_wanted(self.instant()) {
                    self.begin_sync(core);
                    self.end_sync(core);
                }
                self.acknowledge(core);
            }
        }
        let power = kind < 7;
        self.disk.crash(&mut self.rng, power);
        if let Some(writing) = self.writing.take() {
            self.tear_file(&writing.file);
        }
        self.check_losses(power)
    }

    fn tear_file(&mut self, bytes: &[u8]) {
        let older = 1 - self.newest;
        let mut file = std::mem::take(&mut self.files[older]);
        file.resize(file.len().max(bytes.len()), 0);
        let keep = [0, 50, 100][self.rng.below(3) as usize];
        for (nth, sector) in bytes.chunks(SECTOR).enumerate() {
            if self.rng.percent(keep) {
                file[nth * SECTOR..(nth + 1) * SECTOR].copy_from_slice(sector);
            }
        }
        self.files[older] = file;
    }

    /// What was acknowledged is there, up to what the policy allows to be lost.
    fn check_losses(&mut self, power: bool) -> Verdict<()> {
        let restart = self.restart(&self.disk.platter).map_err(|error| format!("false {error}"))?;
        let mut lost: BTreeMap<StreamId, Vec<Instant>> = BTreeMap::new();
        for (nth, sent) in self.sent.iter().enumerate() {
            let last = restart.recovered.last_index[nth] as usize;
            promise!(last <= sent.len(), "virtual shard {nth}: {last} came back, {} were sent", sent.len());
            for sent in &sent[last..] {
                if let Some(acked) = sent.acked {
                    lost.entry(sent.stream).or_default().push(acked);
                }
            }
        }
        for (stream, acked) in lost {
            let count = acked.len();
            self.tally.lost += count as u64;
            let spread = acked.iter().max().expect("some").0 - acked.iter().min().expect("some").0;
            let allowed = match self.policy {
                _ if !power => false,
                FsyncPolicy::Always => false,
                FsyncPolicy::EveryN(n) => count <= n as usize,
                FsyncPolicy::IntervalMs(ms) => spread < ms * 1_000_000,
                FsyncPolicy::None => true,
            };
            promise!(allowed, "lost {count} acknowledged, over {spread} ns, stream {stream}, {:?}", self.policy);
        }
        Ok(())
    }

    /// One frame that was durable is damaged. Whoever can still know of it must speak.
    fn damage(&mut self) -> Verdict<()> {
        let restart = self.restart(&self.disk.platter)?;
        let ends: BTreeMap<StreamId, Lsn> =
            restart.recovered.sealed.iter().map(|sealed| (sealed.stream, sealed.end)).collect();
        let victims: Vec<Known> = self
            .known
            .iter()
            .filter(|known| {
                let end = known.header.end();
                restart.recovered.live.contains(&known.segment)
                    && ends.get(&known.segment.stream).is_some_and(|sealed| end <= *sealed)
                    && self.durable.get(&known.segment.stream).is_some_and(|durable| end <= *durable)
            })
            .cloned()
            .collect();
        if victims.is_empty() {
            return Ok(());
        }
        let victim = victims[self.rng.below(victims.len() as u64) as usize].clone();
        let mut platter = self.disk.platter.clone();
        let place = victim.offset..victim.offset + victim.bytes.len();
        let slot = victim.segment.slot.0 as usize;
        let kind = self.rng.below(5);
        match kind {
            0 => {
                let bit = self.rng.below(u64::from(victim.header.frame_bytes) * 8) as usize;
                platter[slot][victim.offset + bit / 8] ^= 1 << (bit % 8);
            }
            1 => platter[slot][place].fill(0),
            2 => platter[slot][place].copy_from_slice(&victim.before),
            3 => {
                platter[slot][place].copy_from_slice(&victim.before);
                let blocks = (self.shape.segment_size as usize - victim.bytes.len()) / BLOCK;
                let other = self.rng.below(platter.len() as u64) as usize;
                let offset = BLOCK * (1 + self.rng.below(blocks as u64) as usize);
                if (other, offset) == (slot, victim.offset) {
                    return Ok(());
                }
                platter[other][offset..offset + victim.bytes.len()].copy_from_slice(&victim.bytes);
            }
            _ => {
                let bit = self.rng.below(76 * 8) as usize;
                platter[slot][bit / 8] ^= 1 << (bit % 8);
            }
        }
        let witness = self.witness(&platter, &victim, kind == 4, &restart);
        match self.restart(&platter) {
            Err(_) => {
                self.tally.refused += 1;
                self.salvage(&platter)?;
            }
            Ok(after) => {
                self.check_prefix(&after, &platter)?;
                promise!(witness.is_none(), "silent: damage {kind} to {:?}, {}", victim.header, witness.unwrap());
                if after.recovered.last_index == restart.recovered.last_index {
                    self.tally.harmless += 1;
                } else {
                    self.tally.truncated += 1;
                }
            }
        }
        Ok(())
    }

    /// What a salvage brings back was sent, and it says that something is missing.
    fn salvage(&self, platter: &Vec<Vec<u8>>) -> Verdict<()> {
        let chosen = checkpoint::choose(Some(&self.files[0]), Some(&self.files[1])).map_err(|e| e.to_string())?;
        let mut phantom = None;
        let recovered =
            recover(&self.shape, platter, chosen.checkpoint.as_ref(), Mode::Salvage, &mut |entry: Entry<'_>| {
                let (Some(index), Record::Published(message)) = (entry.index, &entry.record) else { return };
                let nth = usize::from(entry.vshard.0);
                let is_it = |sent: &Sent| payload(sent.id, sent.len) == message.payload;
                // Until the next run has said on the disk where this one ended, what was cut off may come back.
                let sent = self.sent[nth].get(index as usize - 1).is_some_and(is_it);
                if !sent && !self.cut[nth].iter().any(is_it) {
                    phantom = Some(format!("salvage invents {:?} {index}", entry.vshard));
                }
            })
            .map_err(|error| format!("salvage stops: {error}"))?;
        promise!(!recovered.damage.is_empty(), "salvage sees nothing wrong");
        phantom.map_or(Ok(()), Err)
    }

    /// Who still knows, on the damaged disk, that the victim was durable.
    fn witness(&self, platter: &[Vec<u8>], victim: &Known, header_gone: bool, before: &Restart) -> Option<String> {
        let stream = victim.segment.stream;
        // A segment without its header is gone with all its frames.
        let gap = if header_gone { self.first_of(victim) } else { victim.header.prev_end };
        let checkpoint = before.chosen.checkpoint.as_ref();
        if checkpoint.is_some_and(|c| c.streams.iter().any(|s| s.stream == stream && s.durable > gap)) {
            return Some("the checkpoint knows".to_owned());
        }
        let there = |known: &Known| {
            let at = &platter[known.segment.slot.0 as usize][known.offset..];
            at[..FRAME_HEADER] == known.bytes[..FRAME_HEADER]
        };
        let opened = |segment: Segment| {
            let first = self.known.iter().find(|known| known.segment == segment && known.opening.is_some());
            first.is_some_and(|first| {
                let slot = &platter[segment.slot.0 as usize];
                let header = first.opening.as_ref().is_some_and(|block| slot[..BLOCK] == block[..]);
                header || (header_gone && segment == victim.segment && there(first))
            })
        };
        for known in &self.known {
            if known.segment.stream == stream && known.header.durable > gap && there(known) && opened(known.segment) {
                return Some(format!("frame at {} knows up to {}", known.header.lsn, known.header.durable));
            }
            let at = &platter[known.segment.slot.0 as usize][known.offset..];
            let whole = at[..known.bytes.len()] == known.bytes[..];
            if known.header.prev_end == Lsn(BLOCK as u64) && whole && opened(known.segment) {
                let body = &known.bytes[FRAME_HEADER..known.header.frame_bytes as usize];
                let note = RecoveryNote::decode(body).unwrap_or_default();
                if note.sealed.iter().any(|sealed| sealed.stream == stream && sealed.end > gap) {
                    return Some(format!("the note in stream {} knows", known.segment.stream));
                }
            }
        }
        None
    }

    fn first_of(&self, victim: &Known) -> Lsn {
        let first = self.known.iter().find(|known| known.segment == victim.segment);
        first.map_or(victim.header.prev_end, |known| known.header.prev_end)
    }
}

fn seeds(normal: u64) -> u64 {
    std::env::var("BLIPMQ_MODEL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(normal)
}

fn run(seed: u64, bug: Option<Bug>, damage: bool) -> Verdict<Tally> {
    let mut world = World::new(seed, bug);
    world.live()?;
    if damage {
        world.damage()?;
    }
    Ok(world.tally)
}

fn add(sum: &mut Tally, one: Tally) {
    sum.boots += one.boots;
    sum.frames += one.frames;
    sum.acked += one.acked;
    sum.lost += one.lost;
    sum.refused += one.refused;
    sum.truncated += one.truncated;
    sum.harmless += one.harmless;
}

#[test]
fn a_crash_loses_what_the_policy_allows_and_is_never_called_corruption() {
    let mut sum = Tally::default();
    for seed in 0..seeds(2_000) {
        add(&mut sum, run(seed, None, false).unwrap_or_else(|error| panic!("seed {seed}: {error}")));
    }
    assert!(sum.acked > 10 * sum.boots, "too little happened: {sum:?}");
    println!("{sum:?}");
}

#[test]
fn damage_is_never_silent_while_a_witness_survives() {
    let mut sum = Tally::default();
    for seed in 0..seeds(2_000) {
        add(&mut sum, run(seed, None, true).unwrap_or_else(|error| panic!("seed {seed}: {error}")));
    }
    assert!(sum.refused > 4 * sum.truncated, "too few witnesses: {sum:?}");
    println!("{sum:?}");
}

#[test]
fn every_planted_mistake_is_caught() {
    let bugs = [
        (Bug::In(planted::Bug::NoChainCheck), false),
        (Bug::In(planted::Bug::NoBodyCrc), false),
        (Bug::In(planted::Bug::ZeroIsEnd), true),
        (Bug::In(planted::Bug::NoWatermark), true),
        (Bug::In(planted::Bug::ScanOneSegment), true),
        (Bug::AckBeforeWrite, false),
        (Bug::AckBeforeSync, false),
        (Bug::SyncCoversLater, false),
        (Bug::WatermarkAhead, false),
        (Bug::FreeEarly, false),
        (Bug::WrittenOutOfOrder, false),
    ];
    for (bug, damage) in bugs {
        let caught = (0..2_000).find_map(|seed| run(seed, Some(bug), damage).err().map(|error| (seed, error)));
        let (seed, error) = caught.unwrap_or_else(|| panic!("{bug:?} was not noticed"));
        println!("{bug:?}: seed {seed}: {error}");
    }
}
