//! Room that is given without any wait: the same as is given otherwise, and without a look at the file.

use crate::support::disk::Disk;
use formats::image::{Image, Progress, Reserve, Settle};
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const CLUSTER: u64 = 4096;

/// A file that must not be touched while it hangs.
#[derive(Default)]
struct File {
    disk: Disk,
    hangs: AtomicBool,
}

impl File {
    fn answers(&self) -> &Disk {
        assert!(!self.hangs.load(Ordering::Relaxed), "whoever asks would wait");
        &self.disk
    }
}

impl Storage for File {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.answers().read_at(at, bytes)
    }
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.answers().write_at(at, bytes)
    }
    fn len(&self) -> io::Result<u64> {
        self.answers().len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.answers().set_len(len)
    }
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.answers().next_data(at)
    }
    fn next_hole(&self, at: u64) -> io::Result<u64> {
        self.answers().next_hole(at)
    }
}

fn opened(file: &Arc<File>, writable: bool) -> Qcow2 {
    let open = Open { writable, has_backing: false, metadata_bytes_max: 1 << 20 };
    Qcow2::open(file.clone(), Arc::new(Forgetful), open).expect("a valid image")
}

fn clusters(first: u64, count: u64) -> ByteRange {
    ByteRange { start: first * CLUSTER, end: (first + count) * CLUSTER }
}

#[test]
fn what_has_its_place_is_given_it_at_once_and_nothing_else_is() {
    let file = Arc::new(File::default());
    create(&*file, &Create { cluster_bits: 12, ..Create::new(64 << 20) }).expect("valid options");
    let image = opened(&file, true);
    assert!(image.may_wait() && image.reserve_at_once(clusters(3, 2)).is_none(), "it has no place yet");
    let Reserve::Room(room) = image.reserve(clusters(3, 2)).expect("room") else { panic!("nobody else writes") };
    assert!(image.reserve_at_once(clusters(3, 2)).is_none(), "nor before it is committed");
    let host = room.host;
    image.commit(room).expect("its room");

    file.hangs.store(true, Ordering::Relaxed);
    let room = image.reserve_at_once(clusters(3, 4)).expect("its place");
    assert_eq!((room.guest, room.host), (clusters(3, 2), host));
    assert!(room.fill == [None, None] && room.hold.is_none());
    image.commit(room).expect("nothing is changed by that");
    let inside = ByteRange { start: 4 * CLUSTER + 512, end: 4 * CLUSTER + 1024 };
    let room = image.reserve_at_once(inside).expect("its place");
    assert_eq!((room.guest, room.host), (inside, host + CLUSTER + 512));
    assert!(image.reserve_at_once(clusters(2, 2)).is_none() && image.reserve_at_once(clusters(1 << 20, 1)).is_none());
    assert_eq!(image.settles(), 0);
    file.hangs.store(false, Ordering::Relaxed);

    let mut progress = Progress::default();
    while image.settle(&mut progress).expect("a valid image") != Settle::Done {}
    assert_eq!(image.settles(), 1);
    drop(image);
    assert!(opened(&file, false).reserve_at_once(clusters(3, 1)).is_none(), "it was opened for reading");
    let image = opened(&file, true);
    file.hangs.store(true, Ordering::Relaxed);
    assert!(image.reserve_at_once(clusters(3, 1)).is_none(), "its table is not in memory");
    file.hangs.store(false, Ordering::Relaxed);
    image.map(3 * CLUSTER, 1).expect("a mapping");
    file.hangs.store(true, Ordering::Relaxed);
    assert_eq!(image.reserve_at_once(clusters(3, 1)).map(|room| room.host), Some(host));
}
