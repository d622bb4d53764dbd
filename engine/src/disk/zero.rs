//! Making a range of a disk read as zeroes: by the image's tables, by a hole in its file, or by
//! writing zeroes where neither can.
use super::Disk;
use super::flush::Flush;
use super::step::{Status, Tools, keep};
use super::task::Task;
use crate::data_file::Stay;
use crate::io::{Completion, Io, Op, Token};
use formats::error::{Error, Result};
use formats::image::{Zeroed, Zeroing};
use formats::range::ByteRange;
use rustix::io::Errno;
use std::sync::Arc;

/// Zeroes are written in pieces of so many bytes.
const PIECE_MAX: u64 = 256 << 10;

pub(super) struct Zero {
    range: ByteRange,
    /// Up to here it is done.
    at: u64,
    zeroing: Zeroing,
    /// Nothing long is written: only at the range's ends.
    fast: bool,
    /// Bytes that had to be written.
    pub written: u64,
    stage: Stage,
    error: Option<Error>,
}

enum Stage {
    Next,
    /// The kernel, or another server, makes a hole of these bytes.
    Punching(ByteRange, Stay),
    /// Zeroes are written up to there.
    Writing(Box<Task>, ByteRange),
    Settling(Flush),
}

impl Zero {
    pub fn new(range: ByteRange, zeroing: Zeroing, fast: bool) -> Self {
        Self { range, at: range.start, zeroing, fast, written: 0, stage: Stage::Next, error: None }
    }

    pub fn step<I: Io>(&mut self, disk: &Arc<Disk>, tools: &mut Tools<I>, base: Token) -> Status {
        loop {
            let status = match &mut self.stage {
                Stage::Next if self.at >= self.range.end || self.error.is_some() => return Status::Done,
                Stage::Next => match self.start(disk, tools, base) {
                    Ok(true) => return Status::Blocked,
                    Ok(false) => continue,
                    Err(error) => {
                        keep(&mut self.error, error);
                        continue;
                    }
                },
                Stage::Punching(..) => return Status::Busy,
                Stage::Writing(task, _) => task.step(tools, base),
                Stage::Settling(flush) => flush.step(disk, tools, base),
            };
            if status != Status::Done {
                return status;
            }
            self.end_stage();
        }
    }

    /// What a finished inner task came to.
    fn end_stage(&mut self) {
        let outcome = match std::mem::replace(&mut self.stage, Stage::Next) {
            Stage::Writing(task, range) => {
                self.at = range.end;
                self.written += range.len();
                task.end().0
            }
            Stage::Settling(flush) => flush.end(),
            Stage::Next | Stage::Punching(..) => Ok(()),
        };
        if let Err(error) = outcome {
            keep(&mut self.error, error);
        }
    }

    /// Asks the image. True where somebody else has to end something first.
    fn start<I: Io>(&mut self, disk: &Arc<Disk>, tools: &mut Tools<I>, base: Token) -> Result<bool> {
        disk.refuse_poisoned()?;
        let top = disk.chain().top();
        if self.at == self.range.start && top.image.may_write_zeroes() {
            // Before anything is changed: who is refused writes all of it.
            self.refuse_slow(disk, self.range)?;
        }
        let rest = ByteRange { start: self.at, end: self.range.end };
        match top.image.zero(rest, self.zeroing).map_err(|error| error.at(top.path.display()))? {
            Zeroed::Done(range) => {
                self.at = range.end;
                disk.bell.ring();
            }
            Zeroed::Host { guest, .. } if top.file.around(top.file.first_piece(guest)).is_some() => {
                self.write(disk, tools, top.file.first_piece(guest))?;
            }
            Zeroed::Host { guest, host } if disk.can_punch(self.zeroing) => {
                let guest = top.file.first_piece(guest);
                let Some(stay) = top.file.enter_blocks(guest, false) else { return Ok(true) };
                self.stage = Stage::Punching(guest, stay);
                let unmap = self.zeroing != Zeroing::Keep;
                let file = top.file.file().clone();
                tools.io.submit(base, Op::Zero { file, at: host, len: guest.len(), unmap });
            }
            Zeroed::Host { guest, .. } => {
                self.refuse_slow(disk, guest)?;
                self.write(disk, tools, guest)?;
            }
            Zeroed::Write(guest) => {
                let at_an_end = guest.start == self.range.start || guest.end == self.range.end;
                if !(at_an_end && guest.len() <= PIECE_MAX) {
                    self.refuse_slow(disk, guest)?;
                }
                self.write(disk, tools, guest)?;
            }
            Zeroed::Busy => return Ok(true),
            Zeroed::Settle => self.stage = Stage::Settling(Flush::default()),
        }
        Ok(false)
    }

    /// Of `part` all would be written, which is as fast as a write where that is short.
    fn refuse_slow(&self, disk: &Disk, part: ByteRange) -> Result<()> {
        if !self.fast || self.range.len() <= PIECE_MAX {
            return Ok(());
        }
        let what = format!("{}: zeroing {part} faster than by writing", disk.name());
        Err(Error::io(what, Errno::OPNOTSUPP.into()))
    }

    fn write<I: Io>(&mut self, disk: &Arc<Disk>, tools: &Tools<I>, range: ByteRange) -> Result<()> {
        if self.zeroing == Zeroing::Discard {
            // A discard that gives nothing back is no reason to write.
            self.at = range.end;
            return Ok(());
        }
        let piece = range.prefix(PIECE_MAX);
        let mut zeroes = tools.arena.buffer(piece.len() as usize);
        zeroes.fill(0);
        self.stage = Stage::Writing(Box::new(Task::write(Arc::clone(disk), piece, zeroes)), piece);
        Ok(())
    }

    pub fn complete<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        _local: u64,
        done: Completion,
    ) {
        match &mut self.stage {
            Stage::Writing(task, _) => task.complete(tools, base, done),
            Stage::Settling(flush) => flush.complete(disk, done.result),
            Stage::Punching(..) => {
                let Stage::Punching(range, stay) = std::mem::replace(&mut self.stage, Stage::Next) else { return };
                disk.chain().top().file.leave(stay);
                disk.bell.ring();
                match done.result {
                    Ok(_) => self.at = range.end,
                    Err(error) if cannot_punch(&error) => disk.no_punching(self.zeroing),
                    Err(error) => {
                        let what = format!("{}: zeroing {range}", disk.chain().top().data_path().display());
                        keep(&mut self.error, Error::io(what, error));
                    }
                }
            }
            Stage::Next => unreachable!("nothing is under way"),
        }
    }

    pub fn end(self) -> Result<()> {
        self.error.map_or(Ok(()), Err)
    }
}

/// Errors that say "not in this way" rather than "not at all".
fn cannot_punch(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV))
}
