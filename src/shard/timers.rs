//! All deadlines of a shard in one queue.

use std::collections::BTreeSet;

use crate::time::Instant;
use crate::types::{ConnId, SubId, TopicId};

/// Whose deadline it is. Each owner keeps at most one entry here: its earliest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Timer {
    /// A delivery timed out, a delayed message is due, a parked poll lapses, an orphan's or an idle queue's life ends.
    Subscription(SubId),
    /// The earliest message of a topic expires.
    Expiry(TopicId),
    /// A connection must be logged in by now, or its penalty is over.
    Connection(ConnId),
}

#[derive(Debug, Default)]
pub struct Timers {
    queue: BTreeSet<(Instant, Timer)>,
}

impl Timers {
    /// Replaces `timer`'s deadline. `armed` is the owner's note of it; both are kept in step here.
    pub fn set(&mut self, timer: Timer, armed: &mut Option<Instant>, at: Option<Instant>) {
        if *armed == at {
            return;
        }
        if let Some(old) = armed.take() {
            self.queue.remove(&(old, timer));
        }
        if let Some(at) = at {
            self.queue.insert((at, timer));
        }
        *armed = at;
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Takes one timer that is due. Its owner's note must be cleared by whoever handles it.
    pub fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        let (at, timer) = *self.queue.first()?;
        if at > now {
            return None;
        }
        self.queue.pop_first();
        Some(timer)
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::VShard;

    #[test]
    fn an_owner_has_one_deadline_and_moving_it_leaves_no_trace() {
        let timer = Timer::Expiry(TopicId { vshard: VShard(1), index: 1 });
        let mut timers = Timers::default();
        let mut armed = None;
        timers.set(timer, &mut armed, Some(Instant(50)));
        timers.set(timer, &mut armed, Some(Instant(20)));
        assert_eq!((timers.len(), timers.next()), (1, Some(Instant(20))));
        assert_eq!(timers.pop_due(Instant(19)), None);
        assert_eq!(timers.pop_due(Instant(20)), Some(timer));
        assert!(timers.is_empty());
    }
}
