//! Protocol v2 from outside, against the real `blipmqd`: what docs/PROTOCOL.md promises, and what the rows G of V1.md
//! promise to both dialects.
//!
//! The broker runs on two cores. Where it may make a difference, a story is told twice: with a topic on the client's own
//! core and with one on the other. Nothing here measures time: a test waits for what must come, and shows that nothing
//! comes by an answer that would have come after it.

mod client;

mod consume;
mod dead_letters;
mod durable;
mod ledger;
mod limits;
mod promises;
mod publish;
mod session;
