//! The daemon killed with `kill -9`, and started again with the same command line.
//!
//! Held here, of `SEMANTICS` §5: every acknowledged write is there, flushed or not (8); a kill in the middle of a
//! job loses neither the guest's writes nor the job (10); after a pivot it is the target, and only the target, that
//! is served (7, 9). A kill may leave clusters that nobody uses, as a power cut may; nothing worse.
mod rounds;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::daemon::Daemon;
use support::images::{self, Chain, compare, three_layers};
use support::nbd::{Client, Replies, Request};
use support::random::Random;
use support::tools::{check_leaks_allowed, content};
use support::writer::{Habits, Writer};
use support::{assert_same, folder};

const DISK_LEN: u64 = 32 << 20;

fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

/// A disk of one image with nothing in it.
fn empty(folder: &Path, options: &[&str]) -> Chain {
    let top = folder.join("disk.qcow2");
    images::create(&top, "qcow2", DISK_LEN, options);
    Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2")], told: String::new() }
}

/// Sends all requests, `depth` at a time, and returns when each is acknowledged.
fn acknowledge_all(client: &mut Client, requests: &[Request], depth: usize) {
    for batch in requests.chunks(depth) {
        let mut cookies: Vec<u64> = batch.iter().map(|request| client.send(request)).collect();
        while !cookies.is_empty() {
            let answer = client.receive().expect("an answer");
            assert!(answer.result.is_ok(), "error {:?}", answer.result);
            cookies.retain(|cookie| *cookie != answer.cookie);
        }
    }
}

/// What the requests make of `disk`. Discards are not among them: what they leave is the image's choice.
fn apply(disk: &mut [u8], requests: &[Request]) {
    for request in requests {
        match request {
            Request::Write { at, bytes } => disk[*at as usize..][..bytes.len()].copy_from_slice(bytes),
            Request::Zero { at, len, .. } => disk[*at as usize..][..*len as usize].fill(0),
            other => panic!("{other} is not for this model"),
        }
    }
}

/// Acknowledged and never flushed, then the kill: all is read back, also by QEMU when the daemon has ended.
#[track_caller]
fn survives(chain: &Chain, folder: &Path, requests: &[Request], depth: usize) {
    let mut truth = chain.content();
    apply(&mut truth, requests);
    let daemon = Daemon::serve(folder, &[chain.export("vda")]);
    acknowledge_all(&mut connect(&daemon), requests, depth);
    kill_and_compare(daemon, chain, &truth);
}

/// Kills the daemon and starts it again: the disk has the truth, and so has the image after a clean stop.
#[track_caller]
fn kill_and_compare(mut daemon: Daemon, chain: &Chain, truth: &[u8]) {
    daemon.kill();
    daemon.start();
    assert_same("the disk after the kill", &connect(&daemon).content(), truth);
    daemon.stop();
    assert_same("the image on its own", &chain.content(), truth);
    check_leaks_allowed(&chain.top, chain.format);
}

#[test]
fn acknowledged_writes_into_new_clusters_are_there_after_a_kill() {
    for options in
        [&[][..], &["-o", "cluster_size=4096,refcount_bits=1"], &["-o", "cluster_size=2M"], &["-o", "compat=0.10"]]
    {
        let folder = folder();
        let mut random = Random::new(7);
        let write = |index: u64| Request::Write { at: index * 131_072 % DISK_LEN, bytes: random.bytes(65_536) };
        let requests: Vec<Request> = (0..DISK_LEN / 131_072).map(write).collect();
        survives(&empty(folder.path(), options), folder.path(), &requests, 16);
    }
}

#[test]
fn acknowledged_writes_into_a_data_file_are_there_after_a_kill() {
    for raw in [false, true] {
        let folder = folder();
        let (option, data) = images::data_file(&folder.path().join("disk.qcow2"), raw);
        let chain = empty(folder.path(), &["-o", &option]);
        let mut random = Random::new(10);
        let mut at = || random.below(DISK_LEN / 512 - 512) * 512;
        let places: Vec<u64> = (0..300).map(|_| at()).collect();
        let request = |(index, at)| match index % 4 {
            0 => Request::Zero { at, len: 100 * 512, keep: index % 8 == 0 },
            _ => Request::Write { at, bytes: random.bytes(9 * 512) },
        };
        let requests: Vec<Request> = (0..).zip(places).map(request).collect();
        survives(&chain, folder.path(), &requests, 1);
        if raw {
            assert_same("the data file alone", &content(&data, "raw"), &chain.content());
        }
    }
}

#[test]
fn acknowledged_writes_into_parts_of_clusters_with_backing_are_there_after_a_kill() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 3);
    let mut random = Random::new(4);
    let mut write = |_| Request::Write { at: random.below(DISK_LEN / 512 - 8) * 512, bytes: random.bytes(3 * 512) };
    let requests: Vec<Request> = (0..400).map(&mut write).collect();
    // One at a time: requests in flight together may overlap, and then their order is nobody's promise.
    survives(&chain, folder.path(), &requests, 1);
}

#[test]
fn acknowledged_zeroes_are_there_after_a_kill() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 5);
    let mut random = Random::new(6);
    let requests: Vec<Request> = (0..200)
        .map(|index| {
            let at = random.below(DISK_LEN / 512 - 512) * 512;
            match index % 3 {
                0 => Request::Write { at, bytes: random.bytes(9 * 512) },
                _ => Request::Zero { at, len: random.within(1..512) as u32 * 512, keep: random.one_in(2) },
            }
        })
        .collect();
    survives(&chain, folder.path(), &requests, 1);
}

#[test]
fn a_discard_reads_the_same_before_and_after_a_kill() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 8);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut client = connect(&daemon);
    let mut random = Random::new(9);
    for index in 0..100 {
        let at = random.below(DISK_LEN / 512 - 2048) * 512;
        client.ask(&match index % 2 {
            0 => Request::Trim { at, len: random.within(1..2048) as u32 * 512 },
            _ => Request::Write { at, bytes: random.bytes(64 << 10) },
        });
    }
    let truth = client.content();
    kill_and_compare(daemon, &chain, &truth);
}

#[test]
fn a_guest_that_writes_all_the_time_loses_nothing_in_five_kills() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 10);
    let truth = chain.content();
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let habits = Habits { seed: 11, depth: 16, flush_one_in: 200, pause: Duration::ZERO, ..Habits::default() };
    let writer = Writer::start(&daemon.socket(), "vda", truth, habits);
    for _ in 0..5 {
        writer.wait(300);
        daemon.kill();
        daemon.start();
    }
    writer.wait(100);
    let truth = writer.stop();
    assert_same("the disk", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the image on its own", &chain.content(), &truth);
    check_leaks_allowed(&chain.top, chain.format);
}

#[test]
fn a_raw_disk_in_the_page_cache_loses_nothing_either() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    images::create(&disk, "raw", DISK_LEN, &[]);
    let export = format!("vda={},format=raw", disk.display());
    let mut daemon = Daemon::serve_with(folder.path(), &[export], &["--cache", "writeback"]);
    let habits = Habits { seed: 12, pause: Duration::ZERO, ..Habits::default() };
    let writer = Writer::start(&daemon.socket(), "vda", vec![0; DISK_LEN as usize], habits);
    for _ in 0..2 {
        writer.wait(300);
        daemon.kill();
        daemon.start();
    }
    let truth = writer.stop();
    daemon.stop();
    assert_same("the disk", &content(&disk, "raw"), &truth);
}

/// A job that the kill meets in its middle goes on by itself after the restart.
#[track_caller]
fn a_killed_job_goes_on(options: &[&str], target_format: &str) {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 13);
    let target = folder.path().join("target");
    let truth = chain.content();
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let writer = Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 14, ..Habits::default() });
    writer.wait(50);
    let (name, speed) = (target.display().to_string(), (2 << 20).to_string());
    daemon.ok("mirror", &[&["vda", &name, "--speed", &speed], options].concat());
    for _ in 0..3 {
        writer.wait(100);
        daemon.kill();
        daemon.start();
        let status = daemon.status("vda");
        assert_eq!(status["target"], name, "the job is still there: {status}");
        assert_eq!(status["serving"], chain.top.display().to_string(), "the source is the truth: {status}");
    }
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    writer.wait(50);
    daemon.pivot("vda");
    assert_eq!(daemon.status("vda")["serving"], name);
    writer.wait(50);
    let truth = writer.stop();
    assert_same("the disk", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the target on its own", &content(&target, target_format), &truth);
    check_leaks_allowed(&target, target_format);
    check_leaks_allowed(&chain.top, chain.format);
}

#[test]
fn a_full_copy_to_qcow2_goes_on_after_kills() {
    a_killed_job_goes_on(&[], "qcow2");
}

#[test]
fn a_full_copy_to_raw_goes_on_after_kills() {
    a_killed_job_goes_on(&["--raw"], "raw");
}

#[test]
fn a_shallow_copy_goes_on_after_kills() {
    a_killed_job_goes_on(&["--shallow"], "qcow2");
}

#[test]
fn a_job_that_was_ready_is_ready_again_after_a_kill() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 15);
    let target = folder.path().join("target");
    let truth = chain.content();
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let writer = Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 16, ..Habits::default() });
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--wait"]);
    writer.wait(100);
    daemon.kill();
    daemon.start();
    daemon.wait_for("vda", "ready");
    writer.wait(100);
    daemon.pivot("vda");
    let truth = writer.stop();
    daemon.stop();
    assert_same("the target on its own", &content(&target, "qcow2"), &truth);
}

/// The bytes of every file of a chain.
fn frozen(chain: &Chain) -> Vec<Vec<u8>> {
    chain.layers.iter().map(|(file, _)| std::fs::read(file).expect("a file of ours")).collect()
}

#[test]
fn a_kill_right_behind_a_pivot_leaves_the_target_served_and_only_it() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 17);
    let target: PathBuf = folder.path().join("target");
    let name = target.display().to_string();
    let truth = chain.content();
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let habits = Habits { seed: 18, pause: Duration::ZERO, ..Habits::default() };
    let writer = Writer::start(&daemon.socket(), "vda", truth, habits);
    daemon.ok("mirror", &["vda", &name, "--wait", "--pivot"]);
    daemon.kill();
    let source = frozen(&chain);
    daemon.start();
    let status = daemon.status("vda");
    assert_eq!(status["serving"], name, "{status}");
    assert!(daemon.log().contains(&name), "the daemon says which side it serves:\n{}", daemon.log());
    writer.wait(200);
    // And not only once: the record holds for every start.
    daemon.kill();
    daemon.start();
    writer.wait(200);
    let truth = writer.stop();
    assert_same("the disk", &connect(&daemon).content(), &truth);
    daemon.stop();
    assert_same("the target on its own", &content(&target, "qcow2"), &truth);
    check_leaks_allowed(&target, "qcow2");
    assert!(frozen(&chain) == source, "the source is not touched after the record");
}

#[test]
fn a_kill_at_any_moment_of_a_pivot_leaves_one_side_served_with_everything_in_it() {
    let folder = folder();
    for round in 0..6 {
        let folder = folder.path().join(round.to_string());
        std::fs::create_dir(&folder).expect("a folder of ours");
        let chain = three_layers(&folder, DISK_LEN / 4, 20 + round);
        let target = folder.join("target");
        let name = target.display().to_string();
        let truth = chain.content();
        let mut daemon = Daemon::serve(&folder, &[chain.export("vda")]);
        let habits = Habits { seed: 30 + round, pause: Duration::ZERO, ..Habits::default() };
        let writer = Writer::start(&daemon.socket(), "vda", truth, habits);
        daemon.ok("mirror", &["vda", &name, "--wait"]);
        // The pivot is asked for and the kill comes a little later each round, so that it meets different steps of
        // it. What must hold does not depend on which.
        let mut pivot = daemon.command("pivot", &["vda"]).spawn().expect("the program");
        std::thread::sleep(Duration::from_millis(2 << round));
        daemon.kill();
        let pivoted = pivot.wait().expect("reaping our child").success();
        daemon.start();
        let status = daemon.status("vda");
        let serving = status["serving"].as_str().unwrap_or_default();
        assert!(!pivoted || serving == name, "round {round}: the pivot was done, and is undone: {status}");
        assert!([&name, &chain.top.display().to_string()].contains(&&serving.to_owned()), "{status}");
        let (file, format) = if serving == name { (&target, "qcow2") } else { (&chain.top, chain.format) };
        writer.wait(50);
        let truth = writer.stop();
        assert_same("the disk", &connect(&daemon).content(), &truth);
        daemon.stop();
        assert_same(&format!("round {round}: {serving} on its own"), &content(file, format), &truth);
    }
}

#[test]
fn the_state_of_a_disk_that_was_stopped_cleanly_starts_again() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 19);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    connect(&daemon).ask(&Request::Write { at: 12_800, bytes: vec![7; 1024] });
    daemon.stop();
    let before = content(&chain.top, chain.format);
    daemon.start();
    assert_same("the disk", &connect(&daemon).content(), &before);
    daemon.stop();
    let copy = folder.path().join("copy.raw");
    std::fs::write(&copy, &before).expect("a file of ours");
    compare((&chain.top, chain.format), (&copy, "raw"));
}
