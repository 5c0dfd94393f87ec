//! One core's part of the broker, as a state machine: an event goes in, effects come out.
//!
//! Owns: this core's connections and topics, and what they have to say to each other. Never: waits, fails, reads a clock,
//! touches a socket or a file. `driver` performs the effects; the simulator does so in a world of its own.

/// Log bytes that are still in memory.
pub mod cache;
/// Topics and subscriptions, and every change the log records.
pub mod catalog;
/// One connection: greeted -> authenticated -> open.
pub mod connection;
/// Everything a shard can ask for.
pub mod effects;
/// Everything that can happen to a shard.
pub mod event;
/// Where a topic's live messages lie in the log.
pub mod index;
/// What an operator may ask.
pub mod inspect;
/// What connections and topics say to each other.
pub mod message;
pub mod ranges;
/// Topic name -> virtual shard.
pub mod routing;
pub mod settings;
/// A virtual shard's state in a checkpoint.
pub mod snapshot;
/// One queue: credit, in-flight window, redelivery.
pub mod subscription;
/// All deadlines in one queue.
pub mod timers;
/// One topic: sequence, deduplication.
pub mod topic;
/// Publish, acknowledge, deliver, dead-letter.
pub mod topics;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::access::KeyRing;
use crate::metrics::CoreMetrics;
use crate::shard::catalog::Catalog;
use crate::shard::connection::{Connections, Desk};
use crate::shard::effects::Effects;
use crate::shard::event::{Event, FromKeeper};
use crate::shard::message::{Ask, Tell};
use crate::shard::settings::Settings;
use crate::shard::timers::{Timer, Timers};
use crate::shard::topics::{Topics, Turn};
use crate::time::{Instant, Now};
use crate::types::{ClientSubIds, Lsn};
use crate::wal::batch::{Log, Write};
use crate::wal::commit::Commit;

pub struct Shard {
    settings: Arc<Settings>,
    connections: Connections,
    topics: Topics,
    timers: Timers,
    metrics: CoreMetrics,
    asks: VecDeque<Ask>,
    tells: VecDeque<Tell>,
    draining: bool,
}

/// What a shard is made of, once recovery has read the log.
pub struct Parts {
    pub settings: Settings,
    pub keys: KeyRing,
    pub sub_ids: ClientSubIds,
    pub catalog: Catalog,
    pub log: Log,
    pub commit: Commit,
}

impl Shard {
    pub fn new(parts: Parts, now: Now, effects: &mut Effects) -> Shard {
        let settings = Arc::new(parts.settings);
        let mut shard = Shard {
            connections: Connections::new(settings.clone(), parts.keys, parts.sub_ids),
            topics: Topics::new(settings.clone(), parts.catalog, parts.log, parts.commit),
            settings,
            timers: Timers::default(),
            metrics: CoreMetrics::default(),
            asks: VecDeque::new(),
            tells: VecDeque::new(),
            draining: false,
        };
        shard.with_topics(now, effects, |topics, turn| topics.start(turn));
        shard.settle(now, effects);
        shard
    }

    /// Takes one thing that happened; adds to `effects` what is now to be done. Never waits, never fails.
    pub fn on_event(&mut self, now: Now, event: Event, effects: &mut Effects) {
        self.metrics.events += 1;
        match event {
            Event::Opened { conn, peer } => self.with_connections(now, effects, |c, desk| c.opened(conn, peer, desk)),
            Event::Request { conn, request } => {
                self.with_connections(now, effects, |c, desk| c.on_request(conn, request, desk));
            }
            Event::Partial { conn, held } => self.with_connections(now, effects, |c, desk| c.partial(conn, held, desk)),
            Event::BadFrame { conn, error } => {
                self.with_connections(now, effects, |c, desk| c.bad_frame(conn, error, desk));
            }
            Event::Closed { conn } => self.with_connections(now, effects, |c, desk| c.closed(conn, desk)),
            Event::Sent { conn, left } => self.with_connections(now, effects, |c, desk| c.on_sent(conn, left, desk)),
            Event::Remote { from, batch } => {
                if batch.released > 0 {
                    let (messages, bytes) = (batch.released, batch.released_bytes);
                    self.with_connections(now, effects, |c, desk| c.released(from, messages, bytes, desk));
                }
                self.with_topics(now, effects, |topics, turn| {
                    for ask in batch.asks {
                        topics.on_ask(Some(from), ask, turn);
                    }
                });
                self.with_connections(now, effects, |c, desk| {
                    for tell in batch.tells {
                        c.on_tell(tell, desk);
                    }
                });
            }
            Event::LogWritten { end, records, synced } => {
                self.metrics.wal_batches += 1;
                self.metrics.batch_records.record(u64::from(records));
                self.with_topics(now, effects, |t, turn| t.on_written(end, records, synced, turn));
            }
            Event::LogSynced { upto } => self.with_topics(now, effects, |topics, turn| topics.on_synced(upto, turn)),
            Event::BacklogRead { slot, offset, bytes } => {
                self.with_topics(now, effects, |topics, turn| topics.on_backlog_read(slot, offset, bytes, turn));
            }
            Event::Keeper(message) => self.with_topics(now, effects, |topics, turn| match message {
                FromKeeper::Grant(grant) => topics.on_grant(grant, turn),
                FromKeeper::TakeSnapshot { force } => topics.take_snapshot(force, turn),
                FromKeeper::Relocate { slot } => topics.relocate(slot),
                FromKeeper::NoSpace { reason } => topics.on_no_space(reason, turn),
                FromKeeper::SpaceBack => topics.on_space_back(),
            }),
            Event::Tick => self.on_tick(now, effects),
            Event::Drain => {
                self.draining = true;
                self.with_topics(now, effects, |topics, turn| topics.drain(turn));
                self.with_connections(now, effects, |c, desk| c.drain(desk));
            }
        }
        // One by one: each may fill the log again.
        let me = self.settings.core;
        while self.connections.wants_room(me) && !self.topics.is_behind() {
            self.with_connections(now, effects, |c, desk| c.next_waiting(me, desk));
        }
    }

    /// Ends a turn: what the events have changed is delivered and logged. Called once, after the turn's last event.
    pub fn settle(&mut self, now: Now, effects: &mut Effects) {
        self.with_topics(now, effects, |topics, turn| topics.settle(turn));
        let deadlines = [self.timers.next(), self.topics.commit_deadline()];
        effects.wake_at = deadlines.into_iter().flatten().min();
    }

    fn on_tick(&mut self, now: Now, effects: &mut Effects) {
        while let Some(timer) = self.timers.pop_due(now.mono) {
            match timer {
                Timer::Subscription(id) => self.with_topics(now, effects, |t, turn| t.on_subscription_timer(id, turn)),
                Timer::Expiry(id) => self.with_topics(now, effects, |t, turn| t.on_expiry_timer(id, turn)),
                Timer::Connection(id) => self.with_connections(now, effects, |c, desk| c.on_timer(id, desk)),
            }
        }
        self.with_connections(now, effects, |c, desk| c.sweep(desk));
        self.with_topics(now, effects, |topics, turn| topics.on_tick(turn));
    }

    /// The next batch for the log, if there is one. One is under way at a time.
    pub fn next_write(&mut self, now: Now) -> Option<Write> {
        let write = self.topics.next_write(now.wall)?;
        self.metrics.wal_padding_bytes += u64::from(write.padding);
        Some(write)
    }

    /// Whether to sync now; returns what the sync will cover.
    pub fn begin_sync(&mut self, now: Instant) -> Option<Lsn> {
        let upto = self.topics.begin_sync(now)?;
        self.metrics.wal_syncs += 1;
        Some(upto)
    }

    /// Nothing is in the log that is not durable.
    pub fn is_all_durable(&self) -> bool {
        self.topics.durable() >= self.topics.appended()
    }

    /// QoS1 deliveries whose acknowledgement is awaited.
    pub fn in_flight(&self) -> u64 {
        self.topics.catalog().subs.values().map(|s| s.in_flight()).sum()
    }

    /// Everything appended is to become durable soon, whatever the policy.
    pub fn force_sync(&mut self) {
        self.topics.force_sync();
    }

    /// Everything appended is to become durable, whatever the policy; then a last frame says that the stop was orderly.
    pub fn finish_log(&mut self) {
        self.topics.finish_log();
    }

    /// A copy of the counters, gauges brought up to date.
    pub fn read_metrics(&mut self) -> CoreMetrics {
        self.topics.gauges(&mut self.metrics);
        self.metrics.connections = self.connections.len() as u64;
        self.metrics.clone()
    }

    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// What must always be true. O(n): for tests and the simulator.
    pub fn invariants(&self) {
        self.topics.invariants();
        self.connections.invariants();
        assert!(self.asks.is_empty() && self.tells.is_empty(), "what is said is heard in the same event");
    }

    fn with_connections(&mut self, now: Now, effects: &mut Effects, f: impl FnOnce(&mut Connections, &mut Desk)) {
        self.at_desk(now, effects, f);
        self.exchange(now, effects);
    }

    fn with_topics(&mut self, now: Now, effects: &mut Effects, f: impl FnOnce(&mut Topics, &mut Turn)) {
        self.at_turn(now, effects, f);
        self.exchange(now, effects);
    }

    fn at_desk(&mut self, now: Now, effects: &mut Effects, f: impl FnOnce(&mut Connections, &mut Desk)) {
        let mut desk = Desk {
            now,
            effects,
            timers: &mut self.timers,
            metrics: &mut self.metrics,
            asks: &mut self.asks,
            log_behind: self.topics.is_behind(),
        };
        f(&mut self.connections, &mut desk);
    }

    fn at_turn(&mut self, now: Now, effects: &mut Effects, f: impl FnOnce(&mut Topics, &mut Turn)) {
        let mut turn = Turn {
            now,
            effects,
            timers: &mut self.timers,
            metrics: &mut self.metrics,
            tells: &mut self.tells,
            me: self.settings.core,
        };
        f(&mut self.topics, &mut turn);
    }

    /// Connections and topics of this core talk until neither has anything left to say.
    fn exchange(&mut self, now: Now, effects: &mut Effects) {
        while !self.asks.is_empty() || !self.tells.is_empty() {
            while let Some(ask) = self.asks.pop_front() {
                self.at_turn(now, effects, |topics, turn| topics.on_ask(None, ask, turn));
            }
            while let Some(tell) = self.tells.pop_front() {
                self.at_desk(now, effects, |connections, desk| connections.on_tell(tell, desk));
            }
        }
    }
}
