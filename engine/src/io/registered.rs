//! Memory that the kernel need not look up for each operation: a ring's arena, registered with it.
//!
//! What is registered is locked, and backed at once. So it grows with what is used, each time to twice its length:
//! hundreds of connections that ask for little hold little.
// UNSAFETY: the kernel is given the address and the length of memory that it works with from then on.
#![expect(unsafe_code)]
use super::{Arena, Buffer};
use io_uring::IoUring;
use std::io;

/// How much is registered at first, in bytes.
const FIRST_LEN: usize = 512 << 10;

/// The part of an arena, from its start, that a ring has registered. It outlives the ring.
pub(super) struct Registered {
    arena: Arena,
    len: usize,
    /// The system does not lock more.
    refused: bool,
}

impl Registered {
    /// The first part of `arena`, where the system allows as much locked memory.
    pub fn new(ring: &IoUring, arena: &Arena) -> Self {
        let mut registered = Self { arena: arena.clone(), len: 0, refused: false };
        match ring.submitter().register_buffers_sparse(1) {
            Ok(()) => drop(registered.grow(ring, FIRST_LEN.min(arena.len()))),
            Err(error) => registered.refuse(&error),
        }
        registered
    }

    /// True where `buffer` is registered, now or already.
    pub fn has(&mut self, ring: &IoUring, buffer: &Buffer) -> bool {
        match self.arena.end_of(buffer) {
            Some(end) => end <= self.len || self.grow(ring, end),
            None => false,
        }
    }

    /// Whose memory it is.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    fn grow(&mut self, ring: &IoUring, len_min: usize) -> bool {
        if self.refused {
            return false;
        }
        let len = (self.len * 2).clamp(len_min, self.arena.len());
        let region = libc::iovec { iov_base: self.arena.start().cast(), iov_len: len };
        // SAFETY: the region lives as long as `self.arena`, which its owner keeps until the ring is gone. Operations that
        // were started on the shorter one keep that until they are done.
        let grown = unsafe { ring.submitter().register_buffers_update(0, std::slice::from_ref(&region), None) };
        match grown {
            Ok(()) => self.len = len,
            Err(error) => self.refuse(&error),
        }
        !self.refused
    }

    fn refuse(&mut self, error: &io::Error) {
        tracing::debug!(%error, "no more of the ring's memory is registered: operations on it cost a little more");
        self.refused = true;
    }
}
