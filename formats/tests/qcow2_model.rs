//! qcow2 against a guest that remembers every byte: random requests, and kills.
mod support;

use support::world::{live, worlds};

#[test]
fn what_was_committed_is_there() {
    let stats = worlds("what_was_committed_is_there", 150, |seed| live(seed, 400, |_, _| {}));
    let Some(stats) = stats else { return };
    assert!(stats.settles > 100 && stats.dropped_settles > 100 && stats.committed > 1000, "{stats:?}");
    assert!(stats.dropped > 100 && stats.busy > 100 && stats.asked_to_settle > 100, "{stats:?}");
    assert!(stats.zeroed_places > 100, "{stats:?}");
}

#[test]
fn a_kill_loses_nothing_that_was_committed() {
    let stats = worlds("a_kill_loses_nothing_that_was_committed", 120, |seed| {
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
    assert!(stats.is_none_or(|stats| stats.kills > 1000), "{stats:?}");
}
