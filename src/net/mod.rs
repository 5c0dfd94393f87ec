//! Bytes in: sockets, and the requests in what they deliver.

/// The ports this core listens on.
pub mod listener;
/// Socket to requests.
pub mod reader;
