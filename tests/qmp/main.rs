//! The control socket: several clients, bad ones among them, and the life of jobs that end by hand.
mod peers;
#[path = "../support/mod.rs"]
mod support;

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use support::daemon::Daemon;
use support::images::{create, fill};
use support::qmp::Qmp;
use support::random::Random;
use support::server::Server;
use support::tools::{check, content};
use support::writer::{Habits, Writer};
use support::{assert_same, eventually, folder};

const DISK_LEN: u64 = 8 << 20;
/// Slow enough that a job is still under way when it is told something.
const SLOW: u64 = 1 << 16;

/// One disk that is served, and a client.
struct Scene {
    daemon: Daemon,
    qmp: Qmp,
    disk: PathBuf,
    folder: tempfile::TempDir,
}

impl Scene {
    #[track_caller]
    fn new(seed: u64) -> Self {
        let folder = folder();
        let disk = folder.path().join("disk.qcow2");
        create(&disk, "qcow2", DISK_LEN, &[]);
        fill(&disk, "qcow2", DISK_LEN, 1 << 16, &mut Random::new(seed));
        let daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
        let qmp = Qmp::connect(&daemon.control_socket());
        Self { daemon, qmp, disk, folder }
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("target.qcow2")
    }

    /// The arguments of a copy of the disk by the job `move`, and more of them.
    fn copy(&self, target: &Path, more: Value) -> Value {
        let mut arguments = json!({ "device": "vda", "target": target, "sync": "full", "job-id": "move" });
        let more = more.as_object().expect("an object").clone();
        arguments.as_object_mut().expect("an object").extend(more);
        arguments
    }

    #[track_caller]
    fn start(&mut self, more: Value) {
        let arguments = self.copy(&self.target(), more);
        self.qmp.ok("drive-mirror", arguments);
    }

    /// What `query-jobs` says of the job `move`.
    fn job(&mut self) -> Option<Value> {
        let jobs = self.qmp.ok("query-jobs", json!({}));
        jobs.as_array().expect("a list").iter().find(|job| job["id"] == "move").cloned()
    }

    /// How the job `move` stands.
    fn stands(&mut self) -> String {
        self.job().and_then(|job| job["status"].as_str().map(str::to_owned)).unwrap_or_default()
    }
}

#[test]
fn several_clients_hear_of_what_one_of_them_does() {
    let mut scene = Scene::new(1);
    let mut others: Vec<Qmp> = (0..5).map(|_| Qmp::connect(&scene.daemon.control_socket())).collect();
    scene.start(json!({}));
    for other in &mut others {
        other.status("move", "created");
        other.event("BLOCK_JOB_READY");
    }
    // Any of them may tell the job something, and each gets its own answers.
    others[0].ok("block-job-pause", json!({ "device": "move" }));
    for (number, other) in others.iter_mut().enumerate() {
        other.status("move", "standby");
        other.send(format!("{{\"execute\":\"query-jobs\",\"id\":{number}}}").as_bytes());
    }
    for (number, other) in others.iter_mut().enumerate() {
        let answer = other.answer();
        assert_eq!((&answer["id"], &answer["return"][0]["status"]), (&json!(number), &json!("standby")));
    }
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_nobody_waits_for_it() {
    let mut scene = Scene::new(2);
    let mut silent = Qmp::connect(&scene.daemon.control_socket());
    scene.start(json!({ "speed": SLOW }));
    let verb = |verb: &str| format!("{}\n", json!({ "execute": verb, "arguments": { "export": "vda" } }));
    let both = verb("blkmirror-pause") + &verb("blkmirror-resume");
    // Each round is told to everybody; what the silent one does not read piles up, in its socket first.
    let rounds = 50;
    for _ in 0..rounds {
        scene.qmp.send(both.repeat(rounds).as_bytes());
        for _ in 0..2 * rounds {
            assert_eq!(scene.qmp.answer()["return"], json!({}));
        }
    }
    assert!(silent.is_dropped(), "it would be told more than 1 MiB");
    // Each of so many pauses is kept for the next daemon, so on a slow disk the copy has come to its end meanwhile.
    let stands = scene.stands();
    assert!(["running", "ready"].contains(&stands.as_str()), "{stands}");
    scene.qmp.ok("quit", json!({}));
}

#[test]
fn a_line_that_is_too_long_is_an_error_and_the_session_goes_on() {
    let mut scene = Scene::new(3);
    scene.qmp.send(&vec![b'x'; 1 << 20]);
    scene.qmp.send(b"\n{\"execute\":\"query-version\",\"id\":7}\n");
    let answer = scene.qmp.answer();
    assert!(answer["error"]["desc"].as_str().is_some_and(|desc| desc.contains("longer than 65536 bytes")), "{answer}");
    assert_eq!(scene.qmp.answer()["id"], 7);
}

/// A pending job of QEMU keeps its guest waiting.
#[test]
fn a_pivot_that_waits_to_be_finalized_does_not_hold_the_guest() {
    let mut scene = Scene::new(4);
    let truth = content(&scene.disk, "qcow2");
    let writer = Writer::start(&scene.daemon.socket(), "vda", truth, Habits { seed: 4, ..Habits::default() });
    scene.start(json!({ "auto-finalize": false, "auto-dismiss": false }));
    scene.qmp.event("BLOCK_JOB_READY");
    scene.qmp.ok("block-job-complete", json!({ "device": "move" }));
    scene.qmp.event("BLOCK_JOB_PENDING");
    writer.wait(200);
    assert_eq!(scene.stands(), "pending");
    let status = scene.daemon.status("vda");
    assert_eq!(status["serving"], scene.disk.display().to_string(), "{status}");
    let said = scene.daemon.refused("cancel", &["vda"]);
    assert!(said.contains("finalize it, or cancel it with force"), "{said}");
    // What is undone because the last pass took too long can be asked for again.
    eventually("the job concludes", || {
        match scene.stands().as_str() {
            "concluded" => return Some(()),
            "ready" => drop(scene.qmp.ask("block-job-complete", json!({ "device": "move" }))),
            "pending" => drop(scene.qmp.ask("job-finalize", json!({ "id": "move" }))),
            _ => {}
        }
        None
    });
    writer.wait(50);
    let truth = writer.stop();
    let status = scene.daemon.status("vda");
    assert_eq!((&status["phase"], &status["serving"]), (&json!("pivoted"), &json!(scene.target())), "{status}");
    // Its name is taken until it is dismissed.
    let again = scene.copy(&scene.folder.path().join("again"), json!({}));
    let error = scene.qmp.refused("drive-mirror", again);
    assert_eq!(error["code"], "INVALID_ARG", "{error}");
    scene.qmp.ok("job-dismiss", json!({ "id": "move" }));
    assert_eq!(scene.job(), None);
    scene.daemon.stop();
    assert_same("the target", &content(&scene.target(), "qcow2"), &truth);
    check(&scene.target(), "qcow2");
}

#[test]
fn who_waits_for_the_end_finalizes_it() {
    for (end, verb) in [("block-job-complete", "pivot"), ("block-job-cancel", "cancel")] {
        let mut scene = Scene::new(5);
        scene.start(json!({ "auto-finalize": false }));
        scene.qmp.event("BLOCK_JOB_READY");
        scene.qmp.ok(end, json!({ "device": "move" }));
        scene.qmp.event("BLOCK_JOB_PENDING");
        scene.daemon.ok(verb, &["vda"]);
        scene.qmp.event("BLOCK_JOB_COMPLETED");
        scene.qmp.status("move", "null");
    }
    // And where nothing is pending yet, it does not come to that.
    let mut scene = Scene::new(5);
    scene.start(json!({ "auto-finalize": false }));
    scene.qmp.event("BLOCK_JOB_READY");
    scene.daemon.ok("pivot", &["vda"]);
    scene.qmp.status("move", "null");
}

/// A mirror that was dead by itself had lost its error.
#[test]
fn a_job_that_failed_is_kept_with_its_error_until_it_is_dismissed() {
    let mut scene = Scene::new(6);
    // Writes fail, and nobody minds until then.
    let size = DISK_LEN.to_string();
    let words = ["--filter=error", "memory", &size, "error=ENOSPC", "error-pwrite-rate=100%", "error-zero-rate=100%"];
    let server = Server::nbdkit(scene.folder.path(), &words);
    let arguments = scene.copy(Path::new(&server.uri("")), json!({ "mode": "existing", "auto-dismiss": false }));
    scene.qmp.ok("drive-mirror", arguments);
    let error = scene.qmp.event("BLOCK_JOB_ERROR");
    assert_eq!((&error["data"]["operation"], &error["data"]["action"]), (&json!("write"), &json!("report")));
    scene.qmp.status("move", "aborting");
    let completed = scene.qmp.event("BLOCK_JOB_COMPLETED");
    let error = completed["data"]["error"].clone();
    assert!(error.as_str().is_some_and(|error| error.contains("No space left")), "{completed}");
    let job = scene.job().expect("it is kept");
    assert_eq!((&job["status"], &job["error"]), (&json!("concluded"), &error));
    let block_jobs = scene.qmp.ok("query-block-jobs", json!({}));
    assert_eq!((&block_jobs[0]["device"], &block_jobs[0]["error"]), (&json!("move"), &error));
    scene.qmp.ok("block-job-dismiss", json!({ "id": "move" }));
    scene.qmp.status("move", "null");
    assert_eq!(scene.job(), None);
    assert_eq!(scene.daemon.status("vda")["phase"], "failed", "the export's status stays");
}

#[test]
fn a_job_that_rests_after_an_error_says_why_and_can_be_resumed() {
    let mut scene = Scene::new(7);
    let fails = scene.folder.path().join("fails");
    std::fs::write(&fails, "").expect("a file of ours");
    // The server fails as long as the file is there.
    let (size, file) = (DISK_LEN.to_string(), format!("error-pwrite-file={}", fails.display()));
    let words = ["--filter=error", "memory", &size, "error=ENOSPC", "error-pwrite-rate=100%", &file];
    let server = Server::nbdkit(scene.folder.path(), &words);
    let arguments = scene.copy(Path::new(&server.uri("")), json!({ "mode": "existing", "on-target-error": "enospc" }));
    scene.qmp.ok("drive-mirror", arguments);
    let error = scene.qmp.event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "stop");
    scene.qmp.status("move", "paused");
    let job = scene.qmp.ok("query-block-jobs", json!({}))[0].take();
    assert_eq!((&job["paused"], &job["io-status"]), (&json!(true), &json!("nospace")), "{job}");
    std::fs::remove_file(&fails).expect("a file of ours");
    // A write of before may still fail after the first resume.
    eventually("the job is ready", || {
        match scene.stands().as_str() {
            "ready" => return Some(()),
            "paused" => drop(scene.qmp.ok("job-resume", json!({ "id": "move" }))),
            _ => {}
        }
        None
    });
    let job = scene.qmp.ok("query-block-jobs", json!({}))[0].take();
    assert_eq!((&job["io-status"], &job["error"]), (&json!("ok"), &Value::Null), "{job}");
}

/// A restart knows of the job, not of the end that it waited with.
#[test]
fn a_kill_while_an_end_waits_leaves_the_source_and_the_job() {
    let mut scene = Scene::new(8);
    let truth = content(&scene.disk, "qcow2");
    scene.start(json!({ "auto-finalize": false, "auto-dismiss": false }));
    scene.qmp.event("BLOCK_JOB_READY");
    scene.qmp.ok("job-complete", json!({ "id": "move" }));
    scene.qmp.event("BLOCK_JOB_PENDING");
    scene.daemon.kill();
    scene.daemon.start();
    scene.qmp = Qmp::connect(&scene.daemon.control_socket());
    let status = scene.daemon.wait_for("vda", "ready");
    assert_eq!(status["serving"], scene.disk.display().to_string(), "{status}");
    assert_eq!(scene.stands(), "ready");
    scene.qmp.ok("job-complete", json!({ "id": "move" }));
    scene.qmp.event("BLOCK_JOB_PENDING");
    scene.qmp.ok("job-finalize", json!({ "id": "move" }));
    scene.qmp.status("move", "concluded");
    scene.daemon.stop();
    assert_same("the target", &content(&scene.target(), "qcow2"), &truth);
}

/// A job that could not go on after a restart was gone, with its reason, for those who ask for jobs.
#[test]
fn a_job_that_cannot_go_on_after_a_kill_is_kept_with_its_error() {
    let mut scene = Scene::new(9);
    scene.start(json!({ "speed": SLOW, "auto-dismiss": false }));
    scene.daemon.kill();
    std::fs::remove_file(scene.target()).expect("nobody uses it");
    scene.daemon.start();
    scene.qmp = Qmp::connect(&scene.daemon.control_socket());
    let job = scene.job().expect("it is kept");
    assert_eq!(job["status"], "concluded");
    assert!(job["error"].as_str().is_some_and(|error| error.contains("cannot be found")), "{job}");
    scene.qmp.ok("job-dismiss", json!({ "id": "move" }));
    assert_eq!(scene.job(), None);
}

/// The manual has a row for every command and event, with all that it takes or says.
#[test]
fn the_manual_has_everything() {
    let mut scene = Scene::new(10);
    let manual = include_str!("../../docs/qmp.md");
    let schema = scene.qmp.ok("query-qmp-schema", json!({}));
    let entries = schema.as_array().expect("a list");
    let members = |name: &Value| {
        let object = entries.iter().find(|entry| entry["meta-type"] == "object" && entry["name"] == *name);
        object.expect("its type")["members"].as_array().expect("members").clone()
    };
    let mut told = 0;
    for entry in entries.iter().filter(|entry| entry["meta-type"] == "command" || entry["meta-type"] == "event") {
        let word = |name: &Value| format!("`{}`", name.as_str().expect("a name"));
        let name = word(&entry["name"]);
        let in_its_place = |line: &&str| line.split('|').nth(1).is_some_and(|cell| cell.contains(&name));
        let row = manual.lines().find(in_its_place).unwrap_or_else(|| panic!("docs/qmp.md has no row for {name}"));
        for member in members(&entry["arg-type"]) {
            assert!(row.contains(&word(&member["name"])), "docs/qmp.md: {name} has a {}: {row}", member["name"]);
        }
        told += 1;
    }
    assert!(told > 35, "{told}");
}
