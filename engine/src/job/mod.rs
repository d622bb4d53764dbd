//! A mirror job from its start to its end.
//!
//! The phases are a table, in `phase`. `Job` is stepped by the control thread: it puts the mirror in
//! the guest's way, lets the seeder look when it may, and watches the backlog. How it ends is in `ending`.
mod bounds;
mod ending;
mod errors;
mod lateness;
mod life;
mod phase;
mod sync;
mod verifying;

pub use bounds::Limits;
pub use ending::Goal;
pub use errors::{IoError, action_of, io_status_of, is_no_space, rest_after};
pub use life::path;
pub use phase::{Happened, Phase};

use crate::control::jobs::IoStatus;
use crate::control::{Mode, OnError};
use crate::disk::{Disk, Status, Task, Tools};
use crate::export::gate::{Gate, Leaving, Route};
use crate::fault::{self, planted};
use crate::io::{Completion, Io, Token};
use crate::mirror::{Mirror, TargetTask};
use crate::pivot::{Pivot, RecordFile, Step};
use crate::seed::Seeder;
use bounds::{Bounds, Standing};
use ending::Wish;
use errors::Rest;
use lateness::FellBack;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use sync::Syncs;

/// A backlog that is copied within a pause, in bytes.
const BACKLOG_READY: u64 = 8 << 20;
/// With less than this left, `auto` writes to both sides.
const BACKLOG_BOTH: u64 = 64 << 20;
/// How many runs of the mapping one step of the seeding looks at.
const LOOKS: usize = 256;

/// What a job is made of.
pub struct Parts {
    /// Its name.
    pub id: String,
    /// The two disks and what their copiers share.
    pub mirror: Arc<Mirror>,
    /// The guest's way.
    pub gate: Arc<Gate>,
    /// The target reads as zeroes where the seeder has not been.
    pub target_is_zero: bool,
    /// Up to here the seeder has been, in an earlier life of the daemon.
    pub seen: u64,
    /// How much time lies between two settles of the target at least.
    pub sync_rest: Duration,
    /// How guest writes are handled.
    pub mode: Mode,
    /// What to do when the source fails.
    pub on_source_error: OnError,
    /// What to do when the target fails.
    pub on_target_error: OnError,
    /// How long the guest may be kept waiting for the last pass.
    pub pause_max: Duration,
    /// Until when it is to be ready, and what for.
    pub limits: Limits,
    /// When it is ready, everything that the target has is read back.
    pub verify: bool,
}

/// One mirror job.
pub struct Job {
    parts: Parts,
    phase: Phase,
    stage: Stage,
    syncs: Syncs,
    bounds: Bounds,
    wish: Option<Wish>,
    /// The wish waits for `finalize`.
    held: bool,
    /// It has come to where it waits; or it waited, and is being carried out.
    pending: bool,
    paused: bool,
    /// Not by an operator, but by an error.
    stopped: bool,
    /// When so many bytes are copied, everything that the seeder marked was brought over.
    seeded: u64,
    error: Option<String>,
    io_status: IoStatus,
    /// What failed since it was asked last.
    io_error: Option<IoError>,
    undone: Option<String>,
    /// It rests after an error, or tries again what had failed.
    rest: Option<Rest>,
    /// The target took too long for a guest.
    fell_back: Option<FellBack>,
    /// The record as a finished pivot left it.
    record: Option<RecordFile>,
    /// It was ready once.
    was_ready: bool,
    /// The target was made durable for an end that is about to begin.
    flushed: bool,
    /// It ended with the target a whole copy.
    complete: bool,
    /// Set while a failed job is being taken out of the guest's way.
    broken: bool,
    /// When what was not equal is verified again.
    verify_again: Duration,
}

enum Stage {
    /// Writes that mark nothing are still under way.
    Attaching(Leaving),
    /// A remote target is flushed before anything is written to it: only a connection that has seen every write
    /// can say, at the end, that a flush has made them durable.
    Reaching(Box<Task>),
    Seeding(Seeder),
    Copying,
    /// The target is made durable before it is called ready, and before the gate closes for the end.
    Settling(Box<TargetTask>),
    Ending(Box<Pivot>),
    /// The guest's writes that still know the mirror are under way.
    Detaching(Leaving),
    /// The copiers end what they have.
    Resting,
    Over,
}

impl Job {
    /// Puts the mirror in the way of every guest write that comes from now on.
    pub fn start(parts: Parts) -> Self {
        let route = Route { disk: Arc::clone(&parts.mirror.source), mirror: Some(Arc::clone(&parts.mirror)) };
        // Nothing reaches the target before: what an old write turns to zeroes behind a copy, the seeder
        // would take for something that need not be brought.
        parts.mirror.hold(!planted(fault::Fault::CopyBeforeOldWritesEnd));
        let stage = Stage::Attaching(parts.gate.replace(route));
        Self::new(parts, Phase::Seeding, stage)
    }

    /// One whose mirror has been in the guest's way since an instant at which both sides were equal.
    pub fn follow(parts: Parts) -> Self {
        if planted(fault::Fault::BackAfterOpen) {
            let route = Route { disk: Arc::clone(&parts.mirror.source), mirror: Some(Arc::clone(&parts.mirror)) };
            drop(parts.gate.replace(route));
        }
        Self { was_ready: true, ..Self::new(parts, Phase::Ready, Stage::Copying) }
    }

    fn new(parts: Parts, phase: Phase, stage: Stage) -> Self {
        let job = Self {
            syncs: Syncs::new(parts.sync_rest),
            bounds: Bounds::new(parts.limits),
            parts,
            phase,
            stage,
            wish: None,
            held: false,
            pending: false,
            paused: false,
            stopped: false,
            seeded: 0,
            error: None,
            io_status: IoStatus::Ok,
            io_error: None,
            undone: None,
            rest: None,
            fell_back: None,
            record: None,
            was_ready: false,
            flushed: false,
            complete: false,
            broken: false,
            verify_again: Duration::ZERO,
        };
        job.choose_patience();
        job
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.parts.id
    }

    /// What its copiers share.
    pub fn mirror(&self) -> &Arc<Mirror> {
        &self.parts.mirror
    }

    /// True while no copying is done on a wish or after an error.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// True while an operator has it rest.
    pub fn is_paused_by_hand(&self) -> bool {
        self.paused && !self.stopped
    }

    /// How long the guest may be kept waiting for the last pass.
    pub fn pause_max(&self) -> Duration {
        self.parts.pause_max
    }

    /// Changes that for ends that begin from now on.
    pub fn set_pause_max(&mut self, pause_max: Duration) {
        self.parts.pause_max = pause_max;
    }

    /// Changes until when it is to be ready, and what for.
    pub fn set_limits(&mut self, limits: Limits) {
        self.bounds.set(limits);
        self.parts.limits = limits;
    }

    /// How many times as slow guest writes are made for that.
    pub fn slowdown(&self) -> f64 {
        self.bounds.slowdown()
    }

    /// Which of these bounds will not be kept, and why.
    pub fn shortfall(&self) -> Option<&str> {
        self.bounds.shortfall()
    }

    /// How guest writes are handled.
    pub fn mode(&self) -> Mode {
        self.parts.mode
    }

    /// Why it failed or rests.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// True where it has ended and the target is a whole copy.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// True while it keeps guests waiting at a closed gate: it has to be stepped to its end.
    pub fn holds_gate(&self) -> bool {
        matches!(&self.stage, Stage::Ending(pivot) if pivot.holds_gate())
    }

    /// Bytes that are left: never 0 before it is ready.
    pub fn remaining(&self) -> u64 {
        let unseen = match &self.stage {
            Stage::Attaching(_) | Stage::Reaching(_) => self.parts.mirror.source.size() - self.parts.seen,
            Stage::Seeding(seeder) => self.parts.mirror.source.size() - seeder.seen(),
            _ => 0,
        };
        let left = unseen + self.parts.mirror.backlog();
        let before_ready = matches!(self.phase, Phase::Seeding | Phase::Converging);
        if before_ready { left.max(1) } else { left }
    }

    /// Stops copying, or goes on; what failed is tried again at once. A job that is being given up rests for good.
    pub fn pause(&mut self, paused: bool) {
        if matches!(self.stage, Stage::Detaching(_) | Stage::Resting | Stage::Over) {
            return;
        }
        (self.paused, self.stopped) = (paused, false);
        match &mut self.rest {
            _ if paused => {}
            Some(rest) => rest.end_now(),
            None => {
                (self.error, self.io_status) = (None, IoStatus::Ok);
                self.parts.mirror.clear_fault();
            }
        }
        self.parts.mirror.hold(paused || self.is_attaching());
    }

    /// True while writes that mark nothing may be under way: nothing may reach the target yet.
    fn is_attaching(&self) -> bool {
        matches!(self.stage, Stage::Attaching(_) | Stage::Reaching(_))
    }

    /// Changes how guest writes are handled from now on.
    pub fn set_mode(&mut self, mode: Mode) {
        self.parts.mode = mode;
        self.choose_mode();
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        let Some(done) = self.syncs.complete(tools, base, done) else { return };
        match &mut self.stage {
            Stage::Settling(task) => task.complete(tools, base, done),
            Stage::Reaching(task) => task.complete(tools, base, done),
            Stage::Ending(pivot) => {
                if let Step::Done(outcome) = pivot.complete(tools, base, done) {
                    self.ended(outcome);
                }
            }
            _ => unreachable!("nothing is under way"),
        }
    }

    /// Does what can be done. Never waits. True where something is to be done at once again.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> bool {
        self.look_at_errors(tools.io.now());
        self.look_at_lateness(tools.io.now());
        self.watch_verification(tools.io.now());
        if matches!(self.wish, Some(Wish::GiveUp)) {
            // What is under way has to end first.
            self.parts.mirror.target.hurry(true);
        }
        let copying = matches!(self.stage, Stage::Seeding(_) | Stage::Copying) && self.wish.is_none();
        let fails = self.rest.is_some() || self.parts.mirror.has_fault();
        self.syncs.step(&self.parts.mirror, tools, base, copying && !fails);
        self.keep_bounds(tools.io.now());
        match &mut self.stage {
            Stage::Attaching(leaving) => {
                if leaving.is_empty(tools.waker) || planted(fault::Fault::LookBeforeOldWritesEnd) {
                    match self.parts.mirror.target.is_remote() {
                        true => {
                            let flush = Task::flush(Arc::clone(&self.parts.mirror.target));
                            self.stage = Stage::Reaching(Box::new(flush));
                        }
                        false => self.begin_seeding(),
                    }
                    return true;
                }
                self.look_at_wishes(tools)
            }
            Stage::Reaching(task) => {
                if task.step(tools, base) != Status::Done {
                    return false;
                }
                if let Stage::Reaching(task) = std::mem::replace(&mut self.stage, Stage::Copying)
                    && let Err(error) = task.end().0
                {
                    self.parts.mirror.fail(true, error);
                }
                self.begin_seeding();
                true
            }
            // It would fail again, and at once.
            Stage::Seeding(_) if self.parts.mirror.has_fault() => self.look_at_wishes(tools),
            Stage::Seeding(seeder) => {
                match seeder.step(&self.parts.mirror, LOOKS) {
                    Ok(false) => {}
                    Ok(true) => {
                        let mirror = &self.parts.mirror;
                        self.seeded = mirror.stats.copied.load(Ordering::Relaxed) + mirror.backlog();
                        self.stage = Stage::Copying;
                    }
                    Err(error) => self.parts.mirror.fail(false, error),
                }
                self.look_at_wishes(tools);
                true
            }
            Stage::Copying => {
                self.watch(tools);
                self.look_at_wishes(tools)
            }
            Stage::Settling(task) => {
                if task.step(tools, base) == Status::Done {
                    let Stage::Settling(task) = std::mem::replace(&mut self.stage, Stage::Copying) else { return true };
                    match self.parts.mirror.end_settle(task.end().0) {
                        // What is doubtful is copied again, and flushed again.
                        Ok(true) => {}
                        Ok(false) if self.phase == Phase::Ready => self.flushed = true,
                        // Nor is it ready with what has failed meanwhile.
                        Ok(false) if self.lacks_something() => {}
                        Ok(false) => {
                            self.recover();
                            self.happened(Happened::CaughtUp);
                        }
                        Err(error) => self.parts.mirror.fail(true, error),
                    }
                    return true;
                }
                false
            }
            Stage::Ending(pivot) => {
                if let Step::Done(outcome) = pivot.step(tools, base) {
                    self.ended(outcome);
                    return true;
                }
                false
            }
            Stage::Detaching(leaving) => {
                let empty = leaving.is_empty(tools.waker);
                if empty {
                    self.stage = Stage::Resting;
                }
                empty
            }
            Stage::Resting => self.rest(tools),
            Stage::Over => false,
        }
    }

    /// Slows guests where a bound asks for it.
    fn keep_bounds(&mut self, now: Duration) {
        let follows = matches!(self.phase, Phase::Converging | Phase::Ready);
        let copies = matches!(self.stage, Stage::Seeding(_) | Stage::Copying | Stage::Settling(_));
        if copies && !self.paused && self.rest.is_none() {
            let (ready, was_ready) = (self.phase == Phase::Ready, self.was_ready);
            let standing = Standing { left: self.remaining(), follows, ready, was_ready };
            self.bounds.step(&self.parts.mirror, now, standing);
        } else if self.parts.mirror.brake.limit() > 0 {
            self.parts.mirror.brake.set(0);
        }
    }

    /// Lets the seeder look, and the copiers at the target.
    fn begin_seeding(&mut self) {
        self.stage = Stage::Seeding(Seeder::from(self.parts.seen, self.parts.target_is_zero));
        self.parts.mirror.hold(self.paused);
        self.choose_mode();
    }

    /// True where something failed, and was not brought over since, or has not ended.
    fn lacks_something(&self) -> bool {
        let mirror = &self.parts.mirror;
        let failed = mirror.has_fault() || mirror.missed_len() > 0;
        mirror.late().0 > 0 || (failed && !planted(fault::Fault::ReadyWithoutWhatFailed))
    }

    /// Looks at the backlog.
    fn watch<I: Io>(&mut self, tools: &Tools<I>) {
        self.parts.mirror.progress.listen(tools.waker);
        self.choose_mode();
        let mirror = &self.parts.mirror;
        let settled = mirror.is_settled();
        if settled {
            mirror.forget_missed();
        }
        let backlog = mirror.dirty.marked_bytes();
        match self.phase {
            Phase::Seeding if settled || mirror.stats.copied.load(Ordering::Relaxed) >= self.seeded => {
                self.happened(Happened::SeedDone);
            }
            Phase::Converging if self.paused || mirror.has_fault() || self.syncs.is_under_way() => {}
            // Where it is being tried again and nothing is left to copy, a flush is what can be tried.
            Phase::Converging if settled => self.stage = Stage::Settling(Box::new(mirror.begin_settle())),
            Phase::Converging if self.lacks_something() || self.is_trying() => {}
            Phase::Converging if !mirror.write_both() && backlog <= BACKLOG_READY => {
                self.stage = Stage::Settling(Box::new(mirror.begin_settle()));
            }
            Phase::Ready if backlog > 4 * BACKLOG_READY => self.happened(Happened::FellBehind),
            Phase::Ready if !self.paused && self.lacks_something() => self.happened(Happened::FellBehind),
            _ => {}
        }
    }

    /// `auto`: in the background first, to both sides when little is left or a copy in the background would not come
    /// to an end, and back where guests wait too long for that.
    fn choose_mode(&self) {
        let mirror = &self.parts.mirror;
        let both = match self.parts.mode {
            Mode::Background => false,
            _ if self.is_attaching() => false,
            // It could not be reached, or has no space: what guests write is marked until that is over.
            _ if self.rest.is_some() || mirror.has_fault() => false,
            // It takes too long.
            _ if mirror.has_fallen_back() => false,
            // A guest does not wait for a server that may be out of reach.
            _ if mirror.target.is_remote() => false,
            Mode::WriteBlocking => true,
            Mode::Auto => {
                let looked = matches!(self.stage, Stage::Copying | Stage::Settling(_));
                let pays = || mirror.dirty.marked_bytes() <= BACKLOG_BOTH || self.bounds.stalls();
                !self.bounds.spares() && (mirror.write_both() || (looked && pays()))
            }
        };
        if both != mirror.write_both() {
            mirror.set_write_both(both);
        }
    }

    fn happened(&mut self, happened: Happened) {
        match self.phase.on(happened) {
            Some(phase) => {
                self.was_ready |= phase == Phase::Ready;
                if happened == Happened::SeedDone {
                    // Everything was looked at once, or is about to be copied for another reason.
                    self.parts.mirror.set_compare(false);
                }
                self.phase = phase;
            }
            None => unreachable!("{happened:?} in {:?}", self.phase),
        }
    }

    /// The disk that the guest is on, as far as this job decides it.
    pub fn serving(&self) -> &Arc<Disk> {
        match self.phase {
            Phase::Pivoted => &self.parts.mirror.target,
            _ => &self.parts.mirror.source,
        }
    }
}
