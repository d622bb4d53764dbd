//! Compares the disk with what was acknowledged, over NBD and in the closed image.
use super::disk::{BLOCK_LEN, Truth};
use super::nbd::Nbd;
use crate::failure::Failure;
use engine::io::FileStorage;
use formats::error::{Context, Error, Result};
use formats::image::{Image, Place};
use formats::journal::Forgetful;
use formats::qcow2::{Open, Qcow2};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Bytes that are compared at once.
const PIECE_LEN: u64 = 1 << 20;
/// Memory for tables while an image is read.
const METADATA_BYTES_MAX: usize = 4 << 20;

/// Compares what an export reads as.
///
/// # Errors
/// The first block that is wrong, or that it cannot be read.
pub fn over_nbd(nbd: &mut Nbd, truth: &Truth) -> std::result::Result<(), Failure> {
    if nbd.len() != truth.blocks() * BLOCK_LEN {
        return Err(Failure::new(format!("the export has {} bytes, not {}", nbd.len(), truth.blocks() * BLOCK_LEN)));
    }
    compare(truth, "the export", |offset, bytes| nbd.read(offset, bytes))
}

/// Compares what the qcow2 image at `path`, which has no backing, holds.
///
/// # Errors
/// The first block that is wrong, or that it cannot be read.
pub fn in_image(path: &Path, truth: &Truth) -> std::result::Result<(), Failure> {
    let name = path.display();
    let in_words = |error: Error| Failure::new(error.at(&name).one_line());
    let file = File::open(path).context(|| "open").map_err(in_words)?;
    let image = open(&file).map_err(in_words)?;
    if image.size() != truth.blocks() * BLOCK_LEN {
        return Err(Failure::new(format!("{name} has {} bytes, not {}", image.size(), truth.blocks() * BLOCK_LEN)));
    }
    compare(truth, &name.to_string(), |offset, bytes| read(&image, &file, offset, bytes).map_err(in_words))
}

fn compare(
    truth: &Truth,
    what: &str,
    mut read: impl FnMut(u64, &mut [u8]) -> std::result::Result<(), Failure>,
) -> std::result::Result<(), Failure> {
    let end = truth.blocks() * BLOCK_LEN;
    let mut bytes = vec![0; PIECE_LEN as usize];
    for offset in (0..end).step_by(PIECE_LEN as usize) {
        let bytes = &mut bytes[..PIECE_LEN.min(end - offset) as usize];
        read(offset, bytes)?;
        if let Some(block) = truth.first_difference(offset / BLOCK_LEN, bytes) {
            let at = block * BLOCK_LEN;
            return Err(Failure::new(format!("LOST: {what} does not hold what was acknowledged at {at}")));
        }
    }
    Ok(())
}

fn open(file: &File) -> Result<Qcow2> {
    let storage = Arc::new(FileStorage::new(file.try_clone().context(|| "open")?));
    let open = Open { writable: false, has_backing: false, metadata_bytes_max: METADATA_BYTES_MAX };
    Qcow2::open(storage, Arc::new(Forgetful), open)
}

fn read(image: &Qcow2, file: &File, offset: u64, bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let extent = image.map(offset + done as u64, (bytes.len() - done) as u64)?;
        let len = (extent.guest.len() as usize).min(bytes.len() - done);
        let part = &mut bytes[done..done + len];
        match extent.place {
            Place::Data { host } => file.read_exact_at(part, host).context(|| format!("reading {}", extent.guest))?,
            Place::Zero | Place::Absent => part.fill(0),
            Place::Compressed { .. } => return Err(Error::unsupported("a copy has no compressed clusters")),
        }
        done += len;
    }
    Ok(())
}
