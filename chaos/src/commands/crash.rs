//! `chaos crash`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use crate::commands::{policies, seed};
use crate::crash::{self as kill, Identities, Options};
use crate::oracle::Kind;
use crate::report::Report;
use crate::{Fallible, broker, v1};

#[derive(clap::Args)]
pub struct Args {
    /// Kills in all, shared among the policies.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// always, every_n:64, interval_ms:50, none, or all of these.
    #[arg(long, default_value = "all")]
    policy: String,
    /// Core counts; every start picks one.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4", value_parser = clap::value_parser!(u16).range(1..))]
    cores: Vec<u16>,
    /// Repeats the draws of a run (not the scheduling of its processes).
    #[arg(long)]
    seed: Option<u64>,
    /// The blipmqd to test [default: next to this program, else built].
    #[arg(long)]
    broker: Option<PathBuf>,
    /// Keep stores, histories and output of clean runs too.
    #[arg(long)]
    keep_artifacts: bool,
    /// Expect a broker that confirms before it is durable, and succeed only if that is caught.
    #[arg(long)]
    planted: bool,
    #[arg(long, default_value = "v2")]
    protocol: Protocol,
    /// Which publishers send an identity and resend; mixed: six of eight.
    #[arg(long, default_value = "mixed")]
    identity: Identity,
    /// The earliest kill after clients began.
    #[arg(long, default_value_t = 50)]
    min_run_ms: u64,
    /// The latest.
    #[arg(long, default_value_t = 3_000)]
    max_run_ms: u64,
    /// Seconds without any progress after which the broker counts as stuck.
    #[arg(long, default_value_t = 30)]
    patience_s: u64,
    /// The summary as one line of JSON on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Protocol {
    V1,
    V2,
}

#[derive(Clone, Copy, ValueEnum)]
enum Identity {
    All,
    None,
    Mixed,
}

/// True: as it should be.
pub fn run(args: &Args) -> Fallible<bool> {
    if args.min_run_ms > args.max_run_ms {
        return Err("--min-run-ms is above --max-run-ms".into());
    }
    let seed = seed(args.seed)?;
    let policies = policies(&args.policy);
    let identities = match args.identity {
        Identity::All => Identities::All,
        Identity::None => Identities::None,
        Identity::Mixed => Identities::Mixed,
    };
    // A slow disk, too: on a fast one the time between confirm and write is shorter than it takes a client to be scheduled.
    let planted = [("BLIPMQ_PLANTED_BUG", "confirm-before-durable"), ("BLIPMQ_PLANTED_SLOW_WRITE_MS", "20")]
        .map(|(name, value)| (name.to_string(), value.to_string()));
    let workspace = broker::workspace(&std::env::current_exe()?)?;
    let options = Options {
        rounds: args.rounds,
        policies,
        cores: args.cores.clone(),
        seed,
        broker: broker::locate(args.broker.clone(), args.planted)?,
        folder: workspace.join("target").join("chaos"),
        keep: args.keep_artifacts,
        min_run_ms: args.min_run_ms,
        max_run_ms: args.max_run_ms,
        identities,
        patience: Duration::from_secs(args.patience_s),
        extra: args.planted.then_some(planted).into_iter().flatten().collect(),
        until: args.planted.then_some(Kind::Lost),
    };
    eprintln!("chaos: seed {seed}, broker {}", options.broker.display());
    let report = match args.protocol {
        Protocol::V1 => v1::run(&options)?,
        Protocol::V2 => kill::run(&options)?,
    };
    if args.json {
        println!("{}", report.json()?);
    } else {
        print!("{}", report.table());
    }
    if args.planted {
        let lost = report.verdict.count(Kind::Lost);
        eprintln!("planted bug {}: {lost} confirmed messages lost", if lost > 0 { "caught" } else { "NOT caught" });
        return Ok(lost > 0);
    }
    if !report.is_clean() {
        eprintln!("replay: {}", replay(args, &report));
    }
    Ok(report.is_clean())
}

fn replay(args: &Args, report: &Report) -> String {
    let cores: Vec<String> = args.cores.iter().map(u16::to_string).collect();
    format!(
        "cargo run --release -p chaos -- crash --protocol {} --rounds {} --policy {} --cores {} --identity {} \
         --min-run-ms {} --max-run-ms {} --seed {}",
        report.protocol,
        args.rounds,
        args.policy,
        cores.join(","),
        args.identity.to_possible_value().map_or("mixed".into(), |value| value.get_name().to_string()),
        args.min_run_ms,
        args.max_run_ms,
        report.seed
    )
}
