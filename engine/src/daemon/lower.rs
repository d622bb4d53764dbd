//! Copies the layers below a chain's top to another folder, on a thread of its own: file by file, holes left out.
//!
//! Nobody writes to them, so there is nothing to track: after a kill they are copied again. What fails is decided upon by
//! the job's policies, as in `job::errors`: given up, or tried again when it has rested or is resumed.
use super::threads::Errand;
use crate::chain::Layer;
use crate::control::OnError;
use crate::control::jobs::ErrorAction;
use crate::control::options::Reach;
use crate::io::{FileStorage, Waker};
use crate::job::{IoError, action_of, is_no_space, rest_after};
use crate::open::alone;
use crate::target::{ChainPlan, LowerFile};
use crate::zero::runs;
use formats::error::{Context, Error, Result};
use formats::storage::Storage;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    orders: Mutex<Orders>,
    trouble: Mutex<Option<Trouble>>,
    /// What failed since somebody asked last.
    error: Mutex<Option<IoError>>,
}

/// What it is told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Orders {
    /// Bytes a second, 0 for no limit.
    pub speed: u64,
    pub paused: bool,
    /// Not by an operator, but by an error.
    pub stopped: bool,
    /// It is to end.
    pub stop: bool,
    /// What is done when the source fails, and when the target does.
    pub on_error: [OnError; 2],
    /// How often what failed was to be tried at once.
    pub tries: u64,
}

impl Orders {
    /// Has it rest or go on, and try at once what failed; `stopped`: after an error.
    pub fn hold(&mut self, paused: bool, stopped: bool) {
        (self.paused, self.stopped) = (paused, stopped);
        self.tries += u64::from(!paused);
    }

    /// An error that stands is decided upon anew.
    pub fn decide_by(&mut self, on_error: [OnError; 2]) {
        if std::mem::replace(&mut self.on_error, on_error) != on_error {
            self.hold(self.paused && !self.stopped, false);
        }
    }
}

/// What keeps it from going on.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub message: String,
    pub no_space: bool,
    /// For how long it rests before it tries again; `None` where it is stopped.
    pub rest: Option<Duration>,
}

/// What comes of it: the copied layers, opened, when they have their names.
type Outcome = Result<Vec<Arc<Layer>>>;

/// One on its way.
pub(super) struct Lower {
    pub plan: Arc<ChainPlan>,
    pub progress: Arc<Progress>,
    errand: Errand<Outcome>,
}

impl Lower {
    /// Begins to copy; `waker` is called when that is over.
    pub fn copy(plan: Arc<ChainPlan>, progress: Arc<Progress>, waker: &Waker) -> std::io::Result<Self> {
        progress.total.store(plan.files.iter().map(LowerFile::len_about).sum(), Ordering::Relaxed);
        let (plan_there, progress_there) = (Arc::clone(&plan), Arc::clone(&progress));
        let copied = move || copy(&plan_there, &progress_there).map(|()| Vec::new());
        let errand = Errand::begin("lower", waker.clone(), copied)?;
        Ok(Self { plan, progress, errand })
    }

    /// Begins to give all copies, which are whole, their names.
    pub fn name(plan: Arc<ChainPlan>, progress: Arc<Progress>, reach: &Reach, waker: &Waker) -> std::io::Result<Self> {
        let (plan_there, reach) = (Arc::clone(&plan), reach.clone());
        let errand = Errand::begin("lower", waker.clone(), move || plan_there.finish(&reach))?;
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

    /// Has it end, and waits for that.
    pub fn stop(self) {
        self.progress.orders().stop = true;
        // The next daemon goes on.
        _ = self.end();
    }
}

impl Progress {
    /// Of one that has not begun.
    pub fn new(orders: Orders) -> Self {
        Self { orders: Mutex::new(orders), ..Self::default() }
    }

    pub fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps it from going on.
    pub fn trouble(&self) -> Option<Trouble> {
        lock(&self.trouble).clone()
    }

    /// What failed since this was asked last.
    pub fn take_error(&self) -> Option<IoError> {
        lock(&self.error).take()
    }

    /// Does `what` until it is done, or given up by the policy of its side.
    fn insist(&self, target: bool, mut what: impl FnMut() -> Result<()>) -> Result<()> {
        let mut last = None;
        loop {
            let orders = *self.orders();
            let Err(error) = what() else {
                *lock(&self.trouble) = None;
                return Ok(());
            };
            let (policy, no_space) = (orders.on_error[usize::from(target)], is_no_space(error.raw_os_error()));
            let (action, message) = (action_of(policy, no_space), error.one_line());
            let message = format!("{}: {message}", if target { "target" } else { "source" });
            *lock(&self.error) = Some(IoError { target, action, message: message.clone() });
            let rest = (action == ErrorAction::Ignore).then(|| rest_after(policy, last));
            last = rest;
            match action {
                ErrorAction::Report => return Err(error),
                ErrorAction::Stop => self.orders().hold(true, true),
                ErrorAction::Ignore => {
                    let millis = rest.unwrap_or_default().as_millis();
                    tracing::warn!("{message}; it is tried again after {millis} ms");
                }
            }
            *lock(&self.trouble) = Some(Trouble { message, no_space, rest });
            self.wait_to_try(rest, orders.tries)?;
        }
    }

    /// Until it has rested for so long, or goes on, or is to try at once.
    fn wait_to_try(&self, rest: Option<Duration>, tries: u64) -> Result<()> {
        let begun = Instant::now();
        loop {
            let orders = *self.orders();
            refuse_stopped(orders)?;
            let is_over = rest.is_some_and(|rest| begun.elapsed() >= rest) || orders.tries != tries;
            if is_over && !orders.paused {
                return Ok(());
            }
            std::thread::sleep(REST);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse_stopped(orders: Orders) -> Result<()> {
    match orders.stop {
        true => Err(Error::invalid("the copy of the layers below was ended")),
        false => Ok(()),
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
        progress.insist(false, || {
            source.read_at(at, &mut bytes).context(|| format!("{}: reading at {at}", file.from.display()))
        })?;
        let mut here = at;
        for (zero, run) in runs(&bytes, GRANULE) {
            let place = (here - at) as usize;
            if !zero {
                let run = &bytes[place..place + run];
                progress.insist(true, || to.write_at(here, run).context(|| named("writing")))?;
            }
            here += run as u64;
        }
        progress.copied.fetch_add(count, Ordering::Relaxed);
        Ok(())
    })?;
    progress.insist(true, || file.rename_backing(&to))?;
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
            let orders = *progress.orders();
            refuse_stopped(orders)?;
            let Orders { paused, speed, .. } = orders;
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
