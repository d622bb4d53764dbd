//! What replies look like, in each of the three ways that a client may have chosen.
//!
//! ```text
//! simple      16 bytes, then a READ's data
//! structured  chunks of 20 bytes and their content; a simple reply where there is nothing to say
//! extended    chunks of 32 bytes and their content, always
//! ```
//!
//! What varies in length (data, lists of extents) is its caller's to place behind the heads that are
//! made here, so nothing is copied for it.
use super::wire::{CHUNK_DONE, EXTENDED_REPLY_MAGIC, Errno, SIMPLE_REPLY_MAGIC, STRING_LEN_MAX};
use super::wire::{STRUCTURED_REPLY_MAGIC, chunk};

/// Extents that a chunk of them should not exceed: 2^20.
pub const BLOCK_EXTENTS_MAX: usize = 1 << 20;
/// Bytes of a simple reply before its data.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// The longest head: an extended hole.
const HEAD_MAX: usize = 32 + 12;

/// How a client wants its replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// As in the protocol's beginnings.
    #[default]
    Simple,
    /// In chunks: STRUCTURED_REPLY.
    Structured,
    /// In chunks with 64-bit heads: EXTENDED_HEADERS.
    Extended,
}

/// The request that a reply is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// How its client wants replies.
    pub style: Style,
    /// The client's name for it.
    pub cookie: u64,
    /// Its offset.
    pub offset: u64,
}

/// Bytes of a reply before what varies in length.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD_MAX],
    len: usize,
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Head {
    fn new() -> Self {
        Self { bytes: [0; HEAD_MAX], len: 0 }
    }

    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        self.bytes[self.len..self.len + N].copy_from_slice(&field);
        self.len += N;
        self
    }

    fn u16(self, value: u16) -> Self {
        self.put(value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(value.to_be_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(value.to_be_bytes())
    }
}

impl ReplyTo {
    /// All is done and there is nothing to say. Of a READ without chunks, the data follows.
    pub fn done(&self) -> Head {
        match self.style {
            // Only a READ has to have a chunk; a simple reply is shorter.
            Style::Simple | Style::Structured => self.simple(0),
            Style::Extended => self.chunk(CHUNK_DONE, chunk::NONE, 0),
        }
    }

    /// `len` bytes of the disk from `offset` on, which follow. At least 1, at most `u32::MAX - 8`.
    pub fn data(&self, offset: u64, len: u32, done: bool) -> Head {
        debug_assert!(len > 0 && self.style != Style::Simple);
        self.chunk(u16::from(done), chunk::OFFSET_DATA, len + 8).u64(offset)
    }

    /// `len` bytes from `offset` on are zeroes. At least 1.
    pub fn hole(&self, offset: u64, len: u32, done: bool) -> Head {
        debug_assert!(len > 0 && self.style != Style::Simple);
        self.chunk(u16::from(done), chunk::OFFSET_HOLE, 12).u64(offset).u32(len)
    }

    /// `count` extents of the metadata context `context`, which follow: 1 to `BLOCK_EXTENTS_MAX`.
    pub fn block_status(&self, context: u32, count: usize, done: bool) -> Head {
        debug_assert!((1..=BLOCK_EXTENTS_MAX).contains(&count) && self.style != Style::Simple);
        let (flags, count) = (u16::from(done), count as u32);
        match self.style {
            Style::Extended => self.chunk(flags, chunk::BLOCK_STATUS_EXT, 8 + count * 16).u32(context).u32(count),
            _ => self.chunk(flags, chunk::BLOCK_STATUS, 4 + count * 8).u32(context),
        }
    }

    /// One extent of a chunk of them: `len` bytes, at least 1, with the flags of `state`. Without
    /// extended headers a longer one than 32 bits can say is cut: the client asks on.
    pub fn extent(&self, len: u64, state: u32) -> Head {
        debug_assert!(len > 0);
        match self.style {
            Style::Extended => Head::new().u64(len).u64(state.into()),
            // The largest whole number of sectors.
            _ => Head::new().u32(u32::try_from(len).unwrap_or(!511)).u32(state),
        }
    }

    /// It failed, and in words why: cut to the protocol's longest, and left out of simple replies.
    pub fn error(&self, error: Errno, message: &str) -> Vec<u8> {
        if self.style == Style::Simple {
            return self.simple(error as u32).to_vec();
        }
        let message = prefix(message, STRING_LEN_MAX).as_bytes();
        let head = self.chunk(CHUNK_DONE, chunk::ERROR, 6 + message.len() as u32);
        [&head.u32(error as u32).u16(message.len() as u16), message].concat()
    }

    fn simple(&self, error: u32) -> Head {
        Head::new().u32(SIMPLE_REPLY_MAGIC).u32(error).u64(self.cookie)
    }

    fn chunk(&self, flags: u16, kind: u16, len: u32) -> Head {
        match self.style {
            Style::Extended => {
                let head = Head::new().u32(EXTENDED_REPLY_MAGIC).u16(flags).u16(kind).u64(self.cookie);
                head.u64(self.offset).u64(len.into())
            }
            _ => Head::new().u32(STRUCTURED_REPLY_MAGIC).u16(flags).u16(kind).u64(self.cookie).u32(len),
        }
    }
}

/// The longest prefix of `text` of at most `len_max` bytes that is whole characters.
fn prefix(text: &str, len_max: usize) -> &str {
    let mut len = text.len().min(len_max);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::state;

    /// Bytes as they are in the protocol's tables, spaces for reading.
    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
        let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("two hex digits");
        digits.chunks(2).map(byte).collect()
    }

    const COOKIE: u64 = 0x0102_0304_0506_0708;

    fn to(style: Style) -> ReplyTo {
        ReplyTo { style, cookie: COOKIE, offset: 0x1000 }
    }

    #[test]
    fn simple_replies_are_the_protocols_bytes() {
        assert_eq!(to(Style::Simple).done()[..], hex("67446698 00000000 0102030405060708"));
        assert_eq!(to(Style::Simple).error(Errno::NoSpace, "no"), hex("67446698 0000001c 0102030405060708"));
    }

    #[test]
    fn structured_replies_are_the_protocols_bytes() {
        let to = to(Style::Structured);
        assert_eq!(to.done()[..], hex("67446698 00000000 0102030405060708"));
        let head = to.data(0x1000, 512, false);
        assert_eq!(head[..], hex("668e33ef 0000 0001 0102030405060708 00000208 0000000000001000"));
        let hole = to.hole(0x1000, 512, true);
        assert_eq!(hole[..], hex("668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000200"));
        let status = to.block_status(7, 2, true);
        assert_eq!(status[..], hex("668e33ef 0001 0005 0102030405060708 00000014 00000007"));
        assert_eq!(to.extent(0x10000, state::HOLE | state::ZERO)[..], hex("00010000 00000003"));
        assert_eq!(to.extent(1 << 40, 0)[..], hex("fffffe00 00000000"));
        let error = to.error(Errno::Io, "no");
        assert_eq!(error, hex("668e33ef 0001 8001 0102030405060708 00000008 00000005 0002 6e6f"));
    }

    #[test]
    fn extended_replies_are_the_protocols_bytes() {
        let to = to(Style::Extended);
        let head = "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000";
        assert_eq!(to.done()[..], hex(head));
        let data = "6e8a278c 0000 0001 0102030405060708 0000000000001000 0000000000000208 0000000000001200";
        assert_eq!(to.data(0x1200, 512, false)[..], hex(data));
        let hole = "6e8a278c 0001 0002 0102030405060708 0000000000001000 000000000000000c 0000000000001200 00000200";
        assert_eq!(to.hole(0x1200, 512, true)[..], hex(hole));
        let status = "6e8a278c 0000 0006 0102030405060708 0000000000001000 0000000000000028 00000007 00000002";
        assert_eq!(to.block_status(7, 2, false)[..], hex(status));
        assert_eq!(to.extent(1 << 40, 3)[..], hex("0000010000000000 0000000000000003"));
        let error = "6e8a278c 0001 8001 0102030405060708 0000000000001000 0000000000000008 00000005 0002 6e6f";
        assert_eq!(to.error(Errno::Io, "no"), hex(error));
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let message = "é".repeat(3000);
        let to = to(Style::Structured);
        assert_eq!(to.error(Errno::Io, &message).len(), 20 + 6 + 4096);
        assert_eq!(to.error(Errno::Io, &format!("x{message}")).len(), 20 + 6 + 4095);
    }
}
