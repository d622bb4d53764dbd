//! The other file of a target that is made with an external data file.
use super::{Found, invalid, refuse_own_layers, unsupported};
use crate::chain::Layer;
use crate::control::{Refusal, TargetFormat};
use crate::io::FileStorage;
use formats::error::{Context, Error, Result};
use formats::qcow2::DataFile;
use formats::storage::Storage;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A data file that is to be made.
#[derive(Debug)]
pub(super) struct NewDataFile {
    path: PathBuf,
    found: Found,
}

impl NewDataFile {
    /// Whether the data file of an image at `target` can be made: nothing is there, or an empty file.
    pub fn plan(data_file: &DataFile, target: &Path, layers: &[Arc<Layer>]) -> std::result::Result<Self, Refusal> {
        let path = data_file.resolve(target)?;
        refuse_own_layers(&path, Some(TargetFormat::Raw), layers)?;
        let what = path.display();
        match Found::look(&path)? {
            _ if path == target => Err(invalid(format!("data_file={what}: it is the target itself"))),
            Found::File => Err(unsupported(format!("data_file={what}: it is there already and not empty"))),
            Found::Device => Err(unsupported(format!(
                "data_file={what}: a block device: make the image with qemu-img and use it with --reuse-external"
            ))),
            found => Ok(Self { path, found }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, as long as the disk. What is in it reads as zeroes.
    pub fn make(&self, size: u64) -> Result<FileStorage> {
        let named = |what: &str| format!("data_file={}: {what}", self.path.display());
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(&self.path);
        let storage = FileStorage::new(file.context(|| named("create"))?);
        // Whoever put something there meanwhile keeps it.
        if storage.len().context(|| named("length"))? != 0 {
            return Err(Error::invalid(named("it is not empty any more")));
        }
        storage.set_len(size).context(|| named("setting its length"))?;
        Ok(storage)
    }

    /// Leaves what was there before.
    pub fn unmake(&self) {
        self.found.leave(&self.path);
    }
}
