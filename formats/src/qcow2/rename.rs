//! Another name for the image below: in the header of an image that nobody uses, as a copy of one is at first.
use super::header::{BACKING_NAME_MAX, Backing, Header};
use super::read_header;
use crate::error::{Context, Error, Result};
use crate::storage::Storage;

/// Where the name's length (4 bytes) is in the header.
const LEN_AT: u64 = 16;
/// Where the name's offset is.
const OFFSET_AT: usize = 8;

/// Gives the image in `storage` the backing name `name`, in the place of the one that it has. What is recorded of
/// the format stays.
pub fn rename_backing(storage: &dyn Storage, name: &str) -> Result<()> {
    let Some((at, backing)) = find(storage, name)? else { return Ok(()) };
    storage.write_at(at, name.as_bytes()).context(|| "writing the backing name in the header")?;
    // Shorter, it leaves the rest of the old one: zeroes, so that no extension is found there.
    let rest = vec![0; backing.name.len().saturating_sub(name.len())];
    storage.write_at(at + name.len() as u64, &rest).context(|| "writing the backing name in the header")?;
    let len = (name.len() as u32).to_be_bytes();
    storage.write_at(LEN_AT, &len).context(|| "writing the backing name's length in the header")
}

/// Says why `rename_backing` could not be done, or would leave an image of which nobody knows what is below it.
pub fn check_rename(storage: &dyn Storage, name: &str) -> Result<()> {
    match find(storage, name)? {
        // The old name may say it, as a `json:` one does; the new one does not.
        Some((_, Backing { format: None, .. })) => Err(Error::unsupported(
            "its header does not record the format of the image below: record it with `qemu-img rebase -u -F FORMAT -b \
             NAME`, while it is not served",
        )),
        _ => Ok(()),
    }
}

/// Where the name is to be, and what is there now; `None` where it is the same.
fn find(storage: &dyn Storage, name: &str) -> Result<Option<(u64, Backing)>> {
    let header = read_header(storage)?;
    let Some(backing) = &header.backing else { return Err(Error::invalid("it has no backing name to be changed")) };
    if backing.name == name {
        return Ok(None);
    }
    let at = place(storage, &header, backing.name.len(), name.len())?;
    Ok(Some((at, backing.clone())))
}

/// Where the name is, and can be with `new` bytes: up to the end of the first cluster nothing is behind it.
fn place(storage: &dyn Storage, header: &Header, old: usize, new: usize) -> Result<u64> {
    let mut first = vec![0; header.geometry.cluster_size() as usize];
    storage.read_at(0, &mut first).context(|| "reading the header")?;
    let mut offset = [0; 8];
    offset.copy_from_slice(&first[OFFSET_AT..OFFSET_AT + 8]);
    let offset = u64::from_be_bytes(offset);
    // In the first cluster, as the header was found to be right.
    let at = offset as usize;
    let more = first.get(at + old..at + new.max(old)).unwrap_or(&[1]);
    match new <= BACKING_NAME_MAX && more.iter().all(|byte| *byte == 0) {
        true => Ok(offset),
        false => Err(Error::unsupported(format!(
            "the header has no room for a backing name of {new} bytes in the place of one of {old}: take a shorter name"
        ))),
    }
}
