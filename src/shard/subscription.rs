//! One subscription: a queue. What was delivered to whom, what is finished, what comes next.
//!
//! Owns: the cursor into the topic's index, the in-flight window, redeliveries, delays, the bounded QoS0 queue, and the
//! consumers that share it. Never: encodes, logs or sends; `topics` does that with what this decides.

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::limits;
use crate::planted::planted;
use crate::protocol::reply::Body;
use crate::protocol::request::{TagRanges, Version};
use crate::shard::index::Entry;
use crate::shard::message;
use crate::shard::ranges::Ranges;
use crate::shard::topic::Topic;
use crate::time::{Duration, Instant, Now, WallMs};
use crate::types::{DeliveryTag, Lsn, Qos, Seq, SubId, TopicId};
use crate::wal::record::KeyId;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Lives with its connection; not logged.
    Ephemeral,
    Durable {
        name: Bytes,
    },
    /// A v1 QoS1 queue: kept for its key when the connection ends.
    Orphan {
        key: KeyId,
    },
    /// Holds a dead-letter topic's messages.
    DeadLetters,
}

impl Kind {
    pub fn is_logged(&self) -> bool {
        !matches!(self, Kind::Ephemeral)
    }
}

/// One connection's share in the queue.
#[derive(Debug)]
pub struct Consumer {
    pub who: message::Consumer,
    pub version: Version,
    pub priority: u8,
    /// v2: most unacknowledged QoS1 deliveries.
    pub credit: u32,
    pub in_flight: u32,
    /// Delivered, but not yet in the kernel's socket buffer.
    pub under_way_messages: usize,
    pub under_way_bytes: usize,
    pub ack_timeout: Duration,
    /// v1: the newest unanswered POLL.
    pub poll: Option<Poll>,
    /// v1: its POLL waits for the log to be read; until then its connection looks at no further frame.
    pub unsettled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    pub cid: u64,
    pub lapses: Instant,
}

impl Consumer {
    fn takes(&self, qos: Qos) -> bool {
        match self.version {
            Version::V1 => self.poll.is_some(),
            Version::V2 => {
                (qos == Qos::AtMostOnce || self.in_flight < self.credit)
                    && self.under_way_messages < limits::CONSUMER_WINDOW_MESSAGES
                    && self.under_way_bytes < limits::CONSUMER_WINDOW_BYTES
            }
        }
    }
}

/// A message that has been delivered at least once, or waits for its time, and is not finished.
#[derive(Debug, Clone, Copy)]
pub struct Touched {
    pub deliveries: u16,
    pub failures: u16,
    pub state: State,
    /// Who had it last: its late acknowledgement still counts.
    pub last: Option<message::Consumer>,
}

impl Touched {
    /// An acknowledgement or a reject of it means something.
    fn is_delivered(&self) -> bool {
        self.deliveries > 0 && self.state != State::Dying
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    InFlight {
        due: Instant,
    },
    /// In `front`.
    Ready,
    /// In `delayed`.
    Delayed {
        until: Instant,
    },
    /// On its way to the dead-letter topic.
    Dying,
}

#[derive(Debug)]
pub struct Queued {
    pub seq: Seq,
    /// As `Entry`'s.
    pub stamp: u32,
    pub published: WallMs,
    pub expires: WallMs,
    pub body: Body,
}

/// Why a message goes to the dead-letter topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    MaxRetries,
    Rejected,
}

impl Death {
    pub fn label(self) -> &'static str {
        match self {
            Death::MaxRetries => "max-retries",
            Death::Rejected => "rejected",
        }
    }
}

#[derive(Debug)]
pub struct Subscription {
    pub id: SubId,
    pub topic: TopicId,
    pub kind: Kind,
    pub qos: Qos,
    /// The first sequence it gets.
    pub start: Seq,
    /// tag = seq - tag_base.
    pub tag_base: u64,
    /// The first sequence the cursor has not passed.
    next: Seq,
    /// Everything below is finished.
    pub floor: Seq,
    /// What is finished above the floor.
    pub done: Ranges,
    pub touched: FxHashMap<Seq, Touched>,
    front: BTreeSet<Seq>,
    urgent: BTreeSet<(Reverse<u8>, Seq)>,
    delayed: BTreeSet<(Instant, Seq)>,
    /// Deadlines of deliveries in ascending order; stale ones are skipped when they come up.
    deadlines: VecDeque<(Instant, Seq)>,
    /// Those that would not fit that order.
    odd_deadlines: BTreeSet<(Instant, Seq)>,
    qos0: VecDeque<Queued>,
    qos0_bytes: usize,
    pub consumers: Vec<Consumer>,
    /// Where the round of equal consumers goes on.
    turn: usize,
    pub dying: VecDeque<(Seq, Death)>,
    /// Without consumer until then: an orphan or an idle durable queue that ends.
    pub ends_at: Option<Instant>,
    pub timer: Option<Instant>,
    /// A backlog read is under way for it.
    pub reading: bool,
    /// To be looked at before the turn ends.
    pub dirty: bool,
    /// Finished messages the log does not say so of yet.
    pub unlogged: Ranges,
    /// Where the log says that it exists.
    pub created_end: Lsn,
    /// `topic.stored` when it began, and how many QoS1 messages it has finished since.
    pub stored_before: u64,
    pub finished: u64,
    pub delivered: u64,
    pub acked: u64,
    pub failed: u64,
}

/// What to deliver next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// A message of the log.
    Stored(Entry),
    /// The first of the QoS0 queue.
    Memory,
}

impl Pick {
    pub fn qos(&self) -> Qos {
        match self {
            Pick::Stored(_) => Qos::AtLeastOnce,
            Pick::Memory => Qos::AtMostOnce,
        }
    }
}

impl Subscription {
    pub fn new(id: SubId, topic: TopicId, kind: Kind, qos: Qos, start: Seq, stored_before: u64) -> Subscription {
        Subscription {
            id,
            topic,
            kind,
            qos,
            start,
            tag_base: start.0 - 1,
            next: start,
            floor: start,
            done: Ranges::default(),
            touched: FxHashMap::default(),
            front: BTreeSet::new(),
            urgent: BTreeSet::new(),
            delayed: BTreeSet::new(),
            deadlines: VecDeque::new(),
            odd_deadlines: BTreeSet::new(),
            qos0: VecDeque::new(),
            qos0_bytes: 0,
            consumers: Vec::new(),
            turn: 0,
            dying: VecDeque::new(),
            ends_at: None,
            timer: None,
            reading: false,
            dirty: false,
            unlogged: Ranges::default(),
            created_end: Lsn(0),
            stored_before,
            finished: 0,
            delivered: 0,
            acked: 0,
            failed: 0,
        }
    }

    pub fn tag(&self, seq: Seq) -> DeliveryTag {
        DeliveryTag(seq.0 - self.tag_base)
    }

    pub fn seq(&self, tag: DeliveryTag) -> Seq {
        Seq(tag.0.saturating_add(self.tag_base))
    }

    /// Whether it still wants the QoS1 message `seq`.
    pub fn wants(&self, seq: Seq) -> bool {
        self.qos == Qos::AtLeastOnce && seq >= self.floor && !self.done.contains(seq)
    }

    /// Unfinished QoS1 messages.
    pub fn backlog(&self, topic: &Topic) -> u64 {
        if self.qos == Qos::AtMostOnce {
            return self.qos0.len() as u64;
        }
        (topic.stored - self.stored_before).saturating_sub(self.finished)
    }

    /// Everything in the queue, QoS0 messages included.
    pub fn waiting(&self, topic: &Topic) -> u64 {
        match self.qos {
            Qos::AtMostOnce => self.qos0.len() as u64,
            Qos::AtLeastOnce => self.backlog(topic) + self.qos0.len() as u64,
        }
    }

    pub fn in_flight(&self) -> u64 {
        self.consumers.iter().map(|c| u64::from(c.in_flight)).sum()
    }

    pub fn qos0_len(&self) -> usize {
        self.qos0.len()
    }

    pub fn retries_waiting(&self) -> usize {
        self.front.len() + self.delayed.len()
    }

    // ---- QoS0 ---------------------------------------------------------------------------------------------------

    pub fn push_qos0(&mut self, queued: Queued) {
        self.qos0_bytes += queued.body.0.len();
        self.qos0.push_back(queued);
    }

    pub fn pop_qos0(&mut self) -> Option<Queued> {
        let queued = self.qos0.pop_front()?;
        self.qos0_bytes -= queued.body.0.len();
        Some(queued)
    }

    pub fn qos0_full(&self, messages: usize, bytes: usize) -> bool {
        self.qos0.len() >= messages || (self.qos0_bytes >= bytes && !self.qos0.is_empty())
    }

    // ---- what comes next ----------------------------------------------------------------------------------------

    /// The next message to deliver, left where it is. Redeliveries first, then by priority, then in order.
    pub fn pick(&mut self, topic: &Topic, now: Now) -> Option<Pick> {
        while let Some(seq) = self.front.first().copied() {
            match topic.index.get(seq) {
                Some(entry) if entry.refs > 0 => return Some(Pick::Stored(*entry)),
                _ => _ = self.front.remove(&seq),
            }
        }
        while let Some((level, seq)) = self.urgent.first().copied() {
            match topic.index.get(seq) {
                Some(entry) if entry.refs > 0 && self.untouched(seq) => return Some(Pick::Stored(*entry)),
                _ => _ = self.urgent.remove(&(level, seq)),
            }
        }
        let stored = self.pick_stored(topic, now);
        match (stored, self.qos0.front()) {
            (Some(entry), Some(queued)) if queued.seq < entry.seq => Some(Pick::Memory),
            (Some(entry), _) => Some(Pick::Stored(entry)),
            (None, Some(_)) => Some(Pick::Memory),
            (None, None) => None,
        }
    }

    fn untouched(&self, seq: Seq) -> bool {
        !self.touched.contains_key(&seq) && self.wants(seq)
    }

    fn pick_stored(&mut self, topic: &Topic, now: Now) -> Option<Entry> {
        if self.qos == Qos::AtMostOnce || self.done.len() > limits::ACK_RANGES_MAX {
            return None;
        }
        loop {
            let entry = *topic.index.next_live(self.next)?;
            if entry.seq > topic.visible {
                return None;
            }
            if entry.priority > 0 || !self.untouched(entry.seq) {
                self.next = entry.seq.next();
                continue;
            }
            if entry.not_before > now.wall {
                self.next = entry.seq.next();
                self.delay(entry.seq, now.mono + Duration::from_millis(entry.not_before.0 - now.wall.0));
                continue;
            }
            return Some(entry);
        }
    }

    /// A visible message of raised priority: it waits in its own line.
    pub fn push_urgent(&mut self, entry: &Entry, now: Now) {
        if !self.untouched(entry.seq) {
            return;
        }
        if entry.not_before > now.wall {
            self.delay(entry.seq, now.mono + Duration::from_millis(entry.not_before.0 - now.wall.0));
        } else {
            self.urgent.insert((Reverse(entry.priority), entry.seq));
        }
    }

    /// Not before `until`; then at the front.
    pub fn delay(&mut self, seq: Seq, until: Instant) {
        let touched = self.touched.entry(seq).or_insert(NEW);
        touched.state = State::Delayed { until };
        self.delayed.insert((until, seq));
    }

    /// The consumer that gets the next message of this QoS: the highest priority, equals in turn.
    pub fn choose_consumer(&mut self, qos: Qos) -> Option<usize> {
        let count = self.consumers.len();
        let mut best: Option<usize> = None;
        for step in 0..count {
            let i = (self.turn + step) % count;
            let consumer = &self.consumers[i];
            if consumer.takes(qos) && best.is_none_or(|b| consumer.priority > self.consumers[b].priority) {
                best = Some(i);
            }
        }
        if let Some(i) = best {
            self.turn = (i + 1) % count;
        }
        best
    }

    /// Notes that `seq` goes to consumer `index`. Returns the attempt number, from 1.
    pub fn deliver(&mut self, seq: Seq, priority: u8, index: usize, due: Instant) -> u16 {
        let redelivered = self.front.remove(&seq);
        if priority > 0 {
            self.urgent.remove(&(Reverse(priority), seq));
        } else if (!redelivered || planted!(CursorJumps)) && seq >= self.next {
            // One from the front may lie far ahead of the cursor after a restart: what is between is still to come.
            self.next = seq.next();
        }
        let consumer = &mut self.consumers[index];
        consumer.in_flight += 1;
        let touched = self.touched.entry(seq).or_insert(NEW);
        touched.deliveries = touched.deliveries.saturating_add(1);
        touched.state = State::InFlight { due };
        touched.last = Some(consumer.who);
        let attempt = touched.deliveries;
        // Two steps forward for each one added: what is acknowledged in time does not pile up until its deadline.
        for _ in 0..2 {
            if self.deadlines.front().is_some_and(|(at, seq)| !self.is_in_flight(*seq, *at)) {
                self.deadlines.pop_front();
            }
        }
        if self.deadlines.back().is_none_or(|(last, _)| *last <= due) {
            self.deadlines.push_back((due, seq));
        } else {
            self.odd_deadlines.insert((due, seq));
        }
        attempt
    }

    // ---- what is over -------------------------------------------------------------------------------------------

    /// Takes `seq` out of every line it may stand in. Returns its notes if it was touched.
    fn untouch(&mut self, seq: Seq) -> Option<Touched> {
        let touched = self.touched.remove(&seq)?;
        match touched.state {
            State::InFlight { .. } => self.give_back_credit(touched.last),
            State::Ready => {
                self.front.remove(&seq);
                if planted!(CreditTwice) {
                    self.give_back_credit(touched.last);
                }
            }
            State::Delayed { until } => _ = self.delayed.remove(&(until, seq)),
            State::Dying => {}
        }
        Some(touched)
    }

    fn give_back_credit(&mut self, who: Option<message::Consumer>) {
        if let Some(consumer) = self.consumers.iter_mut().find(|c| Some(c.who) == who) {
            consumer.in_flight -= 1;
        }
    }

    /// `seq` is finished for this subscription, for whatever reason. `false`: it was before.
    pub fn finish(&mut self, seq: Seq) -> bool {
        self.untouch(seq);
        if !self.wants(seq) {
            return false;
        }
        self.finished += 1;
        if seq == self.floor {
            self.floor = self.done.first_gap(seq.next());
            self.done.trim_below(self.floor);
        } else {
            self.done.insert(seq);
        }
        true
    }

    /// Raises the floor over numbers that have no message: `first` is the topic's first live message at or after it.
    pub fn raise_floor(&mut self, first: Seq) {
        if first > self.floor {
            self.floor = self.done.first_gap(first);
            self.done.trim_below(self.floor);
        }
    }

    /// A delivery has come to nothing (timeout or reject): counts as failed, once, also if a reject comes after the timeout.
    /// Returns how often it has.
    pub fn fail(&mut self, seq: Seq) -> u16 {
        let Some(touched) = self.touched.get_mut(&seq) else { return 0 };
        let (was, last) = (touched.state, touched.last);
        if matches!(was, State::InFlight { .. }) {
            touched.failures = touched.failures.saturating_add(1);
            self.failed += 1;
        }
        let failures = touched.failures;
        match was {
            State::InFlight { .. } => self.give_back_credit(last),
            State::Ready => _ = self.front.remove(&seq),
            State::Delayed { until } => _ = self.delayed.remove(&(until, seq)),
            State::Dying => {}
        }
        failures
    }

    /// After `fail`: back to the front of the queue, at once.
    pub fn requeue(&mut self, seq: Seq) {
        if let Some(touched) = self.touched.get_mut(&seq) {
            touched.state = State::Ready;
            self.front.insert(seq);
        }
    }

    /// After `fail`: to the dead-letter topic.
    pub fn die(&mut self, seq: Seq, death: Death) {
        if let Some(touched) = self.touched.get_mut(&seq) {
            touched.state = State::Dying;
            self.dying.push_back((seq, death));
        }
    }

    /// Replay: deliveries of `seq` had failed `failures` times.
    pub fn restore_failures(&mut self, seq: Seq, failures: u16) {
        if self.wants(seq) {
            let touched = Touched { deliveries: failures, failures, state: State::Ready, last: None };
            self.touched.insert(seq, touched);
            self.front.insert(seq);
        }
    }

    /// The deliveries in flight whose time is up, oldest first.
    pub fn take_overdue(&mut self, now: Instant) -> Vec<Seq> {
        let mut due = Vec::new();
        while let Some((at, seq)) = self.deadlines.front().copied() {
            let live = self.is_in_flight(seq, at);
            if live && at > now {
                break;
            }
            self.deadlines.pop_front();
            if live {
                due.push(seq);
            }
        }
        while let Some((at, seq)) = self.odd_deadlines.first().copied() {
            let live = self.is_in_flight(seq, at);
            if live && at > now {
                break;
            }
            self.odd_deadlines.pop_first();
            if live {
                due.push(seq);
            }
        }
        due.sort_unstable();
        due
    }

    fn is_in_flight(&self, seq: Seq, due: Instant) -> bool {
        self.touched.get(&seq).is_some_and(|t| t.state == State::InFlight { due })
    }

    /// Delayed messages whose time has come go to the front.
    pub fn wake_delayed(&mut self, now: Instant) {
        while let Some((until, seq)) = self.delayed.first().copied() {
            if until > now {
                break;
            }
            self.delayed.pop_first();
            self.requeue(seq);
        }
    }

    /// What of `ranges` has been delivered and is not finished, in order, each once. A range takes what `who` had last; a
    /// single tag names its message, whoever had it.
    ///
    /// Costs the lesser of what the ranges span and what is touched, however many ranges there are and however they overlap.
    pub fn delivered_in(&self, ranges: &TagRanges, who: message::Consumer) -> Vec<Seq> {
        let mut found = Vec::new();
        let mut wide = Ranges::default();
        let mut span = 0;
        for (first, last) in &ranges.0 {
            let (first, last) = (self.seq(*first), self.seq(*last));
            if first == last {
                found.extend(Some(first).filter(|seq| self.touched.get(seq).is_some_and(Touched::is_delivered)));
            } else if last >= self.floor {
                wide.insert_range(first.max(self.floor), last);
            }
        }
        let mine = |touched: &Touched| touched.is_delivered() && touched.last == Some(who);
        for (first, last) in wide.iter() {
            span = last.0.saturating_sub(first.0).saturating_add(1).saturating_add(span);
        }
        if span <= self.touched.len() as u64 {
            let all = wide.iter().flat_map(|(first, last)| (first.0..=last.0).map(Seq));
            found.extend(all.filter(|seq| self.touched.get(seq).is_some_and(mine)));
        } else {
            found.extend(self.touched.iter().filter(|(seq, t)| mine(t) && wide.contains(**seq)).map(|(seq, _)| *seq));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    // ---- consumers ----------------------------------------------------------------------------------------------

    pub fn consumer_mut(&mut self, who: message::Consumer) -> Option<&mut Consumer> {
        self.consumers.iter_mut().find(|c| c.who == who)
    }

    /// The consumer is gone: what it had in flight goes to the front of the queue, and does not count as failed.
    /// `false`: it was not there.
    pub fn detach(&mut self, who: message::Consumer) -> bool {
        let Some(i) = self.consumers.iter().position(|c| c.who == who) else { return false };
        self.consumers.remove(i);
        self.turn = 0;
        let mut had: Vec<Seq> = self
            .touched
            .iter()
            .filter(|(_, t)| t.last == Some(who) && matches!(t.state, State::InFlight { .. }))
            .map(|(seq, _)| *seq)
            .collect();
        had.sort_unstable();
        for seq in had {
            self.requeue(seq);
        }
        true
    }

    /// A v1 subscriber takes over this orphan: its tags count from 1 again.
    ///
    /// - `pending`: messages of the topic, QoS0 ones too, wait for the log; they come after what is visible.
    pub fn restart_tags(&mut self, topic: &Topic, pending: bool) {
        let newest = if pending { topic.visible.next() } else { topic.next_seq };
        // While something waits, what is stored already may lie behind a QoS0 message that is still to come.
        let stored =
            topic.index.live_from(self.floor).find(|e| self.wants(e.seq)).map_or(newest, |e| e.seq.min(newest));
        let first = self.qos0.front().map_or(stored, |queued| stored.min(queued.seq));
        self.tag_base = first.0 - 1;
        for touched in self.touched.values_mut() {
            touched.last = None;
        }
    }

    /// When something has to be done about it without anybody asking.
    pub fn next_deadline(&self) -> Option<Instant> {
        [
            self.deadlines.front().map(|(at, _)| *at),
            self.odd_deadlines.first().map(|(at, _)| *at),
            self.delayed.first().map(|(at, _)| *at),
            self.consumers.iter().filter_map(|c| c.poll.map(|p| p.lapses)).min(),
            self.ends_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What must always be true. O(n): for tests and the simulator.
    pub fn invariants(&self) {
        let in_flight = self.touched.values().filter(|t| matches!(t.state, State::InFlight { .. })).count() as u64;
        assert_eq!(in_flight, self.in_flight(), "every delivery in flight is somebody's");
        assert_eq!(self.front.len(), self.touched.values().filter(|t| t.state == State::Ready).count());
        let delayed = self.touched.values().filter(|t| matches!(t.state, State::Delayed { .. })).count();
        assert_eq!(self.delayed.len(), delayed);
        assert_eq!(self.qos0_bytes, self.qos0.iter().map(|q| q.body.0.len()).sum::<usize>());
        for (first, _) in self.done.iter() {
            assert!(first > self.floor, "the floor is the first unfinished message");
        }
        for consumer in &self.consumers {
            assert!(consumer.version == Version::V1 || consumer.credit <= limits::CREDIT_MAX);
        }
    }
}

const NEW: Touched = Touched { deliveries: 0, failures: 0, state: State::Ready, last: None };
