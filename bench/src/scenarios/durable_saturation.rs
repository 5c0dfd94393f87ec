//! Durable throughput: QoS1, `always`, one publisher with a bounded number of unconfirmed publishes, one durable consumer that
//! acknowledges in ranges. Its latencies are those of a full pipe, not of an idle broker.

use super::{Losses, OneToOne, Scenario};
use crate::load::Pace;

/// Publishes without their confirm.
const WINDOW: u64 = 4_096;

pub fn scenarios() -> Vec<Scenario> {
    let of = |name: &str, bytes| {
        let run = OneToOne { qos: 1, bytes, pace: Pace::Window(WINDOW), losses: Losses::Forbidden };
        Scenario::new(name, move |bench| run.run(bench))
    };
    vec![of("durable 128 B saturated", 128), of("durable 1 KiB saturated", 1_024)]
}
