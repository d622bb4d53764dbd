//! Pivots that keep their source, the way back, and its end.
use super::{Desk, refuse};
use crate::control::{Code, PivotRequest, Refusal, Status};
use crate::daemon::jobs::Active;
use crate::job::{Goal, Phase};

impl Desk {
    /// A pivot that would go the other way than whoever asks for it means; or, where an end is held, otherwise than it was
    /// asked for.
    pub(super) fn refuse_direction(&mut self, request: &PivotRequest) -> Result<(), Refusal> {
        let name = &request.export;
        let (_, active) = self.job(name)?;
        let message = match (request.back, active.rolls_back()) {
            (false, true) => format!(
                "export {name} has been pivoted, and its old disk is kept up to date: `pivot --back` returns to it, and \
                 `commit` ends that"
            ),
            (true, false) => format!(
                "export {name} has no old disk to go back to: only a pivot with --keep-source keeps one, until `commit`"
            ),
            _ if active.job.is_held()
                && active.job.goal() == Some(Goal::Pivot)
                && request.keep_source != active.keeps_source() =>
            {
                format!("the pivot of export {name} was asked for otherwise: finalize that, or cancel it with force")
            }
            _ => return Ok(()),
        };
        Err(refuse(Code::OperationInvalid, message))
    }

    /// Ends the way back. Where the old disk has everything it stays a copy of this instant.
    pub(super) fn commit(&mut self, name: &str, wait: bool) -> Result<usize, Refusal> {
        let (_, active) = self.job(name)?;
        if !active.rolls_back() {
            let message =
                format!("export {name} keeps no old disk: only a pivot with --keep-source has something to commit");
            return Err(refuse(Code::OperationInvalid, message));
        }
        // What cannot be brought up to date is not waited for.
        let force = active.job.phase() != Phase::Ready || active.job.error().is_some();
        self.cancel(name, force, wait)
    }

    /// Leaves a job that is over, for the way back from its pivot if that kept the source.
    pub(super) fn leave(&mut self, number: usize, mut active: Active, status: &Status) {
        let phase = active.job.phase();
        if phase != Phase::Pivoted {
            active.drop_back(&self.state);
        }
        let back = active.take_back(&self.exports[&number], &self.state);
        let mut last = status.clone();
        // Only its own failure loses it.
        last.rollback &= phase == Phase::Failed;
        last.verifying = false;
        if active.rolls_back() && phase == Phase::Cancelled {
            // It was pivoted, and stays so.
            last.phase = Phase::Pivoted.name().to_owned();
        }
        self.export_mut(number).last = Some(last);
        active.close(back.is_some());
        match back {
            Some(back) => {
                tracing::info!(export = self.exports[&number].name, "its old disk is kept up to date");
                self.jobs.insert(number, back);
                self.waker.wake();
            }
            None => self.forget_job(number),
        }
    }
}

/// What stands in the way of a change where a job is under way, and what to do.
pub(super) fn has_job(name: &str, active: &Active) -> String {
    match active.rolls_back() {
        true => format!("export {name} keeps the disk of before its pivot up to date: commit first, or go back"),
        false => format!("export {name} has a copy job: cancel it first, or wait for its end"),
    }
}
