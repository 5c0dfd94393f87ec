//! The topics of this core: what becomes of a publish, an acknowledgement, a timeout.
//!
//! Owns: the catalog, the write side of the log and everybody who waits for it. What others must hear leaves through
//! `Turn`. Never: touches a connection, a file or a clock.
//!
//! A message becomes visible (may be delivered, is confirmed) when `Commit` says that its place in the log is as durable
//! as the policy asks; until then it stands in `waiting`.

mod acknowledge;
mod burial;
mod delivery;
mod publish;
mod subscribe;
mod upkeep;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use rustc_hash::FxHashMap;

use crate::limits;
use crate::metrics::{CoreMetrics, Loss};
use crate::planted::planted;
use crate::protocol::code;
use crate::protocol::options::OptionsBuilder;
use crate::protocol::reply::{Body, Deliver, Outcome};
use crate::protocol::request::{Identity, RejectAction, Start, TagRanges, UnsubscribeMode, Version};
use crate::shard::cache::{Cache, Origin};
use crate::shard::catalog::{Catalog, Stored};
use crate::shard::effects::{BacklogRead, Effects, ForKeeper, Snapshot};
use crate::shard::inspect::{SubInfo, SubInfoKind, TopicInfo};
use crate::shard::message::{AckAnswer, Ask, AskPublish, AskSubscribe, Consumer, Tell};
use crate::shard::routing::vshard_of;
use crate::shard::settings::{BacklogOverflow, Overflow, Settings};
use crate::shard::snapshot;
use crate::shard::subscription::{self, Death, Kind, Pick, Poll, Queued};
use crate::shard::timers::{Timer, Timers};
use crate::time::{Duration, Instant, Now, WallMs};
use crate::types::{ConnId, CoreId, Durability, LogRef, Lsn, Qos, Seq, Slot, SubId, TopicId, VShard};
use crate::wal::batch::{AppendError, Class, Grant, Log, Write};
use crate::wal::commit::Commit;
use crate::wal::record::{IdentityRef, Published, Record, published_message};

/// What a turn of the shard works with besides its own state.
pub struct Turn<'a> {
    pub now: Now,
    pub effects: &'a mut Effects,
    pub timers: &'a mut Timers,
    pub metrics: &'a mut CoreMetrics,
    /// For connections of this very core.
    pub tells: &'a mut VecDeque<Tell>,
    pub me: CoreId,
}

impl Turn<'_> {
    fn tell(&mut self, tell: Tell) {
        let core = tell.conn().core();
        if core == self.me { self.tells.push_back(tell) } else { self.effects.core(core).tells.push(tell) }
    }
}

/// Who waits for a place in the log to become durable.
#[derive(Debug)]
enum Waiter {
    Stored {
        topic: TopicId,
        seq: Seq,
        since: Instant,
        priority: u8,
        answer: Option<(ConnId, u64)>,
        remote: Option<(CoreId, u64)>,
    },
    /// A QoS0 message behind a QoS1 message of its topic; or a QoS1 message, for the topic's QoS0 subscriptions.
    Memory {
        topic: TopicId,
        queued: Queued,
        audience: Audience,
    },
    /// The message is in the log already; its first publish may still be on its way there.
    Duplicate {
        conn: ConnId,
        cid: u64,
    },
    Subscribed {
        ask: Box<AskSubscribe>,
        sub: SubId,
        resumed: bool,
    },
    Ok {
        conn: ConnId,
        cid: u64,
    },
    Passed {
        conn: ConnId,
    },
    Relocated {
        topic: TopicId,
        seq: Seq,
        at: LogRef,
    },
}

/// A write under way.
#[derive(Debug)]
struct Writing {
    slot: Slot,
    /// Offset behind it.
    upto: u32,
    new_segment: bool,
}

/// Which subscriptions of a topic get a message from memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Audience {
    All,
    /// Those of QoS1 get it from the log.
    AtMostOnce,
}

/// Live messages of one slot on their way to the log's end.
#[derive(Debug)]
struct Relocation {
    slot: Slot,
    left: VecDeque<(TopicId, Seq)>,
    /// Appended, not yet durable.
    pending: usize,
}

pub struct Topics {
    settings: Arc<Settings>,
    catalog: Catalog,
    log: Log,
    commit: Commit,
    waiting: VecDeque<(Lsn, Waiter)>,
    waiting_qos0_bytes: usize,
    cache: Cache,
    /// How far each slot of this run's stream is written: nothing behind it may be read.
    segment_size: u32,
    written: FxHashMap<Slot, u32>,
    writing: VecDeque<Writing>,
    /// Backlog reads under way, and who waits for each.
    reads: FxHashMap<(Slot, u32), Vec<SubId>>,
    reads_waiting: VecDeque<SubId>,
    /// Subscriptions to be looked at before the turn ends.
    dirty: Vec<SubId>,
    ack_answers: Vec<(SubId, ConnId, u64)>,
    /// Connections that want to know when all they have asked is durable.
    barriers: Vec<ConnId>,
    /// Subscriptions whose acknowledgements the log had no room for.
    acks_held: BTreeSet<SubId>,
    no_space: Option<String>,
    /// Publishes that wait for a segment, and what came behind them. While there are some the core counts as behind, so that
    /// no more are read: what is here was accepted before, and is bounded by that.
    parked: VecDeque<(Option<CoreId>, Box<AskPublish>)>,
    draining: bool,
    /// The log has its last frame: nothing may follow it.
    finished: bool,
    grants_asked: usize,
    snapshot: Option<Snapshot>,
    force_sync: Option<Lsn>,
    relocations: VecDeque<Relocation>,
    /// What the last snapshot covered.
    snapshot_covered: Lsn,
    vshards: Vec<VShard>,
    appended_bytes: u64,
    durable_bytes_at: VecDeque<(Lsn, u64)>,
    in_flight_bytes: u64,
}

impl Topics {
    pub fn new(settings: Arc<Settings>, catalog: Catalog, log: Log, commit: Commit) -> Topics {
        let segment_size = log.segment_size();
        let mine = |v: &VShard| v.core(settings.cores) == settings.core;
        let vshards = (0..settings.vshards).map(VShard).filter(mine).collect();
        let cache = Cache::new(settings.cache_bytes);
        Topics {
            settings,
            catalog,
            log,
            commit,
            waiting: VecDeque::new(),
            waiting_qos0_bytes: 0,
            cache,
            segment_size,
            written: FxHashMap::default(),
            writing: VecDeque::new(),
            reads: FxHashMap::default(),
            reads_waiting: VecDeque::new(),
            dirty: Vec::new(),
            ack_answers: Vec::new(),
            barriers: Vec::new(),
            acks_held: BTreeSet::new(),
            no_space: None,
            parked: VecDeque::new(),
            draining: false,
            finished: false,
            grants_asked: 0,
            snapshot: None,
            force_sync: None,
            relocations: VecDeque::new(),
            snapshot_covered: Lsn(0),
            vshards,
            appended_bytes: 0,
            durable_bytes_at: VecDeque::new(),
            in_flight_bytes: 0,
        }
    }

    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// After recovery: arms what has to happen by itself.
    pub fn start(&mut self, turn: &mut Turn) {
        let mut ids: Vec<SubId> = self.catalog.subs.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.start_idle_clock(id, turn.now.mono);
            self.restore_urgent(id, turn.now);
            self.arm_subscription(id, turn);
            if let Some(sub) = self.catalog.subs.get(&id)
                && let Some(topic) = self.catalog.topics.get(&sub.topic)
            {
                turn.metrics.queue_recovered += sub.backlog(topic);
            }
        }
        let mut topics: Vec<TopicId> = self.catalog.topics.keys().copied().collect();
        topics.sort_unstable();
        for id in topics {
            self.arm_expiry(id, turn);
        }
        self.ask_for_grants(turn);
    }

    fn restore_urgent(&mut self, id: SubId, now: Now) {
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return };
        // What is not visible yet comes by `make_visible`.
        for entry in topic.index.live_from(sub.floor).take_while(|e| e.seq <= topic.visible).filter(|e| e.priority > 0)
        {
            sub.push_urgent(entry, now);
        }
    }

    // ---- the log ------------------------------------------------------------------------------------------------

    /// The next batch to write, if the writer is free to take it.
    pub fn next_write(&mut self, now: WallMs) -> Option<Write> {
        let durable = match self.commit.durable() {
            _ if planted!(WatermarkAhead) => self.log.taken(),
            _ if planted!(WatermarkStuck) => Lsn(0),
            durable => durable,
        };
        let write = self.log.next_write(durable, now)?;
        self.cache.add_tail(write.slot, write.offset, write.bytes.clone());
        let upto = write.offset + write.bytes.len() as u32;
        self.writing.push_back(Writing { slot: write.slot, upto, new_segment: write.new_segment });
        Some(write)
    }

    /// An empty batch that carries the watermark: the witness of the last commit group.
    fn marker(&mut self) {
        // Without room there is no marker: the next frame will carry the watermark.
        _ = self.log.marker();
    }

    pub fn on_written(&mut self, end: Lsn, records: u32, synced: bool, turn: &mut Turn) {
        let writing = self.writing.pop_front();
        if let Some(writing) = &writing {
            self.written.insert(writing.slot, writing.upto);
        }
        self.commit.on_written(end, records, turn.now.mono);
        if synced {
            self.commit.on_synced(end, turn.now.mono);
        } else if self.force_sync.is_some() || writing.is_some_and(|w| w.new_segment && !planted!(RotationNotSynced)) {
            // A segment that is full is synced, whatever the policy: the window of loss is never more than two.
            self.commit.request_sync();
        }
        while let Some((at, bytes)) = self.durable_bytes_at.front().copied() {
            if at > end {
                break;
            }
            self.in_flight_bytes -= bytes;
            self.durable_bytes_at.pop_front();
        }
        self.advance(turn);
    }

    pub fn on_synced(&mut self, upto: Lsn, turn: &mut Turn) {
        self.commit.on_synced(upto, turn.now.mono);
        if self.force_sync.is_some_and(|wanted| upto < wanted) {
            self.commit.request_sync();
        }
        self.advance(turn);
    }

    /// Whether the driver should sync now, and what that will cover.
    pub fn begin_sync(&mut self, now: Instant) -> Option<Lsn> {
        self.commit.sync_wanted(now).then(|| self.commit.on_sync_started())
    }

    pub fn commit_deadline(&self) -> Option<Instant> {
        self.commit.next_deadline()
    }

    /// Time has passed: acknowledgements that were held back, the marker of an idle log.
    pub fn on_tick(&mut self, turn: &mut Turn) {
        if !self.finished && self.settings.idle_marker && self.commit.marker_wanted(turn.now.mono) {
            self.marker();
        }
        self.advance(turn);
    }

    pub fn appended(&self) -> Lsn {
        self.log.appended()
    }

    pub fn durable(&self) -> Lsn {
        self.commit.durable()
    }

    /// Everything appended must become durable soon, whatever the policy.
    pub fn force_sync(&mut self) {
        self.force_sync = Some(self.log.appended());
        self.commit.request_sync();
    }

    /// The last frame of an orderly stop.
    pub fn finish_log(&mut self) {
        self.finished = true;
        if self.log.clean().is_err() {
            tracing::warn!("no room for the log's last frame: the next start will look for a torn tail");
        }
        self.force_sync();
    }

    /// Publishers have to wait: the disk is behind, or the keeper.
    pub fn is_behind(&self) -> bool {
        !self.parked.is_empty() || self.in_flight_bytes > self.settings.in_flight_bytes_max()
    }

    fn append(
        &mut self,
        vshard: VShard,
        record: &Record,
        class: Class,
        now: WallMs,
    ) -> Result<(LogRef, Lsn), AppendError> {
        let appended = self.log.append(vshard, record, class, now)?;
        let bytes = u64::from(appended.at.len);
        self.appended_bytes += bytes;
        self.in_flight_bytes += bytes;
        match self.durable_bytes_at.back_mut() {
            Some((at, sum)) if *at == appended.end => *sum += bytes,
            _ => self.durable_bytes_at.push_back((appended.end, bytes)),
        }
        Ok((appended.at, appended.end))
    }

    pub fn on_grant(&mut self, grant: Grant, turn: &mut Turn) {
        self.log.grant(grant);
        self.grants_asked = self.grants_asked.saturating_sub(1);
        // What the log had no room for is tried again.
        let waits = |s: &&subscription::Subscription| !s.unlogged.is_empty() || !s.dying.is_empty();
        let mut held: Vec<SubId> = self.catalog.subs.values().filter(waits).map(|s| s.id).collect();
        held.sort_unstable();
        for id in held {
            self.mark(id);
        }
        if !planted!(ParkedForgotten) {
            self.take_parked(turn);
        }
        self.ask_for_grants(turn);
    }

    fn ask_for_grants(&mut self, turn: &mut Turn) {
        let wanted = self.log.grants_wanted();
        if wanted > self.grants_asked {
            turn.effects.to_keeper.push(ForKeeper::WantGrant { count: wanted - self.grants_asked });
            self.grants_asked = wanted;
        }
    }

    pub fn on_no_space(&mut self, reason: String, turn: &mut Turn) {
        self.no_space = Some(reason);
        self.take_parked(turn);
    }

    pub fn on_space_back(&mut self) {
        if !planted!(NoSpaceForever) {
            self.no_space = None;
        }
    }

    pub fn drain(&mut self, turn: &mut Turn) {
        self.draining = true;
        self.take_parked(turn);
    }

    /// What the policy allows to be known leaves here: confirms, deliveries, answers.
    fn advance(&mut self, turn: &mut Turn) {
        let upto = self.commit.ack_upto();
        while self.waiting.front().is_some_and(|(at, _)| *at <= upto) {
            let Some((at, waiter)) = self.waiting.pop_front() else { break };
            self.let_go(at, waiter, turn);
        }
        let durable = if planted!(CheckpointAhead) { self.log.appended() } else { self.commit.durable() };
        if self.snapshot.as_ref().is_some_and(|s| s.covered <= durable)
            && let Some(mut snapshot) = self.snapshot.take()
        {
            snapshot.durable = durable;
            turn.effects.to_keeper.push(ForKeeper::Snapshot(snapshot));
        }
        if self.force_sync.is_some_and(|upto| upto <= self.commit.durable()) {
            self.force_sync = None;
        }
    }

    /// The log is as durable up to `at` as the policy asks: the wait is over.
    fn let_go(&mut self, at: Lsn, waiter: Waiter, turn: &mut Turn) {
        match waiter {
            Waiter::Stored { topic, seq, since, priority, answer, remote } => {
                turn.metrics.publish_to_durable.record((turn.now.mono - since).0);
                if let Some((conn, cid)) = answer {
                    let outcome = Outcome::Stored { level: self.commit.level(), position: at };
                    turn.tell(Tell::Confirm { conn, cid, outcome });
                }
                release_forward(remote, turn);
                self.make_visible(topic, seq, priority, turn);
            }
            Waiter::Memory { topic, queued, audience } => {
                self.waiting_qos0_bytes -= queued.body.0.len();
                self.enqueue_qos0(topic, queued, audience, turn);
            }
            Waiter::Duplicate { conn, cid } => {
                let outcome = Outcome::Duplicate { level: self.commit.level(), position: at };
                turn.tell(Tell::Confirm { conn, cid, outcome });
            }
            Waiter::Subscribed { ask, sub, resumed } => self.attach(*ask, sub, resumed, turn),
            Waiter::Ok { conn, cid } => turn.tell(Tell::Ok { conn, cid }),
            Waiter::Passed { conn } => turn.tell(Tell::Passed { conn }),
            Waiter::Relocated { topic, seq, at } => {
                self.catalog.moved(topic, seq, at);
                turn.metrics.relocated_bytes += u64::from(at.len);
                if let Some(relocation) = self.relocations.front_mut() {
                    relocation.pending -= 1;
                }
            }
        }
    }

    fn make_visible(&mut self, topic_id: TopicId, seq: Seq, priority: u8, turn: &mut Turn) {
        let Some(topic) = self.catalog.topics.get_mut(&topic_id) else { return };
        topic.visible = topic.visible.max(seq);
        if priority > 0
            && let Some(entry) = topic.index.get(seq).copied()
        {
            for id in &topic.subs {
                if let Some(sub) = self.catalog.subs.get_mut(id) {
                    sub.push_urgent(&entry, turn.now);
                }
            }
        }
        for id in &topic.subs {
            if let Some(sub) = self.catalog.subs.get_mut(id)
                && !std::mem::replace(&mut sub.dirty, true)
            {
                self.dirty.push(*id);
            }
        }
    }

    // ---- asks ---------------------------------------------------------------------------------------------------

    pub fn on_ask(&mut self, from: Option<CoreId>, ask: Ask, turn: &mut Turn) {
        let remote = from.map(|core| (core, 0));
        match ask {
            Ask::Publish(publish) => return self.on_publish(from, publish, turn),
            Ask::Subscribe(subscribe) => self.on_subscribe(*subscribe, turn),
            Ask::Poll { who, sub, cid } => self.on_poll(who, sub, cid, turn),
            Ask::Ack { who, sub, tags, answer } => self.on_ack(who, sub, &tags, answer, turn),
            Ask::Reject { who, sub, tags, action } => self.on_reject(who, sub, &tags, action, turn),
            Ask::Credit { who, sub, credit } => {
                if let Some(consumer) = self.catalog.subs.get_mut(&sub).and_then(|s| s.consumer_mut(who)) {
                    consumer.credit = credit;
                    self.mark(sub);
                }
            }
            Ask::Barrier { conn } => self.barriers.push(conn),
            Ask::Unsubscribe { who, sub, mode, cid } => self.on_unsubscribe(who, sub, mode, cid, turn),
            Ask::Taken { who, sub, messages, bytes } => {
                if let Some(consumer) = self.catalog.subs.get_mut(&sub).and_then(|s| s.consumer_mut(who)) {
                    consumer.under_way_messages -= messages as usize;
                    consumer.under_way_bytes -= bytes as usize;
                    self.mark(sub);
                }
            }
        }
        release_forward(remote, turn);
    }

    fn mark(&mut self, id: SubId) {
        if let Some(sub) = self.catalog.subs.get_mut(&id)
            && !std::mem::replace(&mut sub.dirty, true)
        {
            self.dirty.push(id);
        }
    }
}

/// How a dead-letter topic's own queue is called by those who subscribe to it.
pub const DEAD_LETTERS_NAME: &[u8] = b"dead-letters";
/// Expired messages are cleared away at most this often.
const EXPIRY_STEP_MS: u64 = 200;
/// A wait longer than an hour is measured in milliseconds.
const STAMP_GOOD_FOR_MS: u64 = 3_600_000;
/// Messages copied per turn while a segment is being emptied.
const RELOCATIONS_PER_TURN: usize = 256;

const UNKNOWN_TAG: Bytes = Bytes::from_static(code::UNKNOWN_DELIVERY.text.as_bytes());

fn append_failed(error: AppendError) -> (u16, Bytes) {
    let code = match error {
        AppendError::Full => code::STORAGE_FULL,
        AppendError::TooLarge { .. } => code::TOO_LARGE,
    };
    (code, Bytes::from(error.to_string()))
}

struct Outgoing {
    seq: Seq,
    qos: Qos,
    attempt: u16,
    redelivered: bool,
    stamp: u32,
    published: WallMs,
    body: Body,
}

fn deliver(
    sub: &mut subscription::Subscription,
    topic: &crate::shard::topic::Topic,
    index: usize,
    message: Outgoing,
    turn: &mut Turn,
) {
    let tag = sub.tag(message.seq);
    sub.delivered += 1;
    turn.metrics.delivered.add(message.qos, 1);
    if message.attempt == 1 && !message.redelivered {
        let waited_ms = turn.now.wall.0.saturating_sub(message.published.0);
        // The stamp is fine, but goes round in 71 minutes.
        let fine = Duration(u64::from(turn.now.mono.stamp().wrapping_sub(message.stamp)) * 1000);
        let waited = if waited_ms < STAMP_GOOD_FOR_MS { fine } else { Duration::from_millis(waited_ms) };
        turn.metrics.publish_to_deliver.record(waited.0);
    }
    let consumer = &mut sub.consumers[index];
    consumer.under_way_messages += 1;
    consumer.under_way_bytes += message.body.0.len();
    // v1: the tag for QoS1, the POLL's own id for QoS0 (V1 B15).
    let poll = consumer.poll.take();
    let cid = match message.qos {
        Qos::AtLeastOnce => tag.0,
        Qos::AtMostOnce => poll.map_or(0, |p| p.cid),
    };
    let who = consumer.who;
    let name = if consumer.version == Version::V1 { topic.name.clone() } else { Bytes::new() };
    let deliver = Deliver {
        sub: who.sub,
        tag,
        cid,
        qos: message.qos,
        attempt: message.attempt,
        redelivered: message.redelivered,
        published_ms: message.published.0,
        topic: name,
        body: message.body,
    };
    turn.tell(Tell::Deliver { conn: who.conn, deliver });
}

/// Room at the core that forwarded a request is given back.
fn release_forward(remote: Option<(CoreId, u64)>, turn: &mut Turn) {
    if let Some((core, bytes)) = remote {
        let batch = turn.effects.core(core);
        batch.released += 1;
        batch.released_bytes += bytes;
    }
}

fn make_body(options: &[u8], payload: &[u8]) -> Body {
    let mut body = BytesMut::with_capacity(2 + options.len() + payload.len());
    body.put_u16(options.len() as u16);
    body.extend_from_slice(options);
    body.extend_from_slice(payload);
    Body(body.freeze())
}

/// The delay after the `nth` failure: doubles with each.
fn backed_off(base: Duration, nth: u16) -> Duration {
    base.saturating_mul(1 << u32::from(nth.saturating_sub(1)).min(limits::RETRY_DOUBLINGS_MAX))
}
