//! Empty images, as `qemu-img create` makes them.
//!
//! ```text
//!  header  refcount table  refcount blocks  L1 table  [ L2 tables  payload ]
//!    0         1 …              …              …           …         …          clusters, all in use
//! ```
//!
//! What is in brackets is there where the metadata is preallocated: each cluster of the disk has its
//! place then, in order, in a file that has a hole there.
use super::entry::COPIED;
use super::geometry::Geometry;
use super::header::{
    BACKING_NAME_MAX, Backing, Compression, EXTENSION_BACKING_FORMAT, EXTENSION_END, EXTENSION_FEATURES, MAGIC, V2_LEN,
    compatible, incompatible,
};
use super::refcounts::write_count;
use super::table;
use crate::error::{Context, Error, Result};
use crate::range::ByteRange;
use crate::storage::Storage;

/// QEMU's length of a version 3 header: up to the padding behind the compression type.
const V3_LEN: usize = 112;

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
    /// Others may write refcounts late (version 3).
    pub lazy_refcounts: bool,
    /// The image below.
    pub backing: Option<Backing>,
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
            lazy_refcounts: false,
            backing: None,
            preallocated: false,
        }
    }

    /// Whether it can be made.
    pub fn check(&self) -> Result<()> {
        let (geometry, layout) = plan(self)?;
        header(self, geometry, &layout).map(drop)
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
    fn new(geometry: Geometry, preallocated: bool) -> Self {
        let cluster = geometry.cluster_size();
        let l1_clusters = (geometry.l1_entries() * 8).div_ceil(cluster).max(1);
        let (tables, payload) = if preallocated { (geometry.l1_entries(), geometry.clusters()) } else { (0, 0) };
        let (mut reftable_clusters, mut block_clusters) = (1, 1);
        // Blocks count themselves and their table, so their number is approached from below.
        loop {
            let l1 = 1 + reftable_clusters + block_clusters;
            let l2 = l1 + l1_clusters;
            let end = l2 + tables + payload;
            let blocks = end.div_ceil(1 << geometry.block_bits());
            let needed = (blocks * 8).div_ceil(cluster);
            if blocks <= block_clusters && needed <= reftable_clusters {
                let (blocks, payload) = (1 + reftable_clusters, l2 + tables);
                return Self { reftable: 1, reftable_clusters, blocks, block_clusters, l1, l2, payload, end };
            }
            (block_clusters, reftable_clusters) = (blocks.max(block_clusters), needed.max(reftable_clusters));
        }
    }
}

/// Makes an empty image in `storage`. Nothing is flushed. Says where in the file the payload is that
/// was preallocated; it is for the caller to give that space to the file.
///
/// An empty file gets its length and its tables; in anything else, such as a device, the clusters
/// of the tables are overwritten as well, and nothing can be preallocated.
pub fn create(storage: &dyn Storage, create: &Create) -> Result<ByteRange> {
    let (geometry, layout) = plan(create)?;
    let at = |cluster: u64| cluster << geometry.cluster_bits;
    let header = header(create, geometry, &layout)?;
    clear(storage, at(layout.end), create.preallocated)?;
    let tables = Tables { storage, geometry };
    tables.write(layout.reftable, (0..layout.block_clusters).map(|nth| at(layout.blocks + nth)))?;
    tables.write_counts(&layout)?;
    if create.preallocated {
        tables.write(layout.l1, (layout.l2..layout.payload).map(|table| at(table) | COPIED))?;
        tables.write(layout.l2, (layout.payload..layout.end).map(|cluster| at(cluster) | COPIED))?;
    }
    tables.put(0, &header)?;
    Ok(ByteRange { start: at(layout.payload), end: at(layout.end) })
}

/// Everything that follows from what is asked, unless it cannot be.
fn plan(create: &Create) -> Result<(Geometry, Layout)> {
    let geometry = Geometry::new(create.version, create.cluster_bits, create.refcount_order, create.size)?;
    refuse_contradictions(create)?;
    let layout = Layout::new(geometry, create.preallocated);
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

fn refuse_contradictions(create: &Create) -> Result<()> {
    if !create.size.is_multiple_of(512) {
        return Err(Error::invalid(format!("size {} is not a multiple of 512", create.size)));
    }
    if create.version == 2 && (create.lazy_refcounts || create.compression != Compression::Zlib) {
        return Err(Error::invalid("version 2 has neither lazy refcounts nor a compression type: ask for version 3"));
    }
    if create.preallocated && create.backing.is_some() {
        return Err(Error::invalid("what is preallocated hides the backing image: leave one of the two out"));
    }
    Ok(())
}

/// Writes the tables of a new image.
struct Tables<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
}

impl Tables<'_> {
    /// Writes a table of these entries, from the start of `cluster` on.
    fn write(&self, cluster: u64, entries: impl Iterator<Item = u64>) -> Result<()> {
        let mut entries = entries.peekable();
        let mut at = cluster << self.geometry.cluster_bits;
        let mut piece = Vec::new();
        while entries.peek().is_some() {
            piece.clear();
            table::encode(entries.by_ref().take(PIECE / 8), &mut piece);
            self.put(at, &piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Counts each cluster once.
    fn write_counts(&self, layout: &Layout) -> Result<()> {
        let order = self.geometry.refcount_order;
        let mut at = layout.blocks << self.geometry.cluster_bits;
        let mut left = layout.end;
        while left > 0 {
            let count = left.min(((PIECE as u64) << 3) >> order);
            let mut piece = vec![0; ((count << order) as usize).div_ceil(8)];
            for index in 0..count {
                write_count(&mut piece, order, index as usize, 1);
            }
            self.put(at, &piece)?;
            at += piece.len() as u64;
            left -= count;
        }
        Ok(())
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(at, bytes).context(|| format!("writing {} bytes of a new image at {at}", bytes.len()))
    }
}

/// The header alone.
#[cfg(test)]
pub(super) fn header_bytes(create: &Create) -> Result<Vec<u8>> {
    let (geometry, layout) = plan(create)?;
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
    let mut bytes = fields(create, geometry, layout);
    if let Some(format) = create.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        extension(EXTENSION_BACKING_FORMAT, format.as_bytes(), &mut bytes);
    }
    let name = create.backing.as_ref().map_or("", |backing| &backing.name);
    let cluster = geometry.cluster_size() as usize;
    let features = features();
    // A small cluster may have no room for the names, and does not need them.
    if create.version >= 3 && bytes.len() + 8 + features.len() + 8 + name.len() <= cluster {
        extension(EXTENSION_FEATURES, &features, &mut bytes);
    }
    extension(EXTENSION_END, &[], &mut bytes);
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
    let at = bytes.len() as u64;
    bytes[8..16].copy_from_slice(&at.to_be_bytes());
    bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    bytes.extend_from_slice(name.as_bytes());
    Ok(bytes)
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
        bytes.extend_from_slice(&(u64::from(zstd) * incompatible::COMPRESSION).to_be_bytes());
        bytes.extend_from_slice(&(u64::from(create.lazy_refcounts) * compatible::LAZY_REFCOUNTS).to_be_bytes());
        bytes.extend_from_slice(&0_u64.to_be_bytes()); // autoclear
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
        let layout = Layout::new(Geometry::new(3, 16, 4, 1 << 40).expect("valid"), false);
        assert_eq!((layout.reftable, layout.blocks, layout.l1, layout.end), (1, 2, 3, 4));
    }

    #[test]
    fn refcount_blocks_count_everything_there_is() {
        // The largest L1 table in the smallest clusters with the widest refcounts.
        let layout = Layout::new(Geometry::new(3, 9, 6, 128 << 30).expect("valid"), false);
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
