//! A small HTTP server for short answers: one request per connection, blocking, on ordinary threads.
//!
//! Owns: sockets, threads, and every limit on them. Never: knows what a path means.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flume::{Receiver, Sender, TrySendError};
use socket2::SockRef;

use super::request::{self, Request, Unfit};
use crate::limits;

/// How long a thread may sleep in a read or write before it looks whether the server is stopping.
const STOP_LATENCY: Duration = Duration::from_millis(100);
/// After an `accept` that failed, which is mostly for want of descriptors: trying at once would only spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_millis(limits::HTTP_DEADLINE_MS);
/// After the answer: how long and how much we go on reading, so that closing does not destroy the answer on its way.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 * 1024;

pub(super) struct Response {
    status: u16,
    headers: Vec<(&'static str, &'static str)>,
    body: String,
}

impl Response {
    pub(super) fn new(status: u16, body: String) -> Response {
        Response { status, headers: Vec::new(), body }
    }

    /// Plain text, with its type.
    pub(super) fn text(status: u16, body: impl Into<String>) -> Response {
        Response::new(status, body.into()).with("Content-Type", "text/plain; charset=utf-8")
    }

    pub(super) fn with(mut self, name: &'static str, value: &'static str) -> Response {
        self.headers.push((name, value));
        self
    }

    fn encode(&self, head_only: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            408 => "Request Timeout",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let mut text = format!("HTTP/1.1 {} {reason}\r\n", self.status);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n", self.body.len()));
        if !head_only {
            text.push_str(&self.body);
        }
        text.into_bytes()
    }
}

pub(super) type Handler = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

/// A listening port and the threads behind it: one accepts, `HTTP_THREADS` answer.
pub(super) struct Server {
    addr: SocketAddr,
    /// The acceptor's own socket, to wake it at the end.
    listener: TcpListener,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(addr: SocketAddr, handler: Handler) -> io::Result<Server> {
        let listener = TcpListener::bind(addr)?;
        // From here on an early return drops the server, which ends what was started.
        let mut server = Server {
            addr: listener.local_addr()?,
            listener: listener.try_clone()?,
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::with_capacity(1 + limits::HTTP_THREADS),
        };
        let (accepted, waiting) = flume::bounded(limits::HTTP_CONNECTIONS_MAX);
        for _ in 0..limits::HTTP_THREADS {
            let (waiting, handler, stop) = (waiting.clone(), Arc::clone(&handler), Arc::clone(&server.stop));
            server.spawn(move || answer_all(&waiting, &handler, &stop))?;
        }
        let stop = Arc::clone(&server.stop);
        server.spawn(move || accept_all(&listener, &accepted, &stop))?;
        Ok(server)
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    fn spawn(&mut self, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name("http".to_string()).spawn(run)?);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // On Linux this ends a blocking `accept` on the same socket. The others end when the acceptor's channel does.
        if let Err(error) = SockRef::from(&self.listener).shutdown(Shutdown::Both) {
            tracing::warn!(%error, "cannot shut the metrics listener down");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the metrics server panicked");
            }
        }
    }
}

/// A connection we have, from its accept to its end. The seats are counted: each has one.
struct Accepted {
    stream: TcpStream,
    _seat: Arc<()>,
}

fn accept_all(listener: &TcpListener, accepted: &Sender<Accepted>, stop: &AtomicBool) {
    let seat = Arc::new(());
    loop {
        let connection = listener.accept();
        if stop.load(Ordering::Acquire) {
            return;
        }
        match connection {
            // One of the clones is ours. Only this thread makes them, so there are never more than it finds.
            Ok((stream, _)) if Arc::strong_count(&seat) > limits::HTTP_CONNECTIONS_MAX => refuse(&stream),
            Ok((stream, _)) => match accepted.try_send(Accepted { stream, _seat: Arc::clone(&seat) }) {
                Ok(()) => {}
                Err(TrySendError::Full(accepted)) => refuse(&accepted.stream),
                Err(TrySendError::Disconnected(_)) => return,
            },
            Err(error) => {
                tracing::warn!(%error, "the metrics server cannot accept");
                thread::sleep(ACCEPT_BACKOFF);
            }
        }
    }
}

/// A word to somebody we have no room for. A fresh socket's buffer takes it at once; if not, never mind.
fn refuse(mut stream: &TcpStream) {
    let busy = Response::text(503, "too many connections").encode(false);
    if stream.set_nonblocking(true).is_ok() {
        drop(stream.write(&busy));
    }
}

fn answer_all(waiting: &Receiver<Accepted>, handler: &Handler, stop: &AtomicBool) {
    for connection in waiting {
        if stop.load(Ordering::Acquire) {
            continue; // closes those that still wait, until the acceptor is gone
        }
        if let Err(error) = answer(&connection.stream, handler, stop) {
            tracing::debug!(%error, "an http connection failed");
        }
    }
}

fn answer(stream: &TcpStream, handler: &Handler, stop: &AtomicBool) -> io::Result<()> {
    let (response, head_only) = match read_request(stream, stop) {
        Ok(request) => {
            let handled = catch_unwind(AssertUnwindSafe(|| handler(&request)));
            (handled.unwrap_or_else(|_| Response::text(500, "internal error")), request.head_only)
        }
        Err(Unreadable::Refused(response)) => (response, false),
        Err(Unreadable::Gone(error)) => return Err(error),
    };
    let mut bytes = &response.encode(head_only)[..];
    let deadline = Instant::now() + DEADLINE;
    while !bytes.is_empty() {
        let written = in_time(deadline, stop, |patience| {
            stream.set_write_timeout(Some(patience))?;
            (&*stream).write(bytes)
        })?;
        if written == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
    }
    linger(stream, stop)
}

/// Closing a socket with unread bytes in it (a request's body, say) resets the connection, and the reset may
/// overtake the answer.
fn linger(stream: &TcpStream, stop: &AtomicBool) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let deadline = Instant::now() + LINGER;
    let mut scratch = [0; 4096];
    let mut seen = 0;
    while seen < LINGER_BYTES {
        match read(stream, &mut scratch, deadline, stop)? {
            0 => break,
            n => seen += n,
        }
    }
    Ok(())
}

enum Unreadable {
    Refused(Response),
    Gone(io::Error),
}

fn read_request(stream: &TcpStream, stop: &AtomicBool) -> Result<Request, Unreadable> {
    let deadline = Instant::now() + DEADLINE;
    let mut head = vec![0; limits::HTTP_HEAD_MAX];
    let mut used = 0;
    while used < head.len() {
        match read(stream, &mut head[used..], deadline, stop) {
            Ok(0) => return Err(Unreadable::Gone(ErrorKind::UnexpectedEof.into())),
            Ok(n) => used += n,
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                return Err(Unreadable::Refused(Response::text(408, "the request took too long")));
            }
            Err(error) => return Err(Unreadable::Gone(error)),
        }
        match request::parse(&head[..used]) {
            Ok(Some(request)) => return Ok(request),
            Ok(None) => {}
            Err(unfit) => return Err(refused(unfit)),
        }
    }
    Err(refused(Unfit::TooLarge))
}

fn refused(unfit: Unfit) -> Unreadable {
    let status = match unfit {
        Unfit::TooLarge => 431,
        Unfit::Bad(_) => 400,
    };
    Unreadable::Refused(Response::text(status, unfit.to_string()))
}

fn read(mut stream: &TcpStream, into: &mut [u8], deadline: Instant, stop: &AtomicBool) -> io::Result<usize> {
    in_time(deadline, stop, |patience| {
        stream.set_read_timeout(Some(patience))?;
        stream.read(into)
    })
}

/// Repeats a socket operation that gives up after the time it is given, until it succeeds, the deadline passes, or
/// we stop.
fn in_time(
    deadline: Instant,
    stop: &AtomicBool,
    mut operation: impl FnMut(Duration) -> io::Result<usize>,
) -> io::Result<usize> {
    loop {
        if stop.load(Ordering::Acquire) {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        match operation(left.min(STOP_LATENCY)) {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            done => return done,
        }
    }
}
