//! A disk moved to another machine: two network namespaces, and a link between them that is cut in the middle.

use crate::support::daemon::Daemon;
use crate::support::images::holding;
use crate::support::random::Random;
use crate::support::server::Server;
use crate::support::tools::ran;
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use std::path::Path;
use std::process::Command;

const DISK_LEN: usize = 64 << 20;
const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";

/// Two machines with a cable between them. Gone when it is dropped.
struct Network {
    near: String,
    far: String,
}

impl Network {
    /// `None`, and a word about it, where this machine lets nobody make namespaces.
    fn new() -> Option<Self> {
        let made = ["near", "far"].map(|name| format!("blkmirror-{}-{name}", std::process::id()));
        let [near, far] = made;
        let first = Command::new("ip").args(["netns", "add", &near]).output();
        if !first.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: network namespaces cannot be made here: {first:?}");
            return None;
        }
        let network = Self { near, far };
        let Self { near, far } = &network;
        ip(&["netns", "add", far]);
        ip(&["-n", near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far]);
        for (name, address) in [(near, NEAR), (far, FAR)] {
            ip(&["-n", name, "address", "add", &format!("{address}/24"), "dev", "cable"]);
            ip(&["-n", name, "link", "set", "cable", "up"]);
        }
        Some(network)
    }

    /// Cuts the cable, or mends it.
    fn cable(&self, up: bool) {
        ip(&["-n", &self.near, "link", "set", "cable", if up { "up" } else { "down" }]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.near, &self.far] {
            // One that was not made is only not there.
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

#[track_caller]
fn ip(words: &[&str]) {
    ran(Command::new("ip").args(words));
}

/// The words that have a program run on that machine.
fn on(name: &str) -> [&str; 4] {
    ["ip", "netns", "exec", name]
}

fn far_server(network: &Network, folder: &Path, file: &Path) -> Server {
    let pid_file = folder.join("qemu-nbd.pid");
    let [program, words @ ..] = on(&network.far);
    let mut command = Command::new(program);
    command.args(words).args(["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-b", FAR]);
    command.arg("--pid-file").arg(&pid_file).arg(file);
    Server::start(command, folder, &pid_file)
}

#[test]
fn a_cut_cable_pauses_the_mirroring_and_never_the_guest() {
    let Some(network) = Network::new() else { return };
    let folder = folder();
    let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("ours"));
    for made in [&theirs, &ours] {
        std::fs::create_dir(made).expect("a folder of ours");
    }
    let (source, target) = (ours.join("disk.qcow2"), theirs.join("target.raw"));
    let truth = Random::new(1).bytes(DISK_LEN);
    holding(&source, "qcow2", &truth, &[]);
    std::fs::write(&target, vec![0x55; DISK_LEN]).expect("a file of ours");
    let server = far_server(&network, &theirs, &target);
    let uri = format!("nbd://{FAR}:10809/");
    let export = format!("vda={}", source.display());
    let daemon = Daemon::serve_through(&on(&network.near), &ours, &[export], &[]);
    let guest =
        Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 8, flush_one_in: 50, ..Habits::default() });
    daemon.ok("mirror", &["vda", &uri, "--speed", "16M"]);
    eventually("some of it is copied", || (daemon.status("vda")["copied_bytes"].as_u64()? > 8 << 20).then_some(()));
    network.cable(false);
    guest.wait(1000);
    let status = daemon.status("vda");
    assert!(status["phase"] == "seeding" || status["phase"] == "converging", "{status}");
    network.cable(true);
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    assert_eq!(daemon.status("vda")["serving"], uri);
    guest.wait(100);
    // Now its disk is behind the cable: it waits, and goes on.
    network.cable(false);
    std::thread::sleep(std::time::Duration::from_secs(1));
    network.cable(true);
    guest.wait(100);
    let truth = guest.stop();
    drop((daemon, server));
    assert_same("the far disk", &std::fs::read(&target).expect("a file of ours"), &truth);
}
