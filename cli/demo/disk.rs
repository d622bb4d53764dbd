//! What each block of the demo's disk holds, and what it should hold.
//!
//! A block's bytes follow from its number and a stamp, so what was acknowledged is remembered as one
//! number a block, and a block that is old or misplaced is told from one that is right.

/// Bytes of a block.
pub const BLOCK_LEN: u64 = 4096;

/// What was written where: the stamp of each block, 0 for zeroes.
#[derive(Clone, Debug)]
pub struct Truth {
    stamps: Vec<u32>,
    last: u32,
}

impl Truth {
    /// A disk of `len` bytes, a multiple of `BLOCK_LEN`, that reads as zeroes.
    pub fn new(len: u64) -> Self {
        Self { stamps: vec![0; (len / BLOCK_LEN) as usize], last: 0 }
    }

    /// How many blocks.
    pub fn blocks(&self) -> u64 {
        self.stamps.len() as u64
    }

    /// A stamp that no block has had yet.
    pub fn next_stamp(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// `count` blocks from `block` on hold what `stamp` says, from now on.
    pub fn set(&mut self, block: u64, count: u64, stamp: u32) {
        self.stamps[block as usize..(block + count) as usize].fill(stamp);
    }

    /// The first block from `block` on that `bytes` has otherwise.
    pub fn first_difference(&self, block: u64, bytes: &[u8]) -> Option<u64> {
        let mut expected = [0; BLOCK_LEN as usize];
        let blocks = bytes.chunks_exact(BLOCK_LEN as usize);
        blocks.zip(block..).find_map(|(bytes, block)| {
            fill(block, self.stamps[block as usize], &mut expected);
            (bytes != expected).then_some(block)
        })
    }
}

/// What `stamp` puts into the blocks from `block` on; `bytes` is whole blocks.
pub fn fill(block: u64, stamp: u32, bytes: &mut [u8]) {
    if stamp == 0 {
        bytes.fill(0);
        return;
    }
    for (bytes, block) in bytes.chunks_exact_mut(BLOCK_LEN as usize).zip(block..) {
        let mut random = Random::new((block << 32) ^ u64::from(stamp));
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
    }
}

/// Numbers that look random and follow from a seed: splitmix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of `0..end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_LEN, Truth, fill};

    #[test]
    fn a_stale_a_misplaced_and_a_torn_block_are_found() {
        let mut truth = Truth::new(8 * BLOCK_LEN);
        let (old, new) = (truth.next_stamp(), truth.next_stamp());
        truth.set(2, 3, new);
        let mut bytes = vec![0; 8 * BLOCK_LEN as usize];
        let at = |block: u64| (block * BLOCK_LEN) as usize;
        fill(2, new, &mut bytes[at(2)..at(5)]);
        assert_eq!(truth.first_difference(0, &bytes), None);
        assert_eq!(truth.first_difference(3, &bytes[at(3)..]), None);

        let mut stale = bytes.clone();
        fill(3, old, &mut stale[at(3)..at(4)]);
        assert_eq!(truth.first_difference(0, &stale), Some(3));
        let mut misplaced = bytes.clone();
        misplaced.copy_within(at(2)..at(3), at(4));
        assert_eq!(truth.first_difference(0, &misplaced), Some(4));
        let mut torn = bytes.clone();
        torn[at(3) - 1] ^= 1;
        assert_eq!(truth.first_difference(0, &torn), Some(2));
        let mut not_zero = bytes;
        not_zero[at(7)] = 1;
        assert_eq!(truth.first_difference(0, &not_zero), Some(7));
    }
}
