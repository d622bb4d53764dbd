//! NBD as a client speaks it: what it says, and what it makes of a server's bytes.
//!
//! ```text
//! bytes ─► Negotiation ─► Session ─┐
//! asked ─► Replies::ask ─► bytes   │   (for the server)
//! bytes ─► Replies::step ──────────┴─► Data, Zero, Extent … Done
//! ```
//!
//! As on the server's side nothing here reads a socket or waits. A server is believed nothing: each
//! length is bounded before anything is kept of it, what is answered has to be what was asked, all of it
//! and nothing twice, and whatever breaks the protocol is an error that names it, after which the
//! connection is of no use.
mod answered;
mod negotiation;
mod replies;

pub use negotiation::{Negotiation, Next};
pub use replies::{Ask, Event, Failure, Replies};

use super::export::BlockSizes;

/// What client and server agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Bytes of the disk, at most 2^63 - 1.
    pub size: u64,
    /// What the export can do; see `wire::transmission_flag`.
    pub flags: u16,
    /// The sizes that requests have to have.
    pub block_sizes: BlockSizes,
    /// Reads are answered in chunks.
    pub structured_replies: bool,
    /// The number of `base:allocation`, where the server has it.
    pub base_allocation: Option<u32>,
}

impl Session {
    /// True where the export has all of these; see `wire::transmission_flag`.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// Collects units of known length from bytes that come in pieces of any size.
#[derive(Debug, Default)]
struct Collector(Vec<u8>);

impl Collector {
    /// The next `len` bytes when they are all there, taken off the front of `input`.
    fn take(&mut self, input: &mut &[u8], len: usize) -> Option<Vec<u8>> {
        let (head, rest) = input.split_at(input.len().min(len - self.0.len()));
        self.0.extend_from_slice(head);
        *input = rest;
        (self.0.len() == len).then(|| std::mem::take(&mut self.0))
    }
}

#[cfg(test)]
mod tests;
