//! Messages that have failed too often go to the dead-letter topic.

use super::*;

impl Topics {
    /// Moves what has failed too often to the dead-letter topic: one copy and one acknowledgement, in one batch.
    pub(super) fn bury(&mut self, id: SubId, turn: &mut Turn) {
        loop {
            let Some(sub) = self.catalog.subs.get(&id) else { return };
            let Some((seq, death)) = sub.dying.front().copied() else { return };
            let topic_id = sub.topic;
            let Some(topic) = self.catalog.topics.get(&topic_id) else { return };
            let Some(entry) = topic.index.get(seq).copied().filter(|_| sub.wants(seq)) else {
                self.pop_dying(id);
                continue;
            };
            let suffix = &self.settings.dead_letter_suffix;
            // Nobody could subscribe to a topic of a longer name than that.
            let has_name = !suffix.is_empty() && topic.name.len() + suffix.len() <= limits::TOPIC_NAME_MAX;
            if !self.settings.dead_letter || !has_name || planted!(DeadLetterDropped) {
                self.pop_dying(id);
                self.finish(id, seq, true);
                turn.metrics.lost.add(Loss::RetriesExhausted, 1);
                continue;
            }
            if sub.reading {
                return;
            }
            let Some((_, body)) = self.message_at(topic_id, seq, entry.at, turn) else {
                return self.read_for(id, entry.at, turn);
            };
            if self.bury_one(id, seq, death, &body, turn).is_err() {
                return; // no room in the log: tried again when something happens to this subscription
            }
            self.pop_dying(id);
        }
    }

    pub(super) fn pop_dying(&mut self, id: SubId) {
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.dying.pop_front();
        }
    }

    pub(super) fn bury_one(
        &mut self,
        id: SubId,
        seq: Seq,
        death: Death,
        body: &Body,
        turn: &mut Turn,
    ) -> Result<(), AppendError> {
        let now = turn.now.wall;
        let Some(sub) = self.catalog.subs.get(&id) else { return Ok(()) };
        let Some(topic) = self.catalog.topics.get(&sub.topic) else { return Ok(()) };
        let failures = sub.touched.get(&seq).map_or(0, |t| t.failures);
        let headers = |options: OptionsBuilder| {
            options
                .header("blipmq-reason", death.label().as_bytes())
                .header("blipmq-attempts", failures.to_string().as_bytes())
        };
        let with_source = |options| headers(options).header("blipmq-source-topic", &topic.name).finish();
        // What leaves no room is given up: the name of the topic first, which the dead-letter topic's own name has in it,
        // then the message's own options; never the message.
        let own = || OptionsBuilder::new().entries(body.options());
        let options = with_source(own())
            .or_else(|_| headers(own()).finish())
            .or_else(|_| with_source(OptionsBuilder::new()))
            .or_else(|_| headers(OptionsBuilder::new()).finish())
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
        let stored = Stored {
            seq: dead_seq,
            at,
            priority: 0,
            stamp: turn.now.mono.stamp(),
            published: now,
            expires,
            not_before: WallMs(0),
            identity: None,
        };
        let refs = self.catalog.store(dead, &stored, self.settings.dedup_window);
        turn.metrics.queue_in += u64::from(refs);
        let mut memory = None;
        if let Some(topic) = self.catalog.topics.get_mut(&dead) {
            topic.last_end = end;
            if topic.has_qos0_subs() {
                let body = make_body(&options, body.payload());
                memory = Some(Queued { seq: dead_seq, stamp: turn.now.mono.stamp(), published: now, expires, body });
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
            self.waiting.push_back((end, Waiter::Memory { topic: dead, queued, audience: Audience::AtMostOnce }));
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
}
