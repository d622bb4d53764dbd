//! Entries of L1 and L2 tables: 64 bits each, big endian in the file (qcow2.rst, "Cluster mapping"). An extended
//! L2 entry has 64 bits more, about its 32 subclusters; a cluster of any other image is one subcluster.
use super::geometry::Geometry;
use crate::error::{Error, Result};

/// The refcount of what the entry points at is exactly one.
pub const COPIED: u64 = 1 << 63;
/// The L2 entry is of a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3, entries that are not extended).
pub const ZERO: u64 = 1;
/// Bits 9 to 55.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L2 entry as it is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Where the cluster is, with flags.
    pub descriptor: u64,
    /// Of an extended entry: which subclusters have payload, in the low half, and which read as
    /// zeroes, in the high half. 0 in other images.
    pub bitmap: u64,
}

impl Words {
    /// Entry `index` of a table or of a slice of one.
    pub fn get(geometry: Geometry, table: &[u64], index: usize) -> Self {
        match geometry.extended_l2 {
            false => Self { descriptor: table[index], bitmap: 0 },
            true => Self { descriptor: table[2 * index], bitmap: table[2 * index + 1] },
        }
    }

    /// Makes this entry `index`.
    pub fn put(self, geometry: Geometry, table: &mut [u64], index: usize) {
        match geometry.extended_l2 {
            false => table[index] = self.descriptor,
            true => table[2 * index..][..2].copy_from_slice(&[self.descriptor, self.bitmap]),
        }
    }
}

/// What an L2 entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Each subcluster is one of three.
    Standard(Standard),
    /// A compressed cluster.
    Compressed {
        /// Offset in the file, of any alignment.
        host: u64,
        /// Bytes up to the end of the last 512-byte sector that it touches.
        len: u32,
    },
}

/// The subclusters of a cluster, one bit each, the first one's lowest. What has neither bit is not here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standard {
    /// The cluster of the payload's file that is set aside, and whether its refcount is known to be one.
    pub host: Option<(u64, bool)>,
    /// Those with payload there; none without a host.
    pub data: u32,
    /// Those that read as zeroes; none of them has payload.
    pub zero: u32,
}

impl Standard {
    /// The subclusters that have nothing here.
    pub fn absent(self, geometry: Geometry) -> u32 {
        geometry.all_subclusters() & !(self.data | self.zero)
    }

    /// The entry that says this.
    pub fn encode(self, geometry: Geometry) -> Words {
        let place = self.host.map_or(0, |(host, copied)| host | if copied { COPIED } else { 0 });
        match geometry.extended_l2 {
            false => Words { descriptor: place | (u64::from(self.zero) * ZERO), bitmap: 0 },
            true => Words { descriptor: place, bitmap: u64::from(self.zero) << 32 | u64::from(self.data) },
        }
    }
}

impl Entry {
    /// Reads the entry of guest cluster `cluster`.
    pub fn decode(geometry: Geometry, cluster: u64, words: Words) -> Result<Self> {
        Self::parse(geometry, cluster, words).map_err(|wrong| malformed(geometry, cluster, words, wrong))
    }

    /// Reads an entry, or says what is wrong with it.
    pub fn parse(geometry: Geometry, cluster: u64, words: Words) -> std::result::Result<Self, &'static str> {
        let raw = words.descriptor;
        if words == Words::default() {
            return Ok(Self::Standard(Standard::default()));
        }
        if raw & COMPRESSED != 0 {
            return match geometry.external_data {
                false => Ok(Self::compressed(geometry, raw)),
                true => Err("a compressed cluster, which cannot be in an external data file"),
            };
        }
        let flags = if geometry.version >= 3 && !geometry.extended_l2 { COPIED | ZERO } else { COPIED };
        if raw & !(OFFSET | flags) != 0 {
            return Err("reserved bits are set");
        }
        let (host, copied) = (raw & OFFSET, raw & COPIED != 0);
        if host & (geometry.cluster_size() - 1) != 0 {
            return Err("its offset is not at a cluster's start");
        }
        // In an external data file, guest cluster 0 is at offset 0.
        let at_zero = geometry.external_data && copied && (cluster == 0 || raw & ZERO == 0);
        if host == 0 && raw == COPIED && !at_zero {
            return Err("it has a flag and no offset");
        }
        let placed = host != 0 || at_zero;
        if geometry.external_data && placed && host != cluster << geometry.cluster_bits {
            return Err("its offset in the external data file is not its guest offset");
        }
        let (data, zero) = match geometry.extended_l2 {
            false if raw & ZERO != 0 => (0, 1),
            false => (1, 0),
            true => (words.bitmap as u32, (words.bitmap >> 32) as u32),
        };
        if data & zero != 0 {
            return Err("a subcluster has payload and reads as zeroes");
        }
        if !placed && data != 0 {
            return Err("a subcluster has payload and the cluster no offset");
        }
        Ok(Self::Standard(Standard { host: placed.then_some((host, copied)), data, zero }))
    }

    /// The entry of a compressed cluster of `len` bytes from `host` on.
    pub fn encode_compressed(geometry: Geometry, host: u64, len: u32) -> u64 {
        let sectors = ((host + u64::from(len) - 1) >> 9) - (host >> 9);
        COMPRESSED | sectors << compressed_offset_bits(geometry) | host
    }

    /// How far into the file compressed clusters can be.
    pub fn compressed_end_max(geometry: Geometry) -> u64 {
        1 << compressed_offset_bits(geometry).min(56)
    }

    fn compressed(geometry: Geometry, raw: u64) -> Self {
        let x = compressed_offset_bits(geometry);
        let host = raw & ((1 << x) - 1);
        let sectors = ((raw & !(COPIED | COMPRESSED)) >> x) + 1;
        // At most 2^13 sectors: 4 MiB.
        Self::Compressed { host, len: (sectors * 512 - (host & 511)) as u32 }
    }

    /// The subclusters, where it has any: a compressed cluster is as good as none to what replaces it.
    pub fn standard(self) -> Standard {
        match self {
            Self::Standard(standard) => standard,
            Self::Compressed { .. } => Standard::default(),
        }
    }

    /// The subclusters that have payload, compressed or not.
    pub fn payload(self, geometry: Geometry) -> u32 {
        match self {
            Self::Standard(standard) => standard.data,
            Self::Compressed { .. } => geometry.all_subclusters(),
        }
    }

    /// The bytes of the image's file that this entry uses: offset and length.
    pub fn used(self, geometry: Geometry) -> Option<(u64, u64)> {
        match self {
            Self::Standard(_) if geometry.external_data => None,
            Self::Standard(standard) => standard.host.map(|(host, _)| (host, geometry.cluster_size())),
            Self::Compressed { host, len } => Some((host, u64::from(len))),
        }
    }
}

/// The spec's x: the offset has the bits below it, the count of further sectors those from it on.
fn compressed_offset_bits(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

fn malformed(geometry: Geometry, cluster: u64, words: Words, what: &str) -> Error {
    let (table, index) = (cluster >> geometry.l2_bits(), cluster & ((1 << geometry.l2_bits()) - 1));
    let Words { descriptor, bitmap } = words;
    let subclusters = if geometry.extended_l2 { format!(" with bitmap {bitmap:#018x}") } else { String::new() };
    Error::malformed(format!(
        "L2 table {table}: entry {index} (guest cluster {cluster}) is {descriptor:#018x}{subclusters}: {what}"
    ))
}

/// Reads entry `index` of the L1 table: where the L2 table is, if there is one.
pub fn l2_table(geometry: Geometry, index: u64, raw: u64) -> Result<Option<u64>> {
    let host = raw & OFFSET;
    let wrong = |what: &str| Err(Error::malformed(format!("L1 table: entry {index} is {raw:#018x}: {what}")));
    if raw & !(OFFSET | COPIED) != 0 {
        return wrong("reserved bits are set");
    }
    if host & (geometry.cluster_size() - 1) != 0 {
        return wrong("its offset is not at a cluster's start");
    }
    match (raw, host) {
        (0, _) => Ok(None),
        (_, 0) => wrong("it has a flag and no offset"),
        _ => Ok(Some(host)),
    }
}

#[cfg(test)]
mod tests {
    use super::{COMPRESSED, COPIED, Entry, Standard, Words, ZERO, l2_table};
    use crate::qcow2::geometry::Geometry;

    fn geometry(version: u32, cluster_bits: u32) -> Geometry {
        Geometry::new(version, cluster_bits, 4, 1 << 30).expect("valid")
    }

    fn decode(geometry: Geometry, descriptor: u64, bitmap: u64) -> Option<Entry> {
        Entry::decode(geometry, 7, Words { descriptor, bitmap }).ok()
    }

    #[test]
    fn what_entries_mean() {
        let g = geometry(3, 16);
        let means = |descriptor, host, data, zero| {
            let standard = Standard { host, data, zero };
            assert_eq!(decode(g, descriptor, 0), Some(Entry::Standard(standard)), "{descriptor:#x}");
            assert_eq!(standard.encode(g), Words { descriptor, bitmap: 0 });
        };
        means(0, None, 0, 0);
        means(ZERO, None, 0, 1);
        means(0x30000 | ZERO | COPIED, Some((0x30000, true)), 0, 1);
        means(0x30000, Some((0x30000, false)), 1, 0);
        means(0x30000 | COPIED, Some((0x30000, true)), 1, 0);
        for hostile in [COPIED, 0x30200, 0x30000 | 2, 0x30000 | 1 << 56, COPIED | ZERO | 0x100] {
            assert_eq!(decode(g, hostile, 0), None, "{hostile:#x}");
        }
        assert_eq!(decode(geometry(2, 16), ZERO, 0), None, "version 2 has no zero flag");
    }

    #[test]
    fn what_extended_entries_mean() {
        let g = geometry(3, 16).with_extended_l2().expect("valid");
        let means = |descriptor, bitmap, host, data, zero| {
            let standard = Standard { host, data, zero };
            assert_eq!(decode(g, descriptor, bitmap), Some(Entry::Standard(standard)), "{descriptor:#x} {bitmap:#x}");
            assert_eq!(standard.encode(g), Words { descriptor, bitmap });
        };
        means(0, 0, None, 0, 0);
        means(0, 5 << 32, None, 0, 5);
        means(0x30000, 0, Some((0x30000, false)), 0, 0);
        means(0x30000 | COPIED, 5 << 32 | 0xffff_fffa, Some((0x30000, true)), 0xffff_fffa, 5);
        let hostile =
            [(0, 1), (0x30000, 1 << 32 | 1), (0x30000 | ZERO, 0), (COPIED, 0), (COPIED, 1 << 32), (0x30200, 0)];
        for (descriptor, bitmap) in hostile {
            assert_eq!(decode(g, descriptor, bitmap), None, "{descriptor:#x} {bitmap:#x}");
        }
        let compressed = decode(g, COMPRESSED | 0x5_0123, u64::MAX);
        assert_eq!(compressed, Some(Entry::Compressed { host: 0x5_0123, len: 512 - 0x123 }), "it has no subclusters");
        let error = Entry::decode(g, 4099, Words { descriptor: 0, bitmap: 1 }).expect_err("no offset").one_line();
        assert!(error.contains("L2 table 1: entry 3 (guest cluster 4099)"), "{error}");
    }

    #[test]
    fn with_an_external_data_file_an_entry_says_that_a_cluster_is_there_not_where() {
        let plain = Geometry { external_data: true, ..geometry(3, 16) };
        let extended = plain.with_extended_l2().expect("valid");
        let means = |g, cluster, words: Words, host, data, zero| {
            let standard = Standard { host, data, zero };
            let entry = Entry::decode(g, cluster, words).ok();
            assert_eq!(entry, Some(Entry::Standard(standard)), "{words:?}");
            assert_eq!((standard.encode(g), Entry::Standard(standard).used(g)), (words, None), "nothing is counted");
        };
        let words = |descriptor, bitmap| Words { descriptor, bitmap };
        means(plain, 0, words(COPIED, 0), Some((0, true)), 1, 0);
        means(plain, 0, words(COPIED | ZERO, 0), Some((0, true)), 0, 1);
        means(plain, 0, words(ZERO, 0), None, 0, 1);
        means(plain, 3, words(0x30000 | COPIED, 0), Some((0x30000, true)), 1, 0);
        means(plain, 3, words(0x30000 | COPIED | ZERO, 0), Some((0x30000, true)), 0, 1);
        means(extended, 0, words(COPIED, 5 << 32 | 2), Some((0, true)), 2, 5);
        means(extended, 3, words(0x30000 | COPIED, 2), Some((0x30000, true)), 2, 0);
        for hostile in [COPIED, 0x40000 | COPIED, 0x40000 | ZERO, COMPRESSED | 0x30000] {
            assert!(Entry::decode(plain, 3, words(hostile, 0)).is_err(), "{hostile:#x}");
        }
        assert!(Entry::decode(extended, 3, words(COPIED, 1)).is_err());
        assert!(Entry::decode(extended, 0, words(0, 1)).is_err());
    }

    #[test]
    fn compressed_entries_split_as_the_spec_says() {
        // 64 KiB clusters: x = 54.
        let entry = decode(geometry(3, 16), COMPRESSED | 3 << 54 | 0x5_0123, 0);
        assert_eq!(entry, Some(Entry::Compressed { host: 0x5_0123, len: 4 * 512 - 0x123 }));
        // 2 MiB clusters: x = 49, and the most sectors there can be.
        let entry = decode(geometry(3, 21), COMPRESSED | 0x1fff << 49 | 0x200, 0);
        assert_eq!(entry, Some(Entry::Compressed { host: 0x200, len: 4 << 20 }));
    }

    #[test]
    fn compressed_entries_are_read_as_they_were_made() {
        for (bits, host, len, up_to) in [
            (16, 0x5_0123, 700, 0x5_0400),
            (16, 0x5_0200, 512, 0x5_0400),
            (16, 0x5_01ff, 1, 0x5_0200),
            (21, 0x1_ffff_fe00, (2 << 20) - 1, 0x2_001f_fe00),
            (9, 0x1ff, 2, 0x400),
        ] {
            let g = geometry(3, bits);
            let words = Words { descriptor: Entry::encode_compressed(g, host, len), bitmap: 0 };
            let entry = Entry::decode(g, 0, words).ok();
            assert_eq!(entry, Some(Entry::Compressed { host, len: (up_to - host) as u32 }), "{host:#x}, {len}");
        }
    }

    #[test]
    fn l1_entries_are_checked() {
        let g = geometry(3, 16);
        assert_eq!(l2_table(g, 0, 0).ok(), Some(None));
        assert_eq!(l2_table(g, 0, COPIED | 0x20000).ok(), Some(Some(0x20000)));
        for hostile in [COPIED, 1, 0x20001, 0x20200, 1 << 56, COMPRESSED | 0x20000] {
            assert!(l2_table(g, 0, hostile).is_err(), "{hostile:#x}");
        }
    }
}
