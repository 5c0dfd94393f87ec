//! The measurement of BlipMQ v1, with its flags and its lines, over the v1 protocol: publish, POLL, ACK.
//!
//! A v1 consumer asks for each message, so this measures round trips. The publishers stay a bounded number of messages ahead
//! of the slowest consumer, since v1 confirms nothing and QoS0 would be dropped.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;

use super::Bench;
use crate::Result;
use crate::broker::{Broker, Setup};
use crate::load::histogram;
use crate::wire::{Link, V1_ACK, V1_POLL, V1_PUBLISH, V1_SUBSCRIBE, frame, put_string, u64_at};

const TOPIC: &str = "bench";
/// Messages the publishers may be ahead of the slowest consumer. Latency is mostly this queue: more would only lengthen it.
const AHEAD_MAX: u64 = 32;
const STEP: Duration = Duration::from_micros(50);
/// A POLL is given up after this and sent again; the broker keeps the newest.
const POLL_WAIT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Mode {
    /// QoS0.
    Qos0,
    /// QoS1, log not synced.
    Qos1,
    /// QoS1, log synced before anything is delivered.
    Durable,
    /// As --qos and --use-wal say.
    Scaled,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Args)]
pub struct Options {
    /// The measurement of BlipMQ v1, over its protocol
    #[arg(long)]
    pub mode: Option<Mode>,
    #[arg(long, default_value_t = 1)]
    pub publishers: u64,
    #[arg(long, default_value_t = 1)]
    pub subscribers: u64,
    /// Bytes; the first eight are a time stamp
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(8..=16_000_000))]
    pub message_size: u64,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub qos: u8,
    /// on: fsync_policy always; off: none
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub use_wal: Switch,
    #[arg(long, default_value_t = 10)]
    pub duration_secs: u64,
    /// 0: as many as go into the duration
    #[arg(long, default_value_t = 0)]
    pub total_messages: u64,
}

/// What the threads of one run share.
struct Shared {
    started: Instant,
    deadline: Instant,
    /// Messages the publishers have claimed.
    claimed: AtomicU64,
    limit: u64,
    /// Of each consumer.
    received: Vec<AtomicU64>,
    publishing_ended: AtomicBool,
    latency: Mutex<Histogram<u64>>,
}

pub fn run(bench: &Bench, mode: Mode, options: &Options) -> Result<()> {
    let (qos, synced) = match mode {
        Mode::Qos0 => (0, false),
        Mode::Qos1 => (1, false),
        Mode::Durable => (1, true),
        Mode::Scaled => (options.qos, options.use_wal == Switch::On),
    };
    let policy = if synced { "always" } else { "none" };
    let broker = Broker::start(&Setup { fsync_policy: policy, ..bench.setup.clone() })?;
    let subscribers: Vec<(Link, u64)> =
        (0..options.subscribers).map(|_| subscribe(broker.port, qos)).collect::<Result<_>>()?;
    let publishers: Vec<Link> = (0..options.publishers).map(|_| Link::login_v1(broker.port)).collect::<Result<_>>()?;

    let started = Instant::now();
    let shared = Shared {
        started,
        deadline: started + Duration::from_secs(options.duration_secs),
        claimed: AtomicU64::new(0),
        limit: if options.total_messages == 0 { u64::MAX } else { options.total_messages },
        received: subscribers.iter().map(|_| AtomicU64::new(0)).collect(),
        publishing_ended: AtomicBool::new(false),
        latency: Mutex::new(histogram()),
    };
    std::thread::scope(|scope| -> Result<()> {
        let shared = &shared;
        let consumers: Vec<_> = subscribers
            .into_iter()
            .enumerate()
            .map(|(number, (link, sub))| scope.spawn(move || consume(shared, number, link, sub, qos)))
            .collect();
        let publishers: Vec<_> = publishers
            .into_iter()
            .map(|link| scope.spawn(move || publish(shared, link, qos, options.message_size as usize)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<Result<()>>| {
            thread.join().unwrap_or_else(|_| Err("a thread of the bench panicked".into()))
        };
        let published: Result<()> = publishers.into_iter().try_for_each(join);
        shared.publishing_ended.store(true, Ordering::Release);
        let consumed: Result<()> = consumers.into_iter().try_for_each(join);
        published.and(consumed)
    })?;
    let elapsed = started.elapsed();

    let sent = shared.claimed.load(Ordering::Relaxed);
    let received: u64 = shared.received.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    let latency = shared.latency.into_inner().map_err(|_| "a thread of the bench panicked")?;
    let ms = |q: f64| latency.value_at_quantile(q) as f64 / 1e6;
    println!("fsync policy: {policy}, qos: {qos}, message size: {} B", options.message_size);
    println!("messages sent: {sent}");
    println!("messages received: {received}");
    println!("elapsed: {:.3} s", elapsed.as_secs_f64());
    println!("throughput: {:.0} msg/s", received as f64 / elapsed.as_secs_f64());
    println!("p50: {:.3} ms", ms(0.5));
    println!("p95: {:.3} ms", ms(0.95));
    println!("p99: {:.3} ms", ms(0.99));
    let expected = sent * options.subscribers;
    if received != expected {
        return Err(format!("{received} of {expected} messages arrived").into());
    }
    Ok(())
}

fn subscribe(port: u16, qos: u8) -> Result<(Link, u64)> {
    let mut link = Link::login_v1(port)?;
    let answer = link.request(V1_SUBSCRIBE, V1_ACK, |out| {
        put_string(out, TOPIC);
        out.push(qos);
    })?;
    let sub = u64_at(link.payload(&answer), 0)?;
    link.set_read_timeout(POLL_WAIT)?;
    Ok((link, sub))
}

fn publish(shared: &Shared, mut link: Link, qos: u8, bytes: usize) -> Result<()> {
    let body = vec![b'x'; bytes - 8];
    while Instant::now() < shared.deadline {
        let slowest = shared.received.iter().map(|count| count.load(Ordering::Acquire)).min();
        let claim = |claimed: u64| {
            let room = slowest.is_none_or(|slowest| claimed < slowest + AHEAD_MAX);
            (claimed < shared.limit && room).then_some(claimed + 1)
        };
        if shared.claimed.fetch_update(Ordering::AcqRel, Ordering::Acquire, claim).is_err() {
            link.flush()?;
            if shared.claimed.load(Ordering::Acquire) >= shared.limit {
                return Ok(());
            }
            std::thread::sleep(STEP);
            continue;
        }
        let now = shared.started.elapsed().as_nanos() as u64;
        frame(&mut link.out, V1_PUBLISH, 0, |out| {
            out.push(qos);
            put_string(out, TOPIC);
            out.extend_from_slice(&now.to_be_bytes());
            out.extend_from_slice(&body);
        });
        link.flush()?;
    }
    Ok(())
}

fn consume(shared: &Shared, number: usize, mut link: Link, sub: u64, qos: u8) -> Result<()> {
    let mut latency = histogram();
    let mut last_message = Instant::now();
    let mut count = 0;
    loop {
        let ended = shared.publishing_ended.load(Ordering::Acquire);
        if ended && count >= shared.claimed.load(Ordering::Acquire) {
            break;
        }
        if ended && last_message.elapsed() > super::PATIENCE {
            break;
        }
        // Behind the ACK of the message before, in one write.
        frame(&mut link.out, V1_POLL, 0, |out| out.extend_from_slice(&sub.to_be_bytes()));
        link.flush()?;
        let delivery = loop {
            if let Some(frame) = link.next()? {
                break Some(frame);
            }
            if !link.fill()? {
                break None;
            }
        };
        let Some(delivery) = delivery else { continue };
        if delivery.kind != V1_PUBLISH {
            return Err(link.unexpected(&delivery));
        }
        // u8 qos | string topic | message
        let sent_at = u64_at(link.payload(&delivery), 3 + TOPIC.len())?;
        let now = shared.started.elapsed().as_nanos() as u64;
        latency.saturating_record(now.saturating_sub(sent_at));
        if qos == 1 {
            frame(&mut link.out, V1_ACK, delivery.cid, |out| out.extend_from_slice(&sub.to_be_bytes()));
        }
        count += 1;
        last_message = Instant::now();
        shared.received[number].store(count, Ordering::Release);
    }
    link.flush()?;
    let mut all = shared.latency.lock().map_err(|_| "another thread of the bench panicked")?;
    all.add(&latency)?;
    Ok(())
}
