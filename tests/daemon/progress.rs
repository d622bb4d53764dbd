//! What people and programs are told of a job under way: numbers that are true, a map of the disk, events.

use crate::support::daemon::Daemon;
use crate::support::images::{holding, thin_disk};
use crate::support::writer::{Habits, Writer};
use crate::support::{eventually, folder};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;

const DISK_LEN: usize = 8 << 20;
const CHUNK: u64 = 64 << 10;
/// How many chunks hold something: zeroes are one MiB of four.
const DATA: u64 = 6 << 20;
/// Slow enough that the job is still under way when the test looks.
const SLOW: &str = "256K";

struct Scene {
    daemon: Daemon,
    target: PathBuf,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = folder();
        let (source, target) = (folder.path().join("source"), folder.path().join("target"));
        holding(&source, "qcow2", &thin_disk(DISK_LEN), &[]);
        let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", source.display())]);
        Self { daemon, target, _folder: folder }
    }

    fn mirror(&self, options: &[&str]) {
        self.daemon.ok("mirror", &[&["vda", &self.target.display().to_string()], options].concat());
    }

    fn status(&self) -> Value {
        self.daemon.status("vda")
    }

    /// What the daemon answers to `blkmirror-map`.
    fn map(&self, cells: u64) -> Value {
        let mut said = UnixStream::connect(self.daemon.control_socket()).expect("the control socket");
        let mut heard = BufReader::new(said.try_clone().expect("one more descriptor")).lines();
        let mut line = || serde_json::from_str::<Value>(&heard.next().expect("a line").expect("text")).expect("JSON");
        assert!(line()["QMP"].is_object());
        let map = json!({ "execute": "blkmirror-map", "arguments": { "export": "vda", "cells": cells } });
        writeln!(said, "{}\n{map}", json!({ "execute": "qmp_capabilities" })).expect("asking");
        assert_eq!(line(), json!({ "return": {} }));
        std::iter::repeat_with(line).find(|answer| answer.get("event").is_none()).expect("an answer")
    }
}

/// How many chunks a map's list has in all.
fn sum(map: &Value, list: &str) -> u64 {
    map["return"][list].as_array().expect("a list").iter().map(|count| count.as_u64().expect("a count")).sum()
}

#[test]
fn the_numbers_of_a_job_agree_with_each_other() {
    let scene = Scene::new();
    let none = scene.status();
    for field in ["redundancy", "eta_s", "eta_low_s", "eta_high_s", "lag_bytes", "lag_s", "guest_delay_us"] {
        assert!(none[field].is_null(), "{field}: {none}");
    }
    scene.mirror(&["--speed", SLOW]);
    let status = eventually("it is measured", || {
        let status = scene.status();
        assert!(status["copied_bytes"].as_u64() < status["total_bytes"].as_u64(), "{status}");
        assert_ne!(status["phase"], "ready", "it is slow: {status}");
        let sum = status["copied_bytes"].as_u64().zip(status["remaining_bytes"].as_u64()).map(|(a, b)| a + b);
        assert_eq!(status["total_bytes"].as_u64(), sum, "{status}");
        let is_measured = status["copy_rate_bytes_per_s"].as_u64() > Some(0) && status["eta_s"].is_u64();
        // What is under way is left still: nothing is forgotten, and but for the moment of its end nothing is counted
        // twice.
        (is_measured && sum == Some(DATA)).then_some(status)
    });
    assert_eq!(status["data_bytes"], DATA);
    assert!(status["redundancy"].as_f64() < Some(1.0), "{status}");
    assert!(status["eta_low_s"].as_u64() <= status["eta_s"].as_u64(), "{status}");
    assert!(status["eta_high_s"].is_null() || status["eta_high_s"].as_u64() >= status["eta_s"].as_u64(), "{status}");

    let map = scene.map(DISK_LEN as u64 / CHUNK);
    assert_eq!(map["return"]["chunk_bytes"], CHUNK);
    assert_eq!(map["return"]["chunks"], json!(vec![1; DISK_LEN / CHUNK as usize]));
    let [copied, dirty, copying] = ["copied", "dirty", "copying"].map(|list| sum(&map, list));
    assert!(copied > 0 && dirty > 0 && copied + dirty + copying == DATA / CHUNK, "{map}");
    // The second MiB is zeroes.
    for list in ["copied", "dirty", "copying"] {
        assert_eq!(map["return"][list].as_array().map(|list| &list[16..32]), Some(&vec![json!(0); 16][..]), "{list}");
    }

    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    let ready = scene.daemon.wait_for("vda", "ready");
    let expected = json!([0, 0, 0.0, 0, 0, 0, 1.0, DATA]);
    let fields = "remaining_bytes lag_bytes lag_s eta_s eta_low_s eta_high_s redundancy copied_bytes";
    assert_eq!(fields.split(' ').map(|field| ready[field].clone()).collect::<Value>(), expected, "{ready}");
    let map = scene.map(7);
    let lens = ["chunks", "copied", "dirty", "copying"].map(|list| map["return"][list].as_array().map(Vec::len));
    assert_eq!((lens, sum(&map, "copied"), sum(&map, "chunks")), ([Some(7); 4], DATA / CHUNK, 128));

    scene.daemon.pivot("vda");
    assert_eq!(scene.map(7)["error"]["code"], "INVALID_ARG", "there is no job any more");
}

#[test]
fn what_guests_do_and_how_far_the_target_is_behind_is_measured() {
    let scene = Scene::new();
    scene.mirror(&["--mode", "write-blocking", "--wait"]);
    let guest = Writer::start(&scene.daemon.socket(), "vda", thin_disk(DISK_LEN), Habits::default());
    eventually("guests are seen to write, and to wait for the target", || {
        let status = scene.status();
        (status["guest_rate_bytes_per_s"].as_u64() > Some(0) && status["guest_delay_us"].as_u64() > Some(0))
            .then_some(())
    });
    scene.daemon.ok("set", &["vda", "--mode", "background"]);
    scene.daemon.ok("pause", &["vda"]);
    eventually("the target falls behind", || {
        let status = scene.status();
        let behind = status["lag_bytes"].as_u64() > Some(0) && status["lag_s"].as_f64() > Some(0.5);
        (behind && status["dirty_rate_bytes_per_s"].is_u64()).then_some(())
    });
    scene.daemon.ok("resume", &["vda"]);
    guest.stop();
    let status = eventually("the target is as the source", || {
        let status = scene.status();
        (status["lag_bytes"] == 0 && status["lag_s"] == 0.0).then_some(status)
    });
    assert!(status["redundancy"].as_f64() > Some(1.0), "some of it was copied again: {status}");
}

#[test]
fn events_are_heard_until_the_daemon_ends() {
    let mut scene = Scene::new();
    let heard = scene.target.with_extension("events");
    let mut command = scene.daemon.command("events", &["--json"]);
    let log = File::create(&heard).expect("a file of ours");
    let mut events = command.stdin(Stdio::null()).stdout(log).spawn().expect("our program");
    let text = || std::fs::read_to_string(&heard).expect("a file of ours");
    // Nobody says when it listens: one job after the other, until it has heard of a whole one.
    eventually("a job is heard of", || {
        scene.mirror(&["--finish"]);
        std::fs::remove_file(&scene.target).expect("removing a file of ours");
        let text = text();
        let started = text.find(r#""status":"created""#);
        started.filter(|at| text[*at..].contains(r#""phase":"cancelled""#)).map(drop)
    });
    scene.daemon.stop();
    assert!(events.wait().expect("waiting for our child").success());
    let text = text();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    assert!(events.iter().all(|event| event["event"].is_string() && event["timestamp"]["seconds"].is_u64()), "{text}");
    for name in ["JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLKMIRROR_PHASE"] {
        assert!(events.iter().any(|event| event["event"] == name), "{name}: {text}");
    }
}
