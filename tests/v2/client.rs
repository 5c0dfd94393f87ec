//! A v2 client for these tests, over `support::Client`: builds every frame by hand and takes every answer apart to its
//! last byte. What a test did not ask for is kept in order until it does, since answers may overtake each other.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

use support::{Broker, Client, KEY, PATIENCE, string};

/// One connection, logged in.
pub struct V2 {
    client: Client,
    kept: VecDeque<Got>,
    /// The core this connection is on.
    pub core: u16,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Got {
    Ok { cid: u64 },
    Error { cid: u64, code: u16, text: String },
    Confirm(Confirm),
    Subscribed { cid: u64, subscribed: Subscribed },
    Deliver(Delivered),
    GoAway { code: u16, text: String },
    Aliased { cid: u64, alias: u32, core: u16 },
    Ping { cid: u64 },
    Pong { cid: u64 },
}

/// One entry of a CONFIRM frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Confirm {
    pub cid: u64,
    pub outcome: Outcome,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Stored { level: u8, position: u64 },
    Duplicate { level: u8, position: u64 },
    Rejected { code: u16, text: String },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subscribed {
    pub sub: u64,
    pub core: u16,
    pub resumed: bool,
    pub backlog: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivered {
    pub sub: u64,
    pub tag: u64,
    pub attempt: u16,
    pub qos: u8,
    pub redelivered: bool,
    pub published: u64,
    /// Tag and value, as they came.
    pub options: Vec<(u8, Vec<u8>)>,
    pub message: Vec<u8>,
}

impl Delivered {
    /// The value of the header `key`.
    pub fn header(&self, key: &str) -> Option<String> {
        let key = string(key);
        let headers = self.options.iter().filter(|(tag, _)| *tag == 6);
        let value = headers.filter_map(|(_, value)| value.strip_prefix(&key[..])).next()?;
        Some(String::from_utf8(value.to_vec()).expect("text"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.message).expect("text")
    }
}

/// A PUBLISH to be sent: QoS1 and with a confirm, unless it says otherwise.
#[derive(Clone)]
pub struct Publish {
    target: Vec<u8>,
    flags: u8,
    qos: u8,
    options: Vec<u8>,
    message: Vec<u8>,
}

impl Publish {
    pub fn to(topic: &str, message: impl AsRef<[u8]>) -> Publish {
        let message = message.as_ref().to_vec();
        Publish { target: string(topic), flags: 1, qos: 1, options: Vec::new(), message }
    }

    pub fn alias(alias: u32, message: impl AsRef<[u8]>) -> Publish {
        let message = message.as_ref().to_vec();
        Publish { target: alias.to_be_bytes().to_vec(), flags: 3, qos: 1, options: Vec::new(), message }
    }

    pub fn qos(mut self, qos: u8) -> Publish {
        self.qos = qos;
        self
    }

    pub fn unconfirmed(mut self) -> Publish {
        self.flags &= !1;
        self
    }

    pub fn option(mut self, tag: u8, value: &[u8]) -> Publish {
        self.options.extend_from_slice(&option(tag, value));
        self
    }

    pub fn ttl(self, ms: u64) -> Publish {
        self.option(1, &ms.to_be_bytes())
    }

    pub fn id(self, id: &str) -> Publish {
        self.option(2, id.as_bytes())
    }

    pub fn sequence(self, publisher: u64, sequence: u64) -> Publish {
        self.option(3, &[publisher.to_be_bytes(), sequence.to_be_bytes()].concat())
    }

    pub fn priority(self, priority: u8) -> Publish {
        self.option(4, &[priority])
    }

    pub fn delay(self, ms: u64) -> Publish {
        self.option(5, &ms.to_be_bytes())
    }

    pub fn header(self, key: &str, value: &[u8]) -> Publish {
        self.option(6, &[&string(key)[..], value].concat())
    }

    pub fn reply_to(self, topic: &str) -> Publish {
        self.option(7, topic.as_bytes())
    }

    pub fn payload(&self) -> Vec<u8> {
        [&[self.flags, self.qos][..], &self.target, &block(&self.options), &self.message].concat()
    }
}

/// A SUBSCRIBE to be sent: QoS1, credit 100, unless it says otherwise.
#[derive(Clone)]
pub struct Subscribe {
    topic: String,
    qos: u8,
    credit: u32,
    options: Vec<u8>,
}

impl Subscribe {
    pub fn to(topic: &str) -> Subscribe {
        Subscribe { topic: topic.to_owned(), qos: 1, credit: 100, options: Vec::new() }
    }

    pub fn qos0(mut self) -> Subscribe {
        (self.qos, self.credit) = (0, 0);
        self
    }

    pub fn credit(mut self, credit: u32) -> Subscribe {
        self.credit = credit;
        self
    }

    fn option(mut self, tag: u8, value: &[u8]) -> Subscribe {
        self.options.extend_from_slice(&option(tag, value));
        self
    }

    pub fn durable(self, name: &str) -> Subscribe {
        self.option(1, name.as_bytes())
    }

    pub fn priority(self, priority: u8) -> Subscribe {
        self.option(2, &[priority])
    }

    pub fn earliest(self) -> Subscribe {
        self.option(3, &[1])
    }

    pub fn ack_timeout(self, ms: u32) -> Subscribe {
        self.option(4, &ms.to_be_bytes())
    }

    pub fn payload(&self) -> Vec<u8> {
        [&[self.qos][..], &self.credit.to_be_bytes(), &string(&self.topic), &block(&self.options)].concat()
    }
}

fn option(tag: u8, value: &[u8]) -> Vec<u8> {
    [&[tag][..], &(value.len() as u16).to_be_bytes(), value].concat()
}

/// `u16 length | entries`
fn block(entries: &[u8]) -> Vec<u8> {
    [&(entries.len() as u16).to_be_bytes(), entries].concat()
}

/// What a REJECT does.
#[derive(Clone, Copy)]
pub enum Reject {
    Requeue,
    Later { ms: u32 },
    DeadLetter,
}

impl Deref for V2 {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for V2 {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl V2 {
    pub fn connect(broker: &Broker) -> V2 {
        V2::connect_as(broker, KEY)
    }

    pub fn connect_as(broker: &Broker, key: &str) -> V2 {
        let mut client = broker.connect();
        client.send(0x01, 1, &[0, 2]);
        let welcome = client.recv();
        assert_eq!((welcome.frame_type, welcome.cid), (0x10, 1), "{welcome:?}");
        let core = u16::from_be_bytes([welcome.payload[4], welcome.payload[5]]);
        client.send(0x02, 2, &string(key));
        client.expect(0x11, 2, &[0, 0]);
        V2 { client, kept: VecDeque::new(), core }
    }

    /// Two names for topics: one lives on this connection's own core, one on the other.
    pub fn near_and_far(&mut self, name: &str) -> [String; 2] {
        let (near, far) = (self.core, 1 - self.core);
        let mut find = |wanted: u16| {
            let names = (0..1000).map(|n| format!("{name}-{n}"));
            names.into_iter().find(|topic| self.owner(topic) == wanted).expect("a topic of that core")
        };
        [find(near), find(far)]
    }

    /// The core a topic lives on. Uses alias 4 000 000 000.
    pub fn owner(&mut self, topic: &str) -> u16 {
        let cid = self.alias(4_000_000_000, topic);
        self.want(|got| match got {
            Got::Aliased { cid: of, core, .. } if *of == cid => Some(*core),
            _ => None,
        })
    }

    pub fn alias(&mut self, alias: u32, topic: &str) -> u64 {
        self.ask(0x1d, &[&alias.to_be_bytes()[..], &string(topic)].concat())
    }

    /// Sends a request; returns its correlation id.
    pub fn ask(&mut self, frame_type: u8, payload: &[u8]) -> u64 {
        let cid = self.next_cid();
        self.send(frame_type, cid, payload);
        cid
    }

    // ---- what comes back ----------------------------------------------------------------------------------------

    fn read(&mut self) {
        let frame = self.client.recv();
        let mut got = parse(frame.frame_type, frame.cid, &frame.payload);
        self.kept.append(&mut got);
    }

    /// The next of those that `pick` takes; everything else is kept, in order.
    pub fn want<T>(&mut self, mut pick: impl FnMut(&Got) -> Option<T>) -> T {
        let mut looked_at = 0;
        // The broker's PINGs alone would keep a vain wait alive.
        let deadline = Instant::now() + PATIENCE;
        loop {
            while looked_at < self.kept.len() {
                if let Some(found) = pick(&self.kept[looked_at]) {
                    self.kept.remove(looked_at);
                    return found;
                }
                looked_at += 1;
            }
            assert!(Instant::now() < deadline, "in vain; what came: {:?}", self.kept);
            self.read();
        }
    }

    /// The next thing, whatever it is.
    pub fn next(&mut self) -> Got {
        self.want(|got| Some(got.clone()))
    }

    pub fn ok(&mut self, cid: u64) {
        let got = self.answer(cid);
        assert_eq!(got, Got::Ok { cid });
    }

    /// The code and text of the ERROR for `cid`.
    pub fn error(&mut self, cid: u64) -> (u16, String) {
        match self.answer(cid) {
            Got::Error { code, text, .. } => (code, text),
            other => panic!("expected an ERROR, got {other:?}"),
        }
    }

    fn answer(&mut self, wanted: u64) -> Got {
        self.want(|got| match got {
            Got::Ok { cid } | Got::Error { cid, .. } | Got::Subscribed { cid, .. } if *cid == wanted => {
                Some(got.clone())
            }
            _ => None,
        })
    }

    pub fn outcome(&mut self, wanted: u64) -> Outcome {
        self.want(|got| match got {
            Got::Confirm(Confirm { cid, outcome }) if *cid == wanted => Some(outcome.clone()),
            _ => None,
        })
    }

    /// The next delivery of `sub`.
    pub fn delivery(&mut self, wanted: u64) -> Delivered {
        self.want(|got| match got {
            Got::Deliver(delivered) if delivered.sub == wanted => Some(delivered.clone()),
            _ => None,
        })
    }

    /// Everything that came and was not asked for yet.
    pub fn rest(&mut self) -> Vec<Got> {
        self.kept.drain(..).collect()
    }

    /// All that the topic of `sub` had to say before now has arrived: two rounds, since a turn of its core delivers
    /// after it has answered.
    pub fn settle(&mut self, sub: u64) {
        for _ in 0..2 {
            let cid = self.ack_asked(sub, &[(u64::MAX, u64::MAX)]);
            assert_eq!(self.error(cid).0, 404);
        }
    }

    /// `sub` has nothing for us.
    pub fn expect_nothing(&mut self, sub: u64) {
        self.settle(sub);
        let more: Vec<_> = self.kept.iter().filter(|got| matches!(got, Got::Deliver(d) if d.sub == sub)).collect();
        assert!(more.is_empty(), "{more:?}");
    }

    // ---- requests -----------------------------------------------------------------------------------------------

    pub fn publish(&mut self, publish: &Publish) -> u64 {
        self.ask(0x13, &publish.payload())
    }

    /// Publishes, and waits for what becomes of it.
    pub fn confirm(&mut self, publish: &Publish) -> Outcome {
        let cid = self.publish(publish);
        self.outcome(cid)
    }

    /// Publishes, and waits until it is stored.
    pub fn store(&mut self, publish: &Publish) {
        let outcome = self.confirm(publish);
        assert!(matches!(outcome, Outcome::Stored { .. }), "{outcome:?}");
    }

    /// Publishes texts with QoS1; waits until all are stored.
    pub fn store_all(&mut self, topic: &str, texts: &[&str]) {
        let cids: Vec<u64> = texts.iter().map(|text| self.publish(&Publish::to(topic, text))).collect();
        for cid in cids {
            let outcome = self.outcome(cid);
            assert!(matches!(outcome, Outcome::Stored { .. }), "{outcome:?}");
        }
    }

    pub fn subscribe(&mut self, subscribe: &Subscribe) -> Subscribed {
        let cid = self.ask(0x15, &subscribe.payload());
        match self.answer(cid) {
            Got::Subscribed { subscribed, .. } => subscribed,
            other => panic!("expected SUBSCRIBED, got {other:?}"),
        }
    }

    /// Subscribes; returns only the number.
    pub fn sub(&mut self, subscribe: &Subscribe) -> u64 {
        self.subscribe(subscribe).sub
    }

    /// ACK of ranges that asks for an answer.
    pub fn ack_asked(&mut self, sub: u64, ranges: &[(u64, u64)]) -> u64 {
        self.ask(0x18, &[&sub.to_be_bytes()[..], &[1], &tags(ranges)].concat())
    }

    /// Acknowledges one delivery, and waits until that is durable.
    pub fn ack(&mut self, delivered: &Delivered) {
        let cid = self.ack_asked(delivered.sub, &[(delivered.tag, delivered.tag)]);
        self.ok(cid);
    }

    /// ACK of ranges without an answer.
    pub fn ack_silently(&mut self, sub: u64, ranges: &[(u64, u64)]) {
        self.ask(0x18, &[&sub.to_be_bytes()[..], &[0], &tags(ranges)].concat());
    }

    pub fn reject(&mut self, sub: u64, how: Reject, ranges: &[(u64, u64)]) -> u64 {
        let (action, ms) = match how {
            Reject::Requeue => (0, 0),
            Reject::Later { ms } => (1, ms),
            Reject::DeadLetter => (2, 0),
        };
        self.ask(0x19, &[&sub.to_be_bytes()[..], &[action], &ms.to_be_bytes(), &tags(ranges)].concat())
    }

    pub fn credit(&mut self, sub: u64, credit: u32) -> u64 {
        self.ask(0x1a, &[sub.to_be_bytes().as_slice(), &credit.to_be_bytes()].concat())
    }

    /// UNSUBSCRIBE that leaves a durable subscription where it is; waits for the OK.
    pub fn detach(&mut self, sub: u64) {
        let cid = self.ask(0x1b, &[&sub.to_be_bytes()[..], &[0]].concat());
        self.ok(cid);
    }

    /// UNSUBSCRIBE that deletes; waits for the OK.
    pub fn delete(&mut self, sub: u64) {
        let cid = self.ask(0x1b, &[&sub.to_be_bytes()[..], &[1]].concat());
        self.ok(cid);
    }
}

fn tags(ranges: &[(u64, u64)]) -> Vec<u8> {
    ranges.iter().flat_map(|(first, last)| [first.to_be_bytes(), last.to_be_bytes()].concat()).collect()
}

/// Reads a payload from its front; panics if it is too short.
struct Cut<'a>(&'a [u8]);

impl<'a> Cut<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(len);
        self.0 = rest;
        front
    }

    fn number(&mut self, len: usize) -> u64 {
        self.bytes(len).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn text(&mut self) -> String {
        let len = self.number(2) as usize;
        String::from_utf8(self.bytes(len).to_vec()).expect("UTF-8")
    }

    fn options(&mut self) -> Vec<(u8, Vec<u8>)> {
        let len = self.number(2) as usize;
        let mut entries = Cut(self.bytes(len));
        let mut options = Vec::new();
        while !entries.0.is_empty() {
            let (tag, len) = (entries.number(1) as u8, entries.number(2) as usize);
            options.push((tag, entries.bytes(len).to_vec()));
        }
        options
    }
}

/// A frame's meaning; a CONFIRM has several.
fn parse(frame_type: u8, cid: u64, payload: &[u8]) -> VecDeque<Got> {
    let mut cut = Cut(payload);
    let mut all = VecDeque::new();
    match frame_type {
        0x07 => all.push_back(Got::Ping { cid }),
        0x08 => all.push_back(Got::Pong { cid }),
        0x11 => {
            assert_eq!(cut.options(), []);
            all.push_back(Got::Ok { cid });
        }
        0x12 => all.push_back(Got::Error { cid, code: cut.number(2) as u16, text: cut.text() }),
        0x14 => {
            assert_eq!(cid, 0);
            while !cut.0.is_empty() || all.is_empty() {
                let cid = cut.number(8);
                let outcome = match cut.number(1) {
                    0 => Outcome::Stored { level: cut.number(1) as u8, position: cut.number(8) },
                    1 => Outcome::Duplicate { level: cut.number(1) as u8, position: cut.number(8) },
                    2 => Outcome::Rejected { code: cut.number(2) as u16, text: cut.text() },
                    other => panic!("status {other}"),
                };
                all.push_back(Got::Confirm(Confirm { cid, outcome }));
            }
        }
        0x16 => {
            let (sub, core) = (cut.number(8), cut.number(2) as u16);
            let resumed = match cut.number(1) {
                0 => false,
                1 => true,
                other => panic!("resumed {other}"),
            };
            let subscribed = Subscribed { sub, core, resumed, backlog: cut.number(8) };
            assert_eq!(cut.options(), []);
            all.push_back(Got::Subscribed { cid, subscribed });
        }
        0x17 => {
            assert_eq!(cid, 0);
            let (sub, tag, attempt, flags) = (cut.number(8), cut.number(8), cut.number(2) as u16, cut.number(1) as u8);
            assert_eq!(flags & !3, 0);
            let (published, options) = (cut.number(8), cut.options());
            let message = std::mem::take(&mut cut.0).to_vec();
            let (qos, redelivered) = (flags & 1, flags & 2 != 0);
            all.push_back(Got::Deliver(Delivered { sub, tag, attempt, qos, redelivered, published, options, message }));
        }
        0x1c => all.push_back(Got::GoAway { code: cut.number(2) as u16, text: cut.text() }),
        0x1e => all.push_back(Got::Aliased { cid, alias: cut.number(4) as u32, core: cut.number(2) as u16 }),
        other => panic!("frame type {other:#x}: {payload:02x?}"),
    }
    assert_eq!(cut.0, b"", "nothing behind a payload of type {frame_type:#x}");
    all
}
