//! Persistent bitmaps of a served image as NBD clients are told of them.
//!
//! Held here: at every moment they have set what QEMU's own server tells of an image with the same writes; they are
//! listed where QEMU would let them be asked for, and go on after a pivot where the target has a place for them; what
//! cannot be relied on is not shown.

use crate::support::daemon::Daemon;
use crate::support::folder;
use crate::support::random::Random;
use crate::support::server::Server;
use crate::support::tools::{output, ran, refused, run, told};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_LEN: u64 = 16 << 20;
/// Names and granularities.
const BITMAPS: [(&str, u64); 3] = [("old", 65_536), ("fine", 4096), ("coarse", 1 << 20)];

/// An image with writes before and after its bitmaps were made: one is disabled, the others are not.
fn make(folder: &Path) -> PathBuf {
    let image = folder.join("source.qcow2");
    let name = image.display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, &DISK_LEN.to_string()]);
    for (at, (bitmap, granularity)) in BITMAPS.iter().enumerate() {
        run("qemu-img", &["bitmap", "--add", "-g", &granularity.to_string(), &name, bitmap]);
        order(&format!("write -P 1 {} 100K", at * (3 << 20)), "qcow2", &name);
    }
    run("qemu-img", &["bitmap", "--disable", &name, "old"]);
    order("write -P 2 7M 4608", "qcow2", &name);
    image
}

/// One order of qemu-io's.
#[track_caller]
fn order(order: &str, format: &str, image: &str) {
    let said = run("qemu-io", &["-f", format, "-d", "unmap", "-c", order, image]);
    assert!(!said.contains("failed"), "{order}: {said}");
}

fn export(image: &Path, more: &str) -> String {
    format!("vda={},format=qcow2{more}", image.display())
}

/// The runs of a bitmap, as a client is told of them, and whether they are marked.
#[track_caller]
fn map(uri: &str, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let said = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), uri]);
    let extents: Value = serde_json::from_str(&said).expect("JSON of nbdinfo");
    let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number of nbdinfo");
    let run = |extent: &Value| (number(extent, "offset"), number(extent, "length"), number(extent, "type") & 1 == 1);
    extents.as_array().expect("a list").iter().map(run).collect()
}

/// The same by QEMU's client, for which what is marked is no data.
#[track_caller]
fn map_of_qemu(daemon: &Daemon, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let socket = daemon.socket();
    let socket = socket.display();
    let opened = format!(
        "driver=nbd,export=vda,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    );
    let said = run("qemu-img", &["map", "--output=json", "--image-opts", &opened]);
    let extents: Value = serde_json::from_str(&said).expect("JSON of qemu-img");
    let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number of qemu-img");
    let run = |extent: &Value| (number(extent, "start"), number(extent, "length"), extent["data"] == false);
    extents.as_array().expect("a list").iter().map(run).collect()
}

/// The bitmaps that an export lists.
#[track_caller]
fn listed(daemon: &Daemon) -> Vec<String> {
    let said = run("nbdinfo", &["--json", &daemon.uri("vda")]);
    let said: Value = serde_json::from_str(&said).expect("JSON of nbdinfo");
    let contexts = said["exports"][0]["contexts"].as_array().expect("a list").clone();
    let name = |context: &Value| context.as_str()?.strip_prefix("qemu:dirty-bitmap:").map(str::to_owned);
    contexts.iter().filter_map(name).collect()
}

/// What `qemu-nbd -B` serves of a copy of `image`, in a folder of its own.
struct Twin {
    server: Server,
    bitmap: &'static str,
}

impl Twin {
    fn new(folder: &Path, image: &Path, bitmap: &'static str, more: &[&str]) -> Self {
        let folder = folder.join(format!("twin-{bitmap}"));
        std::fs::create_dir_all(&folder).expect("a folder of ours");
        let copy = folder.join("copy.qcow2");
        std::fs::copy(image, &copy).expect("a file of ours");
        let copy = copy.display().to_string();
        let words = [&["-t", "-f", "qcow2", "--discard=unmap", "-B", bitmap][..], more, &[&copy]].concat();
        Self { server: Server::qemu(&folder, &words), bitmap }
    }

    fn map(&self) -> Vec<(u64, u64, bool)> {
        map(&self.server.uri(""), self.bitmap)
    }
}

#[test]
fn at_every_moment_a_client_is_told_what_qemus_server_tells() {
    let folder = folder();
    let image = make(folder.path());
    let twins = BITMAPS.map(|(bitmap, _)| Twin::new(folder.path(), &image, bitmap, &[]));
    let daemon = Daemon::serve(folder.path(), &[export(&image, "")]);
    let mut names = listed(&daemon);
    names.sort();
    assert_eq!(names, ["coarse", "fine", "old"]);
    let mut random = Random::new(5);
    for step in 0..12 {
        for twin in &twins {
            let ours = map(&daemon.uri("vda"), twin.bitmap);
            assert_eq!(ours, twin.map(), "{} after {step} orders", twin.bitmap);
            assert_eq!(map_of_qemu(&daemon, twin.bitmap), ours, "{} by QEMU", twin.bitmap);
        }
        let at = random.below(DISK_LEN / 512) * 512;
        let len = (random.within(1..1000) * 512).min(DISK_LEN - at);
        let what = random.pick(&["write -P 3", "write -P 4", "write -z", "write -z -u", "discard"]);
        for uri in twins.iter().map(|twin| twin.server.uri("")).chain([daemon.uri("vda")]) {
            order(&format!("{what} {at} {len}"), "raw", &uri);
        }
    }
    let marked = |bitmap| map(&daemon.uri("vda"), bitmap).iter().filter(|(.., marked)| *marked).count();
    assert!(marked("fine") > 3 && marked("old") == 3, "{} and {}", marked("fine"), marked("old"));
}

#[test]
fn of_an_image_that_is_only_read_all_are_shown() {
    let folder = folder();
    let image = make(folder.path());
    let daemon = Daemon::serve(folder.path(), &[export(&image, ",readonly")]);
    assert_eq!(listed(&daemon).len(), 3);
    for (bitmap, _) in BITMAPS {
        let twin = Twin::new(folder.path(), &image, bitmap, &["-r"]);
        assert_eq!(map(&daemon.uri("vda"), bitmap), twin.map(), "{bitmap}");
    }
}

/// QEMU refuses one that is inconsistent; a disabled one has lost nothing.
#[test]
fn after_a_kill_only_what_nobody_was_writing_is_shown() {
    let folder = folder();
    let image = make(folder.path());
    let old = Twin::new(folder.path(), &image, "old", &["-r"]).map();
    let mut daemon = Daemon::serve(folder.path(), &[export(&image, "")]);
    order("write -P 5 2M 64K", "raw", &daemon.uri("vda"));
    daemon.kill();
    for more in ["", ",readonly"] {
        let mut daemon = Daemon::serve(folder.path(), &[export(&image, more)]);
        assert_eq!(listed(&daemon), ["old"], "{more}");
        assert_eq!(map(&daemon.uri("vda"), "old"), old);
        let mut asked = Command::new("nbdinfo");
        let said = output(asked.args(["--map=qemu:dirty-bitmap:fine", &daemon.uri("vda")]));
        assert!(!said.status.success(), "{}", told(&asked, &said));
        daemon.stop();
    }
    let mut theirs = Command::new("qemu-nbd");
    theirs.args(["-r", "-f", "qcow2", "-B", "fine", "--socket"]).arg(folder.path().join("theirs")).arg(&image);
    refused(theirs, &["Bitmap 'fine' is inconsistent"]);
}

#[test]
fn after_a_pivot_they_are_those_of_the_target() {
    let folder = folder();
    let image = make(folder.path());
    let (qcow2, raw) = (folder.path().join("target.qcow2"), folder.path().join("target.raw"));
    let mut daemon = Daemon::serve(folder.path(), &[export(&image, "")]);
    let before = BITMAPS.map(|(bitmap, _)| map(&daemon.uri("vda"), bitmap));
    daemon.ok("mirror", &["vda", &qcow2.display().to_string(), "--wait"]);
    assert_eq!(listed(&daemon)[0], "mirror");
    assert_eq!(listed(&daemon).len(), 4);
    daemon.pivot("vda");
    assert_eq!(listed(&daemon).len(), 3);
    let after = || BITMAPS.map(|(bitmap, _)| map(&daemon.uri("vda"), bitmap));
    assert_eq!(after(), before, "what a copy writes is no change of the disk");
    order("write -P 6 9M 1K", "raw", &daemon.uri("vda"));
    let [old, fine, _] = after();
    assert!(old == before[0] && fine.contains(&(9 << 20, 4096, true)), "{old:?} {fine:?}");
    // Those of the new image itself, after a restart; and nothing where there is no place for them.
    let last = after();
    daemon.stop();
    daemon.start();
    assert_eq!(BITMAPS.map(|(bitmap, _)| map(&daemon.uri("vda"), bitmap)), last);
    daemon.ok("mirror", &["vda", &raw.display().to_string(), "--raw", "--wait"]);
    daemon.pivot("vda");
    assert!(listed(&daemon).is_empty());
}

/// A backup that took the one for the other would lack what the mirror had copied already.
#[test]
fn a_bitmap_with_the_name_of_a_jobs_own_is_not_shown() {
    let folder = folder();
    let image = make(folder.path());
    run("qemu-img", &["bitmap", "--add", &image.display().to_string(), "mirror"]);
    let mut daemon = Daemon::serve(folder.path(), &[export(&image, "")]);
    order("write -P 7 0 16M", "raw", &daemon.uri("vda"));
    assert!(!listed(&daemon).contains(&"mirror".to_owned()));
    let said = daemon.log();
    assert!(said.contains("its bitmap mirror is not shown to NBD clients"), "{said}");
    let target = folder.path().join("target.qcow2");
    daemon.ok("mirror", &["vda", &target.display().to_string(), "--wait"]);
    assert_eq!(listed(&daemon).iter().filter(|name| *name == "mirror").count(), 1);
    let nothing = vec![(0, DISK_LEN, false)];
    crate::support::eventually("nothing is left", || (map(&daemon.uri("vda"), "mirror") == nothing).then_some(()));
    daemon.pivot("vda");
    assert_eq!(listed(&daemon).len(), 3);
    daemon.stop();
    // It is kept all the same, and carried.
    ran(Command::new("qemu-img").args(["bitmap", "--remove"]).args([target.as_os_str(), "mirror".as_ref()]));
}
