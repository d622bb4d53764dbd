//! What could not be brought over, and was not since: ranges of the disk.
//!
//! All of it is marked or claimed as well. It is noted apart, for a job is not ready while something of it is left, and
//! a target that was backed off from is tried with it first: that other chunks can be brought says nothing of these.
use formats::range::ByteRange;
use std::collections::BTreeMap;

/// How many ranges are noted. Of more it is only known that they are there, until nothing is marked any more.
const RANGES_MAX: usize = 4096;

/// Ranges that neither overlap nor touch, by their starts.
#[derive(Debug, Default)]
pub(super) struct Missed {
    ranges: BTreeMap<u64, u64>,
    more: bool,
}

impl Missed {
    /// It could not be brought over.
    pub fn add(&mut self, ByteRange { mut start, mut end }: ByteRange) {
        while let Some((&first, &last)) = self.ranges.range(..=end).next_back()
            && last >= start
        {
            self.ranges.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        match self.ranges.len() < RANGES_MAX {
            true => drop(self.ranges.insert(start, end)),
            false => self.more = true,
        }
    }

    /// It was brought over. True where some of it had not been before.
    pub fn remove(&mut self, range: ByteRange) -> bool {
        let mut found = false;
        while let Some((&start, &end)) = self.ranges.range(..range.end).next_back()
            && end > range.start
        {
            found = true;
            self.ranges.remove(&start);
            if start < range.start {
                self.ranges.insert(start, range.start);
            }
            if end > range.end {
                self.ranges.insert(range.end, end);
            }
        }
        found
    }

    /// The first of them.
    pub fn first(&self) -> Option<ByteRange> {
        self.ranges.iter().next().map(|(&start, &end)| ByteRange { start, end })
    }

    /// How many bytes they are; not 0 where some are not noted.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum::<u64>().max(u64::from(self.more))
    }
}

#[cfg(test)]
mod tests {
    use super::{Missed, RANGES_MAX};
    use formats::range::ByteRange;
    use std::collections::BTreeSet;

    /// Against a set of numbers.
    #[test]
    fn what_was_missed_is_what_was_not_brought_since() {
        let (mut missed, mut model) = (Missed::default(), BTreeSet::new());
        let mut number = 7u64;
        for _ in 0..5000 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = (number >> 40) % 60;
            let range = ByteRange { start, end: start + 1 + (number >> 50) % 9 };
            if number >> 63 == 0 {
                missed.add(range);
                model.extend(range.start..range.end);
            } else {
                let before = model.len();
                model.retain(|byte| !(range.start..range.end).contains(byte));
                assert_eq!(missed.remove(range), model.len() < before, "{range}");
            }
            assert_eq!(missed.len(), model.len() as u64);
            assert_eq!(missed.first().map(|range| range.start), model.first().copied());
            let mut ends = missed.ranges.iter().zip(missed.ranges.iter().skip(1));
            assert!(ends.all(|((_, end), (start, _))| end < start), "{missed:?}");
        }
    }

    #[test]
    fn more_than_can_be_noted_is_not_forgotten() {
        let mut missed = Missed::default();
        let range = |number: u64| ByteRange { start: 2 * number, end: 2 * number + 1 };
        (0..=RANGES_MAX as u64).for_each(|number| missed.add(range(number)));
        (0..=RANGES_MAX as u64).for_each(|number| _ = missed.remove(range(number)));
        assert_eq!((missed.len(), missed.first()), (1, None));
    }
}
