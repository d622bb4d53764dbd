//! Bytes: what every byte that this program did not write itself means.
//!
//! A format answers *where* guest bytes live and keeps its metadata right; the payload is moved by
//! its caller. So nothing here starts a thread, waits for a device's payload or needs `unsafe`, and
//! each format can be fuzzed without a file.
//!
//! ```text
//! image     what every disk image format owes the engine
//!   raw     guest offset and file offset are the same number
//!   qcow2   versions 2 and 3
//! probe     which format a file seems to have
//! backing   the names of images below
//! nbd       the wire: handshake, requests, replies
//! record    which disk is the truth
//! manifest  what a disk holds, as hashes in text
//! planes    what a job's target lacks, in memory that outlives the daemon
//! storage   the bytes that metadata is read from and written to
//! journal   keeps metadata that is only in memory through a kill of the process
//! error, range   leaves that anyone may use
//! ```
#![forbid(unsafe_code)]

// What the tests share names this crate from outside.
#[cfg(test)]
extern crate self as formats;

pub mod backing;
pub mod error;
pub mod image;
pub mod journal;
pub mod manifest;
pub mod nbd;
pub mod planes;
pub mod probe;
pub mod qcow2;
pub mod range;
pub mod raw;
pub mod record;
pub mod storage;
