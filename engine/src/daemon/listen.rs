//! The sockets that a daemon is reached by.
use crate::control::options::{Access, Listener};
use crate::io::File;
use formats::error::{Context, Error, Result};
use listenfd::ListenFd;
use rustix::fs::Mode;
use rustix::process::umask;
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vsock::{VMADDR_CID_ANY, VsockListener};

/// How long a server may take to say its first byte.
const GREETING_WAIT: Duration = Duration::from_secs(5);

/// A listening socket; a Unix socket's path goes when it is dropped.
pub(super) struct Listening {
    pub file: File,
    /// What to call it.
    pub name: String,
    pub path: Option<PathBuf>,
    /// Whether its path goes with it.
    pub is_ours: bool,
}

impl Listening {
    /// Listens at an address of NBD clients.
    pub fn at(listener: &Listener) -> Result<Self> {
        match listener {
            Listener::Unix(path, access) => Self::unix(path, *access),
            Listener::Tcp(address) => {
                let bound = TcpListener::bind(address.as_str());
                let bound = bound.context(|| format!("{address}: listen; is another server there?"))?;
                let name = bound.local_addr().map_or_else(|_| address.clone(), |found| found.to_string());
                Ok(Self { file: File::new(bound), name, path: None, is_ours: true })
            }
            Listener::Vsock { cid, port } => {
                let bound = VsockListener::bind_with_cid_port(cid.unwrap_or(VMADDR_CID_ANY), *port);
                let name = format!("vsock:{}:{port}", cid.map_or_else(|| "*".to_owned(), |cid| cid.to_string()));
                let bound = bound.context(|| format!("{name}: listen; has this kernel vsock?"))?;
                Ok(Self { file: File::new(bound), name, path: None, is_ours: true })
            }
        }
    }

    /// Listens at a Unix socket; one that a killed daemon left is replaced.
    pub fn unix(path: &Path, access: Access) -> Result<Self> {
        remove_left_over(path)?;
        // Closed to everybody until it is known who may come in.
        let before = access.is_said().then(|| umask(Mode::from_raw_mode(0o177)));
        let bound = UnixListener::bind(path).context(|| format!("{}: listen", path.display()));
        before.map(umask);
        let (name, path_too) = (path.display().to_string(), Some(path.to_owned()));
        let listening = Self { file: File::new(bound?), name, path: path_too, is_ours: true };
        if access.user.is_some() || access.group.is_some() {
            let owned = std::os::unix::fs::chown(path, access.user, access.group);
            owned.context(|| format!("{}: giving it to its owner", path.display()))?;
        }
        if let Some(mode) = access.mode {
            let set = fs::set_permissions(path, fs::Permissions::from_mode(mode));
            set.context(|| format!("{}: setting its mode", path.display()))?;
        }
        Ok(listening)
    }

    /// The sockets that whoever started this process listens at for it: systemd's `LISTEN_FDS`.
    pub fn inherited() -> Result<Vec<Self>> {
        let mut handed = ListenFd::from_env();
        (0..handed.len()).map(|number| Self::handed_over(&mut handed, number)).collect()
    }

    fn handed_over(handed: &mut ListenFd, number: usize) -> Result<Self> {
        let name = format!("the socket {number} of LISTEN_FDS");
        let unix = handed.take_unix_listener(number);
        let (file, blocking) = match unix {
            Ok(Some(listener)) => {
                let blocking = listener.set_nonblocking(false);
                (File::new(listener), blocking)
            }
            _ => {
                let listener = handed.take_tcp_listener(number).context(|| format!("{name}: no stream socket"))?;
                let listener = listener.ok_or_else(|| Error::invalid(format!("{name}: it was taken twice")))?;
                let blocking = listener.set_nonblocking(false);
                (File::new(listener), blocking)
            }
        };
        // The ring waits for connections itself; one that must not wait would spin.
        blocking.context(|| format!("{name}: making it wait"))?;
        Ok(Self { file, name, path: None, is_ours: true })
    }
}

impl Access {
    fn is_said(self) -> bool {
        self != Self::default()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = self.path.as_ref().filter(|_| self.is_ours) {
            // Somebody may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
}

fn remove_left_over(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(Error::invalid(format!("{}: there is a file already that is no socket", path.display())));
    }
    if somebody_answers(path) {
        return Err(Error::invalid(format!("{}: another server listens there: end it first", path.display())));
    }
    fs::remove_file(path).context(|| format!("{}: removing a socket that nobody listens at", path.display()))
}

/// True where a server greets us.
///
/// Being let in is not enough: a killed daemon's ring goes on accepting until the kernel has taken it
/// apart, a moment after the process is gone, and then resets the connection.
fn somebody_answers(path: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(path) else { return false };
    // Both kinds of our sockets speak first. Who says nothing for so long is busy, not gone.
    let asked = stream.set_read_timeout(Some(GREETING_WAIT)).and_then(|()| stream.read(&mut [0]));
    match asked {
        Ok(count) => count > 0,
        Err(error) => error.kind() != ErrorKind::ConnectionReset,
    }
}
