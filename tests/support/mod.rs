//! A started broker, and a client that shares no code with `src/`: what these tests expect was written down by hand.

mod broker;
mod client;
mod lab;
mod v2;

pub use broker::{Broker, KEY, free_ports};
pub use client::{Client, Delivery, Frame, frame, hex, string};
pub use lab::{
    Ended, blipmq, disk_bytes, flip_byte, open_files, program, rss_kib, run, scratch, slot_path, store_bytes,
};
pub use v2::Said;

use std::time::{Duration, Instant};

/// How long a test waits for what must come. Generous: it is only ever used up by a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks until the answer is `Some`; panics with `what` when patience is used up.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
