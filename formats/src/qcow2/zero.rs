//! Zeroes and discards: whole subclusters by their entries, parts of them by whoever writes payload.
//!
//! | entry | version 3 | version 2, nothing below | version 2 over a backing image |
//! |---|---|---|---|
//! | reads as zeroes | left; `Unmap` and `Discard` give up a kept cluster | left | left |
//! | payload, `Keep` | zero flag, the cluster kept | zeroed in the file | zeroed in the file |
//! | payload, `Unmap` | zero flag | no entry | zeroed in the file |
//! | payload, `Discard` | zero flag | no entry | left |
//! | nothing, over a backing image | zero flag | | written; `Discard` leaves it |
//!
//! A cluster of which other subclusters have payload is kept by all three; part of a compressed cluster
//! is written, and left by `Discard`.
//!
//! Payload in an external data file has its place for good, so `Unmap` and `Discard` give its space back
//! there and leave the entry. A raw data file has to show the zeroes itself: all is zeroed there.
use super::Shared;
use super::entry::{Entry, Standard, Words};
use super::state::{Known, State};
use crate::error::Result;
use crate::image::{Zeroed, Zeroing};
use crate::range::ByteRange;

/// What becomes of the subclusters of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The entry is right as it is.
    Leave,
    /// The cluster gets this entry.
    Set(Words),
    /// Their bytes in the file, in the cluster from here on, are zeroed.
    Host(u64),
    /// Zeroes are written like any payload.
    Write,
}

impl Shared {
    /// Makes a prefix of `guest` read as zeroes, or says how.
    pub(super) fn zero(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        self.check_writable()?;
        self.check_inside(guest)?;
        if self.raw_data {
            return Ok(Zeroed::Host { guest, host: guest.start });
        }
        let unit = 1 << self.geometry().subcluster_bits();
        let first_end = self.geometry().size.min((guest.start & !(unit - 1)) + unit);
        if guest.start & (unit - 1) != 0 || guest.end < first_end {
            return self.zero_part(ByteRange { start: guest.start, end: guest.end.min(first_end) }, zeroing);
        }
        // The disk's last subcluster is whole where its part on the disk is.
        let end = if guest.end == self.geometry().size { guest.end } else { guest.end & !(unit - 1) };
        self.zero_whole(ByteRange { start: guest.start, end }, zeroing)
    }

    /// Zeroes part of one subcluster.
    fn zero_part(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        if zeroing == Zeroing::Discard {
            return Ok(Zeroed::Done(guest));
        }
        let cluster = guest.start >> self.geometry().cluster_bits;
        let state = self.lock_with(cluster)?;
        if state.unreserved(cluster, 1) == 0 {
            return Ok(Zeroed::Busy);
        }
        let here = self.geometry().subclusters_in(guest, cluster);
        Ok(match here & !self.zeroes(state.entry(cluster)?) {
            0 => Zeroed::Done(guest),
            _ => Zeroed::Write(guest),
        })
    }

    /// Zeroes whole subclusters: as many as are dealt with in the same way and are in one slice.
    fn zero_whole(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        let bits = self.geometry().cluster_bits;
        let (first, last) = (guest.start >> bits, (guest.end - 1) >> bits);
        let mut state = self.lock_with(first)?;
        let clusters = state.unreserved(first, last - first + 1);
        if clusters == 0 {
            return Ok(Zeroed::Busy);
        }
        let prefix = |count: u64| guest.prefix(((first + count) << bits) - guest.start);
        if !self.has_backing
            && let Known::NoTable(absent) = state.known(first)?
        {
            return Ok(Zeroed::Done(prefix(absent.min(clusters))));
        }
        let in_slice = 1 << self.geometry().l2_slice_bits();
        let clusters = clusters.min(in_slice - (first & (in_slice - 1)));
        Ok(match self.action(&mut state, first, guest, zeroing)? {
            Action::Host(host) => {
                let len = state.run(prefix(clusters), self.in_cluster(host, |standard| standard.data))?;
                Zeroed::Host {
                    guest: guest.prefix(len),
                    host: host + (guest.start & (self.geometry().cluster_size() - 1)),
                }
            }
            Action::Write => Zeroed::Write(prefix(1)),
            Action::Leave | Action::Set(_) => match self.zero_entries(&mut state, prefix(clusters), zeroing)? {
                0 => Zeroed::Settle,
                count => Zeroed::Done(prefix(count)),
            },
        })
    }

    /// Changes the entries of the clusters that entries can zero; says of how many from the first on.
    fn zero_entries(&self, state: &mut State, guest: ByteRange, zeroing: Zeroing) -> Result<u64> {
        let bits = self.geometry().cluster_bits;
        let (first, last) = (guest.start >> bits, (guest.end - 1) >> bits);
        for cluster in first..=last {
            match self.action(state, cluster, guest, zeroing)? {
                Action::Leave => {}
                Action::Set(words) => {
                    if state.is_full() || state.changes_left(first, &*self.journal) == 0 {
                        return Ok(cluster - first);
                    }
                    state.ensure_table(first, &*self.journal)?;
                    state.change_entry(cluster, words, &*self.journal)?;
                }
                Action::Host(_) | Action::Write => return Ok(cluster - first),
            }
        }
        Ok(last - first + 1)
    }

    /// The subclusters that read as zeroes whatever is below.
    fn zeroes(&self, entry: Entry) -> u32 {
        match entry {
            Entry::Standard(standard) if self.has_backing => standard.zero,
            Entry::Standard(standard) => !standard.data,
            Entry::Compressed { .. } => 0,
        }
    }

    fn action(&self, state: &mut State, cluster: u64, guest: ByteRange, zeroing: Zeroing) -> Result<Action> {
        let g = self.geometry();
        let entry = state.entry(cluster)?;
        let here = g.subclusters_in(guest, cluster);
        let others = entry.payload(g) & !here & g.subclusters_in(ByteRange { start: 0, end: g.size }, cluster);
        let Standard { host, data, zero } = entry.standard();
        if here & !self.zeroes(entry) == 0 && (zeroing == Zeroing::Keep || host.is_none() || others != 0) {
            return Ok(Action::Leave);
        }
        // Who keeps their space, or cannot give it up without showing the backing image, and has
        // it for themselves.
        let own = match host {
            Some((host, copied)) if state.is_exclusive(host, copied)? => Some(host),
            _ => None,
        };
        let host = own.map(|host| (host, true)).or(host);
        let set = |host: Option<_>, zero| {
            // Behind the disk's end there may be payload that nobody misses.
            let data = host.map_or(0, |_| data & !here);
            Ok(Action::Set(Standard { host, data, zero }.encode(g)))
        };
        match (zeroing, own) {
            (Zeroing::Unmap | Zeroing::Discard, Some(host)) if g.external_data && here & !data == 0 => {
                Ok(Action::Host(host))
            }
            (Zeroing::Discard, _) if others != 0 && host.is_none() => Ok(Action::Leave),
            _ if others != 0 && host.is_none() => Ok(Action::Write),
            _ if others != 0 => set(host, zero | here),
            (Zeroing::Keep, Some(_)) if g.version >= 3 => set(host, zero | here),
            _ if g.version >= 3 => set(None, zero | here),
            (Zeroing::Keep, Some(host)) => Ok(Action::Host(host)),
            _ if !self.has_backing => set(None, 0),
            (Zeroing::Discard, _) => Ok(Action::Leave),
            (_, Some(host)) => Ok(Action::Host(host)),
            _ => Ok(Action::Write),
        }
    }
}
