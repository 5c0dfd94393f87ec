//! The write-ahead log. `format`, `record`, `batch`, `checkpoint`, `recovery`, `commit` and `segments` are pure.

/// Packs records into frames: one batch, one write.
pub mod batch;
/// What the store remembers besides the log.
pub mod checkpoint;
/// What may be acknowledged, and when to sync.
pub mod commit;
/// A segment on disk, byte by byte.
pub mod format;
/// The recovery rule against a disk that loses and tears.
#[cfg(test)]
mod model;
pub mod record;
/// Bytes to records, and a verdict on the tail.
pub mod recovery;
/// Which slots are in use, and when one may be used again.
pub mod segments;

/// O_DIRECT write, then sync.
pub mod writer;
/// Aligned reads of the backlog.
pub mod reader;
/// Slot files as the operating system sees them.
pub mod disk;
/// The thread that owns slots and checkpoints.
pub mod keeper;
/// From a directory to the records in it.
pub mod start;
/// Reads the log of the original broker.
pub mod import_v1;
/// Writes a whole log into a new store.
#[cfg(feature = "server")]
mod rewrite;
/// A store's directory: identity, lock, checks.
pub mod store;
/// `wal verify`, `dump`, `stat`, `salvage`, and `import-v1`.
#[cfg(feature = "server")]
pub mod tools;
