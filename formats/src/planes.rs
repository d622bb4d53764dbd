//! The planes of a mirror job: what its target lacks, in words of memory that outlive the daemon.
//!
//! ```text
//! word 0        1          2, 3     4    5     6                  7        8, 9    10, 11
//!      magic    version,   boot id  job  size  chunk bits, flags  flights  source  target
//!               checksum
//! from 16       live: seen, generation, in order, checksum of what follows, compare, unfollowed
//! from 512      marks │ claims │ unsettled, two generations │ flights: start and length each
//! ```
//!
//! A plane has one bit a chunk, in whole words. The checksum (CRC-32C) in word 1 is over words 2 to 15, which do
//! not change while the file lives; what is live has none until a daemon leaves in order. Words are the
//! machine's own: the file is of use on this machine alone.
//!
//! At each instant of a kill, what the target may lack is in a mark, in a claim, in an unsettled generation or
//! in a flight, or lies behind what the seeder has seen (`seen`).
use crate::error::{Error, Result};
use crate::range::ByteRange;
use std::ops::Range;

/// Words before the planes: one page.
pub const HEADER_WORDS: usize = 512;
/// Words that do not change.
pub const FIXED_WORDS: usize = 16;

/// Up to here the seeder has marked what has to be brought over, in bytes.
pub const SEEN: usize = 16;
/// Which generation of the unsettled is the present one.
pub const GENERATION: usize = 17;
/// `IN_ORDER_MARK` where a daemon left in order.
pub const IN_ORDER: usize = 18;
/// What `seal` said when it left.
pub const SEAL: usize = 19;
/// Not 0 where marked chunks are to be compared first, for most of them may be the same.
pub const COMPARE: usize = 20;
/// Not 0 where the guest may have written since without a mark: nothing else here is to be believed then.
pub const UNFOLLOWED: usize = 21;

/// What `IN_ORDER` holds then.
pub const IN_ORDER_MARK: u64 = u64::from_le_bytes(*b"in order");
/// A flight's length while its place is being taken: the disk is not touched before it is the real one.
pub const TAKING: u64 = u64::MAX;

const MAGIC: u64 = u64::from_le_bytes(*b"blkmpln\0");
const VERSION: u64 = 1;
const TARGET_IS_ZERO: u64 = 1 << 32;
const SIZE_MAX: u64 = 1 << 62;
const FLIGHTS_MAX: u64 = 1 << 20;

/// What is known of a job's planes from their beginning to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The run of the system in which they were written.
    pub boot: [u64; 2],
    /// Ties them to the request of their job.
    pub job: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// A chunk has 2 to this bytes.
    pub chunk_bits: u32,
    /// Guest writes that can be in flight.
    pub flights: u32,
    /// What tells the source's file from another of its name.
    pub source: (u64, u64),
    /// The same of the target.
    pub target: (u64, u64),
    /// The target read as zeroes when the job began.
    pub target_is_zero: bool,
}

/// Where everything is, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Chunks that the target lacks.
    pub marks: Range<usize>,
    /// Chunks that somebody was working on.
    pub claims: Range<usize>,
    /// Chunks that the target has in memory that a kill loses; two generations.
    pub unsettled: [Range<usize>; 2],
    /// Guest writes that were under way.
    pub flights: Range<usize>,
}

impl Layout {
    /// Words of the whole file.
    pub fn words(&self) -> usize {
        self.flights.end
    }
}

impl Header {
    /// Its words.
    pub fn words(&self) -> [u64; FIXED_WORDS] {
        let mut words = [0; FIXED_WORDS];
        words[0] = MAGIC;
        words[2..4].copy_from_slice(&self.boot);
        (words[4], words[5]) = (self.job, self.size);
        words[6] = u64::from(self.chunk_bits) | if self.target_is_zero { TARGET_IS_ZERO } else { 0 };
        words[7] = u64::from(self.flights);
        (words[8], words[9]) = self.source;
        (words[10], words[11]) = self.target;
        words[1] = VERSION | u64::from(crc(0, &words[2..])) << 32;
        words
    }

    /// The header of a file that begins with these words.
    pub fn parse(words: &[u64]) -> Result<Self> {
        let Some(fixed) = words.first_chunk::<FIXED_WORDS>().filter(|fixed| fixed[0] == MAGIC) else {
            return Err(Error::malformed("not the planes of a job"));
        };
        let version = fixed[1] & u64::from(u32::MAX);
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "version {version} of the planes of a job is not supported: use the blkmirror that wrote it"
            )));
        }
        if fixed[1] >> 32 != u64::from(crc(0, &fixed[2..])) {
            return Err(Error::malformed("the header's checksum is wrong"));
        }
        let header = Self {
            boot: [fixed[2], fixed[3]],
            job: fixed[4],
            size: fixed[5],
            chunk_bits: fixed[6] as u32,
            flights: u32::try_from(fixed[7]).unwrap_or(u32::MAX),
            source: (fixed[8], fixed[9]),
            target: (fixed[10], fixed[11]),
            target_is_zero: fixed[6] & TARGET_IS_ZERO != 0,
        };
        let possible = (9..=26).contains(&header.chunk_bits) && header.size <= SIZE_MAX && fixed[7] <= FLIGHTS_MAX;
        if !possible || header.words() != *fixed {
            return Err(Error::malformed("the header says what cannot be"));
        }
        Ok(header)
    }

    /// Where everything is.
    pub fn layout(&self) -> Layout {
        let plane = self.chunks().div_ceil(64) as usize;
        let at = |number: usize| HEADER_WORDS + number * plane..HEADER_WORDS + (number + 1) * plane;
        let flights = HEADER_WORDS + 4 * plane;
        Layout {
            marks: at(0),
            claims: at(1),
            unsettled: [at(2), at(3)],
            flights: flights..flights + 2 * self.flights as usize,
        }
    }

    /// Chunks of the disk.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(1 << self.chunk_bits)
    }

    /// Bytes of the chunks whose bits are set; a last chunk that is cut counts whole.
    pub fn bytes(&self, plane: &[u64]) -> u64 {
        let count: u64 = plane.iter().map(|word| u64::from(word.count_ones())).sum();
        (count << self.chunk_bits).min(self.size)
    }

    /// A plane with the chunks before `end` set, in bytes.
    pub fn all_before(&self, end: u64) -> Vec<u64> {
        let mut plane = vec![0; self.chunks().div_ceil(64) as usize];
        self.set(&mut plane, ByteRange { start: 0, end: end.min(self.size) });
        plane
    }

    fn set(&self, plane: &mut [u64], range: ByteRange) {
        for chunk in range.start >> self.chunk_bits..range.end.div_ceil(1 << self.chunk_bits) {
            plane[(chunk / 64) as usize] |= 1 << (chunk % 64);
        }
    }
}

/// What a daemon left behind of a job.
#[derive(Clone, Debug)]
pub struct Left<'a> {
    /// What it is about.
    pub header: Header,
    layout: Layout,
    words: &'a [u64],
}

/// How much of each there is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// In marked chunks.
    pub marks: u64,
    /// In claimed chunks.
    pub claims: u64,
    /// In chunks that are not settled.
    pub unsettled: u64,
    /// In guest writes that were under way.
    pub flights: u64,
}

impl<'a> Left<'a> {
    /// The planes of a file of these words.
    pub fn parse(words: &'a [u64]) -> Result<Self> {
        let header = Header::parse(words)?;
        let layout = header.layout();
        if layout.words() != words.len() {
            return Err(Error::malformed(format!(
                "the file should have {} bytes, it has {}",
                layout.words() as u64 * 8,
                words.len() as u64 * 8
            )));
        }
        Ok(Self { header, layout, words })
    }

    /// Up to here the seeder had come, in bytes.
    pub fn seen(&self) -> u64 {
        self.words[SEEN].min(self.header.size)
    }

    /// True where marked chunks were to be compared.
    pub fn compares(&self) -> bool {
        self.words[COMPARE] != 0
    }

    /// True where the guest's writes were followed no more.
    pub fn is_unfollowed(&self) -> bool {
        self.words[UNFOLLOWED] != 0
    }

    /// True where it was left in order, and nothing has changed since.
    pub fn is_in_order(&self) -> bool {
        self.words[IN_ORDER] == IN_ORDER_MARK && self.words[SEAL] == seal(self.words)
    }

    /// The chunks that the target may lack, of those that the seeder had seen. An error where the planes
    /// hold what cannot be.
    pub fn dirty(&self) -> Result<Vec<u64>> {
        let mut plane = vec![0; self.layout.marks.len()];
        let [first, second] = self.layout.unsettled.clone();
        for range in [self.layout.marks.clone(), self.layout.claims.clone(), first, second] {
            plane.iter_mut().zip(&self.words[range]).for_each(|(word, more)| *word |= more);
        }
        let used = self.header.chunks() % 64;
        if used != 0 && plane.last().is_some_and(|last| last >> used != 0) {
            return Err(Error::malformed("a plane has chunks behind the disk's end"));
        }
        for flight in self.flights() {
            self.header.set(&mut plane, flight?);
        }
        Ok(plane)
    }

    /// How much of each there is.
    pub fn counts(&self) -> Counts {
        let bytes = |range: &Range<usize>| self.header.bytes(&self.words[range.clone()]);
        let [first, second] = &self.layout.unsettled;
        let both: Vec<u64> =
            self.words[first.clone()].iter().zip(&self.words[second.clone()]).map(|(a, b)| a | b).collect();
        Counts {
            marks: bytes(&self.layout.marks),
            claims: bytes(&self.layout.claims),
            unsettled: self.header.bytes(&both),
            flights: self.flights().flatten().map(|flight| flight.len()).sum(),
        }
    }

    fn flights(&self) -> impl Iterator<Item = Result<ByteRange>> {
        let places = self.words[self.layout.flights.clone()].as_chunks::<2>().0;
        let taken = places.iter().filter(|[_, len]| *len != 0 && *len != TAKING);
        let inside = |range: &ByteRange| range.end <= self.header.size;
        taken.map(move |[start, len]| {
            let range = ByteRange::new(*start, *len).filter(inside);
            range.ok_or_else(|| Error::malformed("a guest write in flight ends behind the disk's end"))
        })
    }
}

/// The checksum of a whole file's live words and planes, for who leaves in order.
pub fn seal(words: &[u64]) -> u64 {
    let live = [words[SEEN], words[GENERATION], words[COMPARE]];
    // Above all checksums, so that no file of zeroes has the right one.
    1 << 32 | u64::from(crc(crc(0, &live), &words[HEADER_WORDS..]))
}

fn crc(before: u32, words: &[u64]) -> u32 {
    words.iter().fold(before, |crc, word| crc32c::crc32c_append(crc, &word.to_le_bytes()))
}

#[cfg(test)]
mod tests;
