//! The tables of an image as they are now, and what of them is not in the file yet.
//!
//! A slice in memory always has the newest entries, so that looking one up is one look. What a
//! settle under way must not write yet it takes from `undo`: the old values of the entries of its
//! slices that were changed since it began.
mod tables;

use super::Open;
use super::entry::{Entry, OFFSET, l2_table};
use super::geometry::Geometry;
use super::header::Header;
use super::protected::Protected;
use super::refcounts::{FrozenRefcounts, Refcounts, Run};
use super::slices::Slices;
use super::space::Space;
use super::table;
use crate::error::{Context, Error, Result};
use crate::journal::{Change, Journal};
use crate::storage::Storage;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// The number of the L1 table in the journal; entries by their index.
pub const TABLE_L1: u8 = 1;
/// The number of all L2 tables in the journal; entries by guest cluster.
pub const TABLE_L2: u8 = 2;

/// How many runs of clusters may wait for their release before a settle is due.
const FREED_RUNS_MAX: usize = 1 << 18;

/// The tables of an image.
pub struct State {
    pub geometry: Geometry,
    l1_at: u64,
    l1: Vec<u64>,
    /// Entries of the L1 table that are not in the file.
    l1_dirty: BTreeSet<u64>,
    l2: Slices<Box<[u64]>>,
    /// Counts what can make a slice that was read without the lock a stale one.
    epoch: u64,
    space: Option<Space>,
    /// By first guest cluster; they do not overlap.
    reserved: BTreeMap<u64, Reserved>,
    reserved_by_id: HashMap<u64, u64>,
    /// Notes that the journal must have room for: those of all reservations.
    promised: usize,
    /// Let go of by entries that are not durable.
    freed: Vec<Run>,
    /// Let go of by entries that are durable; perhaps still being read.
    awaiting: Vec<Run>,
    settling: Option<Settling>,
    /// The journal was turned and not told to forget since.
    unforgotten: bool,
    ids: u64,
}

/// Room that a write was given.
pub struct Reserved {
    /// The first guest cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Where they will be in the file.
    pub host: u64,
    /// The room was taken for it, and is given back when it is dropped.
    pub taken: bool,
}

/// What a settle under way writes.
pub struct Frozen {
    /// L2 slices, by number.
    pub l2: Vec<u64>,
    /// Entries of the L1 table: index and value.
    pub l1: Vec<(u64, u64)>,
    /// Refcounts.
    pub refs: FrozenRefcounts,
}

struct Settling {
    id: u64,
    frozen: Arc<Frozen>,
    /// By guest cluster: what an entry of a frozen slice was when the settle began.
    undo: HashMap<u64, u64>,
    /// Let go of by the entries that this settle makes durable.
    freed: Vec<Run>,
}

/// An L2 slice that has to be read.
pub struct Missing {
    key: u64,
    /// Where it is in the file.
    pub at: u64,
    epoch: u64,
}

/// What is known of the mapping from one cluster on.
pub enum Known<'a> {
    /// There is no L2 table, and so no entry for that many clusters.
    NoTable(u64),
    /// The entries to the end of the slice.
    Entries(&'a [u64]),
    /// It would have to be read.
    NotInMemory,
}

impl State {
    /// Reads the L1 table and, for writing, the refcount table.
    pub fn open(storage: &Arc<dyn Storage>, header: &Header, open: Open) -> Result<Self> {
        let geometry = header.geometry;
        let slices = open.metadata_bytes_max >> geometry.slice_byte_bits();
        let l1 = table::read(&**storage, header.l1_offset, geometry.l1_entries() as usize)
            .context(|| format!("reading the L1 table at {}", header.l1_offset))?;
        let mut state = Self {
            geometry,
            l1_at: header.l1_offset,
            l1,
            l1_dirty: BTreeSet::new(),
            l2: Slices::new(slices / 4 * 3),
            epoch: 0,
            space: None,
            reserved: BTreeMap::new(),
            reserved_by_id: HashMap::default(),
            promised: 0,
            freed: Vec::new(),
            awaiting: Vec::new(),
            settling: None,
            unforgotten: false,
            ids: 0,
        };
        if open.writable {
            let clusters = |at, count| Run { start: geometry.host_cluster(at), count };
            let place = clusters(header.reftable_offset, u64::from(header.reftable_clusters));
            let refs = Refcounts::open(storage.clone(), geometry, place, slices / 4)?;
            let protected = Protected::read(&**storage, header)?;
            state.space = Some(Space::open(storage.clone(), geometry, refs, protected)?);
            state.own_tables(header.snapshots > 0)?;
            let l1 = std::mem::take(&mut state.l1);
            state.space()?.protect(l1.iter().map(|raw| raw & OFFSET).filter(|host| *host != 0));
            state.l1 = l1;
        }
        Ok(state)
    }

    /// The space of the file.
    pub fn space(&mut self) -> Result<&mut Space> {
        self.space.as_mut().ok_or_else(|| Error::invalid("the image was opened for reading only"))
    }

    fn l1_index(&self, cluster: u64) -> usize {
        (cluster >> self.geometry.l2_bits()) as usize
    }

    fn slice_key(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.l2_slice_bits()
    }

    /// Where the L2 table of `cluster` is.
    pub fn table_at(&self, cluster: u64) -> Result<Option<u64>> {
        let index = self.l1_index(cluster);
        l2_table(self.geometry, index as u64, self.l1[index])
    }

    /// Where L2 slice `key` is in the file; its table exists.
    pub fn slice_at(&self, key: u64) -> Result<u64> {
        let table = self.table_at(key << self.geometry.l2_slice_bits())?.expect("a slice has a table");
        let in_table = key & ((1 << self.geometry.slices_bits()) - 1);
        Ok(table + (in_table << self.geometry.slice_byte_bits()))
    }

    /// What would have to be read to know the entry of `cluster`.
    pub fn missing(&self, cluster: u64) -> Result<Option<Missing>> {
        let key = self.slice_key(cluster);
        if self.l2.has(key) || self.table_at(cluster)?.is_none() {
            return Ok(None);
        }
        Ok(Some(Missing { key, at: self.slice_at(key)?, epoch: self.epoch }))
    }

    /// Takes in what was read. Where the tables may have changed meanwhile it is read again.
    pub fn arrived(&mut self, missing: &Missing, entries: Box<[u64]>) {
        if missing.epoch == self.epoch {
            self.l2.insert(missing.key, entries);
        }
    }

    /// What is known of the entries from `cluster` on.
    pub fn known(&self, cluster: u64) -> Result<Known<'_>> {
        let (bits, key) = (self.geometry.l2_slice_bits(), self.slice_key(cluster));
        if let Some(slot) = self.l2.get(key) {
            return Ok(Known::Entries(&slot.entries[(cluster & ((1 << bits) - 1)) as usize..]));
        }
        if self.table_at(cluster)?.is_some() {
            return Ok(Known::NotInMemory);
        }
        let table_end = ((cluster >> self.geometry.l2_bits()) + 1) << self.geometry.l2_bits();
        Ok(Known::NoTable(table_end - cluster))
    }

    /// The entry of `cluster`, whose slice is in memory.
    pub fn raw(&self, cluster: u64) -> Result<u64> {
        match self.known(cluster)? {
            Known::NoTable(_) => Ok(0),
            Known::Entries(entries) => Ok(entries[0]),
            Known::NotInMemory => unreachable!("callers hold the lock since the slice was there"),
        }
    }

    /// The entry of `cluster` in words.
    pub fn entry(&self, cluster: u64) -> Result<Entry> {
        let raw = self.raw(cluster)?;
        Entry::decode(self.geometry, cluster, raw)
    }

    /// How many clusters from `first` on, `max` at most, have entries that are `like` it, as far as
    /// they are in memory. `like` gets the distance from `first`.
    pub fn run(&self, first: u64, max: u64, like: impl Fn(u64, u64) -> bool) -> Result<u64> {
        /// Bounds the time under the lock: some 20 µs.
        const LOOKS_MAX: u64 = 1 << 13;
        let mut count = 0;
        let mut looks = 0;
        while count < max && looks < LOOKS_MAX {
            match self.known(first + count)? {
                Known::NoTable(clusters) if like(count, 0) => {
                    count += clusters;
                    looks += 1;
                }
                Known::NoTable(_) | Known::NotInMemory => break,
                Known::Entries(entries) => {
                    let entries = &entries[..entries.len().min((max - count) as usize)];
                    let alike = entries.iter().zip(count..).take_while(|(raw, nth)| like(*nth, **raw)).count();
                    let all = alike == entries.len();
                    count += alike as u64;
                    looks += alike as u64 + 1;
                    if !all {
                        break;
                    }
                }
            }
        }
        Ok(count.min(max))
    }

    /// True where only this entry uses the cluster at `host`.
    pub fn is_exclusive(&mut self, host: u64, copied: bool) -> Result<bool> {
        let cluster = self.geometry.host_cluster(host);
        Ok(copied || self.space()?.refs.get(cluster)? == 1)
    }

    /// Changes the entry of `cluster`, whose slice is in memory, and notes it. What the old one had
    /// is let go of.
    pub fn change_entry(&mut self, cluster: u64, raw: u64, journal: &dyn Journal) -> Result<()> {
        journal.note(Change { table: TABLE_L2, index: cluster, value: raw });
        let (geometry, old) = (self.geometry, self.put_entry(cluster, raw));
        let used = |raw| Entry::decode(geometry, cluster, raw).map(|entry| entry.used(geometry));
        let (before, after) = (used(old)?, used(raw)?);
        if let Some((at, len)) = before.filter(|_| before != after) {
            let (first, last) = (geometry.host_cluster(at), geometry.host_cluster(at + len - 1));
            push_run(&mut self.freed, Run { start: first, count: last - first + 1 });
        }
        Ok(())
    }

    /// Changes the entry of `cluster` and returns the old one.
    pub fn put_entry(&mut self, cluster: u64, raw: u64) -> u64 {
        let key = self.slice_key(cluster);
        let index = (cluster & ((1 << self.geometry.l2_slice_bits()) - 1)) as usize;
        let slot = self.l2.get_mut(key).expect("a slice that is changed is in memory");
        let old = std::mem::replace(&mut slot.entries[index], raw);
        if slot.is_frozen()
            && let Some(settling) = &mut self.settling
        {
            settling.undo.entry(cluster).or_insert(old);
        }
        self.l2.touch(key);
        old
    }

    /// True where a settle is due before anything more can be taken on.
    pub fn is_full(&self) -> bool {
        let space_full = self.space.as_ref().is_some_and(|space| space.refs.is_full());
        self.l2.is_full() || space_full || self.freed.len() >= FREED_RUNS_MAX
    }

    /// How many notes may still be promised.
    pub fn notes_left(&self, journal: &dyn Journal) -> usize {
        journal.room().saturating_sub(self.promised)
    }

    /// How many clusters from `first` on, `max` at most, nobody has reserved.
    pub fn unreserved(&self, first: u64, max: u64) -> u64 {
        if self.reserved.is_empty() {
            return max;
        }
        let before = self.reserved.range(..=first).next_back();
        if before.is_some_and(|(start, reserved)| start + reserved.count > first) {
            return 0;
        }
        self.reserved.range(first..).next().map_or(max, |(next, _)| max.min(next - first))
    }

    /// Remembers a reservation; returns its number. The slice of its clusters stays in memory.
    pub fn add_reservation(&mut self, reserved: Reserved) -> u64 {
        self.ids += 1;
        self.l2.pin(self.slice_key(reserved.first));
        self.promised += reserved.count as usize;
        self.reserved_by_id.insert(self.ids, reserved.first);
        self.reserved.insert(reserved.first, reserved);
        self.ids
    }

    /// Ends a reservation; `None` where it has ended before.
    pub fn take_reservation(&mut self, id: u64) -> Option<Reserved> {
        let first = self.reserved_by_id.remove(&id)?;
        let reserved = self.reserved.remove(&first).expect("both maps have the same reservations");
        self.promised -= reserved.count as usize;
        self.l2.unpin(self.slice_key(first));
        Some(reserved)
    }

    /// Gives the room of a reservation back, if it has not ended.
    pub fn drop_reservation(&mut self, id: u64) {
        let Some(reserved) = self.take_reservation(id).filter(|reserved| reserved.taken) else { return };
        let run = Run { start: self.geometry.host_cluster(reserved.host), count: reserved.count };
        if let Some(space) = &mut self.space {
            // What cannot be counted down leaks; nothing worse, and nobody is there to hear of it.
            let _ = space.release(run);
        }
    }

    /// The clusters at these places are not needed any more, and nothing in the file points at them.
    pub fn let_go(&mut self, places: &[u64]) {
        for place in places {
            push_run(&mut self.freed, Run { start: self.geometry.host_cluster(*place), count: 1 });
        }
    }

    /// What was let go of before the last settle is free now.
    pub fn release_awaiting(&mut self) {
        let Some(space) = &mut self.space else { return };
        for run in std::mem::take(&mut self.awaiting) {
            // As above: a leak at worst.
            let _ = space.release(run);
        }
    }

    /// True where a settle would have nothing to write.
    pub fn is_clean(&self) -> bool {
        let space_clean = self.space.as_ref().is_none_or(|space| space.refs.is_clean());
        space_clean && self.l2.is_clean() && self.l1_dirty.is_empty() && self.freed.is_empty()
    }

    /// True while a settle is under way.
    pub fn is_settling(&self) -> bool {
        self.settling.is_some()
    }

    /// What a settle under way writes.
    pub fn frozen(&self) -> Option<Arc<Frozen>> {
        self.settling.as_ref().map(|settling| settling.frozen.clone())
    }

    /// Starts a settle of all that is in memory; returns its number.
    pub fn begin_settle(&mut self, journal: &dyn Journal) -> Result<u64> {
        if !std::mem::replace(&mut self.unforgotten, true) {
            journal.turn();
        }
        self.ids += 1;
        let mut freed = std::mem::take(&mut self.freed);
        let space = self.space()?;
        freed.append(&mut space.retired);
        let refs = space.refs.freeze();
        let l1 = std::mem::take(&mut self.l1_dirty).into_iter().map(|index| (index, self.l1[index as usize]));
        let frozen = Arc::new(Frozen { l1: l1.collect(), l2: self.l2.freeze(), refs });
        self.settling = Some(Settling { id: self.ids, frozen, undo: HashMap::default(), freed });
        Ok(self.ids)
    }

    /// Ends settle `id`, done or `failed`; false where another one or none is under way.
    pub fn end_settle(&mut self, id: u64, failed: bool) -> bool {
        if self.settling.as_ref().is_none_or(|settling| settling.id != id) {
            return false;
        }
        let settling = self.settling.take().expect("just looked at");
        self.l2.thaw(&settling.frozen.l2, failed);
        if let Some(space) = &mut self.space {
            space.refs.thaw(&settling.frozen.refs, failed);
        }
        // A slice that was read before it was written here and comes in now is stale.
        self.epoch += 1;
        if failed {
            self.l1_dirty.extend(settling.frozen.l1.iter().map(|(index, _)| index));
            self.freed.extend(settling.freed);
        } else {
            self.awaiting.extend(settling.freed);
        }
        true
    }

    /// The journal was told to forget what was noted before it was turned.
    pub fn forgotten(&mut self) {
        self.unforgotten = false;
    }

    /// What replay takes in counts as noted before the journal was turned.
    pub fn remember_unforgotten(&mut self) {
        self.unforgotten = true;
    }

    /// The bytes of frozen L2 slice `key` as its entries were when the settle began.
    pub fn frozen_bytes(&self, key: u64, bytes: &mut Vec<u8>) {
        let slot = self.l2.get(key).expect("frozen slices stay");
        let first = key << self.geometry.l2_slice_bits();
        let undo = self.settling.as_ref().map(|settling| &settling.undo).filter(|undo| !undo.is_empty());
        match undo {
            None => table::encode(slot.entries.iter().copied(), bytes),
            Some(undo) => {
                let then = |(nth, now): (u64, &u64)| undo.get(&(first + nth)).copied().unwrap_or(*now);
                table::encode((0..).zip(slot.entries.iter()).map(then), bytes);
            }
        }
    }

    /// Where entry `index` of the L1 table is in the file.
    pub fn l1_entry_at(&self, index: u64) -> u64 {
        self.l1_at + index * 8
    }
}

/// Adds a run of clusters, to the last one where they meet.
fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.start + last.count == run.start => last.count += run.count,
        _ => runs.push(run),
    }
}
