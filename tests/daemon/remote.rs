//! Exports of other servers as images: read whole and as layers, by every kind of server, and by servers that fail.

use crate::support::daemon::{Daemon, program};
use crate::support::images::{holding, random_chain, thin_disk};
use crate::support::random::Random;
use crate::support::server::Server;
use crate::support::tools::{content, ran, refused};
use crate::support::{assert_same, folder};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

const DISK_LEN: usize = 24 << 20;

fn converting(source: &str, format: Option<&str>, out: &Path) -> Command {
    let mut command = Command::new(program());
    command.args(["convert", source]).arg(out).args(["--format", "raw"]);
    command.args(format.into_iter().flat_map(|format| ["--source-format", format]));
    command
}

/// What `source` reads as.
#[track_caller]
fn converted(source: &str, format: Option<&str>, folder: &Path) -> Vec<u8> {
    let out = folder.join("out");
    ran(&mut converting(source, format, &out));
    let bytes = std::fs::read(&out).expect("what was converted");
    std::fs::remove_file(&out).expect("removing a file of ours");
    bytes
}

#[test]
fn every_server_is_read_whole() {
    let folder = folder();
    let truth = thin_disk(DISK_LEN);
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (raw, qcow2) = (path("disk.raw"), path("disk.qcow2"));
    std::fs::write(&raw, &truth).expect("a file of ours");
    holding(Path::new(&qcow2), "qcow2", &truth, &["-c"]);
    let file = format!("file={raw}");
    // One client at a time, who is the last one; several; an export with a name.
    for (words, export, format) in [
        (vec!["-r", "-f", "raw", &raw], "", "raw"),
        (vec!["-r", "-t", "-e", "0", "-f", "qcow2", &qcow2], "", "raw"),
        (vec!["-r", "-e", "4", "-x", "a b/?#", "-f", "raw", &raw], "a%20b/%3F%23", "raw"),
        // The image itself is what is served: its tables come by the metadata's connection.
        (vec!["-r", "-f", "raw", &qcow2], "", "qcow2"),
        (vec!["-r", "-e", "4", "-f", "raw", &qcow2], "", "qcow2"),
    ] {
        let server = Server::qemu(folder.path(), &words);
        let found = converted(&server.uri(export), Some(format), folder.path());
        assert_same(&format!("qemu-nbd {words:?}"), &found, &truth);
    }
    for (words, format) in [
        (vec!["-r", "file", &file], "raw"),
        (vec!["file", &file, "--filter=noextents"], "raw"),
        (vec!["file", &file, "--filter=nozero", "--filter=multi-conn", "multi-conn-mode=disable"], "raw"),
        (
            vec![
                "--filter=blocksize-policy",
                "file",
                &file,
                "blocksize-minimum=4096",
                "blocksize-preferred=4096",
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
            ],
            "raw",
        ),
        (vec!["--no-sr", "file", &file], "raw"),
        (vec!["--mask-handshake=0", "file", &file], "raw"),
        (vec!["--filter=delay", "file", &file, "rdelay=1ms"], "raw"),
        (vec!["--filter=retry-request", "--filter=error", "file", &file, "error-pread-rate=1%"], "raw"),
    ] {
        let server = Server::nbdkit(folder.path(), &words);
        let found = converted(&server.uri(""), Some(format), folder.path());
        assert_same(&format!("nbdkit {words:?}"), &found, &truth);
    }
}

/// What a copy inherits was looked for in a file of the export's name, and there is none.
#[test]
fn an_image_inside_an_export_is_copied_to_a_new_image() {
    let folder = folder();
    let [inside, out] = ["inside.qcow2", "out.qcow2"].map(|name| folder.path().join(name));
    let truth = thin_disk(DISK_LEN);
    holding(&inside, "qcow2", &truth, &[]);
    let server = Server::nbdkit(folder.path(), &["file", &format!("file={}", inside.display())]);
    let mut command = Command::new(program());
    command.args(["convert", &server.uri("")]).arg(&out).args(["--source-format", "qcow2", "--format", "qcow2"]);
    ran(&mut command);
    assert_same("the copy", &content(&out, "qcow2"), &truth);
}

/// A copy was as thick as the export said it was long.
#[test]
fn holes_of_an_export_are_holes_of_the_copy() {
    let folder = folder();
    let server = Server::nbdkit(folder.path(), &["memory", "8G"]);
    let out = folder.path().join("out");
    ran(&mut converting(&server.uri(""), Some("raw"), &out));
    assert_eq!(std::fs::metadata(&out).expect("what was converted").len(), 8 << 30);
    assert!(crate::support::tools::allocated(&out) < 1 << 20);
}

#[test]
fn an_image_is_read_through_an_export_below_it() {
    let folder = folder();
    let chain = random_chain(folder.path(), &mut Random::new(4));
    let truth = chain.content();
    let base = chain.top.display().to_string();
    for shared in ["1", "8"] {
        for name in [
            "nbd+unix:///disk?socket=SOCKET",
            "nbd:unix:SOCKET:exportname=disk",
            r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"SOCKET"},"export":"disk"}}"#,
            r#"json:{"driver":"nbd","server.type":"unix","server.path":"SOCKET","export":"disk"}"#,
        ] {
            let words = ["-r", "-e", shared, "-x", "disk", "-f", chain.format, &base];
            let server = Server::qemu(folder.path(), &words);
            let name = name.replace("SOCKET", &server.socket().display().to_string());
            let over = folder.path().join("over.qcow2");
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &name]).arg(&over);
            ran(create.arg(truth.len().to_string()));
            let found = converted(&over.display().to_string(), None, folder.path());
            assert_same(&name, &found, &truth);
        }
    }
}

#[test]
fn our_own_daemon_is_a_server_as_well_and_serves_what_is_on_another() {
    let folder = folder();
    let truth = thin_disk(DISK_LEN);
    let path = |name: &str| folder.path().join(name);
    holding(&path("disk.qcow2"), "qcow2", &truth, &[]);
    let first = path("first");
    std::fs::create_dir(&first).expect("a folder of ours");
    let daemon = Daemon::serve(&first, &[format!("disk={},readonly", path("disk.qcow2").display())]);
    assert_same("from our daemon", &converted(&daemon.uri("disk"), Some("raw"), folder.path()), &truth);
    let mut compare = Command::new(program());
    compare.args(["compare", &daemon.uri("disk")]).arg(path("disk.qcow2")).args(["--a-format", "raw"]);
    ran(&mut compare);

    let over = path("over.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &daemon.uri("disk")]).arg(&over);
    ran(create.arg(DISK_LEN.to_string()));
    let second = path("second");
    std::fs::create_dir(&second).expect("a folder of ours");
    let upper = Daemon::serve(&second, &[format!("top={}", over.display())]);
    // Clusters that are written in part are filled from the export below.
    let mut write = Command::new("qemu-io");
    ran(write.args(["-f", "raw", "-c", "write -P 7 1000000 70000", "-c", "flush", &upper.uri("top")]));
    let mut changed = truth;
    changed[1_000_000..1_070_000].fill(7);
    assert_same("through both", &converted(&upper.uri("top"), Some("raw"), folder.path()), &changed);
}

#[test]
fn a_server_by_tcp_is_reached() {
    let folder = folder();
    let truth = thin_disk(DISK_LEN);
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, &truth).expect("a file of ours");
    // The port that the system gave to somebody who has gone is free for a while.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let pid_file = folder.path().join("nbdkit.pid");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-i", "127.0.0.1", "-p", &port.to_string(), "-P"]).arg(&pid_file);
    command.arg("file").arg(format!("file={}", raw.display()));
    let _server = Server::start(command, folder.path(), &pid_file);
    for host in ["127.0.0.1", "localhost"] {
        let uri = format!("nbd://{host}:{port}");
        assert_same(&uri, &converted(&uri, Some("raw"), folder.path()), &truth);
    }
}

#[test]
fn what_fails_is_told_with_the_address_and_the_reason() {
    let folder = folder();
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, thin_disk(DISK_LEN)).expect("a file of ours");
    let out = folder.path().join("out");
    let convert = |uri: &str| converting(uri, Some("raw"), &out);
    let file = format!("file={}", raw.display());

    let absent = format!("nbd+unix:///x?socket={}", folder.path().join("none").display());
    refused(convert(&absent), &[&absent, "connecting", "No such file or directory"]);
    refused(convert("nbds://localhost/x"), &["nbds://localhost:10809/x", "TLS needs a folder of certificates"]);
    refused(convert("nbd://localhost/x?y=1"), &["\"y\" is not supported"]);

    let server = Server::qemu(folder.path(), &["-r", "-x", "disk", "-f", "raw", &raw.display().to_string()]);
    refused(convert(&server.uri("none")), &[&server.uri("none"), "no export \"none\""]);
    drop(server);

    // What is inside an export cannot lead to this host's files by names that count from a folder.
    let image = folder.path().join("image.qcow2");
    for (options, reason) in [
        (["-o", "backing_file=base,backing_fmt=raw"], "counts from a folder"),
        (["-o", "data_file=data"], "cannot have its data in another file"),
    ] {
        let mut create = Command::new("qemu-img");
        create.current_dir(folder.path()).args(["create", "-q", "-u", "-f", "qcow2"]).args(options);
        ran(create.args(["image.qcow2", "1M"]));
        let server = Server::qemu(folder.path(), &["-r", "-f", "raw", &image.display().to_string()]);
        refused(converting(&server.uri(""), Some("qcow2"), &out), &[&server.uri(""), reason]);
    }

    let failing = ["--filter=error", "file", &file, "error-pread-rate=100%", "error=ENOSPC"];
    let one_client = ["--filter=multi-conn", "multi-conn-mode=disable"];
    // One connection each, and one for all.
    for words in [failing.to_vec(), [&failing[..], &one_client].concat()] {
        let server = Server::nbdkit(folder.path(), &words);
        refused(convert(&server.uri("")), &[&server.uri(""), "read of", "No space left on device"]);
        assert!(!out.exists(), "half a copy is removed");
    }
}

/// A server that says `said` to whom it serves and then nothing, until it is hung up on or goes away itself.
fn scripted(socket: &Path, said: Vec<Vec<u8>>, stays: bool) -> JoinHandle<()> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).expect("a socket");
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("a client");
        client.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let mut heard = [0; 4096];
        for bytes in said {
            // Whoever hangs up has heard enough.
            if client.write_all(&bytes).is_err() || client.read(&mut heard).unwrap_or(0) == 0 {
                return;
            }
        }
        while stays && client.read(&mut heard).unwrap_or(0) > 0 {}
    })
}

#[test]
fn a_server_that_hangs_up_or_lies_ends_the_copy() {
    let folder = folder();
    let socket = folder.path().join("served");
    let uri = format!("nbd+unix:///x?socket={}", socket.display());
    let out = folder.path().join("out");
    let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let no = |option: u8| [&b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0"[..], &[option], b"\x80\0\0\x01\0\0\0\0"].concat();
    // 16 MiB, without structured replies: what follows answers reads.
    let facts = b"\0\0\0\0\x01\0\0\0\0\x01".to_vec();
    let agreed = [greeting.clone(), no(8), no(7), facts];
    let with = |more: &[Vec<u8>]| [&agreed[..], more].concat();
    for (said, reason) in [
        (vec![], "hung up during the negotiation"),
        (vec![b"SSH-2.0-OpenSSH\r\n  ".to_vec()], "no NBD server"),
        (vec![greeting.clone(), no(8), no(7)], "no export \"x\""),
        (with(&[]), "the connection to the server is lost: the server hung up"),
        (with(&[b"gibberish".to_vec()]), "a reply begins with 0x67696262"),
        (with(&[[&b"\x67\x44\x66\x98\0\0\0\0"[..], &[0xff; 8]].concat()]), "request 0xffffffffffffffff"),
    ] {
        let server = scripted(&socket, said, false);
        refused(converting(&uri, Some("raw"), &out), &["nbd+unix:///x", reason]);
        assert!(!out.exists(), "half a copy is removed");
        server.join().expect("our server");
    }
}
