//! The topics and subscriptions of some virtual shards, and which of their messages are still wanted.
//!
//! Owns: every change of state that the log records, whether it happens now or is replayed after a restart: both go
//! through the same methods. Never: appends to the log, sends, or knows what time it is.

use std::collections::VecDeque;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::planted::planted;
use crate::protocol::request::Identity;
use crate::shard::index::Entry;
use crate::shard::subscription::{Kind, Subscription};
use crate::shard::topic::Topic;
use crate::time::{Duration, WallMs};
use crate::types::{LogRef, Qos, Seq, Slot, SubId, TopicId, VShard};
use crate::wal::record::{IdentityRef, KeyId, Published, Record, SubKind};

#[derive(Debug, Default)]
pub struct Catalog {
    pub topics: FxHashMap<TopicId, Topic>,
    pub subs: FxHashMap<SubId, Subscription>,
    names: FxHashMap<Bytes, TopicId>,
    durables: FxHashMap<(TopicId, Bytes), SubId>,
    dead_letters: FxHashMap<TopicId, SubId>,
    /// v1 queues whose connection has ended, oldest first.
    orphans: FxHashMap<(TopicId, KeyId), VecDeque<SubId>>,
    next_ids: FxHashMap<VShard, NextIds>,
    usage: Usage,
    entries: usize,
}

/// The numbers the next topic and subscription of a virtual shard get. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextIds {
    pub topic: u32,
    pub sub: u32,
}

impl Default for NextIds {
    fn default() -> NextIds {
        NextIds { topic: 1, sub: 1 }
    }
}

/// Messages somebody wants, and their bytes, by slot.
#[derive(Debug, Default)]
pub struct Usage(FxHashMap<Slot, (u32, u64)>);

impl Usage {
    pub fn add(&mut self, at: LogRef) {
        let slot = self.0.entry(at.slot).or_default();
        slot.0 += 1;
        slot.1 += u64::from(at.len);
    }

    pub fn remove(&mut self, at: LogRef) {
        let slot = self.0.get_mut(&at.slot).expect("a message is counted where it lies");
        slot.0 -= 1;
        slot.1 -= u64::from(at.len);
        if slot.0 == 0 {
            self.0.remove(&at.slot);
        }
    }

    pub fn by_slot(&self) -> Vec<(Slot, u32, u64)> {
        let mut all: Vec<_> = self.0.iter().map(|(slot, (count, bytes))| (*slot, *count, *bytes)).collect();
        all.sort_unstable();
        all
    }
}

/// A message as the log has it, without its payload.
#[derive(Debug, Clone)]
pub struct Stored {
    pub seq: Seq,
    pub at: LogRef,
    pub priority: u8,
    pub stamp: u32,
    pub published: WallMs,
    pub expires: WallMs,
    pub not_before: WallMs,
    pub identity: Option<Identity>,
}

impl Catalog {
    pub fn topic_named(&self, name: &[u8]) -> Option<TopicId> {
        self.names.get(name).copied()
    }

    pub fn durable_named(&self, topic: TopicId, name: &Bytes) -> Option<SubId> {
        self.durables.get(&(topic, name.clone())).copied()
    }

    /// The subscription that holds this dead-letter topic's messages.
    pub fn dead_letters_of(&self, topic: TopicId) -> Option<SubId> {
        self.dead_letters.get(&topic).copied()
    }

    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Index entries held.
    pub fn entries(&self) -> usize {
        self.entries
    }

    pub fn next_ids(&self, vshard: VShard) -> NextIds {
        self.next_ids.get(&vshard).copied().unwrap_or_default()
    }

    pub fn vshard_topics(&self, vshard: VShard) -> Vec<&Topic> {
        let mut all: Vec<_> = self.topics.values().filter(|t| t.id.vshard == vshard).collect();
        all.sort_unstable_by_key(|t| t.id);
        all
    }

    pub fn vshard_subs(&self, vshard: VShard) -> Vec<&Subscription> {
        let mut all: Vec<_> = self.subs.values().filter(|s| s.id.vshard == vshard).collect();
        all.sort_unstable_by_key(|s| s.id);
        all
    }

    /// Takes in another core's part: their virtual shards are disjoint.
    pub fn absorb(&mut self, other: Catalog) {
        self.topics.extend(other.topics);
        self.subs.extend(other.subs);
        self.names.extend(other.names);
        self.durables.extend(other.durables);
        self.dead_letters.extend(other.dead_letters);
        self.orphans.extend(other.orphans);
        self.next_ids.extend(other.next_ids);
        for (slot, (count, bytes)) in other.usage.0 {
            let mine = self.usage.0.entry(slot).or_default();
            mine.0 += count;
            mine.1 += bytes;
        }
        self.entries += other.entries;
    }

    // ---- topics -------------------------------------------------------------------------------------------------

    /// The id a new topic or subscription of `vshard` would get.
    pub fn next_topic_id(&self, vshard: VShard) -> TopicId {
        TopicId { vshard, index: self.next_ids(vshard).topic }
    }

    pub fn next_sub_id(&self, vshard: VShard) -> SubId {
        SubId { vshard, index: self.next_ids(vshard).sub }
    }

    pub fn restore_next_ids(&mut self, vshard: VShard, ids: NextIds) {
        self.next_ids.insert(vshard, ids);
    }

    pub fn create_topic(&mut self, id: TopicId, name: Bytes) {
        let ids = self.next_ids.entry(id.vshard).or_default();
        ids.topic = ids.topic.max(id.index + 1);
        self.names.insert(name.clone(), id);
        self.topics.insert(id, Topic::new(id, name));
    }

    /// It has neither subscriptions nor messages.
    pub fn delete_topic(&mut self, id: TopicId) {
        if let Some(topic) = self.topics.remove(&id) {
            assert!(topic.subs.is_empty(), "a topic outlives its subscriptions");
            self.entries -= topic.index.len();
            self.names.remove(&topic.name);
        }
    }

    // ---- subscriptions ------------------------------------------------------------------------------------------

    /// `start`: the first sequence it gets; older messages must still be live to be got.
    pub fn create_sub(&mut self, id: SubId, topic_id: TopicId, kind: Kind, qos: Qos, start: Seq) {
        let ids = self.next_ids.entry(id.vshard).or_default();
        ids.sub = ids.sub.max(id.index + 1);
        let Some(topic) = self.topics.get_mut(&topic_id) else { return };
        // The log knows nothing of QoS0 messages, but this: their numbers are taken.
        topic.next_seq = topic.next_seq.max(start);
        match &kind {
            Kind::Durable { name } => _ = self.durables.insert((topic_id, name.clone()), id),
            Kind::DeadLetters => _ = self.dead_letters.insert(topic_id, id),
            Kind::Ephemeral | Kind::Orphan { .. } => {}
        }
        topic.attach(id, qos);
        let mut sub = Subscription::new(id, topic_id, kind.clone(), qos, start, topic.stored);
        if qos == Qos::AtLeastOnce && start < topic.next_seq {
            // What all others have finished is gone: it counts as finished here too, also after a restart.
            // A logged subscription may only count on what logged ones keep: replay knows of no others.
            let keeps = |s: &Subscription, seq| s.wants(seq) && (s.kind.is_logged() || !kind.is_logged());
            let kept = |e: &&Entry| topic.subs.iter().any(|id| self.subs.get(id).is_some_and(|s| keeps(s, e.seq)));
            let live: Vec<Seq> = topic.index.live_from(start).filter(kept).map(|e| e.seq).collect();
            let mut gap_from = start;
            for seq in &live {
                topic.index.add_ref(*seq);
                if gap_from < *seq {
                    sub.done.insert_range(gap_from, Seq(seq.0 - 1));
                }
                gap_from = seq.next();
            }
            if gap_from < topic.next_seq {
                sub.done.insert_range(gap_from, Seq(topic.next_seq.0 - 1));
            }
            sub.floor = sub.done.first_gap(start);
            sub.done.trim_below(sub.floor);
            sub.stored_before = topic.stored - live.len() as u64;
        }
        self.subs.insert(id, sub);
    }

    /// A subscription as a checkpoint has it. The topic's messages come later.
    pub fn restore_sub(&mut self, sub: Subscription) {
        let Some(topic) = self.topics.get_mut(&sub.topic) else { return };
        topic.attach(sub.id, sub.qos);
        match &sub.kind {
            Kind::Durable { name } => _ = self.durables.insert((sub.topic, name.clone()), sub.id),
            Kind::DeadLetters => _ = self.dead_letters.insert(sub.topic, sub.id),
            Kind::Ephemeral | Kind::Orphan { .. } => {}
        }
        self.subs.insert(sub.id, sub);
    }

    /// Ends a subscription. Returns it, and how many unfinished messages went with it.
    pub fn delete_sub(&mut self, id: SubId) -> Option<(Subscription, u64)> {
        let sub = self.subs.remove(&id)?;
        let mut purged = 0;
        if let Some(topic) = self.topics.get_mut(&sub.topic) {
            topic.detach(id, sub.qos);
            let wanted: Vec<Seq> = topic.index.live_from(sub.floor).map(|e| e.seq).filter(|s| sub.wants(*s)).collect();
            let before = topic.index.len();
            for seq in wanted {
                purged += 1;
                if let Some(at) = topic.index.release(seq) {
                    self.usage.remove(at);
                }
            }
            self.entries -= before - topic.index.len();
        }
        match &sub.kind {
            Kind::Durable { name } => _ = self.durables.remove(&(sub.topic, name.clone())),
            Kind::DeadLetters => _ = self.dead_letters.remove(&sub.topic),
            Kind::Orphan { key } => self.unorphan(sub.topic, *key, id),
            Kind::Ephemeral => {}
        }
        Some((sub, purged))
    }

    /// The connection of a v1 queue has ended.
    pub fn orphan(&mut self, topic: TopicId, key: KeyId, id: SubId) {
        let queue = self.orphans.entry((topic, key)).or_default();
        if !queue.contains(&id) {
            queue.push_back(id);
        }
    }

    fn unorphan(&mut self, topic: TopicId, key: KeyId, id: SubId) {
        if let Some(queue) = self.orphans.get_mut(&(topic, key)) {
            queue.retain(|s| *s != id);
            if queue.is_empty() {
                self.orphans.remove(&(topic, key));
            }
        }
    }

    /// The oldest queue that waits for this key's return.
    pub fn adopt(&mut self, topic: TopicId, key: KeyId) -> Option<SubId> {
        let id = self.orphans.get(&(topic, key))?.front().copied()?;
        self.unorphan(topic, key, id);
        Some(id)
    }

    // ---- messages -----------------------------------------------------------------------------------------------

    /// A QoS1 message is in the log. Remembers its identity, and where it is if anybody wants it. Returns how many do.
    pub fn store(&mut self, topic_id: TopicId, stored: &Stored, window: Duration) -> u32 {
        let Some(topic) = self.topics.get_mut(&topic_id) else { return 0 };
        topic.next_seq = topic.next_seq.max(stored.seq.next());
        topic.stored += 1;
        topic.stored_bytes += u64::from(stored.at.len);
        if let Some(identity) = &stored.identity {
            topic.dedup.remember(identity, stored.published, window);
        }
        let refs = topic.qos1_subs; // a new message is wanted by all of them
        self.enter(topic_id, stored, refs);
        refs
    }

    /// A message that the checkpoint contains: enters it into the index if any subscription still wants it.
    fn keep(&mut self, topic_id: TopicId, stored: &Stored) {
        let Some(topic) = self.topics.get_mut(&topic_id) else { return };
        let refs = topic.subs.iter().filter(|id| self.subs.get(id).is_some_and(|s| s.wants(stored.seq))).count();
        self.enter(topic_id, stored, refs as u32);
    }

    fn enter(&mut self, topic_id: TopicId, stored: &Stored, refs: u32) {
        let Some(topic) = self.topics.get_mut(&topic_id) else { return };
        if refs > 0 {
            let before = topic.index.len();
            topic.index.insert(Entry {
                seq: stored.seq,
                at: stored.at,
                refs,
                priority: stored.priority,
                stamp: stored.stamp,
                expires: stored.expires,
                not_before: stored.not_before,
            });
            self.entries += topic.index.len() - before;
            self.usage.add(stored.at);
        }
    }

    /// The message was copied to `at`; its old place is no longer needed.
    pub fn moved(&mut self, topic_id: TopicId, seq: Seq, at: LogRef) {
        if let Some(old) = self.topics.get_mut(&topic_id).and_then(|t| t.index.moved(seq, at)) {
            self.usage.remove(old);
            self.usage.add(at);
        }
    }

    /// `seq` is finished for this subscription. `false`: it was before.
    pub fn finish(&mut self, id: SubId, seq: Seq) -> bool {
        let Some(sub) = self.subs.get_mut(&id) else { return false };
        if !sub.finish(seq) {
            return false;
        }
        if let Some(topic) = self.topics.get_mut(&sub.topic) {
            let before = topic.index.len();
            if let Some(at) = topic.index.release(seq) {
                self.usage.remove(at);
            }
            self.entries -= before - topic.index.len();
            if sub.done.is_empty() {
                return true; // the floor is at the next message, or at a number without one: nothing to raise it over
            }
            let first = topic.index.next_live(sub.floor).map_or(topic.next_seq, |e| e.seq);
            sub.raise_floor(first);
        }
        true
    }

    // ---- replay -------------------------------------------------------------------------------------------------

    /// Applies one record of the log. `covered`: the checkpoint contains its effect already; only the place of a message
    /// that is still wanted is news.
    pub fn replay(&mut self, vshard: VShard, record: &Record, at: LogRef, covered: bool, window: Duration) {
        match record {
            Record::Published(p) => {
                let topic = TopicId { vshard, index: p.topic };
                let stored = Stored::of(p, at);
                if covered {
                    self.keep(topic, &stored);
                } else {
                    self.store(topic, &stored, window);
                }
            }
            Record::Relocated(p) => {
                let id = TopicId { vshard, index: p.topic };
                let known = self.topics.get(&id).is_some_and(|t| t.index.get(p.seq).is_some_and(|e| e.refs > 0));
                if known {
                    self.moved(id, p.seq, at);
                } else if !planted!(RelocatedForgotten) {
                    self.keep(id, &Stored::of(p, at));
                }
            }
            _ if covered => {}
            Record::TopicCreated { topic, name } => {
                self.create_topic(TopicId { vshard, index: *topic }, Bytes::copy_from_slice(name));
            }
            Record::TopicDeleted { topic } => self.delete_topic(TopicId { vshard, index: *topic }),
            Record::SubCreated { sub, topic, kind, start, .. } => {
                let topic = TopicId { vshard, index: *topic };
                self.create_sub(SubId { vshard, index: *sub }, topic, Kind::of(kind), Qos::AtLeastOnce, *start);
            }
            Record::SubDeleted { sub } => _ = self.delete_sub(SubId { vshard, index: *sub }),
            Record::Acked { .. } if planted!(AcksForgotten) => {}
            Record::Acked { sub, ranges } => self.replay_acked(SubId { vshard, index: *sub }, ranges),
            Record::Failed { sub, seq, failures } => {
                if let Some(sub) = self.subs.get_mut(&SubId { vshard, index: *sub }) {
                    sub.restore_failures(*seq, *failures);
                }
            }
        }
    }

    fn replay_acked(&mut self, id: SubId, ranges: &[(Seq, Seq)]) {
        let Some(topic) = self.subs.get(&id).and_then(|s| self.topics.get(&s.topic)) else { return };
        let mut seqs = Vec::new();
        for (first, last) in ranges {
            let last = if planted!(AckOneTooMany) { last.next() } else { *last };
            seqs.extend(topic.index.live_from(*first).map(|e| e.seq).take_while(|s| *s <= last));
        }
        for seq in seqs {
            self.finish(id, seq);
        }
    }

    /// After replay: every queue of v1 waits for its key, every message in the log may be delivered.
    pub fn replayed(&mut self) {
        for topic in self.topics.values_mut() {
            topic.visible = Seq(topic.next_seq.0 - 1);
            topic.recovered = topic.next_seq;
        }
        let mut ids: Vec<SubId> = self.subs.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let sub = &self.subs[&id];
            if let Kind::Orphan { key } = sub.kind {
                self.orphan(sub.topic, key, id);
            }
        }
    }

    /// What must always be true. O(n): for tests and the simulator.
    pub fn invariants(&self) {
        let mut usage = Usage::default();
        let mut entries = 0;
        for topic in self.topics.values() {
            entries += topic.index.len();
            for entry in topic.index.live_from(Seq(0)) {
                usage.add(entry.at);
                let wanting = topic.subs.iter().filter(|id| self.subs[id].wants(entry.seq)).count() as u32;
                assert_eq!(entry.refs, wanting, "message {} of {:?}", entry.seq.0, topic.id);
            }
            assert_eq!(self.names.get(&topic.name), Some(&topic.id));
        }
        assert_eq!(usage.by_slot(), self.usage.by_slot());
        assert_eq!(entries, self.entries);
        for sub in self.subs.values() {
            sub.invariants();
            let topic = &self.topics[&sub.topic];
            assert!(topic.subs.contains(&sub.id));
            if sub.qos == Qos::AtLeastOnce {
                let wanted = topic.index.live_from(Seq(0)).filter(|e| sub.wants(e.seq)).count() as u64;
                assert_eq!(sub.backlog(topic), wanted, "backlog of {:?}", sub.id);
            }
        }
    }
}

impl Stored {
    fn of(p: &Published, at: LogRef) -> Stored {
        Stored {
            seq: p.seq,
            at,
            priority: p.priority,
            stamp: 0,
            published: p.published,
            expires: p.expires,
            not_before: p.not_before,
            identity: p.identity.filter(|_| !planted!(DedupForgotten)).map(|i| match i {
                IdentityRef::MessageId(id) => Identity::MessageId(Bytes::copy_from_slice(id)),
                IdentityRef::Publisher { id, sequence } => Identity::Publisher { id, sequence },
            }),
        }
    }
}

impl Kind {
    pub fn of(kind: &SubKind) -> Kind {
        match kind {
            SubKind::Durable { name } => Kind::Durable { name: Bytes::copy_from_slice(name) },
            SubKind::Orphan { key } => Kind::Orphan { key: *key },
            SubKind::DeadLetters => Kind::DeadLetters,
        }
    }

    /// How the log names it; `None` for one that is not logged.
    pub fn logged(&self) -> Option<SubKind<'_>> {
        match self {
            Kind::Ephemeral => None,
            Kind::Durable { name } => Some(SubKind::Durable { name }),
            Kind::Orphan { key } => Some(SubKind::Orphan { key: *key }),
            Kind::DeadLetters => Some(SubKind::DeadLetters),
        }
    }
}
