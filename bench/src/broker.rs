//! A `blipmqd` of our own: started on its CPU, watched through /proc and /metrics, killed when dropped.
//!
//! Owns: the process and its store directory. Never: touches a process it did not start.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::wire::{API_KEY, Link};
use crate::{Result, floors};

const START_DEADLINE: Duration = Duration::from_secs(30);
/// Sleep between two tries while the broker starts.
const START_STEP: Duration = Duration::from_millis(5);
const METRICS_DEADLINE: Duration = Duration::from_secs(2);

/// How a broker is to run.
#[derive(Clone)]
pub struct Setup {
    pub binary: PathBuf,
    /// Parent of the store; the store itself is a fresh directory below.
    pub work: PathBuf,
    /// CPU numbers, one core of the broker each.
    pub cpus: Vec<usize>,
    pub fsync_policy: &'static str,
}

pub struct Broker {
    child: Child,
    setup: Setup,
    store: PathBuf,
    log: PathBuf,
    pub port: u16,
    metrics_port: u16,
    /// From spawn to the answer to HELLO.
    pub start_time: Duration,
}

impl Broker {
    /// Starts on an empty store and waits until it answers HELLO.
    pub fn start(setup: &Setup) -> Result<Broker> {
        let store = setup.work.join(format!("store-{}", std::process::id()));
        remove_store(&store)?;
        fs::create_dir_all(&store)?;
        // What the run before left to be written, or to be discarded, is not this run's business.
        rustix::fs::syncfs(File::open(&store)?)?;
        Broker::spawn(setup, store)
    }

    /// Kills the broker and starts another on the same store.
    pub fn crash_and_restart(mut self) -> Result<Broker> {
        self.child.kill()?;
        self.child.wait()?;
        let (setup, store) = (self.setup.clone(), std::mem::take(&mut self.store));
        drop(self);
        Broker::spawn(&setup, store)
    }

    fn spawn(setup: &Setup, store: PathBuf) -> Result<Broker> {
        let (port, metrics_port) = free_ports()?;
        let log = setup.work.join("broker.log");
        let output = File::create(&log)?;
        let cpus: Vec<String> = setup.cpus.iter().map(usize::to_string).collect();
        let mut command = Command::new(&setup.binary);
        command
            .env_remove("BLIPMQ_CONFIG")
            .env("BLIPMQ_PORT", port.to_string())
            .env("BLIPMQ_METRICS_PORT", metrics_port.to_string())
            .env("BLIPMQ_WAL_PATH", &store)
            .env("BLIPMQ_ALLOWED_API_KEYS", API_KEY)
            .env("BLIPMQ_FSYNC_POLICY", setup.fsync_policy)
            .env("BLIPMQ_SHARDS_COUNT", cpus.len().to_string())
            .env("BLIPMQ_SHARDS_CPUS", cpus.join(","))
            .env("BLIPMQ_DELIVERY_TTL_MS", "0")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let started = Instant::now();
        // A child inherits the affinity of the thread that makes it: with one core, the broker's helper threads too stay
        // on its CPU, and their work is counted against it.
        let child = match setup.cpus.as_slice() {
            [cpu] => floors::on_cpu(*cpu, move || command.spawn())?,
            _ => command.spawn(),
        }
        .map_err(|error| format!("cannot start {}: {error}", setup.binary.display()))?;
        let mut broker =
            Broker { child, setup: setup.clone(), store, log, port, metrics_port, start_time: Duration::ZERO };
        broker.wait_until_ready(started)?;
        broker.start_time = started.elapsed();
        Ok(broker)
    }

    fn wait_until_ready(&mut self, started: Instant) -> Result<()> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the broker ended at start ({status}); it said:\n{}", self.log_tail()).into());
            }
            let error = match Link::login(self.port) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if started.elapsed() > START_DEADLINE {
                let tail = self.log_tail();
                return Err(format!("not ready within {START_DEADLINE:?}: {error}; it said:\n{tail}").into());
            }
            std::thread::sleep(START_STEP);
        }
    }

    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// CPU time of all its threads, user and system.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = stat.rsplit_once(')').ok_or("no name in /proc/PID/stat")?.1;
        // utime and stime are fields 14 and 15; the first one here is field 3.
        Ok(seconds(after_name.split_whitespace().skip(11).take(2)))
    }

    /// Memory resident now.
    pub fn rss_mib(&self) -> Result<f64> {
        self.status_mib("VmRSS:")
    }

    /// Most memory it ever had resident.
    pub fn peak_rss_mib(&self) -> Result<f64> {
        self.status_mib("VmHWM:")
    }

    fn status_mib(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let value =
            status.lines().find_map(|line| line.strip_prefix(field)).ok_or("no such field in /proc/PID/status")?;
        let kib: f64 = value.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }

    /// Its counters, summed over labels. Empty if it does not serve them.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        self.scrape().map(|text| parse_metrics(&text)).unwrap_or_default()
    }

    fn scrape(&self) -> Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.metrics_port))?;
        stream.set_read_timeout(Some(METRICS_DEADLINE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        // An answer that ends in a timeout is used as far as it came.
        let _ = stream.read_to_end(&mut answer);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.store.as_os_str().is_empty()
            && let Err(error) = remove_store(&self.store)
        {
            eprintln!("cannot remove {}: {error}", self.store.display());
        }
    }
}

/// CPU time that all of the machine has spent on anything, over all CPUs.
pub fn machine_cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    // cpu user nice system idle iowait irq softirq steal ...
    let mut fields = stat.lines().next().ok_or("empty /proc/stat")?.split_whitespace().skip(1);
    Ok(seconds(fields.by_ref().take(3)) + seconds(fields.skip(2).take(3)))
}

/// A sum of clock ticks.
fn seconds<'a>(fields: impl Iterator<Item = &'a str>) -> f64 {
    let ticks: u64 = fields.map(|field| field.parse().unwrap_or(0)).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// `name{labels} value` lines; anything else (HTTP headers, HELP, TYPE) is skipped.
fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or(series);
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
        if let (true, Ok(value)) = (is_name, value.parse::<f64>()) {
            *sums.entry(name.to_string()).or_insert(0.0) += value;
        }
    }
    sums
}

/// Two ports nobody listens on at this moment.
fn free_ports() -> Result<(u16, u16)> {
    let one = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok((one.local_addr()?.port(), other.local_addr()?.port()))
}

fn remove_store(store: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(store) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_labels_and_the_rest_is_skipped() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n# HELP wal_syncs_total Syncs\n\
                    wal_syncs_total{core=\"0\"} 3\nwal_syncs_total{core=\"1\"} 4\ntopics 2\n";
        let metrics = parse_metrics(text);
        assert_eq!(metrics["wal_syncs_total"], 7.0);
        assert_eq!(metrics["topics"], 2.0);
        assert_eq!(metrics.len(), 2);
    }
}
