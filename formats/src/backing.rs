//! What an image records of the image below it.
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// A backing name that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingName {
    /// A file's path; a relative one counts from the folder of the image that records it.
    File(PathBuf),
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
        let Some((protocol, rest)) = protocol(name) else { return Ok(Self::File(name.into())) };
        match protocol {
            "file" if !rest.is_empty() => Ok(Self::File(rest.into())),
            _ => Err(Error::unsupported(format!(
                "its backing {name:?} is not a file's name ({protocol}:), which is not supported: make it one with \
                 qemu-img rebase -u"
            ))),
        }
    }

    /// The path to open, for an image at `parent`.
    pub fn resolve(&self, parent: &Path) -> PathBuf {
        let Self::File(path) = self;
        match parent.parent() {
            Some(folder) => folder.join(path),
            None => path.clone(),
        }
    }
}

fn protocol(name: &str) -> Option<(&str, &str)> {
    let (before, rest) = name.split_once(':')?;
    let is_protocol = before.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    (is_protocol && !before.is_empty()).then_some((before, rest))
}

#[cfg(test)]
mod tests {
    use super::BackingName;
    use std::path::Path;

    fn resolved(name: &str) -> Option<String> {
        let name = BackingName::parse(name).ok()?;
        Some(name.resolve(Path::new("/images/top.qcow2")).display().to_string())
    }

    #[test]
    fn names_count_from_the_image_that_records_them() {
        assert_eq!(resolved("base.qcow2").as_deref(), Some("/images/base.qcow2"));
        assert_eq!(resolved("/other/base").as_deref(), Some("/other/base"));
        assert_eq!(resolved("file:base").as_deref(), Some("/images/base"));
        assert_eq!(resolved("./a:b").as_deref(), Some("/images/./a:b"));
    }

    #[test]
    fn other_protocols_are_refused_by_name() {
        for name in ["", "a\0b", "file:", "json:{}", "nbd://host/x", "nbd+unix:///x?socket=s", "rbd:pool/x"] {
            assert_eq!(resolved(name), None, "{name}");
        }
    }
}
