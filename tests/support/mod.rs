//! What the tests of the whole program share: the daemon as a child process, a guest that keeps its
//! own copy of the truth, images of every kind made by qemu-img, a real guest in QEMU.
//!
//! Nothing here knows the program's inside: it is its command line, its sockets and its files.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub mod daemon;
pub mod full;
pub mod images;
pub mod mount;
pub mod mounted;
pub mod nbd;
pub mod qmp;
pub mod random;
pub mod remote;
pub mod scene;
pub mod server;
pub mod tools;
pub mod vm;
pub mod writer;

use std::time::{Duration, Instant};

/// How long anything may take that has to happen: far more than a slow and busy machine needs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Asks `look` until it has an answer; fails, saying `what` did not happen, when patience ends.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: did not happen in {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A folder of the test's own, removed at its end.
///
/// On the file system of the build, for a temporary folder may be in memory and know no O_DIRECT.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("t").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder")
}

/// Fails with the first difference of two disks.
#[track_caller]
pub fn assert_same(what: &str, found: &[u8], truth: &[u8]) {
    assert_eq!(found.len(), truth.len(), "{what}: its size");
    if found == truth {
        return;
    }
    let differs = |block: &usize| found[block * 512..][..512] != truth[block * 512..][..512];
    let wrong: Vec<usize> = (0..truth.len() / 512).filter(differs).collect();
    let first = wrong[0] * 512;
    panic!(
        "{what}: {} of {} sectors differ, the first at {first}: found {:02x?}, the truth is {:02x?}",
        wrong.len(),
        truth.len() / 512,
        &found[first..first + 16],
        &truth[first..first + 16],
    );
}
