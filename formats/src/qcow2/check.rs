//! Counts what an image uses and compares it with its refcounts: leaks waste space, corruptions
//! lose data.
//!
//! Memory: four bytes a cluster of the file, and one table at a time.
use super::entry::{COPIED, Entry, Words, l2_table};
use super::geometry::Geometry;
use super::header::Header;
use super::read_header;
use super::refcounts::{Refcounts, Run};
use super::table;
use crate::error::{Context, Error, Result};
use crate::storage::Storage;
use std::sync::Arc;

/// Clusters that can be counted: a file of 16 TiB with the default cluster size.
const CLUSTERS_MAX: u64 = 1 << 28;
/// Problems that are told in words; the others are counted.
const PROBLEMS_MAX: usize = 100;
/// Slices of refcounts in memory.
const SLICES_MAX: usize = 64;
/// In a count of uses: a table is there, which nobody else may use.
const TABLE: u32 = 1 << 31;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// Clusters that are counted less often than they are used, and entries that are wrong.
    pub corruptions: u64,
    /// The first of both, in words.
    pub problems: Vec<String>,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters that have a place of their own.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
}

/// Checks the image in `storage`, which nobody writes to meanwhile.
///
/// # Errors
///
/// Where the image cannot be walked at all, or has internal snapshots or persistent bitmaps.
pub fn check(storage: &Arc<dyn Storage>) -> Result<Check> {
    let header = read_header(&**storage)?;
    if header.snapshots > 0 || header.bitmaps.is_some() {
        return Err(Error::unsupported(
            "a check of internal snapshots and persistent bitmaps is not supported: use `qemu-img check`",
        ));
    }
    let g = header.geometry;
    let len = storage.len().context(|| "asking for the file's length")?;
    let clusters = len.div_ceil(g.cluster_size());
    if clusters > CLUSTERS_MAX {
        return Err(Error::unsupported(format!("a file of {clusters} clusters is too large to be checked")));
    }
    let place = Run { start: g.host_cluster(header.reftable_offset), count: u64::from(header.reftable_clusters) };
    let refs = Refcounts::open(storage.clone(), g, place, SLICES_MAX)?;
    let found = Check { total_clusters: g.clusters(), ..Check::default() };
    let mut walk = Walk { storage: &**storage, header: &header, refs, uses: vec![0; clusters as usize], found };
    walk.walk()?;
    Ok(walk.found)
}

struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    refs: Refcounts,
    /// How often each cluster of the file is used, and `TABLE`.
    uses: Vec<u32>,
    found: Check,
}

impl Walk<'_> {
    fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    fn walk(&mut self) -> Result<()> {
        let header = self.header;
        self.uses_bytes("the header", 0, self.geometry().cluster_size(), TABLE);
        let reftable_bytes = u64::from(header.reftable_clusters) << self.geometry().cluster_bits;
        self.uses_bytes("the refcount table", header.reftable_offset, reftable_bytes, TABLE);
        for host in self.refs.blocks() {
            self.uses_bytes("a refcount block", host, self.geometry().cluster_size(), TABLE);
        }
        self.uses_bytes("the L1 table", header.l1_offset, u64::from(header.l1_entries) * 8, TABLE);
        self.walk_l1()?;
        self.compare()
    }

    fn walk_l1(&mut self) -> Result<()> {
        let entries = self.geometry().l1_entries() as usize;
        let l1 = table::read(self.storage, self.header.l1_offset, entries)
            .context(|| format!("reading the L1 table at {}", self.header.l1_offset))?;
        for (index, raw) in (0..).zip(l1) {
            match l2_table(self.geometry(), index, raw) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    self.uses_bytes("an L2 table", host, self.geometry().cluster_size(), TABLE);
                    self.check_copied(&format!("L1 entry {index}"), host, raw & COPIED != 0)?;
                    self.walk_l2(index, host)?;
                }
                Err(error) => self.corrupt(error.one_line()),
            }
        }
        Ok(())
    }

    fn walk_l2(&mut self, index: u64, host: u64) -> Result<()> {
        let g = self.geometry();
        let Ok(l2) = table::read(self.storage, host, g.cluster_size() as usize / 8) else {
            self.corrupt(format!("L2 table {index} at {host} cannot be read"));
            return Ok(());
        };
        for (cluster, nth) in ((index << g.l2_bits())..).zip(0..1 << g.l2_bits()) {
            match Entry::decode(g, cluster, Words::get(g, &l2, nth)) {
                Ok(entry) => self.walk_entry(cluster, entry)?,
                Err(error) => self.corrupt(error.one_line()),
            }
        }
        Ok(())
    }

    fn walk_entry(&mut self, cluster: u64, entry: Entry) -> Result<()> {
        if let Some((at, len)) = entry.used(self.geometry()) {
            self.uses_bytes("payload", at, len, 0);
        }
        match entry {
            Entry::Compressed { .. } => self.found.compressed_clusters += 1,
            Entry::Standard(standard) => match standard.host {
                None => return Ok(()),
                Some((_, copied)) if self.geometry().external_data => {
                    if !copied {
                        self.corrupt(format!("guest cluster {cluster}: the copied flag is missing"));
                    }
                }
                Some((host, copied)) => self.check_copied(&format!("guest cluster {cluster}"), host, copied)?,
            },
        }
        self.found.allocated_clusters += 1;
        Ok(())
    }

    fn uses_bytes(&mut self, what: &str, at: u64, len: u64, table: u32) {
        let bits = self.geometry().cluster_bits;
        let (first, last) = (at >> bits, (at + len.max(1) - 1) >> bits);
        // The last sectors of a compressed cluster may be beyond the end; a table or payload may not.
        for cluster in first..=last {
            match self.uses.get_mut(cluster as usize) {
                Some(uses) => *uses = ((*uses & !TABLE) + 1).min(TABLE - 1) | *uses & TABLE | table,
                None if len > 0 => self.corrupt(format!("{what} at {at} is past the end of the file")),
                None => {}
            }
        }
    }

    fn check_copied(&mut self, what: &str, host: u64, copied: bool) -> Result<()> {
        let count = self.refs.get(self.geometry().host_cluster(host))?;
        if copied != (count == 1) {
            self.corrupt(format!("{what}: the copied flag is {copied}, and the refcount of {host} is {count}"));
        }
        Ok(())
    }

    fn compare(&mut self) -> Result<()> {
        for cluster in 0..self.uses.len() {
            let uses = u64::from(self.uses[cluster] & !TABLE);
            if self.uses[cluster] & TABLE != 0 && uses > 1 {
                // Counted right, and all the same a guest could write to it.
                self.corrupt(format!("cluster {cluster} has a table and is used {uses} times"));
            }
            let count = self.refs.get(cluster as u64)?;
            if uses > 0 || count > 0 {
                self.found.image_end_offset = (cluster as u64 + 1) << self.geometry().cluster_bits;
            }
            if count > uses {
                self.found.leaks += 1;
                self.tell(format!("leak: cluster {cluster} is counted {count} times and used {uses} times"));
            } else if count < uses {
                self.corrupt(format!("cluster {cluster} is counted {count} times and used {uses} times"));
            }
        }
        Ok(())
    }

    fn corrupt(&mut self, problem: String) {
        self.found.corruptions += 1;
        self.tell(problem);
    }

    fn tell(&mut self, problem: String) {
        if self.found.problems.len() < PROBLEMS_MAX {
            self.found.problems.push(problem);
        }
    }
}
