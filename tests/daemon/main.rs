//! The real daemon, and the verbs that ask it or work without it, against what we did not write.
//!
//! One program for all of them: each of its own would be linked by itself, and would wait for the slowest test of the one before.
#[path = "../../engine/src/tls/tests/authority.rs"]
mod authority;
#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod chain;
mod connections;
mod damage;
mod data_file;
mod exports;
mod faults;
mod guards;
mod handover;
mod hung;
mod keeps;
mod libnbd;
mod limits;
mod listeners;
mod locks;
mod mirror;
mod names;
mod nbd_bitmaps;
mod nbd_peers;
mod nbd_tls;
mod policies;
mod progress;
mod reflink;
mod remote;
mod remote_blocks;
mod remote_faults;
mod remote_target;
mod remote_tls;
mod resize;
mod resume;
mod rollback;
mod slow;
mod two_hosts;
mod vast;
mod verify;
