//! A file system without space: what is tried again and again leaves nothing behind.

use crate::support::disk::Disk;
use crate::support::qemu::check_of_qemu;
use formats::image::{Image, Progress, Reserve, Settle};
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A file that has room for nothing while it is full.
#[derive(Default)]
struct File {
    disk: Disk,
    full: AtomicBool,
}

impl Storage for File {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(at, bytes)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self.full.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.disk.write_at(at, bytes),
        }
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

/// Each try to clear a new table took one more cluster, which nobody gave back.
#[test]
fn a_write_that_finds_no_room_for_its_table_leaves_no_leak() {
    let file = Arc::new(File::default());
    // An L2 table has 64 entries of 512 bytes: each of these writes needs one of its own.
    create(&*file, &Create { cluster_bits: 9, ..Create::new(64 << 20) }).expect("valid options");
    // What is there when the image is opened is not known to be zeroes.
    file.set_len(1 << 20).expect("memory");
    let open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 16 };
    let image = Qcow2::open(file.clone(), Arc::new(Forgetful), open).expect("a valid image");
    file.full.store(true, Ordering::Relaxed);
    for number in 0..40_u64 {
        let guest = ByteRange { start: number << 15, end: (number << 15) + 512 };
        assert!(image.reserve(guest).is_err(), "there is no room");
    }
    file.full.store(false, Ordering::Relaxed);
    let Reserve::Room(room) = image.reserve(ByteRange { start: 0, end: 512 }).expect("room") else {
        panic!("nobody else writes")
    };
    file.write_at(room.host, &[1; 512]).expect("room");
    image.commit(room).expect("a valid image");
    let mut progress = Progress::default();
    while image.settle(&mut progress).expect("room") != Settle::Done {}
    let found = check_of_qemu(&file.disk);
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{:#?}", found.problems);
}
