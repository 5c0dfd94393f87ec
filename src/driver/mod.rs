//! Joins the stages on one core: inbox -> shard -> perform -> sleep.
//!
//! Owns: the loop, and every handle that does I/O for it. Decides nothing: what happens is the shard's business.

/// The outside beat.
pub mod beat;
/// The whole broker: start and stop.
pub mod broker;
/// Recovers the store, and makes the parts of each core's shard.
pub mod boot;
pub mod clock;
/// One connection's tasks.
pub mod conn;
/// Placement, start, orderly stop.
pub mod cores;
/// What an operator asks the cores.
pub mod inspect;
/// Effects to I/O, lane by lane.
mod perform;
pub mod readiness;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::TcpStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use rustc_hash::FxHashMap;

use crate::driver::beat::Beat;
use crate::driver::clock::Clock;
use crate::driver::conn::Conn;
use crate::limits;
use crate::metrics::{By, Closed, CoreMetrics, Direction, Refused};
use crate::net::reader::{Got, Scratch};
use crate::ring::mesh::Port;
use crate::shard::Shard;
use crate::shard::effects::Effects;
use crate::shard::event::Event;
use crate::shard::message::CoreBatch;
use crate::time::{Duration, Instant};
use crate::types::{ConnId, CoreId};
use crate::wal::format::Segment;
use crate::wal::keeper::{KeeperGauges, ToKeeper};
use crate::wal::record::Discarded;
use crate::wal::writer::Writer;

/// What the runtime wants done before any thread exists.
pub fn early_init() {
    glommio::early_init();
}

/// Everything one core's tasks share.
pub struct Core {
    pub id: CoreId,
    pub clock: Clock,
    shard: RefCell<Shard>,
    effects: RefCell<Effects>,
    inbox: RefCell<VecDeque<Event>>,
    driver: Cell<Option<Waker>>,
    /// Readers that wait for room in the inbox.
    room: RefCell<Vec<Waker>>,
    port: RefCell<Port<CoreBatch>>,
    conns: RefCell<FxHashMap<ConnId, Rc<Conn>>>,
    next_conn: Cell<u64>,
    /// Over all cores.
    open_conns: Arc<AtomicUsize>,
    scratch: RefCell<Scratch>,
    beat: Arc<Beat>,
    ticked: Cell<bool>,
    wal_dir: PathBuf,
    writer: Writer,
    write_busy: Cell<bool>,
    sync_busy: Cell<bool>,
    keeper: flume::Sender<ToKeeper>,
    begun: RefCell<Vec<Segment>>,
    finished: Cell<bool>,
    counts: Counts,
    store: Option<StoreNumbers>,
}

/// Numbers of the whole store, for the metrics page.
pub struct StoreNumbers {
    pub truncated: Discarded,
    pub recovery_ms: u64,
    pub fallbacks: u32,
    pub keeper: Arc<KeeperGauges>,
}

impl StoreNumbers {
    fn show(&self, metrics: &mut CoreMetrics) {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        metrics.recovery_truncated_bytes = self.truncated.bytes;
        metrics.recovery_truncated_records = self.truncated.records;
        metrics.recovery_truncated_frames = self.truncated.frames;
        metrics.recovery_ms = self.recovery_ms;
        metrics.checkpoint_fallbacks = u64::from(self.fallbacks);
        metrics.segments_live = read(&self.keeper.slots_used);
        metrics.segments_free = read(&self.keeper.slots).saturating_sub(metrics.segments_live);
        metrics.segments_recycled = read(&self.keeper.slots_recycled);
        metrics.no_space = read(&self.keeper.no_space);
        metrics.checkpoints = read(&self.keeper.checkpoints);
        metrics.checkpoint_bytes = read(&self.keeper.checkpoint_bytes);
        metrics.checkpoint_ms = read(&self.keeper.checkpoint_ms);
    }
}

/// What the driver counts, rather than the shard.
#[derive(Default)]
struct Counts {
    bytes_in: Cell<u64>,
    bytes_out: Cell<u64>,
    turns: Cell<u64>,
    accepted: Cell<u64>,
    refused: RefCell<By<Refused>>,
    closed: RefCell<By<Closed>>,
    ring_batches: RefCell<By<Direction>>,
    ring_messages: RefCell<By<Direction>>,
    ring_full: Cell<u64>,
    segments_begun: Cell<u64>,
    sync_time: RefCell<crate::metrics::Histogram>,
}

fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get() + n);
}

impl Core {
    /// A thing that happened, for the next turn.
    pub fn push(&self, event: Event) {
        self.inbox.borrow_mut().push_back(event);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.driver.take() {
            waker.wake();
        }
    }

    pub fn has_room(&self) -> bool {
        self.inbox.borrow().len() < INBOX_MAX
    }

    pub fn wait_for_room(&self, waker: &Waker) {
        if !self.has_room() {
            self.room.borrow_mut().push(waker.clone());
        }
    }

    pub fn conn(&self, id: ConnId) -> Option<Rc<Conn>> {
        self.conns.borrow().get(&id).cloned()
    }

    pub fn read(&self, socket: &TcpStream) -> io::Result<Got> {
        let got = self.scratch.borrow_mut().read(socket)?;
        if let Got::Bytes { bytes, .. } = &got {
            add(&self.counts.bytes_in, bytes.len() as u64);
        }
        Ok(got)
    }

    pub fn count_sent(&self, bytes: usize) {
        add(&self.counts.bytes_out, bytes as u64);
    }

    /// On every beat.
    fn tick(&self) {
        self.ticked.set(true);
        self.wake();
    }

    /// The loop. Ends after `finish`.
    async fn run(self: &Rc<Core>) {
        while !self.finished.get() {
            self.anything().await;
            while self.turn() {
                glommio::executor().yield_if_needed().await;
                if self.finished.get() {
                    return;
                }
            }
        }
    }

    /// Waits until there is something to do.
    async fn anything(&self) {
        poll_fn(|cx| {
            let ready = self.finished.get()
                || self.ticked.get()
                || !self.inbox.borrow().is_empty()
                || self.port.borrow_mut().poll_ready(cx).is_ready();
            if ready {
                return Poll::Ready(());
            }
            self.driver.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// One turn: a bounded number of events, then all their effects. Returns whether there is more to do at once.
    fn turn(self: &Rc<Core>) -> bool {
        let now = self.clock.now();
        add(&self.counts.turns, 1);
        let effects = &mut *self.effects.borrow_mut();
        let mut shard = self.shard.borrow_mut();
        let mut worked = false;
        for _ in 0..limits::EVENTS_PER_TURN_MAX {
            let Some(event) = self.inbox.borrow_mut().pop_front() else { break };
            shard.on_event(now, event, effects);
            worked = true;
        }
        self.port.borrow_mut().drain(|from, batch| {
            self.counts.ring_batches.borrow_mut().add(Direction::Received, 1);
            let messages = (batch.asks.len() + batch.tells.len()) as u64;
            self.counts.ring_messages.borrow_mut().add(Direction::Received, messages);
            shard.on_event(now, Event::Remote { from, batch }, effects);
            worked = true;
        });
        if self.ticked.take() {
            shard.on_event(now, Event::Tick, effects);
        }
        shard.settle(now, effects);
        self.perform(effects);
        self.drive_log(&mut shard, now);
        let soon = effects.wake_at.is_some_and(|at| at <= now.mono + SOON);
        if worked || soon {
            self.beat.set_active();
        }
        if self.has_room() {
            for waker in self.room.borrow_mut().drain(..) {
                waker.wake();
            }
        }
        !self.inbox.borrow().is_empty()
    }

    /// The counters, those of the driver included.
    pub fn read_metrics(&self) -> CoreMetrics {
        let mut metrics = self.shard.borrow_mut().read_metrics();
        metrics.bytes_in = self.counts.bytes_in.get();
        metrics.bytes_out = self.counts.bytes_out.get();
        metrics.turns = self.counts.turns.get();
        metrics.connections_accepted = self.counts.accepted.get();
        metrics.connections_refused = self.counts.refused.borrow().clone();
        metrics.connections_closed = self.counts.closed.borrow().clone();
        metrics.ring_batches = self.counts.ring_batches.borrow().clone();
        metrics.ring_messages = self.counts.ring_messages.borrow().clone();
        metrics.ring_full = self.counts.ring_full.get();
        metrics.segments_begun = self.counts.segments_begun.get();
        metrics.sync_time = self.counts.sync_time.borrow().clone();
        if let Some(store) = &self.store {
            store.show(&mut metrics);
        }
        metrics
    }

    fn new_conn_id(&self) -> ConnId {
        let serial = self.next_conn.get();
        self.next_conn.set(serial + 1);
        ConnId::new(self.id, serial)
    }

    /// A connection's task has ended.
    fn forget(&self, id: ConnId, reason: Closed) {
        self.conns.borrow_mut().remove(&id);
        self.open_conns.fetch_sub(1, Ordering::Relaxed);
        self.counts.closed.borrow_mut().add(reason, 1);
        self.push(Event::Closed { conn: id });
    }

    fn now_mono(&self) -> Instant {
        self.clock.now().mono
    }
}

/// Events the inbox holds before readers wait.
const INBOX_MAX: usize = 16 * 1024;
/// A deadline nearer than an idle core's beat.
const SOON: Duration = Duration::from_millis(20);
