//! What sync points cost: a job whose target's flushes take long, in a time that goes on by itself.
//!
//! `cargo test -p engine sync_points -- --nocapture` prints how many there are, what they write, and their part of the time.
use super::files::{Files, SimIo};
use super::kept::Kept;
use crate::chain::{Chain, Layer};
use crate::control::{Mode, OnError};
use crate::copier::{Copier, Depth};
use crate::disk::{DataFile, Disk, Tools};
use crate::export::gate::{Gate, Route};
use crate::io::{Arena, Completion, File, Io, Op, Token, Wait, Waker};
use crate::job::{Job, Limits, Parts};
use crate::mirror::Mirror;
use formats::image::Image;
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::raw::Raw;
use formats::storage::Storage;
use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const DISK: u64 = 6 << 20;
const CHUNK_BITS: u32 = 12;
const RUN: usize = 16 << 10;
const TICK: Duration = Duration::from_millis(10);
/// How long one operation of a copy takes: a slow device, so that the copy takes minutes.
const COPY: Duration = Duration::from_millis(400);
/// The daemon's own.
const REST: Duration = Duration::from_secs(1);

/// A queue whose operations take some time each.
struct Slow {
    below: SimIo,
    clock: Rc<Cell<Duration>>,
    flush: Duration,
    flushes: u64,
    under_way: Vec<(Duration, Token, Op)>,
}

impl Io for Slow {
    fn submit(&mut self, token: Token, op: Op) {
        let is_flush = matches!(op, Op::Flush { .. });
        self.flushes += u64::from(is_flush);
        self.under_way.push((self.now() + if is_flush { self.flush } else { COPY }, token, op));
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        let now = self.now();
        for (_, token, op) in self.under_way.extract_if(.., |(ends, ..)| *ends <= now) {
            self.below.submit(token, op);
            self.below.reap(wait, done)?;
        }
        Ok(())
    }
    fn now(&self) -> Duration {
        self.clock.get()
    }
}

impl Slow {
    fn is_flushing(&self) -> bool {
        self.under_way.iter().any(|(_, _, op)| matches!(op, Op::Flush { .. }))
    }
}

/// Counts what is written of an image's tables.
struct Counted {
    below: Arc<dyn Storage>,
    written: Arc<AtomicU64>,
}

impl Storage for Counted {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.below.read_at(at, bytes)
    }
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.below.write_at(at, bytes)
    }
    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.below.set_len(len)
    }
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.below.next_data(at)
    }
    fn next_hole(&self, at: u64) -> io::Result<u64> {
        self.below.next_hole(at)
    }
}

/// What became of one copy.
struct Cost {
    /// When each sync point began and ended.
    syncs: Vec<(Duration, Duration)>,
    flushes: u64,
    /// Bytes of tables.
    written: u64,
    took: Duration,
}

/// Copies with a target whose flushes take so long each, up to where nothing is left to copy.
fn copy(flush: Duration) -> Cost {
    let (files, written) = (Files::default(), Arc::<AtomicU64>::default());
    let (from, to) = (files.add(vec![1; DISK as usize]), files.add(Vec::new()));
    create(&*files.storage(to), &Create { cluster_bits: 12, ..Create::new(DISK) }).expect("valid options");
    let counted = Arc::new(Counted { below: files.storage(to), written: Arc::clone(&written) });
    let open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 20 };
    let target = Qcow2::open(counted, Arc::new(Forgetful), open).expect("a valid image");
    let disk = |image: Box<dyn Image>, number: u32, format| {
        let file = DataFile::buffered(File::simulated(number));
        let layer = Layer { image, file, path: format!("file{number}").into(), format, apart: None };
        Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false))
    };
    let source = disk(Box::new(Raw::new(files.storage(from), DISK)), from, "raw");
    let mut kept = Kept::default();
    let taken = kept.begin(DISK, CHUNK_BITS);
    let planes = kept.lay_out(&taken, true);
    let mirror = Arc::new(Mirror::on(planes, source, disk(Box::new(target), to, "qcow2"), false));
    let gate = Arc::new(Gate::new(Route { disk: Arc::clone(&mirror.source), mirror: None }));
    let mut job = Job::start(Parts {
        id: "job".to_owned(),
        mirror: Arc::clone(&mirror),
        gate,
        target_is_zero: true,
        seen: 0,
        sync_rest: REST,
        mode: Mode::Background,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        pause_max: REST,
        limits: Limits::default(),
        verify: false,
    });
    let mut copier = Copier::new(Arc::clone(&mirror), Depth { slots: 2, run_len: RUN, beside: RUN }, 0);
    let clock = Rc::new(Cell::new(Duration::ZERO));
    let queue = || {
        let below = SimIo::new(&files, 1, 0);
        Slow { below, clock: Rc::clone(&clock), flush, flushes: 0, under_way: Vec::new() }
    };
    let (mut control, mut copies) = (queue(), queue());
    let (arena, waker) = (Arena::new(1 << 20), Waker::simulated(9));
    let mut cost = Cost { syncs: Vec::new(), flushes: 0, written: 0, took: Duration::ZERO };
    let mut begun = None;
    while mirror.stats.copied.load(Ordering::Relaxed) < DISK {
        let mut done = Vec::new();
        control.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut control, arena: &arena, waker: &waker };
        done.into_iter().for_each(|completion| job.complete(&mut tools, Token(0), completion));
        while job.step(&mut tools, Token(0)) {}
        let mut done = Vec::new();
        copies.reap(Wait::No, &mut done).expect("a simulated queue");
        copier.step(&mut Tools { io: &mut copies, arena: &arena, waker: &waker }, &mut done);
        match (begun, control.is_flushing() || copies.is_flushing()) {
            (None, true) => begun = Some(clock.get()),
            (Some(from), false) => {
                cost.syncs.push((from, clock.get()));
                begun = None;
            }
            _ => {}
        }
        clock.set(clock.get() + TICK);
        assert!(clock.get() < Duration::from_secs(3600), "the copy does not come to an end");
    }
    cost.flushes = control.flushes + copies.flushes;
    (cost.written, cost.took) = (written.load(Ordering::Relaxed), clock.get());
    std::mem::forget((job, copier));
    cost
}

/// Promise 10. A tenth of the device's time at most, however long its flushes take; and no more is left to a kill than what
/// was copied in a second, or in ten times as long as a sync point takes.
#[test]
fn sync_points_take_a_tenth_of_the_time_at_most() {
    println!("flush ms  sync points  flushes  KiB of tables  share of the time");
    for flush_ms in [0, 10, 30, 100, 300, 1000] {
        let cost = copy(Duration::from_millis(flush_ms));
        let busy: Duration = cost.syncs.iter().map(|(from, to)| *to - *from).sum();
        let share = busy.as_secs_f64() / cost.took.as_secs_f64();
        println!(
            "{flush_ms:8}  {:11}  {:7}  {:13}  {:16.1}%",
            cost.syncs.len(),
            cost.flushes,
            cost.written >> 10,
            100.0 * share
        );
        assert!(cost.syncs.len() >= 3 || flush_ms == 0, "{} sync points", cost.syncs.len());
        for pair in cost.syncs.windows(2) {
            let ((from, to), (next, _)) = (pair[0], pair[1]);
            let (took, rest) = (to - from, next - to);
            assert!(rest + TICK >= REST.max(10 * took), "{rest:?} after {took:?}");
            // The job hears of its end a little later.
            assert!(
                rest <= REST.max(10 * (took + 3 * TICK)) + 3 * TICK,
                "{rest:?} after {took:?}: a kill costs too much"
            );
        }
    }
}
