//! The protocol's numbers, and the headers of requests. All numbers are big endian on the wire.
use super::reply::Style;

/// The first eight bytes a server sends: `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// What follows them in newstyle, and what each option starts with: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What each reply to an option starts with.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What each request starts with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What each request with a 64-bit header starts with.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// What a simple reply starts with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply starts with.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// What a chunk of an extended reply starts with.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

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
    /// The server could, but was told not to.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
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
    /// Extended headers were chosen, and there is no way back.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
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
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// WRITE_ZEROES's flag FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may name some of the contexts. Only with extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
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
    /// The length is that of a payload, which follows. Only with extended headers.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks; errors have bit 15.
pub mod chunk {
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Bytes of the disk.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes of the disk.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// The same with 64-bit extents.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// What makes a chunk an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The only flag of a chunk: the reply's last.
pub const CHUNK_DONE: u16 = 1 << 0;

/// Flags of `base:allocation`'s extents.
pub mod state {
    /// Takes no space: a write there may find none.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What can be asked in the transmission phase, by number.
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
    /// These bytes will be wanted soon.
    Cache = 5,
    /// These bytes read as zeroes from now on.
    WriteZeroes = 6,
    /// What of this is a hole, what zero?
    BlockStatus = 7,
}

impl Command {
    /// The command of this number, where it is known here.
    pub fn from_wire(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            _ => return None,
        })
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

/// Bytes of the longest header of a request.
pub const HEADER_LEN_MAX: usize = 32;

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
    /// How many bytes, of the disk or of a payload.
    pub len: u64,
}

impl Header {
    /// Bytes of a request's header from a client that chose `style`.
    pub fn bytes(style: Style) -> usize {
        match style {
            Style::Extended => 32,
            Style::Simple | Style::Structured => 28,
        }
    }

    /// What the bytes of a header ask for; `None` where they do not begin with the request's magic,
    /// after which nothing on that connection can be trusted to be a header.
    pub fn parse(style: Style, bytes: &[u8]) -> Option<Self> {
        let extended = style == Style::Extended;
        let mut fields = Fields(bytes);
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        (fields.u32()? == magic).then_some(())?;
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: if extended { fields.u64()? } else { fields.u32()?.into() },
        })
    }

    /// The bytes that ask for it, in 28 bytes. `len` has 32 bits.
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = u32::try_from(self.len).expect("a length that this header has room for");
        let kind = [self.flags, self.command].map(u16::to_be_bytes).concat();
        let place = [self.cookie, self.offset].map(u64::to_be_bytes).concat();
        [&REQUEST_MAGIC.to_be_bytes()[..], &kind, &place, &len.to_be_bytes()].concat()
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
        let want =
            Header { flags: 5, command: 6, cookie: 0x1122_3344_5566_7788, offset: (1 << 32) + 512, len: 0xffff_ffff };
        assert_eq!(Header::parse(Style::Structured, &bytes), Some(want));
        let bytes = hex("21e41c71 0005 0006 1122334455667788 0000000100000200 00000001ffffffff");
        assert_eq!(Header::parse(Style::Extended, &bytes), Some(Header { len: 0x1_ffff_ffff, ..want }));
    }

    #[test]
    fn only_the_request_magic_is_a_request() {
        // What was not negotiated, and two of the past.
        for (style, magic) in [
            (Style::Structured, "21e41c71"),
            (Style::Extended, "25609513"),
            (Style::Simple, "12560953"),
            (Style::Extended, "25609514"),
            (Style::Simple, "00000000"),
        ] {
            let bytes = hex(&format!("{magic} 0000 0000 0000000000000000 0000000000000000 0000000000000000"));
            assert_eq!(Header::parse(style, &bytes[..Header::bytes(style)]), None, "{magic}");
        }
    }

    #[test]
    fn system_errors_get_the_protocols_numbers() {
        for (system, want) in [(1, 1), (13, 1), (30, 1), (5, 5), (28, 28), (27, 28), (122, 28), (22, 5), (110, 5)] {
            assert_eq!(Errno::from_system(system) as u32, want, "errno {system}");
        }
    }
}
