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
use super::entry::{COPIED, Entry, Words, l2_table};
use super::state::{TABLE_L1, TABLE_L2, TABLE_L2_BITMAPS};
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
        let (mut tables, mut entries) = self.last(changes)?;
        // Of a growth that the kill cut short: nobody was told of it.
        tables.retain(|index, _| *index < self.geometry().l1_entries());
        entries.retain(|cluster, _| *cluster < self.geometry().clusters());
        self.check_replay(&tables, &entries)?;
        self.count_replayed(&tables, &entries)?;
        for (index, raw) in &tables {
            self.lock().replay_table(*index, *raw & !COPIED)?;
        }
        for (cluster, words) in &entries {
            let mut state = self.lock_with(*cluster)?;
            if state.needs_table(*cluster) {
                return Err(Error::malformed(format!(
                    "the journal has an entry for guest cluster {cluster}, which has no L2 table of its own"
                )));
            }
            state.put_entry(*cluster, *words);
        }
        self.lock().remember_unforgotten();
        Ok(())
    }

    /// What the L1 entries and the L2 entries that were noted came to in the end.
    fn last(&self, changes: &[Change]) -> Result<(BTreeMap<u64, u64>, BTreeMap<u64, Words>)> {
        let (mut tables, mut entries) = (BTreeMap::new(), BTreeMap::new());
        let mut bitmap = None;
        for Change { table, index, value } in changes.iter().copied() {
            let before = bitmap.take();
            match table {
                TABLE_L1 => _ = tables.insert(index, value),
                TABLE_L2_BITMAPS if self.geometry().extended_l2 => bitmap = Some((index, value)),
                TABLE_L2 if !self.geometry().extended_l2 => {
                    entries.insert(index, Words { descriptor: value, bitmap: 0 });
                }
                TABLE_L2 => {
                    let bitmap = before.filter(|(cluster, _)| *cluster == index).map(|(_, bitmap)| bitmap);
                    let bitmap = bitmap.ok_or_else(|| {
                        Error::malformed(format!(
                            "the journal has an entry for guest cluster {index} without its bitmap"
                        ))
                    })?;
                    entries.insert(index, Words { descriptor: value, bitmap });
                }
                _ => return Err(Error::malformed(format!("the journal has a change of table {table}, which is none"))),
            }
        }
        Ok((tables, entries))
    }

    /// All that is pointed at is inside the file.
    fn check_replay(&self, tables: &BTreeMap<u64, u64>, entries: &BTreeMap<u64, Words>) -> Result<()> {
        let len = self.storage.len().context(|| "asking for the file's length")?;
        let len = len.next_multiple_of(self.geometry().cluster_size());
        let wrong = |what: &str, index: u64, raw: u64| {
            Err(Error::malformed(format!("the journal does not fit the image: {what} {index} with {raw:#018x}")))
        };
        for (index, raw) in tables {
            match l2_table(self.geometry(), *index, *raw)? {
                Some(host) if host < len => {}
                _ => return wrong("L1 entry", *index, *raw),
            }
        }
        for (cluster, words) in entries {
            match Entry::decode(self.geometry(), *cluster, *words)? {
                Entry::Standard(_) if self.geometry().external_data => {}
                Entry::Standard(standard) if standard.host.is_none_or(|(host, _)| host < len) => {}
                Entry::Compressed { host, len: bytes } if host + u64::from(bytes) <= len => {}
                _ => return wrong("guest cluster", *cluster, words.descriptor),
            }
        }
        Ok(())
    }

    /// Counts everything that the changes point at, before a new refcount block could take its place.
    fn count_replayed(&self, tables: &BTreeMap<u64, u64>, entries: &BTreeMap<u64, Words>) -> Result<()> {
        // By host cluster: whether what we noted has it for itself.
        let (mut used, mut packed) = (BTreeMap::new(), Vec::new());
        let cluster = |host| self.geometry().host_cluster(host);
        for (index, raw) in tables {
            used.extend(l2_table(self.geometry(), *index, *raw)?.map(|host| (cluster(host), true)));
        }
        for (guest, words) in entries {
            let entry = Entry::decode(self.geometry(), *guest, *words)?;
            let alone = entry.standard().host.is_some_and(|(_, copied)| copied);
            match (entry, entry.used(self.geometry())) {
                (Entry::Compressed { .. }, Some((host, len))) => packed.extend(cluster(host)..=cluster(host + len - 1)),
                (_, found) => used.extend(found.map(|(host, _)| (cluster(host), alone))),
            }
        }
        let mut state = self.lock();
        let space = state.space()?;
        space.step_over(used.keys().chain(&packed).max().copied());
        // What we point at anew and is not compressed we have alone. A cluster that several shared before
        // may still be counted for all of them in the file; one of which some subclusters became zeroes is
        // still shared.
        used.into_iter().try_for_each(|(cluster, alone)| match alone {
            true => space.mark_used_alone(cluster),
            false => space.mark_used(cluster),
        })?;
        // How many share one that has compressed ones only the file knows, and whether it counted these
        // already nobody does: too high a count is a leak, nothing worse.
        packed.into_iter().try_for_each(|cluster| space.count_once_more(cluster))
    }
}
