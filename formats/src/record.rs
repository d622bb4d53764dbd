//! The pivot record: which image is the truth of an export.
//!
//! A file of two slots. A new record goes to the slot that does not count and counts from the moment
//! when it is whole there; until then the other one does.
//!
//! ```text
//! slot      0 ........ 8 ...... 12 .... 16 ......... 24 ... 32 ............ 36 + len
//!           │ magic    │ version │ crc   │ generation │ size  │ len, payload  │ zeroes to SLOT_LEN
//! ```
//!
//! The checksum (CRC-32C) is over everything behind it. Numbers are little endian; the payload is
//! four strings, each with its length before it: export, origin, truth, format.
use crate::error::{Error, Result};

/// Bytes a slot; the file has two.
pub const SLOT_LEN: usize = 16 << 10;

const MAGIC: &[u8; 8] = b"blkmrec\0";
const VERSION: u32 = 1;
const CRC_END: usize = 16;
const HEADER_LEN: usize = 36;

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Grows by one with each record.
    pub generation: u64,
    /// The export that it is about.
    pub export: String,
    /// Path of the image that the export began with: what its command line names.
    pub origin: String,
    /// Path of the image that has the guest's acknowledged writes.
    pub truth: String,
    /// Its format.
    pub format: String,
    /// Bytes of the disk: a raw image's file may be longer.
    pub size: u64,
}

impl Record {
    /// The slot's bytes; an error where a path is too long for it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        for text in [&self.export, &self.origin, &self.truth, &self.format] {
            payload.extend_from_slice(&(text.len() as u32).to_le_bytes());
            payload.extend_from_slice(text.as_bytes());
        }
        if HEADER_LEN + payload.len() > SLOT_LEN {
            return Err(Error::invalid(format!("the paths of export {} are too long for its record", self.export)));
        }
        let mut slot = Vec::with_capacity(SLOT_LEN);
        slot.extend_from_slice(MAGIC);
        slot.extend_from_slice(&VERSION.to_le_bytes());
        slot.extend_from_slice(&[0; 4]);
        slot.extend_from_slice(&self.generation.to_le_bytes());
        slot.extend_from_slice(&self.size.to_le_bytes());
        slot.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        slot.extend_from_slice(&payload);
        slot.resize(SLOT_LEN, 0);
        let crc = crc32c::crc32c(&slot[CRC_END..]);
        slot[CRC_END - 4..CRC_END].copy_from_slice(&crc.to_le_bytes());
        Ok(slot)
    }

    /// The record of one slot; `None` where nothing was ever written there.
    pub fn decode(slot: &[u8]) -> Result<Option<Self>> {
        if slot.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if slot.len() != SLOT_LEN || !slot.starts_with(MAGIC) {
            return Err(Error::malformed("not a pivot record"));
        }
        let number = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
        if number(8) != VERSION {
            return Err(Error::unsupported(format!(
                "version {} of the pivot record is not supported: use the blkmirror that wrote it",
                number(8)
            )));
        }
        if number(12) != crc32c::crc32c(&slot[CRC_END..]) {
            return Err(Error::malformed("the checksum is wrong"));
        }
        let long = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        let payload = slot.get(HEADER_LEN..HEADER_LEN + number(32) as usize);
        let mut rest = payload.ok_or_else(|| Error::malformed("the payload is longer than its slot"))?;
        let record = Self {
            generation: long(16),
            size: long(24),
            export: text(&mut rest)?,
            origin: text(&mut rest)?,
            truth: text(&mut rest)?,
            format: text(&mut rest)?,
        };
        Ok(Some(record))
    }

    /// The record that counts among the slots of `file`, and its slot; `None` where there never was
    /// one.
    ///
    /// A slot that is not whole is one whose writing was cut short, so the other counts. The first record
    /// ever goes to the first slot: where that is not whole and the second was never written, it was
    /// cut short too, and nothing is recorded yet. Where else no slot is whole, nobody knows: an error.
    pub fn newest(file: &[u8]) -> Result<Option<(Self, usize)>> {
        if file.len() != 2 * SLOT_LEN {
            return Err(Error::malformed(format!(
                "a pivot record has {} bytes, this has {}",
                2 * SLOT_LEN,
                file.len()
            )));
        }
        let (first, second) = file.split_at(SLOT_LEN);
        let slots = [Self::decode(first), Self::decode(second)];
        let mut newest: Option<(Self, usize)> = None;
        let mut damaged = None;
        for (number, slot) in slots.into_iter().enumerate() {
            match slot {
                Ok(Some(record)) if newest.as_ref().is_none_or(|(old, _)| old.generation < record.generation) => {
                    newest = Some((record, number));
                }
                Ok(_) => {}
                // Written by a later version: what it says may be newer than what the other slot says.
                Err(error) if error.kind() == crate::error::Kind::Unsupported => return Err(error),
                Err(error) => damaged = Some(error.at(format!("slot {number}"))),
            }
        }
        match (newest, damaged) {
            (None, Some(damaged)) if second.iter().any(|byte| *byte != 0) => Err(damaged),
            (newest, _) => Ok(newest),
        }
    }
}

fn text(rest: &mut &[u8]) -> Result<String> {
    let short = || Error::malformed("a text is longer than the payload");
    let (len, tail) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (bytes, tail) = tail.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(short)?;
    *rest = tail;
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::malformed("a text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::{Record, SLOT_LEN};
    use crate::error::Kind;

    fn record(generation: u64, truth: &str) -> Record {
        let text = |text: &str| text.to_owned();
        Record {
            generation,
            export: text("vda"),
            origin: text("/a"),
            truth: text(truth),
            format: text("raw"),
            size: 1 << 40,
        }
    }

    fn file(first: &[u8], second: &[u8]) -> Vec<u8> {
        [first, second].concat()
    }

    #[test]
    fn the_newer_whole_slot_counts() {
        let blank = vec![0; SLOT_LEN];
        let (old, new) = (record(4, "/a"), record(5, "/b"));
        let (old_slot, new_slot) = (old.encode().expect("short paths"), new.encode().expect("short paths"));
        let newest = |a: &[u8], b: &[u8]| Record::newest(&file(a, b)).expect("a record");
        assert_eq!(newest(&blank, &blank), None);
        assert_eq!(newest(&old_slot, &blank), Some((old.clone(), 0)));
        assert_eq!(newest(&old_slot, &new_slot), Some((new.clone(), 1)));
        assert_eq!(newest(&new_slot, &old_slot), Some((new.clone(), 0)));
        let torn = [&new_slot[..512], &blank[512..]].concat();
        let halved = file(&new_slot[..40], &old_slot[40..]);
        assert_eq!(newest(&old_slot, &torn), Some((new.clone(), 1)), "a short record fits one sector");
        assert_eq!(newest(&old_slot, &halved), Some((old, 0)));
        assert_eq!(newest(&halved, &blank), None, "the first record ever was cut short");
        assert!(Record::newest(&file(&blank, &halved)).is_err(), "nobody knows");
        assert!(Record::newest(&file(&halved, &halved)).is_err(), "nobody knows");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let slot = record(1, "/b").encode().expect("short paths");
        for bit in 0..600 * 8 {
            let mut bytes = slot.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_refused_and_never_guessed_about() {
        let mut slot = record(9, "/b").encode().expect("short paths");
        slot[8] = 2;
        let older = record(1, "/a").encode().expect("short paths");
        assert_eq!(Record::newest(&file(&older, &slot)).expect_err("refused").kind(), Kind::Unsupported);
    }

    #[test]
    fn paths_that_do_not_fit_are_refused() {
        assert!(record(1, &"x".repeat(SLOT_LEN)).encode().is_err());
        assert!(Record::newest(&[0; 10]).is_err());
    }
}
