//! QoS0, one to one, 128 B: at a fixed rate, saturated with nothing lost, and flooded with the losses counted.

use super::{Losses, OneToOne, Scenario};
use crate::load::Pace;

/// Messages sent and not yet received. Below the broker's default queue, so that none needs to be dropped.
const WINDOW: u64 = 4_096;

pub fn scenarios() -> Vec<Scenario> {
    let of = |name: &str, pace, losses| {
        let run = OneToOne { qos: 0, bytes: 128, pace, losses };
        Scenario::new(name, move |bench| run.run(bench))
    };
    vec![
        of("qos0 128 B 10k/s", Pace::Rate(10_000), Losses::Forbidden),
        of("qos0 128 B saturated", Pace::Window(WINDOW), Losses::Forbidden),
        of("qos0 128 B flooded", Pace::Flood, Losses::Counted),
    ]
}
