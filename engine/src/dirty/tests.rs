//! The bitmap against a slow, obvious model.
use super::{CELL_WORDS_MAX, Cell, DirtyBitmap, Which};
use crate::io::View;
use formats::range::ByteRange;
use proptest::prelude::*;
use std::collections::BTreeSet;

const SIZE: u64 = ((64 * 70) << 12) - 100;

#[derive(Clone, Debug)]
enum Step {
    Mark(ByteRange),
    Take(ByteRange, u64, Which),
    Heat(ByteRange),
    Claim(ByteRange),
    Release(usize),
}

fn range() -> impl Strategy<Value = ByteRange> {
    (0..SIZE, 1..600_000u64).prop_map(|(start, len)| ByteRange { start, end: (start + len).min(SIZE) })
}

fn which() -> impl Strategy<Value = Which> {
    proptest::sample::select(&[Which::Any, Which::Cold])
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        range().prop_map(Step::Mark),
        (range(), 1..40u64, which()).prop_map(|(within, max, which)| Step::Take(within, max, which)),
        (0..SIZE, which()).prop_map(|(start, which)| Step::Take(ByteRange { start, end: SIZE }, 16, which)),
        range().prop_map(Step::Heat),
        range().prop_map(Step::Claim),
        any::<usize>().prop_map(Step::Release),
    ]
}

/// The units of 2^`bits` bytes that `range` touches.
fn units(range: ByteRange, bits: u32) -> std::ops::Range<u64> {
    range.start >> bits..range.end.div_ceil(1 << bits)
}

/// A chunk's bits and its parts'.
const BITS: [(u32, u32); 5] = [(9, 9), (12, 12), (14, 12), (16, 12), (18, 14)];

proptest! {
    #[test]
    fn it_does_what_sets_do(bits in proptest::sample::select(&BITS), steps in proptest::collection::vec(step(), 1..200)) {
        let (chunk_bits, part_bits) = bits;
        let (chunk_count, chunks) = (SIZE.div_ceil(1 << chunk_bits), |range| units(range, chunk_bits));
        let map = DirtyBitmap::new(SIZE, chunk_bits);
        let [mut marks, mut parts, mut claims, mut touched, mut hot] = [const { BTreeSet::<u64>::new() }; 5];
        let mut held = Vec::new();
        for step in steps {
            match step {
                Step::Mark(range) => {
                    let before = parts.len();
                    let new = map.mark(range);
                    marks.extend(chunks(range));
                    parts.extend(units(range, part_bits));
                    prop_assert_eq!(new, ((parts.len() - before) as u64) << part_bits);
                }
                Step::Heat(range) => {
                    map.heat(range);
                    hot.extend(chunks(range));
                }
                Step::Take(within, max, which) => {
                    let wanted = |chunk: &u64| which == Which::Any || !hot.contains(chunk);
                    let free = |chunk: &u64| marks.contains(chunk) && !claims.contains(chunk) && wanted(chunk);
                    let first = chunks(within).find(free);
                    let expected: Option<Vec<u64>> =
                        first.map(|first| (first..chunk_count).take(max as usize).take_while(free).collect());
                    let claim = map.take(within, max, which);
                    let taken: Option<Vec<u64>> = claim.as_ref().map(|claim| (claim.first..claim.end).collect());
                    prop_assert_eq!(&taken, &expected);
                    for chunk in taken.into_iter().flatten() {
                        marks.remove(&chunk);
                        hot.remove(&chunk);
                        claims.insert(chunk);
                    }
                    let claimed = claim.as_ref().map_or(0..0, |claim| units(map.claimed(claim), part_bits));
                    let lacking: Vec<ByteRange> = claim.as_ref().map_or(Vec::new(), |claim| claim.lacking().to_vec());
                    prop_assert!(lacking.is_sorted_by(|one, next| one.end < next.start));
                    for part in claimed {
                        let part_range = ByteRange { start: part << part_bits, end: ((part + 1) << part_bits).min(SIZE) };
                        let taken = lacking.iter().any(|range| range.intersect(part_range) == part_range);
                        prop_assert!(taken || !parts.remove(&part), "part {}", part);
                        // Two parts that the target has lie between two that it lacks, at most.
                        prop_assert!(!taken || (part.saturating_sub(2)..part + 3).any(|near| parts.contains(&near)));
                    }
                    lacking.iter().flat_map(|range| units(*range, part_bits)).for_each(|part| _ = parts.remove(&part));
                    held.extend(claim);
                }
                Step::Claim(range) => {
                    let free = chunks(range).all(|chunk| !claims.contains(&chunk));
                    let claim = map.claim(range);
                    prop_assert_eq!(claim.is_some(), free);
                    if free {
                        claims.extend(chunks(range));
                    }
                    held.extend(claim);
                }
                Step::Release(_) if held.is_empty() => {}
                Step::Release(which) => {
                    let claim = held.swap_remove(which % held.len());
                    (claim.first..claim.end).for_each(|chunk| assert!(claims.remove(&chunk)));
                    map.release(claim);
                }
            }
            prop_assert_eq!(map.marked_bytes(), ((parts.len() as u64) << part_bits).min(SIZE));
            prop_assert_eq!(map.is_clean(), marks.is_empty());
            touched.extend(&marks);
        }
        for count in [1, 3, 7, 64, chunk_count - 1, chunk_count + 1] {
            let cells = map.cells(count);
            let count = count.min(chunk_count);
            prop_assert_eq!(cells.len() as u64, count);
            for (number, cell) in cells.iter().enumerate() {
                let border = |cell: u64| chunk_count * cell / count;
                let part = border(number as u64)..border(number as u64 + 1);
                let those = |which: &dyn Fn(&u64) -> bool| part.clone().filter(which).count() as u64;
                let expected = Cell {
                    chunks: part.end - part.start,
                    claimed: those(&|chunk| claims.contains(chunk)),
                    marked: those(&|chunk| marks.contains(chunk) && !claims.contains(chunk)),
                    copied: those(&|chunk| touched.contains(chunk) && !marks.contains(chunk) && !claims.contains(chunk)),
                };
                prop_assert_eq!(*cell, expected);
            }
        }
        let everything = ByteRange { start: 0, end: SIZE };
        let runs = map.runs(everything);
        prop_assert!(runs.iter().all(|(run, marked)| chunks(*run).all(|chunk| marks.contains(&chunk) == *marked)));
        prop_assert_eq!(runs.last().map(|(run, _)| run.end), Some(SIZE));
    }
}

#[test]
fn a_clean_map_of_a_large_disk_has_nothing_to_take() {
    let size = 1 << 40;
    let map = DirtyBitmap::new(size, 16);
    let everything = ByteRange { start: 0, end: size };
    assert!(map.take(everything, 16, Which::Any).is_none());
    map.mark(ByteRange { start: size - 1, end: size });
    let claim = map.take(everything, 16, Which::Any).expect("the last chunk");
    assert_eq!(map.claimed(&claim), ByteRange { start: size - (1 << 16), end: size });
    map.release(claim);
    assert!(map.take(everything, 16, Which::Any).is_none());
}

#[test]
fn a_small_write_costs_its_parts() {
    let (size, kib) = (1 << 20, |from: u64, to: u64| ByteRange { start: from << 10, end: to << 10 });
    let map = DirtyBitmap::new(size, 16);
    let everything = ByteRange { start: 0, end: size };
    for (at, len) in [(5000, 10), (20 << 10, 4096), (64 << 10, 1), (300 << 10, 8192)] {
        map.mark(ByteRange { start: at, end: at + len });
    }
    assert_eq!(map.marked_bytes(), 20 << 10);
    let claim = map.take(everything, 4, Which::Any).expect("marked");
    assert_eq!(map.claimed(&claim), kib(0, 128));
    assert_eq!(claim.lacking(), [kib(4, 8), kib(20, 24), kib(64, 68)]);
    map.release(claim);
    // Of marks that were found, everything is.
    let marks = View::in_memory(1);
    marks.set(0, 0b100);
    let found = DirtyBitmap::on(size, 16, marks, View::in_memory(1));
    let claim = found.take(everything, 4, Which::Any).expect("marked");
    assert_eq!((claim.lacking(), claim.lacking_len()), (&[kib(128, 192)][..], 64 << 10));
    found.release(claim);
}

#[test]
fn a_look_at_a_very_long_map_is_bounded_and_misses_no_part() {
    let size = (4 * CELL_WORDS_MAX * 64) << 9;
    let map = DirtyBitmap::new(size, 9);
    map.mark(ByteRange { start: size / 2, end: size });
    let cells = map.cells(8);
    assert_eq!(cells.iter().map(|cell| cell.chunks).sum::<u64>(), CELL_WORDS_MAX * 64, "a quarter of all words");
    assert!(cells[..4].iter().all(|cell| cell.chunks > 0 && cell.marked == 0), "{cells:?}");
    assert!(cells[4..].iter().all(|cell| cell.chunks > 0 && cell.marked == cell.chunks), "{cells:?}");
}

#[test]
fn a_disk_of_no_bytes_has_no_parts() {
    assert_eq!(DirtyBitmap::new(0, 16).cells(8), []);
}
