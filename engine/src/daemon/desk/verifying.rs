//! What operators ask of a verification: that it begins, that it is over, that a pivot relies on it.
use super::ends::Wish;
use super::{Desk, refuse};
use crate::control::{Code, Refusal, Reply};
use crate::job::Job;

impl Desk {
    /// Has everything read back that the target of a ready job has; one that is under way goes on.
    pub(super) fn verify(&mut self, name: &str) -> Result<usize, Refusal> {
        let (number, active) = self.ready_job(name)?;
        active.job.verify();
        self.waker.wake();
        Ok(number)
    }

    /// Answers who waits for a verification that is over.
    pub(super) fn answer_verified(&mut self, number: usize) {
        let waits = |(_, of, wish): &(u64, usize, Wish)| *of == number && *wish == Wish::Verify;
        let is_over = |job: &Job| job.verified().is_some_and(|verified| verified.is_complete());
        if self.waiting.iter().any(waits) && self.jobs.get(&number).is_some_and(|active| is_over(&active.job)) {
            self.answer_waiting(number, |wish| (wish == Wish::Verify).then_some(Ok(Reply::Done {})));
        }
    }
}

/// A pivot that is to rely on a verification which is not there.
pub(super) fn refuse_unverified(name: &str, job: &Job) -> Result<(), Refusal> {
    let remedy = format!("wait for it with `blkmirror verify --wait {name}`, and ask again");
    let message = match job.verified() {
        Some(verified) if verified.is_complete() => return Ok(()),
        Some(verified) => format!(
            "cannot pivot verified: {} of {} bytes were read back from the target of export {name} so far: {remedy}",
            verified.bytes, verified.size
        ),
        None => format!("cannot pivot verified: nobody had the target of export {name} read back: {remedy}"),
    };
    Err(refuse(Code::OperationInvalid, message))
}
