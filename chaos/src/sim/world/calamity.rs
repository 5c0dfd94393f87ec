//! What befalls the world: the process dies, stops and starts again, the power goes, connections break. And what a power cut
//! excuses.

use super::*;

impl World {
    pub(super) fn calamity(&mut self, calamity: Calamity) {
        let Calamity { what, dice, .. } = calamity;
        if self.healing {
            return;
        }
        match what {
            What::Kill | What::Power => self.crash(what, dice),
            What::Stop => self.stop(dice),
            What::Clock => {
                let mut rng = Rng::new(dice);
                let most = *rng.pick(&[50, 5_000, 4_000_000]);
                let by = rng.between(0, 2 * most) as i64 - most as i64;
                self.wall_step += by;
                self.say(|| format!("the computer's clock steps by {by} ms"));
                self.life.count(what.name());
            }
            _ => self.trouble(what, dice),
        }
    }

    /// Something happens to one connection.
    pub(super) fn trouble(&mut self, what: What, dice: u64) {
        let open: Vec<u32> =
            self.links.values().filter(|l| !l.left && !l.dead && l.conn.is_some()).map(|l| l.number).collect();
        if open.is_empty() {
            return;
        }
        let mut rng = Rng::new(dice);
        let number = *rng.pick(&open);
        self.life.count(what.name());
        let now = self.now;
        let link = self.links.get_mut(&number).expect("listed");
        let n = link.client;
        match what {
            What::Cut => {
                link.dead = true;
                let (client, broker) = (rng.between(0, 2_000), rng.between(0, 2_000));
                self.push(now + Duration::from_millis(client), Item::ClientNotices { link: number });
                self.push(now + Duration::from_millis(broker), Item::BrokerNotices { link: number });
            }
            What::Reset => {
                link.dead = true;
                self.push(now, Item::ClientNotices { link: number });
                self.push(now, Item::BrokerNotices { link: number });
            }
            What::HalfOpen => {
                link.dead = true;
                self.push(now + Duration::from_secs(120), Item::BrokerNotices { link: number });
            }
            What::Stall => link.stalled_until = now + Duration::from_millis(rng.between(50, 3_000)),
            What::Drip => link.byte_by_byte(rng.between(50, 400) as u32),
            What::Garbage => {
                link.spoilt = true;
                let version = link.version;
                self.write(n, garbage(&mut rng, version));
            }
            What::Kill | What::Power | What::Stop | What::Clock => {}
        }
        self.say(|| format!("connection {number} of client {n}: {}", what.name()));
    }

    pub(super) fn stop(&mut self, dice: u64) {
        if !self.machine.is_up() || self.stopping {
            return;
        }
        self.say(|| "SIGTERM".into());
        self.life.count(What::Stop.name());
        self.stopping = true;
        let now = self.computer_now();
        self.machine.stop(now);
        let mut rng = Rng::new(dice);
        if rng.percent(25) {
            self.crash_after = Some(rng.between(1, 60));
        }
    }

    /// The process dies, or the power goes; it may go while the process is dead, too.
    pub(super) fn crash(&mut self, what: What, dice: u64) {
        let how = if what == What::Power { Crash::PowerLoss } else { Crash::Killed };
        let up = self.machine.is_up();
        if !up && (how == Crash::Killed || !dice.is_multiple_of(3)) {
            return;
        }
        self.say(|| format!("{how:?}{}", if up { "" } else { ", while the process is down" }));
        self.life.count(what.name());
        self.life.crashes += 1;
        let mut rng = Rng::new(dice);
        if how == Crash::PowerLoss {
            self.excuse_power_loss();
        }
        let now = self.computer_now();
        self.machine.crash(now, how);
        // Now and then the clock is another one when the power is back.
        if how == Crash::PowerLoss && rng.percent(20) && self.options.allows(What::Clock.name()) {
            self.wall_step += rng.between(0, 20_000) as i64 - 10_000;
        }
        let wait = if rng.percent(40) { 0 } else { rng.between(0, 1_500) };
        self.off(Duration::from_millis(wait));
        if rng.percent(25) {
            self.crash_after = Some(rng.between(1, 80));
        }
    }

    pub(super) fn on_death(&mut self, death: Death) {
        self.say(|| format!("the process has died: {death:?}"));
        self.life.count("death");
        self.life.crashes += 1;
        // What a failed sync was to cover is gone, as if the power were.
        if matches!(&death, Death::Io(what) if what.contains("sync")) {
            self.excuse_power_loss();
        }
        if let Death::Corrupt(text) = &death {
            if !self.machine.is_damaged() {
                self.violated("I9", format!("died of corruption on a sound disk: {text}"));
            }
            self.repair();
        }
        let wait = self.rng.between(0, 1_000);
        self.off(Duration::from_millis(wait));
    }

    pub(super) fn repair(&mut self) {
        let damage = self.machine.repair();
        self.life.count("repaired");
        self.say(|| format!("the disk is repaired: {damage:?}"));
    }

    /// The process is gone: so are all connections, and in a while it will be started again.
    pub(super) fn off(&mut self, wait: Duration) {
        self.stopping = false;
        self.crash_after = None;
        self.books.nobody_consumes();
        let open: Vec<u32> = self.by_conn.values().copied().collect();
        for number in open {
            self.lost_conn(number);
            if let Some(link) = self.links.get(&number)
                && !link.left
                && !link.dead
            {
                let at = link.down_end(self.now) + Duration(self.rng.between(0, 50_000_000));
                self.push(at, Item::ClientNotices { link: number });
            }
        }
        self.starts += 1;
        let attempt = self.starts;
        self.push(self.now + wait, Item::Start { attempt });
    }

    /// What the policy allows a power cut to unwrite.
    pub(super) fn excuse_power_loss(&mut self) {
        let mut lost = Vec::new();
        for one in &self.books.window {
            if self.machine.held(one.id) < Held::Synced {
                lost.push(one.id);
            }
        }
        self.books.forget_unsynced(|id| self.machine.held(id));
        for id in lost {
            self.say(|| format!("{id:?} was confirmed and is not synced"));
            self.observe(Event::Excused(Excuse::MayBeLost { publisher: id.publisher, seq: id.seq }));
        }
        if self.script.machine.policy == FsyncPolicy::Always {
            return;
        }
        let synced: Vec<Lsn> = (0..self.machine.cores()).map(|core| self.machine.log_synced(core)).collect();
        // Of a process that is down nothing can be asked; what was safe when it died is marked.
        let is_safe = |core: u16, mark: Lsn| mark <= synced.get(usize::from(core)).copied().unwrap_or(Lsn(0));
        let (safe, acks) =
            std::mem::take(&mut self.books.acks).into_iter().partition(|ack| is_safe(ack.core, ack.mark));
        self.books.acks = safe;
        let (safe, made) =
            std::mem::take(&mut self.books.made).into_iter().partition(|sub| is_safe(sub.core, sub.mark));
        self.books.made = safe;
        let (acks, made): (Vec<AckNote>, Vec<SubNote>) = (acks, made);
        self.books.acks.iter_mut().for_each(|ack| ack.mark = Lsn(0));
        self.books.made.iter_mut().for_each(|sub| sub.mark = Lsn(0));
        for ack in acks {
            let (sub, MessageId { publisher, seq, .. }) = (ack.sub, ack.id);
            self.observe(Event::Excused(Excuse::AckMayBeLost { sub, publisher, seq }));
        }
        for sub in made {
            self.books.unsure(sub.sub);
            self.observe(Event::Excused(Excuse::Unsure { sub: sub.sub }));
        }
    }

    /// Damage that nothing witnesses is taken for a torn tail, as it may be.
    pub(super) fn excuse_unwitnessed(&mut self) {
        let report = self.machine.report().clone();
        self.life.truncated += report.truncated_frames;
        self.life.fallbacks += u64::from(report.fallbacks);
        if report.lost_unwitnessed == 0 {
            return;
        }
        self.life.count("unwitnessed");
        self.say(|| format!("damage without a witness: {report:?}"));
        for MessageId { publisher, seq, .. } in report.lost_messages {
            self.observe(Event::Excused(Excuse::MayBeLost { publisher, seq }));
        }
        for ack in std::mem::take(&mut self.books.acks) {
            let (sub, MessageId { publisher, seq, .. }) = (ack.sub, ack.id);
            self.observe(Event::Excused(Excuse::AckMayBeLost { sub, publisher, seq }));
        }
        for sub in std::mem::take(&mut self.books.made) {
            self.books.unsure(sub.sub);
            self.observe(Event::Excused(Excuse::Unsure { sub: sub.sub }));
        }
    }

    pub(super) fn start_process(&mut self) {
        self.starts += 1;
        let attempt = self.starts;
        let cores = if self.run == 0 || self.rng.percent(50) {
            self.script.cores
        } else {
            self.rng.between(1, u64::from(self.script.cores_max)) as u16
        };
        let now = self.computer_now();
        match self.machine.start(now, cores) {
            Ok(()) => {
                self.script.cores = cores;
                self.excuse_unwitnessed();
                self.run += 1;
                let run = self.run;
                self.say(|| format!("run {run} begins, on {cores} cores"));
                self.observe(Event::Boot { run });
                self.books.window.clear();
                self.books.acks.clear();
                self.books.made.clear();
                self.life.starts += 1;
                self.check();
            }
            Err(refused) => {
                self.say(|| format!("the start is refused: {refused:?}"));
                self.life.refused += 1;
                self.check();
                match refused {
                    Refused::Corrupt(text) => {
                        if !self.machine.is_damaged() {
                            self.violated("I9", format!("a sound store was refused: {text}"));
                        }
                        self.repair();
                    }
                    // A sync that fails takes with it what it was to cover.
                    Refused::Unreadable(text) if text.contains("sync") => self.excuse_power_loss(),
                    Refused::Unreadable(_) | Refused::NoSpace(_) => {}
                }
                let wait = self.rng.between(1, 300);
                self.push(self.now + Duration::from_millis(wait), Item::Start { attempt });
            }
        }
    }
}

/// Bytes that are no frame.
fn garbage(rng: &mut Rng, version: Version) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..rng.between(4, 60)).map(|_| rng.draw() as u8).collect();
    match rng.between(0, 2) {
        // Longer than any frame; shorter than any; of a type that there is not.
        0 => bytes[0] |= 0x80,
        1 => bytes[..4].copy_from_slice(&[0, 0, 0, rng.between(0, 8) as u8]),
        _ => {
            let kind = if version == Version::V1 { 0x7f } else { 0x03 };
            bytes = vec![0, 0, 0, 10, kind, 0, 0, 0, 0, 0, 0, 0, 1, 9];
        }
    }
    bytes
}
