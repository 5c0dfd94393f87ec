//! The log of a disk's writes, and the disks a power cut could have left.
//!
//! Owns: the log's layout (that of dm-log-writes, as `blklogwrites` of QEMU writes it), and what a cut does. Never: mounts.
//!
//! Sector 0: u64 magic, u64 version, u64 entries, u32 sector size, little-endian; the count is current at any time. Then per
//! entry one sector: u64 sector, u64 sectors, u64 flags, u64 0; then its data. A flush covers all entries before it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::rng::Rng;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// What tears.
const SECTOR: usize = 512;
/// Runs of zeros this long are left out of an image.
const CHUNK: usize = 64 * 1024;

/// Of a hundred writes that no flush covers.
const DROPPED: u64 = 40;
const TORN: u64 = 20;

/// The number of entries, at any time.
pub struct Counter(File);

impl Counter {
    pub fn open(path: &Path) -> io::Result<Counter> {
        File::open(path).map(Counter)
    }

    pub fn count(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, 16)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where on the disk, in bytes.
    at: u64,
    len: usize,
    flags: u64,
    /// Where in the log.
    data: u64,
}

/// A log that is complete.
pub struct Writes {
    file: File,
    entries: Vec<Entry>,
}

/// How the writes that no flush covered fared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fate {
    pub kept: u64,
    pub dropped: u64,
    pub torn: u64,
}

impl Fate {
    pub fn add(&mut self, other: Fate) {
        self.kept += other.kept;
        self.dropped += other.dropped;
        self.torn += other.torn;
    }
}

impl Writes {
    pub fn read(path: &Path) -> io::Result<Writes> {
        let file = File::open(path)?;
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0)?;
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
        if word(&head, 0) != MAGIC || word(&head, 8) != 1 {
            return Err(bad("not a log of writes"));
        }
        let sector = u64::from(u32::from_le_bytes([head[24], head[25], head[26], head[27]]));
        let mut entries = Vec::new();
        let mut at = sector;
        for _ in 0..word(&head, 16) {
            let mut entry = [0; 32];
            file.read_exact_at(&mut entry, at)?;
            let (first, sectors, flags) = (word(&entry, 0), word(&entry, 8), word(&entry, 16));
            let discard = flags & DISCARD != 0;
            let len = usize::try_from(sectors * sector).map_err(|_| bad("an entry without end"))?;
            entries.push(Entry { at: first * sector, len, flags, data: at + sector });
            at += sector + if discard { 0 } else { len as u64 };
        }
        Ok(Writes { file, entries })
    }

    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of flushes among the entries from `first` on.
    pub fn flushes_from(&self, first: u64) -> u64 {
        self.entries.iter().skip(first as usize).filter(|entry| entry.flags & FLUSH != 0).count() as u64
    }

    /// The last flush that was complete when `at` entries were there: entries below this number are on the disk.
    pub fn flushed(&self, at: u64) -> u64 {
        let before = self.entries[..at as usize].iter().rposition(|entry| entry.flags & FLUSH != 0);
        before.map_or(0, |flush| flush as u64)
    }

    /// The place just before the first flush at or after `at`: where most is not covered.
    pub fn before_flush(&self, at: u64) -> u64 {
        let next = self.entries[at as usize..].iter().position(|entry| entry.flags & FLUSH != 0);
        next.map_or(self.len(), |ahead| at + ahead as u64)
    }

    fn data(&self, entry: &Entry) -> io::Result<Vec<u8>> {
        let mut data = vec![0; entry.len];
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(&mut data, entry.data)?;
        }
        Ok(data)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// A disk's contents as writes arrive: cuts must be asked for in ascending order.
pub struct Image {
    bytes: Vec<u8>,
    /// Chunks that may hold anything but zeros.
    used: Vec<bool>,
    applied: u64,
}

impl Image {
    /// The disk before its first write.
    pub fn read(path: &Path) -> io::Result<Image> {
        let bytes = std::fs::read(path)?;
        let used = bytes.chunks(CHUNK).map(|chunk| chunk.iter().any(|byte| *byte != 0)).collect();
        Ok(Image { bytes, used, applied: 0 })
    }

    /// Takes over all writes below `upto`.
    pub fn advance(&mut self, writes: &Writes, upto: u64) -> io::Result<()> {
        assert!(upto >= self.applied, "cut at {upto} after {}", self.applied);
        for entry in &writes.entries[self.applied as usize..upto as usize] {
            // What a discard leaves is undefined; a file behind a disk keeps it.
            if entry.flags & DISCARD != 0 || entry.len == 0 {
                continue;
            }
            let at = entry.at as usize;
            let end = at + entry.len;
            let place = self.bytes.get_mut(at..end).ok_or_else(|| io::Error::other("a write beyond the disk's end"))?;
            place.copy_from_slice(&writes.data(entry)?);
            self.used[at / CHUNK..end.div_ceil(CHUNK)].fill(true);
        }
        self.applied = upto;
        Ok(())
    }

    /// Writes to `path` what a power cut after `at` writes could have left: what the last flush covered, and of the rest
    /// what chance spares. `spare`: false drops it all.
    pub fn cut(&mut self, writes: &Writes, at: u64, spare: bool, rng: &mut Rng, path: &Path) -> io::Result<Fate> {
        let flushed = writes.flushed(at);
        self.advance(writes, flushed)?;
        let file = File::create(path)?;
        file.set_len(self.bytes.len() as u64)?;
        let mut first = 0;
        while let Some(begin) = self.used[first..].iter().position(|used| *used).map(|ahead| first + ahead) {
            let end = self.used[begin..].iter().position(|used| !used).map_or(self.used.len(), |ahead| begin + ahead);
            let bytes = &self.bytes[begin * CHUNK..(end * CHUNK).min(self.bytes.len())];
            file.write_all_at(bytes, (begin * CHUNK) as u64)?;
            first = end;
        }
        let mut fate = Fate::default();
        for entry in &writes.entries[flushed as usize..at as usize] {
            if entry.flags & DISCARD != 0 || entry.len == 0 {
                continue;
            }
            let data = writes.data(entry)?;
            let chance = rng.between(0, 99);
            if entry.flags & FUA != 0 || spare && chance >= DROPPED + TORN {
                file.write_all_at(&data, entry.at)?;
                fate.kept += 1;
            } else if spare && chance >= DROPPED && entry.len > SECTOR {
                tear(&file, entry.at, &data, rng)?;
                fate.torn += 1;
            } else {
                fate.dropped += 1;
            }
        }
        Ok(fate)
    }

    /// Whether the disk now holds what `path` does. `Err`: where not.
    pub fn equals(&self, path: &Path) -> io::Result<Result<(), usize>> {
        let bytes = std::fs::read(path)?;
        let differs = self.bytes.iter().zip(&bytes).position(|(ours, theirs)| ours != theirs);
        Ok(match differs {
            None if bytes.len() == self.bytes.len() => Ok(()),
            at => Err(at.unwrap_or(bytes.len().min(self.bytes.len()))),
        })
    }
}

/// Some sectors of a write: a beginning, or any.
fn tear(file: &File, at: u64, data: &[u8], rng: &mut Rng) -> io::Result<()> {
    let sectors = data.len() / SECTOR;
    let beginning = rng.percent(50).then(|| rng.between(1, sectors as u64 - 1) as usize);
    for (number, sector) in data.chunks(SECTOR).enumerate() {
        let kept = beginning.map_or_else(|| rng.percent(50), |most| number < most);
        if kept {
            file.write_all_at(sector, at + (number * SECTOR) as u64)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: usize = 4 * CHUNK;

    /// A log of these entries (place in 4 KiB blocks, blocks, flags), each of whose data is its number plus one.
    fn log(name: &str, entries: &[(u64, usize, u64)]) -> io::Result<(Writes, std::path::PathBuf)> {
        let mut bytes = vec![0; SECTOR];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 1;
        bytes[16..24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        bytes[24..28].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        for (number, (block, blocks, flags)) in entries.iter().enumerate() {
            let mut head = [0; SECTOR];
            head[..8].copy_from_slice(&(block * 8).to_le_bytes());
            head[8..16].copy_from_slice(&(*blocks as u64 * 8).to_le_bytes());
            head[16..24].copy_from_slice(&flags.to_le_bytes());
            bytes.extend_from_slice(&head);
            if flags & DISCARD == 0 {
                bytes.extend(std::iter::repeat_n(number as u8 + 1, blocks * 4096));
            }
        }
        let path = std::env::temp_dir().join(format!("chaos-writes-{name}-{}", std::process::id()));
        std::fs::write(&path, bytes)?;
        assert_eq!(Counter::open(&path)?.count()?, entries.len() as u64);
        Ok((Writes::read(&path)?, path))
    }

    fn empty() -> Image {
        Image { bytes: vec![0; DISK], used: vec![false; DISK / CHUNK], applied: 0 }
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_may_drop_and_tear_the_rest() -> io::Result<()> {
        let entries =
            [(0, 1, 0), (20, 2, 0), (0, 0, FLUSH), (5, 0, DISCARD), (1, 1, 0), (2, 2, 0), (3, 1, FUA), (0, 0, FLUSH)];
        let (writes, path) = log("cut", &entries)?;
        assert_eq!((writes.flushed(2), writes.flushed(3), writes.flushed(7), writes.flushed(8)), (0, 2, 2, 7));
        assert_eq!((writes.before_flush(0), writes.before_flush(3), writes.before_flush(8)), (2, 7, 8));
        assert_eq!(writes.flushes_from(3), 1);
        let image = path.with_extension("img");
        let (mut total, mut torn_inside) = (Fate::default(), false);
        for seed in 0..200 {
            let fate = empty().cut(&writes, 7, true, &mut Rng::new(seed), &image)?;
            total.add(fate);
            let disk = std::fs::read(&image)?;
            assert_eq!(disk.len(), DISK);
            assert!(disk[..4096].iter().all(|b| *b == 1) && disk[20 * 4096..22 * 4096].iter().all(|b| *b == 2));
            assert!(disk[3 * 4096..4 * 4096].iter().all(|b| *b == 7), "FUA is kept");
            let one = &disk[4096..8192];
            assert!(one.iter().all(|b| *b == 0 || *b == 5));
            torn_inside |= one.contains(&0) && one.contains(&5);
            assert_eq!(fate.kept + fate.dropped + fate.torn, 3);
        }
        assert!(torn_inside);
        // Two of three can be lost: 40 % are dropped, 20 % torn.
        assert!((120..200).contains(&total.dropped) && (50..115).contains(&total.torn), "{total:?}");
        let fate = empty().cut(&writes, 7, false, &mut Rng::new(1), &image)?;
        assert_eq!(fate, Fate { kept: 1, dropped: 2, torn: 0 });
        let mut all = empty();
        all.advance(&writes, writes.len())?;
        assert!(all.equals(&image)?.is_err());
        std::fs::write(&image, &all.bytes)?;
        assert_eq!(all.equals(&image)?, Ok(()));
        std::fs::remove_file(&image)?;
        std::fs::remove_file(&path)
    }
}
