//! Whether a request may be done: the one place where that is decided.
//!
//! What passes is an `Action`: inside the disk, of a length that can be held, with flags that mean
//! something, allowed on this export. Nobody behind this has to look again. What does not pass says
//! how many bytes of payload follow it all the same, for the next header begins behind them.
use super::handshake::Negotiated;
use super::wire::{Command, Errno, Header, command_flag as flag};
use crate::range::ByteRange;

/// Longest payload of a refused WRITE that is read off the wire, in bytes; for a longer one the
/// client is dropped. Above what any export announces.
pub const PAYLOAD_SKIP_MAX: u64 = 64 << 20;

/// What is to be made of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it, and answer.
    Do(Action),
    /// Finish what is under way, then close. Has no reply.
    Disconnect,
    /// Answer with an error.
    Refuse(Refusal),
    /// Its payload is too long even to be skipped: close.
    Hangup,
}

/// A request that may be done. No range is empty, and all are inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send these bytes.
    Read {
        /// Which. As long as the export's longest payload at most.
        range: ByteRange,
        /// As one chunk.
        unfragmented: bool,
    },
    /// Take these bytes: as many follow the header.
    Write {
        /// Where. As long as the export's longest payload at most.
        range: ByteRange,
        /// Answer when they are durable.
        fua: bool,
    },
    /// These bytes are not needed any more.
    Trim {
        /// Which; up to 2^32 - 1 bytes.
        range: ByteRange,
        /// Answer when that is durable.
        fua: bool,
    },
    /// These bytes read as zeroes from now on.
    WriteZeroes {
        /// Which; up to 2^32 - 1 bytes.
        range: ByteRange,
        /// Answer when that is durable.
        fua: bool,
        /// The space stays allocated.
        keep: bool,
        /// Faster than a write, or `Errno::NotSup` at once.
        fast: bool,
    },
    /// Make durable what was answered.
    Flush,
    /// Which of these bytes are holes, which zeroes?
    BlockStatus {
        /// Which; up to 2^32 - 1 bytes.
        range: ByteRange,
        /// Say one extent, inside `range`.
        one: bool,
        /// The context's number.
        context: u32,
    },
}

/// A request that may not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client is told.
    pub error: Errno,
    /// The same in words.
    pub why: &'static str,
    /// Bytes of payload that follow the header all the same.
    pub payload_len: u64,
}

/// Whether `header` may be done under what was negotiated.
pub fn check(negotiated: &Negotiated, header: &Header) -> Verdict {
    let Some(command) = Command::from_wire(header.command) else {
        // No payload is known to follow: only WRITE has one.
        return Verdict::Refuse(Refusal { error: Errno::Inval, why: "unknown command", payload_len: 0 });
    };
    let payload_len = match command {
        Command::Disconnect => return Verdict::Disconnect,
        Command::Write => header.len,
        _ => 0,
    };
    if payload_len > PAYLOAD_SKIP_MAX {
        return Verdict::Hangup;
    }
    match action(negotiated, command, header) {
        Ok(action) => Verdict::Do(action),
        Err((error, why)) => Verdict::Refuse(Refusal { error, why, payload_len }),
    }
}

type Checked<T> = Result<T, (Errno, &'static str)>;

fn action(negotiated: &Negotiated, command: Command, header: &Header) -> Checked<Action> {
    check_flags(negotiated, command, header.flags)?;
    let set = |bit| header.flags & bit != 0;
    let fua = set(flag::FUA);
    Ok(match command {
        Command::Read => {
            check_payload(negotiated, header.len)?;
            let range = range(negotiated, header, Errno::Inval)?;
            Action::Read { range, unfragmented: set(flag::DF) }
        }
        Command::Write => {
            check_writable(negotiated)?;
            check_payload(negotiated, header.len)?;
            Action::Write { range: range(negotiated, header, Errno::NoSpace)?, fua }
        }
        Command::Trim => {
            check_writable(negotiated)?;
            Action::Trim { range: range(negotiated, header, Errno::Inval)?, fua }
        }
        Command::WriteZeroes => {
            check_writable(negotiated)?;
            let range = range(negotiated, header, Errno::NoSpace)?;
            Action::WriteZeroes { range, fua, keep: set(flag::NO_HOLE), fast: set(flag::FAST_ZERO) }
        }
        Command::BlockStatus => {
            let context = negotiated.base_allocation;
            let context = context.ok_or((Errno::Inval, "no metadata context was negotiated for this export"))?;
            let range = range(negotiated, header, Errno::Inval)?;
            Action::BlockStatus { range, one: set(flag::REQ_ONE), context }
        }
        Command::Flush if header.offset != 0 || header.len != 0 => {
            return Err((Errno::Inval, "a flush has no offset and no length"));
        }
        Command::Flush => Action::Flush,
        Command::Disconnect => unreachable!("taken before"),
    })
}

/// A flag that means nothing to this command is refused, but for FUA, which is allowed on all.
fn check_flags(negotiated: &Negotiated, command: Command, flags: u16) -> Checked<()> {
    let known = match command {
        Command::Read if negotiated.structured_replies => flag::DF,
        Command::WriteZeroes if negotiated.export.fast_zero => flag::NO_HOLE | flag::FAST_ZERO,
        Command::WriteZeroes => flag::NO_HOLE,
        Command::BlockStatus => flag::REQ_ONE,
        _ => 0,
    };
    match flags & !(known | flag::FUA) {
        0 => Ok(()),
        _ => Err((Errno::Inval, "a flag that this command does not have, or that was not offered")),
    }
}

fn check_writable(negotiated: &Negotiated) -> Checked<()> {
    match negotiated.export.read_only {
        true => Err((Errno::Perm, "the export is read-only")),
        false => Ok(()),
    }
}

fn check_payload(negotiated: &Negotiated, len: u64) -> Checked<()> {
    match len > negotiated.export.block_sizes.maximum.into() {
        true => Err((Errno::Inval, "longer than the export's maximum payload")),
        false => Ok(()),
    }
}

/// The request's bytes, inside the disk; `outside` is the error for those that are not.
fn range(negotiated: &Negotiated, header: &Header, outside: Errno) -> Checked<ByteRange> {
    let export = &negotiated.export;
    if header.len == 0 {
        return Err((Errno::Inval, "nothing is asked for: the length is 0"));
    }
    let range = ByteRange::new(header.offset, header.len).filter(|range| range.end <= export.size);
    let range = range.ok_or((outside, "ends past the disk"))?;
    // A power of two, so one look does for both.
    let mask = u64::from(export.block_sizes.minimum) - 1;
    match (range.start | range.len()) & mask {
        0 => Ok(range),
        _ => Err((Errno::Inval, "not aligned to the export's minimum block size")),
    }
}

#[cfg(test)]
mod tests;
