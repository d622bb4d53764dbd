//! One operation on a disk, stepped.
//!
//! ```text
//! Task::read/write/zero/… ─► step ─► Busy     its operations are under way: complete, step
//!                              │ ──► Blocked  on somebody else: step again when woken
//!                              └───► Done     end
//! ```
//!
//! A task numbers its operations from the token that its owner gives, below `Task::TOKENS`. It may
//! be dropped only when nothing of it is under way.
use super::Disk;
use super::compress::Compress;
use super::flush::Flush;
use super::prefetch::Prefetch;
use super::read::Read;
use super::share::Share;
use super::step::{Status, Tools};
use super::write::Write;
use super::zero::Zero;
use crate::io::{Buffer, Completion, File, Io, Token};
use formats::error::Result;
use formats::image::Zeroing;
use formats::range::ByteRange;
use std::sync::Arc;

/// One operation on a disk.
pub struct Task {
    disk: Arc<Disk>,
    kind: Kind,
    parity: usize,
    /// Nobody may wait in it, not even at its end.
    at_once: bool,
}

#[expect(clippy::large_enum_variant, reason = "a task lies in its owner's table; boxed, each request would allocate")]
enum Kind {
    Read(Read),
    Write(Write),
    Compress(Box<Compress>),
    Zero(Zero),
    Share(Share),
    Flush(Flush),
    Prefetch(Prefetch),
}

impl Task {
    /// How many tokens a task may use, from the one it is given.
    pub const TOKENS: u64 = 128;

    /// Fills `buf` with `range`, of the same length.
    pub fn read(disk: Arc<Disk>, range: ByteRange, buf: Buffer) -> Self {
        assert!(range.len() == buf.len() as u64, "a buffer of the range's length");
        Self::new(disk, Kind::Read(Read::new(range, buf)))
    }

    /// Writes `buf` to `range`, of the same length.
    pub fn write(disk: Arc<Disk>, range: ByteRange, buf: Buffer) -> Self {
        assert!(range.len() == buf.len() as u64, "a buffer of the range's length");
        Self::new(disk, Kind::Write(Write::new(range, buf)))
    }

    /// The same where nothing of it can wait for a table: all of `range` has its place. Else `buf` comes back.
    pub fn write_at_once(disk: Arc<Disk>, range: ByteRange, buf: Buffer) -> std::result::Result<Self, Buffer> {
        assert!(range.len() == buf.len() as u64, "a buffer of the range's length");
        let mut task = Self::new(disk, Kind::Flush(Flush::default()));
        task.at_once = true;
        task.kind = Kind::Write(Write::at_once(&task.disk, range, buf)?);
        Ok(task)
    }

    /// Writes `buf` to `range`, of the same length, compressed: whole clusters of `cluster` bytes, the disk's
    /// last one cut to the disk.
    pub fn compress(disk: Arc<Disk>, range: ByteRange, buf: Buffer, cluster: u32) -> Self {
        assert!(range.len() == buf.len() as u64, "a buffer of the range's length");
        Self::new(disk, Kind::Compress(Box::new(Compress::new(range, buf, cluster))))
    }

    /// Makes `range` read as zeroes.
    pub fn zero(disk: Arc<Disk>, range: ByteRange, zeroing: Zeroing) -> Self {
        Self::new(disk, Kind::Zero(Zero::new(range, zeroing, false)))
    }

    /// The same, or an error (EOPNOTSUPP) where that would be no faster than writing zeroes.
    pub fn zero_fast(disk: Arc<Disk>, range: ByteRange, zeroing: Zeroing) -> Self {
        Self::new(disk, Kind::Zero(Zero::new(range, zeroing, true)))
    }

    /// Makes `range` the bytes of `from` at `host`, by sharing their blocks. The disk's top image is raw, and everything is a
    /// multiple of `SHARE_ALIGN`.
    pub fn share(disk: Arc<Disk>, range: ByteRange, from: File, host: u64) -> Self {
        Self::new(disk, Kind::Share(Share::new(range, from, host)))
    }

    /// Says that `range` will be read soon. Has no errors.
    pub fn prefetch(disk: Arc<Disk>, range: ByteRange) -> Self {
        Self::new(disk, Kind::Prefetch(Prefetch::new(range)))
    }

    /// Makes durable what was done before.
    pub fn flush(disk: Arc<Disk>) -> Self {
        Self::new(disk, Kind::Flush(Flush::default()))
    }

    fn new(disk: Arc<Disk>, kind: Kind) -> Self {
        let parity = disk.grace.enter();
        Self { disk, kind, parity, at_once: false }
    }

    /// Starts what can be started. Never waits.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Status {
        match self.try_step(tools, base) {
            Status::Blocked => {
                // What it waits for may have ended before it listened.
                self.disk.bell.listen(tools.waker);
                self.try_step(tools, base)
            }
            status => status,
        }
    }

    fn try_step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) -> Status {
        match &mut self.kind {
            Kind::Read(read) => read.step(&self.disk, tools, base),
            Kind::Write(write) => write.step(&self.disk, tools, base),
            Kind::Compress(compress) => compress.step(&self.disk, tools, base),
            Kind::Zero(zero) => zero.step(&self.disk, tools, base),
            Kind::Share(share) => share.step(&self.disk, tools, base),
            Kind::Flush(flush) => flush.step(&self.disk, tools, base),
            Kind::Prefetch(prefetch) => prefetch.step(&self.disk, tools, base),
        }
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        let local = done.token.0 - base.0;
        debug_assert!(local < Self::TOKENS);
        match &mut self.kind {
            Kind::Read(read) => read.complete(&self.disk, tools, base, local, done.op, done.result),
            Kind::Write(write) => write.complete(&self.disk, tools, base, local, done),
            Kind::Compress(compress) => compress.complete(&self.disk, tools, base, local, done),
            Kind::Zero(zero) => zero.complete(&self.disk, tools, base, local, done),
            Kind::Share(share) => share.complete(&self.disk, done.result),
            Kind::Flush(flush) => flush.complete(&self.disk, done.result),
            Kind::Prefetch(prefetch) => prefetch.complete(),
        }
    }

    /// Of a task that zeroes: how many bytes it had to write for that.
    pub fn zeroes_written(&self) -> u64 {
        if let Kind::Zero(zero) = &self.kind { zero.written } else { 0 }
    }

    /// What became of it, and the caller's buffer. After `Status::Done`.
    pub fn end(mut self) -> (Result<()>, Option<Buffer>) {
        let nothing = Kind::Flush(Flush::default());
        let (outcome, buf) = match std::mem::replace(&mut self.kind, nothing) {
            Kind::Read(read) => read.end(),
            Kind::Write(write) => write.end(),
            Kind::Compress(compress) => compress.end(),
            Kind::Zero(zero) => (zero.end(), None),
            Kind::Share(share) => (share.end(), None),
            Kind::Flush(flush) => (flush.end(), None),
            Kind::Prefetch(_) => (Ok(()), None),
        };
        if outcome.is_err() {
            self.disk.tell_damage();
        }
        (outcome, buf)
    }

    /// The disk that it is on.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // The next settle sees to it otherwise.
        if self.disk.grace.leave(self.parity) && !self.at_once {
            self.disk.try_recycle();
        }
    }
}
