//! What v2's payloads mean. Checks go as in v1 (layout, empty topic, QoS), then the values of the frame's own fields.

use bytes::{Buf, Bytes};

use crate::limits::{ACK_RANGES_MAX, CREDIT_MAX, DURABLE_NAME_MAX, MESSAGE_ID_MAX, OPTIONS_LEN_MAX, PRIORITY_MAX};
use crate::protocol::code::{self, Fault};
use crate::protocol::decoder::string;
use crate::protocol::frame;
use crate::protocol::options::{self, ENTRY_HEADER_LEN, OptionsReader, split_header};
use crate::protocol::request::{
    Identity, Publish, RejectAction, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode,
};
use crate::protocol::v1;
use crate::time::Duration;
use crate::types::{ClientSub, DeliveryTag, Qos};

/// - `frame_type`: one that `frame::is_request` admits.
pub(crate) fn request(frame_type: u8, payload: Bytes) -> RequestKind {
    let kind = match frame_type {
        frame::HELLO => v1::hello(payload),
        frame::AUTH => v1::auth(payload),
        frame::PUBLISH => publish(payload).map(RequestKind::Publish),
        frame::SUBSCRIBE => subscribe(payload).map(RequestKind::Subscribe),
        frame::ACK => ack(payload),
        frame::REJECT => reject(payload),
        frame::CREDIT => credit(payload),
        frame::UNSUBSCRIBE => unsubscribe(payload),
        frame::ALIAS => alias(payload),
        frame::PING => Ok(RequestKind::Ping),
        _ => Ok(RequestKind::Ignored), // PONG
    };
    kind.unwrap_or_else(|fault| fault.malformed(frame_type))
}

/// `u8 flags | u8 qos | string topic or u32 alias | options | message`
fn publish(mut payload: Bytes) -> Result<Publish, Fault> {
    let invalid = code::INVALID_PUBLISH;
    let flags = payload.try_get_u8().map_err(|_| invalid)?;
    if flags & !(frame::PUBLISH_CONFIRM | frame::PUBLISH_BY_ALIAS) != 0 {
        return Err(invalid);
    }
    let qos = payload.try_get_u8().map_err(|_| invalid)?;
    let topic = if flags & frame::PUBLISH_BY_ALIAS == 0 {
        TopicRef::Name(string(&mut payload).ok_or(invalid)?)
    } else {
        TopicRef::Alias(payload.try_get_u32().map_err(|_| invalid)?)
    };
    let entries = options_block(&mut payload, invalid)?;
    if topic == TopicRef::Name(Bytes::new()) {
        return Err(code::EMPTY_TOPIC);
    }
    let mut publish = Publish {
        topic,
        qos: Qos::from_byte(qos).ok_or(code::INVALID_QOS)?,
        confirm: flags & frame::PUBLISH_CONFIRM != 0,
        ttl: None,
        delay: Duration::ZERO,
        priority: 0,
        identity: None,
        options: Bytes::new(),
        payload,
    };
    if !entries.is_empty() {
        publish_options(entries, &mut publish)?;
    }
    Ok(publish)
}

/// Reads `entries` into the fields of `publish`; what travels on to the consumer stays encoded, in `publish.options`.
fn publish_options(entries: Bytes, publish: &mut Publish) -> Result<(), Fault> {
    let mut kept = Kept::default();
    let mut seen = Seen::default();
    let mut reader = OptionsReader::new(&entries);
    let mut start = 0;
    while let Some((tag, value)) = reader.next() {
        let end = entries.len() - reader.remaining();
        if tag != options::HEADER {
            seen.once(tag)?;
        }
        match tag {
            options::TTL => publish.ttl = Some(Duration::from_millis(u64::from_be_bytes(fixed(value)?))),
            options::DELAY => publish.delay = Duration::from_millis(u64::from_be_bytes(fixed(value)?)),
            options::PUBLISHER => {
                let both = u128::from_be_bytes(fixed(value)?);
                let id = Identity::Publisher { id: (both >> 64) as u64, sequence: both as u64 };
                set_identity(publish, id)?;
            }
            options::MESSAGE_ID => {
                if !(1..=MESSAGE_ID_MAX).contains(&value.len()) {
                    return Err(code::INVALID_OPTION);
                }
                set_identity(publish, Identity::MessageId(entries.slice_ref(value)))?;
            }
            options::PRIORITY => {
                let [priority] = fixed(value)?;
                if priority > PRIORITY_MAX {
                    return Err(code::INVALID_PRIORITY);
                }
                publish.priority = priority;
            }
            options::HEADER => drop(split_header(value).ok_or(code::INVALID_OPTION)?),
            options::REPLY_TO => drop(std::str::from_utf8(value).map_err(|_| code::INVALID_OPTION)?),
            _ => {}
        }
        if matches!(tag, options::MESSAGE_ID | options::PRIORITY | options::HEADER | options::REPLY_TO) {
            kept.add(&entries, start, end);
        }
        start = end;
    }
    publish.options = kept.finish(&entries);
    Ok(())
}

fn set_identity(publish: &mut Publish, identity: Identity) -> Result<(), Fault> {
    match publish.identity.replace(identity) {
        None => Ok(()),
        Some(_) => Err(code::TWO_IDENTITIES),
    }
}

/// The entries that travel on: a slice as long as they lie side by side, a copy once they do not.
#[derive(Default)]
struct Kept {
    slice: std::ops::Range<usize>,
    copy: Vec<u8>,
}

impl Kept {
    fn add(&mut self, entries: &[u8], start: usize, end: usize) {
        if !self.copy.is_empty() {
            self.copy.extend_from_slice(&entries[start..end]);
        } else if self.slice.is_empty() {
            self.slice = start..end;
        } else if self.slice.end == start {
            self.slice.end = end;
        } else {
            self.copy.reserve(entries.len() - ENTRY_HEADER_LEN);
            self.copy.extend_from_slice(&entries[self.slice.clone()]);
            self.copy.extend_from_slice(&entries[start..end]);
        }
    }

    fn finish(self, entries: &Bytes) -> Bytes {
        if self.copy.is_empty() { entries.slice(self.slice) } else { Bytes::from(self.copy) }
    }
}

/// Which tags occurred.
#[derive(Default)]
struct Seen([u128; 2]);

impl Seen {
    fn once(&mut self, tag: u8) -> Result<(), Fault> {
        let (word, bit) = (usize::from(tag >> 7), 1 << (tag & 127));
        if self.0[word] & bit != 0 {
            return Err(code::REPEATED_OPTION);
        }
        self.0[word] |= bit;
        Ok(())
    }
}

/// `u8 qos | u32 credit | string topic | options`
fn subscribe(mut payload: Bytes) -> Result<Subscribe, Fault> {
    let invalid = code::INVALID_SUBSCRIBE;
    let qos = payload.try_get_u8().map_err(|_| invalid)?;
    let credit = payload.try_get_u32().map_err(|_| invalid)?;
    let topic = string(&mut payload).ok_or(invalid)?;
    let entries = options_block(&mut payload, invalid)?;
    if !payload.is_empty() {
        return Err(invalid);
    }
    let (topic, qos) = v1::topic_and_qos(topic, qos)?;
    if qos == Qos::AtLeastOnce && !(1..=CREDIT_MAX).contains(&credit) {
        return Err(code::INVALID_CREDIT_VALUE);
    }
    let mut subscribe =
        Subscribe { topic, qos, durable: None, credit, priority: 0, start: Start::New, ack_timeout: None };
    let mut seen = Seen::default();
    for (tag, value) in OptionsReader::new(&entries) {
        seen.once(tag)?;
        match tag {
            options::SUBSCRIBE_DURABLE => {
                if !(1..=DURABLE_NAME_MAX).contains(&value.len()) || std::str::from_utf8(value).is_err() {
                    return Err(code::INVALID_OPTION);
                }
                subscribe.durable = Some(entries.slice_ref(value));
            }
            options::SUBSCRIBE_PRIORITY => [subscribe.priority] = fixed(value)?,
            options::SUBSCRIBE_START => {
                subscribe.start = match fixed(value)? {
                    [0] => Start::New,
                    [1] => Start::Earliest,
                    _ => return Err(code::INVALID_OPTION),
                }
            }
            options::SUBSCRIBE_ACK_TIMEOUT => {
                let ms = u32::from_be_bytes(fixed(value)?);
                subscribe.ack_timeout = (ms != 0).then(|| Duration::from_millis(ms.into()));
            }
            _ => {}
        }
    }
    Ok(subscribe)
}

/// `u64 subscription | u8 flags | ranges`
fn ack(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let sub = payload.try_get_u64().map_err(|_| code::INVALID_ACK)?;
    let flags = payload.try_get_u8().map_err(|_| code::INVALID_ACK)?;
    if flags & !frame::ACK_CONFIRM != 0 {
        return Err(code::INVALID_ACK);
    }
    let (sub, tags) = sub_and_ranges(sub, &payload, code::INVALID_ACK)?;
    Ok(RequestKind::Ack { sub, tags, confirm: flags & frame::ACK_CONFIRM != 0 })
}

/// `u64 subscription | u8 action | u32 delay | ranges`
fn reject(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let sub = payload.try_get_u64().map_err(|_| code::INVALID_REJECT)?;
    let action = payload.try_get_u8().map_err(|_| code::INVALID_REJECT)?;
    let delay_ms = payload.try_get_u32().map_err(|_| code::INVALID_REJECT)?;
    let action = match action {
        0 => RejectAction::Requeue,
        1 => RejectAction::RequeueAfter(Duration::from_millis(delay_ms.into())),
        2 => RejectAction::DeadLetter,
        _ => return Err(code::INVALID_REJECT),
    };
    let (sub, tags) = sub_and_ranges(sub, &payload, code::INVALID_REJECT)?;
    Ok(RequestKind::Reject { sub, tags, action })
}

/// `u64 subscription | u32 credit`. 0 is allowed here: it pauses.
fn credit(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let sub = payload.try_get_u64().map_err(|_| code::INVALID_CREDIT)?;
    let credit = payload.try_get_u32().map_err(|_| code::INVALID_CREDIT)?;
    if !payload.is_empty() {
        return Err(code::INVALID_CREDIT);
    }
    let sub = v1::nonzero(sub)?;
    if credit > CREDIT_MAX {
        return Err(code::INVALID_CREDIT_VALUE);
    }
    Ok(RequestKind::Credit { sub, credit })
}

/// `u64 subscription | u8 mode`
fn unsubscribe(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let sub = payload.try_get_u64().map_err(|_| code::INVALID_UNSUBSCRIBE)?;
    let mode = match payload.as_ref() {
        [0] => UnsubscribeMode::Detach,
        [1] => UnsubscribeMode::Delete,
        _ => return Err(code::INVALID_UNSUBSCRIBE),
    };
    Ok(RequestKind::Unsubscribe { sub: v1::nonzero(sub)?, mode })
}

/// `u32 alias | string topic`
fn alias(mut payload: Bytes) -> Result<RequestKind, Fault> {
    let alias = payload.try_get_u32().map_err(|_| code::INVALID_ALIAS)?;
    match string(&mut payload) {
        Some(topic) if !payload.is_empty() || topic.is_empty() => {
            Err(if payload.is_empty() { code::EMPTY_TOPIC } else { code::INVALID_ALIAS })
        }
        Some(topic) => Ok(RequestKind::Alias { alias, topic }),
        None => Err(code::INVALID_ALIAS),
    }
}

/// At least one `u64 first | u64 last`, to the end of the payload.
fn sub_and_ranges(sub: u64, ranges: &[u8], invalid: Fault) -> Result<(ClientSub, TagRanges), Fault> {
    let (ranges, rest) = ranges.as_chunks::<16>();
    if ranges.is_empty() || !rest.is_empty() {
        return Err(invalid);
    }
    let sub = v1::nonzero(sub)?;
    if ranges.len() > ACK_RANGES_MAX {
        return Err(code::TOO_MANY_RANGES);
    }
    let range = |bytes: &[u8; 16]| {
        let both = u128::from_be_bytes(*bytes);
        let (first, last) = ((both >> 64) as u64, both as u64);
        if first == 0 || first > last {
            return Err(code::INVALID_TAG_RANGE);
        }
        Ok((DeliveryTag(first), DeliveryTag(last)))
    };
    Ok((sub, TagRanges(ranges.iter().map(range).collect::<Result<_, _>>()?)))
}

/// Takes `u16 length | entries` and returns the entries.
fn options_block(payload: &mut Bytes, invalid: Fault) -> Result<Bytes, Fault> {
    let len = usize::from(payload.try_get_u16().map_err(|_| invalid)?);
    if len == 0 {
        return Ok(Bytes::new());
    }
    if len > payload.len() {
        return Err(invalid);
    }
    let entries = payload.split_to(len);
    if !OptionsReader::new(&entries).is_well_formed() {
        return Err(invalid);
    }
    if len > OPTIONS_LEN_MAX {
        return Err(code::OPTIONS_TOO_LONG);
    }
    Ok(entries)
}

/// An option's value of known size.
fn fixed<const N: usize>(value: &[u8]) -> Result<[u8; N], Fault> {
    value.try_into().map_err(|_| code::INVALID_OPTION)
}
