//! What consumers say: poll, acknowledge, reject; and what a failed delivery leads to.

use super::*;

impl Topics {
    pub(super) fn on_poll(&mut self, who: Consumer, id: SubId, cid: u64, turn: &mut Turn) {
        let lapses = turn.now.mono + self.settings.poll_park;
        if let Some(consumer) = self.catalog.subs.get_mut(&id).and_then(|s| s.consumer_mut(who)) {
            consumer.poll = Some(Poll { cid, lapses });
        }
        self.look_after(id, turn);
        let reading = self.catalog.subs.get(&id).is_some_and(|sub| sub.reading);
        match self.catalog.subs.get_mut(&id).and_then(|s| s.consumer_mut(who)) {
            // There is a message for it; the next POLL must not take this one's place.
            Some(consumer) if reading && consumer.poll.is_some() => consumer.unsettled = true,
            _ => self.settle_poll(id, who, turn),
        }
    }

    /// A POLL is answered, or parked if that is wanted: its connection goes on.
    fn settle_poll(&mut self, id: SubId, who: Consumer, turn: &mut Turn) {
        if let Some(consumer) = self.catalog.subs.get_mut(&id).and_then(|s| s.consumer_mut(who)) {
            consumer.unsettled = false;
            if self.settings.poll_park == Duration::ZERO {
                consumer.poll = None;
            }
        }
        turn.tell(Tell::Settled { conn: who.conn });
    }

    /// What was to be read has been.
    pub(super) fn settle_polls(&mut self, id: SubId, turn: &mut Turn) {
        let Some(sub) = self.catalog.subs.get(&id).filter(|sub| !sub.reading) else { return };
        let unsettled: Vec<Consumer> = sub.consumers.iter().filter(|c| c.unsettled).map(|c| c.who).collect();
        for who in unsettled {
            self.settle_poll(id, who, turn);
        }
    }

    pub(super) fn on_ack(&mut self, who: Consumer, id: SubId, tags: &TagRanges, answer: AckAnswer, turn: &mut Turn) {
        let mut known = 0;
        for seq in self.delivered_in(id, tags, who) {
            self.finish(id, seq, true);
            known += 1;
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
            AckAnswer::Confirm { cid } if planted!(AckConfirmedEarly) => turn.tell(Tell::Ok { conn, cid }),
            AckAnswer::Confirm { cid } => self.ack_answers.push((id, conn, cid)),
            AckAnswer::None => {}
        }
    }

    pub(super) fn delivered_in(&self, id: SubId, tags: &TagRanges, who: Consumer) -> Vec<Seq> {
        self.catalog.subs.get(&id).map_or_else(Vec::new, |sub| sub.delivered_in(tags, who))
    }

    pub(super) fn on_reject(
        &mut self,
        who: Consumer,
        id: SubId,
        tags: &TagRanges,
        action: RejectAction,
        turn: &mut Turn,
    ) {
        for seq in self.delivered_in(id, tags, who) {
            self.failed(id, seq, Some(action), turn);
        }
        self.mark(id);
    }

    /// A delivery has timed out (`action` is `None`) or was rejected.
    pub(super) fn failed(&mut self, id: SubId, seq: Seq, action: Option<RejectAction>, turn: &mut Turn) {
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
        if sub.kind.is_logged() && !planted!(RetriesForgotten) {
            let record = Record::Failed { sub: id.index, seq, failures };
            // Not logged for want of space: after a restart it is tried once more.
            _ = self.append(id.vshard, &record, Class::Control, turn.now.wall);
        }
    }

    /// `seq` is finished for this subscription; `log`: and stays so after a restart.
    pub(super) fn finish(&mut self, id: SubId, seq: Seq, log: bool) -> bool {
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
}
