//! qcow2 against QEMU's own tools: theirs read by us, ours read and checked by them.

use crate::support::act::{act, assert_same};
use crate::support::file::{FileStorage, Layer};
use crate::support::qemu::{Kind, contents, make_chain, map, push_run, run};
use crate::support::random::Random;
use formats::image::Place;
use formats::qcow2::{Backing, Compression, Create, create};
use formats::storage::Storage;
use std::path::Path;
use std::sync::Arc;

/// How many random images each test makes.
const IMAGES: u64 = 40;

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    for seed in 1..=IMAGES {
        let folder = tempfile::tempdir().expect("a folder");
        let mut what = format!("seed {seed}");
        let made = make_chain(folder.path(), &mut Random::new(seed), &mut what);
        if made.format == "qcow2" {
            let theirs = contents(folder.path(), &made.name);
            let ours = Layer::open(&made.path, "qcow2", false).to_vec();
            assert_same(&ours, &theirs, &what);
            assert_eq!(runs(&Layer::open(&made.path, "qcow2", false)), map(folder.path(), &made.name), "{what}");
        }
    }
}

/// The runs of a layer as `qemu-img map` tells them.
fn runs(layer: &Layer) -> Vec<(u64, Kind)> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < layer.image.size() {
        let extent = layer.image.map(at, u64::MAX).expect("a valid image");
        let kind = match extent.place {
            Place::Data { host } => Kind::Data { host },
            Place::Zero => Kind::Zero,
            Place::Absent => Kind::Absent,
            Place::Compressed { .. } => Kind::Compressed,
        };
        push_run(&mut runs, extent.guest.start, extent.guest.end, kind);
        at = extent.guest.end;
    }
    runs
}

#[test]
fn images_of_qemu_that_we_wrote_to_are_right() {
    for seed in 1001..=1000 + IMAGES {
        let folder = tempfile::tempdir().expect("a folder");
        let mut what = format!("seed {seed}");
        let mut random = Random::new(seed);
        let made = make_chain(folder.path(), &mut random, &mut what);
        if made.format == "qcow2" {
            let model = contents(folder.path(), &made.name);
            write_and_check(folder.path(), &made.path, model, &mut random, &what);
        }
    }
}

#[test]
fn images_of_ours_are_right() {
    for seed in 2001..=2000 + IMAGES {
        let folder = tempfile::tempdir().expect("a folder");
        let mut random = Random::new(seed);
        let version = 2 + u32::from(!random.one_in(4));
        let size = 512 * (1 + random.below(8000));
        let mut asked = Create { version, cluster_bits: 9 + random.below(13) as u32, ..Create::new(size) };
        if version == 3 {
            asked.refcount_order = random.below(7) as u32;
            asked.lazy_refcounts = random.one_in(2);
            asked.compression = [Compression::Zlib, Compression::Zstd][random.below(2) as usize];
            asked.extended_l2 = asked.cluster_bits >= 14 && random.one_in(2);
        }
        let mut model = vec![0; size as usize];
        if random.one_in(2) {
            let below: Vec<u8> = (0..512 * (1 + random.below(8000))).map(|at| (at / 512 * 7) as u8).collect();
            std::fs::write(folder.path().join("below.raw"), &below).expect("room");
            let both = below.len().min(model.len());
            model[..both].copy_from_slice(&below[..both]);
            asked.backing = Some(Backing { name: "below.raw".into(), format: Some("raw".into()) });
        }
        asked.preallocated = asked.backing.is_none() && random.one_in(2);
        let path = folder.path().join("ours.qcow2");
        create(&*FileStorage::open(&path, true).expect("a file"), &asked).expect("valid options");
        let what = format!("seed {seed}: {asked:?}");
        run(folder.path(), "qemu-img", &["check", "-q", "ours.qcow2"]);
        assert_same(&contents(folder.path(), "ours.qcow2"), &model, &what);
        write_and_check(folder.path(), &path, model, &mut random, &what);
    }
}

/// Writes like a guest, a few times open and closed, and has QEMU look at it.
fn write_and_check(folder: &Path, path: &Path, mut model: Vec<u8>, random: &mut Random, what: &str) {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
    for _ in 0..3 {
        let layer = Layer::open(path, "qcow2", true);
        for _ in 0..random.below(30) {
            act(&layer, &mut model, random);
        }
        layer.settle();
        layer.settle();
        assert_same(&layer.to_vec(), &model, what);
        drop(layer);
        // Neither leaks nor corruptions: qemu-img tells them apart, and both are failures.
        let storage: Arc<dyn Storage> = FileStorage::open(path, false).expect("a file");
        let found = formats::qcow2::check(&*storage).expect("it can be walked");
        assert_eq!((found.leaks, found.corruptions), (0, 0), "{what}: {:#?}", found.problems);
        run(folder, "qemu-img", &["check", "-q", name]);
        assert_same(&contents(folder, name), &model, what);
        assert_eq!(runs(&Layer::open(path, "qcow2", false)), map(folder, name), "{what}");
    }
}
