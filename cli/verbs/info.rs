//! `info`: what an image file is, by its header.
use crate::args::Info;
use crate::failure::Failure;
use crate::image;
use crate::output::say;
use crate::size;
use engine::io::FileStorage;
use formats::backing::{BackingName, Location};
use formats::error::{Context, Error, Result};
use formats::probe::Probed;
use formats::qcow2;
use formats::storage::Storage;
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Says what an image is.
pub fn run(args: &Info) -> std::result::Result<(), Failure> {
    let facts = facts(&args.file).map_err(|error| Failure::new(error.at(args.file.display()).one_line()))?;
    if args.json {
        return say(serde_json::to_string_pretty(&facts).map_err(|error| Failure::new(error.to_string()))?);
    }
    facts.lines().iter().try_for_each(say)
}

/// What there is to say, by the names that `qemu-img info --output=json` has.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Facts {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    actual_size: u64,
    dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific>,
}

#[derive(Debug, Serialize)]
struct Specific {
    #[serde(rename = "type")]
    format: &'static str,
    data: Qcow2,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2 {
    compat: &'static str,
    compression_type: String,
    extended_l2: bool,
    lazy_refcounts: bool,
    refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    corrupt: bool,
    /// Internal snapshots and persistent bitmaps, which qemu-img lists one by one.
    snapshot_count: u32,
    bitmap_count: u32,
}

fn facts(path: &Path) -> Result<Facts> {
    let file = image::open(path)?;
    let actual_size = file.metadata().context(|| "stat")?.blocks() * 512;
    let storage = FileStorage::new(file);
    let len = storage.len().context(|| "asking for the file's length")?;
    let raw = Facts {
        filename: path.display().to_string(),
        format: "raw",
        virtual_size: len,
        actual_size,
        dirty_flag: false,
        cluster_size: None,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        format_specific: None,
    };
    match image::probe_storage(&storage)? {
        Probed::Unknown => Ok(raw),
        Probed::Unsupported(format) => Err(Error::unsupported(format!("a {format} image, which is not supported"))),
        Probed::Qcow2 => Ok(with_header(raw, path, qcow2::read_header(&storage)?.info())),
    }
}

fn with_header(raw: Facts, path: &Path, info: qcow2::Info) -> Facts {
    let data = Qcow2 {
        compat: if info.version == 2 { "0.10" } else { "1.1" },
        compression_type: info.compression.to_string(),
        extended_l2: info.extended_l2,
        lazy_refcounts: info.lazy_refcounts,
        refcount_bits: info.refcount_bits,
        data_file: info.data_file.as_ref().map(|data_file| data_file.name.clone()),
        data_file_raw: info.data_file.as_ref().map(|data_file| data_file.raw),
        corrupt: info.corrupt,
        snapshot_count: info.snapshots,
        bitmap_count: info.bitmaps,
    };
    let backing = info.backing.as_ref();
    // A name that cannot be followed is still a name to show.
    let parent = Location::File(path.to_owned());
    let full = backing.and_then(|backing| BackingName::parse(&backing.name).ok()?.location.seen_from(&parent).ok());
    Facts {
        format: "qcow2",
        virtual_size: info.virtual_size,
        dirty_flag: info.dirty,
        cluster_size: Some(info.cluster_size),
        backing_filename: backing.map(|backing| backing.name.clone()),
        full_backing_filename: full.map(|location| location.to_string()),
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        format_specific: Some(Specific { format: "qcow2", data }),
        ..raw
    }
}

impl Facts {
    fn lines(&self) -> Vec<String> {
        let mut facts = vec![
            ("image", self.filename.clone()),
            ("format", self.format.to_string()),
            ("size", format!("{} ({} bytes)", size::format(self.virtual_size), self.virtual_size)),
            ("on disk", size::format(self.actual_size)),
        ];
        if self.format == "raw" {
            facts[1].1 = "raw, or one without a known header".into();
        }
        if let Some(name) = &self.backing_filename {
            let format = self.backing_filename_format.as_deref().unwrap_or("format not recorded");
            facts.push(("backing", format!("{name} ({format})")));
        }
        if let (Some(cluster_size), Some(Specific { data, .. })) = (self.cluster_size, &self.format_specific) {
            if let Some(name) = &data.data_file {
                let raw = if data.data_file_raw == Some(true) { " (raw)" } else { "" };
                facts.push(("data file", format!("{name}{raw}")));
            }
            let extended = if data.extended_l2 { ", with subclusters" } else { "" };
            facts.push(("clusters", format!("{}{extended}", size::format(cluster_size))));
            facts.push(("compat", data.compat.into()));
            facts.push(("refcounts", format!("{} bits", data.refcount_bits)));
            facts.push(("compression", data.compression_type.clone()));
            facts.extend(data.marks(self.dirty_flag).map(|mark| ("marked", mark)));
        }
        facts.into_iter().map(|(name, fact)| format!("{name:<11} {fact}")).collect()
    }
}

impl Qcow2 {
    /// What is out of the ordinary.
    fn marks(&self, dirty: bool) -> impl Iterator<Item = String> {
        let marks = [
            (dirty, "dirty".to_string()),
            (self.corrupt, "corrupt".to_string()),
            (self.lazy_refcounts, "lazy refcounts".to_string()),
            (self.snapshot_count > 0, format!("{} internal snapshots", self.snapshot_count)),
            (self.bitmap_count > 0, format!("{} persistent bitmaps", self.bitmap_count)),
        ];
        marks.into_iter().filter(|(is_set, _)| *is_set).map(|(_, mark)| mark)
    }
}
