//! The sockets that a daemon is reached by.
use crate::control::options::Listener;
use crate::io::File;
use formats::error::{Context, Error, Result};
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a server may take to say its first byte.
const GREETING_WAIT: Duration = Duration::from_secs(5);

/// A listening socket; a Unix socket's path goes when it is dropped.
pub(super) struct Listening {
    pub file: File,
    /// What to call it.
    pub name: String,
    path: Option<PathBuf>,
}

impl Listening {
    /// Listens at an address of NBD clients.
    pub fn at(listener: &Listener) -> Result<Self> {
        match listener {
            Listener::Unix(path) => Self::unix(path),
            Listener::Tcp(address) => {
                let bound = TcpListener::bind(address.as_str());
                let bound = bound.context(|| format!("{address}: listen; is another server there?"))?;
                let name = bound.local_addr().map_or_else(|_| address.clone(), |found| found.to_string());
                Ok(Self { file: File::new(bound), name, path: None })
            }
        }
    }

    /// Listens at a Unix socket; one that a killed daemon left is replaced.
    pub fn unix(path: &Path) -> Result<Self> {
        remove_left_over(path)?;
        let bound = UnixListener::bind(path).context(|| format!("{}: listen", path.display()))?;
        Ok(Self { file: File::new(bound), name: path.display().to_string(), path: Some(path.to_owned()) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
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
