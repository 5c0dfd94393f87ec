//! How a client connects, how much it may have under way, and when it gives up. Checked once, constant afterwards.

use std::fmt;
use std::time::Duration;

use super::Error;
use crate::limits;

/// How a [`Client`](super::Client) behaves. [`ClientOptions::new`] gives values that suit most programs.
#[derive(Clone)]
pub struct ClientOptions {
    pub(super) addresses: Vec<String>,
    pub(super) key: String,
    pub(super) name: String,
    pub(super) reconnect: ReconnectPolicy,
    pub(super) dedup: Dedup,
    pub(super) window_messages: usize,
    pub(super) window_bytes: usize,
    pub(super) connect_timeout: Duration,
    pub(super) ping_interval: Duration,
    pub(super) linger: Duration,
    pub(super) aliases: bool,
}

/// How a lost connection is made again: after `first_delay`, then twice as long each time up to `max_delay`,
/// each time less a random part of up to a half, so that many clients do not come back in step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReconnectPolicy {
    pub first_delay: Duration,
    pub max_delay: Duration,
    /// The first connect fails after this long without success.
    pub give_up_connect: Duration,
    /// The client closes when it was without a connection for this long; `None`: never.
    pub give_up_reconnect: Option<Duration>,
}

impl Default for ReconnectPolicy {
    fn default() -> ReconnectPolicy {
        ReconnectPolicy {
            first_delay: Duration::from_millis(50),
            max_delay: Duration::from_secs(5),
            give_up_connect: Duration::from_secs(10),
            give_up_reconnect: Some(Duration::from_secs(120)),
        }
    }
}

/// The identity of confirmed publishes that were given none: what lets the broker recognise one that is sent again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Dedup {
    /// The client's random id as publisher, and a number that counts per topic: exact however long the broker was away,
    /// and cheap. Consumers do not see it. Beyond 65536 topics, the rest get a message id.
    #[default]
    Sequence,
    /// A message id of 16 bytes: the client's random id and a counter. Consumers see it; the broker remembers it for a
    /// limited time.
    MessageId,
    /// None: what was under way when a connection was lost may be stored twice.
    Off,
}

impl ClientOptions {
    /// Connects to `address` (`host:port`) with `key`.
    pub fn new(address: impl Into<String>, key: impl Into<String>) -> ClientOptions {
        ClientOptions {
            addresses: vec![address.into()],
            key: key.into(),
            name: String::new(),
            reconnect: ReconnectPolicy::default(),
            dedup: Dedup::default(),
            window_messages: 4_096,
            window_bytes: 16 * 1024 * 1024,
            connect_timeout: Duration::from_secs(5),
            ping_interval: Duration::from_secs(10),
            linger: Duration::from_secs(5),
            aliases: true,
        }
    }

    /// One more address of the same broker, tried when the ones before it do not answer.
    pub fn address(mut self, address: impl Into<String>) -> ClientOptions {
        self.addresses.push(address.into());
        self
    }

    /// What the client calls itself in its own log lines.
    pub fn name(mut self, name: impl Into<String>) -> ClientOptions {
        self.name = name.into();
        self
    }

    /// When to try again and when to give up.
    pub fn reconnect(mut self, policy: ReconnectPolicy) -> ClientOptions {
        self.reconnect = policy;
        self
    }

    /// Default: [`Dedup::Sequence`].
    pub fn dedup(mut self, dedup: Dedup) -> ClientOptions {
        self.dedup = dedup;
        self
    }

    /// Publishes that may be unanswered at once, in messages (default 4096) and bytes (default 16 MiB); beyond it, sending
    /// waits. One message is always allowed, whatever its size.
    pub fn window(mut self, messages: usize, bytes: usize) -> ClientOptions {
        self.window_messages = messages;
        self.window_bytes = bytes;
        self
    }

    /// How long one attempt may take, login included (default 5 s).
    pub fn connect_timeout(mut self, timeout: Duration) -> ClientOptions {
        self.connect_timeout = timeout;
        self
    }

    /// A connection on which nothing arrived for this long is asked whether it lives (default 10 s, or half of what the
    /// broker asks for if that is less), and given up after three times as long.
    pub fn ping_interval(mut self, interval: Duration) -> ClientOptions {
        self.ping_interval = interval;
        self
    }

    /// How long publishes under way may still be confirmed after the last handle was dropped (default 5 s).
    pub fn linger(mut self, linger: Duration) -> ClientOptions {
        self.linger = linger;
        self
    }

    /// Whether topics published to often get a number, so that their name is not sent each time (default: yes).
    pub fn topic_aliases(mut self, on: bool) -> ClientOptions {
        self.aliases = on;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let invalid = |option, expected| Err(Error::InvalidOption { option, expected });
        if self.window_messages == 0 || self.window_messages > MESSAGES_IN_WINDOW_MAX {
            return invalid("window", "1 to 1048576 messages");
        }
        if self.window_bytes == 0 || self.window_bytes > BYTES_IN_WINDOW_MAX {
            return invalid("window", "1 byte to 256 MiB");
        }
        if self.ping_interval < Duration::from_millis(10) {
            return invalid("ping_interval", "at least 10 ms");
        }
        if self.reconnect.first_delay < Duration::from_millis(1)
            || self.reconnect.max_delay < self.reconnect.first_delay
        {
            return invalid("reconnect", "first_delay at least 1 ms, max_delay not below it");
        }
        if self.key.len() > limits::FRAME_LEN_MAX_BEFORE_AUTH as usize - KEY_FRAMING {
            return invalid("key", "less than 4 KiB");
        }
        Ok(())
    }
}

/// Bytes of an AUTH frame beside the key, generously.
const KEY_FRAMING: usize = 64;
const MESSAGES_IN_WINDOW_MAX: usize = 1 << 20;
const BYTES_IN_WINDOW_MAX: usize = 256 * 1024 * 1024;

// A semaphore counts the window: `u32` permits per acquisition, and its own maximum above.
const _: () = assert!(BYTES_IN_WINDOW_MAX <= u32::MAX as usize >> 3);

// The key is never printed.
impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("addresses", &self.addresses)
            .field("name", &self.name)
            .field("reconnect", &self.reconnect)
            .field("dedup", &self.dedup)
            .finish_non_exhaustive()
    }
}
