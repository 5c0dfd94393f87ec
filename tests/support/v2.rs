//! v2 as a conversation in which answers come in any order.

use super::{Client, Frame, frame, string};

/// What the broker may say to a v2 client that is logged in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    /// `level`: 0 memory, 1 written, 2 synced.
    Stored {
        cid: u64,
        level: u8,
    },
    Rejected {
        cid: u64,
        code: u16,
        text: String,
    },
    Delivered {
        sub: u64,
        tag: u64,
        attempt: u16,
        redelivered: bool,
        message: Vec<u8>,
    },
    Ok {
        cid: u64,
    },
    Error {
        cid: u64,
        code: u16,
        text: String,
    },
    GoAway {
        code: u16,
        text: String,
    },
}

impl Client {
    /// `false`: the broker refuses, or hangs up.
    pub fn try_login_v2(&mut self, key: &str) -> bool {
        if !self.try_send(&frame(0x01, 1, &[0, 2])) || self.try_recv().is_none() {
            return false;
        }
        self.try_send(&frame(0x02, 2, &string(key))) && self.try_recv().is_some_and(|frame| frame.frame_type == 0x11)
    }

    /// The next thing said. `None`: the broker has hung up.
    pub fn hear(&mut self) -> Option<Said> {
        loop {
            if let Some(said) = self.heard.pop_front() {
                return Some(said);
            }
            let frame = self.try_recv()?;
            self.heard.extend(understand(&frame));
        }
    }

    /// Publishes QoS1, and does not wait for the CONFIRM.
    pub fn publish_later_v2(&mut self, topic: &str, message: &[u8]) -> u64 {
        let cid = self.next_cid();
        self.send_raw(&publish_frame(cid, topic, message));
        cid
    }

    /// The same; `None`: the broker has hung up.
    pub fn try_publish_v2(&mut self, topic: &str, message: &[u8]) -> Option<u64> {
        let cid = self.next_cid();
        self.try_send(&publish_frame(cid, topic, message)).then_some(cid)
    }

    /// Acknowledges a range of tags, and does not wait for the OK.
    pub fn ack_later_v2(&mut self, sub: u64, first: u64, last: u64) -> Option<u64> {
        let cid = self.next_cid();
        let payload = [&sub.to_be_bytes()[..], &[1], &first.to_be_bytes(), &last.to_be_bytes()].concat();
        self.try_send(&frame(0x18, cid, &payload)).then_some(cid)
    }

    /// The next `count` deliveries of `sub`; nothing else may come between.
    pub fn deliveries_v2(&mut self, sub: u64, count: usize) -> Vec<(u64, Vec<u8>)> {
        let next = |_| match self.hear() {
            Some(Said::Delivered { sub: to, tag, message, .. }) if to == sub => (tag, message),
            other => panic!("expected a delivery, got {other:?}"),
        };
        (0..count).map(next).collect()
    }

    /// How many messages wait in a durable subscription.
    pub fn backlog_v2(&mut self, topic: &str, durable: &str) -> u64 {
        let cid = self.next_cid();
        let options = [&[1][..], &string(durable)].concat();
        let options_len = (options.len() as u16).to_be_bytes();
        let credit = 1u32.to_be_bytes();
        self.send(0x15, cid, &[&[1][..], &credit, &string(topic), &options_len, &options].concat());
        let subscribed = self.recv();
        assert_eq!((subscribed.frame_type, subscribed.cid), (0x16, cid), "{subscribed:?}");
        assert_eq!(subscribed.payload[10], 1, "it existed before");
        let (sub, backlog) = (u64_at(&subscribed.payload, 0), u64_at(&subscribed.payload, 11));
        if backlog > 0 {
            self.deliveries_v2(sub, 1);
        }
        let cid = self.next_cid();
        self.send(0x1b, cid, &[&sub.to_be_bytes()[..], &[0]].concat());
        assert_eq!(self.hear(), Some(Said::Ok { cid }));
        backlog
    }

    /// Publishes them all, pipelined, and waits until each is stored.
    pub fn publish_all_v2(&mut self, topic: &str, messages: impl Iterator<Item = Vec<u8>>) {
        let (mut sent, mut stored) = (0, 0);
        for message in messages {
            self.publish_later_v2(topic, &message);
            sent += 1;
            if sent - stored >= 256 {
                self.wait_stored();
                stored += 1;
            }
        }
        for _ in stored..sent {
            self.wait_stored();
        }
    }

    fn wait_stored(&mut self) {
        match self.hear() {
            Some(Said::Stored { .. }) => {}
            other => panic!("expected a confirm, got {other:?}"),
        }
    }
}

fn publish_frame(cid: u64, topic: &str, message: &[u8]) -> Vec<u8> {
    frame(0x13, cid, &[&[1, 1][..], &string(topic), &[0, 0], message].concat())
}

fn understand(frame: &Frame) -> Vec<Said> {
    let (cid, payload) = (frame.cid, &frame.payload[..]);
    let code_and_text = || (u16_at(payload, 0), text_at(payload, 2));
    match frame.frame_type {
        0x11 => vec![Said::Ok { cid }],
        0x12 => {
            let (code, text) = code_and_text();
            vec![Said::Error { cid, code, text }]
        }
        0x14 => confirms(payload),
        0x17 => {
            let options = usize::from(u16_at(payload, 27));
            vec![Said::Delivered {
                sub: u64_at(payload, 0),
                tag: u64_at(payload, 8),
                attempt: u16_at(payload, 16),
                redelivered: payload[18] & 2 != 0,
                message: payload[29 + options..].to_vec(),
            }]
        }
        0x1c => {
            let (code, text) = code_and_text();
            vec![Said::GoAway { code, text }]
        }
        other => panic!("frame type {other:#x}: {frame:?}"),
    }
}

fn confirms(mut payload: &[u8]) -> Vec<Said> {
    let mut all = Vec::new();
    while !payload.is_empty() {
        let (cid, status) = (u64_at(payload, 0), payload[8]);
        let len = if status == 2 {
            let text = text_at(payload, 11);
            let len = 13 + text.len();
            all.push(Said::Rejected { cid, code: u16_at(payload, 9), text });
            len
        } else {
            all.push(Said::Stored { cid, level: payload[9] });
            18
        };
        payload = &payload[len..];
    }
    all
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

/// `u16 length | text`
fn text_at(bytes: &[u8], at: usize) -> String {
    let len = usize::from(u16_at(bytes, at));
    String::from_utf8(bytes[at + 2..at + 2 + len].to_vec()).expect("UTF-8")
}
