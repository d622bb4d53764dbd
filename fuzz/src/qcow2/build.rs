//! Images written from the specification alone (qcow2.rst), of which it is known what they hold; and
//! what may then be done to their bytes.
use super::super::support::disk::Disk;
use arbitrary::Arbitrary;
use formats::storage::Storage;

/// What a guest reads from the image below.
pub const BELOW: u8 = 0xbe;
/// No disk is longer: it is compared byte by byte.
pub const SIZE_MAX: u64 = 192 << 10;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
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
    /// A `Content` each.
    contents: &'a [u8],
    damage: Vec<Damage>,
}

/// What the next guest clusters are.
#[derive(Clone, Copy, Debug)]
enum Content {
    Absent(u8),
    Data,
    /// Payload that the cluster before it has as well, where a refcount can say so.
    Shared,
    Zero,
    /// Zeroes with a cluster set aside.
    Kept,
    Compressed,
}

impl From<u8> for Content {
    fn from(byte: u8) -> Self {
        match byte % 8 {
            0 => Self::Absent(byte / 8),
            1 | 2 => Self::Data,
            3 => Self::Shared,
            4 => Self::Zero,
            5 => Self::Kept,
            _ => Self::Compressed,
        }
    }
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
        let mut writer = Writer::new(self);
        for content in self.contents.iter().take(ENTRIES_MAX) {
            writer.content((*content).into());
        }
        let guest = writer.finish(self);
        let disk = writer.disk;
        for damage in self.damage.iter().take(16) {
            damage.strike(&disk, writer.bits);
        }
        disk.flush();
        (disk, self.damage.is_empty().then_some(guest))
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

/// Where the next cluster of an image comes to, and what is in it so far.
struct Writer {
    disk: Disk,
    bits: u32,
    version: u32,
    /// Entries have a bitmap of 32 subclusters.
    extended: bool,
    order: u32,
    size: u64,
    zstd: bool,
    below: bool,
    /// References of each cluster of the file.
    counts: Vec<u64>,
    /// L2 entries by guest cluster; the second word is the bitmap, where they have one.
    entries: Vec<[u64; 2]>,
    guest: Vec<u8>,
    /// Where compressed bytes may go on, inside a cluster.
    packed: u64,
    tag: u8,
}

impl Writer {
    fn new(build: &Build) -> Self {
        // Large ones are slow and seldom show more.
        let bits = match build.cluster_size {
            77 => 21,
            128..160 => 10,
            160..192 => 11,
            192..224 => 12,
            224..240 => 16,
            240.. => 14,
            _ => 9,
        };
        let extended = build.cluster_size >= 240;
        let version = if build.version_2 && !extended { 2 } else { 3 };
        let clusters = u64::from(build.clusters % 200 + 1).min((SIZE_MAX >> bits).max(1));
        let sectors = 1 << (bits - 9);
        let size = ((clusters - 1) * sectors + u64::from(build.tail) % sectors + 1) << 9;
        Self {
            disk: Disk::default(),
            bits,
            version,
            extended,
            order: if version == 2 { 4 } else { u32::from(build.refcount_order % 7) },
            size: size.min(SIZE_MAX),
            zstd: build.zstd && version == 3,
            below: build.below,
            // The header, one cluster of the refcount table, one of the L1 table.
            counts: vec![1; 3],
            entries: Vec::new(),
            guest: Vec::new(),
            packed: 0,
            tag: 0,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    fn take(&mut self) -> u64 {
        self.counts.push(1);
        (self.counts.len() as u64 - 1) << self.bits
    }

    fn guest_clusters(&self) -> usize {
        self.size.div_ceil(self.cluster()) as usize
    }

    /// One guest cluster, or a few that have nothing.
    fn content(&mut self, content: Content) {
        self.tag = self.tag % 180 + 1;
        match content {
            _ if self.entries.len() >= self.guest_clusters() => {}
            Content::Absent(more) => (0..=more).for_each(|_| self.absent()),
            Content::Data => {
                let host = self.take();
                self.write_payload(host);
                let some = if self.tag.is_multiple_of(4) { u32::MAX } else { self.some() };
                match self.extended {
                    true => self.push_subclusters(host | COPIED, some),
                    false => self.push([host | COPIED, 0], self.tag),
                }
            }
            Content::Shared => self.share(),
            Content::Zero | Content::Kept if self.version == 2 => self.absent(),
            Content::Zero if self.extended => self.push_subclusters(0, 0),
            Content::Zero => self.push([1, 0], 0),
            Content::Kept => {
                let host = self.take();
                self.write_payload(host);
                match self.extended {
                    true => self.push_subclusters(host | COPIED, 0),
                    false => self.push([host | COPIED | 1, 0], 0),
                }
            }
            Content::Compressed => self.compress(),
        }
    }

    fn push(&mut self, entry: [u64; 2], byte: u8) {
        self.entries.push(entry);
        self.guest.resize(self.entries.len() << self.bits, byte);
    }

    /// Some of 32 subclusters.
    fn some(&self) -> u32 {
        u32::from(self.tag).wrapping_mul(0x9e37_79b9)
    }

    /// A cluster of which the subclusters `data` have payload; of the others some are zeroes and some absent.
    fn push_subclusters(&mut self, descriptor: u64, data: u32) {
        let zero = !data & self.some().rotate_left(13);
        self.entries.push([descriptor, u64::from(zero) << 32 | u64::from(data)]);
        let absent = if self.below { BELOW } else { 0 };
        for nth in 0..32 {
            let byte = match (data >> nth & 1, zero >> nth & 1) {
                (1, _) => self.tag,
                (_, 1) => 0,
                _ => absent,
            };
            self.guest.resize(self.guest.len() + (1 << (self.bits - 5)), byte);
        }
    }

    fn absent(&mut self) {
        if self.entries.len() < self.guest_clusters() {
            self.push([0, 0], if self.below { BELOW } else { 0 });
        }
    }

    fn write_payload(&mut self, host: u64) {
        self.disk.write_at(host, &vec![self.tag; self.cluster() as usize]).expect("memory");
    }

    fn share(&mut self) {
        let last = self.entries.last().copied().filter(|[last, _]| last & (COMPRESSED | 1) == 0 && *last != 0);
        let Some([last, bitmap]) = last.filter(|_| self.order > 0) else { return self.content(Content::Data) };
        let host = last & !COPIED;
        let count = &mut self.counts[(host >> self.bits) as usize];
        if *count < 2 {
            *count += 1;
            self.entries.pop();
            self.entries.extend([[host, bitmap]; 2]);
            self.guest.extend_from_within(self.guest.len() - (1 << self.bits)..);
        }
    }

    fn compress(&mut self) {
        let bytes = if self.zstd { zstd_frame(self.tag, self.cluster()) } else { deflate(self.tag, self.cluster()) };
        let sectors_of = |at: u64| ((at & 511) + bytes.len() as u64).div_ceil(512);
        let most = self.cluster() >> 8;
        // Next to the one before where a refcount can say that they share a cluster.
        if self.order < 3 || self.packed & (self.cluster() - 1) == 0 || sectors_of(self.packed) > most {
            self.packed = (self.counts.len() as u64) << self.bits;
        }
        let (at, sectors) = (self.packed, sectors_of(self.packed));
        let (first, last) = (at >> self.bits, ((at & !511) + sectors * 512 - 1) >> self.bits);
        // Clusters that were taken since are in the way.
        if first + 1 < self.counts.len() as u64 && last > first {
            self.packed = 0;
            return self.compress();
        }
        self.counts.resize(self.counts.len().max(last as usize + 1), 0);
        (first..=last).for_each(|cluster| self.counts[cluster as usize] += 1);
        self.disk.write_at(at, &bytes).expect("memory");
        self.packed = at + bytes.len() as u64;
        let x = 62 - (self.bits - 8);
        // A compressed cluster has no subclusters: nobody looks at the bitmap.
        let bitmap = u64::from(self.some()) << 32 | u64::MAX >> 32;
        self.push([COMPRESSED | (sectors - 1) << x | at, bitmap], self.tag);
    }

    /// Writes the tables and the header; returns what a guest reads.
    fn finish(&mut self, build: &Build) -> Vec<u8> {
        let words = if self.extended { 2 } else { 1 };
        let per_table = self.cluster() as usize / 8 / words;
        let mut l1 = Vec::new();
        for table in std::mem::take(&mut self.entries).chunks(per_table) {
            if table.iter().all(|entry| entry[0] == 0 && entry[words - 1] == 0) {
                l1.push(0);
                continue;
            }
            let host = self.take();
            let table: Vec<u64> = table.iter().flat_map(|entry| &entry[..words]).copied().collect();
            self.write_words(host, &table);
            l1.push(host | COPIED);
        }
        let needed = self.guest_clusters().div_ceil(per_table);
        l1.resize(needed, 0);
        self.write_words(2 << self.bits, &l1);
        self.write_counts();
        self.write_header(build, needed);
        let len = (self.counts.len() as u64) << self.bits;
        self.disk.set_len(len).expect("memory");
        let mut guest = std::mem::take(&mut self.guest);
        guest.resize(self.size as usize, if self.below { BELOW } else { 0 });
        guest
    }

    fn write_words(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.disk.write_at(at, &bytes).expect("memory");
    }

    fn write_counts(&mut self) {
        let per_block = (self.cluster() * 8) >> self.order;
        let mut blocks = Vec::new();
        while (blocks.len() as u64) * per_block < self.counts.len() as u64 {
            blocks.push(self.take());
        }
        self.write_words(1 << self.bits, &blocks);
        for (block, counts) in blocks.iter().zip(self.counts.chunks(per_block as usize)) {
            let mut bytes = vec![0; self.cluster() as usize];
            for (index, count) in counts.iter().enumerate() {
                let bit = index << self.order;
                match self.order {
                    0..3 => bytes[bit / 8] |= (*count as u8) << (bit % 8),
                    _ => {
                        let width = 1 << (self.order - 3);
                        bytes[bit / 8..][..width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
                    }
                }
            }
            self.disk.write_at(*block, &bytes).expect("memory");
        }
    }

    fn write_header(&self, build: &Build, l1_entries: usize) {
        let mut bytes = b"QFI\xfb".to_vec();
        let mut put = |value: u64, width: usize| bytes.extend_from_slice(&value.to_be_bytes()[8 - width..]);
        put(self.version.into(), 4);
        put(0, 8);
        put(0, 4);
        put(self.bits.into(), 4);
        put(self.size, 8);
        put(0, 4);
        put(l1_entries as u64, 4);
        put(2 << self.bits, 8);
        put(1 << self.bits, 8);
        put(1, 4);
        put(0, 4);
        put(0, 8);
        if self.version == 3 {
            put(u64::from(self.zstd) << 3 | u64::from(self.extended) << 4, 8);
            put(0, 8);
            put(0, 8);
            put(self.order.into(), 4);
            put(112, 4);
            put(u64::from(self.zstd) << 56, 8);
        }
        for (kind, data) in build.extensions.iter().take(8) {
            // Those that mean something have a form of their own, and an end would hide the others.
            let known = [0, 0xe279_2aca, 0x2385_2875].contains(kind);
            if !known && bytes.len() + 16 + data.len().next_multiple_of(8) <= 512 {
                bytes.extend_from_slice(&kind.to_be_bytes());
                bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
                bytes.extend_from_slice(data);
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
        }
        self.disk.write_at(0, &bytes).expect("memory");
    }
}

/// `len` times `byte` as a deflate stream of stored blocks (RFC 1951, 3.2.4).
fn deflate(byte: u8, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = len;
    while rest > 0 {
        let block = rest.min(0xffff) as u16;
        rest -= u64::from(block);
        bytes.push(u8::from(rest == 0));
        bytes.extend_from_slice(&block.to_le_bytes());
        bytes.extend_from_slice(&(!block).to_le_bytes());
        bytes.resize(bytes.len() + usize::from(block), byte);
    }
    bytes
}

/// `len` times `byte` as a zstd frame of run-length blocks (RFC 8878, 3.1.1).
fn zstd_frame(byte: u8, len: u64) -> Vec<u8> {
    // One segment, its length in four bytes.
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    bytes.extend_from_slice(&(len as u32).to_le_bytes());
    let mut rest = len;
    while rest > 0 {
        let block = rest.min(128 << 10) as u32;
        rest -= u64::from(block);
        let header = block << 3 | 1 << 1 | u32::from(rest == 0);
        bytes.extend_from_slice(&header.to_le_bytes()[..3]);
        bytes.push(byte);
    }
    bytes
}
