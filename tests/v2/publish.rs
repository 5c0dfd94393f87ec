//! PUBLISH and what becomes of it: CONFIRM, its levels, duplicates; delay, priority, life; options; aliases.

use std::time::Duration;

use crate::client::{Got, Outcome, Publish, Subscribe, V2};
use support::{Broker, eventually};

#[test]
fn confirm_says_how_safe_it_is() {
    for (policy, levels) in
        [("always", &[2][..]), ("every_n:64", &[1, 2]), ("interval_ms:50", &[1, 2]), ("none", &[1, 2])]
    {
        let broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy)]);
        let mut client = V2::connect(&broker);
        for topic in client.near_and_far("level") {
            let Outcome::Stored { level, position } = client.confirm(&Publish::to(&topic, "m")) else { panic!() };
            assert!(levels.contains(&level), "{policy}: {level}");
            let Outcome::Stored { position: later, .. } = client.confirm(&Publish::to(&topic, "m")) else { panic!() };
            assert!(position > 0 && later > position, "{policy}: the log grows");
            let memory = Outcome::Stored { level: 0, position: 0 };
            assert_eq!(client.confirm(&Publish::to(&topic, "m").qos(0)), memory);
            // The same with a subscriber there.
            client.sub(&Subscribe::to(&topic));
            assert_eq!(client.confirm(&Publish::to(&topic, "m").qos(0)), memory);
            client.store(&Publish::to(&topic, "m"));
        }
        assert!(client.rest().iter().all(|got| matches!(got, Got::Deliver(_))));
    }
}

#[test]
fn without_the_flag_success_is_silent() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("silent") {
        let sub = client.sub(&Subscribe::to(&topic));
        for qos in [0, 1] {
            client.publish(&Publish::to(&topic, "m").qos(qos).unconfirmed());
            assert_eq!(client.delivery(sub).qos, qos);
        }
        client.expect_nothing(sub);
    }
    assert_eq!(client.rest(), []);
}

#[test]
fn any_number_may_be_under_way_and_each_is_confirmed_once() {
    const COUNT: usize = 20_000;
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let topics: Vec<String> = (0..16).map(|n| format!("pipeline-{n}")).collect();
    let first = client.next_cid() + 1;
    let mut frames = Vec::new();
    for n in 0..COUNT {
        let publish = Publish::to(&topics[n % topics.len()], [b'x'; 100]);
        frames.extend(support::frame(0x13, first + n as u64, &publish.payload()));
    }
    client.send_raw(&frames);
    let (mut seen, mut in_frames) = (vec![false; COUNT], 0);
    while seen.iter().any(|seen| !seen) {
        let frame = client.recv();
        assert_eq!((frame.frame_type, frame.cid), (0x14, 0));
        in_frames += 1;
        let (entries, rest) = frame.payload.as_chunks::<18>();
        assert_eq!(rest, b"", "only stored ones");
        for entry in entries {
            let cid = u64::from_be_bytes(entry[..8].try_into().expect("eight"));
            assert_eq!(entry[8], 0, "stored");
            let at = (cid - first) as usize;
            assert!(!std::mem::replace(&mut seen[at], true), "{cid} is confirmed twice");
        }
    }
    assert!(in_frames < COUNT, "confirms share frames");
}

#[test]
fn a_message_id_is_stored_once() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("ids") {
        let sub = client.sub(&Subscribe::to(&topic));
        let publish = Publish::to(&topic, "first").id("order-17");
        let Outcome::Stored { position, .. } = client.confirm(&publish) else { panic!("a new one") };
        for again in [publish, Publish::to(&topic, "other text, same id").id("order-17")] {
            match client.confirm(&again) {
                Outcome::Duplicate { level: 2, position: at } => assert!(at >= position),
                other => panic!("{other:?}"),
            }
        }
        // The longest id there may be, and one that only begins the same.
        for id in ["x".repeat(64), "x".repeat(63)] {
            client.store(&Publish::to(&topic, "long").id(&id));
        }
        let silent = client.publish(&Publish::to(&topic, "first").id("order-17").unconfirmed());
        let texts: Vec<String> = (0..3).map(|_| client.delivery(sub).text().to_owned()).collect();
        assert_eq!(texts, ["first", "long", "long"]);
        client.expect_nothing(sub);
        assert_eq!(client.rest(), [], "nor an error for {silent}");
        // Another topic knows nothing of it.
        client.store(&Publish::to(&format!("{topic}/other"), "m").id("order-17"));
        // A QoS0 message has an identity, too, as long as somebody listens.
        client.store(&Publish::to(&topic, "volatile").qos(0).id("v"));
        assert_eq!(client.delivery(sub).text(), "volatile");
        let outcome = client.confirm(&Publish::to(&topic, "volatile").qos(0).id("v"));
        assert_eq!(outcome, Outcome::Duplicate { level: 0, position: 0 });
    }
}

#[test]
fn a_message_sent_twice_in_one_go_is_stored_once() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("twins") {
        let sub = client.sub(&Subscribe::to(&topic));
        let twins = [0; 5].map(|_| client.publish(&Publish::to(&topic, "m").id("twin")));
        let stored = twins.map(|cid| matches!(client.outcome(cid), Outcome::Stored { .. }));
        assert_eq!(stored, [true, false, false, false, false]);
        client.delivery(sub);
        client.expect_nothing(sub);
    }
}

#[test]
fn identities_are_remembered_over_a_crash_under_every_policy() {
    for policy in ["always", "every_n:64", "interval_ms:50", "none"] {
        let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy)]);
        let mut client = V2::connect(&broker);
        let topics = client.near_and_far("memory");
        let stored = [1, 2, 3, 7, 9];
        for topic in &topics {
            client.sub(&Subscribe::to(topic).durable("d"));
            client.store(&Publish::to(topic, "id").id("once"));
            for sequence in stored {
                client.store(&Publish::to(topic, sequence.to_string()).sequence(5, sequence));
            }
        }
        // Once right away, once from a checkpoint, once more from that alone.
        for wait_for_checkpoint in [false, true, false] {
            broker.kill();
            broker.restart();
            let mut client = V2::connect(&broker);
            for topic in &topics {
                let outcome = client.confirm(&Publish::to(topic, "id").id("once"));
                assert!(matches!(outcome, Outcome::Duplicate { .. }), "{policy}: {outcome:?}");
                for sequence in stored {
                    let outcome = client.confirm(&Publish::to(topic, "again").sequence(5, sequence));
                    assert!(matches!(outcome, Outcome::Duplicate { .. }), "{policy}: {sequence} {outcome:?}");
                }
            }
            if wait_for_checkpoint {
                // Longer than the interval between two of them; that one was made is not needed for the test to be right.
                std::thread::sleep(Duration::from_millis(1500));
            }
        }
        // Gaps may be filled, by another publisher anything.
        let mut client = V2::connect(&broker);
        for topic in &topics {
            let subscribed = client.subscribe(&Subscribe::to(topic).durable("d"));
            assert_eq!((subscribed.resumed, subscribed.backlog), (true, 6), "{policy}");
            for sequence in [8, 4, 6, 5, 10] {
                client.store(&Publish::to(topic, sequence.to_string()).sequence(5, sequence));
            }
            client.store(&Publish::to(topic, "6/1").sequence(6, 1));
            let expected = ["id", "1", "2", "3", "7", "9", "8", "4", "6", "5", "10", "6/1"];
            for text in expected {
                assert_eq!(client.delivery(subscribed.sub).text(), text, "{policy}");
            }
            client.expect_nothing(subscribed.sub);
        }
    }
}

#[test]
fn a_sequence_that_was_refused_may_come_again() {
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_BACKLOG_MESSAGES", "2")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("refused") {
        let sub = client.sub(&Subscribe::to(&topic).credit(1));
        client.store(&Publish::to(&topic, "1").sequence(1, 1));
        client.store(&Publish::to(&topic, "2").sequence(1, 2));
        let third = Publish::to(&topic, "3").sequence(1, 3);
        match client.confirm(&third) {
            Outcome::Rejected { code: 507, text } => assert!(text.contains("backlog"), "{text}"),
            other => panic!("{other:?}"),
        }
        let cid = client.publish(&third.clone().unconfirmed());
        assert_eq!(client.error(cid).0, 507);
        let first = client.delivery(sub);
        client.ack(&first);
        client.store(&third);
        assert!(matches!(client.confirm(&third), Outcome::Duplicate { .. }));
    }
}

#[test]
fn options_travel_in_order_and_unknown_ones_do_not() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("options") {
        let sub = client.sub(&Subscribe::to(&topic));
        let all = Publish::to(&topic, "hi")
            .header("kind", b"new")
            .option(99, b"dropped")
            .ttl(60_000)
            .id("order-17")
            .header("kind", b"\xff\0 any bytes")
            .reply_to("replies")
            .option(99, b"dropped")
            .header("empty", b"")
            .priority(9);
        for (qos, id) in [(1, "order-17"), (0, "order-18")] {
            let publish = match qos {
                1 => all.clone(),
                _ => Publish::to(&topic, "hi")
                    .qos(0)
                    .header("kind", b"new")
                    .header("kind", b"\xff\0 any bytes")
                    .id(id)
                    .reply_to("replies")
                    .priority(9)
                    .header("empty", b""),
            };
            client.store(&publish);
            let delivered = client.delivery(sub);
            assert_eq!((delivered.qos, delivered.text()), (qos, "hi"));
            let headers: Vec<_> =
                delivered.options.iter().filter(|(tag, _)| *tag == 6).map(|(_, v)| v.clone()).collect();
            assert_eq!(headers, [&b"\0\x04kindnew"[..], b"\0\x04kind\xff\0 any bytes", b"\0\x05empty"]);
            let mut others: Vec<_> = delivered.options.iter().filter(|(tag, _)| *tag != 6).cloned().collect();
            others.sort();
            assert_eq!(others, [(2, id.into()), (4, vec![9]), (7, b"replies".to_vec())]);
        }
        // As many bytes of options as there may be.
        let most = Publish::to(&topic, "m").option(6, &[&[0, 1, b'k'][..], &[7; 32_762]].concat());
        client.store(&most);
        assert_eq!(client.delivery(sub).options[0].1.len(), 32_765);
    }
}

#[test]
fn the_time_of_the_publish_is_told() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let sub = client.sub(&Subscribe::to("time"));
    let wall = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis();
    let before = wall() as u64;
    for qos in [0, 1] {
        client.store(&Publish::to("time", "m").qos(qos));
        let published = client.delivery(sub).published;
        // The broker's clock never runs backwards, so it may be a little ahead of this one.
        assert!((before.saturating_sub(1000)..=wall() as u64 + 1000).contains(&published), "{published}");
    }
}

#[test]
fn an_expired_message_is_not_delivered_and_is_counted() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("ttl") {
        let before = crate::ledger::Ledger::read(&broker).lost("expired");
        let sub = client.sub(&Subscribe::to(&topic).credit(1).durable("d"));
        client.store(&Publish::to(&topic, "blocks the credit"));
        let blocker = client.delivery(sub);
        client.store(&Publish::to(&topic, "short 1").ttl(1));
        client.store(&Publish::to(&topic, "short 0").ttl(1).qos(0));
        client.store(&Publish::to(&topic, "long").ttl(600_000));
        client.store(&Publish::to(&topic, "for ever").ttl(0));
        // No synchronisation: the time itself is what is tested, and more of it does no harm.
        std::thread::sleep(Duration::from_millis(20));
        client.ack(&blocker);
        for text in ["long", "for ever"] {
            let delivered = client.delivery(sub);
            assert_eq!(delivered.text(), text);
            client.ack(&delivered);
        }
        client.expect_nothing(sub);
        eventually("both to be counted as expired", || {
            let ledger = crate::ledger::Ledger::read(&broker);
            (ledger.lost("expired") == before + 2).then_some(())
        });
    }
    crate::ledger::Ledger::expect_balance(&broker);
}

#[test]
fn what_nobody_asks_for_expires_by_itself_and_over_a_restart() {
    let mut broker = Broker::start(&[("BLIPMQ_DELIVERY_TTL_MS", "300")]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("ttl-alone");
    for topic in &topics {
        client.sub(&Subscribe::to(topic).durable("d"));
    }
    drop(client);
    let mut client = V2::connect(&broker);
    for topic in &topics {
        client.store_all(topic, &["a", "b"]);
        client.store(&Publish::to(topic, "stays").ttl(600_000));
    }
    eventually("four of six to expire", || {
        let ledger = crate::ledger::Ledger::read(&broker);
        (ledger.lost("expired") == 4 && ledger.sum("queue_waiting") == 2).then_some(())
    });
    for topic in &topics {
        client.store_all(topic, &["c", "d"]);
    }
    broker.kill();
    std::thread::sleep(Duration::from_millis(400)); // the broker being down included
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        assert_eq!(client.delivery(sub).text(), "stays");
        client.expect_nothing(sub);
    }
    let ledger = crate::ledger::Ledger::expect_balance(&broker);
    assert_eq!(ledger.sum("queue_waiting"), 2);
}

#[test]
fn a_delayed_message_is_confirmed_at_once_and_delivered_later() {
    let mut broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("delay");
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        client.store(&Publish::to(topic, "after 600").delay(600));
        client.store(&Publish::to(topic, "after 300").delay(300));
        client.store(&Publish::to(topic, "urgent, after 450").delay(450).priority(5));
        client.store(&Publish::to(topic, "at once"));
        for text in ["at once", "after 300", "urgent, after 450", "after 600"] {
            let delivered = client.delivery(sub);
            assert_eq!((delivered.text(), delivered.attempt, delivered.redelivered), (text, 1, false));
            client.ack(&delivered);
        }
        client.store(&Publish::to(topic, "much later").delay(600_000));
        client.store(&Publish::to(topic, "soon").delay(1000));
        client.detach(sub);
    }
    // A delay goes on over a restart.
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let subscribed = client.subscribe(&Subscribe::to(topic).durable("d"));
        assert_eq!(subscribed.backlog, 2);
        assert_eq!(client.delivery(subscribed.sub).text(), "soon");
        client.expect_nothing(subscribed.sub);
    }
}

#[test]
fn priority_orders_what_waits() {
    let mut broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("priority");
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).credit(1).durable("d"));
        client.store_all(topic, &["blocker"]);
        for (n, priority) in [0, 9, 5, 0, 5, 9, 1].into_iter().enumerate() {
            client.store(&Publish::to(topic, format!("{priority}-{n}")).priority(priority));
        }
        let mut delivered = client.delivery(sub);
        for text in ["9-1", "9-5", "5-2"] {
            client.ack(&delivered);
            delivered = client.delivery(sub);
            assert_eq!(delivered.text(), text);
        }
    }
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).credit(100).durable("d"));
        let texts: Vec<_> = (0..5).map(|_| client.delivery(sub).text().to_owned()).collect();
        assert_eq!(texts, ["5-2", "5-4", "1-6", "0-0", "0-3"]);
    }
}

#[test]
fn aliases_stand_for_names() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("alias");
    let subs = topics.each_ref().map(|topic| client.sub(&Subscribe::to(topic)));
    let unknown = Outcome::Rejected { code: 404, text: "unknown topic alias".to_owned() };
    assert_eq!(client.confirm(&Publish::alias(7, "m")), unknown);
    let cid = client.publish(&Publish::alias(7, "m").unconfirmed());
    assert_eq!(client.error(cid).0, 404);
    let cid = client.publish(&Publish::alias(7, "m").qos(0).unconfirmed());
    assert_eq!(client.error(cid).0, 404);
    for (topic, sub) in topics.iter().zip(subs) {
        // May be used at once, and given again.
        let cid = client.alias(7, topic);
        let publish = client.publish(&Publish::alias(7, "by alias").id("i").header("k", b"v"));
        assert!(matches!(client.outcome(publish), Outcome::Stored { .. }));
        let delivered = client.delivery(sub);
        assert_eq!((delivered.text(), delivered.options.len()), ("by alias", 2));
        let owner = client.want(|got| match got {
            Got::Aliased { cid: of, alias: 7, core } if *of == cid => Some(*core),
            _ => None,
        });
        assert_eq!(owner, client.owner(topic));
    }
    // Only on the connection that gave it.
    let mut other = V2::connect(&broker);
    assert_eq!(other.confirm(&Publish::alias(7, "m")), unknown);

    // 1024 of them; one of those may be given again, one more may not be given.
    for alias in 0..1024 {
        other.alias(alias, "many");
    }
    let cid = other.alias(1024, "one too many");
    assert_eq!(other.error(cid).0, 429);
    assert_eq!(other.confirm(&Publish::alias(1024, "m")), unknown);
    other.alias(1023, "many");
    other.store(&Publish::alias(1023, "m"));
}
