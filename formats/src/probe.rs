//! Which format a file has, by its first bytes.
//!
//! An answer is a hint, not a promise: a guest can write any bytes into a raw disk. So raw is never
//! an answer here, only `Unknown`.

/// What the first bytes of a file say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// QEMU's qcow2, version 2 or 3.
    Qcow2,
    /// A format of this name, which is not supported.
    Unsupported(&'static str),
    /// No magic number that is known: raw, or anything else.
    Unknown,
}

/// Magic numbers at the start of a file, and whose they are.
const MAGICS: [(&[u8], &str); 10] = [
    (b"QFI\xfb\0\0\0\x01", "qcow (version 1)"),
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"conectix", "VHD (VPC)"),
    (b"vhdxfile", "VHDX"),
    (b"LUKS\xba\xbe", "LUKS"),
    (b"WithoutFreeSpace", "Parallels"),
    (b"WithouFreSpacExt", "Parallels"),
];
/// VirtualBox's number comes behind a text of 64 bytes.
const VDI: (usize, &[u8]) = (64, b"\x7f\x10\xda\xbe");

/// What `head`, the first bytes of a file, says; 512 bytes are enough.
pub fn probe(head: &[u8]) -> Probed {
    if let Some(version) = head.strip_prefix(b"QFI\xfb").and_then(|rest| rest.first_chunk::<4>()) {
        // Later versions are refused by the header's own check, which names them.
        if u32::from_be_bytes(*version) >= 2 {
            return Probed::Qcow2;
        }
    }
    if head.get(VDI.0..).is_some_and(|rest| rest.starts_with(VDI.1)) {
        return Probed::Unsupported("VDI");
    }
    let known = MAGICS.iter().find(|(magic, _)| head.starts_with(magic));
    known.map_or(Probed::Unknown, |(_, name)| Probed::Unsupported(name))
}

#[cfg(test)]
mod tests {
    use super::{MAGICS, Probed, probe};

    #[test]
    fn known_numbers_are_named_and_raw_is_never_an_answer() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Probed::Qcow2);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x63"), Probed::Qcow2);
        assert!(MAGICS.iter().all(|(magic, name)| probe(magic) == Probed::Unsupported(name)));
        for head in [&b""[..], b"QFI", b"QFI\xfb", b"QFI\xfb\0\0", &[0; 512]] {
            assert_eq!(probe(head), Probed::Unknown);
        }
    }
}
