//! One entry of an L2 table as a check sees it: what it uses, however wrong it is, and what is wrong.
//!
//! Reading is strict (`qcow2::entry`), counting is not: what a wrong entry may still be using must not be
//! taken for free.
use crate::qcow2::entry::{COMPRESSED, COPIED, Entry, OFFSET, ZERO};
use crate::qcow2::geometry::Geometry;

/// Bits of an L2 entry that is not compressed which nobody may set.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of an L1 entry that nobody may set.
pub const L1_RESERVED: u64 = !(OFFSET | COPIED);

/// What an L2 entry is, and what of it is wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes of the file that it uses: offset and length.
    pub used: Option<(u64, u64)>,
    /// They are compressed.
    pub compressed: bool,
    /// What is wrong, each a corruption.
    pub wrong: [Option<&'static str>; 2],
    /// It reads as zeroes, and the cluster set aside for it is no cluster's start: without it nothing is lost.
    pub zero_without_place: bool,
    /// It has the copied flag, and whether it may depends on the refcount of this cluster.
    pub copied: Option<(bool, Option<u64>)>,
}

impl Seen {
    /// Looks at the entry `raw`.
    pub fn new(geometry: Geometry, raw: u64) -> Self {
        if raw == 0 {
            return Self::default();
        }
        if raw & COMPRESSED != 0 {
            return Self::compressed(geometry, raw);
        }
        let (host, copied, zero) = (raw & OFFSET, raw & COPIED != 0, raw & ZERO != 0);
        let reserved = (raw & L2_RESERVED != 0).then_some("reserved bits are set");
        let too_old = (zero && geometry.version < 3).then_some("version 2 has no zero flag");
        if host == 0 {
            // A zero entry may keep its flag, and nobody looks at it.
            let copied = (copied && !zero).then_some((true, None));
            return Self { wrong: [reserved, too_old], copied, ..Self::default() };
        }
        let cluster = geometry.cluster_size();
        let crooked = host & (cluster - 1) != 0;
        Self {
            used: Some((host, cluster)),
            compressed: false,
            wrong: [reserved.or(too_old), crooked.then_some("its offset is not at a cluster's start")],
            zero_without_place: crooked && zero && too_old.is_none() && reserved.is_none(),
            copied: Some((copied, Some(geometry.host_cluster(host)))),
        }
    }

    fn compressed(geometry: Geometry, raw: u64) -> Self {
        // Any version and any guest cluster: the split of the bits is the same.
        let used = Entry::decode(geometry, 0, raw & !COPIED).ok().and_then(|entry| entry.used(geometry));
        let flag = (raw & COPIED != 0).then_some("a compressed cluster has the copied flag");
        Self { used, compressed: true, wrong: [flag, None], ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::Seen;
    use crate::qcow2::entry::{COMPRESSED, COPIED, ZERO};
    use crate::qcow2::geometry::Geometry;

    #[test]
    fn a_wrong_entry_still_uses_what_it_points_at() {
        let g = Geometry::new(3, 16, 4, 1 << 30).expect("valid");
        let seen = |raw| Seen::new(g, raw);
        assert_eq!(seen(0), Seen::default());
        assert_eq!(seen(ZERO), Seen::default());
        assert_eq!(seen(0x3_0000 | COPIED).wrong, [None, None]);
        assert_eq!(seen(0x3_0000 | COPIED).copied, Some((true, Some(3))));
        let reserved = seen(0x3_0000 | 1 << 56);
        assert_eq!((reserved.used, reserved.wrong[0].is_some()), (Some((0x3_0000, 0x1_0000)), true));
        let crooked = seen(0x3_0200 | COPIED);
        assert_eq!(crooked.used, Some((0x3_0200, 0x1_0000)));
        assert!(crooked.wrong[1].is_some() && !crooked.zero_without_place);
        assert!(seen(0x3_0200 | ZERO).zero_without_place);
        assert!(!seen(0x3_0000 | ZERO).zero_without_place);
        assert_eq!(seen(COPIED).copied, Some((true, None)));
        let compressed = seen(COMPRESSED | COPIED | 0x5_0123);
        assert_eq!((compressed.used, compressed.copied), (Some((0x5_0123, 512 - 0x123)), None));
        assert!(compressed.wrong[0].is_some());
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        let g = Geometry::new(2, 16, 4, 1 << 30).expect("valid");
        assert!(Seen::new(g, 0x3_0000 | ZERO).wrong[0].is_some());
        assert!(!Seen::new(g, 0x3_0200 | ZERO).zero_without_place);
    }
}
