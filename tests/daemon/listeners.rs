//! Where NBD clients come in.

use crate::support::daemon::{Daemon, program};
use crate::support::{eventually, folder, images};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

const DISK_LEN: u64 = 1 << 20;

/// A raw disk that is served with `options`.
fn serve(folder: &Path, options: &[&str]) -> Daemon {
    let disk = folder.join("disk.raw");
    images::create(&disk, "raw", DISK_LEN, &[]);
    Daemon::serve_with(folder, &[format!("vda={},format=raw", disk.display())], options)
}

fn size(uri: &str) -> u64 {
    crate::support::tools::run("nbdinfo", &["--size", uri]).trim().parse().expect("a number")
}

#[test]
fn several_sockets_with_a_mode_and_an_owner() {
    let folder = folder();
    let second = folder.path().join("second");
    let me = rustix::process::getuid().as_raw().to_string();
    let options = ["--socket", second.to_str().expect("UTF-8"), "--socket-mode", "640", "--socket-owner", &me];
    let daemon = serve(folder.path(), &options);
    for socket in [daemon.socket(), second] {
        let metadata = fs::metadata(&socket).expect("a socket");
        assert_eq!((metadata.permissions().mode() & 0o777, metadata.uid().to_string()), (0o640, me.clone()));
        assert_eq!(size(&format!("nbd+unix:///vda?socket={}", socket.display())), DISK_LEN);
    }
}

#[test]
fn addresses_of_both_families() {
    let folder = folder();
    let daemon = serve(folder.path(), &["--listen", "127.0.0.1:0", "--listen", "[::1]:0"]);
    let log = daemon.log();
    let places = log.lines().find(|line| line.starts_with("serving")).expect("the first line");
    for host in ["127.0.0.1:", "[::1]:"] {
        let (_, rest) = places.split_once(host).unwrap_or_else(|| panic!("{host} in {places}"));
        let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
        assert_eq!(size(&format!("nbd://{host}{port}/vda")), DISK_LEN);
    }
}

/// A starter as systemd is one: it listens, and what it starts finds the socket as descriptor 3.
const STARTER: &str = "
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
listening.setblocking(False)
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn a_socket_that_the_starter_listens_at() {
    let folder = folder();
    let [disk, socket, control] = ["disk.raw", "handed", "control"].map(|name| folder.path().join(name));
    images::create(&disk, "raw", DISK_LEN, &[]);
    let mut child = Command::new("python3")
        .args(["-c", STARTER])
        .args([&socket, &program()])
        .args(["serve", "--export", &format!("vda={},format=raw", disk.display())])
        .args(["--control".as_ref(), control.as_os_str()])
        .stdout(Stdio::null())
        .spawn()
        .expect("python3");
    eventually("it serves", || control.exists().then_some(()));
    let found = size(&format!("nbd+unix:///vda?socket={}", socket.display()));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal to our child");
    let status = child.wait().expect("our child");
    assert_eq!((found, status.code()), (DISK_LEN, Some(0)));
    assert!(socket.exists(), "whoever made it removes it");
}

#[test]
fn nowhere_to_listen_is_an_error_that_says_so() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    images::create(&disk, "raw", DISK_LEN, &[]);
    let output = Command::new(program())
        .args(["serve", "--export", &format!("vda={},format=raw", disk.display())])
        .args(["--control".as_ref(), folder.path().join("control").as_os_str()])
        .env_remove("LISTEN_FDS")
        .output()
        .expect("the program");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("nowhere to listen: name --socket or --listen, or start it by a systemd socket"), "{said}");
}
