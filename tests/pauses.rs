//! A broker that loses its CPU for a moment, again and again, goes on by itself.
//!
//! One guard against turns lost while the process stands still (the reason for driver/beat.rs). It shows that a client in a
//! closed loop gets on after each pause; it is no proof of the beat, since with the beat taken out it passed here, too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use support::{Broker, eventually};

const PAUSES: u32 = 600;

#[test]
fn a_broker_that_is_paused_goes_on() {
    // One core, one client, no checkpoint: nothing else wakes the core when its client's turn is lost.
    let broker = Broker::start(&[("BLIPMQ_SHARDS_COUNT", "1"), ("BLIPMQ_STORAGE_CHECKPOINT_INTERVAL_MS", "600000")]);
    let (answered, done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = broker.v1();
            let sub = client.subscribe("paused", 1);
            // Each answer is waited for with a deadline; a client that waits in vain fails the test.
            while !done.load(Ordering::Relaxed) {
                client.publish("paused", 1, b"on");
                let delivery = client.poll(sub, "paused");
                client.ack(sub, delivery.tag);
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
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
