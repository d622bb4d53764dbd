//! Another backing name in an image's header: QEMU reads it, and nothing else of the image has changed.

use crate::support::file::FileStorage;
use crate::support::qemu::{contents, run};
use formats::qcow2::rename_backing;
use std::fs;
use std::path::Path;

const NAME: &str = "image.qcow2";

fn make(folder: &Path, base: &str, options: &str) {
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", base, "1M"]);
    run(folder, "qemu-io", &["-c", "write -P 7 0 64k", base]);
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "-o", options, NAME]);
    run(folder, "qemu-io", &["-c", "write -P 8 512k 64k", NAME]);
}

#[test]
fn names_become_shorter_and_longer() {
    let long = "b".repeat(200);
    for options in ["compat=1.1", "compat=0.10", "cluster_size=1024"] {
        for (old, new) in [("base", "x"), ("base", "base"), (&long, "b"), ("b", &long)] {
            let folder = tempfile::tempdir().expect("a folder");
            let folder = folder.path();
            make(folder, old, options);
            let before = contents(folder, NAME);
            fs::rename(folder.join(old), folder.join(new)).expect("a file of ours");
            rename_backing(&*FileStorage::open(&folder.join(NAME), true).expect("a file"), new).expect("room");
            let info = run(folder, "qemu-img", &["info", "--output=json", NAME]);
            let info = String::from_utf8(info.stdout).expect("JSON");
            assert!(info.contains(&format!("\"backing-filename\": \"{new}\"")), "{info}");
            assert!(info.contains("\"backing-filename-format\": \"qcow2\""), "{info}");
            assert!(contents(folder, NAME) == before, "{options}: {old} to {new}");
            run(folder, "qemu-img", &["check", "-q", NAME]);
        }
    }
}

#[test]
fn a_name_that_does_not_fit_is_refused_and_leaves_the_old_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, "base", "cluster_size=512");
    let before = fs::read(folder.join(NAME)).expect("a file");
    let storage = FileStorage::open(&folder.join(NAME), true).expect("a file");
    for name in ["n".repeat(500), "n".repeat(1024)] {
        let error = rename_backing(&*storage, &name).expect_err("no room").one_line();
        assert!(error.contains("no room"), "{error}");
    }
    let error = rename_backing(&*FileStorage::open(&folder.join("base"), true).expect("a file"), "x");
    assert!(error.expect_err("it has none").one_line().contains("no backing name"));
    assert!(fs::read(folder.join(NAME)).expect("a file") == before);
}
