//! The disks that a daemon serves: what its command line names, or what a pivot put in its place.
use super::wait::{until_free, until_image_is_free};
use crate::control::options::{ExportOptions, Reach};
use crate::control::{Status, TargetFormat};
use crate::disk::Disk;
use crate::export::bitmaps::MIRROR;
use crate::export::gate::{Gate, Route};
use crate::export::roll::Member;
use crate::export::session::Directory;
use crate::io::File;
use crate::open::{
    Access, Identity, export_named, identity, lasting_name, open_disk, probe_format, recover, same_image,
};
use crate::pivot::RecordFile;
use crate::state::StateFolder;
use formats::error::{Context, Error, Result};
use formats::nbd::{BlockSizes, ExportInfo, Exports};
use formats::record::Record;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// One export as the control thread knows it.
pub(super) struct Export {
    /// Its name.
    pub name: String,
    /// Full path of the image that the command line names.
    pub origin: PathBuf,
    /// The guest's way to its disk.
    pub gate: Arc<Gate>,
    /// Which image is the truth; nobody can pivot a read-only export, so it has none.
    pub record: Option<RecordFile>,
    /// How the last job stood when it ended.
    pub last: Option<Status>,
}

impl Export {
    /// Waits until a killed daemon has nothing under way on what `open` will open.
    pub fn wait_until_free(options: &ExportOptions, state: &StateFolder) -> Result<()> {
        let path = state.record_path(&options.name);
        until_free(&path)?;
        let record = (!options.readonly || path.exists()).then(|| state.record(&options.name)).transpose()?;
        let origin = lasting_name(&options.file).context(|| options.file.display().to_string())?;
        let newest = record.as_ref().and_then(RecordFile::newest);
        let truth = newest.filter(|record| same_image(Path::new(&record.origin), &origin));
        match truth {
            None => until_image_is_free(&origin, options.format),
            Some(record) => until_image_is_free(Path::new(&record.truth), Some(format_of(record))),
        }
    }

    /// Opens what is the truth of an export.
    pub fn open(options: &ExportOptions, reach: &Reach, state: &StateFolder) -> Result<Self> {
        let named = || format!("export {}: {}", options.name, options.file.display());
        // Gone where somebody has removed what a pivot left: the record says what is served then.
        let origin = lasting_name(&options.file).context(named)?;
        let (disk, record) = match options.readonly {
            true => {
                // Somebody may have served and pivoted it before.
                let path = state.record_path(&options.name);
                let record = path.exists().then(|| state.record(&options.name)).transpose()?;
                let truth = Truth::of(options, &origin, record.as_ref().and_then(RecordFile::newest))?;
                (truth.open_to_read(reach, state), None)
            }
            false => {
                let record = state.record(&options.name)?;
                let truth = Truth::of(options, &origin, record.newest())?;
                (truth.open(reach, state), Some(record))
            }
        };
        let disk = disk.map_err(|error| error.at(format!("export {}", options.name)))?;
        tell_of_hidden_bitmap(&options.name, &disk);
        let gate = Arc::new(Gate::new(Route { disk: Arc::new(disk), mirror: None }));
        Ok(Self { name: options.name.clone(), origin, gate, record, last: None })
    }

    /// Path of the image that is served.
    pub fn serving(&self) -> String {
        self.gate.route().disk.name()
    }

    /// What a client is told of it.
    fn info(&self) -> ExportInfo {
        let disk = self.gate.route().disk;
        ExportInfo {
            name: self.name.clone(),
            description: String::new(),
            size: disk.size(),
            read_only: disk.read_only(),
            // A flush covers everything that was answered, whatever connection it came by.
            multi_conn: true,
            fast_zero: true,
            block_sizes: BlockSizes::default(),
            bitmaps: Vec::new(),
        }
    }
}

/// A bitmap that clients cannot ask for, for its name means another.
fn tell_of_hidden_bitmap(export: &str, disk: &Disk) {
    let names = disk.chain().top().image.bitmap_names().unwrap_or_default();
    if names.iter().any(|name| name == MIRROR) {
        tracing::warn!(
            "export {export}: {}: its bitmap {MIRROR} is not shown to NBD clients, for whom that is what a mirror's \
             target lacks: merge it into one of another name with `qemu-img bitmap --merge`",
            disk.name()
        );
    }
}

/// Refuses a file that two exports name to write to.
pub(super) fn refuse_twice(export: &ExportOptions, all: &[ExportOptions]) -> Result<()> {
    let Ok(file) = identity(&export.file) else { return Ok(()) };
    let same = |other: &&ExportOptions| {
        other.name != export.name && !other.readonly && identity(&other.file).is_ok_and(|other| other == file)
    };
    match all.iter().filter(|_| !export.readonly).find(same) {
        None => Ok(()),
        Some(other) => Err(shared(&export.file.display(), &export.name, &other.name)),
    }
}

/// Refuses an image that one export writes and another one uses: neither would know of the other's
/// clusters. A base that both only read is fine.
pub(super) fn refuse_shared<'a>(exports: impl Iterator<Item = &'a Export> + Clone) -> Result<()> {
    for (number, export) in exports.clone().enumerate() {
        let disk = export.gate.route().disk;
        let top = disk.chain().top().paths().map(identity).collect::<Result<Vec<_>>>()?;
        let others = exports.clone().enumerate().filter(|(other, _)| *other != number).map(|(_, other)| other);
        for other in others.filter(|_| !disk.read_only()) {
            if layer_of(&other.gate.route().disk, &top).is_some() {
                return Err(shared(&disk.name(), &export.name, &other.name));
            }
        }
    }
    Ok(())
}

fn shared(file: &dyn std::fmt::Display, writer: &str, other: &str) -> Error {
    Error::invalid(format!(
        "{file} is written by export {writer} and used by export {other}: an image has one writer and nobody else"
    ))
}

/// The file of a layer of `disk` that is one of these, by any name.
pub(super) fn layer_of(disk: &Disk, files: &[Identity]) -> Option<String> {
    let same = |path: &Path| identity(path).is_ok_and(|found| files.contains(&found));
    let mut paths = disk.chain().layers().iter().flat_map(|layer| layer.paths());
    paths.find(|path| same(path)).map(|path| path.display().to_string())
}

/// The format of the image that a record names.
fn format_of(record: &Record) -> TargetFormat {
    if record.format == "raw" { TargetFormat::Raw } else { TargetFormat::Qcow2 }
}

/// The image that has the guest's acknowledged writes.
struct Truth {
    path: PathBuf,
    format: TargetFormat,
    /// A disk that a pivot brought into a larger raw file or device keeps its size.
    size: Option<u64>,
}

impl Truth {
    fn of(options: &ExportOptions, origin: &Path, record: Option<&Record>) -> Result<Self> {
        let is_origin = |name: &String| same_image(Path::new(name), origin);
        match record {
            Some(record) if is_origin(&record.origin) && !is_origin(&record.truth) => {
                tracing::warn!(
                    "export {}: {} was left by a pivot; its truth is {}, which is served",
                    options.name,
                    origin.display(),
                    record.truth
                );
                let format = format_of(record);
                let size = (format == TargetFormat::Raw).then_some(record.size);
                Ok(Self { path: PathBuf::from(&record.truth), format, size })
            }
            Some(record) if !is_origin(&record.origin) => {
                if !is_origin(&record.truth) {
                    tracing::warn!(
                        "export {}: another image was served by this name before ({}); {} is served now",
                        options.name,
                        record.truth,
                        origin.display()
                    );
                }
                Self::named(options, origin)
            }
            _ => Self::named(options, origin),
        }
    }

    fn named(options: &ExportOptions, origin: &Path) -> Result<Self> {
        let format = match options.format {
            Some(format) => format,
            None if export_named(origin).is_some() => {
                return Err(Error::invalid(format!(
                    "{}: another server's export is served as the raw disk that it is: add format=raw",
                    origin.display()
                )));
            }
            None => probe_format(origin)?,
        };
        Ok(Self { path: origin.to_owned(), format, size: None })
    }

    fn open_to_read(self, reach: &Reach, state: &StateFolder) -> Result<Disk> {
        if export_named(&self.path).is_none() && state.has_left_behind(&self.path)? {
            return Err(Error::invalid(format!(
                "{}: writes that a kill left behind are not in the image yet: serve it once without readonly",
                self.path.display()
            )));
        }
        open_disk(&self.path, Some(self.format), Access { size: self.size, ..Access::read_only(reach) })
    }

    fn open(self, reach: &Reach, state: &StateFolder) -> Result<Disk> {
        if export_named(&self.path).is_some() {
            // Its server has what was answered, and there are no mappings that only we would know.
            let access = Access { size: self.size, ..Access::writable(reach) };
            return open_disk(&self.path, Some(self.format), access);
        }
        bring_in(&self.path, Some(self.format), state)?;
        let path = lasting_name(&self.path).context(|| self.path.display().to_string())?;
        let journal = state.journal(&path)?;
        let access = Access { journal: Some(journal.start()), size: self.size, ..Access::writable(reach) };
        open_disk(&path, Some(self.format), access)
    }
}

/// Brings what a kill left behind of an image that was served into it. Another server's export has everything.
pub(super) fn bring_in(path: &Path, format: Option<TargetFormat>, state: &StateFolder) -> Result<()> {
    if export_named(path).is_some() {
        return Ok(());
    }
    let path = lasting_name(path).context(|| path.display().to_string())?;
    let left = state.journal(&path)?.left_behind()?;
    if !left.is_empty() {
        let format = format.map_or_else(|| probe_format(&path), Ok)?;
        recover(&path, format, &left)?;
        tracing::info!("{}: {} mappings that a kill left behind were brought in", path.display(), left.len());
    }
    Ok(())
}

/// What sessions look exports up in; the first is the default.
#[derive(Default)]
pub(super) struct Table(RwLock<Vec<(ExportInfo, Arc<Gate>)>>);

impl Table {
    /// One more export, or one that has changed.
    pub fn put(&self, export: &Export) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let new = (export.info(), Arc::clone(&export.gate));
        match table.iter_mut().find(|(info, _)| info.name == export.name) {
            Some(place) => *place = new,
            None => table.push(new),
        }
    }

    /// Lets nobody in to an export any more.
    pub fn take_away(&self, name: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|(info, _)| info.name != name);
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<(ExportInfo, Arc<Gate>)>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exports for Table {
    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        let table = self.read();
        let found = if name.is_empty() { table.first() } else { table.iter().find(|(info, _)| info.name == name) };
        found.map(|(info, gate)| ExportInfo { bitmaps: gate.route().bitmaps(), ..info.clone() })
    }

    fn list(&self) -> Vec<ExportInfo> {
        self.read().iter().map(|(info, _)| info.clone()).collect()
    }
}

impl Directory for Table {
    fn enter(&self, name: &str, socket: File) -> Option<(Arc<Gate>, Member)> {
        let table = self.read();
        let (_, gate) = table.iter().find(|(info, _)| info.name == name)?;
        // Under the lock: an export is taken away, and then waited for until nobody is on its roll.
        let member = gate.roll.join(socket);
        Some((Arc::clone(gate), member))
    }
}
