//! qemu-img and qemu-io, and random images that they make.
use super::disk::Disk;
use super::random::Random;
use formats::qcow2::Check;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a program in `folder`; it has to succeed.
pub fn run(folder: &Path, program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).current_dir(folder).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run ({error}): install qemu-utils"));
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text.escape_ascii());
    output
}

/// The contents of the disk as QEMU sees them.
pub fn contents(folder: &Path, image: &str) -> Vec<u8> {
    let raw = folder.join("contents.raw");
    run(folder, "qemu-img", &["convert", "-O", "raw", image, "contents.raw"]);
    let bytes = std::fs::read(&raw).expect("just made");
    std::fs::remove_file(raw).expect("just made");
    bytes
}

/// What `qemu-img check` finds in the image on `disk`.
pub fn check_of_qemu(disk: &Disk) -> Check {
    let file = file_of(disk);
    let arguments = ["check", "-f", "qcow2", "--output=json"];
    let output = Command::new("qemu-img").args(arguments).arg(file.path()).output().expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |field: &str| {
        let (_, value) = text.split_once(&format!("\"{field}\": "))?;
        value.split(|byte: char| !byte.is_ascii_digit()).next()?.parse().ok()
    };
    assert_eq!(count("check-errors"), Some(0), "{text}");
    let (leaks, corruptions) = (count("leaks").unwrap_or(0), count("corruptions").unwrap_or(0));
    assert_eq!(output.status.success(), leaks + corruptions == 0, "{text}");
    let problems = String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect();
    Check { leaks, corruptions, problems, ..Check::default() }
}

/// The image on `disk` with one more internal snapshot.
pub fn with_snapshot(disk: &Disk, nth: usize) -> Vec<u8> {
    let file = file_of(disk);
    let path = file.path().display().to_string();
    run(Path::new("/"), "qemu-img", &["snapshot", "-c", &format!("snapshot {nth}"), &path]);
    std::fs::read(file.path()).expect("just made")
}

fn file_of(disk: &Disk) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    disk.copy_to(file.as_file()).expect("room");
    file
}

/// What an image itself says of a run of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Absent,
    Zero,
    Data { host: u64 },
    Compressed,
}

/// The runs of `image` by `qemu-img map`: where they end, and what they are.
pub fn map(folder: &Path, image: &str) -> Vec<(u64, Kind)> {
    let output = run(folder, "qemu-img", &["map", "--output=json", image]).stdout;
    let lines = String::from_utf8(output).expect("JSON, a run a line");
    let mut runs = Vec::new();
    for line in lines.lines().filter(|line| line.contains("start")) {
        let field = |name: &str| {
            let after = line.split_once(&format!("\"{name}\": ")).map(|(_, after)| after);
            after.map(|after| after.split([',', '}']).next().expect("never empty").trim())
        };
        let number = |name| field(name).and_then(|text| text.parse::<u64>().ok());
        let is = |name| field(name) == Some("true");
        let kind = match number("depth") {
            Some(0) if is("compressed") => Kind::Compressed,
            Some(0) if is("data") => Kind::Data { host: number("offset").expect("of data") },
            Some(0) if is("present") => Kind::Zero,
            _ => Kind::Absent,
        };
        let start = number("start").expect("a number");
        push_run(&mut runs, start, start + number("length").expect("a number"), kind);
    }
    runs
}

/// Adds a run, to the last one where it goes on.
pub fn push_run(runs: &mut Vec<(u64, Kind)>, start: u64, end: u64, kind: Kind) {
    let before = runs.len().checked_sub(2).map_or(0, |nth| runs[nth].0);
    match (runs.last_mut(), kind) {
        (Some((last, Kind::Data { host })), Kind::Data { host: next }) if *host + (*last - before) == next => {
            *last = end
        }
        (Some((last, same)), kind) if *same == kind && !matches!(kind, Kind::Data { .. }) => *last = end,
        (last, _) => {
            assert_eq!(last.map_or(0, |(end, _)| *end), start, "runs leave nothing out");
            runs.push((end, kind));
        }
    }
}

/// A random image of QEMU's, with zero to two images below.
pub struct Made {
    pub path: PathBuf,
    pub name: String,
    pub format: &'static str,
}

/// Makes a chain in `folder`; `what` tells of it when a test fails.
pub fn make_chain(folder: &Path, random: &mut Random, what: &mut String) -> Made {
    let mut below: Option<Made> = None;
    let layers = 1 + random.below(3);
    for nth in 0..layers {
        let raw = nth == 0 && layers > 1 && random.one_in(3);
        below = Some(make_layer(folder, nth, raw, below.as_ref(), random, what));
    }
    below.expect("at least one")
}

fn make_layer(
    folder: &Path,
    nth: u64,
    raw: bool,
    below: Option<&Made>,
    random: &mut Random,
    what: &mut String,
) -> Made {
    let format = if raw { "raw" } else { "qcow2" };
    let name = format!("layer{nth}.{format}");
    // Shorter and longer than what is below; no multiple of a cluster.
    let size = 512 * (1 + random.below(6000));
    let mut arguments = vec!["create".to_owned(), "-q".into(), "-f".into(), format.into()];
    let mut zstd = false;
    if !raw {
        let (options, is_zstd) = some_options(random, below.is_some());
        zstd = is_zstd;
        arguments.extend(["-o".into(), options]);
    }
    if let Some(below) = below {
        let name = if random.one_in(2) { below.name.clone() } else { below.path.display().to_string() };
        arguments.extend(["-b".into(), name, "-F".into(), below.format.into()]);
    }
    arguments.extend([name.clone(), size.to_string()]);
    *what += &format!("\nqemu-img {}", arguments.join(" "));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(folder, "qemu-img", &arguments);
    fill(folder, &name, format, size, cluster_of(&arguments), random, what);
    let made = Made { path: folder.join(&name), name, format };
    if below.is_none() && !raw && random.one_in(3) {
        return compress(folder, made, zstd, what);
    }
    made
}

/// Bytes of a cluster, where the image has clusters that hold nothing yet.
fn cluster_of(arguments: &[&str]) -> Option<u64> {
    let after = arguments.iter().find_map(|options| options.split_once("cluster_size="))?.1;
    if after.contains("preallocation=metadata") {
        return None;
    }
    after.split(',').next()?.parse().ok()
}

fn some_options(random: &mut Random, backing: bool) -> (String, bool) {
    let version_2 = random.one_in(4);
    let kinds = if random.one_in(4) { 13 } else { 8 };
    let cluster = 512 << random.below(kinds);
    if version_2 {
        return (format!("compat=0.10,cluster_size={cluster}"), false);
    }
    let zstd = random.one_in(2);
    let bits = 1 << random.below(7);
    let lazy = if random.one_in(4) { "on" } else { "off" };
    let compression = if zstd { "zstd" } else { "zlib" };
    // QEMU preallocates nothing over a backing image.
    let preallocation = if !backing && random.one_in(4) { "metadata" } else { "off" };
    let cluster = if random.one_in(3) { 16384 << random.below(4) } else { cluster };
    let extended = if cluster >= 16384 && !random.one_in(4) { "on" } else { "off" };
    let options = format!(
        "cluster_size={cluster},extended_l2={extended},refcount_bits={bits},lazy_refcounts={lazy},compression_type={compression},preallocation={preallocation}"
    );
    (options, zstd)
}

/// Writes, zeroes, discards and compressed writes, one after the other.
fn fill(
    folder: &Path,
    name: &str,
    format: &str,
    size: u64,
    cluster: Option<u64>,
    random: &mut Random,
    what: &mut String,
) {
    let mut arguments = vec!["-f".to_owned(), format.into()];
    arguments.extend(["-d".into(), "unmap".into()]);
    // QEMU compresses whole clusters that hold nothing yet.
    let mut next = 0;
    while let Some(cluster) = cluster.filter(|cluster| next * cluster < size && !random.one_in(3)) {
        let len = cluster.min(size - next * cluster);
        arguments.extend(["-c".into(), format!("write -c -P {} {} {len}", random.below(256), next * cluster)]);
        next += 1 + random.below(8);
    }
    for _ in 0..random.below(12) {
        let sectors = size / 512;
        let start = random.below(sectors);
        let most = if random.one_in(3) { 4000 } else { 100 };
        let count = 1 + random.below(most.min(sectors - start));
        let pattern = random.below(256);
        let range = format!("{} {}", start * 512, count * 512);
        let command = match random.below(6) {
            0 => format!("write -z {range}"),
            1 => format!("write -z -u {range}"),
            2 => format!("discard {range}"),
            _ => format!("write -P {pattern} {range}"),
        };
        arguments.extend(["-c".into(), command]);
    }
    arguments.push(name.into());
    *what += &format!("\nqemu-io {arguments:?}");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(folder, "qemu-io", &arguments);
}

/// Makes a compressed image of one without backing, which it replaces.
fn compress(folder: &Path, made: Made, zstd: bool, what: &mut String) -> Made {
    let name = format!("compressed-{}", made.name);
    let compression = if zstd { "compression_type=zstd,extended_l2=on" } else { "compression_type=zlib" };
    let arguments = ["convert", "-c", "-O", "qcow2", "-o", compression, &made.name, &name];
    *what += &format!("\nqemu-img {}", arguments.join(" "));
    run(folder, "qemu-img", &arguments);
    Made { path: folder.join(&name), name, format: "qcow2" }
}
