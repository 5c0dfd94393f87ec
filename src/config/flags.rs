//! Command line of `blipmqd`; flags win over everything.

use super::error::ConfigError;
use super::{Draft, Origin, env, keys};
use std::path::PathBuf;

/// BlipMQ, the broker.
#[derive(clap::Parser, Clone, Debug, Default)]
#[command(
    name = "blipmqd",
    version,
    after_help = "\
Examples:
  blipmqd                                        loopback, port 5555, store in ./blipmq.wal, a key made for you
  blipmqd --config config/prod.toml              settings from a file (.yaml and .yml are YAML, all else is TOML)
  blipmqd --config config/prod.toml --check-config
                                                 validate, print the effective settings, exit
  blipmqd --data-dir /var/lib/blipmq --shards 4  four cores
  BLIPMQ_STORAGE_MEMORY_BUDGET=1GiB blipmqd      any setting from the environment: BLIPMQ_<TABLE>_<KEY>
  RUST_LOG=debug blipmqd                         more to read

Order: built-in default, then file, then environment, then flags. Every setting is explained in config/blipmq.toml.
A wrong configuration ends with exit code 78 and says where the trouble is."
)]
pub struct Flags {
    /// Configuration file; without it the file named by BLIPMQ_CONFIG, without that built-in defaults.
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Address or host name to listen on [setting: bind_addr].
    #[arg(long, value_name = "ADDR")]
    pub bind: Option<String>,
    /// Port to listen on, 0 for any free one [setting: port].
    #[arg(long, value_name = "PORT")]
    pub port: Option<String>,
    /// Directory of the store [setting: wal_path].
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// Cores to use, 0 for all allowed [setting: shards.count].
    #[arg(long, value_name = "N")]
    pub shards: Option<String>,
    /// always, none, every_n:<records> or interval_ms:<ms> [setting: fsync_policy].
    #[arg(long, value_name = "POLICY")]
    pub fsync_policy: Option<String>,
    /// Port of /metrics, /healthz, /topics, 0 for any free one [setting: metrics_port].
    #[arg(long, value_name = "PORT")]
    pub metrics_port: Option<String>,
    /// Validate, print the effective settings and where each came from, exit.
    #[arg(long)]
    pub check_config: bool,
    /// Run on a file system without O_DIRECT; for development only [setting: storage.allow_buffered_io].
    #[arg(long)]
    pub allow_buffered_io: bool,
}

impl Flags {
    pub(super) fn apply(&self, draft: &mut Draft) -> Result<(), ConfigError> {
        // Values stay text until here, so that a flag is judged like every other source.
        let yes = self.allow_buffered_io.then(|| "true".to_owned());
        let flags = [
            ("--bind", "bind_addr", &self.bind),
            ("--port", "port", &self.port),
            ("--data-dir", "wal_path", &self.data_dir),
            ("--shards", "shards.count", &self.shards),
            ("--fsync-policy", "fsync_policy", &self.fsync_policy),
            ("--metrics-port", "metrics_port", &self.metrics_port),
            ("--allow-buffered-io", "storage.allow_buffered_io", &yes),
        ];
        for (flag, path, text) in flags {
            if let (Some(text), Some(key)) = (text, keys::find(path)) {
                env::read(key, text, Origin::Flag(flag), draft)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        Flags::command().debug_assert();
    }

    #[test]
    fn every_flag_reaches_its_setting() {
        let flags = Flags::parse_from([
            "blipmqd",
            "--bind",
            "::1",
            "--port",
            "0",
            "--data-dir",
            "/d",
            "--shards",
            "2",
            "--fsync-policy",
            "none",
            "--metrics-port",
            "1",
            "--allow-buffered-io",
        ]);
        let mut draft = Draft::default();
        flags.apply(&mut draft).unwrap();
        assert_eq!(draft.origins.len(), 7);
        assert_eq!((draft.config.bind_addr.as_str(), draft.config.port, draft.config.shards.count), ("::1", 0, 2));
        assert_eq!(draft.origins["shards.count"], Origin::Flag("--shards"));
    }
}
