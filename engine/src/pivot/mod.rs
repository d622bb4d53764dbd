//! The end of a job with the gate closed: one list of steps, one point of no return.
//!
//! ```text
//! Drain        gate closed, nobody inside: no more marks can come, so the bitmap only shrinks
//! LastPass     copiers until nothing is marked and nothing is claimed
//! FlushTarget  the target's metadata and payload are durable; longer than the pause: undone
//! ──────────── everything above is undone by opening the gate on the source
//! Record       the slot that does not count, checksum, flush        ◄── the point of no return
//! ──────────── everything below is done again after a crash
//! Switch       the gate opens on the target; waiting requests go there
//! Confirm      the same record in the other slot, which still names the source
//! ```
//!
//! Where the source is kept to go back to, a mirror in the other direction is in the route that the gate opens on: both
//! sides are equal at that instant, so it begins with nothing to copy, and misses no write. What the next daemon needs of it
//! is in the state folder before the record, and counts only with the record: see `recorded_as`.
//!
//! A copy of one point in time (cancel when ready) goes the same way and ends before `Record`.
//!
//! `recorder` writes the record; where it fails, the gate stays closed until one side is named for certain. `confirm`
//! puts it into the other slot. Several pivots that are to be one are `together`: one record for all of them.
mod confirm;
mod record_file;
mod recorder;
mod replace;
mod together;

pub use record_file::{GroupFile, RecordFile, slots_of};
pub use replace::{New, Replace};
pub use together::{Member, members};

use crate::disk::{Status, Tools};
use crate::export::gate::{Gate, Leaving, Route};
use crate::fault::{Fault, planted};
use crate::io::{Completion, Io, Token};
use crate::journal::WordJournal;
use crate::mirror::{Mirror, TargetTask};
use crate::open::refuse_lost_chain;
use confirm::Confirm;
use formats::error::{Error, Result};
use formats::record::Record;
use record_file::bytes_of;
use recorder::Recorder;
use std::sync::Arc;
use std::time::Duration;
use together::Arrival;

/// How a job ends.
pub enum End {
    /// The target is the disk from here on. The record, with the target as the truth.
    Switch {
        /// What to record; its generation is set here.
        record: Record,
        /// The target's journal: it has to keep what the guest is told from the switch on.
        journal: Option<Arc<WordJournal>>,
        /// Its part in a group, if it is not alone.
        member: Option<Member>,
        /// What follows the guest from the switch on, back to the source, which is then equal.
        back: Option<Arc<Mirror>>,
    },
    /// The guest stays on the source; the target is a copy of this instant.
    Stay,
}

impl End {
    /// True where it is one of a group that is not all there. Its target is durable.
    pub fn waits_for_others(&self) -> bool {
        matches!(self, Self::Switch { member: Some(member), .. } if !member.assemble())
    }

    /// Why the group that it is one of was undone, if it was.
    pub fn undone(&self) -> Option<Error> {
        match self {
            Self::Switch { member: Some(member), .. } => member.verdict()?.err(),
            _ => None,
        }
    }
}

/// True where a pivot that was to be recorded as `generation` happened, and nothing was recorded since: `newest` names what
/// it made the truth, once or, confirmed, once more. A pivot that failed has recorded the other side anew.
pub fn recorded_as(newest: Option<&Record>, generation: u64, is_truth: impl Fn(&str) -> bool) -> bool {
    newest.is_some_and(|record| record.generation.wrapping_sub(generation) <= 1 && is_truth(&record.truth))
}

/// One pivot on its way.
pub struct Pivot {
    mirror: Arc<Mirror>,
    gate: Arc<Gate>,
    end: End,
    stage: Stage,
    /// Absent where nothing is to be recorded.
    record_file: Option<RecordFile>,
    /// Nobody is inside and the last pass is over by then, or the pivot is undone.
    deadline: Duration,
    pause_max: Duration,
    /// Bytes that were left when the gate was closed.
    left: u64,
    /// It was undone because the copy failed.
    interrupted: bool,
}

enum Stage {
    Drain(Leaving),
    LastPass,
    FlushTarget(Box<TargetTask>),
    /// That takes too long: guests are on the source again, and what the target has under way ends first.
    GiveUp(Box<TargetTask>, Error),
    /// Nothing is in the way of the record.
    Begin,
    Record(Recorder),
    /// Another member of the group records.
    Together,
    /// The guest is on the target already.
    Confirm(Confirm),
    Over,
}

/// Where a step left a pivot.
#[derive(Debug)]
pub enum Step {
    /// Go on later.
    Busy,
    /// Over; the gate is open. An error says why it was undone.
    Done(Result<()>),
}

impl Pivot {
    /// Closes the gate. The last pass may take `pause_max`.
    pub fn begin(
        mirror: Arc<Mirror>,
        gate: Arc<Gate>,
        end: End,
        record_file: Option<RecordFile>,
        now: Duration,
        pause_max: Duration,
    ) -> Self {
        let stage = Stage::Drain(gate.close());
        mirror.target.hurry(true);
        // Guests wait for the last pass alone.
        mirror.courtesy.suspend(true);
        let (deadline, left) = (now.saturating_add(pause_max), mirror.backlog());
        Self { mirror, gate, end, stage, record_file, deadline, pause_max, left, interrupted: false }
    }

    /// True while guests wait at the gate.
    pub fn holds_gate(&self) -> bool {
        !matches!(self.stage, Stage::GiveUp(..) | Stage::Confirm(_) | Stage::Over)
    }

    /// True where it ends on the target.
    pub fn switches(&self) -> bool {
        matches!(self.end, End::Switch { .. })
    }

    /// True where it was undone because the copy failed: with a copy that goes on, it can be begun again.
    pub fn is_interrupted(&self) -> bool {
        self.interrupted && self.member().is_none()
    }

    /// What it was to do, and the record as it stands now.
    pub fn into_parts(self) -> (End, Option<RecordFile>) {
        (self.end, self.record_file)
    }

    /// Takes in what is done and does what can be done. Never waits.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Step {
        loop {
            match &mut self.stage {
                Stage::Drain(leaving) => {
                    if !leaving.is_empty(tools.waker) && !planted(Fault::PivotWithoutDrain) {
                        return if tools.io.now() > self.deadline { self.undo_drain() } else { Step::Busy };
                    }
                    self.stage = Stage::LastPass;
                }
                Stage::LastPass => match self.last_pass(tools) {
                    Some(Ok(())) => self.stage = self.after_last_pass(),
                    Some(Err(error)) => return self.undo(error),
                    None => return Step::Busy,
                },
                Stage::FlushTarget(task) => {
                    if task.step(tools, base) != Status::Done {
                        if tools.io.now() > self.deadline {
                            self.give_up_flush();
                        }
                        return Step::Busy;
                    }
                    let Stage::FlushTarget(task) = std::mem::replace(&mut self.stage, Stage::Over) else { continue };
                    if let Err(error) = task.end().0.and_then(|()| self.refuse_doubt()) {
                        return self.undo(error);
                    }
                    match &self.end {
                        End::Stay => return self.stay(Ok(())),
                        End::Switch { .. } => self.stage = Stage::Begin,
                    }
                }
                Stage::GiveUp(task, _) => {
                    if task.step(tools, base) != Status::Done {
                        return Step::Busy;
                    }
                    let Stage::GiveUp(task, late) = std::mem::replace(&mut self.stage, Stage::Over) else { continue };
                    return Step::Done(task.end().0.and(Err(late)));
                }
                Stage::Begin => match self.begin_record(tools, base) {
                    Ok(stage) => self.stage = stage,
                    Err(error) => return self.undo(error),
                },
                Stage::Together => match self.verdict(tools.io.now()) {
                    Some(Ok(())) => return self.recorded(tools, base),
                    Some(Err(error)) => return self.undo(error),
                    None => return Step::Busy,
                },
                Stage::Record(_) | Stage::Confirm(_) => return Step::Busy,
                Stage::Over => return Step::Done(Ok(())),
            }
        }
    }

    /// Takes in what became of one of its operations. A result says that the pivot is over.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> Step {
        match &mut self.stage {
            Stage::FlushTarget(task) | Stage::GiveUp(task, _) => {
                task.complete(tools, base, done);
                Step::Busy
            }
            Stage::Record(recorder) => match recorder.complete(tools, base, done) {
                None => Step::Busy,
                Some(outcome) => {
                    if let Some(member) = self.member() {
                        member.decide(&outcome);
                    }
                    match outcome {
                        Ok(()) => self.recorded(tools, base),
                        Err(error) => self.undo(error),
                    }
                }
            },
            Stage::Confirm(confirm) => match confirm.complete(tools, base, done) {
                true => self.confirmed(),
                false => Step::Busy,
            },
            Stage::Drain(_) | Stage::LastPass | Stage::Begin | Stage::Together | Stage::Over => Step::Busy,
        }
    }

    /// `None` while copiers are at it.
    fn last_pass<I: Io>(&mut self, tools: &Tools<I>) -> Option<Result<()>> {
        if let Some(Err(error)) = self.member().and_then(Member::verdict) {
            return Some(Err(error));
        }
        self.mirror.progress.listen(tools.waker);
        if self.mirror.is_settled() || planted(Fault::PivotWithoutLastPass) {
            return Some(Ok(()));
        }
        if let Some((_, _, why)) = self.mirror.standing_fault() {
            self.interrupted = true;
            return Some(Err(Error::invalid(format!("the copy failed during the last pass: {why}"))));
        }
        (tools.io.now() > self.deadline && !planted(Fault::PauseWithoutEnd)).then(|| {
            let (left, before, pause) = (self.mirror.backlog(), self.left, self.pause_max.as_millis());
            Err(Error::invalid(format!(
                "the last pass took longer than the pause allows ({pause} ms): {left} bytes of {before} were still to \
                 copy; allow a longer pause, or ask again when the guest writes less"
            )))
        })
    }

    fn after_last_pass(&self) -> Stage {
        match &self.end {
            End::Switch { .. } if planted(Fault::RecordBeforeFlush) => Stage::Begin,
            _ => Stage::FlushTarget(Box::new(self.mirror.flush_target())),
        }
    }

    /// A flush says nothing of what the target's server may have lost before it.
    fn refuse_doubt(&self) -> Result<()> {
        match self.mirror.mark_doubtful() {
            false => Ok(()),
            true => Err(Error::invalid("the target's server was out of reach: what it may have lost is copied again")),
        }
    }

    /// Somebody's request takes too long, and all others wait for it: they go on beside it.
    fn undo_drain(&mut self) -> Step {
        self.mirror.target.hurry(false);
        self.gate.reopen();
        self.stage = Stage::Over;
        Step::Done(Err(Self::too_long(self.pause_max)))
    }

    /// Nothing is recorded yet: guests go on, and the target is followed as before.
    fn give_up_flush(&mut self) {
        let Stage::FlushTarget(task) = std::mem::replace(&mut self.stage, Stage::Over) else { return };
        let pause = self.pause_max.as_millis();
        let late = Error::invalid(format!("the target's flush took longer than the pause allows ({pause} ms)"));
        let Step::Done(Err(late)) = self.undo(late) else { return };
        self.stage = Stage::GiveUp(task, late);
    }

    fn too_long(pause_max: Duration) -> Error {
        let pause = pause_max.as_millis();
        Error::invalid(format!("requests that were under way took longer than the pause allows ({pause} ms)"))
    }

    /// Everything before the record is undone by opening the gate on the source, mirrored as before.
    fn undo(&mut self, error: Error) -> Step {
        if let End::Switch { journal: Some(journal), .. } = &self.end {
            journal.sleep();
        }
        self.open(Route { disk: Arc::clone(&self.mirror.source), mirror: Some(Arc::clone(&self.mirror)) });
        Step::Done(Err(error))
    }

    /// The guest stays on the source, and the mirror follows it no more.
    fn stay(&mut self, outcome: Result<()>) -> Step {
        self.mirror.planes.unfollow();
        self.open(Route { disk: Arc::clone(&self.mirror.source), mirror: None });
        Step::Done(outcome)
    }

    fn open(&mut self, route: Route) {
        self.mirror.target.hurry(false);
        self.gate.open(route);
        self.stage = Stage::Over;
    }

    fn member(&self) -> Option<&Member> {
        match &self.end {
            End::Switch { member, .. } => member.as_ref(),
            End::Stay => None,
        }
    }

    /// What the group came to, if it has.
    fn verdict(&self, now: Duration) -> Option<Result<()>> {
        let member = self.member()?;
        if now > self.deadline {
            member.give_up();
        }
        member.verdict()
    }

    /// Puts the record on its way: the target as the truth or, should that fail, the source again.
    fn begin_record<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Result<Stage> {
        let (End::Switch { record, journal, member, .. }, Some(file)) = (&mut self.end, &self.record_file) else {
            return Err(Error::invalid("a pivot without a record"));
        };
        // The last look at what the record relies on; from the next instant on it decides.
        file.refuse_lost()?;
        refuse_lost_chain(self.mirror.target.chain().layers())?;
        if let Some(journal) = journal {
            // Everything is settled: what comes after the switch is noted from its first write on.
            journal.wake();
        }
        record.generation = file.generation() + 1;
        let recorder = match member {
            Some(member) if !planted(Fault::RecordApart) => match member.arrive(record.clone())? {
                Arrival::Lead(recorder) => recorder,
                Arrival::Wait => return Ok(Stage::Together),
            },
            _ => {
                let old = file.newest().cloned().unwrap_or_else(|| Record {
                    // There was none: the export's origin is the truth.
                    truth: record.origin.clone(),
                    format: self.mirror.source.chain().top().format.to_owned(),
                    ..record.clone()
                });
                // A failed record may count after a crash: what replaces it has to be newer.
                let old = Record { generation: record.generation + 1, ..old };
                Recorder::new(file.slots().clone(), bytes_of(record)?, bytes_of(&old)?)
            }
        };
        recorder.start(tools, base);
        Ok(Stage::Record(recorder))
    }

    /// The record is durable: from here on there is only one way.
    fn recorded<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Step {
        self.carry_bitmaps();
        let disk = if planted(Fault::SourceAfterRecord) { &self.mirror.source } else { &self.mirror.target };
        let back = match &self.end {
            End::Switch { back, .. } if !planted(Fault::BackAfterOpen) => back.clone(),
            _ => None,
        };
        self.open(Route { disk: Arc::clone(disk), mirror: back });
        let (End::Switch { record, member, .. }, Some(file)) = (&self.end, &self.record_file) else {
            return Step::Done(Ok(()));
        };
        let confirm = match member {
            Some(_) => Confirm::of_group(file.clone(), record.clone()),
            None => Confirm::recorded(file.clone(), record.clone()),
        };
        let begun = confirm.start(tools, base);
        self.stage = Stage::Confirm(confirm);
        if begun { Step::Busy } else { self.confirmed() }
    }

    /// Both slots name the target, or one does for certain.
    fn confirmed(&mut self) -> Step {
        if let Stage::Confirm(confirm) = std::mem::replace(&mut self.stage, Stage::Over) {
            self.record_file = Some(confirm.into_record());
        }
        Step::Done(Ok(()))
    }

    /// The target goes on with the source's bitmaps, which have all writes up to now. Where it cannot, they are
    /// lost, which is no reason to go back.
    fn carry_bitmaps(&self) {
        let (source, target) = (self.mirror.source.chain().top(), self.mirror.target.chain().top());
        let carried = source.image.bitmaps().and_then(|bitmaps| match bitmaps.is_empty() {
            true => Ok(()),
            false => target.image.adopt_bitmaps(bitmaps),
        });
        if let Err(error) = carried {
            tracing::warn!("{}: the source's bitmaps: {}", target.path.display(), error.one_line());
        }
    }
}
