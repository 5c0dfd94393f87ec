//! `chaos disk`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::commands::{policies, seed};
use crate::disk::{self, Fault, Options};
use crate::record::Row;
use crate::rig::stage::Scene;
use crate::rig::{self, FileSystem};
use crate::{Fallible, broker};

#[derive(clap::Args)]
pub struct Args {
    /// write-eio, sync-eio, read-eio, enospc, slow, or all of these.
    #[arg(long, default_value = "all")]
    fault: String,
    /// Runs of each fault.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    #[arg(long, default_value = "ext4")]
    fs: FileSystem,
    /// always, every_n:64, interval_ms:50, none, or all of these, in which case each run takes one by chance.
    #[arg(long, default_value = "all")]
    policy: String,
    /// A mistake to plant in the broker (src/planted.rs); succeeds only if it is caught.
    #[arg(long)]
    planted: Option<String>,
    /// Repeats the draws of a run (not the scheduling of its processes).
    #[arg(long)]
    seed: Option<u64>,
    /// The blipmqd to test [default: next to this program, else built].
    #[arg(long)]
    broker: Option<PathBuf>,
    /// Where disks are kept while they are needed [default: /dev/shm].
    #[arg(long)]
    workplace: Option<PathBuf>,
    /// Append a row per fault to this file.
    #[arg(long)]
    record: Option<PathBuf>,
}

/// True: as it should be.
pub fn run(args: &Args) -> Fallible<bool> {
    let faults = match args.fault.as_str() {
        "all" => Fault::ALL.to_vec(),
        one => vec![Fault::from_str(one, false)?],
    };
    rig::check_tools(args.fs)?;
    rig::catch_signals()?;
    let seed = seed(args.seed)?;
    let workspace = broker::workspace(&std::env::current_exe()?)?;
    let broker = broker::locate(args.broker.clone(), args.planted.is_some())?;
    eprintln!("chaos: seed {seed}, broker {}", broker.display());
    let mut as_it_should = true;
    for fault in faults {
        let policies = policies(&args.policy);
        let options = Options {
            fault,
            runs: args.runs,
            scene: Scene {
                fs: args.fs,
                policy: policies[0].clone(),
                broker: broker.clone(),
                workplace: args.workplace.clone().unwrap_or_else(rig::workplace),
                extra: args.planted.iter().map(|bug| ("BLIPMQ_PLANTED_BUG".to_string(), bug.clone())).collect(),
            },
            policies,
            seed,
            folder: workspace.join("target").join("chaos"),
            until_found: args.planted.is_some(),
        };
        let report = disk::run(&options)?;
        let clean = report.verdict.is_clean();
        let rate = f64::from(report.runs) / report.seconds.max(0.001) * 60.0;
        println!("disk {}: {}\n  {}", fault.name(), report.extent(), report.found());
        println!("  {:.0} s, {rate:.1} runs/min", report.seconds);
        report.verdict.details.iter().take(10).for_each(|detail| println!("  ! {detail}"));
        report.artefacts.iter().for_each(|folder| println!("  kept: {folder}"));
        let (name, good) = match &args.planted {
            None => (format!("disk {}", fault.name()), clean),
            Some(bug) => {
                eprintln!("planted {bug}: {}", if clean { "NOT caught" } else { "caught" });
                (format!("disk {} planted {bug}", fault.name()), !clean)
            }
        };
        if let Some(file) = &args.record {
            Row::new(name, report.extent(), report.found(), good, report.seconds).append(file)?;
        }
        if !good {
            eprintln!(
                "replay: cargo run --profile sim -p chaos -- disk --fault {} --runs {} --fs {} --policy {} --seed {seed}",
                fault.name(),
                args.runs,
                args.fs.name(),
                args.policy
            );
        }
        as_it_should &= good;
    }
    Ok(as_it_should)
}
