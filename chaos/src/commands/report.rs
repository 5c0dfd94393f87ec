//! `chaos report`: from recorded rows to RESULTS.md.

use std::path::PathBuf;

use crate::record::Row;
use crate::{Fallible, results};

#[derive(clap::Args)]
pub struct Args {
    /// Rows that harnesses recorded.
    rows: PathBuf,
    /// Replace the table between the marks of this page; else print it.
    #[arg(long)]
    into: Option<PathBuf>,
}

/// True: no row failed.
pub fn run(args: &Args) -> Fallible<bool> {
    let text = std::fs::read_to_string(&args.rows).map_err(|e| format!("{}: {e}", args.rows.display()))?;
    let rows: Vec<Row> = text
        .lines()
        .zip(1..)
        .map(|(line, number)| serde_json::from_str(line).map_err(|e| format!("{}:{number}: {e}", args.rows.display())))
        .collect::<Result<_, _>>()?;
    match &args.into {
        Some(page) => results::write_into(page, &rows)?,
        None => print!("{}", results::table(&rows)),
    }
    Ok(rows.iter().all(|row| row.clean))
}
