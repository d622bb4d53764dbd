//! One entry of an L2 table as a check sees it: what it uses, however wrong it is, and what is wrong.
//!
//! Reading is strict (`qcow2::entry`), counting is not: what a wrong entry may still be using must not be
//! taken for free.
use crate::qcow2::entry::{COMPRESSED, COPIED, Entry, OFFSET, Words, ZERO};
use crate::qcow2::geometry::Geometry;

/// Bits of an L2 entry that is not compressed which nobody may set.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of an L1 entry that nobody may set.
pub const L1_RESERVED: u64 = !(OFFSET | COPIED);

/// When an entry has to have the copied flag; at all other times it must not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// It points at nothing.
    Never,
    /// What it points at is in an external data file, where nothing is shared.
    Always,
    /// The refcount of this cluster is one.
    CountedOnce(u64),
}

/// What an L2 entry is, and what of it is wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes of the payload's file that it uses: offset and length.
    pub place: Option<(u64, u64)>,
    /// They are compressed.
    pub compressed: bool,
    /// What is wrong, each a corruption.
    pub wrong: [Option<&'static str>; 3],
    /// It has no payload, and the cluster set aside for it is no cluster's start: without it nothing is lost.
    pub crooked_and_empty: bool,
    /// Its copied flag; `None` where nobody looks at it.
    pub copied: Option<Copied>,
}

impl Seen {
    /// Looks at an entry.
    pub fn new(geometry: Geometry, words: Words) -> Self {
        if words == Words::default() {
            return Self::default();
        }
        match words.descriptor & COMPRESSED {
            0 => Self::standard(geometry, words),
            _ => Self::compressed(geometry, words),
        }
    }

    fn standard(geometry: Geometry, words: Words) -> Self {
        let Words { descriptor: raw, bitmap } = words;
        let (host, copied, zero) = (raw & OFFSET, raw & COPIED != 0, raw & ZERO != 0);
        let (data, zeroes) = match geometry.extended_l2 {
            true => (bitmap as u32, (bitmap >> 32) as u32),
            false => (u32::from(!zero), u32::from(zero)),
        };
        let no_zero_flag = match (zero, geometry.version, geometry.extended_l2) {
            (true, ..3, _) => Some("version 2 has no zero flag"),
            (true, _, true) => Some("an extended entry has no zero flag"),
            _ => None,
        };
        let reserved = (raw & L2_RESERVED != 0).then_some("reserved bits are set").or(no_zero_flag);
        // In an external data file, the first guest cluster is at offset 0.
        let placed = host != 0 || geometry.external_data && copied && (geometry.extended_l2 || !zero);
        if !placed {
            let homeless = geometry.extended_l2 && data != 0;
            let homeless = homeless.then_some("a subcluster has payload and the cluster no offset");
            // A zero entry may keep its flag, and nobody looks at it.
            let copied = (copied && (geometry.extended_l2 || !zero)).then_some(Copied::Never);
            return Self { wrong: [reserved, homeless, None], copied, ..Self::default() };
        }
        let crooked = host & (geometry.cluster_size() - 1) != 0;
        let both = (data & zeroes != 0).then_some("a subcluster has payload and reads as zeroes");
        Self {
            place: Some((host, geometry.cluster_size())),
            compressed: false,
            wrong: [reserved, crooked.then_some("its offset is not at a cluster's start"), both],
            crooked_and_empty: crooked && data == 0 && reserved.is_none(),
            copied: Some(match geometry.external_data {
                true => Copied::Always,
                false => Copied::CountedOnce(geometry.host_cluster(host)),
            }),
        }
    }

    fn compressed(geometry: Geometry, words: Words) -> Self {
        let Words { descriptor: raw, bitmap } = words;
        let flag = (raw & COPIED != 0).then_some("a compressed cluster has the copied flag");
        if geometry.external_data {
            let apart = Some("a compressed cluster, which cannot be in an external data file");
            return Self { compressed: true, wrong: [flag, apart, None], ..Self::default() };
        }
        let subclusters = (bitmap != 0).then_some("a compressed cluster has no subclusters");
        // Any guest cluster: the split of the bits is the same.
        let entry = Entry::decode(geometry, 0, Words { descriptor: raw & !COPIED, bitmap: 0 });
        let place = entry.ok().and_then(|entry| entry.used(geometry));
        Self { place, compressed: true, wrong: [flag, subclusters, None], ..Self::default() }
    }

    /// True where it points into an external data file, and not at the guest's own offset there.
    pub fn is_misplaced(&self, geometry: Geometry, guest: u64) -> bool {
        let crooked = self.wrong[1].is_some();
        geometry.external_data && !crooked && self.place.is_some_and(|(at, _)| at != guest)
    }
}

#[cfg(test)]
mod tests {
    use super::{Copied, Seen};
    use crate::qcow2::entry::{COMPRESSED, COPIED, Words, ZERO};
    use crate::qcow2::geometry::Geometry;

    fn geometry(version: u32) -> Geometry {
        Geometry::new(version, 16, 4, 1 << 30).expect("valid")
    }

    fn seen(geometry: Geometry, descriptor: u64, bitmap: u64) -> Seen {
        Seen::new(geometry, Words { descriptor, bitmap })
    }

    #[test]
    fn a_wrong_entry_still_uses_what_it_points_at() {
        let seen = |raw| seen(geometry(3), raw, 0);
        assert_eq!(seen(0), Seen::default());
        assert_eq!(seen(ZERO), Seen::default());
        assert_eq!(seen(0x3_0000 | COPIED).wrong, [None; 3]);
        assert_eq!(seen(0x3_0000 | COPIED).copied, Some(Copied::CountedOnce(3)));
        let reserved = seen(0x3_0000 | 1 << 56);
        assert_eq!((reserved.place, reserved.wrong[0].is_some()), (Some((0x3_0000, 0x1_0000)), true));
        let crooked = seen(0x3_0200 | COPIED);
        assert_eq!(crooked.place, Some((0x3_0200, 0x1_0000)));
        assert!(crooked.wrong[1].is_some() && !crooked.crooked_and_empty);
        assert!(seen(0x3_0200 | ZERO).crooked_and_empty);
        assert!(!seen(0x3_0000 | ZERO).crooked_and_empty);
        assert_eq!(seen(COPIED).copied, Some(Copied::Never));
        let compressed = seen(COMPRESSED | COPIED | 0x5_0123);
        assert_eq!((compressed.place, compressed.copied), (Some((0x5_0123, 512 - 0x123)), None));
        assert!(compressed.wrong[0].is_some());
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        let seen = |raw| seen(geometry(2), raw, 0);
        assert!(seen(0x3_0000 | ZERO).wrong[0].is_some());
        assert!(!seen(0x3_0200 | ZERO).crooked_and_empty);
    }

    #[test]
    fn the_bitmap_of_an_extended_entry_says_what_has_payload() {
        let g = geometry(3).with_extended_l2().expect("valid");
        let wrong = |raw, bitmap| seen(g, raw, bitmap).wrong.into_iter().flatten().count();
        let whole = [(0, 5 << 32), (0x3_0000 | COPIED, 0), (0x3_0000, 5 << 32 | 2), (COMPRESSED | 0x5_0123, 0)];
        for (raw, bitmap) in whole {
            assert_eq!(wrong(raw, bitmap), 0, "{raw:#x} {bitmap:#x}");
        }
        let broken = [(0, 1), (0x3_0000, 1 << 32 | 1), (0x3_0000 | ZERO, 0), (COMPRESSED | 0x5_0123, 1)];
        for (raw, bitmap) in broken {
            assert_eq!(wrong(raw, bitmap), 1, "{raw:#x} {bitmap:#x}");
        }
        assert!(seen(g, COMPRESSED | 0x5_0123, 1).place.is_some(), "guests read it");
        assert!(seen(g, 0x3_0200, 7 << 32).crooked_and_empty && !seen(g, 0x3_0200, 1).crooked_and_empty);
        assert_eq!(seen(g, COPIED, 1 << 32).copied, Some(Copied::Never));
    }

    #[test]
    fn with_an_external_data_file_everything_is_at_its_own_offset() {
        let g = Geometry { external_data: true, ..geometry(3) };
        let first = seen(g, COPIED, 0);
        assert_eq!((first.place, first.copied), (Some((0, 0x1_0000)), Some(Copied::Always)));
        assert!(!first.is_misplaced(g, 0) && first.is_misplaced(g, 0x3_0000));
        assert_eq!(seen(g, COPIED | ZERO, 0), Seen::default());
        assert!(!seen(g, 0x3_0000, 0).is_misplaced(g, 0x3_0000));
        assert_eq!(seen(g, COMPRESSED | 0x5_0000, 0).place, None);
    }
}
