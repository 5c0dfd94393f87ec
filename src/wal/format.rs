//! A segment on disk, byte by byte, and what the bytes at one position of it can be.
//!
//! Owns: the layout of the segment header, of the frame header and of the sub-batch header, their checksums and the
//! chain. Never: opens a file, reads a clock, decides where the log ends (that is `recovery`; what lies at one position
//! only says "no live frame here").
//! Neighbours: `batch` writes these headers around what `record` encodes; `recovery` reads them back.
//!
//! Numbers are little-endian. Every header begins at a multiple of 4096. Checksums are CRC-32C (RFC 3720 B.4).
//!
//! ```text
//! segment header (one block, zero from 76 on)      frame header
//! offset bytes field                               offset bytes field
//!      0     8 magic "BLIPSEG2"                         0     4 magic "BFRM"
//!      8     4 version                                  4     2 version
//!     12     4 segment size                             6     2 flags
//!     16    16 store UUID                               8     4 frame bytes: header and body
//!     32     4 node id                                 12     4 padded bytes: the same, up to whole blocks
//!     36     2 stream: core                            16     4 records
//!     38     2 zero                                    20     4 store tag: first 4 bytes of the UUID
//!     40     8 stream: incarnation                     24     8 stream: incarnation
//!     48     8 segment sequence                        32     2 stream: core
//!     56     8 salt                                    34     2 zero
//!     64     8 created, ms                             36     4 node id
//!     72     4 crc of 0..72                            40     8 segment sequence
//!                                                      48     8 salt
//! sub-batch header, in a frame's body                  56     8 lsn: its own position
//!      0     2 virtual shard                           64     8 previous frame's end lsn
//!      2     2 zero                                    72     8 previous frame's chain
//!      4     4 records in it                           80     8 durable lsn: known synced when this was submitted
//!      8     8 index of the first; 0: no log entries   88     8 broker time, ms
//!     16     8 term                                    96     8 term
//!     24     8 broker time, ms                        104    16 zero
//!                                                     120     4 header crc: of 0..120
//!                                                     124     4 body crc: of the body, seeded with the header crc
//! ```
//!
//! The chain of a frame mixes the chain before it with both of its checksums, so it names the whole log up to here. Zeros
//! pad a frame to whole blocks; they are covered by the length, not by a checksum.

use crate::limits::{BATCH_BYTES_MAX, BLOCK};
use crate::planted::planted;
use crate::time::WallMs;
use crate::types::{Lsn, Slot, StreamId, VShard};

/// Bytes of a frame header.
pub const FRAME_HEADER: usize = 128;
/// Bytes of a sub-batch header.
pub const SUB_BATCH_HEADER: usize = 32;
/// The term of a single node.
pub const TERM: u64 = 1;
/// Smallest segment: its header and one frame.
pub const SEGMENT_SIZE_MIN: u32 = 2 * BLOCK as u32;
/// Largest segment.
pub const SEGMENT_SIZE_MAX: u32 = 1 << 30;

/// Beyond what any stream reaches; keeps positions far from overflow.
const SEQUENCE_MAX: u64 = 1 << 32;
/// Likewise: no position of any segment size reaches it.
const LSN_MAX: u64 = (SEQUENCE_MAX + 1) * SEGMENT_SIZE_MAX as u64;

const SEGMENT_MAGIC: [u8; 8] = *b"BLIPSEG2";
const SEGMENT_VERSION: u32 = 1;
const SEGMENT_CRC_AT: usize = 72;
const FRAME_MAGIC: [u8; 4] = *b"BFRM";
const FRAME_VERSION: u16 = 1;
const FRAME_CRC_AT: usize = 120;
const BODY_CRC_AT: usize = 124;

/// Which store, and which node of it, a file belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreId {
    pub uuid: [u8; 16],
    pub node: u32,
}

impl StoreId {
    /// What frames carry of the UUID.
    pub fn tag(&self) -> u32 {
        u32_at(&self.uuid, 0)
    }
}

/// One use of one slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Segment {
    pub stream: StreamId,
    /// Dense within the stream, from 0.
    pub sequence: u64,
    pub slot: Slot,
    /// 64 random bits, new for every use of a slot.
    pub salt: u64,
}

/// The first block of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    pub store: StoreId,
    pub stream: StreamId,
    pub sequence: u64,
    pub salt: u64,
    pub segment_size: u32,
    pub created: WallMs,
}

/// What the first block of a slot can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderBlock {
    /// A slot that was never used.
    Zero,
    Damaged,
    /// Whole, of a version this program does not know.
    Unsupported {
        version: u32,
    },
    Whole(SegmentHeader),
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[0..8].copy_from_slice(&SEGMENT_MAGIC);
        block[8..12].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&self.segment_size.to_le_bytes());
        block[16..32].copy_from_slice(&self.store.uuid);
        block[32..36].copy_from_slice(&self.store.node.to_le_bytes());
        block[36..38].copy_from_slice(&self.stream.core.to_le_bytes());
        block[40..48].copy_from_slice(&self.stream.incarnation.to_le_bytes());
        block[48..56].copy_from_slice(&self.sequence.to_le_bytes());
        block[56..64].copy_from_slice(&self.salt.to_le_bytes());
        block[64..72].copy_from_slice(&self.created.0.to_le_bytes());
        let crc = crc32c::crc32c(&block[..SEGMENT_CRC_AT]);
        block[SEGMENT_CRC_AT..SEGMENT_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads the first block of a slot; `block` is at least [`BLOCK`] bytes.
    pub fn decode(block: &[u8]) -> HeaderBlock {
        let block = &block[..BLOCK];
        if block.iter().all(|&byte| byte == 0) {
            return HeaderBlock::Zero;
        }
        let crc = u32_at(block, SEGMENT_CRC_AT);
        if block[0..8] != SEGMENT_MAGIC || crc != crc32c::crc32c(&block[..SEGMENT_CRC_AT]) {
            return HeaderBlock::Damaged;
        }
        let version = u32_at(block, 8);
        if version != SEGMENT_VERSION {
            return HeaderBlock::Unsupported { version };
        }
        if u64_at(block, 48) > SEQUENCE_MAX {
            return HeaderBlock::Damaged;
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&block[16..32]);
        HeaderBlock::Whole(SegmentHeader {
            store: StoreId { uuid, node: u32_at(block, 32) },
            stream: StreamId { incarnation: u64_at(block, 40), core: u16_at(block, 36) },
            sequence: u64_at(block, 48),
            salt: u64_at(block, 56),
            segment_size: u32_at(block, 12),
            created: WallMs(u64_at(block, 64)),
        })
    }
}

/// What kind of frame it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum FrameKind {
    /// Sub-batches of records.
    Records = 0,
    /// The first frame of a stream: a [`RecoveryNote`](super::record::RecoveryNote).
    Recovery = 1,
    /// The last frame of a stream that was stopped in order. No body.
    Clean = 2,
    /// Carries the watermark while nothing else is written. No body.
    Marker = 3,
}

impl FrameKind {
    fn from_flags(flags: u16) -> Option<FrameKind> {
        match flags {
            0 => Some(FrameKind::Records),
            1 => Some(FrameKind::Recovery),
            2 => Some(FrameKind::Clean),
            3 => Some(FrameKind::Marker),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    pub kind: FrameKind,
    /// Header and body, without padding.
    pub frame_bytes: u32,
    pub records: u32,
    pub store_tag: u32,
    pub node: u32,
    pub stream: StreamId,
    pub sequence: u64,
    pub salt: u64,
    pub lsn: Lsn,
    pub prev_end: Lsn,
    pub prev_chain: u64,
    /// The witness: everything below was known synced when this frame was submitted.
    pub durable: Lsn,
    pub time: WallMs,
    pub term: u64,
}

/// The two checksums of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameSums {
    pub header: u32,
    pub body: u32,
}

impl FrameSums {
    /// The chain after a frame with these checksums.
    pub fn chain(self, before: u64) -> u64 {
        mix(before ^ mix(u64::from(self.header) << 32 | u64::from(self.body)))
    }

    /// Whether `body` is what this frame was written with.
    pub fn body_matches(self, body: &[u8]) -> bool {
        crc32c::crc32c_append(self.header, body) == self.body
    }
}

/// The chain before the first frame of a stream.
pub fn chain_start(store_tag: u32, stream: StreamId) -> u64 {
    mix(mix(stream.incarnation) ^ (u64::from(stream.core) << 32 | u64::from(store_tag)))
}

/// The finaliser of splitmix64: a bijection that spreads every bit.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl FrameHeader {
    /// Header and body, up to whole blocks.
    pub fn padded_bytes(&self) -> u32 {
        self.frame_bytes.next_multiple_of(BLOCK as u32)
    }

    /// Where the next frame of this segment begins.
    pub fn end(&self) -> Lsn {
        Lsn(self.lsn.0 + u64::from(self.padded_bytes()))
    }

    /// Writes the header over the first bytes of `frame`, whose body is already in place.
    pub fn seal(&self, frame: &mut [u8]) -> FrameSums {
        assert!(frame.len() == self.frame_bytes as usize, "frame length");
        let (head, body) = frame.split_at_mut(FRAME_HEADER);
        head.fill(0);
        head[0..4].copy_from_slice(&FRAME_MAGIC);
        head[4..6].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        head[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        head[8..12].copy_from_slice(&self.frame_bytes.to_le_bytes());
        head[12..16].copy_from_slice(&self.padded_bytes().to_le_bytes());
        head[16..20].copy_from_slice(&self.records.to_le_bytes());
        head[20..24].copy_from_slice(&self.store_tag.to_le_bytes());
        head[24..32].copy_from_slice(&self.stream.incarnation.to_le_bytes());
        head[32..34].copy_from_slice(&self.stream.core.to_le_bytes());
        head[36..40].copy_from_slice(&self.node.to_le_bytes());
        head[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        head[48..56].copy_from_slice(&self.salt.to_le_bytes());
        head[56..64].copy_from_slice(&self.lsn.0.to_le_bytes());
        head[64..72].copy_from_slice(&self.prev_end.0.to_le_bytes());
        head[72..80].copy_from_slice(&self.prev_chain.to_le_bytes());
        head[80..88].copy_from_slice(&self.durable.0.to_le_bytes());
        head[88..96].copy_from_slice(&self.time.0.to_le_bytes());
        head[96..104].copy_from_slice(&self.term.to_le_bytes());
        let header = crc32c::crc32c(&head[..FRAME_CRC_AT]);
        let body = crc32c::crc32c_append(header, body);
        head[FRAME_CRC_AT..FRAME_CRC_AT + 4].copy_from_slice(&header.to_le_bytes());
        head[BODY_CRC_AT..BODY_CRC_AT + 4].copy_from_slice(&body.to_le_bytes());
        FrameSums { header, body }
    }

    /// A header whose checksum holds and whose numbers make sense; says nothing about the body.
    pub fn decode(bytes: &[u8]) -> Option<(FrameHeader, FrameSums)> {
        if bytes.len() < FRAME_HEADER || bytes[0..4] != FRAME_MAGIC || u16_at(bytes, 4) != FRAME_VERSION {
            return None;
        }
        let sums = FrameSums { header: u32_at(bytes, FRAME_CRC_AT), body: u32_at(bytes, BODY_CRC_AT) };
        if sums.header != crc32c::crc32c(&bytes[..FRAME_CRC_AT]) && !planted!(NoHeaderCrc) {
            return None;
        }
        let header = FrameHeader {
            kind: FrameKind::from_flags(u16_at(bytes, 6))?,
            frame_bytes: u32_at(bytes, 8),
            records: u32_at(bytes, 16),
            store_tag: u32_at(bytes, 20),
            node: u32_at(bytes, 36),
            stream: StreamId { incarnation: u64_at(bytes, 24), core: u16_at(bytes, 32) },
            sequence: u64_at(bytes, 40),
            salt: u64_at(bytes, 48),
            lsn: Lsn(u64_at(bytes, 56)),
            prev_end: Lsn(u64_at(bytes, 64)),
            prev_chain: u64_at(bytes, 72),
            durable: Lsn(u64_at(bytes, 80)),
            time: WallMs(u64_at(bytes, 88)),
            term: u64_at(bytes, 96),
        };
        let sane = header.frame_bytes as usize >= FRAME_HEADER
            && header.frame_bytes as usize <= FRAME_HEADER + BATCH_BYTES_MAX
            && header.padded_bytes() == u32_at(bytes, 12)
            && header.sequence <= SEQUENCE_MAX
            && header.durable <= header.prev_end
            && header.prev_end <= header.lsn
            && header.lsn.0 <= LSN_MAX;
        sane.then_some((header, sums))
    }
}

/// Where in the log bytes were read, and what a live frame there must say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub store_tag: u32,
    pub segment: Segment,
    pub segment_size: u32,
    pub offset: u32,
}

impl Place {
    pub fn lsn(&self) -> Lsn {
        lsn(self.segment.sequence, self.segment_size, self.offset)
    }
}

/// The position of a byte of a segment in its stream.
pub fn lsn(sequence: u64, segment_size: u32, offset: u32) -> Lsn {
    Lsn(sequence.saturating_mul(u64::from(segment_size)).saturating_add(u64::from(offset)))
}

/// What lies at a position of a segment. None but `Live` says by itself that the log ends here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// The header is live here; the body is not looked at yet.
    Live(FrameHeader, FrameSums),
    /// Of an earlier use of the slot.
    Stale(FrameHeader),
    /// Of another store, or of another position.
    Foreign(FrameHeader),
    Zero,
    Garbage,
}

/// [`Found`], for reports and for the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BytesClass {
    /// A live header over a damaged body, or off the chain.
    Torn = 0,
    Stale = 1,
    Foreign = 2,
    Zero = 3,
    Garbage = 4,
    /// Beyond the last position where a frame could begin.
    SegmentEnd = 5,
    /// No such segment.
    Missing = 6,
    /// The device would not give the bytes.
    Unreadable = 7,
}

impl BytesClass {
    pub fn from_byte(byte: u8) -> Option<BytesClass> {
        use BytesClass::{Foreign, Garbage, Missing, SegmentEnd, Stale, Torn, Unreadable, Zero};
        [Torn, Stale, Foreign, Zero, Garbage, SegmentEnd, Missing, Unreadable].get(usize::from(byte)).copied()
    }
}

impl Found {
    /// What the class is, if the frame turns out not to be part of the log.
    pub fn class(&self) -> BytesClass {
        match self {
            Found::Live(..) => BytesClass::Torn,
            Found::Stale(_) => BytesClass::Stale,
            Found::Foreign(_) => BytesClass::Foreign,
            Found::Zero => BytesClass::Zero,
            Found::Garbage => BytesClass::Garbage,
        }
    }
}

/// Looks at one block read at `place`.
pub fn classify(block: &[u8], place: &Place) -> Found {
    let Some((header, sums)) = FrameHeader::decode(block) else {
        let zero = block.iter().all(|&byte| byte == 0);
        return if zero { Found::Zero } else { Found::Garbage };
    };
    let segment = &place.segment;
    if header.store_tag != place.store_tag && !planted!(NoStoreCheck) {
        return Found::Foreign(header);
    }
    let same_stream = header.stream == segment.stream && header.sequence == segment.sequence || planted!(NoStreamCheck);
    if !same_stream || header.salt != segment.salt {
        // A frame of this very log that lies in another segment's place was misdirected; which of the two it is
        // makes no difference to the verdict.
        return Found::Stale(header);
    }
    let in_place = header.lsn == place.lsn() || planted!(NoPositionCheck);
    if !in_place || header.padded_bytes() > place.segment_size - place.offset {
        return Found::Foreign(header);
    }
    Found::Live(header, sums)
}

/// Precedes a run of records of one virtual shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubBatch {
    pub vshard: VShard,
    pub records: u32,
    /// Index of the first record; the others follow densely. 0: records that are no log entries.
    pub base: u64,
    pub term: u64,
    pub time: WallMs,
}

impl SubBatch {
    pub fn encode(&self, out: &mut [u8]) {
        out[0..2].copy_from_slice(&self.vshard.0.to_le_bytes());
        out[2..4].fill(0);
        out[4..8].copy_from_slice(&self.records.to_le_bytes());
        out[8..16].copy_from_slice(&self.base.to_le_bytes());
        out[16..24].copy_from_slice(&self.term.to_le_bytes());
        out[24..32].copy_from_slice(&self.time.0.to_le_bytes());
    }

    pub fn decode(bytes: &[u8]) -> Option<SubBatch> {
        (bytes.len() >= SUB_BATCH_HEADER).then(|| SubBatch {
            vshard: VShard(u16_at(bytes, 0)),
            records: u32_at(bytes, 4),
            base: u64_at(bytes, 8),
            term: u64_at(bytes, 16),
            time: WallMs(u64_at(bytes, 24)),
        })
    }
}

/// Little-endian number at `at`; the caller has checked the length.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment_header() -> SegmentHeader {
        SegmentHeader {
            store: StoreId { uuid: *b"0123456789abcdef", node: 7 },
            stream: StreamId { incarnation: 0x0102, core: 3 },
            sequence: 5,
            salt: 0x1122_3344_5566_7788,
            segment_size: 1 << 20,
            created: WallMs(1_700_000_000_000),
        }
    }

    fn frame_header() -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Marker,
            frame_bytes: FRAME_HEADER as u32,
            records: 0,
            store_tag: 0x3332_3130,
            node: 7,
            stream: StreamId { incarnation: 0x0102, core: 3 },
            sequence: 5,
            salt: 0x1122_3344_5566_7788,
            lsn: Lsn(5 * (1 << 20) + 8192),
            prev_end: Lsn(5 * (1 << 20) + 8192),
            prev_chain: 0xaabb_ccdd_eeff_0011,
            durable: Lsn(5 * (1 << 20) + 4096),
            time: WallMs(1_700_000_000_001),
            term: TERM,
        }
    }

    fn place() -> Place {
        let header = segment_header();
        Place {
            store_tag: header.store.tag(),
            segment: Segment { stream: header.stream, sequence: 5, slot: Slot(0), salt: header.salt },
            segment_size: 1 << 20,
            offset: 8192,
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_segment_header() {
        let block = segment_header().encode();
        assert_eq!(
            hex(&block[..80]),
            "424c4950534547320100000000001000303132333435363738396162636465660700000003000000\
             020100000000000005000000000000008877665544332211\
             0068e5cf8b010000a7d358e900000000"
        );
        assert!(block[76..].iter().all(|&byte| byte == 0));
        assert_eq!(SegmentHeader::decode(&block), HeaderBlock::Whole(segment_header()));
    }

    #[test]
    fn golden_frame_header() {
        let mut frame = vec![0xff; FRAME_HEADER];
        frame_header().seal(&mut frame);
        assert_eq!(
            hex(&frame),
            "4246524d010003008000000000100000000000003031323302010000000000000300000007000000\
             0500000000000000887766554433221100205000000000000020500000000000\
             1100ffeeddccbbaa00105000000000000168e5cf8b0100000100000000000000\
             0000000000000000000000000000000095ad628d95ad628d"
        );
    }

    #[test]
    fn every_flipped_bit_of_a_segment_header_is_noticed() {
        let block = segment_header().encode();
        for bit in 0..76 * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&bad), HeaderBlock::Damaged, "bit {bit}");
        }
        assert_eq!(SegmentHeader::decode(&[0; BLOCK]), HeaderBlock::Zero);
    }

    #[test]
    fn bytes_are_told_apart() {
        let mut block = vec![0; BLOCK];
        let sums = frame_header().seal(&mut block[..FRAME_HEADER]);
        assert_eq!(classify(&block, &place()), Found::Live(frame_header(), sums));

        let mut other = place();
        other.segment.salt ^= 1;
        assert!(matches!(classify(&block, &other), Found::Stale(_)), "other use of the slot");
        other = place();
        other.segment.stream.incarnation += 1;
        assert!(matches!(classify(&block, &other), Found::Stale(_)), "other stream");
        other = place();
        other.segment.sequence += 1;
        assert!(matches!(classify(&block, &other), Found::Stale(_)), "other sequence");
        other = place();
        other.offset += BLOCK as u32;
        assert!(matches!(classify(&block, &other), Found::Foreign(_)), "other position");
        other = place();
        other.store_tag ^= 1;
        assert!(matches!(classify(&block, &other), Found::Foreign(_)), "other store");

        for bit in 0..(BODY_CRC_AT * 8) {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(classify(&bad, &place()), Found::Garbage, "bit {bit}");
        }
        assert_eq!(classify(&[0; BLOCK], &place()), Found::Zero);
        let mut nearly_zero = [0; BLOCK];
        nearly_zero[BLOCK - 1] = 1;
        assert_eq!(classify(&nearly_zero, &place()), Found::Garbage);
    }

    /// Found by fuzzing: the end of such a frame overflowed.
    #[test]
    fn a_position_no_stream_reaches_is_not_believed() {
        let mut header = frame_header();
        let decoded = |header: &FrameHeader| {
            let mut frame = vec![0; FRAME_HEADER];
            header.seal(&mut frame);
            FrameHeader::decode(&frame).map(|(header, _)| header.end())
        };
        (header.sequence, header.lsn) = (SEQUENCE_MAX, lsn(SEQUENCE_MAX, SEGMENT_SIZE_MAX, BLOCK as u32));
        assert_eq!(decoded(&header), Some(Lsn(header.lsn.0 + BLOCK as u64)));
        header.lsn = Lsn(u64::MAX);
        assert_eq!(decoded(&header), None);
    }

    #[test]
    fn a_frame_that_leaves_its_segment_is_not_live() {
        let mut header = frame_header();
        header.frame_bytes = 3 * BLOCK as u32;
        let mut frame = vec![0; header.frame_bytes as usize];
        header.lsn = lsn(5, 1 << 20, (1 << 20) - 2 * BLOCK as u32);
        header.prev_end = header.lsn;
        header.seal(&mut frame);
        let place = Place { offset: (1 << 20) - 2 * BLOCK as u32, ..place() };
        assert!(matches!(classify(&frame[..BLOCK], &place), Found::Foreign(_)));
    }

    #[test]
    fn an_old_body_under_a_new_header_fails() {
        let mut header = frame_header();
        header.frame_bytes += 16;
        let mut frame = vec![7; header.frame_bytes as usize];
        let sums = header.seal(&mut frame);
        assert!(sums.body_matches(&frame[FRAME_HEADER..]));
        let other = FrameSums { header: sums.header ^ 1, body: sums.body };
        assert!(!other.body_matches(&frame[FRAME_HEADER..]));
        assert_ne!(sums.chain(1), sums.chain(2));
        assert_ne!(sums.chain(1), other.chain(1));
    }
}
