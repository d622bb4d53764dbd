//! Finds what is wrong with an image, and mends it: leaks waste space, corruptions lose data.
//!
//! ```text
//! survey     walks every table there is and counts what uses each cluster
//!   entry      what one entry of a table uses, and what is wrong with it
//!   uses       how often each cluster is used, and as what
//! counts     the refcounts as the file has them, however broken they are
//! compare    uses and refcounts side by side, then the copied flags
//! repair     mends, in an order that a power cut survives
//!   rebuild    refcounts in a new place
//! ```
//!
//! The numbers are those of `qemu-img check`, and so is what a repair gives up: nothing but the place of
//! clusters without payload that is no cluster's start. On purpose it is otherwise here:
//!
//! - a table that is used as anything else besides is a corruption even where it is counted right: guests
//!   could write to it. QEMU counts it up and calls it clean;
//! - a zero flag in version 2 or in an extended entry, and a copied flag without an offset, are corruptions:
//!   nobody may write them;
//! - so is an offset in an external data file that is not the guest's own;
//! - what a compressed cluster with a bitmap points at counts as used: guests read it;
//! - a refcount block at no cluster's start is one corruption, which a repair mends; QEMU gives up;
//! - a snapshot table or a bitmap directory that cannot be read ends the check, before what they use is
//!   taken for leaks.
//!
//! Memory: four bytes for each cluster of the file that is used and for its neighbours in a run of 256 (64 MiB for
//! 1 TiB in clusters of 64 KiB; never more than 1 GiB, nor than 1 KiB an entry), 8 bytes for each such run,
//! some 50 bytes an L2 table (at most 2^24 of them), and one table at a time. Refcounts of what nobody uses take
//! none. Time: each L2 table is read once, however many snapshots share it; tables that overlap beyond measure
//! are refused.
mod compare;
mod counts;
mod entry;
mod rebuild;
mod repair;
mod survey;
mod uses;

pub use repair::{Flush, Repair, repair};

use super::read_header;
use crate::error::{Context, Result};
use crate::storage::Storage;
use counts::Counts;
use survey::{Scope, Survey};

/// Problems that are told in words; the others are counted.
const PROBLEMS_MAX: usize = 100;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// Clusters that are counted less often than they are used, and entries that are wrong.
    pub corruptions: u64,
    /// Leaks that a repair mended; they are in `leaks` no more.
    pub leaks_fixed: u64,
    /// Corruptions that a repair mended; they are in `corruptions` no more.
    pub corruptions_fixed: u64,
    /// The first of what is still wrong, in words: leaks begin with `leak:`.
    pub problems: Vec<String>,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters that have a place of their own.
    pub allocated_clusters: u64,
    /// Those of them that do not follow the one before in the file; compressed ones never do.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
}

/// Checks the image in `storage`, which nobody writes to meanwhile.
///
/// # Errors
///
/// Where the image cannot be walked: its header, snapshot table or bitmap directory is wrong, it is too
/// large, or the system failed.
pub fn check(storage: &dyn Storage) -> Result<Check> {
    let header = read_header(storage)?;
    let mut survey = Survey::take(storage, &header, Scope::Everything)?;
    let counts = Counts::open(storage, &header)?;
    compare::counts(&mut survey, &counts)?;
    compare::flags(&mut survey, &counts, None)?;
    Ok(survey.found)
}

impl Check {
    /// True where nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    fn corrupt(&mut self, times: u64, words: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.tell(words);
    }

    fn leak(&mut self, words: impl FnOnce() -> String) {
        self.leaks += 1;
        self.tell(|| format!("leak: {}", words()));
    }

    fn tell(&mut self, words: impl FnOnce() -> String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(words());
        }
    }
}

/// Fills `bytes` from `at`; zeroes past the end of the file.
fn read_padded(storage: &dyn Storage, at: u64, bytes: &mut [u8]) -> Result<()> {
    let len = storage.len().context(|| "asking for the file's length")?;
    let inside = usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX).min(bytes.len());
    let (there, past) = bytes.split_at_mut(inside);
    past.fill(0);
    match inside {
        0 => Ok(()),
        _ => storage.read_at(at, there).context(|| format!("reading {inside} bytes at {at}")),
    }
}

/// Reads `count` entries of a table; zeroes past the end of the file.
fn read_table(storage: &dyn Storage, at: u64, count: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    read_padded(storage, at, &mut bytes)?;
    Ok(super::table::decode(&bytes))
}
