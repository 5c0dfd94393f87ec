//! Running the broker: what it says when it cannot start, how it stops, what an operator can see, who gets in.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::{
    Broker, Client, Ended, KEY, Said, blipmq, eventually, free_ports, hex, open_files, program, run, scratch, string,
};

/// A directory of a test's own, deleted with it.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let dir = scratch().join(format!("operations-{}-{serial}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        Dir(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// `blipmqd`, which must end by itself. It gets ports and a store of its own unless told otherwise.
fn blipmqd(dir: &Dir, flags: &[&str], env: &[(&str, &str)]) -> Ended {
    let (port, metrics_port) = free_ports();
    let mut command = Command::new(program("blipmqd"));
    command
        .env_clear()
        .env("BLIPMQ_PORT", port.to_string())
        .env("BLIPMQ_METRICS_PORT", metrics_port.to_string())
        .env("BLIPMQ_WAL_PATH", dir.path("store"))
        .env("BLIPMQ_STORAGE_SEGMENT_SIZE", "1MiB")
        .envs(env.iter().copied())
        .args(flags);
    run(&mut command)
}

// ---- configuration ------------------------------------------------------------------------------------------------------

#[test]
fn a_bad_file_is_named_with_line_and_key() {
    let dir = Dir::new();
    let cases: [(&str, &str, &[&str]); 12] = [
        ("a.toml", "port = 5555\nbanana = 1\n", &["a.toml", "a.toml:2:", "banana"]),
        ("b.toml", "\n\nprot = 5555\n", &["b.toml", "b.toml:3:", "did you mean `port`"]),
        ("c.toml", "port = 70000\n", &["c.toml", "c.toml:1:", "`port`", "70000"]),
        (
            "d.toml",
            "bind_addr = \"127.0.0.1\"\nfsync_policy = \"sometimes\"\n",
            &["d.toml:2:", "fsync_policy", "every_n"],
        ),
        ("e.toml", "[storage]\nsegment_size = \"5 bananas\"\n", &["e.toml:2:", "storage.segment_size", "5 bananas"]),
        ("f.toml", "[storag]\nsegment_size = \"64MiB\"\n", &["f.toml:1:", "storage"]),
        ("g.toml", "port = \n", &["g.toml", "g.toml:1:", "TOML"]),
        ("h.yaml", "port: 5555\nretry_backoff_ms: soon\n", &["h.yaml", "h.yaml:2:", "retry_backoff_ms", "soon"]),
        ("i.yaml", "port: [5555\n", &["i.yaml", "YAML"]),
        ("j.toml", "max_retries = 0\n", &["j.toml:1:", "max_retries"]),
        ("k.toml", "[[keys]]\nname = \"a\"\nkey = \"sha256:12\"\n", &["k.toml:", "key"]),
        ("l.toml", "bind_addr = \"0.0.0.0\"\n", &["l.toml", "l.toml:1:", "bind_addr", "API key"]),
    ];
    for (name, text, words) in cases {
        let path = dir.file(name, text);
        for flags in [&["--config", &path][..], &["--config", &path, "--check-config"]] {
            let ended = blipmqd(&dir, flags, &[]);
            ended.expect(78, words);
        }
    }
    assert!(!dir.path("store").exists(), "nothing starts half-configured");
}

#[test]
fn a_bad_variable_or_flag_is_named() {
    let dir = Dir::new();
    for (name, value) in [
        ("BLIPMQ_PORT", "no"),
        ("BLIPMQ_FSYNC_POLICY", "every_n"),
        ("BLIPMQ_MAX_RETRIES", "-1"),
        ("BLIPMQ_STORAGE_MEMORY_BUDGET", "1KiB"),
        ("BLIPMQ_NET_DRAIN_MS", "soon"),
        ("BLIPMQ_SHARDS_COUNT", "many"),
        ("BLIPMQ_BIND_ADDR", "no such host.invalid"),
    ] {
        blipmqd(&dir, &[], &[(name, value)]).expect(78, &[name, value]);
    }
    blipmqd(&dir, &[], &[("BLIPMQ_STORAGE_SEGMENT_SIZES", "1")]).expect(78, &["BLIPMQ_STORAGE_SEGMENT_SIZE"]);
    for (flag, value) in [("--port", "no"), ("--shards", "x"), ("--fsync-policy", "maybe"), ("--metrics-port", "99999")]
    {
        blipmqd(&dir, &[flag, value], &[]).expect(78, &[flag, value]);
    }
    let missing = dir.path("missing.toml");
    let missing = missing.to_str().expect("UTF-8");
    blipmqd(&dir, &["--config", missing], &[]).expect(78, &[missing, "--config", "cannot be read"]);
    blipmqd(&dir, &[], &[("BLIPMQ_CONFIG", missing)]).expect(78, &[missing, "BLIPMQ_CONFIG"]);
    let usage = blipmqd(&dir, &["--bananas"], &[]);
    assert!(usage.code == Some(2) && usage.said.contains("--bananas"), "{}", usage.said);
    blipmqd(&dir, &[], &[("RUST_LOG", "blipmq=loud")]).expect(78, &["RUST_LOG"]);
}

#[test]
fn check_config_prints_what_would_count_and_starts_nothing() {
    let dir = Dir::new();
    let path = dir.file("x.toml", "port = 6001\nallowed_api_keys = [\"very-secret\"]\n[net]\ndrain_ms = 7\n");
    let ended = blipmqd(&dir, &["--config", &path, "--check-config", "--shards", "3"], &[("BLIPMQ_PORT", "6002")]);
    ended.expect(0, &["port = 6002", "drain_ms = 7", "count = 3", "--shards"]);
    assert!(!ended.said.contains("very-secret"), "{}", ended.said);
    assert!(!dir.path("store").exists());
    // What it prints is a configuration.
    let again = dir.file("again.toml", &ended.said);
    let env = [("BLIPMQ_ALLOWED_API_KEYS", "k"), ("BLIPMQ_PORT", "6002")];
    blipmqd(&dir, &["--config", &again, "--check-config"], &env).expect(0, &["drain_ms = 7", "count = 3"]);
    for example in ["blipmq.toml", "dev.toml", "blipmq-dev.toml", "prod.toml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(example);
        let ended = run(Command::new(program("blipmqd")).env_clear().env("BLIPMQ_ALLOWED_API_KEYS", "k").args([
            "--check-config".as_ref(),
            "--config".as_ref(),
            path.as_os_str(),
        ]));
        ended.expect(0, &["fsync_policy"]);
    }
}

// ---- the machine in the way ---------------------------------------------------------------------------------------------

#[test]
fn a_port_in_use_ends_the_start_with_words() {
    let dir = Dir::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let ended = blipmqd(&dir, &[], &[("BLIPMQ_PORT", &port)]);
    ended.expect(69, &[&port, "in use", "`port`"]);
    let ended = blipmqd(&dir, &[], &[("BLIPMQ_METRICS_PORT", &port)]);
    ended.expect(69, &[&port, "metrics"]);
    // Another broker's port is as taken as any.
    let broker = Broker::shared();
    let port = broker.port().to_string();
    blipmqd(&dir, &[], &[("BLIPMQ_PORT", &port)]).expect(69, &[&port, "in use"]);
}

#[test]
fn a_second_broker_on_the_same_store_is_refused() {
    let broker = Broker::start(&[]);
    broker.restart_refused().expect(75, &["in use by process", &broker.pid().to_string()]);
    let store = broker.store();
    for tool in ["verify", "stat", "dump"] {
        blipmq(&["wal", tool, store.to_str().expect("UTF-8")]).expect(75, &["in use"]);
    }
    assert_eq!(broker.v2().publish_v2("t", 1, b"still serving"), (0, 2));
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let dir = Dir::new();
    let file = dir.file("plain", "hello");
    blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", &file)]).expect(78, &[&file, "not a directory"]);
    let below = format!("{file}/store");
    let ended = blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", &below)]);
    assert!(ended.code == Some(71) && ended.said.contains(&below), "{ended:?}");
    // Root may write anywhere but here.
    let ended = blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", "/proc/blipmq")]);
    assert!(ended.code == Some(71) && ended.said.contains("/proc/blipmq"), "{ended:?}");
    let locked = dir.path("locked");
    fs::create_dir(&locked).expect("a directory");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o500)).expect("a directory");
    if fs::write(locked.join("probe"), "").is_err() {
        let ended = blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", locked.to_str().expect("UTF-8"))]);
        ended.expect(71, &["cannot write to", "locked"]);
    } else {
        eprintln!("skipped: this user may write everywhere");
    }
}

#[test]
fn memory_is_no_disk_unless_that_is_wanted() {
    let Some(memory) = tmpfs() else { return eprintln!("skipped: no tmpfs to write to") };
    let dir = Dir::new();
    let store = memory.0.join("store");
    let store = store.to_str().expect("UTF-8");
    let ended = blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", store)]);
    ended.expect(78, &["tmpfs", "--allow-buffered-io", "ext4"]);
    let mut broker = Broker::start(&[("BLIPMQ_WAL_PATH", store), ("BLIPMQ_STORAGE_ALLOW_BUFFERED_IO", "true"), SMALL]);
    assert!(broker.log().contains("WARN") && broker.log().contains("allow_buffered_io"), "{}", broker.log());
    let mut client = broker.v2();
    client.subscribe_v2("t", 1, 10, "d");
    assert_eq!(client.publish_v2("t", 1, b"kept"), (0, 2));
    broker.kill();
    broker.restart();
    let mut client = broker.v2();
    let sub = client.subscribe_v2("t", 1, 10, "d");
    assert_eq!(client.deliveries_v2(sub, 1)[0].1, b"kept");
}

const SMALL: (&str, &str) = ("BLIPMQ_STORAGE_SEGMENT_SIZE", "1MiB");

fn tmpfs() -> Option<Dir> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        let dir = Path::new(place).join(format!("blipmq-{}", std::process::id()));
        (kind == "tmpfs" && fs::create_dir(&dir).is_ok()).then_some(Dir(dir))
    })
}

#[test]
fn few_descriptors_lower_the_limit_of_connections_and_too_few_are_refused() {
    let dir = Dir::new();
    let limited = |files: &str, then: &str| {
        let mut command = Command::new("sh");
        command.env_clear().args(["-c", &format!("ulimit -n {files} && exec \"$0\" {then}")]).arg(program("blipmqd"));
        command.env("BLIPMQ_WAL_PATH", dir.path("store")).env("BLIPMQ_SHARDS_COUNT", "1");
        command
    };
    run(&mut limited("200", "")).expect(71, &["200", "NOFILE"]);
    // With just enough it starts, says so, and refuses what is beyond.
    let broker = Broker::start_limited(&[SMALL, ("BLIPMQ_SHARDS_COUNT", "1")], 360);
    let log = broker.log();
    assert!(log.contains("WARN") && log.contains("max_connections"), "{log}");
    let mut clients: Vec<Client> = Vec::new();
    let mut refused = 0;
    for _ in 0..120 {
        let mut client = broker.connect();
        if client.try_login_v2(KEY) {
            clients.push(client);
        } else {
            refused += 1;
        }
    }
    assert!(clients.len() >= 64 && refused > 0, "{} served, {refused} refused", clients.len());
    assert_eq!(clients[0].publish_v2("t", 1, b"the log has its files"), (0, 2));
    assert!(broker.metric("blipmq_connections_refused_total") >= 1);
    clients.truncate(1);
    eventually("room for others", || broker.connect().try_login_v2(KEY).then_some(()));
}

// ---- stopping -----------------------------------------------------------------------------------------------------------

#[test]
fn a_stop_under_load_loses_nothing_that_was_confirmed() {
    for signal in ["TERM", "INT"] {
        let mut broker =
            Broker::start(&[SMALL, ("BLIPMQ_SHARDS_COUNT", "2"), ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000")]);
        let topics = ["stop-a", "stop-b", "stop-c", "stop-d"];
        for topic in topics {
            broker.v2().subscribe_v2(topic, 1, 1, "worker");
        }
        let confirmed = Mutex::new(vec![BTreeSet::new(); topics.len()]);
        let (refused, told) = (AtomicU32::new(0), AtomicU32::new(0));
        let total = || confirmed.lock().expect("no panic").iter().map(BTreeSet::len).sum::<usize>();
        let took = thread::scope(|scope| {
            for (nth, topic) in topics.into_iter().enumerate() {
                let mut client = broker.v2();
                let (confirmed, refused, told) = (&confirmed, &refused, &told);
                scope.spawn(move || {
                    let mut sent = std::collections::HashMap::new();
                    let mut next = 0u32;
                    loop {
                        while sent.len() < 100 {
                            let Some(cid) = client.try_publish_v2(topic, &next.to_be_bytes()) else { return };
                            sent.insert(cid, next);
                            next += 1;
                        }
                        match client.hear() {
                            Some(Said::Stored { cid, level }) => {
                                assert_eq!(level, 2);
                                let number = sent.remove(&cid).expect("ours");
                                confirmed.lock().expect("no panic")[nth].insert(number);
                            }
                            Some(Said::Rejected { cid, code: 503, .. }) => {
                                sent.remove(&cid);
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                            Some(Said::GoAway { code: 503, .. }) => _ = told.fetch_add(1, Ordering::Relaxed),
                            None => return,
                            other => panic!("{other:?}"),
                        }
                    }
                });
            }
            eventually("some load", || (total() >= 2_000).then_some(()));
            let began = Instant::now();
            broker.signal(signal);
            assert_eq!(broker.wait().code(), Some(0), "SIG{signal}");
            began.elapsed()
        });
        assert!(took < Duration::from_secs(5), "SIG{signal} took {took:?}");
        assert_eq!(told.load(Ordering::Relaxed), 4, "everybody got a GOAWAY");
        assert!(refused.load(Ordering::Relaxed) > 0, "publishes were refused with 503");
        broker.restart();
        for (topic, confirmed) in topics.into_iter().zip(confirmed.into_inner().expect("no panic")) {
            let mut client = broker.v2();
            let backlog = client.backlog_v2(topic, "worker") as usize;
            let sub = client.subscribe_v2(topic, 1, 65_535, "worker");
            let got = client.deliveries_v2(sub, backlog);
            let got: Vec<u32> =
                got.iter().map(|(_, message)| u32::from_be_bytes(message[..].try_into().expect("four"))).collect();
            assert!(got.is_sorted(), "in order");
            let got: BTreeSet<u32> = got.into_iter().collect();
            let lost: Vec<&u32> = confirmed.difference(&got).collect();
            assert!(lost.is_empty(), "SIG{signal} lost {lost:?} of {} confirmed in {topic}", confirmed.len());
        }
    }
}

#[test]
fn a_stop_waits_for_acknowledgements_under_way_and_no_longer() {
    let mut broker = Broker::start(&[SMALL, ("BLIPMQ_NET_DRAIN_MS", "20000")]);
    let mut client = broker.v2();
    let sub = client.subscribe_v2("t", 1, 10, "worker");
    client.publish_v2("t", 1, b"in flight");
    let tag = client.deliveries_v2(sub, 1)[0].0;
    let mut old = broker.v1();
    broker.signal("TERM");
    assert_eq!(client.hear().map(|said| matches!(said, Said::GoAway { code: 503, .. })), Some(true));
    assert_eq!(broker.http("GET", "/readyz").0, 503);
    assert_eq!(broker.http("GET", "/healthz").0, 200);
    let cid = old.publish("t", 1, b"late");
    let nack = old.recv();
    let text = String::from_utf8_lossy(&nack.payload[4..]).into_owned();
    assert_eq!((nack.frame_type, nack.cid, &nack.payload[..2]), (0x06, cid, &500u16.to_be_bytes()[..]));
    assert!(text.starts_with("durable publish failed: "), "{text}");
    let cid = client.publish_later_v2("t", b"late");
    assert!(matches!(client.hear(), Some(Said::Rejected { cid: to, code: 503, .. }) if to == cid));
    client.ack_later_v2(sub, tag, tag).expect("still open");
    assert_eq!(broker.wait().code(), Some(0));
    broker.restart();
    assert_eq!(broker.v2().backlog_v2("t", "worker"), 0, "the acknowledgement counts");
}

#[test]
fn an_idle_broker_stops_at_once() {
    for signal in ["TERM", "INT"] {
        let mut broker = Broker::start(&[SMALL]);
        let _idle = [broker.v1(), broker.v2()];
        let began = Instant::now();
        assert_eq!(broker.stop(signal).code(), Some(0));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}: there is nothing to wait for");
        assert!(broker.log().contains("stopped; everything is on disk"), "{}", broker.log());
    }
}

// ---- who gets in --------------------------------------------------------------------------------------------------------

#[test]
fn without_keys_a_key_is_made_for_loopback_only() {
    let dir = Dir::new();
    for address in ["0.0.0.0", "::"] {
        let ended = blipmqd(&dir, &["--bind", address], &[]);
        ended.expect(78, &["--bind", "no API key", "allowed_api_keys"]);
    }
    let broker = Broker::start(&[SMALL, ("BLIPMQ_ALLOWED_API_KEYS", "")]);
    let path = broker.store().join("dev.key");
    let mode = path.metadata().expect("dev.key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let key = fs::read_to_string(&path).expect("dev.key");
    assert!(broker.log().contains("dev.key") && !broker.log().contains(key.trim()), "the log says where, not what");
    let mut client = broker.connect();
    client.login_v2(key.trim());
    assert!(!broker.connect().try_login_v2("dev-key-1"));
    // The same key after a restart.
    let mut broker = broker;
    broker.stop("TERM");
    broker.restart();
    assert!(broker.connect().try_login_v2(key.trim()));
}

#[test]
fn wrong_keys_become_slow_and_right_ones_do_not() {
    let broker = Broker::start(&[SMALL]);
    let wrong = |client: &mut Client| {
        let cid = client.next_cid();
        client.send(0x02, cid, &string("wrong"));
        client.expect_nack(cid, 401, "invalid API key");
    };
    // The burst is free.
    let mut client = broker.connect();
    client.send(0x01, 1, &[0, 1]);
    client.expect(0x05, 1, &[0; 8]);
    for _ in 0..64 {
        wrong(&mut client);
    }
    let began = Instant::now();
    for _ in 0..3 {
        wrong(&mut client);
    }
    let slow = began.elapsed();
    assert!(slow >= Duration::from_secs(2), "three more took {slow:?}");
    assert!(broker.metric("blipmq_auth_failures_total") >= 67);
    let right = thread::scope(|scope| {
        scope.spawn(|| wrong(&mut client));
        let began = Instant::now();
        assert_eq!(broker.v2().publish_v2("t", 1, b"let in"), (0, 2));
        began.elapsed()
    });
    assert!(right < Duration::from_secs(2), "the right key took {right:?}");
}

#[test]
fn who_does_not_log_in_is_shown_out() {
    let broker = Broker::start(&[SMALL, ("BLIPMQ_NET_AUTH_DEADLINE_MS", "500")]);
    let mut silent = broker.connect();
    // One byte now and then keeps nobody in.
    let mut dripping = broker.connect();
    let began = Instant::now();
    for byte in hex("0000000b 01 0000000000000001 0001 00000014 02 0000000000000002").into_iter().cycle().take(200) {
        if !dripping.try_send(&[byte]) || began.elapsed() > Duration::from_secs(20) {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "let drip for {took:?}");
    silent.expect_closed();
    eventually("it to be counted", || (broker.metric("blipmq_connections_closed_total") >= 2).then_some(()));
    // Nor does a frame that is too long for a stranger.
    let mut greedy = broker.connect();
    greedy.send_raw(&hex("00f00000 02 0000000000000001"));
    greedy.expect_closed();
    assert_eq!(broker.v2().publish_v2("t", 1, b"others are served"), (0, 2));
}

// ---- what an operator sees ----------------------------------------------------------------------------------------------

#[test]
fn health_readiness_topics_and_subscriptions_are_shown() {
    let broker = Broker::start(&[SMALL, ("BLIPMQ_SHARDS_COUNT", "2")]);
    assert_eq!(broker.http("GET", "/healthz").0, 200);
    assert_eq!(broker.http("GET", "/readyz").0, 200);
    let mut client = broker.v2();
    let sub = client.subscribe_v2("orders", 1, 1, "billing");
    for _ in 0..3 {
        client.publish_later_v2("orders", b"one");
    }
    let mut delivered = 0;
    for _ in 0..4 {
        delivered += u32::from(matches!(client.hear(), Some(Said::Delivered { sub: to, .. }) if to == sub));
    }
    assert_eq!(delivered, 1, "credit");
    let json = |path: &str| -> serde_json::Value {
        let (status, body) = broker.http("GET", path);
        assert_eq!(status, 200, "{path}");
        serde_json::from_str(&body).expect("JSON")
    };
    let text = json("/topics").to_string();
    assert!(text.contains("\"orders\"") && text.contains("\"messages\":3"), "{text}");
    let text = json("/subs").to_string();
    assert!(
        text.contains("\"billing\"") && text.contains("\"in_flight\":1") && text.contains("\"backlog\":2"),
        "{text}"
    );
    assert_eq!(broker.metric("blipmq_queue_waiting"), 3);
    assert!(broker.metric("blipmq_segments_live") >= 2);
    assert_eq!(broker.http("GET", "/nothing").0, 404);
}

#[test]
fn rust_log_decides_what_is_said() {
    let quiet = Broker::start(&[SMALL, ("RUST_LOG", "error")]);
    assert_eq!(quiet.log(), "");
    let loud = Broker::start(&[SMALL, ("RUST_LOG", "debug")]);
    assert!(loud.log().contains("DEBUG"), "{}", loud.log());
    let normal = Broker::start(&[SMALL]);
    // The disk is measured while clients are served already.
    let log =
        eventually("the disk to be measured", || Some(normal.log()).filter(|log| log.contains("synced 4 KiB write")));
    for line in ["net listening on 127.0.0.1:", "metrics server listening on 127.0.0.1:"] {
        assert!(log.contains(line), "{line} in {log}");
    }
    assert!(!log.contains("DEBUG") && !log.contains('\x1b'), "{log}");
}

#[test]
fn connections_come_and_go_without_a_trace() {
    let broker = Broker::start(&[SMALL, ("BLIPMQ_SHARDS_COUNT", "2")]);
    let round = |count: u32| {
        for n in 0..count {
            let mut client = broker.v2();
            client.subscribe_v2(&format!("leak-{}", n % 7), (n % 2) as u8, 10, "");
        }
    };
    let settled = || {
        eventually("all to be forgotten", || {
            (broker.metric("blipmq_connections") == 0 && broker.metric("subscribers") == 0).then_some(())
        });
    };
    round(100);
    settled();
    let before = open_files(broker.pid());
    round(2_000);
    settled();
    let after = eventually("the descriptors to be closed", || {
        let after = open_files(broker.pid());
        (after <= before + 4).then_some(after)
    });
    assert!(after <= before + 4, "{before} before, {after} after");
    assert_eq!(broker.metric("blipmq_connections_accepted_total"), 2_100);
}

// ---- v1's log -----------------------------------------------------------------------------------------------------------

/// A log file of the original broker (V1.md 2.8), its last record torn.
fn v1_log(messages: &[(&str, &[u8])]) -> Vec<u8> {
    let mut log = b"BLIPWAL\0".to_vec();
    log.extend_from_slice(&1u32.to_le_bytes());
    log.extend_from_slice(&[0; 20]);
    for (n, (topic, message)) in messages.iter().enumerate() {
        let payload = [&[1][..], &string(topic), message].concat();
        log.extend_from_slice(&(n as u64 + 1).to_le_bytes());
        log.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        log.extend_from_slice(&crc32(&payload).to_le_bytes());
        log.extend_from_slice(&payload);
    }
    log.extend_from_slice(&hex("0900000000000000 ff000000 01"));
    log
}

/// IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1)))
    })
}

#[test]
fn a_v1_log_is_recognised_and_imported() {
    assert_eq!(crc32(&hex("01 0004 74657374 68656c6c6f")).to_le_bytes().to_vec(), hex("86c2de61"), "V1.md 2.8");
    let dir = Dir::new();
    let path = dir.path("blipmq.wal");
    let messages: Vec<(&str, Vec<u8>)> =
        (0..500u32).map(|n| (["orders", "prices"][n as usize % 2], n.to_be_bytes().to_vec())).collect();
    let borrowed: Vec<(&str, &[u8])> = messages.iter().map(|(topic, message)| (*topic, &message[..])).collect();
    fs::write(&path, v1_log(&borrowed)).expect("a file");
    let path = path.to_str().expect("UTF-8");
    blipmqd(&dir, &[], &[("BLIPMQ_WAL_PATH", path)]).expect(78, &["v1", "blipmq import-v1", path]);

    let broker = Broker::start_over(&[("BLIPMQ_STORAGE_SEGMENT_SIZE", "64MiB")], |dir| {
        let store = dir.join("store");
        let ended = blipmq(&["import-v1", path, "--out", store.to_str().expect("UTF-8")]);
        ended.expect(0, &["500 messages", "2 topics", "incomplete"]);
    });
    for (nth, topic) in ["orders", "prices"].into_iter().enumerate() {
        let mut client = broker.v2();
        assert_eq!(client.backlog_v2(topic, "imported"), 250);
        let sub = client.subscribe_v2(topic, 1, 1000, "imported");
        let got: Vec<Vec<u8>> = client.deliveries_v2(sub, 250).into_iter().map(|(_, message)| message).collect();
        let expected: Vec<Vec<u8>> = messages.iter().skip(nth).step_by(2).map(|(_, message)| message.clone()).collect();
        assert_eq!(got, expected);
    }
    let out = broker.store();
    blipmq(&["import-v1", path, "--out", out.to_str().expect("UTF-8")]).expect(64, &["is there already"]);
    drop(TcpStream::connect(("127.0.0.1", broker.port())).expect("still there"));
}
