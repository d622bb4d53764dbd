//! Entries of L1 and L2 tables: 64 bits each, big endian in the file (qcow2.rst, "Cluster mapping").
use super::geometry::Geometry;
use crate::error::{Error, Result};

/// The refcount of what the entry points at is exactly one.
pub const COPIED: u64 = 1 << 63;
/// The L2 entry is of a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub const ZERO: u64 = 1;
/// Bits 9 to 55.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L2 entry in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing here.
    Absent,
    /// Reads as zeroes; may have a cluster set aside.
    Zero {
        /// The cluster that is set aside, and whether its refcount is known to be one.
        kept: Option<(u64, bool)>,
    },
    /// A cluster of payload.
    Data {
        /// Offset in the file.
        host: u64,
        /// The refcount is known to be one.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed {
        /// Offset in the file, of any alignment.
        host: u64,
        /// Bytes up to the end of the last 512-byte sector that it touches.
        len: u32,
    },
}

impl Entry {
    /// Reads the entry of guest cluster `cluster`.
    pub fn decode(geometry: Geometry, cluster: u64, raw: u64) -> Result<Self> {
        if raw == 0 {
            return Ok(Self::Absent);
        }
        if raw & COMPRESSED != 0 {
            return Ok(Self::compressed(geometry, raw));
        }
        let wrong = |what: &str| {
            let (table, index) = (cluster >> geometry.l2_bits(), cluster & ((1 << geometry.l2_bits()) - 1));
            Err(Error::malformed(format!("L2 table {table}: entry {index} is {raw:#018x}: {what}")))
        };
        let flags = if geometry.version >= 3 { COPIED | ZERO } else { COPIED };
        if raw & !(OFFSET | flags) != 0 {
            return wrong("reserved bits are set");
        }
        let (host, copied, zero) = (raw & OFFSET, raw & COPIED != 0, raw & ZERO != 0);
        if host & (geometry.cluster_size() - 1) != 0 {
            return wrong("its offset is not at a cluster's start");
        }
        match (host, zero) {
            (0, true) => Ok(Self::Zero { kept: None }),
            (0, false) => wrong("it has a flag and no offset"),
            (_, true) => Ok(Self::Zero { kept: Some((host, copied)) }),
            (_, false) => Ok(Self::Data { host, copied }),
        }
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

    /// The bytes of the file that this entry uses: offset and length.
    pub fn used(self, geometry: Geometry) -> Option<(u64, u64)> {
        match self {
            Self::Absent | Self::Zero { kept: None } => None,
            Self::Zero { kept: Some((host, _)) } | Self::Data { host, .. } => Some((host, geometry.cluster_size())),
            Self::Compressed { host, len } => Some((host, u64::from(len))),
        }
    }
}

/// The spec's x: the offset has the bits below it, the count of further sectors those from it on.
fn compressed_offset_bits(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
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
    use super::{COMPRESSED, COPIED, Entry, ZERO, l2_table};
    use crate::qcow2::geometry::Geometry;

    fn geometry(version: u32, cluster_bits: u32) -> Geometry {
        Geometry::new(version, cluster_bits, 4, 1 << 30).expect("valid")
    }

    #[test]
    fn what_entries_mean() {
        let g = geometry(3, 16);
        let decode = |raw| Entry::decode(g, 7, raw).ok();
        assert_eq!(decode(0), Some(Entry::Absent));
        assert_eq!(decode(ZERO), Some(Entry::Zero { kept: None }));
        assert_eq!(decode(0x30000 | ZERO | COPIED), Some(Entry::Zero { kept: Some((0x30000, true)) }));
        assert_eq!(decode(0x30000), Some(Entry::Data { host: 0x30000, copied: false }));
        assert_eq!(decode(0x30000 | COPIED), Some(Entry::Data { host: 0x30000, copied: true }));
        for hostile in [COPIED, 0x30200, 0x30000 | 2, 0x30000 | 1 << 56, COPIED | ZERO | 0x100] {
            assert_eq!(decode(hostile), None, "{hostile:#x}");
        }
        assert!(Entry::decode(geometry(2, 16), 7, ZERO).is_err(), "version 2 has no zero flag");
    }

    #[test]
    fn compressed_entries_split_as_the_spec_says() {
        // 64 KiB clusters: x = 54.
        let raw = COMPRESSED | 3 << 54 | 0x5_0123;
        let entry = Entry::decode(geometry(3, 16), 0, raw).ok();
        assert_eq!(entry, Some(Entry::Compressed { host: 0x5_0123, len: 4 * 512 - 0x123 }));
        // 2 MiB clusters: x = 49, and the most sectors there can be.
        let raw = COMPRESSED | 0x1fff << 49 | 0x200;
        let entry = Entry::decode(geometry(3, 21), 0, raw).ok();
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
            let entry = Entry::decode(g, 0, Entry::encode_compressed(g, host, len)).ok();
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
