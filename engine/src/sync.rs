//! Atomics and locks: the standard library's, or loom's where it explores every interleaving.
//!
//! Used by what threads share without a queue between them: the bitmap, the gate, the bells.
#[cfg(not(all(test, feature = "loom")))]
pub use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};

#[cfg(all(test, feature = "loom"))]
pub use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};
