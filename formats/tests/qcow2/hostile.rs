//! qcow2 images that are cut, flipped and made up: errors that name what is wrong, within bounds.

use crate::support::disk::Disk;
use crate::support::notes::Notes;
use crate::support::random::Random;
use formats::image::{Image, Place, Progress, Reserve, Settle, Zeroing};
use formats::journal::Change;
use formats::qcow2::{Create, DataFile, Open, Qcow2, Repair, check, create, repair};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::sync::Arc;

const OPEN: Open = Open { writable: true, has_backing: false, metadata_bytes_max: 0 };

/// A small image with some of everything that we write.
fn image(random: &mut Random) -> (Disk, u64) {
    let cluster_bits = [9, 12, 16][random.below(3) as usize];
    let size = 60 << cluster_bits;
    let disk = Arc::new(Disk::default());
    let data_file = random.one_in(3).then(|| DataFile { name: "data".into(), raw: random.one_in(2) });
    let asked = Create { cluster_bits, refcount_order: random.below(7) as u32, data_file, ..Create::new(size) };
    create(&*disk, &asked).expect("valid options");
    let image = Qcow2::open(disk.clone(), Arc::new(Notes::new(1000)), OPEN).expect("a valid image");
    use_it(&image, random);
    (disk.copy(), size)
}

/// Asks for everything; errors are fine, nonsense is not.
fn use_it(image: &Qcow2, random: &mut Random) {
    let size = image.size();
    for _ in 0..40 {
        let start = random.below(size);
        let range = ByteRange { start, end: start + 1 + random.below((size - start).min(1 << 17)) };
        match random.below(4) {
            0 => {
                let _ = image.zero(range, [Zeroing::Unmap, Zeroing::Keep][random.below(2) as usize]);
            }
            1 => look(image, range),
            _ => {
                if let Ok(Reserve::Room(room)) = image.reserve(range) {
                    assert!(room.guest.start == range.start && room.guest.end <= range.end && !room.guest.is_empty());
                    let _ = image.commit(room);
                }
            }
        }
    }
    let mut progress = Progress::default();
    while let Ok(Settle::Flush | Settle::FlushPayload) = image.settle(&mut progress) {}
    image.recycle();
}

/// A larger disk, or an error; what is new is inside it and nowhere else.
fn grow(image: &Qcow2, random: &mut Random) {
    let old = image.size();
    // All of a raw data file is there, which takes tables.
    let most = if image.header().data_file.is_some() { 14 } else { 40 };
    let new = old.saturating_add(512 << random.below(most));
    match image.grow(new, random.below(3) * old, &|| Ok(())) {
        Ok(range) => {
            assert!(image.size() == new && range.start == old && (old..=new).contains(&range.end), "{range}");
            look(image, ByteRange { start: old, end: new });
            let _ = image.zero(ByteRange { start: old, end: new }, Zeroing::Unmap);
            match random.one_in(2) {
                true => _ = image.keep_size(&|| Ok(())),
                false => image.ungrow(old),
            }
        }
        Err(error) => assert!(image.size() == old && error.one_line().contains(' '), "{error}"),
    }
}

/// What is inside the disk is an extent inside the disk, or an error; what is outside is refused.
fn look(image: &Qcow2, range: ByteRange) {
    match image.map(range.start, range.len()) {
        Ok(extent) => {
            assert!(extent.guest.start == range.start && extent.guest.end <= range.end && !extent.guest.is_empty());
            if let Place::Compressed { len, skip, inflated, .. } = extent.place {
                assert!(skip < inflated && u64::from(inflated) == image.info().cluster_size && len <= 4 << 20);
                let _ = image.inflate(&vec![0x5a; len as usize], &mut vec![0; inflated as usize]);
            }
        }
        Err(error) => assert!(error.one_line().contains(' '), "{error}"),
    }
    assert!(image.map(image.size(), 1).is_err());
    assert!(image.reserve(ByteRange { start: image.size(), end: image.size() + 1 }).is_err());
}

fn use_hostile(disk: Disk, random: &mut Random) {
    let storage: Arc<dyn Storage> = Arc::new(disk);
    if let Ok(before) = check(&*storage)
        && random.one_in(2)
        && let Ok(after) = repair(&*storage, &|| Ok(()), Repair::All)
    {
        assert!(after.corruptions <= before.corruptions, "{before:#?}\n{after:#?}");
    }
    for writable in [false, true] {
        if let Ok(image) = Qcow2::open(storage.clone(), Arc::new(Notes::new(20)), Open { writable, ..OPEN }) {
            // A flip may have made the disk a huge one.
            if image.size() > 0 {
                use_it(&image, random);
                grow(&image, random);
            }
        }
    }
}

#[test]
fn flipped_bits_are_errors_or_another_image() {
    for seed in 1..300 {
        let mut random = Random::new(seed);
        let (disk, _) = image(&mut random);
        let len = disk.len().expect("memory");
        for _ in 0..1 + random.below(6) {
            // Mostly where the tables are.
            let at = if random.one_in(4) { random.below(len) } else { random.below(len.min(4096)) };
            let mut byte = [0];
            disk.read_at(at, &mut byte).expect("inside");
            disk.write_at(at, &[byte[0] ^ 1 << random.below(8)]).expect("memory");
        }
        use_hostile(disk, &mut random);
    }
}

#[test]
fn made_up_tables_are_errors_or_another_image() {
    for seed in 1..300 {
        let mut random = Random::new(seed);
        let (disk, _) = image(&mut random);
        let clusters = disk.len().expect("memory") / 512;
        for _ in 0..8 {
            // Entries that are plausible: near clusters, flags, all bits.
            let entry = match random.below(4) {
                0 => random.next(),
                1 => (random.below(clusters) * 512) | (1 << 63),
                2 => (random.below(clusters) * 512) | (1 << 62) | (random.next() << 50),
                _ => (random.next() & 7) << 61 | random.below(3),
            };
            let at = 112 + random.below(clusters.min(64) * 64 - 14) * 8;
            disk.write_at(at, &entry.to_be_bytes()).expect("memory");
        }
        use_hostile(disk, &mut random);
    }
}

#[test]
fn cut_files_are_errors_or_another_image() {
    for seed in 1..100 {
        let mut random = Random::new(seed);
        let (disk, _) = image(&mut random);
        let len = disk.len().expect("memory");
        disk.set_len(random.below(len)).expect("memory");
        use_hostile(disk, &mut random);
    }
}

#[test]
fn made_up_notes_are_errors_or_another_image() {
    let mut refused = 0;
    for seed in 1..300 {
        let mut random = Random::new(seed);
        let (disk, size) = image(&mut random);
        let disk = Arc::new(disk);
        let clusters = disk.len().expect("memory") / 512;
        let changes: Vec<Change> = (0..1 + random.below(6))
            .map(|_| Change {
                table: 1 + random.below(2) as u8,
                // What is behind the disk's end is of a growth that a kill cut short.
                index: if random.one_in(3) { random.below(size / 256) } else { random.below(2) },
                value: if random.one_in(3) { random.next() } else { (random.below(clusters) * 512) | 1 << 63 },
            })
            .collect();
        let image = Qcow2::open(disk, Arc::new(Notes::new(1000)), OPEN).expect("a valid image");
        refused += u64::from(image.replay(&changes).is_err());
        use_it(&image, &mut random);
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn a_huge_disk_in_a_small_file_costs_no_memory() {
    // The file claims 2^60 bytes; its tables are small and its counts are where they should be.
    let disk = Arc::new(Disk::default());
    create(&*disk, &Create { cluster_bits: 21, ..Create::new(1 << 60) }).expect("valid options");
    disk.set_len(1 << 54).expect("memory");
    let image = Qcow2::open(disk, Arc::new(Notes::new(1000)), OPEN).expect("a valid image");
    use_it(&image, &mut Random::new(1));
}
