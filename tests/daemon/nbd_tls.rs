//! Other people's NBD clients inside TLS: libnbd by GnuTLS, QEMU by GnuTLS.
//!
//! Held here: those with a certificate are served the disk as it is, and what they write is in it; those without
//! one, and those in plain, are turned away, the latter in words; what is wrong with the folder is said at the start.

use crate::authority::Authority;
use crate::support::daemon::{Daemon, program};
use crate::support::tools::{content, output, ran, run, told};
use crate::support::{assert_same, folder, images};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const DISK_LEN: u64 = 16 << 20;

/// A folder with a disk, a server's certificates and a client's.
struct Scene {
    folder: TempDir,
    authority: Authority,
}

impl Scene {
    fn new() -> Self {
        let folder = folder();
        let authority = Authority::new("the authority");
        authority.server_folder(&folder.path().join("server"));
        authority.client_folder(&folder.path().join("client"), "the client");
        images::create(&folder.path().join("disk.qcow2"), "qcow2", DISK_LEN, &[]);
        Self { folder, authority }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn serve(&self, mode: &str, more: &[&str]) -> Daemon {
        let certificates = self.text("server");
        let options = [&["--tls", mode, "--tls-certificates", &certificates][..], more].concat();
        Daemon::serve_with(self.folder.path(), &[format!("vda={}", self.text("disk.qcow2"))], &options)
    }

    /// The disk for libnbd, with the certificates of a folder.
    fn uri(&self, daemon: &Daemon, client: &str) -> String {
        let socket = daemon.socket();
        format!("nbds+unix:///vda?socket={}&tls-certificates={}", socket.display(), self.text(client))
    }

    /// A program of QEMU's on the disk, with the certificates of a folder.
    fn qemu(&self, program: &str, args: &[&str], daemon: &Daemon, client: &str) -> Command {
        let socket = daemon.socket();
        let mut command = Command::new(program);
        command.args(args);
        command.args(["--object", &format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", self.text(client))]);
        command.args([
            "--image-opts",
            &format!(
                "driver=nbd,export=vda,server.type=unix,server.path={},tls-creds=tls0,tls-hostname=localhost",
                socket.display()
            ),
        ]);
        command
    }
}

#[track_caller]
fn refused(command: &mut Command) -> String {
    let output: Output = output(command);
    assert!(!output.status.success(), "{}", told(command, &output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn nbdinfo(uri: &str) -> Command {
    let mut command = Command::new("nbdinfo");
    command.args(["--size", uri]);
    command
}

/// Bytes that are nowhere alike.
fn noise(seed: u64) -> Vec<u8> {
    let mut random = crate::support::random::Random::new(seed);
    (0..DISK_LEN / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect()
}

#[test]
fn what_clients_write_and_read_inside_tls_is_the_disk() {
    let scene = Scene::new();
    let mut daemon = scene.serve("required", &[]);
    let uri = scene.uri(&daemon, "client");
    let (told, back) = (scene.path("told"), scene.path("back"));
    // From libnbd, with four connections where it likes; back by QEMU, and the other way round.
    let mut truth = noise(1);
    std::fs::write(&told, &truth).expect("a file of ours");
    run("nbdcopy", &[&told.display().to_string(), &uri]);
    let convert = ["convert", "-O", "raw"];
    ran(scene.qemu("qemu-img", &convert, &daemon, "client").arg(&back));
    assert_same("by qemu-img", &std::fs::read(&back).expect("what qemu-img wrote"), &truth);
    let patches = [(0, 1 << 20, 0x11), (3 << 20, 5000, 0x22), ((16 << 20) - 512, 512, 0x33)];
    let mut qemu_io = scene.qemu("qemu-io", &[], &daemon, "client");
    for (at, len, byte) in patches {
        truth[at..at + len].fill(byte);
        qemu_io.args(["-c", &format!("write -P {byte} {at} {len}"), "-c", &format!("read -P {byte} {at} {len}")]);
    }
    assert!(!ran(qemu_io.args(["-c", "flush"])).contains("failed"), "a pattern is another");
    run("nbdcopy", &[&uri, &back.display().to_string()]);
    assert_same("by nbdcopy", &std::fs::read(&back).expect("what nbdcopy wrote"), &truth);
    daemon.stop();
    assert_same("in the image", &content(&scene.path("disk.qcow2"), "qcow2"), &truth);
}

#[test]
fn fio_finds_what_it_wrote() {
    let scene = Scene::new();
    // Its library lets it name no folder of certificates.
    let daemon = scene.serve("required", &["--tls-verify-peer", "no"]);
    let fio = ["--name=tls", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-256k", "--iodepth=16"];
    let check = ["--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"];
    let uri = format!("--uri=nbds+unix:///vda?socket={}", daemon.socket().display());
    run("fio", &[&fio[..], &check, &[&uri]].concat());
}

#[test]
fn over_tcp_the_name_is_checked_too() {
    let scene = Scene::new();
    let daemon = scene.serve("required", &["--listen", "127.0.0.1:0"]);
    let log = daemon.log();
    let (_, rest) = log.split_once("127.0.0.1:").expect("an address");
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let uri = |host| format!("nbds://{host}:{port}/vda?tls-certificates={}", scene.text("client"));
    assert_eq!(ran(&mut nbdinfo(&uri("localhost"))).trim(), DISK_LEN.to_string());
    // The certificate is for another name.
    refused(&mut nbdinfo(&uri("127.0.0.1")));
}

#[test]
fn a_client_in_plain_is_told_why_it_is_refused() {
    let scene = Scene::new();
    let daemon = scene.serve("required", &[]);
    let said = refused(&mut nbdinfo(&daemon.uri("vda")));
    assert!(said.contains("TLS"), "{said}");
    let said = refused(Command::new("qemu-img").args(["info", &daemon.uri("vda")]));
    assert!(said.contains("this server requires TLS: connect with certificates (nbds://)"), "{said}");
    assert_eq!(ran(&mut nbdinfo(&scene.uri(&daemon, "client"))).trim(), DISK_LEN.to_string());
}

#[test]
fn where_tls_is_allowed_both_kinds_of_clients_come_in() {
    let scene = Scene::new();
    let daemon = scene.serve("allowed", &[]);
    for uri in [daemon.uri("vda"), scene.uri(&daemon, "client")] {
        assert_eq!(ran(&mut nbdinfo(&uri)).trim(), DISK_LEN.to_string());
    }
}

#[test]
fn without_tls_a_client_that_wants_it_is_told() {
    let scene = Scene::new();
    let daemon = Daemon::serve(scene.folder.path(), &[format!("vda={}", scene.text("disk.qcow2"))]);
    let said = refused(&mut scene.qemu("qemu-img", &["info"], &daemon, "client"));
    assert!(said.contains("this server was started without TLS"), "{said}");
    refused(&mut nbdinfo(&scene.uri(&daemon, "client")));
}

#[test]
fn clients_that_are_not_known_are_turned_away_and_the_log_says_why() {
    let scene = Scene::new();
    let issue = |folder: &str, name: &str, change: &dyn Fn(&mut rcgen::CertificateParams)| {
        let (certificate, key) = scene.authority.issue(name, change);
        scene.authority.folder(&scene.path(folder), "client", &certificate, &key);
    };
    issue("other", "the other", &|_| {});
    issue("expired", "the client", &|params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
    // Signed by somebody of the same name; it trusts the right authority.
    let (certificate, key) = Authority::new("the authority").issue("the client", |_| {});
    scene.authority.folder(&scene.path("stranger"), "client", &certificate, &key);
    std::fs::create_dir(scene.path("nobody")).expect("a folder");
    std::fs::copy(scene.path("client/ca-cert.pem"), scene.path("nobody/ca-cert.pem")).expect("a file");
    let daemon = scene.serve("required", &["--tls-allow", "someone", "--tls-allow", "the client", "-v"]);
    for (client, why) in [
        ("other", "no name of the client's certificate is in --tls-allow"),
        ("expired", "the client's certificate: certificate expired"),
        ("stranger", "the client's certificate: "),
        ("nobody", "the client showed no certificate"),
    ] {
        refused(&mut nbdinfo(&scene.uri(&daemon, client)));
        let ended = format!("connection ended: TLS: {why}");
        crate::support::eventually(&ended, || daemon.log().contains(&ended).then_some(()));
        refused(&mut scene.qemu("qemu-img", &["info"], &daemon, client));
    }
    assert_eq!(ran(&mut nbdinfo(&scene.uri(&daemon, "client"))).trim(), DISK_LEN.to_string());
}

#[test]
fn a_server_of_another_authority_is_turned_away_by_its_client() {
    let scene = Scene::new();
    let daemon = scene.serve("required", &[]);
    let (certificate, key) = scene.authority.issue("the client", |_| {});
    Authority::new("another").folder(&scene.path("misled"), "client", &certificate, &key);
    // libnbd looks at a server's certificate where it knows the host's name, so not on a Unix socket.
    let said = refused(&mut scene.qemu("qemu-img", &["info"], &daemon, "misled"));
    assert!(said.contains("certificate"), "{said}");
}

#[test]
fn without_verification_clients_need_no_certificate() {
    let scene = Scene::new();
    std::fs::create_dir(scene.path("nobody")).expect("a folder");
    std::fs::copy(scene.path("client/ca-cert.pem"), scene.path("nobody/ca-cert.pem")).expect("a file");
    let daemon = scene.serve("required", &["--tls-verify-peer", "no"]);
    assert_eq!(ran(&mut nbdinfo(&scene.uri(&daemon, "nobody"))).trim(), DISK_LEN.to_string());
    ran(&mut scene.qemu("qemu-img", &["info"], &daemon, "nobody"));
}

#[test]
fn what_is_wrong_with_the_folder_is_said_at_the_start() {
    let scene = Scene::new();
    let start = |folder: &Path, more: &[&str]| {
        let mut command = Command::new(program());
        command.args(["serve", "--export", &format!("vda={}", scene.text("disk.qcow2"))]);
        command.args(["--socket", &scene.text("nbd"), "--control", &scene.text("control")]);
        command.args(["--tls", "required", "--tls-certificates"]).arg(folder).args(more);
        let output = output(&mut command);
        assert_eq!(output.status.code(), Some(1), "{}", told(&command, &output));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let server = scene.path("server");
    let named = |file: &str| server.join(file).display().to_string();
    for file in ["server-key.pem", "server-cert.pem", "ca-cert.pem"] {
        std::fs::rename(server.join(file), server.join("away")).expect("a file");
        let said = start(&server, &[]);
        assert!(said.contains(&format!("{}: reading it for TLS: No such file", named(file))), "{said}");
        std::fs::rename(server.join("away"), server.join(file)).expect("a file");
    }
    std::fs::copy(scene.path("client/client-key.pem"), server.join("server-key.pem")).expect("a file");
    let said = start(&server, &[]);
    assert!(said.contains(&format!("{}: it is not the key of server-cert.pem", named("server-key.pem"))), "{said}");
    let said = start(&server, &["--tls-allow", "x", "--tls-verify-peer", "no"]);
    assert!(said.contains("--tls-allow needs --tls-verify-peer yes"), "{said}");
}

#[test]
fn half_of_the_options_is_a_misuse() {
    for half in [
        &["--tls", "required"][..],
        &["--tls-certificates", "/x"],
        &["--tls-allow", "x"],
        &["--tls", "allowed", "--tls-verify-peer", "no"],
        &["--tls", "perhaps", "--tls-certificates", "/x"],
    ] {
        let mut command = Command::new(program());
        let output = output(command.args(["serve", "--export", "a=b", "--control", "/x"]).args(half));
        assert_eq!(output.status.code(), Some(2), "{}", told(&command, &output));
    }
}
