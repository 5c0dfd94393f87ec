//! What v1's payloads mean. The order of the checks is part of the protocol (V1.md 2.4): layout, empty topic, QoS.

use bytes::{Buf, Bytes};

use crate::protocol::code::{self, Fault};
use crate::protocol::decoder::string;
use crate::protocol::frame;
use crate::protocol::options::OptionsReader;
use crate::protocol::request::{Publish, RequestKind, Start, Subscribe, TagRanges, TopicRef};
use crate::time::Duration;
use crate::types::{ClientSub, DeliveryTag, Qos};

/// - `frame_type`: one that `frame::is_request` admits.
pub(crate) fn request(frame_type: u8, cid: u64, payload: Bytes) -> RequestKind {
    let kind = match frame_type {
        frame::HELLO => hello(payload),
        frame::AUTH => auth(payload),
        frame::V1_PUBLISH => publish(payload),
        frame::V1_SUBSCRIBE => subscribe(payload),
        frame::V1_ACK => {
            let tags = TagRanges::one(DeliveryTag(cid));
            subscription(payload, code::INVALID_ACK).map(|sub| RequestKind::Ack { sub, tags, confirm: false })
        }
        frame::V1_POLL => subscription(payload, code::INVALID_POLL).map(|sub| RequestKind::Poll { sub }),
        frame::PING => Ok(RequestKind::Ping),
        _ => Ok(RequestKind::Ignored), // PONG, NACK
    };
    kind.unwrap_or_else(|fault| fault.malformed(frame_type))
}

/// Both dialects: `u16 version`, and from version 2 on perhaps options.
pub(crate) fn hello(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let version = payload.try_get_u16().map_err(|_| code::INVALID_HELLO)?;
    if payload.is_empty() {
        return Ok(RequestKind::Hello { version });
    }
    let len = payload.try_get_u16().map_err(|_| code::INVALID_HELLO)?;
    let well_formed = usize::from(len) == payload.len() && OptionsReader::new(&payload).is_well_formed();
    if version >= 2 && well_formed { Ok(RequestKind::Hello { version }) } else { Err(code::INVALID_HELLO) }
}

/// Both dialects: `string key`, nothing after.
pub(crate) fn auth(mut payload: Bytes) -> Result<RequestKind, Fault> {
    match string(&mut payload) {
        Some(key) if payload.is_empty() => Ok(RequestKind::Auth { key }),
        _ => Err(code::INVALID_AUTH),
    }
}

/// `u8 qos | string topic | message`
fn publish(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let qos = payload.try_get_u8().map_err(|_| code::INVALID_PUBLISH)?;
    let topic = string(&mut payload).ok_or(code::INVALID_PUBLISH)?;
    let (topic, qos) = topic_and_qos(topic, qos)?;
    Ok(RequestKind::Publish(Publish {
        topic: TopicRef::Name(topic),
        qos,
        confirm: false,
        ttl: None,
        delay: Duration::ZERO,
        priority: 0,
        identity: None,
        options: Bytes::new(),
        payload,
    }))
}

/// `string topic | u8 qos`; what follows is ignored (B9).
fn subscribe(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let topic = string(&mut payload).ok_or(code::INVALID_SUBSCRIBE)?;
    let qos = payload.try_get_u8().map_err(|_| code::INVALID_SUBSCRIBE)?;
    let (topic, qos) = topic_and_qos(topic, qos)?;
    Ok(RequestKind::Subscribe(Subscribe {
        topic,
        qos,
        durable: None,
        credit: 0,
        priority: 0,
        start: Start::New,
        ack_timeout: None,
    }))
}

/// `u64 subscription`, nothing after
fn subscription(payload: Bytes, invalid: Fault) -> Result<ClientSub, Fault> {
    let sub: [u8; 8] = payload.as_ref().try_into().map_err(|_| invalid)?;
    nonzero(u64::from_be_bytes(sub))
}

pub(crate) fn nonzero(sub: u64) -> Result<ClientSub, Fault> {
    if sub == 0 { Err(code::ZERO_SUBSCRIPTION) } else { Ok(ClientSub(sub)) }
}

/// The checks after the layout, in v1's order.
pub(crate) fn topic_and_qos(topic: Bytes, qos: u8) -> Result<(Bytes, Qos), Fault> {
    if topic.is_empty() {
        return Err(code::EMPTY_TOPIC);
    }
    Ok((topic, Qos::from_byte(qos).ok_or(code::INVALID_QOS)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = Option<(u16, &'static str)>;

    fn fault(frame_type: u8, payload: &'static [u8]) -> Answer {
        match request(frame_type, 1, Bytes::from_static(payload)) {
            RequestKind::Malformed(malformed) => {
                assert_eq!(malformed.frame_type, frame_type);
                Some((malformed.code, malformed.text))
            }
            _ => None,
        }
    }

    #[test]
    fn every_malformed_payload_has_its_own_answer() {
        let hello = Some((400, "invalid HELLO payload"));
        let auth = Some((400, "invalid AUTH payload"));
        let publish = Some((400, "invalid PUBLISH payload"));
        let subscribe = Some((400, "invalid SUBSCRIBE payload"));
        let ack = Some((400, "invalid ACK payload"));
        let poll = Some((400, "invalid POLL payload"));
        let topic = Some((400, "empty topic"));
        let qos = Some((400, "invalid QoS value"));
        let zero = Some((400, "subscription_id must be non-zero"));
        let cases: &[(u8, &'static [u8], Answer)] = &[
            (0x01, b"", hello),
            (0x01, b"\0", hello),
            (0x01, b"\0\x01\0", hello),
            (0x01, b"\0\x01\0\0", hello), // options need version 2
            (0x01, b"\0\x02\0", hello),
            (0x01, b"\0\x02\0\x01", hello),
            (0x01, b"\0\x02\0\x01\x01", hello),
            (0x01, b"\0\x02\0\0\0", hello),
            (0x01, b"\0\x02\0\x03\x01\0\0", None),
            (0x01, b"\0\x02", None),
            (0x01, b"\xff\xff", None), // 426, says the shard
            (0x02, b"", auth),
            (0x02, b"\0", auth),
            (0x02, b"\0\x02a", auth),
            (0x02, b"\0\x01ab", auth),
            (0x02, b"\0\x01\xff", auth),
            (0x02, b"\0\0", None), // 401, says the shard
            (0x03, b"", publish),
            (0x03, b"\x01", publish),
            (0x03, b"\x01\0", publish),
            (0x03, b"\x01\0\x02a", publish),
            (0x03, b"\x01\0\x01\xff", publish),
            (0x03, b"\x07\0\x02a", publish), // layout before QoS
            (0x03, b"\x07\0\0", topic),      // topic before QoS
            (0x03, b"\x02\0\x01a", qos),
            (0x03, b"\x01\0\x01a", None),
            (0x04, b"", subscribe),
            (0x04, b"\0\x01a", subscribe),
            (0x04, b"\0\x02a\x01", subscribe),
            (0x04, b"\0\x01\xff\x01", subscribe),
            (0x04, b"\0\0", subscribe), // layout before topic
            (0x04, b"\0\0\x07", topic), // topic before QoS
            (0x04, b"\0\x01a\x02", qos),
            (0x04, b"\0\x01a\x01", None),
            (0x04, b"\0\x01a\x01extra", None),
            (0x05, b"", ack),
            (0x05, b"\0\0\0\0\0\0\x01", ack),
            (0x05, b"\0\0\0\0\0\0\0\0", zero),
            (0x05, b"\0\0\0\0\0\0\0\0\x01", ack),
            (0x05, b"\0\0\0\0\0\0\0\x01", None),
            (0x06, b"", None),
            (0x07, b"xyz", None),
            (0x08, b"xyz", None),
            (0x09, b"\0\0\0\0\0\0\x01", poll),
            (0x09, b"\0\0\0\0\0\0\0\0", zero),
            (0x09, b"\0\0\0\0\0\0\0\0\x01", poll),
            (0x09, b"\0\0\0\0\0\0\0\x01", None),
        ];
        for (frame_type, payload, expected) in cases {
            assert_eq!(fault(*frame_type, payload), *expected, "type {frame_type:#04x}, payload {payload:02x?}");
        }
    }

    #[test]
    fn an_ack_names_its_delivery_by_correlation_id() {
        let kind = request(frame::V1_ACK, 77, Bytes::from_static(b"\0\0\0\0\0\0\0\x02"));
        let tags = TagRanges::one(DeliveryTag(77));
        assert_eq!(kind, RequestKind::Ack { sub: ClientSub(2), tags, confirm: false });
    }
}
