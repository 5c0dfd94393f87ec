//! The keeper as `wal::keeper` has it, with its blocking calls cut into happenings. What it decides with, `wal::segments`, is the
//! real one.

use std::collections::VecDeque;

use blipmq::shard::effects::Snapshot;
use blipmq::shard::event::FromKeeper;
use blipmq::time::{Duration, Instant, Now, WallMs};
use blipmq::types::{CoreId, Slot, StreamId};
use blipmq::wal::batch::{GRANTS_IN_HAND, Grant};
use blipmq::wal::checkpoint::{Checkpoint, SealedEnd, StreamState, VShardState};
use blipmq::wal::format::Segment;
use blipmq::wal::record::SealedStream;
use blipmq::wal::segments::{CoreReport, Live, Policy, Segments};
use bytes::Bytes;

use super::{Death, Happening, HostMistake, Machine, Refused, STORE};
use crate::sim::disk::{FileId, InFlight, happens};

const GRANTS_PER_CORE: usize = 1 + GRANTS_IN_HAND;
const GRANTS_TO_START: usize = 1;
const RETRY_EVERY: Duration = Duration::from_secs(1);
const DEMAND_WINDOW: Duration = Duration::from_secs(10);
const AHEAD_WINDOW: Duration = Duration::from_secs(1);
const AHEAD_MAX: usize = 16;
const GRANT_TIMES_MAX: usize = 1_024;
const CHECKPOINT_PAUSE: Duration = Duration::from_millis(100);
const CHECKPOINT_SHARE: u64 = 9;
const QUOTA_REJECT: u64 = 95;
const QUOTA_BACK: u64 = 90;
/// What is written of a checkpoint between two happenings.
const PIECES: [usize; 3] = [4096, 16 * 1024, 64 * 1024];

/// What a core, or main, tells the keeper.
#[derive(Debug)]
pub(super) enum ToKeeper {
    WantGrant { core: CoreId, count: usize },
    Snapshot(Box<CoreSnapshot>),
    Unchanged { core: CoreId },
    Relocated { core: CoreId, slot: Slot },
    Stop,
}

#[derive(Debug)]
pub(super) struct CoreSnapshot {
    core: CoreId,
    snapshot: Snapshot,
    begun: Vec<Segment>,
    wall: WallMs,
}

impl CoreSnapshot {
    pub fn new(core: CoreId, snapshot: Snapshot, begun: Vec<Segment>, wall: WallMs) -> CoreSnapshot {
        CoreSnapshot { core, snapshot, begun, wall }
    }
}

#[derive(Debug)]
enum Answer {
    Snapshot(Box<CoreSnapshot>),
    Unchanged,
}

#[derive(Debug)]
struct Cycle {
    started: Instant,
    last: bool,
    answers: Vec<Option<Answer>>,
}

/// A call that the thread is in.
#[derive(Debug)]
enum Job {
    Make { slot: Slot, ahead: bool },
    Write(Box<Writing>),
    SyncDir,
}

#[derive(Debug)]
struct Writing {
    file: FileId,
    number: u64,
    bytes: Bytes,
    written: usize,
    /// Its sync is under way; what it covers.
    syncing: Option<u64>,
    live: Vec<Segment>,
    started: Instant,
    last: bool,
}

pub(super) struct Keeper {
    segments: Segments,
    cores: u16,
    inbox: VecDeque<ToKeeper>,
    pending: VecDeque<CoreId>,
    given: VecDeque<Instant>,
    no_space: bool,
    checkpoint_failed: bool,
    retry_at: Option<Instant>,
    cycle: Option<Cycle>,
    next_checkpoint: Instant,
    urgent: bool,
    first: bool,
    number: u64,
    stopping: bool,
    /// `Some`: it has ended; whether the last checkpoint was written.
    pub stopped: Option<bool>,
    incarnation: u64,
    sealed: Vec<SealedStream>,
    job: Option<Job>,
    wake_at: Option<Instant>,
}

impl Keeper {
    pub fn new(
        segments: Segments,
        cores: u16,
        incarnation: u64,
        number: u64,
        sealed: Vec<SealedStream>,
        at: Instant,
    ) -> Keeper {
        Keeper {
            segments,
            cores,
            inbox: VecDeque::new(),
            pending: VecDeque::new(),
            given: VecDeque::new(),
            no_space: false,
            checkpoint_failed: false,
            retry_at: None,
            cycle: None,
            next_checkpoint: at,
            urgent: false,
            first: true,
            number,
            stopping: false,
            stopped: None,
            incarnation,
            sealed,
            job: None,
            wake_at: None,
        }
    }

    pub fn policy(segment_size: u32, slots_max: Option<usize>) -> Policy {
        Policy { segment_size, slots_max }
    }

    pub fn say(&mut self, message: ToKeeper) {
        self.inbox.push_back(message);
    }

    /// No core waits for it to do something.
    pub fn is_idle(&self) -> bool {
        let served = self.pending.is_empty() || self.no_space;
        self.job.is_none() && self.inbox.is_empty() && self.cycle.is_none() && served
    }

    /// The piece of a checkpoint that is being written.
    pub fn in_flight(&self) -> Option<InFlight> {
        let Some(Job::Write(writing)) = &self.job else { return None };
        let left = &writing.bytes[writing.written..];
        let piece = left.len().min(PIECES[0]);
        (writing.syncing.is_none() && piece > 0).then(|| InFlight {
            file: writing.file,
            offset: writing.written,
            bytes: writing.bytes.slice(writing.written..writing.written + piece),
        })
    }

    fn on_answer(&mut self, core: CoreId, answer: Answer) {
        let cycle = self.cycle.as_mut().expect("a core answers only when asked");
        let place = &mut cycle.answers[usize::from(core.0)];
        assert!(place.is_none(), "core {} answered twice", core.0);
        *place = Some(answer);
    }

    fn hear(&mut self) {
        for message in std::mem::take(&mut self.inbox) {
            match message {
                ToKeeper::WantGrant { core, count } => self.pending.extend(std::iter::repeat_n(core, count)),
                ToKeeper::Snapshot(snapshot) => self.on_answer(snapshot.core, Answer::Snapshot(snapshot)),
                ToKeeper::Unchanged { core } => self.on_answer(core, Answer::Unchanged),
                ToKeeper::Relocated { core, slot } => self.segments.relocated(core, slot),
                ToKeeper::Stop => self.stopping = true,
            }
        }
    }

    fn demand(&self, now: Instant, window: Duration) -> usize {
        self.given.iter().rev().take_while(|at| now - **at <= window).count()
    }

    fn hurry(&mut self, now: Instant) {
        self.urgent = true;
        self.next_checkpoint = self.next_checkpoint.min(now + CHECKPOINT_PAUSE);
    }

    fn may_make(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|at| now >= at)
    }
}

impl Machine {
    /// Slots for every core, one for everybody before a second for anybody; space is taken at once.
    pub(super) fn first_grants(&mut self, now: Now, keeper: &mut Keeper) -> Result<Vec<Vec<Grant>>, Refused> {
        let cores = keeper.cores;
        let least = usize::from(cores) * GRANTS_PER_CORE + 1;
        if self.plan.slots_max.is_some_and(|max| max < least) {
            return Err(Refused::NoSpace(format!("disk_quota: {cores} cores need at least {least} segments")));
        }
        let mut grants = vec![Vec::new(); usize::from(cores)];
        for round in 0..GRANTS_PER_CORE {
            for core in (0..cores).map(CoreId) {
                let must = round < GRANTS_TO_START;
                if keeper.segments.free() == 0 {
                    let wanted = keeper.segments.slot_to_make();
                    let wanted = if must { wanted.or_else(|| keeper.segments.unused_number()) } else { wanted };
                    let Some(slot) = wanted else { continue };
                    if !self.has_space(now.mono) {
                        if must {
                            return Err(Refused::NoSpace("no room for a first segment".to_owned()));
                        }
                        continue;
                    }
                    self.disk.create_slot(slot.0, self.plan.segment_size as usize);
                    keeper.segments.add_free(slot);
                }
                let salt = self.rng.draw();
                if let Some(slot) = keeper.segments.grant(core, salt) {
                    grants[usize::from(core.0)].push(Grant { slot, salt, created: now.wall });
                }
            }
        }
        Ok(grants)
    }

    /// Whether a file system that may be full for a while has room for something now.
    fn has_space(&mut self, now: Instant) -> bool {
        if happens(&mut self.rng, self.plan.faults.no_space) {
            self.disk.counts.no_space += 1;
            self.full_until = now + Duration::from_millis(self.rng.between(10, 5_000));
        }
        now >= self.full_until
    }

    /// The thread wakes: it hears what was said, and does everything that is due until a call takes time.
    pub(super) fn keeper_turn(&mut self, now: Now) {
        let Some(mut keeper) = self.keeper.take() else { return };
        keeper.wake_at = None;
        if keeper.job.is_none() && keeper.stopped.is_none() {
            keeper.hear();
            self.keeper_steps(now, &mut keeper);
        }
        self.keeper = Some(keeper);
        self.set_keeper_alarm(now.mono);
    }

    fn keeper_steps(&mut self, now: Now, keeper: &mut Keeper) {
        self.serve(now, keeper);
        if keeper.job.is_some() {
            return;
        }
        if keeper.cycle.as_ref().is_some_and(|cycle| cycle.answers.iter().all(Option::is_some)) {
            self.finish_cycle(now, keeper);
            if keeper.job.is_some() {
                return;
            }
        }
        if keeper.stopped.is_some() {
            return;
        }
        if keeper.cycle.is_none() && (keeper.stopping || now.mono >= keeper.next_checkpoint) {
            let force = keeper.stopping || keeper.first || keeper.urgent || keeper.segments.releasable() > 0;
            keeper.urgent = false;
            let answers = (0..keeper.cores).map(|_| None).collect();
            keeper.cycle = Some(Cycle { started: now.mono, last: keeper.stopping, answers });
            self.tell_all(now.mono, keeper, || FromKeeper::TakeSnapshot { force });
        }
        if self.wants_ahead(now.mono, keeper)
            && let Some(slot) = keeper.segments.slot_to_make()
        {
            keeper.retry_at = None;
            self.begin_job(now.mono, keeper, Job::Make { slot, ahead: true });
        }
    }

    pub(super) fn set_keeper_alarm(&mut self, now: Instant) {
        let Some(keeper) = &self.keeper else { return };
        if keeper.job.is_some() || keeper.stopped.is_some() {
            return;
        }
        let retry = keeper.retry_at.filter(|_| !keeper.pending.is_empty());
        let checkpoint = keeper.cycle.is_none().then_some(keeper.next_checkpoint);
        let at = [retry, checkpoint].into_iter().flatten().min().unwrap_or(now + RETRY_EVERY).max(now);
        self.wake_keeper(at);
    }

    /// Something was said to it, or its alarm is to ring.
    pub(super) fn wake_keeper(&mut self, at: Instant) {
        let Some(keeper) = self.keeper.as_mut() else { return };
        if keeper.job.is_none() && keeper.wake_at.is_none_or(|wakes| at < wakes) {
            keeper.wake_at = Some(at);
            self.schedule(at, Happening::KeeperTurn { at });
        }
    }

    pub(super) fn keeper_wakes_at(&self, at: Instant) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.wake_at == Some(at))
    }

    fn begin_job(&mut self, now: Instant, keeper: &mut Keeper, job: Job) {
        keeper.job = Some(job);
        let takes = self.latency(now, 20, 3_000);
        self.schedule(now + takes, Happening::KeeperJob);
    }

    /// The call that the thread was in has ended, or a part of it.
    pub(super) fn keeper_job(&mut self, now: Now) {
        let Some(mut keeper) = self.keeper.take() else { return };
        match keeper.job.take() {
            None => {}
            Some(Job::SyncDir) => self.disk.sync_dir(),
            Some(Job::Make { slot, ahead }) => {
                if self.has_space(now.mono) {
                    self.disk.create_slot(slot.0, self.plan.segment_size as usize);
                    self.disk.sync_dir();
                    keeper.segments.add_free(slot);
                } else {
                    keeper.retry_at = Some(now.mono + RETRY_EVERY);
                    if !ahead {
                        self.refuse(now.mono, &mut keeper, "No space left on device");
                    }
                }
            }
            Some(Job::Write(writing)) => self.write_on(now, &mut keeper, writing),
        }
        if keeper.job.is_none() && keeper.stopped.is_none() && self.ending.is_none() {
            keeper.hear();
            self.keeper_steps(now, &mut keeper);
        }
        self.keeper = Some(keeper);
        self.set_keeper_alarm(now.mono);
        self.stop_on(now);
    }

    fn quota_percent(&self, keeper: &Keeper) -> u64 {
        self.plan.slots_max.map_or(0, |slots| keeper.segments.used() as u64 * 100 / slots as u64)
    }

    fn serve(&mut self, now: Now, keeper: &mut Keeper) {
        while let Some(core) = keeper.pending.front().copied() {
            if keeper.segments.free() == 0 {
                if !keeper.may_make(now.mono) {
                    break;
                }
                match keeper.segments.slot_to_make() {
                    Some(slot) => return self.begin_job(now.mono, keeper, Job::Make { slot, ahead: false }),
                    None => {
                        keeper.retry_at = Some(now.mono + RETRY_EVERY);
                        self.refuse(now.mono, keeper, "the disk quota is used up");
                        continue;
                    }
                }
            }
            let salt = self.rng.draw();
            let slot = keeper.segments.grant(core, salt).expect("one is free");
            keeper.pending.pop_front();
            keeper.retry_at = None;
            if keeper.given.len() == GRANT_TIMES_MAX {
                keeper.given.pop_front();
            }
            keeper.given.push_back(now.mono);
            self.tell(now.mono, core, FromKeeper::Grant(Grant { slot, salt, created: now.wall }));
        }
        let used = self.quota_percent(keeper);
        if used >= QUOTA_REJECT {
            self.refuse(now.mono, keeper, "the disk quota is nearly used up");
        } else if keeper.no_space && keeper.pending.is_empty() && used < QUOTA_BACK && !keeper.checkpoint_failed {
            keeper.no_space = false;
            keeper.retry_at = None;
            self.tell_all(now.mono, keeper, || FromKeeper::SpaceBack);
        }
    }

    fn refuse(&mut self, now: Instant, keeper: &mut Keeper, reason: &str) {
        if keeper.no_space {
            return;
        }
        keeper.no_space = true;
        self.tell_all(now, keeper, || FromKeeper::NoSpace { reason: reason.to_owned() });
        keeper.hurry(now);
    }

    fn wants_ahead(&self, now: Instant, keeper: &Keeper) -> bool {
        let ahead = keeper.demand(now, AHEAD_WINDOW).clamp(1, AHEAD_MAX);
        keeper.may_make(now)
            && keeper.pending.is_empty()
            && !keeper.no_space
            && keeper.segments.free() < ahead
            && keeper.segments.slot_to_make().is_some()
            && self.quota_percent(keeper) < QUOTA_REJECT
    }

    /// Deletes what is free beyond what is kept; the directory's sync takes time.
    fn delete_surplus(&mut self, now: Instant, keeper: &mut Keeper) {
        if keeper.no_space || !keeper.pending.is_empty() {
            return;
        }
        let keep = (self.plan.spare * usize::from(keeper.cores)).max(keeper.demand(now, DEMAND_WINDOW));
        let mut any = false;
        while let Some(slot) = keeper.segments.take_surplus(keep) {
            self.disk.delete(FileId::Slot(slot.0));
            any = true;
        }
        if any && keeper.job.is_none() {
            self.begin_job(now, keeper, Job::SyncDir);
        }
    }

    fn tell_all(&mut self, now: Instant, keeper: &Keeper, message: impl Fn() -> FromKeeper) {
        for core in (0..keeper.cores).map(CoreId) {
            self.tell(now, core, message());
        }
    }

    // ---- checkpoints --------------------------------------------------------------------------------------------

    /// All cores have answered.
    fn finish_cycle(&mut self, now: Now, keeper: &mut Keeper) {
        let Some(mut cycle) = keeper.cycle.take() else { return };
        let unchanged = |answer: &Option<Answer>| matches!(answer, Some(Answer::Unchanged));
        if cycle.answers.iter().all(unchanged) {
            keeper.next_checkpoint = now.mono + self.plan.checkpoint_interval;
            return self.delete_surplus(now.mono, keeper);
        }
        if cycle.answers.iter().any(unchanged) {
            for (core, answer) in (0..).map(CoreId).zip(&mut cycle.answers) {
                if unchanged(answer) {
                    *answer = None;
                    self.tell(now.mono, core, FromKeeper::TakeSnapshot { force: true });
                }
            }
            keeper.cycle = Some(cycle);
            return;
        }
        let mut snapshots = Vec::new();
        for answer in cycle.answers {
            if let Some(Answer::Snapshot(snapshot)) = answer {
                snapshots.push(*snapshot);
            }
        }
        self.begin_checkpoint(now, keeper, snapshots, cycle.started, cycle.last);
    }

    fn begin_checkpoint(
        &mut self,
        now: Now,
        keeper: &mut Keeper,
        snapshots: Vec<CoreSnapshot>,
        started: Instant,
        last: bool,
    ) {
        let mut streams = Vec::new();
        let mut vshards = vec![VShardState::default(); usize::from(self.plan.vshards)];
        let mut time = WallMs(0);
        for CoreSnapshot { core, snapshot, begun, wall } in snapshots {
            let Snapshot { covered, durable, vshards: states, live } = snapshot;
            assert!(covered <= durable, "core {} covers {covered}, durable is {durable}", core.0);
            let stream = StreamId { incarnation: keeper.incarnation, core: core.0 };
            streams.push(StreamState { stream, covered, durable, sealed: None });
            for (vshard, last_index, state) in states {
                vshards[usize::from(vshard.0)] = VShardState { last_index, state };
            }
            time = time.max(wall);
            let live = live.into_iter().map(|(slot, records, bytes)| (slot, Live { records, bytes })).collect();
            keeper.segments.report(CoreReport { core, covered, live, begun });
        }
        let live = keeper.segments.to_list();
        keeper.sealed.retain(|sealed| live.iter().any(|segment| segment.stream == sealed.stream));
        streams.extend(keeper.sealed.iter().map(|sealed| StreamState {
            stream: sealed.stream,
            covered: sealed.end,
            durable: sealed.end,
            sealed: Some(SealedEnd { end: sealed.end, chain: sealed.chain }),
        }));
        let number = keeper.number + 1;
        let (incarnation, segment_size) = (keeper.incarnation, self.plan.segment_size);
        let checkpoint = Checkpoint { store: STORE, segment_size, number, incarnation, time, streams, live, vshards };
        let bytes = Bytes::from(checkpoint.encode());
        let in_place = self.plan.mistake == Some(HostMistake::CheckpointInPlace);
        let file = FileId::Checkpoint(if in_place { 0 } else { (number % 2) as u8 });
        let grows = self.disk.len(file).is_none_or(|len| len < bytes.len());
        // A free segment is worth less than the checkpoint that frees more.
        let room = !grows || self.has_space(now.mono) || {
            let slot = keeper.segments.take_free();
            if let Some(slot) = slot {
                self.disk.delete(FileId::Slot(slot.0));
                self.disk.sync_dir();
            }
            slot.is_some() && self.rng.percent(50)
        };
        if !room {
            keeper.checkpoint_failed = true;
            self.refuse(now.mono, keeper, "a checkpoint could not be written");
            return self.checkpoint_done(now, keeper, started, last, false);
        }
        self.disk.allocate(file, bytes.len());
        let live = checkpoint.live;
        let writing = Writing { file, number, bytes, written: 0, syncing: None, live, started, last };
        self.begin_job(now.mono, keeper, Job::Write(Box::new(writing)));
    }

    /// Another piece of a checkpoint is written, or its sync has ended.
    fn write_on(&mut self, now: Now, keeper: &mut Keeper, mut writing: Box<Writing>) {
        if let Some(began) = writing.syncing {
            if happens(&mut self.rng, self.plan.faults.sync_eio) {
                self.disk.counts.sync_eio += 1;
                self.disk.fail_sync(writing.file);
                return self.end(Death::Io("syncing a checkpoint failed".to_owned()));
            }
            if self.plan.mistake != Some(HostMistake::CheckpointUnsynced) {
                self.disk.end_sync(writing.file, began);
            }
            keeper.number = writing.number;
            keeper.first = false;
            keeper.checkpoint_failed = false;
            if !keeper.segments.checkpoint_written(&writing.live).is_empty() {
                keeper.retry_at = None;
            }
            return self.checkpoint_done(now, keeper, writing.started, writing.last, true);
        }
        let left = writing.bytes.len() - writing.written;
        let len = left.min(*self.rng.pick(&PIECES));
        let bytes = writing.bytes.slice(writing.written..writing.written + len);
        let piece = InFlight { file: writing.file, offset: writing.written, bytes };
        if happens(&mut self.rng, self.plan.faults.write_eio) {
            self.disk.counts.write_eio += 1;
            self.disk.land_some(&piece);
            return self.end(Death::Io("writing a checkpoint failed".to_owned()));
        }
        self.disk.land(&piece, false);
        writing.written += len;
        if writing.written == writing.bytes.len() {
            writing.syncing = Some(self.disk.begin_sync());
        }
        self.begin_job(now.mono, keeper, Job::Write(writing));
    }

    fn checkpoint_done(&mut self, now: Now, keeper: &mut Keeper, started: Instant, last: bool, written: bool) {
        let took = now.mono - started;
        let pause = self.plan.checkpoint_interval.max(took.saturating_mul(CHECKPOINT_SHARE));
        keeper.next_checkpoint = now.mono + if keeper.no_space { CHECKPOINT_PAUSE.max(took) } else { pause };
        if written {
            self.serve(now, keeper);
            self.delete_surplus(now.mono, keeper);
            if !keeper.stopping {
                for (slot, cores) in keeper.segments.relocations(keeper.no_space) {
                    for core in cores {
                        self.tell(now.mono, core, FromKeeper::Relocate { slot });
                    }
                }
            }
        }
        if last {
            keeper.stopped = Some(written);
        }
    }
}
