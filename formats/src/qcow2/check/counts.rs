//! The refcounts as the file has them. A block that cannot be one counts nothing.
use super::{read_padded, read_table};
use crate::error::Result;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::Header;
use crate::qcow2::refcounts::read_count;
use crate::storage::Storage;

/// In front of a block's offset in the table: bits that nobody may set.
pub const BLOCK_RESERVED: u64 = 0x1ff;

/// The refcount table and what it leads to.
pub struct Counts<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    table: Vec<u64>,
}

impl<'a> Counts<'a> {
    /// Reads the table: at most 8 MiB.
    pub fn open(storage: &'a dyn Storage, header: &Header) -> Result<Self> {
        let bytes = u64::from(header.reftable_clusters) << header.geometry.cluster_bits;
        let table = read_table(storage, header.reftable_offset, (bytes / 8) as usize)?;
        Ok(Self { storage, geometry: header.geometry, table })
    }

    /// Where block `index` is, if there is one.
    pub fn block_at(&self, index: u64) -> Option<u64> {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied();
        entry
            .map(|entry| entry & !BLOCK_RESERVED)
            .filter(|at| *at != 0 && at & (self.geometry.cluster_size() - 1) == 0 && *at < 1 << 63)
    }

    /// Reads block `index` into `bytes`: zeroes where there is none.
    pub fn read_block(&self, index: u64, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.resize(self.geometry.cluster_size() as usize, 0);
        match self.block_at(index) {
            Some(at) => read_padded(self.storage, at, bytes),
            None => {
                bytes.fill(0);
                Ok(())
            }
        }
    }

    /// The refcount of one cluster.
    pub fn get(&self, cluster: u64) -> Result<u64> {
        let Some(block) = self.block_at(cluster >> self.geometry.block_bits()) else { return Ok(0) };
        let order = self.geometry.refcount_order;
        let index = cluster & ((1 << self.geometry.block_bits()) - 1);
        // Eight bytes hold at least one count of any width.
        let (word, in_word) = (index >> (6 - order), index & ((1 << (6 - order)) - 1));
        let mut bytes = [0; 8];
        read_padded(self.storage, block + word * 8, &mut bytes)?;
        Ok(read_count(&bytes, order, in_word as usize))
    }
}
