//! One operation on an export, carried out by requests that are as long as its server takes them.
use super::super::{Buffer, Completion, Op, Token};
use super::Remote;
use super::unflushed::Marks;
use formats::nbd::client::Ask;
use formats::range::ByteRange;
use rustix::io::Errno;
use std::io;
use std::time::Duration;

/// An `Op::Read`, `Op::Write`, `Op::Zero` or `Op::Flush`.
pub(super) struct Request {
    token: Token,
    op: Op,
    /// What is not done yet; of a flush, nothing.
    rest: ByteRange,
    /// What of it is asked.
    pub piece: ByteRange,
    /// When it was asked.
    pub since: Duration,
    /// What a flush is to make durable.
    marks: Option<Marks>,
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
            Op::Flush { .. } => (ByteRange::default(), remote.check_flush()),
            _ => unreachable!("a queue gives exports what exports can do"),
        };
        (Self { token, op, rest, piece: rest, since: Duration::ZERO, marks: None }, checked)
    }

    /// True where there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty() && !self.is_flush()
    }

    fn is_flush(&self) -> bool {
        matches!(self.op, Op::Flush { .. })
    }

    /// What is to be asked next.
    pub fn ask(&mut self, remote: &Remote, now: Duration) -> Ask {
        self.since = now;
        match &self.op {
            Op::Read { .. } => {
                let aligned = remote.piece(self.rest);
                self.piece = aligned.intersect(self.rest);
                Ask::Read(aligned)
            }
            Op::Write { .. } => {
                self.piece = remote.piece(self.rest);
                Ask::Write(self.piece)
            }
            Op::Zero { unmap, .. } => {
                self.piece = self.rest.prefix(super::ZERO_LEN_MAX);
                Ask::Zero { range: self.piece, keep: !unmap }
            }
            _ => {
                // What is written from here on is the next flush's.
                self.marks.get_or_insert_with(|| remote.unflushed().begin_flush());
                Ask::Flush
            }
        }
    }

    /// What follows the request: of a write, the bytes that it asks for.
    pub fn payload(&self) -> &[u8] {
        match &self.op {
            Op::Write { at, buf, .. } => &buf[(self.piece.start - at) as usize..][..self.piece.len() as usize],
            _ => &[],
        }
    }

    /// The place of what is read in the buffer.
    pub fn place(&mut self) -> &mut [u8] {
        let piece = self.piece;
        let Op::Read { at, buf, .. } = &mut self.op else { unreachable!("only reads are answered with bytes") };
        let at = *at;
        let buf: &mut Buffer = buf;
        &mut buf[(piece.start - at) as usize..][..piece.len() as usize]
    }

    /// What was asked is done, by a connection of this age. True where nothing is left.
    pub fn advance(&mut self, remote: &Remote, established: u64) -> bool {
        match &self.op {
            Op::Write { .. } | Op::Zero { .. } => remote.unflushed().written(self.piece, remote.tick()),
            Op::Flush { .. } => {
                let marks = self.marks.take().unwrap_or_default();
                remote.unflushed().end_flush(marks, Some(established));
            }
            _ => {}
        }
        self.rest.start = self.piece.end;
        self.rest.is_empty()
    }

    /// The completion.
    pub fn end(mut self, remote: &Remote, result: io::Result<()>) -> Completion {
        if let Some(marks) = self.marks.take() {
            remote.unflushed().end_flush(marks, None);
        }
        let count = match &self.op {
            // Where nothing is wanted, the read began at the disk's end or behind it.
            Op::Read { at, .. } => self.rest.end.saturating_sub(*at) as u32,
            Op::Write { buf, .. } => buf.len() as u32,
            _ => 0,
        };
        Completion { token: self.token, op: self.op, result: result.map(|()| count) }
    }
}
