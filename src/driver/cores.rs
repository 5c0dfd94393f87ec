//! One pinned executor per core: start, the tasks of a core, orderly stop.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration as StdDuration;

use futures_lite::FutureExt;
use glommio::io::PollableFd;
use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement, PoolPlacement};

use crate::driver::beat::Beat;
use crate::driver::clock::Clock;
use crate::driver::conn::Conn;
use crate::driver::inspect::{Answer, Inquiry, Question};
use crate::driver::perform::fail_stop;
use crate::driver::{Core, Counts, StoreNumbers, add};
use crate::metrics::{Closed, Refused};
use crate::net::listener;
use crate::ring::mesh::Port;
use crate::shard::effects::Effects;
use crate::shard::event::{Event, FromKeeper};
use crate::shard::message::CoreBatch;
use crate::shard::{Parts, Shard};
use crate::types::CoreId;
use crate::wal::batch::Grant;
use crate::wal::keeper::{ToCore, ToKeeper};
use crate::wal::writer::Writer;

/// All that a core needs; made on the main thread, moved into the executor.
pub struct Plan {
    pub id: CoreId,
    pub cores: u16,
    /// The CPU it is pinned to.
    pub cpu: usize,
    pub listeners: Vec<TcpListener>,
    pub parts: Parts,
    pub grants: Vec<Grant>,
    pub port: Port<CoreBatch>,
    pub beat: Arc<Beat>,
    pub inquiries: flume::Receiver<Inquiry>,
    pub to_keeper: flume::Sender<ToKeeper>,
    pub from_keeper: flume::Receiver<ToCore>,
    pub wal_dir: PathBuf,
    pub dsync: bool,
    pub clock: Clock,
    pub open_conns: Arc<AtomicUsize>,
    pub connections_max: usize,
    pub user_timeout: StdDuration,
    pub drain: StdDuration,
    /// What is known of the whole store: for the first core, which shows it.
    pub store: Option<StoreNumbers>,
    pub control: flume::Receiver<Control>,
    pub reports: flume::Sender<(CoreId, Report)>,
}

/// What main tells a core.
#[derive(Clone, Copy, Debug)]
pub enum Control {
    /// Accept nothing more, refuse publishes, wait a little for acknowledgements.
    Drain,
    /// Write the last frame, close, end.
    Finish,
}

/// What a core tells main.
#[derive(Debug)]
pub enum Report {
    /// The log is open and durable; clients are accepted.
    Ready,
    Drained,
    /// Its executor has ended: orderly after `Finish`, otherwise it died.
    Ended,
}

/// Starts the core's executor on a thread of its own; returns when its first task runs.
///
/// The runtime can park before it has polled anything (GLOMMIO.md 2.1): then there is no task yet that the beat could wake, and
/// the core would never come. So its plan lies where any executor can take it, and one that does not begin is replaced. Should
/// it wake up later, it finds nothing to do and ends.
pub fn spawn(plan: Plan) -> Result<ExecutorJoinHandle<()>, String> {
    let (id, cpu, reports) = (plan.id, plan.cpu, plan.reports.clone());
    let waiting = Arc::new(Mutex::new(Some(plan)));
    let (begun, begins) = flume::unbounded();
    let start = |attempt: usize| {
        let (waiting, birth) = (Arc::clone(&waiting), Birth { attempt, begun: Some(begun.clone()) });
        let reports = reports.clone();
        LocalExecutorBuilder::new(Placement::Fixed(cpu))
            .name(&format!("core-{}", id.0))
            .io_memory(IO_MEMORY)
            .ring_depth(256)
            .preempt_timer(StdDuration::from_millis(1))
            .blocking_thread_pool_placement(PoolPlacement::Unbound(1))
            .spawn(move || async move {
                let Some(plan) = waiting.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
                birth.happened();
                let _guard = EndGuard { id, reports };
                run(plan).await;
            })
            .map_err(|error| error.to_string())
    };
    let why_ended = |executor: ExecutorJoinHandle<()>| match executor.join() {
        Ok(()) => "it ended at once".to_owned(),
        Err(error) => error.to_string(),
    };
    until_begun(start, why_ended, &begins, BEGIN_WITHIN)
}

/// Whether an executor has begun; dropped before that, it never will.
struct Birth {
    attempt: usize,
    begun: Option<flume::Sender<Result<usize, usize>>>,
}

impl Birth {
    fn happened(mut self) {
        if let Some(begun) = self.begun.take() {
            _ = begun.send(Ok(self.attempt)); // nobody waits for the late ones
        }
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        if let Some(begun) = self.begun.take() {
            _ = begun.send(Err(self.attempt)); // as above
        }
    }
}

/// Starts one after the other until one of them says that it has begun; that one. `Err`: why one ended instead.
fn until_begun<H>(
    mut start: impl FnMut(usize) -> Result<H, String>,
    why_ended: impl Fn(H) -> String,
    begins: &flume::Receiver<Result<usize, usize>>,
    within: StdDuration,
) -> Result<H, String> {
    let mut started = Vec::new();
    for attempt in 0..BEGIN_ATTEMPTS {
        started.push(start(attempt)?);
        match begins.recv_timeout(within) {
            Ok(Ok(begun)) => return Ok(started.swap_remove(begun)),
            Ok(Err(ended)) => return Err(why_ended(started.swap_remove(ended))),
            Err(_) => tracing::warn!(attempt, "a core's executor does not begin; another one is started for it"),
        }
    }
    Err(format!("none of {BEGIN_ATTEMPTS} executors began"))
}

/// Longer than an executor takes to begin, but on a machine that is hardly running.
const BEGIN_WITHIN: StdDuration = StdDuration::from_millis(500);
/// Executors started for one core. A parked one costs a thread and its rings until the process ends.
const BEGIN_ATTEMPTS: usize = 20;
/// Registered memory for O_DIRECT; three times this is charged to RLIMIT_MEMLOCK.
const IO_MEMORY: usize = 1 << 20;
/// Connections one look at a listener accepts before the core does something else.
const ACCEPTS_AT_ONCE: usize = 64;
/// How long a listener rests when the process has no descriptor left.
const ACCEPT_PAUSE: StdDuration = StdDuration::from_millis(50);

/// Tells main that the executor has ended, however it did. A panic in a core ends the process: a half-alive shard is
/// worse than a restart.
struct EndGuard {
    id: CoreId,
    reports: flume::Sender<(CoreId, Report)>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(core = self.id.0, "the core has panicked; the broker ends");
            std::process::abort();
        }
        _ = self.reports.send((self.id, Report::Ended)); // main may have stopped listening
    }
}

async fn run(plan: Plan) {
    let Plan { control, reports, from_keeper, inquiries, listeners, connections_max, user_timeout, drain, id, .. } =
        plan;
    let mut effects = Effects::new(plan.cores);
    let shard = Shard::new(plan.parts, plan.clock.now(), &mut effects);
    let core = Rc::new(Core {
        id,
        clock: plan.clock,
        shard: RefCell::new(shard),
        effects: RefCell::new(effects),
        inbox: RefCell::default(),
        driver: Cell::default(),
        room: RefCell::default(),
        port: RefCell::new(plan.port),
        conns: RefCell::default(),
        next_conn: Cell::new(1),
        open_conns: plan.open_conns,
        scratch: RefCell::default(),
        beat: plan.beat,
        ticked: Cell::new(false),
        wal_dir: plan.wal_dir.clone(),
        writer: Writer::new(plan.wal_dir, plan.dsync),
        write_busy: Cell::new(false),
        sync_busy: Cell::new(false),
        keeper: plan.to_keeper,
        begun: RefCell::default(),
        finished: Cell::new(false),
        counts: Counts::default(),
        store: plan.store,
    });
    let ticking = core.clone();
    glommio::spawn_local(core.beat.clone().ticks(move || ticking.tick())).detach();
    for grant in plan.grants {
        if let Err(error) = core.writer.open(grant.slot).await {
            fail_stop(&error);
        }
    }
    let looping = core.clone();
    let turns = glommio::spawn_local(async move { looping.run().await });
    glommio::spawn_local(hear_keeper(core.clone(), from_keeper)).detach();
    glommio::spawn_local(answer(core.clone(), inquiries)).detach();

    // Only when the first frame is durable may clients come: it seals what recovery has found.
    core.shard.borrow_mut().force_sync();
    core.tick();
    until(|| core.shard.borrow().is_all_durable()).await;
    let accepting = Rc::new(Cell::new(true));
    for listener in listeners {
        let task = accept(core.clone(), listener, accepting.clone(), connections_max, user_timeout);
        glommio::spawn_local(task).detach();
    }
    _ = reports.send((id, Report::Ready));

    while let Ok(message) = control.recv_async().await {
        match message {
            Control::Drain => {
                accepting.set(false);
                core.push(Event::Drain);
                let deadline = std::time::Instant::now() + drain;
                until(|| core.shard.borrow().in_flight() == 0 || std::time::Instant::now() >= deadline).await;
                _ = reports.send((id, Report::Drained));
            }
            Control::Finish => break,
        }
    }
    core.shard.borrow_mut().finish_log();
    core.tick();
    until(|| core.shard.borrow().is_all_durable() && core.inbox.borrow().is_empty()).await;
    let conns: Vec<Rc<Conn>> = core.conns.borrow().values().cloned().collect();
    for conn in conns {
        conn.close(Closed::Shutdown);
    }
    core.beat.stop();
    core.finished.set(true);
    core.tick();
    turns.await;
}

/// Waits for a condition that the core's loop brings about; looks at it every millisecond. For start and stop only.
async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        glommio::timer::sleep(StdDuration::from_millis(1)).await;
    }
}

async fn hear_keeper(core: Rc<Core>, from_keeper: flume::Receiver<ToCore>) {
    while let Ok(message) = from_keeper.recv_async().await {
        let message = match message {
            ToCore::Grant(grant) => {
                // Opened ahead, so that no batch waits for it.
                if let Err(error) = core.writer.open(grant.slot).await {
                    fail_stop(&error);
                }
                FromKeeper::Grant(grant)
            }
            ToCore::TakeSnapshot { force } => FromKeeper::TakeSnapshot { force },
            ToCore::Relocate { slot } => FromKeeper::Relocate { slot },
            ToCore::NoSpace { reason } => FromKeeper::NoSpace { reason: reason.to_string() },
            ToCore::SpaceBack => FromKeeper::SpaceBack,
            ToCore::Checkpointed { .. } => continue,
        };
        core.push(Event::Keeper(message));
    }
}

async fn answer(core: Rc<Core>, inquiries: flume::Receiver<Inquiry>) {
    while let Ok(inquiry) = inquiries.recv_async().await {
        let answer = match inquiry.question {
            Question::Metrics => Answer::Metrics(Box::new(core.read_metrics())),
            Question::Topics => Answer::Topics(core.shard.borrow().topics().topic_infos()),
            Question::Subs => Answer::Subs(core.shard.borrow().topics().sub_infos()),
        };
        inquiry.answer(answer);
    }
}

async fn accept(
    core: Rc<Core>,
    listener: TcpListener,
    accepting: Rc<Cell<bool>>,
    connections_max: usize,
    user_timeout: StdDuration,
) {
    let Ok(listener) = PollableFd::new(listener) else { return };
    while accepting.get() {
        if listener.readable().await.is_err() {
            return;
        }
        for _ in 0..ACCEPTS_AT_ONCE {
            if !accepting.get() {
                return;
            }
            match listener.get_ref().accept() {
                Ok((stream, peer)) => {
                    if core.open_conns.load(Ordering::Relaxed) >= connections_max {
                        core.counts.refused.borrow_mut().add(Refused::Connections, 1);
                        tracing::warn!(%peer, limit = connections_max, "connection refused: [net] max_connections is reached");
                        continue;
                    }
                    if listener::set_up(&stream, user_timeout).is_err() {
                        continue; // it is gone already
                    }
                    let Ok(socket) = PollableFd::new(stream) else { return };
                    add(&core.counts.accepted, 1);
                    core.open_conns.fetch_add(1, Ordering::Relaxed);
                    let conn = Rc::new(Conn::new(core.new_conn_id(), socket));
                    core.conns.borrow_mut().insert(conn.id, conn.clone());
                    core.push(Event::Opened { conn: conn.id, peer: peer.ip() });
                    glommio::spawn_local(serve(core.clone(), conn)).detach();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    if is_out_of_descriptors(&error) {
                        core.counts.refused.borrow_mut().add(Refused::Descriptors, 1);
                        tracing::warn!("cannot accept: {error}; raise RLIMIT_NOFILE");
                        glommio::timer::sleep(ACCEPT_PAUSE).await;
                    }
                    break;
                }
            }
        }
        glommio::executor().yield_if_needed().await;
    }
}

fn is_out_of_descriptors(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(code) if code == nix::libc::EMFILE || code == nix::libc::ENFILE)
}

/// A panic while one connection's bytes are looked at ends that connection, not the core.
async fn serve(core: Rc<Core>, conn: Rc<Conn>) {
    let reading = std::panic::AssertUnwindSafe(conn.clone().read_all(core.clone()));
    let reason = reading.catch_unwind().await.unwrap_or_else(|_| {
        tracing::error!(conn = %conn.id, "reading this connection panicked; it is closed");
        Closed::Internal
    });
    core.forget(conn.id, reason);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: StdDuration = StdDuration::from_millis(20);

    #[test]
    fn an_executor_that_never_begins_is_replaced() {
        let (begun, begins) = flume::unbounded();
        let mut births = Vec::new();
        let start = |attempt| {
            let birth = Birth { attempt, begun: Some(begun.clone()) };
            match attempt {
                0 | 1 => births.push(birth), // parked before its first task
                _ => birth.happened(),
            }
            Ok(attempt)
        };
        assert_eq!(until_begun(start, |_| unreachable!(), &begins, SHORT), Ok(2));
        assert_eq!(births.len(), 2);
    }

    #[test]
    fn the_one_that_begins_late_is_the_one() {
        let (begun, begins) = flume::unbounded();
        let mut first = None;
        let start = |attempt| {
            let birth = Birth { attempt, begun: Some(begun.clone()) };
            match first.take() {
                None => first = Some(birth),
                Some(late) => {
                    Birth::happened(late);
                    // The second finds nothing to do: its birth ends after the first one's began.
                    drop(birth);
                }
            }
            Ok(attempt)
        };
        assert_eq!(until_begun(start, |_| unreachable!(), &begins, SHORT), Ok(0));
    }

    #[test]
    fn one_that_cannot_run_says_why() {
        let (begun, begins) = flume::unbounded();
        let start = |attempt| {
            drop(Birth { attempt, begun: Some(begun.clone()) });
            Ok(attempt)
        };
        let why = until_begun(start, |attempt| format!("{attempt}: no memory"), &begins, SHORT);
        assert_eq!(why, Err("0: no memory".to_owned()));
    }
}
