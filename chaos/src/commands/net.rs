//! `chaos net`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::commands::seed;
use crate::net::Scenario;
use crate::net::stage::{Options, Outcome};
use crate::record::Row;
use crate::{Fallible, broker};

#[derive(clap::Args)]
pub struct Args {
    /// all, or one or more of them.
    #[arg(long, value_delimiter = ',', default_value = "all", value_parser = scenarios)]
    scenario: Vec<Scenarios>,
    /// Length of each scenario's trouble, in seconds; the quiet before and after is half as long.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    cores: u16,
    /// Clients of the storm.
    #[arg(long, default_value_t = 5_000)]
    connections: usize,
    /// Consumers that do not read.
    #[arg(long, default_value_t = 500)]
    stalled: usize,
    /// Repeats the draws of a run (not the scheduling of its processes).
    #[arg(long)]
    seed: Option<u64>,
    /// The blipmqd to test [default: next to this program, else built].
    #[arg(long)]
    broker: Option<PathBuf>,
    /// A setting of the broker as its environment has it, such as BLIPMQ_NET_KEEPALIVE_MS=0. May be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Switch off, by configuration, the limit each scenario is about, and succeed only if every scenario notices.
    #[arg(long, conflicts_with = "record")]
    limits_off: bool,
    /// Keep stores, histories and output of clean scenarios too.
    #[arg(long)]
    keep_artifacts: bool,
    /// Append a row per scenario to this file.
    #[arg(long)]
    record: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Scenarios(Vec<Scenario>);

fn scenarios(text: &str) -> Result<Scenarios, String> {
    match text {
        "all" => Ok(Scenarios(Scenario::value_variants().to_vec())),
        one => Scenario::from_str(one, true).map(|scenario| Scenarios(vec![scenario])),
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// True: as it should be.
pub fn run(args: &Args) -> Fallible<bool> {
    let seed = seed(args.seed)?;
    let files = raise_files()?;
    if files < 2 * args.connections as u64 {
        return Err(format!(
            "{files} open files are allowed; {} connections want {}",
            args.connections,
            2 * args.connections
        )
        .into());
    }
    let workspace = broker::workspace(&std::env::current_exe()?)?;
    let mut options = Options {
        broker: broker::locate(args.broker.clone(), false)?,
        folder: workspace.join("target").join("chaos"),
        seed,
        cores: args.cores,
        during: Duration::try_from_secs_f64(args.seconds)?,
        storm: args.connections,
        stalled: args.stalled,
        grace: Duration::from_secs(10),
        extra: args.env.clone(),
        keep: args.keep_artifacts,
    };
    eprintln!("chaos: seed {seed}, broker {}", options.broker.display());
    let scenarios: Vec<Scenario> = args.scenario.iter().flat_map(|chosen| chosen.0.clone()).collect();
    let bar = ProgressBar::new(scenarios.len() as u64)
        .with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} scenarios, {elapsed}: {msg}")?);
    let mut all_clean = true;
    for scenario in scenarios {
        let name = scenario.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        bar.set_message(name.clone());
        if args.limits_off {
            let Some(off) = limits_off(scenario) else {
                bar.suspend(|| println!("{name}: has no limit to switch off"));
                continue;
            };
            options.extra = args.env.iter().cloned().chain(off).collect();
        }
        let outcome = scenario.run(&options)?;
        bar.suspend(|| print!("{}", outcome.table()));
        if args.limits_off {
            let verdict = if outcome.is_clean() { "NOT noticed" } else { "noticed" };
            bar.suspend(|| println!("  limits off: {verdict}"));
            all_clean &= !outcome.is_clean();
        } else {
            if !outcome.is_clean() {
                bar.suspend(|| eprintln!("replay: {}", replay(args, &name, seed)));
            }
            all_clean &= outcome.is_clean();
        }
        record(args, &outcome)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(all_clean)
}

fn record(args: &Args, outcome: &Outcome) -> Fallible<()> {
    let Some(file) = &args.record else { return Ok(()) };
    let Outcome { name, extent, seconds, .. } = outcome;
    Row::new(format!("net {name}"), extent.clone(), outcome.found(), outcome.is_clean(), *seconds).append(file)?;
    Ok(())
}

/// A client of each connection is one of ours, too.
fn raise_files() -> Fallible<u64> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum.unwrap_or(u64::MAX))
}

/// The settings under which the broker does what the scenario is there to find.
fn limits_off(scenario: Scenario) -> Option<Vec<(String, String)>> {
    let settings: &[(&str, &str)] = match scenario {
        // A delivery that is cut off is the last.
        Scenario::Proxy => &[("BLIPMQ_MAX_RETRIES", "1"), ("BLIPMQ_DELIVERY_DEAD_LETTER", "false")],
        Scenario::Slowloris => &[
            ("BLIPMQ_NET_AUTH_DEADLINE_MS", "600000"),
            ("BLIPMQ_NET_UNAUTHENTICATED_MAX", "100000"),
            ("BLIPMQ_NET_UNAUTHENTICATED_PER_ADDRESS_MAX", "100000"),
            ("BLIPMQ_NET_FRAME_TIMEOUT_MS", "0"),
        ],
        Scenario::BruteForce => &[("BLIPMQ_NET_AUTH_DEADLINE_MS", "600000")],
        Scenario::Storm => &[("BLIPMQ_NET_MAX_CONNECTIONS", "1000")],
        Scenario::Stalled => {
            &[("BLIPMQ_DELIVERY_QOS0_QUEUE_MESSAGES", "100000000"), ("BLIPMQ_DELIVERY_QOS0_QUEUE_BYTES", "1TiB")]
        }
        Scenario::HalfOpen => &[("BLIPMQ_NET_KEEPALIVE_MS", "0"), ("BLIPMQ_NET_TCP_USER_TIMEOUT_MS", "0")],
        // No setting makes the broker take garbage, or lose track of its descriptors: the toy broker does (chaos/tests/net.rs).
        Scenario::Garbage | Scenario::Descriptors => return None,
    };
    Some(settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
}

fn replay(args: &Args, scenario: &str, seed: u64) -> String {
    let env: String = args.env.iter().map(|(name, value)| format!(" --env {name}={value}")).collect();
    format!(
        "cargo run --profile sim -p chaos -- net --scenario {scenario} --seconds {} --cores {} --connections {} --stalled {} \
         --seed {seed}{env}",
        args.seconds, args.cores, args.connections, args.stalled
    )
}
