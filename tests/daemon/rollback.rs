//! A pivot that keeps its source, and the way back: under load, through kills and restarts, again and again.

use crate::support::daemon::Daemon;
use crate::support::images::{probed, thin_disk};
use crate::support::qmp::Qmp;
use crate::support::remote::DISK_LEN;
use crate::support::scene::Scene;
use crate::support::server::held;
use crate::support::tools::{check, check_leaks_allowed, content, output};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Pivots with these options, again where the last pass took longer than a guest's pause may.
#[track_caller]
fn pivot(scene: &Scene, options: &[&str]) {
    eventually(&format!("it pivots, {options:?}"), || {
        let mut command = scene.daemon.command("pivot", &[&["vda"], options].concat());
        let output = output(&mut command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let again = said.contains("the pause allows") || said.contains("still to copy");
        assert!(output.status.success() || again, "{options:?}: {said}\n{}", scene.daemon.log());
        output.status.success().then_some(())
    });
}

/// A disk that has pivoted to its target, under load, and keeps its source.
fn kept(seed: u64, options: &[&str]) -> Scene {
    let scene = Scene::new(seed);
    scene.writes(50);
    scene.mirror(&[options, &["--wait"]].concat());
    pivot(&scene, &["--keep-source"]);
    goes_back_to(&scene, &scene.target(), &scene.source());
    scene.writes(100);
    scene
}

/// It is on `serving`, and can go back to `kept`.
#[track_caller]
fn goes_back_to(scene: &Scene, serving: &str, kept: &str) -> Value {
    let status = scene.status();
    assert_eq!((&status["serving"], &status["target"]), (&json!(serving), &json!(kept)), "{status}");
    assert_eq!((&status["rollback"], &status["source"]), (&json!(true), &json!(serving)), "{status}");
    status
}

#[test]
fn a_pivot_that_kept_its_source_goes_back() {
    for (seed, options) in [(60, &["--raw"][..]), (61, &["--shallow"]), (62, &[])] {
        let mut scene = kept(seed, options);
        let status = scene.status();
        assert_eq!((&status["phase"], &status["job"]), (&json!("ready"), &json!("vda-back")), "{status}");
        let said = scene.daemon.ok("status", &["vda"]);
        assert!(said.contains("rollback  possible, behind by "), "{said}");
        let said = scene.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("`pivot --back` returns to it, and `commit` ends that"), "{said}");
        let another = scene.folder.path().join("another").display().to_string();
        let said = scene.daemon.refused("mirror", &["vda", &another]);
        assert!(said.contains("commit first, or go back"), "{said}");
        scene.daemon.ok("verify", &["vda", "--wait"]);
        assert_eq!(scene.status()["mismatches"], 0);
        pivot(&scene, &["--back"]);
        let status = scene.status();
        assert_eq!((&status["phase"], &status["rollback"]), (&json!("pivoted"), &json!(false)), "{status}");
        let said = scene.daemon.refused("pivot", &["vda", "--back"]);
        assert!(said.contains("has no copy job"), "{said}");
        scene.ends_on_the_source();
    }
}

#[test]
fn a_kill_loses_neither_the_truth_nor_the_way_back() {
    for (seed, options) in [(63, &["--raw"][..]), (64, &["--shallow"])] {
        let mut scene = kept(seed, options);
        for _ in 0..2 {
            scene.daemon.kill();
            scene.daemon.start();
            scene.writes(50);
            scene.daemon.wait_for("vda", "ready");
            let status = goes_back_to(&scene, &scene.target(), &scene.source());
            let notes = status["notes"].to_string();
            assert!(notes.contains("resumed after a kill"), "{notes}");
        }
        pivot(&scene, &["--back"]);
        // The record names the first source again.
        scene.daemon.kill();
        scene.daemon.start();
        assert_eq!(scene.status()["phase"], "none");
        let source = scene.source();
        ends(scene, &source);
    }
}

/// The guest stops on the image at `serving`, which alone has the truth. A kill may have cost clusters, and nothing else.
#[track_caller]
fn ends(mut scene: Scene, serving: &str) {
    assert_eq!(scene.status()["serving"], serving);
    scene.writes(50);
    let truth = scene.writer.take().expect("a guest").stop();
    scene.holds(&truth);
    scene.daemon.stop();
    let format = probed(Path::new(serving));
    assert_same("it on its own", &content(Path::new(serving), &format), &truth);
    check_leaks_allowed(Path::new(serving), &format);
}

#[test]
fn a_kill_at_any_moment_of_the_pivot_leaves_one_truth() {
    for (seed, moment) in [(70, 0), (71, 4), (72, 8), (73, 12), (74, 20), (75, 30)] {
        let mut scene = Scene::new(seed);
        scene.writes(50);
        scene.mirror(&["--wait"]);
        let mut command = scene.daemon.command("pivot", &["vda", "--keep-source"]);
        let mut asked = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program");
        std::thread::sleep(Duration::from_millis(moment));
        scene.daemon.kill();
        asked.wait().expect("our child");
        scene.daemon.start();
        scene.writes(50);
        scene.daemon.wait_for("vda", "ready");
        let status = scene.status();
        let (source, target) = (scene.source(), scene.target());
        if status["rollback"] == true {
            goes_back_to(&scene, &target, &source);
            pivot(&scene, &["--back"]);
            ends(scene, &source);
        } else {
            // It did not happen: the job goes on, and nothing is left of the way back.
            assert_eq!(status["serving"], source, "{status}");
            pivot(&scene, &[]);
            assert_eq!(scene.status()["phase"], "pivoted");
            let left = fs::read_dir(scene.folder.path().join("state")).expect("the state folder");
            let left: Vec<_> = left.map(|entry| entry.expect("an entry").file_name()).collect();
            let is_of_it = |name: &str| name.contains("rollback") && !name.ends_with(".new");
            assert!(!left.iter().any(|name| is_of_it(&name.to_string_lossy())), "{left:?}");
            ends(scene, &target);
        }
    }
}

#[test]
fn a_restart_in_order_goes_on_with_the_way_back() {
    let mut scene = kept(65, &[]);
    let truth = scene.writer.take().expect("a guest").stop();
    scene.daemon.stop();
    check(&scene.target, "qcow2");
    check(&scene.chain.top, scene.chain.format);
    scene.daemon.start();
    scene.daemon.wait_for("vda", "ready");
    let notes = goes_back_to(&scene, &scene.target(), &scene.source())["notes"].to_string();
    assert!(notes.contains("resumed where it was left in order"), "{notes}");
    pivot(&scene, &["--back"]);
    assert_eq!(scene.status()["serving"], scene.source());
    scene.holds(&truth);
    scene.daemon.stop();
    assert_same("the source on its own", &scene.chain.content(), &truth);
}

#[test]
fn a_commit_leaves_the_old_source_as_a_copy_of_that_instant() {
    let mut scene = kept(66, &[]);
    let mut qmp = Qmp::connect(&scene.daemon.control_socket());
    let truth = scene.writer.take().expect("a guest").stop();
    scene.daemon.ok("commit", &["vda"]);
    qmp.event("BLOCK_JOB_COMPLETED");
    let status = scene.status();
    assert_eq!((&status["phase"], &status["rollback"]), (&json!("pivoted"), &json!(false)), "{status}");
    assert_same("the old source", &scene.chain.content(), &truth);
    for verb in [&["commit", "vda"][..], &["pivot", "vda", "--back"]] {
        assert!(scene.daemon.refused(verb[0], &verb[1..]).contains("has no copy job"));
    }
    // Nobody goes back any more, also after a restart.
    scene.daemon.kill();
    scene.daemon.start();
    let status = scene.status();
    assert_eq!((&status["phase"], &status["serving"]), (&json!("none"), &json!(scene.target())), "{status}");
    scene.holds(&truth);
}

#[test]
fn one_can_go_there_and_back_again() {
    let mut scene = kept(67, &[]);
    pivot(&scene, &["--back", "--keep-source"]);
    goes_back_to(&scene, &scene.source(), &scene.target());
    assert_eq!(scene.status()["job"], "vda");
    scene.writes(50);
    scene.daemon.kill();
    scene.daemon.start();
    scene.writes(50);
    scene.daemon.wait_for("vda", "ready");
    pivot(&scene, &["--back"]);
    let target = scene.target();
    ends(scene, &target);
}

/// Its status was that of any job that failed: nobody was told that there is no way back any more.
#[test]
fn a_way_back_whose_old_disk_is_away_after_a_kill_is_called_lost() {
    let mut scene = kept(67, &["--raw"]);
    scene.daemon.kill();
    let aside = scene.folder.path().join("aside");
    fs::rename(&scene.chain.top, &aside).expect("a file of ours");
    scene.daemon.start();
    let status = scene.status();
    assert_eq!((&status["phase"], &status["rollback"]), (&json!("failed"), &json!(true)), "{status}");
    let said = scene.daemon.ok("status", &["vda"]);
    assert!(said.contains("rollback  lost"), "{said}");
    fs::rename(&aside, &scene.chain.top).expect("a file of ours");
    let target = scene.target();
    ends(scene, &target);
}

/// The job in the other direction had a name that nobody had looked for among the others.
#[test]
fn a_pivot_whose_way_back_would_have_another_jobs_name_is_refused() {
    let folder = folder();
    let disks = ["vda", "vdb"].map(|name| {
        let disk = folder.path().join(name);
        fs::write(&disk, thin_disk(1 << 20)).expect("a file of ours");
        format!("{name}={},format=raw", disk.display())
    });
    let mut daemon = Daemon::serve(folder.path(), &disks);
    for (export, id) in [("vda", "move"), ("vdb", "move-back")] {
        let target = folder.path().join(format!("{export}.new")).display().to_string();
        daemon.ok("mirror", &[export, &target, "--raw", "--job-id", id, "--wait"]);
    }
    let said = daemon.refused("pivot", &["vda", "--keep-source"]);
    assert!(said.contains("'move-back' already in use: name another"), "{said}");
    assert_eq!(daemon.status("vda")["phase"], "ready");
    daemon.ok("cancel", &["vdb", "--force"]);
    daemon.ok("pivot", &["vda", "--keep-source"]);
    assert_eq!(daemon.status("vda")["job"], "move-back");
    daemon.ok("commit", &["vda"]);
    daemon.stop();
}

#[test]
fn a_job_that_has_not_pivoted_has_no_way_back() {
    let scene = Scene::new(68);
    scene.mirror(&["--wait"]);
    let said = scene.daemon.refused("pivot", &["vda", "--back"]);
    assert!(said.contains("only a pivot with --keep-source keeps one"), "{said}");
    assert!(scene.daemon.refused("commit", &["vda"]).contains("keeps no old disk"));
    let said = scene.daemon.refused("pivot", &["vda", "vdb", "--keep-source"]);
    assert!(said.contains("are of one export"), "{said}");
}

#[test]
fn an_old_disk_without_space_is_not_the_guests_problem() {
    let folder = folder();
    let (made, mount) = (folder.path().join("made.raw"), folder.path().join("small"));
    fs::write(&made, thin_disk(DISK_LEN)).expect("a file of ours");
    fs::create_dir(&mount).expect("a folder of ours");
    let source = mount.join("disk.raw");
    // Gone with the daemon, which is the only process that sees it.
    let mounted = format!(
        "mount -t tmpfs -o size=64m none {} && cp --sparse=always {} {} && exec \"$@\"",
        mount.display(),
        made.display(),
        source.display()
    );
    let through = ["unshare", "-rm", "sh", "-c", &mounted, "sh"];
    let export = format!("vda={},format=raw", source.display());
    let mut daemon = Daemon::serve_through(&through, folder.path(), &[export], &[]);
    let habits = Habits { seed: 76, ..Habits::default() };
    let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), habits);
    let target = folder.path().join("target").display().to_string();
    daemon.ok("mirror", &["vda", &target, "--wait"]);
    let pivot = |option| output(&mut daemon.command("pivot", &["vda", option])).status.success().then_some(());
    eventually("it pivots", || pivot("--keep-source"));
    let mount = mount.strip_prefix("/").expect("a full path");
    let filled = Path::new("/proc").join(daemon.pid().to_string()).join("root").join(mount).join("filler");
    let mut filler = File::create(&filled).expect("an empty file");
    while filler.write_all(&[1; 64 << 10]).is_ok() {}
    let failing = eventually("the way back backs off", || {
        Some(daemon.status("vda")).filter(|status| status["io_status"] == "nospace")
    });
    assert_eq!((&failing["rollback"], &failing["paused"]), (&json!(true), &json!(false)), "{failing}");
    guest.wait(200);
    assert!(daemon.refused("pivot", &["vda", "--back"]).contains("still to copy"));
    fs::remove_file(&filled).expect("a file of ours");
    drop(filler);
    daemon.wait_for("vda", "ready");
    eventually("it goes back", || pivot("--back"));
    assert_eq!(daemon.status("vda")["serving"], source.display().to_string());
    guest.wait(50);
    let truth = guest.stop();
    assert_same("the old disk", &held(&daemon.uri("vda"), folder.path()), &truth);
    daemon.stop();
}

#[test]
fn the_way_back_is_told_as_a_job_of_its_own() {
    let scene = Scene::new(77);
    scene.mirror(&["--wait"]);
    let mut qmp = Qmp::connect(&scene.daemon.control_socket());
    pivot(&scene, &["--keep-source"]);
    qmp.event("BLOCK_JOB_COMPLETED");
    ["concluded", "null"].iter().for_each(|status| qmp.status("vda", status));
    ["created", "running", "ready"].iter().for_each(|status| qmp.status("vda-back", status));
    let jobs = qmp.ok("query-block-jobs", json!({}));
    let [job] = &jobs.as_array().expect("a list")[..] else { panic!("{jobs}") };
    assert_eq!((&job["device"], &job["ready"]), (&json!("vda-back"), &json!(true)), "{jobs}");
    let error = qmp.refused("block-job-complete", json!({ "device": "vda-back" }));
    assert_eq!(error["code"], "OPERATION_INVALID", "{error}");
    qmp.ok("blkmirror-commit", json!({ "export": "vda" }));
    qmp.status("vda-back", "null");
}
