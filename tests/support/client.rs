//! A small blocking client for both dialects. It never waits for silence: a PING after the request, and the PONG as
//! the next frame, show that nothing came before.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use super::{PATIENCE, Said};

/// One connection.
pub struct Client {
    stream: TcpStream,
    unread: Vec<u8>,
    /// Read and not yet asked for, of a v2 frame that says several things.
    pub(super) heard: VecDeque<Said>,
    cid: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    pub frame_type: u8,
    pub cid: u64,
    pub payload: Vec<u8>,
}

/// A delivery of either dialect; `tag` is the correlation id in v1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    pub tag: u64,
    pub qos: u8,
    pub message: Vec<u8>,
}

impl Client {
    pub fn connect(port: u16) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the broker listens");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        Client { stream, unread: Vec::new(), heard: VecDeque::new(), cid: 1_000_000 }
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the broker reads");
    }

    pub fn send(&mut self, frame_type: u8, cid: u64, payload: &[u8]) {
        self.send_raw(&frame(frame_type, cid, payload));
    }

    /// The next `len` bytes, as they come.
    pub fn recv_raw(&mut self, len: usize) -> Vec<u8> {
        while self.unread.len() < len {
            assert!(self.read_some(), "closed by the broker; read so far: {:02x?}", self.unread);
        }
        self.unread.drain(..len).collect()
    }

    pub fn recv(&mut self) -> Frame {
        let len = u32::from_be_bytes(self.recv_raw(4).try_into().expect("four"));
        assert!(len >= 9, "length {len}");
        let rest = self.recv_raw(len as usize);
        let cid = u64::from_be_bytes(rest[1..9].try_into().expect("eight"));
        Frame { frame_type: rest[0], cid, payload: rest[9..].to_vec() }
    }

    /// `None`: the broker has hung up.
    pub fn try_recv(&mut self) -> Option<Frame> {
        loop {
            let len = self.unread.first_chunk().map(|len| u32::from_be_bytes(*len) as usize);
            if len.is_some_and(|len| self.unread.len() >= 4 + len) {
                return Some(self.recv());
            }
            if !self.read_some() {
                return None;
            }
        }
    }

    /// `false`: the broker has hung up.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    pub fn expect(&mut self, frame_type: u8, cid: u64, payload: &[u8]) {
        assert_eq!(self.recv(), Frame { frame_type, cid, payload: payload.to_vec() });
    }

    /// v1's NACK.
    pub fn expect_nack(&mut self, cid: u64, code: u16, text: &str) {
        let frame = self.recv();
        let shown = String::from_utf8_lossy(frame.payload.get(4..).unwrap_or_default()).into_owned();
        let payload = [&code.to_be_bytes()[..], &string(text)].concat();
        assert_eq!(frame, Frame { frame_type: 0x06, cid, payload }, "expected {text:?}, got {shown:?}");
    }

    /// Everything sent so far got no other answers than those already read.
    pub fn expect_silence(&mut self) {
        let cid = self.next_cid();
        self.send(0x07, cid, b"");
        self.expect(0x08, cid, b"");
    }

    /// The broker hangs up, without another byte.
    pub fn expect_closed(&mut self) {
        while self.read_some() {}
        assert_eq!(self.unread, b"", "hung up, but not in silence");
    }

    /// `false`: the end.
    fn read_some(&mut self) -> bool {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(len) => {
                self.unread.extend_from_slice(&buffer[..len]);
                len > 0
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing within {PATIENCE:?}: {error}"),
        }
    }

    pub fn next_cid(&mut self) -> u64 {
        self.cid += 1;
        self.cid
    }

    // v1

    pub fn login_v1(&mut self, key: &str) {
        self.send(0x01, 1, &[0, 1]);
        self.expect(0x05, 1, &[0; 8]);
        self.send(0x02, 2, &string(key));
        self.expect(0x05, 2, &[0; 8]);
    }

    /// Returns the subscription.
    pub fn subscribe(&mut self, topic: &str, qos: u8) -> u64 {
        let cid = self.next_cid();
        self.send(0x04, cid, &[&string(topic)[..], &[qos]].concat());
        let frame = self.recv();
        assert_eq!((frame.frame_type, frame.cid), (0x05, cid), "{frame:?}");
        let sub = u64::from_be_bytes(frame.payload.try_into().expect("an id"));
        assert_ne!(sub, 0);
        sub
    }

    pub fn publish(&mut self, topic: &str, qos: u8, message: &[u8]) -> u64 {
        let cid = self.next_cid();
        self.send(0x03, cid, &[&[qos][..], &string(topic), message].concat());
        cid
    }

    /// Sends a POLL and does not wait.
    pub fn poll_later(&mut self, sub: u64) -> u64 {
        let cid = self.next_cid();
        self.send(0x09, cid, &sub.to_be_bytes());
        cid
    }

    /// Sends a POLL and waits for the delivery. A QoS0 delivery must carry the POLL's correlation id; `tag` is then 0.
    pub fn poll(&mut self, sub: u64, topic: &str) -> Delivery {
        let cid = self.poll_later(sub);
        let mut delivery = self.recv_delivery(topic);
        if delivery.qos == 0 {
            assert_eq!(delivery.tag, cid, "a QoS0 delivery carries the POLL's correlation id");
            delivery.tag = 0;
        }
        delivery
    }

    pub fn recv_delivery(&mut self, topic: &str) -> Delivery {
        let frame = self.recv();
        assert_eq!(frame.frame_type, 0x03, "{frame:?}");
        let name = string(topic);
        assert_eq!(frame.payload.get(1..1 + name.len()), Some(&name[..]), "the topic");
        Delivery { tag: frame.cid, qos: frame.payload[0], message: frame.payload[1 + name.len()..].to_vec() }
    }

    pub fn ack(&mut self, sub: u64, tag: u64) {
        self.send(0x05, tag, &sub.to_be_bytes());
    }

    // v2

    pub fn login_v2(&mut self, key: &str) {
        self.send(0x01, 1, &[0, 2]);
        let welcome = self.recv();
        assert_eq!((welcome.frame_type, welcome.cid, &welcome.payload[..2]), (0x10, 1, &[0, 2][..]));
        self.send(0x02, 2, &string(key));
        self.expect(0x11, 2, &[0, 0]);
    }

    /// Returns the subscription. `durable`: its name, empty for none.
    pub fn subscribe_v2(&mut self, topic: &str, qos: u8, credit: u32, durable: &str) -> u64 {
        let cid = self.next_cid();
        let mut options = Vec::new();
        if !durable.is_empty() {
            options = [&[1][..], &string(durable)].concat();
        }
        let options_len = (options.len() as u16).to_be_bytes();
        let payload = [&[qos][..], &credit.to_be_bytes(), &string(topic), &options_len, &options].concat();
        self.send(0x15, cid, &payload);
        let frame = self.recv();
        assert_eq!((frame.frame_type, frame.cid, frame.payload.len()), (0x16, cid, 21), "{frame:?}");
        u64::from_be_bytes(frame.payload[..8].try_into().expect("eight"))
    }

    /// Publishes and waits until the broker confirms; returns status and level.
    pub fn publish_v2(&mut self, topic: &str, qos: u8, message: &[u8]) -> (u8, u8) {
        let cid = self.next_cid();
        self.send(0x13, cid, &[&[1, qos][..], &string(topic), &[0, 0], message].concat());
        let frame = self.recv();
        assert_eq!((frame.frame_type, frame.cid, frame.payload.len()), (0x14, 0, 18), "{frame:?}");
        assert_eq!(frame.payload[..8], cid.to_be_bytes());
        (frame.payload[8], frame.payload[9])
    }

    /// A DELIVER without options.
    pub fn recv_delivery_v2(&mut self, sub: u64) -> Delivery {
        let frame = self.recv();
        assert_eq!((frame.frame_type, frame.cid), (0x17, 0), "{frame:?}");
        assert_eq!(frame.payload[..8], sub.to_be_bytes());
        assert_eq!(frame.payload[27..29], [0, 0], "no options");
        let tag = u64::from_be_bytes(frame.payload[8..16].try_into().expect("eight"));
        Delivery { tag, qos: frame.payload[18] & 1, message: frame.payload[29..].to_vec() }
    }

    /// Acknowledges a range of tags and waits for the OK.
    pub fn ack_v2(&mut self, sub: u64, first: u64, last: u64) {
        let cid = self.next_cid();
        let payload = [&sub.to_be_bytes()[..], &[1], &first.to_be_bytes(), &last.to_be_bytes()].concat();
        self.send(0x18, cid, &payload);
        self.expect(0x11, cid, &[0, 0]);
    }
}

/// The bytes of a frame.
pub fn frame(frame_type: u8, cid: u64, payload: &[u8]) -> Vec<u8> {
    let len = 9 + payload.len() as u32;
    [&len.to_be_bytes()[..], &[frame_type], &cid.to_be_bytes(), payload].concat()
}

/// `u16 length | text`
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Bytes from hex digits; spaces do not matter.
pub fn hex(text: &str) -> Vec<u8> {
    let digits = text.chars().filter(|&c| c != ' ').map(|c| c.to_digit(16).expect("a hex digit") as u8);
    let digits: Vec<u8> = digits.collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}
