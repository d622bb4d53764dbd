//! What sessions and copiers of one job share: the two disks, the bitmap, the limits.
mod entrusted;
mod lateness;
mod missed;
mod verification;

pub use verification::{Check, Outcome, Verified};

pub use entrusted::{Entrusted, TargetTask};
pub use lateness::PATIENCE;

use crate::bell::Bell;
use crate::courtesy::{Courtesy, Done};
use crate::dirty::{Claim, DirtyBitmap, Which};
use crate::disk::Disk;
use crate::fault::{self, planted};
use crate::planes::Planes;
use crate::rate::Rate;
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use entrusted::Queue;
use formats::error::{Error, Result};
use formats::image::Zeroing;
use formats::range::ByteRange;
use lateness::Lateness;
use missed::Missed;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use verification::Verification;

/// One mirror: a source that guests write to, and a target that follows.
pub struct Mirror {
    /// The disk that the guest has.
    pub source: Arc<Disk>,
    /// The disk that it will have.
    pub target: Arc<Disk>,
    /// What the target lacks.
    pub dirty: DirtyBitmap,
    /// What a kill must not make it forget beside that.
    pub planes: Planes,
    /// Only what the source's top layer holds is copied; the target has the rest below it.
    pub shallow: bool,
    /// What becomes of the target's space where the source reads as zeroes.
    pub zeroing: Zeroing,
    /// Bytes of a cluster of the target, where what is copied is compressed; chunks are whole clusters then.
    pub compress: Option<u32>,
    /// How long a guest's write waits for the target.
    pub patience: Duration,
    /// How fast copiers may be.
    pub rate: Rate,
    /// How fast guests may write, for a bound of the job.
    pub brake: Rate,
    /// What they leave to guests.
    pub courtesy: Courtesy,
    /// What has been done.
    pub stats: Stats,
    /// Wakes copiers: there is something to copy, or they may go on.
    pub work: Bell,
    /// Wakes the job: something ended.
    pub progress: Bell,
    /// Wakes guest requests that wait for a claim.
    released: Bell,
    /// Wakes copiers: something was entrusted to them.
    errands: Bell,
    entrusted: Queue,
    write_both: AtomicBool,
    compare: AtomicBool,
    shares: AtomicBool,
    held: AtomicBool,
    /// There may be marks where the guest has not written.
    cold: AtomicBool,
    /// Claims that copiers took so far, and those that they hold.
    taken: AtomicU64,
    claims: AtomicU64,
    /// How many claims copiers may hold at a time.
    runs_max: AtomicU64,
    fault: Mutex<Option<Fault>>,
    /// Whether something that failed is tried again, by one copy at a time.
    probe: AtomicBool,
    /// How many copies have said since the start that what had failed is possible again.
    answers: AtomicU64,
    missed: Mutex<Missed>,
    /// Bytes of that.
    missed_len: AtomicU64,
    lateness: Lateness,
    verification: Mutex<Verification>,
    /// Whether it may go on.
    verifies: AtomicBool,
}

/// Counters, in bytes unless they say otherwise.
#[derive(Debug, Default)]
pub struct Stats {
    /// Brought over by copiers: data and zeroes.
    pub copied: AtomicU64,
    /// Of that, what shares the source's blocks.
    pub shared: AtomicU64,
    /// Of that, what was written to the target as data.
    pub written: AtomicU64,
    /// Written to the target together with the source.
    pub written_both: AtomicU64,
    /// Claimed by copiers now.
    pub underway: AtomicU64,
    /// In chunks that the seeder marked: what the disk had to bring over.
    pub seeded: AtomicU64,
    /// In chunks that were marked anew since, mostly by the guest's writes.
    pub dirtied: AtomicU64,
    /// Written by the guest.
    pub guest: AtomicU64,
    /// How many writes that were.
    pub guest_writes: AtomicU64,
    /// How long guest writes waited for the mirror in all, in nanoseconds: for a copier's claim, and for the target
    /// where both sides are written.
    pub delay_ns: AtomicU64,
}

impl Stats {
    /// A guest's write has waited so long for the mirror.
    pub fn delayed(&self, wait: Duration) {
        self.delay_ns.fetch_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// One side failed; copying rests until the job has decided.
#[derive(Debug)]
pub struct Fault {
    /// The target failed; else the source.
    pub target: bool,
    /// How.
    pub error: Error,
}

impl Mirror {
    /// A mirror whose bitmap is clean, in background mode; zeroes become holes.
    pub fn new(source: Arc<Disk>, target: Arc<Disk>, chunk_bits: u32, shallow: bool) -> Self {
        let dirty = DirtyBitmap::new(source.size(), chunk_bits);
        Self::on((dirty, Planes::default()), source, target, shallow)
    }

    /// A mirror whose bitmap is there already.
    pub fn on((dirty, planes): (DirtyBitmap, Planes), source: Arc<Disk>, target: Arc<Disk>, shallow: bool) -> Self {
        Self {
            source,
            target,
            dirty,
            planes,
            shallow,
            zeroing: Zeroing::Unmap,
            compress: None,
            patience: PATIENCE,
            rate: Rate::default(),
            brake: Rate::default(),
            courtesy: Courtesy::default(),
            stats: Stats::default(),
            work: Bell::default(),
            progress: Bell::default(),
            released: Bell::default(),
            errands: Bell::default(),
            entrusted: Queue::default(),
            write_both: AtomicBool::new(false),
            compare: AtomicBool::new(false),
            shares: AtomicBool::new(false),
            held: AtomicBool::new(false),
            cold: AtomicBool::new(true),
            taken: AtomicU64::new(0),
            claims: AtomicU64::new(0),
            runs_max: AtomicU64::new(u64::MAX),
            fault: Mutex::default(),
            probe: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            missed: Mutex::default(),
            missed_len: AtomicU64::new(0),
            lateness: Lateness::default(),
            verification: Mutex::default(),
            verifies: AtomicBool::new(false),
        }
    }

    /// The part of `range` that is of whole clusters, where the target's are compressed; its start is one's.
    pub fn whole(&self, range: ByteRange) -> ByteRange {
        match self.compress {
            Some(len) if range.end < self.source.size() => {
                ByteRange { start: range.start, end: range.end / u64::from(len) * u64::from(len) }
            }
            _ => range,
        }
    }

    /// `range`, and what it lacks to whole clusters, where the target's are compressed.
    pub fn completed(&self, range: ByteRange) -> ByteRange {
        let len = self.compress.map_or(1, u64::from);
        ByteRange { start: range.start, end: range.end.next_multiple_of(len).min(self.source.size()) }
    }

    /// Called when the source has a guest's write, or failed at it, and before the guest hears.
    pub fn written(&self, range: ByteRange) {
        if self.cold.load(Ordering::Relaxed) {
            self.dirty.heat(range);
        }
        self.stats.dirtied.fetch_add(self.dirty.mark(range), Ordering::Relaxed);
        self.work.ring();
    }

    /// Called at a job's start for what the source has.
    pub fn seed(&self, range: ByteRange) {
        self.stats.seeded.fetch_add(self.dirty.mark(range), Ordering::Relaxed);
        self.cold.store(true, Ordering::Relaxed);
        self.work.ring();
    }

    /// Bytes that the target lacks, as far as is known: marked, or on their way.
    pub fn backlog(&self) -> u64 {
        self.dirty.marked_bytes() + self.stats.underway.load(Ordering::Relaxed)
    }

    /// Bytes of memory for what is known of its chunks.
    pub fn bitmap_memory(&self) -> u64 {
        self.dirty.memory() + self.planes.memory()
    }

    /// Bytes of memory that the tables of both disks' images take at most.
    pub fn tables_memory(&self) -> u64 {
        let layers =
            |disk: &Disk| disk.chain().layers().iter().map(|layer| layer.image.tables_memory_max()).sum::<u64>();
        layers(&self.source) + layers(&self.target)
    }

    /// Begins to settle the target; `end_settle` hears what came of it.
    pub fn begin_settle(&self) -> TargetTask {
        self.planes.turn();
        if planted(fault::Fault::ForgetBeforeSettled) {
            self.planes.settled();
        }
        self.flush_target()
    }

    /// A settle of the target is over. True where some of what was written is in doubt all the same, and is marked.
    pub fn end_settle(&self, outcome: Result<()>) -> Result<bool> {
        outcome?;
        let doubt = self.mark_doubtful();
        self.planes.settled();
        Ok(doubt)
    }

    /// Leaves in order: both sides are durable, and nobody writes to them any more. True where the planes are to be
    /// made durable now.
    pub fn leave(&self) -> bool {
        self.mark_doubtful();
        self.planes.leave()
    }

    /// Marks what the target may have lost before its flush that is just over. True where there is any.
    pub fn mark_doubtful(&self) -> bool {
        let disk = ByteRange { start: 0, end: self.source.size() };
        let doubtful = self.target.take_doubtful();
        let doubtful: Vec<ByteRange> = doubtful.into_iter().map(|range| range.intersect(disk)).collect();
        doubtful.iter().filter(|range| !range.is_empty()).for_each(|range| self.written(*range));
        !doubtful.is_empty()
    }

    /// Whether guest writes go to the target as well, where the copy has been already.
    pub fn write_both(&self) -> bool {
        self.write_both.load(Ordering::Acquire) && !self.has_fallen_back()
    }

    /// Changes that for requests that come from now on.
    pub fn set_write_both(&self, on: bool) {
        if self.write_both.swap(on, Ordering::AcqRel) != on {
            self.courtesy.forget();
        }
    }

    /// Whether copies look at the target first and write only what differs.
    pub fn compares(&self) -> bool {
        self.compare.load(Ordering::Acquire)
    }

    /// From now on they do, or not any more.
    pub fn set_compare(&self, on: bool) {
        self.compare.store(on, Ordering::Release);
        if !on {
            self.planes.compared();
        }
    }

    /// Whether copies share blocks with the source instead of moving them, where both are on one file system.
    pub fn shares(&self) -> bool {
        self.shares.load(Ordering::Relaxed)
    }

    /// From now on they try to, or not any more. Only where the target is a raw file.
    pub fn set_shares(&self, on: bool) {
        self.shares.store(on, Ordering::Relaxed);
    }

    /// Copiers start nothing new while this is set; what is under way ends.
    pub fn hold(&self, on: bool) {
        self.held.store(on, Ordering::Release);
        self.work.ring();
    }

    /// True where copiers have to rest: on somebody's wish, or because of a fault.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire) || self.fault().is_some()
    }

    /// One side failed: the first fault counts, and copying rests until `clear_fault`. Guests write to a target that
    /// failed no more, before the job is asked.
    pub fn fail(&self, target: bool, error: Error) {
        if target {
            self.set_write_both(false);
        }
        self.fault().get_or_insert(Fault { target, error });
        self.progress.ring();
    }

    /// `range` could not be brought over, and is marked again.
    pub fn miss(&self, range: ByteRange) {
        let chunk = self.dirty.chunk_len();
        let end = range.end.next_multiple_of(chunk).min(self.source.size());
        let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        missed.add(ByteRange { start: range.start / chunk * chunk, end });
        self.missed_len.store(missed.len(), Ordering::SeqCst);
    }

    /// `range` was brought over; `changed` where the target had to be written for that.
    fn hit(&self, range: ByteRange, changed: bool) {
        let answers = match self.missed_len() {
            0 => changed,
            _ => {
                let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
                let found = missed.remove(range);
                self.missed_len.store(missed.len(), Ordering::SeqCst);
                found
            }
        };
        if answers {
            self.answers.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Bytes that could not be brought over and were not since; never 0 where there are any.
    pub fn missed_len(&self) -> u64 {
        self.missed_len.load(Ordering::SeqCst)
    }

    /// Nothing is marked and nothing claimed, so nothing is missing.
    pub fn forget_missed(&self) {
        if self.missed_len() > 0 {
            *self.missed.lock().unwrap_or_else(PoisonError::into_inner) = Missed::default();
            self.missed_len.store(0, Ordering::SeqCst);
        }
    }

    /// Has copiers try again what failed, one copy at a time; or go on as before.
    pub fn set_probe(&self, on: bool) {
        self.probe.store(on, Ordering::SeqCst);
        self.work.ring();
    }

    /// What is tried again, if something is: what failed, or anything.
    pub fn probe(&self) -> Option<ByteRange> {
        let everything = ByteRange { start: 0, end: self.source.size() };
        let first = || self.missed.lock().unwrap_or_else(PoisonError::into_inner).first();
        self.probe.load(Ordering::SeqCst).then(|| first().unwrap_or(everything))
    }

    /// How many copies have said since the start that what had failed is possible again.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::SeqCst)
    }

    /// How many copies may be under way at a time.
    pub fn set_runs_max(&self, runs_max: u64) {
        self.runs_max.store(runs_max.max(1), Ordering::SeqCst);
        self.work.ring();
    }

    /// The side that failed (true: the target), the system's number and the words of the fault that stands.
    pub fn standing_fault(&self) -> Option<(bool, Option<i32>, String)> {
        self.fault().as_ref().map(|Fault { target, error }| (*target, error.raw_os_error(), error.one_line()))
    }

    /// The fault, if there is one; copiers go on.
    pub fn clear_fault(&self) -> Option<Fault> {
        let fault = self.fault().take();
        self.work.ring();
        fault
    }

    /// True where a fault waits for a decision.
    pub fn has_fault(&self) -> bool {
        self.fault().is_some()
    }

    /// Whether a copier may start something at `now`; else how long to wait.
    pub fn may_copy(&self, now: Duration) -> std::result::Result<(), Duration> {
        self.rate.check(now)?;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.courtesy.check(now, Done { copied: count(&self.stats.copied), dirtied: count(&self.stats.dirtied) })
    }

    /// A copier has started to bring `count` bytes.
    pub fn spend(&self, count: u64) {
        self.rate.spend(count);
        self.courtesy.spend(count);
    }

    /// A copier's next claim in `within`; its marks are cleared.
    pub fn take(&self, within: ByteRange, chunks_max: u64) -> Option<Claim> {
        self.take_by(|dirty| dirty.take(within, chunks_max, Which::Any))
    }

    /// A copier's next claim from `cursor` on, and then from the disk's start; its marks are cleared. First what the guest
    /// leaves alone: what it goes on writing to would have to be copied again and again.
    pub fn take_next(&self, cursor: u64, chunks_max: u64) -> Option<Claim> {
        let size = self.source.size();
        let parts = [cursor.min(size), 0].map(|start| ByteRange { start, end: size });
        self.take_by(|dirty| {
            let find = |which| parts.iter().find_map(|within| dirty.take(*within, chunks_max, which));
            if self.cold.load(Ordering::Relaxed) {
                let found = find(Which::Cold);
                if found.is_some() {
                    return found;
                }
                // The seeder may mark some at this moment: then those have no precedence, that is all.
                self.cold.store(false, Ordering::Relaxed);
            }
            find(Which::Any)
        })
    }

    fn take_by(&self, find: impl FnOnce(&DirtyBitmap) -> Option<Claim>) -> Option<Claim> {
        let claim = self.counted(|| find(&self.dirty)).map(|claim| match self.compress {
            // A cluster is compressed as one.
            Some(_) => {
                let range = self.dirty.claimed(&claim);
                claim.lacking_all(range)
            }
            None => claim,
        });
        if let Some(claim) = &claim {
            self.stats.underway.fetch_add(claim.lacking_len(), Ordering::Relaxed);
        }
        claim
    }

    /// A claim, where a copier may have one more and finds one.
    fn counted<T>(&self, find: impl FnOnce() -> Option<T>) -> Option<T> {
        // Counted first, so that nobody who looks for claims misses one: see `is_settled`.
        let others = self.claims.fetch_add(1, Ordering::SeqCst);
        let runs_max = if self.probe.load(Ordering::SeqCst) { 1 } else { self.runs_max.load(Ordering::SeqCst) };
        // Where there are as many already, whoever puts one of the others rings.
        let found = (others < runs_max.min(self.courtesy.runs())).then(|| {
            self.taken.fetch_add(1, Ordering::SeqCst);
            find()
        });
        let found = found.flatten();
        if found.is_none() {
            self.claims.fetch_sub(1, Ordering::SeqCst);
        }
        found
    }

    /// A copier is done with a claim; `brought` where the target was changed. What `failed` is marked again first.
    pub fn put(&self, claim: Claim, brought: bool, failed: bool) {
        if failed && !planted(fault::Fault::NoMarkAgain) {
            claim.lacking().iter().for_each(|range| _ = self.dirty.mark(*range));
        }
        self.stats.underway.fetch_sub(claim.lacking_len(), Ordering::Relaxed);
        self.put_counted(claim, brought, failed);
    }

    /// The same of any claim that was counted. What `failed` is marked.
    fn put_counted(&self, claim: Claim, brought: bool, failed: bool) {
        let range = self.dirty.claimed(&claim);
        match failed {
            true => self.miss(range),
            false => self.hit(range, brought),
        }
        self.release_brought(claim, brought.then_some(range));
        self.claims.fetch_sub(1, Ordering::SeqCst);
        self.released.ring();
        self.progress.ring();
    }

    /// A guest's write to both sides is done; what the target got of it.
    pub fn release(&self, claim: Claim, brought: Option<ByteRange>) {
        self.release_brought(claim, brought);
        self.released.ring();
    }

    /// Not the other way round: see `planes`.
    fn release_brought(&self, claim: Claim, brought: Option<ByteRange>) {
        match brought {
            Some(range) if planted(fault::Fault::ReleaseBeforeUnsettled) => {
                self.dirty.release(claim);
                self.planes.brought(range);
            }
            brought => {
                brought.into_iter().for_each(|range| self.planes.brought(range));
                self.dirty.release(claim);
            }
        }
    }

    /// Wakes who waits for claims to be released.
    pub fn released(&self) -> &Bell {
        &self.released
    }

    /// True where nothing is marked and no copier has a claim. With the gate closed and nobody
    /// inside it stays true.
    pub fn is_settled(&self) -> bool {
        // A copier could take the last mark before we look at the marks, fail, and mark again after.
        // So nothing may have been taken between the look at the claims and the end.
        let taken = self.taken.load(Ordering::SeqCst);
        let idle = self.claims.load(Ordering::SeqCst) == 0;
        idle && self.dirty.is_clean() && self.taken.load(Ordering::SeqCst) == taken
    }

    /// True where no copier has a claim. Stays true while they are held.
    pub fn is_idle(&self) -> bool {
        self.claims.load(Ordering::SeqCst) == 0
    }

    fn fault(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
