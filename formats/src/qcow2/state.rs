//! The tables of an image as they are now, and what of them is not in the file yet.
//!
//! A slice in memory always has the newest entries, so that looking one up is one look. What a
//! settle under way must not write yet it takes from `undo`: the old values of the entries of its
//! slices that were changed since it began.
mod tables;

use super::Open;
use super::entry::{Entry, OFFSET, Standard, Words, l2_table};
use super::fault::{Fault, planted};
use super::geometry::Geometry;
use super::header::Header;
use super::protected::Protected;
use super::refcounts::{FrozenRefcounts, Refcounts, Run};
use super::slices::Slices;
use super::space::Space;
use super::table;
use crate::error::{Context, Error, Result};
use crate::journal::{Change, Journal};
use crate::range::ByteRange;
use crate::storage::Storage;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// The number of the L1 table in the journal; entries by their index.
pub const TABLE_L1: u8 = 1;
/// The number of all L2 tables in the journal; entries by guest cluster.
pub const TABLE_L2: u8 = 2;
/// The number in the journal of the bitmaps of extended L2 entries, by guest cluster. A bitmap's note
/// stands right before its entry's and is nothing without it: a kill may come between the two.
pub const TABLE_L2_BITMAPS: u8 = 3;

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
    /// Let go of by entries that are durable; perhaps still being read. With the number of their settle.
    awaiting: Vec<(u64, Vec<Run>)>,
    /// How many settles have ended.
    settles: u64,
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
    /// The guest bytes that will be there: whole subclusters, or up to the disk's end.
    pub span: ByteRange,
    /// The room was taken for it, and is given back when it is dropped.
    pub taken: bool,
    /// How many bytes the cluster has, where it is compressed.
    pub compressed: Option<u32>,
}

impl Reserved {
    /// The clusters of the file that it uses.
    fn run(&self, geometry: Geometry) -> Run {
        let start = geometry.host_cluster(self.host);
        match self.compressed {
            None => Run { start, count: self.count },
            Some(len) => Run { start, count: geometry.host_cluster(self.host + u64::from(len) - 1) + 1 - start },
        }
    }

    /// The entry of the cluster, where it is compressed.
    pub fn packed_entry(&self, geometry: Geometry) -> Option<Words> {
        let descriptor = Entry::encode_compressed(geometry, self.host, self.compressed?);
        Some(Words { descriptor, bitmap: 0 })
    }
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
    undo: HashMap<u64, Words>,
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
    /// The words of the entries to the end of the slice.
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
            settles: 0,
            settling: None,
            unforgotten: false,
            ids: 0,
        };
        if open.writable {
            let clusters = |at, count| Run { start: geometry.host_cluster(at), count };
            let place = clusters(header.reftable_offset, u64::from(header.reftable_clusters));
            let refs = Refcounts::open(storage.clone(), geometry, place, slices / 4)?;
            let l2_tables = state.l1.iter().map(|raw| raw & OFFSET).filter(|host| *host != 0);
            let protected = Protected::read(&**storage, header, l2_tables.chain(refs.blocks()))?;
            state.space = Some(Space::open(storage.clone(), geometry, refs, protected)?);
            state.own_tables()?;
        }
        Ok(state)
    }

    /// Bytes of the tables that are in memory as a whole: the L1 table and, for writing, the refcount table.
    pub fn memory(&self, header: &Header) -> u64 {
        let reftable = self.space.as_ref().map_or(0, |_| u64::from(header.reftable_clusters));
        self.l1.len() as u64 * 8 + reftable * self.geometry.cluster_size()
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
        if let Some(slot) = self.l2.get(self.slice_key(cluster)) {
            return Ok(Known::Entries(&slot.entries[self.in_slice(cluster) << self.geometry.l2_words_bits()..]));
        }
        if self.table_at(cluster)?.is_some() {
            return Ok(Known::NotInMemory);
        }
        let table_end = ((cluster >> self.geometry.l2_bits()) + 1) << self.geometry.l2_bits();
        Ok(Known::NoTable(table_end - cluster))
    }

    /// The number of `cluster` among the entries of its slice.
    fn in_slice(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.geometry.l2_slice_bits()) - 1)) as usize
    }

    /// What the entry of `cluster` means; its slice is in memory.
    pub fn entry(&self, cluster: u64) -> Result<Entry> {
        match self.known(cluster)? {
            Known::NoTable(_) => Ok(Entry::Standard(Standard::default())),
            Known::Entries(words) => Entry::decode(self.geometry, cluster, Words::get(self.geometry, words, 0)),
            Known::NotInMemory => unreachable!("callers hold the lock since the slice was there"),
        }
    }

    /// How many bytes from the start of `guest` on are in subclusters that are `alike`, as far as
    /// their entries are in memory. `alike` gets the distance of an entry from the first one and the
    /// entry, and says which of its subclusters are.
    pub fn run(&self, guest: ByteRange, alike: impl Fn(u64, Entry) -> u32) -> Result<u64> {
        /// Bounds the time under the lock: some 20 µs.
        const LOOKS_MAX: u64 = 1 << 13;
        let (g, first) = (self.geometry, guest.start >> self.geometry.cluster_bits);
        let absent = Entry::Standard(Standard::default());
        let mut at = guest.start;
        let mut looks = 0;
        'alike: while at < guest.end && looks < LOOKS_MAX {
            let cluster = at >> g.cluster_bits;
            match self.known(cluster)? {
                Known::NoTable(clusters) if g.all_subclusters() & !alike(cluster - first, absent) == 0 => {
                    at = (cluster + clusters) << g.cluster_bits;
                    looks += 1;
                }
                Known::NoTable(_) | Known::NotInMemory => break,
                Known::Entries(words) => {
                    for (cluster, index) in (cluster..).zip(0..words.len() >> g.l2_words_bits()) {
                        if at >= guest.end {
                            break;
                        }
                        // What is wrong ends a run, and is an error to whoever begins one there.
                        let entry = Entry::parse(g, cluster, Words::get(g, words, index));
                        let bits = entry.map_or(0, |entry| alike(cluster - first, entry)) & g.all_subclusters();
                        let subcluster = at >> g.subcluster_bits();
                        let in_cluster = subcluster & ((1 << g.subclusters_bits()) - 1);
                        let count = u64::from((bits >> in_cluster).trailing_ones());
                        if count > 0 {
                            at = (subcluster + count) << g.subcluster_bits();
                        }
                        if in_cluster + count < 1 << g.subclusters_bits() {
                            break 'alike;
                        }
                        looks += 1;
                    }
                }
            }
        }
        Ok(at.min(guest.end) - guest.start)
    }

    /// True where only this entry uses the cluster at `host`.
    pub fn is_exclusive(&mut self, host: u64, copied: bool) -> Result<bool> {
        let cluster = self.geometry.host_cluster(host);
        Ok(copied || self.geometry.external_data || self.space()?.refs.get(cluster)? == 1)
    }

    /// Changes the entry of `cluster`, whose slice is in memory, and notes it. What the old one had
    /// is let go of.
    pub fn change_entry(&mut self, cluster: u64, words: Words, journal: &dyn Journal) -> Result<()> {
        if self.geometry.extended_l2 {
            journal.note(Change { table: TABLE_L2_BITMAPS, index: cluster, value: words.bitmap });
        }
        journal.note(Change { table: TABLE_L2, index: cluster, value: words.descriptor });
        let (geometry, old) = (self.geometry, self.put_entry(cluster, words));
        let used = |words| Entry::decode(geometry, cluster, words).map(|entry| entry.used(geometry));
        let (before, after) = (used(old)?, used(words)?);
        if let Some((at, len)) = before.filter(|_| before != after) {
            let (first, last) = (geometry.host_cluster(at), geometry.host_cluster(at + len - 1));
            self.end_use(Run { start: first, count: last - first + 1 });
        }
        Ok(())
    }

    /// One use of these clusters has ended, by a change that is not durable.
    fn end_use(&mut self, run: Run) {
        match planted(Fault::ReuseBeforeSettled) {
            true => self.awaiting.insert(0, (0, vec![run])),
            false => push_run(&mut self.freed, run),
        }
    }

    /// Changes the entry of `cluster` and returns the old one.
    pub fn put_entry(&mut self, cluster: u64, words: Words) -> Words {
        let (key, index) = (self.slice_key(cluster), self.in_slice(cluster));
        let slot = self.l2.get_mut(key).expect("a slice that is changed is in memory");
        let old = Words::get(self.geometry, &slot.entries, index);
        words.put(self.geometry, &mut slot.entries, index);
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

    /// How many notes one L2 entry takes: one a word.
    fn entry_notes(&self) -> usize {
        1 << self.geometry.l2_words_bits()
    }

    /// How many entries of the table of `cluster` may still be changed or promised to be.
    pub fn changes_left(&self, cluster: u64, journal: &dyn Journal) -> usize {
        let table = usize::from(self.needs_table(cluster));
        journal.room().saturating_sub(self.promised + table) / self.entry_notes()
    }

    /// True where the journal has room for an entry in a new table.
    pub fn has_notes_left(&self, journal: &dyn Journal) -> bool {
        journal.room().saturating_sub(self.promised) > self.entry_notes()
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
        self.promised += reserved.count as usize * self.entry_notes();
        self.reserved_by_id.insert(self.ids, reserved.first);
        self.reserved.insert(reserved.first, reserved);
        self.ids
    }

    /// Ends a reservation; `None` where it has ended before.
    pub fn take_reservation(&mut self, id: u64) -> Option<Reserved> {
        let first = self.reserved_by_id.remove(&id)?;
        let reserved = self.reserved.remove(&first).expect("both maps have the same reservations");
        self.promised -= reserved.count as usize * self.entry_notes();
        self.l2.unpin(self.slice_key(first));
        Some(reserved)
    }

    /// Gives the room of a reservation back, if it has not ended.
    pub fn drop_reservation(&mut self, id: u64) {
        let Some(reserved) = self.take_reservation(id).filter(|reserved| reserved.taken) else { return };
        let run = reserved.run(self.geometry);
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

    /// How many settles have ended.
    pub fn settles(&self) -> u64 {
        self.settles
    }

    /// What the first so many `settles` made durable that it was let go of is free now.
    pub fn release_awaiting(&mut self, settles: u64) {
        let Some(space) = &mut self.space else { return };
        let over = self.awaiting.partition_point(|(settle, _)| *settle <= settles);
        for run in self.awaiting.drain(..over).flat_map(|(_, runs)| runs) {
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
            self.settles += 1;
            self.awaiting.push((self.settles, settling.freed));
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
        let mut then = slot.entries.clone();
        let undo = self.settling.as_ref().map(|settling| &settling.undo).filter(|undo| !undo.is_empty());
        if let Some(undo) = undo.filter(|_| !planted(Fault::NewerEntries)) {
            for index in 0..1 << self.geometry.l2_slice_bits() {
                if let Some(old) = undo.get(&(first + index as u64)) {
                    old.put(self.geometry, &mut then, index);
                }
            }
        }
        table::encode(then, bytes);
    }

    /// The L1 table.
    pub fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// The table that is at `at` in the file by now, with these entries: those that there were, and more.
    pub fn set_l1(&mut self, at: u64, l1: Vec<u64>) -> Result<()> {
        (self.l1_at, self.l1) = (at, l1);
        self.own_tables()
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
