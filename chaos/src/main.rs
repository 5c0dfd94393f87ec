//! Breaks the broker on purpose and judges what its clients saw.

use std::process::ExitCode;

use chaos::commands::{crash, disk, judge, mutants, power, report, sim};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "chaos", about = "Breaks the broker on purpose and judges what its clients saw")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Kill -9 a real broker under load, restart it, drain it, judge the history.
    Crash(crash::Args),
    /// Cut the power at random moments of a recorded run: build each disk it could leave, start, drain, judge.
    Power(power::Args),
    /// Let the disk fail under a running broker: write, sync and read errors, no space, slowness.
    Disk(disk::Args),
    /// Plant mistakes in the broker, one by one, and see that each is caught.
    Mutants(mutants::Args),
    /// Judge a history that was kept.
    Judge(judge::Args),
    /// Show what was recorded with --record, or write it into RESULTS.md.
    Report(report::Args),
    /// Live in virtual time, with every fault there is, from one seed after the other.
    Sim(sim::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Crash(args) => crash::run(&args),
        Command::Power(args) => power::run(&args),
        Command::Disk(args) => disk::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Judge(args) => judge::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Sim(args) => sim::run(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error}");
            ExitCode::from(2)
        }
    }
}
