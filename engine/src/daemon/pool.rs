//! The threads that inflate and deflate, one a processor, for all rings of the process.
use crate::io::Pool;
use std::sync::OnceLock;
use std::thread::{Builder, available_parallelism};

/// More do not pay: one thread has to feed them.
const THREADS_MAX: usize = 64;

/// The pool, whose threads are started when it is first asked for. `None` where the system gives no
/// thread: then each ring works for itself.
pub(super) fn pool() -> Option<Pool> {
    static POOL: OnceLock<Option<Pool>> = OnceLock::new();
    POOL.get_or_init(start).clone()
}

fn start() -> Option<Pool> {
    let pool = Pool::default();
    let count = available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX));
    let start = |number: usize| {
        let pool = pool.clone();
        let started = Builder::new().name("inflate".into()).spawn(move || pool.serve());
        started.map_err(|error| tracing::warn!(%error, "thread {number} of {count} of the pool is not there")).is_ok()
    };
    let started = (0..count).filter(|number| start(*number)).count();
    (started > 0).then_some(pool)
}
