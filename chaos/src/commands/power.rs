//! `chaos power`.

use std::path::PathBuf;

use crate::commands::{policies, seed};
use crate::power::{self, Options, Report};
use crate::record::Row;
use crate::rig::stage::Scene;
use crate::rig::{self, FileSystem};
use crate::{Fallible, broker};

#[derive(clap::Args)]
pub struct Args {
    /// Crash images, for each policy.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    images: u32,
    /// Images of one recorded run.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    per_run: u32,
    #[arg(long, default_value = "ext4")]
    fs: FileSystem,
    /// always, every_n:64, interval_ms:50, none, or all of these.
    #[arg(long, default_value = "all")]
    policy: String,
    /// A mistake to plant in the recorded broker (src/planted.rs); succeeds only if it is caught.
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
    /// Append a row per policy to this file.
    #[arg(long)]
    record: Option<PathBuf>,
}

/// True: as it should be.
pub fn run(args: &Args) -> Fallible<bool> {
    rig::check_tools(args.fs)?;
    rig::catch_signals()?;
    let seed = seed(args.seed)?;
    let workspace = broker::workspace(&std::env::current_exe()?)?;
    let broker = broker::locate(args.broker.clone(), args.planted.is_some())?;
    eprintln!("chaos: seed {seed}, broker {}", broker.display());
    let mut as_it_should = true;
    for policy in policies(&args.policy) {
        let options = Options {
            images: args.images,
            per_run: args.per_run,
            scene: Scene {
                fs: args.fs,
                policy,
                broker: broker.clone(),
                workplace: args.workplace.clone().unwrap_or_else(rig::workplace),
                extra: args.planted.iter().map(|bug| ("BLIPMQ_PLANTED_BUG".to_string(), bug.clone())).collect(),
            },
            seed,
            folder: workspace.join("target").join("chaos"),
            until_found: args.planted.is_some(),
        };
        let report = power::run(&options)?;
        let clean = report.verdict.is_clean();
        println!("{}", table(&options, &report));
        let (name, good) = match &args.planted {
            None => (format!("power {} {}", args.fs.name(), options.scene.policy), clean),
            Some(bug) => {
                eprintln!("planted {bug}: {}", if clean { "NOT caught" } else { "caught" });
                (format!("power {} {} planted {bug}", args.fs.name(), options.scene.policy), !clean)
            }
        };
        if let Some(file) = &args.record {
            Row::new(name, report.extent(), report.found(), good, report.seconds).append(file)?;
        }
        if !good {
            eprintln!(
                "replay: cargo run --profile sim -p chaos -- power --images {} --per-run {} --fs {} --policy {} --seed {seed}",
                args.images,
                args.per_run,
                args.fs.name(),
                options.scene.policy
            );
        }
        as_it_should &= good;
    }
    Ok(as_it_should)
}

fn table(options: &Options, report: &Report) -> String {
    let images = f64::from(report.images.max(1));
    let mut text = format!(
        "power {} {}: {}\n  {}\n  {:.0} s, {:.2} images/s; recording {:.0} s; recovery {:.0} ms on average, worst {:.0} ms\n",
        options.scene.fs.name(),
        options.scene.policy,
        report.extent(),
        report.found(),
        report.seconds,
        images / report.seconds.max(0.001),
        report.recording.as_secs_f64(),
        report.recovery.as_secs_f64() * 1_000.0 / images,
        report.worst_recovery.as_secs_f64() * 1_000.0,
    );
    for detail in report.verdict.details.iter().take(10) {
        text.push_str(&format!("  ! {detail}\n"));
    }
    for folder in &report.artefacts {
        text.push_str(&format!("  kept: {folder}\n"));
    }
    text
}
