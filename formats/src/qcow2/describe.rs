//! What `map` tells beyond where bytes are read from: places that are set aside and not in use, and
//! holes under payload that was preallocated.
//!
//! Payload is looked at for holes only where the file takes clearly less space than its refcounts
//! say: elsewhere it costs two system calls a run and finds nothing. The threshold is QEMU's, so that
//! both tell the same of the same image.
use super::Shared;
use super::entry::{Entry, Standard};
use super::geometry::Geometry;
use super::header::Header;
use super::refcounts::{Refcounts, Run};
use crate::error::{Context, Result};
use crate::image::{Description, Extent, Place};
use crate::range::ByteRange;
use crate::raw;
use crate::storage::Storage;
use std::sync::Arc;

/// Slices of refcounts in memory while they are counted.
const SLICES_MAX: usize = 8;
/// Clusters of the file whose refcounts are looked at: more is a second's work and more than 4 TiB.
const LOOKS_MAX: u64 = 1 << 26;

impl Shared {
    /// The run that starts at `at`: all alike, in the file one after the other. `payload` is the file
    /// that payload is in.
    pub(super) fn describe(
        &self,
        header: &Header,
        payload: &dyn Storage,
        at: u64,
        len_max: u64,
    ) -> Result<Description> {
        let extent = self.map(at, len_max)?;
        match extent.place {
            Place::Zero => self.describe_empty(extent, |standard| standard.zero),
            Place::Absent => self.describe_empty(extent, |standard| standard.absent(self.geometry())),
            Place::Data { host } if self.is_preallocated(header)? => describe_payload(payload, extent.guest, host),
            Place::Data { .. } | Place::Compressed { .. } => Ok(extent.into()),
        }
    }

    /// Bytes without payload, as far as they have no place, or places one after the other. `kind` says
    /// which subclusters are of theirs.
    fn describe_empty(&self, extent: Extent, kind: impl Fn(Standard) -> u32) -> Result<Description> {
        let (bits, guest) = (self.geometry().cluster_bits, extent.guest);
        let (cluster, skip) = (guest.start >> bits, guest.start & (self.geometry().cluster_size() - 1));
        let state = self.lock_with(cluster)?;
        let start = state.entry(cluster)?.standard().host.map(|(host, _)| host);
        let next = |nth, entry| match entry {
            Entry::Standard(standard)
                if standard.host.map(|(host, _)| host) == start.map(|host| host + (nth << bits)) =>
            {
                kind(standard)
            }
            _ => 0,
        };
        let guest = guest.prefix(state.run(guest, next)?.max(1));
        Ok(Description { guest, host: start.map(|host| host + skip), ..extent.into() })
    }

    fn is_preallocated(&self, header: &Header) -> Result<bool> {
        if let Some(known) = self.preallocated.get() {
            return Ok(*known);
        }
        let found = counts_more_than_it_takes(&self.storage, header)?;
        Ok(*self.preallocated.get_or_init(|| found))
    }
}

/// The payload from `guest.start` on that is in a hole of its file, or is not.
fn describe_payload(storage: &dyn Storage, guest: ByteRange, host: u64) -> Result<Description> {
    let Extent { guest, place } = raw::thin(storage, guest, host)?;
    Ok(Description { guest, data: true, zero: place == Place::Zero, compressed: false, host: Some(host) })
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
