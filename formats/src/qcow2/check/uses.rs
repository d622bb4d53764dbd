//! How often each cluster of the file is used, and as what.
use crate::error::{Error, Result};
use crate::qcow2::geometry::Geometry;
use std::ops::Range;

/// Clusters that can be counted: a file of 16 TiB with the default cluster size, 1 GiB of memory.
const CLUSTERS_MAX: u64 = 1 << 28;

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

/// The uses of all clusters.
pub struct Uses {
    bits: u32,
    file_len: u64,
    slots: Vec<u32>,
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
        Ok(Self { bits: geometry.cluster_bits, file_len, slots: vec![0; len as usize + 1], len })
    }

    /// Clusters that are looked at: those of the file, and one more where something ends there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// One past the last cluster that is used.
    pub fn end(&self) -> u64 {
        self.slots.iter().rposition(|slot| slot & COUNT > 0).map_or(0, |last| last as u64 + 1)
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
        for slot in &mut self.slots[first as usize..=last as usize] {
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
        let end = clusters.end.min(self.slots.len() as u64) as usize;
        self.slots.get(clusters.start as usize..end).is_none_or(|slots| slots.iter().all(|slot| slot & COUNT == 0))
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

    /// Remembers whether the refcount of `cluster` is one.
    pub fn set_counted_once(&mut self, cluster: u64, once: bool) {
        if let Some(slot) = self.slots.get_mut(cluster as usize) {
            *slot = if once { *slot | COUNTED_ONCE } else { *slot & !COUNTED_ONCE };
        }
    }

    /// Whether the refcount of `cluster` is one; `None` where nobody looked.
    pub fn is_counted_once(&self, cluster: u64) -> Option<bool> {
        (cluster < self.len).then(|| self.slot(cluster).is_some_and(|slot| slot & COUNTED_ONCE != 0))
    }

    fn slot(&self, cluster: u64) -> Option<u32> {
        self.slots.get(usize::try_from(cluster).ok()?).copied()
    }
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
}
