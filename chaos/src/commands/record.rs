//! `chaos record`: a row from a harness that is a script.

use std::path::PathBuf;

use crate::Fallible;
use crate::record::Row;

#[derive(clap::Args)]
pub struct Args {
    /// Which row, for example `fuzz record`.
    #[arg(long)]
    name: String,
    /// How much was run, in words.
    #[arg(long)]
    extent: String,
    /// What was found, in words.
    #[arg(long)]
    found: String,
    /// Whether nothing was found that should not be.
    #[arg(long, action = clap::ArgAction::Set)]
    clean: bool,
    #[arg(long)]
    seconds: f64,
    /// As the script was called.
    #[arg(long)]
    command: String,
    /// Where rows are kept.
    #[arg(long)]
    file: PathBuf,
}

/// True: the row was written. What it says has been judged elsewhere.
pub fn run(args: &Args) -> Fallible<bool> {
    let row = Row::new(&args.name, args.extent.clone(), args.found.clone(), args.clean, args.seconds);
    Row { command: args.command.clone(), ..row }.append(&args.file)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_script_appends_a_row() -> Fallible<()> {
        let file = std::env::temp_dir().join(format!("chaos-record-{}", std::process::id()));
        let words =
            "record --name fuzz --extent 5 --found x --clean false --seconds 1.5 --command scripts/fuzz.sh --file";
        let cli = Cli::parse_from(words.split(' ').chain([file.to_str().ok_or("not a text")?]));
        assert!(run(&cli.args)?);
        let row: Row = serde_json::from_str(std::fs::read_to_string(&file)?.trim_end())?;
        assert_eq!((row.name.as_str(), row.clean, row.seconds), ("fuzz", false, 1.5));
        assert_eq!(row.command, "scripts/fuzz.sh");
        Ok(std::fs::remove_file(&file)?)
    }
}
