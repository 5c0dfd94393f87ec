//! Which slots are in use, for whom, and when one may be used again. Pure.
//!
//! Owns: the life of every slot. Never: touches a file, reads a clock, draws a salt.
//! Neighbours: `keeper` makes, grants and deletes what this decides; `checkpoint` carries the list this plans.
//!
//! ```text
//! free -> granted (core, salt) -> in use (stream, sequence, salt) -> not listed by one checkpoint -> by two -> free
//! ```
//!
//! A checkpoint lists a slot in use while some core still refers to a message in it, or while its frames are not all below
//! what that checkpoint covers; and then all later segments of the same stream, since recovery walks a stream from its first
//! listed segment to its end and takes a gap for a loss. So streams are freed oldest first, and leftovers at the beginning of
//! one are worth moving. Recovery may fall back to the older of the two checkpoints: a slot is free only when neither of them
//! lists it (DURABILITY 2.6).

use std::collections::{BTreeMap, BTreeSet};

use super::format::Segment;
use crate::planted::planted;
use crate::types::{CoreId, Lsn, Slot, StreamId};

/// What one core still refers to in one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Live {
    pub records: u32,
    pub bytes: u64,
}

/// What the segments know after one core's snapshot.
#[derive(Clone, Debug)]
pub struct CoreReport {
    pub core: CoreId,
    /// The snapshot holds everything of the core's stream below this.
    pub covered: Lsn,
    /// Every slot with at least one live message, whichever stream wrote it.
    pub live: Vec<(Slot, Live)>,
    /// The segments of the core's own stream that have begun: at least those since its last report; naming older ones again,
    /// even freed ones, does no harm.
    pub begun: Vec<Segment>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Handed to a core that has not been heard to have begun it.
    Granted {
        core: CoreId,
        salt: u64,
    },
    /// `unlisted`: checkpoints in a row that did not list it.
    InUse {
        by: Segment,
        unlisted: u8,
    },
    /// Its header could not be read at recovery: nothing can refer to it, but nobody knows what it held.
    Unknown {
        unlisted: u8,
    },
}

/// The bounds of what is decided here.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub segment_size: u32,
    /// Slots the quota allows in all; `None`: as many as the disk holds.
    pub slots_max: Option<usize>,
}

/// Segments are worth emptying when at most this share of them is live: what is written is a third of what is gained.
const RELOCATE_PERCENT: u64 = 25;
/// The same while space is short: as much is written as is gained.
const RELOCATE_PERCENT_SHORT: u64 = 50;
/// Sealed slots below which leftovers may stay: they cost little disk, moving them costs writes.
const RELOCATE_ABOVE: usize = 4;
/// Checkpoints until a core is asked again to empty a slot that it left something in.
const RELOCATE_AGAIN_AFTER: u64 = 60;
/// Slots being emptied at one time.
const RELOCATIONS_MAX: usize = 2;
/// Checkpoints that must not list a slot before it is free: both files recovery may start from.
pub(super) const UNLISTED_MIN: u8 = 2;

#[derive(Debug)]
pub struct Segments {
    policy: Policy,
    incarnation: u64,
    slots: BTreeMap<Slot, State>,
    /// By core number: what its newest snapshot covers, and refers to.
    covered: Vec<Lsn>,
    live: Vec<BTreeMap<Slot, Live>>,
    /// Slots being emptied, and the cores that have not answered.
    relocating: BTreeMap<Slot, BTreeSet<CoreId>>,
    /// When a slot was last asked to be emptied, by checkpoint count.
    asked: BTreeMap<Slot, u64>,
    checkpoints: u64,
}

impl Segments {
    pub fn new(policy: Policy, incarnation: u64, cores: u16) -> Segments {
        Segments {
            policy,
            incarnation,
            slots: BTreeMap::new(),
            covered: vec![Lsn(0); usize::from(cores)],
            live: vec![BTreeMap::new(); usize::from(cores)],
            relocating: BTreeMap::new(),
            asked: BTreeMap::new(),
            checkpoints: 0,
        }
    }

    /// A slot that exists and holds nothing anyone could need.
    pub fn add_free(&mut self, slot: Slot) {
        let before = self.slots.insert(slot, State::Free);
        assert!(before.is_none(), "{slot:?} was there already: {before:?}");
    }

    /// A slot found at recovery with an earlier stream's segment. Free after two checkpoints that do not list it.
    pub fn add_recovered(&mut self, by: Segment) {
        let before = self.slots.insert(by.slot, State::InUse { by, unlisted: 0 });
        assert!(before.is_none(), "{:?} was there already: {before:?}", by.slot);
    }

    /// A slot found at recovery without a readable header.
    pub fn add_unknown(&mut self, slot: Slot) {
        let before = self.slots.insert(slot, State::Unknown { unlisted: 0 });
        assert!(before.is_none(), "{slot:?} was there already: {before:?}");
    }

    /// Hands a free slot to `core`. `salt`: fresh random bits, so that no earlier use of the slot can be taken for this one.
    pub fn grant(&mut self, core: CoreId, salt: u64) -> Option<Slot> {
        assert!(usize::from(core.0) < self.covered.len(), "no such core: {core:?}");
        let (&slot, state) = self.slots.iter_mut().find(|(_, state)| **state == State::Free)?;
        *state = State::Granted { core, salt };
        Some(slot)
    }

    /// Takes over what a core's snapshot says. Reports of slots that have been freed since are recognised by their salt.
    pub fn report(&mut self, report: CoreReport) {
        let CoreReport { core, covered, live, begun } = report;
        let index = usize::from(core.0);
        assert!(covered >= self.covered[index], "{core:?} covers {covered}, before {}", self.covered[index]);
        self.covered[index] = covered;
        self.live[index] = live.into_iter().filter(|(_, live)| live.records > 0).collect();
        for by in begun {
            if let Some(state) = self.slots.get_mut(&by.slot)
                && *state == (State::Granted { core, salt: by.salt })
            {
                *state = State::InUse { by, unlisted: 0 };
            }
        }
    }

    /// The slots the next checkpoint must list. Valid if every core has reported in this run.
    pub fn to_list(&self) -> Vec<Segment> {
        let listed = |by: &&Segment| !planted!(GapsInStream) || self.is_needed(by);
        self.streams().values().flat_map(|segments| self.needed_end(segments)).filter(listed).copied().collect()
    }

    /// The segments in use, by stream, in order.
    fn streams(&self) -> BTreeMap<StreamId, Vec<Segment>> {
        let mut streams: BTreeMap<StreamId, Vec<Segment>> = BTreeMap::new();
        for state in self.slots.values() {
            if let State::InUse { by, .. } = state {
                streams.entry(by.stream).or_default().push(*by);
            }
        }
        for segments in streams.values_mut() {
            segments.sort_unstable_by_key(|by| by.sequence);
        }
        streams
    }

    /// Of one stream's segments those from the first that is needed on.
    fn needed_end<'a>(&self, segments: &'a [Segment]) -> &'a [Segment] {
        let first = segments.iter().position(|by| self.is_needed(by)).unwrap_or(segments.len());
        &segments[first..]
    }

    fn is_needed(&self, by: &Segment) -> bool {
        !self.is_covered(by) || (self.live_in(by.slot).records > 0 && !planted!(FreeWithLive))
    }

    /// Whether a snapshot taken by now holds all of this segment. Earlier runs' streams are in every snapshot of this one.
    fn is_covered(&self, by: &Segment) -> bool {
        by.stream.incarnation != self.incarnation || {
            let covered = self.covered[usize::from(by.stream.core)];
            let end = if planted!(FreeUncovered) { by.sequence } else { by.sequence + 1 };
            end.saturating_mul(u64::from(self.policy.segment_size)) <= covered.0
        }
    }

    /// What all cores together refer to in a slot.
    pub fn live_in(&self, slot: Slot) -> Live {
        self.live.iter().filter_map(|core| core.get(&slot)).fold(Live::default(), |sum, live| Live {
            records: sum.records.saturating_add(live.records),
            bytes: sum.bytes.saturating_add(live.bytes),
        })
    }

    /// A checkpoint with exactly this list is durable. Returns the slots that this frees.
    pub fn checkpoint_written(&mut self, listed: &[Segment]) -> Vec<Slot> {
        self.checkpoints += 1;
        // What has begun since the list was planned is needed too, though this checkpoint does not know it.
        let listed: BTreeSet<Slot> = listed.iter().chain(&self.to_list()).map(|by| by.slot).collect();
        let mut freed = Vec::new();
        for (&slot, state) in &mut self.slots {
            let unlisted = match state {
                State::InUse { unlisted, .. } | State::Unknown { unlisted } => unlisted,
                State::Free | State::Granted { .. } => continue,
            };
            *unlisted = if listed.contains(&slot) { 0 } else { *unlisted + 1 };
            if *unlisted >= if planted!(FreeAfterOne) { 1 } else { UNLISTED_MIN } {
                *state = State::Free;
                freed.push(slot);
            }
        }
        for slot in &freed {
            let dead = self.live_in(*slot) == Live::default() || planted!(FreeWithLive);
            assert!(dead, "{slot:?} is freed, but has live messages");
            self.relocating.remove(slot);
            self.asked.remove(slot);
        }
        freed
    }

    /// Slots whose leftovers are to be moved now, oldest first, and the cores that have some there.
    pub fn relocations(&mut self, space_short: bool) -> Vec<(Slot, Vec<CoreId>)> {
        let percent = if space_short { RELOCATE_PERCENT_SHORT } else { RELOCATE_PERCENT };
        let sealed =
            self.slots.values().filter(|state| matches!(state, State::InUse { by, .. } if self.is_covered(by)));
        if sealed.count() <= RELOCATE_ABOVE + self.covered.len() && !space_short {
            return Vec::new();
        }
        let mut out = Vec::new();
        for segments in self.streams().values() {
            for by in self.worth_moving(segments, percent) {
                let slot = by.slot;
                let asked = self.asked.get(&slot).is_some_and(|at| self.checkpoints < at + RELOCATE_AGAIN_AFTER);
                if self.relocating.len() >= RELOCATIONS_MAX {
                    return out;
                }
                if self.live_in(slot).records == 0 || asked {
                    continue;
                }
                let cores: Vec<CoreId> = (0u16..)
                    .zip(&self.live)
                    .filter_map(|(core, live)| live.contains_key(&slot).then_some(CoreId(core)))
                    .collect();
                self.relocating.insert(slot, cores.iter().copied().collect());
                self.asked.insert(slot, self.checkpoints);
                out.push((slot, cores));
            }
        }
        out
    }

    /// The longest beginning of what is left of a stream that frees at least four times (twice, if space is short) the bytes
    /// that moving its messages writes. Empty segments behind the messages count: they wait for them.
    fn worth_moving<'a>(&self, segments: &'a [Segment], percent: u64) -> &'a [Segment] {
        let left = self.needed_end(segments);
        let (mut live, mut frees, mut worth) = (0, 0, 0);
        for (nth, by) in left.iter().enumerate().take_while(|(_, by)| self.is_covered(by)) {
            live += self.live_in(by.slot).bytes;
            frees += u64::from(self.policy.segment_size);
            if live * 100 <= frees * percent {
                worth = nth + 1;
            }
        }
        &left[..worth]
    }

    /// A core has moved what it could. Its next snapshot says what is left.
    pub fn relocated(&mut self, core: CoreId, slot: Slot) {
        if let Some(waiting) = self.relocating.get_mut(&slot) {
            waiting.remove(&core);
            if waiting.is_empty() {
                self.relocating.remove(&slot);
            }
        }
    }

    /// A number no slot has, if the quota lets another one be made.
    pub fn slot_to_make(&self) -> Option<Slot> {
        let full = self.policy.slots_max.is_some_and(|max| self.slots.len() >= max);
        if full { None } else { self.unused_number() }
    }

    /// A number no slot has, whatever the quota says.
    pub fn unused_number(&self) -> Option<Slot> {
        (0..).map(Slot).find(|slot| !self.slots.contains_key(slot))
    }

    /// A free slot, the highest number first, if there are more than `keep`; it is forgotten here and to be deleted.
    pub fn take_surplus(&mut self, keep: usize) -> Option<Slot> {
        if self.free() > keep { self.take_free() } else { None }
    }

    /// The same, however few there are.
    pub fn take_free(&mut self) -> Option<Slot> {
        let (&slot, _) = self.slots.iter().rev().find(|(_, state)| **state == State::Free)?;
        self.slots.remove(&slot);
        Some(slot)
    }

    /// Slots ready to be granted.
    pub fn free(&self) -> usize {
        self.slots.values().filter(|state| **state == State::Free).count()
    }

    /// Slots that hold, or are about to hold, a part of the log.
    pub fn used(&self) -> usize {
        self.slots.len() - self.free()
    }

    /// All slots there are.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Slots in use that only wait for the next checkpoint or two.
    pub fn releasable(&self) -> usize {
        let waits = |state: &&State| matches!(state, State::InUse { .. } | State::Unknown { .. });
        self.slots.values().filter(waits).count() - self.to_list().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const POLICY: Policy = Policy { segment_size: SIZE as u32, slots_max: None };

    fn segments(cores: u16) -> Segments {
        Segments::new(POLICY, 7, cores)
    }

    fn report(core: u16, covered: u64, live: &[(u32, u32, u64)], begun: &[(u32, u64, u64)]) -> CoreReport {
        let live = live.iter().map(|&(slot, records, bytes)| (Slot(slot), Live { records, bytes })).collect();
        let stream = StreamId { incarnation: 7, core };
        let begun =
            begun.iter().map(|&(slot, sequence, salt)| Segment { stream, sequence, slot: Slot(slot), salt }).collect();
        CoreReport { core: CoreId(core), covered: Lsn(covered), live, begun }
    }

    fn checkpoint(segments: &mut Segments) -> Vec<Slot> {
        let listed = segments.to_list();
        segments.checkpoint_written(&listed)
    }

    fn old(slot: u32, sequence: u64) -> Segment {
        Segment { stream: StreamId { incarnation: 6, core: 0 }, sequence, slot: Slot(slot), salt: 100 + sequence }
    }

    #[test]
    fn a_slot_is_free_after_two_checkpoints_that_do_not_list_it() {
        let mut segments = segments(1);
        segments.add_free(Slot(0));
        let slot = segments.grant(CoreId(0), 11).unwrap();
        assert_eq!(segments.grant(CoreId(0), 12), None);
        // Granted, never begun: no number of checkpoints frees it.
        segments.report(report(0, 0, &[], &[]));
        assert!(checkpoint(&mut segments).is_empty() && checkpoint(&mut segments).is_empty());
        // Begun, not covered.
        segments.report(report(0, SIZE - 1, &[], &[(0, 0, 11)]));
        assert_eq!(segments.to_list().len(), 1);
        assert!(checkpoint(&mut segments).is_empty());
        // Covered, but with a live message.
        segments.report(report(0, SIZE, &[(0, 1, 50)], &[(0, 0, 11)]));
        assert_eq!(segments.to_list().len(), 1);
        assert!(checkpoint(&mut segments).is_empty() && checkpoint(&mut segments).is_empty());
        segments.report(report(0, SIZE, &[], &[(0, 0, 11)]));
        assert_eq!((segments.to_list().len(), segments.releasable()), (0, 1));
        assert_eq!(checkpoint(&mut segments), []);
        assert_eq!(checkpoint(&mut segments), [slot]);
        assert_eq!((segments.free(), segments.used()), (1, 0));
    }

    #[test]
    fn a_report_about_an_earlier_use_changes_nothing() {
        let mut segments = segments(1);
        segments.add_free(Slot(0));
        segments.grant(CoreId(0), 11);
        segments.report(report(0, SIZE, &[], &[(0, 0, 11)]));
        checkpoint(&mut segments);
        assert_eq!(checkpoint(&mut segments), [Slot(0)]);
        segments.grant(CoreId(0), 12);
        // The core still lists the old use beside nothing new: the new grant stays a grant.
        segments.report(report(0, SIZE, &[], &[(0, 0, 11)]));
        assert!(segments.to_list().is_empty());
        assert!(checkpoint(&mut segments).is_empty() && checkpoint(&mut segments).is_empty());
        segments.report(report(0, SIZE, &[], &[(0, 0, 11), (0, 1, 12)]));
        let stream = StreamId { incarnation: 7, core: 0 };
        assert_eq!(segments.to_list(), [Segment { stream, sequence: 1, slot: Slot(0), salt: 12 }]);
    }

    #[test]
    fn any_core_keeps_an_old_segment_alive() {
        let mut segments = segments(2);
        segments.add_recovered(old(3, 0));
        segments.report(report(0, 0, &[], &[]));
        segments.report(report(1, 0, &[(3, 2, 10)], &[]));
        assert_eq!(segments.to_list(), [old(3, 0)]);
        checkpoint(&mut segments);
        segments.report(report(1, 0, &[], &[]));
        checkpoint(&mut segments);
        assert_eq!(checkpoint(&mut segments), [Slot(3)]);
    }

    #[test]
    fn a_stream_is_freed_from_its_beginning() {
        let mut segments = segments(1);
        for n in 0..4u32 {
            segments.add_recovered(old(n, u64::from(n)));
        }
        let listed = |segments: &Segments| segments.to_list().iter().map(|by| by.sequence).collect::<Vec<u64>>();
        segments.report(report(0, 0, &[(1, 1, 10)], &[]));
        // 2 and 3 are empty, but recovery would walk from 1 to the stream's end.
        assert_eq!((listed(&segments), segments.releasable()), (vec![1, 2, 3], 1));
        segments.report(report(0, 0, &[(3, 1, 10)], &[]));
        assert_eq!(listed(&segments), [3]);
        segments.report(report(0, 0, &[], &[]));
        assert!(listed(&segments).is_empty());
    }

    #[test]
    fn leftovers_are_moved_oldest_first_and_only_when_it_pays() {
        let mut segments = segments(1);
        let quarter = SIZE / 4;
        for n in 0..8u32 {
            segments.add_recovered(old(n, u64::from(7 - n)));
        }
        let moves = |segments: &mut Segments, short| {
            segments.relocations(short).into_iter().map(|(slot, _)| slot.0).collect::<Vec<u32>>()
        };
        // 7 is the oldest, 0 the youngest. 6 alone is too full, the empty 5 behind it makes up for that; 3 and 2 do not pay.
        let live =
            [(7, 1, quarter), (6, 9, quarter * 3 / 2), (4, 1, quarter), (3, 1, SIZE / 2), (2, 1, SIZE), (0, 1, SIZE)];
        segments.report(report(0, 0, &live, &[]));
        assert_eq!(moves(&mut segments, false), [7, 6]);
        assert!(moves(&mut segments, false).is_empty(), "two at a time");
        segments.relocated(CoreId(0), Slot(7));
        // 7 could not be emptied: it is not asked for again at once.
        assert_eq!(moves(&mut segments, false), [4]);
        segments.relocated(CoreId(0), Slot(6));
        segments.relocated(CoreId(0), Slot(4));
        assert!(moves(&mut segments, false).is_empty());
        assert_eq!(moves(&mut segments, true), [3, 2], "what is half full is worth it when space is short");
    }

    #[test]
    fn few_segments_are_left_alone() {
        let mut segments = segments(1);
        for n in 0..5u32 {
            segments.add_recovered(old(n, u64::from(n)));
        }
        segments.report(report(0, 0, &[(0, 1, 10)], &[]));
        assert!(segments.relocations(false).is_empty());
        assert_eq!(segments.relocations(true), [(Slot(0), vec![CoreId(0)])]);
    }

    #[test]
    fn surplus_goes_spares_stay_and_the_quota_holds() {
        let policy = Policy { slots_max: Some(4), ..POLICY };
        let mut segments = Segments::new(policy, 7, 1);
        for n in 0..4 {
            assert_eq!(segments.slot_to_make(), Some(Slot(n)));
            segments.add_free(Slot(n));
        }
        assert_eq!(segments.slot_to_make(), None);
        assert_eq!(segments.take_surplus(2), Some(Slot(3)));
        assert_eq!(segments.take_surplus(2), Some(Slot(2)));
        assert_eq!(segments.take_surplus(2), None);
        assert_eq!(segments.slot_to_make(), Some(Slot(2)));
    }

    #[test]
    fn an_unreadable_slot_waits_for_two_checkpoints() {
        let mut segments = segments(1);
        segments.add_unknown(Slot(0));
        segments.report(report(0, 0, &[], &[]));
        assert!(segments.grant(CoreId(0), 1).is_none());
        assert_eq!(checkpoint(&mut segments), []);
        assert_eq!(checkpoint(&mut segments), [Slot(0)]);
        assert_eq!(segments.grant(CoreId(0), 1), Some(Slot(0)));
    }
}
