//! `info`: what an image file is, by its header.
mod kept;

use crate::args::Info;
use crate::failure::Failure;
use crate::image;
use crate::output::say;
use crate::size;
use engine::io::FileStorage;
use formats::backing::BackingName;
use formats::error::{Context, Error, Result};
use formats::probe::Probed;
use formats::qcow2;
use formats::storage::Storage;
use kept::{Bitmap, Snapshot};
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
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<Snapshot>,
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
    lazy_refcounts: bool,
    refcount_bits: u32,
    corrupt: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<Bitmap>,
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
        snapshots: Vec::new(),
        format_specific: None,
    };
    match image::probe_storage(&storage)? {
        Probed::Unknown => Ok(raw),
        Probed::Unsupported(format) => Err(Error::unsupported(format!("a {format} image, which is not supported"))),
        Probed::Qcow2 => with_header(raw, path, &storage),
    }
}

fn with_header(raw: Facts, path: &Path, storage: &FileStorage) -> Result<Facts> {
    let header = qcow2::read_header(storage)?;
    let snapshots = qcow2::snapshots::read(storage, &header)?;
    let bitmaps = qcow2::bitmaps::read(storage, &header)?;
    let info = header.info();
    let data = Qcow2 {
        compat: if info.version == 2 { "0.10" } else { "1.1" },
        compression_type: info.compression.to_string(),
        lazy_refcounts: info.lazy_refcounts,
        refcount_bits: info.refcount_bits,
        corrupt: info.corrupt,
        bitmaps: bitmaps.into_iter().map(Bitmap::from).collect(),
    };
    let backing = info.backing.as_ref();
    // A name that cannot be followed is still a name to show.
    let full = backing.and_then(|backing| BackingName::parse(&backing.name).ok());
    Ok(Facts {
        format: "qcow2",
        virtual_size: info.virtual_size,
        dirty_flag: info.dirty,
        cluster_size: Some(info.cluster_size),
        backing_filename: backing.map(|backing| backing.name.clone()),
        full_backing_filename: full.map(|name| name.resolve(path).display().to_string()),
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        snapshots: snapshots.into_iter().map(Snapshot::from).collect(),
        format_specific: Some(Specific { format: "qcow2", data }),
        ..raw
    })
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
            facts.push(("clusters", size::format(cluster_size)));
            facts.push(("compat", data.compat.into()));
            facts.push(("refcounts", format!("{} bits", data.refcount_bits)));
            facts.push(("compression", data.compression_type.clone()));
            facts.extend(data.marks(self.dirty_flag).map(|mark| ("marked", mark)));
            facts.extend(self.snapshots.iter().map(|one| ("snapshot", one.line())));
            facts.extend(data.bitmaps.iter().map(|one| ("bitmap", one.line())));
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
        ];
        marks.into_iter().filter(|(is_set, _)| *is_set).map(|(_, mark)| mark)
    }
}
