//! L2 tables as wholes: new ones, and those that snapshots share.
//!
//! In memory, an L1 entry has its copied flag exactly where the table is the guest's alone. A table
//! without it is never changed: the first change below it makes a copy, entries and all. What the
//! entries point at was counted once more when the snapshot was made, so a copy counts nothing.
//!
//! The copy is in the file before the journal or the L1 table name it, and durable before the L1 table
//! does in the file: `settle` flushes in between. The reference to the shared table is let go of by the
//! changed L1 entry, like a cluster by an L2 entry. Let go of earlier, the table could be given out
//! and overwritten while the file still points at it.
use super::{State, TABLE_L1};
use crate::error::{Error, Result};
use crate::journal::{Change, Journal};
use crate::qcow2::entry::{COPIED, l2_table};
use crate::qcow2::refcounts::Run;

impl State {
    /// Finds out which tables are the guest's alone.
    pub(super) fn own_tables(&mut self) -> Result<()> {
        for index in 0..self.l1.len() {
            let raw = self.l1[index];
            if raw & COPIED != 0 {
                continue;
            }
            let Some(host) = l2_table(self.geometry, index as u64, raw)? else { continue };
            let cluster = self.geometry.host_cluster(host);
            match self.space()?.refs.get(cluster)? {
                0 => {
                    return Err(Error::malformed(format!(
                        "the L2 table of L1 entry {index} has refcount 0: mend the image with `blkmirror check --repair all FILE`"
                    )));
                }
                1 => self.l1[index] |= COPIED,
                // Snapshots share it, or other entries of the same L1 table do.
                _ => {}
            }
        }
        Ok(())
    }

    /// True where a change of the entry of `cluster` needs a new table first, and so one more note.
    pub fn needs_table(&self, cluster: u64) -> bool {
        self.l1[self.l1_index(cluster)] & COPIED == 0
    }

    /// Sees to it that `cluster` has an L2 table of the guest's alone; its slice is in memory.
    pub fn ensure_table(&mut self, cluster: u64, journal: &dyn Journal) -> Result<()> {
        if !self.needs_table(cluster) {
            return Ok(());
        }
        let shared = self.table_at(cluster)?;
        let space = self.space()?;
        let table = match shared {
            Some(_) => space.take(1)?.run.start,
            None => space.take_table()?,
        };
        if let Err(error) = self.set_table(self.l1_index(cluster), table, shared) {
            self.space()?.release(Run { start: table, count: 1 })?;
            return Err(error);
        }
        let value = table << self.geometry.cluster_bits | COPIED;
        journal.note(Change { table: TABLE_L1, index: self.l1_index(cluster) as u64, value });
        if shared.is_none() {
            let slice = vec![0; self.geometry.slice_bytes() / 8];
            self.l2.insert(self.slice_key(cluster), slice.into_boxed_slice());
        }
        Ok(())
    }

    /// Takes back the table at `host`, as it was noted: the file's L1 table has an older one, or none.
    pub fn replay_table(&mut self, index: u64, host: u64) -> Result<()> {
        let cluster = self.geometry.host_cluster(host);
        let now = self.l1[index as usize];
        if now & !COPIED == host {
            // The file has it: as it was made at least, and with some of its entries perhaps.
            return Ok(());
        }
        if now & COPIED != 0 {
            return Err(Error::malformed(format!("the journal and the file have different L2 tables for {index}")));
        }
        // Nothing in the file points at it, so it can be made anew and get its notes again.
        let shared = l2_table(self.geometry, index, now)?;
        if shared.is_none() {
            self.space()?.clear(cluster, false)?;
        }
        self.set_table(index as usize, cluster, shared)
    }

    /// Puts the new table in `cluster` in place: an empty one, or a copy of the `shared` one.
    fn set_table(&mut self, index: usize, cluster: u64, shared: Option<u64>) -> Result<()> {
        if let Some(shared) = shared {
            let shared = self.geometry.host_cluster(shared);
            self.space()?.copy(shared, cluster)?;
            self.end_use(Run { start: shared, count: 1 });
        }
        self.l1[index] = cluster << self.geometry.cluster_bits | COPIED;
        self.l1_dirty.insert(index as u64);
        self.epoch += 1;
        Ok(())
    }
}
