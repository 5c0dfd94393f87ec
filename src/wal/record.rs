//! What the log remembers: one record per thing that happened to a virtual shard.
//!
//! Owns: the records and their bytes, and the payloads of the log's own frames. Never: numbers records (that is `batch`),
//! knows where they lie.
//! Neighbours: the shard makes and applies records; `batch` encodes them; `recovery` decodes them.
//!
//! ```text
//! every record, padded with zeros to 8 bytes      published (5), relocated (8)
//! offset bytes field                               offset bytes field
//!      0     4 len: all of it, without padding          9     1 priority
//!      4     4 crc-32c of 8..len                       10     1 identity: 0 none, 1 message id, 2 publisher
//!      8     1 type                                    11     1 bytes of the message id
//!                                                      12     4 topic
//! topic created (1): 12 topic u32, 16.. name           16     8 sequence
//! topic deleted (2): 12 topic u32                      24     8 published, ms
//! sub created (3): 9 kind u8 (0 durable, 1 orphan,     32     8 expires, ms
//!   2 dead letters), 12 sub u32, 16 topic u32,         40     8 not before, ms
//!   24 start u64, 32 created u64, 40.. name or key     48     - message id, or publisher u64 and its sequence u64
//! sub deleted (4): 12 sub u32                           -     2 bytes of the options, big-endian as on the wire
//! acked (6): 12 sub u32, 16 ranges u32,                 -     - options
//!   24.. from u64, to u64 each                          -     - payload, up to len
//! failed (7): 10 failures u16, 12 sub u32, 16 seq u64
//! ```
//!
//! Numbers are little-endian, except the length of the options: from there on a published record is a
//! [`Body`], byte for byte what a v2 consumer gets.

use bytes::Bytes;

use super::format::{BytesClass, u16_at, u32_at, u64_at};
use crate::limits::{MESSAGE_ID_MAX, OPTIONS_LEN_MAX};
use crate::planted::planted;
use crate::protocol::reply::Body;
use crate::time::WallMs;
use crate::types::{Lsn, Seq, StreamId};

/// Records begin at multiples of this.
pub const RECORD_ALIGN: usize = 8;

const TOPIC_CREATED: u8 = 1;
const TOPIC_DELETED: u8 = 2;
const SUB_CREATED: u8 = 3;
const SUB_DELETED: u8 = 4;
const PUBLISHED: u8 = 5;
const ACKED: u8 = 6;
const FAILED: u8 = 7;
const RELOCATED: u8 = 8;
const PUBLISHED_FIXED: usize = 48;

/// A log record, borrowed from whoever has it: the shard that appends it, or the batch it was read from.
#[derive(Clone, PartialEq, Debug)]
pub enum Record<'a> {
    /// `topic`: the topic's number in its virtual shard.
    TopicCreated {
        topic: u32,
        name: &'a [u8],
    },
    TopicDeleted {
        topic: u32,
    },
    /// `start`: the first sequence the subscription gets.
    SubCreated {
        sub: u32,
        topic: u32,
        kind: SubKind<'a>,
        start: Seq,
        created: WallMs,
    },
    SubDeleted {
        sub: u32,
    },
    Published(Published<'a>),
    /// Inclusive ranges; these messages are finished for this subscription (acknowledged, expired by choice, dead-lettered).
    Acked {
        sub: u32,
        ranges: Vec<(Seq, Seq)>,
    },
    /// How often deliveries of `seq` have failed so far (timed out or rejected).
    Failed {
        sub: u32,
        seq: Seq,
        failures: u16,
    },
    /// A copy of a live message, moved forward so that its old segment can be freed. Not a log entry: takes no index.
    Relocated(Published<'a>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubKind<'a> {
    /// Lives until deleted or idle past its TTL.
    Durable { name: &'a [u8] },
    /// A v1 QoS1 subscription: without name, adopted by the next v1 subscriber with the same key.
    Orphan { key: KeyId },
    /// Holds a dead-letter topic's messages until somebody consumes them.
    DeadLetters,
}

/// Names an API key without being it: the first 16 bytes of its SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct KeyId(pub [u8; 16]);

#[derive(Clone, PartialEq, Debug)]
pub struct Published<'a> {
    pub topic: u32,
    pub seq: Seq,
    pub published: WallMs,
    /// 0: never.
    pub expires: WallMs,
    /// Not delivered before; 0: at once.
    pub not_before: WallMs,
    pub priority: u8,
    pub identity: Option<IdentityRef<'a>>,
    /// Encoded end-to-end options, without their length; at most `OPTIONS_LEN_MAX`.
    pub options: &'a [u8],
    pub payload: &'a [u8],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IdentityRef<'a> {
    MessageId(&'a [u8]),
    Publisher { id: u64, sequence: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    #[error("a record claims {claimed} bytes, {there} are there")]
    Length { claimed: usize, there: usize },
    #[error("record checksum is {actual:08x}, written was {written:08x}")]
    Checksum { written: u32, actual: u32 },
    #[error("record type {0} is not known")]
    Type(u8),
    #[error("record of type {kind} and {len} bytes does not fit its layout")]
    Layout { kind: u8, len: usize },
    #[error("it is message {seq} of topic {topic}")]
    Another { topic: u32, seq: u64 },
}

impl Record<'_> {
    /// Whether the record takes an index of its virtual shard.
    pub fn is_entry(&self) -> bool {
        !matches!(self, Record::Relocated(_))
    }

    /// Bytes without padding: the `len` of its `LogRef`.
    pub fn encoded_len(&self) -> usize {
        match self {
            Record::TopicCreated { name, .. } => 16 + name.len(),
            Record::TopicDeleted { .. } | Record::SubDeleted { .. } => 16,
            Record::SubCreated { kind, .. } => {
                40 + match kind {
                    SubKind::Durable { name } => name.len(),
                    SubKind::Orphan { .. } => 16,
                    SubKind::DeadLetters => 0,
                }
            }
            Record::Published(published) | Record::Relocated(published) => published.encoded_len(),
            Record::Acked { ranges, .. } => 24 + 16 * ranges.len(),
            Record::Failed { .. } => 24,
        }
    }

    /// Bytes the record takes in a batch.
    pub fn padded_len(&self) -> usize {
        self.encoded_len().next_multiple_of(RECORD_ALIGN)
    }

    /// Appends the record and its padding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let len = self.encoded_len();
        out.extend_from_slice(&u32::try_from(len).expect("bounded by the batch").to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        match self {
            Record::TopicCreated { topic, name } => {
                out.extend_from_slice(&[TOPIC_CREATED, 0, 0, 0]);
                out.extend_from_slice(&topic.to_le_bytes());
                out.extend_from_slice(name);
            }
            Record::TopicDeleted { topic } => {
                out.extend_from_slice(&[TOPIC_DELETED, 0, 0, 0]);
                out.extend_from_slice(&topic.to_le_bytes());
            }
            Record::SubCreated { sub, topic, kind, start, created } => {
                let tag = match kind {
                    SubKind::Durable { .. } => 0,
                    SubKind::Orphan { .. } => 1,
                    SubKind::DeadLetters => 2,
                };
                out.extend_from_slice(&[SUB_CREATED, tag, 0, 0]);
                out.extend_from_slice(&sub.to_le_bytes());
                out.extend_from_slice(&topic.to_le_bytes());
                out.extend_from_slice(&[0; 4]);
                out.extend_from_slice(&start.0.to_le_bytes());
                out.extend_from_slice(&created.0.to_le_bytes());
                match kind {
                    SubKind::Durable { name } => out.extend_from_slice(name),
                    SubKind::Orphan { key } => out.extend_from_slice(&key.0),
                    SubKind::DeadLetters => {}
                }
            }
            Record::SubDeleted { sub } => {
                out.extend_from_slice(&[SUB_DELETED, 0, 0, 0]);
                out.extend_from_slice(&sub.to_le_bytes());
            }
            Record::Published(published) => published.encode(PUBLISHED, out),
            Record::Relocated(published) => published.encode(RELOCATED, out),
            Record::Acked { sub, ranges } => {
                out.extend_from_slice(&[ACKED, 0, 0, 0]);
                out.extend_from_slice(&sub.to_le_bytes());
                out.extend_from_slice(&u32::try_from(ranges.len()).expect("bounded by the batch").to_le_bytes());
                out.extend_from_slice(&[0; 4]);
                for (from, to) in ranges {
                    out.extend_from_slice(&from.0.to_le_bytes());
                    out.extend_from_slice(&to.0.to_le_bytes());
                }
            }
            Record::Failed { sub, seq, failures } => {
                out.extend_from_slice(&[FAILED, 0]);
                out.extend_from_slice(&failures.to_le_bytes());
                out.extend_from_slice(&sub.to_le_bytes());
                out.extend_from_slice(&seq.0.to_le_bytes());
            }
        }
        assert!(out.len() == start + len, "record length");
        let crc = crc32c::crc32c(&out[start + 8..]);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        out.resize(start + len.next_multiple_of(RECORD_ALIGN), 0);
    }

    /// Reads the record that `bytes` is, without padding behind it.
    pub fn decode_alone(bytes: &[u8]) -> Result<Record<'_>, RecordError> {
        decode_checked(checked(bytes)?)
    }

    /// Reads the record at the start of `bytes`; also returns how many bytes it takes with its padding.
    pub fn decode(bytes: &[u8]) -> Result<(Record<'_>, usize), RecordError> {
        let record = checked(bytes)?;
        let padded = record.len().next_multiple_of(RECORD_ALIGN);
        if padded > bytes.len() {
            return Err(RecordError::Length { claimed: padded, there: bytes.len() });
        }
        Ok((decode_checked(record)?, padded))
    }
}

impl Published<'_> {
    fn encoded_len(&self) -> usize {
        let identity = match self.identity {
            None => 0,
            Some(IdentityRef::MessageId(id)) => id.len(),
            Some(IdentityRef::Publisher { .. }) => 16,
        };
        PUBLISHED_FIXED + identity + 2 + self.options.len() + self.payload.len()
    }

    fn encode(&self, kind: u8, out: &mut Vec<u8>) {
        assert!(self.options.len() <= OPTIONS_LEN_MAX, "options too long");
        let (identity, id_len) = match self.identity {
            None => (0, 0),
            Some(IdentityRef::MessageId(id)) => (1, id.len()),
            Some(IdentityRef::Publisher { .. }) => (2, 0),
        };
        assert!(id_len <= MESSAGE_ID_MAX, "message id too long");
        out.extend_from_slice(&[kind, self.priority, identity, id_len as u8]);
        out.extend_from_slice(&self.topic.to_le_bytes());
        out.extend_from_slice(&self.seq.0.to_le_bytes());
        out.extend_from_slice(&self.published.0.to_le_bytes());
        out.extend_from_slice(&self.expires.0.to_le_bytes());
        out.extend_from_slice(&self.not_before.0.to_le_bytes());
        match self.identity {
            None => {}
            Some(IdentityRef::MessageId(id)) => out.extend_from_slice(id),
            Some(IdentityRef::Publisher { id, sequence }) => {
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&sequence.to_le_bytes());
            }
        }
        out.extend_from_slice(&(self.options.len() as u16).to_be_bytes());
        out.extend_from_slice(self.options);
        out.extend_from_slice(self.payload);
    }
}

/// The body of a published or relocated record, without copying it. `record`: the bytes its `LogRef` names.
pub fn published_body(record: &Bytes) -> Result<Body, RecordError> {
    let checked = checked(record)?;
    let kind = checked[8];
    if kind != PUBLISHED && kind != RELOCATED {
        return Err(RecordError::Type(kind));
    }
    let (body, _) = body_at(checked)?;
    Ok(Body(record.slice(body..checked.len())))
}

/// When message `seq` of `topic` was published, and its end-to-end part, not copied.
///
/// - `record`: exactly the bytes of its record.
/// - `check`: its bytes have been on disk, so their checksum is looked at, and whose they are: a write that went to a wrong
///   place may have left another message here, as sound as this one.
pub fn published_message(record: &Bytes, topic: u32, seq: Seq, check: bool) -> Result<(WallMs, Body), RecordError> {
    let bytes = if check { checked(record)? } else { &record[..] };
    if bytes.len() < 9 || (bytes[8] != PUBLISHED && bytes[8] != RELOCATED) {
        return Err(RecordError::Type(bytes.get(8).copied().unwrap_or(0)));
    }
    let (body, _) = body_at(bytes)?;
    if bytes.len() != record.len() {
        return Err(RecordError::Length { claimed: bytes.len(), there: record.len() });
    }
    let is = (u32_at(bytes, 12), Seq(u64_at(bytes, 16)));
    if is != (topic, seq) {
        return Err(RecordError::Another { topic: is.0, seq: is.1.0 });
    }
    Ok((WallMs(u64_at(bytes, 24)), Body(record.slice(body..bytes.len()))))
}

/// The record at the start of `bytes`, without padding: its length and checksum hold.
fn checked(bytes: &[u8]) -> Result<&[u8], RecordError> {
    let claimed = if bytes.len() < 8 { 8 } else { u32_at(bytes, 0) as usize };
    if claimed < 9 || claimed > bytes.len() {
        return Err(RecordError::Length { claimed, there: bytes.len() });
    }
    let record = &bytes[..claimed];
    let (written, actual) = (u32_at(record, 4), crc32c::crc32c(&record[8..]));
    if written != actual && !planted!(NoRecordCrc) {
        return Err(RecordError::Checksum { written, actual });
    }
    Ok(record)
}

/// Where the body of a published record begins, and where its payload does.
fn body_at(record: &[u8]) -> Result<(usize, usize), RecordError> {
    let layout = RecordError::Layout { kind: record[8], len: record.len() };
    if record.len() < PUBLISHED_FIXED + 2 {
        return Err(layout);
    }
    let identity = match (record[10], usize::from(record[11])) {
        (0, 0) => 0,
        (1, len) if len <= MESSAGE_ID_MAX => len,
        (2, 0) => 16,
        _ => return Err(layout),
    };
    let body = PUBLISHED_FIXED + identity;
    let Some(&[high, low]) = record.get(body..body + 2) else { return Err(layout) };
    let options = usize::from(u16::from_be_bytes([high, low]));
    let payload = body + 2 + options;
    if options > OPTIONS_LEN_MAX || payload > record.len() {
        return Err(layout);
    }
    Ok((body, payload))
}

fn decode_checked(record: &[u8]) -> Result<Record<'_>, RecordError> {
    let kind = record[8];
    let layout = RecordError::Layout { kind, len: record.len() };
    let at_least = |len: usize| if record.len() >= len { Ok(()) } else { Err(layout) };
    let exactly = |len: usize| if record.len() == len { Ok(()) } else { Err(layout) };
    match kind {
        TOPIC_CREATED => {
            at_least(16)?;
            Ok(Record::TopicCreated { topic: u32_at(record, 12), name: &record[16..] })
        }
        TOPIC_DELETED => {
            exactly(16)?;
            Ok(Record::TopicDeleted { topic: u32_at(record, 12) })
        }
        SUB_CREATED => {
            at_least(40)?;
            let kind = match record[9] {
                0 => SubKind::Durable { name: &record[40..] },
                1 => SubKind::Orphan { key: KeyId(record[40..].try_into().map_err(|_| layout)?) },
                2 => {
                    exactly(40)?;
                    SubKind::DeadLetters
                }
                _ => return Err(layout),
            };
            Ok(Record::SubCreated {
                sub: u32_at(record, 12),
                topic: u32_at(record, 16),
                kind,
                start: Seq(u64_at(record, 24)),
                created: WallMs(u64_at(record, 32)),
            })
        }
        SUB_DELETED => {
            exactly(16)?;
            Ok(Record::SubDeleted { sub: u32_at(record, 12) })
        }
        PUBLISHED => Ok(Record::Published(decode_published(record)?)),
        RELOCATED => Ok(Record::Relocated(decode_published(record)?)),
        ACKED => {
            at_least(24)?;
            let count = u32_at(record, 16) as usize;
            if (record.len() - 24) / 16 != count || !(record.len() - 24).is_multiple_of(16) {
                return Err(layout);
            }
            let range = |pair: &[u8]| (Seq(u64_at(pair, 0)), Seq(u64_at(pair, 8)));
            Ok(Record::Acked { sub: u32_at(record, 12), ranges: record[24..].chunks_exact(16).map(range).collect() })
        }
        FAILED => {
            exactly(24)?;
            let (sub, seq) = (u32_at(record, 12), Seq(u64_at(record, 16)));
            Ok(Record::Failed { sub, seq, failures: u16_at(record, 10) })
        }
        other => Err(RecordError::Type(other)),
    }
}

fn decode_published(record: &[u8]) -> Result<Published<'_>, RecordError> {
    let (body, payload) = body_at(record)?;
    let identity = match record[10] {
        1 => Some(IdentityRef::MessageId(&record[PUBLISHED_FIXED..body])),
        2 => Some(IdentityRef::Publisher {
            id: u64_at(record, PUBLISHED_FIXED),
            sequence: u64_at(record, PUBLISHED_FIXED + 8),
        }),
        _ => None,
    };
    Ok(Published {
        topic: u32_at(record, 12),
        seq: Seq(u64_at(record, 16)),
        published: WallMs(u64_at(record, 24)),
        expires: WallMs(u64_at(record, 32)),
        not_before: WallMs(u64_at(record, 40)),
        priority: record[9],
        identity,
        options: &record[body + 2..payload],
        payload: &record[payload..],
    })
}

/// What recovery threw away behind the end of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Discarded {
    pub frames: u64,
    pub bytes: u64,
    pub records: u64,
}

/// How recovery ended one stream. Nothing behind `end` is looked at again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedStream {
    pub stream: StreamId,
    pub end: Lsn,
    pub chain: u64,
    pub discarded: Discarded,
    /// What lay at the end.
    pub class: BytesClass,
}

/// The body of a stream's first frame: how the streams before it ended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryNote {
    pub sealed: Vec<SealedStream>,
}

const NOTE_ENTRY: usize = 56;

impl RecoveryNote {
    /// `u32 count, u32 zero`, then per stream: incarnation u64, core u16, class u8, 5 zeros, end, chain, and the discarded
    /// frames, bytes, records, u64 each.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u32::try_from(self.sealed.len()).expect("bounded by the slots").to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for sealed in &self.sealed {
            out.extend_from_slice(&sealed.stream.incarnation.to_le_bytes());
            out.extend_from_slice(&sealed.stream.core.to_le_bytes());
            out.extend_from_slice(&[sealed.class as u8, 0, 0, 0, 0, 0]);
            let Discarded { frames, bytes, records } = sealed.discarded;
            for number in [sealed.end.0, sealed.chain, frames, bytes, records] {
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
    }

    pub fn encoded_len(&self) -> usize {
        8 + NOTE_ENTRY * self.sealed.len()
    }

    pub fn decode(bytes: &[u8]) -> Option<RecoveryNote> {
        let count = u32_at(bytes.get(..8)?, 0) as usize;
        if bytes.len() != count.checked_mul(NOTE_ENTRY)?.checked_add(8)? {
            return None;
        }
        let entry = |entry: &[u8]| {
            Some(SealedStream {
                stream: StreamId { incarnation: u64_at(entry, 0), core: u16_at(entry, 8) },
                end: Lsn(u64_at(entry, 16)),
                chain: u64_at(entry, 24),
                discarded: Discarded {
                    frames: u64_at(entry, 32),
                    bytes: u64_at(entry, 40),
                    records: u64_at(entry, 48),
                },
                class: BytesClass::from_byte(entry[10])?,
            })
        };
        let sealed = bytes[8..].chunks_exact(NOTE_ENTRY).map(entry).collect::<Option<_>>()?;
        Some(RecoveryNote { sealed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published<'a>(identity: Option<IdentityRef<'a>>, options: &'a [u8], payload: &'a [u8]) -> Published<'a> {
        Published {
            topic: 4,
            seq: Seq(9),
            published: WallMs(1_000),
            expires: WallMs(2_000),
            not_before: WallMs(0),
            priority: 3,
            identity,
            options,
            payload,
        }
    }

    fn samples() -> Vec<Record<'static>> {
        vec![
            Record::TopicCreated { topic: 1, name: b"orders" },
            Record::TopicDeleted { topic: 2 },
            Record::SubCreated {
                sub: 3,
                topic: 1,
                kind: SubKind::Durable { name: b"billing" },
                start: Seq(5),
                created: WallMs(7),
            },
            Record::SubCreated {
                sub: 4,
                topic: 1,
                kind: SubKind::Orphan { key: KeyId(*b"0123456789abcdef") },
                start: Seq(1),
                created: WallMs(8),
            },
            Record::SubCreated { sub: 5, topic: 2, kind: SubKind::DeadLetters, start: Seq(1), created: WallMs(9) },
            Record::SubDeleted { sub: 4 },
            Record::Published(published(None, b"", b"")),
            Record::Published(published(Some(IdentityRef::MessageId(b"id-1")), b"opts", b"payload")),
            Record::Relocated(published(Some(IdentityRef::Publisher { id: 1, sequence: 2 }), b"", b"payload")),
            Record::Acked { sub: 3, ranges: vec![(Seq(1), Seq(4)), (Seq(9), Seq(9))] },
            Record::Acked { sub: 3, ranges: vec![] },
            Record::Failed { sub: 3, seq: Seq(5), failures: 2 },
        ]
    }

    /// A `LogRef` names a record without its padding. Found by `chaos crash`: leftovers could not be relocated.
    #[test]
    fn a_record_read_back_alone_needs_no_padding() {
        for len in 0..16 {
            let payload = vec![7; len];
            let record = Record::Published(published(None, b"", &payload));
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            let claimed = u32_at(&bytes, 0) as usize;
            assert_eq!(Record::decode_alone(&bytes[..claimed]), Ok(record));
        }
    }

    #[test]
    fn records_come_back() {
        let mut batch = Vec::new();
        for record in samples() {
            let start = batch.len();
            record.encode(&mut batch);
            assert_eq!(batch.len() - start, record.padded_len());
        }
        let mut at = 0;
        for record in samples() {
            let (decoded, used) = Record::decode(&batch[at..]).unwrap();
            assert_eq!(decoded, record);
            at += used;
        }
        assert_eq!(at, batch.len());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for record in samples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            for bit in 0..record.encoded_len() * 8 {
                let mut bad = bytes.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(Record::decode(&bad).is_err(), "{record:?}: bit {bit}");
            }
        }
    }

    #[test]
    fn cut_records_are_refused() {
        for record in samples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            for len in 0..bytes.len() {
                assert!(Record::decode(&bytes[..len]).is_err(), "{record:?}: {len} bytes");
            }
        }
    }

    #[test]
    fn a_whole_record_with_an_impossible_layout_is_refused() {
        for record in samples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            bytes.truncate(record.encoded_len());
            for kind in 0..=9 {
                // Any type over any fields: decoding may succeed or fail, but stays inside the record.
                bytes[8] = kind;
                let crc = crc32c::crc32c(&bytes[8..]);
                bytes[4..8].copy_from_slice(&crc.to_le_bytes());
                let mut padded = bytes.clone();
                padded.resize(bytes.len().next_multiple_of(RECORD_ALIGN), 0);
                if let Ok((decoded, used)) = Record::decode(&padded) {
                    assert_eq!((decoded.encoded_len(), used), (bytes.len(), padded.len()));
                }
            }
        }
    }

    #[test]
    fn another_message_in_its_place_is_no_message() {
        let encoded = |seq, payload| {
            let record = Record::Published(Published { seq: Seq(seq), ..published(None, b"", payload) });
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            bytes.truncate(record.encoded_len());
            bytes
        };
        let topic = published(None, b"", b"").topic;
        let good = Bytes::from(encoded(7, b"payload"));
        assert!(published_message(&good, topic, Seq(7), true).is_ok());
        for (wanted, seq) in [(topic, 8), (topic + 1, 7)] {
            let error = published_message(&good, wanted, Seq(seq), true);
            assert_eq!(error, Err(RecordError::Another { topic, seq: 7 }));
        }
        // A sound one that ends before this one should.
        let mut shorter = encoded(7, b"pay");
        shorter.resize(good.len(), 0);
        let error = published_message(&Bytes::from(shorter), topic, Seq(7), true);
        assert!(matches!(error, Err(RecordError::Length { .. })), "{error:?}");
    }

    #[test]
    fn the_body_is_a_slice_of_the_record() {
        let record = Record::Published(published(Some(IdentityRef::MessageId(b"id-1")), b"opts", b"payload"));
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        bytes.truncate(record.encoded_len());
        let bytes = Bytes::from(bytes);
        let body = published_body(&bytes).unwrap();
        assert_eq!((body.options(), body.payload()), (&b"opts"[..], &b"payload"[..]));
        assert_eq!(body.0.as_ptr(), bytes[bytes.len() - body.0.len()..].as_ptr(), "not copied");

        let mut bad = bytes.to_vec();
        *bad.last_mut().unwrap() ^= 1;
        assert!(matches!(published_body(&Bytes::from(bad)), Err(RecordError::Checksum { .. })));
        let mut other = Vec::new();
        Record::TopicDeleted { topic: 2 }.encode(&mut other);
        assert_eq!(published_body(&Bytes::from(other)), Err(RecordError::Type(TOPIC_DELETED)));
    }

    #[test]
    fn golden_published() {
        let record = Record::Published(published(Some(IdentityRef::MessageId(b"id-1")), b"o", b"pay"));
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "3a0000008882066d05030104040000000900000000000000e803000000000000\
             d007000000000000000000000000000069642d3100016f706179000000000000"
        );
    }

    #[test]
    fn notes_come_back() {
        let note = RecoveryNote {
            sealed: vec![SealedStream {
                stream: StreamId { incarnation: 3, core: 1 },
                end: Lsn(8192),
                chain: 77,
                discarded: Discarded { frames: 1, bytes: 4096, records: 3 },
                class: BytesClass::Stale,
            }],
        };
        let mut bytes = Vec::new();
        note.encode(&mut bytes);
        assert_eq!(bytes.len(), note.encoded_len());
        assert_eq!(RecoveryNote::decode(&bytes), Some(note));
        assert_eq!(RecoveryNote::decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(RecoveryNote::decode(&[0xff; 8]), None);
        assert_eq!(RecoveryNote::decode(&[]), None);
    }
}
