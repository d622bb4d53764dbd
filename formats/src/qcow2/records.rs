//! Records of different lengths, one after the other in the file: the snapshot table and the bitmap
//! directory. Read through a window, so that no length in the file decides how much memory is taken.
use crate::error::{Context, Error, Result};
use crate::storage::Storage;

/// How much is read at a time.
const WINDOW: u64 = 64 << 10;

/// Reads records from one place on, up to another.
pub struct Records<'a> {
    storage: &'a dyn Storage,
    what: &'static str,
    at: u64,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> Records<'a> {
    /// The records of `what` from `at` on, `len_max` bytes at most.
    pub fn new(storage: &'a dyn Storage, what: &'static str, at: u64, len_max: u64) -> Result<Self> {
        let file_len = storage.len().context(|| "asking for the file's length")?;
        let end = at.saturating_add(len_max).min(file_len);
        Ok(Self { storage, what, at, end, window: Vec::new(), window_at: at })
    }

    /// Where the next byte is in the file.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The next `len` bytes, at most 64 KiB.
    pub fn bytes(&mut self, len: usize) -> Result<&[u8]> {
        let end = self.at + len as u64;
        if end > self.end {
            let (what, at, end) = (self.what, self.at, self.end);
            return Err(Error::malformed(format!("{what}: {len} bytes at {at} do not fit before {end}")));
        }
        if end > self.window_at + self.window.len() as u64 {
            self.window.resize(WINDOW.min(self.end - self.at) as usize, 0);
            self.storage
                .read_at(self.at, &mut self.window)
                .context(|| format!("reading {} at {}", self.what, self.at))?;
            self.window_at = self.at;
        }
        let start = (self.at - self.window_at) as usize;
        self.at = end;
        Ok(&self.window[start..start + len])
    }

    /// Steps over `len` bytes.
    pub fn skip(&mut self, len: u64) -> Result<()> {
        self.at += len;
        if self.at <= self.end {
            return Ok(());
        }
        Err(Error::malformed(format!("{}: it does not end before {}", self.what, self.end)))
    }

    /// The next `len` bytes as text; what is not UTF-8 is replaced.
    pub fn text(&mut self, len: usize) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes(len)?).into_owned())
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }
}
