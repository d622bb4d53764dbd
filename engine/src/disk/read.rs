//! Reading a range of a disk: each run from where it lives, several at once.
use super::Disk;
use super::step::{Moved, Status, Tools, keep, scratch};
use crate::chain::{Look, Source};
use crate::io::{Buffer, Io, Loan, Op, Token};
use formats::error::{Error, Result};
use formats::range::ByteRange;
use std::io;

/// How many operations one read has under way at most.
pub(super) const PARTS: usize = 8;

pub(super) struct Read {
    range: ByteRange,
    /// Up to here every byte is read or under way.
    at: u64,
    loan: Loan,
    parts: [Option<Part>; PARTS],
    busy: usize,
    error: Option<Error>,
}

/// What the end of one operation needs to know.
enum Part {
    Data { layer: usize, host: u64 },
    Compressed { layer: usize, skip: u32, inflated: u32, piece: Buffer },
}

impl Read {
    pub fn new(range: ByteRange, buf: Buffer) -> Self {
        Self { range, at: range.start, loan: Loan::new(buf), parts: Default::default(), busy: 0, error: None }
    }

    pub fn step<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) -> Status {
        while self.busy < PARTS && self.at < self.range.end && self.error.is_none() {
            if let Err(error) = self.start(disk, tools, base) {
                keep(&mut self.error, error);
            }
        }
        if self.busy > 0 { Status::Busy } else { Status::Done }
    }

    fn start<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) -> Result<()> {
        let (guest, source) = disk.chain().map(self.at, self.range.end - self.at, Look::Images)?;
        self.at = guest.end;
        let mut piece = self.loan.lend(guest.len() as usize);
        match source {
            Source::Zero => {
                piece.fill(0);
                self.loan.give_back(piece);
            }
            Source::Data { layer, host } => self.submit(disk, tools, base, layer, host, piece),
            Source::Compressed { layer, host, len, skip, inflated } => {
                let slot = self.slot(Part::Compressed { layer, skip, inflated, piece });
                let file = disk.chain().layers()[layer].file.file().clone();
                tools.io.submit(Token(base.0 + slot), Op::Read { file, at: host, buf: scratch(tools, len as usize) });
            }
        }
        Ok(())
    }

    fn submit<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token, layer: usize, host: u64, buf: Buffer) {
        let slot = self.slot(Part::Data { layer, host });
        let file = disk.chain().layers()[layer].file.way(host, &buf).clone();
        tools.io.submit(Token(base.0 + slot), Op::Read { file, at: host, buf });
    }

    fn slot(&mut self, part: Part) -> u64 {
        let slot = self.parts.iter().position(Option::is_none).expect("fewer parts than slots");
        self.parts[slot] = Some(part);
        self.busy += 1;
        slot as u64
    }

    pub fn complete<I: Io>(
        &mut self,
        disk: &Disk,
        tools: &mut Tools<I>,
        base: Token,
        local: u64,
        op: Op,
        result: io::Result<u32>,
    ) {
        self.busy -= 1;
        match self.parts[local as usize].take().expect("one completion an operation") {
            Part::Data { layer, host } => match Moved::of(op, result) {
                Moved::All(piece) => self.loan.give_back(piece),
                // The file ends here: what follows reads as zeroes.
                Moved::Nothing(mut piece) => {
                    piece.fill(0);
                    self.loan.give_back(piece);
                }
                Moved::Part { moved, rest } => {
                    let host = host + moved.len() as u64;
                    self.loan.give_back(moved);
                    self.submit(disk, tools, base, layer, host, rest);
                }
                Moved::Failed(piece, error) => {
                    let layer = &disk.chain().layers()[layer];
                    let what = format!("{}: read of {} bytes at {host}", layer.data_path().display(), piece.len());
                    keep(&mut self.error, Error::io(what, error));
                    self.loan.give_back(piece);
                }
            },
            Part::Compressed { layer, skip, inflated, mut piece } => {
                let layer = &disk.chain().layers()[layer];
                let Op::Read { buf, at, .. } = op else { unreachable!("compressed bytes are read") };
                let outcome = result
                    .map_err(|error| Error::io(format!("read of a compressed cluster at {at}"), error))
                    .and_then(|count| {
                        let mut cluster = vec![0; inflated as usize];
                        layer.image.inflate(&buf[..count as usize], &mut cluster)?;
                        let len = piece.len();
                        piece.copy_from_slice(&cluster[skip as usize..][..len]);
                        Ok(())
                    });
                self.loan.give_back(piece);
                if let Err(error) = outcome {
                    keep(&mut self.error, error.at(layer.path.display()));
                }
            }
        }
    }

    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        (self.error.map_or(Ok(()), Err), Some(self.loan.end()))
    }
}
