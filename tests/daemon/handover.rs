//! A daemon hands everything over to a successor: an upgrade that no guest notices.
//!
//! Held here: one connection lives through several handovers, whatever is under way on it, and nothing is lost; a job goes
//! on in every phase; a successor that is refused, or that dies before it has taken over, leaves the daemon as it was.

use crate::support::daemon::Daemon;
use crate::support::images::thin_disk;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::qmp::Qmp;
use crate::support::random::Random;
use crate::support::tools::{content, ran, refused};
use crate::support::{assert_same, eventually, folder};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const DISK_LEN: usize = 16 << 20;
const BLOCK: usize = 64 << 10;
/// Requests that a guest has in flight.
const DEPTH: usize = 12;

/// A guest that has one connection for its whole life, and checks what it reads.
struct Guest {
    thread: JoinHandle<Vec<u8>>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
}

impl Guest {
    fn start(daemon: &Daemon, replies: Replies, seed: u64) -> Self {
        let mut client = Client::connect(&daemon.socket(), "vda", replies).expect("an NBD connection");
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stop_there, rounds_there) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let (mut random, mut truth) = (Random::new(seed), thin_disk(DISK_LEN));
            while !stop_there.load(Ordering::Relaxed) {
                round(&mut client, &mut random, &mut truth);
                rounds_there.fetch_add(1, Ordering::Relaxed);
            }
            assert_same("the disk by the same connection", &client.content(), &truth);
            truth
        });
        Self { thread, stop, rounds }
    }

    #[track_caller]
    fn wait(&self, count: u64) {
        let goal = self.rounds.load(Ordering::Relaxed) + count;
        eventually("the guest is served", || {
            assert!(!self.thread.is_finished(), "the guest has ended: its connection broke");
            (self.rounds.load(Ordering::Relaxed) >= goal).then_some(())
        });
    }

    /// What it wrote.
    fn stop(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a connection that never broke, and what was written by it")
    }
}

/// Requests for blocks of their own, all in flight at once: long writes and reads, and a flush among them.
fn round(client: &mut Client, random: &mut Random, truth: &mut [u8]) {
    let mut asked = std::collections::HashMap::new();
    let stride = DISK_LEN / DEPTH / BLOCK * BLOCK;
    for place in 0..DEPTH {
        let len = 1 + random.below(3 * BLOCK as u64) as usize;
        let at = place * stride + random.below((stride - len) as u64) as usize;
        let (here, request) = (
            at..at + len,
            match random.below(8) {
                0 => Request::Flush,
                1..=3 => Request::Read { at: at as u64, len: len as u32 },
                _ => Request::Write { at: at as u64, bytes: random.bytes(len) },
            },
        );
        let cookie = client.send(&request);
        asked.insert(cookie, (here, request));
    }
    while !asked.is_empty() {
        let answer = client.receive().expect("a connection that lives on");
        let (here, request) = asked.remove(&answer.cookie).expect("an answer to what was asked");
        let bytes = answer.result.unwrap_or_else(|error| panic!("{request}: error {error}"));
        match request {
            Request::Write { bytes, .. } => truth[here].copy_from_slice(&bytes),
            Request::Read { .. } => assert_same("a read", &bytes, &truth[here]),
            _ => {}
        }
    }
}

fn served(folder: &Path) -> Daemon {
    let disk = folder.join("disk.raw");
    std::fs::write(&disk, thin_disk(DISK_LEN)).expect("a file of ours");
    Daemon::serve(folder, &[format!("vda={},format=raw", disk.display())])
}

#[test]
fn one_connection_lives_through_several_handovers() {
    for replies in [Replies::Simple, Replies::Structured] {
        let folder = folder();
        let mut daemon = served(folder.path());
        let guest = Guest::start(&daemon, replies, 71);
        for _ in 0..5 {
            guest.wait(20);
            let before = daemon.pid();
            daemon.hand_over();
            assert_ne!(daemon.pid(), before);
        }
        guest.wait(20);
        let truth = guest.stop();
        // New clients find the same sockets, and the last one takes them away.
        let mut client = Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection");
        assert_same("what a new client reads", &client.content(), &truth);
        let sockets = [daemon.socket(), daemon.control_socket()];
        daemon.stop();
        assert!(sockets.iter().all(|socket| !socket.exists()));
        assert_same("the disk", &content(&folder.path().join("disk.raw"), "raw"), &truth);
    }
}

#[test]
fn a_job_goes_on_with_the_successor_in_every_phase() {
    let folder = folder();
    let mut daemon = served(folder.path());
    let guest = Guest::start(&daemon, Replies::Structured, 72);
    let target = folder.path().join("target.qcow2");
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--format", "qcow2", "--speed", "1M"]);
    let copied = |daemon: &Daemon| daemon.status("vda")["copied_bytes"].as_u64().expect("a number");
    eventually("some of it is copied", || (copied(&daemon) > 0).then_some(()));
    let job = daemon.status("vda")["job"].clone();
    daemon.hand_over();
    let status = daemon.status("vda");
    assert!(status["job"] == job && status["phase"] == "seeding", "{status}");
    guest.wait(5);
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.hand_over();
    guest.wait(5);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    guest.wait(5);
    daemon.hand_over();
    assert_eq!(daemon.status("vda")["serving"], target.display().to_string());
    guest.wait(5);
    let truth = guest.stop();
    daemon.stop();
    assert_same("the target", &content(&target, "qcow2"), &truth);
}

/// Four jobs with connections of their own, each with a deep queue, verify what they wrote as they go; fio ends with its
/// first connection that breaks.
#[test]
fn fio_finds_what_it_wrote_through_handovers() {
    let folder = folder();
    let mut daemon = served(folder.path());
    let uri = format!("--uri={}", daemon.uri("vda"));
    let jobs = [
        &["--name=handed", "--thread", "--ioengine=nbd", &uri, "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16"][..],
        &["--numjobs=4", "--size=4m", "--offset_increment=4m", "--randseed=7", "--fsync=200", "--loops=6"],
        &["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=64", "--do_verify=1"],
        &["--output-format=terse"],
    ];
    let mut fio = Command::new("fio");
    fio.args(jobs.concat());
    let verified = std::thread::spawn(move || ran(&mut fio));
    let mut handovers = 0;
    // Its connections are made by then: one that has not chosen an export is not handed over.
    let before = thin_disk(DISK_LEN);
    eventually("fio writes", || {
        let now = std::fs::read(folder.path().join("disk.raw")).expect("a file of ours");
        (0..4).all(|job| now[job << 22..][..4 << 20] != before[job << 22..][..4 << 20]).then_some(())
    });
    while !verified.is_finished() {
        daemon.hand_over();
        handovers += 1;
    }
    verified.join().expect("fio found what it wrote");
    assert!(handovers > 0);
    daemon.stop();
}

/// QEMU's own client, whose connection it is.
#[test]
fn qemu_io_notices_nothing() {
    let folder = folder();
    let mut daemon = served(folder.path());
    let mut qemu = Command::new("qemu-io");
    let mut qemu = qemu
        .args(["-f", "raw", &daemon.uri("vda")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io is installed");
    let mut words = qemu.stdin.take().expect("a pipe");
    words.write_all(b"write -P 5 1M 1M\n").expect("qemu-io listens");
    eventually("it has written", || {
        let mut client = Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection");
        let bytes = client.ask(&Request::Read { at: 1 << 20, len: 1 << 20 });
        bytes.iter().all(|byte| *byte == 5).then_some(())
    });
    daemon.hand_over();
    words.write_all(b"read -P 5 1M 1M\nwrite -P 6 1M 64k\nread -P 6 1M 64k\nquit\n").expect("qemu-io listens");
    drop(words);
    let mut said = String::new();
    qemu.stdout.take().expect("a pipe").read_to_string(&mut said).expect("text");
    assert!(qemu.wait().expect("waiting for our child").success(), "{said}");
    assert!(said.contains("read 1048576/1048576") && said.contains("read 65536/65536"), "{said}");
    assert!(!said.contains("failed"), "{said}");
    daemon.stop();
}

#[test]
fn who_may_not_take_over_is_refused_and_the_daemon_serves_on() {
    let folder = folder();
    let mut daemon = served(folder.path());
    let guest = Guest::start(&daemon, Replies::Structured, 73);
    let control = daemon.control_socket().display().to_string();
    // Other words.
    let mut other = daemon.serving();
    other.args(["--cache", "writeback", "--handover", &control]);
    refused(other, &["same words", "cache None", "cache Writeback"]);
    // Another version.
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let error = qmp.refused("blkmirror-hand-over", json!({ "version": 9, "options": [] }));
    assert!(error["desc"].to_string().contains("version 9"), "{error}");
    // Nobody's socket, and one of somebody who is no daemon.
    let mut nobody = daemon.serving();
    nobody.args(["--handover", &folder.path().join("nobody").display().to_string()]);
    refused(nobody, &["is it running?"]);
    let foreign = folder.path().join("foreign");
    let listener = UnixListener::bind(&foreign).expect("a socket of ours");
    let answer = std::thread::spawn(move || listener.accept().map(|(mut stream, _)| stream.write_all(b"220 hello\n")));
    let mut to_foreign = daemon.serving();
    to_foreign.args(["--handover", &foreign.display().to_string()]);
    refused(to_foreign, &["it refuses"]);
    answer.join().expect("our own thread").expect("a connection").expect("a socket that takes it");
    guest.wait(20);
    let truth = guest.stop();
    daemon.stop();
    assert_same("the disk", &content(&folder.path().join("disk.raw"), "raw"), &truth);
}

/// The words that a daemon was started with, as it says them to a successor that has none of them.
fn words(qmp: &mut Qmp) -> Value {
    let error = qmp.refused("blkmirror-hand-over", json!({ "version": 1, "options": [] }));
    let told = error["desc"].as_str().expect("text").to_owned();
    let ours = told.split('`').nth(1).expect("what the daemon has");
    json!({ "version": 1, "options": ours.split("; ").collect::<Vec<_>>() })
}

/// It had let go of everything by then: it takes it up again.
#[test]
fn a_successor_that_dies_leaves_the_daemon_serving() {
    let folder = folder();
    let mut daemon = served(folder.path());
    let guest = Guest::start(&daemon, Replies::Structured, 74);
    let target = folder.path().join("target.raw");
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--raw", "--wait"]);
    let pid = daemon.pid();
    for has_everything in [false, true, false] {
        let mut qmp = Qmp::connect(&daemon.control_socket());
        let words = words(&mut qmp);
        qmp.ok("blkmirror-hand-over", words);
        if has_everything {
            qmp.read_until("\"end\"");
        }
        drop(qmp);
        guest.wait(20);
        assert_eq!(daemon.wait_for("vda", "ready")["job"], "vda");
    }
    assert_eq!(daemon.pid(), pid);
    assert!(daemon.log().contains("did not take over"), "{}", daemon.log());
    // A whole one gets it all the same.
    daemon.hand_over();
    guest.wait(20);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    guest.wait(5);
    let truth = guest.stop();
    daemon.stop();
    assert_same("the target", &content(&target, "raw"), &truth);
}
