//! A client: what it has asked, what it holds, and what it does next.
//!
//! Owns: the bytes it sends. It knows only what it has heard; what the broker has said in the meantime is the business of
//! `hearing`. It sends an unconfirmed publish again, with the same identity, whenever it has connected anew.

/// Subscribing, acknowledging, rejecting.
mod consume;
/// Publishing.
mod publish;

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
