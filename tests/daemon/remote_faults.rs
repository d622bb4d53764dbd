//! Faults of other servers, put in by nbdkit's filters between a mirror and its target.
//!
//! Held here: what the policy says of an error is done, and never to the guest; a server that fails now and then, is
//! slow, takes whole blocks alone or leaves when it may gets the whole disk all the same; one that rests makes no
//! guest wait.

use crate::support::daemon::Daemon;
use crate::support::images::thin_disk;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::remote::{DISK_LEN, Remote};
use crate::support::server::{Server, garbage, tell, two_folders};
use crate::support::tools::{output, told};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// A guest that leaves a slow target time to follow.
fn calm(seed: u64) -> Habits {
    Habits { seed, depth: 2, len_max: 8 << 10, pause: Duration::from_millis(5), flush_one_in: 20, ..Habits::default() }
}

/// What becomes of a job.
enum Then {
    Fails,
    Pauses,
    GoesOn,
}

#[test]
fn what_the_policy_says_of_an_error_is_done_and_the_guest_never_hears_of_it() {
    use Then::{Fails, GoesOn, Pauses};
    for (number, (error, words, policy, then)) in (0..).zip([
        ("EIO", "Input/output error", "report", Fails),
        ("EIO", "Input/output error", "stop", Pauses),
        ("EIO", "Input/output error", "enospc", Fails),
        ("EIO", "Input/output error", "ignore", GoesOn),
        ("EIO", "Input/output error", "back-off", GoesOn),
        ("ENOSPC", "No space left", "report", Fails),
        ("ENOSPC", "No space left", "stop", Pauses),
        ("ENOSPC", "No space left", "enospc", Pauses),
        ("ENOSPC", "No space left", "ignore", GoesOn),
        ("ENOSPC", "No space left", "back-off", GoesOn),
    ]) {
        let failing = |folder: &Path| {
            let file = |what: &str| format!("error-{what}-file={}", folder.join("fail").display());
            let always = ["error-pwrite-rate=100%", "error-zero-rate=100%"].map(str::to_owned);
            [vec![format!("error={error}"), file("pwrite"), file("zero")], always.to_vec()].concat()
        };
        let scene = Remote::new(&["--filter=error"], &failing, Habits { seed: number, ..Habits::default() });
        let trigger = scene.folder.path().join("fail");
        std::fs::write(&trigger, "").expect("a folder of ours");
        scene.mirror(&["--on-target-error", policy]);
        let assert_told = |status: &Value| {
            let told = status["error"].to_string();
            assert!(told.contains("target") && told.contains(words), "{error}, {policy}: {status}");
        };
        match then {
            Fails => {
                assert_told(&scene.daemon.wait_for("vda", "failed"));
                scene.guest.wait(50);
                let Remote { folder: _folder, mut daemon, guest, .. } = scene;
                guest.stop();
                daemon.stop();
                continue;
            }
            Pauses => {
                let paused = || Some(scene.daemon.status("vda")).filter(|status| status["paused"] == true);
                assert_told(&eventually("the job pauses", paused));
                scene.guest.wait(50);
                std::fs::remove_file(&trigger).expect("a file of ours");
                scene.daemon.ok("resume", &["vda"]);
            }
            GoesOn => {
                let met = || Some(scene.daemon.status("vda")).filter(|status| !status["error"].is_null());
                let status = eventually("it meets the error", met);
                assert!(status["paused"] == false && status["phase"] != "failed", "{error}, {policy}: {status}");
                assert_told(&status);
                scene.guest.wait(50);
                assert_ne!(scene.daemon.status("vda")["phase"], "ready", "{error}, {policy}");
                std::fs::remove_file(&trigger).expect("a file of ours");
            }
        }
        scene.end();
    }
}

#[test]
fn a_server_that_fails_now_and_then_gets_the_whole_disk() {
    let failing = |_: &Path| ["error-pwrite-rate=4%", "error-zero-rate=4%"].map(str::to_owned).to_vec();
    let scene = Remote::new(&["--filter=error"], &failing, calm(21));
    scene.mirror(&["--on-target-error", "ignore"]);
    scene.daemon.wait_for("vda", "ready");
    scene.guest.wait(100);
    // After a pivot the errors would be the guest's.
    let Remote { folder, server, mut daemon, guest, .. } = scene;
    let truth = guest.stop();
    eventually("the copy is finished", || {
        let mut command = daemon.command("cancel", &["vda"]);
        let output = output(&mut command);
        // One in the last pass: the job goes on, and may be asked again.
        let failed = String::from_utf8_lossy(&output.stderr).contains("failed during the last pass");
        let caught_up = String::from_utf8_lossy(&output.stderr).contains("still to copy");
        assert!(output.status.success() || failed || caught_up, "{}", told(&command, &output));
        output.status.success().then_some(())
    });
    assert_eq!(daemon.status("vda")["phase"], "cancelled");
    daemon.stop();
    drop(server);
    assert_same("the target", &std::fs::read(folder.path().join("target")).expect("a file of ours"), &truth);
}

/// A flush that failed is no matter of policies: what the server has nobody knows.
#[test]
fn a_server_whose_flush_fails_ends_the_job() {
    let folder = folder();
    let (source, trigger) = (folder.path().join("disk.raw"), folder.path().join("fail"));
    std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
    std::fs::write(&trigger, "").expect("a file of ours");
    let (theirs, ours) = two_folders(folder.path());
    let server = Server::failing_flush(&theirs, &garbage(folder.path(), "target", DISK_LEN), &trigger);
    let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
    let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), calm(22));
    daemon.ok("mirror", &["vda", &server.uri(""), "--on-target-error", "ignore"]);
    let status = daemon.wait_for("vda", "failed");
    assert!(status["error"].to_string().contains("flush"), "{status}");
    guest.wait(50);
    let truth = guest.stop();
    daemon.stop();
    assert_same("the source", &std::fs::read(&source).expect("a file of ours"), &truth);
}

/// In the background mode the guest's writes go to the source alone, so it is no matter when the target answers.
#[test]
fn a_target_that_rests_makes_no_guest_wait() {
    let words = |folder: &Path| vec![format!("pause-control={}", folder.join("pause").display())];
    let scene = Remote::new(&["--filter=pause"], &words, Habits { seed: 23, ..Habits::default() });
    let control = scene.folder.path().join("pause");
    scene.mirror(&["--speed", "4M"]);
    let copied = || scene.daemon.status("vda")["copied_bytes"].as_u64().expect("a number");
    eventually("some of it is copied", || (copied() > 0).then_some(()));
    tell(&control, b"p");
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    // What the filter had let through may be told of yet.
    scene.guest.wait(100);
    let before = copied();
    scene.guest.wait(500);
    assert_eq!(copied(), before, "the target answers nothing");
    assert_ne!(scene.daemon.status("vda")["phase"], "ready");
    tell(&control, b"r");
    scene.end();
}

#[test]
fn a_slow_server_gets_the_whole_disk() {
    for (filter, words) in [
        ("--filter=delay", ["delay-write=20ms", "delay-zero=20ms"]),
        ("--filter=rate", ["rate=200M", "burstiness=0.1"]),
    ] {
        let words = |_: &Path| words.map(str::to_owned).to_vec();
        let scene = Remote::new(&[filter], &words, calm(24));
        scene.mirror(&[]);
        scene.end();
    }
}

/// Blocks as a guest's sectors are a server's to ask for; longer ones no guest keeps to.
#[test]
fn a_server_of_whole_blocks_gets_them_or_is_refused() {
    let words = |minimum: u32| {
        move |_: &Path| {
            let minimum = format!("blocksize-minimum={minimum}");
            let others = ["blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"];
            [vec![minimum], others.map(str::to_owned).to_vec()].concat()
        }
    };
    let scene = Remote::new(&["--filter=blocksize-policy"], &words(4096), calm(25));
    let said = scene.daemon.refused("mirror", &["vda", &scene.server.uri("")]);
    assert!(said.contains("blocks of 4096 bytes"), "{said}");
    drop(scene);
    let scene = Remote::new(&["--filter=blocksize-policy"], &words(512), calm(26));
    scene.mirror(&["--wait"]);
    // The source takes any bytes, and what it holds is copied by whole blocks.
    let guest = || Client::connect(&scene.daemon.socket(), "vda", Replies::Structured).expect("an NBD connection");
    let at = DISK_LEN as u64 - 100;
    let before = guest().ask(&Request::Read { at, len: 100 });
    guest().ask(&Request::Write { at, bytes: before.clone() });
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    // Now the server has whole blocks alone, and the guest goes on as before.
    let mut guest = guest();
    let other: Vec<u8> = before.iter().map(|byte| !byte).collect();
    guest.ask(&Request::Write { at, bytes: other.clone() });
    assert_same("a read", &guest.ask(&Request::Read { at, len: 100 }), &other);
    guest.ask(&Request::Write { at, bytes: before });
    scene.guest.wait(50);
    scene.stop();
}

/// It leaves when the last client has: so some connection stays from the first look at it to the guest's end.
#[test]
fn a_server_that_leaves_with_its_last_client_stays_for_the_guest() {
    let scene = Remote::new(&["--filter=exitlast"], &|_| Vec::new(), calm(27));
    scene.mirror(&[]);
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    scene.guest.wait(100);
    let Remote { folder, mut server, mut daemon, guest, .. } = scene;
    let truth = guest.stop();
    daemon.stop();
    server.wait_for_its_end();
    assert_same("the target", &std::fs::read(folder.path().join("target")).expect("a file of ours"), &truth);
}

/// Nobody's connection to it stays when the guest has been moved on, whichever thread had one.
#[test]
fn a_server_that_a_guest_has_left_is_let_go_of() {
    let scene = Remote::new(&["--filter=exitlast"], &|_| Vec::new(), calm(29));
    scene.mirror(&["--wait"]);
    scene.daemon.pivot("vda");
    scene.guest.wait(50);
    let next = scene.folder.path().join("next.raw");
    scene.daemon.ok("mirror", &["vda", &next.display().to_string(), "--raw", "--wait"]);
    scene.daemon.pivot("vda");
    scene.guest.wait(50);
    let Remote { folder: _folder, mut server, mut daemon, guest, .. } = scene;
    server.wait_for_its_end();
    let truth = guest.stop();
    daemon.stop();
    assert_same("the next disk", &std::fs::read(next).expect("a file of ours"), &truth);
}

/// Told to leave in the middle of a copy, it takes no new clients and goes when the job's connections have ended.
#[test]
fn a_server_that_wants_to_leave_is_let_go_of_when_the_job_is_given_up() {
    let words = |folder: &Path| {
        let leave = folder.join("leave");
        vec![format!("exit-when-file-created={}", leave.display()), "exit-when-poll=1".to_owned()]
    };
    let mut scene = Remote::new(&["--filter=exitwhen"], &words, calm(28));
    scene.mirror(&["--speed", "4M"]);
    let copied = |scene: &Remote| scene.daemon.status("vda")["copied_bytes"].as_u64().expect("a number");
    eventually("some of it is copied", || (copied(&scene) > 0).then_some(()));
    std::fs::write(scene.folder.path().join("leave"), "").expect("a folder of ours");
    // Who is there already is served on.
    let before = copied(&scene);
    eventually("more of it is copied", || (copied(&scene) > before + (1 << 20)).then_some(()));
    scene.daemon.ok("cancel", &["vda", "--force"]);
    scene.server.wait_for_its_end();
    scene.guest.wait(50);
    scene.guest.stop();
    scene.daemon.stop();
}
