//! A start: recovery as `wal::start` does it, twice; then what `driver::boot` makes of it. And the verdict on a start from a disk
//! that does not hold what was written to it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use blipmq::driver::boot::{Replay, by_core};
use blipmq::limits::BLOCK;
use blipmq::shard::catalog::Catalog;
use blipmq::shard::effects::Effects;
use blipmq::shard::settings::Settings;
use blipmq::shard::{Parts, Shard, snapshot};
use blipmq::time::{Duration, Instant, Now, WallMs};
use blipmq::types::{ClientSubIds, CoreId, Lsn, Slot, StreamId, VShard};
use blipmq::wal::batch::{Grant, Log, LogConfig};
use blipmq::wal::commit::Commit;
use blipmq::wal::format::{FRAME_HEADER, FrameHeader, SUB_BATCH_HEADER, Segment, SubBatch, lsn};
use blipmq::wal::record::{Record, RecoveryNote};
use blipmq::wal::recovery::{ReadError, RecoveryError, Segments, StoreShape};
use blipmq::wal::start::{self, RecoveredStore, StartError};
use bytes::Bytes;

use super::keeper::Keeper;
use super::{Core, Damage, Happening, Held, HostMistake, Machine, Refused, STORE, StartReport};
use crate::message::MessageId;
use crate::sim::disk::{FileId, happens};

/// The slots as one start sees them.
struct View<'a> {
    slots: BTreeMap<u32, &'a [u8]>,
    /// A block that the disk does not give this time.
    bad: Option<(u32, usize)>,
}

impl Segments for View<'_> {
    fn slots(&self) -> Vec<Slot> {
        self.slots.keys().copied().map(Slot).collect()
    }

    fn read(&self, slot: Slot, offset: u32, len: u32) -> Result<Bytes, ReadError> {
        let range = offset as usize..offset as usize + len as usize;
        let bad = self.bad.is_some_and(|(bad, at)| bad == slot.0 && range.start < at + BLOCK && at < range.end);
        let bytes = self.slots.get(&slot.0).and_then(|bytes| bytes.get(range)).filter(|_| !bad);
        bytes.map(Bytes::copy_from_slice).ok_or_else(|| ReadError { slot, offset, len, reason: "EIO".to_owned() })
    }
}

/// All that a recovery brings about.
struct Found {
    store: RecoveredStore,
    catalogs: Vec<Catalog>,
    messages: BTreeSet<MessageId>,
}

impl Found {
    /// Recovering twice must come to the same.
    fn differs(&self, other: &Found) -> Option<&'static str> {
        let same = |(number, (a, b)): (u16, (&Catalog, &Catalog))| {
            let state = |catalog| snapshot::encode(catalog, VShard(number));
            state(a) == state(b) && a.usage().by_slot() == b.usage().by_slot()
        };
        if self.store != other.store {
            Some("what is known of the store")
        } else if self.messages != other.messages {
            Some("the messages")
        } else if !(0..).zip(self.catalogs.iter().zip(&other.catalogs)).all(same) {
            Some("the state of the virtual shards")
        } else {
            None
        }
    }
}

impl Machine {
    fn shape(&self) -> StoreShape {
        StoreShape { store: STORE, segment_size: self.plan.segment_size, vshards: self.plan.vshards }
    }

    fn recover(&self, view: &View<'_>, checkpoints: [Option<&[u8]>; 2]) -> Result<Found, StartError> {
        let replay = RefCell::new(Replay::new(self.plan.vshards, self.plan.settings.dedup_window));
        let mut messages = BTreeSet::new();
        let store = start::recover_from(
            &self.shape(),
            view,
            start::choose(checkpoints)?,
            &mut |checkpoint| replay.borrow_mut().load(checkpoint),
            &mut |entry| {
                messages.extend(message_in(&entry.record));
                replay.borrow_mut().visit(&entry);
            },
        )?;
        Ok(Found { store, catalogs: replay.into_inner().finish(), messages })
    }

    /// - `now`: the computer's clocks. Broker time is anchored here to `now.wall`, or to what the store has seen if that is later.
    ///
    /// An error with an undamaged disk is a mistake of the broker: `check` says so.
    pub fn start(&mut self, now: Now, cores: u16) -> Result<(), Refused> {
        assert!(!self.is_up(), "it runs already");
        assert!(cores > 0, "a broker has a core");
        self.wall = now.wall;
        let mut at = now.mono;
        // The slots' locks: nobody reads a slot while a dead process's writes can still land in it.
        if self.disk.has_late() {
            let lands = now.mono + Duration::from_millis(self.rng.between(0, 500));
            if self.plan.mistake == Some(HostMistake::SkipSlotLock) {
                self.schedule(lands, Happening::LateWrites);
            } else {
                self.disk.land_late();
                at = lands;
            }
        }
        let result = self.begin(Now { mono: at, wall: now.wall }, cores);
        if result.is_err() {
            self.happenings.clear();
        }
        result
    }

    fn begin(&mut self, now: Now, cores: u16) -> Result<(), Refused> {
        if happens(&mut self.rng, self.plan.faults.sync_eio) {
            self.disk.counts.sync_eio += 1;
            let slots: Vec<u32> = self.disk.slots().collect();
            slots.into_iter().for_each(|slot| self.disk.fail_sync(FileId::Slot(slot)));
            return Err(Refused::Unreadable("a sync before reading failed".to_owned()));
        }
        if self.plan.mistake != Some(HostMistake::SkipRecoverySync) {
            self.disk.sync_all();
        }
        let bad = self.unreadable_block()?;
        let found = {
            let view = self.view(bad);
            let files = [0, 1].map(|nth| self.disk.file(FileId::Checkpoint(nth)));
            let found = self.recover(&view, files);
            let again = self.recover(&view, files);
            match (&found, &again) {
                (Ok(one), Ok(two)) => {
                    if let Some(what) = one.differs(two) {
                        self.broken.replace(Some(format!("I8: two recoveries of the same bytes differ in {what}")));
                    }
                }
                (Err(one), Err(two)) if one.to_string() == two.to_string() => {}
                _ => drop(self.broken.replace(Some("I8: two recoveries of the same bytes end differently".to_owned()))),
            }
            found
        };
        let lost = self.judge(&found, bad.is_some());
        let Found { store, catalogs, messages } = match found {
            Ok(found) => found,
            Err(StartError::Recovery(RecoveryError::Read(error))) => {
                return Err(Refused::Unreadable(error.to_string()));
            }
            Err(error) => return Err(Refused::Corrupt(error.to_string())),
        };
        let mut keeper = Keeper::new(
            store.segments(Keeper::policy(self.plan.segment_size, self.plan.slots_max), cores),
            cores,
            store.incarnation,
            store.checkpoint_number,
            store.recovered.sealed.clone(),
            now.mono + self.plan.checkpoint_interval,
        );
        let grants = self.first_grants(now, &mut keeper)?;

        // From here on it is certain that the broker runs, on what it has found.
        self.disk.accept();
        for id in &lost {
            self.levels.remove(id);
        }
        for id in std::mem::take(&mut self.doubtful) {
            if messages.contains(&id) {
                self.levels.insert(id, Held::Synced);
            } else if self.levels.get(&id).is_some_and(|held| *held < Held::Synced) {
                self.levels.remove(&id);
            }
        }
        let cut = store.recovered.truncated;
        self.report = StartReport {
            incarnation: store.incarnation,
            truncated_frames: cut.frames,
            truncated_records: cut.records,
            fallbacks: store.fallbacks,
            lost_unwitnessed: self.lost_records,
            lost_messages: lost,
        };
        self.keeper = Some(keeper);
        self.open_cores(now, cores, &store, catalogs, &grants);
        Ok(())
    }

    fn open_cores(
        &mut self,
        now: Now,
        cores: u16,
        store: &RecoveredStore,
        catalogs: Vec<Catalog>,
        grants: &[Vec<Grant>],
    ) {
        let seen = store.recovered.time;
        self.clock = Some((now.mono, WallMs(now.wall.0.max(seen.0))));
        let broker_now = self.clock(now);
        let mut last_index = store.recovered.last_index.clone();
        last_index.resize(usize::from(self.plan.vshards), 0);
        let sub_ids = ClientSubIds::default();
        let segment_size = self.plan.segment_size;
        for ((catalog, grants), number) in by_core(catalogs, cores).into_iter().zip(grants).zip(0..) {
            let id = CoreId(number);
            let config = LogConfig {
                store: STORE,
                stream: StreamId { incarnation: store.incarnation, core: number },
                segment_size,
                last_index: last_index.clone(),
                opening: Some(store.recovered.note()),
            };
            let mut log = Log::new(config, grants[0]);
            grants[1..].iter().for_each(|grant| log.grant(*grant));
            let parts = Parts {
                settings: Settings { core: id, cores, vshards: self.plan.vshards, ..self.plan.settings.clone() },
                keys: self.keys.clone(),
                sub_ids: sub_ids.clone(),
                catalog,
                log,
                commit: Commit::new(self.plan.policy, Lsn(BLOCK as u64)),
            };
            let mut effects = Effects::new(cores);
            let mut shard = Shard::new(parts, broker_now, &mut effects);
            // How the streams before ended is on the disk before clients come.
            shard.force_sync();
            let rings = (0..cores).map(|_| VecDeque::new()).collect();
            self.cores.push(Core::new(id, shard, effects, rings));
        }
        for number in 0..self.cores.len() {
            self.cores[number].ticked = true;
            self.wake(now.mono, number);
        }
        self.set_keeper_alarm(now.mono);
        self.schedule_rot(now.mono);
    }

    fn view(&self, bad: Option<(u32, usize)>) -> View<'_> {
        let slots = self.disk.slots().filter_map(|slot| Some((slot, self.disk.file(FileId::Slot(slot))?)));
        View { slots: slots.collect(), bad }
    }

    /// A block that this start will not be able to read, or a checkpoint file.
    fn unreadable_block(&mut self) -> Result<Option<(u32, usize)>, Refused> {
        let slots: Vec<u32> = self.disk.slots().collect();
        if slots.is_empty() || !happens(&mut self.rng, self.plan.faults.read_eio) {
            return Ok(None);
        }
        self.disk.counts.read_eio += 1;
        if self.rng.percent(10) && self.disk.len(FileId::Checkpoint(0)).is_some() {
            return Err(Refused::Unreadable("a checkpoint file cannot be read".to_owned()));
        }
        let slot = *self.rng.pick(&slots);
        let blocks = u64::from(self.plan.segment_size) / BLOCK as u64;
        Ok(Some((slot, self.rng.between(0, blocks - 1) as usize * BLOCK)))
    }

    // ---- the verdict --------------------------------------------------------------------------------------------

    /// Whether what was found is what it had to be. Returns the messages that damage without a witness has cost.
    fn judge(&mut self, found: &Result<Found, StartError>, unreadable: bool) -> Vec<MessageId> {
        self.lost_records = 0;
        if !self.disk.is_damaged() {
            if let Err(error) = found
                && !(unreadable && matches!(error, StartError::Recovery(_)))
            {
                self.broken.replace(Some(format!("a start from a sound disk is refused: {error}")));
            }
            return Vec::new();
        }
        let right = self.disk.undamaged();
        let slots = right.iter().filter_map(|(id, bytes)| match id {
            FileId::Slot(slot) => Some((*slot, &bytes[..])),
            FileId::Checkpoint(_) => None,
        });
        let view = View { slots: slots.collect(), bad: None };
        let files = [0, 1].map(|nth| right.get(&FileId::Checkpoint(nth)).map(|bytes| &bytes[..]));
        let should = match self.recover(&view, files) {
            Ok(should) => should,
            Err(error) => {
                self.broken.replace(Some(format!("a start from the disk as it should be is refused: {error}")));
                return Vec::new();
            }
        };
        let Ok(found) = found else { return Vec::new() };
        let (is, was) = (&found.store.recovered.last_index, &should.store.recovered.last_index);
        if is.iter().zip(was).any(|(is, was)| is > was) {
            self.broken.replace(Some("a start found more than was ever written".to_owned()));
        }
        self.lost_records = is.iter().zip(was).map(|(is, was)| was.saturating_sub(*is)).sum();
        if self.lost_records == 0 {
            return Vec::new();
        }
        for sealed in &should.store.recovered.sealed {
            let end = found.store.recovered.sealed.iter().find(|found| found.stream == sealed.stream);
            let end = end.map_or(Lsn(0), |found| found.end);
            if end >= sealed.end {
                continue;
            }
            let witness = self.witness(&view, files, &should, sealed.stream);
            if witness > end {
                let stream = sealed.stream;
                self.broken.replace(Some(format!(
                    "I9: the log of stream {stream} is taken to end at {end}; a witness on the disk says that it was durable to {witness}"
                )));
            }
        }
        should.messages.difference(&found.messages).copied().collect()
    }

    /// How far what is left undamaged on the disk says that a stream was durable.
    fn witness(&self, right: &View<'_>, files: [Option<&[u8]>; 2], should: &Found, stream: StreamId) -> Lsn {
        let mut witness = Lsn(0);
        let segments = &should.store.recovered.live;
        for segment in segments.iter().filter(|segment| segment.stream.incarnation >= stream.incarnation) {
            let Some(bytes) = right.slots.get(&segment.slot.0) else { continue };
            let id = FileId::Slot(segment.slot.0);
            let frames = frames(bytes, segment, self.plan.segment_size);
            let first_end = frames.first().map_or(0, |(at, frame)| at + frame.padded_bytes() as usize);
            // Without header and first frame nobody knows what the slot holds.
            if !self.disk.is_sound(id, 0, BLOCK) && !self.disk.is_sound(id, BLOCK, first_end) {
                continue;
            }
            for (at, frame) in frames {
                if !self.disk.is_sound(id, at, at + frame.frame_bytes as usize) {
                    continue;
                }
                if segment.stream == stream {
                    witness = witness.max(frame.durable);
                } else if frame.lsn == Lsn(BLOCK as u64)
                    && let Some(note) = RecoveryNote::decode(&bytes[at + FRAME_HEADER..at + frame.frame_bytes as usize])
                {
                    let sealed = note.sealed.iter().filter(|sealed| sealed.stream == stream);
                    witness = sealed.fold(witness, |witness, sealed| witness.max(sealed.end));
                }
            }
        }
        if let Ok(checkpoints) = start::choose(files)
            && let Some(newest) = checkpoints.newest
        {
            let id = FileId::Checkpoint((newest.number % 2) as u8);
            if self.disk.is_sound(id, 0, self.disk.len(id).unwrap_or(0)) {
                let states = newest.streams.iter().filter(|state| state.stream == stream);
                witness = states.fold(witness, |witness, state| witness.max(state.durable));
            }
        }
        witness
    }

    /// Undoes what the disk has done to what it held. Only when off.
    pub fn repair(&mut self) -> Damage {
        assert!(!self.is_up(), "a running broker is not repaired");
        let sectors = self.disk.repair();
        let mut damage = Damage { sectors: sectors.len(), messages: Vec::new() };
        let slots: BTreeSet<u32> = sectors
            .iter()
            .filter_map(|(id, _)| match id {
                FileId::Slot(slot) => Some(*slot),
                FileId::Checkpoint(_) => None,
            })
            .collect();
        for slot in slots {
            let bytes = self.disk.file(FileId::Slot(slot)).unwrap_or_default();
            for at in (BLOCK..bytes.len()).step_by(BLOCK) {
                let Some((frame, _)) = FrameHeader::decode(&bytes[at..]) else { continue };
                let end = (at + frame.frame_bytes as usize).min(bytes.len());
                let hit = |(id, nth): &(FileId, usize)| {
                    let place = nth * crate::sim::disk::SECTOR;
                    *id == FileId::Slot(slot) && at < place + crate::sim::disk::SECTOR && place < end
                };
                if sectors.iter().any(hit) {
                    damage.messages.extend(messages_in_frame(&bytes[at..end]));
                }
            }
        }
        damage
    }

    /// Rot goes on while the broker runs.
    pub(super) fn schedule_rot(&mut self, now: Instant) {
        if self.plan.faults.rot > 0 {
            self.schedule(now + Duration::from_secs(1), Happening::Rot);
        }
    }
}

/// The whole headers of one segment's live frames, and where they are.
fn frames(bytes: &[u8], segment: &Segment, segment_size: u32) -> Vec<(usize, FrameHeader)> {
    let live = |at: usize| {
        let (frame, _) = FrameHeader::decode(&bytes[at..])?;
        let same = (frame.stream, frame.sequence, frame.salt) == (segment.stream, segment.sequence, segment.salt);
        let fits = at + frame.padded_bytes() as usize <= bytes.len();
        (same && fits && frame.lsn == lsn(segment.sequence, segment_size, at as u32)).then_some((at, frame))
    };
    (BLOCK..bytes.len()).step_by(BLOCK).filter_map(live).collect()
}

pub(super) fn message_in(record: &Record<'_>) -> Option<MessageId> {
    match record {
        Record::Published(published) | Record::Relocated(published) => MessageId::decode(published.payload),
        _ => None,
    }
}

/// The messages in one frame, header included.
pub(super) fn messages_in_frame(frame: &[u8]) -> Vec<MessageId> {
    let mut messages = Vec::new();
    let Some((header, _)) = FrameHeader::decode(frame) else { return messages };
    let (mut at, mut left) = (FRAME_HEADER, header.records);
    while left > 0 {
        let Some(sub) = frame.get(at..).and_then(SubBatch::decode) else { break };
        at += SUB_BATCH_HEADER;
        left = left.saturating_sub(sub.records.max(1));
        for _ in 0..sub.records {
            let Some(Ok((record, used))) = frame.get(at..).map(Record::decode) else { return messages };
            messages.extend(message_in(&record));
            at += used;
        }
    }
    messages
}
