//! The other end of the wire: requests to bytes, bytes to replies. For the client library, the bench and the tools.
//!
//! Owns: the layout of everything a client sends. Never: decides what a reply means to whom.

use bytes::{Buf, Bytes, BytesMut};

use crate::limits::{FRAME_LEN_MAX, OPTIONS_LEN_MAX, TOPIC_NAME_MAX};
use crate::protocol::decoder::{Frame, FrameBuffer, string};
use crate::protocol::frame::{self, DELIVER_EXCESS_MAX, FrameError, LENGTH_LEN};
use crate::protocol::options::{self, OptionsBuilder, OptionsReader, OptionsTooLong};
use crate::protocol::reply::{Body, Deliver, Outcome, Reply, Welcome};
use crate::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode,
    Version,
};
use crate::types::{ClientSub, CoreId, DeliveryTag, Durability, Lsn, Qos};

/// Why a request cannot be sent. Nothing was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("protocol {0:?} has no frame for this")]
    NotInVersion(Version),
    #[error("a topic or key is longer than {TOPIC_NAME_MAX} bytes")]
    StringTooLong,
    #[error(transparent)]
    OptionsTooLong(#[from] OptionsTooLong),
    #[error("the frame would be {len} bytes long, more than {FRAME_LEN_MAX}")]
    FrameTooLong { len: usize },
}

/// Appends `request` to `out`.
///
/// - `RequestKind::Ignored` is sent as PONG, which is what a client has to answer to PING.
/// - v1's ACK is the frame whose correlation id is the tag; `request.cid` is unused, and there is one frame per tag.
/// - PUBLISH: message id and priority are sent if they are in the fields or in `options`.
pub fn encode_request(request: &Request, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let before = out.len();
    let result = match version {
        Version::V1 => request_v1(request, out),
        Version::V2 => request_v2(request, out),
    };
    if result.is_err() {
        out.truncate(before);
    }
    result
}

fn request_v1(Request { cid, kind }: &Request, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let unspeakable = Err(EncodeError::NotInVersion(Version::V1));
    match kind {
        RequestKind::Publish(publish) => {
            let TopicRef::Name(topic) = &publish.topic else { return unspeakable };
            let start = frame::begin(frame::V1_PUBLISH, *cid, out);
            out.push(publish.qos as u8);
            put_string(topic, out)?;
            out.extend_from_slice(&publish.payload);
            finish(start, out)
        }
        RequestKind::Subscribe(subscribe) => {
            let start = frame::begin(frame::V1_SUBSCRIBE, *cid, out);
            put_string(&subscribe.topic, out)?;
            out.push(subscribe.qos as u8);
            finish(start, out)
        }
        RequestKind::Ack { sub, tags, confirm: false } => {
            for &(first, last) in &tags.0 {
                for tag in first.0..=last.0 {
                    out.extend_from_slice(&frame::header(frame::V1_ACK, tag, 8));
                    out.extend_from_slice(&sub.0.to_be_bytes());
                }
            }
            Ok(())
        }
        RequestKind::Poll { sub } => {
            out.extend_from_slice(&frame::header(frame::V1_POLL, *cid, 8));
            out.extend_from_slice(&sub.0.to_be_bytes());
            Ok(())
        }
        _ => request_of_both(*cid, kind, Version::V1, out),
    }
}

fn request_v2(Request { cid, kind }: &Request, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    match kind {
        RequestKind::Publish(publish) => publish_v2(*cid, publish, out),
        RequestKind::Subscribe(subscribe) => subscribe_v2(*cid, subscribe, out),
        RequestKind::Alias { alias, topic } => {
            let start = frame::begin(frame::ALIAS, *cid, out);
            out.extend_from_slice(&alias.to_be_bytes());
            put_string(topic, out)?;
            finish(start, out)
        }
        RequestKind::Ack { sub, tags, confirm } => {
            let start = frame::begin(frame::ACK, *cid, out);
            out.extend_from_slice(&sub.0.to_be_bytes());
            out.push(if *confirm { frame::ACK_CONFIRM } else { 0 });
            put_ranges(tags, out);
            finish(start, out)
        }
        RequestKind::Reject { sub, tags, action } => {
            let (action, delay_ms) = match action {
                RejectAction::Requeue => (0, 0),
                RejectAction::RequeueAfter(delay) => (1, u32::try_from(delay.as_millis()).unwrap_or(u32::MAX)),
                RejectAction::DeadLetter => (2, 0),
            };
            let start = frame::begin(frame::REJECT, *cid, out);
            out.extend_from_slice(&sub.0.to_be_bytes());
            out.push(action);
            out.extend_from_slice(&delay_ms.to_be_bytes());
            put_ranges(tags, out);
            finish(start, out)
        }
        RequestKind::Credit { sub, credit } => {
            out.extend_from_slice(&frame::header(frame::CREDIT, *cid, 12));
            out.extend_from_slice(&sub.0.to_be_bytes());
            out.extend_from_slice(&credit.to_be_bytes());
            Ok(())
        }
        RequestKind::Unsubscribe { sub, mode } => {
            out.extend_from_slice(&frame::header(frame::UNSUBSCRIBE, *cid, 9));
            out.extend_from_slice(&sub.0.to_be_bytes());
            out.push(match mode {
                UnsubscribeMode::Detach => 0,
                UnsubscribeMode::Delete => 1,
            });
            Ok(())
        }
        _ => request_of_both(*cid, kind, Version::V2, out),
    }
}

fn request_of_both(cid: u64, kind: &RequestKind, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = match kind {
        RequestKind::Hello { version } => {
            let start = frame::begin(frame::HELLO, cid, out);
            out.extend_from_slice(&version.to_be_bytes());
            start
        }
        RequestKind::Auth { key } => {
            let start = frame::begin(frame::AUTH, cid, out);
            put_string(key, out)?;
            start
        }
        RequestKind::Ping => frame::begin(frame::PING, cid, out),
        RequestKind::Ignored => frame::begin(frame::PONG, cid, out),
        _ => return Err(EncodeError::NotInVersion(version)),
    };
    finish(start, out)
}

fn publish_v2(cid: u64, publish: &Publish, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut flags = 0;
    if publish.confirm {
        flags |= frame::PUBLISH_CONFIRM;
    }
    if matches!(publish.topic, TopicRef::Alias(_)) {
        flags |= frame::PUBLISH_BY_ALIAS;
    }
    out.reserve(128 + publish.options.len() + publish.payload.len());
    let start = frame::begin(frame::PUBLISH, cid, out);
    out.extend_from_slice(&[flags, publish.qos as u8]);
    match &publish.topic {
        TopicRef::Name(topic) => put_string(topic, out)?,
        TopicRef::Alias(alias) => out.extend_from_slice(&alias.to_be_bytes()),
    }
    let block = begin_options(out);
    if let Some(ttl) = publish.ttl {
        put_option(options::TTL, &ttl.as_millis().to_be_bytes(), out);
    }
    if publish.delay.as_millis() != 0 {
        put_option(options::DELAY, &publish.delay.as_millis().to_be_bytes(), out);
    }
    let given = |tag| OptionsReader::new(&publish.options).any(|(given, _)| given == tag);
    match &publish.identity {
        Some(Identity::Publisher { id, sequence }) => {
            let both = u128::from(*id) << 64 | u128::from(*sequence);
            put_option(options::PUBLISHER, &both.to_be_bytes(), out);
        }
        Some(Identity::MessageId(id)) if !given(options::MESSAGE_ID) => put_option(options::MESSAGE_ID, id, out),
        _ => {}
    }
    if publish.priority != 0 && !given(options::PRIORITY) {
        put_option(options::PRIORITY, &[publish.priority], out);
    }
    out.extend_from_slice(&publish.options);
    finish_options(block, out)?;
    out.extend_from_slice(&publish.payload);
    finish(start, out)
}

fn subscribe_v2(cid: u64, subscribe: &Subscribe, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut entries = OptionsBuilder::new();
    if let Some(name) = &subscribe.durable {
        entries = entries.bytes(options::SUBSCRIBE_DURABLE, name);
    }
    if subscribe.priority != 0 {
        entries = entries.u8(options::SUBSCRIBE_PRIORITY, subscribe.priority);
    }
    if subscribe.start == Start::Earliest {
        entries = entries.u8(options::SUBSCRIBE_START, 1);
    }
    if let Some(timeout) = subscribe.ack_timeout {
        let ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        entries = entries.u32(options::SUBSCRIBE_ACK_TIMEOUT, ms);
    }
    let entries = entries.finish()?;
    let start = frame::begin(frame::SUBSCRIBE, cid, out);
    out.push(subscribe.qos as u8);
    out.extend_from_slice(&subscribe.credit.to_be_bytes());
    put_string(&subscribe.topic, out)?;
    out.extend_from_slice(&(entries.len() as u16).to_be_bytes());
    out.extend_from_slice(&entries);
    finish(start, out)
}

fn put_string(text: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let len = u16::try_from(text.len()).map_err(|_| EncodeError::StringTooLong)?;
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text);
    Ok(())
}

fn put_ranges(tags: &TagRanges, out: &mut Vec<u8>) {
    for &(first, last) in &tags.0 {
        out.extend_from_slice(&first.0.to_be_bytes());
        out.extend_from_slice(&last.0.to_be_bytes());
    }
}

/// Begins a block of options; returns where its length goes.
fn begin_options(out: &mut Vec<u8>) -> usize {
    out.extend_from_slice(&[0, 0]);
    out.len()
}

/// - `value`: at most `u16::MAX` bytes, or the block is too long and `finish_options` says so.
fn put_option(tag: u8, value: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

fn finish_options(block: usize, out: &mut [u8]) -> Result<(), OptionsTooLong> {
    let len = out.len() - block;
    if len > OPTIONS_LEN_MAX {
        return Err(OptionsTooLong);
    }
    out[block - 2..block].copy_from_slice(&(len as u16).to_be_bytes());
    Ok(())
}

fn finish(start: usize, out: &mut [u8]) -> Result<(), EncodeError> {
    let len = out.len() - start - LENGTH_LEN;
    if len > FRAME_LEN_MAX as usize {
        return Err(EncodeError::FrameTooLong { len });
    }
    frame::finish(start, out);
    Ok(())
}

/// What the broker sent makes no sense: give up the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplyError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the payload of frame type {frame_type:#04x} is malformed")]
    Malformed { frame_type: u8 },
}

/// One connection's replies, however the stream is split.
#[derive(Debug)]
pub struct ReplyDecoder {
    version: Version,
    frames: FrameBuffer,
    /// Entries of a CONFIRM frame that were not given out yet.
    confirms: Bytes,
}

impl ReplyDecoder {
    pub fn new(version: Version) -> ReplyDecoder {
        ReplyDecoder { version, frames: FrameBuffer::default(), confirms: Bytes::new() }
    }

    pub fn push(&mut self, bytes: Bytes) {
        self.frames.push(bytes);
    }

    /// The next reply that is there as a whole; one per entry of a CONFIRM frame.
    pub fn next_reply(&mut self) -> Result<Option<Reply>, ReplyError> {
        let version = self.version;
        loop {
            if !self.confirms.is_empty() {
                let entry = confirm(&mut self.confirms);
                return entry.ok_or(ReplyError::Malformed { frame_type: frame::CONFIRM }).map(Some);
            }
            let len_max = FRAME_LEN_MAX + DELIVER_EXCESS_MAX;
            let known = |frame_type| frame::is_reply(version, frame_type);
            let Some(Frame { frame_type, cid, payload }) = self.frames.next(len_max, known)? else { return Ok(None) };
            if frame_type == frame::CONFIRM {
                self.confirms = payload;
                continue;
            }
            let reply = reply(frame_type, cid, payload).ok_or(ReplyError::Malformed { frame_type })?;
            return Ok(Some(reply));
        }
    }
}

fn reply(frame_type: u8, cid: u64, mut payload: Bytes) -> Option<Reply> {
    let reply = match frame_type {
        frame::V1_ACK => Reply::AckV1 { cid, id: payload.try_get_u64().ok()? },
        frame::V1_NACK | frame::ERROR => {
            Reply::Error { cid, code: payload.try_get_u16().ok()?, text: string(&mut payload)? }
        }
        frame::GOAWAY => Reply::GoAway { code: payload.try_get_u16().ok()?, text: string(&mut payload)? },
        frame::V1_PUBLISH => return deliver_v1(cid, payload),
        frame::DELIVER => return deliver(payload),
        frame::PING => return Some(Reply::Ping { cid }),
        frame::PONG => return Some(Reply::Pong { cid }),
        frame::OK => {
            options_block(&mut payload)?;
            Reply::Ok { cid }
        }
        frame::WELCOME => Reply::Welcome { cid, welcome: welcome(&mut payload)? },
        frame::SUBSCRIBED => {
            let sub = ClientSub(payload.try_get_u64().ok()?);
            let core = CoreId(payload.try_get_u16().ok()?);
            let resumed = payload.try_get_u8().ok()? != 0;
            let backlog = payload.try_get_u64().ok()?;
            options_block(&mut payload)?;
            Reply::Subscribed { cid, sub, core, resumed, backlog }
        }
        frame::ALIASED => {
            Reply::Aliased { cid, alias: payload.try_get_u32().ok()?, core: CoreId(payload.try_get_u16().ok()?) }
        }
        _ => return None,
    };
    payload.is_empty().then_some(reply)
}

fn deliver(mut payload: Bytes) -> Option<Reply> {
    let sub = ClientSub(payload.try_get_u64().ok()?);
    let tag = DeliveryTag(payload.try_get_u64().ok()?);
    let attempt = payload.try_get_u16().ok()?;
    let flags = payload.try_get_u8().ok()?;
    let published_ms = payload.try_get_u64().ok()?;
    let body = Body(payload.clone());
    options_block(&mut payload)?;
    Some(Reply::Deliver(Deliver {
        sub,
        tag,
        cid: 0,
        qos: if flags & frame::DELIVER_QOS1 == 0 { Qos::AtMostOnce } else { Qos::AtLeastOnce },
        attempt,
        redelivered: flags & frame::DELIVER_REDELIVERED != 0,
        published_ms,
        topic: Bytes::new(),
        body,
    }))
}

/// v1 does not say which subscription or attempt it is: those are 0. The tag is 0 for QoS0.
fn deliver_v1(cid: u64, mut payload: Bytes) -> Option<Reply> {
    let qos = Qos::from_byte(payload.try_get_u8().ok()?)?;
    let topic = string(&mut payload)?;
    let mut body = BytesMut::with_capacity(2 + payload.len());
    body.extend_from_slice(&[0, 0]);
    body.extend_from_slice(&payload);
    Some(Reply::Deliver(Deliver {
        sub: ClientSub(0),
        tag: DeliveryTag(if qos == Qos::AtLeastOnce { cid } else { 0 }),
        cid,
        qos,
        attempt: 0,
        redelivered: false,
        published_ms: 0,
        topic,
        body: Body(body.freeze()),
    }))
}

fn welcome(payload: &mut Bytes) -> Option<Welcome> {
    let _version = payload.try_get_u16().ok()?;
    let cores = payload.try_get_u16().ok()?;
    let core = CoreId(payload.try_get_u16().ok()?);
    let entries = options_block(payload)?;
    let mut welcome =
        Welcome { cores, core, ports: Vec::new(), frame_len_max: FRAME_LEN_MAX, credit_max: 1, keepalive_ms: 0 };
    for (tag, value) in OptionsReader::new(&entries) {
        let u32_value = || Some(u32::from_be_bytes(value.try_into().ok()?));
        match tag {
            options::WELCOME_FRAME_MAX => welcome.frame_len_max = u32_value()?,
            options::WELCOME_CREDIT_MAX => welcome.credit_max = u32_value()?,
            options::WELCOME_KEEPALIVE => welcome.keepalive_ms = u32_value()?,
            options::WELCOME_CORE_PORTS => {
                let (ports, rest) = value.as_chunks::<2>();
                rest.is_empty().then_some(())?;
                welcome.ports = ports.iter().map(|port| u16::from_be_bytes(*port)).collect();
            }
            _ => {}
        }
    }
    Some(welcome)
}

fn confirm(entries: &mut Bytes) -> Option<Reply> {
    let cid = entries.try_get_u64().ok()?;
    let status = entries.try_get_u8().ok()?;
    if status == frame::CONFIRM_REJECTED {
        let code = entries.try_get_u16().ok()?;
        return Some(Reply::Confirm { cid, outcome: Outcome::Rejected { code, text: string(entries)? } });
    }
    let level = match entries.try_get_u8().ok()? {
        0 => Durability::Memory,
        1 => Durability::Written,
        2 => Durability::Synced,
        _ => return None,
    };
    let position = Lsn(entries.try_get_u64().ok()?);
    let outcome = match status {
        frame::CONFIRM_STORED => Outcome::Stored { level, position },
        frame::CONFIRM_DUPLICATE => Outcome::Duplicate { level, position },
        _ => return None,
    };
    Some(Reply::Confirm { cid, outcome })
}

/// Takes `u16 length | entries` and returns the entries, if they are well-formed.
fn options_block(payload: &mut Bytes) -> Option<Bytes> {
    let len = usize::from(payload.try_get_u16().ok()?);
    if len > payload.len() {
        return None;
    }
    let entries = payload.split_to(len);
    OptionsReader::new(&entries).is_well_formed().then_some(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::Duration;

    fn publish() -> Publish {
        Publish {
            topic: TopicRef::Name(Bytes::from_static(b"demo")),
            qos: Qos::AtLeastOnce,
            confirm: true,
            ttl: None,
            delay: Duration::ZERO,
            priority: 0,
            identity: None,
            options: Bytes::new(),
            payload: Bytes::new(),
        }
    }

    fn encode(kind: RequestKind, version: Version) -> Result<Vec<u8>, EncodeError> {
        let mut out = b"before".to_vec();
        let result = encode_request(&Request { cid: 1, kind }, version, &mut out);
        assert!(result.is_ok() || out == b"before", "a failure leaves nothing");
        result.map(|()| out.split_off(6))
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        let v1 = EncodeError::NotInVersion(Version::V1);
        let credit = RequestKind::Credit { sub: ClientSub(1), credit: 1 };
        assert_eq!(encode(credit, Version::V1), Err(v1));
        let by_alias = Publish { topic: TopicRef::Alias(1), ..publish() };
        assert_eq!(encode(RequestKind::Publish(by_alias), Version::V1), Err(v1));
        let poll = RequestKind::Poll { sub: ClientSub(1) };
        assert_eq!(encode(poll, Version::V2), Err(EncodeError::NotInVersion(Version::V2)));

        let long_topic = Publish { topic: TopicRef::Name(vec![b'a'; 65_536].into()), ..publish() };
        let long_options = Publish { options: vec![0; OPTIONS_LEN_MAX + 1].into(), ..publish() };
        let overhead = 9 + 2 + 6 + 2;
        let at = |len: usize| Publish { payload: vec![0; len].into(), ..publish() };
        let most = FRAME_LEN_MAX as usize - overhead;
        assert_eq!(encode(RequestKind::Publish(long_topic), Version::V2), Err(EncodeError::StringTooLong));
        assert_eq!(encode(RequestKind::Publish(long_options), Version::V2), Err(OptionsTooLong.into()));
        assert_eq!(encode(RequestKind::Publish(at(most)), Version::V2).map(|out| out.len()), Ok(16 * 1024 * 1024 + 4));
        let too_long = EncodeError::FrameTooLong { len: 16 * 1024 * 1024 + 1 };
        assert_eq!(encode(RequestKind::Publish(at(most + 1)), Version::V2), Err(too_long));
    }

    #[test]
    fn identity_and_priority_are_sent_once_wherever_they_are_given() {
        let fields =
            Publish { priority: 3, identity: Some(Identity::MessageId(Bytes::from_static(b"m"))), ..publish() };
        let entries = OptionsBuilder::new().bytes(options::MESSAGE_ID, b"m").u8(options::PRIORITY, 3).finish();
        let both = Publish { options: entries.expect("short"), ..fields.clone() };
        let sent = encode(RequestKind::Publish(fields), Version::V2);
        assert!(sent.is_ok());
        assert_eq!(sent, encode(RequestKind::Publish(both), Version::V2));
    }

    #[test]
    fn v1_acknowledges_every_tag_of_a_range_by_itself() {
        let tags = TagRanges(vec![(DeliveryTag(3), DeliveryTag(4))]);
        let out = encode(RequestKind::Ack { sub: ClientSub(2), tags, confirm: false }, Version::V1);
        let frame = |tag| [&frame::header(frame::V1_ACK, tag, 8)[..], &2u64.to_be_bytes()].concat();
        assert_eq!(out, Ok([frame(3), frame(4)].concat()));
    }

    proptest! {
        #[test]
        fn garbage_from_a_broker_never_panics(
            frame_type in 0..=0x1fu8,
            payload in proptest::collection::vec(prop_oneof![0..4u8, any::<u8>()], 0..60),
            v1: bool,
        ) {
            let version = if v1 { Version::V1 } else { Version::V2 };
            let mut decoder = ReplyDecoder::new(version);
            decoder.push([&frame::header(frame_type, 1, payload.len())[..], &payload].concat().into());
            while let Ok(Some(_)) = decoder.next_reply() {}
        }
    }
}
