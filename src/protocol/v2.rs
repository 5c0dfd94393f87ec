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
        if matches!(tag, options::TTL..=options::DELAY | options::REPLY_TO) {
            seen.once(tag)?;
        }
        match tag {
            options::TTL => publish.ttl = Some(millis(value)?),
            options::DELAY => publish.delay = millis(value)?,
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
            options::HEADER if split_header(value).is_none() => return Err(code::INVALID_OPTION),
            options::REPLY_TO if std::str::from_utf8(value).is_err() => return Err(code::INVALID_OPTION),
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

/// Which of the tags below 8 occurred. Tags we do not know may come as often as they like.
#[derive(Default)]
struct Seen(u8);

impl Seen {
    fn once(&mut self, tag: u8) -> Result<(), Fault> {
        let bit = 1 << tag;
        if self.0 & bit != 0 {
            return Err(code::REPEATED_OPTION);
        }
        self.0 |= bit;
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
        if matches!(tag, options::SUBSCRIBE_DURABLE..=options::SUBSCRIBE_ACK_TIMEOUT) {
            seen.once(tag)?;
        }
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

/// An option's value as u64 milliseconds. What a `Duration` cannot hold becomes its largest whole millisecond.
fn millis(value: &[u8]) -> Result<Duration, Fault> {
    let most = Duration(u64::MAX).as_millis();
    Ok(Duration::from_millis(u64::from_be_bytes(fixed(value)?).min(most)))
}

/// An option's value of known size.
fn fixed<const N: usize>(value: &[u8]) -> Result<[u8; N], Fault> {
    value.try_into().map_err(|_| code::INVALID_OPTION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::options::OptionsBuilder;

    fn block(builder: OptionsBuilder) -> Vec<u8> {
        let entries = builder.finish().expect("short");
        [&(entries.len() as u16).to_be_bytes()[..], &entries].concat()
    }

    fn fault(frame_type: u8, payload: &[u8]) -> Option<(u16, &'static str)> {
        match request(frame_type, Bytes::copy_from_slice(payload)) {
            RequestKind::Malformed(malformed) => {
                assert_eq!(malformed.frame_type, frame_type);
                Some((malformed.code, malformed.text))
            }
            _ => None,
        }
    }

    fn check(frame_type: u8, cases: &[(&[u8], Option<Fault>)]) {
        for (payload, expected) in cases {
            let expected = expected.map(|fault| (fault.code, fault.text));
            assert_eq!(fault(frame_type, payload), expected, "type {frame_type:#04x}, payload {payload:02x?}");
        }
    }

    #[test]
    fn publish_is_checked_in_order() {
        let invalid = Some(code::INVALID_PUBLISH);
        check(
            frame::PUBLISH,
            &[
                (b"", invalid),
                (b"\0", invalid),
                (b"\0\x01\0", invalid),
                (b"\0\x01\0\x01", invalid),
                (b"\0\x01\0\x01a", invalid),
                (b"\0\x01\0\x01a\0", invalid),
                (b"\0\x01\0\x01\xff\0\0", invalid),
                (b"\0\x01\0\x01a\0\x01", invalid),             // options cut
                (b"\0\x01\0\x01a\0\x04\x01\0\x02\0", invalid), // an entry beyond its block
                (b"\x04\x01\0\x01a\0\0", invalid),             // a flag we do not know
                (b"\x02\x01\0\0\0", invalid),                  // alias cut
                (b"\x02\x01\0\0\0\x07", invalid),              // no options
                (b"\0\x07\0\0\0\0", Some(code::EMPTY_TOPIC)),
                (b"\0\x07\0\x01a\0\0", Some(code::INVALID_QOS)),
                (b"\x02\x07\0\0\0\x07\0\0", Some(code::INVALID_QOS)),
                (b"\x03\x01\0\0\0\0\0\0", None),
                (b"\0\0\0\x01a\0\0", None),
            ],
        );
    }

    fn publish_with(entries: Vec<u8>) -> RequestKind {
        request(frame::PUBLISH, [&b"\x01\x01\0\x01a"[..], &entries, b"message"].concat().into())
    }

    #[test]
    fn publish_options_are_checked() {
        let new = OptionsBuilder::new;
        let ok = None;
        let invalid = Some(code::INVALID_OPTION);
        let cases = [
            (new().bytes(options::TTL, b"1234567"), invalid),
            (new().bytes(options::DELAY, b""), invalid),
            (new().bytes(options::PUBLISHER, &[0; 15]), invalid),
            (new().bytes(options::PUBLISHER, &[0; 16]), ok),
            (new().bytes(options::MESSAGE_ID, b""), invalid),
            (new().bytes(options::MESSAGE_ID, &[0; 64]), ok),
            (new().bytes(options::MESSAGE_ID, &[0; 65]), invalid),
            (new().bytes(options::PRIORITY, b""), invalid),
            (new().u8(options::PRIORITY, 9), ok),
            (new().u8(options::PRIORITY, 10), Some(code::INVALID_PRIORITY)),
            (new().bytes(options::HEADER, b"\0"), invalid),
            (new().bytes(options::HEADER, b"\0\x02k"), invalid),
            (new().bytes(options::HEADER, b"\0\x01\xff"), invalid),
            (new().header("k", b"\xff").header("k", b""), ok),
            (new().bytes(options::REPLY_TO, b"\xff"), invalid),
            (new().bytes(200, b"?"), ok),
            (new().u8(options::PRIORITY, 1).u8(options::PRIORITY, 1), Some(code::REPEATED_OPTION)),
            (new().bytes(200, b"?").bytes(200, b"?"), ok),
            (new().bytes(options::MESSAGE_ID, b"m").bytes(options::PUBLISHER, &[0; 16]), Some(code::TWO_IDENTITIES)),
        ];
        for (number, (builder, expected)) in cases.into_iter().enumerate() {
            let got = match publish_with(block(builder)) {
                RequestKind::Malformed(malformed) => Some((malformed.code, malformed.text)),
                _ => None,
            };
            assert_eq!(got, expected.map(|fault| (fault.code, fault.text)), "case {number}");
        }
    }

    #[test]
    fn options_that_end_at_the_broker_are_taken_out() {
        let new = OptionsBuilder::new;
        let message_id = |b: OptionsBuilder| b.bytes(options::MESSAGE_ID, b"m");
        let header = |b: OptionsBuilder| b.header("k", b"v");
        let ttl = |b: OptionsBuilder| b.u64(options::TTL, 5);
        let delay = |b: OptionsBuilder| b.u64(options::DELAY, 6);
        let unknown = |b: OptionsBuilder| b.bytes(99, b"?");
        let both = header(message_id(new())).finish().expect("short");
        let cases = [
            (header(message_id(new())), true),
            (header(message_id(delay(ttl(new())))), true),
            (ttl(header(message_id(delay(new())))), true),
            (header(ttl(message_id(new()))), false),
            (delay(header(unknown(ttl(message_id(unknown(new())))))), false),
        ];
        for (number, (builder, sliced)) in cases.into_iter().enumerate() {
            let frame = Bytes::from([&b"\x01\x01\0\x01a"[..], &block(builder), b"message"].concat());
            let RequestKind::Publish(publish) = request(frame::PUBLISH, frame.clone()) else { panic!("case {number}") };
            assert_eq!(publish.options, both, "case {number}");
            assert_eq!(frame.as_ptr_range().contains(&publish.options.as_ptr()), sliced, "case {number}");
            assert_eq!(publish.identity, Some(Identity::MessageId(Bytes::from_static(b"m"))), "case {number}");
            assert_eq!(&publish.payload[..], b"message");
        }
        let RequestKind::Publish(publish) = publish_with(block(delay(ttl(new())))) else { panic!("a publish") };
        assert_eq!((publish.ttl, publish.delay), (Some(Duration::from_millis(5)), Duration::from_millis(6)));
        assert!(publish.options.is_empty());
    }

    #[test]
    fn a_block_of_options_has_a_largest_size() {
        let of = |len: usize| {
            let value = len - ENTRY_HEADER_LEN;
            let head = [&(len as u16).to_be_bytes()[..], &[99], &(value as u16).to_be_bytes()].concat();
            [head, vec![0; value]].concat()
        };
        assert!(matches!(publish_with(of(OPTIONS_LEN_MAX)), RequestKind::Publish(_)));
        let too_long = code::OPTIONS_TOO_LONG.malformed(frame::PUBLISH);
        assert_eq!(publish_with(of(OPTIONS_LEN_MAX + 1)), too_long);
    }

    #[test]
    fn subscribe_is_checked_in_order() {
        let invalid = Some(code::INVALID_SUBSCRIBE);
        let credit = Some(code::INVALID_CREDIT_VALUE);
        let option = Some(code::INVALID_OPTION);
        let name = |len: usize| {
            [&b"\x01\0\0\0\x01\0\x01a"[..], &block(OptionsBuilder::new().bytes(1, &vec![b'n'; len]))].concat()
        };
        check(
            frame::SUBSCRIBE,
            &[
                (b"", invalid),
                (b"\x01\0\0\0", invalid),
                (b"\x01\0\0\0\x01\0\x01", invalid),
                (b"\x01\0\0\0\x01\0\x01a", invalid),
                (b"\x01\0\0\0\x01\0\x01\xff\0\0", invalid),
                (b"\x01\0\0\0\x01\0\x01a\0\0\0", invalid), // something after
                (b"\x01\0\0\0\x01\0\x01a\0\x01", invalid),
                (b"\x07\0\0\0\x01\0\0\0\0", Some(code::EMPTY_TOPIC)),
                (b"\x02\0\0\0\x01\0\x01a\0\0", Some(code::INVALID_QOS)),
                (b"\x01\0\0\0\0\0\x01a\0\0", credit),
                (b"\x01\0\x01\0\0\0\x01a\0\0", credit),
                (b"\x01\0\0\xff\xff\0\x01a\0\0", None),
                (b"\0\0\0\0\0\0\x01a\0\0", None), // QoS0 needs no credit
                (&name(0), option),
                (&name(255), None),
                (&name(256), option),
                (b"\x01\0\0\0\x01\0\x01a\0\x04\x01\0\x01\xff", option),
                (b"\x01\0\0\0\x01\0\x01a\0\x03\x02\0\0", option),
                (b"\x01\0\0\0\x01\0\x01a\0\x04\x03\0\x01\x02", option),
                (b"\x01\0\0\0\x01\0\x01a\0\x06\x04\0\x03\0\0\0", option),
                (b"\x01\0\0\0\x01\0\x01a\0\x08\x02\0\x01\0\x02\0\x01\0", Some(code::REPEATED_OPTION)),
            ],
        );
    }

    #[test]
    fn acks_and_rejects_are_checked() {
        let one = [0, 0, 0, 0, 0, 0, 0, 1];
        let (zero, two) = ([0; 8], [0, 0, 0, 0, 0, 0, 0, 2]);
        for (frame_type, fields, invalid) in
            [(frame::ACK, &b"\x01"[..], code::INVALID_ACK), (frame::REJECT, &b"\x02\0\0\0\0"[..], code::INVALID_REJECT)]
        {
            let payload = |sub: [u8; 8], ranges: &[[u8; 8]]| [&sub[..], fields, &ranges.concat()].concat();
            let range = Some(code::INVALID_TAG_RANGE);
            let many = vec![one; 2 * ACK_RANGES_MAX];
            let too_many = vec![one; 2 * ACK_RANGES_MAX + 2];
            check(
                frame_type,
                &[
                    (b"", Some(invalid)),
                    (&one, Some(invalid)),
                    (&payload(one, &[]), Some(invalid)),
                    (&payload(one, &[one]), Some(invalid)),
                    (&payload(one, &[one, one, one]), Some(invalid)),
                    (&payload(zero, &[one]), Some(invalid)),
                    (&payload(zero, &[zero, one]), Some(code::ZERO_SUBSCRIPTION)),
                    (&payload(one, &[zero, one]), range),
                    (&payload(one, &[two, one]), range),
                    (&payload(one, &[one, two, two, one]), range),
                    (&payload(one, &[one, two]), None),
                    (&payload(one, &many), None),
                    (&payload(one, &too_many), Some(code::TOO_MANY_RANGES)),
                ],
            );
        }
        check(frame::ACK, &[(&[&one[..], &[2], &one, &one].concat(), Some(code::INVALID_ACK))]);
        check(frame::REJECT, &[(&[&one[..], &[3, 0, 0, 0, 0], &one, &one].concat(), Some(code::INVALID_REJECT))]);
    }

    #[test]
    fn the_small_frames_are_checked() {
        let zero = Some(code::ZERO_SUBSCRIPTION);
        let (credit, unsubscribe, alias) =
            (Some(code::INVALID_CREDIT), Some(code::INVALID_UNSUBSCRIBE), Some(code::INVALID_ALIAS));
        check(
            frame::CREDIT,
            &[
                (b"\0\0\0\0\0\0\0\x01\0\0\0", credit),
                (b"\0\0\0\0\0\0\0\x01\0\0\0\x01\0", credit),
                (b"\0\0\0\0\0\0\0\0\0\0\0\x01", zero),
                (b"\0\0\0\0\0\0\0\x01\0\x01\0\0", Some(code::INVALID_CREDIT_VALUE)),
                (b"\0\0\0\0\0\0\0\x01\0\0\0\0", None),
                (b"\0\0\0\0\0\0\0\x01\0\0\xff\xff", None),
            ],
        );
        check(
            frame::UNSUBSCRIBE,
            &[
                (b"\0\0\0\0\0\0\0\x01", unsubscribe),
                (b"\0\0\0\0\0\0\0\x01\x02", unsubscribe),
                (b"\0\0\0\0\0\0\0\x01\0\0", unsubscribe),
                (b"\0\0\0\0\0\0\0\0\0", zero),
                (b"\0\0\0\0\0\0\0\x01\x01", None),
            ],
        );
        check(
            frame::ALIAS,
            &[
                (b"\0\0\0", alias),
                (b"\0\0\0\x07\0\x02a", alias),
                (b"\0\0\0\x07\0\x01ab", alias),
                (b"\0\0\0\x07\0\0a", alias),
                (b"\0\0\0\x07\0\x01\xff", alias),
                (b"\0\0\0\x07\0\0", Some(code::EMPTY_TOPIC)),
                (b"\0\0\0\x07\0\x01a", None),
            ],
        );
        check(frame::AUTH, &[(b"\0", Some(code::INVALID_AUTH))]);
        check(frame::HELLO, &[(b"\0", Some(code::INVALID_HELLO)), (b"\0\x02", None)]);
        check(frame::PING, &[(b"xyz", None)]);
    }
}
