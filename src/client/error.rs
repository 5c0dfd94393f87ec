//! What can go wrong for a client, told so that a person knows what to do next.
//!
//! Owns: the error type. Never: retries; `link` does, by what the session tells it.

use std::time::Duration;

/// Why an operation did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No address could be reached in the time the reconnect policy allows.
    #[error(
        "cannot reach the broker at {address} ({cause}; tried {attempts} times): check that blipmqd runs there and that \
         the address and port are right"
    )]
    Unreachable { address: String, cause: String, attempts: u32 },
    /// The broker does not know the key. Not retried.
    #[error("the broker at {address} refused the key ({code}: {text}): check the key and `allowed_api_keys`")]
    Unauthorized { address: String, code: u16, text: String },
    /// The peer does not speak version 2 of the protocol. Not retried.
    #[error("the peer at {address} does not speak BlipMQ protocol version 2 ({detail}): is this the broker's port?")]
    Unsupported { address: String, detail: String },
    /// The broker answered this one request with an error; it had no effect.
    #[error("the broker refused: {text} (code {code})")]
    Refused { code: u16, text: String },
    /// The connection ended before the answer came. Publishes at QoS1 never end this way: they are sent again.
    #[error("the connection ended before the broker answered; the client reconnects by itself, try again")]
    Disconnected,
    /// The client has ended: it was closed, or it gave up reconnecting. `reason` says which.
    #[error("the client is closed: {reason}")]
    Closed { reason: String },
    /// The message does not fit into a frame of this broker.
    #[error("the message takes {bytes} bytes on the wire, the broker accepts {limit}")]
    TooLarge { bytes: usize, limit: usize },
    /// A topic must be 1..=65535 bytes.
    #[error("a topic name must be 1 to 65535 bytes, this one has {bytes}")]
    InvalidTopic { bytes: usize },
    /// An option is outside its limits.
    #[error("{option} is out of range: {expected}")]
    InvalidOption { option: &'static str, expected: &'static str },
    /// The client has as many subscriptions as one connection may have.
    #[error("this client already has {limit} subscriptions: use another client for more")]
    TooManySubscriptions { limit: usize },
    /// The time given with the call has passed.
    #[error("no answer within {after:?}")]
    TimedOut { after: Duration },
}

impl Error {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable { .. } | Error::Disconnected | Error::TimedOut { .. } => true,
            Error::Refused { code, .. } => *code == 429 || *code >= 500,
            _ => false,
        }
    }
}
