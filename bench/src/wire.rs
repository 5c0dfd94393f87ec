//! The native port seen from a client: v2 for the scenarios, v1 for the old flags.
//!
//! Owns: the bench's own copy of the frame layout, made from the written protocol and not from the broker's source, so that
//! a mistake there cannot hide here. Never: decides when something is sent.
//! Neighbours: `load` drives `Publisher` and `Consumer` through its traits.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::Result;
use crate::load::{self, MESSAGE_BYTES_MIN};

pub const API_KEY: &str = "bench-key";

pub const HELLO: u8 = 0x01;
pub const AUTH: u8 = 0x02;
pub const V1_PUBLISH: u8 = 0x03;
pub const V1_SUBSCRIBE: u8 = 0x04;
pub const V1_ACK: u8 = 0x05;
const PING: u8 = 0x07;
const PONG: u8 = 0x08;
pub const V1_POLL: u8 = 0x09;
const WELCOME: u8 = 0x10;
const OK: u8 = 0x11;
const PUBLISH: u8 = 0x13;
const CONFIRM: u8 = 0x14;
const SUBSCRIBE: u8 = 0x15;
const SUBSCRIBED: u8 = 0x16;
const DELIVER: u8 = 0x17;
const ACK: u8 = 0x18;
const ALIAS: u8 = 0x1D;
const ALIASED: u8 = 0x1E;

const WANTS_CONFIRM: u8 = 1;
const BY_ALIAS: u8 = 2;
const OPTION_DURABLE: u8 = 1;
const OPTION_ACK_TIMEOUT: u8 = 4;
/// Nothing here may be redelivered because the load generator was slow: that would be a duplicate of its own making.
const ACK_TIMEOUT_MS: u32 = 60_000;
/// Status 0 and 1 of a CONFIRM entry: cid, status, level, position.
const CONFIRM_STORED_BYTES: usize = 8 + 1 + 1 + 8;
const HEADER_BYTES: usize = 4 + 1 + 8;
const READ_BYTES: usize = 512 * 1024;
/// An answer to a request made while setting up; never part of a measurement.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
const ALIAS_NUMBER: u32 = 1;

/// Appends one frame whose payload `body` writes.
pub fn frame(out: &mut Vec<u8>, kind: u8, cid: u64, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.push(kind);
    out.extend_from_slice(&cid.to_be_bytes());
    body(out);
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

pub fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_option(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    let field = bytes.get(at..at + 2).ok_or("frame too short")?;
    Ok(u16::from_be_bytes([field[0], field[1]]))
}

pub fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).ok_or("frame too short")?;
    Ok(u64::from_be_bytes(field.try_into()?))
}

/// A received frame: its type, its correlation id, and where its payload lies in the link's buffer.
#[derive(Clone)]
pub struct Frame {
    pub kind: u8,
    pub cid: u64,
    pub payload: Range<usize>,
}

/// One connection with a large receive buffer and a send buffer that is written when the kernel has room.
pub struct Link {
    stream: TcpStream,
    input: Vec<u8>,
    start: usize,
    end: usize,
    pub out: Vec<u8>,
    written: usize,
}

impl Link {
    pub fn connect(port: u16) -> Result<Link> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let stream = TcpStream::connect_timeout(&address, ANSWER_DEADLINE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        Ok(Link { stream, input: vec![0; READ_BYTES], start: 0, end: 0, out: Vec::new(), written: 0 })
    }

    /// Connects and logs in with v2; also the core of the broker that serves this connection.
    pub fn login(port: u16) -> Result<(Link, u16)> {
        let mut link = Link::connect(port)?;
        let welcome = link.request(HELLO, WELCOME, |out| out.extend_from_slice(&2u16.to_be_bytes()))?;
        // u16 version | u16 cores | u16 this core | options
        let core = u16_at(link.payload(&welcome), 4)?;
        link.request(AUTH, OK, |out| put_string(out, API_KEY))?;
        Ok((link, core))
    }

    /// v1 answers HELLO and AUTH with ACK 0.
    pub fn login_v1(port: u16) -> Result<Link> {
        let mut link = Link::connect(port)?;
        link.request(HELLO, V1_ACK, |out| out.extend_from_slice(&1u16.to_be_bytes()))?;
        link.request(AUTH, V1_ACK, |out| put_string(out, API_KEY))?;
        Ok(link)
    }

    /// Sends one request and waits for its answer, which must be of type `answer`.
    pub fn request(&mut self, kind: u8, answer: u8, body: impl FnOnce(&mut Vec<u8>)) -> Result<Frame> {
        const SETUP_CID: u64 = u64::MAX;
        let mut out = Vec::new();
        frame(&mut out, kind, SETUP_CID, body);
        self.stream.write_all(&out)?;
        loop {
            if let Some(frame) = self.next()? {
                if frame.kind == PING {
                    self.pong(frame.cid);
                    self.flush()?;
                    continue;
                }
                if frame.kind == answer && frame.cid == SETUP_CID {
                    return Ok(frame);
                }
                return Err(self.unexpected(&frame));
            }
            if !self.fill()? {
                return Err(format!("no answer to request type {kind:#04x} within {ANSWER_DEADLINE:?}").into());
            }
        }
    }

    pub fn set_nonblocking(&mut self) -> Result<()> {
        Ok(self.stream.set_nonblocking(true)?)
    }

    pub fn set_read_timeout(&mut self, timeout: Duration) -> Result<()> {
        Ok(self.stream.set_read_timeout(Some(timeout))?)
    }

    /// One read. False: nothing came.
    pub fn fill(&mut self) -> Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.input.len() {
            if self.start == 0 {
                self.input.resize(self.input.len() * 2, 0);
            }
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match (&self.stream).read(&mut self.input[self.end..]) {
            Ok(0) => Err("the broker closed the connection".into()),
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole frame received; its bytes stay valid until the next `fill`.
    pub fn next(&mut self) -> Result<Option<Frame>> {
        let bytes = &self.input[self.start..self.end];
        if bytes.len() < HEADER_BYTES {
            return Ok(None);
        }
        let len = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if len < HEADER_BYTES - 4 {
            return Err(format!("frame of length {len}").into());
        }
        if bytes.len() < 4 + len {
            return Ok(None);
        }
        let frame =
            Frame { kind: bytes[4], cid: u64_at(bytes, 5)?, payload: self.start + HEADER_BYTES..self.start + 4 + len };
        self.start += 4 + len;
        Ok(Some(frame))
    }

    pub fn payload(&self, frame: &Frame) -> &[u8] {
        &self.input[frame.payload.clone()]
    }

    /// Writes as much of `out` as the kernel takes now.
    pub fn flush(&mut self) -> Result<()> {
        while self.written < self.out.len() {
            match (&self.stream).write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(())
    }

    pub fn unsent(&self) -> usize {
        self.out.len() - self.written
    }

    fn pong(&mut self, cid: u64) {
        frame(&mut self.out, PONG, cid, |_| {});
    }

    /// Says what came instead of what was wanted: ERROR and NACK are `u16 code, string text`.
    pub fn unexpected(&self, frame: &Frame) -> crate::Error {
        let payload = self.payload(frame);
        let code = u16_at(payload, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(payload.get(4..).unwrap_or(&[])).into_owned();
        format!("unexpected frame type {:#04x}, code {code}: {text}", frame.kind).into()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// What a publisher sends.
#[derive(Clone, Copy)]
pub struct Messages<'a> {
    pub topic: &'a str,
    pub qos: u8,
    pub bytes: usize,
    pub confirm: bool,
}

/// A v2 publisher: every message is a copy of one prepared frame with its numbers written over.
pub struct Publisher {
    link: Link,
    template: Vec<u8>,
    payload_at: usize,
}

impl Publisher {
    pub fn open(mut link: Link, messages: Messages) -> Result<Publisher> {
        assert!(messages.bytes >= MESSAGE_BYTES_MIN, "a message carries its index and its due time");
        link.request(ALIAS, ALIASED, |out| {
            out.extend_from_slice(&ALIAS_NUMBER.to_be_bytes());
            put_string(out, messages.topic);
        })?;
        link.set_nonblocking()?;
        let mut template = Vec::new();
        frame(&mut template, PUBLISH, 0, |out| {
            out.push(BY_ALIAS | if messages.confirm { WANTS_CONFIRM } else { 0 });
            out.push(messages.qos);
            out.extend_from_slice(&ALIAS_NUMBER.to_be_bytes());
            out.extend_from_slice(&0u16.to_be_bytes());
            out.resize(out.len() + messages.bytes, b'x');
        });
        let payload_at = template.len() - messages.bytes;
        Ok(Publisher { link, template, payload_at })
    }
}

impl load::Publisher for Publisher {
    fn put(&mut self, index: u64, due: u64) {
        let out = &mut self.link.out;
        let start = out.len();
        out.extend_from_slice(&self.template);
        let message = &mut out[start..];
        message[5..13].copy_from_slice(&index.to_be_bytes());
        message[self.payload_at..self.payload_at + 8].copy_from_slice(&index.to_be_bytes());
        message[self.payload_at + 8..self.payload_at + 16].copy_from_slice(&due.to_be_bytes());
    }

    fn flush(&mut self) -> Result<()> {
        self.link.flush()
    }

    fn unsent(&self) -> usize {
        self.link.unsent()
    }

    fn confirms(&mut self, mut seen: impl FnMut(u64)) -> Result<()> {
        if !self.link.fill()? {
            return Ok(());
        }
        while let Some(frame) = self.link.next()? {
            match frame.kind {
                CONFIRM => {
                    let mut entries = self.link.payload(&frame);
                    while !entries.is_empty() {
                        let index = u64_at(entries, 0)?;
                        match entries.get(8) {
                            Some(0) if entries.len() >= CONFIRM_STORED_BYTES => seen(index),
                            Some(1) => return Err(format!("message {index} was taken for a duplicate").into()),
                            Some(2) => {
                                let code = u16_at(entries, 9)?;
                                let len = usize::from(u16_at(entries, 11)?);
                                let text = String::from_utf8_lossy(entries.get(13..13 + len).unwrap_or(&[]));
                                return Err(format!("message {index} was rejected: {code} {text}").into());
                            }
                            _ => return Err("a CONFIRM entry this bench cannot read".into()),
                        }
                        entries = &entries[CONFIRM_STORED_BYTES..];
                    }
                }
                PING => {
                    self.link.pong(frame.cid);
                    self.link.flush()?;
                }
                _ => return Err(self.link.unexpected(&frame)),
            }
        }
        Ok(())
    }
}

impl AsFd for Publisher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// How a consumer subscribes.
#[derive(Clone, Copy)]
pub struct Subscription<'a> {
    pub topic: &'a str,
    pub qos: u8,
    pub credit: u32,
    pub durable: Option<&'a str>,
}

/// A v2 consumer that acknowledges everything one read brought in one frame.
pub struct Consumer {
    link: Link,
    sub: u64,
    qos: u8,
    /// The broker's core that owns the topic.
    pub core: u16,
    ranges: Vec<(u64, u64)>,
}

impl Consumer {
    pub fn subscribe(mut link: Link, wanted: Subscription) -> Result<Consumer> {
        let answer = link.request(SUBSCRIBE, SUBSCRIBED, |out| {
            out.push(wanted.qos);
            out.extend_from_slice(&wanted.credit.to_be_bytes());
            put_string(out, wanted.topic);
            let mut options = Vec::new();
            if let Some(name) = wanted.durable {
                put_option(&mut options, OPTION_DURABLE, name.as_bytes());
            }
            put_option(&mut options, OPTION_ACK_TIMEOUT, &ACK_TIMEOUT_MS.to_be_bytes());
            out.extend_from_slice(&(options.len() as u16).to_be_bytes());
            out.extend_from_slice(&options);
        })?;
        let payload = link.payload(&answer);
        // u64 subscription | u16 core of the topic | ...
        let (sub, core) = (u64_at(payload, 0)?, u16_at(payload, 8)?);
        link.set_nonblocking()?;
        Ok(Consumer { link, sub, qos: wanted.qos, core, ranges: Vec::new() })
    }
}

impl load::Consumer for Consumer {
    fn receive(&mut self, mut seen: impl FnMut(u64, u64)) -> Result<()> {
        if self.link.unsent() > 0 {
            self.link.flush()?;
        }
        if !self.link.fill()? {
            return Ok(());
        }
        while let Some(frame) = self.link.next()? {
            match frame.kind {
                DELIVER => {
                    // u64 sub | u64 tag | u16 attempt | u8 flags | u64 time | u16 options length | options | payload
                    let body = self.link.payload(&frame);
                    let tag = u64_at(body, 8)?;
                    let message = 29 + usize::from(u16_at(body, 27)?);
                    let (index, due) = (u64_at(body, message)?, u64_at(body, message + 8)?);
                    match self.ranges.last_mut() {
                        Some((_, last)) if *last + 1 == tag => *last = tag,
                        _ => self.ranges.push((tag, tag)),
                    }
                    seen(index, due);
                }
                PING => self.link.pong(frame.cid),
                _ => return Err(self.link.unexpected(&frame)),
            }
        }
        if self.qos == 1 && !self.ranges.is_empty() {
            frame(&mut self.link.out, ACK, 0, |out| {
                out.extend_from_slice(&self.sub.to_be_bytes());
                out.push(0);
                for (first, last) in &self.ranges {
                    out.extend_from_slice(&first.to_be_bytes());
                    out.extend_from_slice(&last.to_be_bytes());
                }
            });
        }
        self.ranges.clear();
        self.link.flush()
    }

    fn unsent(&self) -> usize {
        self.link.unsent()
    }
}

impl AsFd for Consumer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}
