//! How a target is to be made: qemu-img's options of `create -o`.
use serde::{Deserialize, Serialize};
use std::fmt;

/// What was said of a target that is to be made. What was not said is as in the source's top layer;
/// preallocation and data files are not taken from there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct CreateOptions {
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The version of qcow2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Width of a refcount: a power of two from 1 to 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refcount_bits: Option<u64>,
    /// Entries with subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// How clusters are compressed, where they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression_type: Option<CompressionType>,
    /// How much of the target's space is taken at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preallocation: Option<Preallocation>,
    /// Others may write refcounts late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Another file for the payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// That file reads as a raw image of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
}

impl CreateOptions {
    /// True where nothing was said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The name of something that was said and that only qcow2 has.
    pub fn of_qcow2(&self) -> Option<&'static str> {
        let said = [
            (self.cluster_size.is_some(), "cluster_size"),
            (self.compat.is_some(), "compat"),
            (self.refcount_bits.is_some(), "refcount_bits"),
            (self.extended_l2.is_some(), "extended_l2"),
            (self.compression_type.is_some(), "compression_type"),
            (self.lazy_refcounts.is_some(), "lazy_refcounts"),
            (self.data_file.is_some(), "data_file"),
            (self.data_file_raw.is_some(), "data_file_raw"),
        ];
        said.iter().find(|(said, _)| *said).map(|(_, name)| *name)
    }
}

/// Versions of qcow2 by the QEMU that brought them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compat {
    /// Version 2.
    #[serde(rename = "0.10", alias = "v2")]
    V2,
    /// Version 3.
    #[serde(rename = "1.1", alias = "v3")]
    V3,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionType {
    /// Deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// How much of a target's space is taken when it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// Each cluster of a qcow2 has its place; the file has a hole there.
    Metadata,
    /// The file system sets the space aside.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl fmt::Display for Preallocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        })
    }
}
