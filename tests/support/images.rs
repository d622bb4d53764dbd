//! Images and chains of every kind that is supported, made by qemu-img and filled by qemu-io.
use super::random::Random;
use super::tools::{content, ran, run};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A backing chain in a folder.
pub struct Chain {
    /// The top layer.
    pub top: PathBuf,
    /// The top layer's format.
    pub format: &'static str,
    /// All layers, the base first, with their formats.
    pub layers: Vec<(PathBuf, &'static str)>,
    /// How it was made, for a failure's message.
    pub told: String,
}

impl Chain {
    /// `FILE,format=F`, as in `--export NAME=…`.
    pub fn export(&self, name: &str) -> String {
        format!("{name}={},format={}", self.top.display(), self.format)
    }

    /// What the disk holds, as QEMU reads it.
    #[track_caller]
    pub fn content(&self) -> Vec<u8> {
        content(&self.top, self.format)
    }

    /// What all its files take on their file system.
    pub fn allocated(&self) -> u64 {
        self.layers.iter().map(|(file, _)| super::tools::allocated(file)).sum()
    }
}

/// An empty image.
#[track_caller]
pub fn create(file: &Path, format: &str, size: u64, options: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]).args(options).arg(file).arg(size.to_string());
    ran(&mut command);
}

/// What a disk of `len` bytes may hold: zeroes in one MiB of four, and no two blocks of data alike.
pub fn thin_disk(len: usize) -> Vec<u8> {
    let byte = |at: usize| (at / 512 * 31 + at) as u8 | 1;
    (0..len).map(|at| if at >> 20 & 3 == 1 { 0 } else { byte(at) }).collect()
}

/// An image with `bytes` in it.
#[track_caller]
pub fn holding(file: &Path, format: &str, bytes: &[u8], options: &[&str]) {
    let flat = file.with_extension("flat");
    std::fs::write(&flat, bytes).expect("a file of ours");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", format]).args(options).arg(&flat).arg(file);
    ran(&mut command);
    std::fs::remove_file(&flat).expect("removing a file of ours");
}

/// The option that gives `file` an external data file, and where that is. Its full name, for QEMU takes a
/// relative one from where it runs.
pub fn data_file(file: &Path, raw: bool) -> (String, PathBuf) {
    let data = file.with_extension("data");
    (format!("data_file={},data_file_raw={}", data.display(), if raw { "on" } else { "off" }), data)
}

/// A qcow2 overlay of `backing`, named as `name` in its header.
#[track_caller]
pub fn overlay(file: &Path, name: &str, backing_format: &str, size: Option<u64>, options: &[&str]) {
    let mut command = Command::new("qemu-img");
    // A relative name is meant from the overlay's folder on.
    command.current_dir(file.parent().expect("a folder"));
    command.args(["create", "-q", "-f", "qcow2", "-b", name, "-F", backing_format]).args(options).arg(file);
    if let Some(size) = size {
        command.arg(size.to_string());
    }
    ran(&mut command);
}

/// A chain of three images, base to top, of `size` bytes: each layer with something of its own, much of the
/// disk never written.
#[track_caller]
pub fn three_layers(folder: &Path, size: u64, seed: u64) -> Chain {
    let mut random = Random::new(seed);
    let layers: Vec<_> = ["base.qcow2", "snap1.qcow2", "snap2.qcow2"].iter().map(|name| folder.join(name)).collect();
    create(&layers[0], "qcow2", size, &[]);
    overlay(&layers[1], "base.qcow2", "qcow2", None, &[]);
    overlay(&layers[2], "snap1.qcow2", "qcow2", None, &[]);
    for layer in &layers {
        fill(layer, "qcow2", size, 1 << 16, &mut random);
    }
    let layers: Vec<_> = layers.into_iter().map(|layer| (layer, "qcow2")).collect();
    Chain { top: layers[2].0.clone(), format: "qcow2", layers, told: "three layers".into() }
}

/// A disk of one layer, much of it never written.
#[track_caller]
pub fn one_layer(folder: &Path, format: &'static str, size: u64, seed: u64) -> Chain {
    let top = folder.join(format!("disk.{format}"));
    create(&top, format, size, &[]);
    fill(&top, format, size, if format == "raw" { 512 } else { 1 << 16 }, &mut Random::new(seed));
    Chain { top: top.clone(), format, layers: vec![(top, format)], told: format!("one layer, {format}") }
}

/// A chain that `random` makes up: one to four layers of any mix of formats, versions, cluster sizes,
/// refcount widths, names and sizes, with data, zeroes, discards and compressed clusters in each.
#[track_caller]
pub fn random_chain(folder: &Path, random: &mut Random) -> Chain {
    let mut chain = Chain { top: PathBuf::new(), format: "raw", layers: Vec::new(), told: String::new() };
    for index in 0..random.within(1..5) {
        random_layer(folder, index, &mut chain, random);
    }
    chain
}

fn random_layer(folder: &Path, index: u64, chain: &mut Chain, random: &mut Random) {
    // In sectors, as QEMU counts; seldom a multiple of a cluster. Some layers are shorter than the one below.
    let size = random.within(1..8192) * 512;
    let format = if index == 0 && random.one_in(3) { "raw" } else { "qcow2" };
    // Every second layer lives a folder deeper, so that relative names differ.
    let home = if index % 2 == 1 { folder.join("deeper") } else { folder.to_owned() };
    std::fs::create_dir_all(&home).expect("a folder of ours");
    let file = home.join(format!("layer{index}.{format}"));
    let mut cluster = 1 << 16;
    if format == "raw" {
        // A raw file may end anywhere: QEMU reads zeroes up to the next sector's end.
        File::create(&file).and_then(|file| file.set_len(size - random.below(2) * 100)).expect("a file of ours");
        chain.told += &format!("{}: raw, {size} bytes\n", file.display());
    } else {
        cluster = 1 << random.within(9..22);
        let options = random_options(cluster, random);
        let option_args = ["-o", options.as_str()];
        match chain.layers.last() {
            None => create(&file, format, size, &option_args),
            Some((backing, backing_format)) => {
                let name = backing_name(&home, backing, random);
                overlay(&file, &name, backing_format, Some(size), &option_args);
                chain.told += &format!("(over {name}) ");
            }
        }
        chain.told += &format!("{}: {options}, {size} bytes\n", file.display());
    }
    fill(&file, format, size, cluster, random);
    chain.top.clone_from(&file);
    chain.format = format;
    chain.layers.push((file, format));
}

fn random_options(cluster: u64, random: &mut Random) -> String {
    if random.one_in(4) {
        return format!("compat=0.10,cluster_size={cluster}");
    }
    let width = 1 << random.below(7);
    let compression = random.pick(&["zlib", "zstd"]);
    let lazy = random.pick(&["on", "off"]);
    let extended = if cluster >= 16384 { random.pick(&["on", "off"]) } else { "off" };
    format!(
        "compat=1.1,cluster_size={cluster},extended_l2={extended},refcount_bits={width},compression_type={compression},lazy_refcounts={lazy}"
    )
}

/// The name of `backing` from `home`: absolute, or relative to where the overlay lives.
fn backing_name(home: &Path, backing: &Path, random: &mut Random) -> String {
    if random.one_in(2) {
        return backing.display().to_string();
    }
    let name = backing.file_name().expect("a file's name").to_string_lossy();
    let backing_home = backing.parent().expect("a folder");
    match (home.ends_with("deeper"), backing_home.ends_with("deeper")) {
        (true, false) => format!("../{name}"),
        (false, true) => format!("deeper/{name}"),
        _ => name.into_owned(),
    }
}

/// Compressed clusters (qcow2), then writes, zeroes and discards all over an image of `size` bytes.
#[track_caller]
pub fn fill(file: &Path, format: &str, size: u64, cluster: u64, random: &mut Random) {
    let noise = noise(file, random);
    let compressed = match format {
        "qcow2" => compressed_orders(size, cluster, &noise, random),
        _ => Vec::new(),
    };
    fill_with(file, format, size, &noise, compressed, random);
}

/// The same without compressed clusters, which an image with an external data file cannot have.
#[track_caller]
pub fn fill_plain(file: &Path, format: &str, size: u64, random: &mut Random) {
    let noise = noise(file, random);
    fill_with(file, format, size, &noise, Vec::new(), random);
}

/// A file of random bytes, beside `file`.
fn noise(file: &Path, random: &mut Random) -> PathBuf {
    let noise = file.with_extension("noise");
    std::fs::write(&noise, random.bytes(64 << 10)).expect("a file of ours");
    noise
}

/// These orders, then random ones; `noise` goes.
#[track_caller]
fn fill_with(file: &Path, format: &str, size: u64, noise: &Path, first: Vec<String>, random: &mut Random) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format, "-d", "unmap"]);
    for order in first {
        command.args(["-c", &order]);
    }
    for _ in 0..random.within(2..16) {
        command.args(["-c", &random_order(size, noise, random)]);
    }
    command.arg(file);
    ran(&mut command);
    std::fs::remove_file(noise).expect("removing a file of ours");
}

/// QEMU compresses whole clusters, into places that hold nothing yet: so each at most once, and first of all.
pub fn compressed_orders(size: u64, cluster: u64, noise: &Path, random: &mut Random) -> Vec<String> {
    let clusters = size.div_ceil(cluster);
    let chosen: BTreeSet<u64> = (0..random.below(12)).map(|_| random.below(clusters)).collect();
    let order = |index| {
        let (at, len) = (index * cluster, cluster.min(size - index * cluster));
        match random.one_in(4) {
            true => format!("write -c -s {} {at} {len}", noise.display()),
            false => format!("write -c -P {} {at} {len}", random.within(1..256)),
        }
    };
    chosen.into_iter().map(order).collect()
}

/// One command of qemu-io for a disk of `size` bytes.
pub fn random_order(size: u64, noise: &Path, random: &mut Random) -> String {
    let at = random.below(size / 512) * 512;
    let len = (random.within(1..512) * 512).min(size - at);
    match random.below(8) {
        0 => format!("write -z {at} {len}"),
        1 => format!("write -zu {at} {len}"),
        2 => format!("discard {at} {len}"),
        3 => format!("write -P 0 {at} {len}"),
        4 | 5 => format!("write -s {} {at} {len}", noise.display()),
        _ => format!("write -P {} {at} {len}", random.within(1..256)),
    }
}

/// The `format` that a file's header says, by `qemu-img info`.
#[track_caller]
pub fn probed(file: &Path) -> String {
    super::tools::info(file)["format"].as_str().unwrap_or_default().to_owned()
}

/// Two images, through their chains, hold the same disk for QEMU.
#[track_caller]
pub fn compare(a: (&Path, &str), b: (&Path, &str)) {
    let (a_file, b_file) = (a.0.display().to_string(), b.0.display().to_string());
    run("qemu-img", &["compare", "-f", a.1, "-F", b.1, &a_file, &b_file]);
}
