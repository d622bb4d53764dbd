//! The bitmaps of a disk that grows: of what is new none of them has anything set, as in QEMU.
//!
//! ```text
//! grow       bits and tables of the larger disk, in new clusters
//!              flush ── nothing names them
//! keep_size  the autoclear bit is off                            │ none of them is right, whatever follows
//!              flush
//!            the entries of the directory name the new tables
//!              flush
//!            the disk's size and the autoclear bit, in one sector ◄── all of them are, and the disk is larger
//!              flush ── what the old tables had is let go of
//! ```
//!
//! A bitmap whose table is not as long as its disk needs makes QEMU refuse the image, so the two change at one instant:
//! a power cut before it leaves the old disk, and bitmaps that say of themselves that they are not right.
use super::adopt::Carried;
use super::bits::Bits;
use super::directory::{Bitmap, read, read_table};
use super::live::{BITS_MAX, Live, Tracked};
use super::still::{One, Still};
use crate::error::{Context, Error, Result};
use crate::qcow2::Shared;
use crate::qcow2::fault::{Fault, planted};
use crate::qcow2::grow::Flush;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::refcounts::Run;
use std::sync::{Arc, PoisonError};

/// All of an image whose disk grows.
pub struct Grown {
    /// The header of the larger disk.
    header: Header,
    tracked: Vec<Longer>,
    still: Vec<Longer>,
    adopted: Vec<Carried>,
}

/// One of them, in its new place.
struct Longer {
    bits: Arc<Bits>,
    /// With the new table.
    entry: Bitmap,
    table: Vec<u64>,
    /// What it had before.
    old: Bitmap,
    old_table: Vec<u64>,
}

impl Shared {
    /// Refuses what cannot be made as long as a disk of `size` bytes.
    pub(in crate::qcow2) fn refuse_bitmaps(&self, header: &Header, size: u64) -> Result<()> {
        let bitmaps = self.bitmaps();
        refuse_what_stays(&self.on_file(header)?, bitmaps.still()?)?;
        refuse_too_many(&bitmaps.carry()?, size)
    }

    /// Those that are vouched for.
    fn on_file(&self, header: &Header) -> Result<Vec<Bitmap>> {
        let is_vouched_for = header.autoclear & autoclear::BITMAPS != 0;
        if is_vouched_for { read(&*self.storage, header) } else { Ok(Vec::new()) }
    }

    /// Makes them of an image whose `header` has the old size, and whose disk has the new one in memory.
    pub(in crate::qcow2) fn grow_bitmaps(this: &Arc<Self>, header: &Header, flush: Flush<'_>) -> Result<()> {
        let bitmaps = this.bitmaps();
        if this.on_file(header)?.is_empty() && bitmaps.adopted().is_empty() {
            return Ok(());
        }
        let size = this.geometry().size;
        let longer = |one: &Carried| Carried { bits: Arc::new(one.bits.grown(size)), ..one.clone() };
        let mut grown = Grown {
            header: Header { geometry: this.geometry(), ..header.clone() },
            tracked: Vec::new(),
            still: Vec::new(),
            adopted: bitmaps.adopted().iter().map(longer).collect(),
        };
        let made = this.lengthen_all(&bitmaps, &mut grown, header);
        // Where that failed, what was made is let go of with the growth.
        *this.bitmaps_grown.lock().unwrap_or_else(PoisonError::into_inner) = Some(grown);
        made?;
        Self::settle_with(this, flush)?;
        flush()
    }

    /// Those of a growth that is kept or comes to nothing.
    pub(in crate::qcow2) fn take_grown_bitmaps(&self) -> Option<Grown> {
        self.bitmaps_grown.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Has the header name them, and the disk's size with them.
    pub(in crate::qcow2) fn name_bitmaps(&self, grown: Grown, flush: Flush<'_>) -> Result<()> {
        let mut vouched = 0;
        if grown.on_file().next().is_some() {
            vouched = autoclear::BITMAPS;
            if !planted(Fault::EntriesBeforeAutoclear) {
                self.write_autoclear(grown.header.autoclear & !vouched)?;
                flush()?;
            }
            grown.on_file().try_for_each(|one| one.name(self))?;
            flush()?;
        }
        self.write_size(vouched, flush)?;
        grown.on_file().try_for_each(|one| self.let_go_of_table(&one.old, &one.old_table))?;
        let Grown { header, tracked, still, adopted } = grown;
        let tracked = tracked.into_iter().map(|Longer { bits, entry, table, .. }| Tracked { bits, entry, table });
        let still = Still::these(still.into_iter().map(|one| One::known(one.entry, one.bits)).collect());
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        bitmaps.replace(header, tracked.collect(), still, adopted);
        Ok(())
    }

    /// Lets go of what nothing names.
    pub(in crate::qcow2) fn drop_bitmaps(&self, grown: Grown) {
        for one in grown.on_file() {
            // A leak at worst.
            _ = self.let_go_of_table(&one.entry, &one.table);
        }
    }

    fn lengthen_all(&self, bitmaps: &Live, grown: &mut Grown, header: &Header) -> Result<()> {
        for one in bitmaps.tracked().iter() {
            grown.tracked.push(self.lengthen(&one.entry, one.table.clone(), &one.bits)?);
        }
        for one in bitmaps.still()? {
            let table = read_table(&*self.storage, header, &one.entry)?;
            grown.still.push(self.lengthen(&one.entry, table, &*one.bits(&*self.storage, header)?)?);
        }
        Ok(())
    }

    fn lengthen(&self, old: &Bitmap, old_table: Vec<u64>, bits: &Bits) -> Result<Longer> {
        let bits = Arc::new(bits.grown(self.geometry().size));
        let (table_offset, table) = self.write_new(&old.name, old.granularity_bits, &bits)?;
        let entry = Bitmap { table_offset, table_entries: table.len() as u32, ..old.clone() };
        Ok(Longer { bits, entry, table, old: old.clone(), old_table })
    }

    /// A table, and the clusters of bits that it points at.
    fn let_go_of_table(&self, entry: &Bitmap, table: &[u64]) -> Result<()> {
        let cluster = self.geometry().cluster_size();
        let len = u64::from(entry.table_entries) * 8;
        let run = Run { start: self.geometry().host_cluster(entry.table_offset), count: len.div_ceil(cluster) };
        self.lock().space()?.unprotect(run);
        self.let_go_of(run);
        let bits: Vec<u64> = table.iter().copied().filter(|place| *place >= cluster).collect();
        self.lock().let_go(&bits);
        Ok(())
    }
}

impl Grown {
    fn on_file(&self) -> impl Iterator<Item = &Longer> {
        self.tracked.iter().chain(&self.still)
    }
}

impl Longer {
    /// Its entry of the directory names the new table.
    fn name(&self, image: &Shared) -> Result<()> {
        let mut field = self.entry.table_offset.to_be_bytes().to_vec();
        field.extend_from_slice(&self.entry.table_entries.to_be_bytes());
        let written = image.storage.write_at(self.entry.entry_offset, &field);
        written.context(|| format!("bitmap {}: writing its entry of the directory", self.entry.name))
    }
}

/// What says nothing may stay as it is; of what says something, and cannot be read, nobody could tell what it said.
fn refuse_what_stays(on_file: &[Bitmap], still: &[One]) -> Result<()> {
    let known = |bitmap: &Bitmap| bitmap.in_use || still.iter().any(|one| one.entry.name == bitmap.name);
    match on_file.iter().find(|bitmap| !known(bitmap)) {
        None => Ok(()),
        Some(bitmap) => Err(Error::unsupported(format!(
            "its bitmap {} is none that can be made longer: remove it with `qemu-img bitmap --remove FILE {}`, while the \
             image is not served",
            bitmap.name, bitmap.name
        ))),
    }
}

/// There is memory for so many bits, at the next opening too.
fn refuse_too_many(all: &[Carried], size: u64) -> Result<()> {
    let needed = |auto: bool| {
        let these = all.iter().filter(|one| one.auto == auto);
        these.fold(0_u64, |sum, one| sum.saturating_add(Bits::len_bytes(size, one.granularity_bits)))
    };
    match needed(true).max(needed(false)) {
        bytes if bytes <= BITS_MAX => Ok(()),
        bytes => Err(Error::unsupported(format!(
            "its bitmaps would have {bytes} bytes of bits for a disk of {size} bytes, and {BITS_MAX} are the most: \
             merge some into one of a larger granularity with `qemu-img bitmap --merge`, while the image is not served"
        ))),
    }
}
