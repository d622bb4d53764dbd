//! The bitmaps that writes set, from the opening of an image to its close.
//!
//! ```text
//! open    bits read ─► marked as in use ─► flush ─► the guest's first write
//! close   bits written ─► flush ─► tables written ─► flush ─► in use no more ─► flush
//! ```
//!
//! Marked as in use after the first write, a power cut between the two would leave a bitmap that
//! looks right and lacks that write. What is killed stays in use, which says that it is inconsistent.
//! A bitmap that is disabled is no write's business: it stays as it is in the file, see `still`.
//!
//! A write sets its bits when it gets its place, before its payload is there. Who looks meanwhile finds them
//! set too early, never too late, and what fails halfway is marked too.
use super::adopt::Carried;
use super::bits::Bits;
use super::directory::{Bitmap, FLAGS_AT, IN_USE, read};
use super::still::{One, Still};
use crate::error::{Error, Result};
use crate::qcow2::header::{Header, autoclear};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Memory for the bits of one image that writes set, in bytes, and as much again for those that none sets: at
/// 64 KiB a bit they reach 32 TiB of disk. A bitmap that does not fit is left in use, or not shown.
pub(super) const BITS_MAX: u64 = 64 << 20;

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
    header: Header,
    /// Nothing but this is looked at on a write where there are none.
    bits: Vec<Arc<Bits>>,
    tracked: Mutex<Vec<Tracked>>,
    /// Those that no write changes.
    still: Still,
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
                let (bits, table) = bitmap.load(&*storage, header)?;
                tracked.push(Tracked { bits: Arc::new(bits), entry: bitmap.clone(), table });
                left -= needed;
            }
        }
        for bitmap in changing() {
            bitmap.write_flags(&*storage, bitmap.flags | IN_USE)?;
        }
        let in_use = changing().next().is_some();
        let disabled = all.iter().filter(|bitmap| !bitmap.auto);
        let still = Still::of(header, disabled);
        Ok((Self::new(storage, header.clone(), tracked, still), in_use))
    }

    /// None that a write would change: for an image that is read only.
    pub fn none(storage: Arc<dyn Storage>, header: &Header) -> Self {
        Self::new(storage, header.clone(), Vec::new(), Still::default())
    }

    fn new(storage: Arc<dyn Storage>, header: Header, tracked: Vec<Tracked>, still: Still) -> Self {
        let bits = tracked.iter().map(|one| Arc::clone(&one.bits)).collect();
        let (adopted, marked) = (OnceLock::new(), AtomicBool::new(false));
        Self { storage, header, bits, tracked: Mutex::new(tracked), still, adopted, marked }
    }

    /// Others come in their place, with the same entries; their bits are in the file as they are.
    pub(super) fn replace(&mut self, header: Header, tracked: Vec<Tracked>, still: Still, adopted: Vec<Carried>) {
        // The old ones are not given back: the new ones have their entries.
        self.take();
        *self = Self::new(Arc::clone(&self.storage), header, tracked, still);
        if !adopted.is_empty() {
            self.adopted = OnceLock::from(adopted);
        }
    }

    /// Names of those whose bits are known.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self.tracked().iter().map(|one| one.entry.name.clone()).collect();
        names.extend(self.still()?.iter().map(|one| one.entry.name.clone()));
        names.extend(self.adopted().iter().map(|one| one.name.clone()));
        Ok(names)
    }

    /// The bits of the one of this name, where they are known.
    pub fn bits(&self, name: &str) -> Result<Option<Arc<Bits>>> {
        let tracked = self.tracked().iter().find(|one| one.entry.name == name).map(|one| Arc::clone(&one.bits));
        let adopted = || self.adopted().iter().find(|one| one.name == name).map(|one| Arc::clone(&one.bits));
        if let Some(bits) = tracked.or_else(adopted) {
            return Ok(Some(bits));
        }
        let still = self.still()?.iter().find(|one| one.entry.name == name);
        still.map(|one| one.bits(&*self.storage, &self.header)).transpose()
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
    pub fn carry(&self) -> Result<Vec<Carried>> {
        let mut carried: Vec<Carried> = self.tracked().iter().map(|one| Carried::of(&one.entry, &one.bits)).collect();
        carried.extend(self.adopted().iter().map(|one| Carried { bits: Arc::new(one.bits.copy()), ..one.clone() }));
        for one in self.still()? {
            carried.push(Carried::of(&one.entry, &*one.bits(&*self.storage, &self.header)?));
        }
        Ok(carried)
    }

    /// Takes over bitmaps of another image with the same disk; those whose names are here already are
    /// left out.
    pub fn adopt(&self, mut carried: Vec<Carried>) -> Result<()> {
        let header = &self.header;
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

    /// Those that no write changes.
    pub(super) fn still(&self) -> Result<&[One]> {
        self.still.all(&*self.storage, &self.header)
    }

    pub(super) fn tracked(&self) -> MutexGuard<'_, Vec<Tracked>> {
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

impl Bitmap {
    /// Changes the flags in the file: four bytes of one sector, the old ones or the new.
    pub(super) fn write_flags(&self, storage: &dyn Storage, flags: u32) -> Result<()> {
        let written = storage.write_at(self.entry_offset + FLAGS_AT, &flags.to_be_bytes());
        written.map_err(|error| Error::io(format!("bitmap {}: changing its flags", self.name), error))
    }
}
