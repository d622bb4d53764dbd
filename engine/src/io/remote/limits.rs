//! What an export can be asked for: its ends, its blocks, its abilities.
use super::{REQUEST_LEN_MAX, Remote};
use formats::error::{Error, Result};
use formats::nbd::wire::transmission_flag::{CAN_MULTI_CONN, READ_ONLY, SEND_FLUSH, SEND_WRITE_ZEROES};
use formats::range::ByteRange;
use rustix::io::Errno;
use std::io;

/// What writes may have to be multiples of, in bytes.
const BLOCK_MAX: u32 = 512;

impl Remote {
    /// Refuses an export that nothing can be copied to.
    pub(super) fn refuse_writing(&self) -> Result<()> {
        let minimum = self.session.block_sizes.minimum;
        match () {
            () if self.session.has(READ_ONLY) => Err(Error::unsupported("the export is read-only: serve it writable")),
            () if minimum > BLOCK_MAX => Err(Error::unsupported(format!(
                "the export takes writes in blocks of {minimum} bytes, and a guest's have {BLOCK_MAX}: serve it with \
                 smaller ones (qemu-nbd: without --cache=none)"
            ))),
            () => Ok(()),
        }
    }

    /// Refuses an export that a guest's disk cannot be moved to.
    pub fn refuse_following(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::unsupported(why).at(&self.address));
        match () {
            () if !self.session.has(SEND_FLUSH) => {
                refuse("the export has no flush, so nothing could be promised of what it holds")
            }
            () if !self.is_shared() => refuse(
                "the server takes one connection at a time, on which guests would wait for each other: have it take \
                 several (qemu-nbd: --shared=16)",
            ),
            () => Ok(()),
        }
    }

    /// What writes have to be multiples of, in bytes.
    pub fn block_len(&self) -> u64 {
        self.session.block_sizes.minimum.into()
    }

    /// What of `len` bytes from `at` on is on the disk.
    pub(super) fn on_disk(&self, at: u64, len: usize) -> ByteRange {
        let size = self.session.size;
        ByteRange { start: at.min(size), end: at.saturating_add(len as u64).min(size) }
    }

    /// The first request for `range`: aligned as the server wants it, and no longer than it may be.
    pub(super) fn piece(&self, range: ByteRange) -> ByteRange {
        let sizes = self.session.block_sizes;
        let len_max = REQUEST_LEN_MAX.min(sizes.maximum.into());
        let aligned = range.align_outward(sizes.minimum.into()).prefix(len_max);
        ByteRange { start: aligned.start, end: aligned.end.min(self.session.size) }
    }

    /// What of it may be changed of `len` bytes from `at` on: all, or why nothing.
    pub(super) fn to_change(&self, at: u64, len: u64) -> (ByteRange, io::Result<()>) {
        let range = ByteRange { start: at, end: at.saturating_add(len) };
        let minimum = u64::from(self.session.block_sizes.minimum);
        let checked = match () {
            () if !self.writable => Err(Errno::ROFS.into()),
            () if range.end > self.session.size => Err(Errno::NOSPC.into()),
            () if !(range.start | range.end).is_multiple_of(minimum) => {
                let why = format!("the server takes whole blocks of {minimum} bytes, and {range} is none");
                Err(io::Error::new(io::ErrorKind::InvalidInput, why))
            }
            () => Ok(()),
        };
        (range, checked)
    }

    /// True where zeroes need not be written.
    pub(super) fn can_zero(&self) -> bool {
        self.session.has(SEND_WRITE_ZEROES)
    }

    /// Whether it can be flushed.
    pub(super) fn check_flush(&self) -> io::Result<()> {
        match self.writable && self.session.has(SEND_FLUSH) {
            true => Ok(()),
            false => Err(Errno::OPNOTSUPP.into()),
        }
    }

    /// True where each thread may have a connection of its own.
    pub(super) fn is_shared(&self) -> bool {
        self.session.flags & CAN_MULTI_CONN != 0
    }
}
