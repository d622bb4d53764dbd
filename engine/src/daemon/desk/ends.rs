//! How the desk ends jobs: what is asked for, who waits for it, and what is kept of a job that has ended.
use super::verifying::refuse_unverified;
use super::{Answer, Desk, News, refuse};
use crate::control::jobs::{JobInfo, JobStatus};
use crate::control::{Code, Event, PivotRequest, Refusal, Reply};
use crate::daemon::jobs::Active;
use crate::job::{Goal, Phase};

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Pivot,
    Cancel,
    /// That everything is verified; no end at all.
    Verify,
    /// The pivot of a group, which is named by its first export's number.
    Together(usize),
}

impl Desk {
    /// The client is answered when the job of this export is over.
    pub(super) fn wait_for<T>(&mut self, client: u64, number: usize, wish: Wish) -> Option<T> {
        self.waiting.push((client, number, wish));
        None
    }

    /// A job that may be ended now with a whole target.
    pub(super) fn ready_job(&mut self, name: &str) -> Result<(usize, &mut Active), Refusal> {
        let (number, active) = self.job(name)?;
        if active.job.is_ending() {
            return Err(refuse_ending(name, active));
        }
        match active.job.not_ready() {
            Some(reason) => Err(refuse(Code::BlockCopyActive, reason.one_line())),
            None => Ok((number, active)),
        }
    }

    /// The export whose job has this very end held, which whoever waits for the end has carried out by that.
    fn finalized_by(&mut self, name: &str, goal: Goal, wait: bool) -> Option<usize> {
        let (number, active) = self.job(name).ok()?;
        if !wait || !active.job.is_held() || active.job.goal() != Some(goal) {
            return None;
        }
        active.job.finalize();
        self.waker.wake();
        Some(number)
    }

    pub(super) fn finish(&mut self, name: &str, wait: bool) -> Result<usize, Refusal> {
        if let Some(number) = self.finalized_by(name, Goal::Copy, wait) {
            return Ok(number);
        }
        let (number, active) = self.ready_job(name)?;
        active.job.cancel(false);
        active.end_asked(wait);
        self.waker.wake();
        Ok(number)
    }

    pub(super) fn pivot(&mut self, request: &PivotRequest, wait: bool) -> Result<usize, Refusal> {
        let name = &request.export;
        self.refuse_direction(request)?;
        if let Some(number) = self.finalized_by(name, Goal::Pivot, wait) {
            return Ok(number);
        }
        let number = self.may_pivot(name, request.verified)?;
        if let (Some(active), true) = (self.jobs.get_mut(&number), request.keep_source) {
            // One that waits for its end has one of this name itself, and gets it anew.
            active.drop_back(&self.state);
            self.refuse_id_in_use(&self.jobs[&number].name_of_back())?;
        }
        let export = &self.exports[&number];
        let Some(record) = export.record.clone() else { return Ok(number) };
        if let Some(active) = self.jobs.get_mut(&number) {
            match request.keep_source {
                true => active.prepare_back(export, &self.state)?,
                false => active.drop_back(&self.state),
            }
            let end = active.switch(export, None);
            active.job.pivot(end, record);
            active.end_asked(wait);
        }
        self.waker.wake();
        Ok(number)
    }

    /// An export whose job may be ended by a pivot; where that was asked for, only if it was `verified`.
    pub(super) fn may_pivot(&mut self, name: &str, verified: bool) -> Result<usize, Refusal> {
        let (number, active) = self.ready_job(name)?;
        if verified {
            refuse_unverified(name, &active.job)?;
        }
        // One that an earlier pivot was to have must not count with the record of this one.
        self.state.forget_rollback(name)?;
        match self.exports[&number].record {
            Some(_) => Ok(number),
            None => Err(refuse(Code::OperationInvalid, format!("export {name} is read-only: it cannot be pivoted"))),
        }
    }

    pub(super) fn cancel(&mut self, name: &str, force: bool, wait: bool) -> Result<usize, Refusal> {
        if let Some(number) = self.finalized_by(name, Goal::Copy, wait && !force) {
            return Ok(number);
        }
        let (number, active) = self.job(name)?;
        if active.job.is_ending() && !force {
            return Err(refuse_ending(name, active));
        }
        active.job.cancel(force);
        active.end_asked(wait);
        self.waker.wake();
        Ok(number)
    }

    pub(super) fn finalize(&mut self, name: &str) -> Answer {
        let (_, active) = self.job(name)?;
        if !active.job.awaits_finalize() {
            return Err(refuse(
                Code::OperationInvalid,
                format!("the job of export {name} does not wait to be finalized"),
            ));
        }
        self.with_job(name, |active| active.job.finalize())
    }

    pub(super) fn end_job(&mut self, number: usize) {
        let status = self.status(number);
        let Some(mut active) = self.jobs.remove(&number) else { return };
        let phase = active.job.phase();
        let job = active.info(status.clone());
        if !job.auto_dismiss {
            self.keep(job);
        }
        let export = self.export_mut(number);
        if let Some(record) = active.job.take_record() {
            export.record = Some(record);
        }
        self.leave(number, active, &status);
        self.answer_waiting(number, |wish| {
            Some(match (wish, phase) {
                (Wish::Pivot | Wish::Together(_), Phase::Pivoted) | (Wish::Cancel, Phase::Cancelled) => {
                    Ok(Reply::Done {})
                }
                _ => {
                    let why = status.error.clone().unwrap_or_else(|| format!("the job ended: {}", phase.name()));
                    Err(refuse(Code::OperationFailed, why))
                }
            })
        });
    }

    /// Answers who waits for this export, if there is an answer to what they wait for. Who waits for a group is answered
    /// when the last of it is done, or when one of it is not.
    pub(super) fn answer_waiting(&mut self, number: usize, answer: impl Fn(Wish) -> Option<Answer>) {
        let (these, others) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, of, _)| *of == number);
        self.waiting = others;
        let these: Vec<(u64, usize, Wish)> = these;
        for (client, number, wish) in these {
            let Some(answer) = answer(wish) else {
                self.waiting.push((client, number, wish));
                continue;
            };
            let is_rest = |(other, _, waits): &(u64, usize, Wish)| *other == client && *waits == wish;
            if matches!(wish, Wish::Together(_)) && self.waiting.iter().any(is_rest) {
                if answer.is_ok() {
                    continue;
                }
                self.waiting.retain(|waiting| !is_rest(waiting));
            }
            self.news.push(News::Answer(client, answer));
        }
    }

    pub(super) fn dismiss(&mut self, id: &str) -> Answer {
        match self.concluded.dismiss(id) {
            Some(job) => self.forgotten(job),
            None => return Err(refuse(Code::InvalidArg, format!("no job '{id}' has concluded"))),
        }
        Ok(Reply::Done {})
    }

    pub(super) fn keep(&mut self, job: JobInfo) {
        if let Some(oldest) = self.concluded.keep(job) {
            tracing::warn!(job = oldest.id, "too many concluded jobs: one that nobody dismissed is forgotten");
            self.forgotten(oldest);
        }
    }

    fn forgotten(&mut self, job: JobInfo) {
        let path = vec![job.stands, JobStatus::Null];
        self.news.push(News::Event(Event::Job { job: Box::new(JobInfo { stands: JobStatus::Null, ..job }), path }));
    }
}

fn refuse_ending(name: &str, active: &Active) -> Refusal {
    let remedy = if active.job.is_held() { ": finalize it, or cancel it with force" } else { "" };
    refuse(Code::OperationInvalid, format!("the job of export {name} is being ended already{remedy}"))
}
