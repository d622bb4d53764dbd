//! Telling the page cache that a range of a disk will be read soon. Where payload does not go through it
//! there is nothing to tell.
use super::Disk;
use super::step::{Status, Tools};
use crate::chain::{Look, Source};
use crate::io::{Io, Op, Token};
use formats::range::ByteRange;

/// More than that is not brought into the page cache on one wish, in bytes.
const LEN_MAX: u64 = 64 << 20;

pub(super) struct Prefetch {
    range: ByteRange,
    busy: bool,
}

impl Prefetch {
    pub fn new(range: ByteRange) -> Self {
        Self { range: range.prefix(LEN_MAX), busy: false }
    }

    /// A wish has no errors: who reads will meet them.
    pub fn step<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) -> Status {
        while !self.busy && !self.range.is_empty() {
            let Ok((guest, source)) = disk.chain().map(self.range.start, self.range.len(), Look::Images) else {
                return Status::Done;
            };
            self.range.start = guest.end;
            let (layer, at, len) = match source {
                Source::Zero => continue,
                Source::Data { layer, host } => (layer, host, guest.len()),
                Source::Compressed { layer, host, len, .. } => (layer, host, len.into()),
            };
            let file = &disk.chain().layers()[layer].file;
            if !file.is_direct() {
                tools.io.submit(base, Op::Prefetch { file: file.file().clone(), at, len });
                self.busy = true;
            }
        }
        if self.busy { Status::Busy } else { Status::Done }
    }

    /// One wish was taken; a step follows.
    pub fn complete(&mut self) {
        self.busy = false;
    }
}
