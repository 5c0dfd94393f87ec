//! One life: virtual time goes from one happening to the next, in the broker, on the network, among the clients.
//!
//! Owns: the order of events, calamities, crashes and restarts, the two phases (chaos; then no more faults, and everything
//! must come to its end), and what a power cut excuses. Never: judges what a client saw; the oracle does.

/// What befalls the world.
mod calamity;
/// After the chaos.
mod ending;
/// What is on its way between clients and broker.
mod network;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use blipmq::protocol::request::Version;
use blipmq::shard::effects::CloseReason;
use blipmq::shard::settings::BacklogOverflow;
use blipmq::time::{Duration, Instant, Now, WallMs};
use blipmq::types::{ClientSub, ConnId, Lsn};
use blipmq::wal::commit::FsyncPolicy;

use crate::message::MessageId;
use crate::oracle::{self, Event, Excuse, Kind, Oracle};
use crate::rng::Rng;
use crate::sim::books::{AckNote, Books, SubNote, SubRef};
use crate::sim::client::{Asked, Client};
use crate::sim::hearing::{DEAD_LETTERS, Heard};
use crate::sim::machine::{Crash, Death, Held, Machine, Refused};
use crate::sim::net::{Link, Manner, Slices};
use crate::sim::plan::{CLIENTS_MAX, Calamity, IdentityKind, Role, Script, TOPICS, What};
use crate::sim::{Failure, Life, Options};

/// What is on the agenda.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Item {
    Act {
        client: usize,
        plan: u64,
    },
    /// The connection has reached the broker.
    Accept {
        link: u32,
    },
    ToBroker {
        link: u32,
    },
    ToClient {
        link: u32,
    },
    /// The broker's end finds out that the connection is over.
    BrokerNotices {
        link: u32,
    },
    ClientNotices {
        link: u32,
    },
    Calamity {
        index: usize,
    },
    /// The process is started again.
    Start {
        attempt: u64,
    },
    /// The end of the chaos.
    Heal,
    /// Whether all has come to its end.
    Look,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Chaos,
    /// Everything confirmed is to be delivered, everything published to be answered, the dead letters are read.
    Drain,
    /// Everybody has left.
    Rest,
    Over,
}

pub struct World {
    pub script: Script,
    pub machine: Machine,
    pub now: Instant,
    /// The computer's wall clock, without its steps.
    wall_base: u64,
    wall_step: i64,
    rng: Rng,
    agenda: BinaryHeap<Reverse<(Instant, u64, Item)>>,
    serial: u64,
    pub clients: Vec<Client>,
    pub collector: Option<usize>,
    pub links: BTreeMap<u32, Link<Heard>>,
    pub by_conn: BTreeMap<ConnId, u32>,
    links_ever: u32,
    /// What each correlation id of each connection was about.
    pub asked: BTreeMap<(u32, u64), Asked>,
    /// v1: what no PING has asked about yet.
    pub unvouched: BTreeMap<u32, Unvouched>,
    pub refused: BTreeSet<(u16, u64)>,
    pub unknown_tags: BTreeSet<(u32, u64)>,
    pub link_subs: BTreeMap<(u32, ClientSub), SubRef>,
    /// By publisher.
    pub topics_of: Vec<u16>,
    pub buried: BTreeSet<(u16, u64)>,
    pub books: Books,
    oracle: Oracle,
    history: Option<Vec<Event>>,
    story: Option<Vec<String>>,
    phase: Phase,
    pub healing: bool,
    pub stopping: bool,
    /// Nobody connects any more.
    pub done: bool,
    pub run: u32,
    starts: u64,
    /// The start that is to crash again, after so many happenings.
    crash_after: Option<u64>,
    healed_at: Instant,
    pub last_delivery: Instant,
    since_check: u32,
    pub life: Life,
    options: Options,
}

/// v1: publishes, and acknowledgements by tag.
type Unvouched = (Vec<(u16, u64)>, Vec<(u64, u16, MessageId)>);

/// A life that does not come to its end within so many events is stuck.
const EVENTS_MAX: u64 = 400_000;
/// After the chaos, everything must be over by then.
const HEAL_MAX: Duration = Duration::from_secs(400);
/// Nothing was delivered for so long: there is nothing to come.
const QUIET: Duration = Duration::from_secs(70);
const LOOK: Duration = Duration::from_millis(250);
/// What one core says to another has been heard by then.
pub const RING_DELAY_MAX: Duration = Duration::from_millis(300);
/// The books are looked at after so many events.
const CHECK_EVERY: u32 = 32;

impl World {
    pub fn new(seed: u64, options: &Options) -> World {
        let script = Script::draw(seed, options);
        let deadly = script.machine.settings.max_retries > 0;
        let mut world = World {
            machine: Machine::new(script.machine.clone(), seed),
            now: Instant(1_000_000_000),
            wall_base: 1_700_000_000_000,
            wall_step: 0,
            rng: Rng::derive(seed, &[7]),
            agenda: BinaryHeap::new(),
            serial: 0,
            clients: Vec::new(),
            collector: None,
            links: BTreeMap::new(),
            by_conn: BTreeMap::new(),
            links_ever: 0,
            asked: BTreeMap::new(),
            unvouched: BTreeMap::new(),
            refused: BTreeSet::new(),
            unknown_tags: BTreeSet::new(),
            link_subs: BTreeMap::new(),
            topics_of: Vec::new(),
            buried: BTreeSet::new(),
            books: Books::new(script.machine.vshards, deadly),
            oracle: Oracle::new(oracle::Plan {
                strict: script.machine.policy == FsyncPolicy::Always,
                ..oracle::Plan::default()
            }),
            history: options.record.then(Vec::new),
            story: options.record.then(Vec::new),
            phase: Phase::Chaos,
            healing: false,
            stopping: false,
            done: false,
            run: 0,
            starts: 0,
            crash_after: None,
            healed_at: Instant(0),
            last_delivery: Instant(0),
            since_check: 0,
            life: Life { seed, ..Life::default() },
            options: options.clone(),
            script,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.life.features = self.script.features.names();
        let plan = &self.script.machine;
        self.life.strict = plan.policy == FsyncPolicy::Always;
        let head = format!(
            "policy {}{}, {} cores, segments of {} KiB, quota {:?}, features {:?}, faults {:?}",
            plan.policy,
            if plan.dsync { " with O_DSYNC" } else { "" },
            self.script.cores,
            plan.segment_size / 1024,
            plan.slots_max,
            self.life.features,
            plan.faults,
        );
        self.say(|| head);
        for (number, role) in std::mem::take(&mut self.script.roles).into_iter().enumerate() {
            self.clients.push(Client::new(number, role));
            if !self.options.without.clients.contains(&number) {
                self.plan_act(number, 10);
            }
        }
        let start = self.now;
        for index in 0..self.script.calamities.len() {
            if !self.options.without.calamities.contains(&index) {
                self.push(start + self.script.calamities[index].at, Item::Calamity { index });
            }
        }
        let span = self.options.until.map_or(self.script.span, |until| Duration(until.0.min(self.script.span.0)));
        self.push(start + span, Item::Heal);
        self.start_process();
    }

    /// Lives until the end.
    pub fn live(&mut self) {
        while self.phase != Phase::Over && self.life.failure.is_none() {
            self.step();
            self.life.events += 1;
            if self.life.events > EVENTS_MAX {
                self.stuck(format!("{EVENTS_MAX} events, and no end of it"));
            }
        }
        self.life.virtual_ns = self.now.0;
        self.life.cores = self.script.cores;
        for (name, count) in crate::sim::plan::named(self.machine.faults()) {
            *self.life.faults.entry(name).or_default() += count;
        }
    }

    fn step(&mut self) {
        let inside = self.machine.is_up().then(|| self.machine.next_due()).flatten();
        let outside = self.agenda.peek().map(|Reverse((at, ..))| *at);
        let machine_first = match (inside, outside) {
            (Some(inside), Some(outside)) if inside <= self.now && outside <= self.now => self.rng.percent(60),
            (Some(inside), Some(outside)) => inside < outside,
            (inside, _) => inside.is_some(),
        };
        if machine_first {
            self.now = self.now.max(inside.unwrap_or(self.now));
            self.mix(self.now.0);
            let now = self.computer_now();
            self.machine.run_one(now);
            self.after();
            if let Some(left) = &mut self.crash_after {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.crash_after = None;
                    let how = if self.rng.percent(50) { What::Kill } else { What::Power };
                    let dice = self.rng.draw();
                    if self.options.allows(how.name()) && self.machine.is_up() {
                        self.crash(how, dice);
                    }
                }
            }
            return;
        }
        let Some(Reverse((at, _, item))) = self.agenda.pop() else {
            return self.stuck("nothing will ever happen again".into());
        };
        self.now = self.now.max(at);
        self.mix(self.now.0);
        self.happen(item);
        self.after();
    }

    fn happen(&mut self, item: Item) {
        match item {
            Item::Act { client, plan } => {
                if self.clients[client].plan == plan {
                    self.act(client);
                }
            }
            Item::Accept { link } => self.accept(link),
            Item::ToBroker { link } => self.carry_to_broker(link),
            Item::ToClient { link } => self.carry_to_client(link),
            Item::BrokerNotices { link } => self.broker_notices(link),
            Item::ClientNotices { link } => {
                let known = self.links.get(&link).filter(|link| !link.left).map(|link| link.client);
                if let Some(n) = known {
                    self.say(|| format!("client {n} finds connection {link} closed"));
                    self.on_disconnected(n);
                }
            }
            Item::Calamity { index } => self.calamity(self.script.calamities[index]),
            Item::Start { attempt } => {
                if attempt == self.starts && !self.machine.is_up() {
                    self.start_process();
                }
            }
            Item::Heal => self.heal(),
            Item::Look => self.look(),
        }
    }

    /// What the last happening has led to.
    fn after(&mut self) {
        for said in self.machine.said() {
            self.on_said(said);
        }
        let numbers: Vec<u32> = self.by_conn.values().copied().collect();
        for number in &numbers {
            self.drain(*number);
        }
        for (conn, reason) in self.machine.closed() {
            self.on_closed(conn, reason);
        }
        if let Some(death) = self.machine.death() {
            self.on_death(death);
        } else if self.stopping && !self.machine.is_up() {
            self.say(|| "the process has stopped".into());
            let wait = Duration(self.rng.between(0, 1_500_000_000));
            self.off(wait);
        }
        for number in numbers {
            let waits = self.links.get(&number).is_some_and(|link| link.has_arrived(self.now));
            if waits {
                self.carry_to_broker(number);
            }
        }
        if self.machine.is_up() {
            if self.books.is_anybody_leaving() && self.machine.is_heard() {
                let machine = &self.machine;
                self.books.settled(|conn| !machine.is_open(conn));
            }
            self.since_check += 1;
            if self.since_check >= CHECK_EVERY {
                self.since_check = 0;
                self.check();
            }
        }
        if !self.oracle.so_far().is_clean() && self.life.failure.is_none() {
            self.fail_by_oracle();
        }
    }

    fn now_minus(&self, by: Duration) -> Instant {
        Instant(self.now.0.saturating_sub(by.0))
    }

    fn check(&mut self) {
        if self.machine.is_up() && self.machine.is_quiet() {
            let held = |conn: &&ConnId| self.machine.is_paused(**conn) && self.machine.outbox_len(**conn) == 0;
            if let Some(conn) = self.by_conn.keys().find(held) {
                let text = format!("{conn} is not read, and nobody has anything to do");
                self.fail("held back", text);
            }
        }
        if let Err(text) = self.machine.check() {
            let (invariant, text) = match text.split_once(' ') {
                Some((first, rest)) if first.starts_with('I') => {
                    (first.trim_end_matches(':').to_string(), rest.to_string())
                }
                _ => ("inside".to_string(), text),
            };
            self.fail(&invariant, text);
        }
    }

    // ---- saying and judging -------------------------------------------------------------------------------------

    pub fn observe(&mut self, event: Event) {
        if let Event::Joins { topic } = event {
            self.topics_of.push(topic);
        }
        self.oracle.observe(&event);
        if let Some(history) = &mut self.history {
            history.push(event);
        }
    }

    pub fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            let ms = self.now.0 as f64 / 1e6;
            let line = line();
            story.push(format!("{ms:>12.3} ms  {line}"));
        }
    }

    pub fn misbehaved(&mut self, text: String) {
        self.observe(Event::Misbehaved { run: self.run, text });
    }

    pub fn violated(&mut self, invariant: &str, text: String) {
        self.fail(invariant, text);
    }

    fn stuck(&mut self, text: String) {
        self.say(|| format!("stuck: {text}"));
        self.observe(Event::Stuck { run: self.run });
        self.fail("stuck", text);
    }

    fn fail_by_oracle(&mut self) {
        let verdict = self.oracle.so_far();
        let (invariant, text) = (verdict_name(verdict), verdict.details.join("; "));
        self.fail(invariant, text);
    }

    fn fail(&mut self, invariant: &str, text: String) {
        if self.life.failure.is_none() {
            self.say(|| format!("VIOLATED {invariant}: {text}"));
            self.life.failure =
                Some(Failure { invariant: invariant.into(), text, at: self.now, events: self.life.events });
        }
    }

    /// What was recorded.
    pub fn into_records(self) -> (Life, Vec<Event>, Vec<String>) {
        (self.life, self.history.unwrap_or_default(), self.story.unwrap_or_default())
    }

    fn mix(&mut self, word: u64) {
        self.life.trace = (self.life.trace ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }

    /// A v1 queue without consumer ends within this life.
    pub fn orphans_end(&self) -> bool {
        self.script.machine.settings.orphan_ttl < Duration::from_secs(1_000)
    }

    pub fn gives_up(&self) -> bool {
        let settings = &self.script.machine.settings;
        let drops = settings.backlog_messages > 0 && settings.backlog_overflow == BacklogOverflow::DropOldest;
        drops || (!settings.dead_letter && (settings.max_retries > 0 || self.script.features.dead_letter))
    }

    pub fn core_of_publisher(&self, publisher: u16) -> u16 {
        self.books.core_of(self.topics_of[usize::from(publisher)], self.script.cores)
    }

    /// How far the log of a core is written; all that is in it now is safe when as much is synced.
    pub fn log_mark(&self, core: u16) -> Lsn {
        if core < self.machine.cores() { self.machine.log_written(core) } else { Lsn(u64::MAX) }
    }

    fn wall(&self) -> u64 {
        let wall = self.wall_base as i64 + self.wall_step + (self.now.0 / 1_000_000) as i64;
        wall.max(0) as u64
    }

    pub fn computer_now(&self) -> Now {
        Now { mono: self.now, wall: WallMs(self.wall()) }
    }

    /// Broker time, in milliseconds.
    pub fn broker_ms(&self) -> u64 {
        self.machine.clock(self.computer_now()).wall.0
    }
}

fn verdict_name(verdict: &oracle::Verdict) -> &'static str {
    let kind = Kind::ALL.into_iter().find(|kind| verdict.count(*kind) > 0);
    match kind {
        Some(Kind::Lost) => "I1/I4 lost",
        Some(Kind::Phantom) => "I2 phantom",
        Some(Kind::Duplicate) => "I5/I6 duplicate",
        Some(Kind::DuplicateNotFlagged) => "I5 duplicate not flagged",
        Some(Kind::OutOfOrder) => "I3 order",
        Some(Kind::LostConsumerAck) => "I6 lost consumer ack",
        Some(Kind::Stuck) => "stuck",
        Some(Kind::Misbehaved) => "misbehaved",
        Some(Kind::Untimely) => "I4 untimely",
        None => "none",
    }
}
