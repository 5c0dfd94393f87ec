//! Logging in, staying alive, leaving; what happens to requests that are wrong.

use std::fs;

use crate::client::{Got, Outcome, Publish, Subscribe, V2};
use support::{Broker, KEY, frame, hex, string};

#[test]
fn welcome_says_who_is_there() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    client.send(0x01, 7, &[&[0, 2][..], &hex("0006 01 0003 617070")].concat());
    let welcome = client.recv();
    assert_eq!((welcome.frame_type, welcome.cid), (0x10, 7));
    let (head, mut options) = welcome.payload.split_at(8);
    assert_eq!((&head[..4], u16::from_be_bytes([head[6], head[7]])), (&[0, 2, 0, 2][..], options.len() as u16));
    assert!(head[5] < 2, "this core is one of two");
    let mut seen = Vec::new();
    while let [tag, high, low, rest @ ..] = options {
        let (value, rest) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        seen.push((*tag, value.to_vec()));
        options = rest;
    }
    let number = |n: u32| n.to_be_bytes().to_vec();
    let version = env!("CARGO_PKG_VERSION").as_bytes().to_vec();
    let features = 0x1fu64.to_be_bytes().to_vec();
    let expected = [
        (1, b"blipmq".to_vec()),
        (2, version),
        (3, number(16 << 20)),
        (4, number(65_535)),
        (5, features),
        (7, number(30_000)),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn a_core_may_have_a_port_of_its_own() {
    let broker = Broker::start(&[("BLIPMQ_SHARDS_SHARD_PORTS", "true")]);
    let mut client = broker.connect();
    client.send(0x01, 1, &[0, 2]);
    let payload = client.recv().payload;
    let at = payload.windows(3).position(|w| w == [6, 0, 4]).expect("the ports") + 3;
    for core in 0..2u16 {
        let port = u16::from_be_bytes([payload[at + 2 * usize::from(core)], payload[at + 1 + 2 * usize::from(core)]]);
        for _ in 0..4 {
            let mut client = support::Client::connect(port);
            client.send(0x01, 1, &[0, 2]);
            let welcome = client.recv();
            assert_eq!(welcome.payload[4..6], core.to_be_bytes());
        }
    }
}

#[test]
fn login_errors_leave_the_connection_as_it_was() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    // Until a HELLO succeeds the broker speaks v1.
    client.send(0x01, 1, &[0, 3]);
    client.expect_nack(1, 426, "unsupported protocol version");
    client.send(0x02, 2, &string(KEY));
    client.expect_nack(2, 400, "HELLO not performed");
    client.send(0x01, 3, &[0, 2]);
    assert_eq!(client.recv().frame_type, 0x10);

    let error = |code: u16, text: &str| [&code.to_be_bytes()[..], &string(text)].concat();
    for frame_type in [0x07, 0x13, 0x15, 0x18, 0x1d] {
        client.send(frame_type, 4, b"");
        client.expect(0x12, 4, &error(401, "unauthenticated"));
    }
    client.send(0x01, 5, &[0, 1]);
    client.expect(0x12, 5, &error(400, "HELLO already performed"));
    for key in ["", "dev-key", "dev-key-1 "] {
        client.send(0x02, 6, &string(key));
        client.expect(0x12, 6, &error(401, "invalid API key"));
    }
    for payload in [&b""[..], b"\0\x02a", b"\0\x01ab", b"\0\x01\xff"] {
        client.send(0x02, 7, payload);
        client.expect(0x12, 7, &error(400, "invalid AUTH payload"));
    }
    client.send(0x02, 8, &string(KEY));
    client.expect(0x11, 8, &[0, 0]);
    client.send(0x02, 9, &string(KEY));
    client.expect(0x12, 9, &error(409, "already authenticated"));
    client.expect_silence();
}

#[test]
fn everything_may_be_sent_in_one_go() {
    let broker = Broker::shared();
    let (topic, sub) = ("one-go", Subscribe::to("one-go"));
    let publishes = (10..30).map(|cid| frame(0x13, cid, &Publish::to(topic, "m").payload()));
    let login = [frame(0x01, 1, &[0, 2]), frame(0x02, 2, &string(KEY)), frame(0x15, 3, &sub.payload())];
    let all: Vec<u8> = login.into_iter().chain(publishes).flatten().collect();
    let mut client = broker.connect();
    client.send_raw(&all);
    let (mut confirmed, mut delivered) = (0, 0);
    assert_eq!(client.recv().frame_type, 0x10);
    client.expect(0x11, 2, &[0, 0]);
    while (confirmed, delivered) != (20, 20) {
        match client.recv() {
            frame if frame.frame_type == 0x14 => confirmed += frame.payload.len() / 18,
            frame if frame.frame_type == 0x17 => delivered += 1,
            frame => assert_eq!((frame.frame_type, frame.cid), (0x16, 3)),
        }
    }
}

#[test]
fn before_login_frames_are_short_and_time_is_limited() {
    let broker = Broker::start(&[("BLIPMQ_NET_AUTH_DEADLINE_MS", "300")]);
    for greeted in [false, true] {
        let mut client = broker.connect();
        if greeted {
            client.send(0x01, 1, &[0, 2]);
            client.recv();
        }
        // Length is judged before the frame has come.
        client.send_raw(&4097u32.to_be_bytes());
        if greeted {
            let frame = client.recv();
            assert_eq!((frame.frame_type, frame.cid, &frame.payload[..2]), (0x12, 0, &400u16.to_be_bytes()[..]));
        }
        client.expect_closed();

        // One that is just short enough is answered.
        let mut client = broker.connect();
        if greeted {
            client.send(0x01, 1, &[0, 2]);
            client.recv();
        }
        client.send(0x07, 9, &vec![0; 4096 - 9]);
        assert_eq!(client.recv().cid, 9);
        // Nobody who dawdles stays.
        client.expect_closed();
    }
    // Those who are in stay in, and may send more than 4096 bytes right behind their AUTH.
    let mut client = broker.connect();
    let big = frame(0x13, 3, &Publish::to("after-auth", [b'x'; 10_000]).payload());
    client.send_raw(&[frame(0x01, 1, &[0, 2]), frame(0x02, 2, &string(KEY)), big].concat());
    assert_eq!(client.recv().frame_type, 0x10);
    client.expect(0x11, 2, &[0, 0]);
    assert_eq!(client.recv().frame_type, 0x14);
    std::thread::sleep(std::time::Duration::from_millis(900)); // three times the deadline
    client.expect_silence();
}

#[test]
fn a_frame_longer_than_4096_bytes_behind_a_wrong_key_ends_the_connection() {
    let broker = Broker::shared();
    let mut client = broker.connect();
    let big = frame(0x13, 3, &Publish::to("never", [b'x'; 10_000]).payload());
    client.send_raw(&[frame(0x01, 1, &[0, 2]), frame(0x02, 2, &string("wrong")), big].concat());
    assert_eq!(client.recv().frame_type, 0x10);
    assert_eq!(client.recv().payload[..2], 401u16.to_be_bytes());
    let frame = client.recv();
    assert_eq!((frame.frame_type, frame.cid, &frame.payload[..2]), (0x12, 0, &400u16.to_be_bytes()[..]));
    client.expect_closed();
}

#[test]
fn ping_goes_both_ways() {
    let broker = Broker::start(&[("BLIPMQ_NET_KEEPALIVE_MS", "200")]);
    let mut client = V2::connect(&broker);
    let cid = client.ask(0x07, b"is ignored");
    assert_eq!(client.next(), Got::Pong { cid });
    // One who answers stays, for more pings than a silent one would get.
    for _ in 0..5 {
        let Got::Ping { cid } = client.next() else { panic!("expected a PING") };
        client.send(0x08, cid, b"");
    }
    // One who does not answer gets three of them.
    for _ in 0..3 {
        assert!(matches!(client.next(), Got::Ping { .. }));
    }
    client.expect_closed();

    // v1 clients are never pinged: this one is silent for longer than the other lived.
    let mut old = broker.v1();
    let mut young = V2::connect(&broker);
    for _ in 0..3 {
        assert!(matches!(young.next(), Got::Ping { .. }));
    }
    young.expect_closed();
    old.expect_silence();
}

#[test]
fn malformed_payloads_are_answered_and_the_connection_lives_on() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let cases: &[(u8, &str, u16, &str)] = &[
        (0x13, "", 400, "invalid PUBLISH payload"),
        (0x13, "00", 400, "invalid PUBLISH payload"),
        (0x13, "04 00 0001 61 0000", 400, "invalid PUBLISH payload"), // unknown flag
        (0x13, "00 00 0002 61", 400, "invalid PUBLISH payload"),
        (0x13, "00 00 0001 ff 0000", 400, "invalid PUBLISH payload"), // not UTF-8
        (0x13, "00 00 0001 61", 400, "invalid PUBLISH payload"),      // no options
        (0x13, "00 00 0001 61 0005 01", 400, "invalid PUBLISH payload"),
        (0x13, "00 00 0001 61 0004 02 0002 61", 400, "invalid PUBLISH payload"), // entry over the end
        (0x13, "00 07 0000 0000", 400, "empty topic"),
        (0x13, "00 02 0001 61 0000", 400, "invalid QoS value"),
        (0x13, "00 00 0001 61 0004 01 0001 61", 400, "invalid option value"),
        (0x13, "00 00 0001 61 0003 02 0000", 400, "invalid option value"), // empty message id
        (0x13, "00 00 0001 61 0004 04 0001 0a", 400, "priority must be 0 to 9"),
        (0x13, "00 00 0001 61 0008 04 0001 01 04 0001 01", 400, "option given twice"),
        (0x13, "00 00 0001 61 0004 06 0001 00", 400, "invalid option value"), // header without a key
        (0x13, "00 00 0001 61 0004 07 0001 ff", 400, "invalid option value"),
        (
            0x13,
            "00 00 0001 61 0017 02 0001 61 03 0010 00000000000000000000000000000000",
            400,
            "message id and publisher sequence exclude each other",
        ),
        (0x15, "", 400, "invalid SUBSCRIBE payload"),
        (0x15, "01 00000001 0001 61", 400, "invalid SUBSCRIBE payload"),
        (0x15, "01 00000001 0001 61 0000 00", 400, "invalid SUBSCRIBE payload"),
        (0x15, "07 00000000 0000 0000", 400, "empty topic"),
        (0x15, "02 00000000 0001 61 0000", 400, "invalid QoS value"),
        (0x15, "01 00000000 0001 61 0000", 400, "credit must be 1 to 65535"),
        (0x15, "01 00010000 0001 61 0000", 400, "credit must be 1 to 65535"),
        (0x15, "01 00000001 0001 61 0003 01 0000", 400, "invalid option value"),
        (0x15, "01 00000001 0001 61 0004 03 0001 02", 400, "invalid option value"),
        (0x18, "", 400, "invalid ACK payload"),
        (0x18, "0000000000000001 00", 400, "invalid ACK payload"),
        (0x18, "0000000000000001 02 00000000000000010000000000000001", 400, "invalid ACK payload"),
        (0x18, "0000000000000000 00 00000000000000010000000000000001", 400, "subscription_id must be non-zero"),
        (0x18, "0000000000000001 00 00000000000000000000000000000001", 400, "invalid range of delivery tags"),
        (0x18, "0000000000000001 00 00000000000000020000000000000001", 400, "invalid range of delivery tags"),
        (0x18, "0000000000000001 00 000000000000000200000000000001", 400, "invalid ACK payload"),
        (0x19, "0000000000000001 03 00000000 00000000000000010000000000000001", 400, "invalid REJECT payload"),
        (0x19, "0000000000000001 00 00000000", 400, "invalid REJECT payload"),
        (0x19, "00000000000f4240 00 00000000 00000000000000010000000000000001", 404, UNKNOWN),
        (0x1a, "0000000000000001", 400, "invalid CREDIT payload"),
        (0x1a, "0000000000000000 00000001", 400, "subscription_id must be non-zero"),
        (0x1a, "0000000000000001 00010000", 400, "credit must be 1 to 65535"),
        (0x1a, "00000000000f4240 00000001", 404, UNKNOWN),
        (0x1b, "0000000000000001", 400, "invalid UNSUBSCRIBE payload"),
        (0x1b, "0000000000000001 02", 400, "invalid UNSUBSCRIBE payload"),
        (0x1b, "00000000000f4240 00", 404, UNKNOWN),
        (0x1d, "00000001", 400, "invalid ALIAS payload"),
        (0x1d, "00000001 0000", 400, "empty topic"),
        (0x1d, "00000001 0001 61 00", 400, "invalid ALIAS payload"),
        (0x01, "0002", 400, "HELLO already performed"),
    ];
    for (frame_type, payload, code, text) in cases {
        let cid = client.ask(*frame_type, &hex(payload));
        assert_eq!(client.error(cid), (*code, (*text).to_owned()), "{frame_type:#x} {payload}");
    }
    // A PUBLISH that wants a confirm and cannot be read is an ERROR all the same.
    let cid = client.ask(0x13, &hex("01 02 0001 61 0000"));
    assert_eq!(client.error(cid).0, 400);
    // Options that are too long, ranges that are too many.
    let long = Publish::to("long", "m").option(200, &[0; 32_768]);
    let cid = client.publish(&long);
    assert_eq!(client.error(cid), (413, "options too long".to_owned()));
    let cid = client.ack_asked(1, &vec![(1, 1); 65_537]);
    assert_eq!(client.error(cid), (413, "too many ranges of delivery tags".to_owned()));
    client.expect_silence();
    assert_eq!(client.rest(), []);
}

const UNKNOWN: &str = "unknown subscription or delivery tag";

#[test]
fn lost_framing_is_told_and_ends_the_connection_after_the_frames_before_it() {
    let broker = Broker::shared();
    let over = ((16 << 20) + 1u32).to_be_bytes();
    let bad: [&[u8]; 7] = [
        &[0; 4],
        &[0, 0, 0, 8],
        &over,
        &frame(0x03, 1, b"v1's PUBLISH"),
        &frame(0x09, 1, &[0; 8]),
        &frame(0x11, 1, &[0, 0]), // what only the broker says
        &frame(0xff, 1, b""),
    ];
    for bytes in bad {
        let mut client = V2::connect(&broker);
        client.send_raw(&[&frame(0x07, 5, b""), bytes, &frame(0x07, 6, b"")].concat());
        client.expect(0x08, 5, b"");
        let error = client.recv();
        assert_eq!((error.frame_type, error.cid, &error.payload[..2]), (0x12, 0, &400u16.to_be_bytes()[..]));
        client.expect_closed();
    }
}

#[test]
fn frames_may_come_in_any_pieces() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let sub = client.sub(&Subscribe::to("pieces"));
    let bytes: Vec<u8> = (0..20u64)
        .flat_map(|cid| {
            frame(0x13, cid + 1, &Publish::to("pieces", format!("message {cid}")).id(&cid.to_string()).payload())
        })
        .collect();
    for size in [1, 2, 3, 7, 64] {
        let topic_once = client.sub(&Subscribe::to(&format!("pieces-{size}")));
        let again: Vec<u8> = bytes.windows(6).fold(Vec::new(), |_, _| bytes.clone());
        for piece in again.chunks(size) {
            client.send_raw(piece);
        }
        for cid in 1..=20 {
            let outcome = client.outcome(cid);
            match size {
                1 => assert!(matches!(outcome, Outcome::Stored { .. }), "{outcome:?}"),
                _ => assert!(matches!(outcome, Outcome::Duplicate { .. }), "{outcome:?}"),
            }
        }
        client.delete(topic_once);
    }
    for n in 0..20 {
        assert_eq!(client.delivery(sub).text(), format!("message {n}"));
    }
}

#[test]
fn keys_may_do_what_their_patterns_say() {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("keys-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let file = dir.join("keys.toml");
    let keys = "[[keys]]\nname = \"orders\"\nkey = \"orders-key\"\npublish = [\"orders.*\"]\nsubscribe = [\"orders.*\", \"prices\"]\n\
        [[keys]]\nname = \"mute\"\nkey = \"mute-key\"\npublish = [\"elsewhere\"]\n";
    fs::write(&file, keys).expect("a config file");
    let broker = Broker::start(&[("BLIPMQ_CONFIG", file.to_str().expect("a path"))]);
    fs::remove_dir_all(&dir).ok();

    let mut orders = V2::connect_as(&broker, "orders-key");
    let sub = orders.sub(&Subscribe::to("orders.new"));
    orders.store(&Publish::to("orders.new", "mine"));
    assert_eq!(orders.delivery(sub).text(), "mine");
    orders.sub(&Subscribe::to("prices"));
    let forbidden = |client: &mut V2, topic: &str, publish: bool, subscribe: bool| {
        if publish {
            let outcome = client.confirm(&Publish::to(topic, "m"));
            assert!(matches!(outcome, Outcome::Rejected { code: 403, .. }), "{topic}: {outcome:?}");
            for qos in [0, 1] {
                let cid = client.publish(&Publish::to(topic, "m").qos(qos).unconfirmed());
                assert_eq!(client.error(cid).0, 403, "{topic}");
            }
        }
        if subscribe {
            let cid = client.ask(0x15, &Subscribe::to(topic).payload());
            assert_eq!(client.error(cid).0, 403, "{topic}");
        }
    };
    forbidden(&mut orders, "prices", true, false);
    forbidden(&mut orders, "invoices", true, true);
    forbidden(&mut orders, "orders", true, true);
    // An alias gives no more rights than the name.
    orders.alias(1, "invoices");
    let outcome = orders.confirm(&Publish::alias(1, "m"));
    assert!(matches!(outcome, Outcome::Rejected { code: 403, .. }), "{outcome:?}");

    let mut mute = V2::connect_as(&broker, "mute-key");
    forbidden(&mut mute, "orders.new", true, true);
    // The key without restrictions may do all that.
    let mut all = V2::connect(&broker);
    all.store(&Publish::to("prices", "42"));
    all.sub(&Subscribe::to("invoices"));

    // v1 hears the same.
    let mut old = broker.connect();
    old.login_v1("mute-key");
    let cid = old.publish("orders.new", 1, b"m");
    let nack = old.recv();
    assert_eq!((nack.frame_type, nack.cid, &nack.payload[..2]), (0x06, cid, &403u16.to_be_bytes()[..]));
    old.send(0x04, 77, &[&string("orders.new")[..], &[1]].concat());
    let nack = old.recv();
    assert_eq!((nack.frame_type, nack.cid, &nack.payload[..2]), (0x06, 77, &403u16.to_be_bytes()[..]));
}

#[test]
fn goaway_comes_before_the_end_and_acknowledgements_still_count() {
    let mut broker = Broker::start(&[("BLIPMQ_NET_DRAIN_MS", "30000")]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("goaway");
    let subs = topics.each_ref().map(|topic| client.sub(&Subscribe::to(topic).durable("d")));
    for (topic, sub) in topics.iter().zip(subs) {
        client.store_all(topic, &["first", "second"]);
        assert_eq!(client.delivery(sub).text(), "first");
    }
    let seconds = subs.map(|sub| client.delivery(sub));
    // It ends when all that is in flight is acknowledged, hence from a thread of its own.
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| broker.stop("TERM"));
        let code = client.want(|got| match got {
            Got::GoAway { code, .. } => Some(*code),
            _ => None,
        });
        assert_eq!(code, 503);
        // Both cores refuse what is new; the other core may hear of it a moment later, so the near one is asked.
        for qos in [0, 1] {
            let outcome = client.confirm(&Publish::to(&topics[0], "late").qos(qos));
            assert!(matches!(outcome, Outcome::Rejected { code: 503, .. }), "{outcome:?}");
            let cid = client.publish(&Publish::to(&topics[0], "late").qos(qos).unconfirmed());
            assert_eq!(client.error(cid).0, 503);
        }
        for delivered in &seconds {
            client.ack(delivered);
        }
        for sub in subs {
            client.ack_silently(sub, &[(1, 1)]);
        }
        assert_eq!(stopping.join().expect("no panic").code(), Some(0));
    });
    client.expect_closed();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let subscribed = client.subscribe(&Subscribe::to(topic).durable("d"));
        assert!(subscribed.resumed);
        assert_eq!(subscribed.backlog, 0, "all was acknowledged in time");
    }
}
