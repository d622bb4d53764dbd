//! `check` by its words and exit status, and images that were left dirty.
use crate::{Run, blkmirror};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Runs a tool of QEMU's, whatever it says of itself.
fn tool(program: &str, words: &[&str]) -> Output {
    Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{program}: {error}: install qemu-utils"))
}

/// An image with 128 KiB of payload in two clusters, and something of it changed.
fn image(folder: &Path, options: &str, change: impl Fn(&mut Vec<u8>)) -> String {
    let path = folder.join("a.qcow2").to_str().unwrap().to_string();
    assert!(tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &path, "1M"]).status.success());
    assert!(tool("qemu-io", &["-c", "write -P 7 0 128k", &path]).status.success());
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    path
}

/// The refcount of `cluster`, in an image with the default options.
fn count(bytes: &mut [u8], cluster: usize, count: u8) {
    bytes[2 * 0x1_0000 + cluster * 2 + 1] = count;
}

fn check(path: &str, more: &[&str]) -> Run {
    blkmirror(&[&["check", path], more].concat())
}

/// The numbers and exit status of qemu-img for the same file.
fn assert_as_qemu(path: &str) {
    let ours = check(path, &["--json"]);
    let theirs = tool("qemu-img", &["check", "--output=json", path]);
    let numbers = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap();
    assert_eq!(numbers(ours.stdout.as_bytes()), numbers(&theirs.stdout));
    assert_eq!(ours.code, theirs.status.code());
}

const NUMBERS: &str = "2 of 16 clusters allocated, 0 fragmented, 0 compressed; the image ends at 458752\n";

#[test]
fn a_whole_image_is_0() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "compat=1.1", |_| ());
    let run = check(&path, &[]);
    assert_eq!((run.code, run.stdout, run.stderr), (Some(0), format!("nothing is wrong\n{NUMBERS}"), String::new()));
    assert_as_qemu(&path);
}

#[test]
fn a_leak_is_3_and_is_mended_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "compat=1.1", |bytes| {
        bytes.resize(0x9_0000, 0);
        count(bytes, 7, 1);
        count(bytes, 8, 5);
    });
    let run = check(&path, &[]);
    let told = "\
leak: cluster 7 is counted 1 times and used 0 times
leak: cluster 8 is counted 5 times and used 0 times
2 leaks: space is wasted, and no data is harmed
2 of 16 clusters allocated, 0 fragmented, 0 compressed; the image ends at 589824
";
    assert_eq!((run.code, run.stdout.as_str()), (Some(3), told));
    assert_eq!(run.stderr, format!("mend it with `blkmirror check --repair all {path}`\n"));
    assert_as_qemu(&path);

    let run = check(&path, &["--repair", "leaks"]);
    let told = format!("mended: 0 corruptions, 2 leaks\nnothing is wrong\n{NUMBERS}");
    assert_eq!((run.code, run.stdout, run.stderr), (Some(0), told, String::new()));
    assert_as_qemu(&path);
}

#[test]
fn a_corruption_is_2_and_all_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "compat=1.1", |bytes| {
        count(bytes, 5, 0);
        // The corrupt bit.
        bytes[79] |= 2;
    });
    let run = check(&path, &[]);
    let told = "\
cluster 5 is counted 0 times and used 1 times
L2 table at 262144: entry 0 is 0x8000000000050000: the copied flag is set, and its refcount is not 1
2 corruptions: data may be lost, or be lost by further writes
";
    assert_eq!((run.code, run.stdout), (Some(2), format!("{told}{NUMBERS}")));
    assert_as_qemu(&path);

    let run = check(&path, &["--repair", "leaks"]);
    let told = "clusters in use count as free, or the refcounts are broken: use `blkmirror check --repair all FILE`";
    assert_eq!((run.code, run.stderr), (Some(1), format!("blkmirror: {path}: {told}\n")));

    let refused =
        blkmirror(&["serve", "--export", &format!("vda={path}"), "--socket", "/none/n", "--control", "/none/c"]);
    let told = "incompatible feature bit 1 (corrupt) is set: mend it with `blkmirror check --repair all FILE`";
    assert!(refused.code == Some(1) && refused.stderr.contains(told), "{refused:?}");

    let run = check(&path, &["--repair", "all", "--json"]);
    let numbers: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((run.code, &numbers["corruptions-fixed"], &numbers["check-errors"]), (Some(0), &1.into(), &0.into()));
    assert_as_qemu(&path);
    assert_eq!(fs::read(&path).unwrap()[79] & 3, 0, "its bits are cleared");
}

#[test]
fn what_has_nothing_to_check_is_63() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(folder.path().join(name), bytes).unwrap();
        folder.path().join(name).to_str().unwrap().to_string()
    };
    for (path, more, format) in [
        (file("a.raw", &[0; 4096]), &[][..], "raw"),
        (file("a.vmdk", b"KDMV"), &[], "VMDK"),
        (file("a.qcow2", b"QFI\xfb\0\0\0\x03"), &["--format", "raw"], "raw"),
    ] {
        let run = check(&path, more);
        let told = format!("blkmirror: {path}: the format {format} has nothing that can be checked\n");
        assert_eq!((run.code, run.stdout.as_str(), run.stderr), (Some(63), "", told));
    }
}

#[test]
fn what_cannot_be_checked_is_1() {
    let folder = tempfile::tempdir().unwrap();
    let none = folder.path().join("none").to_str().unwrap().to_string();
    let cut = folder.path().join("cut.qcow2").to_str().unwrap().to_string();
    fs::write(&cut, b"QFI\xfb\0\0\0\x03short").unwrap();
    for (path, words) in [(&none, "No such file"), (&cut, "header")] {
        let run = check(path, &[]);
        assert!(run.code == Some(1) && run.stdout.is_empty(), "{run:?}");
        assert!(run.stderr.contains(path.as_str()) && run.stderr.contains(words), "{run:?}");
    }
    let path = image(folder.path(), "compat=1.1", |_| ());
    assert_eq!(check(&path, &["--repair", "some"]).code, Some(2), "misused");
}

/// An image whose writer was killed before it wrote any refcount.
fn left_dirty(folder: &Path) -> String {
    let path: PathBuf = folder.join("dirty.qcow2");
    let name = path.to_str().unwrap().to_string();
    assert!(
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", &name, "1M"]).status.success()
    );
    let mut writer = Command::new("qemu-io")
        .args(["-c", "write -P 7 0 256k", "-c", "flush", "-c", "sigraise 9", &name])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(!writer.wait().unwrap().success(), "it killed itself");
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 1, "dirty");
    name
}

#[test]
fn an_image_that_was_left_dirty_is_read_as_it_is_and_mended_for_writing() {
    let folder = tempfile::tempdir().unwrap();
    let path = left_dirty(folder.path());
    let before = fs::read(&path).unwrap();
    let raw = folder.path().join("a.raw").to_str().unwrap().to_string();
    let run = blkmirror(&["convert", &path, &raw, "--format", "raw"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(fs::read(&raw).unwrap()[..256 << 10].iter().all(|byte| *byte == 7));
    assert!(fs::read(&path).unwrap() == before, "reading mends nothing");
    assert_as_qemu(&path);

    // A target is opened for writing, and its own bytes are overwritten.
    let run = blkmirror(&["convert", &raw, &path, "--source-format", "raw", "--reuse-external"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("its last writer left it dirty; ") && run.stderr.contains(" were mended"), "{run:?}");
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 0, "clean");
    assert_as_qemu(&path);
    assert_eq!(tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &path, &raw]).status.code(), Some(0));
}
