//! Operations on the target that their owners must not wait in: a copier carries them out.
//!
//! ```text
//! entrust ─► queue ─► a copier steps it ─► over ─► its owner is woken
//!                        └ its owner has left ───► what is to be done behind it
//! ```
//!
//! A call on an image may wait for one of its tables, and on a device that answers nothing for good; and so does whoever
//! wants the lock that is held meanwhile. A guest's thread must not be among them, for all requests of its connection
//! stand still with it, nor must the thread that steps the jobs. So they touch a target's tables only where that needs no
//! wait at all (`Image::reserve_at_once`), and leave everything else to the copiers, who wait for the target anyway. What
//! has no tables everybody does for himself.
//!
//! Whoever entrusts something may leave it: what was to follow, the release of a claim for one, is then done by the copier.
use super::Mirror;
use crate::disk::{Status, Task, Tools};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Completion, Io, Token, Waker};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use formats::error::{Error, Result};
use formats::image::Zeroing;
use formats::range::ByteRange;
use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

/// One operation on the target, stepped like a `Task`.
pub struct TargetTask(Where);

#[expect(clippy::large_enum_variant, reason = "it lies in its owner's place; boxed, each request would allocate")]
enum Where {
    Here(Task),
    Elsewhere(Handle),
}

/// What a copier carries out.
pub struct Entrusted {
    task: Task,
    handle: Handle,
}

/// How its owner hears of it.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<State>>);

enum State {
    /// Its owner waits, and is woken when it is over.
    UnderWay(Option<Waker>),
    /// Nobody waits.
    Left(Behind),
    Done(Result<()>, Option<Buffer>),
    Taken,
}

/// What is done when it is over.
type Behind = Box<dyn FnOnce(Result<()>) + Send>;

/// What copiers have not taken up yet, and how much is not over.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<VecDeque<Entrusted>>,
    count: AtomicU64,
}

impl Mirror {
    /// Writes a guest's `payload` to the target too.
    pub fn write_target(&self, range: ByteRange, payload: Buffer) -> TargetTask {
        let target = || Arc::clone(&self.target);
        if !self.target.may_wait() {
            return TargetTask(Where::Here(Task::write(target(), range, payload)));
        }
        match Task::write_at_once(target(), range, payload) {
            Ok(task) => TargetTask(Where::Here(task)),
            Err(payload) => self.entrust(Task::write(target(), range, payload)),
        }
    }

    /// Makes zeroes of the target's `range` too.
    pub fn zero_target(&self, range: ByteRange, zeroing: Zeroing) -> TargetTask {
        self.entrust(Task::zero(Arc::clone(&self.target), range, zeroing))
    }

    /// Makes durable what the target has.
    pub fn flush_target(&self) -> TargetTask {
        self.entrust(Task::flush(Arc::clone(&self.target)))
    }

    /// Has a copier do what may wait.
    fn entrust(&self, task: Task) -> TargetTask {
        if !self.target.may_wait() || planted(Fault::TablesInGuest) {
            return TargetTask(Where::Here(task));
        }
        let handle = Handle(Arc::new(Mutex::new(State::UnderWay(None))));
        self.entrusted.count.fetch_add(1, Ordering::SeqCst);
        self.entrusted.waiting().push_back(Entrusted { task, handle: handle.clone() });
        self.errands.ring();
        TargetTask(Where::Elsewhere(handle))
    }

    /// The next one for a copier, or `waker` is called when there is one.
    pub fn take_entrusted(&self, waker: &Waker) -> Option<Entrusted> {
        if !self.target.may_wait() {
            return None;
        }
        let next = || self.entrusted.waiting().pop_front();
        next().or_else(|| {
            self.errands.listen(waker);
            next()
        })
    }

    /// True where something was entrusted to copiers that is not over.
    pub fn has_entrusted(&self) -> bool {
        self.entrusted.count.load(Ordering::SeqCst) > 0
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Entrusted>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TargetTask {
    /// Starts what can be started. Never waits.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Status {
        match &mut self.0 {
            Where::Here(task) => task.step(tools, base),
            Where::Elsewhere(handle) if handle.is_done(tools.waker) => Status::Done,
            Where::Elsewhere(_) => Status::Blocked,
        }
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        match &mut self.0 {
            Where::Here(task) => task.complete(tools, base, done),
            Where::Elsewhere(_) => unreachable!("a copier has its operations"),
        }
    }

    /// What became of it, and its payload. After `Status::Done`.
    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        match self.0 {
            Where::Here(task) => task.end(),
            Where::Elsewhere(handle) => match std::mem::replace(&mut *handle.state(), State::Taken) {
                State::Done(outcome, payload) => (outcome, payload),
                _ => (Err(Error::invalid("an operation on the target that is not over")), None),
            },
        }
    }

    /// The task, where nobody else has it.
    pub fn into_task(self) -> std::result::Result<Task, Handle> {
        match self.0 {
            Where::Here(task) => Ok(task),
            Where::Elsewhere(handle) => Err(handle),
        }
    }
}

impl Handle {
    /// Waits no more: `behind` is called with what comes of it.
    pub fn leave(self, behind: impl FnOnce(Result<()>) + Send + 'static) {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Taken) {
            State::UnderWay(_) => *state = State::Left(Box::new(behind)),
            State::Done(outcome, payload) => {
                drop(state);
                behind(outcome);
                drop(payload);
            }
            State::Left(_) | State::Taken => unreachable!("it is left once"),
        }
    }

    fn is_done(&self, waker: &Waker) -> bool {
        match &mut *self.state() {
            State::Done(..) => true,
            State::UnderWay(known) => {
                if !known.as_ref().is_some_and(|known| known.same(waker)) {
                    *known = Some(waker.clone());
                }
                false
            }
            State::Left(_) | State::Taken => unreachable!("who has left does not ask"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entrusted {
    /// Starts what can be started.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Status {
        self.task.step(tools, base)
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        self.task.complete(tools, base, done);
    }

    /// Tells its owner, or does what is to be done behind it. After `Status::Done`.
    pub fn end(self, mirror: &Mirror) {
        let (outcome, payload) = self.task.end();
        let mut state = self.handle.state();
        match std::mem::replace(&mut *state, State::Taken) {
            State::UnderWay(waker) => {
                *state = State::Done(outcome, payload);
                drop(state);
                waker.iter().for_each(Waker::wake);
            }
            State::Left(behind) => {
                drop(state);
                behind(outcome);
                // Not before: the kernel had it up to here.
                drop(payload);
            }
            State::Done(..) | State::Taken => unreachable!("it ends once"),
        }
        mirror.entrusted.count.fetch_sub(1, Ordering::SeqCst);
        mirror.progress.ring();
    }
}
