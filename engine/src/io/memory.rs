//! Files of a file system in memory: what is asked of them is done at once, by whoever asks.
//!
//! There is no device to wait for, and nothing to gain from the kernel's queue: it cannot try these files without a
//! wait, so it hands each operation to another thread, to copy what this one can copy itself.
use super::Op;
use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::io::{pread, pwrite};
use std::io;
use std::os::fd::AsFd;

/// What `statfs(2)` calls tmpfs and ramfs.
const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58f6;
/// What it calls FUSE.
const FUSE: u32 = 0x6573_5546;

/// True where the file system of an open file is in memory.
pub fn is_in_memory(file: impl AsFd) -> bool {
    fstatfs(file).is_ok_and(|system| [TMPFS, RAMFS].contains(&(system.f_type as u32)))
}

/// True where a process serves the file system of an open file.
pub(super) fn is_served(file: impl AsFd) -> bool {
    fstatfs(file).is_ok_and(|system| system.f_type as u32 == FUSE)
}

/// Carries `op` out, where it is one on a file in memory.
pub(super) fn carry_out(op: &mut Op) -> Option<io::Result<u32>> {
    let done = match op {
        Op::Read { file, at, buf } => pread(file.in_memory()?, &mut buf[..], *at),
        Op::Write { file, at, buf } => pwrite(file.in_memory()?, &buf[..], *at),
        Op::Zero { file, at, len, unmap } => fallocate(file.in_memory()?, zero_mode(*unmap), *at, *len).map(|()| 0),
        // Flushed or not, nothing of it outlives the system; and it need not be brought into memory.
        Op::Flush { file } | Op::Prefetch { file, .. } => file.in_memory().map(|_| Ok(0))?,
        _ => return None,
    };
    Some(done.map(|count| count as u32).map_err(io::Error::from))
}

/// How zeroes are made: space is given back, or kept.
pub(super) fn zero_mode(unmap: bool) -> FallocateFlags {
    let mode = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    mode | FallocateFlags::KEEP_SIZE
}
