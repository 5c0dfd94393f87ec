//! Reads the log file of the original broker (V1.md 2.8), torn tail included.
//!
//! Owns: that layout, and the verdict on what it cannot read. Never: writes; takes one bad record for the end of the file.
//! Neighbours: `tools` writes what this reads into a new store.
//!
//! ```text
//! file    "BLIPWAL\0" | u32 version 1 | 20 zero bytes | record*      little-endian
//! record  u64 id | u32 len | u32 CRC-32 (IEEE) of the payload | payload
//! payload u8 qos | u16 topic length, big-endian | topic | message
//! ```
//!
//! The checksum covers the payload only, so a damaged length looks like a torn tail. The original then forgets whatever
//! follows, or writes new records behind the torn one (V1.md G6, G8). Here an unreadable record is a torn tail only if no
//! readable record follows it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub const MAGIC: [u8; 8] = *b"BLIPWAL\0";
const HEADER_LEN: u64 = 32;
const RECORD_HEADER_LEN: usize = 16;
/// v1 refuses larger frames, and a record's payload is shorter than its frame.
const PAYLOAD_MAX: u64 = 16 * 1024 * 1024;
/// Ids grow by one; a gap this large is not believed when looking for the next record behind a damaged one.
const ID_GAP_MAX: u64 = 1 << 20;
/// Bytes looked at together when searching behind a damaged record.
const WINDOW: usize = 1024 * 1024;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct V1Record {
    /// Of the record's first byte in the file.
    pub offset: u64,
    pub id: u64,
    pub qos: u8,
    pub topic: Vec<u8>,
    pub payload: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum V1Error {
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is not a BlipMQ v1 log: it does not start with BLIPWAL")]
    NotV1 { path: PathBuf },
    #[error("{path} has log version {version}; only version 1 is known")]
    Version { path: PathBuf, version: u32 },
    #[error("record {id} at offset {offset} is damaged: {damage}")]
    Damaged { offset: u64, id: u64, damage: Damage },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Damage {
    #[error("CRC mismatch, {stored:08x} stored, {computed:08x} computed")]
    Crc { stored: u32, computed: u32 },
    #[error("its length {len} cannot be right, a readable record follows at offset {next}")]
    Length { len: u32, next: u64 },
    #[error("its payload is not a publish")]
    Layout,
}

/// One step through the file.
#[derive(PartialEq, Eq, Debug)]
pub enum V1Item {
    Record(V1Record),
    /// The end. `torn`: bytes of an incomplete last record, which v1 never acknowledged as written.
    End {
        torn: u64,
    },
}

/// A v1 log, read from its start.
#[derive(Debug)]
pub struct V1Log {
    file: File,
    path: PathBuf,
    len: u64,
    at: u64,
    last_id: u64,
}

impl V1Log {
    pub fn open(path: &Path) -> Result<V1Log, V1Error> {
        let io_error = |what| move |source| V1Error::Io { what, path: path.to_owned(), source };
        let file = File::open(path).map_err(io_error("open"))?;
        let len = file.metadata().map_err(io_error("look at"))?.len();
        let mut header = [0; 12];
        let magic = if len < 12 { Ok(()) } else { file.read_exact_at(&mut header, 0) };
        magic.map_err(io_error("read"))?;
        if header[..8] != MAGIC {
            return Err(V1Error::NotV1 { path: path.to_owned() });
        }
        let version = u32_le(&header[8..]);
        if version != 1 {
            return Err(V1Error::Version { path: path.to_owned(), version });
        }
        Ok(V1Log { file, path: path.to_owned(), len, at: HEADER_LEN.min(len), last_id: 0 })
    }

    /// Bytes of the whole file, for a progress bar.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// How far it has been read.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next record. After `Damaged`, [`V1Log::skip_damage`] goes on behind it; without that the error repeats.
    pub fn next_item(&mut self) -> Result<V1Item, V1Error> {
        let left = self.len - self.at;
        if left < RECORD_HEADER_LEN as u64 {
            return Ok(V1Item::End { torn: left });
        }
        let (id, len, stored) = self.record_header(self.at)?;
        let body = self.at + RECORD_HEADER_LEN as u64;
        if u64::from(len) > PAYLOAD_MAX || u64::from(len) > self.len - body {
            return match self.find_after(self.at + 1)? {
                Some(next) => Err(self.damaged(id, Damage::Length { len, next })),
                None => Ok(V1Item::End { torn: left }),
            };
        }
        let mut payload = vec![0; len as usize];
        self.read(&mut payload, body)?;
        let computed = crc32fast::hash(&payload);
        if computed != stored {
            return Err(self.damaged(id, Damage::Crc { stored, computed }));
        }
        let Some((qos, topic, message)) = split_payload(&payload) else {
            return Err(self.damaged(id, Damage::Layout));
        };
        let record = V1Record { offset: self.at, id, qos, topic: topic.to_vec(), payload: message.to_vec() };
        self.at = body + u64::from(len);
        self.last_id = id;
        Ok(V1Item::Record(record))
    }

    /// Goes to the next readable record behind the damaged one; returns the bytes given up.
    pub fn skip_damage(&mut self) -> Result<u64, V1Error> {
        let next = self.find_after(self.at + 1)?.unwrap_or(self.len);
        let skipped = next - self.at;
        self.at = next;
        Ok(skipped)
    }

    fn damaged(&self, id: u64, damage: Damage) -> V1Error {
        V1Error::Damaged { offset: self.at, id, damage }
    }

    fn read(&self, into: &mut [u8], at: u64) -> Result<(), V1Error> {
        let io_error = |source| V1Error::Io { what: "read", path: self.path.clone(), source };
        self.file.read_exact_at(into, at).map_err(io_error)
    }

    fn record_header(&self, at: u64) -> Result<(u64, u32, u32), V1Error> {
        let mut header = [0; RECORD_HEADER_LEN];
        self.read(&mut header, at)?;
        Ok((u64_le(&header), u32_le(&header[8..]), u32_le(&header[12..])))
    }

    /// The first offset from `from` on where a whole record lies: plausible id and length, right checksum, right layout.
    fn find_after(&self, from: u64) -> Result<Option<u64>, V1Error> {
        let mut window = vec![0; WINDOW + RECORD_HEADER_LEN - 1];
        let mut start = from;
        while start + RECORD_HEADER_LEN as u64 <= self.len {
            let filled = usize::try_from(self.len - start).map_or(window.len(), |left| left.min(window.len()));
            self.read(&mut window[..filled], start)?;
            for (offset, header) in window[..filled].windows(RECORD_HEADER_LEN).enumerate() {
                let at = start + offset as u64;
                let (id, len) = (u64_le(header), u32_le(&header[8..]));
                let body = at + RECORD_HEADER_LEN as u64;
                let plausible = id > self.last_id
                    && id - self.last_id <= ID_GAP_MAX
                    && (3..=PAYLOAD_MAX).contains(&u64::from(len))
                    && u64::from(len) <= self.len - body;
                if !plausible {
                    continue;
                }
                let mut payload = vec![0; len as usize];
                self.read(&mut payload, body)?;
                if crc32fast::hash(&payload) == u32_le(&header[12..]) && split_payload(&payload).is_some() {
                    return Ok(Some(at));
                }
            }
            start += WINDOW as u64;
        }
        Ok(None)
    }
}

fn split_payload(payload: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&qos, rest) = payload.split_first()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (topic, message) = rest.split_at_checked(usize::from(u16::from_be_bytes(*len)))?;
    (qos <= 1 && !topic.is_empty() && std::str::from_utf8(topic).is_ok()).then_some((qos, topic, message))
}

fn u32_le(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn u64_le(bytes: &[u8]) -> u64 {
    u64::from(u32_le(bytes)) | u64::from(u32_le(&bytes[4..])) << 32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::wal::disk::tests::scratch;

    /// V1.md 2.8: record 1 of any original daemon.
    const EXAMPLE: &str = "01000000000000000c00000086c2de6101000474657374" /* `test` */;
    const EXAMPLE_MESSAGE: &[u8] = b"hello";

    pub fn header() -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(1u32.to_le_bytes());
        bytes.resize(32, 0);
        bytes
    }

    pub fn record(id: u64, topic: &str, message: &[u8]) -> Vec<u8> {
        let mut payload = vec![1];
        payload.extend(u16::try_from(topic.len()).unwrap().to_be_bytes());
        payload.extend(topic.as_bytes());
        payload.extend(message);
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        bytes.extend(crc32fast::hash(&payload).to_le_bytes());
        bytes.extend(payload);
        bytes
    }

    fn log(name: &str, bytes: &[u8]) -> V1Log {
        let path = scratch(name).join("v1.wal");
        std::fs::write(&path, bytes).unwrap();
        V1Log::open(&path).unwrap()
    }

    fn ids_and_end(log: &mut V1Log) -> (Vec<u64>, Result<u64, V1Error>) {
        let mut ids = Vec::new();
        loop {
            match log.next_item() {
                Ok(V1Item::Record(record)) => ids.push(record.id),
                Ok(V1Item::End { torn }) => return (ids, Ok(torn)),
                Err(error) => return (ids, Err(error)),
            }
        }
    }

    #[test]
    fn the_example_of_the_original_is_read() {
        let mut bytes = header();
        for pair in EXAMPLE.as_bytes().chunks(2) {
            bytes.push(u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
        }
        bytes.extend(EXAMPLE_MESSAGE);
        let mut log = log("v1-example", &bytes);
        let expected =
            V1Record { offset: 32, id: 1, qos: 1, topic: b"test".to_vec(), payload: EXAMPLE_MESSAGE.to_vec() };
        assert_eq!(log.next_item().unwrap(), V1Item::Record(expected));
        assert_eq!(log.next_item().unwrap(), V1Item::End { torn: 0 });
        assert_eq!(bytes[32..], record(1, "test", b"hello"));
    }

    #[test]
    fn a_tail_torn_anywhere_ends_the_log() {
        let mut bytes = header();
        bytes.extend(record(1, "a", b"one"));
        let whole = bytes.len();
        bytes.extend(record(2, "a", b"two"));
        for cut in whole..bytes.len() {
            let (ids, end) = ids_and_end(&mut log("v1-torn", &bytes[..cut]));
            assert_eq!((ids, end.unwrap()), (vec![1], (cut - whole) as u64));
        }
        // A header cut short is an empty log; less than a magic is not a log.
        assert_eq!(ids_and_end(&mut log("v1-torn", &bytes[..20])).0, Vec::<u64>::new());
        let path = scratch("v1-short").join("v1.wal");
        std::fs::write(&path, b"BLIP").unwrap();
        assert!(matches!(V1Log::open(&path), Err(V1Error::NotV1 { .. })));
    }

    #[test]
    fn a_flipped_bit_is_named_with_its_offset() {
        let mut bytes = header();
        bytes.extend(record(1, "a", b"one"));
        let second = bytes.len() as u64;
        bytes.extend(record(2, "a", b"two"));
        *bytes.last_mut().unwrap() ^= 1;
        let (ids, end) = ids_and_end(&mut log("v1-crc", &bytes));
        assert_eq!(ids, [1]);
        let error = end.unwrap_err();
        assert!(matches!(error, V1Error::Damaged { offset, id: 2, damage: Damage::Crc { .. } } if offset == second));
        assert!(error.to_string().contains(&format!("offset {second}")), "{error}");
    }

    #[test]
    fn a_damaged_length_is_no_torn_tail_when_records_follow() {
        let mut bytes = header();
        bytes.extend(record(1, "a", b"one"));
        let second = bytes.len();
        bytes.extend(record(2, "a", b"two"));
        let third = bytes.len();
        bytes.extend(record(3, "a", b"three"));
        bytes[second + 10] ^= 0xff; // len: far beyond the file
        let mut log = log("v1-length", &bytes);
        let (ids, end) = ids_and_end(&mut log);
        assert_eq!(ids, [1]);
        let next = third as u64;
        assert!(
            matches!(end, Err(V1Error::Damaged { damage: Damage::Length { next: n, .. }, .. }) if n == next),
            "{end:?}"
        );
        assert_eq!(log.skip_damage().unwrap(), (third - second) as u64);
        let (ids, end) = ids_and_end(&mut log);
        assert_eq!((ids, end.unwrap()), (vec![3], 0));
    }

    /// V1.md G6: the original appends behind a torn record, and then refuses its own file.
    #[test]
    fn records_behind_a_torn_one_can_be_had() {
        let mut bytes = header();
        bytes.extend(record(1, "a", b"one"));
        let torn = record(2, "a", &[7; 100]);
        bytes.extend(&torn[..60]);
        bytes.extend(record(2, "a", &[8; 200]));
        bytes.extend(record(3, "a", b"three"));
        let mut log = log("v1-behind", &bytes);
        let (ids, end) = ids_and_end(&mut log);
        assert_eq!(ids, [1]);
        assert!(matches!(end, Err(V1Error::Damaged { id: 2, damage: Damage::Crc { .. }, .. })));
        assert_eq!(log.skip_damage().unwrap(), 60);
        let (ids, end) = ids_and_end(&mut log);
        assert_eq!((ids, end.unwrap()), (vec![2, 3], 0));
    }
}
