//! What a run says of itself: machine, medians, tables, JSON lines, and the comparison of two files of them.
//!
//! Owns: names of the values and how they are summarised. Never: measures.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::Result;

/// One measurement's numbers by name; the name ends in its unit.
pub type Values = BTreeMap<String, f64>;

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)];
/// Where only the worst repeat is honest; everywhere else the median of the repeats is shown.
const WORST: [&str; 3] = ["max_us", "missing", "disordered"];

/// A line of the JSON file.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    Run(Machine),
    Sample { scenario: String, repeat: u32, values: Values },
    Failure { scenario: String, repeat: u32, error: String },
    Summary { scenario: String, values: Values },
}

#[derive(Serialize, Deserialize)]
pub struct Machine {
    pub date: String,
    pub commit: String,
    pub command: String,
    pub cpu: String,
    pub cpus: usize,
    pub broker_cpus: Vec<usize>,
    pub load_cpu: usize,
    pub kernel: String,
    pub file_system: String,
    pub durability: String,
    pub load_average: String,
}

impl Machine {
    pub fn describe(work: &Path, broker_cpus: Vec<usize>, load_cpu: usize, durability: &str) -> Machine {
        let output = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success());
            output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string())
        };
        let commit = output("git", &["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".into());
        let changed =
            output("git", &["status", "--porcelain", "--untracked-files=no", "--", "src", "bench", "Cargo.lock"]);
        let changed = if changed.is_some_and(|files| !files.is_empty()) { " with local changes" } else { "" };
        let first_line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_string();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(": "));
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Machine {
            date: output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
            commit: format!("{commit}{changed}"),
            command: format!("cargo run --release -p bench -- {}", arguments.join(" ")),
            cpu: cpu.map_or("unknown", |(_, model)| model).to_string(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            broker_cpus,
            load_cpu,
            kernel: first_line("/proc/sys/kernel/osrelease"),
            file_system: file_system_of(work).unwrap_or_else(|| "unknown".into()),
            durability: durability.to_string(),
            load_average: first_line("/proc/loadavg"),
        }
    }

    pub fn text(&self) -> String {
        format!(
            "{}\n{}, commit {}\n{}, {} CPUs (broker on {:?}, load generator on {}), Linux {}, store on {}\n\
             durability: {}; load average at the start {}\n",
            self.command,
            self.date,
            self.commit,
            self.cpu,
            self.cpus,
            self.broker_cpus,
            self.load_cpu,
            self.kernel,
            self.file_system,
            self.durability,
            self.load_average,
        )
    }
}

/// The type of the mount `path` lies on, `ext4` for example.
fn file_system_of(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let best = mounts.filter(|(point, _)| path.starts_with(point)).max_by_key(|(point, _)| point.len());
    best.map(|(_, kind)| kind.to_string())
}

/// Adds `name.p50_us` to `name.max_us`.
pub fn add_latency(values: &mut Values, name: &str, latency: &Histogram<u64>) {
    for (quantile, q) in QUANTILES {
        values.insert(format!("{name}.{quantile}_us"), latency.value_at_quantile(q) as f64 / 1e3);
    }
    values.insert(format!("{name}.max_us"), latency.max() as f64 / 1e3);
}

/// All samples of a run, in the order their scenarios first came.
#[derive(Default)]
pub struct Results {
    samples: Vec<(String, Vec<Values>)>,
    lines: Vec<Line>,
    failures: u32,
}

impl Results {
    pub fn sample(&mut self, scenario: &str, repeat: u32, values: Values) {
        self.lines.push(Line::Sample { scenario: scenario.to_string(), repeat, values: values.clone() });
        match self.samples.iter_mut().find(|(name, _)| name == scenario) {
            Some((_, samples)) => samples.push(values),
            None => self.samples.push((scenario.to_string(), vec![values])),
        }
    }

    pub fn failure(&mut self, scenario: &str, repeat: u32, error: String) {
        self.lines.push(Line::Failure { scenario: scenario.to_string(), repeat, error });
        self.failures += 1;
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    fn summaries(&self) -> Vec<(String, Values)> {
        self.samples.iter().map(|(name, samples)| (name.clone(), summary(samples))).collect()
    }

    pub fn write_json(mut self, path: &Path, machine: Machine) -> Result<()> {
        let summaries = self.summaries();
        self.lines.insert(0, Line::Run(machine));
        self.lines.extend(summaries.into_iter().map(|(scenario, values)| Line::Summary { scenario, values }));
        let mut text = String::new();
        for line in &self.lines {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        Ok(fs::write(path, text)?)
    }

    pub fn tables(&self) -> String {
        let summaries = self.summaries();
        let mut text = String::new();
        for table in [latency_table(&summaries), cost_table(&summaries)].iter().filter(|table| table.rows.len() > 1) {
            text.push_str(&table.text());
            text.push('\n');
        }
        text.push_str(&floor_lines(&summaries));
        for line in &self.lines {
            if let Line::Failure { scenario, repeat, error } = line {
                let _ = writeln!(text, "FAILED {scenario}, repeat {repeat}: {error}");
            }
        }
        text
    }
}

/// The median of each value over the repeats, or the worst of them (see `WORST`).
fn summary(samples: &[Values]) -> Values {
    let mut names: Vec<&String> = samples.iter().flat_map(Values::keys).collect();
    names.sort();
    names.dedup();
    let summarise = |name: &String| {
        let mut all: Vec<f64> = samples.iter().filter_map(|values| values.get(name)).copied().collect();
        all.sort_by(f64::total_cmp);
        let worst = WORST.iter().any(|end| name.ends_with(end));
        let middle = all.len() / 2;
        let value = if worst {
            all[all.len() - 1]
        } else if all.len() % 2 == 1 {
            all[middle]
        } else {
            (all[middle - 1] + all[middle]) / 2.0
        };
        (name.clone(), value)
    };
    names.into_iter().map(summarise).collect()
}

fn latency_table(summaries: &[(String, Values)]) -> Table {
    let mut table = Table::new(&["latency, us", "of", "p50", "p90", "p99", "p99.9", "max"]);
    for (scenario, values) in summaries {
        for (key, title) in
            [("confirm", "publish to confirm"), ("deliver", "publish to deliver"), ("late", "generator late")]
        {
            let cells =
                ["p50", "p90", "p99", "p999", "max"].map(|quantile| values.get(&format!("{key}.{quantile}_us")));
            if cells.iter().any(Option::is_some) {
                let mut row = vec![scenario.clone(), title.to_string()];
                row.extend(cells.map(|cell| cell.map_or("-".into(), |us| number(*us))));
                table.row(row);
            }
        }
    }
    table
}

fn cost_table(summaries: &[(String, Values)]) -> Table {
    let columns = [
        ("offered/s", "offered_per_s"),
        ("confirmed/s", "confirmed_per_s"),
        ("received/s", "received_per_s"),
        ("lost", "missing"),
        ("broker CPU s/M", "cpu_s_per_million"),
        ("broker CPU %", "broker_cpu_percent"),
        ("generator CPU %", "generator_cpu_percent"),
        ("other CPU %", "other_cpu_percent"),
        ("RSS MiB", "rss_mib"),
        ("peak RSS MiB", "peak_rss_mib"),
        ("KiB/conn", "kib_per_connection"),
        ("log B/msg", "log_bytes_per_message"),
        ("msg/write", "messages_per_write"),
        ("start ms", "start_ms"),
    ];
    let mut heads = vec!["throughput and cost"];
    heads.extend(columns.map(|(head, _)| head));
    let mut table = Table::new(&heads);
    for (scenario, values) in summaries {
        if !values.contains_key("received_per_s") && !values.contains_key("start_ms") {
            continue;
        }
        let mut row = vec![scenario.clone()];
        row.extend(columns.map(|(_, key)| values.get(key).map_or("-".into(), |value| number(*value))));
        table.row(row);
    }
    table
}

/// The machine's floors and how far above them the broker's confirms are.
fn floor_lines(summaries: &[(String, Values)]) -> String {
    let find = |scenario: &str, key: &str| {
        summaries.iter().find(|(name, _)| name == scenario).and_then(|(_, values)| values.get(key)).copied()
    };
    let mut text = String::new();
    for (title, suffix) in [("back to back", ""), ("at 1k/s", "_at_1k")] {
        let floor = |kind: &str, quantile: &str| find(FLOORS, &format!("{kind}{suffix}_{quantile}_us"));
        let (Some(echo), Some(write)) = (floor("echo", "p50"), floor("write", "p50")) else { continue };
        let _ = writeln!(
            text,
            "floor {title}: loopback echo 128 B p50 {} us, p99 {} us; O_DIRECT O_DSYNC write 4 KiB p50 {} us, p99 {} us; sum of p50 {} us",
            number(echo),
            number(floor("echo", "p99").unwrap_or(0.0)),
            number(write),
            number(floor("write", "p99").unwrap_or(0.0)),
            number(echo + write),
        );
        for (scenario, values) in
            summaries.iter().filter(|(name, _)| name.contains("/s") && name.starts_with("durable"))
        {
            if let Some(confirm) = values.get("confirm.p50_us") {
                let ratio = confirm / (echo + write);
                let _ = writeln!(text, "  {scenario}: confirm p50 {} us = {ratio:.2} x floor", number(*confirm));
            }
        }
    }
    if let Some(bulk) = find(FLOORS, "bulk_mb_per_s") {
        let _ = writeln!(text, "floor TCP bulk one way over loopback: {} MB/s", number(bulk));
    }
    text
}

/// The scenario name the floors are kept under.
pub const FLOORS: &str = "floors";

/// Three significant digits or all of a whole number, thousands apart.
fn number(value: f64) -> String {
    let digits = if value == 0.0 || value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        2
    };
    let plain = format!("{value:.digits$}");
    let (whole, fraction) = plain.split_once('.').map_or((plain.as_str(), ""), |(whole, fraction)| (whole, fraction));
    let mut grouped = String::new();
    for (position, digit) in whole.chars().enumerate() {
        if position > 0 && (whole.len() - position) % 3 == 0 && digit.is_ascii_digit() {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    if fraction.is_empty() { grouped } else { format!("{grouped}.{fraction}") }
}

struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(heads: &[&str]) -> Table {
        Table { rows: vec![heads.iter().map(ToString::to_string).collect()] }
    }

    fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Columns without any content are left out; the first is flush left, the others right, except texts.
    fn text(&self) -> String {
        let used = |column: usize| self.rows.iter().skip(1).any(|row| row[column] != "-");
        let columns: Vec<usize> = (0..self.rows[0].len()).filter(|column| used(*column)).collect();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = columns.iter().map(|column| width(*column)).collect();
        let is_text = |column: usize| self.rows.iter().skip(1).any(|row| row[column].starts_with(char::is_alphabetic));
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, width) in columns.iter().zip(&widths) {
                let cell = &row[*column];
                let _ =
                    if is_text(*column) { write!(line, "{cell:<width$}  ") } else { write!(line, "{cell:>width$}  ") };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// What two JSON files have in common, and the ratio of the second to the first.
pub fn compare(before: &Path, after: &Path) -> Result<String> {
    let (before, after) = (read_summaries(before)?, read_summaries(after)?);
    let mut table = Table::new(&["scenario", "value", "before", "after", "after/before"]);
    for (scenario, values) in &after {
        let Some((_, old)) = before.iter().find(|(name, _)| name == scenario) else { continue };
        for (name, new) in values {
            let Some(old) = old.get(name) else { continue };
            let ratio = if *old == 0.0 { "-".into() } else { format!("{:.2}", new / old) };
            table.row(vec![scenario.clone(), name.clone(), number(*old), number(*new), ratio]);
        }
    }
    Ok(table.text())
}

fn read_summaries(path: &Path) -> Result<Vec<(String, Values)>> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut summaries = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Line::Summary { scenario, values } =
            serde_json::from_str(line).map_err(|error| format!("{}: {error}", path.display()))?
        {
            summaries.push((scenario, values));
        }
    }
    Ok(summaries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(p50: f64, max: f64) -> Values {
        Values::from([("confirm.p50_us".to_string(), p50), ("confirm.max_us".to_string(), max)])
    }

    #[test]
    fn the_median_is_shown_and_of_a_maximum_the_worst() {
        let summary = summary(&[values(5.0, 100.0), values(1.0, 900.0), values(2.0, 300.0)]);
        assert_eq!(summary, values(2.0, 900.0));
        let even = super::summary(&[values(1.0, 1.0), values(2.0, 2.0)]);
        assert_eq!(even["confirm.p50_us"], 1.5);
    }

    #[test]
    fn numbers_are_short_and_grouped() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(0.456), "0.46");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(1_234_567.8), "1 234 568");
        assert_eq!(number(123.0), "123");
    }

    #[test]
    fn a_column_nobody_fills_is_left_out() {
        let mut table = Table::new(&["name", "a", "b"]);
        table.row(vec!["x".into(), "-".into(), "1".into()]);
        assert_eq!(table.text(), "name  b\nx     1\n");
    }

    #[test]
    fn json_lines_come_back() {
        let path = std::env::temp_dir().join(format!("bench-report-{}.json", std::process::id()));
        let mut results = Results::default();
        results.sample("a", 0, values(4.0, 8.0));
        let machine = Machine::describe(Path::new("/"), vec![0], 1, "always");
        results.write_json(&path, machine).unwrap();
        let read = read_summaries(&path).unwrap();
        assert_eq!(read, vec![("a".to_string(), values(4.0, 8.0))]);
        let compared = compare(&path, &path).unwrap();
        assert!(compared.contains("1.00"), "{compared}");
        fs::remove_file(&path).unwrap();
    }
}
