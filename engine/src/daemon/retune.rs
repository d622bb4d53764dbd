//! What of a job can be changed while it runs, and that the next daemon goes on with it so.
use super::jobs::Active;
use crate::control::{Changes, Code, Event, MirrorRequest, PAUSE_BUDGET_MAX, Refusal};
use crate::job::Limits;
use crate::mirror::Verified;
use crate::state::{KeptJob, StateFolder};
use crate::target::NO_BLOCKING;
use crate::{control::Mode, job::IoError};
use std::time::{Duration, SystemTime};

/// How far events of a job's errors are apart at least, where it goes on by itself: a few a second.
const EVENTS_REST: Duration = Duration::from_millis(300);

/// What the copy threads of a job have memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes a run at most.
    pub run_len: u64,
    /// How many may be under way, all threads together.
    pub runs: u64,
    /// Bytes of memory that all threads together have for that.
    pub memory: u64,
}

impl Room {
    /// How many runs may be under way in `buf_size` bytes, of which 0 are as many as there are.
    pub fn runs_in(self, buf_size: u64) -> u64 {
        match buf_size {
            0 => self.runs,
            bytes => (bytes / self.run_len).clamp(1, self.runs),
        }
    }
}

/// What a request's bounds are for its job.
pub(in crate::daemon) fn limits(request: &MirrorRequest) -> Limits {
    let at = (request.deadline > 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_secs(request.deadline));
    Limits {
        deadline: at.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default()),
        slowdown_max: request.max_slowdown,
        lag_max: request.max_lag,
    }
}

/// Bounds that nobody can keep.
pub(in crate::daemon) fn refuse_bounds(changes: &Changes) -> Result<(), Refusal> {
    let refuse = |message: String| Err(Refusal::new(Code::InvalidArg, message));
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    match changes {
        Changes { pause_budget: Some(pause), .. } if !(1..=PAUSE_BUDGET_MAX).contains(pause) => {
            refuse(format!("a pause of {pause} ms: it has to be from 1 to {PAUSE_BUDGET_MAX} ms"))
        }
        Changes { max_slowdown: Some(0), .. } => {
            refuse("a max-slowdown of 0: it says how many times as slow guest writes may be made, from 1 on".into())
        }
        Changes { deadline: Some(at @ 1..), .. } if *at <= now || *at > DEADLINE_MAX => refuse(format!(
            "a deadline of {at}: it is in seconds since 1970, and has to be after this moment, {now}, and before \
             {DEADLINE_MAX}"
        )),
        _ => Ok(()),
    }
}

/// The last second of the year 9999.
const DEADLINE_MAX: u64 = 253_402_300_799;

/// When events that could come too often were sent last.
#[derive(Debug, Default)]
pub(super) struct Seldom(Option<Duration>);

impl Seldom {
    /// Whether one may be sent `now`; it is.
    fn may(&mut self, now: Duration) -> bool {
        let may = self.0.is_none_or(|last| now >= last + EVENTS_REST);
        if may {
            self.0 = Some(now);
        }
        may
    }
}

/// What was told of a job's errors, and when.
#[derive(Debug, Default)]
pub(super) struct ErrorNews {
    errors: Seldom,
    back_off: Seldom,
    /// It was told that the job backs off.
    backs_off: bool,
}

/// How a job stands with its errors: for how long it rests, and why.
pub(super) struct Standing<'a> {
    pub export: &'a str,
    pub job: &'a str,
    pub backs_off: Option<Duration>,
    pub why: Option<&'a str>,
}

impl ErrorNews {
    /// What there is to tell `now`; of errors that the job goes on after not all.
    pub fn take(&mut self, now: Duration, standing: &Standing, error: Option<IoError>) -> Vec<Event> {
        let mut events = Vec::new();
        let (export, job, backs_off) = (standing.export.to_owned(), standing.job.to_owned(), standing.backs_off);
        if let Some(IoError { target, action, message }) = error
            && (self.errors.may(now) || backs_off.is_none())
        {
            events.push(Event::IoError { export: export.clone(), job: job.clone(), target, action, message });
        }
        if backs_off.is_some() != self.backs_off && self.back_off.may(now) {
            self.backs_off = backs_off.is_some();
            let message = standing.why.filter(|_| backs_off.is_some()).map(str::to_owned);
            events.push(Event::BackOff { export, job, rest_ms: backs_off.map(millis), message });
        }
        events
    }
}

impl Active {
    /// Changes it from now on, in whatever phase it is.
    pub fn change(&mut self, changes: Changes) -> Result<(), Refusal> {
        let Changes { speed, mode, on_source_error, on_target_error, pause_budget, buf_size, .. } = changes;
        refuse_bounds(&changes)?;
        let export = &self.kept.request.export;
        if mode == Some(Mode::WriteBlocking) && self.job.mirror().target.is_remote() {
            return Err(Refusal::new(Code::ConfigUnsupported, format!("export {export}: {NO_BLOCKING}")));
        }
        if let Some(speed) = speed {
            self.job.mirror().rate.set(speed);
            self.job.mirror().work.ring();
        }
        if let Some(mode) = mode {
            self.job.set_mode(mode);
        }
        let [source, target] = self.job.on_error();
        self.job.set_on_error([on_source_error.unwrap_or(source), on_target_error.unwrap_or(target)]);
        if let Some(pause_budget) = pause_budget {
            self.job.set_pause_max(Duration::from_millis(pause_budget));
        }
        if let Some(buf_size) = buf_size {
            self.buf_size = buf_size;
            self.job.mirror().set_runs_max(self.room.runs_in(buf_size));
        }
        if let Some(factor) = changes.latency_factor {
            self.job.mirror().courtesy.set_factor(factor);
        }
        changes.apply(&mut self.asked);
        if changes.deadline.is_some() || changes.max_slowdown.is_some() || changes.max_lag.is_some() {
            self.job.set_limits(limits(&self.asked));
        }
        Ok(())
    }

    /// Keeps what was changed, so that it holds through a kill.
    pub fn keep(&mut self, state: &StateFolder) {
        let [on_source_error, on_target_error] = self.job.on_error();
        let request = MirrorRequest {
            speed: self.job.mirror().rate.limit(),
            mode: self.job.mode(),
            on_source_error,
            on_target_error,
            pause_budget: millis(self.job.pause_max()),
            buf_size: self.buf_size,
            ..self.asked.clone()
        };
        let now = KeptJob { paused: self.job.is_paused_by_hand(), request, ..self.kept.clone() };
        if now == self.kept || self.job.phase().is_over() {
            return;
        }
        // It holds for this life in any case: somebody needs it now.
        if let Err(error) = state.keep_job(&now) {
            tracing::error!("what was changed of a job does not hold through a restart: {}", error.one_line());
            return;
        }
        self.kept = now;
    }

    /// What there is to tell of its errors; of those that it goes on after not all.
    pub fn errors(&mut self) -> Vec<Event> {
        let (export, job) = (self.kept.request.export.clone(), self.job.id().to_owned());
        let error = self.job.take_io_error();
        let standing = Standing { export: &export, job: &job, backs_off: self.job.backs_off(), why: self.job.error() };
        let mut events = self.error_news.take(self.begun.elapsed(), &standing, error);
        events.extend(self.verification(export, job));
        events
    }

    /// What there is to tell of what was read back: of mismatches not each.
    fn verification(&mut self, export: String, job: String) -> Vec<Event> {
        let Some(Verified { bytes, mismatches, last_at, .. }) = self.job.verified() else { return Vec::new() };
        let is_over = self.job.verified().is_some_and(|verified| verified.is_complete());
        let mut events = Vec::new();
        // Another one has begun since.
        self.told_mismatches = self.told_mismatches.min(mismatches);
        if let Some(offset) = last_at.filter(|_| mismatches > self.told_mismatches)
            && (is_over || self.mismatches_told.may(self.begun.elapsed()))
        {
            self.told_mismatches = mismatches;
            events.push(Event::Mismatch { export: export.clone(), job: job.clone(), offset, mismatches });
        }
        if is_over && !std::mem::replace(&mut self.told_verified, is_over) {
            events.push(Event::Verified { export, job, verified_bytes: bytes, mismatches });
        }
        self.told_verified = is_over;
        events
    }

    /// Whether it may be told now where it stands: not each time that it fails again, where it fails all the time.
    pub fn may_tell(&mut self) -> bool {
        let fails = self.job.backs_off().is_some() || self.error_news.backs_off;
        !fails || self.job.phase().is_over() || self.stands_told.may(self.begun.elapsed())
    }
}

/// In whole milliseconds.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{EVENTS_REST, Room, Seldom, refuse_bounds};
    use crate::control::{Changes, PAUSE_BUDGET_MAX};
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_buffer_is_some_runs_and_no_more_than_there_is_memory_for() {
        let room = Room { run_len: 256 << 10, runs: 16, memory: 4 << 20 };
        for (buf_size, runs) in [(0, 16), (1, 1), (256 << 10, 1), (1 << 20, 4), (4 << 20, 16), (1 << 40, 16)] {
            assert_eq!(room.runs_in(buf_size), runs, "{buf_size}");
        }
    }

    #[test]
    fn bounds_that_nobody_can_keep_are_refused() {
        let pause = |pause| refuse_bounds(&Changes { pause_budget: Some(pause), ..Changes::default() });
        assert!([1, 5000, PAUSE_BUDGET_MAX].into_iter().all(|millis| pause(millis).is_ok()));
        assert!([0, PAUSE_BUDGET_MAX + 1].into_iter().all(|millis| pause(millis).is_err()));
        let slowdown = |max| refuse_bounds(&Changes { max_slowdown: Some(max), ..Changes::default() });
        assert!(slowdown(0).is_err() && slowdown(1).is_ok());
        let deadline = |at| refuse_bounds(&Changes { deadline: Some(at), ..Changes::default() });
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        assert!(deadline(0).is_ok() && deadline(now + 60).is_ok(), "no deadline, and one in a minute");
        assert!(deadline(1).is_err() && deadline(now - 1).is_err() && deadline(u64::MAX).is_err());
    }

    #[test]
    fn a_few_events_a_second_are_sent_however_many_there_are() {
        let mut seldom = Seldom::default();
        let sent = (0..10_000).filter(|millis| seldom.may(Duration::from_millis(*millis))).count();
        assert_eq!(sent as u128, Duration::from_secs(10).as_millis().div_ceil(EVENTS_REST.as_millis()));
    }
}
