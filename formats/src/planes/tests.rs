use super::{COMPARE, HEADER_WORDS, Header, IN_ORDER, IN_ORDER_MARK, Left, SEAL, SEEN, TAKING, seal};
use crate::error::Kind;
use proptest::prelude::{any, prop};
use proptest::{prop_assert, prop_assert_eq, proptest};
use std::collections::BTreeSet;

fn header(size: u64, chunk_bits: u32, flights: u32) -> Header {
    Header { boot: [1, 2], job: 3, size, chunk_bits, flights, source: (4, 5), target: (6, 7), target_is_zero: true }
}

fn file(header: &Header) -> Vec<u64> {
    let mut words = vec![0; header.layout().words()];
    words[..16].copy_from_slice(&header.words());
    words
}

proptest! {
    /// Against a set of chunks: everything that is set anywhere is in the union, and nothing else.
    #[test]
    fn the_union_is_that_of_all_planes_and_flights(
        chunks in 1_u64..400,
        chunk_bits in 9_u32..14,
        cut in 0_u64..512,
        bits in prop::collection::vec((0_usize..4, any::<u64>()), 0..40),
        flights in prop::collection::vec((any::<u64>(), 1_u64..100_000), 0..4),
    ) {
        let header = header((chunks << chunk_bits) - cut, chunk_bits, 5);
        let mut words = file(&header);
        let layout = header.layout();
        let planes = [&layout.marks, &layout.claims, &layout.unsettled[0], &layout.unsettled[1]];
        let mut model = BTreeSet::new();
        for (plane, chunk) in bits {
            let chunk = chunk % chunks;
            words[planes[plane].start + (chunk / 64) as usize] |= 1 << (chunk % 64);
            model.insert(chunk);
        }
        for (place, (start, len)) in flights.iter().enumerate() {
            let start = start % header.size;
            let len = (*len).min(header.size - start);
            words[layout.flights.start + 2 * place] = start;
            words[layout.flights.start + 2 * place + 1] = len;
            model.extend(start >> chunk_bits..(start + len).div_ceil(1 << chunk_bits));
        }
        // Its write has not begun.
        words[layout.flights.end - 1] = TAKING;
        let left = Left::parse(&words).expect("as it is written");
        prop_assert_eq!(left.header, header);
        let dirty = left.dirty().expect("everything is inside the disk");
        let found: BTreeSet<u64> = (0..chunks).filter(|chunk| dirty[(chunk / 64) as usize] >> (chunk % 64) & 1 == 1).collect();
        prop_assert_eq!(&found, &model);
        prop_assert_eq!(dirty.iter().map(|word| word.count_ones() as usize).sum::<usize>(), model.len());
    }

    /// One bit of the header that is not as it was: refused, never read as something else.
    #[test]
    fn every_flipped_bit_of_the_header_is_noticed(bit in 0_usize..16 * 64) {
        let mut words = file(&header(1 << 30, 16, 8));
        words[bit / 64] ^= 1 << (bit % 64);
        let kind = Left::parse(&words).expect_err("refused").kind();
        let version = (64..96).contains(&bit);
        prop_assert_eq!(kind, if version { Kind::Unsupported } else { Kind::Malformed });
    }

    /// Whatever the words are: an error, or what fits the file.
    #[test]
    fn any_words_are_refused_or_fit(
        words in prop::collection::vec(any::<u64>(), 0..600),
        sealed in any::<bool>(),
    ) {
        let mut words = words;
        if sealed && words.len() >= 16 {
            let pick = header(words[5] % (1 << 20), 9 + (words[6] % 18) as u32, (words[7] % 32) as u32);
            words[..16].copy_from_slice(&pick.words());
        }
        if let Ok(left) = Left::parse(&words) {
            prop_assert!(sealed && left.header.layout().words() == words.len());
            prop_assert!(left.seen() <= left.header.size);
            if let Ok(dirty) = left.dirty() {
                prop_assert!(left.header.bytes(&dirty) <= left.header.size);
            }
        }
    }
}

#[test]
fn what_lies_behind_the_disk_is_no_answer() {
    let header = header(70 << 9, 9, 1);
    let mut words = file(&header);
    let layout = header.layout();
    words[layout.claims.end - 1] = 1 << 6;
    assert!(Left::parse(&words).expect("a header").dirty().is_err(), "chunk 70 of 70");
    words[layout.claims.end - 1] = 1 << 5;
    assert_eq!(Left::parse(&words).expect("a header").dirty().expect("chunk 69")[1], 1 << 5);
    (words[layout.flights.start], words[layout.flights.start + 1]) = (header.size - 1, 2);
    assert!(Left::parse(&words).expect("a header").dirty().is_err(), "a byte too many");
    words[layout.flights.start] = u64::MAX;
    assert!(Left::parse(&words).expect("a header").dirty().is_err(), "an end that does not fit");
}

#[test]
fn who_left_in_order_is_believed_as_long_as_nothing_changes() {
    let mut words = file(&header(1 << 20, 12, 2));
    assert!(!Left::parse(&words).expect("planes").is_in_order());
    words[SEEN] = 4096;
    words[IN_ORDER] = IN_ORDER_MARK;
    assert!(!Left::parse(&words).expect("planes").is_in_order(), "nobody sealed it");
    words[SEAL] = seal(&words);
    assert!(Left::parse(&words).expect("planes").is_in_order());
    for changed in [SEEN, COMPARE, HEADER_WORDS, words.len() - 1] {
        let mut words = words.clone();
        words[changed] ^= 1;
        assert!(!Left::parse(&words).expect("planes").is_in_order(), "word {changed}");
    }
}

#[test]
fn a_file_that_is_cut_or_grown_is_refused() {
    let mut words = file(&header(1 << 20, 12, 2));
    words.push(0);
    assert_eq!(Left::parse(&words).expect_err("grown").kind(), Kind::Malformed);
    words.truncate(words.len() - 2);
    assert_eq!(Left::parse(&words).expect_err("cut").kind(), Kind::Malformed);
    assert_eq!(Left::parse(&[]).expect_err("empty").kind(), Kind::Malformed);
}
