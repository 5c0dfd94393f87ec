//! The topics of this core: what becomes of a publish, an acknowledgement, a timeout.
//!
//! Owns: the catalog, the write side of the log and everybody who waits for it. What others must hear leaves through
//! `Turn`. Never: touches a connection, a file or a clock.
//!
//! A message becomes visible (may be delivered, is confirmed) when `Commit` says that its place in the log is as durable
//! as the policy asks; until then it stands in `waiting`.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use rustc_hash::FxHashMap;

use crate::limits;
use crate::metrics::{CoreMetrics, Loss};
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
use crate::types::{ConnId, CoreId, DeliveryTag, Durability, LogRef, Lsn, Qos, Seq, Slot, SubId, TopicId, VShard};
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
    /// A QoS0 message behind a QoS1 message of its topic.
    Memory {
        topic: TopicId,
        queued: Queued,
    },
    Confirm {
        conn: ConnId,
        cid: u64,
        outcome: Outcome,
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
    Relocated {
        topic: TopicId,
        seq: Seq,
        at: LogRef,
    },
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
    writing: VecDeque<(Slot, u32)>,
    /// Backlog reads under way, and who waits for each.
    reads: FxHashMap<(Slot, u32), Vec<SubId>>,
    reads_waiting: VecDeque<SubId>,
    /// Subscriptions to be looked at before the turn ends.
    dirty: Vec<SubId>,
    ack_answers: Vec<(SubId, ConnId, u64)>,
    no_space: Option<String>,
    draining: bool,
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
            no_space: None,
            draining: false,
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
        for entry in topic.index.live_from(sub.floor).filter(|e| e.priority > 0) {
            sub.push_urgent(entry, now);
        }
    }

    // ---- the log ------------------------------------------------------------------------------------------------

    /// The next batch to write, if the writer is free to take it.
    pub fn next_write(&mut self, now: WallMs) -> Option<Write> {
        let write = self.log.next_write(self.commit.durable(), now)?;
        self.cache.add_tail(write.slot, write.offset, write.bytes.clone());
        self.writing.push_back((write.slot, write.offset + write.bytes.len() as u32));
        Some(write)
    }

    /// An empty batch that carries the watermark: the witness of the last commit group.
    fn marker(&mut self) {
        // Without room there is no marker: the next frame will carry the watermark.
        _ = self.log.marker();
    }

    pub fn on_written(&mut self, end: Lsn, records: u32, synced: bool, turn: &mut Turn) {
        if let Some((slot, upto)) = self.writing.pop_front() {
            self.written.insert(slot, upto);
        }
        self.commit.on_written(end, records, turn.now.mono);
        if synced {
            self.commit.on_synced(end, turn.now.mono);
        } else if self.force_sync.is_some() {
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
        if self.settings.idle_marker && self.commit.marker_wanted(turn.now.mono) {
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
        if self.log.clean().is_err() {
            tracing::warn!("no room for the log's last frame: the next start will look for a torn tail");
        }
        self.force_sync();
    }

    /// Publishers have to wait: the disk is behind.
    pub fn is_behind(&self) -> bool {
        self.in_flight_bytes > limits::LOG_BYTES_IN_FLIGHT_MAX as u64
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
        self.ask_for_grants(turn);
    }

    fn ask_for_grants(&mut self, turn: &mut Turn) {
        let wanted = self.log.grants_wanted();
        if wanted > self.grants_asked {
            turn.effects.to_keeper.push(ForKeeper::WantGrant { count: wanted - self.grants_asked });
            self.grants_asked = wanted;
        }
    }

    pub fn on_no_space(&mut self, reason: String) {
        self.no_space = Some(reason);
    }

    pub fn on_space_back(&mut self) {
        self.no_space = None;
    }

    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// What the policy allows to be known leaves here: confirms, deliveries, answers.
    fn advance(&mut self, turn: &mut Turn) {
        let upto = self.commit.ack_upto();
        let level = self.commit.level();
        while self.waiting.front().is_some_and(|(at, _)| *at <= upto) {
            let Some((at, waiter)) = self.waiting.pop_front() else { break };
            match waiter {
                Waiter::Stored { topic, seq, since, priority, answer, remote } => {
                    turn.metrics.publish_to_durable.record((turn.now.mono - since).0);
                    if let Some((conn, cid)) = answer {
                        let outcome = Outcome::Stored { level, position: at };
                        turn.tell(Tell::Confirm { conn, cid, outcome });
                    }
                    release_forward(remote, turn);
                    self.make_visible(topic, seq, priority, turn);
                }
                Waiter::Memory { topic, queued } => {
                    self.waiting_qos0_bytes -= queued.body.0.len();
                    self.enqueue_qos0(topic, queued, turn);
                }
                Waiter::Confirm { conn, cid, outcome } => turn.tell(Tell::Confirm { conn, cid, outcome }),
                Waiter::Subscribed { ask, sub, resumed } => self.attach(*ask, sub, resumed, turn),
                Waiter::Ok { conn, cid } => turn.tell(Tell::Ok { conn, cid }),
                Waiter::Relocated { topic, seq, at } => {
                    self.catalog.moved(topic, seq, at);
                    turn.metrics.relocated_bytes += u64::from(at.len);
                    if let Some(relocation) = self.relocations.front_mut() {
                        relocation.pending -= 1;
                    }
                }
            }
        }
        if self.snapshot.as_ref().is_some_and(|s| s.covered <= self.commit.durable())
            && let Some(mut snapshot) = self.snapshot.take()
        {
            snapshot.durable = self.commit.durable();
            turn.effects.to_keeper.push(ForKeeper::Snapshot(snapshot));
        }
        if self.force_sync.is_some_and(|upto| upto <= self.commit.durable()) {
            self.force_sync = None;
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
            Ask::Publish(publish) => return self.on_publish(from, *publish, turn),
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

    // ---- publish ------------------------------------------------------------------------------------------------

    fn on_publish(&mut self, from: Option<CoreId>, publish: AskPublish, turn: &mut Turn) {
        turn.metrics.publishes_received.add(publish.qos, 1);
        let remote = from.map(|core| (core, publish.weight() as u64));
        if self.draining {
            let text = Bytes::from_static(b"log corruption: write-ahead log not available: broker shutting down");
            self.refuse(&publish, code::SHUTTING_DOWN, text, remote, turn);
            return;
        }
        match publish.qos {
            Qos::AtMostOnce => self.publish_memory(publish, remote, turn),
            Qos::AtLeastOnce => self.publish_stored(publish, remote, turn),
        }
    }

    fn refuse(&self, publish: &AskPublish, code: u16, reason: Bytes, remote: Option<(CoreId, u64)>, turn: &mut Turn) {
        turn.metrics.publishes_rejected.add(code, 1);
        let (conn, cid) = (publish.conn, publish.cid);
        match publish.version {
            Version::V1 if publish.qos == Qos::AtLeastOnce => {
                let mut text = BytesMut::from(code::DURABLE_PUBLISH_FAILED.as_bytes());
                text.extend_from_slice(&reason);
                turn.tell(Tell::Error { conn, cid, code: code::INTERNAL, text: text.freeze() });
            }
            Version::V1 => {}
            Version::V2 if publish.confirm => {
                turn.tell(Tell::Confirm { conn, cid, outcome: Outcome::Rejected { code, text: reason } });
            }
            Version::V2 => turn.tell(Tell::Error { conn, cid, code, text: reason }),
        }
        release_forward(remote, turn);
    }

    fn ttl_end(&self, publish: &AskPublish, now: WallMs) -> WallMs {
        let default = match publish.version {
            Version::V1 => self.settings.v1_ttl,
            Version::V2 => self.settings.ttl,
        };
        let ttl = publish.ttl.unwrap_or(default);
        // The life of a delayed message begins when its delay ends.
        let from = now.0.saturating_add(publish.delay.as_millis());
        if ttl == Duration::ZERO { WallMs(0) } else { WallMs(from.saturating_add(ttl.as_millis().max(1))) }
    }

    fn publish_memory(&mut self, publish: AskPublish, remote: Option<(CoreId, u64)>, turn: &mut Turn) {
        let now = turn.now.wall;
        let expires = self.ttl_end(&publish, now);
        let topic = self.catalog.topic_named(&publish.topic).and_then(|id| self.catalog.topics.get_mut(&id));
        let mut outcome = Outcome::Stored { level: Durability::Memory, position: Lsn(0) };
        match topic {
            Some(topic) if !topic.subs.is_empty() => {
                let duplicate = publish
                    .identity
                    .as_ref()
                    .is_some_and(|identity| topic.dedup.is_duplicate(identity, now, self.settings.dedup_window));
                if duplicate {
                    turn.metrics.publishes_duplicate += 1;
                    outcome = Outcome::Duplicate { level: Durability::Memory, position: Lsn(0) };
                } else {
                    if let Some(identity) = &publish.identity {
                        topic.dedup.remember(identity, now, self.settings.dedup_window);
                    }
                    turn.metrics.published.add(Qos::AtMostOnce, 1);
                    topic.published += 1;
                    let body = make_body(&publish.options, &publish.payload);
                    let queued = Queued { seq: topic.take_seq(), published: now, expires, body };
                    let (id, behind) = (topic.id, topic.last_end > self.commit.ack_upto());
                    if !behind {
                        self.enqueue_qos0(id, queued, turn);
                    } else if self.waiting_qos0_bytes > self.settings.qos0_bytes {
                        let queues = self.catalog.topics.get(&id).map_or(0, |t| t.subs.len() as u64);
                        turn.metrics.queue_in += queues;
                        turn.metrics.lost.add(Loss::DroppedNew, queues);
                    } else {
                        // It must not overtake the stored messages in front of it.
                        self.waiting_qos0_bytes += queued.body.0.len();
                        self.waiting.push_back((self.log.appended(), Waiter::Memory { topic: id, queued }));
                    }
                }
            }
            _ => {
                turn.metrics.published.add(Qos::AtMostOnce, 1);
                turn.metrics.publishes_unrouted += 1;
            }
        }
        if publish.confirm {
            turn.tell(Tell::Confirm { conn: publish.conn, cid: publish.cid, outcome });
        }
        release_forward(remote, turn);
    }

    fn enqueue_qos0(&mut self, topic_id: TopicId, queued: Queued, turn: &mut Turn) {
        let Some(topic) = self.catalog.topics.get(&topic_id) else { return };
        // Indices, since a full queue is dispatched in between.
        for i in 0..topic.subs.len() {
            let Some(id) = self.catalog.topics.get(&topic_id).and_then(|t| t.subs.get(i).copied()) else { break };
            let copy = Queued { body: queued.body.clone(), ..queued };
            self.push_qos0(id, copy, turn);
        }
    }

    fn push_qos0(&mut self, id: SubId, queued: Queued, turn: &mut Turn) {
        let (messages, bytes) = (self.settings.qos0_messages, self.settings.qos0_bytes);
        turn.metrics.queue_in += 1;
        if self.catalog.subs.get(&id).is_some_and(|s| s.qos0_full(messages, bytes)) {
            self.dispatch(id, turn);
        }
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        if sub.qos0_full(messages, bytes) {
            match self.settings.qos0_overflow {
                Overflow::DropNew => {
                    turn.metrics.lost.add(Loss::DroppedNew, 1);
                    return;
                }
                Overflow::DropOldest => {
                    sub.pop_qos0();
                    turn.metrics.lost.add(Loss::DroppedOldest, 1);
                }
            }
        }
        sub.push_qos0(queued);
        self.mark(id);
    }

    fn publish_stored(&mut self, publish: AskPublish, remote: Option<(CoreId, u64)>, turn: &mut Turn) {
        let now = turn.now.wall;
        if let Some(reason) = &self.no_space {
            let text = Bytes::from(format!("storage full: {reason}"));
            return self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
        }
        if self.catalog.entries() >= self.settings.entries_max {
            let text = Bytes::from_static(
                b"backlog too large: its index would exceed the memory budget ([storage] memory_budget)",
            );
            return self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
        }
        let id = match self.topic_for(&publish.topic, turn) {
            Ok(id) => id,
            Err((code, text)) => return self.refuse(&publish, code, text, remote, turn),
        };
        let window = self.settings.dedup_window;
        let Some(topic) = self.catalog.topics.get(&id) else { return };
        if publish.identity.as_ref().is_some_and(|identity| topic.dedup.is_duplicate(identity, now, window)) {
            turn.metrics.publishes_duplicate += 1;
            if publish.confirm {
                let outcome = Outcome::Duplicate { level: self.commit.level(), position: self.log.appended() };
                let waiter = Waiter::Confirm { conn: publish.conn, cid: publish.cid, outcome };
                self.wait(self.log.appended(), waiter, turn);
            }
            return release_forward(remote, turn);
        }
        if let Err(text) = self.make_room_in_backlogs(id, turn) {
            return self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
        }
        let Some(topic) = self.catalog.topics.get(&id) else { return };
        let seq = topic.next_seq;
        let expires = self.ttl_end(&publish, now);
        let delay = publish.delay.as_millis();
        let not_before = if delay == 0 { WallMs(0) } else { WallMs(now.0.saturating_add(delay)) };
        let record = Record::Published(Published {
            topic: id.index,
            seq,
            published: now,
            expires,
            not_before,
            priority: publish.priority,
            identity: publish.identity.as_ref().map(|identity| match identity {
                Identity::MessageId(id) => IdentityRef::MessageId(id),
                Identity::Publisher { id, sequence } => IdentityRef::Publisher { id: *id, sequence: *sequence },
            }),
            options: &publish.options,
            payload: &publish.payload,
        });
        let (at, end) = match self.append(id.vshard, &record, Class::Publish, now) {
            Ok(appended) => appended,
            Err(error) => {
                let (code, text) = append_failed(error);
                return self.refuse(&publish, code, text, remote, turn);
            }
        };
        turn.metrics.published.add(Qos::AtLeastOnce, 1);
        turn.metrics.wal_appends += 1;
        turn.metrics.wal_bytes += u64::from(at.len);
        let stored = Stored {
            seq,
            at,
            priority: publish.priority,
            published: now,
            expires,
            not_before,
            identity: publish.identity,
        };
        let refs = self.catalog.store(id, &stored, window);
        turn.metrics.queue_in += u64::from(refs);
        let Some(topic) = self.catalog.topics.get_mut(&id) else { return };
        topic.last_end = end;
        topic.published += 1;
        if topic.subs.is_empty() {
            turn.metrics.publishes_unrouted += 1;
        }
        let has_qos0_subs = topic.has_qos0_subs();
        if expires.0 != 0 && refs > 0 && topic.expiry_timer.is_none() {
            self.arm_expiry(id, turn);
        }
        let answer = publish.confirm.then_some((publish.conn, publish.cid));
        let waiter =
            Waiter::Stored { topic: id, seq, since: turn.now.mono, priority: publish.priority, answer, remote };
        self.waiting.push_back((end, waiter));
        if has_qos0_subs {
            // For QoS0 subscriptions it is a QoS0 message, but not before it is as durable as promised.
            let body = make_body(&publish.options, &publish.payload);
            self.waiting_qos0_bytes += body.0.len();
            let queued = Queued { seq, published: now, expires, body };
            self.waiting.push_back((end, Waiter::Memory { topic: id, queued }));
        }
    }

    /// Answers at once if everything up to `at` is durable enough already.
    fn wait(&mut self, at: Lsn, waiter: Waiter, turn: &mut Turn) {
        self.waiting.push_back((at, waiter));
        if at <= self.commit.ack_upto() {
            self.advance(turn);
        }
    }

    /// Bounded subscriptions: refuses, or gives up the oldest message.
    fn make_room_in_backlogs(&mut self, id: TopicId, turn: &mut Turn) -> Result<(), Bytes> {
        let (messages, bytes) = (self.settings.backlog_messages, self.settings.backlog_bytes);
        if messages == 0 && bytes == 0 {
            return Ok(());
        }
        let Some(topic) = self.catalog.topics.get(&id) else { return Ok(()) };
        let full: Vec<SubId> = topic
            .subs
            .iter()
            .filter_map(|id| self.catalog.subs.get(id))
            .filter(|s| s.qos == Qos::AtLeastOnce)
            .filter(|s| {
                (messages > 0 && s.backlog(topic) >= messages)
                    || (bytes > 0 && s.backlog(topic) > 0 && topic.index.live_bytes() >= bytes)
            })
            .map(|s| s.id)
            .collect();
        for sub_id in full {
            if self.settings.backlog_overflow == BacklogOverflow::Reject {
                let text = "backlog full: a subscription of this topic has reached [delivery] backlog_messages or backlog_bytes";
                return Err(Bytes::from_static(text.as_bytes()));
            }
            let Some(sub) = self.catalog.subs.get(&sub_id) else { continue };
            let Some(topic) = self.catalog.topics.get(&id) else { continue };
            let oldest = topic.index.live_from(sub.floor).map(|e| e.seq).find(|s| sub.wants(*s));
            if let Some(seq) = oldest {
                self.finish(sub_id, seq, true);
                turn.metrics.lost.add(Loss::DroppedOldest, 1);
            }
        }
        Ok(())
    }

    /// The topic of that name; it is created if there is none.
    fn topic_for(&mut self, name: &Bytes, turn: &mut Turn) -> Result<TopicId, (u16, Bytes)> {
        if let Some(id) = self.catalog.topic_named(name) {
            return Ok(id);
        }
        if self.catalog.topics.len() >= limits::TOPICS_PER_CORE_MAX {
            return Err((code::LIMIT, Bytes::from_static(b"too many topics")));
        }
        let vshard = vshard_of(name, &self.settings.dead_letter_suffix, self.settings.vshards);
        let id = self.catalog.next_topic_id(vshard);
        let record = Record::TopicCreated { topic: id.index, name };
        self.append(vshard, &record, Class::Publish, turn.now.wall).map_err(append_failed)?;
        self.catalog.create_topic(id, Bytes::copy_from_slice(name));
        Ok(id)
    }

    fn is_dead_letter_topic(&self, name: &[u8]) -> bool {
        let suffix = &self.settings.dead_letter_suffix;
        !suffix.is_empty() && name.len() > suffix.len() && name.ends_with(suffix)
    }

    // ---- subscribe ----------------------------------------------------------------------------------------------

    fn on_subscribe(&mut self, ask: AskSubscribe, turn: &mut Turn) {
        let (who, cid) = (ask.who, ask.cid);
        if let Err((code, text)) = self.subscribe(ask, turn) {
            turn.metrics.requests_rejected.add(code, 1);
            turn.tell(Tell::Refused { who, cid, code, text });
        }
    }

    fn subscribe(&mut self, ask: AskSubscribe, turn: &mut Turn) -> Result<(), (u16, Bytes)> {
        let subscribe = &ask.subscribe;
        if subscribe.durable.is_some() && subscribe.qos == Qos::AtMostOnce {
            return Err((code::INVALID, Bytes::from_static(b"a durable subscription needs QoS 1")));
        }
        let topic_id = self.topic_for(&subscribe.topic, turn)?;
        let existing = match (&subscribe.durable, ask.version) {
            (Some(name), _) => self.existing_durable(topic_id, name),
            (None, Version::V1) if subscribe.qos == Qos::AtLeastOnce => self.catalog.adopt(topic_id, ask.key),
            (None, _) => None,
        };
        if let Some(id) = existing {
            let pending = self.catalog.subs.get(&id).map_or(Lsn(0), |s| s.created_end);
            self.wait(
                pending.max(self.commit.ack_upto()),
                Waiter::Subscribed { ask: Box::new(ask), sub: id, resumed: true },
                turn,
            );
            return Ok(());
        }
        let Some(topic) = self.catalog.topics.get(&topic_id) else { return Ok(()) };
        if topic.subs.len() >= limits::SUBS_PER_TOPIC_MAX {
            return Err((code::LIMIT, Bytes::from_static(b"too many subscriptions of this topic")));
        }
        // A v1 client cannot ask for what a dead-letter topic keeps, so it gets it.
        let earliest = subscribe.start == Start::Earliest
            || (ask.version == Version::V1 && self.is_dead_letter_topic(&subscribe.topic));
        let start = match (subscribe.qos, earliest) {
            (Qos::AtLeastOnce, true) => topic.index.next_live(Seq(0)).map_or(topic.next_seq, |e| e.seq),
            _ => topic.next_seq,
        };
        let kind = match (&subscribe.durable, ask.version, subscribe.qos) {
            (Some(name), _, _) => Kind::Durable { name: Bytes::copy_from_slice(name) },
            (None, Version::V1, Qos::AtLeastOnce) => Kind::Orphan { key: ask.key },
            _ => Kind::Ephemeral,
        };
        let id = self.catalog.next_sub_id(topic_id.vshard);
        let mut end = self.commit.ack_upto();
        if let Some(logged) = kind.logged() {
            let created = turn.now.wall;
            let record = Record::SubCreated { sub: id.index, topic: topic_id.index, kind: logged, start, created };
            (_, end) = self.append(topic_id.vshard, &record, Class::Control, turn.now.wall).map_err(append_failed)?;
        }
        self.catalog.create_sub(id, topic_id, kind, subscribe.qos, start);
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.created_end = end;
            if let Some(topic) = self.catalog.topics.get(&topic_id) {
                turn.metrics.queue_in += sub.backlog(topic);
            }
        }
        self.restore_urgent(id, turn.now);
        self.wait(end, Waiter::Subscribed { ask: Box::new(ask), sub: id, resumed: false }, turn);
        Ok(())
    }

    /// A dead-letter topic's own queue goes by the name `dead-letters`.
    fn existing_durable(&self, topic: TopicId, name: &Bytes) -> Option<SubId> {
        let held = (name.as_ref() == DEAD_LETTERS_NAME).then(|| self.catalog.dead_letters_of(topic)).flatten();
        held.or_else(|| self.catalog.durable_named(topic, name))
    }

    /// The subscription is on the log: its consumer may begin.
    fn attach(&mut self, ask: AskSubscribe, id: SubId, resumed: bool, turn: &mut Turn) {
        let who = ask.who;
        let Some(sub) = self.catalog.subs.get_mut(&id) else {
            let text = Bytes::from_static(b"the subscription was deleted meanwhile");
            return turn.tell(Tell::Refused { who, cid: ask.cid, code: code::UNKNOWN, text });
        };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return };
        sub.ends_at = None;
        if matches!(sub.kind, Kind::Orphan { .. }) {
            sub.restart_tags(topic);
        }
        sub.consumers.push(subscription::Consumer {
            who,
            version: ask.version,
            priority: ask.subscribe.priority,
            credit: ask.subscribe.credit,
            in_flight: 0,
            under_way_messages: 0,
            under_way_bytes: 0,
            ack_timeout: ask.subscribe.ack_timeout.unwrap_or(self.settings.ack_timeout),
            poll: None,
        });
        let backlog = sub.backlog(topic);
        turn.tell(Tell::Subscribed { who, cid: ask.cid, sub: id, resumed, backlog });
        self.mark(id);
    }

    fn on_unsubscribe(&mut self, who: Consumer, id: SubId, mode: UnsubscribeMode, cid: Option<u64>, turn: &mut Turn) {
        let known = self.catalog.subs.get_mut(&id).is_some_and(|sub| sub.detach(who));
        let mut wait_for = self.commit.ack_upto();
        if known {
            let empty = self.catalog.subs.get(&id).is_some_and(|s| s.consumers.is_empty());
            let ephemeral = self.catalog.subs.get(&id).is_some_and(|s| s.kind == Kind::Ephemeral);
            if mode == UnsubscribeMode::Delete || (ephemeral && empty) {
                let loss = if mode == UnsubscribeMode::Delete { Loss::Purged } else { Loss::DroppedDetached };
                match self.end_subscription(id, loss, turn) {
                    Ok(end) => wait_for = end,
                    Err(error) => {
                        if let Some(cid) = cid {
                            let (code, text) = append_failed(error);
                            turn.tell(Tell::Error { conn: who.conn, cid, code, text });
                        }
                        return;
                    }
                }
            } else {
                self.start_idle_clock(id, turn.now.mono);
                self.mark(id);
            }
        }
        if let Some(cid) = cid {
            self.wait(wait_for, Waiter::Ok { conn: who.conn, cid }, turn);
        }
    }

    /// Without consumers, an orphan or a durable queue lives for a while only.
    fn start_idle_clock(&mut self, id: SubId, now: Instant) {
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        if !sub.consumers.is_empty() {
            return;
        }
        let idle = self.settings.durable_idle_ttl;
        match sub.kind {
            Kind::Orphan { key } => {
                sub.ends_at = Some(now + self.settings.orphan_ttl);
                let topic = sub.topic;
                self.catalog.orphan(topic, key, id);
            }
            Kind::Durable { .. } if idle != Duration::ZERO => sub.ends_at = Some(now + idle),
            _ => {}
        }
    }

    /// Deletes a subscription and what it has not finished. Returns where the log says so.
    fn end_subscription(&mut self, id: SubId, loss: Loss, turn: &mut Turn) -> Result<Lsn, AppendError> {
        let logged = self.catalog.subs.get(&id).is_some_and(|s| s.kind.is_logged());
        let mut end = self.commit.ack_upto();
        if logged {
            let record = Record::SubDeleted { sub: id.index };
            (_, end) = self.append(id.vshard, &record, Class::Control, turn.now.wall)?;
        }
        if let Some((mut sub, purged)) = self.catalog.delete_sub(id) {
            turn.metrics.lost.add(loss, purged + sub.qos0_len() as u64);
            turn.timers.set(Timer::Subscription(id), &mut sub.timer, None);
            for consumer in &sub.consumers {
                turn.tell(Tell::Ended { who: consumer.who });
            }
        }
        Ok(end)
    }

    // ---- poll, ack, reject --------------------------------------------------------------------------------------

    fn on_poll(&mut self, who: Consumer, id: SubId, cid: u64, turn: &mut Turn) {
        let lapses = turn.now.mono + self.settings.poll_park;
        if let Some(consumer) = self.catalog.subs.get_mut(&id).and_then(|s| s.consumer_mut(who)) {
            consumer.poll = Some(Poll { cid, lapses });
        }
        self.look_after(id, turn);
        let parking = self.settings.poll_park != Duration::ZERO;
        if !parking
            && let Some(sub) = self.catalog.subs.get_mut(&id)
            && !sub.reading
            && let Some(consumer) = sub.consumer_mut(who)
        {
            consumer.poll = None;
        }
        turn.tell(Tell::Settled { conn: who.conn });
    }

    fn on_ack(&mut self, who: Consumer, id: SubId, tags: &TagRanges, answer: AckAnswer, turn: &mut Turn) {
        let mut known = 0;
        for (first, last) in &tags.0 {
            for seq in self.delivered_in(id, *first, *last, who) {
                self.finish(id, seq, true);
                known += 1;
            }
        }
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.acked += known;
            turn.metrics.acked += known;
            turn.metrics.queue_out.add(Qos::AtLeastOnce, known);
        }
        if known == 0 {
            turn.metrics.acks_unknown += 1;
        }
        self.mark(id);
        let conn = who.conn;
        match answer {
            AckAnswer::V1 { cid } if known == 0 => {
                turn.tell(Tell::Error { conn, cid, code: code::UNKNOWN, text: UNKNOWN_TAG });
                turn.tell(Tell::Settled { conn });
            }
            AckAnswer::V1 { .. } => turn.tell(Tell::Settled { conn }),
            AckAnswer::Confirm { cid } if known == 0 => {
                turn.tell(Tell::Error { conn, cid, code: code::UNKNOWN, text: UNKNOWN_TAG });
            }
            AckAnswer::Confirm { cid } => self.ack_answers.push((id, conn, cid)),
            AckAnswer::None => {}
        }
    }

    fn delivered_in(&self, id: SubId, first: DeliveryTag, last: DeliveryTag, who: Consumer) -> Vec<Seq> {
        match self.catalog.subs.get(&id) {
            Some(sub) => sub.delivered_in(sub.seq(first), sub.seq(last), who),
            None => Vec::new(),
        }
    }

    fn on_reject(&mut self, who: Consumer, id: SubId, tags: &TagRanges, action: RejectAction, turn: &mut Turn) {
        for (first, last) in &tags.0 {
            for seq in self.delivered_in(id, *first, *last, who) {
                self.failed(id, seq, Some(action), turn);
            }
        }
        self.mark(id);
    }

    /// A delivery has timed out (`action` is `None`) or was rejected.
    fn failed(&mut self, id: SubId, seq: Seq, action: Option<RejectAction>, turn: &mut Turn) {
        let max = self.settings.max_retries;
        let backoff = self.settings.retry_backoff;
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return };
        let failures = sub.fail(seq);
        let suffix = &self.settings.dead_letter_suffix;
        let can_die = suffix.is_empty() || !topic.name.ends_with(suffix);
        if can_die && action == Some(RejectAction::DeadLetter) {
            return sub.die(seq, Death::Rejected);
        }
        if can_die && max > 0 && failures >= max {
            return sub.die(seq, Death::MaxRetries);
        }
        let v1 = sub.touched.get(&seq).and_then(|t| t.last).and_then(|who| sub.consumer_mut(who).map(|c| c.version))
            == Some(Version::V1);
        match action {
            Some(RejectAction::RequeueAfter(delay)) => sub.delay(seq, turn.now.mono + delay),
            // v1's redelivery timer has grown with the attempts already.
            None if !v1 => sub.delay(seq, turn.now.mono + backed_off(backoff, failures)),
            _ => sub.requeue(seq),
        }
        if sub.kind.is_logged() {
            let record = Record::Failed { sub: id.index, seq, failures };
            // Not logged for want of space: after a restart it is tried once more.
            _ = self.append(id.vshard, &record, Class::Control, turn.now.wall);
        }
    }

    /// `seq` is finished for this subscription; `log`: and stays so after a restart.
    fn finish(&mut self, id: SubId, seq: Seq, log: bool) -> bool {
        if !self.catalog.finish(id, seq) {
            return false;
        }
        if log
            && let Some(sub) = self.catalog.subs.get_mut(&id)
            && sub.kind.is_logged()
        {
            sub.unlogged.insert(seq);
        }
        true
    }

    // ---- delivery -----------------------------------------------------------------------------------------------

    /// Before the turn ends: everything that has changed is delivered, buried, logged.
    pub fn settle(&mut self, turn: &mut Turn) {
        while let Some(id) = self.dirty.pop() {
            if let Some(sub) = self.catalog.subs.get_mut(&id) {
                sub.dirty = false;
            }
            self.look_after(id, turn);
        }
        for (id, conn, cid) in std::mem::take(&mut self.ack_answers) {
            // Still unlogged for want of space: answered when it is.
            if self.catalog.subs.get(&id).is_some_and(|s| !s.unlogged.is_empty()) {
                self.ack_answers.push((id, conn, cid));
                continue;
            }
            self.wait(self.log.appended(), Waiter::Ok { conn, cid }, turn);
        }
        self.relocate_some(turn);
        self.ask_for_grants(turn);
    }

    fn look_after(&mut self, id: SubId, turn: &mut Turn) {
        self.bury(id, turn);
        self.dispatch(id, turn);
        self.log_acks(id, turn.now.wall);
        self.arm_subscription(id, turn);
    }

    fn log_acks(&mut self, id: SubId, now: WallMs) {
        let Some(sub) = self.catalog.subs.get(&id) else { return };
        if sub.unlogged.is_empty() {
            return;
        }
        let ranges: Vec<(Seq, Seq)> = sub.unlogged.iter().collect();
        let record = Record::Acked { sub: id.index, ranges };
        if self.append(id.vshard, &record, Class::Control, now).is_ok()
            && let Some(sub) = self.catalog.subs.get_mut(&id)
        {
            sub.unlogged.clear();
        }
    }

    fn dispatch(&mut self, id: SubId, turn: &mut Turn) {
        let Some(sub) = self.catalog.subs.get(&id) else { return };
        if sub.consumers.is_empty() || sub.reading {
            return;
        }
        let topic_id = sub.topic;
        loop {
            let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
            let Some(topic) = self.catalog.topics.get(&topic_id) else { return };
            let Some(pick) = sub.pick(topic, turn.now) else { return };
            let Some(index) = sub.choose_consumer(pick.qos()) else { return };
            match pick {
                Pick::Memory => {
                    let Some(queued) = sub.pop_qos0() else { return };
                    if queued.expires.0 != 0 && queued.expires <= turn.now.wall {
                        turn.metrics.lost.add(Loss::Expired, 1);
                        continue;
                    }
                    turn.metrics.queue_out.add(Qos::AtMostOnce, 1);
                    let message = Outgoing {
                        seq: queued.seq,
                        qos: Qos::AtMostOnce,
                        attempt: 1,
                        redelivered: false,
                        published: queued.published,
                        body: queued.body,
                    };
                    deliver(sub, topic, index, message, turn);
                }
                Pick::Stored(entry) => {
                    if entry.expires.0 != 0 && entry.expires <= turn.now.wall {
                        if self.finish(id, entry.seq, false) {
                            turn.metrics.lost.add(Loss::Expired, 1);
                        }
                        continue;
                    }
                    let Some((published, body)) = self.message_at(entry.at, turn) else {
                        return self.read_for(id, entry.at, turn);
                    };
                    let Some(topic) = self.catalog.topics.get(&topic_id) else { return };
                    let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
                    let consumer = &sub.consumers[index];
                    let timeout = match consumer.version {
                        Version::V1 => {
                            let before = sub.touched.get(&entry.seq).map_or(0, |t| t.failures);
                            backed_off(self.settings.retry_backoff, before + 1)
                        }
                        Version::V2 => consumer.ack_timeout,
                    };
                    let attempt = sub.deliver(entry.seq, entry.priority, index, turn.now.mono + timeout);
                    let redelivered = attempt > 1 || entry.seq < topic.recovered;
                    if attempt > 1 {
                        turn.metrics.redelivered += 1;
                    }
                    let qos = Qos::AtLeastOnce;
                    let message = Outgoing { seq: entry.seq, qos, attempt, redelivered, published, body };
                    deliver(sub, topic, index, message, turn);
                }
            }
        }
    }

    /// The message at `at`, if it is in memory.
    fn message_at(&mut self, at: LogRef, turn: &mut Turn) -> Option<(WallMs, Body)> {
        let (record, origin) = self.cache.get(at)?;
        match published_message(&record, origin == Origin::Disk) {
            Ok(message) => Some(message),
            Err(error) => {
                let LogRef { slot, offset, .. } = at;
                turn.effects.corrupt = Some(format!("slot {} offset {offset}: {error}", slot.0));
                None
            }
        }
    }

    // ---- reading back -------------------------------------------------------------------------------------------

    /// The subscription waits until the log's bytes at `at` have been read.
    fn read_for(&mut self, id: SubId, at: LogRef, turn: &mut Turn) {
        let start = at.offset / limits::BLOCK as u32 * limits::BLOCK as u32;
        let waiting = self.reads.get_mut(&(at.slot, start));
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        sub.reading = true;
        if let Some(waiting) = waiting {
            waiting.push(id);
            return;
        }
        if self.reads.len() >= limits::BACKLOG_READS_MAX {
            self.reads_waiting.push_back(id);
            return;
        }
        let end = (at.offset + at.len).max(start + limits::BACKLOG_READ_BYTES as u32);
        let written = self.written.get(&at.slot).copied().unwrap_or(self.segment_size);
        let end = end.next_multiple_of(limits::BLOCK as u32).min(written);
        self.reads.insert((at.slot, start), vec![id]);
        turn.metrics.backlog_reads += 1;
        turn.metrics.backlog_read_bytes += u64::from(end - start);
        turn.effects.reads.push(BacklogRead { slot: at.slot, offset: start, len: end - start });
    }

    pub fn on_backlog_read(&mut self, slot: Slot, offset: u32, bytes: Bytes, turn: &mut Turn) {
        self.cache.add_read(slot, offset, bytes);
        for id in self.reads.remove(&(slot, offset)).unwrap_or_default() {
            self.wake_reader(id, turn);
        }
        while self.reads.len() < limits::BACKLOG_READS_MAX {
            let Some(id) = self.reads_waiting.pop_front() else { break };
            self.wake_reader(id, turn);
        }
    }

    fn wake_reader(&mut self, id: SubId, turn: &mut Turn) {
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.reading = false;
            self.look_after(id, turn);
        }
    }

    // ---- dead letters -------------------------------------------------------------------------------------------

    /// Moves what has failed too often to the dead-letter topic: one copy and one acknowledgement, in one batch.
    fn bury(&mut self, id: SubId, turn: &mut Turn) {
        loop {
            let Some(sub) = self.catalog.subs.get(&id) else { return };
            let Some((seq, death)) = sub.dying.front().copied() else { return };
            let Some(topic) = self.catalog.topics.get(&sub.topic) else { return };
            let Some(entry) = topic.index.get(seq).copied().filter(|_| sub.wants(seq)) else {
                self.pop_dying(id);
                continue;
            };
            if !self.settings.dead_letter || self.settings.dead_letter_suffix.is_empty() {
                self.pop_dying(id);
                self.finish(id, seq, true);
                turn.metrics.lost.add(Loss::RetriesExhausted, 1);
                continue;
            }
            if sub.reading {
                return;
            }
            let Some((_, body)) = self.message_at(entry.at, turn) else { return self.read_for(id, entry.at, turn) };
            if self.bury_one(id, seq, death, &body, turn).is_err() {
                return; // no room in the log: tried again when something happens to this subscription
            }
            self.pop_dying(id);
        }
    }

    fn pop_dying(&mut self, id: SubId) {
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.dying.pop_front();
        }
    }

    fn bury_one(&mut self, id: SubId, seq: Seq, death: Death, body: &Body, turn: &mut Turn) -> Result<(), AppendError> {
        let now = turn.now.wall;
        let Some(sub) = self.catalog.subs.get(&id) else { return Ok(()) };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return Ok(()) };
        let failures = sub.touched.get(&seq).map_or(0, |t| t.failures);
        let headers = |options: OptionsBuilder| {
            options
                .header("blipmq-reason", death.label().as_bytes())
                .header("blipmq-source-topic", &topic.name)
                .header("blipmq-attempts", failures.to_string().as_bytes())
                .finish()
        };
        // Options that leave no room for ours are given up; the message is not.
        let options = headers(OptionsBuilder::new().entries(body.options()))
            .or_else(|_| headers(OptionsBuilder::new()))
            .unwrap_or_default();
        let mut name = BytesMut::from(&topic.name[..]);
        name.extend_from_slice(&self.settings.dead_letter_suffix);
        let (source, name, vshard, logged) = (topic.name.clone(), name.freeze(), id.vshard, sub.kind.is_logged());
        self.log.begin_group(body.0.len() + options.len() + name.len() + 4096, Class::Control)?;
        let dead = match self.catalog.topic_named(&name) {
            Some(dead) => dead,
            None => {
                let dead = self.catalog.next_topic_id(vshard);
                self.append(vshard, &Record::TopicCreated { topic: dead.index, name: &name }, Class::Control, now)?;
                self.catalog.create_topic(dead, name);
                dead
            }
        };
        if self.catalog.dead_letters_of(dead).is_none() {
            let sub = self.catalog.next_sub_id(vshard);
            let Some(topic) = self.catalog.topics.get(&dead) else { return Ok(()) };
            let start = topic.next_seq;
            let kind = Kind::DeadLetters;
            let Some(logged) = kind.logged() else { return Ok(()) };
            let record = Record::SubCreated { sub: sub.index, topic: dead.index, kind: logged, start, created: now };
            self.append(vshard, &record, Class::Control, now)?;
            self.catalog.create_sub(sub, dead, kind, Qos::AtLeastOnce, start);
        }
        let Some(topic) = self.catalog.topics.get(&dead) else { return Ok(()) };
        let dead_seq = topic.next_seq;
        let ttl = self.settings.dead_letter_ttl.as_millis();
        let expires = if ttl == 0 { WallMs(0) } else { WallMs(now.0.saturating_add(ttl)) };
        let record = Record::Published(Published {
            topic: dead.index,
            seq: dead_seq,
            published: now,
            expires,
            not_before: WallMs(0),
            priority: 0,
            identity: None,
            options: &options,
            payload: body.payload(),
        });
        let (at, end) = self.append(vshard, &record, Class::Control, now)?;
        if logged {
            let record = Record::Acked { sub: id.index, ranges: vec![(seq, seq)] };
            self.append(vshard, &record, Class::Control, now)?;
        }
        let stored =
            Stored { seq: dead_seq, at, priority: 0, published: now, expires, not_before: WallMs(0), identity: None };
        let refs = self.catalog.store(dead, &stored, self.settings.dedup_window);
        turn.metrics.queue_in += u64::from(refs);
        let mut memory = None;
        if let Some(topic) = self.catalog.topics.get_mut(&dead) {
            topic.last_end = end;
            if topic.has_qos0_subs() {
                let body = make_body(&options, body.payload());
                memory = Some(Queued { seq: dead_seq, published: now, expires, body });
            }
        }
        self.waiting.push_back((
            end,
            Waiter::Stored {
                topic: dead,
                seq: dead_seq,
                since: turn.now.mono,
                priority: 0,
                answer: None,
                remote: None,
            },
        ));
        if let Some(queued) = memory {
            self.waiting_qos0_bytes += queued.body.0.len();
            self.waiting.push_back((end, Waiter::Memory { topic: dead, queued }));
        }
        self.finish(id, seq, false);
        turn.metrics.lost.add(Loss::DeadLettered, 1);
        tracing::warn!(
            topic = %String::from_utf8_lossy(&source), reason = death.label(), attempts = failures,
            "message moved to the dead-letter topic"
        );
        self.arm_expiry(dead, turn);
        Ok(())
    }

    // ---- time ---------------------------------------------------------------------------------------------------

    fn arm_subscription(&mut self, id: SubId, turn: &mut Turn) {
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        let next = sub.next_deadline();
        // A deadline that lies earlier than needed costs one look; moving it with every delivery would cost more.
        let late = match (sub.timer, next) {
            (Some(armed), Some(next)) => next < armed,
            (None, Some(_)) => true,
            (Some(_), None) | (None, None) => false,
        };
        if late {
            turn.timers.set(Timer::Subscription(id), &mut sub.timer, next);
        }
    }

    pub fn on_subscription_timer(&mut self, id: SubId, turn: &mut Turn) {
        let now = turn.now.mono;
        let Some(sub) = self.catalog.subs.get_mut(&id) else { return };
        sub.timer = None;
        if sub.consumers.is_empty() && sub.ends_at.is_some_and(|at| at <= now) {
            if self.end_subscription(id, Loss::Purged, turn).is_err()
                && let Some(sub) = self.catalog.subs.get_mut(&id)
            {
                sub.ends_at = Some(now + Duration::from_secs(1));
            }
            self.arm_subscription(id, turn);
            return;
        }
        for consumer in &mut sub.consumers {
            if consumer.poll.is_some_and(|p| p.lapses <= now) {
                consumer.poll = None;
            }
        }
        sub.wake_delayed(now);
        for seq in sub.take_overdue(now) {
            self.failed(id, seq, None, turn);
        }
        self.mark(id);
    }

    fn arm_expiry(&mut self, id: TopicId, turn: &mut Turn) {
        let Some(topic) = self.catalog.topics.get_mut(&id) else { return };
        let at = topic.index.earliest_expiry().map(|wall| {
            // Coarse on purpose: each look walks the topic's index, and no expired message is delivered meanwhile.
            turn.now.mono + Duration::from_millis(wall.0.saturating_sub(turn.now.wall.0).max(EXPIRY_STEP_MS))
        });
        turn.timers.set(Timer::Expiry(id), &mut topic.expiry_timer, at);
    }

    pub fn on_expiry_timer(&mut self, id: TopicId, turn: &mut Turn) {
        let Some(topic) = self.catalog.topics.get_mut(&id) else { return };
        topic.expiry_timer = None;
        let due = topic.index.expired(turn.now.wall);
        let subs = topic.subs.clone();
        for seq in due {
            for sub in &subs {
                if self.finish(*sub, seq, false) {
                    turn.metrics.lost.add(Loss::Expired, 1);
                }
            }
        }
        for sub in subs {
            self.mark(sub);
        }
        self.arm_expiry(id, turn);
    }

    // ---- what an operator sees -----------------------------------------------------------------------------------

    /// Brings the gauges up to date.
    pub fn gauges(&self, metrics: &mut CoreMetrics) {
        metrics.topics = self.catalog.topics.len() as u64;
        metrics.subscribers = self.catalog.subs.len() as u64;
        metrics.cache_bytes = self.cache.bytes() as u64;
        metrics.cache_hits = self.cache.hits;
        metrics.cache_misses = self.cache.misses;
        metrics.acked_unsynced = self.commit.acked_unsynced();
        (metrics.inflight, metrics.retries_waiting, metrics.expirations_waiting) = (0, 0, 0);
        (metrics.queue_waiting, metrics.queue_waiting_bytes) = (0, 0);
        for topic in self.catalog.topics.values() {
            metrics.queue_waiting_bytes += topic.index.live_bytes();
            if topic.index.earliest_expiry().is_some() {
                metrics.expirations_waiting += topic.index.live();
            }
        }
        for sub in self.catalog.subs.values() {
            metrics.inflight += sub.in_flight();
            metrics.retries_waiting += sub.retries_waiting() as u64;
            if let Some(topic) = self.catalog.topics.get(&sub.topic) {
                metrics.queue_waiting += sub.waiting(topic);
            }
        }
    }

    pub fn topic_infos(&self) -> Vec<TopicInfo> {
        let mut all: Vec<TopicInfo> = self
            .catalog
            .topics
            .values()
            .map(|topic| TopicInfo {
                topic: topic.name.clone(),
                core: self.settings.core,
                vshard: topic.id.vshard,
                messages: topic.index.live(),
                bytes: topic.index.live_bytes(),
                subscriptions: topic.subs.len() as u64,
                published: topic.published,
                next_seq: topic.next_seq,
            })
            .collect();
        all.sort_unstable_by(|a, b| a.topic.cmp(&b.topic));
        all
    }

    pub fn sub_infos(&self) -> Vec<SubInfo> {
        let mut subs: Vec<_> = self.catalog.subs.values().collect();
        subs.sort_unstable_by_key(|s| s.id);
        subs.iter()
            .filter_map(|sub| {
                let topic = self.catalog.topics.get(&sub.topic)?;
                let (name, kind) = match &sub.kind {
                    Kind::Durable { name } => (Some(name.clone()), SubInfoKind::Durable),
                    Kind::DeadLetters => (Some(Bytes::from_static(DEAD_LETTERS_NAME)), SubInfoKind::DeadLetters),
                    Kind::Orphan { .. } => (None, SubInfoKind::Orphan),
                    Kind::Ephemeral => (None, SubInfoKind::Ephemeral),
                };
                Some(SubInfo {
                    id: sub.id,
                    topic: topic.name.clone(),
                    name,
                    kind,
                    qos: sub.qos,
                    consumers: sub.consumers.len() as u64,
                    backlog: sub.waiting(topic) - sub.in_flight(),
                    in_flight: sub.in_flight(),
                    delivered: sub.delivered,
                    acked: sub.acked,
                    failed: sub.failed,
                })
            })
            .collect()
    }

    /// What must always be true. O(n): for tests and the simulator.
    pub fn invariants(&self) {
        self.catalog.invariants();
        self.log.invariants();
        assert!(
            self.waiting.iter().zip(self.waiting.iter().skip(1)).all(|(a, b)| a.0 <= b.0),
            "waiting is in log order"
        );
    }

    // ---- checkpoints and relocation -----------------------------------------------------------------------------

    /// This core's part of a checkpoint: leaves as soon as everything in it is durable.
    pub fn take_snapshot(&mut self, force: bool, turn: &mut Turn) {
        let covered = self.log.appended();
        if covered == self.snapshot_covered && !force {
            return turn.effects.to_keeper.push(ForKeeper::Unchanged);
        }
        self.snapshot_covered = covered;
        let vshards =
            self.vshards.iter().map(|v| (*v, self.log.last_index(*v), snapshot::encode(&self.catalog, *v))).collect();
        self.snapshot = Some(Snapshot { covered, durable: covered, vshards, live: self.catalog.usage().by_slot() });
        self.force_sync();
        self.advance(turn);
    }

    pub fn relocate(&mut self, slot: Slot) {
        let mut left = Vec::new();
        for topic in self.catalog.topics.values() {
            left.extend(topic.index.live_from(Seq(0)).filter(|e| e.at.slot == slot).map(|e| (topic.id, e.seq)));
        }
        left.sort_unstable();
        self.relocations.push_back(Relocation { slot, left: left.into(), pending: 0 });
    }

    /// Copies a few of the messages that hold an old segment to the end of the log.
    fn relocate_some(&mut self, turn: &mut Turn) {
        for _ in 0..RELOCATIONS_PER_TURN {
            if self.is_behind() || self.no_space.is_some() {
                return;
            }
            let Some(relocation) = self.relocations.front() else { return };
            let Some((topic_id, seq)) = relocation.left.front().copied() else {
                if relocation.pending == 0 {
                    turn.effects.to_keeper.push(ForKeeper::Relocated { slot: relocation.slot });
                    self.relocations.pop_front();
                }
                return;
            };
            let slot = relocation.slot;
            let entry = self.catalog.topics.get(&topic_id).and_then(|t| t.index.get(seq)).copied();
            let Some(entry) = entry.filter(|e| e.refs > 0 && e.at.slot == slot) else {
                self.pop_relocation(0);
                continue;
            };
            let Some((bytes, _)) = self.cache.get(entry.at) else {
                self.read_ahead(entry.at, turn);
                return;
            };
            let Ok((Record::Published(published) | Record::Relocated(published), _)) = Record::decode(&bytes) else {
                tracing::error!(
                    slot = slot.0,
                    offset = entry.at.offset,
                    "a live message cannot be read back; its segment stays"
                );
                self.pop_relocation(0);
                continue;
            };
            let record = Record::Relocated(published);
            let Ok((at, end)) = self.append(topic_id.vshard, &record, Class::Publish, turn.now.wall) else { return };
            self.waiting.push_back((end, Waiter::Relocated { topic: topic_id, seq, at }));
            self.pop_relocation(1);
        }
    }

    fn pop_relocation(&mut self, pending: usize) {
        if let Some(relocation) = self.relocations.front_mut() {
            relocation.left.pop_front();
            relocation.pending += pending;
        }
    }

    /// Fetches log bytes nobody in particular waits for; the next turn finds them.
    fn read_ahead(&mut self, at: LogRef, turn: &mut Turn) {
        let start = at.offset / limits::BLOCK as u32 * limits::BLOCK as u32;
        if self.reads.contains_key(&(at.slot, start)) || self.reads.len() >= limits::BACKLOG_READS_MAX {
            return;
        }
        let end = (at.offset + at.len).max(start + limits::BACKLOG_READ_BYTES as u32);
        let written = self.written.get(&at.slot).copied().unwrap_or(self.segment_size);
        let end = end.next_multiple_of(limits::BLOCK as u32).min(written);
        self.reads.insert((at.slot, start), Vec::new());
        turn.effects.reads.push(BacklogRead { slot: at.slot, offset: start, len: end - start });
    }
}

/// How a dead-letter topic's own queue is called by those who subscribe to it.
pub const DEAD_LETTERS_NAME: &[u8] = b"dead-letters";
/// Expired messages are cleared away at most this often.
const EXPIRY_STEP_MS: u64 = 200;
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
        let waited = turn.now.wall.0.saturating_sub(message.published.0);
        turn.metrics.publish_to_deliver.record(waited * 1_000_000);
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
