//! A larger disk, in steps that a kill or a power cut may come between: what it leaves is the old size, with leaks at
//! worst, or the new one.
//!
//! ```text
//! grow       a longer L1 table, counted and durable, where the old one is too short
//!              flush ── the header names it, and has the old size
//!              flush ── what the old one had is let go of, the disk in memory is larger; over a raw data file, all of it
//!            is there; the bits of its bitmaps are in new clusters, longer, and no directory names them
//! (caller)   what is new is made to read as zeroes: the rest of the last cluster, what the image below has there
//! keep_size    flush ── the header has the new size; where there are bitmaps, in the way of `bitmaps::grow`
//!              flush
//! ```
//!
//! What is in the tables for bytes behind the disk's end nobody sees: a growth that comes to nothing leaves it there.
use super::Shared;
use super::fault::{Fault, planted};
use super::geometry::Geometry;
use super::header::{AUTOCLEAR_AT, Header};
use super::read_header;
use super::refcounts::Run;
use super::snapshots;
use super::table;
use crate::error::{Context, Error, Result};
use crate::image::{Place, Reserve};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where the disk's size is in the header.
const SIZE_AT: u64 = 24;
/// Where the L1 table's entries (4 bytes) and offset (8 bytes) are: one sector has both.
const L1_AT: u64 = 36;

pub(super) type Flush<'a> = &'a dyn Fn() -> Result<()>;

impl Shared {
    /// Makes room for `size` bytes, more than there are, over an image of `below` bytes. Says which of the new ones have
    /// to be zeroed.
    pub(super) fn grow(
        this: &Arc<Self>,
        size: u64,
        below: u64,
        data: Option<&dyn Storage>,
        flush: Flush<'_>,
    ) -> Result<ByteRange> {
        this.check_writable()?;
        let (old, new) = (this.geometry(), this.geometry().with_size(size)?);
        let header = read_header(&*this.storage)?;
        this.refuse_growth(&header, new)?;
        if this.has_backing && below > old.size && new.version < 3 {
            return Err(Error::unsupported(format!(
                "the image below has {below} bytes, and an image of version 2 cannot hide what is behind its own {}: make \
                 it version 3 with `qemu-img amend -o compat=1.1`, while it is not served",
                old.size
            )));
        }
        if let Some(data) = data.filter(|data| data.len().is_ok_and(|len| len < size)) {
            data.set_len(size).context(|| format!("growing its data file to {size} bytes"))?;
        }
        Self::settle_with(this, flush)?;
        Self::lengthen_l1(this, &header, new, flush)?;
        this.set_size(size);
        let ready = Self::preallocate(this, ByteRange { start: old.size, end: size }, flush).and_then(|()| {
            Self::grow_bitmaps(this, &header, flush)?;
            if planted(Fault::SizeBeforeZeroes) {
                this.write_size(0, flush)?;
            }
            this.to_zero(old.size, below)
        });
        ready.inspect_err(|_| this.ungrow(old.size))
    }

    /// The header gets the size that the disk has in memory.
    pub(super) fn keep_size(this: &Arc<Self>, flush: Flush<'_>) -> Result<()> {
        Self::settle_with(this, flush)?;
        flush()?;
        let kept = match this.take_grown_bitmaps() {
            None => this.write_size(0, flush),
            Some(grown) => this.name_bitmaps(grown, flush),
        };
        kept.map_err(|error| this.doubt(error))
    }

    /// A growth comes to nothing.
    pub(super) fn ungrow(&self, size: u64) {
        self.set_size(size);
        if let Some(grown) = self.take_grown_bitmaps() {
            self.drop_bitmaps(grown);
        }
    }

    /// How large the disk is in memory.
    fn set_size(&self, size: u64) {
        let mut state = self.lock();
        self.size.store(size, Ordering::Relaxed);
        state.geometry.size = size;
    }

    /// The header gets the size and, in the same sector, these autoclear features.
    pub(super) fn write_size(&self, autoclear: u64, flush: Flush<'_>) -> Result<()> {
        const FEATURES: usize = (AUTOCLEAR_AT - SIZE_AT) as usize;
        let size = self.geometry().size.to_be_bytes();
        let doing = || "writing the size in the header";
        if autoclear == 0 {
            self.storage.write_at(SIZE_AT, &size).context(doing)?;
        } else {
            let mut bytes = [0; FEATURES + 8];
            self.storage.read_at(SIZE_AT, &mut bytes).context(doing)?;
            bytes[..8].copy_from_slice(&size);
            let features = u64::from_be_bytes(std::array::from_fn(|nth| bytes[FEATURES + nth]));
            bytes[FEATURES..].copy_from_slice(&(features | autoclear).to_be_bytes());
            self.storage.write_at(SIZE_AT, &bytes).context(doing)?;
        }
        flush()
    }

    /// Nobody knows what the header says: what is written from then on could go to clusters that the next one finds free.
    fn doubt(&self, error: Error) -> Error {
        _ = self.damage.set(format!("changing its size failed: {}", error.one_line()));
        error
    }

    fn refuse_growth(&self, header: &Header, new: Geometry) -> Result<()> {
        if let Some(data_file) = &header.data_file {
            data_file.check(new, false)?;
        }
        self.refuse_bitmaps(header, new.size)?;
        let all = snapshots::read(&*self.storage, header)?;
        match all.iter().find(|snapshot| new.version < 3 || !snapshot.has_disk_size) {
            None => Ok(()),
            Some(snapshot) => Err(Error::unsupported(format!(
                "its internal snapshot {:?} does not say how large the disk was: delete it with `qemu-img snapshot -d`, or \
                 make the image version 3 with `qemu-img amend -o compat=1.1`, while it is not served",
                snapshot.name
            ))),
        }
    }

    /// Sees to it that the L1 table has the entries that `new` needs.
    fn lengthen_l1(this: &Arc<Self>, header: &Header, new: Geometry, flush: Flush<'_>) -> Result<()> {
        let mut l1 = this.lock().l1().to_vec();
        if l1.len() as u64 >= new.l1_entries() {
            return Ok(());
        }
        // The file may have more of them than its disk needs.
        let more = (header.l1_entries as usize).saturating_sub(l1.len());
        let more = table::read(&*this.storage, header.l1_offset + l1.len() as u64 * 8, more)
            .context(|| format!("reading the L1 table at {}", header.l1_offset))?;
        l1.extend(more);
        if l1.len() as u64 >= new.l1_entries() {
            return this.lock().set_l1(header.l1_offset, l1);
        }
        l1.resize(new.l1_entries() as usize, 0);
        let cluster = new.cluster_size();
        let clusters = (l1.len() as u64 * 8).div_ceil(cluster);
        let run = this.lock().space()?.take_run(clusters)?;
        let at = run.start << new.cluster_bits;
        if let Err(error) = Self::write_l1(this, at, &l1, flush) {
            this.let_go_of(run);
            return Err(error);
        }
        this.name_l1(at, l1.len() as u32, flush).map_err(|error| this.doubt(error))?;
        let old_bytes = u64::from(header.l1_entries) * 8;
        let old = Run { start: new.host_cluster(header.l1_offset), count: old_bytes.div_ceil(cluster) };
        let mut state = this.lock();
        state.set_l1(at, l1)?;
        state.space()?.unprotect(old);
        drop(state);
        this.let_go_of(old);
        Ok(())
    }

    /// Writes the table to its new clusters, which are counted. Nothing points at them yet.
    fn write_l1(this: &Arc<Self>, at: u64, l1: &[u64], flush: Flush<'_>) -> Result<()> {
        let mut bytes = Vec::new();
        table::encode(l1.iter().copied(), &mut bytes);
        bytes.resize(bytes.len().next_multiple_of(this.geometry().cluster_size() as usize), 0);
        this.storage.write_at(at, &bytes).context(|| format!("writing the longer L1 table at {at}"))?;
        if planted(Fault::HeaderBeforeL1) {
            return Ok(());
        }
        Self::settle_with(this, flush)?;
        flush()
    }

    fn name_l1(&self, at: u64, entries: u32, flush: Flush<'_>) -> Result<()> {
        // The old place and length or the new ones, never half of each.
        let mut field = entries.to_be_bytes().to_vec();
        field.extend_from_slice(&at.to_be_bytes());
        self.storage.write_at(L1_AT, &field).context(|| "writing the L1 table's place in the header")?;
        flush()
    }

    /// A raw data file shows the bytes of a write that did not come to its end, and its image has to show the same: so it
    /// says of all clusters, from the start, that they are there.
    fn preallocate(this: &Arc<Self>, mut range: ByteRange, flush: Flush<'_>) -> Result<()> {
        while this.raw_data && !range.is_empty() {
            match Self::reserve(this, range)? {
                Reserve::Room(room) => {
                    range.start = room.guest.end;
                    this.commit(room)?;
                }
                Reserve::Settle => Self::settle_with(this, flush)?,
                Reserve::Busy => return Err(Error::invalid("somebody writes to the image while it grows")),
            }
        }
        Ok(())
    }

    pub(super) fn let_go_of(&self, run: Run) {
        let bits = self.geometry().cluster_bits;
        let places: Vec<u64> = (run.start..run.start + run.count).map(|cluster| cluster << bits).collect();
        self.lock().let_go(&places);
    }

    /// What of the bytes from `old` on, up to where the disk ends now, would read as something else than zeroes.
    fn to_zero(&self, old: u64, below: u64) -> Result<ByteRange> {
        let g = self.geometry();
        let range = ByteRange { start: old, end: g.size };
        if !self.has_backing {
            // What is not there takes no time.
            return Ok(range);
        }
        let rest = ByteRange { start: old, end: old.next_multiple_of(g.cluster_size()).min(g.size) };
        if below > old {
            return Ok(ByteRange { start: old, end: below.min(g.size).max(rest.end) });
        }
        // The rest of the last cluster has what was left there, if it has a place.
        match rest.is_empty() {
            true => Ok(rest),
            false => match self.map(old, rest.len())? {
                absent if absent.place == Place::Absent && absent.guest == rest => Ok(rest.prefix(0)),
                _ => Ok(rest),
            },
        }
    }
}
