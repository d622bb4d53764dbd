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
    use super::support::random::Random;
    use super::support::world::Feature::{
        self, Backing, Compressed, ExtendedL2, ExternalData, SmallReftable, Snapshot,
    };
    use super::support::world::{guest_with, live_as};
    use super::{Fault, PLANTED};
    use std::panic::{AssertUnwindSafe, catch_unwind};

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
