//! Several exports that are pivoted at one instant: a crash at every step leaves all of them on one side.
use super::files::{Dice, Files, SimIo};
use crate::chain::{Chain, Layer};
use crate::control::{Mode, OnError};
use crate::copier::{Copier, Depth};
use crate::disk::{DataFile, Disk, Tools};
use crate::export::gate::{Gate, Route};
use crate::fault::{Fault, plant};
use crate::io::{Arena, File, Io, Token, Wait, Waker};
use crate::job::{Job, Limits, Parts, Phase};
use crate::mirror::Mirror;
use crate::pivot::{End, GroupFile, RecordFile, members};
use formats::raw::Raw;
use formats::record::{GROUP_SLOT_LEN, Group, Record, SLOT_LEN};
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const DISK: u64 = 32 << 10;
const EXPORTS: usize = 3;

/// One export, its job, and who copies for it.
struct Actor {
    name: String,
    files: [u32; 2],
    record: u32,
    gate: Arc<Gate>,
    job: Job,
    copier: Copier,
    io: SimIo,
}

struct World {
    files: Files,
    group: u32,
    actors: Vec<Actor>,
    control: SimIo,
    arena: Arena,
    waker: Waker,
    dice: Dice,
    steps: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let files = Files::default();
        let group = files.add(vec![0; 2 * GROUP_SLOT_LEN]);
        let actors = (0..EXPORTS).map(|number| Actor::new(&files, number, seed)).collect();
        let control = SimIo::new(&files, seed ^ 0xc0, 0);
        let (arena, waker) = (Arena::new(1 << 20), Waker::simulated(9));
        Self { files, group, actors, control, arena, waker, dice: Dice::new(seed), steps: 0 }
    }

    /// Steps until all jobs are in `phase`, or one has ended otherwise, or `crash` steps are over. True where it crashed.
    fn run(&mut self, phase: Phase, crash: Option<u64>) -> bool {
        for _ in 0..50_000 {
            if self.actors.iter().all(|actor| actor.job.phase() == phase) {
                return false;
            }
            if crash == Some(self.steps) {
                return true;
            }
            self.step();
        }
        let phases: Vec<Phase> = self.actors.iter().map(|actor| actor.job.phase()).collect();
        panic!("it does not come to {phase:?}: {phases:?}");
    }

    fn step(&mut self) {
        self.steps += 1;
        let number = self.dice.roll(EXPORTS as u64) as usize;
        let actor = &mut self.actors[number];
        if self.dice.one_in(2) {
            let mut done = Vec::new();
            actor.io.reap(Wait::No, &mut done).expect("a simulated queue");
            let mut tools = Tools { io: &mut actor.io, arena: &self.arena, waker: &self.waker };
            actor.copier.step(&mut tools, &mut done);
            return;
        }
        let mut done = Vec::new();
        self.control.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut self.control, arena: &self.arena, waker: &self.waker };
        for completion in done {
            let whose = (completion.token.0 >> 8) as usize;
            self.actors[whose].job.complete(&mut tools, Token((whose as u64) << 8), completion);
        }
        self.actors[number].job.step(&mut tools, Token((number as u64) << 8));
    }

    /// Wishes for the pivot of all.
    fn pivot(&mut self) {
        let file = GroupFile::new(File::simulated(self.group), PathBuf::new(), self.group());
        let names: Vec<String> = self.actors.iter().map(|actor| actor.name.clone()).collect();
        for member in members(file, names.iter().map(String::as_str), &self.waker) {
            let actor = self.actors.iter().position(|actor| actor.name == member.export()).expect("one of them");
            let record = self.record_file(actor);
            let actor = &mut self.actors[actor];
            let text = |text: &str| text.to_owned();
            let (origin, truth, format) = (text("source"), text("target"), text("raw"));
            let new = Record { generation: 0, export: actor.name.clone(), origin, truth, format, size: DISK };
            actor.job.pivot(End::Switch { record: new, journal: None, member: Some(member), back: None }, record);
        }
    }

    fn group(&self) -> Option<(Group, usize)> {
        let mut bytes = vec![0; 2 * GROUP_SLOT_LEN];
        self.files.lock()[self.group as usize].read(0, &mut bytes);
        Group::newest(&bytes).expect("one slot is whole")
    }

    fn record_file(&self, number: usize) -> RecordFile {
        let record = self.actors[number].record;
        let mut bytes = vec![0; 2 * SLOT_LEN];
        self.files.lock()[record as usize].read(0, &mut bytes);
        RecordFile::new(File::simulated(record), PathBuf::new(), Record::newest(&bytes).expect("one slot is whole"))
    }

    /// True where the target of an export is its truth, as a daemon finds it at its start.
    fn is_switched(&self, number: usize) -> bool {
        let (own, group) = (self.record_file(number), self.group());
        let own = own.newest();
        let member = group.as_ref().and_then(|(group, _)| group.member(&self.actors[number].name));
        let newest = [own, member].into_iter().flatten().max_by_key(|record| record.generation);
        newest.is_some_and(|record| record.truth == "target")
    }

    /// All are on one side, which has everything. True where that is the targets'.
    fn check(&self) -> bool {
        let sides: Vec<bool> = (0..EXPORTS).map(|number| self.is_switched(number)).collect();
        assert!(sides.iter().all(|side| *side == sides[0]), "some are switched and some are not: {sides:?}");
        for (number, actor) in self.actors.iter().enumerate() {
            let mut bytes = vec![0; DISK as usize];
            self.files.lock()[actor.files[usize::from(sides[0])] as usize].read(0, &mut bytes);
            assert!(bytes.iter().all(|byte| *byte == number as u8 + 1), "export {number}");
        }
        sides[0]
    }

    fn crash(&mut self, power: bool) {
        self.control.abandon();
        self.actors.iter_mut().for_each(|actor| actor.io.abandon());
        if power {
            self.files.cut_power(&mut self.dice);
        }
    }

    /// The mirror is in the way of guests again, or none is.
    fn is_open(&self, mirrored: bool) -> bool {
        let through = |actor: &Actor| actor.gate.enter(&self.waker).map(|pass| pass.route().mirror.is_some());
        self.actors.iter().all(|actor| through(actor) == Some(mirrored))
    }
}

impl Actor {
    fn new(files: &Files, number: usize, seed: u64) -> Self {
        let bytes = |byte: usize| files.add(vec![byte as u8; DISK as usize]);
        let of = [bytes(number + 1), bytes(0)];
        let disk = |number: u32| {
            let image = Box::new(Raw::new(files.storage(number), DISK));
            let file = DataFile::buffered(File::simulated(number));
            let layer = Layer { image, file, path: format!("file{number}").into(), format: "raw", apart: None };
            Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false))
        };
        let mirror = Arc::new(Mirror::new(disk(of[0]), disk(of[1]), 12, false));
        let gate = Arc::new(Gate::new(Route { disk: Arc::clone(&mirror.source), mirror: None }));
        let job = Job::start(Parts {
            id: "job".to_owned(),
            mirror: Arc::clone(&mirror),
            gate: Arc::clone(&gate),
            target_is_zero: true,
            mode: Mode::Background,
            on_source_error: OnError::Ignore,
            on_target_error: OnError::Report,
            pause_max: Duration::from_secs(60),
            limits: Limits::default(),
            verify: false,
            seen: 0,
            sync_rest: Duration::from_secs(1),
        });
        let copier = Copier::new(mirror, Depth { slots: 2, run_len: 16 << 10, beside: 16 << 10 }, 0);
        let io = SimIo::new(files, seed ^ number as u64, 0);
        let record = files.add(vec![0; 2 * SLOT_LEN]);
        Self { name: format!("vd{number}"), files: of, record, gate, job, copier, io }
    }
}

/// Every step from the wish to a while after the last gate is open. Says how often each side was named.
fn crash_at_every_step(seed: u64) -> [u64; 2] {
    let mut sides = [0; 2];
    for crash in 0.. {
        for power in [false, true] {
            let mut world = World::new(seed);
            world.run(Phase::Ready, None);
            world.pivot();
            let at = world.steps + crash;
            let crashed = world.run(Phase::Pivoted, Some(at));
            world.crash(power);
            let side = world.check();
            sides[usize::from(side)] += 1;
            if !crashed {
                assert!(side, "all were pivoted");
                return sides;
            }
        }
    }
    sides
}

#[test]
fn a_crash_at_every_step_of_a_group_pivot_leaves_all_on_one_side() {
    for seed in 1..=4 {
        let sides = crash_at_every_step(seed);
        assert!(sides.iter().all(|count| *count > 10), "{sides:?}");
    }
}

#[test]
fn members_that_are_recorded_apart_are_caught() {
    plant(Some(Fault::RecordApart));
    let outcome = catch_unwind(|| (1..=4).map(crash_at_every_step).count());
    plant(None);
    assert!(outcome.is_err(), "the simulator is too tame to be trusted");
}

/// Afterwards nothing is left to the group's record: any slot may rot, and the next group may be recorded.
#[test]
fn after_a_group_pivot_each_record_says_it_twice() {
    let mut world = World::new(7);
    world.run(Phase::Ready, None);
    world.pivot();
    world.run(Phase::Pivoted, None);
    assert!(world.is_open(false));
    for actor in &mut world.actors {
        assert!(actor.job.take_record().is_some_and(|record| !record.lags()));
    }
    world.files.lock()[world.group as usize] = Default::default();
    world.files.lock()[world.group as usize].set_len(2 * GROUP_SLOT_LEN);
    let record = world.actors[1].record as usize;
    world.files.lock()[record].rot(SLOT_LEN / 2);
    assert!(world.check());
}

/// One of them cannot be pivoted: none is, and each guest goes on where it was.
#[test]
fn one_that_is_undone_undoes_all() {
    let mut world = World::new(8);
    world.run(Phase::Ready, None);
    let stuck = world.actors[0].gate.enter(&world.waker);
    world.pivot();
    // Its deadline comes, for somebody's request does not end; the others wait for it at their closed gates.
    for _ in 0..400_000 {
        if world.actors.iter_mut().all(|actor| actor.job.phase() == Phase::Ready && !actor.job.is_ending()) {
            break;
        }
        world.step();
    }
    assert!(world.is_open(true));
    for actor in &mut world.actors {
        assert!(actor.job.take_undone().is_some(), "export {}", actor.name);
    }
    assert!(!world.check());
    drop(stuck);
    world.pivot();
    world.run(Phase::Pivoted, None);
    assert!(world.check() && world.is_open(false));
}
