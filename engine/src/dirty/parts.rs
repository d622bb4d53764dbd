//! Which parts of marked chunks the target lacks, so that a guest's write of 4 KiB costs no more than that again.
//!
//! A chunk has up to 16 parts of 4 KiB or more, each with a bit, which counts only while the chunk is marked. They are in
//! the process's memory alone: whoever goes on after a kill knows chunks, and copies those whole. Order:
//!
//! 1. A part is noted before its chunk is marked, and
//! 2. taken after the chunk's mark was cleared.
//!
//! Either the other way round, the parts of a write that came meanwhile could be taken with the old mark, or left behind
//! it. In this one, a mark may be left without parts: whoever took them read the source after the write.
use crate::io::View;
use crate::sync::{AtomicU64, Ordering};
use formats::range::ByteRange;

/// How many parts a chunk has at most, as a power of two.
const PARTS_BITS: u32 = 4;
/// A part has 2 to this bytes at least, where its chunk has so many: what any disk takes without reading around it.
const PART_BITS_MIN: u32 = 12;
/// Bytes that are copied although the target has them, where that saves an operation.
const GAP_MAX: u64 = 8 << 10;

/// One bit for each part of a disk.
pub(super) struct Parts {
    bits: View,
    chunk_bits: u32,
    part_bits: u32,
    noted: AtomicU64,
}

impl Parts {
    /// Those of a disk of `chunks` chunks of 2^`chunk_bits` bytes; none is noted.
    pub fn new(chunks: u64, chunk_bits: u32) -> Self {
        let part_bits = chunk_bits.saturating_sub(PARTS_BITS).max(PART_BITS_MIN.min(chunk_bits));
        let words = (chunks << (chunk_bits - part_bits)).div_ceil(64) as usize;
        Self { bits: View::in_memory(words), chunk_bits, part_bits, noted: AtomicU64::new(0) }
    }

    /// Where they are.
    pub fn view(&self) -> &View {
        &self.bits
    }

    /// Notes the parts that `range` touches: before their chunks are marked. Returns how many bytes are in those that were
    /// not noted; a last part that is cut counts whole.
    pub fn note(&self, range: ByteRange) -> u64 {
        let (first, end) = (range.start >> self.part_bits, range.end.div_ceil(1 << self.part_bits));
        let mut parts = 0;
        for (word, bits) in super::words(first, end) {
            parts += u64::from((bits & !self.bits.set(word, bits)).count_ones());
        }
        self.noted.fetch_add(parts, Ordering::AcqRel);
        parts << self.part_bits
    }

    /// Takes the parts of a chunk whose mark was cleared just now, and adds them to `lacking`, whose ranges are of chunks
    /// that the same claim holds.
    pub fn take(&self, chunk: u64, lacking: &mut Vec<ByteRange>) {
        let count_bits = self.chunk_bits - self.part_bits;
        let first = chunk << count_bits;
        let (word, low) = ((first / 64) as usize, first % 64);
        let field = u64::MAX >> (64 - (1 << count_bits)) << low;
        let mut taken = self.bits.clear(word, field) & field;
        self.noted.fetch_sub(taken.count_ones().into(), Ordering::AcqRel);
        while taken != 0 {
            let start = taken.trailing_zeros();
            let count = (taken >> start).trailing_ones();
            let at = (word as u64 * 64 + u64::from(start)) << self.part_bits;
            add(lacking, ByteRange { start: at, end: at + (u64::from(count) << self.part_bits) });
            taken &= u64::MAX.checked_shl(start + count).unwrap_or(0);
        }
    }

    /// How many bytes are in parts that are noted.
    pub fn bytes(&self) -> u64 {
        // A taker may subtract a part before who noted it has added it: below zero for a moment.
        self.noted.load(Ordering::Acquire).cast_signed().max(0).cast_unsigned() << self.part_bits
    }
}

/// As a range of its own, unless the last one ends so near that one operation is better than two.
fn add(lacking: &mut Vec<ByteRange>, range: ByteRange) {
    match lacking.last_mut() {
        Some(last) if range.start - last.end <= GAP_MAX => last.end = range.end,
        _ => lacking.push(range),
    }
}
