//! External data files against QEMU's own tools: theirs read by us, ours read and checked by them; and a raw
//! data file is the disk by itself.

use crate::support::act::{act, assert_same};
use crate::support::disk::Disk;
use crate::support::file::{FileStorage, Layer};
use crate::support::notes::Notes;
use crate::support::qemu::{contents, run};
use crate::support::random::Random;
use formats::image::{Image, Place, Progress, Settle};
use formats::journal::Forgetful;
use formats::qcow2::{Create, DataFile, Open, Qcow2, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const IMAGES: u64 = 24;
const NAME: &str = "disk.qcow2";
const DATA: &str = "disk.data";

/// An image with a data file in a folder of its own.
struct Made {
    folder: tempfile::TempDir,
    raw: bool,
    told: String,
}

impl Made {
    /// By QEMU, which also fills it.
    fn by_qemu(seed: u64, random: &mut Random) -> Self {
        let raw = random.one_in(2);
        let made = Self { folder: tempfile::tempdir().expect("a folder"), raw, told: format!("seed {seed}") };
        let size = 512 * (1 + random.below(6000));
        let cluster = 512 << random.below(9);
        let extended = if cluster >= 1 << 14 && random.one_in(2) { "on" } else { "off" };
        let raw_text = if raw { "on" } else { "off" };
        let options =
            format!("cluster_size={cluster},extended_l2={extended},data_file={DATA},data_file_raw={raw_text}");
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if !raw && random.one_in(3) {
            run(made.folder.path(), "qemu-img", &["create", "-q", "-f", "raw", "below.raw", "1M"]);
            run(made.folder.path(), "qemu-io", &["-f", "raw", "-c", "write -P 77 0 1M", "below.raw"]);
            arguments.extend(["-b", "below.raw", "-F", "raw"]);
        }
        let size_text = size.to_string();
        arguments.extend([NAME, &size_text]);
        let told = format!("{}\nqemu-img {}", made.told, arguments.join(" "));
        run(made.folder.path(), "qemu-img", &arguments);
        let mut orders = vec!["-d".to_owned(), "unmap".to_owned()];
        for _ in 0..random.below(12) {
            let start = random.below(size / 512);
            let count = 1 + random.below((size / 512 - start).min(600));
            let range = format!("{} {}", start * 512, count * 512);
            let order = match random.below(6) {
                0 => format!("write -z {range}"),
                1 => format!("write -z -u {range}"),
                2 => format!("discard {range}"),
                _ => format!("write -P {} {range}", random.below(256)),
            };
            orders.extend(["-c".to_owned(), order]);
        }
        orders.push(NAME.to_owned());
        let told = format!("{told}\nqemu-io {orders:?}");
        run(made.folder.path(), "qemu-io", &orders.iter().map(String::as_str).collect::<Vec<_>>());
        Self { told, ..made }
    }

    /// By us, empty.
    fn by_us(seed: u64, random: &mut Random) -> Self {
        let raw = random.one_in(2);
        let made = Self { folder: tempfile::tempdir().expect("a folder"), raw, told: String::new() };
        let data_file = Some(DataFile { name: DATA.into(), raw });
        let size = 512 * (1 + random.below(8000));
        let cluster_bits = 9 + random.below(10) as u32;
        let asked = Create {
            cluster_bits,
            extended_l2: cluster_bits >= 14 && random.one_in(2),
            refcount_order: random.below(7) as u32,
            data_file,
            ..Create::new(size)
        };
        create(&*FileStorage::open(&made.path(), true).expect("a file"), &asked).expect("valid options");
        let data = FileStorage::open(&made.folder.path().join(DATA), true).expect("a file");
        data.set_len(size).expect("a sparse file");
        Self { told: format!("seed {seed}: {asked:?}"), ..made }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// QEMU finds nothing wrong and reads `model`, and so does whoever reads a raw data file alone.
    fn is_right(&self, model: &[u8]) {
        let storage: Arc<dyn Storage> = FileStorage::open(&self.path(), false).expect("a file");
        let found = formats::qcow2::check(&*storage).expect("it can be walked");
        assert_eq!((found.leaks, found.corruptions), (0, 0), "{}: {:#?}", self.told, found.problems);
        run(self.folder(), "qemu-img", &["check", "-q", NAME]);
        assert_same(&contents(self.folder(), NAME), model, &self.told);
        if self.raw {
            let data = std::fs::read(self.folder().join(DATA)).expect("the data file");
            // QEMU makes it longer: up to the end of the last cluster.
            assert_same(&data[..model.len()], model, &format!("the data file alone: {}", self.told));
            let info = run(self.folder(), "qemu-img", &["info", NAME]);
            assert!(String::from_utf8_lossy(&info.stdout).contains("data file raw: true"), "{}", self.told);
        }
    }
}

#[test]
fn images_of_qemu_read_byte_for_byte_and_extent_for_extent() {
    for seed in 1..=IMAGES {
        let made = Made::by_qemu(seed, &mut Random::new(seed));
        let layer = Layer::open(&made.path(), "qcow2", false);
        assert_same(&layer.to_vec(), &contents(made.folder(), NAME), &made.told);
        assert_eq!(extents(&*layer.image), mapped(made.folder()), "{}", made.told);
    }
}

#[test]
fn images_of_qemu_that_we_wrote_to_are_right() {
    for seed in 1001..=1000 + IMAGES {
        let mut random = Random::new(seed);
        let made = Made::by_qemu(seed, &mut random);
        let model = contents(made.folder(), NAME);
        write_and_check(&made, model, &mut random);
    }
}

#[test]
fn images_of_ours_are_right_and_mapped_as_by_qemu() {
    for seed in 2001..=2000 + IMAGES {
        let mut random = Random::new(seed);
        let made = Made::by_us(seed, &mut random);
        let image = Layer::open(&made.path(), "qcow2", false).image;
        let place = if made.raw { Told::Data(0) } else { Told::Nothing };
        assert_eq!(extents(&*image)[0], (0, image.size(), place), "{}", made.told);
        assert_eq!(extents(&*image), mapped(made.folder()), "{}", made.told);
        let model = vec![0; image.size() as usize];
        made.is_right(&model);
        write_and_check(&made, model, &mut random);
        assert_eq!(extents(&*Layer::open(&made.path(), "qcow2", false).image), mapped(made.folder()), "{}", made.told);
    }
}

fn write_and_check(made: &Made, mut model: Vec<u8>, random: &mut Random) {
    for _ in 0..3 {
        let layer = Layer::open(&made.path(), "qcow2", true);
        for _ in 0..random.below(30) {
            act(&layer, &mut model, random);
        }
        layer.settle();
        layer.settle();
        assert_same(&layer.to_vec(), &model, &made.told);
        drop(layer);
        made.is_right(&model);
    }
}

/// What is said of a run of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// At this offset of the data file.
    Data(u64),
    Zero,
    Nothing,
}

/// Adds a run of `len` bytes, to the last one where that goes on.
fn push(runs: &mut Vec<(u64, u64, Told)>, start: u64, len: u64, told: Told) {
    if let Some((first, so_far, last)) = runs.last_mut() {
        let goes_on = match (*last, told) {
            (Told::Data(host), Told::Data(next)) => host + *so_far == next,
            (last, told) => last == told,
        };
        if goes_on && *first + *so_far == start {
            *so_far += len;
            return;
        }
    }
    runs.push((start, len, told));
}

fn extents(image: &dyn Image) -> Vec<(u64, u64, Told)> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < image.size() {
        let extent = image.map(at, u64::MAX).expect("a valid image");
        let told = match extent.place {
            Place::Data { host } => Told::Data(host),
            Place::Zero => Told::Zero,
            Place::Absent => Told::Nothing,
            Place::Compressed { .. } => panic!("no data file has any"),
        };
        push(&mut runs, at, extent.guest.len(), told);
        at = extent.guest.end;
    }
    runs
}

/// The same by `qemu-img map`, as far as the top image alone says it.
fn mapped(folder: &Path) -> Vec<(u64, u64, Told)> {
    let output = run(folder, "qemu-img", &["map", "--output=json", NAME]);
    let mut runs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let field = |name: &str| {
            let (_, rest) = line.split_once(&format!("\"{name}\": "))?;
            rest.split([',', '}']).next()
        };
        let number = |name| field(name).and_then(|text| text.trim().parse().ok());
        let (start, len) = (number("start").expect("a start"), number("length").expect("a length"));
        let here = field("depth") == Some("0") && field("present") == Some("true");
        let told = match (here, field("data")) {
            (true, Some("true")) => Told::Data(number("offset").expect("an offset")),
            (true, _) => Told::Zero,
            (false, _) => Told::Nothing,
        };
        push(&mut runs, start, len, told);
    }
    runs
}

fn image_in_memory(raw: bool) -> Arc<Disk> {
    let disk = Arc::new(Disk::default());
    let data_file = Some(DataFile { name: DATA.into(), raw });
    create(&*disk, &Create { data_file, ..Create::new(1 << 20) }).expect("valid options");
    disk
}

fn open(disk: &Arc<Disk>, writable: bool) -> Qcow2 {
    let open = Open { writable, has_backing: false, metadata_bytes_max: 1 << 20 };
    Qcow2::open(disk.clone(), Arc::new(Forgetful), open).expect("a valid image")
}

/// Opening for writing cleared all autoclear bits, and the data file was raw no more.
#[test]
fn a_raw_data_file_stays_raw_and_other_autoclear_bits_go() {
    for (raw, before, after) in [(true, 2_u64, 2_u64), (true, 2 | 1 << 9, 2), (false, 1 << 9, 0)] {
        let disk = image_in_memory(raw);
        disk.write_at(88, &before.to_be_bytes()).expect("memory");
        let image = open(&disk, true);
        assert_eq!(image.flush_first(), before != after);
        assert_eq!(open(&disk, false).info().autoclear_features, after);
    }
}

/// A flush of a guest that changed no mapping touches the data file alone; one that did flushes the data file
/// before anything else.
#[test]
fn payload_is_flushed_first() {
    let image = open(&image_in_memory(false), true);
    let settle = || {
        let mut progress = Progress::default();
        let mut flushes = Vec::new();
        loop {
            match image.settle(&mut progress).expect("a settle") {
                Settle::Done => return flushes,
                flush => flushes.push(flush),
            }
        }
    };
    assert_eq!(settle(), [Settle::FlushPayload]);
    let write = |at| {
        let range = ByteRange { start: at, end: at + 512 };
        let formats::image::Reserve::Room(room) = image.reserve(range).expect("room") else { panic!("nobody else") };
        assert_eq!(room.host, at, "a place for good");
        image.commit(room).expect("its own");
    };
    write(100 << 10);
    // Refcounts of the new L2 table, mappings.
    assert_eq!(settle(), [Settle::FlushPayload, Settle::Flush, Settle::Flush]);
    write(300 << 10);
    assert_eq!(settle(), [Settle::FlushPayload, Settle::Flush]);
    write(100 << 10);
    assert_eq!(settle(), [Settle::FlushPayload]);
}

/// What an image with a data file cannot have is an error when it is come across, and a check finds it.
#[test]
fn entries_that_cannot_be_are_errors() {
    for entry in [1_u64 << 62 | 0x30000, 1 << 63 | 0x50000, 1 << 63] {
        let disk = image_in_memory(true);
        let l2 = 4_u64 << 16;
        // Of guest cluster 3.
        disk.write_at(l2 + 24, &entry.to_be_bytes()).expect("memory");
        let image = open(&disk, true);
        let error = image.map(3 << 16, 1).expect_err("no place").one_line();
        assert!(error.contains("external data file"), "{error}");
        assert_eq!(image.map(0, u64::MAX).expect("the others").guest.end, 3 << 16);
        let storage: Arc<dyn Storage> = disk;
        assert_eq!(formats::qcow2::check(&*storage).expect("it can be walked").corruptions, 1);
    }
}

#[test]
fn holes_of_the_data_file_are_known() {
    /// Data in the second half.
    struct Half;
    impl Storage for Half {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn len(&self) -> std::io::Result<u64> {
            Ok(1 << 20)
        }
        fn set_len(&self, _: u64) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn next_data(&self, at: u64) -> std::io::Result<Option<u64>> {
            Ok(Some(at.max(1 << 19)))
        }
        fn next_hole(&self, _: u64) -> std::io::Result<u64> {
            self.len()
        }
    }
    let image = open(&image_in_memory(true), false).with_data_file(Arc::new(Half));
    let hole = image.map_thin(0, u64::MAX).expect("a mapping");
    assert_eq!((hole.guest.len(), hole.place), (1 << 19, Place::Zero));
    let data = image.map_thin(1 << 19, u64::MAX).expect("a mapping");
    assert_eq!((data.guest.len(), data.place), (1 << 19, Place::Data { host: 1 << 19 }));
    assert_eq!(image.map(0, u64::MAX).expect("a mapping").guest.len(), 1 << 20);
}

/// A kill keeps mappings in the journal, and places in the data file need no more.
#[test]
fn notes_of_places_outside_the_image_file_come_back() {
    let disk = image_in_memory(false);
    let notes = Arc::new(Notes::new(100));
    let options = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 20 };
    let image = Qcow2::open(disk.clone(), notes.clone(), options).expect("a valid image");
    let range = ByteRange { start: 15 << 16, end: 16 << 16 };
    let formats::image::Reserve::Room(room) = image.reserve(range).expect("room") else { panic!("nobody else") };
    image.commit(room).expect("its own");
    let after = Arc::new(disk.copy());
    let image = Qcow2::open(after, notes.clone(), options).expect("a valid image");
    image.replay(&notes.kept()).expect("its own notes");
    assert_eq!(image.map(15 << 16, 1).expect("a mapping").place, Place::Data { host: 15 << 16 });
}
