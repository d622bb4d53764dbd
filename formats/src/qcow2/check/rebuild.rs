//! New refcounts in a new place, for an image whose own cannot be trusted.
//!
//! ```text
//!  the file as it is │ refcount table │ refcount blocks │
//! ```
//!
//! They come behind everything that the file has, not into what seems free: a journal may have notes of
//! clusters that no table in the file knows yet. Only what cannot grow, such as a device, gets them behind
//! the last cluster that anything uses. The old ones stay as they were until the header names the new
//! ones; from then on nothing counts them, and they are free.
use super::repair::Flush;
use super::survey::{PAST_MAX, Scope, Survey};
use super::uses::Uses;
use crate::error::{Context, Error, Result};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, REFTABLE_AT};
use crate::qcow2::refcounts::{Run, write_count};
use crate::qcow2::table;
use crate::storage::Storage;
use std::collections::BTreeSet;

/// What of the file as it is new refcounts must keep clear of, the old refcounts included.
pub struct Old {
    /// Nothing from this cluster on is used.
    pub end: u64,
    /// Clusters past the file's end that something points at: in a longer file they would be in use.
    pub past: Vec<Run>,
}

/// Makes refcounts for all that is used, the old ones left out.
pub fn rebuild(storage: &dyn Storage, header: &Header, flush: Flush<'_>, old: &Old) -> Result<()> {
    if old.past.len() >= PAST_MAX {
        return Err(Error::unsupported("too many entries point past the end of the file for new refcounts to be made"));
    }
    let (uses, layout) = make_room(storage, header, old)?;
    for (nth, index) in layout.blocks.iter().enumerate() {
        let at = layout.block_at(nth) << header.geometry.cluster_bits;
        let block = layout.block(header.geometry, &uses, *index);
        storage.write_at(at, &block).context(|| format!("writing new refcounts at {at}"))?;
    }
    let at = layout.start << header.geometry.cluster_bits;
    storage.write_at(at, &layout.table(header.geometry)).context(|| format!("writing a new refcount table at {at}"))?;
    flush()?;
    // Twelve bytes of one sector: the old place or the new one, never half of each.
    let mut field = at.to_be_bytes().to_vec();
    field.extend_from_slice(&(layout.table_clusters as u32).to_be_bytes());
    storage.write_at(REFTABLE_AT, &field).context(|| "writing the refcount table's place in the header")?;
    flush()
}

/// What is used, and where its refcounts will be: inside the file, which was made longer for them.
fn make_room(storage: &dyn Storage, header: &Header, old: &Old) -> Result<(Uses, Layout)> {
    let geometry = header.geometry;
    let len = || storage.len().context(|| "asking for the file's length");
    let mut start = len()?.div_ceil(geometry.cluster_size()).max(old.end);
    let mut can_grow = true;
    loop {
        // What pointed past the end may be inside by now.
        let uses = Survey::take(storage, header, Scope::WithoutRefcounts)?.uses;
        let layout = Layout::clear_of(&old.past, geometry, &uses, start)?;
        let needed = layout.end() << geometry.cluster_bits;
        if needed <= len()? {
            return Ok((uses, layout));
        }
        if !can_grow {
            return Err(Error::invalid(format!(
                "new refcounts need room up to {needed}, and what the image is in ends at {}: make it larger",
                len()?
            )));
        }
        start = layout.start;
        if storage.set_len(needed).is_err() {
            (start, can_grow) = (old.end, false);
        }
    }
}

/// Where the new ones are, in clusters.
struct Layout {
    start: u64,
    table_clusters: u64,
    /// Which blocks there are; they follow the table in this order.
    blocks: BTreeSet<u64>,
}

impl Layout {
    /// The first one from `start` on that has none of `past`.
    fn clear_of(past: &[Run], geometry: Geometry, uses: &Uses, mut start: u64) -> Result<Self> {
        loop {
            let layout = Self::new(geometry, uses, start)?;
            let met = past.iter().filter(|run| run.start < layout.end() && start < run.start + run.count);
            match met.map(|run| run.start + run.count).max() {
                None => return Ok(layout),
                Some(behind) => start = behind,
            }
        }
    }

    fn new(geometry: Geometry, uses: &Uses, start: u64) -> Result<Self> {
        let per_block = 1 << geometry.block_bits();
        let in_use = |index: &u64| !uses.none_in(index * per_block..(index + 1) * per_block);
        let used: BTreeSet<u64> = (0..uses.len().div_ceil(per_block)).filter(in_use).collect();
        let mut layout = Self { start, table_clusters: 1, blocks: used.clone() };
        // Blocks count themselves and their table, so their number is approached from below.
        loop {
            let own = start / per_block..=(layout.end() - 1) / per_block;
            let blocks: BTreeSet<u64> = used.iter().copied().chain(own).collect();
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table_clusters = (entries * 8).div_ceil(geometry.cluster_size());
            if table_clusters << geometry.cluster_bits > Geometry::REFTABLE_BYTES_MAX {
                return Err(Error::unsupported("new refcounts need a table above the limit of 8 MiB"));
            }
            if table_clusters <= layout.table_clusters && blocks.len() <= layout.blocks.len() {
                return Ok(layout);
            }
            layout.table_clusters = table_clusters.max(layout.table_clusters);
            layout.blocks = blocks;
        }
    }

    fn end(&self) -> u64 {
        self.block_at(self.blocks.len())
    }

    fn block_at(&self, nth: usize) -> u64 {
        self.start + self.table_clusters + nth as u64
    }

    /// The bytes of block `index`.
    fn block(&self, geometry: Geometry, uses: &Uses, index: u64) -> Vec<u8> {
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let first = index << geometry.block_bits();
        for nth in 0..1 << geometry.block_bits() {
            let cluster = first + nth;
            let own = u64::from((self.start..self.end()).contains(&cluster));
            let count = (uses.count(cluster) + own).min(geometry.refcount_max());
            if count > 0 {
                write_count(&mut bytes, geometry.refcount_order, nth as usize, count);
            }
        }
        bytes
    }

    /// The bytes of the table.
    fn table(&self, geometry: Geometry) -> Vec<u8> {
        let mut entries = vec![0; (self.table_clusters << geometry.cluster_bits) as usize / 8];
        for (nth, index) in self.blocks.iter().enumerate() {
            entries[*index as usize] = self.block_at(nth) << geometry.cluster_bits;
        }
        let mut bytes = Vec::with_capacity(entries.len() * 8);
        table::encode(entries, &mut bytes);
        bytes
    }
}
