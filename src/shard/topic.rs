//! One topic: its sequence, the messages still wanted, its subscriptions, and the identities it remembers.

use std::collections::VecDeque;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::limits;
use crate::planted::planted;
use crate::protocol::request::Identity;
use crate::shard::index::Index;
use crate::shard::ranges::Ranges;
use crate::time::{Duration, Instant, WallMs};
use crate::types::{Lsn, Qos, Seq, SubId, TopicId};

#[derive(Debug)]
pub struct Topic {
    pub id: TopicId,
    pub name: Bytes,
    /// The number the next message gets.
    pub next_seq: Seq,
    /// QoS1 messages up to here may be delivered: they are as durable as the policy asks.
    pub visible: Seq,
    /// Messages below it were in the log when the broker started: an earlier run may have delivered them.
    pub recovered: Seq,
    pub index: Index,
    pub subs: Vec<SubId>,
    /// How many of them are of QoS1.
    pub qos1_subs: u32,
    /// QoS1 messages ever published, and their bytes in the log.
    pub stored: u64,
    pub stored_bytes: u64,
    /// Messages of both kinds since the broker started.
    pub published: u64,
    /// Where the last QoS1 message of the topic ends in the log: QoS0 messages behind it wait for it, to keep their order.
    pub last_end: Lsn,
    pub dedup: Dedup,
    pub expiry_timer: Option<Instant>,
    /// No subscription and no message since.
    pub idle_since: Option<Instant>,
}

impl Topic {
    pub fn new(id: TopicId, name: Bytes) -> Topic {
        Topic {
            id,
            name,
            next_seq: Seq(1),
            visible: Seq(0),
            recovered: Seq(0),
            index: Index::default(),
            subs: Vec::new(),
            qos1_subs: 0,
            stored: 0,
            stored_bytes: 0,
            published: 0,
            last_end: Lsn(0),
            dedup: Dedup::default(),
            expiry_timer: None,
            idle_since: None,
        }
    }

    pub fn attach(&mut self, sub: SubId, qos: Qos) {
        self.subs.push(sub);
        self.qos1_subs += u32::from(qos == Qos::AtLeastOnce);
    }

    pub fn detach(&mut self, sub: SubId, qos: Qos) {
        self.subs.retain(|s| *s != sub);
        self.qos1_subs -= u32::from(qos == Qos::AtLeastOnce);
    }

    pub fn has_qos0_subs(&self) -> bool {
        self.qos1_subs as usize != self.subs.len()
    }

    pub fn take_seq(&mut self) -> Seq {
        let seq = self.next_seq;
        self.next_seq = seq.next();
        seq
    }
}

/// The identities a topic remembers: the newest `DEDUP_IDS_MAX` message ids within the window, and what
/// the `DEDUP_PUBLISHERS_MAX` publishers seen last have stored. Outside of it a duplicate is stored again.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Dedup {
    ids: FxHashMap<Bytes, WallMs>,
    order: VecDeque<(WallMs, Bytes)>,
    publishers: FxHashMap<u64, Publisher>,
}

/// What one publisher has stored. Ranges, not just the highest sequence: a publish that was refused leaves a gap, and
/// must not be taken for a duplicate when it is sent again.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Publisher {
    pub stored: Ranges,
    pub seen: WallMs,
}

impl Dedup {
    pub fn is_duplicate(&self, identity: &Identity, now: WallMs, window: Duration) -> bool {
        match identity {
            Identity::MessageId(id) => {
                self.ids.get(id).is_some_and(|at| now.0.saturating_sub(at.0) <= window.as_millis())
            }
            Identity::Publisher { id, sequence } if planted!(DedupHighest) => {
                self.publishers.get(id).is_some_and(|p| p.stored.iter().any(|(_, last)| *sequence <= last.0))
            }
            Identity::Publisher { id, sequence } => {
                self.publishers.get(id).is_some_and(|p| p.stored.contains(Seq(*sequence)))
            }
        }
    }

    pub fn remember(&mut self, identity: &Identity, now: WallMs, window: Duration) {
        match identity {
            Identity::MessageId(id) => {
                self.ids.insert(id.clone(), now);
                self.order.push_back((now, id.clone()));
            }
            Identity::Publisher { id, sequence } => {
                let publisher = self.publishers.entry(*id).or_default();
                publisher.stored.insert(Seq(*sequence));
                publisher.seen = now;
                publisher.stored.keep_newest(limits::DEDUP_RANGES_MAX);
                if self.publishers.len() > limits::DEDUP_PUBLISHERS_MAX {
                    self.forget_oldest_publishers();
                }
            }
        }
        self.trim(now, window);
    }

    pub fn trim(&mut self, now: WallMs, window: Duration) {
        while let Some((at, _)) = self.order.front() {
            if self.order.len() <= limits::DEDUP_IDS_MAX && now.0.saturating_sub(at.0) <= window.as_millis() {
                break;
            }
            let Some((at, id)) = self.order.pop_front() else { break };
            // The same id may have come again since, outside the window.
            if self.ids.get(&id) == Some(&at) {
                self.ids.remove(&id);
            }
        }
    }

    /// Half of them at once, so that this is rare.
    fn forget_oldest_publishers(&mut self) {
        let mut seen: Vec<(WallMs, u64)> = self.publishers.iter().map(|(id, last)| (last.seen, *id)).collect();
        seen.sort_unstable();
        for (_, id) in &seen[..seen.len() / 2] {
            self.publishers.remove(id);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty() && self.publishers.is_empty()
    }

    /// The message ids remembered, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = (WallMs, &Bytes)> {
        self.order.iter().filter(|(at, id)| self.ids.get(id) == Some(at)).map(|(at, id)| (*at, id))
    }

    /// The publishers remembered, by id.
    pub fn publishers(&self) -> Vec<(u64, &Publisher)> {
        let mut all: Vec<_> = self.publishers.iter().map(|(id, publisher)| (*id, publisher)).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }

    pub fn restore_publisher(&mut self, id: u64, publisher: Publisher) {
        self.publishers.insert(id, publisher);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(1000);

    fn id(text: &'static str) -> Identity {
        Identity::MessageId(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn an_id_is_a_duplicate_inside_the_window_only() {
        let mut dedup = Dedup::default();
        dedup.remember(&id("a"), WallMs(100), WINDOW);
        assert!(dedup.is_duplicate(&id("a"), WallMs(1100), WINDOW));
        assert!(!dedup.is_duplicate(&id("a"), WallMs(1101), WINDOW));
        assert!(!dedup.is_duplicate(&id("b"), WallMs(100), WINDOW));
        dedup.remember(&id("a"), WallMs(1200), WINDOW);
        assert!(dedup.is_duplicate(&id("a"), WallMs(2000), WINDOW), "trimming the old one must not forget the new");
    }

    #[test]
    fn a_publisher_may_fill_a_gap_but_not_repeat() {
        let mut dedup = Dedup::default();
        let p = |sequence| Identity::Publisher { id: 7, sequence };
        dedup.remember(&p(5), WallMs(0), WINDOW);
        assert!(dedup.is_duplicate(&p(5), WallMs(9_999_999), WINDOW));
        assert!(!dedup.is_duplicate(&p(4), WallMs(0), WINDOW), "4 was refused: its second try is no duplicate");
        assert!(!dedup.is_duplicate(&p(6), WallMs(0), WINDOW));
    }

    #[test]
    fn memory_is_bounded() {
        // One for each kind of identity: time goes on for publishers, and ids live only so long.
        let (mut ids, mut dedup) = (Dedup::default(), Dedup::default());
        for n in 0..(limits::DEDUP_IDS_MAX as u64 + 10) {
            ids.remember(&Identity::MessageId(Bytes::from(n.to_be_bytes().to_vec())), WallMs(0), WINDOW);
            dedup.remember(&Identity::Publisher { id: n, sequence: 1 }, WallMs(n), WINDOW);
        }
        assert_eq!(ids.ids.len(), limits::DEDUP_IDS_MAX);
        assert!(dedup.publishers.len() <= limits::DEDUP_PUBLISHERS_MAX);
        let newest = limits::DEDUP_IDS_MAX as u64 + 9;
        assert!(dedup.is_duplicate(&Identity::Publisher { id: newest, sequence: 1 }, WallMs(newest), WINDOW));
    }
}
