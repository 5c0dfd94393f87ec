//! Consumers that subscribe, get deliveries, and never read one.

use std::time::{Duration, Instant};

use crate::Fallible;
use crate::net::crowd::Peer;
use crate::net::link::{HONEST, Link};
use crate::net::probe::{log_in, push_publish, subscribe};
use crate::net::stage::{Options, Outcome, Phase, Stage};
use crate::net::watch::mib;
use crate::wire::{ACK, Outcome as Confirm, Said};

const NAME: &str = "stalled";
const TOPIC: &str = "stalled.durable";
const TOPIC_QOS0: &str = "stalled.fleeting";
/// What each stalled consumer's kernel keeps for it.
const RECEIVE_BUFFER: usize = 4 * 1024;
const MESSAGE: usize = 4 * 1024;
/// Messages a second of each QoS, to everybody.
const RATE: u64 = 200;
const BUDGET: u64 = 64 << 20;
/// What one consumer's outbox may take (DURABILITY 1.2): 256 KiB are handed to its connection, the buffers round that up.
const OUTBOX: u64 = 1024 * 1024;
/// Backlogs that are read to the end afterwards.
const DRAINED: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(options: &Options) -> Fallible<Outcome> {
    let settings = [
        ("BLIPMQ_STORAGE_MEMORY_BUDGET", "64MiB"),
        // Of these messages, not of the measuring client's, which are small.
        ("BLIPMQ_DELIVERY_QOS0_QUEUE_BYTES", "1MiB"),
        // They are to stay, for as long as this takes.
        ("BLIPMQ_NET_TCP_USER_TIMEOUT_MS", "600000"),
        ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000"),
    ];
    let mut stage = Stage::begin(options, NAME, &settings)?;
    stage.rest(Phase::Before);
    let (rss, sockets) = (stage.process().rss, socket_memory());
    let mut peers = Vec::new();
    for number in 0..options.stalled {
        let mut link = Link::connect(HONEST, stage.setup.address(), Some(RECEIVE_BUFFER))?;
        log_in(&mut link)?;
        // Every other one is durable.
        let durable = number.is_multiple_of(2).then(|| format!("stalled-{number}"));
        let topic = if durable.is_some() { TOPIC } else { TOPIC_QOS0 };
        let sub = subscribe(&mut link, topic, durable.as_deref())?;
        let mut peer = Peer::new(link);
        peer.mark = sub as usize;
        peers.push(peer);
    }
    let sent = stage.measured(Phase::During, flood)?;
    let durable = options.stalled.div_ceil(2) as u64;
    let metrics = stage.until(options.grace, |m| m.get("queue_waiting") >= durable * sent);
    let kernel = socket_memory().saturating_sub(sockets);
    stage.rest(Phase::After);
    let grown = stage.process().rss_peak.saturating_sub(rss);

    let dropped = metrics.get("queue_lost_total{cause=\"dropped_oldest\"}");
    let waiting = metrics.get("queue_waiting");
    stage.expect(dropped > 0, || "no QoS0 message is counted as dropped".into());
    stage.expect(waiting >= durable * sent, || {
        format!("{waiting} messages wait, {} should: {sent} for each of {durable}", durable * sent)
    });
    let allowed = BUDGET + options.stalled as u64 * OUTBOX;
    stage.expect(grown <= allowed, || format!("memory grew by {:.0} MiB, {:.0} are allowed", mib(grown), mib(allowed)));
    let backlog = waiting as f64 * MESSAGE as f64 / f64::from(1 << 20);
    stage.figure(format!("{waiting} messages ({backlog:.0} MiB) wait, {dropped} QoS0 dropped and counted"));
    stage.figure(format!("memory grew by {:.0} MiB, the kernel's for sockets by {:.0} MiB", mib(grown), mib(kernel)));

    let mut drained = 0;
    for peer in peers.iter_mut().step_by(2).take(DRAINED) {
        match drain(peer, sent) {
            Ok(()) => drained += 1,
            Err(why) => stage.expect(false, || format!("a consumer that reads again: {why}")),
        }
    }
    stage.figure(format!("{drained} backlogs read to the end, complete and in order"));
    let closed = metrics.get("connections");
    stage.expect(closed >= options.stalled as u64, || {
        format!("only {closed} connections are left of {}", options.stalled)
    });
    stage.end(format!("{} consumers, {sent} messages of {MESSAGE} bytes to each", options.stalled))
}

/// What all TCP sockets of this machine hold.
fn socket_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:")).unwrap_or_default();
    let pages =
        line.split_whitespace().skip_while(|word| *word != "mem").nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or_default() * 4096
}

/// Publishes to both topics for the time of the phase, and until all is confirmed; how many to each.
fn flood(stage: &mut Stage<'_>) -> Fallible<u64> {
    let mut link = Link::connect(HONEST, stage.setup.address(), None)?;
    log_in(&mut link)?;
    let begun = Instant::now();
    // Enough of them to fill whatever lies between.
    let least = 2 * OUTBOX / MESSAGE as u64;
    let (mut sent, mut confirmed) = (0, 0);
    let mut payload = vec![0; MESSAGE];
    let mut last = Instant::now();
    loop {
        let more = begun.elapsed() < stage.options.during || sent < least;
        while more && begun.elapsed() >= Duration::from_micros(1_000_000 / RATE * sent) {
            sent += 1;
            payload[..8].copy_from_slice(&sent.to_be_bytes());
            push_publish(&mut link, sent, TOPIC, 1, &payload);
            push_publish(&mut link, sent, TOPIC_QOS0, 0, &payload);
        }
        if let Some(said) = link.wait_hear(Duration::from_millis(5))? {
            last = Instant::now();
            match said {
                Said::Confirm { outcome: Confirm::Stored, .. } => confirmed += 1,
                other => stage.expect(false, || format!("a publish was answered with {other:?}")),
            }
        }
        if !more && confirmed == sent {
            return Ok(sent);
        }
        if last.elapsed() > PATIENCE {
            stage.expect(false, || format!("{confirmed} of {sent} publishes were confirmed"));
            return Ok(sent);
        }
    }
}

/// Reads and acknowledges: 1, 2, 3, … `sent`, nothing twice unless flagged.
fn drain(peer: &mut Peer, sent: u64) -> Result<(), String> {
    let mut expected = 1;
    let mut last = Instant::now();
    while expected <= sent {
        if last.elapsed() > PATIENCE {
            return Err(format!("stuck at {expected} of {sent}"));
        }
        let said = peer.link.wait_hear(Duration::from_millis(100)).map_err(|error| error.to_string())?;
        let Some(Said::Deliver { sub, tag, payload, redelivered, .. }) = said else { continue };
        last = Instant::now();
        let head = payload.first_chunk::<8>().ok_or("a short message")?;
        let seq = u64::from_be_bytes(*head);
        if seq != expected && !(redelivered && seq < expected) {
            return Err(format!("message {seq} where {expected} should be"));
        }
        expected = expected.max(seq + 1);
        peer.link.push(ACK, 1, |payload| {
            payload.extend_from_slice(&sub.to_be_bytes());
            payload.push(0);
            payload.extend_from_slice(&[tag.to_be_bytes(), tag.to_be_bytes()].concat());
        });
    }
    Ok(())
}
