//! Recovery of a store that was written by the real writer and then damaged as the input says: it never panics, never invents a
//! record, never passes over what somebody on the disk knows to have been durable, says the same when it is asked again, and
//! brings back everything when nothing was damaged.
//!
//! What is built is drawn from the front of the input, what is broken from its back.

use blipmq::limits::BLOCK;
use blipmq::time::WallMs;
use blipmq::types::{Lsn, Slot, StreamId};
use blipmq::wal::batch::{Grant, Log, LogConfig};
use blipmq::wal::checkpoint::{Checkpoint, choose};
use blipmq::wal::format::{FRAME_HEADER, FrameHeader, FrameKind, HeaderBlock, Segment, SegmentHeader};
use blipmq::wal::record::RecoveryNote;
use blipmq::wal::recovery::{Mode, StoreShape};

use super::draw::Draw;
use super::store::{Image, Known, Restart, Store, is_same_use, restart};

pub fn run(input: &[u8]) {
    let store = Store::live(&mut Draw::front(input));
    let baseline = store.undamaged();
    let mut draw = Draw::back(input);
    let forged = draw.one_in(4);
    let mut disk = store.disk.clone();
    let mut files = store.files.clone();
    for _ in 0..draw.below(6) {
        if forged {
            forge(&mut disk, &mut files, &store, &mut draw);
        } else {
            damage(&mut disk, &store, &mut draw);
        }
    }
    if !forged && draw.one_in(4) {
        damage_file(&mut files, &mut draw);
    }
    let file = |nth: usize| (!files[nth].is_empty()).then_some(&files[nth][..]);
    let chosen = match choose(file(0), file(1)) {
        Ok(chosen) => chosen,
        Err(_) if forged => return,
        Err(error) => panic!("one file is whole: {error}"),
    };
    let checkpoint = chosen.checkpoint.as_ref();
    let strict = restart(&store.shape, &disk, checkpoint, Mode::Strict);
    let salvaged = restart(&store.shape, &disk, checkpoint, Mode::Salvage);
    if forged {
        // Somebody who can make checksums can make records. Only: no panic, no endless loop, no memory for the asking.
        return;
    }
    let salvaged = salvaged.expect("a salvage goes on");
    for yielded in &salvaged.entries {
        let written = store.was_written(yielded.vshard, yielded.index, &yielded.content);
        assert!(written, "salvage invents {:?} {:?}", yielded.vshard, yielded.index);
    }
    match strict {
        Ok(strict) => {
            if let Some(checkpoint) = checkpoint {
                let whole = |file: &Vec<u8>| Checkpoint::decode(file).as_ref() == Ok(checkpoint);
                assert!(store.files.iter().any(whole), "a damaged checkpoint was taken for whole");
            }
            if disk.slots == store.disk.slots && disk.unreadable.is_empty() {
                assert_eq!(strict.recovered.last_index, baseline.recovered.last_index, "nothing was damaged");
            }
            store.check_whole(&strict, checkpoint);
            assert!(strict.recovered.time <= store.wall(), "time from the future");
            assert!(
                missing(&store.shape, checkpoint, &strict).is_none(),
                "{:?}",
                missing(&store.shape, checkpoint, &strict)
            );
            assert!(salvaged.recovered.damage.is_empty(), "{:?}", salvaged.recovered.damage);
            assert!(same(&strict, &salvaged), "strict recovery and salvage differ");
            if let Some(witness) = witness(&store, &disk, checkpoint, &strict) {
                panic!("silent: {witness}");
            }
            again(&store, &disk, checkpoint, &strict, &mut draw);
        }
        Err(error) => {
            assert!(error.to_string().split_whitespace().count() > 3, "{error}");
            assert!(!salvaged.recovered.damage.is_empty(), "salvage sees nothing wrong: {error}");
        }
    }
}

fn same(a: &Restart, b: &Restart) -> bool {
    a.recovered.last_index == b.recovered.last_index
        && a.entries.len() == b.entries.len()
        && a.entries
            .iter()
            .zip(&b.entries)
            .all(|(a, b)| (a.vshard, a.index, &a.content) == (b.vshard, b.index, &b.content))
}

/// Any place of the disk: a slot, and an offset in it.
fn place(disk: &Image, draw: &mut Draw<'_>) -> Option<(u32, usize)> {
    let slots: Vec<u32> = disk.slots.keys().copied().collect();
    let slot = *draw.pick(&slots)?;
    let len = disk.slots[&slot].len();
    (len >= BLOCK).then(|| (slot, draw.below(len / BLOCK) * BLOCK))
}

/// What a disk may do. No bytes are taken from the input as they are, or a fuzzer would find those that fit a checksum.
fn damage(disk: &mut Image, store: &Store, draw: &mut Draw<'_>) {
    match draw.below(12) {
        // One to three bits of a frame, or of its header alone.
        0..3 => {
            let Some(known) = draw.pick(&store.known) else { return };
            let len = if draw.one_in(2) { FRAME_HEADER } else { known.header.frame_bytes as usize };
            for _ in 0..1 + draw.below(3) {
                let bit = draw.below(len * 8);
                flip(disk, known.segment.slot, known.offset * 8 + bit);
            }
        }
        3 => {
            let Some((slot, offset)) = place(disk, draw) else { return };
            flip(disk, Slot(slot), offset * 8 + draw.below(BLOCK * 8));
        }
        // The header of a segment.
        4 => {
            let Some(known) = draw.pick(&store.known) else { return };
            match draw.below(3) {
                0 => fill(disk, known.segment.slot, 0, BLOCK, 0),
                1 => flip(disk, known.segment.slot, draw.below(76 * 8)),
                _ => fill(disk, known.segment.slot, 0, 512, 0xff),
            }
        }
        // A write that was lost, in whole or in part.
        5 => {
            let Some(known) = draw.pick(&store.known) else { return };
            let start = known.offset - if known.opening.is_some() { BLOCK } else { 0 };
            let all = draw.one_in(2);
            for (sector, before) in known.before.chunks(512).enumerate() {
                if all || draw.one_in(2) {
                    put(disk, known.segment.slot, start + sector * 512, before);
                }
            }
        }
        // A write that went elsewhere, and may be missing where it should be.
        6 => {
            let Some(known) = draw.pick(&store.known) else { return };
            let Some((slot, offset)) = place(disk, draw) else { return };
            put(disk, Slot(slot), offset, &known.bytes);
            if draw.one_in(2) {
                let at = known.offset;
                fill(disk, known.segment.slot, at, known.bytes.len(), 0);
            }
        }
        7 => {
            let Some((slot, offset)) = place(disk, draw) else { return };
            let len = (1 + draw.below(4)) * BLOCK;
            let byte = [0, 0, 0xff, draw.byte()][draw.below(4)];
            fill(disk, Slot(slot), offset, len, byte);
        }
        8 => {
            let Some((slot, offset)) = place(disk, draw) else { return };
            disk.unreadable.insert((slot, (offset / BLOCK) as u32));
        }
        9 => {
            let Some((slot, offset)) = place(disk, draw) else { return };
            let short = offset + draw.below(BLOCK);
            disk.slots.get_mut(&slot).expect("a place").truncate(short);
        }
        10 => {
            let Some((slot, _)) = place(disk, draw) else { return };
            disk.slots.remove(&slot);
        }
        // A file in the place of another, or in both.
        _ => {
            let (Some((from, _)), Some((to, _))) = (place(disk, draw), place(disk, draw)) else { return };
            let bytes = disk.slots[&from].clone();
            let replaced = disk.slots.insert(to, bytes);
            if let Some(replaced) = replaced.filter(|_| draw.one_in(2)) {
                disk.slots.insert(from, replaced);
            }
        }
    }
}

/// One of the two, so that the other is there to fall back on.
fn damage_file(files: &mut [Vec<u8>; 2], draw: &mut Draw<'_>) {
    let file = &mut files[draw.below(2)];
    if file.is_empty() {
        return;
    }
    match draw.below(4) {
        0 => {
            let bit = draw.below(file.len() * 8);
            file[bit / 8] ^= 1 << (bit % 8);
        }
        1 => file.truncate(draw.below(file.len())),
        2 => {
            let at = draw.below(file.len());
            file[at..].fill(0);
        }
        _ => {
            let to = draw.below(file.len());
            file[..to].fill(0xee);
        }
    }
}

fn flip(disk: &mut Image, slot: Slot, bit: usize) {
    if let Some(byte) = disk.slots.get_mut(&slot.0).and_then(|bytes| bytes.get_mut(bit / 8)) {
        *byte ^= 1 << (bit % 8);
    }
}

fn fill(disk: &mut Image, slot: Slot, offset: usize, len: usize, byte: u8) {
    if let Some(bytes) = disk.slots.get_mut(&slot.0) {
        let end = (offset + len).min(bytes.len());
        bytes[offset.min(end)..end].fill(byte);
    }
}

fn put(disk: &mut Image, slot: Slot, offset: usize, new: &[u8]) {
    if let Some(bytes) = disk.slots.get_mut(&slot.0) {
        let end = (offset + new.len()).min(bytes.len());
        let start = offset.min(end);
        bytes[start..end].copy_from_slice(&new[..end - start]);
    }
}

/// Who still knows, on this disk, of something durable behind the end that recovery found.
fn witness(store: &Store, disk: &Image, checkpoint: Option<&Checkpoint>, strict: &Restart) -> Option<String> {
    let state = |stream: StreamId| checkpoint?.streams.iter().find(move |state| state.stream == stream);
    let retired =
        |stream: StreamId| checkpoint.is_some_and(|c| stream.incarnation <= c.incarnation) && state(stream).is_none();
    let end = |stream: StreamId| {
        let sealed = strict.recovered.sealed.iter().find(|sealed| sealed.stream == stream);
        let walked = sealed.map_or(Lsn(BLOCK as u64), |sealed| sealed.end);
        walked.max(state(stream).map_or(Lsn(0), |state| state.covered))
    };
    if let Some(state) = checkpoint.iter().flat_map(|c| &c.streams).find(|state| state.durable > end(state.stream)) {
        return Some(format!("the checkpoint knows stream {} up to {}", state.stream, state.durable));
    }
    for known in &store.known {
        let Known { segment, header, .. } = known;
        if retired(segment.stream) || !is_there(known, disk) {
            continue;
        }
        let opened = opened(store, disk, *segment);
        if opened != Opened::No && header.durable > end(segment.stream) {
            return Some(format!("the frame at {} of {segment:?} knows up to {}", header.lsn, header.durable));
        }
        let first = segment.sequence == 0 && known.offset == BLOCK;
        if opened == Opened::Whole && first && header.kind == FrameKind::Recovery && is_whole(known, disk) {
            let body = &known.bytes[FRAME_HEADER..header.frame_bytes as usize];
            let sealed = RecoveryNote::decode(body).expect("whole").sealed;
            if let Some(sealed) =
                sealed.iter().find(|sealed| !retired(sealed.stream) && sealed.end > end(sealed.stream))
            {
                return Some(format!("the note of stream {} knows {sealed:?}", segment.stream));
            }
        }
    }
    None
}

/// A segment that the checkpoint needs, of which something was durable, and that is not part of what was found.
fn missing(shape: &StoreShape, checkpoint: Option<&Checkpoint>, strict: &Restart) -> Option<Segment> {
    let checkpoint = checkpoint?;
    let durable = |segment: &Segment| {
        let state = checkpoint.streams.iter().find(|state| state.stream == segment.stream);
        let first = segment.sequence * u64::from(shape.segment_size) + BLOCK as u64;
        state.is_some_and(|state| state.durable.0 > first)
    };
    let found = |segment: &Segment| strict.recovered.live.iter().any(|live| is_same_use(live, segment));
    checkpoint.live.iter().find(|segment| durable(segment) && !found(segment)).copied()
}

fn is_there(known: &Known, disk: &Image) -> bool {
    disk.get(known.segment.slot, known.offset, FRAME_HEADER) == Some(&known.bytes[..FRAME_HEADER])
}

fn is_whole(known: &Known, disk: &Image) -> bool {
    let len = known.header.frame_bytes as usize;
    disk.get(known.segment.slot, known.offset, len) == Some(&known.bytes[..len])
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Opened {
    No,
    /// The header is damaged; the first frame tells whose segment it is.
    ByFrame,
    Whole,
}

/// Whether recovery can know what this slot is used for.
fn opened(store: &Store, disk: &Image, segment: Segment) -> Opened {
    let Some(first) = store.known.iter().find(|known| known.segment == segment && known.opening.is_some()) else {
        return Opened::No;
    };
    let Some(block) = disk.get(segment.slot, 0, BLOCK) else { return Opened::No };
    match SegmentHeader::decode(block) {
        HeaderBlock::Whole(header) => {
            let same =
                (header.stream, header.sequence, header.salt) == (segment.stream, segment.sequence, segment.salt);
            if same { Opened::Whole } else { Opened::No }
        }
        _ if is_there(first, disk) => Opened::ByFrame,
        _ => Opened::No,
    }
}

/// The next start says in its first frame what was found, and may crash while it does: nothing changes by that.
fn again(store: &Store, disk: &Image, checkpoint: Option<&Checkpoint>, first: &Restart, draw: &mut Draw<'_>) {
    let StoreShape { segment_size, store: id, .. } = store.shape;
    let recovered = &first.recovered;
    let note = recovered.note();
    if BLOCK + FRAME_HEADER + note.encoded_len() > segment_size as usize {
        return;
    }
    let mut disk = disk.clone();
    // A new file: what cannot be read of one that is gone stays out of it.
    let taken = disk.slots.keys().chain(disk.unreadable.iter().map(|(slot, _)| slot));
    let slot = taken.max().map_or(0, |slot| slot + 1);
    let stream = StreamId { incarnation: recovered.incarnation_max + 1, core: 0 };
    let config =
        LogConfig { store: id, stream, segment_size, last_index: recovered.last_index.clone(), opening: Some(note) };
    let mut log = Log::new(config, Grant { slot: Slot(slot), salt: 99, created: WallMs(1) });
    let write = log.next_write(log.taken(), store.wall()).expect("the note");
    let mut bytes = vec![0; segment_size as usize];
    let all = draw.one_in(2);
    for (sector, new) in write.bytes.chunks(512).enumerate() {
        if all || draw.one_in(2) {
            bytes[sector * 512..sector * 512 + new.len()].copy_from_slice(new);
        }
    }
    disk.slots.insert(slot, bytes);
    let second = match restart(&store.shape, &disk, checkpoint, Mode::Strict) {
        Ok(second) => second,
        Err(error) => panic!("the second recovery refuses what the first took: {error}"),
    };
    assert!(same(first, &second), "the second recovery finds something else");
    for sealed in &recovered.sealed {
        let found = second.recovered.sealed.iter().find(|other| other.stream == sealed.stream).expect("still there");
        assert_eq!((found.end, found.chain), (sealed.end, sealed.chain), "{:?}", sealed.stream);
    }
}

/// Changes something and makes the checksums right again.
fn forge(disk: &mut Image, files: &mut [Vec<u8>; 2], store: &Store, draw: &mut Draw<'_>) {
    match draw.below(4) {
        0 => forge_segment_header(disk, draw),
        1 => {
            let file = &mut files[draw.below(2)];
            if let Ok(checkpoint) = Checkpoint::decode(file) {
                *file = forge_checkpoint(checkpoint, draw).encode();
            }
        }
        _ => {
            if let Some(known) = draw.pick(&store.known) {
                forge_frame(disk, known, draw);
            }
        }
    }
}

fn forge_frame(disk: &mut Image, known: &Known, draw: &mut Draw<'_>) {
    let Some(slot) = disk.slots.get_mut(&known.segment.slot.0) else { return };
    let Some((mut header, _)) = slot.get(known.offset..).and_then(FrameHeader::decode) else { return };
    for _ in 0..1 + draw.below(3) {
        match draw.below(10) {
            0 => header.frame_bytes = (FRAME_HEADER + draw.below(3 * BLOCK)) as u32,
            1 => header.records = draw.odd_u64() as u32,
            2 => header.durable = Lsn(draw.odd_u64()),
            3 => header.prev_end = Lsn(draw.odd_u64()),
            4 => header.prev_chain = draw.odd_u64(),
            5 => header.time = WallMs(draw.odd_u64()),
            6 => {
                header.kind =
                    [FrameKind::Records, FrameKind::Recovery, FrameKind::Clean, FrameKind::Marker][draw.below(4)];
            }
            7 => header.sequence = draw.odd_u64(),
            8 => header.stream.incarnation = draw.odd_u64(),
            _ => header.lsn = Lsn(draw.odd_u64()),
        }
    }
    let end = known.offset + header.frame_bytes as usize;
    if header.frame_bytes < FRAME_HEADER as u32 || end > slot.len() {
        return;
    }
    let frame = &mut slot[known.offset..end];
    for _ in 0..draw.below(4) {
        forge_body(&mut frame[FRAME_HEADER..], draw);
    }
    header.seal(frame);
}

/// A number of the body, most often of the sub-batch header or of the first record, whose checksum is made right again.
fn forge_body(body: &mut [u8], draw: &mut Draw<'_>) {
    let at = match draw.below(4) {
        0 => draw.below(32),
        1 => 32 + draw.below(64),
        2 => draw.below(body.len().max(1)),
        _ => 32 + draw.below(12),
    };
    let number = draw.odd_u64().to_le_bytes();
    let len = [1, 2, 4, 8][draw.below(4)];
    if let Some(field) = body.get_mut(at..at + len) {
        field.copy_from_slice(&number[..len]);
    }
    let Some(record) = body.get_mut(32..) else { return };
    let Some(claimed) = record.first_chunk().map(|len| u32::from_le_bytes(*len) as usize) else { return };
    if (9..=record.len()).contains(&claimed) {
        let crc = crc32c::crc32c(&record[8..claimed]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
    }
}

fn forge_segment_header(disk: &mut Image, draw: &mut Draw<'_>) {
    let Some((slot, _)) = place(disk, draw) else { return };
    let bytes = disk.slots.get_mut(&slot).expect("a place");
    let HeaderBlock::Whole(mut header) = SegmentHeader::decode(bytes) else { return };
    match draw.below(6) {
        0 => header.sequence = draw.odd_u64(),
        1 => header.stream.incarnation = draw.odd_u64(),
        2 => header.salt = draw.odd_u64(),
        3 => header.segment_size = draw.odd_u64() as u32,
        4 => header.stream.core = draw.odd_u64() as u16,
        _ => header.created = WallMs(draw.odd_u64()),
    }
    bytes[..BLOCK].copy_from_slice(&header.encode());
}

fn forge_checkpoint(mut checkpoint: Checkpoint, draw: &mut Draw<'_>) -> Checkpoint {
    for _ in 0..1 + draw.below(4) {
        let nth = draw.below(4);
        match draw.below(12) {
            0 => checkpoint.number = draw.odd_u64(),
            1 => checkpoint.incarnation = draw.odd_u64(),
            2 => checkpoint.time = WallMs(draw.odd_u64()),
            3 => _ = checkpoint.vshards.pop(),
            4 => checkpoint.segment_size = draw.odd_u64() as u32,
            5 => _ = checkpoint.live.pop(),
            kind => {
                if let Some(state) = checkpoint.streams.get_mut(nth) {
                    match kind {
                        6 => state.covered = Lsn(draw.odd_u64()),
                        7 => state.durable = Lsn(draw.odd_u64()),
                        8 => state.stream.incarnation = draw.odd_u64(),
                        _ => {}
                    }
                    if let Some(sealed) = state.sealed.as_mut().filter(|_| kind == 9) {
                        sealed.end = Lsn(draw.odd_u64());
                    }
                }
                if let Some(segment) = checkpoint.live.get_mut(nth).filter(|_| kind == 10) {
                    segment.sequence = draw.odd_u64();
                }
                if let Some(vshard) = checkpoint.vshards.get_mut(nth).filter(|_| kind == 11) {
                    vshard.last_index = draw.odd_u64();
                }
            }
        }
    }
    checkpoint
}
