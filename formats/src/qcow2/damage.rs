//! A corruption that is found while the image is in use: whatever is written from then on could make it
//! worse. So nothing is any more, the header says so for whoever opens the image next (version 2 has no
//! bit for it), and reads go on where they can.
//!
//! What was committed and not settled stays in the journal; a flush that would have to bring it into the
//! file fails.
use super::Shared;
use super::header::{INCOMPATIBLE_AT, incompatible};
use crate::error::{Error, Kind, Result};

impl Shared {
    /// Looks at what an operation came to: the first corruption ends all writing.
    pub(super) fn watch<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() == Kind::Malformed
            && self.writable
            && self.damage.set(error.one_line()).is_ok()
        {
            self.mark_corrupt();
        }
        result
    }

    /// An image that was found corrupt is not written any more.
    pub(super) fn refuse_damaged(&self) -> Result<()> {
        match self.damage.get() {
            None => Ok(()),
            Some(what) => Err(Error::malformed(format!(
                "the image is corrupt ({what}): it is not written any more; mend it with `blkmirror check --repair all FILE`"
            ))),
        }
    }

    fn mark_corrupt(&self) {
        if self.geometry().version >= 3 {
            let bits = self.incompatible | incompatible::CORRUPT;
            // Where the header cannot be written nothing else can: the next one finds the corruption again.
            let _ = self.storage.write_at(INCOMPATIBLE_AT, &bits.to_be_bytes());
        }
    }
}
