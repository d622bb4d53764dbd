//! The main job over the command line: a disk is copied while its guest writes, and becomes the disk or stays a copy.
//!
//! After each job: what is served holds the guest's truth, QEMU reads the same from the file alone, `qemu-img check`
//! finds nothing wrong, and the place that the disk left is as it was at that moment.

use crate::support::daemon::Daemon;
use crate::support::images::{self, Chain, overlay, random_chain, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::random::Random;
use crate::support::scene::{DISK_LEN, Scene, backing};
use crate::support::tools::{self, allocated, check, content, info};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, folder};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Slow enough that the job is still under way when the test looks.
const SLOW: &str = "1048576";

#[test]
fn a_shallow_copy_of_subclusters_has_those_and_no_whole_clusters() {
    let folder = folder();
    let (base, top) = (folder.path().join("base.qcow2"), folder.path().join("top.qcow2"));
    images::holding(&base, "qcow2", &vec![0xba; 4 << 20], &[]);
    overlay(&top, "base.qcow2", "qcow2", None, &["-o", "extended_l2=on"]);
    // Subclusters have 2 KiB: whole ones, parts, zeroes, and two clusters in a row.
    let orders =
        ["write -P 1 2k 2k", "write -P 2 70k 1k", "write -z 72k 4k", "write -P 3 190k 4k", "write -P 4 1m 100k"];
    tools::run("qemu-io", &[&orders.map(|order| ["-c", order]).concat()[..], &[top.to_str().expect("text")]].concat());
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", top.display())]);
    let target = folder.path().join("target");
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--shallow", "--wait", "--finish"]);
    daemon.wait_for("vda", "cancelled");
    check(&target, "qcow2");
    assert_same("the copy", &content(&target, "qcow2"), &content(&top, "qcow2"));
    assert_eq!(own_runs(&target), own_runs(&top));
}

/// The runs of an image that are its own, not its backing's: start, length, whether there is data.
fn own_runs(image: &Path) -> Vec<(u64, u64, bool)> {
    let map = tools::run("qemu-img", &["map", "-U", "--output=json", image.to_str().expect("text")]);
    let runs: Vec<Value> = serde_json::from_str(&map).expect("JSON of qemu-img");
    let number = |run: &Value, name: &str| run[name].as_u64().expect("a number");
    let own = runs.iter().filter(|run| run["depth"] == 0);
    own.map(|run| (number(run, "start"), number(run, "length"), run["data"] == true)).collect()
}

#[test]
fn disks_of_every_kind_move() {
    for seed in 0..10 {
        let folder = folder();
        let home = folder.path().join("chain");
        std::fs::create_dir(&home).expect("a folder of ours");
        let chain = random_chain(&home, &mut Random::new(1000 + seed));
        let whole_sectors = chain.format == "qcow2" || chain.top.metadata().is_ok_and(|file| file.len() % 512 == 0);
        if !whole_sectors {
            // The guest of these tests counts in sectors.
            continue;
        }
        let (format, options) = match seed % 3 {
            0 => ("raw", vec!["--raw"]),
            1 => ("qcow2", vec!["--format", "qcow2"]),
            _ => (chain.format, if chain.layers.len() > 1 { vec!["--shallow"] } else { vec![] }),
        };
        eprintln!("seed {seed}, {options:?}\n{}", chain.told);
        Scene::of(folder, chain, seed).moves(&options, format);
    }
}

// External data files.

/// A disk in two files, with something in it.
#[track_caller]
fn disk_with_data_file(folder: &Path, raw: bool, seed: u64) -> Chain {
    let top = folder.join("disk.qcow2");
    let (option, data) = images::data_file(&top, raw);
    images::create(&top, "qcow2", DISK_LEN, &["-o", &option]);
    images::fill_plain(&top, "qcow2", DISK_LEN, &mut Random::new(seed));
    Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2"), (data, "raw")], told: String::new() }
}

#[test]
fn a_disk_with_a_data_file_moves_to_one_without() {
    for raw in [false, true] {
        let folder = folder();
        let chain = disk_with_data_file(folder.path(), raw, 40);
        let scene = Scene::of(folder, chain, 40).moves(&[], "qcow2");
        assert_eq!(info(&scene.target)["format-specific"]["data"]["data-file"], Value::Null);
    }
}

#[test]
fn a_shallow_copy_of_an_overlay_with_a_data_file_holds_the_overlay() {
    let folder = folder();
    let base = folder.path().join("base.qcow2");
    images::create(&base, "qcow2", DISK_LEN, &[]);
    images::fill(&base, "qcow2", DISK_LEN, 1 << 16, &mut Random::new(41));
    let top = folder.path().join("disk.qcow2");
    let (option, data) = images::data_file(&top, false);
    overlay(&top, "base.qcow2", "qcow2", None, &["-o", &option]);
    let layers = vec![(base, "qcow2"), (top.clone(), "qcow2"), (data, "raw")];
    let chain = Chain { top, format: "qcow2", layers, told: String::new() };
    let scene = Scene::of(folder, chain, 41).moves(&["--shallow"], "qcow2");
    assert!(backing(&scene.target).is_some());
}

#[test]
fn a_reused_target_with_a_data_file_has_the_disk_in_it() {
    for raw in [false, true] {
        let scene = Scene::new(42);
        let (option, data) = images::data_file(&scene.target, raw);
        images::holding(&scene.target, "qcow2", &vec![0xdd; DISK_LEN as usize], &["-o", &option]);
        let scene = scene.moves(&["--reuse-external"], "qcow2");
        let named = &info(&scene.target)["format-specific"]["data"];
        assert_eq!((&named["data-file-raw"], &named["corrupt"]), (&raw.into(), &false.into()));
        if raw {
            assert_same("the data file alone", &content(&data, "raw"), &content(&scene.target, "qcow2"));
        }
    }
}

// Modes, verbs and phases.

#[test]
fn each_mode_moves_the_disk() {
    for (seed, mode) in [(11, "background"), (12, "write-blocking"), (13, "auto")] {
        Scene::new(seed).moves(&["--mode", mode, "--granularity", "65536"], "qcow2");
    }
}

#[test]
fn wait_returns_when_the_job_is_ready_and_pivot_when_it_is_done() {
    let mut scene = Scene::new(14);
    scene.mirror(&["--wait"]);
    assert_eq!(scene.status()["phase"], "ready");
    scene.daemon.pivot("vda");
    scene.ends_on_the_target("qcow2");

    let mut scene = Scene::new(15);
    scene.mirror(&["--raw", "--wait", "--pivot"]);
    let status = scene.status();
    assert_eq!((&status["phase"], &status["serving"]), (&"pivoted".into(), &scene.target().into()), "{status}");
    scene.ends_on_the_target("raw");
}

#[test]
fn finish_leaves_a_copy_and_the_guest_on_the_source() {
    let mut scene = Scene::new(16);
    scene.mirror(&["--wait", "--finish"]);
    assert_eq!(scene.status()["phase"], "cancelled");
    check(&scene.target, "qcow2");
    scene.ends_on_the_source();
}

#[test]
fn a_copy_that_was_cancelled_when_ready_equals_the_disk() {
    let mut scene = Scene::new(17);
    scene.mirror(&["--wait"]);
    scene.writes(100);
    let truth = scene.writer.take().expect("a guest").stop();
    scene.daemon.ok("cancel", &["vda"]);
    assert_same("the copy", &content(&scene.target, "qcow2"), &truth);
    check(&scene.target, "qcow2");
    let habits = Habits { seed: 18, ..Habits::default() };
    scene.writer = Some(Writer::start(&scene.daemon.socket(), "vda", truth, habits));
    scene.ends_on_the_source();
}

#[test]
fn a_copy_that_was_cancelled_under_load_is_the_disk_of_one_instant() {
    const SLOT: u64 = 4096;
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    images::create(&disk, "qcow2", DISK_LEN, &[]);
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", disk.display())]);
    let copy = folder.path().join("copy.qcow2");
    let slots = DISK_LEN / SLOT;
    // Each write has a place of its own, far from the last one's, and waits for its answer before the next.
    let place = move |number: u64| number * 1_237 % slots * SLOT;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (stop_too, socket) = (stop.clone(), daemon.socket());
    let guest = std::thread::spawn(move || {
        let mut client = Client::connect(&socket, "vda", Replies::Simple).expect("a connection");
        let mut number = 0;
        while number < slots && !stop_too.load(std::sync::atomic::Ordering::Relaxed) {
            client.ask(&Request::Write { at: place(number), bytes: vec![1 + (number % 255) as u8; SLOT as usize] });
            number += 1;
        }
        number
    });
    daemon.ok("mirror", &["vda", &copy.display().to_string(), "--wait"]);
    daemon.ok("cancel", &["vda"]);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let written = guest.join().expect("the guest");
    daemon.stop();
    let bytes = content(&copy, "qcow2");
    let there = |number: u64| {
        let slot = &bytes[place(number) as usize..][..SLOT as usize];
        let whole = |byte: u8| slot.iter().all(|found| *found == byte);
        assert!(whole(0) || whole(1 + (number % 255) as u8), "write {number} is torn in the copy");
        !whole(0)
    };
    let first_missing = (0..written).find(|number| !there(*number)).unwrap_or(written);
    let later = (first_missing..written).find(|number| there(*number));
    assert_eq!(later, None, "write {first_missing} of {written} is not in the copy, and a later one is");
}

#[test]
fn a_cancelled_job_leaves_the_guest_where_it_was() {
    for (seed, force) in [(19, &["vda"][..]), (20, &["vda", "--force"])] {
        let mut scene = Scene::new(seed);
        scene.mirror(&["--speed", SLOW]);
        scene.writes(50);
        scene.daemon.ok("cancel", force);
        let status = scene.status();
        assert_eq!(status["phase"], "cancelled", "{status}");
        scene.ends_on_the_source();
    }
    let mut scene = Scene::new(21);
    scene.mirror(&["--wait"]);
    scene.daemon.ok("cancel", &["vda", "--force"]);
    assert_eq!(scene.status()["phase"], "cancelled");
    scene.ends_on_the_source();
}

#[test]
fn a_second_job_after_the_first_one_ended_is_as_good() {
    let mut scene = Scene::new(22);
    scene.mirror(&["--speed", SLOW]);
    scene.daemon.ok("cancel", &["vda"]);
    scene.target = scene.folder.path().join("second");
    scene = scene.moves(&["--raw"], "raw");
    assert!(scene.target.exists());
}

#[test]
fn a_paused_job_copies_nothing_and_loses_no_write() {
    let mut scene = Scene::new(23);
    scene.mirror(&["--speed", SLOW]);
    scene.daemon.ok("pause", &["vda"]);
    assert_eq!(scene.status()["paused"], true);
    // What was in flight when it was paused has ended long before these writes have.
    scene.writes(200);
    let before = scene.status();
    scene.writes(200);
    let after = scene.status();
    assert_eq!(before["copied_bytes"], after["copied_bytes"], "{before} {after}");
    assert_eq!(after["paused"], true);
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    scene.daemon.ok("resume", &["vda"]);
    let ready = scene.daemon.wait_for("vda", "ready");
    assert_eq!(ready["paused"], false, "{ready}");
    scene.daemon.pivot("vda");
    scene.ends_on_the_target("qcow2");
    // Given up while it rests, it rests no more.
    let scene = Scene::new(23);
    scene.mirror(&["--speed", SLOW]);
    scene.daemon.ok("pause", &["vda"]);
    scene.daemon.ok("cancel", &["vda"]);
    let status = scene.status();
    assert_eq!((&status["phase"], &status["paused"]), (&Value::from("cancelled"), &Value::from(false)), "{status}");
}

#[test]
fn progress_is_whole_at_ready_and_not_before() {
    let scene = Scene::new(24);
    let none = scene.status();
    assert_eq!(none["phase"], "none");
    assert_eq!(none["job"], Value::Null);
    assert_eq!(none["target"], Value::Null);
    scene.mirror(&["--speed", SLOW]);
    let status = scene.status();
    for field in ["total_bytes", "remaining_bytes", "copied_bytes", "dirty_bytes"] {
        assert!(status[field].is_u64(), "{field}: {status}");
    }
    assert!(["seeding", "converging"].iter().any(|phase| status["phase"] == **phase), "{status}");
    assert!(status["remaining_bytes"].as_u64() > Some(0), "{status}");
    assert!(status["copied_bytes"].as_u64() < status["total_bytes"].as_u64(), "{status}");
    assert_eq!(status["speed_bytes_per_s"].to_string(), SLOW);
    assert_eq!(status["target"], scene.target());
    assert_eq!((&status["source"], &status["serving"]), (&scene.source().into(), &scene.source().into()));
    let all: Value = serde_json::from_str(&scene.daemon.ok("status", &["--json"])).expect("JSON");
    assert_eq!(all.as_array().map(Vec::len), Some(1), "{all}");
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    crate::support::eventually("the job is ready", || {
        let status = scene.status();
        let ready = status["phase"] == "ready";
        assert!(ready || status["remaining_bytes"].as_u64() > Some(0), "{status}");
        ready.then_some(())
    });
}

#[test]
fn two_disks_of_one_daemon_move_at_once() {
    let folder = folder();
    let homes = ["a", "b"].map(|name| folder.path().join(name));
    homes.iter().for_each(|home| std::fs::create_dir(home).expect("a folder of ours"));
    let chains = [three_layers(&homes[0], DISK_LEN, 25), three_layers(&homes[1], DISK_LEN, 26)];
    let truths = [chains[0].content(), chains[1].content()];
    let mut daemon = Daemon::serve(folder.path(), &[chains[0].export("vda"), chains[1].export("vdb")]);
    let targets = homes.map(|home| home.join("target"));
    let mut writers = Vec::new();
    for (index, (name, truth)) in ["vda", "vdb"].into_iter().zip(truths).enumerate() {
        let habits = Habits { seed: index as u64, ..Habits::default() };
        writers.push(Writer::start(&daemon.socket(), name, truth, habits));
        daemon.ok("mirror", &[name, &targets[index].display().to_string()]);
    }
    for name in ["vda", "vdb"] {
        daemon.wait_for(name, "ready");
        daemon.pivot(name);
    }
    writers.iter().for_each(|writer| writer.wait(50));
    let truths: Vec<Vec<u8>> = writers.into_iter().map(Writer::stop).collect();
    daemon.stop();
    for (target, truth) in targets.iter().zip(&truths) {
        assert_same("a target on its own", &content(target, "qcow2"), truth);
        check(target, "qcow2");
    }
}

#[test]
fn the_programs_words_for_misuse_are_no_refusals() {
    let scene = Scene::new(31);
    for args in [&["mirror"][..], &["mirror", "vda"], &["mirror", "vda", "x", "--mode", "fast"], &["no-such-verb"]] {
        let mut command = Command::new(crate::support::daemon::program());
        command.arg(args[0]).arg("--control").arg(scene.daemon.control_socket()).args(&args[1..]);
        assert_eq!(tools::output(&mut command).status.code(), Some(2), "{args:?}");
    }
}

// Thinness.

/// A disk of `DISK_LEN` with two small islands, written zeroes between them, and nothing in the rest.
fn thin_disk(folder: &Path) -> Chain {
    let top = folder.join("disk.qcow2");
    images::create(&top, "qcow2", DISK_LEN, &[]);
    tools::ran(
        Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 1 1M 256k", "-c", "write -P 2 20M 256k"])
            .args(["-c", "write -P 0 2M 16M", "-c", "write -z 28M 1M"])
            .arg(&top),
    );
    Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2")], told: String::new() }
}

#[test]
fn a_target_is_never_thicker_than_its_source_and_zeroes_become_holes() {
    for (format, options) in [("qcow2", &[][..]), ("raw", &["--raw"])] {
        let folder = folder();
        let chain = thin_disk(folder.path());
        let target = folder.path().join("target");
        let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        let name = target.display().to_string();
        daemon.ok("mirror", &[&["vda", &name, "--wait", "--pivot"], options].concat());
        daemon.stop();
        assert_same(format, &content(&target, format), &chain.content());
        check(&target, format);
        let (islands_len, tables_len) = (512 << 10, 1 << 20);
        assert!(allocated(&target) <= islands_len + tables_len, "{format}: {} bytes", allocated(&target));
        assert!(allocated(&target) <= chain.allocated(), "{format}: thicker than its source");
    }
}

#[test]
fn a_reused_target_gives_back_what_the_source_does_not_have() {
    let folder = folder();
    let chain = thin_disk(folder.path());
    let target = folder.path().join("target.raw");
    std::fs::write(&target, vec![0xdd; DISK_LEN as usize]).expect("a file of ours");
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let name = target.display().to_string();
    daemon.ok("mirror", &["vda", &name, "--reuse-external", "--raw", "--wait", "--pivot"]);
    daemon.stop();
    assert_same("the target", &content(&target, "raw"), &chain.content());
    assert!(allocated(&target) <= 2 << 20, "{} bytes", allocated(&target));
}

#[test]
fn a_disk_that_nobody_writes_moves_as_well() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 32);
    let truth = chain.content();
    let target = folder.path().join("target");
    let mut daemon = Daemon::serve_with(folder.path(), &[chain.export("vda")], &["--cache", "writeback"]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--wait", "--pivot"]);
    daemon.stop();
    assert_same("the target", &content(&target, "qcow2"), &truth);
}
