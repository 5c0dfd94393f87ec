//! What may be acknowledged, and when to sync.
//!
//! Owns: how far one stream is written, synced and acknowledged, and the bound each policy enforces (acknowledgements stall,
//! they do not overtake it). Never: syncs, waits, reads a clock.
//! Neighbours: the driver reports writes and syncs and asks what is due; the shard frees what `ack_upto` covers.

use std::collections::VecDeque;
use std::fmt;

use crate::planted::planted;
use crate::time::{Duration, Instant};
use crate::types::{Durability, Lsn};

/// A quiet log with records behind its last watermark gets a marker after this long.
pub const MARKER_AFTER: Duration = Duration::from_secs(1);
/// Under `every_n`, records that few others follow are synced after this long (V1 G3).
pub const EVERY_N_IDLE: Duration = Duration::from_secs(1);

/// When a stored record may be acknowledged, and so what a power loss may cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FsyncPolicy {
    /// Once it is synced: nothing acknowledged is lost.
    #[default]
    Always,
    /// Once it is written, while fewer than so many acknowledged records are not synced.
    EveryN(u32),
    /// Once it is written, while every acknowledged record that is not synced is younger than this.
    IntervalMs(u64),
    /// Once it is written.
    None,
}

impl FsyncPolicy {
    /// `always`, `every_n:<n>`, `interval_ms:<ms>` or `none`, in any case, with blanks around. Zero is no number here.
    pub fn parse(text: &str) -> Option<FsyncPolicy> {
        let text = text.trim().to_ascii_lowercase();
        match text.split_once(':') {
            None if text == "always" => Some(FsyncPolicy::Always),
            None if text == "none" => Some(FsyncPolicy::None),
            Some(("every_n", n)) => n.trim().parse().ok().filter(|&n| n > 0).map(FsyncPolicy::EveryN),
            Some(("interval_ms", ms)) => ms.trim().parse().ok().filter(|&ms| ms > 0).map(FsyncPolicy::IntervalMs),
            _ => None,
        }
    }
}

impl fmt::Display for FsyncPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FsyncPolicy::Always => write!(f, "always"),
            FsyncPolicy::EveryN(n) => write!(f, "every_n:{n}"),
            FsyncPolicy::IntervalMs(ms) => write!(f, "interval_ms:{ms}"),
            FsyncPolicy::None => write!(f, "none"),
        }
    }
}

/// A write that is complete and not yet synced.
#[derive(Clone, Copy, Debug)]
struct Unsynced {
    end: Lsn,
    records: u64,
    written: Instant,
}

#[derive(Debug)]
pub struct Commit {
    policy: FsyncPolicy,
    written: Lsn,
    durable: Lsn,
    acked: Lsn,
    /// Oldest first. The first `acked_writes` of them are acknowledged.
    unsynced: VecDeque<Unsynced>,
    acked_writes: usize,
    acked_records: u64,
    unsynced_records: u64,
    /// When the oldest acknowledged record that is not synced was acknowledged.
    acked_since: Option<Instant>,
    /// What the running sync will cover.
    running: Option<Lsn>,
    requested: bool,
    /// Records were written since the last marker.
    unmarked: bool,
    /// Since when everything is synced and nothing new was written.
    quiet_since: Option<Instant>,
}

impl Commit {
    /// - `start`: where the stream begins.
    pub fn new(policy: FsyncPolicy, start: Lsn) -> Commit {
        Commit {
            policy,
            written: start,
            durable: start,
            acked: start,
            unsynced: VecDeque::new(),
            acked_writes: 0,
            acked_records: 0,
            unsynced_records: 0,
            acked_since: None,
            running: None,
            requested: false,
            unmarked: false,
            quiet_since: None,
        }
    }

    pub fn policy(&self) -> FsyncPolicy {
        self.policy
    }

    /// Everything up to `end` is written: the next write in log order, and so all before it, completed in full.
    pub fn on_written(&mut self, end: Lsn, records: u32, now: Instant) {
        assert!(end > self.written, "written {end} after {}", self.written);
        self.written = end;
        self.unsynced.push_back(Unsynced { end, records: u64::from(records), written: now });
        self.unsynced_records += u64::from(records);
        self.unmarked = records > 0;
        self.quiet_since = None;
        self.advance(now);
    }

    /// A sync begins now. Returns what it will cover: what was written when it began, not what is when it ends.
    pub fn on_sync_started(&mut self) -> Lsn {
        assert!(self.running.is_none(), "two syncs at once");
        self.running = Some(self.written);
        self.requested = false;
        self.written
    }

    /// Everything up to `upto` is synced.
    pub fn on_synced(&mut self, upto: Lsn, now: Instant) {
        assert!(upto <= self.written, "synced {upto}, written is {}", self.written);
        let upto = if planted!(SyncCoversLater) { self.written } else { upto };
        self.running = None;
        if upto > self.durable {
            self.durable = upto;
            while let Some(front) = self.unsynced.front().copied().filter(|front| front.end <= upto) {
                self.unsynced.pop_front();
                self.unsynced_records -= front.records;
                if self.acked_writes > 0 {
                    self.acked_writes -= 1;
                    self.acked_records -= front.records;
                }
            }
            // The exact age of what is left is not known any more; the age of its write is at least that.
            let age = |front: &Unsynced| if planted!(IntervalBeginsAnew) { now } else { front.written };
            self.acked_since = self.unsynced.front().filter(|_| self.acked_writes > 0).map(age);
        }
        if self.durable == self.written && self.unmarked {
            self.quiet_since.get_or_insert(now);
        }
        self.advance(now);
    }

    /// Wants a sync whatever the policy says: when a segment was filled, and at the end.
    pub fn request_sync(&mut self) {
        self.requested = self.durable < self.written;
    }

    /// What may be acknowledged. Only grows.
    pub fn ack_upto(&self) -> Lsn {
        self.acked
    }

    /// How durable what `ack_upto` covers is: the least of it.
    pub fn level(&self) -> Durability {
        if self.acked <= self.durable || planted!(LevelOverstated) { Durability::Synced } else { Durability::Written }
    }

    pub fn written(&self) -> Lsn {
        self.written
    }

    /// The watermark for the next frame.
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Records acknowledged and not synced: what a power loss would cost now.
    pub fn acked_unsynced(&self) -> u64 {
        self.acked_records
    }

    /// Whether to begin a sync now. False while one runs.
    pub fn sync_wanted(&self, now: Instant) -> bool {
        if self.running.is_some() || self.durable == self.written {
            return false;
        }
        match self.policy {
            _ if self.requested => true,
            FsyncPolicy::Always => true,
            // At the half, so that acknowledgements go on while it runs.
            FsyncPolicy::EveryN(n) if self.unsynced_records * 2 >= u64::from(n) => true,
            _ => self.sync_deadline().is_some_and(|at| at <= now),
        }
    }

    /// When to look again although nothing happened.
    pub fn next_deadline(&self) -> Option<Instant> {
        let sync = self.sync_deadline().filter(|_| self.running.is_none());
        [sync, self.marker_deadline()].into_iter().flatten().min()
    }

    /// Whether to write a marker now, so that the last records get a witness.
    pub fn marker_wanted(&self, now: Instant) -> bool {
        self.marker_deadline().is_some_and(|at| at <= now)
    }

    fn marker_deadline(&self) -> Option<Instant> {
        self.quiet_since.map(|since| since + MARKER_AFTER)
    }

    fn sync_deadline(&self) -> Option<Instant> {
        let oldest = self.unsynced.front()?.written;
        match self.policy {
            FsyncPolicy::Always | FsyncPolicy::None => None,
            FsyncPolicy::EveryN(_) => Some(oldest + EVERY_N_IDLE),
            FsyncPolicy::IntervalMs(ms) => Some(oldest + Duration(Duration::from_millis(ms).0 / 2)),
        }
    }

    /// Acknowledges as much as the policy allows.
    fn advance(&mut self, now: Instant) {
        self.acked = self.acked.max(self.durable);
        while let Some(next) = self.unsynced.get(self.acked_writes).copied() {
            let allowed = match self.policy {
                FsyncPolicy::Always => planted!(ConfirmAtWritten),
                FsyncPolicy::EveryN(n) if planted!(EveryNForgetsNext) => self.acked_records < u64::from(n),
                FsyncPolicy::EveryN(n) => self.acked_records + next.records <= u64::from(n),
                FsyncPolicy::IntervalMs(_) if planted!(IntervalNotEnforced) => true,
                FsyncPolicy::IntervalMs(ms) => {
                    self.acked_since.is_none_or(|since| now - since < Duration::from_millis(ms))
                }
                FsyncPolicy::None => true,
            };
            if !allowed {
                break;
            }
            self.acked = next.end;
            self.acked_writes += 1;
            self.acked_records += next.records;
            if next.records > 0 {
                self.acked_since.get_or_insert(now);
            }
        }
        self.invariants();
    }

    fn invariants(&self) {
        assert!(self.durable <= self.written && self.acked <= self.written && self.durable <= self.acked);
        match self.policy {
            FsyncPolicy::Always => assert!(self.acked == self.durable || planted!(ConfirmAtWritten)),
            FsyncPolicy::EveryN(n) => assert!(self.acked_records <= u64::from(n) || planted!(EveryNForgetsNext)),
            FsyncPolicy::IntervalMs(_) | FsyncPolicy::None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    #[test]
    fn policies_are_read_as_they_are_written() {
        for (text, policy) in [
            ("always", FsyncPolicy::Always),
            (" NONE ", FsyncPolicy::None),
            ("Every_N:64", FsyncPolicy::EveryN(64)),
            ("interval_ms: 10", FsyncPolicy::IntervalMs(10)),
        ] {
            assert_eq!(FsyncPolicy::parse(text), Some(policy));
            assert_eq!(FsyncPolicy::parse(&policy.to_string()), Some(policy));
        }
        for text in ["", "sometimes", "every_n", "every_n:", "every_n:0", "every_n:-1", "interval_ms:0", "always:1"] {
            assert_eq!(FsyncPolicy::parse(text), None, "{text}");
        }
        assert_eq!(FsyncPolicy::default(), FsyncPolicy::Always);
    }

    #[test]
    fn always_acknowledges_what_the_sync_covered_when_it_began() {
        let mut commit = Commit::new(FsyncPolicy::Always, Lsn(1));
        assert!(!commit.sync_wanted(at(0)));
        commit.on_written(Lsn(10), 5, at(0));
        assert!(commit.sync_wanted(at(0)));
        assert_eq!(commit.on_sync_started(), Lsn(10));
        commit.on_written(Lsn(20), 5, at(1));
        assert!(!commit.sync_wanted(at(1)), "one runs");
        assert_eq!(commit.ack_upto(), Lsn(1));
        commit.on_synced(Lsn(10), at(2));
        assert_eq!((commit.ack_upto(), commit.level()), (Lsn(10), Durability::Synced));
        assert!(commit.sync_wanted(at(2)));
        assert_eq!(commit.acked_unsynced(), 0);
    }

    #[test]
    fn every_n_stalls_at_n() {
        let mut commit = Commit::new(FsyncPolicy::EveryN(10), Lsn(1));
        commit.on_written(Lsn(10), 4, at(0));
        assert_eq!((commit.ack_upto(), commit.level()), (Lsn(10), Durability::Written));
        assert!(!commit.sync_wanted(at(0)));
        commit.on_written(Lsn(20), 4, at(0));
        assert!(commit.sync_wanted(at(0)), "before it stalls");
        assert_eq!(commit.on_sync_started(), Lsn(20));
        commit.on_written(Lsn(30), 3, at(0));
        commit.on_written(Lsn(40), 1, at(0));
        assert_eq!((commit.ack_upto(), commit.acked_unsynced()), (Lsn(20), 8), "11 would be too many");
        commit.on_synced(Lsn(20), at(1));
        assert_eq!((commit.ack_upto(), commit.acked_unsynced()), (Lsn(40), 4));
        // Fewer than half: synced all the same, a second later.
        assert!(!commit.sync_wanted(at(999)));
        assert_eq!(commit.next_deadline(), Some(at(1_000)));
        assert!(commit.sync_wanted(at(1_000)));
    }

    #[test]
    fn a_batch_larger_than_n_waits_for_its_sync() {
        let mut commit = Commit::new(FsyncPolicy::EveryN(2), Lsn(1));
        commit.on_written(Lsn(10), 3, at(0));
        assert_eq!(commit.ack_upto(), Lsn(1));
        commit.on_sync_started();
        commit.on_synced(Lsn(10), at(0));
        assert_eq!((commit.ack_upto(), commit.level()), (Lsn(10), Durability::Synced));
    }

    #[test]
    fn interval_stalls_when_the_oldest_is_too_old() {
        let mut commit = Commit::new(FsyncPolicy::IntervalMs(10), Lsn(1));
        commit.on_written(Lsn(10), 1, at(0));
        assert_eq!(commit.next_deadline(), Some(at(5)), "also on an idle broker");
        assert!(!commit.sync_wanted(at(4)) && commit.sync_wanted(at(5)));
        commit.on_sync_started();
        assert_eq!(commit.next_deadline(), None);
        commit.on_written(Lsn(20), 1, at(9));
        assert_eq!(commit.ack_upto(), Lsn(20));
        commit.on_written(Lsn(30), 1, at(10));
        assert_eq!(commit.ack_upto(), Lsn(20), "a slow sync does not widen the window");
        commit.on_synced(Lsn(10), at(12));
        assert_eq!(commit.ack_upto(), Lsn(30), "the oldest is from 9 now");
        commit.on_written(Lsn(40), 1, at(19));
        assert_eq!(commit.ack_upto(), Lsn(30));
    }

    #[test]
    fn none_syncs_only_on_request() {
        let mut commit = Commit::new(FsyncPolicy::None, Lsn(1));
        commit.request_sync();
        assert!(!commit.sync_wanted(at(0)), "nothing to sync");
        commit.on_written(Lsn(10), 1, at(0));
        assert_eq!((commit.ack_upto(), commit.level()), (Lsn(10), Durability::Written));
        assert!(!commit.sync_wanted(at(1_000_000)));
        assert_eq!(commit.next_deadline(), None);
        commit.request_sync();
        assert!(commit.sync_wanted(at(0)));
        commit.on_sync_started();
        commit.on_synced(Lsn(10), at(0));
        assert!(!commit.sync_wanted(at(0)));
    }

    #[test]
    fn a_quiet_log_gets_one_marker() {
        let mut commit = Commit::new(FsyncPolicy::Always, Lsn(1));
        let sync = |commit: &mut Commit, ms| {
            let upto = commit.on_sync_started();
            commit.on_synced(upto, at(ms));
        };
        commit.on_written(Lsn(10), 1, at(0));
        sync(&mut commit, 5);
        assert_eq!(commit.next_deadline(), Some(at(1_005)));
        commit.on_written(Lsn(20), 1, at(500));
        assert_eq!(commit.next_deadline(), None, "its successor is the witness");
        sync(&mut commit, 600);
        assert!(!commit.marker_wanted(at(1_599)) && commit.marker_wanted(at(1_600)));
        commit.on_written(Lsn(30), 0, at(1_600));
        sync(&mut commit, 1_601);
        assert_eq!(commit.next_deadline(), None, "a marker needs no marker");
    }
}
