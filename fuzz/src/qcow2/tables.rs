//! qcow2 images with damage of which the right answer is known.
//!
//! ```text
//! done to                    right is
//! nothing                    it opens and reads as it was written
//! one field of the header    refused, and the refusal names the field
//! refcounts, their table     it reads as it was written: nobody who reads needs them
//! an L1 or L2 entry          every guest cluster of other entries reads as it was written
//! the end of the file        so does every one that lies in front of the cut, with its tables
//! ```
//!
//! What is damaged reads as anything or is an error in words. Written to, it may get worse, and no
//! request panics or leaves the disk.
use super::super::support::disk::Disk;
use super::super::support::notes::Notes;
use super::super::support::written::{ImageWriter, Payload, Shape, Written};
use super::build::{SIZE_MAX, cluster_bits, fill, size};
use super::damage::{Damaged, Fault, break_header};
use super::guest::read;
use super::{Act, NOTES, accepted, corruptions, in_words, look_around, open, use_it};
use arbitrary::{Arbitrary, Unstructured};
use formats::qcow2::Qcow2;
use formats::range::ByteRange;
use std::sync::Arc;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    cluster_size: u8,
    refcount_order: u8,
    clusters: u8,
    tail: u8,
    /// Version 2, zstd, something below, extended L2, a snapshot, free clusters in between.
    kind: u8,
    contents: &'a [u8],
    header: Option<(u8, u32)>,
    faults: Vec<Fault>,
    acts: &'a [u8],
}

impl Input<'_> {
    fn shape(&self) -> Shape {
        let has = |bit: u32| self.kind >> bit & 1 == 1;
        let version = if has(0) { 2 } else { 3 };
        let extended = version == 3 && has(3);
        let cluster_bits = if extended { 14 } else { cluster_bits(self.cluster_size).min(16) };
        let snapshot = has(4);
        let refcount_order = match version {
            2 => 4,
            _ if snapshot => 3 + u32::from(self.refcount_order % 4),
            _ => u32::from(self.refcount_order % 7),
        };
        let size = size(cluster_bits, self.clusters, self.tail).min(SIZE_MAX / 3);
        Shape {
            version,
            cluster_bits,
            refcount_order,
            size,
            zstd: version == 3 && has(1),
            below: has(2),
            extended,
            snapshot,
            payload: Payload::Inside,
        }
    }

    fn image(&self, shape: Shape) -> Written {
        let mut writer = ImageWriter::new(shape);
        for (nth, byte) in self.contents.iter().take(200).enumerate() {
            if self.kind >> 5 & 1 == 1 && nth % 3 == 2 {
                writer.garbage();
            }
            fill(&mut writer, *byte);
        }
        writer.finish(&[])
    }
}

/// Makes the image that `data` says, damages and uses it.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let acts: Vec<Act> = input.acts.as_chunks().0.iter().take(20).copied().map(Act::new).collect();
    let shape = input.shape();
    let Written { image: disk, bytes, .. } = input.image(shape);
    let disk = Arc::new(disk);
    if let Some((field, value)) = input.header {
        let word = break_header(&disk, field, value, shape.version, shape.cluster_bits);
        refused(&disk, word);
        return;
    }
    let clusters = shape.size.div_ceil(1 << shape.cluster_bits) as usize;
    let entry_bytes = if shape.extended { 16 } else { 8 };
    let mut damaged = Damaged { disk: &disk, bits: shape.cluster_bits, entry_bytes, known: vec![true; clusters] };
    input.faults.iter().take(8).for_each(|fault| damaged.strike(*fault));
    let known = damaged.known;
    let found = corruptions(&disk);
    let opened = open(&disk, shape.below, false, Arc::new(Notes::new(NOTES)));
    let whole = input.faults.is_empty() || known.iter().all(|known| *known) && !cut(&input.faults);
    assert!(!whole || opened.is_ok(), "{}", opened.err().map(|error| error.one_line()).unwrap_or_default());
    if input.faults.is_empty() && !shape.snapshot {
        let found = found.unwrap_or_else(|error| panic!("{}", error.one_line()));
        assert!(found.is_empty(), "{found:?}");
    }
    let Some(image) = accepted(opened) else { return };
    look_around(&image, &acts);
    compare(&image, &disk, shape, &bytes, &known);
    drop(image);
    if let Some(image) = accepted(open(&disk, shape.below, true, Arc::new(Notes::new(NOTES)))) {
        use_it(&image, &acts);
    }
}

fn cut(faults: &[Fault]) -> bool {
    faults.iter().any(|fault| matches!(fault, Fault::Cut(..)))
}

/// Neither opened nor checked, and the reason has `word`.
fn refused(disk: &Arc<Disk>, word: &str) {
    for writable in [false, true] {
        let Err(error) = open(disk, false, writable, Arc::new(Notes::new(NOTES))) else { panic!("opened: {word}") };
        in_words(&error);
        assert!(error.one_line().contains(word), "{} does not name {word}", error.one_line());
    }
    assert!(corruptions(disk).is_err(), "checked: {word}");
}

/// Every cluster that is known reads as it was written; the others as anything, or not.
fn compare(image: &Qcow2, disk: &Disk, shape: Shape, bytes: &[u8], known: &[bool]) {
    for (nth, written) in bytes.chunks(1 << shape.cluster_bits).enumerate() {
        let start = (nth as u64) << shape.cluster_bits;
        match read(image, disk, shape.below, ByteRange { start, end: start + written.len() as u64 }) {
            Ok(found) => assert!(!known[nth] || found == written, "guest cluster {nth} reads as something else"),
            Err(error) => {
                in_words(&error);
                assert!(!known[nth], "guest cluster {nth}: {}", error.one_line());
            }
        }
    }
}
