//! No file descriptors left: first by the broker's own count, then in earnest.
//!
//! The broker starts with a limit that leaves room for few connections: beyond it others are refused and counted. Then its limit
//! is lowered below what it has open, so that accepting fails; whoever is served, and the log, must not notice.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::Fallible;
use crate::broker::KEY;
use crate::net::crowd::{self, Peer};
use crate::net::link::{ATTACKER, HONEST, Link};
use crate::net::probe::{log_in, push_publish, subscribe};
use crate::net::stage::{Options, Outcome, Phase, Stage};
use crate::net::watch::Process;
use crate::wire::{Outcome as Confirm, Said};

const NAME: &str = "descriptors";
/// Beside its connections: 256, and 32 for each core (preflight).
const RESERVE: u64 = 256;
const PER_CORE: u64 = 32;
const ROOM: u64 = 150;
const WANTED: usize = 300;
/// Fewer than the broker keeps back for its log (limits.rs).
const LEFT: u64 = 40;
const TOPIC: &str = "descriptors.kept";
const MESSAGE: usize = 16 * 1024;
const UNDER_WAY: u64 = 32;
/// Who comes while there is no descriptor.
const WAITING: usize = 50;
const PATIENCE: Duration = Duration::from_secs(20);

pub fn run(options: &Options) -> Fallible<Outcome> {
    let limit = RESERVE + PER_CORE * u64::from(options.cores) + ROOM;
    let program = options.broker.clone();
    let mut stage = Stage::begin_with(options, NAME, &[], |folder| limited(folder, &program, limit))?;
    stage.rest(Phase::Before);
    let before = stage.metrics();
    let at = stage.setup.address();
    stage.measured(Phase::During, |stage| -> Fallible<()> {
        // More than there is room for.
        let mut peers = come(at, WANTED)?;
        settle(&mut peers)?;
        let (served, turned_away) = (peers.iter().filter(|p| p.mark == 1).count(), WANTED - crowd::open(&peers));
        let refused = stage.metrics().by("connections_refused_total", "connections");
        stage.expect(served + turned_away == WANTED && served > 0, || {
            format!("{served} of {WANTED} were served, {turned_away} turned away")
        });
        stage.expect(turned_away as u64 == refused && refused > 0, || {
            format!("{turned_away} were turned away, {refused} are counted")
        });
        stage.figure(format!("room for {ROOM}: {served} of {WANTED} served, {refused} refused and counted"));
        peers.truncate(served / 2);
        // Room again, and whoever comes is served.
        stage.until(PATIENCE, |m| m.get("connections") < ROOM / 2 + 50);
        let mut again = come(at, 10)?;
        settle(&mut again)?;
        let served = again.iter().filter(|p| p.mark == 1).count();
        stage.expect(served == again.len(), || format!("{served} of 10 were served when there was room again"));
        drop((peers, again));
        stage.until(PATIENCE, |m| m.get("connections") <= before.get("connections"));
        in_earnest(stage, limit)
    })?;
    let after = stage.until(PATIENCE, |m| m.get("connections") <= before.get("connections"));
    stage.expect(after.get("connections") <= before.get("connections"), || "connections are left".into());
    stage.rest(Phase::After);
    let files = Process::files(stage.broker.pid());
    stage.figure(format!("{files} descriptors open at the end"));
    stage.end(format!("RLIMIT_NOFILE {limit}, then none left"))
}

/// A program that lowers its limit and becomes the broker.
fn limited(folder: &Path, program: &Path, limit: u64) -> io::Result<PathBuf> {
    let script = folder.join("limited");
    fs::write(&script, format!("#!/bin/sh\nulimit -n {limit}\nexec '{}' \"$@\"\n", program.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

fn come(at: std::net::SocketAddr, count: usize) -> Fallible<Vec<Peer>> {
    let mut peers = Vec::new();
    for _ in 0..count {
        let mut peer = Peer::connect(ATTACKER, at)?;
        peer.link.push_login(2, KEY);
        peers.push(peer);
    }
    Ok(peers)
}

/// Until everybody is logged in (`mark` 1) or turned away.
fn settle(peers: &mut [Peer]) -> Fallible<()> {
    let end = Instant::now() + PATIENCE;
    while peers.iter().any(|peer| peer.is_open() && peer.mark == 0) && Instant::now() < end {
        crowd::turn(peers, Duration::from_millis(20))?;
        for peer in peers.iter_mut() {
            while let Some(said) = peer.hear() {
                if said == (Said::Ok { cid: 2 }) {
                    peer.mark = 1;
                }
            }
        }
    }
    Ok(())
}

/// Takes the descriptors away, lets others knock, publishes so much that the log needs new segments; then gives them back.
fn in_earnest(stage: &mut Stage<'_>, limit: u64) -> Fallible<()> {
    let at = stage.setup.address();
    let mut publisher = Link::connect(HONEST, at, None)?;
    log_in(&mut publisher)?;
    subscribe(&mut publisher, TOPIC, Some("keeper"))?;
    let pid = Pid::from_raw(stage.broker.pid() as i32).ok_or("a broker has a pid")?;
    let soft = |current| Rlimit { current: Some(current), maximum: Some(limit) };
    let time = stage.options.during / 4;

    // A few are left: for the log, and for nobody else.
    let refused_before = stage.metrics().by("connections_refused_total", "descriptors");
    prlimit(Some(pid), Resource::Nofile, soft(Process::files(stage.broker.pid()) + LEFT))?;
    let mut knocking = come(at, WAITING)?;
    let few = publish(&mut publisher, time)?;
    settle(&mut knocking)?;
    let served = knocking.iter().filter(|p| p.mark == 1).count();
    let refused = stage.metrics().by("connections_refused_total", "descriptors") - refused_before;
    stage.expect(few.stored == few.sent && few.sent > 0, || {
        format!("{LEFT} descriptors left: {} of {} publishes were confirmed", few.stored, few.sent)
    });
    stage.expect(served == 0 && refused == WAITING as u64, || {
        format!("{LEFT} descriptors left: {served} of {WAITING} got in, {refused} are counted as refused")
    });

    // None is left: the log may have to wait or to refuse, and says so; nobody is cut off, nothing is lost.
    prlimit(Some(pid), Resource::Nofile, soft(Process::files(stage.broker.pid())))?;
    let mut waiting = come(at, WAITING)?;
    let none = publish(&mut publisher, time)?;
    prlimit(Some(pid), Resource::Nofile, soft(limit))?;
    if let Err(why) = stage.broker.still_runs() {
        stage.expect(false, || format!("without descriptors the broker {why}"));
        return Ok(());
    }
    // Whoever knocked was turned away, or waited in the kernel's queue and is served now; and so is whoever comes now.
    settle(&mut waiting)?;
    let hang = waiting.iter().filter(|p| p.is_open() && p.mark == 0).count();
    stage
        .expect(hang == 0, || format!("{hang} of {WAITING} who knocked still wait though there are descriptors again"));
    let mut again = come(at, WAITING)?;
    settle(&mut again)?;
    let served = again.iter().filter(|p| p.mark == 1).count();
    stage.expect(served == WAITING, || format!("{served} of {WAITING} got in when there were descriptors again"));
    let begun = Instant::now();
    let mut healed = Published::default();
    while healed.stored == 0 && begun.elapsed() < PATIENCE {
        healed = publish(&mut publisher, Duration::ZERO)?;
    }
    stage.expect(healed.stored > 0, || "no publish is taken though there are descriptors again".into());
    stage.expect(none.stored + none.refused == none.sent, || {
        format!("no descriptors: {} of {} publishes had no answer", none.sent - none.stored - none.refused, none.sent)
    });
    stage.figure(format!(
        "{LEFT} left: {} MiB published, {refused} of {WAITING} newcomers refused and counted; none left: {} of {} publishes \
         confirmed, {} refused, and {served} of {WAITING} newcomers in afterwards",
        (few.stored * MESSAGE as u64) >> 20,
        none.stored,
        none.sent,
        none.refused
    ));
    Ok(())
}

#[derive(Default)]
struct Published {
    sent: u64,
    stored: u64,
    refused: u64,
}

/// Publishes for `time`, at least once, and waits for the answers.
fn publish(publisher: &mut Link, time: Duration) -> Fallible<Published> {
    let begun = Instant::now();
    let mut count = Published::default();
    loop {
        let open = count.sent - count.stored - count.refused;
        let more = begun.elapsed() < time || count.sent == 0;
        if more && open < UNDER_WAY {
            count.sent += 1;
            push_publish(publisher, count.sent, TOPIC, 1, &[7; MESSAGE]);
        } else if !more && open == 0 || begun.elapsed() > time + PATIENCE {
            return Ok(count);
        }
        match publisher.wait_hear(Duration::from_millis(if open < UNDER_WAY { 1 } else { 20 }))? {
            Some(Said::Confirm { outcome: Confirm::Stored, .. }) => count.stored += 1,
            Some(Said::Confirm { .. }) => count.refused += 1,
            _ => {}
        }
    }
}
