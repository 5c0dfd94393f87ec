//! A TCP proxy that spoils what passes through it: one thread, one loop, no runtime.
//!
//! Owns: the bytes between a client's socket and the broker's. They are delayed, slowed, cut into slices, held back, or
//! followed by garbage, but never changed, lost or reordered: TCP would not do that either. A connection may end at any byte.
//! What is done is switched while it runs; chance comes from a seed. `Shaper`, which decides when bytes may go, is pure.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use socket2::SockRef;

use crate::net::link::wait_fds;
use crate::rng::Rng;

/// What every connection suffers until something else is said.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    Clear,
    /// Every byte takes `base` and up to `jitter` more; none overtakes another.
    Latency {
        base: Duration,
        jitter: Duration,
    },
    /// Bytes a second, each way.
    Bandwidth(u64),
    /// Every byte is a packet of its own.
    Slices,
    /// A byte, a pause, a byte.
    Drip(Duration),
    /// Nothing passes either way, not even the end of a connection. Goes on where it was when it is over.
    Blackhole,
    /// What the broker sends is not taken; what clients send passes.
    StopReading,
}

/// What was done to connections so far.
#[derive(Debug, Default)]
pub struct Counts {
    pub connections: AtomicU64,
    pub cut: AtomicU64,
    pub reset: AtomicU64,
    pub garbage: AtomicU64,
    /// Garbage that did not make the broker close the connection.
    pub tolerated: AtomicU64,
}

enum Order {
    Set(Fault),
    /// So many of a hundred connections end with a FIN; with a RST; get garbage at the end of a frame.
    Cut(u64),
    Reset(u64),
    Garbage(u64),
    Stop,
}

pub struct Proxy {
    pub address: SocketAddr,
    pub counts: Arc<Counts>,
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a port of its own; what comes there goes to `upstream`.
    pub fn start(upstream: SocketAddr, seed: u64) -> io::Result<Proxy> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let counts = Arc::new(Counts::default());
        let (orders, taken) = channel();
        let mut work = Work {
            listener,
            upstream,
            orders: taken,
            counts: counts.clone(),
            fault: Fault::Clear,
            pairs: Vec::new(),
            rng: Rng::derive(seed, &[0x70_72_6f_78_79]),
        };
        let thread = std::thread::spawn(move || work.run());
        Ok(Proxy { address, counts, orders, thread: Some(thread) })
    }

    pub fn set(&self, fault: Fault) {
        self.order(Order::Set(fault));
    }

    pub fn cut(&self, percent: u64) {
        self.order(Order::Cut(percent));
    }

    pub fn reset(&self, percent: u64) {
        self.order(Order::Reset(percent));
    }

    pub fn garbage(&self, percent: u64) {
        self.order(Order::Garbage(percent));
    }

    fn order(&self, order: Order) {
        // It listens until it is dropped.
        self.orders.send(order).ok();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.order(Order::Stop);
        self.thread.take().map(JoinHandle::join);
    }
}

/// What waits on one side before no more is read.
const QUEUE_MAX: usize = 256 * 1024;
/// How often orders are looked at.
const LOOK: Duration = Duration::from_millis(2);
/// Slices sent in one turn.
const SLICES_MAX: usize = 64;
/// A broker that has not closed a connection with garbage by then tolerates it.
const TOLERATED: Duration = Duration::from_secs(10);

/// When bytes that came may go. Pure: is told the time.
#[derive(Debug, Default)]
struct Shaper {
    queue: VecDeque<(Instant, Vec<u8>)>,
    /// Bytes of the first chunk that have gone.
    gone: usize,
    waiting: usize,
    /// Bandwidth and drip: nothing before.
    next: Option<Instant>,
}

impl Shaper {
    fn push(&mut self, now: Instant, bytes: Vec<u8>, fault: Fault, rng: &mut Rng) {
        let mut at = now;
        if let Fault::Latency { base, jitter } = fault {
            at += base + Duration::from_nanos(rng.between(0, jitter.as_nanos() as u64));
        }
        let at = self.queue.back().map_or(at, |(last, _)| at.max(*last));
        self.waiting += bytes.len();
        self.queue.push_back((at, bytes));
    }

    /// What may go now, in one piece.
    fn ready(&self, now: Instant, fault: Fault) -> &[u8] {
        let Some((at, chunk)) = self.queue.front() else { return &[] };
        let most = match fault {
            Fault::Blackhole => 0,
            Fault::Slices => 1,
            Fault::Drip(_) if self.next.is_none_or(|next| next <= now) => 1,
            Fault::Bandwidth(rate) if self.next.is_none_or(|next| next <= now) => (rate / 100).max(1) as usize,
            Fault::Drip(_) | Fault::Bandwidth(_) => 0,
            // A latency that is over delays nothing any more.
            Fault::Clear | Fault::StopReading => usize::MAX,
            Fault::Latency { .. } if *at <= now => usize::MAX,
            Fault::Latency { .. } => 0,
        };
        let rest = &chunk[self.gone..];
        &rest[..rest.len().min(most)]
    }

    fn sent(&mut self, now: Instant, count: usize, fault: Fault) {
        self.next = match fault {
            Fault::Drip(pause) => Some(now + pause),
            Fault::Bandwidth(rate) => Some(now + Duration::from_nanos(count as u64 * 1_000_000_000 / rate.max(1))),
            _ => None,
        };
        self.gone += count;
        self.waiting -= count;
        if self.queue.front().is_some_and(|(_, chunk)| chunk.len() == self.gone) {
            self.queue.pop_front();
            self.gone = 0;
        }
    }
}

/// Where frames end in what a client sends.
#[derive(Debug, Default)]
struct Frames {
    head: Vec<u8>,
    left: usize,
}

impl Frames {
    /// Bytes until the next end, as far as is known; 0: between two frames.
    fn until_end(&self) -> usize {
        match (self.left, self.head.len()) {
            (0, 0) => 0,
            (0, seen) => 4 - seen,
            (left, _) => left,
        }
    }

    fn passed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left == 0 {
                let (head, rest) = bytes.split_at(bytes.len().min(4 - self.head.len()));
                self.head.extend_from_slice(head);
                bytes = rest;
                if let Some(length) = self.head.first_chunk::<4>() {
                    self.left = u32::from_be_bytes(*length) as usize;
                    self.head.clear();
                }
            } else {
                let step = bytes.len().min(self.left);
                self.left -= step;
                bytes = &bytes[step..];
            }
        }
    }
}

struct Pair {
    client: TcpStream,
    broker: TcpStream,
    up: Shaper,
    down: Shaper,
    frames: Frames,
    /// Garbage is to follow the frame under way.
    spoil: bool,
    /// Since when there is garbage in it: what the client sends is dropped.
    spoilt: Option<Instant>,
    client_ended: bool,
    broker_ended: bool,
}

struct Work {
    listener: TcpListener,
    upstream: SocketAddr,
    orders: Receiver<Order>,
    counts: Arc<Counts>,
    fault: Fault,
    pairs: Vec<Pair>,
    rng: Rng,
}

impl Work {
    fn run(&mut self) {
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Set(fault) => self.fault = fault,
                    Order::Cut(percent) => self.end_some(percent, false),
                    Order::Reset(percent) => self.end_some(percent, true),
                    Order::Garbage(percent) => {
                        for pair in &mut self.pairs {
                            pair.spoil |= self.rng.percent(percent);
                        }
                    }
                    Order::Stop => return,
                }
            }
            if self.fault != Fault::Blackhole {
                self.accept();
                let now = Instant::now();
                let (fault, rng, counts) = (self.fault, &mut self.rng, &self.counts);
                self.pairs.retain_mut(|pair| pair.turn(now, fault, rng, counts).unwrap_or(false));
            }
            self.wait();
        }
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            let made = TcpStream::connect(self.upstream).and_then(|broker| {
                for stream in [&client, &broker] {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                }
                Ok(Pair {
                    client,
                    broker,
                    up: Shaper::default(),
                    down: Shaper::default(),
                    frames: Frames::default(),
                    spoil: false,
                    spoilt: None,
                    client_ended: false,
                    broker_ended: false,
                })
            });
            // Without a broker the client finds its connection closed.
            if let Ok(pair) = made {
                self.counts.connections.fetch_add(1, Ordering::Relaxed);
                self.pairs.push(pair);
            }
        }
    }

    fn end_some(&mut self, percent: u64, reset: bool) {
        let count = if reset { &self.counts.reset } else { &self.counts.cut };
        let rng = &mut self.rng;
        self.pairs.retain(|pair| {
            if !rng.percent(percent) {
                return true;
            }
            count.fetch_add(1, Ordering::Relaxed);
            if reset {
                for stream in [&pair.client, &pair.broker] {
                    // A socket that is gone already needs no RST.
                    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
                }
            }
            false
        });
    }

    fn wait(&self) {
        let mut fds = Vec::new();
        if self.fault != Fault::Blackhole {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
            // Only those that are read: an end that nobody wants to hear of would wake at once, for ever.
            for pair in &self.pairs {
                fds.extend(pair.takes_up().then(|| PollFd::new(&pair.client, PollFlags::IN)));
                fds.extend(pair.takes_down(self.fault).then(|| PollFd::new(&pair.broker, PollFlags::IN)));
            }
        }
        if wait_fds(&mut fds, LOOK).is_err() {
            std::thread::sleep(LOOK);
        }
    }
}

impl Pair {
    fn takes_up(&self) -> bool {
        !self.client_ended && self.up.waiting < QUEUE_MAX
    }

    fn takes_down(&self, fault: Fault) -> bool {
        !self.broker_ended && self.down.waiting < QUEUE_MAX && fault != Fault::StopReading
    }

    /// Moves what may be moved. `Ok(false)` or `Err`: both ends are to be closed.
    fn turn(&mut self, now: Instant, fault: Fault, rng: &mut Rng, counts: &Counts) -> io::Result<bool> {
        if self.takes_up() {
            let (bytes, ended) = read(&self.client)?;
            self.client_ended = ended;
            if !bytes.is_empty() && self.spoilt.is_none() {
                self.up.push(now, bytes, fault, rng);
            }
        }
        if self.takes_down(fault) {
            let (bytes, ended) = read(&self.broker)?;
            self.broker_ended = ended;
            if !bytes.is_empty() {
                self.down.push(now, bytes, fault, rng);
            }
        }
        if self.spoilt.is_none() {
            self.send_up(now, fault, rng, counts)?;
        }
        for _ in 0..SLICES_MAX {
            let sent = write(&self.client, self.down.ready(now, fault))?;
            if sent == 0 {
                break;
            }
            self.down.sent(now, sent, fault);
        }
        if let Some(since) = self.spoilt {
            let over = self.broker_ended && self.down.waiting == 0;
            if !over && now - since > TOLERATED {
                counts.tolerated.fetch_add(1, Ordering::Relaxed);
                return Ok(false);
            }
            return Ok(!over);
        }
        let over = self.client_ended && self.up.waiting == 0 || self.broker_ended && self.down.waiting == 0;
        Ok(!over)
    }

    fn send_up(&mut self, now: Instant, fault: Fault, rng: &mut Rng, counts: &Counts) -> io::Result<()> {
        for _ in 0..SLICES_MAX {
            if self.spoil && self.frames.until_end() == 0 {
                // No length of a frame, and then anything.
                let mut garbage = vec![rng.between(0x10, 0xff) as u8];
                garbage.extend((0..63).map(|_| rng.draw() as u8));
                if write(&self.broker, &garbage)? > 0 {
                    counts.garbage.fetch_add(1, Ordering::Relaxed);
                    self.spoilt = Some(now);
                }
                return Ok(());
            }
            let mut ready = self.up.ready(now, fault);
            if self.spoil {
                ready = &ready[..ready.len().min(self.frames.until_end())];
            }
            let sent = write(&self.broker, ready)?;
            if sent == 0 {
                return Ok(());
            }
            self.frames.passed(&ready[..sent]);
            self.up.sent(now, sent, fault);
        }
        Ok(())
    }
}

/// What has come, and whether it was the end.
fn read(mut stream: &TcpStream) -> io::Result<(Vec<u8>, bool)> {
    let mut chunk = [0; 16 * 1024];
    match stream.read(&mut chunk) {
        Ok(0) => Ok((Vec::new(), true)),
        Ok(count) => Ok((chunk[..count].to_vec(), false)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok((Vec::new(), false)),
        Err(error) => Err(error),
    }
}

/// How much was taken.
fn write(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match stream.write(bytes) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::put_frame;

    /// A peer that sends back what it gets, until the end of it.
    fn echo() -> (SocketAddr, JoinHandle<Vec<ErrorKind>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let thread = std::thread::spawn(move || {
            let mut ends = Vec::new();
            // One connection each; the last one says so.
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut chunk = [0; 4096];
                loop {
                    match stream.read(&mut chunk) {
                        Ok(0) => {
                            ends.push(ErrorKind::UnexpectedEof);
                            break;
                        }
                        Ok(count) if chunk[..count].starts_with(b"last") => return ends,
                        Ok(count) => _ = stream.write_all(&chunk[..count]),
                        Err(error) => {
                            ends.push(error.kind());
                            break;
                        }
                    }
                }
            }
            ends
        });
        (address, thread)
    }

    fn client(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address).expect("the proxy listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream
    }

    fn there_and_back(stream: &mut TcpStream, bytes: &[u8]) {
        stream.write_all(bytes).expect("sent");
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).expect("all comes back");
        assert_eq!(back, bytes);
    }

    #[test]
    fn whatever_it_does_the_bytes_are_the_same() {
        let (upstream, _echo) = echo();
        let proxy = Proxy::start(upstream, 1).expect("starts");
        let mut stream = client(&proxy);
        let bytes: Vec<u8> = (0..3_000u32).map(|n| (n * 31 % 251) as u8).collect();
        let (base, jitter) = (Duration::from_millis(3), Duration::from_millis(5));
        let faults = [
            Fault::Clear,
            Fault::Latency { base, jitter },
            Fault::Bandwidth(200_000),
            Fault::Slices,
            Fault::Drip(Duration::from_micros(10)),
            Fault::Clear,
        ];
        for fault in faults {
            proxy.set(fault);
            let part = if matches!(fault, Fault::Drip(_)) { &bytes[..100] } else { &bytes[..] };
            there_and_back(&mut stream, part);
        }
    }

    #[test]
    fn a_blackhole_holds_everything_and_lets_it_go_in_the_end() {
        let (upstream, _echo) = echo();
        let proxy = Proxy::start(upstream, 2).expect("starts");
        let mut stream = client(&proxy);
        there_and_back(&mut stream, b"before");
        for fault in [Fault::Blackhole, Fault::StopReading] {
            proxy.set(fault);
            // The order is taken before anything that is sent after two looks.
            std::thread::sleep(50 * LOOK);
            stream.write_all(b"within").expect("the kernel takes it");
            stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
            let mut back = [0; 6];
            assert!(stream.read(&mut back).is_err(), "{fault:?} lets bytes through");
            proxy.set(Fault::Clear);
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            stream.read_exact(&mut back).expect("it was only held");
            assert_eq!(&back, b"within");
        }
    }

    #[test]
    fn a_cut_is_an_end_and_a_reset_is_a_reset_at_both_ends() {
        let (upstream, echo) = echo();
        let proxy = Proxy::start(upstream, 3).expect("starts");
        let mut back = [0; 4];
        let mut stream = client(&proxy);
        there_and_back(&mut stream, b"here");
        proxy.cut(100);
        assert_eq!(stream.read(&mut back).expect("a FIN"), 0);
        let mut stream = client(&proxy);
        there_and_back(&mut stream, b"here");
        proxy.reset(100);
        assert_eq!(stream.read(&mut back).expect_err("a RST").kind(), ErrorKind::ConnectionReset);
        client(&proxy).write_all(b"last").expect("sent");
        assert_eq!(echo.join().expect("no panic"), [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset]);
        assert_eq!((proxy.counts.cut.load(Ordering::SeqCst), proxy.counts.reset.load(Ordering::SeqCst)), (1, 1));
    }

    #[test]
    fn garbage_comes_between_two_frames_and_nothing_after_it() {
        let (upstream, _echo) = echo();
        let proxy = Proxy::start(upstream, 4).expect("starts");
        let mut stream = client(&proxy);
        let mut frame = Vec::new();
        put_frame(&mut frame, 1, 1, |payload| payload.extend_from_slice(&[7; 50]));
        stream.write_all(&frame[..20]).expect("sent");
        let mut back = vec![0; 20];
        stream.read_exact(&mut back).expect("echoed");
        proxy.garbage(100);
        std::thread::sleep(50 * LOOK);
        stream.write_all(&frame[20..]).expect("sent");
        back.resize(frame.len() + 64, 0);
        stream.read_exact(&mut back[20..]).expect("the rest, and the garbage");
        assert_eq!(back[..frame.len()], frame[..]);
        assert!(back[frame.len()] >= 0x10, "no length of a frame");
        stream.write_all(&frame).expect("sent, and dropped");
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        assert!(stream.read(&mut back).is_err());
    }

    #[test]
    fn bytes_go_when_the_fault_says_so() {
        let (mut rng, start) = (Rng::new(1), Instant::now());
        let ms = |n| start + Duration::from_millis(n);
        let mut shaper = Shaper::default();
        let latency = Fault::Latency { base: Duration::from_millis(10), jitter: Duration::from_millis(5) };
        shaper.push(start, vec![1; 10], latency, &mut rng);
        shaper.push(start, vec![2; 10], latency, &mut rng);
        assert!(shaper.ready(ms(9), latency).is_empty());
        assert_eq!(shaper.ready(ms(16), latency), [1; 10]);
        assert_eq!(shaper.ready(start, Fault::Clear), [1; 10], "the latency was switched off");
        assert!(shaper.ready(ms(16), Fault::Blackhole).is_empty());
        assert_eq!(shaper.ready(ms(16), Fault::Slices), [1]);

        let rate = Fault::Bandwidth(400);
        assert_eq!(shaper.ready(ms(16), rate), [1; 4], "what 10 ms bring");
        shaper.sent(ms(16), 4, rate);
        assert!(shaper.ready(ms(25), rate).is_empty());
        assert_eq!(shaper.ready(ms(26), rate), [1; 4]);
        let drip = Fault::Drip(Duration::from_millis(7));
        shaper.sent(ms(26), 1, drip);
        assert!(shaper.ready(ms(32), drip).is_empty());
        assert_eq!(shaper.ready(ms(33), drip), [1]);
        shaper.sent(ms(33), 5, Fault::Clear);
        assert_eq!(shaper.ready(ms(33), Fault::Clear), [2; 10]);
        assert_eq!(shaper.waiting, 10);
    }

    #[test]
    fn frames_are_followed_however_they_are_split() {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, 1, 1, |payload| payload.extend_from_slice(&[0; 5]));
        let one = bytes.len();
        put_frame(&mut bytes, 2, 2, |_| {});
        let mut frames = Frames::default();
        let mut ends = Vec::new();
        for (at, byte) in bytes.iter().enumerate() {
            frames.passed(&[*byte]);
            if frames.until_end() == 0 {
                ends.push(at + 1);
            }
        }
        assert_eq!(ends, [one, bytes.len()]);
        frames.passed(&bytes[..6]);
        assert_eq!(frames.until_end(), one - 6);
        frames.passed(&bytes[6..]);
        assert_eq!(frames.until_end(), 0);
    }
}
