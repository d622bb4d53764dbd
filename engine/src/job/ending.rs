//! How a job ends: what was wished for, when that is taken up, and what comes of it.
//!
//! An end can be held: it is asked for, the target is made durable, and the job is *pending* until it is told to
//! finalize. Nothing of the end itself happens before: the gate is open, guests write, the target follows them, and
//! the source is the truth. `finalize` then does all that an end does.
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

/// Which end a job is on its way to, with a whole target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The target becomes the disk.
    Pivot,
    /// The target stays a copy of one instant.
    Copy,
}

impl Job {
    /// Wishes for the pivot. Only in `Phase::Ready`.
    pub fn pivot(&mut self, end: End, record: RecordFile) {
        self.wish_for(Wish::Pivot(Box::new((end, record))));
    }

    /// Wishes for the end on the source: with a whole copy, unless it never was ready or `force`. Who
    /// heard that it is ready gets what was promised, also where the guest has just run ahead again.
    pub fn cancel(&mut self, force: bool) {
        self.wish_for(if force || !self.was_ready { Wish::GiveUp } else { Wish::Finish });
    }

    /// Has the end that was just wished for wait for `finalize`. Who gives up does not wait.
    pub fn hold(&mut self) {
        self.held = !matches!(self.wish, Some(Wish::GiveUp));
    }

    /// Lets a held end go on.
    pub fn finalize(&mut self) {
        self.held = false;
        self.go_on();
    }

    /// True where an end was asked for that is not carried out before `finalize`.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// True where its end waits for `finalize`, and for nothing else.
    pub fn awaits_finalize(&self) -> bool {
        self.pending && self.held
    }

    /// The end with a whole target that was asked for and not reached yet.
    pub fn goal(&self) -> Option<Goal> {
        match (&self.wish, &self.stage) {
            (Some(Wish::Pivot(_)), _) => Some(Goal::Pivot),
            (Some(Wish::Finish), _) => Some(Goal::Copy),
            (_, Stage::Ending(pivot)) if pivot.switches() => Some(Goal::Pivot),
            (_, Stage::Ending(_)) => Some(Goal::Copy),
            _ => None,
        }
    }

    fn wish_for(&mut self, wish: Wish) {
        self.held = false;
        if !matches!(wish, Wish::GiveUp) {
            self.pending = false;
            self.go_on();
        }
        self.wish = Some(wish);
    }

    /// A wish to end outweighs a wish to rest: a job that rests does not catch up.
    fn go_on(&mut self) {
        if self.paused {
            self.pause(false);
        }
    }

    /// Why a pivot or a finish was undone, once.
    pub fn take_undone(&mut self) -> Option<String> {
        self.undone.take()
    }

    /// Why a pivot cannot be asked for now; `None` where it can.
    pub fn not_ready(&self) -> Option<Error> {
        let (left, phase) = (self.remaining(), self.phase.name());
        let late = self.lateness().map(|late| format!("; {late}")).unwrap_or_default();
        (self.phase != Phase::Ready)
            .then(|| Error::invalid(format!("cannot pivot: {left} bytes still to copy (phase: {phase}){late}")))
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
            Some(wish) if self.awaits_finalize() => {
                self.wish = Some(wish);
                return false;
            }
            // What was copied since may be much: made durable now, it does not keep the guest waiting.
            Some(wish) if !self.flushed && !planted(fault::Fault::RecordBeforeFlush) => {
                self.wish = Some(wish);
                self.stage = Stage::Settling(Box::new(self.parts.mirror.begin_settle()));
            }
            Some(wish) if self.held => {
                self.wish = Some(wish);
                self.rest_pending();
            }
            Some(Wish::Pivot(wish)) if wish.0.waits_for_others() => match wish.0.undone() {
                Some(error) => self.undone = Some(error.one_line()),
                None => {
                    self.wish = Some(Wish::Pivot(wish));
                    return false;
                }
            },
            Some(Wish::Pivot(wish)) => self.begin_end(wish.0, Some(wish.1), tools.io.now()),
            Some(Wish::Finish) => self.begin_end(End::Stay, None, tools.io.now()),
        }
        true
    }

    /// From here on the job follows the guest as before, until it is told to finalize.
    fn rest_pending(&mut self) {
        self.pending = true;
        // It will not hold: the guest writes on.
        self.flushed = false;
        if planted(fault::Fault::PendingHoldsGate) {
            self.parts.gate.close();
        }
    }

    /// Closes the gate for the end. A wish to end outweighs a wish to rest.
    fn begin_end(&mut self, end: End, record: Option<RecordFile>, now: Duration) {
        self.paused = false;
        self.flushed = false;
        self.parts.mirror.hold(false);
        self.parts.mirror.set_verifying(false);
        // From the switch on nobody else tries again for the guest.
        self.parts.mirror.target.fail_soon(false);
        let (mirror, gate) = (Arc::clone(&self.parts.mirror), Arc::clone(&self.parts.gate));
        self.stage = Stage::Ending(Box::new(Pivot::begin(mirror, gate, end, record, now, self.parts.pause_max)));
        self.happened(Happened::EndBegan);
    }

    /// A pivot or a finish is over.
    pub(super) fn ended(&mut self, outcome: Result<()>) {
        let Stage::Ending(pivot) = std::mem::replace(&mut self.stage, Stage::Copying) else { return };
        let (switched, interrupted) = (pivot.switches(), pivot.is_interrupted());
        let (end, record) = pivot.into_parts();
        match outcome {
            Ok(()) => {
                self.record = record;
                self.complete = true;
                self.parts.mirror.hold(true);
                self.stage = Stage::Over;
                self.happened(if switched { Happened::PivotDone } else { Happened::CancelDone });
            }
            Err(error) => {
                self.pending = false;
                self.choose_patience();
                self.happened(Happened::EndUndone);
                let poisoned = self.parts.mirror.target.is_poisoned();
                if interrupted && !poisoned && self.tries_again() {
                    // Whoever asked for the end waits until that has come to something.
                    self.wish = Some(match record {
                        Some(record) => Wish::Pivot(Box::new((end, record))),
                        None => Wish::Finish,
                    });
                    return;
                }
                self.record = record;
                self.undone = Some(error.one_line());
                if poisoned {
                    // Whatever was ready is so no more.
                    self.parts.mirror.fail(true, error);
                }
            }
        }
    }

    /// Takes the mirror out of the guest's way.
    pub(super) fn detach(&mut self) {
        // What it would have tried again is tried no more.
        self.rest = None;
        let route = Route { disk: Arc::clone(&self.parts.mirror.source), mirror: None };
        self.parts.mirror.hold(true);
        self.parts.mirror.set_verifying(false);
        self.parts.mirror.planes.unfollow();
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
