//! The header of an image: what it says, and which of it is not supported (qcow2.rst, "Header").
use super::bitmaps::Extension as BitmapsExtension;
use super::data_file::DataFile;
use super::geometry::Geometry;
use crate::error::{Error, Result};
use std::fmt;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The longest backing name there can be.
pub const BACKING_NAME_MAX: usize = 1023;
/// Where the incompatible features are in a header of version 3.
pub const INCOMPATIBLE_AT: u64 = 72;
/// Where the autoclear features are in a header of version 3.
pub const AUTOCLEAR_AT: u64 = 88;
/// Where the refcount table's offset (8 bytes) and clusters (4 bytes) are.
pub const REFTABLE_AT: u64 = 48;

pub(super) const V2_LEN: usize = 72;
pub(super) const V3_LEN_MIN: usize = 104;
pub(super) const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
pub(super) const EXTENSION_FEATURES: u32 = 0x6803_f857;
pub(super) const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// As in QEMU.
const SNAPSHOTS_MAX: u32 = 65536;
/// QEMU's longest name of a format is 15 bytes.
const FORMAT_NAME_MAX: usize = 64;

/// Bits of the incompatible features.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// Anything may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Payload is in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Clusters are compressed by something other than deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Bits of the compatible features.
pub mod compatible {
    /// Refcounts may be written late, the image being marked dirty.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Bits of the autoclear features.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1;
    /// The external data file is a raw image of the disk by itself.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, which QEMU calls zlib.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// The image that is below another, as its header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name as it is recorded; see `crate::backing`.
    pub name: String,
    /// The format, where it is recorded.
    pub format: Option<String>,
}

/// A header that was found to be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size, refcount and entry width, and size of the disk.
    pub geometry: Geometry,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// How many entries it has: at least those that the disk needs.
    pub l1_entries: u32,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// How many clusters it has.
    pub reftable_clusters: u32,
    /// How many internal snapshots there are.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Incompatible features: none that is not known.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The image below.
    pub backing: Option<Backing>,
    /// Where the persistent bitmaps are, if there are any.
    pub bitmaps: Option<BitmapsExtension>,
    /// The file that the payload is in, where it is another.
    pub data_file: Option<DataFile>,
}

impl Header {
    /// How many bytes from the file's start `parse` wants, given the first ones of them.
    ///
    /// The header, its extensions and the backing name are all in the first cluster. 512 bytes tell.
    pub fn len_wanted(start: &[u8]) -> Result<usize> {
        let bytes = Bytes(start);
        check_magic(bytes)?;
        let bits = bytes.u32(20)?;
        if !(9..=21).contains(&bits) {
            return Err(Error::unsupported(format!(
                "cluster_bits {bits} is not supported: clusters have 512 bytes (9) to 2 MiB (21)"
            )));
        }
        Ok(1 << bits)
    }

    /// Reads a header from the file's first bytes: the first cluster, or the whole file if it is shorter.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = Bytes(bytes);
        check_magic(bytes)?;
        let version = bytes.u32(4)?;
        let (header_len, order, features) = match version {
            2 => (V2_LEN, 4, [0; 3]),
            _ => Self::features(bytes, version)?,
        };
        let mut geometry = Geometry::new(version, bytes.u32(20)?, order, bytes.u64(24)?)?;
        geometry.external_data = features[0] & incompatible::DATA_FILE != 0;
        if features[0] & incompatible::EXTENDED_L2 != 0 {
            geometry = geometry.with_extended_l2()?;
        }
        refuse_encryption(bytes.u32(32)?)?;
        let backing_at = bytes.u64(8)?;
        let extensions = Extensions::parse(bytes, header_len, extensions_end(geometry, backing_at))?;
        refuse_features(features[0], &extensions)?;
        let header = Self {
            geometry,
            l1_entries: bytes.u32(36)?,
            l1_offset: bytes.u64(40)?,
            reftable_offset: bytes.u64(48)?,
            reftable_clusters: bytes.u32(56)?,
            snapshots: bytes.u32(60)?,
            snapshots_offset: bytes.u64(64)?,
            incompatible: features[0],
            compatible: features[1],
            autoclear: features[2],
            compression: compression(bytes, header_len, features[0])?,
            backing: backing(bytes, geometry, backing_at, extensions.backing_format)?,
            data_file: data_file(geometry, features[2], extensions.data_file)?,
            bitmaps: extensions.bitmaps,
        };
        header.check_tables()?;
        Ok(header)
    }

    /// Length of the header, refcount order and the three feature words of a header from version 3 on.
    fn features(bytes: Bytes<'_>, version: u32) -> Result<(usize, u32, [u64; 3])> {
        if version != 3 {
            return Err(Error::unsupported(format!(
                "qcow2 version {version} is not supported: only 2 and 3 are known"
            )));
        }
        let len = bytes.u32(100)? as usize;
        if len < V3_LEN_MIN || !len.is_multiple_of(8) {
            return Err(Error::malformed(format!("header_length {len} is not a multiple of 8 from 104 on")));
        }
        Ok((len, bytes.u32(96)?, [bytes.u64(72)?, bytes.u64(80)?, bytes.u64(88)?]))
    }

    /// The autoclear features that stay true of an image that we write to.
    pub(super) fn autoclear_kept(&self) -> u64 {
        self.autoclear & (autoclear::RAW_DATA_FILE | autoclear::BITMAPS)
    }

    fn check_tables(&self) -> Result<()> {
        let g = self.geometry;
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > Geometry::L1_BYTES_MAX {
            return Err(Error::unsupported(format!("l1_size {} is above the limit of 32 MiB", self.l1_entries)));
        }
        if u64::from(self.l1_entries) < g.l1_entries() {
            return Err(Error::malformed(format!(
                "l1_size {} is too small: a disk of {} bytes needs {} entries",
                self.l1_entries,
                g.size,
                g.l1_entries()
            )));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << g.cluster_bits;
        if reftable_bytes > Geometry::REFTABLE_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "refcount_table_clusters {} is above the limit of 8 MiB",
                self.reftable_clusters
            )));
        }
        if reftable_bytes == 0 {
            return Err(Error::malformed("refcount_table_clusters is 0"));
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(Error::unsupported(format!("nb_snapshots {} is above the limit of 65536", self.snapshots)));
        }
        g.check_table("l1_table_offset", self.l1_offset, l1_bytes)?;
        g.check_table("refcount_table_offset", self.reftable_offset, reftable_bytes)?;
        g.check_table("snapshots_offset", self.snapshots_offset, u64::from(self.snapshots))
    }

    /// True where the last writer did not come to write all refcounts: `check::repair` makes them right.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// True where somebody found the image corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Refuses an image that can be read and must not be written, by name.
    pub fn check_writable(&self) -> Result<()> {
        let refused = |what: &str| Err(Error::unsupported(format!("{what} before the image is written")));
        if self.is_corrupt() {
            return refused(
                "incompatible feature bit 1 (corrupt) is set: mend it with `blkmirror check --repair all FILE`",
            );
        }
        if self.is_dirty() {
            return refused(
                "incompatible feature bit 0 (dirty) is set: mend it with `blkmirror check --repair all FILE`",
            );
        }
        if let Some(data_file) = &self.data_file {
            data_file.check(self.geometry, self.backing.is_some())?;
            if self.snapshots > 0 {
                return refused("internal snapshots of an image with an external data file cannot be: delete them");
            }
        }
        Ok(())
    }
}

impl Geometry {
    /// Refuses an L1 table that cannot be one.
    pub(super) fn check_l1_table(self, field: &str, at: u64, entries: u32) -> Result<()> {
        let bytes = u64::from(entries) * 8;
        if bytes > Self::L1_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "{field} {at:#x}: {entries} entries are above the limit of 32 MiB"
            )));
        }
        self.check_table(field, at, bytes)
    }

    /// Refuses a table of `len` bytes that is not at a cluster's start, or further away than an entry can say.
    pub(super) fn check_table(self, field: &str, at: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if at == 0 || at & (self.cluster_size() - 1) != 0 {
            return Err(Error::malformed(format!("{field} {at:#x} is not at a cluster's start behind the header")));
        }
        match at.checked_add(len) {
            Some(end) if end <= 1 << 56 => Ok(()),
            _ => Err(Error::malformed(format!("{field} {at:#x} is past what an image can have"))),
        }
    }
}

fn check_magic(bytes: Bytes<'_>) -> Result<()> {
    if bytes.get(0, 4)? == MAGIC {
        return Ok(());
    }
    Err(Error::malformed("no qcow2 image: the file does not start with QFI\\xfb"))
}

fn refuse_encryption(method: u32) -> Result<()> {
    let name = match method {
        0 => return Ok(()),
        1 => "AES",
        2 => "LUKS",
        _ => "unknown",
    };
    Err(Error::unsupported(format!(
        "encryption (crypt_method {method}, {name}) is not supported: decrypt the image with `qemu-img convert`"
    )))
}

fn refuse_features(bits: u64, extensions: &Extensions) -> Result<()> {
    use incompatible::{COMPRESSION, CORRUPT, DATA_FILE, DIRTY, EXTENDED_L2};
    let refused = |bit: u32, name: &str, remedy: &str| {
        Err(Error::unsupported(format!("incompatible feature bit {bit} ({name}) is not supported: {remedy}")))
    };
    let unknown = bits & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
    if unknown == 0 {
        return Ok(());
    }
    let bit = unknown.trailing_zeros();
    let name = extensions.incompatible_names.iter().find(|(known, _)| u32::from(*known) == bit);
    refused(bit, name.map_or("unknown", |(_, name)| name), "use a newer program, or `qemu-img convert`")
}

fn compression(bytes: Bytes<'_>, header_len: usize, incompatible: u64) -> Result<Compression> {
    let field = if header_len > 104 { bytes.get(104, 1)?[0] } else { 0 };
    match (incompatible & incompatible::COMPRESSION != 0, field) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (false, other) => Err(Error::malformed(format!(
            "compression_type {other} without incompatible feature bit 3 (compression type)"
        ))),
        (true, 0) => Err(Error::malformed("incompatible feature bit 3 (compression type) without a compression_type")),
        (true, other) => Err(Error::unsupported(format!(
            "compression_type {other} is not supported: write the image anew with `qemu-img convert`"
        ))),
    }
}

fn extensions_end(geometry: Geometry, backing_at: u64) -> usize {
    let cluster = geometry.cluster_size();
    let end = if backing_at == 0 { cluster } else { backing_at.min(cluster) };
    // A cluster has at most 2 MiB.
    end as usize
}

fn backing(bytes: Bytes<'_>, geometry: Geometry, at: u64, format: Option<String>) -> Result<Option<Backing>> {
    if at == 0 {
        return Ok(None);
    }
    let len = bytes.u32(16)? as usize;
    let end = at.checked_add(len as u64).filter(|end| *end <= geometry.cluster_size());
    if len > BACKING_NAME_MAX || end.is_none() {
        return Err(Error::malformed(format!(
            "the backing name ({len} bytes at {at}) does not fit in the first cluster, or has more than {BACKING_NAME_MAX}"
        )));
    }
    if len == 0 {
        return Ok(None);
    }
    let name = text("the backing name", bytes.get(at as usize, len)?)?;
    Ok(Some(Backing { name, format }))
}

/// As in QEMU: the bit makes a data file, the name alone does not.
fn data_file(geometry: Geometry, autoclear: u64, name: Option<Vec<u8>>) -> Result<Option<DataFile>> {
    let raw = autoclear & autoclear::RAW_DATA_FILE != 0;
    match (geometry.external_data, name) {
        (true, Some(name)) => {
            let data_file = DataFile { name: text("the data file's name", &name)?, raw };
            // A backing image can be read all the same, see `check_writable`.
            data_file.check(geometry, false)?;
            Ok(Some(data_file))
        }
        (true, None) => Err(Error::malformed(
            "incompatible feature bit 2 (external data file) without a header extension that names the file: add it \
             with `qemu-img amend -o data_file=PATH --image-opts \
             driver=qcow2,file.filename=IMAGE,data-file.filename=PATH`",
        )),
        (false, _) if raw => {
            Err(Error::malformed("autoclear feature bit 1 (raw external data) without an external data file"))
        }
        (false, _) => Ok(None),
    }
}

fn text(what: &str, bytes: &[u8]) -> Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(Error::unsupported(format!("{what} is not UTF-8 text: {}", bytes.escape_ascii()))),
    }
}

/// What the extensions say that matters here.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    /// The data file's name, which means nothing without its feature bit.
    data_file: Option<Vec<u8>>,
    incompatible_names: Vec<(u8, String)>,
    bitmaps: Option<BitmapsExtension>,
    places: ExtensionPlaces,
}

/// Where the extensions are in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ExtensionPlaces {
    /// Where the one of the bitmaps begins.
    pub bitmaps: Option<u64>,
    /// Where the mark of the end is.
    pub end: usize,
    /// Nothing may reach past this.
    pub limit: usize,
}

/// Where the extensions are in the first cluster of an image with this header.
pub(super) fn extension_places(bytes: &[u8], header: &Header) -> Result<ExtensionPlaces> {
    let bytes = Bytes(bytes);
    let start = if header.geometry.version == 2 { V2_LEN } else { bytes.u32(100)? as usize };
    let end = extensions_end(header.geometry, bytes.u64(8)?);
    Ok(Extensions::parse(bytes, start, end)?.places)
}

impl Extensions {
    fn parse(bytes: Bytes<'_>, start: usize, end: usize) -> Result<Self> {
        let mut extensions = Self::default();
        let mut at = start;
        while at + 8 <= end && at + 8 <= bytes.0.len() {
            let (kind, len) = (bytes.u32(at)?, bytes.u32(at + 4)? as usize);
            if kind == EXTENSION_END {
                break;
            }
            at += 8;
            if len > end.saturating_sub(at) {
                return Err(Error::malformed(format!(
                    "header extension {kind:#010x} at {}: {len} bytes do not fit before {end}",
                    at - 8
                )));
            }
            if kind == EXTENSION_BITMAPS {
                extensions.places.bitmaps = Some(at as u64 - 8);
            }
            extensions.take(kind, bytes.get(at, len)?)?;
            at += len.next_multiple_of(8);
        }
        (extensions.places.end, extensions.places.limit) = (at, end.min(bytes.0.len()));
        Ok(extensions)
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        match kind {
            EXTENSION_BACKING_FORMAT if data.len() > FORMAT_NAME_MAX => {
                return Err(Error::malformed(format!("the backing format's name has {} bytes", data.len())));
            }
            EXTENSION_BACKING_FORMAT => self.backing_format = Some(text("the backing format's name", data)?),
            EXTENSION_DATA_FILE => self.data_file = Some(data.to_vec()),
            EXTENSION_FEATURES => self.incompatible_names = incompatible_names(data),
            EXTENSION_BITMAPS => self.bitmaps = Some(BitmapsExtension::parse(data)?),
            _ => {}
        }
        Ok(())
    }
}

/// The names of the incompatible features; a table has 48 bytes an entry.
fn incompatible_names(data: &[u8]) -> Vec<(u8, String)> {
    let incompatible = data.chunks_exact(48).take(64).filter(|entry| entry[0] == 0);
    incompatible
        .map(|entry| {
            let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
            (entry[1], name.escape_ascii().to_string())
        })
        .collect()
}

/// Bytes of a file that may end before it should.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn get(self, at: usize, len: usize) -> Result<&'a [u8]> {
        let end = at.checked_add(len);
        end.and_then(|end| self.0.get(at..end))
            .ok_or_else(|| Error::malformed(format!("the file ends in its header: {len} bytes at {at} are missing")))
    }

    fn u32(self, at: usize) -> Result<u32> {
        let mut field = [0; 4];
        field.copy_from_slice(self.get(at, 4)?);
        Ok(u32::from_be_bytes(field))
    }

    fn u64(self, at: usize) -> Result<u64> {
        let mut field = [0; 8];
        field.copy_from_slice(self.get(at, 8)?);
        Ok(u64::from_be_bytes(field))
    }
}

#[cfg(test)]
mod tests;
