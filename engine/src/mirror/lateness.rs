//! A target that takes too long for the guests that write to both sides.
//!
//! Who has waited for `Mirror::patience` says so, and from then on guests write to the source alone, all of them, until
//! the job thinks that the target answers again. What was begun on the target by then is *late*: it is counted here until
//! it ends, and as long as there is any the target lacks something. See `export::late`.
use super::Mirror;
use crate::dirty::Claim;
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use formats::error::Result;
use formats::range::ByteRange;
use std::time::Duration;

/// How long a guest's write waits for the target, or for a copy that is under way: longer than a device that works takes
/// for anything, its resets included, and a sixth of what a guest's own driver gives a request before it calls it lost.
pub const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(super) struct Lateness {
    fallen_back: AtomicBool,
    writes: AtomicU64,
    len: AtomicU64,
}

impl Mirror {
    /// The target takes too long: guests go on without it, also those that wait for somebody else's claim.
    pub fn fall_back(&self) {
        if !self.lateness.fallen_back.swap(true, Ordering::SeqCst) {
            self.released.ring();
            self.progress.ring();
        }
    }

    /// True where the target took too long, and nobody has said since that it answers.
    pub fn has_fallen_back(&self) -> bool {
        self.lateness.fallen_back.load(Ordering::SeqCst)
    }

    /// The target answers again.
    pub fn forgive(&self) {
        self.lateness.fallen_back.store(false, Ordering::SeqCst);
    }

    /// A write of `range` that the target has not ended is waited for no more; it is marked.
    pub fn begin_late(&self, range: ByteRange) {
        self.lateness.len.fetch_add(range.len(), Ordering::SeqCst);
        self.lateness.writes.fetch_add(1, Ordering::SeqCst);
        self.progress.ring();
    }

    /// It has ended, and its claim goes. What was brought is brought again, for it is marked.
    pub fn end_late(&self, range: ByteRange, claim: Option<Claim>, outcome: Result<()>) {
        let brought = outcome.is_ok().then_some(range);
        if let Err(error) = outcome {
            self.miss(range);
            self.fail(true, error);
        }
        if let Some(claim) = claim {
            self.release(claim, brought);
        }
        self.lateness.writes.fetch_sub(1, Ordering::SeqCst);
        self.lateness.len.fetch_sub(range.len(), Ordering::SeqCst);
        self.work.ring();
        self.progress.ring();
    }

    /// How many writes are late, and their bytes.
    pub fn late(&self) -> (u64, u64) {
        (self.lateness.writes.load(Ordering::SeqCst), self.lateness.len.load(Ordering::SeqCst))
    }
}
