//! Marks what a job has to bring over at its start.
//!
//! Runs when tracking is on and every guest write that began before it has ended: a write to a place
//! that is not allocated yet, behind the walk, has to mark itself.
use crate::chain::{Look, Source};
use crate::fault::{Fault, planted};
use crate::mirror::Mirror;
use formats::error::Result;
use formats::range::ByteRange;

/// How far one look at the mapping goes at most, in bytes.
const LOOK_MAX: u64 = 1 << 30;

/// A walk over the source's mapping.
#[derive(Debug)]
pub struct Seeder {
    at: u64,
    /// From `at` on the target reads as zeroes but for what is marked or was copied: zeroes of the source need not
    /// be brought.
    target_is_zero: bool,
}

impl Seeder {
    /// A walk from the start of the disk.
    pub fn new(target_is_zero: bool) -> Self {
        Self::from(0, target_is_zero)
    }

    /// A walk that goes on where another one stopped.
    pub fn from(at: u64, target_is_zero: bool) -> Self {
        Self { at, target_is_zero }
    }

    /// Looks at up to `looks` runs. True where the walk is over.
    pub fn step(&mut self, mirror: &Mirror, looks: usize) -> Result<bool> {
        let size = mirror.source.size();
        for _ in 0..looks {
            if self.at >= size {
                return Ok(true);
            }
            let (range, wanted) = self.look(mirror, size)?;
            if planted(Fault::SeenBeforeMarks) {
                mirror.planes.seen(range.end);
            }
            if wanted {
                mirror.seed(range);
            }
            self.at = range.end;
            mirror.planes.seen(self.at);
        }
        Ok(self.at >= size)
    }

    /// Up to here it has looked, in bytes.
    pub fn seen(&self) -> u64 {
        self.at
    }

    fn look(&self, mirror: &Mirror, size: u64) -> Result<(ByteRange, bool)> {
        let chain = mirror.source.chain();
        if mirror.shallow {
            return chain.map_top(self.at, LOOK_MAX);
        }
        if !self.target_is_zero {
            return Ok((ByteRange { start: self.at, end: size }, true));
        }
        let (range, source) = chain.map(self.at, LOOK_MAX, Look::Holes)?;
        Ok((range, source != Source::Zero))
    }
}
