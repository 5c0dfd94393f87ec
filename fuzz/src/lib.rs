//! What must hold for bytes we did not write: one module per fuzz target, one function per module.
//!
//! Owns: how an input is read, and the oracles. Never: links a fuzzer. `fuzz_targets/` does; `tests/fuzz.rs` takes these very
//! files to replay `corpus/` and `regressions/` in an ordinary test run.

pub mod checkpoint;
pub mod config;
mod draw;
pub mod frame_decode;
pub mod http_request;
pub mod import_v1;
mod memory;
pub mod record;
pub mod reply_decode;
pub mod segment_recovery;
mod store;

/// Takes one input; panics if something does not hold.
pub type Target = fn(&[u8]);

/// Every target, by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("frame_decode", frame_decode::run),
    ("reply_decode", reply_decode::run),
    ("segment_recovery", segment_recovery::run),
    ("checkpoint", checkpoint::run),
    ("record", record::run),
    ("config", config::run),
    ("import_v1", import_v1::run),
    ("http_request", http_request::run),
];

/// Before the first input: plants the mistake that the environment names, if the build has any.
pub fn begin() {
    #[cfg(feature = "planted-bugs")]
    blipmq::planted::from_env().expect("a known mistake");
}
