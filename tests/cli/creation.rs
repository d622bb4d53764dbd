//! Targets made as asked, against those that qemu-img makes.
use crate::blkmirror;
use std::fs;
use std::path::Path;
use std::process::Command;

pub fn qemu_img(folder: &Path, words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).current_dir(folder).output().expect("install qemu-utils");
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    assert!(output.status.success(), "qemu-img {words:?}: {}", said.escape_ascii());
    String::from_utf8(output.stdout).unwrap()
}

/// What qemu-img says of an image, without its name and the space that it takes.
pub fn facts(folder: &Path, name: &str) -> serde_json::Value {
    let said = qemu_img(folder, &["info", "--output=json", name]);
    let mut facts: serde_json::Value = serde_json::from_str(&said).unwrap();
    for volatile in ["filename", "children", "actual-size"] {
        facts.as_object_mut().unwrap().remove(volatile);
    }
    facts
}

pub fn space(folder: &Path, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(folder.join(name)).unwrap().blocks() * 512
}

fn convert(folder: &Path, words: &[&str]) -> crate::Run {
    let words: Vec<String> = words
        .iter()
        .map(|word| {
            if !word.contains('=') && (word.contains(".qcow2") || word.contains(".raw")) {
                folder.join(word).display().to_string()
            } else {
                (*word).to_owned()
            }
        })
        .collect();
    let words: Vec<&str> = ["convert"].into_iter().chain(words.iter().map(String::as_str)).collect();
    blkmirror(&words)
}

/// 5 MiB and half a cluster of a source, with data, zeroes and holes.
fn source(folder: &Path) -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + (32 << 10)];
    for (at, byte) in bytes.iter_mut().enumerate().filter(|(at, _)| at >> 18 & 3 == 1) {
        *byte = (at >> 9) as u8 | 1;
    }
    fs::write(folder.join("source.raw"), &bytes).unwrap();
    bytes
}

#[test]
fn targets_have_the_facts_of_those_that_qemu_img_makes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let size = source(folder).len().to_string();
    for options in [
        "cluster_size=4k,refcount_bits=1,compression_type=zstd",
        "compat=0.10,cluster_size=512",
        "compat=1.1,lazy_refcounts=on,refcount_bits=64,cluster_size=2M",
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=512,refcount_bits=64",
        "preallocation=metadata,compat=0.10",
        "preallocation=falloc,cluster_size=128k",
        "preallocation=full",
    ] {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, "theirs.qcow2", &size]);
        let run = convert(
            folder,
            &["source.raw", "ours.qcow2", "--source-format", "raw", "--format", "qcow2", "-o", options],
        );
        assert_eq!(run.code, Some(0), "{options}: {run:?}");
        assert_eq!(facts(folder, "ours.qcow2"), facts(folder, "theirs.qcow2"), "{options}");
        qemu_img(folder, &["check", "-q", "ours.qcow2"]);
        qemu_img(folder, &["compare", "-q", "-f", "raw", "source.raw", "ours.qcow2"]);
        if options.contains("falloc") || options.contains("full") {
            assert!(space(folder, "ours.qcow2") >= 5 << 20, "{options}: what was set aside is kept");
        }
        if options.contains("preallocation") {
            // Each cluster has its place still: zeroes keep it.
            let (ours, theirs) =
                (qemu_img(folder, &["check", "ours.qcow2"]), qemu_img(folder, &["check", "theirs.qcow2"]));
            let allocated = |said: &str| said.lines().find(|line| line.contains("allocated")).map(str::to_owned);
            let clusters = |said: &str| allocated(said).and_then(|line| line.split(' ').next().map(str::to_owned));
            assert!(clusters(&ours).is_some() && clusters(&ours) == clusters(&theirs), "{options}: {ours} {theirs}");
        }
        fs::remove_file(folder.join("ours.qcow2")).unwrap();
    }
}

#[test]
fn the_payload_can_be_in_a_file_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let bytes = source(folder);
    let qcow2 = ["source.raw", "ours.qcow2", "--source-format", "raw", "--format", "qcow2", "-o"];
    for options in [
        "data_file=payload",
        "data_file=payload,data_file_raw=on",
        "data_file=payload,extended_l2=on,cluster_size=128k",
        "data_file=payload,preallocation=metadata",
        "data_file=payload,preallocation=falloc",
    ] {
        let run = convert(folder, &[&qcow2[..], &[options]].concat());
        assert_eq!(run.code, Some(0), "{options}: {run:?}");
        qemu_img(folder, &["check", "-q", "ours.qcow2"]);
        qemu_img(folder, &["compare", "-q", "-f", "raw", "source.raw", "ours.qcow2"]);
        assert!(space(folder, "ours.qcow2") < 1 << 20, "{options}: tables alone");
        if options.contains("raw=on") {
            assert!(fs::read(folder.join("payload")).unwrap() == bytes, "{options}: the disk by itself");
        }
        // What is there stays.
        fs::remove_file(folder.join("ours.qcow2")).unwrap();
        let run = convert(folder, &[&qcow2[..], &[options]].concat());
        assert!(run.code == Some(1) && run.stderr.contains("it is there already and not empty"), "{run:?}");
        assert!(!folder.join("ours.qcow2").exists());
        fs::remove_file(folder.join("payload")).unwrap();
    }
    for (options, said) in [
        ("data_file_raw=on", "data_file_raw=on: only together with data_file"),
        ("data_file=ours.qcow2", "it is the target itself"),
        ("data_file=source.raw", "is a layer of the source"),
        ("data_file=json:{}", "is not a plain path"),
        ("data_file=payload,compat=0.10", "version 2"),
    ] {
        let run = convert(folder, &[&qcow2[..], &[options]].concat());
        assert!(run.code == Some(1) && run.stderr.contains(said), "{options}: {run:?}");
        assert!(!folder.join("ours.qcow2").exists() && !folder.join("payload").exists(), "{options}");
    }
    let run = convert(folder, &[&qcow2[..], &["data_file=payload", "--compress"]].concat());
    assert!(run.code == Some(1) && run.stderr.contains("no compressed clusters"), "{run:?}");
}

#[test]
fn raw_targets_are_preallocated() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let bytes = source(folder);
    for (options, at_least) in
        [("preallocation=off", 0), ("preallocation=falloc", 5 << 20), ("preallocation=full", 5 << 20)]
    {
        let run = convert(folder, &["source.raw", "ours.raw", "--source-format", "raw", "-o", options]);
        assert_eq!(run.code, Some(0), "{options}: {run:?}");
        assert!(fs::read(folder.join("ours.raw")).unwrap() == bytes, "{options}");
        assert!(space(folder, "ours.raw") >= at_least, "{options}: {}", space(folder, "ours.raw"));
        fs::remove_file(folder.join("ours.raw")).unwrap();
    }
}

#[test]
fn what_is_not_said_is_as_in_the_sources_top_layer() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for options in [
        "compat=0.10,cluster_size=8k",
        "compat=1.1,refcount_bits=32,lazy_refcounts=on,compression_type=zstd,cluster_size=256k",
    ] {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, "source.qcow2", "3M"]);
        assert_eq!(convert(folder, &["source.qcow2", "ours.qcow2"]).code, Some(0));
        assert_eq!(facts(folder, "ours.qcow2"), facts(folder, "source.qcow2"), "{options}");
        fs::remove_file(folder.join("ours.qcow2")).unwrap();
    }
    // Version 2 has none of the source's other facts, and nobody asked for them.
    assert_eq!(convert(folder, &["source.qcow2", "ours.qcow2", "-o", "compat=0.10"]).code, Some(0));
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=256k", "theirs.qcow2", "3M"]);
    assert_eq!(facts(folder, "ours.qcow2"), facts(folder, "theirs.qcow2"));
}

#[test]
fn wrong_options_are_refused_by_name_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    source(folder);
    let raw = ["source.raw", "ours.raw", "--source-format", "raw"];
    let qcow2 = ["source.raw", "ours.qcow2", "--source-format", "raw", "--format", "qcow2"];
    for (words, options, code, said) in [
        (&qcow2[..], "cluster_size=256", 1, "cluster_size=256: it has to be a power of two from 512 to 2097152"),
        (&qcow2, "refcount_bits=128", 1, "refcount_bits=128: it has to be a power of two from 1 to 64"),
        (&qcow2, "cluster_size=1000", 2, "cluster_size=1000: expected a power of two"),
        (&qcow2, "compat=0.10,refcount_bits=8", 1, "version 2 has refcounts of 16 bits only"),
        (&qcow2, "compat=0.10,lazy_refcounts=on", 1, "version 2 has neither lazy refcounts"),
        (&qcow2, "nosuch=1", 2, "unknown option 'nosuch'"),
        (&raw, "cluster_size=4k", 1, "cluster_size: a raw target has no such option"),
        (&raw, "preallocation=metadata", 1, "preallocation=metadata: a raw target has no metadata"),
    ] {
        let words: Vec<&str> = words.iter().copied().chain(["-o", options]).collect();
        let run = convert(folder, &words);
        assert!(run.code == Some(code) && run.stderr.contains(said), "{options}: {run:?}");
        assert!(!folder.join("ours.raw").exists() && !folder.join("ours.qcow2").exists(), "{options}");
    }
    fs::write(folder.join("ours.raw"), vec![0; (5 << 20) + (32 << 10)]).unwrap();
    let there = ["source.raw", "ours.raw", "--source-format", "raw", "--format", "raw", "--reuse-external"];
    let run = convert(folder, &[&there[..], &["-o", "preallocation=falloc"]].concat());
    assert!(run.code == Some(1) && run.stderr.contains("there already"), "{run:?}");
}
