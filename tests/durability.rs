//! What was confirmed is there after any death of the process, and what the disk did to it is never passed over in
//! silence (DURABILITY.md 1.2). `BLIPMQ_FULL=1` runs the sizes a release is judged by.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Broker, Client, Said, blipmq, disk_bytes, eventually, flip_byte, rss_kib, slot_path, store_bytes};

const MIB: u64 = 1 << 20;

fn full() -> bool {
    std::env::var_os("BLIPMQ_FULL").is_some_and(|value| value == "1")
}

/// Nothing is delivered again, or expires, while a test looks.
const QUIET: [(&str, &str); 3] = [
    ("BLIPMQ_RETRY_BACKOFF_MS", "600000"),
    ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000"),
    ("BLIPMQ_DELIVERY_V1_TTL_MS", "0"),
];

fn start(env: &[(&str, &str)]) -> Broker {
    Broker::start(&[&QUIET[..], env].concat())
}

/// A numbered message of `len` bytes.
fn message(n: u32, len: usize) -> Vec<u8> {
    let mut message = vec![n as u8; len.max(4)];
    message[..4].copy_from_slice(&n.to_be_bytes());
    message
}

fn number(message: &[u8]) -> u32 {
    let number = u32::from_be_bytes(message[..4].try_into().expect("four"));
    assert!(message[4..].iter().all(|byte| *byte == number as u8), "message {number} is not what was published");
    number
}

#[test]
fn what_was_acknowledged_stays_away_and_the_rest_comes_back_in_order() {
    for policy in ["always", "every_n:64", "interval_ms:50", "none"] {
        let mut broker = start(&[("BLIPMQ_FSYNC_POLICY", policy), ("BLIPMQ_SHARDS_COUNT", "1")]);
        let mut client = broker.v1();
        let sub = client.subscribe("work", 1);
        let marker = client.subscribe("marker", 1);
        for n in 0..30 {
            client.publish("work", 1, &message(n, 100));
        }
        for n in 0..10 {
            let delivery = client.poll(sub, "work");
            assert_eq!(number(&delivery.message), n, "{policy}");
            client.ack(sub, delivery.tag);
        }
        // v1 has no confirms. This one comes out of the log behind all that was logged before it.
        client.publish("marker", 1, b"written");
        assert_eq!(client.poll(marker, "marker").message, b"written");
        broker.kill();
        broker.restart();
        let mut client = broker.v1();
        let sub = client.subscribe("work", 1);
        for n in 10..30 {
            let delivery = client.poll(sub, "work");
            assert_eq!(number(&delivery.message), n, "{policy}");
            client.ack(sub, delivery.tag);
        }
        client.poll_later(sub);
        client.expect_silence();
    }
}

#[test]
fn the_number_of_cores_changes_between_kills_and_nothing_is_lost_or_repeated() {
    const TOPICS: usize = 40;
    for policy in ["always", "none"] {
        let mut broker = start(&[
            ("BLIPMQ_FSYNC_POLICY", policy),
            ("BLIPMQ_SHARDS_COUNT", "1"),
            ("BLIPMQ_STORAGE_SEGMENT_SIZE", "4MiB"),
            ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "100"),
        ]);
        let topics: Vec<String> = (0..TOPICS).map(|n| format!("topic-{n}")).collect();
        let mut waiting: BTreeMap<&str, VecDeque<u32>> = BTreeMap::new();
        let mut next = 0;
        for (round, cores) in ["1", "2", "4", "1", "2"].into_iter().enumerate() {
            if round > 0 {
                broker.kill();
                broker.set("BLIPMQ_SHARDS_COUNT", cores);
                broker.restart();
            }
            // Several connections, so that they end up on different cores.
            let mut clients: Vec<Client> = (0..4).map(|_| broker.v2()).collect();
            for (n, topic) in topics.iter().enumerate() {
                let client = &mut clients[n % 4];
                let waiting = waiting.entry(topic).or_default();
                let sub = client.subscribe_v2(topic, 1, 1000, "worker");
                // All that is waiting, in order, and then what is new: so nothing came twice.
                let mut tags = Vec::new();
                for (tag, message) in client.deliveries_v2(sub, waiting.len()) {
                    tags.push((tag, number(&message)));
                }
                let numbers: Vec<u32> = tags.iter().map(|(_, number)| *number).collect();
                assert_eq!(numbers, Vec::from(waiting.clone()), "{policy}, {cores} cores, {topic}");
                for _ in 0..5 {
                    client.publish_later_v2(topic, &message(next, 300));
                    waiting.push_back(next);
                    next += 1;
                }
                let (mut stored, mut fresh) = (0, 0);
                while stored < 5 || fresh < 5 {
                    match client.hear() {
                        Some(Said::Stored { .. }) => stored += 1,
                        Some(Said::Delivered { tag, message, .. }) => {
                            tags.push((tag, number(&message)));
                            fresh += 1;
                        }
                        other => panic!("{policy}, {cores} cores, {topic}: {other:?}"),
                    }
                }
                let numbers: Vec<u32> = tags.iter().map(|(_, number)| *number).collect();
                assert_eq!(numbers, Vec::from(waiting.clone()), "{policy}, {cores} cores, {topic}");
                for (tag, number) in tags.iter().filter(|(_, number)| number % 3 == 0) {
                    client.ack_v2(sub, *tag, *tag);
                    waiting.retain(|kept| kept != number);
                }
            }
        }
    }
}

/// A v2 store of 1 MiB segments and its messages' numbers, killed. No checkpoint has been written but the first, if any.
fn killed_with(messages: u32, len: usize, env: &[(&str, &str)]) -> Broker {
    let small = [
        ("BLIPMQ_STORAGE_SEGMENT_SIZE", "1MiB"),
        ("BLIPMQ_SHARDS_COUNT", "1"),
        ("BLIPMQ_STORAGE_IDLE_MARKER", "false"),
        ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "3600000"),
    ];
    let mut broker = start(&[&small, env].concat());
    let mut client = broker.v2();
    client.subscribe_v2("kept", 1, 1, "worker");
    drop(client);
    broker.v2().publish_all_v2("kept", (0..messages).map(|n| message(n, len)));
    broker.kill();
    broker
}

/// What the durable subscription `worker` of `kept` has waiting, in the order of delivery.
fn waiting(broker: &Broker) -> Vec<u32> {
    let mut client = broker.v2();
    let count = client.backlog_v2("kept", "worker");
    let sub = client.subscribe_v2("kept", 1, 60_000, "worker");
    let got = client.deliveries_v2(sub, count as usize);
    got.iter().map(|(_, message)| number(message)).collect()
}

/// `blipmq wal dump --json`: the published messages.
fn dump(store: &Path) -> Vec<Value> {
    let out = blipmq(&["wal".as_ref(), "dump".as_ref(), store.as_os_str(), "--json".as_ref()]);
    out.expect(0, &[]);
    let lines = out.said.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    lines.filter(|line: &Value| line["type"] == "published").collect()
}

fn field(line: &Value, name: &str) -> u64 {
    line[name].as_u64().unwrap_or_else(|| panic!("{name} in {line}"))
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn damage_in_the_middle_is_refused_and_salvage_saves_the_rest() {
    const MESSAGES: u32 = 300;
    let broker = killed_with(MESSAGES, 10_000, &[]);
    let store = broker.store();
    let text = path_text(&store);
    blipmq(&["wal", "verify", text]).expect(0, &["whole"]);
    blipmq(&["wal", "stat", text]).expect(0, &["300 published", "segment"]);
    let lines = dump(&store);
    assert_eq!(lines.len(), MESSAGES as usize);

    let victim = &lines[150];
    let (slot, offset) = (field(victim, "slot"), field(victim, "offset") + field(victim, "len") / 2);
    flip_byte(&slot_path(&store, slot), offset);
    let before = store_bytes(&store);
    let refused = broker.restart_refused();
    refused.expect(65, &["blipmq wal salvage", "--accept-loss --out", &format!("slot-{slot:04}.seg")]);
    assert!(before == store_bytes(&store), "a refused start modifies nothing");

    blipmq(&["wal", "verify", text]).expect(65, &["DAMAGED"]);
    blipmq(&["wal", "stat", text]).expect(65, &["damaged"]);
    blipmq(&["wal", "dump", text]).expect(65, &["damaged"]);
    let saved = broker.dir().join("saved");
    let out = path_text(&saved);
    let hesitant = blipmq(&["wal", "salvage", text, "--out", out]);
    assert!(hesitant.code != Some(0) && hesitant.said.contains("--accept-loss"), "{}", hesitant.said);
    assert!(!saved.exists());
    let report = blipmq(&["wal", "salvage", text, "--accept-loss", "--out", out, "--json"]);
    report.expect(0, &[]);
    assert!(before == store_bytes(&store), "salvage leaves the old store as it is");
    let report: Value = serde_json::from_str(&report.said).expect("JSON");
    let kept = field(&report, "messages_kept");
    let lost: u64 =
        report["lost"].as_array().expect("a list").iter().map(|r| field(r, "to") - field(r, "from") + 1).sum();
    assert!(saved.join("salvage-report.json").exists());
    assert!(lost >= 1 && kept + lost == u64::from(MESSAGES), "kept {kept}, lost {lost}");

    blipmq(&["wal", "verify", out]).expect(0, &["whole"]);
    let mut broker = broker;
    broker.set("BLIPMQ_WAL_PATH", out);
    broker.restart();
    let got = waiting(&broker);
    assert!(got.is_sorted() && got.len() as u64 == kept, "{} of {kept}", got.len());
    assert!(!got.contains(&150));
    assert_eq!(broker.v2().publish_v2("kept", 1, b"0000"), (0, 2), "and it takes more");
}

/// Slot and offset of the last frame, and the length of the segment.
fn last_frame(store: &Path) -> (u64, u64) {
    let lines = dump(store);
    let last = lines.iter().max_by_key(|line| (field(line, "frame"), field(line, "offset"))).expect("a message");
    (field(last, "slot"), field(last, "frame") % MIB)
}

#[test]
fn a_torn_last_batch_is_cut_off_and_counted() {
    // One batch each: a confirm is waited for before the next.
    let mut broker = killed_with(1, 2_000, &[]);
    broker.restart();
    let mut client = broker.v2();
    for n in 1..10 {
        assert_eq!(client.publish_v2("kept", 1, &message(n, 2_000)), (0, 2));
    }
    broker.kill();
    let store = broker.store();
    let (slot, offset) = last_frame(&store);
    // The header says that there is a frame; its body is not what it should be.
    let file = OpenOptions::new().write(true).open(slot_path(&store, slot)).expect("a slot");
    file.write_all_at(&[0; 1024], offset + 1024).expect("a slot");
    drop(file);
    blipmq(&["wal", "verify", path_text(&store)]).expect(0, &["torn tail: 1 frames with 1 records"]);
    broker.restart();
    let log = broker.log();
    assert!(log.contains("torn tail") && log.contains("truncated_frames=1"), "{log}");
    assert_eq!(broker.metric("blipmq_recovery_truncated_frames"), 1);
    assert_eq!(broker.metric("blipmq_recovery_truncated_records"), 1);
    assert_eq!(broker.metric("blipmq_recovery_truncated_bytes"), 4096);
    assert_eq!(waiting(&broker), (0..9).collect::<Vec<u32>>());

    // What was cut off stays cut off, and is not counted twice.
    broker.v2().publish_v2("kept", 1, &message(10, 100));
    broker.kill();
    broker.restart();
    assert_eq!(broker.metric("blipmq_recovery_truncated_frames"), 0);
    let mut expected: Vec<u32> = (0..9).collect();
    expected.push(10);
    assert_eq!(waiting(&broker), expected);
}

#[test]
fn a_last_batch_of_zeros_was_never_written() {
    let mut broker = killed_with(1, 2_000, &[]);
    broker.restart();
    let mut client = broker.v2();
    for n in 1..5 {
        assert_eq!(client.publish_v2("kept", 1, &message(n, 2_000)), (0, 2));
    }
    broker.kill();
    let (slot, offset) = last_frame(&broker.store());
    let file = OpenOptions::new().write(true).open(slot_path(&broker.store(), slot)).expect("a slot");
    file.write_all_at(&[0; 4096], offset).expect("a slot");
    drop(file);
    broker.restart();
    assert_eq!(waiting(&broker), (0..4).collect::<Vec<u32>>());
}

#[test]
fn a_missing_segment_is_refused() {
    let broker = killed_with(300, 10_000, &[]);
    let path = slot_path(&broker.store(), field(&dump(&broker.store())[150], "slot"));
    let bytes = fs::read(&path).expect("a slot");
    fs::remove_file(&path).expect("a slot");
    broker.restart_refused().expect(65, &["missing", "salvage"]);
    // Put back, it is as if nothing had happened.
    fs::write(&path, bytes).expect("a slot");
    let mut broker = broker;
    broker.restart();
    assert_eq!(waiting(&broker), (0..300).collect::<Vec<u32>>());
}

/// The newest first.
fn checkpoints(store: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(store.join("ckpt")).expect("a directory");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort_by_key(|path| path.metadata().and_then(|data| data.modified()).expect("a file"));
    files.reverse();
    files
}

#[test]
fn a_damaged_checkpoint_is_survived_and_two_are_refused() {
    let mut broker = killed_with(100, 1_000, &[("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "50")]);
    broker.restart();
    let store = broker.store();
    for n in 100..150 {
        broker.v2().publish_v2("kept", 1, &message(n, 1_000));
    }
    eventually("two checkpoints", || (checkpoints(&store).len() == 2).then_some(()));
    broker.kill();
    let files = checkpoints(&store);
    flip_byte(&files[0], files[0].metadata().expect("a file").len() / 2);
    broker.restart();
    assert_eq!(broker.metric("blipmq_checkpoint_fallbacks"), 1);
    assert!(broker.log().contains("checkpoint"), "{}", broker.log());
    assert_eq!(waiting(&broker), (0..150).collect::<Vec<u32>>());

    // Whole ones take both places.
    for n in 1..=2 {
        broker.v2().publish_v2("kept", 1, &message(150, 1_000));
        eventually("a whole checkpoint again", || (broker.metric("blipmq_checkpoints_total") >= n).then_some(()));
    }
    broker.kill();
    for path in checkpoints(&store) {
        flip_byte(&path, path.metadata().expect("a file").len() / 2);
    }
    let before = store_bytes(&store);
    broker.restart_refused().expect(65, &["checkpoint", "blipmq wal salvage"]);
    assert!(before == store_bytes(&store), "a refused start modifies nothing");
}

#[test]
fn segments_go_round_and_one_stuck_message_does_not_hold_the_disk() {
    let waves = if full() { 100 } else { 20 };
    let mut broker = start(&[
        ("BLIPMQ_STORAGE_SEGMENT_SIZE", "1MiB"),
        ("BLIPMQ_SHARDS_COUNT", "2"),
        ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "50"),
    ]);
    let store = broker.store();
    let mut client = broker.v2();
    let stuck = client.subscribe_v2("stuck", 1, 10, "worker");
    client.publish_later_v2("stuck", b"still here");
    let mut seen = [client.hear(), client.hear()];
    seen.sort_by_key(|said| matches!(said, Some(Said::Delivered { .. })));
    assert!(matches!(&seen[1], Some(Said::Delivered { sub, .. }) if *sub == stuck), "{seen:?}");
    let topics = ["even", "odd", "more"];
    let subs = topics.map(|topic| client.subscribe_v2(topic, 1, 1000, "worker"));
    let mut most = 0;
    for wave in 0..waves {
        for (topic, sub) in topics.iter().zip(subs) {
            for n in 0..100 {
                client.publish_later_v2(topic, &message(wave * 100 + n, 10_000));
            }
            let (mut stored, mut delivered, mut last) = (0, 0, 0);
            while stored < 100 || delivered < 100 {
                match client.hear() {
                    Some(Said::Stored { .. }) => stored += 1,
                    Some(Said::Delivered { sub: to, tag, message, .. }) if to == sub => {
                        assert_eq!(number(&message), wave * 100 + delivered);
                        (delivered, last) = (delivered + 1, tag);
                    }
                    other => panic!("{other:?}"),
                }
            }
            client.ack_v2(sub, last - 99, last);
        }
        most = most.max(disk_bytes(&store));
    }
    let written = u64::from(waves) * 300 * 10_000;
    // Seven segments are granted or spare on two cores; the rest is what waits for two checkpoints.
    let small = 16 * MIB;
    eventually("the disk to be given back", || (disk_bytes(&store) <= small).then_some(()));
    eprintln!("{written} bytes published, {most} on the disk at most, {} at the end", disk_bytes(&store));
    assert!(broker.metric("blipmq_relocated_bytes_total") > 0, "the stuck message has moved on");
    // Names are used again: no slot has a number as high as the count of segments written.
    let slots = fs::read_dir(store.join("wal")).expect("a directory").count() as u64;
    assert!(slots <= small / MIB, "{slots} slots");
    let highest = (0..written / MIB).rev().find(|slot| slot_path(&store, *slot).exists());
    assert!(highest.is_some_and(|slot| slot < written / MIB / 2), "{highest:?} of {}", written / MIB);

    broker.kill();
    broker.restart();
    let mut client = broker.v2();
    let stuck = client.subscribe_v2("stuck", 1, 10, "worker");
    let got = client.deliveries_v2(stuck, 1);
    assert_eq!(got[0].1, b"still here");
    client.ack_v2(stuck, got[0].0, got[0].0);
    for topic in topics {
        assert_eq!(client.backlog_v2(topic, "worker"), 0, "{topic}: all of it was acknowledged");
    }
    broker.stop("TERM");
    blipmq(&["wal", "verify", path_text(&store)]).expect(0, &["whole", "stopped in order"]);
}

/// v1 B24 and DESIGN 1: a backlog of any depth lives in the log, not in memory, and refuses nobody.
#[test]
fn a_deep_backlog_is_refused_to_nobody_and_kept_on_the_disk() {
    const BUDGET_MIB: u64 = 64;
    let messages: u32 = if full() { 200_000 } else { 20_000 };
    let mut broker = start(&[("BLIPMQ_STORAGE_MEMORY_BUDGET", "64MiB"), ("BLIPMQ_STORAGE_SEGMENT_SIZE", "16MiB")]);
    let store = broker.store();
    let before = disk_bytes(&store);
    let at_rest = rss_kib(broker.pid());
    let began = std::time::Instant::now();
    let mut client = broker.v1();
    let sub = client.subscribe("deep", 1);
    let mut most = 0;
    for n in 0..messages {
        client.publish("deep", 1, &message(n, 1024));
        if n % 1000 == 0 {
            most = most.max(rss_kib(broker.pid()));
        }
    }
    // No NACK came before this PONG; and only the whole backlog is all of it.
    client.expect_silence();
    eventually("all to be stored", || {
        most = most.max(rss_kib(broker.pid()));
        (broker.metric("blipmq_queue_waiting") == u64::from(messages)).then_some(())
    });
    let published_in = began.elapsed();
    client.expect_silence();
    let peak = disk_bytes(&store);
    let most_publishing = most;

    // As far as the socket's buffers go, POLLs and ACKs need no round trip each.
    const WINDOW: u32 = 200;
    let began = std::time::Instant::now();
    for first in (0..messages).step_by(WINDOW as usize) {
        let last = messages.min(first + WINDOW);
        for _ in first..last {
            client.poll_later(sub);
        }
        for n in first..last {
            let delivery = client.recv_delivery("deep");
            assert_eq!(number(&delivery.message), n, "in order, none lost");
            client.ack(sub, delivery.tag);
        }
        most = most.max(rss_kib(broker.pid()));
    }
    client.poll_later(sub);
    client.expect_silence();
    let polled_in = began.elapsed();
    eventually("the disk to be given back", || (disk_bytes(&store) <= before + 64 * MIB).then_some(()));
    eprintln!(
        "{messages} messages of 1 KiB: published in {published_in:?}, polled and acknowledged in {polled_in:?}; resident \
         {at_rest} KiB at rest, {most_publishing} KiB at most while publishing, {most} KiB in all; disk {} MiB before, {} MiB at most, {} MiB after",
        before / MIB,
        peak / MIB,
        disk_bytes(&store) / MIB
    );
    assert!(most < (BUDGET_MIB + 64) * 1024, "{most} KiB resident");
    // v1 acknowledgements are not confirmed: this one comes out of the log behind them.
    client.publish("deep", 1, b"last");
    assert_eq!(client.poll(sub, "deep").message, b"last");
    broker.kill();
    broker.restart();
    let mut client = broker.v1();
    let sub = client.subscribe("deep", 1);
    assert_eq!(client.poll(sub, "deep").message, b"last", "nothing else of it comes back");
}
