//! `chaos crash --protocol v1`: the same question, asked by clients without names and confirms (V1 B33, G1, G4).
//!
//! A round: subscribe QoS1, publish 30, poll them, acknowledge 10, kill -9, restart, subscribe again with the same key:
//! the other 20, only those, in order. Then these are acknowledged too, and after another kill nothing may come.
//!
//! v1 tells a client neither when its publish nor when its acknowledgement is on disk, so the kill waits `GRACE`.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use crate::Fallible;
use crate::broker::{self, Broker, KEY, Setup};
use crate::crash::{Options, campaigns};
use crate::message::MessageId;
use crate::oracle::{Kind, Verdict};
use crate::report::Report;
use crate::rng::Rng;
use crate::wire::{Cursor, HELLO, Wire, put_string};

const AUTH: u8 = 0x02;
const PUBLISH: u8 = 0x03;
const SUBSCRIBE: u8 = 0x04;
const ACK: u8 = 0x05;
const NACK: u8 = 0x06;
const POLL: u8 = 0x09;

const MESSAGES: u64 = 30;
const ACKED: usize = 10;
/// An idle broker has written and synced by then, whatever its policy.
const GRACE: Duration = Duration::from_millis(500);
/// A message that has not come by then does not come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Nothing comes for so long: nothing is there.
const SILENCE: Duration = Duration::from_millis(400);
const READY_PATIENCE: Duration = Duration::from_secs(60);

pub fn run(options: &Options) -> Fallible<Report> {
    let started = Instant::now();
    let mut report =
        Report { protocol: "v1", seed: options.seed, policies: options.policies.clone(), ..Report::default() };
    for (number, (policy, rounds)) in campaigns(&options.policies, options.rounds).into_iter().enumerate() {
        let mut rng = Rng::derive(options.seed, &[number as u64, 1]);
        let folder = options.folder.join(format!("{}-v1-{number:03}-{}", options.seed, policy.replace(':', "-")));
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        let (port, metrics_port) = broker::free_ports(rng.draw())?;
        let mut extra = options.extra.clone();
        // Within a run nothing is redelivered by time.
        extra.push(("BLIPMQ_RETRY_BACKOFF_MS".into(), "60000".into()));
        let setup = Setup { program: options.broker.clone(), folder, policy, port, metrics_port, extra };
        let mut store = Store { options, setup, rng, run: 0, verdict: Verdict::default() };
        for round in 0..rounds {
            report.rounds += 1;
            let ended = store.round(round as u16, &mut report)?;
            eprintln!("round {:>4} {:<14} v1: {}", report.rounds, store.setup.policy, ended.unwrap_or_else(|e| e));
            if !store.verdict.is_clean() {
                break;
            }
        }
        report.verdict.add(&store.verdict);
        if store.verdict.is_clean() && !options.keep {
            std::fs::remove_dir_all(&store.setup.folder)?;
        } else {
            report.artefacts.push(store.setup.folder.display().to_string());
        }
    }
    report.seconds = started.elapsed().as_secs_f64();
    report.settle();
    Ok(report)
}

struct Store<'a> {
    options: &'a Options,
    setup: Setup,
    rng: Rng,
    run: u32,
    verdict: Verdict,
}

/// What happened, in words; `Err`: and the round could not go on.
type Ended = Result<String, String>;

impl Store<'_> {
    fn round(&mut self, topic: u16, report: &mut Report) -> Fallible<Ended> {
        let name = format!("chaos.v1-{topic}");
        let ids: Vec<MessageId> = (1..=MESSAGES).map(|seq| MessageId { publisher: 0, topic, seq }).collect();

        let mut broker = match self.start(report)? {
            Ok(broker) => broker,
            Err(why) => return Ok(Err(why)),
        };
        let first = self.first_run(&name, &ids);
        broker = match self.settle_and_kill(broker, first.as_ref().err(), report)? {
            Ok(broker) => broker,
            Err(why) => return Ok(Err(why)),
        };
        let acked = first?;
        let waiting: Vec<u64> = (1..=MESSAGES).filter(|seq| !acked.contains(seq)).collect();
        let second = self.subscribe_again(&name, topic, &waiting, &acked);
        broker = match self.settle_and_kill(broker, second.as_ref().err(), report)? {
            Ok(broker) => broker,
            Err(why) => return Ok(Err(why)),
        };
        let back = second?;
        let all: BTreeSet<u64> = (1..=MESSAGES).collect();
        let third = self.subscribe_again(&name, topic, &[], &all);
        broker.kill()?;
        Ok(match third {
            Ok(none) => Ok(format!("{} acked, {back} came back, then {none}", acked.len())),
            Err(error) => Err(self.misbehaved(error.to_string())),
        })
    }

    fn start(&mut self, report: &mut Report) -> Fallible<Result<Broker, String>> {
        self.run += 1;
        report.restarts += u32::from(self.run > 1);
        let cores = *self.rng.pick(&self.options.cores);
        let mut broker = self.setup.start(self.run, cores)?;
        Ok(match broker.wait_ready(self.setup.address(), READY_PATIENCE) {
            Ok(ready) => {
                report.recoveries.push(ready);
                Ok(broker)
            }
            Err(why) => Err(self.misbehaved(format!("start failed: {why}"))),
        })
    }

    /// Kills the broker and starts it again at once. `trouble`: what the client met, which ends the round.
    fn settle_and_kill(
        &mut self,
        mut broker: Broker,
        trouble: Option<&io::Error>,
        report: &mut Report,
    ) -> Fallible<Result<Broker, String>> {
        std::thread::sleep(GRACE);
        let alive = broker.still_runs();
        broker.kill()?;
        match (alive, trouble) {
            (Err(why), _) => Ok(Err(self.misbehaved(why))),
            (_, Some(error)) => Ok(Err(self.misbehaved(error.to_string()))),
            _ => self.start(report),
        }
    }

    /// Subscribes, publishes, polls everything, acknowledges some: which.
    fn first_run(&mut self, name: &str, ids: &[MessageId]) -> io::Result<BTreeSet<u64>> {
        let mut client = Client::login(&self.setup)?;
        let sub = client.subscribe(name)?;
        for id in ids {
            client.publish(name, &id.encode());
        }
        client.wire.flush()?;
        let got = client.poll(sub, ids.len(), PATIENCE)?;
        self.verdict.published += MESSAGES;
        self.verdict.delivered += got.len() as u64;
        let seqs = self.seqs(&got, ids[0].topic);
        let all: Vec<u64> = (1..=MESSAGES).collect();
        for (kind, text) in judge(&all, &BTreeSet::new(), &seqs) {
            self.verdict.found(kind, format!("run {}, before the kill: {text}", self.run));
        }
        let mut choice: Vec<(u64, u64)> =
            got.iter().zip(&seqs).filter_map(|((tag, _), seq)| Some((*tag, (*seq)?))).collect();
        let mut acked = BTreeSet::new();
        while acked.len() < ACKED && !choice.is_empty() {
            let (tag, seq) = choice.swap_remove(self.rng.between(0, choice.len() as u64 - 1) as usize);
            client.ack(sub, tag);
            acked.insert(seq);
        }
        client.wire.flush()?;
        client.expect_no_nack()?;
        self.verdict.acked += acked.len() as u64;
        Ok(acked)
    }

    /// Subscribes as after a crash, gets `waiting` and nothing else, acknowledges it: how many.
    fn subscribe_again(&mut self, name: &str, topic: u16, waiting: &[u64], acked: &BTreeSet<u64>) -> io::Result<usize> {
        let mut client = Client::login(&self.setup)?;
        let sub = client.subscribe(name)?;
        let mut got = client.poll(sub, waiting.len(), PATIENCE)?;
        // One more than there should be would come now.
        got.extend(client.poll(sub, MESSAGES as usize, SILENCE)?);
        self.verdict.delivered += got.len() as u64;
        self.verdict.redelivered += got.len() as u64;
        let seqs = self.seqs(&got, topic);
        for (kind, text) in judge(waiting, acked, &seqs) {
            self.verdict.found(kind, format!("run {}, topic {name}, after the kill: {text}", self.run));
        }
        for (tag, _) in &got {
            client.ack(sub, *tag);
        }
        client.wire.flush()?;
        client.expect_no_nack()?;
        self.verdict.acked += got.len() as u64;
        Ok(got.len())
    }

    fn seqs(&self, got: &[(u64, Vec<u8>)], topic: u16) -> Vec<Option<u64>> {
        let seq = |payload: &[u8]| MessageId::decode(payload).filter(|id| id.topic == topic).map(|id| id.seq);
        got.iter().map(|(_, payload)| seq(payload)).collect()
    }

    fn misbehaved(&mut self, why: String) -> String {
        self.verdict.found(Kind::Misbehaved, format!("run {}: {why}", self.run));
        why
    }
}

/// What is wrong with `got`, when `waiting` should come in this order, and `acked` must not.
fn judge(waiting: &[u64], acked: &BTreeSet<u64>, got: &[Option<u64>]) -> Vec<(Kind, String)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut highest = 0;
    for seq in got {
        let Some(seq) = *seq else {
            found.push((Kind::Phantom, "a payload nobody published".into()));
            continue;
        };
        if acked.contains(&seq) {
            found.push((Kind::LostConsumerAck, format!("message {seq} came back though acknowledged")));
        } else if !waiting.contains(&seq) {
            found.push((Kind::Phantom, format!("message {seq} was never published")));
        } else if !seen.insert(seq) {
            found.push((Kind::Duplicate, format!("message {seq} came twice in one run")));
        } else if seq < highest {
            found.push((Kind::OutOfOrder, format!("message {seq} after {highest}")));
        }
        highest = highest.max(seq);
    }
    let missing = waiting.iter().filter(|seq| !seen.contains(seq));
    found.extend(missing.map(|seq| (Kind::Lost, format!("message {seq} did not come"))));
    found
}

/// A v1 client: polls, and knows its subscription by a number.
struct Client {
    wire: Wire,
    cid: u64,
}

impl Client {
    fn login(setup: &Setup) -> io::Result<Client> {
        let mut client = Client { wire: Wire::connect(setup.address())?, cid: 0 };
        client.ask(HELLO, |payload| payload.extend_from_slice(&1u16.to_be_bytes()))?;
        client.ask(AUTH, |payload| put_string(payload, KEY))?;
        Ok(client)
    }

    fn subscribe(&mut self, topic: &str) -> io::Result<u64> {
        self.ask(SUBSCRIBE, |payload| {
            put_string(payload, topic);
            payload.push(1);
        })
    }

    /// Sends a request and waits for its ACK; the number in it.
    fn ask(&mut self, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) -> io::Result<u64> {
        self.cid += 1;
        self.wire.push(kind, self.cid, fill);
        self.wire.flush()?;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.wire.frame(Duration::from_millis(50))? {
                Some(frame) if frame.kind == ACK && frame.cid == self.cid => return Cursor(&frame.payload).u64(),
                Some(frame) if frame.kind == NACK => return Err(nack(&frame.payload)),
                _ => {}
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    fn publish(&mut self, topic: &str, message: &[u8]) {
        self.cid += 1;
        self.wire.push(PUBLISH, self.cid, |payload| {
            payload.push(1);
            put_string(payload, topic);
            payload.extend_from_slice(message);
        });
    }

    fn ack(&mut self, sub: u64, tag: u64) {
        self.wire.push(ACK, tag, |payload| payload.extend_from_slice(&sub.to_be_bytes()));
    }

    /// Polls until `count` deliveries came, or none for `patience`: tags and payloads.
    fn poll(&mut self, sub: u64, count: usize, patience: Duration) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let mut got = Vec::new();
        let mut end = Instant::now() + patience;
        let mut waits = false;
        let mut asked = Instant::now();
        while got.len() < count && Instant::now() < end {
            // A newer POLL replaces one that is parked.
            if !waits || asked.elapsed() > Duration::from_millis(200) {
                self.cid += 1;
                self.wire.push(POLL, self.cid, |payload| payload.extend_from_slice(&sub.to_be_bytes()));
                self.wire.flush()?;
                waits = true;
                asked = Instant::now();
            }
            let Some(frame) = self.wire.frame(Duration::from_millis(20))? else { continue };
            match frame.kind {
                PUBLISH => {
                    let mut rest = Cursor(&frame.payload);
                    rest.u8()?;
                    rest.string()?;
                    got.push((frame.cid, rest.0.to_vec()));
                    waits = false;
                    end = Instant::now() + patience;
                }
                NACK => return Err(nack(&frame.payload)),
                _ => {}
            }
        }
        Ok(got)
    }

    /// A refused ACK is answered before a PONG that was asked for later.
    fn expect_no_nack(&mut self) -> io::Result<()> {
        const PING: u8 = 0x07;
        const PONG: u8 = 0x08;
        self.wire.push(PING, u64::MAX, |_| {});
        self.wire.flush()?;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.wire.frame(Duration::from_millis(50))? {
                Some(frame) if frame.kind == PONG => return Ok(()),
                Some(frame) if frame.kind == NACK => return Err(nack(&frame.payload)),
                _ => {}
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

fn nack(payload: &[u8]) -> io::Error {
    let mut rest = Cursor(payload);
    match (rest.u16(), rest.string()) {
        (Ok(code), Ok(text)) => io::Error::other(format!("refused: {code} {text}")),
        _ => io::Error::other("a NACK that cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_of_a_return_has_its_name() {
        let acked = BTreeSet::from([1, 4]);
        let kinds =
            |got: &[Option<u64>]| judge(&[2, 3, 5], &acked, got).into_iter().map(|(k, _)| k).collect::<Vec<_>>();
        assert_eq!(kinds(&[Some(2), Some(3), Some(5)]), []);
        assert_eq!(kinds(&[Some(2), Some(5)]), [Kind::Lost]);
        assert_eq!(kinds(&[Some(2), Some(3), Some(4), Some(5)]), [Kind::LostConsumerAck]);
        assert_eq!(kinds(&[Some(2), Some(5), Some(3)]), [Kind::OutOfOrder]);
        assert_eq!(kinds(&[Some(2), Some(2), Some(3), Some(5)]), [Kind::Duplicate]);
        assert_eq!(kinds(&[Some(2), None, Some(3), Some(5), Some(9)]), [Kind::Phantom, Kind::Phantom]);
    }
}
