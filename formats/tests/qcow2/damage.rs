//! A corruption that is found while the image is in use.

use crate::support::disk::Disk;
use crate::support::notes::Notes;
use formats::error::Result;
use formats::image::{Image, Progress, Reserve, Settle, Zeroing};
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::sync::Arc;

const CLUSTER: u64 = 4096;
/// Where the tables of `image` are, in clusters.
const REFTABLE: u64 = 1;
const BLOCK: u64 = 2;
const L1: u64 = 3;
const L2: u64 = 4;

fn open(disk: &Arc<Disk>) -> Qcow2 {
    let open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 16 };
    Qcow2::open(disk.clone(), Arc::new(Notes::new(1000)), open).expect("an image that can be opened")
}

fn cluster(nth: u64) -> ByteRange {
    ByteRange { start: nth * CLUSTER, end: (nth + 1) * CLUSTER }
}

fn write(image: &Qcow2, nth: u64) -> Result<()> {
    match image.reserve(cluster(nth))? {
        Reserve::Room(room) => image.commit(room),
        other => panic!("room, not {other:?}"),
    }
}

fn settle(image: &Qcow2) -> Result<()> {
    let mut progress = Progress::default();
    while image.settle(&mut progress)? == Settle::Flush {}
    Ok(())
}

/// Sixteen clusters of which the first four have payload.
fn image(version: u32) -> Arc<Disk> {
    let disk = Arc::new(Disk::default());
    create(&*disk, &Create { version, cluster_bits: 12, ..Create::new(64 * CLUSTER) }).expect("valid options");
    let image = open(&disk);
    (0..4).for_each(|nth| write(&image, nth).expect("a valid image"));
    settle(&image).expect("a valid image");
    image.trim_end().expect("memory");
    disk
}

fn is_marked(disk: &Disk) -> bool {
    let mut features = [0; 8];
    disk.read_at(72, &mut features).expect("memory");
    features[7] & 2 != 0
}

#[track_caller]
fn assert_refused<T>(result: Result<T>) {
    let told = result.err().expect("refused").one_line();
    assert!(told.contains("not written any more") && told.contains("`blkmirror check --repair all FILE`"), "{told}");
}

#[test]
fn a_corruption_ends_all_writing_and_reads_go_on() {
    for version in [2, 3] {
        let disk = image(version);
        let entry = L2 * CLUSTER + 2 * 8;
        let mut raw = [0; 8];
        disk.read_at(entry, &mut raw).expect("memory");
        raw[6] |= 2;
        disk.write_at(entry, &raw).expect("memory");
        let image = open(&disk);
        write(&image, 9).expect("nobody knows yet");
        assert!(image.damage().is_none() && !is_marked(&disk));

        let told = image.map(2 * CLUSTER, 1).expect_err("no cluster's start").one_line();
        assert_eq!(image.damage(), Some(told.as_str()));
        assert_eq!(is_marked(&disk), version == 3, "version 2 has no bit");
        let after = disk.to_vec();
        for nth in [0, 5, 9] {
            assert_refused(write(&image, nth));
            assert_refused(image.zero(cluster(nth), Zeroing::Keep));
        }
        assert_refused(settle(&image));
        image.recycle();
        image.trim_end().expect("nothing to do");
        assert!(image.map(0, 1).is_ok() && image.map(9 * CLUSTER, 1).is_ok(), "reads go on");
        assert!(disk.to_vec() == after, "nothing was written");
    }
}

#[test]
fn a_flush_succeeds_where_it_brings_nothing_into_the_file() {
    let disk = image(3);
    disk.write_at(L2 * CLUSTER, &[0x80, 0, 0, 0, 0, 0, 0x52, 0]).expect("memory");
    let image = open(&disk);
    assert!(image.map(0, 1).is_err() && image.damage().is_some());
    settle(&image).expect("payload alone");
}

#[test]
fn what_is_reserved_when_a_corruption_is_found_is_not_committed() {
    let disk = image(3);
    disk.write_at(L2 * CLUSTER, &[0x80, 0, 0, 0, 0, 0, 0x52, 0]).expect("memory");
    let image = open(&disk);
    let Ok(Reserve::Room(room)) = image.reserve(cluster(9)) else { panic!("room") };
    assert!(image.map(0, 1).is_err());
    assert_refused(image.commit(room));
}

#[test]
fn what_holds_a_table_is_never_given_out() {
    for table in [0, REFTABLE, BLOCK, L1, L2] {
        let disk = image(3);
        disk.write_at(BLOCK * CLUSTER + table * 2, &[0, 0]).expect("memory");
        let before = disk.to_vec();
        let image = open(&disk);
        let refused = (4..64).find_map(|nth| write(&image, nth).err());
        let told = refused.expect("the cluster looks free").one_line();
        assert!(told.contains("is 0 in the clusters from"), "cluster {table}: {told}");
        assert!(is_marked(&disk), "cluster {table}");
        let bytes = (table * CLUSTER) as usize..((table + 1) * CLUSTER) as usize;
        let (now, then) = (&disk.to_vec()[bytes.clone()], &before[bytes]);
        assert!(now[80..] == then[80..], "cluster {table} was overwritten");
    }
}
