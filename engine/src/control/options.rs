//! What a daemon is started with.
use crate::control::TargetFormat;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that `serve` needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// The disks, each with a name of its own. Never empty.
    pub exports: Vec<ExportOptions>,
    /// Where NBD clients come in, beside the sockets that systemd may hand over (`LISTEN_FDS`).
    pub listeners: Vec<Listener>,
    /// Path of the control socket.
    pub control: PathBuf,
    /// The folder of the pivot records and of the mirrors' marks, where one was named.
    ///
    /// The same folder has to be found again after a kill and after a reboot, for it says which
    /// image is the truth.
    pub state: Option<PathBuf>,
    /// How images are reached.
    pub reach: Reach,
    /// TLS for NBD clients; without, they speak in plain.
    pub tls: Option<TlsOptions>,
    /// The control socket of a running daemon to take over from.
    pub handover: Option<PathBuf>,
}

/// TLS for NBD clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// No client is served without it.
    pub required: bool,
    /// The folder of the certificates, with QEMU's names in it.
    pub certificates: PathBuf,
    /// A client has to show a certificate that the folder's authority signed.
    pub verify_peer: bool,
    /// Common names or DNS names, one of which a client's certificate has to have. Empty: anyone's will do.
    pub allow: Vec<String>,
}

/// One disk to serve.
///
/// Its serialised form is the arguments of `blkmirror-export-add`, and what the state folder keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ExportOptions {
    /// Its name for NBD clients and operators. Not empty.
    pub name: String,
    /// The top layer of its chain.
    pub file: PathBuf,
    /// The top layer's format; where it was not named it is probed, and raw is not guessed.
    #[serde(default)]
    pub format: Option<TargetFormat>,
    /// True where guests may not write.
    #[serde(default)]
    pub readonly: bool,
}

/// One address that NBD clients come in by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// A Unix socket's path, and who may use it.
    Unix(PathBuf, Access),
    /// A TCP address, `host:port`; an IPv6 host is in brackets.
    Tcp(String),
    /// A vsock address: for guests of this host.
    Vsock {
        /// Who may come; `None` for everybody.
        cid: Option<u32>,
        /// Where.
        port: u32,
    },
}

/// Who may use a Unix socket; what is not said is as the system makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Number of the user that it belongs to.
    pub user: Option<u32>,
    /// Number of its group.
    pub group: Option<u32>,
}

/// How images are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Whether they go through the page cache.
    pub cache: Cache,
    /// The folder of certificates for servers inside TLS, where an address names none.
    pub certificates: Option<PathBuf>,
    /// Beside whom they are read.
    pub beside: Beside,
}

/// Who else may write to an image while it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beside {
    /// Nobody.
    #[default]
    Nobody,
    /// Whoever writes to a raw image, as qemu-img reads one.
    RawWriters,
    /// Anybody: no lock is looked at, and what is read may be of no instant.
    Anybody,
}

/// Whether images go through the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Around it, where the file system can.
    #[default]
    None,
    /// Around it; but what is read alone and is there for the most part is read from there.
    Auto,
    /// Through it.
    Writeback,
    /// Through it, and nothing is made durable: for copies that can be made again. Never for `serve`.
    Unsafe,
}
