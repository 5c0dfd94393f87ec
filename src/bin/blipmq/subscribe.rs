//! `blipmq sub`: messages to standard output.

use std::time::Duration;

use blipmq::client::{Delivery, Qos, Reject, Start, Subscription};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, BufWriter, Lines, Stdin, Stdout};
use tokio::time::Instant;

use crate::Global;
use crate::connect::connect;
use crate::failure::Failure;
use crate::values;

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  blipmq sub orders                              what is published from now on, one message a line
  blipmq sub orders --durable billing            as the consumer `billing`, which misses nothing while it is away
  blipmq sub orders --durable billing --start earliest
                                                 and begins with what other subscriptions still keep
  blipmq sub orders --count 1 --json             one message with its headers, for a program
  blipmq sub orders.dlq --durable dead-letters --ack none --idle 1s
                                                 look at dead letters without taking them
  blipmq sub orders --durable billing --ack manual
                                                 decide about each: ack, requeue, requeue 5s, reject

Ctrl-C detaches: a durable subscription keeps collecting, and gets back what was not acknowledged.")]
pub struct Args {
    topic: String,
    /// Name of a durable subscription, made if need be; without, one that ends with this program.
    #[arg(long, value_name = "NAME")]
    durable: Option<String>,
    /// Stop after this many messages.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Stop when nothing has arrived for this long, as in 500ms or 10s.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    idle: Option<Duration>,
    /// Most messages that may be unacknowledged.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    credit: u32,
    /// 0: at most once; 1: at least once.
    #[arg(long, default_value = "1", value_parser = values::qos)]
    qos: Qos,
    /// When messages are acknowledged.
    #[arg(long, value_enum, default_value_t = Ack::Auto)]
    ack: Ack,
    /// Where a subscription that does not exist yet begins.
    #[arg(long, value_enum, default_value_t = From::New)]
    start: From,
    /// Payloads as they are, without a line break after each.
    #[arg(long, conflicts_with = "json")]
    raw: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Ack {
    /// Never: they are given back at the end. Shows at most --credit messages.
    None,
    /// When they are printed.
    Auto,
    /// As standard input says after each: ack, requeue [TIME] or reject.
    Manual,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum From {
    New,
    Earliest,
}

/// Messages printed before output is flushed and acknowledgements leave.
const BATCH_MAX: usize = 256;

pub async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let client = connect(global).await?;
    let start = if args.start == From::New { Start::New } else { Start::Earliest };
    let mut subscribe = client.subscribe(&args.topic).qos(args.qos).credit(args.credit).start(start);
    if let Some(name) = &args.durable {
        subscribe = subscribe.durable(name.clone());
    }
    let subscription = subscribe.open().await?;
    if subscription.backlog() > 0 {
        eprintln!("{} messages are waiting", subscription.backlog());
    }
    let mut reading = Reading::new(global, &args, subscription);
    let done = tokio::select! {
        done = reading.run() => done,
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(Failure::from),
    };
    reading.end(done).await?;
    client.close().await;
    Ok(())
}

struct Reading<'a> {
    args: &'a Args,
    json: bool,
    subscription: Subscription,
    out: BufWriter<Stdout>,
    answers: Lines<BufReader<Stdin>>,
    messages: u64,
    bytes: u64,
    begin: Instant,
    /// `--ack none`: kept, so that they are given back when the subscription is left.
    unanswered: Vec<Delivery>,
}

impl<'a> Reading<'a> {
    fn new(global: &Global, args: &'a Args, subscription: Subscription) -> Reading<'a> {
        Reading {
            args,
            json: global.json,
            subscription,
            out: BufWriter::new(tokio::io::stdout()),
            answers: BufReader::new(tokio::io::stdin()).lines(),
            messages: 0,
            bytes: 0,
            begin: Instant::now(),
            unanswered: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<(), Failure> {
        let batch_max = if self.args.ack == Ack::Manual { 1 } else { BATCH_MAX };
        while !self.is_enough() {
            let next = match self.args.idle {
                Some(idle) => match tokio::time::timeout(idle, self.subscription.next()).await {
                    Ok(next) => next,
                    Err(_) => return Ok(()),
                },
                None => self.subscription.next().await,
            };
            let Some(first) = next else {
                return Err(match self.subscription.error() {
                    Some(error) => error.into(),
                    None => Failure::new("the subscription ended"),
                });
            };
            let mut batch = Vec::new();
            let mut next = Some(first);
            while let Some(delivery) = next {
                self.show(&delivery).await?;
                batch.push(delivery);
                next = if batch.len() < batch_max && !self.is_enough() { self.subscription.try_next() } else { None };
            }
            self.out.flush().await?;
            for delivery in batch {
                if !self.answer(delivery).await? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn is_enough(&self) -> bool {
        self.args.count.is_some_and(|count| self.messages >= count)
    }

    async fn show(&mut self, delivery: &Delivery) -> Result<(), Failure> {
        if self.json {
            self.out.write_all(to_json(delivery).to_string().as_bytes()).await?;
        } else {
            self.out.write_all(delivery.payload_slice()).await?;
        }
        if !self.args.raw {
            self.out.write_all(b"\n").await?;
        }
        self.messages += 1;
        self.bytes += delivery.payload_slice().len() as u64;
        Ok(())
    }

    /// Says what is to become of it. `false`: standard input has ended.
    async fn answer(&mut self, delivery: Delivery) -> Result<bool, Failure> {
        match self.args.ack {
            Ack::Auto => delivery.ack(),
            Ack::None => {
                if delivery.qos() == Qos::AtLeastOnce {
                    self.unanswered.push(delivery);
                }
            }
            Ack::Manual if delivery.qos() == Qos::AtMostOnce => {}
            Ack::Manual => loop {
                eprint!("attempt {}: ack, requeue [TIME] or reject? ", delivery.attempt());
                let Some(line) = self.answers.next_line().await? else { return Ok(false) };
                match parse_answer(&line) {
                    Ok(None) => delivery.ack(),
                    Ok(Some(reject)) => delivery.reject(reject),
                    Err(problem) => {
                        eprintln!("{problem}");
                        continue;
                    }
                }
                break;
            },
        }
        Ok(true)
    }

    /// Leaves, and says what was done.
    async fn end(mut self, done: Result<(), Failure>) -> Result<(), Failure> {
        let Reading { messages, bytes, begin, .. } = self;
        let flushed = self.out.flush().await;
        let dropped = self.subscription.dropped();
        let kept = match &self.args.durable {
            Some(name) => format!("; `{name}` keeps collecting"),
            None => String::new(),
        };
        let left = if done.is_ok() { self.subscription.detach().await } else { Ok(()) };
        drop(self.unanswered);
        if self.json {
            // The messages are the output; nothing else may be among them.
        } else {
            let seconds = begin.elapsed().as_secs_f64();
            let lost = if dropped > 0 { format!(", {dropped} dropped here") } else { String::new() };
            eprintln!("{messages} messages, {bytes} bytes in {seconds:.1} s{lost}{kept}");
        }
        match flushed {
            // Whoever read the output has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(()) => {}
        }
        done?;
        Ok(left?)
    }
}

/// `None`: acknowledge.
fn parse_answer(line: &str) -> Result<Option<Reject>, String> {
    let mut words = line.split_whitespace();
    let answer = match (words.next(), words.next()) {
        (Some("ack" | "a"), None) => None,
        (Some("requeue" | "r"), None) => Some(Reject::Requeue),
        (Some("requeue" | "r"), Some(delay)) => Some(Reject::RequeueAfter(values::duration(delay)?)),
        (Some("reject" | "dead"), None) => Some(Reject::DeadLetter),
        _ => return Err(format!("`{line}` is none of: ack, requeue, requeue 5s, reject")),
    };
    Ok(answer)
}

/// Everything about a delivery. Bytes that are no text are in base64, under a name that says so.
pub fn to_json(delivery: &Delivery) -> Value {
    let mut object = Map::new();
    object.insert("topic".into(), delivery.topic().into());
    object.insert("tag".into(), delivery.tag().0.into());
    object.insert("qos".into(), (delivery.qos() as u8).into());
    object.insert("attempt".into(), delivery.attempt().into());
    object.insert("redelivered".into(), delivery.redelivered().into());
    object.insert("published_ms".into(), delivery.published_ms().into());
    object.insert("priority".into(), delivery.priority().into());
    if let Some(id) = delivery.message_id() {
        values::put_bytes(&mut object, "message_id", id);
    }
    if let Some(topic) = delivery.reply_to() {
        object.insert("reply_to".into(), topic.into());
    }
    let headers = delivery.headers().map(|(key, value)| {
        let mut header = Map::new();
        header.insert("key".into(), key.into());
        values::put_bytes(&mut header, "value", value);
        Value::from(header)
    });
    object.insert("headers".into(), json!(headers.collect::<Vec<_>>()));
    values::put_bytes(&mut object, "payload", delivery.payload_slice());
    object.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_people_type_them() {
        assert_eq!(parse_answer(" ack "), Ok(None));
        assert_eq!(parse_answer("requeue"), Ok(Some(Reject::Requeue)));
        assert_eq!(parse_answer("r 5s"), Ok(Some(Reject::RequeueAfter(Duration::from_secs(5)))));
        assert_eq!(parse_answer("reject"), Ok(Some(Reject::DeadLetter)));
        assert!(parse_answer("").is_err() && parse_answer("ack now").is_err() && parse_answer("requeue 5").is_err());
    }
}
