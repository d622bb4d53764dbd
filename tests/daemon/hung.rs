//! A target that answers nothing for as long as it likes, where guests write to both sides.
//!
//! The target is a file of another server's export (`nbdfuse` before nbdkit's pause filter), so what is written to it
//! hangs in the kernel as on a network file system whose server is gone. A raw one has payload alone; of a qcow2 image
//! whose tables are many and small almost every write needs one that has to be made or brought.
//!
//! Held here: the guest goes on after a stated time, which is told, and so does the daemon; the job is not ready and not
//! pivoted meanwhile, and can be given up; when the target answers again, the job goes on and the target is a whole copy.

use crate::support::images::create;
use crate::support::qmp::Qmp;
use crate::support::remote::{DISK_LEN, Remote};
use crate::support::server::{garbage, tell};
use crate::support::tools::{content, output, told};
use crate::support::writer::Habits;
use crate::support::{assert_same, eventually};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A ready job that writes to both sides, and its guest, with a target of this format.
fn scene(seed: u64, format: &str) -> Option<Remote> {
    let control = |folder: &Path| vec![format!("pause-control={}", folder.join("pause").display())];
    let habits = Habits { seed, depth: 4, len_max: 16 << 10, pause: Duration::from_millis(2), ..Habits::default() };
    let scene =
        Remote::of(DISK_LEN, &|folder| target(folder, format), &["--filter=pause"], &control, habits).mounted()?;
    let place = scene.place().display().to_string();
    let options = ["--format", format, "--reuse-external", "--mode", "write-blocking", "--wait"];
    scene.daemon.ok("mirror", &[&["vda", &place][..], &options].concat());
    Some(scene)
}

fn pause(scene: &Remote) -> PathBuf {
    scene.folder.path().join("pause")
}

/// The target answers nothing from now on, and the guest has noticed.
fn hang(scene: &Remote) -> Value {
    tell(&pause(scene), b"p");
    eventually("the guest waits no more", || {
        Some(scene.daemon.status("vda")).filter(|status| status["fell_back"] == true && status["late_bytes"] != 0)
    })
}

/// What the server has: garbage, or an empty image with room for all that it will have.
fn target(folder: &Path, format: &str) -> PathBuf {
    if format == "raw" {
        return garbage(folder, "target", DISK_LEN);
    }
    let image = folder.join("target");
    create(&image, format, DISK_LEN as u64, &["-o", "cluster_size=512"]);
    let file = std::fs::File::options().write(true).open(&image).expect("an image of ours");
    file.set_len(4 * DISK_LEN as u64).expect("a sparse file");
    image
}

fn has(text: &str, words: &[&str], of: &Path) {
    assert!(words.iter().all(|word| text.contains(word)), "{}: {text}", of.display());
}

#[test]
fn a_guest_that_writes_to_both_sides_goes_on_without_a_target_that_hangs() {
    goes_on_without_a_target_that_hangs(41, "raw");
}

/// The guest's thread waited for a table of the target, and with it all of its requests; and so did the thread that steps
/// the jobs, which answered nobody any more.
#[test]
fn nor_does_it_wait_for_the_tables_of_a_target_that_hangs() {
    goes_on_without_a_target_that_hangs(43, "qcow2");
}

fn goes_on_without_a_target_that_hangs(seed: u64, format: &str) {
    let Some(mut scene) = scene(seed, format) else { return };
    let mut events = Qmp::connect(&scene.daemon.control_socket());
    let status = hang(&scene);
    let event = events.event("BLOCK_JOB_ERROR");
    assert_eq!((&event["data"]["operation"], &event["data"]["action"]), (&"write".into(), &"ignore".into()), "{event}");
    has(&status["error"].to_string(), &["are not answered", "source alone"], scene.place());
    has(&scene.daemon.log(), &["no answer within 5 s"], scene.place());
    scene.guest.wait(500);
    let status = scene.daemon.status("vda");
    assert!(status["phase"] == "converging" && status["paused"] == false, "{status}");
    let said = scene.daemon.refused("pivot", &["vda"]);
    has(&said, &["still to copy", "writes of guests", "bytes"], scene.place());

    tell(&pause(&scene), b"r");
    let status = scene.daemon.wait_for("vda", "ready");
    assert!(status["late_bytes"] == 0 && status["failed_bytes"] == 0, "{status}");
    scene.daemon.pivot("vda");
    scene.guest.wait(50);
    let target = scene.target();
    let truth = scene.guest.stop();
    scene.daemon.stop();
    drop(scene.mounted);
    assert_same("the target", &content(&target, format), &truth);
}

#[test]
fn a_job_whose_target_hangs_can_be_given_up_and_its_guest_goes_on() {
    let Some(scene) = scene(42, "raw") else { return };
    hang(&scene);
    let mut command = scene.daemon.command("cancel", &["vda", "--force"]);
    let cancel = std::thread::spawn(move || {
        let output = output(&mut command);
        assert!(output.status.success(), "{}", told(&command, &output));
    });
    // What the kernel has cannot be taken back: that is waited for, and said.
    scene.guest.wait(300);
    let status = scene.daemon.status("vda");
    assert!(status["late_bytes"] != 0, "{status}");
    has(&status["error"].to_string(), &["the job cannot end before these do"], scene.place());
    tell(&pause(&scene), b"r");
    cancel.join().expect("the cancel");
    assert_eq!(scene.daemon.status("vda")["phase"], "cancelled");
    scene.guest.wait(50);
    let Remote { guest, mut daemon, mounted: _mounted, server: _server, folder } = scene;
    let target = || std::fs::read(folder.path().join("target")).expect("a file of ours");
    let before = target();
    let truth = guest.stop();
    daemon.stop();
    assert_same("the target, which was left", &target(), &before);
    let source = std::fs::read(folder.path().join("disk.raw")).expect("a file of ours");
    assert_same("the source", &source, &truth);
}
