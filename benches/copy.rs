//! The copy loop: copiers on memory alone, and on files, beside a bare ring and tokio-uring that move
//! the same bytes in the same pieces.
//!
//! Memory shows what the loop itself costs: the best it can do is to copy twice (in and out). Files
//! go past the page cache where the file system lets them; the bare ring and tokio-uring keep nothing
//! consistent with anybody, which is what they are: a bound, and a rival for the engine's ring.
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::chain::{Chain, Layer};
use engine::control::TargetFormat;
use engine::control::options::Cache;
use engine::control::options::Reach;
use engine::copier::{Copier, Depth, Progress};
use engine::data_file::DataFile;
use engine::disk::{Disk, Tools};
use engine::io::{Arena, Completion, File, Io, Op, Ring, Token, Wait, Waker};
use engine::mirror::Mirror;
use engine::open::{Access, open_disk};
use formats::range::ByteRange;
use formats::raw::Raw;
use formats::storage::Storage;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const CHUNK_BITS: u32 = 16;
const MEMORY_LEN: u64 = 64 << 20;
const FILE_LEN: u64 = 128 << 20;
/// As the daemon has it.
const DEPTH: Depth = Depth { slots: 16, run_len: 1 << 20, beside: 1 << 20 };
/// One chunk an operation, as a map with single marks makes it.
const SINGLE: Depth = Depth { slots: 32, run_len: 64 << 10, beside: 64 << 10 };

/// Source and target in memory.
fn memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy/memory");
    group.sample_size(20).throughput(Throughput::Bytes(MEMORY_LEN));
    let file = || vec![0x5a; MEMORY_LEN as usize];
    let mut io = Memory { files: vec![file(), file()], done: Vec::new() };
    let disk = |number| {
        let layer = Layer {
            image: Box::new(Raw::new(Arc::new(Solid), MEMORY_LEN)),
            file: DataFile::buffered(File::simulated(number)),
            path: PathBuf::from("memory"),
            format: "raw",
            apart: None,
        };
        Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), number == 0))
    };
    let mirror = Arc::new(Mirror::new(disk(0), disk(1), CHUNK_BITS, false));
    for (name, depth) in [("runs_of_1M", DEPTH), ("chunks_of_64k", SINGLE)] {
        let arena = Arena::new(depth.memory());
        group.bench_function(name, |b| b.iter(|| copy(&mirror, depth, &mut io, &arena)));
    }
    let (source, mut target) = (file(), file());
    group.bench_function("bound_two_memcpy", |b| {
        let mut buffer = vec![0; 1 << 20];
        b.iter(|| {
            for (from, to) in source.chunks(1 << 20).zip(target.chunks_mut(1 << 20)) {
                buffer.copy_from_slice(from);
                to.copy_from_slice(&buffer);
            }
        });
    });
    group.finish();
}

/// Source and target in files.
fn files(c: &mut Criterion) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    for path in [&source, &target] {
        std::fs::write(path, vec![0x5a; FILE_LEN as usize]).expect("room on the disk");
        std::fs::File::open(path).and_then(|file| file.sync_all()).expect("a flush");
    }
    for (name, cache) in [("direct", Cache::None), ("page_cache", Cache::Writeback)] {
        let reach = Reach { cache, ..Reach::default() };
        let open = |path: &Path, access| Arc::new(open_disk(path, Some(TargetFormat::Raw), access).expect("a file"));
        let source_disk = open(&source, Access::read_only(&reach));
        if cache == Cache::None && !source_disk.chain().top().file.is_direct() {
            eprintln!("copy/files/direct: the file system has no direct I/O, so it is left out");
            continue;
        }
        let target_disk = open(&target, Access::writable(&reach));
        let mirror = Arc::new(Mirror::new(source_disk, target_disk, CHUNK_BITS, false));
        let mut group = c.benchmark_group(format!("copy/files/{name}"));
        group.sample_size(10).throughput(Throughput::Bytes(FILE_LEN));
        for (name, depth) in [("runs_of_1M", DEPTH), ("chunks_of_64k", SINGLE)] {
            let arena = Arena::new(depth.memory());
            let mut ring = Ring::new(depth.operations(), &arena).expect("a ring");
            group.bench_function(name, |b| b.iter(|| copy(&mirror, depth, &mut ring, &arena)));
        }
        let direct = cache == Cache::None;
        for (name, depth) in [("bare_ring_1M", DEPTH), ("bare_ring_64k", SINGLE)] {
            let [from, to] = [(&source, false), (&target, true)];
            let [from, to] = [from, to].map(|(path, write)| File::new(open_file(path, write, direct)));
            let arena = Arena::new(depth.memory());
            let mut ring = Ring::new(depth.operations(), &arena).expect("a ring");
            group.bench_function(name, |b| b.iter(|| copy_bare(&from, &to, depth, &mut ring, &arena)));
        }
        group.bench_function("tokio_uring_64k", |b| {
            b.iter_custom(|times| {
                let files = [(&source, false), (&target, true)].map(|(path, write)| open_file(path, write, direct));
                tokio_uring::start(rival::copy(files, times))
            });
        });
        group.finish();
    }
}

/// Copies everything with the engine's copier.
fn copy<I: Io>(mirror: &Arc<Mirror>, depth: Depth, io: &mut I, arena: &Arena) {
    let waker = Waker::new().expect("an eventfd");
    mirror.written(ByteRange { start: 0, end: mirror.source.size() });
    let mut copier = Copier::new(Arc::clone(mirror), depth, 0);
    let mut done = Vec::new();
    while copier.step(&mut Tools { io, arena, waker: &waker }, &mut done) == Progress::Busy {
        io.reap(Wait::One, &mut done).expect("a queue that works");
    }
    assert!(mirror.is_settled() && !mirror.has_fault());
}

/// The same pieces by reads and writes alone.
fn copy_bare(from: &File, to: &File, depth: Depth, ring: &mut Ring, arena: &Arena) {
    let mut done = Vec::new();
    let (mut next, mut busy) = (0, 0);
    loop {
        while busy < depth.slots && next < FILE_LEN {
            let buf = arena.take(depth.run_len).expect("a buffer a slot");
            ring.submit(Token(next), Op::Read { file: from.clone(), at: next, buf });
            next += depth.run_len as u64;
            busy += 1;
        }
        if busy == 0 {
            return;
        }
        ring.reap(Wait::One, &mut done).expect("a ring that works");
        for Completion { token, op, result } in done.drain(..) {
            assert_eq!(result.expect("a file that works") as usize, depth.run_len);
            match op {
                Op::Read { at, buf, .. } => ring.submit(token, Op::Write { file: to.clone(), at, buf }),
                _ => busy -= 1,
            }
        }
    }
}

fn open_file(path: &Path, write: bool, direct: bool) -> std::fs::File {
    use rustix::fs::{Mode, OFlags};
    let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = if direct { flags | OFlags::DIRECT } else { flags };
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("a file").into()
}

/// tokio-uring: a task for each slot.
mod rival {
    use super::{FILE_LEN, SINGLE};
    use std::rc::Rc;
    use std::time::{Duration, Instant};
    use tokio_uring::buf::{BoundedBuf, Slice};
    use tokio_uring::fs::File;

    type Buffer = Slice<Vec<u8>>;

    /// How long it takes to copy `times` times.
    pub async fn copy(files: [std::fs::File; 2], times: u64) -> Duration {
        let [from, to] = files.map(|file| Rc::new(File::from_std(file)));
        let mut buffers: Vec<Buffer> = (0..SINGLE.slots).map(|_| aligned()).collect();
        let start = Instant::now();
        for _ in 0..times {
            let slots = std::mem::take(&mut buffers).into_iter().enumerate();
            let slots = slots.map(|(slot, buffer)| tokio_uring::spawn(walk(slot, buffer, from.clone(), to.clone())));
            for slot in slots.collect::<Vec<_>>() {
                buffers.push(slot.await.expect("a task that ends"));
            }
        }
        start.elapsed()
    }

    /// On whole pages, for direct I/O.
    fn aligned() -> Buffer {
        const PAGE: usize = 4096;
        let bytes = vec![0; SINGLE.run_len + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE);
        bytes.slice(start..start + SINGLE.run_len)
    }

    async fn walk(slot: usize, mut buffer: Buffer, from: Rc<File>, to: Rc<File>) -> Buffer {
        let step = (SINGLE.slots * SINGLE.run_len) as u64;
        let mut at = (slot * SINGLE.run_len) as u64;
        while at < FILE_LEN {
            let (read, filled) = from.read_at(buffer, at).await;
            assert_eq!(read.expect("a file that works"), SINGLE.run_len);
            let (written, back) = to.write_at(filled, at).submit().await;
            assert_eq!(written.expect("a file that works"), SINGLE.run_len);
            buffer = back;
            at += step;
        }
        buffer
    }
}

/// Two files in memory; every operation is done when it is submitted.
struct Memory {
    files: Vec<Vec<u8>>,
    done: Vec<Completion>,
}

impl Io for Memory {
    fn submit(&mut self, token: Token, mut op: Op) {
        let number = |file: &File| file.number().expect("a simulated file") as usize;
        let count = match &mut op {
            Op::Read { file, at, buf } => {
                let len = buf.len();
                buf.copy_from_slice(&self.files[number(file)][*at as usize..][..len]);
                len
            }
            Op::Write { file, at, buf } => {
                self.files[number(file)][*at as usize..][..buf.len()].copy_from_slice(buf);
                buf.len()
            }
            Op::Zero { file, at, len, .. } => {
                self.files[number(file)][*at as usize..][..*len as usize].fill(0);
                0
            }
            other => panic!("{other:?} is no part of a copy"),
        };
        self.done.push(Completion { token, op, result: Ok(count as u32) });
    }

    fn reap(&mut self, _: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        done.append(&mut self.done);
        Ok(())
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// A file without holes.
struct Solid;

impl Storage for Solid {
    fn read_at(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0x5a);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(MEMORY_LEN)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }

    fn next_hole(&self, _: u64) -> io::Result<u64> {
        Ok(MEMORY_LEN)
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = memory, files
}
criterion_main!(benches);
