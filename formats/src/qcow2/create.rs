//! Empty images, as `qemu-img create` makes them.
//!
//! ```text
//!  header  refcount table  refcount blocks  L1 table  [ L2 tables  payload ]
//!    0         1 …              …              …           …         …          clusters, all in use
//! ```
//!
//! What is in brackets is there where the metadata is preallocated: each cluster of the disk has its
//! place then, in order, in a file that has a hole there. With a raw data file it always is, and the
//! places are there.
use super::data_file::DataFile;
use super::entry::{COPIED, Standard};
use super::geometry::Geometry;
use super::header::{
    BACKING_NAME_MAX, Backing, Compression, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE, EXTENSION_END,
    EXTENSION_FEATURES, MAGIC, V2_LEN, autoclear, compatible, incompatible,
};
use super::refcounts::write_count;
use super::table;
use crate::error::{Context, Error, Result};
use crate::range::ByteRange;
use crate::storage::Storage;

/// QEMU's length of a version 3 header: up to the padding behind the compression type.
const V3_LEN: usize = 112;

/// Bytes between the extensions and the backing name: as many as the extension of bitmaps has.
const LATER_LEN: usize = 32;

/// Tables are written in pieces of so many bytes.
const PIECE: usize = 1 << 20;

/// Names for programs that do not know a bit: type, bit, name, as QEMU writes them.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// What to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Bytes of the disk: a multiple of 512, for QEMU sees whole sectors only.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is 2 to this: 9 to 21.
    pub cluster_bits: u32,
    /// A refcount has 2 to this bits: 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// How clusters are to be compressed; version 2 has zlib only.
    pub compression: Compression,
    /// L2 entries are extended: 32 subclusters a cluster, which has 16 KiB at least (version 3).
    pub extended_l2: bool,
    /// Others may write refcounts late (version 3).
    pub lazy_refcounts: bool,
    /// The image below.
    pub backing: Option<Backing>,
    /// The file that the payload will be in, where it is another (version 3). Its maker gives it the
    /// disk's length; a raw one has to read as zeroes.
    pub data_file: Option<DataFile>,
    /// Every cluster of the disk gets its place at once. Only without an image below, which the
    /// zeroes in those places would hide.
    pub preallocated: bool,
}

impl Create {
    /// What `qemu-img create` makes if it is told only a size.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            compression: Compression::Zlib,
            extended_l2: false,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            preallocated: false,
        }
    }

    /// Whether it can be made.
    pub fn check(&self) -> Result<()> {
        let (geometry, layout) = layout(self)?;
        header(self, geometry, &layout).map(drop)
    }

    fn geometry(&self) -> Result<Geometry> {
        let mut geometry = Geometry::new(self.version, self.cluster_bits, self.refcount_order, self.size)?;
        geometry.external_data = self.data_file.is_some();
        if self.extended_l2 { geometry.with_extended_l2() } else { Ok(geometry) }
    }
}

/// Where the tables of a new image are, in clusters.
struct Layout {
    reftable: u64,
    reftable_clusters: u64,
    blocks: u64,
    block_clusters: u64,
    l1: u64,
    /// The first L2 table, where there are any, and the first cluster of payload.
    l2: u64,
    payload: u64,
    end: u64,
}

impl Layout {
    /// With so many L2 tables and clusters of payload.
    fn new(geometry: Geometry, l2_tables: u64, payload: u64) -> Self {
        let cluster = geometry.cluster_size();
        let l1_clusters = (geometry.l1_entries() * 8).div_ceil(cluster).max(1);
        let (mut reftable_clusters, mut block_clusters) = (1, 1);
        // Blocks count themselves and their table, so their number is approached from below.
        loop {
            let l2 = 1 + reftable_clusters + block_clusters + l1_clusters;
            let end = l2 + l2_tables + payload;
            let blocks = end.div_ceil(1 << geometry.block_bits());
            let tables = (blocks * 8).div_ceil(cluster);
            if blocks <= block_clusters && tables <= reftable_clusters {
                let (blocks, l1) = (1 + reftable_clusters, 1 + reftable_clusters + block_clusters);
                let payload = l2 + l2_tables;
                return Self { reftable: 1, reftable_clusters, blocks, block_clusters, l1, l2, payload, end };
            }
            (block_clusters, reftable_clusters) = (blocks.max(block_clusters), tables.max(reftable_clusters));
        }
    }
}

/// Makes an empty image in `storage`. Nothing is flushed. Says where in the file the payload is that
/// was preallocated; it is for the caller to give that space to the file.
///
/// An empty file gets its length and its tables; in anything else, such as a device, the clusters
/// of the tables are overwritten as well, and nothing can be preallocated.
pub fn create(storage: &dyn Storage, create: &Create) -> Result<ByteRange> {
    let (geometry, layout) = layout(create)?;
    let header = header(create, geometry, &layout)?;
    let write = |at: u64, bytes: &[u8]| {
        storage.write_at(at, bytes).context(|| format!("writing {} bytes of a new image at {at}", bytes.len()))
    };
    clear(storage, layout.end << geometry.cluster_bits, layout.payload < layout.end)?;
    let mut reftable = Vec::new();
    table::encode((0..layout.block_clusters).map(|nth| (layout.blocks + nth) << geometry.cluster_bits), &mut reftable);
    write(layout.reftable << geometry.cluster_bits, &reftable)?;
    write_counts(geometry, &layout, &write)?;
    let tables = (layout.l2..layout.payload).map(|table| table << geometry.cluster_bits | COPIED);
    let clusters = if layout.l2 < layout.payload { geometry.clusters() } else { 0 };
    // In a data file each cluster has the place that it has on the disk.
    let first = if geometry.external_data { 0 } else { layout.payload };
    write_entries(layout.l1 << geometry.cluster_bits, tables, &write)?;
    let data = (0..clusters).flat_map(|cluster| {
        let host = Some(((first + cluster) << geometry.cluster_bits, true));
        let words = Standard { host, data: geometry.all_subclusters(), zero: 0 }.encode(geometry);
        std::iter::once(words.descriptor).chain(geometry.extended_l2.then_some(words.bitmap))
    });
    write_entries(layout.l2 << geometry.cluster_bits, data, &write)?;
    write(0, &header)?;
    Ok(ByteRange { start: layout.payload << geometry.cluster_bits, end: layout.end << geometry.cluster_bits })
}

/// Counts each cluster once.
fn write_counts(geometry: Geometry, layout: &Layout, write: &impl Fn(u64, &[u8]) -> Result<()>) -> Result<()> {
    let order = geometry.refcount_order;
    let mut at = layout.blocks << geometry.cluster_bits;
    let mut left = layout.end;
    while left > 0 {
        let count = left.min(((PIECE as u64) << 3) >> order);
        let mut piece = vec![0; ((count << order) as usize).div_ceil(8)];
        for index in 0..count {
            write_count(&mut piece, order, index as usize, 1);
        }
        write(at, &piece)?;
        at += piece.len() as u64;
        left -= count;
    }
    Ok(())
}

/// Writes entries of a table from `at` on.
fn write_entries(
    mut at: u64,
    mut entries: impl Iterator<Item = u64>,
    write: &impl Fn(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    loop {
        let mut bytes = Vec::new();
        table::encode(entries.by_ref().take(PIECE / 8), &mut bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        write(at, &bytes)?;
        at += bytes.len() as u64;
    }
}

/// The numbers of an image, and where its tables are.
fn layout(create: &Create) -> Result<(Geometry, Layout)> {
    let geometry = create.geometry()?;
    let is_raw = create.data_file.as_ref().is_some_and(|data_file| data_file.raw);
    let l2_tables = if is_raw || create.preallocated { geometry.l1_entries() } else { 0 };
    let payload = if create.preallocated && !geometry.external_data { geometry.clusters() } else { 0 };
    let layout = Layout::new(geometry, l2_tables, payload);
    match layout.reftable_clusters << geometry.cluster_bits {
        len if len <= Geometry::REFTABLE_BYTES_MAX => Ok((geometry, layout)),
        len => Err(Error::invalid(format!(
            "preallocated, {} bytes in clusters of {} need a refcount table of {len} bytes, {} being the most: take \
             larger clusters",
            create.size,
            geometry.cluster_size(),
            Geometry::REFTABLE_BYTES_MAX
        ))),
    }
}

/// The header alone.
#[cfg(test)]
pub(super) fn header_bytes(create: &Create) -> Result<Vec<u8>> {
    let (geometry, layout) = layout(create)?;
    header(create, geometry, &layout)
}

/// Makes the first `len` bytes read as zeroes.
fn clear(storage: &dyn Storage, len: u64, preallocated: bool) -> Result<()> {
    if storage.len().context(|| "asking for the file's length")? == 0 {
        return storage.set_len(len).context(|| format!("growing the file to {len} bytes"));
    }
    if preallocated {
        return Err(Error::invalid("only a new file can be preallocated: what is there already would be its payload"));
    }
    let zeroes = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(zeroes.len() as u64);
        storage.write_at(at, &zeroes[..piece as usize]).context(|| format!("clearing {piece} bytes at {at}"))?;
        at += piece;
    }
    Ok(())
}

/// The bytes of the first cluster that are not zero.
fn header(create: &Create, geometry: Geometry, layout: &Layout) -> Result<Vec<u8>> {
    check(create, geometry)?;
    let mut bytes = fields(create, geometry, layout);
    if let Some(format) = create.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        extension(EXTENSION_BACKING_FORMAT, format.as_bytes(), &mut bytes);
    }
    if let Some(data_file) = &create.data_file {
        extension(EXTENSION_DATA_FILE, data_file.name.as_bytes(), &mut bytes);
    }
    let name = create.backing.as_ref().map_or("", |backing| &backing.name);
    let cluster = geometry.cluster_size() as usize;
    let features = features();
    // A small cluster may have no room for the names, and does not need them.
    if create.version >= 3 && bytes.len() + 8 + features.len() + 8 + LATER_LEN + name.len() <= cluster {
        extension(EXTENSION_FEATURES, &features, &mut bytes);
    }
    extension(EXTENSION_END, &[], &mut bytes);
    if bytes.len() > cluster {
        return Err(Error::invalid(format!("the names in the header do not fit in a cluster of {cluster} bytes")));
    }
    if name.is_empty() {
        return Ok(bytes);
    }
    if name.len() > BACKING_NAME_MAX || bytes.len() + name.len() > cluster {
        return Err(Error::invalid(format!(
            "the backing name has {} bytes; in clusters of {cluster} bytes there is room for {}",
            name.len(),
            BACKING_NAME_MAX.min(cluster.saturating_sub(bytes.len()))
        )));
    }
    // Room for the extension of bitmaps that come later, where there is some.
    if create.version >= 3 && bytes.len() + LATER_LEN + name.len() <= cluster {
        bytes.resize(bytes.len() + LATER_LEN, 0);
    }
    let at = bytes.len() as u64;
    bytes[8..16].copy_from_slice(&at.to_be_bytes());
    bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    bytes.extend_from_slice(name.as_bytes());
    Ok(bytes)
}

fn check(create: &Create, geometry: Geometry) -> Result<()> {
    if !create.size.is_multiple_of(512) {
        return Err(Error::invalid(format!("size {} is not a multiple of 512", create.size)));
    }
    if let Some(data_file) = &create.data_file {
        if create.version == 2 {
            return Err(Error::invalid("version 2 has no external data file: ask for version 3"));
        }
        data_file.check(geometry, create.backing.is_some())?;
    }
    if create.version == 2 && (create.lazy_refcounts || create.compression != Compression::Zlib) {
        return Err(Error::invalid("version 2 has neither lazy refcounts nor a compression type: ask for version 3"));
    }
    if create.preallocated && create.backing.is_some() {
        return Err(Error::invalid("what is preallocated hides the backing image: leave one of the two out"));
    }
    Ok(())
}

/// The header's own fields; qcow2.rst, "Header".
fn fields(create: &Create, geometry: Geometry, layout: &Layout) -> Vec<u8> {
    let at = |cluster: u64| cluster << geometry.cluster_bits;
    let mut bytes = Vec::with_capacity(1024);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&create.version.to_be_bytes());
    bytes.extend_from_slice(&[0; 12]); // the backing name, later
    bytes.extend_from_slice(&geometry.cluster_bits.to_be_bytes());
    bytes.extend_from_slice(&geometry.size.to_be_bytes());
    bytes.extend_from_slice(&0_u32.to_be_bytes()); // not encrypted
    bytes.extend_from_slice(&(geometry.l1_entries() as u32).to_be_bytes());
    bytes.extend_from_slice(&at(layout.l1).to_be_bytes());
    bytes.extend_from_slice(&at(layout.reftable).to_be_bytes());
    bytes.extend_from_slice(&(layout.reftable_clusters as u32).to_be_bytes());
    bytes.extend_from_slice(&[0; 12]); // no snapshots
    debug_assert_eq!(bytes.len(), V2_LEN);
    if create.version >= 3 {
        let zstd = create.compression == Compression::Zstd;
        let raw = create.data_file.as_ref().is_some_and(|data_file| data_file.raw);
        let bit = |is_set, bit| if is_set { bit } else { 0_u64 };
        let incompatible = bit(zstd, incompatible::COMPRESSION)
            | bit(geometry.external_data, incompatible::DATA_FILE)
            | bit(geometry.extended_l2, incompatible::EXTENDED_L2);
        bytes.extend_from_slice(&incompatible.to_be_bytes());
        bytes.extend_from_slice(&bit(create.lazy_refcounts, compatible::LAZY_REFCOUNTS).to_be_bytes());
        bytes.extend_from_slice(&bit(raw, autoclear::RAW_DATA_FILE).to_be_bytes());
        bytes.extend_from_slice(&geometry.refcount_order.to_be_bytes());
        bytes.extend_from_slice(&(V3_LEN as u32).to_be_bytes());
        bytes.push(u8::from(zstd));
        bytes.resize(V3_LEN, 0);
    }
    bytes
}

fn extension(kind: u32, data: &[u8], bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn features() -> Vec<u8> {
    let entry = |(kind, bit, name): (u8, u8, &str)| {
        let mut entry = [0; 48];
        entry[0] = kind;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        entry
    };
    FEATURES.into_iter().flat_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::{Create, Layout};
    use crate::qcow2::geometry::Geometry;

    #[test]
    fn the_default_image_is_laid_out_as_by_qemu() {
        let layout = Layout::new(Geometry::new(3, 16, 4, 1 << 40).expect("valid"), 0, 0);
        assert_eq!((layout.reftable, layout.blocks, layout.l1, layout.end), (1, 2, 3, 4));
    }

    #[test]
    fn refcount_blocks_count_everything_there_is() {
        // The largest L1 table in the smallest clusters with the widest refcounts.
        let layout = Layout::new(Geometry::new(3, 9, 6, 128 << 30).expect("valid"), 0, 0);
        assert!(layout.block_clusters * 64 >= layout.end);
        assert!(layout.reftable_clusters * 64 >= layout.block_clusters);
        assert_eq!(layout.end, 1 + layout.reftable_clusters + layout.block_clusters + 65536);
    }

    #[test]
    fn sizes_are_whole_sectors() {
        assert!(super::header_bytes(&Create::new(1000)).is_err());
        assert!(super::header_bytes(&Create::new(0)).is_ok());
    }
}
