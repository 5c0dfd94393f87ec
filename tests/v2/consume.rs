//! SUBSCRIBE, DELIVER, ACK, REJECT, CREDIT: who gets what, in which order, how often.

use crate::client::{Delivered, Got, Publish, Reject, Subscribe, V2};
use support::Broker;

/// The texts of the next deliveries of `sub`.
fn texts(client: &mut V2, sub: u64, count: usize) -> Vec<String> {
    (0..count).map(|_| client.delivery(sub).text().to_owned()).collect()
}

#[test]
fn subscribed_names_the_owner_and_comes_before_deliveries() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("subscribed");
    let owners = [client.core, 1 - client.core];
    for (topic, owner) in topics.iter().zip(owners) {
        let subscribed = client.subscribe(&Subscribe::to(topic));
        assert_eq!((subscribed.core, subscribed.resumed, subscribed.backlog), (owner, false, 0));
        client.store_all(topic, &["a", "b"]);
        let mut late = V2::connect(&broker);
        let cid = late.ask(0x15, &Subscribe::to(topic).earliest().payload());
        let Got::Subscribed { cid: of, subscribed: second } = late.next() else { panic!("SUBSCRIBED comes first") };
        assert_eq!((of, second.backlog), (cid, 2));
        assert_ne!(second.sub, subscribed.sub);
        assert_eq!(texts(&mut late, second.sub, 2), ["a", "b"]);
    }
}

#[test]
fn a_delivery_has_the_lower_qos() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("merge") {
        let strong = client.sub(&Subscribe::to(&topic));
        let weak = client.sub(&Subscribe::to(&topic).qos0());
        for published in [0, 1] {
            client.store(&Publish::to(&topic, "m").qos(published));
            let (one, other) = (client.delivery(strong), client.delivery(weak));
            assert_eq!((one.qos, other.qos), (published, 0));
            assert_eq!((one.attempt, other.attempt, one.redelivered, other.redelivered), (1, 1, false, false));
        }
        // The copies for the weak one are not for the strong one, too.
        client.expect_nothing(strong);
    }
}

#[test]
fn every_subscription_gets_all_and_every_consumer_of_one_gets_a_part() {
    const COUNT: usize = 300;
    let broker = Broker::shared();
    let mut publisher = V2::connect(&broker);
    for topic in publisher.near_and_far("fan-out") {
        let mut alone: Vec<(V2, u64)> = (0..3)
            .map(|_| {
                let mut client = V2::connect(&broker);
                let sub = client.sub(&Subscribe::to(&topic).credit(1000));
                (client, sub)
            })
            .collect();
        let mut sharing: Vec<(V2, u64)> = (0..3)
            .map(|_| {
                let mut client = V2::connect(&broker);
                let sub = client.sub(&Subscribe::to(&topic).credit(10).durable("shared"));
                (client, sub)
            })
            .collect();
        let expected: Vec<String> = (0..COUNT).map(|n| n.to_string()).collect();
        let borrowed: Vec<&str> = expected.iter().map(String::as_str).collect();
        publisher.store_all(&topic, &borrowed);
        for (client, sub) in &mut alone {
            assert_eq!(texts(client, *sub, COUNT), expected, "in order");
            client.expect_nothing(*sub);
        }
        // Ten each at once, and as many again as are acknowledged.
        let mut got: Vec<Delivered> = Vec::new();
        while got.len() < COUNT {
            for (client, sub) in &mut sharing {
                client.settle(*sub);
                let mine: Vec<Delivered> = client
                    .rest()
                    .into_iter()
                    .map(|got| match got {
                        Got::Deliver(delivered) => delivered,
                        other => panic!("{other:?}"),
                    })
                    .collect();
                assert!(mine.len() <= 10, "credit");
                assert!(mine.is_sorted_by_key(|d| d.tag), "in order");
                let ranges: Vec<_> = mine.iter().map(|d| (d.tag, d.tag)).collect();
                if !ranges.is_empty() {
                    let cid = client.ack_asked(*sub, &ranges);
                    client.ok(cid);
                }
                got.extend(mine);
            }
        }
        got.sort_by_key(|d| d.tag);
        let shared: Vec<&str> = got.iter().map(Delivered::text).collect();
        assert_eq!(shared, borrowed, "each to exactly one");
        assert!(got.iter().all(|d| d.attempt == 1));
    }
}

#[test]
fn consumers_of_higher_priority_are_served_first() {
    let broker = Broker::shared();
    let mut publisher = V2::connect(&broker);
    for topic in publisher.near_and_far("rank") {
        let (mut low, mut high) = (V2::connect(&broker), V2::connect(&broker));
        let queue = Subscribe::to(&topic).durable("d").credit(2);
        let low_sub = low.sub(&queue.clone().priority(1));
        let high_sub = high.sub(&queue.priority(200));
        publisher.store_all(&topic, &["1", "2", "3", "4", "5"]);
        assert_eq!(texts(&mut high, high_sub, 2), ["1", "2"]);
        assert_eq!(texts(&mut low, low_sub, 2), ["3", "4"]);
        high.expect_nothing(high_sub);
        // Room at both: the higher one gets it.
        low.ack_silently(low_sub, &[(1, u64::MAX)]);
        low.settle(low_sub);
        assert_eq!(texts(&mut low, low_sub, 1), ["5"]);
        high.ack_silently(high_sub, &[(1, u64::MAX)]);
        high.settle(high_sub);
        publisher.store_all(&topic, &["6"]);
        assert_eq!(texts(&mut high, high_sub, 1), ["6"]);
        low.expect_nothing(low_sub);
        // Equals take turns, also on one connection.
        let second = high.sub(&Subscribe::to(&topic).durable("d").credit(2).priority(200));
        high.ack_silently(high_sub, &[(1, u64::MAX)]);
        high.settle(high_sub);
        publisher.store_all(&topic, &["7", "8"]);
        let mut both = [texts(&mut high, high_sub, 1), texts(&mut high, second, 1)].concat();
        both.sort();
        assert_eq!(both, ["7", "8"]);
    }
}

#[test]
fn credit_bounds_what_is_unacknowledged() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("credit") {
        let sub = client.sub(&Subscribe::to(&topic).credit(2));
        client.store_all(&topic, &["1", "2", "3", "4", "5", "6", "7", "8"]);
        assert_eq!(texts(&mut client, sub, 2), ["1", "2"]);
        client.expect_nothing(sub);
        // More of it.
        client.credit(sub, 4);
        assert_eq!(texts(&mut client, sub, 2), ["3", "4"]);
        client.expect_nothing(sub);
        // Less: takes effect as deliveries are acknowledged.
        client.credit(sub, 1);
        client.ack_silently(sub, &[(1, 3)]);
        client.expect_nothing(sub);
        client.ack_silently(sub, &[(4, 4)]);
        assert_eq!(texts(&mut client, sub, 1), ["5"]);
        // None: pauses.
        client.credit(sub, 0);
        client.ack_silently(sub, &[(5, 5)]);
        client.expect_nothing(sub);
        // A QoS0 message takes no credit, but keeps its place behind what waits.
        client.store(&Publish::to(&topic, "volatile").qos(0));
        client.expect_nothing(sub);
        client.credit(sub, 65_535);
        assert_eq!(texts(&mut client, sub, 4), ["6", "7", "8", "volatile"]);
        client.credit(sub, 0);
        client.ack_silently(sub, &[(1, 100)]);
        client.store(&Publish::to(&topic, "volatile too").qos(0));
        assert_eq!(texts(&mut client, sub, 1), ["volatile too"]);
    }
    assert_eq!(client.rest(), []);
}

#[test]
fn acks_name_ranges_in_any_order_and_the_rest_is_ignored() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("ranges") {
        let sub = client.sub(&Subscribe::to(&topic).credit(1000).durable("d"));
        let names: Vec<String> = (1..=100).map(|n| n.to_string()).collect();
        client.store_all(&topic, &names.iter().map(String::as_str).collect::<Vec<_>>());
        let tags: Vec<u64> = (0..100).map(|_| client.delivery(sub).tag).collect();
        assert_eq!(tags, (1..=100).collect::<Vec<_>>());
        let unknown = (404, "unknown subscription or delivery tag".to_owned());
        for nothing in [(101, u64::MAX), (u64::MAX, u64::MAX)] {
            let cid = client.ack_asked(sub, &[nothing]);
            assert_eq!(client.error(cid), unknown);
        }
        // Out of order, overlapping, repeated, beyond the end.
        let cid = client.ack_asked(sub, &[(90, u64::MAX), (5, 9), (1, 3), (7, 20), (2, 2), (500, 600)]);
        client.ok(cid);
        let cid = client.ack_asked(sub, &[(1, 3), (5, 20), (90, u64::MAX)]);
        assert_eq!(client.error(cid), unknown, "all of them were done before");
        client.detach(sub);
        let again = client.subscribe(&Subscribe::to(&topic).credit(1000).durable("d"));
        assert_eq!(again.backlog, 1 + 69);
        let left: Vec<u64> = (0..70).map(|_| client.delivery(again.sub).tag).collect();
        let expected: Vec<u64> = [4].into_iter().chain(21..=89).collect();
        assert_eq!(left, expected);
        let cid = client.ack_asked(again.sub, &[(1, u64::MAX)]);
        client.ok(cid);
        // The old number is not ours any more.
        let cid = client.ack_asked(sub, &[(1, u64::MAX)]);
        assert_eq!(client.error(cid), unknown);
        client.ack_silently(sub, &[(1, u64::MAX)]);
        client.expect_nothing(again.sub);
    }
    assert_eq!(client.rest(), []);
}

/// The whole frame used to be looked up range by range in everything that was in flight.
#[test]
fn a_frame_of_65536_wide_ranges_holds_nobody_up() {
    const COUNT: usize = 20_000;
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("wide") {
        let sub = client.sub(&Subscribe::to(&topic).credit(65_535));
        for _ in 0..COUNT {
            client.publish(&Publish::to(&topic, "m").unconfirmed());
        }
        for _ in 0..COUNT {
            client.delivery(sub);
        }
        for _ in 0..4 {
            let nothing: Vec<_> = (0..65_536u64).map(|n| (COUNT as u64 + 1 + n, u64::MAX - n)).collect();
            let cid = client.ack_asked(sub, &nothing);
            assert_eq!(client.error(cid).0, 404);
        }
        let everything: Vec<_> = (0..65_536u64).map(|n| (1 + n % 7, u64::MAX - n)).collect();
        let cid = client.ack_asked(sub, &everything);
        client.ok(cid);
        client.expect_nothing(sub);
    }
}

#[test]
fn a_range_leaves_other_consumers_deliveries_alone() {
    let broker = Broker::shared();
    let mut one = V2::connect(&broker);
    for topic in one.near_and_far("foreign") {
        let mut two = V2::connect(&broker);
        let queue = Subscribe::to(&topic).durable("d").credit(1);
        let mine = one.sub(&queue.clone().priority(9));
        let theirs = two.sub(&queue);
        one.store_all(&topic, &["mine", "theirs"]);
        let (first, second) = (one.delivery(mine), two.delivery(theirs));
        assert_eq!((first.text(), second.text()), ("mine", "theirs"));
        let cid = one.ack_asked(mine, &[(1, u64::MAX)]);
        one.ok(cid);
        // Theirs is still in flight: only they can have done it.
        two.ack(&second);
        // Nor can a connection name another's subscription.
        let cid = one.ack_asked(theirs, &[(1, u64::MAX)]);
        assert_eq!(one.error(cid).0, 404);
        let cid = one.credit(theirs, 100);
        assert_eq!(one.error(cid).0, 404);
        let cid = one.reject(theirs, Reject::DeadLetter, &[(1, 1)]);
        assert_eq!(one.error(cid).0, 404);
    }
}

#[test]
fn what_is_not_acknowledged_in_time_comes_again_in_front() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "1"), ("BLIPMQ_MAX_RETRIES", "1000")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("timeout") {
        let sub = client.sub(&Subscribe::to(&topic).credit(1).ack_timeout(100));
        client.store_all(&topic, &["1", "2", "3"]);
        // While one waits for its backoff, another has its turn; but the third never comes before the two again.
        for (text, attempt) in [("1", 1), ("2", 1), ("1", 2), ("2", 2), ("1", 3), ("2", 3)] {
            let delivered = client.delivery(sub);
            assert_eq!((delivered.text(), delivered.attempt, delivered.redelivered), (text, attempt, attempt > 1));
            assert_eq!(delivered.tag.to_string(), text, "a redelivery keeps its tag");
        }
        client.delete(sub);
    }
}

#[test]
fn a_late_ack_of_a_single_tag_counts() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "600000"), ("BLIPMQ_MAX_RETRIES", "1000")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("late") {
        let sub = client.sub(&Subscribe::to(&topic).credit(1).ack_timeout(50).durable("d"));
        client.store_all(&topic, &["1", "2", "3"]);
        // The credit comes back by the timeout, and the message waits for its backoff.
        let first = client.delivery(sub);
        let second = client.delivery(sub);
        assert_eq!((first.text(), second.text()), ("1", "2"));
        assert_eq!(client.delivery(sub).text(), "3");
        client.ack(&first);
        let cid = client.ack_asked(sub, &[(first.tag, first.tag)]);
        assert_eq!(client.error(cid).0, 404, "once");
        let cid = client.ack_asked(sub, &[(2, 3)]);
        client.ok(cid);
        client.detach(sub);
        assert_eq!(client.subscribe(&Subscribe::to(&topic).durable("d")).backlog, 0);
    }
    crate::ledger::Ledger::expect_balance(&broker);
}

#[test]
fn the_backoff_doubles() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "400"), ("BLIPMQ_MAX_RETRIES", "1000")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("backoff") {
        let sub = client.sub(&Subscribe::to(&topic).credit(1).ack_timeout(50));
        // The third redelivery of the first (400 + 800 + 1600 ms after its timeouts) comes behind the second of a message
        // that failed first after it did (400 + 800 ms): an order of events, whatever the machine's pace.
        client.store_all(&topic, &["a"]);
        for attempt in 1..=3 {
            assert_eq!(client.delivery(sub).attempt, attempt);
        }
        client.store_all(&topic, &["b"]);
        let order: Vec<(String, u16)> = (0..4)
            .map(|_| {
                let delivered = client.delivery(sub);
                (delivered.text().to_owned(), delivered.attempt)
            })
            .collect();
        let seen: Vec<(&str, u16)> = order.iter().map(|(text, attempt)| (text.as_str(), *attempt)).collect();
        assert_eq!(seen, [("b", 1), ("b", 2), ("b", 3), ("a", 4)]);
        client.delete(sub);
    }
}

#[test]
fn reject_puts_it_back_at_once_or_later() {
    let broker = Broker::start(&[("BLIPMQ_MAX_RETRIES", "1000")]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("reject") {
        let sub = client.sub(&Subscribe::to(&topic).credit(2));
        client.store_all(&topic, &["1", "2", "3", "4"]);
        assert_eq!(texts(&mut client, sub, 2), ["1", "2"]);
        // To the front, both, in order, before what is new.
        client.reject(sub, Reject::Requeue, &[(1, 2)]);
        for (text, tag) in [("1", 1), ("2", 2)] {
            let again = client.delivery(sub);
            assert_eq!((again.text(), again.tag, again.attempt, again.redelivered), (text, tag, 2, true));
        }
        // Later: others go first.
        client.reject(sub, Reject::Later { ms: 300 }, &[(1, 1)]);
        assert_eq!(texts(&mut client, sub, 1), ["3"]);
        client.ack_silently(sub, &[(2, 3)]);
        assert_eq!(texts(&mut client, sub, 1), ["4"]);
        let again = client.delivery(sub);
        assert_eq!((again.text(), again.attempt), ("1", 3));
        client.ack_silently(sub, &[(1, 100)]);
        // Nothing there, or done before: nothing happens, and nothing is said.
        client.reject(sub, Reject::Requeue, &[(1, u64::MAX)]);
        client.reject(sub, Reject::DeadLetter, &[(1, 1)]);
        client.expect_nothing(sub);
    }
    assert_eq!(client.rest(), []);
}

#[test]
fn what_a_lost_consumer_had_goes_to_the_others_in_front() {
    let broker = Broker::shared();
    let mut publisher = V2::connect(&broker);
    for topic in publisher.near_and_far("lost") {
        let (mut one, mut two) = (V2::connect(&broker), V2::connect(&broker));
        let queue = Subscribe::to(&topic).durable("d");
        let first = one.sub(&queue.clone().credit(3).priority(9));
        let second = two.sub(&queue.credit(1));
        publisher.store_all(&topic, &["1", "2", "3", "4", "5"]);
        assert_eq!(texts(&mut one, first, 3), ["1", "2", "3"]);
        assert_eq!(texts(&mut two, second, 1), ["4"]);
        one.ack_silently(first, &[(2, 2)]);
        one.settle(first);
        one.rest(); // the fifth message, in place of the second
        drop(one);
        two.credit(second, 100);
        for (text, attempt) in [("1", 2), ("3", 2), ("5", 2)] {
            let again = two.delivery(second);
            assert_eq!((again.text(), again.attempt, again.redelivered), (text, attempt, true));
        }
    }
}

#[test]
fn first_deliveries_keep_each_publishers_order() {
    const COUNT: u32 = 2000;
    let broker = Broker::shared();
    let mut consumer = V2::connect(&broker);
    for topic in consumer.near_and_far("order") {
        let sub = consumer.sub(&Subscribe::to(&topic).credit(65_535));
        let mut publishers: Vec<V2> = (0..3).map(|_| V2::connect(&broker)).collect();
        for n in 0..COUNT {
            for (who, publisher) in publishers.iter_mut().enumerate() {
                // QoS0 and QoS1 of one publisher do not overtake each other either.
                let qos = u8::from(n % 3 != 0);
                publisher.publish(&Publish::to(&topic, format!("{who} {n}")).qos(qos).unconfirmed());
            }
        }
        let mut next = [0; 3];
        for _ in 0..3 * COUNT {
            let delivered = consumer.delivery(sub);
            let (who, n) = delivered.text().split_once(' ').expect("two numbers");
            let who: usize = who.parse().expect("a number");
            assert_eq!(n, next[who].to_string());
            next[who] += 1;
            if delivered.tag.is_multiple_of(500) {
                consumer.ack_silently(sub, &[(1, delivered.tag)]);
            }
        }
    }
}

#[test]
fn earliest_gets_what_is_kept() {
    let broker = Broker::shared();
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("earliest") {
        // Nobody wants the first one, so it is not kept.
        client.store_all(&topic, &["gone"]);
        let keeper = client.sub(&Subscribe::to(&topic).durable("keeper"));
        client.store_all(&topic, &["done", "kept 1", "kept 2"]);
        let done = client.delivery(keeper);
        client.ack(&done);
        client.store(&Publish::to(&topic, "urgent").priority(3));
        let new = client.subscribe(&Subscribe::to(&topic));
        assert_eq!(new.backlog, 0);
        for subscribe in [Subscribe::to(&topic).earliest(), Subscribe::to(&topic).earliest().durable("late")] {
            let late = client.subscribe(&subscribe);
            assert_eq!((late.backlog, late.resumed), (3, false));
            assert_eq!(texts(&mut client, late.sub, 3), ["urgent", "kept 1", "kept 2"]);
        }
        client.expect_nothing(new.sub);
    }
}
