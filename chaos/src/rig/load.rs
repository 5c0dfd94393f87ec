//! Publishers and consumers at work on the rig's disk, for one run of the broker: the clients of `chaos crash`.

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

fn consumers() -> Vec<Consumer> {
    (0..2 * TOPICS)
        .map(|number| {
            let topic = number / 2;
            let sub = number.min(2 * TOPICS - 2);
            Consumer { number, sub, topic, shared: topic == TOPICS - 1, must_exist: false }
        })
        .collect()
}

/// Clients at work.
pub struct Load {
    pub run: Arc<Run>,
    pub recorder: Arc<Recorder>,
    began: Instant,
    clients: Vec<JoinHandle<()>>,
    consumers_wait: Vec<Consumer>,
}

impl Load {
    /// Starts the clients, and returns when every subscription exists; publishers wait for `publish`.
    /// - `idle`: consumers subscribe, and leave; they come when `consume` is called.
    pub fn start(setup: &Setup, broker: &mut Broker, history: &Path, seed: u64, counter: Counter) -> Fallible<Load> {
        let began = Instant::now();
        let clock = move || {
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            Ok(Stamp { writes: counter.count()?, micros })
        };
        let recorder = Arc::new(Recorder::stamped(history, plan(&setup.policy), clock)?);
        recorder.record(&[Event::Boot { run: 1 }]);
        let run = Arc::new(Run {
            number: 1,
            address: setup.address(),
            recorder: recorder.clone(),
            seed,
            draining: false,
            closing: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            subscribed: AtomicUsize::new(0),
            publishers_done: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            connections: Arc::new(AtomicU32::new(1)),
        });
        let mut load = Load { run, recorder, began, clients: Vec::new(), consumers_wait: consumers() };
        load.consume(broker)?;
        Ok(load)
    }

    /// Sends the consumers to work, and returns when they have subscribed.
    fn consume(&mut self, broker: &mut Broker) -> Fallible<()> {
        let all = self.consumers_wait.len();
        for consumer in self.consumers_wait.drain(..) {
            let run = self.run.clone();
            self.clients.push(std::thread::spawn(move || consumer.run(&run)));
        }
        let begun = Instant::now();
        while self.run.subscribed.load(Ordering::SeqCst) < all {
            broker.still_runs()?;
            if begun.elapsed() > PATIENCE {
                return Err("consumers cannot subscribe".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub fn publish(&mut self) {
        for number in 0..PUBLISHERS {
            let publisher = Publisher::new(number, number % TOPICS, number < WITHOUT_IDENTITY);
            let run = self.run.clone();
            self.clients.push(std::thread::spawn(move || _ = publisher.run(&run)));
        }
    }

    /// On the clock of the stamps.
    pub fn micros(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// From now on it is no surprise if the broker goes.
    pub fn expect_the_end(&self) {
        self.run.closing.store(true, Ordering::SeqCst);
    }

    /// Waits for the clients of a broker that is gone; what they saw.
    pub fn finish(mut self) -> Fallible<(Vec<Stamped>, Verdict)> {
        self.expect_the_end();
        self.run.leave.store(true, Ordering::SeqCst);
        for client in self.clients.drain(..) {
            client.join().map_err(|_| "a client panicked")?;
        }
        drop(self.run);
        let recorder = Arc::into_inner(self.recorder).ok_or("a client outlived its run")?;
        Ok(recorder.into_stamped()?)
    }
}
