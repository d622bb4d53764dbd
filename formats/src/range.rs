//! A span of bytes, half open.
use std::fmt;

/// Bytes `start..end` of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// The `len` bytes from `start`; `None` where the end does not fit in 63 bits.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len).filter(|end| *end <= i64::MAX as u64)?;
        Some(Self { start, end })
    }

    /// How many bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// True where there are none.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// What both have; empty where they do not meet.
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// True where they share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The first `len` bytes, or all where there are fewer.
    pub fn prefix(self, len: u64) -> Self {
        Self { start: self.start, end: self.end.min(self.start.saturating_add(len)) }
    }

    /// Grown on both sides to multiples of `align`, a power of two.
    pub fn align_outward(self, align: u64) -> Self {
        debug_assert!(align.is_power_of_two());
        Self { start: self.start & !(align - 1), end: self.end.next_multiple_of(align) }
    }

    /// Shrunk on both sides to multiples of `align`, a power of two; may be empty.
    pub fn align_inward(self, align: u64) -> Self {
        debug_assert!(align.is_power_of_two());
        let start = self.start.next_multiple_of(align);
        Self { start, end: (self.end & !(align - 1)).max(start) }
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.len(), self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::ByteRange;

    #[test]
    fn ends_past_63_bits_are_refused() {
        assert!(ByteRange::new(i64::MAX as u64, 0).is_some());
        assert!(ByteRange::new(i64::MAX as u64, 1).is_none());
        assert!(ByteRange::new(u64::MAX, 1).is_none());
    }

    #[test]
    fn alignment_grows_and_shrinks() {
        let range = ByteRange { start: 5, end: 19 };
        assert_eq!(range.align_outward(8), ByteRange { start: 0, end: 24 });
        assert_eq!(range.align_inward(8), ByteRange { start: 8, end: 16 });
        assert!(ByteRange { start: 5, end: 7 }.align_inward(8).is_empty());
    }
}
