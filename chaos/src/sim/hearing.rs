//! What the broker says is judged in the moment it is said, and heard by the client when its bytes have come.
//!
//! Owns: the live checks that need to look inside: whether what is confirmed or delivered is as safe as the policy demands
//! (I1, I12, I13), and whether an answer fits its question. What clients see of it goes to the oracle.

use blipmq::protocol::options::{self, OptionsReader};
use blipmq::protocol::reply::{Deliver, Outcome, Reply};
use blipmq::protocol::request::Version;
use blipmq::time::Duration;
use blipmq::types::{ClientSub, DeliveryTag, Durability, Qos};
use blipmq::wal::commit::FsyncPolicy;

use crate::message::MessageId;
use crate::oracle::{Delivery, Event, Excuse, Timing};
use crate::sim::books::{AckNote, SubNote, SubRef, Unsafe};
use crate::sim::client::{Asked, Mine};
use crate::sim::machine::{Held, Said};
use crate::sim::world::{RING_DELAY_MAX, World};

/// Stands for the dead-letter topics' own queues.
pub const DEAD_LETTERS: u16 = u16::MAX;

/// What a frame means to the client that reads it.
#[derive(Debug)]
pub enum Heard {
    Answer { cid: u64 },
    LoggedIn { cid: u64 },
    Stored { cid: u64, publisher: u16, seq: u64 },
    Refused { cid: u64, publisher: u16, seq: u64 },
    Subscribed { cid: u64, sub: ClientSub, subject: SubRef },
    NotSubscribed { cid: u64, topic: u16 },
    Delivered { sub: ClientSub, tag: DeliveryTag, id: MessageId, acks: bool },
    Gone { sub: ClientSub },
    Vouched { cid: u64, publishes: Vec<(u16, u64)> },
    Ping { cid: u64 },
    GoAway,
    Nothing,
}

impl World {
    // ---- said ---------------------------------------------------------------------------------------------------

    pub fn on_said(&mut self, said: Said) {
        let Some(link) = self.by_conn.get(&said.conn).copied() else { return };
        let n = self.links[&link].client;
        let (reply, known) = (said.reply, self.links[&link].version);
        self.say(|| format!("client {n} < {}", tell(&reply)));
        let kept = reply.clone();
        let heard = match reply {
            Reply::Welcome { cid, .. } => self.on_plain(link, cid, "WELCOME", |asked| matches!(asked, Asked::Hello)),
            Reply::AckV1 { cid, id: 0 } => self.on_greeted(link, cid),
            Reply::AckV1 { cid, id } => self.on_subscribed(link, cid, ClientSub(id), None),
            Reply::Ok { cid } => self.on_ok(link, cid),
            Reply::Confirm { cid, outcome } => self.on_confirm(link, cid, &outcome),
            Reply::Subscribed { cid, sub, resumed, .. } => self.on_subscribed(link, cid, sub, Some(resumed)),
            Reply::Aliased { cid, .. } => self.on_plain(link, cid, "ALIASED", |asked| matches!(asked, Asked::Alias)),
            Reply::Pong { cid } => self.on_pong(link, cid),
            Reply::Error { cid, code, text } => self.on_error(link, cid, code, &String::from_utf8_lossy(&text)),
            Reply::Deliver(deliver) => self.on_deliver(link, known, &deliver),
            Reply::Ping { cid } => Heard::Ping { cid },
            Reply::GoAway { .. } => Heard::GoAway,
        };
        self.links.get_mut(&link).expect("found above").expect(kept, heard);
    }

    fn on_plain(&mut self, link: u32, cid: u64, what: &str, fits: impl Fn(&Asked) -> bool) -> Heard {
        match self.asked.remove(&(link, cid)) {
            Some(asked) if fits(&asked) => {}
            other => self.misbehaved(format!("{what} answers {other:?}")),
        }
        Heard::Answer { cid }
    }

    fn on_greeted(&mut self, link: u32, cid: u64) -> Heard {
        match self.asked.remove(&(link, cid)) {
            Some(Asked::Hello) => Heard::Answer { cid },
            Some(Asked::Auth) => Heard::LoggedIn { cid },
            other => {
                self.misbehaved(format!("ACK 0 answers {other:?}"));
                Heard::Nothing
            }
        }
    }

    fn on_ok(&mut self, link: u32, cid: u64) -> Heard {
        match self.asked.remove(&(link, cid)) {
            Some(Asked::Auth) => return Heard::LoggedIn { cid },
            Some(Asked::Ack { subject, ids, sure }) => {
                for id in ids.into_iter().filter(|_| sure) {
                    self.acked(&subject, id);
                }
            }
            Some(Asked::Unsubscribe { sub, subject, delete }) => {
                self.link_subs.remove(&(link, sub));
                if let Some(name) = subject.name
                    && !delete
                {
                    self.books.consumer_left(name, link, subject.asked);
                }
            }
            other => self.misbehaved(format!("OK answers {other:?}")),
        }
        Heard::Answer { cid }
    }

    fn acked(&mut self, subject: &SubRef, id: MessageId) {
        if subject.number == DEAD_LETTERS {
            return;
        }
        self.observe(Event::Acked { sub: subject.number, publisher: id.publisher, seq: id.seq });
        let core = self.books.core_of(subject.topic, self.script.cores);
        let mark = self.log_mark(core);
        self.books.acks.push(AckNote { core, mark, sub: subject.number, id });
        self.life.acked += 1;
    }

    fn on_confirm(&mut self, link: u32, cid: u64, outcome: &Outcome) -> Heard {
        let Some(Asked::Publish { publisher, seq }) = self.asked.remove(&(link, cid)) else {
            self.misbehaved(format!("a confirm of {cid:x}, which is no publish"));
            return Heard::Nothing;
        };
        match outcome {
            Outcome::Stored { level, position } => {
                self.confirmed(link, publisher, seq, false, Some(*level));
                let (run, core) = (self.run, self.core_of_publisher(publisher));
                if position.0 > 0 {
                    let log = run * 64 + u32::from(core);
                    self.observe(Event::Position { publisher, seq, log, at: position.0 });
                }
                Heard::Stored { cid, publisher, seq }
            }
            Outcome::Duplicate { level, .. } => {
                self.life.duplicates += 1;
                self.confirmed(link, publisher, seq, true, Some(*level));
                Heard::Stored { cid, publisher, seq }
            }
            Outcome::Rejected { code, .. } => {
                self.rejected(publisher, seq, *code);
                Heard::Refused { cid, publisher, seq }
            }
        }
    }

    fn rejected(&mut self, publisher: u16, seq: u64, code: u16) {
        self.life.rejected += 1;
        self.observe(Event::Rejected { publisher, seq, code });
    }

    /// - `level`: what the broker says; v1 says nothing.
    fn confirmed(&mut self, link: u32, publisher: u16, seq: u64, duplicate: bool, level: Option<Durability>) {
        self.life.confirmed += 1;
        self.observe(Event::Confirmed { publisher, seq, duplicate });
        let ms = self.broker_ms();
        self.books.stored_by(publisher, seq, ms);
        let Some(traits) = self.books.traits_of(publisher, seq) else { return };
        let policy = self.script.machine.policy;
        if traits.at_most_once {
            if level.is_some_and(|level| level != Durability::Memory) {
                self.misbehaved(format!("a QoS0 message is confirmed as {level:?}"));
            }
            return;
        }
        let topic = self.topics_of[usize::from(publisher)];
        let id = MessageId { publisher, topic, seq };
        let held = self.books.level(id, self.machine.held(id));
        let wanted = match (level, policy) {
            (Some(Durability::Synced), _) | (_, FsyncPolicy::Always) => Held::Synced,
            (Some(Durability::Memory), _) => {
                return self.violated("I1", format!("#{seq} of p{publisher} is confirmed as kept in memory"));
            }
            (Some(Durability::Written) | None, _) => Held::Written,
        };
        if held < wanted {
            self.violated("I1", format!("#{seq} of p{publisher} is confirmed as {wanted:?}, and is {held:?}"));
        }
        if policy == FsyncPolicy::Always && level.is_some_and(|level| level != Durability::Synced) {
            self.violated("I1", format!("#{seq} of p{publisher} is confirmed as {level:?} under `always`"));
        }
        if held < Held::Synced {
            let core = self.books.core_of(topic, self.script.cores);
            // A PONG waits for all cores, and of a duplicate the first one counts: they may have been safe enough long before.
            let slack = match level {
                _ if duplicate => None,
                None => None,
                Some(_) if core != self.links[&link].core => Some(RING_DELAY_MAX),
                Some(_) => Some(Duration::ZERO),
            };
            self.check_window(core, id, slack);
        }
    }

    /// The bound of the policy: what is confirmed and not synced.
    ///
    /// - `slack`: how long ago this may have been decided; `None`: not known.
    fn check_window(&mut self, core: u16, id: MessageId, slack: Option<Duration>) {
        let (machine, window) = (&self.machine, &mut self.books.window);
        window.retain(|one| machine.held(one.id) < Held::Synced);
        if window.iter().all(|one| one.id != id) {
            window.push(Unsafe { core, id, since: self.now });
        }
        let mine: Vec<Unsafe> = window.iter().filter(|one| one.core == core).copied().collect();
        match self.script.machine.policy {
            FsyncPolicy::Always => {}
            FsyncPolicy::EveryN(n) => {
                if mine.len() > n as usize {
                    let count = mine.len();
                    self.violated("I1", format!("{count} messages are confirmed and not synced, {n} are allowed"));
                }
            }
            FsyncPolicy::IntervalMs(ms) => {
                let Some(slack) = slack else { return };
                let oldest = mine.iter().map(|one| one.since).min().unwrap_or(self.now);
                let age = self.now - oldest;
                if age.0 > Duration::from_millis(ms).0 + slack.0 {
                    let age = age.as_millis();
                    self.violated(
                        "I1",
                        format!("confirmed while the oldest not synced is {age} ms old, {ms} are allowed"),
                    );
                }
            }
            FsyncPolicy::None => {}
        }
    }

    fn on_subscribed(&mut self, link: u32, cid: u64, sub: ClientSub, resumed: Option<bool>) -> Heard {
        let Some(Asked::Subscribe(subject)) = self.asked.remove(&(link, cid)) else {
            self.misbehaved(format!("a subscription that nobody asked for: {cid:x}"));
            return Heard::Nothing;
        };
        self.link_subs.insert((link, sub), subject.clone());
        if subject.number == DEAD_LETTERS {
            return Heard::Subscribed { cid, sub, subject };
        }
        let conn = link;
        let contested = subject.name.is_some_and(|name| self.books.is_contested(name, subject.number));
        let resumed = resumed.filter(|_| !contested);
        self.observe(Event::Attached { sub: subject.number, conn, resumed });
        match subject.name {
            Some(name) if self.books.named(name).is_some_and(|now| now.number == subject.number) => {
                self.books.exists(name);
                let core = self.books.core_of(subject.topic, self.script.cores);
                let mark = self.log_mark(core);
                self.books.made.push(SubNote { core, mark, sub: subject.number });
            }
            // It was deleted meanwhile, by a request that may come first.
            Some(_) => self.observe(Event::Excused(Excuse::Ends { sub: subject.number })),
            None => {}
        }
        Heard::Subscribed { cid, sub, subject }
    }

    fn on_pong(&mut self, link: u32, cid: u64) -> Heard {
        let Some(Asked::Ping { publishes, acks }) = self.asked.remove(&(link, cid)) else {
            self.misbehaved(format!("a PONG of {cid:x}"));
            return Heard::Nothing;
        };
        let refused = |seq: &(u16, u64)| !self.refused.contains(seq);
        let stored: Vec<(u16, u64)> = publishes.iter().filter(|seq| refused(seq)).copied().collect();
        for (publisher, seq) in stored {
            self.confirmed(link, publisher, seq, false, None);
        }
        for (tag, sub, id) in acks {
            if !self.unknown_tags.contains(&(link, tag)) {
                let topic = self.books.topic_of(sub);
                let kind = crate::oracle::SubKind { acks: true, named: false, earliest: false };
                self.acked(&SubRef { number: sub, topic, name: None, kind, asked: 0 }, id);
            }
        }
        Heard::Vouched { cid, publishes }
    }

    fn on_error(&mut self, link: u32, cid: u64, code: u16, text: &str) -> Heard {
        if cid < 1 << 40 {
            return self.on_unasked_error(link, cid, code, text);
        }
        match self.asked.remove(&(link, cid)) {
            Some(Asked::Publish { publisher, seq }) => {
                self.refused.insert((publisher, seq));
                self.rejected(publisher, seq, code);
                return Heard::Refused { cid, publisher, seq };
            }
            Some(Asked::Subscribe(subject)) => {
                if let Some(name) = subject.name {
                    self.books.consumer_left(name, link, subject.asked);
                }
                if !matches!(code, 507 | 404 | 429) {
                    self.misbehaved(format!("a SUBSCRIBE is refused: {code} {text}"));
                }
                return Heard::NotSubscribed { cid, topic: subject.topic };
            }
            // The acknowledged were finished before, or belong to others now.
            Some(Asked::Ack { .. }) if code == 404 => {}
            Some(Asked::Unsubscribe { .. }) if matches!(code, 404 | 507) => {}
            Some(Asked::Small) if code == 404 => {}
            Some(Asked::Malformed) if code == 400 => {}
            other => self.misbehaved(format!("error {code} {text} answers {other:?}")),
        }
        Heard::Answer { cid }
    }

    /// Something about the connection, or v1's acknowledgement of a tag.
    fn on_unasked_error(&mut self, link: u32, cid: u64, code: u16, text: &str) -> Heard {
        if self.links[&link].version == Version::V1 && code == 404 {
            self.unknown_tags.insert((link, cid));
            return Heard::Nothing;
        }
        let deleted = text.strip_prefix("subscription ").and_then(|rest| rest.strip_suffix(" was deleted"));
        if let Some(sub) = deleted.and_then(|number| number.parse().ok()).map(ClientSub) {
            if self.link_subs.remove(&(link, sub)).is_none() {
                self.misbehaved(format!("{sub:?} was deleted, and is not known here"));
            }
            return Heard::Gone { sub };
        }
        if !self.links[&link].spoilt && code != 404 {
            self.misbehaved(format!("error {code} {text} for nothing ({cid})"));
        }
        Heard::Nothing
    }

    fn on_deliver(&mut self, link: u32, version: Version, deliver: &Deliver) -> Heard {
        self.life.delivered += 1;
        self.last_delivery = self.now;
        let v1 = version == Version::V1;
        let found = if v1 {
            let here = self.link_subs.range((link, ClientSub(0))..=(link, ClientSub(u64::MAX)));
            let mut of_topic = here.filter(|(_, s)| crate::sim::client::topic_name(s.topic) == deliver.topic);
            of_topic.next().map(|((_, sub), subject)| (*sub, subject.clone()))
        } else {
            self.link_subs.get(&(link, deliver.sub)).map(|subject| (deliver.sub, subject.clone()))
        };
        let Some((sub, subject)) = found else {
            self.misbehaved(format!("a delivery for {:?}, which is not subscribed", deliver.sub));
            return Heard::Nothing;
        };
        let message = MessageId::decode(deliver.body.payload());
        let tag = if v1 && deliver.qos == Qos::AtLeastOnce { DeliveryTag(deliver.cid) } else { deliver.tag };
        if subject.number == DEAD_LETTERS {
            return self.on_dead_letter(&subject, sub, tag, deliver, message);
        }
        let core = self.books.core_of(subject.topic, self.script.cores);
        let slack = if core == self.links[&link].core { 0 } else { RING_DELAY_MAX.as_millis() + 1 };
        let ms = self.broker_ms();
        let traits = message.and_then(|id| self.books.traits_of(id.publisher, id.seq));
        let published = if v1 {
            let latest = message.and_then(|id| self.books.was_stored_by(id.publisher, id.seq));
            (traits.map_or(0, |traits| traits.sent_ms), latest.unwrap_or(u64::MAX))
        } else {
            (deliver.published_ms, deliver.published_ms)
        };
        let timing = Some(Timing { published, decided: (ms.saturating_sub(slack), ms) });
        let attempt = if v1 { 0 } else { deliver.attempt };
        self.life.redelivered += u64::from(deliver.redelivered);
        let redelivered = deliver.redelivered && !v1;
        let number = subject.number;
        self.observe(Event::Deliver(Delivery {
            sub: number,
            conn: link,
            tag: tag.0,
            attempt,
            redelivered,
            message,
            timing,
        }));
        let (Some(id), Some(traits)) = (message, traits) else { return Heard::Nothing };
        self.check_delivery(deliver, v1, &subject, id, traits.at_most_once);
        let acks = deliver.qos == Qos::AtLeastOnce;
        Heard::Delivered { sub, tag, id, acks }
    }

    fn check_delivery(&mut self, deliver: &Deliver, v1: bool, subject: &SubRef, id: MessageId, at_most_once: bool) {
        let lower = if at_most_once || !subject.kind.acks { Qos::AtMostOnce } else { Qos::AtLeastOnce };
        if deliver.qos != lower {
            self.misbehaved(format!("{id:?} comes with {:?}, {lower:?} is due", deliver.qos));
        }
        if !v1 && (deliver.attempt == 0 || (deliver.attempt > 1 && !deliver.redelivered)) {
            self.misbehaved(format!("{id:?}: attempt {}, redelivered {}", deliver.attempt, deliver.redelivered));
        }
        if at_most_once {
            return;
        }
        let always = self.script.machine.policy == FsyncPolicy::Always;
        let wanted = if always { Held::Synced } else { Held::Written };
        let held = self.books.level(id, self.machine.held(id));
        if held < wanted {
            self.violated("I13", format!("{id:?} is delivered, and is {held:?}"));
        }
    }

    fn on_dead_letter(
        &mut self,
        subject: &SubRef,
        sub: ClientSub,
        tag: DeliveryTag,
        deliver: &Deliver,
        message: Option<MessageId>,
    ) -> Heard {
        let Some(id) = message else {
            self.misbehaved("a dead letter that nobody sent".into());
            return Heard::Nothing;
        };
        if self.buried.insert((subject.topic, tag.0)) {
            self.life.buried += 1;
            self.observe(Event::Buried { publisher: id.publisher, seq: id.seq });
        }
        let headers = OptionsReader::new(deliver.body.options()).filter(|(tag, _)| *tag == options::HEADER);
        let reason = headers.filter_map(|(_, value)| value.strip_prefix(b"\0\x0dblipmq-reason")).next();
        let fits = match reason {
            Some(b"rejected") => self.books.is_doomed(id),
            Some(b"max-retries") => self.books.deadly,
            _ => false,
        };
        if !fits || id.topic != subject.topic {
            let reason = reason.map(String::from_utf8_lossy);
            self.misbehaved(format!("{id:?} is a dead letter of topic {} for {reason:?}", subject.topic));
        }
        Heard::Delivered { sub, tag, id, acks: true }
    }

    // ---- heard --------------------------------------------------------------------------------------------------

    pub fn on_heard(&mut self, n: usize, heard: Heard) {
        let now = self.now;
        let client = &mut self.clients[n];
        client.last_heard = now;
        let session = &mut client.session;
        match heard {
            Heard::Answer { cid } => _ = session.awaited.remove(&cid),
            Heard::LoggedIn { cid } => {
                session.awaited.remove(&cid);
                self.on_logged_in(n);
            }
            Heard::Stored { cid, publisher, seq } => {
                session.awaited.remove(&cid);
                self.heard_answer(n, publisher, seq, true);
            }
            Heard::Refused { cid, publisher, seq } => {
                session.awaited.remove(&cid);
                self.heard_answer(n, publisher, seq, false);
            }
            Heard::Subscribed { cid, sub, subject } => {
                session.awaited.remove(&cid);
                session.subs.insert(sub, Mine { subject, held: Default::default() });
            }
            Heard::NotSubscribed { cid, topic } => {
                session.awaited.remove(&cid);
                session.topics.remove(&topic);
            }
            Heard::Delivered { sub, tag, id, acks } => {
                if let Some(mine) = session.subs.get_mut(&sub).filter(|_| acks) {
                    mine.held.insert(tag, id);
                }
            }
            Heard::Gone { sub } => _ = session.subs.remove(&sub),
            Heard::Vouched { cid, publishes } => {
                session.awaited.remove(&cid);
                for (publisher, seq) in publishes {
                    self.heard_answer(n, publisher, seq, true);
                }
            }
            Heard::Ping { cid } => self.pong(n, cid),
            Heard::GoAway => session.going_away = true,
            Heard::Nothing => {}
        }
    }

    /// What was refused is sent again some time, by some; others give it up.
    fn heard_answer(&mut self, n: usize, number: u16, seq: u64, stored: bool) {
        let again = !self.healing && number.is_multiple_of(2);
        let Some(publisher) = self.clients[n].publishers.iter_mut().find(|p| p.number == number) else { return };
        let identified = publisher.identity != crate::sim::plan::IdentityKind::None;
        if stored {
            if let Some(letter) = publisher.pending.remove(&seq)
                && identified
            {
                publisher.confirmed.push((seq, letter));
            }
        } else if !(again && identified) {
            publisher.pending.remove(&seq);
        }
    }
}

/// A reply in words.
fn tell(reply: &Reply) -> String {
    match reply {
        Reply::Deliver(d) => format!(
            "DELIVER {:?} tag {} {:?}, attempt {}, redelivered {}, {:?}",
            d.sub,
            if d.topic.is_empty() { d.tag.0 } else { d.cid },
            d.qos,
            d.attempt,
            d.redelivered,
            MessageId::decode(d.body.payload())
        ),
        Reply::Confirm { cid, outcome } => format!("CONFIRM {outcome:?} ({})", cid & 0xffff),
        other => format!("{other:?}"),
    }
}
