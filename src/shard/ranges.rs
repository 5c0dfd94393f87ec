//! A set of sequences kept as disjoint inclusive ranges: what a subscription has finished above its floor.

use std::collections::BTreeMap;

use crate::types::Seq;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// first -> last; ranges neither overlap nor touch.
    map: BTreeMap<u64, u64>,
}

impl Ranges {
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn contains(&self, seq: Seq) -> bool {
        self.map.range(..=seq.0).next_back().is_some_and(|(_, last)| *last >= seq.0)
    }

    pub fn insert(&mut self, seq: Seq) {
        self.insert_range(seq, seq);
    }

    /// Adds `first..=last`, joining what it touches.
    pub fn insert_range(&mut self, first: Seq, last: Seq) {
        assert!(first <= last);
        let (mut first, mut last) = (first.0, last.0);
        if let Some((&f, &l)) = self.map.range(..=first).next_back() {
            if l >= last {
                return;
            }
            if l.saturating_add(1) >= first {
                first = f;
            }
        }
        while let Some((&f, &l)) = self.map.range(first..=last.saturating_add(1)).next() {
            last = last.max(l);
            self.map.remove(&f);
        }
        self.map.insert(first, last);
    }

    /// Removes everything below `floor`.
    pub fn trim_below(&mut self, floor: Seq) {
        while let Some(entry) = self.map.first_entry() {
            let (first, last) = (*entry.key(), *entry.get());
            if first >= floor.0 {
                break;
            }
            entry.remove();
            if last >= floor.0 {
                self.map.insert(floor.0, last);
                break;
            }
        }
    }

    /// Forgets the lowest ranges beyond `max` of them.
    pub fn keep_newest(&mut self, max: usize) {
        while self.map.len() > max {
            self.map.pop_first();
        }
    }

    /// The first sequence at or after `from` that is not in the set.
    pub fn first_gap(&self, from: Seq) -> Seq {
        match self.map.range(..=from.0).next_back() {
            Some((_, &last)) if last >= from.0 => Seq(last + 1),
            _ => from,
        }
    }

    pub fn clear(&mut self) {
        self.map.clear();
    }

    pub fn iter(&self) -> impl Iterator<Item = (Seq, Seq)> + '_ {
        self.map.iter().map(|(first, last)| (Seq(*first), Seq(*last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(ops in prop::collection::vec((1u64..60, 0u64..6, any::<bool>()), 0..40)) {
            let mut ranges = Ranges::default();
            let mut plain = BTreeSet::new();
            for (first, more, trim) in ops {
                if trim {
                    ranges.trim_below(Seq(first));
                    plain = plain.split_off(&first);
                } else {
                    ranges.insert_range(Seq(first), Seq(first + more));
                    plain.extend(first..=first + more);
                }
                for seq in 0..70 {
                    prop_assert_eq!(ranges.contains(Seq(seq)), plain.contains(&seq));
                    let gap = (seq..).find(|s| !plain.contains(s)).unwrap();
                    prop_assert_eq!(ranges.first_gap(Seq(seq)), Seq(gap));
                }
                let list: Vec<_> = ranges.iter().collect();
                prop_assert!(list.windows(2).all(|w| w[0].1.0 + 1 < w[1].0.0));
            }
        }
    }
}
