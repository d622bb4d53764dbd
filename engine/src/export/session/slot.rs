//! One request of a client, from its action to its answer.
use super::reply::{Answer, Run};
use super::status::{self, Runs};
use crate::disk::{Status, Tools};
use crate::export::gate::Gate;
use crate::export::late::Late;
use crate::export::request::{Action as Wish, GuestRequest};
use crate::io::{Buffer, Completion, Io, Token};
use formats::error::{Error, Kind};
use formats::image::Zeroing;
use formats::nbd::{Action, Errno, Negotiated, ReplyTo, Style};
use formats::range::ByteRange;
use std::time::Duration;

/// Reads from this length on look for holes first: in a shorter one they are not worth the look.
const HOLES_FROM: u64 = 16 << 10;

/// One request that is under way.
pub(super) struct Slot {
    /// Whom its answer is for.
    pub to: ReplyTo,
    /// Payload that it holds, in bytes.
    pub bytes: u64,
    /// It waits for somebody else: step it when woken.
    pub blocked: bool,
    action: Action,
    /// What goes through the gate to the disk; BLOCK_STATUS looks for itself.
    request: Option<GuestRequest>,
    /// A read's holes and data, where it has both.
    runs: Vec<Run>,
    /// What is known without asking the disk.
    answer: Option<Answer>,
    /// What of it goes on behind its answer.
    late: Option<Late>,
}

impl Slot {
    /// Starts `action`; `payload` is a write's.
    pub fn start<I: Io>(to: ReplyTo, action: Action, payload: Option<Buffer>, gate: &Gate, tools: &Tools<I>) -> Self {
        let mut slot = Self {
            to,
            bytes: bytes_of(&action),
            blocked: false,
            action,
            request: None,
            runs: Vec::new(),
            answer: None,
            late: None,
        };
        let (wish, range, fua) = match action {
            Action::Read { range, unfragmented } => {
                if to.style != Style::Simple && !unfragmented && range.len() >= HOLES_FROM {
                    match look_for_holes(gate, tools, range) {
                        Runs::One { hole: true } => return Self { answer: Some(Answer::Hole(range)), ..slot },
                        Runs::One { hole: false } => {}
                        Runs::Several(runs) => slot.runs = runs,
                    }
                }
                (Wish::Read(take(tools, range.len())), range, false)
            }
            Action::Write { range, fua } => (Wish::Write(payload.expect("a write has a payload")), range, fua),
            Action::Trim { range, fua } => (Wish::Zero { zeroing: Zeroing::Discard, fast: false }, range, fua),
            Action::WriteZeroes { range, fua, keep, fast } => {
                let zeroing = if keep { Zeroing::Keep } else { Zeroing::Unmap };
                (Wish::Zero { zeroing, fast }, range, fua)
            }
            Action::Cache { range } => (Wish::Prefetch, range, false),
            Action::Flush => (Wish::Flush, ByteRange::default(), false),
            Action::BlockStatus { .. } => return slot,
        };
        slot.request = Some(GuestRequest::new(wish, range, fua));
        slot
    }

    /// Takes it as far as it goes. The answer, when there is one.
    pub fn step<I: Io>(
        &mut self,
        negotiated: &Negotiated,
        gate: &Gate,
        tools: &mut Tools<I>,
        base: Token,
    ) -> Option<Answer> {
        if self.answer.is_some() {
            return self.answer.take();
        }
        let Some(request) = &mut self.request else { return self.status(negotiated, gate, tools) };
        let status = request.step(gate, tools, base);
        self.blocked = status == Status::Blocked;
        (status == Status::Done).then(|| self.answer())
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        self.request.as_mut().expect("only a guest's request has operations").complete(tools, base, done);
    }

    /// When it has to be stepped at the latest, if it waits for a mirror.
    pub fn patience_ends(&self) -> Option<Duration> {
        self.request.as_ref()?.patience_ends()
    }

    /// What of it goes on behind its answer, to be kept until it is done.
    pub fn take_late(&mut self) -> Option<Late> {
        self.late.take()
    }

    fn answer(&mut self) -> Answer {
        let mut request = self.request.take().expect("it was just stepped");
        self.late = request.take_late();
        let (outcome, buffer) = request.end();
        match (outcome, self.action, buffer) {
            (Err(error), action, _) => failed(&action, &error),
            (Ok(()), Action::Read { range, .. }, Some(buffer)) => match self.runs.is_empty() {
                true => Answer::Data(range, buffer),
                false => Answer::Mixed(std::mem::take(&mut self.runs), buffer),
            },
            (Ok(()), ..) => Answer::Done,
        }
    }

    fn status<I: Io>(&mut self, negotiated: &Negotiated, gate: &Gate, tools: &Tools<I>) -> Option<Answer> {
        let Action::BlockStatus { range, one, contexts } = self.action else { unreachable!("the rest are requests") };
        let pass = gate.enter(tools.waker);
        self.blocked = pass.is_none();
        let pass = pass?;
        let selected = negotiated.contexts.iter().enumerate().filter(|(place, _)| contexts.has(*place));
        let told = selected.map(|(_, (number, context))| {
            status::extents(pass.route(), context, range, one).map(|extents| (*number, extents))
        });
        Some(match told.collect() {
            Ok(contexts) => Answer::Status(contexts),
            Err(error) => failed(&self.action, &error),
        })
    }
}

/// Payload that an action holds from its start to the end of its reply, in bytes.
pub(super) fn bytes_of(action: &Action) -> u64 {
    match action {
        Action::Read { range, .. } | Action::Write { range, .. } => range.len(),
        _ => 0,
    }
}

/// Memory for a payload: from the session's own where there is room.
pub(super) fn take<I: Io>(tools: &Tools<I>, len: u64) -> Buffer {
    tools.arena.buffer(len as usize)
}

/// Where nobody may look now, or the look fails, all is read as data: that has its own answer.
fn look_for_holes<I: Io>(gate: &Gate, tools: &Tools<I>, range: ByteRange) -> Runs {
    let looked = gate.enter(tools.waker).and_then(|pass| status::runs(pass.route().disk.chain(), range).ok());
    looked.unwrap_or(Runs::One { hole: false })
}

/// The log names the file; the client is not told where its disk lies.
fn failed(action: &Action, error: &Error) -> Answer {
    let (what, range) = match action {
        Action::Read { range, .. } => ("read", *range),
        Action::Write { range, .. } => ("write", *range),
        Action::Trim { range, .. } => ("trim", *range),
        Action::WriteZeroes { range, .. } => ("zeroing", *range),
        Action::BlockStatus { range, .. } => ("block status", *range),
        Action::Cache { range } => ("prefetch", *range),
        Action::Flush => ("flush", ByteRange::default()),
    };
    tracing::debug!(error = error.one_line(), "a guest's {what} failed");
    let fast = matches!(action, Action::WriteZeroes { fast: true, .. });
    let errno = match (error.raw_os_error(), error.kind()) {
        (Some(number), _) if fast && number == rustix::io::Errno::OPNOTSUPP.raw_os_error() => Errno::NotSup,
        (Some(number), _) => Errno::from_system(number),
        (None, Kind::Invalid) => Errno::Inval,
        (None, _) => Errno::Io,
    };
    let why = if range.is_empty() { format!("{what} failed") } else { format!("{what} of {range} failed") };
    Answer::Failed(errno, why)
}
