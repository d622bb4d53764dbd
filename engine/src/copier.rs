//! The copier: takes marked chunks, brings them from the source to the target.
//!
//! ```text
//! take (claim, clear marks) ─► look ─► Data: read ─► runs ─► write ─┐
//!                               │                      └───► zero ──┤
//!                               ├─► Data that can be shared: share ─┤
//!                               ├─► Zero: zero ─────────────────────┤
//!                               └─► the target has it below ────────┤
//!                    any error: mark again, tell the job ───────────┴─► put (release)
//! ```
//!
//! Of what was taken those parts are brought that the target lacks. Where source and target are compared
//! (`Mirror::compares`), what was read is held against the target between the read and the runs. What is being verified
//! goes the same way, and nothing is brought where both are equal: `verify`.
//!
//! A copier never takes a lock across its I/O: a guest write that changes what was just looked at
//! marks the chunk after it, so it is copied again.
mod runs;
mod verify;

use crate::chain::{Look, Source};
use crate::dirty::Claim;
use crate::disk::{SHARE_ALIGN, Status, Task, Tools, cannot_share};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Completion, Io, Loan, Token};
use crate::mirror::{Entrusted, Mirror};
use formats::error::{Error, Result};
use formats::range::ByteRange;
use runs::{Run, differences, runs};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use verify::Verify;

/// Runs of zeroes in data become holes from this many bytes on, at multiples of it.
const ZERO_RUN_MIN: usize = 64 << 10;

/// Where blocks are shared a claim is so many times as long: its length costs nothing.
const SHARED_RUNS: u64 = 16;

/// How many runs a slot takes in one step, where they need no operation at all.
const TURNS_MAX: usize = 256;

/// One slot in so many verifies, where that was asked for.
const VERIFIERS_OF: usize = 4;

/// How many operations that others entrusted to it a copier has under way at most.
const ENTRUSTED_MAX: usize = 16;

/// How much a copier has under way at most.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// Runs of chunks at a time.
    pub slots: usize,
    /// Bytes a run; a multiple of the chunk's length, or one chunk where that is longer.
    pub run_len: usize,
    /// Bytes of memory beside the runs' own.
    pub beside: usize,
}

impl Depth {
    /// Memory that a copier wants for this, in bytes.
    pub fn memory(self) -> usize {
        self.slots * self.run_len + self.beside
    }

    /// How many operations it may have under way.
    pub fn operations(self) -> u32 {
        (self.slots * 8 + ENTRUSTED_MAX) as u32
    }
}

/// Copies with several runs of chunks under way.
pub struct Copier {
    mirror: Arc<Mirror>,
    slots: Vec<Option<Slot>>,
    /// Operations on the target that others wait for. Their tokens are behind those of the slots.
    entrusted: [Option<Entrusted>; ENTRUSTED_MAX],
    /// Where the next search begins, in bytes.
    cursor: u64,
    run_len: usize,
    /// A cluster: a shorter run would inflate it once more.
    run_min: usize,
}

/// Where a step left the copier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Runs are under way.
    Busy,
    /// Nothing is under way, and nothing can be started now.
    Idle,
    /// As `Idle`, but something can be started after this time.
    Throttled(Duration),
}

/// One run of chunks on its way.
struct Slot {
    work: Work,
    /// How many of the ranges that the target lacks were begun.
    begun: usize,
    /// The one that is brought now, and up to where it is.
    range: ByteRange,
    at: u64,
    /// The most that is read at a time.
    len_max: u64,
    stage: Stage,
    /// The target was changed.
    brought: bool,
    failed: bool,
}

/// What is done with a run.
enum Work {
    Copy(Claim),
    Verify(Verify),
}

enum Stage {
    Look,
    Read(Task, ByteRange),
    /// What was read, and the target's to hold it against.
    Compare(Buffer, Task),
    Zero(Task, ByteRange),
    Share(Task, ByteRange),
    /// What was read goes to the target, run by run.
    Place(Placing),
    /// What was sent to the target, and is read back.
    Back(Buffer, Task),
}

struct Placing {
    loan: Loan,
    runs: VecDeque<(Run, usize)>,
    task: Option<(Task, u64)>,
    /// Bytes that need no task: the target has them.
    same: u64,
}

impl Copier {
    /// A copier of `mirror`, beginning at `start` bytes. Its tokens are `Task::TOKENS` a slot, from 0.
    pub fn new(mirror: Arc<Mirror>, depth: Depth, start: u64) -> Self {
        let slots = (0..depth.slots).map(|_| None).collect();
        let run_len = depth.run_len.max(mirror.dirty.chunk_len() as usize);
        let clusters = mirror.source.chain().layers().iter().filter_map(|layer| layer.image.compressible());
        let run_min = clusters.max().unwrap_or(0) as usize;
        Self { mirror, slots, entrusted: Default::default(), cursor: start, run_len, run_min }
    }

    /// Takes in what is done and starts what can be started. Never waits.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, done: &mut Vec<Completion>) -> Progress {
        for completion in done.drain(..) {
            let number = (completion.token.0 / Task::TOKENS) as usize;
            match number.checked_sub(self.slots.len()) {
                None => self.slots[number].as_mut().expect("a slot in use").complete(tools, base(number), completion),
                Some(place) => {
                    let entrusted = self.entrusted[place].as_mut().expect("a place in use");
                    entrusted.complete(tools, base(number), completion);
                }
            }
        }
        let mut throttled = None;
        let mut busy = self.step_entrusted(tools);
        for number in 0..self.slots.len() {
            for turn in 0.. {
                if self.slots[number].is_none() && throttled.is_none() {
                    throttled = self.start(tools, number).err();
                }
                let Some(slot) = &mut self.slots[number] else { break };
                if slot.step(&self.mirror, tools, base(number)) != Status::Done {
                    busy = true;
                    break;
                }
                let slot = self.slots[number].take().expect("it was just stepped");
                slot.finish(&self.mirror);
                if turn == TURNS_MAX {
                    // Runs that cost nothing could go on for long: let others look in between.
                    busy = true;
                    tools.waker.wake();
                    break;
                }
            }
        }
        match throttled {
            _ if busy => Progress::Busy,
            Some(wait) => Progress::Throttled(wait),
            None => Progress::Idle,
        }
    }

    /// True where nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(Option::is_none) && self.entrusted.iter().all(Option::is_none)
    }

    /// What somebody waits for comes first, and whatever is held or has failed. True where some of it is under way.
    fn step_entrusted<I: Io>(&mut self, tools: &mut Tools<I>) -> bool {
        let (mut busy, mut more) = (false, true);
        for (place, number) in self.entrusted.iter_mut().zip(self.slots.len()..) {
            loop {
                if place.is_none() && more {
                    *place = self.mirror.take_entrusted(tools.waker);
                    more = place.is_some();
                }
                let Some(entrusted) = place else { break };
                if entrusted.step(tools, base(number)) != Status::Done {
                    busy = true;
                    break;
                }
                place.take().into_iter().for_each(|entrusted| entrusted.end(&self.mirror));
            }
        }
        busy
    }

    /// Fills a free slot where there is something to copy; says how long to wait where the speed
    /// limit forbids it.
    fn start<I: Io>(&mut self, tools: &Tools<I>, number: usize) -> std::result::Result<(), Duration> {
        self.slots[number] = match self.find(tools, number)? {
            None => {
                // Marked chunks may be in the claim of a guest that writes to both sides.
                self.mirror.work.listen(tools.waker);
                self.mirror.released().listen(tools.waker);
                self.find(tools, number)?
            }
            slot => slot,
        };
        Ok(())
    }

    /// Something for this slot to do. A few of them verify, so that neither waits for the other's end.
    fn find<I: Io>(&mut self, tools: &Tools<I>, number: usize) -> std::result::Result<Option<Slot>, Duration> {
        if number < (self.slots.len() / VERIFIERS_OF).max(1)
            && let Some(verify) = self.take_to_verify(tools)?
        {
            return Ok(Some(Slot::verify(verify)));
        }
        Ok(self.take(tools)?.map(|claim| {
            let range = self.mirror.dirty.claimed(&claim);
            self.cursor = range.end;
            if planted(Fault::ClearAfterCopy) {
                self.mirror.dirty.mark(range);
            }
            Slot::new(Work::Copy(claim), ByteRange { start: 0, end: 0 }, self.run_len as u64)
        }))
    }

    /// The next run to copy, from the cursor on and then from the disk's start.
    fn take<I: Io>(&self, tools: &Tools<I>) -> std::result::Result<Option<Claim>, Duration> {
        if self.mirror.is_held() || self.mirror.dirty.is_clean() {
            return Ok(None);
        }
        self.mirror.may_copy(tools.io.now())?;
        let runs = if self.mirror.shares() { SHARED_RUNS } else { 1 };
        let run_len = (self.run_len >> self.mirror.courtesy.halvings()).max(self.run_min);
        let chunks_max = (run_len as u64 / self.mirror.dirty.chunk_len()).max(1) * runs;
        if let Some(range) = self.mirror.probe() {
            return Ok(self.mirror.take(range, chunks_max));
        }
        Ok(self.mirror.take_next(self.cursor, chunks_max))
    }
}

impl Slot {
    fn new(work: Work, range: ByteRange, len_max: u64) -> Self {
        let (at, stage) = (range.start, Stage::Look);
        Self { work, begun: 0, range, at, len_max, stage, brought: false, failed: false }
    }

    /// The next range; false where there is none.
    fn next_range(&mut self) -> bool {
        let Work::Copy(claim) = &self.work else { return false };
        let next = claim.lacking().get(self.begun).filter(|_| !self.failed).copied();
        if let Some(range) = next {
            (self.begun, self.range, self.at) = (self.begun + 1, range, range.start);
        }
        next.is_some()
    }

    fn step<I: Io>(&mut self, mirror: &Mirror, tools: &mut Tools<I>, base: Token) -> Status {
        loop {
            let status = match &mut self.stage {
                Stage::Look if self.at >= self.range.end || self.failed => {
                    if !self.next_range() {
                        return Status::Done;
                    }
                    continue;
                }
                Stage::Look => {
                    if let Err(error) = self.look(mirror, tools) {
                        self.fail(mirror, false, error);
                    }
                    continue;
                }
                Stage::Read(task, _)
                | Stage::Compare(_, task)
                | Stage::Zero(task, _)
                | Stage::Share(task, _)
                | Stage::Back(_, task) => task.step(tools, base),
                Stage::Place(placing) => placing.step(mirror, self.at, tools, base),
            };
            if status != Status::Done {
                return status;
            }
            self.advance(mirror, tools);
        }
    }

    fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        match &mut self.stage {
            Stage::Read(task, _)
            | Stage::Compare(_, task)
            | Stage::Zero(task, _)
            | Stage::Share(task, _)
            | Stage::Back(_, task) => {
                task.complete(tools, base, done);
            }
            Stage::Place(Placing { task: Some((task, _)), .. }) => task.complete(tools, base, done),
            Stage::Look | Stage::Place(_) => unreachable!("nothing is under way"),
        }
    }

    /// Finds out what the next bytes are and starts to bring them.
    fn look<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>) -> Result<()> {
        let rest = ByteRange { start: self.at, end: self.range.end };
        if matches!(self.work, Work::Verify(_)) {
            return self.look_to_verify(mirror, tools, rest);
        }
        if let Some(below) = below_both(mirror, rest)?
            && let below = mirror.whole(below)
            && !below.is_empty()
        {
            self.at = below.end;
            return Ok(());
        }
        let (mut piece, source) = mirror.source.chain().map(rest.start, rest.len(), Look::Holes)?;
        if source == Source::Zero
            && let piece = mirror.whole(piece)
            && !piece.is_empty()
        {
            if planted(Fault::SkipZeroes) || is_hole(mirror, piece)? {
                self.at = piece.end;
            } else {
                let task = Task::zero(Arc::clone(&mirror.target), piece, mirror.zeroing);
                self.stage = Stage::Zero(task, piece);
            }
            return Ok(());
        }
        if let (Source::Data { layer, host }, true) = (source, mirror.shares() && !mirror.compares())
            && let from = mirror.source.chain().layers()[layer].file.file()
            && from.as_remote().is_none()
            && let Some(shared) = shareable(piece, host)
        {
            let from = from.clone();
            self.stage = Stage::Share(Task::share(Arc::clone(&mirror.target), shared, from, host), shared);
            return Ok(());
        }
        let rest = rest.prefix(self.len_max);
        piece = piece.prefix(self.len_max);
        // As much as there is data behind it: one read moves many extents.
        while piece.end < rest.end {
            let next = ByteRange { start: piece.end, end: rest.end };
            if below_both(mirror, next)?.is_some() {
                break;
            }
            match mirror.source.chain().map(next.start, next.len(), Look::Holes)? {
                (_, Source::Zero) => break,
                (more, _) => piece.end = more.end,
            }
        }
        self.read(mirror, tools, mirror.completed(piece));
        Ok(())
    }

    fn read<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>, piece: ByteRange) {
        mirror.spend(piece.len());
        let buf = tools.arena.buffer(piece.len() as usize);
        self.stage = Stage::Read(Task::read(Arc::clone(&mirror.source), piece, buf), piece);
    }

    /// What follows a stage that is done.
    fn advance<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>) {
        match std::mem::replace(&mut self.stage, Stage::Look) {
            Stage::Look => {}
            Stage::Read(task, range) => match task.end() {
                (Ok(()), Some(bytes)) if mirror.compares() || matches!(self.work, Work::Verify(_)) => {
                    let buf = tools.arena.buffer(bytes.len());
                    self.stage = Stage::Compare(bytes, Task::read(Arc::clone(&mirror.target), range, buf));
                }
                (Ok(()), Some(bytes)) => {
                    debug_assert!(range.start == self.at);
                    let granule = mirror.compress.map_or(ZERO_RUN_MIN, |len| len as usize);
                    let runs = runs(&bytes, granule).collect();
                    self.stage = Stage::Place(Placing::new(bytes, runs));
                }
                (Err(error), _) => self.fail(mirror, false, error),
                (Ok(()), None) => self.fail(mirror, false, Error::invalid("a read without its buffer")),
            },
            Stage::Compare(bytes, task) => match task.end() {
                (Ok(()), Some(there)) if self.is_equal(mirror, &bytes, &there) => self.at += bytes.len() as u64,
                (Ok(()), Some(there)) => {
                    let runs = differences(&bytes, &there, ZERO_RUN_MIN).collect();
                    self.stage = Stage::Place(Placing::new(bytes, runs));
                }
                (Err(error), _) => self.fail(mirror, true, error),
                (Ok(()), None) => self.fail(mirror, true, Error::invalid("a read without its buffer")),
            },
            Stage::Zero(task, range) => {
                mirror.spend(task.zeroes_written());
                match task.end().0 {
                    Ok(()) => (self.at, self.brought) = (range.end, true),
                    Err(error) => self.fail(mirror, true, error),
                }
            }
            Stage::Share(task, range) => match task.end().0 {
                Ok(()) => {
                    (self.at, self.brought) = (range.end, true);
                    mirror.stats.shared.fetch_add(range.len(), Ordering::Relaxed);
                }
                // Nothing was changed: it is moved instead, and so is the rest.
                Err(error) if cannot_share(&error) => mirror.set_shares(false),
                Err(error) => self.fail(mirror, true, error),
            },
            Stage::Place(mut placing) => match placing.take_outcome() {
                Ok((written, len)) => {
                    self.at += len;
                    self.brought |= placing.same == 0;
                    placing.same = 0;
                    mirror.stats.written.fetch_add(written, Ordering::Relaxed);
                    match placing.runs.is_empty() {
                        false => self.stage = Stage::Place(placing),
                        true => self.read_back(mirror, tools, placing.loan.end()),
                    }
                }
                Err(error) => self.fail(mirror, true, error),
            },
            Stage::Back(bytes, task) => match task.end() {
                (Ok(()), Some(there)) => self.hold_against(mirror, &bytes, &there),
                (Err(error), _) => self.fail(mirror, true, error),
                (Ok(()), None) => self.fail(mirror, true, Error::invalid("a read without its buffer")),
            },
        }
    }

    fn fail(&mut self, mirror: &Mirror, target: bool, error: Error) {
        self.failed = true;
        self.stage = Stage::Look;
        mirror.fail(target, error);
    }

    /// Marks again what failed, and only then lets go.
    fn finish(self, mirror: &Mirror) {
        let claim = match self.work {
            Work::Copy(claim) => claim,
            Work::Verify(verify) => return verify.finish(mirror, self.brought, self.failed),
        };
        if !self.failed {
            mirror.stats.copied.fetch_add(claim.lacking_len(), Ordering::Relaxed);
        }
        let claimed = mirror.dirty.claimed(&claim);
        mirror.put(claim, self.brought, self.failed);
        if planted(Fault::ClearAfterCopy) {
            while let Some(claim) = mirror.take(claimed, 1) {
                mirror.put(claim, false, false);
            }
        }
    }
}

impl Placing {
    fn new(bytes: Buffer, runs: VecDeque<(Run, usize)>) -> Self {
        Self { loan: Loan::new(bytes), runs, task: None, same: 0 }
    }

    fn step<I: Io>(&mut self, mirror: &Mirror, at: u64, tools: &mut Tools<I>, base: Token) -> Status {
        if self.task.is_none() {
            let Some((run, len)) = self.runs.pop_front() else { return Status::Done };
            let range = ByteRange { start: at, end: at + len as u64 };
            let piece = self.loan.lend(len);
            let target = Arc::clone(&mirror.target);
            let task = match (run, mirror.compress) {
                (Run::Same, _) => {
                    self.loan.give_back(piece);
                    self.same = range.len();
                    return Status::Done;
                }
                (Run::Zero, _) => {
                    self.loan.give_back(piece);
                    Task::zero(target, range, mirror.zeroing)
                }
                (Run::Data, None) => Task::write(target, range, piece),
                (Run::Data, Some(cluster)) => Task::compress(target, range, piece, cluster),
            };
            self.task = Some((task, len as u64));
        }
        self.task.as_mut().map_or(Status::Done, |(task, _)| task.step(tools, base))
    }

    /// How many bytes the run that is done wrote as data, and how long it was.
    fn take_outcome(&mut self) -> Result<(u64, u64)> {
        let Some((task, len)) = self.task.take() else { return Ok((0, self.same)) };
        let (outcome, piece) = task.end();
        let written = piece.as_ref().map_or(0, |piece| piece.len() as u64);
        if let Some(piece) = piece {
            self.loan.give_back(piece);
        }
        outcome.map(|()| (written, len))
    }
}

/// In a shallow copy, a prefix of `range` that neither top layer has: both read it from the same layers below.
/// The source's may have lost what the target's was given, by a power cut or by a discard.
fn below_both(mirror: &Mirror, range: ByteRange) -> Result<Option<ByteRange>> {
    if !mirror.shallow {
        return Ok(None);
    }
    let (prefix, in_source) = mirror.source.chain().map_top(range.start, range.len())?;
    if in_source {
        return Ok(None);
    }
    let (prefix, in_target) = mirror.target.chain().map_top(prefix.start, prefix.len())?;
    Ok((!in_target).then_some(prefix))
}

/// The whole blocks at the start of `piece`, whose bytes are at `host` of a file.
fn shareable(piece: ByteRange, host: u64) -> Option<ByteRange> {
    let end = piece.end - piece.end % SHARE_ALIGN;
    let aligned = piece.start.is_multiple_of(SHARE_ALIGN) && host.is_multiple_of(SHARE_ALIGN);
    (aligned && end > piece.start).then_some(ByteRange { start: piece.start, end })
}

/// True where all of `range` is a hole of the target already. The claim keeps it so.
fn is_hole(mirror: &Mirror, range: ByteRange) -> Result<bool> {
    let (found, source) = mirror.target.chain().map(range.start, range.len(), Look::Holes)?;
    Ok(source == Source::Zero && found == range)
}

fn base(slot: usize) -> Token {
    Token(slot as u64 * Task::TOKENS)
}
