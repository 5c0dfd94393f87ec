//! Writes a whole log into a store that does not exist yet, for `wal salvage` and `import-v1`.
//!
//! Owns: the new store until it is complete. Never: touches an existing store, leaves a half-written one under the name asked
//! for: it is made beside it and renamed when it is whole and synced.
//! Neighbours: `batch` lays out the log, the same code as in the broker; `tools` decides what goes in.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::batch::{AppendError, Class, Grant, Log, LogConfig};
use super::checkpoint::{Checkpoint, StreamState, VShardState};
use super::disk;
use super::format::Segment;
use super::record::Record;
use super::start::shape;
use super::store::{self, Store, StoreError, StoreOptions, io_at};
use crate::limits::{BATCH_BYTES_TARGET, BLOCK};
use crate::time::WallMs;
use crate::types::{Lsn, Slot, StreamId, VShard};

/// The one stream of the new store.
const STREAM: StreamId = StreamId { incarnation: 1, core: 0 };

#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "{path} is there already; name a new directory (one that ends in .partial was left by a command that was killed: remove it)"
    )]
    Exists { path: PathBuf },
    #[error("a record does not fit a segment of the new store: {0}")]
    TooLarge(AppendError),
}

#[derive(Debug)]
pub struct Rewriter {
    store: Store,
    /// Where the store goes when it is whole.
    out: PathBuf,
    log: Log,
    /// The segment being written.
    open: Option<(Slot, File)>,
    slots: u32,
    segments: Vec<Segment>,
    /// Behind everything written.
    end: Lsn,
    time: WallMs,
    finished: bool,
}

/// What was not finished is no store; without its directory the command can simply be repeated.
impl Drop for Rewriter {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(self.store.dir())
        {
            tracing::warn!(%error, path = %self.store.dir().display(), "cannot remove the unfinished store");
        }
    }
}

impl Rewriter {
    /// - `options`: its path must not exist, or be an empty directory.
    pub fn create(options: &StoreOptions) -> Result<Rewriter, RewriteError> {
        let out = std::path::absolute(&options.path).map_err(io_at("resolve", &options.path))?;
        let mut partial = out.clone().into_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        for path in [&out, &partial] {
            if !is_missing_or_empty(path) {
                return Err(RewriteError::Exists { path: path.clone() });
            }
        }
        let store = Store::open(&StoreOptions { path: partial, ..options.clone() })?;
        let time = WallMs(store::now_ms());
        let config = LogConfig {
            store: store.id(),
            stream: STREAM,
            segment_size: store.segment_size(),
            last_index: vec![0; usize::from(shape(&store).vshards)],
            opening: None,
        };
        let mut slots = 0;
        let log = Log::new(config, make_slot(&store, &mut slots, time)?);
        Ok(Rewriter {
            store,
            out,
            log,
            open: None,
            slots,
            segments: Vec::new(),
            end: Lsn(BLOCK as u64),
            time,
            finished: false,
        })
    }

    /// Adds one record; indexes are given anew. `time`: when it was first logged.
    pub fn append(&mut self, vshard: VShard, record: &Record<'_>, time: WallMs) -> Result<(), RewriteError> {
        self.time = self.time.max(time);
        loop {
            match self.log.append(vshard, record, Class::Control, time) {
                Ok(_) => break,
                Err(AppendError::Full) => {
                    let grant = make_slot(&self.store, &mut self.slots, self.time)?;
                    self.log.grant(grant);
                }
                Err(error @ AppendError::TooLarge { .. }) => return Err(RewriteError::TooLarge(error)),
            }
        }
        if self.log.unwritten_bytes() >= BATCH_BYTES_TARGET {
            self.write(Lsn(0))?;
        }
        Ok(())
    }

    /// The last index given in a virtual shard.
    pub fn last_index(&self, vshard: VShard) -> u64 {
        self.log.last_index(vshard)
    }

    fn write(&mut self, durable: Lsn) -> Result<(), StoreError> {
        let wal_dir = self.store.wal_dir();
        while let Some(write) = self.log.next_write(durable, self.time) {
            let path = disk::slot_path(&wal_dir, write.slot);
            if write.new_segment {
                self.sync()?;
                self.segments.push(write.segment);
            }
            let file = match self.open.take() {
                Some((slot, file)) if slot == write.slot => file,
                _ => disk::open_slot(&wal_dir, write.slot, false)?,
            };
            file.write_all_at(&write.bytes, u64::from(write.offset)).map_err(io_at("write", &path))?;
            self.open = Some((write.slot, file));
            self.end = write.end;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        match &self.open {
            Some((slot, file)) => {
                file.sync_data().map_err(io_at("sync", &disk::slot_path(&self.store.wal_dir(), *slot)))
            }
            None => Ok(()),
        }
    }

    /// Makes the store durable and gives it its name. `states`: of a checkpoint that includes every record up to the indexes
    /// in it.
    pub fn finish(mut self, states: Option<Vec<VShardState>>) -> Result<PathBuf, RewriteError> {
        self.write(Lsn(0))?;
        self.sync()?;
        // The last frame says that all before it is synced, so that rot in it is never taken for a torn tail.
        let synced = self.end;
        while let Err(AppendError::Full) = self.log.clean() {
            let grant = make_slot(&self.store, &mut self.slots, self.time)?;
            self.log.grant(grant);
        }
        self.write(synced)?;
        self.sync()?;
        if let Some(vshards) = states {
            let checkpoint = Checkpoint {
                store: self.store.id(),
                segment_size: self.store.segment_size(),
                number: 1,
                incarnation: STREAM.incarnation,
                time: self.time,
                // What the states include is known by its index; all segments stay.
                streams: vec![StreamState { stream: STREAM, covered: Lsn(0), durable: self.end, sealed: None }],
                live: std::mem::take(&mut self.segments),
                vshards,
            };
            let written = disk::write_checkpoint(&self.store.ckpt_dir(), checkpoint.number, &checkpoint.encode());
            let failed = |error: disk::WriteError| match error {
                disk::WriteError::NoSpace(source) | disk::WriteError::Failed(source) => source,
            };
            written.map_err(failed).map_err(io_at("write a checkpoint in", &self.store.ckpt_dir()))?;
        }
        let partial = self.store.dir().to_owned();
        fs::rename(&partial, &self.out).map_err(io_at("rename", &partial))?;
        if let Some(parent) = self.out.parent() {
            disk::sync_dir(parent)?;
        }
        self.finished = true;
        Ok(self.out.clone())
    }
}

fn make_slot(store: &Store, slots: &mut u32, created: WallMs) -> Result<Grant, StoreError> {
    let (slot, wal_dir) = (Slot(*slots), store.wal_dir());
    disk::create_slot(&wal_dir, slot, store.segment_size(), store.direct_io())
        .map_err(io_at("make a segment in", &wal_dir))?;
    *slots += 1;
    let salt = getrandom::u64().map_err(|error| io_at("draw a salt for", &wal_dir)(std::io::Error::other(error)))?;
    Ok(Grant { slot, salt, created })
}

fn is_missing_or_empty(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}
