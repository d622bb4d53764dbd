//! Worlds of one image and one guest: everything about one follows from its seed.
use super::disk::Disk;
use super::files::Files;
use super::guest::{Guest, Stats};
use super::random::Random;
use super::written::{Content, ImageWriter, Payload, Shape, Written};
use formats::qcow2::Open;
use formats::storage::Storage;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What an image may have besides clusters of payload and zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Backing,
    Compressed,
    ExtendedL2,
    /// One internal snapshot that shares everything at first.
    Snapshot,
    /// Payload in a file of its own.
    ExternalData,
    /// Its clusters are small and many, and its refcount table is nearly used up.
    SmallReftable,
}

use Feature::{Backing, Compressed, ExtendedL2, ExternalData, SmallReftable, Snapshot};

/// Each is in one of so many worlds, where it goes together with the others.
const FEATURES: [(Feature, u64); 6] =
    [(Backing, 2), (Compressed, 2), (ExtendedL2, 3), (Snapshot, 4), (ExternalData, 4), (SmallReftable, 5)];

/// A guest on an image of random features, geometry and content.
pub fn guest(seed: u64) -> Guest {
    let mut random = Random::new(seed);
    let features = FEATURES.into_iter().filter(|(_, one_in)| random.one_in(*one_in)).map(|(feature, _)| feature);
    let features: Vec<Feature> = features.collect();
    guest_with(&features, seed, random)
}

/// A guest on an image with these features, in a file with other tenants' bytes in every cluster that is
/// free.
pub fn guest_with(features: &[Feature], seed: u64, mut random: Random) -> Guest {
    let shape = shape(seed, features, &mut random);
    let Written { image, data, bytes } = fill(shape, features, &mut random);
    if features.contains(&SmallReftable) && shape.cluster_bits == 9 {
        use_up_reftable(&image, shape.refcount_order, &mut random);
    }
    let metadata_bytes_max = if random.one_in(2) { 0 } else { 1 << 20 };
    let open = Open { writable: true, has_backing: shape.below, metadata_bytes_max };
    let notes = if random.one_in(2) { 8 } else { 4096 };
    let granule = (1 << shape.cluster_bits) / if shape.extended { 32 } else { 1 };
    let mut guest = Guest::new(Files::new(image, data), &bytes, granule, notes, open, seed);
    // Inflating large clusters for each look at a sector takes long, and shows no more.
    guest.compresses = features.contains(&Compressed) && shape.cluster_bits <= 14;
    guest
}

fn fill(shape: Shape, features: &[Feature], random: &mut Random) -> Written {
    let mut writer = ImageWriter::new(shape);
    // Some are empty, some full.
    let empty_one_in = 1 + random.below(3);
    let garbage = random.one_in(2);
    while !writer.is_full() {
        let content = match random.below(8) {
            // The disk by itself from the first write on: QEMU preallocates such images.
            _ if shape.payload == Payload::Raw => Content::Data,
            _ if random.one_in(empty_one_in) => Content::Absent,
            0..=2 => Content::Data,
            3 => Content::Zero,
            4 => Content::Kept,
            5 if shape.extended => Content::Mixed(random.next()),
            6 if features.contains(&Compressed) => Content::Compressed,
            _ if garbage => {
                writer.garbage();
                continue;
            }
            _ => Content::Absent,
        };
        writer.content(content);
    }
    writer.finish(&[])
}

fn shape(seed: u64, features: &[Feature], random: &mut Random) -> Shape {
    let has = |feature| features.contains(&feature);
    let payload = match random.below(3) {
        _ if !has(ExternalData) => Payload::Inside,
        0 => Payload::Raw,
        _ => Payload::External,
    };
    let cluster_bits = match seed % 8 {
        _ if has(ExtendedL2) => 14,
        _ if has(SmallReftable) => 9,
        nth => [9, 10, 11, 12, 9, 16, 14, 9][nth as usize],
    };
    let version = if !has(ExtendedL2) && !has(ExternalData) && random.one_in(4) { 2 } else { 3 };
    let refcount_order = match version {
        2 => 4,
        _ if has(Snapshot) || has(SmallReftable) => 3 + random.below(4) as u32,
        _ => random.below(7) as u32,
    };
    // Several L2 tables where clusters are small; the last cluster is a part of one.
    let clusters = match cluster_bits {
        9 | 10 => 200,
        11 | 12 => 40,
        _ => 6,
    };
    Shape {
        version,
        cluster_bits,
        refcount_order,
        size: (clusters << cluster_bits) - (random.below(1 << cluster_bits) & !511),
        zstd: version == 3 && random.one_in(2),
        below: has(Backing) && payload != Payload::Raw,
        extended: has(ExtendedL2),
        snapshot: has(Snapshot) && payload == Payload::Inside,
        payload,
    }
}

/// Gives an image with clusters of 512 bytes a refcount block near the end of what its table of one
/// cluster reaches, with few free clusters behind: soon it needs a further block, or the table moves.
fn use_up_reftable(disk: &Disk, refcount_order: u32, random: &mut Random) {
    let (reftable, index) = (512, 62 + random.below(2));
    let per_block = 1 << (12 - refcount_order);
    // It counts itself.
    let in_block = per_block - 1 - random.below(30);
    let block = (index * per_block + in_block) << 9;
    disk.write_at(reftable + index * 8, &block.to_be_bytes()).expect("memory");
    let (width, mut counts) = (1 << (refcount_order - 3), [0; 512]);
    counts[in_block as usize * width + width - 1] = 1;
    disk.write_at(block, &counts).expect("memory");
    disk.flush();
}

/// Lives through `steps` of the world of `seed`; `each` happens after every one. It ends with a clean close.
pub fn live(seed: u64, steps: u64, each: impl Fn(&mut Guest, u64)) -> Stats {
    live_as(guest(seed), steps, each)
}

/// The same of any world.
pub fn live_as(mut guest: Guest, steps: u64, each: impl Fn(&mut Guest, u64)) -> Stats {
    for step in 0..steps {
        guest.step();
        each(&mut guest, step);
    }
    let stats = guest.stats;
    let found = guest.close();
    guest.assert_all_there();
    assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
    if stats.kills == 0 && stats.restarts == 0 {
        assert_eq!(found.leaks, 0, "{:#?}", found.problems);
    }
    stats
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// So many worlds, or what the environment says: `SEEDS=100000` for more, `SEED=31` for one. `None` where
/// they were too few to tell anything of all.
pub fn worlds(test: &str, count: u64, live: impl Fn(u64) -> Stats) -> Option<Stats> {
    if let Some(seed) = number("SEED") {
        live(seed);
        return None;
    }
    let mut all = Stats::default();
    let seeds = number("SEEDS").unwrap_or(count);
    for seed in 1..=seeds {
        let stats = catch_unwind(AssertUnwindSafe(|| live(seed)));
        all.add(&stats.unwrap_or_else(|_| panic!("repeat it with SEED={seed} cargo test -p formats {test}")));
    }
    (seeds >= count).then_some(all)
}
