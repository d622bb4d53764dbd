//! The bytes that an image's metadata is read from and written to.
//!
//! The engine gives a file, the tests give memory with durable and volatile bytes. There is no
//! flush here: an image says when one is needed (`image::Settle::Flush`), and its caller does it
//! without making anybody wait.
use std::io;

/// Where metadata lives. Positional, and usable from several threads at once.
#[expect(clippy::len_without_is_empty, reason = "a file without bytes is nothing special")]
pub trait Storage: Send + Sync {
    /// Fills `bytes` from `at`. What lies past the end is `UnexpectedEof`.
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `at`, growing the file where it ends before.
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// How many bytes the file takes on its file system; its length where that is not known.
    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    /// Cuts or grows the file; what is new reads as zeroes and takes no space.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// True where its length is not ours to change: a block device.
    fn is_fixed(&self) -> bool {
        false
    }

    /// The first offset from `at` on that is not in a hole; `None` where only a hole follows.
    ///
    /// A storage that knows no holes says `Some(at)` for everything before its end. One that has looked
    /// only so far may answer with where it stopped, behind `at`.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>>;

    /// The first offset from `at` on that is in a hole, or the end of the file; or, as above, where the
    /// storage stopped to look.
    fn next_hole(&self, at: u64) -> io::Result<u64>;
}
