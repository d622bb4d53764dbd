//! Corners that a world of dice rarely comes to: each is built by hand, step by step.
use super::files::{Dice, Files, SimIo};
use crate::chain::{Chain, Layer, Look, Source};
use crate::control::jobs::{IoStatus, JobStatus};
use crate::control::{Mode, OnError};
use crate::copier::{Copier, Depth};
use crate::disk::{DataFile, Disk, Status, Task, Tools};
use crate::export::gate::{Gate, Route};
use crate::export::request::{Action, GuestRequest};
use crate::fault::{Fault, plant};
use crate::io::{Arena, Buffer, Completion, File, Io, Op, Token, Wait, Waker};
use crate::job::{Job, Limits, Parts, Phase};
use crate::mirror::Mirror;
use crate::pivot::{End, RecordFile};
use formats::error::Error;
use formats::image::Image;
use formats::journal::Forgetful;
use formats::qcow2::{Create, Open, Qcow2, create, read_header};
use formats::range::ByteRange;
use formats::raw::Raw;
use formats::record::{Record, SLOT_LEN};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const DISK: u64 = 96 << 10;
const CHUNK_BITS: u32 = 12;
const CHUNK: u64 = 1 << CHUNK_BITS;

/// Two raw disks of ones and zeroes, and the gate to the first.
struct Stage {
    files: Files,
    record: u32,
    gate: Arc<Gate>,
    mirror: Arc<Mirror>,
    arena: Arena,
    waker: Waker,
}

impl Stage {
    fn new() -> Self {
        let files = Files::default();
        let disk = |byte: u8| {
            let number = files.add(vec![byte; DISK as usize]);
            let image = Box::new(Raw::new(files.storage(number), DISK));
            let file = DataFile::buffered(File::simulated(number));
            let layer = Layer { image, file, path: format!("file{number}").into(), format: "raw", apart: None };
            Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false))
        };
        let mirror = Arc::new(Mirror::new(disk(1), disk(0), CHUNK_BITS, false));
        let gate = Arc::new(Gate::new(Route { disk: Arc::clone(&mirror.source), mirror: None }));
        let record = files.add(vec![0; 2 * SLOT_LEN]);
        Self { files, record, gate, mirror, arena: Arena::new(256 << 10), waker: Waker::simulated(9) }
    }

    fn mirrored(&self) -> Route {
        Route { disk: Arc::clone(&self.mirror.source), mirror: Some(Arc::clone(&self.mirror)) }
    }

    fn job(&self, on_target_error: OnError) -> Job {
        Job::start(self.parts(on_target_error))
    }

    fn parts(&self, on_target_error: OnError) -> Parts {
        Parts {
            id: "job".to_owned(),
            mirror: Arc::clone(&self.mirror),
            gate: Arc::clone(&self.gate),
            target_is_zero: true,
            seen: 0,
            sync_rest: Duration::from_secs(1),
            mode: Mode::Background,
            on_source_error: OnError::Report,
            on_target_error,
            pause_max: Duration::from_secs(1),
            limits: Limits::default(),
            verify: false,
        }
    }

    fn copier(&self) -> (Copier, SimIo) {
        let copier = Copier::new(Arc::clone(&self.mirror), Depth { slots: 2, run_len: 16 << 10, beside: 16 << 10 }, 0);
        (copier, SimIo::new(&self.files, 3, 0))
    }

    /// Steps a job and its copier until `until`, or says where it stands after so many steps.
    fn run<I: Io, J: Io>(&self, job: &mut Job, io: &mut I, copier: &mut (Copier, J), until: Phase) -> Phase {
        for _ in 0..2_000 {
            if job.phase() == until {
                break;
            }
            self.step(job, io, copier);
        }
        job.phase()
    }

    fn step<I: Io, J: Io>(&self, job: &mut Job, io: &mut I, (copier, copies): &mut (Copier, J)) {
        let mut done = Vec::new();
        io.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io, arena: &self.arena, waker: &self.waker };
        done.into_iter().for_each(|completion| job.complete(&mut tools, Token(0), completion));
        job.step(&mut tools, Token(0));
        let mut done = Vec::new();
        copies.reap(Wait::No, &mut done).expect("a simulated queue");
        copier.step(&mut Tools { io: copies, arena: &self.arena, waker: &self.waker }, &mut done);
    }

    fn switch(&self) -> (End, RecordFile) {
        let text = |text: &str| text.to_owned();
        let record = Record {
            generation: 0,
            export: text("vda"),
            origin: text("source"),
            truth: text("target"),
            format: text("raw"),
            size: DISK,
        };
        (
            End::Switch { record, journal: None, member: None, back: None },
            RecordFile::new(File::simulated(self.record), PathBuf::new(), None),
        )
    }
}

/// A queue in which every flush fails from the time that it is told to.
struct NoFlush {
    io: SimIo,
    fails: bool,
}

impl Io for NoFlush {
    fn submit(&mut self, token: Token, op: Op) {
        self.io.submit(token, op);
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.io.reap(wait, done)?;
        for completion in done.iter_mut().filter(|_| self.fails) {
            if matches!(completion.op, Op::Flush { .. }) {
                completion.result = Err(io::Error::from_raw_os_error(5));
            }
        }
        Ok(())
    }
    fn now(&self) -> Duration {
        self.io.now()
    }
}

/// Copies compressed and reads back in parts, in an order that the seed decides: clusters share their
/// places, some do not shrink, some are zeroes, the last one is cut. Memory for the tables is the least there is.
fn copies_compressed(seed: u64, cluster_bits: u32) {
    let files = Files::default();
    let mut dice = Dice::new(seed);
    let mut bytes = vec![0; 2 * DISK as usize - 1536];
    for cluster in bytes.chunks_mut(1 << cluster_bits) {
        match dice.roll(4) {
            0 => cluster.fill_with(|| dice.roll(256) as u8),
            1 => {}
            _ => cluster.fill(dice.roll(255) as u8 + 1),
        }
    }
    let disk = |number: u32, image: Box<dyn Image>, format| {
        let file = DataFile::buffered(File::simulated(number));
        let layer = Layer { image, file, path: format!("file{number}").into(), format, apart: None };
        Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false))
    };
    let (from, to) = (files.add(bytes.clone()), files.add(Vec::new()));
    let size = bytes.len() as u64;
    create(&*files.storage(to), &Create { cluster_bits, ..Create::new(size) }).expect("valid options");
    let open = Open { writable: true, has_backing: false, metadata_bytes_max: 0 };
    let target = Qcow2::open(files.storage(to), Arc::new(Forgetful), open).expect("a valid image");
    let source = disk(from, Box::new(Raw::new(files.storage(from), size)), "raw");
    let mut mirror = Mirror::new(source, disk(to, Box::new(target), "qcow2"), cluster_bits, false);
    mirror.compress = Some(1 << cluster_bits);
    let mirror = Arc::new(mirror);
    mirror.written(ByteRange { start: 0, end: size });

    let (arena, waker) = (Arena::new(256 << 10), Waker::simulated(9));
    let mut io = SimIo::new(&files, seed, 0);
    let mut copier = Copier::new(Arc::clone(&mirror), Depth { slots: 3, run_len: 16 << 10, beside: 16 << 10 }, 0);
    let mut done = Vec::new();
    for step in 0.. {
        assert!(step < 10_000, "the copy does not come to an end");
        copier.step(&mut Tools { io: &mut io, arena: &arena, waker: &waker }, &mut done);
        if mirror.is_settled() {
            break;
        }
        io.reap(Wait::One, &mut done).expect("a simulated queue");
    }
    assert!(mirror.clear_fault().is_none());
    for _ in 0..20 {
        let start = dice.roll(size / 512) * 512;
        let range = ByteRange { start, end: (start + 512 * (1 + dice.roll(24))).min(size) };
        let mut read = Task::read(Arc::clone(&mirror.target), range, Buffer::alone(range.len() as usize));
        while read.step(&mut Tools { io: &mut io, arena: &arena, waker: &waker }, Token(0)) != Status::Done {
            io.reap(Wait::One, &mut done).expect("a simulated queue");
            for completion in done.drain(..) {
                read.complete(&mut Tools { io: &mut io, arena: &arena, waker: &waker }, Token(0), completion);
            }
        }
        let (outcome, found) = read.end();
        outcome.expect("what was written");
        assert!(found.expect("its buffer")[..] == bytes[range.start as usize..range.end as usize], "{range}");
    }
    let chain = mirror.target.chain();
    let is_compressed = |at| matches!(chain.map(at, 1, Look::Images), Ok((_, Source::Compressed { .. })));
    assert!((0..size).step_by(1 << cluster_bits).any(is_compressed), "nothing was compressed");
}

#[test]
fn a_compressed_copy_reads_like_its_source() {
    (1..=200).for_each(|seed| copies_compressed(seed, 12));
}

/// A cluster that did not shrink and whose write had to settle first used a token of the next task's: that
/// one took the flush for its own, and the first never heard of it. No test's tables were that many.
#[test]
fn a_compressed_copy_settles_whenever_it_has_to() {
    (1..=100).for_each(|seed| copies_compressed(seed, 9));
}

/// What is below a new cluster was looked at when the payload had been lent out already: a layer that cannot
/// be read there ended the thread, for the payload was not whole again. All tests' layers could be read.
#[test]
fn a_write_over_a_layer_that_cannot_be_read_is_an_error() {
    let files = Files::default();
    let open = Open { writable: true, has_backing: true, metadata_bytes_max: 1 << 20 };
    let layer = |top: bool| {
        let number = files.add(Vec::new());
        let storage = files.storage(number);
        create(&*storage, &Create::new(1 << 20)).expect("valid options");
        if !top {
            // Reserved bits of the only L1 entry.
            let l1_offset = read_header(&*storage).expect("a valid header").l1_offset;
            storage.write_at(l1_offset, &[0x7f; 8]).expect("memory");
        }
        let image = Qcow2::open(storage, Arc::new(Forgetful), Open { writable: top, has_backing: top, ..open });
        let image = Box::new(image.expect("its header is valid"));
        let file = DataFile::buffered(File::simulated(number));
        Arc::new(Layer { image, file, path: format!("file{number}").into(), format: "qcow2", apart: None })
    };
    let disk = Arc::new(Disk::new(Chain::new(vec![layer(true), layer(false)]), false));
    let (arena, waker) = (Arena::new(256 << 10), Waker::simulated(9));
    let mut io = SimIo::new(&files, 1, 0);
    let mut write = Task::write(disk, ByteRange { start: 4096, end: 8192 }, Buffer::alone(4096));
    let status = write.step(&mut Tools { io: &mut io, arena: &arena, waker: &waker }, Token(0));
    assert_eq!(status, Status::Done);
    let (outcome, payload) = write.end();
    let error = outcome.expect_err("nobody knows what is around the payload").one_line();
    assert!(error.starts_with("file1: L1 table: entry 0"), "{error}");
    assert_eq!(payload.map(|payload| payload.len()), Some(4096));
}

/// A request got some of its claims, gave them back and rang: for itself, who had just begun to listen.
#[test]
fn a_request_that_waits_for_a_claim_does_not_wake_itself() {
    let stage = Stage::new();
    stage.mirror.set_write_both(true);
    drop(stage.gate.replace(stage.mirrored()));
    stage.mirror.dirty.mark(ByteRange { start: CHUNK, end: 2 * CHUNK });
    let elsewhere = stage.mirror.dirty.claim(ByteRange { start: 2 * CHUNK, end: 3 * CHUNK }).expect("nobody has it");
    let range = ByteRange { start: 0, end: 3 * CHUNK };
    let mut request = GuestRequest::new(Action::Write(Buffer::alone(range.len() as usize)), range, false);
    let mut io = SimIo::new(&stage.files, 1, 0);
    let mut tools = Tools { io: &mut io, arena: &stage.arena, waker: &stage.waker };
    for _ in 0..3 {
        assert_eq!(request.step(&stage.gate, &mut tools, Token(0)), Status::Blocked);
        assert!(!stage.waker.was_woken(), "it would be stepped again and again for nothing");
    }
    stage.mirror.release(elsewhere, None);
    assert!(stage.waker.was_woken());
    assert_eq!(request.step(&stage.gate, &mut tools, Token(0)), Status::Busy);
    std::mem::forget(request);
}

/// With `ignore` and `stop` the job went on after a flush of its target had failed, and could be called
/// ready again.
#[test]
fn a_failed_flush_of_the_target_ends_the_job_whatever_was_said_of_errors() {
    for policy in [OnError::Report, OnError::Stop, OnError::Enospc, OnError::Ignore, OnError::BackOff] {
        let stage = Stage::new();
        let mut io = NoFlush { io: SimIo::new(&stage.files, 2, 0), fails: true };
        let phase = stage.run(&mut stage.job(policy), &mut io, &mut stage.copier(), Phase::Failed);
        assert_eq!(phase, Phase::Failed, "{policy:?}");
    }
}

/// The pivot was undone, and the job stayed ready with a target that nothing is promised of.
#[test]
fn a_failed_flush_of_the_target_in_a_pivot_ends_the_job() {
    for policy in [OnError::Report, OnError::Ignore, OnError::BackOff] {
        let stage = Stage::new();
        let (mut job, mut copier) = (stage.job(policy), stage.copier());
        let mut io = NoFlush { io: SimIo::new(&stage.files, 2, 0), fails: false };
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
        let (end, record) = stage.switch();
        job.pivot(end, record);
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Pivoting);
        io.fails = true;
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Failed), Phase::Failed, "{policy:?}");
        assert!(job.take_undone().is_some());
        assert!(stage.gate.enter(&stage.waker).is_some_and(|pass| pass.route().mirror.is_none()));
    }
}

/// Resumed while it was being given up, a job copied on to its end before it was over.
#[test]
fn a_job_that_is_given_up_is_not_resumed() {
    let stage = Stage::new();
    let (mut job, mut copier) = (stage.job(OnError::Report), stage.copier());
    let mut io = SimIo::new(&stage.files, 2, 0);
    job.pause(true);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Seeding);
    let pass = stage.gate.enter(&stage.waker);
    job.cancel(true);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Cancelled), Phase::Seeding);
    let left = stage.mirror.dirty.marked_bytes();
    assert!(left > 0, "nothing was copied while it was held");
    job.pause(false);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Cancelled), Phase::Seeding);
    assert_eq!(stage.mirror.dirty.marked_bytes(), left);
    drop(pass);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Cancelled), Phase::Cancelled);
}

/// One guest's request did not end, and all others waited for it at the closed gate.
#[test]
fn a_request_that_does_not_end_undoes_the_pivot() {
    let stage = Stage::new();
    let (mut job, mut copier) = (stage.job(OnError::Report), stage.copier());
    let mut io = SimIo::new(&stage.files, 2, 0);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
    let stuck = stage.gate.enter(&stage.waker);
    let (end, record) = stage.switch();
    job.pivot(end, record);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Pivoting);
    assert!(stage.gate.enter(&stage.waker).is_none());
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
    assert!(job.take_undone().is_some_and(|why| why.contains("under way")));
    assert!(stage.gate.enter(&stage.waker).is_some_and(|pass| pass.route().mirror.is_some()));
    let (end, record) = stage.switch();
    job.pivot(end, record);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Pivoting);
    drop(stuck);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoted), Phase::Pivoted);
}

/// The target was flushed for the first time since it was ready with all guests waiting.
#[test]
fn the_target_is_flushed_before_the_gate_closes() {
    let stage = Stage::new();
    let (mut job, mut copier) = (stage.job(OnError::Report), stage.copier());
    let mut io = SimIo::new(&stage.files, 2, 0);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
    let (end, record) = stage.switch();
    job.pivot(end, record);
    let mut tools = Tools { io: &mut io, arena: &stage.arena, waker: &stage.waker };
    job.step(&mut tools, Token(0));
    job.step(&mut tools, Token(0));
    assert!(stage.gate.enter(&stage.waker).is_some(), "the gate is open while the target is flushed");
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoted), Phase::Pivoted);
}

/// Ready, and asked for a pivot that waits.
fn pending(stage: &Stage, io: &mut SimIo, copier: &mut (Copier, SimIo)) -> Job {
    let mut job = stage.job(OnError::Report);
    assert_eq!(stage.run(&mut job, io, copier, Phase::Ready), Phase::Ready);
    let (end, record) = stage.switch();
    job.pivot(end, record);
    job.hold();
    assert!(!job.awaits_finalize() && job.stands() == JobStatus::Ready);
    assert_eq!(stage.run(&mut job, io, copier, Phase::Pivoting), Phase::Ready, "it waits");
    assert!(job.awaits_finalize() && job.stands() == JobStatus::Pending && job.is_ending());
    job
}

#[test]
fn a_pending_pivot_follows_the_guest_until_it_is_finalized() {
    let stage = Stage::new();
    let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
    let mut job = pending(&stage, &mut io, &mut copier);
    let pass = stage.gate.enter(&stage.waker).expect("the gate is open");
    assert!(pass.route().mirror.is_some(), "what is written now is marked");
    stage.mirror.written(ByteRange { start: 0, end: 3 * CHUNK });
    drop(pass);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Ready);
    assert!(stage.mirror.is_settled(), "and copied");
    // Whoever pauses it now has it finalized all the same.
    job.pause(true);
    stage.mirror.written(ByteRange { start: 0, end: CHUNK });
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Ready);
    assert!(!stage.mirror.is_settled(), "it rests");
    job.finalize();
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoted), Phase::Pivoted);
    assert!(job.is_complete() && job.stands() == JobStatus::Concluded);
}

/// A pivot that was begun before anybody knew that the target is out of reach was undone with an error, where one that was
/// asked for a moment later waited.
#[test]
fn a_pivot_whose_last_pass_fails_waits_where_the_copy_is_tried_again() {
    for policy in [OnError::Report, OnError::Ignore, OnError::BackOff] {
        let stage = Stage::new();
        let (mut job, mut copier) = (stage.job(policy), stage.copier());
        let mut io = SimIo::new(&stage.files, 2, 0);
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
        let inside = stage.gate.enter(&stage.waker);
        let (end, record) = stage.switch();
        job.pivot(end, record);
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Pivoting);
        stage.mirror.dirty.mark(ByteRange { start: 0, end: CHUNK });
        stage.mirror.fail(true, Error::invalid("out of reach"));
        drop(inside);
        let goes_on = policy != OnError::Report;
        let last = if goes_on { Phase::Pivoted } else { Phase::Failed };
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, last), last, "{policy:?}");
        assert_eq!(job.take_undone().is_none(), goes_on, "{policy:?}");
        assert_eq!(stage.mirror.is_settled(), goes_on, "{policy:?}");
    }
}

#[test]
fn a_pending_pivot_can_be_given_up() {
    let stage = Stage::new();
    let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
    let mut job = pending(&stage, &mut io, &mut copier);
    job.cancel(true);
    job.hold();
    assert_eq!(
        stage.run(&mut job, &mut io, &mut copier, Phase::Cancelled),
        Phase::Cancelled,
        "who gives up does not wait"
    );
    assert!(stage.gate.enter(&stage.waker).is_some_and(|pass| pass.route().mirror.is_none()));
    assert!(!job.is_complete());
}

/// An end that was undone left the job pending: nothing was asked for any more, and nothing could be.
#[test]
fn a_finalize_that_is_undone_leaves_a_ready_job() {
    let stage = Stage::new();
    let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
    let mut job = pending(&stage, &mut io, &mut copier);
    let stuck = stage.gate.enter(&stage.waker);
    job.finalize();
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoting), Phase::Pivoting);
    assert_eq!(job.stands(), JobStatus::Pending);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Ready), Phase::Ready);
    assert!(job.take_undone().is_some() && job.stands() == JobStatus::Ready && !job.is_ending());
    drop(stuck);
    let (end, record) = stage.switch();
    job.pivot(end, record);
    assert_eq!(stage.run(&mut job, &mut io, &mut copier, Phase::Pivoted), Phase::Pivoted, "once more, at once");
}

/// A job that backs off from a target without space for so long: how often it was refused, for how long it rests then,
/// and what has become of it when there was space and it was resumed.
fn full_target(seconds: u64) -> (u64, Option<Duration>, Phase) {
    let stage = Stage::new();
    let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
    let mut job = stage.job(OnError::BackOff);
    stage.files.set_full(1, true);
    while io.now() < Duration::from_secs(seconds) {
        stage.step(&mut job, &mut io, &mut copier);
    }
    let (refused, rest) = (stage.files.set_full(1, false), job.backs_off());
    job.pause(false);
    (refused, rest, stage.run(&mut job, &mut io, &mut copier, Phase::Ready))
}

/// The rests grow from 100 ms to 10 s, so that two minutes are a dozen tries; when it is resumed it tries at once.
#[test]
fn a_target_that_is_full_is_tried_seldom_and_gets_everything_when_it_has_space() {
    let (refused, rest, phase) = full_target(120);
    assert!((8..40).contains(&refused), "{refused} writes");
    assert_eq!((rest, phase), (Some(Duration::from_secs(10)), Phase::Ready));
}

#[test]
fn a_target_that_is_tried_at_once_is_caught() {
    plant(Some(Fault::TryAtOnce));
    let (refused, ..) = full_target(120);
    plant(None);
    assert!(refused > 1000, "{refused} writes");
}

/// A user without space has no space: the quota's error was one like any other, and ended the job.
#[test]
fn a_quota_that_is_used_up_is_no_space() {
    for (errno, phase, io_status) in [
        (122, Phase::Seeding, IoStatus::Nospace),
        (28, Phase::Seeding, IoStatus::Nospace),
        (5, Phase::Failed, IoStatus::Ok),
    ] {
        let stage = Stage::new();
        let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
        let mut job = stage.job(OnError::Enospc);
        stage.files.set_refusing(1, Some(errno));
        while job.error().is_none() {
            stage.step(&mut job, &mut io, &mut copier);
        }
        assert_eq!((job.is_paused(), job.io_status()), (phase == Phase::Seeding, io_status), "{errno}");
        stage.files.set_refusing(1, None);
        job.pause(false);
        let last = if phase == Phase::Failed { Phase::Failed } else { Phase::Ready };
        assert_eq!(stage.run(&mut job, &mut io, &mut copier, last), last, "{errno}");
    }
}

/// A policy that is changed holds for the error that stands, too.
#[test]
fn an_error_that_stands_is_decided_upon_anew() {
    for (first, then, phase) in [
        (OnError::Stop, OnError::Report, Phase::Failed),
        (OnError::BackOff, OnError::Report, Phase::Failed),
        (OnError::BackOff, OnError::Stop, Phase::Seeding),
        (OnError::Stop, OnError::BackOff, Phase::Seeding),
    ] {
        let stage = Stage::new();
        let (mut io, mut copier) = (SimIo::new(&stage.files, 2, 0), stage.copier());
        let mut job = stage.job(first);
        stage.files.set_full(1, true);
        while job.error().is_none() {
            stage.step(&mut job, &mut io, &mut copier);
        }
        assert_eq!((job.is_paused(), job.is_paused_by_hand()), (first == OnError::Stop, false), "{first:?}");
        job.set_on_error([OnError::Report, then]);
        stage.run(&mut job, &mut io, &mut copier, Phase::Failed);
        assert_eq!(job.phase(), phase, "{first:?}, {then:?}");
        assert_eq!((job.is_paused(), job.backs_off().is_some()), (then == OnError::Stop, then == OnError::BackOff));
    }
}

/// What could not be read is never called copied: the job is not ready, however little that is.
#[test]
fn a_source_whose_errors_are_ignored_is_never_ready_before_it_could_be_read() {
    let stage = Stage::new();
    let (mut io, (copier, copies)) = (SimIo::new(&stage.files, 2, 0), stage.copier());
    let mut copier = (copier, NoRead { io: copies, fails: true });
    let mut job = Job::start(Parts { on_source_error: OnError::Ignore, ..stage.parts(OnError::Report) });
    for _ in 0..5_000 {
        stage.step(&mut job, &mut io, &mut copier);
        assert!(!matches!(job.phase(), Phase::Ready | Phase::Failed));
    }
    assert!(stage.mirror.missed_len() > 0 && job.error().is_some_and(|error| error.starts_with("source")));
    copier.1.fails = false;
    while job.phase() != Phase::Ready {
        stage.step(&mut job, &mut io, &mut copier);
    }
    assert_eq!(stage.mirror.missed_len(), 0);
}

/// Fewer copies are under way at a time than there is memory for, and again as many.
#[test]
fn as_many_copies_are_under_way_as_the_buffer_allows() {
    let most = |runs_max: u64| {
        let stage = Stage::new();
        stage.mirror.set_runs_max(runs_max);
        stage.mirror.seed(ByteRange { start: 0, end: DISK });
        let (mut copier, mut io) = stage.copier();
        let mut most = 0;
        while !stage.mirror.is_settled() {
            let mut done = Vec::new();
            io.reap(Wait::No, &mut done).expect("a simulated queue");
            copier.step(&mut Tools { io: &mut io, arena: &stage.arena, waker: &stage.waker }, &mut done);
            most = most.max(stage.mirror.stats.underway.load(std::sync::atomic::Ordering::Relaxed));
        }
        most
    };
    assert_eq!((most(1), most(2), most(u64::MAX)), (16 << 10, 32 << 10, 32 << 10));
}

/// A queue in which reads fail, or all but.
struct NoRead {
    io: SimIo,
    fails: bool,
}

impl Io for NoRead {
    fn submit(&mut self, token: Token, op: Op) {
        self.io.submit(token, op);
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.io.reap(wait, done)?;
        for completion in done.iter_mut().filter(|_| self.fails) {
            if matches!(completion.op, Op::Read { .. }) {
                completion.result = Err(io::Error::from_raw_os_error(5));
            }
        }
        Ok(())
    }
    fn now(&self) -> Duration {
        self.io.now()
    }
}
