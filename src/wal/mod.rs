//! The write-ahead log. `format`, `record`, `batch`, `checkpoint`, `recovery` and `commit` are pure.
pub mod record;
pub mod commit;
