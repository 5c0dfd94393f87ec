//! One simulated TCP connection: bytes to the broker, bytes to the client, each with its delays.
//!
//! Owns: what is under way, how it is cut into pieces, and what the end of a connection leaves of it. Never: looks into a
//! frame's meaning; the broker's bytes are cut into frames where they leave it, so that what was heard and what was said
//! can be told apart.

use std::collections::VecDeque;

use blipmq::protocol::client_side::ReplyDecoder;
use blipmq::protocol::reply::{Deliver, Reply};
use blipmq::protocol::request::Version;
use blipmq::time::{Duration, Instant};
use blipmq::types::ConnId;
use bytes::Bytes;

use crate::rng::Rng;

/// How a connection carries its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// One way, in microseconds: least and most.
    pub delay_us: (u64, u64),
    pub slices: Slices,
    /// Bytes that the sockets' buffers take before the broker has to wait for the client.
    pub room: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slices {
    /// As the client wrote them.
    Whole,
    /// In a few pieces, anywhere.
    Pieces,
    /// Byte by byte, for so many bytes; then in pieces.
    Single(u32),
}

/// Pieces one write is cut into, at most.
const PIECES_MAX: u64 = 4;

/// One connection. `H`: what a frame of the broker's means to the client, decided when it left the broker.
#[derive(Debug)]
pub struct Link<H> {
    /// Never used twice in a life.
    pub number: u32,
    pub client: usize,
    pub core: u16,
    /// The broker's end; `None` before it was accepted and after it was closed.
    pub conn: Option<ConnId>,
    pub version: Version,
    /// The client has sent what is no frame.
    pub spoilt: bool,
    /// The client has given it up.
    pub left: bool,
    /// Nothing passes any more, in either direction.
    pub dead: bool,
    /// The client does not read before.
    pub stalled_until: Instant,
    manner: Manner,
    up: VecDeque<(Instant, Bytes)>,
    up_last: Instant,
    frames: Frames,
    down: VecDeque<(Instant, usize)>,
    down_last: Instant,
    /// Bytes that have left the broker, and that have been read.
    said: u64,
    heard: u64,
    /// Said, but still in the broker's outbox; then on the way, with the number of bytes that were sent by its end.
    expected: VecDeque<(Reply, H)>,
    replies: VecDeque<(u64, H)>,
}

impl<H> Link<H> {
    pub fn new(number: u32, client: usize, core: u16, version: Version, manner: Manner) -> Link<H> {
        Link {
            number,
            client,
            core,
            conn: None,
            version,
            spoilt: false,
            left: false,
            dead: false,
            stalled_until: Instant(0),
            manner,
            up: VecDeque::new(),
            up_last: Instant(0),
            frames: Frames { bytes: Vec::new(), decoder: ReplyDecoder::new(version) },
            down: VecDeque::new(),
            down_last: Instant(0),
            said: 0,
            heard: 0,
            expected: VecDeque::new(),
            replies: VecDeque::new(),
        }
    }

    /// Neither end has anything to do with it any more.
    pub fn is_over(&self) -> bool {
        self.left && self.conn.is_none()
    }

    pub fn delay(&self, rng: &mut Rng) -> Duration {
        Duration(rng.between(self.manner.delay_us.0, self.manner.delay_us.1) * 1_000)
    }

    pub fn byte_by_byte(&mut self, bytes: u32) {
        self.manner.slices = Slices::Single(bytes);
    }

    // ---- to the broker ------------------------------------------------------------------------------------------

    /// Returns when the pieces arrive.
    pub fn write(&mut self, now: Instant, bytes: Vec<u8>, rng: &mut Rng) -> Vec<Instant> {
        if self.dead || bytes.is_empty() {
            return Vec::new();
        }
        let mut rest = Bytes::from(bytes);
        let mut times = Vec::new();
        let mut pieces = if self.manner.slices == Slices::Whole { 1 } else { rng.between(1, PIECES_MAX) };
        self.up_last = self.up_last.max(now + self.delay(rng));
        while !rest.is_empty() {
            let piece = match &mut self.manner.slices {
                Slices::Single(left) if *left > 0 => {
                    *left -= 1;
                    rest.split_to(1)
                }
                _ if pieces > 1 => {
                    pieces -= 1;
                    rest.split_to(rng.between(1, rest.len() as u64) as usize)
                }
                _ => std::mem::take(&mut rest),
            };
            self.up.push_back((self.up_last, piece));
            times.push(self.up_last);
            self.up_last = self.up_last + Duration(rng.between(0, 50_000));
        }
        times
    }

    /// When the last byte that was written will have arrived.
    pub fn up_end(&self, now: Instant) -> Instant {
        self.up_last.max(now)
    }

    /// The next piece that has arrived at the broker.
    pub fn arrived(&mut self, now: Instant) -> Option<Bytes> {
        let (at, _) = self.up.front()?;
        if *at > now || self.dead {
            return None;
        }
        self.up.pop_front().map(|(_, bytes)| bytes)
    }

    pub fn has_arrived(&self, now: Instant) -> bool {
        !self.dead && self.up.front().is_some_and(|(at, _)| *at <= now)
    }

    /// What has not arrived yet never will.
    pub fn drop_up(&mut self) {
        self.up.clear();
    }

    // ---- to the client ------------------------------------------------------------------------------------------

    /// Bytes that the sockets take now.
    pub fn room(&self) -> usize {
        self.manner.room.saturating_sub((self.said - self.heard) as usize)
    }

    /// The broker has said this; its bytes will follow.
    pub fn expect(&mut self, reply: Reply, what: H) {
        self.expected.push_back((reply, what));
    }

    /// The broker sends these bytes. `Err`: they are not what it said.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let before = self.said - self.frames.bytes.len() as u64;
        self.said += bytes.len() as u64;
        for (end, reply) in self.frames.cut(before, bytes)? {
            let (said, what) = self.expected.pop_front().ok_or_else(|| format!("{reply:?}, which nobody said"))?;
            if !is_same(&said, &reply, self.version) {
                return Err(format!("{reply:?} for {said:?}"));
            }
            self.replies.push_back((end, what));
        }
        Ok(())
    }

    /// `bytes` that were sent are under way. Returns when they arrive.
    pub fn carry(&mut self, now: Instant, bytes: usize, rng: &mut Rng) -> Option<Instant> {
        if self.dead || self.left {
            return None;
        }
        self.down_last = self.down_last.max(now + self.delay(rng));
        self.down.push_back((self.down_last, bytes));
        Some(self.down_last)
    }

    /// When the last byte that was sent will have arrived.
    pub fn down_end(&self, now: Instant) -> Instant {
        self.down_last.max(now)
    }

    /// What the client has heard by now, unless it does not listen.
    pub fn hear(&mut self, now: Instant) -> Vec<H> {
        if self.stalled_until > now {
            return Vec::new();
        }
        while let Some((at, bytes)) = self.down.front().copied()
            && at <= now
        {
            self.heard += bytes as u64;
            self.down.pop_front();
        }
        let mut heard = Vec::new();
        while self.replies.front().is_some_and(|(end, _)| *end <= self.heard) {
            heard.extend(self.replies.pop_front().map(|(_, what)| what));
        }
        heard
    }
}

/// Whether the bytes say what was meant, as far as the dialect can.
fn is_same(said: &Reply, read: &Reply, version: Version) -> bool {
    match (said, read) {
        (Reply::Deliver(said), Reply::Deliver(read)) if version == Version::V1 => {
            let payload = said.body.payload() == read.body.payload();
            payload && said.qos == read.qos && said.cid == read.cid && said.topic == read.topic
        }
        (Reply::Deliver(said), Reply::Deliver(read)) => {
            Deliver { cid: 0, topic: Bytes::new(), ..said.clone() } == *read
        }
        _ => said == read,
    }
}

/// Cuts what the broker sends into frames.
#[derive(Debug)]
struct Frames {
    bytes: Vec<u8>,
    decoder: ReplyDecoder,
}

impl Frames {
    /// - `before`: bytes sent before the first byte that is kept here.
    fn cut(&mut self, before: u64, bytes: &[u8]) -> Result<Vec<(u64, Reply)>, String> {
        self.bytes.extend_from_slice(bytes);
        let mut said = Vec::new();
        let mut taken = 0;
        while let Some(head) = self.bytes[taken..].first_chunk::<4>() {
            let end = taken + 4 + u32::from_be_bytes(*head) as usize;
            if end > self.bytes.len() {
                break;
            }
            self.decoder.push(Bytes::copy_from_slice(&self.bytes[taken..end]));
            while let Some(reply) = self.decoder.next_reply().map_err(|error| error.to_string())? {
                said.push((before + end as u64, reply));
            }
            taken = end;
        }
        self.bytes.drain(..taken);
        Ok(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(slices: Slices) -> Link<u64> {
        let manner = Manner { delay_us: (100, 5_000), slices, room: 64 };
        Link::new(1, 0, 0, Version::V2, manner)
    }

    #[test]
    fn bytes_arrive_in_order_however_they_are_cut() {
        for slices in [Slices::Whole, Slices::Pieces, Slices::Single(10)] {
            let (mut link, mut rng) = (link(slices), Rng::new(3));
            let mut all = Vec::new();
            for n in 0..20u8 {
                let bytes = vec![n; 1 + usize::from(n)];
                all.extend_from_slice(&bytes);
                let times = link.write(Instant(u64::from(n) * 1_000), bytes, &mut rng);
                assert!(times.is_sorted() && !times.is_empty());
            }
            assert_eq!(link.arrived(Instant(0)), None);
            let mut got = Vec::new();
            while let Some(piece) = link.arrived(Instant(1 << 40)) {
                assert!(slices != Slices::Single(10) || got.len() >= 10 || piece.len() == 1);
                got.extend_from_slice(&piece);
            }
            assert_eq!(got, all);
        }
    }

    #[test]
    fn a_reply_is_heard_when_its_last_byte_has_come_and_room_is_given_back() {
        let (mut link, mut rng) = (link(Slices::Whole), Rng::new(3));
        let pong = [0, 0, 0, 9, 8, 0, 0, 0, 0, 0, 0, 0, 7];
        let stream = [pong, pong].concat();
        let mut now = Instant(0);
        link.expect(Reply::Pong { cid: 7 }, 1);
        link.expect(Reply::Pong { cid: 7 }, 2);
        for (cut, heard) in [(0..5, 0), (5..20, 1), (20..26, 1)] {
            assert_eq!(link.send(&stream[cut.clone()]), Ok(()));
            assert_eq!(link.room(), 64 - cut.len());
            let at = link.carry(now, cut.len(), &mut rng).expect("it lives");
            assert_eq!(link.hear(now).len(), 0);
            assert_eq!(link.hear(at).len(), heard);
            assert_eq!(link.room(), 64);
            now = at;
        }
        // One that does not read takes no more than its room.
        link.stalled_until = Instant(1 << 40);
        assert_eq!(link.send(&[0; 3]), Ok(()), "the beginning of a frame");
        let at = link.carry(now, 3, &mut rng).expect("it lives");
        assert_eq!(link.hear(at).len(), 0);
        assert_eq!(link.room(), 61);
    }

    #[test]
    fn bytes_that_were_not_said_are_noticed() {
        let pong = [0, 0, 0, 9, 8, 0, 0, 0, 0, 0, 0, 0, 7];
        assert!(link(Slices::Whole).send(&pong).is_err());
        let mut other = link(Slices::Whole);
        other.expect(Reply::Pong { cid: 8 }, 1);
        assert!(other.send(&pong).is_err());
    }

    #[test]
    fn nothing_passes_when_it_is_dead() {
        let (mut link, mut rng) = (link(Slices::Whole), Rng::new(3));
        link.write(Instant(0), vec![1], &mut rng);
        link.dead = true;
        assert_eq!(link.arrived(Instant(1 << 40)), None);
        assert!(link.write(Instant(0), vec![1], &mut rng).is_empty());
        assert_eq!(link.carry(Instant(0), 1, &mut rng), None);
    }
}
