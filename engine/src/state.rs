//! The state folder: what has to be found again after a kill.
//!
//! ```text
//! DIR/lock                one daemon at a time
//! DIR/NAME.record         which image is the truth of export NAME: two slots
//! DIR/together.group      the same of several exports that were pivoted at one instant, until their own records say it
//! DIR/exports.json        the exports that were added to a running daemon
//! DIR/NAME.job            the copy request of export NAME's job, while it is under way
//! DIR/NAME.planes         what that job's target lacks, at each instant (`planes`)
//! DIR/NAME.rollback       the job that begins when a pivot that keeps the source has happened (`rollback`)
//! DIR/NAME.rollback-planes  and its planes
//! DIR/FILE-CRC.journal    mappings of the image FILE that are only in memory; CRC is of its path
//! ```
mod exports;
mod group;
mod planes;
mod rollback;
mod show;

pub use rollback::KeptRollback;
pub use show::{Entry, What, show};

use crate::control::MirrorRequest;
use crate::io::{File, Words};
use crate::journal::{BootId, Owner, WORDS, WordJournal};
use crate::open::{Identity, alone, export_named, sync_folder};
use crate::pivot::RecordFile;
use formats::error::{Context, Error, Result};
use formats::journal::Change;
use formats::nbd::Address;
use formats::record::{Record, SLOT_LEN};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// An open state folder, locked.
pub struct StateFolder {
    folder: PathBuf,
    boot: BootId,
    _lock: fs::File,
}

impl StateFolder {
    /// Opens the folder, making it where it is not there.
    pub fn open(folder: &Path) -> Result<Self> {
        let named = |what: &str| format!("state folder {}: {what}", folder.display());
        let new: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
        fs::create_dir_all(folder).context(|| named("it cannot be made; name another with --state"))?;
        // A power cut must not take the folder with the record.
        let beside = |folder: &&Path| folder.canonicalize().ok()?.parent().map(Path::to_owned);
        new.iter().filter_map(beside).try_for_each(|parent| sync_folder(&parent))?;
        let folder = folder.canonicalize().context(|| named("it cannot be looked up"))?;
        let lock = fs::File::options().create(true).truncate(false).write(true).open(folder.join("lock"));
        let lock = lock.context(|| named("its lock file cannot be opened"))?;
        if !alone(&folder, &lock)? {
            let what = "another blkmirror uses it; end that one, or name another folder with --state";
            return Err(Error::invalid(named(what)));
        }
        Ok(Self { boot: boot_id()?, _lock: lock, folder })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Which run of the system this is.
    pub fn boot(&self) -> BootId {
        self.boot
    }

    /// The record of an export; made, with two blank slots, where there is none.
    pub fn record(&self, export: &str) -> Result<RecordFile> {
        let path = self.record_path(export);
        let named = |what: &str| format!("{}: {what}", path.display());
        let file = fs::File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = file.context(|| named("open"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).context(|| named("read"))?;
        if bytes.is_empty() {
            bytes.resize(2 * SLOT_LEN, 0);
            file.write_all_at(&bytes, 0).context(|| named("write"))?;
            file.sync_all().context(|| named("flush"))?;
            self.sync()?;
        }
        lock(&path, &file)?;
        let newest = Record::newest(&bytes).map_err(|error| error.at(named(REMEDY)))?;
        Ok(RecordFile::new(File::new(file), path, newest))
    }

    /// Where the record of an export is.
    pub fn record_path(&self, export: &str) -> PathBuf {
        self.folder.join(format!("{}.record", file_name(export)))
    }

    /// Keeps the request of a job that starts, so that it goes on after a kill.
    pub fn keep_job(&self, job: &KeptJob) -> Result<()> {
        self.keep(&self.job_path(&job.request.export), job, "keeping the job's request")
    }

    /// Puts `what` into the file at `path`, at one instant and for good.
    fn keep(&self, path: &Path, what: &(impl Serialize + ?Sized), doing: &str) -> Result<()> {
        let named = || format!("{}: {doing}", path.display());
        let text = serde_json::to_vec_pretty(what).map_err(std::io::Error::from).context(named)?;
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let mut file = fs::File::create(&new).context(named)?;
        file.write_all(&text).and_then(|()| file.sync_all()).context(named)?;
        fs::rename(&new, path).context(named)?;
        self.sync()
    }

    /// The request of a job that a kill interrupted, if there is one.
    pub fn kept_job(&self, export: &str) -> Result<Option<KeptJob>> {
        let path = self.job_path(export);
        let named = || format!("{}: reading the job's request", path.display());
        let text = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.context(named)?,
        };
        let job = serde_json::from_slice(&text).map_err(std::io::Error::from);
        job.map(Some).context(|| {
            format!("{}: not a job's request: it is kept as *.job.refused, and the job does not go on", path.display())
        })
    }

    /// The job is over: it is not to go on after a kill.
    pub fn forget_job(&self, export: &str) -> Result<()> {
        // The request first: without it nobody looks at the planes.
        for path in [self.job_path(export), self.planes_path(export)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("{}: forgetting a job that is over", path.display()), error));
                }
                _ => self.sync()?,
            }
        }
        Ok(())
    }

    /// A job's request that nobody understands is kept by another name, and its planes with it.
    pub fn set_job_aside(&self, export: &str) -> Result<()> {
        for path in [self.job_path(export), self.planes_path(export)] {
            let mut aside = path.clone().into_os_string();
            aside.push(".refused");
            match fs::rename(&path, &aside) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                moved => moved.context(|| format!("{}: moving it aside", path.display()))?,
            }
        }
        self.sync()
    }

    /// Where the request of an export's job is.
    pub fn job_path(&self, export: &str) -> PathBuf {
        self.folder.join(format!("{}.job", file_name(export)))
    }

    /// The journal of an image, and what a kill left in it: to be brought into the image before the
    /// journal is used.
    pub fn journal(&self, image: &Path) -> Result<JournalFile> {
        let path = self.journal_path(image);
        let named = |what: &str| format!("{}: {what}", path.display());
        let file = fs::File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.context(|| named("open"))?;
        let words = Arc::new(Words::in_file(&file, WORDS).context(|| named("mapping it into memory"))?);
        Ok(JournalFile { words, boot: self.boot, owner: owner(image)?, path, image: image.to_owned() })
    }

    /// True where a kill left something of an image that is not in the image yet.
    pub fn has_left_behind(&self, image: &Path) -> Result<bool> {
        match self.journal_path(image).exists() {
            true => Ok(!self.journal(image)?.left_behind()?.is_empty()),
            false => Ok(false),
        }
    }

    fn journal_path(&self, image: &Path) -> PathBuf {
        let name = image.file_name().map_or_else(|| "image".into(), |name| name.to_string_lossy());
        let crc = crc32c::crc32c(image.as_os_str().as_encoded_bytes());
        self.folder.join(format!("{}-{crc:08x}.journal", file_name(&name)))
    }

    /// Makes the folder's own entries durable.
    fn sync(&self) -> Result<()> {
        sync_folder(&self.folder)
    }
}

/// A job that goes on after a kill, with what tells whether it is still about the same images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct KeptJob {
    /// Path of the source's top image.
    pub source: String,
    /// Device and inode of the target, or its address.
    pub target_identity: Identity,
    /// Ties the planes to it; none where they count no more, for the source was served without the job.
    #[serde(default)]
    pub planes: Option<u64>,
    /// An operator has it rest.
    #[serde(default)]
    pub paused: bool,
    /// It goes back to the disk that a pivot has left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rollback: bool,
    /// Of a whole chain: the layers below its target are copied, and get their names.
    #[serde(default)]
    pub named: bool,
    /// And then: the mirror of the top begins, and what is in its target's place is ours.
    #[serde(default)]
    pub top: bool,
    /// What was asked for, as it was changed since; its target is there already.
    pub request: MirrorRequest,
}

/// An image's journal as a file of the state folder.
pub struct JournalFile {
    words: Arc<Words>,
    boot: BootId,
    owner: Owner,
    path: PathBuf,
    image: PathBuf,
}

impl JournalFile {
    /// What a kill left behind, in order. Refused where it is of another file that was there by the
    /// image's name: what belongs to one image destroys another.
    pub fn left_behind(&self) -> Result<Vec<Change>> {
        let changes = WordJournal::left_behind(&self.words, self.boot);
        if changes.is_empty() || WordJournal::owner(&self.words) == self.owner {
            return Ok(changes);
        }
        Err(Error::invalid(format!(
            "{}: a kill left writes there that belong to another file than the one that is {} now: bring that file \
             back or, where it was replaced on purpose, remove this journal",
            self.path.display(),
            self.image.display()
        )))
    }

    /// Starts it anew. What was left behind has to be in the image for good.
    pub fn start(self) -> Arc<WordJournal> {
        Arc::new(WordJournal::new(self.words, self.boot, self.owner))
    }

    /// Starts it anew, noting nothing yet: a target's, before it is the truth.
    pub fn start_asleep(self) -> Arc<WordJournal> {
        Arc::new(WordJournal::asleep(self.words, self.boot, self.owner))
    }
}

/// What a file keeps as long as it is there, also through a new mount: its number and when it was made.
pub fn owner(image: &Path) -> Result<Owner> {
    if let Some(address) = export_named(image) {
        // However it is protected on its way.
        let address = Address { tls: None, ..address };
        return Ok((u64::MAX - 1, u64::from(crc32c::crc32c(address.to_string().as_bytes()))));
    }
    let metadata = fs::metadata(image).context(|| format!("{}: stat", image.display()))?;
    if metadata.file_type().is_block_device() {
        return Ok((u64::MAX, metadata.rdev()));
    }
    // Where the file system does not know when, the number alone has to do.
    let made = metadata.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok((metadata.ino(), made.as_secs() << 30 | u64::from(made.subsec_nanos())))
}

const REMEDY: &str = "the record is damaged, so nobody knows which image is the truth; compare the images, then \
                      move this file away and start with the right one";

/// Locks a file that operations will be under way on.
fn lock(path: &Path, file: &fs::File) -> Result<()> {
    match alone(path, file)? {
        true => Ok(()),
        false => Err(Error::invalid(format!("{}: another blkmirror has it locked", path.display()))),
    }
}

/// True where a reboot empties the file system that `folder` is on.
pub fn is_volatile(folder: &Path) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    // Of one that is made later, the folder that it will be made in: the answer must not change with it.
    let there = folder.ancestors().find(|folder| folder.exists());
    there.is_some_and(|there| rustix::fs::statfs(there).is_ok_and(|fs| matches!(fs.f_type, TMPFS | RAMFS)))
}

/// An export's or an image's name as a file's: what is no letter, digit, dot, dash or underscore is
/// written as its bytes in hexadecimal.
fn file_name(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes().take(100) {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
            b'.' if !text.is_empty() => text.push('.'),
            _ => text.push_str(&format!("%{byte:02x}")),
        }
    }
    if name.len() > 100 {
        text.push_str(&format!("~{:08x}", crc32c::crc32c(name.as_bytes())));
    }
    text
}

/// Which run of the system this is.
fn boot_id() -> Result<BootId> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(PATH).context(|| format!("{PATH}: which run of the system this is"))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let word = |part: Option<&str>| part.and_then(|part| u64::from_str_radix(part, 16).ok());
    match (word(digits.get(..16)), word(digits.get(16..32))) {
        (Some(high), Some(low)) => Ok([high, low]),
        _ => Err(Error::malformed(format!("{PATH}: not a boot id"))),
    }
}

#[cfg(test)]
mod tests {
    use super::{StateFolder, file_name, is_volatile};
    use formats::journal::{Change, Journal};
    use std::path::Path;

    #[test]
    fn names_become_file_names_of_their_own() {
        assert_eq!(file_name("vda"), "vda");
        assert_eq!(file_name("../x y"), "%2e.%2fx%20y");
        assert_ne!(file_name("a/b"), file_name("a%2fb"));
        assert!(file_name(&"x".repeat(4096)).len() < 200);
    }

    #[test]
    fn a_folder_has_one_daemon() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let first = StateFolder::open(folder.path()).expect("the first");
        let second = StateFolder::open(folder.path()).err().expect("refused");
        assert!(second.one_line().contains("another blkmirror uses it"));
        assert!(first.record("vda").expect("a new record").newest().is_none());
        drop(first);
        StateFolder::open(folder.path()).expect("the next");
    }

    /// The daemon chose one folder at its first start and, that one being there then, another one at its
    /// next: the record was not found and the wrong image served.
    #[test]
    fn a_folder_is_as_volatile_before_it_is_made_as_after() {
        assert!(is_volatile(Path::new("/dev/shm")));
        assert!(is_volatile(Path::new("/dev/shm/blkmirror-test-none/deeper")));
        assert!(!is_volatile(Path::new("/proc/none")));
    }

    /// An image was replaced by another of the same name after a kill, and the writes of the first were
    /// brought into the second.
    #[test]
    fn what_a_kill_left_of_one_file_is_not_brought_into_another() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (image, other) = (folder.path().join("image"), folder.path().join("other"));
        for file in [&image, &other] {
            std::fs::write(file, "").expect("a file");
        }
        let state = StateFolder::open(&folder.path().join("state")).expect("a state folder");
        let change = Change { table: 2, index: 1, value: 1 };
        state.journal(&image).expect("a journal").start().note(change);
        let left = || state.journal(&image).expect("a journal").left_behind();
        assert_eq!(left().expect("the same file"), [change]);
        std::fs::rename(&other, &image).expect("both are there");
        assert!(left().expect_err("another file").one_line().contains("remove this journal"));
        state.journal(&image).expect("a journal").start();
        assert!(left().expect("begun anew").is_empty());
    }
}
