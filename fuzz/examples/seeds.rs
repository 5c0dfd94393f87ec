//! Writes the seeds that are made by hand: golden frames, shipped configurations, small logs and records. What a long run found
//! worth keeping lies beside them in `corpus/` (see `scripts/fuzz.sh keep`).
//!
//! `cargo run --example seeds`, in `fuzz/`.

use std::fs;
use std::io;
use std::path::Path;

use blipmq::time::WallMs;
use blipmq::types::{Lsn, Seq, StreamId, VShard};
use blipmq::wal::format::{BytesClass, SegmentHeader, StoreId, SubBatch};
use blipmq::wal::import_v1::MAGIC;
use blipmq::wal::record::{Discarded, IdentityRef, KeyId, Published, Record, RecoveryNote, SealedStream, SubKind};

fn main() -> io::Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = here.join("corpus").join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)
    };
    golden_frames(here, &put)?;
    configurations(here, &put)?;
    records(&put)?;
    put("import_v1", "seed-two-records", &[&[0][..], &v1_log()].concat())?;
    put("import_v1", "seed-cut", &[&[0][..], &v1_log()[..60]].concat())?;
    put("import_v1", "seed-made-here", &[2, 5, 1, 1, 4, 3, 20, 0, 0, 2, 1, 9, 100, 1, 30, 2])?;
    let head = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nAccept: text/plain;version=0.0.4\r\n\r\n";
    put("http_request", "seed-get", head)?;
    put("http_request", "seed-head", b"HEAD /healthz HTTP/1.0\r\n\r\nbody")
}

type Put<'a> = &'a dyn Fn(&str, &str, &[u8]) -> io::Result<()>;

/// Every line of the page's golden blocks, as the target wants it: dialect and state, slicing, bytes.
fn golden_frames(here: &Path, put: Put<'_>) -> io::Result<()> {
    let page = fs::read_to_string(here.join("../docs/PROTOCOL.md"))?;
    let blocks = page.split("```golden\n").skip(1).filter_map(|block| block.split("```").next());
    let (mut session, mut answers) = (vec![6, 0], vec![0, 0]);
    for line in blocks.flat_map(str::lines) {
        let mut words = line.split_whitespace();
        let (Some(version), Some(direction), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
        let hex: String = words.collect();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
        let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let v1 = version == "v1";
        if direction == ">" {
            put(
                "frame_decode",
                &format!("seed-{version}-{name}"),
                &[&[if v1 { 5 } else { 6 }, 9][..], &bytes].concat(),
            )?;
            session.extend(bytes.iter().filter(|_| !v1));
        } else {
            put("reply_decode", &format!("seed-{version}-{name}"), &[&[u8::from(v1), 9][..], &bytes].concat())?;
            answers.extend(bytes.iter().filter(|_| !v1));
        }
    }
    put("frame_decode", "seed-v2-session", &session)?;
    put("reply_decode", "seed-v2-answers", &answers)
}

/// Without their comments, and a dictionary of every word in them.
fn configurations(here: &Path, put: Put<'_>) -> io::Result<()> {
    let mut words = std::collections::BTreeSet::new();
    for (name, language) in [("blipmq.toml", 0), ("prod.toml", 0), ("dev.toml", 0), ("blipmq.yaml", 1)] {
        let text = fs::read_to_string(here.join("../config").join(name))?;
        let settings = text.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty());
        let settings: Vec<&str> = settings.map(|line| line.split(" #").next().unwrap_or_default().trim_end()).collect();
        let text = settings.join("\n");
        words.extend(
            text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| word.len() > 2).map(str::to_owned),
        );
        put("config", &format!("seed-{name}"), &[&[language][..], text.as_bytes(), b"\n"].concat())?;
    }
    let keys = "port = 1\n[[keys]]\nkey = \"a\"\npublish = [\"x.*\"]\n[[keys]]\nkey = \"b\"\nadmin = true\n";
    put("config", "seed-keys", &[&[0][..], keys.as_bytes()].concat())?;
    let variables =
        b"\0\0BLIPMQ_PORT=5\0BLIPMQ_STORAGE_MEMORY_BUDGET=1GiB\0BLIPMQ_ALLOWED_API_KEYS=a,b\0BLIPMQ_OTHER=1";
    put("config", "seed-variables", variables)?;
    words.extend(
        ["keys", "[[keys]]", "publish", "subscribe", "admin", "name", "sha256:", "every_n:", "interval_ms:"]
            .map(str::to_owned),
    );
    let variable = |word: &String| format!("BLIPMQ_{}", word.to_ascii_uppercase());
    let lines: String = words.iter().map(|word| format!("\"{word}\"\n")).collect();
    let variables: String =
        words.iter().filter(|word| word.contains('_')).map(|word| format!("\"{}\"\n", variable(word))).collect();
    fs::create_dir_all(here.join("dictionaries"))?;
    fs::write(here.join("dictionaries/config.dict"), lines + &variables)
}

fn records(put: Put<'_>) -> io::Result<()> {
    let message = Published {
        topic: 4,
        seq: Seq(9),
        published: WallMs(1_000),
        expires: WallMs(2_000),
        not_before: WallMs(0),
        priority: 3,
        identity: Some(IdentityRef::MessageId(b"id-1")),
        options: b"\x04\0\x01\x09",
        payload: b"payload",
    };
    let publisher = Published { identity: Some(IdentityRef::Publisher { id: 1, sequence: 2 }), ..message.clone() };
    let created = |kind| Record::SubCreated { sub: 3, topic: 1, kind, start: Seq(5), created: WallMs(7) };
    let samples = [
        ("topic", Record::TopicCreated { topic: 1, name: b"orders" }),
        ("topic-deleted", Record::TopicDeleted { topic: 1 }),
        ("durable", created(SubKind::Durable { name: b"billing" })),
        ("orphan", created(SubKind::Orphan { key: KeyId([7; 16]) })),
        ("dead-letters", created(SubKind::DeadLetters)),
        ("sub-deleted", Record::SubDeleted { sub: 3 }),
        ("published", Record::Published(message)),
        ("relocated", Record::Relocated(publisher)),
        ("acked", Record::Acked { sub: 3, ranges: vec![(Seq(1), Seq(4)), (Seq(9), Seq(9))] }),
        ("failed", Record::Failed { sub: 3, seq: Seq(5), failures: 2 }),
    ];
    for (name, record) in samples {
        let mut bytes = vec![0];
        record.encode(&mut bytes);
        put("record", &format!("seed-{name}"), &bytes)?;
        // And what follows its checksum, which the target makes right.
        put("record", &format!("seed-{name}-sealed"), &[&[1][..], &bytes[9..1 + record.encoded_len()]].concat())?;
    }
    let sealed = SealedStream {
        stream: StreamId { incarnation: 3, core: 1 },
        end: Lsn(8192),
        chain: 77,
        discarded: Discarded { frames: 1, bytes: 4096, records: 3 },
        class: BytesClass::Stale,
    };
    let mut note = vec![2];
    RecoveryNote { sealed: vec![sealed] }.encode(&mut note);
    put("record", "seed-note", &note)?;
    let segment = SegmentHeader {
        store: StoreId { uuid: [7; 16], node: 1 },
        stream: StreamId { incarnation: 3, core: 1 },
        sequence: 5,
        salt: 6,
        segment_size: 1 << 20,
        created: WallMs(7),
    };
    put("record", "seed-segment", &[&[4][..], &segment.encode()[..80]].concat())?;
    let mut sub = [0; 33];
    sub[0] = 5;
    SubBatch { vshard: VShard(1), records: 2, base: 3, term: 1, time: WallMs(4) }.encode(&mut sub[1..]);
    put("record", "seed-sub-batch", &sub)
}

fn v1_log() -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(1u32.to_le_bytes());
    bytes.resize(32, 0);
    for id in 1..3u64 {
        let payload = [&[1, 0, 4][..], b"test", b"hello"].concat();
        bytes.extend(id.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(crc32fast::hash(&payload).to_le_bytes());
        bytes.extend(payload);
    }
    bytes
}
