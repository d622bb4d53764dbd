//! qcow2 against a guest that remembers every byte: random requests, and kills.

use crate::support::random::Random;
use crate::support::world::Feature::{Compressed, Snapshot};
use crate::support::world::{guest_with, live, live_as, worlds};

#[test]
fn what_was_committed_is_there() {
    let stats = worlds("what_was_committed_is_there", 150, |seed| live(seed, 400, |_, _| {}));
    let Some(stats) = stats else { return };
    assert!(stats.settles > 100 && stats.dropped_settles > 100 && stats.committed > 1000, "{stats:?}");
    assert!(stats.dropped > 100 && stats.busy > 100 && stats.asked_to_settle > 100, "{stats:?}");
    assert!(stats.zeroed_places > 100 && stats.compressed > 100, "{stats:?}");
}

#[test]
fn a_kill_loses_nothing_that_was_committed() {
    let stats = worlds("a_kill_loses_nothing_that_was_committed", 80, |seed| {
        live(seed, 400, |guest, step| {
            guest.cut_at_flushes = true;
            if step % 37 == 36 {
                guest.kill();
            }
            if step % 10 == 9 {
                guest.assert_survives_power_cut();
            }
        })
    });
    let Some(stats) = stats else { return };
    assert!(stats.kills >= 800 && stats.compressed > 100, "{stats:?}");
    assert!(stats.grown > 50 && stats.not_grown > 50, "{stats:?}");
}

/// QEMU takes snapshots in between: several share L2 tables and clusters with the guest's view.
#[test]
fn snapshots_that_qemu_takes_in_between_never_change() {
    let stats = worlds("snapshots_that_qemu_takes_in_between_never_change", 12, |seed| {
        live_as(guest_with(&[Compressed, Snapshot], seed, Random::new(seed)), 300, |guest, step| {
            if step % 100 == 60 {
                guest.take_snapshot();
            }
            guest.cut_at_flushes = (160..200).contains(&step);
            if seed.is_multiple_of(2) && step % 17 == 16 {
                guest.kill();
            }
        })
    });
    assert!(stats.is_none_or(|stats| stats.kills > 50), "{stats:?}");
}
