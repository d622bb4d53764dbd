//! Slices of tables in memory: a bounded cache in which what is not in the file yet stays.
use std::cell::Cell;
use std::collections::HashMap;

/// One slice of a table.
pub struct Slot<T> {
    key: u64,
    /// What the slice holds now.
    pub entries: T,
    /// Changed since it was last frozen.
    dirty: bool,
    /// Belongs to the settle that is under way.
    frozen: bool,
    /// How many reservations will change it.
    pins: u32,
    /// Used since the hand last came by.
    used: Cell<bool>,
}

impl<T> Slot<T> {
    /// True where the settle under way writes this slice.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    fn may_leave(&self) -> bool {
        !self.dirty && !self.frozen && self.pins == 0
    }
}

/// A cache of slices by number. Clean ones leave by the clock algorithm.
///
/// It exceeds its capacity only by slices that cannot leave: their number is kept in check by
/// `is_full`, on which reservations ask for a settle.
pub struct Slices<T> {
    index: HashMap<u64, usize>,
    /// Where the last one asked for was: one request asks for the same slice several times.
    last: Cell<usize>,
    slots: Vec<Slot<T>>,
    hand: usize,
    capacity: usize,
    dirty: Vec<u64>,
    frozen: usize,
}

impl<T> Slices<T> {
    /// A cache for `capacity` slices.
    pub fn new(capacity: usize) -> Self {
        let slots = Vec::new();
        let index = HashMap::default();
        Self { index, last: Cell::new(0), slots, hand: 0, capacity: capacity.max(8), dirty: Vec::new(), frozen: 0 }
    }

    /// True where the slice `key` is in memory.
    pub fn has(&self, key: u64) -> bool {
        self.find(key).is_some()
    }

    fn find(&self, key: u64) -> Option<usize> {
        let last = self.last.get();
        if self.slots.get(last).is_some_and(|slot| slot.key == key) {
            return Some(last);
        }
        let at = *self.index.get(&key)?;
        self.last.set(at);
        Some(at)
    }

    /// The slice `key`, if it is in memory.
    pub fn get(&self, key: u64) -> Option<&Slot<T>> {
        let slot = &self.slots[self.find(key)?];
        slot.used.set(true);
        Some(slot)
    }

    /// Like `get`, to change it; see `touch`.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut Slot<T>> {
        let at = self.find(key)?;
        let slot = &mut self.slots[at];
        slot.used.set(true);
        Some(slot)
    }

    /// Puts a slice in, unless it is there already.
    pub fn insert(&mut self, key: u64, entries: T) {
        if self.has(key) {
            return;
        }
        let slot = Slot { key, entries, dirty: false, frozen: false, pins: 0, used: Cell::new(true) };
        let at = self.victim().unwrap_or(self.slots.len());
        match self.slots.get_mut(at) {
            Some(old) => {
                self.index.remove(&old.key);
                *old = slot;
            }
            None => self.slots.push(slot),
        }
        self.index.insert(key, at);
    }

    /// A slot whose slice may leave, where there is no room for another one.
    fn victim(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        // Two rounds: the first takes the marks of use away.
        for _ in 0..2 * self.slots.len() {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &self.slots[at];
            if slot.may_leave() && !slot.used.take() {
                return Some(at);
            }
        }
        None
    }

    /// Marks the slice as changed: it stays until it was frozen and thawed.
    pub fn touch(&mut self, key: u64) {
        let slot = &mut self.slots[self.index[&key]];
        if !std::mem::replace(&mut slot.dirty, true) {
            self.dirty.push(key);
        }
    }

    /// Keeps the slice in memory until `unpin`.
    pub fn pin(&mut self, key: u64) {
        self.slots[self.index[&key]].pins += 1;
    }

    /// Takes back one `pin`.
    pub fn unpin(&mut self, key: u64) {
        self.slots[self.index[&key]].pins -= 1;
    }

    /// True where nothing was changed since the last freeze.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }

    /// True where so much cannot leave that a settle is due.
    pub fn is_full(&self) -> bool {
        self.dirty.len() + self.frozen >= self.capacity / 2
    }

    /// What is dirty becomes frozen: its numbers, in order.
    pub fn freeze(&mut self) -> Vec<u64> {
        let mut keys = std::mem::take(&mut self.dirty);
        keys.sort_unstable();
        for key in &keys {
            let slot = &mut self.slots[self.index[key]];
            slot.dirty = false;
            slot.frozen = true;
        }
        self.frozen += keys.len();
        keys
    }

    /// Frozen slices are in the file now, or dirty again where that `failed`.
    pub fn thaw(&mut self, keys: &[u64], failed: bool) {
        for key in keys {
            self.slots[self.index[key]].frozen = false;
            if failed {
                self.touch(*key);
            }
        }
        self.frozen -= keys.len();
    }
}

#[cfg(test)]
mod tests {
    use super::Slices;

    #[test]
    fn what_is_not_in_the_file_stays() {
        let mut slices = Slices::new(8);
        for key in 0..4 {
            slices.insert(key, key);
            slices.touch(key);
        }
        slices.insert(4, 4);
        slices.pin(4);
        assert_eq!(slices.freeze(), [0, 1, 2, 3]);
        slices.touch(3);
        for key in 100..200 {
            slices.insert(key, key);
        }
        for key in 0..5 {
            assert_eq!(slices.get(key).map(|slot| slot.entries), Some(key));
        }
        assert!(slices.slots.len() <= 8);
        slices.thaw(&[0, 1, 2, 3], false);
        slices.unpin(4);
        for key in 200..300 {
            slices.insert(key, key);
        }
        assert!((0..3).all(|key| slices.get(key).is_none()), "clean slices leave");
        assert!(slices.get(4).is_none());
        assert!(slices.get(3).is_some(), "changed while frozen: still dirty");
        assert_eq!(slices.freeze(), [3]);
    }

    #[test]
    fn a_failed_settle_leaves_its_slices_dirty() {
        let mut slices = Slices::new(8);
        for key in [7, 5] {
            slices.insert(key, ());
            slices.touch(key);
        }
        let frozen = slices.freeze();
        slices.touch(5);
        slices.thaw(&frozen, true);
        assert!(!slices.is_clean());
        assert_eq!(slices.freeze(), [5, 7]);
    }
}
