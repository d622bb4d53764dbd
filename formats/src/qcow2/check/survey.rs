//! Walks every table of an image and counts what it uses.
//!
//! ```text
//! header ─► active L1 ──┐
//!        ─► snapshots ──┴► L2 tables, each once ─► payload
//!        ─► bitmaps ─► their tables ─► their bits
//!        ─► refcount table ─► refcount blocks
//! ```
//!
//! This is the one place that knows what can point at a cluster. Refcount blocks come last: a block
//! that anything else uses is unusable.
use super::counts::BLOCK_RESERVED;
use super::entry::{L1_RESERVED, Seen};
use super::uses::{User, Uses};
use super::{Check, read_table};
use crate::error::{Context, Error, Result};
use crate::qcow2::entry::{OFFSET, Words};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::refcounts::Run;
use crate::qcow2::{bitmaps, snapshots};
use crate::storage::Storage;
use std::collections::BTreeMap;

/// L2 tables that can be remembered.
const TABLES_MAX: usize = 1 << 24;
/// Entries that are remembered to be mended in one go.
const CROOKED_MAX: usize = 1 << 20;
/// Places past the end of the file that are remembered.
pub const PAST_MAX: usize = 1 << 20;

/// Which tables are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    Everything,
    /// Without the refcounts: what new ones have to count.
    WithoutRefcounts,
}

/// How many entries of L1 tables lead to an L2 table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visits {
    /// Those of the active one.
    pub active: u64,
    /// All of them.
    pub all: u64,
    /// The index of the first.
    pub index: u64,
}

/// What was seen on the way.
pub struct Survey<'a> {
    pub storage: &'a dyn Storage,
    pub header: &'a Header,
    pub uses: Uses,
    pub found: Check,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// By offset in the file.
    pub tables: BTreeMap<u64, Visits>,
    /// Where entries are that have no payload and keep no cluster's start.
    pub crooked: Vec<u64>,
    /// Clusters past the end of the file that something points at.
    pub past: Vec<Run>,
    /// New refcounts have to be made before any of the old ones can be changed.
    pub refcounts_unusable: bool,
    /// Bytes of tables that may still be read.
    bytes_left: u64,
}

impl<'a> Survey<'a> {
    /// Walks the tables of `scope`.
    pub fn take(storage: &'a dyn Storage, header: &'a Header, scope: Scope) -> Result<Self> {
        let file_len = storage.len().context(|| "asking for the file's length")?;
        let mut survey = Self {
            storage,
            header,
            uses: Uses::new(header.geometry, file_len)?,
            found: Check { total_clusters: header.geometry.clusters(), ..Check::default() },
            l1: Vec::new(),
            tables: BTreeMap::new(),
            crooked: Vec::new(),
            past: Vec::new(),
            refcounts_unusable: false,
            // Tables do not overlap: all of them have less bytes than the file. Broken ones may overlap a little.
            bytes_left: file_len.saturating_mul(2).saturating_add(64 << 20),
        };
        survey.walk(scope)?;
        Ok(survey)
    }

    /// How the image is cut.
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    fn walk(&mut self, scope: Scope) -> Result<()> {
        let header = self.header;
        self.add("the header", 0, self.geometry().cluster_size(), User::Alone, 1);
        self.walk_active_l1()?;
        self.walk_snapshots()?;
        self.walk_l2_tables()?;
        if header.autoclear & autoclear::BITMAPS != 0 {
            self.walk_bitmaps()?;
        }
        if scope == Scope::Everything {
            self.walk_refcounts()?;
        }
        Ok(())
    }

    fn walk_active_l1(&mut self) -> Result<()> {
        let (at, entries) = (self.header.l1_offset, self.header.l1_entries);
        self.add("the L1 table", at, u64::from(entries) * 8, User::Alone, 1);
        self.l1 = self.read(at, u64::from(entries))?;
        let l1 = std::mem::take(&mut self.l1);
        self.note_tables("the L1 table", &l1, Visits { active: 1, all: 1, index: 0 })?;
        self.l1 = l1;
        Ok(())
    }

    fn walk_snapshots(&mut self) -> Result<()> {
        let header = self.header;
        let all = snapshots::read(self.storage, header)?;
        let mut l1s: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for snapshot in all.iter().filter(|snapshot| snapshot.l1_entries > 0) {
            *l1s.entry((snapshot.l1_offset, snapshot.l1_entries)).or_default() += 1;
        }
        for ((at, entries), times) in l1s {
            self.add("a snapshot's L1 table", at, u64::from(entries) * 8, User::Alone, times);
            let l1 = self.read(at, u64::from(entries))?;
            self.note_tables("a snapshot's L1 table", &l1, Visits { active: 0, all: times, index: 0 })?;
        }
        self.add("the snapshot table", header.snapshots_offset, snapshots::table_bytes(&all), User::Alone, 1);
        Ok(())
    }

    /// Counts the L2 tables that an L1 table leads to.
    fn note_tables(&mut self, what: &str, l1: &[u64], visits: Visits) -> Result<()> {
        for (index, raw) in l1.iter().enumerate() {
            if raw & L1_RESERVED != 0 {
                self.found
                    .corrupt(visits.all, || format!("{what}: entry {index} is {raw:#018x}: reserved bits are set"));
            }
            let host = raw & OFFSET;
            // QEMU takes the header for an L2 table where only a flag is set.
            if host == 0 {
                continue;
            }
            let table = self.tables.entry(host).or_insert(Visits { index: index as u64, ..Visits::default() });
            table.active += visits.active;
            table.all += visits.all;
            if self.tables.len() > TABLES_MAX {
                return Err(Error::unsupported(format!("more than {TABLES_MAX} L2 tables are too many to be checked")));
            }
        }
        Ok(())
    }

    fn walk_l2_tables(&mut self) -> Result<()> {
        let tables = std::mem::take(&mut self.tables);
        for (host, visits) in &tables {
            let inside = self.add("an L2 table", *host, self.geometry().cluster_size(), User::L2, visits.all);
            if host & (self.geometry().cluster_size() - 1) != 0 {
                self.found.corrupt(visits.all, || format!("an L2 table at {host}: this is not a cluster's start"));
            }
            if inside {
                self.walk_l2(*host, *visits)?;
            }
        }
        self.tables = tables;
        Ok(())
    }

    fn walk_l2(&mut self, table: u64, visits: Visits) -> Result<()> {
        let geometry = self.geometry();
        let entries = self.read(table, geometry.cluster_size() / 8)?;
        let mut next = None;
        for index in 0..1 << geometry.l2_bits() {
            let words = Words::get(geometry, &entries, index as usize);
            let seen = Seen::new(geometry, words);
            let told = |what| move || entry_words(table, index, words, what);
            for what in seen.wrong.into_iter().flatten() {
                self.found.corrupt(visits.all, told(what));
            }
            if seen.crooked_and_empty && self.crooked.len() < CROOKED_MAX {
                self.crooked.push(table + (index << geometry.l2_words_bits()) * 8);
            }
            let Some((at, len)) = seen.place else { continue };
            self.count_fragments(seen, at, &mut next, visits.active);
            let guest = ((visits.index << geometry.l2_bits()) + index) << geometry.cluster_bits;
            if seen.is_misplaced(geometry, guest) {
                self.found.corrupt(visits.all, told("its offset in the external data file is not its guest offset"));
            }
            if !geometry.external_data && !self.count(at, len, User::Payload, visits.all) {
                self.found.corrupt(visits.all, told("it points past the end of the file"));
            }
        }
        Ok(())
    }

    fn count_fragments(&mut self, seen: Seen, at: u64, next: &mut Option<u64>, active: u64) {
        self.found.allocated_clusters += active;
        if seen.compressed {
            self.found.compressed_clusters += active;
            self.found.fragmented_clusters += active;
            return;
        }
        if next.is_some_and(|next| next != at) {
            self.found.fragmented_clusters += active;
        }
        *next = Some(at + self.geometry().cluster_size());
    }

    fn walk_bitmaps(&mut self) -> Result<()> {
        let header = self.header;
        let Some(extension) = header.bitmaps else { return Ok(()) };
        let all = bitmaps::read(self.storage, header)?;
        self.add("the bitmap directory", extension.directory_offset, extension.directory_bytes, User::Alone, 1);
        for bitmap in all {
            let bytes = u64::from(bitmap.table_entries) * 8;
            self.spend(bytes)?;
            self.add("a bitmap's table", bitmap.table_offset, bytes, User::Alone, 1);
            for entry in bitmaps::read_table(self.storage, header, &bitmap)? {
                if entry & OFFSET != 0 {
                    self.add("a bitmap's bits", entry, self.geometry().cluster_size(), User::Alone, 1);
                }
            }
        }
        Ok(())
    }

    fn walk_refcounts(&mut self) -> Result<()> {
        let header = self.header;
        let bytes = u64::from(header.reftable_clusters) << self.geometry().cluster_bits;
        self.refcounts_unusable |= !self.add("the refcount table", header.reftable_offset, bytes, User::Alone, 1);
        let table = self.read(header.reftable_offset, bytes / 8)?;
        for (index, entry) in table.into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
            if let Some(what) = self.walk_block(entry) {
                self.refcounts_unusable = true;
                self.found.corrupt(1, || format!("refcount table: entry {index} is {entry:#018x}: {what}"));
            }
        }
        // Somebody else's cluster, known only now that everything is counted.
        let clusters = header.reftable_offset >> self.geometry().cluster_bits;
        let clusters = clusters..clusters + u64::from(header.reftable_clusters);
        self.refcounts_unusable |= clusters.into_iter().any(|cluster| self.uses.overlaps(cluster));
        Ok(())
    }

    /// Counts a refcount block; says what is wrong with its entry in the table.
    fn walk_block(&mut self, entry: u64) -> Option<&'static str> {
        if entry & BLOCK_RESERVED != 0 {
            return Some("reserved bits are set");
        }
        if entry & (self.geometry().cluster_size() - 1) != 0 {
            return Some("its block is not at a cluster's start");
        }
        let cluster = self.geometry().host_cluster(entry);
        if cluster >= self.uses.len() {
            self.count(entry, self.geometry().cluster_size(), User::Alone, 1);
            return Some("its block is past the end of the file");
        }
        self.uses.add(entry, self.geometry().cluster_size(), User::Alone, 1);
        (self.uses.count(cluster) != 1).then_some("something else uses its block")
    }

    /// Counts a use; false, and a corruption, where it is past the end of the file.
    fn add(&mut self, what: &str, at: u64, len: u64, user: User, times: u64) -> bool {
        let inside = self.count(at, len, user, times);
        if !inside {
            self.found.corrupt(times, || format!("{what} at {at} is past the end of the file"));
        }
        inside
    }

    fn count(&mut self, at: u64, len: u64, user: User, times: u64) -> bool {
        let inside = self.uses.add(at, len, user, times);
        if !inside && self.past.len() < PAST_MAX {
            let (first, last) = (self.geometry().host_cluster(at), self.geometry().host_cluster(at + len - 1));
            self.past.push(Run { start: first, count: last - first + 1 });
        }
        inside
    }

    fn read(&mut self, at: u64, entries: u64) -> Result<Vec<u64>> {
        self.spend(entries * 8)?;
        read_table(self.storage, at, entries as usize)
    }

    /// Bounds the time: what overlaps could be read for ever.
    fn spend(&mut self, bytes: u64) -> Result<()> {
        let left = self.bytes_left.checked_sub(bytes);
        self.bytes_left = left.ok_or_else(|| {
            Error::malformed("the image has more bytes of tables than its file: they overlap, and cannot be checked")
        })?;
        Ok(())
    }
}

fn entry_words(table: u64, index: u64, words: Words, what: &str) -> String {
    let Words { descriptor, bitmap } = words;
    let subclusters = if bitmap == 0 { String::new() } else { format!(" with bitmap {bitmap:#018x}") };
    format!("L2 table at {table}: entry {index} is {descriptor:#018x}{subclusters}: {what}")
}
