//! A mirror to another server: a disk with its guest, and nbdkit with filters before the target.
use super::daemon::Daemon;
use super::images::thin_disk;
use super::server::{Server, garbage, two_folders};
use super::writer::{Habits, Writer};
use super::{assert_same, folder};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The disk's length in bytes.
pub const DISK_LEN: usize = 24 << 20;

/// A served disk with a guest, and a server of a file that has other bytes.
pub struct Remote {
    // Dropped in this order: a guest whose server goes first would wait for it.
    pub guest: Writer,
    pub daemon: Daemon,
    pub server: Server,
    pub folder: TempDir,
}

impl Remote {
    /// `words` are nbdkit's: the filters before the plugin, then what all of them are told.
    #[track_caller]
    pub fn new(filters: &[&str], words: &dyn Fn(&Path) -> Vec<String>, habits: Habits) -> Self {
        let folder = folder();
        let source = folder.path().join("disk.raw");
        std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
        let (theirs, ours) = two_folders(folder.path());
        let file = format!("file={}", garbage(folder.path(), "target", DISK_LEN).display());
        let words = words(folder.path());
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let server = Server::nbdkit(&theirs, &[filters, &["file", &file], &words].concat());
        let daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
        let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), habits);
        Self { guest, daemon, server, folder }
    }

    pub fn mirror(&self, more: &[&str]) {
        self.daemon.ok("mirror", &[&["vda", &self.server.uri("")], more].concat());
    }

    pub fn target(&self) -> PathBuf {
        self.folder.path().join("target")
    }

    /// Waits for the end of the copy, pivots, and looks what the target's file has when the guest is done.
    #[track_caller]
    pub fn end(self) {
        self.daemon.wait_for("vda", "ready");
        self.daemon.pivot("vda");
        self.guest.wait(50);
        self.stop();
    }

    /// The guest and the daemon end; the target's file has what the guest wrote.
    #[track_caller]
    pub fn stop(mut self) {
        let target = self.target();
        let truth = self.guest.stop();
        self.daemon.stop();
        drop(self.server);
        assert_same("the target", &std::fs::read(target).expect("a file of ours"), &truth);
    }
}
