//! Where guest bytes are now.
use super::Shared;
use super::entry::{COPIED, Entry};
use crate::error::Result;
use crate::image::{Extent, Place};
use crate::range::ByteRange;

impl Shared {
    /// The run that starts at `at`: all clusters of one kind, in the file one after the other, as
    /// far as the tables in memory tell.
    pub(super) fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        let guest = ByteRange { start: at, end: at.saturating_add(len_max).min(self.geometry.size).max(at) };
        self.check_inside(guest)?;
        let (geometry, bits) = (self.geometry, self.geometry.cluster_bits);
        let (first, skip) = (at >> bits, at & (geometry.cluster_size() - 1));
        let clusters = ((guest.end - 1) >> bits) - first + 1;
        let state = self.lock_with(first)?;
        let (place, count) = match state.entry(first)? {
            Entry::Absent => (Place::Absent, state.run(first, clusters, |_, raw| raw == 0)?),
            Entry::Zero { .. } => {
                let zero = |nth, raw| matches!(Entry::decode(geometry, first + nth, raw), Ok(Entry::Zero { .. }));
                (Place::Zero, state.run(first, clusters, zero)?)
            }
            Entry::Data { host, .. } => {
                let next = |nth, raw: u64| raw & !COPIED == host + (nth << bits);
                (Place::Data { host: host + skip }, state.run(first, clusters, next)?)
            }
            Entry::Compressed { host, len } => {
                // Neither number exceeds 2 MiB.
                let (skip, inflated) = (skip as u32, geometry.cluster_size() as u32);
                (Place::Compressed { host, len, skip, inflated }, 1)
            }
        };
        Ok(Extent { guest: guest.prefix((count << bits) - skip), place })
    }
}
