//! The broker as a process on a computer that fails: the real shards, log, recovery and protocol, and around them in virtual time
//! what the driver, the keeper, the kernel and the disk do.
//!
//! Owns: what is under way inside, and when it happens. Never: knows what clients want; whoever holds it moves time and bytes.
//!
//! A core is a queue of events and one write and one sync under way, as in `driver`. Everything that takes time ends as a happening;
//! `run_one` runs the next one that is due.

/// Recovery, and the first moments of a run.
mod boot;
/// One connection.
mod conn;
/// Slots and checkpoints.
mod keeper;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use blipmq::access::{KeyDigest, KeyEntry, KeyRing};
use blipmq::limits::{BLOCK, RING_SLOTS};
use blipmq::metrics::{CoreMetrics, Ledger};
use blipmq::protocol::reply::Reply;
use blipmq::shard::Shard;
use blipmq::shard::effects::{BacklogRead, CloseReason, Effects, ForKeeper};
use blipmq::shard::event::{Event, FromKeeper};
use blipmq::shard::message::CoreBatch;
use blipmq::shard::settings::{BacklogOverflow, Overflow, Settings};
use blipmq::time::{Duration, Instant, Now, WallMs};
use blipmq::types::{ConnId, CoreId, Lsn};
use blipmq::wal::batch::Write;
use blipmq::wal::commit::FsyncPolicy;
use blipmq::wal::format::{Segment, StoreId};
use bytes::Bytes;

use crate::message::MessageId;
use crate::rng::Rng;
pub use crate::sim::disk::{FaultCounts, Faults};
use crate::sim::disk::{FileId, InFlight, SimDisk, happens};
use conn::Conn;
use keeper::{CoreSnapshot, Keeper, ToKeeper};

const STORE: StoreId = StoreId { uuid: [7; 16], node: 0 };
/// From a wish to be woken to the beat that does it, at most: an idle core gets one every 20 ms.
const BEAT_US: u64 = 20_000;
/// A core without deadlines is woken this often. (The driver does so every 20 ms; nothing depends on it.)
const IDLE_TICK: Duration = Duration::from_millis(500);
/// Before a read of a freed slot is reported as done.
const RETRY_READ: Duration = Duration::from_millis(100);

/// What may differ from life to life.
#[derive(Clone, Debug)]
pub struct Plan {
    pub policy: FsyncPolicy,
    /// A write is a sync, too. Only with `Always`, as in the driver.
    pub dsync: bool,
    pub segment_size: u32,
    pub vshards: u16,
    /// The quota; at least 3 per core and one.
    pub slots_max: Option<usize>,
    /// Free slots kept per core.
    pub spare: usize,
    pub checkpoint_interval: Duration,
    /// How long a stop waits for acknowledgements.
    pub drain: Duration,
    /// `core`, `cores` and `vshards` are filled in.
    pub settings: Settings,
    /// API keys that may log in, without restrictions.
    pub keys: Vec<Vec<u8>>,
    pub faults: Faults,
    /// A mistake in what is simulated of the broker, to see that it is noticed.
    pub mistake: Option<HostMistake>,
}

/// Mistakes in the driver and in the keeper's way with files: that code does not run here, so `planted!` does not reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostMistake {
    /// Recovery reads slots that a dead process still writes.
    SkipSlotLock,
    /// Recovery reads what is not synced.
    SkipRecoverySync,
    /// A write counts as written when it is submitted.
    WrittenWhenSubmitted,
    /// A sync returns without having done anything.
    SyncNothing,
    /// A sync leaves out all slots but the newest.
    SyncNewestSlotOnly,
    /// A sync claims to cover what was written when it ended, not when it began.
    SyncCoversLater,
    /// A failed write or sync is taken for a good one.
    IgnoreErrors,
    /// A checkpoint counts before it is synced.
    CheckpointUnsynced,
    /// Every checkpoint goes over the one before.
    CheckpointInPlace,
}

impl HostMistake {
    pub const ALL: [HostMistake; 9] = [
        HostMistake::SkipSlotLock,
        HostMistake::SkipRecoverySync,
        HostMistake::WrittenWhenSubmitted,
        HostMistake::SyncNothing,
        HostMistake::SyncNewestSlotOnly,
        HostMistake::SyncCoversLater,
        HostMistake::IgnoreErrors,
        HostMistake::CheckpointUnsynced,
        HostMistake::CheckpointInPlace,
    ];
}

impl Plan {
    /// A sound computer, and the broker's defaults in small.
    pub fn new() -> Plan {
        let settings = Settings {
            core: CoreId(0),
            cores: 1,
            vshards: 8,
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
        Plan {
            policy: FsyncPolicy::Always,
            dsync: false,
            segment_size: 64 * 1024,
            vshards: 8,
            slots_max: None,
            spare: 2,
            checkpoint_interval: Duration::from_secs(2),
            drain: Duration::from_secs(1),
            settings,
            keys: (0..16).map(|n| format!("key-{n}").into_bytes()).collect(),
            faults: Faults::default(),
            mistake: None,
        }
    }
}

impl Default for Plan {
    fn default() -> Plan {
        Plan::new()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The process dies: what was written stays.
    Killed,
    /// What was not synced is anyone's guess.
    PowerLoss,
}

/// A start that was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Exit 65.
    Corrupt(String),
    /// Exit 65 or 74: the disk gives an error. Another try may do.
    Unreadable(String),
    /// Exit 74 or 78. Another try may do, unless the quota is too small.
    NoSpace(String),
}

/// The process ended by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Death {
    /// Exit 74.
    Io(String),
    /// Exit 65.
    Corrupt(String),
}

/// Where a message is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Held {
    /// In memory at most.
    No,
    /// In a completed write.
    Written,
    /// In a completed write that a completed sync covers, or found by recovery (which syncs first).
    Synced,
}

/// What the disk has done to what it held, and `repair` has undone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    /// Sectors that were not what was written to them.
    pub sectors: usize,
    /// Messages in frames with such sectors.
    pub messages: Vec<MessageId>,
}

/// What the last start has found, and lost.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StartReport {
    pub incarnation: u64,
    /// Of torn tails that were cut off.
    pub truncated_frames: u64,
    pub truncated_records: u64,
    /// Checkpoint files that were not whole.
    pub fallbacks: u32,
    /// Damage without a witness was taken for a torn tail, as it may be (DURABILITY 1.3): records, and messages among them.
    pub lost_unwitnessed: u64,
    pub lost_messages: Vec<MessageId>,
}

/// Said to a client in a happening, before it is on its way.
#[derive(Debug)]
pub struct Said {
    pub conn: ConnId,
    pub reply: Reply,
}

/// Something that ends at a certain time. The numbers are cores.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Happening {
    Turn {
        core: usize,
        at: Instant,
    },
    Tick {
        core: usize,
        at: Instant,
    },
    Written {
        core: usize,
    },
    /// One file is synced.
    Synced {
        core: usize,
    },
    /// A batch arrives from another core.
    Ring {
        to: usize,
        from: usize,
    },
    Read {
        core: usize,
        serial: u64,
    },
    /// Of a slot that was gone.
    ReadAgain {
        core: usize,
        serial: u64,
    },
    /// A message of the keeper arrives.
    Hear {
        core: usize,
    },
    KeeperTurn {
        at: Instant,
    },
    KeeperJob,
    Rot,
    /// Only with `SkipSlotLock`.
    LateWrites,
    DrainOver,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Opening,
    Ready,
    /// The last frame is being written.
    Finishing,
    Finished,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stopping {
    No,
    /// As soon as every core is ready.
    Wanted,
    Draining {
        until: Instant,
    },
    Keeper,
    Finishing,
}

struct LogWrite {
    write: Write,
    ids: Vec<MessageId>,
}

struct LogSync {
    upto: Lsn,
    /// Slots to sync, one after the other; the first one is under way and covers what had landed before `began`.
    slots: VecDeque<u32>,
    began: u64,
}

struct Core {
    id: CoreId,
    shard: Shard,
    effects: Effects,
    phase: Phase,
    drained: bool,
    inbox: VecDeque<Event>,
    arrived: VecDeque<(CoreId, CoreBatch)>,
    ticked: bool,
    turn_at: Option<Instant>,
    tick_at: Option<Instant>,
    write: Option<LogWrite>,
    sync: Option<LogSync>,
    /// Written since the last sync, in order.
    dirty: Vec<u32>,
    begun: Vec<Segment>,
    /// What the shard has been told.
    written: Lsn,
    synced: Lsn,
    /// Completed writes that no sync covers: end, messages, when.
    unsynced: VecDeque<(Lsn, Vec<MessageId>, Instant)>,
    /// By sender.
    rings: Vec<VecDeque<CoreBatch>>,
    reads: BTreeMap<u64, BacklogRead>,
    from_keeper: VecDeque<FromKeeper>,
    next_conn: u64,
}

impl Core {
    fn new(id: CoreId, shard: Shard, effects: Effects, rings: Vec<VecDeque<CoreBatch>>) -> Core {
        Core {
            id,
            shard,
            effects,
            phase: Phase::Opening,
            drained: false,
            inbox: VecDeque::new(),
            arrived: VecDeque::new(),
            ticked: false,
            turn_at: None,
            tick_at: None,
            write: None,
            sync: None,
            dirty: Vec::new(),
            begun: Vec::new(),
            written: Lsn(BLOCK as u64),
            synced: Lsn(BLOCK as u64),
            unsynced: VecDeque::new(),
            rings,
            reads: BTreeMap::new(),
            from_keeper: VecDeque::new(),
            next_conn: 0,
        }
    }
}

pub struct Machine {
    plan: Plan,
    rng: Rng,
    disk: SimDisk,
    keys: KeyRing,
    /// Empty: the process is not running.
    cores: Vec<Core>,
    conns: BTreeMap<ConnId, Conn>,
    keeper: Option<Keeper>,
    happenings: BTreeMap<(Instant, u64), Happening>,
    /// When the process began to run, and what broker time was then.
    clock: Option<(Instant, WallMs)>,
    /// The computer's, when last heard of.
    wall: WallMs,
    ring_slots: usize,
    slow_until: Instant,
    full_until: Instant,
    stopping: Stopping,
    /// To end at the end of this happening.
    ending: Option<Death>,
    death: Option<Death>,
    closed: Vec<(ConnId, CloseReason)>,
    said: Vec<Said>,
    serial: u64,
    levels: BTreeMap<MessageId, Held>,
    /// Recovery will say where these are.
    doubtful: BTreeSet<MessageId>,
    report: StartReport,
    lost_records: u64,
    /// What no disk may do to a broker.
    broken: RefCell<Option<String>>,
}

impl Machine {
    /// An empty store; the process is not running.
    pub fn new(plan: Plan, seed: u64) -> Machine {
        assert!(!plan.dsync || plan.policy == FsyncPolicy::Always, "the driver uses O_DSYNC only with `always`");
        let mut rng = Rng::derive(seed, &[0x6d61_6368]);
        let entry =
            |key: &Vec<u8>| KeyEntry::unrestricted(KeyDigest::of(key), String::from_utf8_lossy(key).into_owned());
        let keys = KeyRing::new(plan.keys.iter().map(entry).collect());
        let ring_slots = *rng.pick(&[1, 2, 4, RING_SLOTS]);
        Machine {
            plan,
            disk: SimDisk::new(seed),
            rng,
            keys,
            cores: Vec::new(),
            conns: BTreeMap::new(),
            keeper: None,
            happenings: BTreeMap::new(),
            clock: None,
            wall: WallMs(0),
            ring_slots,
            slow_until: Instant(0),
            full_until: Instant(0),
            stopping: Stopping::No,
            ending: None,
            death: None,
            closed: Vec::new(),
            said: Vec::new(),
            serial: 0,
            levels: BTreeMap::new(),
            doubtful: BTreeSet::new(),
            report: StartReport::default(),
            lost_records: 0,
            broken: RefCell::new(None),
        }
    }

    // ---- from outside -------------------------------------------------------------------------------------------

    pub fn is_up(&self) -> bool {
        !self.cores.is_empty()
    }

    /// The opening notes are durable: clients may connect.
    pub fn is_ready(&self) -> bool {
        self.is_up() && self.stopping == Stopping::No && self.cores.iter().all(|core| core.phase == Phase::Ready)
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping != Stopping::No
    }

    pub fn cores(&self) -> u16 {
        self.cores.len() as u16
    }

    /// What the last start has found.
    pub fn report(&self) -> &StartReport {
        &self.report
    }

    /// The broker's own clock when the computer's says `now`; `now` itself while it is off.
    pub fn clock(&self, now: Now) -> Now {
        self.clock.map_or(now, |(start, anchor)| {
            let elapsed = now.mono - start;
            Now { mono: Instant(elapsed.0), wall: WallMs(anchor.0 + elapsed.as_millis()) }
        })
    }

    /// Said by the happenings since last asked, in order: to look at `held` in the very moment something is confirmed or delivered.
    pub fn said(&mut self) -> Vec<Said> {
        std::mem::take(&mut self.said)
    }

    /// The process has ended by itself since last asked. The machine is off.
    pub fn death(&mut self) -> Option<Death> {
        self.death.take()
    }

    /// Also when it is off: the power can go then, too.
    pub fn crash(&mut self, now: Now, how: Crash) {
        self.wall = now.wall;
        let in_flight = self.switch_off();
        match how {
            Crash::Killed => self.disk.kill(in_flight, self.plan.faults.late),
            Crash::PowerLoss => self.disk.power_cut(in_flight),
        }
    }

    /// SIGTERM. `is_up` turns false when it is done; happenings bring it about.
    pub fn stop(&mut self, now: Now) {
        if self.is_up() && self.stopping == Stopping::No {
            self.stopping = Stopping::Wanted;
            self.stop_on(now);
        }
    }

    /// No more faults. Damage stays until `repair`.
    pub fn heal(&mut self) {
        self.plan.faults = Faults::default();
        (self.slow_until, self.full_until) = (Instant(0), Instant(0));
    }

    /// Something on the disk is not what was written there: a start may be refused.
    pub fn is_damaged(&self) -> bool {
        self.disk.is_damaged()
    }

    pub fn held(&self, id: MessageId) -> Held {
        self.levels.get(&id).copied().unwrap_or(Held::No)
    }

    /// Messages in completed writes of this core that no sync covers yet, oldest first, and when their write completed: at a
    /// power cut these may be lost, if the policy lets them be confirmed.
    pub fn unsynced(&self, core: u16) -> Vec<(MessageId, Instant)> {
        let Some(core) = self.cores.get(usize::from(core)) else { return Vec::new() };
        core.unsynced.iter().flat_map(|(_, ids, at)| ids.iter().map(|id| (*id, *at))).collect()
    }

    /// How far this core's log is written, as its shard has been told.
    pub fn log_written(&self, core: u16) -> Lsn {
        self.cores[usize::from(core)].written
    }

    pub fn log_synced(&self, core: u16) -> Lsn {
        self.cores[usize::from(core)].synced
    }

    /// Nothing is on its way between cores.
    pub fn rings_empty(&self) -> bool {
        self.cores.iter().all(|core| {
            core.arrived.is_empty()
                && core.rings.iter().all(VecDeque::is_empty)
                && core.effects.to_core.iter().all(CoreBatch::is_empty)
        })
    }

    /// All that happened has been heard by whom it concerns, on every core.
    pub fn is_heard(&self) -> bool {
        self.cores.iter().all(|core| core.inbox.is_empty()) && self.rings_empty()
    }

    /// The counters of all cores together.
    pub fn metrics(&mut self) -> CoreMetrics {
        let mut all = CoreMetrics::default();
        self.cores.iter_mut().for_each(|core| all.merge(&core.shard.read_metrics()));
        all
    }

    /// Nothing is under way inside: rings, log, reads, requests, slots that are wanted. The clients' outboxes do not count.
    pub fn is_quiet(&self) -> bool {
        let core_quiet = |core: &Core| {
            core.inbox.is_empty()
                && !core.ticked
                && core.write.is_none()
                && core.sync.is_none()
                && core.reads.is_empty()
                && core.from_keeper.is_empty()
                && core.phase != Phase::Opening
        };
        self.cores.iter().all(core_quiet) && self.rings_empty() && self.keeper.as_ref().is_none_or(Keeper::is_idle)
    }

    /// What must hold: I7 (if quiet), I8 and I9 of the starts so far. The shards look after themselves in every turn.
    pub fn check(&mut self) -> Result<(), String> {
        if let Some(broken) = self.broken.take() {
            return Err(broken);
        }
        if self.is_quiet() {
            let ledger = Ledger::of(&self.metrics());
            if !ledger.balances() {
                return Err(format!("I7: the books do not balance: {ledger:?}"));
            }
        }
        Ok(())
    }

    pub fn faults(&self) -> &FaultCounts {
        &self.disk.counts
    }

    // ---- time ---------------------------------------------------------------------------------------------------

    /// The earliest time something inside can happen.
    pub fn next_due(&self) -> Option<Instant> {
        self.happenings.first_key_value().map(|((at, _), _)| *at)
    }

    fn schedule(&mut self, at: Instant, happening: Happening) {
        let tiebreak = self.rng.draw();
        self.happenings.insert((at, tiebreak), happening);
    }

    /// How long something takes on the disk, from so many microseconds to so many.
    fn latency(&mut self, now: Instant, from: u64, to: u64) -> Duration {
        if happens(&mut self.rng, self.plan.faults.slow) {
            self.disk.counts.slow += 1;
            self.slow_until = now + Duration(self.rng.between(1_000_000, 2_000_000_000));
        }
        let factor = if now < self.slow_until { 100 } else { 1 };
        Duration(self.rng.between(from, to) * 1_000 * factor)
    }

    /// How long a core or a thread takes to hear of something: microseconds, seldom a pause.
    fn moment(&mut self) -> Duration {
        Duration(match self.rng.between(0, 499) {
            0 => self.rng.between(1_000_000, 50_000_000),
            1..5 => self.rng.between(50_000, 1_000_000),
            _ => self.rng.between(0, 50_000),
        })
    }

    /// Runs the next happening, if it is due; of several at one time, any. `false`: there is none.
    pub fn run_one(&mut self, now: Now) -> bool {
        self.wall = now.wall;
        let Some(first) = self.happenings.first_entry().filter(|first| first.key().0 <= now.mono) else { return false };
        match first.remove() {
            Happening::Turn { core, at } if self.cores[core].turn_at == Some(at) => self.turn(now, core),
            Happening::Tick { core, at } if self.cores[core].tick_at == Some(at) => {
                let state = &mut self.cores[core];
                (state.tick_at, state.ticked) = (None, true);
                self.turn(now, core);
            }
            Happening::KeeperTurn { at } if self.keeper_wakes_at(at) => {
                self.keeper_turn(now);
                self.stop_on(now);
            }
            // Somebody was woken by something else before.
            Happening::Turn { .. } | Happening::Tick { .. } | Happening::KeeperTurn { .. } => {}
            Happening::Written { core } => self.end_write(now, core),
            Happening::Synced { core } => self.end_sync(now, core),
            Happening::Ring { to, from } => self.take_from_ring(now, to, from),
            Happening::Read { core, serial } => self.end_read(now, core, serial),
            Happening::ReadAgain { core, serial } => {
                if let Some(BacklogRead { slot, offset, .. }) = self.cores[core].reads.remove(&serial) {
                    self.push(now.mono, core, Event::BacklogRead { slot, offset, bytes: Bytes::new() });
                }
            }
            Happening::Hear { core } => {
                if let Some(message) = self.cores[core].from_keeper.pop_front() {
                    self.push(now.mono, core, Event::Keeper(message));
                }
            }
            Happening::KeeperJob => self.keeper_job(now),
            Happening::Rot => {
                if happens(&mut self.rng, self.plan.faults.rot) {
                    self.disk.rot();
                }
                self.schedule_rot(now.mono);
            }
            Happening::LateWrites => self.disk.land_late(),
            Happening::DrainOver => self.stop_on(now),
        }
        if let Some(death) = self.ending.take() {
            self.death = Some(death);
            let in_flight = self.switch_off();
            self.disk.kill(in_flight, self.plan.faults.late);
        }
        true
    }

    /// The process ends at the end of this happening.
    fn end(&mut self, death: Death) {
        self.ending.get_or_insert(death);
    }

    /// The process is gone. Returns what the disk had been given.
    fn switch_off(&mut self) -> Vec<InFlight> {
        let mut in_flight = Vec::new();
        for core in std::mem::take(&mut self.cores) {
            for (_, ids, _) in core.unsynced {
                self.doubtful.extend(ids);
            }
            if let Some(LogWrite { write, ids }) = core.write {
                self.doubtful.extend(ids);
                in_flight.push(in_flight_of(&write));
            }
        }
        in_flight.extend(self.keeper.take().and_then(|keeper| keeper.in_flight()));
        let levels = &self.levels;
        self.doubtful.retain(|id| levels.get(id) != Some(&Held::Synced));
        self.conns.clear();
        self.closed.clear();
        self.happenings.clear();
        self.clock = None;
        self.stopping = Stopping::No;
        self.ending = None;
        in_flight
    }

    // ---- one core -----------------------------------------------------------------------------------------------

    /// A thing that happened, for the next turn.
    fn push(&mut self, now: Instant, core: usize, event: Event) {
        self.cores[core].inbox.push_back(event);
        self.wake(now, core);
    }

    fn wake(&mut self, now: Instant, core: usize) {
        if self.cores[core].turn_at.is_none() && self.cores[core].phase != Phase::Finished {
            let at = now + self.moment();
            self.cores[core].turn_at = Some(at);
            self.schedule(at, Happening::Turn { core, at });
        }
    }

    /// One turn: some events, then all their effects.
    fn turn(&mut self, now: Now, number: usize) {
        let broker_now = self.clock(now);
        let core = &mut self.cores[number];
        core.turn_at = None;
        if core.phase == Phase::Finished {
            return;
        }
        let events = match self.rng.between(0, 9) {
            0..6 => 1,
            6..9 => self.rng.between(1, 8) as usize,
            _ => core.inbox.len(),
        };
        let mut effects = std::mem::take(&mut core.effects);
        for _ in 0..events {
            let Some(event) = core.inbox.pop_front() else { break };
            match &event {
                Event::LogWritten { end, synced, .. } => {
                    core.written = *end;
                    if *synced {
                        core.synced = *end;
                    }
                }
                Event::LogSynced { upto } => core.synced = *upto,
                _ => {}
            }
            core.shard.on_event(broker_now, event, &mut effects);
        }
        while let Some((from, batch)) = core.arrived.pop_front() {
            core.shard.on_event(broker_now, Event::Remote { from, batch }, &mut effects);
        }
        if std::mem::take(&mut core.ticked) {
            core.shard.on_event(broker_now, Event::Tick, &mut effects);
        }
        core.shard.settle(broker_now, &mut effects);
        core.shard.invariants();
        self.perform(now, number, &mut effects);
        let wake_at = effects.wake_at;
        self.cores[number].effects = effects;
        if self.ending.is_some() {
            return;
        }
        self.drive_log(now, number);
        self.set_tick(now, number, wake_at);
        let core = &mut self.cores[number];
        if core.phase == Phase::Opening && core.shard.is_all_durable() {
            core.phase = Phase::Ready;
        }
        if !core.inbox.is_empty() {
            self.wake(now.mono, number);
        }
        self.stop_on(now);
    }

    /// Effects to I/O, lane by lane, in the order of `driver::perform`.
    fn perform(&mut self, now: Now, number: usize, effects: &mut Effects) {
        if let Some(what) = effects.corrupt.take() {
            if !self.disk.is_damaged() {
                self.broken.replace(Some(format!("the log is said to be damaged and is not: {what}")));
            }
            return self.end(Death::Corrupt(what));
        }
        let mut touched: Vec<ConnId> = Vec::new();
        for (id, version, reply) in effects.replies.drain(..) {
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.delivered |= matches!(reply, Reply::Deliver(_));
                conn.outbox.push(&reply, version);
                if !touched.contains(&id) {
                    touched.push(id);
                }
            }
            self.said.push(Said { conn: id, reply });
        }
        for conn in touched {
            self.replied(now, conn);
        }
        for (conn, authenticated) in effects.auth_decided.drain(..) {
            self.auth_decided(now, conn, authenticated);
        }
        for conn in effects.pause_reading.drain(..) {
            self.pause(conn);
        }
        for conn in effects.resume_reading.drain(..) {
            self.resume(now, conn);
        }
        for (conn, reason) in effects.close.drain(..) {
            self.close(now, conn, reason);
        }
        self.send_to_cores(now.mono, number, effects);
        for read in effects.reads.drain(..) {
            self.serial += 1;
            let serial = self.serial;
            self.cores[number].reads.insert(serial, read);
            let takes = self.latency(now.mono, 20, 2_000);
            self.schedule(now.mono + takes, Happening::Read { core: number, serial });
        }
        for message in effects.to_keeper.drain(..) {
            self.tell_keeper(now, number, message);
        }
    }

    fn send_to_cores(&mut self, now: Instant, number: usize, effects: &mut Effects) {
        for to in 0..effects.to_core.len() {
            // A ring that is full lets the batch grow; it is offered again when there is room.
            if effects.to_core[to].is_empty() || self.cores[to].rings[number].len() >= self.ring_slots {
                continue;
            }
            let batch = std::mem::take(&mut effects.to_core[to]);
            self.cores[to].rings[number].push_back(batch);
            let at = now + self.moment();
            self.schedule(at, Happening::Ring { to, from: number });
        }
    }

    fn take_from_ring(&mut self, now: Now, to: usize, from: usize) {
        let core = &mut self.cores[to];
        if core.phase == Phase::Finished {
            return;
        }
        if let Some(batch) = core.rings[from].pop_front() {
            core.arrived.push_back((CoreId(from as u16), batch));
            self.wake(now.mono, to);
        }
        if !self.cores[from].effects.to_core[to].is_empty() {
            self.wake(now.mono, from);
        }
    }

    fn tell_keeper(&mut self, now: Now, number: usize, message: ForKeeper) {
        let wall = self.clock(now).wall;
        let core = &mut self.cores[number];
        let id = core.id;
        let message = match message {
            ForKeeper::WantGrant { count } => ToKeeper::WantGrant { core: id, count },
            ForKeeper::Unchanged => ToKeeper::Unchanged { core: id },
            ForKeeper::Relocated { slot } => ToKeeper::Relocated { core: id, slot },
            ForKeeper::Snapshot(snapshot) => {
                let begun = std::mem::take(&mut core.begun);
                ToKeeper::Snapshot(Box::new(CoreSnapshot::new(id, snapshot, begun, wall)))
            }
        };
        if let Some(keeper) = self.keeper.as_mut() {
            keeper.say(message);
        }
        let at = now.mono + self.moment();
        self.wake_keeper(at);
    }

    /// The keeper tells a core something.
    fn tell(&mut self, now: Instant, core: CoreId, message: FromKeeper) {
        let core = usize::from(core.0);
        self.cores[core].from_keeper.push_back(message);
        let at = now + self.moment();
        self.schedule(at, Happening::Hear { core });
    }

    fn set_tick(&mut self, now: Now, number: usize, wake_at: Option<Instant>) {
        let start = self.clock.map_or(Instant(0), |(start, _)| start);
        let idle = now.mono + IDLE_TICK;
        let wanted = wake_at.map_or(idle, |at| Instant(start.0 + at.0).max(now.mono).min(idle));
        if self.cores[number].tick_at.is_none_or(|at| wanted < at) {
            let at = wanted + Duration(self.rng.between(0, BEAT_US) * 1_000);
            self.cores[number].tick_at = Some(at);
            self.schedule(at, Happening::Tick { core: number, at });
        }
    }

    // ---- the log ------------------------------------------------------------------------------------------------

    /// Starts what the log wants: one write and one sync at a time, whatever arrives meanwhile is the next batch.
    fn drive_log(&mut self, now: Now, number: usize) {
        let broker_now = self.clock(now);
        let core = &mut self.cores[number];
        if core.write.is_none()
            && let Some(write) = core.shard.next_write(broker_now)
        {
            if write.new_segment {
                core.begun.push(write.segment);
            }
            let frame = if write.new_segment { &write.bytes[BLOCK..] } else { &write.bytes[..] };
            let ids = boot::messages_in_frame(frame);
            if self.plan.mistake == Some(HostMistake::WrittenWhenSubmitted) {
                let event = Event::LogWritten { end: write.end, records: write.records, synced: self.plan.dsync };
                core.inbox.push_back(event);
            }
            core.write = Some(LogWrite { write, ids });
            let takes = self.latency(now.mono, 20, 1_500);
            self.schedule(now.mono + takes, Happening::Written { core: number });
            if !self.cores[number].inbox.is_empty() {
                self.wake(now.mono, number);
            }
        }
        let core = &mut self.cores[number];
        if !self.plan.dsync
            && core.sync.is_none()
            && let Some(upto) = core.shard.begin_sync(broker_now.mono)
        {
            let mut slots = VecDeque::from(std::mem::take(&mut core.dirty));
            if self.plan.mistake == Some(HostMistake::SyncNewestSlotOnly) {
                slots.drain(..slots.len().saturating_sub(1));
            }
            core.sync = Some(LogSync { upto, slots, began: self.disk.begin_sync() });
            let takes = self.latency(now.mono, 50, 5_000);
            self.schedule(now.mono + takes, Happening::Synced { core: number });
        }
    }

    fn end_write(&mut self, now: Now, number: usize) {
        let Some(LogWrite { write, ids }) = self.cores[number].write.take() else { return };
        let (in_flight, durable) = (in_flight_of(&write), self.plan.dsync);
        let faults = self.plan.faults.clone();
        let failed = happens(&mut self.rng, faults.write_eio);
        let short = !failed && happens(&mut self.rng, faults.short_write);
        if failed || short {
            self.disk.counts.write_eio += u64::from(failed);
            self.disk.counts.short_write += u64::from(short);
            self.disk.land_some(&in_flight);
            self.doubtful.extend(ids.iter().copied());
            if self.plan.mistake != Some(HostMistake::IgnoreErrors) {
                return self.end(Death::Io("a write of the log failed".to_owned()));
            }
        } else if happens(&mut self.rng, faults.lost_write) {
            self.disk.lose(&in_flight, durable);
        } else if !(happens(&mut self.rng, faults.misdirect) && self.disk.misdirect(&in_flight, durable)) {
            self.disk.land(&in_flight, durable);
        }
        let core = &mut self.cores[number];
        let held = if durable { Held::Synced } else { Held::Written };
        for id in &ids {
            let level = self.levels.entry(*id).or_insert(held);
            *level = held.max(*level);
        }
        if !durable {
            core.unsynced.push_back((write.end, ids, now.mono));
            if core.dirty.last() != Some(&write.slot.0) {
                core.dirty.push(write.slot.0);
            }
        }
        if self.plan.mistake == Some(HostMistake::WrittenWhenSubmitted) {
            return self.wake(now.mono, number);
        }
        let event = Event::LogWritten { end: write.end, records: write.records, synced: durable };
        self.push(now.mono, number, event);
    }

    /// One file of a sync is done: the next one, or all are.
    fn end_sync(&mut self, now: Now, number: usize) {
        let Some(mut sync) = self.cores[number].sync.take() else { return };
        if let Some(slot) = sync.slots.pop_front() {
            let file = FileId::Slot(slot);
            if happens(&mut self.rng, self.plan.faults.sync_eio) {
                self.disk.counts.sync_eio += 1;
                self.disk.fail_sync(file);
                if self.plan.mistake != Some(HostMistake::IgnoreErrors) {
                    self.cores[number].sync = Some(sync);
                    return self.end(Death::Io("a sync of the log failed".to_owned()));
                }
            } else if self.plan.mistake != Some(HostMistake::SyncNothing) {
                self.disk.end_sync(file, sync.began);
            }
        }
        if !sync.slots.is_empty() {
            sync.began = self.disk.begin_sync();
            self.cores[number].sync = Some(sync);
            let takes = self.latency(now.mono, 50, 5_000);
            return self.schedule(now.mono + takes, Happening::Synced { core: number });
        }
        let core = &mut self.cores[number];
        while core.unsynced.front().is_some_and(|(end, ..)| *end <= sync.upto) {
            let (_, ids, _) = core.unsynced.pop_front().expect("just seen");
            self.levels.extend(ids.into_iter().map(|id| (id, Held::Synced)));
        }
        let upto = match self.plan.mistake {
            Some(HostMistake::SyncCoversLater) => core.written,
            _ => sync.upto,
        };
        self.push(now.mono, number, Event::LogSynced { upto });
    }

    fn end_read(&mut self, now: Now, number: usize, serial: u64) {
        let Some(BacklogRead { slot, offset, len }) = self.cores[number].reads.get(&serial).copied() else { return };
        if happens(&mut self.rng, self.plan.faults.read_eio) {
            self.disk.counts.read_eio += 1;
            return self.end(Death::Io("a read of the log failed".to_owned()));
        }
        let Some(bytes) = self.disk.file(FileId::Slot(slot.0)) else {
            return self.schedule(now.mono + RETRY_READ, Happening::ReadAgain { core: number, serial });
        };
        let bytes = Bytes::copy_from_slice(&bytes[offset as usize..(offset + len) as usize]);
        self.cores[number].reads.remove(&serial);
        self.push(now.mono, number, Event::BacklogRead { slot, offset, bytes });
    }

    // ---- an orderly stop ----------------------------------------------------------------------------------------

    /// Takes the next step of a stop, if it is time.
    fn stop_on(&mut self, now: Now) {
        match self.stopping {
            Stopping::No => {}
            Stopping::Wanted => {
                if self.cores.iter().all(|core| core.phase == Phase::Ready) {
                    let until = now.mono + self.plan.drain;
                    self.stopping = Stopping::Draining { until };
                    self.schedule(until, Happening::DrainOver);
                    for core in 0..self.cores.len() {
                        self.push(now.mono, core, Event::Drain);
                    }
                }
            }
            Stopping::Draining { until } => {
                for core in &mut self.cores {
                    core.drained |= core.shard.in_flight() == 0 || now.mono >= until;
                }
                if self.cores.iter().all(|core| core.drained) {
                    self.stopping = Stopping::Keeper;
                    if let Some(keeper) = self.keeper.as_mut() {
                        keeper.say(ToKeeper::Stop);
                    }
                    self.wake_keeper(now.mono);
                }
            }
            Stopping::Keeper => {
                if self.keeper.as_ref().is_some_and(|keeper| keeper.stopped.is_some()) {
                    self.stopping = Stopping::Finishing;
                    for number in 0..self.cores.len() {
                        let core = &mut self.cores[number];
                        core.shard.finish_log();
                        core.phase = Phase::Finishing;
                        core.ticked = true;
                        self.wake(now.mono, number);
                    }
                }
            }
            Stopping::Finishing => {
                for core in &mut self.cores {
                    let done = core.shard.is_all_durable() && core.inbox.is_empty() && !core.ticked;
                    if core.phase == Phase::Finishing && done {
                        core.phase = Phase::Finished;
                    }
                }
                if self.cores.iter().all(|core| core.phase == Phase::Finished) {
                    let in_flight = self.switch_off();
                    assert!(in_flight.is_empty(), "an orderly stop leaves nothing behind");
                }
            }
        }
    }
}

fn in_flight_of(write: &Write) -> InFlight {
    InFlight { file: FileId::Slot(write.slot.0), offset: write.offset as usize, bytes: write.bytes.clone() }
}
