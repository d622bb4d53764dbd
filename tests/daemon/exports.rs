//! Exports that come and go, snapshots, and pivots of several disks at once, while guests write; each also through a
//! `kill -9`.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{self, Chain, three_layers};
use crate::support::nbd::{Client, Replies, Request};
use crate::support::qmp::Qmp;
use crate::support::server::{Server, two_folders};
use crate::support::tools::{check, check_leaks_allowed, content, info, ran, refused, run};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, eventually, folder};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

const DISK_LEN: u64 = 16 << 20;

fn connect(daemon: &Daemon, export: &str) -> Client {
    Client::connect(&daemon.socket(), export, Replies::Structured).expect("an NBD connection")
}

fn habits(seed: u64) -> Habits {
    Habits { seed, pause: Duration::ZERO, ..Habits::default() }
}

fn named(folder: &Path, name: &str, seed: u64) -> Chain {
    let home = folder.join(name);
    std::fs::create_dir(&home).expect("a new folder");
    three_layers(&home, DISK_LEN, seed)
}

/// `blkmirror export VERB --control … ARGS…`.
fn export(daemon: &Daemon, verb: &str, args: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(program());
    command.args(["export", verb, "--control"]).arg(daemon.control_socket()).args(args);
    command
}

#[test]
fn an_export_that_was_added_is_there_after_a_kill_and_gone_when_it_was_removed() {
    let folder = folder();
    let (first, second) = (named(folder.path(), "a", 1), named(folder.path(), "b", 2));
    let mut daemon = Daemon::serve(folder.path(), &[first.export("vda")]);
    refused(export(&daemon, "add", &[&second.export("vda")]), &["there is an export vda already"]);
    refused(export(&daemon, "add", &[&first.export("vdb")]), &["export vda"]);
    ran(&mut export(&daemon, "add", &[&second.export("vdb")]));
    let writer = Writer::start(&daemon.socket(), "vdb", second.content(), habits(3));
    writer.wait(100);
    refused(export(&daemon, "remove", &["vdb"]), &["connections", "--force"]);
    let truth = writer.stop();
    daemon.kill();
    daemon.start();
    assert_same("what was added, after the kill", &connect(&daemon, "vdb").content(), &truth);
    eventually("the connection has ended", || {
        let mut command = export(&daemon, "remove", &["vdb"]);
        command.output().expect("the program").status.success().then_some(())
    });
    assert!(Client::connect(&daemon.socket(), "vdb", Replies::Structured).is_err());
    // Nobody has it open any more, and it is whole.
    check_leaks_allowed(&second.top, "qcow2");
    assert_same("its image on its own", &second.content(), &truth);
    daemon.stop();
    daemon.start();
    assert!(Client::connect(&daemon.socket(), "vdb", Replies::Structured).is_err(), "it was removed for good");
    assert_same("the other one", &connect(&daemon, "vda").content(), &first.content());
}

#[test]
fn force_ends_the_connections_of_an_export_and_loses_nothing_that_was_answered() {
    let folder = folder();
    let (first, second) = (named(folder.path(), "a", 4), named(folder.path(), "b", 5));
    let daemon = Daemon::serve(folder.path(), &[first.export("vda"), second.export("vdb")]);
    let mut client = connect(&daemon, "vdb");
    let mut truth = second.content();
    let bytes = vec![0x5a; 65536];
    client.ask(&Request::Write { at: 1 << 20, bytes: bytes.clone() });
    truth[1 << 20..][..65536].copy_from_slice(&bytes);
    ran(&mut export(&daemon, "remove", &["vdb", "--force"]));
    assert!(client.receive().is_err(), "the connection has ended");
    assert_same("its image", &second.content(), &truth);
    check(&second.top, "qcow2");
}

#[test]
fn a_snapshot_becomes_the_top_while_the_guest_writes_and_stays_so_after_a_kill() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 6);
    let mut daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let writer = Writer::start(&daemon.socket(), "vda", chain.content(), habits(7));
    writer.wait(100);
    let (first, second) = (folder.path().join("s1.qcow2"), folder.path().join("deep/s2.qcow2"));
    std::fs::create_dir(folder.path().join("deep")).expect("a new folder");
    daemon.ok("snapshot", &["vda", &first.display().to_string()]);
    assert_eq!(daemon.status("vda")["serving"].as_str(), first.to_str());
    writer.wait(300);
    // What was the top is not written any more.
    let before = content(&chain.top, "qcow2");
    daemon.ok("snapshot", &["vda", &second.display().to_string(), "--relative-backing"]);
    writer.wait(600);
    let truth = writer.stop();
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"].as_str(), second.to_str());
    assert_same("the disk after the kill", &connect(&daemon, "vda").content(), &truth);
    daemon.stop();
    assert_same("the overlays on their own", &content(&second, "qcow2"), &truth);
    assert_same("what was the top", &content(&chain.top, "qcow2"), &before);
    assert_eq!(info(&second)["backing-filename"], "../s1.qcow2");
    for image in [&chain.top, &first, &second] {
        check_leaks_allowed(image, "qcow2");
    }
}

/// The gate was closed before the flush, which is what takes long. And a daemon that is told to end meanwhile ends with
/// the snapshot taken, not with an overlay that nobody knows of.
#[test]
fn a_snapshot_flushes_while_its_guest_goes_on_and_comes_to_its_end() {
    let folder = folder();
    let (theirs, ours) = two_folders(folder.path());
    let (disk, gate, overlay) = (folder.path().join("disk"), folder.path().join("gate"), folder.path().join("overlay"));
    std::fs::write(&disk, vec![1; 1 << 20]).expect("a file of ours");
    let server = Server::held_flush(&theirs, &disk, &gate);
    std::fs::write(&gate, "").expect("a file of ours");
    let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", server.uri(""))]);
    let held = gate.with_extension("held");
    let write = |daemon: &Daemon, at: u64| {
        connect(daemon, "vda").ask(&Request::Write { at, bytes: vec![2; 4096] });
    };
    write(&daemon, 0);
    for file in [&gate, &held] {
        // Nobody has flushed yet, or somebody has.
        let _ = std::fs::remove_file(file);
    }
    let mut qmp = Qmp::connect(&daemon.control_socket());
    let ask = json!({ "execute": "blkmirror-snapshot", "arguments": { "export": "vda", "file": overlay } });
    qmp.send(format!("{ask}\n").as_bytes());
    eventually("the flush is under way", || held.exists().then_some(()));
    write(&daemon, 8192);
    let mut quit = daemon.command("quit", &[]).spawn().expect("the program");
    std::fs::write(&gate, "").expect("a file of ours");
    assert!(quit.wait().expect("our child").success());
    assert_eq!(qmp.answer()["return"], json!({}));
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"].as_str(), overlay.to_str());
    let mut truth = vec![1; 1 << 20];
    truth[..4096].fill(2);
    truth[8192..12288].fill(2);
    assert_same("the overlay", &connect(&daemon, "vda").content(), &truth);
    daemon.stop();
}

#[test]
fn a_snapshot_that_cannot_be_is_refused_and_leaves_nothing_behind() {
    let folder = folder();
    let chain = three_layers(folder.path(), DISK_LEN, 8);
    let daemon = Daemon::serve(folder.path(), &[chain.export("vda")]);
    let path = |name: &str| folder.path().join(name).display().to_string();
    images::create(Path::new(&path("full.qcow2")), "qcow2", DISK_LEN, &[]);
    run("qemu-io", &["-c", "write -P 1 1M 64k", &path("full.qcow2")]);
    images::create(Path::new(&path("small.qcow2")), "qcow2", DISK_LEN / 2, &[]);
    for (args, reason) in [
        (vec!["vda".to_owned(), chain.top.display().to_string()], "layer"),
        (vec!["vda".to_owned(), path("full.qcow2")], "not empty"),
        (vec!["vda".to_owned(), path("full.qcow2"), "--reuse-external".to_owned()], "contents at"),
        (vec!["vda".to_owned(), path("small.qcow2"), "--reuse-external".to_owned()], "bytes"),
        (vec!["vda".to_owned(), path("none/s.qcow2")], "folder: No such file"),
        (vec!["vdz".to_owned(), path("s.qcow2")], "no export vdz"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = daemon.refused("snapshot", &args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    assert_eq!(daemon.status("vda")["serving"].as_str(), chain.top.to_str());
    let target = path("copy.raw");
    daemon.ok("mirror", &["vda", &target, "--raw", "--speed", "1K"]);
    for (verb, args) in [("snapshot", vec!["vda", &path("s.qcow2")]), ("mirror", vec!["vda", &path("t.raw"), "--raw"])]
    {
        let said = daemon.refused(verb, &args);
        assert!(said.contains("BLOCK_COPY_ACTIVE"), "{verb}: {said}");
    }
    refused(export(&daemon, "remove", &["vda", "--force"]), &["BLOCK_COPY_ACTIVE"]);
    assert!(!Path::new(&path("s.qcow2")).exists() && !Path::new(&path("t.raw")).exists());
    daemon.ok("cancel", &["vda", "--force"]);
}

#[test]
fn disks_of_one_guest_are_pivoted_at_one_instant_and_stay_so_after_a_kill() {
    let folder = folder();
    let names = ["vda", "vdb", "vdc"];
    let chains: Vec<Chain> = names.iter().zip(10..).map(|(name, seed)| named(folder.path(), name, seed)).collect();
    let exports: Vec<String> = names.iter().zip(&chains).map(|(name, chain)| chain.export(name)).collect();
    let mut daemon = Daemon::serve(folder.path(), &exports);
    let writer = |(name, chain): (&&str, &Chain)| {
        Writer::start(&daemon.socket(), name, chain.content(), Habits { pause: Duration::from_millis(2), ..habits(11) })
    };
    let writers: Vec<Writer> = names.iter().zip(&chains).map(writer).collect();
    let target = |name: &str| folder.path().join(name).join("new.qcow2").display().to_string();
    daemon.ok("mirror", &["vda", &target("vda"), "--wait"]);
    let said = daemon.refused("pivot", &names);
    assert!(said.contains("vdb has no copy job"), "{said}");
    assert_eq!(daemon.status("vda")["phase"], "ready", "nothing of it was begun");
    for name in &names[1..] {
        daemon.ok("mirror", &[name, &target(name), "--wait"]);
    }
    eventually("they pivot", || {
        let output = daemon.command("pivot", &names).output().expect("the program");
        // On a busy machine a last pass may take longer than a pause allows: then none of them is pivoted.
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let now: Vec<bool> = names.iter().map(|name| daemon.status(name)["phase"] == "pivoted").collect();
        assert!(now.iter().all(|pivoted| *pivoted == output.status.success()), "{now:?}: {said}");
        output.status.success().then_some(())
    });
    writers.iter().for_each(|writer| writer.wait(50));
    let truths: Vec<Vec<u8>> = writers.into_iter().map(Writer::stop).collect();
    daemon.kill();
    daemon.start();
    for (name, truth) in names.iter().zip(&truths) {
        assert_eq!(daemon.status(name)["serving"].as_str(), Some(target(name).as_str()));
        assert_same(name, &connect(&daemon, name).content(), truth);
    }
    daemon.stop();
    for (name, truth) in names.iter().zip(&truths) {
        assert_same(name, &content(Path::new(&target(name)), "qcow2"), truth);
    }
}
