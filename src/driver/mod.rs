//! stub

pub mod beat;
pub mod inspect;
pub mod readiness;
