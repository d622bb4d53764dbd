//! Other servers' exports inside TLS: read, copied to, mirrored to, served through. QEMU and nbdkit speak it by GnuTLS.
//!
//! Held here: what they serve is read and written whole; a guest lives on such an export through kills of both sides;
//! and a server that is not inside TLS, or not who was meant, is refused with the address, the file and the remedy.

use crate::authority::Authority;
use crate::support::daemon::{Daemon, program};
use crate::support::images::{compare, holding, overlay, thin_disk};
use crate::support::random::Random;
use crate::support::server::{Server, inside_tls};
use crate::support::tools::{content, ran, refused};
use crate::support::writer::{Habits, Writer};
use crate::support::{assert_same, folder};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const DISK_LEN: usize = 24 << 20;

/// A folder of certificates: a server's, for `localhost`, and a client's.
struct Scene {
    folder: TempDir,
    authority: Authority,
}

impl Scene {
    fn new() -> Self {
        let (folder, authority) = (folder(), Authority::new("the authority"));
        authority.server_folder(&folder.path().join("server"));
        authority.client_folder(&folder.path().join("client"), "the client");
        Self { folder, authority }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A file with these bytes.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).expect("a file of ours");
        self.path(name)
    }

    fn folder(&self, name: &str) -> PathBuf {
        std::fs::create_dir_all(self.path(name)).expect("a folder of ours");
        self.path(name)
    }

    /// A client's folder without a certificate.
    fn nobody(&self) -> PathBuf {
        let folder = self.folder("nobody");
        std::fs::copy(self.path("server/ca-cert.pem"), folder.join("ca-cert.pem")).expect("a file");
        folder
    }

    /// nbdkit, which lets in nobody without TLS and, where it asks for them, without a certificate.
    fn nbdkit(&self, certificates: &str, words: &[&str]) -> Server {
        let certificates = format!("--tls-certificates={}", self.text(certificates));
        Server::nbdkit(&self.folder("theirs"), &[&["--tls=require", &certificates], words].concat())
    }

    /// qemu-nbd, which wants to see a certificate.
    fn qemu(&self, words: &[&str]) -> Server {
        let object = format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}", self.text("server"));
        let tls = ["--object", &object, "--tls-creds", "tls0"];
        Server::qemu(&self.folder("theirs"), &[&tls[..], words].concat())
    }

    /// Our own daemon, likewise.
    fn daemon(&self, folder: &str, export: &str) -> Daemon {
        let options = ["--tls", "required", "--tls-certificates", &self.text("server")];
        Daemon::serve_with(&self.folder(folder), &[export], &options)
    }
}

fn blkmirror(words: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(words);
    command
}

fn converting(source: &str, target: &str) -> Command {
    blkmirror(&["convert", source, target, "--source-format", "raw", "--format", "raw"])
}

/// What a file has, as far as `len`.
fn held(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = std::fs::read(path).expect("a file of ours");
    bytes.truncate(len);
    bytes
}

/// The export is read, compared, mapped and told of as the disk that it is, and a copy to it is whole.
#[track_caller]
fn read_and_written(scene: &Scene, what: &str, uri: &str, file: &Path) {
    let (truth, other) = (thin_disk(DISK_LEN), Random::new(5).bytes(DISK_LEN));
    let (out, next) = (scene.path("out"), scene.file("next", &other));
    ran(&mut converting(uri, &out.display().to_string()));
    assert_same(&format!("from {what}"), &held(&out, DISK_LEN), &truth);
    ran(&mut blkmirror(&["compare", uri, &out.display().to_string(), "--a-format", "raw", "--b-format", "raw"]));
    let map = ran(&mut blkmirror(&["map", uri, "--json", "--format", "raw"]));
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).expect("JSON");
    let len: u64 = map.iter().map(|run| run["length"].as_u64().expect("a length")).sum();
    assert_eq!(len, DISK_LEN as u64, "{what}: {map:?}");
    let info: serde_json::Value = serde_json::from_str(&ran(&mut blkmirror(&["info", uri, "--json"]))).expect("JSON");
    assert_eq!((&info["virtual-size"], &info["children"][0]["info"]["format"]), (&DISK_LEN.into(), &"nbd".into()));
    std::fs::remove_file(&out).expect("a file of ours");
    ran(&mut converting(&next.display().to_string(), uri));
    assert_same(&format!("to {what}"), &held(file, DISK_LEN), &other);
}

#[test]
fn every_server_is_read_and_written_whole() {
    let scene = Scene::new();
    let truth = thin_disk(DISK_LEN);
    let client = scene.path("client");
    // One client at a time, and several.
    for words in [["-t", "-e", "1"], ["-t", "-e", "8"]] {
        let file = scene.file("disk", &truth);
        let server = scene.qemu(&[&words[..], &["-x", "a b", "-f", "raw", &scene.text("disk")]].concat());
        read_and_written(&scene, &format!("qemu-nbd {words:?}"), &server.tls_uri("a%20b", &client), &file);
    }
    let (nobody, disk) = (scene.nobody(), format!("file={}", scene.text("disk")));
    let one_client = ["--filter=multi-conn", "multi-conn-mode=disable"];
    for (words, client) in [
        (&["--tls-verify-peer"][..], &client),
        (&[], &nobody),
        (&one_client, &nobody),
        (&["--no-sr"], &nobody),
        (&["--filter=nozero"], &nobody),
    ] {
        let file = scene.file("disk", &truth);
        let server = scene.nbdkit("server", &[&["file", &disk], words].concat());
        read_and_written(&scene, &format!("nbdkit {words:?}"), &server.tls_uri("", client), &file);
    }
    let file = scene.file("disk", &truth);
    let daemon = scene.daemon("theirs", &format!("vda={},format=raw", scene.text("disk")));
    read_and_written(&scene, "our own daemon", &inside_tls(&daemon.uri("vda"), &client), &file);
}

/// What a name in an image says, and what it leaves to the command line.
#[test]
fn an_image_is_read_and_served_through_an_export_below_it() {
    let scene = Scene::new();
    let truth = thin_disk(DISK_LEN);
    holding(&scene.path("disk.qcow2"), "qcow2", &truth, &[]);
    let below = scene.daemon("theirs", &format!("disk={},readonly", scene.text("disk.qcow2")));
    let named = inside_tls(&below.uri("disk"), &scene.path("client"));
    let unnamed = named.replace(&format!("&tls-certificates={}", scene.text("client")), "");
    let default = ["--tls-client-certificates", &scene.text("client")];
    for (number, (name, options)) in [(&named, &[][..]), (&unnamed, &default)].into_iter().enumerate() {
        let (over, out) = (scene.path(&format!("over{number}.qcow2")), scene.path("out"));
        overlay(&over, name, "raw", Some(DISK_LEN as u64), &["-u"]);
        let [over, out_text] = [&over, &out].map(|path| path.display().to_string());
        let with = |words: &[&str]| ran(blkmirror(words).args(options));
        with(&["convert", &over, &out_text, "--format", "raw"]);
        assert_same(name, &held(&out, DISK_LEN), &truth);
        with(&["compare", &over, &out_text, "--b-format", "raw"]);
        assert!(with(&["map", &over, "--json"]).contains("\"depth\":1"));
        let chain: serde_json::Value =
            serde_json::from_str(&with(&["info", &over, "--backing-chain", "--json"])).expect("JSON");
        assert_eq!((&chain[1]["filename"], &chain[1]["virtual-size"]), (&name.as_str().into(), &DISK_LEN.into()));
        std::fs::remove_file(&out).expect("a file of ours");

        let ours = scene.folder(&format!("ours{number}"));
        let daemon = Daemon::serve_with(&ours, &[format!("top={over}")], options);
        // Clusters that are written in part are filled from the export below.
        let mut write = Command::new("qemu-io");
        ran(write.args(["-f", "raw", "-c", "write -P 7 1000000 70000", "-c", "flush", &daemon.uri("top")]));
        let mut changed = truth.clone();
        changed[1_000_000..1_070_000].fill(7);
        ran(&mut converting(&daemon.uri("top"), &out_text));
        assert_same("through both", &held(&out, DISK_LEN), &changed);
        std::fs::remove_file(&out).expect("a file of ours");
        if !options.is_empty() {
            refused(
                blkmirror(&["map", "-U", &over]),
                &[&unnamed, "name one by tls-certificates=DIR in the address, or by --tls"],
            );
        }
    }
}

/// The record names the address and, where that does, the folder; the same command line finds both again.
#[test]
fn a_guest_is_moved_to_an_export_and_lives_there_through_kills() {
    let scene = Scene::new();
    let truth = thin_disk(DISK_LEN);
    let (source, target) = (scene.file("disk", &truth), scene.file("target", &vec![0x55; DISK_LEN]));
    let server = scene.qemu(&["-t", "-e", "64", "-f", "raw", &target.display().to_string()]);
    let ours = scene.folder("ours");
    let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
    let guest =
        Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 3, flush_one_in: 50, ..Habits::default() });
    guest.wait(100);
    // The caller's folder, not the daemon's.
    let (uri, relative) = (server.tls_uri("", &scene.path("client")), server.tls_uri("", Path::new("client")));
    ran(daemon.command("mirror", &["vda", &relative]).current_dir(scene.folder.path()));
    daemon.kill();
    daemon.start();
    daemon.wait_for("vda", "ready");
    guest.wait(50);
    daemon.pivot("vda");
    for _ in 0..2 {
        assert_eq!(daemon.status("vda")["serving"], uri);
        guest.wait(200);
        daemon.kill();
        daemon.start();
    }
    guest.wait(100);
    let truth = guest.stop();
    // And back to a file.
    let back = scene.path("back");
    daemon.ok("mirror", &["vda", &back.display().to_string(), "--raw", "--pivot"]);
    daemon.stop();
    drop(server);
    assert_same("the export after the kills", &held(&target, DISK_LEN), &truth);
    compare((&back, "raw"), (&target, "raw"));
}

/// Each new connection is inside its own TLS, and what was not answered is asked again there.
#[test]
fn a_guest_waits_for_the_server_that_it_lives_on() {
    let scene = Scene::new();
    let truth = thin_disk(DISK_LEN);
    let (source, target) = (scene.file("disk", &truth), scene.file("target", &vec![0x55; DISK_LEN]));
    let mut server = scene.nbdkit("server", &["--tls-verify-peer", "file", &format!("file={}", target.display())]);
    let options = ["--tls-client-certificates", &scene.text("client")];
    let export = format!("vda={},format=raw", source.display());
    let mut daemon = Daemon::serve_with(&scene.folder("ours"), &[export], &options);
    let guest =
        Writer::start(&daemon.socket(), "vda", truth, Habits { seed: 6, flush_one_in: 20, ..Habits::default() });
    let uri = server.uri("").replacen("nbd+", "nbds+", 1) + "&tls-hostname=localhost";
    daemon.ok("mirror", &["vda", &uri, "--speed", "20M"]);
    // While it is copied, and while it is lived on.
    guest.wait(50);
    server.kill();
    guest.wait(200);
    server.again();
    daemon.ok("set", &["vda", "--speed", "0"]);
    daemon.wait_for("vda", "ready");
    daemon.pivot("vda");
    for _ in 0..3 {
        guest.wait(100);
        server.kill();
        server.again();
    }
    guest.wait(100);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.status("vda")["serving"], uri);
    guest.wait(50);
    let truth = guest.stop();
    daemon.stop();
    drop(server);
    assert_same("what the server has", &held(&target, DISK_LEN), &truth);
}

/// Our own daemon on the other side, killed and started again.
#[test]
fn a_mirror_goes_on_when_our_own_daemon_is_back() {
    let scene = Scene::new();
    let truth = thin_disk(DISK_LEN);
    let source = scene.file("disk", &truth);
    holding(&scene.path("target.qcow2"), "qcow2", &vec![0x55; DISK_LEN], &[]);
    let mut far = scene.daemon("theirs", &format!("far={}", scene.text("target.qcow2")));
    let mut near = Daemon::serve(&scene.folder("ours"), &[format!("vda={},format=raw", source.display())]);
    let guest = Writer::start(&near.socket(), "vda", truth, Habits { seed: 9, ..Habits::default() });
    let uri = inside_tls(&far.uri("far"), &scene.path("client"));
    near.ok("mirror", &["vda", &uri, "--speed", "20M"]);
    guest.wait(50);
    far.kill();
    guest.wait(100);
    far.start();
    near.ok("set", &["vda", "--speed", "0"]);
    near.wait_for("vda", "ready");
    near.pivot("vda");
    guest.wait(100);
    far.kill();
    far.start();
    guest.wait(100);
    let truth = guest.stop();
    near.stop();
    far.stop();
    assert_same("what is far", &content(&scene.path("target.qcow2"), "qcow2"), &truth);
}

#[test]
fn whoever_is_not_who_was_meant_is_refused_by_file_and_remedy() {
    let scene = Scene::new();
    let disk = scene.file("disk", &thin_disk(DISK_LEN)).display().to_string();
    let words = ["file", &format!("file={disk}")];
    let client = scene.path("client");
    let out = scene.text("out");
    let refuse = |uri: &str, reasons: &[&str]| {
        refused(converting(uri, &out), &[&[uri], reasons].concat());
        refused(blkmirror(&["info", uri]), reasons);
        assert!(!scene.path("out").exists(), "half a copy is removed");
    };
    let issued = |folder: &str, change: &dyn Fn(&mut rcgen::CertificateParams)| {
        let (certificate, key) = scene.authority.issue("the server", |params| {
            params.subject_alt_names = vec![rcgen::SanType::DnsName("localhost".try_into().expect("a name"))];
            change(params);
        });
        scene.authority.folder(&scene.path(folder), "server", &certificate, &key);
    };
    // A stranger of the same name, who trusts nobody else.
    let stranger = Authority::new("the authority");
    stranger.client_folder(&scene.path("misled"), "the client");
    issued("expired", &|params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
    issued("taken back", &|params| params.serial_number = Some(7u64.into()));
    issued("a client's", &|params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    issued("strict", &|_| {});
    std::fs::write(scene.path("strict/ca-cert.pem"), stranger.pem()).expect("a file");
    scene.authority.client_folder(&scene.path("careful"), "the client");
    std::fs::write(scene.path("careful/ca-crl.pem"), scene.authority.take_back(7)).expect("a file");

    let file = |name: &str| scene.text(name);
    let server = scene.nbdkit("server", &words);
    let uri = server.tls_uri("", &client);
    refuse(&server.uri(""), &["the server wants TLS", "name it by nbds://"]);
    refuse(&server.tls_uri("", &scene.path("misled")), &["signed by no authority of", &file("misled/ca-cert.pem")]);
    refuse(&uri.replace("=localhost", "=other"), &["not valid for name \"other\"", "say tls-hostname=NAME"]);
    refuse(&uri.replace("&tls-hostname=localhost", ""), &["a socket has no host's name", "tls-hostname=NAME"]);
    refuse(&server.tls_uri("", &scene.path("none")), &[&file("none"), "there is no folder of certificates"]);
    std::fs::create_dir(scene.path("empty")).expect("a folder");
    refuse(
        &server.tls_uri("", &scene.path("empty")),
        &[&file("empty/ca-cert.pem"), "reading it for TLS: No such file"],
    );
    drop(server);

    for (folder, trusting, reason) in [
        ("expired", "client", "the server's certificate: certificate expired"),
        ("taken back", "careful", "Revoked"),
        ("a client's", "client", "the server's certificate: "),
    ] {
        let server = scene.nbdkit(folder, &words);
        refuse(&server.tls_uri("", &scene.path(trusting)).replace(' ', "%20"), &[reason]);
    }
    for words in [&["--tls-verify-peer"][..], &[]] {
        let kind = if words.is_empty() { "qemu-nbd" } else { "nbdkit" };
        let server = match kind {
            "nbdkit" => scene.nbdkit("server", &["--tls-verify-peer", "file", &format!("file={disk}")]),
            _ => scene.qemu(&["-t", "-e", "8", "-f", "raw", &disk]),
        };
        let nobody = server.tls_uri("", &scene.nobody());
        refuse(&nobody, &["wants a client's certificate", &file("nobody/client-cert.pem")]);
        ran(&mut blkmirror(&["info", &server.tls_uri("", &client)]));
    }
    let server = scene.nbdkit("strict", &["--tls-verify-peer", "file", &format!("file={disk}")]);
    refuse(&server.tls_uri("", &client), &["does not let in who shows", &file("client/client-cert.pem")]);
    drop(server);

    // In plain, by others and by us; and a daemon of ours says the same to whoever mirrors.
    let plain = Server::nbdkit(&scene.folder("theirs"), &words);
    let uri = plain.tls_uri("", &client);
    refuse(&uri, &["the server has no TLS (error 0x80000", "start it with certificates"]);
    let daemon = Daemon::serve(&scene.folder("ours"), &[format!("vda={disk},format=raw")]);
    let said = daemon.refused("mirror", &["vda", &uri]);
    assert!(said.contains(&uri) && said.contains("the server has no TLS"), "{said}");
    refuse(&inside_tls(&daemon.uri("vda"), &client), &["the server has no TLS", "started without TLS"]);
    drop(plain);
    let older = Server::nbdkit(&scene.folder("theirs"), &[&["--mask-handshake=0"], &words[..]].concat());
    refuse(&older.tls_uri("", &client), &["the server has no TLS (it knows no options)"]);
}

#[test]
fn our_own_server_turns_away_who_shows_no_certificate() {
    let scene = Scene::new();
    let disk = scene.file("disk", &thin_disk(DISK_LEN));
    let daemon = scene.daemon("theirs", &format!("vda={},format=raw", disk.display()));
    refused(
        converting(&inside_tls(&daemon.uri("vda"), &scene.nobody()), &scene.text("out")),
        &["wants a client's certificate", &scene.text("nobody/client-cert.pem")],
    );
}

#[test]
fn by_tcp_the_host_is_who_the_certificate_has_to_be_for() {
    let scene = Scene::new();
    let disk = scene.file("disk", &thin_disk(DISK_LEN));
    // The port that the system gave to somebody who has gone is free for a while.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let pid_file = scene.path("nbdkit.pid");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-i", "127.0.0.1", "-p", &port.to_string(), "--tls=require", "--tls-certificates"]);
    command.arg(scene.path("server")).arg("-P").arg(&pid_file);
    command.arg("file").arg(format!("file={}", disk.display()));
    let _server = Server::start(command, scene.folder.path(), &pid_file);
    let uri = |host: &str| format!("nbds://{host}:{port}/?tls-certificates={}", scene.text("client"));
    let named = format!("{}&tls-hostname=localhost", uri("127.0.0.1"));
    for uri in [uri("localhost"), named] {
        ran(&mut blkmirror(&["info", &uri]));
    }
    refused(blkmirror(&["info", &uri("127.0.0.1")]), &["not valid for name \"127.0.0.1\"", "tls-hostname=NAME"]);
}

/// An export is one place, however it is reached.
#[test]
fn two_exports_cannot_have_one_address_inside_tls_and_in_plain() {
    let scene = Scene::new();
    let exports = ["a", "b"].map(|name| {
        let file = scene.file(name, &thin_disk(DISK_LEN));
        format!("{name}={},format=raw", file.display())
    });
    let server = {
        let tls = format!("--tls-certificates={}", scene.text("server"));
        Server::nbdkit(&scene.folder("theirs"), &["--tls=on", &tls, "memory", "24M"])
    };
    let daemon = Daemon::serve(&scene.folder("ours"), &exports);
    daemon.ok("mirror", &["a", &server.tls_uri("", &scene.path("client")), "--wait"]);
    for uri in [server.uri(""), server.tls_uri("", &scene.nobody())] {
        let said = daemon.refused("mirror", &["b", &uri]);
        assert!(said.contains("export a uses it"), "{said}");
    }
}
