//! Copies the layers below a chain's top to another folder, on a thread of its own: file by file, holes left out.
//!
//! Nobody writes to them, so there is nothing to track and nothing to go on with: after a kill they are copied again.
use super::threads::Errand;
use crate::chain::Layer;
use crate::control::options::Reach;
use crate::io::{FileStorage, Waker};
use crate::open::alone;
use crate::target::{ChainPlan, LowerFile};
use crate::zero::runs;
use formats::error::{Context, Error, Result};
use formats::storage::Storage;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How much is read at a time, in bytes.
const PIECE: u64 = 1 << 20;
/// Zeroes of so many bytes are left out.
const GRANULE: usize = 64 << 10;
/// How long it rests at a time, while it is held or faster than it may be.
const REST: Duration = Duration::from_millis(20);

/// What others see of it, and tell it.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Bytes that were brought over, and those that are to be.
    pub copied: AtomicU64,
    pub total: AtomicU64,
    /// Bytes a second, 0 for no limit.
    pub speed: AtomicU64,
    pub paused: AtomicBool,
    /// It is to end, and to leave nothing behind.
    pub stop: AtomicBool,
}

/// What comes of it: the copied layers, opened.
type Outcome = Result<Vec<Arc<Layer>>>;

/// One on its way.
pub(super) struct Lower {
    pub plan: Arc<ChainPlan>,
    pub progress: Arc<Progress>,
    errand: Errand<Outcome>,
}

impl Lower {
    /// Begins; `waker` is called when it is over. Where it fails nothing is left of it.
    pub fn start(plan: ChainPlan, speed: u64, reach: &Reach, waker: &Waker) -> std::io::Result<Self> {
        let plan = Arc::new(plan);
        let progress = Arc::new(Progress { speed: AtomicU64::new(speed), ..Progress::default() });
        let (plan_there, progress_there, reach) = (Arc::clone(&plan), Arc::clone(&progress), reach.clone());
        let copied = move || {
            let copied = copy(&plan_there, &progress_there).and_then(|()| plan_there.finish(&reach));
            copied.inspect_err(|_| plan_there.unmake())
        };
        let errand = Errand::begin("lower", waker.clone(), copied)?;
        Ok(Self { plan, progress, errand })
    }

    /// True where it is over.
    pub fn is_over(&self) -> bool {
        self.errand.is_over()
    }

    /// What came of it.
    pub fn end(self) -> Outcome {
        let panicked = || Err(Error::invalid("the thread that copied the layers below panicked"));
        self.errand.end().unwrap_or_else(panicked)
    }

    /// Has it end, and waits for that. Nothing is left of it.
    pub fn stop(self) {
        self.progress.stop.store(true, Ordering::SeqCst);
        let plan = Arc::clone(&self.plan);
        if self.end().is_ok() {
            plan.unmake();
        }
    }
}

fn copy(plan: &ChainPlan, progress: &Progress) -> Result<()> {
    let sizes = plan.files.iter().map(|file| open(&file.from).and_then(|from| data_of(&from, &file.from)));
    progress.total.store(sizes.sum::<Result<u64>>()?, Ordering::Relaxed);
    let mut pace = Pace { begun: Instant::now(), speed: 0, bytes: 0 };
    plan.files.iter().try_for_each(|file| copy_one(file, progress, &mut pace))
}

fn copy_one(file: &LowerFile, progress: &Progress, pace: &mut Pace) -> Result<()> {
    let part = file.part();
    let named = |what: &str| format!("{}: {what}", part.display());
    let to = File::options().read(true).write(true).create(true).truncate(false).open(&part);
    let to = to.context(|| named("create"))?;
    if !alone(&part, &to)? {
        return Err(Error::invalid(named("another blkmirror copies to it: name another folder")));
    }
    file.begun();
    let to = FileStorage::new(to);
    let source = open(&file.from)?;
    let len = source.len().context(|| format!("{}: length", file.from.display()))?;
    // What a copy that was cut short left there is of no use.
    to.set_len(0).and_then(|()| to.set_len(len)).context(|| named("setting its length"))?;
    for_data(&source, len, &file.from, |at, count| {
        pace.keep(progress, count)?;
        let mut bytes = vec![0; count as usize];
        source.read_at(at, &mut bytes).context(|| format!("{}: reading at {at}", file.from.display()))?;
        let mut here = at;
        for (zero, run) in runs(&bytes, GRANULE) {
            let place = (here - at) as usize;
            if !zero {
                to.write_at(here, &bytes[place..place + run]).context(|| named("writing"))?;
            }
            here += run as u64;
        }
        progress.copied.fetch_add(count, Ordering::Relaxed);
        Ok(())
    })?;
    file.rename_backing(&to)?;
    to.flush().context(|| named("flush"))?;
    drop_cached(&file.from);
    drop_cached(&part);
    Ok(())
}

/// Calls `each` for the pieces of a file that are not in holes.
fn for_data(source: &FileStorage, len: u64, path: &Path, mut each: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let looking = || format!("{}: looking for holes", path.display());
    let mut at = 0;
    while let Some(data) = source.next_data(at).context(looking)?.filter(|data| *data < len) {
        let end = source.next_hole(data).context(looking)?.clamp(data + 1, len);
        at = data;
        while at < end {
            let count = PIECE.min(end - at);
            each(at, count)?;
            at += count;
        }
    }
    Ok(())
}

fn data_of(source: &FileStorage, path: &Path) -> Result<u64> {
    let len = source.len().context(|| format!("{}: length", path.display()))?;
    let mut bytes = 0;
    for_data(source, len, path, |_, count| {
        bytes += count;
        Ok(())
    })?;
    Ok(bytes)
}

fn open(path: &Path) -> Result<FileStorage> {
    File::open(path).map(FileStorage::new).context(|| format!("{}: open", path.display()))
}

/// The guests' pages are worth more than those of files that are read once.
fn drop_cached(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = fadvise(&file, 0, None::<NonZeroU64>, Advice::DontNeed);
    }
}

/// How fast it has been.
struct Pace {
    begun: Instant,
    /// The limit since then.
    speed: u64,
    bytes: u64,
}

impl Pace {
    /// Waits until `count` more bytes may be copied.
    fn keep(&mut self, progress: &Progress, count: u64) -> Result<()> {
        loop {
            if progress.stop.load(Ordering::SeqCst) {
                return Err(Error::invalid("the copy of the layers below was cancelled"));
            }
            let (paused, speed) = (progress.paused.load(Ordering::Relaxed), progress.speed.load(Ordering::Relaxed));
            if paused || speed != self.speed {
                *self = Self { begun: Instant::now(), speed, bytes: 0 };
            }
            if !paused && !self.is_early() {
                self.bytes += count;
                return Ok(());
            }
            std::thread::sleep(REST);
        }
    }

    fn is_early(&self) -> bool {
        self.speed > 0 && self.bytes as f64 > self.begun.elapsed().as_secs_f64() * self.speed as f64
    }
}
