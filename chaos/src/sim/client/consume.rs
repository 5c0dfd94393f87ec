//! Subscribing, acknowledging, rejecting, and the small requests.

use super::*;

impl World {
    pub(super) fn subscribe(&mut self, n: usize) {
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

    pub(super) fn subscribe_v1(&mut self, n: usize) {
        let features = self.script.features;
        let client = &mut self.clients[n];
        let topic = *client.rng.pick(&client.role.topics);
        if client.session.topics.contains(&topic) {
            return;
        }
        let qos0 = features.qos0 && client.rng.percent(20);
        self.subscribe_lineage(n, topic, if qos0 { Qos::AtMostOnce } else { Qos::AtLeastOnce });
    }

    pub(super) fn subscribe_lineage(&mut self, n: usize, topic: u16, qos: Qos) {
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

    pub(super) fn some_sub(&mut self, n: usize, wanted: impl Fn(&Mine) -> bool) -> Option<ClientSub> {
        let client = &mut self.clients[n];
        let all: Vec<ClientSub> =
            client.session.subs.iter().filter(|(_, mine)| wanted(mine)).map(|(sub, _)| *sub).collect();
        (!all.is_empty()).then(|| *client.rng.pick(&all))
    }

    pub(super) fn acknowledge(&mut self, n: usize) {
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
    pub(super) fn send_acks(
        &mut self,
        n: usize,
        sub: ClientSub,
        mut some: Vec<(DeliveryTag, MessageId)>,
        confirm: bool,
    ) {
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

    pub(super) fn reject(&mut self, n: usize) {
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

    pub(super) fn credit(&mut self, n: usize) {
        let Some(sub) = self.some_sub(n, |mine| mine.subject.kind.acks) else { return };
        let client = &mut self.clients[n];
        let credit = client.rng.between(0, 20) as u32;
        self.ask(n, Asked::Small, RequestKind::Credit { sub, credit });
    }

    pub(super) fn unsubscribe(&mut self, n: usize, mode: UnsubscribeMode) {
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

    pub(super) fn poll(&mut self, n: usize) {
        match self.some_sub(n, |_| true) {
            Some(sub) => _ = self.ask(n, Asked::Poll, RequestKind::Poll { sub }),
            None => self.subscribe_v1(n),
        }
    }

    pub(super) fn ping(&mut self, n: usize) {
        let Some(link) = self.clients[n].link else { return };
        let (publishes, acks) = self.unvouched.remove(&link).unwrap_or_default();
        self.ask(n, Asked::Ping { publishes, acks }, RequestKind::Ping);
    }

    pub fn pong(&mut self, n: usize, cid: u64) {
        self.send(n, cid, RequestKind::Ignored);
    }

    /// A frame that is whole, and whose payload is not.
    pub(super) fn malformed(&mut self, n: usize) {
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
