//! Threads that copy, one to a few for each job, and threads that find something out.
use super::pool::pool;
use crate::copier::{Copier, Depth, Progress};
use crate::disk::Tools;
use crate::io::remote::Remotes;
use crate::io::{Arena, Io, Op, Ring, Token, Turn, Wait, Waker};
use crate::mirror::Mirror;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const WAKE: Token = Token(u64::MAX);
const TIMEOUT: Token = Token(u64::MAX - 1);

/// A thread that can be told to end.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    waker: Waker,
    thread: JoinHandle<()>,
}

impl Worker {
    /// A thread that copies for `mirror`: number `number` of `count`.
    pub fn copier(mirror: Arc<Mirror>, depth: Depth, number: u64, count: u64) -> io::Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let waker = Waker::new()?;
        let (stop_there, waker_there) = (Arc::clone(&stop), waker.clone());
        let start = mirror.source.size() / count * number;
        let body = move || {
            if let Err(error) = copy(&mirror, depth, start, &waker_there, &stop_there) {
                let what = "a copy thread failed".to_owned();
                mirror.fail(true, formats::error::Error::io(what, error));
            }
        };
        let thread = std::thread::Builder::new().name("copy".into()).spawn(body)?;
        Ok(Self { stop, waker, thread })
    }

    /// Asks it to end when what it has under way is done.
    pub fn ask_to_end(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits for its end, after asking for it.
    pub fn end(self) {
        self.ask_to_end();
        joined(self.thread);
    }
}

/// Waits for the end of a thread.
pub(super) fn joined(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread ended by a panic: please report what it said");
    }
}

/// A thread that finds something out which takes long.
pub(super) struct Errand<T> {
    thread: JoinHandle<T>,
    is_over: Arc<AtomicBool>,
}

impl<T: Send + 'static> Errand<T> {
    /// Begins it; `waker` is called when it is over.
    pub fn begin(name: &str, waker: Waker, find: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let is_over = Arc::<AtomicBool>::default();
        let is_over_there = Arc::clone(&is_over);
        let body = move || {
            let found = find();
            is_over_there.store(true, Ordering::SeqCst);
            waker.wake();
            found
        };
        Ok(Self { thread: std::thread::Builder::new().name(name.into()).spawn(body)?, is_over })
    }

    /// True where it is over, or does nothing any more that takes long.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst) || self.thread.is_finished()
    }

    /// What was found; `None` where it panicked.
    pub fn end(self) -> Option<T> {
        self.thread.join().ok()
    }
}

fn copy(mirror: &Arc<Mirror>, depth: Depth, start: u64, waker: &Waker, stop: &AtomicBool) -> io::Result<()> {
    let arena = Arena::allocate(depth.memory())?;
    let mut ring = Remotes::new(Ring::new(depth.operations(), &arena)?.helped_by(pool(), Turn::Copy)?);
    let mut copier = Copier::new(Arc::clone(mirror), depth, start);
    let mut done = Vec::new();
    let mut timed = false;
    ring.submit(WAKE, Op::Wake { waker: waker.clone() });
    loop {
        let progress = copier.step(&mut Tools { io: &mut ring, arena: &arena, waker }, &mut done);
        if stop.load(Ordering::SeqCst) && copier.is_idle() {
            return Ok(());
        }
        if let (Progress::Throttled(wait), false) = (progress, timed) {
            timed = true;
            let after = wait.clamp(Duration::from_micros(100), Duration::from_millis(100));
            ring.submit(TIMEOUT, Op::Timeout { after });
        }
        ring.reap(Wait::One, &mut done)?;
        done.retain(|completion| match completion.token {
            WAKE => {
                ring.submit(WAKE, Op::Wake { waker: waker.clone() });
                false
            }
            TIMEOUT => {
                timed = false;
                false
            }
            _ => true,
        });
    }
}
