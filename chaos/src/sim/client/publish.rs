//! What a client publishes, and publishes again.

use super::*;

impl World {
    pub(super) fn publish_some(&mut self, n: usize) {
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

    pub(super) fn publish(&mut self, n: usize, p: usize) {
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
    pub(super) fn send_letter(&mut self, n: usize, p: usize, seq: u64, letter: Letter) {
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
    pub(super) fn resend_confirmed(&mut self, n: usize) {
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

    pub(super) fn alias(&mut self, n: usize) {
        let client = &mut self.clients[n];
        let topic = *client.rng.pick(&client.role.topics);
        let alias = client.rng.between(0, 3) as u32;
        client.session.aliases.insert(alias, topic);
        self.ask(n, Asked::Alias, RequestKind::Alias { alias, topic: topic_name(topic) });
    }
}
