//! Sharing a range of one file with another, on file systems that do: `FICLONERANGE` of `ioctl_ficlonerange(2)`.
//!
//! It moves no byte, but waits for those that the page cache has of the source, and io_uring has no word for it: so it
//! goes to the pool's threads.
// UNSAFETY: a call of the system that no safe wrapper has.
#![expect(unsafe_code)]
use super::File;
use std::io;

/// Makes `len` bytes of `to` at `to_at` the same blocks as those of `from` at `at`.
pub(super) fn clone_range(from: &File, at: u64, to: &File, to_at: u64, len: u64) -> io::Result<u32> {
    let range =
        libc::file_clone_range { src_fd: from.raw().into(), src_offset: at, src_length: len, dest_offset: to_at };
    // SAFETY: the kernel reads `range`, which outlives the call, and nothing else of this process.
    match unsafe { libc::ioctl(to.raw(), libc::FICLONERANGE, &raw const range) } {
        0 => Ok(0),
        _ => Err(io::Error::last_os_error()),
    }
}
