//! Bitmaps that an image takes over from another one, at a pivot.
//!
//! Up to the image's close they are in memory alone: after a kill the file has none of them. At the close
//! they get clusters, tables and a new directory, all durable before the header names that; while it
//! changes, the autoclear bit is off, so that a power cut leaves all bitmaps inconsistent at worst.
use super::bits::Bits;
use super::directory::{AUTO, Bitmap, DIRTY_TRACKING, Extension};
use crate::error::{Context, Error, Result};
use crate::qcow2::header::{AUTOCLEAR_AT, EXTENSION_BITMAPS, Header, autoclear, extension_places};
use crate::qcow2::{Shared, read_header, table};
use std::sync::Arc;

/// A bitmap on its way from one image to another.
#[derive(Clone, Debug)]
pub struct Carried {
    /// The name by which tools address it.
    pub name: String,
    /// A bit stands for 2 to this bytes of the disk.
    pub granularity_bits: u32,
    /// Writes to the disk set its bits.
    pub auto: bool,
    /// The bits.
    pub bits: Arc<Bits>,
}

impl Shared {
    /// Stores what was taken over. Nobody writes any more; `flush` makes the file durable.
    pub(super) fn store_adopted(this: &Arc<Self>, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        let bitmaps = this.bitmaps();
        let adopted = bitmaps.adopted();
        if adopted.is_empty() {
            return Ok(());
        }
        let header = read_header(&*this.storage)?;
        let at = extension_place(&this.read_first_cluster()?, &header)?;
        let old = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0);
        let mut directory = vec![0; old.map_or(0, |old| old.directory_bytes as usize)];
        if let Some(Extension { directory_offset, .. }) = old {
            let read = this.storage.read_at(directory_offset, &mut directory);
            read.context(|| format!("reading the bitmap directory at {directory_offset}"))?;
        }
        for one in adopted {
            let (at, table) = this.write_new(&one.name, one.granularity_bits, &one.bits)?;
            directory.extend(entry(one, at, table.len() as u32));
        }
        let new = Extension {
            count: old.map_or(0, |old| old.count) + adopted.len() as u32,
            directory_bytes: directory.len() as u64,
            directory_offset: this.write_to_new(&directory, "the bitmap directory")?,
        };
        Self::settle_with(this, flush)?;
        this.write_autoclear(header.autoclear & !autoclear::BITMAPS)?;
        flush()?;
        this.storage.write_at(at, &new.to_bytes()).context(|| "writing the bitmaps extension of the header")?;
        flush()?;
        this.write_autoclear(header.autoclear | autoclear::BITMAPS)?;
        flush()?;
        if let Some(old) = old {
            let clusters = old.directory_bytes.div_ceil(this.geometry().cluster_size());
            let places = (0..clusters).map(|nth| old.directory_offset + (nth << this.geometry().cluster_bits));
            this.lock().let_go(&places.collect::<Vec<_>>());
        }
        Ok(())
    }

    /// Writes the bits of a bitmap and its table to new clusters: where the table is, and what is in it.
    pub(super) fn write_new(&self, name: &str, granularity_bits: u32, bits: &Bits) -> Result<(u64, Vec<u64>)> {
        let clusters = Bits::len_bytes(self.geometry().size, granularity_bits).div_ceil(self.geometry().cluster_size());
        let entries = self.write_bits(name, bits, vec![0; clusters as usize], &mut Vec::new())?;
        let mut bytes = Vec::new();
        table::encode(entries.iter().copied(), &mut bytes);
        Ok((self.write_to_new(&bytes, "a bitmap's table")?, entries))
    }

    /// Writes `bytes` to as many new clusters as they need, one after the other; returns their place.
    fn write_to_new(&self, bytes: &[u8], what: &str) -> Result<u64> {
        let cluster = self.geometry().cluster_size();
        let run = self.lock().space()?.take_run((bytes.len() as u64).div_ceil(cluster).max(1))?;
        let at = run.start << self.geometry().cluster_bits;
        let mut padded = bytes.to_vec();
        padded.resize((run.count * cluster) as usize, 0);
        self.storage.write_at(at, &padded).context(|| format!("writing {what} at {at}"))?;
        Ok(at)
    }

    pub(super) fn write_autoclear(&self, bits: u64) -> Result<()> {
        let written = self.storage.write_at(AUTOCLEAR_AT, &bits.to_be_bytes());
        written.context(|| "changing the autoclear features in the header")
    }

    fn read_first_cluster(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.geometry().cluster_size() as usize];
        self.storage.read_at(0, &mut bytes).context(|| "reading the header")?;
        Ok(bytes)
    }
}

/// Where the extension is in the header, or can be: in the place of the mark of the end, which moves back.
fn extension_place(bytes: &[u8], header: &Header) -> Result<u64> {
    let places = extension_places(bytes, header)?;
    if let Some(at) = places.bitmaps {
        return Ok(at);
    }
    let needed = Extension::ENCODED_LEN + 8;
    let room = places.end..places.end + needed;
    // Zeroes behind the extension mark the new end.
    match places.limit >= room.end && bytes[room].iter().all(|byte| *byte == 0) {
        true => Ok(places.end as u64),
        false => Err(Error::unsupported(format!(
            "the header has no room for bitmaps: {needed} bytes are needed in front of the backing name; write the image anew with `qemu-img convert`"
        ))),
    }
}

/// An entry of the directory.
fn entry(one: &Carried, table_offset: u64, table_entries: u32) -> Vec<u8> {
    let mut bytes = table_offset.to_be_bytes().to_vec();
    bytes.extend(table_entries.to_be_bytes());
    bytes.extend((u32::from(one.auto) * AUTO).to_be_bytes());
    // Both fit: see `Bitmap`.
    bytes.extend([DIRTY_TRACKING, one.granularity_bits as u8]);
    bytes.extend((one.name.len() as u16).to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(one.name.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

impl Extension {
    const ENCODED_LEN: usize = 32;

    /// The extension with its own head.
    fn to_bytes(self) -> Vec<u8> {
        let head = [EXTENSION_BITMAPS, 24, self.count, 0];
        let words = [self.directory_bytes, self.directory_offset];
        head.into_iter().flat_map(u32::to_be_bytes).chain(words.into_iter().flat_map(u64::to_be_bytes)).collect()
    }
}

impl Carried {
    /// The same one as it is now, for another image.
    pub(super) fn of(bitmap: &Bitmap, bits: &Bits) -> Self {
        let Bitmap { name, granularity_bits, auto, .. } = bitmap.clone();
        Self { name, granularity_bits, auto, bits: Arc::new(bits.copy()) }
    }
}
