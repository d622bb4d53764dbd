//! Persistent bitmaps that QEMU made: our writes set their bits, QEMU reads them, and what was not
//! closed cleanly says so.

use crate::support::disk::Disk;
use crate::support::file::{FileStorage, Layer};
use crate::support::qemu::{check_of_qemu, run};
use crate::support::random::Random;
use formats::image::{Image, Reserve, Zeroing};
use formats::journal::Forgetful;
use formats::qcow2::{Backing, Create, Open, Qcow2, bitmaps, create, read_header};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

const NAME: &str = "image.qcow2";
const OPEN: Open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 16 };

/// An image with writes before and after its bitmaps were added: one enabled, one disabled.
fn make(folder: &Path, size: u64, granularity: u64, cluster: u64, random: &mut Random) {
    let options = format!("cluster_size={cluster}");
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, NAME, &size.to_string()]);
    let granularity = granularity.to_string();
    run(folder, "qemu-img", &["bitmap", "--add", "-g", &granularity, NAME, "kept"]);
    fill(folder, size, random);
    run(folder, "qemu-img", &["bitmap", "--disable", NAME, "kept"]);
    run(folder, "qemu-img", &["bitmap", "--add", "-g", &granularity, NAME, "live"]);
    fill(folder, size, random);
}

fn fill(folder: &Path, size: u64, random: &mut Random) {
    let range = some_range(size, random);
    let command = format!("write -P 7 {} {}", range.start, range.len());
    run(folder, "qemu-io", &["-t", "unsafe", "-c", &command, NAME]);
}

fn some_range(size: u64, random: &mut Random) -> ByteRange {
    let sectors = size / 512;
    let start = random.below(sectors);
    let count = 1 + random.below((sectors - start).min(300));
    ByteRange { start: start * 512, end: (start + count) * 512 }
}

/// The sectors that a bitmap marks, as QEMU tells an NBD client.
fn marked(folder: &Path, bitmap: &str) -> BTreeSet<u64> {
    marked_in(folder, NAME, bitmap)
}

fn marked_in(folder: &Path, image: &str, bitmap: &str) -> BTreeSet<u64> {
    let map = format!("--map=qemu:dirty-bitmap:{bitmap}");
    let server = ["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, image, "]"];
    let output = run(folder, "nbdinfo", &[&[map.as_str()], &server[..]].concat());
    let text = String::from_utf8(output.stdout).expect("text");
    let mut sectors = BTreeSet::new();
    for line in text.lines() {
        let numbers: Vec<u64> = line.split_whitespace().take(3).map(|word| word.parse().expect("a number")).collect();
        let [start, len, kind] = numbers[..] else { panic!("three numbers in {line}") };
        if kind & 1 == 1 {
            sectors.extend(start / 512..(start + len) / 512);
        }
    }
    sectors
}

/// The sectors that a bitmap of an open image marks, asked for run by run.
fn shown(image: &dyn Image, name: &str) -> BTreeSet<u64> {
    let bits = image.bitmap(name).expect("readable").unwrap_or_else(|| panic!("{name} is not shown"));
    let (mut at, mut sectors) = (0, BTreeSet::new());
    while at < image.size() {
        let (run, marked) = bits.run(ByteRange { start: at, end: image.size() });
        assert!(run.start == at && !run.is_empty());
        at = run.end;
        sectors.extend((run.start / 512..run.end / 512).filter(|_| marked));
    }
    sectors
}

fn both() -> BTreeSet<String> {
    ["kept", "live"].map(String::from).into()
}

fn names(image: &dyn Image) -> BTreeSet<String> {
    image.bitmap_names().expect("readable").into_iter().collect()
}

/// The sectors of all pieces that `range` touches.
fn pieces(range: ByteRange, granularity: u64, size: u64) -> std::ops::Range<u64> {
    let end = range.end.next_multiple_of(granularity).min(size);
    range.start / granularity * granularity / 512..end / 512
}

fn flags(folder: &Path) -> Vec<(String, bool, bool, bool)> {
    let storage = FileStorage::open(&folder.join(NAME), false).expect("a file");
    flags_of(&*storage)
}

/// Name, in use, auto, consistent.
fn flags_of(storage: &dyn Storage) -> Vec<(String, bool, bool, bool)> {
    let header = read_header(storage).expect("a valid header");
    let all = bitmaps::read(storage, &header).expect("a valid directory");
    all.into_iter().map(|one| (one.name, one.in_use, one.auto, one.consistent)).collect()
}

fn clean() -> Vec<(String, bool, bool, bool)> {
    vec![("kept".into(), false, false, true), ("live".into(), false, true, true)]
}

fn in_use() -> Vec<(String, bool, bool, bool)> {
    vec![("kept".into(), false, false, true), ("live".into(), true, true, false)]
}

#[test]
fn what_we_write_is_marked_beside_what_was() {
    for seed in 1..=12 {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut random) = (folder.path(), Random::new(seed));
        // Small clusters: a bitmap has several.
        let (size, granularity) = (512 * (1 + random.below(30_000)), 512 << random.below(6));
        make(folder, size, granularity, 512 << random.below(8), &mut random);
        let (kept, mut expected) = (marked(folder, "kept"), marked(folder, "live"));
        for _ in 0..2 {
            assert_eq!(flags(folder), clean(), "seed {seed}");
            let layer = Layer::open(&folder.join(NAME), "qcow2", true);
            assert_eq!(flags(folder), in_use(), "seed {seed}: before the first write");
            for _ in 0..random.below(12) {
                let range = some_range(size, &mut random);
                match random.below(5) {
                    0 => layer.zero(range, Zeroing::Unmap),
                    1 => layer.zero(range, Zeroing::Discard),
                    2 => {
                        layer.settle();
                        continue;
                    }
                    _ => layer.write(range.start, &vec![9; range.len() as usize]),
                }
                expected.extend(pieces(range, granularity, size));
                assert!(shown(&*layer.image, "live") == expected, "seed {seed}: at this moment");
            }
            assert_eq!(shown(&*layer.image, "kept"), kept, "seed {seed}");
            layer.close();
            run(folder, "qemu-img", &["check", "-q", NAME]);
            let reading = Layer::open(&folder.join(NAME), "qcow2", false);
            assert_eq!(names(&*reading.image), both(), "seed {seed}");
            assert!(shown(&*reading.image, "live") == expected && shown(&*reading.image, "kept") == kept);
            assert_eq!(marked(folder, "kept"), kept, "seed {seed}");
            assert!(marked(folder, "live") == expected, "seed {seed}");
        }
        // Cleared by QEMU, its bits leave their clusters.
        run(folder, "qemu-img", &["bitmap", "--clear", NAME, "live"]);
        Layer::open(&folder.join(NAME), "qcow2", true).close();
        assert!(marked(folder, "live").is_empty());
        run(folder, "qemu-img", &["check", "-q", NAME]);
    }
}

/// Room for a compressed cluster set no bit, and the bitmap was given back as if nobody had written. No guest
/// compresses, so only a copy into an image that has bitmaps would have shown it.
#[test]
fn what_is_written_compressed_is_marked_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", NAME, "1M"]);
    run(folder, "qemu-img", &["bitmap", "--add", NAME, "live"]);
    let image = Qcow2::open(FileStorage::open(&folder.join(NAME), true).expect("a file"), Arc::new(Forgetful), OPEN);
    let image = image.expect("a valid image");
    let cluster = ByteRange { start: 65536, end: 131_072 };
    let room = image.reserve_compressed(cluster, 100).expect("a valid image");
    let Some(Reserve::Room(room)) = room else { panic!("nobody else writes") };
    image.commit(room).expect("a valid image");
    image.close(&|| Ok(())).expect("a valid image");
    assert_eq!(marked(folder, "live"), (128..256).collect());
}

#[test]
fn what_was_killed_is_inconsistent_for_good() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, 1 << 20, 4096, 4096, &mut Random::new(7));
    let kept = marked(folder, "kept");
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    layer.write(0, &[1; 512]);
    layer.settle();
    // A kill runs no destructors.
    std::mem::forget(layer);
    assert_eq!(flags(folder), in_use());
    for writable in [false, true] {
        let layer = Layer::open(&folder.join(NAME), "qcow2", writable);
        assert_eq!(names(&*layer.image), ["kept".to_owned()].into(), "who asks for the other gets no answer");
        assert!(layer.image.bitmap("live").expect("readable").is_none());
    }
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    layer.write(0, &[2; 512]);
    layer.close();
    assert_eq!(flags(folder), in_use(), "a clean close after that makes it no better");
    let info = run(folder, "qemu-img", &["info", "--output=json", NAME]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("in-use"));
    assert_eq!(marked(folder, "kept"), kept);
    run(folder, "qemu-img", &["check", "-q", NAME]);
}

#[test]
fn what_nobody_wrote_to_is_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, 1 << 20, 4096, 4096, &mut Random::new(8));
    let before = marked(folder, "live");
    drop(Layer::open(&folder.join(NAME), "qcow2", true));
    assert_eq!(flags(folder), clean(), "an opening that came to nothing");
    assert_eq!(marked(folder, "live"), before);
}

/// A program that does not know bitmaps clears their autoclear bit when it writes.
#[test]
fn without_the_autoclear_bit_none_is_right() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, 1 << 20, 4096, 4096, &mut Random::new(9));
    let storage = FileStorage::open(&folder.join(NAME), true).expect("a file");
    storage.write_at(88, &0_u64.to_be_bytes()).expect("room");
    let inconsistent = vec![("kept".into(), false, false, false), ("live".into(), false, true, false)];
    assert_eq!(flags(folder), inconsistent);
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    layer.write(0, &[1; 512]);
    layer.close();
    assert_eq!(flags(folder), inconsistent, "and a clean close makes none right");
    assert_eq!(read_header(&*storage).expect("valid").autoclear, 0);
}

const TARGET: &str = "target.qcow2";

/// A target: of ours, alone or with a backing name, or of QEMU's with a bitmap of its own.
fn make_target(folder: &Path, size: u64, random: &mut Random) -> bool {
    let name = folder.join(TARGET);
    let cluster_bits = 9 + random.below(8) as u32;
    match random.below(3) {
        0 => {
            let options = format!("cluster_size={}", 1 << cluster_bits);
            run(folder, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, TARGET, &size.to_string()]);
            run(folder, "qemu-img", &["bitmap", "--add", TARGET, "own"]);
            return true;
        }
        kind => {
            let backing = Backing { name: NAME.into(), format: Some("qcow2".into()) };
            let backing = Some(backing).filter(|_| kind == 1);
            let asked = Create { cluster_bits: cluster_bits.max(10), backing, ..Create::new(size) };
            create(&*FileStorage::open(&name, true).expect("a file"), &asked).expect("valid options");
        }
    }
    false
}

#[test]
fn bitmaps_go_on_in_another_image() {
    for seed in 1..=15 {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut random) = (folder.path(), Random::new(seed));
        let (size, granularity) = (512 * (1 + random.below(30_000)), 512 << random.below(6));
        make(folder, size, granularity, 512 << random.below(8), &mut random);
        let (kept, mut expected) = (marked(folder, "kept"), marked(folder, "live"));
        let has_own = make_target(folder, size, &mut random);
        let mut write = |layer: &Layer| {
            let range = some_range(size, &mut random);
            layer.write(range.start, &vec![9; range.len() as usize]);
            expected.extend(pieces(range, granularity, size));
        };
        let target = Layer::open(&folder.join(TARGET), "qcow2", true);
        let source = Layer::open(&folder.join(NAME), "qcow2", true);
        write(&source);
        // What a copy writes is no change of the disk.
        target.write(0, &vec![3; size as usize]);
        target.image.adopt_bitmaps(source.image.bitmaps().expect("readable")).expect("version 3");
        source.close();
        write(&target);
        assert!(names(&*target.image).is_superset(&both()));
        assert_eq!(shown(&*target.image, "kept"), kept, "seed {seed}");
        assert!(shown(&*target.image, "live") == expected, "seed {seed}");
        target.close();
        for _ in 0..2 {
            run(folder, "qemu-img", &["check", "-q", TARGET]);
            assert_eq!(marked_in(folder, TARGET, "kept"), kept, "seed {seed}");
            assert!(marked_in(folder, TARGET, "live") == expected, "seed {seed}");
            assert!(!has_own || !marked_in(folder, TARGET, "own").is_empty(), "seed {seed}");
            // They are live from here on like any others.
            let target = Layer::open(&folder.join(TARGET), "qcow2", true);
            let range = some_range(size, &mut random);
            target.write(range.start, &vec![8; range.len() as usize]);
            expected.extend(pieces(range, granularity, size));
            target.close();
        }
    }
}

/// A cut at any moment leaves a bitmap that says that it is inconsistent, or one that is right.
#[test]
fn a_power_cut_leaves_no_bitmap_that_lies() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut in_uses = 0;
    for seed in 1..=6 {
        let mut random = Random::new(seed);
        let _ = std::fs::remove_file(folder.path().join(NAME));
        make(folder.path(), 4 << 20, 512, 512, &mut random);
        let bytes = std::fs::read(folder.path().join(NAME)).expect("just made");
        let disk = Arc::new(Disk::with(&bytes));
        let image = Qcow2::open(disk.clone(), Arc::new(Forgetful), OPEN).expect("a valid image");
        if image.flush_first() {
            disk.flush();
        }
        write_one(&image, &disk, ByteRange { start: 0, end: 512 });
        for _ in 0..20 {
            let cut = disk.after_power_cut(&mut random);
            assert_eq!(flags_of(&cut), in_use(), "seed {seed}: a write may be in the file, its mark is not");
        }
        write_one(&image, &disk, ByteRange { start: 3 << 20, end: (3 << 20) + 512 });
        // What the bits are in the end shows what they may be on the way there.
        let (cuts, cutting) = (RefCell::new(Vec::new()), RefCell::new(random));
        let flush = || {
            let mut random = cutting.borrow_mut();
            cuts.borrow_mut().extend((0..8).map(|_| disk.after_power_cut(&mut random)));
            disk.flush();
            Ok(())
        };
        image.close(&flush).expect("memory");
        flush().expect("memory");
        assert_eq!(flags_of(&*disk), clean());
        let right = bits(&disk);
        assert!(right[0] & 1 == 1 && right[(3 << 20 >> 9) / 8] & 1 == 1);
        for cut in cuts.into_inner() {
            let found = check_of_qemu(&cut);
            assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
            match flags_of(&cut) == clean() {
                true => assert!(bits(&cut) == right, "seed {seed}: it lies"),
                false => in_uses += 1,
            }
        }
    }
    assert!(in_uses > 50, "{in_uses}");
}

/// A cut while bitmaps that came from elsewhere are stored leaves none of them, or all of them right.
#[test]
fn a_power_cut_leaves_no_carried_bitmap_that_lies() {
    let folder = tempfile::tempdir().expect("a folder");
    make(folder.path(), 4 << 20, 512, 512, &mut Random::new(3));
    let source = Layer::open(&folder.path().join(NAME), "qcow2", true);
    source.write(0, &[1; 512]);
    let (mut without, mut with) = (0, 0);
    for seed in 1..=6 {
        let mut random = Random::new(seed);
        let disk = Arc::new(Disk::default());
        create(&*disk, &Create { cluster_bits: 9 + seed as u32 % 4, ..Create::new(4 << 20) }).expect("valid options");
        disk.flush();
        let image = Qcow2::open(disk.clone(), Arc::new(Forgetful), OPEN).expect("a valid image");
        image.adopt_bitmaps(source.image.bitmaps().expect("readable")).expect("version 3");
        write_one(&image, &disk, ByteRange { start: 3 << 20, end: (3 << 20) + 512 });
        let mut cuts = RefCell::new((Vec::new(), &mut random));
        let flush = || {
            let (cuts, random) = &mut *cuts.borrow_mut();
            cuts.extend((0..8).map(|_| disk.after_power_cut(random)));
            disk.flush();
            Ok(())
        };
        image.close(&flush).expect("memory");
        flush().expect("memory");
        let right = all_bits(&disk);
        let live = &right[0];
        assert!(right.len() == 2 && live[0] & 1 == 1 && live[(3 << 20 >> 9) / 8] & 1 == 1, "{}", right.len());
        for cut in &cuts.get_mut().0 {
            let found = check_of_qemu(cut);
            assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
            match read_header(cut).expect("a valid header").autoclear {
                0 => without += 1,
                _ => with += usize::from(all_bits(cut) == right),
            }
            assert!(read_header(cut).expect("valid").autoclear == 0 || all_bits(cut) == right, "seed {seed}: it lies");
        }
    }
    assert!(without > 50 && with > 10, "{without} and {with}");
}

/// QEMU's own growth leaves what is new clear, and takes what we leave.
#[test]
fn bitmaps_grow_with_their_disk() {
    for seed in 1..=12 {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut random) = (folder.path(), Random::new(seed));
        let (mut size, granularity) = (512 * (1 + random.below(30_000)), 512 << random.below(6));
        make(folder, size, granularity, 512 << random.below(8), &mut random);
        let (kept, mut expected) = (marked(folder, "kept"), marked(folder, "live"));
        // The last piece of the old disk may reach into what is new, and says the same of that.
        let reach = |marked: BTreeSet<u64>, old: u64, size: u64| -> BTreeSet<u64> {
            let last = pieces(ByteRange { start: old - 512, end: old }, granularity, size);
            let reaches = marked.contains(&(old / 512 - 1));
            marked.into_iter().chain(last.filter(|_| reaches)).collect()
        };
        let mut kept = kept;
        for round in 0..3 {
            let layer = Layer::open(&folder.join(NAME), "qcow2", true);
            for grown in 0..2 {
                let range = some_range(size, &mut random);
                layer.write(range.start, &vec![9; range.len() as usize]);
                expected.extend(pieces(range, granularity, size));
                let old = size;
                let most = if random.one_in(3) { 40_000 } else { 100 };
                size += 512 * (1 + random.below(most));
                layer.grow(size).expect("an image that can grow");
                (kept, expected) = (reach(kept, old, size), reach(expected, old, size));
                let what = format!("seed {seed}, round {round}, {grown}: {old} to {size}");
                assert_eq!(flags(folder), in_use(), "{what}");
                assert!(shown(&*layer.image, "live") == expected, "{what}");
                assert!(shown(&*layer.image, "kept") == kept, "{what}");
                let range = ByteRange { start: size - 512, end: size };
                layer.write(range.start, &[8; 512]);
                expected.extend(pieces(range, granularity, size));
            }
            // What the shorter tables had is given back.
            (0..2).for_each(|_| layer.settle());
            run(folder, "qemu-img", &["check", "-q", "-U", NAME]);
            layer.close();
            run(folder, "qemu-img", &["check", "-q", NAME]);
            assert_eq!(flags(folder), clean(), "seed {seed}");
            assert!(marked(folder, "kept") == kept && marked(folder, "live") == expected, "seed {seed}, round {round}");
        }
        // And by QEMU, from ours.
        let larger = (size + 512 * (1 + random.below(1000))).to_string();
        run(folder, "qemu-img", &["resize", "-q", NAME, &larger]);
        run(folder, "qemu-img", &["check", "-q", NAME]);
    }
}

/// A growth that comes to nothing, before or after its bitmaps were made.
#[test]
fn bitmaps_of_a_growth_that_came_to_nothing_are_as_they_were() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, 1 << 20, 512, 512, &mut Random::new(5));
    let before = (marked(folder, "kept"), marked(folder, "live"));
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    for _ in 0..3 {
        layer.image.grow(64 << 20, 0, &|| Ok(())).expect("an image that can grow");
        layer.image.ungrow(1 << 20);
    }
    assert_eq!((shown(&*layer.image, "kept"), shown(&*layer.image, "live")), before);
    layer.close();
    run(folder, "qemu-img", &["check", "-q", NAME]);
    assert_eq!((marked(folder, "kept"), marked(folder, "live")), before);
}

/// A table of a kind that nobody knows cannot be made longer.
#[test]
fn a_bitmap_that_says_what_nobody_reads_keeps_its_disk_as_large_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder, 1 << 20, 4096, 4096, &mut Random::new(6));
    let storage = FileStorage::open(&folder.join(NAME), true).expect("a file");
    let header = read_header(&*storage).expect("a valid header");
    let kept = bitmaps::read(&*storage, &header).expect("a valid directory").remove(0);
    storage.write_at(kept.entry_offset + 16, &[7]).expect("room");
    let layer = Layer::open(&folder.join(NAME), "qcow2", true);
    let error = layer.grow(2 << 20).expect_err("refused").one_line();
    assert!(error.contains("bitmap kept") && error.contains("--remove"), "{error}");
    assert_eq!(layer.image.size(), 1 << 20);
    layer.close();
    assert_eq!(read_header(&*storage).expect("a valid header").geometry.size, 1 << 20);
}

fn write_one(image: &Qcow2, disk: &Disk, guest: ByteRange) {
    let Reserve::Room(room) = image.reserve(guest).expect("a valid image") else { panic!("nobody else writes") };
    disk.write_at(room.host, &[5; 512]).expect("memory");
    image.commit(room).expect("a valid image");
}

/// The bits of the bitmap `live`, as its table says.
fn bits(disk: &Disk) -> Vec<u8> {
    all_bits(disk).pop().expect("the second one")
}

fn all_bits(disk: &Disk) -> Vec<Vec<u8>> {
    let header = read_header(disk).expect("a valid header");
    let cluster = header.geometry.cluster_size() as usize;
    let bits = |one: &bitmaps::Bitmap| {
        let mut bits = Vec::new();
        for place in bitmaps::read_table(disk, &header, one).expect("a valid table") {
            let mut bytes = vec![0; cluster];
            if place > 0 {
                disk.read_at(place, &mut bytes).expect("inside the file");
            }
            bits.extend(bytes);
        }
        bits
    };
    bitmaps::read(disk, &header).expect("a valid directory").iter().map(bits).collect()
}
