//! Behaviour: serves a disk, copies it while it changes, and switches to the copy.
pub mod bell;
pub mod chain;
pub mod control;
pub mod copier;
pub mod dirty;
pub mod disk;
pub mod export;
pub mod fault;
pub mod io;
pub mod job;
pub mod journal;
pub mod mirror;
pub mod pivot;
pub mod rate;
pub mod seed;
pub mod zero;
