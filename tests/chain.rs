//! `mirror --chain DIR`: every layer of a chain goes to another folder, each as it is, while the guest writes.
mod support;

use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::daemon::Daemon;
use support::images::{self, Chain, three_layers};
use support::nbd::{Client, Replies};
use support::random::Random;
use support::tools::{allocated, check, check_leaks_allowed, content, info, run};
use support::writer::{Habits, Writer};
use support::{assert_same, eventually, folder};

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
        let mut command = scene.daemon.command("mirror", &scene.args(&place, options));
        command.stderr(std::process::Stdio::null()).spawn().expect("the program")
    };
    let mut waiting = begin(&["--speed", "1K"]);
    let status = eventually("the layers below are being copied", || {
        let status = scene.daemon.status("vda");
        (status["phase"] == "seeding" && scene.found().iter().any(|name| name.ends_with(".part"))).then_some(status)
    });
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
    assert!(!waiting.wait().expect("our child").success(), "its job never started");
    assert_eq!(scene.found(), Vec::<String>::new());
    assert_eq!(scene.daemon.status("vda")["phase"], "cancelled");

    // Somebody takes a name meanwhile.
    let mut waiting = begin(&["--speed", "1K"]);
    eventually("the layers below are being copied", || (!scene.found().is_empty()).then_some(()));
    std::fs::write(scene.new.join("base.qcow2"), "mine").expect("room");
    scene.daemon.ok("set", &["vda", "--speed", "0"]);
    assert!(!waiting.wait().expect("our child").success());
    assert_eq!(scene.found(), ["base.qcow2"], "what is not ours stays");
    let status = scene.daemon.status("vda");
    assert_eq!(status["phase"], "failed");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("base.qcow2")), "{status}");
    let said = scene.daemon.refused("mirror", &scene.args(&place, &[]));
    assert!(said.contains("base.qcow2") && said.contains("there already"), "{said}");
}

#[test]
fn after_a_kill_the_layers_below_are_copied_again() {
    let mut scene = Scene::new(|folder| three_layers(folder, DISK_LEN, 8));
    let place = scene.place();
    let mut waiting =
        scene.daemon.command("mirror", &scene.args(&place, &["--speed", "1K"])).spawn().expect("the program");
    eventually("a part is there", || scene.found().iter().any(|name| name.ends_with(".part")).then_some(()));
    scene.daemon.kill();
    assert!(!waiting.wait().expect("our child").success());
    // What is there now may be anything.
    for name in scene.found() {
        let file = std::fs::File::options().write(true).open(scene.new.join(name)).expect("a file");
        file.write_all_at(&[0xee; 1 << 20], 64 << 20).expect("room");
    }
    scene.daemon.start();
    assert_eq!(scene.daemon.status("vda")["phase"], "none");
    scene.daemon.ok("mirror", &scene.args(&place, &["--finish"]));
    scene.daemon.stop();
    assert_eq!(scene.found(), ["base.qcow2", "snap1.qcow2", "snap2.qcow2"]);
    assert_same("the copy", &content(&scene.top(), "qcow2"), &scene.chain.content());
    scene.found().iter().for_each(|name| check(&scene.new.join(name), "qcow2"));
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
