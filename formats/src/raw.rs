//! Raw images: guest offset and file offset are the same number.
use crate::error::{Context, Error, Result};
use crate::image::{Description, Extent, Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A raw image.
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
}

impl Raw {
    /// A raw image of `size` bytes; the file may be longer.
    pub fn new(storage: Arc<dyn Storage>, size: u64) -> Self {
        Self { storage, size: AtomicU64::new(size) }
    }

    fn clip(&self, at: u64, len_max: u64) -> Result<ByteRange> {
        let len = len_max.min(self.size().saturating_sub(at));
        ByteRange::new(at, len)
            .filter(|guest| !guest.is_empty())
            .ok_or_else(|| Error::invalid(format!("byte {at} is past the disk ({} bytes)", self.size())))
    }
}

/// The first part of `guest`, whose bytes are in `storage` from `host` on: a hole, or data.
pub(crate) fn thin(storage: &dyn Storage, guest: ByteRange, host: u64) -> Result<Extent> {
    let data = storage.next_data(host).context(|| format!("looking for data from {host} on"))?;
    let data = data.unwrap_or(u64::MAX);
    if data > host {
        return Ok(Extent { guest: guest.prefix(data - host), place: Place::Zero });
    }
    let hole = storage.next_hole(host).context(|| format!("looking for a hole from {host} on"))?;
    // A file that was cut just now may answer with an end before `host`.
    let len = hole.saturating_sub(host).max(1);
    Ok(Extent { guest: guest.prefix(len), place: Place::Data { host } })
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        Ok(Extent { guest: self.clip(at, len_max)?, place: Place::Data { host: at } })
    }

    fn map_thin(&self, at: u64, len_max: u64) -> Result<Extent> {
        thin(&*self.storage, self.clip(at, len_max)?, at)
    }

    fn describe(&self, at: u64, len_max: u64) -> Result<Description> {
        // A hole in the file is a place too.
        self.map_thin(at, len_max).map(|extent| Description { host: Some(at), ..Description::from(extent) })
    }

    fn reserve(&self, guest: ByteRange) -> Result<Reserve> {
        Ok(Reserve::Room(Reservation { guest, host: guest.start, fill: [None, None], zeroed: false, hold: None }))
    }

    fn commit(&self, _: Reservation) -> Result<()> {
        Ok(())
    }

    fn zero(&self, guest: ByteRange, _: Zeroing) -> Result<Zeroed> {
        Ok(Zeroed::Host { guest, host: guest.start })
    }

    /// A device has what it has, also behind what was the disk's end: whoever enlarged it knows what that is.
    fn grow(&self, size: u64, _: u64, flush: &dyn Fn() -> Result<()>) -> Result<ByteRange> {
        let (old, len) = (self.size(), self.storage.len().context(|| "asking for the file's length")?);
        if len < size && self.storage.is_fixed() {
            return Err(Error::invalid(format!(
                "{size} bytes are wanted, and the block device has {len}: enlarge the device first"
            )));
        }
        if len < size {
            self.storage.set_len(size).context(|| format!("growing the file to {size} bytes"))?;
        }
        flush()?;
        self.size.store(size, Ordering::Relaxed);
        let stale = if self.storage.is_fixed() { old } else { len.clamp(old, size) };
        Ok(ByteRange { start: old, end: stale })
    }

    fn ungrow(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
        if !self.storage.is_fixed() {
            // Where that fails the file is longer, and what is more of it reads as zeroes.
            let _ = self.storage.set_len(size);
        }
    }

    fn settle(&self, progress: &mut Progress) -> Result<Settle> {
        progress.stage += 1;
        Ok(if progress.stage == 1 { Settle::Flush } else { Settle::Done })
    }
}
