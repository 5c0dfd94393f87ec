//! Slot files as the operating system sees them: names, aligned buffers, positional reads and writes past the page cache.
//!
//! Owns: how a slot is made, opened, locked, synced and read. Never: knows what the bytes mean, or retries a failed sync.
//! Neighbours: `recovery` reads through [`SlotFiles`]; `keeper` makes slots with [`create_slot`]; the driver's writer takes
//! each slot's lock with [`try_lock`].

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use super::checkpoint;
use super::recovery::{ReadError, Segments};
use super::store::{Store, StoreError, io_at};
use crate::limits::BLOCK;
use crate::planted::planted;
use crate::types::Slot;

/// For `custom_flags`.
pub(crate) const O_DIRECT: i32 = OFlag::O_DIRECT.bits();
/// Bytes one read or one zeroing write moves.
pub const CHUNK: usize = 1024 * 1024;
/// A dead broker's writes are normally over in milliseconds: longer is worth a line in the log, much longer an operator.
const LOCK_WARN_AFTER: Duration = Duration::from_secs(1);
const LOCK_GIVE_UP_AFTER: Duration = Duration::from_secs(60);
const LOCK_RETRY_EVERY: Duration = Duration::from_millis(10);

/// A slot being made has this name until its zeros are on the disk.
const HALF_MADE: &str = ".tmp";

/// Bytes at an address that is a multiple of [`BLOCK`], as O_DIRECT demands. A part of a larger `Vec`: no `unsafe`.
#[derive(Debug)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AlignedBuf {
    /// `len`: a multiple of [`BLOCK`].
    pub fn zeroed(len: usize) -> AlignedBuf {
        assert!(len.is_multiple_of(BLOCK), "{len} is no multiple of {BLOCK}");
        let bytes = vec![0; len + BLOCK];
        // The Vec never grows, so that its address stays.
        let start = bytes.as_ptr().align_offset(BLOCK);
        assert!(start < BLOCK, "the allocator gave an address that cannot be aligned");
        AlignedBuf { bytes, start, len }
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

pub fn slot_path(wal_dir: &Path, slot: Slot) -> PathBuf {
    wal_dir.join(format!("slot-{:04}.seg", slot.0))
}

/// The slots in a directory, by number. A missing directory has none.
pub fn list_slots(wal_dir: &Path) -> Result<Vec<Slot>, StoreError> {
    let entries = match fs::read_dir(wal_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_at("list", wal_dir)(error)),
    };
    let mut slots = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_at("list", wal_dir))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("slot-")?.strip_suffix(".seg"));
        if let Some(number) = number.and_then(|digits| digits.parse().ok()) {
            slots.push(Slot(number));
        }
    }
    slots.sort_unstable();
    slots.dedup();
    Ok(slots)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(io_at("sync the directory", dir))
}

/// Opens a slot for reading and writing, past the page cache if `direct`.
pub fn open_slot(wal_dir: &Path, slot: Slot, direct: bool) -> Result<File, StoreError> {
    let path = slot_path(wal_dir, slot);
    let flags = if direct { O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).map_err(io_at("open", &path))
}

/// Takes the exclusive lock of an open slot, on the very descriptor that will write it: the lock is held until the last
/// reference to that descriptor is gone, and the kernel keeps references for writes in flight even after a kill. `false`:
/// somebody, or the kernel for somebody dead, still has it.
pub fn try_lock(fd: &impl AsFd) -> io::Result<bool> {
    if planted!(IgnoreSegmentLock) {
        return Ok(true);
    }
    // A duplicate shares the lock; dropping it does not unlock.
    let file = File::from(fd.as_fd().try_clone_to_owned()?);
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Waits until a dead broker's writes to this slot have landed.
pub fn lock_waiting(file: &File, path: &Path) -> Result<(), StoreError> {
    let started = Instant::now();
    let mut warned = false;
    while !try_lock(file).map_err(io_at("lock", path))? {
        let waited = started.elapsed();
        if waited >= LOCK_GIVE_UP_AFTER {
            return Err(StoreError::SegmentLocked { path: path.to_owned(), waited_s: waited.as_secs() });
        }
        if waited >= LOCK_WARN_AFTER && !warned {
            warned = true;
            tracing::warn!(segment = %path.display(), "waiting for the writes of a dead broker to reach the disk");
        }
        std::thread::sleep(LOCK_RETRY_EVERY);
    }
    Ok(())
}

/// Makes a slot whose every block is allocated and written, so that later writes change no file system metadata. It has its
/// name only when it is whole; a half-made one is removed.
pub fn create_slot(wal_dir: &Path, slot: Slot, segment_size: u32, direct: bool) -> io::Result<()> {
    let path = slot_path(wal_dir, slot);
    let half_made = path.with_extension(&HALF_MADE[1..]);
    let result = write_zeros(&half_made, segment_size, direct)
        .and_then(|()| fs::rename(&half_made, &path))
        .and_then(|()| File::open(wal_dir)?.sync_all());
    if result.is_err() {
        // Space first: a half-made slot may be what fills the disk. A second failure would hide the first.
        for name in [&half_made, &path] {
            if let Err(error) = fs::remove_file(name)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %name.display(), "cannot remove a half-made segment");
            }
        }
    }
    result
}

fn write_zeros(path: &Path, segment_size: u32, direct: bool) -> io::Result<()> {
    let flags = if direct { O_DIRECT } else { 0 };
    let file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, i64::from(segment_size)) {
        // Not every file system can; the zeros allocate as well.
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    let zeros = AlignedBuf::zeroed(CHUNK);
    for at in (0..segment_size).step_by(CHUNK) {
        let len = CHUNK.min((segment_size - at) as usize);
        file.write_all_at(&zeros.as_slice()[..len], u64::from(at))?;
    }
    // Size and extents too.
    file.sync_all()
}

/// Deletes a slot that nothing refers to.
pub fn delete_slot(wal_dir: &Path, slot: Slot) -> io::Result<()> {
    fs::remove_file(slot_path(wal_dir, slot))?;
    File::open(wal_dir)?.sync_all()
}

/// Removes what a crash during [`create_slot`] left.
pub fn remove_half_made(wal_dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(wal_dir).map_err(io_at("list", wal_dir))? {
        let path = entry.map_err(io_at("list", wal_dir))?.path();
        let half_made = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.strip_prefix("slot-").is_some_and(|rest| rest.ends_with(HALF_MADE)));
        if half_made {
            fs::remove_file(&path).map_err(io_at("remove", &path))?;
        }
    }
    Ok(())
}

/// The slots of a store, for recovery and the tools.
#[derive(Debug)]
pub struct SlotFiles {
    wal_dir: PathBuf,
    direct: bool,
    slots: Vec<Slot>,
    segment_size: u32,
    /// Recovery reads one slot after the other; a store may have more of them than a process may open files.
    last: RefCell<Option<(Slot, File)>>,
}

impl SlotFiles {
    /// For a start: waits for each slot's lock, then makes durable whatever it will be judged by (DURABILITY 2.5, 1).
    pub fn open_synced(store: &Store) -> Result<SlotFiles, StoreError> {
        let files = SlotFiles::open(store)?;
        for &slot in &files.slots {
            let path = slot_path(&files.wal_dir, slot);
            let file = open_slot(&files.wal_dir, slot, files.direct)?;
            let len = file.metadata().map_err(io_at("look at", &path))?.len();
            if len != u64::from(files.segment_size) {
                let why = format!("it has {len} bytes; every segment of this store has {}", files.segment_size);
                return Err(StoreError::Damaged { path, why });
            }
            lock_waiting(&file, &path)?;
            file.sync_data().map_err(io_at("sync", &path))?;
        }
        for path in checkpoint_paths(&store.ckpt_dir()) {
            match File::open(&path) {
                Ok(file) => file.sync_data().map_err(io_at("sync", &path))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_at("open", &path)(error)),
            }
        }
        for dir in [files.wal_dir.as_path(), &store.ckpt_dir(), store.dir()] {
            sync_dir(dir)?;
        }
        Ok(files)
    }

    /// For the tools: changes nothing, takes no lock. What is missing from a file shows when it is read.
    pub fn open(store: &Store) -> Result<SlotFiles, StoreError> {
        let (wal_dir, segment_size) = (store.wal_dir(), store.segment_size());
        let slots = list_slots(&wal_dir)?;
        Ok(SlotFiles { wal_dir, direct: store.direct_io(), slots, segment_size, last: RefCell::new(None) })
    }

    fn read_blocks(&self, slot: Slot, offset: u64, len: usize) -> Result<AlignedBuf, String> {
        let mut last = self.last.borrow_mut();
        if last.as_ref().is_none_or(|(open, _)| *open != slot) {
            let flags = if self.direct { O_DIRECT } else { 0 };
            let opened = OpenOptions::new().read(true).custom_flags(flags).open(slot_path(&self.wal_dir, slot));
            *last = Some((slot, opened.map_err(|error| error.to_string())?));
        }
        let Some((_, file)) = last.as_ref() else { return Err("no file".to_owned()) };
        let mut buffer = AlignedBuf::zeroed(len);
        file.read_exact_at(buffer.as_mut_slice(), offset).map_err(|error| error.to_string())?;
        Ok(buffer)
    }
}

impl Segments for SlotFiles {
    fn slots(&self) -> Vec<Slot> {
        self.slots.clone()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        let error = |reason| ReadError { slot, offset, len, reason };
        let end = offset.checked_add(len).filter(|end| *end <= self.segment_size);
        let end = end.ok_or_else(|| error(format!("the segment has {} bytes", self.segment_size)))?;
        let first = offset - offset % BLOCK as u32;
        let blocks = (end.next_multiple_of(BLOCK as u32) - first) as usize;
        let buffer = self.read_blocks(slot, u64::from(first), blocks).map_err(error)?;
        let skip = (offset - first) as usize;
        // Without a copy: the buffer lives as long as what points into it.
        Ok(Bytes::from_owner(buffer).slice(skip..skip + len as usize))
    }
}

/// Why a checkpoint is not on the disk.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Not written. The other file holds the newest checkpoint still.
    #[error("{0}")]
    NoSpace(io::Error),
    /// The file's contents are unknown.
    #[error("{0}")]
    Failed(io::Error),
}

/// The two files a checkpoint may lie in. The number decides, so that the newest one is never written over.
pub fn checkpoint_paths(ckpt_dir: &Path) -> [PathBuf; 2] {
    [ckpt_dir.join("ckpt-A"), ckpt_dir.join("ckpt-B")]
}

/// What the disk has of a checkpoint; `None`: there is no such file. Not what the page cache has: after a failed sync the
/// kernel calls pages clean that the disk never got, and a start must not build on those (Rebello et al., ATC'20).
pub fn read_checkpoint(path: &Path, direct: bool) -> io::Result<Option<Vec<u8>>> {
    let flags = if direct { O_DIRECT } else { 0 };
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut out = Vec::with_capacity(len);
    let mut buffer = AlignedBuf::zeroed(CHUNK);
    while out.len() < len {
        match file.read_at(buffer.as_mut_slice(), out.len() as u64) {
            // It became shorter: what is missing shows when it is decoded.
            Ok(0) => break,
            Ok(read) => out.extend_from_slice(&buffer.as_slice()[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(out))
}

/// Writes a checkpoint in place and syncs it. Space is taken before the first byte, so that a full disk leaves the older
/// checkpoint of this file whole.
pub fn write_checkpoint(ckpt_dir: &Path, number: u64, bytes: &[u8]) -> Result<(), WriteError> {
    let path = &checkpoint_paths(ckpt_dir)[checkpoint::file_of(number)];
    let is_new = !path.exists();
    let open = || OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = open().map_err(|error| match is_no_space(&error) {
        true => WriteError::NoSpace(error),
        false => WriteError::Failed(error),
    })?;
    match fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(bytes.len()).unwrap_or(i64::MAX)) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(errno) if is_no_space(&errno.into()) => return Err(WriteError::NoSpace(errno.into())),
        Err(errno) => return Err(WriteError::Failed(errno.into())),
    }
    // Copy-on-write file systems may still find no room. Then this file is lost, the newer one is not, and the next
    // checkpoint goes here again.
    file.write_all_at(bytes, 0).map_err(|error| match is_no_space(&error) {
        true => WriteError::NoSpace(error),
        false => WriteError::Failed(error),
    })?;
    if planted!(CheckpointNotSynced) {
        return Ok(());
    }
    file.sync_all().map_err(WriteError::Failed)?;
    if is_new {
        File::open(ckpt_dir).and_then(|dir| dir.sync_all()).map_err(WriteError::Failed)?;
    }
    Ok(())
}

/// The disk, or what we may have of it, is full; nothing is broken.
pub fn is_no_space(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
        || matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An empty directory of its own for one test, on the disk that holds the build: /tmp may be a tmpfs.
    pub fn scratch(name: &str) -> PathBuf {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("target/tmp/unit")
            .join(format!("{name}-{}", std::process::id()));
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_new_slot_is_zero_and_has_its_name_only_when_it_is_whole() {
        let dir = scratch("disk-slots");
        create_slot(&dir, Slot(12_345), 1 << 20, false).unwrap();
        create_slot(&dir, Slot(3), CHUNK as u32 + 8192, false).unwrap();
        fs::write(dir.join("slot-0007.tmp"), [1; 100]).unwrap();
        fs::write(dir.join("notes.txt"), "kept").unwrap();
        assert_eq!(list_slots(&dir).unwrap(), [Slot(3), Slot(12_345)]);
        let bytes = fs::read(slot_path(&dir, Slot(3))).unwrap();
        assert!(bytes.len() == CHUNK + 8192 && bytes.iter().all(|&byte| byte == 0));
        remove_half_made(&dir).unwrap();
        assert!(!dir.join("slot-0007.tmp").exists() && dir.join("notes.txt").exists());
        delete_slot(&dir, Slot(3)).unwrap();
        assert_eq!(list_slots(&dir).unwrap(), [Slot(12_345)]);
        // Into a directory that is not there: nothing half-made stays behind.
        assert!(create_slot(&dir.join("gone"), Slot(1), 4096, false).is_err());
    }

    #[test]
    fn a_slot_is_locked_until_the_last_reference_to_its_descriptor_is_gone() {
        let dir = scratch("disk-lock");
        create_slot(&dir, Slot(0), 4096, false).unwrap();
        let writer = open_slot(&dir, Slot(0), false).unwrap();
        // What the kernel does for a write in flight.
        let in_flight = writer.try_clone().unwrap();
        assert!(try_lock(&writer).unwrap());
        let next = open_slot(&dir, Slot(0), false).unwrap();
        assert!(!try_lock(&next).unwrap());
        drop(writer);
        assert!(!try_lock(&next).unwrap(), "the killed writer's write has not landed");
        let waiting = std::thread::spawn(move || lock_waiting(&next, Path::new("slot")));
        drop(in_flight);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn buffers_are_aligned_and_writable() {
        for len in [0, BLOCK, CHUNK] {
            let mut buffer = AlignedBuf::zeroed(len);
            assert_eq!((buffer.as_slice().as_ptr().align_offset(BLOCK), buffer.as_slice().len()), (0, len));
            buffer.as_mut_slice().fill(7);
            assert!(buffer.as_ref().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn a_checkpoint_of_any_length_is_read_off_the_disk() {
        let dir = scratch("disk-read-checkpoint");
        let [path, other] = checkpoint_paths(&dir);
        for len in [0, 1, BLOCK - 1, BLOCK, CHUNK + 5] {
            let bytes: Vec<u8> = (0..len).map(|n| n as u8).collect();
            fs::write(&path, &bytes).unwrap();
            for direct in [false, true] {
                assert_eq!(
                    read_checkpoint(&path, direct).unwrap().as_ref(),
                    Some(&bytes),
                    "{len} bytes, direct {direct}"
                );
            }
        }
        assert_eq!(read_checkpoint(&other, true).unwrap(), None);
    }

    #[test]
    fn a_checkpoint_goes_where_the_one_before_the_last_was() {
        let dir = scratch("disk-checkpoint");
        for number in 1..=3u8 {
            write_checkpoint(&dir, u64::from(number), &[number; 4096]).unwrap();
        }
        let [even, odd] = checkpoint_paths(&dir).map(|path| fs::read(path).unwrap()[0]);
        assert_eq!((even, odd), (2, 3));
    }
}
