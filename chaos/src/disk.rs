//! `chaos disk`: the disk fails while the broker runs on it.
//!
//! A run: a broker under load on the rig's disk; at a random moment the disk begins to fail in one way. Then the exit code, what
//! was confirmed, and whether everything confirmed comes out of the healed disk. After a failed sync it must also come out
//! of the disk without anything that no flush covered: a confirm that rested on the failed sync shows there.
//!
//! A run in which the fault did not happen (nothing in the kernel's log or the broker's) proves nothing: it is invalid, and
//! repeated, a bounded number of times.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use crate::Fallible;
use crate::broker::{Broker, Setup};
use crate::cut::{Allowed, Cut, Stamped};
use crate::history;
use crate::oracle::{Event, Kind, Plan, Verdict};
use crate::rig::device::{Disk, Mounted, Rule};
use crate::rig::drain::drain;
use crate::rig::stage::{READY_PATIENCE, Scene, Stage};
use crate::rig::writes::{Image, Writes};
use crate::rig::{go_on, load, tool};
use crate::rng::Rng;

/// Runs at once.
const WORKERS: u32 = 2;
/// A broker that has not noticed its broken disk by then never will.
const NOTICE: Duration = Duration::from_secs(30);
/// After one failed write, before asking whose it was.
const NOTICE_ONE: Duration = Duration::from_secs(5);
/// So long a state is watched before the next step.
const PATIENCE: Duration = Duration::from_secs(20);
/// Invalid runs in a row before the harness gives up.
const INVALID_MAX: u32 = 20;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// The documented exit codes (docs/OPERATIONS.md).
const EXIT_IO: i32 = 74;
const EXIT_UNREADABLE: i32 = 65;
/// What a refused publish is told.
const INSUFFICIENT_STORAGE: u16 = 507;
/// Memory a broker with a budget of 32 MiB may have while its disk crawls.
const RESIDENT_MAX_KIB: u64 = 256 * 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Fault {
    /// A write fails: the first one, or all from then on.
    WriteEio,
    /// A flush fails: the first one, or all from then on.
    SyncEio,
    /// Part of the store cannot be read, at a start or while running.
    ReadEio,
    /// The file system is full; or the device says so.
    Enospc,
    /// Few operations a second.
    Slow,
}

impl Fault {
    pub const ALL: [Fault; 5] = [Fault::WriteEio, Fault::SyncEio, Fault::ReadEio, Fault::Enospc, Fault::Slow];

    pub fn name(self) -> &'static str {
        match self {
            Fault::WriteEio => "write-eio",
            Fault::SyncEio => "sync-eio",
            Fault::ReadEio => "read-eio",
            Fault::Enospc => "enospc",
            Fault::Slow => "slow",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub fault: Fault,
    pub runs: u32,
    /// Each run takes one of them.
    pub policies: Vec<String>,
    /// Its policy is that of the run.
    pub scene: Scene,
    pub seed: u64,
    /// Where artefacts of anomalies go.
    pub folder: PathBuf,
    /// Stop at the first anomaly.
    pub until_found: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub runs: u32,
    pub bad_runs: u32,
    pub invalid: u32,
    pub verdict: Verdict,
    pub confirmed: u64,
    pub delivered: u64,
    /// Signs of the fault, in the kernel's log and the broker's.
    pub injected: u64,
    /// What happened, by kind of run: how often.
    pub kinds: std::collections::BTreeMap<String, u32>,
    pub seconds: f64,
    pub artefacts: Vec<String>,
}

impl Report {
    pub fn extent(&self) -> String {
        let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        format!(
            "{} runs ({}), {} signs of the fault; {} confirms judged, {} deliveries; {} invalid runs repeated",
            self.runs,
            kinds.join("; "),
            self.injected,
            self.confirmed,
            self.delivered,
            self.invalid
        )
    }

    pub fn found(&self) -> String {
        let counts = Kind::ALL.iter().filter(|kind| self.verdict.count(**kind) > 0);
        let words: Vec<String> = counts.map(|kind| format!("{} {}", self.verdict.count(*kind), kind.name())).collect();
        if words.is_empty() { "exit codes as documented, 0 confirmed lost".into() } else { words.join(", ") }
    }
}

pub fn run(options: &Options) -> Fallible<Report> {
    let started = Instant::now();
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} runs, {elapsed}, {eta} left")?;
    let bar = ProgressBar::new(u64::from(options.runs)).with_style(style);
    bar.set_message(options.fault.name());
    let total = Mutex::new(Report::default());
    let (next, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let worker = || -> Fallible<()> {
            loop {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if number >= options.runs || stop.load(Ordering::SeqCst) {
                    return Ok(());
                }
                let done = one(options, number).inspect_err(|_| stop.store(true, Ordering::SeqCst))?;
                let mut report = total.lock().map_err(|_| "a worker panicked")?;
                done.add_to(&mut report, number, &bar);
                if options.until_found && !report.verdict.is_clean() {
                    stop.store(true, Ordering::SeqCst);
                }
                bar.inc(1);
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked")?)
    })?;
    bar.finish_and_clear();
    let mut report = total.into_inner().map_err(|_| "a worker panicked")?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// A run whose fault happened.
fn one(options: &Options, number: u32) -> Fallible<Done> {
    for attempt in 0..INVALID_MAX {
        go_on()?;
        let mut rng = Rng::derive(options.seed, &[number.into(), attempt.into(), options.fault as u64]);
        let scene = Scene { policy: rng.pick(&options.policies).clone(), ..options.scene.clone() };
        let name = format!("{}-{number}", options.fault.name());
        let mut trial = Trial::new(&scene, &name, rng)?;
        match options.fault {
            Fault::WriteEio => trial.write_error()?,
            Fault::SyncEio => trial.sync_error()?,
            Fault::ReadEio => trial.read_error()?,
            Fault::Enospc => trial.no_space()?,
            Fault::Slow => trial.slow()?,
        }
        if let Some(mut done) = trial.finish(options, number)? {
            done.invalid = attempt;
            return Ok(done);
        }
    }
    Err(format!("{} did not happen in {INVALID_MAX} runs in a row", options.fault.name()).into())
}

struct Done {
    kind: String,
    verdict: Verdict,
    confirmed: u64,
    delivered: u64,
    injected: u64,
    invalid: u32,
    artefacts: Option<PathBuf>,
}

impl Done {
    fn add_to(self, report: &mut Report, number: u32, bar: &ProgressBar) {
        report.runs += 1;
        report.invalid += self.invalid;
        report.confirmed += self.confirmed;
        report.delivered += self.delivered;
        report.injected += self.injected;
        *report.kinds.entry(self.kind).or_default() += 1;
        if let Some(folder) = self.artefacts {
            report.bad_runs += 1;
            let first: String = self.verdict.details.iter().take(3).map(|detail| format!("\n  {detail}")).collect();
            bar.suspend(|| eprintln!("run {number}, kept in {}:{first}", folder.display()));
            report.artefacts.push(folder.display().to_string());
        }
        report.verdict.add(&self.verdict);
    }
}

/// One run in progress.
struct Trial {
    /// `None` when it is gone, or between two starts. Dropped before the disk.
    broker: Option<Broker>,
    load: Option<load::Load>,
    disk: Disk,
    scene: Scene,
    rng: Rng,
    plan: Plan,
    setup: Setup,
    recorded: Vec<Stamped>,
    /// What the harness noticed, and what was seen after the fault.
    after: Vec<Event>,
    starts: u32,
    /// Markers published so far, by topic.
    marked: Vec<u64>,
    /// The error hit something that is not the broker's.
    missed: bool,
    /// All that was published has come out.
    drained: bool,
    kind: String,
    injected: u64,
    verdict: Verdict,
}

impl Trial {
    fn new(scene: &Scene, name: &str, mut rng: Rng) -> Fallible<Trial> {
        let Stage { load, broker, setup, disk, .. } = Stage::set(scene, name, &mut rng)?;
        Ok(Trial {
            scene: scene.clone(),
            rng,
            plan: load::plan(&scene.policy),
            disk,
            setup,
            broker: Some(broker),
            load: Some(load),
            recorded: Vec::new(),
            after: Vec::new(),
            starts: 1,
            marked: Vec::new(),
            missed: false,
            drained: false,
            kind: String::new(),
            injected: 0,
            verdict: Verdict::default(),
        })
    }

    fn write_error(&mut self) -> Fallible<()> {
        let once = self.rng.percent(50);
        self.kind = format!("write {}, exit {EXIT_IO}", if once { "once" } else { "always" });
        self.work()?;
        self.fail_until_it_ends(Rule { what: "write", errno: EIO, once, at: None })?;
        self.heal_and_drain()
    }

    fn sync_error(&mut self) -> Fallible<()> {
        let once = self.rng.percent(50);
        self.kind = format!("flush {}, exit {EXIT_IO}", if once { "once" } else { "always" });
        self.work()?;
        self.fail_until_it_ends(Rule { what: "flush", errno: EIO, once, at: None })?;
        // Before anything else is flushed.
        let at = self.disk.counter()?.count()?;
        self.heal_and_drain()?;
        if self.plan.strict {
            self.drain_what_was_flushed(at)?;
        }
        Ok(())
    }

    fn read_error(&mut self) -> Fallible<()> {
        let at_start = self.rng.percent(50);
        if at_start {
            self.work()?;
            self.kill()?;
            self.go_home()?;
            self.disk.remount()?;
            let (what, place) = self.something_to_read()?;
            self.kind = format!("{what} at a start, exit {EXIT_UNREADABLE}");
            self.disk.forget_cache()?;
            let mark = kernel_time()?;
            self.disk.arm(&[Rule { what: "read", errno: EIO, once: false, at: Some(place) }])?;
            self.start()?;
            self.expect_exit(EXIT_UNREADABLE, "with a part of the store unreadable")?;
            self.count_signs(mark)?;
        } else {
            self.kind = format!("while running, exit {EXIT_IO}");
            self.home_of_consumers()?;
            self.work()?;
            self.kill()?;
            self.go_home()?;
            self.disk.remount()?;
            self.start()?;
            if !self.ready()? {
                return Ok(());
            }
            self.disk.forget_cache()?;
            let mark = kernel_time()?;
            self.disk.arm(&[Rule { what: "read", errno: EIO, once: false, at: None }])?;
            // It has a backlog to read. What comes nevertheless was in memory.
            let seen = drain(&self.setup, &self.plan, self.starts, &[], &self.marked);
            self.marked = seen.marked;
            let deliveries = |event: &Event| !matches!(event, Event::Misbehaved { .. } | Event::Stuck { .. });
            self.after.extend(seen.events.into_iter().filter(deliveries));
            self.expect_exit(EXIT_IO, "with the backlog unreadable")?;
            self.count_signs(mark)?;
        }
        self.heal_and_drain()
    }

    fn no_space(&mut self) -> Fallible<()> {
        if self.rng.percent(25) {
            return self.no_space_said_by_the_device();
        }
        self.kind = "file system full, healed without restart".into();
        // Nobody consumes, so that the log grows.
        self.home_of_consumers()?;
        self.work()?;
        let filler = self.disk.place().join("filler");
        self.fill(&filler)?;
        let Some(full) = self.until("publishes are refused when the file system is full", |now, _| now.rejected > 0)?
        else {
            return Ok(());
        };
        self.injected += full.rejected;
        let Some(broker) = self.broker.as_mut() else { return Ok(()) };
        let Some(load) = self.load.as_mut() else { return Ok(()) };
        load.consume(broker, true)?;
        // On the full disk.
        if self
            .until("acknowledgements go on while publishes are refused", |now, then| now.acked > then.acked + 50)?
            .is_none()
        {
            return Ok(());
        }
        fs::remove_file(&filler)?;
        if self
            .until("publishes are taken again when there is space", |now, then| now.confirmed > then.confirmed + 50)?
            .is_none()
        {
            return Ok(());
        }
        self.work_on(self.rng.clone().millis(200, 800))?;
        self.kill()?;
        self.go_home()?;
        let said = self.recorded.iter().filter_map(|stamped| match stamped.event {
            Event::Rejected { code, .. } if code != INSUFFICIENT_STORAGE => Some(code),
            _ => None,
        });
        if let Some(code) = said.max() {
            self.misbehaved(format!("a publish was refused with {code} for want of space"));
        }
        self.disk.remount()?;
        self.start()?;
        self.drain()
    }

    /// Not what a device says about blocks that a file has already; but some do.
    fn no_space_said_by_the_device(&mut self) -> Fallible<()> {
        self.kind = format!("device full, exit {EXIT_IO} or healed");
        self.work()?;
        let mark = kernel_time()?;
        self.expect_the_end();
        self.disk.arm(&[Rule { what: "write", errno: ENOSPC, once: false, at: None }])?;
        let begun = Instant::now();
        let spell = self.rng.millis(500, 3_000);
        while begun.elapsed() < spell && self.alive() {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.count_signs(mark)?;
        if !self.alive() {
            self.expect_exit(EXIT_IO, "after a write found no space")?;
        }
        self.heal_and_drain()
    }

    fn slow(&mut self) -> Fallible<()> {
        let pace = *self.rng.pick(&[20, 50, 100]);
        self.kind = "crawling, then sound".into();
        self.work()?;
        let counter = self.disk.counter()?;
        let (before, began) = (self.so_far(), Instant::now());
        let writes = counter.count()?;
        self.disk.slow_down(pace)?;
        let spell = self.rng.millis(2_000, 4_000);
        let mut resident = 0;
        while began.elapsed() < spell {
            resident = resident.max(self.resident_kib()?);
            if !self.alive() {
                self.misbehaved("ended on a slow disk".into());
                return Ok(());
            }
            self.check_health()?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let rate = (counter.count()? - writes) as f64 / began.elapsed().as_secs_f64();
        // Twice: the group's first second is free.
        if rate <= 2.0 * f64::from(pace) + 100.0 {
            self.injected += 1;
        }
        if resident > RESIDENT_MAX_KIB {
            self.misbehaved(format!("{resident} KiB of memory on a slow disk; at most {RESIDENT_MAX_KIB}"));
        }
        self.disk.heal()?;
        let slow = self.so_far();
        if slow.confirmed == before.confirmed {
            // Then it must at least go on afterwards.
            self.kind = "crawling so that nothing was confirmed, then sound".into();
        }
        self.until("the broker is at work again when the disk is", |now, then| now.confirmed > then.confirmed + 50)?;
        self.kill()?;
        self.go_home()?;
        self.disk.remount()?;
        self.start()?;
        self.drain()
    }

    /// Publishers begin, and everybody works for a while.
    fn work(&mut self) -> Fallible<()> {
        if let Some(load) = self.load.as_mut() {
            load.publish();
        }
        let alive = self.rng.millis(300, 1_500);
        self.work_on(alive)
    }

    fn work_on(&mut self, alive: Duration) -> Fallible<()> {
        let begun = Instant::now();
        while begun.elapsed() < alive || self.so_far().confirmed == 0 {
            go_on()?;
            let broker = self.broker.as_mut().ok_or("no broker runs")?;
            broker.still_runs()?;
            if begun.elapsed() > PATIENCE {
                return Err("nothing is confirmed on a sound disk".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The subscriptions stay, the consumers go: a backlog grows.
    fn home_of_consumers(&mut self) -> Fallible<()> {
        self.load.as_mut().map_or(Ok(()), load::Load::send_home)
    }

    fn so_far(&self) -> Verdict {
        self.load.as_ref().map(|load| load.recorder.so_far().0).unwrap_or_default()
    }

    /// Waits for something to become true of what was seen, compared to now. `None`: it never did, which is recorded.
    fn until(&mut self, what: &str, reached: impl Fn(&Verdict, &Verdict) -> bool) -> Fallible<Option<Verdict>> {
        let (then, begun) = (self.so_far(), Instant::now());
        loop {
            go_on()?;
            let now = self.so_far();
            if reached(&now, &then) {
                return Ok(Some(now));
            }
            if !self.alive() || begun.elapsed() > PATIENCE {
                let ended = self.broker.as_mut().and_then(|broker| broker.still_runs().err());
                self.misbehaved(format!("{what}: not so{}", ended.map(|why| format!(" ({why})")).unwrap_or_default()));
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn alive(&mut self) -> bool {
        self.broker.as_mut().is_some_and(|broker| broker.ended().is_none())
    }

    fn expect_the_end(&self) {
        if let Some(load) = &self.load {
            load.expect_the_end();
        }
    }

    fn fail_until_it_ends(&mut self, rule: Rule) -> Fallible<()> {
        let mark = kernel_time()?;
        self.expect_the_end();
        self.disk.arm(&[rule])?;
        if rule.what == "write" && rule.once {
            // The kernel writes too; what it does about an error of its own is not the broker's business.
            let begun = Instant::now();
            while self.alive() && begun.elapsed() < NOTICE_ONE {
                std::thread::sleep(Duration::from_millis(5));
            }
            if self.alive() && !self.hit_the_log(mark)? {
                self.missed = true;
                return Ok(());
            }
        }
        self.expect_exit(EXIT_IO, &format!("after a failed {}", rule.what))?;
        self.count_signs(mark)
    }

    /// Whether one of the sectors that the kernel reports since `mark` belongs to a segment.
    fn hit_the_log(&self, mark: f64) -> Fallible<bool> {
        let device = format!("dev {}, sector ", self.disk.device.name());
        let kernel = tool("dmesg", &[])?;
        let lines = kernel.lines().filter(|line| stamp_of(line) >= mark);
        let sectors = lines.filter_map(|line| line.split_once(&device)?.1.split(' ').next()?.parse::<u64>().ok());
        let sectors: Vec<u64> = sectors.collect();
        for entry in fs::read_dir(self.disk.place().join("store").join("wal"))? {
            let extents = tool("filefrag", &["-e", "-b512", &entry?.path().display().to_string()])?;
            if sectors.iter().any(|sector| parse_extents(&extents).any(|extent| extent.contains(sector))) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The broker ends by itself, with this code.
    fn expect_exit(&mut self, code: i32, when: &str) -> Fallible<()> {
        let begun = Instant::now();
        let broker = self.broker.as_mut().ok_or("no broker runs")?;
        let ended = loop {
            go_on()?;
            if let Some(ended) = broker.ended() {
                break Some(ended);
            }
            if begun.elapsed() > NOTICE {
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        match ended {
            Some(Some(got)) if got == code => {}
            Some(got) => {
                let last: Vec<String> = broker.said().lines().rev().take(3).map(String::from).collect();
                self.misbehaved(format!("exit {got:?} {when}, documented is {code}: {}", last.join(" | ")));
            }
            None => self.misbehaved(format!("still runs {} s {when}", NOTICE.as_secs())),
        }
        Ok(())
    }

    /// Evidence that the fault happened: what the kernel says of our device, and the broker of its errors.
    fn count_signs(&mut self, since: f64) -> Fallible<()> {
        let device = format!("dev {}, ", self.disk.device.name());
        let kernel = tool("dmesg", &[])?;
        let kernel = kernel.lines().filter(|line| line.contains(&device) && stamp_of(line) >= since).count();
        let said = self.broker.as_ref().map(Broker::said).unwrap_or_default();
        let broker = said.lines().filter(|line| line.contains("os error 5)") || line.contains("os error 28)")).count();
        self.injected += (kernel + broker) as u64;
        Ok(())
    }

    fn kill(&mut self) -> Fallible<()> {
        self.expect_the_end();
        if let Some(broker) = self.broker.take() {
            broker.kill()?;
        }
        Ok(())
    }

    /// The clients of a broker that is gone; what they saw is the history so far.
    fn go_home(&mut self) -> Fallible<()> {
        if let Some(load) = self.load.take() {
            let (recorded, verdict) = load.finish()?;
            self.recorded = recorded;
            // The oracle sees it all again later; here only whether the harness's clients were content.
            drop(verdict);
        }
        Ok(())
    }

    fn start(&mut self) -> Fallible<()> {
        self.starts += 1;
        let cores = *self.rng.pick(&[1, 2]);
        self.broker = Some(self.setup.start(self.starts, cores)?);
        Ok(())
    }

    fn ready(&mut self) -> Fallible<bool> {
        let broker = self.broker.as_mut().ok_or("no broker runs")?;
        match broker.wait_ready(self.setup.address(), READY_PATIENCE) {
            Ok(_) => Ok(true),
            Err(why) => {
                self.misbehaved(format!("start failed: {why}"));
                Ok(false)
            }
        }
    }

    /// What is left of the broker goes; a new one starts on the sound disk.
    fn heal_and_drain(&mut self) -> Fallible<()> {
        self.kill()?;
        self.go_home()?;
        self.disk.replace()?;
        self.start()?;
        self.drain()
    }

    fn drain(&mut self) -> Fallible<()> {
        if !self.ready()? {
            return Ok(());
        }
        let again = self.cut(u64::MAX).unanswered();
        let seen = drain(&self.setup, &self.plan, self.starts, &again, &self.marked);
        self.marked = seen.marked;
        self.after.extend(seen.events);
        self.drained = seen.all;
        if !seen.all {
            self.misbehaved("not everything came out: a marker or an answer is missing".into());
        }
        self.kill()
    }

    fn cut(&self, at: u64) -> Cut<'_> {
        Cut { plan: &self.plan, recorded: &self.recorded, at, allowed: Allowed::Nothing, one_log: false }
    }

    /// The same on a disk from which everything is gone that was not flushed when the log had `at` entries.
    fn drain_what_was_flushed(&mut self, at: u64) -> Fallible<()> {
        let folder = self.disk.fresh().with_file_name("flushed");
        fs::create_dir_all(&folder)?;
        let writes = Writes::read(&self.disk.log())?;
        let image = folder.join("image");
        Image::read(&self.disk.fresh())?.cut(&writes, at, false, &mut self.rng, &image)?;
        let place = folder.join("mnt");
        let mounted = Mounted::image(self.scene.fs, &image, &place)?;
        let setup = Setup {
            extra: self
                .setup
                .extra
                .iter()
                .map(|(name, value)| match name.as_str() {
                    "BLIPMQ_WAL_PATH" => (name.clone(), place.join("store").display().to_string()),
                    _ => (name.clone(), value.clone()),
                })
                .collect(),
            ..self.setup.clone()
        };
        let run = self.starts + 1;
        let mut broker = setup.start(run, 1)?;
        let mut after = Vec::new();
        let mut drained = false;
        match broker.wait_ready(setup.address(), READY_PATIENCE) {
            Err(why) => {
                after.push(Event::Misbehaved { run, text: format!("start without what was not flushed: {why}") })
            }
            Ok(_) => {
                let seen = drain(&setup, &self.plan, run, &self.cut(at).unanswered(), &[]);
                after.extend(seen.events);
                drained = seen.all;
            }
        }
        broker.kill()?;
        drop(mounted);
        let (verdict, _) = self.cut(at).judge(&after, drained);
        self.verdict.add(&verdict);
        Ok(())
    }

    /// A block of the store that every start reads, by its place on the disk: a segment's header or a checkpoint.
    fn something_to_read(&mut self) -> Fallible<(&'static str, u64)> {
        let store = self.disk.place().join("store");
        let (what, folder) = *self.rng.pick(&[("segment", "wal"), ("segment", "wal"), ("checkpoint", "ckpt")]);
        let mut files: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(store.join(folder))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension == "seg") {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            return Err(format!("the store has no {what}").into());
        }
        let file = self.rng.pick(&files).clone();
        Ok((what, first_block(&file)?))
    }

    /// Takes all space that the store has not.
    fn fill(&mut self, filler: &Path) -> Fallible<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(filler)?;
        let zeros = vec![1; 64 * 1024];
        loop {
            match file.write_all(&zeros) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn resident_kib(&self) -> Fallible<u64> {
        let Some(broker) = &self.broker else { return Ok(0) };
        let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0))
    }

    /// The broker still answers at its side door.
    fn check_health(&mut self) -> Fallible<()> {
        let asked = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.setup.metrics_port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        match asked() {
            Ok(answer) if answer.starts_with("HTTP/1.1 200") => {}
            Ok(answer) => self.misbehaved(format!("/healthz on a slow disk: {:?}", answer.lines().next())),
            Err(error) => self.misbehaved(format!("/healthz on a slow disk: {error}")),
        }
        Ok(())
    }

    fn misbehaved(&mut self, text: String) {
        self.after.push(Event::Misbehaved { run: self.starts, text });
    }

    /// `None`: the fault did not happen.
    fn finish(mut self, options: &Options, number: u32) -> Fallible<Option<Done>> {
        self.kill()?;
        self.go_home()?;
        let (verdict, taken) = self.cut(u64::MAX).judge(&self.after, self.drained);
        self.verdict.add(&verdict);
        if self.missed || self.injected == 0 && self.verdict.is_clean() {
            return Ok(None);
        }
        if self.injected == 0 {
            self.kind.push_str(" (without a sign of the fault)");
        }
        let artefacts = if self.verdict.is_clean() { None } else { Some(self.keep(options, number)?) };
        let delivered = self.after.iter().filter(|event| matches!(event, Event::Deliver(_))).count() as u64;
        let Trial { kind, verdict, injected, .. } = self;
        Ok(Some(Done { kind, verdict, confirmed: taken.confirmed, delivered, injected, invalid: 0, artefacts }))
    }

    /// The disk, the log of its writes, the judged history, and what the brokers said.
    fn keep(&self, options: &Options, number: u32) -> Fallible<PathBuf> {
        let folder = options.folder.join(format!("disk-{}-{}-{number:03}", options.fault.name(), options.seed));
        fs::create_dir_all(&folder)?;
        history::write(&folder.join("history.txt"), &self.plan, &self.cut(u64::MAX).judged(&self.after))?;
        for file in [self.disk.contents(), self.disk.log()] {
            let to = folder.join(file.file_name().unwrap_or_default()).display().to_string();
            tool("cp", &["--sparse=always", &file.display().to_string(), &to])?;
        }
        tool("cp", &["-r", &self.setup.folder.display().to_string(), &folder.display().to_string()])?;
        let kernel = tool("dmesg", &[])?;
        let last: Vec<&str> = kernel.lines().rev().take(200).collect();
        fs::write(folder.join("kernel.txt"), last.into_iter().rev().collect::<Vec<_>>().join("\n"))?;
        fs::write(folder.join("about.txt"), format!("{}\n{:#?}\n{:#?}\n", self.kind, self.scene, self.setup))?;
        Ok(folder)
    }
}

/// Where on its device a file begins, in bytes.
fn first_block(file: &Path) -> Fallible<u64> {
    let extents = tool("filefrag", &["-e", "-b4096", &file.display().to_string()])?;
    parse_first_block(&extents).ok_or_else(|| format!("{}: where is it? {extents}", file.display()).into())
}

fn parse_first_block(extents: &str) -> Option<u64> {
    parse_extents(extents).next().map(|extent| extent.start() * 4_096)
}

/// Where on the device: `   0:        0..     255:      34816..     35071:    256: …`
fn parse_extents(extents: &str) -> impl Iterator<Item = RangeInclusive<u64>> {
    extents.lines().filter_map(|line| {
        let mut fields = line.split(':');
        fields.next()?.trim().parse::<u32>().ok()?;
        let (first, last) = fields.nth(1)?.split_once("..")?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    })
}

/// The kernel's log has seconds since it started.
fn kernel_time() -> Fallible<f64> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    Ok(uptime.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0))
}

/// `[12499.056683] I/O error, dev loop0, …`
fn stamp_of(line: &str) -> f64 {
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split(']').next()?.trim().parse().ok());
    stamp.unwrap_or(f64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tools_print_is_understood() {
        let extents = "Filesystem type is: ef53\nFile size of x is 1048576 (256 blocks of 4096 bytes)\n ext:     logical_offset:        physical_offset: length:   expected: flags:\n   0:        0..     255:      34816..     35071:    256:             last,eof\n";
        assert_eq!(parse_first_block(extents), Some(34_816 * 4_096));
        assert_eq!(parse_first_block("nothing"), None);
        assert_eq!(stamp_of("[12499.056683] I/O error, dev loop0, sector 0"), 12_499.056_683);
        assert_eq!(stamp_of("[    1.5] x"), 1.5);
    }
}
