//! Slot files as the operating system sees them: names, aligned buffers, positional reads and writes past the page cache.
//!
//! Owns: how a slot is made, opened, locked, synced and read. Never: knows what the bytes mean, or retries a failed sync.
//! Neighbours: `recovery` reads through [`SlotFiles`]; `keeper` makes slots with [`create_slot`]; the driver's writer takes
//! each slot's lock with [`try_lock`].

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use super::store::{StoreError, io_at};
use crate::limits::BLOCK;
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
pub fn create_slot(wal_dir: &Path, slot: Slot, segment_size: u64, direct: bool) -> io::Result<()> {
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

fn write_zeros(path: &Path, segment_size: u64, direct: bool) -> io::Result<()> {
    let flags = if direct { O_DIRECT } else { 0 };
    let file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path)?;
    let len = i64::try_from(segment_size).map_err(io::Error::other)?;
    match fallocate(&file, FallocateFlags::empty(), 0, len) {
        // Not every file system can; the zeros allocate as well.
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    let zeros = AlignedBuf::zeroed(CHUNK);
    let mut at = 0;
    while at < segment_size {
        let len = usize::try_from(segment_size - at).map_or(CHUNK, |left| left.min(CHUNK));
        file.write_all_at(&zeros.as_slice()[..len], at)?;
        at += len as u64;
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
}
