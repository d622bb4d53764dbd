//! Reading back: a run of chunks is read from both sides; where they differ it is brought over, and read once more.
//!
//! ```text
//! claim ─► look ─► both read as zeroes by their mappings ────────────────┐
//!           └────► read the source ─► read the target ─► equal ──────────┤
//!                                              │                         │
//!                  flights, then marks ◄── they differ                   │
//!             no guest writes here: a mismatch │                         │
//!                                              ▼                         │
//!                             write ─► read the target ─► equal ─────────┤
//!                                              └─► a mismatch: later ────┴─► release
//! ```
//!
//! The orders are in `mirror/verification.rs`. The target's payload is read from its file, past the page cache where it
//! is open for direct I/O; where it lies there is asked of the mapping that the daemon has in memory.
use super::{Copier, Slot, Stage, Work, below_both};
use crate::chain::{Look, Source};
use crate::disk::{Task, Tools};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Io};
use crate::mirror::{Check, Mirror, Outcome};
use formats::error::Result;
use formats::range::ByteRange;
use std::sync::Arc;
use std::time::Duration;

/// A run that is being verified.
pub(super) struct Verify {
    check: Check,
    /// The target did not keep what it was given.
    unequal: bool,
    /// With a fault planted: whether marks were there when it began.
    was_marked: bool,
}

impl Verify {
    /// Lets go of what was verified, or could not be.
    pub fn finish(self, mirror: &Mirror, brought: bool, failed: bool) {
        let outcome = match (failed, self.unequal) {
            (true, _) => Outcome::Failed,
            (false, true) => Outcome::Unequal,
            (false, false) => Outcome::Equal,
        };
        mirror.put_verified(self.check, brought, outcome);
    }

    fn is_being_written(&self, mirror: &Mirror, range: ByteRange) -> bool {
        match planted(Fault::MarksBeforeFlights) {
            true => self.was_marked || mirror.planes.is_in_flight(range),
            false => mirror.is_being_written(range),
        }
    }
}

impl Copier {
    /// The next run to verify, if any is to be.
    pub(super) fn take_to_verify<I: Io>(&self, tools: &Tools<I>) -> std::result::Result<Option<Verify>, Duration> {
        let mirror = &self.mirror;
        // Where there is a limit, it is for what the target lacks first.
        let copies_first = mirror.rate.limit() > 0 && !mirror.dirty.is_clean();
        if !mirror.is_verifying() || mirror.is_held() || copies_first {
            return Ok(None);
        }
        mirror.may_copy(tools.io.now())?;
        let check = mirror.take_to_verify(self.run_len as u64);
        Ok(check.map(|check| {
            let was_marked = planted(Fault::MarksBeforeFlights) && mirror.dirty.is_marked(check.range);
            Verify { check, unequal: false, was_marked }
        }))
    }
}

impl Slot {
    pub(super) fn verify(verify: Verify) -> Self {
        let range = verify.check.range;
        Self::new(Work::Verify(verify), range, range.len())
    }

    /// Passes over what both sides read as zeroes or from the same layers below, and begins to read the rest.
    pub(super) fn look_to_verify<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>, rest: ByteRange) -> Result<()> {
        let (mut piece, is_known) = known_alike(mirror, rest)?;
        if is_known {
            self.at = piece.end;
            return Ok(());
        }
        while piece.end < rest.end {
            match known_alike(mirror, ByteRange { start: piece.end, end: rest.end })? {
                (_, true) => break,
                (more, false) => piece.end = more.end,
            }
        }
        self.read(mirror, tools, piece);
        Ok(())
    }

    /// True where both sides were read to be verified, and are equal. What differs otherwise than by a guest's write of
    /// just now is a mismatch.
    pub(super) fn is_equal(&self, mirror: &Mirror, bytes: &Buffer, there: &Buffer) -> bool {
        let Work::Verify(verify) = &self.work else { return false };
        let Some(at) = first_difference(bytes, there) else { return true };
        let piece = ByteRange { start: self.at, end: self.at + bytes.len() as u64 };
        if !verify.is_being_written(mirror, piece) {
            mirror.mismatch(&verify.check, self.at + at);
        }
        false
    }

    /// Reads back what was just brought over, where it is being verified.
    pub(super) fn read_back<I: Io>(&mut self, mirror: &Mirror, tools: &Tools<I>, bytes: Buffer) {
        if matches!(self.work, Work::Verify(_)) {
            let range = ByteRange { start: self.at - bytes.len() as u64, end: self.at };
            let buf = tools.arena.buffer(bytes.len());
            self.stage = Stage::Back(bytes, Task::read(Arc::clone(&mirror.target), range, buf));
        }
    }

    /// `there` is what the target has of the bytes that it was just given: no guest has to do with that.
    pub(super) fn hold_against(&mut self, mirror: &Mirror, bytes: &Buffer, there: &Buffer) {
        let Work::Verify(verify) = &mut self.work else { return };
        if let Some(at) = first_difference(bytes, there) {
            mirror.mismatch(&verify.check, self.at - bytes.len() as u64 + at);
            verify.unequal = true;
        }
    }
}

/// A prefix of `range`, and whether it is known without reading that both sides are equal there: zeroes by both their
/// mappings, or the same layers' below both.
fn known_alike(mirror: &Mirror, range: ByteRange) -> Result<(ByteRange, bool)> {
    if let Some(below) = below_both(mirror, range)? {
        return Ok((below, true));
    }
    let (ours, source) = mirror.source.chain().map(range.start, range.len(), Look::Holes)?;
    let (theirs, target) = mirror.target.chain().map(range.start, ours.len(), Look::Holes)?;
    Ok((theirs, source == Source::Zero && target == Source::Zero))
}

fn first_difference(bytes: &[u8], there: &[u8]) -> Option<u64> {
    if bytes == there {
        return None;
    }
    bytes.iter().zip(there).position(|(ours, theirs)| ours != theirs).map(|at| at as u64)
}
