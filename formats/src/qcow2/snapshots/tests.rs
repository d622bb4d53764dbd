use super::{Snapshot, read, table_bytes};
use crate::qcow2::create::{Create, header_bytes};
use crate::qcow2::header::Header;
use crate::storage::Storage;
use std::io;

struct Bytes(Vec<u8>);

impl Storage for Bytes {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let here = self.0.get(at as usize..at as usize + bytes.len());
        bytes.copy_from_slice(here.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!("nothing is written")
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        unreachable!("nothing is written")
    }
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }
    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
}

/// An entry with an L1 table of one entry at 65536.
fn entry(id: &str, name: &str, extra: &[u8]) -> Vec<u8> {
    let mut bytes = 65536_u64.to_be_bytes().to_vec();
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend((id.len() as u16).to_be_bytes());
    bytes.extend((name.len() as u16).to_be_bytes());
    bytes.extend([7_u32, 8].into_iter().flat_map(u32::to_be_bytes));
    bytes.extend(9_u64.to_be_bytes());
    bytes.extend([10, extra.len() as u32].into_iter().flat_map(u32::to_be_bytes));
    bytes.extend(extra);
    bytes.extend(id.as_bytes());
    bytes.extend(name.as_bytes());
    bytes
}

fn read_table(count: u32, entries: &[u8]) -> crate::error::Result<Vec<Snapshot>> {
    let mut file = header_bytes(&Create { cluster_bits: 12, ..Create::new(1 << 20) })?;
    file.resize(4096, 0);
    file[60..64].copy_from_slice(&count.to_be_bytes());
    file[64..72].copy_from_slice(&4096_u64.to_be_bytes());
    let header = Header::parse(&file)?;
    file.extend(entries);
    read(&Bytes(file), &header)
}

#[test]
fn extra_data_says_what_the_short_fields_cannot() {
    let extra: Vec<u8> = [5 << 32, 6 << 32, u64::MAX, 3].into_iter().flat_map(u64::to_be_bytes).collect();
    let mut table = Vec::new();
    for one in [entry("1", "old", &[]), entry("22", "new", &extra[..16]), entry("3", "", &extra)] {
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(one);
    }
    let found = read_table(3, &table).expect("valid");
    let facts: Vec<_> = found
        .iter()
        .map(|one| (one.id.as_str(), one.name.as_str(), one.vm_state_size, one.disk_size, one.icount))
        .collect();
    assert_eq!(
        facts,
        [("1", "old", 10, 1 << 20, None), ("22", "new", 5 << 32, 6 << 32, None), ("3", "", 5 << 32, 6 << 32, None)]
    );
    assert_eq!((found[0].date_sec, found[0].date_nsec, found[0].vm_clock_nsec), (7, 8, 9));
    assert_eq!(table_bytes(&found), table.len() as u64);
}

#[test]
fn tables_that_lie_are_named() {
    let good = entry("1", "name", &[]);
    for (at, field, words) in [
        (0, &65537_u64.to_be_bytes()[..], "snapshot 1: l1_table_offset 0x10001"),
        (8, &u32::MAX.to_be_bytes(), "above the limit of 32 MiB"),
        (12, &u16::MAX.to_be_bytes(), "the snapshot table: 65535 bytes at 4136"),
        (36, &2000_u32.to_be_bytes(), "2000 bytes of extra data"),
    ] {
        let mut bad = good.clone();
        bad[at..at + field.len()].copy_from_slice(field);
        let error = read_table(1, &bad).expect_err("a wrong table").one_line();
        assert!(error.contains(words), "{error}");
    }
    assert!(read_table(2, &good).is_err(), "the second one is not in the file");
}
