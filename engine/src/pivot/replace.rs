//! Another disk in the place of an export's, which reads alike: a new overlay upon it, or the same image, grown.
//!
//! ```text
//! Ahead        the old disk is flushed while guests write, so that little is left for them to wait for
//! Overlay      the files of a new overlay, tables and all, are durable: it is empty, and nobody writes to it yet
//! Drain        gate closed, nobody inside
//! Flush        the old disk's metadata and payload are durable: nobody brings in any more what its journal has
//! Zero, Settle what is new of a disk that grows
//! ──────────── everything above is undone by opening the gate on the old disk
//! Record       ◄── the point of no return                           │ Keep           the image has its size
//! ──────────── everything below is done again after a crash
//! Switch       the gate opens on the new disk
//! Confirm      the same record in the other slot
//! ```
//!
//! How large a disk is its image says, or the length of its file: then that is the point of no return of a growth, and
//! nothing is recorded. A raw image that a pivot brought into a longer file has the size of its record.
use super::confirm::Confirm;
use super::record_file::{RecordFile, bytes_of};
use super::recorder::Recorder;
use super::{Pivot, Step};
use crate::disk::{Disk, Status, Task, Tools};
use crate::export::gate::{Gate, Leaving, Route};
use crate::fault::{Fault, planted};
use crate::io::{Completion, Io, Op, Token};
use crate::open::refuse_lost_chain;
use formats::error::{Error, Result};
use formats::image::Zeroing;
use formats::record::Record;
use std::sync::Arc;
use std::time::Duration;

/// What comes into the old disk's place.
pub enum New {
    /// An empty overlay upon it, and what to record; the generation is set here.
    Overlay(Arc<Disk>, Record),
    /// The same image with so many bytes, and what to record where its size is there.
    Grown(u64, Option<Record>),
}

/// One replacement on its way.
pub struct Replace {
    gate: Arc<Gate>,
    old: Arc<Disk>,
    new: Option<New>,
    /// How large the old disk was, where it was made larger.
    grown_from: Option<u64>,
    to_record: Option<Record>,
    record_file: RecordFile,
    stage: Stage,
    pause_max: Duration,
    /// Nobody is inside by then, or it is undone.
    deadline: Duration,
}

enum Stage {
    New,
    Ahead(Box<Task>),
    /// So many files of the overlay are not durable yet.
    Overlay(u64, Result<()>),
    Drain(Leaving),
    Flush(Box<Task>),
    Zero(Box<Task>),
    Settle(Box<Task>),
    Record(Recorder, Arc<Disk>, Record),
    Confirm(Confirm),
    Over,
}

impl Replace {
    /// One that closes the gate when what is written by now is durable. Requests that are under way then may take
    /// `pause_max`.
    pub fn new(gate: Arc<Gate>, record_file: RecordFile, new: New, pause_max: Duration) -> Self {
        let old = gate.route().disk;
        let (new, grown_from, stage, deadline) = (Some(new), None, Stage::New, Duration::ZERO);
        Self { gate, old, new, grown_from, to_record: None, record_file, stage, pause_max, deadline }
    }

    /// The record as it stands afterwards.
    pub fn into_record(self) -> RecordFile {
        self.record_file
    }

    /// Takes in what is done and does what can be done. Waits for an image's tables, for nothing else.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Step {
        loop {
            match &mut self.stage {
                Stage::New => self.stage = Stage::Ahead(Box::new(Task::flush(Arc::clone(&self.old)))),
                Stage::Ahead(task) => {
                    if task.step(tools, base) != Status::Done {
                        return Step::Busy;
                    }
                    if let Stage::Ahead(task) = std::mem::replace(&mut self.stage, Stage::Over)
                        && let Err(error) = task.end().0
                    {
                        return Step::Done(Err(error));
                    }
                    self.stage = Stage::Overlay(self.flush_overlay(tools, base), Ok(()));
                }
                Stage::Overlay(0, outcome) => {
                    if let Err(error) = std::mem::replace(outcome, Ok(())) {
                        self.stage = Stage::Over;
                        return Step::Done(Err(error));
                    }
                    self.deadline = tools.io.now().saturating_add(self.pause_max);
                    self.stage = Stage::Drain(self.gate.close());
                }
                Stage::Drain(leaving) => {
                    if !leaving.is_empty(tools.waker) {
                        if tools.io.now() <= self.deadline {
                            return Step::Busy;
                        }
                        self.gate.reopen();
                        self.stage = Stage::Over;
                        return Step::Done(Err(Pivot::too_long(self.pause_max)));
                    }
                    self.stage = Stage::Flush(Box::new(Task::flush(Arc::clone(&self.old))));
                    if planted(Fault::RecordBeforeFlush) {
                        match self.next(tools, base) {
                            Ok(stage) => self.stage = stage,
                            Err(error) => return self.undo(error),
                        }
                    }
                }
                Stage::Flush(task) | Stage::Zero(task) | Stage::Settle(task) => {
                    if task.step(tools, base) != Status::Done {
                        return Step::Busy;
                    }
                    match self.next(tools, base) {
                        Ok(stage) => self.stage = stage,
                        Err(error) => return self.undo(error),
                    }
                }
                Stage::Overlay(..) | Stage::Record(..) | Stage::Confirm(_) => return Step::Busy,
                Stage::Over => return Step::Done(Ok(())),
            }
        }
    }

    /// Takes in what became of one of its operations. A result says that it is over.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> Step {
        match &mut self.stage {
            Stage::Ahead(task) | Stage::Flush(task) | Stage::Zero(task) | Stage::Settle(task) => {
                task.complete(tools, base, done);
            }
            Stage::Overlay(left, outcome) => {
                *left -= 1;
                if let (Err(error), Some(New::Overlay(disk, _))) = (done.result, &self.new) {
                    *outcome = Err(Error::io(format!("flush of {}", disk.name()), error));
                }
            }
            Stage::Record(recorder, ..) => match recorder.complete(tools, base, done) {
                None => {}
                Some(Ok(())) => return self.recorded(tools, base),
                Some(Err(error)) => return self.undo(error),
            },
            Stage::Confirm(confirm) => {
                if confirm.complete(tools, base, done) {
                    return self.confirmed();
                }
            }
            Stage::New | Stage::Drain(_) | Stage::Over => {}
        }
        Step::Busy
    }

    /// Makes the files of a new overlay durable; says how many they are.
    fn flush_overlay<I: Io>(&self, tools: &mut Tools<I>, base: Token) -> u64 {
        let Some(New::Overlay(disk, _)) = self.new.as_ref().filter(|_| !planted(Fault::RecordBeforeOverlay)) else {
            return 0;
        };
        let top = disk.chain().top();
        let payload = top.apart.as_ref().map(|_| top.file.file());
        let files = std::iter::once(top.tables()).chain(payload);
        files.zip(base.0..).map(|(file, token)| tools.io.submit(Token(token), Op::Flush { file: file.clone() })).count()
            as u64
    }

    fn undo(&mut self, error: Error) -> Step {
        if let Some(size) = self.grown_from.take() {
            self.old.chain().top().image.ungrow(size);
        }
        self.gate.open(Route { disk: Arc::clone(&self.old), mirror: None });
        self.stage = Stage::Over;
        Step::Done(Err(error))
    }

    /// What follows a task that is done.
    fn next<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Result<Stage> {
        let old = || Arc::clone(&self.old);
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Flush(task) => {
                task.end().0?;
                match self.new.take().ok_or_else(|| Error::invalid("the new disk was made already"))? {
                    New::Overlay(disk, record) => self.begin_record(tools, base, disk, record),
                    New::Grown(size, record) => {
                        let before = self.old.size();
                        let range = self.old.grow(size)?;
                        (self.grown_from, self.to_record) = (Some(before), record);
                        let range = if planted(Fault::GrownBeforeZeroes) { range.prefix(0) } else { range };
                        Ok(Stage::Zero(Box::new(Task::zero(old(), range, Zeroing::Unmap))))
                    }
                }
            }
            Stage::Zero(task) => {
                task.end().0?;
                Ok(Stage::Settle(Box::new(Task::flush(old()))))
            }
            Stage::Settle(task) => {
                task.end().0?;
                self.old.keep_size()?;
                match self.to_record.take() {
                    Some(record) => self.begin_record(tools, base, old(), record),
                    None => {
                        self.gate.open(Route { disk: old(), mirror: None });
                        Ok(Stage::Over)
                    }
                }
            }
            other => Ok(other),
        }
    }

    /// Puts the record on its way: `disk` as the truth or, should that fail, the old one again.
    fn begin_record<I: Io>(&self, tools: &mut Tools<I>, base: Token, disk: Arc<Disk>, record: Record) -> Result<Stage> {
        let file = &self.record_file;
        file.refuse_lost()?;
        refuse_lost_chain(disk.chain().layers())?;
        let record = Record { generation: file.generation() + 1, ..record };
        // Where nothing was ever recorded, what the command line names counts, and goes on to.
        let old = file.newest().cloned().unwrap_or_else(|| Record {
            truth: record.origin.clone(),
            format: self.old.chain().top().format.to_owned(),
            size: self.grown_from.unwrap_or_else(|| self.old.size()),
            ..record.clone()
        });
        let old = Record { generation: record.generation + 1, ..old };
        let recorder = Recorder::new(file.slots().clone(), bytes_of(&record)?, bytes_of(&old)?);
        recorder.start(tools, base);
        if planted(Fault::SwitchBeforeRecord) {
            self.gate.open(Route { disk: Arc::clone(&disk), mirror: None });
        }
        Ok(Stage::Record(recorder, disk, record))
    }

    fn recorded<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Step {
        let Stage::Record(_, disk, record) = std::mem::replace(&mut self.stage, Stage::Over) else { return Step::Busy };
        if !planted(Fault::SwitchBeforeRecord) {
            self.gate.open(Route { disk, mirror: None });
        }
        let confirm = Confirm::recorded(self.record_file.clone(), record);
        let begun = confirm.start(tools, base);
        self.stage = Stage::Confirm(confirm);
        if begun { Step::Busy } else { self.confirmed() }
    }

    fn confirmed(&mut self) -> Step {
        if let Stage::Confirm(confirm) = std::mem::replace(&mut self.stage, Stage::Over) {
            self.record_file = confirm.into_record();
        }
        Step::Done(Ok(()))
    }
}
