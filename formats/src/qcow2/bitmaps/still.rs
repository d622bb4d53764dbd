//! The bitmaps that no write changes: those that are disabled, and all of an image that is only read.
//!
//! What they have set is in the file, and stays there. So nothing of them is in memory until somebody asks: a
//! chain has layers whose bitmaps nobody looks at.
use super::bits::Bits;
use super::directory::{ALL_ONES, Bitmap, read, read_table};
use super::live::BITS_MAX;
use crate::error::{Context, Result};
use crate::qcow2::header::{Header, autoclear};
use crate::storage::Storage;
use std::sync::{Arc, OnceLock};

/// All of one image; where it is not said which, those of its directory, when somebody asks.
#[derive(Default)]
pub struct Still(OnceLock<Vec<One>>);

/// One of them.
pub struct One {
    /// Its entry of the directory.
    pub entry: Bitmap,
    bits: OnceLock<Arc<Bits>>,
}

impl Still {
    /// Those of `bitmaps` whose bits can be had, as far as there is memory for them.
    pub fn of<'a>(header: &Header, bitmaps: impl Iterator<Item = &'a Bitmap>) -> Self {
        let mut left = BITS_MAX;
        let fits = |bitmap: &&Bitmap| {
            let needed = Bits::len_bytes(header.geometry.size, bitmap.granularity_bits);
            let fits = bitmap.is_loadable(header) && needed <= left;
            left -= if fits { needed } else { 0 };
            fits
        };
        let all = bitmaps.filter(fits).map(|bitmap| One { entry: bitmap.clone(), bits: OnceLock::new() });
        Self::these(all.collect())
    }

    /// These and no others.
    pub fn these(all: Vec<One>) -> Self {
        Self(OnceLock::from(all))
    }

    /// All of them.
    pub fn all(&self, storage: &dyn Storage, header: &Header) -> Result<&[One]> {
        if let Some(all) = self.0.get() {
            return Ok(all);
        }
        let all = if header.autoclear & autoclear::BITMAPS == 0 { Vec::new() } else { read(storage, header)? };
        let Self(read) = Self::of(header, all.iter());
        Ok(self.0.get_or_init(|| read.into_inner().unwrap_or_default()))
    }
}

impl One {
    /// One whose bits are known.
    pub fn known(entry: Bitmap, bits: Arc<Bits>) -> Self {
        Self { entry, bits: OnceLock::from(bits) }
    }

    /// Its bits. The first who asks waits until they are read.
    pub fn bits(&self, storage: &dyn Storage, header: &Header) -> Result<Arc<Bits>> {
        if let Some(bits) = self.bits.get() {
            return Ok(Arc::clone(bits));
        }
        let (bits, _) = self.entry.load(storage, header)?;
        Ok(Arc::clone(self.bits.get_or_init(|| Arc::new(bits))))
    }
}

impl Bitmap {
    /// True where its bits can be read, and are those of the whole disk.
    pub(super) fn is_loadable(&self, header: &Header) -> bool {
        let bytes = Bits::len_bytes(header.geometry.size, self.granularity_bits);
        self.consistent && bytes.div_ceil(header.geometry.cluster_size()) == u64::from(self.table_entries)
    }

    /// Its bits and its table, as they are in the file.
    pub(super) fn load(&self, storage: &dyn Storage, header: &Header) -> Result<(Bits, Vec<u64>)> {
        let (size, cluster) = (header.geometry.size, header.geometry.cluster_size());
        let table = read_table(storage, header, self)?;
        let bits = Bits::new(size, self.granularity_bits);
        let len = Bits::len_bytes(size, self.granularity_bits);
        let mut bytes = vec![0; cluster as usize];
        for (at, entry) in (0..).step_by(cluster as usize).zip(&table) {
            let here = &mut bytes[..cluster.min(len - at) as usize];
            match *entry {
                0 => continue,
                ALL_ONES => here.fill(0xff),
                place => storage
                    .read_at(place, here)
                    .context(|| format!("bitmap {}: reading its bits at {place}", self.name))?,
            }
            bits.add_bytes(at, here);
        }
        Ok((bits, table))
    }
}
