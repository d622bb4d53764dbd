//! Verification of a job: begun when it was asked for and the job is ready, resting while it is not, or while an end is
//! under way.
use super::{Job, Phase, Stage};
use crate::mirror::Verified;
use std::time::Duration;

/// How long what was not equal rests before it is looked at again.
const REST: Duration = Duration::from_millis(500);

impl Job {
    /// Has everything read back that the target has. One that is under way goes on instead.
    pub fn verify(&mut self) {
        if self.verified().is_none_or(|verified| verified.is_complete()) {
            self.parts.mirror.verify();
        }
    }

    /// How far that is; `None` where nobody asked for it yet.
    pub fn verified(&self) -> Option<Verified> {
        self.parts.mirror.verified()
    }

    /// Lets it go on, or rest.
    pub(super) fn watch_verification(&mut self, now: Duration) {
        if self.phase == Phase::Ready && std::mem::take(&mut self.parts.verify) {
            self.parts.mirror.verify();
        }
        let may = self.phase == Phase::Ready && matches!(self.stage, Stage::Copying);
        self.parts.mirror.set_verifying(may && self.wish.is_none() && !self.paused);
        if now >= self.verify_again {
            self.verify_again = now + REST;
            self.parts.mirror.verify_again();
        }
    }
}
