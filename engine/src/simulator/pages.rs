//! The bytes of a simulated file, in pages that copies of it share until one of them is written.
//!
//! A flush keeps the file as it was when it was asked for, and there are many of them.
use std::ops::Range;
use std::sync::Arc;

const PAGE: usize = 4096;

type Page = Arc<[u8; PAGE]>;

/// Bytes that were ever written; a clone copies none of them.
#[derive(Clone, Default)]
pub struct Pages {
    pages: Vec<Page>,
    len: usize,
}

impl Pages {
    pub fn new(bytes: &[u8]) -> Self {
        let mut pages = Self::default();
        pages.resize(bytes.len());
        pages.write(0, bytes);
        pages
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Cut to `len`, or grown to it by zeroes.
    pub fn resize(&mut self, len: usize) {
        if len < self.len {
            // What grows there again is zeroes.
            let end = len.next_multiple_of(PAGE).min(self.len);
            self.fill_zeroes(len..end);
        }
        self.pages.resize_with(len.div_ceil(PAGE), || Arc::new([0; PAGE]));
        self.len = len;
    }

    /// The bytes from `at` on; all of them are there.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.len, "bytes that are there");
        let mut rest = bytes;
        for (page, part) in parts(at..at + rest.len()) {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(&self.pages[page][part]);
            rest = later;
        }
    }

    /// Writes `bytes` at `at`, where there is room for them.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let mut rest = bytes;
        for (page, part) in self.inside(at..at + bytes.len()) {
            let (now, later) = rest.split_at(part.len());
            Arc::make_mut(&mut self.pages[page])[part].copy_from_slice(now);
            rest = later;
        }
    }

    /// Makes the bytes of `range` zeroes.
    pub fn fill_zeroes(&mut self, range: Range<usize>) {
        for (page, part) in self.inside(range) {
            Arc::make_mut(&mut self.pages[page])[part].fill(0);
        }
    }

    /// Another bit in one place.
    pub fn flip(&mut self, at: usize) {
        Arc::make_mut(&mut self.pages[at / PAGE])[at % PAGE] ^= 1;
    }

    /// The pages of `self` and of `other`, which are as many, that may differ: where each begins, and both.
    pub fn differing<'a>(&'a mut self, other: &'a Self) -> impl Iterator<Item = (&'a mut [u8; PAGE], &'a [u8; PAGE])> {
        let pairs = self.pages.iter_mut().zip(&other.pages);
        pairs.filter(|(own, other)| !Arc::ptr_eq(own, other)).map(|(own, other)| (Arc::make_mut(own), &**other))
    }

    fn inside(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        assert!(range.end <= self.len, "bytes that are there");
        parts(range)
    }
}

/// The parts of `range` in each page.
fn parts(range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let Range { start, end } = range;
    let pages = start / PAGE..end.div_ceil(PAGE).max(start / PAGE);
    pages.map(move |page| (page, start.max(page * PAGE) - page * PAGE..end.min((page + 1) * PAGE) - page * PAGE))
}

#[cfg(test)]
mod tests {
    use super::Pages;

    #[test]
    fn a_copy_stays_as_it_was() {
        let bytes: Vec<u8> = (0..10_000).map(|at| at as u8).collect();
        let mut pages = Pages::new(&bytes);
        let copy = pages.clone();
        pages.write(4000, &[7; 200]);
        pages.fill_zeroes(8190..8200);
        pages.resize(9000);
        pages.resize(10_000);
        let (mut now, mut before) = (vec![1; 10_000], vec![1; 10_000]);
        pages.read(0, &mut now);
        copy.read(0, &mut before);
        let mut truth = bytes.clone();
        truth[4000..4200].fill(7);
        truth[8190..8200].fill(0);
        truth[9000..].fill(0);
        assert!(now == truth && before == bytes);
    }
}
