//! The file that a layer's payload is in, and the two ways to it.
//!
//! Direct I/O wants offsets, lengths and memory aligned. What is not goes through the page cache,
//! which works on whole pages: a write there must be alone on its pages, or it would put back what a
//! direct write to another part of the page replaced meanwhile. Without direct I/O the page cache
//! keeps its own order and nothing is needed.
use crate::io::{Buffer, File, PAGE};
use formats::range::ByteRange;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One file, open once or twice.
#[derive(Debug)]
pub struct DataFile {
    buffered: File,
    direct: Option<Direct>,
    #[expect(dead_code, reason = "kept, never used: `io::lock`")]
    sign_of_life: Option<OwnedFd>,
}

#[derive(Debug)]
struct Direct {
    file: File,
    /// What offsets and lengths have to be multiples of.
    align: u64,
    writers: Mutex<Vec<Writer>>,
}

#[derive(Debug, PartialEq)]
struct Writer {
    pages: ByteRange,
    alone: bool,
}

/// A writer's stay on some pages of a file: what `DataFile::leave` wants back.
#[derive(Debug)]
pub(super) struct Stay(Option<Writer>);

impl DataFile {
    /// Everything through the page cache.
    pub fn buffered(file: File) -> Self {
        Self { buffered: file, direct: None, sign_of_life: None }
    }

    /// What is aligned to `align` bytes by way of `direct`, the rest through the page cache.
    pub fn direct(buffered: File, direct: File, align: u64) -> Self {
        assert!(align.is_power_of_two() && align <= PAGE as u64, "an alignment that buffers have");
        let direct = Direct { file: direct, align, writers: Mutex::default() };
        Self { buffered, direct: Some(direct), sign_of_life: None }
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

    /// Lets a writer of `buf` at `at` onto its pages; `None` while it cannot be there with others.
    pub(super) fn enter(&self, at: u64, buf: &Buffer) -> Option<Stay> {
        let Some(direct) = &self.direct else { return Some(Stay(None)) };
        let pages = ByteRange { start: at, end: at + buf.len() as u64 }.align_outward(PAGE as u64);
        let alone = !direct.fits(at, buf);
        let mut writers = direct.writers();
        if writers.iter().any(|other| other.pages.overlaps(pages) && (alone || other.alone)) {
            return None;
        }
        writers.push(Writer { pages, alone });
        Some(Stay(Some(Writer { pages, alone })))
    }

    /// The writer is done.
    pub(super) fn leave(&self, stay: Stay) {
        if let (Some(direct), Stay(Some(writer))) = (&self.direct, stay) {
            let mut writers = direct.writers();
            let place = writers.iter().position(|other| *other == writer).expect("who leaves has entered");
            writers.swap_remove(place);
        }
    }
}

impl Direct {
    fn fits(&self, at: u64, buf: &Buffer) -> bool {
        (at | buf.len() as u64 | buf.address() as u64).is_multiple_of(self.align)
    }

    fn writers(&self) -> MutexGuard<'_, Vec<Writer>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{Buffer, DataFile, File};

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
}
