//! What connections and topics say to each other, whether they live on the same core or not.

use bytes::Bytes;

use crate::protocol::reply::{Deliver, Outcome};
use crate::protocol::request::{Identity, RejectAction, Subscribe, TagRanges, UnsubscribeMode, Version};
use crate::time::Duration;
use crate::types::{ClientSub, ConnId, Qos, SubId};
use crate::wal::record::KeyId;

/// From a connection to the core that owns the topic.
#[derive(Clone, Debug)]
pub enum Ask {
    Publish(Box<AskPublish>),
    Subscribe(Box<AskSubscribe>),
    /// v1. Answered by a delivery or by `Tell::Settled`.
    Poll {
        who: Consumer,
        sub: SubId,
        cid: u64,
    },
    Ack {
        who: Consumer,
        sub: SubId,
        tags: TagRanges,
        answer: AckAnswer,
    },
    Reject {
        who: Consumer,
        sub: SubId,
        tags: TagRanges,
        action: RejectAction,
    },
    Credit {
        who: Consumer,
        sub: SubId,
        credit: u32,
    },
    /// `cid`: an OK is wanted.
    Unsubscribe {
        who: Consumer,
        sub: SubId,
        mode: UnsubscribeMode,
        cid: Option<u64>,
    },
    /// v1: answered by `Tell::Passed` when all that the connection has asked here before is as durable as the policy says.
    Barrier {
        conn: ConnId,
    },
    /// These deliveries have left for the socket: the consumer's window opens again.
    Taken {
        who: Consumer,
        sub: SubId,
        messages: u32,
        bytes: u32,
    },
}

#[derive(Clone, Debug)]
pub struct AskPublish {
    pub conn: ConnId,
    pub cid: u64,
    pub version: Version,
    pub confirm: bool,
    pub topic: Bytes,
    pub qos: Qos,
    pub ttl: Option<Duration>,
    pub delay: Duration,
    pub priority: u8,
    pub identity: Option<Identity>,
    pub options: Bytes,
    pub payload: Bytes,
}

impl AskPublish {
    /// What it costs of the byte budget between two cores.
    pub fn weight(&self) -> usize {
        self.topic.len() + self.options.len() + self.payload.len() + 128
    }
}

#[derive(Clone, Debug)]
pub struct AskSubscribe {
    pub who: Consumer,
    pub cid: u64,
    pub version: Version,
    pub key: KeyId,
    pub subscribe: Subscribe,
}

/// One consumer: a subscription as one connection knows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Consumer {
    pub conn: ConnId,
    pub sub: ClientSub,
}

/// How an ACK wants to be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AckAnswer {
    /// v1: nothing, or NACK 404 with this correlation id.
    V1 {
        cid: u64,
    },
    /// v2: OK once it is durable, or ERROR 404.
    Confirm {
        cid: u64,
    },
    None,
}

/// From a topic's core to a connection.
#[derive(Clone, Debug)]
pub enum Tell {
    Deliver {
        conn: ConnId,
        deliver: Deliver,
    },
    Confirm {
        conn: ConnId,
        cid: u64,
        outcome: Outcome,
    },
    Subscribed {
        who: Consumer,
        cid: u64,
        sub: SubId,
        resumed: bool,
        backlog: u64,
    },
    /// The subscription could not be made.
    Refused {
        who: Consumer,
        cid: u64,
        code: u16,
        text: Bytes,
    },
    Error {
        conn: ConnId,
        cid: u64,
        code: u16,
        text: Bytes,
    },
    Ok {
        conn: ConnId,
        cid: u64,
    },
    /// v1: the POLL was parked, or the ACK was good: the next request may be looked at.
    Settled {
        conn: ConnId,
    },
    /// v1: the answer to `Ask::Barrier`.
    Passed {
        conn: ConnId,
    },
    /// The subscription is gone (its topic's queue ended): deliveries will not come any more.
    Ended {
        who: Consumer,
    },
}

impl Tell {
    pub fn conn(&self) -> ConnId {
        match self {
            Tell::Deliver { conn, .. }
            | Tell::Confirm { conn, .. }
            | Tell::Error { conn, .. }
            | Tell::Ok { conn, .. }
            | Tell::Passed { conn }
            | Tell::Settled { conn } => *conn,
            Tell::Subscribed { who, .. } | Tell::Refused { who, .. } | Tell::Ended { who } => who.conn,
        }
    }
}

/// All that one turn of a core has for another: one push, at most one wake-up.
#[derive(Debug, Default)]
pub struct CoreBatch {
    pub asks: Vec<Ask>,
    pub tells: Vec<Tell>,
    /// Room given back for forwarded requests that are done with.
    pub released: u32,
    pub released_bytes: u64,
}

impl CoreBatch {
    pub fn is_empty(&self) -> bool {
        self.asks.is_empty() && self.tells.is_empty() && self.released == 0
    }
}
