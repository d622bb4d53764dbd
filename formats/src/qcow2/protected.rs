//! Clusters that hold what a wrong refcount must not let us overwrite.
use super::bitmaps;
use super::geometry::Geometry;
use super::header::{Header, autoclear};
use super::refcounts::Run;
use super::snapshots::{self, Snapshot};
use crate::error::Result;
use crate::storage::Storage;

/// Runs of clusters, in order, none touching the next.
pub struct Protected(Vec<Run>);

impl Protected {
    /// The header, the L1 tables of the guest's view and of the snapshots, the table that names those, and the
    /// tables of bitmaps.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let (g, snapshots) = (header.geometry, snapshots::read(storage, header)?);
        let l1 = |at, entries| run(g, at, u64::from(entries) * 8);
        let mut runs = vec![run(g, 0, g.cluster_size()), l1(header.l1_offset, header.l1_entries)];
        runs.push(run(g, header.snapshots_offset, snapshots::table_bytes(&snapshots)));
        // Without their autoclear bit nobody knows what they are; their refcounts protect them.
        if let Some(directory) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) {
            runs.push(run(g, directory.directory_offset, directory.directory_bytes));
            let all = bitmaps::read(storage, header)?;
            runs.extend(all.iter().map(|one| run(g, one.table_offset, u64::from(one.table_entries) * 8)));
        }
        runs.extend(snapshots.iter().map(|Snapshot { l1_offset, l1_entries, .. }| l1(*l1_offset, *l1_entries)));
        Ok(Self::new(runs))
    }

    /// These runs, in any order.
    pub fn new(mut runs: Vec<Run>) -> Self {
        runs.retain(|run| run.count > 0);
        runs.sort_unstable_by_key(|run| run.start);
        let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
        for run in runs {
            match joined.last_mut() {
                Some(last) if run.start <= last.start + last.count => {
                    last.count = last.count.max(run.start + run.count - last.start);
                }
                _ => joined.push(run),
            }
        }
        Self(joined)
    }

    /// The first of the clusters of `run` that is one of these.
    pub fn first_in(&self, run: Run) -> Option<u64> {
        let next = self.0.partition_point(|here| here.start + here.count <= run.start);
        let here = self.0.get(next).filter(|here| here.start < run.start + run.count)?;
        Some(here.start.max(run.start))
    }
}

fn run(geometry: Geometry, at: u64, len: u64) -> Run {
    Run { start: geometry.host_cluster(at), count: len.div_ceil(geometry.cluster_size()) }
}

#[cfg(test)]
mod tests {
    use super::{Protected, Run};

    #[test]
    fn what_overlaps_is_found_and_nothing_else() {
        let runs = [(7, 2), (0, 1), (3, 2), (4, 3), (20, 0), (9, 1)];
        let protected = Protected::new(runs.map(|(start, count)| Run { start, count }).to_vec());
        assert_eq!(protected.0, [Run { start: 0, count: 1 }, Run { start: 3, count: 7 }]);
        for start in 0..25 {
            for count in 1..8 {
                let expected = (start..start + count).find(|cluster| *cluster == 0 || (3..10).contains(cluster));
                assert_eq!(protected.first_in(Run { start, count }), expected, "{count} from {start}");
            }
        }
    }
}
