//! The write-ahead log. `format`, `record`, `batch`, `checkpoint`, `recovery` and `commit` are pure.
pub mod commit;
pub mod record;
