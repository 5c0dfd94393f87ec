//! `blipmq wal …` and `blipmq import-v1`: the offline side of a store.
//!
//! Owns: the arguments, the progress bar, what a person reads. Never: looks into the files itself (that is `wal::tools`).

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use blipmq::shard::routing;
use blipmq::types::VShard;
use blipmq::wal::store::StoreOptions;
use blipmq::wal::tools::{
    self, DumpOptions, ImportOptions, ImportReport, SalvageReport, StatReport, ToolError, VerifyReport,
};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// sysexits.h EX_DATAERR: what was looked at is damaged.
const EXIT_DAMAGED: u8 = 65;
/// Lines of damage a person is shown; JSON has all.
const DAMAGE_SHOWN: usize = 20;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq wal verify blipmq.wal                   would a broker start from it?
  blipmq wal stat blipmq.wal                     what is in it, and how large
  blipmq wal dump blipmq.wal --json | head       its records, one per line
  blipmq wal salvage blipmq.wal --accept-loss --out saved.wal

None of them changes the store. Stop the broker first; --force looks beside a running one, whose newest batches may then
look damaged. Exit codes: 0 whole, 65 damaged, 74 unreadable, 75 in use.")]
pub struct Args {
    #[command(subcommand)]
    command: WalCommand,
}

#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// Read everything a start would read, and say whether it is whole.
    Verify {
        /// The store's directory: the broker's wal_path.
        dir: PathBuf,
        /// Read beside a running broker.
        #[arg(long)]
        force: bool,
    },
    /// Print the records of the log.
    Dump {
        /// The store's directory: the broker's wal_path.
        dir: PathBuf,
        /// Read beside a running broker.
        #[arg(long)]
        force: bool,
        /// Only this virtual shard.
        #[arg(long, value_name = "N")]
        vshard: Option<u16>,
        /// How much of each payload to show.
        #[arg(long, value_name = "N", default_value_t = 64)]
        payload_bytes: usize,
    },
    /// Count segments, streams and records.
    Stat {
        /// The store's directory: the broker's wal_path.
        dir: PathBuf,
        /// Read beside a running broker.
        #[arg(long)]
        force: bool,
    },
    /// Copy what is whole of a damaged store into a new one, with a report of what is lost.
    Salvage {
        /// The damaged store's directory; it is left as it is.
        dir: PathBuf,
        /// The new store: must not exist.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Yes, what is damaged is to be left out.
        #[arg(long)]
        accept_loss: bool,
    },
}

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq import-v1 old/blipmq.wal --out blipmq.wal
  blipmq import-v1 old.wal --out new.wal --durable audit    then: blipmq sub TOPIC --durable audit

Each topic of the old log becomes a topic with one durable subscription that has all its messages to consume. The original
keeps no record of what was acknowledged, so messages that were consumed before come again. The old file is not changed.")]
pub struct ImportV1 {
    /// The original broker's log file.
    file: PathBuf,
    /// The new store: must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the durable subscription of every topic.
    #[arg(long, value_name = "NAME", default_value = "imported")]
    durable: String,
    /// As in the configuration of the broker that will open the store.
    #[arg(long, value_name = "N", default_value_t = 64)]
    virtual_shards: u16,
    /// As in the configuration of the broker that will open the store.
    #[arg(long, value_name = "SUFFIX", default_value = ".dlq")]
    dead_letter_suffix: String,
    /// Bytes of a segment; as in the configuration, if it names one.
    #[arg(long, value_name = "BYTES")]
    segment_size: Option<u32>,
    /// Leave out damaged records instead of stopping at the first.
    #[arg(long)]
    accept_loss: bool,
    /// For development: let the new store be on a file system without O_DIRECT.
    #[arg(long)]
    allow_buffered_io: bool,
}

/// What to tell the person or the script, and the exit code.
#[derive(Debug)]
pub struct Failed {
    pub message: String,
    pub code: u8,
}

impl From<ToolError> for Failed {
    fn from(error: ToolError) -> Failed {
        Failed { message: error.to_string(), code: error.exit_code() }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        ToolError::from(error).into()
    }
}

/// `blipmq wal …`. `json`: the tool's `--json`.
pub fn run(args: Args, json: bool) -> Result<(), Failed> {
    let bar = Bar::new(json);
    let progress = &mut |done, total| bar.show(done, total);
    match args.command {
        WalCommand::Verify { dir, force } => {
            let report = tools::verify(&dir, force, progress)?;
            bar.clear();
            print(json, &report, verify_text)?;
            damaged(&report.damage)
        }
        WalCommand::Dump { dir, force, vshard, payload_bytes } => {
            let options = DumpOptions { json, force, vshard: vshard.map(VShard), payload_bytes };
            let mut out = io::BufWriter::new(io::stdout().lock());
            let damage = match tools::dump(&dir, options, &mut out, progress) {
                // A reader that has seen enough (`| head`) is no failure.
                Err(ToolError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                done => done?,
            };
            bar.clear();
            for line in &damage {
                eprintln!("damaged: {line}");
            }
            damaged(&damage)
        }
        WalCommand::Stat { dir, force } => {
            let report = tools::stat(&dir, force, progress)?;
            bar.clear();
            print(json, &report, stat_text)?;
            damaged(&report.damage)
        }
        WalCommand::Salvage { dir, out, accept_loss } => {
            let report = tools::salvage(&dir, &out, accept_loss, progress)?;
            bar.clear();
            print(json, &report, salvage_text)
        }
    }
}

/// `blipmq import-v1`. `json`: the tool's `--json`.
pub fn import_v1(args: ImportV1, json: bool) -> Result<(), Failed> {
    let bar = Bar::new(json);
    let options = ImportOptions {
        file: args.file,
        store: StoreOptions {
            path: args.out,
            virtual_shards: args.virtual_shards,
            dead_letter_suffix: args.dead_letter_suffix,
            segment_size: args.segment_size,
            allow_buffered_io: args.allow_buffered_io,
        },
        durable: args.durable,
        accept_loss: args.accept_loss,
        vshard_of: routing::vshard_of,
    };
    let report = tools::import_v1(options, &mut |done, total| bar.show(done, total))?;
    bar.clear();
    print(json, &report, import_text)
}

fn damaged(damage: &[String]) -> Result<(), Failed> {
    if damage.is_empty() {
        return Ok(());
    }
    let message = format!("the store is damaged in {} places; a broker will not start from it", damage.len());
    Err(Failed { message, code: EXIT_DAMAGED })
}

fn print<R: serde::Serialize>(json: bool, report: &R, text: fn(&R) -> String) -> Result<(), Failed> {
    let text = match json {
        true => serde_json::to_string(report).map_err(io::Error::from)? + "\n",
        false => text(report),
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn damage_text(damage: &[String]) -> String {
    let mut text: String = damage.iter().take(DAMAGE_SHOWN).map(|line| format!("  damaged: {line}\n")).collect();
    if damage.len() > DAMAGE_SHOWN {
        text += &format!("  and {} more; --json has them all\n", damage.len() - DAMAGE_SHOWN);
    }
    text
}

fn verify_text(report: &VerifyReport) -> String {
    let mut text = format!(
        "{}: {}\n  {} records in {} frames, {} of them messages\n",
        report.store,
        if report.ok { "whole" } else { "DAMAGED" },
        report.records,
        report.frames,
        report.messages
    );
    text += match report.clean_stop {
        true => "  the last broker was stopped in order\n",
        false => "  the last broker was not stopped in order\n",
    };
    if report.torn_bytes > 0 {
        text += &format!(
            "  torn tail: {} frames with {} records ({} bytes) were never known to be synced; a start leaves them out\n",
            report.torn_frames, report.torn_records, report.torn_bytes
        );
    }
    if report.checkpoint_files_damaged > 0 {
        text += &format!("  {} of 2 checkpoint files are not whole\n", report.checkpoint_files_damaged);
    }
    if report.in_use {
        text += "  a broker is running: its newest batches may look damaged\n";
    }
    text + &damage_text(&report.damage)
}

fn stat_text(report: &StatReport) -> String {
    let identity = &report.identity;
    let mut text = format!(
        "{}\n  uuid {}, {} virtual shards, dead-letter suffix {:?}\n  {} segments of {} bytes, {} free, {} bytes in all; \
         {} bytes free on the disk\n",
        report.store,
        identity.uuid,
        identity.virtual_shards,
        identity.dead_letter_suffix,
        report.segments.len(),
        identity.segment_size,
        report.free_segments,
        report.segment_bytes,
        report.disk_free_bytes
    );
    match &report.checkpoint {
        Some(checkpoint) => {
            text += &format!(
                "  checkpoint {}: {} bytes of state, {} segments, broker time {} ms\n",
                checkpoint.number, checkpoint.state_bytes, checkpoint.segments_listed, checkpoint.time_ms
            );
        }
        None => text += "  no checkpoint\n",
    }
    for (kind, count) in &report.records {
        text += &format!("  {count:>12} {kind}\n");
    }
    for stream in &report.streams {
        text += &format!("  stream {} ends at {}\n", stream.stream, stream.end);
    }
    for segment in report.segments.iter().filter(|segment| segment.state != "free") {
        text += &format!(
            "  slot {:>5} {:<10} stream {} segment {}: {} records, {} bytes\n",
            segment.slot, segment.state, segment.stream, segment.sequence, segment.records, segment.record_bytes
        );
    }
    text + &damage_text(&report.damage)
}

fn salvage_text(report: &SalvageReport) -> String {
    let mut text = format!(
        "{} -> {}\n  kept {} records, {} of them messages\n",
        report.from, report.to, report.records_kept, report.messages_kept
    );
    if report.states_lost {
        text += "  no checkpoint was whole: topics made before the oldest segment are unknown\n";
    }
    let lost: u64 = report.lost.iter().map(|range| range.to - range.from + 1).sum();
    text += &format!("  lost {lost} log entries; salvage-report.json in the new store says which\n");
    text + &damage_text(&report.damage)
}

fn import_text(report: &ImportReport) -> String {
    let mut text = format!(
        "{} -> {}\n  {} messages ({} bytes) in {} topics, each with the durable subscription {:?}\n",
        report.file, report.store, report.messages, report.payload_bytes, report.topics, report.durable
    );
    if report.torn_bytes > 0 {
        text += &format!("  {} bytes of an incomplete last record were left out\n", report.torn_bytes);
    }
    text + &damage_text(&report.damage)
}

/// Shown only where somebody watches.
struct Bar(ProgressBar);

impl Bar {
    fn new(json: bool) -> Bar {
        let target = match !json && io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
            bar.set_style(style);
        }
        Bar(bar)
    }

    fn show(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}
