//! Slot and checkpoint files in sectors: what reads see, what stays if the power goes now, and what the disk did behind everybody's
//! back.
//!
//! Owns: the bytes, and for every sector that is not what was written to it, what it should be. Never: knows what the bytes mean,
//! or what time it is: `machine` says when a write lands and when a sync has ended.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::rng::Rng;

/// What a disk writes as a whole.
pub const SECTOR: usize = 512;
const BLOCK: usize = 4096;
/// Places tried for a misdirected write, or for rot.
const TRIES: usize = 16;

/// How often what goes wrong, in ten thousandths of the operations it can happen to; 0: never.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// A write of the log or of a checkpoint fails.
    pub write_eio: u32,
    /// A sync fails.
    pub sync_eio: u32,
    /// A read of the backlog fails; for a start: one block cannot be read this time.
    pub read_eio: u32,
    /// A write of the log ends before its end.
    pub short_write: u32,
    /// A slot or a checkpoint finds no space; it stays so for a while.
    pub no_space: u32,
    /// A write of the log is reported as done, synced too, and is not there: all of it, or some sectors.
    pub lost_write: u32,
    /// A write of the log lands somewhere else.
    pub misdirect: u32,
    /// In a second of virtual time: something at rest changes.
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
    /// Writes that landed after their process had died.
    pub late: u64,
    /// Writes of which a power cut, a kill or an error left nothing, or only some sectors.
    pub dropped: u64,
    pub torn: u64,
    /// Files whose length or name was lost with the power.
    pub metadata: u64,
}

impl FaultCounts {
    pub fn total(&self) -> u64 {
        let FaultCounts { write_eio, sync_eio, read_eio, short_write, no_space, lost_write, misdirect, .. } = self;
        let FaultCounts { rot, slow, late, dropped, torn, metadata, .. } = self;
        write_eio
            + sync_eio
            + read_eio
            + short_write
            + no_space
            + lost_write
            + misdirect
            + rot
            + slow
            + late
            + dropped
            + torn
            + metadata
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FileId {
    /// `wal/slot-NNNN.seg`
    Slot(u32),
    /// `ckpt/ckpt-A` (0) and `ckpt-B` (1)
    Checkpoint(u8),
}

/// A write that the disk has been given and has not finished.
#[derive(Clone, Debug)]
pub struct InFlight {
    pub file: FileId,
    pub offset: usize,
    pub bytes: Bytes,
}

type Sector = Box<[u8; SECTOR]>;

/// A write that has landed and that no sync covers.
#[derive(Clone, Debug)]
struct Unsynced {
    serial: u64,
    offset: usize,
    before: Vec<u8>,
    /// Of these sectors what they should have been before; only where that differed, or differs since.
    wrong_before: Vec<(usize, Option<Sector>)>,
}

#[derive(Clone, Debug, Default)]
struct File {
    /// What reads see.
    bytes: Vec<u8>,
    /// Oldest first.
    unsynced: Vec<Unsynced>,
    /// What the name and the length are if the power goes now; `None`: there is no such file.
    durable_len: Option<usize>,
}

/// A file whose directory is not synced since it was deleted.
#[derive(Clone, Debug)]
struct Deleted {
    id: FileId,
    file: File,
    wrong: Vec<(usize, Sector)>,
}

/// What becomes of a write that was not safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Kept,
    Dropped,
    Torn,
}

#[derive(Debug)]
pub struct SimDisk {
    rng: Rng,
    files: BTreeMap<FileId, File>,
    limbo: Vec<Deleted>,
    /// Sectors that are not what was written to them, and what that was.
    wrong: BTreeMap<(FileId, usize), Sector>,
    /// Of a killed process.
    late: Vec<InFlight>,
    serial: u64,
    pub counts: FaultCounts,
}

impl SimDisk {
    pub fn new(seed: u64) -> SimDisk {
        SimDisk {
            rng: Rng::derive(seed, &[0x6469_736b]),
            files: BTreeMap::new(),
            limbo: Vec::new(),
            wrong: BTreeMap::new(),
            late: Vec::new(),
            serial: 0,
            counts: FaultCounts::default(),
        }
    }

    // ---- files --------------------------------------------------------------------------------------------------

    /// A slot of zeros, with its name and its length on the platter.
    pub fn create_slot(&mut self, slot: u32, len: usize) {
        let file = File { bytes: vec![0; len], unsynced: Vec::new(), durable_len: Some(len) };
        let before = self.files.insert(FileId::Slot(slot), file);
        assert!(before.is_none(), "slot {slot} was there already");
    }

    /// Until `sync_dir`, the power may bring it back.
    pub fn delete(&mut self, id: FileId) {
        let file = self.files.remove(&id).unwrap_or_else(|| panic!("{id:?} is not there"));
        let sectors: Vec<usize> = self.wrong_in(id, 0, usize::MAX).collect();
        let wrong = sectors.into_iter().filter_map(|nth| Some((nth, self.wrong.remove(&(id, nth))?))).collect();
        self.limbo.push(Deleted { id, file, wrong });
    }

    pub fn sync_dir(&mut self) {
        self.limbo.clear();
    }

    /// Space for a file of at least `len` bytes. Returns whether any was needed.
    pub fn allocate(&mut self, id: FileId, len: usize) {
        let file = self.files.entry(id).or_default();
        if file.bytes.len() < len {
            file.bytes.resize(len, 0);
        }
    }

    pub fn len(&self, id: FileId) -> Option<usize> {
        self.files.get(&id).map(|file| file.bytes.len())
    }

    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.files.keys().filter_map(|id| if let FileId::Slot(slot) = id { Some(*slot) } else { None })
    }

    /// The whole file.
    pub fn file(&self, id: FileId) -> Option<&[u8]> {
        self.files.get(&id).map(|file| &file.bytes[..])
    }

    // ---- writes -------------------------------------------------------------------------------------------------

    /// A write lands. `durable`: it went past every cache.
    pub fn land(&mut self, write: &InFlight, durable: bool) {
        self.land_where(write, durable, |_| true);
    }

    /// Some sectors of a write land, or none: it failed, or its process died.
    pub fn land_some(&mut self, write: &InFlight) {
        match self.fate() {
            Fate::Kept => self.land(write, false),
            Fate::Dropped => self.counts.dropped += 1,
            Fate::Torn => {
                self.counts.torn += 1;
                let mask = self.mask(write.bytes.len().div_ceil(SECTOR));
                self.land_where(write, false, |nth| mask[nth]);
            }
        }
    }

    fn land_where(&mut self, write: &InFlight, durable: bool, lands: impl Fn(usize) -> bool) {
        let Some(file) = self.files.get_mut(&write.file) else { return };
        let (from, to) = (write.offset, write.offset + write.bytes.len());
        assert!(from.is_multiple_of(SECTOR) && to <= file.bytes.len(), "{:?} {from}..{to}", write.file);
        let mut unsynced = Unsynced { serial: self.serial, offset: from, before: Vec::new(), wrong_before: Vec::new() };
        if !durable {
            self.serial += 1;
            unsynced.before.extend_from_slice(&file.bytes[from..to]);
        }
        for (nth, sector) in write.bytes.chunks(SECTOR).enumerate().filter(|(nth, _)| lands(*nth)) {
            let at = from + nth * SECTOR;
            file.bytes[at..at + sector.len()].copy_from_slice(sector);
            if !self.wrong.is_empty() {
                let wrong = self.wrong.remove(&(write.file, at / SECTOR));
                unsynced.wrong_before.extend(wrong.map(|wrong| (at / SECTOR, Some(wrong))));
            }
        }
        if !durable {
            file.unsynced.push(unsynced);
        }
    }

    /// A write is reported as done, and is not there: nothing of it, or some sectors.
    pub fn lose(&mut self, write: &InFlight, durable: bool) {
        self.counts.lost_write += 1;
        let sectors = write.bytes.len().div_ceil(SECTOR);
        let mask = if self.rng.percent(50) { vec![false; sectors] } else { self.mask(sectors) };
        self.land_where(write, durable, |nth| mask[nth]);
        self.mark_missing(write, durable, |nth| !mask[nth]);
    }

    /// The sectors of `write` that should hold it and do not.
    fn mark_missing(&mut self, write: &InFlight, durable: bool, missing: impl Fn(usize) -> bool) {
        let Some(file) = self.files.get_mut(&write.file) else { return };
        for (nth, sector) in write.bytes.chunks(SECTOR).enumerate().filter(|(nth, _)| missing(*nth)) {
            let at = write.offset + nth * SECTOR;
            let place = (write.file, at / SECTOR);
            let before = match file.bytes[at..at + SECTOR] == *sector {
                true => self.wrong.remove(&place),
                false => self.wrong.insert(place, boxed(sector)),
            };
            if !durable && let Some(unsynced) = file.unsynced.last_mut() {
                unsynced.wrong_before.push((at / SECTOR, before));
            }
        }
    }

    /// A write goes to another place, where it counts as safe. `false`: no place was found, nothing has happened.
    pub fn misdirect(&mut self, write: &InFlight, durable: bool) -> bool {
        let len = write.bytes.len();
        for _ in 0..TRIES {
            let Some(id) = self.any_file() else { return false };
            let room = self.files[&id].bytes.len().saturating_sub(len) / BLOCK;
            let at = self.rng.between(0, room as u64) as usize * BLOCK;
            let fits = at + len <= self.files[&id].bytes.len();
            if !fits || (id, at) == (write.file, write.offset) || self.is_unsynced(id, at, at + len) {
                continue;
            }
            let overlaps = id == write.file && at < write.offset + len && write.offset < at + len;
            if overlaps {
                continue;
            }
            self.counts.misdirect += 1;
            self.land_where(write, durable, |_| false);
            self.mark_missing(write, durable, |_| true);
            for (nth, sector) in write.bytes.chunks(SECTOR).enumerate() {
                self.spoil(id, at / SECTOR + nth, sector);
            }
            return true;
        }
        false
    }

    /// Something at rest changes: a bit, a sector, or a block. `false`: nothing was found to change.
    pub fn rot(&mut self) -> bool {
        for _ in 0..TRIES {
            let Some(id) = self.any_file() else { return false };
            let sectors = self.files[&id].bytes.len() / SECTOR;
            let nth = self.rng.between(0, sectors as u64 - 1) as usize;
            let at = nth * SECTOR;
            let mut sector = self.files[&id].bytes[at..at + SECTOR].to_vec();
            if sector.iter().all(|byte| *byte == 0) || self.is_unsynced(id, at, at + SECTOR) {
                continue;
            }
            match self.rng.between(0, 3) {
                0 => sector.fill(0),
                1 => sector.iter_mut().for_each(|byte| *byte = self.rng.draw() as u8),
                2 => {
                    let block = nth / (BLOCK / SECTOR) * (BLOCK / SECTOR);
                    let end = (block + BLOCK / SECTOR).min(sectors);
                    if self.is_unsynced(id, block * SECTOR, end * SECTOR) {
                        continue;
                    }
                    (block..end).for_each(|nth| self.spoil(id, nth, &[0; SECTOR]));
                    self.counts.rot += 1;
                    return true;
                }
                _ => {
                    let bit = self.rng.between(0, SECTOR as u64 * 8 - 1) as usize;
                    sector[bit / 8] ^= 1 << (bit % 8);
                }
            }
            self.spoil(id, nth, &sector);
            self.counts.rot += 1;
            return true;
        }
        false
    }

    /// A sector holds something else from now on.
    fn spoil(&mut self, id: FileId, nth: usize, with: &[u8]) {
        let Some(file) = self.files.get_mut(&id) else { return };
        let now = &mut file.bytes[nth * SECTOR..(nth + 1) * SECTOR];
        let right = self.wrong.entry((id, nth)).or_insert_with(|| boxed(now));
        now.copy_from_slice(with);
        if right[..] == *with {
            self.wrong.remove(&(id, nth));
        }
    }

    fn any_file(&mut self) -> Option<FileId> {
        let some: Vec<FileId> = self.files.iter().filter(|(_, f)| f.bytes.len() >= BLOCK).map(|(id, _)| *id).collect();
        (!some.is_empty()).then(|| *self.rng.pick(&some))
    }

    fn is_unsynced(&self, id: FileId, from: usize, to: usize) -> bool {
        let overlaps = |write: &Unsynced| write.offset < to && from < write.offset + write.before.len();
        self.files[&id].unsynced.iter().any(overlaps)
    }

    // ---- syncs --------------------------------------------------------------------------------------------------

    /// A sync of this file begins: it will cover what has landed.
    pub fn begin_sync(&self) -> u64 {
        self.serial
    }

    pub fn end_sync(&mut self, id: FileId, began: u64) {
        if let Some(file) = self.files.get_mut(&id) {
            file.unsynced.retain(|write| write.serial >= began);
            file.durable_len = Some(file.bytes.len());
        }
    }

    /// A sync fails: what it should have covered may be gone.
    pub fn fail_sync(&mut self, id: FileId) {
        if self.rng.percent(50) {
            self.lose_unsynced(id);
        }
    }

    /// Everything that has landed is safe. What a start does before it reads.
    pub fn sync_all(&mut self) {
        for file in self.files.values_mut() {
            file.unsynced.clear();
            file.durable_len = Some(file.bytes.len());
        }
        self.limbo.clear();
    }

    // ---- ends ---------------------------------------------------------------------------------------------------

    /// The process dies with these writes under way. `late`: in ten thousand, how many of them land later.
    pub fn kill(&mut self, in_flight: Vec<InFlight>, late: u32) {
        for write in in_flight {
            if happens(&mut self.rng, late) {
                self.late.push(write);
            } else {
                self.land_some(&write);
            }
        }
    }

    pub fn has_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// What a dead process had under way lands.
    pub fn land_late(&mut self) {
        for write in std::mem::take(&mut self.late) {
            self.counts.late += 1;
            self.land(&write, false);
        }
    }

    /// The power goes, with these writes under way. What stays, stays for good.
    pub fn power_cut(&mut self, in_flight: Vec<InFlight>) {
        let late = std::mem::take(&mut self.late);
        let files: Vec<FileId> = self.files.keys().copied().collect();
        for id in files {
            self.lose_unsynced(id);
        }
        for write in in_flight.into_iter().chain(late) {
            self.land_some(&write);
        }
        let files: Vec<FileId> = self.files.keys().copied().collect();
        for id in files {
            self.lose_metadata(id);
        }
        for Deleted { id, file, wrong } in std::mem::take(&mut self.limbo) {
            if self.rng.percent(50) && !self.files.contains_key(&id) {
                self.counts.metadata += 1;
                self.wrong.extend(wrong.into_iter().map(|(nth, right)| ((id, nth), right)));
                self.files.insert(id, file);
            }
        }
        self.sync_all();
    }

    /// Any sectors of the writes that no sync covers go back to what they were.
    fn lose_unsynced(&mut self, id: FileId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        let mut kept_since: BTreeSet<usize> = BTreeSet::new();
        for write in std::mem::take(&mut file.unsynced).into_iter().rev() {
            let sectors = write.before.len() / SECTOR;
            let fate = fate(&mut self.rng);
            match fate {
                Fate::Kept => {}
                Fate::Dropped => self.counts.dropped += 1,
                Fate::Torn => self.counts.torn += 1,
            }
            for nth in 0..sectors {
                let at = write.offset + nth * SECTOR;
                let kept = fate == Fate::Kept || fate == Fate::Torn && self.rng.percent(50);
                if kept {
                    kept_since.insert(at / SECTOR);
                } else if !kept_since.contains(&(at / SECTOR)) {
                    file.bytes[at..at + SECTOR].copy_from_slice(&write.before[nth * SECTOR..(nth + 1) * SECTOR]);
                    self.wrong.remove(&(id, at / SECTOR));
                    let before = write.wrong_before.iter().find(|(place, _)| *place == at / SECTOR);
                    if let Some((place, Some(right))) = before {
                        self.wrong.insert((id, *place), right.clone());
                    }
                }
            }
        }
    }

    /// A name or a length that was not synced may be lost.
    fn lose_metadata(&mut self, id: FileId) {
        let file = &self.files[&id];
        if file.durable_len == Some(file.bytes.len()) || self.rng.percent(50) {
            return;
        }
        self.counts.metadata += 1;
        let wrong: Vec<usize> = match file.durable_len {
            None => {
                self.files.remove(&id);
                self.wrong_in(id, 0, usize::MAX).collect()
            }
            Some(len) => {
                self.files.get_mut(&id).expect("just seen").bytes.truncate(len);
                self.wrong_in(id, len / SECTOR, usize::MAX).collect()
            }
        };
        wrong.into_iter().for_each(|nth| drop(self.wrong.remove(&(id, nth))));
    }

    fn fate(&mut self) -> Fate {
        fate(&mut self.rng)
    }

    /// Which sectors are there: any of them.
    fn mask(&mut self, sectors: usize) -> Vec<bool> {
        (0..sectors).map(|_| self.rng.percent(50)).collect()
    }

    // ---- what should be there -----------------------------------------------------------------------------------

    pub fn is_damaged(&self) -> bool {
        !self.wrong.is_empty()
    }

    /// Sectors that are not what was written to them, by place.
    pub fn damaged(&self) -> impl Iterator<Item = (FileId, usize)> + '_ {
        self.wrong.keys().copied()
    }

    /// Whether every sector of this range is what was written to it.
    pub fn is_sound(&self, id: FileId, from: usize, to: usize) -> bool {
        self.wrong_in(id, from / SECTOR, to.div_ceil(SECTOR)).next().is_none()
    }

    fn wrong_in(&self, id: FileId, from: usize, to: usize) -> impl Iterator<Item = usize> + '_ {
        self.wrong.range((id, from)..(id, to)).map(|((_, nth), _)| *nth)
    }

    /// Every sector becomes what was written to it. Returns those that were not.
    pub fn repair(&mut self) -> Vec<(FileId, usize)> {
        let wrong = std::mem::take(&mut self.wrong);
        for ((id, nth), right) in &wrong {
            if let Some(file) = self.files.get_mut(id) {
                file.bytes[nth * SECTOR..(nth + 1) * SECTOR].copy_from_slice(&right[..]);
            }
        }
        wrong.into_keys().collect()
    }

    /// What is there now is what should be there from now on.
    pub fn accept(&mut self) {
        self.wrong.clear();
    }

    /// All files as they should be.
    pub fn undamaged(&self) -> BTreeMap<FileId, Vec<u8>> {
        let mut files: BTreeMap<_, _> = self.files.iter().map(|(id, file)| (*id, file.bytes.clone())).collect();
        for ((id, nth), right) in &self.wrong {
            if let Some(bytes) = files.get_mut(id) {
                bytes[nth * SECTOR..(nth + 1) * SECTOR].copy_from_slice(&right[..]);
            }
        }
        files
    }
}

fn boxed(sector: &[u8]) -> Sector {
    let mut copy = Box::new([0; SECTOR]);
    copy.copy_from_slice(sector);
    copy
}

/// In ten thousand cases, `rate` times.
pub fn happens(rng: &mut Rng, rate: u32) -> bool {
    rate > 0 && rng.between(0, 9_999) < u64::from(rate)
}

fn fate(rng: &mut Rng) -> Fate {
    match rng.between(0, 9) {
        0..4 => Fate::Torn,
        4..7 => Fate::Dropped,
        _ => Fate::Kept,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: FileId = FileId::Slot(0);
    const LEN: usize = 16 * BLOCK;

    fn write(offset: usize, byte: u8, blocks: usize) -> InFlight {
        InFlight { file: A, offset, bytes: Bytes::from(vec![byte; blocks * BLOCK]) }
    }

    fn disk(seed: u64) -> SimDisk {
        let mut disk = SimDisk::new(seed);
        disk.create_slot(0, LEN);
        disk.create_slot(1, LEN);
        disk
    }

    fn sync(disk: &mut SimDisk) {
        let began = disk.begin_sync();
        disk.end_sync(A, began);
    }

    #[test]
    fn a_power_cut_loses_nothing_that_was_synced() {
        for seed in 0..100 {
            let mut disk = disk(seed);
            disk.land(&write(0, 1, 4), false);
            sync(&mut disk);
            disk.land(&write(0, 2, 1), true);
            disk.power_cut(Vec::new());
            let bytes = disk.file(A).unwrap();
            assert!(bytes[..BLOCK].iter().all(|b| *b == 2) && bytes[BLOCK..4 * BLOCK].iter().all(|b| *b == 1));
            assert!(!disk.is_damaged());
        }
    }

    #[test]
    fn a_power_cut_keeps_drops_and_tears_what_was_not_synced() {
        let (mut whole, mut none, mut torn, mut second_alone) = (0, 0, 0, 0);
        for seed in 0..200 {
            let mut disk = disk(seed);
            disk.land(&write(0, 1, 2), false);
            let began = disk.begin_sync();
            disk.land(&write(0, 2, 2), false);
            disk.land(&write(4 * BLOCK, 3, 1), false);
            disk.end_sync(A, began);
            disk.power_cut(vec![write(8 * BLOCK, 4, 1)]);
            let bytes = disk.file(A).unwrap();
            // What the sync covered is there, or what was written over it; per sector.
            assert!(bytes[..2 * BLOCK].chunks(SECTOR).all(|s| s == [1; SECTOR] || s == [2; SECTOR]));
            let twos = bytes[..2 * BLOCK].iter().filter(|b| **b == 2).count();
            match twos {
                0 => none += 1,
                8192 => whole += 1,
                _ => torn += 1,
            }
            second_alone += u32::from(twos == 0 && bytes[4 * BLOCK] == 3);
            // And from now on it stays.
            let before = bytes.to_vec();
            disk.power_cut(Vec::new());
            assert_eq!(disk.file(A).unwrap(), before);
        }
        assert!([whole, none, torn, second_alone].iter().all(|n| *n > 5), "{whole} {none} {torn} {second_alone}");
    }

    #[test]
    fn a_kill_keeps_what_had_landed_and_late_writes_land_later() {
        let mut disk = disk(3);
        disk.land(&write(0, 1, 1), false);
        disk.kill(vec![write(BLOCK, 2, 1)], 10_000);
        assert!(disk.has_late());
        assert_eq!((disk.file(A).unwrap()[0], disk.file(A).unwrap()[BLOCK]), (1, 0));
        disk.land_late();
        assert_eq!((disk.file(A).unwrap()[BLOCK], disk.counts.late), (2, 1));
        assert!(!disk.has_late());
    }

    #[test]
    fn a_failed_sync_may_cost_what_it_should_have_covered() {
        let mut lost = 0;
        for seed in 0..50 {
            let mut disk = disk(seed);
            disk.land(&write(0, 1, 1), false);
            disk.fail_sync(A);
            lost += u32::from(disk.file(A).unwrap()[..BLOCK].contains(&0));
        }
        assert!((5..45).contains(&lost), "{lost}");
    }

    #[test]
    fn what_was_lost_misdirected_or_rotten_is_known_and_repaired() {
        for seed in 0..300 {
            let mut disk = disk(seed);
            disk.land(&write(0, 1, 8), false);
            sync(&mut disk);
            let durable = seed % 2 == 0;
            match seed % 3 {
                0 => disk.lose(&write(BLOCK, 2, 2), durable),
                1 => assert!(disk.misdirect(&write(BLOCK, 2, 2), durable)),
                _ => {
                    disk.land(&write(BLOCK, 2, 2), durable);
                    sync(&mut disk);
                    assert!((0..20).any(|_| disk.rot()));
                }
            }
            sync(&mut disk);
            assert!(disk.is_damaged());
            let mut right = vec![1; 8 * BLOCK];
            right.resize(LEN, 0);
            right[BLOCK..3 * BLOCK].fill(2);
            assert_eq!(disk.undamaged()[&A], right, "seed {seed}");
            disk.power_cut(Vec::new());
            assert_ne!((disk.file(A).unwrap(), disk.file(FileId::Slot(1)).unwrap()), (&right[..], &[0; LEN][..]));
            assert!(!disk.repair().is_empty() && !disk.is_damaged());
            assert_eq!((disk.file(A).unwrap(), disk.file(FileId::Slot(1)).unwrap()), (&right[..], &[0; LEN][..]));
        }
    }

    #[test]
    fn a_lost_write_that_was_not_synced_is_no_damage_once_the_power_has_taken_it() {
        for seed in 0..100 {
            let mut disk = disk(seed);
            disk.lose(&write(0, 7, 1), false);
            disk.power_cut(Vec::new());
            // Sector by sector: old and right, or old and known to be wrong, or new.
            for (nth, sector) in disk.file(A).unwrap()[..BLOCK].chunks(SECTOR).enumerate() {
                let wrong = !disk.is_sound(A, nth * SECTOR, (nth + 1) * SECTOR);
                assert!(sector[0] == 0 || sector[0] == 7 && !wrong);
            }
            disk.repair();
            assert!(disk.file(A).unwrap()[..BLOCK].iter().all(|b| *b == 0 || *b == 7));
        }
    }

    #[test]
    fn a_proper_write_over_damage_ends_it() {
        let mut disk = disk(1);
        disk.lose(&write(0, 1, 1), true);
        disk.land(&write(0, 2, 1), true);
        assert!(!disk.is_damaged());
    }

    #[test]
    fn names_and_lengths_that_were_not_synced_may_be_lost() {
        let id = FileId::Checkpoint(0);
        let (mut there, mut gone, mut short, mut back) = (0, 0, 0, 0);
        for seed in 0..100 {
            let mut disk = disk(seed);
            disk.allocate(id, BLOCK);
            disk.land(&InFlight { file: id, offset: 0, bytes: Bytes::from(vec![1; BLOCK]) }, false);
            if seed % 2 == 0 {
                let began = disk.begin_sync();
                disk.end_sync(id, began);
                disk.allocate(id, 2 * BLOCK);
            }
            disk.delete(FileId::Slot(1));
            disk.power_cut(Vec::new());
            match disk.len(id) {
                None => gone += 1,
                Some(len) if seed % 2 == 0 && len == BLOCK => short += 1,
                Some(_) => there += 1,
            }
            assert!(seed % 2 == 1 || disk.file(id).unwrap()[0] == 1);
            back += usize::from(disk.slots().count() == 2);
        }
        assert!([there, gone, short, back].iter().all(|n| *n > 5), "{there} {gone} {short} {back}");
        let mut disk = disk(1);
        disk.delete(FileId::Slot(1));
        disk.sync_dir();
        disk.power_cut(Vec::new());
        assert_eq!(disk.slots().count(), 1);
    }
}
