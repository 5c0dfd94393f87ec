//! One connection's replies, encoded and not yet in the kernel.
//!
//! Owns: the order of the bytes. Many replies become one write. Never: waits; the shard bounds what may come in.

use crate::protocol::encode::Encoder;
use crate::protocol::reply::Reply;
use crate::protocol::request::Version;

#[derive(Debug, Default)]
pub struct Outbox {
    encoder: Encoder,
    /// Being sent; its first `sent` bytes are in the kernel.
    sending: Vec<u8>,
    sent: usize,
}

impl Outbox {
    pub fn push(&mut self, reply: &Reply, version: Version) {
        self.encoder.encode(reply, version);
    }

    /// Bytes not yet in the kernel.
    pub fn len(&self) -> usize {
        self.encoder.len() + self.sending.len() - self.sent
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to send next, in one piece; empty if there is nothing.
    pub fn front(&mut self) -> &[u8] {
        if self.sent == self.sending.len() {
            let spare = std::mem::take(&mut self.sending);
            self.sending = self.encoder.take(spare);
            self.sent = 0;
        }
        &self.sending[self.sent..]
    }

    /// The kernel has taken the first `bytes` of `front`.
    pub fn advance(&mut self, bytes: usize) {
        self.sent += bytes;
        assert!(self.sent <= self.sending.len(), "more was sent than there is");
    }

    /// Nothing is to be sent: an idle connection keeps no more memory than it needs soon.
    pub fn shrink(&mut self) {
        if self.sending.capacity() > KEPT_WHEN_IDLE {
            self.sending = Vec::new();
            self.sent = 0;
        }
        if self.encoder.is_empty() {
            let spare = self.encoder.take(Vec::new());
            if spare.capacity() <= KEPT_WHEN_IDLE && self.sending.is_empty() {
                self.sending = spare;
                self.sending.clear();
                self.sent = 0;
            }
        }
    }
}

/// Buffer an idle connection keeps.
const KEPT_WHEN_IDLE: usize = 2 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_whatever_the_kernel_takes() {
        let mut outbox = Outbox::default();
        let mut all = Vec::new();
        let mut expected = Vec::new();
        for cid in 0..50 {
            let reply = Reply::Pong { cid };
            outbox.push(&reply, Version::V1);
            crate::protocol::encode::encode(&reply, Version::V1, &mut expected);
            let front = outbox.front();
            let take = front.len().min(7);
            all.extend_from_slice(&front[..take]);
            outbox.advance(take);
        }
        while !outbox.is_empty() {
            let front = outbox.front().to_vec();
            outbox.advance(front.len());
            all.extend(front);
        }
        assert_eq!(all, expected);
        outbox.shrink();
        assert_eq!(outbox.front(), b"");
    }
}
