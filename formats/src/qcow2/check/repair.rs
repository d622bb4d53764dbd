//! Mends an image. The order must not change: after a power cut at any point the image is no worse.
//!
//! ```text
//! step                                        what the other order loses
//! 1 autoclear bits that nobody knows          what they vouch for was changed, and they say it was not
//!   flush
//! 2 empty entries let go of crooked places    counted down first, they share what is given out next
//! 3 refcounts go up, or new ones are made     named before they are durable, nothing is counted
//!   elsewhere; flush; the header names them
//!   flush
//! 4 refcounts go down                         (see 2)
//!   flush
//! 5 copied flags follow the counts            set by a count that is too low, guests write to what is shared
//!   flush
//! 6 a second check; if nothing is corrupt     cleared first, a half-mended image may be written
//!   the dirty and corrupt bits go
//!   flush
//! ```
//!
//! Lost is what QEMU gives up too: the crooked place of a cluster without payload, which nobody reads. An entry that
//! points past the file, or at no cluster's start, stays as it is.
use super::compare;
use super::counts::Counts;
use super::rebuild::{Old, rebuild};
use super::survey::{Scope, Survey};
use super::uses::{User, Uses};
use super::{Check, check};
use crate::error::{Context, Error, Result};
use crate::qcow2::entry::ZERO;
use crate::qcow2::header::{self, Header, autoclear, incompatible};
use crate::qcow2::read_header;
use crate::qcow2::refcounts::{read_count, write_count};
use crate::storage::Storage;

/// What is to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Space that nobody uses is given back; the rest is told only.
    Leaks,
    /// Everything that can be.
    All,
}

/// Makes durable what was written before, and waits for it.
pub type Flush<'a> = &'a dyn Fn() -> Result<()>;

/// Mends the image in `storage`, which nobody else uses meanwhile; says what is wrong after it, and how
/// much was mended.
///
/// # Errors
///
/// As for `check`; and where leaks alone are to be mended, but clusters in use count as free.
pub fn repair(storage: &dyn Storage, flush: Flush<'_>, what: Repair) -> Result<Check> {
    let header = read_header(storage)?;
    clear_unknown_autoclear(storage, &header, flush)?;
    let mut fixed = Check::default();
    if what == Repair::All {
        fixed.corruptions_fixed += straighten(storage, &header)?;
    }
    mend_counts(storage, &header, flush, what, &mut fixed)?;
    // A new refcount table is elsewhere.
    let header = read_header(storage)?;
    mend_flags(storage, &header, flush, what, &mut fixed)?;
    let after = check(storage)?;
    if after.corruptions == 0 {
        clear_bits(storage, &header, flush)?;
    }
    Ok(Check { corruptions_fixed: fixed.corruptions_fixed, leaks_fixed: fixed.leaks_fixed, ..after })
}

fn clear_unknown_autoclear(storage: &dyn Storage, header: &Header, flush: Flush<'_>) -> Result<()> {
    let known = header.autoclear & (autoclear::BITMAPS | autoclear::RAW_DATA_FILE);
    if known == header.autoclear {
        return Ok(());
    }
    let cleared = storage.write_at(header::AUTOCLEAR_AT, &known.to_be_bytes());
    cleared.context(|| "clearing unknown autoclear features in the header")?;
    flush()
}

/// Entries without payload whose place is no cluster's start get none; says how many did.
fn straighten(storage: &dyn Storage, header: &Header) -> Result<u64> {
    // The bitmap of an extended entry says by itself what reads as zeroes.
    let homeless = if header.geometry.extended_l2 { 0 } else { ZERO };
    let mut fixed = 0;
    loop {
        let survey = Survey::take(storage, header, Scope::Everything)?;
        let may = |at: &&u64| survey.uses.is_only(**at, 8, User::L2);
        let entries: Vec<u64> = survey.crooked.iter().filter(may).copied().collect();
        if entries.is_empty() {
            return Ok(fixed);
        }
        for at in &entries {
            storage.write_at(*at, &homeless.to_be_bytes()).context(|| format!("writing an entry at {at}"))?;
        }
        fixed += entries.len() as u64;
    }
}

fn mend_counts(
    storage: &dyn Storage,
    header: &Header,
    flush: Flush<'_>,
    what: Repair,
    fixed: &mut Check,
) -> Result<()> {
    let mut survey = Survey::take(storage, header, Scope::Everything)?;
    let counts = Counts::open(storage, header)?;
    let entries_wrong = survey.found.corruptions;
    let verdict = compare::counts(&mut survey, &counts)?;
    let broken = survey.refcounts_unusable;
    if what == Repair::Leaks && (broken || verdict.used_and_free) {
        return Err(Error::malformed(
            "clusters in use count as free, or the refcounts are broken: use `blkmirror check --repair all FILE`",
        ));
    }
    if broken || verdict.uncountable {
        fixed.leaks_fixed += survey.found.leaks;
        fixed.corruptions_fixed += survey.found.corruptions - entries_wrong;
        return rebuild(storage, header, flush, &Old { end: survey.uses.end(), past: survey.past });
    }
    let in_place = InPlace { storage, header, uses: &survey.uses, counts: &counts };
    if what == Repair::All {
        fixed.corruptions_fixed += in_place.write(Direction::Up)?;
        flush()?;
    }
    fixed.leaks_fixed += in_place.write(Direction::Down)?;
    flush()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// Refcounts that can be changed where they are.
struct InPlace<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    uses: &'a Uses,
    counts: &'a Counts<'a>,
}

impl InPlace<'_> {
    /// Brings the counts that are wrong in one direction to the uses; says how many.
    fn write(&self, direction: Direction) -> Result<u64> {
        let per_block = 1 << self.header.geometry.block_bits();
        let mut fixed = 0;
        for index in 0..self.uses.len().div_ceil(per_block) {
            let Some(at) = self.counts.block_at(index) else { continue };
            let mut block = Vec::new();
            self.counts.read_block(index, &mut block)?;
            let changed = self.change(&mut block, index * per_block, direction);
            if changed > 0 {
                self.storage.write_at(at, &block).context(|| format!("writing refcounts at {at}"))?;
            }
            fixed += changed;
        }
        Ok(fixed)
    }

    fn change(&self, block: &mut [u8], first: u64, direction: Direction) -> u64 {
        let geometry = self.header.geometry;
        let last = (first + (1 << geometry.block_bits())).min(self.uses.len());
        let mut changed = 0;
        for (index, cluster) in (first..last).enumerate() {
            let count = read_count(block, geometry.refcount_order, index);
            let used = self.uses.count(cluster).min(geometry.refcount_max());
            let wrong = if direction == Direction::Up { count < used } else { count > used };
            if wrong {
                write_count(block, geometry.refcount_order, index, used);
                changed += 1;
            }
        }
        changed
    }
}

/// Brings the copied flags to the counts; where leaks alone are mended, only if the counts are right.
fn mend_flags(storage: &dyn Storage, header: &Header, flush: Flush<'_>, what: Repair, fixed: &mut Check) -> Result<()> {
    let mut survey = Survey::take(storage, header, Scope::Everything)?;
    let counts = Counts::open(storage, header)?;
    compare::counts(&mut survey, &counts)?;
    if what == Repair::Leaks && !survey.found.is_clean() {
        return Ok(());
    }
    compare::flags(&mut survey, &counts, Some(storage))?;
    fixed.corruptions_fixed += survey.found.corruptions_fixed;
    flush()
}

/// Nothing is wrong any more, and the header says so.
fn clear_bits(storage: &dyn Storage, header: &Header, flush: Flush<'_>) -> Result<()> {
    let bits = header.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT);
    if bits == header.incompatible {
        return Ok(());
    }
    let cleared = storage.write_at(header::INCOMPATIBLE_AT, &bits.to_be_bytes());
    cleared.context(|| "clearing the dirty and corrupt bits in the header")?;
    flush()
}
