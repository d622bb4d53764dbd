//! What the command line names a target by: a path, which is made absolute here, or an NBD address.
use crate::failure::Failure;
use formats::backing::Location;
use formats::nbd::{Address, Server};
use std::path::{Path, PathBuf, absolute};

/// The full name of a target, which holds in any working folder.
pub fn place(target: &Path) -> Result<PathBuf, Failure> {
    let named = |error: std::io::Error| Failure::new(format!("target '{}': {error}", target.display()));
    match Location::of_argument(target).map_err(|error| Failure::new(error.one_line()))? {
        Location::File(path) => absolute(path).map_err(named),
        Location::Nbd(Address { server: Server::Unix { path }, export, tls }) if !path.starts_with('/') => {
            let path = absolute(path).map_err(named)?.to_string_lossy().into_owned();
            let server = Server::unix(path).map_err(|error| Failure::new(error.one_line()))?;
            Ok(Address { server, export, tls }.to_string().into())
        }
        Location::Nbd(_) => Ok(target.to_owned()),
    }
}
