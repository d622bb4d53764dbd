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
            self.lock().replay_table(*index, *raw & !COPIED)?;
        }
        for (cluster, raw) in &entries {
            let mut state = self.lock_with(*cluster)?;
            if state.needs_table(*cluster) {
                return Err(Error::malformed(format!(
                    "the journal has an entry for guest cluster {cluster}, which has no L2 table of its own"
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
                _ => return wrong("guest cluster", *cluster, *raw),
            }
        }
        Ok(())
    }

    /// Counts everything that the changes point at, before a new refcount block could take its place.
    fn count_replayed(&self, tables: &BTreeMap<u64, u64>, entries: &BTreeMap<u64, u64>) -> Result<()> {
        let mut used = Vec::new();
        for (index, raw) in tables {
            used.extend(l2_table(self.geometry, *index, *raw)?);
        }
        for (cluster, raw) in entries {
            let entry = Entry::decode(self.geometry, *cluster, *raw)?;
            used.extend(entry.used(self.geometry).map(|(host, _)| host));
        }
        used.sort_unstable();
        used.dedup();
        let clusters: Vec<u64> = used.into_iter().map(|host| self.geometry.host_cluster(host)).collect();
        let mut state = self.lock();
        let space = state.space()?;
        space.step_over(clusters.last().copied());
        // We note what we point at alone, always. A cluster that several shared before, compressed ones
        // for instance, may still be counted for all of them in the file.
        clusters.into_iter().try_for_each(|cluster| space.mark_used_alone(cluster))
    }
}
