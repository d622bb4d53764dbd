//! The protocol's numbers, and the fixed-size messages of the transmission phase.
//!
//! All numbers are big endian on the wire. What varies in length (payloads, lists of extents) is
//! its caller's to place behind the heads that are made here, so nothing is copied for it.

/// The first eight bytes a server sends: `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// What follows them in newstyle, and what each option starts with: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What each reply to an option starts with.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What each request starts with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply starts with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply starts with.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string of the protocol, in bytes: names, queries, messages.
pub const STRING_LEN_MAX: usize = 4096;
/// Payload that every server should take: 2^25 bytes.
pub const PORTABLE_PAYLOAD_MAX: u32 = 32 << 20;

/// Handshake flags, both ways: what the server offers the client may set.
pub mod handshake_flag {
    /// Options get replies, errors included.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zero bytes after EXPORT_NAME's answer.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake, by number.
pub mod opt {
    /// Choose an export and go, with no way to be told of an error.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// Which exports are there?
    pub const LIST: u32 = 3;
    /// Go on inside TLS.
    pub const STARTTLS: u32 = 5;
    /// What is this export like?
    pub const INFO: u32 = 6;
    /// Choose an export and go.
    pub const GO: u32 = 7;
    /// Reads are answered in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit requests.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options; errors have bit 31.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One fact of an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// What makes a reply an error.
    pub const ERROR: u32 = 1 << 31;
    /// This option is not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option's data is wrong, or it does not belong here.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// Go inside TLS first.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// Ask for INFO_BLOCK_SIZE first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    /// Too long to be looked at.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Facts of an export, by number.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name that LIST would give.
    pub const NAME: u16 = 1;
    /// A few words for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes of any kind are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and its flag NO_HOLE are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// READ's flag DF is understood. Only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// WRITE_ZEROES's flag FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod command_flag {
    /// Answer when it is durable.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: at once, or ENOTSUP at once.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of a structured reply's chunks; errors have bit 15.
pub mod chunk {
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Bytes of the disk.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes of the disk.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// What makes a chunk an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The only flag of a chunk: the reply's last.
pub const CHUNK_DONE: u16 = 1 << 0;

/// The metadata context that this server has.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of `base:allocation`'s extents.
pub mod state {
    /// Takes no space: a write there may find none.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What can be asked in the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Bytes of the disk.
    Read = 0,
    /// Bytes for the disk; they follow the header.
    Write = 1,
    /// Finish what is under way and close. Has no reply.
    Disconnect = 2,
    /// Make durable what was answered.
    Flush = 3,
    /// These bytes are no longer needed.
    Trim = 4,
    /// These bytes read as zeroes from now on.
    WriteZeroes = 6,
    /// What of this is a hole, what zero?
    BlockStatus = 7,
}

impl Command {
    /// The command of this number, where it is known here.
    pub fn from_wire(number: u16) -> Option<Self> {
        use Command::{BlockStatus, Disconnect, Flush, Read, Trim, Write, WriteZeroes};
        let known = [Read, Write, Disconnect, Flush, Trim, WriteZeroes, BlockStatus];
        known.into_iter().find(|command| *command as u16 == number)
    }
}

/// The protocol's error numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: a write to what is read-only.
    Perm = 1,
    /// The disk failed.
    Io = 5,
    /// The request cannot be.
    Inval = 22,
    /// No room, also past the disk's end.
    NoSpace = 28,
    /// Not faster than a write (FAST_ZERO only).
    NotSup = 95,
}

impl Errno {
    /// The protocol's word for a system error that a disk met with.
    ///
    /// EINVAL is not passed on: the request was found right, so it is the disk that failed.
    pub fn from_system(raw_os_error: i32) -> Self {
        match raw_os_error {
            // EPERM, EACCES, EROFS
            1 | 13 | 30 => Self::Perm,
            // ENOSPC; EFBIG and EDQUOT, which the protocol wants as ENOSPC
            28 | 27 | 122 => Self::NoSpace,
            _ => Self::Io,
        }
    }
}

/// Bytes of a request's header.
pub const HEADER_LEN: usize = 28;

/// A request as it came, nothing of it checked but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Flags; see `command_flag`.
    pub flags: u16,
    /// The command's number.
    pub command: u16,
    /// The client's name for it, given back with the reply.
    pub cookie: u64,
    /// Where on the disk.
    pub offset: u64,
    /// How many bytes. 32 bits in this header; the 64-bit header has room for all.
    pub len: u64,
}

impl Header {
    /// What 28 bytes ask for; `None` where they do not begin with the request's magic, after which
    /// nothing on that connection can be trusted to be a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == REQUEST_MAGIC).then_some(())?;
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?.into(),
        })
    }

    /// The bytes that ask for it. `len` has 32 bits.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        let len = u32::try_from(self.len).expect("a length that this header has room for");
        Put(&mut out).u32(REQUEST_MAGIC).u16(self.flags).u16(self.command).u64(self.cookie).u64(self.offset).u32(len);
        out
    }
}

/// Takes big-endian fields off the front of bytes; `None` where they end before.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

/// Bytes of a simple reply's head.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a chunk's head.
pub const CHUNK_LEN: usize = 20;
/// Bytes of an OFFSET_DATA chunk before its data.
pub const OFFSET_DATA_LEN: usize = CHUNK_LEN + 8;
/// Bytes of an OFFSET_HOLE chunk.
pub const OFFSET_HOLE_LEN: usize = CHUNK_LEN + 12;
/// Bytes of a BLOCK_STATUS chunk before its extents.
pub const BLOCK_STATUS_LEN: usize = CHUNK_LEN + 4;
/// Bytes of one extent in a BLOCK_STATUS chunk.
pub const BLOCK_EXTENT_LEN: usize = 8;
/// Extents that a BLOCK_STATUS chunk should not exceed: 2^20.
pub const BLOCK_EXTENTS_MAX: usize = 1 << 20;

/// A simple reply. A successful READ's bytes follow it.
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_REPLY_LEN] {
    let mut out = [0; SIMPLE_REPLY_LEN];
    let mut put = Put(&mut out);
    put.u32(SIMPLE_REPLY_MAGIC).u32(error.map_or(0, |error| error as u32)).u64(cookie);
    out
}

/// The chunk that says that all is said.
pub fn none_chunk(cookie: u64) -> [u8; CHUNK_LEN] {
    let mut out = [0; CHUNK_LEN];
    Put(&mut out).chunk(CHUNK_DONE, chunk::NONE, cookie, 0);
    out
}

/// The head of a chunk of `len` bytes of the disk from `offset` on, which follow. `len` is at
/// least 1 and at most `u32::MAX - 8`.
pub fn offset_data_chunk(cookie: u64, offset: u64, len: u32, done: bool) -> [u8; OFFSET_DATA_LEN] {
    debug_assert!(len > 0);
    let mut out = [0; OFFSET_DATA_LEN];
    Put(&mut out).chunk(u16::from(done), chunk::OFFSET_DATA, cookie, len + 8).u64(offset);
    out
}

/// A chunk that says that `len` bytes from `offset` on are zeroes. `len` is at least 1.
pub fn offset_hole_chunk(cookie: u64, offset: u64, len: u32, done: bool) -> [u8; OFFSET_HOLE_LEN] {
    debug_assert!(len > 0);
    let mut out = [0; OFFSET_HOLE_LEN];
    Put(&mut out).chunk(u16::from(done), chunk::OFFSET_HOLE, cookie, 12).u64(offset).u32(len);
    out
}

/// The head of a chunk of `count` extents of the metadata context `context`, which follow. It is
/// the reply's last, for there is one context. `count` is 1 to `BLOCK_EXTENTS_MAX`.
pub fn block_status_chunk(cookie: u64, context: u32, count: usize) -> [u8; BLOCK_STATUS_LEN] {
    debug_assert!((1..=BLOCK_EXTENTS_MAX).contains(&count));
    let mut out = [0; BLOCK_STATUS_LEN];
    let len = 4 + (count * BLOCK_EXTENT_LEN) as u32;
    Put(&mut out).chunk(CHUNK_DONE, chunk::BLOCK_STATUS, cookie, len).u32(context);
    out
}

/// One extent of a BLOCK_STATUS chunk: `len` bytes, at least 1, with the flags of `state`.
pub fn block_extent(len: u32, state: u32) -> [u8; BLOCK_EXTENT_LEN] {
    debug_assert!(len > 0);
    let mut out = [0; BLOCK_EXTENT_LEN];
    Put(&mut out).u32(len).u32(state);
    out
}

/// The chunk that says that the request failed, and in words why, cut to the protocol's longest.
pub fn error_chunk(cookie: u64, error: Errno, message: &str) -> Vec<u8> {
    let message = prefix(message, STRING_LEN_MAX).as_bytes();
    let mut out = vec![0; CHUNK_LEN + 6];
    let mut put = Put(&mut out);
    put.chunk(CHUNK_DONE, chunk::ERROR, cookie, 6 + message.len() as u32);
    put.u32(error as u32).u16(message.len() as u16);
    out.extend_from_slice(message);
    out
}

/// The chunk that says that the request failed at `offset`, a byte of what it asked for.
pub fn error_offset_chunk(cookie: u64, error: Errno, message: &str, offset: u64) -> Vec<u8> {
    let message = prefix(message, STRING_LEN_MAX).as_bytes();
    let mut out = vec![0; CHUNK_LEN + 6];
    let mut put = Put(&mut out);
    put.chunk(CHUNK_DONE, chunk::ERROR_OFFSET, cookie, 14 + message.len() as u32);
    put.u32(error as u32).u16(message.len() as u16);
    out.extend_from_slice(message);
    out.extend_from_slice(&offset.to_be_bytes());
    out
}

/// The longest prefix of `text` of at most `len_max` bytes that is whole characters.
fn prefix(text: &str, len_max: usize) -> &str {
    let mut len = text.len().min(len_max);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

/// Puts big-endian fields one behind the other into bytes that have room for them.
struct Put<'a>(&'a mut [u8]);

impl Put<'_> {
    fn bytes<const N: usize>(&mut self, bytes: [u8; N]) -> &mut Self {
        let (head, rest) = std::mem::take(&mut self.0).split_at_mut(N);
        head.copy_from_slice(&bytes);
        self.0 = rest;
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(value.to_be_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(value.to_be_bytes())
    }

    fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, len: u32) -> &mut Self {
        self.u32(STRUCTURED_REPLY_MAGIC).u16(flags).u16(kind).u64(cookie).u32(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as they are in the protocol's tables, spaces for reading.
    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("two hex digits"))
            .collect()
    }

    #[test]
    fn a_request_is_read_field_by_field() {
        let bytes = hex("25609513 0005 0006 1122334455667788 0000000100000200 ffffffff");
        let header = Header::parse(bytes[..].try_into().expect("28 bytes")).expect("the magic is right");
        let want =
            Header { flags: 5, command: 6, cookie: 0x1122_3344_5566_7788, offset: (1 << 32) + 512, len: 0xffff_ffff };
        assert_eq!(header, want);
    }

    #[test]
    fn only_the_request_magic_is_a_request() {
        // The extended request's, and two of the past: none of them was negotiated.
        for magic in ["21e41c71", "12560953", "25609514", "00000000"] {
            let bytes = hex(&format!("{magic} 0000 0000 0000000000000000 0000000000000000 00000000"));
            assert_eq!(Header::parse(bytes[..].try_into().expect("28 bytes")), None, "{magic}");
        }
    }

    #[test]
    fn replies_are_the_protocols_bytes() {
        let cookie = 0x0102_0304_0506_0708;
        assert_eq!(simple_reply(cookie, None)[..], hex("67446698 00000000 0102030405060708"));
        assert_eq!(simple_reply(cookie, Some(Errno::NoSpace))[..], hex("67446698 0000001c 0102030405060708"));
        assert_eq!(none_chunk(cookie)[..], hex("668e33ef 0001 0000 0102030405060708 00000000"));
        assert_eq!(
            offset_data_chunk(cookie, 0x1000, 512, false)[..],
            hex("668e33ef 0000 0001 0102030405060708 00000208 0000000000001000")
        );
        assert_eq!(
            offset_hole_chunk(cookie, 0x1000, 512, true)[..],
            hex("668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000200")
        );
        assert_eq!(block_status_chunk(cookie, 7, 2)[..], hex("668e33ef 0001 0005 0102030405060708 00000014 00000007"));
        assert_eq!(block_extent(0x10000, state::HOLE | state::ZERO)[..], hex("00010000 00000003"));
        assert_eq!(
            error_chunk(cookie, Errno::Io, "no"),
            hex("668e33ef 0001 8001 0102030405060708 00000008 00000005 0002 6e6f")
        );
        assert_eq!(
            error_offset_chunk(cookie, Errno::Perm, "no", 5),
            hex("668e33ef 0001 8002 0102030405060708 00000010 00000001 0002 6e6f 0000000000000005")
        );
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let message = "é".repeat(3000);
        let chunk = error_chunk(0, Errno::Io, &message);
        assert_eq!(chunk.len(), CHUNK_LEN + 6 + 4096);
        let chunk = error_chunk(0, Errno::Io, &format!("x{message}"));
        assert_eq!(chunk.len(), CHUNK_LEN + 6 + 4095);
    }

    #[test]
    fn system_errors_get_the_protocols_numbers() {
        for (system, want) in [(1, 1), (13, 1), (30, 1), (5, 5), (28, 28), (27, 28), (122, 28), (22, 5), (110, 5)] {
            assert_eq!(Errno::from_system(system) as u32, want, "errno {system}");
        }
    }
}
