//! How much of a file the page cache has: `cachestat(2)`, of Linux 6.5 and newer.
// UNSAFETY: a call of the system that no safe wrapper has.
#![expect(unsafe_code)]
use super::PAGE;
use std::os::fd::{AsFd, AsRawFd};

/// The same on every processor that io_uring is on, except Alpha.
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct Range {
    offset: u64,
    /// 0: to the end.
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many bytes of `file` are in the page cache; `None` where the system does not say.
pub fn cached_bytes(file: impl AsFd) -> Option<u64> {
    let (range, mut counts) = (Range { offset: 0, len: 0 }, Counts::default());
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `range` and writes `counts`, which have its layout and outlive the call.
    let answer = unsafe { libc::syscall(CACHESTAT, fd, &raw const range, &raw mut counts, 0) };
    (answer == 0).then_some(counts.cached * PAGE as u64)
}

#[cfg(test)]
mod tests {
    use super::cached_bytes;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_there() {
        let mut file = tempfile::tempfile().expect("a file");
        let before = cached_bytes(&file);
        file.write_all(&[1; 64 << 10]).expect("room for it");
        // A kernel that is older does not say.
        assert_eq!(cached_bytes(&file).is_none(), before.is_none());
        assert!(cached_bytes(&file).is_none_or(|bytes| bytes >= 64 << 10));
    }
}
