//! What a copy request means for its target: checked before the first byte is written.
//!
//! ```text
//! shallow reuse raw
//!    .      .    .   created in the source's format, no backing; the whole chain
//!    .      .    x   created as raw; the whole chain
//!    x      .    .   created in the source's format, on the source's backing; the top layer
//!    .      x    .   there already, its format probed; the whole chain
//!    x      x    .   there already, on its own backing; the top layer
//!    x      x    x   there already, raw, with the backing's contents; the top layer
//!    x      .    x   refused, unless the source is one raw file
//!    .      x    x   there already, raw; the whole chain
//! ```
//!
//! An export of another server is there already, asked for or not, and raw: it is what its server makes of it.
mod chain;
mod creation;
mod data_file;
mod overlay;
mod space;

pub use chain::{ChainPlan, Copied, LowerFile, plan_chain};
pub use overlay::plan_overlay;

use crate::chain::Layer;
use crate::control::creation::Preallocation;
use crate::control::options::Reach;
use crate::control::{Code, MirrorRequest, Mode, Refusal, TargetFormat};
use crate::disk::Disk;
use crate::io::FileStorage;
use crate::io::remote::Remote;
use crate::open::{
    Access, files_of, identity, lasting_name, open_disk, open_export, open_on, probe_format, sync_folder, to_write,
};
use creation::{Creation, SECTOR, Upon};
use formats::backing::Location;
use formats::error::{Context, Error, Result};
use formats::image::Zeroing;
use formats::journal::Journal;
use formats::nbd::{Address, Server, TlsNames};
use formats::qcow2::header::autoclear;
use formats::qcow2::{Header, read_header};
use formats::storage::Storage;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Sizes that a chunk may have, in bytes.
const GRANULARITY_MIN: u64 = 512;
const GRANULARITY_MAX: u64 = 64 << 20;
/// A chunk's size where nobody chose one.
const GRANULARITY: u64 = 64 << 10;
/// More chunks than this, which are 1 TiB of the usual ones, are made longer where nobody names their length: a chunk costs
/// up to three bytes of memory.
const CHUNKS_MAX: u64 = 1 << 24;

/// A request that was found to be possible.
pub struct Plan {
    /// Full name of the target.
    pub path: PathBuf,
    /// Its format.
    pub format: TargetFormat,
    /// Only what the source's top layer holds is copied.
    pub shallow: bool,
    /// The layers that it is made upon, where it does not say by itself what is below it.
    below: Option<Vec<Arc<Layer>>>,
    /// How the target is made, where it has to be.
    creation: Option<Creation>,
    /// What is there.
    found: Found,
    /// The target, where it is an export: reached once, for its server may take nobody twice.
    remote: Option<Arc<Remote>>,
    /// Chunks have 2 to this bytes.
    pub chunk_bits: u32,
    /// What the request was taken to mean, a sentence each.
    pub notes: Vec<String>,
}

/// What was made ready for a job before it begins, for that takes long.
#[derive(Clone, Default)]
pub enum Reached {
    /// Nothing had to be.
    #[default]
    Nothing,
    /// Its target: an export of another server.
    Export(Arc<Remote>),
    /// The layers below its target, copied.
    Lower {
        /// The first of them is right below the target.
        layers: Vec<Arc<Layer>>,
        /// Bytes that were copied.
        bytes: u64,
    },
}

/// A target that is open.
pub struct Target {
    /// The disk.
    pub disk: Disk,
    /// It reads as zeroes.
    pub is_zero: bool,
}

/// Why a guest's writes never wait for a remote target.
pub const NO_BLOCKING: &str = "the guest would wait for another server, also while that is out of reach: a remote \
                               target is written to in the background; leave out the mode";

/// Gives the image of a full path the journal that keeps its mappings through a kill.
pub type Journals<'a> = &'a dyn Fn(&Path) -> Result<Arc<dyn Journal>>;

/// Checks a request against its source; changes nothing. An export of another server is `reached`, or is it now, which
/// waits.
pub fn plan(
    request: &MirrorRequest,
    reached: &Reached,
    source: &Disk,
    reach: &Reach,
) -> std::result::Result<Plan, Refusal> {
    let layers = source.chain().layers();
    let chunk_bits = chunk_bits(request.granularity, source.size())?;
    let address = address(&request.target)?;
    let path = match &address {
        Some(address) => address.to_string().into(),
        None => full_path(Path::new(&request.target))?,
    };
    let mut notes = Vec::new();
    let raw = request.format == Some(TargetFormat::Raw);
    if request.shallow && raw && !request.reuse_external && !(layers.len() == 1 && layers[0].format == "raw") {
        return Err(unsupported(format!(
            "{}: a shallow copy into a new raw file is not possible, for raw has no backing: leave out --shallow, or \
             make a raw volume with the backing's contents first and use --reuse-external",
            path.display()
        )));
    }
    let shallow = request.shallow && layers.len() > 1;
    if request.shallow && !shallow {
        notes.push("the source has no backing, so the shallow copy is a full one".to_owned());
    }
    refuse_own_layers(&path, request.format, layers)?;
    let remote = match (address, reached) {
        (None, _) => None,
        (Some(_), Reached::Export(remote)) => Some(Arc::clone(remote)),
        (Some(address), _) => {
            let remote = Remote::open(&address, true, reach.certificates.as_deref());
            Some(remote.map_err(|error| failed(&error))?)
        }
    };
    let found = if remote.is_some() { Found::Export } else { Found::look(&path)? };
    if request.block_device && found != Found::Device {
        return Err(invalid(format!("{}: the target is not a block device, which was asked for", path.display())));
    }
    let (format, create) = match request.reuse_external || found == Found::Export {
        true => (found.reuse(&path, request.format)?, false),
        false => (found.create(&path, request.format, layers)?, true),
    };
    let header = top_header(source).map_err(|error| failed(&error))?;
    if let Some(header) = &header {
        notes.extend(what_stays(header, format));
    }
    let below = (shallow && create).then(|| match reached {
        Reached::Lower { layers, .. } => layers.clone(),
        _ => layers[1..].to_vec(),
    });
    if request.relative_backing && below.is_none() {
        return Err(invalid(format!(
            "{}: --relative-backing is of a backing name that is written: only a shallow copy into a new qcow2 image \
             has one",
            path.display()
        )));
    }
    let creation = match create {
        true => {
            let upon = below.as_ref().map(|below| Upon { layer: &below[0], relative: request.relative_backing });
            let creation = Creation::plan(&request.options, format, &path, layers, header.as_ref(), upon);
            Some(creation.map_err(|refusal| named(&path, refusal))?)
        }
        false => None,
    };
    let mut plan = Plan { path, format, shallow, below, creation, found, remote, chunk_bits, notes };
    plan.check_options(request)?;
    if plan.creation.is_none() || found == Found::Device {
        plan.check_size(source)?;
    }
    // Of a whole chain it was said already.
    if !matches!(reached, Reached::Lower { .. })
        && let Some(warning) = space::warning(&plan, request, source)
    {
        if !request.dry_run {
            tracing::warn!("{}: {warning}", plan.path.display());
        }
        plan.notes.push(warning);
    }
    Ok(plan)
}

impl Plan {
    /// Makes or opens the target. What was made is removed again where that fails.
    pub fn open(&self, source: &Disk, reach: &Reach, journals: Journals) -> std::result::Result<Target, Refusal> {
        // Whatever is wrong with it by then is not of our making.
        let file = self.creation.is_some().then(|| self.take_file()).transpose().map_err(|error| failed(&error))?;
        self.try_open(file, source, reach, journals).map_err(|error| {
            self.unmake();
            failed(&error)
        })
    }

    /// Looks whether a target that is there can be opened, with what is below it. Changes nothing.
    pub fn rehearse(&self, reach: &Reach) -> std::result::Result<(), Refusal> {
        if self.creation.is_some() || self.remote.is_some() {
            return Ok(());
        }
        open_disk(&self.path, Some(self.format), Access::read_only(reach)).map(drop).map_err(|error| failed(&error))
    }

    /// Leaves what was there before the target was made: nothing, an empty file, or a device.
    pub fn unmake(&self) {
        self.found.leave(&self.path);
        self.creation.as_ref().and_then(|creation| creation.data_file.as_ref()).inspect(|data_file| data_file.unmake());
    }

    /// Has what is copied compressed, in chunks of whole clusters.
    pub fn compress(&mut self) -> std::result::Result<(), Refusal> {
        let refuse = |why: &str| Err(invalid(format!("{}: --compress: {why}", self.path.display())));
        let cluster_bits = match &self.creation {
            None => return refuse("the target is there already, and may have clusters that are not"),
            Some(creation) => match creation.compressible() {
                Ok(cluster_bits) => cluster_bits,
                Err(why) => return refuse(why),
            },
        };
        self.chunk_bits = self.chunk_bits.max(cluster_bits);
        Ok(())
    }

    /// Refuses a target that a guest's disk could not live on.
    pub fn refuse_following(&self, request: &MirrorRequest) -> std::result::Result<(), Refusal> {
        let Some(remote) = &self.remote else { return Ok(()) };
        if request.mode == Mode::WriteBlocking {
            return Err(unsupported(format!("{}: {NO_BLOCKING}", self.path.display())));
        }
        remote.refuse_following().map_err(|error| unsupported(error.one_line()))
    }

    /// How zeroes of the source are brought over: space that was taken in advance is kept, and all where that was asked
    /// for.
    pub fn zeroing(&self, request: &MirrorRequest) -> Zeroing {
        let sparse = self.creation.as_ref().is_none_or(Creation::is_sparse);
        if sparse && request.unmap { Zeroing::Unmap } else { Zeroing::Keep }
    }

    fn try_open(&self, file: Option<fs::File>, source: &Disk, reach: &Reach, journals: Journals) -> Result<Target> {
        if let (Some(creation), Some(file)) = (&self.creation, file) {
            self.make(creation, file)?;
        }
        if let Some(remote) = &self.remote {
            // Shallow, what is below it has to stay.
            let is_zero = !self.shallow && remote.is_zero().context(|| self.path.display().to_string())?;
            let access = Access { size: Some(source.size()), ..Access::writable(reach) };
            return Ok(Target { disk: open_export(Arc::clone(remote), access)?, is_zero });
        }
        let path = lasting_name(&self.path).context(|| self.path.display().to_string())?;
        let access = Access {
            journal: Some(journals(&path)?),
            size: (self.format == TargetFormat::Raw).then_some(source.size()),
            ..Access::writable(reach)
        };
        let create = self.creation.is_some();
        let disk = match &self.below {
            Some(below) => open_on(&self.path, self.format, access, below)?,
            None => open_disk(&self.path, Some(self.format), access)?,
        };
        // A block device keeps what was on it.
        let is_zero = create && fs::metadata(&self.path).is_ok_and(|metadata| metadata.is_file());
        Ok(Target { disk, is_zero: is_zero || self.format == TargetFormat::Qcow2 && create })
    }

    /// The file in which the target is made, and nobody else in it.
    fn take_file(&self) -> Result<fs::File> {
        let named = |what: &str| format!("{}: {what}", self.path.display());
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(&self.path);
        let file = file.context(|| named("create"))?;
        to_write(&self.path, &file, self.format).map_err(|error| error.at(self.path.display()))?;
        Ok(file)
    }

    fn make(&self, creation: &Creation, file: fs::File) -> Result<()> {
        let named = |what: &str| format!("{}: {what}", self.path.display());
        let is_file = file.metadata().context(|| named("stat"))?.is_file();
        if let (true, Some(folder)) = (is_file, self.path.parent()) {
            // The record will name it.
            sync_folder(folder)?;
        }
        creation.make(file, is_file).map_err(|error| error.at(named("create")))
    }

    /// Options are of what is made, and a device has its space already.
    fn check_options(&self, request: &MirrorRequest) -> std::result::Result<(), Refusal> {
        let path = self.path.display();
        if self.creation.is_none() && !request.options.is_empty() {
            return Err(invalid(format!(
                "{path}: options are of a target that is made, and this one is there already"
            )));
        }
        match request.options.preallocation {
            Some(what) if what != Preallocation::Off && self.found == Found::Device => Err(invalid(format!(
                "{path}: preallocation={what}: a block device has its space already: leave it out"
            ))),
            _ => Ok(()),
        }
    }

    /// Smaller is refused; a larger raw target keeps the source's size; qcow2 has to be equal.
    fn check_size(&self, source: &Disk) -> std::result::Result<(), Refusal> {
        if self.creation.is_some() && self.format == TargetFormat::Qcow2 {
            return Ok(());
        }
        let found = match &self.remote {
            Some(remote) => remote.size(),
            None => virtual_size(&self.path, self.format).map_err(|error| failed(&error))?,
        };
        let wanted = source.size();
        let fits = match self.format {
            TargetFormat::Raw => found >= wanted,
            TargetFormat::Qcow2 => found == wanted.next_multiple_of(SECTOR) || found == wanted,
        };
        if fits {
            return Ok(());
        }
        let (how, remedy) = match self.format {
            TargetFormat::Raw => ("at least", "make it larger"),
            TargetFormat::Qcow2 => ("exactly", "make one of the source's size"),
        };
        Err(unsupported(format!(
            "{}: the target has {found} bytes, the source {wanted}: it has to have {how} as many; {remedy}",
            self.path.display()
        )))
    }
}

/// The header of the source's top layer, where that is a qcow2 image.
fn top_header(source: &Disk) -> Result<Option<Header>> {
    let top = source.chain().top();
    // What an export has inside is told by its server alone.
    if top.format != "qcow2" || top.file.file().as_remote().is_some() {
        return Ok(None);
    }
    let file = fs::File::open(&top.path).context(|| format!("{}: open", top.path.display()))?;
    read_header(&FileStorage::new(file)).map(Some).map_err(|error| error.at(top.path.display()))
}

/// What the source keeps beside its contents, and what becomes of that.
fn what_stays(header: &Header, target: TargetFormat) -> Vec<String> {
    let mut notes = Vec::new();
    if header.snapshots > 0 {
        let count = header.snapshots;
        notes.push(format!("the source's internal snapshots ({count}) stay with it: the target gets none"));
    }
    if let Some(bitmaps) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) {
        let what = format!("the source's persistent bitmaps ({})", bitmaps.count);
        notes.push(match target {
            TargetFormat::Raw => format!("{what} are dropped at a pivot: raw has no place for them"),
            TargetFormat::Qcow2 => format!("{what} go on in the target after a pivot, where they are consistent"),
        });
    }
    notes
}

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Empty,
    File,
    Device,
    /// Another server's export.
    Export,
}

impl Found {
    fn look(path: &Path) -> std::result::Result<Self, Refusal> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let folder = path.parent().unwrap_or(path);
                return match fs::metadata(folder) {
                    Ok(_) => Ok(Self::Nothing),
                    Err(error) => Err(failed(&Error::io(format!("{}: the target's folder", folder.display()), error))),
                };
            }
            Err(error) => return Err(failed(&Error::io(path.display().to_string(), error))),
        };
        match metadata.file_type() {
            kind if kind.is_block_device() => Ok(Self::Device),
            kind if kind.is_file() && metadata.len() == 0 => Ok(Self::Empty),
            kind if kind.is_file() => Ok(Self::File),
            _ => Err(invalid(format!("{}: the target is neither a regular file nor a block device", path.display()))),
        }
    }

    /// Leaves what was found, after something else was made there.
    fn leave(self, path: &Path) {
        // Whoever removed it already wanted the same.
        let _ = match self {
            Self::Nothing => fs::remove_file(path),
            Self::Empty => fs::File::options().write(true).truncate(true).open(path).map(drop),
            Self::File | Self::Device | Self::Export => Ok(()),
        };
    }

    /// The format of a target that has to be there.
    fn reuse(self, path: &Path, named: Option<TargetFormat>) -> std::result::Result<TargetFormat, Refusal> {
        match (self, named) {
            (Self::Export, Some(TargetFormat::Qcow2)) => Err(unsupported(format!(
                "{}: an export is written as a raw disk only: let its server keep the image (qemu-nbd -f qcow2), and \
                 leave out the format",
                path.display()
            ))),
            // It is a disk as it is, whatever its first bytes say.
            (Self::Export, _) => Ok(TargetFormat::Raw),
            (Self::Nothing, _) => Err(Refusal {
                code: Code::OperationFailed,
                message: format!(
                    "{}: the target is not there: make it first, or leave out --reuse-external",
                    path.display()
                ),
            }),
            (_, Some(format)) => Ok(format),
            (_, None) => probe_format(path).map_err(|error| {
                unsupported(format!("{}; name the target's format with --format or --raw", error.one_line()))
            }),
        }
    }

    /// The format of a target that is to be made.
    fn create(
        self,
        path: &Path,
        named: Option<TargetFormat>,
        layers: &[Arc<Layer>],
    ) -> std::result::Result<TargetFormat, Refusal> {
        match self {
            Self::File => Err(unsupported(format!(
                "{}: the target is there already and not empty: remove it, or use it with --reuse-external",
                path.display()
            ))),
            Self::Device if named.is_none() => Err(invalid(format!(
                "{}: a block device is taken only with its format named: use --raw or --format",
                path.display()
            ))),
            Self::Nothing | Self::Empty | Self::Device | Self::Export => {
                let like_source = if layers[0].format == "raw" { TargetFormat::Raw } else { TargetFormat::Qcow2 };
                Ok(named.unwrap_or(like_source))
            }
        }
    }
}

/// The same refusal, of the target at `path`.
fn named(path: &Path, refusal: Refusal) -> Refusal {
    Refusal { message: format!("{}: {}", path.display(), refusal.message), ..refusal }
}

fn chunk_bits(granularity: u64, size: u64) -> std::result::Result<u32, Refusal> {
    let usual = || GRANULARITY.max(size.div_ceil(CHUNKS_MAX).next_power_of_two().min(GRANULARITY_MAX));
    let granularity = if granularity == 0 { usual() } else { granularity };
    let in_range = (GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity);
    match granularity.is_power_of_two() && in_range {
        true => Ok(granularity.trailing_zeros()),
        false => Err(invalid(format!(
            "a granularity of {granularity} bytes: it has to be a power of two from {GRANULARITY_MIN} to \
             {GRANULARITY_MAX}"
        ))),
    }
}

/// The address that a target is named by, if it is one.
fn address(target: &str) -> std::result::Result<Option<Address>, Refusal> {
    let location = Location::of_argument(Path::new(target)).map_err(|error| invalid(error.one_line()))?;
    match location {
        Location::File(_) => Ok(None),
        Location::Nbd(Address { server: Server::Unix { path }, .. }) if !path.starts_with('/') => {
            Err(invalid(format!("{target}: name the socket by its full path")))
        }
        Location::Nbd(Address { tls: Some(TlsNames { certificates: Some(folder), .. }), .. })
            if !folder.starts_with('/') =>
        {
            Err(invalid(format!("{target}: name the folder of certificates by its full path")))
        }
        Location::Nbd(address) => Ok(Some(address)),
    }
}

fn full_path(path: &Path) -> std::result::Result<PathBuf, Refusal> {
    match path.is_absolute() {
        true => Ok(path.to_owned()),
        false => Err(invalid(format!("{}: name the target by its full path", path.display()))),
    }
}

/// A target that is a layer of the source, by any name, would be read and written at once; so would one
/// whose data file is.
fn refuse_own_layers(
    path: &Path,
    format: Option<TargetFormat>,
    layers: &[Arc<Layer>],
) -> std::result::Result<(), Refusal> {
    let files = files_of(path, format);
    let targets: Vec<_> = files.iter().filter_map(|file| identity(file).ok()).collect();
    let is_target = |path: &&Path| identity(path).is_ok_and(|layer| targets.contains(&layer));
    match layers.iter().flat_map(|layer| layer.paths()).find(is_target) {
        None => Ok(()),
        Some(layer) => Err(invalid(format!(
            "{}: the target, or its data file, is a layer of the source ({}): name another file",
            path.display(),
            layer.display()
        ))),
    }
}

fn virtual_size(path: &Path, format: TargetFormat) -> Result<u64> {
    let file = fs::File::open(path).context(|| format!("{}: open", path.display()))?;
    let storage = FileStorage::new(file);
    match format {
        TargetFormat::Raw => storage.len().context(|| format!("{}: length", path.display())),
        TargetFormat::Qcow2 => {
            read_header(&storage).map(|header| header.geometry.size).map_err(|error| error.at(path.display()))
        }
    }
}

fn invalid(message: String) -> Refusal {
    Refusal { code: Code::InvalidArg, message }
}

fn unsupported(message: String) -> Refusal {
    Refusal { code: Code::ConfigUnsupported, message }
}

/// Tried, and failed.
fn failed(error: &Error) -> Refusal {
    Refusal { code: Code::OperationFailed, message: error.one_line() }
}
