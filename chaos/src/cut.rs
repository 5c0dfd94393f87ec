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
        let mut invoked = HashSet::new();
        self.recorded.iter().enumerate().filter(move |(_, stamped)| match stamped.event {
            Event::Invoke { publisher, seq } if counts(stamped) => {
                invoked.insert((publisher, seq));
                true
            }
            Event::Rejected { publisher, seq, .. } | Event::Unknown { publisher, seq } => {
                invoked.contains(&(publisher, seq))
            }
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
    /// The history that was judged is handed back.
    pub fn judge(&self, after: &[Event], drained: bool) -> (Verdict, Taken, Vec<Event>) {
        let mut invoked: HashMap<(u16, u64), usize> = HashMap::new();
        let mut confirmed: HashMap<(u16, u64), Seen> = HashMap::new();
        let mut delivered: HashSet<(u16, u64)> = HashSet::new();
        let mut ack_sent: HashSet<(u16, u16, u64)> = HashSet::new();
        let mut acked: HashMap<(u16, u16, u64), Seen> = HashMap::new();
        for (index, Stamped { stamp, event }) in self.before() {
            let seen = Seen { index, micros: stamp.micros };
            match *event {
                // The first time it could have been stored.
                Event::Invoke { publisher, seq } => _ = invoked.entry((publisher, seq)).or_insert(index),
                Event::Confirmed { publisher, seq, .. } => _ = confirmed.entry((publisher, seq)).or_insert(seen),
                Event::Deliver(Delivery { message: Some(MessageId { publisher, seq, .. }), .. }) => {
                    delivered.insert((publisher, seq));
                }
                Event::AckSent { sub, publisher, seq } => _ = ack_sent.insert((sub, publisher, seq)),
                Event::Acked { sub, publisher, seq } => _ = acked.entry((sub, publisher, seq)).or_insert(seen),
                _ => {}
            }
        }

        // What came out, and was in: a publish sent again and stored as new was not.
        let mut came: HashSet<(u16, u64)> = HashSet::new();
        let mut came_to: HashSet<(u16, u16, u64)> = HashSet::new();
        let mut anew: HashSet<(u16, u64)> = HashSet::new();
        for event in after {
            match *event {
                Event::Deliver(Delivery { sub, message: Some(MessageId { publisher, seq, .. }), .. }) => {
                    came.insert((publisher, seq));
                    came_to.insert((sub, publisher, seq));
                }
                Event::Confirmed { publisher, seq, duplicate: false } => _ = anew.insert((publisher, seq)),
                _ => {}
            }
        }
        let mut horizon: HashMap<u16, usize> = HashMap::new();
        for message in came.difference(&anew) {
            if let (Some(index), Some(log)) = (invoked.get(message), self.log_of(message.0)) {
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

        let waits = |(publisher, seq): (u16, u64)| {
            let topic = self.plan.publishers.get(usize::from(publisher));
            (0..).zip(&self.plan.subscriptions).any(|(sub, planned): (u16, _)| {
                topic == Some(&planned.topic) && !ack_sent.contains(&(sub, publisher, seq))
            })
        };
        let gone = confirmed
            .iter()
            .filter(|(message, seen)| !came.contains(message) && waits(**message) && excused(message.0, seen));
        let gone: HashSet<(u16, u64)> = gone.map(|(message, _)| *message).collect();
        let undone = acked.iter().filter(|(ack, seen)| came_to.contains(ack) && excused(ack.1, seen));
        let undone: HashSet<(u16, u16, u64)> = undone.map(|(ack, _)| *ack).collect();

        let history = self.before().map(|(_, stamped)| &stamped.event).filter(|event| match **event {
            Event::Confirmed { publisher, seq, .. } => !gone.contains(&(publisher, seq)),
            Event::Acked { sub, publisher, seq } => !undone.contains(&(sub, publisher, seq)),
            _ => true,
        });
        let history: Vec<Event> = history.chain(after).cloned().collect();
        let mut oracle = Oracle::new(self.plan.clone());
        history.iter().for_each(|event| oracle.observe(event));
        let mut verdict = oracle.finish(drained);

        let taken =
            Taken { confirmed: confirmed.len() as u64, publishes: gone.len() as u64, acks: undone.len() as u64 };
        if let Allowed::Records(most) = self.allowed
            && taken.publishes > most
        {
            let text = format!("the cut took {} confirmed messages; at most {most} may go", taken.publishes);
            verdict.found(Kind::Lost, text);
        }
        if self.plan.strict && drained {
            // Delivered under `always` means durable, confirmed or not.
            for message in delivered.iter().filter(|m| !confirmed.contains_key(m) && waits(**m)) {
                if !came.contains(message) {
                    let text =
                        format!("message {} of publisher {} was delivered before it was durable", message.1, message.0);
                    verdict.found(Kind::Lost, text);
                }
            }
        }
        (verdict, taken, history)
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
            let (verdict, taken, _) = cut.judge(&self.after, true);
            (verdict, taken)
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
