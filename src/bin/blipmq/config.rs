//! `blipmq config`: what the broker would do with a configuration, without starting one.

use std::path::PathBuf;

use blipmq::config::{self, ConfigError, Flags};
use serde_json::{Value, json};

use crate::Global;
use crate::failure::{Failure, print};

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq config config/prod.toml           check a file and print the settings it leads to
  blipmq config                            the settings without a file: defaults and BLIPMQ_* variables
  blipmq config config/prod.toml --json    the same for a program

A wrong setting ends with exit code 78 and says where it is and what was expected. Keys are not shown.")]
pub struct Args {
    /// The file; without it the one BLIPMQ_CONFIG names, if any.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

pub fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let flags = Flags { config: args.file, check_config: true, ..Flags::default() };
    let loaded = config::load(&flags, std::env::vars_os())
        .map_err(|error| Failure::with_code(error.to_string(), ConfigError::EXIT_CODE))?;
    let settings = loaded.to_toml();
    if !global.json {
        return print(&settings);
    }
    let settings: Value = toml::from_str(&settings).map_err(|error| Failure::new(error.to_string()))?;
    let file = loaded.file.as_ref().map(|file| file.display().to_string());
    print(&format!("{}\n", json!({ "file": file, "settings": settings, "notes": loaded.notes })))
}
