//! Log records and the small layouts around them, read from bytes that may be anything.
//!
//! The first byte says what they are taken for. Half of the inputs get a right length and checksum, or nothing would ever come
//! behind the checks.

use blipmq::limits::BLOCK;
use blipmq::types::Seq;
use blipmq::types::{Lsn, Slot, StreamId};
use blipmq::wal::format::{Found, FrameHeader, HeaderBlock, Place, Segment, SegmentHeader, SubBatch, classify};
use blipmq::wal::record::{Record, RecoveryNote, published_body, published_message};
use bytes::Bytes;

use super::memory;

pub fn run(input: &[u8]) {
    let [kind, bytes @ ..] = input else { return };
    memory::within(64 * 1024 + 16 * bytes.len(), || match kind % 6 {
        0 => record(bytes),
        1 => record(&sealed(bytes)),
        2 => note(bytes),
        3 => frame_header(bytes),
        4 => segment_header(bytes),
        _ => sub_batch(bytes),
    });
}

/// `bytes` as a record of just this length: `len`, checksum, and the rest.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut record = vec![0; 8];
    record.extend_from_slice(bytes);
    let len = record.len() as u32;
    record[..4].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c(&record[8..]);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
    record.resize(record.len().next_multiple_of(8), 0);
    record
}

fn record(bytes: &[u8]) {
    let shared = Bytes::copy_from_slice(bytes);
    let _unchecked = published_message(&shared, 0, Seq(0), false);
    let Ok((record, used)) = Record::decode(bytes) else {
        // Nothing but padding may be missing.
        if let Ok(record) = Record::decode_alone(bytes) {
            assert!(record.padded_len() > bytes.len());
        }
        return;
    };
    assert!(used <= bytes.len() && used == record.padded_len());
    assert_eq!(crc32c::crc32c(&bytes[8..record.encoded_len()]).to_le_bytes(), bytes[4..8], "the checksum");
    assert_eq!(Record::decode_alone(&bytes[..record.encoded_len()]), Ok(record.clone()));

    let mut again = Vec::new();
    record.encode(&mut again);
    assert_eq!(again.len(), used);
    assert_eq!(Record::decode(&again), Ok((record.clone(), used)));

    let alone = shared.slice(..record.encoded_len());
    let body = published_body(&alone);
    let message = |topic, seq| published_message(&alone, topic, seq, true);
    match &record {
        Record::Published(published) | Record::Relocated(published) => {
            let body = body.expect("it is a message");
            assert_eq!((body.options(), body.payload()), (published.options, published.payload));
            let (topic, seq) = (published.topic, published.seq);
            assert_eq!(message(topic, seq), Ok((published.published, body)));
            assert!(message(topic.wrapping_add(1), seq).is_err(), "another topic's");
            assert!(message(topic, Seq(seq.0.wrapping_add(1))).is_err(), "another message");
        }
        _ => assert!(body.is_err() && message(0, Seq(0)).is_err()),
    }
}

fn note(bytes: &[u8]) {
    let Some(note) = RecoveryNote::decode(bytes) else { return };
    let mut again = Vec::new();
    note.encode(&mut again);
    assert_eq!(again.len(), bytes.len());
    assert_eq!(RecoveryNote::decode(&again), Some(note));
}

/// As found, and with the checksum made right.
fn frame_header(bytes: &[u8]) {
    let mut block = vec![0; BLOCK];
    let len = bytes.len().min(BLOCK);
    block[..len].copy_from_slice(&bytes[..len]);
    for whole in [false, true] {
        if whole {
            block[..6].copy_from_slice(b"BFRM\x01\0");
            let crc = crc32c::crc32c(&block[..120]);
            block[120..124].copy_from_slice(&crc.to_le_bytes());
        }
        let Some((header, _)) = FrameHeader::decode(&block) else { continue };
        assert!(header.end() > header.lsn && header.durable <= header.prev_end && header.prev_end <= header.lsn);
        // Where it says it is, it is live if it fits; anywhere else it is not.
        let offset = (header.lsn.0 % (1 << 20)) as u32;
        let segment = Segment { stream: header.stream, sequence: header.sequence, slot: Slot(0), salt: header.salt };
        let place = Place { store_tag: header.store_tag, segment, segment_size: 1 << 20, offset };
        if let Found::Live(live, _) = classify(&block, &place) {
            assert!(live == header && place.lsn() == header.lsn && header.padded_bytes() <= (1 << 20) - offset);
            let moved = Place { offset: offset ^ BLOCK as u32, ..place };
            assert!(matches!(classify(&block, &moved), Found::Foreign(_)));
            let other = Segment { salt: header.salt ^ 1, ..segment };
            assert!(matches!(classify(&block, &Place { segment: other, ..place }), Found::Stale(_)));
        }
    }
    let nowhere = Place {
        store_tag: 0,
        segment: Segment { stream: StreamId { incarnation: 1, core: 0 }, sequence: 0, slot: Slot(0), salt: 0 },
        segment_size: 1 << 20,
        offset: BLOCK as u32,
    };
    assert_eq!(nowhere.lsn(), Lsn(BLOCK as u64));
    let _any = classify(&block, &nowhere);
}

fn segment_header(bytes: &[u8]) {
    let mut block = vec![0; BLOCK];
    let len = bytes.len().min(BLOCK);
    block[..len].copy_from_slice(&bytes[..len]);
    for whole in [false, true] {
        if whole {
            block[..12].copy_from_slice(b"BLIPSEG2\x01\0\0\0");
            let crc = crc32c::crc32c(&block[..72]);
            block[72..76].copy_from_slice(&crc.to_le_bytes());
        }
        if let HeaderBlock::Whole(header) = SegmentHeader::decode(&block) {
            assert_eq!(SegmentHeader::decode(&header.encode()), HeaderBlock::Whole(header));
        }
    }
}

fn sub_batch(bytes: &[u8]) {
    let Some(sub) = SubBatch::decode(bytes) else { return };
    let mut again = [0; 32];
    sub.encode(&mut again);
    assert_eq!(SubBatch::decode(&again), Some(sub));
}
