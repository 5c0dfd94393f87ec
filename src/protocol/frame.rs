//! The wire, byte by byte: what every frame begins with, and the numbers of the frame types.
//!
//! Owns: the header, the type bytes, the flag bits. Never: looks into a payload (`v1` and `v2` do).
//!
//! offset bytes field                 All integers big-endian.
//!      0     4 length of the rest    9..=FRAME_LEN_MAX: the type, the correlation id and the payload
//!      4     1 type
//!      5     8 correlation id
//!     13     n payload

use crate::limits::FRAME_LEN_MIN;
use crate::protocol::request::Version;

/// Bytes of the length field, which the length does not count.
pub const LENGTH_LEN: usize = 4;
/// Bytes before the payload.
pub const HEADER_LEN: usize = LENGTH_LEN + FRAME_LEN_MIN as usize;
/// What DELIVER may be longer than the longest PUBLISH: its own fields, and the headers that a dead letter gets.
pub const DELIVER_EXCESS_MAX: u32 = 64 * 1024;
/// A CONFIRM frame does not grow beyond this by joining.
pub const CONFIRM_FRAME_MAX: usize = 64 * 1024;

// Both dialects.
pub const HELLO: u8 = 0x01;
pub const AUTH: u8 = 0x02;
pub const PING: u8 = 0x07;
pub const PONG: u8 = 0x08;

// v1 only.
pub const V1_PUBLISH: u8 = 0x03;
pub const V1_SUBSCRIBE: u8 = 0x04;
pub const V1_ACK: u8 = 0x05;
pub const V1_NACK: u8 = 0x06;
pub const V1_POLL: u8 = 0x09;

// v2 only.
pub const WELCOME: u8 = 0x10;
pub const OK: u8 = 0x11;
pub const ERROR: u8 = 0x12;
pub const PUBLISH: u8 = 0x13;
pub const CONFIRM: u8 = 0x14;
pub const SUBSCRIBE: u8 = 0x15;
pub const SUBSCRIBED: u8 = 0x16;
pub const DELIVER: u8 = 0x17;
pub const ACK: u8 = 0x18;
pub const REJECT: u8 = 0x19;
pub const CREDIT: u8 = 0x1a;
pub const UNSUBSCRIBE: u8 = 0x1b;
pub const GOAWAY: u8 = 0x1c;
pub const ALIAS: u8 = 0x1d;
pub const ALIASED: u8 = 0x1e;

/// PUBLISH: answer with a CONFIRM.
pub const PUBLISH_CONFIRM: u8 = 1 << 0;
/// PUBLISH: the topic is an alias.
pub const PUBLISH_BY_ALIAS: u8 = 1 << 1;
/// DELIVER: wants an ACK.
pub const DELIVER_QOS1: u8 = 1 << 0;
/// DELIVER: may have been delivered before.
pub const DELIVER_REDELIVERED: u8 = 1 << 1;
/// ACK: answer with an OK.
pub const ACK_CONFIRM: u8 = 1 << 0;

/// CONFIRM entry: stored.
pub const CONFIRM_STORED: u8 = 0;
/// CONFIRM entry: was stored before.
pub const CONFIRM_DUPLICATE: u8 = 1;
/// CONFIRM entry: refused.
pub const CONFIRM_REJECTED: u8 = 2;

/// WELCOME: CONFIRM carries a durability level and a log position.
pub const FEATURE_RECEIPTS: u64 = 1 << 0;
/// WELCOME: message ids and publisher sequences are deduplicated.
pub const FEATURE_DEDUP: u64 = 1 << 1;
/// WELCOME: `delay_ms` is honoured.
pub const FEATURE_DELAY: u64 = 1 << 2;
/// WELCOME: message and consumer priorities are honoured.
pub const FEATURE_PRIORITY: u64 = 1 << 3;
/// WELCOME: messages that keep failing go to `<topic>.dlq`.
pub const FEATURE_DEAD_LETTERS: u64 = 1 << 4;
/// What this broker announces.
pub const FEATURES: u64 = FEATURE_RECEIPTS | FEATURE_DEDUP | FEATURE_DELAY | FEATURE_PRIORITY | FEATURE_DEAD_LETTERS;

/// The byte stream cannot be cut into frames any more: the connection is closed without an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame length {len} is not in {FRAME_LEN_MIN}..={max}")]
    Length { len: u32, max: u32 },
    #[error("frame type {frame_type:#04x} is unknown")]
    UnknownType { frame_type: u8 },
}

/// May a client send this? `None`: before HELLO, which is v1's set.
pub fn is_request(version: Option<Version>, frame_type: u8) -> bool {
    match version {
        None | Some(Version::V1) => matches!(frame_type, HELLO..=V1_POLL),
        Some(Version::V2) => matches!(
            frame_type,
            HELLO | AUTH | PING | PONG | PUBLISH | SUBSCRIBE | ACK | REJECT | CREDIT | UNSUBSCRIBE | ALIAS
        ),
    }
}

/// May the broker send this? A v2 client may meet a NACK: errors before WELCOME are spelt in v1.
pub fn is_reply(version: Version, frame_type: u8) -> bool {
    match version {
        Version::V1 => matches!(frame_type, V1_ACK | V1_NACK | V1_PUBLISH | PONG),
        Version::V2 => matches!(
            frame_type,
            V1_NACK | PING | PONG | WELCOME | OK | ERROR | CONFIRM | SUBSCRIBED | DELIVER | GOAWAY | ALIASED
        ),
    }
}

/// The first 13 bytes of a frame with `payload` bytes of payload.
pub(crate) fn header(frame_type: u8, cid: u64, payload: usize) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&length_field(payload));
    header[4] = frame_type;
    header[5..].copy_from_slice(&cid.to_be_bytes());
    header
}

/// Begins a frame whose length `finish` fills in; returns where it starts.
pub(crate) fn begin(frame_type: u8, cid: u64, out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&header(frame_type, cid, 0));
    start
}

/// Ends the frame that starts at `start` and reaches to the end of `out`.
pub(crate) fn finish(start: usize, out: &mut [u8]) {
    let payload = out.len() - start - HEADER_LEN;
    out[start..start + LENGTH_LEN].copy_from_slice(&length_field(payload));
}

fn length_field(payload: usize) -> [u8; LENGTH_LEN] {
    let len =
        u32::try_from(payload + FRAME_LEN_MIN as usize).expect("a frame is bounded by FRAME_LEN_MAX and a little");
    len.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_frame_equals_one_of_known_length() {
        let mut out = b"before".to_vec();
        let start = begin(PING, 7, &mut out);
        out.extend_from_slice(b"xyz");
        finish(start, &mut out);
        assert_eq!(&out[6..19], &header(PING, 7, 3));
        assert_eq!(&out[6..], b"\0\0\0\x0c\x07\0\0\0\0\0\0\0\x07xyz");
    }

    #[test]
    fn each_dialect_knows_its_own_types() {
        let known = |version| (0..=255u8).filter(|&t| is_request(version, t)).collect::<Vec<_>>();
        assert_eq!(known(None), (0x01..=0x09).collect::<Vec<_>>());
        assert_eq!(known(Some(Version::V1)), known(None));
        assert_eq!(known(Some(Version::V2)), [0x01, 0x02, 0x07, 0x08, 0x13, 0x15, 0x18, 0x19, 0x1a, 0x1b, 0x1d]);
    }
}
