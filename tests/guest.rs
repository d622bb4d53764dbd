//! A real Linux guest in real QEMU writes files while its disk moves underneath it; the files, their checksums
//! and the file system are whole afterwards, also when the daemon is killed in the middle.
//!
//! `tests/run` makes the guest's kernel and runs this; by hand: `cargo test --test guest -- --ignored`.
mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::daemon::Daemon;
use support::folder;
use support::images;
use support::tools::{check, check_leaks_allowed, info, output, run, told};
use support::vm::Vm;

const DISK_LEN: u64 = 96 << 20;

/// A disk with an empty ext4 on it, as a chain of three: the file system is in the base.
fn make_disk(folder: &Path) {
    let flat = folder.join("flat");
    std::fs::File::create(&flat).and_then(|file| file.set_len(DISK_LEN)).expect("a file of ours");
    run("mkfs.ext4", &["-q".as_ref(), flat.as_os_str()]);
    run("qemu-img", &["convert", "-O", "qcow2", &path(&flat), &path(&folder.join("base.qcow2"))]);
    std::fs::remove_file(&flat).expect("removing a file of ours");
    images::overlay(&folder.join("snap1.qcow2"), "base.qcow2", "qcow2", None, &[]);
    images::overlay(&folder.join("snap2.qcow2"), "snap1.qcow2", "qcow2", None, &[]);
}

/// e2fsck finds nothing to mend on the disk, which nobody serves any more.
#[track_caller]
fn assert_file_system_is_clean(image: &Path, format: &str) {
    let flat = image.with_extension("fsck");
    run("qemu-img", &["convert", "-f", format, "-O", "raw", &path(image), &path(&flat)]);
    run("e2fsck", &["-fn", &path(&flat)]);
    std::fs::remove_file(&flat).expect("removing a file of ours");
}

fn path(file: &Path) -> String {
    file.display().to_string()
}

fn serve(folder: &Path) -> Daemon {
    Daemon::serve(folder, &[format!("vda={},format=qcow2", folder.join("snap2.qcow2").display())])
}

/// Moves the disk to `target` while the guest writes; what is served then is the target.
#[track_caller]
fn move_disk(daemon: &Daemon, vm: &mut Vm, target: &Path, options: &[&str]) {
    let target = path(target);
    let mut args = vec!["vda", target.as_str()];
    args.extend(options);
    daemon.ok("mirror", &args);
    vm.wait_files(5);
    daemon.wait_for("vda", "ready");
    vm.wait_files(5);
    daemon.pivot("vda");
    assert_eq!(daemon.status("vda")["serving"], target);
    vm.wait_files(5);
}

/// Stops the guest's writer, has it verify everything from the disk, and writes on.
#[track_caller]
fn verify(vm: &mut Vm) {
    vm.order("stop");
    vm.order("verify");
    vm.order("start");
}

#[test]
#[ignore = "needs the guest's kernel: tests/run"]
fn the_disk_of_a_running_guest_moves_shallow_then_full_to_raw() {
    let folder = folder();
    let folder = folder.path();
    make_disk(folder);
    let (shallow, full) = (folder.join("shallow.qcow2"), folder.join("full.raw"));
    let mut daemon = serve(folder);
    let mut vm = Vm::boot(&daemon.socket(), "vda");
    vm.order("mount");
    vm.order("start");
    vm.wait_files(20);

    move_disk(&daemon, &mut vm, &shallow, &["--shallow"]);
    verify(&mut vm);
    assert_eq!(images::probed(&shallow), "qcow2");
    move_disk(&daemon, &mut vm, &full, &["--raw"]);
    verify(&mut vm);

    vm.order("stop");
    vm.order("unmount");
    vm.off();
    daemon.stop();
    assert_file_system_is_clean(&full, "raw");
    // The places that it was moved away from are whole chains too, as they were then.
    check(&shallow, "qcow2");
    check(&folder.join("snap2.qcow2"), "qcow2");
}

/// `kill -9`, the same command line again, and the guest writes on.
#[track_caller]
fn kill(daemon: &mut Daemon, vm: &mut Vm) {
    daemon.kill();
    daemon.start();
    vm.wait_files(2);
}

#[test]
#[ignore = "needs the guest's kernel: tests/run"]
fn a_guest_does_not_notice_ten_kills_of_the_daemon_while_its_disk_moves() {
    let folder = folder();
    let folder = folder.path();
    make_disk(folder);
    let target = folder.join("target.qcow2");
    let name = path(&target);
    let mut daemon = serve(folder);
    let mut vm = Vm::boot(&daemon.socket(), "vda");
    vm.order("mount");
    vm.order("start");
    vm.wait_files(20);

    // Killed without a job: everything that was acknowledged is still there.
    kill(&mut daemon, &mut vm);
    verify(&mut vm);

    // In the middle of a job, which is slow enough to have one.
    daemon.ok("mirror", &["vda", &name, "--speed", "4M"]);
    for _ in 0..3 {
        kill(&mut daemon, &mut vm);
        assert_eq!(daemon.status("vda")["target"], name);
    }
    // Ready, and in the pivot, wherever that meets it.
    for _ in 0..2 {
        catch_up(&daemon);
        kill(&mut daemon, &mut vm);
    }
    catch_up(&daemon);
    let mut pivot = daemon.command("pivot", &["vda"]).spawn().expect("the program");
    std::thread::sleep(Duration::from_millis(30));
    daemon.kill();
    let pivoted = pivot.wait().expect("reaping our child").success();
    daemon.start();
    if daemon.status("vda")["serving"] != name {
        assert!(!pivoted, "the pivot was done, and is undone");
        catch_up(&daemon);
        daemon.pivot("vda");
    }
    // Behind it: it is the target that is served.
    for _ in 0..3 {
        kill(&mut daemon, &mut vm);
        assert_eq!(daemon.status("vda")["serving"], name);
    }

    vm.order("stop");
    vm.order("verify");
    vm.order("unmount");
    vm.off();
    daemon.stop();
    assert_file_system_is_clean(&target, "qcow2");
    check_leaks_allowed(&target, "qcow2");
}

/// A job that goes on has the speed of its beginning.
#[track_caller]
fn catch_up(daemon: &Daemon) {
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
}

#[test]
#[ignore = "needs the guest's kernel: tests/run"]
fn a_cancelled_copy_of_a_running_guests_disk_is_a_file_system_of_one_instant() {
    let folder = folder();
    let folder = folder.path();
    make_disk(folder);
    let copy = folder.join("copy.qcow2");
    let mut daemon = serve(folder);
    let mut vm = Vm::boot(&daemon.socket(), "vda");
    vm.order("mount");
    vm.order("start");
    vm.wait_files(10);
    daemon.ok("mirror", &["vda", &path(&copy), "--wait"]);
    vm.wait_files(5);
    daemon.ok("cancel", &["vda"]);
    assert_eq!(daemon.status("vda")["phase"], "cancelled");
    // What the guest writes from here on is not in the copy, and does not have to be.
    vm.wait_files(5);
    vm.order("stop");
    vm.order("verify");
    vm.order("unmount");
    vm.off();
    daemon.stop();
    check(&copy, "qcow2");
    assert!(info(&copy)["backing-filename"].is_null(), "a full copy has no backing");
    assert_mends_like_after_a_power_cut(&copy);
    assert_file_system_is_clean(&folder.join("snap2.qcow2"), "qcow2");
}

/// The file system of a disk that stopped at one instant: its journal brings it back, and nothing else is wrong.
#[track_caller]
fn assert_mends_like_after_a_power_cut(image: &Path) {
    let flat = image.with_extension("fsck");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path(image), &path(&flat)]);
    let mut command = Command::new("e2fsck");
    let output = output(command.arg("-fp").arg(&flat));
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", told(&command, &output));
    run("e2fsck", &["-fn", &path(&flat)]);
}
