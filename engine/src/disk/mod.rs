//! A disk: a chain whose top can be written. Source and target are the same type; the pivot changes
//! which one an export serves.
//!
//! A `Task` is one operation on a disk, stepped: it asks the images where bytes live, moves them
//! through the caller's queue and tells the top image when they are there.
mod compress;
mod flush;
mod grace;
mod inflated;
mod prefetch;
mod read;
mod share;
mod step;
mod task;
mod write;
mod zero;

pub use crate::data_file::DataFile;
pub use share::{SHARE_ALIGN, cannot_share};
pub use step::{Status, Tools};
pub use task::Task;

use crate::bell::Bell;
use crate::chain::Chain;
use crate::io::remote::Remote;
use formats::error::{Error, Result};
use formats::image::{Image, Zeroing};
use formats::range::ByteRange;
use grace::Grace;
use inflated::Inflated;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A disk that can be read and, unless it is read-only, written, zeroed and flushed.
pub struct Disk {
    chain: Chain,
    read_only: bool,
    /// Rings when something ends that another task may be waiting for.
    bell: Bell,
    grace: Grace,
    inflated: Inflated,
    poisoned: AtomicBool,
    damage_told: AtomicBool,
    /// The file system said that it cannot make holes, or cannot zero in place.
    no_unmap: AtomicBool,
    no_zero_range: AtomicBool,
}

impl Disk {
    /// The disk that `chain` shows.
    pub fn new(chain: Chain, read_only: bool) -> Self {
        Self {
            chain,
            read_only,
            bell: Bell::default(),
            grace: Grace::default(),
            inflated: Inflated::default(),
            poisoned: AtomicBool::new(false),
            damage_told: AtomicBool::new(false),
            no_unmap: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        }
    }

    /// Its layers.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.chain.size()
    }

    /// Makes it larger, in memory up to `keep_size`; says what has to be zeroed before anybody looks. Everything is settled
    /// and nobody is inside. Waits for the image's tables.
    pub fn grow(&self, size: u64) -> Result<ByteRange> {
        // What is longer of a raw image below than the disk that was served of it shows after a restart.
        let below = self.chain.layers().get(1).map_or(Ok(0), |below| below.image.size_by_itself());
        let grown = below.and_then(|below| {
            self.refuse_poisoned()?;
            self.top().grow(size, below, &|| self.flush_now())
        });
        grown.map_err(|error| error.at(self.name()))
    }

    /// It keeps the size that it has now. Nobody is inside. Waits, as `grow`.
    pub fn keep_size(&self) -> Result<()> {
        self.top().keep_size(&|| self.flush_now()).map_err(|error| error.at(self.name()))
    }

    fn top(&self) -> &dyn Image {
        &*self.chain.top().image
    }

    /// All files of the top image.
    fn flush_now(&self) -> Result<()> {
        let flushed = self.chain.top().flush_now();
        if flushed.is_err() {
            self.poison();
        }
        flushed
    }

    /// True where nothing may be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// True where its tables may have to be waited for, by whoever reads or writes it.
    pub fn may_wait(&self) -> bool {
        self.top().may_wait()
    }

    /// Path of the top image, for messages.
    pub fn name(&self) -> String {
        self.chain.top().path.display().to_string()
    }

    /// The other server's export that it is, if it is one.
    fn remote(&self) -> Option<&Arc<Remote>> {
        self.chain.top().file.file().as_remote()
    }

    /// True where another server keeps it.
    pub fn is_remote(&self) -> bool {
        self.remote().is_some()
    }

    /// Somebody waits who must not wait for long: a server that is out of reach is not waited for.
    pub fn hurry(&self, on: bool) {
        if let Some(remote) = self.remote() {
            remote.hurry(on);
        }
    }

    /// Who uses it tries again by itself when its server is out of reach, and has to hear of that soon.
    pub fn fail_soon(&self, on: bool) {
        if let Some(remote) = self.remote() {
            remote.fail_soon(on);
        }
    }

    /// What its server may have lost of what was written, since this was asked last. Asked after a flush: what is
    /// not in the answer is durable.
    pub fn take_doubtful(&self) -> Vec<ByteRange> {
        self.remote().map_or_else(Vec::new, |remote| remote.take_doubtful())
    }

    /// A flush of it failed: nobody knows what the device has. Nothing is promised of it any more.
    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }

    /// True after a flush that failed.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    fn refuse_poisoned(&self) -> Result<()> {
        match self.is_poisoned() {
            false => Ok(()),
            true => Err(Error::io(
                format!("{}: an earlier flush of this image failed, so it is not written any more", self.name()),
                rustix::io::Errno::IO.into(),
            )),
        }
    }

    /// What was found wrong with the top image while it was in use; it is not written any more.
    pub fn damage(&self) -> Option<String> {
        let top = self.chain.top();
        top.image.damage().map(|what| {
            let name = self.name();
            format!("{name} is corrupt ({what}) and not written any more: mend it with `blkmirror check --repair all {name}`")
        })
    }

    /// Logs it, once.
    fn tell_damage(&self) {
        if let Some(damage) = self.damage()
            && !self.damage_told.swap(true, Ordering::Relaxed)
        {
            tracing::error!("{damage}");
        }
    }

    fn punching(&self, zeroing: Zeroing) -> &AtomicBool {
        if zeroing == Zeroing::Keep { &self.no_zero_range } else { &self.no_unmap }
    }

    fn can_punch(&self, zeroing: Zeroing) -> bool {
        !self.punching(zeroing).load(Ordering::Relaxed)
    }

    /// The file system cannot: from now on zeroes are written.
    fn no_punching(&self, zeroing: Zeroing) {
        self.punching(zeroing).store(true, Ordering::Relaxed);
    }

    /// A settle is done: what it gave up may be used again when everybody who was inside has left.
    fn settled(&self) {
        self.try_recycle();
        self.bell.ring();
    }

    fn try_recycle(&self) {
        let image = &self.chain.top().image;
        if let Some(settles) = self.grace.over(|| image.settles()) {
            // Before the places of what is kept can have other contents.
            self.inflated.clear();
            image.recycle_of(settles);
        }
    }
}
