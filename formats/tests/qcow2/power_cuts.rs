//! qcow2 and power cuts: whatever of the unflushed writes a cut takes, in whatever order, the image
//! opens for writing, has leaks at worst, has what was flushed, and shows no byte that was never
//! written there.
//!
//! More worlds: `SEEDS=100000 cargo test -p formats --release --test qcow2 power_cuts`. That the
//! orders which hold this are seen when they break: `formats/src/qcow2/fault.rs`.

use crate::support::qemu::{contents, run};
use crate::support::world::{live, worlds};
use std::cell::Cell;

#[test]
fn a_power_cut_leaves_leaks_at_worst() {
    let stats = worlds("a_power_cut_leaves_leaks_at_worst", 60, |seed| {
        live(seed, 300, |guest, step| {
            guest.cut_at_flushes = true;
            if step % 4 == 0 {
                guest.assert_survives_power_cut();
            }
            if step % 60 == 59 {
                guest.power_cut();
            }
        })
    });
    assert!(stats.is_none_or(|stats| stats.power_cuts > 6000 && stats.restarts == 300), "{stats:?}");
}

/// The same by another program: what QEMU thinks of what a cut leaves.
#[test]
fn qemu_finds_leaks_at_worst_and_the_same_contents() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let judged = Cell::new(0);
    let stats = worlds("qemu_finds_leaks_at_worst_and_the_same_contents", 10, |seed| {
        live(seed, 200, |guest, step| {
            if step % 100 == 70 {
                let (files, found) = guest.after_power_cut();
                files.write_to(folder.path(), "cut.qcow2");
                // 0: nothing found; 3: leaks.
                let check = "qemu-img check -q -f qcow2 cut.qcow2 || test $? -eq 3";
                run(folder.path(), "sh", &["-c", check]);
                if !guest.has_backing() {
                    assert!(contents(folder.path(), "cut.qcow2") == found, "QEMU reads something else");
                }
                judged.set(judged.get() + 1);
            }
        })
    });
    assert!(stats.is_none() || judged.get() >= 20, "{} judged", judged.get());
}
