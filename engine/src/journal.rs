//! Keeps an image's new mappings in memory that outlives the process.
//!
//! Two generations of notes, each a count and so many entries. A note is stored first and counted
//! then, so a kill between the two leaves it out whole, and its write was not answered yet.
//!
//! ```text
//! word   0 magic   1, 2 boot id   3 the present generation   4, 5 notes of each   8 … entries
//! entry  table in the top byte, index below it; then the value
//! ```
use crate::fault::{Fault, planted};
use crate::io::Words;
use formats::journal::{Change, Journal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Notes a generation.
pub const NOTES_MAX: usize = 16 << 10;

/// Words that a journal takes.
pub const WORDS: usize = HEADER + 2 * NOTES_MAX * 2;

const MAGIC: u64 = u64::from_le_bytes(*b"blkmjrn\x01");
const HEADER: usize = 8;
const GENERATION: usize = 3;
const COUNTS: usize = 4;
const INDEX_BITS: u32 = 56;

/// What tells one run of the system from the next: a power cut lies between two.
pub type BootId = [u64; 2];

/// A journal in words that a kill does not touch.
#[derive(Debug)]
pub struct WordJournal {
    words: Arc<Words>,
    /// Nothing is promised of a target before it is the truth: then nothing is noted.
    awake: AtomicBool,
}

impl WordJournal {
    /// The journal in `words`, empty, and what it held: changes that a kill left behind.
    ///
    /// What another run of the system noted is of no use: its page cache is gone, and the image is
    /// as it was last settled.
    pub fn open(words: Arc<Words>, boot: BootId) -> (Self, Vec<Change>) {
        assert!(words.len() >= WORDS, "room for two generations");
        let journal = Self { words, awake: AtomicBool::new(true) };
        let known = journal.load(0) == MAGIC && [journal.load(1), journal.load(2)] == boot;
        let left = if known { journal.notes() } else { Vec::new() };
        journal.reset(boot);
        (journal, left)
    }

    /// A journal that notes nothing until `wake`.
    pub fn asleep(words: Arc<Words>, boot: BootId) -> Self {
        let (journal, _) = Self::open(words, boot);
        journal.awake.store(false, Ordering::Release);
        journal
    }

    /// From now on everything is noted. The image must have nothing unsettled.
    pub fn wake(&self) {
        self.awake.store(true, Ordering::Release);
    }

    fn reset(&self, boot: BootId) {
        for (word, value) in
            [(0, 0), (GENERATION, 0), (COUNTS, 0), (COUNTS + 1, 0), (1, boot[0]), (2, boot[1]), (0, MAGIC)]
        {
            self.store(word, value);
        }
    }

    /// Every note that counts, the older generation first.
    fn notes(&self) -> Vec<Change> {
        let present = (self.load(GENERATION) & 1) as usize;
        [1 - present, present].into_iter().flat_map(|generation| self.generation(generation)).collect()
    }

    fn generation(&self, generation: usize) -> Vec<Change> {
        let count = self.load(COUNTS + generation).min(NOTES_MAX as u64) as usize;
        let entry = |number| {
            let (key, value) = (self.load(place(generation, number)), self.load(place(generation, number) + 1));
            Change { table: (key >> INDEX_BITS) as u8, index: key & ((1 << INDEX_BITS) - 1), value }
        };
        (0..count).map(entry).collect()
    }

    fn present(&self) -> usize {
        (self.load(GENERATION) & 1) as usize
    }

    fn load(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    fn store(&self, word: usize, value: u64) {
        self.words[word].store(value, Ordering::Release);
    }
}

fn place(generation: usize, number: usize) -> usize {
    HEADER + (generation * NOTES_MAX + number) * 2
}

impl Journal for WordJournal {
    fn room(&self) -> usize {
        match self.awake.load(Ordering::Acquire) {
            true => NOTES_MAX - self.load(COUNTS + self.present()) as usize,
            false => usize::MAX,
        }
    }

    fn note(&self, change: Change) {
        if !self.awake.load(Ordering::Acquire) || planted(Fault::ForgetInKill) {
            return;
        }
        assert!(change.index < 1 << INDEX_BITS, "an index of 56 bits");
        let generation = self.present();
        let count = self.load(COUNTS + generation);
        let entry = place(generation, count as usize);
        assert!((count as usize) < NOTES_MAX, "the image asked for room");
        self.store(entry, u64::from(change.table) << INDEX_BITS | change.index);
        self.store(entry + 1, change.value);
        self.store(COUNTS + generation, count + 1);
    }

    fn turn(&self) {
        self.store(GENERATION, 1 - self.present() as u64);
    }

    fn forget(&self) {
        self.store(COUNTS + 1 - self.present(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::{NOTES_MAX, WORDS, WordJournal};
    use crate::io::Words;
    use formats::journal::{Change, Journal};
    use std::sync::Arc;

    fn change(index: u64) -> Change {
        Change { table: 2, index, value: !index }
    }

    #[test]
    fn what_a_kill_leaves_is_given_back_in_order_and_once() {
        let words = Arc::new(Words::in_memory(WORDS));
        let (journal, left) = WordJournal::open(Arc::clone(&words), [1, 2]);
        assert!(left.is_empty());
        journal.note(change(1));
        journal.turn();
        journal.note(change(2));
        let (journal, left) = WordJournal::open(Arc::clone(&words), [1, 2]);
        assert_eq!(left, [change(1), change(2)]);
        assert_eq!(journal.room(), NOTES_MAX);
        let (_, left) = WordJournal::open(words, [1, 2]);
        assert!(left.is_empty());
    }

    #[test]
    fn what_is_settled_is_forgotten() {
        let words = Arc::new(Words::in_memory(WORDS));
        let (journal, _) = WordJournal::open(Arc::clone(&words), [1, 2]);
        for round in 0..5 {
            journal.note(change(round));
            journal.turn();
            journal.note(change(100 + round));
            journal.forget();
        }
        assert_eq!(WordJournal::open(words, [1, 2]).1, [change(104)]);
    }

    #[test]
    fn another_boot_starts_anew() {
        let words = Arc::new(Words::in_memory(WORDS));
        WordJournal::open(Arc::clone(&words), [1, 2]).0.note(change(1));
        assert!(WordJournal::open(words, [1, 3]).1.is_empty());
    }

    #[test]
    fn asleep_it_takes_everything_and_keeps_nothing() {
        let words = Arc::new(Words::in_memory(WORDS));
        let journal = WordJournal::asleep(Arc::clone(&words), [1, 2]);
        journal.note(change(1));
        assert_eq!(journal.room(), usize::MAX);
        journal.wake();
        journal.note(change(2));
        assert_eq!(WordJournal::open(words, [1, 2]).1, [change(2)]);
    }
}
