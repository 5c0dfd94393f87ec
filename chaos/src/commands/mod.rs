//! What the command line asks for: arguments in, a verdict out. One file per command.

pub mod crash;
pub mod disk;
pub mod judge;
pub mod mutants;
pub mod report;
pub mod sim;
pub mod power;

use std::time::{SystemTime, UNIX_EPOCH};

use crate::Fallible;

/// The fsync policies under test.
pub const POLICIES: [&str; 4] = ["always", "every_n:64", "interval_ms:50", "none"];

/// `all`, or one of them.
pub fn policies(chosen: &str) -> Vec<String> {
    match chosen {
        "all" => POLICIES.map(String::from).to_vec(),
        one => vec![one.to_string()],
    }
}

/// The seed that was given; else any number: a short one is easier to type again.
pub fn seed(given: Option<u64>) -> Fallible<u64> {
    match given {
        Some(seed) => Ok(seed),
        None => Ok(u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos())),
    }
}
