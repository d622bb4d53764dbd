//! `mirror --chain DIR`: every layer of a chain goes to another folder, each as it is, while the guest writes.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{self, Chain, three_layers};
use crate::support::nbd::{Client, Replies};
use crate::support::qmp::Qmp;
use crate::support::random::Random;
use crate::support::tools::{allocated, check, check_leaks_allowed, content, info, run};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DISK_LEN: u64 = 16 << 20;

/// A chain in a folder of its own, a new place for it, and a daemon that serves it.
struct Scene {
    daemon: Daemon,
    chain: Chain,
    new: PathBuf,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(make: impl Fn(&Path) -> Chain) -> Self {
        let folder = folder();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        std::fs::create_dir(&old).and_then(|()| std::fs::create_dir(&new)).expect("new folders");
        let chain = make(&old);
        let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        Self { daemon, chain, new, _folder: folder }
    }

    fn place(&self) -> String {
        self.new.display().to_string()
    }

    /// `mirror vda --chain DIR` with these options.
    fn args<'a>(&self, place: &'a str, options: &[&'a str]) -> Vec<&'a str> {
        [&["vda", "--chain", place], options].concat()
    }

    /// The copy of a layer.
    fn copied(&self, layer: &Path) -> PathBuf {
        self.new.join(layer.file_name().expect("a file's name"))
    }

    fn top(&self) -> PathBuf {
        self.copied(&self.chain.top)
    }

    fn found(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.new).expect("a folder of ours");
        let mut names: Vec<String> =
            names.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    /// Waits until a layer below is being copied; returns the status.
    #[track_caller]
    fn copies_below(&self) -> Value {
        eventually("the layers below are being copied", || {
            let status = self.daemon.status("vda");
            let is_part = |name: &String| name.ends_with(".part");
            (status["phase"] == "seeding" && self.found().iter().any(is_part)).then_some(status)
        })
    }

    fn content(&self) -> Vec<u8> {
        Client::connect(&self.daemon.socket(), "vda", Replies::Structured).expect("an NBD connection").content()
    }
}

fn habits(seed: u64) -> Habits {
    Habits { seed, pause: Duration::from_millis(1), ..Habits::default() }
}

/// The names of an image's backing and data files, as its header has them.
fn names(image: &Path) -> (Value, Value) {
    let info = info(image);
    (info["backing-filename"].clone(), info["format-specific"]["data"]["data-file"].clone())
}

/// The runs of an image alone, as qemu-img has them: where they end, and whether they are there, payload, compressed. Zeroes
/// of the payload may have become holes.
fn mapped(image: &Path) -> Vec<(u64, [bool; 3])> {
    let said = run("qemu-img", &["map", "--output=json", &image.display().to_string()]);
    let runs: Vec<Value> = serde_json::from_str(&said).expect("JSON");
    let mut mapped: Vec<(u64, [bool; 3])> = Vec::new();
    for run in runs {
        let end = run["start"].as_u64().zip(run["length"].as_u64()).map(|(start, len)| start + len).expect("numbers");
        let kind = ["present", "data", "compressed"].map(|member| run[member] == true);
        match mapped.last_mut() {
            Some(last) if last.1 == kind => last.0 = end,
            _ => mapped.push((end, kind)),
        }
    }
    mapped
}

#[test]
fn a_chain_moves_as_a_whole_while_its_guest_writes() {
    let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 1));
    let lower: Vec<PathBuf> = scene.chain.layers[..2].iter().map(|(layer, _)| layer.clone()).collect();
    let before: Vec<Vec<u8>> = lower.iter().map(|layer| content(layer, "qcow2")).collect();
    let writer = Writer::start(&scene.daemon.socket(), "vda", scene.chain.content(), habits(2));
    writer.wait(50);
    let place = scene.place();
    let said = scene.daemon.ok("mirror", &scene.args(&place, &["--pivot"]));
    assert!(said.contains("pivoted, serving") && said.contains("new/snap2.qcow2"), "{said}");
    let status = scene.daemon.status("vda");
    let data: u64 = lower.iter().map(|layer| allocated(layer)).sum();
    assert!(status["copied_bytes"].as_u64() > Some(data / 2), "the layers below count: {data}: {status}");
    writer.wait(100);
    let truth = writer.stop();
    scene.daemon.kill();
    scene.daemon.start();
    assert_same("the disk after a kill", &scene.content(), &truth);
    scene.daemon.stop();
    assert_eq!(scene.found(), ["base.qcow2", "snap1.qcow2", "snap2.qcow2"]);
    for (layer, before) in lower.iter().zip(&before) {
        let copied = scene.copied(layer);
        assert_same("a layer below", &content(&copied, "qcow2"), before);
        assert_eq!(mapped(&copied), mapped(layer), "not flattened");
        assert!(allocated(&copied) <= allocated(layer) + 65536);
        check(&copied, "qcow2");
    }
    // Relative names alone: the folder can be moved, and the old one is not needed.
    let moved = scene.new.with_file_name("moved");
    std::fs::rename(&scene.new, &moved).expect("a folder of ours");
    std::fs::remove_dir_all(scene.chain.top.parent().expect("a folder")).expect("a folder of ours");
    let top = moved.join("snap2.qcow2");
    assert_eq!(names(&top).0, "snap1.qcow2");
    assert_same("the chain on its own", &content(&top, "qcow2"), &truth);
    check_leaks_allowed(&top, "qcow2");
}

/// Layers of all kinds: raw, compressed, with snapshots, with data files, with long names for what is below.
#[test]
fn layers_are_copied_as_they_are() {
    let mut scene = Scene::new(|folder| {
        let deep = folder.join("a-folder-with-a-long-name-that-the-copy-does-not-need");
        std::fs::create_dir(&deep).expect("a new folder");
        let path = |name: &str| folder.join(name);
        let text = |name: &str| path(name).display().to_string();
        let fill = |name: &str, cluster, seed| {
            images::fill(&path(name), "qcow2", DISK_LEN, cluster, &mut Random::new(seed));
        };
        let base = deep.join("base.raw");
        images::create(&base, "raw", DISK_LEN / 2, &[]);
        images::fill(&base, "raw", DISK_LEN / 2, 512, &mut Random::new(3));
        let below = base.display().to_string();
        images::overlay(&path("one.qcow2"), &below, "raw", Some(DISK_LEN), &["-o", "cluster_size=1024"]);
        fill("one.qcow2", 1024, 4);
        let data = format!("data_file={}", text("two.data"));
        images::overlay(&path("two.qcow2"), "one.qcow2", "qcow2", None, &["-o", &data]);
        images::fill_plain(&path("two.qcow2"), "qcow2", DISK_LEN, &mut Random::new(5));
        images::overlay(&path("three.qcow2"), "two.qcow2", "qcow2", None, &[]);
        fill("three.qcow2", 65536, 6);
        run("qemu-img", &["snapshot", "-c", "kept", &text("three.qcow2")]);
        images::overlay(&path("top.qcow2"), "three.qcow2", "qcow2", None, &[]);
        fill("top.qcow2", 65536, 7);
        // What the names are does not matter: these are read, and others are written.
        let name = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": text("two.qcow2") } });
        let name = format!("json:{name}");
        run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", &name, &text("three.qcow2")]);
        // From here on QEMU would look for it in the folder that it runs in.
        let image = format!("driver=qcow2,file.filename={},data-file.filename={}", text("two.qcow2"), text("two.data"));
        run("qemu-img", &["amend", "-o", "data_file=two.data", "--image-opts", &image]);
        let layers = ["one.qcow2", "two.qcow2", "three.qcow2", "top.qcow2"].map(|name| (path(name), "qcow2"));
        let layers = std::iter::once((base, "raw")).chain(layers).collect();
        Chain { top: path("top.qcow2"), format: "qcow2", layers, told: String::new() }
    });
    let place = scene.place();
    scene.daemon.ok("mirror", &scene.args(&place, &["--pivot"]));
    let truth = scene.content();
    scene.daemon.stop();
    let files = ["base.raw", "one.qcow2", "three.qcow2", "top.qcow2", "two.data", "two.qcow2"];
    assert_eq!(scene.found(), files);
    assert_eq!(names(&scene.new.join("one.qcow2")).0, "base.raw");
    assert_eq!(names(&scene.new.join("two.qcow2")), (Value::from("one.qcow2"), Value::from("two.data")));
    assert_eq!(info(&scene.new.join("three.qcow2"))["snapshots"][0]["name"], "kept");
    let old = scene.chain.top.parent().expect("a folder").to_owned();
    std::fs::remove_dir_all(&old).expect("a folder of ours");
    let mut served = Daemon::serve(&scene.new, &[format!("vda={}", scene.top().display())]);
    let found = Client::connect(&served.socket(), "vda", Replies::Structured).expect("a connection").content();
    assert_same("the copied chain", &found, &truth);
    served.stop();
}

#[test]
fn what_is_cancelled_or_fails_leaves_nothing_behind() {
    let scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 7));
    let place = scene.place();
    let begin = |options: &[&str]| {
        let mut command = scene.daemon.command("mirror", &scene.args(&place, &[options, &["--wait"]].concat()));
        command.stderr(std::process::Stdio::null()).spawn().expect("the program")
    };
    let mut waiting = begin(&["--speed", "1K"]);
    let status = scene.copies_below();
    assert_eq!(status["target"].as_str(), scene.top().to_str(), "{status}");
    assert!(status["remaining_bytes"].as_u64() > Some(0), "{status}");
    for (verb, args, code) in [
        ("pivot", vec!["vda"], "BLOCK_COPY_ACTIVE"),
        ("resize", vec!["vda", "32M"], "BLOCK_COPY_ACTIVE"),
        ("mirror", vec!["vda", "/nowhere"], "BLOCK_COPY_ACTIVE"),
        ("snapshot", vec!["vda", "/nowhere"], "BLOCK_COPY_ACTIVE"),
    ] {
        let said = scene.daemon.refused(verb, &args);
        assert!(said.contains(code), "{verb}: {said}");
    }
    scene.daemon.ok("pause", &["vda"]);
    assert_eq!(scene.daemon.status("vda")["paused"], true);
    scene.daemon.ok("cancel", &["vda"]);
    assert!(!waiting.wait().expect("our child").success(), "it never was ready");
    assert_eq!(scene.found(), Vec::<String>::new());
    assert_eq!(scene.daemon.status("vda")["phase"], "cancelled");

    // Somebody takes a name meanwhile.
    let mut waiting = begin(&["--speed", "1K"]);
    scene.copies_below();
    std::fs::write(scene.new.join("base.qcow2"), "mine").expect("room");
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    assert!(!waiting.wait().expect("our child").success());
    assert_eq!(scene.found(), ["base.qcow2"], "what is not ours stays");
    let status = scene.daemon.status("vda");
    assert_eq!((&status["phase"], &status["job"]), (&json!("failed"), &json!("vda")));
    assert!(status["error"].as_str().is_some_and(|error| error.contains("base.qcow2")), "{status}");
    let said = scene.daemon.refused("mirror", &scene.args(&place, &[]));
    assert!(said.contains("base.qcow2") && said.contains("there already"), "{said}");
}

/// A file of somebody's was overwritten where it had the name of a copy that is not whole.
#[test]
fn what_has_the_name_of_a_part_is_somebodys() {
    let scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 12));
    let (mine, place) = (scene.new.join("snap1.qcow2.part"), scene.place());
    std::fs::write(&mine, "mine").expect("room");
    let said = scene.daemon.refused("mirror", &scene.args(&place, &[]));
    assert!(said.contains("snap1.qcow2.part") && said.contains("there already"), "{said}");
    assert_eq!(std::fs::read(&mine).expect("a file"), b"mine");
    assert_eq!(scene.found(), ["snap1.qcow2.part"]);
}

/// From its first byte on it is a job like any other, told of by events and with numbers that are true.
#[test]
fn the_layers_below_are_a_part_of_the_job() {
    let scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 13));
    let place = scene.place();
    let mut qmp = Qmp::connect(&scene.daemon.control_socket());
    let arguments = json!({ "export": "vda", "target": place, "chain": true, "speed": 1024, "job-id": "move" });
    assert_eq!(qmp.ok("blkmirror-mirror", arguments)["job"], "move");
    for status in ["created", "running"] {
        assert_eq!(qmp.event("JOB_STATUS_CHANGE")["data"], json!({ "id": "move", "status": status }));
    }
    assert_eq!(qmp.event("BLKMIRROR_PHASE")["data"]["phase"], "seeding");
    let before = scene.copies_below();
    assert_eq!((&before["job"], &before["speed_bytes_per_s"]), (&json!("move"), &json!(1024)), "{before}");
    let number = |status: &Value, name: &str| status[name].as_u64().unwrap_or_else(|| panic!("{name}: {status}"));
    let lower: u64 = scene.chain.layers.iter().map(|(layer, _)| allocated(layer)).sum();
    assert!(number(&before, "total_bytes") > lower / 2, "what is to come counts: {lower}: {before}");
    assert!(number(&before, "copied_bytes") < number(&before, "total_bytes"), "{before}");
    for (command, arguments) in [
        ("blkmirror-export-remove", json!({ "export": "vda", "force": true })),
        ("block-job-complete", json!({ "device": "move" })),
        ("blkmirror-pivot", json!({ "export": "vda" })),
    ] {
        let error = qmp.refused(command, arguments);
        assert_eq!(error["code"], "BLOCK_COPY_ACTIVE", "{command}: {error}");
    }
    qmp.ok("block-job-pause", json!({ "device": "move" }));
    assert_eq!(qmp.event("JOB_STATUS_CHANGE")["data"]["status"], "paused");
    qmp.ok("block-job-set-speed", json!({ "device": "move", "speed": 0 }));
    qmp.ok("block-job-resume", json!({ "device": "move" }));
    assert_eq!(qmp.event("JOB_STATUS_CHANGE")["data"]["status"], "running");
    assert_eq!(qmp.event("JOB_STATUS_CHANGE")["data"]["status"], "ready", "told once that it runs");
    let ready = scene.daemon.wait_for("vda", "ready");
    assert!(number(&ready, "copied_bytes") > number(&before, "copied_bytes"), "{ready}");
    scene.daemon.ok("cancel", &["vda"]);
    assert_eq!(qmp.event("BLOCK_JOB_COMPLETED")["data"]["device"], "move");

    // And given up in its first part, by its name, kept until it is dismissed.
    let other = scene.new.with_file_name("other");
    std::fs::create_dir(&other).expect("a new folder");
    let arguments = json!({ "export": "vda", "target": other, "chain": true, "speed": 1024, "job-id": "again",
                            "auto-dismiss": false });
    qmp.ok("blkmirror-mirror", arguments);
    qmp.ok("job-cancel", json!({ "id": "again" }));
    assert_eq!(qmp.event("BLOCK_JOB_CANCELLED")["data"]["device"], "again");
    let jobs = qmp.ok("query-jobs", json!({}));
    assert_eq!((&jobs[0]["id"], &jobs[0]["status"]), (&json!("again"), &json!("concluded")), "{jobs}");
    qmp.ok("job-dismiss", json!({ "id": "again" }));
    assert_eq!(std::fs::read_dir(&other).expect("a folder").count(), 0);
}

/// After a kill or an orderly end in its first part the job goes on as it was changed, over whatever is there.
#[test]
fn the_layers_below_are_copied_on_by_the_next_daemon() {
    for (seed, killed) in [(8, true), (14, false)] {
        let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, seed));
        let place = scene.place();
        scene.daemon.ok("mirror", &scene.args(&place, &["--speed", "1M"]));
        scene.copies_below();
        scene.daemon.ok("set", &["vda", "--speed", "1K"]);
        scene.daemon.ok("pause", &["vda"]);
        if killed {
            scene.daemon.kill()
        } else {
            scene.daemon.stop()
        }
        let state = scene.new.with_file_name("state").display().to_string();
        let said = run(&program().display().to_string(), &["journal", "show", &state]);
        assert!(said.contains("the layers below come first"), "{said}");
        // What is there now may be anything.
        for name in scene.found() {
            let file = std::fs::File::options().write(true).open(scene.new.join(name)).expect("a file");
            file.write_all_at(&[0xee; 1 << 20], 64 << 20).expect("room");
        }
        scene.daemon.start();
        let status = scene.daemon.status("vda");
        let expected = [("phase", json!("seeding")), ("paused", json!(true)), ("speed_bytes_per_s", json!(1024))];
        expected.iter().for_each(|(name, value)| assert_eq!(status[name], *value, "{name}: {status}"));
        scene.daemon.ok("set", &["vda", "--speed", "0"]);
        scene.daemon.ok("resume", &["vda"]);
        scene.daemon.wait_for("vda", "ready");
        scene.daemon.ok("cancel", &["vda"]);
        scene.daemon.stop();
        assert_eq!(scene.found(), ["base.qcow2", "snap1.qcow2", "snap2.qcow2"]);
        assert_same("the copy", &content(&scene.top(), "qcow2"), &scene.chain.content());
        scene.found().iter().for_each(|name| check(&scene.new.join(name), "qcow2"));
    }
}

/// A kill between the names: some copies have theirs, and what has none is whole as well.
#[test]
fn copies_that_are_whole_get_their_names_from_the_next_daemon() {
    let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 19));
    let (place, job) = (scene.place(), scene.new.with_file_name("state").join("vda.job"));
    scene.daemon.ok("mirror", &scene.args(&place, &["--speed", "1K"]));
    scene.copies_below();
    let mut kept: Value = serde_json::from_slice(&std::fs::read(&job).expect("the job's request")).expect("JSON");
    assert_eq!((&kept["named"], &kept["request"]["chain"]), (&json!(false), &json!(true)), "{kept}");
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.ok("cancel", &["vda"]);
    scene.daemon.stop();
    let name = |name: &str| scene.new.join(name);
    let top = std::fs::read(name("snap2.qcow2")).expect("the mirror's target");
    std::fs::remove_file(name("snap2.qcow2")).expect("the mirror's target");
    std::fs::rename(name("snap1.qcow2"), name("snap1.qcow2.part")).expect("a copy");
    (kept["named"], kept["request"]["speed"]) = (json!(true), json!(0));
    let (base, aside) = (name("base.qcow2"), name("aside"));
    std::fs::rename(&base, &aside).expect("a copy");
    std::fs::write(&job, kept.to_string()).expect("room");
    scene.daemon.start();
    let status = scene.daemon.status("vda");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("base.qcow2: it was copied")), "{status}");
    scene.daemon.stop();
    std::fs::rename(&aside, &base).expect("a copy");
    scene.daemon.start();
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.ok("cancel", &["vda"]);
    scene.daemon.stop();
    // The mirror's target is there, and what was asked of it is not kept yet.
    kept["top"] = json!(true);
    std::fs::write(&job, kept.to_string()).and_then(|()| std::fs::write(name("snap2.qcow2"), top)).expect("room");
    scene.daemon.start();
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    scene.daemon.stop();
    assert_eq!(scene.found(), ["base.qcow2", "snap1.qcow2", "snap2.qcow2"]);
    assert_same("the copied chain", &content(&scene.top(), "qcow2"), &scene.chain.content());
}

/// Kills all the way: in the copies, between their names, in the mirror of the top.
#[test]
fn kills_at_any_moment_lose_neither_the_chain_nor_a_write() {
    let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 15));
    let writer = Writer::start(&scene.daemon.socket(), "vda", scene.chain.content(), habits(16));
    let place = scene.place();
    scene.daemon.ok("mirror", &scene.args(&place, &[]));
    for round in 0..10 {
        std::thread::sleep(Duration::from_millis(7 * round));
        scene.daemon.kill();
        scene.daemon.start();
        writer.wait(5);
    }
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    writer.wait(50);
    let truth = writer.stop();
    scene.daemon.stop();
    assert_eq!(scene.found(), ["base.qcow2", "snap1.qcow2", "snap2.qcow2"]);
    assert_same("the copied chain", &content(&scene.top(), "qcow2"), &truth);
}

/// Too little space for the layers below is said before; then the job backs off as for its top, or does what it is told.
#[test]
fn the_layers_below_wait_for_space() {
    let folder = folder();
    let (old, mount) = (folder.path().join("old"), folder.path().join("small"));
    std::fs::create_dir(&old).and_then(|()| std::fs::create_dir(&mount)).expect("new folders");
    let chain = three_layers(&old, DISK_LEN, 17);
    let mounted = format!("mount -t tmpfs -o size=90M none {} && exec \"$@\"", mount.display());
    let through = ["unshare", "-rm", "sh", "-c", &mounted, "sh"];
    let mut daemon = Daemon::serve_through(&through, folder.path(), &[chain.export("vda")], &[]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let root = Path::new("/proc").join(daemon.pid().to_string()).join("root");
    let filler = root.join(mount.strip_prefix("/").expect("a full path")).join("filler");
    std::fs::write(&filler, vec![1; 89 << 20]).expect("there is space for that");
    let place = mount.display().to_string();
    let said = daemon.ok("mirror", &["vda", "--chain", &place, "--json"]);
    assert_eq!(said.matches("the copy may need").count(), 1, "{said}");
    assert_eq!(daemon.log().matches("the copy may need").count(), 1, "{}", daemon.log());
    assert_eq!(qmp.event("BLOCK_JOB_ERROR")["data"]["operation"], "write");
    assert_eq!(qmp.event("BLKMIRROR_BACK_OFF")["data"]["active"], true);
    let status = daemon.status("vda");
    assert_eq!((&status["phase"], &status["io_status"]), (&json!("seeding"), &json!("nospace")), "{status}");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("No space left")), "{status}");
    daemon.ok("set", &["vda", "--on-target-error", "stop"]);
    let paused = || Some(daemon.status("vda")).filter(|status| status["paused"] == true);
    assert_eq!(eventually("it pauses", paused)["back_off_ms"], json!(null));
    daemon.ok("set", &["vda", "--on-target-error", "back-off"]);
    eventually("it backs off", || daemon.status("vda")["back_off_ms"].as_u64().map(drop));
    std::fs::remove_file(&filler).expect("a file of ours");
    daemon.ok("resume", &["vda"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    let found = Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("a connection").content();
    assert_same("the copied chain", &found, &chain.content());
    daemon.stop();
}

/// The job itself goes on after a kill, as any other: what is below it is there.
#[test]
fn a_kill_under_the_mirror_of_the_top_goes_on() {
    let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 9));
    let writer = Writer::start(&scene.daemon.socket(), "vda", scene.chain.content(), habits(10));
    let place = scene.place();
    scene.daemon.ok("mirror", &scene.args(&place, &[]));
    writer.wait(50);
    scene.daemon.kill();
    scene.daemon.start();
    scene.daemon.wait_for("vda", "ready");
    scene.daemon.pivot("vda");
    writer.wait(50);
    let truth = writer.stop();
    scene.daemon.stop();
    assert_same("the copied chain", &content(&scene.top(), "qcow2"), &truth);
}

#[test]
fn what_cannot_be_a_copy_of_the_chain_is_refused() {
    let scene = Scene::new(|folder| {
        let base = folder.join("deep");
        std::fs::create_dir(&base).expect("a new folder");
        images::create(&base.join("top.qcow2"), "qcow2", DISK_LEN, &[]);
        images::overlay(&folder.join("top.qcow2"), "deep/top.qcow2", "qcow2", None, &[]);
        let top = folder.join("top.qcow2");
        Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2")], told: String::new() }
    });
    let (place, old) = (scene.place(), scene.chain.top.parent().expect("a folder").display().to_string());
    let none = format!("{place}/none");
    let parts = Scene::new(|folder| {
        images::create(&folder.join("disk"), "qcow2", DISK_LEN, &[]);
        images::overlay(&folder.join("disk.part"), "disk", "qcow2", None, &[]);
        let top = folder.join("disk.part");
        Chain { top: top.clone(), format: "qcow2", layers: vec![(top, "qcow2")], told: String::new() }
    });
    let said = parts.daemon.refused("mirror", &parts.args(&parts.place(), &[]));
    assert!(said.contains("disk.part: two files of the chain"), "{said}");
    for (place, options, reason) in [
        (place.as_str(), &[][..], "two files of the chain"),
        (&none, &[], "make it first"),
        (&old, &[], "two files of the chain"),
        (&place, &["-o", "data_file=x"], "asks for something else"),
    ] {
        let said = scene.daemon.refused("mirror", &scene.args(place, options));
        assert!(said.contains(reason), "{place} {options:?}: {said}");
    }
    for option in ["--shallow", "--reuse-external", "--raw", "--blockdev"] {
        let output = scene.daemon.command("mirror", &scene.args(&place, &[option])).output().expect("the program");
        assert_eq!(output.status.code(), Some(2), "{option}");
    }
    assert_eq!(scene.found(), Vec::<String>::new());
}

/// All of it was copied before it was found that the header of a copy would not say what is below it: its old name did.
#[test]
fn what_a_copys_header_could_not_say_is_refused_before() {
    let scene = Scene::new(|folder| {
        let chain = three_layers(folder, DISK_LEN, 18);
        let name = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#;
        let snap1 = folder.join("snap1.qcow2");
        run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", name, &snap1.display().to_string()]);
        // As QEMU before 6.1 left it: the extension that has the format is none that anybody knows.
        let file = std::fs::File::options().read(true).write(true).open(&snap1).expect("a file");
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 0).expect("a header");
        let at = header.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).expect("a recorded format");
        file.write_all_at(&[1], at as u64).expect("room");
        chain
    });
    let said = scene.daemon.refused("mirror", &scene.args(&scene.place(), &["--dry-run"]));
    assert!(said.contains("snap1.qcow2") && said.contains("-F FORMAT"), "{said}");
}

#[test]
fn a_disk_of_one_layer_and_a_dry_run() {
    let scene = Scene::new(|folder| images::one_layer(folder, "raw", DISK_LEN, 11));
    let place = scene.place();
    let said = scene.daemon.ok("mirror", &scene.args(&place, &["--dry-run"]));
    assert!(said.contains("could be mirrored"), "{said}");
    assert_eq!(scene.found(), Vec::<String>::new());
    scene.daemon.ok("mirror", &scene.args(&place, &["--finish"]));
    assert_eq!(scene.found(), ["disk.raw"]);
    assert_same("the copy", &content(&scene.top(), "raw"), &scene.chain.content());
}
