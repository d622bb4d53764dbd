//! What a user bounds: how long guest requests take, until when a job is ready, how far its target is behind.

use crate::support::daemon::Daemon;
use crate::support::images::{holding, one_layer, thin_disk};
use crate::support::qmp::Qmp;
use crate::support::scene::Scene;
use crate::support::tools::{output, ran};
use crate::support::writer::Habits;
use crate::support::{eventually, folder};
use serde_json::{Value, json};
use std::fs;

const DISK_LEN: u64 = 32 << 20;

/// A raw disk whose guest writes a lot.
fn scene(seed: u64) -> Scene {
    let folder = folder();
    let chain = one_layer(folder.path(), "raw", DISK_LEN, seed);
    let mut scene = Scene::of(folder, chain, seed);
    let truth = scene.writer.take().expect("a guest").stop();
    let habits = Habits { seed, len_max: 64 << 10, ..Habits::default() };
    scene.writer = Some(crate::support::writer::Writer::start(&scene.daemon.socket(), "vda", truth, habits));
    scene
}

fn times(status: &Value) -> f64 {
    status["slowdown"].as_f64().expect("a number")
}

#[test]
fn a_deadline_that_cannot_be_kept_slows_guests_as_far_as_they_may_be_and_says_so() {
    let mut scene = scene(1);
    let none = scene.status();
    let fields = ["deadline_s", "slowdown", "max_slowdown", "warning", "latency_factor", "guest_p99_us"];
    assert!(fields.iter().all(|field| none[*field].is_null()), "{none}");
    scene.mirror(&["--mode", "background", "--speed", "256K", "--deadline", "20s", "--max-slowdown", "3"]);
    let status = eventually("the job says that it will be late", || {
        let status = scene.status();
        assert!(times(&status) <= 3.0, "{status}");
        (times(&status) == 3.0 && !status["warning"].is_null()).then_some(status)
    });
    let warning = status["warning"].as_str().expect("words");
    assert!(warning.starts_with("the deadline in ") && warning.contains("a second anew"), "{warning}");
    assert!((1..=20).contains(&status["deadline_s"].as_i64().expect("a number")), "{status}");
    assert!(scene.daemon.log().contains("will not be kept"), "{}", scene.daemon.log());
    let said = scene.daemon.ok("status", &["vda"]);
    assert!(said.contains("3.0 times as slow") && said.contains("warning"), "{said}");
    scene.writes(50);
    scene.daemon.ok("set", &["vda", "--deadline", "0"]);
    eventually("nobody is slowed any more", || {
        let status = scene.status();
        (times(&status) == 1.0 && status["warning"].is_null() && status["deadline_s"].is_null()).then_some(())
    });
    scene.daemon.ok("set", &["vda", "--speed", "0", "--mode", "auto"]);
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    scene.ends_on_the_target("raw");
}

#[test]
fn guests_are_slowed_where_the_target_would_be_too_far_behind() {
    let mut scene = scene(2);
    scene.mirror(&["--mode", "background", "--max-lag", "2M", "--wait"]);
    // From now on the copy is much slower than its guest.
    scene.daemon.ok("set", &["vda", "--speed", "512K"]);
    let status = eventually("guests are slowed", || {
        let status = scene.status();
        (times(&status) > 1.0).then_some(status)
    });
    assert_eq!((&status["max_lag_bytes"], &status["max_slowdown"]), (&json!(2 << 20), &json!(10)), "{status}");
    // A pivot does not wait for who is slowed: that one is outside.
    scene.daemon.ok("set", &["vda", "--speed", "0", "--mode", "auto", "--max-lag", "0"]);
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    scene.ends_on_the_target("raw");
}

#[test]
fn what_requests_take_is_measured_with_the_copy_and_without() {
    let scene = scene(3);
    scene.mirror(&["--speed", "1M"]);
    let status = eventually("it was measured", || {
        let status = scene.status();
        (status["guest_p99_us"].is_u64() && status["guest_p99_alone_us"].as_u64() > Some(0)).then_some(status)
    });
    assert_eq!(status["latency_factor"], 2, "{status}");
    assert!(scene.daemon.ok("status", &["vda"]).contains("without the copy"));
}

#[test]
fn bounds_hold_through_a_kill_and_what_nobody_can_keep_is_refused() {
    let folder = folder();
    let (source, target) = (folder.path().join("disk.raw"), folder.path().join("target"));
    fs::write(&source, thin_disk(8 << 20)).expect("a file of ours");
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", source.display())]);
    let name = target.display().to_string();
    daemon.ok("mirror", &["vda", &name, "--raw", "--speed", "256K", "--latency-factor", "7", "--deadline", "1h"]);
    daemon.ok("set", &["vda", "--max-lag", "3M", "--max-slowdown", "2"]);
    daemon.kill();
    daemon.start();
    let status = daemon.status("vda");
    let found = ["latency_factor", "max_lag_bytes", "max_slowdown"].map(|field| status[field].clone());
    assert_eq!(found, [json!(7), json!(3 << 20), json!(2)], "{status}");
    let left = status["deadline_s"].as_i64().expect("a number");
    assert!((3000..=3600).contains(&left), "{status}");

    let refused = |words: &[&str], why: &str| {
        let run = daemon.command("set", words).output().expect("our program");
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(!run.status.success() && said.contains(why), "{words:?}: {said}");
    };
    refused(&["vda", "--max-slowdown", "0"], "invalid value '0'");
    refused(&["vda", "--deadline", "soon"], "expected a time as 90s, 30m or 2h 15m");
    let mut qmp = Qmp::connect(&daemon.control_socket());
    for (name, value, why) in [("deadline", 1, "a deadline of 1"), ("max-slowdown", 0, "a max-slowdown of 0")] {
        let error = qmp.refused("blkmirror-set", json!({ "export": "vda", name: value }));
        assert!(error["code"] == "INVALID_ARG" && error["desc"].as_str().unwrap_or_default().contains(why), "{error}");
    }
    daemon.stop();
}

/// A write of 4 KiB is 4 KiB to copy, where a chunk has 64.
#[test]
fn a_small_write_is_copied_alone() {
    let folder = folder();
    let (source, target) = (folder.path().join("disk.qcow2"), folder.path().join("target"));
    holding(&source, "qcow2", &thin_disk(8 << 20), &[]);
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", source.display())]);
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--mode", "background", "--wait"]);
    let before = daemon.status("vda")["copied_bytes"].as_u64().expect("a number");
    let mut qemu_io = std::process::Command::new("qemu-io");
    qemu_io.args(["-f", "raw", "-c", "write -P 7 2568192 4096", "-c", "write -P 8 9000 512"]).arg(daemon.uri("vda"));
    let wrote = output(&mut qemu_io);
    assert!(wrote.status.success(), "{wrote:?}");
    let after = eventually("the target has it", || {
        let status = daemon.status("vda");
        (status["remaining_bytes"] == 0 && status["copied_bytes"].as_u64() > Some(before)).then_some(status)
    });
    let copied = after["copied_bytes"].as_u64().expect("a number") - before;
    assert_eq!(copied, 8192, "{after}");
    daemon.ok("cancel", &["vda"]);
    let mut compare = std::process::Command::new("qemu-img");
    ran(compare.args(["compare", "-U", "-f", "qcow2", "-F", "qcow2"]).args([&source, &target]));
}
