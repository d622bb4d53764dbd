//! A whole chain on its way: first the layers below the top are copied, and then the mirror of the top begins upon them.
//!
//! To whoever looks it is one job from its start: it has a name and a standing, is told of, can be paused, changed and
//! cancelled, and goes on after a kill.
//!
//! ```text
//! kept: chain           the layers below are copied, as `.part`
//! kept: chain, named    all of them are whole and durable; they get their names
//! kept: chain, top      the mirror of the top begins: its target is made
//! kept: the top         the mirror's own request (`daemon::jobs`)
//! ```
use super::ends::Wish;
use super::{Answer, Desk, News, refuse};
use crate::control::jobs::{IoStatus, JobInfo, JobStatus};
use crate::control::{Changes, Code, Event, MirrorRequest, Refusal, Reply, Request, Started, Status};
use crate::daemon::jobs::Told;
use crate::daemon::lower::{Lower, Orders, Progress};
use crate::daemon::pace::{Counters, Pace};
use crate::daemon::resume::refuse_others;
use crate::daemon::retune::{ErrorNews, Standing, millis, refuse_bounds};
use crate::daemon::wait::until_free;
use crate::job::{Phase, io_status_of, path};
use crate::open::identity;
use crate::state::{KeptJob, StateFolder};
use crate::target::{ChainPlan, Copied, Reached, plan_chain};
use formats::error::Context;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// One whose layers below the top are being copied.
pub(super) struct Lowering {
    /// What the state folder has of it: the request for the whole chain.
    kept: KeptJob,
    lower: Lower,
    notes: Vec<String>,
    told: Option<Told>,
    begun: Instant,
    pace: Pace,
    error_news: ErrorNews,
}

impl Lowering {
    /// Its job's name.
    pub fn id(&self) -> &str {
        self.request().job_id.as_ref().unwrap_or(&self.request().export)
    }

    fn request(&self) -> &MirrorRequest {
        &self.kept.request
    }

    fn progress(&self) -> &Progress {
        &self.lower.progress
    }

    fn copied(&self) -> u64 {
        self.progress().copied.load(Ordering::Relaxed)
    }

    /// Bytes that are left, of which the top's are still to come: never 0.
    pub fn left(&self) -> u64 {
        let lower = self.progress().total.load(Ordering::Relaxed).saturating_sub(self.copied());
        (lower + self.lower.plan.top_bytes).max(1)
    }

    /// How it stands, beside what its export is.
    pub fn status(&self, export: Status) -> Status {
        let (request, plan, copied) = (self.request(), &self.lower.plan, self.copied());
        let (orders, trouble) = (*self.progress().orders(), self.progress().trouble());
        let remaining = self.left();
        let rest = trouble.as_ref().and_then(|trouble| trouble.rest);
        let eta = if orders.paused || rest.is_some() { Default::default() } else { self.pace.eta(remaining) };
        Status {
            phase: Phase::Seeding.name().to_owned(),
            paused: orders.paused,
            job: Some(self.id().to_owned()),
            mode: Some(request.mode),
            total_bytes: copied + remaining,
            copied_bytes: copied,
            remaining_bytes: remaining,
            speed_bytes_per_s: orders.speed,
            on_source_error: Some(request.on_source_error),
            on_target_error: Some(request.on_target_error),
            io_status: trouble.as_ref().map_or(IoStatus::Ok, |trouble| io_status_of(trouble.no_space)),
            back_off_ms: rest.map(millis),
            pause_budget_ms: Some(request.pause_budget),
            eta_s: eta.likely,
            eta_low_s: eta.low,
            eta_high_s: eta.high,
            copy_rate_bytes_per_s: self.pace.rates().copied,
            target: Some(plan.top.display().to_string()),
            error: trouble.map(|trouble| trouble.message),
            notes: self.notes.clone(),
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
            io_status: at.io_status,
            auto_finalize: self.request().auto_finalize,
            auto_dismiss: self.request().auto_dismiss,
            at: Box::new(at),
        }
    }

    /// As `Active::news`.
    pub fn news(&mut self) -> Option<Vec<JobStatus>> {
        let paused = self.progress().orders().paused;
        let stands = if paused { JobStatus::Paused } else { JobStatus::Running };
        let now = Told { phase: Phase::Seeding, paused, stands };
        let before = self.told.replace(now);
        (before != Some(now)).then(|| path(before.map_or(JobStatus::Null, |told| told.stands), stands, false))
    }

    fn measure(&mut self) {
        let counters = Counters { copied: self.copied(), ..Counters::default() };
        self.pace.note(self.begun.elapsed(), counters);
    }

    fn errors(&mut self) -> Vec<Event> {
        let (error, trouble) = (self.progress().take_error(), self.progress().trouble());
        let (export, job) = (self.request().export.clone(), self.id().to_owned());
        let standing = Standing {
            export: &export,
            job: &job,
            backs_off: trouble.as_ref().and_then(|trouble| trouble.rest),
            why: trouble.as_ref().map(|trouble| trouble.message.as_str()),
        };
        self.error_news.take(self.begun.elapsed(), &standing, error)
    }

    fn change(&mut self, changes: Changes) -> Result<(), Refusal> {
        refuse_bounds(&changes)?;
        changes.apply(&mut self.kept.request);
        let request = self.request();
        let mut orders = self.lower.progress.orders();
        orders.speed = request.speed;
        orders.decide_by([request.on_source_error, request.on_target_error]);
        Ok(())
    }

    /// Keeps what is changed of it, so that it holds through a kill.
    pub fn keep(&mut self, before: &KeptJob, state: &StateFolder) {
        let orders = *self.progress().orders();
        self.kept.paused = orders.paused && !orders.stopped;
        if self.kept != *before
            && let Err(error) = state.keep_job(&self.kept)
        {
            tracing::error!("what was changed of a job does not hold through a restart: {}", error.one_line());
        }
    }

    /// Has it end; the next daemon goes on with it.
    pub fn stop(self) {
        self.lower.stop();
    }
}

impl Desk {
    /// Begins to copy a whole chain.
    pub(super) fn mirror_chain(&mut self, number: usize, request: &MirrorRequest) -> Result<Started, Refusal> {
        let source = self.exports[&number].gate.route().disk;
        let plan = plan_chain(request, Copied::Nothing, &source)?;
        let top = plan.of_top(request);
        if plan.files.is_empty() {
            return self.start_job(number, &top, Reached::Nothing);
        }
        // All that can be refused is, before anything is copied.
        let below = Reached::Lower { layers: source.chain().layers()[1..].to_vec(), bytes: 0 };
        let mut started = self.start_job(number, &MirrorRequest { dry_run: true, ..top }, below)?;
        started.notes.extend(plan.warning.clone());
        if request.dry_run {
            return Ok(started);
        }
        if let Some(warning) = &plan.warning {
            tracing::warn!("{}: {warning}", request.target);
        }
        let kept = KeptJob {
            source: source.name(),
            target_identity: identity(Path::new(&request.target))?,
            planes: None,
            paused: false,
            rollback: false,
            named: false,
            top: false,
            request: MirrorRequest { job_id: Some(started.job.clone()), ..request.clone() },
        };
        self.state.keep_job(&kept)?;
        let begun = self.begin_lowering(number, kept, plan, started.notes.clone());
        begun.inspect_err(|_| self.forget_job(number))?;
        Ok(started)
    }

    /// Goes on with a chain whose layers below the top were being copied when the daemon ended; false where there is none.
    pub(super) fn resume_chain(&mut self, number: usize) -> bool {
        let export = &self.exports[&number];
        let kept = match self.state.kept_job(&export.name) {
            Ok(Some(kept)) if kept.request.chain => kept,
            _ => return false,
        };
        let (name, request) = (export.name.clone(), kept.request.clone());
        match self.try_to_resume_chain(number, kept) {
            Ok(()) => tracing::info!(export = name, "its job goes on: the layers below the top are copied"),
            Err(refusal) => {
                tracing::error!(export = name, "its job cannot go on: {refusal}");
                self.failed_to_resume(number, request, refusal);
            }
        }
        true
    }

    fn try_to_resume_chain(&mut self, number: usize, kept: KeptJob) -> Result<(), Refusal> {
        let export = &self.exports[&number];
        refuse_others(export, &self.state, &kept)?;
        let copied = match (kept.named, kept.top) {
            (_, true) => Copied::Top,
            (true, _) => Copied::Whole,
            (false, _) => Copied::InPart,
        };
        let plan = plan_chain(&kept.request, copied, &export.gate.route().disk)?;
        plan.files.iter().try_for_each(|file| until_free(&file.part()))?;
        if copied == Copied::Top {
            // Killed before its own request was kept: there is nothing in it yet.
            until_free(&plan.top)?;
            plan.remove_top()?;
        }
        let notes = plan.warning.iter().cloned().collect();
        self.begin_lowering(number, kept, plan, notes)
    }

    fn begin_lowering(
        &mut self,
        number: usize,
        kept: KeptJob,
        plan: ChainPlan,
        notes: Vec<String>,
    ) -> Result<(), Refusal> {
        let MirrorRequest { speed, on_source_error, on_target_error, .. } = kept.request;
        let on_error = [on_source_error, on_target_error];
        let orders = Orders { speed, paused: kept.paused, on_error, ..Orders::default() };
        let (plan, progress) = (Arc::new(plan), Arc::new(Progress::new(orders)));
        let lower = match kept.named {
            true => Lower::name(plan, progress, &self.reach, &self.waker),
            false => Lower::copy(plan, progress, &self.waker),
        };
        let lower = lower.context(|| "starting the thread that copies the layers below")?;
        let (begun, pace, error_news) = (Instant::now(), Pace::default(), ErrorNews::default());
        self.lowering.insert(number, Lowering { kept, lower, notes, told: None, begun, pace, error_news });
        self.waker.wake();
        Ok(())
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
        let before = lowering.kept.clone();
        match request {
            Request::Set { changes, .. } => {
                if let Err(refusal) = lowering.change(*changes) {
                    return Some(Some(Err(refusal)));
                }
            }
            Request::Cancel { .. } => {
                lowering.progress().orders().stop = true;
                if wait {
                    return Some(self.wait_for(client, number, Wish::Cancel));
                }
            }
            _ => lowering.progress().orders().hold(matches!(request, Request::Pause(_)), false),
        }
        lowering.keep(&before, &self.state);
        self.tell(number);
        Some(Some(Ok(Reply::Done {})))
    }

    pub(super) fn step_lowering(&mut self) {
        for number in self.lowering.keys().copied().collect::<Vec<_>>() {
            let Some(lowering) = self.lowering.get_mut(&number) else { continue };
            lowering.measure();
            let (errors, is_over) = (lowering.errors(), lowering.lower.is_over());
            self.news.extend(errors.into_iter().map(News::Event));
            self.tell(number);
            if is_over && let Some(lowering) = self.lowering.remove(&number) {
                self.lowered(number, lowering);
                self.tell(number);
            }
        }
    }

    /// A part of it is over: the copies, or their names.
    fn lowered(&mut self, number: usize, lowering: Lowering) {
        let last = lowering.status(self.status(number));
        let Lowering { kept, lower, notes, told, begun, pace, error_news } = lowering;
        let (plan, progress) = (Arc::clone(&lower.plan), Arc::clone(&lower.progress));
        let outcome = lower.end().map_err(Refusal::from);
        let ended = match outcome {
            _ if progress.orders().stop => Err((Phase::Cancelled, None)),
            Err(refusal) => Err((Phase::Failed, Some(refusal))),
            Ok(_) if !kept.named => {
                let kept = KeptJob { named: true, ..kept.clone() };
                let named = self.state.keep_job(&kept).map_err(Refusal::from).and_then(|()| {
                    let lower = Lower::name(Arc::clone(&plan), Arc::clone(&progress), &self.reach, &self.waker);
                    Ok(lower.context(|| "starting the thread that names the copies")?)
                });
                named.map_err(|refusal| (Phase::Failed, Some(refusal))).map(|lower| {
                    let lowering = Lowering { kept, lower, notes, told, begun, pace, error_news };
                    self.lowering.insert(number, lowering);
                })
            }
            Ok(layers) => {
                let reached = Reached::Lower { layers, bytes: last.copied_bytes };
                let noted = self.state.keep_job(&KeptJob { top: true, ..kept.clone() }).map_err(Refusal::from);
                let begun = noted.and_then(|()| self.start_job(number, &plan.of_top(&kept.request), reached));
                begun.map_err(|refusal| (Phase::Failed, Some(refusal))).map(|_| {
                    if let Some(active) = self.jobs.get_mut(&number) {
                        (active.told, active.notes) = (told, notes);
                        let orders = *progress.orders();
                        if orders.paused && !orders.stopped {
                            active.job.pause(true);
                        }
                    }
                })
            }
        };
        if let Err((phase, refusal)) = ended {
            plan.unmake();
            let status = Status {
                phase: phase.name().to_owned(),
                error: refusal.as_ref().map(|refusal| refusal.message.clone()),
                paused: false,
                back_off_ms: None,
                ..last
            };
            self.chain_ended(number, &kept.request, told, status);
        }
    }

    /// As `end_job`.
    fn chain_ended(&mut self, number: usize, request: &MirrorRequest, told: Option<Told>, status: Status) {
        let mut path = path(told.map_or(JobStatus::Null, |told| told.stands), JobStatus::Concluded, false);
        let job = JobInfo {
            id: status.job.clone().unwrap_or_default(),
            stands: JobStatus::Concluded,
            completing: false,
            complete: false,
            io_status: status.io_status,
            auto_finalize: request.auto_finalize,
            auto_dismiss: request.auto_dismiss,
            at: Box::new(status.clone()),
        };
        match request.auto_dismiss {
            true => path.push(JobStatus::Null),
            false => self.keep(job.clone()),
        }
        tracing::info!(export = status.export, phase = status.phase, "job");
        self.news.push(News::Event(Event::Job { job: Box::new(job), path }));
        self.forget_job(number);
        let cancelled = status.phase == Phase::Cancelled.name();
        let why = status.error.clone().unwrap_or_default();
        self.export_mut(number).last = Some(status);
        self.answer_waiting(number, |wish| {
            Some(match wish {
                Wish::Cancel if cancelled => Ok(Reply::Done {}),
                _ => Err(refuse(Code::OperationFailed, why.clone())),
            })
        });
    }
}
