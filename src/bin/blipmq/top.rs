//! `blipmq top`: cores and topics, each second, as rates.
//!
//! Owns: reading Prometheus text, differences between two readings, the picture. Never: keeps more than two readings.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::Global;
use crate::admin::{get, list, text};
use crate::failure::{Failure, print};
use crate::values::{self, short, short_seconds, table};

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq top                                  redraw each second until Ctrl-C
  blipmq top --once                           one picture, from two readings a second apart
  blipmq top --interval 5s --topics 50        calmer, with more topics
  blipmq top --json | jq '.cores[].published' one object per reading

`durable` is the time from a publish read to its promise kept; p50 and p99 are of the last interval.")]
pub struct Args {
    /// Time between two readings.
    #[arg(long, default_value = "1s", value_parser = values::duration)]
    interval: Duration,
    /// One picture, then end.
    #[arg(long)]
    once: bool,
    /// Topics shown, the busiest first.
    #[arg(long, value_name = "N", default_value_t = 20)]
    topics: usize,
}

pub async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let interval = args.interval.max(Duration::from_millis(100));
    let redraw = std::io::stdout().is_terminal() && !args.once && !global.json;
    let mut before = Reading::take(&global.admin).await?;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(before.at + interval) => {}
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
        }
        let now = Reading::take(&global.admin).await?;
        let picture = Picture::between(&before, &now, args.topics);
        if global.json {
            print(&format!("{}\n", picture.json()))?;
        } else {
            let clear = if redraw { "\x1b[H\x1b[J" } else { "" };
            print(&format!("{clear}{}", picture.draw(&global.admin)))?;
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

/// `/metrics` and `/topics` at one moment.
struct Reading {
    at: Instant,
    metrics: Metrics,
    topics: Vec<Value>,
}

impl Reading {
    async fn take(admin: &str) -> Result<Reading, Failure> {
        let answer = get(admin, "/metrics").await?;
        let at = Instant::now();
        let topics = list(admin, "/topics").await?;
        Ok(Reading { at, metrics: Metrics::parse(&String::from_utf8_lossy(&answer.body)), topics })
    }
}

/// Samples with a `core` label: name, then core, then the other label's value (empty if there is none).
#[derive(Default)]
struct Metrics(BTreeMap<String, BTreeMap<u16, BTreeMap<String, f64>>>);

impl Metrics {
    /// Lines that are not as the broker writes them are skipped.
    fn parse(text: &str) -> Metrics {
        let mut metrics = Metrics::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Some((name, labels)) = series.strip_suffix('}').and_then(|series| series.split_once('{')) else {
                continue;
            };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (mut core, mut other) = (None, String::new());
            for label in labels.split(',') {
                let Some((label, quoted)) = label.split_once('=') else { continue };
                let text = quoted.trim_matches('"');
                match label {
                    "core" => core = text.parse().ok(),
                    _ => text.clone_into(&mut other),
                }
            }
            if let Some(core) = core {
                metrics.0.entry(name.to_owned()).or_default().entry(core).or_default().insert(other, value);
            }
        }
        metrics
    }

    fn cores(&self) -> impl Iterator<Item = u16> {
        self.0.get("blipmq_core_up").into_iter().flat_map(|cores| cores.keys().copied())
    }

    /// Over all values of the other label.
    fn sum(&self, name: &str, core: u16) -> f64 {
        self.samples(name, core).map(|(_, value)| value).sum()
    }

    fn samples(&self, name: &str, core: u16) -> impl Iterator<Item = (&str, f64)> {
        let cores = self.0.get(&format!("blipmq_{name}"));
        let samples = cores.and_then(|cores| cores.get(&core));
        samples.into_iter().flatten().map(|(other, value)| (other.as_str(), *value))
    }
}

/// What lies between two readings.
struct Picture {
    seconds: f64,
    cores: Vec<Core>,
    topics: Vec<Topic>,
    /// All there are, shown or not.
    topics_total: usize,
}

struct Core {
    core: u16,
    up: bool,
    connections: f64,
    published: f64,
    delivered: f64,
    acked: f64,
    lost: f64,
    waiting: f64,
    in_flight: f64,
    bytes_in: f64,
    bytes_out: f64,
    log_writes: f64,
    log_bytes: f64,
    durable_p50: Option<f64>,
    durable_p99: Option<f64>,
}

struct Topic {
    name: String,
    core: String,
    published: f64,
    messages: f64,
    bytes: f64,
    subscriptions: f64,
}

impl Picture {
    fn between(before: &Reading, now: &Reading, topics_shown: usize) -> Picture {
        let seconds = (now.at - before.at).as_secs_f64().max(1e-3);
        let cores =
            now.metrics.cores().map(|core| Core::between(&before.metrics, &now.metrics, core, seconds)).collect();
        let published = |row: &Value| row["published"].as_f64().unwrap_or(0.0);
        let earlier: BTreeMap<String, f64> =
            before.topics.iter().map(|row| (text(row, "topic"), published(row))).collect();
        let mut topics: Vec<Topic> = now
            .topics
            .iter()
            .map(|row| {
                let name = text(row, "topic");
                let since = earlier.get(&name).copied().unwrap_or(0.0);
                let number = |key: &str| row[key].as_f64().unwrap_or(0.0);
                Topic {
                    core: text(row, "core"),
                    published: rate(since, published(row), seconds),
                    messages: number("messages"),
                    bytes: number("bytes"),
                    subscriptions: number("subscriptions"),
                    name,
                }
            })
            .collect();
        let topics_total = topics.len();
        topics.sort_by(|a, b| {
            let busy = b.published.total_cmp(&a.published).then(b.messages.total_cmp(&a.messages));
            busy.then_with(|| a.name.cmp(&b.name))
        });
        topics.truncate(topics_shown);
        Picture { seconds, cores, topics, topics_total }
    }

    fn draw(&self, admin: &str) -> String {
        let titles = [
            "core",
            "conns",
            "pub/s",
            "deliver/s",
            "ack/s",
            "lost/s",
            "waiting",
            "in flight",
            "in B/s",
            "out B/s",
            "writes/s",
            "log B/s",
            "durable p50",
            "p99",
        ];
        let seconds = |time: Option<f64>| time.map_or("-".into(), short_seconds);
        let rows: Vec<Vec<String>> = self
            .cores
            .iter()
            .map(|core| {
                let name = if core.up { core.core.to_string() } else { format!("{} silent", core.core) };
                let numbers = [
                    core.connections,
                    core.published,
                    core.delivered,
                    core.acked,
                    core.lost,
                    core.waiting,
                    core.in_flight,
                    core.bytes_in,
                    core.bytes_out,
                    core.log_writes,
                    core.log_bytes,
                ];
                let mut row = vec![name];
                row.extend(numbers.map(short));
                row.extend([seconds(core.durable_p50), seconds(core.durable_p99)]);
                row
            })
            .collect();
        let cores = table(&titles, 1, &rows);
        let titles = ["topic", "core", "pub/s", "messages", "bytes", "subs"];
        let rows: Vec<Vec<String>> = self
            .topics
            .iter()
            .map(|topic| {
                let numbers = [topic.published, topic.messages, topic.bytes, topic.subscriptions].map(short);
                let mut row = vec![topic.name.clone(), topic.core.clone()];
                row.extend(numbers);
                row
            })
            .collect();
        let topics = table(&titles, 1, &rows);
        let (shown, all) = (self.topics.len(), self.topics_total);
        let head = format!("BlipMQ at {admin}, rates over {:.1} s", self.seconds);
        format!("{head}\n\n{cores}\n{shown} of {all} topics\n{topics}")
    }

    fn json(&self) -> Value {
        let cores = self.cores.iter().map(|core| {
            json!({
                "core": core.core, "up": core.up, "connections": core.connections, "published": core.published,
                "delivered": core.delivered, "acked": core.acked, "lost": core.lost, "waiting": core.waiting,
                "in_flight": core.in_flight, "bytes_in": core.bytes_in, "bytes_out": core.bytes_out,
                "log_writes": core.log_writes, "log_bytes": core.log_bytes,
                "durable_p50_seconds": core.durable_p50, "durable_p99_seconds": core.durable_p99,
            })
        });
        let topics = self.topics.iter().map(|topic| {
            json!({
                "topic": topic.name, "core": topic.core.parse::<u16>().ok(), "published": topic.published,
                "messages": topic.messages, "bytes": topic.bytes, "subscriptions": topic.subscriptions,
            })
        });
        json!({
            "seconds": self.seconds, "cores": cores.collect::<Vec<_>>(), "topics": topics.collect::<Vec<_>>(),
            "topics_total": self.topics_total,
        })
    }
}

impl Core {
    fn between(before: &Metrics, now: &Metrics, core: u16, seconds: f64) -> Core {
        let per_second = |name: &str| rate(before.sum(name, core), now.sum(name, core), seconds);
        let durable = |quantile| quantile_between(before, now, "publish_to_durable_seconds", core, quantile);
        Core {
            core,
            up: now.sum("core_up", core) > 0.0,
            connections: now.sum("connections", core),
            published: per_second("published_total"),
            delivered: per_second("delivered_total"),
            acked: per_second("acked_total"),
            lost: per_second("queue_lost_total"),
            waiting: now.sum("queue_waiting", core),
            in_flight: now.sum("messages_inflight", core),
            bytes_in: per_second("bytes_in_total"),
            bytes_out: per_second("bytes_out_total"),
            log_writes: per_second("wal_batches_total"),
            log_bytes: per_second("wal_bytes_total"),
            durable_p50: durable(0.5),
            durable_p99: durable(0.99),
        }
    }
}

/// A counter that fell belongs to a broker that was started again: it counts from zero.
fn rate(before: f64, now: f64, seconds: f64) -> f64 {
    (if now >= before { now - before } else { now }) / seconds
}

/// The upper bound of the bucket that holds the quantile of what was counted between two readings.
fn quantile_between(before: &Metrics, now: &Metrics, name: &str, core: u16, quantile: f64) -> Option<f64> {
    let bucket = format!("{name}_bucket");
    let earlier: BTreeMap<&str, f64> = before.samples(&bucket, core).collect();
    let since = |bound: &str| earlier.get(bound).copied().unwrap_or(0.0);
    let mut counts: Vec<(f64, f64)> = now
        .samples(&bucket, core)
        .filter_map(|(bound, count)| Some((bound.parse().ok()?, count - since(bound))))
        .collect();
    counts.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total = counts.last()?.1;
    if total <= 0.0 {
        return None;
    }
    counts.iter().find(|(bound, count)| *count >= quantile * total && bound.is_finite()).map(|(bound, _)| *bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(seconds: u64, published: u64, fast: u64, all: u64) -> Reading {
        let text = format!(
            "# HELP topics Topics that exist.\ntopics 3\nblipmq_core_up{{core=\"0\"}} 1\n\
             blipmq_published_total{{core=\"0\",qos=\"0\"}} 5\n\
             blipmq_published_total{{core=\"0\",qos=\"1\"}} {published}\n\
             blipmq_publish_to_durable_seconds_bucket{{core=\"0\",le=\"0.001\"}} {fast}\n\
             blipmq_publish_to_durable_seconds_bucket{{core=\"0\",le=\"0.002\"}} {all}\n\
             blipmq_publish_to_durable_seconds_bucket{{core=\"0\",le=\"+Inf\"}} {all}\nnonsense\n"
        );
        let topic = |name: &str, published: u64| {
            json!({ "topic": name, "core": 0, "vshard": 1, "messages": 2, "bytes": 2048, "subscriptions": 1,
                    "published": published, "next_seq": 9 })
        };
        Reading {
            at: Instant::now() + Duration::from_secs(seconds),
            metrics: Metrics::parse(&text),
            topics: vec![topic("calm", 7), topic("busy", published)],
        }
    }

    #[test]
    fn rates_lie_between_two_readings() {
        let picture = Picture::between(&reading(0, 100, 10, 10), &reading(2, 300, 70, 110), 1);
        let core = &picture.cores[0];
        assert!(core.up && (core.published - 100.0).abs() < 1.0, "{}", core.published);
        assert_eq!((core.durable_p50, core.durable_p99), (Some(0.001), Some(0.002)));
        assert_eq!((picture.topics.len(), picture.topics_total, picture.topics[0].name.as_str()), (1, 2, "busy"));
        let drawn = picture.draw("here");
        assert!(drawn.contains("1 of 2 topics") && drawn.contains("1.00ms"), "{drawn}");
        assert_eq!(picture.json()["topics"][0]["subscriptions"], 1.0);
    }

    #[test]
    fn a_restarted_broker_counts_from_zero() {
        let picture = Picture::between(&reading(0, 1_000, 500, 500), &reading(1, 100, 5, 5), 5);
        assert!(picture.cores[0].published < 101.0 + 5.0, "{}", picture.cores[0].published);
        assert_eq!(picture.cores[0].durable_p50, None, "buckets that fell say nothing");
    }

    #[test]
    fn other_peoples_metrics_are_skipped() {
        assert_eq!(Metrics::parse("up 1\nx{job=\"a\"} 1\ny{core=\"zero\"} 1\n{\n}").0.len(), 0);
    }
}
