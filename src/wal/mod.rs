//! The write-ahead log. `format`, `record`, `batch`, `checkpoint`, `recovery` and `commit` are pure.

/// Packs records into frames: one batch, one write.
pub mod batch;
/// What the store remembers besides the log.
pub mod checkpoint;
/// What may be acknowledged, and when to sync.
pub mod commit;
/// A segment on disk, byte by byte.
pub mod format;
pub mod record;
/// Bytes to records, and a verdict on the tail.
pub mod recovery;
