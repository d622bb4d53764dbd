//! qcow2: headers and tables of any bytes, images written from the specification, and what may have
//! been done to them.
//!
//! ```text
//! any image that is opened       what is inside the disk maps to an extent inside the disk, or is an
//!                                error in words; what is outside is refused
//! one written right              opens, has no corruptions, reads as what was written
//! one that a check finds whole   stays so and reads as what its guest wrote: after a settle and a new
//!                                start, after a kill with its journal, after a power cut
//! ```
mod build;
mod damage;
mod guest;
pub mod tables;

use super::support::disk::Disk;
use super::support::notes::Notes;
use arbitrary::{Arbitrary, Unstructured};
use build::Build;
use formats::error::{Error, Kind};
use formats::image::{Image, Place, Settle, Zeroing};
use formats::qcow2::{Open, Qcow2, check};
use formats::range::ByteRange;
use formats::storage::Storage;
use guest::Guest;
use std::sync::Arc;

/// Notes that fit before a settle is due.
const NOTES: usize = 64;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    image: Bytes<'a>,
    /// An `Act` in each eight bytes.
    acts: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Bytes<'a> {
    Built(Build<'a>),
    Any(&'a [u8]),
}

/// What a guest or its host does; places are counted in bytes.
#[derive(Clone, Copy, Debug)]
enum Act {
    Look(u64, u32),
    Write(u32, u16),
    /// Room is taken, and what follows happens before it is used.
    Reserve(u32, u16),
    /// The oldest room is used, or dropped.
    End(bool),
    Zero(u32, u32, Zeroing),
    Settle,
    /// The image is closed and opened.
    Close,
    /// The process ends; the journal is left.
    Kill,
    /// The power goes: the number says what of the unflushed writes is in the file.
    PowerCut(u8),
}

impl Act {
    fn new(bytes: [u8; 8]) -> Self {
        let [kind, a, b, c, d, e, f, _] = bytes;
        let (at, len) = (u32::from_be_bytes([0, a, b, c]), u16::from_be_bytes([d, e]));
        match kind % 16 {
            0 => Self::Look(u64::from(at) << (f % 48), len.into()),
            1..=4 => Self::Write(at, len),
            5 | 6 => Self::Reserve(at, len),
            7 | 8 => Self::End(f % 4 > 0),
            9 => Self::Zero(at, len.into(), Zeroing::Unmap),
            10 => Self::Zero(at, len.into(), Zeroing::Keep),
            11 => Self::Zero(at, len.into(), Zeroing::Discard),
            12 => Self::Settle,
            13 => Self::Close,
            14 => Self::Kill,
            _ => Self::PowerCut(f),
        }
    }
}

/// Makes the image that `data` says, and uses it.
pub fn run(data: &[u8]) {
    let Ok(Input { image, acts }) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let acts: Vec<Act> = acts.as_chunks().0.iter().take(40).copied().map(Act::new).collect();
    let (disk, below, right) = match image {
        Bytes::Built(build) => {
            let (disk, guest) = build.image();
            (disk, build.below, guest)
        }
        Bytes::Any(bytes) => (Disk::with(bytes), false, None),
    };
    let disk = Arc::new(disk);
    let whole = is_whole(&disk);
    assert!(right.is_none() || whole, "an image that was written right has no corruptions");
    let Some(image) = accepted(open(&disk, below, false, Arc::new(Notes::new(NOTES)))) else {
        assert!(!whole, "what can be checked can be read");
        return;
    };
    look_around(&image, &acts);
    let told = (image.size() <= build::SIZE_MAX).then(|| guest::read_all(&image, &disk, below));
    if let Some(right) = &right {
        assert!(told.as_ref().is_some_and(|told| told.as_ref().ok() == Some(right)), "it reads as it was written");
    }
    drop(image);
    let notes = Arc::new(Notes::new(NOTES));
    let Some(image) = accepted(open(&disk, below, true, notes.clone())) else {
        assert!(right.is_none(), "an image that was written right can be written to");
        return;
    };
    match told {
        // Where payload is in another file, nothing is known of that.
        Some(Ok(bytes)) if whole && image.header().data_file.is_none() => {
            Guest::new(disk, image, notes, below, bytes, right.is_some()).live(&acts)
        }
        _ => use_it(&image, &acts),
    }
}

fn open(disk: &Arc<Disk>, has_backing: bool, writable: bool, notes: Arc<Notes>) -> Result<Qcow2, Error> {
    Qcow2::open(disk.clone(), notes, Open { writable, has_backing, metadata_bytes_max: 1 << 14 })
}

/// The image, or `None` where it was refused with a reason.
fn accepted(opened: Result<Qcow2, Error>) -> Option<Qcow2> {
    opened.map_err(|error| in_words(&error)).ok()
}

fn in_words(error: &Error) {
    assert!(error.one_line().contains(' ') && !error.one_line().contains('\0'), "{error}");
}

/// True where a check finds nothing that is wrong, leaks apart.
fn is_whole(disk: &Arc<Disk>) -> bool {
    corruptions(disk).is_ok_and(|found| found.is_empty())
}

/// What a check finds wrong, leaks apart.
fn corruptions(disk: &Arc<Disk>) -> Result<Vec<String>, Error> {
    let storage: Arc<dyn Storage> = disk.clone();
    let mut found = check(&*storage).inspect_err(in_words)?;
    assert!(found.compressed_clusters <= found.allocated_clusters);
    // Where entries of one view shared a cluster and one has moved away, the other's flag stays off: that costs a
    // needless copy, nothing worse.
    let harmless = "the copied flag is not set, and its refcount is 1";
    found.problems.retain(|problem| !problem.starts_with("leak:") && !problem.ends_with(harmless));
    assert!(found.problems.len() as u64 <= found.corruptions);
    Ok(found.problems)
}

fn look_around(image: &Qcow2, acts: &[Act]) {
    let size = image.size();
    look(image, 0, u64::MAX);
    look(image, size.saturating_sub(1), 1);
    for act in acts {
        if let Act::Look(at, len) = act {
            look(image, *at, u64::from(*len).max(1));
            if size > 0 {
                look(image, at % size, u64::from(*len).max(1));
            }
        }
    }
    assert!(image.map(size, 1).is_err() && image.map(u64::MAX, u64::MAX).is_err());
}

/// Inside the disk an extent that is not empty and inside what was asked; outside refused.
fn look(image: &Qcow2, at: u64, len_max: u64) {
    match image.map(at, len_max) {
        Ok(extent) => {
            let end = image.size().min(at.saturating_add(len_max));
            assert!(at < image.size(), "outside");
            assert!(extent.guest.start == at && extent.guest.end <= end && !extent.guest.is_empty(), "{extent:?}");
            if let Place::Compressed { len, skip, inflated, .. } = extent.place {
                assert!(u64::from(inflated) == image.info().cluster_size && len <= 4 << 20);
                assert!(u64::from(skip) + extent.guest.len() <= u64::from(inflated));
            }
        }
        Err(error) => {
            in_words(&error);
            assert!(at >= image.size() || error.kind() != Kind::Invalid, "{error}");
        }
    }
}

/// Uses an image of which nothing is known: errors are fine, nonsense is not.
fn use_it(image: &Qcow2, acts: &[Act]) {
    let size = image.size();
    let outside = ByteRange { start: size, end: size + 1 };
    assert!(image.reserve(outside).is_err() && image.zero(outside, Zeroing::Unmap).is_err());
    for act in acts {
        let place = |at: u32, len: u64| {
            let start = u64::from(at).checked_rem(size)?;
            Some(ByteRange { start, end: size.min(start + len.max(1)) })
        };
        match *act {
            Act::Write(at, len) | Act::Reserve(at, len) => {
                let Some(range) = place(at, len.into()) else { return };
                if let Ok(formats::image::Reserve::Room(room)) = image.reserve(range) {
                    assert!(room.guest.start == range.start && room.guest.end <= range.end && !room.guest.is_empty());
                    if let Err(error) = image.commit(room) {
                        in_words(&error);
                    }
                }
            }
            Act::Zero(at, len, wish) => {
                if let Some(range) = place(at, len.into())
                    && let Err(error) = image.zero(range, wish)
                {
                    in_words(&error);
                }
            }
            Act::Look(at, len) => look(image, at, u64::from(len).max(1)),
            _ => {
                let mut progress = formats::image::Progress::default();
                while let Ok(Settle::Flush | Settle::FlushPayload) = image.settle(&mut progress) {}
                drop(progress);
                image.recycle();
            }
        }
    }
    let _ = image.close(&|| Ok(()));
}
