//! `chaos power`: the power goes at a random moment of a recorded run, again and again.
//!
//! A batch records one run: a broker under load on a disk whose every write is logged (`rig`), each answer stamped with the
//! length of that log. Then, for each of many places in the log, it builds the disk a power cut there could have left, starts
//! a broker on it, lets everything come out, and judges that against what had been confirmed by then (`cut`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::Fallible;
use crate::broker::Setup;
use crate::cut::{Allowed, Cut, Stamped, Taken};
use crate::history;
use crate::oracle::{Event, Kind, Plan, Verdict};
use crate::rig::device::{Folder, Mounted};
use crate::rig::drain::drain;
use crate::rig::go_on;
use crate::rig::load;
use crate::rig::stage::{self, READY_PATIENCE, Scene, Stage};
use crate::rig::writes::{Fate, Image, Writes};
use crate::rng::Rng;

/// Images judged at once; more than two CPUs would not be busy otherwise.
const WORKERS: usize = 2;
/// Between two looks at the log's length.
const SAMPLE_EVERY: Duration = Duration::from_micros(500);
/// A running sync excuses at most so much under `interval_ms`.
const SYNC_MAX_MICROS: u64 = 200_000;
/// Of a hundred images, how many brokers are killed at the end, to see that nothing comes twice.
const SECOND_START: u64 = 25;

#[derive(Clone, Debug)]
pub struct Options {
    pub images: u32,
    /// Images of one recorded run.
    pub per_run: u32,
    pub scene: Scene,
    pub seed: u64,
    /// Where artefacts of anomalies go.
    pub folder: PathBuf,
    /// Stop at the first anomaly.
    pub until_found: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub images: u32,
    pub runs: u32,
    /// Images on which something was found.
    pub bad_images: u32,
    pub verdict: Verdict,
    pub taken: Taken,
    pub fate: Fate,
    /// Messages that came out of images.
    pub delivered: u64,
    pub recovery: Duration,
    pub worst_recovery: Duration,
    pub recording: Duration,
    pub seconds: f64,
    pub artefacts: Vec<String>,
}

impl Report {
    pub fn extent(&self) -> String {
        format!(
            "{} images of {} runs; {} confirms judged, {} deliveries; unsynced writes: {} dropped, {} torn, {} kept",
            self.images,
            self.runs,
            self.taken.confirmed,
            self.delivered,
            self.fate.dropped,
            self.fate.torn,
            self.fate.kept
        )
    }

    pub fn found(&self) -> String {
        let counts = Kind::ALL.iter().filter(|kind| self.verdict.count(**kind) > 0);
        let mut words: Vec<String> =
            counts.map(|kind| format!("{} {}", self.verdict.count(*kind), kind.name())).collect();
        if words.is_empty() {
            words.push("0 lost beyond the policy's bound, 0 phantom, 0 out of order".into());
        }
        if self.taken.publishes + self.taken.acks > 0 {
            words.push(format!(
                "gone as the policy allows: {} publishes, {} acknowledgements",
                self.taken.publishes, self.taken.acks
            ));
        }
        words.join(", ")
    }
}

/// A recorded run, ready to be cut.
struct Recording {
    plan: Plan,
    events: Vec<Stamped>,
    verdict: Verdict,
    writes: Writes,
    /// Cuts are made from here on: the subscriptions are on the disk.
    first: u64,
    /// And to here: the broker was alive.
    last: u64,
    samples: Samples,
    cores: u16,
    settings: Vec<(String, String)>,
    folder: Folder,
    fresh: PathBuf,
}

pub fn run(options: &Options) -> Fallible<Report> {
    let started = Instant::now();
    let mut report = Report::default();
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} images, {elapsed}, {eta} left")?;
    let bar = ProgressBar::new(u64::from(options.images)).with_style(style);
    bar.set_message(format!("{} {}", options.scene.fs.name(), options.scene.policy));
    while report.images < options.images {
        go_on()?;
        let number = report.runs;
        let images = options.per_run.min(options.images - report.images);
        batch(options, number, images, &mut report, &bar)?;
        if options.until_found && !report.verdict.is_clean() {
            break;
        }
    }
    bar.finish_and_clear();
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn batch(options: &Options, number: u32, images: u32, report: &mut Report, bar: &ProgressBar) -> Fallible<()> {
    let begun = Instant::now();
    let recording = record(options, number)?;
    report.recording += begun.elapsed();
    report.runs += 1;
    if !recording.verdict.is_clean() {
        let folder = options.folder.join(format!("power-{}-{number:03}", options.seed));
        keep_recording(&recording, &folder)?;
        report.artefacts.push(folder.display().to_string());
        report.verdict.add(&recording.verdict);
    }
    let mut rng = Rng::derive(options.seed, &[u64::from(number), 7]);
    let mut points: Vec<u64> = (0..images)
        .map(|_| {
            let at = rng.between(recording.first, recording.last);
            // Half of them where most is at stake.
            if rng.percent(50) { recording.writes.before_flush(at).min(recording.last) } else { at }
        })
        .collect();
    points.sort_unstable();
    let total = Mutex::new(report);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers = (0..WORKERS).map(|worker| {
            let (recording, points, total, stop) = (&recording, &points, &total, &stop);
            scope.spawn(move || -> Fallible<()> {
                let mut checker = Checker::new(options, recording, number, worker)?;
                for at in points.iter().skip(worker).step_by(WORKERS) {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let checked = go_on().and_then(|()| checker.check(*at));
                    let checked = checked.inspect_err(|_| stop.store(true, Ordering::SeqCst))?;
                    let mut report = total.lock().map_err(|_| "a worker panicked")?;
                    checked.add_to(&mut report, *at, number, bar);
                    if options.until_found && !report.verdict.is_clean() {
                        stop.store(true, Ordering::SeqCst);
                    }
                    bar.inc(1);
                }
                Ok(())
            })
        });
        let workers: Vec<_> = workers.collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked")?)
    })
}

fn record(options: &Options, number: u32) -> Fallible<Recording> {
    let mut rng = Rng::derive(options.seed, &[u64::from(number)]);
    // The disk first, so that on an error it goes last.
    let Stage { disk, mut broker, mut load, cores, settings, .. } =
        Stage::set(&options.scene, &number.to_string(), &mut rng)?;
    let counter = disk.counter()?;
    let first = counter.count()?;
    load.publish();
    let alive = rng.millis(1_500, 4_000);
    let begun = Instant::now();
    let mut samples = Samples::default();
    let mut died = Ok(());
    while begun.elapsed() < alive && died.is_ok() {
        samples.0.push((load.micros(), counter.count()?));
        died = broker.still_runs();
        go_on()?;
        std::thread::sleep(SAMPLE_EVERY);
    }
    if let Err(why) = died {
        load.recorder.record(&[Event::Misbehaved { run: 1, text: why }]);
    }
    load.expect_the_end();
    let last = counter.count()?;
    broker.kill()?;
    let (events, verdict) = load.finish()?;
    let (log, fresh, contents) = (disk.log(), disk.fresh(), disk.contents());
    let folder = disk.finish();
    let writes = Writes::read(&log)?;
    let mut image = Image::read(&fresh)?;
    image.advance(&writes, writes.len())?;
    if let Err(at) = image.equals(&contents)? {
        return Err(format!("the rig is broken: byte {at} of the disk is not what the log of its writes says").into());
    }
    fs::remove_file(contents)?;
    let plan = load::plan(&options.scene.policy);
    Ok(Recording { plan, events, verdict, writes, first, last, samples, cores, settings, folder, fresh })
}

/// When the log had which length.
#[derive(Default)]
struct Samples(Vec<(u64, u64)>);

impl Samples {
    /// The last time at which the log was shorter than `at`.
    fn before(&self, at: u64) -> u64 {
        let next = self.0.partition_point(|(_, count)| *count < at);
        next.checked_sub(1).map_or(0, |last| self.0[last].0)
    }

    /// The first time at which it was at least so long.
    fn after(&self, at: u64) -> u64 {
        let next = self.0.partition_point(|(_, count)| *count < at);
        self.0.get(next).or(self.0.last()).map_or(0, |(micros, _)| *micros)
    }

    /// The longest pause between two samples from `from` to `to`: so long the machine did something else.
    fn pause(&self, from: u64, to: u64) -> u64 {
        let within = self.0.windows(2).filter(|pair| pair[1].0 >= from && pair[0].0 <= to);
        within.map(|pair| pair[1].0 - pair[0].0).max().unwrap_or(0)
    }
}

impl Recording {
    /// What the policy lets a cut after `at` writes take.
    fn allowed(&self, policy: &str, at: u64) -> Allowed {
        match policy.split_once(':') {
            Some(("every_n", n)) => Allowed::Records(n.parse().unwrap_or(0) * u64::from(self.cores)),
            Some(("interval_ms", ms)) => {
                // What was confirmed in the last T ms, and while a sync was running; as well as we can tell the time.
                let interval = ms.parse().unwrap_or(0) * 1_000;
                let cut = self.samples.before(at);
                let synced = self.samples.after(self.writes.flushed(at));
                let running = self.samples.after(at).saturating_sub(synced).min(SYNC_MAX_MICROS);
                let pause = self.samples.pause(cut.saturating_sub(interval + running), self.samples.after(at));
                Allowed::Since { micros: cut.saturating_sub(interval + running + 2 * pause + 5_000) }
            }
            _ if policy == "none" => Allowed::Tail,
            _ => Allowed::Nothing,
        }
    }
}

/// Judges images, one after the other.
struct Checker<'a> {
    options: &'a Options,
    recording: &'a Recording,
    batch: u32,
    image: Image,
    file: PathBuf,
    place: PathBuf,
    setup: Setup,
}

struct Checked {
    verdict: Verdict,
    taken: Taken,
    fate: Fate,
    delivered: u64,
    recovery: Duration,
    artefacts: Option<PathBuf>,
}

impl<'a> Checker<'a> {
    fn new(options: &'a Options, recording: &'a Recording, batch: u32, worker: usize) -> Fallible<Checker<'a>> {
        let within = recording.folder.path();
        let folder = within.join(format!("check-{worker}"));
        fs::create_dir_all(&folder)?;
        let place = within.join(format!("mnt-{worker}"));
        let ports = Rng::derive(options.seed, &[batch.into(), worker as u64]).draw();
        let setup = stage::setup(&options.scene, &folder, &place, recording.settings.clone(), ports)?;
        let file = within.join(format!("image-{worker}"));
        let image = Image::read(&recording.fresh)?;
        Ok(Checker { options, recording, batch, image, file, place, setup })
    }

    fn check(&mut self, at: u64) -> Fallible<Checked> {
        let recording = self.recording;
        let fate = self.make_image(at)?;
        fs::remove_dir_all(&self.setup.folder)?;
        fs::create_dir_all(&self.setup.folder)?;
        let mut rng = Rng::derive(self.options.seed, &[self.batch.into(), at, 2]);
        let cut = Cut {
            plan: &recording.plan,
            recorded: &recording.events,
            at,
            allowed: recording.allowed(&self.options.scene.policy, at),
            one_log: recording.cores == 1,
        };
        let mut after = Vec::new();
        let mut drained = false;
        let mut recovery = Duration::ZERO;
        match Mounted::image(self.options.scene.fs, &self.file, &self.place) {
            Err(error) => {
                after.push(Event::Misbehaved { run: 2, text: format!("the image cannot be mounted: {error}") })
            }
            Ok(_mounted) => {
                let starts = if rng.percent(SECOND_START) { 2 } else { 1 };
                let (mut again, mut marked) = (cut.unanswered(), Vec::new());
                for start in 0..starts {
                    let run = 2 + start;
                    let mut broker = self.setup.start(run, *rng.pick(&[1, 1, 1, 2]))?;
                    match broker.wait_ready(self.setup.address(), READY_PATIENCE) {
                        Err(why) => {
                            let text = format!("start failed: {why}");
                            fs::write(self.setup.folder.join("threads.txt"), broker.threads())?;
                            after.push(Event::Misbehaved { run, text });
                            drained = false;
                            break;
                        }
                        Ok(took) => recovery = recovery.max(took),
                    }
                    let seen = drain(&self.setup, &recording.plan, run, &again, &marked);
                    again.clear();
                    marked = seen.marked;
                    after.extend(seen.events);
                    drained = seen.all;
                    if !seen.all {
                        fs::write(self.setup.folder.join("threads.txt"), broker.threads())?;
                    }
                    if let Err(why) = broker.still_runs() {
                        after.push(Event::Misbehaved { run, text: why });
                    }
                    broker.kill()?;
                    if !seen.all {
                        let text = "not everything came out: a marker or an answer is missing".into();
                        after.push(Event::Misbehaved { run, text });
                    }
                }
            }
        }
        let (verdict, taken) = cut.judge(&after, drained);
        let delivered = after.iter().filter(|event| matches!(event, Event::Deliver(_))).count() as u64;
        let artefacts = if verdict.is_clean() { None } else { Some(self.keep(at, &cut, &after)?) };
        Ok(Checked { verdict, taken, fate, delivered, recovery, artefacts })
    }

    fn make_image(&mut self, at: u64) -> Fallible<Fate> {
        let mut rng = Rng::derive(self.options.seed, &[self.batch.into(), at, 1]);
        Ok(self.image.cut(&self.recording.writes, at, true, &mut rng, &self.file)?)
    }

    /// The image as the cut left it, the judged history, what the brokers said, and the whole recording.
    fn keep(&mut self, at: u64, cut: &Cut<'_>, after: &[Event]) -> Fallible<PathBuf> {
        let name = format!("power-{}-{:03}", self.options.seed, self.batch);
        let batch = self.options.folder.join(name);
        let folder = batch.join(format!("cut-{at}"));
        fs::create_dir_all(&folder)?;
        if !batch.join("log").exists() {
            keep_recording(self.recording, &batch)?;
        }
        self.make_image(at)?;
        sparse_copy(&self.file, &folder.join("image"))?;
        history::write(&folder.join("history.txt"), cut.plan, &cut.judged(after))?;
        for entry in fs::read_dir(&self.setup.folder)? {
            let path = entry?.path();
            if let Some(name) = path.file_name() {
                fs::copy(&path, folder.join(name))?;
            }
        }
        let settings: BTreeMap<_, _> = self.setup.extra.iter().cloned().collect();
        let text = format!(
            "cut after {at} writes, allowed {:?}, cores {}\n{settings:#?}\n",
            cut.allowed, self.recording.cores
        );
        fs::write(folder.join("about.txt"), text)?;
        Ok(folder)
    }
}

fn keep_recording(recording: &Recording, folder: &Path) -> Fallible<()> {
    fs::create_dir_all(folder)?;
    sparse_copy(&recording.folder.path().join("log"), &folder.join("log"))?;
    sparse_copy(&recording.fresh, &folder.join("fresh.img"))?;
    let from = recording.folder.path().join("broker").display().to_string();
    crate::rig::tool("cp", &["-r", &from, &folder.display().to_string()]).map(|_| ())
}

fn sparse_copy(from: &Path, to: &Path) -> Fallible<()> {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    crate::rig::tool("cp", &["--sparse=always", &from, &to]).map(|_| ())
}

impl Checked {
    fn add_to(self, report: &mut Report, at: u64, batch: u32, bar: &ProgressBar) {
        report.images += 1;
        report.fate.add(self.fate);
        report.taken.confirmed += self.taken.confirmed;
        report.taken.publishes += self.taken.publishes;
        report.taken.acks += self.taken.acks;
        report.delivered += self.delivered;
        report.recovery += self.recovery;
        report.worst_recovery = report.worst_recovery.max(self.recovery);
        if let Some(folder) = self.artefacts {
            report.bad_images += 1;
            let first: String = self.verdict.details.iter().take(3).map(|detail| format!("\n  {detail}")).collect();
            bar.suspend(|| eprintln!("run {batch}, cut after {at} writes, kept in {}:{first}", folder.display()));
            report.artefacts.push(folder.display().to_string());
        }
        report.verdict.add(&self.verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_cut_lies_between_two_samples() {
        let samples = Samples(vec![(100, 1), (200, 5), (300, 5), (900, 9)]);
        assert_eq!((samples.before(5), samples.after(5)), (100, 200));
        assert_eq!((samples.before(6), samples.after(6)), (300, 900));
        assert_eq!((samples.before(1), samples.after(20)), (0, 900));
        assert_eq!((samples.pause(0, 250), samples.pause(250, 400)), (100, 600));
    }
}
