//! Targets that take 5 MB/s, or 50 ms for anything, under guests that nobody slows: a job always comes to its end, within
//! the bounds that it has. No time is measured here; what simulated time says is in `engine/src/simulator/bounds.rs`.
//!
//! A target that is a file is one of another server's export (`nbdfuse` before nbdkit's filters).
use crate::support::remote::Remote;
use crate::support::server::garbage;
use crate::support::writer::Habits;
use std::path::Path;
use std::time::Duration;

/// Larger than what may be left of a job that is ready.
const DISK_LEN: usize = 16 << 20;

/// A guest that asks again at once.
fn eager(seed: u64) -> Habits {
    Habits { seed, depth: 8, len_max: 64 << 10, pause: Duration::ZERO, reads: false, ..Habits::default() }
}

/// With a slow file as its target the job ends by itself; the guest is on the target then, and misses nothing.
fn ends(seed: u64, filters: &[&str], words: &[&str]) {
    let words = |_: &Path| words.iter().map(|word| (*word).to_owned()).collect();
    let target = |folder: &Path| garbage(folder, "target", DISK_LEN);
    // Nothing is done where this process may not mount.
    let Some(scene) = Remote::of(DISK_LEN, &target, filters, &words, eager(seed)).mounted() else { return };
    let place = scene.place().display().to_string();
    scene.daemon.ok("mirror", &["vda", &place, "--raw", "--reuse-external", "--max-pause", "20000"]);
    let ready = scene.daemon.wait_for("vda", "ready");
    assert_eq!((&ready["mode"], &ready["slowdown"]), (&"auto".into(), &1.0.into()), "{ready}");
    scene.daemon.pivot("vda");
    assert_eq!(scene.daemon.status("vda")["serving"], place);
    scene.guest.wait(20);
    scene.stop();
}

#[test]
fn auto_ends_where_the_target_takes_5_mb_a_second() {
    ends(1, &["--filter=rate"], &["rate=40M"]);
}

#[test]
fn auto_ends_where_the_target_takes_50_ms_for_anything() {
    ends(2, &["--filter=delay"], &["rdelay=50ms", "wdelay=50ms"]);
}

/// No guest waits for another machine's answer, so it takes a bound, which slows guests.
#[test]
fn a_deadline_is_the_end_where_another_server_takes_5_mb_a_second() {
    let words = |_: &Path| vec!["rate=40M".to_owned()];
    let remote = Remote::new(&["--filter=rate"], &words, eager(3));
    remote.mirror(&["--deadline", "30s", "--max-slowdown", "1000", "--max-pause", "20000"]);
    remote.end();
}
