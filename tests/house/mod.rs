//! A broker without a runtime: real shards, the real log and recovery, over slots in memory.
//!
//! Owns: what the driver, the disk and the keeper do, one step at a time; whoever holds it says what happens and when.
//! Never: draws a random number or reads a clock. `scenarios` tells it stories; dice are thrown by `chaos sim`,
//! whose machine has the disk's faults too.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};

use blipmq::access::{KeyDigest, KeyEntry, KeyRing};
use blipmq::limits::BLOCK;
use blipmq::metrics::CoreMetrics;
use blipmq::protocol::reply::Reply;
use blipmq::protocol::request::{Request, RequestKind};
use blipmq::shard::catalog::Catalog;
use blipmq::shard::effects::{BacklogRead, CloseReason, Effects, ForKeeper, Snapshot};
use blipmq::shard::event::{Event, FromKeeper};
use blipmq::shard::message::CoreBatch;
use blipmq::shard::settings::{BacklogOverflow, Overflow, Settings};
use blipmq::shard::{Parts, Shard, snapshot};
use blipmq::time::{Duration, Instant, Now, WallMs};
use blipmq::types::{ClientSubIds, ConnId, CoreId, Lsn, Slot, StreamId, VShard};
use blipmq::wal::batch::{GRANTS_IN_HAND, Grant, Log, LogConfig, Write};
use blipmq::wal::checkpoint::{self, Checkpoint, SealedEnd, StreamState, VShardState};
use blipmq::wal::commit::{Commit, FsyncPolicy};
use blipmq::wal::format::{Segment, StoreId};
use blipmq::wal::record::SealedStream;
use blipmq::wal::recovery::{self, Mode, ReadError, StoreShape};
use blipmq::wal::segments::{CoreReport, Live, Policy, Segments};
use bytes::Bytes;

pub const KEY: &[u8] = b"key";
const SEGMENT_SIZE: u32 = 16 * BLOCK as u32;
const VSHARDS: u16 = 8;
/// What a write that was not yet safe may leave behind, in pieces of this size.
const SECTOR: usize = 512;

/// What somebody outside hears.
#[derive(Debug)]
pub enum Said {
    Reply(ConnId, Reply),
    Closed(ConnId, CloseReason),
    Paused(ConnId),
    Resumed(ConnId),
}

/// How a run ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The process dies: what was written stays.
    Killed,
    /// What was not synced is anyone's guess.
    PowerLoss,
}

/// What may differ from run to run.
#[derive(Clone)]
pub struct Plan {
    pub cores: u16,
    pub policy: FsyncPolicy,
    /// A write is a sync, too.
    pub dsync: bool,
    pub slots_max: Option<usize>,
    /// `core` and `cores` are filled in.
    pub settings: Settings,
}

impl Plan {
    pub fn new() -> Plan {
        let settings = Settings {
            core: CoreId(0),
            cores: 1,
            vshards: VSHARDS,
            dead_letter_suffix: Bytes::from_static(b".dlq"),
            dead_letter: true,
            dead_letter_ttl: Duration::ZERO,
            v1_ttl: Duration::from_secs(60),
            ttl: Duration::ZERO,
            max_retries: 3,
            retry_backoff: Duration::from_secs(1),
            ack_timeout: Duration::from_secs(30),
            orphan_ttl: Duration::from_secs(300),
            durable_idle_ttl: Duration::ZERO,
            poll_park: Duration::from_secs(5),
            dedup_window: Duration::from_secs(120),
            qos0_messages: 1000,
            qos0_bytes: 1 << 20,
            qos0_overflow: Overflow::DropOldest,
            backlog_messages: 0,
            backlog_bytes: 0,
            backlog_overflow: BacklogOverflow::Reject,
            auth_deadline: Duration::from_secs(5),
            keepalive: Duration::ZERO,
            cache_bytes: 1 << 20,
            entries_max: 100_000,
            unauthenticated_max: 1000,
            unauthenticated_per_address_max: 1000,
            frame_timeout: Duration::from_secs(30),
            connection_bytes: 1 << 20,
            idle_marker: true,
            ports: Vec::new(),
        };
        Plan { cores: 1, policy: FsyncPolicy::Always, dsync: false, slots_max: None, settings }
    }
}

/// One core: its shard, and what is under way around it.
pub struct Core {
    pub shard: Shard,
    effects: Effects,
    pub write: Option<Write>,
    pub sync: Option<Lsn>,
    /// Written, and not covered by a sync that has ended.
    unsynced: Vec<Write>,
    /// How far the log is written, and how far it is synced.
    pub written: Lsn,
    pub synced: Lsn,
    begun: Vec<Segment>,
    /// What the other cores have sent, by sender.
    pub rings: Vec<VecDeque<CoreBatch>>,
    pub reads: VecDeque<BacklogRead>,
    /// Its answer to the checkpoint under way.
    snapshot: Option<Snapshot>,
    next_conn: u64,
}

pub struct House {
    pub now: Now,
    pub plan: Plan,
    pub cores: Vec<Core>,
    pub said: Vec<Said>,
    /// Slots as reads find them, and as they are if the power goes now.
    seen: Vec<Vec<u8>>,
    platter: Vec<Vec<u8>>,
    files: [Vec<u8>; 2],
    keeper: Segments,
    pub wanted: VecDeque<CoreId>,
    no_space: bool,
    sealed: Vec<SealedStream>,
    incarnation: u64,
    checkpoint: u64,
    checkpointing: bool,
    salt: u64,
}

struct Slots<'a>(&'a [Vec<u8>]);

impl recovery::Segments for Slots<'_> {
    fn slots(&self) -> Vec<Slot> {
        (0..self.0.len() as u32).map(Slot).collect()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        Ok(Bytes::copy_from_slice(&self.0[slot.0 as usize][offset as usize..(offset + len) as usize]))
    }
}

impl House {
    pub fn new(plan: Plan) -> House {
        let mut house = House {
            now: Now { mono: Instant(0), wall: WallMs(1_000_000) },
            plan,
            cores: Vec::new(),
            said: Vec::new(),
            seen: Vec::new(),
            platter: Vec::new(),
            files: [Vec::new(), Vec::new()],
            keeper: Segments::new(policy(None), 0, 1),
            wanted: VecDeque::new(),
            no_space: false,
            sealed: Vec::new(),
            incarnation: 0,
            checkpoint: 0,
            checkpointing: false,
            salt: 0,
        };
        house.start();
        house
    }

    // ---- a run begins and ends ----------------------------------------------------------------------------------

    /// Recovers what the slots hold, as `driver::boot` does, and opens the shards.
    fn start(&mut self) {
        let store = StoreId { uuid: [7; 16], node: 1 };
        let shape = StoreShape { store, segment_size: SEGMENT_SIZE, vshards: VSHARDS };
        let window = self.plan.settings.dedup_window;
        let file = |n: usize| (!self.files[n].is_empty()).then_some(&self.files[n][..]);
        let chosen = checkpoint::choose(file(0), file(1)).expect("checkpoints are written whole here");
        let mut catalogs: Vec<Catalog> = (0..VSHARDS).map(|_| Catalog::default()).collect();
        let mut covered = [0; VSHARDS as usize];
        for (number, vshard) in chosen.checkpoint.iter().flat_map(|c| c.vshards.iter().enumerate()) {
            let id = VShard(number as u16);
            snapshot::decode(&mut catalogs[number], id, &vshard.state, window).expect("what a shard wrote");
            covered[number] = vshard.last_index;
        }
        let recovered =
            recovery::recover(&shape, &Slots(&self.seen), chosen.checkpoint.as_ref(), Mode::Strict, &mut |entry| {
                let number = usize::from(entry.vshard.0);
                let in_checkpoint = entry.index.is_some_and(|index| index <= covered[number]);
                catalogs[number].replay(entry.vshard, &entry.record, entry.at, in_checkpoint, window);
            })
            .expect("a crash is no damage");

        let cores = self.plan.cores;
        self.incarnation = recovered.incarnation_max + 1;
        self.sealed = recovered.sealed.clone();
        self.keeper = Segments::new(policy(self.plan.slots_max), self.incarnation, cores);
        let held: Vec<_> = chosen.held.iter().filter(|s| recovered.free.contains(&s.slot)).collect();
        recovered.live.iter().chain(held.iter().copied()).for_each(|segment| self.keeper.add_recovered(*segment));
        recovered.free.iter().filter(|f| held.iter().all(|h| h.slot != **f)).for_each(|f| self.keeper.add_free(*f));
        (self.no_space, self.checkpointing) = (false, false);
        self.wanted.clear();

        let mut by_core: Vec<Catalog> = (0..cores).map(|_| Catalog::default()).collect();
        for (number, mut catalog) in catalogs.into_iter().enumerate() {
            catalog.replayed();
            by_core[usize::from(VShard(number as u16).core(cores).0)].absorb(catalog);
        }
        let sub_ids = ClientSubIds::default();
        for (catalog, number) in by_core.into_iter().zip(0..) {
            let core = CoreId(number);
            let config = LogConfig {
                store,
                stream: StreamId { incarnation: self.incarnation, core: number },
                segment_size: SEGMENT_SIZE,
                last_index: recovered.last_index.clone(),
                opening: Some(recovered.note()),
            };
            let mut log = Log::new(config, self.grant(core, true).expect("there is always one"));
            for _ in 0..GRANTS_IN_HAND {
                if let Some(grant) = self.grant(core, false) {
                    log.grant(grant);
                }
            }
            let entry =
                |key: &[u8]| KeyEntry::unrestricted(KeyDigest::of(key), String::from_utf8_lossy(key).into_owned());
            let parts = Parts {
                settings: Settings { core, cores, ..self.plan.settings.clone() },
                keys: KeyRing::new(vec![entry(KEY), entry(b"other")]),
                sub_ids: sub_ids.clone(),
                catalog,
                log,
                commit: Commit::new(self.plan.policy, Lsn(BLOCK as u64)),
            };
            let mut effects = Effects::new(cores);
            let shard = Shard::new(parts, self.now, &mut effects);
            let rings = (0..cores).map(|_| VecDeque::new()).collect();
            self.cores.push(Core {
                shard,
                effects,
                write: None,
                sync: None,
                unsynced: Vec::new(),
                written: Lsn(0),
                synced: Lsn(0),
                begun: Vec::new(),
                rings,
                reads: VecDeque::new(),
                snapshot: None,
                next_conn: 0,
            });
        }
        for core in 0..self.cores.len() {
            self.perform(core);
            // How the streams before ended is on the disk before anything else is done.
            self.cores[core].shard.force_sync();
            self.begin_write(core);
            self.end_write(core);
            self.begin_sync(core);
            self.end_sync(core);
        }
    }

    /// Ends this run at once and begins the next one on `cores`.
    ///
    /// - `dice`: a number below its argument; decides what becomes of writes that were not safe yet.
    pub fn crash(&mut self, how: Crash, cores: u16, dice: &mut dyn FnMut(u64) -> u64) {
        let mut survivors = match how {
            Crash::Killed => self.seen.clone(),
            Crash::PowerLoss => self.platter.clone(),
        };
        for core in std::mem::take(&mut self.cores) {
            let loose = if how == Crash::PowerLoss { core.unsynced } else { Vec::new() };
            for write in loose.into_iter().chain(core.write) {
                let fate = dice(3);
                for (nth, sector) in write.bytes.chunks(SECTOR).enumerate() {
                    if fate == 0 || fate == 1 && dice(2) == 0 {
                        continue;
                    }
                    let at = write.offset as usize + nth * SECTOR;
                    survivors[write.slot.0 as usize][at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        self.seen = survivors.clone();
        self.platter = survivors;
        self.said.clear();
        self.plan.cores = cores;
        self.start();
    }

    // ---- clients ------------------------------------------------------------------------------------------------

    pub fn open(&mut self, core: usize) -> ConnId {
        self.open_from(core, IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    pub fn open_from(&mut self, core: usize, peer: IpAddr) -> ConnId {
        let serial = self.cores[core].next_conn;
        self.cores[core].next_conn += 1;
        let conn = ConnId::new(CoreId(core as u16), serial);
        self.event(core, Event::Opened { conn, peer });
        conn
    }

    pub fn request(&mut self, conn: ConnId, cid: u64, kind: RequestKind) {
        self.event(usize::from(conn.core().0), Event::Request { conn, request: Request { cid, kind } });
    }

    /// Everything said to the client has reached it.
    pub fn drained(&mut self, conn: ConnId) {
        self.event(usize::from(conn.core().0), Event::Sent { conn, left: 0 });
    }

    /// One turn with one event.
    pub fn event(&mut self, core: usize, event: Event) {
        self.turn(core, [event]);
    }

    pub fn turn(&mut self, core: usize, events: impl IntoIterator<Item = Event>) {
        let Core { shard, effects, .. } = &mut self.cores[core];
        for event in events {
            shard.on_event(self.now, event, effects);
        }
        shard.settle(self.now, effects);
        shard.invariants();
        self.perform(core);
    }

    pub fn tick(&mut self, core: usize) {
        self.event(core, Event::Tick);
    }

    pub fn pass(&mut self, to: usize, from: usize) -> bool {
        let Some(batch) = self.cores[to].rings[from].pop_front() else { return false };
        self.event(to, Event::Remote { from: CoreId(from as u16), batch });
        true
    }

    fn perform(&mut self, number: usize) {
        let core = &mut self.cores[number];
        let effects = &mut core.effects;
        assert_eq!(effects.corrupt, None);
        effects.auth_decided.clear();
        self.said.extend(effects.replies.drain(..).map(|(conn, _, reply)| Said::Reply(conn, reply)));
        self.said.extend(effects.pause_reading.drain(..).map(Said::Paused));
        self.said.extend(effects.resume_reading.drain(..).map(Said::Resumed));
        let closing: Vec<_> = effects.close.drain(..).collect();
        core.reads.extend(effects.reads.drain(..));
        let batches: Vec<CoreBatch> = effects.to_core.iter_mut().map(std::mem::take).collect();
        let messages: Vec<ForKeeper> = effects.to_keeper.drain(..).collect();
        for (to, batch) in batches.into_iter().enumerate().filter(|(_, batch)| !batch.is_empty()) {
            self.cores[to].rings[number].push_back(batch);
        }
        for message in messages {
            self.tell_keeper(number, message);
        }
        for (conn, reason) in closing {
            self.said.push(Said::Closed(conn, reason));
            self.event(number, Event::Closed { conn });
        }
    }

    // ---- the disk -----------------------------------------------------------------------------------------------

    /// Takes the next batch of the log, if none is under way.
    pub fn begin_write(&mut self, core: usize) -> bool {
        let core = &mut self.cores[core];
        if core.write.is_some() {
            return false;
        }
        core.write = core.shard.next_write(self.now);
        core.begun.extend(core.write.as_ref().filter(|write| write.new_segment).map(|write| write.segment));
        core.write.is_some()
    }

    pub fn end_write(&mut self, number: usize) -> Option<Write> {
        let write = self.cores[number].write.take()?;
        lay_down(&mut self.seen, &write);
        let core = &mut self.cores[number];
        core.written = write.end;
        if self.plan.dsync {
            core.synced = write.end;
            lay_down(&mut self.platter, &write);
        } else {
            core.unsynced.push(write.clone());
        }
        self.event(number, Event::LogWritten { end: write.end, records: write.records, synced: self.plan.dsync });
        Some(write)
    }

    pub fn begin_sync(&mut self, core: usize) -> bool {
        let dsync = self.plan.dsync;
        let core = &mut self.cores[core];
        if core.sync.is_some() || dsync {
            return false;
        }
        core.sync = core.shard.begin_sync(self.now.mono);
        core.sync.is_some()
    }

    pub fn end_sync(&mut self, number: usize) -> bool {
        let core = &mut self.cores[number];
        let Some(upto) = core.sync.take() else { return false };
        core.synced = upto;
        let (safe, loose) = std::mem::take(&mut core.unsynced).into_iter().partition(|write| write.end <= upto);
        core.unsynced = loose;
        let safe: Vec<Write> = safe;
        safe.iter().for_each(|write| lay_down(&mut self.platter, write));
        self.event(number, Event::LogSynced { upto });
        true
    }

    pub fn read_back(&mut self, core: usize) -> bool {
        let Some(BacklogRead { slot, offset, len }) = self.cores[core].reads.pop_front() else { return false };
        let bytes = Bytes::copy_from_slice(&self.seen[slot.0 as usize][offset as usize..(offset + len) as usize]);
        self.event(core, Event::BacklogRead { slot, offset, bytes });
        true
    }

    // ---- the keeper ---------------------------------------------------------------------------------------------

    /// - `must`: a run cannot begin without, whatever the quota says.
    fn grant(&mut self, core: CoreId, must: bool) -> Option<Grant> {
        if self.keeper.free() == 0 {
            let next = Slot(self.seen.len() as u32);
            let slot = if must { next } else { self.keeper.slot_to_make()? };
            self.keeper.add_free(slot);
            self.seen.push(vec![0; SEGMENT_SIZE as usize]);
            self.platter.push(vec![0; SEGMENT_SIZE as usize]);
        }
        self.salt += 1;
        let slot = self.keeper.grant(core, self.salt)?;
        Some(Grant { slot, salt: self.salt, created: self.now.wall })
    }

    /// The operator makes room for some segments.
    pub fn more_slots(&mut self) {
        for _ in 0..4 {
            self.keeper.add_free(Slot(self.seen.len() as u32));
            self.seen.push(vec![0; SEGMENT_SIZE as usize]);
            self.platter.push(vec![0; SEGMENT_SIZE as usize]);
        }
    }

    /// Hands out the segments that are wanted, as far as there are some.
    pub fn serve(&mut self) -> bool {
        while let Some(core) = self.wanted.front().copied() {
            let Some(grant) = self.grant(core, false) else {
                if !std::mem::replace(&mut self.no_space, true) {
                    self.tell_all(|| FromKeeper::NoSpace { reason: "the disk quota is used up".to_owned() });
                }
                return false;
            };
            self.wanted.pop_front();
            self.event(usize::from(core.0), Event::Keeper(FromKeeper::Grant(grant)));
        }
        if std::mem::replace(&mut self.no_space, false) {
            self.tell_all(|| FromKeeper::SpaceBack);
        }
        true
    }

    pub fn tell_all(&mut self, message: impl Fn() -> FromKeeper) {
        for core in 0..self.cores.len() {
            self.event(core, Event::Keeper(message()));
        }
    }

    fn tell_keeper(&mut self, core: usize, message: ForKeeper) {
        let id = CoreId(core as u16);
        match message {
            ForKeeper::WantGrant { count } => self.wanted.extend(std::iter::repeat_n(id, count)),
            ForKeeper::Relocated { slot } => self.keeper.relocated(id, slot),
            ForKeeper::Snapshot(snapshot) => {
                self.cores[core].snapshot = Some(snapshot);
                if self.cores.iter().all(|core| core.snapshot.is_some()) {
                    self.write_checkpoint();
                }
            }
            ForKeeper::Unchanged => unreachable!("always asked with force"),
        }
    }

    /// Asks every core for its part of a checkpoint, unless one is under way.
    pub fn begin_checkpoint(&mut self) -> bool {
        if std::mem::replace(&mut self.checkpointing, true) {
            return false;
        }
        self.tell_all(|| FromKeeper::TakeSnapshot { force: true });
        true
    }

    fn write_checkpoint(&mut self) {
        self.checkpointing = false;
        let mut streams = Vec::new();
        let mut vshards = vec![VShardState::default(); usize::from(VSHARDS)];
        for (core, number) in self.cores.iter_mut().zip(0..) {
            let Snapshot { covered, durable, vshards: states, live } = core.snapshot.take().expect("all have answered");
            assert!(covered <= durable, "a snapshot left before it was durable");
            assert!(durable <= core.synced, "a snapshot left before it was durable");
            let stream = StreamId { incarnation: self.incarnation, core: number };
            streams.push(StreamState { stream, covered, durable, sealed: None });
            for (vshard, last_index, state) in states {
                vshards[usize::from(vshard.0)] = VShardState { last_index, state };
            }
            let live = live.into_iter().map(|(slot, records, bytes)| (slot, Live { records, bytes })).collect();
            self.keeper.report(CoreReport { core: CoreId(number), covered, live, begun: core.begun.clone() });
        }
        let live = self.keeper.to_list();
        self.sealed.retain(|sealed| live.iter().any(|segment| segment.stream == sealed.stream));
        streams.extend(self.sealed.iter().map(|sealed| StreamState {
            stream: sealed.stream,
            covered: sealed.end,
            durable: sealed.end,
            sealed: Some(SealedEnd { end: sealed.end, chain: sealed.chain }),
        }));
        self.checkpoint += 1;
        let checkpoint = Checkpoint {
            store: StoreId { uuid: [7; 16], node: 1 },
            segment_size: SEGMENT_SIZE,
            number: self.checkpoint,
            incarnation: self.incarnation,
            time: self.now.wall,
            streams,
            live,
            vshards,
        };
        self.files[self.checkpoint as usize % 2] = checkpoint.encode();
        self.keeper.checkpoint_written(&checkpoint.live);
        for (slot, cores) in self.keeper.relocations(self.no_space) {
            for core in cores {
                self.event(usize::from(core.0), Event::Keeper(FromKeeper::Relocate { slot }));
            }
        }
    }

    // ---- the whole ----------------------------------------------------------------------------------------------

    /// Does what is under way, until nothing is: rings, reads, segments, and the log if it may go on.
    pub fn quiesce(&mut self, log: bool) {
        let mut busy = true;
        while std::mem::take(&mut busy) {
            for to in 0..self.cores.len() {
                for from in 0..self.cores.len() {
                    while self.pass(to, from) {
                        busy = true;
                    }
                }
                busy |= self.read_back(to);
                if log {
                    busy |= self.begin_write(to);
                    busy |= self.end_write(to).is_some();
                    busy |= self.begin_sync(to);
                    busy |= self.end_sync(to);
                }
            }
            self.serve();
        }
    }

    /// The counters of all cores together.
    pub fn metrics(&mut self) -> CoreMetrics {
        let mut all = CoreMetrics::default();
        self.cores.iter_mut().for_each(|core| all.merge(&core.shard.read_metrics()));
        all
    }

    pub fn advance(&mut self, by: Duration) {
        self.now.mono = self.now.mono + by;
        self.now.wall = WallMs(self.now.wall.0 + by.as_millis());
    }
}

fn lay_down(slots: &mut [Vec<u8>], write: &Write) {
    let at = write.offset as usize;
    slots[write.slot.0 as usize][at..at + write.bytes.len()].copy_from_slice(&write.bytes);
}

fn policy(slots_max: Option<usize>) -> Policy {
    Policy { segment_size: SEGMENT_SIZE, slots_max }
}
