//! How fast a job has been lately, when it may be ready, and how far its target is behind.
//!
//! It is told counters and the time, and answers from what it remembers of them. Everything it says is of the
//! past: of the future it gives a band, from the slowest to the fastest second that it remembers.
use crate::rate::per_second;
use std::collections::VecDeque;
use std::time::Duration;

/// How far two notes are apart at least.
const EVERY: Duration = Duration::from_millis(100);
/// How many are kept; the older half is thinned out when there are more, for it is looked at for long lags alone.
const NOTES_MAX: usize = 256;
/// Over how long rates are measured, and over how long at least.
const LATELY: Duration = Duration::from_secs(5);
const LATELY_MIN: Duration = Duration::from_millis(500);
/// How long a piece of that time is, of which the band knows the slowest and the fastest.
const PIECE: Duration = Duration::from_secs(1);

/// What has been done since the job's start, in bytes unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    /// Brought over by copiers.
    pub copied: u64,
    /// In chunks that guests marked anew.
    pub dirtied: u64,
    /// Written by guests.
    pub guest: u64,
    /// How many writes that were.
    pub guest_writes: u64,
    /// How long they waited for the mirror in all, in nanoseconds.
    pub delay_ns: u64,
}

/// How fast things have been lately: bytes a second, and what a guest's write had to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rates {
    pub copied: u64,
    pub dirtied: u64,
    pub guest: u64,
    /// On average; `None` where nobody wrote.
    pub delay: Option<Duration>,
}

/// When a job may be ready, in seconds; `None` where it never would at such a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Eta {
    /// At the rate of lately.
    pub likely: Option<u64>,
    /// At that of the fastest second.
    pub low: Option<u64>,
    /// At that of the slowest.
    pub high: Option<u64>,
}

/// What is remembered of a job.
#[derive(Debug, Default)]
pub(super) struct Pace {
    notes: VecDeque<(Duration, Counters)>,
}

impl Pace {
    /// Notes what has been done `now`, the time since the job's start.
    pub fn note(&mut self, now: Duration, counters: Counters) {
        if self.notes.back().is_some_and(|(last, _)| now < *last + EVERY) {
            return;
        }
        self.notes.push_back((now, counters));
        if self.notes.len() > NOTES_MAX {
            let mut number = 0;
            self.notes.retain(|_| {
                number += 1;
                number > NOTES_MAX / 2 || number % 2 == 1
            });
        }
    }

    /// How fast things have been lately; nothing is said of less than half a second.
    pub fn rates(&self) -> Rates {
        let Some((over, from, to)) = self.lately() else { return Rates::default() };
        let writes = to.guest_writes.saturating_sub(from.guest_writes);
        let delay = Duration::from_nanos(to.delay_ns.saturating_sub(from.delay_ns));
        Rates {
            copied: per_second(to.copied.saturating_sub(from.copied), over),
            dirtied: per_second(to.dirtied.saturating_sub(from.dirtied), over),
            guest: per_second(to.guest.saturating_sub(from.guest), over),
            delay: (writes > 0).then(|| delay / u32::try_from(writes).unwrap_or(u32::MAX)),
        }
    }

    /// When nothing of `left` bytes may be left: what guests mark anew has to be copied too.
    pub fn eta(&self, left: u64) -> Eta {
        let Some((over, from, to)) = self.lately() else { return Eta::default() };
        let pieces = self.pieces();
        let (slow, fast) = pieces.iter().fold((i128::MAX, i128::MIN), |(slow, fast), &(over, from, to)| {
            let progress = progress(over, from, to);
            (slow.min(progress), fast.max(progress))
        });
        let likely = progress(over, from, to);
        let seconds = |rate: i128, round_up: bool| {
            let rate = u64::try_from(rate).ok().filter(|rate| *rate > 0)?;
            Some(if round_up { left.div_ceil(rate) } else { left / rate })
        };
        Eta {
            likely: seconds(likely, true),
            low: seconds(fast.max(likely), false),
            high: seconds(slow.min(likely), true),
        }
    }

    /// For how long the guest's oldest write that the target lacks has been missing `now`, as if writes were brought
    /// over in their order; `counters` and `backlog` are of now.
    ///
    /// As many bytes as are missing now were marked since then.
    pub fn lag(&self, now: Duration, counters: Counters, backlog: u64) -> Duration {
        if backlog == 0 {
            return Duration::ZERO;
        }
        let there = counters.dirtied.saturating_sub(backlog);
        let mut after = (now, counters.dirtied);
        for (at, Counters { dirtied, .. }) in self.notes.iter().rev() {
            if *dirtied <= there {
                let (span, bytes) = (after.0.saturating_sub(*at), after.1.saturating_sub(*dirtied));
                let share = if bytes == 0 { 0.0 } else { (there - dirtied) as f64 / bytes as f64 };
                return now.saturating_sub(*at + span.mul_f64(share.min(1.0)));
            }
            after = (*at, *dirtied);
        }
        now
    }

    /// The time over which rates are measured, its length, first and last note.
    fn lately(&self) -> Option<(Duration, Counters, Counters)> {
        let (end, to) = *self.notes.back()?;
        let (start, from) = *self.notes.iter().find(|(at, _)| *at + LATELY >= end)?;
        let over = end - start;
        (over >= LATELY_MIN).then_some((over, from, to))
    }

    /// That time in pieces, the last first; a rest that is shorter is part of none.
    fn pieces(&self) -> Vec<(Duration, Counters, Counters)> {
        let mut pieces = Vec::new();
        let Some(&(last, mut to)) = self.notes.back() else { return pieces };
        let mut end = last;
        for (at, from) in self.notes.iter().rev().take_while(|(at, _)| *at + LATELY >= last) {
            if *at + PIECE <= end {
                pieces.push((end - *at, *from, to));
                (end, to) = (*at, *from);
            }
        }
        pieces
    }
}

/// By how many bytes a second there was less left.
fn progress(over: Duration, from: Counters, to: Counters) -> i128 {
    let rate = |from: u64, to: u64| i128::from(per_second(to.saturating_sub(from), over));
    rate(from.copied, to.copied) - rate(from.dirtied, to.dirtied)
}

#[cfg(test)]
mod tests {
    use super::{Counters, Eta, NOTES_MAX, Pace, Rates};
    use std::time::Duration;

    const MIB: u64 = 1 << 20;

    fn at(tenths: u64) -> Duration {
        Duration::from_millis(tenths * 100)
    }

    /// `tenths` of a second of a job that copies and is dirtied at these rates, in MiB a second.
    fn steady(tenths: u64, copied: u64, dirtied: u64) -> Pace {
        let mut pace = Pace::default();
        for now in 0..=tenths {
            pace.note(at(now), counters(now, copied, dirtied));
        }
        pace
    }

    fn counters(tenths: u64, copied: u64, dirtied: u64) -> Counters {
        let bytes = |rate: u64| rate * MIB * tenths / 10;
        Counters {
            copied: bytes(copied),
            dirtied: bytes(dirtied),
            guest: bytes(2 * dirtied),
            guest_writes: tenths,
            delay_ns: tenths * 7000,
        }
    }

    #[test]
    fn rates_are_those_of_the_counters() {
        let delay = Some(Duration::from_micros(7));
        let expected = Rates { copied: 100 * MIB, dirtied: 20 * MIB, guest: 40 * MIB, delay };
        for tenths in [5, 10, 49, 50, 51, 10_000] {
            assert_eq!(steady(tenths, 100, 20).rates(), expected, "{tenths}");
        }
        assert_eq!(steady(4, 100, 20).rates(), Rates::default(), "too early to say");
        assert_eq!(steady(100, 0, 0).rates().copied, 0);
    }

    #[test]
    fn what_is_dirtied_has_to_be_copied_too() {
        let eta = steady(50, 100, 20).eta(800 * MIB);
        assert_eq!(eta, Eta { likely: Some(10), low: Some(10), high: Some(10) });
        assert_eq!(steady(50, 100, 100).eta(MIB), Eta::default(), "it would never be ready");
        assert_eq!(steady(50, 0, 0).eta(MIB), Eta::default());
        assert_eq!(steady(50, 100, 0).eta(0).likely, Some(0));
    }

    #[test]
    fn the_band_is_as_wide_as_the_seconds_differ() {
        let mut pace = Pace::default();
        let mut counters = Counters::default();
        for tenth in 0..=50u64 {
            pace.note(at(tenth), counters);
            // One second of each five is three times as fast, and one rests.
            counters.copied += [20, 10, 10, 10, 0][(tenth / 10).min(4) as usize] * MIB;
        }
        let eta = pace.eta(1000 * MIB);
        assert_eq!((eta.likely, eta.low), (Some(10), Some(5)));
        assert_eq!(eta.high, None, "a second like the slowest one would never end it");
    }

    #[test]
    fn the_lag_is_the_age_of_what_is_missing() {
        let pace = steady(100, 0, 10);
        let now = counters(100, 0, 10);
        for (backlog, lag) in [(0, 0), (10, 1000), (25, 2500), (100, 10_000), (500, 10_000)] {
            let found = pace.lag(at(100), now, backlog * MIB).as_millis();
            assert!(found.abs_diff(lag) <= 1, "{backlog} MiB: {found} ms, not {lag}");
        }
        // Nobody wrote for a while, nor was anything copied: it grows older.
        assert_eq!(pace.lag(at(150), now, 10 * MIB).as_millis(), 6000);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_reaches_back() {
        let pace = steady(100_000, 0, 10);
        assert!(pace.notes.len() <= NOTES_MAX);
        assert_eq!(pace.notes[0].0, at(0));
        let hour = pace.lag(at(100_000), counters(100_000, 0, 10), 3600 * 10 * MIB).as_secs();
        assert!(hour.abs_diff(3600) <= 1, "{hour}");
    }
}
