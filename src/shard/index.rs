//! Which messages of a topic are still wanted, and where in the log they lie.
//!
//! Owns: one small entry per QoS1 message that some subscription has not finished. Payloads stay in the log.

use std::collections::VecDeque;

use crate::time::WallMs;
use crate::types::{LogRef, Seq};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub seq: Seq,
    pub at: LogRef,
    /// Subscriptions that have not finished it. 0: dead, kept only because an older entry is in front of it.
    pub refs: u32,
    pub priority: u8,
    /// Low bits of the microseconds since the broker started, when it was published: for statistics. (Fills padding.)
    pub stamp: u32,
    /// 0: never.
    pub expires: WallMs,
    /// Not delivered before; 0: at once.
    pub not_before: WallMs,
}

/// What an entry costs, with the room its container keeps.
pub const ENTRY_BYTES: usize = 64;
const _: () = assert!(size_of::<Entry>() * 5 / 4 <= ENTRY_BYTES);
/// An index that has room for no more entries keeps it.
const KEPT_CAPACITY: usize = 4_096;

/// Entries in ascending sequence; numbers may be missing (QoS0 messages take numbers, but no entry).
#[derive(Debug, Default)]
pub struct Index {
    entries: VecDeque<Entry>,
    live: u64,
    live_bytes: u64,
    /// No live entry expires before; 0: none expires. A lower bound, made exact by `expire`.
    earliest_expiry: WallMs,
}

impl Index {
    /// Messages some subscription still wants.
    pub fn live(&self) -> u64 {
        self.live
    }

    /// Their bytes in the log.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Entries held, dead ones included: what memory goes by.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn find(&self, seq: Seq) -> Result<usize, usize> {
        let Some(first) = self.entries.front() else { return Err(0) };
        if seq < first.seq {
            return Err(0);
        }
        // Numbers are dense but for QoS0 messages, so the guess is usually the entry, and never left of it.
        let guess = usize::try_from(seq.0 - first.seq.0).unwrap_or(usize::MAX).min(self.entries.len() - 1);
        if self.entries[guess].seq == seq {
            return Ok(guess);
        }
        if self.entries[guess].seq < seq {
            return Err(guess + 1);
        }
        self.entries.binary_search_by(|e| e.seq.cmp(&seq))
    }

    pub fn get(&self, seq: Seq) -> Option<&Entry> {
        self.find(seq).ok().map(|i| &self.entries[i])
    }

    /// The first live entry at or after `seq`.
    pub fn next_live(&self, seq: Seq) -> Option<&Entry> {
        let start = self.find(seq).unwrap_or_else(|i| i);
        self.entries.range(start..).find(|e| e.refs > 0)
    }

    /// Live entries at or after `seq`.
    pub fn live_from(&self, seq: Seq) -> impl Iterator<Item = &Entry> {
        let start = self.find(seq).unwrap_or_else(|i| i);
        self.entries.range(start..).filter(|e| e.refs > 0)
    }

    /// Adds an entry that somebody wants. Replay may add an older one than the last (a relocated message).
    pub fn insert(&mut self, entry: Entry) {
        assert!(entry.refs > 0);
        if entry.expires.0 != 0 && (self.earliest_expiry.0 == 0 || entry.expires < self.earliest_expiry) {
            self.earliest_expiry = entry.expires;
        }
        self.live += 1;
        self.live_bytes += u64::from(entry.at.len);
        if self.entries.len() == self.entries.capacity() {
            // A quarter more: doubling would let a deep backlog take twice the memory it is counted with.
            self.entries.reserve_exact(self.entries.len() / 4 + 16);
        }
        if self.entries.back().is_none_or(|last| last.seq < entry.seq) {
            self.entries.push_back(entry);
            return;
        }
        match self.find(entry.seq) {
            Ok(i) => {
                let old = self.entries[i];
                assert!(old.refs == 0, "an entry is inserted once");
                self.entries[i] = entry;
            }
            Err(i) => self.entries.insert(i, entry),
        }
    }

    /// The message's record has been copied to `at`. Returns where it was.
    pub fn moved(&mut self, seq: Seq, at: LogRef) -> Option<LogRef> {
        let i = self.find(seq).ok()?;
        let entry = &mut self.entries[i];
        if entry.refs == 0 {
            return None;
        }
        let old = std::mem::replace(&mut entry.at, at);
        self.live_bytes = self.live_bytes - u64::from(old.len) + u64::from(at.len);
        Some(old)
    }

    /// One more subscription wants it.
    pub fn add_ref(&mut self, seq: Seq) {
        if let Ok(i) = self.find(seq) {
            assert!(self.entries[i].refs > 0);
            self.entries[i].refs += 1;
        }
    }

    /// One subscription has finished it; returns its place if it was the last.
    pub fn release(&mut self, seq: Seq) -> Option<LogRef> {
        let i = self.find(seq).ok()?;
        let entry = &mut self.entries[i];
        if entry.refs == 0 {
            return None;
        }
        entry.refs -= 1;
        if entry.refs > 0 {
            return None;
        }
        let at = entry.at;
        self.live -= 1;
        self.live_bytes -= u64::from(at.len);
        while self.entries.front().is_some_and(|e| e.refs == 0) {
            self.entries.pop_front();
        }
        let capacity = self.entries.capacity();
        if capacity > KEPT_CAPACITY && self.entries.len() < capacity / 4 {
            self.entries.shrink_to(capacity / 2);
        }
        Some(at)
    }

    /// No live entry expires before this time.
    pub fn earliest_expiry(&self) -> Option<WallMs> {
        (self.earliest_expiry.0 != 0 && self.live > 0).then_some(self.earliest_expiry)
    }

    /// The live entries that have expired; makes `earliest_expiry` exact for the rest.
    pub fn expired(&mut self, now: WallMs) -> Vec<Seq> {
        let mut due = Vec::new();
        let mut earliest = 0;
        for entry in self.entries.iter().filter(|e| e.refs > 0 && e.expires.0 != 0) {
            if entry.expires <= now {
                due.push(entry.seq);
            } else if earliest == 0 || entry.expires.0 < earliest {
                earliest = entry.expires.0;
            }
        }
        self.earliest_expiry = WallMs(earliest);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Slot;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn entry(seq: u64, refs: u32, expires: u64) -> Entry {
        let at = LogRef { slot: Slot(0), offset: seq as u32 * 100, len: 100 };
        Entry { seq: Seq(seq), at, refs, priority: 0, stamp: 0, expires: WallMs(expires), not_before: WallMs(0) }
    }

    proptest! {
        /// Against a plain map: sparse sequences, several references, releases in any order.
        #[test]
        fn agrees_with_a_plain_map(
            steps in prop::collection::vec((1u64..4, 1u32..3), 1..60),
            releases in prop::collection::vec(0usize..60, 0..120),
        ) {
            let mut index = Index::default();
            let mut plain = BTreeMap::new();
            let mut seq = 0;
            for (step, refs) in steps {
                seq += step;
                index.insert(entry(seq, refs, 0));
                plain.insert(seq, refs);
            }
            let all: Vec<u64> = plain.keys().copied().collect();
            for pick in releases {
                let seq = all[pick % all.len()];
                let gone = index.release(Seq(seq)).is_some();
                let left = plain.get_mut(&seq).map(|r| { *r -= 1; *r });
                if left == Some(0) { plain.remove(&seq); }
                prop_assert_eq!(gone, left == Some(0));
                prop_assert_eq!(index.live(), plain.len() as u64);
                prop_assert_eq!(index.live_bytes(), plain.len() as u64 * 100);
                let listed: Vec<u64> = index.live_from(Seq(0)).map(|e| e.seq.0).collect();
                prop_assert_eq!(&listed, &plain.keys().copied().collect::<Vec<_>>());
                for from in 0..=seq + 1 {
                    let want = plain.range(from..).next().map(|(s, _)| Seq(*s));
                    prop_assert_eq!(index.next_live(Seq(from)).map(|e| e.seq), want);
                }
            }
            if plain.is_empty() { prop_assert!(index.is_empty()); }
        }
    }

    #[test]
    fn memory_follows_the_backlog() {
        let mut index = Index::default();
        for seq in 1..=100_000 {
            index.insert(entry(seq, 1, 0));
            assert!(index.entries.capacity() * size_of::<Entry>() <= index.len() * ENTRY_BYTES + 2048);
        }
        for seq in 1..=99_000 {
            index.release(Seq(seq));
        }
        assert_eq!(index.len(), 1_000);
        assert!(index.entries.capacity() <= 2 * KEPT_CAPACITY, "{}", index.entries.capacity());
    }

    #[test]
    fn expiry_finds_what_is_due_and_the_next_deadline() {
        let mut index = Index::default();
        for (seq, expires) in [(1, 300), (2, 0), (3, 100), (4, 200)] {
            index.insert(entry(seq, 1, expires));
        }
        assert_eq!(index.earliest_expiry(), Some(WallMs(100)));
        assert_eq!(index.expired(WallMs(200)), [Seq(3), Seq(4)]);
        for seq in [3, 4] {
            index.release(Seq(seq));
        }
        assert_eq!(index.earliest_expiry(), Some(WallMs(300)));
    }
}
