//! Words of memory that several threads change, in a file that outlives the process where asked.
//!
//! What a killed process had stored in a mapped file is in the system's page cache, and the next
//! process finds it there. It needs no flush; a power cut loses it.
// UNSAFETY: mapping a file, and seeing its bytes as atomic words.
#![cfg_attr(not(all(test, feature = "loom")), expect(unsafe_code))]
use crate::fault;
use crate::sync::{AtomicU64, Ordering};
#[cfg(not(all(test, feature = "loom")))]
use memmap2::MmapMut;
#[cfg(not(all(test, feature = "loom")))]
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// From how many words on memory is asked of the system, which gives a page when it is written to.
#[cfg(not(all(test, feature = "loom")))]
const SPARSE_MIN: usize = 8192;

/// A fixed number of atomic words, all zero at first.
#[derive(Debug)]
pub struct Words(Inner);

#[derive(Debug)]
enum Inner {
    Memory(Box<[AtomicU64]>),
    #[cfg(not(all(test, feature = "loom")))]
    Map(MmapMut),
}

impl Words {
    /// `count` words in the process's own memory; where they are many, those take none that were never set.
    pub fn in_memory(count: usize) -> Self {
        #[cfg(not(all(test, feature = "loom")))]
        if count >= SPARSE_MIN
            && let Ok(map) = MmapMut::map_anon(count * 8)
        {
            return Self(Inner::Map(map));
        }
        Self(Inner::Memory((0..count).map(|_| AtomicU64::new(0)).collect()))
    }

    /// There are no files where loom explores.
    #[cfg(all(test, feature = "loom"))]
    pub fn in_file(_: &std::fs::File, count: usize) -> std::io::Result<Self> {
        Ok(Self::in_memory(count))
    }

    /// The first `count` words of `file`, which is made that long; what was in it is kept.
    ///
    /// The file's blocks are allocated first, for a store to a mapped page that finds no space
    /// would end the process.
    #[cfg(not(all(test, feature = "loom")))]
    pub fn in_file(file: &std::fs::File, count: usize) -> io::Result<Self> {
        let len = (count.max(1) as u64) * 8;
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len)?,
            Err(error) => return Err(error.into()),
        }
        // SAFETY: the file is in the daemon's own locked state folder; whoever cuts it under a
        // running daemon ends the daemon (SIGBUS), as by killing it. Racing writers change words
        // that are atomic, never a value that is assumed valid.
        let map = unsafe { memmap2::MmapOptions::new().len(len as usize).map_mut(file)? };
        Ok(Self(Inner::Map(map)))
    }
}

impl Deref for Words {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match &self.0 {
            Inner::Memory(words) => words,
            #[cfg(not(all(test, feature = "loom")))]
            // SAFETY: a mapping is page aligned, lives as long as `self`, is a whole number of
            // words long, and is only ever seen as atomic words, whose every bit pattern is valid.
            Inner::Map(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), map.len() / 8) },
        }
    }
}

/// Some of the words of a `Words`, which lives as long as its last view.
///
/// Whoever sees a change sees what its thread did before it, also who finds the words after a kill.
#[derive(Clone, Debug)]
pub struct View {
    words: Arc<Words>,
    range: Range<usize>,
}

impl View {
    /// The words of `range`.
    pub fn new(words: &Arc<Words>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= words.len(), "words that are there");
        Self { words: Arc::clone(words), range }
    }

    /// Words of its own, in the process's memory.
    pub fn in_memory(count: usize) -> Self {
        Self { words: Arc::new(Words::in_memory(count)), range: 0..count }
    }

    /// How many words.
    pub fn count(&self) -> usize {
        self.range.len()
    }

    /// What a word holds.
    #[inline]
    pub fn load(&self, word: usize) -> u64 {
        self.at(word).load(Ordering::Acquire)
    }

    /// Gives a word a value.
    pub fn store(&self, word: usize, value: u64) {
        self.at(word).store(value, Ordering::Release);
        fault::stored(&self.words);
    }

    /// Sets bits of a word; says what it held.
    #[inline]
    pub fn set(&self, word: usize, bits: u64) -> u64 {
        let before = self.at(word).fetch_or(bits, Ordering::AcqRel);
        fault::stored(&self.words);
        before
    }

    /// Clears bits of a word; says what it held.
    #[inline]
    pub fn clear(&self, word: usize, bits: u64) -> u64 {
        let before = self.at(word).fetch_and(!bits, Ordering::AcqRel);
        fault::stored(&self.words);
        before
    }

    /// Gives a word that holds `from` the value `to`. False where it holds another.
    pub fn exchange(&self, word: usize, from: u64, to: u64) -> bool {
        let done = self.at(word).compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        fault::stored(&self.words);
        done
    }

    #[inline]
    fn at(&self, word: usize) -> &AtomicU64 {
        &self.words[self.range.clone()][word]
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::Words;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn words_in_a_file_are_there_for_the_next_who_opens_it() {
        let file = tempfile::tempfile().expect("a temporary file");
        let words = Words::in_file(&file, 1000).expect("a mapping");
        words[999].store(7, Relaxed);
        let again = Words::in_file(&file, 1000).expect("a second mapping");
        assert_eq!((again.len(), again[999].load(Relaxed), again[0].load(Relaxed)), (1000, 7, 0));
    }
}
