//! A full disk stops publishes, never the broker (DURABILITY.md 1.2, ENOSPC). On a small file system of its own, which
//! only root can mount; without that the tests say that they were skipped.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Broker, Client, Said, disk_bytes, eventually, scratch};

const MIB: u64 = 1 << 20;
/// Of a message.
const LEN: usize = 16 * 1024;

/// An ext4 of 96 MiB in a file. Unmounted and deleted with its owner.
struct SmallDisk {
    image: PathBuf,
    mounted: PathBuf,
}

impl SmallDisk {
    /// `None`, with the reason printed: this machine or user cannot.
    fn mount(name: &str) -> Option<SmallDisk> {
        let base = scratch().join(format!("disk-{}-{name}", std::process::id()));
        let (image, mounted) = (base.with_extension("img"), base.with_extension("mnt"));
        fs::create_dir_all(&mounted).expect("a directory");
        File::create(&image).and_then(|file| file.set_len(96 * MIB)).expect("an image");
        let disk = SmallDisk { image, mounted };
        let does = |program: &str, arguments: &[&std::ffi::OsStr]| match Command::new(program).args(arguments).output()
        {
            Ok(output) if output.status.success() => true,
            Ok(output) => {
                eprintln!("skipped: {program}: {}", String::from_utf8_lossy(&output.stderr).trim());
                false
            }
            Err(error) => {
                eprintln!("skipped: {program}: {error}");
                false
            }
        };
        let (image, mounted) = (disk.image.as_os_str(), disk.mounted.as_os_str());
        let made = does("mkfs.ext4", &["-q".as_ref(), "-m".as_ref(), "0".as_ref(), image])
            && does("mount", &["-o".as_ref(), "loop".as_ref(), image, mounted]);
        made.then_some(disk)
    }

    /// A file that takes all but `left` bytes of what is free.
    fn fill(&self, left: u64) -> PathBuf {
        let path = self.mounted.join("outside");
        let mut file = File::create(&path).expect("a file");
        let free = free(&self.mounted);
        for _ in 0..free.saturating_sub(left) / MIB {
            file.write_all(&vec![1; MIB as usize]).expect("room");
        }
        file.sync_all().expect("a file");
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // It may not be mounted, and a test that failed has already said so.
        Command::new("umount").arg(&self.mounted).output().ok();
        fs::remove_dir(&self.mounted).ok();
        fs::remove_file(&self.image).ok();
    }
}

fn free(mounted: &Path) -> u64 {
    let output = Command::new("stat").args(["-f", "-c", "%a %S"]).arg(mounted).output().expect("stat runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.split_whitespace().map(|number| number.parse::<u64>().expect("a number")).product()
}

/// In the order in which they must go: the broker before its disk.
struct Bench {
    broker: Broker,
    disk: SmallDisk,
}

fn start(name: &str, env: &[(&str, &str)]) -> Option<Bench> {
    let disk = SmallDisk::mount(name)?;
    let store = disk.mounted.join("store");
    let common = [
        ("BLIPMQ_WAL_PATH", store.to_str().expect("UTF-8")),
        ("BLIPMQ_STORAGE_SEGMENT_SIZE", "4MiB"),
        ("BLIPMQ_SHARDS_COUNT", "1"),
        ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "100"),
        ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000"),
        ("BLIPMQ_DELIVERY_V1_TTL_MS", "0"),
        ("BLIPMQ_RETRY_BACKOFF_MS", "600000"),
    ];
    Some(Bench { broker: Broker::start(&[&common[..], env].concat()), disk })
}

fn message(n: u32) -> Vec<u8> {
    let mut message = vec![n as u8; LEN];
    message[..4].copy_from_slice(&n.to_be_bytes());
    message
}

fn number(message: &[u8]) -> u32 {
    u32::from_be_bytes(message[..4].try_into().expect("four"))
}

/// Publishes from `first` on until the disk is full; returns what was confirmed, and the words.
fn publish_until_full(client: &mut Client, topic: &str, first: u32) -> (Vec<u32>, String) {
    let mut confirmed = Vec::new();
    for n in first.. {
        let cid = client.publish_later_v2(topic, &message(n));
        match client.hear() {
            Some(Said::Stored { cid: to, .. }) if to == cid => confirmed.push(n),
            Some(Said::Rejected { cid: to, code, text }) if to == cid => {
                assert_eq!(code, 507, "{text}");
                return (confirmed, text);
            }
            other => panic!("{other:?}"),
        }
        assert!(u64::from(n - first) < 96 * MIB / LEN as u64, "more than the disk holds");
    }
    unreachable!("the range has no end")
}

/// Takes `count` messages of the durable subscription and acknowledges them, each with its answer.
fn consume(broker: &Broker, topic: &str, count: usize) -> Vec<u32> {
    let mut client = broker.v2();
    let sub = client.subscribe_v2(topic, 1, 100, "worker");
    let (mut numbers, mut answers) = (Vec::new(), 0);
    while answers < count {
        match client.hear() {
            Some(Said::Delivered { tag, message, .. }) if numbers.len() < count => {
                numbers.push(number(&message));
                client.ack_later_v2(sub, tag, tag).expect("the broker reads");
            }
            Some(Said::Delivered { .. }) => {}
            Some(Said::Ok { .. }) => answers += 1,
            other => panic!("{other:?}"),
        }
    }
    numbers
}

fn accepted_again(broker: &Broker, topic: &str, n: u32) {
    let mut client = broker.v2();
    eventually("publishes to be taken again", || {
        client.publish_later_v2(topic, &message(n));
        match client.hear() {
            Some(Said::Stored { .. }) => Some(()),
            Some(Said::Rejected { code: 507, .. }) => None,
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_full_disk_refuses_publishes_with_words_and_acknowledgements_make_room() {
    let Some(mut bench) = start("acks", &[]) else { return };
    let broker = &mut bench.broker;
    let mut client = broker.v2();
    client.subscribe_v2("t", 1, 1, "worker");
    drop(client);
    let mut client = broker.v2();
    let (confirmed, text) = publish_until_full(&mut client, "t", 0);
    assert!(text.contains("storage full") && text.contains("space"), "{text}");
    assert!(confirmed.len() as u64 * LEN as u64 > 40 * MIB, "{} messages on 96 MiB", confirmed.len());
    assert_eq!(broker.metric("blipmq_no_space"), 1);
    assert!(broker.log().contains("publishes are refused"), "{}", broker.log());
    assert_eq!((broker.http("GET", "/healthz").0, broker.http("GET", "/metrics").0), (200, 200));

    // v1 hears it in its own words.
    let mut old = broker.v1();
    let cid = old.publish("t", 1, b"late");
    let nack = old.recv();
    assert_eq!((nack.frame_type, nack.cid, &nack.payload[..2]), (0x06, cid, &500u16.to_be_bytes()[..]));
    let text = String::from_utf8_lossy(&nack.payload[4..]).into_owned();
    assert!(text.starts_with("durable publish failed: storage full"), "{text}");

    // QoS0, deliveries and acknowledgements go on, and bring the space back without a restart.
    let half = confirmed.len() / 2;
    assert_eq!(consume(broker, "t", half), confirmed[..half]);
    accepted_again(broker, "t", 1_000_000);
    assert_eq!(broker.metric("blipmq_no_space"), 0);

    // Full once more, killed while it is: nothing confirmed is lost, and it starts on the full disk.
    let (more, _) = publish_until_full(&mut client, "t", 2_000_000);
    broker.kill();
    broker.restart();
    let expected: Vec<u32> = confirmed[half..].iter().copied().chain([1_000_000]).chain(more).collect();
    assert_eq!(consume(broker, "t", expected.len()), expected);
    accepted_again(broker, "t", 3_000_000);
    assert_eq!(broker.stop("TERM").code(), Some(0));
}

#[test]
fn an_outside_file_that_goes_away_is_enough() {
    let Some(mut bench) = start("outside", &[]) else { return };
    let outside = bench.disk.fill(24 * MIB);
    let broker = &mut bench.broker;
    broker.v2().subscribe_v2("t", 1, 1, "worker");
    let (confirmed, text) = publish_until_full(&mut broker.v2(), "t", 0);
    assert!(text.contains("storage full"), "{text}");
    fs::remove_file(outside).expect("the file");
    accepted_again(broker, "t", 1_000_000);
    assert_eq!(broker.metric("blipmq_no_space"), 0);
    broker.kill();
    broker.restart();
    let all: Vec<u32> = confirmed.into_iter().chain([1_000_000]).collect();
    assert_eq!(consume(broker, "t", all.len()), all);
}

#[test]
fn a_stop_on_a_full_disk_is_orderly() {
    let Some(mut bench) = start("stop", &[]) else { return };
    bench.disk.fill(24 * MIB);
    let broker = &mut bench.broker;
    broker.v2().subscribe_v2("t", 1, 1, "worker");
    let (confirmed, _) = publish_until_full(&mut broker.v2(), "t", 0);
    assert_eq!(broker.stop("TERM").code(), Some(0));
    broker.restart();
    assert_eq!(consume(broker, "t", confirmed.len()), confirmed);
}

/// Every start needs a segment for each core's new stream: one that the starts before it must not have used up.
#[test]
fn killed_again_and_again_on_a_full_disk_it_still_starts() {
    for (name, cores) in [("again-1", "1"), ("again-2", "2")] {
        // No checkpoint frees anything in time.
        let env = [("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "3600000"), ("BLIPMQ_SHARDS_COUNT", cores)];
        let Some(mut bench) = start(name, &env) else { return };
        bench.disk.fill(28 * MIB);
        let broker = &mut bench.broker;
        broker.v2().subscribe_v2("t", 1, 1, "worker");
        let (mut expected, _) = publish_until_full(&mut broker.v2(), "t", 0);
        for round in 1..=5 {
            broker.kill();
            broker.restart();
            // There may be room for some; what is confirmed is kept.
            expected.extend(publish_until_full(&mut broker.v2(), "t", round * 1_000_000).0);
        }
        assert_eq!(consume(broker, "t", expected.len()), expected);
    }
}

/// The same by the broker's own limit, on any disk.
#[test]
fn a_quota_refuses_before_the_disk_is_full() {
    let mut broker = Broker::start(&[
        ("BLIPMQ_STORAGE_SEGMENT_SIZE", "1MiB"),
        ("BLIPMQ_STORAGE_DISK_QUOTA", "24MiB"),
        ("BLIPMQ_SHARDS_COUNT", "1"),
        ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "50"),
        ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000"),
    ]);
    broker.v2().subscribe_v2("t", 1, 1, "worker");
    let (confirmed, text) = publish_until_full(&mut broker.v2(), "t", 0);
    assert!(text.contains("quota"), "{text}");
    assert!(disk_bytes(&broker.store()) <= 24 * MIB);
    let half = confirmed.len() / 2;
    assert_eq!(consume(&broker, "t", half), confirmed[..half]);
    accepted_again(&broker, "t", 1_000_000);
    broker.kill();
    broker.restart();
    let rest: BTreeSet<u32> = consume(&broker, "t", confirmed.len() - half + 1).into_iter().collect();
    assert!(confirmed[half..].iter().all(|n| rest.contains(n)));
    assert!(disk_bytes(&broker.store()) <= 24 * MIB);
}
