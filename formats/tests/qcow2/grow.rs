//! Disks that grow: what is new reads as zeroes, for us and for QEMU, whatever lies below or was left there; and what
//! cannot grow is refused and stays as it was. What kills and power cuts leave of a growth is tried in all worlds
//! (`crate::support::guest`).

use crate::support::act::{act, assert_same};
use crate::support::file::{FileStorage, Layer};
use crate::support::qemu::{contents, make_chain, run};
use crate::support::random::Random;
use formats::error::Result;
use formats::qcow2::{Header, read_header};
use std::fs;
use std::path::Path;
use std::process::Command;

const NAME: &str = "image.qcow2";

fn header(folder: &Path) -> Header {
    read_header(&*FileStorage::open(&folder.join(NAME), false).expect("a file")).expect("a valid header")
}

fn create(folder: &Path, name: &str, options: &str, size: u64) {
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()]);
}

/// Grows the image and closes it.
fn grow(folder: &Path, size: u64) -> Result<()> {
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    layer.grow(size)?;
    layer.close();
    Ok(())
}

/// What the image holds, grown by zeroes, is what QEMU reads there, and the image is whole.
fn assert_grown(folder: &Path, before: &[u8], size: u64, what: &str) {
    let mut expected = before.to_vec();
    expected.resize(size as usize, 0);
    run(folder, "qemu-img", &["check", "-q", NAME]);
    assert_eq!(header(folder).geometry.size, size, "{what}");
    assert_same(&contents(folder, NAME), &expected, what);
}

#[test]
fn what_qemu_made_grows_and_lives_on() {
    let mut grown = 0;
    for seed in 1..=25 {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut random, mut what) = (folder.path(), Random::new(seed), format!("seed {seed}"));
        let made = make_chain(folder, &mut random, &mut what);
        let mut model = contents(folder, &made.name);
        let mut refused = false;
        for round in 0..3 {
            let layer = Layer::open(&made.path, made.format, true);
            for _ in 0..random.below(10) {
                act(&layer, &mut model, &mut random);
            }
            layer.settle();
            let most = if random.one_in(3) { 8192 } else { 64 };
            let size = model.len().next_multiple_of(512) as u64 + 512 * (1 + random.below(most));
            if let Err(error) = layer.grow(size) {
                assert!(error.one_line().contains("version 2 cannot hide"), "{what}: {}", error.one_line());
                layer.close();
                refused = true;
                break;
            }
            grown += 1;
            model.resize(size as usize, 0);
            assert_same(&layer.to_vec(), &model, &format!("{what}: round {round}, ours"));
            for _ in 0..random.below(10) {
                act(&layer, &mut model, &mut random);
            }
            layer.close();
            run(folder, "qemu-img", &["check", "-q", "-f", made.format, &made.name]);
            assert_same(&contents(folder, &made.name), &model, &format!("{what}: round {round}, QEMU's"));
        }
        if refused {
            continue;
        }
        // And by QEMU, which finds nothing of ours in the way.
        let size = model.len() + (512 << random.below(12));
        run(folder, "qemu-img", &["resize", "-q", "-f", made.format, &made.name, &size.to_string()]);
        model.resize(size, 0);
        assert_same(&Layer::open(&made.path, made.format, false).to_vec(), &model, &what);
    }
    assert!(grown > 50, "{grown}");
}

#[test]
fn a_table_that_is_too_short_moves_and_leaves_nothing_behind() {
    for compat in ["0.10", "1.1"] {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        create(folder, NAME, &format!("compat={compat},cluster_size=512"), 100_352);
        run(folder, "qemu-io", &["-c", "write -P 7 0 100352", NAME]);
        let (before, old) = (contents(folder, NAME), header(folder));
        // 320 entries of 32 KiB each are five clusters.
        grow(folder, 10 << 20).expect("an image that can grow");
        assert_grown(folder, &before, 10 << 20, compat);
        let new = header(folder);
        assert!(new.l1_offset != old.l1_offset && new.l1_entries == 320 && old.l1_entries < 5, "{old:?} {new:?}");
        // The place of the old table is given out again.
        let layer = Layer::open(&folder.join(NAME), "qcow2", true);
        layer.write(5 << 20, &vec![9; 1 << 20]);
        layer.grow(20 << 20).expect("an image that can grow");
        layer.write(15 << 20, &vec![8; 1 << 20]);
        layer.close();
        run(folder, "qemu-img", &["check", "-q", NAME]);
    }
}

/// QEMU's block_resize writes zeroes over what the backing image has there.
#[test]
fn what_a_longer_image_below_has_does_not_show() {
    for options in ["compat=1.1", "compat=1.1,extended_l2=on", "compat=1.1,cluster_size=4096"] {
        for (old, new) in [(1 << 20, 2 << 20), (1 << 20, 8 << 20), (1_050_112, 2_000_384), (512, 3 << 20)] {
            let folder = tempfile::tempdir().expect("a folder");
            let folder = folder.path();
            create(folder, "base.qcow2", "compat=1.1", 3 << 20);
            run(folder, "qemu-io", &["-c", "write -P 7 0 3M", "base.qcow2"]);
            let arguments = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", options, NAME];
            run(folder, "qemu-img", &[&arguments[..], &[&old.to_string()]].concat());
            let before = contents(folder, NAME);
            grow(folder, new).expect("an image that can grow");
            assert_grown(folder, &before, new, &format!("{options}, from {old} to {new}"));
        }
    }
}

/// Version 2 has no entry for zeroes over a backing image: QEMU refuses too.
#[test]
fn version_2_over_a_longer_image_does_not_grow() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    create(folder, "base.qcow2", "compat=1.1", 3 << 20);
    let arguments = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "compat=0.10", NAME];
    run(folder, "qemu-img", &[&arguments[..], &["1M"]].concat());
    let error = grow(folder, 2 << 20).expect_err("refused").one_line();
    assert!(error.contains("3145728") && error.contains("compat=1.1"), "{error}");
    let theirs = Command::new("qemu-img").args(["resize", "-q", NAME, "2M"]).current_dir(folder).output();
    assert!(!theirs.expect("qemu-img").status.success(), "QEMU can");
    run(folder, "qemu-img", &["check", "-q", NAME]);
    assert_eq!(header(folder).geometry.size, 1 << 20);
}

#[test]
fn external_data_files_grow_too() {
    for raw in ["on", "off"] {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        create(folder, NAME, &format!("data_file=data.raw,data_file_raw={raw}"), 1_000_448);
        run(folder, "qemu-io", &["-c", "write -P 7 0 1000448", NAME]);
        let before = contents(folder, NAME);
        grow(folder, 5 << 20).expect("an image that can grow");
        assert_grown(folder, &before, 5 << 20, raw);
        assert_eq!(fs::metadata(folder.join("data.raw")).expect("a file").len(), 5 << 20);
        if raw == "on" {
            let mut expected = before;
            expected.resize(5 << 20, 0);
            assert_same(&fs::read(folder.join("data.raw")).expect("a file"), &expected, "by itself");
        }
    }
}

#[test]
fn internal_snapshots_stay_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    create(folder, NAME, "cluster_size=512", 100_352);
    run(folder, "qemu-io", &["-c", "write -P 7 0 100352", NAME]);
    run(folder, "qemu-img", &["snapshot", "-c", "old", NAME]);
    let before = contents(folder, NAME);
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    layer.grow(4 << 20).expect("an image that can grow");
    layer.write(100_000, &[3; 4000]);
    layer.close();
    run(folder, "qemu-img", &["check", "-q", NAME]);
    run(folder, "qemu-img", &["convert", "-l", "snapshot.name=old", "-O", "raw", NAME, "old.raw"]);
    // QEMU shows a snapshot as long as the disk is now.
    let old = fs::read(folder.join("old.raw")).expect("just made");
    assert_same(&old[..before.len()], &before, "the snapshot");
    let mut now = before;
    now.resize(4 << 20, 0);
    now[100_000..104_000].fill(3);
    assert_same(&contents(folder, NAME), &now, "the disk");
}

#[test]
fn what_cannot_grow_is_refused_by_name_and_stays_as_it_was() {
    let refused = |options: &str, prepare: &[&[&str]], size: u64, reason: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        create(folder, NAME, options, 1 << 20);
        prepare.iter().for_each(|arguments| _ = run(folder, "qemu-img", arguments));
        let before = contents(folder, NAME);
        let error = grow(folder, size).expect_err("refused").one_line();
        assert!(error.contains(reason), "{error}");
        run(folder, "qemu-img", &["check", "-q", NAME]);
        assert_same(&contents(folder, NAME), &before, reason);
    };
    refused("compat=0.10", &[&["snapshot", "-c", "old", NAME]], 2 << 20, "\"old\" does not say how large");
    refused("compat=1.1", &[&["bitmap", "--add", "-g", "512", NAME, "b"]], 1 << 40, "a larger granularity");
    refused("cluster_size=512", &[], 1 << 40, "take larger clusters");
}

#[test]
fn a_raw_file_that_is_longer_than_its_disk_shows_nothing_of_that() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("raw");
    fs::write(&path, vec![7; 3 << 20]).expect("room");
    let storage = FileStorage::open(&path, true).expect("a file");
    let image = formats::raw::Raw::new(storage, 1 << 20);
    let range = formats::image::Image::grow(&image, 2 << 20, 0, &|| Ok(())).expect("a file that is long enough");
    assert_eq!((range.start, range.end), (1 << 20, 2 << 20));
    formats::image::Image::ungrow(&image, 1 << 20);
    let range = formats::image::Image::grow(&image, 8 << 20, 0, &|| Ok(())).expect("room");
    assert!(range.is_empty(), "a growth that came to nothing cut the file");
    assert_eq!(fs::metadata(&path).expect("a file").len(), 8 << 20);
}
