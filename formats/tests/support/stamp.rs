//! What is in a sector: each eight bytes of it say which sector they are of and which write brought
//! them. So bytes that are stale, torn, misplaced or somebody else's are seen.
use super::disk::{SECTOR, Sector};
use formats::range::ByteRange;

const SECTOR_BYTES: u64 = SECTOR as u64;
/// Bytes of a stamp. A guest's writes begin and end between two.
pub const STAMP: u64 = 8;

/// Who brought the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Nobody: zeroes.
    Nobody,
    /// A guest's write, by its number.
    Guest(u32),
    /// They were in the image at first.
    First,
    /// They are of the image below.
    Below,
    /// They were left in the file by another tenant: no guest may ever see them.
    Foreign,
}

fn stamp(sector: u64, writer: Writer) -> [u8; STAMP as usize] {
    let number = match writer {
        Writer::Nobody => return [0; STAMP as usize],
        Writer::Guest(number) => number,
        Writer::First => u32::MAX,
        Writer::Below => u32::MAX - 1,
        Writer::Foreign => u32::MAX - 2,
    };
    ((sector + 1) << 32 | u64::from(number)).to_le_bytes()
}

/// The bytes of `range` as `writer` brings them.
pub fn stamped(range: ByteRange, writer: Writer) -> Vec<u8> {
    let all = range.align_outward(STAMP);
    let stamps = (all.start..all.end).step_by(STAMP as usize).flat_map(|at| stamp(at / SECTOR_BYTES, writer));
    stamps.skip((range.start - all.start) as usize).take(range.len() as usize).collect()
}

/// The sectors that `range` touches.
pub fn sectors(range: ByteRange) -> std::ops::Range<u64> {
    range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES)
}

/// Puts what `bytes`, which are those of `range`, have of `sector` over what is there.
pub fn overlay(content: &mut Sector, sector: u64, range: ByteRange, bytes: &[u8]) {
    let start = sector * SECTOR_BYTES;
    let here = range.intersect(ByteRange { start, end: start + SECTOR_BYTES });
    let source = &bytes[(here.start - range.start) as usize..(here.end - range.start) as usize];
    content[(here.start - start) as usize..(here.end - start) as usize].copy_from_slice(source);
}

/// True where guests brought all of it to `sector`, or it is zero.
pub fn is_of(content: &Sector, sector: u64) -> bool {
    let foreign = stamp(sector, Writer::Foreign);
    let of_it = |unit: &[u8; 8]| *unit == [0; 8] || *unit != foreign && u64::from_le_bytes(*unit) >> 32 == sector + 1;
    content.as_chunks().0.iter().all(of_it)
}

/// In words, for a message: runs of (sector, writer).
pub fn tell(content: &Sector) -> String {
    let mut told = Vec::new();
    for unit in content.as_chunks().0 {
        let unit = u64::from_le_bytes(*unit);
        let word = match (unit >> 32, unit as u32) {
            (0, 0) => "zeroes".to_owned(),
            (of, u32::MAX) => format!("sector {} at first", of.wrapping_sub(1)),
            (of, number) if number == u32::MAX - 1 => format!("sector {} below", of.wrapping_sub(1)),
            (of, number) if number == u32::MAX - 2 => format!("foreign bytes ({of})"),
            (of, number) => format!("sector {} of write {number}", of.wrapping_sub(1)),
        };
        if told.last() != Some(&word) {
            told.push(word);
        }
    }
    told.join(", ")
}
