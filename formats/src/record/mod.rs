//! The pivot record: which image is the truth of an export.
//!
//! A file of two slots. A new record goes to the slot that does not count and counts from the moment
//! when it is whole there; until then the other one does. `slot` has the bytes of each; the number there is the
//! disk's size, the payload is four strings, each with its length before it: export, origin, truth, format.
mod group;
mod slot;

pub use group::{GROUP_SLOT_LEN, Group};

use crate::error::{Error, Result};
use slot::{Frame, Shape};

/// Bytes a slot; the file has two.
pub const SLOT_LEN: usize = 16 << 10;

const SHAPE: Shape = Shape { magic: b"blkmrec\0", name: "pivot record", len: SLOT_LEN };

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
    /// Bytes of the disk when it was recorded: a raw image's file may be longer.
    pub size: u64,
}

impl Record {
    /// The slot's bytes; an error where a path is too long for it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        self.put_texts(&mut payload);
        let frame = Frame { generation: self.generation, number: self.size, payload: &payload };
        let too_long = || Error::invalid(format!("the paths of export {} are too long for its record", self.export));
        SHAPE.encode(&frame).ok_or_else(too_long)
    }

    /// The record of one slot; `None` where nothing was ever written there.
    pub fn decode(slot: &[u8]) -> Result<Option<Self>> {
        let Some(frame) = SHAPE.decode(slot)? else { return Ok(None) };
        let mut rest = frame.payload;
        Self::with_texts(frame.generation, frame.number, &mut rest).map(Some)
    }

    /// The record that counts among the slots of `file`, and its slot; `None` where there never was one.
    ///
    /// A slot that is not whole is one whose writing was cut short, so the other counts. Where no slot is whole,
    /// nobody knows: an error, unless the first record ever was cut short.
    pub fn newest(file: &[u8]) -> Result<Option<(Self, usize)>> {
        SHAPE.newest(file, Self::decode, |record| record.generation)
    }

    fn put_texts(&self, payload: &mut Vec<u8>) {
        for text in [&self.export, &self.origin, &self.truth, &self.format] {
            payload.extend_from_slice(&(text.len() as u32).to_le_bytes());
            payload.extend_from_slice(text.as_bytes());
        }
    }

    fn with_texts(generation: u64, size: u64, rest: &mut &[u8]) -> Result<Self> {
        let (export, origin) = (text(rest)?, text(rest)?);
        Ok(Self { generation, size, export, origin, truth: text(rest)?, format: text(rest)? })
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
