//! `chaos net` against a toy broker, which knows no limit at all: each scenario names what is missing.

use std::path::PathBuf;
use std::time::Duration;

use chaos::net::Scenario;
use chaos::net::stage::{Options, Outcome};

fn against_the_toy(scenario: Scenario, seed: u64) -> Outcome {
    let options = Options {
        broker: env!("CARGO_BIN_EXE_toy-broker").into(),
        folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("net"),
        seed,
        cores: 1,
        during: Duration::from_millis(600),
        storm: 50,
        stalled: 10,
        grace: Duration::from_millis(500),
        extra: Vec::new(),
        keep: false,
    };
    let outcome = scenario.run(&options).expect("the harness itself works");
    let folder = outcome.folder.clone().expect("what failed is kept");
    std::fs::remove_dir_all(folder).expect("the kept folder can go");
    assert!(!outcome.is_clean());
    outcome
}

fn named(outcome: &Outcome, words: &str) {
    assert!(outcome.failures.iter().any(|failure| failure.contains(words)), "{words:?} not in {:?}", outcome.failures);
}

#[test]
fn connections_that_may_drip_for_ever_are_noticed() {
    let outcome = against_the_toy(Scenario::Slowloris, 9_001);
    named(&outcome, "that never log in are still open");
    named(&outcome, "that drip a PUBLISH after the login are still open");
}

#[test]
fn a_broker_that_takes_any_key_is_noticed() {
    named(&against_the_toy(Scenario::BruteForce, 9_002), "wrong keys were let in");
}

#[test]
fn garbage_that_is_tolerated_or_breaks_the_broker_is_noticed() {
    let outcome = against_the_toy(Scenario::Garbage, 9_003);
    named(&outcome, "open in spite of their bytes");
    named(&outcome, "a panic");
}
