//! Looks at the first bytes of what may be an image.
use crate::args::{Servers, Sharing};
use engine::chain::Chain;
use engine::control::TargetFormat;
use engine::control::options::Reach;
use engine::io::FileStorage;
use engine::open::{self, Access};
use formats::backing::Location;
use formats::error::{Context, Error, Result};
use formats::probe::{self, Probed};
use formats::storage::Storage;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// How much of a file is looked at to know its format, in bytes.
const PROBE_LEN: u64 = 512;

/// Opens the chain of a disk to look at. A header that is not known leaves only raw, and as raw no
/// other file is followed.
///
/// # Errors
/// The engine's, with the path.
pub fn open_chain(path: &Path, named: Option<TargetFormat>, servers: &Servers, sharing: Sharing) -> Result<Chain> {
    let location = Location::of_argument(path)?;
    let format = match (named, &location) {
        (None, Location::File(path)) if probe(path)? == Probed::Unknown => Some(TargetFormat::Raw),
        (named, _) => named,
    };
    let certificates = servers.client_certificates.clone();
    let reach = Reach { certificates, beside: sharing.beside(), ..Reach::default() };
    open::open_chain(&location, format, Access::read_only(&reach))
}

/// What the first bytes of the file at `path` say.
///
/// # Errors
/// The system's, with the path.
pub fn probe(path: &Path) -> Result<Probed> {
    open(path).and_then(|file| probe_storage(&FileStorage::new(file))).map_err(|error| error.at(path.display()))
}

/// What the first bytes in `storage` say.
///
/// # Errors
/// The system's.
pub fn probe_storage(storage: &dyn Storage) -> Result<Probed> {
    let len = storage.len().context(|| "asking for the file's length")?;
    let mut head = vec![0; len.min(PROBE_LEN) as usize];
    storage.read_at(0, &mut head).context(|| "reading its first bytes")?;
    Ok(probe::probe(&head))
}

/// Opens what an image can be; anything else might not even let itself be opened.
///
/// # Errors
/// The system's, or that it is neither a file nor a block device.
pub fn open(path: &Path) -> Result<File> {
    let kind = std::fs::metadata(path).context(|| "stat")?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::invalid("neither a file nor a block device"));
    }
    File::open(path).context(|| "open")
}
