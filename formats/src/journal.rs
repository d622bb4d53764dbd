//! Keeps changes of an image's metadata that are only in memory through a kill of the process.
//!
//! An image may hold a new mapping in memory until it is settled, for a power cut must find its
//! tables written in a safe order. A kill of the process alone must not lose it either: the guest
//! lives on and repeats nothing that was answered. So every new mapping is noted here before the
//! guest hears of its write, and after a kill the notes are given back (`Image::replay`).
//!
//! Notes survive a kill, not a power cut: after that the image stands as it was last settled.

/// One entry of one of an image's tables, with its new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which table, in the image's own numbering.
    pub table: u8,
    /// Which entry of it. Below 2^56.
    pub index: u64,
    /// What it holds now.
    pub value: u64,
}

/// Keeps notes of one image. Two generations: what was noted before `turn`, and since.
pub trait Journal: Send + Sync {
    /// How many more notes fit before the next `turn`.
    fn room(&self) -> usize;

    /// Keeps `change`. The image has seen to it that there is room.
    fn note(&self, change: Change);

    /// A settle begins: notes from here on are of the next generation.
    ///
    /// Called only when the generation before was forgotten.
    fn turn(&self);

    /// The settle is done: what was noted before the last `turn` is in the image for good.
    fn forget(&self);
}

/// For an image that nobody was promised anything of: a copy that starts over after a kill.
#[derive(Debug)]
pub struct Forgetful;

impl Journal for Forgetful {
    fn room(&self) -> usize {
        usize::MAX
    }
    fn note(&self, _: Change) {}
    fn turn(&self) {}
    fn forget(&self) {}
}
