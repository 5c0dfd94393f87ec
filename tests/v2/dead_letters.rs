//! Messages that failed too often, or were rejected for good.

use crate::client::{Delivered, Publish, Reject, Subscribe, V2};
use crate::ledger::Ledger;
use support::Broker;

fn expect_letter(letter: &Delivered, reason: &str, topic: &str, attempts: u16) {
    assert_eq!(letter.header("blipmq-reason").as_deref(), Some(reason));
    assert_eq!(letter.header("blipmq-source-topic").as_deref(), Some(topic));
    assert_eq!(letter.header("blipmq-attempts"), Some(attempts.to_string()));
    assert_eq!((letter.attempt, letter.qos), (1, 1));
}

#[test]
fn rejected_messages_are_kept_for_whoever_comes() {
    let mut broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("dead");
    for topic in &topics {
        let dead = format!("{topic}.dlq");
        let before = client.sub(&Subscribe::to(&dead));
        let before_qos0 = client.sub(&Subscribe::to(&dead).qos0());
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        let publish = Publish::to(topic, "bad").header("mine", b"kept").id("id-1").reply_to("replies").priority(2);
        client.store(&publish);
        let delivered = client.delivery(sub);
        client.reject(sub, Reject::DeadLetter, &[(delivered.tag, delivered.tag)]);

        let letter = client.delivery(before);
        expect_letter(&letter, "rejected", topic, 1);
        assert_eq!((letter.text(), letter.header("mine").as_deref()), ("bad", Some("kept")));
        assert!(letter.options.contains(&(2, b"id-1".to_vec())) && letter.options.contains(&(7, b"replies".to_vec())));
        assert_eq!(client.delivery(before_qos0).text(), "bad");
        client.ack(&letter);

        // The source is done with it.
        let cid = client.ack_asked(sub, &[(delivered.tag, delivered.tag)]);
        assert_eq!(client.error(cid).0, 404);
        // Who comes later: by the name that holds them, or as a subscription of one's own from the beginning.
        let held = client.subscribe(&Subscribe::to(&dead).durable("dead-letters"));
        assert_eq!((held.resumed, held.backlog), (true, 1));
        expect_letter(&client.delivery(held.sub), "rejected", topic, 1);
        let own = client.sub(&Subscribe::to(&dead).earliest());
        expect_letter(&client.delivery(own), "rejected", topic, 1);
        assert_eq!(client.subscribe(&Subscribe::to(&dead)).backlog, 0);
        client.detach(held.sub);
    }
    Ledger::expect_balance(&broker);
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        assert_eq!(client.subscribe(&Subscribe::to(topic).durable("d")).backlog, 0);
        let held = client.subscribe(&Subscribe::to(&format!("{topic}.dlq")).durable("dead-letters"));
        assert_eq!((held.resumed, held.backlog), (true, 1));
        let letter = client.delivery(held.sub);
        assert_eq!(letter.header("blipmq-reason").as_deref(), Some("rejected"));
        client.ack(&letter);
    }
    Ledger::expect_balance(&broker);
}

#[test]
fn after_max_retries_it_is_a_dead_letter() {
    let broker = Broker::start(&[("BLIPMQ_MAX_RETRIES", "3"), ("BLIPMQ_RETRY_BACKOFF_MS", "1")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("retries") {
        let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")));
        let sub = client.sub(&Subscribe::to(&topic).ack_timeout(30));
        // By timeouts, by rejects, by both.
        client.store_all(&topic, &["timeouts"]);
        for attempt in 1..=3 {
            assert_eq!(client.delivery(sub).attempt, attempt);
        }
        let letter = client.delivery(dead);
        assert_eq!(letter.text(), "timeouts");
        expect_letter(&letter, "max-retries", &topic, 3);

        let patient = client.sub(&Subscribe::to(&topic).ack_timeout(600_000));
        client.delete(sub);
        client.store_all(&topic, &["rejects", "after it"]);
        for attempt in 1..=3 {
            let delivered = client.want(|got| match got {
                crate::client::Got::Deliver(d) if d.sub == patient && d.text() == "rejects" => Some(d.clone()),
                _ => None,
            });
            assert_eq!(delivered.attempt, attempt);
            client.reject(patient, Reject::Requeue, &[(delivered.tag, delivered.tag)]);
        }
        let letter = client.delivery(dead);
        assert_eq!(letter.text(), "rejects");
        expect_letter(&letter, "max-retries", &topic, 3);
        assert_eq!(client.delivery(patient).text(), "after it");
        client.expect_nothing(patient);
        client.delete(patient);
    }
    let ledger = Ledger::expect_balance(&broker);
    assert_eq!((ledger.lost("dead_lettered"), ledger.lost("retries_exhausted")), (4, 0));
}

#[test]
fn failures_are_remembered_over_a_crash() {
    let mut broker = Broker::start(&[("BLIPMQ_MAX_RETRIES", "3")]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("failures");
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        client.store_all(topic, &["m"]);
        for attempt in 1..=2 {
            assert_eq!(client.delivery(sub).attempt, attempt);
            client.reject(sub, Reject::Requeue, &[(1, 1)]);
        }
        assert_eq!(client.delivery(sub).attempt, 3);
        // A later publish is confirmed after the failures are in the log.
        client.store_all(topic, &["after"]);
    }
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")));
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        let again = client.delivery(sub);
        assert_eq!((again.text(), again.attempt, again.redelivered), ("m", 3, true));
        client.reject(sub, Reject::Requeue, &[(again.tag, again.tag)]);
        expect_letter(&client.delivery(dead), "max-retries", topic, 3);
    }
}

/// The timeout has counted that delivery as failed; the reject names the same delivery.
#[test]
fn a_late_reject_is_no_second_failure() {
    let broker = Broker::start(&[("BLIPMQ_MAX_RETRIES", "3"), ("BLIPMQ_RETRY_BACKOFF_MS", "600000")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("late-reject") {
        let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")));
        let sub = client.sub(&Subscribe::to(&topic).credit(1).ack_timeout(50));
        client.store_all(&topic, &["m", "n"]);
        assert_eq!(client.delivery(sub).text(), "m");
        assert_eq!(client.delivery(sub).text(), "n", "the first has timed out");
        client.credit(sub, 0);
        client.reject(sub, Reject::Requeue, &[(1, 1)]);
        client.reject(sub, Reject::Requeue, &[(1, 1)]);
        client.reject(sub, Reject::Requeue, &[(1, 1)]);
        client.settle(sub);
        client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
        let letter = client.delivery(dead);
        assert_eq!(letter.text(), "m");
        expect_letter(&letter, "rejected", &topic, 1);
    }
}

#[test]
fn a_dead_letter_does_not_die_again() {
    let broker = Broker::start(&[("BLIPMQ_MAX_RETRIES", "2")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("undead") {
        let dead = format!("{topic}.dlq");
        let sub = client.sub(&Subscribe::to(&topic));
        client.store_all(&topic, &["m"]);
        client.delivery(sub);
        client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
        let held = client.sub(&Subscribe::to(&dead).durable("dead-letters"));
        for attempt in 1..=6 {
            let letter = client.delivery(held);
            assert_eq!(letter.attempt, attempt);
            let how = if attempt % 2 == 0 { Reject::DeadLetter } else { Reject::Requeue };
            client.reject(held, how, &[(letter.tag, letter.tag)]);
        }
        let letter = client.delivery(held);
        client.ack(&letter);
        client.expect_nothing(held);
    }
    Ledger::expect_balance(&broker);
}

#[test]
fn every_subscription_buries_its_own_copy() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("copies") {
        let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")).credit(1000));
        let subs: Vec<u64> = (0..3).map(|_| client.sub(&Subscribe::to(&topic).credit(1000))).collect();
        for n in 0..50 {
            client.publish(&Publish::to(&topic, n.to_string()).unconfirmed());
        }
        for sub in &subs {
            for _ in 0..50 {
                client.delivery(*sub);
            }
        }
        client.reject(subs[0], Reject::DeadLetter, &[(1, u64::MAX)]);
        client.reject(subs[1], Reject::DeadLetter, &[(1, 25)]);
        let cid = client.ack_asked(subs[1], &[(1, u64::MAX)]);
        client.ok(cid);
        let cid = client.ack_asked(subs[2], &[(1, u64::MAX)]);
        client.ok(cid);
        for _ in 0..75 {
            client.delivery(dead);
        }
        client.expect_nothing(dead);
    }
    let ledger = Ledger::expect_balance(&broker);
    assert_eq!(ledger.lost("dead_lettered"), 150);
}

#[test]
fn without_a_dead_letter_topic_they_are_counted() {
    let broker = Broker::start(&[("BLIPMQ_DELIVERY_DEAD_LETTER", "false")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("no-dlq") {
        let sub = client.sub(&Subscribe::to(&topic));
        client.store_all(&topic, &["m"]);
        client.delivery(sub);
        client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
        client.expect_nothing(sub);
    }
    let ledger = Ledger::expect_balance(&broker);
    assert_eq!((ledger.lost("retries_exhausted"), ledger.sum("queue_waiting")), (2, 0));
}

/// `<topic>.dlq` would be longer than a topic's name may be: nobody could ever subscribe to it.
#[test]
fn a_topic_whose_name_leaves_no_room_for_the_suffix_has_no_dead_letters() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    for first in ["a", "b", "c", "d"] {
        let topic = format!("{first}{}", "x".repeat(65_534));
        let sub = client.sub(&Subscribe::to(&topic));
        client.store_all(&topic, &["m"]);
        client.delivery(sub);
        client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
        client.expect_nothing(sub);
    }
    let ledger = Ledger::expect_balance(&broker);
    assert_eq!((ledger.lost("retries_exhausted"), ledger.sum("topics")), (4, 4));
}

/// A source topic's name of this length does not fit the options of one frame; the other headers do.
#[test]
fn headers_that_do_not_fit_are_left_out() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topic = "y".repeat(40_000);
    let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")));
    let sub = client.sub(&Subscribe::to(&topic));
    client.store(&Publish::to(&topic, "m").header("mine", b"kept"));
    client.delivery(sub);
    client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
    let letter = client.delivery(dead);
    assert_eq!(letter.header("blipmq-reason").as_deref(), Some("rejected"));
    assert_eq!(letter.header("blipmq-attempts").as_deref(), Some("1"));
    assert_eq!((letter.header("blipmq-source-topic"), letter.header("mine").as_deref()), (None, Some("kept")));
}
