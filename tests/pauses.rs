//! A broker that loses its CPU for a moment, again and again, goes on by itself.
//!
//! The runtime can park with runnable tasks when its preempt timer fires before the first task of a turn has run; the beat
//! from outside gets it going again (driver/beat.rs). A client in a closed loop shows it: without the beat it waits for ever.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use support::{Broker, eventually};

/// Each pause is a chance for the mistake: about one in ten brought it out without the beat.
const PAUSES: u32 = 300;

#[test]
fn a_broker_that_is_paused_goes_on() {
    let broker = Broker::start(&[("BLIPMQ_SHARDS_COUNT", "2")]);
    let (answered, done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for n in 0..2 {
            let (broker, answered, done) = (&broker, &answered, &done);
            scope.spawn(move || {
                let mut client = broker.v1();
                let topic = format!("paused-{n}");
                let sub = client.subscribe(&topic, 1);
                // Each answer is waited for with a deadline; a client that waits in vain fails the test.
                while !done.load(Ordering::Relaxed) {
                    client.publish(&topic, 1, b"on");
                    let delivery = client.poll(sub, &topic);
                    client.ack(sub, delivery.tag);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..PAUSES {
            let before = answered.load(Ordering::Relaxed);
            broker.signal("STOP");
            thread::sleep(Duration::from_millis(3)); // the pause itself
            broker.signal("CONT");
            eventually("the clients to go on", || (answered.load(Ordering::Relaxed) > before + 1).then_some(()));
        }
        done.store(true, Ordering::Relaxed);
    });
}
