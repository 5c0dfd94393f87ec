//! What the broker may say. The encoder spells it in the connection's dialect.

use bytes::Bytes;

use crate::types::{ClientSub, CoreId, DeliveryTag, Durability, Lsn, Qos};

#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// v1: ACK with this id (0 for HELLO and AUTH).
    AckV1 {
        cid: u64,
        id: u64,
    },
    /// v1: NACK. v2: ERROR.
    Error {
        cid: u64,
        code: u16,
        text: Bytes,
    },
    /// v2: OK.
    Ok {
        cid: u64,
    },
    /// v2: answer to HELLO.
    Welcome {
        cid: u64,
        welcome: Welcome,
    },
    /// v2: one entry of a CONFIRM frame; the encoder joins consecutive ones into one frame.
    Confirm {
        cid: u64,
        outcome: Outcome,
    },
    /// v2.
    Subscribed {
        cid: u64,
        sub: ClientSub,
        core: CoreId,
        resumed: bool,
        backlog: u64,
    },
    /// v2.
    Aliased {
        cid: u64,
        alias: u32,
        core: CoreId,
    },
    /// v1: PUBLISH with `cid` (tag for QoS1, the POLL's cid for QoS0). v2: DELIVER.
    Deliver(Deliver),
    Pong {
        cid: u64,
    },
    /// v2: the broker asks whether the client is alive.
    Ping {
        cid: u64,
    },
    /// v2: the broker is about to close.
    GoAway {
        code: u16,
        text: Bytes,
    },
}

#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    Stored { level: Durability, position: Lsn },
    Duplicate { level: Durability, position: Lsn },
    Rejected { code: u16, text: Bytes },
}

#[derive(Clone, PartialEq, Debug)]
pub struct Deliver {
    pub sub: ClientSub,
    pub tag: DeliveryTag,
    /// v1 only: the frame's correlation id.
    pub cid: u64,
    pub qos: Qos,
    /// From 1.
    pub attempt: u16,
    /// This or an earlier run of the broker may have delivered it before.
    pub redelivered: bool,
    /// Milliseconds since the Unix epoch.
    pub published_ms: u64,
    /// v1 only.
    pub topic: Bytes,
    pub body: Body,
}

/// A message's end-to-end part, as it lies in the log: `u16 options length | options | payload`.
/// v2 sends it as it is; v1 sends the payload.
#[derive(Clone, PartialEq, Debug)]
pub struct Body(pub Bytes);

impl Body {
    /// Bytes of the encoded options, without their length field.
    pub fn options(&self) -> &[u8] {
        let len = usize::from(u16::from_be_bytes([self.0[0], self.0[1]]));
        &self.0[2..2 + len]
    }

    pub fn payload(&self) -> &[u8] {
        let len = usize::from(u16::from_be_bytes([self.0[0], self.0[1]]));
        &self.0[2 + len..]
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Welcome {
    pub cores: u16,
    pub core: CoreId,
    /// Empty unless each core has its own port.
    pub ports: Vec<u16>,
    pub frame_len_max: u32,
    pub credit_max: u32,
    /// The client should be heard from at least this often; 0: never required.
    pub keepalive_ms: u32,
}
