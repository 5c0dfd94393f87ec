//! stub

pub mod inspect;
