//! One operation on an export, carried out by requests that are as long as its server takes them.
use super::super::{Buffer, Completion, File, Loan, Op, Token};
use super::Remote;
use super::unflushed::Marks;
use formats::nbd::client::Ask;
use formats::range::ByteRange;
use rustix::io::Errno;
use std::io;
use std::time::Duration;

/// A read, a write, zeroes or a flush.
pub(super) struct Request {
    token: Token,
    work: Work,
    /// What is not done yet; of a flush, nothing.
    rest: ByteRange,
    /// What of it is asked.
    pub piece: ByteRange,
    /// When it was asked.
    pub since: Duration,
    /// What a flush is to make durable.
    marks: Option<Marks>,
}

/// The operation. The bytes of a write are lent to what is sent.
enum Work {
    Read { file: File, at: u64, buf: Buffer },
    Write { file: File, at: u64, bytes: Loan },
    Zero { file: File, at: u64, len: u64, unmap: bool },
    Flush { file: File },
}

impl Request {
    /// The operation, and whether it can be asked for.
    pub fn new(remote: &Remote, token: Token, op: Op) -> (Self, io::Result<()>) {
        let (rest, checked) = match &op {
            Op::Read { at, buf, .. } => (remote.on_disk(*at, buf.len()), Ok(())),
            Op::Write { at, buf, .. } => remote.to_change(*at, buf.len() as u64),
            Op::Zero { at, len, .. } => match remote.can_zero() {
                true => remote.to_change(*at, *len),
                false => (ByteRange::default(), Err(Errno::OPNOTSUPP.into())),
            },
            _ => (ByteRange::default(), remote.check_flush()),
        };
        let work = match op {
            Op::Read { file, at, buf } => Work::Read { file, at, buf },
            Op::Write { file, at, buf } => Work::Write { file, at, bytes: Loan::new(buf) },
            Op::Zero { file, at, len, unmap } => Work::Zero { file, at, len, unmap },
            Op::Flush { file } => Work::Flush { file },
            _ => unreachable!("a queue gives exports what exports can do"),
        };
        (Self { token, work, rest, piece: rest, since: Duration::ZERO, marks: None }, checked)
    }

    /// True where there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty() && !matches!(self.work, Work::Flush { .. })
    }

    /// What is to be asked next.
    pub fn ask(&mut self, remote: &Remote, now: Duration) -> Ask {
        self.since = now;
        match &self.work {
            Work::Read { .. } => {
                let aligned = remote.piece(self.rest);
                self.piece = aligned.intersect(self.rest);
                Ask::Read(aligned)
            }
            Work::Write { .. } => {
                self.piece = remote.piece(self.rest);
                Ask::Write(self.piece)
            }
            Work::Zero { unmap, .. } => {
                self.piece = self.rest.prefix(super::ZERO_LEN_MAX);
                Ask::Zero { range: self.piece, keep: !unmap }
            }
            Work::Flush { .. } => {
                // What is written from here on is the next flush's.
                self.marks.get_or_insert_with(|| remote.unflushed().begin_flush());
                Ask::Flush
            }
        }
    }

    /// What follows the request: of a write, the bytes that it asks for.
    pub fn payload(&mut self) -> &[u8] {
        match &mut self.work {
            Work::Write { at, bytes, .. } => {
                &bytes.again()[(self.piece.start - *at) as usize..][..self.piece.len() as usize]
            }
            _ => &[],
        }
    }

    /// The same, lent: it has to be given back before anything else becomes of the request.
    pub fn lend_payload(&mut self) -> Option<Buffer> {
        let Work::Write { at, bytes, .. } = &mut self.work else { return None };
        bytes.again();
        Some(bytes.lend_at((self.piece.start - *at) as usize, self.piece.len() as usize))
    }

    /// Takes its bytes back; gives back somebody else's.
    pub fn take_back(&mut self, payload: Buffer) -> Option<Buffer> {
        match &mut self.work {
            Work::Write { bytes, .. } if bytes.is_mine(&payload) => bytes.give_back(payload),
            _ => return Some(payload),
        }
        None
    }

    /// True where its bytes are lent.
    pub fn has_lent(&self) -> bool {
        matches!(&self.work, Work::Write { bytes, .. } if !bytes.is_whole())
    }

    /// The place of what is read in the buffer.
    pub fn place(&mut self) -> &mut [u8] {
        let piece = self.piece;
        let Work::Read { at, buf, .. } = &mut self.work else { unreachable!("only reads are answered with bytes") };
        &mut buf[(piece.start - *at) as usize..][..piece.len() as usize]
    }

    /// What was asked is done, by a connection of this age. True where nothing is left.
    pub fn advance(&mut self, remote: &Remote, established: u64) -> bool {
        match &self.work {
            Work::Write { .. } | Work::Zero { .. } => remote.unflushed().written(self.piece, remote.tick()),
            Work::Flush { .. } => {
                let marks = self.marks.take().unwrap_or_default();
                remote.unflushed().end_flush(marks, Some(established));
            }
            Work::Read { .. } => {}
        }
        self.rest.start = self.piece.end;
        self.rest.is_empty()
    }

    /// The completion.
    pub fn end(mut self, remote: &Remote, result: io::Result<()>) -> Completion {
        if let Some(marks) = self.marks.take() {
            remote.unflushed().end_flush(marks, None);
        }
        let (op, count) = match self.work {
            Work::Read { file, at, buf } => {
                // Where nothing is wanted, the read began at the disk's end or behind it.
                (Op::Read { file, at, buf }, self.rest.end.saturating_sub(at) as u32)
            }
            Work::Write { file, at, bytes } => {
                let buf = bytes.end();
                let count = buf.len() as u32;
                (Op::Write { file, at, buf }, count)
            }
            Work::Zero { file, at, len, unmap } => (Op::Zero { file, at, len, unmap }, 0),
            Work::Flush { file } => (Op::Flush { file }, 0),
        };
        Completion { token: self.token, op, result: result.map(|()| count) }
    }
}
