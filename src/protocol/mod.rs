//! Bytes to meaning and back: both dialects of the native port. Pure.

pub mod decoder;
pub mod frame;
pub mod reply;
pub mod request;
