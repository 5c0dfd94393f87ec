//! BlipMQ: a thread-per-core message broker. The modules, in the order a message meets them.

pub mod types;
pub mod limits;
pub mod time;
/// API keys and what each may do.
pub mod access;
#[cfg(feature = "server")]
pub mod config;
/// Start checks.
#[cfg(feature = "server")]
pub mod preflight;
#[cfg(feature = "server")]
pub mod logging;
pub mod metrics;
/// 1. Bytes in.
#[cfg(feature = "server")]
pub mod net;
/// 2. Bytes to meaning and back.
pub mod protocol;
/// 3. Decide.
pub mod shard;
/// 4. Remember.
pub mod wal;
/// 5. Bytes out.
pub mod deliver;
/// Across cores.
#[cfg(feature = "server")]
pub mod ring;
/// Joins the stages on one core.
#[cfg(feature = "server")]
pub mod driver;
/// At the side: HTTP.
#[cfg(feature = "server")]
pub mod gateway;
#[cfg(feature = "client")]
pub mod client;
