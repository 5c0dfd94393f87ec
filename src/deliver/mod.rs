//! Bytes out: what a connection is told, and how it gets into its socket.

/// One connection's replies, encoded and not yet sent. Pure.
pub mod outbox;
/// Outbox to socket.
pub mod writer;
