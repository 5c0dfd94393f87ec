//! `blipmq`, the tool of people who use or run a broker: a thin layer over the client library, the broker's HTTP side, and
//! the offline parts of the store and the configuration.
//!
//! Owns: the command line, exit codes, what is printed. Never: speaks the protocol itself.

mod admin;
mod config;
mod connect;
mod failure;
mod publish;
mod request;
mod subscribe;
mod top;
mod values;
mod wal;

use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

/// Publish, subscribe, look inside: the BlipMQ command line.
#[derive(Parser, Debug)]
#[command(
    name = "blipmq",
    version,
    propagate_version = true,
    after_help = "\
Examples:
  blipmq sub orders                              print what is published from now on
  blipmq pub orders 'one coffee'                 publish, and wait until it is safe
  blipmq pub orders --count 100000 --size 256    how fast is it from here?
  blipmq req weather 'in Bergen?'                ask, and wait for the answer
  blipmq top                                     watch the broker work

The key is taken from --key, --key-file, the environment variable BLIPMQ_KEY, or ./blipmq.wal/dev.key, in this order.
Each subcommand has examples of its own: `blipmq sub --help`. RUST_LOG=blipmq=debug shows what the client does."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand knows.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Options of every subcommand")]
struct Global {
    /// The broker's address; several, separated by commas, are tried in turn.
    #[arg(long, global = true, value_name = "HOST:PORT", value_delimiter = ',', default_value = "127.0.0.1:5555")]
    server: Vec<String>,
    /// The API key. Other users of this machine can see it in the list of processes: prefer --key-file.
    #[arg(long, global = true, value_name = "KEY", conflicts_with = "key_file")]
    key: Option<String>,
    /// A file that holds the API key.
    #[arg(long, global = true, value_name = "FILE")]
    key_file: Option<std::path::PathBuf>,
    /// The broker's HTTP side, for `topics`, `subs` and `top`.
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:9100")]
    admin: String,
    /// Print JSON, one value per line, for other programs.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Publish one message, the lines of standard input, or a measured load.
    Pub(publish::Args),
    /// Subscribe to a topic and print its messages.
    Sub(subscribe::Args),
    /// Publish a request and wait for the reply.
    Req(request::Args),
    /// List the topics of the broker.
    Topics(admin::TopicsArgs),
    /// List the subscriptions of the broker.
    Subs(admin::SubsArgs),
    /// Watch cores and topics live.
    Top(top::Args),
    /// Check a configuration file and print the settings it leads to.
    Config(config::Args),
    /// Look into a store while no broker uses it.
    Wal(wal::Args),
    /// Bring the log of a version 1 broker into a new store.
    ImportV1(wal::ImportV1),
}

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    show_log();
    let done = match command {
        Command::Pub(args) => run(publish::run(&global, args)),
        Command::Sub(args) => run(subscribe::run(&global, args)),
        Command::Req(args) => run(request::run(&global, args)),
        Command::Topics(args) => run(admin::topics(&global, args)),
        Command::Subs(args) => run(admin::subs(&global, args)),
        Command::Top(args) => run(top::run(&global, args)),
        Command::Config(args) => config::run(&global, args),
        Command::Wal(args) => wal::run(args, global.json).map_err(Failure::from),
        Command::ImportV1(args) => wal::import_v1(args, global.json).map_err(Failure::from),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(global.json),
    }
}

/// Runs what talks to a broker, on this thread.
fn run(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(command);
    // A read of standard input may be under way and would not end before the next line.
    runtime.shutdown_background();
    done
}

/// The library's own log lines, on standard error.
fn show_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_has_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:"), "{} has no examples", command.get_name());
        }
    }

    #[test]
    fn keys_and_servers_may_stand_anywhere() {
        let cli = Cli::parse_from(["blipmq", "sub", "t", "--server", "a:1,b:2", "--key", "k"]);
        assert_eq!(cli.global.server, ["a:1", "b:2"]);
        assert_eq!(cli.global.key.as_deref(), Some("k"));
    }
}
