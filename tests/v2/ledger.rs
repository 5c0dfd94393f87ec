//! What /metrics, /topics and /subs say; above all that no message leaves a queue uncounted.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Got, Publish, Reject, Subscribe, V2};
use support::{Broker, PATIENCE, eventually};

/// One reading of /metrics, summed over the cores.
pub struct Ledger(String);

impl Ledger {
    pub fn read(broker: &Broker) -> Ledger {
        let (status, text) = broker.http("GET", "/metrics");
        assert_eq!(status, 200);
        Ledger(text)
    }

    /// Over all cores and labels.
    pub fn sum(&self, name: &str) -> u64 {
        self.labelled(name, "")
    }

    pub fn lost(&self, cause: &str) -> u64 {
        self.labelled("queue_lost_total", &format!("cause=\"{cause}\""))
    }

    fn labelled(&self, name: &str, label: &str) -> u64 {
        let prefix = format!("blipmq_{name}{{");
        let lines = self.0.lines().filter(|line| line.starts_with(&prefix) && line.contains(label));
        let values = lines.map(|line| line.rsplit_once(' ').expect("name and value").1);
        let values: Vec<u64> = values.map(|value| value.parse().expect("a whole number")).collect();
        values.iter().sum()
    }

    /// The two sums that src/metrics.rs promises: (received, where they went), (into queues, where they are).
    fn sums(&self) -> [(u64, u64); 2] {
        let answered = ["published_total", "publishes_rejected_total", "publishes_duplicate_total"];
        let queues = ["queue_out_total", "queue_lost_total", "queue_waiting"];
        let sum = |names: [&str; 3]| names.iter().map(|name| self.sum(name)).sum::<u64>();
        let entered = self.sum("queue_recovered_total") + self.sum("queue_in_total");
        [(self.sum("publishes_received_total"), sum(answered)), (entered, sum(queues))]
    }

    /// Both sums hold once nothing moves any more: two readings that agree, and balance.
    pub fn expect_balance(broker: &Broker) -> Ledger {
        let deadline = Instant::now() + PATIENCE;
        let mut last = Ledger::read(broker);
        loop {
            std::thread::sleep(Duration::from_millis(30));
            let now = Ledger::read(broker);
            let quiet = now.sums() == last.sums();
            if quiet && now.sums().iter().all(|(one, other)| one == other) {
                return now;
            }
            let ledger: Vec<&str> = now.0.lines().filter(|l| l.contains("queue_") || l.contains("publish")).collect();
            assert!(Instant::now() < deadline || !quiet, "{:?} in\n{}", now.sums(), ledger.join("\n"));
            last = now;
        }
    }
}

#[test]
fn the_ledger_balances_after_every_kind_of_traffic() {
    let mut broker = Broker::start(&[
        ("BLIPMQ_MAX_RETRIES", "2"),
        ("BLIPMQ_RETRY_BACKOFF_MS", "1"),
        ("BLIPMQ_DELIVERY_QOS0_QUEUE_MESSAGES", "10"),
        ("BLIPMQ_DELIVERY_BACKLOG_MESSAGES", "200"),
    ]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("ledger");
    for topic in &topics {
        let durable = client.sub(&Subscribe::to(topic).durable("d").credit(50).ack_timeout(40));
        let idle = client.sub(&Subscribe::to(topic).durable("idle"));
        client.detach(idle);
        let weak = client.sub(&Subscribe::to(topic).qos0());
        for n in 0..100u64 {
            client.store(&Publish::to(topic, n.to_string()).id(&format!("{n}")));
            client.confirm(&Publish::to(topic, n.to_string()).id(&format!("{n}")));
            client.store(&Publish::to(topic, n.to_string()).qos(0));
            client.delivery(weak);
        }
        // Some acknowledged, once, twice, too late; some rejected in each way; the others time out and die.
        for n in 0..60 {
            let delivered = client.delivery(durable);
            let tag = [(delivered.tag, delivered.tag)];
            match n % 6 {
                0 | 1 => client.ack_silently(durable, &tag),
                2 => _ = client.reject(durable, Reject::Requeue, &tag),
                3 => _ = client.reject(durable, Reject::DeadLetter, &tag),
                4 => {
                    client.ack_silently(durable, &tag);
                    client.ack_silently(durable, &tag);
                }
                _ => {}
            }
        }
        client.settle(durable);
        client.ack_silently(durable, &[(1, u64::MAX)]);
        // Too late by all means: acknowledged though redelivered to nobody.
        client.ack_silently(durable, &[(3, 3)]);
        client.store(&Publish::to(topic, "delayed").delay(600_000));
        // Refused: the idle queue is full.
        for _ in 0..120 {
            client.confirm(&Publish::to(topic, "fills"));
        }
        // Nobody is there for these.
        client.store(&Publish::to(&format!("{topic}/nobody"), "m"));
        client.store(&Publish::to(&format!("{topic}/nobody"), "m").qos(0));
        client.publish(&Publish::alias(9, "unknown alias"));
        client.detach(weak);
    }
    let ledger = eventually("every failed delivery to be a dead letter", || {
        // What is in flight times out; what waits is what the idle queue has, and the delayed one.
        let ledger = Ledger::read(&broker);
        (ledger.lost("dead_lettered") > 40 && ledger.sum("publishes_rejected_total") > 40).then_some(ledger)
    });
    assert!(ledger.sum("publishes_duplicate_total") >= 200);
    Ledger::expect_balance(&broker);
    drop(client);
    Ledger::expect_balance(&broker);

    broker.kill();
    broker.restart();
    let ledger = Ledger::expect_balance(&broker);
    assert!(ledger.sum("queue_recovered_total") >= 200);
    assert_eq!(ledger.sum("queue_recovered_total"), ledger.sum("queue_waiting"));
    let mut client = V2::connect(&broker);
    for topic in &topics {
        for name in ["idle", "d"] {
            let back = client.subscribe(&Subscribe::to(topic).durable(name).credit(65_535));
            // One is delayed for longer than this test lasts.
            for _ in 1..back.backlog {
                let delivered = client.delivery(back.sub);
                client.ack_silently(back.sub, &[(delivered.tag, delivered.tag)]);
            }
            client.settle(back.sub);
            client.delete(back.sub);
        }
    }
    Ledger::expect_balance(&broker);
}

#[test]
fn v1_traffic_balances_too() {
    let broker = Broker::start(&[("BLIPMQ_RETRY_BACKOFF_MS", "20"), ("BLIPMQ_MAX_RETRIES", "3")]);
    for n in 0..4 {
        let topic = format!("v1-ledger-{n}");
        let mut client = broker.v1();
        let strong = client.subscribe(&topic, 1);
        let weak = client.subscribe(&topic, 0);
        for i in 0..20u8 {
            client.publish(&topic, i % 2, &[i]);
        }
        for i in 0..10 {
            let got = client.poll(strong, &topic);
            if got.qos == 1 && i % 4 == 1 {
                client.ack(strong, got.tag);
            }
            client.poll(weak, &topic);
        }
        drop(client);
        Ledger::expect_balance(&broker);
    }
}

#[test]
fn a_consumer_that_does_not_keep_up_loses_qos0_and_it_is_counted() {
    const COUNT: u64 = 3000;
    for (policy, cause) in [("drop_oldest", "dropped_oldest"), ("drop_new", "dropped_new")] {
        let broker =
            Broker::start(&[("BLIPMQ_DELIVERY_QOS0_QUEUE_MESSAGES", "100"), ("BLIPMQ_DELIVERY_QOS0_OVERFLOW", policy)]);
        let mut publisher = V2::connect(&broker);
        for topic in publisher.near_and_far("slow") {
            let before = Ledger::read(&broker);
            let mut slow = V2::connect(&broker);
            let sub = slow.sub(&Subscribe::to(&topic).qos0());
            let mut quick = V2::connect(&broker);
            let quick_sub = quick.sub(&Subscribe::to(&topic).qos0());
            // It does not read; what is sent soon fills all buffers on the way to it.
            for n in 0..COUNT {
                let mut message = n.to_be_bytes().to_vec();
                message.resize(16 * 1024, 0);
                publisher.store(&Publish::to(&topic, message).qos(0));
                assert_eq!(quick.delivery(quick_sub).message[..8], n.to_be_bytes(), "others are not held up");
            }
            let after = Ledger::expect_balance(&broker);
            let lost = after.lost(cause) - before.lost(cause);
            assert!(lost > 0, "{policy}");
            let got: Vec<u64> = (0..COUNT - lost)
                .map(|_| u64::from_be_bytes(slow.delivery(sub).message[..8].try_into().expect("eight")))
                .collect();
            assert!(got.is_sorted_by(|a, b| a < b), "in order, none twice");
            let last_sent = got.last() == Some(&(COUNT - 1));
            assert_eq!(last_sent, policy == "drop_oldest", "{policy} kept {:?}", got.last());
            slow.settle_qos0();
            assert_eq!(slow.rest(), []);
        }
        Ledger::expect_balance(&broker);
    }
}

#[test]
fn a_consumer_that_never_reads_does_not_fill_the_memory() {
    const COUNT: u32 = 200;
    let broker = Broker::start(&[]);
    let mut publisher = V2::connect(&broker);
    for topic in publisher.near_and_far("never-reads") {
        let mut deaf = V2::connect(&broker);
        let sub = deaf.sub(&Subscribe::to(&topic).credit(65_535));
        for n in 0..COUNT {
            let mut message = n.to_be_bytes().to_vec();
            message.resize(100_000, 0);
            publisher.publish(&Publish::to(&topic, message).unconfirmed());
        }
        // QoS1 waits in the log, and comes when it is read, in order and complete.
        for n in 0..COUNT {
            let delivered = deaf.delivery(sub);
            assert_eq!((&delivered.message[..4], delivered.attempt), (&n.to_be_bytes()[..], 1));
        }
        deaf.ack_silently(sub, &[(1, u64::MAX)]);
        deaf.expect_nothing(sub);
    }
    assert_eq!(Ledger::expect_balance(&broker).sum("queue_waiting"), 0);
}

/// The time between publish and delivery used to be counted in whole milliseconds, most of them 0.
#[test]
fn publish_to_deliver_is_finer_than_a_millisecond() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    for topic in client.near_and_far("fine") {
        let sub = client.sub(&Subscribe::to(&topic));
        for qos in [1, 1, 1, 0] {
            client.store(&Publish::to(&topic, "m").qos(qos));
            client.delivery(sub);
        }
    }
    let (_, text) = broker.http("GET", "/metrics");
    let of = |name: &str| -> Vec<f64> {
        let lines =
            text.lines().filter(|line| line.starts_with(&format!("blipmq_publish_to_deliver_seconds_{name}{{")));
        lines.map(|line| line.rsplit_once(' ').expect("name and value").1.parse().expect("a number")).collect()
    };
    assert_eq!(of("count"), [4.0, 4.0]);
    for sum in of("sum") {
        assert!(sum > 0.0 && sum < PATIENCE.as_secs_f64(), "{sum}");
        assert!((sum * 1e3).fract() != 0.0, "{sum} is whole milliseconds");
    }
}

#[test]
fn topics_and_subs_as_json() {
    let broker = Broker::start(&[]);
    let mut client = V2::connect(&broker);
    let topics = client.near_and_far("json");
    for topic in &topics {
        let sub = client.sub(&Subscribe::to(topic).durable("a name").credit(2));
        client.sub(&Subscribe::to(topic).qos0());
        client.store_all(topic, &["1", "2", "3", "4"]);
        let delivered = client.delivery(sub);
        client.ack(&delivered);
        for _ in 0..2 {
            client.delivery(sub);
        }
    }
    let rows = |path: &str| -> Vec<Value> {
        let (status, body) = broker.http("GET", path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("a JSON array")
    };
    let of = |rows: &[Value], topic: &str| -> Vec<Value> {
        rows.iter().filter(|row| row["topic"] == *topic).cloned().collect()
    };
    let all_topics = rows("/topics");
    let all_subs = rows("/subs");
    for (topic, core) in topics.iter().zip([client.core, 1 - client.core]) {
        let [row] = &of(&all_topics, topic)[..] else { panic!("{all_topics:?}") };
        for (key, value) in [("core", u64::from(core)), ("messages", 3), ("subscriptions", 2), ("published", 4)] {
            assert_eq!(row[key], value, "{key} of {row}");
        }
        let mut subs = of(&all_subs, topic);
        subs.sort_by_key(|row| row["kind"].to_string());
        let [durable, ephemeral] = &subs[..] else { panic!("{all_subs:?}") };
        assert_eq!((&durable["name"], &durable["kind"]), (&Value::from("a name"), &Value::from("durable")));
        let expected = [("qos", 1), ("consumers", 1), ("backlog", 1), ("in_flight", 2), ("delivered", 3), ("acked", 1)];
        for (key, value) in expected {
            assert_eq!(durable[key], value, "{key} of {durable}");
        }
        assert_eq!((&ephemeral["name"], &ephemeral["kind"]), (&Value::Null, &Value::from("ephemeral")));
        assert_eq!((&ephemeral["qos"], &ephemeral["delivered"]), (&Value::from(0), &Value::from(4)));
    }
    assert_eq!(broker.http("GET", "/healthz").0, 200);
    assert_eq!(broker.http("GET", "/readyz").0, 200);
}

impl V2 {
    /// Everything the connection's own core had to say has arrived.
    fn settle_qos0(&mut self) {
        let cid = self.ask(0x07, b"");
        self.want(|got| (*got == Got::Pong { cid }).then_some(()));
    }
}
