//! A client: what it has asked, what it holds, and what it does next.
//!
//! Owns: the bytes it sends. It knows only what it has heard; what the broker has said in the meantime is the business of
//! `hearing`. It sends an unconfirmed publish again, with the same identity, whenever it has connected anew.

use std::collections::{BTreeMap, BTreeSet};

use blipmq::protocol::client_side::encode_request;
use blipmq::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, Start, Subscribe, TagRanges, TopicRef, UnsubscribeMode,
    Version,
};
use blipmq::time::{Duration, Instant};
use blipmq::types::{ClientSub, DeliveryTag, Qos};
use bytes::Bytes;

use crate::message::MessageId;
use crate::oracle::{Event, Excuse, SubKind, Traits};
use crate::rng::Rng;
use crate::sim::books::{Name, SubRef};
use crate::sim::hearing::DEAD_LETTERS;
use crate::sim::plan::{IdentityKind, Role, SUFFIX, TOPICS};
use crate::sim::world::{Item, World};

pub struct Client {
    pub role: Role,
    pub rng: Rng,
    pub key: String,
    pub link: Option<u32>,
    pub session: Session,
    pub publishers: Vec<Publisher>,
    /// The names of its own durable subscriptions are counted.
    pub names: u32,
    pub last_heard: Instant,
    /// Counts its plans: an older one on the agenda is void.
    pub plan: u64,
}

/// What it knows on its present connection.
#[derive(Default)]
pub struct Session {
    pub logged_in: bool,
    pub going_away: bool,
    pub next_cid: u64,
    /// Sent, and not heard of yet.
    pub awaited: BTreeSet<u64>,
    pub subs: BTreeMap<ClientSub, Mine>,
    pub aliases: BTreeMap<u32, u16>,
    /// v1: topics it is subscribed to, or has asked to be.
    pub topics: BTreeSet<u16>,
}

/// A subscription, as its consumer sees it.
pub struct Mine {
    pub subject: SubRef,
    pub held: BTreeMap<DeliveryTag, MessageId>,
}

/// Messages of one line of sequence numbers.
pub struct Publisher {
    /// The oracle's number; also its identity towards the broker.
    pub number: u16,
    pub topic: u16,
    pub identity: IdentityKind,
    pub next_seq: u64,
    /// Sent, and no answer heard.
    pub pending: BTreeMap<u64, Letter>,
    pub confirmed: Vec<(u64, Letter)>,
}

/// How a message is sent, each time.
#[derive(Clone, Copy, Debug)]
pub struct Letter {
    pub qos: Qos,
    pub confirm: bool,
    /// `None`: the broker's default.
    pub ttl_ms: Option<u64>,
    pub delay_ms: u64,
    pub priority: u8,
}

/// What a request was about, for whoever hears the answer.
#[derive(Clone, Debug)]
pub enum Asked {
    Hello,
    Auth,
    Publish {
        publisher: u16,
        seq: u64,
    },
    Subscribe(SubRef),
    /// `sure`: an OK says that exactly these are finished.
    Ack {
        subject: SubRef,
        ids: Vec<MessageId>,
        sure: bool,
    },
    Unsubscribe {
        sub: ClientSub,
        subject: SubRef,
        delete: bool,
    },
    /// v1: what its PONG vouches for.
    Ping {
        publishes: Vec<(u16, u64)>,
        acks: Vec<(u64, u16, MessageId)>,
    },
    Alias,
    Malformed,
    /// Answered only if the subscription is gone.
    Small,
    /// Answered by a delivery or not at all.
    Poll,
}

const FIRST_CID: u64 = 1 << 40;
/// A client publishes at most so many before it only listens.
const PUBLISHES_MAX: u64 = 150;
const BURST_MAX: u64 = 6;
const RECONNECT_MS: u64 = 700;

impl Client {
    pub fn new(number: usize, role: Role) -> Client {
        Client {
            rng: Rng::new(role.draws),
            key: format!("key-{number}"),
            link: None,
            session: Session::default(),
            publishers: Vec::new(),
            names: 0,
            last_heard: Instant(0),
            plan: 0,
            role,
        }
    }

    fn v1(&self) -> bool {
        self.role.version == Version::V1
    }

    /// Nothing that it has published is without an answer.
    pub fn is_answered(&self) -> bool {
        self.publishers.iter().all(|publisher| publisher.pending.is_empty())
    }

    fn cid(&mut self) -> u64 {
        self.session.next_cid += 1;
        FIRST_CID + self.session.next_cid
    }
}

impl World {
    // ---- connecting ---------------------------------------------------------------------------------------------

    /// Its next action comes after about `ms`.
    pub fn plan_act(&mut self, n: usize, ms: u64) {
        let client = &mut self.clients[n];
        client.plan += 1;
        let plan = client.plan;
        let after = Duration(client.rng.between(ms * 200_000, ms * 1_800_000));
        let at = self.now + after;
        self.push(at, Item::Act { client: n, plan });
    }

    pub fn act(&mut self, n: usize) {
        if self.clients[n].link.is_none() {
            self.try_connect(n);
            return;
        }
        let client = &self.clients[n];
        let patience = if self.healing { Duration::from_secs(30) } else { client.role.patience };
        let silent = self.now - client.last_heard > patience;
        if silent && (!client.session.logged_in || !client.session.awaited.is_empty()) {
            self.say(|| format!("client {n} loses its patience"));
            self.leave(n, true);
            return;
        }
        if client.session.logged_in {
            if self.healing { self.mend(n) } else { self.do_something(n) }
        }
        let pace = match self.healing {
            false => self.clients[n].role.pace_ms,
            true if self.now - self.last_delivery < Duration::from_secs(2) => 40,
            true => 1_000,
        };
        if self.clients[n].link.is_some() {
            self.plan_act(n, pace);
        }
    }

    fn try_connect(&mut self, n: usize) {
        if self.done {
            return;
        }
        let retry = if self.healing { 50 } else { self.clients[n].rng.between(20, 300) };
        if !self.machine.is_up() || !self.machine.is_ready() || self.stopping {
            self.plan_act(n, retry);
            return;
        }
        let link = self.open_link(n);
        let client = &mut self.clients[n];
        client.link = Some(link);
        client.session = Session::default();
        client.last_heard = self.now;
        for publisher in &mut client.publishers {
            // Without an identity nothing is sent twice, and another connection is another publisher.
            if publisher.identity == IdentityKind::None {
                publisher.pending.clear();
            }
        }
        client.publishers.retain(|publisher| publisher.identity != IdentityKind::None);
        let version = if client.v1() { 1 } else { 2 };
        let key = Bytes::from(client.key.clone().into_bytes());
        self.ask(n, Asked::Hello, RequestKind::Hello { version });
        self.ask(n, Asked::Auth, RequestKind::Auth { key });
        self.plan_act(n, 20);
    }

    /// The client gives its connection up: politely, or with a reset.
    pub fn leave(&mut self, n: usize, reset: bool) {
        let Some(number) = self.clients[n].link.take() else { return };
        self.abandon(number, reset);
        self.clients[n].session = Session::default();
        let wait = if self.healing { 20 } else { self.clients[n].rng.between(1, RECONNECT_MS) };
        self.plan_act(n, wait);
    }

    /// The client has noticed that the other end is gone.
    pub fn on_disconnected(&mut self, n: usize) {
        self.leave(n, true);
    }

    pub fn on_logged_in(&mut self, n: usize) {
        self.clients[n].session.logged_in = true;
        self.resend(n);
        if self.clients[n].v1() || self.healing {
            return;
        }
        for name in self.books.own_names(n) {
            if self.clients[n].rng.percent(80) {
                self.subscribe_named(n, name);
            }
        }
    }

    fn resend(&mut self, n: usize) {
        let again: Vec<(usize, u64, Letter)> = (0..)
            .zip(&self.clients[n].publishers)
            .flat_map(|(p, publisher)| publisher.pending.iter().map(move |(seq, letter)| (p, *seq, *letter)))
            .collect();
        for (p, seq, letter) in again {
            self.send_letter(n, p, seq, letter);
        }
    }

    // ---- asking -------------------------------------------------------------------------------------------------

    /// Sends a request; the answer will be heard as one to `what`.
    pub fn ask(&mut self, n: usize, what: Asked, kind: RequestKind) -> u64 {
        let cid = self.clients[n].cid();
        self.ask_as(n, cid, what, kind);
        cid
    }

    fn ask_as(&mut self, n: usize, cid: u64, what: Asked, kind: RequestKind) {
        let Some(link) = self.clients[n].link else { return };
        self.say(|| format!("client {n} > {}", tell(cid, &what, &kind)));
        // A POLL is answered by a delivery or not at all.
        if !matches!(kind, RequestKind::Poll { .. }) {
            if !matches!(what, Asked::Small) {
                self.clients[n].session.awaited.insert(cid);
            }
            self.asked.insert((link, cid), what);
        }
        self.send(n, cid, kind);
    }

    /// Sends a request that has no answer.
    fn send(&mut self, n: usize, cid: u64, kind: RequestKind) {
        let version = self.clients[n].role.version;
        let mut bytes = Vec::new();
        encode_request(&Request { cid, kind }, version, &mut bytes).expect("a request of this dialect");
        self.write(n, bytes);
    }

    // ---- doing --------------------------------------------------------------------------------------------------

    fn do_something(&mut self, n: usize) {
        let features = self.script.features;
        let client = &mut self.clients[n];
        let publishes = client.role.publishes;
        let die = client.rng.between(0, 99);
        if die < publishes {
            return self.publish_some(n);
        }
        match (client.v1(), client.rng.between(0, 99)) {
            (true, 0..45) => self.poll(n),
            (true, 45..75) => self.acknowledge(n),
            (true, 75..85) => self.ping(n),
            (true, 85..97) => self.subscribe_v1(n),
            (false, 0..55) => self.acknowledge(n),
            (false, 55..72) => self.subscribe(n),
            (false, 72..78) if features.reject => self.reject(n),
            (false, 78..81) if features.credit => self.credit(n),
            (false, 81..85) if features.detach => self.unsubscribe(n, UnsubscribeMode::Detach),
            (false, 85..87) if features.delete => self.unsubscribe(n, UnsubscribeMode::Delete),
            (false, 87..90) => self.ping(n),
            (false, 90..93) if features.alias => self.alias(n),
            (false, 93..95) if features.resend_confirmed => self.resend_confirmed(n),
            (_, 97..98) if features.malformed => self.malformed(n),
            (_, 98..100) => {
                self.say(|| format!("client {n} leaves"));
                self.leave(n, false);
            }
            _ => {}
        }
    }

    /// After the chaos: what is open is brought to its end.
    fn mend(&mut self, n: usize) {
        let client = &mut self.clients[n];
        let subs: Vec<ClientSub> =
            client.session.subs.iter().filter(|(_, mine)| !mine.held.is_empty()).map(|(id, _)| *id).collect();
        let v1 = client.v1();
        for sub in subs {
            let held: Vec<(DeliveryTag, MessageId)> =
                std::mem::take(&mut self.clients[n].session.subs.get_mut(&sub).expect("listed").held)
                    .into_iter()
                    .collect();
            if v1 {
                held.into_iter().for_each(|one| self.send_acks(n, sub, vec![one], true));
            } else {
                self.send_acks(n, sub, held, true);
            }
        }
        if v1 {
            let lineages = self.books.lineages(n);
            let in_the_way = |mine: &Mine| !mine.subject.kind.acks && lineages.contains(&mine.subject.topic);
            if self.clients[n].session.subs.values().any(in_the_way) {
                // One subscription of a topic on a connection is all that a v1 client can tell apart.
                return self.leave(n, false);
            }
            for topic in lineages {
                if !self.clients[n].session.topics.contains(&topic) {
                    self.subscribe_lineage(n, topic, Qos::AtLeastOnce);
                }
            }
            let subs: Vec<ClientSub> = self.clients[n].session.subs.keys().copied().collect();
            for sub in subs {
                self.ask(n, Asked::Poll, RequestKind::Poll { sub });
            }
            let unvouched = self.clients[n].link.is_some_and(|link| self.unvouched.contains_key(&link));
            if unvouched && self.clients[n].session.awaited.is_empty() {
                self.ping(n);
            }
        }
        self.answer_open(n);
        if self.collector == Some(n) {
            self.collect(n);
        }
    }

    /// What was refused, and what was never answered, is sent once more.
    fn answer_open(&mut self, n: usize) {
        let Some(link) = self.clients[n].link else { return };
        let asked: BTreeSet<(u16, u64)> = self
            .asked
            .range((link, 0)..=(link, u64::MAX))
            .filter_map(|(_, asked)| match asked {
                Asked::Publish { publisher, seq } => Some((*publisher, *seq)),
                _ => None,
            })
            .collect();
        let open: Vec<(usize, u64, Letter)> = (0..)
            .zip(&self.clients[n].publishers)
            .filter(|(_, publisher)| publisher.identity != IdentityKind::None)
            .flat_map(|(p, publisher)| {
                publisher.pending.iter().map(move |(seq, letter)| (p, publisher.number, *seq, *letter))
            })
            .filter(|(_, number, seq, _)| !asked.contains(&(*number, *seq)))
            .map(|(p, _, seq, letter)| (p, seq, letter))
            .collect();
        for (p, seq, letter) in open {
            self.send_letter(n, p, seq, letter);
        }
    }

    // ---- publishing ---------------------------------------------------------------------------------------------

    fn publish_some(&mut self, n: usize) {
        if self.clients[n].session.going_away {
            return;
        }
        let client = &mut self.clients[n];
        let sent: u64 = client.publishers.iter().map(|p| p.next_seq).sum();
        if sent > PUBLISHES_MAX {
            return;
        }
        let topic = *client.rng.pick(&client.role.topics);
        let burst = if client.rng.percent(30) { client.rng.between(2, BURST_MAX) } else { 1 };
        let identity = if client.v1() { IdentityKind::None } else { client.role.identity };
        let known = client.publishers.iter().position(|p| p.topic == topic);
        let p = match known {
            Some(p) => p,
            None => {
                let number = self.books.next_publisher();
                self.observe(Event::Joins { topic });
                let publishers = &mut self.clients[n].publishers;
                let (pending, confirmed) = (BTreeMap::new(), Vec::new());
                publishers.push(Publisher { number, topic, identity, next_seq: 0, pending, confirmed });
                publishers.len() - 1
            }
        };
        for _ in 0..burst {
            self.publish(n, p);
        }
    }

    fn publish(&mut self, n: usize, p: usize) {
        let features = self.script.features;
        let client = &mut self.clients[n];
        let (v1, rng) = (client.v1(), &mut client.rng);
        let mut letter = Letter {
            qos: if features.qos0 && rng.percent(25) { Qos::AtMostOnce } else { Qos::AtLeastOnce },
            confirm: !(v1 || features.unconfirmed && rng.percent(20)),
            ttl_ms: None,
            delay_ms: 0,
            priority: 0,
        };
        if !v1 {
            if features.ttl && rng.percent(15) {
                letter.ttl_ms = Some(*rng.pick(&[0, 1, 40, 300, 2_000]));
            }
            if features.delay && letter.qos == Qos::AtLeastOnce && rng.percent(10) {
                letter.delay_ms = rng.between(1, 2_500);
            }
            if features.priority && rng.percent(15) {
                letter.priority = rng.between(1, 9) as u8;
            }
        }
        let publisher = &mut client.publishers[p];
        publisher.next_seq += 1;
        let (seq, number) = (publisher.next_seq, publisher.number);
        if letter.confirm || (v1 && letter.qos == Qos::AtLeastOnce) {
            publisher.pending.insert(seq, letter);
        }
        let settings = &self.script.machine.settings;
        let default = if v1 { settings.v1_ttl } else { settings.ttl };
        let ttl_ms = letter.ttl_ms.unwrap_or(default.as_millis());
        // The priority of a QoS0 message means nothing.
        let class = if letter.qos == Qos::AtMostOnce { 0 } else { letter.priority };
        let class = (letter.delay_ms == 0).then_some(class);
        let traits = Traits {
            at_most_once: letter.qos == Qos::AtMostOnce,
            class,
            ttl_ms,
            delay_ms: letter.delay_ms,
            sent_ms: self.broker_ms(),
        };
        self.books.traits(number, seq, traits);
        self.observe(Event::Special { publisher: number, seq, traits });
        self.send_letter(n, p, seq, letter);
    }

    /// For the first time or again.
    fn send_letter(&mut self, n: usize, p: usize, seq: u64, letter: Letter) {
        let client = &mut self.clients[n];
        let publisher = &client.publishers[p];
        let (number, topic) = (publisher.number, publisher.topic);
        let identity = match publisher.identity {
            IdentityKind::None => None,
            IdentityKind::Sequence => Some(Identity::Publisher { id: u64::from(number), sequence: seq }),
            IdentityKind::MessageId => Some(Identity::MessageId(Bytes::from(format!("{number}/{seq}")))),
        };
        let alias = client.session.aliases.iter().find(|(_, named)| **named == topic).map(|(alias, _)| *alias);
        let alias = alias.filter(|_| client.rng.percent(70));
        let publish = Publish {
            topic: alias.map_or_else(|| TopicRef::Name(topic_name(topic)), TopicRef::Alias),
            qos: letter.qos,
            confirm: letter.confirm,
            ttl: letter.ttl_ms.map(Duration::from_millis),
            delay: Duration::from_millis(letter.delay_ms),
            priority: letter.priority,
            identity,
            options: Bytes::new(),
            payload: Bytes::from(MessageId { publisher: number, topic, seq }.encode()),
        };
        // Broker time may begin anew behind what nobody has stored.
        let ms = self.broker_ms();
        if let Some(traits) = self.books.traits_of(number, seq).filter(|traits| ms < traits.sent_ms) {
            let traits = Traits { sent_ms: ms, ..traits };
            self.books.traits(number, seq, traits);
            self.observe(Event::Special { publisher: number, seq, traits });
        }
        self.books.sent_again(number, seq);
        self.observe(Event::Invoke { publisher: number, seq });
        let cid = self.clients[n].cid();
        let v1_qos1 = self.clients[n].v1() && letter.qos == Qos::AtLeastOnce;
        if v1_qos1 && let Some(link) = self.clients[n].link {
            self.unvouched.entry(link).or_default().0.push((number, seq));
        }
        self.ask_as(n, cid, Asked::Publish { publisher: number, seq }, RequestKind::Publish(publish));
        if !letter.confirm {
            self.clients[n].session.awaited.remove(&cid);
        }
    }

    /// A careless client: sends again what was confirmed.
    fn resend_confirmed(&mut self, n: usize) {
        let client = &mut self.clients[n];
        let candidates: Vec<(usize, u64, Letter)> = (0..)
            .zip(&client.publishers)
            .filter(|(_, publisher)| publisher.identity != IdentityKind::None)
            .flat_map(|(p, publisher)| publisher.confirmed.iter().map(move |(seq, letter)| (p, *seq, *letter)))
            .filter(|(_, _, letter)| letter.qos == Qos::AtLeastOnce)
            .collect();
        if !candidates.is_empty() {
            let (p, seq, letter) = *client.rng.pick(&candidates);
            self.send_letter(n, p, seq, letter);
        }
    }

    fn alias(&mut self, n: usize) {
        let client = &mut self.clients[n];
        let topic = *client.rng.pick(&client.role.topics);
        let alias = client.rng.between(0, 3) as u32;
        client.session.aliases.insert(alias, topic);
        self.ask(n, Asked::Alias, RequestKind::Alias { alias, topic: topic_name(topic) });
    }

    // ---- subscribing --------------------------------------------------------------------------------------------

    fn subscribe(&mut self, n: usize) {
        let features = self.script.features;
        let client = &mut self.clients[n];
        let topic = *client.rng.pick(&client.role.topics);
        let rng = &mut client.rng;
        if client.session.subs.len() >= 6 {
            return;
        }
        if features.ephemeral && rng.percent(25) {
            let qos0 = features.qos0 && rng.percent(40);
            let earliest = features.earliest && rng.percent(30);
            let kind = SubKind { acks: !qos0, named: false, earliest: earliest && !qos0 };
            let number = self.books.new_sub(topic);
            self.observe(Event::Asks { topic, kind });
            return self.send_subscribe(n, SubRef { number, topic, name: None, kind, asked: 0 });
        }
        let pool = features.shared && rng.percent(50);
        let name = if pool { self.books.pool(topic) } else { Name { topic, owner: Some(n), count: client.names } };
        self.subscribe_named(n, name);
    }

    pub fn subscribe_named(&mut self, n: usize, name: Name) {
        let features = self.script.features;
        let attached = |mine: &Mine| mine.subject.name == Some(name);
        let client = &mut self.clients[n];
        if client.session.subs.values().any(attached) && !(features.shared && client.rng.percent(30)) {
            return;
        }
        let earliest = features.earliest && client.rng.percent(30);
        let subject = match self.books.named(name) {
            Some(subject) => subject,
            None => {
                let kind = SubKind { acks: true, named: true, earliest };
                self.observe(Event::Asks { topic: name.topic, kind });
                self.books.name(name, kind)
            }
        };
        self.send_subscribe(n, subject);
    }

    fn subscribe_v1(&mut self, n: usize) {
        let features = self.script.features;
        let client = &mut self.clients[n];
        let topic = *client.rng.pick(&client.role.topics);
        if client.session.topics.contains(&topic) {
            return;
        }
        let qos0 = features.qos0 && client.rng.percent(20);
        self.subscribe_lineage(n, topic, if qos0 { Qos::AtMostOnce } else { Qos::AtLeastOnce });
    }

    fn subscribe_lineage(&mut self, n: usize, topic: u16, qos: Qos) {
        if qos == Qos::AtMostOnce {
            let kind = SubKind { acks: false, named: false, earliest: false };
            let number = self.books.new_sub(topic);
            self.observe(Event::Asks { topic, kind });
            self.clients[n].session.topics.insert(topic);
            return self.send_subscribe(n, SubRef { number, topic, name: None, kind, asked: 0 });
        }
        let name = Name::lineage(topic, n);
        // Its old queue is an orphan only when the broker has noticed that the old connection is gone.
        if self.books.is_consumed(name) {
            return;
        }
        let subject = match self.books.named(name) {
            Some(subject) => subject,
            None => {
                // An orphan that may have ended may also have gone on: then it has what came before.
                let kind = SubKind { acks: true, named: false, earliest: self.orphans_end() };
                self.observe(Event::Asks { topic, kind });
                self.books.name(name, kind)
            }
        };
        self.clients[n].session.topics.insert(topic);
        self.send_subscribe(n, subject);
    }

    pub fn send_subscribe(&mut self, n: usize, mut subject: SubRef) {
        let Some(link) = self.clients[n].link else { return };
        let cid = self.clients[n].cid();
        subject.asked = cid;
        if self.gives_up() && subject.number != DEAD_LETTERS {
            self.observe(Event::Excused(Excuse::GivesUp { sub: subject.number }));
        }
        if let Some(name) = subject.name
            && self.books.consume(name, link, cid)
        {
            self.observe(Event::Excused(Excuse::Shared { sub: subject.number }));
        }
        let healing = self.healing;
        let client = &mut self.clients[n];
        let v2 = !client.v1();
        let dead = subject.number == DEAD_LETTERS;
        let durable = subject.name.filter(|_| v2).map(|name| Bytes::from(name.text()));
        let durable = durable.or_else(|| dead.then(|| Bytes::from_static(b"dead-letters")));
        let credit = if healing { 500 } else { client.rng.between(1, 20) as u32 };
        let subscribe = Subscribe {
            topic: if dead { dead_letter_topic(subject.topic) } else { topic_name(subject.topic) },
            qos: if subject.kind.acks { Qos::AtLeastOnce } else { Qos::AtMostOnce },
            durable,
            credit,
            priority: if v2 { client.rng.between(0, 1) as u8 } else { 0 },
            start: if subject.kind.earliest { Start::Earliest } else { Start::New },
            ack_timeout: (v2 && !healing && client.rng.percent(20))
                .then(|| Duration::from_millis(client.rng.between(20, 2_000))),
        };
        self.ask_as(n, cid, Asked::Subscribe(subject), RequestKind::Subscribe(subscribe));
    }

    fn some_sub(&mut self, n: usize, wanted: impl Fn(&Mine) -> bool) -> Option<ClientSub> {
        let client = &mut self.clients[n];
        let all: Vec<ClientSub> =
            client.session.subs.iter().filter(|(_, mine)| wanted(mine)).map(|(sub, _)| *sub).collect();
        (!all.is_empty()).then(|| *client.rng.pick(&all))
    }

    fn acknowledge(&mut self, n: usize) {
        let Some(sub) = self.some_sub(n, |mine| !mine.held.is_empty()) else { return };
        let features = self.script.features;
        let client = &mut self.clients[n];
        let v1 = client.v1();
        let rng = &mut client.rng;
        let held = &mut client.session.subs.get_mut(&sub).expect("found").held;
        let many = if features.many_acks && !v1 { rng.between(1, held.len() as u64) } else { 1 };
        // Mostly the oldest, sometimes any.
        let any = rng.percent(30);
        let mut some = Vec::new();
        for _ in 0..many {
            let at = if any { rng.between(0, held.len() as u64 - 1) as usize } else { 0 };
            let tag = *held.keys().nth(at).expect("it is that long");
            some.push((tag, held.remove(&tag).expect("it is there")));
        }
        if features.forget && rng.percent(10) {
            return;
        }
        let confirm = rng.percent(70);
        self.send_acks(n, sub, some, confirm);
    }

    /// - `some`: one only, in v1.
    fn send_acks(&mut self, n: usize, sub: ClientSub, mut some: Vec<(DeliveryTag, MessageId)>, confirm: bool) {
        let Some(link) = self.clients[n].link else { return };
        let v1 = self.clients[n].v1();
        some.sort_unstable_by_key(|(tag, _)| *tag);
        let subject = self.clients[n].session.subs[&sub].subject.clone();
        let ids: Vec<MessageId> = some.iter().map(|(_, id)| *id).collect();
        for id in ids.iter().filter(|_| subject.number != DEAD_LETTERS) {
            self.observe(Event::AckSent { sub: subject.number, publisher: id.publisher, seq: id.seq });
        }
        if v1 {
            let (tag, id) = some[0];
            self.unvouched.entry(link).or_default().1.push((tag.0, subject.number, id));
            self.say(|| format!("client {n} > ACK {tag:?} of {sub:?} {id:?}"));
            return self.send(n, tag.0, RequestKind::Ack { sub, tags: TagRanges::one(tag), confirm: false });
        }
        // Neighbours are joined to a range, which takes only what this consumer had last.
        let join = self.clients[n].rng.percent(50);
        let mut ranges: Vec<(DeliveryTag, DeliveryTag)> = Vec::new();
        for (tag, _) in &some {
            match ranges.last_mut() {
                Some((_, last)) if join && last.0 + 1 == tag.0 => *last = *tag,
                _ => ranges.push((*tag, *tag)),
            }
        }
        let singles = ranges.iter().all(|(first, last)| first == last);
        let doomed = |id: &MessageId| self.books.may_die(subject.number, *id);
        let shared = subject.name.is_some_and(|name| self.books.is_shared(name));
        let sure = ids.len() == 1 || (!ids.iter().any(doomed) && (singles || !shared));
        let tags = TagRanges(ranges);
        if confirm {
            self.ask(n, Asked::Ack { subject, ids, sure }, RequestKind::Ack { sub, tags, confirm });
        } else {
            self.say(|| format!("client {n} > ACK {tags:?} of {sub:?} {ids:?}"));
            let cid = self.clients[n].cid();
            self.send(n, cid, RequestKind::Ack { sub, tags, confirm });
        }
    }

    fn reject(&mut self, n: usize) {
        let Some(sub) = self.some_sub(n, |mine| !mine.held.is_empty()) else { return };
        let features = self.script.features;
        let client = &mut self.clients[n];
        let action = match client.rng.between(0, 2) {
            0 => RejectAction::Requeue,
            1 => RejectAction::RequeueAfter(Duration::from_millis(client.rng.between(0, 2_000))),
            _ if features.dead_letter => RejectAction::DeadLetter,
            _ => RejectAction::Requeue,
        };
        let mine = client.session.subs.get_mut(&sub).expect("found");
        let number = mine.subject.number;
        let (tag, id) = mine.held.pop_first().expect("it holds some");
        if action == RejectAction::DeadLetter {
            self.books.doom(number, id);
        }
        self.say(|| format!("client {n} rejects {id:?}"));
        self.ask(n, Asked::Small, RequestKind::Reject { sub, tags: TagRanges::one(tag), action });
    }

    fn credit(&mut self, n: usize) {
        let Some(sub) = self.some_sub(n, |mine| mine.subject.kind.acks) else { return };
        let client = &mut self.clients[n];
        let credit = client.rng.between(0, 20) as u32;
        self.ask(n, Asked::Small, RequestKind::Credit { sub, credit });
    }

    fn unsubscribe(&mut self, n: usize, mode: UnsubscribeMode) {
        let Some(sub) = self.some_sub(n, |_| true) else { return };
        let mine = self.clients[n].session.subs.remove(&sub).expect("found");
        let subject = mine.subject;
        let delete = mode == UnsubscribeMode::Delete;
        if delete || subject.name.is_none() {
            self.observe(Event::Excused(Excuse::Ends { sub: subject.number }));
        }
        if delete && let Some(name) = subject.name {
            self.books.deleting(name);
            if name.owner == Some(n) {
                self.clients[n].names += 1;
            }
        }
        self.ask(n, Asked::Unsubscribe { sub, subject, delete }, RequestKind::Unsubscribe { sub, mode });
    }

    fn poll(&mut self, n: usize) {
        match self.some_sub(n, |_| true) {
            Some(sub) => _ = self.ask(n, Asked::Poll, RequestKind::Poll { sub }),
            None => self.subscribe_v1(n),
        }
    }

    fn ping(&mut self, n: usize) {
        let Some(link) = self.clients[n].link else { return };
        let (publishes, acks) = self.unvouched.remove(&link).unwrap_or_default();
        self.ask(n, Asked::Ping { publishes, acks }, RequestKind::Ping);
    }

    pub fn pong(&mut self, n: usize, cid: u64) {
        self.send(n, cid, RequestKind::Ignored);
    }

    /// A frame that is whole, and whose payload is not.
    fn malformed(&mut self, n: usize) {
        let cid = self.clients[n].cid();
        let Some(link) = self.clients[n].link else { return };
        let kind: u8 = if self.clients[n].v1() { 0x04 } else { 0x15 };
        let mut bytes = Vec::new();
        crate::wire::put_frame(&mut bytes, kind, cid, |payload| payload.extend_from_slice(&[1, 0, 0]));
        self.say(|| format!("client {n} > a malformed SUBSCRIBE, {cid:x}"));
        self.clients[n].session.awaited.insert(cid);
        self.asked.insert((link, cid), Asked::Malformed);
        self.write(n, bytes);
    }
}

pub fn topic_name(topic: u16) -> Bytes {
    Bytes::from_static(TOPICS[usize::from(topic)].as_bytes())
}

fn dead_letter_topic(topic: u16) -> Bytes {
    Bytes::from(format!("{}{SUFFIX}", TOPICS[usize::from(topic)]))
}

/// A request in words.
fn tell(cid: u64, what: &Asked, kind: &RequestKind) -> String {
    let cid = cid & 0xffff;
    match (what, kind) {
        (Asked::Publish { publisher, seq }, RequestKind::Publish(p)) => format!(
            "PUBLISH p{publisher} #{seq} to {:?}, {:?}, confirm {}, ttl {:?}, delay {} ms, priority {}, {} bytes ({cid})",
            p.topic,
            p.qos,
            p.confirm,
            p.ttl.map(|ttl| ttl.as_millis()),
            p.delay.as_millis(),
            p.priority,
            p.payload.len()
        ),
        (Asked::Subscribe(subject), RequestKind::Subscribe(s)) => format!(
            "SUBSCRIBE s{} to {:?} as {:?}, {:?}, credit {}, {:?} ({cid})",
            subject.number, s.topic, s.durable, s.qos, s.credit, s.start
        ),
        _ => format!("{kind:?} ({cid})"),
    }
}
