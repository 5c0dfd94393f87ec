//! What every scenario with a measuring client has around it: a broker, the client beside it, checks, figures, the end.
//!
//! Owns: the phases (before, during, after), what is compared between them, and the questions asked of every broker at the
//! end: alive, nothing confirmed lost, no panic, how much memory. A latency is printed and never judged.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Fallible;
use crate::broker::{self, Broker, Setup};
use crate::history::Recorder;
use crate::net::probe::{self, Probe, Sample, Seen};
use crate::net::watch::{Metrics, Process, mib};
use crate::oracle::{Event, Verdict};
use crate::rng::Rng;

const READY_PATIENCE: Duration = Duration::from_secs(60);

/// What all scenarios of a run are told.
#[derive(Clone, Debug)]
pub struct Options {
    pub broker: PathBuf,
    /// Each scenario keeps its store and history in a folder of its own below it.
    pub folder: PathBuf,
    pub seed: u64,
    pub cores: u16,
    /// The length of the phase with the trouble, at least. The ones before and after are half as long.
    pub during: Duration,
    pub storm: usize,
    pub stalled: usize,
    /// What may pass between a deadline of the broker's and what follows from it, on a machine that is busy.
    pub grace: Duration,
    /// Further environment of the broker; wins over the scenario's own.
    pub extra: Vec<(String, String)>,
    /// Keep the folders of clean runs, too.
    pub keep: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Before,
    During,
    After,
}

impl Phase {
    pub const ALL: [Phase; 3] = [Phase::Before, Phase::During, Phase::After];
}

/// Latencies of one phase.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Summary {
    pub count: usize,
    pub p50: Duration,
    pub p99: Duration,
    pub max: Duration,
}

impl Summary {
    pub fn of(mut took: Vec<Duration>) -> Summary {
        took.sort_unstable();
        let at = |share: f64| took.get((took.len() as f64 * share) as usize).copied().unwrap_or_default();
        Summary { count: took.len(), p50: at(0.5), p99: at(0.99), max: took.last().copied().unwrap_or_default() }
    }
}

/// How a scenario went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub name: &'static str,
    /// What was done, in words.
    pub extent: String,
    pub figures: Vec<String>,
    /// What should not be. Empty: clean.
    pub failures: Vec<String>,
    pub verdict: Verdict,
    /// Before, during, after; QoS1 on a durable subscription, and QoS0. `None`: nothing was measured.
    pub latency: Option<[[Summary; 3]; 2]>,
    pub rss_peak: u64,
    pub seconds: f64,
    /// Kept, because it was asked for or because of failures.
    pub folder: Option<PathBuf>,
}

impl Outcome {
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty() && self.verdict.is_clean()
    }

    pub fn table(&self) -> String {
        let mut text = format!("{}: {} ({:.1} s)\n", self.name, self.extent, self.seconds);
        for (qos, phases) in self.latency.iter().flat_map(|latency| [("QoS1", latency[0]), ("QoS0", latency[1])]) {
            let cells: Vec<String> = phases
                .iter()
                .zip(["before", "during", "after"])
                .map(|(s, name)| format!("{name} {} / {} / {}", ms(s.p50), ms(s.p99), ms(s.max)))
                .collect();
            let ratio = ratio(phases[1].p99, phases[0].p99);
            text.push_str(&format!("  {qos} p50 / p99 / max ms: {}; p99 x{ratio:.1}\n", cells.join(", ")));
        }
        for figure in &self.figures {
            text.push_str(&format!("  {figure}\n"));
        }
        for failure in self.failures.iter().chain(&self.verdict.details) {
            text.push_str(&format!("  ! {failure}\n"));
        }
        if let Some(folder) = &self.folder {
            text.push_str(&format!("  kept: {}\n", folder.display()));
        }
        text
    }

    /// For a row of RESULTS.md.
    pub fn found(&self) -> String {
        let mut words = Vec::new();
        if let Some([durable, fleeting]) = &self.latency {
            let p99 = |phases: &[Summary; 3]| phases.map(|s| ms(s.p99)).join(" / ");
            words.push(format!("p99 before / during / after: QoS1 {} ms, QoS0 {} ms", p99(durable), p99(fleeting)));
        }
        words.extend(self.figures.iter().cloned());
        match self.failures.len() + self.verdict.details.len() {
            0 => words.push(format!("{} confirmed, 0 lost", self.verdict.confirmed)),
            count => words.push(format!("{count} failures, the first: {}", self.first_failure())),
        }
        words.join("; ")
    }

    fn first_failure(&self) -> &str {
        self.failures.iter().chain(&self.verdict.details).next().map_or("", String::as_str)
    }
}

fn ms(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64().max(1e-9)
}

pub struct Stage<'a> {
    pub options: &'a Options,
    pub setup: Setup,
    pub rng: Rng,
    pub broker: Broker,
    name: &'static str,
    started: Instant,
    recorder: Arc<Recorder>,
    probe: Option<Probe>,
    /// Of probes that have ended.
    seen: Vec<Seen>,
    runs: u32,
    phases: Vec<(Phase, Instant, Instant, Duration)>,
    figures: Vec<String>,
    failures: Vec<String>,
    rss_peak: u64,
}

impl<'a> Stage<'a> {
    /// A fresh store, a broker, the measuring client at work.
    ///
    /// - `settings`: environment that only this scenario needs.
    pub fn begin(options: &'a Options, name: &'static str, settings: &[(&str, &str)]) -> Fallible<Stage<'a>> {
        let program = options.broker.clone();
        Stage::begin_with(options, name, settings, |_| Ok(program))
    }

    /// As `begin`; `program` makes what is started, in the scenario's folder.
    pub fn begin_with(
        options: &'a Options,
        name: &'static str,
        settings: &[(&str, &str)],
        program: impl FnOnce(&std::path::Path) -> std::io::Result<PathBuf>,
    ) -> Fallible<Stage<'a>> {
        let setup = set_up(options, name, settings, program)?;
        let recorder = Arc::new(Recorder::create(&setup.folder.join("history.txt"), probe::plan())?);
        let mut broker = setup.start(1, options.cores)?;
        broker.wait_ready(setup.address(), READY_PATIENCE).map_err(|why| format!("start failed: {why}"))?;
        recorder.record(&[Event::Boot { run: 1 }]);
        let mut stage = Stage {
            options,
            rng: Rng::derive(options.seed, &[name.len() as u64]),
            setup,
            broker,
            name,
            started: Instant::now(),
            recorder,
            probe: None,
            seen: Vec::new(),
            runs: 1,
            phases: Vec::new(),
            figures: Vec::new(),
            failures: Vec::new(),
            rss_peak: 0,
        };
        stage.start_probe();
        // The first messages find cold caches.
        std::thread::sleep(Duration::from_millis(300));
        Ok(stage)
    }

    fn start_probe(&mut self) {
        let next = self.seen.last().map_or(1, |seen| seen.next);
        match Probe::start(self.setup.address(), self.recorder.clone(), next, self.runs) {
            Ok(probe) => self.probe = Some(probe),
            Err(why) => self.failures.push(format!("the measuring client cannot work: {why}")),
        }
    }

    fn end_probe(&mut self) {
        let Some(probe) = self.probe.take() else { return };
        let seen = probe.end();
        if let Some(why) = &seen.broken {
            self.failures.push(format!("the measuring client was cut off: {why}"));
        }
        if seen.fleeting_missing + seen.fleeting_disordered > 0 {
            self.failures.push(format!(
                "QoS0 of a consumer that reads: {} missing, {} out of order",
                seen.fleeting_missing, seen.fleeting_disordered
            ));
        }
        self.seen.push(seen);
    }

    /// Nothing happens but measuring.
    pub fn rest(&mut self, phase: Phase) {
        let half = self.options.during / 2;
        self.measured(phase, |_| std::thread::sleep(half));
    }

    /// What `work` does is part of `phase`.
    pub fn measured<T>(&mut self, phase: Phase, work: impl FnOnce(&mut Stage<'a>) -> T) -> T {
        let (begun, cpu) = (Instant::now(), self.process().cpu);
        let result = work(self);
        let spent = self.process().cpu.saturating_sub(cpu);
        self.phases.push((phase, begun, Instant::now(), spent));
        result
    }

    pub fn process(&self) -> Process {
        Process::look(self.broker.pid())
    }

    /// Zeros, and a failure, if the page cannot be read.
    pub fn metrics(&mut self) -> Metrics {
        Metrics::fetch(self.setup.metrics_port).unwrap_or_else(|error| {
            self.failures.push(format!("the metrics cannot be read: {error}"));
            Metrics::default()
        })
    }

    /// Looks at the metrics until `wanted` holds or `patience` is over.
    pub fn until(&mut self, patience: Duration, wanted: impl Fn(&Metrics) -> bool) -> Metrics {
        let end = Instant::now() + patience;
        loop {
            let metrics = self.metrics();
            if wanted(&metrics) || Instant::now() > end || self.broker.still_runs().is_err() {
                return metrics;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn expect(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.failures.push(otherwise());
        }
    }

    pub fn figure(&mut self, text: String) {
        self.figures.push(text);
    }

    /// kill -9 and a new start; another measuring client goes on where the last one was.
    pub fn restart(&mut self) -> Fallible<()> {
        self.end_probe();
        self.note_memory();
        if let Some(pid) = Pid::from_raw(self.broker.pid() as i32) {
            kill_process(pid, Signal::KILL)?;
        }
        while self.broker.still_runs().is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.runs += 1;
        self.broker = self.setup.start(self.runs, self.options.cores)?;
        let ready = self.broker.wait_ready(self.setup.address(), READY_PATIENCE);
        ready.map_err(|why| format!("start {} failed: {why}", self.runs))?;
        self.recorder.record(&[Event::Boot { run: self.runs }]);
        self.start_probe();
        Ok(())
    }

    fn note_memory(&mut self) {
        self.rss_peak = self.rss_peak.max(self.process().rss_peak);
    }

    /// Ends the measuring client, asks what every broker is asked, and cleans up.
    pub fn end(mut self, extent: String) -> Fallible<Outcome> {
        self.end_probe();
        if let Err(why) = self.broker.still_runs() {
            self.failures.push(format!("the broker {why}"));
        }
        self.note_memory();
        let panics = panics(&self.setup.folder)?;
        self.failures.extend(panics);
        let cpu = self.cpu_figure();
        self.figures.push(format!("RSS peak {:.0} MiB, {cpu}", mib(self.rss_peak)));
        let latency = [0, 1].map(|qos| Phase::ALL.map(|phase| self.summary(qos, phase)));
        let Stage { options, setup, broker, recorder, name, started, figures, failures, rss_peak, .. } = self;
        broker.kill()?;
        let recorder = Arc::into_inner(recorder).ok_or("a client outlived its scenario")?;
        let verdict = recorder.finish(true)?;
        let seconds = started.elapsed().as_secs_f64();
        let mut outcome = Outcome {
            name,
            extent,
            figures,
            failures,
            verdict,
            latency: Some(latency),
            rss_peak,
            seconds,
            folder: None,
        };
        settle_folder(options, &setup, &mut outcome)?;
        Ok(outcome)
    }

    fn cpu_figure(&self) -> String {
        let share = Phase::ALL.map(|phase| {
            let of = self.phases.iter().filter(|(p, ..)| *p == phase);
            let (spent, time) = of.fold((Duration::ZERO, Duration::ZERO), |(spent, time), (_, begun, ended, cpu)| {
                (spent + *cpu, time + (*ended - *begun))
            });
            format!("{:.0} %", 100.0 * ratio(spent, time))
        });
        format!("CPU before / during / after {}", share.join(" / "))
    }

    fn summary(&self, qos: usize, phase: Phase) -> Summary {
        let samples = self.seen.iter().flat_map(|seen| [&seen.durable, &seen.fleeting][qos]);
        let inside = |sample: &&Sample| {
            self.phases.iter().any(|(p, begun, ended, _)| *p == phase && (*begun..*ended).contains(&sample.due))
        };
        Summary::of(samples.filter(inside).map(|sample| sample.took).collect())
    }
}

/// The folder, the ports and the environment of one scenario.
pub fn set_up(
    options: &Options,
    name: &str,
    settings: &[(&str, &str)],
    program: impl FnOnce(&std::path::Path) -> std::io::Result<PathBuf>,
) -> Fallible<Setup> {
    let folder = options.folder.join(format!("net-{}-{name}", options.seed));
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let (port, metrics_port) = broker::free_ports(options.seed ^ name.len() as u64)?;
    let own = settings.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    Ok(Setup {
        program: program(&folder)?,
        folder,
        policy: "always".into(),
        port,
        metrics_port,
        extra: own.chain(options.extra.iter().cloned()).collect(),
    })
}

/// Lines in what the broker wrote that speak of a panic.
pub fn panics(folder: &std::path::Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "err" || kind == "out") {
            let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
            found.extend(text.lines().filter(|line| line.contains("panicked")).map(|line| format!("a panic: {line}")));
        }
    }
    Ok(found)
}

/// Deleted if all is well and nobody wants it.
pub fn settle_folder(options: &Options, setup: &Setup, outcome: &mut Outcome) -> std::io::Result<()> {
    if outcome.is_clean() && !options.keep {
        return std::fs::remove_dir_all(&setup.folder);
    }
    outcome.folder = Some(setup.folder.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_takes_its_ranks_from_the_sorted_times() {
        let took = (1..=1_000).rev().map(Duration::from_millis).collect();
        let summary = Summary::of(took);
        assert_eq!(summary.count, 1_000);
        assert_eq!(summary.p50, Duration::from_millis(501));
        assert_eq!(summary.p99, Duration::from_millis(991));
        assert_eq!(summary.max, Duration::from_millis(1_000));
        assert_eq!(Summary::of(Vec::new()), Summary::default());
    }

    #[test]
    fn an_outcome_is_clean_only_without_failures() {
        let mut outcome = Outcome { name: "x", ..Outcome::default() };
        assert!(outcome.is_clean() && outcome.found().contains("0 lost"));
        outcome.failures.push("three connections are still open".into());
        assert!(!outcome.is_clean());
        assert!(outcome.found().contains("1 failures, the first: three") && outcome.table().contains("! three"));
    }
}
