//! Time as plain numbers. Reads no clock: the driver (or the simulator) says what time it is.

use std::ops::{Add, Sub};

/// Monotonic nanoseconds since the broker started.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Instant(pub u64);

/// Nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Duration(pub u64);

/// Broker time: milliseconds since the Unix epoch, never running backwards, not even over a restart
/// (anchored at start to `max(clock, persisted high-water mark)`, then monotonic).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct WallMs(pub u64);

/// What time it is, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// For timers, retries and credit.
    pub mono: Instant,
    /// For what is stored: publish time, expiry.
    pub wall: WallMs,
}

impl Duration {
    pub const ZERO: Duration = Duration(0);

    pub const fn from_millis(ms: u64) -> Duration {
        Duration(ms.saturating_mul(1_000_000))
    }

    pub const fn from_secs(secs: u64) -> Duration {
        Duration(secs.saturating_mul(1_000_000_000))
    }

    pub const fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }

    pub const fn saturating_mul(self, by: u64) -> Duration {
        Duration(self.0.saturating_mul(by))
    }
}

impl Instant {
    /// Microseconds, the low 32 bits: what two instants less than 71 minutes apart are told apart by, in little room.
    pub const fn stamp(self) -> u32 {
        (self.0 / 1000) as u32
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_add(rhs.0))
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, rhs: Instant) -> Duration {
        Duration(self.0.saturating_sub(rhs.0))
    }
}
