//! Publishing: what a message may carry, and the promise one gets for it.
//!
//! Owns: the builder, its checks, the future of a confirm. Never: encodes; the session does, in order.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Client, Error, Topic};
use crate::limits;
use crate::protocol::options::{self, ENTRY_HEADER_LEN, OptionsBuilder};
use crate::protocol::request::{Identity, Publish, TopicRef};
use crate::time;
use crate::types::{Durability, Lsn, Qos};

/// A message about to be published; made by [`Client::publish`]. Nothing happens before one of its `send`s.
#[must_use = "a message is published by `send` or `send_nowait`"]
pub struct PublishBuilder<'a> {
    client: &'a Client,
    topic: Topic,
    payload: Bytes,
    qos: Qos,
    confirm: Option<bool>,
    ttl: Option<Duration>,
    delay: Duration,
    priority: u8,
    identity: Option<Identity>,
    options: OptionsBuilder,
}

/// What the broker said about a publish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Confirmed {
    pub status: Status,
    /// How safe it was when the broker answered; `None` if it was not asked.
    pub level: Option<Durability>,
    /// Where it lies in the log of its topic's core; `None` if the broker was not asked.
    pub position: Option<Lsn>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Stored,
    /// It was stored before, under the same identity.
    Duplicate,
    /// Handed to the connection; nothing else is known.
    Sent,
}

/// The answer to one publish. Dropping it does not take the message back: it is still sent again after a reconnect.
#[derive(Debug)]
#[must_use = "only the answer says whether the message is stored"]
pub struct ConfirmFuture(Answer);

#[derive(Debug)]
enum Answer {
    Sent,
    Awaited(oneshot::Receiver<Result<Confirmed, Error>>),
}

impl Future for ConfirmFuture {
    type Output = Result<Confirmed, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Answer::Sent => Poll::Ready(Ok(Confirmed { status: Status::Sent, level: None, position: None })),
            Answer::Awaited(answer) => Pin::new(answer)
                .poll(cx)
                .map(|answer| answer.unwrap_or_else(|_| Err(Error::Closed { reason: "its task was ended".into() }))),
        }
    }
}

impl<'a> PublishBuilder<'a> {
    pub(super) fn new(client: &'a Client, topic: Topic, payload: Bytes) -> PublishBuilder<'a> {
        PublishBuilder {
            client,
            topic,
            payload,
            qos: Qos::AtLeastOnce,
            confirm: None,
            ttl: None,
            delay: Duration::ZERO,
            priority: 0,
            identity: None,
            options: OptionsBuilder::new(),
        }
    }

    /// Default: at least once.
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    /// Whether the broker is to answer. Default: at QoS1, not at QoS0. A confirmed message at QoS1 is sent again until there
    /// is an answer; one at QoS0 fails with [`Error::Disconnected`] if the connection ends first.
    pub fn confirm(mut self, confirm: bool) -> Self {
        self.confirm = Some(confirm);
        self
    }

    /// How long it is worth delivering; zero: for ever. Default: what the broker is set to.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Not delivered before this time has passed.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// 0 (default) to 9 (first).
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority;
        self
    }

    /// 1 to 64 bytes. The broker stores one message of a topic under this id, however often it is sent (within its window
    /// of ids). Default: see [`Dedup`](super::Dedup).
    pub fn message_id(mut self, id: impl Into<Bytes>) -> Self {
        self.identity = Some(Identity::MessageId(id.into()));
        self
    }

    /// Deduplication by a publisher's own numbers instead of an id: per topic, they must grow in the order of sending.
    pub fn publisher_sequence(mut self, publisher: u64, sequence: u64) -> Self {
        self.identity = Some(Identity::Publisher { id: publisher, sequence });
        self
    }

    /// Travels with the message to its consumers. A key may be given more than once.
    pub fn header(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.options = self.options.header(key, value.as_ref());
        self
    }

    /// The topic on which the publisher waits for an answer.
    pub fn reply_to(mut self, topic: &str) -> Self {
        self.options = self.options.bytes(options::REPLY_TO, topic.as_bytes());
        self
    }

    /// Sends it and waits for the answer, over reconnects if need be.
    pub async fn send(self) -> Result<Confirmed, Error> {
        self.send_nowait().await?.await
    }

    /// Waits until the window has room, then hands the message to the connection. The future is its answer: keep many of
    /// them to keep the pipeline full. Messages go out in the order in which calls of this return.
    pub async fn send_nowait(self) -> Result<ConfirmFuture, Error> {
        let client = self.client;
        let confirm = self.confirm.unwrap_or(self.qos == Qos::AtLeastOnce);
        let publish = self.check()?;
        let shared = client.shared();
        let cost = u32::try_from(frame_len(&publish)).unwrap_or(u32::MAX).min(shared.window_bytes);
        let room = shared.room(cost).await?;
        if !confirm {
            while !shared.publish_unconfirmed(&publish, cost)? {
                shared.until_up().await?;
            }
            room.forget();
            return Ok(ConfirmFuture(Answer::Sent));
        }
        let answer = shared.publish_confirmed(publish, cost)?;
        room.forget();
        Ok(ConfirmFuture(Answer::Awaited(answer)))
    }

    /// Everything that could make the message impossible to encode.
    fn check(self) -> Result<Publish, Error> {
        let invalid = |option, expected| Err(Error::InvalidOption { option, expected });
        self.topic.check()?;
        if self.priority > limits::PRIORITY_MAX {
            return invalid("priority", "0 to 9");
        }
        if let Some(Identity::MessageId(id)) = &self.identity
            && !(1..=limits::MESSAGE_ID_MAX).contains(&id.len())
        {
            return invalid("message id", "1 to 64 bytes");
        }
        let Ok(options) = self.options.finish() else { return invalid("headers", HEADERS_EXPECTED) };
        if options.len() + FIXED_OPTIONS_MAX > limits::OPTIONS_LEN_MAX {
            return invalid("headers", HEADERS_EXPECTED);
        }
        let publish = Publish {
            topic: TopicRef::Name(self.topic.0),
            qos: self.qos,
            confirm: false,
            ttl: self.ttl.map(to_broker_duration),
            delay: to_broker_duration(self.delay),
            priority: self.priority,
            identity: self.identity,
            options,
            payload: self.payload,
        };
        let (bytes, limit) = (frame_len(&publish), self.client.shared().frame_len_max());
        if bytes > limit { Err(Error::TooLarge { bytes, limit }) } else { Ok(publish) }
    }
}

const HEADERS_EXPECTED: &str = "at most 32 KiB of headers together";

/// Most bytes that TTL, delay, priority and an identity take.
const FIXED_OPTIONS_MAX: usize =
    (ENTRY_HEADER_LEN + 8) * 2 + (ENTRY_HEADER_LEN + 1) + (ENTRY_HEADER_LEN + limits::MESSAGE_ID_MAX);

/// What the frame takes at most.
fn frame_len(publish: &Publish) -> usize {
    let topic = match &publish.topic {
        TopicRef::Name(name) => name.len(),
        TopicRef::Alias(_) => 4,
    };
    let fixed = limits::FRAME_LEN_MIN as usize + 6;
    fixed + topic + FIXED_OPTIONS_MAX + publish.options.len() + publish.payload.len()
}

pub(super) fn to_broker_duration(duration: Duration) -> time::Duration {
    time::Duration(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}
