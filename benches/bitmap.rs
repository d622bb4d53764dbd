//! The dirty bitmap of 1 TiB in chunks of 64 KiB, against bitvec's atomic bits.
//!
//! bitvec's bits are relaxed and say nothing of what was there before, so they could not take the
//! bitmap's place; what they cost is what this is about.
use bitvec::vec::BitVec;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use engine::dirty::{DirtyBitmap, Which};
use formats::range::ByteRange;
use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

const CHUNK_BITS: u32 = 16;
const SIZE: u64 = 1 << 40;
const CHUNKS: usize = (SIZE >> CHUNK_BITS) as usize;
/// One in so many chunks is marked where a map is drained.
const SPARSE: usize = 10;
/// As a copier takes them: 1 MiB at a time.
const RUN: u64 = 16;

type Bits = BitVec<AtomicU64>;

fn chunks(first: usize, count: usize) -> ByteRange {
    ByteRange { start: (first as u64) << CHUNK_BITS, end: ((first + count) as u64) << CHUNK_BITS }
}

fn ours(marked: impl Iterator<Item = usize>) -> DirtyBitmap {
    let map = DirtyBitmap::new(SIZE, CHUNK_BITS);
    for chunk in marked {
        map.mark(chunks(chunk, 1));
    }
    map
}

fn bitvec(marked: impl Iterator<Item = usize>) -> Bits {
    let map = Bits::repeat(false, CHUNKS);
    marked.for_each(|chunk| map.set_aliased(chunk, true));
    map
}

/// A guest's write of one chunk, somewhere; and one of 32 MiB.
fn mark(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap/mark");
    for count in [1, 512] {
        group.throughput(Throughput::Elements(count as u64));
        let (map, bits) = (ours(0..0), bitvec(0..0));
        let mut at = 0;
        let mut next = move || {
            at = (at + 7_654_321) % (CHUNKS - 512);
            at
        };
        let mut next_too = next;
        group.bench_function(format!("ours/{count}"), |b| b.iter(|| map.mark(chunks(next(), count))));
        group.bench_function(format!("bitvec/{count}"), |b| {
            b.iter(|| {
                let first = next_too();
                (first..first + count).for_each(|chunk| bits.set_aliased(chunk, true));
            });
        });
    }
    group.finish();
}

/// A copier takes everything there is: single chunks, and a map that is marked throughout.
fn take(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap/take_all");
    for (name, step) in [("sparse", SPARSE), ("full", 1)] {
        group.sample_size(10).throughput(Throughput::Elements((CHUNKS / step) as u64));
        let marked = || (0..CHUNKS).step_by(step);
        group.bench_function(format!("ours/{name}"), |b| {
            b.iter_batched_ref(|| ours(marked()), |map| drain(map), BatchSize::LargeInput);
        });
        group.bench_function(format!("bitvec/{name}"), |b| {
            b.iter_batched_ref(|| bitvec(marked()), |bits| drain_bits(bits), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn drain(map: &DirtyBitmap) {
    let mut at = 0;
    while let Some(claim) = map.take(ByteRange { start: at, end: SIZE }, RUN, Which::Any) {
        at = map.claimed(&claim).end;
        map.release(claim);
    }
    assert!(map.is_clean());
}

fn drain_bits(bits: &Bits) {
    for chunk in bits.iter_ones() {
        bits.set_aliased(chunk, false);
    }
}

/// Nothing is marked but the last chunk.
fn scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap/scan_to_last");
    let map = ours(0..0);
    group.bench_function("ours", |b| {
        b.iter(|| {
            map.mark(chunks(CHUNKS - 1, 1));
            let claim = map.take(ByteRange { start: 0, end: SIZE }, RUN, Which::Any).expect("the last chunk");
            map.release(claim);
        });
    });
    let bits = bitvec(CHUNKS - 1..CHUNKS);
    group.bench_function("bitvec", |b| b.iter(|| black_box(&bits).first_one()));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = mark, take, scan
}
criterion_main!(benches);
