//! Random lives of a broker: one seed, one life. Clients of both versions do everything, cores hear of each other late, the
//! disk takes its time, and at any moment the process dies or the power goes; then the broker starts again from what is
//! left, on another number of cores. The oracle here knows only what clients sent and heard, and what the disk held.
//!
//! `BLIPMQ_WORLD_SEEDS=200` lives so many lives; `BLIPMQ_WORLD_SEED=7` lives that one.

mod house;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use blipmq::metrics::Ledger;
use blipmq::protocol::reply::{Deliver, Outcome, Reply};
use blipmq::protocol::request::{
    Identity, Publish, RejectAction, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode, Version,
};
use blipmq::shard::event::Event;
use blipmq::shard::settings::BacklogOverflow;
use blipmq::time::Duration;
use blipmq::types::{ClientSub, ConnId, DeliveryTag, Durability, Lsn, Qos};
use blipmq::wal::batch::Write;
use blipmq::wal::commit::FsyncPolicy;
use bytes::Bytes;
use house::{Crash, House, KEY, Plan, Said};

const SEEDS: u64 = 120;
const STEPS: usize = 700;
const TOPICS: [&str; 5] = ["orders", "news", "jobs", "metrics", "audit"];

#[test]
fn lives_of_a_broker() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("BLIPMQ_WORLD_SEED") {
        let world = live(seed);
        return println!("seed {seed}: {:?}", world.tally);
    }
    let mut sum = Tally::default();
    for seed in 0..number("BLIPMQ_WORLD_SEEDS").unwrap_or(SEEDS) {
        let world = live(seed);
        if seed % 16 == 0 {
            assert_eq!(live(seed).trace, world.trace, "seed {seed} lived twice, differently");
        }
        sum.add(&world.tally);
    }
    println!("{sum:?}");
    // A world in which nothing happens proves nothing.
    let Tally { delivered, confirmed, acked, crashes, buried, read_back, relocated, refused, duplicates } = sum;
    let counts = [delivered, confirmed, acked, crashes, buried, read_back, relocated, refused, duplicates];
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

fn live(seed: u64) -> World {
    let lived = std::panic::catch_unwind(|| {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        world.last_day();
        world
    });
    lived.unwrap_or_else(|_| panic!("seed {seed}: replay with BLIPMQ_WORLD_SEED={seed}"))
}

#[derive(Default, Debug)]
struct Tally {
    delivered: u64,
    confirmed: u64,
    acked: u64,
    crashes: u64,
    buried: u64,
    read_back: u64,
    relocated: u64,
    refused: u64,
    duplicates: u64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.delivered += other.delivered;
        self.confirmed += other.confirmed;
        self.acked += other.acked;
        self.crashes += other.crashes;
        self.buried += other.buried;
        self.read_back += other.read_back;
        self.relocated += other.relocated;
        self.refused += other.refused;
        self.duplicates += other.duplicates;
    }
}

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// What a client published. Its number is in its payload.
#[derive(Debug)]
struct Message {
    topic: usize,
    publisher: usize,
    qos: Qos,
    /// First deliveries come in publish order.
    ordered: bool,
    expires: bool,
    identified: bool,
    confirmed: bool,
}

/// A durable subscription, as those who use it see it.
#[derive(Default)]
struct Queue {
    /// It is owed the messages of its topic from this number on.
    from: usize,
    tags: BTreeMap<usize, DeliveryTag>,
    /// An acknowledgement was sent; it was confirmed.
    done: BTreeSet<usize>,
    gone: BTreeSet<usize>,
}

type QueueName = (usize, u64);

struct Sub {
    topic: usize,
    queue: Option<QueueName>,
    held: Vec<(DeliveryTag, usize)>,
    /// By publisher: the last message of the first deliveries.
    last: BTreeMap<usize, usize>,
}

enum Asked {
    Publish(usize),
    Subscribe { topic: usize, queue: Option<QueueName> },
    Ack(Option<QueueName>, Vec<usize>),
    Other,
}

struct Client {
    conn: ConnId,
    number: usize,
    version: Version,
    subs: BTreeMap<ClientSub, Sub>,
    asked: BTreeMap<u64, Asked>,
    next_cid: u64,
    undrained: bool,
    /// Its socket is not read for the time being.
    held_back: bool,
}

impl Client {
    fn ask(&mut self, what: Asked) -> u64 {
        self.next_cid += 1;
        self.asked.insert(self.next_cid, what);
        self.next_cid
    }
}

struct World {
    rng: Rng,
    house: House,
    clients: Vec<Client>,
    clients_ever: usize,
    messages: Vec<Message>,
    queues: BTreeMap<QueueName, Queue>,
    /// The name in use for each topic; a deleted one is not used again.
    names: [u64; TOPICS.len()],
    written: BTreeSet<usize>,
    synced: BTreeSet<usize>,
    /// By core: messages in writes that no sync covers yet.
    unsynced: Vec<VecDeque<(Lsn, Vec<usize>)>>,
    /// Seen in a dead-letter topic.
    buried: BTreeSet<usize>,
    trace: u64,
    tally: Tally,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng(seed);
        let mut plan = Plan::new();
        plan.cores = 1 + rng.below(3) as u16;
        plan.policy = match rng.below(8) {
            0 => FsyncPolicy::EveryN(1 + rng.below(8) as u32),
            1 => FsyncPolicy::IntervalMs(5 + rng.below(100)),
            2 => FsyncPolicy::None,
            _ => FsyncPolicy::Always,
        };
        plan.dsync = plan.policy == FsyncPolicy::Always && rng.percent(30);
        plan.slots_max = rng.percent(20).then(|| 14 + rng.index(4));
        plan.settings.cache_bytes = [4096, 65_536, 1 << 20][rng.index(3)];
        plan.settings.max_retries = rng.below(4) as u16;
        plan.settings.ack_timeout = Duration::from_secs(5);
        plan.settings.dedup_window = Duration::from_secs(100_000);
        plan.settings.connection_bytes = [600, 1 << 20][rng.index(2)];
        plan.settings.qos0_messages = 2 + rng.index(20);
        if rng.percent(20) {
            plan.settings.backlog_messages = 5 + rng.below(20);
            plan.settings.backlog_overflow = BacklogOverflow::Reject;
        }
        let cores = usize::from(plan.cores);
        World {
            house: House::new(plan),
            clients: Vec::new(),
            clients_ever: 0,
            messages: Vec::new(),
            queues: BTreeMap::new(),
            names: [0; TOPICS.len()],
            written: BTreeSet::new(),
            synced: BTreeSet::new(),
            unsynced: vec![VecDeque::new(); cores],
            buried: BTreeSet::new(),
            trace: 0xcbf2_9ce4_8422_2325,
            tally: Tally::default(),
            rng,
        }
    }

    fn step(&mut self) {
        let core = self.rng.index(self.house.cores.len());
        match self.rng.below(1000) {
            0..40 => self.connect(),
            40..55 => self.close(),
            55..290 => self.publish(),
            290..350 => self.subscribe(),
            350..460 => self.acknowledge(),
            460..480 => self.reject(),
            480..500 => self.unsubscribe_or_credit(),
            500..560 => self.poll(),
            560..620 => self.pass(core),
            620..680 => _ = self.house.begin_write(core),
            680..740 => {
                let write = self.house.end_write(core);
                self.note(core, write);
            }
            740..790 => _ = self.house.begin_sync(core),
            790..840 => {
                self.house.end_sync(core);
                self.note(core, None);
            }
            840..870 => self.tally.read_back += u64::from(self.house.read_back(core)),
            870..890 => _ = self.house.serve(),
            890..900 => _ = self.house.begin_checkpoint(),
            900..960 => self.pass_time(core),
            960..975 => self.drain_one(),
            975..993 => self.rest(),
            _ => self.crash(),
        }
        self.listen();
    }

    // ---- the broker ---------------------------------------------------------------------------------------------

    /// What is on the disk now.
    fn note(&mut self, core: usize, write: Option<Write>) {
        if let Some(write) = write {
            let ids = payload_ids(&write.bytes);
            self.written.extend(&ids);
            self.unsynced[core].push_back((write.end, ids));
        }
        while self.unsynced[core].front().is_some_and(|(end, _)| *end <= self.house.cores[core].synced) {
            self.synced.extend(self.unsynced[core].pop_front().map(|(_, ids)| ids).unwrap_or_default());
        }
        self.listen();
    }

    fn pass(&mut self, to: usize) {
        let from = self.rng.index(self.house.cores.len());
        self.house.pass(to, from);
    }

    fn pass_time(&mut self, core: usize) {
        let by = match self.rng.below(20) {
            0 => Duration::from_secs(self.rng.below(20)),
            _ => Duration::from_millis(self.rng.below(50)),
        };
        self.house.advance(by);
        self.house.tick(core);
    }

    /// Everything under way comes to its end; then the books must balance.
    fn rest(&mut self) {
        for round in 0.. {
            assert!(round < 10_000, "the broker does not come to rest");
            self.listen();
            (0..self.clients.len()).for_each(|n| self.drain(n));
            let mut busy = false;
            for core in 0..self.house.cores.len() {
                for from in 0..self.house.cores.len() {
                    busy |= self.house.pass(core, from);
                }
                busy |= self.house.read_back(core) | self.house.begin_write(core) | self.house.begin_sync(core);
                let write = self.house.end_write(core);
                busy |= write.is_some() | self.house.end_sync(core);
                self.note(core, write);
            }
            self.house.serve();
            if !busy && self.house.said.is_empty() {
                break;
            }
        }
        let ledger = Ledger::of(&self.house.metrics());
        assert!(ledger.balances(), "{ledger:?}");
        assert!(self.clients.iter().all(|client| !client.held_back), "a client is held back for nothing");
    }

    fn crash(&mut self) {
        let how = if self.rng.percent(50) { Crash::Killed } else { Crash::PowerLoss };
        self.tally.crashes += 1;
        self.count();
        // What was under way may have been written.
        for core in &self.house.cores {
            self.written.extend(core.write.iter().flat_map(|write| payload_ids(&write.bytes)));
        }
        let cores = 1 + self.rng.below(3) as u16;
        let rng = &mut self.rng;
        self.house.crash(how, cores, &mut |bound| rng.below(bound));
        // Recovery begins with a sync of everything it finds.
        self.synced.extend(&self.written);
        self.unsynced = vec![VecDeque::new(); usize::from(cores)];
        self.clients.clear();
        if how == Crash::PowerLoss && self.house.plan.policy != FsyncPolicy::Always {
            // The policy allows losses: nothing from before is owed.
            self.queues.clear();
            self.names.iter_mut().for_each(|name| *name += 1000);
        }
    }

    fn count(&mut self) {
        let metrics = self.house.metrics();
        self.tally.relocated += metrics.relocated_bytes;
        self.tally.duplicates += metrics.publishes_duplicate;
    }

    // ---- clients ------------------------------------------------------------------------------------------------

    fn connect(&mut self) {
        if self.clients.len() < 12 {
            let core = self.rng.index(self.house.cores.len());
            let version = if self.rng.percent(30) { Version::V1 } else { Version::V2 };
            self.connect_to(core, version);
        }
    }

    fn connect_to(&mut self, core: usize, version: Version) -> usize {
        let conn = self.house.open(core);
        self.clients_ever += 1;
        self.clients.push(Client {
            conn,
            number: self.clients_ever,
            version,
            subs: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_cid: 1 << 40,
            undrained: false,
            held_back: false,
        });
        self.house.request(conn, 1, RequestKind::Hello { version: if version == Version::V1 { 1 } else { 2 } });
        self.house.request(conn, 2, RequestKind::Auth { key: Bytes::from_static(KEY) });
        self.listen();
        self.clients.len() - 1
    }

    fn close(&mut self) {
        if let Some(n) = self.someone() {
            let conn = self.clients.swap_remove(n).conn;
            self.house.event(usize::from(conn.core().0), Event::Closed { conn });
        }
    }

    fn someone(&mut self) -> Option<usize> {
        (!self.clients.is_empty()).then(|| self.rng.index(self.clients.len()))
    }

    fn drain_one(&mut self) {
        if let Some(n) = self.someone() {
            self.drain(n);
        }
    }

    fn drain(&mut self, n: usize) {
        if std::mem::take(&mut self.clients[n].undrained) {
            self.house.drained(self.clients[n].conn);
        }
    }

    fn publish(&mut self) {
        let Some(n) = self.someone().filter(|n| !self.clients[*n].held_back) else { return };
        let v2 = self.clients[n].version == Version::V2;
        let rng = &mut self.rng;
        let again = self.messages.iter().rposition(|m| m.identified).filter(|_| v2 && rng.percent(5));
        let id = again.unwrap_or(self.messages.len());
        let mut publish = Publish {
            topic: TopicRef::Name(Bytes::new()),
            qos: if rng.percent(75) { Qos::AtLeastOnce } else { Qos::AtMostOnce },
            confirm: v2 && rng.percent(80),
            ttl: Some(Duration::ZERO),
            delay: Duration::ZERO,
            priority: 0,
            identity: None,
            options: Bytes::new(),
            payload: payload(id, if rng.percent(10) { 9_000 } else { rng.index(300) }),
        };
        if v2 && again.is_none() {
            match rng.below(12) {
                0 => publish.ttl = Some(Duration::from_millis(1 + rng.below(20_000))),
                1 if publish.qos == Qos::AtLeastOnce => publish.delay = Duration::from_millis(1 + rng.below(20_000)),
                2 => publish.priority = 1 + rng.below(9) as u8,
                3 => publish.identity = Some(Identity::MessageId(Bytes::new())),
                _ => {}
            }
        }
        if again.is_none() {
            self.messages.push(Message {
                topic: rng.index(TOPICS.len()),
                publisher: self.clients[n].number,
                qos: publish.qos,
                ordered: publish.delay == Duration::ZERO && publish.priority == 0 && publish.identity.is_none(),
                expires: publish.ttl != Some(Duration::ZERO),
                identified: publish.identity.is_some(),
                confirmed: false,
            });
        }
        let message = &self.messages[id];
        publish.topic = TopicRef::Name(Bytes::from_static(TOPICS[message.topic].as_bytes()));
        publish.qos = message.qos;
        let name = || Identity::MessageId(Bytes::from(format!("m{id}")));
        publish.identity = message.identified.then(name);
        let cid = self.clients[n].ask(Asked::Publish(id));
        self.house.request(self.clients[n].conn, cid, RequestKind::Publish(publish));
    }

    fn subscribe(&mut self) {
        let Some(n) = self.someone() else { return };
        let topic = self.rng.index(TOPICS.len());
        let v2 = self.clients[n].version == Version::V2;
        let queue = (v2 && self.rng.percent(60)).then_some((topic, self.names[topic]));
        let qos = if queue.is_some() || self.rng.percent(60) { Qos::AtLeastOnce } else { Qos::AtMostOnce };
        let start = if v2 && self.rng.percent(20) { Start::Earliest } else { Start::New };
        let credit = 1 + self.rng.below(20) as u32;
        let priority = self.rng.below(2) as u8;
        let cid = self.clients[n].ask(Asked::Subscribe { topic, queue });
        let durable = queue.map(|(_, name)| Bytes::from(format!("q{name}")));
        let topic = Bytes::from_static(TOPICS[topic].as_bytes());
        let subscribe = Subscribe { topic, qos, durable, credit, priority, start, ack_timeout: None };
        self.house.request(self.clients[n].conn, cid, RequestKind::Subscribe(subscribe));
    }

    fn some_sub(&mut self, wanted: impl Fn(&Client, &Sub) -> bool) -> Option<(usize, ClientSub)> {
        let all: Vec<(usize, ClientSub)> = (0..)
            .zip(&self.clients)
            .flat_map(|(n, c)| c.subs.iter().filter(|(_, s)| wanted(c, s)).map(move |(id, _)| (n, *id)))
            .collect();
        (!all.is_empty()).then(|| all[self.rng.index(all.len())])
    }

    fn acknowledge(&mut self) {
        let Some((n, sub)) = self.some_sub(|_, sub| !sub.held.is_empty()) else { return };
        let v1 = self.clients[n].version == Version::V1;
        let held = &mut self.clients[n].subs.get_mut(&sub).expect("found").held;
        let count = if v1 { 1 } else { 1 + self.rng.index(held.len()) };
        let some: Vec<_> = held.drain(..count).collect();
        self.send_acks(n, sub, &some);
    }

    fn send_acks(&mut self, n: usize, sub: ClientSub, some: &[(DeliveryTag, usize)]) {
        let client = &mut self.clients[n];
        let queue = client.subs[&sub].queue;
        let ids: Vec<usize> = some.iter().map(|(_, id)| *id).collect();
        if let Some(queue) = queue.and_then(|name| self.queues.get_mut(&name)) {
            queue.done.extend(&ids);
        }
        let tags = TagRanges(some.iter().map(|(tag, _)| (*tag, *tag)).collect());
        let v1 = client.version == Version::V1;
        let cid = if v1 { some[0].0.0 } else { client.ask(Asked::Ack(queue, ids)) };
        self.house.request(client.conn, cid, RequestKind::Ack { sub, tags, confirm: !v1 });
    }

    fn reject(&mut self) {
        let v2 = |client: &Client, sub: &Sub| client.version == Version::V2 && !sub.held.is_empty();
        let Some((n, sub)) = self.some_sub(v2) else { return };
        let action = match self.rng.below(3) {
            0 => RejectAction::Requeue,
            1 => RejectAction::RequeueAfter(Duration::from_millis(self.rng.below(5_000))),
            _ => RejectAction::DeadLetter,
        };
        let client = &mut self.clients[n];
        let (tag, _) = client.subs.get_mut(&sub).expect("found").held.remove(0);
        let cid = client.ask(Asked::Other);
        self.house.request(client.conn, cid, RequestKind::Reject { sub, tags: TagRanges::one(tag), action });
    }

    fn unsubscribe_or_credit(&mut self) {
        let Some((n, sub)) = self.some_sub(|client, _| client.version == Version::V2) else { return };
        let client = &mut self.clients[n];
        let cid = client.ask(Asked::Other);
        if self.rng.percent(50) {
            let credit = 1 + self.rng.below(30) as u32;
            return self.house.request(client.conn, cid, RequestKind::Credit { sub, credit });
        }
        let mode = if self.rng.percent(30) { UnsubscribeMode::Delete } else { UnsubscribeMode::Detach };
        let gone = client.subs.remove(&sub).expect("found");
        if let Some(queue) = gone.queue.filter(|_| mode == UnsubscribeMode::Delete) {
            self.queues.remove(&queue);
            self.names[queue.0] = self.names[queue.0].max(queue.1 + 1);
        }
        self.house.request(client.conn, cid, RequestKind::Unsubscribe { sub, mode });
    }

    fn poll(&mut self) {
        let Some((n, sub)) = self.some_sub(|client, _| client.version == Version::V1) else { return };
        let cid = self.clients[n].ask(Asked::Other);
        self.house.request(self.clients[n].conn, cid, RequestKind::Poll { sub });
    }

    // ---- what they hear -----------------------------------------------------------------------------------------

    fn listen(&mut self) {
        for said in std::mem::take(&mut self.house.said) {
            for byte in format!("{said:?}").bytes() {
                self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
            match said {
                Said::Reply(conn, reply) => {
                    if let Some(n) = self.clients.iter().position(|client| client.conn == conn) {
                        self.hear(n, reply);
                    }
                }
                Said::Closed(conn, reason) => panic!("{conn} has done nothing to be closed for: {reason:?}"),
                Said::Paused(conn) => self.hold_back(conn, true),
                Said::Resumed(conn) => self.hold_back(conn, false),
            }
        }
    }

    fn hold_back(&mut self, conn: ConnId, held: bool) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.conn == conn) {
            client.held_back = held;
        }
    }

    fn hear(&mut self, n: usize, reply: Reply) {
        match reply {
            Reply::Deliver(deliver) => self.hear_message(n, &deliver),
            Reply::Confirm { cid, outcome } => {
                let Some(Asked::Publish(id)) = self.clients[n].asked.remove(&cid) else { panic!("confirm of nothing") };
                match outcome {
                    Outcome::Stored { level, .. } | Outcome::Duplicate { level, .. } => self.confirmed(id, level),
                    Outcome::Rejected { .. } => self.tally.refused += 1,
                }
            }
            Reply::Subscribed { cid, sub, .. } => self.subscribed(n, cid, sub),
            Reply::AckV1 { cid, id } if id != 0 => self.subscribed(n, cid, ClientSub(id)),
            Reply::Ok { cid } => {
                if let Some(Asked::Ack(Some(name), ids)) = self.clients[n].asked.remove(&cid)
                    && let Some(queue) = self.queues.get_mut(&name)
                {
                    self.tally.acked += ids.len() as u64;
                    // Of several tags some may have been gone already: only a single one is known to be meant.
                    queue.gone.extend(ids.iter().filter(|_| ids.len() == 1));
                }
            }
            _ => {}
        }
    }

    fn confirmed(&mut self, id: usize, level: Durability) {
        self.tally.confirmed += 1;
        let message = &mut self.messages[id];
        let held = match level {
            Durability::Memory => message.qos == Qos::AtMostOnce,
            Durability::Written => self.house.plan.policy != FsyncPolicy::Always && self.written.contains(&id),
            Durability::Synced => self.synced.contains(&id),
        };
        assert!(held, "message {id} is confirmed as {level:?}, and is not");
        message.confirmed = true;
    }

    fn subscribed(&mut self, n: usize, cid: u64, sub: ClientSub) {
        let client = &mut self.clients[n];
        let Some(Asked::Subscribe { topic, queue }) = client.asked.remove(&cid) else { panic!("answer to nothing") };
        client.subs.insert(sub, Sub { topic, queue, held: Vec::new(), last: BTreeMap::new() });
        if let Some(name) = queue.filter(|name| name.1 == self.names[name.0]) {
            let from = self.messages.len();
            self.queues.entry(name).or_insert_with(|| Queue { from, ..Queue::default() });
        }
    }

    fn hear_message(&mut self, n: usize, deliver: &Deliver) {
        self.tally.delivered += 1;
        let ids = payload_ids(deliver.body.payload());
        let &[id] = &ids[..] else { panic!("not a message anybody sent: {deliver:?}") };
        let message = &self.messages[id];
        let client = &mut self.clients[n];
        client.undrained = true;
        let Some(sub) = client.subs.get_mut(&deliver.sub) else { return };
        assert_eq!(message.topic, sub.topic, "a message of another topic");
        if message.qos == Qos::AtLeastOnce {
            let always = self.house.plan.policy == FsyncPolicy::Always;
            let visible = if always { &self.synced } else { &self.written };
            assert!(visible.contains(&id), "message {id} is delivered before it is durable");
        }
        if deliver.attempt == 1 && !deliver.redelivered && message.ordered {
            let last = sub.last.insert(message.publisher, id);
            assert!(
                last.is_none_or(|last| last < id),
                "message {id} after {last:?} of the same publisher: {deliver:?} {message:?}"
            );
        }
        if deliver.qos == Qos::AtLeastOnce {
            sub.held.push((deliver.tag, id));
        }
        // Identities of QoS0 messages are not logged: sent again after a restart, they come again.
        let stored = message.qos == Qos::AtLeastOnce;
        if stored && let Some(queue) = sub.queue.and_then(|name| self.queues.get_mut(&name)) {
            assert!(!queue.gone.contains(&id), "message {id} was acknowledged, and is back");
            let tag = *queue.tags.entry(id).or_insert(deliver.tag);
            assert_eq!(tag, deliver.tag, "message {id} is in the queue twice");
        }
    }

    // ---- the end ------------------------------------------------------------------------------------------------

    /// Everybody leaves, and somebody comes for what every queue and every dead-letter topic still has.
    fn last_day(&mut self) {
        while let Some(client) = self.clients.pop() {
            self.house.event(usize::from(client.conn.core().0), Event::Closed { conn: client.conn });
        }
        self.rest();
        self.crash();
        let n = self.connect_to(0, Version::V2);
        let conn = self.clients[n].conn;
        let names: Vec<QueueName> = self.queues.keys().copied().collect();
        for (topic, name) in names {
            let cid = self.clients[n].ask(Asked::Subscribe { topic, queue: Some((topic, name)) });
            let (text, durable) = (TOPICS[topic].to_owned(), format!("q{name}"));
            self.house.request(conn, cid, RequestKind::Subscribe(collect(text, durable)));
        }
        for round in 0..12 {
            self.rest();
            let subs: Vec<ClientSub> = self.clients[n].subs.keys().copied().collect();
            for sub in subs {
                let some = std::mem::take(&mut self.clients[n].subs.get_mut(&sub).expect("known").held);
                if !some.is_empty() {
                    assert!(round < 11, "there is no end of it");
                    self.send_acks(n, sub, &some);
                }
            }
            self.house.advance(Duration::from_secs(4));
            (0..self.house.cores.len()).for_each(|core| self.house.tick(core));
        }
        self.rest();
        self.exhume(conn);
        self.count();
        for (name, queue) in &self.queues {
            for (id, message) in self.messages.iter().enumerate().skip(queue.from) {
                let owed = message.topic == name.0 && message.qos == Qos::AtLeastOnce && message.confirmed;
                let had = message.expires || queue.done.contains(&id) || self.buried.contains(&id);
                assert!(!owed || had, "message {id} was confirmed, and queue {name:?} never got it");
            }
        }
    }

    /// Reads all dead-letter topics.
    fn exhume(&mut self, conn: ConnId) {
        for topic in TOPICS {
            let subscribe = collect(format!("{topic}.dlq"), "dead-letters".to_owned());
            self.house.request(conn, 3, RequestKind::Subscribe(subscribe));
        }
        self.house.quiesce(true);
        for said in std::mem::take(&mut self.house.said) {
            if let Said::Reply(_, Reply::Deliver(deliver)) = said {
                self.buried.extend(payload_ids(deliver.body.payload()));
            }
        }
        self.tally.buried += self.buried.len() as u64;
    }
}

fn collect(topic: String, durable: String) -> Subscribe {
    Subscribe {
        topic: Bytes::from(topic),
        qos: Qos::AtLeastOnce,
        durable: Some(Bytes::from(durable)),
        credit: 10_000,
        priority: 0,
        start: Start::Earliest,
        ack_timeout: None,
    }
}

fn payload(id: usize, filling: usize) -> Bytes {
    Bytes::from(format!("<<{id:08}>>{}", ".".repeat(filling)))
}

/// The messages whose payloads are in `bytes`.
fn payload_ids(bytes: &[u8]) -> Vec<usize> {
    let ids = bytes.windows(12).filter(|w| w.starts_with(b"<<") && w.ends_with(b">>"));
    ids.filter_map(|w| std::str::from_utf8(&w[2..10]).ok()?.parse().ok()).collect()
}
