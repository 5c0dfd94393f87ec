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

/// Takes the last descriptors away, lets others knock, publishes enough that the log needs new segments; then gives them back.
fn in_earnest(stage: &mut Stage<'_>, limit: u64) -> Fallible<()> {
    let at = stage.setup.address();
    let mut publisher = Link::connect(HONEST, at, None)?;
    log_in(&mut publisher)?;
    subscribe(&mut publisher, "descriptors.kept", Some("keeper"))?;
    let refused_before = stage.metrics().by("connections_refused_total", "descriptors");
    let pid = Pid::from_raw(stage.broker.pid() as i32).ok_or("a broker has a pid")?;
    let soft = |current| Rlimit { current: Some(current), maximum: Some(limit) };
    // What is open stays open; the next one fails.
    prlimit(Some(pid), Resource::Nofile, soft(Process::files(stage.broker.pid())))?;
    let mut waiting = come(at, WAITING)?;
    let begun = Instant::now();
    let (mut sent, mut confirmed) = (0u64, 0);
    while begun.elapsed() < stage.options.during / 2 || confirmed < sent && begun.elapsed() < PATIENCE {
        if begun.elapsed() < stage.options.during / 2 && sent - confirmed < 32 {
            sent += 1;
            push_publish(&mut publisher, sent, "descriptors.kept", 1, &[7; 16 * 1024]);
        }
        match publisher.wait_hear(Duration::from_millis(if sent - confirmed < 32 { 1 } else { 20 }))? {
            Some(Said::Confirm { outcome: Confirm::Stored, .. }) => confirmed += 1,
            Some(Said::Confirm { outcome, .. }) => {
                stage.expect(false, || format!("a publish without descriptors: {outcome:?}"));
                break;
            }
            _ => {}
        }
    }
    crowd::turn(&mut waiting, Duration::ZERO)?;
    let logged_in = waiting.iter().filter(|p| p.mark == 1).count();
    stage.expect(confirmed == sent, || format!("{confirmed} of {sent} publishes were confirmed without descriptors"));
    prlimit(Some(pid), Resource::Nofile, soft(limit))?;
    // Metrics need a descriptor, too.
    let metrics = stage.until(PATIENCE, |m| m.by("connections_refused_total", "descriptors") > refused_before);
    let refused = metrics.by("connections_refused_total", "descriptors") - refused_before;
    stage.expect(refused > 0, || "no failed accept is counted".into());
    settle(&mut waiting)?;
    let served = waiting.iter().filter(|p| p.mark == 1).count();
    stage.expect(served == WAITING, || {
        format!("{served} of {WAITING} who waited were served when there were descriptors again")
    });
    stage.figure(format!(
        "none left: {confirmed} publishes ({} MiB) confirmed, {logged_in} of {WAITING} newcomers in; then {served}",
        confirmed * 16 / 1024
    ));
    Ok(())
}
