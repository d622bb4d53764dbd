//! Room for compressed clusters: packed one behind the other, several in one cluster of the file.
//!
//! ```text
//!  ├── host cluster, refcount 3 ──┼── refcount 2 ─────┤
//!   aaaaaaaaabbbbbbbbbbbbbbbcccccc ccccddddddd
//! ```
//!
//! The orders are those of all payload: the refcounts are raised before anything is written there, and
//! both are durable before the entry that points there. Bytes that share a sector with what is there
//! already are written through the page cache, or two writes could undo each other.
use super::Shared;
use super::entry::Entry;
use super::state::Reserved;
use crate::error::{Error, Result};
use crate::image::{Hold, Reservation, Reserve};
use crate::range::ByteRange;
use std::sync::Arc;

impl Shared {
    /// Room for the cluster `guest`, compressed to `len` bytes; `None` where it is to be written as it is.
    pub(super) fn reserve_compressed(this: &Arc<Self>, guest: ByteRange, len: u32) -> Result<Option<Reserve>> {
        this.check_writable()?;
        this.check_inside(guest)?;
        let (geometry, bits) = (this.geometry(), this.geometry().cluster_bits);
        let cluster = guest.start >> bits;
        let end = geometry.size.min((cluster + 1) << bits);
        if guest.start != cluster << bits || guest.end != end || len == 0 || u64::from(len) >= geometry.cluster_size() {
            return Err(Error::invalid(format!("{guest} in {len} bytes is no cluster that was compressed")));
        }
        let mut state = this.lock_with(cluster)?;
        if state.unreserved(cluster, 1) == 0 {
            return Ok(Some(Reserve::Busy));
        }
        if geometry.external_data || state.entry(cluster)?.standard().data != 0 {
            // Another file has no compressed clusters; and somebody may be writing in place here, who
            // holds no reservation.
            return Ok(None);
        }
        if state.is_full() || state.changes_left(cluster, &*this.journal) == 0 {
            return Ok(Some(Reserve::Settle));
        }
        state.ensure_table(cluster, &*this.journal)?;
        let host = state.space()?.take_bytes(u64::from(len))?;
        let reserved = Reserved { first: cluster, count: 1, host, span: guest, taken: true, compressed: Some(len) };
        if host + u64::from(len) > Entry::compressed_end_max(geometry) {
            // Far beyond what any file system holds in one file; what was taken is a leak then.
            return Ok(None);
        }
        let hold = Hold::new(this.clone(), state.add_reservation(reserved));
        // A hold takes the lock when it is dropped, so it must never be dropped under it.
        drop(state);
        Ok(Some(Reserve::Room(Reservation { guest, host, fill: [None, None], zeroed: false, hold: Some(hold) })))
    }
}
