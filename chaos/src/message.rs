//! A message's payload, from which a delivery tells what was published.
//!
//! offset bytes field      The filler's length and bytes follow from publisher and sequence alone, so a payload is
//!      0     8 checksum   either exactly what its publisher sent, or it is not; nothing needs to be remembered.
//!      8     2 publisher  Big-endian.
//!     10     2 topic
//!     12     8 sequence
//!     20     … filler

use crate::rng::Rng;

const HEAD: usize = 20;

/// Which message this is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MessageId {
    pub publisher: u16,
    pub topic: u16,
    /// Dense, from 1.
    pub seq: u64,
}

impl MessageId {
    /// The payload of this message: mostly small, sometimes many blocks of the log.
    pub fn encode(&self) -> Vec<u8> {
        let mut rng = Rng::derive(0x6d65_7373_6167_6573, &[u64::from(self.publisher), u64::from(self.topic), self.seq]);
        let filler = if rng.percent(1) { rng.between(4_000, 40_000) } else { rng.between(0, 500) } as usize;
        let mut payload = Vec::with_capacity(HEAD + filler + 8);
        payload.extend_from_slice(&[0; 8]);
        payload.extend_from_slice(&self.publisher.to_be_bytes());
        payload.extend_from_slice(&self.topic.to_be_bytes());
        payload.extend_from_slice(&self.seq.to_be_bytes());
        while payload.len() < HEAD + filler {
            payload.extend_from_slice(&rng.draw().to_be_bytes());
        }
        payload.truncate(HEAD + filler);
        let sum = checksum(&payload[8..]);
        payload[..8].copy_from_slice(&sum.to_be_bytes());
        payload
    }

    /// The message this payload belongs to; `None` if it is not, byte for byte, one that `encode` makes.
    pub fn decode(payload: &[u8]) -> Option<MessageId> {
        let head: &[u8; HEAD] = payload.first_chunk()?;
        if checksum(&payload[8..]).to_be_bytes() != head[..8] {
            return None;
        }
        let id = MessageId {
            publisher: u16::from_be_bytes([head[8], head[9]]),
            topic: u16::from_be_bytes([head[10], head[11]]),
            seq: u64::from_be_bytes([head[12], head[13], head[14], head[15], head[16], head[17], head[18], head[19]]),
        };
        Some(id)
    }
}

/// FNV-1a over words, finished so that every bit counts. Not the broker's checksum, on purpose.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum: u64 = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    let mut words = bytes.chunks_exact(8);
    let mut step = |word: u64| sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
    for word in &mut words {
        step(u64::from_be_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]));
    }
    for byte in words.remainder() {
        step(u64::from(*byte));
    }
    Rng::new(sum).draw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_names_its_message_and_no_damaged_one_does() {
        for seq in 1..300 {
            let id = MessageId { publisher: 3, topic: 1, seq };
            let payload = id.encode();
            assert_eq!(MessageId::decode(&payload), Some(id));
            for at in [0, 9, 12, 19, payload.len() - 1] {
                let mut damaged = payload.clone();
                damaged[at] ^= 0x10;
                assert_eq!(MessageId::decode(&damaged), None, "byte {at} of message {seq}");
            }
            assert_eq!(MessageId::decode(&payload[..payload.len() - 1]), None);
        }
        assert_eq!(MessageId::decode(&[]), None);
    }
}
