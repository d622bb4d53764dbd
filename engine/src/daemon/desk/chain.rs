//! A whole chain on its way: first the layers below the top are copied, and then the mirror of the top begins upon them.
use super::{Answer, Desk, News, refuse};
use crate::control::jobs::{IoStatus, JobInfo, JobStatus};
use crate::control::{Code, MirrorRequest, Refusal, Reply, Request, Started, Status};
use crate::daemon::lower::Lower;
use crate::daemon::retune::refuse_bounds;
use crate::job::Phase;
use crate::target::{Reached, plan_chain};
use formats::error::Context;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One whose layers below the top are being copied.
pub(super) struct Lowering {
    client: u64,
    /// What is asked of the top.
    request: MirrorRequest,
    lower: Lower,
    /// Who waits for the end of what they cancelled.
    cancelled_by: Vec<u64>,
}

impl Lowering {
    /// Its job's name.
    pub fn id(&self) -> &str {
        self.request.job_id.as_ref().unwrap_or(&self.request.export)
    }

    /// How it stands, beside what its export is.
    pub fn status(&self, export: Status) -> Status {
        let progress = &self.lower.progress;
        let copied = progress.copied.load(Ordering::Relaxed);
        // Never all of it: the top is still to come.
        let remaining = progress.total.load(Ordering::Relaxed).saturating_sub(copied).max(1);
        Status {
            phase: Phase::Seeding.name().to_owned(),
            paused: progress.paused.load(Ordering::Relaxed),
            job: Some(self.id().to_owned()),
            mode: Some(self.request.mode),
            total_bytes: copied + remaining,
            copied_bytes: copied,
            remaining_bytes: remaining,
            speed_bytes_per_s: progress.speed.load(Ordering::Relaxed),
            target: Some(self.request.target.clone()),
            ..export
        }
    }

    /// What there is to say of its job; its export is as `at` says.
    pub fn info(&self, at: Status) -> JobInfo {
        JobInfo {
            id: self.id().to_owned(),
            stands: if at.paused { JobStatus::Paused } else { JobStatus::Running },
            completing: false,
            complete: false,
            io_status: IoStatus::Ok,
            auto_finalize: self.request.auto_finalize,
            auto_dismiss: self.request.auto_dismiss,
            at: Box::new(at),
        }
    }

    /// Has it end, and leave nothing behind. Waits.
    pub fn stop(self) {
        self.lower.stop();
    }

    fn is_stopped(&self) -> bool {
        self.lower.progress.stop.load(Ordering::SeqCst)
    }
}

impl Desk {
    /// Begins to copy a whole chain. `None` where the client is answered when the mirror of the top has begun.
    pub(super) fn mirror_chain(
        &mut self,
        client: u64,
        number: usize,
        request: &MirrorRequest,
    ) -> Result<Option<Started>, Refusal> {
        let source = self.exports[&number].gate.route().disk;
        let plan = plan_chain(request, &source)?;
        let top = plan.of_top(request);
        // All that can be refused is, before anything is copied.
        let started = self.start_job(number, &MirrorRequest { dry_run: true, ..top.clone() }, Reached::Nothing)?;
        if request.dry_run {
            return Ok(Some(started));
        }
        if plan.files.is_empty() {
            return self.start_job(number, &top, Reached::Nothing).map(Some);
        }
        let lower = Lower::start(plan, request.speed, &self.reach, &self.waker);
        let lower = lower.context(|| "starting the thread that copies the layers below")?;
        tracing::info!(export = request.export, "the layers below the top are being copied to {}", request.target);
        self.lowering.insert(number, Lowering { client, request: top, lower, cancelled_by: Vec::new() });
        self.waker.wake();
        Ok(None)
    }

    /// What is asked of an export whose layers below are being copied; `None` where it is for somebody else. The inner
    /// one is as `act` has it.
    pub(super) fn act_on_lowering(&mut self, client: u64, request: &Request, wait: bool) -> Option<Option<Answer>> {
        let (Request::Pause(name)
        | Request::Resume(name)
        | Request::Set { export: name, .. }
        | Request::Cancel { export: name, .. }) = request
        else {
            return None;
        };
        let number = self.find(name).ok()?;
        let lowering = self.lowering.get_mut(&number)?;
        let progress = &lowering.lower.progress;
        match request {
            Request::Set { changes, .. } => {
                if let Err(refusal) = refuse_bounds(changes) {
                    return Some(Some(Err(refusal)));
                }
                changes.apply(&mut lowering.request);
                progress.speed.store(lowering.request.speed, Ordering::Relaxed);
            }
            Request::Cancel { .. } => {
                progress.stop.store(true, Ordering::SeqCst);
                if wait {
                    lowering.cancelled_by.push(client);
                    return Some(None);
                }
            }
            _ => progress.paused.store(matches!(request, Request::Pause(_)), Ordering::Relaxed),
        }
        Some(Some(Ok(Reply::Done {})))
    }

    pub(super) fn step_lowering(&mut self) {
        for number in self.lowering.keys().copied().collect::<Vec<_>>() {
            if self.lowering.get(&number).is_some_and(|lowering| lowering.lower.is_over())
                && let Some(lowering) = self.lowering.remove(&number)
            {
                self.lowered(number, lowering);
                self.tell(number);
            }
        }
    }

    fn lowered(&mut self, number: usize, lowering: Lowering) {
        let last = lowering.status(self.status(number));
        let (stopped, Lowering { client, request, lower, cancelled_by }) = (lowering.is_stopped(), lowering);
        let plan = Arc::clone(&lower.plan);
        let outcome = lower.end();
        if stopped {
            if outcome.is_ok() {
                plan.unmake();
            }
            self.export_mut(number).last = Some(Status { phase: Phase::Cancelled.name().to_owned(), ..last });
            let message = format!("export {}: the copy of its layers was cancelled", request.export);
            self.news.push(News::Answer(client, Err(refuse(Code::OperationFailed, message))));
            let cancelled = cancelled_by.into_iter().map(|client| News::Answer(client, Ok(Reply::Done {})));
            self.news.extend(cancelled);
            return;
        }
        let begun = outcome.map_err(Refusal::from).and_then(|layers| {
            let reached = Reached::Lower { layers, bytes: last.copied_bytes };
            self.start_job(number, &request, reached).inspect_err(|_| plan.unmake())
        });
        let answer = match begun {
            Ok(started) => {
                if let Some(active) = self.jobs.get_mut(&number).filter(|_| last.paused) {
                    active.job.pause(true);
                }
                Ok(Reply::Started(started))
            }
            Err(refusal) => {
                self.failed_to_resume(number, request, refusal.clone());
                Err(refusal)
            }
        };
        self.news.push(News::Answer(client, answer));
    }
}
