//! Subscriptions begin, are adopted, and end.

use super::*;

impl Topics {
    pub(super) fn on_subscribe(&mut self, ask: AskSubscribe, turn: &mut Turn) {
        let (who, cid) = (ask.who, ask.cid);
        if let Err((code, text)) = self.subscribe(ask, turn) {
            turn.metrics.requests_rejected.add(code, 1);
            turn.tell(Tell::Refused { who, cid, code, text });
        }
    }

    pub(super) fn subscribe(&mut self, ask: AskSubscribe, turn: &mut Turn) -> Result<(), (u16, Bytes)> {
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
            // What it finds finished must be finished before it in the log too, or a replay would give it more.
            for other in topic.subs.clone() {
                self.log_acks(other, turn.now.wall);
                if self.catalog.subs.get(&other).is_some_and(|s| !s.unlogged.is_empty()) {
                    return Err(append_failed(AppendError::Full));
                }
            }
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
    pub(super) fn existing_durable(&self, topic: TopicId, name: &Bytes) -> Option<SubId> {
        let held = (name.as_ref() == DEAD_LETTERS_NAME).then(|| self.catalog.dead_letters_of(topic)).flatten();
        held.or_else(|| self.catalog.durable_named(topic, name))
    }

    /// The subscription is on the log: its consumer may begin.
    pub(super) fn attach(&mut self, ask: AskSubscribe, id: SubId, resumed: bool, turn: &mut Turn) {
        let who = ask.who;
        let Some(sub) = self.catalog.subs.get_mut(&id) else {
            let text = Bytes::from_static(b"the subscription was deleted meanwhile");
            return turn.tell(Tell::Refused { who, cid: ask.cid, code: code::UNKNOWN, text });
        };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return };
        sub.ends_at = None;
        if resumed && matches!(sub.kind, Kind::Orphan { .. }) {
            sub.restart_tags(topic, topic.last_end > self.commit.ack_upto());
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
            unsettled: false,
        });
        let backlog = sub.backlog(topic);
        turn.tell(Tell::Subscribed { who, cid: ask.cid, sub: id, resumed, backlog });
        self.mark(id);
    }

    pub(super) fn on_unsubscribe(
        &mut self,
        who: Consumer,
        id: SubId,
        mode: UnsubscribeMode,
        cid: Option<u64>,
        turn: &mut Turn,
    ) {
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
    pub(super) fn start_idle_clock(&mut self, id: SubId, now: Instant) {
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
    pub(super) fn end_subscription(&mut self, id: SubId, loss: Loss, turn: &mut Turn) -> Result<Lsn, AppendError> {
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
                if consumer.unsettled {
                    turn.tell(Tell::Settled { conn: consumer.who.conn });
                }
                turn.tell(Tell::Ended { who: consumer.who });
            }
        }
        Ok(end)
    }
}
