//! Mistakes that can be planted to see that the harnesses notice them. Only with the feature `planted-bugs`; never shipped.
//!
//! Owns: the mistakes' names, and which one is planted (one per process). Without the feature `planted!` is `false`, and the
//! compiler removes the mistake.

/// Whether this mistake is planted now: `if planted!(SkipSync) { … }`.
macro_rules! planted {
    ($bug:ident) => {
        cfg!(feature = "planted-bugs") && $crate::planted::is($crate::planted::Bug::$bug)
    };
}
pub(crate) use planted;

macro_rules! bugs {
    ($($(#[$doc:meta])+ $bug:ident = $name:literal,)*) => {
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Bug {
            $($(#[$doc])+ $bug,)*
        }

        impl Bug {
            pub const ALL: &[Bug] = &[$(Bug::$bug),*];

            pub fn name(self) -> &'static str {
                match self {
                    $(Bug::$bug => $name,)*
                }
            }
        }
    };
}

bugs! {
    /// A publish is confirmed when it is appended, before it is written.
    ConfirmBeforeDurable = "confirm-before-durable",
    /// The log is neither opened for synced writes nor synced.
    SkipSync = "skip-sync",
    /// A checkpoint is left to the page cache.
    CheckpointNotSynced = "checkpoint-not-synced",
    /// Every checkpoint is written over the newest one.
    CheckpointInPlace = "checkpoint-in-place",
    /// The first write to a segment, its header, counts as synced.
    HeaderNotSynced = "header-not-synced",
    /// A failed write or sync of the log counts as done.
    IgnoreIoError = "ignore-io-error",
}

#[cfg(feature = "planted-bugs")]
mod state {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Bug;

    /// Place in `Bug::ALL`, plus one.
    static PLANTED: AtomicUsize = AtomicUsize::new(0);

    pub fn plant(bug: Option<Bug>) {
        PLANTED.store(bug.map_or(0, |bug| bug as usize + 1), Ordering::Relaxed);
    }

    pub fn is(bug: Bug) -> bool {
        PLANTED.load(Ordering::Relaxed) == bug as usize + 1
    }

    /// Plants what `BLIPMQ_PLANTED_BUG` names. `Err`: the name, if there is no such mistake.
    pub fn from_env() -> Result<(), String> {
        let Ok(name) = std::env::var("BLIPMQ_PLANTED_BUG") else { return Ok(()) };
        let bug = Bug::ALL.iter().copied().find(|bug| bug.name() == name).ok_or(name)?;
        plant(Some(bug));
        Ok(())
    }
}
#[cfg(feature = "planted-bugs")]
pub use state::{from_env, is, plant};

#[cfg(not(feature = "planted-bugs"))]
pub const fn is(_: Bug) -> bool {
    false
}
