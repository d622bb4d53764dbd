//! The hashes of a disk, range by range, for a manifest: the disk is read from its files as a guest would read it.
use super::pool::pool;
use crate::chain::{Look, Source};
use crate::disk::{Disk, Status, Task, Tools};
use crate::io::remote::Remotes;
use crate::io::{Arena, Buffer, Completion, Io, Op, Ring, Token, Turn, Wait, Waker};
use formats::error::{Error, Result};
use formats::manifest::{Entry, Header};
use formats::range::ByteRange;
use std::collections::VecDeque;
use std::sync::Arc;

/// How much is read ahead of what is being hashed, in bytes; one range at least.
const AHEAD: u64 = 8 << 20;
const WAKE: Token = Token(u64::MAX);

/// Hashes `disk` in the ranges of `header`, in order; `found` is told of each.
pub fn hashes(disk: Disk, header: Header, mut found: impl FnMut(Entry) -> Result<()>) -> Result<()> {
    let disk = Arc::new(disk);
    let slots = (AHEAD / header.range_len).max(1);
    let failed = |error| Error::io("the ring", error);
    let arena = Arena::new((slots * header.range_len) as usize);
    let waker = Waker::new().map_err(failed)?;
    let ring = Ring::new(64, &arena).and_then(|ring| ring.helped_by(pool(), Turn::Copy));
    let mut ring = Remotes::new(ring.map_err(failed)?);
    let zeroes = blake3::hash(&vec![0; header.range_len as usize]);
    // The first is hashed next. Each has the tokens of its number.
    let mut ahead: VecDeque<(u64, ByteRange, Piece)> = VecDeque::new();
    let (mut at, mut number) = (0, 0);
    let mut done: Vec<Completion> = Vec::new();
    ring.submit(WAKE, Op::Wake { waker: waker.clone() });
    loop {
        while at < header.size && (ahead.len() as u64) < slots {
            let range = header.range(at);
            let piece = match range.len() == header.range_len && reads_as_zeroes(&disk, range)? {
                true => Piece::Zeroes,
                false => {
                    let len = range.len() as usize;
                    let buf = arena.buffer(len);
                    Piece::Reading(Box::new(Task::read(Arc::clone(&disk), range, buf)))
                }
            };
            ahead.push_back((number % slots, range, piece));
            (at, number) = (range.end, number + 1);
        }
        for (number, _, piece) in &mut ahead {
            if let Piece::Reading(task) = piece
                && task.step(&mut Tools { io: &mut ring, arena: &arena, waker: &waker }, base(*number)) == Status::Done
                && let Piece::Reading(task) = std::mem::replace(piece, Piece::Zeroes)
            {
                let (outcome, buf) = task.end();
                outcome?;
                *piece = Piece::Read(buf.ok_or_else(|| Error::invalid("a read without its buffer"))?);
            }
        }
        let before = ahead.len();
        while ahead.front().is_some_and(|(_, _, piece)| !matches!(piece, Piece::Reading(_))) {
            let Some((_, range, piece)) = ahead.pop_front() else { break };
            let hash = if let Piece::Read(bytes) = piece { blake3::hash(&bytes) } else { zeroes };
            found(Entry { at: range.start, hash: hash.into() })?;
        }
        if at >= header.size && ahead.is_empty() {
            return Ok(());
        }
        ring.reap(if ahead.len() < before { Wait::No } else { Wait::One }, &mut done).map_err(failed)?;
        for completion in done.drain(..) {
            if completion.token == WAKE {
                ring.submit(WAKE, Op::Wake { waker: waker.clone() });
                continue;
            }
            let number = completion.token.0 / Task::TOKENS;
            let reads = ahead.iter_mut().find_map(|(other, _, piece)| match piece {
                Piece::Reading(task) if *other == number => Some(task),
                _ => None,
            });
            let task = reads.expect("a range that is being read");
            task.complete(&mut Tools { io: &mut ring, arena: &arena, waker: &waker }, base(number), completion);
        }
    }
}

/// How far a range is.
enum Piece {
    Reading(Box<Task>),
    Read(Buffer),
    /// By its mapping.
    Zeroes,
}

fn base(number: u64) -> Token {
    Token(number * Task::TOKENS)
}

fn reads_as_zeroes(disk: &Disk, range: ByteRange) -> Result<bool> {
    let (found, source) = disk.chain().map(range.start, range.len(), Look::Holes)?;
    Ok(source == Source::Zero && found == range)
}
