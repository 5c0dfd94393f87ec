//! What becomes of a publish: refused, duplicate, kept in memory, or appended to the log.

use super::*;

/// What a v1 delivery has besides topic and message: type, correlation id, QoS, the topic's length. A publish by alias does
/// not carry the name, so it can be longer than any frame that delivers it.
const V1_DELIVERY_HEADER: usize = 12;
/// A v2 client accepts DELIVER frames longer than others by 64 KiB: enough for the header and all options, the dead letter's
/// included.
const _: () = assert!(limits::OPTIONS_LEN_MAX + 64 < 64 * 1024);

impl Topics {
    pub(super) fn on_publish(&mut self, from: Option<CoreId>, publish: Box<AskPublish>, turn: &mut Turn) {
        turn.metrics.publishes_received.add(publish.qos, 1);
        if !self.parked.is_empty() && !self.draining && !planted!(ParkedOvertaken) {
            return self.parked.push_back((from, publish)); // behind those that came before it
        }
        if let Err(publish) = self.take(from, publish, turn) {
            self.parked.push_back((from, publish));
        }
    }

    /// Stores or refuses a publish. `Err`: there is no segment for it yet, but there will be one.
    fn take(&mut self, from: Option<CoreId>, publish: Box<AskPublish>, turn: &mut Turn) -> Result<(), Box<AskPublish>> {
        let remote = from.map(|core| (core, publish.weight() as u64));
        if self.draining {
            let text = match publish.version {
                Version::V1 => &b"log corruption: write-ahead log not available: broker shutting down"[..], // V1 B12
                Version::V2 => b"the broker is shutting down",
            };
            self.refuse(&publish, code::SHUTTING_DOWN, Bytes::from_static(text), remote, turn);
            return Ok(());
        }
        if V1_DELIVERY_HEADER + publish.topic.len() + publish.payload.len() > limits::FRAME_LEN_MAX as usize {
            let text = Bytes::from_static(b"message too large: no frame could deliver it with its topic's name");
            self.refuse(&publish, code::TOO_LARGE, text, remote, turn);
            return Ok(());
        }
        match publish.qos {
            Qos::AtMostOnce => {
                self.publish_memory(&publish, remote, turn);
                Ok(())
            }
            Qos::AtLeastOnce => self.publish_stored(publish, remote, turn),
        }
    }

    /// Something has changed for the publishes that waited for a segment: they are taken in order, as far as there is room.
    pub(super) fn take_parked(&mut self, turn: &mut Turn) {
        while let Some((from, publish)) = self.parked.pop_front() {
            if let Err(publish) = self.take(from, publish, turn) {
                return self.parked.push_front((from, publish));
            }
        }
    }

    pub(super) fn refuse(
        &self,
        publish: &AskPublish,
        code: u16,
        reason: Bytes,
        remote: Option<(CoreId, u64)>,
        turn: &mut Turn,
    ) {
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

    pub(super) fn ttl_end(&self, publish: &AskPublish, now: WallMs) -> WallMs {
        let default = match publish.version {
            Version::V1 => self.settings.v1_ttl,
            Version::V2 => self.settings.ttl,
        };
        let ttl = publish.ttl.unwrap_or(default);
        // The life of a delayed message begins when its delay ends.
        let now = if planted!(TtlOnOtherClock) { now.0 / 1000 } else { now.0 };
        let from = now.saturating_add(publish.delay.as_millis());
        if ttl == Duration::ZERO { WallMs(0) } else { WallMs(from.saturating_add(ttl.as_millis().max(1))) }
    }

    pub(super) fn publish_memory(&mut self, publish: &AskPublish, remote: Option<(CoreId, u64)>, turn: &mut Turn) {
        let now = turn.now.wall;
        let expires = self.ttl_end(publish, now);
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
                    let queued =
                        Queued { seq: topic.take_seq(), stamp: turn.now.mono.stamp(), published: now, expires, body };
                    let behind = topic.last_end > self.commit.ack_upto() && !planted!(Qos0Overtakes);
                    let id = topic.id;
                    if !behind {
                        self.enqueue_qos0(id, queued, Audience::All, turn);
                    } else if self.waiting_qos0_bytes > self.settings.qos0_bytes {
                        let queues = self.catalog.topics.get(&id).map_or(0, |t| t.subs.len() as u64);
                        turn.metrics.queue_in += queues;
                        turn.metrics.lost.add(Loss::DroppedNew, queues);
                    } else {
                        // It must not overtake the stored messages in front of it.
                        self.waiting_qos0_bytes += queued.body.0.len();
                        let waiter = Waiter::Memory { topic: id, queued, audience: Audience::All };
                        let end = self.log.appended();
                        self.waiting.push_back((end, waiter));
                        // That may be further than the last stored message; the next one must not overtake this one.
                        topic.last_end = end;
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

    pub(super) fn enqueue_qos0(&mut self, topic_id: TopicId, queued: Queued, audience: Audience, turn: &mut Turn) {
        let Some(topic) = self.catalog.topics.get(&topic_id) else { return };
        // Indices, since a full queue is dispatched in between.
        for i in 0..topic.subs.len() {
            let Some(id) = self.catalog.topics.get(&topic_id).and_then(|t| t.subs.get(i).copied()) else { break };
            // A subscription that began while the message waited for the log gets what came after it.
            let wanted = |s: &subscription::Subscription| {
                s.start <= queued.seq && (audience == Audience::All || s.qos == Qos::AtMostOnce)
            };
            if self.catalog.subs.get(&id).is_some_and(wanted) {
                self.push_qos0(id, Queued { body: queued.body.clone(), ..queued }, turn);
            }
        }
    }

    pub(super) fn push_qos0(&mut self, id: SubId, queued: Queued, turn: &mut Turn) {
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

    /// `Err`: the publish, since the log has no segment for it at this moment.
    fn publish_stored(
        &mut self,
        publish: Box<AskPublish>,
        remote: Option<(CoreId, u64)>,
        turn: &mut Turn,
    ) -> Result<(), Box<AskPublish>> {
        let now = turn.now.wall;
        if let Some(reason) = &self.no_space {
            let text = Bytes::from(format!("storage full: {reason}"));
            self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
            return Ok(());
        }
        if self.catalog.entries() >= self.settings.entries_max {
            let text = Bytes::from_static(
                b"backlog too large: its index would exceed the memory budget ([storage] memory_budget)",
            );
            self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
            return Ok(());
        }
        if self.catalog.topic_named(&publish.topic).is_none()
            && !self.log.has_room(Log::cost(&Record::TopicCreated { topic: 0, name: &publish.topic }), Class::Publish)
        {
            return Err(publish);
        }
        let id = match self.topic_for(&publish.topic, turn) {
            Ok(id) => id,
            Err((code, text)) => {
                self.refuse(&publish, code, text, remote, turn);
                return Ok(());
            }
        };
        let window = self.settings.dedup_window;
        let Some(topic) = self.catalog.topics.get(&id) else { return Ok(()) };
        if publish.identity.as_ref().is_some_and(|identity| topic.dedup.is_duplicate(identity, now, window)) {
            turn.metrics.publishes_duplicate += 1;
            if publish.confirm {
                let waiter = Waiter::Duplicate { conn: publish.conn, cid: publish.cid };
                let at = if planted!(DuplicateAtOnce) { self.commit.ack_upto() } else { self.log.appended() };
                self.wait(at, waiter, turn);
            }
            release_forward(remote, turn);
            return Ok(());
        }
        if let Err(text) = self.make_room_in_backlogs(id, turn) {
            self.refuse(&publish, code::STORAGE_FULL, text, remote, turn);
            return Ok(());
        }
        let Some(topic) = self.catalog.topics.get(&id) else { return Ok(()) };
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
            Err(AppendError::Full) => return Err(publish),
            Err(error) => {
                let (code, text) = append_failed(error);
                self.refuse(&publish, code, text, remote, turn);
                return Ok(());
            }
        };
        turn.metrics.published.add(Qos::AtLeastOnce, 1);
        turn.metrics.wal_appends += 1;
        turn.metrics.wal_bytes += u64::from(at.len);
        let stored = Stored {
            seq,
            at,
            priority: publish.priority,
            stamp: turn.now.mono.stamp(),
            published: now,
            expires,
            not_before,
            identity: publish.identity,
        };
        let refs = self.catalog.store(id, &stored, window);
        turn.metrics.queue_in += u64::from(refs);
        let Some(topic) = self.catalog.topics.get_mut(&id) else { return Ok(()) };
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
        let answer = answer.filter(|(conn, cid)| {
            if planted!(ConfirmBeforeDurable) {
                let outcome = Outcome::Stored { level: Durability::Synced, position: end };
                turn.tell(Tell::Confirm { conn: *conn, cid: *cid, outcome });
            }
            !planted!(ConfirmBeforeDurable)
        });
        if planted!(DeliverBeforeDurable) {
            self.make_visible(id, seq, publish.priority, turn);
        }
        let waiter =
            Waiter::Stored { topic: id, seq, since: turn.now.mono, priority: publish.priority, answer, remote };
        self.waiting.push_back((end, waiter));
        if has_qos0_subs {
            // For QoS0 subscriptions it is a QoS0 message, but not before it is as durable as promised.
            let body = make_body(&publish.options, &publish.payload);
            self.waiting_qos0_bytes += body.0.len();
            let queued = Queued { seq, stamp: turn.now.mono.stamp(), published: now, expires, body };
            self.waiting.push_back((end, Waiter::Memory { topic: id, queued, audience: Audience::AtMostOnce }));
        }
        Ok(())
    }

    /// Answers at once if everything up to `at` is durable enough already, whoever else waits for what is not.
    pub(super) fn wait(&mut self, at: Lsn, waiter: Waiter, turn: &mut Turn) {
        if at <= self.commit.ack_upto() {
            return self.let_go(at, waiter, turn);
        }
        // In log order: who joins those who wait for an older place waits no shorter than the last of them.
        let last = self.waiting.back().map_or(at, |(last, _)| at.max(*last));
        self.waiting.push_back((last, waiter));
    }

    /// Bounded subscriptions: refuses, or gives up the oldest message.
    pub(super) fn make_room_in_backlogs(&mut self, id: TopicId, turn: &mut Turn) -> Result<(), Bytes> {
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
    pub(super) fn topic_for(&mut self, name: &Bytes, turn: &mut Turn) -> Result<TopicId, (u16, Bytes)> {
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

    pub(super) fn is_dead_letter_topic(&self, name: &[u8]) -> bool {
        let suffix = &self.settings.dead_letter_suffix;
        !suffix.is_empty() && name.len() > suffix.len() && name.ends_with(suffix)
    }
}
