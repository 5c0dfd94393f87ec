//! Plants mistakes in the broker, one after the other, and runs the harness each belongs to until it is caught.
//!
//! Owns: which harness each mistake belongs to. A mistake nobody catches is a hole in a harness; a catch proves something only
//! because the same lives and the same tests are clean without the mistake, which is looked at first.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blipmq::planted::{self, Bug};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::Fallible;
use crate::sim::machine::HostMistake;
use crate::sim::{self, Options};

/// What runs until it catches a mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Harness {
    /// Lives of `chaos sim`.
    Sim,
    /// One unit test of the library: what it is about needs a real file, or cannot show from outside as long as another check
    /// stands behind it.
    Test(&'static str),
    /// `chaos …` with the real broker: what is planted is in the code around the system calls.
    Real(&'static [&'static str]),
}

impl Harness {
    /// For `--harness`.
    pub fn name(self) -> &'static str {
        match self {
            Harness::Sim => "sim",
            Harness::Test(_) => "test",
            Harness::Real(args) => args[0],
        }
    }
}

/// What is planted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mistake {
    /// In the broker's code.
    Broker(Bug),
    /// In what the simulator does in the driver's and the keeper's place.
    Host(HostMistake),
}

impl Mistake {
    pub fn all() -> impl Iterator<Item = Mistake> {
        let broker = Bug::ALL.iter().copied().map(Mistake::Broker);
        broker.chain(HostMistake::ALL.into_iter().map(Mistake::Host))
    }

    pub fn name(self) -> String {
        match self {
            Mistake::Broker(bug) => bug.name().to_string(),
            Mistake::Host(mistake) => format!("host-{}", kebab(&format!("{mistake:?}"))),
        }
    }

    fn does(self) -> &'static str {
        match self {
            Mistake::Broker(bug) => bug.doc(),
            Mistake::Host(_) => "The same in the simulator's driver and keeper.",
        }
    }

    pub fn harness(self) -> Harness {
        match self {
            Mistake::Broker(bug) => harness(bug),
            Mistake::Host(_) => Harness::Sim,
        }
    }
}

/// Most belong to the simulator.
fn harness(bug: Bug) -> Harness {
    match bug {
        Bug::SkipSync => Harness::Real(&["power", "--images", "60", "--policy", "always"]),
        Bug::SyncForgetsOldSegment => Harness::Real(&["power", "--images", "400", "--policy", "every_n:64"]),
        Bug::CheckpointNotSynced => Harness::Real(&["power", "--images", "400", "--policy", "always"]),
        Bug::IgnoreIoError => Harness::Real(&["disk", "--fault", "write-eio"]),
        Bug::SyncRetried => Harness::Real(&["disk", "--fault", "sync-eio"]),
        Bug::ReadErrorIgnored => Harness::Real(&["disk", "--fault", "read-eio"]),
        Bug::IgnoreSegmentLock => Harness::Real(&["crash", "--rounds", "400", "--policy", "always", "--slow-disk"]),
        Bug::CheckpointInPlace => {
            Harness::Test("wal::disk::tests::a_checkpoint_goes_where_the_one_before_the_last_was")
        }
        Bug::SaltReused => Harness::Test("wal::keeper::tests::a_slot_goes_round_with_a_new_salt"),
        Bug::NoPositionCheck | Bug::NoStreamCheck | Bug::NoStoreCheck => {
            Harness::Test("wal::format::tests::bytes_are_told_apart")
        }
        Bug::NoSaltCheck => Harness::Test("wal::recovery::tests::frames_of_another_use_of_the_slot_are_not_news"),
        Bug::MissingUnnoticed => Harness::Test("wal::start::tests::a_missing_segment_is_refused"),
        Bug::IndexGapUnnoticed => Harness::Test("wal::recovery::tests::the_checkpoint_stands_for_what_it_covers"),
        Bug::ComputersClock => Harness::Test("driver::clock::tests::broker_time_goes_on_from_what_the_store_has_seen"),
        Bug::DropOnFullRing => Harness::Test("ring::mesh::tests::what_does_not_fit_stays_where_it_was"),
        _ => Harness::Sim,
    }
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Lives that a mistake has to be caught in.
    pub seeds: u64,
    /// Lives at once.
    pub threads: usize,
    /// Only these; empty: all.
    pub only: Vec<String>,
    /// Only what belongs to these harnesses; empty: all.
    pub harnesses: Vec<String>,
    pub workspace: PathBuf,
}

/// What became of one mistake.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub mistake: String,
    pub does: String,
    pub harness: String,
    /// What the checker said; `None`: it was not caught.
    pub caught: Option<String>,
    /// Of the life that showed it.
    pub seed: Option<u64>,
    /// Lives until then, whatever the order they were lived in.
    pub tried: u64,
    pub seconds: f64,
}

/// Plants them all. `Err`: a harness does not work, or finds something without any mistake.
pub fn run(settings: &Settings) -> Fallible<Vec<Outcome>> {
    let chosen: Vec<Mistake> = Mistake::all().filter(|mistake| settings.wants(*mistake)).collect();
    let unknown = settings.only.iter().find(|name| Mistake::all().all(|mistake| mistake.name() != **name));
    if let Some(name) = unknown {
        let all: Vec<String> = Mistake::all().map(Mistake::name).collect();
        return Err(format!("there is no mistake called {name}; there are {}", all.join(", ")).into());
    }
    without_any(settings, &chosen)?;
    let mut outcomes = Vec::new();
    for (nth, mistake) in chosen.iter().enumerate() {
        let what = format!("{}/{} {}", nth + 1, chosen.len(), mistake.name());
        let outcome = plant(settings, *mistake, &what)?;
        eprintln!("{what}: {}", outcome.verdict());
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

impl Settings {
    fn wants(&self, mistake: Mistake) -> bool {
        let named = self.only.is_empty() || self.only.contains(&mistake.name());
        named && (self.harnesses.is_empty() || self.harnesses.iter().any(|name| name == mistake.harness().name()))
    }
}

impl Outcome {
    /// In words: who noticed it, and how.
    pub fn verdict(&self) -> String {
        let seed = self.seed.map_or(String::new(), |seed| format!(", seed {seed} of {} lives", self.tried));
        match &self.caught {
            Some(said) => format!("caught by {}{seed}: {said}", self.harness),
            None => format!("NOT caught by {} in {} tries", self.harness, self.tried),
        }
    }
}

/// Nothing planted: nothing may be found.
fn without_any(settings: &Settings, chosen: &[Mistake]) -> Fallible<()> {
    planted::plant(None);
    if chosen.iter().any(|mistake| mistake.harness() == Harness::Sim)
        && let Some((seed, said, _)) = live(settings, &Options::default(), "nothing planted")
    {
        return Err(format!("seed {seed} fails without any mistake: {said}").into());
    }
    let tests: Vec<&str> = chosen
        .iter()
        .filter_map(|mistake| if let Harness::Test(name) = mistake.harness() { Some(name) } else { None })
        .collect();
    for test in tests.iter().copied().collect::<BTreeSet<&str>>() {
        if !passes(settings, test, None)? {
            return Err(format!("{test} fails without any mistake").into());
        }
    }
    Ok(())
}

fn plant(settings: &Settings, mistake: Mistake, what: &str) -> Fallible<Outcome> {
    let started = Instant::now();
    let harness = mistake.harness();
    let mut outcome = Outcome {
        mistake: mistake.name(),
        does: mistake.does().to_string(),
        harness: harness.name().to_string(),
        caught: None,
        seed: None,
        tried: 1,
        seconds: 0.0,
    };
    match harness {
        Harness::Sim => {
            let mut options = Options::default();
            match mistake {
                Mistake::Broker(bug) => planted::plant(Some(bug)),
                Mistake::Host(mistake) => options.mistake = Some(mistake),
            }
            let found = live(settings, &options, what);
            planted::plant(None);
            outcome.tried = found.as_ref().map_or(settings.seeds, |(.., tried)| *tried);
            outcome.seed = found.as_ref().map(|(seed, ..)| *seed);
            outcome.caught = found.map(|(_, said, _)| said);
        }
        Harness::Test(test) => {
            let caught = !passes(settings, test, Some(&mistake.name()))?;
            outcome.caught = caught.then(|| format!("{test} fails"));
        }
        Harness::Real(args) => {
            let caught = real(args, &mistake.name())?;
            outcome.caught = caught.then(|| format!("chaos {}", args.join(" ")));
        }
    }
    outcome.seconds = started.elapsed().as_secs_f64();
    Ok(outcome)
}

/// Lives until one fails: the lowest seed that does, what was said, and how many were lived.
fn live(settings: &Settings, options: &Options, what: &str) -> Option<(u64, String, u64)> {
    let (next, lived) = (AtomicU64::new(0), AtomicU64::new(0));
    let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let style = "{msg} {bar:30} {pos}/{len} lives, {eta} left";
    let bar = ProgressBar::new(settings.seeds).with_message(what.to_string());
    bar.set_style(ProgressStyle::with_template(style).expect("a good template"));
    let is_over =
        |seed| found.lock().expect("no thread panics with it").as_ref().is_some_and(|(first, _)| *first < seed);
    std::thread::scope(|scope| {
        for _ in 0..settings.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= settings.seeds || is_over(seed) {
                        break;
                    }
                    let life = sim::run(seed, options);
                    lived.fetch_add(1, Ordering::Relaxed);
                    bar.inc(1);
                    if let Some(failure) = life.failure {
                        let said = format!("{}: {}", failure.invariant, failure.text);
                        let mut found = found.lock().expect("no thread panics with it");
                        if found.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *found = Some((seed, said));
                        }
                    }
                }
            });
        }
    });
    bar.finish_and_clear();
    let (seed, said) = found.into_inner().expect("no thread panicked")?;
    Some((seed, said, lived.into_inner()))
}

/// Runs one unit test, with a mistake planted in its process.
fn passes(settings: &Settings, test: &str, planted: Option<&str>) -> Fallible<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--quiet", "-p", "blipmq", "--lib", "--features", "planted-bugs"]);
    command.args(["--target-dir", "target/planted", "--", "--exact", test]).current_dir(&settings.workspace);
    command.env_remove(PLANTED).stderr(Stdio::piped());
    if let Some(name) = planted {
        command.env(PLANTED, name);
    }
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    match (said.contains("1 passed; 0 failed"), said.contains("0 passed; 1 failed")) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => Err(format!("{test} was not run: {said}{}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

const PLANTED: &str = "BLIPMQ_PLANTED_BUG";

/// This very program, on a real broker with the mistake: it succeeds if it has caught it.
fn real(args: &[&str], name: &str) -> Fallible<bool> {
    let status =
        Command::new(std::env::current_exe()?).args(args).args(["--planted", name]).stdout(Stdio::null()).status()?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(format!("chaos {} --planted {name}: {status}", args.join(" ")).into()),
    }
}

fn kebab(name: &str) -> String {
    let mut out = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.extend(letter.to_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_has_a_name_of_its_own_and_says_what_it_does() {
        let names: BTreeSet<String> = Mistake::all().map(Mistake::name).collect();
        assert_eq!(names.len(), Mistake::all().count());
        assert!(Mistake::all().all(|mistake| mistake.does().ends_with('.')));
        assert!(names.contains("skip-sync") && names.contains("host-sync-nothing"));
    }
}
