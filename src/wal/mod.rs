//! The write-ahead log. `format`, `record`, `batch`, `checkpoint`, `recovery` and `commit` are pure.
pub mod record;
pub mod segments;

#[cfg(feature = "server")]
pub mod disk;
#[cfg(feature = "server")]
pub mod import_v1;
#[cfg(feature = "server")]
pub mod store;
