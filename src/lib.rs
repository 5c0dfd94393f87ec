//! BlipMQ: a thread-per-core message broker. The modules, in the order a message meets them.

pub mod types;
pub mod limits;
pub mod time;
#[cfg(feature = "server")]
pub mod config;
/// Who may log in, and what each API key may do.
#[cfg(feature = "server")]
pub mod access;
pub mod metrics;
/// Test-only mistakes.
pub mod planted;
/// 1. Bytes in.
#[cfg(feature = "server")]
pub mod net;
/// 2. Bytes to meaning and back.
pub mod protocol;
/// 3. Decide.
#[cfg(feature = "server")]
pub mod shard;
/// 4. Remember.
#[cfg(feature = "server")]
pub mod wal;
/// 5. Bytes out.
#[cfg(feature = "server")]
pub mod deliver;
/// Across cores.
#[cfg(any(feature = "server", test))]
pub mod ring;
/// Joins the stages on one core.
#[cfg(feature = "server")]
pub mod driver;
/// At the side: HTTP.
#[cfg(feature = "server")]
pub mod gateway;
/// Start checks.
#[cfg(feature = "server")]
pub mod preflight;
#[cfg(feature = "server")]
pub mod logging;
/// The other end of the wire.
#[cfg(feature = "client")]
pub mod client;
