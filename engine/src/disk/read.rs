//! Reading a range of a disk: each run from where it lives, several at once.
//!
//! ```text
//! data        read ─► there
//! compressed  read ─► inflate ─► there, or the part of it that was asked for
//! ```
use super::Disk;
use super::inflated::Cluster;
use super::step::{Moved, Status, Tools, keep};
use crate::chain::{Look, Source};
use crate::io::{Buffer, Io, Loan, Op, Token, Work};
use formats::error::{Error, Result};
use formats::range::ByteRange;
use std::io;
use std::sync::Arc;

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
    Data {
        layer: usize,
        host: u64,
    },
    Compressed {
        cluster: Cluster,
        skip: u32,
        piece: Buffer,
    },
    /// The piece goes along where all of the cluster was asked for.
    Inflating {
        cluster: Cluster,
        skip: u32,
        piece: Option<Buffer>,
    },
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
                let cluster = Cluster { layer, host, len: inflated };
                if disk.inflated.copy(cluster, skip, &mut piece) {
                    self.loan.give_back(piece);
                    return Ok(());
                }
                let slot = self.slot(Part::Compressed { cluster, skip, piece });
                let file = disk.chain().layers()[layer].file.file().clone();
                tools
                    .io
                    .submit(Token(base.0 + slot), Op::Read { file, at: host, buf: tools.arena.buffer(len as usize) });
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
            Part::Compressed { cluster, skip, piece } => match (op, result) {
                (Op::Read { mut buf, .. }, Ok(count)) => {
                    buf.truncate(count as usize);
                    self.inflate(disk, tools, base, cluster, skip, buf, piece);
                }
                (_, result) => {
                    self.loan.give_back(piece);
                    self.fail(disk, cluster, "read", result);
                }
            },
            Part::Inflating { cluster, skip, piece } => {
                let Op::Compute { to, .. } = op else { unreachable!("it is being inflated") };
                match piece {
                    None => self.loan.give_back(to),
                    Some(mut piece) => {
                        let len = piece.len();
                        piece.copy_from_slice(&to[skip as usize..][..len]);
                        self.loan.give_back(piece);
                        if result.is_ok() {
                            disk.inflated.keep(cluster, &to);
                        }
                    }
                }
                self.fail(disk, cluster, "inflating", result);
            }
        }
    }

    /// Has the pool inflate a cluster: into its place, where all of it was asked for.
    #[expect(clippy::too_many_arguments, reason = "a part's own fields, and its surroundings")]
    fn inflate<I: Io>(
        &mut self,
        disk: &Disk,
        tools: &mut Tools<I>,
        base: Token,
        cluster: Cluster,
        skip: u32,
        from: Buffer,
        piece: Buffer,
    ) {
        let len = cluster.len as usize;
        let (to, piece) = match piece.len() == len {
            true => (piece, None),
            false => (tools.arena.buffer(len), Some(piece)),
        };
        let layer = Arc::clone(&disk.chain().layers()[cluster.layer]);
        let work = Work::new(move |from, to| {
            layer.image.inflate(from, to).map_err(|error| io::Error::other(error.one_line()))?;
            Ok(to.len())
        });
        let slot = self.slot(Part::Inflating { cluster, skip, piece });
        tools.io.submit(Token(base.0 + slot), Op::Compute { from, to, work });
    }

    /// Remembers why a compressed cluster cannot be had, if it cannot.
    fn fail(&mut self, disk: &Disk, cluster: Cluster, doing: &str, result: io::Result<u32>) {
        if let Err(error) = result {
            let path = disk.chain().layers()[cluster.layer].path.display();
            let what = format!("{path}: {doing} of the compressed cluster at {}", cluster.host);
            keep(&mut self.error, Error::io(what, error));
        }
    }

    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        (self.error.map_or(Ok(()), Err), Some(self.loan.end()))
    }
}
