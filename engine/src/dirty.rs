//! Which chunks the target lacks (marks), and which are being worked on (claims).
//!
//! Order is everything here:
//!
//! 1. A guest write marks its chunks after the source has it and before the guest hears of it, also
//!    when it failed. Marked before the write, a copier can take the mark and read the old bytes.
//! 2. A copier claims a chunk, then clears its mark, then looks where it lives and reads it. Cleared
//!    after the copy, the mark of a write that came meanwhile is lost.
//! 3. A chunk has one claim at a time. With two, the older copy can land last.
//! 4. A write to both sides claims the range around both writes. Around the target's alone, two
//!    guests can reach the two disks in opposite orders.
//! 5. An error marks again before the claim is released. The other way round, the map is clean for
//!    a moment in which the target lacks something.
//!
//! Of a marked chunk the target lacks some parts (`parts`, with an order of its own), and a copier copies those.
//!
//! A chunk is one bit in a word of marks and one in a word of claims; a bit of the summary says that
//! a word of marks may have some, so that a scan of a nearly clean map is short. A third bit says that it
//! was ever marked: nothing depends on it but what people are shown. Marks and claims may lie in memory that outlives
//! the process (`planes`); by the orders above, at each instant a chunk that the target lacks is in one of the two.
mod parts;

use crate::fault::{Fault, planted};
use crate::io::View;
use crate::sync::{AtomicU64, Ordering};
use formats::range::ByteRange;
use parts::Parts;

/// Consecutive chunks `first..end`, claimed by whoever holds this.
#[must_use = "a claim that is forgotten is never released"]
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    first: u64,
    end: u64,
    /// What the target lacks of them, where their marks were taken.
    lacking: Vec<ByteRange>,
}

impl Claim {
    fn of(first: u64, end: u64) -> Self {
        Self { first, end, lacking: Vec::new() }
    }

    /// What the target lacks of it, in order; nothing where it was claimed without its marks.
    pub fn lacking(&self) -> &[ByteRange] {
        &self.lacking
    }

    /// The same, where all of `range` is to be brought at once.
    pub fn lacking_all(self, range: ByteRange) -> Self {
        Self { lacking: vec![range], ..self }
    }

    /// How many bytes that is.
    pub fn lacking_len(&self) -> u64 {
        self.lacking.iter().map(|range| range.len()).sum()
    }
}

/// Which marked chunks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All.
    Any,
    /// Those that the guest leaves alone: what it writes to is likely to be written to again.
    Cold,
}

/// How many words one look for a run takes: 4 GiB of the disk with the usual chunks.
const RUN_WORDS_MAX: usize = 1 << 10;

/// How many words of each kind one look at the whole map takes: 1 TiB of the disk with the usual chunks.
const CELL_WORDS_MAX: u64 = 1 << 18;

/// How the chunks of one part of a disk stand, as far as they were looked at. Those that are nothing of this were
/// never marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// How many were looked at.
    pub chunks: u64,
    /// Claimed: being worked on.
    pub claimed: u64,
    /// Marked, and not claimed.
    pub marked: u64,
    /// Marked once, and neither marked nor claimed now.
    pub copied: u64,
}

/// One mark and one claim for each chunk of a disk.
pub struct DirtyBitmap {
    size: u64,
    chunk_bits: u32,
    marks: View,
    claims: View,
    summary: View,
    parts: Parts,
    marked: AtomicU64,
    /// What was ever marked.
    touched: View,
    /// What the guest has written since it was taken last, as far as `heat` was told: order of copying alone.
    hot: View,
}

impl DirtyBitmap {
    /// A clean one for `size` bytes in chunks of 2^`chunk_bits` bytes.
    ///
    /// Takes four bits a chunk and a 64th of one, and up to 16 more for its parts where it was marked.
    pub fn new(size: u64, chunk_bits: u32) -> Self {
        assert!((9..=26).contains(&chunk_bits), "chunks of 512 bytes to 64 MiB");
        let words = size.div_ceil(1 << chunk_bits).div_ceil(64) as usize;
        Self::on(size, chunk_bits, View::in_memory(words), View::in_memory(words))
    }

    /// One whose marks are there already, and whose claims nobody has.
    pub fn on(size: u64, chunk_bits: u32, marks: View, claims: View) -> Self {
        let [summary, touched, hot] = [marks.count().div_ceil(64), marks.count(), marks.count()].map(View::in_memory);
        let parts = Parts::new(size.div_ceil(1 << chunk_bits), chunk_bits);
        let map = Self { size, chunk_bits, marks, claims, summary, parts, marked: AtomicU64::new(0), touched, hot };
        (0..map.marks.count()).for_each(|word| map.find(word));
        map
    }

    /// Counts the marks of a word that are there already: of those the target may lack every part.
    fn find(&self, word: usize) {
        let mut bits = self.marks.load(word);
        if bits == 0 {
            return;
        }
        self.marked.fetch_add(bits.count_ones().into(), Ordering::AcqRel);
        self.summary.set(word / 64, 1 << (word % 64));
        self.touched.set(word, bits);
        while bits != 0 && !planted(Fault::MarksWithoutParts) {
            let chunk = word as u64 * 64 + u64::from(bits.trailing_zeros());
            self.parts.note(self.bytes(chunk, chunk + 1));
            bits &= bits - 1;
        }
    }

    /// Bytes of memory that it takes where everything was marked; where little was, the parts take less.
    pub fn memory(&self) -> u64 {
        let views = [&self.marks, &self.claims, &self.summary, &self.touched, &self.hot];
        views.into_iter().chain([self.parts.view()]).map(|view| view.count() as u64 * 8).sum()
    }

    /// Bytes a chunk.
    pub fn chunk_len(&self) -> u64 {
        1 << self.chunk_bits
    }

    /// Marks every chunk that `range` touches, for the parts of it that it touches. Returns how many bytes are in those
    /// that were not marked; a last part that is cut counts whole.
    pub fn mark(&self, range: ByteRange) -> u64 {
        let (first, end) = self.chunks(range);
        let bytes = self.parts.note(range);
        for (word, bits) in words(first, end) {
            let before = self.marks.set(word, bits);
            let new = (bits & !before).count_ones();
            if new > 0 {
                self.marked.fetch_add(u64::from(new), Ordering::AcqRel);
                // After the mark: who clears the summary's bit looks at the marks again.
                self.summary.set(word / 64, 1 << (word % 64));
                self.touched.set(word, bits);
            }
        }
        bytes
    }

    /// The guest writes to `range`: its chunks are not `Cold` any more.
    pub fn heat(&self, range: ByteRange) {
        let (first, end) = self.chunks(range);
        words(first, end).for_each(|(word, bits)| _ = self.hot.set(word, bits));
    }

    /// The next run of marked and unclaimed chunks that begins in `within`, of `chunks_max` at most:
    /// claimed, its marks cleared, and its parts taken.
    pub fn take(&self, within: ByteRange, chunks_max: u64, which: Which) -> Option<Claim> {
        let (from, last) = self.chunks(within);
        let mut from = from;
        loop {
            let first = self.next_marked(from, last, which)?;
            let mut claim = Claim::of(first, first);
            while claim.end - first < chunks_max && claim.end < self.chunk_count() && self.try_take(claim.end, which) {
                self.parts.take(claim.end, &mut claim.lacking);
                claim.end += 1;
            }
            if claim.end > first {
                // The disk may end within a part.
                claim.lacking.iter_mut().for_each(|range| range.end = range.end.min(self.size));
                return Some(claim);
            }
            from = first + 1;
        }
    }

    /// Claims the chunks that `range` touches, marked or not; `None` where one is claimed already.
    pub fn claim(&self, range: ByteRange) -> Option<Claim> {
        let (first, end) = self.chunks(range);
        for (word, bits) in words(first, end) {
            let before = self.claims.set(word, bits);
            if before & bits != 0 {
                self.claims.clear(word, bits & !before);
                self.release(Claim::of(first, first.max(word as u64 * 64)));
                return None;
            }
        }
        Some(Claim::of(first, end))
    }

    /// Claims chunks from the start of `range` on, marked or not, up to one that is claimed already; `None` where the first
    /// one is.
    pub fn claim_some(&self, range: ByteRange) -> Option<Claim> {
        let (first, last) = self.chunks(range);
        let claim = |chunk: &u64| {
            let bit = 1 << (chunk % 64);
            self.claims.set((chunk / 64) as usize, bit) & bit == 0
        };
        let end = first + (first..last).take_while(claim).count() as u64;
        (end > first).then_some(Claim::of(first, end))
    }

    /// Ends a claim.
    pub fn release(&self, claim: Claim) {
        for (word, bits) in words(claim.first, claim.end) {
            let before = self.claims.clear(word, bits);
            assert!(before & bits == bits, "a claim that was held");
        }
    }

    /// True where a chunk that `range` touches is marked.
    pub fn is_marked(&self, range: ByteRange) -> bool {
        let (first, end) = self.chunks(range);
        words(first, end).any(|(word, bits)| self.marks.load(word) & bits != 0)
    }

    /// The longest run from `range.start` on, inside `range`, of chunks that are all marked or all not, as
    /// far as one look at `RUN_WORDS_MAX` words tells.
    pub fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        let (first, end) = self.chunks(range);
        let marked = self.is_marked(self.bytes(first, first + 1));
        let mut chunk = first;
        for (word, bits) in words(first, end).take(RUN_WORDS_MAX) {
            let marks = self.marks.load(word);
            let other = if marked { !marks & bits } else { marks & bits };
            if other != 0 {
                chunk = word as u64 * 64 + u64::from(other.trailing_zeros());
                break;
            }
            chunk = ((word as u64 + 1) * 64).min(end);
        }
        // The first chunk may have changed since it was looked at.
        (self.bytes(first, chunk.max(first + 1)).intersect(range), marked)
    }

    /// Splits `range` at chunk borders into runs of chunks that are all marked, or all not.
    pub fn runs(&self, range: ByteRange) -> Vec<(ByteRange, bool)> {
        let (first, end) = self.chunks(range);
        let mut runs: Vec<(ByteRange, bool)> = Vec::with_capacity(1);
        for chunk in first..end {
            let bytes = self.bytes(chunk, chunk + 1).intersect(range);
            let marked = self.is_marked(bytes);
            match runs.last_mut() {
                Some((run, same)) if *same == marked => run.end = bytes.end,
                _ => runs.push((bytes, marked)),
            }
        }
        runs
    }

    /// The bytes of a claim, cut to the disk.
    pub fn claimed(&self, claim: &Claim) -> ByteRange {
        self.bytes(claim.first, claim.end)
    }

    /// How many bytes are in parts that the target lacks, of marked chunks; a last part that is cut counts whole.
    pub fn marked_bytes(&self) -> u64 {
        self.parts.bytes().min(self.size)
    }

    /// The disk in `count` parts of as many chunks each, or in one for each chunk where those are fewer.
    ///
    /// A look, not a count: chunks change meanwhile, and of a map that is longer than `CELL_WORDS_MAX` only every
    /// so many words are looked at.
    pub fn cells(&self, count: u64) -> Vec<Cell> {
        let chunks = self.chunk_count();
        let count = count.min(chunks);
        let stride = chunks.div_ceil(64).div_ceil(CELL_WORDS_MAX).max(1) as usize;
        let border = |cell: u64| (u128::from(chunks) * u128::from(cell) / u128::from(count)) as u64;
        let part = |cell| words(border(cell), border(cell + 1)).step_by(stride);
        (0..count)
            .map(|cell| part(cell).fold(Cell::default(), |sum, (word, bits)| self.look(sum, word, bits)))
            .collect()
    }

    /// `cell`, and what the chunks `bits` of one word add to it.
    fn look(&self, cell: Cell, word: usize, bits: u64) -> Cell {
        let [marks, claims, touched] = [&self.marks, &self.claims, &self.touched].map(|view| view.load(word) & bits);
        let count = |bits: u64| u64::from(bits.count_ones());
        Cell {
            chunks: cell.chunks + count(bits),
            claimed: cell.claimed + count(claims),
            marked: cell.marked + count(marks & !claims),
            copied: cell.copied + count(touched & !marks & !claims),
        }
    }

    /// True where no chunk is marked. Says nothing of claims.
    pub fn is_clean(&self) -> bool {
        self.marked.load(Ordering::Acquire) == 0
    }

    /// The first marked chunk in `from..last`.
    fn next_marked(&self, from: u64, last: u64, which: Which) -> Option<u64> {
        let mut chunk = from;
        while chunk < last {
            let word = (chunk / 64) as usize;
            let marks = self.marks.load(word);
            let bits = (marks & !self.spared(word, which)) >> (chunk % 64);
            if bits != 0 {
                return Some(chunk + u64::from(bits.trailing_zeros())).filter(|found| *found < last);
            }
            if marks == 0 && chunk.is_multiple_of(64) {
                self.note_empty(word);
            }
            chunk = self.next_word(word + 1)? * 64;
        }
        None
    }

    /// The first word from `word` on whose bit of the summary is set.
    fn next_word(&self, word: usize) -> Option<u64> {
        let mut at = word;
        while at / 64 < self.summary.count() {
            let bits = self.summary.load(at / 64) >> (at % 64);
            if bits != 0 {
                return Some(at as u64 + u64::from(bits.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The word was seen without marks: its bit of the summary goes, unless a mark came meanwhile.
    fn note_empty(&self, word: usize) {
        let bit = 1 << (word % 64);
        if self.summary.load(word / 64) & bit != 0 {
            self.summary.clear(word / 64, bit);
            if self.marks.load(word) != 0 {
                self.summary.set(word / 64, bit);
            }
        }
    }

    /// The chunks of a word that are left alone.
    fn spared(&self, word: usize, which: Which) -> u64 {
        match which {
            Which::Any => 0,
            Which::Cold => self.hot.load(word),
        }
    }

    fn try_take(&self, chunk: u64, which: Which) -> bool {
        let (word, bit) = ((chunk / 64) as usize, 1 << (chunk % 64));
        if self.marks.load(word) & !self.spared(word, which) & bit == 0 {
            return false;
        }
        if self.claims.set(word, bit) & bit != 0 {
            return false;
        }
        if self.marks.clear(word, bit) & bit == 0 {
            // Somebody else took it and is done with it already.
            self.release(Claim::of(chunk, chunk + 1));
            return false;
        }
        self.marked.fetch_sub(1, Ordering::AcqRel);
        if self.hot.load(word) & bit != 0 {
            self.hot.clear(word, bit);
        }
        true
    }

    fn chunk_count(&self) -> u64 {
        self.size.div_ceil(self.chunk_len())
    }

    fn chunks(&self, range: ByteRange) -> (u64, u64) {
        debug_assert!(range.end <= self.size, "{range} of a disk of {} bytes", self.size);
        (range.start >> self.chunk_bits, range.end.div_ceil(self.chunk_len()))
    }

    fn bytes(&self, first: u64, end: u64) -> ByteRange {
        ByteRange { start: first << self.chunk_bits, end: (end << self.chunk_bits).min(self.size) }
    }
}

/// The words that chunks `first..end` are in, each with their bits.
pub fn words(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut chunk = first;
    std::iter::from_fn(move || {
        if chunk >= end {
            return None;
        }
        let (word, low) = (chunk / 64, chunk % 64);
        let high = (end - word * 64).min(64);
        chunk = (word + 1) * 64;
        Some((word as usize, (u64::MAX >> (64 - (high - low))) << low))
    })
}

#[cfg(test)]
mod tests;
