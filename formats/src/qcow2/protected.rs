//! Clusters that hold what a wrong refcount must not let us overwrite: the tables that were there when the
//! image was opened. Tables that were made since were counted by ourselves.
use super::bitmaps;
use super::geometry::Geometry;
use super::header::{Header, autoclear};
use super::refcounts::Run;
use super::snapshots::{self, Snapshot};
use crate::error::Result;
use crate::storage::Storage;

/// Clusters that are never given out, whatever their refcounts say.
pub struct Protected {
    /// Tables that stay: in order, none touching the next.
    runs: Vec<Run>,
    /// Tables that may be given back: in order.
    tables: Vec<u64>,
}

impl Protected {
    /// The header, the L1 tables of the guest's view and of the snapshots, the table that names those, and the
    /// tables of bitmaps; until they are given back the refcount table too, and the L2 tables and refcount
    /// blocks at `tables` (offsets in the file). Takes as much memory as what names those, at most 40 MiB.
    pub fn read(storage: &dyn Storage, header: &Header, tables: impl Iterator<Item = u64>) -> Result<Self> {
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
        let reftable = g.host_cluster(header.reftable_offset);
        let reftable = reftable..reftable + u64::from(header.reftable_clusters);
        Ok(Self::new(runs, reftable.chain(tables.map(|at| g.host_cluster(at))).collect()))
    }

    fn new(mut runs: Vec<Run>, mut tables: Vec<u64>) -> Self {
        tables.sort_unstable();
        tables.dedup();
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
        Self { runs: joined, tables }
    }

    /// The first of the clusters of `run` that is one of these.
    pub fn first_in(&self, run: Run) -> Option<u64> {
        let end = run.start + run.count;
        let next = self.runs.partition_point(|here| here.start + here.count <= run.start);
        let stays = self.runs.get(next).map(|here| here.start.max(run.start));
        let next = self.tables.partition_point(|table| *table < run.start);
        let table = self.tables.get(next).copied();
        stays.into_iter().chain(table).min().filter(|first| *first < end)
    }

    /// Nothing points at the table in the clusters of `run` any more, which was to stay.
    pub fn let_go(&mut self, run: Run) {
        let end = run.start + run.count;
        let left = self.runs.iter().flat_map(|here| {
            let here_end = here.start + here.count;
            [(here.start, here_end.min(run.start)), (here.start.max(end), here_end)]
        });
        let left = left.filter(|(start, end)| start < end);
        self.runs = left.map(|(start, end)| Run { start, count: end - start }).collect();
    }

    /// Nothing points at the table in `cluster` any more.
    pub fn give_back(&mut self, cluster: u64) {
        if let Ok(at) = self.tables.binary_search(&cluster) {
            self.tables.remove(at);
        }
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
        let runs = runs.map(|(start, count)| Run { start, count }).to_vec();
        let mut protected = Protected::new(runs, vec![15, 12, 15, 8]);
        assert_eq!(protected.runs, [Run { start: 0, count: 1 }, Run { start: 3, count: 7 }]);
        assert_overlaps(&protected, &[0, 3, 4, 5, 6, 7, 8, 9, 12, 15]);
        [15, 8, 13].into_iter().for_each(|cluster| protected.give_back(cluster));
        assert_overlaps(&protected, &[0, 3, 4, 5, 6, 7, 8, 9, 12]);
        [(5, 2), (9, 3), (20, 1)].into_iter().for_each(|(start, count)| protected.let_go(Run { start, count }));
        assert_overlaps(&protected, &[0, 3, 4, 7, 8, 12]);
    }

    fn assert_overlaps(protected: &Protected, clusters: &[u64]) {
        for start in 0..25 {
            for count in 1..8 {
                let expected = (start..start + count).find(|cluster| clusters.contains(cluster));
                assert_eq!(protected.first_in(Run { start, count }), expected, "{count} from {start}");
            }
        }
    }
}
