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
use super::adopt::Carried;
use super::bits::Bits;
use super::directory::{ALL_ONES, Bitmap, FLAGS_AT, IN_USE, read, read_table};
use crate::error::{Context, Error, Result};
use crate::qcow2::header::{Header, autoclear};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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
    /// Taken over from another image; in the file when this one is closed.
    adopted: OnceLock<Vec<Carried>>,
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
        for bitmap in changing() {
            let needed = Bits::len_bytes(header.geometry.size, bitmap.granularity_bits);
            if needed <= left && bitmap.is_loadable(header) {
                tracked.push(Tracked::load(&*storage, header, bitmap)?);
                left -= needed;
            }
        }
        for bitmap in changing() {
            bitmap.write_flags(&*storage, bitmap.flags | IN_USE)?;
        }
        let in_use = changing().next().is_some();
        Ok((Self::new(storage, tracked), in_use))
    }

    /// None: for an image that is read only.
    pub fn none(storage: Arc<dyn Storage>) -> Self {
        Self::new(storage, Vec::new())
    }

    fn new(storage: Arc<dyn Storage>, tracked: Vec<Tracked>) -> Self {
        let bits = tracked.iter().map(|one| Arc::clone(&one.bits)).collect();
        let (adopted, marked) = (OnceLock::new(), AtomicBool::new(false));
        Self { storage, bits, tracked: Mutex::new(tracked), adopted, marked }
    }

    /// Guest bytes are being changed.
    pub fn mark(&self, guest: ByteRange) {
        self.adopted().iter().filter(|one| one.auto).for_each(|one| one.bits.set(guest));
        if self.bits.is_empty() {
            return;
        }
        if !self.marked.load(Ordering::Relaxed) {
            self.marked.store(true, Ordering::Relaxed);
        }
        self.bits.iter().for_each(|bits| bits.set(guest));
    }

    /// The consistent bitmaps as they are now, for another image. Nobody writes meanwhile.
    pub fn carry(&self, header: &Header) -> Result<Vec<Carried>> {
        let mut carried: Vec<Carried> = self.tracked().iter().map(|one| Carried::of(&one.entry, &one.bits)).collect();
        carried.extend(self.adopted().iter().map(|one| Carried { bits: Arc::new(one.bits.copy()), ..one.clone() }));
        let all = if header.autoclear & autoclear::BITMAPS == 0 { Vec::new() } else { read(&*self.storage, header)? };
        let mut left = BITS_MAX;
        for bitmap in all.iter().filter(|bitmap| !bitmap.auto) {
            let needed = Bits::len_bytes(header.geometry.size, bitmap.granularity_bits);
            if bitmap.is_loadable(header) && needed <= left {
                left -= needed;
                carried.push(Carried::of(bitmap, &Tracked::load(&*self.storage, header, bitmap)?.bits));
            }
        }
        Ok(carried)
    }

    /// Takes over bitmaps of another image with the same disk; those whose names are here already are
    /// left out.
    pub fn adopt(&self, header: &Header, mut carried: Vec<Carried>) -> Result<()> {
        if header.geometry.version < 3 {
            return Err(Error::unsupported("an image of version 2 has no bitmaps: they are dropped"));
        }
        let all = if header.autoclear & autoclear::BITMAPS == 0 { Vec::new() } else { read(&*self.storage, header)? };
        carried.retain(|one| all.iter().all(|here| here.name != one.name));
        let adopted = self.adopted.set(carried);
        adopted.map_err(|_| Error::invalid("the image has taken over bitmaps before"))
    }

    /// What was taken over.
    pub fn adopted(&self) -> &[Carried] {
        self.adopted.get().map_or(&[], Vec::as_slice)
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
    /// True where its bits can be read, and are those of the whole disk.
    fn is_loadable(&self, header: &Header) -> bool {
        let bytes = Bits::len_bytes(header.geometry.size, self.granularity_bits);
        self.consistent && bytes.div_ceil(header.geometry.cluster_size()) == u64::from(self.table_entries)
    }

    /// Changes the flags in the file: four bytes of one sector, the old ones or the new.
    pub(super) fn write_flags(&self, storage: &dyn Storage, flags: u32) -> Result<()> {
        let written = storage.write_at(self.entry_offset + FLAGS_AT, &flags.to_be_bytes());
        written.map_err(|error| Error::io(format!("bitmap {}: changing its flags", self.name), error))
    }
}
