//! Thousands of clients at once: connect, log in, subscribe; and the same again after the broker was killed.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::KEY;
use crate::net::crowd::{self, Peer};
use crate::net::link::{HONEST, Link};
use crate::net::probe::{log_in, push_publish, push_subscribe};
use crate::net::stage::{Options, Outcome, Phase, Stage};
use crate::wire::Said;

const NAME: &str = "storm";
/// All clients come from one address: the worst case for limits by address.
const CROWD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// They listen to so many topics.
const TOPICS: usize = 100;
/// All are in by then, or some never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// What one idle connection may take, with all that belongs to it (DESIGN.md 9).
const BYTES_PER_CONNECTION: u64 = 20 * 1024;

/// How far a client has come, in `Peer::mark`.
const CONNECTING: usize = 0;
const SUBSCRIBED: usize = 1;
const SERVED: usize = 2;

pub fn run(options: &Options) -> Fallible<Outcome> {
    let mut stage = Stage::begin(options, NAME, &[])?;
    stage.rest(Phase::Before);
    let mut storm = Storm { peers: Vec::new(), topics: Vec::new(), refused: 0 };
    let rss = stage.process().rss;
    let first = stage.measured(Phase::During, |stage| storm.all_in(stage))?;
    let grown = stage.process().rss.saturating_sub(rss);
    stage.measured(Phase::During, |stage| storm.broadcast(stage))?;
    let refused = std::mem::take(&mut storm.refused);
    stage.figure(format!(
        "{} clients in after {:.2} s, {refused} turned away first",
        options.storm,
        first.as_secs_f64()
    ));
    let each = grown / options.storm.max(1) as u64;
    stage.figure(format!("{:.1} KiB each", each as f64 / 1024.0));
    stage.expect(each <= BYTES_PER_CONNECTION, || format!("{each} bytes of memory for each idle connection"));

    stage.restart()?;
    let again = stage.measured(Phase::During, |stage| storm.all_in(stage))?;
    stage.measured(Phase::During, |stage| storm.broadcast(stage))?;
    stage.figure(format!(
        "after kill -9: in again after {:.2} s, {} turned away first",
        again.as_secs_f64(),
        storm.refused
    ));
    let metrics = stage.metrics();
    let connections = metrics.get("connections");
    stage.expect(connections >= options.storm as u64, || format!("only {connections} connections are counted"));
    drop(storm);
    let left = stage.until(Duration::from_secs(20), |m| m.get("connections") <= 8).get("connections");
    stage.expect(left <= 8, || format!("{left} connections are left after all clients went"));
    stage.rest(Phase::After);
    stage.end(format!("{} clients, twice", options.storm))
}

struct Storm {
    peers: Vec<Peer>,
    /// By client; and since when it waits to try again.
    topics: Vec<usize>,
    /// Times a client was turned away, and came again.
    refused: usize,
}

impl Storm {
    /// Brings everybody in; how long it took until the last one had subscribed.
    fn all_in(&mut self, stage: &mut Stage<'_>) -> Fallible<Duration> {
        let begun = Instant::now();
        let at = stage.setup.address();
        // Clients of the last broker find it gone.
        crowd::turn(&mut self.peers, Duration::ZERO)?;
        self.peers.clear();
        self.topics = (0..stage.options.storm).map(|number| number % TOPICS).collect();
        for topic in self.topics.clone() {
            self.peers.push(come(at, topic)?);
        }
        let mut retry_at: Vec<Option<Instant>> = vec![None; self.peers.len()];
        while begun.elapsed() < PATIENCE {
            crowd::turn(&mut self.peers, Duration::from_millis(10))?;
            let mut waiting = 0;
            for (number, peer) in self.peers.iter_mut().enumerate() {
                while let Some(said) = peer.hear() {
                    match said {
                        Said::Subscribed { .. } => peer.mark = SUBSCRIBED,
                        Said::Error { code, text, .. } => {
                            stage.expect(false, || format!("a client was told {code} {text}"))
                        }
                        _ => {}
                    }
                }
                if !peer.is_open() {
                    let due = *retry_at[number].get_or_insert_with(|| Instant::now() + stage.rng.millis(50, 500));
                    if due <= Instant::now() {
                        retry_at[number] = None;
                        self.refused += 1;
                        *peer = come(at, self.topics[number])?;
                    }
                }
                waiting += usize::from(peer.mark == CONNECTING);
            }
            if waiting == 0 {
                return Ok(begun.elapsed());
            }
        }
        let left = self.peers.iter().filter(|peer| peer.mark == CONNECTING).count();
        stage.expect(false, || format!("{left} clients could not subscribe within {} s", PATIENCE.as_secs()));
        Ok(begun.elapsed())
    }

    /// One message to each topic reaches everybody.
    fn broadcast(&mut self, stage: &mut Stage<'_>) -> Fallible<()> {
        let mut publisher = Link::connect(HONEST, stage.setup.address(), None)?;
        if let Err(error) = log_in(&mut publisher) {
            stage.expect(false, || format!("among all these clients one more cannot log in: {error}"));
            return Ok(());
        }
        for topic in 0..TOPICS {
            push_publish(&mut publisher, 10, &name(topic), 0, b"everybody");
        }
        let begun = Instant::now();
        let mut left = usize::MAX;
        while left > 0 && begun.elapsed() < PATIENCE {
            publisher.flush()?;
            crowd::turn(&mut self.peers, Duration::from_millis(10))?;
            left = 0;
            for peer in self.peers.iter_mut() {
                while let Some(said) = peer.hear() {
                    if matches!(said, Said::Deliver { .. }) {
                        peer.mark = SERVED;
                    }
                }
                left += usize::from(peer.mark != SERVED);
            }
        }
        stage.expect(left == 0, || format!("{left} clients did not get the message that everybody gets"));
        Ok(())
    }
}

fn name(topic: usize) -> String {
    format!("storm.{topic}")
}

/// Connects, and has all it wants to say ready for when that worked.
fn come(at: std::net::SocketAddr, topic: usize) -> std::io::Result<Peer> {
    let mut peer = Peer::connect(CROWD, at)?;
    peer.link.push_login(2, KEY);
    push_subscribe(&mut peer.link, 3, &name(topic), None, 10);
    Ok(peer)
}
