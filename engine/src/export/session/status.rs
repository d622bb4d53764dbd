//! What BLOCK_STATUS tells of a disk: holes, layers, bitmaps; and which zeroes a read need not send.
use super::reply::Run;
use crate::chain::{Chain, Look, Source};
use crate::export::gate::Route;
use formats::error::Result;
use formats::nbd::Context;
use formats::nbd::wire::state;
use formats::range::ByteRange;

/// Extents in one answer at most; the client asks again for the rest.
const EXTENTS_MAX: usize = 1024;
/// Looks at the map for one answer at most: neighbours alike are one extent, and time has a bound.
const LOOKS_MAX: usize = 4096;
/// Shorter holes are sent as the zeroes they are, in bytes.
const HOLE_MIN: u64 = 4096;
/// Runs in a read's answer at most; what follows is sent as data.
const RUNS_MAX: usize = 16;

/// One extent of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockExtent {
    /// Bytes; at least 1.
    pub len: u64,
    /// What the context says of them: see `wire::state` for `base:allocation`.
    pub state: u32,
}

/// What `context` says from `range.start` on, inside `range`: `one` extent, or some. At least one.
pub(super) fn extents(route: &Route, context: &Context, range: ByteRange, one: bool) -> Result<Vec<BlockExtent>> {
    let chain = route.disk.chain();
    match context {
        Context::Allocation => gather(range, one, |rest| {
            let (guest, source) = chain.map(rest.start, rest.len(), Look::Holes)?;
            Ok((guest, state_of(source)))
        }),
        Context::Depth => gather(range, one, |rest| {
            let (guest, depth) = chain.depth(rest.start, rest.len())?;
            Ok((guest, depth as u32))
        }),
        Context::Bitmap(name) => {
            let bitmap = route.bitmap(name)?;
            gather(range, one, |rest| {
                let (guest, marked) = bitmap.run(rest);
                Ok((guest, marked.into()))
            })
        }
    }
}

/// Extents of what `look` says of a prefix of the bytes it is given.
fn gather(
    range: ByteRange,
    one: bool,
    look: impl Fn(ByteRange) -> Result<(ByteRange, u32)>,
) -> Result<Vec<BlockExtent>> {
    let mut extents: Vec<BlockExtent> = Vec::new();
    let mut at = range.start;
    for _ in 0..LOOKS_MAX {
        if at == range.end {
            break;
        }
        let (guest, state) = look(ByteRange { start: at, end: range.end })?;
        at = guest.end;
        let len = guest.len();
        let count = extents.len();
        match extents.last_mut() {
            Some(last) if last.state == state => last.len += len,
            Some(_) if one || count == EXTENTS_MAX => break,
            _ => extents.push(BlockExtent { len, state }),
        }
    }
    Ok(extents)
}

/// Zeroes are reported as holes too: a write there may need space that is not there.
fn state_of(source: Source) -> u32 {
    match source {
        Source::Zero => state::HOLE | state::ZERO,
        Source::Data { .. } | Source::Compressed { .. } => 0,
    }
}

/// How `range` is best sent, by what the images say: one run where it is all alike.
///
/// A write that comes meanwhile is as much too late as if it came after the read.
pub(super) fn runs(chain: &Chain, range: ByteRange) -> Result<Runs> {
    let (guest, source) = chain.map(range.start, range.len(), Look::Images)?;
    if guest.end == range.end {
        return Ok(Runs::One { hole: source == Source::Zero });
    }
    let mut runs = Vec::new();
    add(&mut runs, guest, source == Source::Zero);
    let mut at = guest.end;
    while at < range.end && runs.len() < RUNS_MAX {
        let (guest, source) = chain.map(at, range.end - at, Look::Images)?;
        add(&mut runs, guest, source == Source::Zero);
        at = guest.end;
    }
    if at < range.end {
        add(&mut runs, ByteRange { start: at, end: range.end }, false);
    }
    match runs[..] {
        [Run { hole, .. }] => Ok(Runs::One { hole }),
        _ => Ok(Runs::Several(runs)),
    }
}

/// Whether a read is all alike.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Runs {
    /// It is.
    One {
        /// All of it is a hole.
        hole: bool,
    },
    /// It is not; in their order, without gaps.
    Several(Vec<Run>),
}

/// Adds a run, to the last one where it is like it. A hole that is too short to be told is data.
fn add(runs: &mut Vec<Run>, range: ByteRange, zero: bool) {
    let hole = zero && range.len() >= HOLE_MIN;
    match runs.last_mut() {
        Some(last) if last.hole == hole || (zero && last.hole) => last.range.end = range.end,
        _ => runs.push(Run { range, hole }),
    }
}
