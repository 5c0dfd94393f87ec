//! Publishers and consumers of both dialects behind a proxy that changes what it does every moment; kill -9 in between.
//!
//! What v2 clients see is judged by the oracle, as everywhere. v1 publishers are judged by it, too: each of their connections is a
//! publisher of its own, which never sends again what it does not know about, and a PONG confirms what was published before
//! its PING. v1 consumers have no names: while the broker does not know that their last connection is gone they get a queue of
//! their own, beside the orphan. So of them only two things are asked: nothing invented, and in the end nothing missing.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::{Broker, KEY, Setup};
use crate::clients::{Consumer, Publisher, Run, topic_name};
use crate::history::Recorder;
use crate::message::MessageId;
use crate::net::link::{HONEST, Link};
use crate::net::probe::{log_in, subscribe};
use crate::net::proxy::{Fault, Proxy};
use crate::net::slowloris::{V1_ACK, V1_NACK, V1_PUBLISH};
use crate::net::stage::{Options, Outcome, panics, set_up, settle_folder};
use crate::net::watch::{Metrics, Process, mib};
use crate::oracle::{Event, Plan, PlannedSubscription};
use crate::rng::Rng;
use crate::wire::{AUTH, Cursor, Frame, HELLO, PING, PONG, Wire, put_string};

const NAME: &str = "proxy";
/// Topics of v2 publishers, two publishers each; consumers of the last one compete.
const TOPICS: u16 = 3;
const PUBLISHERS: u16 = 2 * TOPICS;
/// The topic of v1 publishers, and how many connections they may make.
const TOPIC_V1: u16 = TOPICS;
const V1_PUBLISHERS: usize = 2;
const V1_CONNECTIONS: u16 = 2_000;
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// Nothing moves for so long after the network has healed: stuck.
const PATIENCE: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_millis(500);

const V1_SUBSCRIBE: u8 = 0x04;
const V1_POLL: u8 = 0x09;

pub fn run(options: &Options) -> Fallible<Outcome> {
    let started = Instant::now();
    let settings = [
        ("BLIPMQ_DELIVERY_V1_TTL_MS", "0"),
        ("BLIPMQ_NET_KEEPALIVE_MS", "2000"),
        ("BLIPMQ_NET_TCP_USER_TIMEOUT_MS", "5000"),
    ];
    let program = options.broker.clone();
    let setup = set_up(options, NAME, &settings, |_| Ok(program))?;
    let mut weather = Weather::begin(options, setup)?;
    let ended = weather.play();
    let figures = weather.figures();
    let Weather { setup, recorder, broker, mut failures, rss_peak, .. } = weather;
    drop(broker);
    failures.extend(ended?);
    failures.extend(panics(&setup.folder)?);
    let recorder = Arc::into_inner(recorder).ok_or("a client outlived its scenario")?;
    let verdict = recorder.finish(true)?;
    let extent = format!("{} published, {} delivered", verdict.published, verdict.delivered);
    let seconds = started.elapsed().as_secs_f64();
    let mut outcome =
        Outcome { name: NAME, extent, figures, failures, verdict, latency: None, rss_peak, seconds, folder: None };
    settle_folder(options, &setup, &mut outcome)?;
    Ok(outcome)
}

struct Weather<'a> {
    options: &'a Options,
    setup: Setup,
    rng: Rng,
    proxy: Proxy,
    recorder: Arc<Recorder>,
    broker: Broker,
    runs: u32,
    /// Home between runs.
    publishers: Vec<Publisher>,
    connections: Arc<AtomicU32>,
    v1: Arc<V1>,
    working: Vec<JoinHandle<Option<Publisher>>>,
    failures: Vec<String>,
    changes: u64,
    rss_peak: u64,
    closed: Metrics,
}

impl<'a> Weather<'a> {
    fn begin(options: &'a Options, setup: Setup) -> Fallible<Weather<'a>> {
        let mut topics: Vec<u16> = (0..PUBLISHERS).map(|number| number % TOPICS).collect();
        topics.resize(usize::from(PUBLISHERS + V1_CONNECTIONS), TOPIC_V1);
        let subscriptions =
            (0..=TOPIC_V1).map(|topic| PlannedSubscription { topic, shared: topic == TOPICS - 1 }).collect();
        let plan = Plan { publishers: topics, subscriptions, strict: true };
        let recorder = Arc::new(Recorder::create(&setup.folder.join("history.txt"), plan)?);
        let mut broker = setup.start(1, options.cores)?;
        broker.wait_ready(setup.address(), READY_PATIENCE).map_err(|why| format!("start failed: {why}"))?;
        recorder.record(&[Event::Boot { run: 1 }]);
        for sub in 0..=TOPIC_V1 {
            let mut link = Link::connect(HONEST, setup.address(), None)?;
            log_in(&mut link)?;
            subscribe(&mut link, &topic_name(sub), Some(&format!("subscription-{sub}")))?;
        }
        let v1 = Arc::new(V1::default());
        v1.consume(setup.address(), &mut |_| false)?;
        Ok(Weather {
            options,
            rng: Rng::derive(options.seed, &[3]),
            proxy: Proxy::start(setup.address(), options.seed)?,
            setup,
            recorder,
            broker,
            runs: 1,
            publishers: (0..PUBLISHERS).map(|number| Publisher::new(number, number % TOPICS, true)).collect(),
            connections: Arc::new(AtomicU32::new(1)),
            v1,
            working: Vec::new(),
            failures: Vec::new(),
            changes: 0,
            rss_peak: 0,
            closed: Metrics::default(),
        })
    }

    /// Bad weather, a kill, bad weather, and then everything comes out. What should not be, in words.
    fn play(&mut self) -> Fallible<Vec<String>> {
        let run = self.send_out(false);
        self.storm(&run);
        self.rss_peak = Process::look(self.broker.pid()).rss_peak;
        if let Err(why) = self.broker.still_runs() {
            self.call_back(&run, true);
            return Ok(vec![format!("the broker {why}")]);
        }
        run.closing.store(true, Ordering::SeqCst);
        self.runs += 1;
        self.kill()?;
        self.call_back(&run, true);
        self.broker = self.setup.start(self.runs, self.options.cores)?;
        if let Err(why) = self.broker.wait_ready(self.setup.address(), READY_PATIENCE) {
            return Ok(vec![format!("the second start failed: {why}")]);
        }
        self.recorder.record(&[Event::Boot { run: self.runs }]);
        let run = self.send_out(false);
        self.storm(&run);
        self.call_back(&run, false);
        let found = self.drain()?;
        self.rss_peak = self.rss_peak.max(Process::look(self.broker.pid()).rss_peak);
        self.closed = Metrics::fetch(self.setup.metrics_port)?;
        Ok(found)
    }

    fn kill(&mut self) -> Fallible<()> {
        let pid = rustix::process::Pid::from_raw(self.broker.pid() as i32).ok_or("a broker has a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        while self.broker.still_runs().is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn send_out(&mut self, draining: bool) -> Arc<Run> {
        let run = Arc::new(Run {
            number: self.runs,
            address: self.proxy.address,
            recorder: self.recorder.clone(),
            seed: self.options.seed,
            draining,
            flaky: true,
            closing: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            subscribed: AtomicUsize::new(0),
            publishers_done: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            connections: self.connections.clone(),
        });
        for number in 0..=TOPIC_V1 + 1 {
            // The two after the last v2 topic's share it.
            let sub = if number > TOPIC_V1 { TOPICS - 1 } else { number };
            let consumer = Consumer { number, sub, topic: sub, shared: sub == TOPICS - 1, must_exist: true };
            let run = run.clone();
            self.working.push(std::thread::spawn(move || {
                consumer.run(&run);
                None
            }));
        }
        for publisher in self.publishers.drain(..) {
            let run = run.clone();
            self.working.push(std::thread::spawn(move || Some(publisher.run(&run))));
        }
        if !draining {
            for number in 0..=V1_PUBLISHERS {
                let (run, v1) = (run.clone(), self.v1.clone());
                self.working.push(std::thread::spawn(move || {
                    match number {
                        0 => v1.consume_all(&run),
                        _ => v1.publish_all(&run),
                    }
                    None
                }));
            }
        }
        run
    }

    /// Changes the weather every moment, until the time is over.
    fn storm(&mut self, run: &Run) {
        let begun = Instant::now();
        while begun.elapsed() < self.options.during {
            self.changes += 1;
            let rng = &mut self.rng;
            let fault = match rng.between(0, 7) {
                0 | 1 => Fault::Clear,
                2 => Fault::Latency { base: rng.millis(1, 20), jitter: rng.millis(0, 30) },
                3 => Fault::Bandwidth(rng.between(20_000, 2_000_000)),
                4 => Fault::Slices,
                5 => Fault::Drip(Duration::from_micros(rng.between(20, 2_000))),
                6 => Fault::Blackhole,
                _ => Fault::StopReading,
            };
            self.proxy.set(fault);
            match rng.between(0, 11) {
                0 => self.proxy.cut(rng.between(10, 60)),
                1 => self.proxy.reset(rng.between(10, 60)),
                2 => self.proxy.garbage(rng.between(10, 40)),
                _ => {}
            }
            let pause = rng.millis(20, 300).min(self.options.during.saturating_sub(begun.elapsed()));
            std::thread::sleep(pause);
        }
        if run.progress.load(Ordering::SeqCst) == 0 {
            self.failures.push("bad weather, and nothing at all was confirmed".into());
        }
    }

    /// The sky clears, the clients come home. `dead`: so is the broker.
    fn call_back(&mut self, run: &Run, dead: bool) {
        run.leave.store(true, Ordering::SeqCst);
        self.proxy.set(Fault::Clear);
        if dead {
            // What is still in the proxy was for the broker that is gone.
            self.proxy.cut(100);
        }
        for client in self.working.drain(..) {
            match client.join() {
                Ok(publisher) => self.publishers.extend(publisher),
                Err(_) => self.failures.push("a client panicked".into()),
            }
        }
    }

    /// Everything unanswered is sent again, everything that waits comes out.
    fn drain(&mut self) -> Fallible<Vec<String>> {
        let run = self.send_out(true);
        let count = |recorder: &Recorder| {
            let (verdict, missing) = recorder.so_far();
            (verdict.delivered, verdict.confirmed, verdict.acked, missing)
        };
        let (mut seen, mut since) = (count(&self.recorder), Instant::now());
        let mut found = Vec::new();
        loop {
            std::thread::sleep(Duration::from_millis(5));
            if let Err(why) = self.broker.still_runs() {
                found.push(format!("the broker {why}"));
                break;
            }
            let now = count(&self.recorder);
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            let published = run.publishers_done.load(Ordering::SeqCst) == usize::from(PUBLISHERS);
            if published && now.3 == 0 && since.elapsed() > QUIET {
                break;
            }
            if since.elapsed() > PATIENCE {
                self.recorder.record(&[Event::Stuck { run: self.runs }]);
                break;
            }
        }
        self.call_back(&run, false);
        if self.broker.still_runs().is_ok() {
            found.extend(self.v1.drain(self.setup.address())?);
        }
        let tolerated = self.proxy.counts.tolerated.load(Ordering::SeqCst);
        if tolerated > 0 {
            found.push(format!("{tolerated} connections lived on after garbage"));
        }
        Ok(found)
    }

    fn figures(&self) -> Vec<String> {
        let (counts, v1) = (&self.proxy.counts, &self.v1);
        let read = |number: &AtomicU64| number.load(Ordering::SeqCst);
        let (vouched, seen) = (lock(&v1.vouched).len(), lock(&v1.seen).len());
        let closed = |reason| self.closed.by("connections_closed_total", reason);
        vec![
            format!(
                "{} changes of weather, {} connections: {} cut, {} reset, {} with garbage",
                self.changes,
                read(&counts.connections),
                read(&counts.cut),
                read(&counts.reset),
                read(&counts.garbage)
            ),
            format!("v1: {vouched} vouched for by a PONG, {seen} seen by v1 consumers"),
            format!(
                "closed after the kill: {} protocol, {} silent, {} socket, {} client",
                closed("protocol"),
                closed("silent"),
                closed("socket"),
                closed("client")
            ),
            format!("RSS peak {:.0} MiB", mib(self.rss_peak)),
        ]
    }
}

/// What the v1 clients share.
#[derive(Default)]
struct V1 {
    /// Numbers their connections: publishers of the plan.
    next: AtomicUsize,
    sent: Mutex<HashSet<MessageId>>,
    vouched: Mutex<HashSet<MessageId>>,
    seen: Mutex<HashSet<MessageId>>,
    invented: AtomicU64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn over(run: &Run) -> bool {
    run.closing.load(Ordering::SeqCst) || run.leave.load(Ordering::SeqCst)
}

impl V1 {
    fn publish_all(&self, run: &Run) {
        while !over(run) {
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            if number >= usize::from(V1_CONNECTIONS) {
                return;
            }
            let publisher = PUBLISHERS + number as u16;
            if let Err(error) = self.publish(run, publisher)
                && error.kind() == io::ErrorKind::InvalidData
            {
                run.recorder
                    .record(&[Event::Misbehaved { run: run.number, text: format!("to a v1 publisher: {error}") }]);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Publishes on one connection until it ends.
    fn publish(&self, run: &Run, publisher: u16) -> io::Result<()> {
        let mut wire = log_in_v1(run.address)?;
        let mut rng = Rng::derive(run.seed, &[5, u64::from(publisher)]);
        let mut seq = 0;
        while !over(run) {
            let batch: Vec<u64> = (0..rng.between(1, 8)).map(|more| seq + 1 + more).collect();
            seq += batch.len() as u64;
            for seq in &batch {
                let message = MessageId { publisher, topic: TOPIC_V1, seq: *seq };
                run.recorder.record(&[Event::Invoke { publisher, seq: *seq }]);
                lock(&self.sent).insert(message);
                wire.push(V1_PUBLISH, *seq, |payload| {
                    payload.push(1);
                    put_string(payload, &topic_name(TOPIC_V1));
                    payload.extend_from_slice(&message.encode());
                });
            }
            wire.push(PING, u64::MAX, |_| {});
            // A failed write shows as a failed read, once what has arrived is read.
            wire.flush().ok();
            let answered = answer(&mut wire, || over(run), |frame| frame.kind == PONG);
            if !matches!(answered, Ok(Some(_))) {
                let unknown = batch.iter().map(|seq| Event::Unknown { publisher, seq: *seq });
                run.recorder.record(&unknown.collect::<Vec<_>>());
                return answered.map(|_| ());
            }
            let confirmed = batch.iter().map(|seq| Event::Confirmed { publisher, seq: *seq, duplicate: false });
            run.recorder.record(&confirmed.collect::<Vec<_>>());
            lock(&self.vouched).extend(batch.iter().map(|seq| MessageId { publisher, topic: TOPIC_V1, seq: *seq }));
            std::thread::sleep(rng.millis(1, 10));
        }
        Ok(())
    }

    fn consume_all(&self, run: &Run) {
        while !over(run) {
            // A connection that ends is followed by the next.
            self.consume(run.address, &mut |_| !over(run)).ok();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Subscribes, polls and acknowledges while `more` says so; it is told how long nothing came.
    fn consume(&self, at: SocketAddr, more: &mut dyn FnMut(Duration) -> bool) -> io::Result<Wire> {
        let mut wire = log_in_v1(at)?;
        wire.push(V1_SUBSCRIBE, 5, |payload| {
            put_string(payload, &topic_name(TOPIC_V1));
            payload.push(1);
        });
        wire.flush()?;
        let begun = Instant::now();
        let patient = || begun.elapsed() > Duration::from_secs(10);
        let Some(frame) = answer(&mut wire, patient, |frame| frame.kind == V1_ACK && frame.cid == 5)? else {
            return Err(io::ErrorKind::TimedOut.into());
        };
        let sub = Cursor(&frame.payload).u64()?;
        let (mut asks, mut last) = (true, Instant::now());
        while more(last.elapsed()) {
            if std::mem::take(&mut asks) {
                wire.push(V1_POLL, 6, |payload| payload.extend_from_slice(&sub.to_be_bytes()));
                wire.flush()?;
            }
            let Some(frame) = wire.frame(Duration::from_millis(20))? else { continue };
            if frame.kind != V1_PUBLISH {
                continue;
            }
            (asks, last) = (true, Instant::now());
            let mut rest = Cursor(&frame.payload);
            rest.u8()?;
            rest.string()?;
            match MessageId::decode(rest.0) {
                Some(message) if lock(&self.sent).contains(&message) => _ = lock(&self.seen).insert(message),
                _ => _ = self.invented.fetch_add(1, Ordering::SeqCst),
            }
            wire.push(V1_ACK, frame.cid, |payload| payload.extend_from_slice(&sub.to_be_bytes()));
            wire.flush()?;
        }
        Ok(wire)
    }

    fn missing(&self) -> usize {
        lock(&self.vouched).difference(&lock(&self.seen)).count()
    }

    /// Takes over one orphan after the other until nothing is missing. What should not be, in words.
    fn drain(&self, at: SocketAddr) -> io::Result<Option<String>> {
        // Those that are done with stay open: nobody is to take over the same queue again.
        let mut done = Vec::new();
        let begun = Instant::now();
        while self.missing() > 0 && begun.elapsed() < PATIENCE {
            done.push(self.consume(at, &mut |quiet| self.missing() > 0 && quiet < 2 * QUIET)?);
        }
        let (missing, invented) = (self.missing(), self.invented.load(Ordering::SeqCst));
        let first = lock(&self.vouched).difference(&lock(&self.seen)).min().copied();
        Ok((missing + invented as usize > 0).then(|| {
            format!("v1 consumers: {missing} vouched for by a PONG never came (the first {first:?}), {invented} were invented")
        }))
    }
}

fn log_in_v1(at: SocketAddr) -> io::Result<Wire> {
    let mut wire = Wire::connect(at)?;
    wire.push(HELLO, 1, |payload| payload.extend_from_slice(&1u16.to_be_bytes()));
    wire.push(AUTH, 2, |payload| put_string(payload, KEY));
    wire.flush()?;
    let begun = Instant::now();
    let patient = || begun.elapsed() > Duration::from_secs(5);
    match answer(&mut wire, patient, |frame| frame.kind == V1_ACK && frame.cid == 2)? {
        Some(_) => Ok(wire),
        None => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Waits for a frame; `None`: `enough` came first. A NACK is nonsense: these clients give no reason for one.
fn answer(wire: &mut Wire, enough: impl Fn() -> bool, is_it: impl Fn(&Frame) -> bool) -> io::Result<Option<Frame>> {
    while !enough() {
        match wire.frame(Duration::from_millis(20))? {
            Some(frame) if is_it(&frame) => return Ok(Some(frame)),
            Some(frame) if frame.kind == V1_NACK => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a NACK for no reason"));
            }
            _ => {}
        }
    }
    Ok(None)
}
