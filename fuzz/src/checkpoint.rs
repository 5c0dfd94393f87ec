//! The checkpoint loader: arbitrary bytes, whole files that were damaged or half written over, two files to choose from, and the
//! states of virtual shards in them. It never panics, never takes a damaged file for a whole one, never allocates what a number
//! merely claims; and what a core was, it is again after its state went through a file.
//!
//! The first byte says which.

use std::collections::BTreeMap;

use blipmq::limits::BLOCK;
use blipmq::shard::catalog::Catalog;
use blipmq::shard::snapshot;
use blipmq::time::{Duration, WallMs};
use blipmq::types::{LogRef, Lsn, Seq, Slot, StreamId, VShard};
use blipmq::wal::checkpoint::{
    CHECKPOINT_BLOCK, Checkpoint, CheckpointError, ChooseError, SealedEnd, StreamState, VShardState, choose,
};
use blipmq::wal::format::{Segment, StoreId};
use blipmq::wal::record::{IdentityRef, KeyId, Published, Record, SubKind};
use bytes::Bytes;

use super::draw::Draw;
use super::memory;

const WINDOW: Duration = Duration::from_millis(1_000);
const SECTOR: usize = 512;

pub fn run(input: &[u8]) {
    let [mode, rest @ ..] = input else { return };
    match mode % 5 {
        0 => arbitrary(rest),
        1 => state(rest),
        2 => damaged(rest),
        3 => two_files(rest),
        _ => catalog_again(rest),
    }
}

/// As it is, and with right checksums around it.
fn arbitrary(bytes: &[u8]) {
    let _any = decode(bytes);
    let mut file = vec![0; BLOCK];
    file[..8].copy_from_slice(b"BLIPCKP2");
    file[8] = 1;
    file[16] = 1;
    file[24..32].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    file[32..36].copy_from_slice(&crc32c::crc32c(bytes).to_le_bytes());
    let header = crc32c::crc32c(&file[..40]);
    file[40..44].copy_from_slice(&header.to_le_bytes());
    for block in bytes.chunks(CHECKPOINT_BLOCK - 4) {
        file.extend_from_slice(&crc32c::crc32c_append(header, block).to_le_bytes());
        file.extend_from_slice(block);
    }
    if let Ok(checkpoint) = decode(&file) {
        assert_eq!(decode(&checkpoint.encode()), Ok(checkpoint.clone()));
        for (nth, vshard) in checkpoint.vshards.iter().enumerate().take(64) {
            state_of(VShard(nth as u16), &vshard.state);
        }
    }
}

/// What is read of a file is never more than the file.
fn decode(file: &[u8]) -> Result<Checkpoint, CheckpointError> {
    memory::within(64 * 1024 + 8 * file.len(), || Checkpoint::decode(file))
}

fn state(blob: &[u8]) {
    state_of(VShard(0), blob);
}

/// A state that is anything: refused in words, or something that can be written again.
fn state_of(vshard: VShard, blob: &[u8]) {
    let mut catalog = Catalog::default();
    let result = memory::within(64 * 1024 + 256 * blob.len(), || snapshot::decode(&mut catalog, vshard, blob, WINDOW));
    match result {
        Ok(()) => {
            // What a start and a question would do next.
            let _any = snapshot::encode(&catalog, vshard);
            catalog.replayed();
            for sub in catalog.vshard_subs(vshard) {
                let _any = sub.waiting(&catalog.topics[&sub.topic]);
            }
        }
        Err(error) => assert!(error.to_string().split_whitespace().count() > 3),
    }
}

fn damaged(input: &[u8]) {
    let mut draw = Draw::front(input);
    let old = checkpoint(&mut draw, 7).encode();
    let checkpoint = checkpoint(&mut draw, 8);
    let whole = checkpoint.encode();
    assert_eq!(decode(&whole), Ok(checkpoint.clone()));

    let mut file = whole.clone();
    let mut damage = Draw::back(input);
    match damage.below(5) {
        // Up to three bits, which the checksum promises to notice.
        0 => {
            for _ in 0..1 + damage.below(3) {
                let bit = damage.below(file.len() * 8);
                file[bit / 8] ^= 1 << (bit % 8);
            }
        }
        1 => file.truncate(damage.below(file.len())),
        2 => {
            let (a, b) = (damage.below(file.len()), damage.below(file.len()));
            file[a.min(b)..=a.max(b)].fill([0, 0xff][damage.below(2)]);
        }
        // Half written over the old one.
        3 => {
            let mut under = old.clone();
            under.resize(old.len().max(whole.len()), 0);
            for (nth, sector) in whole.chunks(SECTOR).enumerate() {
                if damage.one_in(2) {
                    under[nth * SECTOR..nth * SECTOR + sector.len()].copy_from_slice(sector);
                }
            }
            file = under;
        }
        // Sectors in each other's places.
        _ => {
            let sectors = file.len() / SECTOR;
            let (a, b) = (damage.below(sectors), damage.below(sectors));
            let sector = file[a * SECTOR..][..SECTOR].to_vec();
            file.copy_within(b * SECTOR..(b + 1) * SECTOR, a * SECTOR);
            file[b * SECTOR..][..SECTOR].copy_from_slice(&sector);
        }
    }
    match decode(&file) {
        Ok(found) if found == checkpoint => {
            let used = used(&whole);
            let same = |range: std::ops::Range<usize>| file[range.clone()] == whole[range];
            assert!(same(0..44) && same(BLOCK..used), "damage was not noticed");
        }
        Ok(found) => assert_eq!(Checkpoint::decode(&old), Ok(found), "neither the old one nor the new one"),
        Err(error) => assert!(error.to_string().split_whitespace().count() > 3),
    }
}

/// Bytes of a file behind which there is only padding.
fn used(file: &[u8]) -> usize {
    let body = file[24..32].try_into().map(u64::from_le_bytes).expect("eight bytes") as usize;
    BLOCK + body + 4 * body.div_ceil(CHECKPOINT_BLOCK - 4)
}

/// What a file is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    Never,
    Whole(u64),
    Damaged,
    FromTheFuture,
}

fn two_files(input: &[u8]) {
    let mut draw = Draw::front(input);
    let (a, a_is) = file(&mut draw);
    let (b, b_is) = file(&mut draw);
    let chosen = memory::within(64 * 1024 + 16 * (BLOCK + a.iter().chain(&b).map(Vec::len).sum::<usize>()), || {
        choose(a.as_deref(), b.as_deref())
    });
    let number = |chosen: &blipmq::wal::checkpoint::Chosen| chosen.checkpoint.as_ref().map(|c| c.number);
    let newest = match (a_is, b_is) {
        (State::FromTheFuture, _) | (_, State::FromTheFuture) => {
            return assert!(matches!(chosen, Err(ChooseError::Version(2))), "{chosen:?}");
        }
        (State::Damaged, State::Damaged) => {
            return assert!(matches!(chosen, Err(ChooseError::BothDamaged { .. })), "{chosen:?}");
        }
        (State::Whole(a), State::Whole(b)) if a == b => {
            return assert_eq!(chosen, Err(ChooseError::SameNumber(a)));
        }
        (State::Whole(a), State::Whole(b)) => Some(a.max(b)),
        (State::Whole(number), _) | (_, State::Whole(number)) => Some(number),
        _ => None,
    };
    let chosen = chosen.expect("there is something to start from");
    assert_eq!(number(&chosen), newest);
    assert_eq!(chosen.fallbacks, [a_is, b_is].iter().filter(|is| **is == State::Damaged).count() as u32);
    let older = match (a_is, b_is) {
        (State::Whole(x), State::Whole(y)) => {
            if x < y {
                a
            } else {
                b
            }
        }
        _ => None,
    };
    let held = older.map_or(Vec::new(), |file| Checkpoint::decode(&file).expect("whole").live);
    assert_eq!(chosen.held, held, "what the older one needs is not to be used");
}

fn file(draw: &mut Draw<'_>) -> (Option<Vec<u8>>, State) {
    let number = 1 + draw.below(4) as u64;
    let mut whole = checkpoint(draw, number).encode();
    match draw.below(6) {
        0 => (None, State::Never),
        1 => (Some(vec![0; draw.below(3) * BLOCK]), State::Never),
        2 => {
            let bit = draw.below(used(&whole) * 8);
            let header = bit / 8 < 44;
            if !header && bit / 8 < BLOCK {
                return (Some(whole), State::Whole(number));
            }
            whole[bit / 8] ^= 1 << (bit % 8);
            (Some(whole), State::Damaged)
        }
        3 => {
            whole[8] = 2;
            let crc = crc32c::crc32c(&whole[..40]);
            whole[40..44].copy_from_slice(&crc.to_le_bytes());
            (Some(whole), State::FromTheFuture)
        }
        _ => (Some(whole), State::Whole(number)),
    }
}

fn checkpoint(draw: &mut Draw<'_>, number: u64) -> Checkpoint {
    let stream = |draw: &mut Draw<'_>| StreamId { incarnation: draw.below(5) as u64, core: draw.below(4) as u16 };
    let streams = (0..draw.below(4))
        .map(|_| StreamState {
            stream: stream(draw),
            covered: Lsn(draw.odd_u64()),
            durable: Lsn(draw.odd_u64()),
            sealed: (draw.one_in(2)).then(|| SealedEnd { end: Lsn(draw.odd_u64()), chain: draw.odd_u64() }),
        })
        .collect();
    let live = (0..draw.below(4))
        .map(|_| Segment {
            stream: stream(draw),
            sequence: draw.below(9) as u64,
            slot: Slot(draw.below(9) as u32),
            salt: draw.odd_u64(),
        })
        .collect();
    let vshards = (0..draw.below(4))
        .map(|_| {
            // A few are larger than a block of the file.
            let len = if draw.one_in(32) { CHECKPOINT_BLOCK + draw.below(999) } else { draw.below(300) };
            VShardState { last_index: draw.below(99) as u64, state: Bytes::from(vec![draw.byte(); len]) }
        })
        .collect();
    Checkpoint {
        store: StoreId { uuid: [7; 16], node: 1 },
        segment_size: 1 << 20,
        number,
        incarnation: draw.below(9) as u64,
        time: WallMs(draw.odd_u64()),
        streams,
        live,
        vshards,
    }
}

/// Topics and queues that lived as the input says, through their state and back.
fn catalog_again(input: &[u8]) {
    const SHARD: VShard = VShard(3);
    let mut draw = Draw::front(input);
    let mut life = Life::default();
    let mut catalog = Catalog::default();
    while !draw.is_empty() && life.log.len() < 200 {
        let before = life.log.len();
        life.step(&mut draw);
        if let Some((record, at)) = life.log.get(before) {
            let record = Record::decode_alone(record).expect("encoded here");
            catalog.replay(SHARD, &record, *at, false, WINDOW);
        }
        catalog.invariants();
        if draw.one_in(32) {
            check_again(&catalog, SHARD, &life);
        }
    }
    check_again(&catalog, SHARD, &life);
}

/// A restart: the state, and then the log below it, of which only the places of messages count.
fn check_again(catalog: &Catalog, vshard: VShard, life: &Life) {
    let state = snapshot::encode(catalog, vshard);
    let mut again = Catalog::default();
    snapshot::decode(&mut again, vshard, &state, WINDOW).expect("just encoded");
    assert_eq!(snapshot::encode(&again, vshard), state, "a state that was read is the state that was written");
    for (record, at) in &life.log {
        let record = Record::decode_alone(record).expect("encoded here");
        again.replay(vshard, &record, *at, true, WINDOW);
    }
    again.invariants();
    assert_eq!(snapshot::encode(&again, vshard), state);
    let places = |catalog: &Catalog| -> Vec<(u32, Seq, LogRef, u32)> {
        let topics = catalog.vshard_topics(vshard);
        let live = |topic: &blipmq::shard::topic::Topic| -> Vec<_> {
            topic.index.live_from(Seq(0)).map(|entry| (topic.id.index, entry.seq, entry.at, entry.refs)).collect()
        };
        topics.into_iter().flat_map(live).collect()
    };
    assert_eq!(places(&again), places(catalog), "other messages are wanted");
    assert_eq!(again.next_ids(vshard), catalog.next_ids(vshard));
    for sub in catalog.vshard_subs(vshard) {
        let other = &again.subs[&sub.id];
        let backlog = |catalog: &Catalog, sub: &blipmq::shard::subscription::Subscription| {
            sub.backlog(&catalog.topics[&sub.topic])
        };
        assert_eq!(backlog(&again, other), backlog(catalog, sub));
    }
}

/// Writes the log of one virtual shard.
#[derive(Default)]
struct Life {
    log: Vec<(Vec<u8>, LogRef)>,
    topics: BTreeMap<u32, Topic>,
    subs: BTreeMap<u32, Sub>,
    next_topic: u32,
    next_sub: u32,
    now: u64,
}

struct Topic {
    next: u64,
    stored: Vec<Seq>,
    subs: u32,
}

struct Sub {
    topic: u32,
}

impl Life {
    fn step(&mut self, draw: &mut Draw<'_>) {
        self.now += draw.below(400) as u64;
        let topics: Vec<u32> = self.topics.keys().copied().collect();
        let subs: Vec<u32> = self.subs.keys().copied().collect();
        match draw.below(16) {
            0 | 1 => {
                self.next_topic += 1 + draw.below(2) as u32;
                let topic = self.next_topic;
                self.topics.insert(topic, Topic { next: 1, stored: Vec::new(), subs: 0 });
                let name = topic.to_string();
                self.write(&Record::TopicCreated { topic, name: name.as_bytes() });
            }
            2 => {
                let unused = topics.iter().copied().find(|topic| self.topics[topic].subs == 0);
                if let Some(topic) = unused {
                    self.topics.remove(&topic);
                    self.write(&Record::TopicDeleted { topic });
                }
            }
            3..6 => self.subscribe(draw, &topics),
            6 => {
                if let Some(&sub) = draw.pick(&subs) {
                    let topic = self.subs.remove(&sub).expect("picked").topic;
                    self.topics.get_mut(&topic).expect("it has a subscription").subs -= 1;
                    self.write(&Record::SubDeleted { sub });
                }
            }
            7..10 => {
                let Some(&sub) = draw.pick(&subs) else { return };
                let next = self.topics[&self.subs[&sub].topic].next;
                let ranges = (0..1 + draw.below(3))
                    .map(|_| {
                        let first = 1 + draw.below(next as usize) as u64;
                        (Seq(first), Seq(first + draw.below(4) as u64))
                    })
                    .collect();
                self.write(&Record::Acked { sub, ranges });
            }
            10 => {
                let Some(&sub) = draw.pick(&subs) else { return };
                // Only what was delivered can have failed: numbers of messages in memory cannot.
                if let Some(&seq) = draw.pick(&self.topics[&self.subs[&sub].topic].stored) {
                    self.write(&Record::Failed { sub, seq, failures: 1 + draw.below(4) as u16 });
                }
            }
            _ => self.publish(draw, &topics),
        }
    }

    fn subscribe(&mut self, draw: &mut Draw<'_>, topics: &[u32]) {
        let Some(&topic) = draw.pick(topics) else { return };
        self.next_sub += 1;
        let sub = self.next_sub;
        let state = self.topics.get_mut(&topic).expect("picked");
        state.subs += 1;
        // From the beginning, from now on, or with numbers left out that messages in memory took.
        let start = match draw.below(3) {
            0 => 1,
            1 => state.next,
            _ => state.next + draw.below(3) as u64,
        };
        state.next = state.next.max(start);
        self.subs.insert(sub, Sub { topic });
        let name = sub.to_string();
        let kind = match draw.below(3) {
            0 => SubKind::Durable { name: name.as_bytes() },
            1 => SubKind::Orphan { key: KeyId([sub as u8; 16]) },
            _ => SubKind::DeadLetters,
        };
        self.write(&Record::SubCreated { sub, topic, kind, start: Seq(start), created: WallMs(self.now) });
    }

    fn publish(&mut self, draw: &mut Draw<'_>, topics: &[u32]) {
        let Some(&topic) = draw.pick(topics) else { return };
        let state = self.topics.get_mut(&topic).expect("picked");
        let seq = Seq(state.next + draw.below(2) as u64);
        state.next = seq.0 + 1;
        state.stored.push(seq);
        let id = [draw.byte() % 5; 3];
        let identity = match draw.below(3) {
            0 => Some(IdentityRef::MessageId(&id)),
            1 => Some(IdentityRef::Publisher { id: id[0].into(), sequence: draw.below(20) as u64 }),
            _ => None,
        };
        let published = Published {
            topic,
            seq,
            published: WallMs(self.now),
            expires: WallMs(0),
            not_before: WallMs(0),
            priority: draw.byte() % 10,
            identity,
            options: b"",
            payload: b"payload",
        };
        self.write(&Record::Published(published));
    }

    fn write(&mut self, record: &Record<'_>) {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        bytes.truncate(record.encoded_len());
        let nth = self.log.len() as u32;
        let at = LogRef { slot: Slot(nth / 16), offset: nth * 4096, len: bytes.len() as u32 };
        self.log.push((bytes, at));
    }
}
