//! A journal that is full gets room again, whatever became of the settles before.

use crate::support::disk::Disk;
use crate::support::notes::Notes;
use formats::image::{Image, Progress, Reserve, Settle};
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::range::ByteRange;
use std::sync::Arc;

const CLUSTER: u64 = 16 << 10;

fn image(notes: usize, extended_l2: bool) -> Qcow2 {
    let disk = Arc::new(Disk::default());
    create(&*disk, &Create { cluster_bits: 14, extended_l2, ..Create::new(64 * CLUSTER) }).expect("valid options");
    let open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 20 };
    Qcow2::open(disk, Arc::new(Notes::new(notes)), open).expect("a valid image")
}

/// Writes guest cluster `number`; false where a settle is due first.
fn write(image: &Qcow2, number: u64) -> bool {
    let range = ByteRange { start: number * CLUSTER, end: (number + 1) * CLUSTER };
    match image.reserve(range).expect("a valid image") {
        Reserve::Room(reservation) => image.commit(reservation).is_ok(),
        Reserve::Settle => false,
        Reserve::Busy => unreachable!("nobody else writes"),
    }
}

fn settle(image: &Qcow2) {
    let mut progress = Progress::default();
    while image.settle(&mut progress).expect("a settle") != Settle::Done {}
}

/// A settle failed, as on a full file system; what was noted since filled the journal. The next settle
/// forgot only what was noted before the one that failed, and the one after it had nothing to write: no
/// settle made room any more, and a guest's write asked for one without end.
#[test]
fn a_journal_that_filled_up_behind_a_failed_settle_gets_room_again() {
    // An extended entry takes two notes: with five, one is left that is of no use.
    for (notes, extended_l2) in [(4, false), (4, true), (5, true)] {
        let image = image(notes, extended_l2);
        assert!(write(&image, 0));
        let mut progress = Progress::default();
        assert_eq!(image.settle(&mut progress).expect("its first stage"), Settle::Flush);
        drop(progress);
        let full = (1..64).find(|number| !write(&image, *number)).expect("so many notes are few");
        let mut settles = 0;
        while !write(&image, full) {
            settles += 1;
            assert!(settles < 4, "no settle makes room");
            settle(&image);
        }
    }
}
