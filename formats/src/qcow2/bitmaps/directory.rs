//! Reads the directory of the bitmaps and their tables; every number in them is checked.
use crate::error::{Context, Error, Result};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::records::Records;
use crate::qcow2::table;
use crate::storage::Storage;

/// As in QEMU.
const BITMAPS_MAX: u32 = 65535;
const DIRECTORY_BYTES_MAX: u64 = 1024 * 65535;
const NAME_MAX: u16 = 1023;
/// Largest table of one bitmap, as in QEMU: 128 MiB.
const TABLE_ENTRIES_MAX: u32 = (128 << 20) / 8;
/// A bit stands for 2 to this bytes of the disk.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// Flags of an entry.
pub(super) const IN_USE: u32 = 1;
/// Where they are in an entry.
pub(super) const FLAGS_AT: u64 = 12;
pub(super) const AUTO: u32 = 1 << 1;
const EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The only type there is: bits of what was written.
pub(super) const DIRTY_TRACKING: u8 = 1;

/// A table's entry of a cluster of bits that are all set; one of zero says that none is.
pub(super) const ALL_ONES: u64 = 1;
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What the header says of the bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// How many there are.
    pub count: u32,
    /// Bytes of their directory.
    pub directory_bytes: u64,
    /// Where it is in the file.
    pub directory_offset: u64,
}

/// One persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The name by which tools address it.
    pub name: String,
    /// A bit stands for 2 to this bytes of the disk.
    pub granularity_bits: u32,
    /// Somebody was to write it back and has not: it says nothing.
    pub in_use: bool,
    /// Writes to the disk set its bits.
    pub auto: bool,
    /// Its bits are what its flags say: it is not in use, its kind is known, and the autoclear bit is set.
    pub consistent: bool,
    /// Where its table is in the file.
    pub table_offset: u64,
    /// How many entries that has.
    pub table_entries: u32,
    /// Where its entry of the directory is in the file.
    pub entry_offset: u64,
    /// The flags of that.
    pub flags: u32,
}

/// Reads the directory. Takes at most some 64 MiB of memory, and only as much as the file has.
pub fn read(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.bitmaps else { return Ok(Vec::new()) };
    extension.check(header.geometry)?;
    let Extension { count, directory_bytes, directory_offset } = extension;
    let mut records = Records::new(storage, "the bitmap directory", directory_offset, directory_bytes)?;
    let bitmaps: Result<Vec<Bitmap>> = (0..count).map(|_| read_one(&mut records, header)).collect();
    let end = directory_offset + directory_bytes;
    match records.at() {
        at if at == end => bitmaps,
        at => bitmaps.and(Err(Error::malformed(format!("the bitmap directory ends at {at}, its size says {end}")))),
    }
}

/// Reads the table of `bitmap`: at most 128 MiB. Each entry is the place of a cluster of bits, 0, or
/// `ALL_ONES`.
pub fn read_table(storage: &dyn Storage, header: &Header, bitmap: &Bitmap) -> Result<Vec<u64>> {
    let Bitmap { name, table_offset, table_entries, .. } = bitmap;
    let end = table_offset + u64::from(*table_entries) * 8;
    if end > storage.len().context(|| "asking for the file's length")? {
        return Err(Error::malformed(format!(
            "bitmap {name}: its table at {table_offset} is past the end of the file"
        )));
    }
    let entries = table::read(storage, *table_offset, *table_entries as usize)
        .context(|| format!("reading the table of bitmap {name} at {table_offset}"))?;
    let aligned = |entry: u64| entry & !TABLE_OFFSET == 0 && entry & (header.geometry.cluster_size() - 1) == 0;
    match entries.iter().position(|entry| !aligned(*entry) && *entry != ALL_ONES) {
        None => Ok(entries),
        Some(index) => Err(Error::malformed(format!(
            "bitmap {name}: entry {index} of its table is {:#018x}: no cluster's start",
            entries[index]
        ))),
    }
}

impl Extension {
    /// Reads what stands in the header.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let Some(data) = data.first_chunk::<24>() else {
            return Err(Error::malformed(format!("the bitmaps extension has {} bytes, 24 are needed", data.len())));
        };
        let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|nth| data[at + nth]));
        Ok(Self { count: (word(0) >> 32) as u32, directory_bytes: word(8), directory_offset: word(16) })
    }

    fn check(self, geometry: Geometry) -> Result<()> {
        let Self { count, directory_bytes, directory_offset } = self;
        if count > BITMAPS_MAX {
            return Err(Error::unsupported(format!("nb_bitmaps {count} is above the limit of {BITMAPS_MAX}")));
        }
        if directory_bytes > DIRECTORY_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "bitmap_directory_size {directory_bytes} is above the limit of {DIRECTORY_BYTES_MAX}"
            )));
        }
        geometry.check_table("bitmap_directory_offset", directory_offset, directory_bytes)
    }
}

fn read_one(records: &mut Records<'_>, header: &Header) -> Result<Bitmap> {
    let start = records.at();
    let (table_offset, table_entries, flags) = (records.u64()?, records.u32()?, records.u32()?);
    let [kind, granularity] = records.array()?;
    let (name_len, extra_len) = (records.u16()?, records.u32()?);
    let wrong = |what: String| Err(Error::malformed(format!("the bitmap at {start} of the directory: {what}")));
    if table_entries > TABLE_ENTRIES_MAX {
        return wrong(format!("bitmap_table_size {table_entries} is above the limit of 128 MiB"));
    }
    if !GRANULARITY_BITS.contains(&granularity) {
        return wrong(format!("granularity_bits {granularity} are not from 9 to 31"));
    }
    if name_len == 0 || name_len > NAME_MAX {
        return wrong(format!("name_size {name_len} is not from 1 to {NAME_MAX}"));
    }
    header.geometry.check_table("bitmap_table_offset", table_offset, u64::from(table_entries) * 8)?;
    records.skip(u64::from(extra_len))?;
    let name = records.text(usize::from(name_len))?;
    records.skip((records.at() - start).next_multiple_of(8) - (records.at() - start))?;
    let known = kind == DIRTY_TRACKING
        && flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0
        && (extra_len == 0 || flags & EXTRA_COMPATIBLE != 0);
    let in_use = flags & IN_USE != 0;
    Ok(Bitmap {
        name,
        granularity_bits: u32::from(granularity),
        in_use,
        auto: flags & AUTO != 0,
        consistent: known && !in_use && header.autoclear & autoclear::BITMAPS != 0,
        table_offset,
        table_entries,
        entry_offset: start,
        flags,
    })
}
