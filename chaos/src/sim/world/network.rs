//! What is on its way between clients and broker, and how connections begin and end.

use super::*;

impl World {
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

    pub(super) fn accept(&mut self, number: u32) {
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
    pub(super) fn carry_to_broker(&mut self, number: u32) {
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
    pub(super) fn drain(&mut self, number: u32) {
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

    pub(super) fn carry_to_client(&mut self, number: u32) {
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

    pub(super) fn broker_notices(&mut self, number: u32) {
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

    pub(super) fn on_closed(&mut self, conn: ConnId, reason: CloseReason) {
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
    pub(super) fn lost_conn(&mut self, number: u32) {
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
    pub(super) fn unanswered(&mut self, number: u32) {
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
    pub(super) fn forget_link(&mut self, number: u32) {
        self.links.remove(&number);
        self.unvouched.remove(&number);
        self.books.link_forgotten(number);
        self.unanswered(number);
    }
}

/// How connections are when the chaos is over.
pub(super) fn calm() -> Manner {
    Manner { delay_us: (50, 300), slices: Slices::Whole, room: 1 << 20 }
}
