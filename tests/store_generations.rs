//! A store through many runs of a broker: slots granted, filled, sealed, emptied, freed and used again by other streams, with
//! changing core counts, orderly stops, crashes that leave a torn frame, and newest checkpoints that are lost. After each
//! start exactly the messages that were still wanted are there, and can be read where the log says they are.
//!
//! The keeper, the checkpoints, the log and recovery are the broker's own; the shard is a list of wanted messages, and the
//! driver writes with plain files.

#![cfg(feature = "server")]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blipmq::time::WallMs;
use blipmq::types::{CoreId, LogRef, Seq, Slot, StreamId, VShard};
use blipmq::wal::batch::{AppendError, Class, Log, LogConfig};
use blipmq::wal::checkpoint::Checkpoint;
use blipmq::wal::disk;
use blipmq::wal::format::Segment;
use blipmq::wal::keeper::{CoreSnapshot, Keeper, KeeperConfig, KeeperHandle, ToCore, ToKeeper};
use blipmq::wal::record::{Published, Record};
use blipmq::wal::recovery::Entry;
use blipmq::wal::segments::{CoreReport, Live};
use blipmq::wal::start;
use blipmq::wal::store::{Store, StoreOptions};
use bytes::Bytes;

const VSHARDS: u16 = 6;
const NOW: WallMs = WallMs(1_000);

/// xorshift64*: the same run for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// What a shard would know of a virtual shard: the messages somebody wants, and where they lie.
#[derive(Clone, Default, PartialEq, Debug)]
struct Wanted {
    last: u64,
    at: BTreeMap<u64, Option<LogRef>>,
}

impl Wanted {
    fn encode(&self) -> Bytes {
        std::iter::once(&self.last).chain(self.at.keys()).flat_map(|seq| seq.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn decode(bytes: &[u8]) -> Wanted {
        let mut numbers = bytes.chunks_exact(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()));
        Wanted { last: numbers.next().unwrap_or(0), at: numbers.map(|seq| (seq, None)).collect() }
    }
}

fn payload(vshard: u16, seq: u64) -> Vec<u8> {
    let len = 200 + (seq * 7_919 + u64::from(vshard) * 104_729) % 60_000;
    vec![(seq as u8) ^ (vshard as u8); len as usize]
}

fn message(seq: u64, payload: &[u8]) -> Published<'_> {
    Published {
        topic: 1,
        seq: Seq(seq),
        published: NOW,
        expires: WallMs(0),
        not_before: WallMs(0),
        priority: 0,
        identity: None,
        options: &[],
        payload,
    }
}

struct Core {
    id: CoreId,
    log: Log,
    begun: Vec<Segment>,
    requested: usize,
    no_space: bool,
    relocated: u64,
    refused: u64,
}

struct Run {
    wal_dir: PathBuf,
    handle: KeeperHandle,
    cores: Vec<Core>,
    wanted: Vec<Wanted>,
    checkpoints: u64,
}

impl Run {
    fn append(&mut self, core: usize, vshard: u16, record: &Record<'_>, class: Class) -> Option<LogRef> {
        match self.cores[core].log.append(VShard(vshard), record, class, NOW) {
            Ok(appended) => Some(appended.at),
            Err(AppendError::Full) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Writes everything appended. `torn`: of each write only the first block, as a crash may leave it. Returns whether that
    /// made a difference.
    fn write(&mut self, core: usize, torn: bool) -> bool {
        let core = &mut self.cores[core];
        let mut cut = false;
        while let Some(write) = core.log.next_write(core.log.taken(), NOW) {
            let file = disk::open_slot(&self.wal_dir, write.slot, false).unwrap();
            let len = if torn { write.bytes.len().min(4096) } else { write.bytes.len() };
            cut |= len < write.bytes.len();
            file.write_all_at(&write.bytes[..len], u64::from(write.offset)).unwrap();
            if write.new_segment {
                core.begun.push(write.segment);
            }
        }
        cut
    }

    fn hear(&mut self, nth: usize) {
        while let Ok(message) = self.handle.from_keeper[nth].try_recv() {
            match message {
                ToCore::Grant(grant) => {
                    self.cores[nth].log.grant(grant);
                    self.cores[nth].requested -= 1;
                }
                ToCore::TakeSnapshot { .. } => self.snapshot(nth),
                ToCore::Relocate { slot } => self.relocate(nth, slot),
                ToCore::NoSpace { .. } => self.cores[nth].no_space = true,
                ToCore::SpaceBack => self.cores[nth].no_space = false,
                ToCore::Checkpointed { .. } => self.checkpoints += u64::from(nth == 0),
            }
        }
        let core = &mut self.cores[nth];
        let count = core.log.grants_wanted() - core.requested.min(core.log.grants_wanted());
        if count > 0 {
            core.requested += count;
            self.handle.to_keeper.send(ToKeeper::WantGrant { core: core.id, count }).unwrap();
        }
    }

    /// The keeper has its own pace; without this a fast disk would see no checkpoint in a whole run.
    fn until_checkpoint(&mut self) {
        let (before, deadline) = (self.checkpoints, Instant::now() + Duration::from_secs(60));
        while self.checkpoints == before {
            assert!(Instant::now() < deadline, "no checkpoint");
            (0..self.cores.len()).for_each(|nth| self.hear(nth));
            std::thread::yield_now();
        }
    }

    fn own(&self, nth: usize) -> Vec<u16> {
        let cores = self.cores.len() as u16;
        (0..VSHARDS).filter(|vshard| VShard(*vshard).core(cores) == self.cores[nth].id).collect()
    }

    /// Everything is written before the next message is heard, so what is appended is durable here.
    fn snapshot(&mut self, nth: usize) {
        let mut live: BTreeMap<Slot, Live> = BTreeMap::new();
        let mut vshards = Vec::new();
        let core = &self.cores[nth];
        for vshard in self.own(nth) {
            let wanted = &self.wanted[usize::from(vshard)];
            for at in wanted.at.values().flatten() {
                let slot = live.entry(at.slot).or_default();
                slot.records += 1;
                slot.bytes += u64::from(at.len);
            }
            vshards.push((VShard(vshard), core.log.last_index(VShard(vshard)), wanted.encode()));
        }
        let covered = core.log.appended();
        let live = live.into_iter().collect();
        let report = CoreReport { core: core.id, covered, live, begun: core.begun.clone() };
        let snapshot = CoreSnapshot { report, durable: covered, vshards, wall: NOW };
        self.handle.to_keeper.send(ToKeeper::Snapshot(Box::new(snapshot))).unwrap();
    }

    fn relocate(&mut self, nth: usize, slot: Slot) {
        for vshard in self.own(nth) {
            let there: Vec<u64> = self.wanted[usize::from(vshard)]
                .at
                .iter()
                .filter_map(|(seq, at)| at.filter(|at| at.slot == slot).map(|_| *seq))
                .collect();
            for seq in there {
                let bytes = payload(vshard, seq);
                let Some(at) = self.append(nth, vshard, &Record::Relocated(message(seq, &bytes)), Class::Control)
                else {
                    break;
                };
                self.wanted[usize::from(vshard)].at.insert(seq, Some(at));
                self.cores[nth].relocated += 1;
            }
        }
        self.write(nth, false);
        self.handle.to_keeper.send(ToKeeper::Relocated { core: self.cores[nth].id, slot }).unwrap();
    }

    fn publish(&mut self, nth: usize, vshard: u16) {
        let seq = self.wanted[usize::from(vshard)].last + 1;
        let bytes = payload(vshard, seq);
        if let Some(at) = self.append(nth, vshard, &Record::Published(message(seq, &bytes)), Class::Publish) {
            let wanted = &mut self.wanted[usize::from(vshard)];
            wanted.last = seq;
            wanted.at.insert(seq, Some(at));
        } else {
            self.cores[nth].refused += 1;
        }
    }

    /// Consumes most of the old messages, but leaves one in twelve for ever.
    fn consume(&mut self, nth: usize, vshard: u16, keep: usize) {
        let wanted = &self.wanted[usize::from(vshard)];
        let excess = wanted.at.len().saturating_sub(keep);
        let done: Vec<u64> = wanted.at.keys().copied().filter(|seq| seq % 12 != 0).take(excess).collect();
        if done.is_empty() {
            return;
        }
        let ranges = done.iter().map(|seq| (Seq(*seq), Seq(*seq))).collect();
        if self.append(nth, vshard, &Record::Acked { sub: 1, ranges }, Class::Control).is_some() {
            self.wanted[usize::from(vshard)].at.retain(|seq, _| !done.contains(seq));
        }
    }
}

/// Starts from what is on the disk, and checks that it is what the last run left.
fn start_run(store: &Arc<Store>, cores: u16, expected: &[Wanted], quota: u64) -> Run {
    let mut wanted = vec![Wanted::default(); usize::from(VSHARDS)];
    let mut covered = vec![0; usize::from(VSHARDS)];
    let mut loaded = wanted.clone();
    let mut load = |checkpoint: &Checkpoint| {
        for ((wanted, covered), state) in loaded.iter_mut().zip(&mut covered).zip(&checkpoint.vshards) {
            *wanted = Wanted::decode(&state.state);
            *covered = state.last_index;
        }
        Ok(())
    };
    // Records come after the states; the two closures cannot share them, so they are kept until the end.
    let mut entries = Vec::new();
    let mut visit = |entry: Entry<'_>| {
        let what = match &entry.record {
            Record::Published(published) => What::Published(published.seq.0, published.payload.to_vec()),
            Record::Relocated(published) => What::Relocated(published.seq.0),
            Record::Acked { ranges, .. } => What::Acked(ranges.iter().map(|(seq, _)| seq.0).collect()),
            other => panic!("{other:?}"),
        };
        entries.push((entry.vshard, entry.index, entry.at, what));
    };
    let recovered = start::recover(store, &mut load, &mut visit).unwrap_or_else(|error| panic!("{error}"));
    wanted.clone_from(&loaded);
    for (vshard, index, at, what) in entries {
        let nth = usize::from(vshard.0);
        let included = index.is_some_and(|index| index <= covered[nth]);
        match what {
            What::Published(seq, bytes) => {
                assert_eq!(bytes, payload(vshard.0, seq));
                if !included {
                    wanted[nth].last = seq;
                    wanted[nth].at.insert(seq, Some(at));
                } else if let Some(place) = wanted[nth].at.get_mut(&seq) {
                    *place = Some(at);
                }
            }
            What::Relocated(seq) => {
                if let Some(place) = wanted[nth].at.get_mut(&seq) {
                    *place = Some(at);
                }
            }
            What::Acked(seqs) => wanted[nth].at.retain(|seq, _| !seqs.contains(seq)),
        }
    }
    for (nth, (found, expected)) in wanted.iter().zip(expected).enumerate() {
        let seqs = |wanted: &Wanted| wanted.at.keys().copied().collect::<Vec<u64>>();
        assert_eq!((found.last, seqs(found)), (expected.last, seqs(expected)), "virtual shard {nth}");
        for (seq, at) in &found.at {
            let at = at.unwrap_or_else(|| panic!("virtual shard {nth}: message {seq} lies nowhere"));
            check_place(store, nth as u16, *seq, at);
        }
    }
    let config = KeeperConfig { cores, spare: 2, disk_quota: quota, checkpoint_interval: Duration::from_millis(1) };
    let handle = Keeper::start(Arc::clone(store), &recovered, &|| unreachable!("there is space"), config).unwrap();
    let cores = (0..cores).map(|core| {
        let mut grants = handle.grants[usize::from(core)].iter();
        let config = LogConfig {
            store: store.id(),
            stream: StreamId { incarnation: recovered.incarnation, core },
            segment_size: store.segment_size(),
            last_index: recovered.recovered.last_index.clone(),
            opening: Some(recovered.recovered.note()),
        };
        let mut log = Log::new(config, *grants.next().unwrap());
        grants.for_each(|grant| log.grant(*grant));
        Core { id: CoreId(core), log, begun: Vec::new(), requested: 0, no_space: false, relocated: 0, refused: 0 }
    });
    let mut run = Run { wal_dir: store.wal_dir(), cores: cores.collect(), handle, wanted, checkpoints: 0 };
    for core in 0..run.cores.len() {
        run.write(core, false);
    }
    run
}

enum What {
    Published(u64, Vec<u8>),
    Relocated(u64),
    Acked(Vec<u64>),
}

fn check_place(store: &Store, vshard: u16, seq: u64, at: LogRef) {
    let file = disk::open_slot(&store.wal_dir(), at.slot, false).unwrap();
    let mut bytes = vec![0; (at.len as usize).next_multiple_of(8)];
    file.read_exact_at(&mut bytes, u64::from(at.offset)).unwrap();
    match Record::decode(&bytes).unwrap().0 {
        Record::Published(found) | Record::Relocated(found) => {
            assert_eq!((found.seq, found.payload), (Seq(seq), &payload(vshard, seq)[..]));
        }
        other => panic!("{other:?} where message {seq} should be"),
    }
}

/// What all runs of one seed did.
#[derive(Default, Debug)]
struct Totals {
    checkpoints: u64,
    relocated: u64,
    slots_max: usize,
    written: u64,
    /// Publishes that found no room.
    refused: u64,
    /// Checkpoints lost between two runs.
    damaged: u64,
}

fn generations(dir: &Path, seed: u64, runs: u64, steps: u64, quota: u64) -> Totals {
    let options = StoreOptions {
        path: dir.to_owned(),
        virtual_shards: VSHARDS,
        dead_letter_suffix: ".dlq".to_owned(),
        segment_size: Some(1 << 20),
        allow_buffered_io: true,
    };
    let mut random = Random(seed);
    let mut expected = vec![Wanted::default(); usize::from(VSHARDS)];
    let mut totals = Totals::default();
    for run_number in 0..runs {
        let store = Arc::new(Store::open(&options).unwrap());
        let cores = 1 + random.below(3) as u16;
        let mut run = start_run(&store, cores, &expected, quota);
        let keep = 5 + random.below(60) as usize;
        for step in 1..=random.below(steps) {
            if step % 20 == 0 {
                run.until_checkpoint();
            }
            let nth = random.below(u64::from(cores)) as usize;
            run.hear(nth);
            for vshard in run.own(nth) {
                for _ in 0..random.below(4) {
                    if run.cores[nth].no_space {
                        run.cores[nth].refused += 1;
                    } else {
                        run.publish(nth, vshard);
                    }
                }
                run.consume(nth, vshard, keep);
            }
            run.write(nth, false);
        }
        totals.slots_max = totals.slots_max.max(disk::list_slots(&run.wal_dir).unwrap().len());
        let stopped_in_order = random.below(2) == 0;
        expected = run.wanted.clone();
        if stopped_in_order {
            let (done, stopped) = flume::bounded(1);
            run.handle.to_keeper.send(ToKeeper::Stop { done }).unwrap();
            while !stopped.is_disconnected() && stopped.is_empty() {
                (0..usize::from(cores)).for_each(|nth| run.hear(nth));
            }
            assert!(stopped.recv().unwrap());
            for nth in 0..usize::from(cores) {
                run.cores[nth].log.clean().unwrap();
                run.write(nth, false);
            }
            // Snapshots asked for relocations and the like may have moved messages, never changed which are wanted.
        } else {
            for nth in 0..usize::from(cores) {
                // Never acknowledged, so it may be lost: only its first block arrives, which may be all of it.
                let vshard = run.own(nth).first().copied();
                if let Some(vshard) = vshard
                    && random.below(2) == 0
                {
                    run.publish(nth, vshard);
                    if !run.write(nth, true) {
                        expected[usize::from(vshard)].clone_from(&run.wanted[usize::from(vshard)]);
                    }
                }
            }
        }
        totals.checkpoints += run.checkpoints;
        totals.relocated += run.cores.iter().map(|core| core.relocated).sum::<u64>();
        totals.refused += run.cores.iter().map(|core| core.refused).sum::<u64>();
        totals.written += run.cores.iter().map(|core| core.log.appended().0).sum::<u64>();
        let KeeperHandle { to_keeper, from_keeper, thread, .. } = run.handle;
        drop((to_keeper, from_keeper));
        thread.join().unwrap_or_else(|_| panic!("the keeper panicked in run {run_number} of seed {seed}"));
        if random.below(3) == 0 {
            totals.damaged += u64::from(damage_newest_checkpoint(&store));
        }
    }
    totals
}

/// As if the power had gone while it was written. The older one must do, with all of the log that it needs.
fn damage_newest_checkpoint(store: &Store) -> bool {
    let files = disk::checkpoint_paths(&store.ckpt_dir()).into_iter().filter_map(|path| {
        let checkpoint = Checkpoint::decode(&std::fs::read(&path).ok()?).ok()?;
        Some((checkpoint.number, path))
    });
    // One that was damaged in the run before, and not yet written over, would leave none.
    let mut files: Vec<_> = files.collect();
    files.sort_unstable();
    let [_, (_, newest)] = &files[..] else { return false };
    let file = std::fs::OpenOptions::new().write(true).open(newest).unwrap();
    file.write_all_at(&[0xff; 8], 16).unwrap();
    true
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    dir
}

#[test]
fn what_is_wanted_survives_every_restart_and_nothing_else_stays() {
    let mut all = Totals::default();
    for seed in 1..=4 {
        let dir = scratch(&format!("generations-{seed}"));
        let totals = generations(&dir, seed, 8, 150, 0);
        std::fs::remove_dir_all(dir).unwrap();
        all.checkpoints += totals.checkpoints;
        all.relocated += totals.relocated;
        all.written += totals.written;
        all.damaged += totals.damaged;
        all.slots_max = all.slots_max.max(totals.slots_max);
    }
    println!("{all:?}");
    assert!(all.checkpoints > 50 && all.relocated > 50 && all.damaged > 3, "{all:?}");
    // Far more was written than was ever kept: slots went round.
    assert!(all.written > 3 * ((all.slots_max as u64) << 20), "{all:?}");
}

#[test]
fn a_quota_is_kept_and_nothing_is_lost_by_it() {
    let dir = scratch("generations-quota");
    let slots = 18;
    let totals = generations(&dir, 5, 8, 250, slots << 20);
    std::fs::remove_dir_all(dir).unwrap();
    println!("{totals:?}");
    // A start may take two segments for each of up to three cores beyond the quota, and some runs here end before two
    // checkpoints could free what the run before took.
    assert!(totals.slots_max as u64 <= slots + 4 * 6 && totals.refused > 0, "{totals:?}");
}
