//! What the journal kept through a kill comes back.
//!
//! The file has what was settled, and perhaps some of what an unfinished settle wrote. The notes
//! have everything committed since, the newest last. So each entry gets its last note, and what
//! an entry points at is counted before anything else is given out. A cluster that an entry let
//! go of before the kill leaks.
//!
//! Nothing is noted again: the journal still has the notes and keeps them until the next settle is
//! done, which does not turn it and tells it to forget.
use super::Shared;
use super::entry::{COPIED, Entry, l2_table};
use super::state::{TABLE_L1, TABLE_L2};
use crate::error::{Context, Error, Result};
use crate::journal::Change;
use std::collections::BTreeMap;

impl Shared {
    /// Takes back `changes`. Called before anything else that writes.
    pub(super) fn replay(&self, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        let last = |table| -> BTreeMap<u64, u64> {
            changes.iter().filter(|change| change.table == table).map(|change| (change.index, change.value)).collect()
        };
        let (tables, entries) = (last(TABLE_L1), last(TABLE_L2));
        if let Some(change) = changes.iter().find(|change| ![TABLE_L1, TABLE_L2].contains(&change.table)) {
            return Err(Error::malformed(format!("the journal has a change of table {}, which is none", change.table)));
        }
        self.check_replay(&tables, &entries)?;
        self.count_replayed(&tables, &entries)?;
        for (index, raw) in &tables {
            self.replay_table(*index, *raw)?;
        }
        for (cluster, raw) in &entries {
            let mut state = self.lock_with(*cluster)?;
            if state.table_at(*cluster)?.is_none() {
                return Err(Error::malformed(format!(
                    "the journal has an entry for guest cluster {cluster}, which has no L2 table"
                )));
            }
            state.put_entry(*cluster, *raw);
        }
        self.lock().remember_unforgotten();
        Ok(())
    }

    /// All indices are inside their tables, and all that is pointed at is inside the file.
    fn check_replay(&self, tables: &BTreeMap<u64, u64>, entries: &BTreeMap<u64, u64>) -> Result<()> {
        let len = self.storage.len().context(|| "asking for the file's length")?;
        let len = len.next_multiple_of(self.geometry.cluster_size());
        let wrong = |what: &str, index: u64, raw: u64| {
            Err(Error::malformed(format!("the journal does not fit the image: {what} {index} with {raw:#018x}")))
        };
        for (index, raw) in tables {
            let known = *index < self.geometry.l1_entries();
            match known.then(|| l2_table(self.geometry, *index, *raw)).transpose()?.flatten() {
                Some(host) if host < len => {}
                _ => return wrong("L1 entry", *index, *raw),
            }
        }
        for (cluster, raw) in entries {
            let known = *cluster < self.geometry.clusters();
            match known.then(|| Entry::decode(self.geometry, *cluster, *raw)).transpose()? {
                Some(Entry::Absent | Entry::Zero { kept: None }) => {}
                Some(Entry::Data { host, .. } | Entry::Zero { kept: Some((host, _)) }) if host < len => {}
                Some(Entry::Compressed { host, len: bytes }) if host + u64::from(bytes) <= len => {}
                _ => return wrong("guest cluster", *cluster, *raw),
            }
        }
        Ok(())
    }

    /// Counts everything that the changes point at, before a new refcount block could take its place.
    fn count_replayed(&self, tables: &BTreeMap<u64, u64>, entries: &BTreeMap<u64, u64>) -> Result<()> {
        let (mut used, mut packed) = (Vec::new(), Vec::new());
        for (index, raw) in tables {
            used.extend(l2_table(self.geometry, *index, *raw)?);
        }
        for (cluster, raw) in entries {
            let entry = Entry::decode(self.geometry, *cluster, *raw)?;
            match (entry, entry.used(self.geometry)) {
                (Entry::Compressed { .. }, Some((host, len))) => {
                    packed.extend(self.geometry.host_cluster(host)..=self.geometry.host_cluster(host + len - 1));
                }
                (_, used_by_one) => used.extend(used_by_one.map(|(host, _)| host)),
            }
        }
        used.sort_unstable();
        used.dedup();
        let clusters: Vec<u64> = used.into_iter().map(|host| self.geometry.host_cluster(host)).collect();
        let mut state = self.lock();
        let space = state.space()?;
        space.step_over(clusters.iter().chain(&packed).max().copied());
        // Clusters that are not compressed we point at alone, always. What several shared before may still
        // be counted for all of them in the file.
        clusters.into_iter().try_for_each(|cluster| space.mark_used_alone(cluster))?;
        // How many share one that has compressed ones only the file knows, and whether it counted these
        // already nobody does: too high a count is a leak, nothing worse.
        packed.into_iter().try_for_each(|cluster| space.count_once_more(cluster))
    }

    /// Puts back an L2 table that was new when it was noted.
    fn replay_table(&self, index: u64, raw: u64) -> Result<()> {
        let mut state = self.lock();
        let host = raw & !COPIED;
        match state.l1_entry(index) {
            // The file has it: as zeroes at least, and with some of its entries perhaps.
            Some(now) if now & !COPIED == host => return Ok(()),
            Some(0) => {}
            _ => {
                return Err(Error::malformed(format!("the journal and the file have different L2 tables for {index}")));
            }
        }
        // Nothing in the file points at it, so it can be made anew from zeroes and its notes.
        state.space()?.clear(self.geometry.host_cluster(host), false)?;
        state.set_table(index as usize, host);
        Ok(())
    }
}
