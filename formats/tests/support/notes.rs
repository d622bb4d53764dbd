//! A journal in memory that checks the contract of its user.
use formats::journal::{Change, Journal};
use std::sync::Mutex;

/// Two generations of notes.
pub struct Notes {
    capacity: usize,
    generations: Mutex<[Vec<Change>; 2]>,
}

impl Notes {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, generations: Mutex::default() }
    }

    /// How many notes fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What a kill leaves: everything, in order.
    pub fn kept(&self) -> Vec<Change> {
        self.generations.lock().expect("one thread").concat()
    }
}

impl Journal for Notes {
    fn room(&self) -> usize {
        self.capacity - self.generations.lock().expect("one thread")[1].len()
    }

    fn note(&self, change: Change) {
        assert!(self.room() > 0, "a note without room");
        assert!(change.index < 1 << 56);
        self.generations.lock().expect("one thread")[1].push(change);
    }

    fn turn(&self) {
        let mut generations = self.generations.lock().expect("one thread");
        assert!(generations[0].is_empty(), "turned before the generation before was forgotten");
        generations.swap(0, 1);
    }

    fn forget(&self) {
        self.generations.lock().expect("one thread")[0].clear();
    }
}
