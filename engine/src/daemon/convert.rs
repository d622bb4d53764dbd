//! `convert`: a mirror without a guest.
use super::jobs::copiers;
use super::threads::Worker;
use crate::control::creation::CreateOptions;
use crate::control::options::{Cache, Reach};
use crate::control::{MirrorRequest, TargetFormat};
use crate::io::{Arena, Io, Op, Ring, Token, Wait, Waker};
use crate::mirror::Mirror;
use crate::open::{Access, open_disk_at};
use crate::seed::Seeder;
use crate::target::{Reached, plan};
use formats::backing::Location;
use formats::error::{Context, Error, Result};
use formats::journal::Forgetful;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often progress is told.
const TICK: Duration = Duration::from_millis(50);
/// How many runs of the mapping are looked at between two looks at the copiers.
const LOOKS: usize = 4096;

/// What to copy to where.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The top layer of the source's chain.
    pub source: Location,
    /// Its format, where it was named.
    pub source_format: Option<TargetFormat>,
    /// Full path of the target.
    pub target: PathBuf,
    /// Its format, where it was named.
    pub format: Option<TargetFormat>,
    /// How the target is made.
    pub options: CreateOptions,
    /// Only what the top layer holds.
    pub shallow: bool,
    /// The target's clusters are compressed; it is a qcow2 that is made.
    pub compress: bool,
    /// The target is there already.
    pub reuse_external: bool,
    /// Blocks are shared with the source instead of moved, where that can be.
    pub reflink: bool,
    /// How images are reached.
    pub reach: Reach,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Copied {
    /// Bytes that were brought over.
    pub bytes: u64,
    /// Bytes that are to be brought over, as far as is known.
    pub total: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Converted {
    /// Notes on what was done.
    pub notes: Vec<String>,
    /// How much.
    pub copied: Copied,
    /// The format that the target has.
    pub format: TargetFormat,
}

/// Copies a chain. `progress` is called now and then.
pub fn convert(options: &ConvertOptions, mut progress: impl FnMut(Copied)) -> Result<Converted> {
    super::outlive_size_limit()?;
    let access = Access::read_only(&options.reach);
    let source = Arc::new(open_disk_at(&options.source, options.source_format, access)?);
    let request = MirrorRequest {
        target: options.target.display().to_string(),
        shallow: options.shallow,
        reuse_external: options.reuse_external,
        format: options.format,
        options: options.options.clone(),
        ..MirrorRequest::default()
    };
    let refused = |refusal: crate::control::Refusal| Error::invalid(refusal.message);
    let mut plan = plan(&request, &Reached::Nothing, &source, &options.reach).map_err(refused)?;
    if options.compress {
        plan.compress().map_err(refused)?;
    }
    let target = plan.open(&source, &target_reach(options), &|_| Ok(Arc::new(Forgetful))).map_err(refused)?;
    let mut mirror = Mirror::new(source, Arc::new(target.disk), plan.chunk_bits, plan.shallow);
    mirror.zeroing = plan.zeroing(&request);
    mirror.compress = mirror.target.chain().top().image.compressible().filter(|_| options.compress);
    mirror.set_shares(options.reflink && plan.format == TargetFormat::Raw && !mirror.target.is_remote());
    let mirror = Arc::new(mirror);
    let copied = copy(&mirror, options.reach.cache, target.is_zero, &mut progress).inspect_err(|_| {
        // Half a copy is of no use to anybody.
        plan.unmake();
    })?;
    Ok(Converted { notes: plan.notes, copied, format: plan.format })
}

/// Compressed clusters share pages, so they go through the page cache.
fn target_reach(options: &ConvertOptions) -> Reach {
    match options.reach.cache {
        Cache::None | Cache::Auto if options.compress => Reach { cache: Cache::Writeback, ..options.reach.clone() },
        _ => options.reach.clone(),
    }
}

fn copy(mirror: &Arc<Mirror>, cache: Cache, target_is_zero: bool, progress: &mut impl FnMut(Copied)) -> Result<Copied> {
    let (threads, _) = copiers(mirror, 0).context(|| "starting the copy threads")?;
    let outcome = watch(mirror, Seeder::new(target_is_zero), progress);
    mirror.hold(true);
    threads.into_iter().for_each(Worker::end);
    outcome?;
    let top = mirror.target.chain().top();
    if cache == Cache::Unsafe {
        top.close_unsafely()?
    } else {
        top.close()?;
        if mirror.mark_doubtful() {
            let what = "its server went away and came back, and may have lost what was copied before: copy it again";
            return Err(Error::invalid(what).at(mirror.target.name()));
        }
    }
    Ok(state(mirror))
}

/// Until everything is brought over, or something failed.
fn watch(mirror: &Mirror, mut seeder: Seeder, progress: &mut impl FnMut(Copied)) -> Result<()> {
    const WAKE: Token = Token(0);
    const TICKS: Token = Token(1);
    let failed = |error| Error::io("the ring", error);
    let waker = Waker::new().map_err(failed)?;
    let mut ring = Ring::new(8, &Arena::new(1)).map_err(failed)?;
    ring.submit(WAKE, Op::Wake { waker: waker.clone() });
    ring.submit(TICKS, Op::Timeout { after: TICK });
    let mut done = Vec::new();
    let mut seeded = false;
    loop {
        if !seeded {
            seeded = seeder.step(mirror, LOOKS)?;
        }
        mirror.progress.listen(&waker);
        if let Some(fault) = mirror.clear_fault() {
            return Err(fault.error);
        }
        if seeded && mirror.is_settled() {
            progress(state(mirror));
            return Ok(());
        }
        ring.reap(if seeded { Wait::One } else { Wait::No }, &mut done).map_err(failed)?;
        for completion in done.drain(..) {
            if completion.token == TICKS {
                progress(state(mirror));
                ring.submit(TICKS, Op::Timeout { after: TICK });
            } else {
                ring.submit(WAKE, Op::Wake { waker: waker.clone() });
            }
        }
    }
}

fn state(mirror: &Mirror) -> Copied {
    let bytes = mirror.stats.copied.load(Ordering::Relaxed);
    Copied { bytes, total: bytes + mirror.dirty.marked_bytes() }
}
