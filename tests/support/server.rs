//! NBD servers of somebody else's.
use super::random::Random;
use super::tools::ran;
use super::{PATIENCE, eventually};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A server at a Unix socket. Killed and reaped when it is dropped.
pub struct Server {
    command: Command,
    child: Child,
    socket: PathBuf,
    pid_file: PathBuf,
}

impl Server {
    /// `qemu-nbd` with these words, for as long as one client stays.
    #[track_caller]
    pub fn qemu(folder: &Path, words: &[&str]) -> Self {
        let pid_file = folder.join("qemu-nbd.pid");
        let mut command = Command::new("qemu-nbd");
        command.arg("--socket").arg(folder.join("served")).arg("--pid-file").arg(&pid_file).args(words);
        Self::start(command, folder, &pid_file)
    }

    /// `nbdkit` with these words.
    #[track_caller]
    pub fn nbdkit(folder: &Path, words: &[&str]) -> Self {
        let pid_file = folder.join("nbdkit.pid");
        let mut command = Command::new("nbdkit");
        command.arg("-f").arg("-U").arg(folder.join("served")).arg("-P").arg(&pid_file).args(words);
        Self::start(command, folder, &pid_file)
    }

    /// A server of `disk` whose first 64 KiB are reached only once the file `gate` is there; all else at once, also
    /// what was asked for later.
    #[track_caller]
    pub fn gated(folder: &Path, disk: &Path, gate: &Path) -> Self {
        let gate = gate.display();
        Self::eval(folder, disk, &format!("[ $4 -ge 65536 ] || until [ -e {gate} ]; do sleep 0.02; done"), "true")
    }

    /// The same, of which the first request alone is held; the file `gate.held` says that it is.
    #[track_caller]
    pub fn gated_once(folder: &Path, disk: &Path, gate: &Path) -> Self {
        let (gate, held) = (gate.display(), gate.with_extension("held"));
        let hold = format!("until [ -e {gate} ]; do sleep 0.02; done");
        Self::eval(folder, disk, &format!("! mkdir {} 2>/dev/null || {hold}", held.display()), "true")
    }

    /// A server of `disk` whose flush fails as long as the file `trigger` is there.
    #[track_caller]
    pub fn failing_flush(folder: &Path, disk: &Path, trigger: &Path) -> Self {
        let fail = format!("! [ -e {} ] || {{ echo EIO it fails >&2; exit 1; }}", trigger.display());
        Self::eval(folder, disk, "true", &fail)
    }

    /// A server of `disk` whose flush takes until the file `gate` is there; `gate.held` says that one is asked for.
    #[track_caller]
    pub fn held_flush(folder: &Path, disk: &Path, gate: &Path) -> Self {
        let held = gate.with_extension("held");
        let hold = format!("touch {}; until [ -e {} ]; do sleep 0.02; done", held.display(), gate.display());
        Self::eval(folder, disk, "true", &hold)
    }

    /// A server of `disk` that cannot read its bytes `from..to`.
    #[track_caller]
    pub fn failing_range(folder: &Path, disk: &Path, from: u64, to: u64) -> Self {
        let elsewhere = format!("[ $(($4 + $3)) -le {from} ] || [ $4 -ge {to} ]");
        Self::eval(folder, disk, &format!("{elsewhere} || {{ echo EIO it fails >&2; exit 1; }}"), "true")
    }

    /// A server of `disk` by shell scripts, several at a time; reads and writes run `first`, with their length in `$3`
    /// and their offset in `$4`, and a flush runs `flush`.
    #[track_caller]
    fn eval(folder: &Path, disk: &Path, first: &str, flush: &str) -> Self {
        let disk = disk.display();
        let orders = [
            format!("get_size=stat -c %s {disk}"),
            format!("pread={first}; dd if={disk} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"),
            format!("pwrite={first}; dd of={disk} seek=$4 oflag=seek_bytes conv=notrunc status=none"),
            format!("flush={flush}; sync {disk}"),
        ];
        let answers = ["can_write=exit 0", "can_flush=exit 0", "can_multi_conn=exit 0", "thread_model=echo parallel"];
        let words: Vec<&str> = ["eval"].into_iter().chain(answers).chain(orders.iter().map(String::as_str)).collect();
        Self::nbdkit(folder, &words)
    }

    /// A server by this command, which makes the socket and then the file with its number.
    #[track_caller]
    pub fn start(mut command: Command, folder: &Path, pid_file: &Path) -> Self {
        let (socket, pid_file) = (folder.join("served"), pid_file.to_owned());
        command.stdin(Stdio::null());
        let child = Self::spawn(&mut command, &socket, &pid_file);
        Self { command, child, socket, pid_file }
    }

    #[track_caller]
    fn spawn(command: &mut Command, socket: &Path, pid_file: &Path) -> Child {
        for file in [pid_file, socket] {
            // What an earlier one left.
            let _ = std::fs::remove_file(file);
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // Both write it when they listen; a connection would be taken for a client.
        eventually("the server listens", || {
            let ended = child.try_wait().expect("waiting for our child");
            assert!(ended.is_none(), "{command:?} ended ({ended:?}) instead of serving");
            std::fs::read(pid_file).is_ok_and(|pid| !pid.is_empty()).then_some(())
        });
        child
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing our child");
        self.child.wait().expect("reaping our child");
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn wait_for_its_end(&mut self) {
        eventually("the server ends", || self.child.try_wait().expect("waiting for our child"));
    }

    /// Starts it once more, with the same words.
    #[track_caller]
    pub fn again(&mut self) {
        self.child = Self::spawn(&mut self.command, &self.socket, &self.pid_file);
    }

    /// Where it speaks.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The export's address.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// The export's address inside TLS, for a server called `localhost`, with the certificates of a folder.
    pub fn tls_uri(&self, export: &str, certificates: &Path) -> String {
        inside_tls(&self.uri(export), certificates)
    }
}

/// An address as `uri` says it, inside TLS.
pub fn inside_tls(uri: &str, certificates: &Path) -> String {
    let uri = uri.replacen("nbd+unix:", "nbds+unix:", 1);
    format!("{uri}&tls-certificates={}&tls-hostname=localhost", certificates.display())
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that ended by itself is only reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an export holds, as QEMU reads it.
#[track_caller]
pub fn held(uri: &str, folder: &Path) -> Vec<u8> {
    let out = folder.join("held");
    ran(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&out));
    let bytes = std::fs::read(&out).expect("what was converted");
    std::fs::remove_file(&out).expect("removing a file of ours");
    bytes
}

/// A file of garbage.
pub fn garbage(folder: &Path, name: &str, len: usize) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, Random::new(9).bytes(len)).expect("a file of ours");
    path
}

/// nbdkit's pause filter is told by one letter, and answers when it is so.
#[track_caller]
pub fn tell(control: &Path, letter: &[u8; 1]) {
    let mut stream = UnixStream::connect(control).expect("nbdkit's control socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.write_all(letter).expect("nbdkit listens");
    let mut answer = [0];
    stream.read_exact(&mut answer).expect("an answer of nbdkit's");
    assert_eq!(answer, letter.to_ascii_uppercase()[..]);
}

/// Folders of the server and of the daemon, whose sockets have the same names.
pub fn two_folders(folder: &Path) -> (PathBuf, PathBuf) {
    let (theirs, ours) = (folder.join("theirs"), folder.join("ours"));
    for made in [&theirs, &ours] {
        std::fs::create_dir(made).expect("a folder of ours");
    }
    (theirs, ours)
}
