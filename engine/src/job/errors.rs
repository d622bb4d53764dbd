//! What a job does about errors of its two sides: as its policies say, and never to the guest.
//!
//! ```text
//! copies ─► an error ─► report        the job ends
//!    ▲                  stop, enospc  it rests until it is resumed
//!    │                  ignore        it rests a moment, and goes on as if nothing had been
//!    │                  back-off      it rests, twice as long each time ─► one copy tries what had failed
//!    │                                        ▲                                   │
//!    └── nothing is missed any more           └──────────── an error ─────────────┤
//!    └─────────────────────────────────────────────────────── it can be done ◄────┘
//! ```
//!
//! The fault of the mirror stands while copying rests, so no copier begins anything, and guests write to the source
//! alone. What failed is marked and *missed* (`mirror`): as long as anything is, the job is not ready.
use super::{Job, Stage};
use crate::control::OnError;
use crate::control::jobs::{ErrorAction, IoStatus};
use crate::fault::{self, planted};
use rustix::io::Errno;
use std::time::Duration;

/// How long a copy that goes on after an error waits first.
const RETRY: Duration = Duration::from_millis(500);
/// The first rest of one that backs off, and the longest.
const REST_MIN: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(10);

/// One side failed, and what is done about it.
#[derive(Debug)]
pub struct IoError {
    /// The target failed; else the source.
    pub target: bool,
    /// What is done.
    pub action: ErrorAction,
    /// How it failed.
    pub message: String,
}

/// What `policy` has done about an error.
pub fn action_of(policy: OnError, no_space: bool) -> ErrorAction {
    match policy {
        OnError::Stop => ErrorAction::Stop,
        OnError::Enospc if no_space => ErrorAction::Stop,
        // To QEMU's clients: it goes on.
        OnError::Ignore | OnError::BackOff => ErrorAction::Ignore,
        OnError::Report | OnError::Enospc => ErrorAction::Report,
    }
}

/// For how long a copy that goes on by itself rests, after a rest of `last` that came to nothing.
pub fn rest_after(policy: OnError, last: Option<Duration>) -> Duration {
    match last {
        _ if policy != OnError::BackOff => RETRY,
        _ if planted(fault::Fault::TryAtOnce) => Duration::ZERO,
        Some(last) => (2 * last).min(REST_MAX),
        None => REST_MIN,
    }
}

/// What an error leaves of the job's standing.
pub fn io_status_of(no_space: bool) -> IoStatus {
    if no_space { IoStatus::Nospace } else { IoStatus::Failed }
}

/// True where there was no space on the file system, or none for this user.
pub fn is_no_space(errno: Option<i32>) -> bool {
    [Errno::NOSPC, Errno::DQUOT].iter().any(|known| Some(known.raw_os_error()) == errno)
}

/// Copying rests after an error, and goes on by itself.
#[derive(Debug)]
pub(super) struct Rest {
    /// The rests grow, and what failed is tried by one copy alone.
    backs_off: bool,
    len: Duration,
    /// Until when; `None` while it is being tried.
    until: Option<Duration>,
    /// How many copies had answered when that began.
    answers: u64,
}

impl Rest {
    /// The one after `last`, from `now` on.
    fn after(last: Option<&Self>, policy: OnError, now: Duration) -> Self {
        let len = rest_after(policy, last.filter(|last| last.backs_off).map(|last| last.len));
        Self { backs_off: policy == OnError::BackOff, len, until: Some(now + len), answers: 0 }
    }

    /// It need not be waited for any longer.
    pub fn end_now(&mut self) {
        self.until = Some(Duration::ZERO);
    }
}

impl Job {
    /// What failed since it was asked last.
    pub fn take_io_error(&mut self) -> Option<IoError> {
        self.io_error.take()
    }

    /// What its last error did to it.
    pub fn io_status(&self) -> IoStatus {
        self.io_status
    }

    /// For how long it rests before it tries again what failed, or did so before the try that is under way; `None`
    /// where it does not back off.
    pub fn backs_off(&self) -> Option<Duration> {
        self.rest.as_ref().filter(|rest| rest.backs_off).map(|rest| rest.len)
    }

    /// What is done when the source fails, and when the target does.
    pub fn on_error(&self) -> [OnError; 2] {
        [self.parts.on_source_error, self.parts.on_target_error]
    }

    /// Changes that from now on: an error that stands is decided upon anew.
    pub fn set_on_error(&mut self, [source, target]: [OnError; 2]) {
        let before = self.on_error();
        (self.parts.on_source_error, self.parts.on_target_error) = (source, target);
        self.choose_patience();
        let stands = self.parts.mirror.standing_fault().is_some_and(|(is_target, ..)| {
            let side = usize::from(is_target);
            before[side] != self.on_error()[side]
        });
        if !stands {
            return;
        }
        if std::mem::take(&mut self.stopped) {
            self.paused = false;
            self.io_status = IoStatus::Ok;
        }
        self.rest = None;
    }

    /// True where what failed on the side that failed is tried again without anybody's asking.
    pub(super) fn tries_again(&self) -> bool {
        let policy = match self.parts.mirror.standing_fault() {
            Some((false, ..)) => self.parts.on_source_error,
            _ => self.parts.on_target_error,
        };
        matches!(policy, OnError::BackOff | OnError::Ignore)
    }

    /// Somebody else waits and tries again where it backs off: a target on another server has to say soon that it is
    /// out of reach.
    pub(super) fn choose_patience(&self) {
        self.parts.mirror.target.fail_soon(self.parts.on_target_error == OnError::BackOff);
    }

    /// True while what failed is being tried again.
    pub(super) fn is_trying(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.until.is_none())
    }

    pub(super) fn look_at_errors(&mut self, now: Duration) {
        if !self.paused {
            self.end_rest(now);
        }
        let active = matches!(self.stage, Stage::Seeding(_) | Stage::Copying);
        let rests = self.rest.as_ref().is_some_and(|rest| rest.until.is_some());
        if !active || self.paused || rests {
            return;
        }
        match self.parts.mirror.standing_fault() {
            Some((target, errno, words)) => self.decide(target, errno, &words, now),
            None if self.rest.as_ref().is_some_and(|rest| self.parts.mirror.answers() > rest.answers) => {
                self.recover();
            }
            None if self.rest.is_none() && self.parts.mirror.missed_len() == 0 => self.error = None,
            None => {}
        }
    }

    /// Lets copiers try again when it has rested for long enough.
    fn end_rest(&mut self, now: Duration) {
        let Some(rest) = self.rest.as_mut().filter(|rest| rest.until.is_some_and(|until| until <= now)) else { return };
        (rest.until, rest.answers) = (None, self.parts.mirror.answers());
        let backs_off = rest.backs_off;
        if !backs_off {
            self.rest = None;
        }
        self.parts.mirror.set_probe(backs_off);
        self.parts.mirror.clear_fault();
    }

    /// What had failed can be done again.
    pub(super) fn recover(&mut self) {
        if self.rest.take().is_some() {
            tracing::info!(job = self.parts.id, "what had failed can be done again: the copy goes on");
            self.parts.mirror.set_probe(false);
            (self.io_status, self.error) = (IoStatus::Ok, None);
        }
    }

    fn decide(&mut self, target: bool, errno: Option<i32>, words: &str, now: Duration) {
        let policy = match target {
            // No retry makes good what a flush has lost.
            true if self.parts.mirror.target.is_poisoned() => OnError::Report,
            true => self.parts.on_target_error,
            false => self.parts.on_source_error,
        };
        let no_space = is_no_space(errno);
        let message = format!("{}: {words}", if target { "target" } else { "source" });
        self.error = Some(message.clone());
        let action = action_of(policy, no_space);
        let last = self.rest.take();
        self.parts.mirror.set_probe(false);
        let io_status = io_status_of(no_space);
        match action {
            // Until it is resumed.
            ErrorAction::Stop => (self.io_status, self.paused, self.stopped) = (io_status, true, true),
            ErrorAction::Ignore => {
                let rest = Rest::after(last.as_ref(), policy, now);
                if rest.backs_off {
                    self.io_status = io_status;
                    tracing::warn!(
                        job = self.parts.id,
                        "{message}; it is tried again after {} ms",
                        rest.len.as_millis()
                    );
                }
                self.rest = Some(rest);
            }
            ErrorAction::Report => {
                self.broken = true;
                self.detach();
            }
        }
        self.io_error = Some(IoError { target, action, message });
    }
}
