//! NBD servers of somebody else's.
use super::eventually;
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
