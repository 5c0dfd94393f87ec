//! `blipmq pub`: one message, the lines of standard input, or a measured load.

use std::time::Duration;

use blipmq::client::{Client, ConfirmFuture, Confirmed, Error, PublishBuilder, Qos, Status, Topic};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::Global;
use crate::connect::connect;
use crate::failure::{Failure, print};
use crate::values;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq pub orders 'one coffee'                      publish, wait until it is as safe as the broker promises
  blipmq pub orders --header table=7 --ttl 10m hello  with a header; not delivered after ten minutes
  blipmq pub orders --id order-17 'one coffee'        stored once, however often this is run
  tail -f access.log | blipmq pub log                 each line of standard input is a message
  blipmq pub orders --count 100000 --size 256         as fast as confirms come
  blipmq pub orders --count 10000 --rate 1000         1000 a second; latency counts from when each was due

Exit code 0 means that every message was confirmed (at QoS0: was sent).")]
pub struct Args {
    topic: String,
    /// The message; `-` or none: each line of standard input is one.
    message: Option<String>,
    /// 0: at most once; 1: logged, confirmed, delivered until acknowledged.
    #[arg(long, default_value = "1", value_parser = values::qos)]
    qos: Qos,
    /// How long it is worth delivering, as in 30s or 2h; 0: for ever [default: the broker's].
    #[arg(long, value_parser = values::duration)]
    ttl: Option<Duration>,
    /// Deliver it only after this time.
    #[arg(long, value_parser = values::duration)]
    delay: Option<Duration>,
    /// 0 to 9, higher is delivered first.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: u8,
    /// key=value, delivered with the message; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::header)]
    header: Vec<(String, String)>,
    /// Message id: the broker stores one message under it.
    #[arg(long, requires = "message", conflicts_with = "count")]
    id: Option<String>,
    /// The topic on which an answer is waited for.
    #[arg(long, value_name = "TOPIC")]
    reply_to: Option<String>,
    /// Publish this many generated messages and measure.
    #[arg(long, value_name = "N", conflicts_with = "message", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Bytes of a generated message, as in 512 or 64k.
    #[arg(long, value_name = "BYTES", default_value = "256", value_parser = values::size)]
    size: usize,
    /// Generated messages a second [default: as fast as possible].
    #[arg(long, value_name = "R", requires = "count", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    rate: Option<u64>,
}

/// Answers that may wait to be looked at; the client's own window bounds what is under way.
const ANSWERS_MAX: usize = 8_192;
/// Longer latencies count as this: an hour.
const LATENCY_NANOS_MAX: u64 = 3_600_000_000_000;

pub async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let client = connect(global).await?;
    let done = match (&args.message, args.count) {
        (_, Some(count)) => load(global, &args, &client, count).await,
        (Some(message), None) if message != "-" => one(global, &args, &client, message.clone()).await,
        _ if args.id.is_some() => Err(Failure::new("--id names one message: give it as the argument")),
        _ => lines(global, &args, &client).await,
    };
    client.close().await;
    done
}

impl Args {
    fn publish<'a>(&self, client: &'a Client, topic: &Topic, payload: Bytes) -> PublishBuilder<'a> {
        let mut publish = client.publish(topic, payload).qos(self.qos).priority(self.priority);
        if let Some(ttl) = self.ttl {
            publish = publish.ttl(ttl);
        }
        if let Some(delay) = self.delay {
            publish = publish.delay(delay);
        }
        if let Some(id) = &self.id {
            publish = publish.message_id(id.clone());
        }
        if let Some(topic) = &self.reply_to {
            publish = publish.reply_to(topic);
        }
        self.header.iter().fold(publish, |publish, (key, value)| publish.header(key, value))
    }
}

async fn one(global: &Global, args: &Args, client: &Client, message: String) -> Result<(), Failure> {
    let Confirmed { status, level, position } =
        args.publish(client, &Topic::from(&args.topic), message.into()).send().await?;
    let (status, level) = (format!("{status:?}").to_lowercase(), level.map(|l| format!("{l:?}").to_lowercase()));
    if global.json {
        let position = position.map(|position| position.0);
        return print(&format!("{}\n", json!({ "status": status, "level": level, "position": position })));
    }
    print(&match (level, position) {
        (Some(level), Some(position)) => format!("{status}, {level}, at position {position}\n"),
        _ => format!("{status}\n"),
    })
}

async fn lines(global: &Global, args: &Args, client: &Client) -> Result<(), Failure> {
    let topic = Topic::from(&args.topic);
    let counted = Counted::start(None);
    let mut input = BufReader::new(tokio::io::stdin()).split(b'\n');
    let sent = async {
        while let Some(mut line) = input.next_segment().await? {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            let due = Instant::now();
            let answer = args.publish(client, &topic, line.into()).send_nowait().await?;
            counted.watch(due, answer).await;
        }
        Ok::<(), Failure>(())
    };
    let sent = sent.await;
    let result = counted.finish().await;
    result.report(global, args.qos)?;
    sent
}

async fn load(global: &Global, args: &Args, client: &Client, count: u64) -> Result<(), Failure> {
    let topic = Topic::from(&args.topic);
    let payload = Bytes::from(vec![b'x'; args.size]);
    let bar = if global.json { ProgressBar::hidden() } else { ProgressBar::new(count) };
    let style = ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} {per_sec} eta {eta}");
    bar.set_style(style.map_err(|error| Failure::new(error.to_string()))?);
    let begin = Instant::now();
    let counted = Counted::start(Some(bar));
    let sent = async {
        for message in 0..count {
            let due = match args.rate {
                Some(rate) => {
                    let due = begin + Duration::from_secs_f64(message as f64 / rate as f64);
                    tokio::time::sleep_until(due).await;
                    due
                }
                None => Instant::now(),
            };
            let answer = args.publish(client, &topic, payload.clone()).send_nowait().await?;
            counted.watch(due, answer).await;
        }
        Ok::<(), Failure>(())
    };
    let sent = sent.await;
    let result = counted.finish().await;
    result.report(global, args.qos)?;
    sent
}

/// Looks at answers while more is sent.
struct Counted {
    answers: mpsc::Sender<(Instant, ConfirmFuture)>,
    task: tokio::task::JoinHandle<Totals>,
    begin: Instant,
}

struct Totals {
    stored: u64,
    duplicate: u64,
    sent: u64,
    failed: u64,
    first_failure: Option<Error>,
    latency: Histogram<u64>,
    last: Instant,
    took: Duration,
}

impl Counted {
    fn start(bar: Option<ProgressBar>) -> Counted {
        let (answers, received) = mpsc::channel(ANSWERS_MAX);
        let begin = Instant::now();
        Counted { answers, task: tokio::spawn(count(received, bar, begin)), begin }
    }

    async fn watch(&self, due: Instant, answer: ConfirmFuture) {
        // The task ends only after the sender is gone.
        drop(self.answers.send((due, answer)).await);
    }

    async fn finish(self) -> Totals {
        drop(self.answers);
        let mut totals = self.task.await.expect("counting does not panic");
        totals.took = totals.last - self.begin;
        totals
    }
}

async fn count(
    mut received: mpsc::Receiver<(Instant, ConfirmFuture)>,
    bar: Option<ProgressBar>,
    begin: Instant,
) -> Totals {
    let latency = Histogram::new_with_bounds(1, LATENCY_NANOS_MAX, 3).expect("bounds and digits are allowed");
    let mut totals = Totals {
        stored: 0,
        duplicate: 0,
        sent: 0,
        failed: 0,
        first_failure: None,
        latency,
        last: begin,
        took: Duration::ZERO,
    };
    let mut waiting = FuturesUnordered::new();
    let mut open = true;
    while open || !waiting.is_empty() {
        tokio::select! {
            next = received.recv(), if open && waiting.len() < ANSWERS_MAX => match next {
                Some((due, answer)) => waiting.push(async move { (due, answer.await) }),
                None => open = false,
            },
            Some((due, answer)) = waiting.next(), if !waiting.is_empty() => {
                totals.add(due, answer);
                if let Some(bar) = &bar {
                    bar.inc(1);
                }
            }
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    totals
}

impl Totals {
    fn add(&mut self, due: Instant, answer: Result<Confirmed, Error>) {
        self.last = Instant::now();
        match answer {
            Ok(confirmed) => {
                match confirmed.status {
                    Status::Stored => self.stored += 1,
                    Status::Duplicate => self.duplicate += 1,
                    Status::Sent => self.sent += 1,
                }
                if confirmed.status != Status::Sent {
                    let nanos = u64::try_from((self.last - due).as_nanos()).unwrap_or(u64::MAX);
                    self.latency.saturating_record(nanos);
                }
            }
            Err(error) => {
                self.failed += 1;
                self.first_failure.get_or_insert(error);
            }
        }
    }

    fn report(&self, global: &Global, qos: Qos) -> Result<(), Failure> {
        let done = self.stored + self.duplicate + self.sent;
        let rate = done as f64 / self.took.as_secs_f64().max(1e-9);
        let nanos = |quantile| self.latency.value_at_quantile(quantile);
        if global.json {
            let latency = (!self.latency.is_empty())
                .then(|| json!({ "p50_ns": nanos(0.5), "p99_ns": nanos(0.99), "max_ns": self.latency.max() }));
            print(&format!(
                "{}\n",
                json!({
                    "stored": self.stored, "duplicate": self.duplicate, "sent": self.sent, "failed": self.failed,
                    "seconds": self.took.as_secs_f64(), "per_second": rate, "latency": latency,
                })
            ))?;
        } else {
            let what = if qos == Qos::AtMostOnce { "sent" } else { "confirmed" };
            let mut line =
                format!("{done} {what} in {:.3} s, {} a second", self.took.as_secs_f64(), values::short(rate));
            if self.duplicate > 0 {
                line.push_str(&format!(", {} of them duplicates", self.duplicate));
            }
            if !self.latency.is_empty() {
                let show = |nanos: u64| values::short_seconds(nanos as f64 / 1e9);
                let (p50, p99, max) = (show(nanos(0.5)), show(nanos(0.99)), show(self.latency.max()));
                line.push_str(&format!("; latency p50 {p50}, p99 {p99}, max {max}"));
            }
            print(&format!("{line}\n"))?;
        }
        match &self.first_failure {
            None => Ok(()),
            Some(error) => {
                Err(Failure::new(format!("{} messages are not confirmed; the first one: {error}", self.failed)))
            }
        }
    }
}
