//! What is done to an image whose tables are known, and which guest clusters it cannot touch.
use super::super::support::disk::Disk;
use arbitrary::Arbitrary;
use formats::storage::Storage;

const COMPRESSED: u64 = 1 << 62;
/// The offset in an entry of an L1 table, or of an L2 table that is not compressed.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One fault.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Fault {
    /// An entry of the L1 table.
    L1(u8, Value),
    /// The entry of a guest cluster, where it has a table.
    L2(u16, Value),
    /// An entry of the refcount table.
    Reftable(u8, Value),
    /// A byte of the first refcount block.
    Refcount(u16, u8),
    /// The file ends after so many clusters and bytes.
    Cut(u8, u16),
}

/// What a 64-bit entry becomes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    Any(u64),
    /// A cluster of the file, perhaps of a table or another guest's, with the flags.
    Cluster(u8, u8),
    /// Another bit is flipped.
    Bit(u8),
    /// A compressed cluster at any byte of the file, with any length.
    Compressed(u32, u16),
    /// Far behind the end of the file.
    Far(u16),
}

impl Value {
    fn replace(self, old: u64, bits: u32) -> u64 {
        match self {
            Self::Any(value) => value,
            Self::Cluster(cluster, flags) => {
                u64::from(cluster) << bits | u64::from(flags & 1) | u64::from(flags >> 1 & 3) << 62
            }
            Self::Bit(bit) => old ^ 1 << (bit % 64),
            Self::Compressed(at, sectors) => {
                let x = 62 - (bits - 8);
                COMPRESSED | (u64::from(sectors) << x & (COMPRESSED - 1)) | u64::from(at)
            }
            Self::Far(clusters) => 1 << 63 | ((1 << 40) + (u64::from(clusters) << bits)),
        }
    }
}

/// An image whose tables are where `written` puts them.
pub struct Damaged<'a> {
    pub disk: &'a Disk,
    pub bits: u32,
    /// Bytes of an L2 entry.
    pub entry_bytes: u64,
    /// By guest cluster: it has to be read as it was written.
    pub known: Vec<bool>,
}

impl Damaged<'_> {
    pub fn strike(&mut self, fault: Fault) {
        let (cluster, per_table) = (1 << self.bits, (1 << self.bits) / self.entry_bytes);
        let tables = (self.known.len() as u64).div_ceil(per_table);
        match fault {
            Fault::L1(index, value) => {
                let index = u64::from(index) % tables;
                self.replace(2 * cluster + index * 8, value);
                self.known
                    .iter_mut()
                    .skip((index * per_table) as usize)
                    .take(per_table as usize)
                    .for_each(|k| *k = false);
            }
            Fault::L2(nth, value) => {
                let nth = u64::from(nth) % self.known.len() as u64;
                // Where the L1 entry is damaged it may lead into another table.
                if self.known[nth as usize]
                    && let Some(at) = self.l2_entry(nth)
                {
                    self.replace(at, value);
                    self.known[nth as usize] = false;
                }
            }
            Fault::Reftable(index, value) => self.replace(cluster + u64::from(index) * 8 % cluster, value),
            Fault::Refcount(at, value) => {
                let block = self.word(cluster) & OFFSET;
                self.write(block + u64::from(at) % cluster, &[value]);
            }
            Fault::Cut(clusters, bytes) => self.cut(u64::from(clusters) * cluster + u64::from(bytes) % cluster),
        }
    }

    fn cut(&mut self, len: u64) {
        if len >= self.disk.len().expect("memory") {
            return;
        }
        let tables = 3 << self.bits;
        for nth in 0..self.known.len() {
            self.known[nth] &= len >= tables && self.end_of(nth as u64) <= len;
        }
        self.disk.set_len(len).expect("memory");
    }

    /// Where in the file the last byte is that cluster `nth` needs; its entries are undamaged.
    fn end_of(&self, nth: u64) -> u64 {
        let Some(at) = self.l2_entry(nth) else { return 0 };
        let raw = self.word(at);
        let payload = if raw & COMPRESSED != 0 {
            let x = 62 - (self.bits - 8);
            let sectors = (raw & (COMPRESSED - 1)) >> x;
            (raw & ((1 << x) - 1)) + (sectors + 1) * 512
        } else {
            (raw & OFFSET) + (1 << self.bits)
        };
        // All of the table, for it may be read as one.
        payload.max((at | ((1 << self.bits) - 1)) + 1)
    }

    fn l2_entry(&self, nth: u64) -> Option<u64> {
        let per_table = (1 << self.bits) / self.entry_bytes;
        let table = self.word((2 << self.bits) + nth / per_table * 8) & OFFSET;
        (table != 0).then_some(table + nth % per_table * self.entry_bytes)
    }

    fn word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.disk.read_padded(at, &mut word);
        u64::from_be_bytes(word)
    }

    fn replace(&self, at: u64, value: Value) {
        self.write(at, &value.replace(self.word(at), self.bits).to_be_bytes());
    }

    /// Nothing makes the file longer.
    fn write(&self, at: u64, bytes: &[u8]) {
        if at.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.disk.len().expect("memory")) {
            self.disk.write_at(at, bytes).expect("memory");
        }
    }
}

/// Makes one field of a whole header wrong. Returns the word that the refusal has to have.
pub fn break_header(disk: &Disk, field: u8, value: u32, version: u32, bits: u32) -> &'static str {
    let many = u64::from(value);
    let odd = many | 1;
    // Offset and length of the field, what is wrong there, and the word.
    let faults: [(u64, usize, u64, &str); 15] = [
        (0, 4, odd, "no qcow2 image"),
        (4, 4, many.max(4), "version"),
        (8, 8, (1 << 22) + many, "backing name"),
        (20, 4, many % 9, "cluster_bits"),
        (20, 4, many.max(22), "cluster_bits"),
        (24, 8, (1 << 61) + odd, "size"),
        (32, 4, many.max(1), "encryption"),
        (36, 4, many.max((4 << 20) + 1), "l1_size"),
        (36, 4, 0, "l1_size"),
        (40, 8, many << bits | 1 << (many % u64::from(bits)), "l1_table_offset"),
        (48, 8, many << bits | 1 << (many % u64::from(bits)), "refcount_table_offset"),
        (56, 4, many.max((8 << 20 >> bits) + 1), "refcount_table_clusters"),
        (56, 4, 0, "refcount_table_clusters"),
        (60, 4, many.max(65537), "nb_snapshots"),
        (64, 8, odd, "snapshots_offset"),
    ];
    let faults_3: [(u64, usize, u64, &str); 4] = [
        (72, 8, 1 << (5 + many % 59), "incompatible feature bit"),
        (96, 4, many.max(7), "refcount_order"),
        (100, 4, odd, "header_length"),
        (100, 4, many % 13 * 8, "header_length"),
    ];
    let all = faults.len() + if version == 3 { faults_3.len() } else { 0 };
    let nth = usize::from(field) % all;
    let (at, len, wrong, word) = faults.get(nth).copied().unwrap_or_else(|| faults_3[nth - faults.len()]);
    disk.write_at(at, &wrong.to_be_bytes()[8 - len..]).expect("memory");
    if word == "backing name" {
        disk.write_at(16, &4_u32.to_be_bytes()).expect("memory");
    }
    if word == "snapshots_offset" {
        disk.write_at(60, &1_u32.to_be_bytes()).expect("memory");
    }
    word
}
