//! A slot of a file of two: a frame that is whole or is none.
//!
//! ```text
//! slot      0 ........ 8 ...... 12 .... 16 ......... 24 .... 32 ............ 36 + len
//!           │ magic    │ version │ crc   │ generation │ number │ len, payload  │ zeroes to the slot's end
//! ```
//!
//! The checksum (CRC-32C) is over everything behind it. Numbers are little endian. What `number` is, is the
//! payload's affair.
use crate::error::{Error, Kind, Result};

const VERSION: u32 = 1;
const CRC_END: usize = 16;
const HEADER_LEN: usize = 36;

/// What a slot's bytes have to be.
pub(super) struct Shape {
    /// The first bytes.
    pub magic: &'static [u8; 8],
    /// What it is called.
    pub name: &'static str,
    /// Bytes a slot; the file has two.
    pub len: usize,
}

/// What is in a slot.
pub(super) struct Frame<'a> {
    pub generation: u64,
    pub number: u64,
    pub payload: &'a [u8],
}

impl Shape {
    /// The slot's bytes; `None` where the payload is too long for it.
    pub fn encode(&self, frame: &Frame<'_>) -> Option<Vec<u8>> {
        if HEADER_LEN + frame.payload.len() > self.len {
            return None;
        }
        let mut slot = Vec::with_capacity(self.len);
        slot.extend_from_slice(self.magic);
        slot.extend_from_slice(&VERSION.to_le_bytes());
        slot.extend_from_slice(&[0; 4]);
        slot.extend_from_slice(&frame.generation.to_le_bytes());
        slot.extend_from_slice(&frame.number.to_le_bytes());
        slot.extend_from_slice(&(frame.payload.len() as u32).to_le_bytes());
        slot.extend_from_slice(frame.payload);
        slot.resize(self.len, 0);
        let crc = crc32c::crc32c(&slot[CRC_END..]);
        slot[CRC_END - 4..CRC_END].copy_from_slice(&crc.to_le_bytes());
        Some(slot)
    }

    /// What is in a slot; `None` where nothing was ever written there.
    pub fn decode<'a>(&self, slot: &'a [u8]) -> Result<Option<Frame<'a>>> {
        if slot.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if slot.len() != self.len || !slot.starts_with(self.magic) {
            return Err(Error::malformed(format!("not a {}", self.name)));
        }
        let number = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
        if number(8) != VERSION {
            return Err(Error::unsupported(format!(
                "version {} of the {} is not supported: use the blkmirror that wrote it",
                number(8),
                self.name
            )));
        }
        if number(12) != crc32c::crc32c(&slot[CRC_END..]) {
            return Err(Error::malformed("the checksum is wrong"));
        }
        let long = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        let payload = slot.get(HEADER_LEN..HEADER_LEN + number(32) as usize);
        let payload = payload.ok_or_else(|| Error::malformed("the payload is longer than its slot"))?;
        Ok(Some(Frame { generation: long(16), number: long(24), payload }))
    }

    /// The newest of what `decode` finds in the slots of `file`, by `generation`, and its slot; `None` where there
    /// never was one.
    ///
    /// A slot that is not whole is one whose writing was cut short, so the other counts. The first one ever
    /// goes to the first slot: where that is not whole and the second was never written, it was cut short
    /// too, and nothing is recorded yet. Where else no slot is whole, nobody knows: an error.
    pub fn newest<T>(
        &self,
        file: &[u8],
        decode: impl Fn(&[u8]) -> Result<Option<T>>,
        generation: impl Fn(&T) -> u64,
    ) -> Result<Option<(T, usize)>> {
        if file.len() != 2 * self.len {
            let (name, wanted, found) = (self.name, 2 * self.len, file.len());
            return Err(Error::malformed(format!("a {name} has {wanted} bytes, this has {found}")));
        }
        let (first, second) = file.split_at(self.len);
        let slots = [decode(first), decode(second)];
        let mut newest: Option<(T, usize)> = None;
        let mut damaged = None;
        for (number, slot) in slots.into_iter().enumerate() {
            match slot {
                Ok(Some(found)) if newest.as_ref().is_none_or(|(old, _)| generation(old) < generation(&found)) => {
                    newest = Some((found, number));
                }
                Ok(_) => {}
                // Written by a later version: what it says may be newer than what the other slot says.
                Err(error) if error.kind() == Kind::Unsupported => return Err(error),
                Err(error) => damaged = Some(error.at(format!("slot {number}"))),
            }
        }
        match (newest, damaged) {
            (None, Some(damaged)) if second.iter().any(|byte| *byte != 0) => Err(damaged),
            (newest, _) => Ok(newest),
        }
    }
}
