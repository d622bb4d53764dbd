//! What a server said of the extents of its disk, for as long as the disk is open.
//!
//! Several threads look at several places, so a few answers are kept; what does not fit of one is asked
//! again when it is wanted.
use formats::nbd::client::Event;
use formats::nbd::wire::state;
use std::collections::VecDeque;

/// Answers that are kept.
const ANSWERS_MAX: usize = 4;
/// Runs of one answer that are kept: 16 bytes each.
const RUNS_MAX: usize = 1 << 16;

/// The newest answers, the newest last.
#[derive(Debug, Default)]
pub(super) struct Known(VecDeque<Answer>);

#[derive(Debug)]
struct Answer {
    start: u64,
    /// The end of each run, and whether it reads as zeroes. Neighbours differ.
    runs: Vec<(u64, bool)>,
}

impl Known {
    /// Makes room for the answer to a question about the bytes from `start` on.
    pub fn forget_oldest(&mut self, start: u64) {
        if self.0.len() == ANSWERS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Answer { start, runs: Vec::new() });
    }

    /// Takes in what belongs to the newest answer.
    pub fn add(&mut self, event: &Event<'_>) {
        let (Event::Extent { range, state, .. }, Some(answer)) = (event, self.0.back_mut()) else { return };
        // A hole of which nobody says that it reads as zeroes may read as anything.
        let zero = state & state::ZERO != 0;
        match answer.runs.last_mut() {
            Some((end, like)) if *like == zero && *end == range.start => *end = range.end,
            last => {
                let end = last.map_or(answer.start, |(end, _)| *end);
                // Behind a run that was left out nothing more is kept.
                if end == range.start && answer.runs.len() < RUNS_MAX {
                    answer.runs.push((range.end, zero));
                }
            }
        }
    }

    /// Whether the byte at `at` reads as zero, and up to where it goes on like that at least.
    pub fn find(&self, at: u64) -> Option<(bool, u64)> {
        let of = |answer: &Answer| {
            let number = answer.runs.partition_point(|(end, _)| *end <= at);
            let (end, zero) = *answer.runs.get(number).filter(|_| answer.start <= at)?;
            Some((zero, end))
        };
        self.0.iter().rev().find_map(of)
    }
}

#[cfg(test)]
mod tests {
    use super::{ANSWERS_MAX, Known, RUNS_MAX};
    use formats::nbd::client::Event;
    use formats::range::ByteRange;

    fn said(known: &mut Known, start: u64, end: u64, state: u32) {
        known.add(&Event::Extent { cookie: 0, range: ByteRange { start, end }, state });
    }

    #[test]
    fn neighbours_that_read_alike_are_one_run() {
        let mut known = Known::default();
        assert_eq!(known.find(0), None);
        known.forget_oldest(100);
        for (start, end, state) in [(100, 200, 3), (200, 300, 2), (300, 400, 1), (400, 500, 0), (500, 600, 3)] {
            said(&mut known, start, end, state);
        }
        for (at, found) in [(99, None), (100, Some((true, 300))), (299, Some((true, 300)))] {
            assert_eq!(known.find(at), found, "{at}");
        }
        for (at, found) in [(300, Some((false, 500))), (599, Some((true, 600))), (600, None)] {
            assert_eq!(known.find(at), found, "{at}");
        }
    }

    #[test]
    fn what_does_not_fit_is_not_known() {
        let mut known = Known::default();
        known.forget_oldest(0);
        let runs = RUNS_MAX as u64;
        (0..runs + 2).for_each(|n| said(&mut known, n, n + 1, if n % 2 == 0 { 2 } else { 0 }));
        assert_eq!((known.find(runs - 1), known.find(runs)), (Some((false, runs)), None));
        for number in 1..=ANSWERS_MAX as u64 {
            known.forget_oldest(number << 40);
            said(&mut known, number << 40, (number << 40) + 1, 2);
        }
        assert_eq!((known.find(0), known.find(1 << 40)), (None, Some((true, (1 << 40) + 1))));
    }
}
