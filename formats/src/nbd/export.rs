//! What a server tells of its disks.
use super::reply::Style;
use super::wire::{PORTABLE_PAYLOAD_MAX, transmission_flag};

/// One disk, as a client may see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name: at most 4096 bytes.
    pub name: String,
    /// A few words for people; may be empty. At most 4096 bytes.
    pub description: String,
    /// Bytes, at most 2^63 - 1.
    pub size: u64,
    /// Nobody can write to it.
    pub read_only: bool,
    /// A flush on one connection covers what was answered on all of them.
    pub multi_conn: bool,
    /// FAST_ZERO is honoured: zeroing that would be no faster than writing is refused at once.
    pub fast_zero: bool,
    /// The sizes that requests should have.
    pub block_sizes: BlockSizes,
    /// Names of the dirty bitmaps that can be asked for, each of at most 1023 bytes; the first 30 can.
    pub bitmaps: Vec<String>,
}

/// The sizes that a client is told, and held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it: a power of two, 1 to 65536. Above 1 a client that
    /// does not ask for the sizes is not served.
    pub minimum: u32,
    /// From here on requests are efficient: a power of two, at least `minimum` and 512.
    pub preferred: u32,
    /// Longest payload of a READ or WRITE.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// Any alignment; whole pages are best; 32 MiB at once.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: PORTABLE_PAYLOAD_MAX }
    }
}

impl ExportInfo {
    /// The export's transmission flags for a client that chose `style`, and contexts or none.
    pub fn transmission_flags(&self, style: Style, contexts: bool) -> u16 {
        use transmission_flag as flag;
        let writable = !self.read_only;
        [
            (true, flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE),
            (self.read_only, flag::READ_ONLY),
            (writable, flag::SEND_TRIM | flag::SEND_WRITE_ZEROES),
            (writable && self.fast_zero, flag::SEND_FAST_ZERO),
            (style != Style::Simple, flag::SEND_DF),
            (style == Style::Extended && contexts, flag::BLOCK_STATUS_PAYLOAD),
            (self.multi_conn, flag::CAN_MULTI_CONN),
        ]
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |flags, (_, more)| flags | more)
    }
}

/// The disks that can be asked for. May change from one call to the next.
pub trait Exports {
    /// The disk of this name. The empty name is the default disk, whatever its own name is.
    fn lookup(&self, name: &str) -> Option<ExportInfo>;

    /// All of them, the default one first.
    fn list(&self) -> Vec<ExportInfo>;
}

/// A table that does not change; its first disk is the default.
impl Exports for [ExportInfo] {
    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        match name {
            "" => self.first(),
            name => self.iter().find(|export| export.name == name),
        }
        .cloned()
    }

    fn list(&self) -> Vec<ExportInfo> {
        self.to_vec()
    }
}
