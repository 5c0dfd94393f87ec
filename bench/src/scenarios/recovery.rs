//! Recovery: a durable subscription's backlog of N MiB, kill -9, and the time until the broker answers again.

use std::time::{Duration, Instant};

use super::{Bench, CREDIT, PATIENCE, Scenario, TOPIC};
use crate::Result;
use crate::broker::Broker;
use crate::load::{Consumer as _, Publisher as _};
use crate::report::Values;
use crate::wire::{Consumer, Link, Messages, Publisher, Subscription};

const BYTES: usize = 1_024;
const WINDOW: u64 = 4_096;
const SUBSCRIPTION: Subscription = Subscription { topic: TOPIC, qos: 1, credit: CREDIT, durable: Some("bench") };

pub fn scenario(mib: u64) -> Scenario {
    Scenario::new(format!("recovery of {mib} MiB"), move |bench| run(bench, mib))
}

fn run(bench: &Bench, mib: u64) -> Result<Values> {
    let broker = Broker::start(&bench.setup)?;
    let empty_start = broker.start_time;
    drop(Consumer::subscribe(Link::login(broker.port)?.0, SUBSCRIPTION)?);
    let total = mib * 1024 * 1024 / BYTES as u64;
    publish(&broker, total)?;

    let broker = broker.crash_and_restart()?;
    let recovered = broker.start_time;
    let (received, first) = receive(&broker, total)?;
    if received != total {
        return Err(format!("{received} of {total} confirmed messages came back").into());
    }
    Ok(Values::from([
        ("start_ms".to_string(), recovered.as_secs_f64() * 1e3),
        ("empty_start_ms".to_string(), empty_start.as_secs_f64() * 1e3),
        ("first_message_ms".to_string(), first.as_secs_f64() * 1e3),
        ("peak_rss_mib".to_string(), broker.peak_rss_mib()?),
    ]))
}

/// Publishes `total` messages and waits for every confirm.
fn publish(broker: &Broker, total: u64) -> Result<()> {
    let messages = Messages { topic: TOPIC, qos: 1, bytes: BYTES, confirm: true };
    let mut publisher = Publisher::open(Link::login(broker.port)?.0, messages)?;
    let (mut sent, mut confirmed) = (0, 0);
    let mut last_progress = Instant::now();
    while confirmed < total {
        while sent < total && sent - confirmed < WINDOW {
            publisher.put(sent, 0);
            sent += 1;
        }
        publisher.flush()?;
        let before = confirmed;
        publisher.confirms(|_| confirmed += 1)?;
        if confirmed > before {
            last_progress = Instant::now();
        } else if last_progress.elapsed() > PATIENCE {
            return Err(format!("{} publishes never confirmed", sent - confirmed).into());
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Ok(())
}

/// Takes the whole backlog; also how long its first message took.
fn receive(broker: &Broker, total: u64) -> Result<(u64, Duration)> {
    let started = Instant::now();
    let mut consumer = Consumer::subscribe(Link::login(broker.port)?.0, SUBSCRIPTION)?;
    let (mut received, mut first) = (0, None);
    let mut last_progress = started;
    while received < total && last_progress.elapsed() < PATIENCE {
        let before = received;
        // Every index once: what is out of order or double is not counted, so the total shows it.
        consumer.receive(|index, _| received += u64::from(index == received))?;
        if received > before {
            last_progress = Instant::now();
            first.get_or_insert(started.elapsed());
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Ok((received, first.unwrap_or_default()))
}
