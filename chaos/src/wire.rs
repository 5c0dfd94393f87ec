//! The v2 wire, as much as a publisher and a consumer need. Shares no code with the broker: an independent witness.
//!
//! A frame is `u32 length of what follows | u8 type | u64 correlation id | payload`, big-endian. Strings are `u16
//! length | bytes`; options are `u16 total length | {u8 tag | u16 length | value}*`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

pub const HELLO: u8 = 0x01;
pub const AUTH: u8 = 0x02;
pub const PING: u8 = 0x07;
pub const PONG: u8 = 0x08;
pub const WELCOME: u8 = 0x10;
pub const OK: u8 = 0x11;
pub const ERROR: u8 = 0x12;
pub const PUBLISH: u8 = 0x13;
pub const CONFIRM: u8 = 0x14;
pub const SUBSCRIBE: u8 = 0x15;
pub const SUBSCRIBED: u8 = 0x16;
pub const DELIVER: u8 = 0x17;
pub const ACK: u8 = 0x18;

/// No sane broker sends a larger frame.
const FRAME_MAX: usize = 17 * 1024 * 1024;

/// A frame's type, correlation id and payload.
pub struct Frame {
    pub kind: u8,
    pub cid: u64,
    pub payload: Vec<u8>,
}

/// What the broker said.
#[derive(Clone, PartialEq, Debug)]
pub enum Said {
    Welcome,
    Ok {
        cid: u64,
    },
    Error {
        cid: u64,
        code: u16,
        text: String,
    },
    /// One per entry of a CONFIRM.
    Confirm {
        cid: u64,
        outcome: Outcome,
    },
    Subscribed {
        cid: u64,
        sub: u64,
        resumed: bool,
    },
    Deliver {
        sub: u64,
        tag: u64,
        attempt: u16,
        redelivered: bool,
        payload: Vec<u8>,
    },
    /// Any type not listed here: skippable.
    Other(u8),
}

#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    Stored,
    Duplicate,
    Rejected { code: u16, text: String },
}

/// One connection. Writing is buffered until `flush`; PINGs are answered by `receive` itself.
pub struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    /// Bytes of `input` already taken.
    taken: usize,
    output: Vec<u8>,
    /// Entries of a CONFIRM not yet handed out.
    said: std::collections::VecDeque<Said>,
    read_timeout: Option<Duration>,
}

impl Wire {
    pub fn connect(to: SocketAddr) -> io::Result<Wire> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        Ok(Wire {
            stream,
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            said: Default::default(),
            read_timeout: None,
        })
    }

    /// HELLO and AUTH. An ERROR is reported as `PermissionDenied`.
    pub fn login(&mut self, key: &str, patience: Duration) -> io::Result<()> {
        let end = Instant::now() + patience;
        self.push(HELLO, 1, |payload| payload.extend_from_slice(&2u16.to_be_bytes()));
        self.push(AUTH, 2, |payload| put_string(payload, key));
        self.flush()?;
        while Instant::now() < end {
            match self.receive(Duration::from_millis(50))? {
                Some(Said::Ok { cid: 2 }) => return Ok(()),
                Some(Said::Error { code, text, .. }) => {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{code} {text}")));
                }
                _ => {}
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Appends a QoS1 PUBLISH that asks for a confirm. `identity`: publisher id and sequence.
    pub fn push_publish(&mut self, cid: u64, topic: &str, identity: Option<(u64, u64)>, message: &[u8]) {
        self.push(PUBLISH, cid, |payload| {
            payload.extend_from_slice(&[1, 1]);
            put_string(payload, topic);
            put_options(payload, |options| {
                if let Some((publisher, sequence)) = identity {
                    put_option(options, 3, &[publisher.to_be_bytes(), sequence.to_be_bytes()].concat());
                }
            });
            payload.extend_from_slice(message);
        });
    }

    /// Appends a QoS1 SUBSCRIBE of a durable name, from the earliest message kept.
    pub fn push_subscribe(&mut self, cid: u64, topic: &str, durable: &str, credit: u32, ack_timeout_ms: u32) {
        self.push(SUBSCRIBE, cid, |payload| {
            payload.push(1);
            payload.extend_from_slice(&credit.to_be_bytes());
            put_string(payload, topic);
            put_options(payload, |options| {
                put_option(options, 1, durable.as_bytes());
                put_option(options, 3, &[1]);
                put_option(options, 4, &ack_timeout_ms.to_be_bytes());
            });
        });
    }

    /// Appends an ACK of inclusive ranges of tags; at least one.
    pub fn push_ack(&mut self, cid: u64, sub: u64, confirm: bool, ranges: &[(u64, u64)]) {
        self.push(ACK, cid, |payload| {
            payload.extend_from_slice(&sub.to_be_bytes());
            payload.push(u8::from(confirm));
            for (first, last) in ranges {
                payload.extend_from_slice(&first.to_be_bytes());
                payload.extend_from_slice(&last.to_be_bytes());
            }
        });
    }

    pub fn push_ping(&mut self, cid: u64) {
        self.push(PING, cid, |_| {});
    }

    /// Appends a frame whose payload `fill` writes.
    pub fn push(&mut self, kind: u8, cid: u64, fill: impl FnOnce(&mut Vec<u8>)) {
        put_frame(&mut self.output, kind, cid, fill);
    }

    pub fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.output);
        self.output.clear();
        sent
    }

    /// The next thing the broker said, waiting at most `wait` (0 counts as 1 ms). `Err`: the connection is gone, and
    /// everything that had arrived on it has been handed out before.
    pub fn receive(&mut self, wait: Duration) -> io::Result<Option<Said>> {
        loop {
            if let Some(said) = self.said.pop_front() {
                return Ok(Some(said));
            }
            let Some(frame) = self.frame(wait)? else { return Ok(None) };
            match frame.kind {
                PING => {
                    self.push(PONG, frame.cid, |_| {});
                    // A failed write shows as a failed read, once what has arrived is handed out.
                    self.flush().ok();
                }
                _ => self.said.extend(parse(frame)?),
            }
        }
    }

    /// Whether `receive` has something to say without waiting for the network.
    pub fn has_more(&self) -> bool {
        !self.said.is_empty() || frame_len(&self.input[self.taken..]).is_ok_and(|len| len.is_some())
    }

    /// The next whole frame, whatever its dialect.
    pub fn frame(&mut self, wait: Duration) -> io::Result<Option<Frame>> {
        loop {
            let rest = &self.input[self.taken..];
            if let Some(len) = frame_len(rest)? {
                let frame = Frame { kind: rest[4], cid: u64_at(rest, 5)?, payload: rest[13..len].to_vec() };
                self.taken += len;
                return Ok(Some(frame));
            }
            self.input.drain(..self.taken);
            self.taken = 0;
            let wait = wait.max(Duration::from_millis(1));
            if self.read_timeout != Some(wait) {
                self.stream.set_read_timeout(Some(wait))?;
                self.read_timeout = Some(wait);
            }
            let mut chunk = [0; 64 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Appends a frame whose payload `fill` writes.
pub fn put_frame(output: &mut Vec<u8>, kind: u8, cid: u64, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = output.len();
    output.extend_from_slice(&[0; 4]);
    output.push(kind);
    output.extend_from_slice(&cid.to_be_bytes());
    fill(output);
    let len = (output.len() - start - 4) as u32;
    output[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

pub fn put_string(output: &mut Vec<u8>, text: &str) {
    output.extend_from_slice(&(text.len() as u16).to_be_bytes());
    output.extend_from_slice(text.as_bytes());
}

pub fn put_options(output: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = output.len();
    output.extend_from_slice(&[0; 2]);
    fill(output);
    let len = (output.len() - start - 2) as u16;
    output[start..start + 2].copy_from_slice(&len.to_be_bytes());
}

pub fn put_option(output: &mut Vec<u8>, tag: u8, value: &[u8]) {
    output.push(tag);
    output.extend_from_slice(&(value.len() as u16).to_be_bytes());
    output.extend_from_slice(value);
}

/// Bytes of the whole frame at the start of `input`; `None`: not all there yet.
pub fn frame_len(input: &[u8]) -> io::Result<Option<usize>> {
    let Some(head) = input.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes(*head) as usize;
    if !(9..=FRAME_MAX).contains(&len) {
        return Err(bad("a frame's length"));
    }
    Ok((input.len() >= 4 + len).then_some(4 + len))
}

/// A frame of v2. Several things only if it is a CONFIRM.
pub fn parse(frame: Frame) -> io::Result<Vec<Said>> {
    let Frame { kind, cid, payload } = frame;
    let mut rest = Cursor(&payload);
    let said = match kind {
        WELCOME => Said::Welcome,
        OK => Said::Ok { cid },
        ERROR => Said::Error { cid, code: rest.u16()?, text: rest.string()? },
        CONFIRM => {
            let mut entries = Vec::new();
            while !rest.0.is_empty() {
                let cid = rest.u64()?;
                let outcome = match rest.u8()? {
                    2 => Outcome::Rejected { code: rest.u16()?, text: rest.string()? },
                    status @ (0 | 1) => {
                        rest.take(9)?;
                        if status == 0 { Outcome::Stored } else { Outcome::Duplicate }
                    }
                    _ => return Err(bad("a confirm's status")),
                };
                entries.push(Said::Confirm { cid, outcome });
            }
            return Ok(entries);
        }
        SUBSCRIBED => {
            let sub = rest.u64()?;
            rest.take(2)?;
            Said::Subscribed { cid, sub, resumed: rest.u8()? != 0 }
        }
        DELIVER => {
            let (sub, tag, attempt, flags) = (rest.u64()?, rest.u64()?, rest.u16()?, rest.u8()?);
            rest.take(8)?;
            let options = rest.u16()?;
            rest.take(usize::from(options))?;
            Said::Deliver { sub, tag, attempt, redelivered: flags & 2 != 0, payload: rest.0.to_vec() }
        }
        other => Said::Other(other),
    };
    Ok(vec![said])
}

/// What is left of a payload.
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    pub fn take(&mut self, n: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or_else(|| bad("a payload that is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn u8(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub fn u16(&mut self) -> io::Result<u16> {
        let b = self.take(2)?;
        Ok(u16::from_be_bytes([b[0], b[1]]))
    }

    pub fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from(self.u16()?) << 16 | u32::from(self.u16()?))
    }

    pub fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from(self.u32()?) << 32 | u64::from(self.u32()?))
    }

    pub fn string(&mut self) -> io::Result<String> {
        let len = self.u16()?;
        Ok(String::from_utf8_lossy(self.take(usize::from(len))?).into_owned())
    }
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    Cursor(&bytes[at..]).u64()
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the broker sent {what} outside the protocol"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn frames_are_spelt_as_the_protocol_says() {
        let mut output = Vec::new();
        put_frame(&mut output, HELLO, 1, |payload| payload.extend_from_slice(&2u16.to_be_bytes()));
        assert_eq!(output, [0, 0, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2]);
        let mut options = Vec::new();
        put_options(&mut options, |o| put_option(o, 4, &[0, 0, 1, 0]));
        assert_eq!(options, [0, 7, 4, 0, 4, 0, 0, 1, 0]);
    }

    #[test]
    fn what_the_broker_says_is_understood_however_it_is_split() -> io::Result<()> {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, CONFIRM, 0, |p| {
            p.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 0, 0, 0, 0, 0, 0, 0, 77]);
            p.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 10, 2, 1, 0xf7, 0, 2, b'n', b'o']);
        });
        put_frame(&mut bytes, DELIVER, 0, |p| {
            p.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 3, 3]);
            p.extend_from_slice(&[0; 8]);
            p.extend_from_slice(&[0, 3, 9, 0, 0]);
            p.extend_from_slice(b"body");
        });
        put_frame(&mut bytes, 0x7f, 3, |_| {});
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut wire = Wire::connect(listener.local_addr()?)?;
        let (mut peer, _) = listener.accept()?;
        let writer = std::thread::spawn(move || {
            peer.set_nodelay(true)?;
            bytes.iter().try_for_each(|byte| peer.write_all(&[*byte]))
        });
        let mut said = Vec::new();
        let error = loop {
            match wire.receive(Duration::from_millis(100)) {
                Ok(Some(one)) => said.push(one),
                Ok(None) => {}
                Err(error) => break error,
            }
        };
        writer.join().expect("the writer does not panic")?;
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(
            said,
            [
                Said::Confirm { cid: 9, outcome: Outcome::Stored },
                Said::Confirm { cid: 10, outcome: Outcome::Rejected { code: 503, text: "no".into() } },
                Said::Deliver { sub: 1, tag: 5, attempt: 3, redelivered: true, payload: b"body".to_vec() },
                Said::Other(0x7f),
            ]
        );
        Ok(())
    }
}
