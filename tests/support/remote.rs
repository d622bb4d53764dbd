//! A mirror to another server: a disk with its guest, and nbdkit with filters before the target.
use super::daemon::Daemon;
use super::images::thin_disk;
use super::mounted::Mounted;
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
    /// The server's export as a file, where that was asked for.
    pub mounted: Option<Mounted>,
    pub server: Server,
    pub folder: TempDir,
}

impl Remote {
    /// `words` are nbdkit's: the filters before the plugin, then what all of them are told.
    #[track_caller]
    pub fn new(filters: &[&str], words: &dyn Fn(&Path) -> Vec<String>, habits: Habits) -> Self {
        Self::of(DISK_LEN, &|folder| garbage(folder, "target", DISK_LEN), filters, words, habits)
    }

    /// The same with a disk of `len` bytes, and what `target` makes as the server's file.
    #[track_caller]
    pub fn of(
        len: usize,
        target: &dyn Fn(&Path) -> PathBuf,
        filters: &[&str],
        words: &dyn Fn(&Path) -> Vec<String>,
        habits: Habits,
    ) -> Self {
        let folder = folder();
        let source = folder.path().join("disk.raw");
        std::fs::write(&source, thin_disk(len)).expect("a file of ours");
        let (theirs, ours) = two_folders(folder.path());
        let file = format!("file={}", target(folder.path()).display());
        let words = words(folder.path());
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let server = Server::nbdkit(&theirs, &[filters, &["file", &file], &words].concat());
        let daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
        let guest = Writer::start(&daemon.socket(), "vda", thin_disk(len), habits);
        Self { guest, daemon, mounted: None, server, folder }
    }

    /// The same, with the server's export as a file too; `None` where this process may not mount.
    pub fn mounted(mut self) -> Option<Self> {
        self.mounted = Some(Mounted::new(self.folder.path().join("mounted"), &self.server)?);
        Some(self)
    }

    /// Where the export is as a file.
    pub fn place(&self) -> &Path {
        &self.mounted.as_ref().expect("it was mounted").place
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
        drop((self.mounted, self.server));
        assert_same("the target", &std::fs::read(target).expect("a file of ours"), &truth);
    }
}
