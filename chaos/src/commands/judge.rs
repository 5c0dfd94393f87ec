//! `chaos judge FILE`.

use std::path::PathBuf;

use crate::report::Report;
use crate::{Fallible, history};

#[derive(clap::Args)]
pub struct Args {
    history: PathBuf,
    /// It ends before everything was drained: what is missing is not lost.
    #[arg(long)]
    undrained: bool,
}

/// True: no anomaly.
pub fn run(args: &Args) -> Fallible<bool> {
    let verdict = history::judge(&args.history, !args.undrained)?;
    let report = Report { protocol: "history", verdict, ..Report::default() };
    print!("{}", report.table());
    Ok(report.is_clean())
}
