//! The beat: a thread outside the executors that wakes one task on every core, again and again.
//!
//! The runtime can park with runnable tasks (GLOMMIO.md 2.1). A wake from outside gets it going, so such a loss
//! lasts one beat; and the task that is woken is the core's tick, for all its deadlines.
//!
//! Owns: the thread, and the verdict that a core stands still. Never: does anything on a core but wake it.

use std::future::{Future, poll_fn};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::readiness::{Readiness, Trouble};
use crate::types::CoreId;

/// From one beat of a busy core to the next.
const BEAT: Duration = Duration::from_millis(1);
/// An idle core gets every so-manieth beat.
const IDLE_BEATS: u64 = 20;
/// A core that has not ticked for so many beats stands still: 1 s, or longer if the whole process was held up.
/// Counted in beats so that a suspended machine does not find all its cores stuck when it wakes up.
const STUCK_BEATS: u64 = 1_000;

/// One core's side of the beat. Nobody waits for anybody here.
#[derive(Default)]
pub struct Beat {
    /// Set once, by the first tick; woken by reference ever after.
    waker: OnceLock<Waker>,
    active: AtomicBool,
    stop: AtomicBool,
    ticks: AtomicU64,
}

impl Beat {
    /// The core's tick, to be spawned as a task of its own, first thing in its executor. Calls `on_tick` at each
    /// beat, and at once; ends after `stop`.
    pub fn ticks(self: Arc<Beat>, mut on_tick: impl FnMut()) -> impl Future<Output = ()> {
        poll_fn(move |cx| {
            self.waker.get_or_init(|| cx.waker().clone());
            if self.stop.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            self.ticks.fetch_add(1, Ordering::Relaxed);
            on_tick();
            Poll::Pending
        })
    }

    /// The core did something, or has a deadline within 20 ms: it gets the very next beat.
    pub fn set_active(&self) {
        // The load first: the line stays with the core while nobody has taken the flag.
        if !self.active.load(Ordering::Relaxed) {
            self.active.store(true, Ordering::Relaxed);
        }
    }

    /// Ends `ticks`, and the watch over this core.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }
}

/// The thread that beats. One for the whole process: started before the cores, stopped after them.
pub struct Heart {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Heart {
    /// `beats`: one for each core, in their order.
    pub fn start(beats: Vec<Arc<Beat>>, readiness: Arc<Readiness>) -> io::Result<Heart> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("beat".to_string()).spawn(move || {
            let mut round = Round::new(beats, readiness);
            while !stopped.load(Ordering::Acquire) {
                thread::park_timeout(BEAT);
                round.beat();
            }
        })?;
        Ok(Heart { stop, thread: Some(thread) })
    }

    /// Returns when the thread has ended.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the beat thread panicked");
            }
        }
    }
}

/// What the thread does, without the waiting.
struct Round {
    beats: Vec<Arc<Beat>>,
    watches: Vec<Watch>,
    readiness: Arc<Readiness>,
    number: u64,
}

/// Whether one core moves.
#[derive(Clone, Default)]
struct Watch {
    ticks: u64,
    /// Beats since `ticks` last changed.
    still: u64,
    stuck: bool,
}

impl Round {
    fn new(beats: Vec<Arc<Beat>>, readiness: Arc<Readiness>) -> Round {
        let watches = vec![Watch::default(); beats.len()];
        Round { beats, watches, readiness, number: 0 }
    }

    fn beat(&mut self) {
        self.number += 1;
        for ((core, beat), watch) in (0..).map(CoreId).zip(&self.beats).zip(&mut self.watches) {
            if beat.stop.load(Ordering::Relaxed) || beat.waker.get().is_none() {
                continue;
            }
            watch.look(core, beat.ticks.load(Ordering::Relaxed), &self.readiness);
            // The load first: an idle core keeps its cache line.
            let active = beat.active.load(Ordering::Relaxed) && beat.active.swap(false, Ordering::Relaxed);
            if active || self.number.is_multiple_of(IDLE_BEATS) {
                beat.wake();
            }
        }
    }
}

impl Watch {
    fn look(&mut self, core: CoreId, ticks: u64, readiness: &Readiness) {
        if ticks == self.ticks {
            self.still += 1;
            if self.still >= STUCK_BEATS && !self.stuck {
                self.stuck = true;
                tracing::error!(core = core.0, "core stands still: its loop has not run for 1 s");
                readiness.degrade(Trouble::Stuck(core), format!("core {} stands still", core.0));
            }
            return;
        }
        if self.stuck {
            tracing::info!(core = core.0, beats = self.still, "core moves again");
            readiness.mend(Trouble::Stuck(core));
        }
        *self = Watch { ticks, still: 0, stuck: false };
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Wake};

    use super::super::readiness::{Phase, Status};
    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU64);

    impl Wake for Woken {
        fn wake(self: Arc<Woken>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Woken {
        fn take(&self) -> u64 {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    /// A core as a test plays it: polls its ticks when it is told to.
    struct Core {
        beat: Arc<Beat>,
        woken: Arc<Woken>,
        ticks: Pin<Box<dyn Future<Output = ()>>>,
    }

    impl Core {
        fn new() -> Core {
            let beat = Arc::new(Beat::default());
            let ticks = Box::pin(Arc::clone(&beat).ticks(|| ()));
            Core { beat, woken: Arc::default(), ticks }
        }

        fn poll(&mut self) -> Poll<()> {
            let waker = Waker::from(Arc::clone(&self.woken));
            self.ticks.as_mut().poll(&mut Context::from_waker(&waker))
        }
    }

    fn ready() -> Arc<Readiness> {
        let readiness = Arc::new(Readiness::default());
        readiness.enter(Phase::Ready);
        readiness
    }

    #[test]
    fn an_active_core_gets_each_beat_and_an_idle_one_some() {
        let (mut idle, mut busy, unborn) = (Core::new(), Core::new(), Core::new());
        assert!(idle.poll().is_pending() && busy.poll().is_pending());
        let beats = [&idle, &busy, &unborn].map(|core| Arc::clone(&core.beat)).to_vec();
        let mut round = Round::new(beats, ready());
        for _ in 0..2 * IDLE_BEATS {
            busy.beat.set_active();
            round.beat();
        }
        assert_eq!([idle.woken.take(), busy.woken.take(), unborn.woken.take()], [2, 2 * IDLE_BEATS, 0]);
        idle.beat.set_active();
        round.beat();
        round.beat();
        assert_eq!(idle.woken.take(), 1, "the flag is good for one beat");
    }

    #[test]
    fn a_core_that_stands_still_is_reported_until_it_moves() {
        let mut cores = [Core::new(), Core::new()];
        let readiness = ready();
        let beats = cores.iter().map(|core| Arc::clone(&core.beat)).collect();
        let mut round = Round::new(beats, Arc::clone(&readiness));
        for _ in 0..2 * STUCK_BEATS {
            round.beat();
        }
        assert_eq!(readiness.status(), Status::Ready, "cores that have not started yet are not stuck");
        assert!(cores.iter_mut().all(|core| core.poll().is_pending()));
        for n in 0..=STUCK_BEATS {
            assert_eq!(readiness.status(), Status::Ready, "after {n} beats");
            assert!(cores[0].poll().is_pending());
            round.beat();
        }
        assert_eq!(readiness.status(), Status::Degraded("core 1 stands still".to_string()));
        assert!(cores[1].poll().is_pending());
        round.beat();
        assert_eq!(readiness.status(), Status::Ready);
    }

    #[test]
    fn stop_ends_the_ticks_and_the_watch() {
        let mut core = Core::new();
        let readiness = ready();
        let mut round = Round::new(vec![Arc::clone(&core.beat)], Arc::clone(&readiness));
        assert!(core.poll().is_pending());
        core.woken.take();
        core.beat.stop();
        assert_eq!(core.woken.take(), 1, "stop does not wait for a beat");
        assert!(core.poll().is_ready());
        for _ in 0..2 * STUCK_BEATS {
            round.beat();
        }
        assert_eq!((core.woken.take(), readiness.status()), (0, Status::Ready));
    }

    struct Unpark(thread::Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Unpark>) {
            self.0.unpark();
        }
    }

    /// A core that sleeps until it is woken counts beats of the real thread, busy and idle.
    #[test]
    fn the_thread_beats_until_it_is_stopped() {
        let beat = Arc::new(Beat::default());
        let heart = Heart::start(vec![Arc::clone(&beat)], ready()).unwrap();
        let seen = Arc::new(AtomicU64::new(0));
        let (count, own) = (Arc::clone(&seen), Arc::clone(&beat));
        let core = thread::spawn(move || {
            let on_tick = || {
                // The first ten are idle beats, the others come as fast as they can.
                match count.fetch_add(1, Ordering::SeqCst) {
                    0..10 => (),
                    10..200 => own.set_active(),
                    _ => own.stop(),
                }
            };
            let mut ticks = std::pin::pin!(Arc::clone(&own).ticks(on_tick));
            let waker = Waker::from(Arc::new(Unpark(thread::current())));
            while ticks.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                thread::park();
            }
        });
        core.join().unwrap();
        assert!(seen.load(Ordering::SeqCst) > 200);
        heart.stop();
    }
}
