//! Reference counts of host clusters: a table of blocks, of which slices are held in memory.
//!
//! What is in memory may go to the file at any time, in any order before the tables that need it:
//! a count is raised before anything points at its cluster, and lowered only after the entry that
//! let go of it is durable. A cut of the power finds counts that are too high at worst: leaks.
use super::geometry::Geometry;
use super::slices::Slices;
use super::table;
use crate::error::{Context, Error, Result};
use crate::storage::Storage;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Clusters of the file, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u64,
}

/// The refcounts of an image.
pub struct Refcounts {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    /// Offsets of the blocks, 0 where there is none.
    table: Vec<u64>,
    /// Where the table is.
    place: Run,
    /// The header does not name this place yet.
    moved: bool,
    /// Entries of the table that are not in the file yet.
    dirty: BTreeSet<usize>,
    slices: Slices<Box<[u8]>>,
}

/// What a settle brings of the refcounts, in this order.
pub struct FrozenRefcounts {
    /// Slices of blocks.
    pub slices: Vec<u64>,
    /// Entries of the table at `place`.
    pub entries: Vec<(usize, u64)>,
    /// The whole table where it has moved: it is written at `place`, then the header names it.
    pub table: Option<Vec<u64>>,
    /// Where the table was at the freeze.
    pub place: Run,
}

impl Refcounts {
    /// Reads the table at `place`.
    pub fn open(storage: Arc<dyn Storage>, geometry: Geometry, place: Run, slices_max: usize) -> Result<Self> {
        let at = place.start << geometry.cluster_bits;
        let entries = (place.count << geometry.cluster_bits) / 8;
        let table =
            table::read(&*storage, at, entries as usize).context(|| format!("reading the refcount table at {at}"))?;
        for (index, entry) in table.iter().enumerate() {
            if entry & (geometry.cluster_size() - 1) != 0 || *entry >= 1 << 56 {
                return Err(Error::malformed(format!(
                    "refcount table: entry {index} is {entry:#018x}: no cluster's start"
                )));
            }
        }
        let slices = Slices::new(slices_max);
        Ok(Self { storage, geometry, table, place, moved: false, dirty: BTreeSet::new(), slices })
    }

    /// Where the table is.
    pub fn place(&self) -> Run {
        self.place
    }

    /// How many host clusters the table could count.
    pub fn clusters_max(&self) -> u64 {
        (self.table.len() as u64) << self.geometry.block_bits()
    }

    /// True where there is a block for `cluster`.
    pub fn has_block(&self, cluster: u64) -> bool {
        self.block(cluster) != 0
    }

    /// Where the blocks are.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.table.iter().copied().filter(|at| *at != 0)
    }

    fn block(&self, cluster: u64) -> u64 {
        let index = usize::try_from(cluster >> self.geometry.block_bits()).unwrap_or(usize::MAX);
        self.table.get(index).copied().unwrap_or(0)
    }

    /// Where slice `key` of all blocks' slices is in the file.
    pub fn slice_at(&self, key: u64) -> u64 {
        let in_block = key & ((1 << self.geometry.slices_bits()) - 1);
        self.block(key << self.geometry.block_slice_bits()) + (in_block << self.geometry.slice_byte_bits())
    }

    /// The refcount of `cluster`: 0 where no block counts it.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        if !self.has_block(cluster) {
            return Ok(0);
        }
        let order = self.geometry.refcount_order;
        let at = self.in_slice(cluster);
        Ok(read_count(self.slice(cluster)?, order, at))
    }

    /// Changes the refcount of `cluster`, which has a block.
    pub fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        assert!(count <= self.geometry.refcount_max(), "a count that fits");
        let order = self.geometry.refcount_order;
        let at = self.in_slice(cluster);
        write_count(self.slice(cluster)?, order, at, count);
        self.slices.touch(cluster >> self.geometry.block_slice_bits());
        Ok(())
    }

    /// Gives all clusters of `run` the refcount `count`; they have blocks.
    pub fn fill(&mut self, run: Run, count: u64) -> Result<()> {
        let (bits, order) = (self.geometry.block_slice_bits(), self.geometry.refcount_order);
        let (mut at, end) = (run.start, run.start + run.count);
        while at < end {
            let slice_end = (((at >> bits) + 1) << bits).min(end);
            let first = self.in_slice(at);
            let slice = self.slice(at)?;
            for index in first..first + (slice_end - at) as usize {
                write_count(slice, order, index, count);
            }
            self.slices.touch(at >> bits);
            at = slice_end;
        }
        Ok(())
    }

    /// How many of the clusters from `cluster` on, to the end of their slice and `max` at most, have
    /// no reference; and whether the one behind them has none either, as far as was looked.
    pub fn free_run(&mut self, cluster: u64, max: u64) -> Result<(u64, bool)> {
        let bits = self.geometry.block_slice_bits();
        let end = (((cluster >> bits) + 1) << bits).min(cluster.saturating_add(max));
        if !self.has_block(cluster) {
            return Ok((end - cluster, true));
        }
        let order = self.geometry.refcount_order;
        let slice = self.slice(cluster)?;
        let mask = (1 << bits) - 1;
        let free = (cluster..end).take_while(|at| read_count(slice, order, (at & mask) as usize) == 0).count() as u64;
        Ok((free, cluster + free == end))
    }

    fn in_slice(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.geometry.block_slice_bits()) - 1)) as usize
    }

    fn slice(&mut self, cluster: u64) -> Result<&mut [u8]> {
        let key = cluster >> self.geometry.block_slice_bits();
        if !self.slices.has(key) {
            let at = self.slice_at(key);
            let mut bytes = vec![0; self.geometry.slice_bytes()].into_boxed_slice();
            self.storage.read_at(at, &mut bytes).context(|| format!("reading refcounts at {at}"))?;
            self.slices.insert(key, bytes);
        }
        let slot = self.slices.get_mut(key).expect("it was just put in");
        Ok(&mut slot.entries)
    }

    /// Takes the cluster at `host`, which reads as zeroes, as the block that counts `cluster`.
    pub fn add_block(&mut self, cluster: u64, host: u64) {
        let index = (cluster >> self.geometry.block_bits()) as usize;
        self.table[index] = host;
        self.dirty.insert(index);
    }

    /// Makes the table larger at another place; says where it was.
    pub fn move_table(&mut self, place: Run) -> Run {
        let entries = (place.count << self.geometry.cluster_bits) / 8;
        self.table.resize(entries as usize, 0);
        self.moved = true;
        std::mem::replace(&mut self.place, place)
    }

    /// True where nothing has to be written.
    pub fn is_clean(&self) -> bool {
        self.slices.is_clean() && self.dirty.is_empty() && !self.moved
    }

    /// True where a settle is due.
    pub fn is_full(&self) -> bool {
        self.slices.is_full()
    }

    /// Starts a settle.
    pub fn freeze(&mut self) -> FrozenRefcounts {
        let dirty = std::mem::take(&mut self.dirty);
        let moved = std::mem::take(&mut self.moved);
        FrozenRefcounts {
            slices: self.slices.freeze(),
            entries: if moved { Vec::new() } else { dirty.into_iter().map(|at| (at, self.table[at])).collect() },
            table: moved.then(|| self.table.clone()),
            place: self.place,
        }
    }

    /// Ends a settle. What `failed` is dirty again.
    pub fn thaw(&mut self, frozen: &FrozenRefcounts, failed: bool) {
        self.slices.thaw(&frozen.slices, failed);
        if failed {
            self.dirty.extend(frozen.entries.iter().map(|(at, _)| at));
            self.moved |= frozen.table.is_some();
        }
    }

    /// The bytes of a slice as they are now: they may be newer than the freeze, see above.
    pub fn bytes(&self, key: u64) -> &[u8] {
        &self.slices.get(key).expect("frozen slices stay").entries
    }
}

/// The count at `index`; below a byte, the first is in the lowest bits.
pub(super) fn read_count(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let (at, shift) = ((index << order) / 8, (index << order) % 8);
        return u64::from(bytes[at] >> shift) & ((1 << (1 << order)) - 1);
    }
    let width = 1 << (order - 3);
    let count = &bytes[index * width..][..width];
    count.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
}

pub(super) fn write_count(bytes: &mut [u8], order: u32, index: usize, count: u64) {
    if order < 3 {
        let (at, shift) = ((index << order) / 8, (index << order) % 8);
        let mask = ((1_u16 << (1 << order)) - 1) as u8;
        bytes[at] = bytes[at] & !(mask << shift) | (count as u8) << shift;
        return;
    }
    let width = 1 << (order - 3);
    bytes[index * width..][..width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::{read_count, write_count};

    #[test]
    fn counts_of_every_width() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1 << order));
            let mut bytes = [0; 64];
            let counts = (64 * 8) >> order;
            let count = |index: usize| (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max;
            for index in 0..counts {
                write_count(&mut bytes, order, index, max);
                write_count(&mut bytes, order, index, count(index));
            }
            for index in 0..counts {
                assert_eq!(read_count(&bytes, order, index), count(index), "order {order}, index {index}");
            }
        }
    }

    #[test]
    fn counts_lie_as_the_spec_says() {
        let mut bytes = [0; 8];
        write_count(&mut bytes, 0, 1, 1);
        write_count(&mut bytes, 2, 3, 0xa);
        write_count(&mut bytes, 4, 1, 0x1234);
        assert_eq!(bytes, [2, 0xa0, 0x12, 0x34, 0, 0, 0, 0]);
    }
}
