//! The log file of the original broker: arbitrary bytes never make the reader panic or stand still; of a log that was written
//! whole and then cut or damaged it yields what was written, in order, and nothing else.
//!
//! The first byte chooses between arbitrary bytes and a log made here.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use blipmq::wal::import_v1::{MAGIC, V1Error, V1Item, V1Log, V1Record};

use super::draw::Draw;
use super::memory;

pub fn run(input: &[u8]) {
    let [mode, rest @ ..] = input else { return };
    match mode % 3 {
        0 => arbitrary(rest),
        1 => arbitrary(&[&header()[..], rest].concat()),
        _ => written(rest),
    }
}

fn arbitrary(bytes: &[u8]) {
    let Ok(read) = read(bytes) else { return };
    for record in &read.records {
        assert!(record.qos <= 1 && !record.topic.is_empty() && std::str::from_utf8(&record.topic).is_ok());
        // The layout is so plain that a record can be looked up where it says it was.
        let whole = encode(record.id, record.qos, &record.topic, &record.payload);
        let at = record.offset as usize;
        assert_eq!(bytes[at..at + whole.len()], whole);
    }
}

fn written(input: &[u8]) {
    let mut build = Draw::front(input);
    let mut bytes = header();
    let mut records = Vec::new();
    let mut id = 0;
    for _ in 0..build.below(12) {
        id += 1 + build.below(3) as u64;
        let record = V1Record {
            offset: bytes.len() as u64,
            id,
            qos: build.byte() & 1,
            topic: vec![b'a' + build.byte() % 26; 1 + build.below(5)],
            // A fill, so that no payload holds a record of its own.
            payload: vec![build.byte(); build.below(300)],
        };
        bytes.extend(encode(record.id, record.qos, &record.topic, &record.payload));
        records.push(record);
    }
    let whole = read(&bytes).expect("written here");
    assert_eq!((&whole.records, whole.torn, whole.damaged), (&records, 0, 0));

    let mut damage = Draw::back(input);
    if damage.byte() & 1 == 0 {
        let len = header().len() + damage.below(bytes.len() - header().len() + 1);
        let cut = read(&bytes[..len]).expect("a log that was cut");
        let left: Vec<V1Record> = records.iter().filter(|record| record_end(record) <= len).cloned().collect();
        let end = left.last().map_or(header().len(), record_end);
        assert_eq!((cut.records, cut.torn, cut.damaged), (left, (len - end) as u64, 0));
        return;
    }
    let mut rotten = Vec::new();
    for _ in 0..1 + damage.below(3) {
        let at = damage.below(bytes.len());
        bytes[at] ^= 1 << damage.below(8);
        rotten.push(at);
    }
    let Ok(read) = read(&bytes) else { return };
    // The checksum covers neither id nor length nor itself: a record whose id rotted comes back with that id.
    let plain = |record: &V1Record| rotten.iter().all(|at| !(record.offset as usize..record_end(record)).contains(at));
    for record in &read.records {
        let same = |written: &V1Record| {
            (written.offset, written.qos, &written.topic, &written.payload)
                == (record.offset, record.qos, &record.topic, &record.payload)
        };
        assert!(records.iter().any(same), "never written: {record:?}");
    }
    assert!(read.records.is_sorted_by_key(|record| record.offset));
    if read.records.len() < records.len() {
        assert!(read.damaged > 0 || read.torn > 0, "silent");
    }
    // One rotten bit costs no other record, unless it is the ids that are in doubt afterwards.
    let ids_are_right = records
        .iter()
        .all(|record| rotten.iter().all(|at| !(record.offset as usize..record.offset as usize + 8).contains(at)));
    if ids_are_right {
        for record in records.iter().filter(|record| plain(record)) {
            assert!(read.records.contains(record), "lost: {record:?}");
        }
    }
}

/// What reading to the end gives, skipping what is damaged.
struct Read {
    records: Vec<V1Record>,
    torn: u64,
    damaged: usize,
}

fn read(bytes: &[u8]) -> Result<Read, V1Error> {
    // The reader holds a window of 1 MiB and one record.
    let allowed = 3 * 1024 * 1024 + 64 * bytes.len();
    memory::within(allowed, || {
        let mut log = open(bytes)?;
        let mut read = Read { records: Vec::new(), torn: 0, damaged: 0 };
        loop {
            let before = log.position();
            match log.next_item() {
                Ok(V1Item::Record(record)) => read.records.push(record),
                Ok(V1Item::End { torn }) => {
                    read.torn = torn;
                    return Ok(read);
                }
                Err(V1Error::Damaged { offset, .. }) => {
                    assert_eq!(offset, before);
                    read.damaged += 1;
                    let skipped = log.skip_damage()?;
                    assert!(skipped > 0);
                }
                Err(error) => return Err(error),
            }
            assert!(log.position() > before && log.position() <= log.file_len(), "it stands still");
        }
    })
}

/// The reader reads a file: one that is written over and over, and has no name.
fn open(bytes: &[u8]) -> Result<V1Log, V1Error> {
    static SCRATCH: Mutex<Option<(File, PathBuf)>> = Mutex::new(None);
    let mut scratch = SCRATCH.lock().expect("nobody panics in here");
    let (file, path) = scratch.get_or_insert_with(|| nameless().expect("a scratch file"));
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(bytes)
    };
    write(file).expect("the scratch file can be written");
    V1Log::open(path)
}

/// A file in memory if that can be had, and the way to open it again.
fn nameless() -> io::Result<(File, PathBuf)> {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let path = folder.join(format!("blipmq-fuzz-{}.wal", std::process::id()));
    let file = File::create(&path)?;
    std::fs::remove_file(&path)?;
    let again = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((file, again))
}

fn header() -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(1u32.to_le_bytes());
    bytes.resize(32, 0);
    bytes
}

fn encode(id: u64, qos: u8, topic: &[u8], message: &[u8]) -> Vec<u8> {
    let topic_len = u16::try_from(topic.len()).expect("short");
    let payload = [&[qos][..], &topic_len.to_be_bytes(), topic, message].concat();
    let len = u32::try_from(payload.len()).expect("short");
    let crc = crc32fast::hash(&payload);
    [&id.to_le_bytes()[..], &len.to_le_bytes(), &crc.to_le_bytes(), &payload].concat()
}

fn record_end(record: &V1Record) -> usize {
    record.offset as usize + 16 + 3 + record.topic.len() + record.payload.len()
}
