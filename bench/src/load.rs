//! The load generator: one thread, one publisher, one consumer, one loop.
//!
//! Owns: when a message is due, what is outstanding, and what its latency was. Never: knows a protocol.
//! A latency starts when the message was *due*: a broker that stalls for a second makes every message of that second late,
//! and not only the one that found it stalled.
//! Neighbours: `wire` speaks to our broker behind `Publisher` and `Consumer`; another broker would stand behind the same two.

use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Result;

/// A message starts with its index and the time it was due, 8 bytes each.
pub const MESSAGE_BYTES_MIN: usize = 16;
/// While nothing is outstanding, the generator sleeps until this close to a due time and spins the rest: a timer wakes it some
/// 25 us late. While something is, it must not: the kernel may finish the broker's synced write on this very CPU.
const SPIN: u64 = 40_000;
/// Messages a saturating publisher waits to be able to send before it sends: real clients fill their buffers too.
const BURST: u64 = 64;
/// What a flooding publisher keeps in its own buffer.
const FLOOD_BYTES: usize = 256 * 1024;
const LATENCY_MAX_NS: u64 = 100_000_000_000;

pub trait Publisher: AsFd {
    /// Adds message `index`, due at `due`, to the send buffer.
    fn put(&mut self, index: u64, due: u64);
    /// Hands the kernel what it takes of the send buffer, without waiting.
    fn flush(&mut self) -> Result<()>;
    /// Bytes the kernel has not taken yet.
    fn unsent(&self) -> usize;
    /// Reports confirmed indexes that have come in, without waiting.
    fn confirms(&mut self, seen: impl FnMut(u64)) -> Result<()>;
}

pub trait Consumer: AsFd {
    /// Reports index and due time of messages that have come in, and acknowledges them, without waiting.
    fn receive(&mut self, seen: impl FnMut(u64, u64)) -> Result<()>;
    /// Bytes of acknowledgements the kernel has not taken yet.
    fn unsent(&self) -> usize;
}

#[derive(Clone, Copy)]
pub enum Pace {
    /// Open loop: so many messages per second, whatever comes back.
    Rate(u64),
    /// Closed loop: as fast as possible with at most so many messages unconfirmed (or undelivered, if nothing is confirmed).
    Window(u64),
    /// As fast as the socket takes them.
    Flood,
}

#[derive(Clone, Copy)]
pub struct Plan {
    pub pace: Pace,
    /// Publishes ask for a confirm, and the run is over when all have it.
    pub confirm: bool,
    /// Before the measurement: caches, connections and the log's first segment.
    pub warmup: Duration,
    pub measure: Duration,
    /// After the last message was sent, and nothing came for so long, what is missing is lost.
    pub patience: Duration,
}

pub struct Outcome {
    pub sent: u64,
    /// Never received.
    pub missing: u64,
    /// Received twice or out of order.
    pub disordered: u64,
    /// Within the measured interval.
    pub confirmed_per_s: f64,
    pub received_per_s: f64,
    pub confirm: Histogram<u64>,
    pub deliver: Histogram<u64>,
    /// How late the generator itself was: part of the latencies above.
    pub late: Histogram<u64>,
    /// From the first message to the last.
    pub elapsed: Duration,
    /// CPU time the generator used in it. Near `elapsed`, in a closed loop: it may have been the bottleneck.
    pub generator_cpu: Duration,
}

pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("constant bounds are valid")
}

/// Runs `plan`: sends, receives, waits for the rest.
pub fn run<P: Publisher, C: Consumer>(plan: &Plan, publisher: &mut P, consumer: &mut C) -> Result<Outcome> {
    let cpu = thread_cpu();
    let mut run = Run::new(plan);
    loop {
        let sending = run.send(publisher)?;
        let progress = run.take(publisher, consumer)?;
        if progress || sending {
            run.last_progress = run.now;
        }
        if !sending && run.is_over()? {
            break;
        }
        let wake = run.wake_at();
        if !progress && wake > run.now {
            wait(publisher, consumer, wake - run.now)?;
        }
    }
    run.outcome(thread_cpu().saturating_sub(cpu))
}

/// Counts at the start and at the end of the measured interval.
#[derive(Clone, Copy)]
struct Mark {
    at: u64,
    confirmed: u64,
    delivered: u64,
}

/// All times are nanoseconds since `origin`.
struct Run<'a> {
    plan: &'a Plan,
    origin: Instant,
    now: u64,
    /// Measured from here ...
    warm: u64,
    /// ... to here, when the last message is sent.
    end: u64,
    patience: u64,
    /// Messages of an open loop.
    total: u64,
    sent: u64,
    confirmed: u64,
    delivered: u64,
    /// The next index to be delivered.
    expected: u64,
    disordered: u64,
    /// When the unconfirmed messages were due, by the low bits of their index. A delivery carries its own due time.
    due_of: Vec<u64>,
    last_progress: u64,
    first: Option<Mark>,
    last: Option<Mark>,
    confirm: Histogram<u64>,
    deliver: Histogram<u64>,
    late: Histogram<u64>,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan) -> Run<'a> {
        let warm = plan.warmup.as_nanos() as u64;
        let end = warm + plan.measure.as_nanos() as u64;
        let total = match plan.pace {
            Pace::Rate(rate) => (u128::from(rate) * u128::from(end) / 1_000_000_000) as u64,
            Pace::Window(_) | Pace::Flood => u64::MAX,
        };
        let unconfirmed_max = match plan.pace {
            Pace::Rate(_) => total,
            Pace::Window(window) => window,
            Pace::Flood => 1,
        };
        Run {
            plan,
            origin: Instant::now(),
            now: 0,
            warm,
            end,
            patience: plan.patience.as_nanos() as u64,
            total,
            sent: 0,
            confirmed: 0,
            delivered: 0,
            expected: 0,
            disordered: 0,
            due_of: vec![0; unconfirmed_max.next_power_of_two() as usize],
            last_progress: 0,
            first: None,
            last: None,
            confirm: histogram(),
            deliver: histogram(),
            late: histogram(),
        }
    }

    fn tick(&mut self) {
        self.now = self.origin.elapsed().as_nanos() as u64;
    }

    fn slot(&self, index: u64) -> usize {
        index as usize & (self.due_of.len() - 1)
    }

    fn put(&mut self, publisher: &mut impl Publisher, due: u64) {
        let slot = self.slot(self.sent);
        self.due_of[slot] = due;
        publisher.put(self.sent, due);
        self.sent += 1;
    }

    /// Sends what is due. False: nothing is to be sent any more.
    fn send(&mut self, publisher: &mut impl Publisher) -> Result<bool> {
        self.tick();
        let sending = match self.plan.pace {
            Pace::Rate(_) => self.sent < self.total,
            Pace::Window(_) | Pace::Flood => self.now < self.end,
        };
        match self.plan.pace {
            _ if !sending => {}
            Pace::Rate(rate) => {
                while self.sent < self.total && due(rate, self.sent) <= self.now {
                    let due = due(rate, self.sent);
                    if due >= self.warm {
                        self.late.saturating_record(self.now - due);
                    }
                    self.put(publisher, due);
                }
            }
            Pace::Window(window) => {
                let done = if self.plan.confirm { self.confirmed } else { self.delivered };
                let room = window - (self.sent - done);
                if room >= BURST.min(window) {
                    for _ in 0..room {
                        self.put(publisher, self.now);
                    }
                }
            }
            Pace::Flood => {
                while publisher.unsent() < FLOOD_BYTES {
                    self.put(publisher, self.now);
                }
            }
        }
        if publisher.unsent() > 0 {
            publisher.flush()?;
        }
        Ok(sending)
    }

    /// Takes the confirms and deliveries that have come. True: there were some.
    fn take(&mut self, publisher: &mut impl Publisher, consumer: &mut impl Consumer) -> Result<bool> {
        let before = (self.confirmed, self.delivered + self.disordered);
        let mut unasked = None;
        self.tick();
        publisher.confirms(|index| {
            if index >= self.sent || self.confirmed >= self.sent {
                unasked = Some(index);
                return;
            }
            self.confirmed += 1;
            let due = self.due_of[self.slot(index)];
            if due >= self.warm {
                self.confirm.saturating_record(self.now.saturating_sub(due));
            }
        })?;
        if let Some(index) = unasked {
            return Err(format!("message {index} was confirmed, but was not waiting for it").into());
        }
        self.tick();
        consumer.receive(|index, due| {
            if index >= self.expected {
                self.expected = index + 1;
                self.delivered += 1;
            } else {
                self.disordered += 1;
            }
            if due >= self.warm {
                self.deliver.saturating_record(self.now.saturating_sub(due));
            }
        })?;
        self.tick();

        let mark = Mark { at: self.now, confirmed: self.confirmed, delivered: self.delivered };
        if self.now >= self.warm {
            self.first.get_or_insert(mark);
        }
        if self.now >= self.end {
            self.last.get_or_insert(mark);
        }
        Ok(before != (self.confirmed, self.delivered + self.disordered))
    }

    /// Everything has come, or nothing more will.
    fn is_over(&self) -> Result<bool> {
        let unconfirmed = if self.plan.confirm { self.sent - self.confirmed } else { 0 };
        let complete = unconfirmed == 0 && self.delivered >= self.sent;
        let silent = self.now - self.last_progress > self.patience;
        if silent && unconfirmed > 0 {
            return Err(format!("{unconfirmed} of {} publishes were never confirmed", self.sent).into());
        }
        Ok(self.last.is_some() && (complete || silent))
    }

    /// When there is something to do even if nothing comes.
    fn wake_at(&self) -> u64 {
        match self.plan.pace {
            Pace::Rate(rate) if self.sent < self.total => {
                let answered = self.delivered == self.sent && (!self.plan.confirm || self.confirmed == self.sent);
                due(rate, self.sent).saturating_sub(if answered { SPIN } else { 0 })
            }
            _ if self.now < self.end => self.end,
            _ => self.last_progress + self.patience + 1,
        }
    }

    fn outcome(self, generator_cpu: Duration) -> Result<Outcome> {
        let (Some(first), Some(last)) = (self.first, self.last) else {
            return Err("the run ended before it was measured".into());
        };
        let seconds = (last.at - first.at) as f64 / 1e9;
        Ok(Outcome {
            sent: self.sent,
            missing: self.sent.saturating_sub(self.delivered),
            disordered: self.disordered,
            confirmed_per_s: (last.confirmed - first.confirmed) as f64 / seconds,
            received_per_s: (last.delivered - first.delivered) as f64 / seconds,
            confirm: self.confirm,
            deliver: self.deliver,
            late: self.late,
            elapsed: Duration::from_nanos(self.now),
            generator_cpu,
        })
    }
}

/// When message `index` of an open loop is due.
fn due(rate: u64, index: u64) -> u64 {
    (u128::from(index) * 1_000_000_000 / u128::from(rate)) as u64
}

/// Sleeps until one of the two sockets has something, or can take something, or `nanos` have passed.
fn wait(publisher: &impl Publisher, consumer: &impl Consumer, nanos: u64) -> Result<()> {
    let wants = |unsent: usize| if unsent > 0 { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = [PollFd::new(publisher, wants(publisher.unsent())), PollFd::new(consumer, wants(consumer.unsent()))];
    let timeout = Timespec { tv_sec: (nanos / 1_000_000_000) as i64, tv_nsec: (nanos % 1_000_000_000) as i64 };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets this thread's timers fire when they are due, not up to 50 us later.
pub fn exact_timers() -> Result<()> {
    Ok(rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?)
}

fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Index and due time of what is under way, and a socket that never has anything, to wait on.
    struct Pipe {
        messages: RefCell<VecDeque<(u64, u64)>>,
        unconfirmed: RefCell<Vec<u64>>,
        silent: UnixStream,
        loses: fn(u64) -> bool,
    }

    impl Pipe {
        fn new(loses: fn(u64) -> bool) -> (Pipe, UnixStream) {
            let (silent, peer) = UnixStream::pair().unwrap();
            (Pipe { messages: RefCell::default(), unconfirmed: RefCell::default(), silent, loses }, peer)
        }
    }

    struct End<'a>(&'a Pipe);

    impl AsFd for End<'_> {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.silent.as_fd()
        }
    }

    impl Publisher for End<'_> {
        fn put(&mut self, index: u64, due: u64) {
            self.0.unconfirmed.borrow_mut().push(index);
            if !(self.0.loses)(index) {
                self.0.messages.borrow_mut().push_back((index, due));
            }
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }

        fn unsent(&self) -> usize {
            0
        }

        fn confirms(&mut self, seen: impl FnMut(u64)) -> Result<()> {
            self.0.unconfirmed.borrow_mut().drain(..).for_each(seen);
            Ok(())
        }
    }

    impl Consumer for End<'_> {
        fn receive(&mut self, mut seen: impl FnMut(u64, u64)) -> Result<()> {
            self.0.messages.borrow_mut().drain(..).for_each(|(index, due)| seen(index, due));
            Ok(())
        }

        fn unsent(&self) -> usize {
            0
        }
    }

    fn plan(pace: Pace) -> Plan {
        let ms = Duration::from_millis;
        Plan { pace, confirm: true, warmup: ms(10), measure: ms(50), patience: ms(50) }
    }

    #[test]
    fn an_open_loop_sends_exactly_its_rate_and_measures_what_follows_the_warmup() {
        let (pipe, _peer) = Pipe::new(|_| false);
        let outcome = run(&plan(Pace::Rate(10_000)), &mut End(&pipe), &mut End(&pipe)).unwrap();
        assert_eq!((outcome.sent, outcome.missing, outcome.disordered), (600, 0, 0));
        assert_eq!((outcome.confirm.len(), outcome.deliver.len(), outcome.late.len()), (500, 500, 500));
    }

    #[test]
    fn a_lost_message_is_missed_even_though_it_was_confirmed() {
        let (pipe, _peer) = Pipe::new(|index| index % 100 == 7);
        let outcome = run(&plan(Pace::Rate(10_000)), &mut End(&pipe), &mut End(&pipe)).unwrap();
        assert_eq!((outcome.sent, outcome.missing, outcome.disordered), (600, 6, 0));
    }

    #[test]
    fn a_window_keeps_sending_until_the_end() {
        let (pipe, _peer) = Pipe::new(|_| false);
        let outcome = run(&plan(Pace::Window(256)), &mut End(&pipe), &mut End(&pipe)).unwrap();
        assert!(outcome.sent > 256, "{} sent", outcome.sent);
        assert_eq!(outcome.missing, 0);
        assert!(outcome.received_per_s > 0.0 && outcome.confirmed_per_s > 0.0);
    }

    #[test]
    fn due_times_do_not_drift() {
        assert_eq!(due(3, 3), 1_000_000_000);
        assert_eq!(due(10_000, 10_000_000_000), 1_000_000_000_000_000);
    }
}
