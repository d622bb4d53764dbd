//! What a daemon is started with.
use crate::control::TargetFormat;
use serde::Deserialize;
use std::path::PathBuf;

/// Everything that `serve` needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// The disks, each with a name of its own. Never empty.
    pub exports: Vec<ExportOptions>,
    /// Where NBD clients come in. Never empty.
    pub listeners: Vec<Listener>,
    /// Path of the control socket.
    pub control: PathBuf,
    /// The folder of the pivot records and of the mirrors' marks, where one was named.
    ///
    /// The same folder has to be found again after a kill and after a reboot, for it says which
    /// image is the truth.
    pub state: Option<PathBuf>,
    /// Whether images go through the page cache.
    pub cache: Cache,
}

/// One disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// Its name for NBD clients and operators. Not empty.
    pub name: String,
    /// The top layer of its chain.
    pub file: PathBuf,
    /// The top layer's format; where it was not named it is probed, and raw is not guessed.
    pub format: Option<TargetFormat>,
    /// True where guests may not write.
    pub readonly: bool,
}

/// One address that NBD clients come in by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// A Unix socket's path.
    Unix(PathBuf),
    /// A TCP address, `host:port`; an IPv6 host is in brackets.
    Tcp(String),
}

/// Whether images go through the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Around it, where the file system can.
    #[default]
    None,
    /// Through it.
    Writeback,
    /// Through it, and nothing is made durable: for copies that can be made again. Never for `serve`.
    Unsafe,
}
