//! A disk of gigabytes on a file of megabytes: what is written is kept in windows that lie on each other.
use formats::error::Result;
use formats::image::{Extent, Image, Place, Progress as Stage, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::range::ByteRange;
use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 4096;
/// Bytes of the file: twice what one request may write.
pub const WINDOW: u64 = 64 << 20;

/// An image whose pages are holes until they are written. No two of them may be in one place of the file.
pub struct Vast {
    size: u64,
    data: Mutex<BTreeSet<u64>>,
}

impl Vast {
    /// Of `size` bytes, all of it a hole.
    pub fn new(size: u64) -> Self {
        Self { size, data: Mutex::default() }
    }

    fn data(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of `range` is in one window.
    fn in_window(range: ByteRange) -> ByteRange {
        ByteRange { start: range.start, end: range.end.min((range.start / WINDOW + 1) * WINDOW) }
    }
}

impl Image for Vast {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        let (data, page) = (self.data(), at / PAGE);
        let asked = ByteRange { start: at, end: self.size.min(at.saturating_add(len_max)) };
        if !data.contains(&page) {
            let next = data.range((Excluded(page), Unbounded)).next();
            let end = next.map_or(asked.end, |next| asked.end.min(next * PAGE));
            return Ok(Extent { guest: ByteRange { start: at, end }, place: Place::Zero });
        }
        let window = Self::in_window(asked);
        let end = (page..window.end.div_ceil(PAGE)).find(|page| !data.contains(page));
        let guest = ByteRange { start: at, end: end.map_or(window.end, |page| page * PAGE) };
        Ok(Extent { guest, place: Place::Data { host: at % WINDOW } })
    }

    fn reserve(&self, guest: ByteRange) -> Result<Reserve> {
        let (data, guest) = (self.data(), Self::in_window(guest));
        let page = ByteRange { start: guest.start / PAGE * PAGE, end: guest.end.next_multiple_of(PAGE).min(self.size) };
        let around = [
            (guest.start / PAGE, ByteRange { start: page.start, end: guest.start }),
            ((guest.end - 1) / PAGE, ByteRange { start: guest.end, end: page.end }),
        ];
        let fill = around.map(|(page, rest)| (!rest.is_empty() && !data.contains(&page)).then_some(rest));
        let host = guest.start % WINDOW;
        Ok(Reserve::Room(Reservation { guest, host, fill, zeroed: false, hold: None }))
    }

    fn commit(&self, reservation: Reservation) -> Result<()> {
        let guest = reservation.guest;
        self.data().extend(guest.start / PAGE..guest.end.div_ceil(PAGE));
        Ok(())
    }

    /// Whole pages become holes; what is beside them is zeroed in its place.
    fn zero(&self, guest: ByteRange, _: Zeroing) -> Result<Zeroed> {
        let whole = ByteRange { start: guest.start.next_multiple_of(PAGE), end: guest.end / PAGE * PAGE };
        let part = match () {
            () if guest.start < whole.start => ByteRange { end: whole.start.min(guest.end), ..guest },
            () if whole.start < whole.end => {
                let pages = whole.start / PAGE..whole.end / PAGE;
                self.data().retain(|page| !pages.contains(page));
                return Ok(Zeroed::Done(whole));
            }
            () => guest,
        };
        match self.data().contains(&(part.start / PAGE)) {
            true => Ok(Zeroed::Host { guest: part, host: part.start % WINDOW }),
            false => Ok(Zeroed::Done(part)),
        }
    }

    fn settle(&self, progress: &mut Stage) -> Result<Settle> {
        progress.stage += 1;
        Ok(if progress.stage == 1 { Settle::Flush } else { Settle::Done })
    }
}
