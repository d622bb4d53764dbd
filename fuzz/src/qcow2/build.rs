//! Images of which it is known what they hold; and what may then be done to their bytes.
use super::super::support::disk::Disk;
use super::super::support::written::{Content, ImageWriter, Payload, Shape, Written};
use arbitrary::Arbitrary;
use formats::storage::Storage;

/// No disk is longer: it is compared byte by byte.
pub const SIZE_MAX: u64 = 192 << 10;

const ENTRIES_MAX: usize = 200;

/// One image.
#[derive(Arbitrary, Debug)]
pub struct Build<'a> {
    version_2: bool,
    cluster_size: u8,
    refcount_order: u8,
    zstd: bool,
    /// Guest clusters.
    clusters: u8,
    /// Sectors of the last one.
    tail: u8,
    /// The reader has something below it.
    pub below: bool,
    extensions: Vec<(u32, &'a [u8])>,
    /// One guest cluster each, or a few that have nothing.
    contents: &'a [u8],
    damage: Vec<Damage>,
}

/// What is done to the image when it is whole.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Damage {
    /// A field of the header.
    Field(u8, u64),
    /// A byte.
    Byte(u16, u8),
    /// The 64-bit word number n from the cluster's start: cluster, n, value.
    Word(u8, u16, Value),
    /// The file is so many bytes shorter.
    Cut(u16),
    /// The file is so many bytes longer.
    Grow(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Any(u64),
    /// A cluster of the file, with flags: copied, zero, compressed.
    Cluster(u8, u8),
}

/// Offset and length of the header's fields.
const FIELDS: [(u64, usize); 19] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
];

impl Build<'_> {
    /// The file, and what a guest reads where nothing was done to it.
    pub fn image(&self) -> (Disk, Option<Vec<u8>>) {
        let shape = self.shape();
        let mut writer = ImageWriter::new(shape);
        for byte in self.contents.iter().take(ENTRIES_MAX) {
            fill(&mut writer, *byte);
        }
        // Those that mean something have a form of their own, and an end would hide the others.
        let known = [0, 0xe279_2aca, 0x2385_2875, 0x4441_5441];
        let extensions = self.extensions.iter().take(8).copied().filter(|(kind, _)| !known.contains(kind));
        let Written { image: disk, bytes, .. } = writer.finish(&extensions.collect::<Vec<_>>());
        for damage in self.damage.iter().take(16) {
            damage.strike(&disk, shape.cluster_bits);
        }
        disk.flush();
        (disk, self.damage.is_empty().then_some(bytes))
    }

    fn shape(&self) -> Shape {
        let extended = self.cluster_size >= 240;
        let version = if self.version_2 && !extended { 2 } else { 3 };
        let cluster_bits = cluster_bits(self.cluster_size);
        Shape {
            version,
            cluster_bits,
            refcount_order: if version == 2 { 4 } else { u32::from(self.refcount_order % 7) },
            size: size(cluster_bits, self.clusters, self.tail),
            zstd: self.zstd && version == 3,
            below: self.below,
            extended,
            snapshot: false,
            payload: Payload::Inside,
        }
    }
}

/// Large ones are slow and seldom show more.
pub fn cluster_bits(byte: u8) -> u32 {
    match byte {
        77 => 21,
        128..160 => 10,
        160..192 => 11,
        192..224 => 12,
        224..240 => 16,
        240.. => 14,
        _ => 9,
    }
}

/// Bytes of a disk of so many clusters, whose last one has some of its sectors.
pub fn size(cluster_bits: u32, clusters: u8, tail: u8) -> u64 {
    let clusters = u64::from(clusters % 200 + 1).min((SIZE_MAX >> cluster_bits).max(1));
    let sectors = 1 << (cluster_bits - 9);
    let size = ((clusters - 1) * sectors + u64::from(tail) % sectors + 1) << 9;
    size.min(SIZE_MAX)
}

/// What the next guest clusters are.
pub fn fill(writer: &mut ImageWriter, byte: u8) {
    match byte % 8 {
        0 => (0..=byte / 8).for_each(|_| writer.content(Content::Absent)),
        // Where there are subclusters, of all kinds.
        1 if byte > 127 => writer.content(Content::Mixed(u64::from(byte).wrapping_mul(0x9e37_79b9_7f4a_7c15))),
        1 | 2 => writer.content(Content::Data),
        3 => writer.content(Content::Shared),
        4 => writer.content(Content::Zero),
        5 => writer.content(Content::Kept),
        _ => writer.content(Content::Compressed),
    }
}

impl Damage {
    fn strike(self, disk: &Disk, bits: u32) {
        let len = disk.len().expect("memory");
        let write = |at: u64, bytes: &[u8]| {
            if at + bytes.len() as u64 <= len {
                disk.write_at(at, bytes).expect("memory");
            }
        };
        match self {
            Self::Field(nth, value) => {
                let (at, width) = FIELDS[usize::from(nth) % FIELDS.len()];
                write(at, &value.to_be_bytes()[8 - width..]);
            }
            Self::Byte(at, value) => write(u64::from(at), &[value]),
            Self::Word(cluster, nth, value) => {
                let value = match value {
                    Value::Any(value) => value,
                    Value::Cluster(cluster, flags) => {
                        let flags = u64::from(flags);
                        u64::from(cluster) << bits | flags & 1 | (flags >> 1 & 3) << 62
                    }
                };
                let nth = u64::from(nth) & ((1 << (bits - 3)) - 1);
                write((u64::from(cluster) << bits) + nth * 8, &value.to_be_bytes());
            }
            Self::Cut(less) => disk.set_len(len.saturating_sub(less.into())).expect("memory"),
            Self::Grow(more) => disk.set_len(len + u64::from(more)).expect("memory"),
        }
    }
}
