//! A world: two images and a record, a daemon that lives once or several times, and guests.
use super::files::{Dice, Files, SECTOR, SimIo};
use super::guest::{Guest, fill, value_of};
use super::history::{History, Trust};
use super::kept::{Kept, journals};
use super::life::Life;
use super::modes::Modes;
use super::plan::{Fate, Plan};
use crate::chain::{Apart, Chain, Layer};
use crate::control::OnError;
use crate::copier::{Copier, Depth};
use crate::disk::{DataFile, Disk, Tools};
use crate::export::gate::{Gate, Route};
use crate::fault::{Fault, Killed, planted};
use crate::io::{Arena, File, Io, Token, Wait, Waker, Words};
use crate::job::{Job, Parts, Phase};
use crate::journal::WordJournal;
use crate::mirror::Mirror;
use crate::pivot::{End, RecordFile, recorded_as};
use crate::planes::TakenUp;
use formats::image::{Image, Progress as Settling, Settle};
use formats::journal::Journal;
use formats::qcow2::{Backing, Create, Open, Qcow2, create};
use formats::raw::Raw;
use formats::record::{Record, SLOT_LEN};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const DISK: u64 = 96 << 10;
const GUESTS: u64 = 3;
const BOOT: [u64; 2] = [7, 7];

/// An image of the world: its file, its journal's memory, how to open it.
struct ImageFile {
    file: u32,
    /// Its external data file, if it has one.
    data: Option<u32>,
    words: Arc<Words>,
    raw: bool,
    /// The base below it, if it has one.
    base: Option<u32>,
}

pub struct World {
    plan: Plan,
    dice: Dice,
    files: Files,
    source: ImageFile,
    target: ImageFile,
    record: u32,
    /// What outlives the daemon of a job.
    kept: Kept,
    history: History,
    modes: Modes,
    /// Steps of this life.
    step: u64,
    pivots: u32,
    /// The steps between the beginning of the pivot and its end.
    pivoting: Option<(u64, u64)>,
    /// A byte of the target has rotted.
    rotted: bool,
    /// How many mismatches were found, in the job that pivoted.
    mismatches: u64,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let mut dice = Dice::new(plan.seed);
        let files = Files::default();
        let sectors = (DISK as usize) / SECTOR;
        // The base has a value in most sectors, and zeroes in some runs.
        let mut base = vec![0; DISK as usize];
        for (number, sector) in base.chunks_mut(SECTOR).enumerate() {
            if number / 16 % 3 != 1 {
                fill(sector, 0xba5e_0000 + number as u64);
            }
        }
        let history = History::new(base.chunks(SECTOR).map(value_of));
        assert_eq!(history.len(), sectors);
        let base_file = files.add(base.clone());
        let [source_words, target_words] = journals();
        let data = |raw: bool| (plan.data_files && !raw).then(|| files.add(vec![0xee; DISK as usize]));
        let source = match plan.raw_source {
            true => ImageFile { file: files.add(base), data: None, words: source_words, raw: true, base: None },
            false => {
                let (file, data) = (files.add(Vec::new()), data(false));
                make_qcow2(&files, file, [9, 12, 13][dice.roll(3) as usize], true, data.is_some());
                ImageFile { file, data, words: source_words, raw: false, base: Some(base_file) }
            }
        };
        let target_base = plan.shallow.then_some(base_file);
        let raw_target = plan.raw_target && !plan.shallow;
        let (file, data) = (files.add(Vec::new()), data(raw_target));
        let target = ImageFile { file, data, words: target_words, raw: raw_target, base: target_base };
        match raw_target {
            true => files.lock()[target.file as usize].set_len(DISK as usize),
            false => {
                let cluster_bits = [9, 12, 13][dice.roll(3) as usize];
                make_qcow2(&files, target.file, cluster_bits, plan.shallow, data.is_some());
            }
        }
        let record = files.add(first_record(&mut dice));
        files.sync();
        let kept = Kept::default();
        Self {
            plan,
            dice,
            files,
            source,
            target,
            record,
            kept,
            history,
            modes: Modes::new(plan.seed),
            step: 0,
            pivots: 0,
            pivoting: None,
            rotted: false,
            mismatches: 0,
        }
    }

    /// Lives as the plan says, and again after a crash, and after a second one; every promise is checked on the
    /// way. Says how many pivots there were.
    pub fn run(mut self) -> u32 {
        let mut crashed = self.live(true);
        self.check(crashed);
        for last in [false, true] {
            if crashed.is_none() {
                break;
            }
            self.plan.fate = match self.dice.roll(5) {
                _ if last => Fate::Lives,
                0 | 1 => Fate::Killed(200 + self.dice.roll(300)),
                2 => Fate::KilledAtStore(1 + self.dice.roll(200)),
                3 => Fate::Stopped(100 + self.dice.roll(300)),
                _ => Fate::PowerCut(200 + self.dice.roll(300)),
            };
            if self.plan.mends {
                self.plan.fail_one_in = 0;
            }
            self.step = 0;
            crashed = self.live(false);
            self.check(crashed);
        }
        self.pivots
    }

    /// Lives as the plan says. Says how many mismatches were found.
    pub fn mismatches(mut self) -> u64 {
        self.live(true);
        self.check(None);
        assert!(self.pivots > 0, "verified, it pivots: {:?}", self.plan);
        self.mismatches
    }

    /// Lives without a crash. Says between which steps the pivot was.
    pub fn pivoting(mut self) -> Option<(u64, u64)> {
        self.live(true);
        self.check(None);
        self.pivoting
    }

    /// Lives without a crash. Says how many steps that took.
    pub fn steps(mut self) -> u64 {
        self.live(true);
        self.check(None);
        self.step
    }

    /// Lives without a crash; then a slot of the record rots. Says whether there was a pivot.
    pub fn rotting(mut self, slot: usize) -> bool {
        self.live(true);
        self.files.lock()[self.record as usize].rot(slot * SLOT_LEN + 700);
        self.check(None);
        self.pivots > 0
    }

    /// One life. Says how it ended, if by a crash.
    fn live(&mut self, with_job: bool) -> Option<Fate> {
        self.fill_up(false);
        let mut life = self.open();
        self.resume_job(&mut life);
        let start = 1 + self.dice.roll(200);
        let mut started = !with_job;
        loop {
            self.step += 1;
            self.fill_up(with_job);
            self.hang(with_job, &life);
            match self.plan.fate {
                Fate::Killed(step) if step == self.step => return Some(self.kill(life)),
                Fate::PowerCut(step) if step == self.step => return Some(self.cut_power(life)),
                Fate::Stopped(step) if step == self.step && life.may_stop() => return Some(self.stop(life)),
                _ => {}
            }
            let may_start = !self.plan.eager || life.guests.iter().any(|guest| guest.is_zeroing() || guest.left == 0);
            if !started && self.step >= start && may_start {
                started = true;
                self.start_job(&mut life);
            }
            self.modes.switch(self.plan.switches, self.step, &mut life);
            // A kill at a store ends the step where it is.
            if let Err(end) = catch_unwind(AssertUnwindSafe(|| self.step(&mut life))) {
                if !end.is::<Killed>() {
                    resume_unwind(end);
                }
                return Some(self.kill(life));
            }
            if self.plan.is_watched() {
                self.modes.watch(&life);
            }
            if started && life.is_silent() && life.job.is_none() {
                drop(life);
                return None;
            }
            assert!(self.step < 1_000_000, "the world does not come to an end: {:?}: {}", self.plan, life.describe());
        }
    }

    /// The target has no space for some time.
    fn fill_up(&self, first: bool) {
        let Some((from, until)) = self.plan.full else { return };
        let ends = matches!(self.plan.fate, Fate::Killed(step) | Fate::PowerCut(step) | Fate::Stopped(step) if step <= self.step);
        // Whoever is on it then is no job's business.
        let full = first && !ends && self.pivots == 0 && (from..until).contains(&self.step);
        for file in [Some(self.target.file), self.target.data].into_iter().flatten() {
            self.files.set_full(file, full);
        }
    }

    /// The target answers nothing for some time: while any guest still asks for something, or up to a step.
    fn hang(&self, first: bool, life: &Life) {
        let Some((from, until)) = self.plan.hung else { return };
        let lasts = until.map_or(!life.is_silent(), |until| self.step < until);
        self.set_hung(first && lasts && !life.stopping && self.pivots == 0 && self.step >= from);
    }

    fn set_hung(&self, hung: bool) {
        for file in [Some(self.target.file), self.target.data].into_iter().flatten() {
            self.files.set_hung(file, hung);
        }
    }

    /// One actor moves.
    fn step(&mut self, life: &mut Life) {
        if self.plan.eager && self.dice.one_in(2) {
            return life.step_copier();
        }
        match self.dice.roll(GUESTS + 4) {
            number if number < GUESTS => {
                let guest = &mut life.guests[number as usize];
                let was_busy = !guest.is_answered();
                guest.step(&life.gate, &mut self.history, &mut self.dice);
                life.answered += u64::from(was_busy && guest.is_answered());
            }
            0..=5 => life.step_copier(),
            _ => self.step_job(life),
        }
    }

    fn step_job(&mut self, life: &mut Life) {
        let silent = life.is_silent();
        let Some((job, journal, ..)) = &mut life.job else { return };
        let mut done = Vec::new();
        life.control.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut life.control, arena: &life.arena, waker: &life.waker };
        for completion in done {
            job.complete(&mut tools, Token(0), completion);
        }
        let is_verified = job.verified().is_some_and(|verified| verified.is_complete()) || !self.plan.verify;
        if job.phase() == Phase::Ready && !life.stopping && !job.is_ending() && is_verified && self.dice.one_in(6) {
            let file = self.record_file();
            let goes_back = self.kept.goes_back;
            let record = Record { truth: if goes_back { "source" } else { "target" }.to_owned(), ..new_record() };
            let back = (self.plan.keeps && !goes_back).then(|| {
                let planes = self.kept.prepare_back(file.generation() + 1);
                let (source, target) = (Arc::clone(&job.mirror().target), Arc::clone(&job.mirror().source));
                let mirror = Arc::new(Mirror::on(planes, source, target, false));
                let copier = copier(&mirror);
                (mirror, copier, SimIo::new(&self.files, self.plan.seed ^ 0xbac, self.plan.fail_one_in))
            });
            let follows = back.as_ref().map(|(mirror, ..)| Arc::clone(mirror));
            let end = End::Switch { record, journal: journal.clone(), member: None, back: follows };
            life.back = back;
            job.pivot(end, file);
            if self.plan.held {
                job.hold();
            }
        }
        if job.awaits_finalize() {
            let before = *life.answered_before.get_or_insert(life.answered);
            if (silent || life.answered > before) && self.dice.one_in(6) {
                job.finalize();
            }
        }
        let mut tools = Tools { io: &mut life.control, arena: &life.arena, waker: &life.waker };
        let before = job.phase();
        job.step(&mut tools, Token(0));
        let phase = job.phase();
        if let Some(verified) = job.verified() {
            assert!(verified.mismatches == 0 || self.rotted, "no write was lost: {verified:?}: {:?}", self.plan);
            self.mismatches = verified.mismatches;
        }
        if self.plan.rots && phase == Phase::Ready && !std::mem::replace(&mut self.rotted, true) {
            let at = self.dice.roll(DISK);
            self.files.lock()[self.target.file as usize].rot(at as usize);
        }
        if (before, phase) == (Phase::Converging, Phase::Ready) {
            let (failed, missed) = (job.mirror().has_fault(), job.mirror().missed_len());
            assert!(!failed && missed == 0, "ready without what failed: {missed} bytes: {:?}", self.plan);
        }
        if matches!(phase, Phase::Pivoting | Phase::Pivoted) {
            let (first, _) = self.pivoting.unwrap_or((self.step, 0));
            self.pivoting = Some((first, self.step));
        }
        // The gate opens before the pivot is over: nobody has been through it yet.
        let mirror = Arc::clone(job.mirror());
        let opened = matches!(phase, Phase::Pivoting | Phase::Pivoted) && !job.holds_gate();
        if opened && !std::mem::replace(&mut life.switched, true) {
            self.pivots += 1;
            self.compare(&mirror);
        }
        if phase.is_over() {
            life.job = None;
            self.kept.forget();
            self.kept.adopt_back(phase == Phase::Pivoted);
            if let Some((mirror, copier, io)) = life.back.take().filter(|_| phase == Phase::Pivoted) {
                let job = Job::follow(self.parts(life, mirror, false, DISK));
                (life.job, life.switched) = (Some((job, None, copier, io)), false);
            }
        }
    }

    /// At the instant of a pivot both sides read alike.
    fn compare(&self, mirror: &Mirror) {
        assert_eq!(mirror.backlog(), 0, "what people are told: {:?}", self.plan);
        let (source, target) = (self.files.read_disk(&mirror.source), self.files.read_disk(&mirror.target));
        let differs = source.chunks(SECTOR).zip(target.chunks(SECTOR)).position(|(a, b)| a != b);
        if let Some(sector) = differs {
            let value = |bytes: &[u8]| value_of(&bytes[sector * SECTOR..][..SECTOR]);
            panic!(
                "sector {sector} is {:x} on the source and {:x} on the target: {:?}",
                value(&source),
                value(&target),
                self.plan
            );
        }
    }

    fn open(&mut self) -> Life {
        let (disk, _) = self.open_image(self.served(), false);
        let gate = Arc::new(Gate::new(Route { disk, mirror: None }));
        let seed = self.plan.seed ^ self.step.wrapping_mul(31);
        // What went wrong at the start is to be seen at the end, and not overwritten.
        let requests = if self.plan.eager { 12 } else { 40 };
        let requests = if self.plan.fail_one_in > 0 { 25 } else { requests };
        let guests = (0..GUESTS)
            .map(|number| {
                let number = number + 1 + u64::from(self.pivots) * 16 + self.dice.roll(1 << 20) * 256;
                let mut guest = Guest::new(&self.files, number, seed, self.plan.fail_one_in, requests);
                guest.discards = self.plan.discards;
                guest
            })
            .collect();
        Life {
            gate,
            guests,
            control: SimIo::new(&self.files, seed ^ 0xc0, 0),
            arena: Arena::new(256 << 10),
            waker: Waker::simulated(100),
            job: None,
            back: None,
            copier_arena: Arena::new(256 << 10),
            copier_waker: Waker::simulated(101),
            copier_waits: false,
            copier_yields: self.plan.courtesy > 0,
            switched: false,
            answered: 0,
            answered_before: None,
            stopping: false,
        }
    }

    fn start_job(&mut self, life: &mut Life) {
        let taken = self.kept.begin(DISK, self.plan.chunk_bits);
        self.follow(life, &taken);
    }

    /// As the daemon does, before anybody is served: goes on with the job, unless it has pivoted.
    fn resume_job(&mut self, life: &mut Life) {
        let file = self.record_file();
        if let Some((generation, goes_back)) = self.kept.back() {
            let is_truth = |truth: &str| truth == if goes_back { "target" } else { "source" };
            self.kept.adopt_back(recorded_as(file.newest(), generation, is_truth));
        }
        let target = if self.kept.goes_back { "source" } else { "target" };
        if file.newest().is_some_and(|record| record.truth == target) {
            self.kept.forget();
        }
        if let Some(taken) = self.kept.take_up() {
            self.follow(life, &taken);
        }
    }

    fn follow(&mut self, life: &mut Life, taken: &TakenUp) {
        let goes_back = self.kept.goes_back;
        let image = if goes_back { &self.source } else { &self.target };
        if goes_back && !planted(Fault::ForgetOldJournal) {
            // It was served before.
            drop(self.open_image(image, false));
        }
        let (target, journal) = self.open_image(image, true);
        let source = life.gate.route().disk;
        let planes = self.kept.lay_out(taken, !image.raw);
        let mut mirror = Mirror::on(planes, source, target, self.plan.shallow && !goes_back);
        mirror.patience = Duration::from_millis(20);
        let mirror = Arc::new(mirror);
        mirror.set_compare(taken.compare);
        mirror.set_shares(self.plan.shares && image.raw);
        mirror.courtesy.set_factor(self.plan.courtesy);
        self.kept.kill_at_store(if let Fate::KilledAtStore(stores) = self.plan.fate { Some(stores) } else { None });
        let copier = copier(&mirror);
        let job = Job::start(self.parts(life, mirror, taken.target_is_zero, taken.seen));
        let io = SimIo::new(&self.files, self.plan.seed ^ 0xc09, self.plan.fail_one_in);
        life.job = Some((job, Some(journal), copier, io));
    }

    fn parts(&self, life: &Life, mirror: Arc<Mirror>, target_is_zero: bool, seen: u64) -> Parts {
        Parts {
            id: "job".to_owned(),
            mirror,
            gate: Arc::clone(&life.gate),
            target_is_zero,
            seen,
            sync_rest: Duration::from_millis(20),
            mode: self.plan.mode,
            on_source_error: if self.plan.mends { OnError::Report } else { OnError::Ignore },
            on_target_error: if self.plan.full.is_some() { OnError::BackOff } else { OnError::Ignore },
            pause_max: self.plan.hung.map_or(Duration::from_secs(3600), |_| Duration::from_millis(100)),
            limits: self.plan.limits,
            verify: self.plan.verify,
        }
    }

    /// The image that the record names.
    fn served(&self) -> &ImageFile {
        match self.record_file().newest().map(|record| record.truth.as_str()) {
            Some("target") => &self.target,
            Some("source") | None => &self.source,
            Some(other) => panic!("the record names {other}"),
        }
    }

    fn record_file(&self) -> RecordFile {
        let mut bytes = vec![0; 2 * SLOT_LEN];
        self.files.lock()[self.record as usize].read(0, &mut bytes);
        let newest = Record::newest(&bytes).expect("one side is named");
        RecordFile::new(File::simulated(self.record), PathBuf::new(), newest)
    }

    /// As the daemon opens an image at its start: what a kill left behind first.
    fn open_image(&self, image: &ImageFile, asleep: bool) -> (Arc<Disk>, Arc<WordJournal>) {
        let left = WordJournal::left_behind(&image.words, BOOT);
        if !asleep && !left.is_empty() {
            let recovered = self.image(image, Arc::new(formats::journal::Forgetful));
            recovered.replay(&left).expect("the journal's own notes");
            settle(&*recovered, &self.files, image);
        }
        let journal = Arc::new(match asleep {
            true => WordJournal::asleep(Arc::clone(&image.words), BOOT, (0, u64::from(image.file))),
            false => WordJournal::new(Arc::clone(&image.words), BOOT, (0, u64::from(image.file))),
        });
        let kept: Arc<dyn Journal> = Arc::clone(&journal) as _;
        let mut layers = vec![self.layer(image.file, image.data, self.image(image, kept))];
        if let Some(base) = image.base {
            layers.push(self.layer(base, None, Box::new(Raw::new(self.files.storage(base), DISK))));
        }
        (Arc::new(Disk::new(Chain::new(layers), false)), journal)
    }

    fn image(&self, image: &ImageFile, journal: Arc<dyn Journal>) -> Box<dyn Image> {
        let storage = self.files.storage(image.file);
        if image.raw {
            return Box::new(Raw::new(storage, DISK));
        }
        let open = Open { writable: true, has_backing: image.base.is_some(), metadata_bytes_max: 1 << 20 };
        Box::new(Qcow2::open(storage, journal, open).expect("an image that can be opened"))
    }

    fn layer(&self, file: u32, data: Option<u32>, image: Box<dyn Image>) -> Arc<Layer> {
        let payload = DataFile::buffered(File::simulated(data.unwrap_or(file)));
        let path = |number: u32| PathBuf::from(format!("file{number}"));
        let apart = data.map(|data| Apart { tables: File::simulated(file), data_path: path(data) });
        Arc::new(Layer { image, file: payload, path: path(file), format: "any", apart })
    }

    fn kill(&mut self, life: Life) -> Fate {
        life.die();
        self.plan.fate
    }

    /// As the daemon ends: requests and copies are finished, both sides are settled, the planes are left in order.
    fn stop(&mut self, mut life: Life) -> Fate {
        life.stopping = true;
        self.set_hung(false);
        self.kept.kill_at_store(None);
        life.guests.iter_mut().for_each(|guest| guest.left = 0);
        let mirror = life.job.as_ref().map(|(job, ..)| Arc::clone(job.mirror()));
        mirror.iter().for_each(|mirror| mirror.hold(true));
        let busy = |life: &Life| {
            let copies = mirror.as_ref().is_some_and(|mirror| !mirror.is_idle() || mirror.has_entrusted());
            copies || !life.control.is_empty() || life.guests.iter().any(|guest| !guest.is_idle())
        };
        for steps in 0.. {
            assert!(steps < 100_000, "it does not end: {:?}: {}", self.plan, life.describe());
            if !busy(&life) {
                break;
            }
            self.step(&mut life);
            mirror.iter().for_each(|mirror| mirror.hold(true));
        }
        let disks = [Some(&life.gate.route().disk), mirror.as_ref().map(|mirror| &mirror.target)]
            .map(Option::<&Arc<Disk>>::cloned);
        let images = if self.kept.goes_back { [&self.target, &self.source] } else { [&self.source, &self.target] };
        for (disk, image) in disks.into_iter().zip(images) {
            disk.iter().for_each(|disk| settle(&*disk.chain().top().image, &self.files, image));
        }
        for file in [&self.source, &self.target].into_iter().flat_map(|image| [Some(image.file), image.data]).flatten()
        {
            self.files.sync_one(file);
        }
        mirror.iter().for_each(|mirror| assert!(mirror.leave()));
        self.cut_power(life)
    }

    fn cut_power(&mut self, life: Life) -> Fate {
        life.die();
        self.files.cut_power(&mut self.dice);
        self.kept.reboot();
        // Another boot: what memory kept through a kill is gone.
        for image in [&self.source, &self.target] {
            image.words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        self.plan.fate
    }

    /// What is served after the end of a life has everything that was promised.
    fn check(&mut self, crashed: Option<Fate>) {
        self.fill_up(false);
        let now = self.history.tick();
        let trust = match crashed {
            Some(Fate::PowerCut(_)) => Trust::Flushed,
            // Whatever was answered was made durable.
            _ => Trust::AnsweredBefore(now),
        };
        let (disk, _) = self.open_image(self.served(), false);
        let bytes = self.files.read_disk(&disk);
        for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
            let value = value_of(bytes);
            assert!(
                self.history.allows(sector, value, trust),
                "sector {sector} holds {value:x} after {crashed:?} of {:?}: {}",
                self.plan,
                self.history.describe(sector)
            );
            self.history.settle(sector, value);
        }
        self.files.sync();
    }
}

fn copier(mirror: &Arc<Mirror>) -> Copier {
    Copier::new(Arc::clone(mirror), Depth { slots: 3, run_len: 16 << 10, beside: 16 << 10 }, 0)
}

/// The target as the truth. Its text is longer than a sector, so its writing can be cut short.
fn new_record() -> Record {
    let text = str::to_owned;
    let export = "vda".repeat(500);
    Record { generation: 0, export, origin: text("source"), truth: text("target"), format: text("any"), size: DISK }
}

/// Blank, or naming the source since an earlier life.
fn first_record(dice: &mut Dice) -> Vec<u8> {
    let first = Record { generation: 1, truth: "source".to_owned(), ..new_record() };
    let mut record = if dice.one_in(2) { first.encode().expect("a record that fits") } else { Vec::new() };
    record.resize(2 * SLOT_LEN, 0);
    record
}

fn make_qcow2(files: &Files, file: u32, cluster_bits: u32, backed: bool, apart: bool) {
    let backing = backed.then(|| Backing { name: "base".to_owned(), format: Some("raw".to_owned()) });
    let data_file = apart.then(|| formats::qcow2::DataFile { name: "data".to_owned(), raw: false });
    let creation = Create { cluster_bits, backing, data_file, ..Create::new(DISK) };
    create(&*files.storage(file), &creation).expect("an image");
}

fn settle(image: &dyn Image, files: &Files, of: &ImageFile) {
    let mut progress = Settling::default();
    loop {
        match image.settle(&mut progress).expect("a settle") {
            Settle::Done => return,
            Settle::Flush => files.sync_one(of.file),
            Settle::FlushPayload => files.sync_one(of.data.expect("a data file")),
            Settle::Busy => unreachable!("nobody else settles"),
        }
    }
}
