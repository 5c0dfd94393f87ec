//! What one core counts, and how it reads as Prometheus text.
//!
//! Owns: every counter's name, meaning and type, each said once, in the table below. Never: an atomic, a clock, a
//! lock. A core counts in plain integers; whoever wants to know asks it for a copy (`driver::inspect`).
//!
//! Two sums hold over all cores at any time at which nothing is on its way between them; `Ledger` checks them:
//!   publishes_received = published + publishes_rejected + publishes_duplicate
//!   queue_recovered + queue_in = queue_out + lost, over all causes + queue_waiting

use std::fmt::Write as _;
use std::marker::PhantomData;

use crate::types::{CoreId, Qos};

/// Names for the parts of a counter that is split by something.
pub trait Label: Copy {
    const LABEL: &'static str;
    const VALUES: &'static [&'static str];
    fn index(self) -> usize;
}

macro_rules! labels {
    (
        $(#[$doc:meta])*
        $name:ident as $label:literal { $($(#[$variant_doc:meta])* $variant:ident = $value:literal,)* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl Label for $name {
            const LABEL: &'static str = $label;
            const VALUES: &'static [&'static str] = &[$($value,)*];

            fn index(self) -> usize {
                self as usize
            }
        }

        const _: () = assert!($name::VALUES.len() <= LABELS_MAX);
    };
}

/// Parts a split counter may have.
const LABELS_MAX: usize = 12;
/// Different codes one `ByCode` tells apart; what comes later counts as code 0.
const CODES_MAX: usize = 32;

impl Label for Qos {
    const LABEL: &'static str = "qos";
    const VALUES: &'static [&'static str] = &["0", "1"];

    fn index(self) -> usize {
        self as usize
    }
}

labels! {
    /// How a message left a subscription's queue without having been delivered (QoS0) or acknowledged (QoS1).
    Loss as "cause" {
        /// Its TTL had passed.
        Expired = "expired",
        /// The queue was full and the policy is to drop the oldest.
        DroppedOldest = "dropped_oldest",
        /// The queue was full and the policy is to drop the newest.
        DroppedNew = "dropped_new",
        /// QoS0, and its consumer went away.
        DroppedDetached = "dropped_detached",
        /// Moved to the dead-letter topic: a queue there took it in.
        DeadLettered = "dead_lettered",
        /// Failed too often or was rejected, and there is no dead-letter topic.
        RetriesExhausted = "retries_exhausted",
        /// Its subscription or topic was deleted.
        Purged = "purged",
    }
}

labels! {
    /// Why a connection ended.
    Closed as "reason" {
        /// The client closed it.
        Client = "client",
        /// It broke the framing, or an error that ends a v2 connection.
        Protocol = "protocol",
        /// Not logged in in time.
        AuthDeadline = "auth_deadline",
        /// Nothing was heard from it for too long.
        Silent = "silent",
        /// Its outbox grew beyond the limit.
        TooSlow = "too_slow",
        /// It began a frame and did not go on with it.
        SlowFrame = "slow_frame",
        /// Too many others had not logged in when it came; `connections_refused_total` has it, too.
        Refused = "refused",
        /// The socket failed.
        Socket = "socket",
        /// The broker is stopping.
        Shutdown = "shutdown",
        /// Our own mistake.
        Internal = "internal",
    }
}

labels! {
    /// Why a connection was not accepted.
    Refused as "reason" {
        /// As many connections as this core may have.
        Connections = "connections",
        /// As many that have not logged in as this core, or one address, may have.
        Unauthenticated = "unauthenticated",
        /// The process has no file descriptor left.
        Descriptors = "descriptors",
        /// The broker is stopping.
        Draining = "draining",
    }
}

labels! {
    /// To and from the other cores.
    Direction as "direction" {
        Sent = "sent",
        Received = "received",
    }
}

/// A counter split by `L`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct By<L> {
    counts: [u64; LABELS_MAX],
    label: PhantomData<L>,
}

impl<L> Default for By<L> {
    fn default() -> By<L> {
        By { counts: [0; LABELS_MAX], label: PhantomData }
    }
}

impl<L: Label> By<L> {
    pub fn add(&mut self, part: L, n: u64) {
        self.counts[part.index()] += n;
    }

    pub fn get(&self, part: L) -> u64 {
        self.counts[part.index()]
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A counter split by the numeric code a client is answered with. In order of the code, at most `CODES_MAX` of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ByCode(Vec<(u16, u64)>);

impl ByCode {
    pub fn add(&mut self, code: u16, n: u64) {
        match self.0.binary_search_by_key(&code, |(code, _)| *code) {
            Ok(at) => self.0[at].1 += n,
            Err(at) if self.0.len() < CODES_MAX - 1 || code == 0 => self.0.insert(at, (code, n)),
            Err(_) => self.add(0, n),
        }
    }

    pub fn get(&self, code: u16) -> u64 {
        self.0.binary_search_by_key(&code, |(code, _)| *code).map_or(0, |at| self.0[at].1)
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, n)| n).sum()
    }
}

/// Where values lie, in buckets that grow with the value: four to each power of two, so a bound is at most a
/// quarter off.
///
/// Each bucket holds the values up to and including its bound and above the one before: 1, 2, 3, 4, 5, 6, 7, 8, 10,
/// 12, 14, 16, 20...
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    sum: u64,
}

/// Up to 2^36: 68 s in nanoseconds. What is larger is only in the total.
const BUCKETS: usize = 4 * (36 - 1);

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: Box::new([0; BUCKETS]), count: 0, sum: 0 }
    }
}

impl Histogram {
    /// `value`: nanoseconds, or how many.
    pub fn record(&mut self, value: u64) {
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        if let Some(bucket) = self.counts.get_mut(bucket_of(value)) {
            *bucket += 1;
        }
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn sum(&self) -> u64 {
        self.sum
    }
}

fn bucket_of(value: u64) -> usize {
    // A bound belongs to the bucket below it, hence the one less.
    let below = value.saturating_sub(1);
    if below < 4 {
        return below as usize;
    }
    let power = below.ilog2() as usize;
    let quarter = (below >> (power - 2)) as usize & 3;
    4 * (power - 1) + quarter
}

/// The largest value in the bucket.
fn bound_of(bucket: usize) -> u64 {
    match bucket {
        0..4 => bucket as u64 + 1,
        _ => (bucket as u64 % 4 + 5) << (bucket / 4 - 1),
    }
}

/// What a metric is, for `# TYPE` and for its values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Counter,
    Gauge,
    /// A histogram of nanoseconds, shown in seconds as is the custom.
    Seconds,
    /// A histogram of plain numbers.
    Sizes,
}

impl Kind {
    fn prometheus(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Seconds | Kind::Sizes => "histogram",
        }
    }

    /// The bounds that are shown: from 4 us to 17 s, and from 1 to a million.
    fn shows(self, bound: u64) -> bool {
        match self {
            Kind::Sizes => bound <= 1 << 20,
            _ => (1 << 12..=1 << 34).contains(&bound),
        }
    }

    fn write(self, value: u64, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Kind::Seconds => write!(out, "{}", value as f64 / 1e9),
            _ => write!(out, "{value}"),
        };
    }
}

/// A field of `CoreMetrics`: knows how to be added up and how to be shown.
trait Value {
    fn merge(&mut self, other: &Self);
    fn render(&self, family: &Family, core: CoreId, out: &mut String);
}

fn line(
    family: &Family,
    suffix: &str,
    core: CoreId,
    label: Option<(&str, &str)>,
    value: u64,
    kind: Kind,
    out: &mut String,
) {
    let _ = write!(out, "blipmq_{}{suffix}{{core=\"{}\"", family.name, core.0);
    if let Some((label, part)) = label {
        let _ = write!(out, ",{label}=\"{part}\"");
    }
    out.push_str("} ");
    kind.write(value, out);
    out.push('\n');
}

impl Value for u64 {
    fn merge(&mut self, other: &u64) {
        *self += other;
    }

    fn render(&self, family: &Family, core: CoreId, out: &mut String) {
        line(family, "", core, None, *self, family.kind, out);
    }
}

impl<L: Label> Value for By<L> {
    fn merge(&mut self, other: &By<L>) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    fn render(&self, family: &Family, core: CoreId, out: &mut String) {
        for (part, n) in L::VALUES.iter().zip(&self.counts) {
            line(family, "", core, Some((L::LABEL, part)), *n, family.kind, out);
        }
    }
}

impl Value for ByCode {
    fn merge(&mut self, other: &ByCode) {
        for (code, n) in &other.0 {
            self.add(*code, *n);
        }
    }

    fn render(&self, family: &Family, core: CoreId, out: &mut String) {
        for (code, n) in &self.0 {
            line(family, "", core, Some(("code", &code.to_string())), *n, family.kind, out);
        }
    }
}

impl Value for Histogram {
    fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
    }

    fn render(&self, family: &Family, core: CoreId, out: &mut String) {
        let mut below = 0;
        let mut bound_text = String::new();
        for (bucket, n) in self.counts.iter().enumerate() {
            below += n;
            let bound = bound_of(bucket);
            if !family.kind.shows(bound) {
                continue;
            }
            bound_text.clear();
            family.kind.write(bound, &mut bound_text);
            line(family, "_bucket", core, Some(("le", &bound_text)), below, Kind::Counter, out);
        }
        line(family, "_bucket", core, Some(("le", "+Inf")), self.count, Kind::Counter, out);
        line(family, "_sum", core, None, self.sum, family.kind, out);
        line(family, "_count", core, None, self.count, Kind::Counter, out);
    }
}

/// One metric of every core: `blipmq_<name>{core="0"}`.
struct Family {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    render: fn(&CoreMetrics, &Family, CoreId, &mut String),
}

macro_rules! core_metrics {
    ($($field:ident: $type:ty, $name:literal, $kind:ident, $help:literal;)*) => {
        /// The counters of one core. Counters only grow; gauges are set to what is.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        pub struct CoreMetrics {
            $(#[doc = $help] pub $field: $type,)*
        }

        impl CoreMetrics {
            /// Adds another core's numbers to these.
            pub fn merge(&mut self, other: &CoreMetrics) {
                $(Value::merge(&mut self.$field, &other.$field);)*
            }
        }

        const FAMILIES: &[Family] = &[
            $(Family {
                name: $name,
                kind: Kind::$kind,
                help: $help,
                render: |metrics, family, core, out| Value::render(&metrics.$field, family, core, out),
            },)*
        ];
    };
}

core_metrics! {
    topics: u64, "topics", Gauge, "Topics that exist.";
    subscribers: u64, "subscribers", Gauge, "Subscriptions that exist, with or without a consumer.";
    inflight: u64, "messages_inflight", Gauge, "QoS1 deliveries that are not acknowledged yet.";
    expirations_waiting: u64, "expirations_waiting", Gauge, "Messages whose time to live is being watched.";
    retries_waiting: u64, "retries_waiting", Gauge, "Deliveries whose acknowledgement or retry delay is being watched.";

    publishes_received: By<Qos>, "publishes_received_total", Counter, "Publishes that clients asked for.";
    published: By<Qos>, "published_total", Counter, "Publishes that were accepted.";
    publishes_rejected: ByCode, "publishes_rejected_total", Counter,
        "Publishes that were refused, by the code of the answer.";
    publishes_duplicate: u64, "publishes_duplicate_total", Counter,
        "Publishes dropped because they were stored before.";
    publishes_unrouted: u64, "publishes_unrouted_total", Counter,
        "Accepted publishes to a topic without subscriptions.";
    requests_rejected: ByCode, "requests_rejected_total", Counter,
        "Other requests that were refused, by the code of the answer.";

    queue_recovered: u64, "queue_recovered_total", Counter, "Messages in queues when this run of the broker started.";
    queue_in: u64, "queue_in_total", Counter,
        "Messages put into a subscription's queue: one publish counts once per subscription.";
    queue_out: By<Qos>, "queue_out_total", Counter, "Messages done: QoS0 delivered, QoS1 acknowledged.";
    lost: By<Loss>, "queue_lost_total", Counter, "Messages that left a queue in any other way.";
    queue_waiting: u64, "queue_waiting", Gauge, "Messages in queues now, in-flight ones included.";
    queue_waiting_bytes: u64, "queue_waiting_bytes", Gauge, "Bytes of the log that messages in queues refer to.";

    delivered: By<Qos>, "delivered_total", Counter, "Deliveries handed to a connection, repeated ones included.";
    redelivered: u64, "redelivered_total", Counter, "Deliveries that were not the first of their message.";
    acked: u64, "acked_total", Counter, "Deliveries acknowledged.";
    acks_unknown: u64, "acks_unknown_total", Counter, "Acknowledgements of nothing that is in flight.";
    acked_unsynced: u64, "acked_unsynced", Gauge,
        "Confirmed publishes that are not synced yet: what a power loss could take.";

    connections: u64, "connections", Gauge, "Open connections.";
    connections_accepted: u64, "connections_accepted_total", Counter, "Connections accepted.";
    connections_refused: By<Refused>, "connections_refused_total", Counter, "Connections turned away as soon as they came.";
    connections_closed: By<Closed>, "connections_closed_total", Counter, "Connections that ended.";
    auth_failures: u64, "auth_failures_total", Counter, "Wrong API keys.";
    bytes_in: u64, "bytes_in_total", Counter, "Bytes read from clients.";
    bytes_out: u64, "bytes_out_total", Counter, "Bytes written to clients.";

    turns: u64, "turns_total", Counter, "Turns of the core's loop.";
    events: u64, "events_total", Counter, "Events the shard was told.";
    ring_batches: By<Direction>, "ring_batches_total", Counter, "Batches exchanged with other cores.";
    ring_messages: By<Direction>, "ring_messages_total", Counter, "Messages in those batches.";
    ring_full: u64, "ring_full_total", Counter, "Times a batch had to wait because a ring was full.";

    wal_appends: u64, "wal_appends_total", Counter, "Records appended to the log.";
    wal_bytes: u64, "wal_bytes_total", Counter, "Bytes of those records, their headers included.";
    wal_batches: u64, "wal_batches_total", Counter, "Writes to the log.";
    wal_padding_bytes: u64, "wal_padding_bytes_total", Counter, "Bytes written only to fill the last block of a batch.";
    wal_syncs: u64, "wal_syncs_total", Counter, "Syncs of the log.";
    segments_begun: u64, "segments_begun_total", Counter, "Segments this core began to write: one at its start, one at each rotation.";
    segments_recycled: u64, "segments_recycled_total", Counter,
        "Segments given out again after they were freed, in the whole store.";
    segments_free: u64, "segments_free", Gauge, "Segments ready to be written, in the whole store.";
    segments_live: u64, "segments_live", Gauge, "Segments in use, in the whole store.";
    no_space: u64, "no_space", Gauge, "1 while publishes are refused because the disk or its quota is full.";
    checkpoints: u64, "checkpoints_total", Counter, "Checkpoints written.";
    checkpoint_bytes: u64, "checkpoint_bytes", Gauge, "Size of the last checkpoint.";
    checkpoint_ms: u64, "checkpoint_ms", Gauge, "Milliseconds the last checkpoint took.";
    relocated_bytes: u64, "relocated_bytes_total", Counter,
        "Bytes of live messages moved so that a segment could be freed.";

    cache_bytes: u64, "cache_bytes", Gauge, "Bytes of recent messages kept in memory.";
    cache_hits: u64, "cache_hits_total", Counter, "Deliveries whose message was in memory.";
    cache_misses: u64, "cache_misses_total", Counter, "Deliveries whose message was read back from the log.";
    backlog_reads: u64, "backlog_reads_total", Counter, "Reads from the log to fetch such messages.";
    backlog_read_bytes: u64, "backlog_read_bytes_total", Counter, "Bytes of those reads.";

    recovery_truncated_bytes: u64, "recovery_truncated_bytes", Gauge,
        "Bytes cut off the log's tail by the last recovery.";
    recovery_truncated_records: u64, "recovery_truncated_records", Gauge,
        "Records cut off the log's tail by the last recovery.";
    recovery_truncated_frames: u64, "recovery_truncated_frames", Gauge,
        "Batches cut off the log's tail by the last recovery.";
    recovery_ms: u64, "recovery_ms", Gauge, "Milliseconds the last recovery took.";
    checkpoint_fallbacks: u64, "checkpoint_fallbacks", Gauge,
        "Checkpoints the last recovery found damaged and passed over.";

    publish_to_durable: Histogram, "publish_to_durable_seconds", Seconds,
        "From a publish read to what its policy calls durable.";
    publish_to_deliver: Histogram, "publish_to_deliver_seconds", Seconds,
        "From a publish read to its first delivery handed over.";
    batch_records: Histogram, "batch_records", Sizes, "Records in one write to the log.";
    sync_time: Histogram, "sync_seconds", Seconds, "Duration of one sync of the log.";
}

/// A metric under its v1 name: the sum over all cores.
struct V1 {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    read: fn(&CoreMetrics) -> u64,
}

/// V1.md B35, in its order.
const V1_METRICS: &[V1] = &[
    V1 { name: "topics", kind: Kind::Gauge, help: "Topics that exist.", read: |m| m.topics },
    V1 { name: "subscribers", kind: Kind::Gauge, help: "Subscriptions that exist.", read: |m| m.subscribers },
    V1 {
        name: "messages_published_total",
        kind: Kind::Counter,
        help: "Publishes that were accepted.",
        read: |m| m.published.total(),
    },
    V1 {
        name: "messages_delivered_total",
        kind: Kind::Counter,
        help: "Deliveries handed to a connection.",
        read: |m| m.delivered.total(),
    },
    V1 {
        name: "messages_inflight",
        kind: Kind::Gauge,
        help: "QoS1 deliveries not acknowledged yet.",
        read: |m| m.inflight,
    },
    V1 {
        name: "subscriber_expiration_heap_size",
        kind: Kind::Gauge,
        help: "Messages whose time to live is being watched.",
        read: |m| m.expirations_waiting,
    },
    V1 {
        name: "subscriber_retry_heap_size",
        kind: Kind::Gauge,
        help: "Deliveries whose retry is being watched.",
        read: |m| m.retries_waiting,
    },
    V1 {
        name: "wal_appends_total",
        kind: Kind::Counter,
        help: "Records appended to the log since the start.",
        read: |m| m.wal_appends,
    },
    V1 {
        name: "wal_bytes_total",
        kind: Kind::Counter,
        help: "Bytes of those records, their headers included.",
        read: |m| m.wal_bytes,
    },
];

/// Both sums of the module's head, as numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ledger {
    pub publishes_in: u64,
    pub publishes_accounted: u64,
    pub queue_in: u64,
    pub queue_out: u64,
    pub queue_lost: u64,
    pub queue_waiting: u64,
}

impl Ledger {
    /// Of the merged numbers of all cores: a message may enter on one core and leave on another.
    pub fn of(all: &CoreMetrics) -> Ledger {
        Ledger {
            publishes_in: all.publishes_received.total(),
            publishes_accounted: all.published.total() + all.publishes_rejected.total() + all.publishes_duplicate,
            queue_in: all.queue_recovered + all.queue_in,
            queue_out: all.queue_out.total(),
            queue_lost: all.lost.total(),
            queue_waiting: all.queue_waiting,
        }
    }

    pub fn balances(&self) -> bool {
        self.publishes_in == self.publishes_accounted
            && self.queue_in == self.queue_out + self.queue_lost + self.queue_waiting
    }
}

/// One core's last known numbers, and whether they are fresh.
pub struct Reading<'a> {
    pub core: CoreId,
    /// `None`: it never answered.
    pub metrics: Option<&'a CoreMetrics>,
    /// It answered this time.
    pub up: bool,
}

/// Prometheus text: first v1's nine names, summed over the cores, then every core's own.
pub fn render(readings: &[Reading<'_>]) -> String {
    let mut all = CoreMetrics::default();
    for metrics in readings.iter().filter_map(|reading| reading.metrics) {
        all.merge(metrics);
    }
    let mut out = String::new();
    for v1 in V1_METRICS {
        head(v1.name, v1.kind, v1.help, &mut out);
        let _ = writeln!(out, "{} {}", v1.name, (v1.read)(&all));
    }
    head("blipmq_core_up", Kind::Gauge, "Whether the core answered; what else it shows may be old if not.", &mut out);
    for reading in readings {
        let _ = writeln!(out, "blipmq_core_up{{core=\"{}\"}} {}", reading.core.0, u8::from(reading.up));
    }
    for family in FAMILIES {
        head(&format!("blipmq_{}", family.name), family.kind, family.help, &mut out);
        for reading in readings {
            if let Some(metrics) = reading.metrics {
                (family.render)(metrics, family, reading.core, &mut out);
            }
        }
    }
    out
}

fn head(name: &str, kind: Kind, help: &str, out: &mut String) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", kind.prometheus());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of the one line that starts with `series` and a space.
    fn value(text: &str, series: &str) -> String {
        let mut found = text.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let value = found.next().unwrap_or_else(|| panic!("no {series} in\n{text}"));
        assert_eq!(found.next(), None, "{series} twice");
        value.to_string()
    }

    fn two_cores() -> [CoreMetrics; 2] {
        let mut a = CoreMetrics { topics: 3, wal_appends: 10, wal_bytes: 1000, ..CoreMetrics::default() };
        a.published.add(Qos::AtMostOnce, 5);
        a.published.add(Qos::AtLeastOnce, 7);
        a.lost.add(Loss::Expired, 2);
        a.publishes_rejected.add(401, 1);
        a.publishes_rejected.add(500, 4);
        a.connections_closed.add(Closed::TooSlow, 1);
        a.batch_records.record(1);
        a.batch_records.record(3);
        a.sync_time.record(48_000);
        let mut b = CoreMetrics { topics: 4, wal_appends: 1, inflight: 9, ..CoreMetrics::default() };
        b.published.add(Qos::AtLeastOnce, 1);
        b.delivered.add(Qos::AtLeastOnce, 6);
        [a, b]
    }

    fn rendered(cores: &[CoreMetrics]) -> String {
        let readings: Vec<Reading<'_>> = (0..)
            .zip(cores)
            .map(|(core, metrics)| Reading { core: CoreId(core), metrics: Some(metrics), up: true })
            .collect();
        render(&readings)
    }

    #[test]
    fn v1_names_come_first_in_order_without_labels() {
        let text = rendered(&two_cores());
        let first: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).take(9).collect();
        let expected = [
            "topics 7",
            "subscribers 0",
            "messages_published_total 13",
            "messages_delivered_total 6",
            "messages_inflight 9",
            "subscriber_expiration_heap_size 0",
            "subscriber_retry_heap_size 0",
            "wal_appends_total 11",
            "wal_bytes_total 1000",
        ];
        assert_eq!(first, expected);
        let lines: Vec<&str> = text.lines().take(3).collect();
        assert_eq!(lines, ["# HELP topics Topics that exist.", "# TYPE topics gauge", "topics 7"]);
    }

    /// Reads the text as Prometheus would: every sample under its own HELP and TYPE, no name and no series twice.
    #[test]
    fn every_line_is_well_formed() {
        let text = rendered(&two_cores());
        let mut seen = std::collections::BTreeSet::new();
        let mut names = std::collections::BTreeSet::new();
        let (mut help, mut family) = (String::new(), (String::new(), String::new()));
        let is_name = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').unwrap();
                assert!(is_name(name) && words.len() > 5, "{line}");
                assert!(names.insert(name.to_string()), "{name} announced twice");
                help = name.to_string();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name, help);
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                family = (name.to_string(), kind.to_string());
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(seen.insert(series.to_string()), "{series} twice");
                assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{line}");
                let name = series.split('{').next().unwrap();
                let base = if family.1 == "histogram" {
                    ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).expect(line)
                } else {
                    name
                };
                assert_eq!(base, family.0, "{line}");
                assert_eq!(family.1 == "counter", base.ends_with("_total"), "only counters end in _total: {line}");
                if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
                    assert!(name.starts_with("blipmq_"), "{line}");
                    let labels = labels.strip_prefix('{').and_then(|labels| labels.strip_suffix('}')).expect(line);
                    for (n, label) in labels.split(',').enumerate() {
                        let (key, value) = label.split_once('=').expect(line);
                        assert!(
                            is_name(key) && value.starts_with('"') && value.ends_with('"') && value.len() > 2,
                            "{line}"
                        );
                        assert_eq!(n == 0, key == "core", "{line}");
                    }
                } else {
                    assert!(!name.starts_with("blipmq_"), "{line}");
                }
            }
        }
        assert_eq!(names.len(), V1_METRICS.len() + 1 + FAMILIES.len());
    }

    #[test]
    fn each_core_shows_its_own() {
        let text = rendered(&two_cores());
        assert_eq!(value(&text, "blipmq_topics{core=\"0\"}"), "3");
        assert_eq!(value(&text, "blipmq_topics{core=\"1\"}"), "4");
        assert_eq!(value(&text, "blipmq_published_total{core=\"0\",qos=\"1\"}"), "7");
        assert_eq!(value(&text, "blipmq_queue_lost_total{core=\"0\",cause=\"expired\"}"), "2");
        assert_eq!(value(&text, "blipmq_queue_lost_total{core=\"1\",cause=\"purged\"}"), "0");
        assert_eq!(value(&text, "blipmq_publishes_rejected_total{core=\"0\",code=\"500\"}"), "4");
        assert_eq!(value(&text, "blipmq_connections_closed_total{core=\"0\",reason=\"too_slow\"}"), "1");
        assert_eq!(value(&text, "blipmq_core_up{core=\"1\"}"), "1");
    }

    #[test]
    fn a_core_that_is_silent_keeps_its_last_numbers() {
        let [a, b] = two_cores();
        let text = render(&[
            Reading { core: CoreId(0), metrics: Some(&a), up: false },
            Reading { core: CoreId(1), metrics: Some(&b), up: true },
            Reading { core: CoreId(2), metrics: None, up: false },
        ]);
        assert_eq!(value(&text, "topics"), "7");
        assert_eq!(value(&text, "blipmq_core_up{core=\"0\"}"), "0");
        assert_eq!(value(&text, "blipmq_core_up{core=\"2\"}"), "0");
        assert!(!text.contains("blipmq_topics{core=\"2\"}"));
    }

    #[test]
    fn histograms_are_cumulative() {
        let text = rendered(&two_cores());
        let batch = |le: &str| value(&text, &format!("blipmq_batch_records_bucket{{core=\"0\",le=\"{le}\"}}"));
        assert_eq!([batch("1"), batch("2"), batch("3"), batch("1048576"), batch("+Inf")], ["1", "1", "2", "2", "2"]);
        assert_eq!(value(&text, "blipmq_batch_records_sum{core=\"0\"}"), "4");
        assert_eq!(value(&text, "blipmq_sync_seconds_sum{core=\"0\"}"), "0.000048");
        let sync = |le: &str| value(&text, &format!("blipmq_sync_seconds_bucket{{core=\"0\",le=\"{le}\"}}"));
        assert_eq!([sync("0.00004096"), sync("0.000049152"), sync("+Inf")], ["0", "1", "1"]);
        let mut last = 0.0;
        for line in text.lines().filter(|line| line.starts_with("blipmq_sync_seconds_bucket{core=\"0\"")) {
            let bound = line.split("le=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse::<f64>().unwrap() };
            assert!(bound > last, "{line}");
            last = bound;
        }
        assert_eq!(last, f64::INFINITY);
    }

    #[test]
    fn a_value_lies_in_the_bucket_whose_bound_covers_it() {
        for power in 0..36 {
            for near in [0, 1, 2, 3, (1u64 << power) / 4, (1 << power) / 2, (1 << power) - 1] {
                let value = (1u64 << power) + near;
                let bucket = bucket_of(value);
                if bucket >= BUCKETS {
                    assert!(value > bound_of(BUCKETS - 1));
                    continue;
                }
                assert!(value <= bound_of(bucket), "{value} above {}", bound_of(bucket));
                assert!(bucket == 0 || value > bound_of(bucket - 1), "{value} belongs below {bucket}");
            }
        }
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bound_of(BUCKETS - 1), 1 << 36);
        assert_eq!((0..10).map(bound_of).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]);

        let mut histogram = Histogram::default();
        histogram.record(u64::MAX);
        histogram.record(1);
        assert_eq!((histogram.count(), histogram.sum()), (2, u64::MAX));
        assert_eq!(histogram.counts.iter().sum::<u64>(), 1, "the largest is only in the total");
    }

    #[test]
    fn merging_adds_everything_up() {
        let [a, b] = two_cores();
        let mut all = a.clone();
        all.merge(&b);
        all.merge(&a);
        assert_eq!(all.topics, 10);
        assert_eq!(all.published.get(Qos::AtLeastOnce), 15);
        assert_eq!(all.lost.get(Loss::Expired), 4);
        assert_eq!((all.publishes_rejected.get(500), all.publishes_rejected.get(404)), (8, 0));
        assert_eq!((all.batch_records.count(), all.batch_records.sum()), (4, 8));
        let mut none = CoreMetrics::default();
        none.merge(&a);
        assert_eq!(none, a);
    }

    #[test]
    fn codes_are_bounded() {
        let mut codes = ByCode::default();
        for code in 1..=1000 {
            codes.add(code, 1);
        }
        codes.add(5, 1);
        assert_eq!(codes.0.len(), CODES_MAX);
        assert_eq!(codes.get(5), 2);
        assert_eq!(codes.total(), 1001);
        assert_eq!(codes.get(0), 1000 - (CODES_MAX as u64 - 1));
    }

    #[test]
    fn the_ledger_balances_over_all_cores() {
        // Core 0 has the connection and the publishes, core 1 the queue.
        let mut a = CoreMetrics::default();
        a.publishes_received.add(Qos::AtLeastOnce, 10);
        a.publishes_rejected.add(500, 1);
        a.publishes_duplicate = 2;
        let mut b = CoreMetrics { queue_in: 14, queue_recovered: 3, queue_waiting: 4, ..CoreMetrics::default() };
        b.published.add(Qos::AtLeastOnce, 7);
        b.queue_out.add(Qos::AtLeastOnce, 11);
        b.lost.add(Loss::DeadLettered, 1);
        b.lost.add(Loss::Purged, 1);
        assert!(!Ledger::of(&a).balances());
        let mut all = a.clone();
        all.merge(&b);
        assert!(Ledger::of(&all).balances(), "{:?}", Ledger::of(&all));
        all.queue_waiting -= 1;
        assert!(!Ledger::of(&all).balances(), "a message that vanished is noticed");
    }

    #[test]
    fn labels_are_distinct() {
        for values in [Qos::VALUES, Loss::VALUES, Closed::VALUES, Refused::VALUES, Direction::VALUES] {
            let distinct: std::collections::BTreeSet<_> = values.iter().collect();
            assert_eq!(distinct.len(), values.len());
        }
        assert_eq!(Loss::VALUES[Loss::Purged.index()], "purged");
        assert_eq!(Closed::VALUES[Closed::Internal.index()], "internal");
    }
}
