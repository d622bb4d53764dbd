//! qcow2, versions 2 and 3: where guest bytes live, and tables that a power cut finds in order.
//!
//! ```text
//! header      what the header says and what of it is not supported
//! geometry    the numbers that follow from it
//! entry       what an L1 or L2 entry means, and its subclusters
//! state       the tables as they are now, under one lock
//!   tables      L2 tables as wholes, and those that snapshots share
//!   slices      the part of them that is in memory
//!   refcounts   how often each host cluster is used
//!   space       which of them are free
//! map, reserve, zero     what guests ask
//! pack        room for compressed clusters
//! inflate, deflate       what is in them
//! describe    what `map` tells beyond that
//! settle      brings the tables into the file, in order
//! grow        makes the disk larger
//! replay      takes back what the journal kept through a kill
//! snapshots, bitmaps     what else the file keeps: older views, and what was written since
//! damage      a corruption that is found while the image is in use ends all writing
//! data_file   where payload is in a file of its own
//! create      makes an empty image
//! rename      names another image below
//! check       finds leaks and corruptions
//! fault       breaks the orders below, for tests
//! ```
//!
//! # The orders that must not change
//!
//! 1. Payload and refcounts are durable before an L2 entry that points at them is written. The other
//!    way round, a power cut leaves an entry that shows what was there before, or that two share.
//! 2. A table is durable, as zeroes or as a copy at least, before what points at it is written: an L2
//!    table before its L1 entry, a refcount block before its entry, a moved refcount or L1 table before the header.
//! 3. A cluster that an entry let go of is counted down, and used again, only after the changed entry
//!    is durable and nobody can still be reading the old place (`Image::recycle`).
//! 4. What is committed while a settle is under way is not written by it: its payload was perhaps
//!    not flushed. See `settle`.
//! 5. What is new of a disk that grows reads as zeroes, durably, before the header has the larger size. The other way
//!    round, a power cut shows what was there before, or what the image below has there. See `grow`.
//! 6. A bitmap is as long as its disk, or is not vouched for. The other way round, a power cut leaves an image that QEMU
//!    does not open. See `bitmaps::grow`.
pub mod bitmaps;
pub mod check;
pub mod create;
mod damage;
mod data_file;
mod deflate;
mod describe;
mod entry;
mod fault;
mod geometry;
mod grow;
pub mod header;
mod inflate;
mod map;
mod pack;
mod protected;
mod records;
mod refcounts;
mod rename;
mod replay;
mod reserve;
mod settle;
mod slices;
pub mod snapshots;
mod space;
mod state;
mod table;
mod zero;

pub use check::{Check, Repair, check, repair};
pub use create::{Create, create};
pub use data_file::DataFile;
pub use geometry::Geometry;
pub use header::{Backing, Compression, Header};
pub use rename::{check_rename, rename_backing};

use crate::error::{Context, Error, Result};
use crate::image::{
    Description, Extent, Holder, Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing,
};
use crate::journal::{Change, Journal};
use crate::range::ByteRange;
use crate::raw;
use crate::storage::Storage;
use bitmaps::{Bits, Carried, Grown, Live};
use state::State;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    /// It will be written to.
    pub writable: bool,
    /// Something is below: what this image does not have is not known to be zeroes.
    pub has_backing: bool,
    /// Memory for slices of tables; the L1 table (at most 32 MiB) and the refcount table (at most
    /// 8 MiB) come on top.
    pub metadata_bytes_max: usize,
}

/// What `info` tells of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// A cluster has 32 subclusters, each of them there or not.
    pub extended_l2: bool,
    /// The image below.
    pub backing: Option<Backing>,
    /// The file that the payload is in, where it is another.
    pub data_file: Option<DataFile>,
    /// Incompatible feature bits.
    pub incompatible_features: u64,
    /// Compatible feature bits.
    pub compatible_features: u64,
    /// Autoclear feature bits.
    pub autoclear_features: u64,
    /// Refcounts may be written late by those who do so; we do not.
    pub lazy_refcounts: bool,
    /// The dirty bit.
    pub dirty: bool,
    /// The corrupt bit.
    pub corrupt: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Persistent bitmaps.
    pub bitmaps: u32,
}

/// An image that is open.
pub struct Qcow2 {
    header: Header,
    /// The external data file, to ask for its holes.
    data: Option<Arc<dyn Storage>>,
    flush_first: bool,
    shared: Arc<Shared>,
}

/// What reservations and settles hold on to.
struct Shared {
    /// As the image was opened: the size is the one below.
    cuts: Geometry,
    /// Bytes of the disk. It changes while nobody is inside.
    size: AtomicU64,
    storage: Arc<dyn Storage>,
    journal: Arc<dyn Journal>,
    writable: bool,
    has_backing: bool,
    /// The incompatible features of the header.
    incompatible: u64,
    damage: OnceLock<String>,
    /// Others after a growth, while nobody is inside.
    bitmaps: RwLock<Live>,
    /// Those of a growth that is not kept yet.
    bitmaps_grown: Mutex<Option<Grown>>,
    /// The payload's file is to show by itself what the guest sees.
    raw_data: bool,
    state: Mutex<State>,
    /// How many settles have ended.
    settles: AtomicU64,
    /// Memory for its tables, in bytes.
    tables_memory_max: u64,
    /// Whether holes are looked for under payload; see `describe`.
    preallocated: OnceLock<bool>,
}

impl Qcow2 {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    ///
    /// `Unsupported` names what is not handled and what to do, `Malformed` the field that is wrong.
    /// Images with the dirty or corrupt bit can be read, not written.
    pub fn open(storage: Arc<dyn Storage>, journal: Arc<dyn Journal>, open: Open) -> Result<Self> {
        let header = read_header(&*storage)?;
        let mut flush_first = open.writable && prepare_writing(&*storage, &header)?;
        let state = State::open(&storage, &header, open)?;
        let tables_memory_max = state.memory(&header) + open.metadata_bytes_max as u64;
        // Last of all that can fail: from here on they are in use.
        let (bitmaps, in_use) = match open.writable {
            true => Live::open(storage.clone(), &header)?,
            false => (Live::none(storage.clone(), &header), false),
        };
        flush_first |= in_use;
        let shared = Shared {
            cuts: header.geometry,
            size: AtomicU64::new(header.geometry.size),
            storage,
            journal,
            writable: open.writable,
            has_backing: open.has_backing,
            incompatible: header.incompatible,
            damage: OnceLock::new(),
            bitmaps: RwLock::new(bitmaps),
            bitmaps_grown: Mutex::new(None),
            tables_memory_max,
            raw_data: header.data_file.as_ref().is_some_and(|data_file| data_file.raw),
            state: Mutex::new(state),
            settles: AtomicU64::new(0),
            preallocated: OnceLock::new(),
        };
        Ok(Self { header, data: None, flush_first, shared: Arc::new(shared) })
    }

    /// With its external data file at hand, `map_thin` knows the holes of that.
    #[must_use]
    pub fn with_data_file(self, data: Arc<dyn Storage>) -> Self {
        Self { data: Some(data), ..self }
    }

    /// What the header said.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The facts for `info`.
    pub fn info(&self) -> Info {
        self.header.info()
    }

    /// The image below, as it is recorded.
    pub fn backing(&self) -> Option<&Backing> {
        self.header.backing.as_ref()
    }

    /// True where the file has to be flushed before the first write of payload: opening cleared
    /// autoclear bits or marked bitmaps as in use: what they vouched for is about to become wrong.
    pub fn flush_first(&self) -> bool {
        self.flush_first
    }

    /// Cuts off what the file was grown by and nothing uses. For a clean close: settle, `recycle`,
    /// settle, then this.
    pub fn trim_end(&self) -> Result<()> {
        match self.shared.writable && self.shared.damage.get().is_none() {
            true => self.shared.lock().space()?.trim_end(),
            false => Ok(()),
        }
    }
}

/// Reads and checks the header of the image in `storage`.
pub fn read_header(storage: &dyn Storage) -> Result<Header> {
    let len = storage.len().context(|| "asking for the file's length")?;
    let read = |wanted: usize| {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(wanted)];
        storage.read_at(0, &mut bytes).context(|| "reading the header")?;
        Ok::<_, Error>(bytes)
    };
    let wanted = Header::len_wanted(&read(512)?)?;
    Header::parse(&read(wanted)?)
}

/// Refuses what must not be written; says whether it changed the header.
fn prepare_writing(storage: &dyn Storage, header: &Header) -> Result<bool> {
    header.check_writable()?;
    let kept = header.autoclear_kept();
    if header.autoclear == kept {
        return Ok(false);
    }
    // Nothing else that a bit vouches for is kept up by us.
    let cleared = storage.write_at(header::AUTOCLEAR_AT, &kept.to_be_bytes());
    cleared.context(|| "clearing the autoclear features in the header")?;
    Ok(true)
}

impl Header {
    /// The facts for `info`.
    pub fn info(&self) -> Info {
        let g = self.geometry;
        Info {
            version: g.version,
            virtual_size: g.size,
            cluster_size: g.cluster_size(),
            refcount_bits: 1 << g.refcount_order,
            compression: self.compression,
            extended_l2: g.extended_l2,
            backing: self.backing.clone(),
            data_file: self.data_file.clone(),
            incompatible_features: self.incompatible,
            compatible_features: self.compatible,
            autoclear_features: self.autoclear,
            lazy_refcounts: self.compatible & header::compatible::LAZY_REFCOUNTS != 0,
            dirty: self.is_dirty(),
            corrupt: self.is_corrupt(),
            snapshots: self.snapshots,
            bitmaps: self.bitmaps.map_or(0, |bitmaps| bitmaps.count),
        }
    }
}

impl Shared {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Ordering::Relaxed), ..self.cuts }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with the tables half changed")
    }

    /// The tables, with the L2 slice of `cluster` in memory, or no L2 table for it.
    ///
    /// A slice is read without the lock: a guest that touches a cold table makes no other one wait.
    fn lock_with(&self, cluster: u64) -> Result<MutexGuard<'_, State>> {
        loop {
            let state = self.lock();
            let Some(missing) = state.missing(cluster)? else { return Ok(state) };
            drop(state);
            let count = self.geometry().slice_bytes() / 8;
            let entries = table::read(&*self.storage, missing.at, count)
                .context(|| format!("reading L2 entries of guest cluster {cluster} at {}", missing.at))?;
            self.lock().arrived(&missing, entries.into_boxed_slice());
        }
    }

    /// What was given room is about to be written.
    fn mark_room(&self, reserve: &Reserve) {
        if let Reserve::Room(reservation) = reserve {
            self.bitmaps().mark(reservation.guest);
        }
    }

    fn bitmaps(&self) -> RwLockReadGuard<'_, Live> {
        self.bitmaps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_inside(&self, guest: ByteRange) -> Result<()> {
        if guest.end <= self.geometry().size && !guest.is_empty() {
            return Ok(());
        }
        let size = self.geometry().size;
        Err(Error::invalid(format!("{guest} ends past the disk ({size} bytes), or is empty")))
    }

    fn check_writable(&self) -> Result<()> {
        match self.writable {
            true => self.refuse_damaged(),
            false => Err(Error::invalid("the image was opened for reading only")),
        }
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.shared.geometry().size
    }

    fn tables_memory_max(&self) -> u64 {
        self.shared.tables_memory_max
    }

    fn map(&self, at: u64, len_max: u64) -> Result<Extent> {
        self.shared.watch(self.shared.map(at, len_max))
    }

    fn map_thin(&self, at: u64, len_max: u64) -> Result<Extent> {
        let extent = self.map(at, len_max)?;
        match (&self.data, extent.place) {
            (Some(data), Place::Data { host }) => raw::thin(&**data, extent.guest, host),
            _ => Ok(extent),
        }
    }

    fn describe(&self, at: u64, len_max: u64) -> Result<Description> {
        let payload = self.data.as_ref().unwrap_or(&self.shared.storage);
        self.shared.describe(&self.header, &**payload, at, len_max)
    }

    fn reserve(&self, guest: ByteRange) -> Result<Reserve> {
        let reserve = self.shared.watch(Shared::reserve(&self.shared, guest))?;
        self.shared.mark_room(&reserve);
        Ok(reserve)
    }

    fn may_wait(&self) -> bool {
        true
    }

    fn reserve_at_once(&self, guest: ByteRange) -> Option<Reservation> {
        let reservation = self.shared.reserve_at_once(guest)?;
        self.shared.bitmaps().mark(reservation.guest);
        Some(reservation)
    }

    fn commit(&self, reservation: Reservation) -> Result<()> {
        self.shared.watch(self.shared.commit(reservation))
    }

    fn zero(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed> {
        let zeroed = self.shared.watch(self.shared.zero(guest, zeroing))?;
        if let Zeroed::Done(guest) | Zeroed::Host { guest, .. } = zeroed {
            self.shared.bitmaps().mark(guest);
        }
        Ok(zeroed)
    }

    fn may_write_zeroes(&self) -> bool {
        self.shared.geometry().version < 3 && self.shared.has_backing
    }

    fn settle(&self, progress: &mut Progress) -> Result<Settle> {
        self.shared.watch(Shared::settle(&self.shared, progress))
    }

    fn damage(&self) -> Option<&str> {
        self.shared.damage.get().map(String::as_str)
    }

    fn close(&self, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        if self.damage().is_none() {
            Shared::store_bitmaps(&self.shared, flush)?;
        }
        self.trim_end()
    }

    fn grow(&self, size: u64, below: u64, flush: &dyn Fn() -> Result<()>) -> Result<ByteRange> {
        self.shared.watch(Shared::grow(&self.shared, size, below, self.data.as_deref(), flush))
    }

    fn keep_size(&self, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        self.shared.watch(Shared::keep_size(&self.shared, flush))
    }

    fn ungrow(&self, size: u64) {
        self.shared.ungrow(size);
    }

    fn bitmap_names(&self) -> Result<Vec<String>> {
        self.shared.bitmaps().names()
    }

    fn bitmap(&self, name: &str) -> Result<Option<Arc<Bits>>> {
        self.shared.bitmaps().bits(name)
    }

    fn bitmaps(&self) -> Result<Vec<Carried>> {
        self.shared.bitmaps().carry()
    }

    fn adopt_bitmaps(&self, bitmaps: Vec<Carried>) -> Result<()> {
        self.shared.bitmaps().adopt(bitmaps)
    }

    fn settles(&self) -> u64 {
        self.shared.settles.load(Ordering::SeqCst)
    }

    fn recycle_of(&self, settles: u64) {
        self.shared.recycle(settles);
    }

    fn replay(&self, changes: &[Change]) -> Result<()> {
        self.shared.replay(changes)
    }

    fn compressible(&self) -> Option<u32> {
        // At most 2 MiB.
        Some(self.shared.geometry().cluster_size() as u32)
    }

    fn reserve_compressed(&self, guest: ByteRange, len: u32) -> Result<Option<Reserve>> {
        let reserve = self.shared.watch(Shared::reserve_compressed(&self.shared, guest, len))?;
        reserve.iter().for_each(|reserve| self.shared.mark_room(reserve));
        Ok(reserve)
    }

    fn deflate(&self, cluster: &[u8], compressed: &mut [u8]) -> Option<usize> {
        deflate::deflate(self.header.compression, cluster, compressed)
    }

    fn inflate(&self, compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
        inflate::inflate(self.header.compression, compressed, cluster)
    }
}

impl Holder for Shared {
    fn let_go(&self, id: u64) {
        let mut state = self.lock();
        if !state.end_settle(id, true) {
            state.drop_reservation(id);
        }
    }
}
