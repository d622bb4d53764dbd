//! Every interleaving, and every order of memory that the language allows, of what threads share:
//! `cargo test -p engine --lib --features loom interleavings`.
use crate::chain::{Chain, Layer};
use crate::dirty::{DirtyBitmap, Which};
use crate::disk::{DataFile, Disk};
use crate::export::gate::{Gate, Route};
use crate::io::Words;
use crate::io::{File, Waker};
use crate::mirror::Mirror;
use crate::planes::Planes;
use crate::sync::{AtomicU64, Ordering};
use formats::image::Image;
use formats::planes::Header;
use formats::range::ByteRange;
use formats::raw::Raw;
use formats::storage::Storage;
use std::io;
use std::sync::Arc;

const CHUNK_BITS: u32 = 9;
const CHUNK: ByteRange = ByteRange { start: 0, end: 1 << CHUNK_BITS };

/// A bitmap of two words of marks.
fn bitmap() -> DirtyBitmap {
    DirtyBitmap::new(128 << CHUNK_BITS, CHUNK_BITS)
}

/// A guest writes and then marks; a copier takes, reads and puts on the target. When the map is clean
/// the target has what the guest wrote. The bytes are relaxed: only the marks order them.
#[test]
fn a_clean_map_means_that_the_target_has_it() {
    loom::model(|| {
        let map = Arc::new(bitmap());
        let source = Arc::new(AtomicU64::new(0));
        let target = Arc::new(AtomicU64::new(0));
        let copy = |map: &DirtyBitmap, source: &AtomicU64, target: &AtomicU64| {
            if let Some(claim) = map.take(CHUNK, 1, Which::Any) {
                target.store(source.load(Ordering::Relaxed), Ordering::Relaxed);
                map.release(claim);
            }
        };
        map.mark(CHUNK);
        let guest = {
            let (map, source) = (Arc::clone(&map), Arc::clone(&source));
            loom::thread::spawn(move || {
                source.store(1, Ordering::Relaxed);
                map.mark(CHUNK);
            })
        };
        copy(&map, &source, &target);
        guest.join().expect("no panic");
        copy(&map, &source, &target);
        assert!(map.is_clean());
        assert_eq!(target.load(Ordering::Relaxed), 1);
    });
}

/// A part that is written while another one's chunk is taken is taken with it, or marked after it.
#[test]
fn a_part_is_not_left_behind_its_mark() {
    loom::model(|| {
        let parts = [0, 4096].map(|start| ByteRange { start, end: start + 4096 });
        let chunk = ByteRange { start: 0, end: 8192 };
        let map = Arc::new(DirtyBitmap::new(chunk.end, 13));
        let source = Arc::new(AtomicU64::new(0));
        let target = AtomicU64::new(0);
        let copy = || {
            if let Some(claim) = map.take(chunk, 1, Which::Any) {
                if claim.lacking().iter().any(|range| range.end > parts[1].start) {
                    target.store(source.load(Ordering::Relaxed), Ordering::Relaxed);
                }
                map.release(claim);
            }
        };
        map.mark(parts[0]);
        let guest = {
            let (map, source) = (Arc::clone(&map), Arc::clone(&source));
            loom::thread::spawn(move || {
                source.store(1, Ordering::Relaxed);
                map.mark(parts[1]);
            })
        };
        copy();
        guest.join().expect("no panic");
        copy();
        assert!(map.is_clean());
        assert_eq!(target.load(Ordering::Relaxed), 1);
    });
}

/// A scan that finds a word empty may clear its bit of the summary, never that of a mark.
#[test]
fn a_mark_that_comes_while_somebody_scans_is_found() {
    loom::model(|| {
        let map = Arc::new(bitmap());
        let everything = ByteRange { start: 0, end: 128 << CHUNK_BITS };
        // The summary's bit is set and the word is empty: the scan will clear it.
        map.mark(CHUNK);
        let claim = map.take(CHUNK, 1, Which::Any).expect("just marked");
        map.release(claim);
        let guest = {
            let map = Arc::clone(&map);
            loom::thread::spawn(move || map.mark(CHUNK))
        };
        let early = map.take(everything, 1, Which::Any);
        guest.join().expect("no panic");
        let found =
            early.is_some() || map.take(ByteRange { start: 0, end: 128 << CHUNK_BITS }, 1, Which::Any).is_some();
        assert!(found, "a mark was lost");
    });
}

/// Two copiers and one mark: one of them has the chunk.
#[test]
fn a_chunk_has_one_claim_at_a_time() {
    loom::model(|| {
        let map = Arc::new(bitmap());
        let inside = Arc::new(AtomicU64::new(0));
        map.mark(CHUNK);
        let work = |map: &DirtyBitmap, inside: &AtomicU64| {
            if let Some(claim) = map.take(CHUNK, 1, Which::Any) {
                assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0, "two are in one chunk");
                inside.fetch_sub(1, Ordering::Relaxed);
                map.release(claim);
            }
        };
        let other = {
            let (map, inside) = (Arc::clone(&map), Arc::clone(&inside));
            loom::thread::spawn(move || work(&map, &inside))
        };
        map.mark(CHUNK);
        work(&map, &inside);
        other.join().expect("no panic");
    });
}

/// A copy that fails marks again before it lets go: nobody sees a settled mirror in between.
#[test]
fn a_mirror_is_not_settled_while_a_copy_may_fail() {
    loom::model(|| {
        let mirror = Arc::new(Mirror::new(disk(), disk(), CHUNK_BITS, false));
        mirror.dirty.mark(CHUNK);
        let copier = {
            let mirror = Arc::clone(&mirror);
            loom::thread::spawn(move || {
                if let Some(claim) = mirror.take(CHUNK, 1) {
                    mirror.put(claim, false, true);
                }
            })
        };
        assert!(!mirror.is_settled(), "the target still lacks the chunk");
        copier.join().expect("no panic");
    });
}

/// A settle of the target forgets what was there when it began, and nothing else. The target's bytes are
/// relaxed: only the planes order them.
#[test]
fn a_settle_does_not_forget_what_it_has_not_seen() {
    loom::model(|| {
        let (words, planes) = planes();
        let planes = Arc::new(planes);
        let target = Arc::new(AtomicU64::new(0));
        let copier = {
            let (planes, target) = (Arc::clone(&planes), Arc::clone(&target));
            loom::thread::spawn(move || {
                target.store(1, Ordering::Relaxed);
                planes.brought(CHUNK);
            })
        };
        planes.turn();
        let settled = target.load(Ordering::Relaxed) == 1;
        planes.settled();
        copier.join().expect("no panic");
        let unsettled = header().layout().unsettled.into_iter().flatten();
        let noted = unsettled.map(|word| words[word].load(Ordering::Relaxed)).any(|word| word != 0);
        assert!(settled || noted, "the target has it in memory alone, and nobody knows");
    });
}

/// Two guest writes and one place in flight: one has it, and the other is woken.
#[test]
fn a_place_in_flight_has_one_write_at_a_time() {
    loom::model(|| {
        let (_, planes) = planes();
        let planes = Arc::new(planes);
        let first = planes.depart(CHUNK).expect("a free place");
        let other = {
            let planes = Arc::clone(&planes);
            loom::thread::spawn(move || planes.land(first))
        };
        let waker = Waker::simulated(4);
        planes.landed().listen(&waker);
        let second = planes.depart(CHUNK);
        let got = second.is_some();
        assert!(!got || planes.depart(CHUNK).is_none(), "two are in one place");
        other.join().expect("no panic");
        assert!(got || waker.was_woken(), "a write waits for good");
    });
}

/// A guest's write that has reached the source is found by who looks at flights and then at marks, while the target does
/// not have it. Who reads its bytes from the kernel sees what was before they were given to it.
#[test]
fn a_write_that_is_not_on_the_target_is_no_mismatch() {
    loom::model(|| {
        let words = Arc::new(Words::in_memory(header().layout().words()));
        let mirror = Arc::new(Mirror::on(Planes::on(&words, &header(), true), disk(), disk(), false));
        let source = Arc::new(AtomicU64::new(0));
        let guest = {
            let (mirror, source) = (Arc::clone(&mirror), Arc::clone(&source));
            loom::thread::spawn(move || {
                let flight = mirror.planes.depart(CHUNK).expect("a free place");
                source.store(1, Ordering::Release);
                mirror.written(CHUNK);
                mirror.planes.land(flight);
            })
        };
        let claim = mirror.dirty.claim_some(CHUNK).expect("nobody has it");
        let differs = source.load(Ordering::Acquire) != 0;
        assert!(!differs || mirror.is_being_written(CHUNK), "a mismatch that is none");
        mirror.dirty.release(claim);
        guest.join().expect("no panic");
    });
}

fn header() -> Header {
    Header {
        boot: [1, 2],
        job: 3,
        size: CHUNK.end,
        chunk_bits: CHUNK_BITS,
        flights: 1,
        source: (4, 5),
        target: (6, 7),
        target_is_zero: true,
    }
}

/// Planes of one chunk, and the words that they lie in.
fn planes() -> (Arc<Words>, Planes) {
    let words = Arc::new(Words::in_memory(header().layout().words()));
    let (_, planes) = Planes::on(&words, &header(), true);
    (words, planes)
}

/// Closed and nobody inside: then nobody is, and nobody will be.
#[test]
fn a_closed_and_empty_gate_has_nobody_inside() {
    loom::model(|| {
        let gate = Arc::new(Gate::new(Route { disk: disk(), mirror: None }));
        let inside = Arc::new(AtomicU64::new(0));
        let guest = {
            let (gate, inside) = (Arc::clone(&gate), Arc::clone(&inside));
            loom::thread::spawn(move || {
                if let Some(pass) = gate.enter(&Waker::simulated(1)) {
                    inside.store(1, Ordering::Relaxed);
                    inside.store(0, Ordering::Relaxed);
                    drop(pass);
                }
            })
        };
        let leaving = gate.close();
        if leaving.is_empty(&Waker::simulated(2)) {
            assert_eq!(inside.load(Ordering::Relaxed), 0, "a request is inside a closed gate");
        }
        guest.join().expect("no panic");
        assert!(leaving.is_empty(&Waker::simulated(2)));
    });
}

/// Who waits at a closed gate hears of its opening.
#[test]
fn nobody_waits_at_an_open_gate() {
    loom::model(|| {
        let route = || Route { disk: disk(), mirror: None };
        let gate = Arc::new(Gate::new(route()));
        drop(gate.close());
        let opener = {
            let gate = Arc::clone(&gate);
            loom::thread::spawn(move || gate.open(Route { disk: disk(), mirror: None }))
        };
        let waker = Waker::simulated(3);
        let entered = gate.enter(&waker).is_some();
        opener.join().expect("no panic");
        assert!(entered || waker.was_woken(), "a request waits for good");
    });
}

fn disk() -> Arc<Disk> {
    let image: Box<dyn Image> = Box::new(Raw::new(Arc::new(Nothing), 128 << CHUNK_BITS));
    let file = DataFile::buffered(File::simulated(0));
    let layer = Layer { image, file, path: "nothing".into(), format: "raw", apart: None };
    Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false))
}

/// Bytes that nobody asks for.
struct Nothing;

impl Storage for Nothing {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn next_data(&self, _: u64) -> io::Result<Option<u64>> {
        Ok(None)
    }
    fn next_hole(&self, at: u64) -> io::Result<u64> {
        Ok(at)
    }
}
