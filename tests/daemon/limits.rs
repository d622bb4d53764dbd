//! What a daemon's process may not have: io_uring, descriptors, memory, files as long as it wants, room that is counted.
//!
//! Held here: the words name the cause and the remedy, nobody else notices, and a guest hears only of errors of its own
//! disk.

use crate::support::daemon::{Daemon, program};
use crate::support::full::{BLOCK, DISK_LEN, connect, full_disk, write};
use crate::support::images::create;
use crate::support::mount::Mount;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::random::Random;
use crate::support::tools::{check_leaks_allowed, content, ran, refused};
use crate::support::{assert_same, eventually, folder};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The words that run a daemon under a limit, for as long as nobody raises it again.
fn limited(limit: &str) -> [&str; 2] {
    ["prlimit", limit]
}

/// `serve`, whose process gets this error for this system call.
fn serve_refused(call: &str, number: &str, export: &str, folder: &Path) -> Command {
    let launcher = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/without_io_uring.py");
    let mut serve = Command::new("python3");
    serve.arg(&launcher).args([call, number]).arg(program()).args(["serve", "--export", export]);
    for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
        serve.arg(option).arg(folder.join(name));
    }
    serve
}

#[test]
fn without_io_uring_the_error_says_what_to_set() {
    let folder = folder();
    let (_, _, export) = full_disk(folder.path());
    for (number, words) in [("1", "kernel.io_uring_disabled to 0"), ("38", "Linux 6.0"), ("12", "ulimit -l")] {
        refused(serve_refused("setup", number, &export, folder.path()), &["io_uring", words]);
    }
}

/// A filter of system calls sees no operation of a ring, but what a ring is asked to register: an old kernel says that it
/// does not know that. Each single operation is `io::ring::needed`'s own test.
#[test]
fn a_kernel_that_is_too_old_is_an_error_that_says_so() {
    let folder = folder();
    let (_, _, export) = full_disk(folder.path());
    for (request, name) in [("8", "IORING_REGISTER_PROBE"), ("24", "IORING_REGISTER_SYNC_CANCEL")] {
        let call = format!("register:{request}");
        refused(serve_refused(&call, "22", &export, folder.path()), &[name, "lacks", "Linux 6.0 or newer"]);
        refused(serve_refused(&call, "1", &export, folder.path()), &[name, "allow io_uring_register"]);
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

/// A disk of zeroes with one block at `at`, and that block.
fn one_block(place: &Path, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; DISK_LEN as usize];
    bytes[at as usize..][..BLOCK].copy_from_slice(&Random::new(9).bytes(BLOCK));
    std::fs::write(place, &bytes).expect("a file of ours");
    bytes
}

/// An image that has all its space already, and where its byte `at` is in the file.
fn whole_image(place: &Path, format: &str, at: u64) -> u64 {
    create(place, format, DISK_LEN, &["-o", "preallocation=full"]);
    let map = ran(Command::new("qemu-img").args(["map", "--output=json", "-f", format]).arg(place));
    let map: serde_json::Value = serde_json::from_str(&map).expect("qemu-img's own words");
    let inside = |run: &&serde_json::Value| {
        let number = |field: &str| run[field].as_u64().expect("a number");
        (number("start")..number("start") + number("length")).contains(&at)
    };
    let run = map.as_array().and_then(|map| map.iter().find(inside)).expect("it has all its space");
    run["offset"].as_u64().expect("its place") + at - run["start"].as_u64().expect("a number")
}

/// The kernel cuts a write at the limit and refuses the rest of it.
#[test]
fn a_write_to_the_target_that_is_cut_short_is_carried_on_and_fails_where_it_ends() {
    const AT: u64 = 5 << 20;
    for (number, (format, cache)) in
        [("raw", "none"), ("raw", "writeback"), ("qcow2", "none"), ("qcow2", "writeback")].into_iter().enumerate()
    {
        let folder = folder();
        let (disk, target) = (folder.path().join("disk.raw"), folder.path().join("target"));
        let mut truth = one_block(&disk, AT);
        let limit = whole_image(&target, format, AT) + 1536;
        let through = format!("--fsize={limit}:unlimited");
        let export = format!("vda={},format=raw", disk.display());
        let mut daemon = Daemon::serve_through(&limited(&through), folder.path(), &[export], &["--cache", cache]);
        let name = target.display().to_string();
        let how = ["--reuse-external", "--format", format, "--on-target-error", "stop"];
        daemon.ok("mirror", &[&["vda", &name][..], &how].concat());
        let paused = || Some(daemon.status("vda")).filter(|status| status["paused"] == true);
        let error = eventually("the job pauses", paused)["error"].to_string();
        let place = format!("at {limit}");
        assert!(
            [&name, "File too large", &place].iter().all(|words| error.contains(*words)),
            "{format}, {cache}: {error}"
        );
        let cut = AT as usize + 1536;
        if format == "raw" {
            assert_same("what went", &std::fs::read(&target).expect("our file")[..cut], &truth[..cut]);
        }
        let (mut guest, mut random) = (connect(&daemon), Random::new(10 + number as u64));
        write(&mut guest, &mut truth, 0, &mut random);
        ran(Command::new("prlimit").args(["--pid", &daemon.pid().to_string(), "--fsize=unlimited:"]));
        daemon.ok("resume", &["vda"]);
        daemon.wait_for("vda", "ready");
        daemon.pivot("vda");
        write(&mut guest, &mut truth, 1, &mut random);
        drop(guest);
        daemon.stop();
        assert_same("the target", &content(&target, format), &truth);

        let mut convert = Command::new("prlimit");
        convert.arg(&through).arg(program()).args(["convert", "--source-format", "raw", "--reuse-external"]);
        convert.args(["--format", format, "--cache", cache]).args([&disk, &target]);
        refused(convert, &["File too large", &place]);
    }
}

/// The guest hears of it as of a disk without room, for that is what it is; the signal would have ended the daemon.
#[test]
fn a_write_to_the_disk_that_is_cut_short_fails_and_the_next_one_does_not() {
    const AT: u64 = 5 << 20;
    for (format, cache) in [("raw", "none"), ("raw", "writeback"), ("qcow2", "none"), ("qcow2", "writeback")] {
        let folder = folder();
        let disk = folder.path().join("disk");
        let limit = whole_image(&disk, format, AT) + 1536;
        let export = format!("vda={},format={format}", disk.display());
        let through = format!("--fsize={limit}:unlimited");
        let mut daemon = Daemon::serve_through(&limited(&through), folder.path(), &[export], &["--cache", cache]);
        let (mut guest, mut truth) = (connect(&daemon), vec![0; DISK_LEN as usize]);
        let mut random = Random::new(21);
        for at in [AT, AT + BLOCK as u64] {
            guest.send(&Request::Write { at, bytes: random.bytes(BLOCK) });
            let answer = guest.receive().expect("an answer").result;
            assert_eq!(answer.err(), Some(28), "ENOSPC: {format}, {cache}, at {at}");
        }
        write(&mut guest, &mut truth, 0, &mut random);
        ran(Command::new("prlimit").args(["--pid", &daemon.pid().to_string(), "--fsize=unlimited:"]));
        for block in [AT as usize / BLOCK, AT as usize / BLOCK + 1] {
            write(&mut guest, &mut truth, block, &mut random);
        }
        drop(guest);
        daemon.stop();
        assert_same("the disk", &content(&disk, format), &truth);
    }
}

/// A subvolume of a file system that counts: what is in it may have so much.
struct Counted {
    place: PathBuf,
    _mount: Mount,
}

impl Counted {
    fn new(folder: &Path, limit: &str) -> Option<Self> {
        let mount = Mount::with_quota(folder.join("mounted"), &folder.join("device"))?;
        let place = mount.0.join("counted");
        ran(Command::new("btrfs").args(["subvolume", "create"]).arg(&place));
        let counted = Self { place, _mount: mount };
        counted.limit(limit);
        Some(counted)
    }

    fn limit(&self, limit: &str) {
        ran(Command::new("btrfs").args(["qgroup", "limit", limit]).arg(&self.place));
    }
}

#[test]
fn a_quota_that_is_used_up_is_no_room_for_the_target_and_nothing_to_its_guest() {
    let folder = folder();
    let Some(counted) = Counted::new(folder.path(), "3M") else { return };
    let (disk, mut truth, export) = full_disk(folder.path());
    let mut daemon = Daemon::serve(folder.path(), &[export]);
    let target = counted.place.join("target.qcow2");
    let name = target.display().to_string();
    daemon.ok("mirror", &["vda", &name, "--format", "qcow2", "--on-target-error", "enospc"]);
    let paused = || Some(daemon.status("vda")).filter(|status| status["paused"] == true);
    let status = eventually("the job pauses", paused);
    assert!(status["error"].to_string().contains("quota") && status["io_status"] == "nospace", "{status}");
    let (mut guest, mut random) = (connect(&daemon), Random::new(22));
    write(&mut guest, &mut truth, 0, &mut random);
    counted.limit("none");
    daemon.ok("resume", &["vda"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    write(&mut guest, &mut truth, 1, &mut random);
    drop(guest);
    daemon.stop();
    assert_same("the target", &content(&target, "qcow2"), &truth);
    assert_same("the source as it was left", &content(&disk, "raw")[2 * BLOCK..], &truth[2 * BLOCK..]);
}

#[test]
fn a_quota_that_is_used_up_is_no_room_for_a_guest_until_there_is_some() {
    let folder = folder();
    let Some(counted) = Counted::new(folder.path(), "3M") else { return };
    let disk = counted.place.join("disk.qcow2");
    create(&disk, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", disk.display())]);
    let (mut guest, mut random, mut truth) = (connect(&daemon), Random::new(23), vec![0; DISK_LEN as usize]);
    let mut refused = None;
    for block in 0..DISK_LEN as usize / BLOCK {
        let bytes = random.bytes(BLOCK);
        guest.send(&Request::Write { at: (block * BLOCK) as u64, bytes: bytes.clone() });
        match guest.receive().expect("an answer").result {
            Ok(_) => truth[block * BLOCK..][..BLOCK].copy_from_slice(&bytes),
            Err(errno) => {
                assert_eq!(errno, 28, "ENOSPC");
                refused = Some(block);
                break;
            }
        }
    }
    let refused = refused.expect("there is no room for all of it");
    counted.limit("none");
    write(&mut guest, &mut truth, refused, &mut random);
    drop(guest);
    daemon.stop();
    assert_same("the disk", &content(&disk, "qcow2"), &truth);
    check_leaks_allowed(&disk, "qcow2");
}
