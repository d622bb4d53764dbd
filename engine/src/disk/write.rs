//! Writing a range of a disk: room first, then what is around the payload, then the payload, then
//! the image's word for it. So no reader ever sees a cluster with somebody's old bytes.
//!
//! ```text
//! reserve ─► [ read span ─► lay the payload over it ] ─► write ─► … ─► commit
//! ```
use super::Disk;
use super::flush::Settling;
use super::step::{Moved, Status, Tools, keep, start_write, write_there};
use super::task::Task;
use crate::chain::{Layer, Look, Source};
use crate::data_file::Stay;
use crate::io::{Buffer, Completion, Io, Loan, Token};
use formats::error::{Error, Result};
use formats::image::{Reservation, Reserve};
use formats::range::ByteRange;
use std::sync::Arc;

/// How many reservations one write works on at once.
const PARTS: usize = 4;
/// Up to here a payload and what is around it are put together and written as one; in bytes.
const MERGE_MAX: u64 = 128 << 10;
/// Local tokens: a part's own operation, then what the reads of all parts use, then the settle's.
const READS: u64 = PARTS as u64;
const READ_TOKENS: u64 = super::read::PARTS as u64;
const SETTLE: u64 = READS + PARTS as u64 * READ_TOKENS;

/// How many tokens a write uses.
pub(super) const TOKENS: u64 = SETTLE + 1;

pub(super) struct Write {
    range: ByteRange,
    /// Up to here every byte has its room.
    at: u64,
    loan: Loan,
    parts: [Option<Part>; PARTS],
    settling: Settling,
    error: Option<Error>,
}

/// One reservation and how far it has come.
struct Part {
    reservation: Reservation,
    /// What is to be written: the reservation's bytes, and around them where that must be filled.
    span: ByteRange,
    /// Up to here it is written.
    at: u64,
    /// The caller's bytes; absent while they are being written and when they have been.
    payload: Option<Buffer>,
    /// Its place among the file's writers, from before it reads the rest of a block.
    stay: Option<Stay>,
    stage: Stage,
}

enum Stage {
    /// Choose the next bytes of the span.
    Next,
    /// Bring what is there now.
    Reading(Box<Task>, ByteRange),
    /// Write these bytes when their pages are free.
    Waiting(Buffer),
    /// The kernel has them.
    Writing(Stay),
    /// It failed.
    Failed,
}

impl Write {
    pub fn new(range: ByteRange, buf: Buffer) -> Self {
        let loan = Loan::new(buf);
        Self { range, at: range.start, loan, parts: Default::default(), settling: Settling::default(), error: None }
    }

    /// One that has all its room, and nothing around it to fill. Else `buf` comes back.
    pub fn at_once(disk: &Disk, range: ByteRange, buf: Buffer) -> std::result::Result<Self, Buffer> {
        let mut write = Self::new(range, buf);
        for part in &mut write.parts {
            let (rest, top) = (ByteRange { start: write.at, end: range.end }, disk.chain().top());
            let piece = top.file.first_piece(rest);
            let reservation = match rest.is_empty() || disk.is_poisoned() || top.file.around(piece).is_some() {
                true => None,
                false => top.image.reserve_at_once(piece),
            };
            let Some(reservation) = reservation else { break };
            (write.at, *part) = (reservation.guest.end, Some(Part::new(reservation)));
        }
        if write.at < range.end {
            return Err(write.loan.end());
        }
        for part in write.parts.iter_mut().flatten() {
            part.payload = Some(write.loan.lend(part.span.len() as usize));
        }
        Ok(write)
    }

    pub fn step<I: Io>(&mut self, disk: &Arc<Disk>, tools: &mut Tools<I>, base: Token) -> Status {
        let mut blocked = false;
        loop {
            if let Err(error) = self.reserve(disk, tools, base, &mut blocked) {
                keep(&mut self.error, error);
            }
            let mut ended = false;
            for number in 0..PARTS {
                ended |= self.step_part(disk, tools, base, number, &mut blocked);
            }
            // A part that ended makes room for the next one.
            if !ended {
                break;
            }
        }
        match () {
            () if self.in_kernel() => Status::Busy,
            () if self.is_over() => Status::Done,
            () if blocked => Status::Blocked,
            () => Status::Busy,
        }
    }

    fn is_over(&self) -> bool {
        let all = self.at == self.range.end || self.error.is_some();
        all && !self.settling.is_under_way() && self.parts.iter().all(Option::is_none)
    }

    fn in_kernel(&self) -> bool {
        let busy = |part: &Part| matches!(part.stage, Stage::Reading(..) | Stage::Writing(_));
        self.parts.iter().flatten().any(busy) || self.settling.in_kernel()
    }

    /// Gets room for as much of the range as there are free parts.
    fn reserve<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        blocked: &mut bool,
    ) -> Result<()> {
        disk.refuse_poisoned()?;
        while self.at < self.range.end && self.error.is_none() {
            if !self.settling.step(disk, tools, Token(base.0 + SETTLE), blocked)? {
                return Ok(());
            }
            let Some(free) = self.parts.iter().position(Option::is_none) else { return Ok(()) };
            let top = disk.chain().top();
            let wanted = top.file.first_piece(ByteRange { start: self.at, end: self.range.end });
            match top.image.reserve(wanted).map_err(|e| at(top, e))? {
                Reserve::Room(reservation) => {
                    let span = span(disk, &reservation)?;
                    // Nothing fails from here on: what is lent has to come back.
                    self.at = reservation.guest.end;
                    let payload = Some(self.loan.lend(reservation.guest.len() as usize));
                    self.parts[free] = Some(Part { at: span.start, span, payload, ..Part::new(reservation) });
                }
                Reserve::Busy => {
                    *blocked = true;
                    return Ok(());
                }
                Reserve::Settle => self.settling.begin(),
            }
        }
        Ok(())
    }

    /// Takes one part as far as it goes. True where it ended.
    fn step_part<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        number: usize,
        blocked: &mut bool,
    ) -> bool {
        let Some(part) = &mut self.parts[number] else { return false };
        loop {
            match std::mem::replace(&mut part.stage, Stage::Failed) {
                Stage::Next if part.at == part.span.end => break,
                Stage::Next => match part.next(disk, tools) {
                    Some(stage) => part.stage = stage,
                    None => {
                        part.stage = Stage::Next;
                        *blocked = true;
                        return false;
                    }
                },
                Stage::Reading(mut task, range) => {
                    match task.step(tools, Token(base.0 + READS + number as u64 * READ_TOKENS)) {
                        Status::Done => match task.end() {
                            (Ok(()), Some(bytes)) => part.stage = part.lay_over(range, bytes, &mut self.loan),
                            (outcome, _) => {
                                let lost = || Error::invalid("a read without its buffer");
                                keep(&mut self.error, outcome.err().unwrap_or_else(lost));
                            }
                        },
                        _ => {
                            part.stage = Stage::Reading(task, range);
                            return false;
                        }
                    }
                }
                Stage::Waiting(buf) => {
                    let (token, host) = (Token(base.0 + number as u64), part.host());
                    let started = match part.stay.take() {
                        Some(stay) => {
                            write_there(disk, tools, token, host, buf);
                            Ok(stay)
                        }
                        None => start_write(disk, tools, token, host, buf),
                    };
                    match started {
                        Ok(stay) => part.stage = Stage::Writing(stay),
                        Err(buf) => {
                            part.stage = Stage::Waiting(buf);
                            *blocked = true;
                        }
                    }
                    return false;
                }
                Stage::Writing(stay) => {
                    part.stage = Stage::Writing(stay);
                    return false;
                }
                Stage::Failed => break,
            }
        }
        self.end_part(disk, number);
        true
    }

    fn end_part(&mut self, disk: &Disk, number: usize) {
        let part = self.parts[number].take().expect("it was just stepped");
        if let Some(payload) = part.payload {
            self.loan.give_back(payload);
        }
        let top = disk.chain().top();
        if let Some(stay) = part.stay {
            top.file.leave(stay);
        }
        if part.at == part.span.end {
            if let Err(error) = top.image.commit(part.reservation) {
                keep(&mut self.error, at(top, error));
            }
        } else {
            drop(part.reservation);
        }
        disk.bell.ring();
    }

    pub fn complete<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token, local: u64, done: Completion) {
        match local {
            SETTLE => self.settling.complete(disk, done.result),
            local if local >= READS => {
                let number = (local - READS) / READ_TOKENS;
                let part = self.parts[number as usize].as_mut().expect("a part that reads");
                let Stage::Reading(task, _) = &mut part.stage else { unreachable!("this part reads") };
                task.complete(tools, Token(base.0 + READS + number * READ_TOKENS), done);
            }
            number => self.written(disk, number as usize, done),
        }
    }

    fn written(&mut self, disk: &Disk, number: usize, done: Completion) {
        let part = self.parts[number].as_mut().expect("a part that writes");
        let top = disk.chain().top();
        if let Stage::Writing(stay) = std::mem::replace(&mut part.stage, Stage::Failed) {
            top.file.leave(stay);
            disk.bell.ring();
        }
        match Moved::of(done.op, done.result) {
            Moved::All(buf) => {
                part.at += buf.len() as u64;
                part.stage = Stage::Next;
                part.put_back(buf, &mut self.loan);
            }
            Moved::Part { moved, rest } => {
                part.at += moved.len() as u64;
                part.stage = Stage::Waiting(rest);
                part.put_back(moved, &mut self.loan);
            }
            Moved::Nothing(buf) => {
                keep(&mut self.error, part.failure(top, buf.len(), std::io::ErrorKind::WriteZero.into()));
                part.put_back(buf, &mut self.loan);
            }
            Moved::Failed(buf, error) => {
                keep(&mut self.error, part.failure(top, buf.len(), error));
                part.put_back(buf, &mut self.loan);
            }
        }
    }

    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        (self.error.map_or(Ok(()), Err), Some(self.loan.end()))
    }
}

impl Part {
    /// Of what has nothing to fill, without its payload.
    fn new(reservation: Reservation) -> Self {
        let span = reservation.guest;
        Self { at: span.start, reservation, span, payload: None, stay: None, stage: Stage::Next }
    }

    /// Where in the file the next bytes go.
    fn host(&self) -> u64 {
        // The span may begin before the reservation's own bytes, at the same distance in the file.
        (self.reservation.host + self.at) - self.reservation.guest.start
    }

    /// The next piece of the span: all of it where that is small, else what is before the payload,
    /// the payload, what is behind it. `None` where somebody else is on its block.
    fn next<I: Io>(&mut self, disk: &Arc<Disk>, tools: &Tools<I>) -> Option<Stage> {
        let file = &disk.chain().top().file;
        if self.stay.is_none() && file.around(self.reservation.guest).is_some() {
            self.stay = Some(file.enter_blocks(self.span, true)?);
        }
        let guest = self.reservation.guest;
        let whole = self.span == guest;
        let piece = match () {
            () if !whole && self.span.len() <= MERGE_MAX => self.span,
            () if self.at == guest.start => return Some(Stage::Waiting(self.payload.take().expect("written once"))),
            () if self.at < guest.start => ByteRange { start: self.at, end: guest.start }.prefix(MERGE_MAX),
            () => ByteRange { start: self.at, end: self.span.end }.prefix(MERGE_MAX),
        };
        let buf = tools.arena.buffer(piece.len() as usize);
        Some(Stage::Reading(Box::new(Task::read(Arc::clone(disk), piece, buf)), piece))
    }

    /// The payload's place in `bytes`, which were read from `range`, gets the payload.
    fn lay_over(&mut self, range: ByteRange, mut bytes: Buffer, loan: &mut Loan) -> Stage {
        let guest = self.reservation.guest;
        if range.overlaps(guest) {
            let payload = self.payload.take().expect("laid over once");
            let start = (guest.start - range.start) as usize;
            bytes[start..start + payload.len()].copy_from_slice(&payload);
            loan.give_back(payload);
        }
        Stage::Waiting(bytes)
    }

    /// Bytes that came back from the kernel: the caller's, or our own.
    fn put_back(&self, buf: Buffer, loan: &mut Loan) {
        if loan.is_mine(&buf) {
            loan.give_back(buf);
        }
    }

    fn failure(&self, top: &Layer, len: usize, error: std::io::Error) -> Error {
        let what = format!(
            "{}: write of {len} bytes at {} (of the disk: {})",
            top.data_path().display(),
            self.host(),
            self.at
        );
        Error::io(what, error)
    }
}

/// What is to be written for a reservation: its bytes, and around them where that must be filled, or is of the same block.
fn span(disk: &Disk, reservation: &Reservation) -> Result<ByteRange> {
    let mut span = reservation.guest;
    if needs_fill(disk, reservation)? {
        let [head, tail] = reservation.fill;
        span.start = head.map_or(span.start, |head| head.start);
        span.end = tail.map_or(span.end, |tail| tail.end);
    }
    Ok(disk.chain().top().file.around(span).unwrap_or(span))
}

/// False where nothing is around the payload, or only zeroes that are there already.
fn needs_fill(disk: &Disk, reservation: &Reservation) -> Result<bool> {
    for range in reservation.fill.iter().flatten() {
        if !reservation.zeroed || !reads_as_zero(disk, *range)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn reads_as_zero(disk: &Disk, mut range: ByteRange) -> Result<bool> {
    while !range.is_empty() {
        let (guest, source) = disk.chain().map(range.start, range.len(), Look::Images)?;
        if source != Source::Zero {
            return Ok(false);
        }
        range.start = guest.end;
    }
    Ok(true)
}

fn at(layer: &Layer, error: Error) -> Error {
    error.at(layer.path.display())
}
