//! The target's half of a guest's write that was answered without it, for it takes too long.
//!
//! ```text
//! source ─► target … patience is over ─► mark ─► answer        the guest goes on
//!              └───────────────────────────────────────► end ─► release the claim, drop the pass
//! ```
//!
//! What the kernel has cannot be taken back: sooner or later it lands, with its buffer. Order is everything here:
//!
//! 1. Its chunks are marked before the guest hears, as with any write that the target does not have.
//! 2. Its claim is held to its end. Released before, a copier could bring over what a guest wrote later, and this
//!    write would then replace it. Other guests do not wait for the claim: what is marked goes to the source alone.
//! 3. Its pass is held to its end. Dropped before, a job could be over, and its target somebody else's.
use super::gate::Pass;
use crate::dirty::Claim;
use crate::disk::{Status, Task, Tools};
use crate::fault::{Fault, planted};
use crate::io::{Completion, Io, Loan, Token};
use crate::mirror::{Mirror, TargetTask};
use formats::error::Result;
use formats::range::ByteRange;
use std::sync::Arc;

/// A write to the target that nobody waits for, stepped like a `Task`. It may be dropped only when it is done.
pub struct Late {
    task: Task,
    /// The payload.
    loan: Option<Loan>,
    rest: Rest,
}

/// What is held until it has landed.
struct Rest {
    range: ByteRange,
    claim: Option<Claim>,
    mirror: Arc<Mirror>,
    pass: Pass,
}

impl Late {
    /// The rest of `task`, which writes `range` to the target, where this thread has it; a copier that has it sees to it
    /// itself.
    pub(super) fn begin(
        task: TargetTask,
        loan: Option<Loan>,
        (range, claim): (ByteRange, Claim),
        mirror: Arc<Mirror>,
        pass: Pass,
    ) -> Option<Self> {
        let mut claim = Some(claim);
        if planted(Fault::ReleaseWhileLate) {
            claim.take().into_iter().for_each(|claim| mirror.release(claim, None));
        }
        mirror.begin_late(range);
        let rest = Rest { range, claim, mirror, pass };
        match task.into_task() {
            Ok(task) => Some(Self { task, loan, rest }),
            Err(handle) => {
                handle.leave(move |outcome| rest.end(outcome));
                None
            }
        }
    }

    /// Starts what can be started. Never waits. The tokens are the task's own.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Status {
        self.task.step(tools, base)
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        self.task.complete(tools, base, done);
    }

    /// After `Status::Done`.
    pub fn end(self) {
        let (outcome, piece) = self.task.end();
        self.rest.end(outcome);
        drop((piece, self.loan));
    }
}

impl Rest {
    fn end(self, outcome: Result<()>) {
        self.mirror.end_late(self.range, self.claim, outcome);
        // Not before: nobody else may have the target while this may write to it.
        drop(self.pass);
    }
}
