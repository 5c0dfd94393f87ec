//! Whether clients should come: what `/readyz` says. Written at start, at stop, and by whoever finds or mends a
//! trouble.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::types::CoreId;

/// Where the broker is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// Recovering; the port is not open.
    #[default]
    Starting,
    Ready,
    /// Told to stop: no new connections and publishes.
    Draining,
}

/// What can be wrong while the broker runs. Each is reported and mended on its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Trouble {
    /// The core has stood still.
    Stuck(CoreId),
}

/// What `/readyz` shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Status {
    Starting,
    Ready,
    Draining,
    /// Ready, were it not for this.
    Degraded(String),
}

/// Shared by `Arc`. A lock, since it is asked a few times a second and written a few times in a life.
#[derive(Debug, Default)]
pub struct Readiness(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    troubles: BTreeMap<Trouble, String>,
}

impl Readiness {
    pub fn enter(&self, phase: Phase) {
        self.state().phase = phase;
    }

    /// `reason`: a clause for the operator, such as "core 1 has stood still for 1 s".
    pub fn degrade(&self, trouble: Trouble, reason: String) {
        self.state().troubles.insert(trouble, reason);
    }

    pub fn mend(&self, trouble: Trouble) {
        self.state().troubles.remove(&trouble);
    }

    pub fn status(&self) -> Status {
        let state = self.state();
        match state.phase {
            Phase::Starting => Status::Starting,
            Phase::Draining => Status::Draining,
            Phase::Ready if state.troubles.is_empty() => Status::Ready,
            Phase::Ready => Status::Degraded(state.troubles.values().cloned().collect::<Vec<_>>().join("; ")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is half done when a holder panics: each change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn troubles_come_and_go_on_their_own() {
        let readiness = Readiness::default();
        assert_eq!(readiness.status(), Status::Starting);
        readiness.degrade(Trouble::Stuck(CoreId(1)), "core 1: no space".to_string());
        assert_eq!(readiness.status(), Status::Starting);
        readiness.enter(Phase::Ready);
        readiness.degrade(Trouble::Stuck(CoreId(0)), "core 0 stands still".to_string());
        assert_eq!(readiness.status(), Status::Degraded("core 0 stands still; core 1: no space".to_string()));
        readiness.mend(Trouble::Stuck(CoreId(0)));
        readiness.mend(Trouble::Stuck(CoreId(0)));
        assert_eq!(readiness.status(), Status::Degraded("core 1: no space".to_string()));
        readiness.mend(Trouble::Stuck(CoreId(1)));
        assert_eq!(readiness.status(), Status::Ready);
        readiness.enter(Phase::Draining);
        readiness.degrade(Trouble::Stuck(CoreId(0)), String::new());
        assert_eq!(readiness.status(), Status::Draining);
    }
}
