//! Images of every kind that qemu-img makes, with the histories that images have: writes, snapshots, resizes,
//! rebases and commits, all of it decided by one seed.
use crate::support::images::{compressed_orders, create, overlay, random_order};
use crate::support::random::Random;
use crate::support::tools::{output, ran, told};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What an image can have and this program may not know yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feature {
    /// Internal snapshots.
    Snapshots,
    /// Persistent bitmaps.
    Bitmaps,
    /// Subclusters.
    ExtendedL2,
    /// Payload in a file of its own.
    DataFile,
}

/// What is made. A line less leaves out what cannot be read yet.
const FEATURES: &[Feature] = &[Feature::Snapshots, Feature::Bitmaps, Feature::ExtendedL2, Feature::DataFile];

/// Sectors of the largest disk.
const SECTORS_MAX: u64 = 8192;
const SECTOR: u64 = 512;

/// One layer.
#[derive(Clone, Debug)]
pub struct Layer {
    pub file: PathBuf,
    pub format: &'static str,
    size: u64,
    cluster: u64,
    version: u32,
    /// It has subclusters.
    extended: bool,
    /// Its payload is in a file of its own: it has no snapshots.
    apart: bool,
    snapshots: u64,
    /// It has a bitmap: QEMU goes back to no snapshot then.
    bitmaps: bool,
    /// No cluster has been given a place yet: QEMU compresses only into such.
    untouched: bool,
}

/// A chain and how it came to be.
pub struct Zoo {
    folder: PathBuf,
    /// The base first.
    pub layers: Vec<Layer>,
    /// For a failure's message.
    pub told: String,
    /// A tool of QEMU's crashed: nobody knows what the chain holds.
    pub lost: bool,
}

impl Zoo {
    /// The chain that `seed` decides: one to four layers, each with its history.
    #[track_caller]
    pub fn new(folder: &Path, seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let mut zoo =
            Self { folder: folder.to_owned(), layers: Vec::new(), told: format!("seed {seed}\n"), lost: false };
        for index in 0..random.within(1..5) {
            zoo.add_layer(index, random);
            for _ in 0..random.within(1..4) {
                zoo.step(random);
                if zoo.lost {
                    return zoo;
                }
            }
        }
        // What the file system puts off could change what it says of space and holes from one look to the next.
        for layer in &zoo.layers {
            File::open(&layer.file).and_then(|file| file.sync_all()).expect("a file of ours");
        }
        zoo
    }

    /// The layer that the chain is seen from.
    pub fn top(&self) -> &Layer {
        &self.layers[self.layers.len() - 1]
    }

    fn top_mut(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("a chain has a top")
    }

    fn img(&mut self, arguments: &[&str]) {
        self.told += &format!("qemu-img {}\n", arguments.join(" "));
        let mut command = Command::new("qemu-img");
        let output = output(command.args(arguments).current_dir(&self.folder));
        // `rebase` of QEMU 10.0.2 frees what is not its own now and then (seed 402).
        self.lost = arguments[0] == "rebase" && output.status.code().is_none();
        assert!(self.lost || output.status.success(), "{}\n{}", told(&command, &output), self.told);
    }

    fn add_layer(&mut self, index: u64, random: &mut Random) {
        let size = random.within(1..SECTORS_MAX) * SECTOR;
        if index == 0 && random.one_in(3) {
            self.add_raw(size, random);
        } else {
            self.add_qcow2(index, size, random);
        }
    }

    /// A raw file may end anywhere: QEMU reads zeroes up to the next sector's end.
    fn add_raw(&mut self, size: u64, random: &mut Random) {
        let file = self.folder.join("base.raw");
        let cut = if random.one_in(3) { random.below(SECTOR) } else { 0 };
        File::create(&file).and_then(|raw| raw.set_len(size - cut)).expect("a file of ours");
        self.told += &format!("{}: raw, {} bytes\n", file.display(), size - cut);
        self.layers.push(Layer {
            file,
            format: "raw",
            size,
            cluster: 1 << 16,
            version: 0,
            extended: false,
            apart: false,
            snapshots: 0,
            bitmaps: false,
            untouched: false,
        });
    }

    fn add_qcow2(&mut self, index: u64, size: u64, random: &mut Random) {
        let file = self.folder.join(format!("layer{index}.qcow2"));
        let below = self.layers.last().cloned();
        let kinds = Options::random(below.is_none(), &file.with_extension("data"), random);
        let words = kinds.words();
        match &below {
            None => create(&file, "qcow2", size, &["-o", &words]),
            Some(below) => {
                let full = below.file.display().to_string();
                let name = below.file.file_name().expect("a file's name").to_string_lossy();
                let name = if random.one_in(2) { &full } else { &*name };
                overlay(&file, name, below.format, Some(size), &["-o", &words]);
            }
        }
        self.told += &format!("{}: {words}, {size} bytes\n", file.display());
        let Options { cluster, version, extended, apart, untouched, .. } = kinds;
        self.layers.push(Layer {
            file,
            format: "qcow2",
            size,
            cluster,
            version,
            extended,
            apart,
            snapshots: 0,
            bitmaps: false,
            untouched,
        });
    }

    /// One thing that happens to the top layer.
    fn step(&mut self, random: &mut Random) {
        let top = self.top().clone();
        let is_qcow2 = top.format == "qcow2";
        self.top_mut().untouched = false;
        match random.below(8) {
            0 if is_qcow2 && !top.apart && FEATURES.contains(&Feature::Snapshots) => self.snapshot(&top, random),
            1 if self.may_grow(self.layers.len() - 1) => self.resize(&top, random),
            2 if is_qcow2 && self.layers.len() > 1 => self.rebase(&top, random),
            3 if self.can_commit() => self.commit(&top),
            4 if top.version == 3 && FEATURES.contains(&Feature::Bitmaps) => self.bitmap(&top, random),
            _ => self.fill(&top, random),
        }
    }

    /// Compressed clusters, where nothing is yet, then writes, zeroes and discards all over the disk.
    fn fill(&mut self, top: &Layer, random: &mut Random) {
        let noise = self.folder.join("noise");
        std::fs::write(&noise, random.bytes(64 << 10)).expect("a file of ours");
        let mut orders = Vec::new();
        if top.untouched && random.one_in(2) {
            orders = compressed_orders(top.size, top.cluster, &noise, random);
        }
        orders.extend((0..random.within(1..12)).map(|_| random_order(top.size, &noise, random)));
        let mut command = Command::new("qemu-io");
        command.args(["-f", top.format, "-d", random.pick(&["unmap", "ignore"])]);
        for order in &orders {
            command.args(["-c", order]);
        }
        self.told += &format!("qemu-io {}: {}\n", top.file.display(), orders.join("; "));
        ran(command.arg(&top.file));
    }

    fn snapshot(&mut self, top: &Layer, random: &mut Random) {
        let file = top.file.display().to_string();
        let snapshots = match (top.snapshots, random.below(3)) {
            (count @ 1.., 0) => {
                self.img(&["snapshot", "-d", &format!("s{count}"), &file]);
                count - 1
            }
            (count @ 1.., 1) if !top.bitmaps => {
                self.img(&["snapshot", "-a", &format!("s{count}"), &file]);
                count
            }
            (count, _) => {
                self.img(&["snapshot", "-c", &format!("s{}", count + 1), &file]);
                count + 1
            }
        };
        self.top_mut().snapshots = snapshots;
    }

    fn resize(&mut self, top: &Layer, random: &mut Random) {
        let size = random.within(1..SECTORS_MAX) * SECTOR;
        self.img(&["resize", "-q", "--shrink", "-f", top.format, &top.file.display().to_string(), &size.to_string()]);
        self.top_mut().size = size;
    }

    /// Onto nothing, or onto the base of all.
    fn rebase(&mut self, top: &Layer, random: &mut Random) {
        let file = top.file.display().to_string();
        if random.one_in(2) {
            self.img(&["rebase", "-f", "qcow2", "-b", "", &file]);
            self.layers.drain(..self.layers.len() - 1);
            return;
        }
        let base = self.layers[0].clone();
        self.img(&["rebase", "-f", "qcow2", "-b", &base.file.display().to_string(), "-F", base.format, &file]);
        self.layers.drain(1..self.layers.len() - 1);
    }

    /// Not with snapshots. What is new has to hide what is below: version 2 has no zeroes for that, and QEMU cannot zero
    /// a compressed cluster of an image with subclusters.
    fn may_grow(&self, index: usize) -> bool {
        let layer = &self.layers[index];
        layer.snapshots == 0 && (index == 0 || layer.version != 2 && !layer.extended)
    }

    fn can_commit(&self) -> bool {
        let Some(below) = self.layers.len().checked_sub(2) else { return false };
        self.layers[below].size >= self.top().size || self.may_grow(below)
    }

    /// The top's contents go into the layer below, which grows where it is shorter.
    fn commit(&mut self, top: &Layer) {
        self.img(&["commit", "-q", "-f", "qcow2", &top.file.display().to_string()]);
        let below = self.layers.len() - 2;
        self.layers[below].size = self.layers[below].size.max(top.size);
    }

    fn bitmap(&mut self, top: &Layer, random: &mut Random) {
        let name = format!("b{}", random.next());
        self.img(&["bitmap", "--add", "-f", "qcow2", &top.file.display().to_string(), &name]);
        self.top_mut().bitmaps = true;
    }
}

/// How a qcow2 is made.
struct Options {
    version: u32,
    cluster: u64,
    extended: bool,
    apart: bool,
    untouched: bool,
    more: Vec<String>,
}

impl Options {
    fn random(is_base: bool, data_file: &Path, random: &mut Random) -> Self {
        // Large clusters are rare: an image of them is one of zeroes and of one cluster.
        let extended = FEATURES.contains(&Feature::ExtendedL2) && random.one_in(4);
        let (least, end) = (if extended { 14 } else { 9 }, if random.one_in(4) { 22 } else { 18 });
        let cluster = 1 << random.within(least..end);
        // QEMU preallocates nothing over a backing image, but for the metadata of subclusters.
        let preallocation = if is_base { random.pick(&["off", "metadata", "falloc", "full"]) } else { "off" };
        let untouched = preallocation == "off";
        let mut more = vec![format!("preallocation={preallocation}")];
        if random.one_in(4) && !extended {
            return Self { version: 2, cluster, extended, apart: false, untouched, more };
        }
        more.push(format!("lazy_refcounts={}", random.pick(&["on", "off"])));
        more.push(format!("compression_type={}", random.pick(&["zlib", "zstd"])));
        if extended {
            more.push("extended_l2=on".into());
        }
        let apart = FEATURES.contains(&Feature::DataFile) && random.one_in(4);
        if apart {
            let raw = random.pick(&["on", "off"]);
            let raw = if is_base { raw } else { "off" };
            more.push(format!("data_file={},data_file_raw={raw}", data_file.display()));
        }
        // A cluster of snapshots is counted twice at least: one bit does not hold that.
        more.push(format!("refcount_bits={}", 1 << random.within(3..7)));
        Self { version: 3, cluster, extended, apart, untouched: untouched && !apart, more }
    }

    fn words(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        format!("compat={compat},cluster_size={},{}", self.cluster, self.more.join(","))
    }
}
