//! A disk that grows while guests write to it, over a longer one: a kill at every step leaves the old size or the new one,
//! every write that was answered, and zeroes in what is new.
use super::files::{Dice, Files, SimIo};
use crate::chain::{Chain, Layer};
use crate::disk::{DataFile, Disk, Status, Task, Tools};
use crate::export::gate::{Gate, Route};
use crate::export::request::{Action, GuestRequest};
use crate::fault::{Fault, plant};
use crate::io::{Arena, Buffer, File, Io, Token, Wait, Waker, Words};
use crate::journal::{WORDS, WordJournal};
use crate::pivot::{New, RecordFile, Replace, Step};
use formats::image::{Image, Progress, Settle};
use formats::journal::{Forgetful, Journal};
use formats::qcow2::{Backing, Create, Open, Qcow2, create, read_header};
use formats::range::ByteRange;
use formats::raw::Raw;
use formats::record::SLOT_LEN;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Duration;

const GUESTS: usize = 3;
const SECTOR: u64 = 512;
/// What one guest has of the disk, which is not a multiple of a cluster.
const PART: u64 = 21 << 9;
const OLD: u64 = PART * GUESTS as u64;
const NEW: u64 = 5 * OLD;
const BELOW: u64 = 3 * OLD;
const BOOT: [u64; 2] = [1, 2];

/// One guest, which writes one thing after the other to its part.
struct Guest {
    io: SimIo,
    request: Option<GuestRequest>,
    range: ByteRange,
    byte: u8,
}

struct World {
    files: Files,
    image: u32,
    base: u32,
    words: Arc<Words>,
    disk: Arc<Disk>,
    gate: Arc<Gate>,
    guests: Vec<Guest>,
    replace: Option<Replace>,
    control: SimIo,
    arena: Arena,
    waker: Waker,
    dice: Dice,
    /// What each byte is, by the answers.
    model: Vec<u8>,
    answered: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let (files, mut dice) = (Files::default(), Dice::new(seed));
        let (image, base) = (files.add(Vec::new()), files.add(vec![0xbb; BELOW as usize]));
        let backing = Some(Backing { name: "base".into(), format: Some("raw".into()) });
        let cluster_bits = 9 + dice.roll(5) as u32;
        create(&*files.storage(image), &Create { cluster_bits, backing, ..Create::new(OLD) }).expect("valid options");
        files.sync();
        let words = Arc::new(Words::in_memory(WORDS));
        let disk = open(&files, image, base, &words);
        let gate = Arc::new(Gate::new(Route { disk: Arc::clone(&disk), mirror: None }));
        let record =
            RecordFile::new(File::simulated(files.add(vec![0; 2 * SLOT_LEN])), std::path::PathBuf::new(), None);
        let replace = Replace::new(Arc::clone(&gate), record, New::Grown(NEW, None), Duration::from_secs(60));
        let guest = |number: u64| Guest {
            io: SimIo::new(&files, seed ^ number, 0),
            request: None,
            range: ByteRange::default(),
            byte: 0,
        };
        Self {
            guests: (1..=GUESTS as u64).map(guest).collect(),
            control: SimIo::new(&files, seed ^ 0xc0, 0),
            arena: Arena::new(1 << 20),
            waker: Waker::simulated(9),
            model: vec![0xbb; OLD as usize],
            replace: Some(replace),
            answered: 0,
            files,
            image,
            base,
            words,
            disk,
            gate,
            dice,
        }
    }

    /// Guests alone, then the growth too, up to a while after its end or to a kill after so many steps of it. How many
    /// steps that were; `None` where it was killed.
    fn run(&mut self, kill: Option<u64>) -> Option<u64> {
        (0..200).for_each(|_| self.step_guest());
        for step in 0..20_000 {
            if kill == Some(step) {
                return None;
            }
            match self.dice.one_in(3) {
                true if self.step_growth() => {
                    let answered = self.answered;
                    (0..200).for_each(|_| self.step_guest());
                    assert!(self.answered > answered, "the gate is open");
                    return Some(step);
                }
                true => {}
                false => self.step_guest(),
            }
        }
        panic!("it does not come to an end");
    }

    /// True where it is over.
    fn step_growth(&mut self) -> bool {
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
        match last {
            Step::Busy => false,
            Step::Done(outcome) => {
                outcome.expect("nothing fails here");
                self.replace = None;
                true
            }
        }
    }

    fn step_guest(&mut self) {
        let number = self.dice.roll(GUESTS as u64);
        let guest = &mut self.guests[number as usize];
        let mut done = Vec::new();
        guest.io.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut guest.io, arena: &self.arena, waker: &self.waker };
        let request = guest.request.get_or_insert_with(|| {
            let first = self.dice.roll(PART / SECTOR);
            let count = 1 + self.dice.roll(PART / SECTOR - first);
            let start = number * PART + first * SECTOR;
            guest.range = ByteRange { start, end: start + count * SECTOR };
            guest.byte = self.dice.roll(0xa0) as u8 + 1;
            let mut payload = Buffer::alone(guest.range.len() as usize);
            payload.fill(guest.byte);
            GuestRequest::new(Action::Write(payload), guest.range, false)
        });
        for completion in done {
            request.complete(&mut tools, Token(0), completion);
        }
        if request.step(&self.gate, &mut tools, Token(0)) == Status::Done {
            let (outcome, _) = guest.request.take().expect("just stepped").end();
            outcome.expect("nothing fails here");
            self.model[guest.range.start as usize..guest.range.end as usize].fill(guest.byte);
            self.answered += 1;
        }
    }

    /// The process is gone; what it left is opened as at a start, and has everything. Its size.
    fn kill(mut self) -> u64 {
        self.control.abandon();
        self.guests.iter_mut().for_each(|guest| guest.io.abandon());
        let disk = open(&self.files, self.image, self.base, &self.words);
        let found = self.read(&disk);
        let size = found.len() as u64;
        assert!(size == OLD || size == NEW, "{size} bytes");
        self.check(&found);
        // What is in flight has its own end; here nobody comes to that.
        self.guests.drain(..).for_each(std::mem::forget);
        if let Some(replace) = self.replace.take() {
            std::mem::forget(replace);
        }
        size
    }

    fn check(&self, found: &[u8]) {
        let (old, new) = found.split_at(OLD as usize);
        for (at, (found, model)) in old.iter().zip(&self.model).enumerate() {
            let in_flight = |guest: &Guest| {
                let inside = (guest.range.start..guest.range.end).contains(&(at as u64));
                guest.request.is_some() && inside && guest.byte == *found
            };
            assert!(found == model || self.guests.iter().any(in_flight), "byte {at} is {found}, it was {model}");
        }
        assert!(new.iter().all(|byte| *byte == 0), "what is new shows what was below, or left there");
    }

    fn read(&self, disk: &Arc<Disk>) -> Vec<u8> {
        let range = ByteRange { start: 0, end: disk.size() };
        let mut io = SimIo::new(&self.files, 1, 0);
        let mut read = Task::read(Arc::clone(disk), range, Buffer::alone(range.len() as usize));
        let mut tools = Tools { io: &mut io, arena: &self.arena, waker: &self.waker };
        let mut done = Vec::new();
        while read.step(&mut tools, Token(0)) != Status::Done {
            tools.io.reap(Wait::One, &mut done).expect("a simulated queue");
            for completion in done.drain(..) {
                read.complete(&mut tools, Token(0), completion);
            }
        }
        let (outcome, buffer) = read.end();
        outcome.expect("a disk that can be read");
        buffer.expect("its buffer").to_vec()
    }
}

/// As the daemon opens an image at its start: what a kill left behind first.
fn open(files: &Files, image: u32, base: u32, words: &Arc<Words>) -> Arc<Disk> {
    let storage = files.storage(image);
    let qcow2 = |journal: Arc<dyn Journal>| {
        let open = Open { writable: true, has_backing: true, metadata_bytes_max: 1 << 20 };
        Qcow2::open(Arc::clone(&storage), journal, open).expect("a valid image")
    };
    let left = WordJournal::left_behind(words, BOOT);
    if !left.is_empty() {
        let recovered = qcow2(Arc::new(Forgetful));
        recovered.replay(&left).expect("the journal's own notes");
        let mut progress = Progress::default();
        while recovered.settle(&mut progress).expect("a valid image") != Settle::Done {}
        files.sync_one(image);
    }
    assert!(read_header(&*storage).is_ok());
    let journal = Arc::new(WordJournal::new(Arc::clone(words), BOOT, (0, 0)));
    let layer = |image: Box<dyn Image>, number: u32, format: &'static str| {
        let file = DataFile::buffered(File::simulated(number));
        Arc::new(Layer { image, file, path: format!("file{number}").into(), format, apart: None })
    };
    let top = layer(Box::new(qcow2(journal)), image, "qcow2");
    let below = layer(Box::new(Raw::new(files.storage(base), BELOW)), base, "raw");
    Arc::new(Disk::new(Chain::new(vec![top, below]), false))
}

/// Kills at every step; how often each size was found.
fn killed_at_every_step(seed: u64) -> [u64; 2] {
    let mut sizes = [0; 2];
    let mut world = World::new(seed);
    let steps = world.run(None).expect("nobody kills it");
    let disk = Arc::clone(&world.disk);
    let found = world.read(&disk);
    assert_eq!(found.len() as u64, NEW);
    world.check(&found);
    assert_eq!(world.kill(), NEW, "it was answered");
    for step in 0..steps {
        let mut world = World::new(seed);
        assert!(world.run(Some(step)).is_none());
        sizes[usize::from(world.kill() == NEW)] += 1;
    }
    sizes
}

#[test]
fn a_kill_at_every_step_of_a_growth_leaves_one_size_and_zeroes_in_what_is_new() {
    for seed in 1..=12 {
        let sizes = killed_at_every_step(seed);
        assert!(sizes[0] > 10, "{sizes:?}");
    }
}

#[test]
fn a_disk_that_is_shown_before_its_zeroes_is_caught() {
    plant(Some(Fault::GrownBeforeZeroes));
    let outcome = catch_unwind(|| killed_at_every_step(1));
    plant(None);
    assert!(outcome.is_err(), "the simulator is too tame to be trusted");
}

/// Somebody's request does not end: the guests go on, and the disk is as large as it was.
#[test]
fn a_request_that_does_not_end_undoes_the_growth() {
    let mut world = World::new(5);
    let stuck = world.gate.enter(&world.waker);
    let mut replace = world.replace.take().expect("a growth");
    let mut outcome = Step::Busy;
    let mut done = Vec::new();
    for _ in 0..200_000 {
        world.control.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut world.control, arena: &world.arena, waker: &world.waker };
        for completion in done.drain(..) {
            replace.complete(&mut tools, Token(0), completion);
        }
        outcome = replace.step(&mut tools, Token(0));
        if matches!(outcome, Step::Done(_)) {
            break;
        }
    }
    assert!(matches!(outcome, Step::Done(Err(_))), "{outcome:?}");
    drop(stuck);
    assert_eq!(world.disk.size(), OLD);
    (0..200).for_each(|_| world.step_guest());
    assert!(world.answered > 0);
}
