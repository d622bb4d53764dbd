//! What the command line names a target by: a path, which is made absolute here, or an NBD address.
use crate::failure::Failure;
use formats::backing::Location;
use formats::nbd::Server;
use std::path::{Path, PathBuf, absolute};

/// The full name of a target, which holds in any working folder.
pub fn place(target: &Path) -> Result<PathBuf, Failure> {
    let named = |error: std::io::Error| Failure::new(format!("target '{}': {error}", target.display()));
    match Location::of_argument(target).map_err(|error| Failure::new(error.one_line()))? {
        Location::File(path) => absolute(path).map_err(named),
        Location::Nbd(named_so) => {
            let full = |path: &str| Ok(absolute(path).map_err(named)?.to_string_lossy().into_owned());
            let mut address = named_so.clone();
            if let Server::Unix { path } = &named_so.server {
                address.server = Server::unix(full(path)?).map_err(|error| Failure::new(error.one_line()))?;
            }
            if let Some(folder) = address.tls.as_mut().and_then(|names| names.certificates.as_mut()) {
                *folder = full(folder)?;
            }
            // What holds everywhere stays in the caller's words.
            Ok(if address == named_so { target.to_owned() } else { address.to_string().into() })
        }
    }
}
