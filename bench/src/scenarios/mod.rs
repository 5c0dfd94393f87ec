//! One file per kind of row in RESULTS.md. Each starts its own broker on an empty store, and fails unless everything it
//! sent arrived once and in order.

pub mod cores;
pub mod durable_rate;
pub mod durable_saturation;
pub mod idle;
pub mod memory;
pub mod recovery;
pub mod v1;

use std::time::Duration;

use crate::broker::{Broker, Setup, machine_cpu_seconds};
use crate::load::{self, Pace, Plan};
use crate::report::{Values, add_latency};
use crate::wire::{Consumer, Link, Messages, Publisher, Subscription};
use crate::{Cpus, Result, floors};

/// What every scenario is given.
pub struct Bench {
    pub setup: Setup,
    pub cpus: Cpus,
    pub warmup: Duration,
    pub measure: Duration,
}

type Measurement = dyn Fn(&Bench) -> Result<Values>;

/// A named measurement; run once per repeat.
pub struct Scenario {
    pub name: String,
    pub run: Box<Measurement>,
}

impl Scenario {
    pub fn new(name: impl Into<String>, run: impl Fn(&Bench) -> Result<Values> + 'static) -> Scenario {
        Scenario { name: name.into(), run: Box::new(run) }
    }
}

/// The scenarios of `bench quick`, in the order of the table.
pub fn quick() -> Vec<Scenario> {
    let mut scenarios = durable_rate::scenarios();
    scenarios.extend(durable_saturation::scenarios());
    scenarios.extend(memory::scenarios());
    scenarios.extend(idle::scenarios());
    scenarios
}

const TOPIC: &str = "bench/one-to-one";
/// Deliveries the consumer lets the broker have unacknowledged.
const CREDIT: u32 = 16_384;
/// Silence after which what has not arrived never will.
const PATIENCE: Duration = Duration::from_secs(5);

/// May messages be lost without failing the scenario?
#[derive(Clone, Copy, PartialEq)]
enum Losses {
    Forbidden,
    Counted,
}

/// One run of the load generator against a broker of its own.
struct OneToOne {
    qos: u8,
    bytes: usize,
    pace: Pace,
    losses: Losses,
}

impl OneToOne {
    fn run(&self, bench: &Bench) -> Result<Values> {
        let broker = Broker::start(&bench.setup)?;
        let publisher = Link::login(broker.port)?.0;
        let consumer = Link::login(broker.port)?.0;
        self.run_on(bench, &broker, publisher, consumer)
    }

    /// QoS1 is confirmed and has a durable subscription; QoS0 has neither.
    fn run_on(&self, bench: &Bench, broker: &Broker, publisher: Link, consumer: Link) -> Result<Values> {
        let durable = self.qos == 1;
        let subscription =
            Subscription { topic: TOPIC, qos: self.qos, credit: CREDIT, durable: durable.then_some("bench") };
        let consumer = Consumer::subscribe(consumer, subscription)?;
        let messages = Messages { topic: TOPIC, qos: self.qos, bytes: self.bytes, confirm: durable };
        let publisher = Publisher::open(publisher, messages)?;
        self.measure(bench, broker, publisher, consumer)
    }

    fn measure(
        &self,
        bench: &Bench,
        broker: &Broker,
        mut publisher: Publisher,
        mut consumer: Consumer,
    ) -> Result<Values> {
        let plan = Plan {
            pace: self.pace,
            confirm: self.qos == 1,
            warmup: bench.warmup,
            measure: bench.measure,
            patience: if self.losses == Losses::Counted { Duration::from_millis(500) } else { PATIENCE },
        };
        let counters = broker.metrics();
        let machine = machine_cpu_seconds()?;
        let cpu = broker.cpu_seconds()?;
        let outcome = floors::on_cpu(bench.cpus.load, || {
            load::exact_timers()?;
            load::run(&plan, &mut publisher, &mut consumer)
        })??;
        let cpu = broker.cpu_seconds()? - cpu;
        let machine = machine_cpu_seconds()? - machine;
        let counters_after = broker.metrics();
        let grown = |name: &str| Some(counters_after.get(name)? - counters.get(name).copied().unwrap_or(0.0));

        if outcome.disordered > 0 {
            return Err(
                format!("{} of {} messages came twice or out of order", outcome.disordered, outcome.sent).into()
            );
        }
        if outcome.missing > 0 && self.losses == Losses::Forbidden {
            return Err(format!("{} of {} messages never arrived", outcome.missing, outcome.sent).into());
        }

        let messages = outcome.sent as f64;
        let mut values = Values::new();
        let mut insert = |name: &str, value: f64| values.insert(name.to_string(), value);
        if let Pace::Rate(rate) = self.pace {
            insert("offered_per_s", rate as f64);
        }
        if plan.confirm {
            insert("confirmed_per_s", outcome.confirmed_per_s);
        }
        insert("received_per_s", outcome.received_per_s);
        insert("sent", messages);
        insert("missing", outcome.missing as f64);
        insert("cpu_s_per_million", cpu / messages * 1e6);
        let elapsed = outcome.elapsed.as_secs_f64();
        let generator = outcome.generator_cpu.as_secs_f64();
        insert("broker_cpu_percent", cpu / elapsed * 100.0);
        insert("generator_cpu_percent", generator / elapsed * 100.0);
        insert("other_cpu_percent", (machine - cpu - generator).max(0.0) / elapsed * 100.0);
        insert("peak_rss_mib", broker.peak_rss_mib()?);
        let records = grown("wal_bytes_total").unwrap_or(0.0);
        if records > 0.0 {
            let padding = grown("blipmq_wal_padding_bytes_total").unwrap_or(0.0);
            insert("log_bytes_per_message", (records + padding) / messages);
        }
        for (name, counter) in
            [("messages_per_write", "blipmq_wal_batches_total"), ("messages_per_sync", "blipmq_wal_syncs_total")]
        {
            if let Some(count) = grown(counter).filter(|count| *count > 0.0) {
                insert(name, messages / count);
            }
        }
        if plan.confirm {
            add_latency(&mut values, "confirm", &outcome.confirm);
        }
        // In a flood a latency only says how long the queue is.
        if !matches!(self.pace, Pace::Flood) {
            add_latency(&mut values, "deliver", &outcome.deliver);
        }
        if matches!(self.pace, Pace::Rate(_)) {
            add_latency(&mut values, "late", &outcome.late);
        }
        Ok(values)
    }
}
