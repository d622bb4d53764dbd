//! Tables of 64-bit entries, big endian in the file.
use crate::storage::Storage;
use std::io;

/// Reads `count` entries at `at`.
pub fn read(storage: &dyn Storage, at: u64, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    storage.read_at(at, &mut bytes)?;
    Ok(decode(&bytes))
}

/// Entries as they are in memory.
pub fn decode(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().copied().map(u64::from_be_bytes).collect()
}

/// Adds entries as they are in a file.
pub fn encode(entries: impl IntoIterator<Item = u64>, bytes: &mut Vec<u8>) {
    bytes.extend(entries.into_iter().flat_map(u64::to_be_bytes));
}
