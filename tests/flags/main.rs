//! The flag table: what each combination of `shallow`, `reuse` and `raw` means for each kind of disk and of target,
//! and what is refused, with libvirt's name for it. Every row goes through every door that has words for it, first as
//! a dry run; what is possible is then done under a guest that writes, and looked at as QEMU sees it.
mod doors;
#[path = "../support/mod.rs"]
mod support;

use doors::{Ask, Door};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::daemon::Daemon;
use support::images::{self, Chain, overlay, probed};
use support::nbd::{Client, Replies, Request};
use support::qmp::Qmp;
use support::scene::{Scene, backing};
use support::tools::{content, info, output, run, told};
use support::{assert_same, folder};

const DISK_LEN: u64 = 8 << 20;
/// Slow enough that a job is still under way when it is told something.
const SLOW: u64 = 1 << 16;

/// The disk that is served.
#[derive(Clone, Copy, PartialEq)]
enum Disk {
    /// `base <- snap1 <- snap2`, of qcow2.
    Chain,
    Qcow2,
    Raw,
}

/// What there is at the target's place before.
#[derive(Clone, Copy, PartialEq)]
enum There {
    Nothing,
    Empty,
    /// Somebody's file, no image.
    Words,
    /// An image of this format and the disk's size, full of old bytes.
    Old(&'static str),
    /// An overlay of `snap1`, by a relative name.
    OnSnap1,
    /// An overlay of something that is not there.
    OnNothing,
    /// A raw file with the contents of `snap1`.
    LikeSnap1,
    /// An empty image of this format and size.
    Sized(&'static str, u64),
    Folder,
    Fifo,
    /// The disk itself.
    Itself,
    /// The second layer, by a symbolic link.
    SymbolicLayer,
    /// The base, by one more name.
    HardLayer,
    /// Its folder is not there.
    NoFolder,
    /// A block device, of this size.
    Device(u64),
}

enum Then {
    /// The target is of this format and has this backing, by the name in its header; `Some("…/snap1.qcow2")` for its
    /// full name.
    Copies(&'static str, Option<&'static str>),
    /// Refused, with this name of libvirt's and these words.
    Refused(&'static str, &'static [&'static str]),
}

use Disk::{Chain as Layers, Qcow2, Raw};
use Then::{Copies, Refused};
use There::{
    Device, Empty, Fifo, Folder, HardLayer, Itself, LikeSnap1, NoFolder, Nothing, Old, OnNothing, OnSnap1, Sized,
    SymbolicLayer, Words,
};

type Row = (&'static str, Disk, There, Then);

const FULL_NAME: Option<&str> = Some("…/snap1.qcow2");
const NO_SHALLOW_RAW: Then = Refused("CONFIG_UNSUPPORTED", &["raw has no backing", "--reuse-external"]);
const NOT_EMPTY: Then = Refused("CONFIG_UNSUPPORTED", &["not empty", "--reuse-external"]);
const NOT_THERE: Then = Refused("OPERATION_FAILED", &["the target is not there"]);
const A_LAYER: Then = Refused("INVALID_ARG", &["is a layer of the source"]);

/// Flags, the disk, what is there, what comes of it.
const ROWS: &[Row] = &[
    // The eight combinations.
    ("", Layers, Nothing, Copies("qcow2", None)),
    ("raw", Layers, Nothing, Copies("raw", None)),
    ("shallow", Layers, Nothing, Copies("qcow2", FULL_NAME)),
    ("reuse", Layers, Old("qcow2"), Copies("qcow2", None)),
    ("shallow reuse", Layers, OnSnap1, Copies("qcow2", Some("snap1.qcow2"))),
    ("shallow reuse raw", Layers, LikeSnap1, Copies("raw", None)),
    ("shallow raw", Layers, Nothing, NO_SHALLOW_RAW),
    ("reuse raw", Layers, Old("raw"), Copies("raw", None)),
    // Of a disk without backing, and of a raw one.
    ("", Raw, Nothing, Copies("raw", None)),
    ("qcow2", Raw, Nothing, Copies("qcow2", None)),
    ("shallow", Qcow2, Nothing, Copies("qcow2", None)),
    ("shallow", Raw, Nothing, Copies("raw", None)),
    ("shallow raw", Raw, Nothing, Copies("raw", None)),
    ("shallow raw", Qcow2, Nothing, NO_SHALLOW_RAW),
    ("shallow reuse", Qcow2, Old("qcow2"), Copies("qcow2", None)),
    // What is there.
    ("", Layers, Empty, Copies("qcow2", None)),
    ("raw", Layers, Empty, Copies("raw", None)),
    ("", Layers, Words, NOT_EMPTY),
    ("raw", Layers, Words, NOT_EMPTY),
    ("shallow", Layers, OnSnap1, NOT_EMPTY),
    ("reuse", Layers, Nothing, NOT_THERE),
    ("shallow reuse", Layers, Nothing, NOT_THERE),
    ("reuse raw", Layers, Nothing, NOT_THERE),
    ("", Layers, NoFolder, Refused("OPERATION_FAILED", &["No such file or directory"])),
    ("", Layers, Folder, Refused("INVALID_ARG", &["neither a regular file nor a block device"])),
    ("reuse raw", Layers, Fifo, Refused("INVALID_ARG", &["neither a regular file nor a block device"])),
    // Raw is never guessed.
    ("reuse", Layers, Words, Refused("CONFIG_UNSUPPORTED", &["raw is never guessed", "--raw"])),
    ("reuse", Layers, Empty, Refused("CONFIG_UNSUPPORTED", &["--format"])),
    ("shallow reuse", Layers, LikeSnap1, Refused("CONFIG_UNSUPPORTED", &["raw is never guessed"])),
    // The backing of a reused target is opened at the start already.
    ("shallow reuse", Layers, OnNothing, Refused("OPERATION_FAILED", &["gone.qcow2", "No such file or directory"])),
    // Sizes.
    ("reuse raw", Layers, Sized("raw", DISK_LEN + (1 << 20)), Copies("raw", None)),
    ("reuse raw", Layers, Sized("raw", DISK_LEN / 2), Refused("CONFIG_UNSUPPORTED", &["4194304", "8388608"])),
    ("reuse", Layers, Sized("qcow2", DISK_LEN / 2), Refused("CONFIG_UNSUPPORTED", &["4194304", "8388608"])),
    ("reuse", Layers, Sized("qcow2", DISK_LEN * 2), Refused("CONFIG_UNSUPPORTED", &["16777216", "8388608"])),
    // A layer of the source, by any name.
    ("reuse", Layers, Itself, A_LAYER),
    ("reuse raw", Layers, Itself, A_LAYER),
    ("", Layers, Itself, A_LAYER),
    ("reuse", Layers, SymbolicLayer, A_LAYER),
    ("shallow reuse", Layers, HardLayer, A_LAYER),
    ("device", Layers, HardLayer, A_LAYER),
    // A device that has to be one.
    ("device", Layers, Nothing, Refused("INVALID_ARG", &["not a block device"])),
    ("device reuse raw", Layers, Old("raw"), Refused("INVALID_ARG", &["not a block device"])),
];

/// The same with block devices.
const DEVICE_ROWS: &[Row] = &[
    ("", Layers, Device(DISK_LEN), Refused("INVALID_ARG", &["only with its format named"])),
    ("device", Layers, Device(DISK_LEN), Refused("INVALID_ARG", &["only with its format named"])),
    ("raw", Layers, Device(DISK_LEN), Copies("raw", None)),
    ("device raw", Layers, Device(DISK_LEN + (1 << 20)), Copies("raw", None)),
    ("reuse raw", Layers, Device(DISK_LEN), Copies("raw", None)),
    ("qcow2", Layers, Device(DISK_LEN * 2), Copies("qcow2", None)),
    ("raw", Layers, Device(DISK_LEN / 2), Refused("CONFIG_UNSUPPORTED", &["4194304", "8388608"])),
    ("reuse", Layers, Device(DISK_LEN), Refused("CONFIG_UNSUPPORTED", &["raw is never guessed"])),
];

/// A loop device over a file. Detached when it is dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None` where the system has none to give.
    fn over(file: &Path) -> Option<Self> {
        let output = output(Command::new("losetup").args(["--find", "--show", "--direct-io=off"]).arg(file));
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then(|| Self(path.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Whoever sees that it is still there can only look on as well.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A scene for a row; a device where it has one.
#[track_caller]
fn scene(disk: Disk, there: There, seed: u64) -> Option<(Scene, Option<Loop>)> {
    let folder = folder();
    let chain = match disk {
        Layers => images::three_layers(folder.path(), DISK_LEN, seed),
        Qcow2 => images::one_layer(folder.path(), "qcow2", DISK_LEN, seed),
        Raw => images::one_layer(folder.path(), "raw", DISK_LEN, seed),
    };
    let target = folder.path().join("target");
    let name = prepare(there, &target, &chain);
    let device = match there {
        Device(_) => Some(Loop::over(&target)?),
        _ => None,
    };
    let mut scene = Scene::of(folder, chain, seed);
    scene.target = device.as_ref().map_or(name, |device| device.0.clone());
    Some((scene, device))
}

/// Puts there what has to be there. Returns the target's name.
#[track_caller]
fn prepare(there: There, target: &Path, chain: &Chain) -> PathBuf {
    match there {
        Nothing => {}
        Empty => std::fs::write(target, "").expect("a file of ours"),
        Words => std::fs::write(target, "somebody's file").expect("a file of ours"),
        Old(format) => images::holding(target, format, &vec![0xdd; DISK_LEN as usize], &[]),
        OnSnap1 => overlay(target, "snap1.qcow2", "qcow2", None, &["-o", "cluster_size=4096"]),
        OnNothing => overlay(target, "gone.qcow2", "qcow2", Some(DISK_LEN), &["-u"]),
        LikeSnap1 => std::fs::write(target, content(&chain.layers[1].0, "qcow2")).expect("a file of ours"),
        Sized(format, len) => images::create(target, format, len, &[]),
        Folder => std::fs::create_dir(target).expect("a folder of ours"),
        Fifo => drop(run("mkfifo", &[target])),
        Itself => return chain.top.clone(),
        SymbolicLayer => std::os::unix::fs::symlink(&chain.layers[1].0, target).expect("a link"),
        HardLayer => std::fs::hard_link(&chain.layers[0].0, target).expect("a link"),
        NoFolder => return target.join("deeper"),
        Device(len) => images::create(target, "raw", len, &[]),
    }
    target.to_owned()
}

/// Takes each row that is possible through a door, where that has words for it. Returns how many it had.
#[track_caller]
fn copied(door: Door, rows: &[Row]) -> usize {
    let mut count = 0;
    for (number, (flags, disk, there, then)) in rows.iter().enumerate() {
        let Copies(format, backing) = then else { continue };
        let Some((scene, _device)) = scene(*disk, *there, number as u64) else { continue };
        eprintln!("row {number} by {door:?}: {flags:?} onto {}", scene.target());
        let ask = Ask { export: "vda".to_owned(), target: scene.target(), flags, ..Ask::default() };
        count += usize::from(copies(door, scene, &ask, *there, format, *backing));
    }
    count
}

/// Takes each row that is refused through all doors. Returns how often it was asked.
#[track_caller]
fn refused(rows: &[Row]) -> usize {
    let mut count = 0;
    for (number, (flags, disk, there, then)) in rows.iter().enumerate() {
        let Refused(code, words) = then else { continue };
        let Some((mut scene, _device)) = scene(*disk, *there, number as u64) else { continue };
        eprintln!("row {number}: {flags:?} onto {}", scene.target());
        let ask = Ask { export: "vda".to_owned(), target: scene.target(), flags, ..Ask::default() };
        count += Door::ALL.into_iter().filter(|door| is_refused(*door, &scene, &ask, *there, code, words)).count();
        scene.ends_on_the_source();
    }
    count
}

/// In how many of the rows a door has words for what is possible.
fn possible(words: impl Fn(&str) -> bool) -> usize {
    ROWS.iter().filter(|(flags, _, _, then)| matches!(then, Copies(..)) && words(flags)).count()
}

/// What is at the target, as far as it has bytes.
fn bytes(scene: &Scene, there: There) -> Option<Vec<u8>> {
    // The guest writes to the one, and nobody to the other.
    if matches!(there, Itself | Fifo) { None } else { std::fs::read(&scene.target).ok() }
}

/// A dry run and a refusal are an answer, and nothing else.
#[track_caller]
fn leaves_nothing(scene: &Scene, there: There, before: &Option<Vec<u8>>) {
    assert!(bytes(scene, there) == *before, "the target was touched");
    assert_eq!(scene.target.exists(), before.is_some() || matches!(there, Itself | Fifo | Folder));
    let status = scene.status();
    assert_eq!((&status["phase"], &status["job"]), (&json!("none"), &Value::Null), "{status}");
    assert_eq!(Qmp::connect(&scene.daemon.control_socket()).ok("query-jobs", json!({})), json!([]));
}

#[track_caller]
fn copies(door: Door, mut scene: Scene, ask: &Ask, there: There, format: &str, backed: Option<&str>) -> bool {
    let before = bytes(&scene, there);
    let Some(possible) = door.copy(&scene.daemon, ask, true) else { return false };
    possible.expect("it is possible");
    leaves_nothing(&scene, there, &before);
    scene.writes(20);
    door.copy(&scene.daemon, ask, false).expect("a door").expect("it is possible");
    scene.writes(20);
    let status = scene.daemon.wait_for("vda", "ready");
    let notes = status["notes"].to_string();
    let without_backing = scene.chain.layers.len() == 1;
    assert_eq!(notes.contains("full one"), ask.has("shallow") && without_backing, "{notes}");
    door.pivot(&scene.daemon, "vda").expect("it is ready");
    let status = scene.status();
    assert_eq!((&status["phase"], &status["serving"]), (&json!("pivoted"), &json!(scene.target())), "{status}");
    scene.ends_on_the_target(format);
    assert_eq!(probed(&scene.target), format);
    match backed {
        None => assert_eq!(backing(&scene.target), None),
        FULL_NAME => {
            let named = info(&scene.target)["backing-filename"].as_str().map(PathBuf::from).expect("a backing");
            let snap1 = scene.chain.layers[1].0.canonicalize().expect("the backing");
            assert!(named.is_absolute() && named.canonicalize().expect("the backing") == snap1, "{named:?}");
            assert_eq!(info(&scene.target)["backing-filename-format"], "qcow2");
        }
        relative => {
            assert_eq!(backing(&scene.target).as_deref(), relative);
            assert_eq!(info(&scene.target)["cluster-size"], 4096, "its header is kept");
        }
    }
    true
}

#[track_caller]
fn is_refused(door: Door, scene: &Scene, ask: &Ask, there: There, code: &str, words: &[&str]) -> bool {
    let before = bytes(scene, there);
    for dry_run in [true, false] {
        let Some(answer) = door.copy(&scene.daemon, ask, dry_run) else { return false };
        let refused = answer.expect_err("it is refused");
        assert_eq!(refused.code, code, "{door:?}: {}", refused.words);
        assert!(words.iter().all(|word| refused.words.contains(word)), "{door:?}: {words:?}: {}", refused.words);
        leaves_nothing(scene, there, &before);
    }
    true
}

#[test]
fn what_is_possible_by_the_command_line() {
    assert_eq!(copied(Door::CommandLine, ROWS), possible(|_| true));
}

#[test]
fn what_is_possible_by_drive_mirror() {
    assert_eq!(copied(Door::DriveMirror, ROWS), possible(|flags| !flags.contains("device")));
}

#[test]
fn what_is_possible_by_libvirts_numbers() {
    assert_eq!(copied(Door::Numbers, ROWS), possible(|flags| !flags.contains("qcow2")));
}

#[test]
fn what_is_possible_by_the_engines_functions() {
    assert_eq!(copied(Door::Functions, ROWS), possible(|flags| !flags.contains("qcow2")));
}

#[test]
fn what_is_refused_by_every_door() {
    let rows = ROWS.iter().filter(|(.., then)| matches!(then, Refused(..)));
    let with_words: usize = rows.map(|(flags, ..)| if flags.contains("device") { 3 } else { 4 }).sum();
    assert_eq!(refused(ROWS), with_words);
}

/// Where the system lets the test have a block device.
#[test]
fn block_devices() {
    let folder = folder();
    let file = folder.path().join("file");
    images::create(&file, "raw", 1 << 20, &[]);
    if Loop::over(&file).is_none() {
        eprintln!("no block device can be had here");
        return;
    }
    assert_eq!(refused(DEVICE_ROWS), 15);
    assert_eq!(copied(Door::CommandLine, DEVICE_ROWS), 4);
    assert_eq!(copied(Door::Numbers, DEVICE_ROWS), 3);
}

/// What is refused for reasons that are not in the target.
#[test]
fn requests_that_are_wrong_in_themselves() {
    let folder = folder();
    let chains = ["vda", "vdb"].map(|name| {
        let home = folder.path().join(name);
        std::fs::create_dir(&home).expect("a folder of ours");
        images::three_layers(&home, DISK_LEN, 1)
    });
    let [vda, vdb] = &chains;
    let exports = [vda.export("vda"), vdb.export("vdb") + ",readonly"];
    let daemon = Daemon::serve(folder.path(), &exports);
    let target = folder.path().join("target").display().to_string();
    let ask = Ask { export: "vda".to_owned(), target: target.clone(), ..Ask::default() };
    let option = |name, value| Ask { option: Some((name, value)), ..ask.clone() };
    std::fs::write(folder.path().join("there"), "").expect("a file of ours");
    let cases = [
        (Ask { granularity: 1000, ..ask.clone() }, "INVALID_ARG", "power of two from 512 to 67108864"),
        (Ask { granularity: 256, ..ask.clone() }, "INVALID_ARG", "power of two"),
        (Ask { granularity: 128 << 20, ..ask.clone() }, "INVALID_ARG", "power of two"),
        (Ask { export: "none".to_owned(), ..ask.clone() }, "INVALID_ARG", "there are: vda, vdb"),
        (Ask { export: "vdb".to_owned(), ..ask.clone() }, "OPERATION_INVALID", "read-only"),
        (Ask { job_id: Some("1st"), ..ask.clone() }, "INVALID_ARG", "Invalid job ID '1st'"),
        (
            Ask { target: vdb.top.display().to_string(), flags: "reuse", ..ask.clone() },
            "INVALID_ARG",
            "export vdb uses it",
        ),
        (option("preallocation", "full"), "OPERATION_UNSUPPORTED", "falloc"),
        (Ask { flags: "raw", ..option("compat", "1.1") }, "INVALID_ARG", "compat"),
        (
            Ask {
                flags: "reuse raw",
                target: folder.path().join("there").display().to_string(),
                ..option("compat", "1.1")
            },
            "INVALID_ARG",
            "there already",
        ),
        (
            Ask { target: format!("nbd+unix:///vda?socket={}", daemon.socket().display()), ..ask.clone() },
            "INVALID_ARG",
            "this daemon's own socket",
        ),
    ];
    let mut asked = 0;
    for (ask, code, words) in &cases {
        for door in Door::ALL {
            for dry_run in [true, false] {
                let Some(answer) = door.copy(&daemon, ask, dry_run) else { continue };
                let refused = answer.expect_err(words);
                assert!(refused.code == *code && refused.words.contains(words), "{code} {words}: {refused:?}");
                asked += 1;
            }
        }
    }
    assert!(asked >= cases.len() * 4, "{asked}");
    // The command line names the caller's own folder.
    let relative = Ask { target: "target".to_owned(), ..ask };
    for door in [Door::DriveMirror, Door::Numbers, Door::Functions] {
        let refused = door.copy(&daemon, &relative, false).expect("a door").expect_err("whose folder?");
        assert!(refused.code == "INVALID_ARG" && refused.words.contains("full path"), "{refused:?}");
    }
    assert!(!Path::new(&target).exists());
}

/// A name that leads from the target's own folder to the backing, so that both can be moved together.
#[test]
fn a_relative_backing_name_is_the_way_from_the_targets_folder() {
    let folder = folder();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    std::fs::create_dir(&old).and_then(|()| std::fs::create_dir(&new)).expect("new folders");
    let chain = images::three_layers(&old, DISK_LEN, 5);
    let truth = chain.content();
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let path = |name: &str| new.join(name).display().to_string();
    images::create(&new.join("there"), "qcow2", DISK_LEN, &[]);
    for options in [
        json!({ "target": path("full") }),
        json!({ "target": path("raw"), "format": "raw" }),
        json!({ "target": path("there"), "shallow": true, "reuse-external": true }),
    ] {
        let mut ask = json!({ "export": "vda", "relative-backing": true });
        ask.as_object_mut().expect("an object").extend(options.as_object().expect("an object").clone());
        let error = qmp.refused("blkmirror-mirror", ask);
        assert_eq!(error["code"], "INVALID_ARG", "{error}");
        assert!(error["desc"].to_string().contains("only a shallow copy into a new qcow2 image"), "{error}");
    }
    let without = daemon.command("mirror", &["vda", &path("full"), "--relative-backing"]).output();
    assert_eq!(without.expect("the program").status.code(), Some(2));
    daemon.ok("mirror", &["vda", &path("first"), "--shallow", "--relative-backing", "--finish"]);
    let ask = json!({ "export": "vda", "target": path("second"), "shallow": true, "relative-backing": true });
    qmp.ok("blkmirror-mirror", ask);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    daemon.stop();
    let moved = folder.path().join("moved");
    std::fs::create_dir(&moved).expect("a new folder");
    for (from, to) in [(&old, "old"), (&new, "new")] {
        std::fs::rename(from, moved.join(to)).expect("a folder of ours");
    }
    for name in ["first", "second"] {
        let target = moved.join("new").join(name);
        assert_eq!(backing(&target).as_deref(), Some("../old/snap1.qcow2"));
        assert_same(name, &content(&target, "qcow2"), &truth);
    }
}

/// Numbers that mean nothing, or nothing that is done here.
#[test]
fn libvirts_numbers_without_a_copy() {
    let folder = folder();
    let chain = images::one_layer(folder.path(), "qcow2", DISK_LEN, 1);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let target = folder.path().join("target");
    for (arguments, code) in [
        // Any of the flags but COPY, and a rebase that is a pull.
        (json!({ "flags": 1 }), "INVALID_ARG"),
        (json!({ "flags": 2 }), "INVALID_ARG"),
        (json!({ "flags": 4 }), "INVALID_ARG"),
        (json!({ "flags": 7 }), "INVALID_ARG"),
        (json!({ "flags": 32 }), "INVALID_ARG"),
        (json!({ "flags": 0 }), "OPERATION_UNSUPPORTED"),
        (json!({}), "OPERATION_UNSUPPORTED"),
        (json!({ "flags": 8 | 16 }), "ARGUMENT_UNSUPPORTED"),
        (json!({ "flags": 8 | 128 }), "INVALID_ARG"),
        (json!({ "flags": 8, "base": null }), "INVALID_ARG"),
        (json!({ "flags": 8, "bandwidth": 1_u64 << 60 }), "INVALID_ARG"),
        (json!({ "flags": -8 }), "INVALID_ARG"),
    ] {
        let mut all = json!({ "export": "vda", "base": target });
        all.as_object_mut().expect("an object").extend(arguments.as_object().expect("an object").clone());
        assert_eq!(qmp.refused("block-rebase", all.clone())["code"], code, "{all}");
    }
    assert_eq!(qmp.refused("block-job-abort", json!({ "export": "vda", "flags": 4 }))["code"], "INVALID_ARG");
    // In MiB a second, or in bytes.
    for (flags, bandwidth, speed) in [(8, 3, 3 << 20), (8 | 64, 3, 3)] {
        qmp.ok("block-rebase", json!({ "export": "vda", "base": target, "flags": flags, "bandwidth": bandwidth }));
        assert_eq!(daemon.status("vda")["speed_bytes_per_s"], json!(speed));
        qmp.ok("block-job-abort", json!({ "export": "vda" }));
        std::fs::remove_file(&target).expect("what is left of it");
    }
    assert_eq!(daemon.status("vda")["phase"], "cancelled");
}

/// The flags of a copy, given to anything else.
#[test]
fn flags_of_a_copy_are_for_copies() {
    let folder = folder();
    let chain = images::one_layer(folder.path(), "qcow2", DISK_LEN, 1);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    for verb in ["pivot", "cancel", "pause", "resume", "set", "status"] {
        for flag in ["--shallow", "--reuse-external", "--raw"] {
            let mut command = daemon.command(verb, &["vda", flag]);
            let output = output(&mut command);
            assert_eq!(output.status.code(), Some(2), "{}", told(&command, &output));
        }
    }
    let mut qmp = Qmp::connect(&daemon.control_socket());
    for (verb, arguments) in [
        ("blkmirror-pivot", json!({ "export": "vda" })),
        ("blkmirror-cancel", json!({ "export": "vda" })),
        ("block-job-abort", json!({ "export": "vda" })),
        ("block-job-complete", json!({ "device": "vda" })),
        ("block-job-cancel", json!({ "device": "vda" })),
    ] {
        for flag in ["shallow", "reuse-external", "format", "sync", "mode"] {
            let mut arguments = arguments.clone();
            arguments[flag] = json!(true);
            let error = qmp.refused(verb, arguments);
            assert!(error["code"] == "INVALID_ARG" && error["desc"].to_string().contains(flag), "{error}");
        }
    }
}

/// `BLOCK_COPY_ACTIVE`, and what can be said to a job at the wrong time.
#[test]
fn while_a_job_is_active() {
    for door in Door::ALL {
        let folder = folder();
        let chain = images::three_layers(folder.path(), DISK_LEN, 2);
        let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        let mut qmp = Qmp::connect(&daemon.control_socket());
        let target = |name: &str| folder.path().join(name).display().to_string();
        let ask = Ask { export: "vda".to_owned(), target: target("target"), ..Ask::default() };
        let refused = |answer: Result<(), doors::Refused>, code: &str, words: &str| {
            let refused = answer.expect_err("it is refused");
            assert!(refused.code == code && refused.words.contains(words), "{door:?}: {code} {words}: {refused:?}");
        };
        // There is none.
        let no_job = if door == Door::DriveMirror { "Block job 'vda' not found" } else { "has no copy job" };
        refused(door.pivot(&daemon, "vda"), "INVALID_ARG", no_job);
        refused(door.cancel(&daemon, "vda"), "INVALID_ARG", no_job);

        qmp.ok(
            "blkmirror-mirror",
            json!({ "export": "vda", "target": target("target"), "speed": SLOW, "auto-finalize": false }),
        );
        for dry_run in [true, false] {
            let second = Ask { target: target("second"), ..ask.clone() };
            refused(
                door.copy(&daemon, &second, dry_run).expect("a door"),
                "BLOCK_COPY_ACTIVE",
                "has a copy job already",
            );
        }
        assert!(!folder.path().join("second").exists());
        refused(door.pivot(&daemon, "vda"), "BLOCK_COPY_ACTIVE", "bytes still to copy");

        // Ready, and its end is asked for already.
        qmp.ok("blkmirror-set", json!({ "export": "vda", "speed": 0 }));
        daemon.wait_for("vda", "ready");
        qmp.ok("job-complete", json!({ "id": "vda" }));
        qmp.status("vda", "pending");
        refused(door.cancel(&daemon, "vda"), "OPERATION_INVALID", "is being ended already");
        qmp.ok("blkmirror-pivot", json!({ "export": "vda" }));
        refused(door.pivot(&daemon, "vda"), "INVALID_ARG", no_job);
    }
}

/// A pivot that cannot be: the last pass takes longer than a guest may wait.
#[test]
fn a_pivot_that_is_undone_has_failed() {
    let folder = folder();
    let chain = images::one_layer(folder.path(), "raw", DISK_LEN, 3);
    let mut truth = chain.content();
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let target = folder.path().join("target");
    qmp.ok("blkmirror-mirror", json!({ "export": "vda", "target": target, "mode": "background", "job-id": "move" }));
    daemon.wait_for("vda", "ready");
    qmp.ok("blkmirror-set", json!({ "export": "vda", "speed": 4096 }));
    let mut guest = Client::connect(&daemon.socket(), "vda", Replies::Simple).expect("a connection");
    guest.ask(&Request::Write { at: 0, bytes: vec![7; 4 << 20] });
    truth[..4 << 20].fill(7);
    let error = qmp.refused("block-job-abort", json!({ "export": "vda", "flags": 2 }));
    assert!(error["code"] == "OPERATION_FAILED" && error["desc"].to_string().contains("the pause allows"), "{error}");
    // It is as it was, and ready again when it has caught up.
    qmp.status("move", "waiting");
    qmp.status("move", "ready");
    assert_eq!(daemon.status("vda")["serving"], chain.top.display().to_string());
    qmp.ok("blkmirror-set", json!({ "export": "vda", "speed": 0 }));
    qmp.ok("block-job-abort", json!({ "export": "vda", "flags": 2 }));
    let mut daemon = daemon;
    daemon.stop();
    assert_same("the target", &content(&target, "raw"), &truth);
}

/// What a cancel means depends on when it comes; every door has the same.
#[test]
fn a_cancel_by_every_door() {
    for door in Door::ALL {
        let folder = folder();
        let chain = images::three_layers(folder.path(), DISK_LEN, 4);
        let truth = chain.content();
        let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
        let mut qmp = Qmp::connect(&daemon.control_socket());
        let target = folder.path().join("target");
        let slow = json!({ "export": "vda", "target": target, "speed": SLOW });
        qmp.ok("blkmirror-mirror", slow);
        door.cancel(&daemon, "vda").expect("a job that is under way");
        qmp.event("BLOCK_JOB_CANCELLED");
        qmp.status("vda", "null");
        std::fs::remove_file(&target).expect("what is left of it");
        let ask =
            Ask { export: "vda".to_owned(), target: target.display().to_string(), flags: "raw", ..Ask::default() };
        door.copy(&daemon, &ask, false).expect("a door").expect("it is possible");
        qmp.event("BLOCK_JOB_READY");
        door.cancel(&daemon, "vda").expect("a job that is ready");
        qmp.event("BLOCK_JOB_COMPLETED");
        qmp.status("vda", "null");
        assert_eq!(daemon.status("vda")["serving"], chain.top.display().to_string());
        assert_same("a copy of that instant", &content(&target, "raw"), &truth);
    }
}
