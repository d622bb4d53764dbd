//! Knows when nobody can be using any more what an image gave up.
//!
//! A task maps bytes and then moves them, without a lock in between. A cluster that is given up
//! meanwhile must not be used for something else before that task has left. So tasks enter and
//! leave, in two parities; a grace period starts by turning the parity and is over when the old one
//! is empty. It counts only where no settle ended meanwhile: what that one gave up is younger.
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts the tasks inside a disk.
#[derive(Debug, Default)]
pub(super) struct Grace(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    parity: usize,
    inside: [u64; 2],
    /// A period is under way: the other parity is emptying.
    turned: bool,
    /// Settles that ended since the last recycling that counted.
    settles: u64,
    /// How many there were when the period began.
    settles_at_turn: u64,
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
        state.turned && parity != state.parity && state.inside[parity] == 0
    }

    /// A settle ended.
    pub fn settled(&self) {
        self.state().settles += 1;
    }

    /// Starts a period where one is needed, ends it where it can be. True where everything that was
    /// given up by settles so far can be in nobody's hands.
    pub fn is_over(&self) -> bool {
        let mut state = self.state();
        loop {
            if !state.turned {
                if state.settles == 0 || state.inside[1 - state.parity] > 0 {
                    return false;
                }
                state.parity = 1 - state.parity;
                (state.turned, state.settles_at_turn) = (true, state.settles);
            }
            if state.inside[1 - state.parity] > 0 {
                return false;
            }
            state.turned = false;
            if state.settles == state.settles_at_turn {
                state.settles = 0;
                return true;
            }
        }
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
        assert!(!grace.is_over(), "nothing was given up");
        let before = grace.enter();
        grace.settled();
        assert!(!grace.is_over());
        let after = grace.enter();
        assert!(grace.leave(before));
        assert!(grace.is_over(), "who came after the settle never saw what it gave up");
        grace.leave(after);
        assert!(!grace.is_over(), "once a settle");
    }

    #[test]
    fn a_settle_meanwhile_starts_it_anew() {
        let grace = Grace::default();
        let first = grace.enter();
        grace.settled();
        assert!(!grace.is_over());
        let second = grace.enter();
        grace.settled();
        grace.leave(first);
        assert!(!grace.is_over(), "the second task may hold what the second settle gave up");
        grace.leave(second);
        assert!(grace.is_over());
    }
}
