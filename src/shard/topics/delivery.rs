//! What a subscription gets next, and fetching it from the log when memory has forgotten it.

use super::*;

impl Topics {
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
        // Behind the acknowledgements that were logged just now; not before publishes that still wait for a segment.
        if self.parked.is_empty() {
            for conn in std::mem::take(&mut self.barriers) {
                self.wait(self.log.appended(), Waiter::Passed { conn }, turn);
            }
        }
        self.relocate_some(turn);
        self.ask_for_grants(turn);
    }

    pub(super) fn look_after(&mut self, id: SubId, turn: &mut Turn) {
        self.bury(id, turn);
        self.dispatch(id, turn);
        self.log_acks(id, turn.now.wall);
        self.arm_subscription(id, turn);
    }

    pub(super) fn log_acks(&mut self, id: SubId, now: WallMs) {
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

    pub(super) fn dispatch(&mut self, id: SubId, turn: &mut Turn) {
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
                        stamp: queued.stamp,
                        published: queued.published,
                        body: queued.body,
                    };
                    deliver(sub, topic, index, message, turn);
                }
                Pick::Stored(entry) => {
                    if entry.expires.0 != 0 && entry.expires <= turn.now.wall && !planted!(ExpiredDelivered) {
                        if self.finish(id, entry.seq, false) {
                            turn.metrics.lost.add(Loss::Expired, 1);
                        }
                        continue;
                    }
                    let Some((published, body)) = self.message_at(topic_id, entry.seq, entry.at, turn) else {
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
                    let redelivered = attempt > 1 || (entry.seq < topic.recovered && !planted!(RecoveredUnflagged));
                    if attempt > 1 {
                        turn.metrics.redelivered += 1;
                    }
                    let qos = Qos::AtLeastOnce;
                    let stamp = entry.stamp;
                    let message = Outgoing { seq: entry.seq, qos, attempt, redelivered, stamp, published, body };
                    deliver(sub, topic, index, message, turn);
                }
            }
        }
    }

    /// Message `seq` of `topic`, which lies at `at`, if it is in memory.
    pub(super) fn message_at(
        &mut self,
        topic: TopicId,
        seq: Seq,
        at: LogRef,
        turn: &mut Turn,
    ) -> Option<(WallMs, Body)> {
        let (record, origin) = self.cache.get(at)?;
        match published_message(&record, topic.index, seq, origin == Origin::Disk) {
            Ok(message) => Some(message),
            Err(error) => {
                let LogRef { slot, offset, .. } = at;
                let wanted = format!("message {} of topic {} should be there", seq.0, topic.index);
                turn.effects.corrupt = Some(format!("slot {} offset {offset}: {wanted}: {error}", slot.0));
                None
            }
        }
    }

    /// The subscription waits until the log's bytes at `at` have been read.
    pub(super) fn read_for(&mut self, id: SubId, at: LogRef, turn: &mut Turn) {
        let waiting = self.reads.get_mut(&(at.slot, block_of(at)));
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
        self.start_read(at, vec![id], turn);
    }

    /// Fetches log bytes nobody in particular waits for; a later turn finds them.
    pub(super) fn read_ahead(&mut self, at: LogRef, turn: &mut Turn) {
        if !self.reads.contains_key(&(at.slot, block_of(at))) && self.reads.len() < limits::BACKLOG_READS_MAX {
            self.start_read(at, Vec::new(), turn);
        }
    }

    /// Reads from the record's first block on: the whole record, and what else may be wanted soon.
    fn start_read(&mut self, at: LogRef, waiting: Vec<SubId>, turn: &mut Turn) {
        let start = block_of(at);
        let end = (at.offset + at.len).max(start + limits::BACKLOG_READ_BYTES as u32);
        let written = self.written.get(&at.slot).copied().unwrap_or(self.segment_size);
        let end = end.next_multiple_of(limits::BLOCK as u32).min(written);
        self.reads.insert((at.slot, start), waiting);
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

    pub(super) fn wake_reader(&mut self, id: SubId, turn: &mut Turn) {
        if let Some(sub) = self.catalog.subs.get_mut(&id) {
            sub.reading = false;
            self.look_after(id, turn);
            if !planted!(PollNeverSettled) {
                self.settle_polls(id, turn);
            }
        }
    }
}

/// Offset of the block in which the record begins.
fn block_of(at: LogRef) -> u32 {
    at.offset / limits::BLOCK as u32 * limits::BLOCK as u32
}
