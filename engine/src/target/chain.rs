//! The layers below the top on their way to another folder, where each keeps its file's name and names the next one by
//! that alone. They are copied as the files that they are: nobody writes to them.
//!
//! ```text
//! /old/base ◄── /old/snap1 ◄── /old/snap2          base, snap1: copied here
//! /new/base ◄── /new/snap1 ◄── /new/snap2          snap2: by the mirror, shallow
//! ```
//!
//! Up to their end the copies have names of their own (`.part`), so that a copy that was cut short is no layer. The next
//! daemon begins them anew; when all of them are whole, that is noted, and then they get their names.
use super::space::{held, taken, warning_of_chain};
use super::{Found, full_path, invalid, unsupported};
use crate::chain::Layer;
use crate::control::options::Reach;
use crate::control::{MirrorRequest, Refusal, TargetFormat};
use crate::disk::Disk;
use crate::io::FileStorage;
use crate::open::{Access, open_chain, refuse_lost_chain, sync_folder};
use formats::backing::Location;
use formats::error::{Context, Error, Result};
use formats::qcow2::{check_rename, read_header, rename_backing};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A chain's way to a folder.
#[derive(Debug)]
pub struct ChainPlan {
    folder: PathBuf,
    /// The files of the layers below the top, the base's last.
    pub files: Vec<LowerFile>,
    /// Where the top goes.
    pub top: PathBuf,
    /// Where the layer below it goes, and its format.
    below: Option<(PathBuf, TargetFormat)>,
    /// Bytes that the top takes where it is.
    pub top_bytes: u64,
    /// What there is to say of it.
    pub warning: Option<String>,
}

/// How far the copies below the top had come in an earlier life of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// There was none: what is there is somebody's.
    Nothing,
    /// Some of them may be there in part.
    InPart,
    /// All are whole, and some have their names.
    Whole,
    /// All have their names, and the target of the mirror of the top may be there; it is ours.
    Top,
}

/// One file that is copied.
#[derive(Debug)]
pub struct LowerFile {
    /// Which.
    pub from: PathBuf,
    /// What it is called in the end.
    to: PathBuf,
    /// The backing name that its header gets.
    backing: Option<String>,
    /// What of it is ours to remove.
    ours: Mutex<Ours>,
}

/// How far a copy has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Ours {
    #[default]
    Nothing,
    Part,
    Whole,
}

/// Checks a request for a whole chain against its source; changes nothing.
pub fn plan_chain(request: &MirrorRequest, copied: Copied, source: &Disk) -> std::result::Result<ChainPlan, Refusal> {
    let folder = full_path(Path::new(&request.target))?;
    let named = |what: &str| format!("{}: {what}", folder.display());
    if let Some(flag) = flag_that_is_given(request) {
        return Err(invalid(named(&format!("a whole chain is copied as it is, and {flag} asks for something else"))));
    }
    if !fs::metadata(&folder).is_ok_and(|metadata| metadata.is_dir()) {
        return Err(invalid(named("a whole chain goes to a folder, and this is none: make it first")));
    }
    let layers = source.chain().layers();
    // They are copied by their names.
    refuse_lost_chain(layers)?;
    let names = layers.iter().map(|layer| name_of(&layer.path)).collect::<std::result::Result<Vec<_>, _>>()?;
    let mut files = Vec::new();
    for (number, layer) in layers.iter().enumerate().skip(1) {
        let next = names.get(number + 1).cloned();
        if let Some(next) = &next {
            check_rename(&open(&layer.path)?, next).map_err(|error| error.at(layer.path.display()))?;
        }
        files.push(LowerFile {
            from: layer.path.clone(),
            to: folder.join(&names[number]),
            backing: next,
            ours: Mutex::default(),
        });
        if let Some(apart) = &layer.apart {
            let name = data_name(layer, &apart.data_path)?;
            files.push(LowerFile {
                from: apart.data_path.clone(),
                to: folder.join(name),
                backing: None,
                ours: Mutex::default(),
            });
        }
    }
    let top = folder.join(&names[0]);
    let places = || files.iter().map(|file| &file.to).chain([&top]);
    // A name may be what another copy is called before it is whole.
    let parts = || files.iter().map(LowerFile::part);
    let mut seen = BTreeSet::new();
    if let Some(twice) = places().cloned().chain(parts()).find(|place| !seen.insert(place.clone())) {
        let what = "two files of the chain would be that one: give them different names first";
        return Err(invalid(format!("{}: {what}", twice.display())));
    }
    if copied != Copied::Top {
        refuse_there(&top)?;
    }
    if matches!(copied, Copied::Nothing | Copied::InPart) {
        files.iter().try_for_each(|file| refuse_there(&file.to))?;
    }
    files.iter().try_for_each(|file| file.look(copied))?;
    let below = layers.get(1).map(|layer| {
        let format = if layer.format == "raw" { TargetFormat::Raw } else { TargetFormat::Qcow2 };
        (folder.join(&names[1]), format)
    });
    let mut plan = ChainPlan { folder, files, top, below, top_bytes: held(source, true), warning: None };
    plan.warning = warning_of_chain(&plan, request, source);
    Ok(plan)
}

fn refuse_there(place: &Path) -> std::result::Result<(), Refusal> {
    let what = "it is there already, and a whole chain is made anew: remove it, or name another folder";
    match Found::look(place)? {
        Found::Nothing => Ok(()),
        _ => Err(unsupported(format!("{}: {what}", place.display()))),
    }
}

impl ChainPlan {
    /// The request for the top, when what is below it is there.
    pub fn of_top(&self, request: &MirrorRequest) -> MirrorRequest {
        MirrorRequest {
            target: self.top.display().to_string(),
            chain: false,
            shallow: self.below.is_some(),
            relative_backing: self.below.is_some(),
            ..request.clone()
        }
    }

    /// All copies are there: each gets its names. Returns the layers, opened to be read.
    pub fn finish(&self, reach: &Reach) -> Result<Vec<Arc<Layer>>> {
        for file in &self.files {
            file.name()?;
        }
        sync_folder(&self.folder)?;
        let Some((path, format)) = &self.below else { return Ok(Vec::new()) };
        let chain = open_chain(&Location::File(path.clone()), Some(*format), Access::read_only(reach))?;
        Ok(chain.layers().to_vec())
    }

    /// The top's copy is made anew.
    pub fn remove_top(&self) -> Result<()> {
        match fs::remove_file(&self.top) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.context(|| format!("{}: removing what was begun", self.top.display())),
        }
    }

    /// Nothing of it is left.
    pub fn unmake(&self) {
        for file in &self.files {
            // Whoever removed one already wanted the same.
            let _ = match *file.ours() {
                Ours::Nothing => Ok(()),
                Ours::Part => fs::remove_file(file.part()),
                Ours::Whole => fs::remove_file(&file.to),
            };
        }
    }
}

impl LowerFile {
    /// What its copy is called before it is whole.
    pub fn part(&self) -> PathBuf {
        let mut name = OsString::from(&self.to);
        name.push(".part");
        name.into()
    }

    /// About how many bytes are in it.
    pub fn len_about(&self) -> u64 {
        taken(&self.from).unwrap_or(0)
    }

    /// The copy's header names the next one where that is now.
    pub fn rename_backing(&self, copy: &FileStorage) -> Result<()> {
        match &self.backing {
            Some(name) => rename_backing(copy, name).map_err(|error| error.at(self.to.display())),
            None => Ok(()),
        }
    }

    /// What of it is there is ours, or somebody's and refused.
    fn look(&self, copied: Copied) -> std::result::Result<(), Refusal> {
        let part = self.part();
        let is_there = |path: &Path| Found::look(path).map(|found| found != Found::Nothing);
        match copied {
            Copied::Nothing => return refuse_there(&part),
            _ if is_there(&part)? => *self.ours() = Ours::Part,
            Copied::InPart => {}
            _ if is_there(&self.to)? => *self.ours() = Ours::Whole,
            Copied::Whole | Copied::Top => {
                let what = "it was copied, and is gone: bring it back and start the daemon again";
                return Err(unsupported(format!("{}: {what}", self.to.display())));
            }
        }
        Ok(())
    }

    /// The copy gets its name, unless somebody else has it by now.
    fn name(&self) -> Result<()> {
        if *self.ours() == Ours::Whole {
            return Ok(());
        }
        let part = self.part();
        let named = match renameat_with(CWD, &part, CWD, &self.to, RenameFlags::NOREPLACE) {
            // A file system that knows no such rename.
            Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(&part, &self.to).and_then(|()| fs::remove_file(&part)),
            named => named.map_err(std::io::Error::from),
        };
        named.context(|| format!("{}: giving the copy its name", self.to.display()))?;
        *self.ours() = Ours::Whole;
        Ok(())
    }

    /// Its part is being written.
    pub fn begun(&self) {
        *self.ours() = Ours::Part;
    }

    fn ours(&self) -> MutexGuard<'_, Ours> {
        self.ours.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(path: &Path) -> Result<FileStorage> {
    fs::File::open(path).map(FileStorage::new).context(|| format!("{}: open", path.display()))
}

fn flag_that_is_given(request: &MirrorRequest) -> Option<&'static str> {
    let flags = [
        (request.reuse_external, "--reuse-external"),
        (request.format.is_some(), "a format"),
        (request.block_device, "--blockdev"),
        (request.options.data_file.is_some(), "data_file"),
    ];
    flags.iter().find(|(given, _)| *given).map(|(_, flag)| *flag)
}

/// The name of a layer's file, which its copy keeps.
fn name_of(path: &Path) -> std::result::Result<String, Refusal> {
    // An export's name has the last part of its address, and is no file's.
    let name = path.is_absolute().then(|| path.file_name()).flatten();
    let name = name.ok_or_else(|| {
        unsupported(format!("{}: this layer is in no file here: a whole chain of files is copied", path.display()))
    })?;
    let text =
        name.to_str().ok_or_else(|| Error::unsupported(format!("{}: a name has to be UTF-8", path.display())))?;
    match text.contains(':') {
        true => Err(unsupported(format!(
            "{}: a backing name with a colon looks like a protocol: rename the file, or name the next layer by its full path",
            path.display()
        ))),
        false => Ok(text.to_owned()),
    }
}

/// The name of a layer's data file, by which its header has to name it already.
fn data_name(layer: &Layer, data: &Path) -> std::result::Result<String, Refusal> {
    let name = name_of(data)?;
    let header = read_header(&open(&layer.path)?).map_err(|error| error.at(layer.path.display()))?;
    match header.data_file.is_some_and(|data_file| data_file.name == name) {
        true => Ok(name),
        false => Err(unsupported(format!(
            "{}: its header does not name its data file by the name {name} alone, so a copy would use the old one: record \
             that name first (qemu-img amend -o data_file={name})",
            layer.path.display()
        ))),
    }
}
