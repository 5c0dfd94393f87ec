//! Durable confirm latency: QoS1, `always`, one publisher, one durable consumer, 128 B, open loop.

use super::{Losses, OneToOne, Scenario};
use crate::load::Pace;

pub fn scenarios() -> Vec<Scenario> {
    let at = |name: &str, rate| {
        let run = OneToOne { qos: 1, bytes: 128, pace: Pace::Rate(rate), losses: Losses::Forbidden };
        Scenario::new(name, move |bench| run.run(bench))
    };
    vec![at("durable 128 B 1k/s", 1_000), at("durable 128 B 10k/s", 10_000)]
}
