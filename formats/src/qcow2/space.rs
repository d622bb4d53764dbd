//! Which clusters of the file are free, and how it grows.
//!
//! ```text
//!  0                             frontier            end of the file
//!  ├── in use, with free runs ──────┼── never used yet ──┤ … grown in long steps
//! ```
//!
//! Runs that were given back are used first where they are long enough, then what is beyond the
//! frontier. Free runs that nobody gave back in this process (another program left them) are found
//! by a cursor: one slice of refcounts each time that the file would have to grow.
use super::fault::{Fault, planted};
use super::geometry::Geometry;
use super::protected::Protected;
use super::refcounts::{Refcounts, Run};
use crate::error::{Context, Error, Result};
use crate::storage::Storage;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How many free runs are remembered; the cursor finds the others later.
const FREE_RUNS_MAX: usize = 1 << 16;
/// How many free runs one allocation looks at.
const LOOKS_MAX: usize = 32;
/// How many slices of refcounts are read on opening, to find the last cluster in use.
const OPENING_SLICES_MAX: u64 = 4096;
/// How many clusters beyond the frontier may be found in use before the image is called malformed.
const STRAYS_MAX: u64 = 1 << 20;
/// The file grows by a sixteenth, within these bounds.
const STEP_CLUSTERS_MIN: u64 = 1024;
const STEP_BYTES_MAX: u64 = 1 << 30;

/// Clusters that were taken: their refcount is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Which.
    pub run: Run,
    /// They read as zeroes.
    pub zeroed: bool,
}

/// The space of an image's file.
pub struct Space {
    /// How often each cluster is used.
    pub refs: Refcounts,
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    /// Length of the file.
    file_len: u64,
    /// Length of the file when it was opened: what is behind reads as zeroes until it is taken.
    opened_len: u64,
    /// Nothing from here on is in use.
    frontier: u64,
    /// Runs of free clusters in front of the frontier.
    free: BTreeMap<u64, u64>,
    free_clusters: u64,
    /// Where the search for a free run goes on.
    next_fit: u64,
    /// The next slice of refcounts to look for free runs in.
    cursor: u64,
    /// Some free runs were more than can be remembered: the cursor has to go round again.
    forgot: bool,
    /// Where the next compressed cluster may be packed: inside a cluster that is in use.
    packed_to: Option<u64>,
    protected: Protected,
    /// Where refcount tables were: in use until the header that names the new place is durable.
    pub retired: Vec<Run>,
}

impl Space {
    /// The space of a file with these refcounts.
    pub fn open(storage: Arc<dyn Storage>, geometry: Geometry, refs: Refcounts, protected: Protected) -> Result<Self> {
        let file_len = storage.len().context(|| "asking for the file's length")?;
        let mut space = Self {
            refs,
            storage,
            geometry,
            file_len,
            opened_len: file_len,
            frontier: file_len.div_ceil(geometry.cluster_size()),
            free: BTreeMap::new(),
            free_clusters: 0,
            next_fit: 0,
            cursor: 0,
            forgot: false,
            packed_to: None,
            protected,
            retired: Vec::new(),
        };
        space.frontier = space.last_used(0)?;
        Ok(space)
    }

    /// One past the last cluster in use from `floor` on, or a little more.
    fn last_used(&mut self, floor: u64) -> Result<u64> {
        let bits = self.geometry.block_slice_bits();
        let mut end = self.frontier;
        let mut reads = 0;
        while end > floor && reads < OPENING_SLICES_MAX {
            let start = ((end - 1) >> bits << bits).max(floor);
            let block_bits = self.geometry.block_bits();
            if !self.refs.has_block(start) {
                // Clusters that no block can count are skipped in one go: a sparse file may be huge.
                let block_start = (end - 1) >> block_bits << block_bits;
                end = block_start.min(self.refs.clusters_max()).max(floor);
                continue;
            }
            reads += 1;
            for cluster in (start..end).rev() {
                if self.refs.get(cluster)? != 0 {
                    return Ok(cluster + 1);
                }
            }
            end = start;
        }
        Ok(end)
    }

    /// Takes up to `wanted` clusters in one run.
    pub fn take(&mut self, wanted: u64) -> Result<Taken> {
        if let Some(run) = self.take_free(wanted, wanted)? {
            return Ok(Taken { run, zeroed: false });
        }
        let grows = (self.frontier + wanted) << self.geometry.cluster_bits > self.file_len;
        if grows {
            self.look_for_free()?;
            // Where much is free in short runs, growing would make the file ever thicker.
            let wanted_min = if self.free_clusters > self.frontier / 8 { 1 } else { wanted };
            if let Some(run) = self.take_free(wanted, wanted_min)? {
                return Ok(Taken { run, zeroed: false });
            }
        }
        self.take_beyond(wanted)
    }

    /// Takes room for `len` bytes, fewer than a cluster has: behind those that were taken last where that
    /// can be. Each cluster that they touch is counted once more.
    pub fn take_bytes(&mut self, len: u64) -> Result<u64> {
        let (bits, mask) = (self.geometry.cluster_bits, self.geometry.cluster_size() - 1);
        let open = match self.packed_to.take() {
            Some(at) if self.refs.get(at >> bits)? < self.geometry.refcount_max() => Some(at),
            _ => None,
        };
        let fits = |at: &u64| (at & mask) + len <= mask + 1;
        let at = match open {
            Some(at) if fits(&at) => {
                self.count_once_more(at >> bits)?;
                at
            }
            _ => {
                let start = self.take(1)?.run.start;
                match open.filter(|at| (at >> bits) + 1 == start) {
                    Some(at) => {
                        self.count_once_more(at >> bits)?;
                        at
                    }
                    None => start << bits,
                }
            }
        };
        self.packed_to = Some(at + len).filter(|end| end & mask != 0);
        Ok(at)
    }

    /// Raises the refcount of `cluster`, unless it is as high as it can be.
    pub fn count_once_more(&mut self, cluster: u64) -> Result<()> {
        self.ensure_block(cluster)?;
        let count = self.refs.get(cluster)?;
        if count == 0 {
            self.forget_free(cluster, 1);
        }
        self.refs.set(cluster, (count + 1).min(self.geometry.refcount_max()))
    }

    /// Takes one cluster for a table and sees to it that it reads as zeroes.
    pub fn take_table(&mut self) -> Result<u64> {
        let taken = self.take(1)?;
        let cleared = self.clear(taken.run.start, taken.zeroed);
        if cleared.is_err() {
            // Nothing points at it. Who writes tries again, and would leave one more behind each time.
            self.release(taken.run)?;
        }
        cleared.map(|()| taken.run.start)
    }

    /// Takes `count` clusters in one run.
    pub fn take_run(&mut self, count: u64) -> Result<Run> {
        let run = self.advance(count, count)?;
        (run.start..run.start + count).try_for_each(|cluster| self.mark_used(cluster))?;
        Ok(run)
    }

    /// Zeroes a cluster, unless it is `zeroed`. Nothing in the file may point at it.
    pub fn clear(&mut self, cluster: u64, zeroed: bool) -> Result<()> {
        if zeroed || planted(Fault::TableNotCleared) {
            return Ok(());
        }
        let at = cluster << self.geometry.cluster_bits;
        let zeroes = vec![0; self.geometry.cluster_size() as usize];
        self.storage.write_at(at, &zeroes).context(|| format!("clearing a new table at {at}"))
    }

    /// Copies a cluster to one that nothing in the file points at.
    pub fn copy(&mut self, from: u64, to: u64) -> Result<()> {
        let (from, to) = (from << self.geometry.cluster_bits, to << self.geometry.cluster_bits);
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        self.storage.read_at(from, &mut bytes).context(|| format!("reading the shared L2 table at {from}"))?;
        self.storage.write_at(to, &bytes).context(|| format!("writing the copy of an L2 table at {to}"))
    }

    fn take_free(&mut self, wanted: u64, wanted_min: u64) -> Result<Option<Run>> {
        let long_enough = |(_, count): &(&u64, &u64)| **count >= wanted_min;
        let ahead = self.free.range(self.next_fit..).chain(self.free.range(..self.next_fit));
        let Some((start, count)) = ahead.take(LOOKS_MAX).find(long_enough).map(|(start, count)| (*start, *count))
        else {
            return Ok(None);
        };
        let run = Run { start, count: count.min(wanted) };
        self.check_unprotected(run)?;
        self.free.remove(&start);
        self.free_clusters -= count;
        if run.count < count {
            self.free.insert(start + run.count, count - run.count);
            self.free_clusters += count - run.count;
        }
        self.next_fit = start + run.count;
        self.refs.fill(run, 1)?;
        Ok(Some(run))
    }

    fn take_beyond(&mut self, wanted: u64) -> Result<Taken> {
        // The new block moves the frontier, now and then into one more that does not exist.
        while !self.refs.has_block(self.frontier) {
            self.ensure_block(self.frontier)?;
        }
        let bits = self.geometry.block_bits();
        // The next block does not exist yet; a shorter run is as good.
        let block_end = ((self.frontier >> bits) + 1) << bits;
        let run = self.advance(1, wanted.min(block_end - self.frontier))?;
        self.refs.fill(run, 1)?;
        Ok(Taken { run, zeroed: self.is_new(run.start) })
    }

    fn is_new(&self, cluster: u64) -> bool {
        cluster << self.geometry.cluster_bits >= self.opened_len
    }

    /// Moves the frontier over a run of at least `min` free clusters, at most `max`.
    fn advance(&mut self, min: u64, max: u64) -> Result<Run> {
        let mut run = Run { start: self.frontier, count: 0 };
        let mut strays = 0;
        while run.count < max {
            let at = run.start + run.count;
            let (free, more) = self.refs.free_run(at, max - run.count)?;
            run.count += free;
            if more {
                continue;
            }
            if run.count >= min {
                break;
            }
            // Clusters beyond the end of the file that are counted: step over them.
            strays += free + 1;
            if strays > STRAYS_MAX {
                return Err(Error::malformed("the refcounts count clusters far beyond the end of the file"));
            }
            run = Run { start: at + free + 1, count: 0 };
        }
        self.check_unprotected(run)?;
        self.grow(run.start + run.count)?;
        self.frontier = run.start + run.count;
        Ok(run)
    }

    /// Sees to it that the file has the clusters below `end`.
    fn grow(&mut self, end: u64) -> Result<()> {
        let len = end.checked_mul(self.geometry.cluster_size()).filter(|len| *len <= 1 << 55);
        let len = len.ok_or_else(|| Error::malformed("the file would grow beyond 2^55 bytes"))?;
        if len <= self.file_len {
            return Ok(());
        }
        let step = (self.file_len / 16).max(STEP_CLUSTERS_MIN << self.geometry.cluster_bits).min(STEP_BYTES_MAX);
        let ahead = (len + step) & !(self.geometry.cluster_size() - 1);
        // A file system may have a limit between the two.
        let grown = match self.storage.set_len(ahead) {
            Ok(()) => ahead,
            Err(_) => {
                self.storage.set_len(len).context(|| format!("growing the file to {len} bytes"))?;
                len
            }
        };
        self.file_len = grown;
        Ok(())
    }

    /// Gives nothing out up to `cluster` that is not known to be free.
    pub fn step_over(&mut self, cluster: Option<u64>) {
        self.frontier = cluster.map_or(0, |cluster| cluster + 1).max(self.frontier);
    }

    /// Makes the refcount of `cluster` one if nobody counted it.
    pub fn mark_used(&mut self, cluster: u64) -> Result<()> {
        self.ensure_block(cluster)?;
        if self.refs.get(cluster)? == 0 {
            self.forget_free(cluster, 1);
            self.refs.set(cluster, 1)?;
        }
        Ok(())
    }

    /// Makes the refcount of `cluster` one, whatever the file says: a count that was lowered before a
    /// kill may not have reached it.
    pub fn mark_used_alone(&mut self, cluster: u64) -> Result<()> {
        self.mark_used(cluster)?;
        self.refs.set(cluster, 1)
    }

    /// Sees to it that `cluster` can be counted. A new block comes to the frontier and may be the
    /// one that counts itself.
    fn ensure_block(&mut self, cluster: u64) -> Result<()> {
        if cluster >= self.refs.clusters_max() {
            self.grow_table(cluster)?;
        }
        if self.refs.has_block(cluster) {
            return Ok(());
        }
        let place = self.advance(1, 1)?.start;
        self.clear(place, self.is_new(place))?;
        self.refs.add_block(cluster, place << self.geometry.cluster_bits);
        self.mark_used(place)
    }

    /// Moves the refcount table to where it can be long enough to count `cluster`.
    fn grow_table(&mut self, cluster: u64) -> Result<()> {
        let entries = (cluster.max(self.frontier) >> self.geometry.block_bits()) + 1;
        let old = self.refs.place();
        let needed = (entries * 8).div_ceil(self.geometry.cluster_size());
        let max = Geometry::REFTABLE_BYTES_MAX >> self.geometry.cluster_bits;
        // It counts its own clusters too, so there has to be a margin.
        let count = (needed.max(old.count) + needed / 2 + 1).min(max);
        if needed > max || count <= old.count {
            return Err(Error::invalid("the image is full: its refcount table has 8 MiB already"));
        }
        let place = self.advance(count, count)?;
        self.retired.push(self.refs.move_table(place));
        for cluster in place.start..place.start + place.count {
            self.mark_used(cluster)?;
        }
        Ok(())
    }

    /// Takes one reference from each cluster of `run`; what has none left is free.
    pub fn release(&mut self, run: Run) -> Result<()> {
        for cluster in run.start..run.start + run.count {
            match self.refs.get(cluster)? {
                // Somebody else's mistake, which a check finds; the cluster is not ours to give out.
                0 => {}
                1 => {
                    self.refs.set(cluster, 0)?;
                    self.remember_free(cluster, 1);
                    self.protected.give_back(cluster);
                    // It may be anything soon.
                    self.packed_to = self.packed_to.filter(|at| at >> self.geometry.cluster_bits != cluster);
                }
                more => self.refs.set(cluster, more - 1)?,
            }
        }
        Ok(())
    }

    fn remember_free(&mut self, start: u64, count: u64) {
        if self.free.len() >= FREE_RUNS_MAX {
            self.forgot = true;
            return;
        }
        let (mut start, mut count) = (start, count);
        self.free_clusters += count;
        if let Some((before, len)) = self.free.range(..start).next_back().map(|(before, len)| (*before, *len))
            && before + len == start
        {
            (start, count) = (before, len + count);
        }
        if let Some(len) = self.free.remove(&(start + count)) {
            count += len;
        }
        self.free.insert(start, count);
    }

    /// Takes what is known of the clusters from `start` on out of the free runs.
    fn forget_free(&mut self, start: u64, count: u64) {
        let end = start + count;
        while let Some((run, len)) = self.free.range(..end).next_back().map(|(run, len)| (*run, *len)) {
            if run + len <= start {
                break;
            }
            self.free.remove(&run);
            self.free_clusters -= len;
            for (start, end) in [(run, start), (end, run + len)] {
                if start < end {
                    self.free.insert(start, end - start);
                    self.free_clusters += end - start;
                }
            }
        }
    }

    /// Looks for free runs in the next slice of refcounts.
    fn look_for_free(&mut self) -> Result<()> {
        let bits = self.geometry.block_slice_bits();
        while self.cursor << bits < self.frontier {
            let (start, end) = (self.cursor << bits, ((self.cursor + 1) << bits).min(self.frontier));
            self.cursor += 1;
            if !self.refs.has_block(start) {
                continue;
            }
            self.forget_free(start, end - start);
            let mut at = start;
            while at < end {
                let (free, _) = self.refs.free_run(at, end - at)?;
                if free > 0 {
                    self.remember_free(at, free);
                }
                at += free + 1;
            }
            return Ok(());
        }
        if self.forgot && self.free.len() < FREE_RUNS_MAX / 2 {
            (self.cursor, self.forgot) = (0, false);
        }
        Ok(())
    }

    /// No table is in these clusters any more that was there when the image was opened.
    pub fn unprotect(&mut self, run: Run) {
        self.protected.let_go(run);
    }

    fn check_unprotected(&self, run: Run) -> Result<()> {
        match self.protected.first_in(run) {
            None => Ok(()),
            Some(cluster) => Err(Error::malformed(format!(
                "the refcount of the header or of a table is 0 in the clusters from {cluster} on"
            ))),
        }
    }

    /// Cuts off what the file was grown by and nothing uses.
    pub fn trim_end(&mut self) -> Result<()> {
        let floor = self.opened_len.div_ceil(self.geometry.cluster_size());
        let used = self.last_used(floor.min(self.frontier))?.max(floor);
        let len = used << self.geometry.cluster_bits;
        if len < self.file_len {
            self.storage.set_len(len).context(|| format!("cutting the file to {len} bytes"))?;
            self.file_len = len;
        }
        if self.frontier > used {
            self.forget_free(used, self.frontier - used);
            self.frontier = used;
        }
        Ok(())
    }
}
