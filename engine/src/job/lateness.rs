//! What a job does where its target takes too long for the guests that write to both sides.
//!
//! ```text
//! both sides ─► a guest's patience is over ─► the source alone ─► the target answers again ─► both sides
//! ```
//!
//! Guests decide by themselves that they have waited for long enough (`mirror::lateness`); the job tells of it, and
//! decides when it may be tried again. No late write may be left by then, and the target has to have answered since. A
//! rest lies between, so that a target that takes too long now and then costs a guest its patience once in so long, and
//! not with every write.
use super::{Happened, IoError, Job, Phase, Stage};
use crate::control::jobs::ErrorAction;
use std::time::Duration;

/// How many times a guest's patience that rest is: a minute.
const REST_TIMES: u32 = 12;

/// Since when guests do not wait, and how many copies had been answered by then.
#[derive(Clone, Copy, Debug)]
pub(super) struct FellBack {
    since: Duration,
    answers: u64,
    now: Duration,
}

impl Job {
    pub(super) fn look_at_lateness(&mut self, now: Duration) {
        let mirror = &self.parts.mirror;
        match &mut self.fell_back {
            None if mirror.has_fallen_back() => {
                self.fell_back = Some(FellBack { since: now, answers: mirror.answers(), now });
                let message = format!(
                    "target: no answer within {} s to a guest's write: guests write to the source alone until it answers",
                    mirror.patience.as_secs()
                );
                tracing::warn!(job = self.parts.id, "{message}");
                self.io_error = Some(IoError { target: true, action: ErrorAction::Ignore, message });
                self.choose_mode();
            }
            None => {}
            Some(fell_back) => {
                fell_back.now = now;
                let answers = mirror.answers() > fell_back.answers || mirror.is_idle();
                let rested = now >= fell_back.since + REST_TIMES * mirror.patience;
                if rested && answers && mirror.late() == (0, 0) {
                    tracing::info!(job = self.parts.id, "the target answers: guests may write to both sides again");
                    self.fell_back = None;
                    self.parts.mirror.forgive();
                }
            }
        }
        if self.phase == Phase::Ready && matches!(self.stage, Stage::Copying) && self.parts.mirror.late().0 > 0 {
            self.happened(Happened::FellBehind);
        }
    }

    /// True where guests write to the source alone because the target took too long.
    pub fn has_fallen_back(&self) -> bool {
        self.fell_back.is_some()
    }

    /// What the target has not ended that guests wait for no more, in words; `None` where there is nothing.
    pub fn lateness(&self) -> Option<String> {
        let (writes, bytes) = self.parts.mirror.late();
        let since = self.fell_back.map_or(0, |fell_back| (fell_back.now - fell_back.since).as_secs());
        match (writes, self.fell_back) {
            (0, None) => None,
            (0, Some(_)) => Some(format!(
                "target: it took too long for a guest's write, {since} s ago: guests write to the source alone"
            )),
            _ => Some(format!(
                "target: {writes} writes of guests, {bytes} bytes, are not answered since {since} s: guests write to the \
                 source alone, and the job cannot end before these do"
            )),
        }
    }
}
