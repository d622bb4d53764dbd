//! The files that say which image is the truth: an export's own record, and the one of a group.
use crate::fault::{Fault, planted};
use crate::io::{Buffer, File, Op};
use crate::open::refuse_lost;
use formats::error::Result;
use formats::record::{GROUP_SLOT_LEN, Group, Record, SLOT_LEN};
use std::path::PathBuf;

/// The file of an export's record, and what it says now.
#[derive(Clone)]
pub struct RecordFile {
    slots: Slots,
    /// What counts.
    newest: Option<Record>,
    /// Where the next start looks for it.
    path: PathBuf,
    /// It is in the group's record alone.
    lags: bool,
}

impl RecordFile {
    /// The file at `path`, and what was read from it: what counts, and its slot.
    pub fn new(file: File, path: PathBuf, newest: Option<(Record, usize)>) -> Self {
        let slots = Slots { file, len: SLOT_LEN, newest: newest.as_ref().map(|(_, slot)| *slot) };
        Self { slots, newest: newest.map(|(record, _)| record), path, lags: false }
    }

    /// Refuses to record what nobody would find.
    pub(super) fn refuse_lost(&self) -> Result<()> {
        refuse_lost(&self.path, &self.slots.file)
    }

    /// The slot that does not count.
    pub fn free_slot(&self) -> usize {
        self.slots.free()
    }

    /// True where what counts is not in this file yet: the group's record must not be replaced then.
    pub fn lags(&self) -> bool {
        self.lags
    }

    /// What counts now.
    pub fn newest(&self) -> Option<&Record> {
        self.newest.as_ref()
    }

    /// How often something was recorded.
    pub fn generation(&self) -> u64 {
        self.newest().map_or(0, |record| record.generation)
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// `record` counts, by the group's record.
    pub(super) fn outdone(&mut self, record: Record) {
        (self.newest, self.lags) = (Some(record), true);
    }

    /// `record` was written into the slot that did not count.
    pub(super) fn written(&mut self, record: Record) {
        self.slots.turn();
        (self.newest, self.lags) = (Some(record), false);
    }
}

/// The file of the groups' record, and what it says now.
#[derive(Clone)]
pub struct GroupFile {
    slots: Slots,
    newest: Group,
    path: PathBuf,
}

impl GroupFile {
    /// The file at `path`, and what was read from it: what counts, and its slot.
    pub fn new(file: File, path: PathBuf, newest: Option<(Group, usize)>) -> Self {
        let slots = Slots { file, len: GROUP_SLOT_LEN, newest: newest.as_ref().map(|(_, slot)| *slot) };
        Self { slots, newest: newest.map(|(group, _)| group).unwrap_or_default(), path }
    }

    /// Refuses to record what nobody would find.
    pub(super) fn refuse_lost(&self) -> Result<()> {
        refuse_lost(&self.path, &self.slots.file)
    }

    /// What counts now.
    pub fn newest(&self) -> &Group {
        &self.newest
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }
}

/// A file of two slots, one of which counts.
#[derive(Clone)]
pub(super) struct Slots {
    file: File,
    len: usize,
    newest: Option<usize>,
}

impl Slots {
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes a slot's bytes into the slot that does not count.
    pub fn write(&self, bytes: &[u8]) -> Op {
        let mut buf = Buffer::alone(self.len);
        buf.copy_from_slice(bytes);
        Op::Write { file: self.file.clone(), at: (self.free() * self.len) as u64, buf }
    }

    /// How many bytes `write` writes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn free(&self) -> usize {
        let newest = self.newest.unwrap_or(1);
        if planted(Fault::OverwriteTheNewestSlot) { newest } else { 1 - newest }
    }

    fn turn(&mut self) {
        self.newest = Some(self.free());
    }
}

/// Both slots of a record that says `member` twice, in the order in which they are written.
pub fn slots_of(member: &Record) -> Result<[Vec<u8>; 2]> {
    let again = Record { generation: member.generation + 1, ..member.clone() };
    Ok([member.encode()?, again.encode()?])
}

/// The slot's bytes of `record`.
pub(super) fn bytes_of(record: &Record) -> Result<Vec<u8>> {
    record.encode()
}

/// The slot's bytes of `members`, who follow what `file` says.
pub(super) fn bytes_of_group(file: &GroupFile, ahead: u64, members: Vec<Record>) -> Result<Vec<u8>> {
    Group { generation: file.newest.generation + ahead, members }.encode()
}
