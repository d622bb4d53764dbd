//! `info`: what an image file is, by its header.
mod kept;

use crate::args::{Info, Sharing};
use crate::failure::Failure;
use crate::image;
use crate::output::{say, say_json};
use crate::size;
use engine::control::TargetFormat;
use engine::io::FileStorage;
use engine::io::remote::Remote;
use engine::open::{LAYERS_MAX, identity_at, to_read};
use formats::backing::{BackingName, Location};
use formats::error::{Context, Error, Result};
use formats::probe::Probed;
use formats::qcow2;
use formats::storage::Storage;
use kept::{Bitmap, Snapshot};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// Says what an image is, or each of its chain.
pub fn run(args: &Info) -> std::result::Result<(), Failure> {
    let layers = Location::of_argument(&args.file).and_then(|top| match args.backing_chain {
        true => chain(top, args),
        false => facts(top, None, args).map(|only| vec![only]),
    });
    let layers = layers.map_err(|error| Failure::new(error.one_line()))?;
    match (args.form.json, &layers[..]) {
        (true, [only]) if !args.backing_chain => say_json(only),
        (true, all) => say_json(&all),
        (false, all) => {
            let blocks: Vec<String> = all.iter().map(|facts| facts.lines().join("\n")).collect();
            say(blocks.join("\n\n"))
        }
    }
}

/// What there is to say, by the names that `qemu-img info --output=json` has.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Facts {
    #[serde(skip)]
    location: Location,
    filename: String,
    format: &'static str,
    virtual_size: u64,
    /// Of an export nobody tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_flag: Option<bool>,
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
    children: [Child; 1],
}

/// The node below the format, which is the file itself.
#[derive(Debug, Serialize)]
struct Child {
    name: &'static str,
    info: FileFacts,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct FileFacts {
    filename: String,
    format: &'static str,
    /// The file's length.
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_flag: Option<bool>,
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
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<Bitmap>,
}

/// The facts of each layer, the top first.
fn chain(top: Location, args: &Info) -> Result<Vec<Facts>> {
    let mut seen = vec![identity_at(&top)?];
    let mut layers = vec![facts(top, None, args)?];
    loop {
        let above = &layers[layers.len() - 1];
        let (Some((location, format)), parent) = (above.below()?, above.filename.clone()) else { return Ok(layers) };
        let below =
            facts(location, format.as_deref(), args).and_then(|facts| Ok((identity_at(&facts.location)?, facts)));
        let (identity, below) = below.map_err(|error| error.at(format!("backing of {parent}")))?;
        if seen.contains(&identity) {
            return Err(Error::malformed(format!(
                "{parent}: its backing {} is a layer above it: the chain is a loop",
                below.filename
            )));
        }
        if layers.len() == LAYERS_MAX {
            return Err(Error::unsupported(format!("{parent}: the chain has more than {LAYERS_MAX} layers")));
        }
        seen.push(identity);
        layers.push(below);
    }
}

/// The facts of one image: of `format` where the layer above names it, or by its header.
fn facts(location: Location, format: Option<&str>, args: &Info) -> Result<Facts> {
    let opened = match &location {
        Location::File(path) => open_file(path, format, args.sharing).map_err(|error| error.at(&location))?,
        Location::Nbd(address) => {
            let remote = Remote::open(address, false, args.servers.client_certificates.as_deref())?;
            Opened { storage: remote, format: "nbd", actual_size: None, dirty_flag: None }
        }
    };
    look(&location, opened, format).map_err(|error| error.at(&location))
}

/// What an image is in.
struct Opened {
    storage: Arc<dyn Storage>,
    format: &'static str,
    actual_size: Option<u64>,
    dirty_flag: Option<bool>,
}

fn open_file(path: &Path, format: Option<&str>, sharing: Sharing) -> Result<Opened> {
    let file = image::open(path)?;
    let metadata = file.metadata().context(|| "stat")?;
    let holder = if metadata.is_file() { "file" } else { "host_device" };
    let actual_size = Some(metadata.blocks() * 512);
    let storage = Arc::new(FileStorage::new(file.try_clone().context(|| "open")?));
    let is_raw = format == Some("raw") || image::probe_storage(&*storage)? == Probed::Unknown;
    let format = if is_raw { TargetFormat::Raw } else { TargetFormat::Qcow2 };
    to_read(path, &file, format, sharing.beside())?;
    Ok(Opened { storage, format: holder, actual_size, dirty_flag: Some(false) })
}

fn look(location: &Location, opened: Opened, format: Option<&str>) -> Result<Facts> {
    let Opened { storage, format: holder, actual_size, dirty_flag } = opened;
    let len = storage.len().context(|| "asking for the file's length")?;
    let filename = location.to_string();
    let child = FileFacts { filename: filename.clone(), format: holder, virtual_size: len, actual_size, dirty_flag };
    let raw = Facts {
        location: location.clone(),
        filename,
        format: "raw",
        virtual_size: len,
        actual_size,
        dirty_flag,
        cluster_size: None,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        snapshots: Vec::new(),
        format_specific: None,
        children: [Child { name: "file", info: child }],
    };
    if format == Some("raw") {
        return Ok(raw);
    }
    match image::probe_storage(&*storage)? {
        Probed::Unknown => Ok(raw),
        Probed::Unsupported(format) => Err(Error::unsupported(format!("a {format} image, which is not supported"))),
        Probed::Qcow2 => with_header(raw, &*storage),
    }
}

fn with_header(raw: Facts, storage: &dyn Storage) -> Result<Facts> {
    let header = qcow2::read_header(storage)?;
    let snapshots = qcow2::snapshots::read(storage, &header)?;
    let bitmaps = qcow2::bitmaps::read(storage, &header)?;
    let info = header.info();
    let data = Qcow2 {
        compat: if info.version == 2 { "0.10" } else { "1.1" },
        compression_type: info.compression.to_string(),
        extended_l2: info.extended_l2,
        lazy_refcounts: info.lazy_refcounts,
        refcount_bits: info.refcount_bits,
        data_file: info.data_file.as_ref().map(|data_file| data_file.name.clone()),
        data_file_raw: info.data_file.as_ref().map(|data_file| data_file.raw),
        corrupt: info.corrupt,
        bitmaps: bitmaps.into_iter().map(Bitmap::from).collect(),
    };
    let backing = info.backing.as_ref();
    // A name that cannot be followed is still a name to show.
    let seen = |name: &str| BackingName::parse(name).ok()?.location.seen_from(&raw.location).ok();
    let full = backing.and_then(|backing| seen(&backing.name));
    Ok(Facts {
        format: "qcow2",
        virtual_size: info.virtual_size,
        dirty_flag: Some(info.dirty),
        cluster_size: Some(info.cluster_size),
        backing_filename: backing.map(|backing| backing.name.clone()),
        full_backing_filename: full.map(|location| location.to_string()),
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        snapshots: snapshots.into_iter().map(Snapshot::from).collect(),
        format_specific: Some(Specific { format: "qcow2", data }),
        ..raw
    })
}

impl Facts {
    /// The image below, and its format where that is recorded.
    fn below(&self) -> Result<Option<(Location, Option<String>)>> {
        let Some(name) = &self.backing_filename else { return Ok(None) };
        let name = BackingName::parse(name).map_err(|error| error.at(&self.filename))?;
        let format = self.backing_filename_format.clone().or(name.format.map(str::to_owned));
        let location = name.location.seen_from(&self.location).map_err(|error| error.at(&self.filename))?;
        Ok(Some((location, format)))
    }

    fn lines(&self) -> Vec<String> {
        let mut facts = vec![
            ("image", self.filename.clone()),
            ("format", self.format.to_string()),
            ("size", format!("{} ({} bytes)", size::format(self.virtual_size), self.virtual_size)),
            ("on disk", self.actual_size.map_or_else(|| "not known".into(), size::format)),
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
            facts.extend(data.marks(self.dirty_flag == Some(true)).map(|mark| ("marked", mark)));
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
