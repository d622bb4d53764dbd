//! Puts a record that counts already into its export's other slot too, or into both where it is a group's record that
//! says it. The guest does not wait for that.
//!
//! Until then the older slot names what was served before. A newest slot that rots would be taken for one whose
//! writing was cut short, and that image for the truth.
use super::record_file::{RecordFile, bytes_of};
use crate::disk::Tools;
use crate::io::{Completion, Io, Op, Token};
use formats::error::Error;
use formats::record::Record;
use std::io;

pub(super) struct Confirm {
    file: RecordFile,
    record: Record,
    /// Slots that are to be written.
    left: u32,
}

impl Confirm {
    /// Of `record`, which `file`'s newest slot says.
    pub fn recorded(mut file: RecordFile, record: Record) -> Self {
        file.written(record.clone());
        Self { file, record: next(record), left: 1 }
    }

    /// Of `record`, which a group's record says.
    pub fn of_group(mut file: RecordFile, record: Record) -> Self {
        file.outdone(record.clone());
        Self { file, record, left: 2 }
    }

    /// Begins. False where that cannot be: it is over then.
    pub fn start<I: Io>(&self, tools: &mut Tools<I>, base: Token) -> bool {
        let bytes = bytes_of(&self.record);
        match &bytes {
            Ok(bytes) => tools.io.submit(base, self.file.slots().write(bytes)),
            Err(error) => warn(error),
        }
        bytes.is_ok()
    }

    /// Takes in what became of its operation. True where it is over.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) -> bool {
        match (done.op, done.result) {
            (Op::Write { .. }, Ok(count)) if count as usize == self.file.slots().len() => {
                tools.io.submit(base, Op::Flush { file: self.file.slots().file().clone() });
                false
            }
            (Op::Flush { .. }, Ok(_)) => {
                self.file.written(self.record.clone());
                self.record = next(std::mem::take(&mut self.record));
                self.left -= 1;
                self.left == 0 || !self.start(tools, base)
            }
            (_, result) => {
                let error = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                warn(&Error::io("writing it once more", error));
                true
            }
        }
    }

    /// The record as it stands now.
    pub fn into_record(self) -> RecordFile {
        self.file
    }
}

fn next(record: Record) -> Record {
    Record { generation: record.generation + 1, ..record }
}

/// What was recorded counts all the same.
fn warn(error: &Error) {
    tracing::warn!("the pivot record has one good slot only: {}", error.one_line());
}
