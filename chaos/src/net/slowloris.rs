//! Connections that drip: bytes of a HELLO and an AUTH that never become whole, and of a PUBLISH after the login.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::KEY;
use crate::net::crowd::{self, Newcomers, Peer};
use crate::net::link::{ATTACKER, HONEST, Link};
use crate::net::stage::{Options, Outcome, Phase, Stage, Summary};
use crate::wire::{PUBLISH, Said, put_string};

const NAME: &str = "slowloris";
const DEADLINE: Duration = Duration::from_millis(1_500);
const FRAME_TIMEOUT: Duration = Duration::from_secs(2);
const PER_ADDRESS: usize = 100;
const PER_CORE: usize = 400;
/// Connections one attacker keeps trying to hold; many attackers hold as many.
const HELD: usize = 1_000;
/// Of those that are turned away, so many are replaced between two bytes.
const NEW_AT_ONCE: usize = 50;
/// Slow frames after the login, of each dialect.
const SLOW_FRAMES: usize = 20;
/// From one byte to the next.
const DRIP: Duration = Duration::from_millis(50);
/// An honest login is answered by then.
const LOGIN_PATIENCE: Duration = Duration::from_secs(10);

pub fn run(options: &Options) -> Fallible<Outcome> {
    let settings = [
        ("BLIPMQ_NET_AUTH_DEADLINE_MS", "1500"),
        ("BLIPMQ_NET_UNAUTHENTICATED_PER_ADDRESS_MAX", "100"),
        ("BLIPMQ_NET_UNAUTHENTICATED_MAX", "400"),
        ("BLIPMQ_NET_FRAME_TIMEOUT_MS", "2000"),
    ];
    let mut stage = Stage::begin(options, NAME, &settings)?;
    let before = stage.metrics();
    stage.rest(Phase::Before);
    let attack = stage.measured(Phase::During, attack)?;
    let after = stage.until(options.grace, |m| m.get("connections") <= before.get("connections"));
    stage.rest(Phase::After);

    let grown = |reason| after.by("connections_closed_total", reason) - before.by("connections_closed_total", reason);
    let (late, slow, turned_away) = (grown("auth_deadline"), grown("slow_frame"), grown("refused"));
    let refused = after.by("connections_refused_total", "unauthenticated");
    stage.expect(refused > 0 && refused == turned_away, || {
        format!("{refused} connections are counted as refused, {turned_away} as closed for that")
    });
    stage.expect(late > 0, || "no connection was closed for its auth deadline".into());
    stage.expect(slow == 2 * SLOW_FRAMES as u64, || format!("{slow} of {} slow frames were closed", 2 * SLOW_FRAMES));
    stage.expect(after.get("connections") <= before.get("connections"), || {
        format!("{} connections are left, {} were there before", after.get("connections"), before.get("connections"))
    });
    stage.figure(format!(
        "{turned_away} turned away, {late} closed at the deadline of 1.5 s (the last {:.1} s after it came), {slow} slow frames \
         closed",
        attack.oldest.as_secs_f64()
    ));
    let logins = Summary::of(attack.logins);
    stage.figure(format!("{} newcomers logged in, p99 {:.1} ms", logins.count, logins.p99.as_secs_f64() * 1e3));
    stage.end(format!("{} dripping connections", attack.connections))
}

struct Attack {
    connections: usize,
    oldest: Duration,
    logins: Vec<Duration>,
}

fn attack(stage: &mut Stage<'_>) -> Fallible<Attack> {
    let at = stage.setup.address();
    let slow_frames = slow_frames(stage)?;
    let newcomers = Newcomers::start(HONEST, at);
    let from_one = |_: usize| ATTACKER;
    let cores = usize::from(stage.options.cores);
    let mut attack = Attack { connections: 0, oldest: Duration::ZERO, logins: Vec::new() };
    // One address takes the places of one address; others get in.
    hold(stage, &mut attack, &from_one, cores * PER_ADDRESS)?;
    let logins = newcomers.end();
    stage.expect(!logins.took.is_empty() && logins.refused.is_empty(), || {
        format!(
            "newcomers: {} logged in, {} could not: {:?}",
            logins.took.len(),
            logins.refused.len(),
            logins.refused.first()
        )
    });
    attack.logins = logins.took;
    // Many addresses together take all places, and no more; those who are logged in do not notice.
    let from_many = |number: usize| Ipv4Addr::new(127, 0, 1 + (number / 200 % 8) as u8, 1 + (number % 200) as u8);
    hold(stage, &mut attack, &from_many, cores * PER_CORE)?;

    let (mut slow, begun) = slow_frames;
    while crowd::open(&slow) > 0 && begun.elapsed() < FRAME_TIMEOUT + Duration::from_secs(1) + stage.options.grace {
        slow.iter_mut().for_each(|peer| peer.sends = 1);
        crowd::turn(&mut slow, DRIP)?;
        std::thread::sleep(DRIP);
    }
    let left = crowd::open(&slow);
    stage.expect(left == 0, || format!("{left} connections that drip a PUBLISH after the login are still open"));
    Ok(attack)
}

/// Keeps `HELD` dripping connections alive for half of the time, replacing those that are closed; then waits for the end of
/// the last. `places`: how many of them the broker may have at once.
fn hold(stage: &mut Stage<'_>, attack: &mut Attack, from: &dyn Fn(usize) -> Ipv4Addr, places: usize) -> Fallible<()> {
    let at = stage.setup.address();
    let begun = Instant::now();
    let time = (stage.options.during / 2).max(DEADLINE / 2);
    let mut peers: Vec<Peer> = Vec::new();
    let mut most = 0;
    let mut asked = Instant::now();
    while begun.elapsed() < time {
        for _ in 0..(HELD - peers.len()).min(NEW_AT_ONCE) {
            let mut peer = Peer::connect(from(attack.connections), at)?;
            peer.link.push_login(1 + (attack.connections % 2) as u16, "never-to-be-finished");
            peers.push(peer);
            attack.connections += 1;
        }
        drip(&mut peers)?;
        if asked.elapsed() > Duration::from_millis(500) {
            asked = Instant::now();
            most = most.max(stage.metrics().get("connections") as usize);
        }
        retire(&mut peers, attack);
    }
    // Beside the attack there are the measuring client's connections, slow frames and newcomers.
    let allowed = places + 4 + 2 * SLOW_FRAMES + 10;
    stage.expect(most <= allowed, || {
        format!("{most} connections at once, where {places} that are not logged in may be")
    });
    let end = Instant::now() + DEADLINE + stage.options.grace;
    while !peers.is_empty() && Instant::now() < end {
        drip(&mut peers)?;
        retire(&mut peers, attack);
    }
    let left = peers.len();
    stage.expect(left == 0, || format!("{left} connections that never log in are still open"));
    Ok(())
}

fn drip(peers: &mut [Peer]) -> Fallible<()> {
    let begun = Instant::now();
    for peer in peers.iter_mut() {
        peer.sends = 1;
        // The AUTH never gets its last byte.
        if peer.link.unsent() <= 1 {
            peer.sends = 0;
        }
    }
    crowd::turn(peers, DRIP)?;
    std::thread::sleep(DRIP.saturating_sub(begun.elapsed()));
    Ok(())
}

fn retire(peers: &mut Vec<Peer>, attack: &mut Attack) {
    peers.retain(|peer| {
        attack.oldest = attack.oldest.max(if peer.is_open() { Duration::ZERO } else { peer.lived() });
        peer.is_open()
    });
}

/// Logged in, and a PUBLISH of 1 MiB begun.
fn slow_frames(stage: &mut Stage<'_>) -> Fallible<(Vec<Peer>, Instant)> {
    let at = stage.setup.address();
    let mut peers = Vec::new();
    for version in [1u16, 2] {
        for _ in 0..SLOW_FRAMES {
            let mut link = Link::connect(HONEST, at, None)?;
            link.push_login(version, KEY);
            let ready = logged_in(&mut link, version)?;
            stage.expect(ready, || format!("a v{version} client could not log in"));
            let kind = if version == 1 { V1_PUBLISH } else { PUBLISH };
            link.push(kind, 9, |payload| {
                payload.extend_from_slice(if version == 1 { &[0] } else { &[0, 0] });
                put_string(payload, "slow.frames");
                payload.extend_from_slice(&vec![0; 1 << 20]);
            });
            link.flush_some(30)?;
            peers.push(Peer::new(link));
        }
    }
    Ok((peers, Instant::now()))
}

pub const V1_PUBLISH: u8 = 0x03;

/// Waits for the answer to `push_login`.
pub fn logged_in(link: &mut Link, version: u16) -> std::io::Result<bool> {
    let end = Instant::now() + LOGIN_PATIENCE;
    while Instant::now() < end {
        link.flush()?;
        if version == 1 {
            // Both HELLO and AUTH are answered by an ACK; the second carries the AUTH's correlation id.
            while let Some(frame) = link.frame()? {
                match (frame.kind, frame.cid) {
                    (V1_ACK, 2) => return Ok(true),
                    (V1_NACK, _) => return Ok(false),
                    _ => {}
                }
            }
        } else {
            while let Some(said) = link.hear()? {
                match said {
                    Said::Ok { cid: 2 } => return Ok(true),
                    Said::Error { .. } => return Ok(false),
                    _ => {}
                }
            }
        }
        crate::net::link::wait_for(&[link], Duration::from_millis(50))?;
        link.fill()?;
    }
    Ok(false)
}

pub const V1_ACK: u8 = 0x05;
pub const V1_NACK: u8 = 0x06;
