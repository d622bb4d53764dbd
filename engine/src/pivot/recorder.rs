//! Writes the record that decides: the slot that does not count, then a flush. The end of that flush is the point of
//! no return.
//!
//! A record whose writing fails may be durable all the same. Nobody may be served then until one side is named for
//! certain: what counted before is recorded anew, as something newer, again and again. A guest that waits loses nothing.
//!
//! A file system that is read-only, as one becomes whose device fails, takes nothing of a write. Where that is how the very
//! first one fails, what counted before still does, and nobody has to wait.
use super::record_file::Slots;
use crate::disk::Tools;
use crate::io::{Completion, Io, Op, Token};
use formats::error::{Error, Result};
use rustix::io::Errno;
use std::io;
use std::time::Duration;

/// How long to wait before a record is tried again.
const RETRY: Duration = Duration::from_millis(500);

pub(super) struct Recorder {
    slots: Slots,
    new: Vec<u8>,
    /// What counted before, newer than `new`.
    old: Vec<u8>,
    /// Why the old one is being recorded anew.
    failed: Option<Error>,
    /// Some of the new one may be in the file.
    touched: bool,
}

impl Recorder {
    /// Of `new`, a slot's bytes in the file of `slots`, or `old` where that fails.
    pub fn new(slots: Slots, new: Vec<u8>, old: Vec<u8>) -> Self {
        Self { slots, new, old, failed: None, touched: false }
    }

    /// Begins.
    pub fn start<I: Io>(&self, tools: &mut Tools<I>, base: Token) {
        let bytes = if self.failed.is_some() { &self.old } else { &self.new };
        tools.io.submit(base, self.slots.write(bytes));
    }

    /// Takes in what became of its operation. Says whether the new record counts, when one is certain.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> Option<Result<()>> {
        match (done.op, done.result) {
            (Op::Write { .. }, Ok(count)) if count as usize == self.slots.len() => {
                self.touched = true;
                tools.io.submit(base, Op::Flush { file: self.slots.file().clone() });
            }
            (Op::Flush { .. }, Ok(_)) => return Some(self.failed.take().map_or(Ok(()), Err)),
            (Op::Timeout { .. }, _) => self.start(tools, base),
            (Op::Write { .. }, Err(error)) if takes_nothing(&error) && !self.touched => {
                return Some(Err(Error::io("writing the pivot record in the state folder", error)));
            }
            (_, result) => {
                self.touched = true;
                let error = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                let error = Error::io("writing the pivot record in the state folder", error);
                tracing::error!("{}: the guest waits until the record is certain", error.one_line());
                self.failed.get_or_insert(error);
                tools.io.submit(base, Op::Timeout { after: RETRY });
            }
        }
        None
    }
}

/// True where the system refused a write before it took any of it.
fn takes_nothing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ROFS.raw_os_error())
}
