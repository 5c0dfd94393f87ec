//! Messages as large as they may be, and a byte larger.

use crate::client::{Outcome, Publish, Subscribe, V2};
use support::Broker;

const FRAME_LEN_MAX: usize = 16 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn big_messages_go_both_ways() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("big") {
        let sub = client.sub(&Subscribe::to(&topic).credit(2));
        // The last is as long as a frame may be.
        let most = FRAME_LEN_MAX - 9 - Publish::to(&topic, "").payload().len();
        for len in [1 << 20, 10 << 20, most] {
            let message = pattern(len);
            for qos in [0, 1] {
                client.store(&Publish::to(&topic, &message).qos(qos));
                let delivered = client.delivery(sub);
                assert!(delivered.message == message, "{} bytes of {len}", delivered.message.len());
                if qos == 1 {
                    client.ack(&delivered);
                }
            }
        }
        // Many that are large, all under way at once, with more than one waiting for credit.
        let message = pattern(3 << 20);
        let cids: Vec<u64> = (0..8).map(|_| client.publish(&Publish::to(&topic, &message))).collect();
        for _ in 0..8 {
            let delivered = client.delivery(sub);
            assert!(delivered.message == message);
            client.ack(&delivered);
        }
        for cid in cids {
            assert!(matches!(client.outcome(cid), Outcome::Stored { .. }));
        }
        client.delete(sub);
    }
}

#[test]
fn a_backlog_of_big_messages_is_read_back_from_the_log() {
    let mut broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("big-backlog");
    let sizes = [5 << 20, 100, 14 << 20, 4096, 70_000, 1 << 20];
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("d"));
        client.detach(sub);
        for len in sizes {
            client.store(&Publish::to(topic, pattern(len)));
        }
    }
    broker.kill();
    broker.restart();
    let mut client = V2::connect(&broker);
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("d").credit(3));
        for len in sizes {
            let delivered = client.delivery(sub);
            assert!(delivered.message == pattern(len), "{len}");
            client.ack(&delivered);
        }
        client.expect_nothing(sub);
    }
}

/// An alias is shorter than the name it stands for. A v1 consumer gets the name, in a frame that must not be longer than
/// any frame may be.
#[test]
fn a_message_that_no_delivery_could_carry_is_refused() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far(&"long".repeat(100)) {
        let most = FRAME_LEN_MAX - 12 - topic.len();
        let mut old = broker.v1();
        let old_sub = old.subscribe(&topic, 1);
        let sub = client.sub(&Subscribe::to(&topic));
        client.alias(1, &topic);
        for qos in [0, 1] {
            match client.confirm(&Publish::alias(1, vec![0; most + 1]).qos(qos)) {
                Outcome::Rejected { code: 413, text } => assert!(!text.is_empty()),
                other => panic!("{other:?}"),
            }
            let cid = client.publish(&Publish::alias(1, vec![0; most + 1]).qos(qos).unconfirmed());
            assert_eq!(client.error(cid).0, 413);
            let message = pattern(most);
            client.store(&Publish::alias(1, &message).qos(qos));
            assert!(client.delivery(sub).message == message);
            let got = old.poll(old_sub, &topic);
            assert!(got.message == message);
            if qos == 1 {
                old.ack(old_sub, got.tag);
                client.ack_silently(sub, &[(1, u64::MAX)]);
            }
        }
        client.expect_nothing(sub);
    }
}

#[test]
fn a_dead_letter_of_the_largest_size_arrives_whole() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("big-dead") {
        let sub = client.sub(&Subscribe::to(&topic));
        let dead = client.sub(&Subscribe::to(&format!("{topic}.dlq")));
        let headers = Publish::to(&topic, "").header("h", &[7; 32_000]);
        let message = pattern(FRAME_LEN_MAX - 9 - headers.payload().len());
        client.store(&Publish::to(&topic, &message).header("h", &[7; 32_000]));
        let delivered = client.delivery(sub);
        assert!(delivered.message == message);
        client.reject(sub, crate::client::Reject::DeadLetter, &[(delivered.tag, delivered.tag)]);
        let letter = client.delivery(dead);
        assert!(letter.message == message);
        assert_eq!(letter.header("blipmq-reason").as_deref(), Some("rejected"));
        client.ack(&letter);
    }
}

#[test]
fn an_empty_message_is_a_message() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("empty") {
        let sub = client.sub(&Subscribe::to(&topic));
        for qos in [0, 1] {
            client.store(&Publish::to(&topic, "").qos(qos));
            assert_eq!(client.delivery(sub).message, b"");
        }
    }
}
