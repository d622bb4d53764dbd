//! How a job ends: what was wished for, when that is taken up, and what comes of it.
use super::{Happened, Job, Phase, Stage};
use crate::disk::Tools;
use crate::export::gate::Route;
use crate::fault::{self, planted};
use crate::io::Io;
use crate::pivot::{End, Pivot, RecordFile};
use formats::error::{Error, Result};
use std::sync::Arc;
use std::time::Duration;

/// What an operator wants of a running job.
pub(super) enum Wish {
    Pivot(Box<(End, RecordFile)>),
    /// Leave the target as a copy of one instant.
    Finish,
    /// Give up.
    GiveUp,
}

impl Job {
    /// Wishes for the pivot. Only in `Phase::Ready`.
    pub fn pivot(&mut self, end: End, record: RecordFile) {
        self.wish = Some(Wish::Pivot(Box::new((end, record))));
    }

    /// Wishes for the end on the source: with a whole copy, unless it never was ready or `force`. Who
    /// heard that it is ready gets what was promised, also where the guest has just run ahead again.
    pub fn cancel(&mut self, force: bool) {
        self.wish = Some(if force || !self.was_ready { Wish::GiveUp } else { Wish::Finish });
    }

    /// Why a pivot or a finish was undone, once.
    pub fn take_undone(&mut self) -> Option<String> {
        self.undone.take()
    }

    /// Why a pivot cannot be asked for now; `None` where it can.
    pub fn not_ready(&self) -> Option<Error> {
        let left = self.remaining();
        (self.phase != Phase::Ready)
            .then(|| Error::invalid(format!("cannot pivot: {left} bytes still to copy (phase: {})", self.phase.name())))
    }

    /// True where the wish for an end is known and not carried out yet.
    pub fn is_ending(&self) -> bool {
        self.wish.is_some() || matches!(self.stage, Stage::Ending(_) | Stage::Detaching(_) | Stage::Resting)
    }

    /// The record as a finished pivot left it.
    pub fn take_record(&mut self) -> Option<RecordFile> {
        self.record.take()
    }

    /// True where a wish was taken up.
    pub(super) fn look_at_wishes<I: Io>(&mut self, tools: &Tools<I>) -> bool {
        if matches!(self.stage, Stage::Detaching(_)) {
            return true;
        }
        match self.wish.take() {
            None => return false,
            Some(Wish::GiveUp) => self.detach(),
            Some(wish) if self.syncs.is_under_way() => {
                self.wish = Some(wish);
                return false;
            }
            // It fell behind meanwhile: carried out when it has caught up.
            Some(wish) if self.phase != Phase::Ready => {
                self.wish = Some(wish);
                return false;
            }
            // What was copied since may be much: made durable now, it does not keep the guest waiting.
            Some(wish) if !self.flushed && !planted(fault::Fault::RecordBeforeFlush) => {
                self.wish = Some(wish);
                self.stage = Stage::Settling(Box::new(self.parts.mirror.begin_settle()));
            }
            Some(Wish::Pivot(wish)) => self.begin_end(wish.0, Some(wish.1), tools.io.now()),
            Some(Wish::Finish) => self.begin_end(End::Stay, None, tools.io.now()),
        }
        true
    }

    /// Closes the gate for the end. A wish to end outweighs a wish to rest.
    fn begin_end(&mut self, end: End, record: Option<RecordFile>, now: Duration) {
        self.paused = false;
        self.flushed = false;
        self.parts.mirror.hold(false);
        let (mirror, gate) = (Arc::clone(&self.parts.mirror), Arc::clone(&self.parts.gate));
        self.stage = Stage::Ending(Box::new(Pivot::begin(mirror, gate, end, record, now, self.parts.pause_max)));
        self.happened(Happened::EndBegan);
    }

    /// A pivot or a finish is over.
    pub(super) fn ended(&mut self, outcome: Result<()>) {
        let Stage::Ending(pivot) = std::mem::replace(&mut self.stage, Stage::Copying) else { return };
        let switched = pivot.switches();
        self.record = pivot.into_record();
        match outcome {
            Ok(()) => {
                self.complete = true;
                self.parts.mirror.hold(true);
                self.stage = Stage::Over;
                self.happened(if switched { Happened::PivotDone } else { Happened::CancelDone });
            }
            Err(error) => {
                self.undone = Some(error.one_line());
                self.happened(Happened::EndUndone);
                if self.parts.mirror.target.is_poisoned() {
                    // Whatever was ready is so no more.
                    self.parts.mirror.fail(true, error);
                }
            }
        }
    }

    /// Takes the mirror out of the guest's way.
    pub(super) fn detach(&mut self) {
        let route = Route { disk: Arc::clone(&self.parts.mirror.source), mirror: None };
        self.parts.mirror.hold(true);
        self.stage = Stage::Detaching(self.parts.gate.replace(route));
    }

    /// Waits for the copiers to end what they have.
    pub(super) fn rest<I: Io>(&mut self, tools: &Tools<I>) -> bool {
        self.parts.mirror.progress.listen(tools.waker);
        if !self.parts.mirror.is_idle() || self.syncs.is_under_way() {
            return false;
        }
        self.stage = Stage::Over;
        self.happened(if self.broken { Happened::Broke } else { Happened::CancelDone });
        true
    }
}
