//! External data files by the program's words: what is refused, and by which file; what `info` says; `convert`.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{create, data_file, fill_plain, holding, overlay};
use crate::support::random::Random;
use crate::support::tools::{check, content, output, ran, run, told};
use crate::support::{assert_same, folder};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 16 << 20;

/// An image `name` in `folder`, and its data file.
fn image(folder: &Path, name: &str, raw: bool) -> (PathBuf, PathBuf) {
    let top = folder.join(name);
    let (option, data) = data_file(&top, raw);
    create(&top, "qcow2", DISK_LEN, &["-o", &option]);
    (top, data)
}

/// Gives an image without backing another name for its data file, as no tool does.
fn rename(image: &Path, name: &str) {
    let file = std::fs::File::options().write(true).open(image).expect("a file of ours");
    let mut extension = (name.len() as u32).to_be_bytes().to_vec();
    extension.extend_from_slice(name.as_bytes());
    extension.resize(4 + name.len().next_multiple_of(8), 0);
    // The end of the extensions.
    extension.extend_from_slice(&[0; 8]);
    file.write_all_at(&extension, 116).expect("writing a file of ours");
}

/// The program with these words does it; returns what it said.
#[track_caller]
fn blkmirror(words: &[&str]) -> String {
    ran(Command::new(program()).args(words))
}

/// The program with these words is refused; returns what it said.
#[track_caller]
fn refused(words: &[&str]) -> String {
    let mut command = Command::new(program());
    let output = output(command.args(words));
    assert_eq!(output.status.code(), Some(1), "{}", told(&command, &output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn serve_refused(folder: &Path, exports: &[String]) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    let (socket, control, state) = (path("nbd"), path("control"), path("state"));
    let mut words = vec!["serve", "--socket", &socket, "--control", &control, "--state", &state];
    for export in exports {
        words.extend(["--export", export]);
    }
    refused(&words)
}

#[test]
fn a_data_file_that_cannot_be_is_an_error_that_names_image_and_file() {
    let folder = folder();
    let (top, data) = image(folder.path(), "disk.qcow2", false);
    let export = [format!("vda={}", top.display())];
    std::fs::create_dir(folder.path().join("directory")).expect("a folder of ours");
    run("mkfifo", &[folder.path().join("fifo")]);
    let full = |name: &str| folder.path().join(name).display().to_string();
    std::fs::remove_file(&data).expect("a file of ours");
    for (name, words) in [
        (full("disk.data"), "No such file"),
        (full("directory"), "directory"),
        (full("fifo"), "neither a regular file"),
        (full("disk.qcow2"), "the image itself"),
        ("disk.qcow2".to_owned(), "the image itself"),
        ("none".to_owned(), "No such file"),
        ("json:{\"driver\":\"file\"}".to_owned(), "not a plain path"),
    ] {
        rename(&top, &name);
        for export in [export[0].clone(), format!("{},readonly", export[0])] {
            let said = serve_refused(folder.path(), &[export]);
            let file = name.rsplit('/').next().expect("a name").split('"').next().expect("a name");
            assert!(said.contains("disk.qcow2: its data file") && said.contains(file), "{name}: {said}");
            assert!(said.contains(words), "{name}: {said}");
        }
    }
}

#[test]
fn a_data_file_has_one_image() {
    let folder = folder();
    let (a, data) = image(folder.path(), "a.qcow2", false);
    let b = folder.path().join("b.qcow2");
    std::fs::copy(&a, &b).expect("a file of ours");
    let (a, b, data) = (a.display().to_string(), b.display().to_string(), data.display().to_string());
    for second in [format!("b={b}"), format!("b={b},readonly"), format!("b={data},format=raw,readonly")] {
        let said = serve_refused(folder.path(), &[format!("a={a}"), second.clone()]);
        assert!(said.contains("one writer"), "{second}: {said}");
    }
    // An overlay that writes where its backing reads.
    let top = folder.path().join("top.qcow2");
    let (option, _) = data_file(&top, false);
    overlay(&top, &a, "qcow2", None, &["-o", &option]);
    let shared = a.replace("a.qcow2", "a.data");
    let mut bytes = std::fs::read(&top).expect("a file of ours");
    let old = top.with_extension("data").display().to_string();
    let at = bytes.windows(old.len()).position(|part| part == old.as_bytes()).expect("its name");
    // Shorter by two bytes, and the same place.
    bytes[at..at + old.len()].copy_from_slice(shared.replace("/a.data", "/./a.data").as_bytes());
    std::fs::write(&top, bytes).expect("a file of ours");
    let said = serve_refused(folder.path(), &[format!("top={}", top.display())]);
    assert!(said.contains("has a file of a layer above it for its data file"), "{said}");
}

#[test]
fn a_target_in_the_files_of_its_source_is_refused() {
    let folder = folder();
    let (top, data) = image(folder.path(), "disk.qcow2", false);
    let (target, _) = image(folder.path(), "target.qcow2", false);
    let base = folder.path().join("base.raw");
    create(&base, "raw", DISK_LEN, &[]);
    let other = folder.path().join("other.raw");
    create(&other, "raw", DISK_LEN, &[]);
    let name = |path: &Path| path.display().to_string();
    let exports = [format!("vda={}", top.display()), format!("vdb={},format=raw", other.display())];
    let mut daemon = Daemon::serve(folder.path(), &exports);
    let said = daemon.refused("mirror", &["vda", &name(&data), "--reuse-external", "--raw"]);
    assert!(said.contains("is a layer of the source"), "{said}");
    rename(&target, &name(&data));
    let said = daemon.refused("mirror", &["vda", &name(&target), "--reuse-external"]);
    assert!(said.contains("or its data file, is a layer of the source"), "{said}");
    rename(&target, &name(&other));
    let said = daemon.refused("mirror", &["vda", &name(&target), "--reuse-external"]);
    assert!(said.contains("export vdb uses it"), "{said}");
    // What was once written into a raw volume names nothing.
    std::fs::File::options().write(true).open(&target).and_then(|file| file.set_len(DISK_LEN)).expect("a sparse file");
    daemon.ok("mirror", &["vda", &name(&target), "--reuse-external", "--raw", "--dry-run"]);
    daemon.stop();
    let said = refused(&["convert", &name(&top), &name(&data), "--reuse-external", "--format", "raw"]);
    assert!(said.contains("is a layer of the source"), "{said}");
}

#[test]
fn info_names_the_data_file() {
    for raw in [false, true] {
        let folder = folder();
        let (top, data) = image(folder.path(), "disk.qcow2", raw);
        let top = top.display().to_string();
        let said = blkmirror(&["info", &top]);
        let line = said.lines().find(|line| line.starts_with("data file")).expect("a line");
        assert!(line.contains(&data.display().to_string()) && line.ends_with("(raw)") == raw, "{said}");
        let said: serde_json::Value = serde_json::from_str(&blkmirror(&["info", "--json", &top])).expect("JSON");
        let (ours, theirs) = (&said["format-specific"]["data"], crate::support::tools::info(Path::new(&top)));
        for field in ["data-file", "data-file-raw"] {
            assert_eq!(ours[field], theirs["format-specific"]["data"][field], "{field}");
        }
    }
}

#[test]
fn convert_reads_from_and_writes_into_data_files() {
    let folder = folder();
    let (source, _) = image(folder.path(), "source.qcow2", false);
    fill_plain(&source, "qcow2", DISK_LEN, &mut Random::new(1));
    let truth = content(&source, "qcow2");
    for (raw, cache) in [(false, "none"), (true, "none"), (true, "writeback")] {
        let target = folder.path().join(format!("target-{raw}-{cache}.qcow2"));
        let (option, data) = data_file(&target, raw);
        holding(&target, "qcow2", &vec![0xdd; DISK_LEN as usize], &["-o", &option]);
        let (source, name) = (source.display().to_string(), target.display().to_string());
        blkmirror(&["convert", &source, &name, "--reuse-external", "--cache", cache]);
        assert_same("the target", &content(&target, "qcow2"), &truth);
        check(&target, "qcow2");
        if raw {
            assert_same("the data file alone", &content(&data, "raw"), &truth);
        }
    }
}
