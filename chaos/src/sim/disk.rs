//! Slot and checkpoint files in sectors: what reads see, what is on the platter, what is on its way.

/// How often what goes wrong, in ten thousandths of the operations it can happen to; 0: never.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// A write of the log fails.
    pub write_eio: u32,
    /// A sync fails.
    pub sync_eio: u32,
    /// A read of the backlog, or of a slot at recovery, fails.
    pub read_eio: u32,
    /// A write ends before its end.
    pub short_write: u32,
    /// A slot or a checkpoint finds no space; it stays so for a while.
    pub no_space: u32,
    /// A write is reported as done, synced too, and is not there: all of it, or some sectors.
    pub lost_write: u32,
    /// A write lands somewhere else.
    pub misdirect: u32,
    /// Per second of virtual time: a bit, a sector or a block at rest changes.
    pub rot: u32,
    /// An operation takes a hundred times as long; so do those after it, for a while.
    pub slow: u32,
    /// At a kill: a write under way lands after the process is gone.
    pub late: u32,
}

/// What happened, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    pub write_eio: u64,
    pub sync_eio: u64,
    pub read_eio: u64,
    pub short_write: u64,
    pub no_space: u64,
    pub lost_write: u64,
    pub misdirect: u64,
    pub rot: u64,
    pub slow: u64,
    pub late: u64,
    /// At a power cut or a kill: writes of which nothing, or only some sectors stayed.
    pub dropped: u64,
    pub torn: u64,
}
