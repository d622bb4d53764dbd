//! Room for what guests write: where it is already, or in clusters taken for it.
use super::Shared;
use super::entry::{COPIED, Entry, ZERO};
use super::state::{Reserved, State};
use crate::error::{Error, Result};
use crate::image::{Hold, Reservation, Reserve};
use crate::range::ByteRange;
use std::sync::Arc;

impl Shared {
    /// Room for a prefix of `guest`: clusters of one kind, all in one L2 slice if they are new.
    pub(super) fn reserve(this: &Arc<Self>, guest: ByteRange) -> Result<Reserve> {
        this.check_writable()?;
        this.check_inside(guest)?;
        let bits = this.geometry.cluster_bits;
        let (first, last) = (guest.start >> bits, (guest.end - 1) >> bits);
        let mut state = this.lock_with(first)?;
        let entry = state.entry(first)?;
        if let Entry::Data { host, copied } = entry
            && state.is_exclusive(host, copied)?
        {
            // It was shared when a write began to move it, and is not any more: what is written
            // in place now would be left behind.
            if !copied && state.unreserved(first, 1) == 0 {
                return Ok(Reserve::Busy);
            }
            let here = |nth, raw: u64| raw == (host + (nth << bits)) | COPIED;
            let count = state.run(first, last - first + 1, here)?.max(1);
            return Ok(Reserve::Room(this.in_place(guest, host, count)));
        }
        let clusters = state.unreserved(first, last - first + 1);
        if clusters == 0 {
            return Ok(Reserve::Busy);
        }
        let Some((reserved, zeroed)) = this.new_place(&mut state, first, entry, clusters)? else {
            return Ok(Reserve::Settle);
        };
        let (count, host) = (reserved.count, reserved.host);
        let hold = Hold::new(this.clone(), state.add_reservation(reserved));
        // A hold takes the lock when it is dropped, so it must never be dropped under it.
        drop(state);
        Ok(Reserve::Room(this.to_fill(guest, host, count, zeroed, hold)))
    }

    /// Its clusters are in the file and nobody shares them.
    fn in_place(&self, guest: ByteRange, host: u64, count: u64) -> Reservation {
        let skip = guest.start & (self.geometry.cluster_size() - 1);
        let guest = guest.prefix((count << self.geometry.cluster_bits) - skip);
        Reservation { guest, host: host + skip, fill: [None, None], zeroed: false, hold: None }
    }

    /// Its clusters are new: what the payload does not cover of them has to be filled.
    fn to_fill(&self, guest: ByteRange, host: u64, count: u64, zeroed: bool, hold: Hold) -> Reservation {
        let start = guest.start & !(self.geometry.cluster_size() - 1);
        let end = self.geometry.size.min(start + (count << self.geometry.cluster_bits));
        let guest = ByteRange { start: guest.start, end: guest.end.min(end) };
        let [head, tail] = [(start, guest.start), (guest.end, end)]
            .map(|(start, end)| Some(ByteRange { start, end }).filter(|range| !range.is_empty()));
        Reservation { guest, host: host + (guest.start - start), fill: [head, tail], zeroed, hold: Some(hold) }
    }

    /// Clusters for up to `clusters` guest clusters from `first` on, and whether they read as zeroes.
    /// `None` where a settle is due.
    fn new_place(
        &self,
        state: &mut State,
        first: u64,
        entry: Entry,
        clusters: u64,
    ) -> Result<Option<(Reserved, bool)>> {
        let (geometry, bits) = (self.geometry, self.geometry.cluster_bits);
        let in_slice = (1 << geometry.l2_slice_bits()) - (first & ((1 << geometry.l2_slice_bits()) - 1));
        let tables = usize::from(state.needs_table(first));
        let notes = state.notes_left(&*self.journal).saturating_sub(tables);
        let clusters = clusters.min(in_slice).min(notes as u64);
        if clusters == 0 || state.is_full() {
            return Ok(None);
        }
        if let Entry::Zero { kept: Some((host, copied)) } = entry
            && state.is_exclusive(host, copied)?
        {
            state.ensure_table(first, &*self.journal)?;
            let kept = |nth, raw: u64| raw == (host + (nth << bits)) | COPIED | ZERO;
            let count = state.run(first, clusters, kept)?.max(1);
            return Ok(Some((Reserved { first, count, host, taken: false }, false)));
        }
        let homeless = |nth, raw| {
            let entry = Entry::decode(geometry, first + nth, raw);
            matches!(entry, Ok(Entry::Absent | Entry::Zero { kept: None } | Entry::Compressed { .. }))
        };
        // What shares its cluster with somebody is not homeless, but moves like it, one at a time.
        let count = state.run(first, clusters, homeless)?.max(1);
        state.ensure_table(first, &*self.journal)?;
        let taken = state.space()?.take(count)?;
        let host = taken.run.start << bits;
        Ok(Some((Reserved { first, count: taken.run.count, host, taken: true }, taken.zeroed)))
    }

    /// Makes the payload of a reservation the content of its clusters.
    pub(super) fn commit(&self, reservation: Reservation) -> Result<()> {
        let Some(hold) = &reservation.hold else { return Ok(()) };
        self.refuse_damaged()?;
        let mut state = self.lock();
        let reserved = state.take_reservation(hold.id());
        let reserved = reserved.ok_or_else(|| Error::invalid("the reservation is of another image"))?;
        for nth in 0..reserved.count {
            let host = reserved.host + (nth << self.geometry.cluster_bits);
            state.change_entry(reserved.first + nth, host | COPIED, &*self.journal)?;
        }
        Ok(())
    }
}
