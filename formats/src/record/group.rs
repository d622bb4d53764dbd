//! The group record: several pivot records that count from one instant on.
//!
//! Who pivots several exports at once writes one of these; from the moment when it is whole each of its members counts,
//! where it is newer than its export's own record. The members are brought into those afterwards.
//!
//! A file of two slots as the pivot record's. The payload is the members, one behind the other: generation, size, and
//! the four strings of a pivot record.
use super::Record;
use super::slot::{Frame, Shape};
use crate::error::{Error, Result};

/// Bytes a slot; the file has two.
pub const GROUP_SLOT_LEN: usize = 256 << 10;

const SHAPE: Shape = Shape { magic: b"blkmgrp\0", name: "group record", len: GROUP_SLOT_LEN };

/// Records that count together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Grows by one with each group.
    pub generation: u64,
    /// One for each export.
    pub members: Vec<Record>,
}

impl Group {
    /// The slot's bytes; an error where the paths are too long for it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        for member in &self.members {
            payload.extend_from_slice(&member.generation.to_le_bytes());
            payload.extend_from_slice(&member.size.to_le_bytes());
            member.put_texts(&mut payload);
        }
        let frame = Frame { generation: self.generation, number: self.members.len() as u64, payload: &payload };
        SHAPE.encode(&frame).ok_or_else(|| {
            Error::invalid(format!(
                "the paths of {} exports are too long for one record: pivot fewer of them at a time",
                self.members.len()
            ))
        })
    }

    /// The group of one slot; `None` where nothing was ever written there.
    pub fn decode(slot: &[u8]) -> Result<Option<Self>> {
        let Some(frame) = SHAPE.decode(slot)? else { return Ok(None) };
        let mut rest = frame.payload;
        let mut members = Vec::new();
        for _ in 0..frame.number {
            let (generation, size) = (long(&mut rest)?, long(&mut rest)?);
            members.push(Record::with_texts(generation, size, &mut rest)?);
        }
        Ok(Some(Self { generation: frame.generation, members }))
    }

    /// The group that counts among the slots of `file`, and its slot, by the rule of `Record::newest`.
    pub fn newest(file: &[u8]) -> Result<Option<(Self, usize)>> {
        SHAPE.newest(file, Self::decode, |group| group.generation)
    }

    /// The member that is about `export`.
    pub fn member(&self, export: &str) -> Option<&Record> {
        self.members.iter().find(|member| member.export == export)
    }
}

fn long(rest: &mut &[u8]) -> Result<u64> {
    let (bytes, tail) = rest.split_first_chunk().ok_or_else(|| Error::malformed("a member is cut short"))?;
    *rest = tail;
    Ok(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::{GROUP_SLOT_LEN, Group, Record};

    fn group(generation: u64, exports: usize, path_len: usize) -> Group {
        let member = |number| Record {
            generation: 7 + number as u64,
            export: format!("vd{number}"),
            origin: "/old".into(),
            truth: "x".repeat(path_len),
            format: "qcow2".into(),
            size: 1 << 30,
        };
        Group { generation, members: (0..exports).map(member).collect() }
    }

    #[test]
    fn what_is_written_is_read_back_and_the_newer_whole_slot_counts() {
        let (old, new) = (group(3, 2, 10), group(4, 30, 4000));
        let (old_slot, new_slot) = (old.encode().expect("room"), new.encode().expect("room"));
        let file = [&new_slot[..], &old_slot[..]].concat();
        assert_eq!(Group::newest(&file).expect("whole"), Some((new.clone(), 0)));
        assert_eq!(new.member("vd29"), new.members.last());
        let torn = [&new_slot[..4096], &old_slot[4096..], &old_slot[..]].concat();
        assert_eq!(Group::newest(&torn).expect("one is whole"), Some((old, 1)));
        assert_eq!(Group::newest(&vec![0; 2 * GROUP_SLOT_LEN]).expect("blank"), None);
        assert!(group(5, 100, 4000).encode().is_err());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let slot = group(1, 2, 3).encode().expect("room");
        for bit in 0..300 * 8 {
            let mut bytes = slot.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Group::decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
