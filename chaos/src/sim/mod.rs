//! `chaos sim`: a world grown from one seed, in virtual time, around the pure code of the broker.

/// Slot and checkpoint files as they are, and as they are if the power goes now.
pub mod disk;
/// The broker as a process on a computer that fails.
pub mod machine;
