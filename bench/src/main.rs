//! `bench`: measures a `blipmqd` that it starts itself, through its socket.
//!
//! `bench quick` remakes the tables of RESULTS.md; `bench compare` sets two runs side by side; `bench --mode durable` and so on
//! is the measurement of BlipMQ v1.

mod broker;
mod floors;
mod load;
mod report;
mod scenarios;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::broker::Setup;
use crate::report::{FLOORS, Machine, Results};
use crate::scenarios::{Bench, Scenario, cores, recovery, v1};

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T> = std::result::Result<T, Error>;

const DURABILITY: &str = "fsync_policy=always: a confirm follows the synced write; qos0 rows never touch the disk";
const WARMUP: Duration = Duration::from_millis(500);
const FLOOR_TIME: Duration = Duration::from_millis(400);

/// Who runs where. On a machine with one CPU both share it, and the numbers say so.
#[derive(Clone, Copy)]
pub struct Cpus {
    pub broker: usize,
    pub load: usize,
}

#[derive(Parser)]
#[command(version, about = "Measures blipmqd through its socket", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    v1: v1::Options,
    /// The broker to measure, instead of the one built from this workspace
    #[arg(long)]
    broker: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Action {
    /// Latency at fixed rates, saturation, and the machine's floors: about 90 seconds
    Quick(Quick),
    /// Ratios of the values that two JSON files have in common
    Compare { before: PathBuf, after: PathBuf },
}

#[derive(clap::Args)]
struct Quick {
    /// Each scenario runs so often; medians are shown
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    /// Measured seconds per scenario and repeat
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Only scenarios whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Also the cost of crossing cores, on a broker with two
    #[arg(long)]
    cores: bool,
    /// Also the recovery from a log of so many MiB
    #[arg(long, value_name = "MIB")]
    recovery: Option<u64>,
    /// Write every sample and the summary as JSON lines
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The broker to measure, instead of the one built from this workspace
    #[arg(long)]
    broker: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match (&arguments.action, arguments.v1.mode) {
        (Some(Action::Quick(options)), _) => quick(options),
        (Some(Action::Compare { before, after }), _) => report::compare(before, after).map(|table| print!("{table}")),
        (None, Some(mode)) => {
            bench(arguments.broker.as_deref(), 0.0).and_then(|bench| v1::run(&bench, mode, &arguments.v1))
        }
        (None, None) => Err("say `bench quick`, `bench compare A B` or `bench --mode MODE`; --help tells more".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn quick(options: &Quick) -> Result<()> {
    let bench = bench(options.broker.as_deref(), options.seconds)?;
    let mut scenarios = scenarios::quick();
    if options.cores {
        scenarios.extend(cores::scenarios());
    }
    if let Some(mib) = options.recovery {
        scenarios.push(recovery::scenario(mib));
    }
    if let Some(only) = &options.only {
        scenarios.retain(|scenario| scenario.name.contains(only));
    }
    let machine = Machine::describe(&bench.setup.work, bench.setup.cpus.clone(), bench.cpus.load, DURABILITY);
    println!("{}", machine.text());
    if bench.cpus.broker == bench.cpus.load {
        println!("Broker and load generator share the only CPU: these are not the broker's numbers.\n");
    }

    // Repeats go round the scenarios, so that a slow minute of the machine touches one sample of each.
    let mut results = Results::default();
    for repeat in 0..options.repeat {
        eprintln!("repeat {} of {}: floors", repeat + 1, options.repeat);
        results.sample(FLOORS, repeat, floors::measure(&bench.cpus, &bench.setup.work, FLOOR_TIME)?);
        for Scenario { name, run } in &scenarios {
            eprintln!("repeat {} of {}: {name}", repeat + 1, options.repeat);
            match run(&bench) {
                Ok(values) => results.sample(name, repeat, values),
                Err(error) => {
                    eprintln!("  failed: {error}");
                    results.failure(name, repeat, error.to_string());
                }
            }
        }
    }
    print!("{}", results.tables());
    let failures = results.failures();
    if let Some(path) = &options.json {
        results.write_json(path, machine)?;
    }
    if failures > 0 { Err(format!("{failures} measurements failed").into()) } else { Ok(()) }
}

/// Finds or builds the broker, and says where everything runs.
fn bench(broker: Option<&Path>, seconds: f64) -> Result<Bench> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the bench is not in a workspace")?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let binary = match broker {
        Some(path) => path.to_path_buf(),
        None => target.join("release").join("blipmqd"),
    };
    // Even if there is one: a stale broker gives numbers that belong to no commit.
    if broker.is_none() {
        let mut build = Command::new("cargo");
        build.current_dir(workspace).args(["build", "--release", "--bin", "blipmqd"]);
        if !build.status()?.success() {
            return Err("cannot build blipmqd".into());
        }
    }
    let work = target.join("bench");
    std::fs::create_dir_all(&work)?;
    let ids = core_affinity::get_core_ids().filter(|ids| !ids.is_empty()).ok_or("cannot tell which CPUs to use")?;
    let cpus = Cpus { broker: ids[0].id, load: ids[ids.len() - 1].id };
    let setup = Setup { binary, work, cpus: vec![cpus.broker], fsync_policy: "always" };
    Ok(Bench { setup, cpus, warmup: WARMUP, measure: Duration::try_from_secs_f64(seconds)? })
}
