//! Durable subscriptions: they outlive their consumers and the broker.

use crate::client::{Got, Publish, Subscribe, V2};
use support::Broker;

#[test]
fn a_durable_subscription_collects_while_nobody_is_there() {
    let mut broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("durable");
    for topic in &topics {
        let queue = Subscribe::to(topic).durable("workers");
        let first = client.subscribe(&queue);
        assert!(!first.resumed);
        client.store_all(topic, &["1", "2", "3"]);
        for text in ["1", "2", "3"] {
            assert_eq!(client.delivery(first.sub).text(), text);
        }
        let cid = client.ack_asked(first.sub, &[(2, 2)]);
        client.ok(cid);
        client.detach(first.sub);
        let cid = client.ack_asked(first.sub, &[(1, 1)]);
        assert_eq!(client.error(cid).0, 404, "not ours any more");
        client.store_all(topic, &["4"]);
        client.store(&Publish::to(topic, "volatile").qos(0));
        // The same name on another topic is another subscription.
        assert!(!client.subscribe(&Subscribe::to(&format!("{topic}/other")).durable("workers")).resumed);
    }
    for round in 0..2 {
        // The first time nobody said goodbye.
        if round == 0 {
            broker.kill()
        } else {
            assert!(broker.stop("TERM").success())
        }
        broker.restart();
        let mut client = V2::connect(&broker);
        for topic in &topics {
            let queue = Subscribe::to(topic).durable("workers");
            let back = client.subscribe(&queue);
            assert_eq!((back.resumed, back.backlog), (true, 3), "what QoS0 says is not kept");
            for (text, tag) in [("1", 1), ("3", 3), ("4", 4)] {
                let delivered = client.delivery(back.sub);
                assert_eq!((delivered.text(), delivered.tag, delivered.redelivered), (text, tag, true));
            }
            client.expect_nothing(back.sub);
            client.detach(back.sub);
        }
    }
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let queue = Subscribe::to(topic).durable("workers");
        let back = client.sub(&queue);
        let cid = client.ack_asked(back, &[(1, 100)]);
        // All three have been delivered when the third is here.
        let delivered: Vec<u64> = (0..3).map(|_| client.delivery(back).tag).collect();
        assert_eq!(delivered, [1, 3, 4]);
        client.want(|got| match got {
            Got::Ok { cid: of } | Got::Error { cid: of, .. } if *of == cid => Some(()),
            _ => None,
        });
        client.ack_silently(back, &[(1, 100)]);
        client.settle(back);
        // Numbers go on, and new messages are new.
        client.store_all(topic, &["5"]);
        let delivered = client.delivery(back);
        assert_eq!((delivered.text(), delivered.attempt, delivered.redelivered), ("5", 1, false));
        assert!(delivered.tag > 4);
    }
}

#[test]
fn an_ack_that_was_answered_survives_a_crash() {
    for policy in ["always", "every_n:64", "interval_ms:50", "none"] {
        let mut broker = Broker::start(&[("BLIPMQ_FSYNC_POLICY", policy)]);
        let mut client = V2::connect(&broker);
        let topics = client.near_and_far("acked");
        let subs = topics.each_ref().map(|topic| client.sub(&Subscribe::to(topic).durable("d").credit(1000)));
        for (topic, sub) in topics.iter().zip(subs) {
            for n in 0..100 {
                client.publish(&Publish::to(topic, n.to_string()).unconfirmed());
            }
            let last = (0..100).map(|_| client.delivery(sub).tag).last().expect("many");
            let cid = client.ack_asked(sub, &[(1, 49), (51, last)]);
            client.ok(cid);
        }
        broker.kill();
        broker.restart();
        let mut client = V2::connect(&broker);
        for topic in &topics {
            let back = client.subscribe(&Subscribe::to(topic).durable("d"));
            assert_eq!((back.resumed, back.backlog), (true, 1), "{policy}");
            assert_eq!(client.delivery(back.sub).text(), "49");
        }
    }
}

#[test]
fn a_durable_subscription_needs_qos1() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("needs-qos1") {
        let cid = client.ask(0x15, &Subscribe::to(&topic).qos0().durable("d").payload());
        assert_eq!(client.error(cid).0, 400);
    }
}

#[test]
fn deleting_ends_it_for_everybody() {
    let mut broker = Broker::start(&[]);
    let (mut one, mut two) = (V2::connect(&broker), V2::connect(&broker));
    let topics = one.near_and_far("delete");
    for topic in &topics {
        let queue = Subscribe::to(topic).durable("d").credit(2);
        let (mine, theirs, other) = (one.sub(&queue), two.sub(&queue), two.sub(&Subscribe::to(topic).durable("e")));
        one.store_all(topic, &["1", "2", "3", "4", "5", "6"]);
        one.delete(mine);
        let (code, text) = two.error(0);
        assert_eq!(code, 404);
        assert!(text.contains(&theirs.to_string()), "{text}");
        let cid = two.ack_asked(theirs, &[(1, u64::MAX)]);
        assert_eq!(two.error(cid).0, 404);
        // The neighbour is not touched.
        for n in 1..=6 {
            assert_eq!(two.delivery(other).text(), n.to_string());
        }
        // The name is free for a new one, which knows nothing of the old one's messages.
        let anew = one.subscribe(&queue);
        assert_eq!((anew.resumed, anew.backlog), (false, 0));
        assert_ne!(anew.sub, mine);
        one.delete(anew.sub);
    }
    crate::ledger::Ledger::expect_balance(&broker);
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        assert!(!client.subscribe(&Subscribe::to(topic).durable("d")).resumed);
        assert!(client.subscribe(&Subscribe::to(topic).durable("e")).resumed);
    }
}

#[test]
fn an_ephemeral_subscription_ends_with_unsubscribe_or_its_connection() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("ephemeral");
    for topic in &topics {
        for subscribe in [Subscribe::to(topic), Subscribe::to(topic).qos0()] {
            let sub = client.sub(&subscribe);
            client.detach(sub);
            let sub = client.sub(&subscribe);
            client.delete(sub);
            client.sub(&subscribe);
        }
    }
    assert_eq!(crate::ledger::Ledger::read(&broker).sum("subscribers"), 4);
    drop(client);
    support::eventually("the subscriptions to end", || {
        (crate::ledger::Ledger::read(&broker).sum("subscribers") == 0).then_some(())
    });
    crate::ledger::Ledger::expect_balance(&broker);
}

#[test]
fn an_idle_durable_subscription_is_deleted_if_so_configured() {
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_DURABLE_IDLE_TTL_MS", "100")]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("idle");
    for topic in &topics {
        let idle = client.sub(&Subscribe::to(topic).durable("idle"));
        client.sub(&Subscribe::to(topic).durable("in use"));
        client.store_all(topic, &["1", "2"]);
        client.detach(idle);
    }
    support::eventually("the idle ones to end", || {
        (crate::ledger::Ledger::read(&broker).sum("subscribers") == 2).then_some(())
    });
    for topic in &topics {
        assert!(client.subscribe(&Subscribe::to(topic).durable("in use")).resumed);
    }
    let ledger = crate::ledger::Ledger::expect_balance(&broker);
    assert_eq!(ledger.lost("purged"), 4);
}
