//! The bitmaps that writes set, from the opening of an image to its close.
//!
//! ```text
//! open    bits read ─► marked as in use ─► flush ─► the guest's first write
//! close   bits written ─► flush ─► tables written ─► flush ─► in use no more ─► flush
//! ```
//!
//! Marked as in use after the first write, a power cut between the two would leave a bitmap that
//! looks right and lacks that write. What is killed stays in use, which says that it is inconsistent.
//! A bitmap that is disabled is no write's business: it stays as it is in the file.
//!
//! A write sets its bits when it gets its place. It may do so before its payload is there, for nobody
//! looks at the bits before all writes have ended, and what fails halfway is marked too.
use super::bits::Bits;
use super::directory::{ALL_ONES, Bitmap, FLAGS_AT, IN_USE, read, read_table};
use crate::error::{Context, Error, Result};
use crate::qcow2::header::{Header, autoclear};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory for the bits of one image, in bytes: at 64 KiB a bit they reach 32 TiB of disk. A bitmap that does
/// not fit is left in use.
const BITS_MAX: u64 = 64 << 20;

/// One bitmap whose bits are in memory.
pub struct Tracked {
    /// The bits.
    pub bits: Arc<Bits>,
    /// Its entry of the directory, as it was before it was in use.
    pub entry: Bitmap,
    /// Its table in the file.
    pub table: Vec<u64>,
}

/// All of one image.
pub struct Live {
    storage: Arc<dyn Storage>,
    /// Nothing but this is looked at on a write where there are none.
    bits: Vec<Arc<Bits>>,
    tracked: Mutex<Vec<Tracked>>,
    /// A bit was set since the opening.
    marked: AtomicBool,
}

impl Live {
    /// Takes in the bitmaps that writes set. True where some are in use now, so that the file has to be
    /// flushed before anything is written.
    pub fn open(storage: Arc<dyn Storage>, header: &Header) -> Result<(Self, bool)> {
        let mut tracked = Vec::new();
        let all = if header.autoclear & autoclear::BITMAPS == 0 { Vec::new() } else { read(&*storage, header)? };
        let changing = || all.iter().filter(|bitmap| bitmap.auto && !bitmap.in_use);
        let mut left = BITS_MAX;
        for bitmap in changing().filter(|bitmap| bitmap.consistent) {
            let needed = Bits::len_bytes(header.geometry.size, bitmap.granularity_bits);
            let clusters = needed.div_ceil(header.geometry.cluster_size());
            if needed <= left && clusters == u64::from(bitmap.table_entries) {
                tracked.push(Tracked::load(&*storage, header, bitmap)?);
                left -= needed;
            }
        }
        for bitmap in changing() {
            bitmap.write_flags(&*storage, bitmap.flags | IN_USE)?;
        }
        let bits = tracked.iter().map(|one| Arc::clone(&one.bits)).collect();
        let live = Self { storage, bits, tracked: Mutex::new(tracked), marked: AtomicBool::new(false) };
        Ok((live, changing().next().is_some()))
    }

    /// None: for an image that is read only.
    pub fn none(storage: Arc<dyn Storage>) -> Self {
        Self { storage, bits: Vec::new(), tracked: Mutex::default(), marked: AtomicBool::new(false) }
    }

    /// Guest bytes are being changed.
    pub fn mark(&self, guest: ByteRange) {
        if self.bits.is_empty() {
            return;
        }
        if !self.marked.load(Ordering::Relaxed) {
            self.marked.store(true, Ordering::Relaxed);
        }
        self.bits.iter().for_each(|bits| bits.set(guest));
    }

    /// What is to be stored, and whether its bits have changed. For the image's close.
    pub fn take(&self) -> (Vec<Tracked>, bool) {
        (std::mem::take(&mut *self.tracked()), self.marked.load(Ordering::Relaxed))
    }

    fn tracked(&self) -> MutexGuard<'_, Vec<Tracked>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Live {
    /// An image that nobody wrote to and nobody closed, as after a start that failed elsewhere, gives its
    /// bitmaps back as they were.
    fn drop(&mut self) {
        let (tracked, marked) = self.take();
        for one in tracked.iter().filter(|_| !marked) {
            // In use for good where that fails; nobody is there to hear of it.
            let _ = one.entry.write_flags(&*self.storage, one.entry.flags);
        }
    }
}

impl Tracked {
    fn load(storage: &dyn Storage, header: &Header, bitmap: &Bitmap) -> Result<Self> {
        let (size, cluster) = (header.geometry.size, header.geometry.cluster_size());
        let table = read_table(storage, header, bitmap)?;
        let bits = Bits::new(size, bitmap.granularity_bits);
        let len = Bits::len_bytes(size, bitmap.granularity_bits);
        let mut bytes = vec![0; cluster as usize];
        for (at, entry) in (0..).step_by(cluster as usize).zip(&table) {
            let here = &mut bytes[..cluster.min(len - at) as usize];
            match *entry {
                0 => continue,
                ALL_ONES => here.fill(0xff),
                place => storage
                    .read_at(place, here)
                    .context(|| format!("bitmap {}: reading its bits at {place}", bitmap.name))?,
            }
            bits.add_bytes(at, here);
        }
        Ok(Self { bits: Arc::new(bits), entry: bitmap.clone(), table })
    }
}

impl Bitmap {
    /// Changes the flags in the file: four bytes of one sector, the old ones or the new.
    pub(super) fn write_flags(&self, storage: &dyn Storage, flags: u32) -> Result<()> {
        let written = storage.write_at(self.entry_offset + FLAGS_AT, &flags.to_be_bytes());
        written.map_err(|error| Error::io(format!("bitmap {}: changing its flags", self.name), error))
    }
}
