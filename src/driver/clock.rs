//! What time it is, for everything that may not ask.

use std::time::{Instant as StdInstant, SystemTime, UNIX_EPOCH};

use crate::planted::planted;
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
        let wall = computers_clock();
        if wall < seen.0 {
            tracing::warn!(behind_ms = seen.0 - wall, "the clock is behind the store's last time; going on from that");
        }
        Clock { start: StdInstant::now(), anchor: wall.max(seen.0) }
    }

    pub fn now(&self) -> Now {
        let elapsed = self.start.elapsed();
        let wall = if planted!(ComputersClock) { computers_clock() } else { self.anchor + elapsed.as_millis() as u64 };
        Now { mono: Instant(elapsed.as_nanos() as u64), wall: WallMs(wall) }
    }
}

/// Milliseconds since 1970; goes wherever somebody sets it.
fn computers_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_time_goes_on_from_what_the_store_has_seen() {
        let seen = WallMs(computers_clock() + 3_600_000);
        let clock = Clock::new(seen);
        let (before, after) = (clock.now(), clock.now());
        assert!(before.wall >= seen, "{before:?}");
        assert!(after.wall >= before.wall && after.mono >= before.mono, "{before:?}, {after:?}");
        let clock = Clock::new(WallMs(5));
        assert!(clock.now().wall.0 > 5, "a store that saw an early time does not hold the clock back");
    }
}
