//! Behaviour: serves a disk, copies it while it changes, and switches to the copy.
pub mod bell;
pub mod chain;
pub mod control;
pub mod dirty;
pub mod disk;
pub mod export;
pub mod fault;
pub mod io;
pub mod mirror;
pub mod rate;
pub mod zero;
