//! The file that a layer's payload is in, and the two ways to it.
//!
//! Direct I/O wants offsets, lengths and memory aligned. What is not goes through the page cache,
//! which works on whole pages: a write there must be alone on its pages, or it would put back what a
//! direct write to another part of the page replaced meanwhile. Without direct I/O the page cache
//! keeps its own order and nothing is needed.
//!
//! An export of a server that takes whole blocks only has no page cache of ours before it. There who writes a part of a
//! block is alone on it from before it reads the rest: otherwise it would put back what another one wrote meanwhile.
use crate::io::{Buffer, File, PAGE};
use formats::range::ByteRange;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One file, open once or twice.
#[derive(Debug)]
pub struct DataFile {
    buffered: File,
    direct: Option<Direct>,
    /// Where writes have to be whole blocks of so many bytes.
    blocks: Option<(u64, Writers)>,
    #[expect(dead_code, reason = "kept, never used: `io::lock`")]
    sign_of_life: Option<OwnedFd>,
}

#[derive(Debug)]
struct Direct {
    file: File,
    /// What offsets and lengths have to be multiples of.
    align: u64,
    writers: Writers,
}

/// Who writes where at the moment.
#[derive(Debug, Default)]
struct Writers(Mutex<Vec<Writer>>);

#[derive(Debug, PartialEq)]
struct Writer {
    /// Whole pages, or blocks.
    place: ByteRange,
    alone: bool,
}

/// A writer's stay on some pages of a file: what `DataFile::leave` wants back.
#[derive(Debug)]
pub(super) struct Stay(Option<Writer>);

impl DataFile {
    /// Everything through the page cache.
    pub fn buffered(file: File) -> Self {
        Self { buffered: file, direct: None, blocks: None, sign_of_life: None }
    }

    /// What is aligned to `align` bytes by way of `direct`, the rest through the page cache.
    pub fn direct(buffered: File, direct: File, align: u64) -> Self {
        assert!(align.is_power_of_two() && align <= PAGE as u64, "an alignment that buffers have");
        let direct = Direct { file: direct, align, writers: Writers::default() };
        Self { buffered, direct: Some(direct), blocks: None, sign_of_life: None }
    }

    /// One that takes whole blocks of `len` bytes, and whose bytes are at the guest's own offsets.
    pub fn of_blocks(file: File, len: u64) -> Self {
        let blocks = (len > 1).then(|| (len, Writers::default()));
        Self { blocks, ..Self::buffered(file) }
    }

    /// The same, with a sign for others that who writes to it lives.
    #[must_use]
    pub fn with_sign_of_life(self, sign_of_life: Option<OwnedFd>) -> Self {
        Self { sign_of_life, ..self }
    }

    /// True where it has direct I/O.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Nothing is written to it any more: others may read it.
    pub fn only_read(&self) {
        self.buffered.only_read();
        self.direct.iter().for_each(|direct| direct.file.only_read());
    }

    /// The file to flush and to zero.
    pub fn file(&self) -> &File {
        &self.buffered
    }

    /// The way for `buf` at `at`.
    pub(super) fn way(&self, at: u64, buf: &Buffer) -> &File {
        match &self.direct {
            Some(direct) if direct.fits(at, buf) => &direct.file,
            _ => &self.buffered,
        }
    }

    /// Of what is to be written: the bytes from its start on that are whole blocks, or that are a part of one.
    pub(super) fn first_piece(&self, range: ByteRange) -> ByteRange {
        let Some((len, _)) = &self.blocks else { return range };
        let whole = range.align_inward(*len);
        match range.start == whole.start && !whole.is_empty() {
            true => whole,
            false => range.prefix(len - range.start % len),
        }
    }

    /// The blocks that `range` is on, where it is a part of one.
    pub(super) fn around(&self, range: ByteRange) -> Option<ByteRange> {
        let (len, _) = self.blocks.as_ref()?;
        Some(range.align_outward(*len)).filter(|around| *around != range)
    }

    /// Lets a writer of `buf` at `at` onto its pages; `None` while it cannot be there with others.
    pub(super) fn enter(&self, at: u64, buf: &Buffer) -> Option<Stay> {
        let range = ByteRange { start: at, end: at + buf.len() as u64 };
        match &self.direct {
            Some(direct) => direct.writers.enter(range.align_outward(PAGE as u64), !direct.fits(at, buf)),
            None => self.enter_blocks(range, false),
        }
    }

    /// Lets a writer onto blocks, where there are any; `alone`, where it has to read what it writes back.
    pub(super) fn enter_blocks(&self, range: ByteRange, alone: bool) -> Option<Stay> {
        match &self.blocks {
            Some((len, writers)) => writers.enter(range.align_outward(*len), alone),
            None => Some(Stay(None)),
        }
    }

    /// The writer is done.
    pub(super) fn leave(&self, Stay(writer): Stay) {
        let writers = self.direct.as_ref().map(|direct| &direct.writers);
        let writers = writers.or(self.blocks.as_ref().map(|(_, writers)| writers));
        if let (Some(writers), Some(writer)) = (writers, writer) {
            writers.leave(&writer);
        }
    }
}

impl Writers {
    fn enter(&self, place: ByteRange, alone: bool) -> Option<Stay> {
        let mut writers = self.there();
        if writers.iter().any(|other| other.place.overlaps(place) && (alone || other.alone)) {
            return None;
        }
        writers.push(Writer { place, alone });
        Some(Stay(Some(Writer { place, alone })))
    }

    fn leave(&self, writer: &Writer) {
        let mut writers = self.there();
        let place = writers.iter().position(|other| other == writer).expect("who leaves has entered");
        writers.swap_remove(place);
    }

    fn there(&self) -> MutexGuard<'_, Vec<Writer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Direct {
    fn fits(&self, at: u64, buf: &Buffer) -> bool {
        (at | buf.len() as u64 | buf.address() as u64).is_multiple_of(self.align)
    }
}

#[cfg(test)]
mod tests {
    use super::{Buffer, ByteRange, DataFile, File};

    #[test]
    fn an_unaligned_writer_is_alone_on_its_pages() {
        let file = DataFile::direct(File::simulated(0), File::simulated(1), 512);
        let (whole, odd) = (Buffer::alone(512), Buffer::alone(100));
        assert_eq!(file.way(512, &whole).number(), Some(1));
        assert_eq!(file.way(512, &odd).number(), Some(0));
        assert_eq!(file.way(100, &whole).number(), Some(0));

        let first = file.enter(0, &whole).expect("nobody is there");
        let second = file.enter(512, &whole).expect("two direct writers share a page");
        assert!(file.enter(1024, &odd).is_none());
        let elsewhere = file.enter(4096, &odd).expect("another page");
        file.leave(first);
        assert!(file.enter(1024, &odd).is_none());
        file.leave(second);
        let alone = file.enter(1024, &odd).expect("alone now");
        assert!(file.enter(0, &whole).is_none());
        file.leave(alone);
        file.leave(elsewhere);
        assert!(file.enter(0, &whole).is_some());
    }

    #[test]
    fn who_writes_a_part_of_a_block_is_alone_on_it() {
        let file = DataFile::of_blocks(File::simulated(0), 512);
        let range = |start, end| ByteRange { start, end };
        for (asked, first, around) in [
            (range(0, 4096), range(0, 4096), None),
            (range(512, 1000), range(512, 1000), Some(range(512, 1024))),
            (range(100, 200), range(100, 200), Some(range(0, 512))),
            (range(100, 5000), range(100, 512), Some(range(0, 512))),
            (range(512, 5000), range(512, 4608), None),
        ] {
            assert_eq!(file.first_piece(asked), first, "{asked:?}");
            assert_eq!(file.around(first), around, "{asked:?}");
        }
        let whole = file.enter(512, &Buffer::alone(512)).expect("nobody is there");
        assert!(file.enter_blocks(range(1000, 1001), true).is_none());
        let part = file.enter_blocks(range(1024, 1025), true).expect("another block");
        assert!(file.enter(1024, &Buffer::alone(512)).is_none());
        file.leave(part);
        file.leave(whole);
        assert!(file.enter_blocks(range(0, 4096), false).is_some());
    }
}
