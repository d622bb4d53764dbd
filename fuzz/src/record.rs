//! The pivot record: files that are written as the pivot writes them, cut short as a power cut does
//! it, and slots of any bytes.
//!
//! What counts is known: of the slots that hold a record byte for byte, the one with the highest
//! generation. Where no slot is whole and one was begun, the file is refused, but for the first slot alone:
//! then the first record ever was cut short.
use arbitrary::{Arbitrary, Unstructured};
use formats::error::Kind;
use formats::record::{Record, SLOT_LEN};

const SECTOR: usize = 512;
const SECTORS: usize = SLOT_LEN / SECTOR;

#[derive(Arbitrary, Debug)]
enum Act<'a> {
    /// The next record is written, whole.
    Write(Texts<'a>),
    /// The power goes while it is written: bit n says whether sector n arrived.
    Cut(Texts<'a>, u32),
    /// One bit of a slot changes.
    Flip(bool, u16, u8),
    /// One slot gets these bytes, with a checksum that fits where `sealed`.
    Slot { second: bool, sealed: bool, bytes: &'a [u8] },
}

/// Export, origin, truth, format; the last is as long as it says, in steps of 64 bytes.
type Texts<'a> = (&'a str, &'a str, &'a str, u8);

/// Does to a file what `data` says and looks at it after each step.
pub fn run(data: &[u8]) {
    let Ok(acts) = Vec::<Act>::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut world = World { file: vec![0; 2 * SLOT_LEN], written: Vec::new(), foreign: false };
    for act in acts.into_iter().take(32) {
        world.act(act);
        world.look();
    }
}

struct World {
    file: Vec<u8>,
    /// Every record that was written, whole or not, with its slot's bytes.
    written: Vec<(Record, Vec<u8>)>,
    /// A slot may hold a record that we did not write.
    foreign: bool,
}

impl World {
    fn act(&mut self, act: Act) {
        match act {
            Act::Write(texts) => self.write(texts, u32::MAX),
            Act::Cut(texts, arrived) => self.write(texts, arrived),
            Act::Flip(second, at, bit) => {
                self.slot(second)[usize::from(at) % SLOT_LEN] ^= 1 << (bit % 8);
            }
            Act::Slot { second, sealed, bytes } => self.put(second, sealed, bytes),
        }
    }

    /// Writes the next record as the pivot does: to the slot that does not count.
    fn write(&mut self, (export, origin, truth, format): Texts, arrived: u32) {
        let newest = Record::newest(&self.file).ok().flatten();
        let (generation, slot) = newest.map_or((0, 1), |(record, slot)| (record.generation, slot));
        let Some(generation) = generation.checked_add(1) else { return };
        let record = Record {
            generation,
            export: export.into(),
            origin: origin.into(),
            truth: truth.into(),
            format: "x".repeat(usize::from(format) * 64),
            size: generation << 9,
        };
        let long = 36 + 16 + export.len() + origin.len() + truth.len() + record.format.len() > SLOT_LEN;
        let Ok(bytes) = record.encode() else {
            assert!(long, "a record that fits is refused");
            return;
        };
        assert!(!long && bytes.len() == SLOT_LEN);
        assert_eq!(Record::decode(&bytes).ok().flatten().as_ref(), Some(&record));
        let place = self.slot(slot == 0);
        for sector in (0..SECTORS).filter(|sector| arrived >> sector & 1 == 1) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            place[range.clone()].copy_from_slice(&bytes[range]);
        }
        self.written.push((record, bytes));
    }

    /// Puts bytes of any origin into a slot.
    fn put(&mut self, second: bool, sealed: bool, bytes: &[u8]) {
        let slot = self.slot(second);
        slot.fill(0);
        if !sealed {
            let len = bytes.len().min(SLOT_LEN);
            slot[..len].copy_from_slice(&bytes[..len]);
            return;
        }
        let len = bytes.len().min(SLOT_LEN - 16);
        slot[..8].copy_from_slice(b"blkmrec\0");
        slot[8] = 1;
        slot[16..16 + len].copy_from_slice(&bytes[..len]);
        let crc = crc32c(&slot[16..]);
        slot[12..16].copy_from_slice(&crc.to_le_bytes());
        self.foreign = true;
    }

    fn slot(&mut self, second: bool) -> &mut [u8] {
        &mut self.file[usize::from(second) * SLOT_LEN..][..SLOT_LEN]
    }

    fn look(&self) {
        let slots: Vec<&[u8]> = self.file.chunks(SLOT_LEN).collect();
        let decoded: Vec<_> = slots.iter().map(|slot| Record::decode(slot)).collect();
        for record in decoded.iter().filter_map(|slot| slot.as_ref().ok()?.as_ref()) {
            let again = record.encode().expect("what fitted a slot fits one");
            assert_eq!(Record::decode(&again).ok().flatten().as_ref(), Some(record), "it comes back as it went");
        }
        let newest = Record::newest(&self.file);
        if slots.iter().any(|slot| slot.starts_with(b"blkmrec\0") && slot[8..12] != [1, 0, 0, 0]) {
            let kind = newest.map(|_| ()).expect_err("another version is never guessed about").kind();
            return assert!(matches!(kind, Kind::Unsupported));
        }
        if self.foreign {
            return self.check_order(newest.ok().flatten(), &decoded);
        }
        let whole = |slot: &[u8]| self.written.iter().find(|(_, bytes)| bytes == slot).map(|(record, _)| record);
        let right = slots.iter().filter_map(|slot| whole(slot)).max_by_key(|record| record.generation);
        let blank = |slot: &[u8]| slot.iter().all(|byte| *byte == 0);
        match newest {
            Ok(found) => {
                assert_eq!(found.as_ref().map(|(record, _)| record), right);
                assert!(found.is_some() || blank(slots[1]), "something was begun, and nobody knows what");
            }
            Err(error) => {
                assert!(right.is_none() && !blank(slots[1]), "{error}");
                assert_eq!(error.kind(), Kind::Malformed);
            }
        }
    }

    /// What counts is among the slots, and no other has a higher generation.
    fn check_order(&self, newest: Option<(Record, usize)>, decoded: &[Result<Option<Record>, formats::error::Error>]) {
        let generation = |slot: &Result<Option<Record>, _>| Some(slot.as_ref().ok()?.as_ref()?.generation);
        let highest = decoded.iter().filter_map(generation).max();
        assert_eq!(newest.as_ref().map(|(record, _)| record.generation), highest);
        if let Some((record, slot)) = newest {
            assert_eq!(decoded[slot].as_ref().ok().and_then(Option::as_ref), Some(&record));
        }
    }
}

/// CRC-32C, a bit at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}
