//! qcow2 with extended L2 entries: what of them random guests do not come across, or would not notice.

use crate::support::disk::Disk;
use crate::support::notes::Notes;
use formats::error::Kind;
use formats::image::{Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::journal::Change;
use formats::qcow2::{Check, Create, Open, Qcow2, check, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::sync::Arc;

const CLUSTER: u64 = 64 << 10;
const SUB: u64 = CLUSTER / 32;
const OPEN: Open = Open { writable: true, has_backing: true, metadata_bytes_max: 1 << 20 };
const COPIED: u64 = 1 << 63;

fn empty(extended_l2: bool) -> Arc<Disk> {
    let disk = Arc::new(Disk::default());
    create(&*disk, &Create { extended_l2, ..Create::new(100 * CLUSTER) }).expect("valid options");
    disk
}

fn open(disk: &Arc<Disk>) -> Qcow2 {
    open_with(disk, Arc::new(Notes::new(1000)))
}

fn open_with(disk: &Arc<Disk>, notes: Arc<Notes>) -> Qcow2 {
    Qcow2::open(disk.clone(), notes, OPEN).expect("a valid image")
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange { start, end }
}

fn room(image: &Qcow2, start: u64, end: u64) -> Reservation {
    match image.reserve(range(start, end)).expect("a valid image") {
        Reserve::Room(room) => room,
        other => panic!("{other:?}"),
    }
}

/// Writes these subclusters, counted from the disk's start; returns where they are.
fn write(image: &Qcow2, subclusters: std::ops::Range<u64>) -> u64 {
    let room = room(image, subclusters.start * SUB, subclusters.end * SUB);
    assert_eq!((room.guest.end, room.fill), (subclusters.end * SUB, [None, None]));
    let host = room.host;
    image.commit(room).expect("a valid image");
    host
}

fn zero(image: &Qcow2, subclusters: std::ops::Range<u64>, zeroing: Zeroing) {
    let wanted = range(subclusters.start * SUB, subclusters.end * SUB);
    assert_eq!(image.zero(wanted, zeroing).expect("a valid image"), Zeroed::Done(wanted));
}

fn settle(image: &Qcow2) {
    for _ in 0..2 {
        let mut progress = Progress::default();
        while image.settle(&mut progress).expect("a valid image") == Settle::Flush {}
        image.recycle();
    }
}

/// The runs of cluster 0: their ends in subclusters, and what they are.
fn runs(image: &Qcow2) -> Vec<(u64, Place)> {
    let (mut at, mut runs) = (0, Vec::new());
    while at < CLUSTER {
        let extent = image.map(at, CLUSTER - at).expect("a valid image");
        at = extent.guest.end;
        runs.push((at / SUB, extent.place));
    }
    runs
}

fn data(host: u64) -> Place {
    Place::Data { host }
}

fn word(disk: &Disk, at: u64) -> u64 {
    let mut bytes = [0; 8];
    disk.read_at(at, &mut bytes).expect("inside");
    u64::from_be_bytes(bytes)
}

/// Where the entry of cluster 0 is in the file.
fn entry_at(disk: &Disk) -> u64 {
    word(disk, word(disk, 40)) & !COPIED
}

fn set(disk: &Disk, at: u64, word: u64) {
    disk.write_at(at, &word.to_be_bytes()).expect("memory");
}

#[test]
fn a_write_fills_the_borders_of_its_subclusters_and_nothing_else() {
    let image = open(&empty(true));
    let first = room(&image, 3 * SUB + 100, 3 * SUB + 300);
    assert_eq!(first.fill, [Some(range(3 * SUB, 3 * SUB + 100)), Some(range(3 * SUB + 300, 4 * SUB))]);
    let host = first.host - 3 * SUB - 100;
    image.commit(first).expect("a valid image");
    assert_eq!(runs(&image), [(3, Place::Absent), (4, data(host + 3 * SUB)), (32, Place::Absent)]);

    let next = room(&image, 5 * SUB + 7, 7 * SUB);
    assert_eq!((next.host, next.fill), (host + 5 * SUB + 7, [Some(range(5 * SUB, 5 * SUB + 7)), None]));
    // Its commit sets the entry: who would set it meanwhile waits, who would not need not.
    assert!(matches!(image.reserve(range(0, SUB)), Ok(Reserve::Busy)));
    assert_eq!(image.zero(range(0, SUB), Zeroing::Unmap).expect("a valid image"), Zeroed::Busy);
    let in_place = room(&image, 3 * SUB + 1, 10 * SUB);
    assert_eq!((in_place.guest.end, in_place.host, in_place.fill), (4 * SUB, host + 3 * SUB + 1, [None, None]));
    drop(in_place);
    image.commit(next).expect("a valid image");
    assert_eq!(runs(&image)[2..], [(5, Place::Absent), (7, data(host + 5 * SUB)), (32, Place::Absent)]);

    // Over three clusters: the borders alone.
    let long = room(&image, 63 * SUB + 1, 97 * SUB + 1);
    assert_eq!(long.fill, [Some(range(63 * SUB, 63 * SUB + 1)), Some(range(97 * SUB + 1, 98 * SUB))]);
    image.commit(long).expect("a valid image");
    let extent = image.map(62 * SUB, SUB).expect("a valid image");
    assert_eq!(extent.place, Place::Absent);
    assert_eq!(image.map(63 * SUB, u64::MAX).expect("a valid image").guest, range(63 * SUB, 98 * SUB));
}

/// Subclusters 3, 6 and 7 have payload, 10 is zeroes, and cluster 1 is the same; returns where it is.
fn two_clusters_in_one(disk: &Arc<Disk>) -> u64 {
    let image = open(disk);
    write(&image, 3..4);
    write(&image, 6..8);
    zero(&image, 10..11, Zeroing::Unmap);
    settle(&image);
    drop(image);
    let entry = entry_at(disk);
    let (host, bitmap) = (word(disk, entry) & !COPIED, word(disk, entry + 8));
    for (at, word) in (entry..).step_by(8).zip([host, bitmap, host, bitmap]) {
        set(disk, at, word);
    }
    let block = word(disk, word(disk, 48));
    disk.write_at(block + host / CLUSTER * 2, &[0, 2]).expect("memory");
    assert_whole(disk);
    host
}

fn assert_whole(disk: &Arc<Disk>) -> Check {
    let storage: Arc<dyn Storage> = disk.clone();
    let found = check(&*storage).expect("it can be walked");
    assert_eq!((found.leaks, found.corruptions), (0, 0), "{:#?}", found.problems);
    found
}

#[test]
fn a_cluster_that_others_use_moves_with_all_its_payload() {
    let disk = empty(true);
    let old = two_clusters_in_one(&disk);
    let image = open(&disk);
    let moving = room(&image, 4 * SUB + 1, 5 * SUB);
    assert_eq!(moving.fill, [Some(range(3 * SUB, 4 * SUB + 1)), Some(range(5 * SUB, 8 * SUB))]);
    let host = moving.host - 4 * SUB - 1;
    assert_ne!(host, old);
    image.commit(moving).expect("a valid image");
    let rest = [(10, Place::Absent), (11, Place::Zero), (32, Place::Absent)];
    assert_eq!(runs(&image)[..2], [(3, Place::Absent), (8, data(host + 3 * SUB))]);
    assert_eq!(runs(&image)[2..], rest);
    settle(&image);
    // The other one has it alone from now on, and says so with its next change.
    zero(&image, 32 + 3..32 + 4, Zeroing::Unmap);
    settle(&image);
    assert_eq!(image.map(CLUSTER + 6 * SUB, SUB).expect("a valid image").place, data(old + 6 * SUB));
    assert_whole(&disk);
}

/// Replay counted every cluster that an entry names as used by that one alone.
#[test]
fn a_shared_cluster_with_new_zeroes_is_counted_for_all_after_a_kill() {
    let disk = empty(true);
    let old = two_clusters_in_one(&disk);
    let notes = Arc::new(Notes::new(1000));
    let image = open_with(&disk, notes.clone());
    zero(&image, 6..7, Zeroing::Unmap);
    let after = Arc::new(disk.copy());
    let image = open(&after);
    image.replay(&notes.kept()).expect("its own notes");
    assert_eq!(runs(&image)[1..4], [(4, data(old + 3 * SUB)), (6, Place::Absent), (7, Place::Zero)]);
    settle(&image);
    assert_whole(&after);
}

#[test]
fn zeroes_leave_the_neighbours_and_the_last_one_gives_the_cluster_back() {
    let disk = empty(true);
    let image = open(&disk);
    let host = write(&image, 1..5) - SUB;
    zero(&image, 2..3, Zeroing::Unmap);
    zero(&image, 3..4, Zeroing::Discard);
    let after = [(1, Place::Absent), (2, data(host + SUB)), (4, Place::Zero), (5, data(host + 4 * SUB))];
    assert_eq!(runs(&image)[..4], after);
    assert_eq!(write(&image, 3..4), host + 3 * SUB, "there is room in the cluster");
    zero(&image, 1..32, Zeroing::Keep);
    assert_eq!(runs(&image), [(1, Place::Absent), (32, Place::Zero)]);
    assert_eq!(write(&image, 1..2), host + SUB, "its space was kept");
    // Parts of a subcluster are written, unless they are zeroes already.
    let part = |start| image.zero(range(start, start + 9), Zeroing::Unmap).expect("a valid image");
    assert_eq!(part(SUB), Zeroed::Write(range(SUB, SUB + 9)));
    assert_eq!(part(2 * SUB), Zeroed::Done(range(2 * SUB, 2 * SUB + 9)));
    zero(&image, 1..2, Zeroing::Unmap);
    assert_eq!(runs(&image), [(1, Place::Absent), (32, Place::Zero)]);
    settle(&image);
    assert_eq!(assert_whole(&disk).allocated_clusters, 0);
}

#[test]
fn a_subcluster_that_is_two_things_is_an_error_that_names_its_cluster() {
    let disk = empty(true);
    let image = open(&disk);
    write(&image, 3..4);
    settle(&image);
    drop(image);
    set(&disk, entry_at(&disk) + 8, 1 << 35 | 1 << 3);
    let image = open(&disk);
    for error in [
        image.map(0, 1).expect_err("wrong"),
        image.reserve(range(0, 1)).expect_err("wrong"),
        image.zero(range(0, SUB), Zeroing::Unmap).expect_err("wrong"),
    ] {
        assert_eq!(error.kind(), Kind::Malformed);
        assert!(error.one_line().contains("guest cluster 0"), "{error}");
    }
    let storage: Arc<dyn Storage> = disk;
    assert!(check(&*storage).expect("it can be walked").corruptions > 0);
}

/// A kill came between the two notes of an entry: it is as if there were neither.
#[test]
fn a_bitmap_that_was_noted_without_its_entry_is_left_out() {
    let disk = empty(true);
    let notes = Arc::new(Notes::new(1000));
    let image = open_with(&disk, notes.clone());
    let host = write(&image, 3..4) - 3 * SUB;
    write(&image, 5..6);
    let replayed = |kept: &[Change]| {
        let image = open(&Arc::new(disk.copy()));
        image.replay(kept).map(|()| runs(&image))
    };
    let kept = notes.kept();
    let one = vec![(3, Place::Absent), (4, data(host + 3 * SUB)), (32, Place::Absent)];
    assert_eq!(replayed(&kept).expect("its own notes").len(), 5);
    assert_eq!(replayed(&kept[..kept.len() - 1]).expect("its own notes"), one);
    assert_eq!(replayed(&kept[..kept.len() - 2]).expect("its own notes"), one);
    assert_eq!(replayed(&kept[..kept.len() - 3]).expect("its own notes"), [(32, Place::Absent)]);
    // An entry without its bitmap is nothing that we note.
    let torn = [&kept[..kept.len() - 2], &kept[kept.len() - 1..]].concat();
    assert_eq!(replayed(&torn).expect_err("torn").kind(), Kind::Malformed);
    assert!(open(&empty(false)).replay(&kept).is_err(), "no image without subclusters notes this");
}
