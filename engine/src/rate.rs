//! A speed limit: bytes that may be copied, refilled as time goes by.
use crate::sync::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A limit that several copiers share. Unlimited by default.
#[derive(Debug, Default)]
pub struct Rate {
    /// Bytes a second; 0 is no limit.
    limit: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that may go now; below zero after a piece that was larger than what there was.
    left: i64,
    /// When it was last refilled.
    at: Duration,
}

/// How long a limit may save up what was not used.
const BURST: Duration = Duration::from_millis(100);

impl Rate {
    /// Bytes a second; 0 is no limit.
    pub fn set(&self, limit: u64) {
        let mut state = self.state();
        self.limit.store(limit, Ordering::Relaxed);
        state.left = state.left.min(0);
    }

    /// Bytes a second; 0 is no limit.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether something may be started at `now`; else how long to wait.
    pub fn check(&self, now: Duration) -> Result<(), Duration> {
        let limit = self.limit();
        if limit == 0 {
            return Ok(());
        }
        let mut state = self.state();
        let refill = bytes(limit, now.saturating_sub(state.at));
        let full = bytes(limit, BURST);
        state.left = state.left.saturating_add(refill).min(full);
        state.at = now;
        match state.left {
            1.. => Ok(()),
            left => Err(time(limit, 1 + left.unsigned_abs())),
        }
    }

    /// `count` bytes are to be started at `now`: how long they wait for those before them, in the order of asking.
    pub fn queue(&self, now: Duration, count: u64) -> Duration {
        let wait = self.check(now).err().unwrap_or_default();
        self.spend(count);
        wait
    }

    /// `count` bytes were started. They may be more than there was: the next ones wait for it.
    pub fn spend(&self, count: u64) {
        if self.limit() > 0 {
            let mut state = self.state();
            state.left = state.left.saturating_sub_unsigned(count);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes a second, where there were `bytes` in `time`.
pub fn per_second(bytes: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000 / time.as_micros().max(1)).unwrap_or(u64::MAX)
}

fn bytes(limit: u64, time: Duration) -> i64 {
    let bytes = u128::from(limit) * time.as_nanos() / 1_000_000_000;
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn time(limit: u64, bytes: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::Rate;
    use std::time::Duration;

    #[test]
    fn no_more_than_the_limit_goes_by_whatever_the_pieces() {
        for piece in [1_000, 64 << 10, 5_000_000] {
            let rate = Rate::default();
            rate.set(1_000_000);
            let (mut now, mut gone) = (Duration::ZERO, 0);
            while now < Duration::from_secs(30) {
                match rate.check(now) {
                    Ok(()) => {
                        rate.spend(piece);
                        gone += piece;
                    }
                    Err(wait) => now += wait.max(Duration::from_micros(1)),
                }
            }
            assert!(gone <= 30_100_000 + piece, "{gone} bytes in pieces of {piece}");
            assert!(gone >= 29_000_000, "{gone} bytes in pieces of {piece}");
        }
    }

    #[test]
    fn who_queues_waits_for_those_before() {
        let rate = Rate::default();
        rate.set(1_000_000);
        assert_eq!(rate.queue(Duration::from_secs(1), 100_000), Duration::ZERO);
        let waits = [0; 3].map(|_| rate.queue(Duration::from_secs(1), 500_000).as_millis());
        assert_eq!(waits, [0, 500, 1000]);
        assert_eq!(rate.queue(Duration::from_secs(2), 1).as_millis(), 500);
    }

    #[test]
    fn no_limit_never_waits() {
        let rate = Rate::default();
        assert_eq!(rate.queue(Duration::ZERO, u64::MAX), Duration::ZERO);
        rate.spend(u64::MAX);
        assert!(rate.check(Duration::ZERO).is_ok());
    }
}
