//! A job with its threads: how it is started, how it stands, and what is tidied when it is over.
mod rollback;

use super::exports::{Export, bring_in};
use super::pace::{Counters, Eta, Pace};
use super::resume::{self, Begin, Kept};
use super::retune::{ErrorNews, Room, Seldom, limits, millis, refuse_bounds};
use super::threads::Worker;
use super::wait::until_image_is_free;
use crate::control::creation::{CreateOptions, Preallocation};
use crate::control::jobs::{JobInfo, JobStatus};
use crate::control::options::Reach;
use crate::control::{Changes, Code, MirrorMap, MirrorRequest, Refusal, Started, Status, TargetFormat};
use crate::copier::Depth;
use crate::dirty::Cell;
use crate::disk::Disk;
use crate::job::{Goal, Job, Parts, Phase, path};
use crate::journal::WordJournal;
use crate::mirror::Mirror;
use crate::open::identity;
use crate::pivot::{End, Member};
use crate::planes::Planes;
use crate::state::{KeptJob, StateFolder, owner};
use crate::target::{Plan, Reached, plan};
use formats::error::{Context, Error};
use formats::journal::Journal;
use formats::planes::Header;
use formats::record::Record;
use rollback::Back;
use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// What one copy thread has under way. Runs of 1 MiB took a seventh longer with direct I/O, and four times
/// the memory; runs of 64 KiB took as long as these and more of the processor.
pub(super) const DEPTH: Depth = Depth { slots: 16, run_len: 256 << 10, beside: 256 << 10 };
/// Guest writes that can be under way on a mirrored disk: as many as all connections together may send.
const FLIGHTS: u32 = 8192;
/// How long lies between two settles of a target at least.
const SYNC_REST: Duration = Duration::from_secs(1);

/// A job under way.
pub(super) struct Active {
    pub job: Job,
    threads: Vec<Worker>,
    target: PathBuf,
    journal: Option<Arc<WordJournal>>,
    pub notes: Vec<String>,
    /// Bytes of layers below its target that were copied before it began.
    brought_before: u64,
    auto_finalize: bool,
    auto_dismiss: bool,
    /// What was told of it last.
    pub told: Option<Told>,
    pub begun: Instant,
    pace: Pace,
    /// What the state folder has of it.
    pub kept: KeptJob,
    /// What is asked of it now.
    pub asked: MirrorRequest,
    pub room: Room,
    /// Bytes that may be under way, as they were asked for.
    pub buf_size: u64,
    pub error_news: ErrorNews,
    /// When it was told where it stands.
    pub stands_told: Seldom,
    /// When mismatches were told of last, how many, and whether it was told that everything is verified.
    pub mismatches_told: Seldom,
    pub told_mismatches: u64,
    pub told_verified: bool,
    /// What follows the pivot that was asked for, where it keeps the source.
    back: Option<Box<Back>>,
}

/// What a job is told by.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Told {
    pub phase: Phase,
    pub paused: bool,
    pub stands: JobStatus,
}

impl Active {
    /// Starts a job, or says why not; `check` refuses a target that somebody else uses. No job where it was
    /// only asked whether it could be.
    /// `reached` was made ready for it.
    pub fn start(
        request: &MirrorRequest,
        reached: Reached,
        export: &Export,
        reach: &Reach,
        state: &StateFolder,
        check: &dyn Fn(&MirrorRequest) -> Result<(), Refusal>,
    ) -> Result<(Started, Option<Self>), Refusal> {
        Self::begin(request, Begin::New(reached), Kept::default(), export, reach, state, check)
    }

    fn begin(
        request: &MirrorRequest,
        begin: Begin,
        Kept { paused, rollback }: Kept,
        export: &Export,
        reach: &Reach,
        state: &StateFolder,
        check: &dyn Fn(&MirrorRequest) -> Result<(), Refusal>,
    ) -> Result<(Started, Option<Self>), Refusal> {
        check(request)?;
        // A deadline may go by while nobody serves.
        let deadline = if let Begin::New(_) = begin { Some(request.deadline) } else { None };
        let (pause_budget, max_slowdown) = (Some(request.pause_budget), Some(request.max_slowdown));
        refuse_bounds(&Changes { pause_budget, deadline, max_slowdown, ..Changes::default() })?;
        let source = export.gate.route().disk;
        if source.read_only() {
            let message =
                format!("export {} is read-only: there is nothing to mirror, copy it with convert", export.name);
            return Err(Refusal { code: Code::OperationInvalid, message });
        }
        if export.origin.to_str().is_none() {
            let message = format!("{}: a record's names have to be UTF-8: rename the file", export.origin.display());
            return Err(Refusal { code: Code::OperationUnsupported, message });
        }
        if request.options.preallocation == Some(Preallocation::Full) {
            let message = "preallocation=full: the daemon would serve nobody while it writes zeroes: take falloc, or \
                           make the target first and use --reuse-external";
            return Err(Refusal::new(Code::OperationUnsupported, message));
        }
        let reached = if let Begin::New(reached) = &begin { reached.clone() } else { Reached::Nothing };
        let mut plan = plan(request, &reached, &source, reach)?;
        plan.refuse_following(request)?;
        let id = request.job_id.clone().unwrap_or_else(|| export.name.clone());
        let started = Started { job: id.clone(), notes: plan.notes.clone() };
        if request.dry_run {
            return plan.rehearse(reach).map(|()| (started, None));
        }
        // Asleep: nothing is promised of a target before it is the truth.
        let journal = OnceCell::new();
        let target = plan.open(&source, reach, &|path| {
            let asleep = state.journal(path)?.start_asleep();
            Ok(Arc::clone(journal.get_or_init(|| asleep)) as Arc<dyn Journal>)
        })?;
        let journal = journal.into_inner();
        let path = target.disk.chain().top().path.clone();
        let is_new = matches!(begin, Begin::New(_));
        let header = |job, target_is_zero| -> Result<Header, Error> {
            Ok(Header {
                boot: state.boot(),
                job,
                size: source.size(),
                chunk_bits: plan.chunk_bits,
                flights: FLIGHTS,
                source: owner(&source.chain().top().path)?,
                target: owner(&path)?,
                target_is_zero,
            })
        };
        let (number, target_is_zero) = match &begin {
            Begin::New(_) => (job_number(), target.is_zero),
            Begin::Taken { taken, job, .. } => (*job, taken.target_is_zero),
            Begin::Compare(_) => (job_number(), false),
        };
        let planes = header(number, target_is_zero).and_then(|header| {
            let taken = begin.taken_up(&header);
            let words = state.new_planes(&export.name, &header, &taken)?;
            Ok((words, header, taken))
        });
        let (words, header, taken) = planes.inspect_err(|_| unbegin(is_new, &plan, export, state))?;
        plan.notes.extend(taken.note(&header));
        let target = Arc::new(target.disk);
        let settles = target.is_remote() || plan.format != TargetFormat::Raw;
        let mut mirror = Mirror::on(Planes::on(&words, &header, settles), source, target, plan.shallow);
        mirror.zeroing = plan.zeroing(request);
        let mirror = Arc::new(mirror);
        mirror.rate.set(request.speed);
        mirror.courtesy.set_factor(request.latency_factor);
        mirror.set_compare(taken.compare);
        mirror.set_shares(request.reflink && plan.format == TargetFormat::Raw && !mirror.target.is_remote());
        let kept_request = MirrorRequest {
            target: path.display().to_string(),
            shallow: plan.shallow,
            reuse_external: true,
            format: Some(plan.format),
            job_id: Some(id.clone()),
            options: CreateOptions::default(),
            relative_backing: false,
            chain: false,
            ..request.clone()
        };
        let keep = |target_identity| KeptJob {
            source: mirror.source.name(),
            target_identity,
            planes: Some(number),
            paused,
            rollback,
            named: false,
            top: false,
            request: kept_request,
        };
        let buf_size = request.buf_size;
        let threads =
            identity(&path).map(keep).and_then(|kept| state.keep_job(&kept).map(|()| kept)).and_then(|kept| {
                let threads = copiers(&mirror, buf_size);
                Ok((kept, threads.context(|| format!("starting the copy threads of export {}", export.name))?))
            });
        let (kept, (threads, room)) = threads.inspect_err(|_| unbegin(is_new, &plan, export, state))?;
        mirror.set_runs_max(room.runs_in(buf_size));
        let (target_is_zero, seen) = (taken.target_is_zero, taken.seen);
        let mut job = Job::start(Parts { target_is_zero, seen, ..parts(request, id, mirror, export) });
        if paused {
            job.pause(true);
        }
        let active = Self {
            journal,
            notes: plan.notes,
            brought_before: if let Reached::Lower { bytes, .. } = reached { bytes } else { 0 },
            ..Self::of(job, threads, path, kept, room)
        };
        Ok((started, Some(active)))
    }

    /// A job with its threads, that has nothing to say of itself yet.
    fn of(job: Job, threads: Vec<Worker>, target: PathBuf, kept: KeptJob, room: Room) -> Self {
        let MirrorRequest { auto_finalize, auto_dismiss, buf_size, .. } = kept.request;
        Self {
            job,
            threads,
            target,
            journal: None,
            notes: Vec::new(),
            brought_before: 0,
            auto_finalize,
            auto_dismiss,
            told: None,
            begun: Instant::now(),
            pace: Pace::default(),
            asked: kept.request.clone(),
            kept,
            room,
            buf_size,
            error_news: ErrorNews::default(),
            stands_told: Seldom::default(),
            mismatches_told: Seldom::default(),
            told_mismatches: 0,
            told_verified: false,
            back: None,
        }
    }

    /// Goes on with the job that a kill or a stop interrupted, if there is one. An error is what its status says
    /// from then on.
    pub fn resume(
        export: &Export,
        reach: &Reach,
        state: &StateFolder,
        check: &dyn Fn(&MirrorRequest) -> Result<(), Refusal>,
    ) -> Result<Option<Self>, Box<(MirrorRequest, Refusal)>> {
        let Some((request, begin, kept)) = resume::find(export, state)? else { return Ok(None) };
        let target = Path::new(&request.target);
        let resumed = until_image_is_free(target, request.format)
            // It was served before, and what it was told then may be in its journal alone.
            .and_then(|()| if kept.rollback { bring_in(target, request.format, state) } else { Ok(()) })
            .map_err(Refusal::from)
            .and_then(|()| Self::begin(&request, begin, kept, export, reach, state, check));
        match resumed {
            Ok((_, active)) => Ok(active),
            Err(refusal) => Err(resume::refused(export, state, request, refusal)),
        }
    }

    /// The end that makes the target the disk of `export`.
    pub fn switch(&self, export: &Export, member: Option<Member>) -> End {
        let mirror = self.job.mirror();
        End::Switch {
            record: Record {
                generation: 0,
                export: export.name.clone(),
                origin: export.origin.display().to_string(),
                truth: self.target.display().to_string(),
                format: mirror.target.chain().top().format.to_owned(),
                size: mirror.source.size(),
            },
            journal: self.journal.clone(),
            member,
            back: self.back.as_ref().map(|back| Arc::clone(&back.mirror)),
        }
    }

    /// An end was asked for; `wait`: by somebody who waits for it, and so wants it carried out.
    pub fn end_asked(&mut self, wait: bool) {
        if !wait && !self.auto_finalize {
            self.job.hold();
        }
    }

    /// Where it stood when it was told of last, to where it stands now; `None` where there is nothing to tell.
    pub fn news(&mut self) -> Option<Vec<JobStatus>> {
        let job = &self.job;
        let now = Told { phase: job.phase(), paused: job.is_paused(), stands: job.stands() };
        let before = self.told.replace(now);
        if before == Some(now) {
            return None;
        }
        let mut path = path(before.map_or(JobStatus::Null, |told| told.stands), now.stands, job.is_complete());
        if now.phase.is_over() && self.auto_dismiss {
            path.push(JobStatus::Null);
        }
        Some(path)
    }

    /// What there is to say of it; its export is as `at` says.
    pub fn info(&self, at: Status) -> JobInfo {
        JobInfo {
            id: self.job.id().to_owned(),
            stands: self.job.stands(),
            completing: self.job.goal() == Some(Goal::Pivot),
            complete: self.job.is_complete(),
            io_status: self.job.io_status(),
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            at: Box::new(at),
        }
    }

    /// Measures how fast the copy is.
    pub fn measure(&mut self) {
        self.pace.note(self.begun.elapsed(), self.counters());
    }

    fn counters(&self) -> Counters {
        let stats = &self.job.mirror().stats;
        Counters {
            copied: stats.copied.load(Ordering::Relaxed),
            dirtied: stats.dirtied.load(Ordering::Relaxed),
            guest: stats.guest.load(Ordering::Relaxed),
            guest_writes: stats.guest_writes.load(Ordering::Relaxed),
            delay_ns: stats.delay_ns.load(Ordering::Relaxed),
        }
    }

    /// How it stands.
    pub fn status(&self, export: &Export) -> Status {
        let mirror = self.job.mirror();
        let (counters, remaining, backlog) = (self.counters(), self.job.remaining(), mirror.backlog());
        let (copied, seeded) = (counters.copied, mirror.stats.seeded.load(Ordering::Relaxed));
        let (phase, rates) = (self.job.phase(), self.pace.rates());
        let rests = self.job.is_paused() || self.job.backs_off().is_some();
        let eta = match phase {
            Phase::Seeding | Phase::Converging if !rests => self.pace.eta(remaining),
            Phase::Ready | Phase::Pivoting => Eta { likely: Some(0), low: Some(0), high: Some(0) },
            _ => Eta::default(),
        };
        // Before everything was brought over once the target is not behind: it is not there yet.
        let follows = matches!(phase, Phase::Converging | Phase::Ready | Phase::Pivoting);
        let lag = follows.then(|| self.pace.lag(self.begun.elapsed(), counters, backlog));
        let (alone, late) = mirror.courtesy.measured();
        let verified = self.job.verified();
        let is_verified = verified.is_some_and(|verified| verified.is_complete());
        Status {
            export: export.name.clone(),
            serving: self.job.serving().name(),
            phase: phase.name().to_owned(),
            // What is over does not rest.
            paused: self.job.is_paused() && !phase.is_over(),
            job: Some(self.job.id().to_owned()),
            mode: Some(self.job.mode()),
            total_bytes: self.brought_before + copied + remaining,
            copied_bytes: self.brought_before + copied,
            remaining_bytes: remaining,
            dirty_bytes: mirror.dirty.marked_bytes(),
            speed_bytes_per_s: mirror.rate.limit(),
            on_source_error: Some(self.job.on_error()[0]),
            on_target_error: Some(self.job.on_error()[1]),
            io_status: self.job.io_status(),
            back_off_ms: self.job.backs_off().map(millis),
            failed_bytes: mirror.missed_len(),
            fell_back: self.job.has_fallen_back(),
            late_bytes: mirror.late().1,
            pause_budget_ms: Some(millis(self.job.pause_max())),
            latency_factor: Some(mirror.courtesy.factor()),
            guest_p99_us: late.map(micros),
            guest_p99_alone_us: alone.map(micros),
            deadline_s: (self.asked.deadline > 0).then(|| seconds_until(self.asked.deadline)),
            max_lag_bytes: Some(self.asked.max_lag).filter(|bytes| *bytes > 0),
            max_slowdown: Some(self.asked.max_slowdown),
            slowdown: Some(thousandths(self.job.slowdown())),
            warning: self.job.shortfall().map(str::to_owned),
            buf_size_bytes: Some(self.room.runs_in(self.buf_size) * self.room.run_len),
            bitmap_memory_bytes: Some(mirror.bitmap_memory()),
            tables_memory_bytes: Some(mirror.tables_memory()),
            buffers_memory_bytes: Some(self.room.memory),
            shared_bytes: mirror.stats.shared.load(Ordering::Relaxed),
            eta_s: eta.likely,
            eta_low_s: eta.low,
            eta_high_s: eta.high,
            data_bytes: seeded,
            redundancy: (seeded > 0).then(|| thousandths(copied as f64 / seeded as f64)),
            copy_rate_bytes_per_s: rates.copied,
            dirty_rate_bytes_per_s: rates.dirtied,
            guest_rate_bytes_per_s: rates.guest,
            guest_delay_us: rates.delay.map(micros),
            lag_bytes: follows.then_some(backlog),
            lag_s: lag.map(|lag| thousandths(lag.as_secs_f64())),
            verified_bytes: verified.map(|verified| verified.bytes),
            verified: is_verified,
            verifying: verified.is_some() && !is_verified,
            mismatches: verified.map(|verified| verified.mismatches),
            rollback: self.rolls_back(),
            source: mirror.source.name(),
            target: Some(self.target.display().to_string()),
            error: self.job.error().map(str::to_owned).or_else(|| self.job.lateness()),
            notes: self.notes.clone(),
        }
    }

    /// How the chunks of its disk stand, in `cells` parts.
    pub fn map(&self, export: &str, cells: u64) -> MirrorMap {
        let mirror = self.job.mirror();
        let cells = mirror.dirty.cells(cells);
        let list = |number: fn(&Cell) -> u64| cells.iter().map(number).collect();
        MirrorMap {
            export: export.to_owned(),
            job: self.job.id().to_owned(),
            size_bytes: mirror.source.size(),
            chunk_bytes: mirror.dirty.chunk_len(),
            chunks: list(|cell| cell.chunks),
            copied: list(|cell| cell.copied),
            dirty: list(|cell| cell.marked),
            copying: list(|cell| cell.claimed),
        }
    }

    /// Ends the threads of a job that is over, or that nobody will see the end of, and leaves the
    /// disk that is served no more as tidy as it can be, unless it is kept. What is shared of a job that can go on.
    pub fn close(self, keep: bool) -> Option<Arc<Mirror>> {
        let (mirror, phase) = (Arc::clone(self.job.mirror()), self.job.phase());
        mirror.hold(true);
        mirror.target.hurry(phase != Phase::Pivoted);
        self.threads.into_iter().for_each(Worker::end);
        // A settle of its own may be under way, and would keep another one waiting.
        drop(self.job);
        self.back.into_iter().for_each(|back| back.end());
        if keep {
            return None;
        }
        let left: &Disk = if phase == Phase::Pivoted { &mirror.source } else { &mirror.target };
        let closed = left.chain().top().close();
        if let Err(error) = &closed {
            tracing::warn!("closing an image that is served no more: {}", error.one_line());
        }
        (closed.is_ok() && !phase.is_over() && !left.is_poisoned()).then_some(mirror)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Until a moment that is in seconds since 1970; 0 where it has gone by.
fn seconds_until(moment: u64) -> u64 {
    moment.saturating_sub(SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs())
}

/// What a job is made of that is asked for so; the seeder has been everywhere.
fn parts(request: &MirrorRequest, id: String, mirror: Arc<Mirror>, export: &Export) -> Parts {
    Parts {
        id,
        gate: Arc::clone(&export.gate),
        target_is_zero: false,
        seen: mirror.source.size(),
        mirror,
        sync_rest: SYNC_REST,
        mode: request.mode,
        on_source_error: request.on_source_error,
        on_target_error: request.on_target_error,
        pause_max: Duration::from_millis(request.pause_budget),
        limits: limits(request),
        verify: request.verify,
    }
}

/// To three digits behind the point.
fn thousandths(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// Nothing was started, so nothing is left behind of a job that was to begin; one that was to go on keeps what it has.
fn unbegin(is_new: bool, plan: &Plan, export: &Export, state: &StateFolder) {
    if is_new {
        let _ = state.forget_job(&export.name);
        plan.unmake();
    }
}

/// A number that no other job has had.
fn job_number() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    (now.as_nanos() as u64) ^ u64::from(std::process::id()) << 48
}

/// As many copy threads as pay: direct I/O does not need this thread's processor, the page cache does. With memory for
/// `buf_size` bytes under way, if that is more than what is usual.
pub(super) fn copiers(mirror: &Arc<Mirror>, buf_size: u64) -> std::io::Result<(Vec<Worker>, Room)> {
    let direct = mirror.target.chain().top().file.is_direct();
    let count = if direct { 1 } else { 2 };
    let depth = depth(mirror, buf_size / count);
    let run_len = (depth.run_len as u64).max(mirror.dirty.chunk_len());
    let room = Room { run_len, runs: depth.slots as u64 * count, memory: depth.memory() as u64 * count };
    let workers = (0..count).map(|number| Worker::copier(Arc::clone(mirror), depth, number, count));
    Ok((workers.collect::<std::io::Result<_>>()?, room))
}

/// Runs of whole clusters, for one that is compressed would be inflated once for each run that it is in;
/// fewer of them where those are long, and a few always.
fn depth(mirror: &Mirror, buf_size: u64) -> Depth {
    const SLOTS_MIN: usize = 4;
    const SLOTS_MAX: usize = 64;
    const RUNS_MAX: usize = 8 << 20;
    let layers = mirror.source.chain().layers();
    let clusters: Vec<u32> = layers.iter().filter_map(|layer| layer.image.compressible()).collect();
    let (compressible, longest) = (!clusters.is_empty(), clusters.into_iter().max().unwrap_or(0) as usize);
    let run_len = longest.max(DEPTH.run_len);
    let wanted = usize::try_from(buf_size / run_len as u64).unwrap_or(SLOTS_MAX).min(SLOTS_MAX);
    let slots = (RUNS_MAX / run_len).clamp(SLOTS_MIN, DEPTH.slots).max(wanted);
    // Each run may be read as compressed clusters, which have whole pages each.
    let beside = if compressible { slots * run_len * 5 / 4 } else { DEPTH.beside };
    Depth { slots, run_len, beside }
}
