//! Which bytes of a read were answered already.
//!
//! A server may answer in any order, but every byte once: where one came twice another could be missing,
//! and its place would keep what the buffer had before, perhaps another disk's bytes.
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// Runs that a reply may be in at once: what comes in order is one.
const RUNS_MAX: usize = 1024;

/// The answered part of a range.
#[derive(Debug)]
pub(super) struct Answered {
    range: ByteRange,
    /// Apart from each other and in order.
    runs: Vec<ByteRange>,
}

impl Answered {
    pub fn new(range: ByteRange) -> Self {
        Self { range, runs: Vec::new() }
    }

    /// `run` is answered.
    pub fn add(&mut self, run: ByteRange) -> Result<()> {
        let range = self.range;
        if run.is_empty() || run.start < range.start || run.end > range.end {
            return Err(Error::malformed(format!("a read of {range} is answered with {run}")));
        }
        let after = self.runs.partition_point(|other| other.end < run.start);
        let touches = self.runs[after..].iter().take_while(|other| other.start <= run.end).count();
        if self.runs[after..after + touches].iter().any(|other| other.overlaps(run)) {
            return Err(Error::malformed(format!("a read of {range} is answered twice at {run}")));
        }
        let joined = self.runs.drain(after..after + touches).fold(run, |joined, other| ByteRange {
            start: joined.start.min(other.start),
            end: joined.end.max(other.end),
        });
        self.runs.insert(after, joined);
        match self.runs.len() <= RUNS_MAX {
            true => Ok(()),
            false => Err(Error::malformed(format!("a read of {range} is answered in more than {RUNS_MAX} pieces"))),
        }
    }

    /// True where nothing is missing.
    pub fn is_whole(&self) -> bool {
        self.range.is_empty() || self.runs == [self.range]
    }
}
