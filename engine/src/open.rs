//! Opens images by their paths and puts the layers of a chain together.
//!
//! Raw is never guessed: a guest can write another format's header into a raw disk, and would choose
//! by that which of the host's files it reads. A file with no known magic number, and no format named
//! for it, is an error that says how to name it.
mod held;

pub use held::{alone, to_read, to_write};

use crate::chain::{Apart, Chain, Layer};
use crate::control::TargetFormat;
use crate::control::options::{Beside, Cache, Reach};
use crate::disk::{DataFile, Disk};
use crate::io::lock::{Hold, sign_of_life};
use crate::io::remote::Remote;
use crate::io::{File, FileStorage, PAGE, cached_bytes, is_in_memory};
use formats::backing::{BackingName, Location};
use formats::error::{Context, Error, Result};
use formats::image::Image;
use formats::journal::{Change, Forgetful, Journal};
use formats::nbd::Address;
use formats::probe::{Probed, probe};
use formats::qcow2::{Backing, Open, Qcow2, Repair, read_header, repair};
use formats::raw::Raw;
use formats::storage::Storage;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Layers that a chain may have.
pub const LAYERS_MAX: usize = 200;
/// Memory for one image's tables, in bytes.
const METADATA_MAX: usize = 16 << 20;
/// How much of a file is looked at for a magic number, in bytes.
const PROBE_LEN: u64 = 4096;

/// How an image is to be opened.
#[derive(Clone)]
pub struct Access {
    /// Its top layer is written to.
    pub writable: bool,
    /// How it is reached, and what is below it.
    pub reach: Reach,
    /// Who keeps the top layer's new mappings through a kill; nobody where nothing is promised.
    pub journal: Option<Arc<dyn Journal>>,
    /// The disk's size where a raw image's file may be longer.
    pub size: Option<u64>,
}

impl Access {
    /// For looking at.
    pub fn read_only(reach: &Reach) -> Self {
        Self { writable: false, reach: reach.clone(), journal: None, size: None }
    }

    /// For writing what can be written again.
    pub fn writable(reach: &Reach) -> Self {
        Self { writable: true, ..Self::read_only(reach) }
    }
}

/// Opens the chain whose top is at `path`, which may be an NBD address.
pub fn open_disk(path: &Path, format: Option<TargetFormat>, access: Access) -> Result<Disk> {
    open_disk_at(&Location::of_argument(path)?, format, access)
}

/// Opens the raw disk that an export is.
pub fn open_export(remote: Arc<Remote>, access: Access) -> Result<Disk> {
    let named = remote.address().clone();
    let opened = Opened::from_export(remote, Some(TargetFormat::Raw), &access).map_err(|error| error.at(named))?;
    Ok(Disk::new(Chain::new(vec![Arc::new(opened.layer)]), !access.writable))
}

/// The export that a target or a truth is, where its name is an NBD address.
pub fn export_named(path: &Path) -> Option<Address> {
    match Location::of_argument(path) {
        Ok(Location::Nbd(address)) => Some(address),
        Ok(Location::File(_)) | Err(_) => None,
    }
}

/// True where two full names are one image's: an export is the same, however it is reached.
pub fn same_image(one: &Path, other: &Path) -> bool {
    match (export_named(one), export_named(other)) {
        (Some(one), Some(other)) => one.place() == other.place(),
        _ => one == other,
    }
}

/// Opens the chain whose top is at `location`.
pub fn open_disk_at(location: &Location, format: Option<TargetFormat>, access: Access) -> Result<Disk> {
    let read_only = !access.writable;
    Ok(Disk::new(open_chain(location, format, access)?, read_only))
}

/// Opens the chain whose top is at `location`: the top as `access` says, the rest for reading.
pub fn open_chain(location: &Location, format: Option<TargetFormat>, access: Access) -> Result<Chain> {
    let top = Opened::at(location, format, &access)?;
    let mut seen: Vec<Identity> = std::iter::once(top.identity).chain(top.data_identity).collect();
    let mut below = top.below;
    let mut layers = vec![Arc::new(top.layer)];
    while let Some((location, format)) = below {
        let parent = layers.last().map(|layer| layer.path.display().to_string()).unwrap_or_default();
        if layers.len() == LAYERS_MAX {
            return Err(Error::unsupported(format!(
                "{parent}: the chain has more than {LAYERS_MAX} layers: commit or convert some"
            )));
        }
        refuse_again(&location, format, &parent, &seen)?;
        let opened = Opened::at(&location, format, &Access::read_only(&access.reach));
        let opened = opened.map_err(|error| error.at(format!("backing of {parent}")))?;
        seen.extend(std::iter::once(opened.identity).chain(opened.data_identity));
        layers.push(Arc::new(opened.layer));
        below = opened.below;
    }
    Ok(Chain::new(layers))
}

/// Refuses a layer in files of those above it, which our own locks would keep us off.
fn refuse_again(location: &Location, format: Option<TargetFormat>, parent: &str, seen: &[Identity]) -> Result<()> {
    let own = |identity: Result<Identity>| identity.is_ok_and(|identity| seen.contains(&identity));
    if own(identity_at(location)) {
        return Err(Error::malformed(format!(
            "{parent}: its backing {location} is a layer above it: the chain is a loop"
        )));
    }
    match location {
        Location::File(path) if files_of(path, format).iter().skip(1).any(|data| own(identity(data))) => {
            Err(Error::malformed(format!(
                "{parent}: its backing {location} has a file of a layer above it for its data file"
            )))
        }
        _ => Ok(()),
    }
}

/// Opens an image alone, on the layers that are below it already.
pub fn open_on(path: &Path, format: TargetFormat, access: Access, below: &[Arc<Layer>]) -> Result<Disk> {
    let read_only = !access.writable;
    let top = Opened::new(path, Some(format), &access)?;
    let layers = std::iter::once(Arc::new(top.layer)).chain(below.iter().cloned());
    Ok(Disk::new(Chain::new(layers.collect()), read_only))
}

/// The file of a qcow2 image whose tables are looked at, or mended.
pub fn open_tables(path: &Path, writable: bool, beside: Beside) -> Result<FileStorage> {
    let file = open_file(path, writable)?.buffered;
    let held = match writable {
        true => to_write(path, &file, TargetFormat::Qcow2).map(drop),
        false => to_read(path, &file, TargetFormat::Qcow2, beside),
    };
    held.map_err(|error| error.at(path.display()))?;
    Ok(FileStorage::new(file))
}

/// Brings into an image what its journal kept through a kill, for good.
pub fn recover(path: &Path, format: TargetFormat, changes: &[Change]) -> Result<()> {
    let access = Access::writable(&Reach { cache: Cache::Writeback, ..Reach::default() });
    let top = Opened::new(path, Some(format), &access)?;
    let brought = top.layer.image.replay(changes).and_then(|()| top.layer.settle_now());
    brought.map_err(|error| error.at(path.display()))
}

/// What tells one place of an image from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Identity {
    /// A file, whatever its name: device and inode, or the device that it is.
    File(u64, u64),
    /// An export, by its address without what is said of TLS: nobody knows whether two of them lead to one server.
    Export(String),
}

/// The identity of the file at `path`, or of the export that it names.
pub fn identity(path: &Path) -> Result<Identity> {
    identity_at(&export_named(path).map_or_else(|| Location::File(path.to_owned()), Location::Nbd))
}

/// The identity of what is at `location`.
pub fn identity_at(location: &Location) -> Result<Identity> {
    match location {
        Location::Nbd(address) => Ok(Identity::Export(address.place())),
        Location::File(path) => {
            let metadata = fs::metadata(path).context(|| format!("{}: stat", path.display()))?;
            Ok(identity_of(&metadata))
        }
    }
}

fn identity_of(metadata: &fs::Metadata) -> Identity {
    match metadata.file_type().is_block_device() {
        true => Identity::File(u64::MAX, metadata.rdev()),
        false => Identity::File(metadata.dev(), metadata.ino()),
    }
}

/// The full name by which a file is found again: its real one. A block device keeps the name that it
/// was given, for what a link like `/dev/vg/disk` leads to (`/dev/dm-3`) may be another device after a
/// reboot. A file that is not there has its folder's real name and its own. An export has its address.
pub fn lasting_name(path: &Path) -> std::io::Result<PathBuf> {
    if let Some(address) = export_named(path) {
        return Ok(address.to_string().into());
    }
    match fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => std::path::absolute(path),
        Ok(_) => path.canonicalize(),
        Err(error) => {
            let absent = error.kind() == std::io::ErrorKind::NotFound;
            let full = std::path::absolute(path)?;
            match (full.parent(), full.file_name()) {
                (Some(folder), Some(name)) if absent => Ok(folder.canonicalize()?.join(name)),
                _ => Err(error),
            }
        }
    }
}

/// Refuses to rely on an open file that its name does not lead to any more: the next start would not find it.
pub fn refuse_lost(path: &Path, file: &File) -> Result<()> {
    let Some(fd) = file.as_fd() else { return Ok(()) };
    let named = || format!("{}: stat", path.display());
    let open = fd.try_clone_to_owned().map(fs::File::from).and_then(|file| file.metadata());
    if identity(path).is_ok_and(|found| open.as_ref().is_ok_and(|open| identity_of(open) == found)) {
        return Ok(());
    }
    open.context(named)?;
    Err(Error::invalid(format!(
        "{}: the file that is open has no longer this name, for it was removed or renamed, or its folder was: a restart \
         would not find it; bring it back",
        path.display()
    )))
}

/// The same of all files of a chain: its layers name each other.
pub fn refuse_lost_chain(layers: &[Arc<Layer>]) -> Result<()> {
    layers.iter().try_for_each(|layer| refuse_lost_image(layer))
}

fn refuse_lost_image(layer: &Layer) -> Result<()> {
    refuse_lost(&layer.path, layer.tables())?;
    layer.apart.as_ref().map_or(Ok(()), |apart| refuse_lost(&apart.data_path, layer.file.file()))
}

/// Makes the names durable that were made in `folder`: a flush of a file does not promise its name.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let opened = fs::File::open(folder).and_then(|folder| folder.sync_all());
    opened.context(|| format!("{}: flush of the folder", folder.display()))
}

/// The files that the image at `path` is in, as far as can be seen: itself, and its external data file. A
/// disk that is named raw has none, whatever its guest wrote into it.
pub fn files_of(path: &Path, format: Option<TargetFormat>) -> Vec<PathBuf> {
    if export_named(path).is_some() {
        return vec![path.to_owned()];
    }
    let header = || open_file(path, false).and_then(|file| read_header(&FileStorage::new(file.buffered))).ok();
    let header = if format == Some(TargetFormat::Raw) { None } else { header() };
    let data_file = header.and_then(|header| header.data_file?.resolve(path).ok());
    std::iter::once(path.to_owned()).chain(data_file).collect()
}

/// The format of the file at `path` by its magic number.
pub fn probe_format(path: &Path) -> Result<TargetFormat> {
    let file = open_file(path, false)?;
    let storage = FileStorage::new(file.buffered);
    decide_format(&storage, None).map_err(|error| error.at(path.display()))
}

/// One layer, and what it says is below it.
struct Opened {
    layer: Layer,
    identity: Identity,
    /// Of its external data file.
    data_identity: Option<Identity>,
    below: Below,
}

impl Opened {
    fn new(path: &Path, format: Option<TargetFormat>, access: &Access) -> Result<Self> {
        let file = open_file(path, access.writable)?;
        Self::from_file(path, file, format, access).map_err(|error| error.at(path.display()))
    }

    fn at(location: &Location, format: Option<TargetFormat>, access: &Access) -> Result<Self> {
        match location {
            Location::File(path) => Self::new(path, format, access),
            Location::Nbd(address) => {
                let remote = Remote::open(address, access.writable, access.reach.certificates.as_deref())?;
                Self::from_export(remote, format, access).map_err(|error| error.at(address))
            }
        }
    }

    fn from_export(remote: Arc<Remote>, format: Option<TargetFormat>, access: &Access) -> Result<Self> {
        if access.writable && format != Some(TargetFormat::Raw) {
            return Err(Error::unsupported(
                "an export is written as a raw disk only: name the format raw, and let the server keep the image",
            ));
        }
        let address = remote.address().clone();
        let storage: Arc<dyn Storage> = Arc::clone(&remote) as _;
        let identity = Identity::Export(address.place());
        let (image, below) = open_image(&Location::Nbd(address.clone()), &identity, storage, format, access)?;
        let path = PathBuf::from(address.to_string());
        let block_len = if access.writable { remote.block_len() } else { 1 };
        let file = DataFile::of_blocks(File::remote(remote), block_len);
        let layer = Layer { image: image.map, file, path, format: image.format, apart: None };
        Ok(Self { layer, identity, data_identity: None, below })
    }

    /// Locks the file first, for opening may change it: a header's bits, or what a dirty bit says of its tables.
    fn from_file(path: &Path, mut file: OpenFile, format: Option<TargetFormat>, access: &Access) -> Result<Self> {
        let storage = Arc::new(FileStorage::new(file.buffered.try_clone().context(|| "open")?));
        let format = decide_format(&*storage, format)?;
        file.hold(path, format, access)?;
        if access.writable && format == TargetFormat::Qcow2 {
            mend_dirty(path, &storage)?;
        }
        let (location, identity) = (Location::File(path.to_owned()), file.identity.clone());
        let (image, below) = open_image(&location, &identity, Arc::clone(&storage) as _, Some(format), access)?;
        if image.flush_first {
            storage.flush().context(|| "flush")?;
        }
        // Metadata goes through the page cache: direct payload may not share a page with it.
        let cache = if image.grain < PAGE as u64 { Cache::Writeback } else { access.reach.cache };
        let (file, apart, data_identity) = match image.data {
            None => (file.data_file(path, cache)?, None, None),
            Some(data) => {
                let identity = data.file.identity.clone();
                let tables = file.data_file(path, Cache::Writeback)?.file().clone();
                let (data_path, file) = data.taken(access)?;
                (file, Some(Apart { tables, data_path }), Some(identity))
            }
        };
        let path = lasting_name(path).context(|| "looking up its full name")?;
        let layer = Layer { image: image.map, file, path, format: image.format, apart };
        Ok(Self { layer, identity, data_identity, below })
    }
}

/// An image whose metadata is open.
struct OpenImage {
    map: Box<dyn Image>,
    /// The format's name.
    format: &'static str,
    /// What its payload lies at multiples of, in bytes.
    grain: u64,
    /// What opening it wrote has to be durable before anything else.
    flush_first: bool,
    /// The file that has its payload, where that is another.
    data: Option<External>,
}

/// Where the image below is, and its format where that is known.
type Below = Option<(Location, Option<TargetFormat>)>;

fn open_image(
    location: &Location,
    own: &Identity,
    storage: Arc<dyn Storage>,
    format: Option<TargetFormat>,
    access: &Access,
) -> Result<(OpenImage, Below)> {
    match decide_format(&*storage, format)? {
        TargetFormat::Raw => {
            let len = storage.len().context(|| "length")?;
            let size = access.size.unwrap_or(len);
            if size > len {
                return Err(Error::malformed(format!("the disk has {size} bytes, the file only {len}")));
            }
            let map = Box::new(Raw::new(storage, size));
            Ok((OpenImage { map, format: "raw", grain: u64::MAX, flush_first: false, data: None }, None))
        }
        TargetFormat::Qcow2 => open_qcow2(location, own, storage, access),
    }
}

fn open_qcow2(
    location: &Location,
    own: &Identity,
    storage: Arc<dyn Storage>,
    access: &Access,
) -> Result<(OpenImage, Below)> {
    let header = read_header(&*storage)?;
    let below = header.backing.as_ref().map(|backing| below(backing, location)).transpose()?;
    let data = header.data_file.as_ref().map(|name| External::open(name, location, own, access)).transpose()?;
    let journal = access.journal.clone().unwrap_or_else(|| Arc::new(Forgetful));
    let open = Open { writable: access.writable, has_backing: below.is_some(), metadata_bytes_max: METADATA_MAX };
    let mut image = Qcow2::open(storage, journal, open)?;
    if let Some(data) = &data {
        image = image.with_data_file(Arc::new(data.storage()?));
    }
    let (grain, flush_first) = (image.info().cluster_size, image.flush_first());
    Ok((OpenImage { map: Box::new(image), format: "qcow2", grain, flush_first, data }, below))
}

/// What the image at `parent` records of the one below it. The name may say the format too, and then the
/// two have to agree: which of them a program follows is its own secret.
fn below(backing: &Backing, parent: &Location) -> Result<(Location, Option<TargetFormat>)> {
    let name = BackingName::parse(&backing.name)?;
    let format = match (backing.format.as_deref(), name.format) {
        (Some(recorded), Some(named)) if recorded != named => {
            return Err(Error::malformed(format!(
                "its backing {:?} is recorded with the format {recorded}: record one format, with qemu-img rebase -u -F",
                backing.name
            )));
        }
        (recorded, named) => recorded.or(named),
    };
    let format = format.map(|format| backing_format(&backing.name, format)).transpose()?;
    Ok((name.location.seen_from(parent)?, format))
}

/// The external data file of an image, before anything is known to be its alone.
struct External {
    path: PathBuf,
    file: OpenFile,
}

impl External {
    /// The file of this name; `own` is what the image at `image` is known by.
    fn open(name: &formats::qcow2::DataFile, image: &Location, own: &Identity, access: &Access) -> Result<Self> {
        let Location::File(image) = image else {
            return Err(Error::unsupported(
                "an image in an export cannot have its data in another file: bring it into one with qemu-img convert",
            ));
        };
        let path = name.resolve(image)?;
        // QEMU takes a relative name from the folder that it runs in, so the file may be there.
        let named = "its data file (a relative name counts from the image's folder)";
        let file = open_file(&path, access.writable).map_err(|error| error.at(named))?;
        if file.identity == *own {
            return Err(Error::malformed(format!("its data file {} is the image itself", path.display())));
        }
        Ok(Self { path, file })
    }

    fn storage(&self) -> Result<FileStorage> {
        let file = self.file.buffered.try_clone();
        file.map(FileStorage::new).context(|| format!("its data file {}: open", self.path.display()))
    }

    /// Its full name and the ways to it, locked as the image that it is a part of.
    fn taken(mut self, access: &Access) -> Result<(PathBuf, DataFile)> {
        let named = format!("its data file {}", self.path.display());
        let path = lasting_name(&self.path).context(|| format!("{named}: looking up its full name"))?;
        let held = self.file.hold(&self.path, TargetFormat::Qcow2, access);
        let file = held.and_then(|()| self.file.data_file(&self.path, access.reach.cache));
        Ok((path, file.map_err(|error| error.at(named))?))
    }
}

/// Makes the refcounts right of an image that its last writer left with the dirty bit.
fn mend_dirty(path: &Path, storage: &FileStorage) -> Result<()> {
    let header = read_header(storage)?;
    if !header.is_dirty() || header.is_corrupt() {
        return Ok(());
    }
    let found = repair(storage, &|| storage.flush().context(|| "flush"), Repair::All)?;
    if found.corruptions > 0 {
        return Err(Error::malformed(format!(
            "its last writer left it dirty, and {} corruptions cannot be mended: see `blkmirror check {}`",
            found.corruptions,
            path.display()
        )));
    }
    tracing::warn!(
        "{}: its last writer left it dirty; {} corruptions and {} leaks were mended",
        path.display(),
        found.corruptions_fixed,
        found.leaks_fixed
    );
    Ok(())
}

fn backing_format(name: &str, format: &str) -> Result<TargetFormat> {
    match format {
        "raw" => Ok(TargetFormat::Raw),
        "qcow2" => Ok(TargetFormat::Qcow2),
        other => Err(Error::unsupported(format!(
            "its backing {name} has the format {other}, which is not supported: bring that layer into qcow2 with \
             qemu-img convert -f {other} -O qcow2, and name the new one with qemu-img rebase -u"
        ))),
    }
}

/// The named format, or the one that the magic number says; never raw by guessing.
fn decide_format(storage: &dyn Storage, named: Option<TargetFormat>) -> Result<TargetFormat> {
    if let Some(format) = named {
        return Ok(format);
    }
    let len = storage.len().context(|| "length")?.min(PROBE_LEN);
    let mut head = vec![0; len as usize];
    storage.read_at(0, &mut head).context(|| "reading its first bytes")?;
    match probe(&head) {
        Probed::Qcow2 => Ok(TargetFormat::Qcow2),
        Probed::Unsupported(name) => Err(Error::unsupported(format!(
            "the format {name} is not supported: convert it with qemu-img convert -O qcow2"
        ))),
        Probed::Unknown => Err(Error::invalid(
            "its format is not known, and raw is never guessed: name it (serve: format=raw, convert: --source-format \
             raw, compare: --a-format or --b-format; a backing layer: record it in the layer above with qemu-img \
             rebase -u -F raw)",
        )),
    }
}

/// A file that was opened, and is one that images can be in.
struct OpenFile {
    buffered: fs::File,
    identity: Identity,
    writable: bool,
    /// The locks that a second way into it has to have as well.
    held: Option<Hold>,
}

fn open_file(path: &Path, writable: bool) -> Result<OpenFile> {
    // Not blocking: a FIFO with nobody at the other end would keep us for good.
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let opened = match rustix::fs::open(path, flags, Mode::empty()) {
        // A directory that is to be written, a socket.
        Err(Errno::ISDIR | Errno::NXIO) => return Err(no_image(path)),
        opened => opened.map_err(std::io::Error::from),
    };
    let buffered = fs::File::from(opened.context(|| format!("{}: open", path.display()))?);
    let metadata = buffered.metadata().context(|| format!("{}: stat", path.display()))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(no_image(path));
    }
    Ok(OpenFile { buffered, identity: identity_of(&metadata), writable, held: None })
}

fn no_image(path: &Path) -> Error {
    Error::invalid(format!("{}: neither a regular file nor a block device, so no image can be in it", path.display()))
}

impl OpenFile {
    /// Keeps others off an image of `format` that is in it, as it is opened.
    fn hold(&mut self, path: &Path, format: TargetFormat, access: &Access) -> Result<()> {
        match self.writable {
            true => self.held = to_write(path, &self.buffered, format)?,
            false => to_read(path, &self.buffered, format, access.reach.beside)?,
        }
        Ok(())
    }

    fn data_file(self, path: &Path, cache: Cache) -> Result<DataFile> {
        let sign = self.held.and_then(|_| sign_of_life(&self.buffered));
        self.ways(path, cache).map(|file| file.with_sign_of_life(sign))
    }

    fn ways(self, path: &Path, cache: Cache) -> Result<DataFile> {
        if is_in_memory(&self.buffered) {
            return Ok(DataFile::buffered(File::of_memory(self.buffered)));
        }
        let direct = match cache {
            Cache::Auto if !self.writable && is_cached(&self.buffered) => None,
            Cache::None | Cache::Auto => direct_file(path, &self.buffered, self.writable),
            Cache::Writeback | Cache::Unsafe => None,
        };
        if let (Some(hold), Some((direct, _))) = (self.held, &direct) {
            held::shared(&self.buffered, direct, hold)?;
        }
        let buffered = File::of_image(self.buffered);
        Ok(match direct {
            Some((direct, align)) => DataFile::direct(buffered, File::of_image(direct), align),
            None => DataFile::buffered(buffered),
        })
    }
}

/// True where the page cache has three of four bytes of it that are not holes.
fn is_cached(file: &fs::File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    let data = metadata.blocks() * 512;
    data > 0 && cached_bytes(file).is_some_and(|cached| cached >= data / 4 * 3)
}

/// The same file once more for direct I/O, and its alignment; `None` where there is none.
fn direct_file(path: &Path, buffered: &fs::File, writable: bool) -> Option<(fs::File, u64)> {
    let flags = OFlags::CLOEXEC | OFlags::DIRECT | if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let direct = fs::File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    // Whoever swapped the file meanwhile gets the page cache.
    let same = identity_of(&direct.metadata().ok()?) == identity_of(&buffered.metadata().ok()?);
    let align = alignment(&direct);
    (same && align <= PAGE as u64).then_some((direct, align))
}

/// What offsets, lengths and memory have to be multiples of; a page where the system does not say.
fn alignment(file: &fs::File) -> u64 {
    let asked = rustix::fs::statx(file.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match asked {
        Ok(answer) if answer.stx_dio_offset_align > 0 => {
            u64::from(answer.stx_dio_offset_align.max(answer.stx_dio_mem_align)).next_power_of_two()
        }
        _ => PAGE as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::lasting_name;
    use std::os::unix::fs::{FileTypeExt, symlink};

    /// Devices were known by what their links led to at the time.
    #[test]
    fn files_are_known_by_their_real_names_and_devices_by_their_given_ones() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let real = folder.path().canonicalize().expect("a folder");
        let (file, link) = (real.join("file"), real.join("link"));
        std::fs::write(&file, "").expect("a file");
        symlink(&file, &link).expect("a link");
        assert_eq!(lasting_name(&link).expect("it is there"), file);
        std::fs::remove_file(&file).expect("it was there");
        assert_eq!(lasting_name(&file).expect("its folder is there"), file);
        assert!(lasting_name(&real.join("none").join("file")).is_err());

        let is_device = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_block_device());
        let devices = std::fs::read_dir("/dev").expect("/dev").flatten();
        if let Some(device) = devices.into_iter().find(is_device) {
            let link = real.join("disk");
            symlink(device.path(), &link).expect("a link");
            assert_eq!(lasting_name(&link).expect("it is there"), link);
        }
    }
}
