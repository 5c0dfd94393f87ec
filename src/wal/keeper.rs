//! The keeper: one plain thread that owns the slot files and the checkpoints.
//!
//! Owns: making, granting, freeing and deleting slots; the checkpoint cycle; what happens when space runs out. Never: writes
//! a record, or waits for one core while another wants a slot.
//! Neighbours: `segments` decides which slot may go; `disk` makes it; `checkpoint` is what the cores' snapshots become.
//!
//! A core that wants a slot asks before it needs it, so that no publish waits for 64 MiB of zeros. When the disk is full the
//! cores are told so, in the operating system's words, and told again when there is room: a full disk stops publishes, never
//! the broker. Any other failed write, and every failed sync, ends the process: nobody knows what is on the disk then.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flume::{Receiver, RecvTimeoutError, Sender, TrySendError};

use super::batch::{GRANTS_IN_HAND, Grant};
use super::checkpoint::{Checkpoint, SealedEnd, StreamState, VShardState};
use super::disk::{self, WriteError, is_no_space};
use super::record::SealedStream;
use super::segments::{CoreReport, Live, Policy, Segments, UNLISTED_MIN};
use super::start::RecoveredStore;
use super::store::{self, Store, StoreError, io_at};
use crate::planted::planted;
use crate::time::WallMs;
use crate::types::{CoreId, Lsn, Slot, StreamId, VShard};

/// What a core tells the keeper.
#[derive(Debug)]
pub enum ToKeeper {
    /// The core's log wants so many more slots.
    WantGrant { core: CoreId, count: usize },
    /// The answer to `TakeSnapshot`.
    Snapshot(Box<CoreSnapshot>),
    /// The other answer to `TakeSnapshot { force: false }`: nothing was logged since the core's last snapshot.
    Unchanged { core: CoreId },
    /// The answer to `Relocate`: what the core had in `slot` has been appended again, or cannot be.
    Relocated { core: CoreId, slot: Slot },
    /// A core runs short of room: checkpoint now.
    Urgent,
    /// Take a last checkpoint, tell whether it was written, and end. The cores must still answer.
    Stop { done: Sender<bool> },
}

/// What the keeper tells a core.
#[derive(Clone, Debug)]
pub enum ToCore {
    Grant(Grant),
    /// `force`: an `Unchanged` will not do.
    TakeSnapshot {
        force: bool,
    },
    /// Append the core's live messages in this slot again.
    Relocate {
        slot: Slot,
    },
    /// No further slot can be had: refuse publishes. Acknowledgements go on in the slots already granted.
    NoSpace {
        reason: Arc<str>,
    },
    SpaceBack,
    /// Recovery would start from the snapshot the core gave last.
    Checkpointed {
        number: u64,
    },
}

/// One core's share of a checkpoint.
#[derive(Debug)]
pub struct CoreSnapshot {
    pub report: CoreReport,
    /// What is known synced of the core's stream; not below what the report covers.
    pub durable: Lsn,
    /// The state of each of the core's virtual shards, and the index of the last log entry in it.
    pub vshards: Vec<(VShard, u64, Bytes)>,
    /// The core's broker time.
    pub wall: WallMs,
}

/// What recovery has read, as a checkpoint would say it.
#[derive(Debug)]
pub struct RecoveredState {
    /// By number.
    pub vshards: Vec<VShardState>,
    /// Every slot with at least one live message.
    pub live: Vec<(Slot, Live)>,
}

#[derive(Clone, Debug)]
pub struct KeeperConfig {
    pub cores: u16,
    /// Free slots kept when nothing is published; more are deleted.
    pub spare: usize,
    /// Bytes of all slots together; 0: no limit.
    pub disk_quota: u64,
    pub checkpoint_interval: Duration,
}

/// What the keeper shows the metrics page. Read at any time, from any thread.
#[derive(Debug, Default)]
pub struct KeeperGauges {
    pub slots: AtomicU64,
    pub slots_used: AtomicU64,
    /// Grants of slots that this run had freed before.
    pub slots_recycled: AtomicU64,
    pub checkpoints: AtomicU64,
    pub checkpoint_bytes: AtomicU64,
    /// From asking the cores to the end of the sync.
    pub checkpoint_ms: AtomicU64,
    /// 1 while publishes are refused for want of space.
    pub no_space: AtomicU64,
}

/// The cores' side of the keeper.
#[derive(Debug)]
pub struct KeeperHandle {
    pub to_keeper: Sender<ToKeeper>,
    /// By core number.
    pub from_keeper: Vec<Receiver<ToCore>>,
    /// By core number: at least two slots each, the first for `Log::new`.
    pub grants: Vec<Vec<Grant>>,
    pub gauges: Arc<KeeperGauges>,
    pub thread: JoinHandle<()>,
}

/// Slots each core has from the start: the one it fills, and those in hand.
const GRANTS_PER_CORE: usize = 1 + GRANTS_IN_HAND;
/// A log that has no second one takes no publish, but acknowledgements, by which space comes back: so a broker that was killed
/// on a full disk starts on it.
const GRANTS_TO_START: usize = 1;
/// Messages one core can have unread at the keeper: grants wanted, one snapshot, relocations, an urgent one and a stop.
const INBOX_PER_CORE: usize = 64;
/// Messages a core may leave unread before it counts as stuck; the keeper asks nothing more of a core than it has answered.
const OUTBOX: usize = 1_024;
/// How often a slot is tried for again on a full disk.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Slots given in this time are likely to be wanted again: so many stay when they come back, instead of being deleted and made
/// anew, which writes every byte twice.
const DEMAND_WINDOW: Duration = Duration::from_secs(10);
/// Made ahead are as many as were given in this time.
const AHEAD_WINDOW: Duration = Duration::from_secs(1);
/// And at most so many: a burst must not fill the disk with zeros.
const AHEAD_MAX: usize = 16;
/// Times of grants that are remembered.
const GRANT_TIMES_MAX: usize = 1_024;
/// The least time from one checkpoint to the next, however urgent.
const CHECKPOINT_PAUSE: Duration = Duration::from_millis(100);
/// A checkpoint that took long is followed by a pause this many times as long: writing them must not become the main load.
const CHECKPOINT_SHARE: u32 = 9;
/// Per cent of the quota: a line in the log; publishes refused; publishes taken again.
const QUOTA_ALARM: u64 = 85;
const QUOTA_REJECT: u64 = 95;
const QUOTA_BACK: u64 = 90;
/// The process's end after a failed write or sync (sysexits.h EX_IOERR).
const EXIT_IO: i32 = 74;

/// One round of snapshots.
#[derive(Debug)]
struct Cycle {
    started: Instant,
    /// Begun after the stop was asked for.
    last: bool,
    /// By core number.
    answers: Vec<Option<Answer>>,
}

#[derive(Debug)]
enum Answer {
    Snapshot(Box<CoreSnapshot>),
    Unchanged,
}

#[derive(Debug)]
pub struct Keeper {
    store: Arc<Store>,
    config: KeeperConfig,
    segments: Segments,
    cores: Vec<Sender<ToCore>>,
    /// Wanted and not yet given, in the order of asking.
    pending: VecDeque<CoreId>,
    /// When slots were given, the newest last.
    given: VecDeque<Instant>,
    /// Freed in this run, and neither given nor deleted since.
    freed: BTreeSet<Slot>,
    no_space: bool,
    /// The last checkpoint found no space: nothing can be freed until one does.
    checkpoint_failed: bool,
    quota_alarm: bool,
    /// After a failure to make a slot: not tried again before.
    retry_at: Option<Instant>,
    cycle: Option<Cycle>,
    next_checkpoint: Instant,
    urgent: bool,
    /// The first checkpoint of a run is taken whether or not anything changed: it ends the need for earlier streams.
    first: bool,
    number: u64,
    stop: Option<Sender<bool>>,
    stopped: bool,
    incarnation: u64,
    /// How the streams of earlier runs ended, for the checkpoints; those without a live segment are dropped.
    sealed: Vec<SealedStream>,
    gauges: Arc<KeeperGauges>,
}

/// Ends the process if the keeper's thread panics: cores without a keeper would hang when their slots are full.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("the keeper has panicked; the broker ends");
            std::process::abort();
        }
    }
}

impl Keeper {
    /// Starts the thread, with slots granted to each core. Too little space for all that are wanted is an error only if a core
    /// could not begin: a full disk must not keep a broker from serving its backlog.
    ///
    /// - `state`: asked for only if there is too little space.
    pub fn start(
        store: Arc<Store>,
        recovered: &RecoveredStore,
        state: &dyn Fn() -> RecoveredState,
        config: KeeperConfig,
    ) -> Result<KeeperHandle, StoreError> {
        let slots_max = (config.disk_quota > 0)
            .then(|| usize::try_from(config.disk_quota / u64::from(store.segment_size())).unwrap_or(usize::MAX));
        let least = usize::from(config.cores) * GRANTS_PER_CORE + 1;
        if slots_max.is_some_and(|max| max < least) {
            return Err(StoreError::Config(format!(
                "disk_quota is {}; {} cores need at least {least} segments of {} bytes",
                config.disk_quota,
                config.cores,
                store.segment_size()
            )));
        }
        disk::remove_half_made(&store.wal_dir())?;
        let policy = Policy { segment_size: store.segment_size(), slots_max };
        let segments = recovered.segments(policy, config.cores);
        let cores = usize::from(config.cores);
        let (to_keeper, inbox) = flume::bounded(INBOX_PER_CORE * (cores + 1));
        let (senders, from_keeper) = (0..cores).map(|_| flume::bounded(OUTBOX)).unzip();
        let gauges = Arc::new(KeeperGauges::default());
        let mut keeper = Keeper {
            number: recovered.checkpoint_number,
            incarnation: recovered.incarnation,
            sealed: recovered.recovered.sealed.clone(),
            store,
            segments,
            cores: senders,
            pending: VecDeque::new(),
            given: VecDeque::new(),
            freed: BTreeSet::new(),
            no_space: false,
            checkpoint_failed: false,
            quota_alarm: false,
            retry_at: None,
            cycle: None,
            next_checkpoint: Instant::now() + config.checkpoint_interval,
            urgent: false,
            first: true,
            stop: None,
            stopped: false,
            gauges: Arc::clone(&gauges),
            config,
        };
        let grants =
            keeper.first_grants(&mut |keeper| keeper.checkpoint_at_start(state(), recovered.recovered.time))?;
        let run = move || {
            let _guard = AbortOnPanic;
            keeper.run(&inbox);
        };
        let thread = std::thread::Builder::new().name("keeper".to_owned()).spawn(run);
        let thread =
            thread.map_err(|source| StoreError::Io { what: "start the thread of", path: "keeper".into(), source })?;
        Ok(KeeperHandle { to_keeper, from_keeper, grants, gauges, thread })
    }

    /// - `make_room`: called at most once, if a core could not begin.
    fn first_grants(&mut self, make_room: &mut dyn FnMut(&mut Keeper)) -> Result<Vec<Vec<Grant>>, StoreError> {
        let mut grants = vec![Vec::new(); self.cores.len()];
        let mut make_room = Some(make_room);
        // One for everybody before a second for anybody.
        for round in 0..GRANTS_PER_CORE {
            for core in (0..self.config.cores).map(CoreId) {
                let mut granted = self.grant(core);
                let none = |granted: &io::Result<_>| granted.as_ref().map_or_else(is_no_space, Option::is_none);
                if round < GRANTS_TO_START
                    && none(&granted)
                    && let Some(make_room) = make_room.take()
                {
                    make_room(self);
                    granted = self.grant(core);
                }
                if round < GRANTS_TO_START && matches!(granted, Ok(None)) {
                    // The quota is used up, and only a broker that runs can free some of it: publishes will be refused.
                    tracing::warn!(core = core.0, "one segment beyond the disk quota, to be able to start");
                    granted = self.make_beyond_quota().and_then(|()| self.grant(core));
                }
                match granted {
                    Ok(Some(grant)) => grants[usize::from(core.0)].push(grant),
                    Err(error) if round < GRANTS_TO_START || !is_no_space(&error) => {
                        let what = match is_no_space(&error) {
                            true => "no room for a first segment; free some space, or move the store to a larger disk:",
                            false => "make a segment in",
                        };
                        return Err(io_at(what, &self.store.wal_dir())(error));
                    }
                    // The core will ask.
                    Ok(None) | Err(_) => {}
                }
            }
        }
        Ok(grants)
    }

    fn run(mut self, inbox: &Receiver<ToKeeper>) {
        self.show();
        loop {
            let now = Instant::now();
            match inbox.recv_timeout(self.wake_at(now).saturating_duration_since(now)) {
                Ok(message) => {
                    self.on_message(message);
                    for message in inbox.try_iter().take(inbox.len()) {
                        self.on_message(message);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // The driver has gone without a word: nobody is left to write.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.turn() {
                return;
            }
        }
    }

    fn wake_at(&self, now: Instant) -> Instant {
        if self.wants_ahead() {
            // One at a time, so that whoever asks meanwhile is heard.
            return now;
        }
        let retry = self.retry_at.filter(|_| !self.pending.is_empty());
        // While a cycle is under way, its answers wake us.
        let checkpoint = self.cycle.is_none().then_some(self.next_checkpoint);
        [retry, checkpoint].into_iter().flatten().min().unwrap_or(now + RETRY_EVERY)
    }

    fn on_message(&mut self, message: ToKeeper) {
        match message {
            ToKeeper::WantGrant { core, count } => self.pending.extend(std::iter::repeat_n(core, count)),
            ToKeeper::Snapshot(snapshot) => self.on_answer(snapshot.report.core, Answer::Snapshot(snapshot)),
            ToKeeper::Unchanged { core } => self.on_answer(core, Answer::Unchanged),
            ToKeeper::Relocated { core, slot } => self.segments.relocated(core, slot),
            ToKeeper::Urgent => self.hurry(),
            ToKeeper::Stop { done } => self.stop = Some(done),
        }
    }

    fn on_answer(&mut self, core: CoreId, answer: Answer) {
        let cycle = self.cycle.as_mut().expect("a core answers only when asked");
        let place = &mut cycle.answers[usize::from(core.0)];
        assert!(place.is_none(), "core {} answered twice", core.0);
        *place = Some(answer);
    }

    /// Everything that is due. True: the keeper is done.
    fn turn(&mut self) -> bool {
        self.serve();
        if self.cycle.as_ref().is_some_and(|cycle| cycle.answers.iter().all(Option::is_some)) {
            self.finish_cycle();
        }
        if self.stopped {
            return true;
        }
        if self.stop.is_some() && self.cores.iter().any(Sender::is_disconnected) {
            // It will not answer any more: recovery has the log.
            self.end(false);
        } else if self.cycle.is_none() && (self.stop.is_some() || Instant::now() >= self.next_checkpoint) {
            // A slot that only waits to be left out by a second checkpoint is a change too.
            let force = self.stop.is_some() || self.first || self.urgent || self.segments.releasable() > 0;
            self.ask_all(force);
        }
        if self.wants_ahead() {
            self.make_ahead();
        }
        self.show();
        self.stopped
    }
}

/// The contents of the disk are unknown now: the process ends before anything else is promised.
fn fail_stop(what: &str, error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "{what} failed; the broker ends, start it again once the disk is sound");
    std::process::exit(EXIT_IO)
}

/// Slots: granting, making, deleting.
impl Keeper {
    /// A slot for `core`, made now if there is none. `None`: the quota forbids another one.
    fn grant(&mut self, core: CoreId) -> io::Result<Option<Grant>> {
        if self.segments.free() == 0 && !self.make()? {
            return Ok(None);
        }
        let salt = if planted!(SaltReused) { 1 } else { getrandom::u64().map_err(io::Error::other)? };
        let created = WallMs(store::now_ms());
        let slot = self.segments.grant(core, salt);
        if slot.is_some_and(|slot| self.freed.remove(&slot)) {
            self.gauges.slots_recycled.fetch_add(1, Ordering::Relaxed);
        }
        Ok(slot.map(|slot| Grant { slot, salt, created }))
    }

    /// False: the quota forbids another slot.
    fn make(&mut self) -> io::Result<bool> {
        let Some(slot) = self.segments.slot_to_make() else { return Ok(false) };
        self.make_slot(slot)?;
        Ok(true)
    }

    fn make_beyond_quota(&mut self) -> io::Result<()> {
        let number = self.segments.unused_number();
        self.make_slot(number.ok_or_else(|| io::Error::other("no slot number is left"))?)
    }

    fn make_slot(&mut self, slot: Slot) -> io::Result<()> {
        disk::create_slot(&self.store.wal_dir(), slot, self.store.segment_size(), self.store.direct_io())?;
        self.segments.add_free(slot);
        Ok(())
    }

    /// Gives the slots that are wanted, as long as there are some, and keeps the cores informed about space.
    fn serve(&mut self) {
        while let Some(&core) = self.pending.front() {
            let may_make = self.retry_at.is_none_or(|at| Instant::now() >= at);
            if self.segments.free() == 0 && !may_make {
                break;
            }
            match self.grant(core) {
                Ok(Some(grant)) => {
                    self.pending.pop_front();
                    self.retry_at = None;
                    if self.given.len() == GRANT_TIMES_MAX {
                        self.given.pop_front();
                    }
                    self.given.push_back(Instant::now());
                    self.tell(core, ToCore::Grant(grant));
                }
                Ok(None) => {
                    self.retry_at = Some(Instant::now() + RETRY_EVERY);
                    self.refuse("the disk quota is used up");
                }
                Err(error) if is_no_space(&error) => {
                    self.retry_at = Some(Instant::now() + RETRY_EVERY);
                    self.refuse(&error.to_string());
                }
                Err(error) => fail_stop("making a segment", &error),
            }
        }
        let used = self.quota_percent();
        if used >= QUOTA_REJECT {
            self.refuse(&format!("{used} % of the disk quota is used"));
        } else if self.no_space && self.pending.is_empty() && used < QUOTA_BACK && !self.checkpoint_failed {
            tracing::info!("there is space again; publishes are taken");
            self.no_space = false;
            self.retry_at = None;
            self.show();
            self.tell_all(&ToCore::SpaceBack);
        }
        if used >= QUOTA_ALARM && !self.quota_alarm {
            tracing::warn!(
                used_percent = used,
                "the disk quota is nearly used up; publishes are refused at {QUOTA_REJECT} %"
            );
        }
        self.quota_alarm = used >= QUOTA_ALARM;
    }

    /// Slots in use as a share of those the quota allows.
    fn quota_percent(&self) -> u64 {
        match self.config.disk_quota / u64::from(self.store.segment_size()) {
            0 => 0,
            slots => self.segments.used() as u64 * 100 / slots,
        }
    }

    fn refuse(&mut self, reason: &str) {
        if self.no_space {
            return;
        }
        tracing::error!(reason, "no space for the log; publishes are refused until there is");
        self.no_space = true;
        self.show();
        self.tell_all(&ToCore::NoSpace { reason: reason.into() });
        // What has been consumed may be freed.
        self.hurry();
    }

    /// Slots given within `window` before now.
    fn demand(&self, window: Duration) -> usize {
        let now = Instant::now();
        self.given.iter().rev().take_while(|at| now.duration_since(**at) <= window).count()
    }

    /// Whether one more slot is to be made before anybody asks: always one, more while they go fast.
    fn wants_ahead(&self) -> bool {
        let ahead = self.demand(AHEAD_WINDOW).clamp(1, AHEAD_MAX);
        let may = self.retry_at.is_none_or(|at| Instant::now() >= at);
        may && self.pending.is_empty()
            && !self.no_space
            && self.segments.free() < ahead
            && self.segments.slot_to_make().is_some()
            && self.quota_percent() < QUOTA_REJECT
    }

    /// Makes a slot before anybody asks. A full disk is no trouble yet.
    fn make_ahead(&mut self) {
        self.retry_at = None;
        match self.make() {
            Ok(_) => {}
            Err(error) if is_no_space(&error) => {
                tracing::warn!(%error, "no space for a spare segment");
                self.retry_at = Some(Instant::now() + RETRY_EVERY);
            }
            Err(error) => fail_stop("making a segment", &error),
        }
    }

    fn delete_surplus(&mut self) {
        // While space is short every file is one less that has to be made again.
        if self.no_space || !self.pending.is_empty() {
            return;
        }
        let keep = self.config.spare.max(self.demand(DEMAND_WINDOW));
        while let Some(slot) = self.segments.take_surplus(keep) {
            self.delete(slot);
        }
    }

    fn delete(&mut self, slot: Slot) {
        self.freed.remove(&slot);
        if let Err(error) = disk::delete_slot(&self.store.wal_dir(), slot) {
            fail_stop("deleting a segment", &error);
        }
    }

    fn tell(&self, core: CoreId, message: ToCore) {
        match self.cores[usize::from(core.0)].try_send(message) {
            // A core that has ended needs nothing more.
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(message)) => {
                panic!("core {} has read none of {OUTBOX} messages: {message:?}", core.0)
            }
        }
    }

    fn tell_all(&self, message: &ToCore) {
        for core in 0..self.config.cores {
            self.tell(CoreId(core), message.clone());
        }
    }
}

/// Checkpoints.
impl Keeper {
    fn hurry(&mut self) {
        self.urgent = true;
        self.next_checkpoint = self.next_checkpoint.min(Instant::now() + CHECKPOINT_PAUSE);
    }

    fn ask_all(&mut self, force: bool) {
        self.urgent = false;
        let answers = self.cores.iter().map(|_| None).collect();
        self.cycle = Some(Cycle { started: Instant::now(), last: self.stop.is_some(), answers });
        self.tell_all(&ToCore::TakeSnapshot { force });
    }

    fn end(&mut self, written: bool) {
        self.stopped = true;
        if let Some(done) = self.stop.take()
            && done.send(written).is_err()
        {
            tracing::debug!("nobody waits for the last checkpoint");
        }
    }

    /// All cores have answered.
    fn finish_cycle(&mut self) {
        let Some(mut cycle) = self.cycle.take() else { return };
        let unchanged = |answer: &Option<Answer>| matches!(answer, Some(Answer::Unchanged));
        if cycle.answers.iter().all(unchanged) {
            // After a burst: what it needed may go.
            self.delete_surplus();
            self.next_checkpoint = Instant::now() + self.config.checkpoint_interval;
            return;
        }
        if cycle.answers.iter().any(unchanged) {
            // A checkpoint is whole or useless, and snapshots are too large to keep: ask those again.
            for (core, answer) in (0..).map(CoreId).zip(&mut cycle.answers) {
                if unchanged(answer) {
                    *answer = None;
                    self.tell(core, ToCore::TakeSnapshot { force: true });
                }
            }
            self.cycle = Some(cycle);
            return;
        }
        let snapshots = cycle.answers.into_iter().filter_map(|answer| match answer {
            Some(Answer::Snapshot(snapshot)) => Some(*snapshot),
            _ => None,
        });
        let written = self.checkpoint(snapshots.collect());
        let took = cycle.started.elapsed();
        self.gauges.checkpoint_ms.store(u64::try_from(took.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        let pause = self.config.checkpoint_interval.max(took * CHECKPOINT_SHARE);
        // While space is short, what the checkpoint frees is worth more than what it costs.
        self.next_checkpoint = Instant::now() + if self.no_space { CHECKPOINT_PAUSE.max(took) } else { pause };
        if written {
            self.after_checkpoint();
        }
        if cycle.last {
            self.end(written);
        }
    }

    /// A broker that is killed on a full disk, and again, leaves a segment each time that holds next to nothing, and no
    /// checkpoint that says so. Two of them, of what recovery has read, free those before new ones are needed.
    fn checkpoint_at_start(&mut self, state: RecoveredState, time: WallMs) {
        tracing::warn!("no space to begin the log; taking a checkpoint first, which may free some");
        let RecoveredState { vshards, live } = state;
        self.segments.report(CoreReport { core: CoreId(0), covered: Lsn(0), live, begun: Vec::new() });
        for _ in 0..UNLISTED_MIN {
            // No stream of this run has begun: it is the runs before that are covered.
            if !self.write_checkpoint(Vec::new(), vshards.clone(), time, self.incarnation - 1) {
                return;
            }
        }
        // The first one of this run is still to come.
        self.first = true;
    }

    /// Writes what the cores have said. False: there is no space for it; the next cycle tries again.
    fn checkpoint(&mut self, snapshots: Vec<CoreSnapshot>) -> bool {
        let mut streams = Vec::new();
        let mut vshards = vec![VShardState::default(); usize::from(self.store.identity().virtual_shards)];
        let mut time = WallMs(0);
        for snapshot in snapshots {
            let CoreSnapshot { report, durable, vshards: states, wall } = snapshot;
            assert!(
                report.covered <= durable,
                "core {} covers {}, durable is {durable}",
                report.core.0,
                report.covered
            );
            let stream = StreamId { incarnation: self.incarnation, core: report.core.0 };
            streams.push(StreamState { stream, covered: report.covered, durable, sealed: None });
            for (vshard, last_index, state) in states {
                vshards[usize::from(vshard.0)] = VShardState { last_index, state };
            }
            time = time.max(wall);
            self.segments.report(report);
        }
        self.write_checkpoint(streams, vshards, time, self.incarnation)
    }

    /// - `streams`: of this run; those before that are still needed are added.
    fn write_checkpoint(
        &mut self,
        mut streams: Vec<StreamState>,
        vshards: Vec<VShardState>,
        time: WallMs,
        incarnation: u64,
    ) -> bool {
        let live = self.segments.to_list();
        self.sealed.retain(|sealed| live.iter().any(|segment| segment.stream == sealed.stream));
        streams.extend(self.sealed.iter().map(|sealed| StreamState {
            stream: sealed.stream,
            covered: sealed.end,
            durable: sealed.end,
            sealed: Some(SealedEnd { end: sealed.end, chain: sealed.chain }),
        }));
        let number = self.number + 1;
        let checkpoint = Checkpoint {
            store: self.store.id(),
            segment_size: self.store.segment_size(),
            number,
            incarnation,
            time,
            streams,
            live,
            vshards,
        };
        let bytes = checkpoint.encode();
        let mut written = disk::write_checkpoint(&self.store.ckpt_dir(), number, &bytes);
        if let Err(WriteError::NoSpace(_)) = written
            && let Some(slot) = self.segments.take_free()
        {
            // A free segment is worth less than the checkpoint that frees more.
            self.delete(slot);
            written = disk::write_checkpoint(&self.store.ckpt_dir(), number, &bytes);
        }
        match written {
            Ok(()) => {}
            Err(WriteError::NoSpace(error)) => {
                self.checkpoint_failed = true;
                self.refuse(&format!("a checkpoint could not be written: {error}"));
                return false;
            }
            Err(WriteError::Failed(error)) => fail_stop("writing a checkpoint", &error),
        }
        self.number = number;
        self.first = false;
        self.checkpoint_failed = false;
        self.gauges.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.gauges.checkpoint_bytes.store(bytes.len() as u64, Ordering::Relaxed);
        let freed = self.segments.checkpoint_written(&checkpoint.live);
        if !freed.is_empty() {
            tracing::debug!(number, freed = freed.len(), "segments freed");
            self.retry_at = None;
        }
        self.freed.extend(freed);
        self.tell_all(&ToCore::Checkpointed { number });
        true
    }

    /// What a new checkpoint makes possible.
    fn after_checkpoint(&mut self) {
        self.serve();
        self.delete_surplus();
        if self.stop.is_none() {
            for (slot, cores) in self.segments.relocations(self.no_space) {
                for core in cores {
                    self.tell(core, ToCore::Relocate { slot });
                }
            }
        }
    }

    fn show(&self) {
        self.gauges.slots.store(self.segments.count() as u64, Ordering::Relaxed);
        self.gauges.slots_used.store(self.segments.used() as u64, Ordering::Relaxed);
        self.gauges.no_space.store(u64::from(self.no_space), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::wal::disk::tests::scratch;
    use crate::wal::format::Segment;
    use crate::wal::store::tests::options;

    const SIZE: u64 = store::SEGMENT_SIZE_MIN as u64;
    const DEADLINE: Duration = Duration::from_secs(30);

    fn no_state() -> RecoveredState {
        RecoveredState { vshards: Vec::new(), live: Vec::new() }
    }

    /// A core as the keeper sees it.
    struct FakeCore {
        to_keeper: Sender<ToKeeper>,
        inbox: Receiver<ToCore>,
        covered: u64,
        begun: Vec<Segment>,
        live: Vec<(Slot, Live)>,
        changed: bool,
        heard: Vec<ToCore>,
    }

    impl FakeCore {
        fn begin(&mut self, grant: Grant) {
            let sequence = self.begun.len() as u64;
            let stream = StreamId { incarnation: 1, core: 0 };
            self.begun.push(Segment { stream, sequence, slot: grant.slot, salt: grant.salt });
            self.changed = true;
        }

        /// Answers the keeper until `wanted` has been heard since the call.
        fn until(&mut self, what: &str, wanted: impl Fn(&[ToCore]) -> bool) {
            let (deadline, from) = (Instant::now() + DEADLINE, self.heard.len());
            while !wanted(&self.heard[from..]) {
                let message = self.inbox.recv_deadline(deadline).unwrap_or_else(|_| panic!("never heard: {what}"));
                match &message {
                    ToCore::TakeSnapshot { force: false } if !self.changed => {
                        self.to_keeper.send(ToKeeper::Unchanged { core: CoreId(0) }).unwrap();
                    }
                    ToCore::TakeSnapshot { .. } => {
                        let report = CoreReport {
                            core: CoreId(0),
                            covered: Lsn(self.covered),
                            live: self.live.clone(),
                            begun: self.begun.clone(),
                        };
                        self.changed = false;
                        let vshards = vec![(VShard(3), 7, Bytes::from_static(b"state"))];
                        let snapshot = CoreSnapshot { report, durable: Lsn(self.covered), vshards, wall: WallMs(99) };
                        self.to_keeper.send(ToKeeper::Snapshot(Box::new(snapshot))).unwrap();
                    }
                    _ => {}
                }
                self.heard.push(message);
            }
        }

        fn checkpoints(&mut self, count: usize) {
            let is_one = |message: &&ToCore| matches!(message, ToCore::Checkpointed { .. });
            self.until("checkpoints", |heard| heard.iter().filter(is_one).count() >= count);
        }

        fn want(&mut self) -> Grant {
            self.to_keeper.send(ToKeeper::WantGrant { core: CoreId(0), count: 1 }).unwrap();
            self.until("a grant", |heard| heard.iter().any(|message| matches!(message, ToCore::Grant(_))));
            let grant = self.heard.iter().rev().find_map(|message| match message {
                ToCore::Grant(grant) => Some(*grant),
                _ => None,
            });
            grant.unwrap()
        }

        fn stop(&mut self) -> bool {
            let (done, result) = flume::bounded(1);
            self.to_keeper.send(ToKeeper::Stop { done }).unwrap();
            self.checkpoints(1);
            result.recv_timeout(DEADLINE).unwrap()
        }
    }

    fn start(name: &str, disk_quota: u64) -> (Arc<Store>, KeeperHandle, FakeCore) {
        start_in(scratch(name), disk_quota)
    }

    fn start_in(dir: PathBuf, disk_quota: u64) -> (Arc<Store>, KeeperHandle, FakeCore) {
        let store = Arc::new(Store::open(&options(dir)).unwrap());
        let config = KeeperConfig { cores: 1, spare: 1, disk_quota, checkpoint_interval: Duration::from_millis(5) };
        let handle = Keeper::start(Arc::clone(&store), &RecoveredStore::empty(), &no_state, config).unwrap();
        let core = FakeCore {
            to_keeper: handle.to_keeper.clone(),
            inbox: handle.from_keeper[0].clone(),
            covered: 0,
            begun: Vec::new(),
            live: Vec::new(),
            changed: true,
            heard: Vec::new(),
        };
        (store, handle, core)
    }

    #[test]
    fn a_slot_goes_round_with_a_new_salt() {
        let (store, handle, mut core) = start("keeper-round", 0);
        let grants = handle.grants[0].clone();
        assert_eq!(grants.len(), GRANTS_PER_CORE);
        for grant in &grants {
            let bytes = fs::read(disk::slot_path(&store.wal_dir(), grant.slot)).unwrap();
            assert!(bytes.len() as u64 == SIZE && bytes.iter().all(|&byte| byte == 0));
        }
        core.begin(grants[0]);
        core.begin(grants[1]);
        core.covered = SIZE + 4096;
        core.live = vec![(grants[0].slot, Live { records: 1, bytes: 10 })];
        core.checkpoints(1);
        // The first one has a live message, the second one is open: neither comes back.
        let in_use: BTreeSet<Slot> = grants.iter().map(|grant| grant.slot).collect();
        assert!(!in_use.contains(&core.want().slot));
        core.live.clear();
        core.changed = true;
        // The second one is taken although nothing changes any more: it frees the slot.
        core.checkpoints(2);
        let mut seen = Vec::new();
        while !seen.iter().any(|grant: &Grant| grant.slot == grants[0].slot) {
            assert!(seen.len() < 3, "{:?} never came back: {seen:?}", grants[0].slot);
            seen.push(core.want());
        }
        assert_ne!(seen.last().unwrap().salt, grants[0].salt);
        assert_eq!(handle.gauges.slots_recycled.load(Ordering::Relaxed), 1);
        assert!(seen.iter().all(|grant| grant.slot != grants[1].slot));
        assert!(core.stop());
        handle.thread.join().unwrap();
    }

    #[test]
    fn the_last_checkpoint_says_what_the_cores_said() {
        let (store, handle, mut core) = start("keeper-stop", 0);
        core.begin(handle.grants[0][0]);
        core.covered = 8192;
        assert!(core.stop());
        handle.thread.join().unwrap();
        let files = disk::checkpoint_paths(&store.ckpt_dir()).map(|path| fs::read(path).ok());
        let chosen = crate::wal::checkpoint::choose(files[0].as_deref(), files[1].as_deref()).unwrap();
        let checkpoint = chosen.checkpoint.unwrap();
        assert_eq!((checkpoint.store, checkpoint.time), (store.id(), WallMs(99)));
        assert_eq!(checkpoint.live, core.begun);
        let stream = StreamId { incarnation: 1, core: 0 };
        let state = StreamState { stream, covered: Lsn(8192), durable: Lsn(8192), sealed: None };
        assert_eq!(checkpoint.streams, [state]);
        assert_eq!(checkpoint.vshards[3], VShardState { last_index: 7, state: Bytes::from_static(b"state") });
        assert_eq!(checkpoint.vshards.len(), 8);
    }

    #[test]
    fn nothing_is_written_while_nothing_changes() {
        let (_store, handle, mut core) = start("keeper-idle", 0);
        core.checkpoints(1);
        // Two rounds that find nothing to do.
        let unforced = |message: &&ToCore| matches!(message, ToCore::TakeSnapshot { force: false });
        core.until("rounds", |heard| heard.iter().filter(unforced).count() >= 3);
        let written = handle.gauges.checkpoints.load(Ordering::Relaxed);
        assert_eq!(written, 1);
        assert!(core.stop());
        assert_eq!(handle.gauges.checkpoints.load(Ordering::Relaxed), 2);
        handle.thread.join().unwrap();
    }

    #[test]
    fn at_the_quota_publishes_are_refused_until_something_is_freed() {
        let (store, handle, mut core) = start("keeper-quota", 6 * SIZE);
        let mut grants = handle.grants[0].clone();
        let refused = |heard: &[ToCore]| heard.iter().any(|message| matches!(message, ToCore::NoSpace { .. }));
        while grants.len() < 6 {
            grants.push(core.want());
        }
        for grant in &grants {
            core.begin(*grant);
        }
        if !refused(&core.heard) {
            core.until("no space", refused);
        }
        assert_eq!(handle.gauges.no_space.load(Ordering::Relaxed), 1);
        assert_eq!(disk::list_slots(&store.wal_dir()).unwrap().len(), 6);
        core.to_keeper.send(ToKeeper::WantGrant { core: CoreId(0), count: 1 }).unwrap();
        // All but the last are consumed: space comes back, and the grant that waited with it.
        core.covered = 5 * SIZE + 4096;
        core.changed = true;
        core.until("space", |heard| {
            heard.iter().any(|message| matches!(message, ToCore::SpaceBack))
                && heard.iter().any(|message| matches!(message, ToCore::Grant(_)))
        });
        assert!(core.stop());
        handle.thread.join().unwrap();
    }

    /// `mount -o loop` a 16 MiB ext4 image somewhere and name it in BLIPMQ_TEST_SMALL_FS.
    #[test]
    #[ignore = "needs a small file system: BLIPMQ_TEST_SMALL_FS"]
    fn a_full_disk_refuses_publishes_and_recovers_by_itself() {
        let dir = PathBuf::from(std::env::var("BLIPMQ_TEST_SMALL_FS").unwrap()).join("full.wal");
        let (store, handle, mut core) = start_in(dir, 0);
        let mut grants = handle.grants[0].clone();
        let refused = |message: &ToCore| matches!(message, ToCore::NoSpace { .. });
        for wanted in 1.. {
            assert!(wanted < 100, "the file system is too large for this test");
            core.to_keeper.send(ToKeeper::WantGrant { core: CoreId(0), count: 1 }).unwrap();
            core.until("an answer", |heard| heard.iter().any(|m| matches!(m, ToCore::Grant(_)) || refused(m)));
            match core.heard.last().unwrap() {
                ToCore::Grant(grant) => grants.push(*grant),
                _ => break,
            }
        }
        let Some(ToCore::NoSpace { reason }) = core.heard.iter().rfind(|message| refused(message)) else { panic!() };
        assert!(reason.contains("No space left on device"), "{reason}");
        assert!(
            fs::read_dir(store.wal_dir())
                .unwrap()
                .all(|entry| { entry.unwrap().file_name().to_string_lossy().ends_with(".seg") })
        );
        // Everything but the last segment is consumed: the grant that waits comes, and publishes are taken again.
        for grant in &grants {
            core.begin(*grant);
        }
        core.covered = (grants.len() as u64 - 1) * SIZE + 4096;
        core.until("space", |heard| {
            heard.iter().any(|message| matches!(message, ToCore::SpaceBack))
                && heard.iter().any(|message| matches!(message, ToCore::Grant(_)))
        });
        assert!(core.stop());
        handle.thread.join().unwrap();
        drop(store);
        fs::remove_dir_all(PathBuf::from(std::env::var("BLIPMQ_TEST_SMALL_FS").unwrap()).join("full.wal")).unwrap();
    }

    #[test]
    fn a_quota_too_small_to_start_is_a_clear_error() {
        let store = Arc::new(Store::open(&options(scratch("keeper-small"))).unwrap());
        let config =
            KeeperConfig { cores: 2, spare: 1, disk_quota: 6 * SIZE, checkpoint_interval: Duration::from_millis(5) };
        let error = Keeper::start(store, &RecoveredStore::empty(), &no_state, config).unwrap_err();
        assert_eq!(error.exit_code(), 78);
        assert!(error.to_string().contains("at least 7 segments"), "{error}");
    }
}
