//! What any history must satisfy (DURABILITY 3.9). Pure: eats events one by one and names what is wrong.
//!
//! Owns: the meaning of every anomaly. Never: reads a clock, a file, a socket. Time and memory are O(events): publishers
//! number densely from 1, so "seen before?" is one bit.
//!
//! What a crash excuses, and what not:
//! - A publish without confirm may have been stored or not; a publisher with an identity resends it, and both attempts
//!   are one message. A publisher without identity never resends, so every message exists at most once for both kinds.
//! - A message may be delivered again until the broker has confirmed its acknowledgement, but from the second time on
//!   it carries the redelivered flag: what was published before a crash "may have been" delivered before it.
//!   One case is excused unless `strict` (policy `always`): the message was delivered before it was durable, the crash
//!   unwrote it, and its publisher sent it again: for the broker that is the first time.
//! - Order is promised for first deliveries. `attempt` above 1 says that the broker knows of an earlier delivery (which
//!   may have died unread in a socket), so only attempt 1 is checked: against all that was seen before if the
//!   subscription has one consumer at a time, and within one connection if consumers compete.
//!
//! A plan may name everybody who ever comes (the harnesses around a real process), or publishers and subscriptions may join
//! as life goes on (the simulator): these are judged by what `world` adds: qualities of messages, subscriptions that begin and
//! end, and what a power cut was allowed to unwrite.

mod world;

use std::collections::HashMap;

use serde::Serialize;

use crate::message::MessageId;
pub use crate::oracle::world::{Excuse, SubKind, Timing, Traits};

/// Who publishes where, and who subscribes to what. Fixed for one history.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// The topic each publisher publishes to.
    pub publishers: Vec<u16>,
    pub subscriptions: Vec<PlannedSubscription>,
    /// The policy forbids that a delivery comes before durability.
    pub strict: bool,
}

/// Durable, and subscribed before the first publish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedSubscription {
    pub topic: u16,
    /// Several consumers may be attached at once.
    pub shared: bool,
}

/// One thing that a client or the harness saw, in the order in which it was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The broker was started, for the `run`th time, after every client of the run before was gone.
    Boot {
        run: u32,
    },
    /// About to be sent, for the first time or again.
    Invoke {
        publisher: u16,
        seq: u64,
    },
    /// `duplicate`: the broker says that it already had it.
    Confirmed {
        publisher: u16,
        seq: u64,
        duplicate: bool,
    },
    Rejected {
        publisher: u16,
        seq: u64,
        code: u16,
    },
    /// The connection ended before an answer came.
    Unknown {
        publisher: u16,
        seq: u64,
    },
    Deliver(Delivery),
    /// A consumer is about to acknowledge, with or without asking for a confirm: the broker may now forget the message.
    AckSent {
        sub: u16,
        publisher: u16,
        seq: u64,
    },
    /// The broker confirmed the consumer's acknowledgement.
    Acked {
        sub: u16,
        publisher: u16,
        seq: u64,
    },
    /// A publisher that the plan does not name: it gets the next number.
    Joins {
        topic: u16,
    },
    /// The next message of `publisher` is no ordinary one; comes before its first `Invoke`.
    Special {
        publisher: u16,
        seq: u64,
        traits: Traits,
    },
    /// A subscription that the plan does not name is about to be asked for: it gets the next number.
    Asks {
        topic: u16,
        kind: SubKind,
    },
    /// The broker says that the subscription exists, and whether it did before: whatever is first sent from now on is owed to it.
    Attached {
        sub: u16,
        conn: u32,
        resumed: Option<bool>,
    },
    /// Something that the oracle cannot know changes what is owed.
    Excused(Excuse),
    /// The place in the log that a confirm named: the log's number (one per core and run) and the position in it.
    Position {
        publisher: u16,
        seq: u64,
        log: u32,
        at: u64,
    },
    /// One copy of the message was found in the dead-letter topic.
    Buried {
        publisher: u16,
        seq: u64,
    },
    /// Clients were connected and worked, and nothing at all was confirmed for a long time.
    Stuck {
        run: u32,
    },
    /// Anything else that no client should see; the text says what.
    Misbehaved {
        run: u32,
        text: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delivery {
    pub sub: u16,
    /// Number of the consumer's connection; never used twice.
    pub conn: u32,
    pub tag: u64,
    /// From 1; 0 in a dialect that tells neither this nor whether it is a redelivery.
    pub attempt: u16,
    pub redelivered: bool,
    /// `None`: the payload is not, byte for byte, one that a publisher sends.
    pub message: Option<MessageId>,
    /// When it left the broker, if that is known.
    pub timing: Option<Timing>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Confirmed, and some durable subscription never got it; or got it, could not acknowledge it, and never got it again.
    Lost,
    /// Delivered, but never published, refused, to another topic, or with other bytes.
    Phantom,
    /// Delivered again after its acknowledgement was confirmed in the same run of the broker, or stored twice.
    Duplicate,
    /// Delivered again without saying so.
    DuplicateNotFlagged,
    /// First deliveries not in publish order.
    OutOfOrder,
    /// Delivered again after a crash although its acknowledgement was confirmed before.
    LostConsumerAck,
    /// A run made no progress.
    Stuck,
    /// Did not start, died by itself, spoke nonsense.
    Misbehaved,
    /// Delivered before its delay had passed, or after its time to live.
    Untimely,
}

impl Kind {
    pub const ALL: [Kind; 9] = [
        Kind::Lost,
        Kind::Phantom,
        Kind::Duplicate,
        Kind::DuplicateNotFlagged,
        Kind::OutOfOrder,
        Kind::LostConsumerAck,
        Kind::Stuck,
        Kind::Misbehaved,
        Kind::Untimely,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Lost => "lost",
            Kind::Phantom => "phantom",
            Kind::Duplicate => "duplicate",
            Kind::DuplicateNotFlagged => "duplicate-not-flagged",
            Kind::OutOfOrder => "out-of-order",
            Kind::LostConsumerAck => "lost-consumer-ack",
            Kind::Stuck => "stuck",
            Kind::Misbehaved => "misbehaved",
            Kind::Untimely => "untimely",
        }
    }
}

/// Anomalies kept in words; all are counted.
const DETAILS_MAX: usize = 40;

/// What was found, and how much was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Verdict {
    pub published: u64,
    pub confirmed: u64,
    /// Confirms that said "already had it".
    pub confirmed_as_duplicate: u64,
    pub rejected: u64,
    pub unknown: u64,
    /// Deliveries of whatever kind.
    pub delivered: u64,
    /// Deliveries beyond the first of a message to a subscription: allowed, if flagged and not yet acknowledged.
    pub redelivered: u64,
    pub acked: u64,
    /// By kind, in the order of `Kind::ALL`.
    pub anomalies: [u64; Kind::ALL.len()],
    pub details: Vec<String>,
}

impl Verdict {
    pub fn count(&self, kind: Kind) -> u64 {
        self.anomalies[kind as usize]
    }

    pub fn is_clean(&self) -> bool {
        self.anomalies.iter().all(|count| *count == 0)
    }

    pub fn add(&mut self, other: &Verdict) {
        self.published += other.published;
        self.confirmed += other.confirmed;
        self.confirmed_as_duplicate += other.confirmed_as_duplicate;
        self.rejected += other.rejected;
        self.unknown += other.unknown;
        self.delivered += other.delivered;
        self.redelivered += other.redelivered;
        self.acked += other.acked;
        for (sum, count) in self.anomalies.iter_mut().zip(other.anomalies) {
            *sum += count;
        }
        let room = DETAILS_MAX.saturating_sub(self.details.len());
        self.details.extend(other.details.iter().take(room).cloned());
    }

    pub fn found(&mut self, kind: Kind, text: String) {
        self.anomalies[kind as usize] += 1;
        if self.details.len() < DETAILS_MAX {
            self.details.push(format!("{}: {text}", kind.name()));
        }
    }
}

/// Judges one history.
pub struct Oracle {
    plan: Plan,
    run: u32,
    publishers: Vec<Publisher>,
    subs: Vec<Subscription>,
    /// By connection of the current run.
    conns: HashMap<u32, Connection>,
    /// Confirmed messages that no consumer could acknowledge yet, summed over subscriptions.
    missing: u64,
    /// Subscriptions that the plan names.
    planned: usize,
    /// Events so far: what came before what.
    events: u64,
    /// Where confirmed messages lie: log, position, publisher, sequence.
    positions: Vec<(u32, u64, u16, u64)>,
    verdict: Verdict,
}

#[derive(Default)]
struct Publisher {
    /// Sequences sent so far: 1..=invoked.
    invoked: u64,
    /// The run of the latest attempt, by sequence - 1.
    sent_in: Vec<u32>,
    confirmed: Bits,
    /// Confirmed, and not as a duplicate.
    stored: Bits,
    unknown: Bits,
    rejected: Bits,
    special: HashMap<u64, Traits>,
    /// Sent again after later ones may have been stored: it takes its place behind them.
    unordered: Bits,
    /// Sent more than once.
    repeated: Bits,
    /// The run whose end was allowed to unwrite it.
    may_be_lost: HashMap<u64, u32>,
    /// Copies in the dead-letter topic.
    buried: HashMap<u64, u32>,
    /// The event that confirmed it, by sequence.
    confirmed_at: HashMap<u64, u64>,
    /// Seen, or confirmed as duplicate, in this run: it has survived all before.
    last_seen: HashMap<u64, u32>,
}

struct Subscription {
    /// By publisher.
    tracks: Vec<Track>,
    /// What was acknowledged in the current run, to tell a duplicate from a lost acknowledgement.
    acked_in_run: Vec<(u16, u64)>,
    /// `None`: the plan names it.
    joined: Option<world::Joined>,
}

/// What one subscription saw of one publisher.
#[derive(Clone, Default)]
struct Track {
    delivered: Bits,
    ack_sent: Bits,
    acked: Bits,
    acked_in_run: Bits,
    /// Delivered, and then sent again by its publisher after a crash may have unwritten it.
    renewed: Bits,
    /// Delivered in an earlier run.
    earlier: Bits,
    /// Delivered without the redelivered flag.
    unflagged: Bits,
    /// The acknowledgement was confirmed, and a power cut was allowed to unwrite it.
    ack_may_be_lost: Bits,
    /// A later one was delivered in its place while it was still to live.
    skipped: Bits,
    /// By class: highest sequence ever delivered.
    highest: [u64; CLASSES],
    /// The sequence from which on the subscription is owed everything; 0: it is not known to exist.
    owed_from: u64,
}

#[derive(Default)]
struct Connection {
    /// The tag each message of a subscription came under.
    tags: HashMap<(u16, u16, u64), u64>,
    /// By subscription, publisher and class: the highest sequence among first attempts.
    highest: HashMap<(u16, u16, u8), u64>,
    /// By subscription: the event by which it was attached.
    attached: HashMap<u16, u64>,
}

/// Priorities: each is a line of its own.
const CLASSES: usize = 10;

impl Oracle {
    pub fn new(plan: Plan) -> Oracle {
        let publishers = plan.publishers.iter().map(|_| Publisher::default()).collect();
        let tracks = vec![Track::default(); plan.publishers.len()];
        let subs = plan.subscriptions.iter();
        let subs =
            subs.map(|_| Subscription { tracks: tracks.clone(), acked_in_run: Vec::new(), joined: None }).collect();
        let planned = plan.subscriptions.len();
        Oracle {
            plan,
            run: 0,
            publishers,
            subs,
            conns: HashMap::new(),
            missing: 0,
            planned,
            events: 0,
            positions: Vec::new(),
            verdict: Verdict::default(),
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Confirmed messages that no consumer could acknowledge yet, summed over subscriptions.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// What has been found so far. `lost` is judged by `finish` alone.
    pub fn so_far(&self) -> &Verdict {
        &self.verdict
    }

    pub fn observe(&mut self, event: &Event) {
        self.events += 1;
        match event {
            Event::Boot { run } => self.on_boot(*run),
            Event::Invoke { publisher, seq } => self.on_invoke(*publisher, *seq),
            Event::Confirmed { publisher, seq, duplicate } => self.on_confirmed(*publisher, *seq, *duplicate),
            Event::Rejected { publisher, seq, code } => self.on_rejected(*publisher, *seq, *code),
            Event::Unknown { publisher, seq } => {
                if self.known(*publisher, *seq, "ended without answer") {
                    self.verdict.unknown += 1;
                    self.publishers[usize::from(*publisher)].unknown.set(*seq);
                }
            }
            Event::Deliver(delivery) => self.on_deliver(delivery),
            Event::AckSent { sub, publisher, seq } => self.on_ack_sent(*sub, *publisher, *seq),
            Event::Acked { sub, publisher, seq } => self.on_acked(*sub, *publisher, *seq),
            Event::Joins { topic } => self.on_joins(*topic),
            Event::Special { publisher, seq, traits } => self.on_special(*publisher, *seq, *traits),
            Event::Asks { topic, kind } => self.on_asks(*topic, *kind),
            Event::Attached { sub, conn, resumed } => self.on_attached(*sub, *conn, *resumed),
            Event::Excused(excuse) => self.on_excused(*excuse),
            Event::Position { publisher, seq, log, at } => self.positions.push((*log, *at, *publisher, *seq)),
            Event::Buried { publisher, seq } => self.on_buried(*publisher, *seq),
            Event::Stuck { run } => self.verdict.found(Kind::Stuck, format!("run {run} made no progress")),
            Event::Misbehaved { run, text } => self.verdict.found(Kind::Misbehaved, format!("run {run}: {text}")),
        }
    }

    /// `drained`: every subscription had the time to get everything, so what is missing is lost.
    pub fn finish(mut self, drained: bool) -> Verdict {
        if !drained {
            return self.verdict;
        }
        self.finish_joined();
        for (sub, planned) in self.plan.subscriptions.iter().enumerate().take(self.planned) {
            for (number, publisher) in self.publishers.iter().enumerate() {
                if self.plan.publishers[number] != planned.topic {
                    continue;
                }
                let track = &self.subs[sub].tracks[number];
                for seq in 1..=publisher.invoked {
                    if publisher.confirmed.get(seq) && !track.ack_sent.get(seq) {
                        let fate = if track.delivered.get(seq) {
                            "got it, did not acknowledge it, and never got it again"
                        } else {
                            "never got it"
                        };
                        let text = format!("{} was confirmed, subscription {sub} {fate}", named(number, seq));
                        self.verdict.found(Kind::Lost, text);
                    }
                }
            }
        }
        self.verdict
    }

    fn on_boot(&mut self, run: u32) {
        self.run = run;
        self.conns.clear();
        for sub in &mut self.subs {
            for track in &mut sub.tracks {
                track.earlier = track.delivered.clone();
            }
            for (publisher, seq) in sub.acked_in_run.drain(..) {
                sub.tracks[usize::from(publisher)].acked_in_run.clear(seq);
            }
        }
    }

    fn on_invoke(&mut self, number: u16, seq: u64) {
        let Some(publisher) = self.publishers.get_mut(usize::from(number)) else {
            return self.nonsense(format!("publisher {number} is not in the plan"));
        };
        if seq == publisher.invoked + 1 {
            publisher.invoked = seq;
            publisher.sent_in.push(self.run);
            self.verdict.published += 1;
            return;
        }
        if seq == 0 || seq > publisher.invoked {
            self.nonsense(format!("{} was sent before the one before it", named(number.into(), seq)));
            return;
        }
        let sent_in = &mut publisher.sent_in[seq as usize - 1];
        let crashed = std::mem::replace(sent_in, self.run) < self.run;
        publisher.repeated.set(seq);
        // What was refused, or lost as allowed, comes behind those that were stored meanwhile.
        // So does a QoS0 message that nobody remembers.
        let behind = publisher.rejected.get(seq) || publisher.traits(seq).at_most_once;
        if publisher.may_be_lost.contains_key(&seq) || (behind && seq < publisher.invoked) {
            publisher.unordered.set(seq);
        }
        publisher.rejected.clear(seq);
        // Identities of QoS0 messages are kept in memory only.
        let excused = publisher.traits(seq).at_most_once || publisher.may_be_lost.contains_key(&seq);
        if crashed && (!self.plan.strict || excused) {
            for sub in self.subs.iter_mut() {
                let track = &mut sub.tracks[usize::from(number)];
                if track.delivered.get(seq) {
                    track.renewed.set(seq);
                }
            }
        }
    }

    fn on_confirmed(&mut self, number: u16, seq: u64, duplicate: bool) {
        if !self.known(number, seq, "was confirmed") {
            return;
        }
        self.verdict.confirmed_as_duplicate += u64::from(duplicate);
        self.judge_answer(number, seq, duplicate);
        let publisher = &mut self.publishers[usize::from(number)];
        if duplicate {
            publisher.last_seen.insert(seq, self.run);
        }
        if publisher.confirmed.get(seq) {
            return;
        }
        publisher.confirmed.set(seq);
        publisher.confirmed_at.insert(seq, self.events);
        self.verdict.confirmed += 1;
        let topic = self.plan.publishers[usize::from(number)];
        for (planned, sub) in self.plan.subscriptions.iter().zip(&self.subs).take(self.planned) {
            let waits = planned.topic == topic && !sub.tracks[usize::from(number)].ack_sent.get(seq);
            self.missing += u64::from(waits);
        }
    }

    fn on_rejected(&mut self, number: u16, seq: u64, code: u16) {
        if !self.known(number, seq, "was rejected") {
            return;
        }
        self.verdict.rejected += 1;
        let publisher = &mut self.publishers[usize::from(number)];
        publisher.rejected.set(seq);
        // An earlier attempt of unknown outcome may have been stored all the same.
        if publisher.unknown.get(seq) || publisher.repeated.get(seq) {
            return;
        }
        if let Some(sub) = self.subs.iter().position(|sub| sub.tracks[usize::from(number)].delivered.get(seq)) {
            let text = format!("{} was delivered to {sub}, then rejected with {code}", named(number.into(), seq));
            self.verdict.found(Kind::Phantom, text);
        }
    }

    fn on_deliver(&mut self, delivery: &Delivery) {
        self.verdict.delivered += 1;
        match self.judge_delivery(delivery) {
            Ok(()) => {}
            Err((kind, text)) => {
                let Delivery { sub, conn, tag, attempt, redelivered, .. } = delivery;
                let how = format!("tag {tag}, attempt {attempt}, redelivered {redelivered}, connection {conn}");
                self.verdict.found(kind, format!("subscription {sub}, run {}: {text} ({how})", self.run));
            }
        }
    }

    fn judge_delivery(&mut self, delivery: &Delivery) -> Result<(), (Kind, String)> {
        let sub = usize::from(delivery.sub);
        let Some(planned) = self.plan.subscriptions.get(sub).copied() else {
            return Err((Kind::Misbehaved, "is not in the plan".into()));
        };
        let Some(message) = delivery.message else {
            return Err((Kind::Phantom, "the payload is not what any publisher sends".into()));
        };
        let MessageId { publisher: number, topic, seq } = message;
        let name = named(number.into(), seq);
        let index = usize::from(number);
        let Some(publisher) = self.publishers.get(index) else {
            return Err((Kind::Phantom, format!("{name}: there is no such publisher")));
        };
        if self.plan.publishers[index] != topic || topic != planned.topic {
            return Err((Kind::Phantom, format!("{name} belongs to topic {topic}, not here")));
        }
        if seq == 0 || seq > publisher.invoked {
            return Err((Kind::Phantom, format!("{name} was never published")));
        }
        let stored = publisher.unknown.get(seq) || publisher.confirmed.get(seq) || publisher.repeated.get(seq);
        if publisher.rejected.get(seq) && !stored {
            return Err((Kind::Phantom, format!("{name} was rejected")));
        }

        let traits = publisher.traits(seq);
        let class = traits.class.filter(|_| !publisher.unordered.get(seq));
        self.judge_timing(delivery, &traits, &name)?;
        self.judge_belonging(sub, index, seq, &name)?;
        self.publishers[index].last_seen.insert(seq, self.run);

        let conn = self.conns.entry(delivery.conn).or_default();
        let here_before = conn.tags.insert((delivery.sub, number, seq), delivery.tag);
        let mut other_tag = here_before.is_some_and(|before| before != delivery.tag);
        let first_here = here_before.is_none();
        let attached = conn.attached.get(&delivery.sub).copied();
        let seen_before = self.subs[sub].tracks[index].delivered.get(seq);
        // The dialect that tells no attempts: what was never seen counts as the first.
        let first_attempt = delivery.attempt == 1 || (delivery.attempt == 0 && !seen_before);
        // Where consumers compete, what another one left behind comes back between newer ones, flagged.
        // So does, after a crash, what had been given up and the log did not say so yet.
        // And what had expired by a clock that a restart has put back: only what is in the store keeps it.
        let loose = planned.shared || self.subs[sub].gives_up() || traits.ttl_ms > 0;
        let ordered_here = class.filter(|_| first_attempt && !(loose && delivery.redelivered));
        let mut below_here = false;
        if let Some(class) = ordered_here {
            let highest_here = conn.highest.entry((delivery.sub, number, class)).or_default();
            below_here = seq < *highest_here;
            let before = std::mem::replace(highest_here, seq.max(*highest_here));
            if before > 0 && !planned.shared && !self.subs[sub].gives_up() && delivery.attempt == 1 {
                self.note_skipped(delivery, index, class, before, seq);
            }
        }

        // What a crash has unwritten, and its publisher has sent again, may come where it could not before.
        let late = delivery.redelivered || delivery.attempt == 0 || self.publishers[index].repeated.get(seq);
        let renewed = self.subs[sub].tracks[index].renewed.get(seq);
        let stays = !renewed && !traits.at_most_once;
        other_tag |= self.subs[sub].other_tag(number, seq, delivery.tag, stays);
        let shared_race = planned.shared && self.subs[sub].acked_after(number, seq, attached);
        let at_most_once = traits.at_most_once || self.subs[sub].at_most_once();
        let track = &mut self.subs[sub].tracks[index];
        if seen_before {
            self.verdict.redelivered += 1;
            track.renewed.clear(seq);
            // One that was overtaken on another connection by its own redelivery is excused.
            let unflagged =
                !delivery.redelivered && (track.unflagged.get(seq) || track.earlier.get(seq) || !first_here);
            if !delivery.redelivered {
                track.unflagged.set(seq);
            }
            if at_most_once && !renewed {
                return Err((Kind::Duplicate, format!("{name} again, though it is to be delivered at most once")));
            }
            if track.acked_in_run.get(seq) && !shared_race {
                return Err((Kind::Duplicate, format!("{name} again after its confirmed acknowledgement")));
            }
            if track.acked.get(seq) && !track.acked_in_run.get(seq) && !track.ack_may_be_lost.get(seq) {
                return Err((Kind::LostConsumerAck, format!("{name} again after a crash, though acknowledged before")));
            }
            if unflagged && delivery.attempt > 0 && !renewed {
                return Err((Kind::DuplicateNotFlagged, format!("{name} again, without saying so")));
            }
            if other_tag {
                return Err((Kind::Duplicate, format!("{name} is stored twice: it also has another tag")));
            }
        } else {
            let highest = class.map_or(0, |class| track.highest[usize::from(class)]);
            track.delivered.set(seq);
            if !delivery.redelivered {
                track.unflagged.set(seq);
            }
            if let Some(class) = class {
                track.highest[usize::from(class)] = seq.max(highest);
            }
            if first_attempt && !planned.shared && !(loose && late) && seq < highest {
                return Err((Kind::OutOfOrder, format!("{name} for the first time, after {highest}")));
            }
        }
        if below_here {
            return Err((Kind::OutOfOrder, format!("{name} as first attempt, after a later one on this connection")));
        }
        Ok(())
    }

    fn on_ack_sent(&mut self, sub: u16, number: u16, seq: u64) {
        let planned = usize::from(sub) < self.planned;
        let confirmed = planned && self.publishers.get(usize::from(number)).is_some_and(|p| p.confirmed.get(seq));
        if let Some(track) = self.delivered_track(sub, number, seq)
            && !track.ack_sent.get(seq)
        {
            track.ack_sent.set(seq);
            self.missing -= u64::from(confirmed);
        }
    }

    fn on_acked(&mut self, sub: u16, number: u16, seq: u64) {
        if let Some(track) = self.delivered_track(sub, number, seq)
            && !track.acked.get(seq)
        {
            track.acked.set(seq);
            track.acked_in_run.set(seq);
            let events = self.events;
            self.subs[usize::from(sub)].acked_in_run.push((number, seq));
            self.subs[usize::from(sub)].note_acked(number, seq, events);
            self.verdict.acked += 1;
        }
    }

    /// `None`: a consumer acknowledges what is a phantom already.
    fn delivered_track(&mut self, sub: u16, number: u16, seq: u64) -> Option<&mut Track> {
        let track = self.subs.get_mut(usize::from(sub))?.tracks.get_mut(usize::from(number))?;
        track.delivered.get(seq).then_some(track)
    }

    /// Whether this message was ever sent; if not, the answer to it is nonsense.
    fn known(&mut self, number: u16, seq: u64, what: &str) -> bool {
        let known = self.publishers.get(usize::from(number)).is_some_and(|p| (1..=p.invoked).contains(&seq));
        if !known {
            self.nonsense(format!("{} {what}, but was never sent", named(number.into(), seq)));
        }
        known
    }

    fn nonsense(&mut self, text: String) {
        self.verdict.found(Kind::Misbehaved, format!("run {}: {text}", self.run));
    }
}

fn named(publisher: usize, seq: u64) -> String {
    format!("message {seq} of publisher {publisher}")
}

/// A set of sequences, one bit each.
#[derive(Clone, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn get(&self, at: u64) -> bool {
        self.0.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    fn set(&mut self, at: u64) {
        let word = (at / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (at % 64);
    }

    fn clear(&mut self, at: u64) {
        if let Some(word) = self.0.get_mut((at / 64) as usize) {
            *word &= !(1 << (at % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publishers 0 and 1 on topic 0, 2 on topic 1. Subscriptions 0 and 1 (shared) of topic 0, 2 of topic 1.
    fn plan() -> Plan {
        let sub = |topic, shared| PlannedSubscription { topic, shared };
        Plan {
            publishers: vec![0, 0, 1],
            subscriptions: vec![sub(0, false), sub(0, true), sub(1, false)],
            strict: true,
        }
    }

    /// A history under construction; tags and connections are filled in as a sound broker would.
    struct Forged {
        oracle: Oracle,
        run: u32,
        got: Vec<(u16, MessageId)>,
    }

    impl Forged {
        fn new() -> Forged {
            Forged::with(plan())
        }

        fn with(plan: Plan) -> Forged {
            let mut forged = Forged { oracle: Oracle::new(plan), run: 0, got: Vec::new() };
            forged.boot();
            forged
        }

        fn see(&mut self, event: Event) -> &mut Self {
            self.oracle.observe(&event);
            if let Event::Deliver(Delivery { sub, message: Some(message), .. }) = event {
                self.got.push((sub, message));
            }
            self
        }

        /// Every consumer acknowledges what it got.
        fn settle(&mut self) -> &mut Self {
            for (sub, MessageId { publisher, seq, .. }) in std::mem::take(&mut self.got) {
                self.see(Event::AckSent { sub, publisher, seq });
            }
            self
        }

        fn boot(&mut self) -> &mut Self {
            self.run += 1;
            self.see(Event::Boot { run: self.run })
        }

        fn invoke(&mut self, publisher: u16, seq: u64) -> &mut Self {
            self.see(Event::Invoke { publisher, seq })
        }

        fn confirmed(&mut self, publisher: u16, seq: u64) -> &mut Self {
            self.see(Event::Confirmed { publisher, seq, duplicate: false })
        }

        fn publish(&mut self, publisher: u16, seqs: std::ops::RangeInclusive<u64>) -> &mut Self {
            for seq in seqs {
                self.invoke(publisher, seq).confirmed(publisher, seq);
            }
            self
        }

        fn delivery(&self, sub: u16, publisher: u16, seq: u64) -> Delivery {
            let topic = plan().publishers[usize::from(publisher)];
            Delivery {
                sub,
                conn: self.run * 100 + u32::from(sub),
                tag: seq * 10 + u64::from(publisher),
                attempt: 1,
                redelivered: false,
                timing: None,
                message: Some(MessageId { publisher, topic, seq }),
            }
        }

        fn deliver(&mut self, sub: u16, publisher: u16, seq: u64) -> &mut Self {
            let delivery = self.delivery(sub, publisher, seq);
            self.see(Event::Deliver(delivery))
        }

        /// Flagged: the broker, or one before it, may have delivered it.
        fn again(&mut self, sub: u16, publisher: u16, seq: u64, attempt: u16) -> &mut Self {
            let delivery = Delivery { attempt, redelivered: true, ..self.delivery(sub, publisher, seq) };
            self.see(Event::Deliver(delivery))
        }

        fn acked(&mut self, sub: u16, publisher: u16, seq: u64) -> &mut Self {
            self.see(Event::Acked { sub, publisher, seq })
        }

        /// Exactly these anomalies, in whatever order, and no other.
        fn has(mut self, expected: &[Kind]) {
            self.settle();
            let verdict = self.oracle.finish(true);
            for kind in Kind::ALL {
                let wanted = expected.iter().filter(|e| **e == kind).count() as u64;
                assert_eq!(verdict.count(kind), wanted, "{}: {:?}", kind.name(), verdict.details);
            }
            assert_eq!(verdict.is_clean(), expected.is_empty());
            assert_eq!(verdict.details.len(), expected.len());
            for (detail, kind) in verdict.details.iter().zip(expected) {
                assert!(detail.starts_with(&format!("{}: ", kind.name())), "{detail} is not named {}", kind.name());
            }
        }
    }

    #[test]
    fn a_sound_history_with_a_crash_is_clean() {
        let mut h = Forged::new();
        h.publish(0, 1..=3).publish(2, 1..=1);
        h.deliver(0, 0, 1).deliver(0, 0, 2).acked(0, 0, 1).deliver(1, 0, 1).deliver(2, 2, 1).acked(2, 2, 1);
        h.invoke(0, 4).invoke(0, 5).see(Event::Unknown { publisher: 0, seq: 4 });
        h.see(Event::Unknown { publisher: 0, seq: 5 });
        h.boot();
        // 4 had been stored and 5 had not; what may have been delivered before says so.
        h.invoke(0, 4).see(Event::Confirmed { publisher: 0, seq: 4, duplicate: true });
        h.invoke(0, 5).confirmed(0, 5);
        h.again(0, 0, 2, 1).again(0, 0, 3, 1).again(0, 0, 4, 1).deliver(0, 0, 5);
        h.again(1, 0, 1, 2).again(1, 0, 2, 1).again(1, 0, 3, 1).again(1, 0, 4, 1).deliver(1, 0, 5);
        for seq in 2..=5 {
            h.acked(0, 0, seq);
        }
        assert_eq!(h.settle().oracle.missing(), 0);
        let verdict = h.oracle.so_far().clone();
        assert_eq!((verdict.published, verdict.confirmed, verdict.confirmed_as_duplicate), (6, 6, 1));
        assert_eq!((verdict.unknown, verdict.redelivered, verdict.acked), (2, 2, 6));
        h.has(&[]);
    }

    #[test]
    fn an_unknown_publish_may_be_there_or_not() {
        let mut h = Forged::new();
        h.invoke(0, 1).see(Event::Unknown { publisher: 0, seq: 1 });
        h.invoke(0, 2).see(Event::Unknown { publisher: 0, seq: 2 });
        h.boot().again(0, 0, 2, 1).again(1, 0, 2, 1);
        h.has(&[]);
    }

    #[test]
    fn lost_confirmed_but_one_subscription_never_got_it() {
        let mut h = Forged::new();
        h.publish(0, 1..=2).deliver(0, 0, 1).deliver(0, 0, 2).deliver(1, 0, 1).settle();
        assert_eq!(h.oracle.missing(), 1);
        h.has(&[Kind::Lost]);
    }

    #[test]
    fn lost_confirmed_and_delivered_but_never_again() {
        let mut h = Forged::new();
        h.publish(2, 1..=3).deliver(2, 2, 1).deliver(2, 2, 2).deliver(2, 2, 3);
        // 1 was acknowledged, without confirm: the broker may forget it, or bring it again. 2 and 3 it may not forget.
        h.got.clear();
        h.see(Event::AckSent { sub: 2, publisher: 2, seq: 1 }).boot().again(2, 2, 3, 1);
        h.has(&[Kind::Lost]);
    }

    #[test]
    fn lost_is_not_judged_before_everything_had_time_to_come() {
        let mut h = Forged::new();
        h.publish(0, 1..=2);
        assert!(h.oracle.finish(false).is_clean());
    }

    #[test]
    fn phantom_never_published() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).deliver(2, 2, 2);
        h.has(&[Kind::Phantom]);
    }

    #[test]
    fn phantom_other_bytes() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1);
        let damaged = Delivery { message: None, ..h.delivery(2, 2, 1) };
        h.see(Event::Deliver(damaged));
        h.has(&[Kind::Phantom]);
    }

    #[test]
    fn phantom_of_another_topic_or_publisher() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).deliver(0, 2, 1);
        let stranger = Delivery { message: Some(MessageId { publisher: 9, topic: 1, seq: 1 }), ..h.delivery(2, 2, 1) };
        h.see(Event::Deliver(stranger));
        h.has(&[Kind::Phantom, Kind::Phantom]);
    }

    #[test]
    fn phantom_delivered_though_rejected() {
        let rejected = Event::Rejected { publisher: 2, seq: 1, code: 507 };
        let mut h = Forged::new();
        h.invoke(2, 1).see(rejected.clone()).deliver(2, 2, 1);
        h.has(&[Kind::Phantom]);

        let mut h = Forged::new();
        h.invoke(2, 1).deliver(2, 2, 1).see(rejected.clone());
        h.has(&[Kind::Phantom]);

        // The first attempt may have been stored.
        let mut h = Forged::new();
        h.invoke(2, 1).see(Event::Unknown { publisher: 2, seq: 1 });
        h.boot().invoke(2, 1).see(rejected).again(2, 2, 1, 1);
        h.has(&[]);
    }

    #[test]
    fn duplicate_after_an_acknowledgement_confirmed_in_this_run() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).acked(2, 2, 1).again(2, 2, 1, 2);
        h.has(&[Kind::Duplicate]);
    }

    #[test]
    fn duplicate_stored_twice_under_two_tags() {
        let mut h = Forged::new();
        h.invoke(2, 1).see(Event::Unknown { publisher: 2, seq: 1 }).boot().invoke(2, 1).confirmed(2, 1);
        h.again(2, 2, 1, 1);
        let copy = Delivery { tag: 99, redelivered: true, ..h.delivery(2, 2, 1) };
        h.see(Event::Deliver(copy));
        h.has(&[Kind::Duplicate]);
    }

    #[test]
    fn duplicate_not_flagged() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).deliver(2, 2, 1);
        h.has(&[Kind::DuplicateNotFlagged]);

        // Nor does a crash excuse it: the message was published before it.
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).boot().deliver(2, 2, 1);
        h.has(&[Kind::DuplicateNotFlagged]);
    }

    #[test]
    fn delivered_unwritten_and_sent_again_is_excused_unless_strict() {
        for strict in [false, true] {
            let mut h = Forged::with(Plan { strict, ..plan() });
            h.invoke(2, 1).deliver(2, 2, 1).see(Event::Unknown { publisher: 2, seq: 1 });
            h.boot().invoke(2, 1).confirmed(2, 1).deliver(2, 2, 1);
            // Once: the next one is known to the broker.
            h.again(2, 2, 1, 2);
            h.has(if strict { &[Kind::DuplicateNotFlagged] } else { &[] });
        }
        // Without a crash nothing was unwritten.
        let mut h = Forged::with(Plan { strict: false, ..plan() });
        h.invoke(2, 1).deliver(2, 2, 1).see(Event::Unknown { publisher: 2, seq: 1 });
        h.invoke(2, 1).confirmed(2, 1).deliver(2, 2, 1);
        h.has(&[Kind::DuplicateNotFlagged]);
    }

    #[test]
    fn out_of_order_first_deliveries() {
        let mut h = Forged::new();
        h.publish(2, 1..=3).deliver(2, 2, 1).deliver(2, 2, 3).deliver(2, 2, 2);
        h.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn out_of_order_across_a_crash() {
        let mut h = Forged::new();
        h.publish(2, 1..=3).deliver(2, 2, 1).deliver(2, 2, 3).boot().again(2, 2, 2, 1).again(2, 2, 3, 1);
        h.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn out_of_order_redelivered_queue_after_a_crash() {
        let mut h = Forged::new();
        h.publish(2, 1..=2).deliver(2, 2, 1).deliver(2, 2, 2).boot().again(2, 2, 2, 1).again(2, 2, 1, 1);
        h.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn a_known_redelivery_may_interleave() {
        let mut h = Forged::new();
        h.publish(2, 1..=3).deliver(2, 2, 1).deliver(2, 2, 2).again(2, 2, 1, 2).deliver(2, 2, 3).again(2, 2, 2, 2);
        h.has(&[]);
    }

    #[test]
    fn competing_consumers_are_ordered_each_by_itself() {
        let other = |h: &Forged, seq| Delivery { conn: 7, ..h.delivery(1, 0, seq) };
        let filler = |h: &mut Forged| {
            h.publish(0, 1..=4);
            for seq in 1..=4 {
                h.deliver(0, 0, seq);
            }
        };
        // One got 2 and 4 first; the other 1 and 3, and after it left they come back flagged.
        let mut h = Forged::new();
        filler(&mut h);
        let theirs = [other(&h, 1), other(&h, 3)];
        h.deliver(1, 0, 2).deliver(1, 0, 4).see(Event::Deliver(theirs[0])).see(Event::Deliver(theirs[1]));
        h.again(1, 0, 1, 1).again(1, 0, 3, 2);
        h.has(&[]);
        // On one connection, new ones never go back.
        let mut h = Forged::new();
        filler(&mut h);
        let theirs = [other(&h, 3), other(&h, 1)];
        h.deliver(1, 0, 2).deliver(1, 0, 4).see(Event::Deliver(theirs[0])).see(Event::Deliver(theirs[1]));
        h.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn publishers_are_not_ordered_against_each_other() {
        let mut h = Forged::new();
        h.publish(0, 1..=2).publish(1, 1..=2);
        for sub in 0..2 {
            h.deliver(sub, 1, 1).deliver(sub, 1, 2).deliver(sub, 0, 1).deliver(sub, 0, 2);
        }
        h.has(&[]);
    }

    #[test]
    fn lost_consumer_ack_shows_after_a_crash() {
        let mut h = Forged::new();
        h.publish(2, 1..=1).deliver(2, 2, 1).acked(2, 2, 1).boot().again(2, 2, 1, 1);
        h.has(&[Kind::LostConsumerAck]);
    }

    #[test]
    fn stuck_and_misbehaved_are_counted_as_told() {
        let mut h = Forged::new();
        h.see(Event::Stuck { run: 1 });
        h.has(&[Kind::Stuck]);
        let mut h = Forged::new();
        h.see(Event::Misbehaved { run: 1, text: "exited with 70".into() });
        h.has(&[Kind::Misbehaved]);
    }

    #[test]
    fn answers_to_what_was_never_sent_are_misbehaviour() {
        let mut h = Forged::new();
        h.confirmed(0, 1).see(Event::Rejected { publisher: 0, seq: 4, code: 1 });
        h.see(Event::Unknown { publisher: 5, seq: 1 });
        h.has(&[Kind::Misbehaved; 3]);
    }

    #[test]
    fn details_are_bounded_and_counts_are_not() {
        let mut h = Forged::new();
        for _ in 0..1_000 {
            h.deliver(2, 2, 1);
        }
        let verdict = h.oracle.finish(true);
        assert_eq!(verdict.count(Kind::Phantom), 1_000);
        assert_eq!(verdict.details.len(), DETAILS_MAX);
    }
}
