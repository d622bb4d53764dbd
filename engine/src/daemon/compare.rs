//! `compare`: whether two disks read alike.
use super::map::{Run, Runs};
use super::pool::pool;
use crate::chain::{Chain, Look, Source};
use crate::disk::{Disk, Status, Task, Tools};
use crate::io::remote::Remotes;
use crate::io::{Arena, Buffer, Completion, Io, Op, Ring, Token, Turn, Wait, Waker};
use crate::zero::is_zero;
use formats::error::{Error, Result};
use formats::range::ByteRange;
use std::sync::Arc;

/// How much is compared at a time, in bytes.
const PIECE: u64 = 1 << 20;
/// How many pieces are under way.
const DEPTH: usize = 8;

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// They read alike. Where one is longer, the rest of it is zeroes.
    Same,
    /// The first byte that differs, as an offset.
    DifferAt(u64),
    /// One is longer; only a strict comparison says so.
    SizesDiffer([u64; 2]),
    /// The first byte that is payload, a zero or nothing in one of them and not in the other; only a
    /// strict comparison says so.
    MappedOtherwiseAt(u64),
}

/// Why two disks could not be compared.
#[derive(Debug)]
pub enum Incomparable {
    /// An image does not say where its bytes are.
    Mapping(Error),
    /// They are there and cannot be read.
    Reading(Error),
}

/// Compares two disks, also in size and mapping where that is to be `strict`; `progress` is told how
/// many bytes were compared.
pub fn compare(
    first: Disk,
    second: Disk,
    strict: bool,
    progress: impl FnMut(u64),
) -> std::result::Result<Comparison, Incomparable> {
    let sizes = [first.size(), second.size()];
    if strict && sizes[0] != sizes[1] {
        return Ok(Comparison::SizesDiffer(sizes));
    }
    if strict && let Some(at) = mapped_otherwise(first.chain(), second.chain()).map_err(Incomparable::Mapping)? {
        return Ok(Comparison::MappedOtherwiseAt(at));
    }
    contents(first, second, progress)
}

/// The first byte of which two equally long disks tell otherwise.
fn mapped_otherwise(first: &Chain, second: &Chain) -> Result<Option<u64>> {
    let kind = |run: &Run, chain: &Chain| {
        // Past the end of a shorter layer below, it is that layer that has the zeroes.
        let allocated = run.present || run.depth + 1 < chain.layers().len();
        (allocated, run.zero, run.data, run.compressed, run.host.is_some())
    };
    let mut runs = [Runs::new(first), Runs::new(second)];
    let mut next = |side: usize| runs[side].next().transpose();
    let mut now = [next(0)?, next(1)?];
    while let [Some(one), Some(other)] = now {
        if kind(&one, first) != kind(&other, second) {
            return Ok(Some(one.guest.start.max(other.guest.start)));
        }
        let (end, other_end) = (one.guest.end, other.guest.end);
        if end <= other_end {
            now[0] = next(0)?;
        }
        if other_end <= end {
            now[1] = next(1)?;
        }
    }
    Ok(None)
}

fn contents(first: Disk, second: Disk, mut progress: impl FnMut(u64)) -> std::result::Result<Comparison, Incomparable> {
    let disks = [Arc::new(first), Arc::new(second)];
    let size = disks.iter().map(|disk| disk.size()).max().unwrap_or(0);
    let failed = |error| Incomparable::Reading(Error::io("the ring", error));
    let arena = Arena::new((DEPTH * 2 + 1) * PIECE as usize);
    let waker = Waker::new().map_err(failed)?;
    let ring = Ring::new(64, &arena).and_then(|ring| ring.helped_by(pool(), Turn::Copy));
    let mut ring = Remotes::new(ring.map_err(failed)?);
    let mut slots: [Option<Piece>; DEPTH] = Default::default();
    let mut done: Vec<Completion> = Vec::new();
    let (mut at, mut found) = (0, None::<u64>);
    ring.submit(WAKE, Op::Wake { waker: waker.clone() });
    loop {
        for (number, slot) in slots.iter_mut().enumerate() {
            // Once a difference is known, only what lies before it matters.
            while slot.is_none() && at < found.unwrap_or(size) {
                let (range, zeroes) = next(&disks, at, size).map_err(Incomparable::Mapping)?;
                at = range.end;
                *slot = (!zeroes).then(|| Piece::new(&disks, range));
            }
            let Some(piece) = slot else { continue };
            let tools = &mut Tools { io: &mut ring, arena: &arena, waker: &waker };
            if piece.step(tools, number).map_err(Incomparable::Reading)? {
                let differs = piece.first_difference();
                progress(piece.range.end);
                found = found.into_iter().chain(differs).min();
                *slot = None;
            }
        }
        if slots.iter().all(Option::is_none) && at >= found.unwrap_or(size) {
            return Ok(found.map_or(Comparison::Same, Comparison::DifferAt));
        }
        // A piece that was just ended leaves room for the next one.
        let idle = slots.iter().any(Option::is_none) && at < found.unwrap_or(size);
        ring.reap(if idle { Wait::No } else { Wait::One }, &mut done).map_err(failed)?;
        for completion in done.drain(..) {
            if completion.token == WAKE {
                ring.submit(WAKE, Op::Wake { waker: waker.clone() });
                continue;
            }
            let number = (completion.token.0 / (2 * Task::TOKENS)) as usize;
            let piece = slots[number].as_mut().expect("a piece under way");
            piece.complete(&mut Tools { io: &mut ring, arena: &arena, waker: &waker }, number, completion);
        }
    }
}

const WAKE: Token = Token(u64::MAX);

/// The next bytes to compare, and whether both sides are known to be zeroes there.
fn next(disks: &[Arc<Disk>; 2], at: u64, size: u64) -> Result<(ByteRange, bool)> {
    let mut range = ByteRange { start: at, end: size };
    let mut zeroes = true;
    for disk in disks.iter().filter(|disk| at < disk.size()) {
        let (found, source) = disk.chain().map(at, size - at, Look::Holes)?;
        zeroes &= source == Source::Zero;
        range.end = range.end.min(found.end);
    }
    if zeroes { Ok((range, true)) } else { Ok((ByteRange { start: at, end: size }.prefix(PIECE), false)) }
}

/// Some bytes of both disks.
struct Piece {
    range: ByteRange,
    reads: [Side; 2],
}

enum Side {
    Reading(Box<Task>),
    Read(Buffer),
    /// Past this disk's end.
    Nothing,
}

impl Piece {
    fn new(disks: &[Arc<Disk>; 2], range: ByteRange) -> Self {
        let side = |disk: &Arc<Disk>| {
            let inside = range.intersect(ByteRange { start: 0, end: disk.size() });
            match inside.is_empty() {
                true => Side::Nothing,
                false => {
                    let buf = Buffer::alone(inside.len() as usize);
                    Side::Reading(Box::new(Task::read(Arc::clone(disk), inside, buf)))
                }
            }
        };
        Self { range, reads: disks.each_ref().map(side) }
    }

    /// True where both sides are read.
    fn step(&mut self, tools: &mut Tools<Remotes<Ring>>, number: usize) -> Result<bool> {
        let mut over = true;
        for (side, read) in self.reads.iter_mut().enumerate() {
            let Side::Reading(task) = read else { continue };
            if task.step(tools, base(number, side)) != Status::Done {
                over = false;
                continue;
            }
            let Side::Reading(task) = std::mem::replace(read, Side::Nothing) else { continue };
            let (outcome, buf) = task.end();
            outcome?;
            *read = buf.map_or(Side::Nothing, Side::Read);
        }
        Ok(over)
    }

    fn complete(&mut self, tools: &mut Tools<Remotes<Ring>>, number: usize, done: Completion) {
        let side = (done.token.0 / Task::TOKENS % 2) as usize;
        let Side::Reading(task) = &mut self.reads[side] else { unreachable!("this side reads") };
        task.complete(tools, base(number, side), done);
    }

    fn first_difference(&self) -> Option<u64> {
        let [first, second] = self.reads.each_ref().map(Side::bytes);
        let both = first.len().min(second.len());
        let differs = if first[..both] == second[..both] {
            let rest = if first.len() > both { &first[both..] } else { &second[both..] };
            (!is_zero(rest)).then(|| both + rest.iter().position(|byte| *byte != 0).unwrap_or(0))
        } else {
            first.iter().zip(second).position(|(a, b)| a != b)
        };
        differs.map(|at| self.range.start + at as u64)
    }
}

impl Side {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Read(buf) => buf,
            Self::Reading(_) | Self::Nothing => &[],
        }
    }
}

fn base(number: usize, side: usize) -> Token {
    Token((number * 2 + side) as u64 * Task::TOKENS)
}
