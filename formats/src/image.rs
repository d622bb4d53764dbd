//! What every disk image format owes the engine: where do these guest bytes live?
//!
//! ```text
//! read    map ─► the caller reads there
//! write   reserve ─► (fill around the payload) ─► the caller writes there ─► commit
//!         or, compressed, deflate ─► reserve_compressed ─► …
//! zero    zero ─► done, or a place to punch, or "write zeroes yourself"
//! flush   settle ─► Flush ─► the caller flushes the file ─► settle ─► … ─► Done
//!
//! *The file* is the one that has the image's payload, and its tables too unless the two are apart.
//! ```
use crate::error::{Error, Result};
use crate::journal::Change;
use crate::qcow2::bitmaps::{Bits, Carried};
use crate::range::ByteRange;
use std::sync::Arc;

/// One run of guest bytes, and what this image alone says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The guest bytes that the answer is about: from the asked byte on, never empty.
    pub guest: ByteRange,
    /// Where they are.
    pub place: Place,
}

/// Where a run of guest bytes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// As they are, from `host` on in the file that has the payload. May reach past its end: zeroes.
    Data {
        /// Offset in the file that has the payload.
        host: u64,
    },
    /// They read as zeroes, whatever the layers below have.
    Zero,
    /// This image has nothing of them: the layer below decides.
    Absent,
    /// Part of one compressed cluster.
    Compressed {
        /// Offset in the file of the cluster's compressed bytes.
        host: u64,
        /// How many bytes to read at most; the file may end before.
        len: u32,
        /// Where in the inflated cluster the extent begins.
        skip: u32,
        /// Length of the inflated cluster.
        inflated: u32,
    },
}

/// One run of guest bytes in the words of block status: what this image alone says of it, and what
/// the file system adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// The guest bytes that it is about: from the asked byte on, never empty.
    pub guest: ByteRange,
    /// They have payload in the image's file.
    pub data: bool,
    /// They are known to read as zeroes. With neither this nor `data`, the layer below decides.
    pub zero: bool,
    /// They are compressed.
    pub compressed: bool,
    /// Offset in the file of the place that they have, one that is only set aside included.
    pub host: Option<u64>,
}

impl From<Extent> for Description {
    fn from(extent: Extent) -> Self {
        let nothing = Self { guest: extent.guest, data: false, zero: false, compressed: false, host: None };
        match extent.place {
            Place::Data { host } => Self { data: true, host: Some(host), ..nothing },
            Place::Zero => Self { zero: true, ..nothing },
            Place::Absent => nothing,
            Place::Compressed { .. } => Self { data: true, compressed: true, ..nothing },
        }
    }
}

/// Where a guest write goes, before the image says so.
///
/// Dropped without `Image::commit`, it leaves the image as it was.
#[must_use]
#[derive(Debug)]
pub struct Reservation {
    /// The guest bytes it covers: a prefix of what was asked for, never empty.
    pub guest: ByteRange,
    /// Where the payload goes in the file that has it.
    pub host: u64,
    /// Guest bytes before and behind the payload that have to be brought to the new place as the
    /// whole chain reads them now. Their place is at the same distance from `host` as their guest
    /// offset is from `guest.start`. Cut to the disk's size.
    pub fill: [Option<ByteRange>; 2],
    /// True where the new place around the payload reads as zeroes already.
    pub zeroed: bool,
    /// What gives the room back when nobody commits.
    pub hold: Option<Hold>,
}

/// Gives reserved room back when it is dropped.
pub struct Hold {
    holder: Arc<dyn Holder>,
    id: u64,
}

/// Who holds reserved room.
pub trait Holder: Send + Sync {
    /// The reservation `id` is over, committed or not.
    fn let_go(&self, id: u64);
}

impl Hold {
    /// A hold on the reservation `id` of `holder`.
    pub fn new(holder: Arc<dyn Holder>, id: u64) -> Self {
        Self { holder, id }
    }

    /// Which reservation.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holder.let_go(self.id);
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("id", &self.id).finish_non_exhaustive()
    }
}

/// An image's answer to a wish for room.
#[must_use]
#[derive(Debug)]
pub enum Reserve {
    /// Here.
    Room(Reservation),
    /// Another write is making this very place: ask again when it is done.
    Busy,
    /// Too much is held in memory: settle, then ask again.
    Settle,
}

/// What a caller wants of zeroed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// They read as zeroes; their space may be given back.
    Unmap,
    /// They read as zeroes; space that is allocated stays so.
    Keep,
    /// A discard: whole clusters, or subclusters, read as zeroes; what cannot be given back may stay
    /// as it is.
    Discard,
}

/// An image's answer to a wish for zeroes, for a prefix of what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// These bytes are dealt with.
    Done(ByteRange),
    /// Zero these bytes in the file from `host` on: they are the image's content there.
    Host {
        /// The guest bytes.
        guest: ByteRange,
        /// Where they are in the file.
        host: u64,
    },
    /// Write zeroes to these bytes like any payload.
    Write(ByteRange),
    /// Another write is under way there: ask again when it is done.
    Busy,
    /// Too much is held in memory: settle, then ask again.
    Settle,
}

/// What a settle needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Flush the image's file, then call `settle` again with the same progress.
    Flush,
    /// The same with the file that has the payload, where that is another one.
    FlushPayload,
    /// Everything that was committed before the first call is durable.
    Done,
    /// Somebody else is settling: ask again when they are done.
    Busy,
}

/// How far one settle has come. Start with `Default`.
///
/// Dropped before `Settle::Done`, the settle counts as failed and what it wrote is written again.
#[derive(Debug, Default)]
pub struct Progress {
    /// In the image's own numbering; zero is the start.
    pub stage: u32,
    /// What ends the settle when it is dropped.
    pub hold: Option<Hold>,
}

/// A disk image: a map, never a pipe. It moves metadata alone; payload is its caller's.
///
/// Calls do not wait, except for at most one read of a table that is not in memory. They come from
/// several threads. Everything between `reserve` and `commit` or drop of one reservation, and
/// between a first `settle` and its `Done`, may interleave with any other call.
pub trait Image: Send + Sync {
    /// Size of the disk in bytes. It changes by `grow` and `ungrow` alone.
    fn size(&self) -> u64;

    /// The same as whoever opens the image by its name alone sees it: a raw file may be longer than the disk that is seen
    /// of it here.
    fn size_by_itself(&self) -> Result<u64> {
        Ok(self.size())
    }

    /// Memory that its tables take at most, in bytes; those that are left stay in the file.
    fn tables_memory_max(&self) -> u64 {
        0
    }

    /// The run that starts at `at`, cut to `len_max`. `at` is inside the disk, `len_max` at least 1.
    fn map(&self, at: u64, len_max: u64) -> Result<Extent>;

    /// Like `map`, and also asks the file system where data is a hole. Slower.
    fn map_thin(&self, at: u64, len_max: u64) -> Result<Extent> {
        self.map(at, len_max)
    }

    /// Like `map_thin`, with all that is known: for telling, not for reading.
    fn describe(&self, at: u64, len_max: u64) -> Result<Description> {
        self.map_thin(at, len_max).map(Description::from)
    }

    /// Room for a write of `guest`; may cover less than asked, never nothing.
    ///
    /// The payload is written at the returned place first and `commit` makes it the image's
    /// content, so no reader ever sees what was there before.
    fn reserve(&self, guest: ByteRange) -> Result<Reserve>;

    /// True where a call may wait: for a table that is not in memory, or for whoever has the tables and waits for one.
    fn may_wait(&self) -> bool {
        false
    }

    /// The same as `reserve` where it needs no wait at all, and `commit` and the drop need none either: the bytes have
    /// their place, and everything that says so is in memory and in nobody's hands. `None` where it may need one.
    fn reserve_at_once(&self, _guest: ByteRange) -> Option<Reservation> {
        None
    }

    /// Makes a reservation's payload the image's content, and notes it in the journal.
    fn commit(&self, reservation: Reservation) -> Result<()>;

    /// Makes a prefix of `guest` read as zeroes, or says how its caller can.
    fn zero(&self, guest: ByteRange, zeroing: Zeroing) -> Result<Zeroed>;

    /// True where `zero` may ask for zeroes to be written to whole clusters: somebody below has them, and no entry
    /// can say that they are zeroes.
    fn may_write_zeroes(&self) -> bool {
        false
    }

    /// Makes metadata durable, one stage a call, in an order that a power cut survives.
    fn settle(&self, progress: &mut Progress) -> Result<Settle>;

    /// Makes room for a disk of `size` bytes, more than it has, and has them from then on: up to `keep_size` in memory
    /// alone. `below` is how large the image below is, 0 where there is none. Says which of the new bytes the caller has
    /// to zero before anybody sees them.
    ///
    /// Everything is settled and nobody is inside; `flush` makes all of the image's files durable, and waits. After an
    /// error the image is as it was, or damaged.
    fn grow(&self, _size: u64, _below: u64, _flush: &dyn Fn() -> Result<()>) -> Result<ByteRange> {
        Err(Error::unsupported("an image of this format cannot grow"))
    }

    /// The disk keeps the size that `grow` gave it: after a restart too, where the image itself says how large it is.
    /// Nobody is inside; what was to be zeroed is, and durable.
    fn keep_size(&self, _flush: &dyn Fn() -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// A growth that was not kept comes to nothing: the disk has `size` bytes again, as before.
    fn ungrow(&self, _size: u64) {}

    /// Names of the bitmaps of what was written that can be looked at while the image is in use: the
    /// consistent ones.
    fn bitmap_names(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// The bits of the one of this name, where it is one of these; they go on changing.
    fn bitmap(&self, _name: &str) -> Result<Option<Arc<Bits>>> {
        Ok(None)
    }

    /// The consistent bitmaps of what was written, as they are now. Nobody writes meanwhile.
    fn bitmaps(&self) -> Result<Vec<Carried>> {
        Ok(Vec::new())
    }

    /// Goes on with the bitmaps of another image that has the same contents: they are stored at the
    /// close. Nobody writes meanwhile.
    fn adopt_bitmaps(&self, _bitmaps: Vec<Carried>) -> Result<()> {
        Err(Error::unsupported("this format has no bitmaps: they are dropped"))
    }

    /// How many settles have ended. Never waits.
    fn settles(&self) -> u64 {
        0
    }

    /// Space that the first so many `settles` gave up may be used again: the caller knows that no
    /// operation begun before they ended can still be using it.
    fn recycle_of(&self, _settles: u64) {}

    /// The same of all settles.
    fn recycle(&self) {
        self.recycle_of(u64::MAX);
    }

    /// Stores what is kept in memory up to the end, and leaves the file no longer than it has to be.
    /// Called when everything is settled and nobody will use the image any more; `flush` makes the
    /// file durable.
    fn close(&self, _flush: &dyn Fn() -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// Takes back what the journal kept through a kill, in the order in which it was noted.
    fn replay(&self, changes: &[Change]) -> Result<()> {
        match changes {
            [] => Ok(()),
            _ => Err(Error::malformed("the journal has changes for an image that keeps none")),
        }
    }

    /// Bytes of a cluster that can be compressed, where the format has such.
    fn compressible(&self) -> Option<u32> {
        None
    }

    /// Room for one whole cluster, the disk's last one cut to the disk, that was compressed to `len`
    /// bytes: as `reserve`, of any alignment, so that it is written through the page cache. `None` where
    /// this cluster can only be written as it is.
    fn reserve_compressed(&self, _guest: ByteRange, _len: u32) -> Result<Option<Reserve>> {
        Ok(None)
    }

    /// Compresses one whole cluster, zeroes behind the disk's end included; says to how many bytes.
    /// `None` where it does not shrink to what fits.
    fn deflate(&self, _cluster: &[u8], _compressed: &mut [u8]) -> Option<usize> {
        None
    }

    /// What was found wrong with the image while it was in use: since then it is not written any more.
    fn damage(&self) -> Option<&str> {
        None
    }

    /// Inflates one compressed cluster into `cluster`, whose length is the extent's `inflated`.
    fn inflate(&self, _compressed: &[u8], _cluster: &mut [u8]) -> Result<()> {
        Err(Error::invalid("this format has no compressed clusters"))
    }
}
