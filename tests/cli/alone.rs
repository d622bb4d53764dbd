//! The verbs that need no daemon, and the daemon itself by its words.
use crate::blkmirror;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().unwrap().to_string()
}

/// A raw image of 1 MiB with something in its middle.
fn raw(folder: &Path, name: &str) -> String {
    let mut bytes = vec![0; 1 << 20];
    bytes[300_000..500_000].fill(7);
    fs::write(folder.join(name), bytes).unwrap();
    path(folder, name)
}

#[test]
fn the_demo_loses_nothing_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let run = blkmirror(&["demo", "--size", "32M", "--folder", folder.path().to_str().unwrap()]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let verdict = "verdict  every acknowledged write is there: 8192 blocks compared, over NBD and in the closed image";
    assert_eq!(run.stdout.lines().last(), Some(verdict), "{run:?}");
    for word in ["copy ", "pivot ", "guest ", "waits "] {
        assert!(run.stdout.lines().any(|line| line.starts_with(word)), "{word}: {run:?}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the images are removed");
}

#[test]
fn a_copy_compares_as_the_same_and_a_changed_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (raw(folder.path(), "a.raw"), path(folder.path(), "b.qcow2"));
    let run = blkmirror(&["convert", &a, &b, "--source-format", "raw", "--format", "qcow2"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stdout.starts_with(&format!("{b}: ")) && run.stdout.lines().count() == 1, "{run:?}");
    let run = blkmirror(&["compare", &a, &b]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "the images read alike\n"), "{run:?}");

    let mut bytes = fs::read(&a).unwrap();
    bytes[400_000] = 8;
    fs::write(&a, bytes).unwrap();
    let run = blkmirror(&["compare", &a, &b]);
    let expected = (Some(1), "the images differ at byte 400000\n", "");
    assert_eq!((run.code, run.stdout.as_str(), run.stderr.as_str()), expected);
}

#[test]
fn a_comparison_tells_a_difference_from_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let (a, none) = (raw(folder.path(), "a.raw"), path(folder.path(), "none"));
    fs::write(folder.path().join("longer.raw"), [&fs::read(&a).unwrap()[..], &[0; 4096]].concat()).unwrap();
    let longer = path(folder.path(), "longer.raw");
    assert_eq!(blkmirror(&["compare", &a, &longer]).code, Some(0));
    let run = blkmirror(&["compare", "--strict", &a, &longer]);
    let expected = (Some(1), "the images differ in size: 1048576 and 1052672 bytes\n");
    assert_eq!((run.code, run.stdout.as_str()), expected);
    let run = blkmirror(&["compare", &a, &none]);
    assert!(run.code == Some(2) && run.stdout.is_empty() && run.stderr.contains(&none), "{run:?}");
}

#[test]
fn map_tells_of_each_run() {
    let folder = tempfile::tempdir().unwrap();
    let a = raw(folder.path(), "a.raw");
    let run = blkmirror(&["map", &a, "--json"]);
    let whole = r#"[{"start":0,"length":1048576,"depth":0,"present":true,"zero":false,"data":true,"compressed":false,"offset":0}]"#;
    assert_eq!((run.code, run.stdout.trim_end()), (Some(0), whole), "{run:?}");
    let run = blkmirror(&["map", &a]);
    let table =
        format!("{:16}{:16}{:16}File\n{:16}{:16}{:16}{a}\n", "Offset", "Length", "Mapped to", "0", "0x100000", "0");
    assert_eq!((run.code, run.stdout), (Some(0), table));
    fs::write(&a, "").unwrap();
    assert_eq!(blkmirror(&["map", &a, "--json"]).stdout, "[]\n");
    fs::write(&a, b"QFI\xfb\0\0\0\x03short").unwrap();
    let run = blkmirror(&["map", &a, "--json"]);
    assert!(run.code == Some(1) && run.stdout.is_empty() && run.stderr.contains(&a), "{run:?}");
}

#[test]
fn a_refused_convert_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (raw(folder.path(), "a.raw"), raw(folder.path(), "b.raw"));
    let before = fs::read(&b).unwrap();
    let run = blkmirror(&["convert", &a, &b, "--source-format", "raw"]);
    assert!(run.code == Some(1) && run.stdout.is_empty() && run.stderr.contains("b.raw"), "{run:?}");
    assert_eq!(fs::read(&b).unwrap(), before);
    let run = blkmirror(&["convert", &a, &path(folder.path(), "c.raw")]);
    assert!(run.code == Some(1) && run.stderr.contains("raw is never guessed"), "{run:?}");
    assert!(!folder.path().join("c.raw").exists());
}

#[test]
fn info_has_the_names_of_qemu_img() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (raw(folder.path(), "a.raw"), path(folder.path(), "b.qcow2"));
    assert_eq!(blkmirror(&["convert", &a, &b, "--source-format", "raw", "--format", "qcow2"]).code, Some(0));
    let run = blkmirror(&["info", &b, "--json"]);
    let facts: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((facts["format"].as_str(), facts["virtual-size"].as_u64()), (Some("qcow2"), Some(1 << 20)), "{run:?}");
    assert_eq!(facts["format-specific"]["data"]["compat"], "1.1");
    assert!(facts.get("backing-filename").is_none() && facts["cluster-size"].is_u64(), "{run:?}");
    let run = blkmirror(&["info", &b]);
    assert!(run.stdout.contains("size        1.00 MiB (1048576 bytes)\n"), "{run:?}");
    let run = blkmirror(&["info", &a]);
    assert!(run.code == Some(0) && run.stdout.contains("format      raw, or one without a known header\n"), "{run:?}");
}

#[test]
fn what_is_no_image_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("cut.qcow2"), b"QFI\xfb\0\0\0\x03short").unwrap();
    fs::write(folder.path().join("x.vmdk"), b"KDMV").unwrap();
    let cases = [("none", "No such file"), ("cut.qcow2", "header"), ("x.vmdk", "VMDK"), (".", "neither a file nor")];
    for (name, words) in cases {
        let file = path(folder.path(), name);
        let run = blkmirror(&["info", &file]);
        assert!(run.code == Some(1) && run.stdout.is_empty(), "{run:?}");
        assert!(run.stderr.contains(&file) && run.stderr.contains(words), "{run:?}");
    }
}

#[test]
fn serve_says_one_line_and_tells_systemd() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw(folder.path(), "a,b.raw");
    let notify = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    let [socket, control, state] = ["nbd", "control", "state"].map(|name| path(folder.path(), name));
    let export = format!("vda={},format=raw", image.replace(',', ",,"));
    let words = ["serve", "--export", &export, "--socket", &socket, "--control", &control, "--state", &state];
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_blkmirror"))
        .args(words)
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(daemon.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.starts_with("serving vda"), "{line}");
    // Whoever has read the line finds the sockets.
    let run = blkmirror(&["status", "--control", &control, "vda", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((status["phase"].as_str(), status["serving"].as_str()), (Some("none"), Some(image.as_str())));
    let mut told = [0; 512];
    let len = notify.recv(&mut told).unwrap();
    assert!(told[..len].starts_with(b"READY=1\n"));
    assert_eq!(blkmirror(&["quit", "--control", &control]).code, Some(0));
    assert!(daemon.wait().unwrap().success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "one line");
    assert!(!Path::new(&socket).exists() && !Path::new(&control).exists(), "its sockets go with it");
}

#[test]
fn a_serve_that_cannot_start_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw(folder.path(), "a.raw");
    let [socket, control, none] = ["nbd", "control", "none"].map(|name| path(folder.path(), name));
    for (exports, words) in [
        (vec![format!("vda={none}")], "No such file"),
        (vec![format!("vda={image}")], "raw is never guessed"),
        (vec![format!("vda={image},format=raw"), format!("vda={image},format=raw")], "vda"),
    ] {
        let mut all = vec!["serve", "--socket", &socket, "--control", &control];
        exports.iter().for_each(|export| all.extend(["--export", export]));
        let run = blkmirror(&all);
        assert!(run.code == Some(1) && run.stdout.is_empty() && run.stderr.contains(words), "{run:?}");
        assert!(!Path::new(&socket).exists() && !Path::new(&control).exists(), "no socket before it serves");
    }
}
