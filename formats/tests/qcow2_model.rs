//! qcow2 against a guest that remembers every sector: random requests, kills and power cuts.
mod support;

use formats::qcow2::{Create, DataFile, Open, create};
use formats::storage::Storage;
use std::sync::Arc;
use support::disk::Disk;
use support::guest::{Guest, Stats};
use support::random::Random;

/// Everything about a world follows from its seed.
struct World {
    guest: Guest,
    killed: bool,
    /// A cluster can be in several snapshots.
    counts_to_15: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let extended_l2 = seed.is_multiple_of(3);
        let cluster_bits = match extended_l2 {
            true => [14, 14, 14, 15][seed as usize % 4],
            false => [9, 10, 11, 12, 9, 16, 14, 18][seed as usize % 8],
        };
        let version = if extended_l2 { 3 } else { 2 + u32::from(!random.one_in(4)) };
        let refcount_order = if version == 2 { 4 } else { random.below(7) as u32 };
        // Several L2 tables where clusters are small; the last cluster is a part of one.
        let clusters = if cluster_bits <= 12 { 200 } else { 10 };
        let size = (clusters << cluster_bits) - (random.below(1 << cluster_bits) & !511);
        let disk = Arc::new(Disk::default());
        let asked = Create { version, cluster_bits, refcount_order, extended_l2, ..Create::new(size) };
        create(&*disk, &asked).expect("valid options");
        if cluster_bits == 9 && refcount_order >= 4 && seed < 4000 {
            use_up_reftable(&disk, refcount_order);
        }
        disk.flush();
        let metadata_bytes_max = if random.one_in(2) { 0 } else { 1 << 20 };
        let open = Open { writable: true, has_backing: random.one_in(2), metadata_bytes_max };
        let notes = if random.one_in(2) { 8 } else { 4096 };
        let mut guest = Guest::new(disk, notes, open, seed);
        // Inflating large clusters for each look at a sector takes long, and shows no more.
        guest.compresses = cluster_bits <= 10 && random.one_in(2);
        Self { guest, killed: false, counts_to_15: refcount_order >= 2 }
    }

    /// With an external data file, which holds somebody's old bytes unless it is raw.
    fn with_data_file(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let raw = random.one_in(3);
        let cluster_bits = [9, 10, 14, 16][seed as usize % 4];
        let extended_l2 = cluster_bits >= 14 && random.one_in(2);
        let clusters = if cluster_bits <= 12 { 200 } else { 10 };
        let size = (clusters << cluster_bits) - (random.below(1 << cluster_bits) & !511);
        let (disk, payload) = (Arc::new(Disk::default()), Arc::new(Disk::default()));
        let data_file = Some(DataFile { name: "data".into(), raw });
        let asked = Create { cluster_bits, extended_l2, data_file, ..Create::new(size) };
        create(&*disk, &asked).expect("valid options");
        disk.flush();
        payload.set_len(size).expect("memory");
        if !raw {
            payload.write_at(0, &vec![0xee; size as usize]).expect("memory");
        }
        payload.flush();
        let metadata_bytes_max = if random.one_in(2) { 0 } else { 1 << 20 };
        let open = Open { writable: true, has_backing: !raw && random.one_in(2), metadata_bytes_max };
        let notes = if random.one_in(2) { 8 } else { 4096 };
        Self { guest: Guest::with_payload_in(payload, disk, notes, open, seed), killed: false, counts_to_15: false }
    }
}

/// Gives an image with clusters of 512 bytes a refcount block near the end of what its table of one
/// cluster reaches, so that the table soon has to move.
fn use_up_reftable(disk: &Disk, refcount_order: u32) {
    let (reftable, index) = (512, 63);
    let block = index << (12 - refcount_order) << 9;
    disk.write_at(reftable + index * 8, &block.to_be_bytes()).expect("memory");
    let mut counts = [0; 512];
    // It counts itself, and is its own first cluster.
    counts[(1 << (refcount_order - 3)) - 1] = 1;
    disk.write_at(block, &counts).expect("memory");
}

fn run(seeds: std::ops::Range<u64>, steps: u64, each: impl Fn(&mut World, u64)) -> Stats {
    run_in(World::new, seeds, steps, each)
}

fn run_in(
    make: impl Fn(u64) -> World,
    seeds: std::ops::Range<u64>,
    steps: u64,
    each: impl Fn(&mut World, u64),
) -> Stats {
    let mut all = Stats::default();
    for seed in seeds {
        println!("seed {seed}");
        let mut world = make(seed);
        for step in 0..steps {
            world.guest.step();
            each(&mut world, step);
        }
        let stats = world.guest.stats;
        let found = world.guest.close();
        world.guest.assert_all_there();
        assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
        if !world.killed {
            assert_eq!(found.leaks, 0, "{:#?}", found.problems);
        }
        all.settles += stats.settles;
        all.dropped_settles += stats.dropped_settles;
        all.committed += stats.committed;
        all.dropped += stats.dropped;
        all.busy += stats.busy;
        all.asked_to_settle += stats.asked_to_settle;
        all.kills += stats.kills;
        all.zeroed_places += stats.zeroed_places;
        all.compressed += stats.compressed;
    }
    all
}

#[test]
fn what_was_committed_is_there() {
    let stats = run(1..150, 400, |world, step| {
        if step % 50 == 49 {
            world.guest.assert_survives_power_cut();
        }
    });
    assert!(stats.settles > 100 && stats.dropped_settles > 100 && stats.committed > 1000, "{stats:?}");
    assert!(stats.dropped > 100 && stats.busy > 100 && stats.asked_to_settle > 100, "{stats:?}");
    assert!(stats.zeroed_places > 100 && stats.compressed > 100, "{stats:?}");
}

#[test]
fn a_power_cut_leaves_leaks_at_worst() {
    run(1000..1080, 300, |world, _| {
        world.guest.cut_at_flushes = true;
        world.guest.assert_survives_power_cut();
    });
}

#[test]
fn a_kill_loses_nothing_that_was_committed() {
    let stats = run(2000..2120, 400, |world, step| {
        world.guest.cut_at_flushes = true;
        if step % 37 == 36 {
            world.guest.kill();
            world.killed = true;
        }
        if step % 10 == 9 {
            world.guest.assert_survives_power_cut();
        }
    });
    assert!(stats.kills > 1000 && stats.compressed > 100, "{stats:?}");
}

/// QEMU takes snapshots in between: they share L2 tables and clusters with the guest's view.
fn with_snapshots(seeds: std::ops::Range<u64>, kills: bool) {
    run(seeds, 300, |world, step| {
        if step % 100 == 60 && world.counts_to_15 {
            world.guest.take_snapshot();
        }
        // Each look is one of qemu-img's.
        world.guest.cut_at_flushes = (160..200).contains(&step);
        if kills && step % 17 == 16 {
            world.guest.kill();
            world.killed = true;
        }
        if step % 50 == 49 {
            world.guest.assert_survives_power_cut();
        }
    });
}

#[test]
fn a_snapshot_never_changes() {
    with_snapshots(4000..4024, false);
}

#[test]
fn a_snapshot_never_changes_by_a_kill() {
    with_snapshots(5000..5024, true);
}

#[test]
fn with_a_data_file_what_was_committed_is_there_and_a_power_cut_leaves_leaks_at_worst() {
    let stats = run_in(World::with_data_file, 3000..3080, 300, |world, _| {
        world.guest.cut_at_flushes = true;
        world.guest.assert_survives_power_cut();
    });
    assert!(stats.settles > 100 && stats.dropped_settles > 50 && stats.committed > 1000, "{stats:?}");
    assert!(stats.dropped > 50 && stats.busy > 20 && stats.asked_to_settle > 50, "{stats:?}");
}

#[test]
fn with_a_data_file_a_kill_loses_nothing_that_was_committed() {
    let stats = run_in(World::with_data_file, 4000..4080, 400, |world, step| {
        if step % 37 == 36 {
            world.guest.kill();
            world.killed = true;
        }
        if step % 10 == 9 {
            world.guest.assert_survives_power_cut();
        }
    });
    assert!(stats.kills > 500, "{stats:?}");
}
