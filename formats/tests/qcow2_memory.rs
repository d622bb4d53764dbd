//! What opening an image may cost: its tables' legal maximum and little more, whatever its header says.
//!
//! One test in a program of its own: the kernel counts the address space of all threads together.
mod support;

use formats::image::Image;
use formats::journal::Forgetful;
use formats::qcow2::{Open, Qcow2};
use formats::storage::Storage;
use std::sync::Arc;
use support::disk::Disk;
use support::written::{Content, ImageWriter, Payload, Shape};

/// Bytes for slices of tables.
const METADATA: usize = 1 << 20;
/// The L1 table and the refcount table, each also once as the file has it while it is decoded; slices;
/// and what the heap rounds up to.
const OPENING_MAX: u64 = 2 * ((32 << 20) + (8 << 20)) + METADATA as u64 + (16 << 20);

/// Bytes of address space that this process has (`VmSize`), or had at most (`VmPeak`).
fn address_space(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find(|line| line.starts_with(field)).expect("a field of it");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    kib << 10
}

/// By how many bytes `work` makes the address space larger at most.
fn cost(work: impl FnOnce()) -> u64 {
    // Up to a peak of before, which the heap of a new thread makes, nothing would be seen.
    let room = address_space("VmPeak") - address_space("VmSize");
    let ballast: Vec<u8> = Vec::with_capacity(room as usize);
    let before = address_space("VmPeak");
    work();
    drop(ballast);
    address_space("VmPeak") - before
}

fn open(disk: &Arc<Disk>, writable: bool) -> formats::error::Result<Qcow2> {
    let open = Open { writable, has_backing: false, metadata_bytes_max: METADATA };
    Qcow2::open(disk.clone(), Arc::new(Forgetful), open)
}

/// A small image, and then its header says that it has an L1 table of so many entries and a refcount
/// table of so many clusters, both behind everything else.
fn claiming(l1_entries: u32, reftable_clusters: u32) -> Arc<Disk> {
    const CLUSTER_BITS: u32 = 9;
    let shape = Shape {
        version: 3,
        cluster_bits: CLUSTER_BITS,
        refcount_order: 4,
        size: 20 << CLUSTER_BITS,
        zstd: false,
        below: false,
        extended: false,
        snapshot: false,
        payload: Payload::Inside,
    };
    let mut writer = ImageWriter::new(shape);
    writer.content(Content::Data);
    let disk = writer.finish(&[]).image;
    let mut tables = [[0; 8]; 2];
    disk.read_at(2 << CLUSTER_BITS, &mut tables[0]).expect("its L1 table");
    disk.read_at(1 << CLUSTER_BITS, &mut tables[1]).expect("its refcount table");
    let l1_at = 1_u64 << 20;
    let reftable_at = l1_at + (u64::from(l1_entries) * 8).next_multiple_of(1 << CLUSTER_BITS);
    disk.set_len(reftable_at + (u64::from(reftable_clusters) << CLUSTER_BITS)).expect("memory");
    // A disk that needs all of the L1 table.
    let size = u64::from(l1_entries) << (CLUSTER_BITS + CLUSTER_BITS - 3);
    for (at, bytes) in [
        (24, &size.to_be_bytes()[..]),
        (36, &l1_entries.to_be_bytes()),
        (40, &l1_at.to_be_bytes()),
        (48, &reftable_at.to_be_bytes()),
        (56, &reftable_clusters.to_be_bytes()),
        (l1_at, &tables[0]),
        (reftable_at, &tables[1]),
    ] {
        disk.write_at(at, bytes).expect("memory");
    }
    disk.flush();
    Arc::new(disk)
}

#[test]
fn opening_costs_what_its_tables_may_have_at_most() {
    let (l1_max, reftable_max) = ((32 << 20) / 8, (8 << 20) >> 9);
    let legal = claiming(l1_max, reftable_max);
    let cost_of_legal = cost(|| {
        for writable in [false, true] {
            let image = open(&legal, writable).expect("the largest tables are legal");
            assert!(image.map(0, 1).is_ok());
        }
    });
    assert!(cost_of_legal <= OPENING_MAX, "{cost_of_legal} bytes for the largest tables");
    assert!(cost_of_legal >= 32 << 20, "{cost_of_legal} bytes: the largest tables were not read");

    // 2 GiB each. Nothing is allocated for what is refused.
    for (entries, clusters, field) in [(1 << 28, 1, "l1_size"), (64, 1 << 22, "refcount_table_clusters")] {
        let huge = claiming(64, 1);
        huge.write_at(36, &(entries as u32).to_be_bytes()).expect("memory");
        huge.write_at(56, &(clusters as u32).to_be_bytes()).expect("memory");
        huge.set_len(1 << 40).expect("memory");
        let cost = cost(|| {
            for writable in [false, true] {
                let refusal = open(&huge, writable).err().expect("2 GiB").one_line();
                assert!(refusal.contains(field), "{refusal}");
            }
        });
        assert!(cost < 4 << 20, "{cost} bytes for a table that is refused");
    }
}
