//! O_DIRECT write, then sync, then "durable up to", in that order.
//!
//! Owns: the open files of one core's stream, each locked on its own descriptor: while a write of this process can still
//! land, nobody else may read the slot (DURABILITY 0, point 9). Never: writes or syncs again what failed; nobody knows then
//! what is on the disk, and the process ends.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use glommio::io::{DmaFile, OpenOptions};
use rustc_hash::FxHashMap;

use crate::planted::planted;
use crate::types::Slot;
use crate::wal::batch::Write;
use crate::wal::disk;
use crate::wal::reader::{OPEN_ATTEMPTS, OPEN_RETRY, is_out_of_descriptors, open_patiently};

#[derive(Debug, thiserror::Error)]
pub enum WriteFailed {
    #[error("cannot open segment {path}: {reason}")]
    Open { path: String, reason: String },
    #[error("segment {path} is locked by another process")]
    Locked { path: String },
    #[error("writing {len} bytes at {offset} of {path} failed: {reason}")]
    Write { path: String, offset: u32, len: usize, reason: String },
    #[error("writing {len} bytes at {offset} of {path} stopped after {written}")]
    Short { path: String, offset: u32, len: usize, written: usize },
    #[error("syncing {path} failed: {reason}")]
    Sync { path: String, reason: String },
}

const LOCK_ATTEMPTS: u32 = 1_000;
const LOCK_RETRY: Duration = Duration::from_millis(5);

pub struct Writer {
    wal_dir: PathBuf,
    /// Every write returns synced.
    dsync: bool,
    files: RefCell<FxHashMap<Slot, Rc<DmaFile>>>,
    /// Written since the last sync, in order.
    dirty: RefCell<Vec<Slot>>,
    /// Begun, the newest last; all but it are full.
    begun: RefCell<Vec<Slot>>,
}

impl Writer {
    /// - `dsync`: open segments with O_DSYNC. Otherwise `sync` must be called.
    pub fn new(wal_dir: PathBuf, dsync: bool) -> Writer {
        Writer { wal_dir, dsync, files: RefCell::default(), dirty: RefCell::default(), begun: RefCell::default() }
    }

    pub fn is_dsync(&self) -> bool {
        self.dsync
    }

    /// Opens and locks a granted segment ahead of its first write.
    pub async fn open(&self, slot: Slot) -> Result<Rc<DmaFile>, WriteFailed> {
        if let Some(file) = self.files.borrow().get(&slot) {
            return Ok(file.clone());
        }
        let path = disk::slot_path(&self.wal_dir, slot);
        let shown = path.display().to_string();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.dsync && !planted!(SkipSync) {
            options.custom_flags(nix::libc::O_DSYNC);
        }
        let file = match open_patiently(&path, async || options.dma_open(&path).await).await {
            Ok(file) => file,
            Err(error) => return Err(WriteFailed::Open { path: shown, reason: error.to_string() }),
        };
        if let Some(file) = self.files.borrow().get(&slot) {
            return Ok(file.clone()); // opened by somebody else while we waited; ours closes
        }
        // A descriptor of ours on the slot's last life may be closing still.
        for attempt in 0.. {
            match disk::try_lock(&file) {
                Ok(true) => break,
                Ok(false) if attempt < LOCK_ATTEMPTS => glommio::timer::sleep(LOCK_RETRY).await,
                Ok(false) => return Err(WriteFailed::Locked { path: shown }),
                // A lock wants a descriptor, too.
                Err(error) if attempt < OPEN_ATTEMPTS && is_out_of_descriptors(error.raw_os_error()) => {
                    glommio::timer::sleep(OPEN_RETRY).await;
                }
                Err(error) => return Err(WriteFailed::Open { path: shown, reason: error.to_string() }),
            }
        }
        let file = Rc::new(file);
        self.files.borrow_mut().insert(slot, file.clone());
        Ok(file)
    }

    /// Returns when the whole batch is written (with O_DSYNC: and synced).
    pub async fn write(&self, write: &Write) -> Result<(), WriteFailed> {
        let file = self.open(write.slot).await?;
        let len = write.bytes.len();
        let mut buffer = file.alloc_dma_buffer(len);
        buffer.as_bytes_mut()[..len].copy_from_slice(&write.bytes);
        let path = || disk::slot_path(&self.wal_dir, write.slot).display().to_string();
        match file.write_at(buffer, u64::from(write.offset)).await {
            Ok(written) if written == len => {}
            Ok(written) => return Err(WriteFailed::Short { path: path(), offset: write.offset, len, written }),
            Err(error) => {
                let reason = error.to_string();
                return Err(WriteFailed::Write { path: path(), offset: write.offset, len, reason });
            }
        }
        if !self.dsync {
            let mut dirty = self.dirty.borrow_mut();
            if dirty.last() != Some(&write.slot) {
                dirty.push(write.slot);
            }
        }
        if write.new_segment {
            self.close_old(write.slot);
        }
        Ok(())
    }

    /// Syncs everything written before the call.
    pub async fn sync(&self) -> Result<(), WriteFailed> {
        let mut dirty = std::mem::take(&mut *self.dirty.borrow_mut());
        if planted!(SkipSync) {
            dirty.clear();
        } else if planted!(SyncForgetsOldSegment) {
            dirty.drain(..dirty.len().saturating_sub(1));
        }
        for slot in &dirty {
            let file = self.open(*slot).await?;
            if let Err(error) = file.fdatasync().await
                && (!planted!(SyncRetried) || file.fdatasync().await.is_err())
            {
                let path = disk::slot_path(&self.wal_dir, *slot).display().to_string();
                return Err(WriteFailed::Sync { path, reason: error.to_string() });
            }
        }
        Ok(())
    }

    /// The stream has moved on to `current`: full segments that are synced are closed. Granted ones stay open.
    fn close_old(&self, current: Slot) {
        let dirty = self.dirty.borrow();
        let mut begun = self.begun.borrow_mut();
        begun.retain(|slot| {
            let keep = *slot == current || dirty.contains(slot);
            if !keep {
                self.files.borrow_mut().remove(slot);
            }
            keep
        });
        begun.push(current);
    }
}
