//! The bits of one bitmap in memory, in the order in which the file has them.
use crate::range::ByteRange;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for each piece of a disk. Set from several threads at once.
#[derive(Debug)]
pub struct Bits {
    /// Bytes of the disk.
    size: u64,
    granularity_bits: u32,
    words: Vec<AtomicU64>,
}

impl Bits {
    /// None is set.
    pub fn new(size: u64, granularity_bits: u32) -> Self {
        let words = Self::len_bytes(size, granularity_bits).div_ceil(8);
        Self { size, granularity_bits, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Bytes that the bits of a disk of `size` bytes take in the file.
    pub fn len_bytes(size: u64, granularity_bits: u32) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    /// Bits of their own that are the same.
    pub fn copy(&self) -> Self {
        let words = self.words.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed)));
        Self { size: self.size, granularity_bits: self.granularity_bits, words: words.collect() }
    }

    /// The same bits of a disk that is larger: none of what is new is set, whatever was behind the last of them.
    pub fn grown(&self, size: u64) -> Self {
        let (new, pieces) = (Self::new(size, self.granularity_bits), self.size.div_ceil(1 << self.granularity_bits));
        for (nth, (word, old)) in (0..).zip(new.words.iter().zip(&self.words)) {
            let kept = match pieces.saturating_sub(nth * 64) {
                0 => 0,
                left => u64::MAX >> (64 - left.min(64)),
            };
            word.store(old.load(Ordering::Relaxed) & kept, Ordering::Relaxed);
        }
        new
    }

    /// Sets the bits of all pieces that `range` touches. What is behind the disk's end has none.
    pub fn set(&self, range: ByteRange) {
        let range = ByteRange { end: range.end.min(self.size), ..range };
        if range.end <= range.start {
            return;
        }
        let (first, last) = (range.start >> self.granularity_bits, (range.end - 1) >> self.granularity_bits);
        for word in first / 64..=last / 64 {
            let from = first.saturating_sub(word * 64);
            let to = (last - word * 64).min(63);
            let mask = u64::MAX >> (63 - to) & u64::MAX << from;
            let here = &self.words[word as usize];
            // Most writes are where others were: a look is cheaper than a change.
            if here.load(Ordering::Relaxed) & mask != mask {
                here.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// The pieces from `range.start` on that are alike, cut to `range`, which is not empty, and whether they
    /// are set. Nothing is past the disk's end.
    pub fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        let (first, last) = (range.start >> self.granularity_bits, (range.end - 1) >> self.granularity_bits);
        // Loaded once: it may change meanwhile, and the run is one piece at least.
        let here = self.word(first / 64);
        let set = here >> (first % 64) & 1 == 1;
        let alike = if set { u64::MAX } else { 0 };
        let mut other = (here ^ alike) & u64::MAX << (first % 64);
        let mut word = first / 64;
        while other == 0 && word < last / 64 {
            word += 1;
            other = self.word(word) ^ alike;
        }
        let end = if other == 0 { last + 1 } else { word * 64 + u64::from(other.trailing_zeros()) };
        (ByteRange { start: range.start, end: range.end.min(end.min(last + 1) << self.granularity_bits) }, set)
    }

    fn word(&self, number: u64) -> u64 {
        self.words.get(number as usize).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Sets what is set in `bytes`, which are the file's from `at` on; `at` is a multiple of 8.
    pub fn add_bytes(&self, at: u64, bytes: &[u8]) {
        for (word, piece) in self.words[(at / 8) as usize..].iter().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..piece.len()].copy_from_slice(piece);
            word.fetch_or(u64::from_le_bytes(padded), Ordering::Relaxed);
        }
    }

    /// The file's bytes from `at` on, a multiple of 8; zeroes past the end. True where any bit is set.
    pub fn to_bytes(&self, at: u64, bytes: &mut [u8]) -> bool {
        let words = self.words.get((at / 8) as usize..).unwrap_or_default().iter();
        let words = words.map(|word| word.load(Ordering::Relaxed)).chain(std::iter::repeat(0));
        let mut any = false;
        for (piece, word) in bytes.chunks_mut(8).zip(words) {
            piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
            any |= word != 0;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;
    use crate::range::ByteRange;

    #[test]
    fn every_piece_that_is_touched_is_set() {
        let size = 300 * 512 + 1;
        for start in [0, 1, 511, 512, 63 * 512, 64 * 512 + 5, 200 * 512, 300 * 512] {
            for len in [1, 512, 513, 64 * 512, 128 * 512 + 1] {
                let range = ByteRange { start, end: (start + len).min(size) };
                let bits = Bits::new(size, 9);
                bits.set(range);
                let mut bytes = [0; 48];
                bits.to_bytes(0, &mut bytes);
                for piece in 0..384_u64 {
                    let expected = piece * 512 < range.end && range.start < (piece + 1) * 512;
                    let found = bytes[piece as usize / 8] >> (piece % 8) & 1 == 1;
                    assert_eq!(found, expected, "piece {piece} of {range}");
                }
            }
        }
    }

    #[test]
    fn a_run_is_as_long_as_what_is_alike() {
        let size = 300 * 512 + 1;
        for (first, last) in [(0, 0), (1, 62), (63, 64), (5, 200), (128, 191), (299, 300), (300, 300), (0, 300)] {
            let bits = Bits::new(size, 9);
            bits.set(ByteRange { start: first * 512, end: (last * 512 + 1).min(size) });
            for start in [0, 1, 512, 63 * 512 + 7, 64 * 512, 199 * 512, 300 * 512] {
                for end in [start + 1, start + 700, 128 * 512, 192 * 512 + 3, size] {
                    let range = ByteRange { start, end: end.min(size) };
                    if range.is_empty() || range.end <= range.start {
                        continue;
                    }
                    let is_set = |byte: u64| (first..=last).contains(&(byte / 512));
                    let same = (range.start..range.end).take_while(|byte| is_set(*byte) == is_set(start)).count();
                    let run = ByteRange { start, end: start + same as u64 };
                    assert_eq!(bits.run(range), (run, is_set(start)), "{range}, set from {first} to {last}");
                }
            }
        }
    }

    #[test]
    fn what_is_new_of_a_disk_is_not_set() {
        for (size, granularity_bits) in [(1, 9), (512, 9), (63 * 512 + 1, 9), (64 * 512, 9), (300 * 512 + 7, 10)] {
            let bits = Bits::new(size, granularity_bits);
            let bytes = Bits::len_bytes(size, granularity_bits) as usize;
            // As a table has it whose entry says that all are set.
            bits.add_bytes(0, &vec![0xff; bytes]);
            let grown = bits.grown(5000 * 512);
            bits.set(ByteRange { start: size, end: 5000 * 512 });
            let end = size.next_multiple_of(1 << granularity_bits);
            let all = ByteRange { start: 0, end: 5000 * 512 };
            assert_eq!(grown.run(all), (ByteRange { end, ..all }, true), "{size}");
            assert_eq!(grown.run(ByteRange { start: end, ..all }), (ByteRange { start: end, ..all }, false), "{size}");
        }
    }

    #[test]
    fn bytes_come_back() {
        let bits = Bits::new(100 * 512, 9);
        assert_eq!(Bits::len_bytes(100 * 512, 9), 13);
        bits.add_bytes(0, &[1, 2, 3]);
        bits.add_bytes(8, &[0, 0, 0x80]);
        let mut bytes = [0xff; 24];
        assert!(bits.to_bytes(0, &mut bytes));
        assert_eq!(bytes[..12], [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0x80, 0]);
        assert!(!bits.to_bytes(16, &mut bytes), "past the end");
    }
}
