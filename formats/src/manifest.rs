//! Manifests: what a disk holds, as a hash for each range of it, in text.
//!
//! ```text
//! blkmirror-manifest 1 size=3145728 range=1048576 hash=blake3
//! 0 488de202f73bd976de4e7048f4e1f39a776d86d582b7348ff53bf432b987fca8
//! 1048576 488de202f73bd976de4e7048f4e1f39a776d86d582b7348ff53bf432b987fca8
//! 2097152 488de202f73bd976de4e7048f4e1f39a776d86d582b7348ff53bf432b987fca8
//! ```
//!
//! A line for each range, in order: where it begins, and the hash of its bytes as the disk reads them, whatever its format.
//! The last range may be shorter. What follows the last line is an error, as is a line that is missing: a manifest that was
//! cut is no manifest.
use crate::error::{Error, Result};
use crate::range::ByteRange;
use std::fmt;

/// The longest line that a manifest can have, its end included.
pub const LINE_LEN_MAX: usize = 128;
/// Bytes of a range where nobody asked for another length.
pub const RANGE_LEN: u64 = 1 << 20;
/// Bytes of the longest range that is read at once.
const RANGE_LEN_MAX: u64 = 64 << 20;

/// The first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a range.
    pub range_len: u64,
}

impl Header {
    /// The header of a disk of `size` bytes.
    pub fn of(size: u64) -> Self {
        Self { size, range_len: RANGE_LEN }
    }

    /// The first line of a manifest, without its end.
    ///
    /// # Errors
    /// What is wrong with it, by name.
    pub fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        if words.next() != Some("blkmirror-manifest") {
            return Err(Error::malformed("it does not begin as a manifest does"));
        }
        let version = words.next().unwrap_or_default();
        if version != "1" {
            return Err(Error::unsupported(format!("version '{}' of a manifest is not known", short(version))));
        }
        let size = number(words.next(), "size")?;
        let range_len = number(words.next(), "range")?;
        match words.next() {
            Some("hash=blake3") => {}
            other => {
                let other = short(other.unwrap_or_default());
                return Err(Error::unsupported(format!("'{other}' where hash=blake3 was expected")));
            }
        }
        if words.next().is_some() {
            return Err(Error::malformed("its first line goes on behind the hash"));
        }
        if !(512..=RANGE_LEN_MAX).contains(&range_len) || size > i64::MAX as u64 {
            return Err(Error::malformed(format!("size={size} or range={range_len} is out of bounds")));
        }
        Ok(Self { size, range_len })
    }

    /// The range that begins at `at`.
    pub fn range(self, at: u64) -> ByteRange {
        ByteRange { start: at, end: at.saturating_add(self.range_len).min(self.size) }
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blkmirror-manifest 1 size={} range={} hash=blake3", self.size, self.range_len)
    }
}

/// A line of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it begins.
    pub at: u64,
    /// The hash of its bytes.
    pub hash: [u8; 32],
}

impl Entry {
    /// A line of a manifest, without its end.
    ///
    /// # Errors
    /// That it is none.
    pub fn parse(line: &str) -> Result<Self> {
        let wrong = || Error::malformed(format!("'{}' is no line of a manifest", short(line)));
        let (at, hash) = line.split_once(' ').ok_or_else(wrong)?;
        let is_number = at.bytes().all(|byte| byte.is_ascii_digit());
        let at = at.parse().ok().filter(|_| is_number).ok_or_else(wrong)?;
        if hash.len() != 64 || !hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (number, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hash[2 * number..][..2], 16).map_err(|_| wrong())?;
        }
        Ok(Self { at, hash: bytes })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.at)?;
        self.hash.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn number(word: Option<&str>, name: &str) -> Result<u64> {
    let value = word.and_then(|word| word.strip_prefix(name)).and_then(|rest| rest.strip_prefix('='));
    let digits = value.filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|value| value.parse().ok()).ok_or_else(|| {
        let word = short(word.unwrap_or_default());
        Error::malformed(format!("'{word}' where {name}=NUMBER was expected"))
    })
}

/// A word that is not ours may be of any length.
fn short(word: &str) -> String {
    word.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::{Entry, Header, LINE_LEN_MAX};

    #[test]
    fn what_is_written_is_read() {
        for (size, range_len) in [(0, 512), (3 << 20, 1 << 20), (i64::MAX as u64, 64 << 20)] {
            let header = Header { size, range_len };
            assert_eq!(Header::parse(&header.to_string()).expect("our own"), header);
            assert!(header.to_string().len() < LINE_LEN_MAX);
        }
        let hash = std::array::from_fn(|number| number as u8 * 7);
        for at in [0, 1 << 20, u64::MAX] {
            let entry = Entry { at, hash };
            assert_eq!(Entry::parse(&entry.to_string()).expect("our own"), entry);
            assert!(entry.to_string().len() < LINE_LEN_MAX);
        }
    }

    #[test]
    fn what_is_no_manifest_is_refused_by_name() {
        for (line, what) in [
            ("", "does not begin"),
            ("blkmirror-manifest 2 size=1 range=512 hash=blake3", "version '2'"),
            ("blkmirror-manifest 1 size=-1 range=512 hash=blake3", "size=NUMBER"),
            ("blkmirror-manifest 1 size=1 range=+512 hash=blake3", "range=NUMBER"),
            ("blkmirror-manifest 1 size=1 range=511 hash=blake3", "out of bounds"),
            ("blkmirror-manifest 1 size=1 range=512 hash=md5", "'hash=md5'"),
            ("blkmirror-manifest 1 size=1 range=512 hash=blake3 x", "goes on"),
        ] {
            let error = Header::parse(line).expect_err(line).one_line();
            assert!(error.contains(what), "{line}: {error}");
        }
        let hash = "0".repeat(64);
        for line in
            [String::new(), hash.clone(), format!("+1 {hash}"), format!("1 {hash}0"), format!("1 {}é", &hash[2..])]
        {
            assert!(Entry::parse(&line).is_err(), "{line}");
        }
    }
}
