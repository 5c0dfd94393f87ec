//! `chaos mutants`.

use std::path::PathBuf;

#[cfg(not(feature = "planted-bugs"))]
use crate::Fallible;

#[derive(clap::Args)]
pub struct Args {
    /// Only these mistakes.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only mistakes that belong to these harnesses: sim, test, power, disk, crash.
    #[arg(long, value_delimiter = ',')]
    harness: Vec<String>,
    /// Lives in which the simulator has to notice a mistake.
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// Lives at once [default: one per CPU].
    #[arg(long)]
    threads: Option<usize>,
    /// Append the row for RESULTS.md to this file.
    #[arg(long)]
    record: Option<PathBuf>,
    /// One line of JSON per mistake on stdout.
    #[arg(long)]
    json: bool,
}

/// True: every mistake is caught.
#[cfg(not(feature = "planted-bugs"))]
pub fn run(args: &Args) -> Fallible<bool> {
    let Args { only, harness, seeds, threads, record, json } = args;
    _ = (only, harness, seeds, threads, record, json);
    Err("this program has no mistakes in it. Build one that does: cargo run --profile sim -p chaos --features planted-bugs \
         --target-dir target/planted -- mutants"
        .into())
}

#[cfg(feature = "planted-bugs")]
pub use planted::run;

#[cfg(feature = "planted-bugs")]
mod planted {
    use std::time::Instant;

    use super::Args;
    use crate::mutants::{self, Outcome, Settings};
    use crate::record::Row;
    use crate::{Fallible, broker};

    /// True: every mistake is caught.
    pub fn run(args: &Args) -> Fallible<bool> {
        let started = Instant::now();
        let threads = args.threads.or(std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
        let settings = Settings {
            seeds: args.seeds,
            threads,
            only: args.only.clone(),
            harnesses: args.harness.clone(),
            workspace: broker::workspace(&std::env::current_exe()?)?,
        };
        let outcomes = mutants::run(&settings)?;
        if args.json {
            for outcome in &outcomes {
                println!("{}", serde_json::to_string(outcome)?);
            }
        } else {
            print!("{}", table(&outcomes));
        }
        let missed: Vec<&str> = outcomes.iter().filter(|o| o.caught.is_none()).map(|o| o.mistake.as_str()).collect();
        let caught = outcomes.len() - missed.len();
        let mut found = format!("{caught} caught");
        if !missed.is_empty() {
            found += &format!(", not caught: {}", missed.join(", "));
        }
        if let Some(file) = &args.record {
            let extent = format!("{} mistakes, up to {} lives each", outcomes.len(), args.seeds);
            let (clean, seconds) = (missed.is_empty(), started.elapsed().as_secs_f64());
            Row::new("mutants", extent, found.clone(), clean, seconds).append(file)?;
        }
        eprintln!("{} mistakes: {found}", outcomes.len());
        Ok(missed.is_empty())
    }

    fn table(outcomes: &[Outcome]) -> String {
        let mut text =
            "| mistake | what it does | caught by | seed | lives | what was said |\n|---|---|---|---|---|---|\n"
                .to_string();
        for Outcome { mistake, does, harness, caught, seed, tried, .. } in outcomes {
            let seed = seed.map_or("–".to_string(), |seed| seed.to_string());
            let by = if caught.is_some() { harness.as_str() } else { "**nobody**" };
            let said: String = caught.as_deref().unwrap_or("").replace('|', "/").chars().take(SAID_MAX).collect();
            text += &format!("| {mistake} | {does} | {by} | {seed} | {tried} | {} |\n", said.replace('\n', " "));
        }
        text
    }

    /// Of what a checker said.
    const SAID_MAX: usize = 160;
}
