//! Whether a request may be done: the one place where that is decided.
//!
//! What passes is an `Action`: inside the disk, of a length that can be held, with flags that mean
//! something, allowed on this export. Nobody behind this has to look again. What does not pass says
//! how many bytes of payload follow it all the same, for the next header begins behind them.
use super::handshake::Negotiated;
use super::reply::Style;
use super::wire::{Command, Errno, Fields, Header, command_flag as flag};
use crate::range::ByteRange;

/// Longest payload of a refused WRITE that is read off the wire, in bytes; for a longer one the
/// client is dropped. Above what any export announces.
pub const PAYLOAD_SKIP_MAX: u64 = 64 << 20;

/// What is to be made of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it, and answer.
    Do(Action),
    /// Its payload, of so many bytes, says what it asks for: receive it, then `check_filter`.
    Filter(usize),
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
        /// Which.
        range: ByteRange,
        /// Answer when that is durable.
        fua: bool,
    },
    /// These bytes read as zeroes from now on.
    WriteZeroes {
        /// Which.
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
        /// Which.
        range: ByteRange,
        /// Say one extent, inside `range`.
        one: bool,
        /// Of which contexts.
        contexts: Selection,
    },
    /// These bytes will be wanted soon.
    Cache {
        /// Which.
        range: ByteRange,
    },
}

/// Some of the contexts that were negotiated: a bit each, by their places there. Never none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection(u32);

impl Selection {
    /// True where the context at `place` is one of them.
    pub fn has(self, place: usize) -> bool {
        self.0 >> place & 1 == 1
    }

    /// How many they are.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    fn all(count: usize) -> Self {
        Self((1_u64.unbounded_shl(count as u32) - 1) as u32)
    }
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
    let command = Command::from_wire(header.command);
    if command == Some(Command::Disconnect) {
        return Verdict::Disconnect;
    }
    // With 64-bit headers the flag says so, of commands that are not known here too; a WRITE has one whatever
    // its flags say: QEMU's client (10.0) leaves PAYLOAD_LEN out.
    let flagged = negotiated.style == Style::Extended && header.flags & flag::PAYLOAD_LEN != 0;
    let has_payload = flagged || command == Some(Command::Write);
    let payload_len = if has_payload { header.len } else { 0 };
    if payload_len > PAYLOAD_SKIP_MAX {
        return Verdict::Hangup;
    }
    let Some(command) = command else {
        return Verdict::Refuse(Refusal { error: Errno::Inval, why: "unknown command", payload_len });
    };
    let checked = match command {
        Command::BlockStatus if has_payload => filter_len(negotiated, header).map(Verdict::Filter),
        _ => action(negotiated, command, header).map(Verdict::Do),
    };
    checked.unwrap_or_else(|(error, why)| Verdict::Refuse(Refusal { error, why, payload_len }))
}

/// Whether a BLOCK_STATUS whose payload came may be done.
pub fn check_filter(negotiated: &Negotiated, header: &Header, payload: &[u8]) -> Verdict {
    let checked = filtered(negotiated, header, payload);
    checked.map_or_else(|(error, why)| Verdict::Refuse(Refusal { error, why, payload_len: 0 }), Verdict::Do)
}

/// Bytes of a filter's length, and of each number behind it.
const FILTER_LEN: usize = 8;
const NUMBER_LEN: usize = 4;

fn filter_len(negotiated: &Negotiated, header: &Header) -> Checked<usize> {
    check_flags(negotiated, Command::BlockStatus, header.flags)?;
    let numbers = header.len.checked_sub(FILTER_LEN as u64).filter(|len| len.is_multiple_of(NUMBER_LEN as u64));
    match numbers.map(|len| len as usize / NUMBER_LEN) {
        // More than there are would name one twice.
        Some(count) if (1..=negotiated.contexts.len()).contains(&count) => Ok(FILTER_LEN + count * NUMBER_LEN),
        _ => Err((Errno::Inval, "the payload is not a length and the numbers of negotiated contexts")),
    }
}

fn filtered(negotiated: &Negotiated, header: &Header, payload: &[u8]) -> Checked<Action> {
    let mut fields = Fields(payload);
    let len = fields.u64().ok_or((Errno::Inval, "the payload has no length"))?;
    let mut selection = Selection(0);
    while let Some(number) = fields.u32() {
        let place = negotiated.contexts.iter().position(|(known, _)| *known == number);
        match place {
            Some(place) if !selection.has(place) => selection.0 |= 1 << place,
            _ => return Err((Errno::Inval, "the payload names a context twice, or one that was not negotiated")),
        }
    }
    let range = range(negotiated, &Header { len, ..*header }, Errno::Inval)?;
    Ok(Action::BlockStatus { range, one: header.flags & flag::REQ_ONE != 0, contexts: selection })
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
            let contexts = Selection::all(negotiated.contexts.len());
            if contexts.count() == 0 {
                return Err((Errno::Inval, "no metadata context was negotiated for this export"));
            }
            let range = range(negotiated, header, Errno::Inval)?;
            Action::BlockStatus { range, one: set(flag::REQ_ONE), contexts }
        }
        Command::Cache => Action::Cache { range: range(negotiated, header, Errno::Inval)? },
        Command::Flush if header.offset != 0 || header.len != 0 => {
            return Err((Errno::Inval, "a flush has no offset and no length"));
        }
        Command::Flush => Action::Flush,
        Command::Disconnect => unreachable!("taken before"),
    })
}

/// A flag that means nothing to this command is refused, but for FUA, which is allowed on all.
fn check_flags(negotiated: &Negotiated, command: Command, flags: u16) -> Checked<()> {
    let extended = negotiated.style == Style::Extended;
    let known = match command {
        Command::Read if negotiated.style != Style::Simple => flag::DF,
        Command::WriteZeroes if negotiated.export.fast_zero => flag::NO_HOLE | flag::FAST_ZERO,
        Command::WriteZeroes => flag::NO_HOLE,
        Command::BlockStatus if extended && !negotiated.contexts.is_empty() => flag::REQ_ONE | flag::PAYLOAD_LEN,
        Command::BlockStatus => flag::REQ_ONE,
        Command::Write if extended => flag::PAYLOAD_LEN,
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
