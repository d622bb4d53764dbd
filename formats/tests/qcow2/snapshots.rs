//! Images with internal snapshots that QEMU made: what we write to the guest's view is right, and no
//! snapshot changes by it.

use crate::support::act::{act, assert_same};
use crate::support::file::{FileStorage, Layer};
use crate::support::qemu::{contents, run};
use crate::support::random::Random;
use std::path::Path;

const NAME: &str = "image.qcow2";
const SNAPSHOTS_MAX: u64 = 3;

/// An image with a few snapshots, compressed clusters among what they share; what each one holds.
fn make(folder: &Path, random: &mut Random, what: &mut String) -> Vec<Vec<u8>> {
    let cluster_bits = 9 + random.below(9);
    let version_2 = random.one_in(4);
    let bits = if version_2 { 16 } else { 4 << random.below(5) };
    let extended = if cluster_bits >= 14 && random.one_in(2) { "on" } else { "off" };
    let compat = match version_2 {
        true => "compat=0.10".to_owned(),
        false => format!("refcount_bits={bits},extended_l2={extended}"),
    };
    let options = format!("{compat},cluster_size={}", 1 << cluster_bits);
    // Up to three L2 tables where clusters are small.
    let size = 512 * (1 + random.below(6000));
    *what += &format!(": {options} {size}");
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, NAME, &size.to_string()]);
    let mut snapshots = Vec::new();
    for nth in 0..1 + random.below(SNAPSHOTS_MAX) {
        fill(folder, size, cluster_bits, random);
        run(folder, "qemu-img", &["snapshot", "-c", &nth.to_string(), NAME]);
        snapshots.push(contents(folder, NAME));
    }
    if random.one_in(2) {
        fill(folder, size, cluster_bits, random);
    }
    snapshots
}

fn fill(folder: &Path, size: u64, cluster_bits: u64, random: &mut Random) {
    let mut arguments = ["-t", "unsafe", "-d", "unmap"].map(str::to_owned).to_vec();
    for _ in 0..1 + random.below(8) {
        let sectors = size / 512;
        let start = random.below(sectors);
        let range = format!("{} {}", start * 512, 512 * (1 + random.below((sectors - start).min(400))));
        let (clusters, pattern) = (size >> cluster_bits, 1 + random.below(255));
        let command = match random.below(4) {
            0 if clusters > 0 => {
                let cluster = random.below(clusters) << cluster_bits;
                // Compressed clusters overwrite nothing.
                arguments.extend(["-c".into(), format!("discard {cluster} {}", 1 << cluster_bits)]);
                format!("write -c -P {pattern} {cluster} {}", 1 << cluster_bits)
            }
            1 => format!("write -z {range}"),
            _ => format!("write -P {pattern} {range}"),
        };
        arguments.extend(["-c".into(), command]);
    }
    arguments.push(NAME.into());
    run(folder, "qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

fn assert_snapshots(folder: &Path, snapshots: &[Vec<u8>], what: &str) {
    for (nth, expected) in snapshots.iter().enumerate() {
        let arguments = ["convert", "-l", &format!("snapshot.name={nth}"), "-O", "raw", NAME, "snapshot.raw"];
        run(folder, "qemu-img", &arguments);
        let found = std::fs::read(folder.join("snapshot.raw")).expect("just made");
        assert_same(&found, expected, &format!("snapshot {nth} of {what}"));
    }
}

#[test]
fn snapshots_of_qemu_keep_what_they_hold() {
    for seed in 1..=30 {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut random, mut what) = (folder.path(), Random::new(seed), format!("seed {seed}"));
        let snapshots = make(folder, &mut random, &mut what);
        let mut model = contents(folder, NAME);
        for _ in 0..2 {
            let layer = Layer::open(&folder.join(NAME), "qcow2", true);
            for _ in 0..random.below(40) {
                act(&layer, &mut model, &mut random);
            }
            layer.settle();
            layer.settle();
            assert_same(&layer.to_vec(), &model, &what);
            drop(layer);
            // Neither leaks nor corruptions.
            run(folder, "qemu-img", &["check", "-q", NAME]);
            assert_same(&contents(folder, NAME), &model, &what);
            assert_snapshots(folder, &snapshots, &what);
        }
        // Without its snapshots the image is as right as ever: QEMU counts down what they shared.
        for nth in 0..snapshots.len() {
            run(folder, "qemu-img", &["snapshot", "-d", &nth.to_string(), NAME]);
        }
        run(folder, "qemu-img", &["check", "-q", NAME]);
        assert_same(&contents(folder, NAME), &model, &what);
    }
}

#[test]
fn the_table_says_what_qemu_wrote_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", NAME, "1M"]);
    run(folder, "qemu-img", &["snapshot", "-c", "first", NAME]);
    run(folder, "qemu-img", &["resize", "-q", NAME, "2M"]);
    run(folder, "qemu-img", &["snapshot", "-c", "second", NAME]);
    let storage = FileStorage::open(&folder.join(NAME), false).expect("a file");
    let header = formats::qcow2::read_header(&*storage).expect("a valid header");
    let found = formats::qcow2::snapshots::read(&*storage, &header).expect("a valid table");
    let facts: Vec<_> = found.iter().map(|one| (one.id.as_str(), one.name.as_str(), one.disk_size)).collect();
    assert_eq!(facts, [("1", "first", 1 << 20), ("2", "second", 2 << 20)]);
}
