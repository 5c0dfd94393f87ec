//! What time it is, for everything that may not ask.

use std::time::{Instant as StdInstant, SystemTime, UNIX_EPOCH};

use crate::time::{Instant, Now, WallMs};

/// Monotonic time since the broker's start, and broker time anchored there: the wall clock is read once, so that a step
/// of it while we run moves no deadline, and never goes back behind what the store has seen.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: StdInstant,
    anchor: u64,
}

impl Clock {
    /// - `seen`: the largest broker time in the store.
    pub fn new(seen: WallMs) -> Clock {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        if wall < seen.0 {
            tracing::warn!(behind_ms = seen.0 - wall, "the clock is behind the store's last time; going on from that");
        }
        Clock { start: StdInstant::now(), anchor: wall.max(seen.0) }
    }

    pub fn now(&self) -> Now {
        let elapsed = self.start.elapsed();
        Now { mono: Instant(elapsed.as_nanos() as u64), wall: WallMs(self.anchor + elapsed.as_millis() as u64) }
    }
}
