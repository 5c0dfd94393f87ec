//! A virtual shard's state as a checkpoint holds it: everything its log records have brought about, except where the
//! messages lie; that is read off the segments again.
//!
//! Layout, little-endian: u8 version | u32 next topic | u32 next sub | u32 topics, each {u32 id, bytes name, u64 next seq,
//! u64 stored, u64 stored bytes, u32 ids of {u64 seen ms, bytes id}, u32 publishers of {u64 id, u64 seen ms, ranges}} |
//! u32 subscriptions, each {u32 id, u32 topic, u8 kind, bytes name or key, u64 start, u64 floor, u64 stored before,
//! u64 finished, ranges done, u32 failed of {u64 seq, u16 failures}}.
//! bytes = u32 length + bytes; ranges = u32 count + {u64 first, u64 last}. The checkpoint's container has the checksums.

use bytes::Bytes;

use crate::planted::planted;
use crate::protocol::request::Identity;
use crate::shard::catalog::{Catalog, NextIds};
use crate::shard::ranges::Ranges;
use crate::shard::subscription::{Kind, Subscription};
use crate::shard::topic::Publisher;
use crate::time::{Duration, WallMs};
use crate::types::{Qos, Seq, SubId, TopicId, VShard};
use crate::wal::record::KeyId;

const VERSION: u8 = 1;
/// Numbers given one by one never come near this, so counting on from one cannot overflow.
const SEQ_MAX: u64 = 1 << 63;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    #[error("the state of virtual shard {vshard} in the checkpoint ends at byte {at} where {what} was expected")]
    Short { vshard: u16, at: usize, what: &'static str },
    #[error("the state of virtual shard {vshard} in the checkpoint has version {version}; this broker reads {VERSION}")]
    Version { vshard: u16, version: u8 },
    #[error("the state of virtual shard {vshard} in the checkpoint has an unknown subscription kind {kind}")]
    Kind { vshard: u16, kind: u8 },
    #[error("the state of virtual shard {vshard} in the checkpoint has {what} before byte {at} that cannot be")]
    Number { vshard: u16, at: usize, what: &'static str },
}

/// The state of one virtual shard.
pub fn encode(catalog: &Catalog, vshard: VShard) -> Bytes {
    let mut out = Vec::with_capacity(1024);
    let ids = catalog.next_ids(vshard);
    out.push(VERSION);
    put_u32(&mut out, ids.topic);
    put_u32(&mut out, ids.sub);
    let topics = catalog.vshard_topics(vshard);
    put_u32(&mut out, topics.len() as u32);
    for topic in topics {
        put_u32(&mut out, topic.id.index);
        put_bytes(&mut out, &topic.name);
        put_u64(&mut out, topic.next_seq.0);
        put_u64(&mut out, topic.stored);
        put_u64(&mut out, topic.stored_bytes);
        put_u32(&mut out, topic.dedup.ids().count() as u32);
        for (seen, id) in topic.dedup.ids() {
            put_u64(&mut out, seen.0);
            put_bytes(&mut out, id);
        }
        let publishers = topic.dedup.publishers();
        put_u32(&mut out, publishers.len() as u32);
        for (id, publisher) in publishers {
            put_u64(&mut out, id);
            put_u64(&mut out, publisher.seen.0);
            put_ranges(&mut out, &publisher.stored);
        }
    }
    let subs: Vec<_> = catalog.vshard_subs(vshard).into_iter().filter(|s| s.kind.is_logged()).collect();
    put_u32(&mut out, subs.len() as u32);
    for sub in subs {
        put_u32(&mut out, sub.id.index);
        put_u32(&mut out, sub.topic.index);
        match &sub.kind {
            Kind::Durable { name } => {
                out.push(1);
                put_bytes(&mut out, name);
            }
            Kind::Orphan { key } => {
                out.push(2);
                put_bytes(&mut out, &key.0);
            }
            Kind::DeadLetters | Kind::Ephemeral => {
                out.push(3);
                put_bytes(&mut out, &[]);
            }
        }
        put_u64(&mut out, sub.start.0);
        put_u64(&mut out, sub.floor.0);
        put_u64(&mut out, sub.stored_before);
        put_u64(&mut out, sub.finished);
        put_ranges(&mut out, &sub.done);
        let mut failed: Vec<_> =
            sub.touched.iter().filter(|(_, t)| t.failures > 0).map(|(seq, t)| (*seq, t.failures)).collect();
        failed.sort_unstable();
        put_u32(&mut out, failed.len() as u32);
        for (seq, failures) in failed {
            put_u64(&mut out, seq.0);
            out.extend_from_slice(&failures.to_le_bytes());
        }
    }
    Bytes::from(out)
}

/// Puts what `encode` wrote into `catalog`. An empty `blob` is a virtual shard without history.
pub fn decode(catalog: &mut Catalog, vshard: VShard, blob: &[u8], window: Duration) -> Result<(), SnapshotError> {
    if blob.is_empty() {
        return Ok(());
    }
    let mut input = Input { vshard: vshard.0, bytes: blob, at: 0 };
    let version = input.u8("the version")?;
    if version != VERSION {
        return Err(SnapshotError::Version { vshard: vshard.0, version });
    }
    let ids = NextIds { topic: input.u32("the next topic")?, sub: input.u32("the next subscription")? };
    for _ in 0..input.u32("the topics")? {
        let id = TopicId { vshard, index: input.id("a topic's id")? };
        let name = Bytes::copy_from_slice(input.bytes("a topic's name")?);
        catalog.create_topic(id, name);
        let Some(topic) = catalog.topics.get_mut(&id) else { continue };
        topic.next_seq = input.seq("a topic's sequence")?;
        topic.stored = input.u64("a topic's count")?;
        topic.stored_bytes = input.u64("a topic's bytes")?;
        for _ in 0..input.u32("the message ids")? {
            let seen = WallMs(input.u64("a message id's time")?);
            let id = Bytes::copy_from_slice(input.bytes("a message id")?);
            topic.dedup.remember(&Identity::MessageId(id), seen, window);
        }
        for _ in 0..input.u32("the publishers")? {
            let id = input.u64("a publisher's id")?;
            let seen = WallMs(input.u64("a publisher's time")?);
            let stored = input.ranges("a publisher's sequences", u64::MAX)?;
            if !planted!(DedupNotInCheckpoint) {
                topic.dedup.restore_publisher(id, Publisher { stored, seen });
            }
        }
    }
    for _ in 0..input.u32("the subscriptions")? {
        let id = SubId { vshard, index: input.id("a subscription's id")? };
        let topic = TopicId { vshard, index: input.u32("a subscription's topic")? };
        let kind = input.u8("a subscription's kind")?;
        let name = input.bytes("a subscription's name")?;
        let kind = match (kind, <[u8; 16]>::try_from(name)) {
            (1, _) => Kind::Durable { name: Bytes::copy_from_slice(name) },
            (2, Ok(key)) => Kind::Orphan { key: KeyId(key) },
            (3, _) => Kind::DeadLetters,
            (kind, _) => return Err(SnapshotError::Kind { vshard: vshard.0, kind }),
        };
        let start = input.seq("a subscription's start")?;
        let mut sub = Subscription::new(id, topic, kind, Qos::AtLeastOnce, start, 0);
        sub.floor = input.seq("a subscription's floor")?;
        sub.stored_before = input.u64("a subscription's beginning")?;
        if catalog.topics.get(&topic).is_some_and(|topic| topic.stored < sub.stored_before) {
            return Err(input.cannot_be("a subscription's beginning"));
        }
        sub.finished = input.u64("a subscription's count")?;
        sub.done = input.ranges("what a subscription has finished", SEQ_MAX)?;
        if planted!(AcksNotInCheckpoint) {
            sub.finished -= sub.done.iter().map(|(first, last)| last.0 - first.0 + 1).sum::<u64>().min(sub.finished);
            sub.done.clear();
        }
        for _ in 0..input.u32("the failed deliveries")? {
            let seq = Seq(input.u64("a failed delivery")?);
            let failures = input.u16("a delivery's failures")?;
            sub.restore_failures(seq, failures);
        }
        catalog.restore_sub(sub);
    }
    catalog.restore_next_ids(vshard, ids);
    Ok(())
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

fn put_ranges(out: &mut Vec<u8>, ranges: &Ranges) {
    put_u32(out, ranges.len() as u32);
    for (first, last) in ranges.iter() {
        put_u64(out, first.0);
        put_u64(out, last.0);
    }
}

struct Input<'a> {
    vshard: u16,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], SnapshotError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(SnapshotError::Short { vshard: self.vshard, at: self.at, what }) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], SnapshotError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, SnapshotError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, SnapshotError> {
        self.array(what).map(u16::from_le_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, SnapshotError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, SnapshotError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], SnapshotError> {
        let len = self.u32(what)?;
        self.take(len as usize, what)
    }

    /// A number of a topic or subscription.
    fn id(&mut self, what: &'static str) -> Result<u32, SnapshotError> {
        let id = self.u32(what)?;
        if id == u32::MAX { Err(self.cannot_be(what)) } else { Ok(id) }
    }

    /// A message's number, from 1.
    fn seq(&mut self, what: &'static str) -> Result<Seq, SnapshotError> {
        let seq = self.u64(what)?;
        if (1..=SEQ_MAX).contains(&seq) { Ok(Seq(seq)) } else { Err(self.cannot_be(what)) }
    }

    fn cannot_be(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Number { vshard: self.vshard, at: self.at, what }
    }

    /// - `max`: the largest number in them.
    fn ranges(&mut self, what: &'static str, max: u64) -> Result<Ranges, SnapshotError> {
        let mut ranges = Ranges::default();
        for _ in 0..self.u32(what)? {
            let (first, last) = (self.u64(what)?, self.u64(what)?);
            if first > last || last > max {
                return Err(self.cannot_be(what));
            }
            ranges.insert_range(Seq(first), Seq(last));
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: VShard = VShard(0);

    /// One topic and one subscription, so far as the numbers differ.
    fn state(topic: u32, next_seq: u64, start: u64, stored_before: u64) -> Vec<u8> {
        let mut out = vec![VERSION];
        for number in [1, 1, 1, topic] {
            put_u32(&mut out, number);
        }
        put_bytes(&mut out, b"a");
        for number in [next_seq, 5, 0] {
            put_u64(&mut out, number);
        }
        for number in [0, 0, 1, 1, topic] {
            put_u32(&mut out, number);
        }
        out.push(1);
        put_bytes(&mut out, b"name");
        for number in [start, 1, stored_before, 0] {
            put_u64(&mut out, number);
        }
        put_u32(&mut out, 0);
        put_u32(&mut out, 0);
        out
    }

    fn read(blob: &[u8]) -> Result<Bytes, SnapshotError> {
        let mut catalog = Catalog::default();
        decode(&mut catalog, SHARD, blob, Duration::from_millis(1))?;
        Ok(encode(&catalog, SHARD))
    }

    /// Found by fuzzing: counting on from such numbers overflowed.
    #[test]
    fn numbers_that_nobody_can_have_given_are_refused() {
        let cases = [
            (state(u32::MAX, 9, 1, 5), "a topic's id"),
            (state(1, 0, 1, 5), "a topic's sequence"),
            (state(1, u64::MAX, 1, 5), "a topic's sequence"),
            (state(1, 9, 0, 5), "a subscription's start"),
            (state(1, 9, 1, 6), "a subscription's beginning"),
        ];
        for (blob, expected) in cases {
            let Err(SnapshotError::Number { what, .. }) = read(&blob) else { panic!("{expected} was taken") };
            assert_eq!(what, expected);
        }
    }

    #[test]
    fn a_state_cut_short_anywhere_is_refused() {
        let blob = state(1, 9, 1, 5);
        let read_again = |blob: &[u8]| read(blob).map(|_| ());
        assert_eq!(read_again(&blob), Ok(()));
        for len in 1..blob.len() {
            assert!(matches!(read(&blob[..len]), Err(SnapshotError::Short { .. })), "{len} bytes");
        }
    }
}
