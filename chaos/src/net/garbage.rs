//! Bytes that are no frames, in every state a connection can be in.

use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::KEY;
use crate::net::crowd::{self, Peer};
use crate::net::link::{ATTACKER, Link};
use crate::net::slowloris::{V1_PUBLISH, logged_in};
use crate::net::stage::{Options, Outcome, Phase, Stage};
use crate::net::watch::mib;
use crate::rng::Rng;
use crate::wire::{HELLO, PUBLISH, put_frame};

const NAME: &str = "garbage";
/// Connections at work at once.
const AT_ONCE: usize = 64;
/// Frames that claim to be as long as a frame may be, held open together.
const GIANTS: usize = 500;
const GIANT: u32 = 16 << 20;
/// What memory may grow by: a few buffers, not what was claimed.
const GROWTH: u64 = 64 << 20;

/// How far a connection came before the garbage.
#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    Connected,
    Greeted,
    Open,
}

/// What it sends then.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Garbage {
    /// Random bytes; the first four are no length.
    Noise,
    /// A length above the largest, and none above zero.
    TooLong,
    TooShort,
    /// A whole frame of a type nobody knows.
    UnknownType,
    /// A frame whose end never comes, because the client goes.
    Truncated,
    /// A whole frame of a known type, its payload random: answered, and the connection lives on.
    BadPayload,
}

const STATES: [State; 3] = [State::Connected, State::Greeted, State::Open];
const KINDS: [Garbage; 6] = [
    Garbage::Noise,
    Garbage::TooLong,
    Garbage::TooShort,
    Garbage::UnknownType,
    Garbage::Truncated,
    Garbage::BadPayload,
];

pub fn run(options: &Options) -> Fallible<Outcome> {
    let mut stage = Stage::begin(options, NAME, &[("BLIPMQ_NET_FRAME_TIMEOUT_MS", "600000")])?;
    let before = stage.metrics();
    stage.rest(Phase::Before);
    let rss = stage.process().rss;
    let sent = stage.measured(Phase::During, attack)?;
    let after = stage.until(options.grace, |m| {
        m.get("connections") <= before.get("connections")
            && m.by("connections_closed_total", "protocol") >= sent.broken as u64
    });
    stage.rest(Phase::After);
    let grown = stage.process().rss_peak.saturating_sub(rss);

    let closed = after.by("connections_closed_total", "protocol") - before.by("connections_closed_total", "protocol");
    stage.expect(closed == sent.broken as u64, || {
        format!("{closed} connections are counted as closed for their bytes, {} should be", sent.broken)
    });
    let left = after.get("connections");
    stage.expect(left <= before.get("connections"), || format!("{left} connections are left"));
    stage.expect(grown <= GROWTH, || {
        format!("memory grew by {:.0} MiB: {GIANTS} frames claimed {} MiB each", mib(grown), GIANT >> 20)
    });
    stage.figure(format!(
        "{} broken connections closed and counted, {} malformed payloads outlived",
        sent.broken, sent.survived
    ));
    stage.figure(format!("memory grew by {:.0} MiB while {:.0} MiB were claimed", mib(grown), mib(sent.claimed)));
    stage.end(format!("{} connections with garbage", sent.broken + sent.survived + sent.truncated))
}

#[derive(Default)]
struct Sent {
    broken: usize,
    survived: usize,
    truncated: usize,
    claimed: u64,
}

fn attack(stage: &mut Stage<'_>) -> Fallible<Sent> {
    let mut sent = Sent::default();
    let mut giants = giants(stage, &mut sent)?;
    let mut rng = Rng::derive(stage.options.seed, &[77]);
    let begun = Instant::now();
    while begun.elapsed() < stage.options.during || sent.broken < 100 {
        round(stage, &mut rng, &mut sent)?;
        if stage.broker.still_runs().is_err() || begun.elapsed() > stage.options.during + stage.options.grace {
            break;
        }
    }
    crowd::turn(&mut giants, Duration::ZERO)?;
    let open = crowd::open(&giants);
    stage.expect(open == GIANTS, || format!("only {open} of {GIANTS} long frames were waited for"));
    Ok(sent)
}

/// One connection for each of `AT_ONCE` draws: brought into its state, given its garbage, looked at.
fn round(stage: &mut Stage<'_>, rng: &mut Rng, sent: &mut Sent) -> Fallible<()> {
    let (mut broken, mut alive) = (Vec::new(), Vec::new());
    for _ in 0..AT_ONCE {
        let (state, kind) = (*rng.pick(&STATES), *rng.pick(&KINDS));
        let version = *rng.pick(&[1u16, 2]);
        let mut link = Link::connect(ATTACKER, stage.setup.address(), None)?;
        match state {
            State::Connected => {}
            State::Greeted => link.push(HELLO, 1, |payload| payload.extend_from_slice(&version.to_be_bytes())),
            State::Open => link.push_login(version, KEY),
        }
        if state == State::Open && !logged_in(&mut link, version)? {
            stage.expect(false, || "the right key was refused".into());
            continue;
        }
        link.push_bytes(&garbage(kind, state, version, rng));
        let peer = Peer::new(link);
        match kind {
            Garbage::Truncated => {
                sent.truncated += 1;
                let mut alone = [peer];
                crowd::turn(&mut alone, Duration::from_millis(5))?;
            }
            Garbage::BadPayload => alive.push(peer),
            _ => broken.push((peer, state, kind)),
        }
    }
    sent.broken += broken.len();
    sent.survived += alive.len();
    let (mut peers, what): (Vec<Peer>, Vec<(State, Garbage)>) =
        broken.into_iter().map(|(peer, state, kind)| (peer, (state, kind))).unzip();
    let left = crowd::until_closed(&mut peers, stage.options.grace)?;
    let first = peers.iter().position(Peer::is_open).map(|at| what[at]);
    stage.expect(left == 0, || format!("{left} connections are open in spite of their bytes, one with {first:?}"));
    // Two turns, so that an end would have been seen.
    crowd::turn(&mut alive, Duration::from_millis(20))?;
    crowd::turn(&mut alive, Duration::ZERO)?;
    let open = crowd::open(&alive);
    stage.expect(open == alive.len(), || format!("{} were closed for a malformed payload", alive.len() - open));
    Ok(())
}

fn garbage(kind: Garbage, state: State, version: u16, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    let known = match (state, version) {
        (State::Open, 2) => PUBLISH,
        (State::Open, _) => V1_PUBLISH,
        _ => HELLO,
    };
    let noise = |count: u64, rng: &mut Rng| (0..count).map(|_| rng.draw() as u8).collect::<Vec<u8>>();
    match kind {
        Garbage::Noise => {
            // 2^28 and more: no length of a frame.
            bytes.push(rng.between(0x10, 0xff) as u8);
            let count = rng.between(3, 2_000);
            bytes.extend(noise(count, rng));
        }
        Garbage::TooLong => bytes.extend((rng.between(u64::from(GIANT) + 1, u64::from(u32::MAX)) as u32).to_be_bytes()),
        Garbage::TooShort => bytes.extend((rng.between(0, 8) as u32).to_be_bytes()),
        Garbage::UnknownType => put_frame(&mut bytes, rng.between(0x40, 0xff) as u8, 5, |_| {}),
        Garbage::Truncated => {
            put_frame(&mut bytes, known, 5, |payload| payload.extend_from_slice(&[0; 300]));
            bytes.truncate(rng.between(1, 200) as usize);
        }
        // A topic's length beyond the end of the frame.
        Garbage::BadPayload => put_frame(&mut bytes, known, 5, |payload| payload.extend_from_slice(&[0xff; 3])),
    }
    bytes
}

/// Logged in; a header that claims 16 MiB, one byte of them, and then nothing.
fn giants(stage: &mut Stage<'_>, sent: &mut Sent) -> Fallible<Vec<Peer>> {
    let mut peers = Vec::new();
    for number in 0..GIANTS {
        let version = 1 + (number % 2) as u16;
        let mut link = Link::connect(ATTACKER, stage.setup.address(), None)?;
        link.push_login(version, KEY);
        if !logged_in(&mut link, version)? {
            return Err("the right key was refused".into());
        }
        link.push_bytes(&GIANT.to_be_bytes());
        link.push_bytes(&[if version == 1 { V1_PUBLISH } else { PUBLISH }, 0, 0]);
        link.flush()?;
        sent.claimed += u64::from(GIANT);
        peers.push(Peer::new(link));
    }
    Ok(peers)
}
