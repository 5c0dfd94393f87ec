//! What the broker says of itself, and what the kernel says of it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

/// Its metrics, summed over cores; `name` or `name{label="value"}`, without the `blipmq_` in front.
#[derive(Clone, Debug, Default)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn fetch(port: u16) -> io::Result<Metrics> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        if !page.starts_with("HTTP/1.1 200") {
            let first = page.lines().next().unwrap_or_default().to_owned();
            return Err(io::Error::other(format!("metrics: {first}")));
        }
        Ok(Metrics::parse(&page))
    }

    fn parse(page: &str) -> Metrics {
        let mut sums = BTreeMap::new();
        for line in page.lines() {
            let Some(rest) = line.strip_prefix("blipmq_") else { continue };
            let Some((name, value)) = rest.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            *sums.entry(without_core(name)).or_default() += value;
        }
        Metrics(sums)
    }

    /// 0 if there is no such metric.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default() as u64
    }

    /// `name{reason="…"}`.
    pub fn by(&self, name: &str, reason: &str) -> u64 {
        self.get(&format!("{name}{{reason=\"{reason}\"}}"))
    }
}

/// `a{core="0",reason="x"}` -> `a{reason="x"}`.
fn without_core(name: &str) -> String {
    let Some((name, labels)) = name.split_once('{') else { return name.to_owned() };
    let labels: Vec<&str> =
        labels.trim_end_matches('}').split(',').filter(|label| !label.starts_with("core=")).collect();
    if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) }
}

/// A process as the kernel sees it. Zero where it is gone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// Bytes in memory now, and the most there ever were.
    pub rss: u64,
    pub rss_peak: u64,
    /// Time it has computed.
    pub cpu: Duration,
}

impl Process {
    pub fn look(pid: u32) -> Process {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or_default()
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name, which may contain anything: state is the first field, utime and stime the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
        Process {
            rss: kib("VmRSS") * 1024,
            rss_peak: kib("VmHWM") * 1024,
            cpu: Duration::from_millis((ticks(11) + ticks(12)) * 10),
        }
    }

    /// Open descriptors.
    pub fn files(pid: u32) -> u64 {
        fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count() as u64)
    }
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_cores_and_keep_their_other_labels() {
        let page = "HTTP/1.1 200 OK\r\n\r\n# HELP x\nblipmq_connections{core=\"0\"} 3\nblipmq_connections{core=\"1\"} 4\n\
            blipmq_closed{core=\"0\",reason=\"silent\"} 2\nblipmq_closed{core=\"1\",reason=\"silent\"} 5\nother 9\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.get("connections"), 7);
        assert_eq!(metrics.by("closed", "silent"), 7);
        assert_eq!(metrics.get("other"), 0);
    }

    #[test]
    fn this_process_uses_memory_and_files() {
        let me = Process::look(std::process::id());
        assert!(me.rss > 0 && me.rss_peak >= me.rss, "{me:?}");
        assert!(Process::files(std::process::id()) >= 3);
        assert_eq!(Process::look(u32::MAX).rss, 0);
    }
}
