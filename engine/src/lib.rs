//! Behaviour: serves a disk, copies it while it changes, and switches to the copy.
pub mod control;
pub mod io;
