//! The end of a job with the gate closed: one list of steps, one point of no return.
//!
//! ```text
//! Drain        gate closed, nobody inside: no more marks can come, so the bitmap only shrinks
//! LastPass     copiers until nothing is marked and nothing is claimed
//! FlushTarget  the target's metadata and payload are durable
//! ──────────── everything above is undone by opening the gate on the source
//! Record       the slot that does not count, checksum, flush        ◄── the point of no return
//! ──────────── everything below is done again after a crash
//! Switch       the gate opens on the target; waiting requests go there
//! Confirm      the same record in the other slot, which still names the source
//! ```
//!
//! A copy of one point in time (cancel when ready) goes the same way and ends before `Record`.
//!
//! A record whose writing fails may be durable all the same. Nobody may be served then until one
//! side is named for certain, so the gate stays closed and the source is recorded anew, again and
//! again: a guest that waits loses nothing.
//!
//! Until the record is confirmed, the older slot names the source. A newest slot that rots would then
//! be taken for one whose writing was cut short, and the source for the truth.
use crate::disk::{Status, Task, Tools};
use crate::export::gate::{Gate, Leaving, Route};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Completion, File, Io, Op, Token};
use crate::journal::WordJournal;
use crate::mirror::Mirror;
use formats::error::{Error, Result};
use formats::record::{Record, SLOT_LEN};
use std::sync::Arc;
use std::time::Duration;

/// How long to wait before a record is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// The file that says which image is the truth, and what it says now.
#[derive(Clone)]
pub struct RecordFile {
    file: File,
    /// What counts, and its slot.
    newest: Option<(Record, usize)>,
}

impl RecordFile {
    /// The file, and what was read from it.
    pub fn new(file: File, newest: Option<(Record, usize)>) -> Self {
        Self { file, newest }
    }

    /// What counts now.
    pub fn newest(&self) -> Option<&Record> {
        self.newest.as_ref().map(|(record, _)| record)
    }

    fn generation(&self) -> u64 {
        self.newest().map_or(0, |record| record.generation)
    }

    /// Writes `record` into the slot that does not count.
    fn write(&self, record: &Record) -> Result<Op> {
        let mut buf = Buffer::alone(SLOT_LEN);
        buf.copy_from_slice(&record.encode()?);
        Ok(Op::Write { file: self.file.clone(), at: (self.free_slot() * SLOT_LEN) as u64, buf })
    }

    /// The slot that does not count.
    fn free_slot(&self) -> usize {
        let newest = self.newest.as_ref().map_or(1, |(_, slot)| *slot);
        if planted(Fault::OverwriteTheNewestSlot) { newest } else { 1 - newest }
    }
}

/// How a job ends.
pub enum End {
    /// The target is the disk from here on. The record, with the target as the truth.
    Switch {
        /// What to record; its generation is set here.
        record: Record,
        /// The target's journal: it has to keep what the guest is told from the switch on.
        journal: Option<Arc<WordJournal>>,
    },
    /// The guest stays on the source; the target is a copy of this instant.
    Stay,
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
    /// Why the source is being recorded anew.
    failed: Option<Error>,
}

enum Stage {
    Drain(Leaving),
    LastPass,
    FlushTarget(Box<Task>),
    Record(Writing),
    /// The record is being put into the other slot too; the guest is on the target already.
    Confirm(Record),
    Over,
}

/// How far a record has come.
#[derive(Clone, Copy, PartialEq)]
enum Writing {
    Begin,
    Written,
    Flushing,
    /// It failed; a while later it is tried again, naming the source.
    Waiting,
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
        Self { mirror, gate, end, stage, record_file, deadline: now.saturating_add(pause_max), failed: None }
    }

    /// True while guests wait at the gate.
    pub fn holds_gate(&self) -> bool {
        !matches!(self.stage, Stage::Confirm(_) | Stage::Over)
    }

    /// True where it ends on the target.
    pub fn switches(&self) -> bool {
        matches!(self.end, End::Switch { .. })
    }

    /// The record as it stands after the pivot.
    pub fn into_record(self) -> Option<RecordFile> {
        self.record_file
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
                        return Step::Busy;
                    }
                    let Stage::FlushTarget(task) = std::mem::replace(&mut self.stage, Stage::Over) else { continue };
                    if let Err(error) = task.end().0.and_then(|()| self.refuse_doubt()) {
                        return self.undo(error);
                    }
                    match &self.end {
                        End::Stay => return self.stay(Ok(())),
                        End::Switch { .. } => self.stage = Stage::Record(Writing::Begin),
                    }
                }
                Stage::Record(Writing::Begin) => match self.begin_record(tools, base) {
                    Ok(()) => return Step::Busy,
                    Err(error) => return self.undo(error),
                },
                Stage::Record(_) | Stage::Confirm(_) => return Step::Busy,
                Stage::Over => return Step::Done(Ok(())),
            }
        }
    }

    /// Takes in what became of one of its operations. A result says that the pivot is over.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> Step {
        match &mut self.stage {
            Stage::FlushTarget(task) => {
                task.complete(tools, base, done);
                Step::Busy
            }
            Stage::Record(writing) => {
                let writing = *writing;
                self.record_moved(tools, base, writing, done)
            }
            Stage::Confirm(_) => match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Confirm(again) => self.confirmed(tools, base, again, done),
                _ => Step::Busy,
            },
            Stage::Drain(_) | Stage::LastPass | Stage::Over => Step::Busy,
        }
    }

    /// `None` while copiers are at it.
    fn last_pass<I: Io>(&mut self, tools: &Tools<I>) -> Option<Result<()>> {
        self.mirror.progress.listen(tools.waker);
        if self.mirror.is_settled() || planted(Fault::PivotWithoutLastPass) {
            return Some(Ok(()));
        }
        if self.mirror.has_fault() {
            return Some(Err(Error::invalid("the copy failed during the last pass")));
        }
        (tools.io.now() > self.deadline).then(|| {
            let left = self.mirror.dirty.marked_bytes();
            Err(Error::invalid(format!("the last pass took longer than the pause allows, {left} bytes are left")))
        })
    }

    fn after_last_pass(&self) -> Stage {
        match &self.end {
            End::Switch { .. } if planted(Fault::RecordBeforeFlush) => Stage::Record(Writing::Begin),
            _ => Stage::FlushTarget(Box::new(Task::flush(Arc::clone(&self.mirror.target)))),
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
        Step::Done(Err(Error::invalid("requests that were under way took longer than the pause allows")))
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
        self.open(Route { disk: Arc::clone(&self.mirror.source), mirror: None });
        Step::Done(outcome)
    }

    fn open(&mut self, route: Route) {
        self.mirror.target.hurry(false);
        self.gate.open(route);
        self.stage = Stage::Over;
    }

    /// Puts the record on its way: the target as the truth or, after a failure, the source again.
    fn begin_record<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Result<()> {
        let (End::Switch { record, journal }, Some(record_file)) = (&mut self.end, &self.record_file) else {
            return Err(Error::invalid("a pivot without a record"));
        };
        if let (Some(journal), None) = (journal, &self.failed) {
            // Everything is settled: what comes after the switch is noted from its first write on.
            journal.wake();
        }
        let mut new = match (&self.failed, record_file.newest()) {
            (None, _) => record.clone(),
            (Some(_), Some(old)) => old.clone(),
            // There was none: the export's origin is the truth.
            (Some(_), None) => Record {
                truth: record.origin.clone(),
                format: self.mirror.source.chain().top().format.to_owned(),
                ..record.clone()
            },
        };
        // A failed record may count after a crash: what replaces it has to be newer.
        new.generation = record_file.generation() + if self.failed.is_some() { 2 } else { 1 };
        let op = record_file.write(&new)?;
        if self.failed.is_none() {
            *record = new;
        }
        tools.io.submit(base, op);
        self.stage = Stage::Record(Writing::Written);
        Ok(())
    }

    fn record_moved<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, writing: Writing, done: Completion) -> Step {
        let Some(record_file) = &self.record_file else { return Step::Busy };
        match (writing, done.result) {
            (Writing::Written, Ok(count)) if count as usize == SLOT_LEN => {
                tools.io.submit(base, Op::Flush { file: record_file.file.clone() });
                self.stage = Stage::Record(Writing::Flushing);
            }
            (Writing::Flushing, Ok(_)) => return self.recorded(tools, base),
            (Writing::Waiting, _) => self.stage = Stage::Record(Writing::Begin),
            (_, result) => {
                let error = result.err().unwrap_or_else(|| std::io::ErrorKind::WriteZero.into());
                let error = Error::io("writing the pivot record in the state folder", error);
                tracing::error!("{}: the guest waits until the record is certain", error.one_line());
                self.failed.get_or_insert(error);
                tools.io.submit(base, Op::Timeout { after: RETRY });
                self.stage = Stage::Record(Writing::Waiting);
            }
        }
        Step::Busy
    }

    /// The record is durable: from here on there is only one way.
    fn recorded<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Step {
        if let Some(error) = self.failed.take() {
            return self.undo(error);
        }
        self.carry_bitmaps();
        let disk = if planted(Fault::SourceAfterRecord) { &self.mirror.source } else { &self.mirror.target };
        self.open(Route { disk: Arc::clone(disk), mirror: None });
        let (End::Switch { record, .. }, Some(file)) = (&self.end, &mut self.record_file) else {
            return Step::Done(Ok(()));
        };
        file.newest = Some((record.clone(), file.free_slot()));
        let again = Record { generation: record.generation + 1, ..record.clone() };
        match file.write(&again) {
            Ok(op) => {
                tools.io.submit(base, op);
                self.stage = Stage::Confirm(again);
                Step::Busy
            }
            Err(error) => unconfirmed(&error),
        }
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

    /// The record in the other slot was written, or made durable.
    fn confirmed<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, again: Record, done: Completion) -> Step {
        let Some(file) = &mut self.record_file else { return Step::Done(Ok(())) };
        match (done.op, done.result) {
            (Op::Write { .. }, Ok(count)) if count as usize == SLOT_LEN => {
                tools.io.submit(base, Op::Flush { file: file.file.clone() });
                self.stage = Stage::Confirm(again);
                return Step::Busy;
            }
            (Op::Flush { .. }, Ok(_)) => file.newest = Some((again, file.free_slot())),
            (_, result) => {
                let error = result.err().unwrap_or_else(|| std::io::ErrorKind::WriteZero.into());
                return unconfirmed(&Error::io("writing it a second time", error));
            }
        }
        Step::Done(Ok(()))
    }
}

/// The pivot is done all the same: the first slot is durable, and counts.
fn unconfirmed(error: &Error) -> Step {
    tracing::warn!("the pivot record has one good slot only: {}", error.one_line());
    Step::Done(Ok(()))
}
