//! Finding zeroes, against the obvious way.
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::zero::{is_zero, runs};
use std::hint::black_box;

/// A chunk, and a copier's whole run.
const LENS: [usize; 2] = [64 << 10, 1 << 20];

fn zeroes(c: &mut Criterion) {
    for len in LENS {
        let mut group = c.benchmark_group(format!("zero/{}k", len >> 10));
        group.throughput(Throughput::Bytes(len as u64)).sample_size(20);
        let zeroes = vec![0; len];
        group.bench_function("is_zero", |b| b.iter(|| is_zero(black_box(&zeroes))));
        group.bench_function("iter_all", |b| b.iter(|| black_box(&zeroes).iter().all(|byte| *byte == 0)));
        // Every second granule has one byte that is not zero, at its end.
        let mut mixed = zeroes.clone();
        mixed.iter_mut().skip(4095).step_by(8192).for_each(|byte| *byte = 1);
        group.bench_function("runs_mixed", |b| {
            b.iter(|| runs(black_box(&mixed), 4096).count());
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(std::time::Duration::from_millis(300)).measurement_time(std::time::Duration::from_secs(1));
    targets = zeroes
}
criterion_main!(benches);
