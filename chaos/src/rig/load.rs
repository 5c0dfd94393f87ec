//! Publishers and consumers at work on the rig's disk, for one run of the broker: the clients of `chaos crash`.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::{Broker, Setup};
use crate::clients::{Consumer, Publisher, Run};
use crate::cut::{Stamp, Stamped};
use crate::history::Recorder;
use crate::oracle::{Event, Plan, PlannedSubscription, Verdict};
use crate::rig::writes::Counter;

pub const TOPICS: u16 = 4;
pub const PUBLISHERS: u16 = 8;
/// These send no identity, and never twice.
pub const WITHOUT_IDENTITY: u16 = 6;
const PATIENCE: Duration = Duration::from_secs(30);

/// Two subscriptions of each topic; the last topic has one, and its two consumers compete. After the publishers come those
/// that only mark the end of each topic.
pub fn plan(policy: &str) -> Plan {
    let subscriptions = (0..TOPICS).flat_map(|topic| {
        let shared = topic == TOPICS - 1;
        std::iter::repeat_n(PlannedSubscription { topic, shared }, if shared { 1 } else { 2 })
    });
    Plan {
        publishers: (0..PUBLISHERS).map(|number| number % TOPICS).chain(0..TOPICS).collect(),
        subscriptions: subscriptions.collect(),
        strict: policy == "always",
    }
}

fn micros_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Clients at work.
pub struct Load {
    pub recorder: Arc<Recorder>,
    address: SocketAddr,
    seed: u64,
    began: Instant,
    runs: Vec<Arc<Run>>,
    clients: Vec<JoinHandle<()>>,
    connections: Arc<AtomicU32>,
}

impl Load {
    /// Returns when every subscription exists; nobody publishes yet.
    pub fn start(setup: &Setup, broker: &mut Broker, history: &Path, seed: u64, counter: Counter) -> Fallible<Load> {
        let began = Instant::now();
        let clock = move || Ok(Stamp { writes: counter.count()?, micros: micros_since(began) });
        let recorder = Arc::new(Recorder::stamped(history, plan(&setup.policy), clock)?);
        recorder.record(&[Event::Boot { run: 1 }]);
        let connections = Arc::new(AtomicU32::new(1));
        let address = setup.address();
        let mut load = Load { recorder, address, seed, began, runs: Vec::new(), clients: Vec::new(), connections };
        load.consume(broker, false)?;
        Ok(load)
    }

    fn new_run(&mut self) -> Arc<Run> {
        let run = Arc::new(Run {
            number: 1,
            address: self.address,
            recorder: self.recorder.clone(),
            seed: self.seed,
            draining: false,
            closing: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            subscribed: AtomicUsize::new(0),
            publishers_done: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            connections: self.connections.clone(),
        });
        self.runs.push(run.clone());
        run
    }

    /// Sends consumers to work, and returns when they have subscribed. `again`: the subscriptions must be there.
    pub fn consume(&mut self, broker: &mut Broker, again: bool) -> Fallible<()> {
        let run = self.new_run();
        for number in 0..2 * TOPICS {
            let (run, topic) = (run.clone(), number / 2);
            let (sub, shared) = (number.min(2 * TOPICS - 2), topic == TOPICS - 1);
            let consumer = Consumer { number, sub, topic, shared, must_exist: again };
            self.clients.push(std::thread::spawn(move || consumer.run(&run)));
        }
        let begun = Instant::now();
        while run.subscribed.load(Ordering::SeqCst) < usize::from(2 * TOPICS) {
            broker.still_runs()?;
            if begun.elapsed() > PATIENCE {
                return Err("consumers cannot subscribe".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Everybody goes home; the broker stays.
    pub fn send_home(&mut self) -> Fallible<()> {
        self.runs.iter().for_each(|run| run.leave.store(true, Ordering::SeqCst));
        self.clients.drain(..).try_for_each(|client| client.join().map_err(|_| "a client panicked".into()))
    }

    pub fn publish(&mut self) {
        let run = self.new_run();
        for number in 0..PUBLISHERS {
            let publisher = Publisher::new(number, number % TOPICS, number < WITHOUT_IDENTITY);
            let run = run.clone();
            self.clients.push(std::thread::spawn(move || _ = publisher.run(&run)));
        }
    }

    /// On the clock of the stamps.
    pub fn micros(&self) -> u64 {
        micros_since(self.began)
    }

    /// From now on it is no surprise if the broker goes.
    pub fn expect_the_end(&self) {
        self.runs.iter().for_each(|run| run.closing.store(true, Ordering::SeqCst));
    }

    /// Waits for the clients of a broker that is gone; what they saw.
    pub fn finish(mut self) -> Fallible<(Vec<Stamped>, Verdict)> {
        self.expect_the_end();
        self.send_home()?;
        drop(self.runs);
        let recorder = Arc::into_inner(self.recorder).ok_or("a client outlived its run")?;
        Ok(recorder.into_stamped()?)
    }
}
