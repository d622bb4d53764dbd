//! Bringing a range to a disk by sharing the blocks of another file, where that is possible.
use super::Disk;
use super::step::{Status, Tools};
use crate::io::{File, Io, Op, Token};
use formats::error::{Error, Result};
use formats::range::ByteRange;
use rustix::io::Errno;

/// What file systems share is whole blocks of this many bytes, or of fewer.
pub const SHARE_ALIGN: u64 = 4096;

pub(super) struct Share {
    range: ByteRange,
    /// Where its bytes are.
    from: File,
    host: u64,
    busy: bool,
    outcome: Option<Result<()>>,
}

impl Share {
    pub fn new(range: ByteRange, from: File, host: u64) -> Self {
        Self { range, from, host, busy: false, outcome: None }
    }

    pub fn step<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) -> Status {
        if self.outcome.is_some() {
            return Status::Done;
        }
        if self.busy {
            return Status::Busy;
        }
        match disk.refuse_poisoned() {
            Ok(()) => {
                let (from, to) = (self.from.clone(), disk.chain().top().file.file().clone());
                let (at, to_at, len) = (self.host, self.range.start, self.range.len());
                tools.io.submit(base, Op::Clone { from, at, to, to_at, len });
                self.busy = true;
                Status::Busy
            }
            Err(error) => {
                self.outcome = Some(Err(error));
                Status::Done
            }
        }
    }

    pub fn complete(&mut self, disk: &Disk, result: std::io::Result<u32>) {
        self.busy = false;
        let what = || format!("{}: sharing {}", disk.chain().top().data_path().display(), self.range);
        self.outcome = Some(result.map(|_| ()).map_err(|error| Error::io(what(), error)));
    }

    pub fn end(self) -> Result<()> {
        self.outcome.unwrap_or(Ok(()))
    }
}

/// True for errors that say "not in this way" rather than "not at all".
pub fn cannot_share(error: &Error) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(
        number,
        Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::XDEV | Errno::NOTTY | Errno::NOSYS | Errno::PERM | Errno::TXTBSY)
    )
}
