//! Zeroes and discards: whole clusters by their entries, parts of them by whoever writes payload.
//!
//! | entry | version 3 | version 2, nothing below | version 2 over a backing image |
//! |---|---|---|---|
//! | reads as zeroes | left; `Unmap` and `Discard` give up a kept cluster | left | left |
//! | payload, `Keep` | zero flag, the cluster kept | zeroed in the file | zeroed in the file |
//! | payload, `Unmap` | zero flag | no entry | zeroed in the file |
//! | payload, `Discard` | zero flag | no entry | left |
//! | nothing, over a backing image | zero flag | | written; `Discard` leaves it |
use super::Shared;
use super::entry::{COPIED, Entry, ZERO};
use super::state::{Known, State};
use crate::error::Result;
use crate::image::{Zeroed, Zeroing};
use crate::range::ByteRange;

/// What becomes of one whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Its entry is right as it is.
    Leave,
    /// It gets this entry.
    Set(u64),
    /// Its bytes in the file, from here on, are zeroed.
    Host(u64),
    /// Zeroes are written like any payload.
    Write,
}

impl Shared {
    /// Makes a prefix of `guest` read as zeroes, or says how.
    pub(super) fn zero(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        self.check_writable()?;
        self.check_inside(guest)?;
        let cluster = self.geometry.cluster_size();
        let first_end = self.geometry.size.min((guest.start & !(cluster - 1)) + cluster);
        if guest.start & (cluster - 1) != 0 || guest.end < first_end {
            return self.zero_part(ByteRange { start: guest.start, end: guest.end.min(first_end) }, zeroing);
        }
        // The disk's last cluster is whole where its part on the disk is.
        let end = if guest.end == self.geometry.size { guest.end } else { guest.end & !(cluster - 1) };
        self.zero_whole(ByteRange { start: guest.start, end }, zeroing)
    }

    /// Zeroes part of one cluster.
    fn zero_part(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        if zeroing == Zeroing::Discard {
            return Ok(Zeroed::Done(guest));
        }
        let cluster = guest.start >> self.geometry.cluster_bits;
        let state = self.lock_with(cluster)?;
        if state.unreserved(cluster, 1) == 0 {
            return Ok(Zeroed::Busy);
        }
        Ok(match state.entry(cluster)? {
            Entry::Zero { .. } => Zeroed::Done(guest),
            Entry::Absent if !self.has_backing => Zeroed::Done(guest),
            _ => Zeroed::Write(guest),
        })
    }

    /// Zeroes whole clusters: as many as are dealt with in the same way and are in one slice.
    fn zero_whole(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        let bits = self.geometry.cluster_bits;
        let (first, last) = (guest.start >> bits, (guest.end - 1) >> bits);
        let mut state = self.lock_with(first)?;
        let clusters = state.unreserved(first, last - first + 1);
        if clusters == 0 {
            return Ok(Zeroed::Busy);
        }
        if !self.has_backing
            && let Known::NoTable(absent) = state.known(first)?
        {
            return Ok(Zeroed::Done(guest.prefix(absent.min(clusters) << bits)));
        }
        let in_slice = 1 << self.geometry.l2_slice_bits();
        let clusters = clusters.min(in_slice - (first & (in_slice - 1)));
        let prefix = |count: u64| guest.prefix(count << bits);
        Ok(match self.action(&mut state, first, zeroing)? {
            Action::Host(host) => Zeroed::Host { guest: prefix(1), host },
            Action::Write => Zeroed::Write(prefix(1)),
            Action::Leave | Action::Set(_) => match self.zero_entries(&mut state, first, clusters, zeroing)? {
                0 => Zeroed::Settle,
                count => Zeroed::Done(prefix(count)),
            },
        })
    }

    /// Changes the entries of the clusters that entries can zero; says for how many from `first` on.
    fn zero_entries(&self, state: &mut State, first: u64, clusters: u64, zeroing: Zeroing) -> Result<u64> {
        for nth in 0..clusters {
            match self.action(state, first + nth, zeroing)? {
                Action::Leave => {}
                Action::Set(raw) => {
                    let table = usize::from(state.needs_table(first));
                    if state.is_full() || state.notes_left(&*self.journal) <= table {
                        return Ok(nth);
                    }
                    state.ensure_table(first, &*self.journal)?;
                    state.change_entry(first + nth, raw, &*self.journal)?;
                }
                Action::Host(_) | Action::Write => return Ok(nth),
            }
        }
        Ok(clusters)
    }

    fn action(&self, state: &mut State, cluster: u64, zeroing: Zeroing) -> Result<Action> {
        let entry = state.entry(cluster)?;
        // Who keeps their space, or cannot give it up without showing the backing image, and has
        // it for themselves.
        let own = match entry {
            Entry::Data { host, copied } if state.is_exclusive(host, copied)? => Some(host),
            _ => None,
        };
        Ok(match (entry, zeroing, own) {
            (Entry::Zero { kept: None }, _, _) | (Entry::Zero { .. }, Zeroing::Keep, _) => Action::Leave,
            (Entry::Absent, _, _) if !self.has_backing => Action::Leave,
            (_, Zeroing::Keep, Some(host)) if self.geometry.version >= 3 => Action::Set(host | COPIED | ZERO),
            _ if self.geometry.version >= 3 => Action::Set(ZERO),
            (_, Zeroing::Keep, Some(host)) => Action::Host(host),
            _ if !self.has_backing => Action::Set(0),
            (_, Zeroing::Discard, _) => Action::Leave,
            (_, _, Some(host)) => Action::Host(host),
            _ => Action::Write,
        })
    }
}
