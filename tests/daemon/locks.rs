//! Images and the programs that have them open: QEMU's keep off ours, and ours off QEMU's.
//!
//! An image that is written has one writer and nobody else; one that is only read has any number of readers. Who wants to
//! look all the same says so: `-U`, as with QEMU's tools.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{create, overlay};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::server::Server;
use crate::support::tools::{check, content, output, ran, refused, told};
use crate::support::{assert_same, folder};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const DISK_LEN: u64 = 8 << 20;
/// QEMU's words, whichever permission it is about.
const THEIRS: &str = "lock";
/// Ours.
const OURS: &str = "an image has one writer";

/// A chain of two in `folder`: a qcow2 on a raw base.
fn chain(folder: &Path) -> (PathBuf, PathBuf) {
    let (base, top) = (folder.join("base.raw"), folder.join("top.qcow2"));
    create(&base, "raw", DISK_LEN, &[]);
    overlay(&top, "base.raw", "raw", None, &[]);
    (base, top)
}

/// A tool of QEMU's with these words and a file.
fn theirs(words: &[&str], file: &Path) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(file);
    command
}

/// This program with these words and a file.
fn ours(words: &[&str], file: &Path) -> Command {
    let mut command = Command::new(program());
    command.args(words).arg(file);
    command
}

/// Some of what QEMU's tools do with an image to read it, and to write it.
fn readers<'a>() -> [&'a [&'a str]; 4] {
    [
        &["qemu-img", "info"],
        &["qemu-img", "check", "-f", "qcow2"],
        &["qemu-img", "map", "-f", "qcow2"],
        &["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 64k"],
    ]
}

fn writers(format: &str) -> [&[&str]; 2] {
    match format {
        "raw" => [&["qemu-io", "-f", "raw", "-c", "write 0 64k"], &["qemu-io", "-f", "raw", "-c", "truncate 1M"]],
        _ => [&["qemu-io", "-f", "qcow2", "-c", "write 0 64k"], &["qemu-img", "rebase", "-u", "-b", "", "-f", "qcow2"]],
    }
}

/// `qemu-nbd` with a disk to write to.
fn serving(folder: &Path, format: &str, disk: &Path) -> Command {
    let socket = folder.join("theirs.socket").display().to_string();
    theirs(&["qemu-nbd", "-f", format, "-k", &socket], disk)
}

/// `blkmirror export add`.
fn add(daemon: &Daemon, export: &str) -> Command {
    let mut command = Command::new(program());
    command.args(["export", "add", "--control"]).arg(daemon.control_socket()).arg(export);
    command
}

#[test]
fn what_is_served_is_read_and_written_by_nobody_of_qemus() {
    let folder = folder();
    let (base, top) = chain(folder.path());
    let target = folder.path().join("target.qcow2");
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", top.display())]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--wait"]);
    for image in [&top, &target] {
        for words in readers().into_iter().chain(writers("qcow2")) {
            refused(theirs(words, image), &[THEIRS]);
        }
        refused(serving(folder.path(), "qcow2", image), &[THEIRS]);
        for words in [&["qemu-img", "info", "-U"][..], &["qemu-img", "map", "-U", "-f", "qcow2"]] {
            ran(&mut theirs(words, image));
        }
    }
    // What is below is read by anybody.
    for words in writers("raw") {
        refused(theirs(words, &base), &[THEIRS]);
    }
    refused(serving(folder.path(), "raw", &base), &[THEIRS]);
    ran(&mut theirs(&["qemu-img", "info"], &base));
    ran(&mut theirs(&["qemu-io", "-r", "-f", "raw", "-c", "read 0 64k"], &base));
    // The copy belongs to nobody when it is finished.
    daemon.ok("cancel", &["vda"]);
    check(&target, "qcow2");
    refused(theirs(&["qemu-img", "info"], &top), &[THEIRS]);
    daemon.stop();
    check(&top, "qcow2");
    ran(&mut theirs(writers("qcow2")[0], &top));
    ran(&mut theirs(writers("raw")[0], &base));
}

/// Raw as QEMU has it: read beside its writer, by who names the format, and written by one.
#[test]
fn a_raw_disk_that_is_served_has_one_writer() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    create(&disk, "raw", DISK_LEN, &[]);
    for options in [&[][..], &["--cache", "writeback"]] {
        let export = format!("vda={},format=raw", disk.display());
        let mut daemon = Daemon::serve_with(folder.path(), &[export], options);
        for words in writers("raw") {
            refused(theirs(words, &disk), &[THEIRS]);
        }
        refused(serving(folder.path(), "raw", &disk), &[THEIRS]);
        ran(&mut theirs(&["qemu-io", "-r", "-f", "raw", "-c", "read 0 64k"], &disk));
        ran(&mut ours(&["map", "--format", "raw"], &disk));
        daemon.stop();
        ran(&mut theirs(writers("raw")[0], &disk));
    }
}

/// It was waited for as for a dead one, whose last operations the system may still have: half a minute.
#[test]
fn a_blkmirror_that_lives_is_not_waited_for() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    create(&disk, "raw", DISK_LEN, &[]);
    let export = format!("vda={},format=raw", disk.display());
    let mut daemon = Daemon::serve(folder.path(), &[&export]);
    let mut second = Command::new(program());
    second.args(["serve", "--export", &export]);
    for (option, name) in [("--socket", "nbd2"), ("--control", "control2"), ("--state", "state2")] {
        second.arg(option).arg(folder.path().join(name));
    }
    let begun = Instant::now();
    refused(second, &["another blkmirror uses it"]);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // A dead one is, for as long as it takes, and no longer.
    daemon.kill();
    daemon.start();
    daemon.stop();
}

#[test]
fn what_qemu_writes_is_refused() {
    let folder = folder();
    let (_, top) = chain(folder.path());
    let (disk, new) = (folder.path().join("disk.qcow2"), folder.path().join("new.qcow2"));
    create(&disk, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
    let theirs_folder = folder.path().join("theirs");
    std::fs::create_dir(&theirs_folder).expect("a folder of ours");
    let qemu = Server::qemu(&theirs_folder, &["-f", "qcow2", &top.display().to_string()]);
    let before = std::fs::read(&top).expect("a file of ours");

    let (name, export) = (top.display().to_string(), |file: &Path| format!("b={}", file.display()));
    let said = daemon.refused("mirror", &["vda", &name, "--reuse-external"]);
    assert!(said.contains(OURS), "{said}");
    for export in [export(&top), format!("{},readonly", export(&top))] {
        refused(add(&daemon, &export), &["QEMU or one of its tools"]);
    }
    for words in [&["convert", "--reuse-external", &disk.display().to_string()][..], &["check", "--repair", "all"]] {
        refused(ours(words, &top), &["one writer"]);
    }
    let mut convert = ours(&["convert"], &top);
    convert.arg(&new);
    refused(convert, &["QEMU or one of its tools", "--force-share"]);
    assert!(!new.exists(), "nothing is made of it");
    for verb in ["info", "map", "check"] {
        refused(ours(&[verb], &top), &[&name, "QEMU or one of its tools", "--force-share"]);
        ran(&mut ours(&[verb, "-U"], &top));
    }
    let mut compare = ours(&["compare"], &top);
    let compared = output(compare.arg(&disk));
    assert_eq!(compared.status.code(), Some(2), "{}", told(&compare, &compared));
    ran(ours(&["compare", "-U"], &top).arg(&top));
    ran(ours(&["convert", "-U"], &top).arg(&new));
    assert!(std::fs::read(&top).expect("a file of ours") == before, "nobody wrote to it");
    drop(qemu);
    ran(&mut add(&daemon, &export(&top)));
    daemon.stop();
}

#[test]
fn what_qemu_reads_is_read_and_not_written() {
    let folder = folder();
    let (_, top) = chain(folder.path());
    let qemu = Server::qemu(folder.path(), &["-r", "-f", "qcow2", &top.display().to_string()]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},readonly", top.display())]);
    ran(&mut ours(&["check"], &top));
    let mut serve = ours(&["serve", "--export"], Path::new(&format!("vda={}", top.display())));
    for (option, name) in [("--socket", "nbd2"), ("--control", "control2"), ("--state", "state2")] {
        serve.arg(option).arg(folder.path().join(name));
    }
    refused(serve, &[&top.display().to_string(), OURS, "end that one first"]);
    drop(qemu);
    daemon.stop();
}

/// A header was written into a device, or an empty file, before anybody asked whose it was.
#[test]
fn an_empty_target_that_somebody_has_stays_as_it_is() {
    let folder = folder();
    let (disk, empty) = (folder.path().join("disk.qcow2"), folder.path().join("empty"));
    create(&disk, "qcow2", DISK_LEN, &[]);
    std::fs::write(&empty, "").expect("a file of ours");
    let theirs_folder = folder.path().join("theirs");
    std::fs::create_dir(&theirs_folder).expect("a folder of ours");
    let qemu = Server::qemu(&theirs_folder, &["-f", "raw", &empty.display().to_string()]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
    let said = daemon.refused("mirror", &["vda", &empty.display().to_string()]);
    assert!(said.contains(OURS), "{said}");
    assert_eq!(empty.metadata().expect("it is there").len(), 0);
    drop(qemu);
    daemon.ok("mirror", &["vda", &empty.display().to_string(), "--wait"]);
    daemon.stop();
}

#[test]
fn what_a_snapshot_was_made_upon_is_read_by_anybody_and_written_by_nobody() {
    let folder = folder();
    let (disk, new) = (folder.path().join("disk.qcow2"), folder.path().join("new.qcow2"));
    create(&disk, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
    let mut client = Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection");
    client.ask(&Request::Write { at: 0, bytes: vec![7; 65_536] });
    daemon.ok("snapshot", &["vda", &new.display().to_string()]);
    client.ask(&Request::Write { at: 0, bytes: vec![8; 65_536] });
    let mut truth = vec![0; DISK_LEN as usize];
    truth[..65_536].fill(7);
    assert_same("the disk of that instant", &content(&disk, "qcow2"), &truth);
    refused(theirs(writers("qcow2")[0], &disk), &[THEIRS]);
    refused(theirs(readers()[0], &new), &[THEIRS]);
    daemon.stop();
    check(&new, "qcow2");
}
