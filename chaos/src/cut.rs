//! What a power cut may take. Pure: a recorded history, the place where the power went, and what came out afterwards; says
//! whether each loss was allowed.
//!
//! Owns: the bound of every policy (DURABILITY 1.1). All else (phantoms, order, flags) is the oracle's, who is shown the
//! history as it was at the cut, less what the policy excuses.
//!
//! What counts at a cut after `at` writes, given that each event has the number of writes the disk had been given when it was
//! recorded: an answer counts if it had come by then (`writes <= at`); what was sent counts if it was sent before (`writes <
//! at`), since what the broker did about it is among later writes. So a confirm is never taken to be earlier than it was, and
//! an acknowledgement that could excuse a missing message never later.
//!
//! A log is lost from its end only. Hence what is lost must be newer than anything that survived in the same log: confirmed
//! after the latest survivor was sent. A topic lives in one log; with one core, all do.

use std::collections::{HashMap, HashSet};

use crate::message::MessageId;
use crate::oracle::{Delivery, Event, Kind, Oracle, Plan, Verdict};

/// When something was recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    /// Entries in the log of the disk's writes.
    pub writes: u64,
    pub micros: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamped {
    pub stamp: Stamp,
    pub event: Event,
}

/// Of what was confirmed, what may be lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allowed {
    Nothing,
    /// So many publishes, the last ones.
    Records(u64),
    /// What was confirmed from this time on.
    Since {
        micros: u64,
    },
    /// Any tail.
    Tail,
}

/// One place where the power goes.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a> {
    pub plan: &'a Plan,
    pub recorded: &'a [Stamped],
    /// Writes the disk had been given.
    pub at: u64,
    pub allowed: Allowed,
    /// All topics are in one log, since there is one core.
    pub one_log: bool,
}

/// What a judgement was based on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Taken {
    /// Publishes confirmed before the cut.
    pub confirmed: u64,
    /// Those of them that are gone, as the policy allows.
    pub publishes: u64,
    /// Acknowledgements confirmed before the cut that are gone, as the policy allows.
    pub acks: u64,
}

/// Where in the history something was first seen, and when.
#[derive(Clone, Copy, Debug)]
struct Seen {
    index: usize,
    micros: u64,
}

/// What a cut took of what had been confirmed, as far as the policy excuses it.
#[derive(Default)]
struct Losses {
    publishes: Table<()>,
    /// By subscription.
    acks: Vec<Table<()>>,
    taken: Taken,
    /// Delivered before the cut, and not there after it, though nobody acknowledged them.
    delivered_too_early: Vec<(u16, u64)>,
}

/// Something about messages. Publishers number densely, so it is a table.
#[derive(Clone)]
struct Table<T>(Vec<Vec<Option<T>>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table(Vec::new())
    }
}

impl<T: Clone> Table<T> {
    fn get(&self, publisher: u16, seq: u64) -> Option<&T> {
        self.0.get(usize::from(publisher))?.get(seq as usize)?.as_ref()
    }

    fn has(&self, publisher: u16, seq: u64) -> bool {
        self.get(publisher, seq).is_some()
    }

    /// The first one counts.
    fn put(&mut self, publisher: u16, seq: u64, value: T) {
        let (row, at) = (usize::from(publisher), seq as usize);
        if row >= self.0.len() {
            self.0.resize(row + 1, Vec::new());
        }
        if at >= self.0[row].len() {
            self.0[row].resize(at + 1, None);
        }
        self.0[row][at].get_or_insert(value);
    }

    fn iter(&self) -> impl Iterator<Item = (u16, u64, &T)> {
        let rows = (0u16..).zip(&self.0);
        rows.flat_map(|(publisher, row)| {
            (0u64..).zip(row).filter_map(move |(seq, value)| Some((publisher, seq, value.as_ref()?)))
        })
    }
}

impl<'a> Cut<'a> {
    /// The events that count, in their order.
    fn before(&self) -> impl Iterator<Item = (usize, &'a Stamped)> + use<'a> {
        let at = self.at;
        let counts = move |stamped: &Stamped| match stamped.event {
            Event::Invoke { .. } | Event::AckSent { .. } => stamped.stamp.writes < at,
            Event::Confirmed { .. } | Event::Deliver(_) | Event::Acked { .. } => stamped.stamp.writes <= at,
            // Never stored, however late that is heard; and what the harness noticed.
            _ => true,
        };
        let mut invoked = Table::default();
        self.recorded.iter().enumerate().filter(move |(_, stamped)| match stamped.event {
            Event::Invoke { publisher, seq } if counts(stamped) => {
                invoked.put(publisher, seq, ());
                true
            }
            Event::Rejected { publisher, seq, .. } | Event::Unknown { publisher, seq } => invoked.has(publisher, seq),
            _ => counts(stamped),
        })
    }

    /// What each publisher had sent and not heard of, ascending.
    pub fn unanswered(&self) -> Vec<(u16, u64)> {
        let mut open: HashSet<(u16, u64)> = HashSet::new();
        for (_, stamped) in self.before() {
            match stamped.event {
                Event::Invoke { publisher, seq } => _ = open.insert((publisher, seq)),
                Event::Confirmed { publisher, seq, .. } | Event::Rejected { publisher, seq, .. } => {
                    open.remove(&(publisher, seq));
                }
                _ => {}
            }
        }
        let mut open: Vec<(u16, u64)> = open.into_iter().collect();
        open.sort_unstable();
        open
    }

    /// `after`: all that was seen on the disk as the cut left it. `drained`: everything on it has come out.
    pub fn judge(&self, after: &[Event], drained: bool) -> (Verdict, Taken) {
        let losses = self.losses(after);
        let mut oracle = Oracle::new(self.plan.clone());
        self.history(&losses, after).for_each(|event| oracle.observe(event));
        let mut verdict = oracle.finish(drained);
        if let Allowed::Records(most) = self.allowed
            && losses.taken.publishes > most
        {
            let text = format!("the cut took {} confirmed messages; at most {most} may go", losses.taken.publishes);
            verdict.found(Kind::Lost, text);
        }
        if self.plan.strict && drained {
            for (publisher, seq) in losses.delivered_too_early {
                let text = format!("message {seq} of publisher {publisher} was delivered before it was durable");
                verdict.found(Kind::Lost, text);
            }
        }
        (verdict, losses.taken)
    }

    /// The history that `judge` shows the oracle.
    pub fn judged(&self, after: &[Event]) -> Vec<Event> {
        self.history(&self.losses(after), after).cloned().collect()
    }

    /// What counts, less what the policy excuses.
    fn history<'b>(&self, losses: &'b Losses, after: &'b [Event]) -> impl Iterator<Item = &'b Event>
    where
        'a: 'b,
    {
        let before = self.before().map(|(_, stamped)| &stamped.event).filter(|event| match **event {
            Event::Confirmed { publisher, seq, .. } => !losses.publishes.has(publisher, seq),
            Event::Acked { sub, publisher, seq } => !losses.acks[usize::from(sub)].has(publisher, seq),
            _ => true,
        });
        before.chain(after)
    }

    fn losses(&self, after: &[Event]) -> Losses {
        let subs = self.plan.subscriptions.len();
        let mut invoked: Table<usize> = Table::default();
        let mut confirmed: Table<Seen> = Table::default();
        let mut delivered: Table<()> = Table::default();
        let mut ack_sent = vec![Table::<()>::default(); subs];
        let mut acked = vec![Table::<Seen>::default(); subs];
        for (index, Stamped { stamp, event }) in self.before() {
            let seen = Seen { index, micros: stamp.micros };
            match *event {
                // The first time it could have been stored.
                Event::Invoke { publisher, seq } => invoked.put(publisher, seq, index),
                Event::Confirmed { publisher, seq, .. } => confirmed.put(publisher, seq, seen),
                Event::Deliver(Delivery { message: Some(MessageId { publisher, seq, .. }), .. }) => {
                    delivered.put(publisher, seq, ());
                }
                Event::AckSent { sub, publisher, seq } => ack_sent[usize::from(sub)].put(publisher, seq, ()),
                Event::Acked { sub, publisher, seq } => acked[usize::from(sub)].put(publisher, seq, seen),
                _ => {}
            }
        }

        // What came out, and was in: a publish sent again and stored as new was not.
        let mut came: Table<()> = Table::default();
        let mut came_to = vec![Table::<()>::default(); subs];
        let mut anew: Table<()> = Table::default();
        for event in after {
            match *event {
                Event::Deliver(Delivery { sub, message: Some(MessageId { publisher, seq, .. }), .. }) => {
                    came.put(publisher, seq, ());
                    came_to[usize::from(sub)].put(publisher, seq, ());
                }
                Event::Confirmed { publisher, seq, duplicate: false } => anew.put(publisher, seq, ()),
                _ => {}
            }
        }
        let mut horizon: HashMap<u16, usize> = HashMap::new();
        for (publisher, seq, ()) in came.iter().filter(|(publisher, seq, ())| !anew.has(*publisher, *seq)) {
            if let (Some(index), Some(log)) = (invoked.get(publisher, seq), self.log_of(publisher)) {
                let latest = horizon.entry(log).or_default();
                *latest = (*latest).max(*index);
            }
        }
        let excused = |publisher: u16, seen: &Seen| {
            let newest = self.log_of(publisher).is_none_or(|log| horizon.get(&log).is_none_or(|at| seen.index > *at));
            newest
                && match self.allowed {
                    Allowed::Nothing => false,
                    Allowed::Records(_) | Allowed::Tail => true,
                    Allowed::Since { micros } => seen.micros >= micros,
                }
        };

        let waits = |publisher: u16, seq: u64| {
            let topic = self.plan.publishers.get(usize::from(publisher));
            let mut subs = self.plan.subscriptions.iter().zip(&ack_sent);
            subs.any(|(planned, sent)| topic == Some(&planned.topic) && !sent.has(publisher, seq))
        };
        let mut losses = Losses { acks: vec![Table::default(); subs], ..Losses::default() };
        for (publisher, seq, seen) in confirmed.iter() {
            losses.taken.confirmed += 1;
            if !came.has(publisher, seq) && waits(publisher, seq) && excused(publisher, seen) {
                losses.publishes.put(publisher, seq, ());
                losses.taken.publishes += 1;
            }
        }
        for (sub, (acked, came)) in acked.iter().zip(&came_to).enumerate() {
            for (publisher, seq, seen) in acked.iter() {
                if came.has(publisher, seq) && excused(publisher, seen) {
                    losses.acks[sub].put(publisher, seq, ());
                    losses.taken.acks += 1;
                }
            }
        }
        // Delivered under `always` means durable, confirmed or not; what is confirmed the oracle misses by itself.
        let early = delivered.iter().map(|(publisher, seq, ())| (publisher, seq)).filter(|(publisher, seq)| {
            !confirmed.has(*publisher, *seq) && !came.has(*publisher, *seq) && waits(*publisher, *seq)
        });
        losses.delivered_too_early = early.collect();
        losses
    }

    /// `None`: not in the plan.
    fn log_of(&self, publisher: u16) -> Option<u16> {
        let topic = self.plan.publishers.get(usize::from(publisher))?;
        Some(if self.one_log { 0 } else { *topic })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::PlannedSubscription;

    /// Publishers 0 and 1 on topic 0, 2 on topic 1; a subscription of each topic.
    fn plan(strict: bool) -> Plan {
        let sub = |topic| PlannedSubscription { topic, shared: false };
        Plan { publishers: vec![0, 0, 1], subscriptions: vec![sub(0), sub(1)], strict }
    }

    /// A history in which the disk is given ten writes and a millisecond passes with each step.
    #[derive(Default)]
    struct Forged {
        recorded: Vec<Stamped>,
        after: Vec<Event>,
        step: u64,
    }

    impl Forged {
        fn new() -> Forged {
            let mut forged = Forged::default();
            forged.see(Event::Boot { run: 1 });
            forged.after.push(Event::Boot { run: 2 });
            forged
        }

        fn see(&mut self, event: Event) -> &mut Self {
            self.step += 1;
            let stamp = Stamp { writes: self.step * 10, micros: self.step * 1_000 };
            self.recorded.push(Stamped { stamp, event });
            self
        }

        fn publish(&mut self, publisher: u16, seqs: std::ops::RangeInclusive<u64>) -> &mut Self {
            for seq in seqs {
                self.see(Event::Invoke { publisher, seq });
                self.see(Event::Confirmed { publisher, seq, duplicate: false });
            }
            self
        }

        fn delivery(publisher: u16, seq: u64, redelivered: bool) -> Event {
            let topic = plan(true).publishers[usize::from(publisher)];
            let message = Some(MessageId { publisher, topic, seq });
            let conn = if redelivered { 2 } else { 1 };
            Event::Deliver(Delivery {
                sub: topic,
                conn: conn * 10 + u32::from(topic),
                tag: seq,
                attempt: 1,
                redelivered,
                message,
                timing: None,
            })
        }

        /// Comes out of the disk that the cut left, and is acknowledged.
        fn comes(&mut self, publisher: u16, seqs: std::ops::RangeInclusive<u64>) -> &mut Self {
            let sub = plan(true).publishers[usize::from(publisher)];
            for seq in seqs {
                self.after.push(Forged::delivery(publisher, seq, true));
                self.after.push(Event::AckSent { sub, publisher, seq });
            }
            self
        }

        fn judge(&self, at: u64, allowed: Allowed, one_log: bool) -> (Verdict, Taken) {
            let plan = plan(allowed == Allowed::Nothing);
            let cut = Cut { plan: &plan, recorded: &self.recorded, at, allowed, one_log };
            cut.judge(&self.after, true)
        }

        fn has(&self, at: u64, allowed: Allowed, expected: &[(Kind, u64)]) -> Taken {
            let (verdict, taken) = self.judge(at, allowed, false);
            for kind in Kind::ALL {
                let wanted = expected.iter().find(|(k, _)| *k == kind).map_or(0, |(_, n)| *n);
                assert_eq!(verdict.count(kind), wanted, "{}: {:?}", kind.name(), verdict.details);
            }
            taken
        }
    }

    const END: u64 = 10_000;

    #[test]
    fn only_what_was_answered_before_the_cut_counts() {
        // Steps: boot 10, invoke 20, confirmed 30, invoke 40, confirmed 50.
        let mut h = Forged::new();
        h.publish(0, 1..=2);
        h.has(49, Allowed::Nothing, &[(Kind::Lost, 1)]);
        h.has(50, Allowed::Nothing, &[(Kind::Lost, 2)]);
        h.has(29, Allowed::Nothing, &[]);
        let cut = |at| {
            Cut { plan: &plan(true), recorded: &h.recorded, at, allowed: Allowed::Nothing, one_log: true }.unanswered()
        };
        assert_eq!(cut(49), [(0, 2)]);
        assert_eq!(cut(29), [(0, 1)]);
        assert_eq!(cut(20), []);
        // What was sent at 40 cannot be on a disk cut at 40.
        h.comes(0, 1..=2);
        h.has(41, Allowed::Nothing, &[]);
        h.has(40, Allowed::Nothing, &[(Kind::Phantom, 1)]);
    }

    #[test]
    fn an_acknowledgement_sent_after_the_cut_excuses_nothing() {
        let mut h = Forged::new();
        h.publish(0, 1..=1).see(Forged::delivery(0, 1, false)); // 20, 30, 40
        h.see(Event::AckSent { sub: 0, publisher: 0, seq: 1 }); // 50
        h.has(50, Allowed::Nothing, &[(Kind::Lost, 1)]);
        h.has(51, Allowed::Nothing, &[]);
    }

    #[test]
    fn a_confirmed_acknowledgement_survives_unless_the_policy_excuses_it() {
        let mut h = Forged::new();
        h.publish(0, 1..=1).see(Forged::delivery(0, 1, false));
        h.see(Event::AckSent { sub: 0, publisher: 0, seq: 1 }).see(Event::Acked { sub: 0, publisher: 0, seq: 1 }); // 60
        h.comes(0, 1..=1);
        h.has(END, Allowed::Nothing, &[(Kind::LostConsumerAck, 1)]);
        h.has(59, Allowed::Nothing, &[]);
        assert_eq!(h.has(END, Allowed::Tail, &[]).acks, 1);
        h.has(END, Allowed::Since { micros: 6_001 }, &[(Kind::LostConsumerAck, 1)]);
        // Something sent later is there, so the acknowledgement was in the log before it.
        h.publish(0, 2..=2).comes(0, 2..=2);
        h.has(END, Allowed::Tail, &[(Kind::LostConsumerAck, 1)]);
    }

    #[test]
    fn at_most_so_many_records_may_go() {
        let mut h = Forged::new();
        h.publish(0, 1..=5).comes(0, 1..=3);
        assert_eq!(h.has(END, Allowed::Records(2), &[]), Taken { confirmed: 5, publishes: 2, acks: 0 });
        h.has(END, Allowed::Records(1), &[(Kind::Lost, 1)]);
        h.has(END, Allowed::Nothing, &[(Kind::Lost, 2)]);
    }

    #[test]
    fn only_what_was_confirmed_lately_may_go() {
        let mut h = Forged::new();
        h.publish(0, 1..=3).comes(0, 1..=1); // confirmed at 3, 5 and 7 ms
        assert_eq!(h.has(END, Allowed::Since { micros: 5_000 }, &[]).publishes, 2);
        h.has(END, Allowed::Since { micros: 5_001 }, &[(Kind::Lost, 1)]);
    }

    #[test]
    fn any_tail_may_go_but_no_gap() {
        let mut h = Forged::new();
        h.publish(0, 1..=4);
        assert_eq!(h.has(END, Allowed::Tail, &[]).publishes, 4);
        h.comes(0, 4..=4);
        h.has(END, Allowed::Tail, &[(Kind::Lost, 3)]);
    }

    #[test]
    fn a_gap_is_one_whoever_published_into_the_same_log() {
        let mut h = Forged::new();
        h.publish(0, 1..=1).publish(1, 1..=1).comes(1, 1..=1);
        h.has(END, Allowed::Tail, &[(Kind::Lost, 1)]);
        // Another topic may be in another log.
        let mut h = Forged::new();
        h.publish(0, 1..=1).publish(2, 1..=1).comes(2, 1..=1);
        h.has(END, Allowed::Tail, &[]);
        assert_eq!(h.judge(END, Allowed::Tail, true).0.count(Kind::Lost), 1);
        // Those that were under way together may have been stored in any order.
        let mut h = Forged::new();
        h.see(Event::Invoke { publisher: 0, seq: 1 }).see(Event::Invoke { publisher: 1, seq: 1 });
        h.see(Event::Confirmed { publisher: 0, seq: 1, duplicate: false });
        h.comes(1, 1..=1);
        h.has(END, Allowed::Tail, &[]);
    }

    #[test]
    fn what_is_sent_again_and_stored_anew_is_no_survivor() {
        let mut h = Forged::new();
        h.publish(0, 1..=1).see(Event::Invoke { publisher: 0, seq: 2 });
        h.after.push(Event::Invoke { publisher: 0, seq: 2 });
        h.after.push(Event::Confirmed { publisher: 0, seq: 2, duplicate: false });
        h.after.push(Forged::delivery(0, 2, false));
        h.after.push(Event::AckSent { sub: 0, publisher: 0, seq: 2 });
        assert_eq!(h.has(END, Allowed::Tail, &[]).publishes, 1);
        h.after[2] = Event::Confirmed { publisher: 0, seq: 2, duplicate: true };
        h.after[3] = Forged::delivery(0, 2, true);
        h.has(END, Allowed::Tail, &[(Kind::Lost, 1)]);
    }

    #[test]
    fn delivered_under_always_means_durable() {
        let mut h = Forged::new();
        h.see(Event::Invoke { publisher: 0, seq: 1 }).see(Forged::delivery(0, 1, false));
        h.has(END, Allowed::Nothing, &[(Kind::Lost, 1)]);
        h.has(END, Allowed::Tail, &[]);
        h.comes(0, 1..=1);
        h.has(END, Allowed::Nothing, &[]);
    }

    #[test]
    fn what_one_subscription_got_the_other_must_get() {
        let mut h = Forged::new();
        h.publish(0, 1..=1);
        let mut plan = plan(false);
        plan.subscriptions.push(PlannedSubscription { topic: 0, shared: false });
        h.comes(0, 1..=1);
        let cut = Cut { plan: &plan, recorded: &h.recorded, at: END, allowed: Allowed::Tail, one_log: true };
        assert_eq!(cut.judge(&h.after, true).0.count(Kind::Lost), 1);
    }
}
