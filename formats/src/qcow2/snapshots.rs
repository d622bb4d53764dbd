//! Internal snapshots: the table that names them (qcow2.rst, "Snapshots").
//!
//! Each snapshot has an L1 table of its own. What it shares with the guest's view is counted more
//! than once, and moves when the guest writes to it: see `state` and `reserve`.
use super::header::Header;
use super::records::Records;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Longest snapshot table, as in QEMU: 64 MiB.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Most extra data that a snapshot may have, as in QEMU.
const EXTRA_MAX: u32 = 1024;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// A number in text, by which tools address it.
    pub id: String,
    /// The name that somebody gave it.
    pub name: String,
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// How many entries that table has.
    pub l1_entries: u32,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the machine's state that was saved with it.
    pub vm_state_size: u64,
    /// Bytes of the disk when it was made.
    pub disk_size: u64,
    /// The image says so; otherwise they are the disk's of today.
    pub has_disk_size: bool,
    /// The guest's instruction counter, where it was recorded.
    pub icount: Option<u64>,
    /// Bytes of its entry in the table, without the padding.
    pub entry_bytes: u64,
}

/// Reads the snapshot table. Takes at most some 64 MiB of memory, and only as much as the file has.
pub fn read(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut records = Records::new(storage, "the snapshot table", header.snapshots_offset, TABLE_BYTES_MAX)?;
    (0..header.snapshots).map(|_| read_one(&mut records, header)).collect()
}

/// Bytes of the table that these snapshots are in.
pub fn table_bytes(snapshots: &[Snapshot]) -> u64 {
    snapshots.iter().fold(0, |at: u64, snapshot| at.next_multiple_of(8) + snapshot.entry_bytes)
}

fn read_one(records: &mut Records<'_>, header: &Header) -> Result<Snapshot> {
    // The last one may be without its padding.
    records.skip(records.at().next_multiple_of(8) - records.at())?;
    let start = records.at();
    let (l1_offset, l1_entries) = (records.u64()?, records.u32()?);
    let (id_len, name_len) = (records.u16()?, records.u16()?);
    let (date_sec, date_nsec, vm_clock_nsec) = (records.u32()?, records.u32()?, records.u64()?);
    let (vm_state_size, extra_len) = (u64::from(records.u32()?), records.u32()?);
    if extra_len > EXTRA_MAX {
        return Err(Error::unsupported(format!(
            "the snapshot at {start} has {extra_len} bytes of extra data: more than {EXTRA_MAX} are not supported"
        )));
    }
    let extra = records.bytes(extra_len as usize)?.to_vec();
    let extra = |nth: usize| extra.as_chunks().0.get(nth).copied().map(u64::from_be_bytes);
    let snapshot = Snapshot {
        l1_offset,
        l1_entries,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        vm_state_size: extra(0).unwrap_or(vm_state_size),
        disk_size: extra(1).unwrap_or(header.geometry.size),
        has_disk_size: extra(1).is_some(),
        icount: extra(2).filter(|count| *count != u64::MAX),
        id: records.text(usize::from(id_len))?,
        name: records.text(usize::from(name_len))?,
        entry_bytes: records.at() - start,
    };
    header.geometry.check_l1_table(&format!("snapshot {}: l1_table_offset", snapshot.id), l1_offset, l1_entries)?;
    Ok(snapshot)
}

#[cfg(test)]
mod tests;
