//! Log bytes that are still in memory: the batches written last, and what was read back for those far behind.
//!
//! Owns: a budget. The tail is kept in the order of the log and forgotten from its old end; chunks read back are forgotten
//! least recently inserted first. Never: reads anything.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::planted::planted;
use crate::types::{LogRef, Slot};

/// Where cached bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// They have not left memory since they were written.
    Memory,
    /// They were read back: their checksums have to be looked at.
    Disk,
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    origin: Origin,
}

#[derive(Debug)]
pub struct Cache {
    /// (slot, offset) -> bytes from there.
    pieces: BTreeMap<(Slot, u32), Piece>,
    tail: VecDeque<(Slot, u32)>,
    tail_bytes: usize,
    read: VecDeque<(Slot, u32)>,
    read_bytes: usize,
    tail_max: usize,
    read_max: usize,
    pub hits: u64,
    pub misses: u64,
}

impl Cache {
    /// `budget`: bytes; a quarter of it goes to what is read back.
    pub fn new(budget: usize) -> Cache {
        Cache {
            pieces: BTreeMap::new(),
            tail: VecDeque::new(),
            tail_bytes: 0,
            read: VecDeque::new(),
            read_bytes: 0,
            tail_max: budget - budget / 4,
            read_max: budget / 4,
            hits: 0,
            misses: 0,
        }
    }

    pub fn bytes(&self) -> usize {
        self.tail_bytes + self.read_bytes
    }

    /// A batch that is being written at `offset` of `slot`.
    pub fn add_tail(&mut self, slot: Slot, offset: u32, bytes: Bytes) {
        if offset == 0 && !planted!(CacheOutlivesSlot) {
            self.forget(slot); // the slot begins a new life; what it held before is nobody's
        }
        self.tail_bytes += bytes.len();
        self.tail.push_back((slot, offset));
        self.pieces.insert((slot, offset), Piece { bytes, origin: Origin::Memory });
        while self.tail_bytes > self.tail_max && self.tail.len() > 1 {
            let Some(key) = self.tail.pop_front() else { break };
            self.tail_bytes -= self.pieces.remove(&key).map_or(0, |p| p.bytes.len());
        }
    }

    /// What a backlog read returned.
    pub fn add_read(&mut self, slot: Slot, offset: u32, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        match self.pieces.get(&(slot, offset)) {
            // Read again because a record that begins in this piece goes on behind it.
            Some(piece) if piece.origin == Origin::Disk && piece.bytes.len() < bytes.len() => {
                self.drop_read(slot, offset)
            }
            Some(_) => return,
            None => {}
        }
        self.read_bytes += bytes.len();
        self.read.push_back((slot, offset));
        self.pieces.insert((slot, offset), Piece { bytes, origin: Origin::Disk });
        while self.read_bytes > self.read_max && self.read.len() > 1 {
            let Some(key) = self.read.pop_front() else { break };
            self.read_bytes -= self.pieces.remove(&key).map_or(0, |p| p.bytes.len());
        }
    }

    fn drop_read(&mut self, slot: Slot, offset: u32) {
        if let Some(i) = self.read.iter().position(|key| *key == (slot, offset)) {
            self.read.remove(i);
            self.read_bytes -= self.pieces.remove(&(slot, offset)).map_or(0, |p| p.bytes.len());
        }
    }

    fn forget(&mut self, slot: Slot) {
        let old: Vec<_> = self.pieces.range((slot, 0)..=(slot, u32::MAX)).map(|(key, _)| *key).collect();
        for key in old {
            let len = self.pieces.remove(&key).map_or(0, |p| p.bytes.len());
            if let Some(i) = self.read.iter().position(|k| *k == key) {
                self.read.remove(i);
                self.read_bytes -= len;
            } else if let Some(i) = self.tail.iter().position(|k| *k == key) {
                self.tail.remove(i);
                self.tail_bytes -= len;
            }
        }
    }

    /// The whole record at `at`, if it is in memory, and whether it has been on disk in between.
    pub fn get(&mut self, at: LogRef) -> Option<(Bytes, Origin)> {
        // A chunk read back may start before the batch that the tail holds, or end inside the record: look at several.
        for ((_, offset), piece) in self.pieces.range((at.slot, 0)..=(at.slot, at.offset)).rev().take(3) {
            let start = (at.offset - offset) as usize;
            let end = start + at.len as usize;
            if end <= piece.bytes.len() {
                self.hits += 1;
                return Some((piece.bytes.slice(start..end), piece.origin));
            }
        }
        self.misses += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(slot: u32, offset: u32, len: u32) -> LogRef {
        LogRef { slot: Slot(slot), offset, len }
    }

    #[test]
    fn the_tail_is_forgotten_from_its_old_end() {
        let mut cache = Cache::new(4000); // 3000 for the tail
        for i in 0..4u32 {
            cache.add_tail(Slot(1), i * 1000, Bytes::from(vec![i as u8; 1000]));
        }
        assert!(cache.get(at(1, 10, 20)).is_none());
        assert_eq!(cache.get(at(1, 1990, 10)).unwrap(), (Bytes::from(vec![1u8; 10]), Origin::Memory));
        assert!(cache.get(at(1, 1990, 11)).is_none(), "not past the end of a piece");
        assert_eq!(cache.bytes(), 3000);
    }

    #[test]
    fn a_longer_read_replaces_a_shorter_one() {
        let mut cache = Cache::new(40_000);
        cache.add_read(Slot(1), 4096, Bytes::from(vec![7; 100]));
        assert!(cache.get(at(1, 4146, 100)).is_none(), "it goes on behind the piece");
        cache.add_read(Slot(1), 4096, Bytes::from(vec![7; 300]));
        assert_eq!(cache.get(at(1, 4146, 100)), Some((Bytes::from(vec![7; 100]), Origin::Disk)));
        assert_eq!(cache.bytes(), 300);
    }

    #[test]
    fn a_recycled_slot_is_not_taken_for_its_old_self() {
        let mut cache = Cache::new(40_000);
        cache.add_tail(Slot(1), 4096, Bytes::from_static(b"old"));
        cache.add_read(Slot(1), 8192, Bytes::from_static(b"older"));
        cache.add_tail(Slot(1), 0, Bytes::from_static(b"new"));
        assert!(cache.get(at(1, 4096, 3)).is_none());
        assert!(cache.get(at(1, 8192, 3)).is_none());
        assert_eq!(cache.bytes(), 3);
    }
}
