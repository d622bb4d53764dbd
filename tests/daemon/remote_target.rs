//! Other servers' exports as targets: copied to, mirrored to, served through, and out of reach at the worst moments.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{compare, holding, random_chain, thin_disk};
use crate::support::random::Random;
use crate::support::server::{Server, garbage, held, two_folders};
use crate::support::tools::{ran, refused};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

const DISK_LEN: usize = 24 << 20;

fn converting(source: &Path, format: &str, target: &str) -> Command {
    let mut command = Command::new(program());
    command.arg("convert").arg(source).arg(target).args(["--source-format", format]);
    command
}

/// A server of a file that has other bytes, and a daemon that serves a disk.
fn beside_each_other(folder: &Path) -> (Server, Daemon) {
    let source = folder.join("disk.raw");
    std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
    let file = format!("file={}", garbage(folder, "target", DISK_LEN).display());
    let (theirs, ours) = two_folders(folder);
    let server = Server::nbdkit(&theirs, &["file", &file]);
    (server, Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]))
}

#[test]
fn every_server_gets_the_whole_disk() {
    let folder = folder();
    let truth = thin_disk(DISK_LEN);
    let source = folder.path().join("disk.qcow2");
    holding(&source, "qcow2", &truth, &[]);
    let same = |uri: &str, what: &str| {
        let found = held(uri, folder.path());
        assert_same(what, &found[..truth.len()], &truth);
    };
    // One client at a time; several; a larger disk.
    for (words, larger) in [(vec!["-t"], 0), (vec!["-t", "-e", "8"], 0), (vec!["-t", "-e", "8", "-x", "a b"], 1 << 20)]
    {
        let file = garbage(folder.path(), "target", DISK_LEN + larger).display().to_string();
        let server = Server::qemu(folder.path(), &[&words[..], &["-f", "raw", &file]].concat());
        let uri = server.uri(if words.contains(&"-x") { "a%20b" } else { "" });
        ran(&mut converting(&source, "qcow2", &uri));
        same(&uri, &format!("qemu-nbd {words:?}"));
    }
    let one_client = ["--filter=multi-conn", "multi-conn-mode=disable"];
    let blocks =
        ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"];
    for words in [
        vec![],
        vec!["--filter=nozero"],
        vec!["--filter=noextents", "--filter=nozero", "zeromode=notrim"],
        one_client.to_vec(),
        [&["--filter=blocksize-policy"], &blocks[..]].concat(),
        vec!["--no-sr"],
        vec!["--mask-handshake=0"],
        vec!["--filter=delay", "wdelay=1ms"],
    ] {
        let file = format!("file={}", garbage(folder.path(), "target", DISK_LEN).display());
        let server = Server::nbdkit(folder.path(), &[&["file", &file], &words[..]].concat());
        ran(&mut converting(&source, "qcow2", &server.uri("")));
        same(&server.uri(""), &format!("nbdkit {words:?}"));
    }
    let ours = folder.path().join("ours");
    std::fs::create_dir(&ours).expect("a folder of ours");
    let file = garbage(folder.path(), "target", DISK_LEN);
    let daemon = Daemon::serve(&ours, &[format!("disk={},format=raw", file.display())]);
    ran(&mut converting(&source, "qcow2", &daemon.uri("disk")));
    same(&daemon.uri("disk"), "our own daemon");
}

/// What is known to read as zeroes is not zeroed, and nothing is written where the source has a hole.
#[test]
fn a_fresh_export_gets_data_alone() {
    let folder = folder();
    let source = folder.path().join("disk.raw");
    let file = File::create(&source).expect("a file of ours");
    file.set_len(DISK_LEN as u64).expect("a file of holes");
    for (number, piece) in thin_disk(DISK_LEN).chunks(1 << 20).enumerate().filter(|(number, _)| number & 3 != 1) {
        file.write_all_at(piece, (number << 20) as u64).expect("a file of ours");
    }
    let log = folder.path().join("requests");
    let words = ["--filter=log", "memory", "24M", &format!("logfile={}", log.display())];
    let server = Server::nbdkit(folder.path(), &words);
    ran(&mut converting(&source, "raw", &server.uri("")));
    let said = std::fs::read_to_string(&log).expect("the server's log");
    let count = |word: &str| said.lines().filter(|line| line.contains(&format!(" {word} "))).count();
    assert_eq!(count("Zero"), 0, "{said}");
    assert!(count("Write") > 0 && count("Flush") > 0, "{said}");
    assert_same("the export", &held(&server.uri(""), folder.path()), &thin_disk(DISK_LEN));
}

#[test]
fn what_cannot_be_a_target_is_refused_by_name() {
    let folder = folder();
    let source = folder.path().join("disk.raw");
    std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
    let small = format!("file={}", garbage(folder.path(), "small", DISK_LEN - 512).display());
    let file = format!("file={}", garbage(folder.path(), "target", DISK_LEN).display());
    let blocks =
        ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"];
    let blocks = [&["--filter=blocksize-policy", "file", &file], &blocks[..]].concat();
    let before = held_file(folder.path(), "target");
    for (words, more, reason) in [
        (vec!["-r", "file", &file], vec![], "read-only"),
        (blocks, vec![], "blocks of 4096 bytes"),
        (vec!["file", &small], vec![], "make it larger"),
        (vec!["file", &file], vec!["--format", "qcow2"], "raw disk only"),
        (vec!["file", &file], vec!["-o", "preallocation=off"], "there already"),
        (vec!["file", &file], vec!["--shallow", "--format", "qcow2"], "raw disk only"),
    ] {
        let server = Server::nbdkit(folder.path(), &words);
        let mut command = converting(&source, "raw", &server.uri(""));
        command.args(&more);
        refused(command, &[&server.uri(""), reason]);
        assert!(held_file(folder.path(), "target") == before, "{words:?}: refused and written to");
    }
    refused(converting(&source, "raw", "nbds://localhost/x"), &["TLS needs a folder of certificates"]);
    refused(converting(&source, "raw", "nbd+unix:///x?socket=/none/there"), &["/none/there", "connecting"]);
    let daemon = Daemon::serve(folder.path(), &[format!("vda={},format=raw", source.display())]);
    let of_its_own = daemon.refused("mirror", &["vda", &daemon.uri("vda")]);
    assert!(of_its_own.contains("own socket"), "{of_its_own}");
    for (words, more, reason) in [
        (vec!["file", &file, "--filter=multi-conn", "multi-conn-mode=disable"], vec![], "one connection at a time"),
        (vec!["file", &file], vec!["--mode", "write-blocking"], "in the background"),
        (vec!["file", &file], vec!["--format", "qcow2"], "raw disk only"),
    ] {
        let server = Server::nbdkit(folder.path(), &words);
        let said = daemon.refused("mirror", &[&["vda", &server.uri("")], &more[..]].concat());
        assert!(said.contains(reason), "{words:?} {more:?}: {said}");
    }
    assert!(held_file(folder.path(), "target") == before, "refused and written to");
}

fn held_file(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).expect("a file of ours")
}

/// The record names the address; what comes back after a kill serves it, and the guest misses nothing.
#[test]
fn a_guest_is_moved_to_an_export_and_lives_there_through_kills() {
    let folder = folder();
    let chain = random_chain(folder.path(), &mut Random::new(11));
    let truth = chain.content();
    let served = folder.path().join("target");
    let (theirs, ours) = two_folders(folder.path());
    std::fs::write(&served, vec![0x55; truth.len().next_multiple_of(1 << 20)]).expect("a file of ours");
    let server = Server::qemu(&theirs, &["-t", "-e", "64", "-f", "raw", &served.display().to_string()]);
    let mut daemon = Daemon::serve(&ours, &[chain.export("vda")]);
    let guest =
        Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 3, flush_one_in: 50, ..Habits::default() });
    guest.wait(100);
    daemon.ok("mirror", &["vda", &server.uri(""), "--raw", "--reuse-external"]);
    daemon.kill();
    daemon.start();
    daemon.wait_for("vda", "ready");
    guest.wait(50);
    daemon.pivot("vda");
    assert_eq!(daemon.status("vda")["serving"], server.uri(""));
    guest.wait(200);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"], server.uri(""));
    guest.wait(200);
    let truth = guest.stop();
    daemon.stop();
    drop(server);
    let found = std::fs::read(&served).expect("a file of ours");
    assert_same("the export after two kills", &found[..truth.len()], &truth);
}

/// A server of memory that is killed has lost everything, flushed or not: what was copied is copied again.
#[test]
fn what_a_server_lost_before_it_was_flushed_is_copied_again() {
    let folder = folder();
    let source = folder.path().join("disk.raw");
    let mut truth = thin_disk(DISK_LEN);
    truth.resize(3 * DISK_LEN, 7);
    std::fs::write(&source, &truth).expect("a file of ours");
    let (theirs, ours) = two_folders(folder.path());
    let mut server = Server::nbdkit(&theirs, &["memory", "72M"]);
    let daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
    let guest = Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 5, ..Habits::default() });
    daemon.ok("mirror", &["vda", &server.uri(""), "--speed", "20M"]);
    let copied = |goal: u64| {
        eventually("some of it is copied", || {
            let status = daemon.status("vda");
            assert_eq!(status["phase"].as_str().map(|phase| phase == "failed"), Some(false), "{status}");
            (status["copied_bytes"].as_u64()? >= goal).then_some(())
        });
    };
    copied(10 << 20);
    server.kill();
    // Nobody waits for the target.
    guest.wait(200);
    let status = daemon.status("vda");
    assert!(status["phase"] == "seeding" || status["phase"] == "converging", "{status}");
    server.again();
    copied(15 << 20);
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    guest.wait(50);
    let truth = guest.stop();
    assert_same("what the daemon serves", &held(&daemon.uri("vda"), folder.path()), &truth);
    assert_same("what the server has", &held(&server.uri(""), folder.path()), &truth);
}

/// A guest that lives on an export waits while its server is away, and what was not answered is asked again.
#[test]
fn a_guest_waits_for_the_server_that_it_lives_on() {
    let folder = folder();
    let (mut server, daemon) = beside_each_other(folder.path());
    let guest = Writer::start(
        &daemon.socket(),
        "vda",
        thin_disk(DISK_LEN),
        Habits { seed: 6, flush_one_in: 20, ..Habits::default() },
    );
    daemon.ok("mirror", &["vda", &server.uri(""), "--wait"]);
    daemon.pivot("vda");
    for _ in 0..3 {
        guest.wait(100);
        server.kill();
        server.again();
    }
    guest.wait(100);
    let truth = guest.stop();
    assert_same("what the server has", &held(&server.uri(""), folder.path()), &truth);
}

/// Whoever asked for a pivot waits for the server; the guest does not.
#[test]
fn a_pivot_that_was_asked_for_while_the_server_is_away_is_done_when_it_is_back() {
    let folder = folder();
    let (mut server, daemon) = beside_each_other(folder.path());
    let guest = Writer::start(&daemon.socket(), "vda", thin_disk(DISK_LEN), Habits { seed: 12, ..Habits::default() });
    daemon.ok("mirror", &["vda", &server.uri(""), "--wait"]);
    let blocking = daemon.refused("set", &["vda", "--mode", "write-blocking"]);
    assert!(blocking.contains("in the background"), "{blocking}");
    server.kill();
    let mut pivot = daemon.command("pivot", &["vda"]).spawn().expect("a pivot");
    guest.wait(300);
    assert!(pivot.try_wait().expect("our child").is_none(), "nobody is there to be pivoted to");
    server.again();
    assert!(pivot.wait().expect("our child").success(), "{}", daemon.log());
    guest.wait(100);
    let truth = guest.stop();
    assert_same("what the server has", &held(&server.uri(""), folder.path()), &truth);
}

#[test]
fn two_exports_cannot_have_one_address() {
    let folder = folder();
    let (first, second) = (folder.path().join("first.raw"), folder.path().join("second.raw"));
    for file in [&first, &second] {
        std::fs::write(file, thin_disk(DISK_LEN)).expect("a file of ours");
    }
    let theirs = folder.path().join("theirs");
    std::fs::create_dir(&theirs).expect("a folder of ours");
    let server = Server::nbdkit(&theirs, &["memory", "24M"]);
    let exports = [("a", &first), ("b", &second)].map(|(name, file)| format!("{name}={},format=raw", file.display()));
    let daemon = Daemon::serve(folder.path(), &exports);
    daemon.ok("mirror", &["a", &server.uri(""), "--wait"]);
    let followed = daemon.refused("mirror", &["b", &server.uri("")]);
    assert!(followed.contains("export a uses it"), "{followed}");
    daemon.pivot("a");
    let served = daemon.refused("mirror", &["b", &server.uri("")]);
    assert!(served.contains("export a uses it"), "{served}");
    // And back to a file.
    let back = folder.path().join("back.raw");
    daemon.ok("mirror", &["a", &back.display().to_string(), "--raw", "--pivot"]);
    compare((&back, "raw"), (&first, "raw"));
}

/// A server that takes the connection and says nothing: only who named it waits.
#[test]
fn nobody_else_waits_for_a_target_that_is_being_reached() {
    let folder = folder();
    let exports = ["a", "b"].map(|name| {
        let file = folder.path().join(name);
        std::fs::write(&file, thin_disk(DISK_LEN)).expect("a file of ours");
        format!("{name}={},format=raw", file.display())
    });
    let daemon = Daemon::serve(folder.path(), &exports);
    let silent = folder.path().join("silent");
    let listener = UnixListener::bind(&silent).expect("a socket of ours");
    let target = format!("nbd+unix:///?socket={}", silent.display());
    let mut mirror = daemon.command("mirror", &["a", &target]).spawn().expect("a mirror");
    let client = listener.accept().expect("the daemon");
    let [other, of_b] = ["other", "of-b"].map(|name| folder.path().join(name).display().to_string());
    let second = daemon.refused("mirror", &["a", &other, "--raw"]);
    assert!(second.contains("whose target is being reached"), "{second}");
    let snapshot = daemon.refused("snapshot", &["a", &other]);
    assert!(snapshot.contains("whose target is being reached"), "{snapshot}");
    daemon.ok("mirror", &["b", &of_b, "--raw", "--pivot"]);
    assert!(mirror.try_wait().expect("our child").is_none(), "nobody has answered it");
    drop((client, listener));
    assert!(!mirror.wait().expect("our child").success(), "its target hung up");
    daemon.ok("mirror", &["a", &other, "--raw", "--pivot"]);
}
