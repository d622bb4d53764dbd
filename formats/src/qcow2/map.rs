//! Where guest bytes are now.
use super::Shared;
use super::entry::{Entry, Standard};
use crate::error::Result;
use crate::image::{Extent, Place};
use crate::range::ByteRange;

impl Shared {
    /// The run that starts at `at`: all subclusters of one kind, in the file one after the other, as
    /// far as the tables in memory tell.
    pub(super) fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        let guest = ByteRange { start: at, end: at.saturating_add(len_max).min(self.geometry().size).max(at) };
        self.check_inside(guest)?;
        let g = self.geometry();
        let cluster = at >> g.cluster_bits;
        let skip = at & (g.cluster_size() - 1);
        let state = self.lock_with(cluster)?;
        let Standard { host, data, zero } = match state.entry(cluster)? {
            Entry::Standard(standard) => standard,
            Entry::Compressed { host, len } => {
                // Neither number exceeds 2 MiB.
                let place = Place::Compressed { host, len, skip: skip as u32, inflated: g.cluster_size() as u32 };
                return Ok(Extent { guest: guest.prefix(g.cluster_size() - skip), place });
            }
        };
        let here = 1 << (skip >> g.subcluster_bits());
        let (place, len) = match host {
            Some((host, _)) if data & here != 0 => {
                let next = |nth, entry| match entry {
                    Entry::Standard(Standard { host: Some((at, _)), data, .. })
                        if at == host + (nth << g.cluster_bits) =>
                    {
                        data
                    }
                    _ => 0,
                };
                (Place::Data { host: host + skip }, state.run(guest, next)?)
            }
            _ if zero & here != 0 => (Place::Zero, state.run(guest, |_, entry| entry.standard().zero)?),
            _ => {
                let absent = |_, entry| match entry {
                    Entry::Standard(standard) => standard.absent(g),
                    Entry::Compressed { .. } => 0,
                };
                (Place::Absent, state.run(guest, absent)?)
            }
        };
        Ok(Extent { guest: guest.prefix(len), place })
    }
}
