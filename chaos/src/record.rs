//! One measured figure, appended to a file from which RESULTS.md is written.
//!
//! Every command takes `--record FILE`; `chaos report` turns the file into the table. A figure that nobody recorded is
//! shown as not run.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A row of the durability part of RESULTS.md.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Which row: `sim`, `mutants`, `crash`, `power ext4 always`, `disk write-eio`, `fuzz frame_decode`, …
    pub name: String,
    /// How much was run, in words: `2000 rounds, 5,012,345 confirmed`.
    pub extent: String,
    /// What was found, in words: `0 lost, 0 phantom, 0 out of order`.
    pub found: String,
    /// Nothing was found that should not be.
    pub clean: bool,
    pub seconds: f64,
    /// As it was called.
    pub command: String,
    pub commit: String,
    pub machine: String,
    /// Seconds since 1970.
    pub at: u64,
}

impl Row {
    /// Fills in command, commit, machine and time.
    pub fn new(name: impl Into<String>, extent: String, found: String, clean: bool, seconds: f64) -> Row {
        Row {
            name: name.into(),
            extent,
            found,
            clean,
            seconds,
            command: command(std::env::args().skip(1)),
            commit: commit(),
            machine: machine(),
            at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        }
    }

    pub fn append(&self, file: &Path) -> io::Result<()> {
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(file)?;
        writeln!(file, "{}", serde_json::to_string(self)?)
    }
}

/// `chaos …`, without what only concerns this one run's files.
fn command(mut args: impl Iterator<Item = String>) -> String {
    let mut words = vec!["chaos".to_string()];
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--record" | "--broker" => _ = args.next(),
            _ => words.push(arg),
        }
    }
    words.join(" ")
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let Some(mut commit) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".into() };
    if git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| !changes.is_empty()) {
        commit.push('+');
    }
    commit
}

fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |m| m.1);
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cpus} CPUs, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_line_that_can_be_read_again() -> io::Result<()> {
        let file = std::env::temp_dir().join(format!("chaos-rows-{}", std::process::id()));
        let row = Row::new("sim", "2,000 seeds".into(), "0 violations".into(), true, 1.5);
        row.append(&file)?;
        row.append(&file)?;
        let text = fs::read_to_string(&file)?;
        let rows: Vec<Row> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        assert_eq!(rows, [row.clone(), row]);
        fs::remove_file(&file)
    }

    #[test]
    fn the_command_leaves_out_where_its_files_are() {
        let args = ["crash", "--rounds", "5", "--record", "x", "--broker", "y", "--json"].map(String::from);
        assert_eq!(command(args.into_iter()), "chaos crash --rounds 5 --json");
    }
}
