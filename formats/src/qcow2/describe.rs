//! What `map` tells beyond where bytes are read from: places that are set aside under zeroes, and
//! holes under payload that was preallocated.
//!
//! Payload is looked at for holes only where the file takes clearly less space than its refcounts
//! say: elsewhere it costs two system calls a run and finds nothing. The threshold is QEMU's, so that
//! both tell the same of the same image.
use super::Shared;
use super::entry::Entry;
use super::geometry::Geometry;
use super::header::Header;
use super::refcounts::{Refcounts, Run};
use crate::error::{Context, Result};
use crate::image::{Description, Place};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::sync::Arc;

/// Slices of refcounts in memory while they are counted.
const SLICES_MAX: usize = 8;
/// Clusters of the file whose refcounts are looked at: more is a second's work and more than 4 TiB.
const LOOKS_MAX: u64 = 1 << 26;

impl Shared {
    /// The run that starts at `at`: all alike, in the file one after the other.
    pub(super) fn describe(&self, header: &Header, at: u64, len_max: u64) -> Result<Description> {
        let extent = self.map(at, len_max)?;
        match extent.place {
            Place::Zero => self.describe_zeroes(extent.guest),
            Place::Data { host } if self.is_preallocated(header)? => self.describe_payload(extent.guest, host),
            _ => Ok(extent.into()),
        }
    }

    /// The zeroes from `guest.start` on that have no place, or places one after the other.
    fn describe_zeroes(&self, guest: ByteRange) -> Result<Description> {
        let (geometry, bits) = (self.geometry, self.geometry.cluster_bits);
        let (first, skip) = (guest.start >> bits, guest.start & (geometry.cluster_size() - 1));
        let clusters = ((guest.end - 1) >> bits) - first + 1;
        let state = self.lock_with(first)?;
        let place = |entry| match entry {
            Entry::Zero { kept } => Some(kept.map(|(host, _)| host)),
            _ => None,
        };
        let start = place(state.entry(first)?).flatten();
        let next = |nth, raw| {
            let expected = start.map(|host| host + (nth << bits));
            Entry::decode(geometry, first + nth, raw).is_ok_and(|entry| place(entry) == Some(expected))
        };
        let count = state.run(first, clusters, next)?.max(1);
        let guest = guest.prefix((count << bits) - skip);
        let host = start.map(|host| host + skip);
        Ok(Description { guest, data: false, zero: true, compressed: false, host })
    }

    /// The payload from `guest.start` on that is in a hole of the file, or is not.
    fn describe_payload(&self, guest: ByteRange, host: u64) -> Result<Description> {
        let payload = Description { guest, data: true, zero: false, compressed: false, host: Some(host) };
        let data = self.storage.next_data(host).context(|| format!("looking for data from {host} on"))?;
        Ok(match data {
            None => Description { zero: true, ..payload },
            Some(data) if data > host => Description { guest: guest.prefix(data - host), zero: true, ..payload },
            Some(_) => {
                let hole = self.storage.next_hole(host).context(|| format!("looking for a hole from {host} on"))?;
                // A file that was cut just now may answer with an end before `host`.
                Description { guest: guest.prefix(hole.saturating_sub(host).max(1)), ..payload }
            }
        })
    }

    fn is_preallocated(&self, header: &Header) -> Result<bool> {
        if let Some(known) = self.preallocated.get() {
            return Ok(*known);
        }
        let found = counts_more_than_it_takes(&self.storage, header)?;
        Ok(*self.preallocated.get_or_init(|| found))
    }
}

/// True where the file takes clearly less space than that of the clusters which have references.
fn counts_more_than_it_takes(storage: &Arc<dyn Storage>, header: &Header) -> Result<bool> {
    let geometry: Geometry = header.geometry;
    let takes = storage.allocated().context(|| "asking for the file's space")? / geometry.cluster_size();
    let threshold = (takes.saturating_mul(10) / 9).max(takes + 2);
    let len = storage.len().context(|| "asking for the file's length")?;
    let clusters = len.div_ceil(geometry.cluster_size()).min(LOOKS_MAX);
    if clusters < threshold {
        return Ok(false);
    }
    let place =
        Run { start: geometry.host_cluster(header.reftable_offset), count: u64::from(header.reftable_clusters) };
    let mut refcounts = Refcounts::open(Arc::clone(storage), geometry, place, SLICES_MAX)?;
    let mut counted = 0;
    for cluster in 0..clusters {
        counted += u64::from(refcounts.get(cluster)? > 0);
        if counted >= threshold {
            return Ok(true);
        }
    }
    Ok(false)
}
