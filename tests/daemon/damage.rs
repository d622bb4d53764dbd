//! An image that turns out to be corrupt while it is served: nothing is written any more, reads go on, the daemon
//! says so, and after `check --repair all` all is well.

use crate::support::daemon::{Daemon, program};
use crate::support::folder;
use crate::support::tools::{check, content, info, output, run};
use std::fs;
use std::path::Path;
use std::process::Command;

const CLUSTER: usize = 0x1_0000;

/// Whether a guest's command succeeds.
fn guest(daemon: &Daemon, command: &str) -> bool {
    output(Command::new("qemu-io").args(["-f", "raw", "-c", command, &daemon.uri("vda")])).status.success()
}

/// An image with 2 MiB of payload, whose L2 table counts as free.
fn corrupt(folder: &Path) -> std::path::PathBuf {
    let file = folder.join("a.qcow2");
    let name = file.display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, "64M"]);
    run("qemu-io", &["-c", "write -P 7 0 2M", &name]);
    let mut bytes = fs::read(&file).expect("just made");
    let l2 = u64::from_be_bytes(bytes[3 * CLUSTER..3 * CLUSTER + 8].try_into().expect("eight")) & (u64::MAX >> 8);
    let count = 2 * CLUSTER + l2 as usize / CLUSTER * 2;
    assert_eq!(bytes[count..count + 2], [0, 1], "its refcount");
    bytes[count + 1] = 0;
    fs::write(&file, bytes).expect("room");
    file
}

#[test]
fn a_corrupt_image_is_not_written_and_says_so() {
    let folder = folder();
    let file = corrupt(folder.path());
    let before = content(&file, "qcow2");
    let mut daemon = Daemon::serve(folder.path(), &[format!("vda={}", file.display())]);
    assert!(daemon.status("vda")["error"].is_null());
    // The file is full, so the search for free space comes across the table.
    assert!(!guest(&daemon, "write -P 9 8M 64k"), "the table would be overwritten");
    assert!(!guest(&daemon, "write -P 9 0 64k"), "nor anything else");
    assert!(guest(&daemon, "read -P 7 0 2M"), "reads go on");

    let status = daemon.status("vda");
    let told = status["error"].as_str().expect("what is wrong").to_owned();
    for words in ["is corrupt (the refcount of", "blkmirror check --repair all", "a.qcow2"] {
        assert!(told.contains(words), "{told}");
    }
    assert_eq!(daemon.log().matches("is corrupt (").count(), 1, "{}", daemon.log());
    assert_eq!(info(&file)["format-specific"]["data"]["corrupt"], true);
    daemon.stop();

    let name = file.display().to_string();
    let mended = output(Command::new(program()).args(["check", &name, "--repair", "all"]));
    assert!(mended.status.success(), "{mended:?}");
    check(&file, "qcow2");
    assert!(content(&file, "qcow2") == before, "what a guest sees is what it was");
    daemon.start();
    assert!(guest(&daemon, "write -P 9 8M 4M") && guest(&daemon, "read -P 9 8M 4M"));
    assert!(daemon.status("vda")["error"].is_null());
    daemon.stop();
    check(&file, "qcow2");
}
