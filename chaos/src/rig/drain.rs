//! Everything comes out, by one connection with a large credit; what was left unanswered is sent again.
//!
//! It knows when that is all: a marker is published to each topic behind everything else, and a queue keeps its order. When
//! the marker has come out of every subscription and all answers are in, the rest is silence.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::{Duration, Instant};

use super::load::{PUBLISHERS, WITHOUT_IDENTITY};
use crate::broker::{KEY, Setup};
use crate::clients::topic_name;
use crate::message::MessageId;
use crate::oracle::{Delivery, Event, Plan};
use crate::wire::{Outcome, Said, Wire};

const CREDIT: u32 = 8_192;
/// Longer than any drain.
const ACK_TIMEOUT_MS: u32 = 600_000;
/// After the last marker.
const SILENCE: Duration = Duration::from_millis(25);
/// Nothing new for so long: something is missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// A marker that was refused is sent again after this: a full disk has room once something is acknowledged.
const REFUSED: Duration = Duration::from_millis(50);
/// Deliveries acknowledged together.
const TOGETHER: usize = 2_048;

/// What was seen.
pub struct Drained {
    pub events: Vec<Event>,
    /// Every marker came.
    pub all: bool,
    /// Markers published so far, by topic: where the next drain goes on.
    pub marked: Vec<u64>,
}

struct Drain<'a> {
    plan: &'a Plan,
    run: u32,
    wire: Wire,
    events: Vec<Event>,
    /// By the broker's name for it.
    subs: HashMap<u64, u16>,
    /// Publishes without an answer, by correlation id.
    sent: HashMap<u64, (u16, u64)>,
    /// Subscriptions whose marker has not come.
    unmarked: BTreeSet<u16>,
    marker: Vec<u64>,
    refused: Vec<(u16, Instant)>,
    /// Deliveries to acknowledge: the broker's subscription, tag, message.
    due: Vec<(u64, u64, MessageId)>,
    acks: HashMap<u64, Vec<(u16, MessageId)>>,
    next_cid: u64,
}

/// - `again`: what publishers had sent without hearing of it; those with an identity send it again.
/// - `marked`: markers published before, by topic; empty: none.
pub fn drain(setup: &Setup, plan: &Plan, run: u32, again: &[(u16, u64)], marked: &[u64]) -> Drained {
    let wire = Wire::connect(setup.address()).and_then(|mut wire| {
        wire.login(KEY, Duration::from_secs(10))?;
        Ok(wire)
    });
    let wire = match wire {
        Ok(wire) => wire,
        Err(error) => {
            let text = format!("no login: {error}");
            let events = vec![Event::Boot { run }, Event::Misbehaved { run, text }];
            return Drained { events, all: false, marked: marked.to_vec() };
        }
    };
    let subscriptions = plan.subscriptions.len();
    let topics = plan.publishers.len() - usize::from(PUBLISHERS);
    let mut drain = Drain {
        plan,
        run,
        wire,
        events: vec![Event::Boot { run }],
        subs: HashMap::new(),
        sent: HashMap::new(),
        unmarked: (0..subscriptions as u16).collect(),
        marker: (0..topics).map(|topic| marked.get(topic).copied().unwrap_or(0)).collect(),
        refused: Vec::new(),
        due: Vec::new(),
        acks: HashMap::new(),
        next_cid: 1_000,
    };
    let all = match drain.work(again) {
        Ok(all) => all,
        Err(error) => {
            drain.misbehaved(format!("the connection ended by itself: {error}"));
            false
        }
    };
    Drained { events: drain.events, all, marked: drain.marker }
}

impl Drain<'_> {
    fn work(&mut self, again: &[(u16, u64)]) -> io::Result<bool> {
        for (number, sub) in (0..).zip(&self.plan.subscriptions) {
            let durable = format!("subscription-{number}");
            self.wire.push_subscribe(100 + number, &topic_name(sub.topic), &durable, CREDIT, ACK_TIMEOUT_MS);
        }
        for (publisher, seq) in again.iter().filter(|(publisher, _)| *publisher < WITHOUT_IDENTITY) {
            self.publish(*publisher, *seq);
        }
        for topic in 0..self.marker.len() {
            self.mark(topic as u16);
        }
        self.wire.flush()?;
        let mut heard = Instant::now();
        loop {
            let complete =
                self.unmarked.is_empty() && self.sent.is_empty() && self.acks.is_empty() && self.due.is_empty();
            if complete && heard.elapsed() > SILENCE {
                return Ok(true);
            }
            if heard.elapsed() > PATIENCE {
                if !self.sent.is_empty() {
                    self.events.push(Event::Stuck { run: self.run });
                }
                return Ok(false);
            }
            if let Some(said) = self.wire.receive(Duration::from_millis(5))? {
                heard = Instant::now();
                self.hear(said);
            }
            if !self.due.is_empty() && (!self.wire.has_more() || self.due.len() >= TOGETHER) {
                self.acknowledge();
                self.wire.flush()?;
            }
            if let Some(ready) = self.refused.iter().position(|(_, at)| at.elapsed() > REFUSED) {
                let (topic, _) = self.refused.swap_remove(ready);
                self.mark(topic);
                self.wire.flush()?;
            }
        }
    }

    fn publish(&mut self, publisher: u16, seq: u64) {
        self.next_cid += 1;
        let topic = self.plan.publishers[usize::from(publisher)];
        let identity = (publisher < WITHOUT_IDENTITY).then_some((1_000 + u64::from(publisher), seq));
        let payload = MessageId { publisher, topic, seq }.encode();
        self.wire.push_publish(self.next_cid, &topic_name(topic), identity, &payload);
        self.events.push(Event::Invoke { publisher, seq });
        self.sent.insert(self.next_cid, (publisher, seq));
    }

    fn mark(&mut self, topic: u16) {
        let marker = &mut self.marker[usize::from(topic)];
        *marker += 1;
        let seq = *marker;
        self.publish(PUBLISHERS + topic, seq);
    }

    fn hear(&mut self, said: Said) {
        match said {
            Said::Subscribed { cid, sub, resumed } => {
                let number = (cid - 100) as u16;
                self.subs.insert(sub, number);
                if !resumed {
                    self.misbehaved(format!("durable subscription {number} is gone"));
                }
            }
            Said::Deliver { sub, tag, attempt, redelivered, payload } => {
                let Some(number) = self.subs.get(&sub).copied() else {
                    return self.misbehaved(format!("a delivery for subscription {sub}"));
                };
                let message = MessageId::decode(&payload);
                // To the oracle, each subscription has its own.
                let conn = self.run * 1_000_000 + u32::from(number);
                self.events.push(Event::Deliver(Delivery {
                    sub: number,
                    conn,
                    tag,
                    attempt,
                    redelivered,
                    message,
                    timing: None,
                }));
                if let Some(message) = message {
                    self.due.push((sub, tag, message));
                    if message.publisher >= PUBLISHERS {
                        self.unmarked.remove(&number);
                    }
                }
            }
            Said::Confirm { cid, outcome } => {
                let Some((publisher, seq)) = self.sent.remove(&cid) else {
                    return self.misbehaved(format!("{outcome:?} for {cid}, which is not in flight"));
                };
                self.events.push(match outcome {
                    Outcome::Stored => Event::Confirmed { publisher, seq, duplicate: false },
                    Outcome::Duplicate => Event::Confirmed { publisher, seq, duplicate: true },
                    Outcome::Rejected { code, .. } => {
                        if publisher >= PUBLISHERS {
                            self.refused.push((publisher - PUBLISHERS, Instant::now()));
                        }
                        Event::Rejected { publisher, seq, code }
                    }
                });
            }
            Said::Ok { cid } => {
                for (sub, MessageId { publisher, seq, .. }) in self.acks.remove(&cid).unwrap_or_default() {
                    self.events.push(Event::Acked { sub, publisher, seq });
                }
            }
            Said::Error { cid, code, text } => self.misbehaved(format!("error {code} {text} for {cid}")),
            _ => {}
        }
    }

    fn acknowledge(&mut self) {
        self.due.sort_unstable_by_key(|(sub, tag, _)| (*sub, *tag));
        let due = std::mem::take(&mut self.due);
        for group in due.chunk_by(|a, b| a.0 == b.0) {
            for part in group.chunks(256) {
                self.next_cid += 1;
                let sub = part[0].0;
                let number = self.subs[&sub];
                let ranges: Vec<(u64, u64)> = part.iter().map(|(_, tag, _)| (*tag, *tag)).collect();
                self.wire.push_ack(self.next_cid, sub, true, &ranges);
                for (_, _, MessageId { publisher, seq, .. }) in part {
                    self.events.push(Event::AckSent { sub: number, publisher: *publisher, seq: *seq });
                }
                self.acks.insert(self.next_cid, part.iter().map(|(_, _, message)| (number, *message)).collect());
            }
        }
    }

    fn misbehaved(&mut self, text: String) {
        self.events.push(Event::Misbehaved { run: self.run, text });
    }
}
