//! The qcow2 map: 1 TiB in clusters of 64 KiB, its file in memory, no payload.
use criterion::{Criterion, criterion_group, criterion_main};
use formats::image::{Image, Progress, Reserve, Settle};
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::collections::HashMap;
use std::hint::black_box;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const SIZE: u64 = 1 << 40;
const CLUSTER: u64 = 64 << 10;
const PAGE: u64 = 4096;
/// How much of the disk is allocated: what an L2 table maps, 64 times.
const ALLOCATED: u64 = 64 * (CLUSTER / 8) * CLUSTER;

fn reads(c: &mut Criterion) {
    let file = Arc::new(Memory::default());
    allocate(&file);
    let mut group = c.benchmark_group("qcow2_map");
    let image = open(&file, 16 << 20);
    let mut at = places();
    group.bench_function("hit", |b| b.iter(|| image.map(at(), PAGE)));
    group.bench_function("run_of_512_MiB", |b| b.iter(|| image.map(black_box(0), 512 << 20)));
    // Memory for eight slices of 4 KiB, so that nearly every look reads one.
    let cold = open(&file, 0);
    group.bench_function("cold", |b| b.iter(|| cold.map(at(), PAGE)));
    group.bench_function("reserve_in_place", |b| {
        b.iter(|| {
            let start = at();
            let Ok(Reserve::Room(room)) = image.reserve(ByteRange { start, end: start + PAGE }) else {
                panic!("an allocated cluster has room");
            };
            image.commit(room)
        });
    });
    group.finish();
}

/// A guest fills an empty disk in order, a cluster at a time; settles are part of it.
fn writes(c: &mut Criterion) {
    let mut group = c.benchmark_group("qcow2_map");
    let mut image = None;
    let mut next = 0;
    group.bench_function("reserve_and_commit", |b| {
        b.iter(|| {
            if next == 0 {
                let file = Arc::new(Memory::default());
                create(&*file, &Create::new(SIZE)).expect("valid options");
                image = Some(open(&file, 16 << 20));
            }
            write(image.as_ref().expect("just made"), ByteRange { start: next, end: next + CLUSTER });
            next = (next + CLUSTER) % SIZE;
        });
    });
    group.finish();
}

/// Offsets of pages all over what is allocated.
fn places() -> impl FnMut() -> u64 {
    let mut at = 0;
    move || {
        at = (at + 7_654_321 * PAGE) % ALLOCATED;
        at
    }
}

fn open(file: &Arc<Memory>, metadata_bytes_max: usize) -> Qcow2 {
    let open = Open { writable: true, has_backing: false, metadata_bytes_max };
    Qcow2::open(file.clone(), Arc::new(Forgetful), open).expect("a valid image")
}

fn allocate(file: &Arc<Memory>) {
    create(&**file, &Create::new(SIZE)).expect("valid options");
    let image = open(file, 16 << 20);
    write(&image, ByteRange { start: 0, end: ALLOCATED });
    settle(&image);
}

fn write(image: &Qcow2, range: ByteRange) {
    let mut rest = range;
    while !rest.is_empty() {
        match image.reserve(rest).expect("a valid image") {
            Reserve::Room(room) => {
                rest.start = room.guest.end;
                image.commit(room).expect("a valid image");
            }
            Reserve::Settle => settle(image),
            Reserve::Busy => panic!("nobody else writes"),
        }
    }
}

fn settle(image: &Qcow2) {
    let mut progress = Progress::default();
    while image.settle(&mut progress).expect("memory") == Settle::Flush {}
    image.recycle();
}

/// A sparse file in memory.
#[derive(Default)]
struct Memory(Mutex<Bytes>);

#[derive(Default)]
struct Bytes {
    len: u64,
    pages: HashMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Memory {
    /// Calls `work` for each page of `len` bytes at `at`: its number, where in it, where in the bytes.
    fn pieces(at: u64, len: usize, mut work: impl FnMut(u64, usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let here = at + done as u64;
            let inside = (here % PAGE) as usize;
            let count = (PAGE as usize - inside).min(len - done);
            work(here / PAGE, inside, done..done + count);
            done += count;
        }
    }
}

impl Storage for Memory {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at + bytes.len() as u64 > file.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::pieces(at, bytes.len(), |page, inside, range| match file.pages.get(&page) {
            Some(page) => bytes[range.clone()].copy_from_slice(&page[inside..inside + range.len()]),
            None => bytes[range].fill(0),
        });
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Self::pieces(at, bytes.len(), |page, inside, range| {
            let page = file.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[inside..inside + range.len()].copy_from_slice(&bytes[range]);
        });
        file.len = file.len.max(at + bytes.len() as u64);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len = len;
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }

    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = reads, writes
}
criterion_main!(benches);
