//! The task that owns the socket: connects, carries bytes both ways, connects again.
//!
//! Owns: the socket, delays, the window's semaphores. Never: decides what a reply means; the session does.
//! The session is behind a lock that is held for the length of one call or one batch of replies, never over an `.await`.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::options::{ClientOptions, ReconnectPolicy};
use super::publish::Confirmed;
use super::session::{Arrived, Fault, Generation, Phase, Room, Session, SubKey, Subscribed};
use super::{ConnectionState, Error};
use crate::limits;
use crate::protocol::client_side::ReplyDecoder;
use crate::protocol::request::{Publish, RejectAction, Subscribe, UnsubscribeMode, Version};

/// What handles and the task share.
pub(super) struct Shared {
    session: Mutex<Session>,
    /// There is something to write, or to think about.
    wake: Notify,
    messages: Semaphore,
    bytes: Semaphore,
    /// All of `bytes`: the most one message may ask for.
    pub(super) window_bytes: u32,
    state: watch::Sender<ConnectionState>,
}

/// A program's hold on the client: when the last one goes, the task finishes what is under way and ends.
pub(super) struct Handle(Arc<Shared>);

impl Handle {
    pub(super) fn new(shared: Arc<Shared>) -> Handle {
        Handle(shared)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Room in the window, given back unless forgotten.
pub(super) struct Permits<'a>(SemaphorePermit<'a>, SemaphorePermit<'a>);

impl Permits<'_> {
    /// The session gives it back, with the answer.
    pub(super) fn forget(self) {
        self.0.forget();
        self.1.forget();
    }
}

impl Shared {
    pub(super) fn new(session: Session, options: &ClientOptions) -> Shared {
        Shared {
            session: Mutex::new(session),
            wake: Notify::new(),
            messages: Semaphore::new(options.window_messages),
            bytes: Semaphore::new(options.window_bytes),
            window_bytes: u32::try_from(options.window_bytes).unwrap_or(u32::MAX),
            state: watch::Sender::new(ConnectionState::Connecting),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("no call of the session panics")
    }

    pub(super) fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.subscribe()
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.wake.notify_one();
    }

    pub(super) fn frame_len_max(&self) -> usize {
        let told = self.lock().welcome().map_or(limits::FRAME_LEN_MAX, |welcome| welcome.frame_len_max);
        told.min(limits::FRAME_LEN_MAX) as usize
    }

    /// Waits for room in the window: first come, first served, so that publishes keep their order.
    pub(super) async fn room(&self, bytes: u32) -> Result<Permits<'_>, Error> {
        let closed = |_| self.lock().ended.clone().unwrap_or_else(closed_by_program);
        let messages = self.messages.acquire().await.map_err(closed)?;
        let bytes = self.bytes.acquire_many(bytes).await.map_err(closed)?;
        Ok(Permits(messages, bytes))
    }

    pub(super) async fn until_up(&self) -> Result<(), Error> {
        // The task may be about to say that it is not up any more.
        tokio::task::yield_now().await;
        let mut state = self.state.subscribe();
        let wanted = |state: &ConnectionState| *state != ConnectionState::Connecting;
        drop(state.wait_for(wanted).await.map_err(|_| closed_by_program())?);
        self.open().map(drop)
    }

    /// The session, if it takes anything new.
    fn open(&self) -> Result<MutexGuard<'_, Session>, Error> {
        let session = self.lock();
        match &session.ended {
            Some(why) => Err(why.clone()),
            None if session.closing => Err(closed_by_program()),
            None => Ok(session),
        }
    }

    pub(super) fn publish_confirmed(
        &self,
        publish: Publish,
        cost: u32,
    ) -> Result<oneshot::Receiver<Result<Confirmed, Error>>, Error> {
        let answer = self.open()?.publish_confirmed(publish, cost);
        self.wake.notify_one();
        Ok(answer)
    }

    pub(super) fn publish_unconfirmed(&self, publish: &Publish, cost: u32) -> Result<bool, Error> {
        let taken = self.open()?.publish_unconfirmed(publish, cost);
        self.wake.notify_one();
        Ok(taken)
    }

    pub(super) fn subscribe(
        &self,
        request: Subscribe,
    ) -> Result<(SubKey, oneshot::Receiver<Result<Subscribed, Error>>), Error> {
        let subscribed = self.open()?.subscribe(request)?;
        self.wake.notify_one();
        Ok(subscribed)
    }

    pub(super) fn next_delivery(&self, key: SubKey, waker: Option<&Waker>) -> Result<Arrived, bool> {
        let mut session = self.lock();
        let next = session.next_delivery(key, waker);
        if session.should_resume(key) {
            self.wake.notify_one();
        }
        next
    }

    pub(super) fn set_credit(&self, key: SubKey, credit: u32) {
        self.lock().set_credit(key, credit);
        self.wake.notify_one();
    }

    pub(super) fn unsubscribe(
        &self,
        key: SubKey,
        mode: UnsubscribeMode,
        answer: Option<oneshot::Sender<Result<(), Error>>>,
    ) {
        self.lock().unsubscribe(key, mode, answer);
        self.wake.notify_one();
    }

    pub(super) fn ack(&self, key: SubKey, generation: Generation, tag: u64) {
        if self.lock().ack(key, generation, tag) {
            self.wake.notify_one();
        }
    }

    pub(super) fn ack_confirmed(
        &self,
        key: SubKey,
        generation: Generation,
        tag: u64,
        answer: oneshot::Sender<Result<(), Error>>,
    ) {
        self.lock().ack_confirmed(key, generation, tag, answer);
        self.wake.notify_one();
    }

    pub(super) fn reject(&self, key: SubKey, generation: Generation, tag: u64, action: RejectAction) {
        if self.lock().reject(key, generation, tag, action) {
            self.wake.notify_one();
        }
    }

    fn give_back(&self, room: Room) {
        if room.messages > 0 {
            self.messages.add_permits(room.messages);
            self.bytes.add_permits(room.bytes);
        }
    }

    fn tell(&self, now: ConnectionState) {
        self.state.send_if_modified(|state| std::mem::replace(state, now) != now);
    }

    fn end(&self, why: Error) {
        let freed = {
            let mut session = self.lock();
            session.on_end(why);
            session.take_freed()
        };
        self.give_back(freed);
        self.messages.close();
        self.bytes.close();
        self.tell(ConnectionState::Closed);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn closed_by_program() -> Error {
    Error::Closed { reason: "the program closed it".into() }
}

/// How a connection ended.
enum End {
    /// The program closed the client and nothing is under way any more.
    Finished,
    /// The broker asked to.
    Left,
    Lost(String),
    Fatal(Error),
}

/// Bytes one read takes, at most and at least: small reads share a buffer, so that a small message that is kept does not
/// keep a large buffer of its own.
const READ_BYTES: usize = 64 * 1024;
const READ_BYTES_MIN: usize = 8 * 1024;
/// How long answers, the program's acknowledgements among them, are waited for after GOAWAY.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// A connection that lasted this long counts as a success, after which delays begin at their first length again.
const STABLE_AFTER: Duration = Duration::from_secs(2);

/// The task's whole life.
///
/// - `first`: told once, when the client is connected or will not be.
pub(super) async fn run(shared: Arc<Shared>, options: ClientOptions, first: oneshot::Sender<Result<(), Error>>) {
    let mut first = Some(first);
    let why = keep_connected(&shared, &options, &mut first).await;
    if let Some(first) = first {
        // Whoever waits for the connection wants the reason itself.
        drop(first.send(Err(why.clone())));
    } else if why != closed_by_program() {
        tracing::warn!(client = options.name, reason = %why, "the client gives up");
    }
    shared.end(match why {
        Error::Closed { .. } => why,
        why => Error::Closed { reason: why.to_string() },
    });
}

/// Returns why there will be no connection any more.
async fn keep_connected(
    shared: &Arc<Shared>,
    options: &ClientOptions,
    first: &mut Option<oneshot::Sender<Result<(), Error>>>,
) -> Error {
    let mut down_since = Instant::now();
    // Of all since the last connection that held, and of those without any connection between.
    let (mut failures, mut attempts) = (0u32, 0u32);
    let mut linger_until = None;
    let mut turn = 0;
    loop {
        let address = &options.addresses[turn % options.addresses.len()];
        let mut up_since = None;
        let end = connection(shared, options, address, first, &mut up_since).await;
        let (freed, closing, under_way) = {
            let mut session = shared.lock();
            session.on_down();
            (session.take_freed(), session.closing, !session.is_idle())
        };
        shared.give_back(freed);
        attempts += 1;
        if let Some(up) = up_since {
            shared.tell(ConnectionState::Connecting);
            down_since = Instant::now();
            attempts = 0;
            if up.elapsed() >= STABLE_AFTER {
                failures = 0;
            }
        }
        let cause = match end {
            End::Finished => return closed_by_program(),
            End::Fatal(error) => return error,
            End::Left => "the broker is shutting down".into(),
            End::Lost(cause) => cause,
        };
        turn += 1;
        failures += 1;
        tracing::debug!(client = options.name, address, cause, failures, "no connection to the broker");
        if closing && (!under_way || first.is_some()) {
            return closed_by_program();
        }
        let give_up =
            if first.is_some() { Some(options.reconnect.give_up_connect) } else { options.reconnect.give_up_reconnect };
        let mut deadline = give_up.map(|after| down_since + after);
        if closing {
            let until = *linger_until.get_or_insert_with(|| Instant::now() + options.linger);
            deadline = Some(deadline.map_or(until, |deadline| deadline.min(until)));
        }
        let resume = Instant::now() + delay(&options.reconnect, failures);
        if deadline.is_some_and(|deadline| resume > deadline) {
            return Error::Unreachable { address: address.clone(), cause, attempts };
        }
        wait_to_retry(shared, resume, closing).await;
    }
}

/// Sleeps until `resume`, or until the client is closed.
async fn wait_to_retry(shared: &Shared, resume: Instant, closing: bool) {
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(resume) => return,
            () = shared.wake.notified() => {
                if shared.lock().closing && !closing {
                    return;
                }
            }
        }
    }
}

/// Doubles with each failure, less up to a half at random.
fn delay(policy: &ReconnectPolicy, failures: u32) -> Duration {
    let doubled = policy.first_delay.saturating_mul(1 << failures.saturating_sub(1).min(20));
    let longest = doubled.min(policy.max_delay);
    // Without random numbers the delays are merely less spread.
    let random = getrandom::u32().unwrap_or(0);
    longest - longest.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

/// One connection from its first byte to its last.
async fn connection(
    shared: &Shared,
    options: &ClientOptions,
    address: &str,
    first: &mut Option<oneshot::Sender<Result<(), Error>>>,
    up_since: &mut Option<Instant>,
) -> End {
    let login_until = Instant::now() + options.connect_timeout;
    let stream = match tokio::time::timeout_at(login_until, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return End::Lost(error.to_string()),
        Err(_) => return End::Lost(format!("no connection within {:?}", options.connect_timeout)),
    };
    if let Err(error) = stream.set_nodelay(true) {
        return End::Lost(error.to_string());
    }
    shared.lock().on_open();
    let mut wire = Wire::new(stream);
    let end = serve(&mut wire, shared, options, address, login_until, first, up_since).await;
    shared.give_back(wire.output.room);
    end
}

/// From HELLO to the end, which the caller has to tell the session about.
async fn serve(
    wire: &mut Wire,
    shared: &Shared,
    options: &ClientOptions,
    address: &str,
    login_until: Instant,
    first: &mut Option<oneshot::Sender<Result<(), Error>>>,
    up_since: &mut Option<Instant>,
) -> End {
    let mut ping_every = options.ping_interval;
    let mut beat = beats(ping_every);
    // LOGIN, then none, then that of leaving or closing.
    let mut deadline = Some(login_until);
    loop {
        // Everything said since the last turn goes out in one write.
        let (phase, closing, idle, awaits) = {
            let mut session = shared.lock();
            if wire.output.is_empty() {
                wire.output.refill(&mut session);
            }
            wire.paused = session.pauses_reading();
            let awaits = session.phase() == Phase::Leaving && session.awaits_answers();
            (session.phase(), session.closing, session.is_idle(), awaits)
        };
        match wire.output.write(&wire.stream) {
            Ok(written) => shared.give_back(written),
            Err(error) => return End::Lost(error.to_string()),
        }
        match phase {
            Phase::Down | Phase::Greeted | Phase::Authenticating if closing => return End::Finished,
            Phase::Down | Phase::Greeted | Phase::Authenticating => {}
            Phase::Up | Phase::Leaving if up_since.is_none() => {
                *up_since = Some(Instant::now());
                deadline = None;
                if let Some(asked) = shared.lock().welcome().map(|welcome| welcome.keepalive_ms).filter(|ms| *ms > 0) {
                    ping_every = ping_every.min(Duration::from_millis(u64::from(asked.max(2)) / 2));
                    beat = beats(ping_every);
                }
                first.take().map(|first| first.send(Ok(())));
                tracing::debug!(client = options.name, address, "connected");
            }
            Phase::Up if closing => {
                if idle && wire.output.is_empty() {
                    return End::Finished;
                }
                deadline.get_or_insert_with(|| Instant::now() + options.linger);
            }
            Phase::Up => {}
            Phase::Leaving => {
                if !awaits && wire.output.is_empty() {
                    return End::Left;
                }
                deadline.get_or_insert_with(|| Instant::now() + LEAVE_WITHIN);
            }
        }
        let woken = wire.wait(shared, &mut beat, deadline).await;
        let read = match woken {
            Woken::Readable => wire.read(),
            Woken::Other => Ok(0),
            Woken::Beat => wire.beat(shared, ping_every).map(|()| 0),
            Woken::Deadline => {
                return match phase {
                    Phase::Leaving => End::Left,
                    Phase::Up => End::Finished,
                    _ => End::Lost(format!("no login within {:?}", options.connect_timeout)),
                };
            }
        };
        match read {
            Ok(0) => {}
            Ok(_) => {
                if let Err(fault) = wire.take_in(shared) {
                    return fault_end(fault, address);
                }
                // Whoever waited for what came now runs, so that what they say goes out together.
                tokio::task::yield_now().await;
            }
            Err(error) => return End::Lost(error.to_string()),
        }
    }
}

fn fault_end(fault: Fault, address: &str) -> End {
    let address = address.to_owned();
    match fault {
        Fault::Broken(cause) => End::Lost(cause),
        Fault::Unauthorized { code, text } => End::Fatal(Error::Unauthorized { address, code, text }),
        Fault::Unsupported { text } => End::Fatal(Error::Unsupported { address, detail: text }),
    }
}

fn beats(every: Duration) -> tokio::time::Interval {
    let mut beat = tokio::time::interval_at(Instant::now() + every, every);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat
}

enum Woken {
    Readable,
    Beat,
    Deadline,
    /// Something was said, or the socket takes more.
    Other,
}

/// A socket and what is half way through it.
struct Wire {
    stream: TcpStream,
    input: BytesMut,
    decoder: ReplyDecoder,
    output: Output,
    heard: Instant,
    paused: bool,
}

impl Wire {
    fn new(stream: TcpStream) -> Wire {
        Wire {
            stream,
            input: BytesMut::new(),
            decoder: ReplyDecoder::new(Version::V2),
            output: Output::default(),
            heard: Instant::now(),
            paused: false,
        }
    }

    async fn wait(&self, shared: &Shared, beat: &mut tokio::time::Interval, deadline: Option<Instant>) -> Woken {
        let idle = self.output.is_empty();
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Woken::Deadline,
            _ = beat.tick() => Woken::Beat,
            // Errors of the socket show when it is read or written.
            _ = self.stream.readable(), if !self.paused => Woken::Readable,
            _ = self.stream.writable(), if !idle => Woken::Other,
            () = shared.wake.notified(), if idle => Woken::Other,
        }
    }

    /// One read; returns how much came.
    fn read(&mut self) -> io::Result<usize> {
        if self.input.capacity() < READ_BYTES_MIN {
            self.input.reserve(READ_BYTES);
        }
        match self.stream.try_read_buf(&mut self.input) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the broker closed the connection")),
            Ok(read) => {
                self.heard = Instant::now();
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Hands what was read to the session.
    fn take_in(&mut self, shared: &Shared) -> Result<(), Fault> {
        self.decoder.push(self.input.split().freeze());
        let (freed, phase) = {
            let mut session = shared.lock();
            while let Some(reply) = self.decoder.next_reply().map_err(|error| Fault::Broken(error.to_string()))? {
                session.on_reply(reply)?;
            }
            (session.take_freed(), session.phase())
        };
        shared.give_back(freed);
        shared.tell(if phase == Phase::Up { ConnectionState::Up } else { ConnectionState::Connecting });
        Ok(())
    }

    /// Asks whether the broker lives; an error if it has not been heard for long.
    fn beat(&mut self, shared: &Shared, every: Duration) -> io::Result<()> {
        if self.paused {
            // What it says waits in the socket. It still wants to hear from us.
            self.heard = Instant::now();
        } else if self.heard.elapsed() >= every * 3 {
            let silent = format!("the broker said nothing for {:?}", self.heard.elapsed());
            return Err(io::Error::new(io::ErrorKind::TimedOut, silent));
        }
        shared.lock().ping();
        Ok(())
    }
}

/// Bytes on their way out.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    written: usize,
    /// Free when all is written.
    room: Room,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn refill(&mut self, session: &mut Session) {
        self.bytes.clear();
        self.written = 0;
        self.room = session.take_output(&mut self.bytes);
    }

    /// Writes what the socket takes; returns window room that became free.
    fn write(&mut self, stream: &TcpStream) -> io::Result<Room> {
        while !self.is_empty() {
            match stream.try_write(&self.bytes[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Room::default()),
                Err(error) => return Err(error),
            }
        }
        Ok(std::mem::take(&mut self.room))
    }
}
