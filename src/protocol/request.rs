//! What a client may ask. One set of requests for both protocol versions: the shard does not care how they were spelt.

use bytes::Bytes;

use crate::time::Duration;
use crate::types::{ClientSub, DeliveryTag, Qos};

/// Which dialect a connection speaks; decided by its HELLO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    V1,
    V2,
}

/// One request and the correlation id that its answer carries.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    pub cid: u64,
    pub kind: RequestKind,
}

#[derive(Clone, PartialEq, Debug)]
pub enum RequestKind {
    /// The payload was well-formed; `version` may still be one we do not speak.
    Hello {
        version: u16,
    },
    Auth {
        key: Bytes,
    },
    Publish(Publish),
    Subscribe(Subscribe),
    /// v2: gives `topic` the number `alias` on this connection.
    Alias {
        alias: u32,
        topic: Bytes,
    },
    /// `confirm`: v2 may ask for an OK once the acknowledgement is as durable as the policy says. v1: one tag, no answer on success.
    Ack {
        sub: ClientSub,
        tags: TagRanges,
        confirm: bool,
    },
    /// v2 only.
    Reject {
        sub: ClientSub,
        tags: TagRanges,
        action: RejectAction,
    },
    /// v2 only: the new most unacknowledged deliveries.
    Credit {
        sub: ClientSub,
        credit: u32,
    },
    /// v2 only.
    Unsubscribe {
        sub: ClientSub,
        mode: UnsubscribeMode,
    },
    /// v1 only.
    Poll {
        sub: ClientSub,
    },
    Ping,
    /// PONG, or v1's NACK: no answer.
    Ignored,
    /// The frame was whole, its payload was not. Answered with a NACK (v1) or ERROR (v2); the connection lives on.
    Malformed(Malformed),
}

/// v1's checks after the layout (`empty topic`, `invalid QoS value`, zero subscription id) are the decoder's too: it reports
/// them as this, in V1.md's order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed {
    pub code: u16,
    pub text: &'static str,
    /// The frame's type: before AUTH, v1 answers a malformed HELLO or AUTH with its own text and anything else with 401.
    pub frame_type: u8,
}

#[derive(Clone, PartialEq, Debug)]
pub enum TopicRef {
    /// 1..=65535 bytes of UTF-8.
    Name(Bytes),
    Alias(u32),
}

#[derive(Clone, PartialEq, Debug)]
pub struct Publish {
    pub topic: TopicRef,
    pub qos: Qos,
    /// v2: answer with a CONFIRM. v1 never sets it; a v1 failure is a NACK 500.
    pub confirm: bool,
    /// `None`: the broker's default. `Some(ZERO)`: never expires.
    pub ttl: Option<Duration>,
    pub delay: Duration,
    /// 0..=9, higher first.
    pub priority: u8,
    pub identity: Option<Identity>,
    /// The end-to-end options (headers, reply-to, message id, priority) exactly as DELIVER carries them:
    /// encoded, without the length. Empty for v1.
    pub options: Bytes,
    pub payload: Bytes,
}

/// What deduplication goes by.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Identity {
    /// 1..=64 bytes chosen by the client.
    MessageId(Bytes),
    /// A sequence this publisher has already stored in the topic is a duplicate.
    Publisher { id: u64, sequence: u64 },
}

#[derive(Clone, PartialEq, Debug)]
pub struct Subscribe {
    pub topic: Bytes,
    pub qos: Qos,
    /// v2: `Some(name)` makes or attaches to a durable subscription.
    pub durable: Option<Bytes>,
    /// v2: most unacknowledged deliveries, 1..=CREDIT_MAX. v1: unused.
    pub credit: u32,
    /// v2: higher is served first.
    pub priority: u8,
    pub start: Start,
    /// v2: how long a delivery may stay unacknowledged; `None`: the broker's default.
    pub ack_timeout: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Messages published from now on.
    New,
    /// And those the topic still keeps for some other subscription.
    Earliest,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RejectAction {
    /// To the front of the queue, at once.
    Requeue,
    /// To the front of the queue when the delay has passed.
    RequeueAfter(Duration),
    /// To the dead-letter topic.
    DeadLetter,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnsubscribeMode {
    /// A durable subscription stays; an ephemeral one ends.
    Detach,
    Delete,
}

/// Inclusive ranges of delivery tags; at least one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TagRanges(pub Vec<(DeliveryTag, DeliveryTag)>);

impl TagRanges {
    pub fn one(tag: DeliveryTag) -> TagRanges {
        TagRanges(vec![(tag, tag)])
    }
}
