//! One life: virtual time goes from one happening to the next, in the broker, on the network, among the clients.
//!
//! Owns: the order of events, calamities, crashes and restarts, the two phases (chaos; then no more faults, and everything
//! must come to its end), and what a power cut excuses. Never: judges what a client saw; the oracle does.

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

    // ---- the network --------------------------------------------------------------------------------------------

    pub fn push(&mut self, at: Instant, item: Item) {
        self.serial += 1;
        self.agenda.push(Reverse((at, self.serial, item)));
    }

    pub fn open_link(&mut self, n: usize) -> u32 {
        self.links_ever += 1;
        let number = self.links_ever;
        let core = self.rng.between(0, u64::from(self.machine.cores()) - 1) as u16;
        let role = &self.clients[n].role;
        let manner = if self.healing { calm() } else { role.manner };
        let link = Link::new(number, n, core, role.version, manner);
        let at = self.now + link.delay(&mut self.rng);
        self.links.insert(number, link);
        self.say(|| format!("client {n} connects to core {core}: connection {number}"));
        self.push(at, Item::Accept { link: number });
        number
    }

    fn accept(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else { return };
        if link.left || link.dead {
            return;
        }
        if !self.machine.is_ready() || link.core >= self.machine.cores() {
            link.left = true;
            let n = link.client;
            self.say(|| format!("connection {number} is refused"));
            self.on_disconnected(n);
            return;
        }
        let core = link.core;
        let now = self.computer_now();
        let conn = self.machine.connect(now, core);
        if let Some(link) = self.links.get_mut(&number) {
            link.conn = Some(conn);
        }
        self.by_conn.insert(conn, number);
        self.carry_to_broker(number);
    }

    pub fn write(&mut self, n: usize, bytes: Vec<u8>) {
        let Some(number) = self.clients[n].link else { return };
        let Some(link) = self.links.get_mut(&number) else { return };
        for at in link.write(self.now, bytes, &mut self.rng) {
            self.push(at, Item::ToBroker { link: number });
        }
    }

    /// What has arrived goes to the broker, unless it does not read.
    fn carry_to_broker(&mut self, number: u32) {
        loop {
            let now = self.computer_now();
            let Some(link) = self.links.get_mut(&number) else { return };
            let Some(conn) = link.conn else { return };
            if self.machine.is_paused(conn) {
                return;
            }
            let Some(bytes) = link.arrived(now.mono) else { return };
            self.machine.receive(now, conn, &bytes);
        }
    }

    /// What the broker has to say goes as far as the sockets take it.
    fn drain(&mut self, number: u32) {
        loop {
            let now = self.computer_now();
            let Some(link) = self.links.get_mut(&number) else { return };
            let Some(conn) = link.conn else { return };
            let room = link.room();
            if room == 0 || self.machine.outbox_len(conn) == 0 {
                return;
            }
            let bytes = self.machine.send(now, conn, room);
            if bytes.is_empty() {
                return;
            }
            let mut hash = self.life.trace;
            for word in bytes.chunks(8) {
                let mut padded = [0; 8];
                padded[..word.len()].copy_from_slice(word);
                hash = (hash ^ u64::from_le_bytes(padded)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
            }
            self.life.trace = hash;
            let link = self.links.get_mut(&number).expect("it was there");
            if let Err(text) = link.send(&bytes) {
                return self.misbehaved(format!("connection {number}: the bytes are {text}"));
            }
            let at = link.carry(self.now, bytes.len(), &mut self.rng);
            if let Some(at) = at {
                self.push(at, Item::ToClient { link: number });
            }
        }
    }

    fn carry_to_client(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else { return };
        if link.left {
            return;
        }
        let n = link.client;
        if link.stalled_until > self.now {
            let at = link.stalled_until;
            return self.push(at, Item::ToClient { link: number });
        }
        for heard in link.hear(self.now) {
            if self.clients[n].link != Some(number) {
                break;
            }
            self.on_heard(n, heard);
        }
    }

    /// The client gives the connection up.
    pub fn abandon(&mut self, number: u32, reset: bool) {
        self.unvouched.remove(&number);
        let Some(link) = self.links.get_mut(&number) else { return };
        link.left = true;
        let at = if reset {
            link.drop_up();
            self.now + link.delay(&mut self.rng)
        } else {
            link.up_end(self.now)
        };
        if link.conn.is_none() {
            return self.forget_link(number);
        }
        // Of a dead one the broker hears nothing: its keepalive will find out, or the kernel after minutes.
        let at = if link.dead { self.now + Duration::from_secs(120) } else { at };
        self.push(at, Item::BrokerNotices { link: number });
    }

    fn broker_notices(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let Some(conn) = link.conn else { return };
        // The end of the stream is found behind what has arrived; by who writes to nobody, at once.
        if !link.dead && link.has_arrived(self.now) && self.machine.outbox_len(conn) == 0 {
            let again = self.now + Duration::from_millis(5);
            return self.push(again, Item::BrokerNotices { link: number });
        }
        let now = self.computer_now();
        self.machine.hang_up(now, conn);
        self.lost_conn(number);
    }

    fn on_closed(&mut self, conn: ConnId, reason: CloseReason) {
        let Some(number) = self.by_conn.get(&conn).copied() else { return };
        let n = self.links[&number].client;
        self.say(|| format!("the broker closes connection {number} of client {n}: {reason:?}"));
        let link = &self.links[&number];
        let fits = match reason {
            CloseReason::BadFrame => link.spoilt,
            CloseReason::Silent => {
                link.dead || link.left || link.stalled_until > self.now_minus(Duration::from_secs(60))
            }
            CloseReason::AuthDeadline => true,
            CloseReason::SlowConsumer => link.dead || link.left || link.stalled_until > Instant(0),
            // The simulated driver does not tell the shard of unfinished frames.
            CloseReason::TooManyUnauthenticated | CloseReason::SlowFrame => false,
        };
        if !fits {
            self.misbehaved(format!("connection {number} of client {n} was closed for nothing: {reason:?}"));
        }
        if reason == CloseReason::Silent {
            self.life.count("closed-as-silent");
        }
        let end = self.links[&number].down_end(self.now) + Duration::from_millis(1);
        self.lost_conn(number);
        if self.links.get(&number).is_some_and(|link| !link.left && !link.dead) {
            self.push(end, Item::ClientNotices { link: number });
        }
    }

    /// The broker's end is gone.
    fn lost_conn(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let over = link.left;
        if let Some(conn) = link.conn.take() {
            self.by_conn.remove(&conn);
            self.books.link_closed(number, conn);
        }
        self.unanswered(number);
        if over {
            self.forget_link(number);
        }
    }

    /// What was asked on this connection will not be answered any more.
    fn unanswered(&mut self, number: u32) {
        let open: Vec<(u32, u64)> = self.asked.range((number, 0)..=(number, u64::MAX)).map(|(key, _)| *key).collect();
        for key in open {
            match self.asked.remove(&key) {
                Some(Asked::Publish { publisher, seq }) => self.observe(Event::Unknown { publisher, seq }),
                Some(Asked::Subscribe(subject)) if subject.number != DEAD_LETTERS => {
                    let unsure = subject.name.and_then(|name| self.books.unanswered(name, subject.number));
                    if let Some(sub) = unsure {
                        self.observe(Event::Excused(Excuse::Unsure { sub }));
                    }
                }
                _ => {}
            }
        }
        let subs: Vec<((u32, ClientSub), SubRef)> = self
            .link_subs
            .range((number, ClientSub(0))..=(number, ClientSub(u64::MAX)))
            .map(|(key, subject)| (*key, subject.clone()))
            .collect();
        let orphans_end = self.orphans_end();
        for (key, subject) in subs {
            self.link_subs.remove(&key);
            if subject.number == DEAD_LETTERS {
                continue;
            }
            let orphan = subject.name.filter(|name| name.is_lineage());
            if subject.name.is_none() || (orphans_end && orphan.is_some()) {
                self.observe(Event::Excused(Excuse::Ends { sub: subject.number }));
            }
            if let Some(name) = orphan.filter(|_| orphans_end) {
                self.books.forget(name);
            }
        }
    }

    /// Neither end knows it any more: what was asked too late never reached the broker.
    fn forget_link(&mut self, number: u32) {
        self.links.remove(&number);
        self.unvouched.remove(&number);
        self.books.link_forgotten(number);
        self.unanswered(number);
    }

    // ---- calamities ---------------------------------------------------------------------------------------------

    fn calamity(&mut self, calamity: Calamity) {
        let Calamity { what, dice, .. } = calamity;
        if self.healing {
            return;
        }
        match what {
            What::Kill | What::Power => self.crash(what, dice),
            What::Stop => self.stop(dice),
            What::Clock => {
                let mut rng = Rng::new(dice);
                let most = *rng.pick(&[50, 5_000, 4_000_000]);
                let by = rng.between(0, 2 * most) as i64 - most as i64;
                self.wall_step += by;
                self.say(|| format!("the computer's clock steps by {by} ms"));
                self.life.count(what.name());
            }
            _ => self.trouble(what, dice),
        }
    }

    /// Something happens to one connection.
    fn trouble(&mut self, what: What, dice: u64) {
        let open: Vec<u32> =
            self.links.values().filter(|l| !l.left && !l.dead && l.conn.is_some()).map(|l| l.number).collect();
        if open.is_empty() {
            return;
        }
        let mut rng = Rng::new(dice);
        let number = *rng.pick(&open);
        self.life.count(what.name());
        let now = self.now;
        let link = self.links.get_mut(&number).expect("listed");
        let n = link.client;
        match what {
            What::Cut => {
                link.dead = true;
                let (client, broker) = (rng.between(0, 2_000), rng.between(0, 2_000));
                self.push(now + Duration::from_millis(client), Item::ClientNotices { link: number });
                self.push(now + Duration::from_millis(broker), Item::BrokerNotices { link: number });
            }
            What::Reset => {
                link.dead = true;
                self.push(now, Item::ClientNotices { link: number });
                self.push(now, Item::BrokerNotices { link: number });
            }
            What::HalfOpen => {
                link.dead = true;
                self.push(now + Duration::from_secs(120), Item::BrokerNotices { link: number });
            }
            What::Stall => link.stalled_until = now + Duration::from_millis(rng.between(50, 3_000)),
            What::Drip => link.byte_by_byte(rng.between(50, 400) as u32),
            What::Garbage => {
                link.spoilt = true;
                let version = link.version;
                self.write(n, garbage(&mut rng, version));
            }
            What::Kill | What::Power | What::Stop | What::Clock => {}
        }
        self.say(|| format!("connection {number} of client {n}: {}", what.name()));
    }

    fn stop(&mut self, dice: u64) {
        if !self.machine.is_up() || self.stopping {
            return;
        }
        self.say(|| "SIGTERM".into());
        self.life.count(What::Stop.name());
        self.stopping = true;
        let now = self.computer_now();
        self.machine.stop(now);
        let mut rng = Rng::new(dice);
        if rng.percent(25) {
            self.crash_after = Some(rng.between(1, 60));
        }
    }

    /// The process dies, or the power goes; it may go while the process is dead, too.
    fn crash(&mut self, what: What, dice: u64) {
        let how = if what == What::Power { Crash::PowerLoss } else { Crash::Killed };
        let up = self.machine.is_up();
        if !up && (how == Crash::Killed || !dice.is_multiple_of(3)) {
            return;
        }
        self.say(|| format!("{how:?}{}", if up { "" } else { ", while the process is down" }));
        self.life.count(what.name());
        self.life.crashes += 1;
        let mut rng = Rng::new(dice);
        if how == Crash::PowerLoss {
            self.excuse_power_loss();
        }
        let now = self.computer_now();
        self.machine.crash(now, how);
        // Now and then the clock is another one when the power is back.
        if how == Crash::PowerLoss && rng.percent(20) && self.options.allows(What::Clock.name()) {
            self.wall_step += rng.between(0, 20_000) as i64 - 10_000;
        }
        let wait = if rng.percent(40) { 0 } else { rng.between(0, 1_500) };
        self.off(Duration::from_millis(wait));
        if rng.percent(25) {
            self.crash_after = Some(rng.between(1, 80));
        }
    }

    fn on_death(&mut self, death: Death) {
        self.say(|| format!("the process has died: {death:?}"));
        self.life.count("death");
        self.life.crashes += 1;
        // What a failed sync was to cover is gone, as if the power were.
        if matches!(&death, Death::Io(what) if what.contains("sync")) {
            self.excuse_power_loss();
        }
        if let Death::Corrupt(text) = &death {
            if !self.machine.is_damaged() {
                self.violated("I9", format!("died of corruption on a sound disk: {text}"));
            }
            self.repair();
        }
        let wait = self.rng.between(0, 1_000);
        self.off(Duration::from_millis(wait));
    }

    fn repair(&mut self) {
        let damage = self.machine.repair();
        self.life.count("repaired");
        self.say(|| format!("the disk is repaired: {damage:?}"));
    }

    /// The process is gone: so are all connections, and in a while it will be started again.
    fn off(&mut self, wait: Duration) {
        self.stopping = false;
        self.crash_after = None;
        self.books.nobody_consumes();
        let open: Vec<u32> = self.by_conn.values().copied().collect();
        for number in open {
            self.lost_conn(number);
            if let Some(link) = self.links.get(&number)
                && !link.left
                && !link.dead
            {
                let at = link.down_end(self.now) + Duration(self.rng.between(0, 50_000_000));
                self.push(at, Item::ClientNotices { link: number });
            }
        }
        self.starts += 1;
        let attempt = self.starts;
        self.push(self.now + wait, Item::Start { attempt });
    }

    /// What the policy allows a power cut to unwrite.
    fn excuse_power_loss(&mut self) {
        let mut lost = Vec::new();
        for one in &self.books.window {
            if self.machine.held(one.id) < Held::Synced {
                lost.push(one.id);
            }
        }
        self.books.forget_unsynced(|id| self.machine.held(id));
        for id in lost {
            self.say(|| format!("{id:?} was confirmed and is not synced"));
            self.observe(Event::Excused(Excuse::MayBeLost { publisher: id.publisher, seq: id.seq }));
        }
        if self.script.machine.policy == FsyncPolicy::Always {
            return;
        }
        let synced: Vec<Lsn> = (0..self.machine.cores()).map(|core| self.machine.log_synced(core)).collect();
        // Of a process that is down nothing can be asked; what was safe when it died is marked.
        let is_safe = |core: u16, mark: Lsn| mark <= synced.get(usize::from(core)).copied().unwrap_or(Lsn(0));
        let (safe, acks) =
            std::mem::take(&mut self.books.acks).into_iter().partition(|ack| is_safe(ack.core, ack.mark));
        self.books.acks = safe;
        let (safe, made) =
            std::mem::take(&mut self.books.made).into_iter().partition(|sub| is_safe(sub.core, sub.mark));
        self.books.made = safe;
        let (acks, made): (Vec<AckNote>, Vec<SubNote>) = (acks, made);
        self.books.acks.iter_mut().for_each(|ack| ack.mark = Lsn(0));
        self.books.made.iter_mut().for_each(|sub| sub.mark = Lsn(0));
        for ack in acks {
            let (sub, MessageId { publisher, seq, .. }) = (ack.sub, ack.id);
            self.observe(Event::Excused(Excuse::AckMayBeLost { sub, publisher, seq }));
        }
        for sub in made {
            self.books.unsure(sub.sub);
            self.observe(Event::Excused(Excuse::Unsure { sub: sub.sub }));
        }
    }

    /// Damage that nothing witnesses is taken for a torn tail, as it may be.
    fn excuse_unwitnessed(&mut self) {
        let report = self.machine.report().clone();
        self.life.truncated += report.truncated_frames;
        self.life.fallbacks += u64::from(report.fallbacks);
        if report.lost_unwitnessed == 0 {
            return;
        }
        self.life.count("unwitnessed");
        self.say(|| format!("damage without a witness: {report:?}"));
        for MessageId { publisher, seq, .. } in report.lost_messages {
            self.observe(Event::Excused(Excuse::MayBeLost { publisher, seq }));
        }
        for ack in std::mem::take(&mut self.books.acks) {
            let (sub, MessageId { publisher, seq, .. }) = (ack.sub, ack.id);
            self.observe(Event::Excused(Excuse::AckMayBeLost { sub, publisher, seq }));
        }
        for sub in std::mem::take(&mut self.books.made) {
            self.books.unsure(sub.sub);
            self.observe(Event::Excused(Excuse::Unsure { sub: sub.sub }));
        }
    }

    fn start_process(&mut self) {
        self.starts += 1;
        let attempt = self.starts;
        let cores = if self.run == 0 || self.rng.percent(50) {
            self.script.cores
        } else {
            self.rng.between(1, u64::from(self.script.cores_max)) as u16
        };
        let now = self.computer_now();
        match self.machine.start(now, cores) {
            Ok(()) => {
                self.script.cores = cores;
                self.excuse_unwitnessed();
                self.run += 1;
                let run = self.run;
                self.say(|| format!("run {run} begins, on {cores} cores"));
                self.observe(Event::Boot { run });
                self.books.window.clear();
                self.books.acks.clear();
                self.books.made.clear();
                self.life.starts += 1;
                self.check();
            }
            Err(refused) => {
                self.say(|| format!("the start is refused: {refused:?}"));
                self.life.refused += 1;
                self.check();
                match refused {
                    Refused::Corrupt(text) => {
                        if !self.machine.is_damaged() {
                            self.violated("I9", format!("a sound store was refused: {text}"));
                        }
                        self.repair();
                    }
                    // A sync that fails takes with it what it was to cover.
                    Refused::Unreadable(text) if text.contains("sync") => self.excuse_power_loss(),
                    Refused::Unreadable(_) | Refused::NoSpace(_) => {}
                }
                let wait = self.rng.between(1, 300);
                self.push(self.now + Duration::from_millis(wait), Item::Start { attempt });
            }
        }
    }

    // ---- the end ------------------------------------------------------------------------------------------------

    fn heal(&mut self) {
        self.say(|| "no more faults from now on".into());
        self.machine.heal();
        self.crash_after = None;
        if self.machine.is_up() && self.rng.percent(50) && self.options.allows(What::Kill.name()) {
            self.crash(What::Kill, 0);
            self.crash_after = None;
        }
        self.healing = true;
        self.phase = Phase::Drain;
        self.healed_at = self.now;
        self.last_delivery = self.now;
        let open: Vec<u32> = self.links.keys().copied().collect();
        for number in open {
            let link = self.links.get_mut(&number).expect("listed");
            link.stalled_until = Instant(0);
            if link.dead {
                self.push(self.now, Item::ClientNotices { link: number });
                self.push(self.now, Item::BrokerNotices { link: number });
            } else {
                self.push(self.now, Item::ToClient { link: number });
            }
        }
        let role = Role {
            version: Version::V2,
            pace_ms: 20,
            identity: IdentityKind::None,
            publishes: 0,
            topics: vec![0],
            manner: calm(),
            patience: Duration::from_secs(30),
            draws: 1,
        };
        let number = self.clients.len();
        self.collector = Some(number);
        let mut collector = Client::new(number, role);
        collector.key = format!("key-{CLIENTS_MAX}");
        self.clients.push(collector);
        self.plan_act(number, 1);
        self.push(self.now + LOOK, Item::Look);
    }

    /// The collector attaches to everything that goes by a name.
    pub fn collect(&mut self, n: usize) {
        let named = self.books.names().into_iter().filter_map(|name| self.books.named(name));
        let wanted: Vec<SubRef> = named.chain((0..TOPICS.len() as u16).map(dead_letters)).collect();
        let link = self.clients[n].link;
        for subject in wanted {
            let same = |other: &SubRef| (other.number, other.topic) == (subject.number, subject.topic);
            let has = self.clients[n].session.subs.values().any(|mine| same(&mine.subject));
            let asks = self
                .asked
                .iter()
                .any(|((on, _), asked)| Some(*on) == link && matches!(asked, Asked::Subscribe(other) if same(other)));
            if !has && !asks {
                self.send_subscribe(n, subject);
            }
        }
    }

    fn look(&mut self) {
        let since = self.now - self.healed_at;
        let quiet = self.now - self.last_delivery;
        let answered = self.clients.iter().all(Client::is_answered);
        match self.phase {
            Phase::Drain => {
                let open = self.oracle.outstanding().len();
                let calm = quiet > Duration::from_secs(3) && since > Duration::from_secs(3);
                if answered && calm && (open == 0 || quiet > QUIET) {
                    self.say(|| format!("all is answered, {open} messages are outstanding"));
                    self.phase = Phase::Rest;
                    self.last_delivery = self.now;
                    self.done = true;
                    for n in 0..self.clients.len() {
                        self.leave(n, false);
                    }
                } else if since > HEAL_MAX {
                    return self.stuck(format!("{open} messages outstanding, all publishes answered: {answered}"));
                }
            }
            Phase::Rest => {
                if self.machine.is_quiet() && self.by_conn.is_empty() && quiet > Duration::from_secs(1) {
                    self.check();
                    return self.end();
                }
                if quiet > HEAL_MAX {
                    let (quiet, open) = (self.machine.is_quiet(), self.by_conn.len());
                    return self.stuck(format!("the broker does not come to rest: quiet {quiet}, {open} connections"));
                }
            }
            Phase::Chaos | Phase::Over => {}
        }
        self.push(self.now + LOOK, Item::Look);
    }

    fn end(&mut self) {
        self.phase = Phase::Over;
        let metrics = self.machine.metrics();
        self.life.count_metrics(&metrics);
        let outstanding = self.oracle.outstanding();
        let oracle = std::mem::replace(&mut self.oracle, Oracle::new(oracle::Plan::default()));
        let verdict = oracle.finish(true);
        if !verdict.is_clean() && self.life.failure.is_none() {
            let lost = verdict.count(Kind::Lost) > 0;
            let text = verdict.details.join("; ");
            let invariant = verdict_name(&verdict);
            // What the broker itself still has is not lost; it just does not come.
            let waiting = metrics.queue_waiting;
            let text = if lost {
                format!("{text} (the broker has {waiting} waiting, {} outstanding)", outstanding.len())
            } else {
                text
            };
            self.fail(invariant, text);
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

fn dead_letters(topic: u16) -> SubRef {
    let kind = crate::oracle::SubKind { acks: true, named: true, earliest: true };
    SubRef { number: DEAD_LETTERS, topic, name: None, kind, asked: 0 }
}

/// How connections are when the chaos is over.
fn calm() -> Manner {
    Manner { delay_us: (50, 300), slices: Slices::Whole, room: 1 << 20 }
}

/// Bytes that are no frame.
fn garbage(rng: &mut Rng, version: Version) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..rng.between(4, 60)).map(|_| rng.draw() as u8).collect();
    match rng.between(0, 2) {
        // Longer than any frame; shorter than any; of a type that there is not.
        0 => bytes[0] |= 0x80,
        1 => bytes[..4].copy_from_slice(&[0, 0, 0, rng.between(0, 8) as u8]),
        _ => {
            let kind = if version == Version::V1 { 0x7f } else { 0x03 };
            bytes = vec![0, 0, 0, 10, kind, 0, 0, 0, 0, 0, 0, 0, 1, 9];
        }
    }
    bytes
}
