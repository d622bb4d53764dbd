//! A snapshot under guests: a kill and a power cut at every step leave the old disk or the new overlay as the truth, and
//! whichever that is has everything that was promised.
use super::files::{Dice, Files, SECTOR, SimIo};
use super::guest::{Guest, fill, value_of};
use super::history::{History, Trust};
use super::kept::journals;
use crate::chain::{Chain, Layer};
use crate::disk::{DataFile, Disk, Tools};
use crate::export::gate::{Gate, Route};
use crate::fault::{Fault, plant};
use crate::io::{Arena, File, Io, Token, Wait, Waker, Words};
use crate::journal::WordJournal;
use crate::pivot::{New, RecordFile, Replace, Step};
use formats::image::{Image, Progress, Settle};
use formats::journal::{Forgetful, Journal};
use formats::qcow2::{Backing, Create, Open, Qcow2, create};
use formats::raw::Raw;
use formats::record::{Record, SLOT_LEN};
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const DISK: u64 = 48 << 10;
const GUESTS: u64 = 3;
const BOOT: [u64; 2] = [7, 7];
/// How many moves a crash is looked for after the end of the snapshot.
const BEHIND: u64 = 40;

/// An image that can be written: its file, and its journal's memory.
struct ImageFile {
    file: u32,
    words: Arc<Words>,
}

struct World {
    files: Files,
    base: u32,
    old: ImageFile,
    overlay: ImageFile,
    record: u32,
    gate: Arc<Gate>,
    guests: Vec<Guest>,
    history: History,
    replace: Option<Replace>,
    control: SimIo,
    arena: Arena,
    waker: Waker,
    dice: Dice,
}

impl World {
    fn new(seed: u64) -> Self {
        let (files, mut dice) = (Files::default(), Dice::new(seed));
        let mut bytes = vec![0; DISK as usize];
        bytes.chunks_mut(SECTOR).zip(0xba5e_0000..).for_each(|(sector, value)| fill(sector, value));
        let history = History::new(bytes.chunks(SECTOR).map(value_of));
        let base = files.add(bytes);
        let [old, overlay] = journals().map(|words| ImageFile { file: files.add(Vec::new()), words });
        make(&files, old.file, "base", "raw", &mut dice);
        let record = files.add(first_record(&mut dice));
        files.sync();
        let disk = open(&files, &[&old], base);
        Self {
            gate: Arc::new(Gate::new(Route { disk, mirror: None })),
            guests: (0..GUESTS).map(|number| Guest::new(&files, number + 1, seed, 0, u32::MAX)).collect(),
            replace: None,
            control: SimIo::new(&files, seed ^ 0xc0, 0),
            arena: Arena::new(1 << 20),
            waker: Waker::simulated(9),
            files,
            base,
            old,
            overlay,
            record,
            history,
            dice,
        }
    }

    /// Guests alone, then the snapshot too, up to a while after its end or to a crash after so many steps. How many steps
    /// that were; `None` where it crashed.
    fn run(&mut self, crash: Option<u64>) -> Option<u64> {
        (0..200).for_each(|_| self.step_guest());
        self.begin();
        let mut over = None;
        for step in 0..20_000 {
            if crash == Some(step) {
                return None;
            }
            if over.is_some_and(|over| step == over + BEHIND) {
                return Some(step);
            }
            match self.dice.one_in(3) {
                true if over.is_none() && self.step_snapshot() => over = Some(step),
                true => {}
                false => self.step_guest(),
            }
        }
        panic!("it does not come to an end");
    }

    /// As the desk begins one: the overlay is made, and flushed by nobody.
    fn begin(&mut self) {
        make(&self.files, self.overlay.file, "old", "qcow2", &mut self.dice);
        let disk = open(&self.files, &[&self.overlay, &self.old], self.base);
        let (record, file) = (naming("overlay"), self.record_file());
        let new = New::Overlay(disk, record);
        self.replace = Some(Replace::new(Arc::clone(&self.gate), file, new, Duration::from_secs(60)));
    }

    /// True where it is over.
    fn step_snapshot(&mut self) -> bool {
        let Some(replace) = &mut self.replace else { return true };
        let mut done = Vec::new();
        self.control.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut self.control, arena: &self.arena, waker: &self.waker };
        let mut last = Step::Busy;
        for completion in done {
            last = replace.complete(&mut tools, Token(0), completion);
        }
        if !matches!(last, Step::Done(_)) {
            last = replace.step(&mut tools, Token(0));
        }
        let Step::Done(outcome) = last else { return false };
        outcome.expect("nothing fails here");
        self.replace = None;
        true
    }

    fn step_guest(&mut self) {
        let number = self.dice.roll(GUESTS) as usize;
        self.guests[number].step(&self.gate, &mut self.history, &mut self.dice);
    }

    fn record_file(&self) -> RecordFile {
        let mut bytes = vec![0; 2 * SLOT_LEN];
        self.files.lock()[self.record as usize].read(0, &mut bytes);
        let newest = Record::newest(&bytes).expect("one slot is whole");
        RecordFile::new(File::simulated(self.record), PathBuf::new(), newest)
    }

    /// The process is gone, or the power too. What is served then has everything; true where that is the overlay.
    fn crash(mut self, power: bool) -> bool {
        self.control.abandon();
        self.guests.drain(..).for_each(Guest::die);
        self.replace.take().into_iter().for_each(std::mem::forget);
        let mut trust = Trust::AnsweredBefore(self.history.tick());
        if power {
            self.files.cut_power(&mut self.dice);
            trust = Trust::Flushed;
            for image in [&self.old, &self.overlay] {
                image.words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            }
        }
        let truth = self.record_file().newest().map_or("old".to_owned(), |record| record.truth.clone());
        assert!(["old", "overlay"].contains(&truth.as_str()), "the truth is {truth}");
        let on_overlay = truth == "overlay";
        let images = if on_overlay { &[&self.overlay, &self.old][..] } else { &[&self.old] };
        let bytes = self.files.read_disk(&open(&self.files, images, self.base));
        for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
            let value = value_of(bytes);
            let described = || self.history.describe(sector);
            assert!(self.history.allows(sector, value, trust), "sector {sector} holds {value:x}: {}", described());
        }
        on_overlay
    }
}

fn make(files: &Files, file: u32, below: &str, format: &str, dice: &mut Dice) {
    let backing = Some(Backing { name: below.into(), format: Some(format.into()) });
    let cluster_bits = 9 + dice.roll(4) as u32;
    create(&*files.storage(file), &Create { cluster_bits, backing, ..Create::new(DISK) }).expect("valid options");
}

/// Its text is longer than a sector, so its writing can be cut short.
fn naming(truth: &str) -> Record {
    let (origin, format) = ("old".to_owned(), "qcow2".to_owned());
    Record { generation: 0, export: "vda".repeat(500), origin, truth: truth.into(), format, size: DISK }
}

/// Blank, or naming the old disk since an earlier life, which ended before both slots did.
fn first_record(dice: &mut Dice) -> Vec<u8> {
    if dice.one_in(2) {
        return vec![0; 2 * SLOT_LEN];
    }
    let slots = [(1, "what was before"), (2, "old")].map(|(generation, truth)| Record { generation, ..naming(truth) });
    slots.iter().flat_map(|record| record.encode().expect("a record that fits")).collect()
}

/// As the daemon opens a chain of images on the base: the first is written, and what a kill left of it comes first; of
/// the others nobody looks at the journals.
fn open(files: &Files, images: &[&ImageFile], base: u32) -> Arc<Disk> {
    let qcow2 = |image: &ImageFile, writable: bool, journal: Arc<dyn Journal>| {
        let open = Open { writable, has_backing: true, metadata_bytes_max: 1 << 20 };
        Qcow2::open(files.storage(image.file), journal, open).expect("an image that can be opened")
    };
    let layer = |image: Box<dyn Image>, number: u32, format: &'static str| {
        let file = DataFile::buffered(File::simulated(number));
        Arc::new(Layer { image, file, path: format!("file{number}").into(), format, apart: None })
    };
    let top = images[0];
    let left = WordJournal::left_behind(&top.words, BOOT);
    if !left.is_empty() {
        let recovered = qcow2(top, true, Arc::new(Forgetful));
        recovered.replay(&left).expect("the journal's own notes");
        let mut progress = Progress::default();
        while recovered.settle(&mut progress).expect("a valid image") != Settle::Done {
            files.sync_one(top.file);
        }
    }
    let journal: Arc<dyn Journal> = Arc::new(WordJournal::new(Arc::clone(&top.words), BOOT, (0, u64::from(top.file))));
    let top = layer(Box::new(qcow2(top, true, journal)), top.file, "qcow2");
    let others =
        images[1..].iter().map(|image| layer(Box::new(qcow2(image, false, Arc::new(Forgetful))), image.file, "qcow2"));
    let base = layer(Box::new(Raw::new(files.storage(base), DISK)), base, "raw");
    let layers = std::iter::once(top).chain(others).chain([base]).collect();
    Arc::new(Disk::new(Chain::new(layers), false))
}

/// A kill and a power cut at every step; how often each side was the truth.
fn crash_at_every_step(seed: u64) -> [u64; 2] {
    let mut sides = [0; 2];
    for power in [false, true] {
        let mut world = World::new(seed);
        let steps = world.run(None).expect("nobody kills it");
        assert!(world.crash(power), "it was answered");
        for step in 0..steps {
            let mut world = World::new(seed);
            assert!(world.run(Some(step)).is_none());
            sides[usize::from(world.crash(power))] += 1;
        }
    }
    sides
}

#[test]
fn a_crash_at_every_step_of_a_snapshot_leaves_one_truth() {
    for seed in 1..=8 {
        let sides = crash_at_every_step(seed);
        assert!(sides.iter().all(|count| *count > 10), "{sides:?}");
    }
}

fn assert_caught(fault: Fault) {
    plant(Some(fault));
    let outcome = catch_unwind(|| (1..=8).map(crash_at_every_step).count());
    plant(None);
    assert!(outcome.is_err(), "{fault:?} is not seen: the simulator is too tame to be trusted");
}

#[test]
fn a_snapshot_recorded_before_the_disk_below_is_settled_is_caught() {
    assert_caught(Fault::RecordBeforeFlush);
}

/// The overlay was flushed by nobody before the record named it: a power cut left an empty file for the truth. No test
/// cut the power.
#[test]
fn a_snapshot_recorded_before_its_overlay_is_durable_is_caught() {
    assert_caught(Fault::RecordBeforeOverlay);
}

#[test]
fn a_snapshot_that_guests_write_to_before_it_is_recorded_is_caught() {
    assert_caught(Fault::SwitchBeforeRecord);
}

#[test]
fn a_snapshot_that_overwrites_the_slot_that_counts_is_caught() {
    assert_caught(Fault::OverwriteTheNewestSlot);
}
