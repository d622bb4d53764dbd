//! How often each cluster of the file is used, and as what.
use crate::error::{Error, Result};
use crate::qcow2::geometry::Geometry;
use std::ops::Range;

/// Clusters that can be counted: a file of 16 TiB with the default cluster size; at most 1 GiB of memory.
const CLUSTERS_MAX: u64 = 1 << 28;
/// Slots come in runs of 2 to this clusters: 1 KiB, made when the first of them is used.
const RUN_BITS: u32 = 8;

// A slot: what the cluster is used as, whether its refcount is one, and how often it is used.
const ALONE: u32 = 1 << 31;
const TABLE: u32 = 1 << 30;
const PAYLOAD: u32 = 1 << 29;
const COUNTED_ONCE: u32 = 1 << 28;
const COUNT: u32 = COUNTED_ONCE - 1;

/// What uses a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// What exactly one place may point at: the header, an L1 table, refcounts, bitmaps.
    Alone,
    /// An L2 table, which snapshots may share.
    L2,
    /// Bytes of a guest.
    Payload,
}

type Slots = [u32; 1 << RUN_BITS];

/// The uses of all clusters.
pub struct Uses {
    bits: u32,
    file_len: u64,
    /// `None` where nothing uses any of the run's clusters.
    runs: Vec<Option<Box<Slots>>>,
    len: u64,
}

impl Uses {
    /// No uses of a file of `file_len` bytes.
    pub fn new(geometry: Geometry, file_len: u64) -> Result<Self> {
        let len = file_len.div_ceil(geometry.cluster_size());
        if len > CLUSTERS_MAX {
            return Err(Error::unsupported(format!("a file of {len} clusters is too large to be checked")));
        }
        // The last cluster may begin in the file and end one further.
        let runs = (len + 1).div_ceil(1 << RUN_BITS) as usize;
        Ok(Self { bits: geometry.cluster_bits, file_len, runs: vec![None; runs], len })
    }

    /// Clusters that are looked at: those of the file, and one more where something ends there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// One past the last cluster that is used.
    pub fn end(&self) -> u64 {
        let last = (0..self.runs.len() as u64).rev().find_map(|run| {
            let in_run = self.run(run)?.iter().rposition(|slot| slot & COUNT > 0)?;
            Some((run << RUN_BITS) + in_run as u64)
        });
        last.map_or(0, |last| last + 1)
    }

    /// Adds `times` uses of the `len` bytes at `at`. False where they end a cluster or more past the file:
    /// then nothing is counted.
    pub fn add(&mut self, at: u64, len: u64, user: User, times: u64) -> bool {
        if len == 0 {
            return true;
        }
        let end = at.saturating_add(len);
        if end >= self.file_len.saturating_add(1 << self.bits) {
            return false;
        }
        let kind = match user {
            User::Alone => ALONE,
            User::L2 => TABLE,
            User::Payload => PAYLOAD,
        };
        let (first, last) = (at >> self.bits, (end - 1) >> self.bits);
        for cluster in first..=last {
            let run = self.runs[(cluster >> RUN_BITS) as usize].get_or_insert_with(|| Box::new([0; 1 << RUN_BITS]));
            let slot = &mut run[in_run(cluster)];
            let count = u64::from(*slot & COUNT).saturating_add(times).min(u64::from(COUNT));
            *slot = *slot & !COUNT | kind | count as u32;
        }
        self.len = self.len.max(last + 1);
        true
    }

    /// How often `cluster` is used.
    pub fn count(&self, cluster: u64) -> u64 {
        self.slot(cluster).map_or(0, |slot| u64::from(slot & COUNT))
    }

    /// True where nothing uses any of `clusters`.
    pub fn none_in(&self, clusters: Range<u64>) -> bool {
        let mut at = clusters.start;
        while at < clusters.end {
            match self.run(at >> RUN_BITS) {
                None => at = ((at >> RUN_BITS) + 1) << RUN_BITS,
                Some(run) if run[in_run(at)] & COUNT == 0 => at += 1,
                Some(_) => return false,
            }
        }
        true
    }

    /// True where `cluster` has a table and is something else besides, or a table that is used twice and
    /// may not be.
    pub fn overlaps(&self, cluster: u64) -> bool {
        self.slot(cluster).is_some_and(|slot| match slot & (ALONE | TABLE | PAYLOAD) {
            ALONE => slot & COUNT > 1,
            kinds => kinds.count_ones() > 1,
        })
    }

    /// True where all of the `len` bytes at `at` belong to tables and to nothing else, so that changing an
    /// entry there changes nothing else. An L1 table is `Alone`.
    pub fn is_only(&self, at: u64, len: u64, user: User) -> bool {
        let (first, last) = (at >> self.bits, (at + len.max(1) - 1) >> self.bits);
        let kind = if user == User::Alone { ALONE } else { TABLE };
        (first..=last).all(|cluster| {
            self.slot(cluster).is_some_and(|slot| slot & (ALONE | TABLE | PAYLOAD) == kind) && !self.overlaps(cluster)
        })
    }

    /// Remembers whether the refcount of `cluster` is one, if anything uses it or one of its neighbours.
    pub fn set_counted_once(&mut self, cluster: u64, once: bool) {
        if let Some(Some(run)) = self.runs.get_mut((cluster >> RUN_BITS) as usize) {
            let slot = &mut run[in_run(cluster)];
            *slot = if once { *slot | COUNTED_ONCE } else { *slot & !COUNTED_ONCE };
        }
    }

    /// Whether the refcount of `cluster` is one; `None` where nobody looked or remembered.
    pub fn is_counted_once(&self, cluster: u64) -> Option<bool> {
        let slot = self.slot(cluster).filter(|_| cluster < self.len)?;
        Some(slot & COUNTED_ONCE != 0)
    }

    fn slot(&self, cluster: u64) -> Option<u32> {
        Some(self.run(cluster >> RUN_BITS)?[in_run(cluster)])
    }

    fn run(&self, run: u64) -> Option<&Slots> {
        self.runs.get(usize::try_from(run).ok()?)?.as_deref()
    }
}

/// The number of `cluster` in its run.
fn in_run(cluster: u64) -> usize {
    (cluster & ((1 << RUN_BITS) - 1)) as usize
}

#[cfg(test)]
mod tests {
    use super::{User, Uses};
    use crate::qcow2::geometry::Geometry;

    fn uses(file_len: u64) -> Uses {
        Uses::new(Geometry::new(3, 16, 4, 1 << 30).expect("valid"), file_len).expect("small")
    }

    #[test]
    fn the_last_cluster_may_end_past_the_file_by_less_than_a_cluster() {
        let mut uses = uses(0x2_8000);
        assert_eq!(uses.len(), 3);
        assert!(uses.add(0x2_0000, 0x1_0000, User::Payload, 1));
        assert!(uses.add(0x2_7e00, 0x1_0000, User::Payload, 1));
        assert_eq!((uses.len(), uses.count(2), uses.count(3)), (4, 2, 1));
        assert!(!uses.add(0x2_8000, 0x1_0000, User::Payload, 1), "a whole cluster past the end");
        assert!(!uses.add(u64::MAX - 9, 9, User::Payload, 1));
        assert_eq!(uses.count(3), 1);
    }

    #[test]
    fn what_may_share_a_cluster() {
        let mut uses = uses(0x10_0000);
        let mut add = |cluster: u64, user| assert!(uses.add(cluster << 16, 1, user, 1));
        for (cluster, users) in [
            (0, &[User::Alone][..]),
            (1, &[User::Alone, User::Alone]),
            (2, &[User::L2, User::L2]),
            (3, &[User::L2, User::Payload]),
            (4, &[User::Payload, User::Payload]),
            (5, &[User::Alone, User::Payload]),
        ] {
            users.iter().for_each(|user| add(cluster, *user));
        }
        let overlaps: Vec<u64> = (0..6).filter(|cluster| uses.overlaps(*cluster)).collect();
        assert_eq!(overlaps, [1, 3, 5]);
        assert!(uses.is_only(2 << 16, 1 << 16, User::L2) && !uses.is_only(2 << 16, 2 << 16, User::L2));
        assert!(uses.is_only(0, 1 << 16, User::Alone) && !uses.is_only(1 << 16, 8, User::Alone));
    }

    #[test]
    fn counts_never_run_over() {
        let mut uses = uses(0x10_0000);
        assert!(uses.add(0, 1, User::Alone, u64::MAX));
        assert!(uses.add(0, 1, User::Alone, 7));
        assert_eq!(uses.count(0), u64::from(super::COUNT));
        assert_eq!(uses.is_counted_once(0), Some(false));
    }

    #[test]
    fn clusters_that_nothing_uses_take_no_memory() {
        let mut uses = uses((super::CLUSTERS_MAX - 1) << 16);
        let made = |uses: &Uses| uses.runs.iter().flatten().count();
        uses.set_counted_once(70_000, true);
        assert_eq!((made(&uses), uses.is_counted_once(70_000), uses.end()), (0, None, 0));
        for at in [0, 255 << 16, 1 << 40] {
            assert!(uses.add(at, 0x2_0000, User::Payload, 1));
        }
        assert_eq!((made(&uses), uses.end()), (3, (1 << 24) + 2));
        assert!(uses.none_in(257..1 << 24) && !uses.none_in(0..257) && !uses.none_in(257..(1 << 24) + 1));
    }
}
