//! The measuring client: an honest publisher and its consumers, beside whatever else goes on.
//!
//! Owns: the load (so many messages a second, QoS1 on a durable subscription and as many QoS0), the time from when a message
//! was due until it was delivered, and what is counted as missing. What its QoS1 clients see is recorded for the oracle.
//! One thread and one wait for all of its connections, so that no latency is made of its own locks.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::broker::KEY;
use crate::history::Recorder;
use crate::message::MessageId;
use crate::net::link::{HONEST, Link, wait_for};
use crate::oracle::{Delivery, Event, Plan, PlannedSubscription};
use crate::wire::{self, ACK, Outcome, PUBLISH, SUBSCRIBE, Said, put_string};

/// Messages a second, of each QoS.
pub const RATE: u64 = 1_000;
const TOPIC: &str = "probe.durable";
const TOPIC_QOS0: &str = "probe.fleeting";
/// After the last publish, what has not come by then does not come.
const PATIENCE: Duration = Duration::from_secs(20);
/// Nothing at all for so long is the end of the connection, too.
const LOGIN_PATIENCE: Duration = Duration::from_secs(20);

/// What the oracle has to know: one publisher, one durable subscription.
pub fn plan() -> Plan {
    Plan { publishers: vec![0], subscriptions: vec![PlannedSubscription { topic: 0, shared: false }], strict: true }
}

/// Where a latency falls in time, and how long it was.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub due: Instant,
    pub took: Duration,
}

/// What one probe has seen when it ended.
#[derive(Debug, Default)]
pub struct Seen {
    pub durable: Vec<Sample>,
    pub fleeting: Vec<Sample>,
    /// QoS0 messages sent and never delivered, and delivered twice or out of order.
    pub fleeting_missing: u64,
    pub fleeting_disordered: u64,
    /// The next sequence a probe after this one begins with.
    pub next: u64,
    /// Why it ended before its time.
    pub broken: Option<String>,
}

pub struct Probe {
    thread: JoinHandle<Seen>,
    stop: Arc<AtomicBool>,
    delivered: Arc<AtomicU64>,
}

impl Probe {
    /// Logs in, subscribes, begins. Returns when the first deliveries have come.
    ///
    /// - `first`: sequence of the first message; `conn`: numbers its consumer for the oracle.
    pub fn start(at: SocketAddr, recorder: Arc<Recorder>, first: u64, conn: u32) -> Result<Probe, String> {
        let (stop, delivered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted) = (stop.clone(), delivered.clone());
        let thread = std::thread::spawn(move || {
            let mut seen = Seen { next: first, ..Seen::default() };
            let ended = Work::begin(at, recorder, first, conn).and_then(|mut work| {
                let ended = work.run(&told, &counted);
                work.finish(&mut seen);
                ended
            });
            seen.broken = ended.err().map(|error| error.to_string());
            seen
        });
        let probe = Probe { thread, stop, delivered };
        while probe.delivered.load(Ordering::SeqCst) < 10 {
            if probe.thread.is_finished() {
                return Err(probe.end().broken.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(probe)
    }

    /// Publishes nothing more, waits for what is under way.
    pub fn end(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap_or_else(|_| Seen { broken: Some("the probe panicked".into()), ..Seen::default() })
    }
}

struct Work {
    recorder: Arc<Recorder>,
    publisher: Link,
    consumer: Link,
    fleeting_publisher: Link,
    fleeting_consumer: Link,
    conn: u32,
    sub: u64,
    origin: Instant,
    first: u64,
    /// Sequence of the next message, of both QoS.
    next: u64,
    unconfirmed: u64,
    /// QoS0: the sequence expected next, and what came.
    expected: u64,
    received: u64,
    disordered: u64,
    durable: Vec<Sample>,
    fleeting: Vec<Sample>,
    /// Acknowledgements that wait for their OK.
    pending: VecDeque<(u64, Vec<u64>)>,
    next_cid: u64,
    events: Vec<Event>,
}

impl Work {
    fn begin(at: SocketAddr, recorder: Arc<Recorder>, first: u64, conn: u32) -> io::Result<Work> {
        let open = || -> io::Result<Link> {
            let mut link = Link::connect(HONEST, at, None)?;
            log_in(&mut link)?;
            Ok(link)
        };
        let (mut consumer, mut fleeting_consumer) = (open()?, open()?);
        let sub = subscribe(&mut consumer, TOPIC, Some("probe"))?;
        subscribe(&mut fleeting_consumer, TOPIC_QOS0, None)?;
        Ok(Work {
            recorder,
            publisher: open()?,
            fleeting_publisher: open()?,
            consumer,
            fleeting_consumer,
            conn,
            sub,
            origin: Instant::now(),
            first,
            next: first,
            unconfirmed: 0,
            expected: first,
            received: 0,
            disordered: 0,
            durable: Vec::new(),
            fleeting: Vec::new(),
            pending: VecDeque::new(),
            next_cid: 1_000,
            events: Vec::new(),
        })
    }

    fn due(&self, seq: u64) -> Instant {
        self.origin + Duration::from_nanos((seq - self.first) * 1_000_000_000 / RATE)
    }

    fn run(&mut self, stop: &AtomicBool, delivered: &AtomicU64) -> io::Result<()> {
        let mut stopped = None;
        loop {
            let now = Instant::now();
            if stopped.is_none() && stop.load(Ordering::SeqCst) {
                stopped = Some(now);
            }
            if stopped.is_none() {
                self.publish(now)?;
            }
            self.listen()?;
            delivered.store(self.durable.len().min(self.fleeting.len()) as u64, Ordering::SeqCst);
            if let Some(since) = stopped {
                let all = self.unconfirmed == 0
                    && self.pending.is_empty()
                    && self.recorder.so_far().1 == 0
                    && self.expected == self.next;
                if all || since.elapsed() > PATIENCE {
                    return Ok(());
                }
            }
            let wait = match stopped {
                None => self.due(self.next).saturating_duration_since(Instant::now()),
                Some(_) => Duration::from_millis(2),
            };
            if !wait.is_zero() {
                let links = [&self.publisher, &self.consumer, &self.fleeting_publisher, &self.fleeting_consumer];
                wait_for(&links, wait)?;
            }
        }
    }

    /// Sends all that is due.
    fn publish(&mut self, now: Instant) -> io::Result<()> {
        while self.due(self.next) <= now {
            let seq = self.next;
            self.next += 1;
            self.unconfirmed += 1;
            let message = MessageId { publisher: 0, topic: 0, seq };
            self.events.push(Event::Invoke { publisher: 0, seq });
            push_publish(&mut self.publisher, seq, TOPIC, 1, &message.encode());
            push_publish(&mut self.fleeting_publisher, seq, TOPIC_QOS0, 0, &seq.to_be_bytes());
        }
        self.record();
        self.publisher.flush()?;
        self.fleeting_publisher.flush()
    }

    fn listen(&mut self) -> io::Result<()> {
        self.publisher.fill()?;
        while let Some(said) = self.publisher.hear()? {
            if let Said::Confirm { cid: seq, outcome } = said {
                self.unconfirmed -= 1;
                self.events.push(match outcome {
                    Outcome::Stored => Event::Confirmed { publisher: 0, seq, duplicate: false },
                    Outcome::Duplicate => Event::Confirmed { publisher: 0, seq, duplicate: true },
                    Outcome::Rejected { code, .. } => Event::Rejected { publisher: 0, seq, code },
                });
            } else {
                self.object(&said)?;
            }
        }
        self.hear_durable()?;
        self.fleeting_consumer.fill()?;
        while let Some(said) = self.fleeting_consumer.hear()? {
            let Said::Deliver { payload, .. } = &said else {
                self.object(&said)?;
                continue;
            };
            let seq = wire::Cursor(payload).u64()?;
            self.received += 1;
            self.disordered += u64::from(seq < self.expected);
            self.expected = self.expected.max(seq + 1);
            self.fleeting.push(Sample { due: self.due(seq), took: self.due(seq).elapsed() });
        }
        self.fleeting_publisher.fill()?;
        while let Some(said) = self.fleeting_publisher.hear()? {
            self.object(&said)?;
        }
        for link in [&mut self.publisher, &mut self.consumer, &mut self.fleeting_publisher, &mut self.fleeting_consumer]
        {
            link.flush()?;
        }
        self.record();
        Ok(())
    }

    fn hear_durable(&mut self) -> io::Result<()> {
        self.consumer.fill()?;
        let (mut tags, mut seqs) = (Vec::new(), Vec::new());
        while let Some(said) = self.consumer.hear()? {
            match said {
                Said::Deliver { tag, attempt, redelivered, payload, .. } => {
                    let message = MessageId::decode(&payload);
                    if let Some(message) = message.filter(|m| (self.first..self.next).contains(&m.seq)) {
                        let due = self.due(message.seq);
                        self.durable.push(Sample { due, took: due.elapsed() });
                    }
                    seqs.extend(message.map(|m| m.seq));
                    tags.push(tag);
                    let delivery =
                        Delivery { sub: 0, conn: self.conn, tag, attempt, redelivered, message, timing: None };
                    self.events.push(Event::Deliver(delivery));
                }
                Said::Ok { cid } => {
                    let (asked, seqs) = self.pending.pop_front().unwrap_or_default();
                    if asked != cid {
                        return Err(io::Error::other(format!("OK for {cid}, not for {asked}")));
                    }
                    self.events.extend(seqs.into_iter().map(|seq| Event::Acked { sub: 0, publisher: 0, seq }));
                }
                said => self.object(&said)?,
            }
        }
        if tags.is_empty() {
            return Ok(());
        }
        self.events.extend(seqs.iter().map(|seq| Event::AckSent { sub: 0, publisher: 0, seq: *seq }));
        self.next_cid += 1;
        let sub = self.sub;
        self.consumer.push(ACK, self.next_cid, |payload| {
            payload.extend_from_slice(&sub.to_be_bytes());
            payload.push(1);
            for tag in tags {
                payload.extend_from_slice(&[u64::to_be_bytes(tag), u64::to_be_bytes(tag)].concat());
            }
        });
        self.pending.push_back((self.next_cid, seqs));
        Ok(())
    }

    /// Nobody has a reason to complain about this client.
    fn object(&self, said: &Said) -> io::Result<()> {
        match said {
            Said::Error { code, text, .. } => Err(io::Error::other(format!("was told {code} {text}"))),
            _ => Ok(()),
        }
    }

    fn record(&mut self) {
        if !self.events.is_empty() {
            self.recorder.record(&self.events);
            self.events.clear();
        }
    }

    fn finish(&mut self, seen: &mut Seen) {
        self.record();
        seen.durable = std::mem::take(&mut self.durable);
        seen.fleeting = std::mem::take(&mut self.fleeting);
        seen.fleeting_missing = (self.next - self.first).saturating_sub(self.received);
        seen.fleeting_disordered = self.disordered;
        seen.next = self.next;
    }
}

/// HELLO 2 and AUTH with the right key.
pub fn log_in(link: &mut Link) -> io::Result<()> {
    link.push_login(2, KEY);
    answer(link, |said| match said {
        Said::Ok { cid: 2 } => Some(Ok(())),
        Said::Error { code, text, .. } => Some(Err(io::Error::other(format!("login refused: {code} {text}")))),
        _ => None,
    })
}

/// A QoS1 subscription with a durable name, from the earliest message kept; without one, a QoS0 subscription. Its number.
pub fn subscribe(link: &mut Link, topic: &str, durable: Option<&str>) -> io::Result<u64> {
    push_subscribe(link, 3, topic, durable, 10_000);
    answer(link, |said| match said {
        Said::Subscribed { sub, .. } => Some(Ok(sub)),
        Said::Error { code, text, .. } => Some(Err(io::Error::other(format!("SUBSCRIBE refused: {code} {text}")))),
        _ => None,
    })
}

pub fn push_subscribe(link: &mut Link, cid: u64, topic: &str, durable: Option<&str>, credit: u32) {
    link.push(SUBSCRIBE, cid, |payload| {
        payload.push(u8::from(durable.is_some()));
        payload.extend_from_slice(&credit.to_be_bytes());
        put_string(payload, topic);
        wire::put_options(payload, |options| {
            if let Some(name) = durable {
                wire::put_option(options, 1, name.as_bytes());
                wire::put_option(options, 3, &[1]);
            }
        });
    });
}

/// QoS1 asks for a confirm.
pub fn push_publish(link: &mut Link, cid: u64, topic: &str, qos: u8, message: &[u8]) {
    link.push(PUBLISH, cid, |payload| {
        payload.extend_from_slice(&[qos, qos]);
        put_string(payload, topic);
        payload.extend_from_slice(&[0, 0]);
        payload.extend_from_slice(message);
    });
}

fn answer<T>(link: &mut Link, is_it: impl Fn(Said) -> Option<io::Result<T>>) -> io::Result<T> {
    let end = Instant::now() + LOGIN_PATIENCE;
    while Instant::now() < end {
        if let Some(answer) = link.wait_hear(Duration::from_millis(100))?.and_then(&is_it) {
            return answer;
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}
