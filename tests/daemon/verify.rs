//! Reading back: a target that has other bytes than it was given is found out, mended and counted, no write of a guest is
//! taken for that, and a pivot can ask for it.

use crate::support::daemon::{Daemon, program};
use crate::support::qmp::Qmp;
use crate::support::random::Random;
use crate::support::scene::Scene;
use crate::support::tools::{content, output, ran, refused, run};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder, images};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 24 << 20;

/// A ready mirror of a disk that nobody writes to: data, and zeroes behind it.
struct Quiet {
    folder: tempfile::TempDir,
    truth: Vec<u8>,
    target: PathBuf,
    format: &'static str,
    daemon: Daemon,
}

impl Quiet {
    fn ready(format: &'static str, options: &[&str]) -> Self {
        let folder = folder();
        let (source, target) = (folder.path().join("source.raw"), folder.path().join("target"));
        let mut truth = Random::new(7).bytes(DISK_LEN as usize);
        truth[16 << 20..].fill(0);
        fs::write(&source, &truth).expect("a file of ours");
        let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", source.display())]);
        let words = ["vda", &target.display().to_string(), "--format", format, "--wait"];
        daemon.ok("mirror", &[&words, options].concat());
        Self { folder, truth, target, format, daemon }
    }

    /// Overwrites bytes of the target's file behind the daemon's back.
    fn overwrite(&self, at: u64, len: usize) {
        let words = [
            "if=/dev/zero".to_owned(),
            format!("of={}", self.target.display()),
            format!("bs={len}"),
            "count=1".to_owned(),
            "conv=notrunc,fsync".to_owned(),
            "oflag=seek_bytes".to_owned(),
            format!("seek={at}"),
        ];
        run("dd", &words);
    }

    /// Where the target's file has the disk's bytes from `at` on.
    fn place(&self, at: u64) -> u64 {
        let words = ["map", "-U", "-f", self.format, "--output=json", self.target.to_str().expect("text")];
        let runs: Vec<Value> = serde_json::from_str(&run("qemu-img", &words)).expect("JSON of qemu-img");
        let number = |run: &Value, name: &str| run[name].as_u64();
        let place = runs.iter().find_map(|run| {
            let (start, length) = (number(run, "start")?, number(run, "length")?);
            (start..start + length).contains(&at).then(|| number(run, "offset").map(|host| host + at - start))?
        });
        place.expect("data")
    }

    fn status(&self) -> Value {
        self.daemon.status("vda")
    }

    /// Pivots, verified, and looks at the target alone.
    fn pivots(mut self) {
        self.daemon.ok("pivot", &["vda", "--verified"]);
        assert_eq!(self.status()["serving"], self.target.display().to_string());
        self.daemon.stop();
        assert_same("the target", &content(&self.target, self.format), &self.truth);
        drop(self.folder);
    }
}

#[test]
fn what_was_overwritten_underneath_is_found_mended_and_counted() {
    for format in ["raw", "qcow2"] {
        let quiet = Quiet::ready(format, &[]);
        let mut qmp = Qmp::connect(&quiet.daemon.control_socket());
        let said = quiet.daemon.refused("pivot", &["vda", "--verified"]);
        assert!(said.contains("nobody had the target of export vda read back"), "{said}");
        assert!(said.contains("blkmirror verify --wait vda"), "{said}");
        // Two chunks, far apart, and one of which a single sector is wrong.
        for at in [64 << 10, 5 << 20] {
            quiet.overwrite(quiet.place(at), 8 << 10);
        }
        quiet.overwrite(quiet.place((12 << 20) + 512), 512);
        let said = quiet.daemon.ok("verify", &["vda", "--wait"]);
        assert!(said.contains(&format!("{DISK_LEN} bytes were read back, 3 mismatches")), "{format}: {said}");
        let status = quiet.status();
        let expected = [("verified", json!(true)), ("verifying", json!(false)), ("mismatches", json!(3))];
        expected.iter().for_each(|(name, value)| assert_eq!(&status[name], value, "{status}"));
        assert_eq!((&status["phase"], &status["verified_bytes"]), (&json!("ready"), &json!(DISK_LEN)), "{status}");
        let over = qmp.hear("the end", |event| {
            let is_mismatch = event["event"] == "BLKMIRROR_MISMATCH";
            assert!(!is_mismatch || event["data"]["offset"].as_u64().is_some_and(|at| at < 16 << 20), "{event}");
            event["event"] == "BLKMIRROR_VERIFIED"
        });
        let expected = json!({ "export": "vda", "job": "vda", "verified-bytes": DISK_LEN, "mismatches": 3 });
        assert_eq!(over["data"], expected);
        // Mended: another one finds nothing.
        let said = quiet.daemon.ok("verify", &["vda", "--wait"]);
        assert!(said.contains("0 mismatches"), "{said}");
        quiet.pivots();
    }
}

#[test]
fn what_was_to_be_zeroes_and_is_not_is_a_mismatch() {
    let quiet = Quiet::ready("raw", &[]);
    let file = File::options().write(true).open(&quiet.target).expect("the target");
    file.write_all_at(b"not zeroes", (20 << 20) + 1000).expect("a write");
    file.sync_all().expect("a flush");
    let said = quiet.daemon.ok("verify", &["vda", "--wait", "--json"]);
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let expected = json!({ "export": "vda", "result": "verified", "verified_bytes": DISK_LEN, "mismatches": 1 });
    assert_eq!(said, expected);
    quiet.pivots();
}

#[test]
fn a_mirror_that_is_to_be_verified_is_when_it_is_ready() {
    let quiet = Quiet::ready("qcow2", &["--verify"]);
    let status = quiet.status();
    assert_eq!((&status["verified"], &status["mismatches"]), (&json!(true), &json!(0)), "{status}");
    quiet.pivots();
}

#[test]
fn a_job_that_is_not_ready_is_not_verified() {
    let folder = folder();
    let source = folder.path().join("source.raw");
    fs::write(&source, Random::new(7).bytes(DISK_LEN as usize)).expect("a file of ours");
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", source.display())]);
    let said = daemon.refused("verify", &["vda"]);
    assert!(said.contains("has no copy job"), "{said}");
    let target = folder.path().join("target").display().to_string();
    daemon.ok("mirror", &["vda", &target, "--speed", "1M", "--verify"]);
    assert!(daemon.refused("verify", &["vda"]).contains("still to copy"));
    assert!(daemon.refused("pivot", &["vda", "--verified"]).contains("still to copy"));
    daemon.ok("cancel", &["vda", "--force"]);
}

#[test]
fn a_guests_writes_are_no_mismatch() {
    for (seed, mode, options) in
        [(50, "background", &["--raw"][..]), (51, "write-blocking", &[]), (52, "auto", &["--shallow"])]
    {
        let mut scene = Scene::new(seed);
        let truth = scene.writer.take().expect("a guest").stop();
        let habits = Habits { seed, pause: std::time::Duration::ZERO, flush_one_in: 500, ..Habits::default() };
        scene.writer = Some(Writer::start(&scene.daemon.socket(), "vda", truth, habits));
        scene.writes(100);
        scene.mirror(&[options, &["--mode", mode, "--verify"]].concat());
        for round in 0..4 {
            let status = eventually("everything is verified", || {
                let status = scene.status();
                (status["verified"] == true).then_some(status)
            });
            assert_eq!(status["mismatches"], 0, "{mode}, round {round}: {status}\n{}", scene.daemon.log());
            scene.writes(20);
            eventually("it is ready", || {
                output(&mut scene.daemon.command("verify", &["vda"])).status.success().then_some(())
            });
        }
        eventually("it pivots, verified", || {
            let mut command = scene.daemon.command("pivot", &["vda", "--verified"]);
            output(&mut command).status.success().then_some(())
        });
        assert_eq!(scene.status()["mismatches"], 0);
        scene.ends_on_the_target(if mode == "background" { "raw" } else { "qcow2" });
    }
}

#[test]
fn an_image_is_held_against_a_manifest() {
    let folder = folder();
    let [source, target, manifest, other] =
        ["source", "target", "manifest", "other"].map(|name| folder.path().join(name));
    images::holding(&source, "qcow2", &images::thin_disk((5 << 20) + 512), &[]);
    let blkmirror = |words: &[&str], paths: &[&Path]| {
        let mut command = Command::new(program());
        command.args(words).args(paths);
        command
    };
    ran(&mut blkmirror(&["convert", "--format", "raw", "--manifest"], &[&manifest, &source, &target]));
    let lines = fs::read_to_string(&manifest).expect("a manifest");
    assert!(lines.starts_with(&format!("blkmirror-manifest 1 size={} range=1048576 hash=blake3\n0 ", (5 << 20) + 512)));
    assert_eq!(lines.lines().count(), 7);
    // Whatever the format: it is the disk's bytes.
    for (image, format) in [(&source, "qcow2"), (&target, "raw")] {
        let said = ran(&mut blkmirror(&["verify", "--format", format, "--manifest"], &[&manifest, image]));
        assert!(said.contains("are as"), "{said}");
    }
    ran(&mut blkmirror(&["compare", "--b-format", "raw", "--manifest"], &[&other, &source, &target]));
    assert_eq!(fs::read_to_string(&other).expect("a manifest"), lines);

    let file = File::options().write(true).open(&target).expect("the target");
    file.write_all_at(b"x", (3 << 20) + 77).expect("a write");
    let mut command = blkmirror(&["verify", "--json", "--format", "raw", "--manifest"], &[&manifest, &target]);
    let differs = output(&mut command);
    let said: Value = serde_json::from_slice(&differs.stdout).expect("JSON");
    assert_eq!(said, json!({ "result": "content-differs", "offset": 3 << 20, "bytes": 1 << 20 }));
    assert_eq!(differs.status.code(), Some(1));
    fs::remove_file(&other).expect("a file of ours");
    let differs = output(&mut blkmirror(&["compare", "--b-format", "raw", "--manifest"], &[&other, &source, &target]));
    assert!(differs.status.code() == Some(1) && !other.exists(), "no manifest of what is not one");

    let check = || blkmirror(&["verify", "--manifest"], &[&other, &source]);
    let last = lines.trim_end().rfind('\n').expect("several lines") + 1;
    for (text, reason) in [
        (lines[..last].to_owned(), "it ends before the range at 5242880"),
        (lines.trim_end().to_owned(), "a line has no end"),
        (format!("{lines}0 0\n"), "it goes on behind the disk's last range"),
        (lines.replace("\n1048576 ", "\n1048575 "), "a line of 1048575 where that of 1048576 belongs"),
        (lines.replace("blake3", "md5"), "hash=blake3 was expected"),
        ("x".repeat(10_000), "a line has no end, or is longer"),
    ] {
        fs::write(&other, text).expect("a file of ours");
        refused(check(), &[&other.display().to_string(), reason]);
    }
    fs::write(&other, lines.replacen("size=", "size=1", 1)).expect("a file of ours");
    assert_eq!(output(&mut check()).status.code(), Some(1));
}
