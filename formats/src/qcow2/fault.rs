//! Faults planted for the power-cut worlds: each breaks one order that must not change, to show that
//! the worlds would see it. In the program none exists.

/// A broken order. The numbers are those at the top of `super`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 1: payload is not flushed before the entries that point at it.
    EntriesBeforePayload,
    /// 1: refcounts are written with the entries, not before them.
    EntriesBeforeCounts,
    /// 2: a new table keeps what was in its cluster.
    TableNotCleared,
    /// 2: the entry of a refcount block is written with the block.
    BlockEntryBeforeBlock,
    /// 2: the header names the new place of the refcount table before the table is there.
    HeaderBeforeTable,
    /// 2: the header names the new place of the L1 table before the table is there.
    HeaderBeforeL1,
    /// 3: what an entry let go of is used again before the changed entry is durable.
    ReuseBeforeSettled,
    /// 4: a settle writes what was committed since it began.
    NewerEntries,
    /// 5: the header has a larger size before what is new reads as zeroes.
    SizeBeforeZeroes,
    /// 6: the bitmaps of a disk that grows change while they are vouched for.
    EntriesBeforeAutoclear,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// True where this very fault is planted on this thread.
#[cfg(test)]
pub fn planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// Never.
#[cfg(not(test))]
#[inline(always)]
pub fn planted(_: Fault) -> bool {
    false
}

#[cfg(test)]
#[path = "../../tests/support/mod.rs"]
mod support;

#[cfg(test)]
mod tests {
    use super::support::disk::Disk;
    use super::support::random::Random;
    use super::support::world::Feature::{
        self, Backing, Compressed, ExtendedL2, ExternalData, SmallReftable, Snapshot,
    };
    use super::support::world::{guest_with, live_as};
    use super::{Fault, PLANTED};
    use crate::image::Image;
    use crate::journal::Forgetful;
    use crate::qcow2::bitmaps::{self, Bits, Carried};
    use crate::qcow2::{Create, Open, Qcow2, create, read_header};
    use crate::range::ByteRange;
    use crate::storage::Storage;
    use std::cell::RefCell;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    /// One world with power cuts at every flush and in between.
    fn world(features: &[Feature], seed: u64, fault: Option<Fault>) -> bool {
        PLANTED.set(fault);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            live_as(guest_with(features, seed, Random::new(seed)), 200, |guest, step| {
                guest.cut_at_flushes = true;
                if step % 4 == 0 {
                    guest.assert_survives_power_cut();
                }
            })
        }));
        PLANTED.set(None);
        outcome.is_ok()
    }

    fn assert_caught(fault: Fault, features: &[Feature]) {
        let seed = (1..=400).find(|seed| !world(features, *seed, Some(fault)));
        let seed = seed.unwrap_or_else(|| panic!("{fault:?} is not seen: the worlds are too tame to be trusted"));
        // The same world without the fault is fine: it was the fault that was seen.
        assert!(world(features, seed, None), "seed {seed}");
        println!("{fault:?} with {features:?}: seed {seed}");
    }

    #[test]
    fn entries_before_payload_are_caught() {
        assert_caught(Fault::EntriesBeforePayload, &[Compressed]);
        assert_caught(Fault::EntriesBeforePayload, &[ExtendedL2]);
        assert_caught(Fault::EntriesBeforePayload, &[ExternalData]);
    }

    #[test]
    fn entries_before_refcounts_are_caught() {
        assert_caught(Fault::EntriesBeforeCounts, &[]);
    }

    #[test]
    fn a_table_that_was_not_cleared_is_caught() {
        assert_caught(Fault::TableNotCleared, &[]);
    }

    #[test]
    fn a_block_that_is_known_too_early_is_caught() {
        assert_caught(Fault::BlockEntryBeforeBlock, &[SmallReftable]);
    }

    #[test]
    fn a_refcount_table_that_is_known_too_early_is_caught() {
        assert_caught(Fault::HeaderBeforeTable, &[SmallReftable]);
    }

    #[test]
    fn an_l1_table_that_is_known_too_early_is_caught() {
        assert_caught(Fault::HeaderBeforeL1, &[]);
    }

    #[test]
    fn a_size_that_is_known_too_early_is_caught() {
        assert_caught(Fault::SizeBeforeZeroes, &[Backing]);
        assert_caught(Fault::SizeBeforeZeroes, &[ExternalData]);
    }

    /// An image with a bitmap of each kind that grows, and a power cut at a random moment of that. What is left is a disk
    /// of the old size or the new one, and bitmaps that fit it, or that nothing vouches for.
    fn bitmaps_survive_growth(seed: u64) {
        const OLD: u64 = 1 << 20;
        let (mut random, disk) = (Random::new(seed), Arc::new(Disk::default()));
        let open = || {
            let open = Open { writable: true, has_backing: false, metadata_bytes_max: 1 << 16 };
            Qcow2::open(disk.clone(), Arc::new(Forgetful), open).expect("a valid image")
        };
        create(&*disk, &Create { cluster_bits: 9, ..Create::new(OLD) }).expect("valid options");
        let flush = |disk: &Disk| {
            disk.flush();
            Ok(())
        };
        let carried = [("kept", false), ("live", true)].map(|(name, auto)| {
            let bits = Bits::new(OLD, 9);
            bits.set(ByteRange { start: random.below(OLD), end: OLD });
            Carried { name: name.into(), granularity_bits: 9, auto, bits: Arc::new(bits) }
        });
        let image = open();
        image.adopt_bitmaps(carried.to_vec()).expect("version 3");
        image.close(&|| flush(&disk)).expect("memory");
        disk.flush();
        let (image, cuts) = (open(), RefCell::new(Vec::new()));
        let cutting = RefCell::new(random);
        let cut = || cuts.borrow_mut().extend((0..6).map(|_| disk.after_power_cut(&mut cutting.borrow_mut())));
        let flush = || {
            cut();
            flush(&disk)
        };
        flush().expect("memory");
        let new = OLD + 512 * (1 + cutting.borrow_mut().below(40_000));
        image.grow(new, 0, &flush).expect("an image that can grow");
        image.keep_size(&flush).expect("memory");
        image.close(&flush).expect("memory");
        flush().expect("memory");
        for cut in cuts.into_inner() {
            let header = read_header(&cut).expect("a valid header");
            let size = header.geometry.size;
            assert!(size == OLD || size == new, "{size}");
            for one in bitmaps::read(&cut, &header).expect("a directory").iter().filter(|one| one.consistent) {
                let bytes = Bits::len_bytes(size, 9);
                assert_eq!(bytes.div_ceil(512), u64::from(one.table_entries), "{}: QEMU opens no such image", one.name);
                let table = bitmaps::read_table(&cut, &header, one).expect("a table");
                let mut found = vec![0; 512 * table.len()];
                for (place, bits) in table.into_iter().zip(found.chunks_mut(512)).filter(|(place, _)| *place > 0) {
                    cut.read_at(place, bits).expect("inside the file");
                }
                let right = carried.iter().find(|right| right.name == one.name).expect("one of the two");
                let mut expected = vec![0; found.len()];
                right.bits.grown(size).to_bytes(0, &mut expected);
                assert_eq!(found, expected, "{}: it lies", one.name);
            }
        }
    }

    #[test]
    fn bitmaps_that_change_while_they_are_vouched_for_are_caught() {
        (1..=8).for_each(bitmaps_survive_growth);
        PLANTED.set(Some(Fault::EntriesBeforeAutoclear));
        let outcome = catch_unwind(|| (1..=8).for_each(bitmaps_survive_growth));
        PLANTED.set(None);
        assert!(outcome.is_err(), "the cuts are too tame to be trusted");
    }

    #[test]
    fn clusters_that_are_used_again_too_early_are_caught() {
        assert_caught(Fault::ReuseBeforeSettled, &[Compressed]);
        assert_caught(Fault::ReuseBeforeSettled, &[Snapshot]);
    }

    #[test]
    fn entries_newer_than_their_settle_are_caught() {
        assert_caught(Fault::NewerEntries, &[Backing]);
        assert_caught(Fault::NewerEntries, &[ExtendedL2]);
    }
}
