//! `chaos net`: a bad network, and clients that misbehave on purpose.
//!
//! Each scenario is a file. All but `faults` keep a measuring client beside the trouble (`probe`, `stage`), whose latencies are
//! printed and whose messages are judged. Whether a run is clean depends on losses, closes and limits, never on a latency.

pub mod brute_force;
pub mod crowd;
pub mod descriptors;
pub mod faults;
pub mod garbage;
pub mod half_open;
pub mod link;
pub mod probe;
pub mod proxy;
pub mod slowloris;
pub mod stage;
pub mod stalled;
pub mod storm;
pub mod watch;

use clap::ValueEnum;

use crate::Fallible;
use stage::{Options, Outcome};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Scenario {
    /// Publishers and consumers of both dialects behind a proxy that delays, cuts, drips and garbles; kill -9 in between.
    Proxy,
    /// Connections that drip bytes of a login, or of a frame.
    Slowloris,
    /// Wrong keys, a hundred a second and flat out.
    BruteForce,
    /// Thousands of clients at once, and again after the broker was killed.
    Storm,
    /// Hundreds of consumers that do not read.
    Stalled,
    /// Bytes that are no frames, in every state.
    Garbage,
    /// Peers that vanish without a word.
    HalfOpen,
    /// No file descriptors left.
    Descriptors,
}

impl Scenario {
    pub fn run(self, options: &Options) -> Fallible<Outcome> {
        match self {
            Scenario::Proxy => faults::run(options),
            Scenario::Slowloris => slowloris::run(options),
            Scenario::BruteForce => brute_force::run(options),
            Scenario::Storm => storm::run(options),
            Scenario::Stalled => stalled::run(options),
            Scenario::Garbage => garbage::run(options),
            Scenario::HalfOpen => half_open::run(options),
            Scenario::Descriptors => descriptors::run(options),
        }
    }
}
