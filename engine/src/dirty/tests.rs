//! The bitmap against a slow, obvious model.
use super::{CELL_WORDS_MAX, Cell, DirtyBitmap};
use formats::range::ByteRange;
use proptest::prelude::*;
use std::collections::BTreeSet;

const CHUNK_BITS: u32 = 12;
const CHUNKS: u64 = 64 * 70;
const SIZE: u64 = (CHUNKS << CHUNK_BITS) - 100;

#[derive(Clone, Debug)]
enum Step {
    Mark(ByteRange),
    Take(ByteRange, u64),
    Claim(ByteRange),
    Release(usize),
}

fn range() -> impl Strategy<Value = ByteRange> {
    (0..SIZE, 1..600_000u64).prop_map(|(start, len)| ByteRange { start, end: (start + len).min(SIZE) })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        range().prop_map(Step::Mark),
        (range(), 1..40u64).prop_map(|(within, max)| Step::Take(within, max)),
        (0..SIZE).prop_map(|start| Step::Take(ByteRange { start, end: SIZE }, 16)),
        range().prop_map(Step::Claim),
        any::<usize>().prop_map(Step::Release),
    ]
}

fn chunks(range: ByteRange) -> std::ops::Range<u64> {
    range.start >> CHUNK_BITS..range.end.div_ceil(1 << CHUNK_BITS)
}

proptest! {
    #[test]
    fn it_does_what_sets_do(steps in proptest::collection::vec(step(), 1..200)) {
        let map = DirtyBitmap::new(SIZE, CHUNK_BITS);
        let [mut marks, mut claims, mut touched] = [const { BTreeSet::<u64>::new() }; 3];
        let mut held = Vec::new();
        for step in steps {
            match step {
                Step::Mark(range) => {
                    let before = marks.len();
                    let new = map.mark(range);
                    marks.extend(chunks(range));
                    prop_assert_eq!(new, ((marks.len() - before) as u64) << CHUNK_BITS);
                }
                Step::Take(within, max) => {
                    let free = |chunk: &u64| marks.contains(chunk) && !claims.contains(chunk);
                    let first = chunks(within).find(free);
                    let expected: Option<Vec<u64>> =
                        first.map(|first| (first..CHUNKS).take(max as usize).take_while(free).collect());
                    let claim = map.take(within, max);
                    let taken: Option<Vec<u64>> = claim.as_ref().map(|claim| (claim.first..claim.end).collect());
                    prop_assert_eq!(&taken, &expected);
                    for chunk in taken.into_iter().flatten() {
                        marks.remove(&chunk);
                        claims.insert(chunk);
                    }
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
            prop_assert_eq!(map.marked_bytes(), ((marks.len() as u64) << CHUNK_BITS).min(SIZE));
            prop_assert_eq!(map.is_clean(), marks.is_empty());
            touched.extend(&marks);
        }
        for count in [1, 3, 7, 64, CHUNKS - 1, CHUNKS + 1] {
            let cells = map.cells(count);
            let count = count.min(CHUNKS);
            prop_assert_eq!(cells.len() as u64, count);
            for (number, cell) in cells.iter().enumerate() {
                let border = |cell: u64| CHUNKS * cell / count;
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
    assert!(map.take(everything, 16).is_none());
    map.mark(ByteRange { start: size - 1, end: size });
    let claim = map.take(everything, 16).expect("the last chunk");
    assert_eq!(map.claimed(&claim), ByteRange { start: size - (1 << 16), end: size });
    map.release(claim);
    assert!(map.take(everything, 16).is_none());
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
