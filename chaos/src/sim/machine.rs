//! The broker as a process on a computer that fails.

use blipmq::metrics::CoreMetrics;
use blipmq::protocol::reply::Reply;
use blipmq::shard::effects::CloseReason;
use blipmq::shard::settings::Settings;
use blipmq::time::{Duration, Instant, Now};
use blipmq::types::{ConnId, Lsn};
use blipmq::wal::commit::FsyncPolicy;

use crate::message::MessageId;
pub use crate::sim::disk::{FaultCounts, Faults};

/// What may differ from life to life.
#[derive(Clone, Debug)]
pub struct Plan {
    pub policy: FsyncPolicy,
    /// A write is a sync, too. Only with `Always`, as in the driver.
    pub dsync: bool,
    pub segment_size: u32,
    pub vshards: u16,
    /// The quota; at least 3 per core and one.
    pub slots_max: Option<usize>,
    /// Free slots kept per core.
    pub spare: usize,
    pub checkpoint_interval: Duration,
    /// How long a stop waits for acknowledgements.
    pub drain: Duration,
    /// `core` and `cores` are filled in.
    pub settings: Settings,
    /// API keys that may log in, without restrictions.
    pub keys: Vec<Vec<u8>>,
    pub faults: Faults,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The process dies: what was written stays.
    Killed,
    /// What was not synced is anyone's guess.
    PowerLoss,
}

/// A start that was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Exit 65.
    Corrupt(String),
    /// Exit 65 or 74: the disk gives an error.
    Unreadable(String),
    NoSpace(String),
}

/// The process ended by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Death {
    /// Exit 74.
    Io(String),
    /// Exit 65.
    Corrupt(String),
}

/// Where a message is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Held {
    /// In memory at most.
    No,
    /// In a completed write.
    Written,
    /// In a completed write that a completed sync covers, or found by recovery (which syncs first).
    Synced,
}

/// What the disk has done to what it held, and `repair` has undone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    /// Sectors that were not what was written to them.
    pub sectors: usize,
    /// Messages in frames with such sectors.
    pub messages: Vec<MessageId>,
}

/// What the last start has found, and lost.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StartReport {
    pub incarnation: u64,
    /// Frames of torn tails that were cut off.
    pub truncated_frames: u64,
    pub truncated_records: u64,
    /// Checkpoint files that were not whole.
    pub fallbacks: u32,
    /// Damage without a witness was taken for a torn tail, as it may be (DURABILITY 1.3): records, and messages among them.
    pub lost_unwitnessed: u64,
    pub lost_messages: Vec<MessageId>,
}

/// Said to a client in the happening that was just run, before it is on its way.
#[derive(Debug)]
pub struct Said {
    pub conn: ConnId,
    pub reply: Reply,
}

pub struct Machine {
    plan: Plan,
    faults: FaultCounts,
    report: StartReport,
}

impl Machine {
    /// An empty store; the process is not running.
    pub fn new(plan: Plan, _seed: u64) -> Machine {
        Machine { plan, faults: FaultCounts::default(), report: StartReport::default() }
    }

    /// - `now`: the computer's clocks. Broker time is anchored here to `now.wall`, or to what the store has seen if that is later.
    pub fn start(&mut self, _now: Now, _cores: u16) -> Result<(), Refused> {
        Ok(())
    }

    pub fn is_up(&self) -> bool {
        false
    }

    /// The opening notes are durable: clients may connect.
    pub fn is_ready(&self) -> bool {
        false
    }

    pub fn cores(&self) -> u16 {
        0
    }

    /// What the last start has found.
    pub fn report(&self) -> &StartReport {
        &self.report
    }

    /// Only when ready.
    pub fn connect(&mut self, _now: Now, _core: u16) -> ConnId {
        unreachable!("skeleton")
    }

    /// Bytes from the client, in any slicing.
    pub fn receive(&mut self, _now: Now, _conn: ConnId, _bytes: &[u8]) {}

    /// The broker does not read now: whoever has bytes for it keeps them.
    pub fn is_paused(&self, _conn: ConnId) -> bool {
        false
    }

    /// Takes up to `max` bytes for the client.
    pub fn send(&mut self, _now: Now, _conn: ConnId, _max: usize) -> Vec<u8> {
        Vec::new()
    }

    /// Bytes for the client that `send` has not taken.
    pub fn outbox_len(&self, _conn: ConnId) -> usize {
        0
    }

    /// The client's end is gone (FIN or reset).
    pub fn hang_up(&mut self, _now: Now, _conn: ConnId) {}

    /// Closed by the broker since last asked: there will be no bytes any more.
    pub fn closed(&mut self) -> Vec<(ConnId, CloseReason)> {
        Vec::new()
    }

    /// Said by the happenings since last asked, in order: to look at `held` in the very moment something is confirmed or delivered.
    pub fn said(&mut self) -> Vec<Said> {
        Vec::new()
    }

    /// The earliest time something inside can happen.
    pub fn next_due(&self) -> Option<Instant> {
        None
    }

    /// Runs one happening that is due, chosen at random; `false`: there is none.
    pub fn run_one(&mut self, _now: Now) -> bool {
        false
    }

    /// The process has ended by itself since last asked. The machine is off.
    pub fn death(&mut self) -> Option<Death> {
        None
    }

    /// Also when it is off: the power can go then, too.
    pub fn crash(&mut self, _now: Now, _how: Crash) {}

    /// SIGTERM. `is_up` turns false when it is done; happenings bring it about.
    pub fn stop(&mut self, _now: Now) {}

    pub fn is_stopping(&self) -> bool {
        false
    }

    /// No more faults. Damage stays until `repair`.
    pub fn heal(&mut self) {
        self.plan.faults = Faults::default();
    }

    /// Undoes what the disk has done to what it held. Only when off.
    pub fn repair(&mut self) -> Damage {
        Damage::default()
    }

    /// Something on the disk is not what was written there: a start may be refused.
    pub fn is_damaged(&self) -> bool {
        false
    }

    pub fn held(&self, _id: MessageId) -> Held {
        Held::No
    }

    /// Messages in completed writes of this core that no sync covers yet, oldest first: at a power cut these may be lost, if the
    /// policy lets them be confirmed. `written`: when the write completed.
    pub fn unsynced(&self, _core: u16) -> Vec<(MessageId, Instant)> {
        Vec::new()
    }

    /// The broker's own clock when the computer's says `now`; `now` itself while it is off.
    pub fn clock(&self, now: Now) -> Now {
        now
    }

    /// How far this core's log is written, as its shard has been told.
    pub fn log_written(&self, _core: u16) -> Lsn {
        Lsn(0)
    }

    pub fn log_synced(&self, _core: u16) -> Lsn {
        Lsn(0)
    }

    /// Nothing is on its way between cores.
    pub fn rings_empty(&self) -> bool {
        true
    }

    /// The counters of all cores together.
    pub fn metrics(&mut self) -> CoreMetrics {
        CoreMetrics::default()
    }

    /// Nothing is under way inside: rings, log, reads, requests. The clients' outboxes do not count.
    pub fn is_quiet(&self) -> bool {
        true
    }

    /// What must hold: I7 (if quiet), I8 and I9 of the last start, the shards' own invariants.
    pub fn check(&mut self) -> Result<(), String> {
        Ok(())
    }

    pub fn faults(&self) -> &FaultCounts {
        &self.faults
    }
}
impl Faults {
    pub fn draw(_rng: &mut crate::rng::Rng, _allow: &dyn Fn(&str) -> bool) -> Faults {
        Faults::default()
    }
}
impl FaultCounts {
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
