//! Sync points: the target is settled while the copy goes on, so that a kill costs little.
//!
//! What the target has in memory only is copied again after a kill. A settle is due when there is any, and a
//! while after the last one: a second, or ten times as long as that took, so that a slow device has a tenth of
//! its time for it at most. Copiers go on meanwhile. On a failure nothing is forgotten.
use crate::disk::{Status, Task, Tools};
use crate::io::{Completion, Io, Token};
use crate::mirror::{Mirror, TargetTask};
use std::time::Duration;

/// How much longer than a settle the rest after it is.
const REST_TIMES: u32 = 10;

/// The sync points of one job, one at a time.
pub(super) struct Syncs {
    under_way: Option<(Box<TargetTask>, Duration)>,
    /// None begins before.
    due: Duration,
    rest_min: Duration,
}

impl Syncs {
    /// At least `rest_min` lies between two.
    pub fn new(rest_min: Duration) -> Self {
        Self { under_way: None, due: Duration::ZERO, rest_min }
    }

    /// True while a settle is on its way.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Begins one where it is due and `may_begin`, and goes on with it. Never waits.
    pub fn step<I: Io>(&mut self, mirror: &Mirror, tools: &mut Tools<I>, base: Token, may_begin: bool) {
        let now = tools.io.now();
        if self.under_way.is_none() && may_begin && now >= self.due && mirror.planes.unsettled_len() > 0 {
            self.under_way = Some((Box::new(mirror.begin_settle()), now));
        }
        let Some((task, begun)) = &mut self.under_way else { return };
        if task.step(tools, own(base)) != Status::Done {
            return;
        }
        self.due = now + self.rest_min.max((now - *begun) * REST_TIMES);
        let outcome = self.under_way.take().map_or(Ok(()), |(task, _)| task.end().0);
        if let Err(error) = mirror.end_settle(outcome) {
            mirror.fail(true, error);
        }
    }

    /// True where `done` was an operation of it; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> Option<Completion> {
        match &mut self.under_way {
            Some((task, _)) if done.token.0 >= own(base).0 => {
                task.complete(tools, own(base), done);
                None
            }
            _ => Some(done),
        }
    }
}

/// Behind the tokens of the job's own tasks.
fn own(base: Token) -> Token {
    Token(base.0 + Task::TOKENS)
}
