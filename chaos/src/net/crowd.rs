//! Many connections in one thread, and newcomers who only want to log in.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::net::link::{Link, wait_fds};
use crate::net::probe::log_in;
use crate::wire::Said;

/// One connection of a crowd.
pub struct Peer {
    pub link: Link,
    pub born: Instant,
    /// When it was found closed.
    pub ended: Option<Instant>,
    /// False: what comes is left in the kernel.
    pub reads: bool,
    /// The most one turn sends.
    pub sends: usize,
    /// What it is for, or how far it has come: the scenario's business.
    pub mark: usize,
}

impl Peer {
    pub fn new(link: Link) -> Peer {
        Peer { link, born: Instant::now(), ended: None, reads: true, sends: usize::MAX, mark: 0 }
    }

    pub fn connect(from: Ipv4Addr, to: SocketAddr) -> io::Result<Peer> {
        Ok(Peer::new(Link::connect(from, to, None)?))
    }

    pub fn is_open(&self) -> bool {
        self.ended.is_none()
    }

    pub fn lived(&self) -> Duration {
        self.ended.unwrap_or_else(Instant::now) - self.born
    }

    /// The next thing the broker said; nonsense ends the connection.
    pub fn hear(&mut self) -> Option<Said> {
        self.link.hear().unwrap_or_else(|_| {
            self.ended.get_or_insert_with(Instant::now);
            None
        })
    }
}

/// Sends and receives what can be sent and received, waiting at most `wait` for the first of it.
pub fn turn(peers: &mut [Peer], wait: Duration) -> io::Result<()> {
    let mut numbers = Vec::with_capacity(peers.len());
    let mut fds = Vec::with_capacity(peers.len());
    for (number, peer) in peers.iter().enumerate().filter(|(_, peer)| peer.is_open()) {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, peer.reads);
        flags.set(PollFlags::OUT, peer.link.unsent() > 0 && peer.sends > 0);
        numbers.push(number);
        fds.push(PollFd::new(peer.link.stream(), flags));
    }
    wait_fds(&mut fds, wait)?;
    let ready: Vec<(usize, PollFlags)> = numbers.into_iter().zip(fds.iter().map(PollFd::revents)).collect();
    for (number, flags) in ready.into_iter().filter(|(_, flags)| !flags.is_empty()) {
        let peer = &mut peers[number];
        let sent = if flags.contains(PollFlags::OUT) { peer.link.flush_some(peer.sends) } else { Ok(()) };
        // What has come is taken before a failed write counts.
        let heard = if peer.reads { peer.link.fill() } else { Ok(()) };
        let hung_up = !peer.reads && flags.intersects(PollFlags::HUP | PollFlags::ERR);
        if sent.is_err() || heard.is_err() || hung_up {
            peer.ended = Some(Instant::now());
        }
    }
    Ok(())
}

pub fn open(peers: &[Peer]) -> usize {
    peers.iter().filter(|peer| peer.is_open()).count()
}

/// Turns until none of `peers` is open any more, and at most `patience`; how many are.
pub fn until_closed(peers: &mut [Peer], patience: Duration) -> io::Result<usize> {
    let end = Instant::now() + patience;
    while open(peers) > 0 && Instant::now() < end {
        turn(peers, Duration::from_millis(20))?;
        peers.iter_mut().for_each(|peer| while peer.hear().is_some() {});
    }
    Ok(open(peers))
}

/// Somebody with the right key who comes, logs in and goes, again and again.
pub struct Newcomers {
    thread: JoinHandle<Logins>,
    stop: Arc<AtomicBool>,
}

#[derive(Clone, Debug, Default)]
pub struct Logins {
    pub took: Vec<Duration>,
    pub refused: Vec<String>,
}

impl Newcomers {
    pub fn start(from: Ipv4Addr, to: SocketAddr) -> Newcomers {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut logins = Logins::default();
            while !told.load(Ordering::SeqCst) {
                let begun = Instant::now();
                match Link::connect(from, to, None).and_then(|mut link| log_in(&mut link)) {
                    Ok(()) => logins.took.push(begun.elapsed()),
                    Err(error) => logins.refused.push(error.to_string()),
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            logins
        });
        Newcomers { thread, stop }
    }

    pub fn end(self) -> Logins {
        self.stop.store(true, Ordering::SeqCst);
        self.thread
            .join()
            .unwrap_or_else(|_| Logins { refused: vec!["the client panicked".into()], ..Logins::default() })
    }
}
