//! blipmqd: arguments -> configuration -> checks -> one core per CPU -> wait for the signal to stop.

use std::process::ExitCode;
use std::sync::Arc;

use blipmq::config::{self, ConfigError, Flags};
use blipmq::driver::broker::Broker;
use blipmq::gateway::Gateway;
use blipmq::{logging, preflight};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    blipmq::driver::early_init();
    let flags = Flags::parse();
    match run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("blipmqd: {}", failure.text);
            ExitCode::from(failure.code as u8)
        }
    }
}

/// A sentence for the operator, and the exit code that goes with it (sysexits.h).
struct Failure {
    code: i32,
    text: String,
}

impl Failure {
    fn new(code: i32, error: impl std::fmt::Display) -> Failure {
        Failure { code, text: error.to_string() }
    }
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let bad_config = |error: ConfigError| Failure::new(ConfigError::EXIT_CODE, error);
    #[cfg(feature = "planted-bugs")]
    blipmq::planted::from_env()
        .map_err(|name| Failure::new(ConfigError::EXIT_CODE, format!("BLIPMQ_PLANTED_BUG: there is no {name}")))?;
    let loaded = config::load(flags, std::env::vars_os()).map_err(bad_config)?;
    if flags.check_config {
        print!("{}", loaded.to_toml());
        return Ok(());
    }
    logging::init().map_err(|error| Failure::new(ConfigError::EXIT_CODE, error))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "blipmqd starts");
    for note in &loaded.notes {
        tracing::info!("{note}");
    }
    let machine = preflight::run(&loaded.config).map_err(|error| Failure::new(error.exit_code(), error))?;
    for note in &machine.notes {
        match note {
            preflight::Note::Info(text) => tracing::info!("{text}"),
            preflight::Note::Warning(text) => tracing::warn!("{text}"),
        }
    }
    let keys = loaded.keys().map_err(bad_config)?;
    tracing::info!("{}", keys.note);
    // Before anything is started, so that a signal during the start is not lost.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| Failure::new(71, error))?;

    let broker =
        Broker::start(&loaded, &machine, &keys.ring).map_err(|error| Failure::new(error.exit_code(), error))?;
    let inquirer = Arc::clone(&broker.inquirer);
    let gateway = Gateway::start(loaded.metrics_listen, inquirer, Arc::clone(&broker.readiness));
    let gateway = match gateway {
        Ok(gateway) => gateway,
        Err(error) => {
            broker.stop();
            return Err(Failure::new(69, format!("cannot serve metrics on {}: {error}", loaded.metrics_listen)));
        }
    };
    // Last: it takes long where it matters most, and by then /healthz must answer.
    let policy = loaded.config.fsync_policy;
    match preflight::probe_disk(&machine.store, loaded.config.storage.wal_sync, machine.direct_io) {
        Ok(latency) => tracing::info!("{}", latency.meaning(policy)),
        // The disk tells a lost write to whoever syncs next, and this time that was us: the log's own sync may succeed now.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EIO as i32) => {
            let text =
                format!("the disk fails: {error}; stopping: what was confirmed is safe, what was not is unknown");
            return Err(Failure::new(74, text));
        }
        Err(error) => tracing::warn!("could not measure the disk: {error}"),
    }
    if let Some(signal) = signals.forever().next() {
        tracing::info!(signal, "stopping: no new connections and publishes; acknowledgements may still come");
    }
    // A second signal ends at once.
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            tracing::warn!("second signal: ending now");
            std::process::exit(1);
        }
    });
    let clean = broker.stop();
    gateway.stop();
    if clean {
        tracing::info!("stopped; everything is on disk");
        Ok(())
    } else {
        Err(Failure::new(1, "the stop took too long; what was confirmed is on disk, the next start will recover it"))
    }
}
