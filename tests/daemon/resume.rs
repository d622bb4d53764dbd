//! A job that goes on after its daemon was killed, or told to end: it copies what it must and no more, compares where
//! nobody knows, and is refused by name where what was kept cannot be believed.
//!
//! How much has to be copied again is asked of `journal show` before the kill: without a guest's writes it only
//! shrinks, so nothing here depends on how fast the machine is.

use crate::support::daemon::{Daemon, program};
use crate::support::random::Random;
use crate::support::tools::{check_leaks_allowed, content, ran};
use crate::support::{assert_same, eventually, folder, images};
use formats::planes::Header;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 64 << 20;

/// A full raw disk whose copy is slow, and a daemon that has begun it.
struct Scene {
    folder: tempfile::TempDir,
    source: PathBuf,
    target: PathBuf,
    format: &'static str,
    daemon: Daemon,
}

impl Scene {
    fn copying(format: &'static str) -> Self {
        let folder = folder();
        let (source, target) = (folder.path().join("source.raw"), folder.path().join("target"));
        fs::write(&source, Random::new(1).bytes(DISK_LEN as usize)).expect("a file of ours");
        let export = format!("vda={},format=raw", source.display());
        let daemon = Daemon::serve(folder.path(), &[export]);
        let name = target.display().to_string();
        daemon.ok("mirror", &["vda", &name, "--format", format, "--speed", "16M"]);
        Self { folder, source, target, format, daemon }
    }

    /// What there is of the job's planes in the state folder.
    fn shown(&self) -> Value {
        let entries = shown(&self.state());
        entries.into_iter().find(|entry| entry["kind"] == "planes").expect("the planes of the job")
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn planes(&self) -> PathBuf {
        self.state().join("vda.planes")
    }

    /// Returns when more than half needs no copying any more, whatever happens; says how much does.
    fn wait_for_half(&self) -> u64 {
        eventually("half of the disk is copied and settled", || {
            let again = again(&self.shown());
            (again < DISK_LEN / 2).then_some(again)
        })
    }

    /// Copies on to the end, which leaves a whole copy; returns the status at that time.
    fn finish(mut self) -> Value {
        self.daemon.ok("set", &["vda", "--speed", "0"]);
        let status = self.daemon.wait_for("vda", "ready");
        self.daemon.ok("cancel", &["vda"]);
        self.daemon.stop();
        assert_same("the copy", &content(&self.target, self.format), &content(&self.source, "raw"));
        check_leaks_allowed(&self.target, self.format);
        assert_eq!(shown(&self.state()).iter().filter(|entry| entry["kind"] == "planes").count(), 0, "it is over");
        status
    }

    /// As if the system had been started anew: the planes are of another run of it.
    fn reboot(&self) {
        let mut words = self.words();
        let header = Header::parse(&words).expect("planes");
        let other = Header { boot: [header.boot[0] ^ 1, header.boot[1]], ..header };
        words[..16].copy_from_slice(&other.words());
        self.put(&words);
    }

    fn words(&self) -> Vec<u64> {
        let bytes = fs::read(self.planes()).expect("the planes");
        bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
    }

    fn put(&self, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        fs::write(self.planes(), bytes).expect("the planes");
    }

    /// The job does not go on, in these words; the source is served all the same.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let status = self.daemon.status("vda");
        assert_eq!(status["phase"], "failed", "{status}");
        assert_eq!(status["serving"], self.source.display().to_string(), "{status}");
        let error = status["error"].as_str().expect("a reason");
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        let served = ran(Command::new("nbdinfo").arg("--size").arg(self.daemon.uri("vda")));
        assert_eq!(served.trim(), DISK_LEN.to_string());
    }
}

/// What `journal show` says of a state folder.
fn shown(state: &Path) -> Vec<Value> {
    let said = ran(Command::new(program()).args(["journal", "show", "--json"]).arg(state));
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("no JSON ({error}): {said}"))
}

/// What the next start would bring over, at most.
fn again(planes: &Value) -> u64 {
    let number = |name: &str| planes[name].as_u64().expect("a number");
    number("again-bytes") + number("size") - number("seen-bytes")
}

#[track_caller]
fn assert_noted(status: &Value, words: &str) {
    assert!(status["notes"].to_string().contains(words), "{words}: {status}");
}

#[test]
fn a_killed_job_copies_only_what_it_must() {
    for format in ["qcow2", "raw"] {
        let mut scene = Scene::copying(format);
        scene.wait_for_half();
        for _ in 0..2 {
            scene.daemon.kill();
            scene.daemon.start();
        }
        scene.daemon.kill();
        let left = again(&scene.shown());
        assert!(left < DISK_LEN / 2, "{left} bytes");
        scene.daemon.start();
        assert_noted(&scene.daemon.status("vda"), "resumed after a kill");
        let status = scene.finish();
        let copied = status["copied_bytes"].as_u64().expect("a number");
        assert!(copied <= left, "{format}: {left} bytes were left: {status}");
        assert_eq!(status["total_bytes"], copied, "{status}");
    }
}

#[test]
fn a_job_that_was_left_in_order_goes_on_also_after_a_reboot() {
    for reboots in [false, true] {
        let mut scene = Scene::copying("qcow2");
        scene.wait_for_half();
        scene.daemon.stop();
        let planes = scene.shown();
        assert_eq!(planes["in-order"], true, "{planes}");
        assert_eq!((&planes["unsettled-bytes"], &planes["in-flight-bytes"]), (&0.into(), &0.into()), "{planes}");
        if reboots {
            scene.reboot();
        }
        scene.daemon.start();
        assert_eq!(scene.shown()["in-order"], false, "it is used again");
        assert_noted(&scene.daemon.status("vda"), "left in order");
        let status = scene.finish();
        let copied = status["copied_bytes"].as_u64().expect("a number");
        assert!(copied <= again(&planes), "{status}");
    }
}

/// What a power cut takes from the target is found, wherever it is; what is alike is not written again.
#[test]
fn after_a_power_cut_source_and_target_are_compared() {
    for format in ["raw", "qcow2"] {
        let mut scene = Scene::copying(format);
        scene.wait_for_half();
        scene.daemon.kill();
        scene.reboot();
        if format == "raw" {
            let file = fs::File::options().write(true).open(&scene.target).expect("the target");
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; 5000], 1_234_567).expect("the target");
        }
        scene.daemon.start();
        assert_noted(&scene.daemon.status("vda"), "source and target are compared");
        assert_eq!(scene.shown()["phase"], "comparing");
        // And a kill of that.
        scene.daemon.kill();
        scene.daemon.start();
        scene.finish();
    }
}

#[test]
fn planes_that_cannot_be_believed_are_refused_by_name_and_kept() {
    let mut scene = Scene::copying("qcow2");
    scene.wait_for_half();
    scene.daemon.kill();
    let words = scene.words();
    let damaged = |at: usize, bit: u64| {
        let mut words = words.clone();
        words[at] ^= bit;
        words
    };
    let path = scene.planes().display().to_string();
    for (found, why) in [
        (damaged(8, 1 << 9), "the header's checksum is wrong"),
        (damaged(1, 2), "version 3 of the planes"),
        (words[..words.len() - 1].to_vec(), "the file should have"),
        (Vec::new(), "not the planes of a job"),
    ] {
        scene.put(&found);
        scene.daemon.start();
        scene.refused(&[&path, why, "remove"]);
        assert_eq!(scene.words(), found, "kept as it is");
        scene.daemon.kill();
    }
    // As the message says.
    fs::remove_file(scene.planes()).expect("it was there");
    scene.daemon.start();
    assert_noted(&scene.daemon.status("vda"), "source and target are compared");
    scene.finish();
}

#[test]
fn a_job_without_its_images_is_refused_and_goes_on_when_they_are_back() {
    let mut scene = Scene::copying("qcow2");
    scene.wait_for_half();
    scene.daemon.kill();
    let away = scene.target.with_extension("away");
    fs::rename(&scene.target, &away).expect("it was there");
    scene.daemon.start();
    scene.refused(&["its target cannot be found", &scene.target.display().to_string(), "bring it back"]);
    scene.daemon.stop();
    images::create(&scene.target, "qcow2", DISK_LEN, &[]);
    scene.daemon.start();
    scene.refused(&["another file now", "bring that file back"]);
    // The guest writes to a source that nobody follows.
    let order = ["-f", "raw", "-c", "write -P 7 123k 99k"];
    ran(Command::new("qemu-io").args(order).arg(scene.daemon.uri("vda")));
    scene.daemon.kill();
    fs::rename(&away, &scene.target).expect("it is there");
    scene.daemon.start();
    assert_noted(&scene.daemon.status("vda"), "served without the job meanwhile");
    scene.finish();
}

#[test]
fn a_state_folder_is_shown_while_a_daemon_uses_it() {
    let scene = Scene::copying("qcow2");
    scene.wait_for_half();
    let said = ran(Command::new(program()).args(["journal", "show"]).arg(scene.state()));
    let (source, target) = (scene.source.display(), scene.target.display());
    for words in [
        "vda.record: nothing was recorded".to_owned(),
        format!("vda.job: export vda: copies {source} to {target}; goes on from planes"),
        "vda.planes: ".to_owned(),
        format!("disk {DISK_LEN} in chunks of 65536, looked at up to {DISK_LEN}"),
    ] {
        assert!(said.contains(&words), "{words}\n{said}");
    }
    fs::write(scene.state().join("x.planes"), "rubbish").expect("a file of ours");
    let said = ran(Command::new(program()).args(["journal", "show"]).arg(scene.state()));
    assert!(said.contains("x.planes: cannot be understood: not the planes of a job"), "{said}");
}
