//! `convert --compress`: what QEMU reads, and takes for whole.
use crate::blkmirror;
use crate::creation::{facts, qemu_img, space};
use std::fs;
use std::path::Path;

/// Text, noise, zeroes and holes that begin anywhere; 9 MiB and a sector.
fn source(folder: &Path) {
    let mut state = 1_u64;
    let mut noise = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 33) as u8
    };
    let byte = |at: usize| match at / 150_000 % 5 {
        0 => noise(),
        1 => 0,
        2 if at.is_multiple_of(64) => noise(),
        _ => (at / 300) as u8 | 1,
    };
    let bytes: Vec<u8> = (0..(9 << 20) + 512).map(byte).collect();
    fs::write(folder.join("source.raw"), bytes).unwrap();
    qemu_img(
        folder,
        &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "source.raw", "source.qcow2"],
    );
}

#[test]
fn compressed_targets_are_those_of_qemu_img() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    source(folder);
    let (from, to) = (folder.join("source.qcow2"), folder.join("ours.qcow2"));
    for options in [
        "compression_type=zlib,cluster_size=64k",
        "compression_type=zstd,cluster_size=64k",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=4k,refcount_bits=1",
        "compression_type=zlib,cluster_size=2M,refcount_bits=2",
        "compat=0.10,cluster_size=32k",
    ] {
        for cache in ["none", "unsafe"] {
            let words =
                ["convert", "-c", "-o", options, "--cache", cache, from.to_str().unwrap(), to.to_str().unwrap()];
            let run = blkmirror(&words);
            assert_eq!(run.code, Some(0), "{options}: {run:?}");
            let theirs = ["convert", "-c", "-O", "qcow2", "-o", options, "source.qcow2", "theirs.qcow2"];
            qemu_img(folder, &theirs);
            assert_eq!(facts(folder, "ours.qcow2"), facts(folder, "theirs.qcow2"), "{options}");
            qemu_img(folder, &["check", "-q", "ours.qcow2"]);
            qemu_img(folder, &["compare", "-q", "source.qcow2", "ours.qcow2"]);
            let compare = blkmirror(&["compare", from.to_str().unwrap(), to.to_str().unwrap()]);
            assert_eq!(compare.code, Some(0), "{options}: {compare:?}");
            let (ours, theirs) = (space(folder, "ours.qcow2"), space(folder, "theirs.qcow2"));
            assert!(ours < theirs + theirs / 8 + (1 << 20), "{options}: {ours} bytes, theirs has {theirs}");
            assert_eq!(compressed(folder, "ours.qcow2"), compressed(folder, "theirs.qcow2"), "{options}");
            fs::remove_file(&to).unwrap();
        }
    }
}

/// Whether qemu-img finds compressed clusters.
fn compressed(folder: &Path, name: &str) -> bool {
    let said: serde_json::Value = serde_json::from_str(&qemu_img(folder, &["check", "--output=json", name])).unwrap();
    said["compressed-clusters"].as_u64().is_some_and(|count| count > 0)
}

#[test]
fn what_cannot_be_compressed_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("a.raw"), vec![1; 1 << 20]).unwrap();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "there.qcow2", "1M"]);
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    for (target, more, said) in [
        ("b.raw", &["--format", "raw"][..], "a raw target has no compressed clusters"),
        ("b.qcow2", &["--format", "qcow2", "-o", "preallocation=metadata"], "leave preallocation out"),
        ("there.qcow2", &["--reuse-external", "--format", "qcow2"], "there already"),
    ] {
        let (from, to) = (path("a.raw"), path(target));
        let words = [&["convert", &from, &to, "--source-format", "raw", "--compress"][..], more].concat();
        let run = blkmirror(&words);
        assert!(run.code == Some(1) && run.stderr.contains("--compress") && run.stderr.contains(said), "{run:?}");
        assert!(target == "there.qcow2" || !folder.join(target).exists(), "{target}");
    }
}
