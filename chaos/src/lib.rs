//! Breaks the broker on purpose and judges what its clients saw.
//!
//! A witness is worth something only if it is independent: nothing here uses code of the broker, but for `sim`, which runs it, and
//! even there what clients saw is judged by the same oracle.

#![forbid(unsafe_code)]

/// The real process, started, watched and killed.
pub mod broker;
/// Publishers and consumers: the load, and the eyes.
pub mod clients;
/// What the command line asks for.
pub mod commands;
/// `chaos crash`: kill, restart, drain, judge.
pub mod crash;
/// What a power cut may take, policy by policy.
pub mod cut;
/// `chaos disk`: the disk fails under a running broker.
pub mod disk;
/// A history on disk, one line per event, and the recorder that many clients share.
pub mod history;
/// A message's payload, from which a delivery tells what was published.
pub mod message;
/// Mistakes planted one by one, and who catches them.
#[cfg(feature = "planted-bugs")]
pub mod mutants;
/// What any history must satisfy; judges every harness.
pub mod oracle;
/// `chaos power`: the power goes, and what was confirmed is counted.
pub mod power;
/// One measured figure, appended to a file from which RESULTS.md is written.
pub mod record;
/// What was found, as a table and as JSON.
pub mod report;
/// The durability part of RESULTS.md.
pub mod results;
/// A disk whose every write is logged, and whose errors come on demand.
pub mod rig;
/// Chance that a seed repeats.
pub mod rng;
/// `chaos sim`: lives of a broker in virtual time, each from one seed.
pub mod sim;
/// `chaos crash --protocol v1`: the same question, asked by clients without names and confirms.
pub mod v1;
/// The v2 wire, as much as a publisher and a consumer need.
pub mod wire;

/// A failure of the harness itself, as opposed to an anomaly of the broker.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
