//! A disk that is served, its guest, and a place to move it to; and what has to be true after it has moved, or not.
use super::daemon::Daemon;
use super::images::{Chain, three_layers};
use super::nbd::{Client, Replies};
use super::tools::{check, content, info};
use super::writer::{Habits, Writer};
use super::{assert_same, folder};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Bytes of a disk that nobody else made.
pub const DISK_LEN: u64 = 32 << 20;

/// A disk that is served, its guest, and a place to move it to.
pub struct Scene {
    pub writer: Option<Writer>,
    pub daemon: Daemon,
    pub chain: Chain,
    pub target: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Scene {
    /// A chain of three layers.
    #[track_caller]
    pub fn new(seed: u64) -> Self {
        let folder = folder();
        let chain = three_layers(folder.path(), DISK_LEN, seed);
        Self::of(folder, chain, seed)
    }

    /// The disk of this chain, whose files are in `folder`.
    #[track_caller]
    pub fn of(folder: tempfile::TempDir, chain: Chain, seed: u64) -> Self {
        let truth = chain.content();
        let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        let habits = Habits { seed, flush_one_in: 100, ..Habits::default() };
        let writer = Some(Writer::start(&daemon.socket(), "vda", truth, habits));
        let target = folder.path().join("target");
        Self { writer, daemon, chain, target, folder }
    }

    /// The target's path.
    pub fn target(&self) -> String {
        self.target.display().to_string()
    }

    /// The source's path.
    pub fn source(&self) -> String {
        self.chain.top.display().to_string()
    }

    /// Waits until the guest has written so much more.
    pub fn writes(&self, count: u64) {
        self.writer.as_ref().expect("a guest").wait(count);
    }

    /// `mirror` with these options.
    #[track_caller]
    pub fn mirror(&self, options: &[&str]) -> String {
        self.daemon.ok("mirror", &[&["vda", &self.target()], options].concat())
    }

    /// How the disk stands.
    pub fn status(&self) -> Value {
        self.daemon.status("vda")
    }

    /// Copies while the guest writes, pivots under load, writes on, and looks at everything.
    #[track_caller]
    pub fn moves(mut self, options: &[&str], format: &str) -> Self {
        self.writes(50);
        self.mirror(options);
        self.writes(100);
        self.daemon.wait_for("vda", "ready");
        self.writes(50);
        self.daemon.pivot("vda");
        let status = self.status();
        assert_eq!(status["phase"], "pivoted", "{status}");
        assert_eq!(status["serving"], self.target(), "{status}");
        self.ends_on_the_target(format);
        self
    }

    /// After the pivot: the guest writes on, and the target alone holds the truth.
    #[track_caller]
    pub fn ends_on_the_target(&mut self, format: &str) {
        let left = self.layers();
        self.writes(100);
        let truth = self.writer.take().expect("a guest").stop();
        assert!(self.layers() == left, "the source is not touched after the pivot");
        self.holds(&truth);
        self.daemon.stop();
        let found = content(&self.target, format);
        // A raw target may be larger.
        let len = if format == "raw" { truth.len().min(found.len()) } else { found.len() };
        assert_same("the target on its own", &found[..len], &truth);
        check(&self.target, format);
        check(&self.chain.top, self.chain.format);
    }

    /// Stops the guest: the source is served, and it alone holds the truth, which is returned.
    #[track_caller]
    pub fn ends_on_the_source(&mut self) -> Vec<u8> {
        assert_eq!(self.status()["serving"], self.source());
        self.writes(50);
        let truth = self.writer.take().expect("a guest").stop();
        self.holds(&truth);
        self.daemon.stop();
        assert_same("the source on its own", &self.chain.content(), &truth);
        check(&self.chain.top, self.chain.format);
        truth
    }

    /// What is served holds `truth`.
    #[track_caller]
    pub fn holds(&self, truth: &[u8]) {
        let mut client = Client::connect(&self.daemon.socket(), "vda", Replies::Structured).expect("a connection");
        assert_same("the disk that is served", &client.content(), truth);
    }

    /// The bytes of every file of the source.
    pub fn layers(&self) -> Vec<Vec<u8>> {
        self.chain.layers.iter().map(|(file, _)| std::fs::read(file).expect("a file of ours")).collect()
    }
}

/// The name of the backing file in an image's header.
pub fn backing(file: &Path) -> Option<String> {
    info(file)["backing-filename"].as_str().map(str::to_owned)
}
