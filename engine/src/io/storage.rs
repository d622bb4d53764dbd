//! An image's metadata in a real file, by way of the page cache.
use formats::storage::Storage;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// What the system counts a file's space in, in bytes.
const BLOCK: u64 = 512;

/// A file as a format sees it.
#[derive(Debug)]
pub struct FileStorage(File);

impl FileStorage {
    /// The metadata of `file`.
    pub fn new(file: File) -> Self {
        Self(file)
    }

    /// Makes everything durable that was written before. Waits.
    pub fn flush(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    /// Takes the file system's space for `len` bytes from `at` on; they read as before. Waits.
    pub fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.0, FallocateFlags::empty(), at, len)?)
    }
}

impl Storage for FileStorage {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, at)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    fn len(&self) -> io::Result<u64> {
        // A block device has no length in its metadata, but an end that can be sought.
        Ok(rustix::fs::seek(&self.0, SeekFrom::End(0))?)
    }

    fn allocated(&self) -> io::Result<u64> {
        let metadata = self.0.metadata()?;
        // A block device takes nothing where its node lies.
        if metadata.is_file() { Ok(metadata.blocks() * BLOCK) } else { self.len() }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.0.metadata()?.is_file() {
            true => self.0.set_len(len),
            false if len <= self.len()? => Ok(()),
            false => Err(Errno::NOSPC.into()),
        }
    }

    fn is_fixed(&self) -> bool {
        self.0.metadata().is_ok_and(|metadata| !metadata.is_file())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.0, SeekFrom::Data(at)) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::NXIO) => Ok(None),
            // A file system without holes: everything is data.
            Err(Errno::INVAL) => Ok((at < self.len()?).then_some(at)),
            Err(error) => Err(error.into()),
        }
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.0, SeekFrom::Hole(at)) {
            Ok(hole) => Ok(hole),
            Err(Errno::NXIO | Errno::INVAL) => self.len(),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{FileStorage, Storage};

    #[test]
    fn holes_are_found() {
        let storage = FileStorage::new(tempfile::tempfile().expect("a temporary file"));
        storage.set_len(4 << 20).expect("a sparse file");
        storage.write_at(1 << 20, &[1; 4096]).expect("room");
        assert_eq!(storage.len().expect("a length"), 4 << 20);
        let data = storage.next_data(0).expect("an answer");
        // A file system may know no holes; where it does, they are found to the block.
        assert!(data == Some(0) || data == Some(1 << 20));
        assert!(storage.next_hole(1 << 20).expect("an answer") > 1 << 20);
        assert_eq!(storage.next_data(8 << 20).expect("an answer"), None);
    }
}
