//! Images written from the specification alone (qcow2.rst), of which it is known what they hold.
//!
//! ```text
//!  header  refcount table  L1 table
//!    0           1             2      payload, L2 tables, a snapshot's tables, refcount blocks …
//! ```
use super::disk::{Disk, SECTOR};
use super::stamp::{Writer, stamped};
use formats::range::ByteRange;
use formats::storage::Storage;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The external data file, as the image names it.
pub const DATA_FILE_NAME: &str = "data";
/// The header extension that names it.
const DATA_FILE: (u32, &[u8]) = (0x4441_5441, DATA_FILE_NAME.as_bytes());
/// Extended L2: a cluster has so many subclusters.
const SUBCLUSTERS: u64 = 32;

/// What kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    /// A cluster has 2 to this bytes. Its L1 table has to fit in one.
    pub cluster_bits: u32,
    /// A refcount has 2 to this bits.
    pub refcount_order: u32,
    /// Bytes of the disk: whole sectors.
    pub size: u64,
    /// Compressed clusters are zstd frames.
    pub zstd: bool,
    /// There is an image below, which reads as `Writer::Below`.
    pub below: bool,
    /// L2 entries have a bitmap of subclusters. Clusters from 16 KiB on.
    pub extended: bool,
    /// An internal snapshot shares everything. Refcounts from 8 bits on.
    pub snapshot: bool,
    pub payload: Payload,
}

/// Where payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    Inside,
    /// In an external data file, which has another tenant's bytes where the image has nothing. Version 3,
    /// nothing compressed or shared.
    External,
    /// In an external data file that is the disk by itself. Nothing is below.
    Raw,
}

/// An image, all of it durable.
pub struct Written {
    pub image: Disk,
    /// The external data file.
    pub data: Option<Disk>,
    /// What a guest reads.
    pub bytes: Vec<u8>,
}

/// What the next guest cluster is.
#[derive(Clone, Copy, Debug)]
pub enum Content {
    Absent,
    Data,
    /// Payload that the cluster before it has as well, where a refcount can say so.
    Shared,
    Zero,
    /// Zeroes with a cluster set aside.
    Kept,
    Compressed,
    /// Subclusters, two bits each: absent, payload, zeroes. Needs extended L2.
    Mixed(u64),
}

/// An L2 entry, and its bitmap where there is one.
#[derive(Clone, Copy, Default)]
struct L2Entry {
    raw: u64,
    bitmap: u64,
}

/// Where the next cluster of an image comes to, and what is in it so far.
pub struct ImageWriter {
    shape: Shape,
    disk: Disk,
    data: Option<Disk>,
    /// References of each cluster of the file.
    counts: Vec<u64>,
    /// By guest cluster.
    entries: Vec<L2Entry>,
    guest: Vec<u8>,
    /// Where compressed bytes may go on, inside a cluster.
    packed: u64,
    snapshots_at: u64,
}

impl ImageWriter {
    pub fn new(shape: Shape) -> Self {
        let external = shape.payload != Payload::Inside;
        Self {
            shape,
            disk: Disk::default(),
            data: external.then(|| Disk::with(&stamped(ByteRange { start: 0, end: shape.size }, Writer::Foreign))),
            counts: vec![1; 3],
            entries: Vec::new(),
            guest: Vec::new(),
            packed: 0,
            snapshots_at: 0,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    fn take(&mut self) -> u64 {
        self.counts.push(1);
        (self.counts.len() as u64 - 1) << self.shape.cluster_bits
    }

    fn guest_clusters(&self) -> usize {
        self.shape.size.div_ceil(self.cluster()) as usize
    }

    /// True where the disk has no further cluster.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.guest_clusters()
    }

    /// A cluster of the file that is free and has another tenant's bytes.
    pub fn garbage(&mut self) {
        let host = self.take();
        self.counts.pop();
        self.counts.push(0);
        let range = ByteRange { start: host, end: host + self.cluster() };
        self.disk.write_at(host, &stamped(range, Writer::Foreign)).expect("memory");
    }

    /// The next guest cluster; nothing where the disk has no further one.
    pub fn content(&mut self, content: Content) {
        let below = self.stamped(Writer::Below);
        match content {
            _ if self.is_full() => {}
            Content::Shared | Content::Compressed if self.data.is_some() => self.content(Content::Data),
            Content::Absent => self.push(0, &below),
            Content::Data => {
                let (host, payload) = self.payload();
                self.push(host | COPIED, &payload);
            }
            Content::Shared => self.share(),
            Content::Zero | Content::Kept if self.shape.version == 2 => self.push(0, &below),
            Content::Zero => self.push(ZERO, &[]),
            Content::Kept => {
                let (host, _) = self.payload();
                self.push(host | COPIED | ZERO, &[]);
            }
            Content::Compressed => self.compress(),
            Content::Mixed(kinds) => self.mix(kinds),
        }
    }

    /// What `writer` would have put into the next guest cluster.
    fn stamped(&self, writer: Writer) -> Vec<u8> {
        let start = self.guest.len() as u64;
        let writer = if writer == Writer::Below && !self.shape.below { Writer::Nobody } else { writer };
        stamped(ByteRange { start, end: start + self.cluster() }, writer)
    }

    /// Adds an entry for a cluster that reads as `bytes`, padded with zeroes.
    fn push(&mut self, raw: u64, bytes: &[u8]) {
        let whole = raw & (COMPRESSED | ZERO) == 0 && raw != 0;
        let bitmap = if raw & (COMPRESSED | ZERO) == ZERO {
            u64::MAX << SUBCLUSTERS
        } else {
            u64::from(whole) * (u64::MAX >> SUBCLUSTERS)
        };
        // With subclusters, their bitmap says what the flag says without.
        let raw = if self.shape.extended && raw & COMPRESSED == 0 { raw & !ZERO } else { raw };
        self.entries.push(L2Entry { raw, bitmap });
        self.guest.extend_from_slice(bytes);
        self.guest.resize(self.entries.len() << self.shape.cluster_bits, 0);
    }

    /// A cluster with payload: of the file, or at its own place in the external data file.
    fn payload(&mut self) -> (u64, Vec<u8>) {
        let payload = self.stamped(Writer::First);
        let host = if self.data.is_some() { self.guest.len() as u64 } else { self.take() };
        self.data.as_ref().unwrap_or(&self.disk).write_at(host, &payload).expect("memory");
        (host, payload)
    }

    fn share(&mut self) {
        let last =
            self.entries.last().map(|last| last.raw).filter(|last| last & (COMPRESSED | ZERO) == 0 && *last != 0);
        let Some(last) = last.filter(|_| self.shape.refcount_order > 0) else { return self.content(Content::Data) };
        let host = last & !COPIED;
        let count = &mut self.counts[(host >> self.shape.cluster_bits) as usize];
        if *count < 2 {
            *count += 1;
            let payload = self.guest[self.guest.len() - self.cluster() as usize..].to_vec();
            self.entries.last_mut().expect("just looked at").raw = host;
            self.push(host, &payload);
        }
    }

    fn compress(&mut self) {
        let payload = self.stamped(Writer::First);
        let bytes = if self.shape.zstd { zstd_frame(&payload) } else { deflate(&payload) };
        let sectors_of = |at: u64| ((at & 511) + bytes.len() as u64).div_ceil(512);
        let most = self.cluster() >> 8;
        // Next to the one before where a refcount can say that they share a cluster.
        if self.shape.refcount_order < 3 || self.packed & (self.cluster() - 1) == 0 || sectors_of(self.packed) > most {
            self.packed = (self.counts.len() as u64) << self.shape.cluster_bits;
        }
        let (at, sectors) = (self.packed, sectors_of(self.packed));
        let bits = self.shape.cluster_bits;
        let (first, last) = (at >> bits, ((at & !511) + sectors * 512 - 1) >> bits);
        // Clusters that were taken since are in the way.
        if first + 1 < self.counts.len() as u64 && last > first {
            self.packed = 0;
            return self.compress();
        }
        self.counts.resize(self.counts.len().max(last as usize + 1), 0);
        (first..=last).for_each(|cluster| self.counts[cluster as usize] += 1);
        self.disk.write_at(at, &bytes).expect("memory");
        self.packed = at + bytes.len() as u64;
        let x = 62 - (bits - 8);
        self.push(COMPRESSED | (sectors - 1) << x | at, &payload);
    }

    /// One cluster of subclusters of all kinds.
    fn mix(&mut self, kinds: u64) {
        if !self.shape.extended {
            return self.content(Content::Data);
        }
        let (host, payload) = self.payload();
        let (mut bitmap, mut bytes) = (0, self.stamped(Writer::Below));
        let len = payload.len() / SUBCLUSTERS as usize;
        for nth in 0..SUBCLUSTERS as usize {
            let here = nth * len..(nth + 1) * len;
            match kinds >> (nth * 2) & 3 {
                0 => {}
                1 => {
                    bitmap |= 1 << (nth + SUBCLUSTERS as usize);
                    bytes[here].fill(0);
                }
                _ => {
                    bitmap |= 1 << nth;
                    bytes[here.clone()].copy_from_slice(&payload[here]);
                }
            }
        }
        self.push(host | COPIED, &bytes);
        self.entries.last_mut().expect("just pushed").bitmap = bitmap;
    }

    /// Writes the tables and the header.
    pub fn finish(mut self, extensions: &[(u32, &[u8])]) -> Written {
        while !self.is_full() {
            self.content(Content::Absent);
        }
        let entry_bytes = if self.shape.extended { 16 } else { 8 };
        let per_table = self.cluster() as usize / entry_bytes;
        let needed = self.guest_clusters().div_ceil(per_table);
        if self.shape.snapshot {
            self.share_all();
        }
        let mut l1 = Vec::new();
        let entries = std::mem::take(&mut self.entries);
        for table in entries.chunks(per_table) {
            if table.iter().all(|entry| entry.raw == 0 && (entry.bitmap == 0 || !self.shape.extended)) {
                l1.push(0);
                continue;
            }
            let host = self.take();
            let words = table.iter().flat_map(|entry| [entry.raw, entry.bitmap].into_iter().take(entry_bytes / 8));
            self.write_words(host, &words.collect::<Vec<u64>>());
            l1.push(if self.shape.snapshot { host } else { host | COPIED });
            *self.counts.last_mut().expect("just taken") += u64::from(self.shape.snapshot);
        }
        l1.resize(needed, 0);
        self.write_words(2 << self.shape.cluster_bits, &l1);
        if self.shape.snapshot {
            self.write_snapshot(&l1);
        }
        self.write_counts();
        self.write_header(extensions, needed);
        self.disk.set_len((self.counts.len() as u64) << self.shape.cluster_bits).expect("memory");
        self.disk.flush();
        self.guest.truncate(self.shape.size as usize);
        if let Some(data) = &self.data {
            if self.shape.payload == Payload::Raw {
                data.write_at(0, &self.guest).expect("memory");
            }
            data.set_len(self.shape.size).expect("memory");
            data.flush();
        }
        Written { image: self.disk, data: self.data, bytes: self.guest }
    }

    /// Every cluster of payload gets one more reference, and nobody has one alone.
    fn share_all(&mut self) {
        let bits = self.shape.cluster_bits;
        for entry in &mut self.entries {
            if entry.raw & COMPRESSED == 0 {
                entry.raw &= !COPIED;
            }
        }
        // All that is counted by now, tables apart, is payload.
        self.counts[3..].iter_mut().for_each(|count| *count *= 2);
        self.packed = (self.counts.len() as u64) << bits;
    }

    /// One snapshot with an L1 table that is like the active one; qcow2.rst, "Snapshots".
    fn write_snapshot(&mut self, l1: &[u64]) {
        let l1_at = self.take();
        self.write_words(l1_at, l1);
        self.snapshots_at = self.take();
        let mut bytes = l1_at.to_be_bytes().to_vec();
        bytes.extend_from_slice(&(l1.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&[0, 1, 0, 1]); // length of its id and of its name
        bytes.extend_from_slice(&[0; 20]); // date, the guest's clock, size of its memory
        bytes.extend_from_slice(&16_u32.to_be_bytes());
        bytes.extend_from_slice(&0_u64.to_be_bytes());
        bytes.extend_from_slice(&self.shape.size.to_be_bytes());
        bytes.extend_from_slice(b"1s");
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        self.disk.write_at(self.snapshots_at, &bytes).expect("memory");
    }

    fn write_words(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.disk.write_at(at, &vec![0; self.cluster() as usize]).expect("memory");
        self.disk.write_at(at, &bytes).expect("memory");
    }

    fn write_counts(&mut self) {
        let order = self.shape.refcount_order;
        let per_block = (self.cluster() * 8) >> order;
        let mut blocks = Vec::new();
        while (blocks.len() as u64) * per_block < self.counts.len() as u64 {
            blocks.push(self.take());
        }
        self.write_words(1 << self.shape.cluster_bits, &blocks);
        for (block, counts) in blocks.iter().zip(self.counts.chunks(per_block as usize)) {
            let mut bytes = vec![0; self.cluster() as usize];
            for (index, count) in counts.iter().enumerate() {
                let bit = index << order;
                match order {
                    0..3 => bytes[bit / 8] |= (*count as u8) << (bit % 8),
                    _ => {
                        let width = 1 << (order - 3);
                        bytes[bit / 8..][..width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
                    }
                }
            }
            self.disk.write_at(*block, &bytes).expect("memory");
        }
    }

    fn write_header(&self, extensions: &[(u32, &[u8])], l1_entries: usize) {
        let (shape, bits) = (self.shape, self.shape.cluster_bits);
        let mut bytes = b"QFI\xfb".to_vec();
        let mut put = |value: u64, width: usize| bytes.extend_from_slice(&value.to_be_bytes()[8 - width..]);
        put(shape.version.into(), 4);
        put(0, 8);
        put(0, 4);
        put(bits.into(), 4);
        put(shape.size, 8);
        put(0, 4);
        put(l1_entries as u64, 4);
        put(2 << bits, 8);
        put(1 << bits, 8);
        put(1, 4);
        put(shape.snapshot.into(), 4);
        put(self.snapshots_at, 8);
        if shape.version == 3 {
            let external = u64::from(shape.payload != Payload::Inside);
            put(external << 2 | u64::from(shape.zstd) << 3 | u64::from(shape.extended) << 4, 8);
            put(0, 8);
            put(u64::from(shape.payload == Payload::Raw) << 1, 8);
            put(shape.refcount_order.into(), 4);
            put(112, 4);
            put(u64::from(shape.zstd) << 56, 8);
        }
        let name: Option<&(u32, &[u8])> = self.data.as_ref().map(|_| &DATA_FILE);
        for (kind, data) in name.into_iter().chain(extensions) {
            if bytes.len() + 16 + data.len().next_multiple_of(8) <= SECTOR {
                bytes.extend_from_slice(&kind.to_be_bytes());
                bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
                bytes.extend_from_slice(data);
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
        }
        self.disk.write_at(0, &bytes).expect("memory");
    }
}

/// A deflate stream of stored blocks (RFC 1951, 3.2.4).
fn deflate(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = payload;
    while !rest.is_empty() {
        let (block, more) = rest.split_at(rest.len().min(0xffff));
        rest = more;
        let len = block.len() as u16;
        bytes.push(u8::from(rest.is_empty()));
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&(!len).to_le_bytes());
        bytes.extend_from_slice(block);
    }
    bytes
}

/// A zstd frame of raw blocks (RFC 8878, 3.1.1).
fn zstd_frame(payload: &[u8]) -> Vec<u8> {
    // One segment, its length in four bytes.
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let mut rest = payload;
    while !rest.is_empty() {
        let (block, more) = rest.split_at(rest.len().min(128 << 10));
        rest = more;
        let header = (block.len() as u32) << 3 | u32::from(rest.is_empty());
        bytes.extend_from_slice(&header.to_le_bytes()[..3]);
        bytes.extend_from_slice(block);
    }
    bytes
}
