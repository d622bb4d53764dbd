//! The numbers that follow from a header: how clusters, tables and their slices are cut.
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// Bytes of a table that are kept, read and written as one; a smaller cluster is one slice.
const SLICE_BITS_MAX: u32 = 12;

/// How an image is cut. Checked when it is made; everything that follows fits in 63 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is 2 to this: 9 to 21.
    pub cluster_bits: u32,
    /// A refcount has 2 to this bits: 0 to 6.
    pub refcount_order: u32,
    /// L2 entries have a second word, of which each bit is about one subcluster.
    pub extended_l2: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Payload is in an external data file, each guest cluster at its own guest offset.
    pub external_data: bool,
}

impl Geometry {
    /// Largest L1 table, as in QEMU: 32 MiB.
    pub const L1_BYTES_MAX: u64 = 32 << 20;
    /// Largest refcount table, as in QEMU: 8 MiB.
    pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;
    /// With extended L2 entries, a cluster is 2 to this subclusters.
    const SUBCLUSTERS_BITS: u32 = 5;

    /// A geometry that this program can work with. Its L2 entries are not extended.
    pub fn new(version: u32, cluster_bits: u32, refcount_order: u32, size: u64) -> Result<Self> {
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!(
                "qcow2 version {version} is not supported: only 2 and 3 are known"
            )));
        }
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::unsupported(format!(
                "cluster_bits {cluster_bits} is not supported: clusters have 512 bytes (9) to 2 MiB (21)"
            )));
        }
        if refcount_order > 6 {
            return Err(Error::malformed(format!("refcount_order {refcount_order} is above 6 (64 bits)")));
        }
        if version == 2 && refcount_order != 4 {
            return Err(Error::invalid("version 2 has refcounts of 16 bits only: ask for version 3"));
        }
        if size > i64::MAX as u64 {
            return Err(Error::malformed(format!("size {size} does not fit in 63 bits")));
        }
        Self { version, cluster_bits, refcount_order, extended_l2: false, size, external_data: false }.check_l1()
    }

    /// The same with extended L2 entries.
    pub fn with_extended_l2(self) -> Result<Self> {
        if self.version == 2 {
            return Err(Error::invalid("version 2 has no extended L2 entries: ask for version 3"));
        }
        let geometry = Self { extended_l2: true, ..self };
        if geometry.subcluster_bits() < 9 {
            return Err(Error::unsupported(format!(
                "extended L2 entries with clusters of {} bytes are not supported: take clusters of 16 KiB at least",
                self.cluster_size()
            )));
        }
        geometry.check_l1()
    }

    /// The same with a disk of `size` bytes.
    pub fn with_size(self, size: u64) -> Result<Self> {
        if size > i64::MAX as u64 {
            return Err(Error::invalid(format!("size {size} does not fit in 63 bits")));
        }
        Self { size, ..self }.check_l1()
    }

    fn check_l1(self) -> Result<Self> {
        if self.l1_entries() * 8 > Self::L1_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "size {} needs an L1 table above 32 MiB with clusters of {} bytes: take larger clusters",
                self.size,
                self.cluster_size()
            )));
        }
        Ok(self)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters of the disk, the last one perhaps only in part.
    pub fn clusters(self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    /// A cluster is 2 to this subclusters: one, which is the cluster itself, or 32.
    pub fn subclusters_bits(self) -> u32 {
        if self.extended_l2 { Self::SUBCLUSTERS_BITS } else { 0 }
    }

    /// Subcluster size is 2 to this.
    pub fn subcluster_bits(self) -> u32 {
        self.cluster_bits - self.subclusters_bits()
    }

    /// All subclusters of one cluster, one bit each, the first one's lowest.
    pub fn all_subclusters(self) -> u32 {
        u32::MAX >> (32 - (1 << self.subclusters_bits()))
    }

    /// The subclusters of guest cluster `cluster` that have a byte of `range`, one bit each.
    pub fn subclusters_in(self, range: ByteRange, cluster: u64) -> u32 {
        let bits = self.subcluster_bits();
        let start = cluster << self.cluster_bits;
        let inside = range.intersect(ByteRange { start, end: start + self.cluster_size() });
        if inside.is_empty() {
            return 0;
        }
        // Both are below 32.
        let (first, last) = ((inside.start - start) >> bits, (inside.end - 1 - start) >> bits);
        u32::MAX >> (31 - last) & u32::MAX << first
    }

    /// The host cluster that holds the byte `offset` of the file.
    pub fn host_cluster(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// An L2 entry has 2 to this words of 64 bits.
    pub fn l2_words_bits(self) -> u32 {
        u32::from(self.extended_l2)
    }

    /// An L2 table has 2 to this entries.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - 3 - self.l2_words_bits()
    }

    /// Entries of the L1 table that the disk needs.
    pub fn l1_entries(self) -> u64 {
        self.clusters().div_ceil(1 << self.l2_bits())
    }

    /// Bytes of a slice are 2 to this.
    pub fn slice_byte_bits(self) -> u32 {
        self.cluster_bits.min(SLICE_BITS_MAX)
    }

    /// Bytes of a slice of a table.
    pub fn slice_bytes(self) -> usize {
        1 << self.slice_byte_bits()
    }

    /// An L2 slice has 2 to this entries.
    pub fn l2_slice_bits(self) -> u32 {
        self.slice_byte_bits() - 3 - self.l2_words_bits()
    }

    /// A refcount block covers 2 to this host clusters.
    pub fn block_bits(self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// A slice of a refcount block covers 2 to this host clusters.
    pub fn block_slice_bits(self) -> u32 {
        self.slice_byte_bits() + 3 - self.refcount_order
    }

    /// Slices of one table are 2 to this.
    pub fn slices_bits(self) -> u32 {
        self.cluster_bits - self.slice_byte_bits()
    }

    /// The largest refcount there can be.
    pub fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.refcount_order))
    }
}

#[cfg(test)]
mod tests {
    use super::Geometry;
    use crate::range::ByteRange;

    #[test]
    fn the_limits_are_those_of_qemu() {
        assert!(Geometry::new(3, 9, 4, 128 << 30).is_ok(), "512-byte clusters reach 128 GiB");
        assert!(Geometry::new(3, 9, 4, (128 << 30) + 1).is_err());
        assert!(Geometry::new(3, 21, 4, 2 << 60).is_ok(), "2 MiB clusters reach 2 EiB");
        assert!(Geometry::new(3, 8, 4, 0).is_err());
        assert!(Geometry::new(3, 22, 4, 0).is_err());
        assert!(Geometry::new(3, 16, 7, 0).is_err());
        assert!(Geometry::new(2, 16, 3, 0).is_err());
        assert!(Geometry::new(4, 16, 4, 0).is_err());
    }

    #[test]
    fn the_cuts_of_the_default_image() {
        let g = Geometry::new(3, 16, 4, (1 << 30) + 1).expect("valid");
        assert_eq!((g.cluster_size(), g.clusters(), g.l1_entries()), (65536, 16385, 3));
        assert_eq!((g.l2_bits(), g.l2_slice_bits(), g.slices_bits()), (13, 9, 4));
        assert_eq!((g.block_bits(), g.block_slice_bits(), g.refcount_max()), (15, 11, 65535));
        let g = Geometry::new(3, 9, 6, 512).expect("valid");
        assert_eq!((g.block_bits(), g.refcount_max(), g.slices_bits()), (6, u64::MAX, 0));
        assert_eq!(Geometry::new(3, 9, 0, 512).expect("valid").refcount_max(), 1);
    }
    #[test]
    fn extended_entries_are_twice_as_long_and_have_32_subclusters() {
        let plain = Geometry::new(3, 16, 4, (1 << 30) + 1).expect("valid");
        assert_eq!((plain.subcluster_bits(), plain.all_subclusters()), (16, 1));
        assert_eq!(plain.subclusters_in(ByteRange { start: 70_000, end: 80_000 }, 1), 1);
        let g = plain.with_extended_l2().expect("valid");
        assert_eq!((g.l2_bits(), g.l2_slice_bits(), g.l1_entries()), (12, 8, 5));
        assert_eq!((g.subcluster_bits(), g.all_subclusters()), (11, u32::MAX));
        let range = ByteRange { start: 65536 + 2047, end: 131_072 + 2049 };
        assert_eq!([0, 1, 2, 3].map(|cluster| g.subclusters_in(range, cluster)), [0, u32::MAX, 3, 0]);
        assert_eq!(g.subclusters_in(ByteRange { start: 65536 + 4096, end: 65536 + 8191 }, 1), 0b1100);
    }

    #[test]
    fn extended_entries_want_version_3_clusters_of_16_kib_and_a_larger_l1_table() {
        let extended = |version, bits, size| Geometry::new(version, bits, 4, size).and_then(Geometry::with_extended_l2);
        assert!(extended(3, 14, 1 << 40).is_ok());
        assert!(extended(3, 13, 1 << 40).is_err());
        assert!(extended(2, 16, 1 << 40).is_err());
        assert!(extended(3, 21, 1 << 60).is_ok());
        assert!(extended(3, 21, (1 << 60) + 1).is_err(), "standard entries reach 2 EiB");
    }
}
