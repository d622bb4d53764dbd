//! libnbd from scripts (`tests/libnbd/`): queues, flags and ends that no ready-made client shows.
//!
//! Held here: answers come in the order in which the disk is done; each flag has its meaning; FUA and flush are answered
//! behind the disk's own flush, whichever connection wrote; who disconnects gets its answers first.

use crate::support::daemon::Daemon;
use crate::support::images;
use crate::support::server::Server;
use crate::support::tools::run;
use crate::support::{assert_same, folder};
use std::path::{Path, PathBuf};

const DISK_LEN: u64 = 16 << 20;

/// Runs a script with Debian's Python, which has libnbd.
#[track_caller]
fn script(name: &str, args: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/libnbd").join(name);
    run("/usr/bin/python3", &[&[script.to_str().expect("UTF-8")], args].concat())
}

/// A raw disk.
fn disk(folder: &Path) -> PathBuf {
    let disk = folder.join("disk.raw");
    images::create(&disk, "raw", DISK_LEN, &[]);
    disk
}

/// A daemon whose disk is that of `server`.
fn serve(folder: &Path, server: &Server) -> Daemon {
    let ours = folder.join("ours");
    std::fs::create_dir(&ours).expect("a folder of ours");
    Daemon::serve(&ours, &[format!("vda={},format=raw", server.uri(""))])
}

#[test]
fn who_is_done_first_is_answered_first() {
    let folder = folder();
    let gate = folder.path().join("gate");
    let server = Server::gated(folder.path(), &disk(folder.path()), &gate);
    let daemon = serve(folder.path(), &server);
    script("order.py", &[&daemon.uri("vda"), &gate.display().to_string()]);
}

#[test]
fn who_disconnects_is_answered_first() {
    let folder = folder();
    let (disk, gate) = (disk(folder.path()), folder.path().join("gate"));
    let server = Server::gated(folder.path(), &disk, &gate);
    let mut daemon = serve(folder.path(), &server);
    script("disconnect.py", &[&daemon.uri("vda"), &gate.display().to_string()]);
    daemon.stop();
    assert_same("the disk", &std::fs::read(&disk).expect("a file of ours")[..8 * 4096], &[b'w'; 8 * 4096]);
}

#[test]
fn four_deep_queues_find_what_they_wrote() {
    let folder = folder();
    let chain = images::three_layers(folder.path(), DISK_LEN, 3);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    script("pipeline.py", &[&daemon.uri("vda")]);
    daemon.stop();
    crate::support::tools::check(&chain.top, chain.format);
}

#[test]
fn each_flag_has_its_meaning() {
    let folder = folder();
    let [disk, base, old] = ["disk.qcow2", "base.raw", "old.qcow2"].map(|name| folder.path().join(name));
    images::create(&disk, "qcow2", DISK_LEN, &[]);
    std::fs::write(&base, vec![7; DISK_LEN as usize]).expect("a file of ours");
    // Version 2 has no cluster that reads as zeroes over a base.
    images::overlay(&old, "base.raw", "raw", None, &["-o", "compat=0.10"]);
    let exports = [("vda", &disk), ("old", &old)].map(|(name, file)| format!("{name}={},format=qcow2", file.display()));
    let daemon = Daemon::serve(folder.path(), &exports);
    script("flags.py", &[&daemon.uri("vda"), &daemon.uri("old")]);
}

#[test]
fn what_is_to_be_durable_is_flushed_below_before_the_answer() {
    let folder = folder();
    let log = folder.path().join("requests");
    let words =
        ["--filter=log", "file", &disk(folder.path()).display().to_string(), &format!("logfile={}", log.display())]
            .map(str::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = Server::nbdkit(folder.path(), &words);
    let daemon = serve(folder.path(), &server);
    script("durable.py", &[&daemon.uri("vda"), &log.display().to_string()]);
}

#[test]
fn requests_of_more_than_4_gib_are_done_where_the_library_has_them() {
    let folder = folder();
    let image = folder.path().join("disk.qcow2");
    images::create(&image, "qcow2", 6 << 30, &[]);
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=qcow2", image.display())]);
    println!("{}", script("long.py", &[&daemon.uri("vda")]));
}
