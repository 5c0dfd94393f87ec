//! BlipMQ v1 from outside, row by row: B1 to B26, B33, B35, B39, and its golden frames byte for byte.
//!
//! Silence is shown by a PING whose PONG comes next, not by waiting.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::{Broker, Delivery, KEY, eventually, frame, hex, string};

const FRAME_LEN_MAX: usize = 16 * 1024 * 1024;

fn delivery(tag: u64, qos: u8, message: &[u8]) -> Delivery {
    Delivery { tag, qos, message: message.to_vec() }
}

/// What the client sends, and what it must be answered, to the byte.
const GOLDEN: &[(&str, &str)] = &[
    ("0000000b 01 0000000000000001 0001", "00000011 05 0000000000000001 0000000000000000"),
    ("00000014 02 0000000000000002 0009 6465762d6b65792d31", "00000011 05 0000000000000002 0000000000000000"),
    ("00000010 04 0000000000000003 0004 64656d6f 01", "00000011 05 0000000000000003 0000000000000001"),
    ("00000010 04 0000000000000003 0004 64656d6f 01", "00000011 05 0000000000000003 0000000000000002"),
    ("00000012 03 0000000000000004 01 0004 64656d6f 6869", ""),
    ("00000011 09 0000000000000005 0000000000000002", "00000012 03 0000000000000001 01 0004 64656d6f 6869"),
    ("00000011 05 0000000000000001 0000000000000002", ""),
    ("00000009 07 0000000000000006", "00000009 08 0000000000000006"),
];

#[test]
fn golden_frames_in_one_conversation() {
    for piece in [usize::MAX, 1] {
        let broker = Broker::start(&[]);
        let mut client = broker.connect();
        for (sent, answer) in GOLDEN {
            for bytes in hex(sent).chunks(piece) {
                client.send_raw(bytes);
            }
            let answer = hex(answer);
            assert_eq!(client.recv_raw(answer.len()), answer, "to {sent}");
        }
        client.expect_silence();

        let mut stranger = broker.connect();
        stranger.send_raw(&hex("00000009 07 0000000000000007"));
        let nack = hex("0000001c 06 0000000000000007 0191 000f 756e61757468656e74696361746564");
        assert_eq!(stranger.recv_raw(nack.len()), nack);
    }
}

#[test]
fn b01_defaults() {
    let output = Broker::check_config(&[]);
    assert!(output.status.success(), "{output:?}");
    let shown = String::from_utf8(output.stdout).expect("text");
    for setting in [
        "bind_addr = \"127.0.0.1\"",
        "port = 5555",
        "metrics_addr = \"127.0.0.1\"",
        "metrics_port = 9100",
        "wal_path = \"blipmq.wal\"",
        "max_retries = 3",
        "retry_backoff_ms = 100",
        "allowed_api_keys = []",
        "v1_ttl_ms = 60000",
    ] {
        assert!(shown.lines().any(|line| line.starts_with(setting)), "{setting} in\n{shown}");
    }
}

#[test]
fn b01_frames_may_be_pipelined_from_the_first_byte() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    let topic = string("b01");
    let conversation = [
        frame(0x07, 1, b""),
        frame(0x01, 2, &[0, 1]),
        frame(0x02, 3, &string(KEY)),
        frame(0x04, 4, &[&topic[..], &[0]].concat()),
        frame(0x03, 5, &[&[0][..], &topic, b"one"].concat()),
        frame(0x07, 6, b""),
    ]
    .concat();
    client.send_raw(&conversation);
    client.expect_nack(1, 401, "unauthenticated");
    client.expect(0x05, 2, &[0; 8]);
    client.expect(0x05, 3, &[0; 8]);
    let subscribed = client.recv();
    assert_eq!((subscribed.frame_type, subscribed.cid), (0x05, 4));
    client.expect(0x08, 6, b"");
    let sub = u64::from_be_bytes(subscribed.payload.try_into().expect("an id"));
    assert_eq!(client.poll(sub, "b01"), delivery(0, 0, b"one"));
}

#[test]
fn b03_a_bad_frame_ends_the_connection_in_silence_after_the_frames_before_it() {
    let broker = Broker::shared();
    let over = (FRAME_LEN_MAX as u32 + 1).to_be_bytes();
    let bad: [&[u8]; 7] = [
        &[0, 0, 0, 0],
        &[0, 0, 0, 8],
        &over,
        &[0xff; 4],
        &frame(0x00, 1, b""),
        &frame(0x0a, 1, b"payload"),
        &frame(0xff, 1, b""),
    ];
    for bytes in bad {
        let mut client = broker.v1();
        client.send_raw(&[&frame(0x07, 5, b""), bytes].concat());
        client.expect(0x08, 5, b"");
        client.expect_closed();

        let mut stranger = broker.connect();
        stranger.send_raw(bytes);
        stranger.expect_closed();
    }
}

#[test]
fn b03_the_largest_frame_is_served() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    client.send(0x07, 1, &vec![0; FRAME_LEN_MAX - 9]);
    client.expect(0x08, 1, b"");

    for qos in [0, 1] {
        let topic = format!("b03-{qos}");
        let sub = client.subscribe(&topic, qos);
        let message: Vec<u8> = (0..FRAME_LEN_MAX - 9 - 3 - topic.len()).map(|i| (i % 251) as u8).collect();
        client.publish(&topic, qos, &message);
        let Delivery { tag, message: got, .. } = client.poll(sub, &topic);
        assert!(got == message, "{} bytes of {}", got.len(), message.len());
        if qos == 1 {
            client.ack(sub, tag);
        }
        client.expect_silence();
    }
}

#[test]
fn b05_hello_errors_keep_the_connection() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    for version in [0u16, 3, 0xffff] {
        client.send(0x01, 1, &version.to_be_bytes());
        client.expect_nack(1, 426, "unsupported protocol version");
    }
    for payload in [&b""[..], b"\0", b"\0\x01\0"] {
        client.send(0x01, 2, payload);
        client.expect_nack(2, 400, "invalid HELLO payload");
    }
    client.send(0x01, 3, &[0, 1]);
    client.expect(0x05, 3, &[0; 8]);
    client.send(0x01, 4, &[0, 1]);
    client.expect_nack(4, 400, "HELLO already performed");
    client.send(0x02, 5, &string(KEY));
    client.expect(0x05, 5, &[0; 8]);
    client.send(0x01, 6, &[0, 1]);
    client.expect_nack(6, 400, "HELLO already performed");
    client.expect_silence();
}

#[test]
fn b06_auth_errors_keep_the_connection() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    client.send(0x02, 1, &string(KEY));
    client.expect_nack(1, 400, "HELLO not performed");
    client.send(0x01, 2, &[0, 1]);
    client.expect(0x05, 2, &[0; 8]);
    for payload in [&b""[..], b"\0", b"\0\x02a", b"\0\x01ab", b"\0\x01\xff"] {
        client.send(0x02, 3, payload);
        client.expect_nack(3, 400, "invalid AUTH payload");
    }
    for key in ["", "dev-key", "dev-key-1 ", "DEV-KEY-1"] {
        client.send(0x02, 4, &string(key));
        client.expect_nack(4, 401, "invalid API key");
    }
    client.send(0x02, 5, &string(KEY));
    client.expect(0x05, 5, &[0; 8]);
    client.send(0x02, 6, &string(KEY));
    client.expect_nack(6, 400, "already authenticated");
    client.expect_silence();
}

#[test]
fn b07_nothing_but_hello_and_auth_before_login() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    for greeted in [false, true] {
        for frame_type in 0x03..=0x09 {
            // The gate comes before a look at the payload.
            for payload in [&b""[..], &1u64.to_be_bytes(), &[0, 1, b'a', 1]] {
                client.send(frame_type, 7, payload);
                client.expect_nack(7, 401, "unauthenticated");
            }
        }
        if !greeted {
            client.send(0x01, 1, &[0, 1]);
            client.expect(0x05, 1, &[0; 8]);
        }
    }
    client.send(0x02, 2, &string(KEY));
    client.expect(0x05, 2, &[0; 8]);
    client.expect_silence();
}

#[test]
fn b08_only_listed_keys_log_in() {
    let broker = Broker::start(&[("BLIPMQ_ALLOWED_API_KEYS", " one ,, two ")]);
    for (key, ok) in [("one", true), ("two", true), ("", false), (" one ", false), ("three", false)] {
        let mut client = broker.connect();
        client.send(0x01, 1, &[0, 1]);
        client.expect(0x05, 1, &[0; 8]);
        client.send(0x02, 2, &string(key));
        if ok {
            client.expect(0x05, 2, &[0; 8]);
        } else {
            client.expect_nack(2, 401, "invalid API key");
        }
    }
}

#[test]
fn b08_without_keys_only_the_generated_one_logs_in() {
    let broker = Broker::start(&[("BLIPMQ_ALLOWED_API_KEYS", "")]);
    let mut client = broker.connect();
    client.send(0x01, 1, &[0, 1]);
    client.expect(0x05, 1, &[0; 8]);
    for key in ["", KEY] {
        client.send(0x02, 2, &string(key));
        client.expect_nack(2, 401, "invalid API key");
    }
    let key = fs::read_to_string(broker.store().join("dev.key")).expect("a generated key");
    client.send(0x02, 3, &string(key.trim()));
    client.expect(0x05, 3, &[0; 8]);
}

#[test]
fn b09_every_subscribe_is_a_queue_of_its_own() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    let first = client.subscribe("b09", 1);
    let second = client.subscribe("b09", 1);
    assert!(second > first, "ids count up");
    client.send(0x04, 9, &[&string("b09")[..], &[0], b"trailing bytes"].concat());
    let third = u64::from_be_bytes(client.recv().payload.try_into().expect("an id"));
    assert!(third > second);
    client.publish("b09", 1, b"m");
    assert_eq!(client.poll(first, "b09"), delivery(1, 1, b"m"));
    assert_eq!(client.poll(second, "b09"), delivery(1, 1, b"m"));
    assert_eq!(client.poll(third, "b09"), delivery(0, 0, b"m"));
}

#[test]
fn b10_subscribe_errors_in_order() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    for (payload, text) in [
        (&b""[..], "invalid SUBSCRIBE payload"),
        (b"\0", "invalid SUBSCRIBE payload"),
        (b"\0\0", "invalid SUBSCRIBE payload"), // no QoS: layout before topic
        (b"\0\x01a", "invalid SUBSCRIBE payload"),
        (b"\0\x02a\x01", "invalid SUBSCRIBE payload"),
        (b"\0\x01\xff\x01", "invalid SUBSCRIBE payload"),
        (b"\0\x01\xff\x07", "invalid SUBSCRIBE payload"),
        (b"\0\0\x01", "empty topic"),
        (b"\0\0\x07", "empty topic"), // topic before QoS
        (b"\0\x01a\x02", "invalid QoS value"),
        (b"\0\x01a\xff", "invalid QoS value"),
    ] {
        client.send(0x04, 10, payload);
        client.expect_nack(10, 400, text);
    }
    client.expect_silence();
}

#[test]
fn b11_publish_is_silent_unless_it_is_wrong() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    client.publish("b11", 0, b"");
    client.publish("b11", 1, b"");
    client.expect_silence();
    for (payload, text) in [
        (&b""[..], "invalid PUBLISH payload"),
        (b"\x01", "invalid PUBLISH payload"),
        (b"\x01\0", "invalid PUBLISH payload"),
        (b"\x01\0\x02a", "invalid PUBLISH payload"),
        (b"\x01\0\x01\xff", "invalid PUBLISH payload"),
        (b"\x07\0\x02a", "invalid PUBLISH payload"), // layout before QoS
        (b"\x01\0\0", "empty topic"),
        (b"\x07\0\0message", "empty topic"), // topic before QoS
        (b"\x02\0\x01a", "invalid QoS value"),
    ] {
        client.send(0x03, 11, payload);
        client.expect_nack(11, 400, text);
    }
    client.expect_silence();
}

#[test]
fn b12_a_publish_that_cannot_be_kept_is_refused_with_a_reason() {
    let broker = Broker::start(&[
        ("BLIPMQ_DELIVERY_BACKLOG_MESSAGES", "10"),
        ("BLIPMQ_DELIVERY_OVERFLOW", "reject"),
        ("BLIPMQ_RETRY_BACKOFF_MS", "600000"),
    ]);
    let mut client = broker.v1();
    let sub = client.subscribe("b12", 1);
    let refused = |client: &mut support::Client, message: &[u8]| {
        let cid = client.publish("b12", 1, message);
        let nack = client.recv();
        assert_eq!((nack.frame_type, nack.cid), (0x06, cid), "{nack:?}");
        let text = String::from_utf8_lossy(&nack.payload[4..]).into_owned();
        assert_eq!(nack.payload[..2], 500u16.to_be_bytes(), "{text}");
        let reason = text.strip_prefix("durable publish failed: ").expect(&text);
        assert!(!reason.is_empty());
    };
    for i in 0..10u8 {
        client.publish("b12", 1, &[i]);
    }
    refused(&mut client, b"one too many");
    // Nothing that was accepted is lost, and nothing that was refused arrives.
    for i in 0..10u8 {
        assert_eq!(client.poll(sub, "b12"), delivery(u64::from(i) + 1, 1, &[i]));
    }
    for tag in 1..=10 {
        client.ack(sub, tag);
    }
    client.expect_silence();
    client.publish("b12", 1, b"room again");
    assert_eq!(client.poll(sub, "b12").message, b"room again");
}

#[test]
fn b13_delivery_has_the_lower_qos() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    for subscribed in [0, 1] {
        for published in [0, 1] {
            let topic = format!("b13-{subscribed}-{published}");
            let sub = client.subscribe(&topic, subscribed);
            client.publish(&topic, published, b"m");
            assert_eq!(client.poll(sub, &topic).qos, subscribed.min(published), "{topic}");
        }
    }
}

#[test]
fn b14_poll_errors_and_silences() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    for len in [0, 7, 9, 16] {
        client.send(0x09, 14, &vec![1; len]);
        client.expect_nack(14, 400, "invalid POLL payload");
    }
    client.send(0x09, 14, &[0; 8]);
    client.expect_nack(14, 400, "subscription_id must be non-zero");
    client.poll_later(u64::MAX);
    client.expect_silence();

    // Another connection's subscription is as good as unknown.
    let sub = client.subscribe("b14", 1);
    client.publish("b14", 1, b"mine");
    let mut other = broker.v1();
    other.poll_later(sub);
    other.expect_silence();
    assert_eq!(client.poll(sub, "b14"), delivery(1, 1, b"mine"));

    // An empty queue: nothing now; the newest POLL gets what comes.
    let empty = client.subscribe("b14-empty", 0);
    client.poll_later(empty);
    let newest = client.poll_later(empty);
    client.expect_silence();
    client.publish("b14-empty", 0, b"late");
    assert_eq!(client.recv_delivery("b14-empty"), delivery(newest, 0, b"late"));
    client.publish("b14-empty", 0, b"unasked");
    client.expect_silence();
}

#[test]
fn b15_b16_a_delivery_is_named_by_its_tag_or_by_the_poll() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    let sub = client.subscribe("b16", 1);
    for (qos, message) in [(1, b"a"), (0, b"b"), (1, b"c")] {
        client.publish("b16", qos, message);
    }
    assert_eq!(client.poll(sub, "b16"), delivery(1, 1, b"a"));
    let poll = client.poll_later(sub);
    assert_eq!(client.recv_delivery("b16"), delivery(poll, 0, b"b"));
    assert_eq!(client.poll(sub, "b16"), delivery(3, 1, b"c"));
    // Each subscription counts for itself.
    let other = client.subscribe("b16", 1);
    client.publish("b16", 1, b"d");
    assert_eq!(client.poll(other, "b16"), delivery(1, 1, b"d"));
    assert_eq!(client.poll(sub, "b16"), delivery(4, 1, b"d"));
}

#[test]
fn b17_ack_errors() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    for len in [0, 7, 9] {
        client.send(0x05, 17, &vec![1; len]);
        client.expect_nack(17, 400, "invalid ACK payload");
    }
    client.send(0x05, 17, &[0; 8]);
    client.expect_nack(17, 400, "subscription_id must be non-zero");
    let unknown = "unknown subscription or delivery tag";
    client.ack(u64::MAX, 1);
    client.expect_nack(1, 404, unknown);

    let sub = client.subscribe("b17", 1);
    client.publish("b17", 1, b"m");
    client.ack(sub, 1);
    client.expect_nack(1, 404, unknown); // not delivered yet
    assert_eq!(client.poll(sub, "b17"), delivery(1, 1, b"m"));
    client.ack(sub, 2);
    client.expect_nack(2, 404, unknown);
    client.ack(sub, 0);
    client.expect_nack(0, 404, unknown);
    let mut other = broker.v1();
    other.ack(sub, 1);
    other.expect_nack(1, 404, unknown);
    client.ack(sub, 1);
    client.expect_silence();
    client.ack(sub, 1);
    client.expect_nack(1, 404, unknown);
}

#[test]
fn b18_b19_ping_is_answered_pong_and_nack_are_not() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    client.send(0x07, 18, b"xyz");
    client.expect(0x08, 18, b"");
    client.send(0x07, u64::MAX, b"");
    client.expect(0x08, u64::MAX, b"");
    client.send(0x08, 19, b"");
    client.send(0x06, 19, b"");
    client.send(0x06, 19, &[&400u16.to_be_bytes()[..], &string("text")].concat());
    client.expect_silence();
}

#[test]
fn b20_topics_are_exact_names() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    client.publish("b20", 1, b"before anybody subscribed");
    let topics = ["b20", "B20", "b20 ", "b20/x", "b20/*", "b20/#", "b20\0", "b20-ü", &"l".repeat(65_535)];
    let subs: Vec<u64> = topics.iter().map(|topic| client.subscribe(topic, 0)).collect();
    for sub in &subs {
        client.poll_later(*sub);
    }
    client.expect_silence();
    for topic in topics {
        client.publish(topic, 0, topic.as_bytes());
        // Exactly one of the parked POLLs is answered.
        assert_eq!(client.recv_delivery(topic).message, topic.as_bytes());
        client.expect_silence();
    }
}

#[test]
fn b21_every_subscription_gets_a_copy() {
    let broker = Broker::shared();
    let mut clients: Vec<_> = (0..4).map(|_| broker.v1()).collect();
    let subs: Vec<u64> = clients.iter_mut().map(|client| client.subscribe("b21", 1)).collect();
    let mut publisher = broker.v1();
    for i in 0..10u8 {
        publisher.publish("b21", 1, &[i]);
    }
    for (client, sub) in clients.iter_mut().zip(subs) {
        for i in 0..10u8 {
            let got = client.poll(sub, "b21");
            assert_eq!(got, delivery(u64::from(i) + 1, 1, &[i]));
            client.ack(sub, got.tag);
        }
        client.expect_silence();
    }
}

#[test]
fn b22_first_deliveries_are_in_order() {
    let broker = Broker::shared();
    for qos in [0, 1] {
        let topic = format!("b22-{qos}");
        let mut consumer = broker.v1();
        let sub = consumer.subscribe(&topic, qos);
        let mut publisher = broker.v1();
        for i in 0..1000u32 {
            publisher.publish(&topic, qos, &i.to_be_bytes());
        }
        for i in 0..1000u32 {
            let got = consumer.poll(sub, &topic);
            assert_eq!(got.message, i.to_be_bytes());
            if qos == 1 {
                consumer.ack(sub, got.tag);
            }
        }
        consumer.expect_silence();
    }
}

#[test]
fn b23_an_expired_message_is_not_delivered() {
    let ttl = Duration::from_millis(300);
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_V1_TTL_MS", "300")]);
    let mut client = broker.v1();
    let sub = client.subscribe("b23", 1);
    client.publish("b23", 0, b"old");
    client.publish("b23", 1, b"old");
    client.expect_silence();
    // No synchronisation: the time itself is what is tested, and more of it does no harm.
    std::thread::sleep(3 * ttl);
    client.poll_later(sub);
    client.expect_silence();
    client.publish("b23", 1, b"new");
    assert_eq!(client.recv_delivery("b23"), delivery(3, 1, b"new"));
}

#[test]
fn b24_a_consumer_far_behind_loses_nothing() {
    let broker = Broker::shared();
    let mut client = broker.v1();
    let sub = client.subscribe("b24", 1);
    for i in 0..2000u32 {
        client.publish("b24", 1, &i.to_be_bytes());
    }
    for i in 0..2000u32 {
        let got = client.poll(sub, "b24");
        assert_eq!(got, delivery(u64::from(i) + 1, 1, &i.to_be_bytes()));
        client.ack(sub, got.tag);
    }
    client.poll_later(sub);
    client.expect_silence();
}

#[test]
fn b25_b26_a_delivery_is_repeated_until_it_is_a_dead_letter() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "20"), ("BLIPMQ_MAX_RETRIES", "3")]);
    let mut client = broker.v1();
    let sub = client.subscribe("b25", 1);
    let dead = client.subscribe("b25.dlq", 1);
    client.publish("b25", 1, b"m");
    for attempt in 1..=3 {
        assert_eq!(client.poll(sub, "b25"), delivery(1, 1, b"m"), "attempt {attempt}");
    }
    assert_eq!(client.poll(dead, "b25.dlq"), delivery(1, 1, b"m"));
    client.poll_later(sub);
    client.expect_silence();
}

#[test]
fn b33_what_was_not_acknowledged_comes_back_after_a_crash() {
    let mut broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "600000"), ("BLIPMQ_FSYNC_POLICY", "always")]);
    let mut client = broker.v1();
    let sub = client.subscribe("b33", 1);
    assert_eq!(sub, 1, "ids count from 1 per process");
    for i in 0..10u8 {
        client.publish("b33", 1, &[i]);
    }
    for i in 0..10u8 {
        assert_eq!(client.poll(sub, "b33").message, [i]);
    }
    broker.kill();
    broker.restart();
    let mut client = broker.v1();
    let sub = client.subscribe("b33", 1);
    assert_eq!(sub, 1, "ids count from 1 per process");
    for i in 0..10u8 {
        let got = client.poll(sub, "b33");
        assert_eq!((got.qos, got.message), (1, vec![i]));
        client.ack(sub, got.tag);
    }
    client.poll_later(sub);
    client.expect_silence();
}

fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in\n{text}")).trim().parse().expect("a number")
}

#[test]
fn b35_metrics() {
    const NAMES: [&str; 7] = [
        "topics",
        "subscribers",
        "messages_published_total",
        "messages_delivered_total",
        "messages_inflight",
        "wal_appends_total",
        "wal_bytes_total",
    ];
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
    let (status, text) = broker.http("GET", "/metrics");
    assert_eq!(status, 200);
    let places: Vec<_> = NAMES.map(|name| text.lines().position(|line| line.starts_with(&format!("{name} ")))).into();
    assert!(places.is_sorted() && places[0].is_some(), "{places:?} in\n{text}");
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let value = line.rsplit_once(' ').expect("name and value").1;
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    let before = NAMES.map(|name| metric(&text, name));

    let mut client = broker.v1();
    let sub = client.subscribe("b35", 1);
    for i in 0..20u8 {
        client.publish("b35", 1, &[i; 100]);
    }
    for _ in 0..5 {
        client.poll(sub, "b35");
    }
    eventually("the counters to move", || {
        let (_, text) = broker.http("GET", "/metrics");
        let now = NAMES.map(|name| metric(&text, name));
        let grown: Vec<f64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        let [topics, subscribers, published, delivered, inflight, appends, bytes] = grown[..] else { return None };
        let exact = (topics, subscribers, published, delivered, inflight) == (1.0, 1.0, 20.0, 5.0, 5.0);
        (exact && appends >= 20.0 && bytes >= 2000.0).then_some(())
    });

    assert_eq!(broker.http("POST", "/metrics").0, 200, "any method");
    let (status, body) = broker.http("GET", "/elsewhere");
    assert_eq!((status, body.trim()), (404, "not found"));
}

#[test]
fn b39_a_signal_ends_it_in_good_order() {
    for signal in ["TERM", "INT"] {
        let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", "none"), ("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
        let mut client = broker.v1();
        let sub = client.subscribe("b39", 1);
        client.publish("b39", 1, b"kept");
        assert_eq!(client.poll(sub, "b39").message, b"kept");
        drop(client);
        assert_eq!(broker.stop(signal).code(), Some(0), "SIG{signal}");
        broker.restart();
        let mut client = broker.v1();
        let sub = client.subscribe("b39", 1);
        assert_eq!(client.poll(sub, "b39").message, b"kept");
    }
}

#[test]
fn g21_two_brokers_share_neither_a_port_nor_a_store() {
    let broker = Broker::start(&[]);
    let store = broker.store();
    let taken = broker.port().to_string();
    let elsewhere = store.with_file_name("another-store");
    let try_start = |port: &str, store: &Path| {
        Command::new(env!("CARGO_BIN_EXE_blipmqd"))
            .env_clear()
            .env("BLIPMQ_PORT", port)
            .env("BLIPMQ_METRICS_PORT", "0")
            .env("BLIPMQ_ALLOWED_API_KEYS", KEY)
            .env("BLIPMQ_WAL_PATH", store)
            .output()
            .expect("blipmqd runs")
    };
    for output in [try_start(&taken, &elsewhere), try_start("0", &store)] {
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.code().is_some_and(|code| code != 0), "{said}");
        assert!(!said.is_empty());
    }
    broker.v1().expect_silence();
}

#[test]
fn v2_shares_the_port_and_the_topics() {
    let broker = Broker::shared();
    let mut old = broker.v1();
    let mut new = broker.v2();
    let old_sub = old.subscribe("both", 1);
    let new_sub = new.subscribe_v2("both", 1, 10, "");
    old.publish("both", 1, b"from v1");
    assert_eq!(new.recv_delivery_v2(new_sub), delivery(1, 1, b"from v1"));
    assert_eq!(broker.v2().publish_v2("both", 1, b"from v2"), (0, 2), "stored and synced");
    assert_eq!(new.recv_delivery_v2(new_sub), delivery(2, 1, b"from v2"));
    new.ack_v2(new_sub, 1, 2);
    assert_eq!(old.poll(old_sub, "both"), delivery(1, 1, b"from v1"));
    assert_eq!(old.poll(old_sub, "both"), delivery(2, 1, b"from v2"));
    old.ack(old_sub, 1);
    old.ack(old_sub, 2);
    old.expect_silence();

    let durable = new.subscribe_v2("both-durable", 1, 10, "name");
    drop(new);
    old.publish("both-durable", 1, b"while away");
    let mut again = broker.v2();
    let sub = again.subscribe_v2("both-durable", 1, 10, "name");
    assert_ne!(sub, durable, "a subscription number is never used again");
    assert_eq!(again.recv_delivery_v2(sub).message, b"while away");
}

/// v1 confirms neither publishes nor acknowledgements; a PONG behind them vouches for both, whenever the broker is killed.
#[test]
fn a_pong_vouches_for_publishes_and_acknowledgements() {
    for cores in ["1", "2"] {
        for policy in ["always", "every_n:64", "interval_ms:50", "none"] {
            let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy), ("BLIPMQ_SHARDS_COUNT", cores)]);
            let mut client = broker.v1();
            let sub = client.subscribe("vouched", 1);
            for n in 0..30u8 {
                client.publish("vouched", 1, &[n]);
            }
            for n in 0..10u8 {
                let delivery = client.poll(sub, "vouched");
                assert_eq!(delivery.message, [n]);
                client.ack(sub, delivery.tag);
            }
            client.expect_silence(); // PING and PONG
            broker.kill();
            broker.restart();
            let mut client = broker.v1();
            let sub = client.subscribe("vouched", 1);
            for n in 10..30u8 {
                let delivery = client.poll(sub, "vouched");
                assert_eq!(delivery.message, [n], "{policy}");
                client.ack(sub, delivery.tag);
            }
            client.poll_later(sub);
            client.expect_silence();
        }
    }
}
