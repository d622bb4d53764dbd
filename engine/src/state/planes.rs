//! The planes of a job as a file of the state folder.
//!
//! What a daemon left is only read. A job goes on with new planes, which take the old ones' name when they are
//! whole and durable: so a kill or a power cut meets the old ones, untouched, or the new ones, and what was left in
//! order is never taken for that again.
use super::{StateFolder, file_name};
use crate::io::Words;
use crate::planes::{TakenUp, lay_out};
use formats::error::{Context, Result};
use formats::planes::Header;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

impl StateFolder {
    /// Where the planes of an export's job are.
    pub fn planes_path(&self, export: &str) -> PathBuf {
        self.folder.join(format!("{}.planes", file_name(export)))
    }

    /// The words of the planes that a daemon left, if there are any.
    pub fn planes_left(&self, export: &str) -> Result<Option<Vec<u64>>> {
        read_words(&self.planes_path(export))
    }

    /// Planes with what a job begins or goes on with, in place of those that are there.
    pub fn new_planes(&self, export: &str, header: &Header, taken: &TakenUp) -> Result<Arc<Words>> {
        self.lay_out_planes(&self.planes_path(export), header, taken)
    }

    /// The same in the file at `path`.
    pub(super) fn lay_out_planes(&self, path: &Path, header: &Header, taken: &TakenUp) -> Result<Arc<Words>> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let named = || format!("{}: keeping what the job knows", path.display());
        let file = fs::File::options().create(true).truncate(true).read(true).write(true).open(&new);
        let file = file.context(named)?;
        let words = Arc::new(Words::in_file(&file, header.layout().words()).context(named)?);
        lay_out(&words, header, taken);
        file.sync_all().and_then(|()| fs::rename(&new, path)).context(named)?;
        self.sync()?;
        Ok(words)
    }

    /// Makes the planes durable as they are.
    pub fn sync_planes(&self, export: &str) -> Result<()> {
        let path = self.planes_path(export);
        fs::File::open(&path).and_then(|file| file.sync_all()).context(|| format!("{}: flush", path.display()))
    }
}

/// The words of a file of planes; `None` where there is none. What is behind the last whole word does not count.
pub(super) fn read_words(path: &Path) -> Result<Option<Vec<u64>>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        bytes => bytes.context(|| format!("{}: read", path.display()))?,
    };
    Ok(Some(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()))
}
