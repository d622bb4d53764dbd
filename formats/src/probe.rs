//! Which format a file seems to have, by its first bytes.
//!
//! Never take "nothing known" for raw without being told: a guest can write any magic into a raw
//! disk, and take any away.

/// How many bytes of a file's start `probe` looks at.
pub const PROBE_BYTES: usize = 2048;

/// What a file seems to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// qcow2, of any version.
    Qcow2,
    /// A format that is known and not supported: its name.
    Other(&'static str),
    /// Nothing that is known.
    Raw,
}

/// Formats that are known by bytes at an offset.
const MAGICS: [(&str, usize, &[u8]); 12] = [
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 0x40, &[0x7f, 0x10, 0xda, 0xbe]),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
];

/// Looks at the first bytes of a file: `PROBE_BYTES`, or all where it has fewer.
pub fn probe(start: &[u8]) -> Probed {
    if start.starts_with(b"QFI\xfb") {
        return match start.get(4..8) {
            Some([0, 0, 0, 1]) => Probed::Other("qcow"),
            // Versions that do not exist yet too: the header's parser names them.
            _ => Probed::Qcow2,
        };
    }
    let known = MAGICS.iter().find(|(_, at, magic)| start.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    known.map_or(Probed::Raw, |(name, _, _)| Probed::Other(name))
}

#[cfg(test)]
mod tests {
    use super::{MAGICS, Probed, probe};

    #[test]
    fn magics_are_found_where_they_belong() {
        for (name, at, magic) in MAGICS {
            let mut start = vec![0; 2048];
            start[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(probe(&start), Probed::Other(name));
            assert_eq!(probe(&start[..at + magic.len() - 1]), Probed::Raw, "{name}, cut");
            start.insert(0, 0);
            assert_eq!(probe(&start), Probed::Raw, "{name}, moved");
        }
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), Probed::Other("qcow"));
        assert_eq!(probe(b"QFI\xfb\0\0\0\x02"), Probed::Qcow2);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Probed::Qcow2);
        assert_eq!(probe(b"QFI"), Probed::Raw);
        assert_eq!(probe(b""), Probed::Raw);
    }
}
