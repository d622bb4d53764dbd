//! Threads for what takes the processor rather than the kernel, or a call that waits: inflating and deflating clusters,
//! sharing blocks.
//!
//! A stepped thread that did this itself would keep everybody else waiting that it steps, and would be
//! alone at it. So it is an operation like any other, `Op::Compute`: it goes to the pool with its buffers
//! and comes back with them as a completion of the ring that it was given to.
//!
//! There is no bound on the queue here, for each ring has a bounded number of operations under way.
use super::clone::clone_range;
use super::{Completion, Op, Token, Waker};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Makes one buffer's bytes of another's; says how many.
pub struct Work(Box<Transform>);

type Transform = dyn Fn(&[u8], &mut [u8]) -> io::Result<usize> + Send;

impl Work {
    /// Work that `transform` does.
    pub fn new(transform: impl Fn(&[u8], &mut [u8]) -> io::Result<usize> + Send + 'static) -> Self {
        Self(Box::new(transform))
    }

    /// Does it.
    pub fn run(&self, from: &[u8], to: &mut [u8]) -> io::Result<u32> {
        let made = (self.0)(from, to)?;
        assert!(made <= to.len(), "as many bytes as there is room for");
        Ok(made as u32)
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Work")
    }
}

/// Whose work comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A guest waits for it.
    Guest,
    /// Nobody does.
    Copy,
}

/// Work for threads that do nothing else. Clones are the same pool.
#[derive(Clone, Default)]
pub struct Pool(Arc<Shared>);

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    more: Condvar,
}

#[derive(Default)]
struct Jobs {
    of_guests: VecDeque<Job>,
    of_copies: VecDeque<Job>,
}

struct Job {
    token: Token,
    op: Op,
    home: Arc<Home>,
}

impl Pool {
    /// What a thread of the pool does, for good. Waits.
    pub fn serve(&self) -> ! {
        loop {
            let job = self.next();
            job.home.come_back(carry_out_now(job.token, job.op));
        }
    }

    fn next(&self) -> Job {
        let mut jobs = self.jobs();
        loop {
            if let Some(job) = jobs.of_guests.pop_front().or_else(|| jobs.of_copies.pop_front()) {
                return job;
            }
            jobs = self.0.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put(&self, turn: Turn, job: Job) {
        let mut jobs = self.jobs();
        match turn {
            Turn::Guest => jobs.of_guests.push_back(job),
            Turn::Copy => jobs.of_copies.push_back(job),
        }
        drop(jobs);
        self.0.more.notify_one();
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what is for a pool, on this thread.
pub(super) fn carry_out_now(token: Token, mut op: Op) -> Completion {
    let result = match &mut op {
        Op::Compute { from, to, work } => work.run(from, to),
        Op::Clone { from, at, to, to_at, len } => clone_range(from, *at, to, *to_at, *len),
        op => unreachable!("not for a pool: {op:?}"),
    };
    Completion { token, op, result }
}

/// Where a ring's work comes back to.
struct Home {
    done: Mutex<Vec<Completion>>,
    waker: Waker,
}

impl Home {
    fn done(&self) -> MutexGuard<'_, Vec<Completion>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn come_back(&self, completion: Completion) {
        let mut done = self.done();
        done.push(completion);
        let first = done.len() == 1;
        drop(done);
        // Who takes the first takes all that are there.
        if first {
            self.waker.wake();
        }
    }
}

/// One ring's way to the pool.
pub(super) struct Helpers {
    pool: Pool,
    turn: Turn,
    home: Arc<Home>,
}

impl Helpers {
    pub fn new(pool: Pool, turn: Turn) -> io::Result<Self> {
        Ok(Self { pool, turn, home: Arc::new(Home { done: Mutex::default(), waker: Waker::new()? }) })
    }

    /// Is woken when work has come back.
    pub fn waker(&self) -> &Waker {
        &self.home.waker
    }

    pub fn put(&self, token: Token, op: Op) {
        self.pool.put(self.turn, Job { token, op, home: Arc::clone(&self.home) });
    }

    /// Moves what has come back into `done`.
    pub fn take(&self, done: &mut Vec<Completion>) {
        done.append(&mut self.home.done());
    }
}
