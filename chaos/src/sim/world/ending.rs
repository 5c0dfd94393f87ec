//! After the chaos: no more faults, and everything must come to its end.

use super::network::calm;
use super::*;

impl World {
    pub(super) fn heal(&mut self) {
        self.say(|| "no more faults from now on".into());
        self.machine.heal();
        self.crash_after = None;
        if self.machine.is_up() && self.rng.percent(50) && self.options.allows(What::Kill.name()) {
            self.crash(What::Kill, 0);
            self.crash_after = None;
        }
        self.healing = true;
        self.phase = Phase::Drain;
        self.healed_at = self.now;
        self.last_delivery = self.now;
        let open: Vec<u32> = self.links.keys().copied().collect();
        for number in open {
            let link = self.links.get_mut(&number).expect("listed");
            link.stalled_until = Instant(0);
            if link.dead {
                self.push(self.now, Item::ClientNotices { link: number });
                self.push(self.now, Item::BrokerNotices { link: number });
            } else {
                self.push(self.now, Item::ToClient { link: number });
            }
        }
        let role = Role {
            version: Version::V2,
            pace_ms: 20,
            identity: IdentityKind::None,
            publishes: 0,
            topics: vec![0],
            manner: calm(),
            patience: Duration::from_secs(30),
            draws: 1,
        };
        let number = self.clients.len();
        self.collector = Some(number);
        let mut collector = Client::new(number, role);
        collector.key = format!("key-{CLIENTS_MAX}");
        self.clients.push(collector);
        self.plan_act(number, 1);
        self.push(self.now + LOOK, Item::Look);
    }

    /// The collector attaches to everything that goes by a name.
    pub fn collect(&mut self, n: usize) {
        let named = self.books.names().into_iter().filter_map(|name| self.books.named(name));
        let wanted: Vec<SubRef> = named.chain((0..TOPICS.len() as u16).map(dead_letters)).collect();
        let link = self.clients[n].link;
        for subject in wanted {
            let same = |other: &SubRef| (other.number, other.topic) == (subject.number, subject.topic);
            let has = self.clients[n].session.subs.values().any(|mine| same(&mine.subject));
            let asks = self
                .asked
                .iter()
                .any(|((on, _), asked)| Some(*on) == link && matches!(asked, Asked::Subscribe(other) if same(other)));
            if !has && !asks {
                self.send_subscribe(n, subject);
            }
        }
    }

    pub(super) fn look(&mut self) {
        let since = self.now - self.healed_at;
        let quiet = self.now - self.last_delivery;
        let answered = self.clients.iter().all(Client::is_answered);
        match self.phase {
            Phase::Drain => {
                let open = self.oracle.outstanding().len();
                let calm = quiet > Duration::from_secs(3) && since > Duration::from_secs(3);
                if answered && calm && (open == 0 || quiet > QUIET) {
                    self.say(|| format!("all is answered, {open} messages are outstanding"));
                    self.phase = Phase::Rest;
                    self.last_delivery = self.now;
                    self.done = true;
                    for n in 0..self.clients.len() {
                        self.leave(n, false);
                    }
                } else if since > HEAL_MAX {
                    return self.stuck(format!("{open} messages outstanding, all publishes answered: {answered}"));
                }
            }
            Phase::Rest => {
                if self.machine.is_quiet() && self.by_conn.is_empty() && quiet > Duration::from_secs(1) {
                    self.check();
                    return self.end();
                }
                if quiet > HEAL_MAX {
                    let (quiet, open) = (self.machine.is_quiet(), self.by_conn.len());
                    return self.stuck(format!("the broker does not come to rest: quiet {quiet}, {open} connections"));
                }
            }
            Phase::Chaos | Phase::Over => {}
        }
        self.push(self.now + LOOK, Item::Look);
    }

    pub(super) fn end(&mut self) {
        self.phase = Phase::Over;
        let metrics = self.machine.metrics();
        self.life.count_metrics(&metrics);
        let outstanding = self.oracle.outstanding();
        let oracle = std::mem::replace(&mut self.oracle, Oracle::new(oracle::Plan::default()));
        let verdict = oracle.finish(true);
        if !verdict.is_clean() && self.life.failure.is_none() {
            let lost = verdict.count(Kind::Lost) > 0;
            let text = verdict.details.join("; ");
            let invariant = verdict_name(&verdict);
            // What the broker itself still has is not lost; it just does not come.
            let waiting = metrics.queue_waiting;
            let text = if lost {
                format!("{text} (the broker has {waiting} waiting, {} outstanding)", outstanding.len())
            } else {
                text
            };
            self.fail(invariant, text);
        }
    }
}

fn dead_letters(topic: u16) -> SubRef {
    let kind = crate::oracle::SubKind { acks: true, named: true, earliest: true };
    SubRef { number: DEAD_LETTERS, topic, name: None, kind, asked: 0 }
}
