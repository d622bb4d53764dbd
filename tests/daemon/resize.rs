//! Disks that grow while they are served: the guest goes on, sees the new size when it connects again, and finds zeroes
//! there; after a kill too. And what is refused.

use crate::support::daemon::Daemon;
use crate::support::images::{self, Chain, one_layer, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::qmp::Qmp;
use crate::support::random::Random;
use crate::support::server::Server;
use crate::support::tools::{check, check_leaks_allowed, content, info, run};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, folder};
use serde_json::json;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const DISK_LEN: u64 = 16 << 20;
const GROWN: u64 = 24 << 20;

fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

fn habits(seed: u64) -> Habits {
    Habits { seed, pause: Duration::ZERO, flush_one_in: 50, ..Habits::default() }
}

fn resize(daemon: &Daemon, size: u64) -> String {
    daemon.ok("resize", &["vda", &size.to_string()])
}

fn grown(mut truth: Vec<u8>, size: u64) -> Vec<u8> {
    truth.resize(size as usize, 0);
    truth
}

/// Writes to what is new of the disk, and to `truth`.
fn write_there(daemon: &Daemon, truth: &mut [u8], at: u64) {
    let bytes = vec![0x5a; 100_000];
    connect(daemon).ask(&Request::Write { at, bytes: bytes.clone() });
    truth[at as usize..][..bytes.len()].copy_from_slice(&bytes);
}

/// A qcow2 disk with its payload in a file of its own.
fn external(folder: &Path, seed: u64) -> Chain {
    let top = folder.join("disk.qcow2");
    let (option, _) = images::data_file(&top, true);
    images::create(&top, "qcow2", DISK_LEN, &["-o", &option]);
    images::fill_plain(&top, "qcow2", DISK_LEN, &mut Random::new(seed));
    Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2")], told: String::new() }
}

/// An overlay of half the disk below it.
fn short_overlay(folder: &Path, seed: u64) -> Chain {
    let mut chain = three_layers(folder, 2 * DISK_LEN, seed);
    let top = folder.join("short.qcow2");
    images::overlay(&top, "snap2.qcow2", "qcow2", Some(DISK_LEN), &["-o", "cluster_size=4096"]);
    images::fill(&top, "qcow2", DISK_LEN, 4096, &mut Random::new(seed + 1));
    chain.layers.push((top.clone(), "qcow2"));
    Chain { top, ..chain }
}

#[test]
fn a_disk_grows_under_its_guest_and_stays_so_after_a_kill() {
    type Make = fn(&Path, u64) -> Chain;
    let makes: [(Make, u64); 5] = [
        (|folder, seed| one_layer(folder, "raw", DISK_LEN, seed), 1),
        (|folder, seed| one_layer(folder, "qcow2", DISK_LEN, seed), 2),
        (|folder, seed| three_layers(folder, DISK_LEN, seed), 3),
        (external, 4),
        (short_overlay, 5),
    ];
    for (make, seed) in makes {
        let folder = folder();
        let chain = make(folder.path(), seed);
        let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        let writer = Writer::start(&daemon.socket(), "vda", chain.content(), habits(seed));
        writer.wait(100);
        let said = resize(&daemon, GROWN);
        assert!(said.contains("resized"), "{said}");
        assert_eq!(run("nbdinfo", &["--size", &daemon.uri("vda")]).trim(), GROWN.to_string());
        writer.wait(300);
        // It did not connect again: for it the disk ends where it did.
        let mut truth = grown(writer.stop(), GROWN);
        assert_same("the disk that is served", &connect(&daemon).content(), &truth);
        write_there(&daemon, &mut truth, GROWN - 100_000);
        write_there(&daemon, &mut truth, DISK_LEN - 50_000);
        daemon.kill();
        daemon.start();
        assert_same("the disk after the kill", &connect(&daemon).content(), &truth);
        let again = Writer::start(&daemon.socket(), "vda", truth, habits(seed + 10));
        again.wait(100);
        resize(&daemon, GROWN);
        resize(&daemon, GROWN + 512);
        again.wait(100);
        let truth = grown(again.stop(), GROWN + 512);
        daemon.stop();
        assert_same("the image on its own", &chain.content(), &truth);
        assert_eq!(info(&chain.top)["virtual-size"], GROWN + 512);
        check_leaks_allowed(&chain.top, chain.format);
    }
}

#[test]
fn an_image_that_grew_has_nothing_left_behind() {
    let folder = folder();
    let chain = one_layer(folder.path(), "qcow2", DISK_LEN, 6);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    // 8 TiB have 16384 tables: more than one cluster of the L1 table names.
    daemon.ok("resize", &["vda", "8T"]);
    connect(&daemon).ask(&Request::Write { at: (8 << 40) - 512, bytes: vec![7; 512] });
    daemon.stop();
    check(&chain.top, "qcow2");
    assert_eq!(info(&chain.top)["virtual-size"], 8_u64 << 40);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 7 8796093021696 512", &chain.top.display().to_string()]);
}

/// A kill at any moment leaves the old size or the new one, and zeroes in what is new.
#[test]
fn a_kill_while_a_disk_grows_leaves_one_size_or_the_other() {
    let folder = folder();
    let chain = short_overlay(folder.path(), 7);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let writer = Writer::start(&daemon.socket(), "vda", chain.content(), habits(8));
    let mut size = DISK_LEN;
    for round in 0..12_u64 {
        writer.wait(20);
        let wanted = size + 512 * (1 + round * 97);
        let mut command = daemon.command("resize", &["vda", &wanted.to_string()]);
        let mut child = command.stderr(std::process::Stdio::null()).spawn().expect("the program");
        // Each round a little later: some kills come before it, some after.
        std::thread::sleep(Duration::from_millis(3 * round));
        daemon.kill();
        let answered = child.wait().expect("our child").success();
        daemon.start();
        let now = connect(&daemon).size();
        assert!(now == wanted || now == size && !answered, "{now} bytes, {size} or {wanted} were possible: {answered}");
        size = now;
    }
    // The guest has compared the whole disk after each kill.
    let truth = grown(writer.stop(), size);
    assert_same("the disk that is served", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the image on its own", &chain.content(), &truth);
    check_leaks_allowed(&chain.top, "qcow2");
}

/// A pivot into a longer raw file: the disk ends before it does, and what is behind is nobody's.
#[test]
fn what_was_behind_the_disk_in_a_longer_target_reads_as_zeroes() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 9);
    let target = folder.path().join("longer.raw");
    std::fs::write(&target, vec![0xee; GROWN as usize]).expect("room");
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--reuse-external", "--raw", "--pivot"]);
    let mut truth = chain.content();
    resize(&daemon, DISK_LEN + 4096);
    truth = grown(truth, DISK_LEN + 4096);
    assert_same("a part of it", &connect(&daemon).content(), &truth);
    write_there(&daemon, &mut truth, DISK_LEN - 96_000);
    daemon.kill();
    daemon.start();
    assert_same("a part of it after a kill", &connect(&daemon).content(), &truth);
    resize(&daemon, GROWN + 4096);
    truth = grown(truth, GROWN + 4096);
    write_there(&daemon, &mut truth, GROWN - 96_000);
    daemon.stop();
    daemon.start();
    assert_same("more than there was", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the file on its own", &content(&target, "raw"), &truth);
}

/// After a pivot into a longer raw file its disk ends before the file does; a snapshot upon it then has a backing file
/// that is longer for whoever opens it by its name. The disk grew over what is in there, and showed it from its next start on.
#[test]
fn what_is_behind_the_disk_below_an_overlay_reads_as_zeroes() {
    let folder = folder();
    let chain = one_layer(folder.path(), "raw", DISK_LEN, 13);
    let (target, overlay) = (folder.path().join("longer.raw"), folder.path().join("overlay.qcow2"));
    std::fs::write(&target, vec![0xee; GROWN as usize]).expect("room");
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--reuse-external", "--raw", "--pivot"]);
    daemon.ok("snapshot", &["vda", &overlay.display().to_string()]);
    resize(&daemon, GROWN + 512);
    let truth = grown(chain.content(), GROWN + 512);
    assert_same("the overlay", &connect(&daemon).content(), &truth);
    daemon.kill();
    daemon.start();
    assert_same("the overlay after a kill", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the overlay on its own", &content(&overlay, "qcow2"), &truth);
}

/// The bitmaps of an image grow with it: a guest's writes to what is new are marked there, and nothing else is.
#[test]
fn bitmaps_grow_with_their_disk() {
    let folder = folder();
    let top = folder.path().join("disk.qcow2");
    let name = top.display().to_string();
    images::create(&top, "qcow2", DISK_LEN, &["-o", "cluster_size=4096"]);
    // So fine that its bits have more clusters when the disk is larger.
    run("qemu-img", &["bitmap", "--add", "-g", "512", &name, "kept"]);
    run("qemu-io", &["-c", "write -P 1 1M 64k", &name]);
    run("qemu-img", &["bitmap", "--disable", &name, "kept"]);
    run("qemu-img", &["bitmap", "--add", "-g", "64k", &name, "live"]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={name}")]);
    let dirty = |daemon: &Daemon, bitmap: &str| -> Vec<(u64, u64)> {
        let said = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), &daemon.uri("vda")]);
        let runs: Vec<serde_json::Value> = serde_json::from_str(&said).expect("JSON");
        let number = |run: &serde_json::Value, name: &str| run[name].as_u64().expect("a number");
        runs.iter().filter(|run| run["type"] == 1).map(|run| (number(run, "offset"), number(run, "length"))).collect()
    };
    let write = |daemon: &Daemon, at: u64| {
        connect(daemon).ask(&Request::Write { at, bytes: vec![7; 512] });
    };
    write(&daemon, 0);
    resize(&daemon, 256 << 20);
    write(&daemon, 200 << 20);
    let (kept, live) = ([(1 << 20, 65536)], [(0, 65536), (200 << 20, 65536)]);
    assert_eq!((dirty(&daemon, "kept"), dirty(&daemon, "live")), (kept.to_vec(), live.to_vec()));
    daemon.stop();
    check(&top, "qcow2");
    let flags = |image: &Path| -> Vec<serde_json::Value> {
        let bitmaps = info(image)["format-specific"]["data"]["bitmaps"].clone();
        bitmaps.as_array().expect("a list").iter().map(|bitmap| bitmap["flags"].clone()).collect()
    };
    assert_eq!(flags(&top), [json!([]), json!(["auto"])]);
    daemon.start();
    assert_eq!((dirty(&daemon, "kept"), dirty(&daemon, "live")), (kept.to_vec(), live.to_vec()));
    // A kill takes what is being marked, and nothing else.
    resize(&daemon, 512 << 20);
    daemon.kill();
    assert_eq!(flags(&top), [json!([]), json!(["in-use", "auto"])]);
    daemon.start();
    assert_eq!(dirty(&daemon, "kept"), kept);
    daemon.stop();
    check_leaks_allowed(&top, "qcow2");
    run("qemu-img", &["bitmap", "--remove", &name, "live"]);
    run("qemu-img", &["resize", "-q", &name, "1G"]);
    // What was carried to another image at a pivot grows there too.
    run("qemu-img", &["bitmap", "--add", "-g", "64k", &name, "more"]);
    daemon.start();
    let target = folder.path().join("target.qcow2");
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--pivot"]);
    write(&daemon, 64 << 20);
    resize(&daemon, 2 << 30);
    write(&daemon, (2 << 30) - 512);
    let more = [(64 << 20, 65536), ((2 << 30) - 65536, 65536)];
    assert_eq!((dirty(&daemon, "kept"), dirty(&daemon, "more")), (kept.to_vec(), more.to_vec()));
    daemon.stop();
    check(&target, "qcow2");
    assert_eq!(flags(&target).len(), 2);
}

#[test]
fn a_disk_that_grew_is_mirrored_as_large_as_it_is() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 10);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    resize(&daemon, GROWN);
    let mut truth = grown(chain.content(), GROWN);
    write_there(&daemon, &mut truth, GROWN - 100_000);
    let target = folder.path().join("new.qcow2");
    let path = target.display().to_string();
    daemon.ok("mirror", &["vda", &path, "--speed", "1K"]);
    let said = daemon.refused("resize", &["vda", "32M"]);
    assert!(said.contains("BLOCK_COPY_ACTIVE") && said.contains("cancel it first"), "{said}");
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    resize(&daemon, GROWN + (1 << 20));
    truth = grown(truth, GROWN + (1 << 20));
    daemon.kill();
    daemon.start();
    assert_same("the target, larger", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("on its own", &content(&target, "qcow2"), &truth);
}

#[test]
fn what_cannot_grow_is_refused_and_stays_as_it_was() {
    let folder = folder();
    let chain = one_layer(folder.path(), "qcow2", DISK_LEN, 11);
    let other = folder.path().join("other.raw");
    images::create(&other, "raw", DISK_LEN, &[]);
    let theirs = folder.path().join("theirs");
    std::fs::create_dir(&theirs).expect("a new folder");
    let server = Server::nbdkit(&theirs, &["memory", "16M"]);
    let exports = [
        chain.export("vda"),
        format!("only={},format=raw,readonly", other.display()),
        format!("remote={},format=raw", server.uri("")),
    ];
    let daemon = Daemon::serve(folder.path(), &exports);
    for (args, reason) in [
        (
            ["vda", "8M"],
            "has 16777216 bytes and is not cut to 8388608: shrink the image with `qemu-img resize --shrink`",
        ),
        (["vda", "16777217"], "multiples of 512"),
        (["vda", "16777215T"], "no size of a disk"),
        (["vda", "1000000T"], "take larger clusters"),
        (["vdz", "20M"], "no export vdz"),
        (["only", "20M"], "read-only"),
        (["remote", "20M"], "another server's"),
    ] {
        let said = daemon.refused("resize", &args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    assert_eq!(connect(&daemon).size(), DISK_LEN);
    assert_same("the disk", &connect(&daemon).content(), &chain.content());
    assert_eq!(std::fs::metadata(&other).expect("a file").len(), DISK_LEN);
}

#[test]
fn qmp_has_it_by_two_names() {
    let folder = folder();
    let chain = one_layer(folder.path(), "raw", DISK_LEN, 12);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    assert_eq!(qmp.ok("block_resize", json!({ "device": "vda", "size": DISK_LEN + 512 })), json!({}));
    assert_eq!(connect(&daemon).size(), DISK_LEN + 512);
    qmp.ok("block_resize", json!({ "node-name": "vda", "size": DISK_LEN + 1024 }));
    assert_eq!(connect(&daemon).size(), DISK_LEN + 1024);
    qmp.ok("blkmirror-resize", json!({ "export": "vda", "size": GROWN }));
    assert_eq!(connect(&daemon).size(), GROWN);
    let error = qmp.refused("block_resize", json!({ "size": GROWN }));
    assert!(error["desc"].as_str().is_some_and(|desc| desc.contains("node-name")), "{error}");
    let error = qmp.refused("block_resize", json!({ "device": "vda", "size": 512 }));
    assert_eq!(error["code"], "OPERATION_UNSUPPORTED");
    let last = std::fs::File::open(&chain.top).expect("a file");
    let mut sector = [1; 512];
    last.read_exact_at(&mut sector, GROWN - 512).expect("the file's end");
    assert_eq!(sector, [0; 512]);
}
