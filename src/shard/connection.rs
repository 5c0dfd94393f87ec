//! The connections of this core: greeted -> authenticated -> open.
//!
//! Owns: what each client may do, which of its subscriptions lives where, and requests that must wait. A request leaves
//! as an `Ask` to the topic's core; what comes back leaves as a reply. Never: knows a topic's state.
//!
//! A v1 client is answered strictly one request after the other (V1 2.3): while a SUBSCRIBE, POLL or ACK is at its topic,
//! the requests behind it wait. A v2 client's requests only wait for room.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::access::{Grant, KeyRing};
use crate::limits;
use crate::metrics::CoreMetrics;
use crate::planted::planted;
use crate::protocol::code;
use crate::protocol::frame::FrameError;
use crate::protocol::reply::{Outcome, Reply, Welcome};
use crate::protocol::request::{Publish, Request, RequestKind, Subscribe, TopicRef, UnsubscribeMode, Version};
use crate::shard::effects::{CloseReason, Effects};
use crate::shard::message::{AckAnswer, Ask, AskPublish, AskSubscribe, Consumer, Tell};
use crate::shard::routing::vshard_of;
use crate::shard::settings::Settings;
use crate::shard::timers::{Timer, Timers};
use crate::time::{Duration, Instant, Now};
use crate::types::{ClientSub, ClientSubIds, ConnId, CoreId, Qos, SubId};

/// What a turn works with besides the connections.
pub struct Desk<'a> {
    pub now: Now,
    pub effects: &'a mut Effects,
    pub timers: &'a mut Timers,
    pub metrics: &'a mut CoreMetrics,
    /// For topics of this very core.
    pub asks: &'a mut VecDeque<Ask>,
    /// The log of this very core is behind: publishes to it wait.
    pub log_behind: bool,
}

#[derive(Debug)]
struct Connection {
    peer: IpAddr,
    version: Option<Version>,
    grant: Option<Grant>,
    subs: FxHashMap<ClientSub, Sub>,
    aliases: FxHashMap<u32, Bytes>,
    stall: Option<Stall>,
    /// Requests that wait for `stall` to end.
    waiting: VecDeque<Request>,
    waiting_bytes: usize,
    paused: bool,
    /// Deliveries handed over and not reported to their topics as taken.
    untold: bool,
    heard: Instant,
    pings: u32,
    /// v1: the cores that have acknowledgements or QoS1 publishes of this connection that no PONG has vouched for.
    unvouched: BTreeSet<CoreId>,
    /// v1: the PING that waits for them, and how many have not answered.
    barrier: Option<(u64, usize)>,
    timer: Option<Instant>,
    /// The frame that has begun and is not whole.
    frame: Option<Frame>,
    /// To be logged in by then, whatever is tried until then.
    login_by: Instant,
    /// The AUTH that is first in line has waited its time.
    penalty_served: bool,
    closing: bool,
}

/// Why the next request is not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    /// v1: the topic's core has the request.
    Answer,
    /// That core has as many requests of ours as it may have.
    Room(CoreId),
    /// Too many wrong keys from this address: the AUTH is answered later.
    Penalty,
}

/// How a frame that has begun comes along.
#[derive(Debug, Clone, Copy)]
struct Frame {
    held: usize,
    /// When progress was last measured, and what was there.
    since: Instant,
    held_then: usize,
}

#[derive(Debug)]
struct Sub {
    core: CoreId,
    durable: bool,
    /// `None` until SUBSCRIBED has come.
    id: Option<SubId>,
    untold_messages: u32,
    untold_bytes: u32,
}

/// Requests under way to another core.
#[derive(Debug, Default, Clone, Copy)]
struct Forwards {
    messages: usize,
    bytes: u64,
}

impl Forwards {
    fn full(&self, settings: &Settings) -> bool {
        self.messages >= limits::FORWARDS_MAX || self.bytes >= settings.in_flight_bytes_max()
    }
}

/// Wrong keys of one address.
#[derive(Debug)]
struct Failures {
    tokens: u32,
    refilled: Instant,
}

pub struct Connections {
    settings: Arc<Settings>,
    keys: KeyRing,
    sub_ids: ClientSubIds,
    all: FxHashMap<ConnId, Connection>,
    unauthenticated: usize,
    /// By origin; none is zero.
    unauthenticated_from: FxHashMap<IpAddr, usize>,
    forwards: Vec<Forwards>,
    /// Connections that wait for room at a core, in order.
    room_wanted: Vec<VecDeque<ConnId>>,
    failures: FxHashMap<IpAddr, Failures>,
    next_sweep: Instant,
}

impl Connections {
    pub fn new(settings: Arc<Settings>, keys: KeyRing, sub_ids: ClientSubIds) -> Connections {
        let cores = usize::from(settings.cores);
        Connections {
            settings,
            keys,
            sub_ids,
            all: FxHashMap::default(),
            unauthenticated: 0,
            unauthenticated_from: FxHashMap::default(),
            forwards: vec![Forwards::default(); cores],
            room_wanted: vec![VecDeque::new(); cores],
            failures: FxHashMap::default(),
            next_sweep: Instant(0),
        }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    // ---- coming and going ---------------------------------------------------------------------------------------

    /// Turned away at once if too many, of all or of its origin, have not logged in: whoever holds all places of one
    /// address keeps nobody else out.
    pub fn opened(&mut self, id: ConnId, peer: IpAddr, desk: &mut Desk) {
        let origin = origin(peer);
        let of_origin = self.unauthenticated_from.get(&origin).copied().unwrap_or_default();
        if self.unauthenticated >= self.settings.unauthenticated_max
            || of_origin >= self.settings.unauthenticated_per_address_max
        {
            desk.effects.close.push((id, CloseReason::TooManyUnauthenticated));
            return;
        }
        self.unauthenticated += 1;
        *self.unauthenticated_from.entry(origin).or_default() += 1;
        let login_by = desk.now.mono + self.settings.auth_deadline;
        let mut connection = Connection {
            peer,
            version: None,
            grant: None,
            subs: FxHashMap::default(),
            aliases: FxHashMap::default(),
            stall: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            paused: false,
            untold: false,
            heard: desk.now.mono,
            pings: 0,
            unvouched: BTreeSet::new(),
            barrier: None,
            timer: None,
            frame: None,
            login_by,
            penalty_served: false,
            closing: false,
        };
        desk.timers.set(Timer::Connection(id), &mut connection.timer, Some(login_by));
        self.all.insert(id, connection);
    }

    /// One that had not logged in has, or is gone.
    fn no_longer_unauthenticated(&mut self, peer: IpAddr) {
        self.unauthenticated -= 1;
        let origin = origin(peer);
        if let Some(count) = self.unauthenticated_from.get_mut(&origin) {
            *count -= 1;
            if *count == 0 {
                self.unauthenticated_from.remove(&origin);
            }
        }
    }

    /// The socket is gone: its subscriptions lose their consumer.
    pub fn closed(&mut self, id: ConnId, desk: &mut Desk) {
        let Some(mut connection) = self.all.remove(&id) else { return };
        desk.timers.set(Timer::Connection(id), &mut connection.timer, None);
        if connection.grant.is_none() {
            self.no_longer_unauthenticated(connection.peer);
        }
        let mut subs: Vec<(ClientSub, Sub)> = connection.subs.drain().collect();
        subs.sort_unstable_by_key(|(client, _)| *client);
        for (client, sub) in subs {
            if let Some(sub_id) = sub.id {
                let who = Consumer { conn: id, sub: client };
                let ask = Ask::Unsubscribe { who, sub: sub_id, mode: UnsubscribeMode::Detach, cid: None };
                self.send(sub.core, ask, desk);
            }
        }
    }

    /// `held` bytes of a frame are there: a sign of life, and to be watched (`sweep`).
    pub fn partial(&mut self, id: ConnId, held: usize, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        connection.heard = desk.now.mono;
        connection.pings = 0;
        let frame = connection.frame.get_or_insert(Frame { held, since: desk.now.mono, held_then: 0 });
        frame.held = held;
    }

    pub fn bad_frame(&mut self, id: ConnId, error: FrameError, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        connection.closing = true;
        // v1 closes without a word (V1 B3); v2 is told.
        if connection.version == Some(Version::V2) {
            let text = Bytes::from(error.to_string());
            let reply = Reply::Error { cid: 0, code: code::INVALID, text };
            desk.effects.replies.push((id, Version::V2, reply));
        }
        desk.effects.close.push((id, CloseReason::BadFrame));
    }

    pub fn drain(&mut self, desk: &mut Desk) {
        let mut ids: Vec<ConnId> = self.all.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            if self.all[&id].version == Some(Version::V2) {
                let text = Bytes::from_static(b"the broker is shutting down");
                let reply = Reply::GoAway { code: code::SHUTTING_DOWN, text };
                desk.effects.replies.push((id, Version::V2, reply));
            }
        }
    }

    // ---- requests -----------------------------------------------------------------------------------------------

    pub fn on_request(&mut self, id: ConnId, request: Request, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        if connection.closing {
            return;
        }
        connection.heard = desk.now.mono;
        connection.pings = 0;
        connection.frame = None;
        if connection.stall.is_some() {
            connection.waiting_bytes += weight(&request);
            connection.waiting.push_back(request);
            if connection.waiting_bytes > self.settings.connection_bytes && !connection.paused {
                connection.paused = true;
                desk.effects.pause_reading.push(id);
            }
            return;
        }
        if let Some(back) = self.handle(id, request, desk) {
            self.put_back(id, back, desk);
        }
    }

    /// The request has to wait for room; it stays the first.
    fn put_back(&mut self, id: ConnId, request: Request, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        connection.waiting_bytes += weight(&request);
        connection.waiting.push_front(request);
        if connection.waiting_bytes > self.settings.connection_bytes && !connection.paused {
            connection.paused = true;
            desk.effects.pause_reading.push(id);
        }
    }

    /// The stall is over: goes on with what has waited.
    fn go_on(&mut self, id: ConnId, desk: &mut Desk) {
        loop {
            let Some(connection) = self.all.get_mut(&id) else { return };
            if connection.stall.is_some() || connection.closing {
                return;
            }
            let Some(request) = connection.waiting.pop_front() else { break };
            connection.waiting_bytes -= weight(&request);
            if let Some(back) = self.handle(id, request, desk) {
                return self.put_back(id, back, desk);
            }
        }
        let Some(connection) = self.all.get_mut(&id) else { return };
        if connection.paused {
            connection.paused = false;
            if planted!(ResumeForgotten) {
                return;
            }
            desk.effects.resume_reading.push(id);
        }
    }

    /// Handles one request. Gives it back if it has to wait for room.
    fn handle(&mut self, id: ConnId, request: Request, desk: &mut Desk) -> Option<Request> {
        let cid = request.cid;
        let connection = self.all.get_mut(&id)?;
        let version = connection.version.unwrap_or(Version::V1);
        match request.kind {
            RequestKind::Hello { version } => self.hello(id, cid, version, desk),
            RequestKind::Auth { key } => return self.auth(id, cid, key, desk),
            RequestKind::Malformed(fault) => {
                // Before login only HELLO and AUTH have a text of their own (V1 B5-B7).
                let greeting = fault.frame_type <= AUTH_TYPE;
                let (code, text) = if connection.grant.is_none() && !greeting {
                    (code::AUTH_MISSING.code, code::AUTH_MISSING.text)
                } else if fault.frame_type == AUTH_TYPE && connection.version.is_none() {
                    (code::HELLO_MISSING.code, code::HELLO_MISSING.text)
                } else {
                    (fault.code, fault.text)
                };
                if fault.frame_type == AUTH_TYPE {
                    desk.effects.auth_decided.push((id, connection.grant.is_some()));
                }
                let text = Bytes::from_static(text.as_bytes());
                refuse(id, version, cid, code, text, desk);
            }
            _ if connection.grant.is_none() => fault(id, version, cid, code::AUTH_MISSING, desk),
            kind => return self.open_request(id, cid, kind, desk),
        }
        None
    }

    fn hello(&mut self, id: ConnId, cid: u64, asked: u16, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        let current = connection.version.unwrap_or(Version::V1);
        let version = match asked {
            1 => Version::V1,
            2 => Version::V2,
            _ => return fault(id, current, cid, code::UNSUPPORTED_VERSION, desk),
        };
        if connection.version.is_some() {
            return fault(id, current, cid, code::HELLO_ALREADY, desk);
        }
        connection.version = Some(version);
        let reply = match version {
            Version::V1 => Reply::AckV1 { cid, id: 0 },
            Version::V2 => Reply::Welcome { cid, welcome: self.welcome() },
        };
        desk.effects.replies.push((id, version, reply));
    }

    fn welcome(&self) -> Welcome {
        Welcome {
            cores: self.settings.cores,
            core: self.settings.core,
            ports: self.settings.ports.clone(),
            frame_len_max: limits::FRAME_LEN_MAX,
            credit_max: limits::CREDIT_MAX,
            keepalive_ms: u32::try_from(self.settings.keepalive.as_millis()).unwrap_or(u32::MAX),
        }
    }

    fn auth(&mut self, id: ConnId, cid: u64, key: Bytes, desk: &mut Desk) -> Option<Request> {
        let connection = self.all.get_mut(&id)?;
        let Some(version) = connection.version else {
            desk.effects.auth_decided.push((id, false));
            fault(id, Version::V1, cid, code::HELLO_MISSING, desk);
            return None;
        };
        if connection.grant.is_some() {
            desk.effects.auth_decided.push((id, true));
            let again = if version == Version::V1 { code::AUTH_ALREADY } else { code::AUTH_ALREADY_V2 };
            fault(id, version, cid, again, desk);
            return None;
        }
        let served = connection.penalty_served;
        if !served && self.tokens(self.all[&id].peer, desk.now.mono) == 0 {
            // Neither a right nor a wrong key is told apart before the penalty is over.
            let connection = self.all.get_mut(&id)?;
            connection.stall = Some(Stall::Penalty);
            let at = desk.now.mono + Duration::from_millis(limits::AUTH_PENALTY_MS);
            desk.timers.set(Timer::Connection(id), &mut connection.timer, Some(at));
            return Some(Request { cid, kind: RequestKind::Auth { key } });
        }
        let grant = self.keys.authenticate(&key);
        let connection = self.all.get_mut(&id)?;
        connection.penalty_served = false;
        desk.effects.auth_decided.push((id, grant.is_some()));
        match grant {
            Some(grant) => {
                connection.grant = Some(grant);
                let peer = connection.peer;
                desk.timers.set(Timer::Connection(id), &mut connection.timer, None);
                self.no_longer_unauthenticated(peer);
                let reply = match version {
                    Version::V1 => Reply::AckV1 { cid, id: 0 },
                    Version::V2 => Reply::Ok { cid },
                };
                desk.effects.replies.push((id, version, reply));
            }
            None => {
                let peer = connection.peer;
                desk.metrics.auth_failures += 1;
                // Not a line for each: whoever guesses must not fill the log either.
                match self.spend_token(peer, desk.now.mono) {
                    0 => {}
                    1 => tracing::warn!(%peer, conn = %id, "wrong API key; the next ones are answered late"),
                    _ => tracing::warn!(%peer, conn = %id, "wrong API key"),
                }
                fault(id, version, cid, code::INVALID_KEY, desk);
            }
        }
        None
    }

    /// A logged-in client's request. Given back if it has to wait for room.
    fn open_request(&mut self, id: ConnId, cid: u64, kind: RequestKind, desk: &mut Desk) -> Option<Request> {
        let connection = self.all.get_mut(&id)?;
        let version = connection.version.unwrap_or(Version::V1);
        match kind {
            RequestKind::Ping
                if version == Version::V1 && !connection.unvouched.is_empty() && !planted!(PongAtOnce) =>
            {
                // v1 confirms neither publishes nor acknowledgements; a PONG at least comes after they are safe.
                let cores = std::mem::take(&mut connection.unvouched);
                connection.barrier = Some((cid, cores.len()));
                connection.stall = Some(Stall::Answer);
                for core in cores {
                    self.send(core, Ask::Barrier { conn: id }, desk);
                }
            }
            RequestKind::Ping => desk.effects.replies.push((id, version, Reply::Pong { cid })),
            RequestKind::Publish(publish) => return self.publish(id, cid, publish, desk),
            RequestKind::Subscribe(subscribe) => self.subscribe(id, cid, subscribe, desk),
            RequestKind::Alias { alias, topic } => self.alias(id, cid, alias, topic, desk),
            RequestKind::Poll { sub } => {
                // An id this connection does not know is met with silence (V1 B14).
                let (core, sub_id) = connection.known(sub)?;
                connection.stall = Some(Stall::Answer);
                self.send(core, Ask::Poll { who: Consumer { conn: id, sub }, sub: sub_id, cid }, desk);
            }
            RequestKind::Ack { sub, tags, confirm } => {
                let Some((core, sub_id)) = connection.known(sub) else {
                    if version == Version::V1 || confirm {
                        fault(id, version, cid, code::UNKNOWN_DELIVERY, desk);
                    }
                    return None;
                };
                let answer = match version {
                    Version::V1 => {
                        connection.stall = Some(Stall::Answer);
                        connection.unvouched.insert(core);
                        AckAnswer::V1 { cid }
                    }
                    Version::V2 if confirm => AckAnswer::Confirm { cid },
                    Version::V2 => AckAnswer::None,
                };
                self.send(core, Ask::Ack { who: Consumer { conn: id, sub }, sub: sub_id, tags, answer }, desk);
            }
            RequestKind::Reject { sub, tags, action } => match connection.known(sub) {
                Some((core, sub_id)) => {
                    self.send(core, Ask::Reject { who: Consumer { conn: id, sub }, sub: sub_id, tags, action }, desk);
                }
                None => fault(id, version, cid, code::UNKNOWN_DELIVERY, desk),
            },
            RequestKind::Credit { sub, credit } => match connection.known(sub) {
                Some((core, sub_id)) => {
                    self.send(core, Ask::Credit { who: Consumer { conn: id, sub }, sub: sub_id, credit }, desk);
                }
                None => fault(id, version, cid, code::UNKNOWN_DELIVERY, desk),
            },
            RequestKind::Unsubscribe { sub, mode } => {
                let Some((core, sub_id)) = connection.known(sub) else {
                    fault(id, version, cid, code::UNKNOWN_DELIVERY, desk);
                    return None;
                };
                let durable = connection.subs.get(&sub).is_some_and(|s| s.durable);
                let admin = connection.grant.as_ref().is_some_and(Grant::is_admin);
                if mode == UnsubscribeMode::Delete && durable && !admin {
                    // Others may share it, and its backlog would go with it.
                    let text = Bytes::from_static(b"deleting a durable subscription needs a key with admin = true");
                    refuse(id, version, cid, code::FORBIDDEN, text, desk);
                    return None;
                }
                self.tell_taken(id, desk);
                if let Some(connection) = self.all.get_mut(&id) {
                    connection.subs.remove(&sub);
                }
                let who = Consumer { conn: id, sub };
                self.send(core, Ask::Unsubscribe { who, sub: sub_id, mode, cid: Some(cid) }, desk);
            }
            RequestKind::Ignored => {}
            RequestKind::Hello { .. } | RequestKind::Auth { .. } | RequestKind::Malformed(_) => {
                unreachable!("handled in every state")
            }
        }
        None
    }

    fn publish(&mut self, id: ConnId, cid: u64, publish: Publish, desk: &mut Desk) -> Option<Request> {
        let connection = self.all.get_mut(&id)?;
        let version = connection.version.unwrap_or(Version::V1);
        let topic = match &publish.topic {
            TopicRef::Name(name) => name.clone(),
            TopicRef::Alias(alias) => match connection.aliases.get(alias) {
                Some(name) => name.clone(),
                None => {
                    let text = Bytes::from_static(b"unknown topic alias");
                    reject_publish(id, version, cid, &publish, code::UNKNOWN, text, desk);
                    return None;
                }
            },
        };
        if !connection.grant.as_ref().is_some_and(|g| g.may_publish(&topic)) {
            let text = Bytes::from_static(b"this key may not publish to this topic");
            reject_publish(id, version, cid, &publish, code::FORBIDDEN, text, desk);
            return None;
        }
        let core = self.core_of(&topic);
        let connection = self.all.get_mut(&id)?;
        let here = core == self.settings.core;
        let no_room = if here {
            publish.qos == Qos::AtLeastOnce && desk.log_behind
        } else {
            self.forwards[usize::from(core.0)].full(&self.settings)
        };
        if no_room {
            connection.stall = Some(Stall::Room(core));
            self.room_wanted[usize::from(core.0)].push_back(id);
            return Some(Request { cid, kind: RequestKind::Publish(publish) });
        }
        if version == Version::V1 && publish.qos == Qos::AtLeastOnce {
            connection.unvouched.insert(core);
        }
        let ask = AskPublish {
            conn: id,
            cid,
            version,
            confirm: publish.confirm,
            topic,
            qos: publish.qos,
            ttl: publish.ttl,
            delay: publish.delay,
            priority: publish.priority,
            identity: publish.identity,
            options: publish.options,
            payload: publish.payload,
        };
        self.send(core, Ask::Publish(Box::new(ask)), desk);
        None
    }

    fn subscribe(&mut self, id: ConnId, cid: u64, subscribe: Subscribe, desk: &mut Desk) {
        let core = self.core_of(&subscribe.topic);
        let Some(connection) = self.all.get_mut(&id) else { return };
        let version = connection.version.unwrap_or(Version::V1);
        let Some(grant) = &connection.grant else { return };
        if !grant.may_subscribe(&subscribe.topic) {
            let text = Bytes::from_static(b"this key may not subscribe to this topic");
            return refuse(id, version, cid, code::FORBIDDEN, text, desk);
        }
        if connection.subs.len() >= limits::SUBS_PER_CONN_MAX {
            let text = Bytes::from_static(b"too many subscriptions on this connection");
            return refuse(id, version, cid, code::LIMIT, text, desk);
        }
        let client = self.sub_ids.next();
        let key = grant.key();
        connection.subs.insert(
            client,
            Sub { core, durable: subscribe.durable.is_some(), id: None, untold_messages: 0, untold_bytes: 0 },
        );
        if version == Version::V1 {
            connection.stall = Some(Stall::Answer);
        }
        let who = Consumer { conn: id, sub: client };
        self.send(core, Ask::Subscribe(Box::new(AskSubscribe { who, cid, version, key, subscribe })), desk);
    }

    fn alias(&mut self, id: ConnId, cid: u64, alias: u32, topic: Bytes, desk: &mut Desk) {
        let core = self.core_of(&topic);
        let Some(connection) = self.all.get_mut(&id) else { return };
        if connection.aliases.len() >= limits::ALIASES_PER_CONN_MAX && !connection.aliases.contains_key(&alias) {
            let text = Bytes::from_static(b"too many topic aliases on this connection");
            return refuse(id, Version::V2, cid, code::LIMIT, text, desk);
        }
        connection.aliases.insert(alias, Bytes::copy_from_slice(&topic));
        desk.effects.replies.push((id, Version::V2, Reply::Aliased { cid, alias, core }));
    }

    fn core_of(&self, topic: &[u8]) -> CoreId {
        let vshards = if planted!(RoutingByCores) { self.settings.cores } else { self.settings.vshards };
        vshard_of(topic, &self.settings.dead_letter_suffix, vshards).core(self.settings.cores)
    }

    /// Hands `ask` to the topic's core: this one, or by the ring. Room is only waited for by publishes; what else a client
    /// may ask is bounded by its subscriptions and credit.
    fn send(&mut self, core: CoreId, ask: Ask, desk: &mut Desk) {
        if core == self.settings.core {
            desk.asks.push_back(ask);
            return;
        }
        let forwards = &mut self.forwards[usize::from(core.0)];
        forwards.messages += 1;
        if let Ask::Publish(publish) = &ask {
            forwards.bytes += publish.weight() as u64;
        }
        desk.effects.core(core).asks.push(ask);
    }

    /// `core` has done with so many of our requests.
    pub fn released(&mut self, core: CoreId, messages: u32, bytes: u64, desk: &mut Desk) {
        let forwards = &mut self.forwards[usize::from(core.0)];
        forwards.messages -= messages as usize;
        forwards.bytes -= bytes;
        if !forwards.full(&self.settings) {
            self.room_at(core, desk);
        }
    }

    /// Whether anybody waits for room at `core`.
    pub fn wants_room(&self, core: CoreId) -> bool {
        !self.room_wanted[usize::from(core.0)].is_empty()
    }

    /// There is room at another core again: those who wait for it go on, in order, until it is full again.
    fn room_at(&mut self, core: CoreId, desk: &mut Desk) {
        for _ in 0..self.room_wanted[usize::from(core.0)].len() {
            if self.forwards[usize::from(core.0)].full(&self.settings) {
                return;
            }
            self.next_waiting(core, desk);
        }
    }

    /// The first of those who wait for room at `core` goes on.
    pub fn next_waiting(&mut self, core: CoreId, desk: &mut Desk) {
        let Some(id) = self.room_wanted[usize::from(core.0)].pop_front() else { return };
        if let Some(connection) = self.all.get_mut(&id) {
            connection.stall = None;
            self.go_on(id, desk);
        }
    }

    // ---- answers ------------------------------------------------------------------------------------------------

    pub fn on_tell(&mut self, tell: Tell, desk: &mut Desk) {
        let id = tell.conn();
        let Some(connection) = self.all.get_mut(&id) else { return self.tell_to_nobody(tell, desk) };
        let version = connection.version.unwrap_or(Version::V1);
        let reply = match tell {
            Tell::Deliver { deliver, .. } => {
                let bytes = deliver.body.0.len() as u32;
                let Some(sub) = connection.subs.get_mut(&deliver.sub) else { return };
                sub.untold_messages += 1;
                sub.untold_bytes += bytes;
                connection.untold = true;
                Reply::Deliver(deliver)
            }
            Tell::Confirm { cid, outcome, .. } => Reply::Confirm { cid, outcome },
            Tell::Subscribed { who, cid, sub, resumed, backlog } => {
                let Some(mine) = connection.subs.get_mut(&who.sub) else { return };
                mine.id = Some(sub);
                let core = mine.core;
                let reply = match version {
                    Version::V1 => Reply::AckV1 { cid, id: who.sub.0 },
                    Version::V2 => Reply::Subscribed { cid, sub: who.sub, core, resumed, backlog },
                };
                desk.effects.replies.push((id, version, reply));
                return self.settled(id, desk);
            }
            Tell::Refused { who, cid, code, text } => {
                connection.subs.remove(&who.sub);
                refuse(id, version, cid, code, text, desk);
                return self.settled(id, desk);
            }
            Tell::Error { cid, code, text, .. } => Reply::Error { cid, code, text },
            Tell::Ok { cid, .. } => Reply::Ok { cid },
            Tell::Settled { .. } => return self.settled(id, desk),
            Tell::Passed { .. } => {
                let Some((cid, left)) = connection.barrier else { return };
                if left > 1 {
                    connection.barrier = Some((cid, left - 1));
                    return;
                }
                connection.barrier = None;
                desk.effects.replies.push((id, version, Reply::Pong { cid }));
                return self.settled(id, desk);
            }
            Tell::Ended { who } => {
                connection.subs.remove(&who.sub);
                if version == Version::V1 {
                    return;
                }
                let text = Bytes::from(format!("subscription {} was deleted", who.sub.0));
                Reply::Error { cid: 0, code: code::UNKNOWN, text }
            }
        };
        desk.effects.replies.push((id, version, reply));
    }

    /// The connection has closed since it asked.
    fn tell_to_nobody(&mut self, tell: Tell, desk: &mut Desk) {
        if let Tell::Subscribed { who, sub, .. } = tell {
            let ask = Ask::Unsubscribe { who, sub, mode: UnsubscribeMode::Detach, cid: None };
            let core = sub.vshard.core(self.settings.cores);
            self.send(core, ask, desk);
        }
    }

    fn settled(&mut self, id: ConnId, desk: &mut Desk) {
        if let Some(connection) = self.all.get_mut(&id)
            && connection.stall == Some(Stall::Answer)
        {
            connection.stall = None;
            self.go_on(id, desk);
        }
    }

    /// Replies have gone to the kernel; `left` bytes of this connection's have not.
    pub fn on_sent(&mut self, id: ConnId, left: usize, desk: &mut Desk) {
        if left > limits::OUTBOX_MAX {
            if let Some(connection) = self.all.get_mut(&id)
                && !connection.closing
            {
                connection.closing = true;
                desk.effects.close.push((id, CloseReason::SlowConsumer));
            }
        } else if left < limits::OUTBOX_LOW {
            self.tell_taken(id, desk);
        }
    }

    fn tell_taken(&mut self, id: ConnId, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        if !std::mem::replace(&mut connection.untold, false) {
            return;
        }
        let mut taken = Vec::new();
        for (client, sub) in &mut connection.subs {
            if sub.untold_messages > 0
                && let Some(sub_id) = sub.id
            {
                let (messages, bytes) = (sub.untold_messages, sub.untold_bytes);
                (sub.untold_messages, sub.untold_bytes) = (0, 0);
                taken.push((
                    sub.core,
                    Ask::Taken { who: Consumer { conn: id, sub: *client }, sub: sub_id, messages, bytes },
                ));
            }
        }
        for (core, ask) in taken {
            self.send(core, ask, desk);
        }
    }

    // ---- time ---------------------------------------------------------------------------------------------------

    pub fn on_timer(&mut self, id: ConnId, desk: &mut Desk) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        connection.timer = None;
        if connection.stall == Some(Stall::Penalty) {
            connection.stall = None;
            connection.penalty_served = true;
            self.go_on(id, desk);
        }
        let Some(connection) = self.all.get_mut(&id) else { return };
        if connection.grant.is_some() || connection.closing {
            return;
        }
        // A penalty takes no place beyond the deadline: it ends at the first answer after it.
        if desk.now.mono >= connection.login_by {
            connection.closing = true;
            desk.timers.set(Timer::Connection(id), &mut connection.timer, None);
            desk.effects.close.push((id, CloseReason::AuthDeadline));
        } else if connection.stall != Some(Stall::Penalty) {
            desk.timers.set(Timer::Connection(id), &mut connection.timer, Some(connection.login_by));
        }
    }

    /// Once a second: pings v2 clients that have been silent, closes those that stay so, and those whose frame does not
    /// come along.
    pub fn sweep(&mut self, desk: &mut Desk) {
        if desk.now.mono < self.next_sweep {
            return;
        }
        self.next_sweep = desk.now.mono + Duration::from_secs(1);
        let Settings { keepalive, frame_timeout, .. } = *self.settings;
        let (mut silent, mut slow) = (Vec::new(), Vec::new());
        for (id, connection) in self.all.iter_mut().filter(|(_, c)| c.grant.is_some() && !c.closing) {
            if connection.frame_is_slow(desk.now.mono, frame_timeout) {
                slow.push(*id);
                continue;
            }
            let quiet = desk.now.mono - connection.heard;
            let due = keepalive.saturating_mul(u64::from(connection.pings) + 1);
            if connection.version == Some(Version::V2) && keepalive > Duration::ZERO && quiet >= due {
                connection.pings += 1;
                silent.push((*id, connection.pings));
            }
        }
        slow.sort_unstable();
        for id in slow {
            if let Some(connection) = self.all.get_mut(&id) {
                connection.closing = true;
            }
            desk.effects.close.push((id, CloseReason::SlowFrame));
        }
        silent.sort_unstable();
        for (id, pings) in silent {
            if pings > SILENT_PINGS {
                if let Some(connection) = self.all.get_mut(&id) {
                    connection.closing = true;
                }
                desk.effects.close.push((id, CloseReason::Silent));
            } else {
                desk.effects.replies.push((id, Version::V2, Reply::Ping { cid: 0 }));
            }
        }
    }

    // ---- wrong keys ---------------------------------------------------------------------------------------------

    /// Wrong keys this address may still present at once; one more per second.
    fn tokens(&mut self, peer: IpAddr, now: Instant) -> u32 {
        let Some(failures) = self.failures.get_mut(&origin(peer)) else { return limits::AUTH_FAILURES_BURST };
        let seconds = (now - failures.refilled).0 / Duration::from_secs(1).0;
        if seconds > 0 {
            failures.tokens = limits::AUTH_FAILURES_BURST.min(failures.tokens.saturating_add(seconds as u32));
            failures.refilled = now;
        }
        failures.tokens
    }

    /// How many there were.
    fn spend_token(&mut self, peer: IpAddr, now: Instant) -> u32 {
        let peer = origin(peer);
        if self.failures.len() >= limits::AUTH_ADDRESSES_MAX && !self.failures.contains_key(&peer) {
            self.failures.retain(|_, f| (now - f.refilled).0 < Duration::from_secs(60).0);
            if self.failures.len() >= limits::AUTH_ADDRESSES_MAX {
                self.failures.clear();
            }
        }
        let failures =
            self.failures.entry(peer).or_insert(Failures { tokens: limits::AUTH_FAILURES_BURST, refilled: now });
        let before = failures.tokens;
        failures.tokens = before.saturating_sub(1);
        before
    }

    /// What must always be true. O(n): for tests and the simulator.
    pub fn invariants(&self) {
        assert_eq!(self.unauthenticated, self.all.values().filter(|c| c.grant.is_none()).count());
        assert_eq!(self.unauthenticated, self.unauthenticated_from.values().sum::<usize>());
        assert!(self.unauthenticated_from.values().all(|count| *count > 0));
        for connection in self.all.values() {
            assert_eq!(connection.waiting_bytes, connection.waiting.iter().map(weight).sum::<usize>());
            assert!(connection.waiting.is_empty() || connection.stall.is_some() || connection.closing);
        }
    }
}

const AUTH_TYPE: u8 = 0x02;
/// PINGs in a row that may stay unanswered.
const SILENT_PINGS: u32 = 3;

impl Connection {
    fn known(&self, sub: ClientSub) -> Option<(CoreId, SubId)> {
        let sub = self.subs.get(&sub)?;
        Some((sub.core, sub.id?))
    }

    /// It has begun a frame and has brought too little of it for too long. What the broker does not read is no fault of
    /// the peer's.
    fn frame_is_slow(&mut self, now: Instant, timeout: Duration) -> bool {
        let Some(frame) = &mut self.frame else { return false };
        if self.paused || timeout == Duration::ZERO {
            frame.since = now;
        } else if now - frame.since >= timeout {
            if frame.held - frame.held_then < limits::FRAME_PROGRESS_MIN {
                return true;
            }
            (frame.since, frame.held_then) = (now, frame.held);
        }
        false
    }
}

/// Who counts as one when places and guesses are counted: an IPv4 address, or an IPv6 network of 64 bits, which is what
/// one customer gets.
fn origin(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        v4 => v4,
    }
}

/// What a waiting request counts for.
fn weight(request: &Request) -> usize {
    let payload = match &request.kind {
        RequestKind::Publish(publish) => publish.payload.len() + publish.options.len(),
        _ => 0,
    };
    payload + 256
}

fn fault(id: ConnId, version: Version, cid: u64, fault: code::Fault, desk: &mut Desk) {
    refuse(id, version, cid, fault.code, Bytes::from_static(fault.text.as_bytes()), desk);
}

fn refuse(id: ConnId, version: Version, cid: u64, code: u16, text: Bytes, desk: &mut Desk) {
    desk.metrics.requests_rejected.add(code, 1);
    desk.effects.replies.push((id, version, Reply::Error { cid, code, text }));
}

fn reject_publish(id: ConnId, version: Version, cid: u64, publish: &Publish, code: u16, text: Bytes, desk: &mut Desk) {
    desk.metrics.publishes_received.add(publish.qos, 1);
    desk.metrics.publishes_rejected.add(code, 1);
    let reply = if publish.confirm {
        Reply::Confirm { cid, outcome: Outcome::Rejected { code, text } }
    } else {
        Reply::Error { cid, code, text }
    };
    desk.effects.replies.push((id, version, reply));
}
