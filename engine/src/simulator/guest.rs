//! A guest: one request after the other through the gate, and its own account of the truth.
use super::files::{AsGuest, Dice, Files, SECTOR, SimIo};
use super::history::{History, Trust};
use crate::disk::{Status, Tools};
use crate::export::gate::Gate;
use crate::export::late::Late;
use crate::export::request::{Action, GuestRequest};
use crate::io::{Arena, Buffer, Completion, Io, Token, Wait, Waker};
use formats::image::Zeroing;
use formats::range::ByteRange;

/// Longest request, in sectors.
const SECTORS_MAX: u64 = 20;

pub struct Guest {
    io: SimIo,
    arena: Arena,
    waker: Waker,
    under_way: Option<UnderWay>,
    /// What its requests left under way, each with the first token of its request.
    late: Vec<(Token, Late)>,
    /// Of the request under way, or the next one.
    base: Token,
    blocked: bool,
    /// Requests that it will still make.
    pub left: u32,
    /// It discards, too.
    pub discards: bool,
    /// It only writes, and to so many of the disk's first sectors at most.
    pub writes_to: Option<u64>,
    number: u64,
    next_value: u64,
}

struct UnderWay {
    request: GuestRequest,
    kind: Kind,
    range: ByteRange,
    begin: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write { value: u64, fua: bool },
    Discard,
    Flush,
}

impl Guest {
    pub fn new(files: &Files, number: u64, seed: u64, fail_one_in: u64, requests: u32) -> Self {
        Self {
            io: SimIo::new(files, seed ^ (number << 32), fail_one_in),
            arena: Arena::new(64 << 10),
            waker: Waker::simulated(number as u32),
            under_way: None,
            late: Vec::new(),
            base: Token(0),
            blocked: false,
            left: requests,
            discards: true,
            writes_to: None,
            number,
            next_value: 0,
        }
    }

    /// True where it waits for nothing.
    pub fn is_answered(&self) -> bool {
        self.under_way.is_none()
    }

    /// True where nothing of it is under way either.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_none() && self.late.is_empty()
    }

    /// True while it makes zeroes.
    pub fn is_zeroing(&self) -> bool {
        let zero = |under_way: &UnderWay| matches!(under_way.kind, Kind::Write { value: 0, .. });
        self.under_way.as_ref().is_some_and(zero)
    }

    /// The process is gone; the kernel ends what it has.
    pub fn die(mut self) {
        self.io.abandon();
        // What was under way is dropped with its process, not by its rules.
        std::mem::forget((self.under_way.take(), std::mem::take(&mut self.late)));
    }

    /// One move.
    pub fn step(&mut self, gate: &Gate, history: &mut History, dice: &mut Dice) {
        let _as_guest = AsGuest::new();
        self.step_late();
        if self.under_way.is_none() {
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            self.base = Token(self.base.0 + GuestRequest::TOKENS);
            self.begin(gate.route().disk.size(), history, dice);
        }
        // As its thread does: it waits in its ring for an operation's end, or for its waker.
        let timed = self.under_way.as_ref().is_some_and(|under_way| under_way.request.patience_ends().is_some());
        if self.blocked && !timed && self.io.is_empty() && !self.waker.was_woken() {
            return;
        }
        let done = self.reap();
        let Some(under_way) = &mut self.under_way else { return };
        let mut tools = Tools { io: &mut self.io, arena: &self.arena, waker: &self.waker };
        for completion in done {
            under_way.request.complete(&mut tools, self.base, completion);
        }
        let status = under_way.request.step(gate, &mut tools, self.base);
        self.blocked = status == Status::Blocked;
        if status == Status::Done {
            let mut under_way = self.under_way.take().expect("just stepped");
            self.late.extend(under_way.request.take_late().map(|late| (self.base, late)));
            under_way.end(history);
        }
    }

    /// What is done of the request under way; what is late takes its own.
    fn reap(&mut self) -> Vec<Completion> {
        let mut done = Vec::new();
        self.io.reap(Wait::No, &mut done).expect("a simulated queue");
        let mut tools = Tools { io: &mut self.io, arena: &self.arena, waker: &self.waker };
        let mut mine = Vec::new();
        for completion in done {
            let of =
                |(base, _): &&mut (Token, Late)| (base.0..base.0 + GuestRequest::TOKENS).contains(&completion.token.0);
            match self.late.iter_mut().find(of) {
                Some((base, late)) => late.complete(&mut tools, GuestRequest::of_target(*base), completion),
                None => mine.push(completion),
            }
        }
        mine
    }

    /// Goes on with what nobody waits for.
    fn step_late(&mut self) {
        if self.under_way.is_none() && !self.late.is_empty() {
            assert!(self.reap().is_empty(), "nothing else is under way");
        }
        for (base, mut late) in std::mem::take(&mut self.late) {
            let mut tools = Tools { io: &mut self.io, arena: &self.arena, waker: &self.waker };
            match late.step(&mut tools, GuestRequest::of_target(base)) {
                Status::Done => late.end(),
                _ => self.late.push((base, late)),
            }
        }
    }

    fn begin(&mut self, size: u64, history: &mut History, dice: &mut Dice) {
        let sectors = self.writes_to.unwrap_or(u64::MAX).min(size / SECTOR as u64);
        let first = dice.roll(sectors);
        let count = 1 + dice.roll(SECTORS_MAX.min(sectors - first));
        let range = ByteRange { start: first * SECTOR as u64, end: (first + count) * SECTOR as u64 };
        self.next_value += 1;
        let value = self.number << 32 | self.next_value;
        let begin = history.tick();
        let (kind, action, fua) = match dice.roll(if self.writes_to.is_some() { 6 } else { 10 }) {
            0..=4 => {
                let mut buf = Buffer::alone(range.len() as usize);
                buf.chunks_mut(SECTOR).for_each(|sector| fill(sector, value));
                let fua = dice.one_in(8);
                (Kind::Write { value, fua }, Action::Write(buf), fua)
            }
            6 if self.discards => (Kind::Discard, Action::Zero { zeroing: Zeroing::Discard, fast: false }, false),
            5 | 6 => {
                (Kind::Write { value: 0, fua: false }, Action::Zero { zeroing: Zeroing::Unmap, fast: false }, false)
            }
            7 | 8 => (Kind::Read, Action::Read(Buffer::alone(range.len() as usize)), false),
            _ => (Kind::Flush, Action::Flush, false),
        };
        if let Kind::Write { value, .. } = kind {
            sectors_of(range).for_each(|sector| history.begin(sector, value, begin));
        }
        if kind == Kind::Discard {
            sectors_of(range).for_each(|sector| history.begin(sector, 0, begin));
        }
        let range_asked = if kind == Kind::Flush { ByteRange { start: 0, end: 0 } } else { range };
        let request = GuestRequest::new(action, range_asked, fua);
        self.under_way = Some(UnderWay { request, kind, range, begin });
    }
}

impl UnderWay {
    fn end(self, history: &mut History) {
        let (outcome, buf) = self.request.end();
        let now = history.tick();
        if matches!(self.kind, Kind::Write { .. } | Kind::Discard) {
            let weak = outcome.is_err() || self.kind == Kind::Discard;
            sectors_of(self.range).for_each(|sector| history.end(sector, self.begin, now, weak));
        }
        if outcome.is_err() {
            return;
        }
        match self.kind {
            Kind::Write { fua: true, .. } => {
                sectors_of(self.range).for_each(|sector| history.durable(sector, self.begin));
            }
            Kind::Write { .. } | Kind::Discard => {}
            Kind::Flush => history.flushed(self.begin),
            Kind::Read => {
                let bytes = buf.expect("a read has its buffer");
                for (sector, bytes) in sectors_of(self.range).zip(bytes.chunks(SECTOR)) {
                    let value = value_of(bytes);
                    assert!(
                        history.allows(sector, value, Trust::AnsweredBefore(self.begin)),
                        "a guest read {value:x} in sector {sector}: {}",
                        history.describe(sector)
                    );
                }
            }
        }
    }
}

fn sectors_of(range: ByteRange) -> std::ops::Range<usize> {
    range.start as usize / SECTOR..range.end as usize / SECTOR
}

/// A sector of one value all over.
pub fn fill(sector: &mut [u8], value: u64) {
    sector.chunks_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
}

/// The value of a sector; one that is torn has a value that nobody wrote.
pub fn value_of(sector: &[u8]) -> u64 {
    let mut words = sector.chunks(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let first = words.next().expect("a sector has words");
    if words.all(|word| word == first) { first } else { u64::MAX }
}
