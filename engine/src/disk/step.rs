//! What every stepped operation on a disk has to do with: its thread's tools, where a step left it, and
//! what the kernel moved of a buffer.
use super::Disk;
use crate::data_file::Stay;
use crate::io::{Arena, Buffer, Io, Op, Token, Waker};
use formats::error::Error;
use std::io;

/// What a stepped thing works with: its thread's queue, memory and bell-push.
pub struct Tools<'a, I: Io> {
    /// The queue.
    pub io: &'a mut I,
    /// Memory for what a task needs beside its caller's buffer.
    pub arena: &'a Arena,
    /// Who is woken when a blocked task can go on.
    pub waker: &'a Waker,
}

/// Where a step left a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Operations are under way.
    Busy,
    /// Nothing is under way; the owner's waker is called when it is worth another step.
    Blocked,
    /// Over.
    Done,
}

/// Starts writing `buf` at `host` of the disk's payload. Gives it back where its pages are not free.
pub(super) fn start_write<I: Io>(
    disk: &Disk,
    tools: &mut Tools<I>,
    token: Token,
    host: u64,
    buf: Buffer,
) -> Result<Stay, Buffer> {
    match disk.chain().top().file.enter(host, &buf) {
        Some(stay) => {
            write_there(disk, tools, token, host, buf);
            Ok(stay)
        }
        None => Err(buf),
    }
}

/// The same for a writer that has its place already.
pub(super) fn write_there<I: Io>(disk: &Disk, tools: &mut Tools<I>, token: Token, host: u64, buf: Buffer) {
    let file = disk.chain().top().file.way(host, &buf).clone();
    tools.io.submit(token, Op::Write { file, at: host, buf });
}

/// Keeps the first error of several operations.
pub(super) fn keep(error: &mut Option<Error>, new: Error) {
    error.get_or_insert(new);
}

/// How much of a buffer an operation moved: all, a part with the rest to be moved still, or nothing.
pub(super) enum Moved {
    All(Buffer),
    Part { moved: Buffer, rest: Buffer },
    Nothing(Buffer),
    Failed(Buffer, io::Error),
}

impl Moved {
    pub(super) fn of(op: Op, result: io::Result<u32>) -> Self {
        let (Op::Read { buf, .. } | Op::Write { buf, .. }) = op else {
            unreachable!("a task's payload moves by reads and writes")
        };
        match result {
            Err(error) => Self::Failed(buf, error),
            Ok(count) if count as usize >= buf.len() => Self::All(buf),
            Ok(0) => Self::Nothing(buf),
            Ok(count) => {
                let mut moved = buf;
                let rest = moved.split_off(count as usize);
                Self::Part { moved, rest }
            }
        }
    }
}
