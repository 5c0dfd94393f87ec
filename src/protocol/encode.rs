//! Replies to bytes, in the connection's dialect.
//!
//! Owns: the layout of everything the broker sends. Never: fails, waits, allocates per message (one buffer grows).
//! What a dialect has no frame for is silence: v1 knows no confirm, no PING from the broker, no GOAWAY.

use bytes::Bytes;

use crate::protocol::frame::{self, CONFIRM_FRAME_MAX, HEADER_LEN};
use crate::protocol::options::{self, OptionsBuilder};
use crate::protocol::reply::{Deliver, Outcome, Reply, Welcome};
use crate::protocol::request::Version;
use crate::types::Qos;

/// WELCOME's server name.
pub const SERVER_NAME: &str = "blipmq";
/// WELCOME's server version.
pub const SERVER_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Replies of one connection, encoded one behind the other. Consecutive confirms share a frame.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
    /// Start of the last frame in `out`, if that is a CONFIRM.
    confirm_at: Option<usize>,
}

impl Encoder {
    pub fn new() -> Encoder {
        Encoder::default()
    }

    pub fn encode(&mut self, reply: &Reply, version: Version) {
        if let (Version::V2, Reply::Confirm { cid, outcome }, Some(start)) = (version, reply, self.confirm_at)
            && self.out.len() - start + confirm_len(outcome) <= CONFIRM_FRAME_MAX
        {
            confirm(*cid, outcome, &mut self.out);
            frame::finish(start, &mut self.out);
            return;
        }
        let start = self.out.len();
        encode(reply, version, &mut self.out);
        let confirms = version == Version::V2 && matches!(reply, Reply::Confirm { .. });
        // A reply that v1 has no frame for leaves nothing behind.
        if self.out.len() > start {
            self.confirm_at = confirms.then_some(start);
        }
    }

    /// Bytes encoded and not taken.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Takes all bytes; goes on in `spare`, whose content is dropped and whose memory is used.
    pub fn take(&mut self, mut spare: Vec<u8>) -> Vec<u8> {
        spare.clear();
        self.confirm_at = None;
        std::mem::replace(&mut self.out, spare)
    }
}

/// Appends `reply` to `out` as a frame of its own.
pub fn encode(reply: &Reply, version: Version, out: &mut Vec<u8>) {
    match version {
        Version::V1 => encode_v1(reply, out),
        Version::V2 => encode_v2(reply, out),
    }
}

fn encode_v1(reply: &Reply, out: &mut Vec<u8>) {
    match reply {
        Reply::AckV1 { cid, id } => ack_v1(*cid, *id, out),
        Reply::Welcome { cid, .. } => ack_v1(*cid, 0, out),
        Reply::Subscribed { cid, sub, .. } => ack_v1(*cid, sub.0, out),
        Reply::Error { cid, code, text } | Reply::Confirm { cid, outcome: Outcome::Rejected { code, text } } => {
            code_and_text(frame::V1_NACK, *cid, *code, text, out);
        }
        Reply::Deliver(deliver) => deliver_v1(deliver, out),
        Reply::Pong { cid } => empty(frame::PONG, *cid, out),
        Reply::Ok { .. }
        | Reply::Confirm { .. }
        | Reply::Aliased { .. }
        | Reply::Ping { .. }
        | Reply::GoAway { .. } => {}
    }
}

fn encode_v2(reply: &Reply, out: &mut Vec<u8>) {
    match reply {
        // HELLO's answer is WELCOME, SUBSCRIBE's is SUBSCRIBED: what is left of v1's ACK is "done".
        Reply::AckV1 { cid, .. } | Reply::Ok { cid } => {
            out.extend_from_slice(&frame::header(frame::OK, *cid, 2));
            out.extend_from_slice(&[0, 0]);
        }
        Reply::Error { cid, code, text } => code_and_text(frame::ERROR, *cid, *code, text, out),
        Reply::GoAway { code, text } => code_and_text(frame::GOAWAY, 0, *code, text, out),
        Reply::Welcome { cid, welcome } => welcome_v2(*cid, welcome, out),
        Reply::Confirm { cid, outcome } => {
            out.reserve(HEADER_LEN + confirm_len(outcome));
            let start = frame::begin(frame::CONFIRM, 0, out);
            confirm(*cid, outcome, out);
            frame::finish(start, out);
        }
        Reply::Subscribed { cid, sub, core, resumed, backlog } => {
            out.extend_from_slice(&frame::header(frame::SUBSCRIBED, *cid, 21));
            out.extend_from_slice(&sub.0.to_be_bytes());
            out.extend_from_slice(&core.0.to_be_bytes());
            out.push(u8::from(*resumed));
            out.extend_from_slice(&backlog.to_be_bytes());
            out.extend_from_slice(&[0, 0]);
        }
        Reply::Aliased { cid, alias, core } => {
            out.extend_from_slice(&frame::header(frame::ALIASED, *cid, 6));
            out.extend_from_slice(&alias.to_be_bytes());
            out.extend_from_slice(&core.0.to_be_bytes());
        }
        Reply::Deliver(deliver) => deliver_v2(deliver, out),
        Reply::Pong { cid } => empty(frame::PONG, *cid, out),
        Reply::Ping { cid } => empty(frame::PING, *cid, out),
    }
}

/// `u64 subscription | u64 tag | u16 attempt | u8 flags | u64 publish time | body`
fn deliver_v2(deliver: &Deliver, out: &mut Vec<u8>) {
    const FIELDS: usize = 27;
    let mut head = [0; HEADER_LEN + FIELDS];
    let mut flags = 0;
    if deliver.qos == Qos::AtLeastOnce {
        flags |= frame::DELIVER_QOS1;
    }
    if deliver.redelivered {
        flags |= frame::DELIVER_REDELIVERED;
    }
    let body = &deliver.body.0;
    head[..HEADER_LEN].copy_from_slice(&frame::header(frame::DELIVER, 0, FIELDS + body.len()));
    head[13..21].copy_from_slice(&deliver.sub.0.to_be_bytes());
    head[21..29].copy_from_slice(&deliver.tag.0.to_be_bytes());
    head[29..31].copy_from_slice(&deliver.attempt.to_be_bytes());
    head[31] = flags;
    head[32..40].copy_from_slice(&deliver.published_ms.to_be_bytes());
    out.reserve(head.len() + body.len());
    out.extend_from_slice(&head);
    out.extend_from_slice(body);
}

/// `u8 qos | string topic | message`
fn deliver_v1(deliver: &Deliver, out: &mut Vec<u8>) {
    const FIELDS: usize = 3;
    let (topic, message) = (&deliver.topic, deliver.body.payload());
    let topic_len = u16::try_from(topic.len()).expect("a topic's name fits TOPIC_NAME_MAX");
    let mut head = [0; HEADER_LEN + FIELDS];
    let header = frame::header(frame::V1_PUBLISH, deliver.cid, FIELDS + topic.len() + message.len());
    head[..HEADER_LEN].copy_from_slice(&header);
    head[13] = deliver.qos as u8;
    head[14..16].copy_from_slice(&topic_len.to_be_bytes());
    out.reserve(head.len() + topic.len() + message.len());
    out.extend_from_slice(&head);
    out.extend_from_slice(topic);
    out.extend_from_slice(message);
}

/// `u64 correlation id | u8 status | ...`
fn confirm(cid: u64, outcome: &Outcome, out: &mut Vec<u8>) {
    let (status, level, position) = match outcome {
        Outcome::Stored { level, position } => (frame::CONFIRM_STORED, *level, *position),
        Outcome::Duplicate { level, position } => (frame::CONFIRM_DUPLICATE, *level, *position),
        Outcome::Rejected { code, text } => {
            out.extend_from_slice(&cid.to_be_bytes());
            out.push(frame::CONFIRM_REJECTED);
            out.extend_from_slice(&code.to_be_bytes());
            put_text(text, out);
            return;
        }
    };
    let mut entry = [0; CONFIRM_ENTRY_LEN];
    entry[..8].copy_from_slice(&cid.to_be_bytes());
    entry[8] = status;
    entry[9] = level as u8;
    entry[10..].copy_from_slice(&position.0.to_be_bytes());
    out.extend_from_slice(&entry);
}

/// Bytes of a confirm that is no rejection.
const CONFIRM_ENTRY_LEN: usize = 18;

fn confirm_len(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Stored { .. } | Outcome::Duplicate { .. } => CONFIRM_ENTRY_LEN,
        Outcome::Rejected { text, .. } => 13 + text.len(),
    }
}

/// `u16 version | u16 cores | u16 this core | options`
fn welcome_v2(cid: u64, welcome: &Welcome, out: &mut Vec<u8>) {
    let mut entries = OptionsBuilder::new()
        .bytes(options::WELCOME_SERVER_NAME, SERVER_NAME.as_bytes())
        .bytes(options::WELCOME_SERVER_VERSION, SERVER_VERSION.as_bytes())
        .u32(options::WELCOME_FRAME_MAX, welcome.frame_len_max)
        .u32(options::WELCOME_CREDIT_MAX, welcome.credit_max)
        .u64(options::WELCOME_FEATURES, frame::FEATURES)
        .u32(options::WELCOME_KEEPALIVE, welcome.keepalive_ms);
    if !welcome.ports.is_empty() {
        let ports: Vec<u8> = welcome.ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        entries = entries.bytes(options::WELCOME_CORE_PORTS, &ports);
    }
    let entries = entries.finish().expect("a broker has fewer cores than would fill OPTIONS_LEN_MAX with ports");
    let start = frame::begin(frame::WELCOME, cid, out);
    out.extend_from_slice(&2u16.to_be_bytes());
    out.extend_from_slice(&welcome.cores.to_be_bytes());
    out.extend_from_slice(&welcome.core.0.to_be_bytes());
    out.extend_from_slice(&(entries.len() as u16).to_be_bytes());
    out.extend_from_slice(&entries);
    frame::finish(start, out);
}

fn ack_v1(cid: u64, id: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&frame::header(frame::V1_ACK, cid, 8));
    out.extend_from_slice(&id.to_be_bytes());
}

fn empty(frame_type: u8, cid: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&frame::header(frame_type, cid, 0));
}

/// `u16 code | string text`
fn code_and_text(frame_type: u8, cid: u64, code: u16, text: &Bytes, out: &mut Vec<u8>) {
    let start = frame::begin(frame_type, cid, out);
    out.extend_from_slice(&code.to_be_bytes());
    put_text(text, out);
    frame::finish(start, out);
}

/// `u16 length | UTF-8`, cut between two characters if it is too long for its length field.
fn put_text(text: &[u8], out: &mut Vec<u8>) {
    let mut len = text.len().min(usize::from(u16::MAX));
    while len < text.len() && text[len] & 0b1100_0000 == 0b1000_0000 {
        len -= 1;
    }
    out.extend_from_slice(&(len as u16).to_be_bytes());
    out.extend_from_slice(&text[..len]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::client_side::ReplyDecoder;
    use crate::protocol::reply::Body;
    use crate::protocol::strategies;
    use crate::types::{ClientSub, CoreId, DeliveryTag, Durability, Lsn};

    fn stored(cid: u64) -> Reply {
        Reply::Confirm { cid, outcome: Outcome::Stored { level: Durability::Synced, position: Lsn(cid * 8) } }
    }

    fn frames(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut frames = Vec::new();
        while let Some(len) = bytes.first_chunk::<4>() {
            let (frame, rest) = bytes.split_at(4 + u32::from_be_bytes(*len) as usize);
            frames.push(frame);
            bytes = rest;
        }
        frames
    }

    proptest! {
        #[test]
        fn replies_come_back_whatever_the_split(
            (version, replies) in prop_oneof![Just(Version::V1), Just(Version::V2)].prop_flat_map(|version| {
                (Just(version), proptest::collection::vec(strategies::reply(version), 1..10))
            }),
            chunk in 1..40usize,
        ) {
            let mut encoder = Encoder::new();
            replies.iter().for_each(|reply| encoder.encode(reply, version));
            let bytes = encoder.take(Vec::new());
            let mut decoder = ReplyDecoder::new(version);
            let mut read = Vec::new();
            for part in bytes.chunks(chunk) {
                decoder.push(Bytes::copy_from_slice(part));
                while let Some(reply) = decoder.next_reply().expect("what we wrote") {
                    read.push(reply);
                }
            }
            prop_assert_eq!(read, replies);
        }
    }

    #[test]
    fn confirms_in_a_row_share_a_frame_up_to_its_limit() {
        let mut encoder = Encoder::new();
        let count = 10_000;
        (0..count).for_each(|cid| encoder.encode(&stored(cid), Version::V2));
        let bytes = encoder.take(Vec::new());
        let frames = frames(&bytes);
        let per_frame = (CONFIRM_FRAME_MAX - HEADER_LEN) / CONFIRM_ENTRY_LEN;
        assert_eq!(frames.len(), (count as usize).div_ceil(per_frame));
        assert!(frames.iter().all(|frame| frame.len() <= CONFIRM_FRAME_MAX));
        assert_eq!(frames[0].len(), HEADER_LEN + per_frame * CONFIRM_ENTRY_LEN);
    }

    #[test]
    fn only_neighbours_are_joined() {
        let types = |bytes: &[u8]| frames(bytes).iter().map(|frame| frame[4]).collect::<Vec<_>>();
        let mut encoder = Encoder::new();
        for reply in [stored(1), stored(2), Reply::Pong { cid: 1 }, stored(3), stored(4)] {
            encoder.encode(&reply, Version::V2);
        }
        assert_eq!(types(&encoder.take(Vec::new())), [frame::CONFIRM, frame::PONG, frame::CONFIRM]);

        // A new buffer begins a new frame, even where an old one ended.
        encoder.encode(&stored(1), Version::V2);
        let spare = encoder.take(Vec::new());
        encoder.encode(&Reply::Deliver(delivery(b"")), Version::V2);
        let bytes = encoder.take(spare);
        assert_eq!(types(&bytes), [frame::DELIVER]);
        assert!(encoder.is_empty());
        encoder.encode(&stored(2), Version::V2);
        assert_eq!(encoder.len(), HEADER_LEN + CONFIRM_ENTRY_LEN);
    }

    fn delivery(message: &'static [u8]) -> Deliver {
        Deliver {
            sub: ClientSub(1),
            tag: DeliveryTag(2),
            cid: 3,
            qos: Qos::AtLeastOnce,
            attempt: 1,
            redelivered: false,
            published_ms: 0,
            topic: Bytes::from_static(b"demo"),
            body: Body([b"\0\x04\x04\0\x01\x09", message].concat().into()),
        }
    }

    #[test]
    fn v1_gets_the_message_without_options() {
        let mut out = Vec::new();
        encode(&Reply::Deliver(delivery(b"hi")), Version::V1, &mut out);
        assert_eq!(out, b"\0\0\0\x12\x03\0\0\0\0\0\0\0\x03\x01\0\x04demohi");
    }

    #[test]
    fn v1_hears_nothing_of_what_it_has_no_frame_for() {
        let mut encoder = Encoder::new();
        for reply in [
            Reply::Ok { cid: 1 },
            stored(1),
            Reply::Aliased { cid: 1, alias: 1, core: CoreId(0) },
            Reply::Ping { cid: 1 },
            Reply::GoAway { code: 503, text: Bytes::new() },
        ] {
            encoder.encode(&reply, Version::V1);
        }
        assert!(encoder.is_empty());
        let rejected = Outcome::Rejected { code: 500, text: Bytes::from_static(b"no") };
        encoder.encode(&Reply::Confirm { cid: 1, outcome: rejected }, Version::V1);
        assert_eq!(encoder.take(Vec::new()), b"\0\0\0\x0f\x06\0\0\0\0\0\0\0\x01\x01\xf4\0\x02no");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = "ä".repeat(40_000);
        let mut out = Vec::new();
        encode(&Reply::Error { cid: 1, code: 400, text: text.into() }, Version::V2, &mut out);
        let mut decoder = ReplyDecoder::new(Version::V2);
        decoder.push(out.into());
        let Ok(Some(Reply::Error { text, .. })) = decoder.next_reply() else { panic!("an error") };
        assert_eq!(text.len(), 65_534);
    }
}
