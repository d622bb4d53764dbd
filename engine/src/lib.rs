//! Behaviour: serves a disk, copies it while it changes, and switches to the copy.
pub mod bell;
pub mod chain;
pub mod control;
pub mod copier;
pub mod courtesy;
pub mod daemon;
pub mod data_file;
pub mod dirty;
pub mod disk;
pub mod export;
pub mod fault;
#[cfg(all(test, feature = "loom"))]
mod interleavings;
pub mod io;
pub mod job;
pub mod journal;
pub mod mirror;
pub mod open;
pub mod pivot;
pub mod planes;
pub mod rate;
pub mod seed;
#[cfg(all(test, not(feature = "loom")))]
mod simulator;
pub mod state;
mod sync;
pub mod target;
pub mod tls;
pub mod zero;
