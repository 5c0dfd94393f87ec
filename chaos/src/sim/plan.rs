//! What a seed plans before its life begins: the broker's settings, who its clients are, and what befalls them.
//!
//! Swarm testing: every seed enables a random part of all features and faults, so that what one of them prevents is found by
//! a seed without it. Everything is drawn here, before it is used: with one client or one calamity masked, the rest of the
//! plan stays as it was.

use std::collections::BTreeSet;

use blipmq::limits::BLOCK;
use blipmq::protocol::request::Version;
use blipmq::shard::settings::{BacklogOverflow, Overflow, Settings};
use blipmq::time::Duration;
use blipmq::types::CoreId;
use blipmq::wal::commit::FsyncPolicy;
use bytes::Bytes;

use crate::rng::Rng;
use crate::sim::Options;
use crate::sim::machine::{self, FaultCounts, Faults};
use crate::sim::net::{Manner, Slices};

pub const SUFFIX: &str = ".dlq";
pub const TOPICS: [&str; 6] = ["orders", "news", "jobs", "metrics", "audit", "a/rather/long/name/for/a/topic"];
/// Clients that the broker's keys allow; the last key is the collector's.
pub const CLIENTS_MAX: usize = 15;
const VSHARDS: u16 = 8;

pub struct Script {
    pub machine: machine::Plan,
    pub cores: u16,
    pub cores_max: u16,
    pub features: Features,
    pub roles: Vec<Role>,
    pub calamities: Vec<Calamity>,
    /// How long the chaos lasts.
    pub span: Duration,
}

/// What clients may do in this life.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    pub qos0: bool,
    pub ttl: bool,
    pub delay: bool,
    pub priority: bool,
    pub alias: bool,
    pub reject: bool,
    pub dead_letter: bool,
    pub shared: bool,
    pub ephemeral: bool,
    pub earliest: bool,
    pub detach: bool,
    pub delete: bool,
    pub credit: bool,
    pub many_acks: bool,
    pub resend_confirmed: bool,
    pub unconfirmed: bool,
    pub malformed: bool,
    /// An acknowledgement may be forgotten: the delivery times out.
    pub forget: bool,
}

impl Features {
    fn draw(rng: &mut Rng) -> Features {
        let mut on = |percent| rng.percent(percent);
        Features {
            qos0: on(50),
            ttl: on(40),
            delay: on(40),
            priority: on(40),
            alias: on(40),
            reject: on(50),
            dead_letter: on(50),
            shared: on(40),
            ephemeral: on(50),
            earliest: on(40),
            detach: on(50),
            delete: on(30),
            credit: on(50),
            many_acks: on(70),
            resend_confirmed: on(40),
            unconfirmed: on(40),
            malformed: on(30),
            forget: on(40),
        }
    }

    /// By name, as far as they are enabled.
    pub fn names(&self) -> Vec<&'static str> {
        let all = [
            (self.qos0, "qos0"),
            (self.ttl, "ttl"),
            (self.delay, "delay"),
            (self.priority, "priority"),
            (self.alias, "alias"),
            (self.reject, "reject"),
            (self.dead_letter, "dead-letter"),
            (self.shared, "shared"),
            (self.ephemeral, "ephemeral"),
            (self.earliest, "earliest"),
            (self.detach, "detach"),
            (self.delete, "delete"),
            (self.credit, "credit"),
            (self.many_acks, "many-acks"),
            (self.resend_confirmed, "resend-confirmed"),
            (self.unconfirmed, "unconfirmed"),
            (self.malformed, "malformed"),
            (self.forget, "forget"),
        ];
        all.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect()
    }
}

/// Who one client is.
#[derive(Clone, Debug)]
pub struct Role {
    pub version: Version,
    /// Milliseconds between two actions, on average.
    pub pace_ms: u64,
    pub identity: IdentityKind,
    /// Of a hundred actions.
    pub publishes: u64,
    pub topics: Vec<u16>,
    pub manner: Manner,
    /// How long it waits for an answer before it gives a connection up.
    pub patience: Duration,
    pub draws: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IdentityKind {
    /// Never sends anything twice.
    None,
    Sequence,
    MessageId,
}

/// Something that befalls the world at a moment of its own.
#[derive(Clone, Copy, Debug)]
pub struct Calamity {
    /// Since the life began.
    pub at: Duration,
    pub what: What,
    /// Decides the rest.
    pub dice: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum What {
    /// The process is killed.
    Kill,
    Power,
    /// An orderly stop.
    Stop,
    /// The computer's clock steps.
    Clock,
    /// A connection ends, and both ends notice at some time.
    Cut,
    /// A connection ends at once.
    Reset,
    /// Nothing arrives any more, and nobody says so.
    HalfOpen,
    /// A client does not read.
    Stall,
    /// A client sends bytes that are no frames.
    Garbage,
    /// A connection carries single bytes.
    Drip,
}

impl What {
    pub const ALL: [What; 10] = [
        What::Kill,
        What::Power,
        What::Stop,
        What::Clock,
        What::Cut,
        What::Reset,
        What::HalfOpen,
        What::Stall,
        What::Garbage,
        What::Drip,
    ];

    pub fn name(self) -> &'static str {
        match self {
            What::Kill => "kill",
            What::Power => "power-loss",
            What::Stop => "stop",
            What::Clock => "clock-step",
            What::Cut => "cut",
            What::Reset => "reset",
            What::HalfOpen => "half-open",
            What::Stall => "stall",
            What::Garbage => "garbage",
            What::Drip => "byte-by-byte",
        }
    }

    pub fn is_crash(self) -> bool {
        matches!(self, What::Kill | What::Power | What::Stop)
    }
}

impl Script {
    pub fn draw(seed: u64, options: &Options) -> Script {
        let features = Features::draw(&mut Rng::derive(seed, &[1]));
        let mut rng = Rng::derive(seed, &[2]);
        let cores_max = options.cores.unwrap_or(4);
        let cores = rng.between(1, u64::from(cores_max)) as u16;
        let span = Duration::from_millis(rng.between(800, 3_000));
        let machine = machine_plan(&mut Rng::derive(seed, &[3]), seed, options);
        let roles = roles(&mut Rng::derive(seed, &[4]));
        let calamities = calamities(&mut Rng::derive(seed, &[5]), span, options);
        Script { machine, cores, cores_max, features, roles, calamities, span }
    }
}

fn roles(rng: &mut Rng) -> Vec<Role> {
    let count = rng.between(2, 8);
    let topics_in_use = rng.between(1, TOPICS.len() as u64);
    let mix_v1 = *rng.pick(&[0, 0, 30, 60]);
    (0..count)
        .map(|_| {
            let own = rng.between(1, topics_in_use.min(3));
            let topics: BTreeSet<u16> = (0..own).map(|_| rng.between(0, topics_in_use - 1) as u16).collect();
            let slow = *rng.pick(&[300, 1_000, 8_000]);
            Role {
                version: if rng.percent(mix_v1) { Version::V1 } else { Version::V2 },
                pace_ms: *rng.pick(&[8, 15, 30, 60]),
                identity: *rng.pick(&[
                    IdentityKind::None,
                    IdentityKind::Sequence,
                    IdentityKind::Sequence,
                    IdentityKind::MessageId,
                ]),
                publishes: *rng.pick(&[10, 40, 40, 70]),
                topics: topics.into_iter().collect(),
                manner: Manner {
                    delay_us: (*rng.pick(&[10, 50, 200]), slow),
                    slices: *rng.pick(&[Slices::Whole, Slices::Whole, Slices::Pieces, Slices::Single(200)]),
                    room: *rng.pick(&[2_000, 20_000, 1_000_000]),
                },
                patience: Duration::from_millis(rng.between(500, 5_000)),
                draws: rng.draw(),
            }
        })
        .collect()
}

fn calamities(rng: &mut Rng, span: Duration, options: &Options) -> Vec<Calamity> {
    let mut enabled: Vec<(What, u64)> = Vec::new();
    for what in What::ALL {
        let weight = match what {
            What::Kill | What::Power => 4,
            What::Stop => 3,
            What::Clock => 4,
            _ => 10,
        };
        // Every life has crashes of some kind.
        if rng.percent(if what == What::Kill || what == What::Power { 80 } else { 60 }) && options.allows(what.name()) {
            enabled.push((what, weight));
        }
    }
    let sum: u64 = enabled.iter().map(|(_, weight)| weight).sum();
    let count = rng.between(45, 115);
    let mut all: Vec<Calamity> = (0..count)
        .filter_map(|_| {
            let (at, dice) = (Duration(rng.between(0, span.0)), rng.draw());
            let mut die = rng.between(0, sum.max(1) - 1);
            let (what, _) = enabled.iter().find(|(_, weight)| {
                let hit = die < *weight;
                die = die.saturating_sub(*weight);
                hit
            })?;
            Some(Calamity { at, what: *what, dice })
        })
        .collect();
    all.sort_by_key(|calamity| calamity.at);
    all
}

fn machine_plan(rng: &mut Rng, seed: u64, options: &Options) -> machine::Plan {
    let policy = match rng.between(0, 7) {
        0 | 1 => FsyncPolicy::EveryN(rng.between(1, 12) as u32),
        2 | 3 => FsyncPolicy::IntervalMs(rng.between(5, 400)),
        4 => FsyncPolicy::None,
        _ => FsyncPolicy::Always,
    };
    let slots_max = rng.percent(20).then(|| rng.between(14, 24) as usize);
    machine::Plan {
        policy,
        dsync: policy == FsyncPolicy::Always && rng.percent(30),
        segment_size: *rng.pick(&[16, 16, 32, 64]) * BLOCK as u32,
        vshards: VSHARDS,
        slots_max,
        spare: rng.between(1, 3) as usize,
        checkpoint_interval: Duration::from_millis(*rng.pick(&[60, 200, 1_000])),
        drain: Duration::from_millis(*rng.pick(&[50, 500])),
        keys: (0..=CLIENTS_MAX).map(|n| format!("key-{n}").into_bytes()).collect(),
        settings: settings(rng),
        faults: faults(&mut Rng::derive(seed, &[6]), options),
        mistake: options.mistake,
    }
}

fn settings(rng: &mut Rng) -> Settings {
    let mut settings = Settings {
        core: CoreId(0),
        cores: 1,
        vshards: VSHARDS,
        dead_letter_suffix: Bytes::from_static(SUFFIX.as_bytes()),
        dead_letter: !rng.percent(10),
        dead_letter_ttl: Duration::ZERO,
        v1_ttl: *rng.pick(&[Duration::ZERO, Duration::from_secs(60), Duration::from_millis(700)]),
        ttl: *rng.pick(&[Duration::ZERO, Duration::ZERO, Duration::ZERO, Duration::from_millis(900)]),
        max_retries: rng.between(0, 4) as u16,
        retry_backoff: Duration::from_millis(*rng.pick(&[20, 100, 1_000])),
        ack_timeout: Duration::from_millis(*rng.pick(&[100, 500, 5_000])),
        orphan_ttl: Duration::from_secs(*rng.pick(&[1_000_000, 1_000_000, 2])),
        durable_idle_ttl: Duration::ZERO,
        poll_park: Duration::from_millis(*rng.pick(&[0, 50, 5_000])),
        dedup_window: Duration::from_secs(100_000),
        qos0_messages: rng.between(2, 40) as usize,
        qos0_bytes: *rng.pick(&[2_000, 1 << 20]),
        qos0_overflow: *rng.pick(&[Overflow::DropOldest, Overflow::DropNew]),
        backlog_messages: 0,
        backlog_bytes: 0,
        backlog_overflow: BacklogOverflow::Reject,
        auth_deadline: Duration::from_secs(5),
        keepalive: Duration::from_millis(*rng.pick(&[0, 0, 300, 2_000])),
        cache_bytes: *rng.pick(&[4_096, 65_536, 1 << 20]),
        entries_max: *rng.pick(&[100_000, 100_000, 100_000, 60]),
        unauthenticated_max: 1_000,
        unauthenticated_per_address_max: 10_000,
        frame_timeout: Duration::ZERO,
        connection_bytes: *rng.pick(&[600, 1 << 20]),
        idle_marker: rng.percent(90),
        ports: Vec::new(),
    };
    if rng.percent(15) {
        settings.backlog_messages = rng.between(5, 25);
        settings.backlog_overflow =
            *rng.pick(&[BacklogOverflow::Reject, BacklogOverflow::Reject, BacklogOverflow::DropOldest]);
    }
    settings
}

/// How often what goes wrong with the disk, in ten thousandths; most lives have only some of it.
fn faults(rng: &mut Rng, options: &Options) -> Faults {
    let mut rate = |name: &str, rates: [u32; 3]| {
        let rate = *rng.pick(&rates);
        if rng.percent(40) && options.allows(name) { rate } else { 0 }
    };
    Faults {
        write_eio: rate("write-eio", [10, 40, 100]),
        sync_eio: rate("sync-eio", [10, 40, 150]),
        read_eio: rate("read-eio", [50, 200, 800]),
        short_write: rate("short-write", [10, 40, 100]),
        no_space: rate("no-space", [100, 500, 2_000]),
        lost_write: rate("lost-write", [10, 50, 200]),
        misdirect: rate("misdirect", [10, 50, 200]),
        rot: rate("rot", [5_000, 10_000, 10_000]),
        slow: rate("slow", [10, 30, 100]),
        late: rate("late", [2_000, 5_000, 10_000]),
    }
}

/// What the disk did, by kind.
pub fn named(counts: &FaultCounts) -> [(&'static str, u64); 13] {
    [
        ("write-eio", counts.write_eio),
        ("sync-eio", counts.sync_eio),
        ("read-eio", counts.read_eio),
        ("short-write", counts.short_write),
        ("no-space", counts.no_space),
        ("lost-write", counts.lost_write),
        ("misdirect", counts.misdirect),
        ("rot", counts.rot),
        ("slow", counts.slow),
        ("late", counts.late),
        ("dropped", counts.dropped),
        ("torn", counts.torn),
        ("metadata", counts.metadata),
    ]
}
