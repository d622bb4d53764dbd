//! `check` and its repair beside those of qemu-img, on images that were broken for the occasion.

use crate::support::damage::{self, Damage, Kinds, Patient};
use crate::support::disk::Disk;
use crate::support::qemu::contents;
use crate::support::random::Random;
use formats::image::{Image, Place};
use formats::journal::Forgetful;
use formats::qcow2::{Check, Repair, check, repair};
use formats::qcow2::{Open, Qcow2};
use formats::storage::Storage;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// How many broken images each test makes: `IMAGES`, or 20 where that is not given.
fn images() -> u64 {
    match std::env::var("IMAGES") {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("IMAGES={text}: {error}")),
        Err(_) => 20,
    }
}

/// What qemu-img found: exit code, corruptions, leaks, the rest of the numbers.
#[derive(Debug)]
struct Theirs {
    code: i32,
    json: String,
}

impl Theirs {
    fn number(&self, name: &str) -> u64 {
        let Some((_, rest)) = self.json.split_once(&format!("\"{name}\": ")) else { return 0 };
        let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse().ok()).expect("a number")
    }
}

fn qemu_check(folder: &Path, image: &str, more: &[&str]) -> Theirs {
    let mut command = Command::new("qemu-img");
    command.args(["check", "--output=json", "-f", "qcow2"]).args(more).arg(image).current_dir(folder);
    let output = command.output().expect("qemu-img can be run");
    let json = String::from_utf8(output.stdout).expect("text");
    Theirs { code: output.status.code().expect("no signal"), json }
}

/// What is told on purpose where QEMU is content; see the module.
fn on_purpose(found: &Check) -> u64 {
    let ours_alone = ["used as something else besides", "no zero flag", "is not its guest offset"];
    found.problems.iter().filter(|problem| ours_alone.iter().any(|words| problem.contains(words))).count() as u64
}

fn code(corruptions: u64, leaks: u64) -> i32 {
    match (corruptions, leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    }
}

fn assert_agree(ours: &Check, theirs: &Theirs, what: &str) {
    let corruptions = ours.corruptions - on_purpose(ours);
    // Of what is not told nobody knows whether it is on purpose.
    let all_told = ours.corruptions + ours.leaks <= ours.problems.len() as u64;
    let corruptions = if all_told { corruptions } else { corruptions.min(theirs.number("corruptions")) };
    let numbers = (corruptions, ours.leaks);
    assert_eq!(
        numbers,
        (theirs.number("corruptions"), theirs.number("leaks")),
        "{what}\n{:#?}\n{theirs:?}",
        ours.problems
    );
    assert_eq!(code(corruptions, ours.leaks), theirs.code, "{what}");
    for (name, number) in [
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("image-end-offset", ours.image_end_offset),
    ] {
        assert_eq!(number, theirs.number(name), "{name}: {what}\n{:#?}\n{theirs:?}", ours.problems);
    }
}

/// A broken image, whole before.
struct Case {
    folder: tempfile::TempDir,
    before: Vec<u8>,
    whole: Vec<u8>,
    broken: Vec<u8>,
    what: String,
    snapshots: Vec<String>,
}

impl Case {
    /// `None` where nothing could be broken.
    fn new(seed: u64, kinds: &[Damage]) -> Option<Self> {
        Self::of(Kinds::QemuRepairs, seed, kinds)
    }

    fn of(images: Kinds, seed: u64, kinds: &[Damage]) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut random = Random::new(seed);
        let mut what = format!("seed {seed}");
        damage::make(folder.path(), images, &mut random, &mut what);
        let whole = std::fs::read(folder.path().join("image.qcow2")).expect("just made");
        let mut patient = Patient::new(whole.clone());
        let mut any = false;
        for _ in 0..1 + random.below(3) {
            let kind = kinds[random.below(kinds.len() as u64) as usize];
            if patient.hurt(kind, &mut random) {
                what += &format!("\n{kind:?}");
                any = true;
            }
        }
        let before = contents(folder.path(), "image.qcow2");
        let snapshots = ["s0", "s1"].into_iter().filter(|name| what.contains(&format!("-c {name}"))).map(String::from);
        let snapshots = snapshots.collect();
        any.then_some(Self { folder, before, whole, broken: patient.bytes, what, snapshots })
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.folder.path().join(name), bytes).expect("room");
    }

    fn repaired(&self, what: Repair) -> formats::error::Result<(Check, Vec<u8>)> {
        let disk = Disk::with(&self.broken);
        let found = repair(
            &disk,
            &|| {
                disk.flush();
                Ok(())
            },
            what,
        )?;
        Ok((found, disk.to_vec()))
    }

    fn snapshot(&self, image: &str, name: &str) -> Vec<u8> {
        let folder = self.folder.path();
        crate::support::qemu::run(folder, "qemu-img", &["convert", "-l", name, "-O", "raw", image, "snapshot.raw"]);
        std::fs::read(folder.join("snapshot.raw")).expect("just made")
    }
}

#[test]
fn broken_images_are_judged_as_by_qemu() {
    let mut seen = [0; 4];
    for seed in 1..=images() * 2 {
        let kinds = if seed % 8 == 0 { &[Damage::Leak][..] } else { &Damage::ALL };
        let Some(case) = Case::of(Kinds::All, seed, kinds) else { continue };
        let whole = check(&Disk::with(&case.whole)).expect("a valid image");
        assert_eq!((whole.corruptions, whole.leaks), (0, 0), "{}: {:#?}", case.what, whole.problems);
        case.write("broken.qcow2", &case.broken);
        let theirs = qemu_check(case.folder.path(), "broken.qcow2", &[]);
        match check(&Disk::with(&case.broken)) {
            Ok(ours) => assert_agree(&ours, &theirs, &case.what),
            // QEMU reads zeroes where the file was cut, and takes what snapshots use for leaks.
            Err(error) if error.one_line().starts_with("the snapshot table") => {}
            Err(error) => assert_eq!(theirs.code, 1, "{}: {error}\n{theirs:?}", case.what),
        }
        seen[theirs.code as usize] += 1;
    }
    assert!(seen[0] + seen[1] < images() && seen[2] > images() / 2 && seen[3] > 2, "{seen:?}");
}

#[test]
fn what_guests_see_survives_a_repair() {
    for seed in 1001..=1000 + images() {
        let Some(case) = Case::new(seed, &Damage::HARMLESS) else { continue };
        let (found, bytes) = case.repaired(Repair::All).expect("it can be mended");
        assert!(found.is_clean(), "{}\n{:#?}", case.what, found.problems);
        case.write("mended.qcow2", &bytes);
        assert_eq!(qemu_check(case.folder.path(), "mended.qcow2", &[]).code, 0, "{}", case.what);
        assert!(contents(case.folder.path(), "mended.qcow2") == case.before, "{}", case.what);
        for name in &case.snapshots {
            assert!(case.snapshot("mended.qcow2", name) == case.snapshot("image.qcow2", name), "{name}: {}", case.what);
        }
    }
}

#[test]
fn a_repair_mends_what_qemu_mends() {
    let mut mended = 0;
    for seed in 2001..=2000 + images() {
        let Some(case) = Case::new(seed, &Damage::ALL) else { continue };
        let folder = case.folder.path();
        case.write("theirs.qcow2", &case.broken);
        let by_them = qemu_check(folder, "theirs.qcow2", &["-r", "all"]);
        let Ok((ours, bytes)) = case.repaired(Repair::All) else {
            assert_eq!(by_them.code, 1, "{}", case.what);
            continue;
        };
        case.write("ours.qcow2", &bytes);
        assert_agree(&ours, &qemu_check(folder, "ours.qcow2", &[]), &case.what);
        // QEMU makes the file longer for a refcount block that is past its end; then other entries end in it.
        let grown = case.what.contains("BlockPast") && ours.problems.iter().any(|told| told.contains("past the end"));
        if by_them.code != 0 || grown {
            continue;
        }
        assert_eq!(ours.corruptions, on_purpose(&ours), "{}\n{:#?}", case.what, ours.problems);
        assert_eq!(ours.leaks, 0, "{}", case.what);
        let after_theirs = std::fs::read(folder.join("theirs.qcow2")).expect("it is there");
        let judged = check(&Disk::with(&after_theirs)).expect("a valid image");
        assert_eq!(
            (judged.corruptions, judged.leaks),
            (on_purpose(&judged), 0),
            "{}\n{:#?}",
            case.what,
            judged.problems
        );
        assert!(contents(folder, "ours.qcow2") == contents(folder, "theirs.qcow2"), "{}", case.what);
        mended += 1;
    }
    assert!(mended > images() / 4, "{mended}");
}

#[test]
fn leaks_alone_are_mended_as_by_qemu() {
    let mut mended = 0;
    for seed in 3001..=3000 + images() {
        let Some(case) = Case::new(seed, &[Damage::Count, Damage::Leak, Damage::L2Flag]) else { continue };
        case.write("theirs.qcow2", &case.broken);
        let by_them = qemu_check(case.folder.path(), "theirs.qcow2", &["-r", "leaks"]);
        match case.repaired(Repair::Leaks) {
            Ok((ours, _)) => {
                assert_agree(&ours, &by_them, &case.what);
                mended += ours.leaks_fixed;
            }
            Err(error) => assert_eq!(by_them.code, 1, "{}: {error}", case.what),
        }
    }
    assert!(mended > 5, "{mended}");
}

/// Two entries of the L1 table had one L2 table, and a repair counted it so. Writing to such an image was refused,
/// though a check calls it clean.
#[test]
fn what_a_repair_leaves_shared_is_written_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = |program: &str, arguments: &[&str]| crate::support::qemu::run(folder.path(), program, arguments);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "image.qcow2", "4M"]);
    run("qemu-io", &["-c", "write -P 1 0 8k", "-c", "write -P 2 2M 8k", "image.qcow2"]);
    let path = folder.path().join("image.qcow2");
    let disk = Disk::with(&std::fs::read(&path).expect("just made"));
    let mut l1 = [0; 8];
    disk.read_at(3 * 4096, &mut l1).expect("memory");
    disk.write_at(3 * 4096 + 8, &l1).expect("memory");
    let found = repair(&disk, &|| Ok(()), Repair::All).expect("it can be mended");
    assert!(found.is_clean(), "{:#?}", found.problems);

    std::fs::write(&path, disk.to_vec()).expect("room");
    let before = contents(folder.path(), "image.qcow2");
    assert!(before[..2 << 20] == before[2 << 20..], "they share the table");
    let layer = crate::support::file::Layer::open(&path, "qcow2", true);
    layer.write(2 << 20, &[3; 4096]);
    layer.close();
    let after = contents(folder.path(), "image.qcow2");
    assert!(after[..2 << 20] == before[..2 << 20] && after[2 << 20..][..4096] == [3; 4096]);
    assert!(after[(2 << 20) + 4096..] == before[(2 << 20) + 4096..]);
    let theirs = qemu_check(folder.path(), "image.qcow2", &[]);
    assert_eq!(theirs.number("leaks"), 0, "{theirs:?}");
    // Entries that are not shared any more may be without their flag: a needless copy, nothing worse.
    let found = check(&Disk::with(&std::fs::read(&path).expect("it is there"))).expect("a valid image");
    let flag = "the copied flag is not set, and its refcount is 1";
    assert!(found.problems.iter().all(|told| told.ends_with(flag)), "{:#?}", found.problems);
}

/// A file whose power is cut, in copies of the world, around every write and flush.
struct Cutting {
    disk: Disk,
    worlds: Mutex<(Random, Vec<Disk>)>,
}

impl Cutting {
    fn cut(&self) {
        let (random, worlds) = &mut *self.worlds.lock().expect("one thread");
        if worlds.len() < 100 || random.one_in(worlds.len() as u64 / 20) {
            worlds.push(self.disk.after_power_cut(random));
            worlds.push(self.disk.after_power_cut(random));
        }
    }

    fn flush(&self) {
        self.cut();
        self.disk.flush();
        self.cut();
    }
}

impl Storage for Cutting {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(at, bytes)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.write_at(at, bytes)?;
        self.cut();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.disk.next_data(at)
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        self.disk.next_hole(at)
    }
}

/// Everything that a guest reads.
fn view(disk: &Arc<Disk>) -> Vec<u8> {
    let open = Open { writable: false, has_backing: false, metadata_bytes_max: 1 << 16 };
    let image = Qcow2::open(disk.clone(), Arc::new(Forgetful), open).expect("an image that can be read");
    let mut bytes = vec![0; image.size() as usize];
    let mut at = 0;
    while at < image.size() {
        let extent = image.map(at, u64::MAX).expect("inside the disk");
        let here = &mut bytes[at as usize..extent.guest.end as usize];
        match extent.place {
            Place::Zero | Place::Absent => {}
            // Payload in a file of its own is not looked at, nor changed.
            Place::Data { .. } if image.header().data_file.is_some() => here.fill(1),
            Place::Data { host } => read_inside(disk, host, here),
            Place::Compressed { host, len, skip, inflated } => {
                let (mut compressed, mut cluster) = (vec![0; len as usize], vec![0; inflated as usize]);
                read_inside(disk, host, &mut compressed);
                image.inflate(&compressed, &mut cluster).expect("a whole cluster");
                here.copy_from_slice(&cluster[skip as usize..][..here.len()]);
            }
        }
        at = extent.guest.end;
    }
    bytes
}

fn read_inside(disk: &Disk, at: u64, bytes: &mut [u8]) {
    let inside = disk.len().expect("memory").saturating_sub(at).min(bytes.len() as u64);
    disk.read_at(at, &mut bytes[..inside as usize]).expect("memory");
}

/// Clusters that are in use and would be given out, or shared and thought alone, and refcount blocks that
/// are none: in a file that is longer such a one is a cluster that nobody counts.
fn too_low(disk: &Disk) -> usize {
    let found = check(disk).expect("it can be walked");
    assert!(found.problems.len() < 100, "too many to be told: {found:?}");
    let kinds = ["cluster ", "refcount table:"];
    found.problems.iter().filter(|told| kinds.iter().any(|kind| told.starts_with(kind))).count()
}

#[test]
fn power_cuts_during_a_repair_make_nothing_worse() {
    use Damage::{BlockReserved, Count, CountZero, L1Flag, L2Flag, Leak, ZeroCrooked};
    let kinds = [Count, CountZero, Leak, Leak, L2Flag, L1Flag, ZeroCrooked, ZeroCrooked, ZeroCrooked, BlockReserved];
    let mut cuts = 0;
    for seed in 4001..=4000 + images() {
        let Some(case) = Case::new(seed, &kinds) else { continue };
        let broken = Disk::with(&case.broken);
        let found = check(&broken).expect("it can be walked");
        if found.problems.len() >= 60 {
            continue;
        }
        let low = too_low(&broken);
        let world = Cutting { disk: broken, worlds: Mutex::new((Random::new(seed), Vec::new())) };
        let after = repair(
            &world,
            &|| {
                world.flush();
                Ok(())
            },
            Repair::All,
        )
        .expect("it can be mended");
        assert!(after.is_clean(), "{}\n{:#?}", case.what, after.problems);
        let mended = view(&Arc::new(world.disk));
        for world in world.worlds.into_inner().expect("one thread").1 {
            let disk = Arc::new(world);
            assert!(too_low(&disk) <= low, "{}\n{:#?}", case.what, check(&*disk));
            // A crooked place reads as zeroes before and after; all else is what it was.
            let crooked = case.what.contains("ZeroCrooked");
            assert!(crooked || view(&disk) == mended, "{}", case.what);
            let again = repair(
                &*disk,
                &|| {
                    disk.flush();
                    Ok(())
                },
                Repair::All,
            )
            .expect("it can be mended");
            assert!(again.is_clean(), "{}\n{:#?}", case.what, again.problems);
            assert!(view(&disk) == mended, "{}", case.what);
            cuts += 1;
        }
    }
    assert!(cuts > 150, "{cuts}");
}
