//! What goes wrong around a daemon: files and folders that vanish, a source that cannot be read, a state folder that takes
//! nothing. What its process may not have is in `limits`.
//!
//! Held here: the words name the cause and the remedy, a guest hears only of errors of its own disk, and nothing is
//! recorded that a restart would not find.

use crate::support::daemon::{Daemon, program};
use crate::support::full::{BLOCK, DISK_LEN, connect, full_disk, write};
use crate::support::images::{create, overlay, three_layers};
use crate::support::mount::Mount;
use crate::support::nbd::{Client, Request};
use crate::support::random::Random;
use crate::support::scene::Scene;
use crate::support::server::{Server, two_folders};
use crate::support::tools::{content, output, refused};
use crate::support::{assert_same, folder};
use std::path::Path;
use std::process::Command;

#[test]
fn a_source_that_fails_in_one_place_fails_there_alone() {
    let folder = folder();
    let (theirs, ours) = two_folders(folder.path());
    let base = folder.path().join("base.raw");
    let mut truth = Random::new(7).bytes(DISK_LEN as usize);
    std::fs::write(&base, &truth).expect("a file of ours");
    let (from, to) = (3 << 20, (3 << 20) + BLOCK);
    let server = Server::failing_range(&theirs, &base, from as u64, to as u64);
    let top = folder.path().join("top.qcow2");
    overlay(&top, &server.uri(""), "raw", Some(DISK_LEN), &[]);
    let mut daemon = Daemon::serve(&ours, &[format!("vda={}", top.display())]);
    let mut guest = connect(&daemon);
    let read = |guest: &mut Client, at: usize, len: usize| {
        guest.send(&Request::Read { at: at as u64, len: len as u32 });
        guest.receive().expect("an answer").result
    };
    assert_eq!(read(&mut guest, from, BLOCK).err(), Some(5), "EIO");
    for at in [from - BLOCK, to] {
        assert_same("beside it", &read(&mut guest, at, BLOCK).expect("it is whole"), &truth[at..at + BLOCK]);
    }

    let target = folder.path().join("target.qcow2").display().to_string();
    daemon.ok("mirror", &["vda", &target]);
    let status = daemon.wait_for("vda", "failed");
    let error = status["error"].to_string();
    assert!(error.contains("source") && error.contains("Input/output error"), "{status}");
    assert_eq!(status["serving"], top.display().to_string());
    // What is written is read no more from there.
    let bytes = Random::new(8).bytes(BLOCK);
    truth[from..to].copy_from_slice(&bytes);
    guest.ask(&Request::Write { at: from as u64, bytes });
    std::fs::remove_file(&target).expect("the failed copy");
    daemon.ok("mirror", &["vda", &target, "--wait", "--pivot"]);
    drop(guest);
    daemon.stop();
    assert_same("the target", &content(Path::new(&target), "qcow2"), &truth);
}

/// A pivot recorded a target that had no name any more, and one was recorded where nobody would have looked: after a
/// restart the guest would have lost what it wrote behind it.
#[test]
fn what_a_restart_would_not_find_is_not_pivoted_to() {
    let mut scene = Scene::new(61);
    scene.mirror(&["--wait"]);
    scene.writes(50);
    let aside = scene.folder.path().join("aside");
    let state = scene.folder.path().join("state");
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).expect("files of ours");
    for place in [scene.target.clone(), state.clone(), state.join("vda.record")] {
        rename(&place, &aside);
        let said = scene.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("a restart would not find it"), "{}: {said}", place.display());
        assert_eq!(scene.status()["serving"], scene.source());
        scene.writes(50);
        rename(&aside, &place);
        scene.daemon.wait_for("vda", "ready");
    }
    scene.daemon.pivot("vda");
    // Nor is a snapshot made that would not be found.
    rename(&state, &aside);
    let overlay = scene.folder.path().join("overlay.qcow2").display().to_string();
    let said = scene.daemon.refused("snapshot", &["vda", &overlay]);
    assert!(!Path::new(&overlay).exists(), "{said}");
    assert_eq!(scene.status()["serving"], scene.target());
    rename(&aside, &state);
    scene.ends_on_the_target("qcow2");
}

/// A layer below was moved away and another file had its name: the target and the overlay named that file, and the next
/// start served it; the copy of the chain had it in it.
#[test]
fn what_is_below_by_another_name_now_is_not_relied_upon() {
    let folder = folder();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    std::fs::create_dir(&old).and_then(|()| std::fs::create_dir(&new)).expect("new folders");
    let chain = three_layers(&old, 8 << 20, 62);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let (target, overlay) = (new.join("target").display().to_string(), new.join("overlay").display().to_string());
    daemon.ok("mirror", &["vda", &target, "--shallow", "--wait"]);
    let (base, aside) = (chain.layers[0].0.clone(), old.join("aside"));
    std::fs::rename(&base, &aside).and_then(|()| std::fs::copy(&aside, &base)).expect("files of ours");
    let refused = |verb: &str, args: &[&str]| {
        let said = daemon.refused(verb, args);
        assert!(said.contains("base.qcow2") && said.contains("a restart would not find it"), "{verb}: {said}");
    };
    refused("pivot", &["vda"]);
    daemon.ok("cancel", &["vda", "--force"]);
    refused("snapshot", &["vda", &overlay]);
    refused("mirror", &["vda", "--chain", &new.display().to_string()]);
    assert!(!Path::new(&overlay).exists());
    // What is copied whole needs none of them.
    let full = new.join("full").display().to_string();
    daemon.ok("mirror", &["vda", &full, "--pivot"]);
    daemon.stop();
    assert_same("the disk", &content(Path::new(&full), "qcow2"), &chain.content());
}

#[test]
fn a_target_whose_folder_is_unmounted_is_not_pivoted_to() {
    let mut scene = Scene::new(62);
    let Some(mount) = Mount::new(scene.folder.path().join("place"), "size=64m") else { return };
    scene.target = mount.0.join("target");
    scene.mirror(&["--wait"]);
    mount.leave();
    let said = scene.daemon.refused("pivot", &["vda"]);
    assert!(said.contains("a restart would not find it"), "{said}");
    scene.writes(50);
    scene.daemon.ok("cancel", &["vda", "--force"]);
    scene.ends_on_the_source();
}

/// Its guests waited at the closed gate until the folder could be written again, which it could not.
#[test]
fn a_state_folder_that_turns_read_only_undoes_the_pivot() {
    let folder = folder();
    let state = folder.path().join("state");
    let Some(mount) = Mount::of_device(state.clone(), &folder.path().join("device")) else { return };
    let chain = three_layers(folder.path(), DISK_LEN, 68);
    let mut scene = Scene::of(folder, chain, 68);
    scene.mirror(&["--wait"]);
    mount.abort();
    for _ in 0..2 {
        scene.daemon.wait_for("vda", "ready");
        let said = scene.daemon.refused("pivot", &["vda"]);
        assert!(said.contains("the pivot record") && said.contains("Read-only file system"), "{said}");
        assert_eq!(scene.status()["serving"], scene.source());
        scene.writes(50);
    }
    scene.daemon.ok("cancel", &["vda", "--force"]);
    scene.writes(50);
    let truth = scene.writer.take().expect("a guest").stop();
    scene.holds(&truth);
    // It cannot leave in order what it cannot write.
    scene.daemon.kill();
    drop(mount);
}

#[test]
fn a_state_folder_without_room_refuses_jobs_and_not_guests() {
    let folder = folder();
    let (disk, mut truth, export) = full_disk(folder.path());
    let state = folder.path().join("state");
    let Some(mount) = Mount::new(state.clone(), "size=4m") else { return };
    let mut daemon = Daemon::serve(folder.path(), &[&export]);
    let (mut guest, mut random) = (connect(&daemon), Random::new(9));
    let fill = || {
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=4k", "status=none"]).arg(format!("of={}", state.join("filler").display()));
        assert!(!output(&mut dd).status.success(), "it ends when there is no more room");
    };
    fill();
    let target = folder.path().join("target.raw");
    let name = target.display().to_string();
    let said = daemon.refused("mirror", &["vda", &name]);
    assert!(said.contains("No space left") && said.contains(&state.display().to_string()), "{said}");
    assert!(!target.exists(), "nothing is left of it");
    write(&mut guest, &mut truth, 0, &mut random);
    std::fs::remove_file(state.join("filler")).expect("a file of ours");
    daemon.ok("mirror", &["vda", &name, "--wait"]);
    // What a pivot records has its room already.
    fill();
    daemon.pivot("vda");
    write(&mut guest, &mut truth, 1, &mut random);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"], name);
    assert_same("what is served", &connect(&daemon).content(), &truth);
    daemon.stop();
    drop((guest, mount));
    assert_same("the target", &content(&target, "raw"), &truth);
    assert!(content(&disk, "raw")[BLOCK..] != truth[BLOCK..], "the source was left at the pivot");
}

#[test]
fn a_state_folder_that_cannot_be_written_is_an_error_that_names_it() {
    let folder = folder();
    let disk = folder.path().join("disk.qcow2");
    create(&disk, "qcow2", DISK_LEN, &[]);
    let state = folder.path().join("state");
    let Some(_mount) = Mount::new(state.clone(), "ro") else { return };
    let mut serve = Command::new(program());
    serve.args(["serve", "--export", &format!("vda={}", disk.display())]);
    for (option, name) in [("--socket", "nbd"), ("--control", "control"), ("--state", "state")] {
        serve.arg(option).arg(folder.path().join(name));
    }
    refused(serve, &[&state.display().to_string(), "Read-only file system"]);
}
