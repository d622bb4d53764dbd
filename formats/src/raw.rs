//! Raw images: guest offset and file offset are the same number.
use crate::error::{Context, Error, Result};
use crate::image::{Description, Extent, Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A raw image.
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    /// The runs of data that were found last: to look for a run's end takes the file system long, and copiers ask for
    /// it piece by piece, each where it is. What has become a hole since is data still, whose zeroes they see.
    data: Mutex<VecDeque<ByteRange>>,
}

/// How many runs are remembered.
const RUNS_MAX: usize = 8;

impl Raw {
    /// A raw image of `size` bytes; the file may be longer.
    pub fn new(storage: Arc<dyn Storage>, size: u64) -> Self {
        Self { storage, size: AtomicU64::new(size), data: Mutex::default() }
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

    fn size_by_itself(&self) -> Result<u64> {
        self.storage.len().context(|| "asking for the file's length")
    }

    fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        Ok(Extent { guest: self.clip(at, len_max)?, place: Place::Data { host: at } })
    }

    fn map_thin(&self, at: u64, len_max: u64) -> Result<Extent> {
        let guest = self.clip(at, len_max)?;
        let known = || self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known().iter().copied().find(|run| (run.start..run.end).contains(&at));
        if let Some(run) = found {
            return Ok(Extent { guest: guest.intersect(run), place: Place::Data { host: at } });
        }
        let extent = thin(&*self.storage, ByteRange { start: at, end: self.size() }, at)?;
        if extent.place != Place::Zero {
            let mut known = known();
            known.push_front(extent.guest);
            known.truncate(RUNS_MAX);
        }
        Ok(Extent { guest: guest.intersect(extent.guest), ..extent })
    }

    fn describe(&self, at: u64, len_max: u64) -> Result<Description> {
        // A hole in the file is a place too.
        thin(&*self.storage, self.clip(at, len_max)?, at)
            .map(|extent| Description { host: Some(at), ..Description::from(extent) })
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

#[cfg(test)]
mod tests {
    use super::Raw;
    use crate::image::{Image, Place};
    use crate::storage::Storage;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Data in the second of four mebibytes, or from a moment on nothing; and how often its end was looked for.
    #[derive(Default)]
    struct Striped {
        looks: AtomicU64,
        is_empty: AtomicU64,
    }

    impl Storage for Striped {
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            unreachable!("a raw image has no metadata")
        }

        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            unreachable!("a raw image has no metadata")
        }

        fn len(&self) -> io::Result<u64> {
            Ok(4 << 20)
        }

        fn set_len(&self, _: u64) -> io::Result<()> {
            unreachable!("nobody grows it")
        }

        fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
            let is_there = self.is_empty.load(Ordering::Relaxed) == 0 && at < 2 << 20;
            Ok(is_there.then(|| at.max(1 << 20)))
        }

        fn next_hole(&self, at: u64) -> io::Result<u64> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            Ok(if (1 << 20..2 << 20).contains(&at) { 2 << 20 } else { at })
        }
    }

    #[test]
    fn the_end_of_a_run_is_looked_for_once() {
        let storage = Arc::new(Striped::default());
        let raw = Raw::new(Arc::clone(&storage) as Arc<dyn Storage>, 4 << 20);
        let mut at = 0;
        while at < 4 << 20 {
            let extent = raw.map_thin(at, 96 << 10).expect("an answer");
            let is_data = (1 << 20..2 << 20).contains(&at);
            assert_eq!(extent.place, if is_data { Place::Data { host: at } } else { Place::Zero });
            assert_eq!(extent.guest.start, at);
            assert!(!extent.guest.is_empty() && extent.guest.len() <= 96 << 10);
            at = extent.guest.end;
        }
        assert_eq!(storage.looks.load(Ordering::Relaxed), 1);
        // What is told, and not copied, is what the file says now.
        storage.is_empty.store(1, Ordering::Relaxed);
        assert!(raw.describe(1 << 20, 4096).expect("an answer").zero);
        assert_eq!(raw.map_thin(1 << 20, 4096).expect("an answer").place, Place::Data { host: 1 << 20 });
    }
}
