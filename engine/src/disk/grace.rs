//! Knows when nobody can be using any more what an image gave up.
//!
//! A task maps bytes and then moves them, without a lock in between. A cluster that is given up
//! meanwhile must not be used for something else before that task has left. So tasks enter and
//! leave, in two parities; a grace period starts by turning the parity and is over when the old one
//! is empty.
//!
//! It is over for what was given up by settles that had ended when it started, and the image is told
//! how many. What a settle gives up that ends later, even before anybody here hears of it, may be in
//! the hands of a task that came after the start, and waits for the next period.
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts the tasks inside a disk.
#[derive(Debug, Default)]
pub(super) struct Grace(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    parity: usize,
    inside: [u64; 2],
    /// A period is under way, the other parity is emptying: how many settles had ended when it started.
    period: Option<u64>,
    /// What so many settles gave up is in nobody's hands.
    over: u64,
}

impl Grace {
    /// A task comes in; it leaves with what it was given.
    pub fn enter(&self) -> usize {
        let mut state = self.state();
        let parity = state.parity;
        state.inside[parity] += 1;
        parity
    }

    /// A task leaves. True where somebody should look whether the period is over.
    pub fn leave(&self, parity: usize) -> bool {
        let mut state = self.state();
        state.inside[parity] -= 1;
        state.period.is_some() && parity != state.parity && state.inside[parity] == 0
    }

    /// Ends a period where it can be, starts one where it is needed: where more of the image's `settles`
    /// have ended since the last. What the first so many of them gave up is in nobody's hands now, if the
    /// answer is a number.
    pub fn over(&self, settles: impl Fn() -> u64) -> Option<u64> {
        let mut state = self.state();
        let mut over = None;
        while state.inside[1 - state.parity] == 0 {
            if let Some(settles) = state.period.take() {
                state.over = settles;
                over = Some(settles);
            }
            let settles = settles();
            if settles == state.over {
                break;
            }
            state.parity = 1 - state.parity;
            state.period = Some(settles);
        }
        over
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Grace;

    #[test]
    fn it_is_over_when_those_inside_at_the_settle_have_left() {
        let grace = Grace::default();
        assert_eq!(grace.over(|| 0), None, "nothing was given up");
        let before = grace.enter();
        assert_eq!(grace.over(|| 1), None);
        let after = grace.enter();
        assert!(grace.leave(before));
        assert_eq!(grace.over(|| 1), Some(1), "who came after the settle never saw what it gave up");
        assert!(!grace.leave(after));
        assert_eq!(grace.over(|| 1), None, "once a settle");
        assert_eq!(grace.over(|| 2), Some(2), "nobody is inside");
    }

    /// The image was told to use everything again that it had been given up. A settle that ended after the
    /// start of the period, and had not been heard of yet, gave up what the second task may hold: a read
    /// would have brought another cluster's bytes. It takes two threads to end between each other's lines,
    /// so the simulator, which steps one at a time, never saw it.
    #[test]
    fn a_settle_meanwhile_waits_for_the_next_one() {
        let grace = Grace::default();
        let first = grace.enter();
        assert_eq!(grace.over(|| 1), None);
        let second = grace.enter();
        assert!(grace.leave(first));
        assert_eq!(grace.over(|| 2), Some(1), "the second task may hold what the second settle gave up");
        assert!(grace.leave(second));
        assert_eq!(grace.over(|| 2), Some(2));
    }
}
