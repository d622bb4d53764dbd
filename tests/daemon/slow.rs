//! Targets that take 5 MB/s, or 50 ms for anything, under guests that nobody slows: a job always comes to its end, within
//! the bounds that it has. No time is measured here; what simulated time says is in `engine/src/simulator/bounds.rs`.
//!
//! A target that is a file is one of another server's export (`nbdfuse` before nbdkit's filters).

use crate::support::daemon::Daemon;
use crate::support::images::thin_disk;
use crate::support::mounted::Mounted;
use crate::support::remote::Remote;
use crate::support::server::{Server, garbage, two_folders};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, folder};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// Larger than what may be left of a job that is ready.
const DISK_LEN: usize = 16 << 20;

/// A guest that asks again at once.
fn eager(seed: u64) -> Habits {
    Habits { seed, depth: 8, len_max: 64 << 10, pause: Duration::ZERO, reads: false, ..Habits::default() }
}

/// A guest, its disk, and a slow file as its target.
struct Scene {
    // Dropped in this order.
    guest: Writer,
    daemon: Daemon,
    mounted: Mounted,
    _server: Server,
    folder: TempDir,
}

impl Scene {
    /// `None` where this process may not mount.
    fn new(seed: u64, filters: &[&str]) -> Option<Self> {
        let folder = folder();
        let source = folder.path().join("disk.raw");
        std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
        let (theirs, ours) = two_folders(folder.path());
        let file = format!("file={}", garbage(folder.path(), "target", DISK_LEN).display());
        let (names, told): (Vec<&str>, Vec<&str>) = filters.iter().partition(|word| word.starts_with("--filter"));
        let server = Server::nbdkit(&theirs, &[&names[..], &["file", &file], &told].concat());
        let mounted = Mounted::new(folder.path().join("mounted"), &server)?;
        let daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
        let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), eager(seed));
        Some(Self { guest, daemon, mounted, _server: server, folder })
    }

    fn place(&self) -> String {
        self.mounted.place.display().to_string()
    }

    fn status(&self) -> Value {
        self.daemon.status("vda")
    }

    /// The job ends by itself; the guest is on the target then, and misses nothing.
    fn ends(self) {
        self.daemon.ok("mirror", &["vda", &self.place(), "--raw", "--reuse-external", "--max-pause", "20000"]);
        let ready = self.daemon.wait_for("vda", "ready");
        assert_eq!((&ready["mode"], &ready["slowdown"]), (&"auto".into(), &1.0.into()), "{ready}");
        self.daemon.pivot("vda");
        assert_eq!(self.status()["serving"], self.place());
        self.guest.wait(20);
        let Self { guest, mut daemon, mounted, _server, folder } = self;
        let truth = guest.stop();
        daemon.stop();
        drop(mounted);
        assert_same("the target", &content(&folder.path().join("target")), &truth);
    }
}

fn content(file: &PathBuf) -> Vec<u8> {
    std::fs::read(file).expect("a file of ours")
}

#[test]
fn auto_ends_where_the_target_takes_5_mb_a_second() {
    if let Some(scene) = Scene::new(1, &["--filter=rate", "rate=40M"]) {
        scene.ends();
    }
}

#[test]
fn auto_ends_where_the_target_takes_50_ms_for_anything() {
    if let Some(scene) = Scene::new(2, &["--filter=delay", "rdelay=50ms", "wdelay=50ms"]) {
        scene.ends();
    }
}

/// No guest waits for another machine's answer, so it takes a bound, which slows guests.
#[test]
fn a_deadline_is_the_end_where_another_server_takes_5_mb_a_second() {
    let words = |_: &Path| vec!["rate=40M".to_owned()];
    let remote = Remote::new(&["--filter=rate"], &words, eager(3));
    remote.mirror(&["--deadline", "30s", "--max-slowdown", "1000", "--max-pause", "20000"]);
    remote.end();
}
