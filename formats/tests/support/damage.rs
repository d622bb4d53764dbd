//! Images of qemu-img's with snapshots, bitmaps and compressed clusters, and what can be broken of them.
use super::qemu::run;
use super::random::Random;
use std::path::Path;

/// Bytes of an image, changed where its tables are.
pub struct Patient {
    pub bytes: Vec<u8>,
    cluster_bits: u32,
    refcount_order: u32,
    version: u32,
    /// Bytes of an L2 entry.
    entry: u64,
    /// Payload is in a file of its own.
    apart: bool,
}

/// What images may have beside payload and snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinds {
    /// Not snapshots and bitmaps at once: a repair of QEMU's forgets the former then (10.0.2).
    QemuRepairs,
    /// Anything.
    All,
}

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A refcount is another one.
    Count,
    /// A refcount is 0.
    CountZero,
    /// A cluster counts that nobody uses.
    Leak,
    /// A copied flag of an L2 entry, or of an L1 entry.
    L2Flag,
    L1Flag,
    /// Reserved bits.
    L2Reserved,
    L1Reserved,
    /// Entries that point at no cluster's start, past the end, or where another one points.
    L2Crooked,
    ZeroCrooked,
    L1Crooked,
    L2Past,
    L1Past,
    L2Shared,
    L1Shared,
    /// An entry of the refcount table.
    BlockGone,
    BlockPast,
    BlockShared,
    BlockReserved,
    /// A guest's entry points at a refcount block.
    BlockOverlapped,
    /// A subcluster has payload and reads as zeroes, or has payload and the cluster no place.
    BothKinds,
    Homeless,
    /// The file ends earlier.
    Cut,
}

use Damage::{
    BlockGone, BlockOverlapped, BlockPast, BlockReserved, BlockShared, BothKinds, Count, CountZero, Cut, Homeless,
    L1Crooked, L1Flag, L1Past, L1Reserved, L1Shared, L2Crooked, L2Flag, L2Past, L2Reserved, L2Shared, Leak,
    ZeroCrooked,
};

impl Damage {
    /// Nothing that a guest reads has changed.
    pub const HARMLESS: [Damage; 9] =
        [Count, CountZero, Leak, L2Flag, L1Flag, BlockGone, BlockPast, BlockShared, BlockReserved];
    pub const ALL: [Damage; 22] = [
        Count,
        CountZero,
        Leak,
        L2Flag,
        L1Flag,
        L2Reserved,
        L1Reserved,
        L2Crooked,
        ZeroCrooked,
        L1Crooked,
        L2Past,
        L1Past,
        L2Shared,
        L1Shared,
        BlockGone,
        BlockPast,
        BlockShared,
        BlockReserved,
        BlockOverlapped,
        BothKinds,
        Homeless,
        Cut,
    ];
}

/// Makes `image.qcow2` in `folder`; `what` tells of it.
pub fn make(folder: &Path, kinds: Kinds, random: &mut Random, what: &mut String) {
    let old = random.one_in(4);
    let extended = !old && random.one_in(4);
    let apart = !old && random.one_in(6);
    let bits = if extended { 14 } else { [9, 9, 10, 12, 16][random.below(5) as usize] };
    let counts = if old { 16 } else { 2 << random.below(6) };
    let size = (100 + random.below(900)) << bits;
    let mut options = format!("cluster_size={}", 1 << bits);
    match old {
        true => options += ",compat=0.10",
        false => {
            options += &format!(",refcount_bits={counts},lazy_refcounts={}", ["on", "off"][random.below(2) as usize])
        }
    }
    if extended {
        options += ",extended_l2=on";
    }
    if apart {
        options += ",data_file=image.data";
    }
    let size_text = size.to_string();
    let mut step = |program: &str, arguments: &[&str]| {
        *what += &format!("\n{program} {}", arguments.join(" "));
        run(folder, program, arguments);
    };
    step("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "image.qcow2", &size_text]);
    let bitmap = !old && random.one_in(3);
    if bitmap {
        step("qemu-img", &["bitmap", "--add", "image.qcow2", "bits"]);
    }
    let snapshots = !apart && counts > 2 && (!bitmap || kinds == Kinds::All);
    for round in 0..3 {
        let mut commands = Vec::new();
        for _ in 0..1 + random.below(6) {
            let first = random.below(size >> bits);
            let count = 1 + random.below(((size >> bits) - first).min(60));
            let range = format!("{} {}", first << bits, count << bits);
            // What has a place already cannot be written compressed.
            commands.push(match random.below(6) {
                0 if counts >= 16 && round == 0 && !apart && commands.is_empty() => format!("write -c -P 9 {range}"),
                1 if !old => format!("write -z {range}"),
                2 => format!("discard {range}"),
                // A few of the subclusters.
                3 if extended => format!("write -P {round} {} 1024", (first << bits) + 2048),
                nth => format!("write -P {} {range}", nth + 10 * round),
            });
        }
        let arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).chain(["image.qcow2"]).collect();
        step("qemu-io", &arguments);
        if round < 2 && snapshots && random.one_in(2) {
            step("qemu-img", &["snapshot", "-c", &format!("s{round}"), "image.qcow2"]);
        }
    }
}

impl Patient {
    pub fn new(bytes: Vec<u8>) -> Self {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four"));
        let version = word(4);
        let refcount_order = if version == 2 { 4 } else { word(96) };
        let incompatible = if version == 2 { 0 } else { word(76) };
        let entry = if incompatible & 16 == 0 { 8 } else { 16 };
        Self { cluster_bits: word(20), refcount_order, version, entry, apart: incompatible & 4 != 0, bytes }
    }

    fn get(&self, at: usize) -> u64 {
        self.bytes.get(at..at + 8).map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().expect("eight")))
    }

    fn put(&mut self, at: usize, value: u64) {
        if let Some(bytes) = self.bytes.get_mut(at..at + 8) {
            bytes.copy_from_slice(&value.to_be_bytes());
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn past(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(self.cluster()) + 3 * self.cluster()
    }

    /// Where entries of a table are that are not 0.
    fn entries(&self, at: u64, count: u64, bytes: u64) -> Vec<usize> {
        (0..count).map(|nth| (at + nth * bytes) as usize).filter(|at| self.get(*at) != 0).collect()
    }

    fn l1(&self) -> Vec<usize> {
        let count = u32::from_be_bytes(self.bytes[36..40].try_into().expect("four"));
        self.entries(self.get(40), u64::from(count), 8)
    }

    fn l2(&self) -> Vec<usize> {
        let offset = |at: &usize| self.get(*at) & 0x00ff_ffff_ffff_fe00;
        self.l1().iter().flat_map(|at| self.entries(offset(at), self.cluster() / self.entry, self.entry)).collect()
    }

    /// L2 entries of payload that is not compressed.
    fn data(&self) -> Vec<usize> {
        let plain = |raw: u64| raw & 1 << 62 == 0 && raw & 0x00ff_ffff_ffff_fe00 != 0;
        self.l2().into_iter().filter(|at| plain(self.get(*at))).collect()
    }

    fn blocks(&self) -> Vec<usize> {
        let clusters = u32::from_be_bytes(self.bytes[56..60].try_into().expect("four"));
        self.entries(self.get(48), u64::from(clusters) * self.cluster() / 8, 8)
    }

    /// The refcount of a cluster that a guest's entry points at becomes `count`.
    fn count(&mut self, cluster: u64, count: u64) {
        let per_block = (self.cluster() * 8) >> self.refcount_order;
        let block = self.get((self.get(48) + cluster / per_block * 8) as usize);
        if block == 0 {
            return;
        }
        let bit = (cluster % per_block) << self.refcount_order;
        let width = 1 << self.refcount_order;
        for nth in 0..width.max(8) / 8 {
            let at = (block + bit / 8 + nth) as usize;
            let Some(byte) = self.bytes.get_mut(at) else { return };
            if width < 8 {
                let mask = ((1 << width) - 1) << (bit % 8);
                *byte = *byte & !(mask as u8) | (count << (bit % 8) & mask) as u8;
            } else {
                *byte = (count >> (width - 8 - nth * 8)) as u8;
            }
        }
    }

    /// Breaks something; false where the image has nothing of that kind.
    pub fn hurt(&mut self, damage: Damage, random: &mut Random) -> bool {
        let clusters = self.bytes.len() as u64 >> self.cluster_bits;
        let (l1, data, blocks) = (self.l1(), self.data(), self.blocks());
        let place = match damage {
            L1Flag | L1Reserved | L1Crooked | L1Past | L1Shared => &l1,
            BlockGone | BlockPast | BlockShared | BlockReserved => &blocks,
            _ => &data,
        };
        let (Some(at), Some(other)) = (pick(place, random), pick(place, random)) else { return false };
        let raw = self.get(at);
        let offset = raw & 0x00ff_ffff_ffff_fe00;
        // Of an entry that says where in a data file its payload is, a check looks at the start of a cluster alone.
        if self.apart && [L2Past, L2Shared, CountZero, BlockOverlapped].contains(&damage) {
            return false;
        }
        let crooked = raw + 512 * (1 + random.below((self.cluster() / 512).clamp(2, 5) - 1));
        match damage {
            Count => self.count(random.below(clusters), random.below(4)),
            CountZero => self.count(offset >> self.cluster_bits, 0),
            Leak => {
                self.bytes.resize((clusters as usize + 1) << self.cluster_bits, 0);
                self.count(clusters, 1);
            }
            L2Flag | L1Flag => self.put(at, raw ^ 1 << 63),
            L2Reserved | L1Reserved => self.put(at, raw | 1 << (56 + random.below(6))),
            L2Crooked | L1Crooked | ZeroCrooked if self.cluster_bits == 9 => return false,
            ZeroCrooked if self.version == 2 => return false,
            ZeroCrooked if self.entry == 16 => {
                self.put(at, crooked);
                self.put(at + 8, self.get(at + 8) & 0xffff_ffff_0000_0000);
            }
            ZeroCrooked => self.put(at, crooked | 1),
            BothKinds | Homeless if self.entry == 8 => return false,
            BothKinds => self.put(at + 8, self.get(at + 8) | 1 << 32 | 1),
            Homeless => {
                self.put(at, 0);
                self.put(at + 8, 1 << random.below(32));
            }
            L2Crooked | L1Crooked => self.put(at, crooked),
            L2Past | L1Past => self.put(at, self.past() | raw & 1 << 63),
            L2Shared | L1Shared | BlockShared if at == other => return false,
            L2Shared | L1Shared | BlockShared => self.put(at, self.get(other)),
            BlockGone => self.put(at, 0),
            BlockPast => self.put(at, self.past()),
            BlockReserved => self.put(at, raw | 1 << random.below(9)),
            BlockOverlapped if blocks.is_empty() => return false,
            BlockOverlapped => self.put(at, self.get(blocks[0]) | raw & 1 << 63),
            Cut => self.bytes.truncate(self.bytes.len() - random.below(self.bytes.len() as u64 / 8) as usize),
        }
        true
    }
}

fn pick(places: &[usize], random: &mut Random) -> Option<usize> {
    (!places.is_empty()).then(|| places[random.below(places.len() as u64) as usize])
}
