//! What the oracle must know of a world in which publishers and subscriptions come and go, messages expire, wait or die, and a
//! power cut may unwrite what the policy allows.
//!
//! Rules that go beyond those of a fixed plan:
//! - A subscription is owed what is first sent after the broker said that it exists, until it ends.
//! - A message that expires is not owed, unless a later one of its line was delivered in its place while it was to live.
//! - A copy in the dead-letter topic accounts for one subscription that did not finish the message.
//! - What a power cut was allowed to unwrite is not owed, but only if nothing that lay behind it in the same log survived.
//! - A message that was confirmed before a subscription was asked for is not for it, unless it wants what is kept.

use std::collections::{BTreeMap, HashMap};

use super::{Delivery, Kind, Oracle, Publisher, Subscription, Track, named};

/// What makes a message special.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traits {
    /// QoS0: not owed to anybody, and never delivered twice.
    pub at_most_once: bool,
    /// Its line: messages of one publisher and priority are delivered in order. `None`: delayed, so in no line.
    pub class: Option<u8>,
    /// Time to live; 0: for ever.
    pub ttl_ms: u64,
    pub delay_ms: u64,
    /// Broker time when it was first sent: it was not published before.
    pub sent_ms: u64,
}

impl Traits {
    pub const ORDINARY: Traits = Traits { at_most_once: false, class: Some(0), ttl_ms: 0, delay_ms: 0, sent_ms: 0 };
}

/// What kind of subscription somebody asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubKind {
    /// Its deliveries are acknowledged.
    pub acks: bool,
    /// Has a name: its delivery tags stay as they are for ever.
    pub named: bool,
    /// It also gets what the topic keeps.
    pub earliest: bool,
}

/// Broker time, in milliseconds, as exactly as it is known from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// When the message was published: not before, not after.
    pub published: (u64, u64),
    /// When the broker decided to deliver it: not before, not after.
    pub decided: (u64, u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Excuse {
    /// Two consumers may be attached at once from now on.
    Shared { sub: u16 },
    /// Nothing is owed to it any more.
    Ends { sub: u16 },
    /// An unanswered request or a power cut: it may exist or not.
    Unsure { sub: u16 },
    /// The broker's settings allow it to give up messages of this subscription: backlog overflow, no dead-letter topic.
    GivesUp { sub: u16 },
    /// A power cut may have unwritten the message.
    MayBeLost { publisher: u16, seq: u64 },
    /// A power cut may have unwritten the acknowledgement.
    AckMayBeLost { sub: u16, publisher: u16, seq: u64 },
}

/// A subscription that joined.
pub(super) struct Joined {
    kind: SubKind,
    state: State,
    /// The event that asked for it.
    asked_at: u64,
    gives_up: bool,
    /// What each message is called, while names stay.
    tags: HashMap<(u16, u64), u64>,
    /// The event that confirmed an acknowledgement of this run.
    acked_at: HashMap<(u16, u64), u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Never,
    Unsure,
    /// Unsure for more than one reason: if it exists, it may have been made anew.
    Muddled,
    Exists,
    Ended,
}

impl Publisher {
    pub(super) fn traits(&self, seq: u64) -> Traits {
        self.special.get(&seq).copied().unwrap_or(Traits::ORDINARY)
    }

    /// A cut may have unwritten it, and nothing shows that it did not.
    fn is_excusably_lost(&self, seq: u64) -> bool {
        let Some(run) = self.may_be_lost.get(&seq) else { return false };
        self.repeated.get(seq) || self.last_seen.get(&seq).is_none_or(|seen| seen <= run)
    }
}

impl Subscription {
    pub(super) fn at_most_once(&self) -> bool {
        self.joined.as_ref().is_some_and(|joined| !joined.kind.acks)
    }

    pub(super) fn gives_up(&self) -> bool {
        self.joined.as_ref().is_some_and(|joined| joined.gives_up)
    }

    /// Whether the message already goes by another tag.
    pub(super) fn other_tag(&mut self, publisher: u16, seq: u64, tag: u64, stays: bool) -> bool {
        let Some(joined) = self.joined.as_mut().filter(|joined| joined.kind.named) else { return false };
        let before = joined.tags.insert((publisher, seq), tag);
        stays && before.is_some_and(|before| before != tag)
    }

    pub(super) fn note_acked(&mut self, publisher: u16, seq: u64, event: u64) {
        if let Some(joined) = &mut self.joined {
            joined.acked_at.insert((publisher, seq), event);
        }
    }

    /// The acknowledgement came when a consumer that is attached since `attached` may have had the message under way.
    pub(super) fn acked_after(&self, publisher: u16, seq: u64, attached: Option<u64>) -> bool {
        let Some(acked) = self.joined.as_ref().and_then(|joined| joined.acked_at.get(&(publisher, seq))) else {
            return false;
        };
        attached.is_some_and(|attached| attached < *acked)
    }
}

impl Oracle {
    pub(super) fn on_joins(&mut self, topic: u16) {
        self.plan.publishers.push(topic);
        self.publishers.push(Publisher::default());
        for sub in &mut self.subs {
            let exists = sub.joined.as_ref().is_some_and(|joined| joined.state == State::Exists);
            sub.tracks.push(Track { owed_from: u64::from(exists), ..Track::default() });
        }
    }

    pub(super) fn on_special(&mut self, number: u16, seq: u64, traits: Traits) {
        match self.publishers.get_mut(usize::from(number)) {
            Some(publisher) => _ = publisher.special.insert(seq, traits),
            None => self.nonsense(format!("publisher {number} is not in the plan")),
        }
    }

    pub(super) fn on_asks(&mut self, topic: u16, kind: SubKind) {
        self.plan.subscriptions.push(super::PlannedSubscription { topic, shared: false });
        self.subs.push(Subscription {
            tracks: vec![Track::default(); self.publishers.len()],
            acked_in_run: Vec::new(),
            joined: Some(Joined {
                kind,
                state: State::Never,
                asked_at: self.events,
                gives_up: false,
                tags: HashMap::new(),
                acked_at: HashMap::new(),
            }),
        });
    }

    pub(super) fn on_attached(&mut self, sub: u16, conn: u32, resumed: Option<bool>) {
        let Some(joined) = self.subs.get_mut(usize::from(sub)).and_then(|s| s.joined.as_mut()) else {
            return self.nonsense(format!("subscription {sub} was never asked for"));
        };
        let before = std::mem::replace(&mut joined.state, State::Exists);
        let anew = match (before, resumed) {
            (State::Never | State::Ended, Some(true)) => {
                self.nonsense(format!("subscription {sub} is said to be an old one, and is new"));
                true
            }
            (State::Exists, Some(false)) => {
                let text = format!("subscription {sub} existed, and is gone");
                self.verdict.found(Kind::Lost, format!("run {}: {text}", self.run));
                true
            }
            (State::Unsure, None) | (_, Some(false)) | (State::Never | State::Ended, None) => true,
            (State::Muddled, _) => true,
            (State::Unsure | State::Exists, Some(true)) | (State::Exists, None) => false,
        };
        let subscription = &mut self.subs[usize::from(sub)];
        for (track, publisher) in subscription.tracks.iter_mut().zip(&self.publishers) {
            // One that was made anew has no past.
            if anew {
                *track = Track::default();
            }
            if track.owed_from == 0 {
                track.owed_from = publisher.invoked + 1;
            }
        }
        if let Some(joined) = subscription.joined.as_mut().filter(|_| anew) {
            joined.tags.clear();
            joined.acked_at.clear();
            subscription.acked_in_run.clear();
        }
        self.conns.entry(conn).or_default().attached.insert(sub, self.events);
    }

    pub(super) fn on_excused(&mut self, excuse: Excuse) {
        match excuse {
            Excuse::Shared { sub } => {
                if let Some(planned) = self.plan.subscriptions.get_mut(usize::from(sub)) {
                    planned.shared = true;
                }
            }
            Excuse::Ends { sub } => self.with_joined(sub, |joined| joined.state = State::Ended),
            Excuse::Unsure { sub } => self.with_joined(sub, |joined| {
                let twice = matches!(joined.state, State::Unsure | State::Muddled);
                joined.state = if twice { State::Muddled } else { State::Unsure };
            }),
            Excuse::GivesUp { sub } => self.with_joined(sub, |joined| joined.gives_up = true),
            Excuse::MayBeLost { publisher, seq } => {
                let run = self.run;
                if let Some(publisher) = self.publishers.get_mut(usize::from(publisher)) {
                    publisher.may_be_lost.insert(seq, run);
                }
            }
            Excuse::AckMayBeLost { sub, publisher, seq } => {
                let track = self.subs.get_mut(usize::from(sub)).and_then(|s| s.tracks.get_mut(usize::from(publisher)));
                if let Some(track) = track {
                    track.ack_may_be_lost.set(seq);
                }
            }
        }
    }

    fn with_joined(&mut self, sub: u16, f: impl FnOnce(&mut Joined)) {
        if let Some(joined) = self.subs.get_mut(usize::from(sub)).and_then(|s| s.joined.as_mut()) {
            f(joined);
        }
    }

    pub(super) fn on_buried(&mut self, number: u16, seq: u64) {
        let run = self.run;
        let Some(publisher) = self.publishers.get_mut(usize::from(number)).filter(|p| (1..=p.invoked).contains(&seq))
        else {
            let text = format!("{} is a dead letter, and was never published", named(number.into(), seq));
            return self.verdict.found(Kind::Phantom, text);
        };
        publisher.last_seen.insert(seq, run);
        *publisher.buried.entry(seq).or_default() += 1;
        if publisher.traits(seq).at_most_once {
            let text = format!("{} is a dead letter, though nobody could refuse it", named(number.into(), seq));
            self.verdict.found(Kind::Phantom, text);
        }
    }

    // ---- judging ------------------------------------------------------------------------------------------------

    /// A first confirm of something sent once is no duplicate; a second one is.
    pub(super) fn judge_answer(&mut self, number: u16, seq: u64, duplicate: bool) {
        let publisher = &self.publishers[usize::from(number)];
        let name = named(number.into(), seq);
        if duplicate && !publisher.repeated.get(seq) {
            self.nonsense(format!("{name} was confirmed as a duplicate, and was sent once"));
        } else if !duplicate
            && publisher.confirmed.get(seq)
            && !publisher.traits(seq).at_most_once
            && !publisher.may_be_lost.contains_key(&seq)
        {
            let text = format!("run {}: {name} was confirmed before, and is stored again", self.run);
            self.verdict.found(Kind::Duplicate, text);
        }
    }

    pub(super) fn judge_timing(&self, delivery: &Delivery, traits: &Traits, name: &str) -> Result<(), (Kind, String)> {
        let Some(Timing { published, decided }) = delivery.timing else { return Ok(()) };
        let from = |published: u64| published.saturating_add(traits.delay_ms);
        let end = from(published.1).saturating_add(traits.ttl_ms);
        if traits.ttl_ms > 0 && decided.0 >= end {
            let text = format!("{name} at {}, and its time was over at {end}", decided.0);
            return Err((Kind::Untimely, text));
        }
        // For a QoS0 subscription nothing is kept back.
        let kept_back = !traits.at_most_once && !self.subs[usize::from(delivery.sub)].at_most_once();
        if kept_back && traits.delay_ms > 0 && decided.1 < from(published.0) {
            let text = format!("{name} at {}, before its delay is over at {}", decided.1, from(published.0));
            return Err((Kind::Untimely, text));
        }
        if published.1 < traits.sent_ms {
            let text = format!("{name} says that it was published at {}, sent at {}", published.1, traits.sent_ms);
            return Err((Kind::Untimely, text));
        }
        Ok(())
    }

    /// A subscription gets what comes after it.
    pub(super) fn judge_belonging(
        &self,
        sub: usize,
        publisher: usize,
        seq: u64,
        name: &str,
    ) -> Result<(), (Kind, String)> {
        let Some(joined) = self.subs[sub].joined.as_ref().filter(|joined| !joined.kind.earliest) else { return Ok(()) };
        let publisher = &self.publishers[publisher];
        let before = publisher.confirmed_at.get(&seq).is_some_and(|at| *at < joined.asked_at);
        if before && !publisher.repeated.get(seq) {
            return Err((Kind::Phantom, format!("{name} was confirmed before this subscription was asked for")));
        }
        Ok(())
    }

    /// `seq` followed `before` on one connection: what lies between, and was to live, has been given up.
    pub(super) fn note_skipped(&mut self, delivery: &Delivery, number: usize, class: u8, before: u64, seq: u64) {
        let Some(Timing { decided, .. }) = delivery.timing else { return };
        let publisher = &self.publishers[number];
        let track = &mut self.subs[usize::from(delivery.sub)].tracks[number];
        if track.owed_from == 0 {
            return;
        }
        for between in before.max(track.owed_from - 1) + 1..seq {
            let traits = publisher.traits(between);
            let lives = decided.1 < traits.sent_ms.saturating_add(traits.ttl_ms);
            if traits.class == Some(class)
                && lives
                && !traits.at_most_once
                && !track.delivered.get(between)
                && publisher.confirmed.get(between)
                && !publisher.unordered.get(between)
            {
                track.skipped.set(between);
            }
        }
    }

    /// What joined subscriptions are still to get, as far as it will not expire and no dead letter accounts for it:
    /// subscription, publisher, sequence.
    pub fn outstanding(&self) -> Vec<(u16, u16, u64)> {
        let mut all = Vec::new();
        let mut copies: BTreeMap<(u16, u64), u32> = BTreeMap::new();
        for (sub, subscription) in self.subs.iter().enumerate() {
            let Some(joined) = &subscription.joined else { continue };
            if joined.state != State::Exists || !joined.kind.acks || joined.gives_up {
                continue;
            }
            let topic = self.plan.subscriptions[sub].topic;
            for (number, (publisher, track)) in self.publishers.iter().zip(&subscription.tracks).enumerate() {
                if self.plan.publishers[number] != topic || track.owed_from == 0 {
                    continue;
                }
                for seq in track.owed_from..=publisher.invoked {
                    if !publisher.confirmed.get(seq) || track.ack_sent.get(seq) {
                        continue;
                    }
                    let traits = publisher.traits(seq);
                    let expired = traits.ttl_ms > 0 && !track.skipped.get(seq);
                    if traits.at_most_once || expired || publisher.is_excusably_lost(seq) {
                        continue;
                    }
                    let used = copies.entry((number as u16, seq)).or_default();
                    if *used < publisher.buried.get(&seq).copied().unwrap_or(0) {
                        *used += 1;
                    } else {
                        all.push((sub as u16, number as u16, seq));
                    }
                }
            }
        }
        all
    }

    pub(super) fn finish_joined(&mut self) {
        for (sub, number, seq) in self.outstanding() {
            let track = &self.subs[usize::from(sub)].tracks[usize::from(number)];
            let fate = match (track.delivered.get(seq), track.skipped.get(seq)) {
                (true, _) => "got it, did not acknowledge it, and never got it again",
                (false, true) => "never got it: a later one came in its place while it was to live",
                (false, false) => "never got it",
            };
            let text = format!("{} was confirmed, subscription {sub} {fate}", named(number.into(), seq));
            self.verdict.found(Kind::Lost, text);
        }
        self.judge_gaps();
    }

    /// What a power cut takes is the end of a log, never something from its middle.
    fn judge_gaps(&mut self) {
        let mut positions = std::mem::take(&mut self.positions);
        positions.sort_unstable();
        let mut gap: Option<(u32, u64, u16, u64)> = None;
        for (log, at, number, seq) in positions {
            let publisher = &self.publishers[usize::from(number)];
            if let Some((its_log, its_at, by, lost)) = gap
                && its_log == log
                && its_at < at
                && !publisher.repeated.get(seq)
                && let Some(run) = self.publishers[usize::from(by)].may_be_lost.get(&lost)
                && publisher.last_seen.get(&seq).is_some_and(|seen| seen > run)
            {
                let text = format!(
                    "a power cut took {} at {its_at} of log {log}, and left {} at {at} behind it",
                    named(by.into(), lost),
                    named(number.into(), seq)
                );
                self.verdict.found(Kind::Lost, text);
                gap = None;
            }
            if gap.is_none_or(|(its_log, ..)| its_log != log) && self.is_surely_lost(number, seq) {
                gap = Some((log, at, number, seq));
            }
        }
    }

    /// A subscription that is owed it, and that got everything there was, did not get it.
    fn is_surely_lost(&self, number: u16, seq: u64) -> bool {
        let publisher = &self.publishers[usize::from(number)];
        let topic = self.plan.publishers[usize::from(number)];
        let traits = publisher.traits(seq);
        publisher.may_be_lost.contains_key(&seq)
            && publisher.is_excusably_lost(seq)
            && !publisher.repeated.get(seq)
            && traits.ttl_ms == 0
            && !traits.at_most_once
            && self.subs.iter().zip(&self.plan.subscriptions).any(|(sub, planned)| {
                let owed = sub.joined.as_ref().is_some_and(|joined| {
                    joined.state == State::Exists && joined.kind.acks && !joined.gives_up && planned.topic == topic
                });
                let track = &sub.tracks[usize::from(number)];
                owed && track.owed_from > 0 && track.owed_from <= seq && !track.ack_sent.get(seq)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Plan};
    use super::*;
    use crate::message::MessageId;

    const DURABLE: SubKind = SubKind { acks: true, named: true, earliest: false };

    /// One publisher and one durable subscription of topic 0, which have joined; connection 1 is attached.
    struct World {
        oracle: Oracle,
        conn: u32,
        run: u32,
    }

    impl World {
        fn new(strict: bool) -> World {
            let oracle = Oracle::new(Plan { strict, ..Plan::default() });
            let mut world = World { oracle, conn: 1, run: 0 };
            world
                .boot()
                .see(Event::Joins { topic: 0 })
                .see(Event::Asks { topic: 0, kind: DURABLE })
                .attach(Some(false));
            world
        }

        fn see(&mut self, event: Event) -> &mut World {
            self.oracle.observe(&event);
            self
        }

        fn excuse(&mut self, excuse: Excuse) -> &mut World {
            self.see(Event::Excused(excuse))
        }

        fn boot(&mut self) -> &mut World {
            self.run += 1;
            self.conn += 1;
            self.see(Event::Boot { run: self.run })
        }

        fn attach(&mut self, resumed: Option<bool>) -> &mut World {
            self.see(Event::Attached { sub: 0, conn: self.conn, resumed })
        }

        fn invoke(&mut self, seq: u64) -> &mut World {
            self.see(Event::Invoke { publisher: 0, seq })
        }

        fn confirm(&mut self, seq: u64) -> &mut World {
            self.see(Event::Confirmed { publisher: 0, seq, duplicate: false })
        }

        fn special(&mut self, seq: u64, traits: Traits) -> &mut World {
            self.see(Event::Special { publisher: 0, seq, traits })
        }

        fn delivery(&self, seq: u64) -> Delivery {
            let message = Some(MessageId { publisher: 0, topic: 0, seq });
            Delivery { sub: 0, conn: self.conn, tag: seq, attempt: 1, redelivered: false, message, timing: None }
        }

        fn deliver(&mut self, seq: u64) -> &mut World {
            self.see(Event::Deliver(self.delivery(seq)))
        }

        fn again(&mut self, seq: u64, attempt: u16) -> &mut World {
            self.see(Event::Deliver(Delivery { attempt, redelivered: true, ..self.delivery(seq) }))
        }

        fn at(&mut self, seq: u64, published: u64, decided: u64) -> &mut World {
            let timing = Some(Timing { published: (published, published), decided: (decided, decided) });
            self.see(Event::Deliver(Delivery { timing, ..self.delivery(seq) }))
        }

        fn ack(&mut self, seq: u64) -> &mut World {
            self.see(Event::AckSent { sub: 0, publisher: 0, seq }).see(Event::Acked { sub: 0, publisher: 0, seq })
        }

        fn store(&mut self, seqs: std::ops::RangeInclusive<u64>) -> &mut World {
            for seq in seqs {
                self.invoke(seq).confirm(seq);
            }
            self
        }

        #[track_caller]
        fn has(self, kinds: &[Kind]) {
            let verdict = self.oracle.finish(true);
            let found: Vec<Kind> =
                Kind::ALL.iter().flat_map(|k| std::iter::repeat_n(*k, verdict.count(*k) as usize)).collect();
            let mut kinds = kinds.to_vec();
            kinds.sort_unstable();
            assert_eq!(found, kinds, "{:?}", verdict.details);
        }
    }

    fn traits() -> Traits {
        Traits::ORDINARY
    }

    #[test]
    fn lost_is_what_was_sent_after_the_subscription_began_and_before_it_ended() {
        let mut w = World::new(true);
        w.store(1..=2).deliver(1).ack(1);
        assert_eq!(w.oracle.outstanding(), [(0, 0, 2)]);
        w.has(&[Kind::Lost]);

        let mut w = World::new(true);
        w.store(1..=2).excuse(Excuse::Ends { sub: 0 });
        w.has(&[]);

        // What was sent before it began is neither owed, nor, if confirmed before it was asked for, to be delivered.
        let mut w = World::new(true);
        w.store(1..=1).deliver(1).ack(1).see(Event::Asks { topic: 0, kind: DURABLE });
        let conn = w.conn;
        w.see(Event::Attached { sub: 1, conn, resumed: Some(false) });
        w.store(2..=2).deliver(2).ack(2);
        let stray = Delivery { sub: 1, ..w.delivery(1) };
        w.see(Event::Deliver(stray));
        w.has(&[Kind::Phantom, Kind::Lost]);
    }

    #[test]
    fn a_publisher_that_joins_later_is_owed_to_those_who_are_there() {
        let mut w = World::new(true);
        w.see(Event::Joins { topic: 0 });
        w.see(Event::Invoke { publisher: 1, seq: 1 });
        w.see(Event::Confirmed { publisher: 1, seq: 1, duplicate: false });
        w.has(&[Kind::Lost]);
    }

    #[test]
    fn lost_subscription_unless_a_cut_was_allowed_to_take_it() {
        let mut w = World::new(true);
        w.boot().attach(Some(false));
        w.has(&[Kind::Lost]);

        let mut w = World::new(true);
        w.store(1..=1).excuse(Excuse::Unsure { sub: 0 }).boot().attach(Some(false));
        w.has(&[]);

        // Asked for again without an answer, it may have been made anew even if it is there.
        for (excuses, found) in [(1, &[Kind::Lost][..]), (2, &[][..])] {
            let mut w = World::new(true);
            w.store(1..=1);
            for _ in 0..excuses {
                w.excuse(Excuse::Unsure { sub: 0 });
            }
            w.boot().attach(Some(true));
            w.has(found);
        }

        // Made anew, it may have what it had before, from the beginning.
        let mut w = World::new(false);
        w.store(1..=2).deliver(1).ack(1).deliver(2).ack(2).excuse(Excuse::Unsure { sub: 0 }).boot().attach(Some(false));
        w.again(1, 1).again(2, 1);
        w.has(&[]);

        let mut w = World::new(true);
        w.see(Event::Asks { topic: 0, kind: DURABLE });
        let conn = w.conn;
        w.see(Event::Attached { sub: 1, conn, resumed: Some(true) });
        w.has(&[Kind::Misbehaved]);
    }

    #[test]
    fn expired_is_excused_unless_it_was_skipped_while_it_was_to_live() {
        let mortal = Traits { ttl_ms: 1_000, sent_ms: 5_000, ..traits() };
        for (decided, found) in [(6_500, &[][..]), (5_900, &[Kind::Lost][..])] {
            let mut w = World::new(true);
            w.special(2, mortal).store(1..=3).at(1, 5_000, decided).ack(1).at(3, 5_000, decided).ack(3);
            w.has(found);
        }
    }

    #[test]
    fn untimely_is_before_the_delay_and_after_the_time_to_live() {
        let special = Traits { ttl_ms: 1_000, delay_ms: 500, class: None, sent_ms: 4_000, ..traits() };
        for (decided, found) in [(4_499, &[Kind::Untimely][..]), (4_500, &[]), (5_499, &[]), (5_500, &[Kind::Untimely])]
        {
            let mut w = World::new(true);
            w.special(1, special).store(1..=1).at(1, 4_000, decided);
            w.has(found);
        }
        let mut w = World::new(true);
        w.special(1, Traits { sent_ms: 4_000, ..traits() }).store(1..=1).at(1, 3_999, 4_000).ack(1);
        w.has(&[Kind::Untimely, Kind::Lost]);
    }

    #[test]
    fn at_most_once_is_not_owed_and_not_repeated() {
        let mut w = World::new(true);
        w.special(1, Traits { at_most_once: true, ..traits() }).store(1..=1);
        w.has(&[]);
        let mut w = World::new(true);
        w.special(1, Traits { at_most_once: true, ..traits() }).store(1..=1).deliver(1).again(1, 1);
        w.has(&[Kind::Duplicate]);
        // Its identity is in memory only: sent again to another run, it comes again.
        let mut w = World::new(true);
        w.special(1, Traits { at_most_once: true, ..traits() }).store(1..=1).deliver(1).boot().attach(Some(true));
        w.invoke(1).deliver(1);
        w.has(&[]);
    }

    #[test]
    fn a_copy_among_the_dead_letters_accounts_for_one_subscription() {
        let two = |copies: usize, found: &[Kind]| {
            let mut w = World::new(true);
            let conn = w.conn;
            w.see(Event::Asks { topic: 0, kind: DURABLE });
            w.see(Event::Attached { sub: 1, conn, resumed: Some(false) }).store(1..=1);
            for _ in 0..copies {
                w.see(Event::Buried { publisher: 0, seq: 1 });
            }
            w.has(found);
        };
        two(0, &[Kind::Lost, Kind::Lost]);
        two(1, &[Kind::Lost]);
        two(2, &[]);
        let mut w = World::new(true);
        w.see(Event::Buried { publisher: 0, seq: 1 });
        w.has(&[Kind::Phantom]);
    }

    #[test]
    fn lost_to_a_power_cut_only_as_far_as_allowed_and_only_the_end_of_a_log() {
        let position = |seq, at| Event::Position { publisher: 0, seq, log: 7, at };
        let cut = |lost: &[u64], seen: &[u64], found: &[Kind]| {
            let mut w = World::new(false);
            w.store(1..=3).see(position(1, 100)).see(position(2, 200)).see(position(3, 300));
            for seq in lost {
                w.excuse(Excuse::MayBeLost { publisher: 0, seq: *seq });
            }
            w.boot().attach(Some(true));
            for seq in seen {
                w.again(*seq, 1).ack(*seq);
            }
            w.has(found);
        };
        cut(&[2, 3], &[1], &[]);
        cut(&[2, 3], &[1, 2], &[]);
        cut(&[3], &[1], &[Kind::Lost]);
        // A hole: the later one survived.
        cut(&[2, 3], &[1, 3], &[Kind::Lost]);
    }

    #[test]
    fn allowed_loss_is_no_excuse_for_one_that_another_subscription_got_afterwards() {
        let mut w = World::new(false);
        w.see(Event::Asks { topic: 0, kind: DURABLE });
        let conn = w.conn;
        w.see(Event::Attached { sub: 1, conn, resumed: Some(false) });
        w.store(1..=1).excuse(Excuse::MayBeLost { publisher: 0, seq: 1 }).boot().attach(Some(true)).again(1, 1).ack(1);
        w.has(&[Kind::Lost]);
    }

    #[test]
    fn lost_consumer_ack_unless_the_cut_was_allowed_to_take_it() {
        for allowed in [false, true] {
            let mut w = World::new(false);
            w.store(1..=1).deliver(1).ack(1);
            if allowed {
                w.excuse(Excuse::AckMayBeLost { sub: 0, publisher: 0, seq: 1 });
            }
            w.boot().attach(Some(true)).again(1, 1);
            w.has(if allowed { &[] } else { &[Kind::LostConsumerAck] });
        }
    }

    #[test]
    fn duplicate_by_answer() {
        let mut w = World::new(true);
        w.store(1..=1).invoke(1).confirm(1).deliver(1).ack(1);
        w.has(&[Kind::Duplicate]);
        let mut w = World::new(true);
        w.invoke(1).see(Event::Confirmed { publisher: 0, seq: 1, duplicate: true }).deliver(1).ack(1);
        w.has(&[Kind::Misbehaved]);
    }

    #[test]
    fn duplicate_under_another_tag_on_another_connection() {
        let mut w = World::new(true);
        w.store(1..=1).deliver(1).boot().attach(Some(true));
        let copy = Delivery { tag: 9, redelivered: true, ..w.delivery(1) };
        w.see(Event::Deliver(copy)).ack(1);
        w.has(&[Kind::Duplicate]);
    }

    #[test]
    fn a_delivery_that_was_under_way_when_another_consumer_acknowledged_is_excused() {
        for (shared, late, found) in
            [(true, false, &[][..]), (false, false, &[Kind::Duplicate][..]), (true, true, &[Kind::Duplicate][..])]
        {
            let mut w = World::new(true);
            if shared {
                w.excuse(Excuse::Shared { sub: 0 });
            }
            let other = 77;
            w.store(1..=1).deliver(1);
            let attach = Event::Attached { sub: 0, conn: other, resumed: Some(true) };
            if late {
                w.ack(1).see(attach);
            } else {
                w.see(attach).ack(1);
            }
            let under_way = Delivery { conn: other, attempt: 2, redelivered: true, ..w.delivery(1) };
            w.see(Event::Deliver(under_way));
            w.has(found);
        }
    }

    #[test]
    fn a_first_delivery_that_its_own_redelivery_overtook_is_excused_once() {
        let mut w = World::new(true);
        w.excuse(Excuse::Shared { sub: 0 }).store(1..=1).again(1, 2);
        let late = Delivery { conn: 77, ..w.delivery(1) };
        w.see(Event::Deliver(late)).ack(1);
        w.has(&[]);
        let mut w = World::new(true);
        w.excuse(Excuse::Shared { sub: 0 }).store(1..=1).again(1, 2);
        for conn in [77, 78] {
            let late = Delivery { conn, ..w.delivery(1) };
            w.see(Event::Deliver(late));
        }
        w.ack(1);
        w.has(&[Kind::DuplicateNotFlagged]);
    }

    #[test]
    fn out_of_order_within_a_line_only() {
        let urgent = Traits { class: Some(5), ..traits() };
        let delayed = Traits { class: None, delay_ms: 1, ..traits() };
        let mut w = World::new(true);
        w.special(3, urgent).special(4, urgent).special(1, delayed).store(1..=5);
        for seq in [3, 4, 2, 5, 1] {
            w.deliver(seq).ack(seq);
        }
        w.has(&[]);
        let mut w = World::new(true);
        w.special(1, urgent).special(2, urgent).store(1..=2).deliver(2).ack(2).deliver(1).ack(1);
        w.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn what_was_refused_and_sent_again_takes_its_place_behind_the_others() {
        let mut w = World::new(true);
        w.invoke(1).invoke(2).see(Event::Rejected { publisher: 0, seq: 1, code: 507 }).confirm(2);
        w.invoke(1).confirm(1).deliver(2).ack(2).deliver(1).ack(1);
        w.has(&[]);
    }

    #[test]
    fn a_dialect_without_flags_is_judged_by_what_was_seen() {
        let bare = |w: &World, seq| Event::Deliver(Delivery { attempt: 0, ..w.delivery(seq) });
        let mut w = World::new(true);
        w.store(1..=3);
        for seq in [1, 2, 1, 3] {
            let event = bare(&w, seq);
            w.see(event);
        }
        w.ack(1).ack(2).ack(3);
        w.has(&[]);
        let mut w = World::new(true);
        w.store(1..=2);
        for seq in [2, 1] {
            let event = bare(&w, seq);
            w.see(event).ack(seq);
        }
        w.has(&[Kind::OutOfOrder]);
    }

    #[test]
    fn what_the_broker_may_give_up_is_not_owed() {
        let mut w = World::new(true);
        w.excuse(Excuse::GivesUp { sub: 0 }).store(1..=1);
        w.has(&[]);
        // It may turn up behind others after a crash, but not before.
        for (crash, found) in [(true, &[][..]), (false, &[Kind::OutOfOrder][..])] {
            let mut w = World::new(true);
            w.excuse(Excuse::GivesUp { sub: 0 }).store(1..=2).deliver(2).ack(2);
            if crash {
                w.boot().attach(Some(true)).again(1, 1);
            } else {
                w.deliver(1);
            }
            w.has(found);
        }
    }
}
