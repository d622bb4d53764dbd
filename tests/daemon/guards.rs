//! What keeps an operator's slip, or a bad moment, from costing the guest its disk.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{create, overlay, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::tools::{content, output, told};
use crate::support::{assert_same, folder};
use std::path::Path;
use std::process::Command;

const DISK_LEN: u64 = 16 << 20;

fn connect(daemon: &Daemon, export: &str) -> Client {
    Client::connect(&daemon.socket(), export, Replies::Structured).expect("an NBD connection")
}

/// `serve` with these exports is refused; returns what it said.
#[track_caller]
fn serve_refused(folder: &Path, exports: &[String]) -> String {
    let mut command = Command::new(program());
    command.arg("serve");
    for export in exports {
        command.args(["--export", export]);
    }
    for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
        command.arg(option).arg(folder.join(name));
    }
    let output = output(&mut command);
    assert_eq!(output.status.code(), Some(1), "{}", told(&command, &output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Two exports wrote one qcow2, each with its own idea of which clusters were free.
#[test]
fn an_image_has_one_writer() {
    let folder = folder();
    let (base, top) = (folder.path().join("base.qcow2"), folder.path().join("top.qcow2"));
    create(&base, "qcow2", DISK_LEN, &[]);
    overlay(&top, "base.qcow2", "qcow2", None, &[]);
    let link = folder.path().join("link");
    std::fs::hard_link(&top, &link).expect("one more name");
    let (base, top, link) = (base.display(), top.display(), link.display());
    for exports in [
        [format!("a={top}"), format!("b={link}")],
        [format!("a={top}"), format!("b={base}")],
        [format!("a={top},readonly"), format!("b={top}")],
    ] {
        let said = serve_refused(folder.path(), &exports);
        assert!(said.contains("one writer"), "{said}");
    }
    // What is only read is read by anybody.
    Daemon::serve(folder.path(), &[format!("a={top}"), format!("b={base},readonly")]).stop();
}

/// A copy went onto the disk of another export of the same daemon, under its guest.
#[test]
fn a_target_that_another_export_uses_is_refused() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for name in ["one.qcow2", "base.qcow2"] {
        create(&folder.path().join(name), "qcow2", DISK_LEN, &[]);
    }
    overlay(&folder.path().join("two.qcow2"), "base.qcow2", "qcow2", None, &[]);
    create(&folder.path().join("new.qcow2"), "qcow2", DISK_LEN, &[]);
    let exports = [format!("one={}", path("one.qcow2")), format!("two={}", path("two.qcow2"))];
    let mut daemon = Daemon::serve(folder.path(), &exports);
    for name in ["two.qcow2", "base.qcow2"] {
        let said = daemon.refused("mirror", &["one", &path(name), "--reuse-external"]);
        assert!(said.contains("export two uses it"), "{said}");
    }
    daemon.ok("mirror", &["one", &path("new.qcow2"), "--reuse-external"]);
    let said = daemon.refused("mirror", &["two", &path("new.qcow2"), "--reuse-external"]);
    assert!(said.contains("export one uses it"), "{said}");
    daemon.stop();
}

/// The command line named a file that was removed after the pivot, as one does, and nothing was served.
#[test]
fn after_a_pivot_the_old_disk_can_be_removed() {
    let folder = folder();
    let (old, new) = (folder.path().join("old.qcow2"), folder.path().join("new.qcow2"));
    create(&old, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", old.display())]);
    connect(&daemon, "vda").ask(&Request::Write { at: 0, bytes: vec![7; 65_536] });
    daemon.ok("mirror", &["vda", &new.display().to_string(), "--wait", "--pivot"]);
    daemon.stop();
    std::fs::remove_file(&old).expect("nobody uses it");
    daemon.start();
    let mut truth = vec![0; DISK_LEN as usize];
    truth[..65_536].fill(7);
    assert_same("what is served", &connect(&daemon, "vda").content(), &truth);
    daemon.stop();
    assert_same("the new image", &content(&new, "qcow2"), &truth);
}

/// The daemon was told to end in the middle of a pivot: it waited for a guest whose write waited at the
/// closed gate, which nobody was there to open.
#[test]
fn a_daemon_that_ends_in_a_pivot_ends() {
    let folder = folder();
    let (old, new) = (folder.path().join("old.raw"), folder.path().join("new.raw"));
    create(&old, "raw", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", old.display())]);
    let mut client = connect(&daemon, "vda");
    daemon.ok("mirror", &["vda", &new.display().to_string(), "--mode", "background"]);
    daemon.wait_for("vda", "ready");
    // The last pass cannot end in the time that it has.
    daemon.ok("set", &["vda", "--speed", "4096"]);
    client.ask(&Request::Write { at: 0, bytes: vec![7; 4 << 20] });
    let mut pivot = daemon.command("pivot", &["vda"]).spawn().expect("a client");
    daemon.wait_for("vda", "pivoting");
    let cookie = client.send(&Request::Write { at: 0, bytes: vec![8; 512] });
    daemon.stop();
    assert!(!pivot.wait().expect("our child").success(), "the pivot was undone");
    let answer = client.receive().expect("an answer before the end");
    assert!(answer.cookie == cookie && answer.result.is_ok(), "the write went to the old disk");
    let mut truth = vec![0; DISK_LEN as usize];
    truth[..4 << 20].fill(7);
    truth[..512].fill(8);
    assert_same("the old disk", &content(&old, "raw"), &truth);
}

/// `convert` wrote onto a served image, under its guest.
#[test]
fn an_image_that_is_served_is_no_target() {
    let folder = folder();
    let image = folder.path().join("disk.qcow2");
    create(&image, "qcow2", DISK_LEN, &[]);
    let export = format!("vda={}", image.display());
    let mut daemon = Daemon::serve(folder.path(), &[export]);
    let new = folder.path().join("new.qcow2");
    create(&new, "qcow2", DISK_LEN, &[]);
    let mut convert = Command::new(program());
    convert.arg("convert").args([&new, &image]).arg("--reuse-external");
    let refused = output(&mut convert);
    assert_eq!(refused.status.code(), Some(1), "{}", told(&convert, &refused));
    daemon.stop();
    let done = output(&mut convert);
    assert!(done.status.success(), "{}", told(&convert, &done));
}

/// Served for reading, an image showed what it was before the last acknowledged writes or before a pivot.
#[test]
fn what_is_served_for_reading_is_the_truth_too() {
    let folder = folder();
    let (old, new) = (folder.path().join("old.qcow2"), folder.path().join("new.qcow2"));
    create(&old, "qcow2", DISK_LEN, &[]);
    let export = format!("vda={}", old.display());
    let mut truth = vec![0; DISK_LEN as usize];
    truth[..65_536].fill(7);
    let mut daemon = Daemon::serve(folder.path(), &[&export]);
    connect(&daemon, "vda").ask(&Request::Write { at: 0, bytes: vec![7; 65_536] });
    daemon.kill();
    let said = serve_refused(folder.path(), &[format!("{export},readonly")]);
    assert!(said.contains("once without readonly"), "{said}");
    daemon.start();
    daemon.ok("mirror", &["vda", &new.display().to_string(), "--wait", "--pivot"]);
    connect(&daemon, "vda").ask(&Request::Write { at: 65_536, bytes: vec![8; 65_536] });
    truth[65_536..131_072].fill(8);
    daemon.stop();
    let mut reading = Daemon::serve(folder.path(), &[format!("{export},readonly")]);
    assert_same("what is served", &connect(&reading, "vda").content(), &truth);
    reading.stop();
}

/// An interrupted job went on onto whatever had its target's name.
#[test]
fn an_interrupted_job_does_not_go_on_onto_another_file() {
    let folder = folder();
    let chain = three_layers(folder.path(), 8 << 20, 31);
    let target = folder.path().join("target");
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--raw", "--speed", "100000"]);
    daemon.kill();
    std::fs::rename(&target, folder.path().join("moved")).expect("our file");
    let other = vec![7; 8 << 20];
    std::fs::write(&target, &other).expect("our folder");
    daemon.start();
    let status = daemon.status("vda");
    assert_eq!(status["phase"], "failed", "{status}");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("another file")), "{status}");
    daemon.stop();
    assert_same("somebody else's file", &std::fs::read(&target).expect("our file"), &other);
}
