//! `chaos crash`: kill, restart, drain, judge.
//!
//! Rounds come in campaigns. A campaign has a fresh store and one policy; each of its rounds starts the broker (with
//! another core count), lets clients work, and kills it at a random moment. At the end everything is drained and the
//! history judged, and one last kill shows whether the broker remembers that nothing is left.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::Fallible;
use crate::broker::{self, Broker, Setup};
use crate::clients::{Consumer, Publisher, Run};
use crate::history::Recorder;
use crate::oracle::{Event, Kind, Plan, PlannedSubscription, Verdict};
use crate::report::Report;
use crate::rng::Rng;

const TOPICS: u16 = 4;
const PUBLISHERS: u16 = 8;
/// Rounds on one store: bounds the history, and shows a loss close to the crash that made it.
const CAMPAIGN_ROUNDS: u32 = 25;
/// A broker is given up as not starting.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// Shorter runs owe no progress.
const OWES_PROGRESS: Duration = Duration::from_millis(500);
/// Nothing new for so long: quiet.
const QUIET: Duration = Duration::from_millis(700);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identities {
    All,
    None,
    /// Two of the eight publishers have none.
    Mixed,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub rounds: u32,
    pub policies: Vec<String>,
    pub cores: Vec<u16>,
    pub seed: u64,
    pub broker: PathBuf,
    /// Where campaigns keep their stores and histories.
    pub folder: PathBuf,
    pub keep: bool,
    pub min_run_ms: u64,
    pub max_run_ms: u64,
    pub identities: Identities,
    /// Runs without any confirm for so long are stuck; so is a drain in which nothing moves.
    pub patience: Duration,
    /// Further environment of the broker.
    pub extra: Vec<(String, String)>,
    /// Stop as soon as this has been found.
    pub until: Option<Kind>,
}

/// The campaigns that `rounds` make: policy and rounds of each. Policies take turns, so that an early end saw all.
pub fn campaigns(policies: &[String], rounds: u32) -> Vec<(String, u32)> {
    let count = policies.len() as u32;
    let shares = policies.iter().zip(0..).map(|(policy, at)| (policy, rounds / count + u32::from(at < rounds % count)));
    let mut left: Vec<(&String, u32)> = shares.collect();
    let mut campaigns = Vec::new();
    while left.iter().any(|(_, rounds)| *rounds > 0) {
        for (policy, rounds) in left.iter_mut().filter(|(_, rounds)| *rounds > 0) {
            let part = (*rounds).min(CAMPAIGN_ROUNDS);
            campaigns.push((policy.clone(), part));
            *rounds -= part;
        }
    }
    campaigns
}

pub fn run(options: &Options) -> Fallible<Report> {
    let started = Instant::now();
    let mut report =
        Report { protocol: "v2", seed: options.seed, policies: options.policies.clone(), ..Report::default() };
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} rounds, {elapsed}, {eta} left")?;
    let bar = ProgressBar::new(u64::from(options.rounds)).with_style(style);
    for (number, (policy, rounds)) in campaigns(&options.policies, options.rounds).into_iter().enumerate() {
        let (verdict, folder) = Campaign::new(options, number as u64, policy)?.run(rounds, &mut report, &bar)?;
        let clean = verdict.is_clean();
        report.verdict.add(&verdict);
        if clean && !options.keep {
            std::fs::remove_dir_all(&folder)?;
        } else {
            report.artefacts.push(folder.display().to_string());
        }
        if options.until.is_some_and(|kind| report.verdict.count(kind) > 0) {
            break;
        }
    }
    bar.finish_and_clear();
    report.seconds = started.elapsed().as_secs_f64();
    report.settle();
    Ok(report)
}

/// One store from its first start to its last.
struct Campaign<'a> {
    options: &'a Options,
    setup: Setup,
    seed: u64,
    rng: Rng,
    recorder: Arc<Recorder>,
    /// Home between runs.
    publishers: Vec<Publisher>,
    consumers: Vec<Consumer>,
    /// Clients of the last run; they are dying.
    working: Vec<JoinHandle<Option<Publisher>>>,
    run: u32,
    connections: Arc<AtomicU32>,
}

/// Why a campaign ended early: recorded as an anomaly already.
struct GaveUp;

impl<'a> Campaign<'a> {
    fn new(options: &'a Options, number: u64, policy: String) -> Fallible<Campaign<'a>> {
        let seed = Rng::derive(options.seed, &[number]).draw();
        let rng = Rng::derive(seed, &[0]);
        let folder = options.folder.join(format!("{}-{number:03}-{}", options.seed, policy.replace(':', "-")));
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;

        let publishers: Vec<Publisher> = (0..PUBLISHERS)
            .map(|number| {
                let identity = match options.identities {
                    Identities::All => true,
                    Identities::None => false,
                    Identities::Mixed => number < 6,
                };
                Publisher::new(number, number % TOPICS, identity)
            })
            .collect();
        // Two subscriptions of each topic; the last topic has one, and its two consumers compete.
        let mut subscriptions = Vec::new();
        let mut consumers = Vec::new();
        for number in 0..2 * TOPICS {
            let topic = number / 2;
            let shared = topic == TOPICS - 1;
            if !shared || number % 2 == 0 {
                subscriptions.push(PlannedSubscription { topic, shared });
            }
            let sub = subscriptions.len() as u16 - 1;
            consumers.push(Consumer { number, sub, topic, shared, must_exist: false });
        }
        let plan = Plan {
            publishers: publishers.iter().map(|p| p.topic).collect(),
            subscriptions,
            strict: policy == "always",
        };
        let recorder = Arc::new(Recorder::create(&folder.join("history.txt"), plan)?);
        let (port, metrics_port) = broker::free_ports(seed)?;
        let program = options.broker.clone();
        let setup = Setup { program, folder, policy, port, metrics_port, extra: options.extra.clone() };
        let connections = Arc::new(AtomicU32::new(1));
        let working = Vec::new();
        Ok(Campaign { options, setup, seed, rng, recorder, publishers, consumers, working, run: 0, connections })
    }

    fn run(mut self, rounds: u32, report: &mut Report, bar: &ProgressBar) -> Fallible<(Verdict, PathBuf)> {
        let drained = self.rounds_and_drain(rounds, report, bar)?;
        self.join();
        let folder = self.setup.folder.clone();
        let recorder = Arc::into_inner(self.recorder).ok_or("a client outlived its campaign")?;
        let verdict = recorder.finish(drained.is_ok())?;
        if !verdict.is_clean() {
            let first = verdict.details.iter().take(3).map(|detail| format!("\n  {detail}")).collect::<String>();
            bar.suspend(|| eprintln!("anomalies, kept in {}:{first}", folder.display()));
        }
        Ok((verdict, folder))
    }

    fn rounds_and_drain(
        &mut self,
        rounds: u32,
        report: &mut Report,
        bar: &ProgressBar,
    ) -> Fallible<Result<(), GaveUp>> {
        for round in 0..rounds {
            report.rounds += 1;
            let line = match self.round(round, report)? {
                Ok(line) => line,
                Err(gave_up) => return Ok(Err(gave_up)),
            };
            let (verdict, missing) = self.recorder.so_far();
            let line = format!(
                "round {:>4} {:<14} {line}, confirmed {}, delivered {}, redelivered {}, rejected {}, to come {missing}",
                report.rounds,
                self.setup.policy,
                verdict.confirmed,
                verdict.delivered,
                verdict.redelivered,
                verdict.rejected
            );
            bar.suspend(|| eprintln!("{line}"));
            bar.inc(1);
        }
        self.drain(report)
    }

    /// Starts the broker, lets clients work, kills it. What happened, in words.
    fn round(&mut self, round: u32, report: &mut Report) -> Fallible<Result<String, GaveUp>> {
        let mut rng = Rng::derive(self.seed, &[1, u64::from(round)]);
        // The first start makes the subscriptions, so it is left in peace until they exist.
        let in_start = round > 0 && rng.percent(10);
        if round > 0 && rng.percent(50) {
            std::thread::sleep(rng.millis(1, 300));
        }
        let mut broker = self.start(&mut rng, report)?;
        if in_start {
            let alive = rng.millis(0, 300.min(self.options.max_run_ms));
            std::thread::sleep(alive);
            self.join();
            if let Err(why) = broker.still_runs() {
                return Ok(Err(self.give_up(why)));
            }
            let line = format!("cores {} killed after {:>4} ms of starting", broker.cores, alive.as_millis());
            broker.kill()?;
            report.killed_in_start += 1;
            return Ok(Ok(line));
        }
        let (cores, ready) = match self.wait_ready(&mut broker, report) {
            Ok(ready) => (broker.cores, ready),
            Err(gave_up) => return Ok(Err(gave_up)),
        };
        let run = self.begin(false, round == 0);
        if round == 0
            && let Err(gave_up) = self.until_subscribed(&run, &mut broker)
        {
            return Ok(Err(gave_up));
        }
        let alive = rng.millis(self.options.min_run_ms, self.options.max_run_ms);
        let begun = Instant::now();
        while begun.elapsed() < alive || alive >= OWES_PROGRESS && run.progress.load(Ordering::Relaxed) == 0 {
            if let Err(why) = broker.still_runs() {
                run.closing.store(true, Ordering::SeqCst);
                return Ok(Err(self.give_up(why)));
            }
            if begun.elapsed() > self.options.patience + alive {
                self.recorder.record(&[Event::Stuck { run: self.run }]);
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        run.closing.store(true, Ordering::SeqCst);
        broker.kill()?;
        Ok(Ok(format!("cores {cores} ready {:>4} ms, killed after {:>4} ms", ready.as_millis(), alive.as_millis())))
    }

    /// Lets everything come out that is in; then kills once more and sees that nothing does.
    fn drain(&mut self, report: &mut Report) -> Fallible<Result<(), GaveUp>> {
        let mut rng = Rng::derive(self.seed, &[2]);
        for last in [false, true] {
            let mut broker = self.start(&mut rng, report)?;
            if let Err(gave_up) = self.wait_ready(&mut broker, report) {
                return Ok(Err(gave_up));
            }
            let run = self.begin(true, false);
            if let Err(gave_up) = self.until_subscribed(&run, &mut broker) {
                return Ok(Err(gave_up));
            }
            let count =
                |(verdict, missing): (Verdict, u64)| (verdict.delivered, verdict.confirmed, verdict.acked, missing);
            let (mut seen, mut since) = (count(self.recorder.so_far()), Instant::now());
            let mut all_there = None;
            loop {
                std::thread::sleep(Duration::from_millis(5));
                if let Err(why) = broker.still_runs() {
                    run.closing.store(true, Ordering::SeqCst);
                    return Ok(Err(self.give_up(why)));
                }
                let now = count(self.recorder.so_far());
                if now != seen {
                    (seen, since) = (now, Instant::now());
                }
                let published = run.publishers_done.load(Ordering::SeqCst) == usize::from(PUBLISHERS);
                if published && now.3 == 0 {
                    // Some broken brokers never fall quiet; what they repeat is judged already.
                    let all_there = *all_there.get_or_insert_with(Instant::now);
                    if since.elapsed() > QUIET || all_there.elapsed() > self.options.patience {
                        break;
                    }
                }
                if since.elapsed() > self.options.patience {
                    // What is missing is judged as lost; publishers without answer are stuck.
                    if !published {
                        self.recorder.record(&[Event::Stuck { run: self.run }]);
                    }
                    break;
                }
            }
            run.closing.store(true, Ordering::SeqCst);
            if last {
                run.leave.store(true, Ordering::SeqCst);
                self.join();
            }
            broker.kill()?;
        }
        Ok(Ok(()))
    }

    fn start(&mut self, rng: &mut Rng, report: &mut Report) -> Fallible<Broker> {
        self.run += 1;
        report.restarts += u32::from(self.run > 1);
        let cores = *rng.pick(&self.options.cores);
        let started = self.setup.start(self.run, cores);
        started.map_err(|e| format!("cannot start {}: {e}", self.setup.program.display()).into())
    }

    /// The broker of this run is ready, and the clients of the last are gone.
    fn wait_ready(&mut self, broker: &mut Broker, report: &mut Report) -> Result<Duration, GaveUp> {
        let ready = broker.wait_ready(self.setup.address(), READY_PATIENCE);
        self.join();
        match ready {
            Ok(ready) => {
                report.recoveries.push(ready);
                Ok(ready)
            }
            Err(why) => Err(self.give_up(format!("start failed: {why}"))),
        }
    }

    /// Sends the clients to work. `alone`: publishers wait until every subscription exists.
    fn begin(&mut self, draining: bool, alone: bool) -> Arc<Run> {
        self.recorder.record(&[Event::Boot { run: self.run }]);
        let run = Arc::new(Run {
            number: self.run,
            address: self.setup.address(),
            recorder: self.recorder.clone(),
            seed: self.seed,
            draining,
            flaky: false,
            closing: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            subscribed: AtomicUsize::new(0),
            publishers_done: AtomicUsize::new(0),
            progress: AtomicU64::new(0),
            connections: self.connections.clone(),
        });
        // On the shared subscription one consumer is enough in some runs.
        let absent = (!alone && !draining && self.rng.percent(30)).then_some(2 * TOPICS - 1);
        for consumer in self.consumers.iter_mut() {
            if absent != Some(consumer.number) {
                let (run, consumer) = (run.clone(), consumer.clone());
                self.working.push(std::thread::spawn(move || {
                    consumer.run(&run);
                    None
                }));
            }
            consumer.must_exist = true;
        }
        for publisher in self.publishers.drain(..) {
            let run = run.clone();
            let consumers = self.consumers.len();
            self.working.push(std::thread::spawn(move || {
                while alone && run.subscribed.load(Ordering::SeqCst) < consumers && !run.closing.load(Ordering::SeqCst)
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Some(publisher.run(&run))
            }));
        }
        run
    }

    fn until_subscribed(&mut self, run: &Run, broker: &mut Broker) -> Result<(), GaveUp> {
        let begun = Instant::now();
        while run.subscribed.load(Ordering::SeqCst) < self.consumers.len() {
            let alive = broker.still_runs();
            if alive.is_err() || begun.elapsed() > self.options.patience {
                run.closing.store(true, Ordering::SeqCst);
                let why = alive.err().unwrap_or_else(|| "consumers cannot subscribe".into());
                return Err(self.give_up(why));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for the clients of a broker that is dead or was left.
    fn join(&mut self) {
        for client in self.working.drain(..) {
            match client.join() {
                Ok(publisher) => self.publishers.extend(publisher),
                Err(_) => {
                    self.recorder.record(&[Event::Misbehaved { run: self.run, text: "a client panicked".into() }])
                }
            }
        }
    }

    fn give_up(&mut self, why: String) -> GaveUp {
        self.recorder.record(&[Event::Misbehaved { run: self.run, text: why }]);
        GaveUp
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_shared_among_policies_and_cut_into_campaigns() {
        let policies = ["always", "none"].map(String::from);
        let made = campaigns(&policies, 61);
        let of = |policy: &str| made.iter().filter(|(p, _)| p == policy).map(|(_, n)| *n).collect::<Vec<_>>();
        assert_eq!(of("always"), [25, 6]);
        assert_eq!(of("none"), [25, 5]);
        assert_eq!(made[0].0, "always");
        assert_eq!(made[1].0, "none");
        assert_eq!(campaigns(&policies, 1), [("always".to_string(), 1)]);
    }
}
