//! What a qcow2 image keeps beside its contents, internal snapshots and persistent bitmaps: listed by `info`, right
//! after a guest's writes, and taken along or left behind by a mirror that says so.

use crate::support::daemon::{Daemon, program};
use crate::support::folder;
use crate::support::tools::{check, content, info, ran, run};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 8 << 20;
const GRANULARITY: u64 = 64 << 10;

/// An image with a snapshot and with two bitmaps: what was written since it, and what before.
fn make(folder: &Path) -> PathBuf {
    let image = folder.join("source.qcow2");
    let name = image.display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, &DISK_LEN.to_string()]);
    run("qemu-img", &["bitmap", "--add", &name, "before"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &name]);
    run("qemu-img", &["snapshot", "-c", "old", &name]);
    run("qemu-img", &["bitmap", "--disable", &name, "before"]);
    run("qemu-img", &["bitmap", "--add", &name, "since"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 512K 64K", &name]);
    image
}

/// One guest's write through the server: one piece of the bitmaps.
fn write(daemon: &Daemon, piece: u64) {
    let command = format!("write -P 9 {} 512", piece * GRANULARITY + 1024);
    run("qemu-io", &["-f", "raw", "-c", &command, &daemon.uri("vda")]);
}

/// The pieces that a bitmap marks, as QEMU tells an NBD client.
fn pieces(image: &Path, bitmap: &str) -> BTreeSet<u64> {
    let mut command = Command::new("nbdinfo");
    command.arg(format!("--map=qemu:dirty-bitmap:{bitmap}"));
    command.args(["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap]).arg(image).arg("]");
    let mut pieces = BTreeSet::new();
    for line in ran(&mut command).lines() {
        let numbers: Vec<u64> = line.split_whitespace().take(3).map(|word| word.parse().expect("a number")).collect();
        if numbers[2] & 1 == 1 {
            pieces.extend(numbers[0] / GRANULARITY..(numbers[0] + numbers[1]) / GRANULARITY);
        }
    }
    pieces
}

fn our_info(image: &Path) -> Value {
    let said = ran(Command::new(program()).args(["info", "--json"]).arg(image));
    serde_json::from_str(&said).expect("JSON")
}

/// Everything that `theirs` has is the same in `ours`.
fn assert_includes(ours: &Value, theirs: &Value) {
    match theirs {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| assert_includes(&ours[name], value)),
        Value::Array(values) => {
            assert_eq!(ours.as_array().map(Vec::len), Some(values.len()), "{ours}, {theirs}");
            values.iter().enumerate().for_each(|(nth, value)| assert_includes(&ours[nth], value));
        }
        _ => assert_eq!(ours, theirs),
    }
}

fn snapshot(image: &Path, name: &str) -> Vec<u8> {
    let flat = image.with_extension("snapshot");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-l", name, "-O", "raw"]).arg(image).arg(&flat);
    ran(&mut command);
    std::fs::read(flat).expect("what qemu-img wrote")
}

#[test]
fn info_lists_what_qemu_lists() {
    let folder = folder();
    let image = make(folder.path());
    let (ours, theirs) = (our_info(&image), info(&image));
    assert_includes(&ours["snapshots"], &theirs["snapshots"]);
    assert_includes(&ours["format-specific"]["data"]["bitmaps"], &theirs["format-specific"]["data"]["bitmaps"]);
    assert_eq!(ours["snapshots"][0]["disk-size"], DISK_LEN);
    assert_eq!(ours["format-specific"]["data"]["bitmaps"][0]["consistent"], true);
    let text = ran(Command::new(program()).arg("info").arg(&image));
    assert!(text.contains("1 old (2") && text.contains("disk 8.00 MiB)"), "{text}");
    assert!(text.contains("since (granularity 64.0 KiB, auto)"), "{text}");
}

#[test]
fn a_move_takes_bitmaps_along_and_leaves_snapshots_behind() {
    let folder = folder();
    let source = make(folder.path());
    let (old, before) = (snapshot(&source, "old"), pieces(&source, "before"));
    let mut since = pieces(&source, "since");
    let target = folder.path().join("target.qcow2");
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", source.display())]);
    write(&daemon, 0);
    let said = daemon.ok("mirror", &["vda", &target.display().to_string()]);
    daemon.wait_for("vda", "ready");
    let notes = daemon.status("vda")["notes"].to_string();
    for note in ["internal snapshots (1) stay with it", "persistent bitmaps (2) go on in the target"] {
        assert!(notes.contains(note), "{notes}\n{said}");
    }
    write(&daemon, 20);
    daemon.pivot("vda");
    since.extend([0, 20]);
    let at_pivot = since.clone();
    write(&daemon, 100);
    since.insert(100);
    daemon.stop();

    check(&target, "qcow2");
    assert_eq!(pieces(&target, "before"), before);
    assert_eq!(pieces(&target, "since"), since);
    assert_eq!(our_info(&target)["snapshots"], Value::Null);
    let now = content(&target, "qcow2");
    assert!(now[100 * GRANULARITY as usize + 1024] == 9 && now[20 * GRANULARITY as usize + 1024] == 9);

    check(&source, "qcow2");
    assert_eq!(pieces(&source, "since"), at_pivot, "the source's bitmaps end with the pivot");
    assert_eq!(snapshot(&source, "old"), old);

    // What was carried is kept up like any other.
    daemon.start();
    write(&daemon, 50);
    daemon.stop();
    since.insert(50);
    assert_eq!(pieces(&target, "since"), since);
    check(&target, "qcow2");
}

#[test]
fn raw_has_no_place_for_bitmaps_and_the_status_says_so() {
    let folder = folder();
    let source = make(folder.path());
    let target = folder.path().join("target.raw").display().to_string();
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", source.display())]);
    daemon.ok("mirror", &["vda", &target, "--raw"]);
    daemon.wait_for("vda", "ready");
    let notes = daemon.status("vda")["notes"].to_string();
    assert!(notes.contains("persistent bitmaps (2) are dropped at a pivot"), "{notes}");
    daemon.pivot("vda");
}

/// A kill leaves the bitmap in use: QEMU takes it for inconsistent.
#[test]
fn a_kill_leaves_no_bitmap_that_lies() {
    let folder = folder();
    let source = make(folder.path());
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", source.display())]);
    write(&daemon, 7);
    daemon.kill();
    let flags = |nth: usize| info(&source)["format-specific"]["data"]["bitmaps"][nth]["flags"].to_string();
    assert!(!flags(0).contains("in-use") && flags(1).contains("in-use"), "{} {}", flags(0), flags(1));
    daemon.start();
    daemon.stop();
    assert!(flags(1).contains("in-use"), "{}", flags(1));
    check(&source, "qcow2");
}
