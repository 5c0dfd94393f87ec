//! BlipMQ: a thread-per-core message broker. The modules, in the order a message meets them.

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod config;
/// 5. Bytes out.
pub mod deliver;
/// Joins the stages on one core.
#[cfg(feature = "server")]
pub mod driver;
/// At the side: HTTP.
#[cfg(feature = "server")]
pub mod gateway;
pub mod limits;
pub mod metrics;
/// 1. Bytes in.
#[cfg(feature = "server")]
pub mod net;
/// 2. Bytes to meaning and back.
pub mod protocol;
/// Across cores.
#[cfg(feature = "server")]
pub mod ring;
/// 3. Decide.
pub mod shard;
pub mod time;
pub mod types;
/// 4. Remember.
pub mod wal;
