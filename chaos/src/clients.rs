//! Publishers and consumers: the load, and the eyes. One thread and one connection each, for one run of the broker.
//!
//! They end when the connection does: after a SIGKILL everything that had arrived is still read and recorded, so that a
//! confirm counts if and only if its bytes reached the client.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::broker::KEY;
use crate::history::Recorder;
use crate::message::MessageId;
use crate::oracle::{Delivery, Event};
use crate::rng::Rng;
use crate::wire::{Outcome, Said, Wire};

/// Publishes one publisher may have unanswered.
const WINDOW: usize = 64;
/// Beyond this many messages in a run a publisher only trickles: histories stay small on a fast machine.
const FULL_SPEED_MAX: u64 = 8_000;
/// Ranges in one ACK frame.
const RANGES_MAX: usize = 256;
/// Longer than any run, so that only a lost connection requeues.
const ACK_TIMEOUT_MS: u32 = 600_000;
const BEAT: Duration = Duration::from_secs(3);

pub fn topic_name(topic: u16) -> String {
    format!("chaos.topic-{topic}")
}

/// What all clients of one run share.
pub struct Run {
    pub number: u32,
    pub address: SocketAddr,
    pub recorder: Arc<Recorder>,
    pub seed: u64,
    /// Resend what is unanswered, publish nothing new, acknowledge all at once.
    pub draining: bool,
    /// The network may end connections at any time; clients make new ones.
    pub flaky: bool,
    /// Set just before the kill: from now on a lost connection is no surprise, and no new one is made.
    pub closing: AtomicBool,
    /// Set instead of a kill: clients leave by themselves.
    pub leave: AtomicBool,
    pub subscribed: AtomicUsize,
    pub publishers_done: AtomicUsize,
    /// Confirms of publishes and of acknowledgements.
    pub progress: AtomicU64,
    /// Numbers connections over all runs.
    pub connections: Arc<AtomicU32>,
}

impl Run {
    /// Logs in, however often it takes; `None`: the run is over.
    fn connect(&self) -> Option<Wire> {
        loop {
            let wire = Wire::connect(self.address).and_then(|mut wire| {
                // The next broker may already listen here: it is not ours to talk to.
                if self.closing.load(Ordering::SeqCst) {
                    return Err(std::io::ErrorKind::Interrupted.into());
                }
                wire.login(KEY, Duration::from_secs(5)).map(|()| wire)
            });
            if self.closing.load(Ordering::SeqCst) || self.leaves() {
                return None;
            }
            match wire {
                Ok(wire) => return Some(wire),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn rng(&self, role: u64, number: u16) -> Rng {
        Rng::derive(self.seed, &[u64::from(self.number), role, u64::from(number)])
    }

    fn misbehaved(&self, text: String) {
        self.recorder.record(&[Event::Misbehaved { run: self.number, text }]);
    }

    /// The connection is gone; a surprise unless the broker was about to be killed or the network is flaky. No network
    /// makes a broker speak nonsense, though. True: to be made again.
    fn gone(&self, who: &str, error: &std::io::Error) -> bool {
        let nonsense = error.kind() == std::io::ErrorKind::InvalidData;
        let closing = self.closing.load(Ordering::SeqCst);
        if nonsense || !self.flaky && !closing {
            self.misbehaved(format!("{who}: the connection ended by itself: {error}"));
        }
        self.flaky && !closing
    }

    /// Where the network injects garbage, its client is told so.
    fn is_told_of_garbage(&self, cid: u64, code: u16) -> bool {
        self.flaky && cid == 0 && code == 400
    }

    fn leaves(&self) -> bool {
        self.leave.load(Ordering::SeqCst)
    }
}

/// One publisher over all runs.
#[derive(Debug)]
pub struct Publisher {
    pub number: u16,
    pub topic: u16,
    /// Sends publisher id and sequence, and resends what a crash left unanswered.
    pub identity: bool,
    next: u64,
    /// Sent, and not yet answered; ascending. Empty between runs without an identity.
    unanswered: VecDeque<u64>,
}

/// How a publisher works in one run.
enum Pace {
    /// Keeps its window full.
    Flat,
    /// Sends a full window, then rests.
    Bursts(Duration),
    /// One at a time.
    Trickle(Duration),
}

impl Publisher {
    pub fn new(number: u16, topic: u16, identity: bool) -> Publisher {
        Publisher { number, topic, identity, next: 1, unanswered: VecDeque::new() }
    }

    pub fn run(mut self, run: &Run) -> Publisher {
        let mut rng = run.rng(1, self.number);
        // Some lose their connection while the broker lives, and send again what was not answered. Not those without an
        // identity: what their old connection still carries may come after what the new one sends.
        let mut leaves_at =
            (self.identity && !run.draining && rng.percent(25)).then(|| Instant::now() + rng.millis(0, 600));
        while let Some(mut wire) = run.connect() {
            if !self.work(run, &mut wire, &mut rng, leaves_at.take()) {
                break;
            }
        }
        run.publishers_done.fetch_add(1, Ordering::SeqCst);
        self
    }

    /// True: left at `until` or was cut off, to come back.
    fn work(&mut self, run: &Run, wire: &mut Wire, rng: &mut Rng, until: Option<Instant>) -> bool {
        let who = format!("publisher {}", self.number);
        let topic = topic_name(self.topic);
        let pace = match rng.between(0, 3) {
            0 | 1 => Pace::Flat,
            2 => Pace::Bursts(rng.millis(1, 30)),
            _ => Pace::Trickle(rng.millis(1, 10)),
        };
        let mut resend = std::mem::take(&mut self.unanswered);
        let mut in_flight = BTreeSet::new();
        let mut left = false;
        let (mut sent, mut due, mut beat) = (0, Instant::now(), Instant::now());
        let gone = loop {
            if run.leaves() || run.draining && resend.is_empty() && in_flight.is_empty() {
                break None;
            }
            let trickles = sent >= FULL_SPEED_MAX || matches!(pace, Pace::Trickle(_));
            let window = if trickles && resend.is_empty() { 1 } else { WINDOW };
            let mut invoked = Vec::new();
            // A burst begins when the last one is answered.
            if due <= Instant::now() && (matches!(pace, Pace::Flat) || in_flight.is_empty()) {
                while in_flight.len() < window {
                    let seq = match resend.pop_front() {
                        Some(seq) => seq,
                        None if run.draining => break,
                        None => {
                            self.next += 1;
                            self.next - 1
                        }
                    };
                    let message = MessageId { publisher: self.number, topic: self.topic, seq };
                    let identity = self.identity.then_some((1_000 + u64::from(self.number), seq));
                    wire.push_publish(seq, &topic, identity, &message.encode());
                    invoked.push(Event::Invoke { publisher: self.number, seq });
                    in_flight.insert(seq);
                    sent += 1;
                }
            }
            if !invoked.is_empty() {
                run.recorder.record(&invoked);
                // A failed write shows as a failed read, once what has arrived is read.
                wire.flush().ok();
                beat = Instant::now();
                due = beat
                    + match pace {
                        Pace::Flat if sent < FULL_SPEED_MAX => Duration::ZERO,
                        Pace::Flat => Duration::from_millis(5),
                        Pace::Bursts(rest) | Pace::Trickle(rest) => rest,
                    };
                if until.is_some_and(|until| until <= beat) {
                    left = true;
                    break None;
                }
            } else if beat.elapsed() > BEAT {
                wire.push_ping(u64::MAX);
                wire.flush().ok();
                beat = Instant::now();
            }
            let wait = due.saturating_duration_since(Instant::now());
            let wait = if wait.is_zero() || in_flight.len() >= window { Duration::from_millis(20) } else { wait };
            if let Err(error) = self.listen(run, wire, wait, &mut in_flight) {
                break Some(error);
            }
        };
        if let Some(error) = gone {
            left = run.gone(&who, &error);
        }
        let unknown: Vec<Event> =
            in_flight.iter().map(|seq| Event::Unknown { publisher: self.number, seq: *seq }).collect();
        run.recorder.record(&unknown);
        if self.identity {
            // What was in flight was sent before what still waits to be sent again.
            self.unanswered = in_flight.into_iter().chain(resend).collect();
        }
        left
    }

    /// Takes what the broker says, waiting for the first of it.
    fn listen(&self, run: &Run, wire: &mut Wire, wait: Duration, in_flight: &mut BTreeSet<u64>) -> std::io::Result<()> {
        let publisher = self.number;
        let mut events = Vec::new();
        let mut wait = Some(wait);
        let heard = loop {
            let said = match wire.receive(wait.take().unwrap_or_default()) {
                Ok(Some(said)) => said,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            match said {
                Said::Confirm { cid: seq, outcome } => {
                    if !in_flight.remove(&seq) {
                        run.misbehaved(format!("publisher {publisher}: {outcome:?} for {seq}, which is not in flight"));
                    }
                    events.push(match outcome {
                        Outcome::Stored => Event::Confirmed { publisher, seq, duplicate: false },
                        Outcome::Duplicate => Event::Confirmed { publisher, seq, duplicate: true },
                        Outcome::Rejected { code, .. } => Event::Rejected { publisher, seq, code },
                    });
                }
                Said::Error { cid, code, text } if !run.is_told_of_garbage(cid, code) => {
                    run.misbehaved(format!("publisher {publisher}: error {code} {text} for {cid}"));
                }
                _ => {}
            }
            if !wire.has_more() {
                break Ok(());
            }
        };
        if !events.is_empty() {
            run.progress.fetch_add(events.len() as u64, Ordering::Relaxed);
            run.recorder.record(&events);
        }
        heard
    }
}

/// One consumer of a durable subscription.
#[derive(Clone, Debug)]
pub struct Consumer {
    pub number: u16,
    pub sub: u16,
    pub topic: u16,
    /// Others may be attached to the same subscription.
    pub shared: bool,
    /// Some earlier run confirmed the subscription: it must be there.
    pub must_exist: bool,
}

/// How a consumer works in one run.
struct Habits {
    credit: u32,
    /// Acknowledges at random within this time.
    lag_ms: u64,
    /// Of a hundred messages, how many are left unacknowledged (until they crowd the credit).
    neglects: u64,
}

/// One connection of a consumer.
struct Session {
    conn: u32,
    /// What the broker calls the subscription on this connection.
    id: Option<u64>,
    /// Delivered and not acknowledged, by tag; when to acknowledge.
    held: BTreeMap<u64, (MessageId, Instant)>,
    /// Acknowledgements that wait for their OK.
    pending: HashMap<u64, Vec<MessageId>>,
    neglected: BTreeSet<u64>,
    events: Vec<Event>,
    next_cid: u64,
}

impl Consumer {
    pub fn run(self, run: &Run) {
        let mut rng = run.rng(2, self.number);
        let habits = if run.draining {
            Habits { credit: 1_024, lag_ms: 0, neglects: 0 }
        } else {
            Habits {
                credit: *rng.pick(&[1, 16, 256, 256, 1_024]),
                lag_ms: *rng.pick(&[0, 5, 50, 500]),
                neglects: *rng.pick(&[0, 1, 10]),
            }
        };
        // Where consumers compete, one may leave and come back while the broker lives.
        let mut leaves_at =
            (self.shared && !run.draining && rng.percent(30)).then(|| Instant::now() + rng.millis(20, 1_000));
        while let Some(mut wire) = run.connect() {
            let until = leaves_at.take();
            let mut session = Session {
                conn: run.connections.fetch_add(1, Ordering::SeqCst),
                id: None,
                held: BTreeMap::new(),
                pending: HashMap::new(),
                neglected: BTreeSet::new(),
                events: Vec::new(),
                next_cid: 100,
            };
            let ended = self.work(run, &mut wire, &habits, &mut rng, until, &mut session);
            // Recorded before the connection is dropped: what another consumer gets because of that comes later.
            session.record(run);
            match ended {
                Ok(()) if run.leaves() => return,
                Ok(()) => {}
                Err(error) if run.gone(&format!("consumer {}", self.number), &error) => {}
                Err(_) => return,
            }
        }
    }

    /// `Ok`: left by its own will.
    fn work(
        &self,
        run: &Run,
        wire: &mut Wire,
        habits: &Habits,
        rng: &mut Rng,
        until: Option<Instant>,
        session: &mut Session,
    ) -> std::io::Result<()> {
        let durable = format!("subscription-{}", self.sub);
        wire.push_subscribe(10, &topic_name(self.topic), &durable, habits.credit, ACK_TIMEOUT_MS);
        wire.flush().ok();
        let mut beat = Instant::now();
        loop {
            if run.leaves() || until.is_some_and(|until| until <= Instant::now()) {
                return Ok(());
            }
            match wire.receive(Duration::from_millis(if session.held.is_empty() { 10 } else { 2 }))? {
                Some(said) => self.hear(run, said, habits, rng, session),
                None => session.record(run),
            }
            if wire.has_more() && session.events.len() < 512 {
                continue;
            }
            session.record(run);
            if session.acknowledge(self.sub, wire, habits, rng, run.draining) {
                session.record(run);
                wire.flush().ok();
                beat = Instant::now();
            } else if beat.elapsed() > BEAT {
                wire.push_ping(u64::MAX);
                wire.flush().ok();
                beat = Instant::now();
            }
        }
    }

    fn hear(&self, run: &Run, said: Said, habits: &Habits, rng: &mut Rng, session: &mut Session) {
        match said {
            Said::Subscribed { sub, resumed, .. } => {
                session.id = Some(sub);
                run.subscribed.fetch_add(1, Ordering::SeqCst);
                if self.must_exist && !resumed {
                    run.misbehaved(format!("consumer {}: durable subscription {} is gone", self.number, self.sub));
                }
            }
            Said::Deliver { sub, tag, attempt, redelivered, payload } => {
                if session.id != Some(sub) {
                    run.misbehaved(format!("consumer {}: delivery for subscription {sub}", self.number));
                }
                let message = MessageId::decode(&payload);
                let delivery =
                    Delivery { sub: self.sub, conn: session.conn, tag, attempt, redelivered, message, timing: None };
                session.events.push(Event::Deliver(delivery));
                let Some(message) = message else { return };
                session.held.insert(tag, (message, Instant::now() + rng.millis(0, habits.lag_ms)));
                if rng.percent(habits.neglects) && session.neglected.len() < habits.credit as usize / 4 {
                    session.neglected.insert(tag);
                }
            }
            Said::Ok { cid } => {
                let Some(messages) = session.pending.remove(&cid) else { return };
                run.progress.fetch_add(1, Ordering::Relaxed);
                let acked =
                    messages.into_iter().map(|m| Event::Acked { sub: self.sub, publisher: m.publisher, seq: m.seq });
                session.events.extend(acked);
            }
            Said::Error { cid, code, text } if !run.is_told_of_garbage(cid, code) => {
                run.misbehaved(format!("consumer {}: error {code} {text} for {cid}", self.number));
            }
            _ => {}
        }
    }
}

impl Session {
    fn record(&mut self, run: &Run) {
        if !self.events.is_empty() {
            run.recorder.record(&self.events);
            self.events.clear();
        }
    }

    /// Appends ACKs of what is due. False: nothing is.
    fn acknowledge(&mut self, sub: u16, wire: &mut Wire, habits: &Habits, rng: &mut Rng, always_confirm: bool) -> bool {
        let Some(id) = self.id else { return false };
        let now = Instant::now();
        // With a small credit everything waits for the next ACK.
        let crowded = self.held.len() - self.neglected.len() > habits.credit as usize / 2;
        let due = self.held.iter().filter(|(tag, (_, due))| (*due <= now || crowded) && !self.neglected.contains(tag));
        let due: Vec<u64> = due.map(|(tag, _)| *tag).collect();
        let ranges = ranges(&due);
        for ranges in ranges.chunks(RANGES_MAX) {
            self.next_cid += 1;
            let confirm = always_confirm || rng.percent(90);
            wire.push_ack(self.next_cid, id, confirm, ranges);
            let messages = ranges.iter().flat_map(|(first, last)| *first..=*last);
            let messages: Vec<MessageId> =
                messages.filter_map(|tag| self.held.remove(&tag).map(|(message, _)| message)).collect();
            self.events.extend(messages.iter().map(|m| Event::AckSent { sub, publisher: m.publisher, seq: m.seq }));
            if confirm {
                self.pending.insert(self.next_cid, messages);
            }
        }
        !due.is_empty()
    }
}

/// Joins consecutive tags; ascending in, ascending out.
fn ranges(tags: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for tag in tags {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *tag => *last = *tag,
            _ => ranges.push((*tag, *tag)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_consecutive_tags_make_a_range() {
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[3]), [(3, 3)]);
        assert_eq!(ranges(&[1, 2, 3, 7, 9, 10]), [(1, 3), (7, 7), (9, 10)]);
    }
}
