//! Errors of either side, and what a job can be told while it runs.
//!
//! Held here: a job backs off from a target that has no space, fails or is away, and goes on by itself; no guest
//! notices, in whatever mode; it is not called ready without what failed. That space may be short is said before. What
//! is set holds in every phase, and through a kill.

use crate::support::daemon::Daemon;
use crate::support::images::{holding, thin_disk};
use crate::support::qmp::Qmp;
use crate::support::remote::{DISK_LEN, Remote};
use crate::support::server::{Server, garbage, held, two_folders};
use crate::support::tools::allocated;
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The small file system, and what is in its way there: too little is left for the disk.
const SMALL_LEN: usize = 40 << 20;
const FILLER_LEN: usize = 32 << 20;

/// A disk that is served to a guest by a daemon with a small file system of its own.
struct Small {
    guest: Writer,
    daemon: Daemon,
    qmp: Qmp,
    mount: PathBuf,
    folder: TempDir,
}

impl Small {
    #[track_caller]
    fn new(seed: u64) -> Self {
        let folder = folder();
        let (source, mount) = (folder.path().join("disk.raw"), folder.path().join("small"));
        fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
        fs::create_dir(&mount).expect("a folder of ours");
        // Gone with the daemon, which is the only process that sees it.
        let mounted = format!("mount -t tmpfs -o size={SMALL_LEN} none {} && exec \"$@\"", mount.display());
        let through = ["unshare", "-rm", "sh", "-c", &mounted, "sh"];
        let export = format!("vda={},format=raw", source.display());
        let daemon = Daemon::serve_through(&through, folder.path(), &[export], &[]);
        let small = Self {
            guest: Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), Habits { seed, ..Habits::default() }),
            qmp: Qmp::connect(&daemon.control_socket()),
            daemon,
            mount,
            folder,
        };
        fs::write(small.seen("filler"), vec![1; FILLER_LEN]).expect("there is space for that");
        small
    }

    /// A file of the small file system, as it can be seen from here.
    fn seen(&self, name: &str) -> PathBuf {
        let mount = self.mount.strip_prefix("/").expect("a full path");
        Path::new("/proc").join(self.daemon.pid().to_string()).join("root").join(mount).join(name)
    }

    fn target(&self) -> String {
        self.mount.join("target").display().to_string()
    }
}

/// Backing off, and nothing else: not paused, not ready, with a word on why.
#[track_caller]
fn backs_off(daemon: &Daemon, io_status: &str, words: &str) -> Value {
    let status = eventually("the job backs off", || {
        Some(daemon.status("vda")).filter(|status| status["back_off_ms"].as_u64().is_some_and(|rest| rest >= 800))
    });
    assert_eq!((&status["paused"], &status["io_status"]), (&json!(false), &json!(io_status)), "{status}");
    assert!(matches!(status["phase"].as_str(), Some("seeding" | "converging")), "{status}");
    assert!(status["error"].as_str().is_some_and(|error| error.contains(words)), "{status}");
    status
}

#[track_caller]
fn recovered(daemon: &Daemon) {
    let status = daemon.wait_for("vda", "ready");
    let calm =
        [("back_off_ms", json!(null)), ("io_status", json!("ok")), ("error", json!(null)), ("failed_bytes", json!(0))];
    calm.iter().for_each(|(name, value)| assert_eq!(status[name], *value, "{name}: {status}"));
}

#[test]
fn a_target_without_space_gets_the_disk_when_there_is_some() {
    for (seed, format, mode) in [(1, "raw", "write-blocking"), (2, "qcow2", "background"), (3, "raw", "auto")] {
        let mut small = Small::new(seed);
        let words = ["vda", &small.target(), "--format", format, "--mode", mode, "--json"];
        let possible = small.daemon.ok("mirror", &[&words[..], &["--dry-run"]].concat());
        let started = small.daemon.ok("mirror", &words);
        for said in [possible, started] {
            let said: Value = serde_json::from_str(&said).expect("JSON");
            let notes = said["notes"].as_array().expect("a list");
            let warns = |note: &Value| note.as_str().is_some_and(|note| note.contains("the copy may need"));
            assert!(notes.iter().any(warns), "{said}");
        }
        let error = small.qmp.event("BLOCK_JOB_ERROR");
        assert_eq!(
            (&error["data"]["operation"], &error["data"]["action"]),
            (&json!("write"), &json!("ignore")),
            "{error}"
        );
        let begun = small.qmp.event("BLKMIRROR_BACK_OFF");
        assert_eq!((&begun["data"]["active"], &begun["data"]["export"]), (&json!(true), &json!("vda")), "{begun}");
        let status = backs_off(&small.daemon, "nospace", "No space left");
        assert!(status["failed_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{status}");
        small.guest.wait(200);
        let said = small.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("still to copy"), "{said}");
        fs::remove_file(small.seen("filler")).expect("a file of ours");
        small
            .qmp
            .hear("it goes on", |event| event["event"] == "BLKMIRROR_BACK_OFF" && event["data"]["active"] == false);
        recovered(&small.daemon);
        small.daemon.pivot("vda");
        small.guest.wait(50);
        let Small { guest, mut daemon, folder, .. } = small;
        let truth = guest.stop();
        assert_same(&format!("{format}, {mode}"), &held(&daemon.uri("vda"), folder.path()), &truth);
        daemon.stop();
    }
}

#[test]
fn what_a_job_backs_off_from_can_be_decided_otherwise() {
    let small = Small::new(4);
    small.daemon.ok("mirror", &["vda", &small.target(), "--raw"]);
    backs_off(&small.daemon, "nospace", "No space left");
    small.daemon.ok("set", &["vda", "--on-target-error", "enospc"]);
    let paused = || Some(small.daemon.status("vda")).filter(|status| status["paused"] == true);
    let status = eventually("it pauses", paused);
    assert_eq!((&status["io_status"], &status["back_off_ms"]), (&json!("nospace"), &json!(null)), "{status}");
    small.daemon.ok("set", &["vda", "--on-target-error", "back-off"]);
    backs_off(&small.daemon, "nospace", "No space left");
    small.daemon.ok("set", &["vda", "--on-target-error", "report"]);
    let status = small.daemon.wait_for("vda", "failed");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("No space left")), "{status}");
    small.guest.wait(50);
    let Small { guest, mut daemon, .. } = small;
    guest.stop();
    daemon.stop();
}

/// Ready first, so that nothing but the guest's own writes is left to fail; then away, and there again.
#[test]
fn a_server_that_is_away_is_backed_off_from_also_when_ready() {
    let mut scene = Remote::new(&[], &|_| Vec::new(), Habits { seed: 5, ..Habits::default() });
    scene.daemon.ok("mirror", &["vda", &scene.server.uri(""), "--wait"]);
    scene.server.kill();
    backs_off(&scene.daemon, "failed", "the connection to the server is lost");
    scene.guest.wait(200);
    scene.server.again();
    recovered(&scene.daemon);
    scene.daemon.pivot("vda");
    scene.guest.wait(50);
    scene.stop();
}

/// A source whose reads fail for a while: the policies are QEMU's, and the copy is never called ready without what
/// could not be read.
#[test]
fn what_the_policy_says_of_an_error_of_the_source_is_done() {
    for (policy, number) in [("report", 6), ("stop", 7), ("enospc", 8), ("ignore", 9), ("back-off", 10)] {
        let folder = folder();
        let (theirs, ours) = two_folders(folder.path());
        let (file, trigger) = (folder.path().join("disk"), folder.path().join("fail"));
        fs::write(&file, thin_disk(DISK_LEN)).expect("a file of ours");
        let words = [
            format!("file={}", file.display()),
            format!("error-pread-file={}", trigger.display()),
            "error-pread-rate=100%".to_owned(),
        ];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let server = Server::nbdkit(&theirs, &[&["--filter=error", "file"], &words[..]].concat());
        let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", server.uri(""))]);
        // Nothing can be read for a while, by the guest either.
        let habits = Habits { seed: number, reads: false, ..Habits::default() };
        let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), habits);
        fs::write(&trigger, "").expect("a folder of ours");
        let target = folder.path().join("target");
        let name = target.display().to_string();
        match policy {
            // QEMU's default, and ours.
            "report" => daemon.ok("mirror", &["vda", &name, "--raw"]),
            _ => daemon.ok("mirror", &["vda", &name, "--raw", "--on-source-error", policy]),
        };
        let told = |status: &Value| status["error"].as_str().is_some_and(|error| error.starts_with("source"));
        match policy {
            "report" | "enospc" => assert!(told(&daemon.wait_for("vda", "failed")), "{policy}"),
            "stop" => {
                let paused = || Some(daemon.status("vda")).filter(|status| status["paused"] == true);
                assert!(told(&eventually("the job pauses", paused)), "{policy}");
                fs::remove_file(&trigger).expect("a file of ours");
                daemon.ok("resume", &["vda"]);
            }
            _ => {
                eventually("it meets the error", || told(&daemon.status("vda")).then_some(()));
                guest.wait(300);
                let status = daemon.status("vda");
                assert!(status["phase"] != "ready" && status["failed_bytes"] != 0, "{policy}: {status}");
                fs::remove_file(&trigger).expect("a file of ours");
            }
        }
        if !matches!(policy, "report" | "enospc") {
            recovered(&daemon);
            daemon.pivot("vda");
        }
        guest.wait(50);
        let truth = guest.stop();
        daemon.stop();
        if !matches!(policy, "report" | "enospc") {
            assert_same(policy, &fs::read(&target).expect("a file of ours"), &truth);
        }
    }
}

/// A guest that leaves a slow target time to follow, but for the last of it.
fn restless(seed: u64) -> Habits {
    Habits { seed, depth: 2, len_max: 8 << 10, ..Habits::default() }
}

#[test]
fn a_pivot_that_takes_longer_than_the_pause_allows_is_undone_with_the_numbers() {
    let words = |_: &Path| ["delay-write=100ms", "delay-zero=100ms"].map(str::to_owned).to_vec();
    let scene = Remote::new(&["--filter=delay"], &words, restless(11));
    let refused = |args: &[&str], words: &str| {
        let said = String::from_utf8(scene.daemon.command("set", args).output().expect("our program").stderr);
        assert!(said.expect("text").contains(words), "{args:?}");
    };
    scene.daemon.ok("mirror", &["vda", &scene.server.uri(""), "--max-pause", "1", "--wait"]);
    assert_eq!(scene.daemon.status("vda")["pause_budget_ms"], 1);
    // Something is always under way, and a write takes a hundred times as long.
    let said = eventually("a pivot is undone", || {
        let output = scene.daemon.command("pivot", &["vda"]).output().expect("our program");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "a write takes 100 ms");
        said.contains("pause").then_some(said)
    });
    assert!(said.contains("(1 ms)"), "{said}");
    scene.guest.wait(20);
    refused(&["vda", "--max-pause", "0"], "invalid value '0'");
    scene.daemon.ok("set", &["vda", "--max-pause", "60000"]);
    assert_eq!(scene.daemon.status("vda")["pause_budget_ms"], 60_000);
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    scene.guest.wait(20);
    scene.stop();
}

#[test]
fn what_was_set_holds_in_every_phase_and_through_a_kill() {
    let folder = folder();
    let (source, target) = (folder.path().join("disk.raw"), folder.path().join("target"));
    fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", source.display())]);
    let name = target.display().to_string();
    daemon.ok("mirror", &["vda", &name, "--raw", "--speed", "1M"]);
    let status = daemon.status("vda");
    let begun = ["on_target_error", "on_source_error", "pause_budget_ms"].map(|name| status[name].clone());
    assert_eq!(begun, [json!("back-off"), json!("report"), json!(5000)], "{status}");
    let most = status["buf_size_bytes"].as_u64().expect("a number");
    assert_eq!(daemon.ok("pause", &["vda"]), "vda: paused\n");
    let orders = [
        "vda",
        "--speed",
        "256K",
        "--mode",
        "background",
        "--on-target-error",
        "enospc",
        "--on-source-error",
        "ignore",
        "--max-pause",
        "700",
        "--buf-size",
        "512K",
    ];
    daemon.ok("set", &orders);
    let expected = json!({
        "paused": true, "speed_bytes_per_s": 256 << 10, "mode": "background", "on_target_error": "enospc",
        "on_source_error": "ignore", "pause_budget_ms": 700, "buf_size_bytes": 512 << 10,
    });
    let holds = |daemon: &Daemon, expected: &Value| {
        let status = daemon.status("vda");
        for (name, value) in expected.as_object().expect("an object") {
            assert_eq!(status[name], *value, "{name}: {status}");
        }
        status
    };
    holds(&daemon, &expected);
    daemon.kill();
    daemon.start();
    let status = holds(&daemon, &expected);
    assert!(status["phase"] == "seeding" || status["phase"] == "converging", "{status}");
    let copied = daemon.status("vda")["copied_bytes"].clone();
    daemon.ok("resume", &["vda"]);
    daemon.ok("set", &["vda", "--speed", "0", "--buf-size", "0"]);
    daemon.kill();
    daemon.start();
    let status = holds(&daemon, &json!({ "paused": false, "speed_bytes_per_s": 0, "buf_size_bytes": most }));
    assert!(copied.is_u64(), "{status}");
    daemon.wait_for("vda", "ready");
    // Ready, and then ready and paused.
    daemon.ok("set", &["vda", "--mode", "write-blocking", "--on-target-error", "stop"]);
    daemon.ok("pause", &["vda"]);
    daemon.ok("set", &["vda", "--max-pause", "900"]);
    let expected =
        json!({ "mode": "write-blocking", "on_target_error": "stop", "pause_budget_ms": 900, "paused": true });
    assert_eq!(holds(&daemon, &expected)["phase"], "ready");
    let mut qmp = Qmp::connect(&daemon.control_socket());
    qmp.ok(
        "blkmirror-set",
        json!({ "export": "vda", "pause-budget": 800, "on-source-error": "back-off", "buf-size": 1 }),
    );
    holds(&daemon, &json!({ "pause_budget_ms": 800, "on_source_error": "back-off", "buf_size_bytes": 256 << 10 }));
    let error = qmp.refused("blkmirror-set", json!({ "export": "vda", "pause-budget": 0 }));
    assert_eq!(error["code"], "INVALID_ARG", "{error}");
    daemon.pivot("vda");
    let error = qmp.refused("blkmirror-set", json!({ "export": "vda", "speed": 1 }));
    let said = error["desc"].as_str().unwrap_or_default();
    assert!(said.contains("has no copy job: start one with"), "{error}");
    daemon.stop();
    assert_same("the target", &fs::read(&target).expect("a file of ours"), &fs::read(&source).expect("a file of ours"));
}

/// What was data on the target and is zeroes on the source keeps its space where holes are not wanted.
#[test]
fn zeroes_are_written_where_holes_are_not_wanted() {
    let folder = folder();
    let source = folder.path().join("disk.qcow2");
    let mut truth = thin_disk(DISK_LEN);
    truth[4 << 20..20 << 20].fill(0);
    holding(&source, "qcow2", &truth, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", source.display())]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    for (number, unmap) in [(1, json!(false)), (2, json!(true)), (3, json!(null))] {
        let target = garbage(folder.path(), &format!("target{number}"), DISK_LEN);
        let mut arguments =
            json!({ "device": "vda", "target": target, "sync": "full", "mode": "existing", "format": "raw" });
        match &unmap {
            Value::Null => {
                daemon.ok("mirror", &["vda", &target.display().to_string(), "--reuse-external", "--raw", "--no-unmap"]);
            }
            unmap => {
                arguments["unmap"] = unmap.clone();
                qmp.ok("drive-mirror", arguments);
            }
        }
        daemon.wait_for("vda", "ready");
        daemon.ok("cancel", &["vda"]);
        assert_same("the target", &fs::read(&target).expect("a file of ours"), &truth);
        let thin = allocated(&target) < 12 << 20;
        assert_eq!(thin, unmap == json!(true), "{unmap}: {} bytes", allocated(&target));
    }
    daemon.stop();
}

/// Zeroes that have to be written went by the speed limit, as if they were holes.
#[test]
fn zeroes_that_have_to_be_written_count_for_the_speed() {
    const ZEROES: u64 = 64 << 20;
    let folder = folder();
    let (theirs, ours) = two_folders(folder.path());
    let (source, file) = (folder.path().join("disk.raw"), folder.path().join("old"));
    let zeroes = fs::File::create(&source).and_then(|file| file.set_len(ZEROES));
    zeroes.and_then(|()| fs::write(&file, vec![0xee; ZEROES as usize])).expect("files of ours");
    let server = Server::nbdkit(&theirs, &["--filter=nozero", "file", &format!("file={}", file.display())]);
    let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
    daemon.ok("mirror", &["vda", &server.uri(""), "--speed", "1K"]);
    let copied = |daemon: &Daemon| daemon.status("vda")["copied_bytes"].as_u64().expect("a number");
    let first = eventually("some are written", || Some(copied(&daemon)).filter(|bytes| *bytes > 0));
    // What is under way by then comes to its end; at this speed the rest takes hours.
    let last = eventually("nothing more is", || {
        let before = copied(&daemon);
        std::thread::sleep(std::time::Duration::from_millis(300));
        Some(before).filter(|before| copied(&daemon) == *before)
    });
    assert!(first <= last && last < ZEROES, "{first} and {last}");
    assert_ne!(daemon.status("vda")["phase"], "ready");
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    daemon.stop();
    assert!(fs::read(&file).expect("a file of ours").iter().all(|byte| *byte == 0));
}
