//! Deadlines, gauges, checkpoints, and moving what keeps an old segment alive.

use super::*;

impl Topics {
    pub(super) fn arm_subscription(&mut self, id: SubId, turn: &mut Turn) {
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

    pub(super) fn arm_expiry(&mut self, id: TopicId, turn: &mut Turn) {
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

    /// This core's part of a checkpoint: leaves as soon as everything in it is durable.
    pub fn take_snapshot(&mut self, force: bool, turn: &mut Turn) {
        // Not just what is appended: later records that share its last block would count as covered, and go with its segment.
        let covered = if planted!(SnapshotNotCut) { self.log.appended() } else { self.log.cut() };
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
    pub(super) fn relocate_some(&mut self, turn: &mut Turn) {
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
            let read = Record::decode_alone(&bytes).ok().and_then(|record| match record {
                Record::Published(p) | Record::Relocated(p) => Some(p),
                _ => None,
            });
            let Some(published) = read.filter(|p| (p.topic, p.seq) == (topic_id.index, seq)) else {
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

    pub(super) fn pop_relocation(&mut self, pending: usize) {
        if let Some(relocation) = self.relocations.front_mut() {
            relocation.left.pop_front();
            relocation.pending += pending;
        }
    }
}
