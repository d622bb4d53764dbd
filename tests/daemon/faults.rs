//! What goes wrong around a daemon: limits of its process, files and folders that vanish, a source that cannot be read.
//!
//! Held here: the words name the cause and the remedy, a guest hears only of errors of its own disk, and nothing is
//! recorded that a restart would not find.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{create, overlay, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::random::Random;
use crate::support::scene::Scene;
use crate::support::server::{Server, two_folders};
use crate::support::tools::{check_leaks_allowed, content, output, ran, refused, told};
use crate::support::{assert_same, eventually, folder};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 8 << 20;
const BLOCK: usize = 64 << 10;

fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

/// A raw disk without any zeroes, and the words that serve it.
fn full_disk(folder: &Path) -> (PathBuf, Vec<u8>, String) {
    let (disk, bytes) = (folder.join("disk.raw"), Random::new(3).bytes(DISK_LEN as usize));
    std::fs::write(&disk, &bytes).expect("a file of ours");
    let export = format!("vda={},format=raw", disk.display());
    (disk, bytes, export)
}

/// A guest's write of one block, to the disk and to what is known of it.
fn write(client: &mut Client, truth: &mut [u8], block: usize, random: &mut Random) {
    let bytes = random.bytes(BLOCK);
    truth[block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
    client.ask(&Request::Write { at: (block * BLOCK) as u64, bytes });
}

/// The words that run a daemon under a limit, for as long as nobody raises it again.
fn limited(limit: &str) -> [&str; 2] {
    ["prlimit", limit]
}

#[test]
fn without_io_uring_the_error_says_what_to_set() {
    let folder = folder();
    let (_, _, export) = full_disk(folder.path());
    let launcher = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/without_io_uring.py");
    for (number, words) in [("1", "kernel.io_uring_disabled to 0"), ("38", "Linux 5.19"), ("12", "ulimit -l")] {
        let mut serve = Command::new("python3");
        serve.arg(&launcher).arg(number).arg(program()).args(["serve", "--export", &export]);
        for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
            serve.arg(option).arg(folder.path().join(name));
        }
        refused(serve, &["io_uring", words]);
    }
}

#[test]
fn without_descriptors_the_next_guest_waits_and_nobody_else_notices() {
    let folder = folder();
    let (disk, mut truth, export) = full_disk(folder.path());
    let mut daemon = Daemon::serve_through(&limited("--nofile=64:64"), folder.path(), &[export], &[]);
    let (mut first, mut random) = (connect(&daemon), Random::new(4));
    let crowd: Vec<_> = (0..64)
        .map(|_| std::os::unix::net::UnixStream::connect(daemon.socket()).expect("a socket that listens"))
        .collect();
    eventually("it runs out of descriptors", || daemon.log().contains("Too many open files").then_some(()));
    write(&mut first, &mut truth, 0, &mut random);
    drop(crowd);
    // Their descriptors are back when their connections have ended.
    let mut second =
        eventually("somebody is let in", || Client::connect(&daemon.socket(), "vda", Replies::Structured).ok());
    write(&mut second, &mut truth, 1, &mut random);
    write(&mut first, &mut truth, 2, &mut random);
    drop((first, second));
    daemon.stop();
    assert_same("the disk", &content(&disk, "raw"), &truth);
}

#[test]
fn without_memory_a_connection_is_dropped_and_nobody_else_notices() {
    let folder = folder();
    let (disk, mut truth, export) = full_disk(folder.path());
    let mut daemon = Daemon::serve(folder.path(), &[export]);
    let (mut first, mut random) = (connect(&daemon), Random::new(5));
    write(&mut first, &mut truth, 0, &mut random);
    let pid = daemon.pid().to_string();
    let kib = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("our child");
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB")?.parse().ok()).expect("its size")
    };
    let limit = |bytes: u64| ran(Command::new("prlimit").args(["--pid", &pid, &format!("--as={bytes}:")]));
    // Nothing more than it has, of which some may be free.
    limit((kib() + 4096) << 10);
    let mut crowd = Vec::new();
    while let Ok(client) = Client::connect(&daemon.socket(), "vda", Replies::Structured) {
        crowd.push(client);
        assert!(crowd.len() < 32, "there is no end to its memory");
    }
    write(&mut first, &mut truth, 1, &mut random);
    limit(64 << 30);
    drop(crowd);
    let mut second = connect(&daemon);
    write(&mut second, &mut truth, 2, &mut random);
    drop((first, second));
    daemon.stop();
    assert_same("the disk", &content(&disk, "raw"), &truth);
}

/// The signal that comes with the error would have ended the daemon.
#[test]
fn past_the_limit_of_a_files_size_a_target_fails_and_its_guest_goes_on() {
    let folder = folder();
    let (disk, mut truth, export) = full_disk(folder.path());
    // The disk's own length, which a qcow2 of it is past.
    let limit = format!("--fsize={DISK_LEN}:unlimited");
    let mut daemon = Daemon::serve_through(&limited(&limit), folder.path(), &[export], &[]);
    let (mut guest, mut random) = (connect(&daemon), Random::new(6));
    let (one, other) = (folder.path().join("one.qcow2"), folder.path().join("other.qcow2"));
    let one = one.display().to_string();
    daemon.ok("mirror", &["vda", &one, "--format", "qcow2", "--on-target-error", "report"]);
    let status = daemon.wait_for("vda", "failed");
    assert!(status["error"].to_string().contains("File too large"), "{status}");
    write(&mut guest, &mut truth, 0, &mut random);

    let name = other.display().to_string();
    daemon.ok("mirror", &["vda", &name, "--format", "qcow2", "--on-target-error", "stop"]);
    let paused = || Some(daemon.status("vda")).filter(|status| status["paused"] == true);
    let status = eventually("the job pauses", paused);
    assert!(status["error"].to_string().contains("File too large"), "{status}");
    write(&mut guest, &mut truth, 1, &mut random);
    ran(Command::new("prlimit").args(["--pid", &daemon.pid().to_string(), "--fsize=unlimited:"]));
    daemon.ok("resume", &["vda"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    write(&mut guest, &mut truth, 2, &mut random);
    drop(guest);
    daemon.stop();
    assert_same("the target", &content(&other, "qcow2"), &truth);
    assert_same("the source as it was left", &content(&disk, "raw")[3 * BLOCK..], &truth[3 * BLOCK..]);
    check_leaks_allowed(&other, "qcow2");

    let mut convert = Command::new("prlimit");
    convert.arg(&limit).arg(program()).args(["convert", "--source-format", "raw", "--format", "qcow2"]);
    convert.args([&disk, &folder.path().join("third.qcow2")]);
    refused(convert, &["File too large"]);
}

#[test]
fn a_source_that_fails_in_one_place_fails_there_alone() {
    let folder = folder();
    let (theirs, ours) = two_folders(folder.path());
    let base = folder.path().join("base.raw");
    let mut truth = Random::new(7).bytes(DISK_LEN as usize);
    std::fs::write(&base, &truth).expect("a file of ours");
    let (from, to) = (3 << 20, (3 << 20) + BLOCK);
    let server = Server::failing_range(&theirs, &base, from as u64, to as u64);
    let top = folder.path().join("top.qcow2");
    overlay(&top, &server.uri(""), "raw", Some(DISK_LEN), &[]);
    let mut daemon = Daemon::serve(&ours, &[format!("vda={}", top.display())]);
    let mut guest = connect(&daemon);
    let read = |guest: &mut Client, at: usize, len: usize| {
        guest.send(&Request::Read { at: at as u64, len: len as u32 });
        guest.receive().expect("an answer").result
    };
    assert_eq!(read(&mut guest, from, BLOCK).err(), Some(5), "EIO");
    for at in [from - BLOCK, to] {
        assert_same("beside it", &read(&mut guest, at, BLOCK).expect("it is whole"), &truth[at..at + BLOCK]);
    }

    let target = folder.path().join("target.qcow2").display().to_string();
    daemon.ok("mirror", &["vda", &target]);
    let status = daemon.wait_for("vda", "failed");
    let error = status["error"].to_string();
    assert!(error.contains("source") && error.contains("Input/output error"), "{status}");
    assert_eq!(status["serving"], top.display().to_string());
    // What is written is read no more from there.
    let bytes = Random::new(8).bytes(BLOCK);
    truth[from..to].copy_from_slice(&bytes);
    guest.ask(&Request::Write { at: from as u64, bytes });
    std::fs::remove_file(&target).expect("the failed copy");
    daemon.ok("mirror", &["vda", &target, "--wait", "--pivot"]);
    drop(guest);
    daemon.stop();
    assert_same("the target", &content(Path::new(&target), "qcow2"), &truth);
}

/// A pivot recorded a target that had no name any more, and one was recorded where nobody would have looked: after a
/// restart the guest would have lost what it wrote behind it.
#[test]
fn what_a_restart_would_not_find_is_not_pivoted_to() {
    let mut scene = Scene::new(61);
    scene.mirror(&["--wait"]);
    scene.writes(50);
    let aside = scene.folder.path().join("aside");
    let state = scene.folder.path().join("state");
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).expect("files of ours");
    for place in [scene.target.clone(), state.clone(), state.join("vda.record")] {
        rename(&place, &aside);
        let said = scene.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("a restart would not find it"), "{}: {said}", place.display());
        assert_eq!(scene.status()["serving"], scene.source());
        scene.writes(50);
        rename(&aside, &place);
        scene.daemon.wait_for("vda", "ready");
    }
    scene.daemon.pivot("vda");
    // Nor is a snapshot made that would not be found.
    rename(&state, &aside);
    let overlay = scene.folder.path().join("overlay.qcow2").display().to_string();
    let said = scene.daemon.refused("snapshot", &["vda", &overlay]);
    assert!(!Path::new(&overlay).exists(), "{said}");
    assert_eq!(scene.status()["serving"], scene.target());
    rename(&aside, &state);
    scene.ends_on_the_target("qcow2");
}

/// A layer below was moved away and another file had its name: the target and the overlay named that file, and the next
/// start served it; the copy of the chain had it in it.
#[test]
fn what_is_below_by_another_name_now_is_not_relied_upon() {
    let folder = folder();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    std::fs::create_dir(&old).and_then(|()| std::fs::create_dir(&new)).expect("new folders");
    let chain = three_layers(&old, 8 << 20, 62);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let (target, overlay) = (new.join("target").display().to_string(), new.join("overlay").display().to_string());
    daemon.ok("mirror", &["vda", &target, "--shallow", "--wait"]);
    let (base, aside) = (chain.layers[0].0.clone(), old.join("aside"));
    std::fs::rename(&base, &aside).and_then(|()| std::fs::copy(&aside, &base)).expect("files of ours");
    let refused = |verb: &str, args: &[&str]| {
        let said = daemon.refused(verb, args);
        assert!(said.contains("base.qcow2") && said.contains("a restart would not find it"), "{verb}: {said}");
    };
    refused("pivot", &["vda"]);
    daemon.ok("cancel", &["vda", "--force"]);
    refused("snapshot", &["vda", &overlay]);
    refused("mirror", &["vda", "--chain", &new.display().to_string()]);
    assert!(!Path::new(&overlay).exists());
    // What is copied whole needs none of them.
    let full = new.join("full").display().to_string();
    daemon.ok("mirror", &["vda", &full, "--pivot"]);
    daemon.stop();
    assert_same("the disk", &content(Path::new(&full), "qcow2"), &chain.content());
}

/// A file system in memory of its own, gone when it is dropped.
struct Mount(PathBuf);

impl Mount {
    /// `None` where this process may not mount.
    fn new(place: PathBuf, options: &str) -> Option<Self> {
        std::fs::create_dir_all(&place).expect("a folder of ours");
        let mut mount = Command::new("mount");
        let mounted = output(mount.args(["-t", "tmpfs", "-o", options, "blkmirror-test"]).arg(&place));
        if !mounted.status.success() {
            eprintln!("not done, for it takes root: {}", told(&mount, &mounted));
            return None;
        }
        Some(Self(place))
    }

    /// One of a device, in the file `image`.
    fn of_device(place: PathBuf, image: &Path) -> Option<Self> {
        std::fs::create_dir_all(&place).expect("a folder of ours");
        File::create(image).and_then(|file| file.set_len(64 << 20)).expect("a file of ours");
        ran(Command::new("mkfs.ext4").arg("-q").arg(image));
        let mut mount = Command::new("mount");
        let mounted = output(mount.args(["-o", "loop"]).arg(image).arg(&place));
        if !mounted.status.success() {
            eprintln!("not done, for it takes root and loop devices: {}", told(&mount, &mounted));
            return None;
        }
        Some(Self(place))
    }

    /// Makes it read-only at once, as an error of its device does, whoever has files of it open.
    fn abort(&self) {
        ran(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.0));
    }

    /// Takes it away from its name, whoever has files of it open.
    fn leave(&self) {
        ran(Command::new("umount").arg("-l").arg(&self.0));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_target_whose_folder_is_unmounted_is_not_pivoted_to() {
    let mut scene = Scene::new(62);
    let Some(mount) = Mount::new(scene.folder.path().join("place"), "size=64m") else { return };
    scene.target = mount.0.join("target");
    scene.mirror(&["--wait"]);
    mount.leave();
    let said = scene.daemon.refused("pivot", &["vda"]);
    assert!(said.contains("a restart would not find it"), "{said}");
    scene.writes(50);
    scene.daemon.ok("cancel", &["vda", "--force"]);
    scene.ends_on_the_source();
}

/// Its guests waited at the closed gate until the folder could be written again, which it could not.
#[test]
fn a_state_folder_that_turns_read_only_undoes_the_pivot() {
    let folder = folder();
    let state = folder.path().join("state");
    let Some(mount) = Mount::of_device(state.clone(), &folder.path().join("device")) else { return };
    let chain = three_layers(folder.path(), DISK_LEN, 68);
    let mut scene = Scene::of(folder, chain, 68);
    scene.mirror(&["--wait"]);
    mount.abort();
    for _ in 0..2 {
        scene.daemon.wait_for("vda", "ready");
        let said = scene.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("the pivot record") && said.contains("Read-only file system"), "{said}");
        assert_eq!(scene.status()["serving"], scene.source());
        scene.writes(50);
    }
    scene.daemon.ok("cancel", &["vda", "--force"]);
    scene.writes(50);
    let truth = scene.writer.take().expect("a guest").stop();
    scene.holds(&truth);
    // It cannot leave in order what it cannot write.
    scene.daemon.kill();
    drop(mount);
}

#[test]
fn a_state_folder_without_room_refuses_jobs_and_not_guests() {
    let folder = folder();
    let (disk, mut truth, export) = full_disk(folder.path());
    let state = folder.path().join("state");
    let Some(mount) = Mount::new(state.clone(), "size=4m") else { return };
    let mut daemon = Daemon::serve(folder.path(), &[&export]);
    let (mut guest, mut random) = (connect(&daemon), Random::new(9));
    let fill = || {
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=4k", "status=none"]).arg(format!("of={}", state.join("filler").display()));
        assert!(!output(&mut dd).status.success(), "it ends when there is no more room");
    };
    fill();
    let target = folder.path().join("target.raw");
    let name = target.display().to_string();
    let said = daemon.refused("mirror", &["vda", &name]);
    assert!(said.contains("No space left") && said.contains(&state.display().to_string()), "{said}");
    assert!(!target.exists(), "nothing is left of it");
    write(&mut guest, &mut truth, 0, &mut random);
    std::fs::remove_file(state.join("filler")).expect("a file of ours");
    daemon.ok("mirror", &["vda", &name, "--wait"]);
    // What a pivot records has its room already.
    fill();
    daemon.pivot("vda");
    write(&mut guest, &mut truth, 1, &mut random);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"], name);
    assert_same("what is served", &connect(&daemon).content(), &truth);
    daemon.stop();
    drop((guest, mount));
    assert_same("the target", &content(&target, "raw"), &truth);
    assert!(content(&disk, "raw")[BLOCK..] != truth[BLOCK..], "the source was left at the pivot");
}

#[test]
fn a_state_folder_that_cannot_be_written_is_an_error_that_names_it() {
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    create(&disk, "qcow2", DISK_LEN, &[]);
    let state = folder.path().join("state");
    let Some(_mount) = Mount::new(state.clone(), "ro") else { return };
    let mut serve = Command::new(program());
    serve.args(["serve", "--export", &format!("vda={}", disk.display())]);
    for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
        serve.arg(option).arg(folder.path().join(name));
    }
    refused(serve, &[&state.display().to_string(), "Read-only file system"]);
}
