//! Peers that vanish without a word: their sessions end, and what they held goes to somebody else, flagged.
//!
//! Two ways to vanish: behind a proxy that lets nothing pass (its kernel goes on acknowledging: only a PING finds out), and for
//! good (nothing is acknowledged any more: the kernel finds out, too, which is all v1 has).

use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::KEY;
use crate::net::crowd::{self, Peer};
use crate::net::link::{HONEST, Link};
use crate::net::probe::{log_in, push_publish, push_subscribe};
use crate::net::proxy::{Fault, Proxy};
use crate::net::slowloris::{V1_ACK, V1_PUBLISH, logged_in};
use crate::net::stage::{Options, Outcome, Phase, Stage};
use crate::wire::{Cursor, Outcome as Confirm, Said, put_string};

const NAME: &str = "half-open";
/// Of each kind.
const VICTIMS: usize = 10;
/// Deliveries each holds unacknowledged.
const HELD: usize = 5;
/// Keepalive of 1 s: pinged after 1, 2 and 3 s, closed after 4. User timeout of 2 s.
const SESSION_ENDS: Duration = Duration::from_secs(4);
/// What needs no deadline of the broker's happens by then.
const PATIENCE: Duration = Duration::from_secs(10);

const V1_SUBSCRIBE: u8 = 0x04;
const V1_POLL: u8 = 0x09;

pub fn run(options: &Options) -> Fallible<Outcome> {
    let settings = [
        ("BLIPMQ_NET_KEEPALIVE_MS", "1000"),
        ("BLIPMQ_NET_TCP_USER_TIMEOUT_MS", "2000"),
        // Only the end of the session gives back what was delivered.
        ("BLIPMQ_DELIVERY_ACK_TIMEOUT_MS", "600000"),
        ("BLIPMQ_RETRY_BACKOFF_MS", "600000"),
    ];
    let mut stage = Stage::begin(options, NAME, &settings)?;
    stage.rest(Phase::Before);
    let before = stage.metrics();
    let proxy = Proxy::start(stage.setup.address(), options.seed)?;
    let (closed, back) = stage.measured(Phase::During, |stage| vanish(stage, &proxy, before.get("connections")))?;
    let after = stage.metrics();
    stage.rest(Phase::After);
    proxy.set(Fault::Clear);

    let grown = |reason| after.by("connections_closed_total", reason) - before.by("connections_closed_total", reason);
    let (silent, socket) = (grown("silent"), grown("socket"));
    stage.expect(silent >= VICTIMS as u64, || format!("{silent} sessions ended for their silence, {VICTIMS} should"));
    stage.expect(silent + socket >= 4 * VICTIMS as u64, || {
        format!("{silent} sessions ended for silence and {socket} by the kernel, of {}", 4 * VICTIMS)
    });
    match closed {
        Some(time) => stage.figure(format!(
            "all sessions over after {:.1} s ({silent} silent, {socket} by the kernel)",
            time.as_secs_f64()
        )),
        None => stage.expect(false, || "some sessions of vanished peers have not ended".into()),
    }
    stage.figure(format!("{back} deliveries came to another consumer, flagged"));
    stage.end(format!("{} vanished peers", 4 * VICTIMS))
}

/// Somebody who holds deliveries.
struct Victim {
    link: Link,
    topic: String,
}

/// How long until all sessions were over (`None`: they were not), and how many deliveries came back flagged.
fn vanish(stage: &mut Stage<'_>, proxy: &Proxy, connections: u64) -> Fallible<(Option<Duration>, usize)> {
    let at = stage.setup.address();
    let mut publisher = Link::connect(HONEST, at, None)?;
    log_in(&mut publisher)?;
    let (mut v2, mut v1, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..VICTIMS {
        for (kind, to) in [("proxied", proxy.address), ("silent", at)] {
            let topic = format!("half-open.{kind}.{number}");
            let link = Link::connect(HONEST, to, None)?;
            v2.push(victim_v2(stage, link, topic, &mut publisher)?);
        }
        let topic = format!("half-open.v1.{number}");
        let link = Link::connect(HONEST, at, None)?;
        v1.push(victim_v1(stage, link, topic, &mut publisher)?);
        // A v1 client that only ever listens: nothing is under way to it, so only a probe can find it gone.
        let mut link = Link::connect(HONEST, at, None)?;
        link.push_login(1, KEY);
        let open = logged_in(&mut link, 1)?;
        stage.expect(open, || "an idle v1 client could not log in".into());
        idle.push(link);
        // Until they vanish, they answer their PINGs.
        v2.iter_mut().try_for_each(|victim: &mut Victim| answer_pings(&mut victim.link))?;
    }
    // Those who inherit attach before anybody vanishes.
    let mut heirs = Vec::new();
    for victim in &mut v2 {
        let mut heir = Link::connect(HONEST, at, None)?;
        log_in(&mut heir)?;
        push_subscribe(&mut heir, 3, &victim.topic, Some("half-open"), 100);
        heirs.push(Peer::new(heir));
        answer_pings(&mut victim.link)?;
    }
    heirs.push(Peer::new(publisher));
    let begun = Instant::now();
    proxy.set(Fault::Blackhole);
    for link in v2.iter().filter(|v| v.topic.contains("silent")).chain(&v1).map(|v| &v.link).chain(&idle) {
        link.fall_silent()?;
    }
    // The heirs and the publisher stay; the measuring client was counted before.
    let staying = connections + heirs.len() as u64;
    let mut over = None;
    let inherited = |heirs: &[Peer]| heirs.iter().map(|heir| heir.mark).sum::<usize>();
    while (over.is_none() || inherited(&heirs) < HELD * v2.len())
        && begun.elapsed() < SESSION_ENDS + stage.options.grace
    {
        crowd::turn(&mut heirs, Duration::from_millis(20))?;
        for heir in &mut heirs {
            while let Some(said) = heir.hear() {
                if let Said::Deliver { redelivered: true, attempt: 2.., payload, .. } = said {
                    // In the order in which they were published.
                    heir.mark += usize::from(payload == (heir.mark as u64).to_be_bytes());
                }
            }
        }
        if over.is_none() && stage.metrics().get("connections") <= staying {
            over = Some(begun.elapsed());
        }
    }
    for (victim, heir) in v2.iter().zip(&heirs) {
        stage.expect(heir.mark == HELD, || {
            format!("{}: {} of {HELD} came to another consumer, flagged, in order", victim.topic, heir.mark)
        });
    }
    let mut back = inherited(&heirs);
    for victim in v1 {
        let got = inherit_v1(at, &victim.topic)?;
        stage.expect(got == HELD, || format!("{}: {got} of {HELD} came to the next v1 subscriber", victim.topic));
        back += got;
    }
    Ok((over, back))
}

fn answer_pings(link: &mut Link) -> std::io::Result<()> {
    link.fill()?;
    while link.hear()?.is_some() {}
    link.flush()
}

fn publish(publisher: &mut Link, topic: &str) -> Fallible<()> {
    for cid in 0..HELD as u64 {
        push_publish(publisher, cid, topic, 1, &cid.to_be_bytes());
    }
    let mut confirmed = 0;
    let end = Instant::now() + PATIENCE;
    while confirmed < HELD && Instant::now() < end {
        if let Some(Said::Confirm { outcome: Confirm::Stored, .. }) = publisher.wait_hear(Duration::from_millis(50))? {
            confirmed += 1;
        }
    }
    Ok(())
}

/// Holds its credit's worth of deliveries and acknowledges none.
fn victim_v2(stage: &mut Stage<'_>, mut link: Link, topic: String, publisher: &mut Link) -> Fallible<Victim> {
    log_in(&mut link)?;
    push_subscribe(&mut link, 3, &topic, Some("half-open"), HELD as u32);
    let mut held = 0;
    let mut published = false;
    let end = Instant::now() + PATIENCE;
    while held < HELD && Instant::now() < end {
        match link.wait_hear(Duration::from_millis(50))? {
            Some(Said::Subscribed { .. }) => {
                publish(publisher, &topic)?;
                published = true;
            }
            Some(Said::Deliver { .. }) => held += 1,
            _ => {}
        }
    }
    stage.expect(published && held == HELD, || format!("{topic}: {held} of {HELD} were delivered at first"));
    Ok(Victim { link, topic })
}

fn victim_v1(stage: &mut Stage<'_>, mut link: Link, topic: String, publisher: &mut Link) -> Fallible<Victim> {
    link.push_login(1, KEY);
    logged_in(&mut link, 1)?;
    let sub = subscribe_v1(&mut link, &topic)?;
    publish(publisher, &topic)?;
    let held = poll_v1(&mut link, sub, HELD)?;
    stage.expect(held == HELD, || format!("{topic}: {held} of {HELD} were delivered at first"));
    Ok(Victim { link, topic })
}

fn inherit_v1(at: std::net::SocketAddr, topic: &str) -> Fallible<usize> {
    let mut link = Link::connect(HONEST, at, None)?;
    link.push_login(1, KEY);
    logged_in(&mut link, 1)?;
    let sub = subscribe_v1(&mut link, topic)?;
    Ok(poll_v1(&mut link, sub, HELD)?)
}

pub fn subscribe_v1(link: &mut Link, topic: &str) -> std::io::Result<u64> {
    link.push(V1_SUBSCRIBE, 5, |payload| {
        put_string(payload, topic);
        payload.push(1);
    });
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        match wait_frame(link, Duration::from_millis(50))? {
            Some(frame) if frame.kind == V1_ACK && frame.cid == 5 => return Cursor(&frame.payload).u64(),
            _ => {}
        }
    }
    Err(std::io::ErrorKind::TimedOut.into())
}

/// Polls until `count` came, or none for a while; acknowledges nothing.
fn poll_v1(link: &mut Link, sub: u64, count: usize) -> std::io::Result<usize> {
    let mut got = 0;
    let mut end = Instant::now() + Duration::from_secs(3);
    let mut ask = true;
    while got < count && Instant::now() < end {
        if std::mem::take(&mut ask) {
            link.push(V1_POLL, 6, |payload| payload.extend_from_slice(&sub.to_be_bytes()));
        }
        if let Some(frame) = wait_frame(link, Duration::from_millis(50))?
            && frame.kind == V1_PUBLISH
        {
            got += 1;
            ask = true;
            end = Instant::now() + Duration::from_secs(3);
        }
    }
    Ok(got)
}

fn wait_frame(link: &mut Link, wait: Duration) -> std::io::Result<Option<crate::wire::Frame>> {
    link.flush()?;
    if let Some(frame) = link.frame()? {
        return Ok(Some(frame));
    }
    crate::net::link::wait_for(&[link], wait)?;
    link.fill()?;
    link.frame()
}
