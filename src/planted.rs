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
    ($(#[doc = $doc:literal] $bug:ident = $name:literal,)*) => {
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Bug {
            $(#[doc = $doc] $bug,)*
        }

        impl Bug {
            pub const ALL: &[Bug] = &[$(Bug::$bug),*];

            pub fn name(self) -> &'static str {
                match self {
                    $(Bug::$bug => $name,)*
                }
            }

            /// What it does, in one sentence.
            pub fn doc(self) -> &'static str {
                match self {
                    $(Bug::$bug => $doc.trim_ascii(),)*
                }
            }
        }
    };
}

bugs! {
    // What may be confirmed, and when.
    /// A publish is confirmed when it is appended, before it is written.
    ConfirmBeforeDurable = "confirm-before-durable",
    /// Under `always` a publish is confirmed when it is written, before it is synced.
    ConfirmAtWritten = "confirm-at-written",
    /// A sync counts for what was written while it ran.
    SyncCoversLater = "sync-covers-later",
    /// A confirm says `synced` of what is only written.
    LevelOverstated = "level-overstated",
    /// `every_n` looks at what is confirmed already, not at the batch that comes on top.
    EveryNForgetsNext = "every-n-forgets-next",
    /// `interval_ms` confirms whatever the age of what is not synced.
    IntervalNotEnforced = "interval-not-enforced",
    /// `interval_ms`: with every sync the age of what it did not cover begins anew.
    IntervalBeginsAnew = "interval-begins-anew",
    /// A segment that is full is not synced if the policy does not ask for it.
    RotationNotSynced = "rotation-not-synced",
    /// A publish sent twice is confirmed as a duplicate while the first one is on its way to the log.
    DuplicateAtOnce = "duplicate-at-once",
    /// A message is delivered when it is appended.
    DeliverBeforeDurable = "deliver-before-durable",
    /// A consumer's acknowledgement is answered before it is logged.
    AckConfirmedEarly = "ack-confirmed-early",
    /// v1: a PONG does not wait for what it vouches for.
    PongAtOnce = "pong-at-once",

    // What is written.
    /// Syncs, and O_DSYNC, are left out.
    SkipSync = "skip-sync",
    /// A sync right after a rotation leaves out the segment before.
    SyncForgetsOldSegment = "sync-forgets-old-segment",
    /// A failed sync is tried again.
    SyncRetried = "sync-retried",
    /// A failed write or sync of the log counts as done.
    IgnoreIoError = "ignore-io-error",
    /// A backlog read that fails is tried again and again.
    ReadErrorIgnored = "read-error-ignored",
    /// The watermark of a batch claims all that was taken to be written.
    WatermarkAhead = "watermark-ahead",
    /// The watermark of a batch never moves.
    WatermarkStuck = "watermark-stuck",
    /// What must survive together may lie in two batches.
    GroupSplit = "group-split",
    /// A slot that is used again keeps its salt.
    SaltReused = "salt-reused",
    /// Segments are read and written while writes of a dead process may still land in them.
    IgnoreSegmentLock = "ignore-segment-lock",

    // Recovery.
    /// A frame need not continue the one before it.
    NoChainCheck = "no-chain-check",
    /// A frame may lie anywhere.
    NoPositionCheck = "no-position-check",
    /// A frame of another stream or segment counts.
    NoStreamCheck = "no-stream-check",
    /// A frame of another use of the slot counts.
    NoSaltCheck = "no-salt-check",
    /// Segments and frames of another store count.
    NoStoreCheck = "no-store-check",
    /// The checksum of a frame's header is not looked at.
    NoHeaderCrc = "no-header-crc",
    /// The checksum of a frame's body is not looked at.
    NoBodyCrc = "no-body-crc",
    /// The checksum of a record is not looked at.
    NoRecordCrc = "no-record-crc",
    /// Whatever is no live frame ends the log.
    NoWatermark = "no-watermark",
    /// Zeros end the log.
    ZeroIsEnd = "zero-is-end",
    /// Witnesses are looked for in the segment at hand only.
    ScanOneSegment = "scan-one-segment",
    /// One block less than the watermark says must be there.
    TruncateOffByOne = "truncate-off-by-one",
    /// What cannot be read is taken for zeros.
    ReadErrorIsEnd = "read-error-is-end",
    /// A segment that the checkpoint lists may be missing.
    MissingUnnoticed = "missing-unnoticed",
    /// Records of a virtual shard may be missing.
    IndexGapUnnoticed = "index-gap-unnoticed",
    /// New streams do not say how the ones before them ended.
    NoOpeningNote = "no-opening-note",
    /// Only checkpoints say which incarnations there were.
    IncarnationReused = "incarnation-reused",
    /// Broker time goes on from the last segment's beginning, not from the last frame.
    TimeForgotten = "time-forgotten",

    // Checkpoints, and what they allow to be freed.
    /// A checkpoint leaves when it is made, not when what it covers is durable.
    CheckpointAhead = "checkpoint-ahead",
    /// Later records may share the last block of what a checkpoint covers.
    SnapshotNotCut = "snapshot-not-cut",
    /// Every checkpoint goes to the same file.
    CheckpointInPlace = "checkpoint-in-place",
    /// A checkpoint is not synced.
    CheckpointNotSynced = "checkpoint-not-synced",
    /// A checkpoint's checksums are not looked at.
    NoCheckpointCrc = "no-checkpoint-crc",
    /// A start uses the older of two checkpoints.
    OlderCheckpoint = "older-checkpoint",
    /// A segment is freed as soon as one checkpoint does not list it.
    FreeAfterOne = "free-after-one",
    /// A segment is freed though messages in it are still wanted.
    FreeWithLive = "free-with-live",
    /// A segment is freed when it begins to be covered, not when it is.
    FreeUncovered = "free-uncovered",
    /// A segment is freed before an older one of its stream.
    GapsInStream = "gaps-in-stream",

    // Replay.
    /// Replay forgets the publishers' identities.
    DedupForgotten = "dedup-forgotten",
    /// A checkpoint does not bring back what publishers have stored.
    DedupNotInCheckpoint = "dedup-not-in-checkpoint",
    /// Whatever is below a publisher's highest sequence is a duplicate.
    DedupHighest = "dedup-highest",
    /// Replay forgets what consumers have acknowledged.
    AcksForgotten = "acks-forgotten",
    /// A checkpoint does not bring back what was acknowledged out of order.
    AcksNotInCheckpoint = "acks-not-in-checkpoint",
    /// Replay finishes one message more than was acknowledged.
    AckOneTooMany = "ack-one-too-many",
    /// Replay does not know a message whose only copy is a relocated one.
    RelocatedForgotten = "relocated-forgotten",
    /// How often deliveries have failed is not logged.
    RetriesForgotten = "retries-forgotten",
    /// What was delivered before a restart comes again without a flag.
    RecoveredUnflagged = "recovered-unflagged",

    // Queues.
    /// A message is delivered though it has expired.
    ExpiredDelivered = "expired-delivered",
    /// A message's end is counted on another clock than it is compared with.
    TtlOnOtherClock = "ttl-on-other-clock",
    /// Broker time is the computer's clock, wherever that is set.
    ComputersClock = "computers-clock",
    /// What should go to the dead-letter topic is given up.
    DeadLetterDropped = "dead-letter-dropped",
    /// Credit comes back when a delivery fails, and again when it is acknowledged late.
    CreditTwice = "credit-twice",
    /// A redelivery from far ahead takes the cursor along.
    CursorJumps = "cursor-jumps",
    /// A publish overtakes those that wait for a segment.
    ParkedOvertaken = "parked-overtaken",
    /// A QoS 0 message overtakes stored ones of its topic that wait for the log.
    Qos0Overtakes = "qos0-overtakes",
    /// A granted segment wakes nobody who waits for it.
    ParkedForgotten = "parked-forgotten",
    /// When space comes back, publishes are refused all the same.
    NoSpaceForever = "no-space-forever",
    /// v1: a POLL that waits for a read is never answered.
    PollNeverSettled = "poll-never-settled",
    /// Memory keeps what a slot held in its last use.
    CacheOutlivesSlot = "cache-outlives-slot",

    // Connections and cores.
    /// A connection that was paused is not read again.
    ResumeForgotten = "resume-forgotten",
    /// A frame may be as long as it says.
    AnyLength = "any-length",
    /// Bytes behind a frame that came in two parts are taken for a part of it.
    FrameSwallowed = "frame-swallowed",
    /// A topic's core depends on how many cores there are.
    RoutingByCores = "routing-by-cores",
    /// What does not fit a ring between two cores is dropped.
    DropOnFullRing = "drop-on-full-ring",
}

#[cfg(feature = "planted-bugs")]
mod state {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Bug;

    /// Nobody has asked or said yet.
    const UNKNOWN: usize = usize::MAX;
    /// Place in `Bug::ALL`, plus one.
    static PLANTED: AtomicUsize = AtomicUsize::new(UNKNOWN);

    pub fn plant(bug: Option<Bug>) {
        PLANTED.store(bug.map_or(0, |bug| bug as usize + 1), Ordering::Relaxed);
    }

    /// Asked for the first time with nothing planted, it looks at the environment: for tests, which have no `main`.
    pub fn is(bug: Bug) -> bool {
        if PLANTED.load(Ordering::Relaxed) == UNKNOWN {
            from_env().unwrap_or_else(|name| panic!("BLIPMQ_PLANTED_BUG: there is no mistake called {name}"));
        }
        PLANTED.load(Ordering::Relaxed) == bug as usize + 1
    }

    /// Plants what `BLIPMQ_PLANTED_BUG` names. `Err`: the name, if there is no such mistake.
    pub fn from_env() -> Result<(), String> {
        let bug = match std::env::var("BLIPMQ_PLANTED_BUG") {
            Ok(name) => Some(Bug::ALL.iter().copied().find(|bug| bug.name() == name).ok_or(name)?),
            Err(_) => None,
        };
        plant(bug);
        Ok(())
    }
}
#[cfg(feature = "planted-bugs")]
pub use state::{from_env, is, plant};

#[cfg(not(feature = "planted-bugs"))]
pub const fn is(_: Bug) -> bool {
    false
}
