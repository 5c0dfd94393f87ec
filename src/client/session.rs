//! One client's state: what was asked and not yet answered, what is subscribed, what is to be sent next. Outlives connections.
//!
//! Owns: correlation ids, unconfirmed publishes, subscriptions, batches of acknowledgements, topic aliases.
//! Never: touches a socket, reads a clock, waits. `link` carries bytes and replies; handles call in under its lock.

use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use super::publish::{Confirmed, Status};
use super::{Dedup, Error};
use crate::limits;
use crate::protocol::client_side::encode_request;
use crate::protocol::code;
use crate::protocol::reply::{Deliver, Outcome, Reply, Welcome};
use crate::protocol::request::{
    Identity, Publish, RejectAction, Request, RequestKind, Subscribe, TagRanges, TopicRef, UnsubscribeMode, Version,
};
use crate::types::{ClientSub, DeliveryTag, Qos};

/// A subscription's name inside this client; the broker's id changes with each connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct SubKey(u64);

/// Counts the connections that got as far as being logged in. A delivery is worth acknowledging only on its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Generation(pub(super) u64);

/// Where the connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Down,
    Greeted,
    Authenticating,
    Up,
    /// The broker said GOAWAY: answers still come, new publishes wait for the next connection.
    Leaving,
}

/// Why a connection cannot go on.
#[derive(Debug)]
pub(super) enum Fault {
    /// Trying again may help.
    Broken(String),
    /// The key is not known there. Trying again will not help.
    Unauthorized { code: u16, text: String },
    /// No version 2 there. Trying again will not help.
    Unsupported { text: String },
}

/// What to do when a publish is answered.
struct Pending {
    publish: Publish,
    /// Its share of the window.
    cost: u32,
    /// Written to the present connection.
    sent: bool,
    answer: oneshot::Sender<Result<Confirmed, Error>>,
}

/// What another request's answer is for.
enum Control {
    Hello,
    Auth,
    Subscribe(SubKey),
    Unsubscribe(SubKey),
    Alias(Bytes),
    Acks(Vec<oneshot::Sender<Result<(), Error>>>),
}

/// A delivery waiting for the program.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) generation: Generation,
    pub(super) deliver: Deliver,
}

enum Attach {
    /// SUBSCRIBE goes out with the next connection, or is on its way.
    Wanted,
    Active(ClientSub),
    /// Nothing more will arrive.
    Ended(Option<Error>),
}

struct Leaving {
    mode: UnsubscribeMode,
    answer: Option<oneshot::Sender<Result<(), Error>>>,
}

struct Sub {
    request: Subscribe,
    attach: Attach,
    /// Waits for the first SUBSCRIBED.
    subscribed: Option<oneshot::Sender<Result<Subscribed, Error>>>,
    leaving: Option<Leaving>,
    queue: VecDeque<Arrived>,
    queued_bytes: usize,
    /// Deliveries of this connection at QoS1 that nothing was said about.
    unanswered: usize,
    /// Deliveries that the program was too slow for.
    dropped: u64,
    waker: Option<Waker>,
    acks: Ranges,
    rejects: Vec<(RejectAction, Ranges)>,
    ack_answers: Vec<oneshot::Sender<Result<(), Error>>>,
    dirty: bool,
}

/// What the broker said about a new subscription.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Subscribed {
    pub(super) resumed: bool,
    pub(super) backlog: u64,
}

/// How a topic is spelt on the present connection.
enum Spelling {
    /// Published to this often; not worth a number yet.
    Used(u32),
    /// The broker has been asked; until it answers, by name.
    Asked(u32),
    Alias(u32),
    /// The broker did not want to.
    Name,
}

pub(super) struct Session {
    client_id: u64,
    dedup: Dedup,
    use_aliases: bool,
    key: Bytes,
    phase: Phase,
    generation: Generation,
    next_cid: u64,
    next_sub: u64,
    out: Vec<u8>,
    /// Window share of publishes in `out` that will not be confirmed: free once written.
    out_unconfirmed: Room,
    pending: FxHashMap<u64, Pending>,
    controls: FxHashMap<u64, Control>,
    subs: BTreeMap<SubKey, Sub>,
    by_id: FxHashMap<ClientSub, SubKey>,
    dirty: Vec<SubKey>,
    spellings: FxHashMap<Bytes, Spelling>,
    /// The last sequence of each topic. Dense, since the broker remembers what is stored as ranges.
    sequences: FxHashMap<Bytes, u64>,
    next_alias: u32,
    welcome: Option<Welcome>,
    /// Room in the window to give back.
    freed: Room,
    /// Some queue may be crowded: reading on makes sense only if somebody waits for what is behind.
    crowded: bool,
    /// The socket is not read until the program has taken deliveries, or waits for an answer.
    paused: bool,
    /// Requests nobody waits for, publishes without confirm among them, that the broker refused.
    refused_unconfirmed: u64,
    /// Handles are gone or `close` was called: finish what is under way, take nothing new.
    pub(super) closing: bool,
    /// No connection will be made any more.
    pub(super) ended: Option<Error>,
}

/// Permits of the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Room {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

/// Publishes on a connection before their topic gets an alias.
const ALIAS_AFTER: u32 = 4;
/// Topics whose messages are numbered.
const SEQUENCES_MAX: usize = 65_536;
/// Topics whose use is counted; when full, those without an alias are forgotten.
const SPELLINGS_MAX: usize = 4 * limits::ALIASES_PER_CONN_MAX;
/// Deliveries of one subscription that may wait for the program. At QoS1 the credit is below it.
const QUEUE_MESSAGES_MAX: usize = 65_536;
/// Bytes of those at QoS0.
const QUEUE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Ranges in one ACK or REJECT.
const RANGES_PER_FRAME: usize = 1_024;
/// An output buffer grown beyond this is given back after use.
const OUT_KEPT: usize = 1024 * 1024;

impl Session {
    pub(super) fn new(client_id: u64, dedup: Dedup, use_aliases: bool, key: Bytes) -> Session {
        Session {
            client_id,
            dedup,
            use_aliases,
            key,
            phase: Phase::Down,
            generation: Generation::default(),
            next_cid: 1,
            next_sub: 1,
            out: Vec::new(),
            out_unconfirmed: Room::default(),
            pending: FxHashMap::default(),
            controls: FxHashMap::default(),
            subs: BTreeMap::new(),
            by_id: FxHashMap::default(),
            dirty: Vec::new(),
            spellings: FxHashMap::default(),
            sequences: FxHashMap::default(),
            next_alias: 1,
            welcome: None,
            freed: Room::default(),
            crowded: false,
            paused: false,
            refused_unconfirmed: 0,
            closing: false,
            ended: None,
        }
    }

    // ---- the connection's life ----

    /// A socket is open: say hello.
    pub(super) fn on_open(&mut self) {
        assert_eq!(self.phase, Phase::Down, "a connection opened over another");
        self.phase = Phase::Greeted;
        self.control(RequestKind::Hello { version: 2 }, Control::Hello);
    }

    /// The socket is gone. What can be sent again waits for the next one, the rest is told.
    pub(super) fn on_down(&mut self) {
        self.phase = Phase::Down;
        self.out.clear();
        let unwritten = std::mem::take(&mut self.out_unconfirmed);
        self.freed.messages += unwritten.messages;
        self.freed.bytes += unwritten.bytes;
        self.spellings.clear();
        self.next_alias = 1;
        self.by_id.clear();
        self.dirty.clear();
        // At most once: what may have arrived is not sent again.
        let lost = self.pending.extract_if(|_, pending| pending.sent && pending.publish.qos == Qos::AtMostOnce);
        for (_, pending) in lost {
            self.freed.messages += 1;
            self.freed.bytes += pending.cost as usize;
            drop(pending.answer.send(Err(Error::Disconnected)));
        }
        for pending in self.pending.values_mut() {
            pending.sent = false;
        }
        for (_, control) in std::mem::take(&mut self.controls) {
            if let Control::Acks(answers) = control {
                answers.into_iter().for_each(|answer| drop(answer.send(Err(Error::Disconnected))));
            }
        }
        let mut left = Vec::new();
        for (key, sub) in &mut self.subs {
            sub.unanswered = 0;
            sub.acks.clear();
            sub.rejects.clear();
            sub.dirty = false;
            sub.ack_answers.drain(..).for_each(|answer| drop(answer.send(Err(Error::Disconnected))));
            if matches!(sub.attach, Attach::Ended(_)) {
                continue;
            }
            sub.attach = Attach::Wanted;
            if sub.request.durable.is_some() {
                // The broker still has them and delivers them again.
                sub.queue.clear();
                sub.queued_bytes = 0;
            }
            // Being without a connection is all that leaving asks for, unless the broker keeps a queue to delete.
            if sub.leaving.as_ref().is_some_and(|l| l.mode == UnsubscribeMode::Detach || sub.request.durable.is_none())
            {
                left.push(*key);
            }
        }
        for key in left {
            self.end_sub(key, None);
        }
        self.crowded = false;
    }

    /// No connection will be made again: everybody who waits is told `why`.
    pub(super) fn on_end(&mut self, why: Error) {
        self.on_down();
        for (_, pending) in std::mem::take(&mut self.pending) {
            self.freed.messages += 1;
            self.freed.bytes += pending.cost as usize;
            drop(pending.answer.send(Err(why.clone())));
        }
        let keys: Vec<SubKey> = self.subs.keys().copied().collect();
        for key in keys {
            self.end_sub(key, Some(why.clone()));
        }
        self.ended = Some(why);
    }

    fn on_up(&mut self) {
        self.phase = Phase::Up;
        self.generation.0 += 1;
        let keys: Vec<SubKey> = self.subs.keys().copied().collect();
        for key in keys {
            self.send_subscribe(key);
        }
        // In the order they were published in: sequences must grow, and so must the order of delivery.
        let mut cids: Vec<u64> = self.pending.keys().copied().collect();
        cids.sort_unstable();
        for cid in cids {
            self.send_pending(cid);
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }

    pub(super) fn refused_unconfirmed(&self) -> u64 {
        self.refused_unconfirmed
    }

    /// Whether anything sent or delivered on this connection is still to be answered, by either side.
    pub(super) fn awaits_answers(&self) -> bool {
        self.pending.values().any(|pending| pending.sent) || self.subs.values().any(|sub| sub.unanswered > 0)
    }

    /// Nothing is under way: no publish unconfirmed, no request unanswered, nothing to write.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.controls.is_empty() && self.out.is_empty() && self.dirty.is_empty()
    }

    /// Whether to leave the socket unread: the broker's queues are the better place for what the program does not take,
    /// unless somebody waits for an answer, or for a delivery of another subscription, that may be behind it.
    pub(super) fn pauses_reading(&mut self) -> bool {
        self.crowded = self.crowded && self.subs.values().any(Sub::is_crowded);
        self.paused = self.crowded
            && self.pending.is_empty()
            && self.controls.is_empty()
            && self.subs.values().all(|sub| sub.waker.is_none());
        self.paused
    }

    // ---- what goes out ----

    /// Exchanges everything to be written for the empty `into`. Returns window room that is free once it is written.
    pub(super) fn take_output(&mut self, into: &mut Vec<u8>) -> Room {
        debug_assert!(into.is_empty());
        self.flush_acks();
        into.shrink_to(OUT_KEPT);
        std::mem::swap(&mut self.out, into);
        std::mem::take(&mut self.out_unconfirmed)
    }

    /// Window room that answers have freed since the last call.
    pub(super) fn take_freed(&mut self) -> Room {
        std::mem::take(&mut self.freed)
    }

    /// Asks whether the broker lives.
    pub(super) fn ping(&mut self) {
        let cid = self.cid();
        self.send(cid, RequestKind::Ping);
    }

    fn cid(&mut self) -> u64 {
        let cid = self.next_cid;
        self.next_cid += 1;
        cid
    }

    fn send(&mut self, cid: u64, kind: RequestKind) {
        encode_request(&Request { cid, kind }, Version::V2, &mut self.out)
            .expect("lengths are checked when a request is made");
    }

    fn control(&mut self, kind: RequestKind, control: Control) {
        let cid = self.cid();
        self.controls.insert(cid, control);
        self.send(cid, kind);
    }

    // ---- publishing ----

    /// Takes a publish that is to be confirmed; the answer comes through the receiver, over however many connections.
    pub(super) fn publish_confirmed(
        &mut self,
        mut publish: Publish,
        cost: u32,
    ) -> oneshot::Receiver<Result<Confirmed, Error>> {
        let (answer, answered) = oneshot::channel();
        let cid = self.cid();
        publish.confirm = true;
        if publish.identity.is_none() && publish.qos == Qos::AtLeastOnce {
            publish.identity = self.identity(&publish.topic, cid);
        }
        self.pending.insert(cid, Pending { publish, cost, sent: false, answer });
        if self.phase == Phase::Up {
            self.send_pending(cid);
        }
        answered
    }

    /// Takes a publish nobody waits for. `false`: there is no connection to write it to.
    pub(super) fn publish_unconfirmed(&mut self, publish: &Publish, cost: u32) -> bool {
        if self.phase != Phase::Up {
            return false;
        }
        let cid = self.cid();
        self.send_publish(cid, Publish { confirm: false, ..publish.clone() });
        self.out_unconfirmed.messages += 1;
        self.out_unconfirmed.bytes += cost as usize;
        true
    }

    fn identity(&mut self, topic: &TopicRef, cid: u64) -> Option<Identity> {
        match self.dedup {
            Dedup::Off => return None,
            Dedup::MessageId => {}
            Dedup::Sequence => {
                if let Some(sequence) = self.next_sequence(topic) {
                    return Some(Identity::Publisher { id: self.client_id, sequence });
                }
            }
        }
        // The correlation id serves as counter: it never repeats in this client.
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.client_id.to_be_bytes());
        id[8..].copy_from_slice(&cid.to_be_bytes());
        Some(Identity::MessageId(Bytes::copy_from_slice(&id)))
    }

    fn next_sequence(&mut self, topic: &TopicRef) -> Option<u64> {
        let TopicRef::Name(name) = topic else { return None };
        if let Some(last) = self.sequences.get_mut(name) {
            *last += 1;
            return Some(*last);
        }
        if self.sequences.len() >= SEQUENCES_MAX {
            return None;
        }
        self.sequences.insert(name.clone(), 1);
        Some(1)
    }

    fn send_pending(&mut self, cid: u64) {
        let pending = self.pending.get_mut(&cid).expect("only publishes that are pending are sent");
        pending.sent = true;
        let publish = pending.publish.clone();
        self.send_publish(cid, publish);
    }

    fn send_publish(&mut self, cid: u64, mut publish: Publish) {
        let alias = match &publish.topic {
            TopicRef::Name(name) if self.use_aliases => self.alias(name),
            _ => None,
        };
        if let Some(alias) = alias {
            publish.topic = TopicRef::Alias(alias);
        }
        self.send(cid, RequestKind::Publish(publish));
    }

    /// The topic's number, if the broker knows one. Asks for one if the topic is used often.
    fn alias(&mut self, name: &Bytes) -> Option<u32> {
        match self.spellings.get_mut(name) {
            Some(Spelling::Alias(alias)) => Some(*alias),
            Some(Spelling::Asked(_) | Spelling::Name) => None,
            Some(Spelling::Used(times)) if *times < ALIAS_AFTER => {
                *times += 1;
                None
            }
            Some(spelling) => {
                if self.next_alias as usize > limits::ALIASES_PER_CONN_MAX {
                    *spelling = Spelling::Name;
                    return None;
                }
                let alias = self.next_alias;
                self.next_alias += 1;
                *spelling = Spelling::Asked(alias);
                let topic = name.clone();
                self.control(RequestKind::Alias { alias, topic: topic.clone() }, Control::Alias(topic));
                None
            }
            None => {
                if self.spellings.len() >= SPELLINGS_MAX {
                    self.spellings.retain(|_, spelling| matches!(spelling, Spelling::Asked(_) | Spelling::Alias(_)));
                }
                self.spellings.insert(name.clone(), Spelling::Used(1));
                None
            }
        }
    }

    // ---- subscribing ----

    /// Takes a subscription; it is made on this connection and on each that follows.
    pub(super) fn subscribe(
        &mut self,
        request: Subscribe,
    ) -> Result<(SubKey, oneshot::Receiver<Result<Subscribed, Error>>), Error> {
        if self.subs.len() >= limits::SUBS_PER_CONN_MAX {
            return Err(Error::TooManySubscriptions { limit: limits::SUBS_PER_CONN_MAX });
        }
        let (answer, answered) = oneshot::channel();
        let key = SubKey(self.next_sub);
        self.next_sub += 1;
        self.subs.insert(
            key,
            Sub {
                request,
                attach: Attach::Wanted,
                subscribed: Some(answer),
                leaving: None,
                queue: VecDeque::new(),
                queued_bytes: 0,
                unanswered: 0,
                dropped: 0,
                waker: None,
                acks: Ranges::default(),
                rejects: Vec::new(),
                ack_answers: Vec::new(),
                dirty: false,
            },
        );
        if self.phase == Phase::Up {
            self.send_subscribe(key);
        }
        Ok((key, answered))
    }

    fn send_subscribe(&mut self, key: SubKey) {
        let sub = &self.subs[&key];
        if matches!(sub.attach, Attach::Wanted) {
            let request = RequestKind::Subscribe(sub.request.clone());
            self.control(request, Control::Subscribe(key));
        }
    }

    /// The next delivery; `Err` when there is none: whether there may be more.
    pub(super) fn next_delivery(&mut self, key: SubKey, waker: Option<&Waker>) -> Result<Arrived, bool> {
        let Some(sub) = self.subs.get_mut(&key) else { return Err(false) };
        if let Some(arrived) = sub.take_first() {
            sub.waker = None;
            return Ok(arrived);
        }
        if matches!(sub.attach, Attach::Ended(_)) {
            return Err(false);
        }
        if let Some(waker) = waker {
            match &mut sub.waker {
                Some(present) => present.clone_from(waker),
                None => sub.waker = Some(waker.clone()),
            }
        }
        Err(true)
    }

    /// Whether the socket is left unread although it need not be any more.
    pub(super) fn should_resume(&mut self, key: SubKey) -> bool {
        self.paused && self.subs.get(&key).is_none_or(|sub| !sub.is_crowded()) && !self.pauses_reading()
    }

    /// Why a subscription ended, if it did and not because the program asked.
    pub(super) fn sub_error(&self, key: SubKey) -> Option<Error> {
        match &self.subs.get(&key)?.attach {
            Attach::Ended(why) => why.clone(),
            _ => None,
        }
    }

    pub(super) fn sub_dropped(&self, key: SubKey) -> u64 {
        self.subs.get(&key).map_or(0, |sub| sub.dropped)
    }

    /// Sets the most unacknowledged deliveries, now and after reconnects.
    pub(super) fn set_credit(&mut self, key: SubKey, credit: u32) {
        let Some(sub) = self.subs.get_mut(&key) else { return };
        sub.request.credit = credit;
        if let Attach::Active(id) = sub.attach {
            let cid = self.cid();
            self.send(cid, RequestKind::Credit { sub: id, credit });
        }
    }

    /// Begins to leave; without `answer` nobody waits, and the subscription is forgotten as soon as it can be.
    pub(super) fn unsubscribe(
        &mut self,
        key: SubKey,
        mode: UnsubscribeMode,
        answer: Option<oneshot::Sender<Result<(), Error>>>,
    ) {
        let Some(sub) = self.subs.get_mut(&key) else {
            answer.map(|answer| answer.send(Ok(())));
            return;
        };
        sub.leaving = Some(Leaving { mode, answer });
        match sub.attach {
            Attach::Active(id) => self.send_unsubscribe(key, id, mode),
            Attach::Wanted => {
                // Only the broker's id lets one leave. There is nothing to leave if SUBSCRIBE never went out.
                let durable = sub.request.durable.is_some();
                let asked = self.controls.values().any(|control| matches!(control, Control::Subscribe(k) if *k == key));
                if !(asked || durable && mode == UnsubscribeMode::Delete) {
                    self.end_sub(key, None);
                }
            }
            Attach::Ended(_) => self.end_sub(key, None),
        }
    }

    fn send_unsubscribe(&mut self, key: SubKey, id: ClientSub, mode: UnsubscribeMode) {
        // What was acknowledged before stays acknowledged.
        self.flush_acks_of(key);
        self.control(RequestKind::Unsubscribe { sub: id, mode }, Control::Unsubscribe(key));
    }

    /// The end of a subscription. `why`: it ended by itself, and its handle may still ask.
    fn end_sub(&mut self, key: SubKey, why: Option<Error>) {
        let Some(sub) = self.subs.get_mut(&key) else { return };
        if let Attach::Active(id) = sub.attach {
            self.by_id.remove(&id);
        }
        if let Some(subscribed) = sub.subscribed.take() {
            drop(subscribed.send(Err(why.clone().unwrap_or(Error::Disconnected))));
        }
        for answer in sub.ack_answers.drain(..) {
            drop(answer.send(Err(why.clone().unwrap_or(Error::Disconnected))));
        }
        if let Some(waker) = sub.waker.take() {
            waker.wake();
        }
        match (sub.leaving.take(), why) {
            (None, why) => sub.attach = Attach::Ended(why),
            (Some(leaving), why) => {
                self.subs.remove(&key);
                if let Some(answer) = leaving.answer {
                    drop(answer.send(why.map_or(Ok(()), Err)));
                }
            }
        }
    }

    // ---- acknowledging ----

    /// Notes that a delivery is done with. Returns whether there is something to send: a delivery of an earlier
    /// connection is the broker's again, and whatever is said about it is dropped.
    pub(super) fn ack(&mut self, key: SubKey, generation: Generation, tag: u64) -> bool {
        let Some(sub) = self.live_sub(key, generation) else { return false };
        sub.acks.insert(tag);
        sub.unanswered = sub.unanswered.saturating_sub(1);
        self.mark_dirty(key);
        true
    }

    /// Like [`Session::ack`]; `answer` is told when the broker has kept the acknowledgement.
    pub(super) fn ack_confirmed(
        &mut self,
        key: SubKey,
        generation: Generation,
        tag: u64,
        answer: oneshot::Sender<Result<(), Error>>,
    ) {
        match self.live_sub(key, generation) {
            Some(sub) => {
                sub.acks.insert(tag);
                sub.unanswered = sub.unanswered.saturating_sub(1);
                sub.ack_answers.push(answer);
                self.mark_dirty(key);
            }
            None => drop(answer.send(Err(Error::Disconnected))),
        }
    }

    /// Gives a delivery back.
    pub(super) fn reject(&mut self, key: SubKey, generation: Generation, tag: u64, action: RejectAction) -> bool {
        let Some(sub) = self.live_sub(key, generation) else { return false };
        sub.unanswered = sub.unanswered.saturating_sub(1);
        match sub.rejects.iter_mut().find(|(present, _)| *present == action) {
            Some((_, ranges)) => ranges.insert(tag),
            None => {
                let mut ranges = Ranges::default();
                ranges.insert(tag);
                sub.rejects.push((action, ranges));
            }
        }
        self.mark_dirty(key);
        true
    }

    fn live_sub(&mut self, key: SubKey, generation: Generation) -> Option<&mut Sub> {
        if generation != self.generation {
            return None;
        }
        self.subs.get_mut(&key).filter(|sub| matches!(sub.attach, Attach::Active(_)) && sub.leaving.is_none())
    }

    fn mark_dirty(&mut self, key: SubKey) {
        if let Some(sub) = self.subs.get_mut(&key).filter(|sub| !sub.dirty) {
            sub.dirty = true;
            self.dirty.push(key);
        }
    }

    fn flush_acks(&mut self) {
        for key in std::mem::take(&mut self.dirty) {
            self.flush_acks_of(key);
        }
    }

    fn flush_acks_of(&mut self, key: SubKey) {
        let Some(sub) = self.subs.get_mut(&key) else { return };
        sub.dirty = false;
        let Attach::Active(id) = sub.attach else { return };
        let acks = sub.acks.take();
        let rejects = std::mem::take(&mut sub.rejects);
        let answers = std::mem::take(&mut sub.ack_answers);
        let mut frames = acks.chunks(RANGES_PER_FRAME).peekable();
        let mut answers = Some(answers).filter(|answers| !answers.is_empty());
        while let Some(ranges) = frames.next() {
            // The broker answers requests of one subscription in order: the last frame's answer speaks for all.
            let answers = if frames.peek().is_none() { answers.take() } else { None };
            let request = RequestKind::Ack { sub: id, tags: tag_ranges(ranges), confirm: answers.is_some() };
            match answers {
                Some(answers) => self.control(request, Control::Acks(answers)),
                None => {
                    let cid = self.cid();
                    self.send(cid, request);
                }
            }
        }
        for (action, mut ranges) in rejects {
            for ranges in ranges.take().chunks(RANGES_PER_FRAME) {
                let cid = self.cid();
                self.send(cid, RequestKind::Reject { sub: id, tags: tag_ranges(ranges), action });
            }
        }
    }

    // ---- what comes in ----

    /// Takes one reply of the broker.
    pub(super) fn on_reply(&mut self, reply: Reply) -> Result<(), Fault> {
        match reply {
            Reply::Welcome { cid, welcome } => match self.controls.remove(&cid) {
                Some(Control::Hello) => {
                    self.welcome = Some(welcome);
                    self.phase = Phase::Authenticating;
                    let key = self.key.clone();
                    self.control(RequestKind::Auth { key }, Control::Auth);
                    Ok(())
                }
                _ => Err(Fault::Broken("the broker greeted twice".into())),
            },
            Reply::Ok { cid } => self.on_ok(cid),
            Reply::Error { cid, code, text } => self.on_error(cid, code, &text),
            Reply::Confirm { cid, outcome } => {
                self.on_confirm(cid, outcome);
                Ok(())
            }
            Reply::Subscribed { cid, sub, resumed, backlog, .. } => {
                self.on_subscribed(cid, sub, Subscribed { resumed, backlog })
            }
            Reply::Aliased { cid, .. } => {
                if let Some(Control::Alias(topic)) = self.controls.remove(&cid)
                    && let Some(spelling) = self.spellings.get_mut(&topic)
                    && let Spelling::Asked(alias) = *spelling
                {
                    *spelling = Spelling::Alias(alias);
                }
                Ok(())
            }
            Reply::Deliver(deliver) => {
                self.on_deliver(deliver);
                Ok(())
            }
            Reply::Ping { cid } => {
                self.send(cid, RequestKind::Ignored);
                Ok(())
            }
            Reply::Pong { .. } => Ok(()),
            Reply::GoAway { code, text } => {
                tracing::info!(code, text = %String::from_utf8_lossy(&text), "the broker is about to close");
                if self.phase == Phase::Up {
                    self.phase = Phase::Leaving;
                }
                Ok(())
            }
            Reply::AckV1 { .. } => Err(Fault::Broken("the broker answered in version 1 of the protocol".into())),
        }
    }

    fn on_ok(&mut self, cid: u64) -> Result<(), Fault> {
        match self.controls.remove(&cid) {
            Some(Control::Auth) => self.on_up(),
            Some(Control::Acks(answers)) => answers.into_iter().for_each(|answer| drop(answer.send(Ok(())))),
            Some(Control::Unsubscribe(key)) => self.end_sub(key, None),
            Some(Control::Hello | Control::Subscribe(_) | Control::Alias(_)) => {
                return Err(Fault::Broken("the broker answered OK where more was asked for".into()));
            }
            None => {}
        }
        Ok(())
    }

    fn on_error(&mut self, cid: u64, code: u16, text: &[u8]) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(text).into_owned();
        let control = self.controls.remove(&cid);
        if matches!(control, Some(Control::Hello)) {
            return Err(Fault::Unsupported { text });
        }
        let refused = Error::Refused { code, text: text.clone() };
        match control {
            // Too many failures from this address, or a broker that stops: worth another try.
            Some(Control::Auth) if refused.is_transient() => return Err(Fault::Broken(refused.to_string())),
            Some(Control::Hello | Control::Auth) => return Err(Fault::Unauthorized { code, text }),
            Some(Control::Subscribe(key)) => self.end_sub(key, Some(refused)),
            // It is gone already, or stays behind: either way nothing more will arrive.
            Some(Control::Unsubscribe(key)) => self.end_sub(key, Some(refused)),
            Some(Control::Alias(topic)) => {
                self.spellings.insert(topic, Spelling::Name);
            }
            Some(Control::Acks(answers)) => {
                answers.into_iter().for_each(|answer| drop(answer.send(Err(refused.clone()))));
            }
            None if self.pending.contains_key(&cid) => self.on_rejected(cid, refused),
            None if cid == 0 && code == code::UNKNOWN => self.on_deleted(refused, &text),
            None if cid == 0 => return Err(Fault::Broken(refused.to_string())),
            None => {
                self.refused_unconfirmed += 1;
                // Late acknowledgements are everyday, the rest is not.
                match code {
                    code::UNKNOWN => tracing::debug!(error = %refused, "an acknowledgement came too late"),
                    _ => tracing::warn!(error = %refused, "the broker refused a request nobody waits for"),
                }
            }
        }
        Ok(())
    }

    /// Somebody deleted a durable subscription. The text says which: `subscription 7 was deleted`.
    fn on_deleted(&mut self, deleted: Error, text: &str) {
        let id = text.split(' ').find_map(|word| word.parse().ok()).map(ClientSub);
        match id.and_then(|id| self.by_id.get(&id).copied()) {
            Some(key) => self.end_sub(key, Some(deleted)),
            None => tracing::warn!(error = %deleted, "the broker ended something this client does not know"),
        }
    }

    fn on_confirm(&mut self, cid: u64, outcome: Outcome) {
        let (status, level, position) = match outcome {
            Outcome::Stored { level, position } => (Status::Stored, level, position),
            Outcome::Duplicate { level, position } => (Status::Duplicate, level, position),
            Outcome::Rejected { code, text } => {
                let text = String::from_utf8_lossy(&text).into_owned();
                self.on_rejected(cid, Error::Refused { code, text });
                return;
            }
        };
        if let Some(pending) = self.take_pending(cid) {
            let confirmed = Confirmed { status, level: Some(level), position: Some(position) };
            drop(pending.answer.send(Ok(confirmed)));
        }
    }

    fn on_rejected(&mut self, cid: u64, refused: Error) {
        // A broker that stops refuses publishes; the one that follows it takes them.
        if matches!(refused, Error::Refused { code: code::SHUTTING_DOWN, .. })
            && let Some(pending) = self.pending.get_mut(&cid)
        {
            pending.sent = false;
            self.phase = Phase::Leaving;
            return;
        }
        if let Some(pending) = self.take_pending(cid) {
            drop(pending.answer.send(Err(refused)));
        }
    }

    fn take_pending(&mut self, cid: u64) -> Option<Pending> {
        let pending = self.pending.remove(&cid)?;
        self.freed.messages += 1;
        self.freed.bytes += pending.cost as usize;
        Some(pending)
    }

    fn on_subscribed(&mut self, cid: u64, id: ClientSub, subscribed: Subscribed) -> Result<(), Fault> {
        let Some(Control::Subscribe(key)) = self.controls.remove(&cid) else {
            return Err(Fault::Broken("SUBSCRIBED without a SUBSCRIBE".into()));
        };
        let Some(sub) = self.subs.get_mut(&key) else { return Ok(()) };
        sub.attach = Attach::Active(id);
        self.by_id.insert(id, key);
        let taken = sub.subscribed.take().is_none_or(|answer| answer.send(Ok(subscribed)).is_ok());
        if !taken && sub.leaving.is_none() {
            // Whoever asked for it no longer waits.
            sub.leaving = Some(Leaving { mode: UnsubscribeMode::Detach, answer: None });
        }
        if let Some(mode) = sub.leaving.as_ref().map(|leaving| leaving.mode) {
            self.send_unsubscribe(key, id, mode);
        }
        Ok(())
    }

    fn on_deliver(&mut self, deliver: Deliver) {
        // An unknown id: it was on its way when the subscription ended. The broker takes it back.
        let Some(sub) = self.by_id.get(&deliver.sub).and_then(|key| self.subs.get_mut(key)) else { return };
        if sub.leaving.is_some() {
            return;
        }
        if deliver.qos == Qos::AtLeastOnce
            && (deliver.attempt > 1 || deliver.redelivered)
            && let Some(at) =
                sub.queue.iter().position(|a| a.deliver.tag == deliver.tag && a.deliver.qos == deliver.qos)
        {
            // The program has not seen the earlier attempt yet: one copy will do.
            sub.forget(at);
        }
        if sub.queue.len() >= QUEUE_MESSAGES_MAX || (sub.queued_bytes >= QUEUE_BYTES_MAX && sub.is_unreliable()) {
            // At QoS1 the broker gave this one up, or will deliver it again; at QoS0 it is lost, and counted.
            sub.forget(0);
            sub.dropped += 1;
        }
        sub.queued_bytes += deliver.body.0.len();
        sub.unanswered += usize::from(deliver.qos == Qos::AtLeastOnce);
        sub.queue.push_back(Arrived { generation: self.generation, deliver });
        self.crowded |= sub.is_crowded();
        if let Some(waker) = sub.waker.take() {
            waker.wake();
        }
    }
}

impl Sub {
    fn is_unreliable(&self) -> bool {
        self.request.qos == Qos::AtMostOnce
    }

    /// Half full, so that what one read brings still fits.
    fn is_crowded(&self) -> bool {
        self.is_unreliable() && (self.queue.len() >= QUEUE_MESSAGES_MAX / 2 || self.queued_bytes >= QUEUE_BYTES_MAX / 2)
    }

    fn take_first(&mut self) -> Option<Arrived> {
        let arrived = self.queue.pop_front()?;
        self.queued_bytes -= arrived.deliver.body.0.len();
        Some(arrived)
    }

    fn forget(&mut self, at: usize) {
        if let Some(arrived) = self.queue.remove(at) {
            self.queued_bytes -= arrived.deliver.body.0.len();
            self.unanswered = self.unanswered.saturating_sub(usize::from(arrived.deliver.qos == Qos::AtLeastOnce));
        }
    }
}

fn tag_ranges(ranges: &[(u64, u64)]) -> TagRanges {
    TagRanges(ranges.iter().map(|&(from, to)| (DeliveryTag(from), DeliveryTag(to))).collect())
}

/// A set of tags as inclusive ranges. Mostly filled in order, then it is one range.
#[derive(Debug, Default)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    fn insert(&mut self, tag: u64) {
        match self.0.last_mut() {
            Some((_, to)) if to.checked_add(1) == Some(tag) => *to = tag,
            Some((from, to)) if (*from..=*to).contains(&tag) => {}
            _ => self.0.push((tag, tag)),
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    /// The ranges in order and without neighbours that touch; leaves none.
    fn take(&mut self) -> Vec<(u64, u64)> {
        let mut ranges = std::mem::take(&mut self.0);
        ranges.sort_unstable();
        ranges.dedup_by(|next, before| {
            let joins = next.0 <= before.1.saturating_add(1);
            if joins {
                before.1 = before.1.max(next.1);
            }
            joins
        });
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_in_any_order_become_the_fewest_ranges() {
        let mut ranges = Ranges::default();
        for tag in [1, 2, 3, 7, 5, 4, 3, 10, 9, 12] {
            ranges.insert(tag);
        }
        assert_eq!(ranges.take(), [(1, 5), (7, 7), (9, 10), (12, 12)]);
        assert_eq!(ranges.take(), []);
    }
}
