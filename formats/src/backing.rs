//! What an image records of the image below it.
//!
//! ```text
//! base.qcow2  /images/base  file:base     a file
//! nbd://…  nbd+unix://…  nbd:…            an NBD server's export; see `nbd::Address`
//! json:{…}                                one of these, and its format, by QEMU's words: see `json`
//! ```
//!
//! A name says what is opened, so what is not understood of it is refused and never left out.
mod json;

use crate::error::{Error, Result};
use crate::nbd::Address;
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest name that is looked at, in bytes. What an image can record is shorter.
pub const NAME_LEN_MAX: usize = 4096;

/// A backing name that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Where the image below is.
    pub location: Location,
    /// Its format, `raw` or `qcow2`, where the name itself says it.
    pub format: Option<&'static str>,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a file of this path.
    File(PathBuf),
    /// In an NBD server's export.
    Nbd(Address),
}

impl BackingName {
    /// Reads a recorded name. A protocol prefix is letters, digits, `+`, `-` and `.` before a colon
    /// that comes before any slash, as QEMU has it.
    pub fn parse(name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::malformed("the recorded backing name is empty"));
        }
        if name.contains('\0') {
            return Err(Error::malformed("the recorded backing name has a NUL byte in it"));
        }
        if name.len() > NAME_LEN_MAX {
            let len = name.len();
            return Err(Error::malformed(format!("the recorded backing name has {len} bytes, above {NAME_LEN_MAX}")));
        }
        let in_name = |error: Error| error.at(format_args!("its backing {name:?}"));
        let location = match protocol(name) {
            None => Location::File(name.into()),
            Some(("json", text)) => return json::parse(text).map_err(in_name),
            Some(("file", path)) if !path.is_empty() => Location::File(path.into()),
            Some(_) if Address::is_named_by(name) => {
                Location::Nbd(Address::parse(name).map_err(|error| error.at("its backing"))?)
            }
            Some((protocol, _)) => {
                let why = format!("{protocol}: is neither a file's name nor an NBD address; {REMEDY}");
                return Err(in_name(Error::unsupported(why)));
            }
        };
        Ok(Self { location, format: None })
    }
}

/// What helps against a name of another kind.
const REMEDY: &str = "name it by file:, nbd: or json: with these, with qemu-img rebase -u";

impl Location {
    /// What a command line names: an NBD address, or else a file, whatever colons are in its name.
    pub fn of_argument(argument: &Path) -> Result<Self> {
        match argument.to_str().filter(|name| Address::is_named_by(name)) {
            Some(name) => Ok(Self::Nbd(Address::parse(name)?)),
            None => Ok(Self::File(argument.into())),
        }
    }

    /// What an image at `parent` means by it: a relative path counts from that image's folder,
    /// in whatever manner it is recorded.
    pub fn seen_from(self, parent: &Self) -> Result<Self> {
        match (self, parent) {
            (Self::File(path), Self::File(parent)) => Ok(Self::File(parent.with_file_name("").join(path))),
            (Self::File(path), Self::Nbd(_)) if path.is_relative() => Err(Error::unsupported(format!(
                "its backing {} counts from a folder, and an export is in none: record a full path or an NBD \
                 address, with qemu-img rebase -u",
                path.display()
            ))),
            (location, _) => Ok(location),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Nbd(address) => address.fmt(f),
        }
    }
}

fn protocol(name: &str) -> Option<(&str, &str)> {
    let (before, rest) = name.split_once(':')?;
    let is_protocol = before.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    (is_protocol && !before.is_empty()).then_some((before, rest))
}

#[cfg(test)]
mod tests;
