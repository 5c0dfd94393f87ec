//! What crossing cores costs: a broker with two cores, publisher and consumer connected to the topic's core or to the other.
//!
//! With only two CPUs the load generator shares one with the broker: compare the rows with each other, not with the rest.

use super::{Bench, CREDIT, Losses, OneToOne, Scenario, TOPIC};
use crate::Result;
use crate::broker::{Broker, Setup};
use crate::load::Pace;
use crate::report::Values;
use crate::wire::{Consumer, Link, Messages, Publisher, Subscription};

/// The kernel spreads connections over the cores by a hash: so many tries miss a core with probability 2^-64.
const CONNECT_TRIES: usize = 64;

pub fn scenarios() -> Vec<Scenario> {
    let of = |name: &str, crossing, pace| {
        let run = OneToOne { qos: 1, bytes: 128, pace, losses: Losses::Forbidden };
        Scenario::new(name, move |bench: &Bench| on_two_cores(bench, &run, crossing))
    };
    vec![
        of("2 cores, same core, 1k/s", false, Pace::Rate(1_000)),
        of("2 cores, cross core, 1k/s", true, Pace::Rate(1_000)),
        of("2 cores, same core, saturated", false, Pace::Window(4_096)),
        of("2 cores, cross core, saturated", true, Pace::Window(4_096)),
    ]
}

fn on_two_cores(bench: &Bench, run: &OneToOne, crossing: bool) -> Result<Values> {
    let setup = Setup { cpus: vec![bench.cpus.broker, bench.cpus.load], ..bench.setup.clone() };
    let broker = Broker::start(&setup)?;
    let subscription = Subscription { topic: TOPIC, qos: 1, credit: CREDIT, durable: Some("bench") };
    // Which core owns the topic is known only once somebody subscribed.
    let owner = Consumer::subscribe(Link::login(broker.port)?.0, subscription)?.core;
    let wanted = |core: u16| (core == owner) != crossing;
    let consumer = Consumer::subscribe(link_on(&broker, wanted)?, subscription)?;
    let messages = Messages { topic: TOPIC, qos: 1, bytes: run.bytes, confirm: true };
    let publisher = Publisher::open(link_on(&broker, wanted)?, messages)?;
    run.measure(bench, &broker, publisher, consumer)
}

/// A connection to a core that is `wanted`.
fn link_on(broker: &Broker, wanted: impl Fn(u16) -> bool) -> Result<Link> {
    // The misses stay open until the end: a closed one's port could be taken again, with the same hash.
    let mut misses = Vec::new();
    while misses.len() < CONNECT_TRIES {
        let (link, core) = Link::login(broker.port)?;
        if wanted(core) {
            return Ok(link);
        }
        misses.push(link);
    }
    Err(format!("none of {CONNECT_TRIES} connections came to the wanted core").into())
}
