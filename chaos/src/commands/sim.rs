//! `chaos sim`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blipmq::time::Duration as Virtual;
use indicatif::{ProgressBar, ProgressStyle};

use crate::oracle::Plan;
use crate::record::Row;
use crate::sim::shrink::{Shrunk, shrink};
use crate::sim::{self, Failure, Life, Options, Sum, Without};
use crate::{Fallible, broker, history};

#[derive(clap::Args)]
pub struct Args {
    /// How many lives; 1 if a seed is given.
    #[arg(long)]
    seeds: Option<u64>,
    /// The first seed [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Most cores of the broker.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    cores: Option<u16>,
    /// Only these kinds of faults; `none`, or names as in the summary.
    #[arg(long, value_delimiter = ',')]
    faults: Option<Vec<String>>,
    /// Leave these out of the plan: `client:2`, `calamity:7`, or the name of a fault. A shrunk life is replayed so.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// The chaos ends by then, in virtual microseconds.
    #[arg(long)]
    until_us: Option<u64>,
    /// Lives at once [default: one per CPU].
    #[arg(long)]
    threads: Option<usize>,
    /// Go on after a failure, and count them.
    #[arg(long)]
    keep_going: bool,
    /// Seconds for making a failing life smaller; 0: do not.
    #[arg(long, default_value_t = 60)]
    shrink_s: u64,
    /// Print the story of the life, also if nothing is wrong. Only with one seed.
    #[arg(long)]
    story: bool,
    /// Append the figures to this file.
    #[arg(long)]
    record: Option<PathBuf>,
    /// The summary as one line of JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// Lives are compared with themselves: every so many are lived twice.
const TWICE_EVERY: u64 = 16;
/// In so many lives everything happens that can.
const SEEDS_FOR_ALL: u64 = 2_000;
/// Lines of a story that are printed; the file has all.
const LINES_SHOWN: usize = 60;
const FAILURES_SHOWN: usize = 10;

/// True: nothing was violated.
pub fn run(args: &Args) -> Fallible<bool> {
    let options = options(args)?;
    let first = args.seed.unwrap_or(0);
    let seeds = args.seeds.unwrap_or(if args.seed.is_some() { 1 } else { 200 });
    if args.story {
        let recorded = sim::run_recorded(first, &Options { record: true, ..options.clone() });
        let mut out = std::io::stdout().lock();
        for line in &recorded.story {
            writeln!(out, "{line}")?;
        }
    }
    let started = Instant::now();
    let mut found = live_all(args, &options, first, seeds);
    found.sum.seconds = started.elapsed().as_secs_f64();
    found.failures.sort_unstable_by_key(|(seed, _)| *seed);
    if args.json {
        println!("{}", found.sum.json()?);
    } else {
        print!("{}", found.sum.table());
    }
    if let Some(file) = &args.record {
        row(&found).append(file)?;
    }
    if let Some((seed, failure)) = found.failures.first() {
        explain(args, &options, *seed, failure)?;
        if args.keep_going {
            tally(&found.failures);
        }
    }
    // A world in which something never happens proves nothing about it.
    let whole = args.faults.is_none() && args.without.is_empty() && args.until_us.is_none();
    let vacuous = if whole && seeds >= SEEDS_FOR_ALL { found.sum.vacuous() } else { Vec::new() };
    if !vacuous.is_empty() {
        println!("never happened: {}", vacuous.join(", "));
    }
    Ok(found.failures.is_empty() && vacuous.is_empty())
}

fn options(args: &Args) -> Fallible<Options> {
    let known = sim::fault_names();
    let check = |name: &String| match known.contains(&name.as_str()) {
        true => Ok(name.clone()),
        false => Err(format!("there is no fault {name}; there are {}", known.join(", "))),
    };
    let faults = match &args.faults {
        None => None,
        Some(list) if list == &["none"] => Some(BTreeSet::new()),
        Some(list) => Some(list.iter().map(check).collect::<Result<_, _>>()?),
    };
    let mut without = Without::default();
    for part in &args.without {
        match part.split_once(':') {
            Some(("client", number)) => _ = without.clients.insert(number.parse()?),
            Some(("calamity", number)) => _ = without.calamities.insert(number.parse()?),
            _ => _ = without.faults.insert(check(part)?),
        }
    }
    let until = args.until_us.map(|us| Virtual(us * 1_000));
    Ok(Options { cores: args.cores, faults, without, until, ..Options::default() })
}

struct Found {
    sum: Sum,
    failures: Vec<(u64, Failure)>,
}

fn live_all(args: &Args, options: &Options, first: u64, seeds: u64) -> Found {
    let threads = args.threads.or(std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1).max(1);
    let found = Mutex::new(Found { sum: Sum::default(), failures: Vec::new() });
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let style = "{bar:30} {pos}/{len} seeds, {per_sec}, {eta} left {msg}";
    let bar = ProgressBar::new(seeds).with_style(ProgressStyle::with_template(style).expect("a good template"));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(seeds as usize).max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= seeds {
                        break;
                    }
                    let life = live(first + number, number % TWICE_EVERY == 0, options);
                    let mut found = found.lock().expect("no thread panics with it");
                    found.sum.add(&life);
                    if let Some(failure) = life.failure {
                        found.failures.push((life.seed, failure));
                        bar.set_message(format!("{} failed", found.failures.len()));
                        stop.store(!args.keep_going, Ordering::Relaxed);
                    }
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    found.into_inner().expect("no thread panicked")
}

fn live(seed: u64, twice: bool, options: &Options) -> Life {
    let mut life = sim::run(seed, options);
    if twice && life.failure.is_none() {
        let again = sim::run(seed, options);
        if (again.trace, again.events) != (life.trace, life.events) {
            let text = format!("lived twice, differently: {} and {} events", life.events, again.events);
            let at = blipmq::time::Instant(life.virtual_ns);
            life.failure = Some(Failure { invariant: "I11".into(), text, at, events: life.events });
        }
    }
    life
}

/// Says what is wrong, in the smallest life that shows it, and how to see it again.
fn explain(args: &Args, options: &Options, seed: u64, failure: &Failure) -> Fallible<()> {
    println!("\nseed {seed} violates {} at {:.3} ms: {}", failure.invariant, failure.at.0 as f64 / 1e6, failure.text);
    let patience = Duration::from_secs(args.shrink_s);
    let Shrunk { options: smaller, recorded, tries } = shrink(seed, options, failure, patience);
    let folder = broker::workspace(&std::env::current_exe()?)?.join("target").join("chaos").join(format!("sim-{seed}"));
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("story.txt"), recorded.story.join("\n") + "\n")?;
    let strict = recorded.life.strict;
    history::write(&folder.join("history"), &Plan { strict, ..Plan::default() }, &recorded.history)?;
    let replay = replay(seed, &smaller);
    fs::write(folder.join("replay"), format!("{replay} --story\n"))?;
    println!("made smaller by {tries} lives, {} events, {} lines:", recorded.life.events, recorded.story.len());
    let skipped = recorded.story.len().saturating_sub(LINES_SHOWN);
    if skipped > 0 {
        println!("  … {skipped} lines before …");
    }
    for line in recorded.story.iter().skip(skipped) {
        println!("  {}", line.chars().take(300).collect::<String>());
    }
    println!("kept in {}", folder.display());
    println!("replay all of it:  {}", self::replay(seed, options));
    println!("replay what is left: {replay}");
    Ok(())
}

fn replay(seed: u64, options: &Options) -> String {
    let mut words = format!("cargo run --profile sim -p chaos -- sim --seed {seed}");
    if let Some(cores) = options.cores {
        words += &format!(" --cores {cores}");
    }
    if let Some(faults) = &options.faults {
        let list: Vec<&str> = faults.iter().map(String::as_str).collect();
        words += &format!(" --faults {}", if list.is_empty() { "none".to_string() } else { list.join(",") });
    }
    let Without { clients, calamities, faults } = &options.without;
    let clients = clients.iter().map(|number| format!("client:{number}"));
    let calamities = calamities.iter().map(|number| format!("calamity:{number}"));
    let without: Vec<String> = clients.chain(calamities).chain(faults.iter().cloned()).collect();
    if !without.is_empty() {
        words += &format!(" --without {}", without.join(","));
    }
    if let Some(until) = options.until {
        words += &format!(" --until-us {}", until.0 / 1_000);
    }
    words
}

fn tally(failures: &[(u64, Failure)]) {
    let mut kinds: BTreeMap<&str, Vec<(u64, &str)>> = BTreeMap::new();
    for (seed, failure) in failures {
        kinds.entry(&failure.invariant).or_default().push((*seed, &failure.text));
    }
    println!("\n{} seeds failed:", failures.len());
    for (invariant, seeds) in kinds {
        println!("  {:>6} × {invariant}", seeds.len());
        for (seed, text) in seeds.iter().take(FAILURES_SHOWN) {
            println!("           {seed}: {}", text.chars().take(220).collect::<String>());
        }
    }
}

fn row(found: &Found) -> Row {
    let Found { sum, failures } = found;
    let extent = format!(
        "{} seeds, {} events, {:.1} virtual hours, {} crashes, {} faults, {} confirmed, {} delivered",
        sum.lives,
        sum.events,
        sum.virtual_hours(),
        sum.crashes,
        sum.faults_in_all(),
        sum.confirmed,
        sum.delivered
    );
    Row::new("sim", extent, format!("{} violations", failures.len()), failures.is_empty(), sum.seconds)
}
