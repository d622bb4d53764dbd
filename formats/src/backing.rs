//! Names of backing images, as an overlay records them.
use crate::error::{Error, Result};

/// The longest `json:` or URI that an error repeats.
const QUOTED_MAX: usize = 80;

/// What a recorded name refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingName {
    /// A path; where it is relative, to the folder of the image that records it.
    File(String),
}

impl BackingName {
    /// Reads a name as QEMU does: `file:` and a path, or a protocol before the first colon, or a path.
    ///
    /// # Errors
    ///
    /// `Unsupported` for protocols other than `file:`, with their name.
    pub fn parse(name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::malformed("the backing name is empty"));
        }
        let Some(protocol) = protocol(name) else { return Ok(Self::File(name.to_owned())) };
        match (protocol, &name[protocol.len() + 1..]) {
            ("file", "") => Err(Error::malformed("the backing name is `file:` without a path")),
            ("file", path) => Ok(Self::File(path.to_owned())),
            _ => Err(unsupported(protocol, name)),
        }
    }
}

/// What is in front of a colon, unless a slash comes first: `./a:b` is a path.
fn protocol(name: &str) -> Option<&str> {
    let (before, _) = name.split_once(':')?;
    (!before.contains('/')).then_some(before)
}

fn unsupported(protocol: &str, name: &str) -> Error {
    let shown: String = name.chars().take(QUOTED_MAX).collect();
    Error::unsupported(format!(
        "backing name `{shown}`: the protocol `{protocol}:` is not supported; if it is a file, record `./{shown}` with `qemu-img rebase -u`, else bring it into a file"
    ))
}

#[cfg(test)]
mod tests {
    use super::BackingName;

    #[test]
    fn names_as_qemu_reads_them() {
        let file = |path: &str| Some(BackingName::File(path.to_owned()));
        for (name, path) in [
            ("base.qcow2", "base.qcow2"),
            ("../a/base", "../a/base"),
            ("/dev/vg/lv", "/dev/vg/lv"),
            ("file:base.qcow2", "base.qcow2"),
            ("file:/abs/base", "/abs/base"),
            ("file:a:b", "a:b"),
            ("./a:b", "./a:b"),
            ("/a:b/c", "/a:b/c"),
        ] {
            assert_eq!(BackingName::parse(name).ok(), file(path), "{name}");
        }
    }

    #[test]
    fn other_protocols_are_refused_by_name() {
        for name in ["json:{\"driver\":\"nbd\"}", "nbd:localhost:10809", "nbd+unix:///x?socket=s", "http://h/x", "a:b"]
        {
            let error = BackingName::parse(name).expect_err("no file").one_line();
            let protocol = name.split(':').next().unwrap_or_default();
            assert!(error.contains(&format!("`{protocol}:`")), "{error}");
        }
        assert!(BackingName::parse("").is_err());
        assert!(BackingName::parse("file:").is_err());
    }
}
