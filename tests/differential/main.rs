//! This program against qemu-img on random images: the bytes, the extents, the facts and what is wrong are the same; and against other
//! readers of qcow2, where they can read the image.
//!
//! `IMAGES` says how many (100 where it is not given), `SEED` from which one on. A failure tells how its image was made,
//! and `SEED=N IMAGES=1` makes it again.
mod oracles;
#[path = "../support/mod.rs"]
mod support;
mod zoo;

use oracles::Oracle;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::tools::{content, output, ran};
use support::{assert_same, folder};
use zoo::{Layer, Zoo};

#[test]
fn qemu_img_sees_what_we_see() {
    let (first, images) = (number("SEED", 1), number("IMAGES", 100));
    let (mut asked, mut lost) = (BTreeMap::new(), 0);
    for seed in first..first + images {
        let folder = folder();
        let zoo = Zoo::new(folder.path(), seed);
        if zoo.lost {
            lost += 1;
            continue;
        }
        same_extents(&zoo);
        same_table(&zoo);
        let theirs = same_facts(&zoo);
        same_verdict(&zoo);
        let bytes = same_bytes(&zoo, folder.path());
        for oracle in Oracle::ALL.into_iter().filter(|oracle| oracle.reads(&theirs)) {
            assert_same(&format!("{oracle:?}: {}", zoo.told), &bytes, &oracle.content(&zoo.top().file));
            *asked.entry(oracle).or_insert(0) += 1;
        }
    }
    assert!(lost <= 1 + images / 100, "qemu-img crashed for {lost} of {images} images");
    // A filter that lets nothing through would look like peace.
    assert!(images < 20 || Oracle::ALL.iter().all(|oracle| asked.contains_key(oracle)), "{asked:?}");
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) => default,
    }
}

fn blkmirror() -> Command {
    Command::new(env!("CARGO_BIN_EXE_blkmirror"))
}

#[track_caller]
fn json(command: &mut Command, zoo: &Zoo) -> Value {
    serde_json::from_str(&said(command, zoo)).unwrap_or_else(|error| panic!("{command:?}: {error}\n{}", zoo.told))
}

#[track_caller]
fn said(command: &mut Command, zoo: &Zoo) -> String {
    let output = output(command);
    assert!(output.status.success(), "{}\n{}", support::tools::told(command, &output), zoo.told);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn same_extents(zoo: &Zoo) {
    let Layer { file, format, .. } = zoo.top();
    let ours = json(blkmirror().args(["map", "--json", "--format", format]).arg(file), zoo);
    let theirs = json(Command::new("qemu-img").args(["map", "--output=json", "-f", format]).arg(file), zoo);
    assert_eq!(lines(&ours), lines(&theirs), "map, ours and theirs: {}", zoo.told);
}

fn lines(runs: &Value) -> Vec<String> {
    runs.as_array().expect("an array").iter().map(Value::to_string).collect()
}

/// Both refuse an image with compressed clusters, after the runs before those.
fn same_table(zoo: &Zoo) {
    let Layer { file, format, .. } = zoo.top();
    let ours = output(blkmirror().args(["map", "--format", format]).arg(file));
    let theirs = output(Command::new("qemu-img").args(["map", "-f", format]).arg(file));
    assert_eq!(ours.status.code(), theirs.status.code(), "{}", zoo.told);
    if ours.status.success() {
        let real = file.canonicalize().expect("it is there").display().to_string();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&real, &file.display().to_string());
        assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{}", zoo.told);
    }
}

/// Each fact that qemu-img tells is among ours. Returns theirs.
fn same_facts(zoo: &Zoo) -> Value {
    let Layer { file, format, .. } = zoo.top();
    let arguments = ["info", "--backing-chain"];
    let ours = json(blkmirror().args(arguments).arg("--json").arg(file), zoo);
    let theirs = json(Command::new("qemu-img").args(arguments).args(["--output=json", "-f", format]).arg(file), zoo);
    let mut missing = Vec::new();
    differences("", &ours, &theirs, &mut missing);
    assert!(missing.is_empty(), "info: {missing:#?}\n{}", zoo.told);
    theirs
}

fn differences(place: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (name, theirs) in theirs {
                differences(&format!("{place}.{name}"), ours.get(name).unwrap_or(&Value::Null), theirs, found);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                differences(&format!("{place}[{index}]"), ours, theirs, found);
            }
        }
        _ if ours == theirs || says_nothing(theirs) => {}
        // Ours is the exact length, QEMU's that in sectors.
        _ if place.ends_with(".virtual-size") && sectors(ours) == sectors(theirs) => {}
        _ => found.push(format!("{place}: ours {ours}, theirs {theirs}")),
    }
}

/// An empty list, or the format of a plain file, which has nothing specific.
fn says_nothing(theirs: &Value) -> bool {
    theirs.as_array().is_some_and(Vec::is_empty) || theirs["data"].as_object().is_some_and(|data| data.is_empty())
}

/// Exit status and numbers of `check` are qemu-img's, of each layer.
fn same_verdict(zoo: &Zoo) {
    for Layer { file, format, .. } in &zoo.layers {
        let ours = output(blkmirror().args(["check", "--json", "--format", format]).arg(file));
        let theirs = output(Command::new("qemu-img").args(["check", "--output=json", "-f", format]).arg(file));
        let told = format!("{ours:?}\n{theirs:?}\n{}", zoo.told);
        assert_eq!(ours.status.code(), theirs.status.code(), "{told}");
        // What cannot be checked has no numbers.
        if *format == "qcow2" {
            let numbers = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or_else(|_| panic!("{told}"));
            assert_eq!(numbers(&ours.stdout), numbers(&theirs.stdout), "{told}");
        }
    }
}

fn sectors(len: &Value) -> Option<u64> {
    len.as_u64().map(|len| len.div_ceil(512))
}

/// Returns what the disk holds.
fn same_bytes(zoo: &Zoo, folder: &Path) -> Vec<u8> {
    let Layer { file, format, .. } = zoo.top();
    let flat = folder.join("ours.raw");
    let formats = ["--source-format", format, "--format", "raw", "--cache", "unsafe"];
    said(blkmirror().arg("convert").arg(file).arg(&flat).args(formats), zoo);
    let mut ours = fs::read(&flat).expect("what was converted");
    // QEMU makes the last sector of a raw disk whole.
    ours.resize(ours.len().next_multiple_of(512), 0);
    assert_same(&zoo.told, &ours, &content(file, format));
    ours
}

/// The end of the table is an error where compressed clusters begin; it names the other way.
#[test]
fn a_table_has_no_place_for_compressed_clusters() {
    let folder = folder();
    let file = folder.path().join("compressed.qcow2");
    support::images::create(&file, "qcow2", 1 << 20, &[]);
    ran(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 64k", "-c", "write -c 128k 64k"]).arg(&file));
    let ours = output(blkmirror().arg("map").arg(&file));
    assert_eq!(ours.status.code(), Some(1));
    let told = String::from_utf8_lossy(&ours.stderr);
    assert!(told.contains("131072 bytes") || told.contains("65536 bytes at 131072"), "{told}");
    assert!(told.contains("--json"), "{told}");
}

#[test]
fn a_chain_that_has_no_end_is_named() {
    let folder = folder();
    let [a, b] = ["a.qcow2", "b.qcow2"].map(|name| folder.path().join(name));
    support::images::create(&a, "qcow2", 1 << 20, &[]);
    support::images::overlay(&b, "a.qcow2", "qcow2", None, &[]);
    ran(Command::new("qemu-img").args(["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2"]).arg(&a));
    for verb in [&["map"][..], &["info", "--backing-chain"]] {
        let ours = output(blkmirror().args(verb).arg(&b));
        let told = String::from_utf8_lossy(&ours.stderr);
        assert_eq!(ours.status.code(), Some(1), "{verb:?}: {told}");
        assert!(told.contains("a.qcow2") && told.contains("the chain is a loop"), "{verb:?}: {told}");
    }
}

/// Exit statuses and verdicts of `compare`, strict and not, are qemu-img's.
#[test]
fn compare_ends_as_qemu_img_does() {
    let folder = folder();
    let made = |name: &str, size: u64, orders: &[&str]| {
        let file = folder.path().join(name);
        support::images::create(&file, "qcow2", size, &[]);
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        for order in orders {
            command.args(["-c", order]);
        }
        ran(command.arg(&file));
        file
    };
    let plain = made("plain.qcow2", 1 << 20, &["write -P 7 0 64k"]);
    let others = [
        plain.clone(),
        made("same.qcow2", 1 << 20, &["write -P 7 0 64k"]),
        made("zeroed.qcow2", 1 << 20, &["write -P 7 0 64k", "write -z 256k 64k"]),
        made("zeroes.qcow2", 1 << 20, &["write -P 7 0 64k", "write -P 0 256k 64k"]),
        made("packed.qcow2", 1 << 20, &["write -c -P 7 0 64k"]),
        made("longer.qcow2", 2 << 20, &["write -P 7 0 64k"]),
        made("changed.qcow2", 1 << 20, &["write -P 7 0 64k", "write -P 8 512 512"]),
        made("more.qcow2", 2 << 20, &["write -P 7 0 64k", "write -P 8 1536k 512"]),
        folder.path().join("none.qcow2"),
    ];
    for other in &others {
        for (ours, theirs) in [(&[][..], &[][..]), (&["--strict"], &["-s"])] {
            let ours = output(blkmirror().arg("compare").args(ours).args([&plain, other]));
            let theirs = output(Command::new("qemu-img").arg("compare").args(theirs).args([&plain, other]));
            assert_eq!(ours.status.code(), theirs.status.code(), "{}: {ours:?}\n{theirs:?}", other.display());
        }
    }
}
