//! Room for what guests write: where it is already, in the rest of a cluster of which subclusters are
//! in use, or in clusters taken for it.
//!
//! A reservation is of one of the three. A cluster has one reservation at a time that its commit
//! changes the entry for: the second would put back what the first made of it.
//!
//! In an external data file each cluster has one place for good. A write to one that is not there yet puts
//! its bytes where no entry shows them.
use super::Shared;
use super::entry::{Entry, Standard};
use super::refcounts::Run;
use super::space::Taken;
use super::state::{Known, Reserved, State};
use crate::error::{Error, Result};
use crate::image::{Hold, Reservation, Reserve};
use crate::range::ByteRange;
use std::sync::Arc;

impl Shared {
    /// Room for a prefix of `guest`: subclusters of one kind, all in one L2 slice if they are new.
    pub(super) fn reserve(this: &Arc<Self>, guest: ByteRange) -> Result<Reserve> {
        this.check_writable()?;
        this.check_inside(guest)?;
        let bits = this.geometry().cluster_bits;
        let (first, last) = (guest.start >> bits, (guest.end - 1) >> bits);
        let mut state = this.lock_with(first)?;
        let entry = state.entry(first)?;
        let own = match entry.standard().host {
            Some((host, copied)) if state.is_exclusive(host, copied)? => Some((host, copied)),
            _ => None,
        };
        if let Some((host, copied)) = own
            && entry.standard().data & this.first_subcluster(guest) != 0
        {
            // It was shared when a write began to move it, and is not any more: what is written
            // in place now would be left behind.
            if !copied && state.unreserved(first, 1) == 0 {
                return Ok(Reserve::Busy);
            }
            let len = state.run(guest, this.in_cluster(host, |standard| standard.data))?;
            let host = host + (guest.start & (this.geometry().cluster_size() - 1));
            let guest = guest.prefix(len);
            return Ok(Reserve::Room(Reservation { guest, host, fill: [None, None], zeroed: false, hold: None }));
        }
        let clusters = state.unreserved(first, last - first + 1);
        if clusters == 0 {
            return Ok(Reserve::Busy);
        }
        let guest = guest.prefix(((first + clusters) << bits) - guest.start);
        let Some((reserved, zeroed)) = this.new_place(&mut state, guest, own.map(|(host, _)| host))? else {
            return Ok(Reserve::Settle);
        };
        let (span, host) = (reserved.span, reserved.host);
        let hold = Hold::new(this.clone(), state.add_reservation(reserved));
        // A hold takes the lock when it is dropped, so it must never be dropped under it.
        drop(state);
        Ok(Reserve::Room(this.to_fill(guest, span, host, zeroed, hold)))
    }

    /// The room that a prefix of `guest` has already, where everything that says so is in memory, and in nobody's hands.
    pub(super) fn reserve_at_once(&self, guest: ByteRange) -> Option<Reservation> {
        self.check_writable().and_then(|()| self.check_inside(guest)).ok()?;
        let state = self.state.try_lock().ok()?;
        let cluster = guest.start >> self.geometry().cluster_bits;
        if !matches!(state.known(cluster), Ok(Known::Entries(_))) {
            return None;
        }
        let standard = state.entry(cluster).ok()?.standard();
        // Where the entry does not say itself that nobody else has the cluster, its refcount would have to be looked at.
        let (host, _) = standard.host.filter(|(_, copied)| *copied)?;
        if standard.data & self.first_subcluster(guest) == 0 {
            return None;
        }
        let len = state.run(guest, self.in_cluster(host, |standard| standard.data)).ok()?;
        let host = host + (guest.start & (self.geometry().cluster_size() - 1));
        Some(Reservation { guest: guest.prefix(len), host, fill: [None, None], zeroed: false, hold: None })
    }

    /// The subcluster with the first byte of `guest`.
    fn first_subcluster(&self, guest: ByteRange) -> u32 {
        self.geometry().subclusters_in(guest.prefix(1), guest.start >> self.geometry().cluster_bits)
    }

    /// For `State::run`: what `pick` picks of entries whose clusters are theirs alone and follow each
    /// other from `host` on. The first one's is known to be its alone.
    pub(super) fn in_cluster(&self, host: u64, pick: impl Fn(Standard) -> u32) -> impl Fn(u64, Entry) -> u32 {
        let bits = self.geometry().cluster_bits;
        move |nth, entry| match entry.standard().host {
            Some((at, copied)) if at == host + (nth << bits) && (copied || nth == 0) => pick(entry.standard()),
            _ => 0,
        }
    }

    /// The room at `host`, where `span` is to be: what the payload does not cover of it has to be filled.
    fn to_fill(&self, guest: ByteRange, span: ByteRange, host: u64, zeroed: bool, hold: Hold) -> Reservation {
        let guest = guest.intersect(span);
        let [head, tail] = [(span.start, guest.start), (guest.end, span.end)]
            .map(|(start, end)| Some(ByteRange { start, end }).filter(|range| !range.is_empty()));
        let skip = guest.start & (self.geometry().cluster_size() - 1);
        Reservation { guest, host: host + skip, fill: [head, tail], zeroed, hold: Some(hold) }
    }

    /// Room for a prefix of `guest`: in its clusters from `own` on, or in new ones; and whether those
    /// read as zeroes. `None` where a settle is due.
    fn new_place(&self, state: &mut State, guest: ByteRange, own: Option<u64>) -> Result<Option<(Reserved, bool)>> {
        let (g, bits) = (self.geometry(), self.geometry().cluster_bits);
        let first = guest.start >> bits;
        let in_slice = (1 << g.l2_slice_bits()) - (first & ((1 << g.l2_slice_bits()) - 1));
        let clusters = in_slice.min(state.changes_left(first, &*self.journal) as u64);
        if clusters == 0 || state.is_full() {
            return Ok(None);
        }
        let guest = guest.prefix(((first + clusters) << bits) - guest.start);
        state.ensure_table(first, &*self.journal)?;
        if let Some(host) = own {
            let len = state.run(guest, self.in_cluster(host, |standard| !standard.data))?;
            let guest = guest.prefix(len);
            let span = self.cut(guest.align_outward(1 << g.subcluster_bits()));
            let count = ((guest.end - 1) >> bits) - first + 1;
            return Ok(Some((Reserved { first, count, host, span, taken: false, compressed: None }, false)));
        }
        let homeless = |_, entry: Entry| if entry.standard().host.is_none() { g.all_subclusters() } else { 0 };
        let len = state.run(guest, homeless)?;
        // What shares its cluster with somebody is not homeless, but moves like it, one at a time.
        let wanted = if len == 0 { 1 } else { ((guest.start + len - 1) >> bits) - first + 1 };
        let taken = match g.external_data {
            // Whatever was there before: nobody knows that it is zeroes.
            true => Taken { run: Run { start: first, count: wanted }, zeroed: false },
            false => state.space()?.take(wanted)?,
        };
        let (count, host) = (taken.run.count, taken.run.start << bits);
        let span = self.moving(state, guest.prefix(((first + count) << bits) - guest.start))?;
        Ok(Some((Reserved { first, count, host, span, taken: !g.external_data, compressed: None }, taken.zeroed)))
    }

    /// What has to be in new clusters for `guest`: its subclusters, and all payload of the old ones.
    fn moving(&self, state: &State, guest: ByteRange) -> Result<ByteRange> {
        let (g, bits) = (self.geometry(), self.geometry().cluster_bits);
        let mut span = guest.align_outward(1 << g.subcluster_bits());
        for cluster in [guest.start >> bits, (guest.end - 1) >> bits] {
            let (start, payload) = (cluster << bits, state.entry(cluster)?.payload(g));
            if payload != 0 {
                let end = 32 - u64::from(payload.leading_zeros());
                span.start = span.start.min(start + (u64::from(payload.trailing_zeros()) << g.subcluster_bits()));
                span.end = span.end.max(start + (end << g.subcluster_bits()));
            }
        }
        Ok(self.cut(span))
    }

    /// What of `range` is on the disk.
    fn cut(&self, range: ByteRange) -> ByteRange {
        range.intersect(ByteRange { start: 0, end: self.geometry().size })
    }

    /// Makes the payload of a reservation the content of its subclusters.
    pub(super) fn commit(&self, reservation: Reservation) -> Result<()> {
        let Some(hold) = &reservation.hold else { return Ok(()) };
        self.refuse_damaged()?;
        let g = self.geometry();
        let mut state = self.lock();
        let reserved = state.take_reservation(hold.id());
        let reserved = reserved.ok_or_else(|| Error::invalid("the reservation is of another image"))?;
        for nth in 0..reserved.count {
            let cluster = reserved.first + nth;
            if let Some(packed) = reserved.packed_entry(g) {
                state.change_entry(cluster, packed, &*self.journal)?;
                continue;
            }
            let host = reserved.host + (nth << g.cluster_bits);
            let (old, new) = (state.entry(cluster)?.standard(), g.subclusters_in(reserved.span, cluster));
            let now = Standard { host: Some((host, true)), data: old.data | new, zero: old.zero & !new };
            state.change_entry(cluster, now.encode(g), &*self.journal)?;
        }
        Ok(())
    }
}
