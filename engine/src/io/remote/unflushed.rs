//! What was written to an export and is not known to be durable.
//!
//! A server that crashed and came back may have lost what it answered and had not flushed, and nothing in the
//! protocol tells it from one that was only out of reach. What does tell is a connection: it does not outlive
//! its server. So a flush counts for what was written since its own connection was made. What others wrote
//! before is *doubtful*, also where the flush succeeds: a mirror copies it once more, as if the guest had
//! just written it.
//!
//! ```text
//! written ─► begin_flush ─► (the server) ─► end_flush ─► durable, or doubtful, or, where it failed, written
//! ```
//!
//! Order is everything here: a write is noted before its owner hears of it, and a flush takes what is noted
//! before it is sent. Noted later, a flush that was begun before the write's answer would be taken for its proof.
use formats::range::ByteRange;

/// Marks of one disk at most: 128 KiB of them.
const MARKS_MAX: u64 = 1 << 20;
/// Bytes a mark where the disk is small.
const GRANULE_MIN: u64 = 1 << 20;

/// Places of a disk, a bit each.
#[derive(Debug, Default)]
pub(super) struct Marks {
    bits: Vec<u64>,
    /// The clock at the first of them.
    first: Option<u64>,
}

impl Marks {
    fn add(&mut self, other: &Self) {
        self.bits.resize(self.bits.len().max(other.bits.len()), 0);
        self.bits.iter_mut().zip(&other.bits).for_each(|(mine, theirs)| *mine |= theirs);
        self.first = self.first.into_iter().chain(other.first).min();
    }
}

/// What is not known to be durable of one disk.
#[derive(Debug)]
pub(super) struct Unflushed {
    size: u64,
    granule: u64,
    written: Marks,
    doubtful: Marks,
}

impl Unflushed {
    /// Nothing was written yet to a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        let granule = size.div_ceil(MARKS_MAX).next_power_of_two().max(GRANULE_MIN);
        Self { size, granule, written: Marks::default(), doubtful: Marks::default() }
    }

    /// `range` was written at `clock`.
    pub fn written(&mut self, range: ByteRange, clock: u64) {
        if range.is_empty() {
            return;
        }
        for number in range.start / self.granule..range.end.div_ceil(self.granule) {
            let word = (number / 64) as usize;
            if word >= self.written.bits.len() {
                self.written.bits.resize(word + 1, 0);
            }
            self.written.bits[word] |= 1 << (number % 64);
        }
        self.written.first.get_or_insert(clock);
    }

    /// What a flush that is sent now is to make durable.
    pub fn begin_flush(&mut self) -> Marks {
        std::mem::take(&mut self.written)
    }

    /// The flush of these succeeded on a connection that was made at this time; or it failed.
    pub fn end_flush(&mut self, marks: Marks, established: Option<u64>) {
        match (established, marks.first) {
            (_, None) => {}
            (Some(established), Some(first)) if established < first => {}
            (Some(_), Some(_)) => self.doubtful.add(&marks),
            (None, Some(_)) => self.written.add(&marks),
        }
    }

    /// What a server may have lost since this was asked last.
    pub fn take_doubtful(&mut self) -> Vec<ByteRange> {
        let marks = std::mem::take(&mut self.doubtful);
        let mut ranges: Vec<ByteRange> = Vec::new();
        let set = |number: &u64| marks.bits[(number / 64) as usize] >> (number % 64) & 1 == 1;
        for number in (0..marks.bits.len() as u64 * 64).filter(set) {
            let (start, end) = (number * self.granule, ((number + 1) * self.granule).min(self.size));
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(ByteRange { start, end }),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteRange, GRANULE_MIN, Unflushed};

    const SIZE: u64 = 10 * GRANULE_MIN + 5;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    #[test]
    fn a_flush_counts_for_what_its_connection_has_seen() {
        let mut unflushed = Unflushed::new(SIZE);
        unflushed.written(range(5, 6), 3);
        let marks = unflushed.begin_flush();
        // Answered after the flush was sent: the next one's.
        unflushed.written(range(SIZE - 1, SIZE), 4);
        unflushed.end_flush(marks, Some(2));
        assert_eq!(unflushed.take_doubtful(), []);
        let marks = unflushed.begin_flush();
        unflushed.end_flush(marks, Some(5));
        assert_eq!(unflushed.take_doubtful(), [range(10 * GRANULE_MIN, SIZE)]);
        assert_eq!(unflushed.take_doubtful(), []);
    }

    #[test]
    fn a_flush_that_failed_has_flushed_nothing() {
        let mut unflushed = Unflushed::new(SIZE);
        unflushed.written(range(GRANULE_MIN - 1, GRANULE_MIN + 1), 3);
        let marks = unflushed.begin_flush();
        unflushed.written(range(7 * GRANULE_MIN, 7 * GRANULE_MIN + 1), 6);
        unflushed.end_flush(marks, None);
        let marks = unflushed.begin_flush();
        unflushed.end_flush(marks, Some(5));
        let all = [range(0, 2 * GRANULE_MIN), range(7 * GRANULE_MIN, 8 * GRANULE_MIN)];
        assert_eq!(unflushed.take_doubtful(), all);
    }

    #[test]
    fn a_disk_of_any_size_has_few_marks() {
        let mut unflushed = Unflushed::new(1 << 62);
        unflushed.written(range((1 << 62) - 1, 1 << 62), 1);
        assert!(unflushed.begin_flush().bits.len() <= 1 << 14);
    }
}
