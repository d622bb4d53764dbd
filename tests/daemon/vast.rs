//! A disk of 16 TiB with a few clusters far apart: what is not there costs neither time nor memory.

use crate::support::daemon::Daemon;
use crate::support::images::create;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::tools::{allocated, check, ran};
use crate::support::{eventually, folder};
use std::collections::BTreeMap;
use std::fs::{File, read_to_string};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

const VAST: u64 = 16 << 40;
const CLUSTER: u64 = 64 << 10;
/// Clusters that hold something at first, each alone under its L2 table, the last one at the disk's end.
const LONE: u64 = 24;
/// Clusters that the guest writes to beside these.
const MORE: u64 = 8;

/// Where the disk of `len` bytes has its clusters.
fn places(len: u64) -> Vec<u64> {
    let between = (len - CLUSTER) / (LONE + MORE - 1) / CLUSTER * CLUSTER;
    (0..LONE + MORE - 1).map(|number| number * between).chain([len - CLUSTER]).collect()
}

/// A guest that writes one cluster after the other, each as a whole, with another byte each time.
struct Guest {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<BTreeMap<u64, u8>>,
}

impl Guest {
    /// `truth`: which byte each cluster has.
    fn start(daemon: &Daemon, places: Vec<u64>, mut truth: BTreeMap<u64, u8>) -> Self {
        let mut client = Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("a connection");
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stop_there, written_there) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            for (number, at) in places.iter().cycle().enumerate() {
                if stop_there.load(Ordering::Relaxed) {
                    break;
                }
                let byte = (number % 251) as u8 + 1;
                client.ask(&Request::Write { at: *at, bytes: vec![byte; CLUSTER as usize] });
                truth.insert(*at, byte);
                written_there.fetch_add(1, Ordering::Relaxed);
            }
            truth
        });
        Self { stop, written, thread }
    }

    fn writes(&self, count: u64) {
        let goal = self.written.load(Ordering::Relaxed) + count;
        eventually("the guest writes", || (self.written.load(Ordering::Relaxed) >= goal).then_some(()));
    }

    fn stop(self) -> BTreeMap<u64, u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a guest that lives")
    }
}

/// What `qemu-io` finds in an image, or writes to it: `verb` with a byte for each cluster.
fn each(image: &Path, format: &str, verb: &str, clusters: &BTreeMap<u64, u8>) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    for (at, byte) in clusters {
        command.args(["-c", &format!("{verb} -P {byte} {at} {CLUSTER}")]);
    }
    let said = ran(command.arg(image));
    assert!(!said.contains("verification failed"), "{}: {said}", image.display());
}

/// The most memory that the daemon has had so far, in bytes.
fn memory_max(daemon: &Daemon) -> u64 {
    let status = read_to_string(format!("/proc/{}/status", daemon.pid())).expect("our child's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line of the kernel's");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// A disk of `len` bytes in a layer of this format, moved to another while its guest writes.
fn moves(folder: &Path, format: &str, len: u64) {
    let (source, target) = (folder.join("source"), folder.join("target"));
    create(&source, format, len, &[]);
    let places = places(len);
    let lone = |at: &u64| places.iter().position(|place| place == at).is_some_and(|number| number as u64 % 4 != 1);
    let truth: BTreeMap<u64, u8> = places.iter().filter(|at| lone(at)).map(|at| (*at, 0x55)).collect();
    each(&source, format, "write", &truth);
    let source_len = allocated(&source);

    let daemon = Daemon::serve(folder, &[format!("vda={},format={format}", source.display())]);
    // All but those that only the copier brings.
    let written: Vec<u64> =
        places.iter().copied().filter(|at| !(at / CLUSTER).is_multiple_of(3) || *at == len - CLUSTER).collect();
    let guest = Guest::start(&daemon, written, truth);
    guest.writes(5);
    let begun = Instant::now();
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--format", format, "--speed", "2M"]);
    let status = daemon.status("vda");
    daemon.ok("set", &["vda", "--speed", "0"]);
    guest.writes(50);
    daemon.wait_for("vda", "ready");
    println!("{format}: ready after {:?}", begun.elapsed());
    guest.writes(50);
    daemon.pivot("vda");
    guest.writes(50);
    let truth = guest.stop();

    let memory = |field: &str| status[field].as_u64().expect("a number");
    let (bitmap, tables, buffers) =
        (memory("bitmap_memory_bytes"), memory("tables_memory_bytes"), memory("buffers_memory_bytes"));
    let most = memory_max(&daemon);
    println!("{format}: {most} bytes at most; {bitmap} of bitmaps, {tables} of tables, {buffers} of buffers");
    // No buffers were asked for.
    assert!(most < 64 << 20, "{most} bytes of memory: {status}");
    assert!(bitmap > 0 && buffers > 0 && (format == "raw" || tables > 0), "{status}");
    let mut daemon = daemon;
    daemon.stop();

    check(&target, format);
    each(&target, format, "read", &truth);
    // What the guest wrote beside is not in the source.
    let beside = (LONE + MORE) * 3 * CLUSTER;
    assert!(allocated(&target) <= source_len + beside, "{} bytes, the source has {source_len}", allocated(&target));
    let map = ran(Command::new("qemu-img").args(["map", "-f", format, "--output=json"]).arg(&target));
    let runs: Vec<serde_json::Value> = serde_json::from_str(&map).expect("JSON of qemu-img");
    let data = runs.iter().filter(|run| run["data"] == true).map(|run| run["length"].as_u64().expect("a number"));
    assert_eq!(data.sum::<u64>(), truth.len() as u64 * CLUSTER, "no cluster but these");
}

#[test]
fn a_qcow2_disk_of_16_tib_moves() {
    let folder = folder();
    moves(folder.path(), "qcow2", VAST);
}

/// ext4 has files of 16 TiB less a block at most.
#[test]
fn a_raw_disk_of_almost_16_tib_moves() {
    let folder = folder();
    let len = VAST - (1 << 20);
    if let Err(error) = File::create(folder.path().join("probe")).and_then(|probe| probe.set_len(len)) {
        eprintln!("not done, for the file system has no files of {len} bytes: {error}");
        return;
    }
    moves(folder.path(), "raw", len);
}
