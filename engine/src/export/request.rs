//! One guest request, from the gate to the word that it is done.
//!
//! ```text
//! [ slowed ] ─► enter the gate ─► claim (write-both) ─► source ─► mark, or the target as well ─► flush (FUA)
//! ```
//!
//! Where the target takes too long, for this request or for whoever has a claim that it waits for, it goes on without
//! it: the source has the write and its chunks are marked. What the target has begun by then is `late`.
//!
//! A request reads the mode once and keeps its pass to its end: one request sees one route and one
//! mode, whatever is switched meanwhile. A failure of the target is the job's business; the guest
//! hears of the source alone.
use super::gate::{Gate, Pass};
use super::late::Late;
use crate::dirty::Claim;
use crate::disk::{Status, Task, Tools};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Completion, Io, Loan, Op, Token};
use crate::mirror::{Mirror, TargetTask};
use crate::planes::Flight;
use formats::error::{Error, Result};
use formats::image::Zeroing;
use formats::range::ByteRange;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long one write waits for a bound of the job at most: no guest takes its disk for dead.
const SLOWED_MAX: Duration = Duration::from_secs(5);

/// What a guest wants.
#[derive(Debug)]
pub enum Action {
    /// Fill the buffer.
    Read(Buffer),
    /// Write the buffer.
    Write(Buffer),
    /// Make it read as zeroes.
    Zero {
        /// What becomes of the space.
        zeroing: Zeroing,
        /// Only if that is faster than writing them.
        fast: bool,
    },
    /// It will be read soon.
    Prefetch,
    /// Make durable what was answered before.
    Flush,
}

/// One guest request, stepped like a `Task`. The target's tokens are behind the source's, for both can be under way.
pub struct GuestRequest {
    range: ByteRange,
    stage: Stage,
    pass: Option<Pass>,
    /// Its note through a kill, where the disk is mirrored.
    flight: Option<Flight>,
    /// It has to be durable before the answer.
    fua: bool,
    /// It changes the disk.
    changes: bool,
    /// It makes zeroes.
    zeroing: Option<Zeroing>,
    /// Parts of the range that go to both sides still, with their claims; the first is the last.
    both: Vec<(ByteRange, Claim)>,
    /// What goes to both sides is decided.
    decided: bool,
    outcome: Result<()>,
    buf: Option<Buffer>,
    /// Since when it has been waiting for the mirror alone.
    delayed_since: Option<Duration>,
    /// A bound of the job has kept it waiting already.
    slowed: bool,
    /// When it came through the gate, where the disk is mirrored.
    begun: Option<Duration>,
    /// What the target has begun on this thread, and is waited for no more.
    late: Option<Late>,
}

enum Stage {
    /// Outside the gate, for a bound of the job: it keeps nobody waiting.
    Slowed(Action),
    Waiting(Action),
    Source(Task),
    /// The target's part of a write to both sides, and the payload.
    Target(TargetTask, Option<Loan>),
    Flushing(Task),
    Done,
}

impl GuestRequest {
    /// How many tokens it may use, from the one it is given.
    pub const TOKENS: u64 = 2 * Task::TOKENS;

    /// The target's tokens, of a request with those from `base` on.
    pub fn of_target(base: Token) -> Token {
        Token(base.0 + Task::TOKENS)
    }

    /// A request for `range`, which is inside the disk; a flush has none.
    pub fn new(action: Action, range: ByteRange, fua: bool) -> Self {
        let zeroing = if let Action::Zero { zeroing, .. } = action { Some(zeroing) } else { None };
        Self {
            range,
            changes: matches!(action, Action::Write(_) | Action::Zero { .. }),
            stage: Stage::Waiting(action),
            pass: None,
            flight: None,
            fua,
            zeroing,
            both: Vec::new(),
            decided: false,
            outcome: Ok(()),
            buf: None,
            delayed_since: None,
            slowed: false,
            begun: None,
            late: None,
        }
    }

    /// Starts what can be started. Never waits.
    pub fn step<I: Io>(&mut self, gate: &Gate, tools: &mut Tools<I>, base: Token) -> Status {
        loop {
            let status = match &mut self.stage {
                Stage::Waiting(_) => {
                    if !self.come_in(gate, tools) {
                        return Status::Blocked;
                    }
                    if let Some(after) = self.slow_down(tools) {
                        tools.io.submit(base, Op::Timeout { after });
                        return Status::Busy;
                    }
                    if !self.enter(tools) {
                        return Status::Blocked;
                    }
                    continue;
                }
                Stage::Slowed(_) => return Status::Busy,
                Stage::Source(task) | Stage::Flushing(task) => task.step(tools, base),
                Stage::Target(task, _) => task.step(tools, Self::of_target(base)),
                Stage::Done => return Status::Done,
            };
            let mirror = self.begun.and_then(|_| self.mirror());
            match status {
                Status::Done => self.advance(),
                _ if self.is_late(tools) => self.go_on_without_target(),
                status => return status,
            }
            if let (Stage::Done, Some(mirror), Some(begun)) = (&self.stage, &mirror, self.begun) {
                mirror.courtesy.note(tools.io.now().saturating_sub(begun));
            }
            match self.stage {
                Stage::Target(..) => self.begin_delay(tools),
                _ => self.end_delay(tools, mirror),
            }
        }
    }

    /// When it will have waited for the mirror for long enough, if it does: it has to be stepped then.
    pub fn patience_ends(&self) -> Option<Duration> {
        let waits = match self.stage {
            Stage::Target(..) => true,
            Stage::Waiting(_) => !self.decided,
            Stage::Slowed(_) | Stage::Source(_) | Stage::Flushing(_) | Stage::Done => false,
        };
        let since = self.delayed_since.filter(|_| waits)?;
        Some(since + self.mirror()?.patience)
    }

    fn is_late<I: Io>(&self, tools: &Tools<I>) -> bool {
        self.patience_ends().is_some_and(|ends| tools.io.now() >= ends)
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        if let Some(late) = self.late.as_mut().filter(|_| done.token >= Self::of_target(base)) {
            return late.complete(tools, Self::of_target(base), done);
        }
        match &mut self.stage {
            Stage::Source(task) | Stage::Flushing(task) => task.complete(tools, base, done),
            Stage::Target(task, _) => task.complete(tools, Self::of_target(base), done),
            Stage::Slowed(_) => {
                if let Stage::Slowed(action) = std::mem::replace(&mut self.stage, Stage::Done) {
                    self.stage = Stage::Waiting(action);
                }
            }
            Stage::Waiting(_) | Stage::Done => unreachable!("nothing is under way"),
        }
    }

    /// What became of it, and the buffer it came with. After `Status::Done`, and after `take_late`.
    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        (self.outcome, self.buf)
    }

    /// What of it the target has under way still: to be kept, with the target's tokens, until that is done. After
    /// `Status::Done`.
    pub fn take_late(&mut self) -> Option<Late> {
        self.late.take()
    }

    /// Through the gate. False where it has to wait.
    fn come_in<I: Io>(&mut self, gate: &Gate, tools: &Tools<I>) -> bool {
        if self.pass.is_none() {
            self.pass = gate.enter(tools.waker);
            if self.pass.as_ref().is_some_and(|pass| pass.route().mirror.is_some()) {
                self.begun = Some(tools.io.now());
            }
        }
        self.pass.is_some()
    }

    /// For how long it has to wait for a bound of the job, if it has to, and has not yet: outside again, so that it keeps
    /// nobody waiting.
    fn slow_down<I: Io>(&mut self, tools: &Tools<I>) -> Option<Duration> {
        let mirror = self.mirror().filter(|mirror| self.changes && !self.slowed && mirror.brake.limit() > 0)?;
        self.slowed = true;
        let wait = mirror.brake.queue(tools.io.now(), self.range.len()).min(SLOWED_MAX);
        if wait.is_zero() {
            return None;
        }
        mirror.stats.delayed(wait);
        if let Stage::Waiting(action) = std::mem::replace(&mut self.stage, Stage::Done) {
            self.stage = Stage::Slowed(action);
        }
        self.pass = None;
        Some(wait)
    }

    /// To the claims, where both sides are written, and to the source. False where it has to wait.
    fn enter<I: Io>(&mut self, tools: &Tools<I>) -> bool {
        let Some(pass) = &self.pass else { return false };
        let disk = Arc::clone(&pass.route().disk);
        if self.changes && disk.read_only() {
            return self.refuse(Error::invalid(format!("{}: the export is read-only", disk.name())));
        }
        if let Some(mirror) = pass.route().mirror.clone().filter(|_| self.changes) {
            if !self.claim(&mirror, tools) || !self.depart(&mirror, tools) {
                self.begin_delay(tools);
                return false;
            }
            self.end_delay(tools, Some(Arc::clone(&mirror)));
            if planted(Fault::MarkBeforeWrite) {
                mirror.written(self.range);
            }
        }
        let Stage::Waiting(action) = std::mem::replace(&mut self.stage, Stage::Done) else { return true };
        self.stage = Stage::Source(match action {
            Action::Read(buf) => Task::read(disk, self.range, buf),
            Action::Write(buf) => Task::write(disk, self.range, buf),
            Action::Zero { zeroing, fast: false } => Task::zero(disk, self.range, zeroing),
            Action::Zero { zeroing, fast: true } => Task::zero_fast(disk, self.range, zeroing),
            Action::Prefetch => Task::prefetch(disk, self.range),
            Action::Flush => Task::flush(disk),
        });
        true
    }

    /// From here on it waits for the mirror: without one it would go on.
    fn begin_delay<I: Io>(&mut self, tools: &Tools<I>) {
        self.delayed_since.get_or_insert_with(|| tools.io.now());
    }

    /// It goes on.
    fn end_delay<I: Io>(&mut self, tools: &Tools<I>, mirror: Option<Arc<Mirror>>) {
        if let (Some(since), Some(mirror)) = (self.delayed_since.take(), mirror) {
            mirror.stats.delayed(tools.io.now().saturating_sub(since));
        }
    }

    /// Notes that it is under way. Last of all, so that whoever has a place does not wait for anything.
    fn depart<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>) -> bool {
        self.flight = mirror.planes.depart(self.range).or_else(|| {
            mirror.planes.landed().listen(tools.waker);
            mirror.planes.depart(self.range)
        });
        self.flight.is_some()
    }

    /// It is over for the mirror: marked, or on both sides.
    fn land(&mut self) {
        if let (Some(flight), Some(mirror)) = (self.flight.take(), self.mirror()) {
            mirror.planes.land(flight);
        }
    }

    fn refuse(&mut self, error: Error) -> bool {
        if let Stage::Waiting(Action::Write(buf)) = std::mem::replace(&mut self.stage, Stage::Done) {
            self.buf = Some(buf);
        }
        self.outcome = Err(error);
        self.pass = None;
        true
    }

    /// Claims what goes to both sides: the chunks that are not marked, for the copy has been there.
    /// What is marked goes to the source alone and stays marked, so the backlog only shrinks.
    fn claim<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>) -> bool {
        if self.is_late(tools) {
            mirror.fall_back();
        }
        if self.decided || !self.goes_to_both(mirror) || planted(Fault::ClaimTargetOnly) {
            self.decided = true;
            return true;
        }
        self.try_claim(mirror) || {
            mirror.released().listen(tools.waker);
            self.try_claim(mirror)
        }
    }

    /// A discard is marked instead: what it leaves behind depends on each image's clusters.
    fn goes_to_both(&self, mirror: &Mirror) -> bool {
        mirror.write_both() && self.zeroing != Some(Zeroing::Discard)
    }

    fn try_claim(&mut self, mirror: &Mirror) -> bool {
        for (run, marked) in mirror.dirty.runs(self.range) {
            if marked {
                continue;
            }
            match mirror.dirty.claim(run) {
                Some(claim) => self.both.push((run, claim)),
                None => {
                    // Not rung: this request would wake itself, again and again while it waits. Whom a claim
                    // of this moment turned away is woken by the claim that turned this one away, or by
                    // this request's own end.
                    self.both.drain(..).for_each(|(_, claim)| mirror.dirty.release(claim));
                    return false;
                }
            }
        }
        self.both.reverse();
        self.decided = true;
        true
    }

    /// What follows a task that is done.
    fn advance(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Source(task) => {
                let disk = Arc::clone(task.disk());
                let (outcome, buf) = task.end();
                (self.outcome, self.buf) = (outcome, buf);
                self.source_done();
                if matches!(self.stage, Stage::Done) && self.fua && self.outcome.is_ok() {
                    self.stage = Stage::Flushing(Task::flush(disk));
                }
            }
            Stage::Target(task, loan) => self.target_done(task, loan),
            Stage::Flushing(task) => self.outcome = task.end().0,
            Stage::Slowed(_) | Stage::Waiting(_) | Stage::Done => {}
        }
        self.leave_if_done();
    }

    fn leave_if_done(&mut self) {
        if !matches!(self.stage, Stage::Done) {
            return;
        }
        self.land();
        self.pass = None;
    }

    /// The source has the write, or failed at it: mark what the target does not get now.
    fn source_done(&mut self) {
        let Some(mirror) = self.mirror() else { return };
        if planted(Fault::LandBeforeMark) {
            self.land();
        }
        if !self.changes || planted(Fault::MarkBeforeWrite) {
            return;
        }
        mirror.stats.guest.fetch_add(self.range.len(), Ordering::Relaxed);
        mirror.stats.guest_writes.fetch_add(1, Ordering::Relaxed);
        if planted(Fault::ClaimTargetOnly) && self.goes_to_both(&mirror) {
            self.try_claim(&mirror);
        }
        if self.outcome.is_err() {
            // Some of its sectors may have changed: the target has to get all of them again.
            if !planted(Fault::NoMarkOnFailure) {
                mirror.written(self.range);
            }
            self.both.drain(..).for_each(|(_, claim)| mirror.release(claim, None));
            return;
        }
        if self.both.is_empty() {
            if !(planted(Fault::LookAtTheModeTwice) && self.goes_to_both(&mirror)) {
                mirror.written(self.range);
            }
            return;
        }
        self.mark_the_rest(&mirror);
        let loan = self.buf.take().map(Loan::new);
        self.next_target(loan);
    }

    /// Marks what is between the parts that go to both sides.
    fn mark_the_rest(&self, mirror: &Mirror) {
        let mut at = self.range.start;
        for (run, _) in self.both.iter().rev() {
            if at < run.start {
                mirror.written(ByteRange { start: at, end: run.start });
            }
            at = run.end;
        }
        if at < self.range.end {
            mirror.written(ByteRange { start: at, end: self.range.end });
        }
    }

    /// Starts the target's next part, or ends.
    fn next_target(&mut self, mut loan: Option<Loan>) {
        let Some(mirror) = self.mirror() else { return };
        if mirror.has_fallen_back() {
            self.mark_what_is_left(&mirror);
        }
        let Some((run, _)) = self.both.last() else {
            self.buf = loan.map(Loan::end);
            self.flush_if_asked(&mirror);
            return;
        };
        let task = match (&mut loan, self.zeroing) {
            (Some(loan), _) => {
                let piece = loan.lend_at((run.start - self.range.start) as usize, run.len() as usize);
                mirror.write_target(*run, piece)
            }
            (None, zeroing) => mirror.zero_target(*run, zeroing.unwrap_or(Zeroing::Unmap)),
        };
        self.stage = Stage::Target(task, loan);
    }

    fn flush_if_asked(&mut self, mirror: &Mirror) {
        if self.fua {
            self.stage = Stage::Flushing(Task::flush(Arc::clone(&mirror.source)));
        }
    }

    /// What of the target is not begun is marked instead.
    fn mark_what_is_left(&mut self, mirror: &Mirror) {
        for (run, claim) in self.both.drain(..) {
            mirror.written(run);
            mirror.release(claim, None);
        }
    }

    /// The target takes too long: what it lacks is marked, and nobody waits for it any more.
    fn go_on_without_target(&mut self) {
        let Some(mirror) = self.mirror() else { return };
        let Stage::Target(task, loan) = std::mem::replace(&mut self.stage, Stage::Done) else { return };
        let Some((run, claim)) = self.both.pop() else { return };
        let Some(pass) = self.pass.as_ref().map(Pass::again) else { return };
        mirror.fall_back();
        if !planted(Fault::NoMarkWhenLate) {
            mirror.written(run);
        }
        self.mark_what_is_left(&mirror);
        self.flush_if_asked(&mirror);
        self.late = Late::begin(task, loan, (run, claim), mirror, pass);
        self.leave_if_done();
    }

    fn target_done(&mut self, task: TargetTask, mut loan: Option<Loan>) {
        let (outcome, piece) = task.end();
        if let (Some(loan), Some(piece)) = (&mut loan, piece) {
            loan.give_back(piece);
        }
        let (Some(mirror), Some((run, claim))) = (self.mirror(), self.both.pop()) else { return };
        let brought = match outcome {
            Ok(()) => {
                mirror.stats.written_both.fetch_add(run.len(), Ordering::Relaxed);
                if planted(Fault::MarkWhatBothHave) {
                    mirror.written(run);
                }
                Some(run)
            }
            Err(error) => {
                if !planted(Fault::NoMarkOnTargetFailure) {
                    mirror.written(run);
                }
                mirror.miss(run);
                mirror.fail(true, error);
                None
            }
        };
        mirror.release(claim, brought);
        self.next_target(loan);
    }

    fn mirror(&self) -> Option<Arc<Mirror>> {
        self.pass.as_ref()?.route().mirror.clone()
    }
}
