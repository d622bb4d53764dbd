//! Operations on files and sockets, owned by their queue while the kernel has them.
//!
//! An `Op` goes in with everything that the kernel may touch and comes back in its `Completion`, so
//! no buffer can be dropped, read or reused while an operation on it is under way. The kernel's
//! queue is `Ring`; a simulator implements `Io` too and drives the same code in any order.
//!
//! This folder is the only one that has `unsafe`: memory that the kernel writes to, the ring's
//! entries, memory that outlives the process, and the locks of open files. What the processor does for long goes to a `Pool`.
mod arena;
mod cached;
mod clone;
mod file;
mod gather;
pub mod lock;
mod memory;
mod pool;
mod registered;
pub mod remote;
mod ring;
mod storage;
mod words;

pub use arena::{Arena, Buffer, Loan, PAGE};
pub use cached::cached_bytes;
pub use file::{File, Waker};
pub use gather::Gather;
pub use memory::is_in_memory;
pub use pool::{Pool, Turn, Work};
pub use ring::Ring;
pub use storage::FileStorage;
pub use words::{View, Words};

use rustix::net::SocketAddrAny;
use std::io;
use std::time::Duration;

/// Whose operation a completion is; the owner's own numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// One operation. What it needs goes in with it and comes back with its completion.
#[derive(Debug)]
pub enum Op {
    /// Fill `buf` from `at`. The result is how many bytes came: fewer at the end of the file.
    Read {
        /// From where.
        file: File,
        /// Offset in the file.
        at: u64,
        /// Into what.
        buf: Buffer,
    },
    /// Write `buf` at `at`. The result is how many bytes went.
    Write {
        /// To where.
        file: File,
        /// Offset in the file.
        at: u64,
        /// What.
        buf: Buffer,
    },
    /// Make `len` bytes read as zeroes.
    Zero {
        /// Of which file.
        file: File,
        /// Offset in the file.
        at: u64,
        /// How many; not 0.
        len: u64,
        /// Give the space back where the file system can; else keep it allocated.
        unmap: bool,
    },
    /// Make everything durable that was written to the file before.
    Flush {
        /// Which file.
        file: File,
    },
    /// Bring bytes of a file into the page cache, if the system likes.
    Prefetch {
        /// Of which file.
        file: File,
        /// Offset in the file.
        at: u64,
        /// How many.
        len: u64,
    },
    /// Receive what is there into `buf`. The result is how many bytes came; 0 where the peer ended.
    Receive {
        /// From whom.
        socket: File,
        /// Into what.
        buf: Buffer,
        /// When it is done.
        until: Until,
    },
    /// Send the rest of `gather`. The result is how many bytes went.
    Send {
        /// To whom.
        socket: File,
        /// What.
        gather: Gather,
    },
    /// Take in one connection; it is in `accepted` when the operation succeeded.
    Accept {
        /// Where they come in.
        listener: File,
        /// Who came.
        accepted: Option<File>,
    },
    /// Make `to` of `from`, on a thread of the pool. The result is how many bytes of `to` were made.
    Compute {
        /// Of what.
        from: Buffer,
        /// Into what.
        to: Buffer,
        /// How.
        work: Work,
    },
    /// Make bytes of one file those of another by sharing their blocks, on a thread of the pool. The result is `Ok(0)`.
    Clone {
        /// Whose.
        from: File,
        /// Offset there.
        at: u64,
        /// Of which file.
        to: File,
        /// Offset there.
        to_at: u64,
        /// How many.
        len: u64,
    },
    /// Reach the server at `peer`.
    Connect {
        /// With what; not connected yet.
        socket: File,
        /// Who.
        peer: SocketAddrAny,
    },
    /// Be done after some time. The result is `Ok(0)`.
    Timeout {
        /// How long.
        after: Duration,
    },
    /// Be done when somebody calls `Waker::wake`.
    Wake {
        /// Whose waking.
        waker: Waker,
    },
}

impl Op {
    /// The file that it reads or changes.
    fn file(&self) -> Option<&File> {
        match self {
            Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Zero { file, .. }
            | Self::Flush { file }
            | Self::Prefetch { file, .. } => Some(file),
            _ => None,
        }
    }
}

/// When a receive is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When something is there.
    Some,
    /// The same, but most likely nothing is there yet: looking at once would be in vain.
    Later,
    /// When its buffer is full.
    Full,
}

/// An operation that is over, with everything that was lent to it.
#[derive(Debug)]
pub struct Completion {
    /// Whose it was.
    pub token: Token,
    /// What it was.
    pub op: Op,
    /// Bytes moved, or why not.
    pub result: io::Result<u32>,
}

/// How long to wait for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Take what is there.
    No,
    /// At least one.
    One,
}

/// A queue of operations: the kernel's ring, or a simulator's.
pub trait Io {
    /// Queues `op`. It is started at the next `reap` at the latest.
    fn submit(&mut self, token: Token, op: Op);

    /// Sends what `socket` takes of the rest of `gather` without a wait, where that is cheaper than an
    /// operation. How many bytes went; an error is the operation's to find.
    fn send_at_once(&mut self, _socket: &File, _gather: &Gather) -> usize {
        0
    }

    /// Moves what is done into `done`.
    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
}
