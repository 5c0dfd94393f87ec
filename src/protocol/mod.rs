//! Bytes to meaning and back: both dialects of the native port. Pure.
//!
//! `docs/PROTOCOL.md` describes the wire for people who write clients; its golden frames are tested here.

pub mod client_side;
pub mod code;
pub mod decoder;
pub mod encode;
pub mod frame;
pub mod options;
pub mod reply;
pub mod request;
mod v1;
mod v2;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod strategies;
