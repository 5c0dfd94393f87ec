//! One client connection that never blocks: thousands of them fit one thread.
//!
//! Owns: the socket and the bytes on both sides of it. `connect` says from which address, which is how one machine plays
//! attackers and honest clients at once: all of 127.0.0.0/8 is ours.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};

use crate::wire::{self, AUTH, Frame, HELLO, PING, PONG, Said, put_frame, put_string};

/// Honest clients come from here.
pub const HONEST: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Whoever means ill comes from here, if from one address.
pub const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

/// What one read takes.
const READ: usize = 64 * 1024;

pub struct Link {
    stream: TcpStream,
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
    sent: usize,
    said: VecDeque<Said>,
}

impl Link {
    /// Begins to connect; whether it worked out shows when it is used.
    ///
    /// - `receive_buffer`: of the kernel, in bytes; `None`: as large as it likes.
    pub fn connect(from: Ipv4Addr, to: SocketAddr, receive_buffer: Option<usize>) -> io::Result<Link> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        if let Some(bytes) = receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if from != HONEST {
            socket.bind(&SocketAddr::from((from, 0)).into())?;
        }
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(EINPROGRESS) => return Err(error),
            _ => {}
        }
        Ok(Link::new(socket.into()))
    }

    /// - `stream`: nonblocking.
    pub fn new(stream: TcpStream) -> Link {
        Link { stream, input: Vec::new(), taken: 0, output: Vec::new(), sent: 0, said: VecDeque::new() }
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Appends HELLO and AUTH, with correlation ids 1 and 2.
    pub fn push_login(&mut self, version: u16, key: &str) {
        self.push(HELLO, 1, |payload| payload.extend_from_slice(&version.to_be_bytes()));
        self.push(AUTH, 2, |payload| put_string(payload, key));
    }

    /// Appends a frame whose payload `fill` writes.
    pub fn push(&mut self, kind: u8, cid: u64, fill: impl FnOnce(&mut Vec<u8>)) {
        put_frame(&mut self.output, kind, cid, fill);
    }

    /// Appends bytes that need not be a frame.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Bytes the kernel has not taken yet.
    pub fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Hands the kernel at most `most` bytes, as far as it takes them.
    pub fn flush_some(&mut self, most: usize) -> io::Result<()> {
        let mut left = most.min(self.unsent());
        while left > 0 {
            match (&self.stream).write(&self.output[self.sent..self.sent + left]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    self.sent += sent;
                    left -= sent;
                }
                Err(error) if is_not_yet(&error) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.unsent() == 0 {
            self.output.clear();
            self.sent = 0;
        }
        Ok(())
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.flush_some(usize::MAX)
    }

    /// Reads what has come. `Err(UnexpectedEof)`: the end.
    pub fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; READ];
        loop {
            match (&self.stream).read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.input.extend_from_slice(&chunk[..count]);
                    if count < chunk.len() {
                        return Ok(());
                    }
                }
                Err(error) if is_not_yet(&error) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next whole frame of what was read.
    pub fn frame(&mut self) -> io::Result<Option<Frame>> {
        let rest = &self.input[self.taken..];
        let Some(len) = wire::frame_len(rest)? else {
            self.input.drain(..self.taken);
            self.taken = 0;
            return Ok(None);
        };
        let mut head = wire::Cursor(&rest[4..13]);
        let frame = Frame { kind: head.u8()?, cid: head.u64()?, payload: rest[13..len].to_vec() };
        self.taken += len;
        Ok(Some(frame))
    }

    /// The next thing a v2 broker said in what was read. PINGs are answered with the next `flush`.
    pub fn hear(&mut self) -> io::Result<Option<Said>> {
        loop {
            if let Some(said) = self.said.pop_front() {
                return Ok(Some(said));
            }
            let Some(frame) = self.frame()? else { return Ok(None) };
            match frame.kind {
                PING => self.push(PONG, frame.cid, |_| {}),
                _ => self.said.extend(wire::parse(frame)?),
            }
        }
    }

    /// Waits until `hear` has something, and at most `wait`.
    pub fn wait_hear(&mut self, wait: Duration) -> io::Result<Option<Said>> {
        let end = std::time::Instant::now() + wait;
        loop {
            self.flush()?;
            if let Some(said) = self.hear()? {
                return Ok(Some(said));
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            wait_for(&[self], left)?;
            self.fill()?;
        }
    }

    /// From now on every packet to this end is dropped before the kernel looks at it: nothing is acknowledged, nobody is told.
    /// To the peer this machine has vanished.
    pub fn fall_silent(&self) -> io::Result<()> {
        const RETURN: u16 = 0x06;
        SockRef::from(&self.stream).attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])
    }

    /// Closes with a RST rather than a FIN.
    pub fn reset(self) -> io::Result<()> {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))
    }
}

const EINPROGRESS: i32 = 115;

/// Nothing to read or no room to write, or the connection is still being made.
fn is_not_yet(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock || error.kind() == ErrorKind::NotConnected
}

/// Waits until one of `links` can be read or takes what it has to send, and at most `wait`.
pub fn wait_for(links: &[&Link], wait: Duration) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = links
        .iter()
        .map(|link| {
            let writes = if link.unsent() > 0 { PollFlags::OUT } else { PollFlags::empty() };
            PollFd::new(&link.stream, PollFlags::IN | writes)
        })
        .collect();
    wait_fds(&mut fds, wait)
}

/// `poll`, with a timeout finer than a millisecond; an interruption counts as an end.
pub fn wait_fds(fds: &mut [PollFd<'_>], wait: Duration) -> io::Result<()> {
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    match poll(fds, Some(&wait)) {
        Ok(_) => Ok(()),
        Err(error) if error == rustix::io::Errno::INTR => Ok(()),
        Err(error) => Err(error.into()),
    }
}
