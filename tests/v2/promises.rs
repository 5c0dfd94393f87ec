//! Promises that the original broker made to v1 clients and did not keep (V1.md part 3, rows G), as far as they show from
//! outside; and both dialects on the same topics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::client::{Outcome, Publish, Reject, Subscribe, V2};
use crate::ledger::Ledger;
use support::{Broker, Delivery, KEY, eventually, frame, string};

fn delivery(tag: u64, message: &[u8]) -> Delivery {
    Delivery { tag, qos: 1, message: message.to_vec() }
}

#[test]
fn g01_g04_a_crash_brings_back_what_was_not_acknowledged_and_only_that() {
    for policy in ["always", "every_n:64", "interval_ms:50", "none"] {
        let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy), ("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
        let topics: Vec<String> = (0..6).map(|n| format!("g01-{n}")).collect();
        for topic in &topics {
            let mut client = broker.v1();
            let sub = client.subscribe(topic, 1);
            for i in 0..10u8 {
                client.publish(topic, 1, &[i]);
            }
            for i in 0..10u8 {
                let got = client.poll(sub, topic);
                assert_eq!(got.message, [i]);
                if i % 2 == 0 {
                    client.ack(sub, got.tag);
                }
            }
            // A second ACK is refused only after the first has been handled.
            client.expect_silence();
        }
        // An ACK of v1 has no answer. A confirmed publish on the same core comes behind it in the log.
        let mut witness = V2::connect(&broker);
        for topic in &topics {
            witness.store(&Publish::to(&format!("{topic}.dlq"), "same virtual shard, same log"));
        }
        broker.kill();
        broker.restart();
        for topic in &topics {
            let mut client = broker.v1();
            let sub = client.subscribe(topic, 1);
            for i in [1u8, 3, 5, 7, 9] {
                let got = client.poll(sub, topic);
                assert_eq!(got.message, [i], "{policy}");
                client.ack(sub, got.tag);
            }
            client.poll_later(sub);
            client.expect_silence();
        }
    }
}

#[test]
fn g05_the_log_shrinks_when_its_messages_are_done() {
    const MIB: u64 = 1 << 20;
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("g05");
    let subs = topics.each_ref().map(|topic| client.sub(&Subscribe::to(topic).durable("d")));
    for round in 0..480 {
        let (topic, sub) = (&topics[round % 2], subs[round % 2]);
        client.store(&Publish::to(topic, vec![7; MIB as usize]));
        let delivered = client.delivery(sub);
        client.ack(&delivered);
    }
    // 480 MiB went through segments of 32 MiB; each core keeps the one it writes and a few that are ready.
    eventually("old segments to go or to be used again", || {
        let size = du(&broker.store());
        (size <= 288 * MIB).then_some(())
    });
}

fn du(dir: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(dir).expect("the store").map(|entry| entry.expect("an entry"));
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => du(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0, // it has just gone
    });
    sizes.sum()
}

#[test]
fn g07_a_subscriber_far_behind_gets_everything() {
    const COUNT: u32 = 5000;
    let broker = Broker::shared();
    for n in 0..2 {
        let topic = format!("g07-{n}");
        let mut client = broker.v1();
        let sub = client.subscribe(&topic, 1);
        for i in 0..COUNT {
            client.publish(&topic, 1, &i.to_be_bytes());
        }
        for i in 0..COUNT {
            let got = client.poll(sub, &topic);
            assert_eq!(got, delivery(u64::from(i) + 1, &i.to_be_bytes()));
            client.ack(sub, got.tag);
        }
    }
}

#[test]
fn g09_a_burst_is_slowed_down_and_not_refused() {
    const COUNT: u32 = 20_000;
    let broker = Broker::shared();
    for n in 0..2 {
        let topic = format!("g09-{n}");
        let mut consumer = V2::connect(&broker);
        let sub = consumer.sub(&Subscribe::to(&topic).credit(65_535));
        let mut publisher = broker.v1();
        let burst: Vec<u8> = (0..COUNT)
            .flat_map(|i| frame(0x03, 1, &[&[1][..], &string(&topic), &i.to_be_bytes(), &[0; 250]].concat()))
            .collect();
        publisher.send_raw(&burst);
        for i in 0..COUNT {
            let delivered = consumer.delivery(sub);
            assert_eq!(delivered.message[..4], i.to_be_bytes(), "complete and in order");
        }
        publisher.expect_silence();
        consumer.ack_silently(sub, &[(1, u64::MAX)]);
        consumer.settle(sub);
    }
}

#[test]
fn g11_g14_what_was_tried_often_enough_is_a_dead_letter_and_all_is_counted() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "20"), ("BLIPMQ_MAX_RETRIES", "3")]);
    for n in 0..4u64 {
        let topic = format!("g11-{n}");
        let mut client = broker.v1();
        let sub = client.subscribe(&topic, 1);
        client.publish(&topic, 1, b"m");
        for _ in 0..3 {
            assert_eq!(client.poll(sub, &topic), delivery(1, b"m"));
        }
        client.poll_later(sub);
        // The dead letter waits for a v1 client, and for a v2 one.
        let mut new = V2::connect(&broker);
        let letter = eventually("the dead letter", || {
            let held = new.subscribe(&Subscribe::to(&format!("{topic}.dlq")).durable("dead-letters"));
            if !held.resumed {
                new.delete(held.sub);
                return None;
            }
            Some(new.delivery(held.sub))
        });
        assert_eq!(letter.header("blipmq-reason").as_deref(), Some("max-retries"));
        assert_eq!(letter.header("blipmq-attempts").as_deref(), Some("3"));
        let dead = client.subscribe(&format!("{topic}.dlq"), 1);
        assert_eq!(client.poll(dead, &format!("{topic}.dlq")).message, b"m");
        client.expect_silence();
        let ledger = Ledger::read(&broker);
        assert_eq!(ledger.lost("dead_lettered"), n + 1);
        assert_eq!(ledger.sum("published_total"), n + 1);
        assert!(ledger.sum("delivered_total") >= 4 * n + 4 && ledger.sum("redelivered_total") >= 2 * n + 2);
    }
    Ledger::expect_balance(&broker);
}

#[test]
fn g12_an_ack_after_the_timer_and_before_the_redelivery_counts() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "100"), ("BLIPMQ_MAX_RETRIES", "100")]);
    for n in 0..4 {
        let topic = format!("g12-{n}");
        let mut client = broker.v1();
        let sub = client.subscribe(&topic, 1);
        client.publish(&topic, 1, b"m");
        assert_eq!(client.poll(sub, &topic), delivery(1, b"m"));
        // No synchronisation: the timer is what is tested, and more time does no harm.
        std::thread::sleep(Duration::from_millis(200));
        client.ack(sub, 1);
        client.poll_later(sub);
        client.expect_silence();
    }
    Ledger::expect_balance(&broker);
}

#[test]
fn g13_a_retried_message_comes_before_newer_ones() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "100"), ("BLIPMQ_MAX_RETRIES", "100")]);
    for n in 0..4 {
        let topic = format!("g13-{n}");
        let mut client = broker.v1();
        let sub = client.subscribe(&topic, 1);
        client.publish(&topic, 1, b"old");
        client.publish(&topic, 1, b"new");
        assert_eq!(client.poll(sub, &topic), delivery(1, b"old"));
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(client.poll(sub, &topic), delivery(1, b"old"));
        assert_eq!(client.poll(sub, &topic), delivery(2, b"new"));
    }
}

#[test]
fn g16_connections_that_go_leave_nothing_behind() {
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_ORPHAN_QUEUE_TTL_MS", "0")]);
    for n in 0..50 {
        let mut old = broker.v1();
        old.subscribe(&format!("g16-{}", n % 4), 0);
        old.subscribe(&format!("g16-{}", n % 4), 1);
        let mut new = V2::connect(&broker);
        new.sub(&Subscribe::to(&format!("g16-{}", n % 4)));
    }
    eventually("all subscriptions to end", || {
        let ledger = Ledger::read(&broker);
        (ledger.sum("subscribers") == 0 && ledger.sum("connections") == 0).then_some(())
    });
}

#[test]
fn g16_a_v1_queue_waits_for_its_owner_and_not_for_ever() {
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_ORPHAN_QUEUE_TTL_MS", "1000")]);
    for n in 0..2 {
        let topic = format!("g16-orphan-{n}");
        let mut client = broker.v1();
        client.subscribe(&topic, 1);
        client.publish(&topic, 1, b"m");
        client.expect_silence();
        drop(client);
        eventually("the queue to be an orphan", || {
            let (_, subs) = broker.http("GET", "/subs");
            (!subs.contains(&format!("\"consumers\":1,\"core\":0,\"topic\":\"{topic}\""))).then_some(())
        });
        let mut client = broker.v1();
        let sub = client.subscribe(&topic, 1);
        assert_eq!(client.poll(sub, &topic).message, b"m");
    }
    eventually("the orphans to end", || (Ledger::read(&broker).sum("subscribers") == 0).then_some(()));
    let ledger = Ledger::expect_balance(&broker);
    assert_eq!(ledger.lost("purged"), 2);
}

#[test]
fn g17_a_subscription_belongs_to_its_connection() {
    let broker = Broker::shared();
    let mut owner = broker.v1();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("g17") {
        let sub = owner.subscribe(&topic, 1);
        owner.publish(&topic, 1, b"m");
        assert_eq!(owner.poll(sub, &topic), delivery(1, b"m"));
        let mut thief = broker.v1();
        thief.poll_later(sub);
        thief.ack(sub, 1);
        thief.expect_nack(1, 404, "unknown subscription or delivery tag");
        let cid = client.ack_asked(sub, &[(1, u64::MAX)]);
        assert_eq!(client.error(cid).0, 404);
        let cid = client.ask(0x1b, &[&sub.to_be_bytes()[..], &[1]].concat());
        assert_eq!(client.error(cid).0, 404);
        owner.ack(sub, 1);
        owner.expect_silence();
    }
}

#[test]
fn g19_sigterm_loses_nothing_under_any_policy() {
    for policy in ["every_n:64", "interval_ms:50", "none"] {
        let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy)]);
        let mut client = V2::connect(&broker);
        let topics = client.near_and_far("g19");
        for topic in &topics {
            let sub = client.sub(&Subscribe::to(topic).durable("d"));
            client.detach(sub);
            client.store_all(topic, &["1", "2", "3"]);
        }
        assert_eq!(broker.stop("TERM").code(), Some(0), "{policy}");
        broker.restart();
        let mut client = V2::connect(&broker);
        for topic in &topics {
            let back = client.subscribe(&Subscribe::to(topic).durable("d"));
            assert_eq!((back.resumed, back.backlog), (true, 3), "{policy}");
        }
    }
}

#[test]
fn g20_a_wrong_setting_is_reported() {
    for (name, value) in [("BLIPMQ_PORT", "no number"), ("BLIPMQ_FSYNC_POLICY", "allways")] {
        let output = Broker::check_config(&[(name, value)]);
        assert_eq!(output.status.code(), Some(78), "{name}");
        let said = [output.stdout, output.stderr].concat();
        assert!(String::from_utf8_lossy(&said).contains(name), "{}", String::from_utf8_lossy(&said));
    }
}

/// A client with Nagle's algorithm sends the second of two small writes only when the first is acknowledged by TCP. The
/// original's delayed ACKs made that 40 ms and more per message. The bound is a quarter of it: it tells the two apart on a
/// slow, busy machine, and says nothing about speed.
#[test]
fn g23_ack_and_poll_in_two_writes_do_not_wait_for_delayed_acks() {
    const COUNT: u32 = 200;
    let broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", "none"), ("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
    for n in 0..2 {
        let topic = format!("g23-{n}");
        let mut publisher = broker.v1();
        let mut socket = TcpStream::connect(("127.0.0.1", broker.port())).expect("the broker listens");
        socket.set_nodelay(false).expect("a socket");
        socket.set_read_timeout(Some(support::PATIENCE)).expect("a socket");
        let read = |socket: &mut TcpStream| {
            let mut len = [0; 4];
            socket.read_exact(&mut len).expect("a frame");
            let mut rest = vec![0; u32::from_be_bytes(len) as usize];
            socket.read_exact(&mut rest).expect("a frame");
            rest
        };
        for (frame_type, payload) in
            [(0x01, vec![0, 1]), (0x02, string(KEY)), (0x04, [&string(&topic)[..], &[1]].concat())]
        {
            socket.write_all(&frame(frame_type, 1, &payload)).expect("sent");
        }
        let sub: [u8; 8] = (0..3).map(|_| read(&mut socket)).last().expect("three")[9..].try_into().expect("an id");
        for _ in 0..COUNT {
            publisher.publish(&topic, 1, b"m");
        }
        publisher.expect_silence();
        socket.write_all(&frame(0x09, 2, &sub)).expect("sent");
        let began = Instant::now();
        for _ in 0..COUNT {
            let delivered = read(&mut socket);
            assert_eq!(delivered[0], 0x03);
            let tag = u64::from_be_bytes(delivered[1..9].try_into().expect("eight"));
            socket.write_all(&frame(0x05, tag, &sub)).expect("sent");
            socket.write_all(&frame(0x09, 3, &sub)).expect("sent");
        }
        let each = began.elapsed() / COUNT;
        assert!(each < Duration::from_millis(10), "{each:?} for each");
    }
}

#[test]
fn both_dialects_share_topics() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
    let mut new = V2::connect(&broker);
    for topic in new.near_and_far("both") {
        let mut old = broker.v1();
        let (strong, weak) = (old.subscribe(&topic, 1), old.subscribe(&topic, 0));
        let sub = new.sub(&Subscribe::to(&topic).durable("d"));
        old.publish(&topic, 1, b"from v1");
        assert_eq!(new.delivery(sub).text(), "from v1");
        new.store(&Publish::to(&topic, "from v2").header("k", b"v").priority(0).id("x"));
        new.store(&Publish::to(&topic, "urgent").priority(9));
        for text in ["from v1", "from v2", "urgent"] {
            assert_eq!(old.poll(weak, &topic).message, text.as_bytes());
        }
        // Priority is for whoever polls, too; headers are not for v1.
        for text in ["urgent", "from v1", "from v2"] {
            let got = old.poll(strong, &topic);
            assert_eq!(got.message, text.as_bytes());
            old.ack(strong, got.tag);
        }
        let got: Vec<String> = (0..2).map(|_| new.delivery(sub).text().to_owned()).collect();
        assert_eq!(got, ["from v2", "urgent"]);
        new.ack_silently(sub, &[(1, u64::MAX)]);

        // A v2 publisher's life and delay hold for a v1 consumer.
        new.store(&Publish::to(&topic, "expired").ttl(1));
        std::thread::sleep(Duration::from_millis(20));
        new.store(&Publish::to(&topic, "delayed").delay(300));
        new.store(&Publish::to(&topic, "now"));
        for text in ["now", "delayed"] {
            let got = old.poll(strong, &topic);
            assert_eq!(got.message, text.as_bytes());
            old.ack(strong, got.tag);
        }
        // The support client's own v2 half sees the same broker.
        let mut plain = broker.v2();
        let plain_sub = plain.subscribe_v2(&topic, 1, 10, "");
        assert_eq!(plain.publish_v2(&topic, 1, b"plain"), (0, 2));
        let got = plain.recv_delivery_v2(plain_sub);
        assert_eq!(got.message, b"plain");
        plain.ack_v2(plain_sub, got.tag, got.tag);
        // Rejecting is v2's: the letter is readable by v1.
        let letter = new.want(|got| match got {
            crate::client::Got::Deliver(d) if d.text() == "plain" => Some(d.clone()),
            _ => None,
        });
        new.reject(sub, Reject::DeadLetter, &[(letter.tag, letter.tag)]);
        new.settle(sub);
        let dead = old.subscribe(&format!("{topic}.dlq"), 1);
        assert_eq!(old.poll(dead, &format!("{topic}.dlq")).message, b"plain");
        assert!(matches!(new.confirm(&Publish::to(&topic, "m").id("x")), Outcome::Duplicate { .. }));
    }
    Ledger::expect_balance(&broker);
}
