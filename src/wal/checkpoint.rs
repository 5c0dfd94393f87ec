//! What the store remembers besides the log: the container around the states of all virtual shards.
//!
//! Owns: the layout of a checkpoint file, its checksums, and which of two files counts. Never: opens a file; looks inside a
//! virtual shard's state (the shard encodes it).
//! Neighbours: the keeper writes and reads the files; `recovery` begins where a checkpoint ends.
//!
//! Two files are written in turn and in place, so a file may hold half of a new checkpoint over half of an old one. Each
//! block's checksum is seeded with the header's, which covers the checkpoint's number: blocks of two checkpoints never mix.
//!
//! ```text
//! header (one block, zero from 44 on)              body, cut into blocks of 64 KiB behind the header
//! offset bytes field                               block: 4 crc of what follows, seeded with the header crc;
//!      0     8 magic "BLIPCKP2"                           65532 bytes of body; the last one is shorter and
//!      8     4 version                                    the file padded with zeros to 4 KiB
//!     12     4 zero                                body: 16 store UUID, 4 node, 4 segment size, 8 incarnation,
//!     16     8 number                                    8 time high-water mark, 4 streams, 4 live segments,
//!     24     8 bytes of body                             4 virtual shards, 4 zero, then
//!     32     4 crc of the whole body               stream: 8 incarnation, 2 core, 1 sealed, 5 zero, 8 covered,
//!     36     4 zero                                        8 durable, 8 end, 8 chain
//!     40     4 header crc: of 0..40                live: 8 incarnation, 2 core, 2 zero, 4 slot, 8 sequence, 8 salt
//!                                                  vshard: 8 last index, 8 bytes of state, state
//! ```

use bytes::Bytes;

use super::format::{Segment, StoreId, u16_at, u32_at, u64_at};
use crate::limits::BLOCK;
use crate::planted::planted;
use crate::time::WallMs;
use crate::types::{Lsn, Slot, StreamId};

/// One checksum per so many bytes of a checkpoint file.
pub const CHECKPOINT_BLOCK: usize = 64 * 1024;

const MAGIC: [u8; 8] = *b"BLIPCKP2";
const VERSION: u32 = 1;
const HEADER_CRC_AT: usize = 40;
const BLOCK_BODY: usize = CHECKPOINT_BLOCK - 4;
const FIXED: usize = 56;
const STREAM: usize = 48;
const LIVE: usize = 32;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    pub store: StoreId,
    pub segment_size: u32,
    /// Grows by one per checkpoint of the store.
    pub number: u64,
    /// The boot that wrote it.
    pub incarnation: u64,
    /// Broker time never runs backwards, not even over a restart.
    pub time: WallMs,
    /// Every stream that still has a live segment, and every stream of this incarnation.
    pub streams: Vec<StreamState>,
    /// Every segment that this checkpoint's restart needs. Without gaps: a stream's segments are freed oldest first, or else damage
    /// at the end of one before a gap could not be told from its end.
    pub live: Vec<Segment>,
    /// By virtual shard.
    pub vshards: Vec<VShardState>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamState {
    pub stream: StreamId,
    /// The states include every record below it.
    pub covered: Lsn,
    /// Known synced when the checkpoint was written; not below `covered`.
    pub durable: Lsn,
    pub sealed: Option<SealedEnd>,
}

/// Where a stream of an earlier boot ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedEnd {
    pub end: Lsn,
    pub chain: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VShardState {
    /// The last index that `state` includes; 0: none.
    pub last_index: u64,
    /// Encoded by the shard.
    pub state: Bytes,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("checkpoint file of {0} bytes is too short")]
    Short(usize),
    #[error("checkpoint header is damaged")]
    Header,
    #[error("checkpoint version {0} is not known")]
    Version(u32),
    #[error("checkpoint {number}: block {block} is damaged")]
    Block { number: u64, block: u64 },
    #[error("checkpoint {number}: the whole is damaged although every block is not")]
    Whole { number: u64 },
    #[error("checkpoint {number}: byte {at} of the body does not fit its layout")]
    Layout { number: u64, at: usize },
}

impl Checkpoint {
    /// The whole file; its length is a multiple of [`BLOCK`].
    pub fn encode(&self) -> Vec<u8> {
        let body = self.encode_body();
        let mut header = [0; BLOCK];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.number.to_le_bytes());
        header[24..32].copy_from_slice(&(body.len() as u64).to_le_bytes());
        header[32..36].copy_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        let header_crc = crc32c::crc32c(&header[..HEADER_CRC_AT]);
        header[HEADER_CRC_AT..HEADER_CRC_AT + 4].copy_from_slice(&header_crc.to_le_bytes());

        let blocks = body.len().div_ceil(BLOCK_BODY);
        let mut file = Vec::with_capacity((BLOCK + body.len() + 4 * blocks).next_multiple_of(BLOCK));
        file.extend_from_slice(&header);
        for block in body.chunks(BLOCK_BODY) {
            file.extend_from_slice(&crc32c::crc32c_append(header_crc, block).to_le_bytes());
            file.extend_from_slice(block);
        }
        file.resize(file.len().next_multiple_of(BLOCK), 0);
        file
    }

    fn encode_body(&self) -> Vec<u8> {
        let states: usize = self.vshards.iter().map(|vshard| 16 + vshard.state.len()).sum();
        let mut body = Vec::with_capacity(FIXED + STREAM * self.streams.len() + LIVE * self.live.len() + states);
        body.extend_from_slice(&self.store.uuid);
        body.extend_from_slice(&self.store.node.to_le_bytes());
        body.extend_from_slice(&self.segment_size.to_le_bytes());
        body.extend_from_slice(&self.incarnation.to_le_bytes());
        body.extend_from_slice(&self.time.0.to_le_bytes());
        for count in [self.streams.len(), self.live.len(), self.vshards.len(), 0] {
            body.extend_from_slice(&u32::try_from(count).expect("bounded by slots and virtual shards").to_le_bytes());
        }
        for state in &self.streams {
            body.extend_from_slice(&state.stream.incarnation.to_le_bytes());
            body.extend_from_slice(&state.stream.core.to_le_bytes());
            body.extend_from_slice(&[u8::from(state.sealed.is_some()), 0, 0, 0, 0, 0]);
            let SealedEnd { end, chain } = state.sealed.unwrap_or(SealedEnd { end: Lsn(0), chain: 0 });
            for number in [state.covered.0, state.durable.0, end.0, chain] {
                body.extend_from_slice(&number.to_le_bytes());
            }
        }
        for segment in &self.live {
            body.extend_from_slice(&segment.stream.incarnation.to_le_bytes());
            body.extend_from_slice(&segment.stream.core.to_le_bytes());
            body.extend_from_slice(&[0; 2]);
            body.extend_from_slice(&segment.slot.0.to_le_bytes());
            body.extend_from_slice(&segment.sequence.to_le_bytes());
            body.extend_from_slice(&segment.salt.to_le_bytes());
        }
        for vshard in &self.vshards {
            body.extend_from_slice(&vshard.last_index.to_le_bytes());
            body.extend_from_slice(&(vshard.state.len() as u64).to_le_bytes());
            body.extend_from_slice(&vshard.state);
        }
        body
    }

    pub fn decode(file: &[u8]) -> Result<Checkpoint, CheckpointError> {
        if file.len() < BLOCK {
            return Err(CheckpointError::Short(file.len()));
        }
        let header_crc = u32_at(file, HEADER_CRC_AT);
        if file[0..8] != MAGIC || header_crc != crc32c::crc32c(&file[..HEADER_CRC_AT]) {
            return Err(CheckpointError::Header);
        }
        let version = u32_at(file, 8);
        if version != VERSION {
            return Err(CheckpointError::Version(version));
        }
        let number = u64_at(file, 16);
        let body_len = usize::try_from(u64_at(file, 24)).map_err(|_| CheckpointError::Header)?;
        let there = file.len() - BLOCK;
        if body_len > there || body_len + 4 * body_len.div_ceil(BLOCK_BODY) > there {
            return Err(CheckpointError::Short(file.len()));
        }
        let mut body = Vec::with_capacity(body_len);
        for (block, bytes) in file[BLOCK..].chunks(CHECKPOINT_BLOCK).enumerate() {
            let len = (body_len - body.len()).min(BLOCK_BODY);
            if len == 0 {
                break;
            }
            let content = &bytes[4..4 + len];
            if u32_at(bytes, 0) != crc32c::crc32c_append(header_crc, content) && !planted!(NoCheckpointCrc) {
                return Err(CheckpointError::Block { number, block: block as u64 });
            }
            body.extend_from_slice(content);
        }
        if u32_at(file, 32) != crc32c::crc32c(&body) && !planted!(NoCheckpointCrc) {
            return Err(CheckpointError::Whole { number });
        }
        Checkpoint::decode_body(number, Bytes::from(body))
    }

    fn decode_body(number: u64, body: Bytes) -> Result<Checkpoint, CheckpointError> {
        let mut at = 0_usize;
        let mut take = |len: usize| {
            let from = at;
            let to = from.checked_add(len).filter(|&to| to <= body.len());
            at = to.ok_or(CheckpointError::Layout { number, at: from })?;
            Ok(body.slice(from..at))
        };
        let fixed = take(FIXED)?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&fixed[..16]);
        let mut streams = Vec::new();
        for _ in 0..u32_at(&fixed, 40) {
            let entry = take(STREAM)?;
            streams.push(StreamState {
                stream: stream_at(&entry),
                covered: Lsn(u64_at(&entry, 16)),
                durable: Lsn(u64_at(&entry, 24)),
                sealed: (entry[10] != 0).then(|| SealedEnd { end: Lsn(u64_at(&entry, 32)), chain: u64_at(&entry, 40) }),
            });
        }
        let mut live = Vec::new();
        for _ in 0..u32_at(&fixed, 44) {
            let entry = take(LIVE)?;
            live.push(Segment {
                stream: stream_at(&entry),
                sequence: u64_at(&entry, 16),
                slot: Slot(u32_at(&entry, 12)),
                salt: u64_at(&entry, 24),
            });
        }
        let mut vshards = Vec::new();
        for _ in 0..u32_at(&fixed, 48) {
            let entry = take(16)?;
            let len = usize::try_from(u64_at(&entry, 8)).unwrap_or(usize::MAX);
            vshards.push(VShardState { last_index: u64_at(&entry, 0), state: take(len)? });
        }
        if at != body.len() {
            return Err(CheckpointError::Layout { number, at });
        }
        Ok(Checkpoint {
            store: StoreId { uuid, node: u32_at(&fixed, 16) },
            segment_size: u32_at(&fixed, 20),
            number,
            incarnation: u64_at(&fixed, 24),
            time: WallMs(u64_at(&fixed, 32)),
            streams,
            live,
            vshards,
        })
    }
}

fn stream_at(entry: &[u8]) -> StreamId {
    StreamId { incarnation: u64_at(entry, 0), core: u16_at(entry, 8) }
}

/// Which of the two files a checkpoint goes to: the newest one is never written over.
pub fn file_of(number: u64) -> usize {
    if planted!(CheckpointInPlace) { 0 } else { (number % 2) as usize }
}

/// Which of the two files a start uses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chosen {
    /// `None`: none was ever whole, so nothing was ever freed, and the log holds everything.
    pub checkpoint: Option<Checkpoint>,
    /// Files that were there and not whole.
    pub fallbacks: u32,
    /// What the older checkpoint needs, if it is whole too: those slots that recovery calls free and that are named here are not
    /// to be used before the next checkpoint is whole. (A slot named here and not free is another segment by now.)
    pub held: Vec<Segment>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChooseError {
    #[error("both checkpoints are damaged: {a}; {b}")]
    BothDamaged { a: CheckpointError, b: CheckpointError },
    #[error("both checkpoints carry the number {0}")]
    SameNumber(u64),
    #[error("a checkpoint is of version {0}, which this program does not know")]
    Version(u32),
}

/// The newest whole one of two files. `None` or a file of zeros: never written.
///
/// One damaged file beside a whole one is what a crash while writing it leaves; one damaged file beside none is the same for
/// the first checkpoint of all. Segments are freed only after two checkpoints cover them, so the older one still has its log.
pub fn choose(a: Option<&[u8]>, b: Option<&[u8]>) -> Result<Chosen, ChooseError> {
    let load = |file: Option<&[u8]>| match file {
        Some(bytes) if bytes.iter().any(|&byte| byte != 0) => Some(Checkpoint::decode(bytes)),
        _ => None,
    };
    match (load(a), load(b)) {
        (Some(Err(CheckpointError::Version(version))), _) | (_, Some(Err(CheckpointError::Version(version)))) => {
            Err(ChooseError::Version(version))
        }
        (Some(Err(a)), Some(Err(b))) => Err(ChooseError::BothDamaged { a, b }),
        (Some(Ok(a)), Some(Ok(b))) if a.number == b.number => Err(ChooseError::SameNumber(a.number)),
        (Some(Ok(a)), Some(Ok(b))) => {
            let a_is_newer = (a.number > b.number) != planted!(OlderCheckpoint);
            let (newest, older) = if a_is_newer { (a, b) } else { (b, a) };
            Ok(Chosen { checkpoint: Some(newest), fallbacks: 0, held: older.live })
        }
        (Some(Ok(whole)), Some(Err(_))) | (Some(Err(_)), Some(Ok(whole))) => {
            Ok(Chosen { checkpoint: Some(whole), fallbacks: 1, held: Vec::new() })
        }
        (Some(Ok(whole)), None) | (None, Some(Ok(whole))) => {
            Ok(Chosen { checkpoint: Some(whole), fallbacks: 0, held: Vec::new() })
        }
        (Some(Err(_)), None) | (None, Some(Err(_))) => Ok(Chosen { checkpoint: None, fallbacks: 1, held: Vec::new() }),
        (None, None) => Ok(Chosen::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(number: u64, state: usize) -> Checkpoint {
        let stream = StreamId { incarnation: 3, core: 1 };
        Checkpoint {
            store: StoreId { uuid: *b"0123456789abcdef", node: 2 },
            segment_size: 1 << 20,
            number,
            incarnation: 4,
            time: WallMs(5),
            streams: vec![
                StreamState {
                    stream,
                    covered: Lsn(6),
                    durable: Lsn(7),
                    sealed: Some(SealedEnd { end: Lsn(8), chain: 9 }),
                },
                StreamState {
                    stream: StreamId { incarnation: 4, core: 0 },
                    covered: Lsn(1),
                    durable: Lsn(2),
                    sealed: None,
                },
            ],
            live: vec![Segment { stream, sequence: 10, slot: Slot(11), salt: 12 }],
            vshards: vec![
                VShardState { last_index: 13, state: Bytes::from(vec![number as u8; state]) },
                VShardState::default(),
            ],
        }
    }

    #[test]
    fn checkpoints_come_back() {
        for state in [0, 1, BLOCK_BODY - 300, BLOCK_BODY, 3 * CHECKPOINT_BLOCK] {
            let file = sample(1, state).encode();
            assert_eq!(file.len() % BLOCK, 0);
            assert_eq!(Checkpoint::decode(&file), Ok(sample(1, state)));
            // A file that was longer before is fine, too.
            let mut longer = file.clone();
            longer.resize(file.len() + 3 * CHECKPOINT_BLOCK, 0xaa);
            assert_eq!(Checkpoint::decode(&longer), Ok(sample(1, state)));
        }
    }

    #[test]
    fn golden_checkpoint() {
        let file = sample(1, 2).encode();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            hex(&file[..48]),
            "424c4950434b503201000000000000000100000000000000da00000000000000f73a2cea0000000070252ce300000000"
        );
        assert_eq!(
            hex(&file[BLOCK + 4..BLOCK + 4 + FIXED]),
            "3031323334353637383961626364656602000000000010000400000000000000\
             050000000000000002000000010000000200000000000000"
        );
    }

    #[test]
    fn every_damage_is_noticed() {
        let file = sample(1, 2 * CHECKPOINT_BLOCK).encode();
        let used = file.len() - BLOCK;
        for at in (0..44).chain((BLOCK..used).step_by(997)) {
            if (12..16).contains(&at) || (36..40).contains(&at) {
                continue;
            }
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            assert!(Checkpoint::decode(&bad).is_err(), "byte {at}");
        }
        for len in (0..used).step_by(4_096) {
            assert!(Checkpoint::decode(&file[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn blocks_of_two_checkpoints_never_mix() {
        let old = sample(1, 2 * CHECKPOINT_BLOCK).encode();
        let mut file = sample(3, 2 * CHECKPOINT_BLOCK).encode();
        let at = BLOCK + CHECKPOINT_BLOCK;
        file[at..at + CHECKPOINT_BLOCK].copy_from_slice(&old[at..at + CHECKPOINT_BLOCK]);
        assert_eq!(Checkpoint::decode(&file), Err(CheckpointError::Block { number: 3, block: 1 }));
    }

    #[test]
    fn the_newest_whole_one_wins() {
        let (one, two) = (sample(1, 9).encode(), sample(2, 9).encode());
        let mut torn = sample(3, 9).encode();
        torn[BLOCK + 100] ^= 1;
        let number = |chosen: &Chosen| chosen.checkpoint.as_ref().map(|checkpoint| checkpoint.number);

        assert_eq!(choose(None, None), Ok(Chosen::default()));
        assert_eq!(choose(Some(&[]), Some(&[0; 4096])), Ok(Chosen::default()));
        for (a, b) in [(&one, &two), (&two, &one)] {
            let chosen = choose(Some(a), Some(b)).unwrap();
            assert_eq!((number(&chosen), chosen.fallbacks), (Some(2), 0));
            assert_eq!(chosen.held, sample(1, 9).live);
        }
        let chosen = choose(Some(&torn), Some(&two)).unwrap();
        assert_eq!((number(&chosen), chosen.fallbacks, chosen.held.len()), (Some(2), 1, 0));
        let chosen = choose(Some(&torn), None).unwrap();
        assert_eq!((number(&chosen), chosen.fallbacks), (None, 1), "the first one ever, torn");
        assert!(matches!(choose(Some(&torn), Some(&torn)), Err(ChooseError::BothDamaged { .. })));
        assert_eq!(choose(Some(&one), Some(&one)), Err(ChooseError::SameNumber(1)));
    }
}
