//! Wrong keys: a hundred a second, each on a connection of its own, then as fast as they are taken.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::net::crowd::{self, Newcomers, Peer};
use crate::net::link::{ATTACKER, HONEST, Link};
use crate::net::probe::log_in;
use crate::net::stage::{Options, Outcome, Phase, Stage, Summary};
use crate::rng::Rng;
use crate::wire::{AUTH, HELLO, Said, put_string};

const NAME: &str = "brute-force";
/// The one who tries a hundred a second.
const PATIENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 67);
const PACE: Duration = Duration::from_millis(10);
/// Connections of the one who tries flat out, and keys under way on each.
const FLAT_OUT: usize = 64;
const UNDER_WAY: usize = 16;
/// docs/OPERATIONS.md: so many wrong keys of one address are answered at once, by each core.
const BURST: f64 = 64.0;

pub fn run(options: &Options) -> Fallible<Outcome> {
    // Short, so that a quick run sees that guessing wins no time.
    let mut stage = Stage::begin(options, NAME, &[("BLIPMQ_NET_AUTH_DEADLINE_MS", "1000")])?;
    let before = stage.metrics();
    stage.rest(Phase::Before);
    let (paced, flat, logins) = stage.measured(Phase::During, |stage| -> Fallible<_> {
        let newcomers = Newcomers::start(HONEST, stage.setup.address());
        let half = stage.options.during / 2;
        let paced = guess(stage, half, PATIENT, true)?;
        let flat = guess(stage, half, ATTACKER, false)?;
        // Whoever shares the attacker's address, and has the right key, waits a second and is let in.
        let shared = Link::connect(ATTACKER, stage.setup.address(), None).and_then(|mut link| log_in(&mut link));
        stage.expect(shared.is_ok(), || format!("the right key from the attacker's address: {shared:?}"));
        Ok((paced, flat, newcomers.end()))
    })?;
    let after = stage.metrics();
    stage.rest(Phase::After);

    stage.expect(!logins.took.is_empty() && logins.refused.is_empty(), || {
        format!(
            "newcomers: {} logged in, {} could not: {:?}",
            logins.took.len(),
            logins.refused.len(),
            logins.refused.first()
        )
    });
    let cores = f64::from(stage.options.cores);
    for (who, guesses) in [("paced", &paced), ("flat out", &flat)] {
        stage.expect(guesses.let_in == 0, || format!("{who}: {} wrong keys were let in", guesses.let_in));
        // A burst, one more each second, and then one a second on each connection: per core, and rounded up.
        let allowed = cores * (BURST + guesses.time + 1.0) + guesses.connection_seconds + guesses.connections as f64;
        stage.expect(guesses.answered as f64 <= allowed, || {
            format!("{who}: {} wrong keys were answered, {allowed:.0} may be", guesses.answered)
        });
        stage.figure(format!(
            "{who}: {} keys sent on {} connections, {} answered ({:.0}/s)",
            guesses.sent,
            guesses.connections,
            guesses.answered,
            guesses.answered as f64 / guesses.time
        ));
    }
    let failures = after.get("auth_failures_total") - before.get("auth_failures_total");
    let answered = paced.answered + flat.answered;
    stage.expect(failures >= answered && failures <= paced.sent + flat.sent, || {
        format!("{failures} failures are counted, {answered} were answered")
    });
    let closed = after.by("connections_closed_total", "auth_deadline");
    stage.expect(flat.oldest < Duration::from_secs(1 + 1) + options.grace, || {
        format!("guessing kept a connection for {:.1} s, the deadline is 1 s", flat.oldest.as_secs_f64())
    });
    stage.expect(closed > 0, || "no guessing connection was closed for its auth deadline".into());
    let took = Summary::of(logins.took);
    stage.figure(format!("{} newcomers logged in, p99 {:.1} ms", took.count, took.p99.as_secs_f64() * 1e3));
    stage.end(format!("{} wrong keys", paced.sent + flat.sent))
}

#[derive(Default)]
struct Guesses {
    sent: u64,
    answered: u64,
    let_in: u64,
    connections: usize,
    /// Lives of all connections, added up.
    connection_seconds: f64,
    oldest: Duration,
    time: f64,
}

fn guess(stage: &mut Stage<'_>, time: Duration, from: Ipv4Addr, paced: bool) -> Fallible<Guesses> {
    let at = stage.setup.address();
    let begun = Instant::now();
    // Until the first connections have met their deadline.
    let time = time.max(Duration::from_millis(2_500));
    let mut rng = Rng::derive(stage.options.seed, &[u64::from(paced)]);
    let mut guesses = Guesses::default();
    let mut peers: Vec<Peer> = Vec::new();
    let mut due = Instant::now();
    while begun.elapsed() < time {
        if paced {
            while due <= Instant::now() {
                due += PACE;
                let mut peer = open(at, from)?;
                push_guess(&mut peer, &mut rng);
                guesses.sent += 1;
                guesses.connections += 1;
                peers.push(peer);
            }
        } else {
            while peers.len() < FLAT_OUT {
                peers.push(open(at, from)?);
                guesses.connections += 1;
            }
            for peer in peers.iter_mut() {
                while peer.mark < UNDER_WAY {
                    push_guess(peer, &mut rng);
                    peer.mark += 1;
                    guesses.sent += 1;
                }
            }
        }
        crowd::turn(&mut peers, Duration::from_millis(5))?;
        for peer in peers.iter_mut() {
            while let Some(said) = peer.hear() {
                match said {
                    Said::Error { code: 401, .. } => {
                        guesses.answered += 1;
                        peer.mark = peer.mark.saturating_sub(1);
                        // The patient one has his answer and goes.
                        if paced {
                            peer.ended.get_or_insert_with(Instant::now);
                        }
                    }
                    Said::Ok { .. } => guesses.let_in += 1,
                    _ => {}
                }
            }
        }
        peers.retain(|peer| {
            let open = peer.is_open();
            if !open {
                guesses.count(peer);
            }
            open
        });
    }
    peers.iter().for_each(|peer| guesses.count(peer));
    guesses.time = begun.elapsed().as_secs_f64();
    Ok(guesses)
}

impl Guesses {
    fn count(&mut self, peer: &Peer) {
        self.connection_seconds += peer.lived().as_secs_f64();
        self.oldest = self.oldest.max(peer.lived());
    }
}

fn open(at: std::net::SocketAddr, from: Ipv4Addr) -> std::io::Result<Peer> {
    let mut peer = Peer::connect(from, at)?;
    peer.link.push(HELLO, 1, |payload| payload.extend_from_slice(&2u16.to_be_bytes()));
    Ok(peer)
}

fn push_guess(peer: &mut Peer, rng: &mut Rng) {
    let key = format!("guess-{:016x}", rng.draw());
    peer.link.push(AUTH, 2, |payload| put_string(payload, &key));
}
