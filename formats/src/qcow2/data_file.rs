//! The external data file: payload in a file of its own, tables in the image (qcow2.rst, "Header
//! extensions" and the note on incompatible bit 2).
//!
//! Each guest cluster that the image has is in the data file at its own guest offset, uncounted: an
//! entry says that it is there, never where. So nothing is shared, moved or compressed.
//!
//! A *raw* data file is the disk as well for whoever reads it alone. Its bytes have to be what the guest
//! sees at all times: zeroes are written there, not only into entries, and nothing can be below.
use super::geometry::Geometry;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// The longest name that is read or written, in bytes: the longest path that Linux opens.
const NAME_MAX: usize = 4095;
/// Largest disk in bytes: an entry has an offset below this.
const SIZE_MAX: u64 = 1 << 56;

/// The file that has an image's payload, as its header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name; a relative one counts from the folder of the image, as of backing images.
    pub name: String,
    /// It is a raw image of the disk by itself.
    pub raw: bool,
}

impl DataFile {
    /// The path to open, for an image at `image`. QEMU takes this name for a file's, whatever it looks
    /// like; what looks like a protocol is refused, for other programs may follow it elsewhere.
    pub fn resolve(&self, image: &Path) -> Result<PathBuf> {
        let protocol = self.name.split_once(':').map(|(before, _)| before).filter(|before| !before.contains('/'));
        if let Some(protocol) = protocol {
            return Err(Error::unsupported(format!(
                "its data file {:?} is not a plain path ({protocol}:): name it by one with `qemu-img amend -o \
                 data_file=PATH`, ./ in front of a name with a colon",
                self.name
            )));
        }
        Ok(image.parent().map_or_else(|| self.name.clone().into(), |folder| folder.join(&self.name)))
    }

    /// Refuses what no image can have, whoever says it.
    pub(super) fn check(&self, geometry: Geometry, has_backing: bool) -> Result<()> {
        if self.name.is_empty() || self.name.len() > NAME_MAX {
            let len = self.name.len();
            return Err(Error::malformed(format!(
                "the data file's name has {len} bytes: 1 to {NAME_MAX} are possible"
            )));
        }
        if geometry.size > SIZE_MAX {
            return Err(Error::malformed(format!(
                "size {} with an external data file, whose offsets end at {SIZE_MAX}",
                geometry.size
            )));
        }
        if self.raw && has_backing {
            return Err(Error::invalid(
                "a raw external data file cannot have a backing image, whose bytes are not in it: leave out one of them",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::DataFile;
    use std::path::Path;

    #[test]
    fn names_count_from_the_image_and_are_plain_paths() {
        let resolved = |name: &str| {
            let path = DataFile { name: name.into(), raw: false }.resolve(Path::new("/images/top.qcow2")).ok()?;
            Some(path.display().to_string())
        };
        assert_eq!(resolved("data.raw").as_deref(), Some("/images/data.raw"));
        assert_eq!(resolved("/other/data").as_deref(), Some("/other/data"));
        assert_eq!(resolved("./a:b").as_deref(), Some("/images/./a:b"));
        for name in ["json:{}", "file:data.raw", "nbd:unix:/x", "a:b"] {
            assert_eq!(resolved(name), None, "{name}");
        }
    }
}
