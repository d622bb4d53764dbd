//! Uses and refcounts side by side, then the copied flags, which say of a refcount that it is one.
use super::Check;
use super::counts::Counts;
use super::entry::{Copied, Seen};
use super::read_table;
use super::survey::Survey;
use super::uses::{User, Uses};
use crate::error::{Context, Result};
use crate::qcow2::entry::{COPIED, OFFSET, Words};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::refcounts::read_count;
use crate::storage::Storage;

/// What a repair has to know besides the numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Something in use has the refcount 0: nothing may be allocated, nor even freed, before it is counted.
    pub used_and_free: bool,
    /// Something in use has no refcount block: it cannot be counted up where it is.
    pub uncountable: bool,
}

/// Compares uses with refcounts, cluster by cluster.
pub fn counts(survey: &mut Survey<'_>, counts: &Counts<'_>) -> Result<Verdict> {
    let geometry = survey.geometry();
    let mut verdict = Verdict::default();
    let mut block = Vec::new();
    let per_block = 1 << geometry.block_bits();
    for index in 0..survey.uses.len().div_ceil(per_block) {
        let clusters = index * per_block..((index + 1) * per_block).min(survey.uses.len());
        let countable = counts.block_at(index).is_some();
        if !countable && survey.uses.none_in(clusters.clone()) {
            continue;
        }
        counts.read_block(index, &mut block)?;
        for cluster in clusters.clone() {
            let count = read_count(&block, geometry.refcount_order, (cluster - clusters.start) as usize);
            compare(&mut survey.found, &survey.uses, geometry, cluster, count);
            survey.uses.set_counted_once(cluster, count == 1);
            let used = survey.uses.count(cluster) > 0;
            verdict.used_and_free |= used && count == 0;
            verdict.uncountable |= used && !countable;
        }
    }
    Ok(verdict)
}

fn compare(found: &mut Check, uses: &Uses, geometry: Geometry, cluster: u64, count: u64) {
    let used = uses.count(cluster);
    if used > 0 || count > 0 {
        found.image_end_offset = (cluster + 1) << geometry.cluster_bits;
    }
    let words = || format!("cluster {cluster} is counted {count} times and used {used} times");
    let max = geometry.refcount_max();
    if used > max {
        found.corrupt(used - max, || format!("{}: a refcount cannot say that", words()));
    }
    match count.cmp(&used.min(max)) {
        std::cmp::Ordering::Greater => found.leak(words),
        std::cmp::Ordering::Less => found.corrupt(1, words),
        // Counted right, and all the same a guest could write to it.
        std::cmp::Ordering::Equal if uses.overlaps(cluster) => {
            found.corrupt(1, || {
                format!(
                    "cluster {cluster} has a table and is used as something else besides: copy the disk to a new image"
                )
            });
        }
        std::cmp::Ordering::Equal => {}
    }
}

/// Checks the copied flags of the active tables against the refcounts. With `mend`, wrong ones are written
/// anew where that changes nothing else, and counted as fixed.
pub fn flags(survey: &mut Survey<'_>, counts: &Counts<'_>, mend: Option<&dyn Storage>) -> Result<()> {
    let header = survey.header;
    let l1_bytes = u64::from(header.l1_entries) * 8;
    let l1_mend = mend.filter(|_| survey.uses.is_only(header.l1_offset, l1_bytes, User::Alone));
    let l1 = std::mem::take(&mut survey.l1);
    for (index, raw) in (0..).zip(&l1) {
        let host = raw & OFFSET;
        let copied = match host {
            0 => Copied::Never,
            _ => Copied::CountedOnce(survey.geometry().host_cluster(host)),
        };
        if let Some(right) = mismatch(survey, counts, *raw, copied)? {
            let entry = Wrong { at: header.l1_offset + index * 8, raw: *raw, right, times: 1 };
            entry.settle(&mut survey.found, l1_mend, || format!("L1 table: entry {index}"))?;
        }
    }
    survey.l1 = l1;
    let tables = std::mem::take(&mut survey.tables);
    for (table, visits) in tables.iter().filter(|(_, visits)| visits.active > 0) {
        flags_of_table(survey, counts, *table, visits.active, mend)?;
    }
    survey.tables = tables;
    Ok(())
}

fn flags_of_table(
    survey: &mut Survey<'_>,
    counts: &Counts<'_>,
    table: u64,
    times: u64,
    mend: Option<&dyn Storage>,
) -> Result<()> {
    let geometry = survey.geometry();
    let aligned = table & (geometry.cluster_size() - 1) == 0;
    let mend = mend.filter(|_| aligned && survey.uses.is_only(table, geometry.cluster_size(), User::L2));
    let entries = read_table(survey.storage, table, geometry.cluster_size() as usize / 8)?;
    for index in 0..1 << geometry.l2_bits() {
        let words = Words::get(geometry, &entries, index as usize);
        let Some(copied) = Seen::new(geometry, words).copied else { continue };
        if let Some(right) = mismatch(survey, counts, words.descriptor, copied)? {
            let at = table + (index << geometry.l2_words_bits()) * 8;
            let entry = Wrong { at, raw: words.descriptor, right, times };
            entry.settle(&mut survey.found, mend, || format!("L2 table at {table}: entry {index}"))?;
        }
    }
    Ok(())
}

/// What the entry should be, where its flag is not what it has to be.
fn mismatch(survey: &Survey<'_>, counts: &Counts<'_>, raw: u64, copied: Copied) -> Result<Option<u64>> {
    let right = match copied {
        Copied::Never => false,
        Copied::Always => true,
        Copied::CountedOnce(cluster) => match survey.uses.is_counted_once(cluster) {
            Some(once) => once,
            None => counts.get(cluster)? == 1,
        },
    };
    Ok((right != (raw & COPIED != 0)).then_some(raw ^ COPIED))
}

/// An entry with a wrong flag.
struct Wrong {
    at: u64,
    raw: u64,
    right: u64,
    times: u64,
}

impl Wrong {
    fn settle(&self, found: &mut Check, mend: Option<&dyn Storage>, place: impl Fn() -> String) -> Result<()> {
        let Some(storage) = mend else {
            let says = if self.raw & COPIED != 0 {
                "is set, and its refcount is not 1"
            } else {
                "is not set, and its refcount is 1"
            };
            found.corrupt(self.times, || format!("{} is {:#018x}: the copied flag {says}", place(), self.raw));
            return Ok(());
        };
        let written = storage.write_at(self.at, &self.right.to_be_bytes());
        written.context(|| format!("writing the copied flag of {} at {}", place(), self.at))?;
        found.corruptions_fixed += 1;
        Ok(())
    }
}
