//! Writing a range of a disk compressed, cluster by cluster, several at once.
//!
//! ```text
//! deflate ─► shorter ─► reserve ─► write ─► commit
//!         └► not    ─► written as any payload
//! ```
use super::Disk;
use super::flush::Settling;
use super::step::{Moved, Status, Tools, keep, start_write};
use super::task::Task;
use crate::io::{Buffer, Completion, Io, Op, Token, Work};
use formats::error::{Error, Result};
use formats::image::{Reservation, Reserve};
use formats::range::ByteRange;
use std::io;
use std::sync::Arc;

/// How many clusters one task works on at once.
const PARTS: usize = 4;
/// Local tokens: a part's own operation, then the plain write of one part at a time, then the settle's.
const PLAIN: u64 = PARTS as u64;
const SETTLE: u64 = PLAIN + super::write::TOKENS;
const _: () = assert!(SETTLE < Task::TOKENS, "a token beyond is the next task's");

pub(super) struct Compress {
    range: ByteRange,
    /// Up to here every cluster is under way.
    at: u64,
    /// Bytes of a cluster.
    cluster: usize,
    /// The caller's bytes: what is under way was copied from them.
    buf: Buffer,
    parts: [Option<Part>; PARTS],
    /// A cluster that did not shrink.
    plain: Option<Box<Task>>,
    /// Nothing of that is under way.
    plain_blocked: bool,
    settling: Settling,
    error: Option<Error>,
}

/// One cluster and how far it has come.
struct Part {
    guest: ByteRange,
    stage: Stage,
}

enum Stage {
    Deflating,
    /// Compressed, and to be given room.
    Deflated(Buffer),
    /// It is written as it is, when its turn comes.
    Plain,
    /// What is left to be written of it when its pages are free, and where.
    Waiting(Buffer, u64, Reservation),
    Writing(u64, crate::data_file::Stay, Reservation),
    Over,
}

impl Compress {
    /// `range` is of whole clusters, the disk's last one cut to the disk.
    pub fn new(range: ByteRange, buf: Buffer, cluster: u32) -> Self {
        let cluster = cluster as usize;
        let parts = Default::default();
        Self {
            range,
            at: range.start,
            cluster,
            buf,
            parts,
            plain: None,
            plain_blocked: false,
            settling: Settling::default(),
            error: None,
        }
    }

    pub fn step<I: Io>(&mut self, disk: &Arc<Disk>, tools: &mut Tools<I>, base: Token) -> Status {
        let mut blocked = false;
        if let Err(error) = self.try_step(disk, tools, base, &mut blocked) {
            keep(&mut self.error, error);
        }
        let under_way = |part: &Part| matches!(part.stage, Stage::Deflating | Stage::Writing(..));
        let in_kernel = self.parts.iter().flatten().any(under_way)
            || self.plain.is_some() && !self.plain_blocked
            || self.settling.in_kernel();
        if self.error.is_some() && !in_kernel {
            // What has only room gives it back.
            self.parts = Default::default();
            (self.plain, self.settling) = (None, Settling::default());
            disk.bell.ring();
        }
        match () {
            () if in_kernel => Status::Busy,
            () if self.error.is_some() || self.is_over() => Status::Done,
            () if blocked => Status::Blocked,
            () => Status::Busy,
        }
    }

    fn is_over(&self) -> bool {
        self.at == self.range.end
            && self.plain.is_none()
            && !self.settling.is_under_way()
            && self.parts.iter().all(Option::is_none)
    }

    fn try_step<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        blocked: &mut bool,
    ) -> Result<()> {
        self.step_plain(disk, tools, base, blocked);
        loop {
            if self.error.is_none() {
                disk.refuse_poisoned()?;
                self.start(disk, tools, base);
            }
            let mut ended = false;
            for number in 0..PARTS {
                ended |= self.step_part(disk, tools, base, number, blocked)?;
            }
            if !ended {
                return Ok(());
            }
        }
    }

    /// Has the next clusters deflated, as many as there are free parts.
    fn start<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token) {
        while self.at < self.range.end
            && let Some(free) = self.parts.iter().position(Option::is_none)
        {
            let guest = ByteRange { start: self.at, end: self.range.end.min(self.at + self.cluster as u64) };
            self.at = guest.end;
            let mut from = tools.arena.buffer(self.cluster);
            let bytes = self.bytes(guest);
            from[..bytes.len()].copy_from_slice(bytes);
            from[bytes.len()..].fill(0);
            let layer = Arc::clone(disk.chain().top());
            // No bytes: it does not shrink.
            let work = Work::new(move |from, to| Ok(layer.image.deflate(from, to).unwrap_or(0)));
            let op = Op::Compute { from, to: tools.arena.buffer(self.cluster), work };
            tools.io.submit(Token(base.0 + free as u64), op);
            self.parts[free] = Some(Part { guest, stage: Stage::Deflating });
        }
    }

    fn bytes(&self, guest: ByteRange) -> &[u8] {
        &self.buf[(guest.start - self.range.start) as usize..][..guest.len() as usize]
    }

    /// Takes one part as far as it goes. True where it ended, or goes on in another way.
    fn step_part<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        number: usize,
        blocked: &mut bool,
    ) -> Result<bool> {
        let Some(part) = &mut self.parts[number] else { return Ok(false) };
        let guest = part.guest;
        match std::mem::replace(&mut part.stage, Stage::Over) {
            Stage::Deflated(buf) if self.error.is_none() => {
                part.stage = Stage::Deflated(buf);
                self.reserve(disk, tools, base, number, blocked)?;
                if matches!(self.parts[number], Some(Part { stage: Stage::Plain, .. })) {
                    return Ok(true);
                }
            }
            Stage::Plain if self.error.is_none() => {
                part.stage = Stage::Plain;
                if self.plain.is_none() {
                    let mut buf = tools.arena.buffer(guest.len() as usize);
                    buf.copy_from_slice(self.bytes(guest));
                    self.plain = Some(Box::new(Task::write(Arc::clone(disk), guest, buf)));
                    self.parts[number] = None;
                    self.step_plain(disk, tools, base, blocked);
                    return Ok(true);
                }
                return Ok(false);
            }
            Stage::Over => {
                self.parts[number] = None;
                disk.bell.ring();
                return Ok(true);
            }
            stage => part.stage = stage,
        }
        let part = self.parts[number].as_mut().expect("it was just looked at");
        part.stage = match std::mem::replace(&mut part.stage, Stage::Over) {
            Stage::Waiting(buf, host, reservation) if self.error.is_none() => {
                match start_write(disk, tools, Token(base.0 + number as u64), host, buf) {
                    Ok(stay) => Stage::Writing(host, stay, reservation),
                    Err(buf) => {
                        *blocked = true;
                        Stage::Waiting(buf, host, reservation)
                    }
                }
            }
            stage => stage,
        };
        Ok(false)
    }

    /// Asks for room for a part that is deflated.
    fn reserve<I: Io>(
        &mut self,
        disk: &Arc<Disk>,
        tools: &mut Tools<I>,
        base: Token,
        number: usize,
        blocked: &mut bool,
    ) -> Result<()> {
        loop {
            if !self.settling.step(disk, tools, Token(base.0 + SETTLE), blocked)? {
                return Ok(());
            }
            let part = self.parts[number].as_mut().expect("it is deflated");
            let Stage::Deflated(buf) = &part.stage else { return Ok(()) };
            let top = disk.chain().top();
            let reserve = top.image.reserve_compressed(part.guest, buf.len() as u32);
            match reserve.map_err(|error| error.at(top.path.display()))? {
                None => part.stage = Stage::Plain,
                Some(Reserve::Busy) => *blocked = true,
                Some(Reserve::Settle) => {
                    self.settling.begin();
                    continue;
                }
                Some(Reserve::Room(reservation)) => {
                    let Stage::Deflated(buf) = std::mem::replace(&mut part.stage, Stage::Over) else {
                        unreachable!("just looked at")
                    };
                    part.stage = Stage::Waiting(buf, reservation.host, reservation);
                }
            }
            return Ok(());
        }
    }

    fn step_plain<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token, blocked: &mut bool) {
        let Some(mut task) = self.plain.take() else { return };
        match task.step(tools, Token(base.0 + PLAIN)) {
            Status::Done => {
                if let (Err(error), _) = task.end() {
                    keep(&mut self.error, error);
                }
                disk.bell.ring();
            }
            status => {
                self.plain_blocked = status == Status::Blocked;
                *blocked |= self.plain_blocked;
                self.plain = Some(task);
            }
        }
    }

    pub fn complete<I: Io>(&mut self, disk: &Disk, tools: &mut Tools<I>, base: Token, local: u64, done: Completion) {
        match local {
            SETTLE => self.settling.complete(disk, done.result),
            local if local >= PLAIN => {
                let task = self.plain.as_mut().expect("a cluster is written as it is");
                task.complete(tools, Token(base.0 + PLAIN), done);
            }
            number => self.part_done(disk, number as usize, done.op, done.result),
        }
    }

    fn part_done(&mut self, disk: &Disk, number: usize, op: Op, result: io::Result<u32>) {
        let part = self.parts[number].as_mut().expect("a part that is under way");
        let top = disk.chain().top();
        part.stage = match std::mem::replace(&mut part.stage, Stage::Over) {
            Stage::Deflating => match (op, result) {
                (Op::Compute { mut to, .. }, Ok(len)) if len > 0 => {
                    to.truncate(len as usize);
                    Stage::Deflated(to)
                }
                _ => Stage::Plain,
            },
            Stage::Writing(host, stay, reservation) => {
                top.file.leave(stay);
                disk.bell.ring();
                let failed = |error| {
                    let what = format!("{}: write of a compressed cluster at {host}", top.path.display());
                    Some(Error::io(what, error))
                };
                let error = match Moved::of(op, result) {
                    Moved::All(_) => top.image.commit(reservation).err().map(|error| error.at(top.path.display())),
                    Moved::Part { moved, rest } => {
                        part.stage = Stage::Waiting(rest, host + moved.len() as u64, reservation);
                        return;
                    }
                    Moved::Nothing(_) => failed(io::ErrorKind::WriteZero.into()),
                    Moved::Failed(_, error) => failed(error),
                };
                if let Some(error) = error {
                    keep(&mut self.error, error);
                }
                Stage::Over
            }
            _ => unreachable!("nothing of it is under way"),
        };
    }

    pub fn end(self) -> (Result<()>, Option<Buffer>) {
        (self.error.map_or(Ok(()), Err), Some(self.buf))
    }
}
