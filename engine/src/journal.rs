//! Keeps an image's new mappings in memory that outlives the process.
//!
//! Two generations of notes, each a count and so many entries. A note is stored first and counted
//! then, so a kill between the two leaves it out whole, and its write was not answered yet.
//!
//! ```text
//! word   0 magic   1, 2 boot id   3 the present generation   4, 5 notes of each   6, 7 owner   8 … entries
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
const OWNER: usize = 6;
const INDEX_BITS: u32 = 56;

/// What tells one run of the system from the next: a power cut lies between two.
pub type BootId = [u64; 2];

/// What tells one image's file from another of the same name.
pub type Owner = (u64, u64);

/// A journal in words that a kill does not touch.
#[derive(Debug)]
pub struct WordJournal {
    words: Arc<Words>,
    /// Nothing is promised of a target before it is the truth: then nothing is noted.
    awake: AtomicBool,
}

impl WordJournal {
    /// What a kill left in `words`, in the order in which it was noted.
    ///
    /// What another run of the system noted is of no use: its page cache is gone, and the image is
    /// as it was last settled.
    pub fn left_behind(words: &Words, boot: BootId) -> Vec<Change> {
        let known = load(words, 0) == MAGIC && [load(words, 1), load(words, 2)] == boot;
        if !known {
            return Vec::new();
        }
        let present = (load(words, GENERATION) & 1) as usize;
        [1 - present, present].into_iter().flat_map(|generation| notes(words, generation)).collect()
    }

    /// The file whose notes `words` has, as `new` was told.
    pub fn owner(words: &Words) -> Owner {
        (load(words, OWNER), load(words, OWNER + 1))
    }

    /// The run of the system in which `words` was written.
    pub fn boot(words: &Words) -> BootId {
        [load(words, 1), load(words, 2)]
    }

    /// An empty journal in `words`, of the file `owner`. What was left there has to be in the image for
    /// good.
    pub fn new(words: Arc<Words>, boot: BootId, owner: Owner) -> Self {
        assert!(words.len() >= WORDS, "room for two generations");
        let journal = Self { words, awake: AtomicBool::new(true) };
        journal.reset(boot, owner);
        journal
    }

    /// A journal that notes nothing until `wake`.
    pub fn asleep(words: Arc<Words>, boot: BootId, owner: Owner) -> Self {
        let journal = Self::new(words, boot, owner);
        journal.awake.store(false, Ordering::Release);
        journal
    }

    /// From now on everything is noted. The image must have nothing unsettled.
    pub fn wake(&self) {
        self.awake.store(true, Ordering::Release);
    }

    /// From now on nothing is noted, and what was is forgotten: the target is not the truth after all.
    pub fn sleep(&self) {
        self.awake.store(false, Ordering::Release);
        self.store(COUNTS, 0);
        self.store(COUNTS + 1, 0);
    }

    fn reset(&self, boot: BootId, owner: Owner) {
        for (word, value) in [(0, 0), (GENERATION, 0), (COUNTS, 0), (COUNTS + 1, 0), (1, boot[0]), (2, boot[1])] {
            self.store(word, value);
        }
        self.store(OWNER, owner.0);
        self.store(OWNER + 1, owner.1);
        self.store(0, MAGIC);
    }

    fn present(&self) -> usize {
        (self.load(GENERATION) & 1) as usize
    }

    fn load(&self, word: usize) -> u64 {
        load(&self.words, word)
    }

    fn store(&self, word: usize, value: u64) {
        self.words[word].store(value, Ordering::Release);
    }
}

fn load(words: &Words, word: usize) -> u64 {
    words[word].load(Ordering::Acquire)
}

fn notes(words: &Words, generation: usize) -> Vec<Change> {
    let count = load(words, COUNTS + generation).min(NOTES_MAX as u64) as usize;
    let entry = |number| {
        let at = place(generation, number);
        let key = load(words, at);
        Change { table: (key >> INDEX_BITS) as u8, index: key & ((1 << INDEX_BITS) - 1), value: load(words, at + 1) }
    };
    (0..count).map(entry).collect()
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

    const BOOT: [u64; 2] = [1, 2];
    const OWNER: (u64, u64) = (3, 4);

    fn words() -> Arc<Words> {
        Arc::new(Words::in_memory(WORDS))
    }

    #[test]
    fn what_a_kill_leaves_is_given_back_in_order_until_it_starts_anew() {
        let words = words();
        let journal = WordJournal::new(Arc::clone(&words), BOOT, OWNER);
        journal.note(change(1));
        journal.turn();
        journal.note(change(2));
        assert_eq!(journal.room(), NOTES_MAX - 1);
        for _ in 0..2 {
            assert_eq!(WordJournal::left_behind(&words, BOOT), [change(1), change(2)]);
        }
        assert_eq!(WordJournal::new(Arc::clone(&words), BOOT, OWNER).room(), NOTES_MAX);
        assert!(WordJournal::left_behind(&words, BOOT).is_empty());
    }

    #[test]
    fn what_is_settled_is_forgotten() {
        let words = words();
        let journal = WordJournal::new(Arc::clone(&words), BOOT, OWNER);
        for round in 0..5 {
            journal.note(change(round));
            journal.turn();
            journal.note(change(100 + round));
            journal.forget();
        }
        assert_eq!(WordJournal::left_behind(&words, BOOT), [change(104)]);
    }

    #[test]
    fn after_another_boot_nothing_is_left() {
        let words = words();
        WordJournal::new(Arc::clone(&words), BOOT, OWNER).note(change(1));
        assert!(WordJournal::left_behind(&words, [1, 3]).is_empty());
    }

    #[test]
    fn asleep_it_takes_everything_and_keeps_nothing() {
        let words = words();
        let journal = WordJournal::asleep(Arc::clone(&words), BOOT, OWNER);
        journal.note(change(1));
        assert_eq!(journal.room(), usize::MAX);
        journal.wake();
        journal.note(change(2));
        assert_eq!(WordJournal::left_behind(&words, BOOT), [change(2)]);
    }
}
