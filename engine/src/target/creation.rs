//! How a target is made: as it was asked for, and where nothing was said, like the source's top layer.
use super::data_file::NewDataFile;
use crate::chain::Layer;
use crate::control::creation::{Compat, CompressionType, CreateOptions, Preallocation};
use crate::control::{Code, Refusal, TargetFormat};
use crate::io::FileStorage;
use crate::open::export_named;
use formats::error::{Context, Error, Result};
use formats::qcow2::header::compatible;
use formats::qcow2::{Backing, Compression, Create, DataFile, Geometry, Header, create};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Virtual sizes are whole sectors of so many bytes.
pub(super) const SECTOR: u64 = 512;

/// Everything that decides what a new target is.
#[derive(Debug)]
pub(super) struct Creation {
    pub size: u64,
    pub format: Format,
    pub preallocation: Preallocation,
    /// Where the payload goes, if it is another file.
    pub data_file: Option<NewDataFile>,
}

/// A new target's format, and what there is to say of it.
#[derive(Debug)]
pub(super) enum Format {
    Raw,
    Qcow2(Create),
}

/// What a new image is to be on.
#[derive(Clone, Copy)]
pub(super) struct Upon<'a> {
    pub layer: &'a Layer,
    /// Named by the way from the image's folder.
    pub relative: bool,
}

impl Creation {
    /// What is to be made of `options` for a source of `layers`, whose top has `header`. Changes nothing.
    pub fn plan(
        options: &CreateOptions,
        format: TargetFormat,
        path: &Path,
        layers: &[Arc<Layer>],
        header: Option<&Header>,
        upon: Option<Upon<'_>>,
    ) -> std::result::Result<Self, Refusal> {
        let size = layers[0].image.size().next_multiple_of(SECTOR);
        let preallocation = options.preallocation.unwrap_or_default();
        let format = match format {
            TargetFormat::Raw => refuse_for_raw(options).map(|()| Format::Raw)?,
            TargetFormat::Qcow2 => {
                let mut create = like(header, size);
                apply(options, &mut create)?;
                create.preallocated = preallocation != Preallocation::Off;
                create.backing = upon.map(|upon| upon.backing(path)).transpose()?;
                // What cannot be made is refused before a file is.
                create.check().map_err(|error| invalid(error.one_line()))?;
                Format::Qcow2(create)
            }
        };
        let data_file = match &format {
            Format::Qcow2(Create { data_file: Some(named), .. }) => Some(NewDataFile::plan(named, path, layers)?),
            _ => None,
        };
        Ok(Self { size, format, preallocation, data_file })
    }

    /// The logarithm of a cluster's length, where clusters can be compressed; else why not.
    pub fn compressible(&self) -> std::result::Result<u32, &'static str> {
        match &self.format {
            Format::Raw => Err("a raw target has no compressed clusters: take --format qcow2"),
            Format::Qcow2(_) if self.data_file.is_some() => {
                Err("an external data file has no compressed clusters: leave data_file out")
            }
            Format::Qcow2(_) if !self.is_sparse() => {
                Err("space that is preallocated is of clusters that are not compressed: leave preallocation out")
            }
            Format::Qcow2(create) => Ok(create.cluster_bits),
        }
    }

    /// True where the target has no space yet beside its tables.
    pub fn is_sparse(&self) -> bool {
        self.preallocation == Preallocation::Off
    }

    /// Makes it in `file`, whose length is 0 if it is a regular one.
    pub fn make(&self, file: fs::File, is_file: bool) -> Result<()> {
        let mut storage = FileStorage::new(file);
        let mut payload = match &self.format {
            Format::Raw if is_file => {
                storage.set_len(self.size).context(|| "setting its length")?;
                ByteRange { start: 0, end: self.size }
            }
            Format::Raw => ByteRange::default(),
            Format::Qcow2(options) => create(&storage, options)?,
        };
        if let Some(data_file) = &self.data_file {
            // As long as no table changes the payload alone is flushed, and the header has to be there all the same.
            storage.flush().context(|| "flush")?;
            storage = data_file.make(self.size)?;
            payload = ByteRange { start: 0, end: self.size };
        }
        let failed = |what: &str| format!("preallocation={}: {what} of {} bytes", self.preallocation, payload.len());
        match self.preallocation {
            _ if payload.is_empty() => Ok(()),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => storage.allocate(payload.start, payload.len()).context(|| failed("allocation")),
            Preallocation::Full => write_zeroes(&storage, payload).context(|| failed("writing zeroes")),
        }
    }
}

/// What a copy inherits of the header of its source's top layer.
fn like(header: Option<&Header>, size: u64) -> Create {
    let create = Create::new(size);
    let Some(header) = header else { return create };
    let Geometry { version, cluster_bits, refcount_order, .. } = header.geometry;
    Create {
        version,
        cluster_bits,
        refcount_order,
        // A copy of few subclusters must not become one of whole clusters.
        extended_l2: header.geometry.extended_l2,
        lazy_refcounts: header.compatible & compatible::LAZY_REFCOUNTS != 0,
        compression: header.compression,
        ..create
    }
}

/// Lays what was said over what was inherited.
fn apply(options: &CreateOptions, create: &mut Create) -> std::result::Result<(), Refusal> {
    if let Some(compat) = options.compat {
        create.version = if compat == Compat::V2 { 2 } else { 3 };
    }
    if create.version == 2 {
        // What version 2 has not can be inherited no more.
        *create = Create {
            refcount_order: 4,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            extended_l2: false,
            ..create.clone()
        };
    }
    if let Some(size) = options.cluster_size {
        create.cluster_bits = power("cluster_size", size, 512, 2 << 20)?;
    }
    if let Some(bits) = options.refcount_bits {
        create.refcount_order = power("refcount_bits", bits, 1, 64)?;
    }
    if let Some(lazy) = options.lazy_refcounts {
        create.lazy_refcounts = lazy;
    }
    if let Some(extended) = options.extended_l2 {
        create.extended_l2 = extended;
    }
    create.data_file = match (&options.data_file, options.data_file_raw.unwrap_or_default()) {
        (Some(name), raw) => Some(DataFile { name: name.clone(), raw }),
        (None, true) => return Err(invalid("data_file_raw=on: only together with data_file".into())),
        (None, false) => None,
    };
    if let Some(kind) = options.compression_type {
        create.compression = if kind == CompressionType::Zlib { Compression::Zlib } else { Compression::Zstd };
    }
    Ok(())
}

/// The logarithm of an option's value.
fn power(name: &str, value: u64, min: u64, max: u64) -> std::result::Result<u32, Refusal> {
    match value.is_power_of_two() && (min..=max).contains(&value) {
        true => Ok(value.trailing_zeros()),
        false => Err(invalid(format!("{name}={value}: it has to be a power of two from {min} to {max}"))),
    }
}

fn refuse_for_raw(options: &CreateOptions) -> std::result::Result<(), Refusal> {
    if let Some(name) = options.of_qcow2() {
        return Err(invalid(format!("{name}: a raw target has no such option: only qcow2 has")));
    }
    match options.preallocation {
        Some(Preallocation::Metadata) => {
            Err(invalid("preallocation=metadata: a raw target has no metadata: expected off, falloc or full".into()))
        }
        _ => Ok(()),
    }
}

impl Upon<'_> {
    /// How an image at `path` names it.
    fn backing(&self, path: &Path) -> std::result::Result<Backing, Refusal> {
        let Self { layer, relative } = *self;
        let name = match relative {
            true => relative_to(path, &layer.path)?,
            false => layer.path.clone(),
        };
        let unnamed = || Error::unsupported(format!("{}: a backing's name has to be UTF-8", layer.path.display()));
        let name = name.to_str().ok_or_else(unnamed)?;
        Ok(Backing { name: name.to_owned(), format: Some(layer.format.to_owned()) })
    }
}

/// The way from the folder of `image` to the file at `backing`.
fn relative_to(image: &Path, backing: &Path) -> std::result::Result<PathBuf, Refusal> {
    if export_named(backing).is_some() {
        let address = backing.display();
        return Err(invalid(format!("--relative-backing: the backing is at an address ({address}), not in a folder")));
    }
    let folder = image.parent().unwrap_or(Path::new("/"));
    let folder = folder.canonicalize().context(|| folder.display().to_string())?;
    let backing = backing.canonicalize().context(|| backing.display().to_string())?;
    let shared = folder.components().zip(backing.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(shared).map(|_| Component::ParentDir);
    Ok(up.chain(backing.components().skip(shared)).collect())
}

fn write_zeroes(storage: &FileStorage, range: ByteRange) -> std::io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let piece = (range.end - at).min(zeroes.len() as u64);
        storage.write_at(at, &zeroes[..piece as usize])?;
        at += piece;
    }
    Ok(())
}

fn invalid(message: String) -> Refusal {
    Refusal::new(Code::InvalidArg, message)
}
