//! The requests of one client: which are under way, and whether there is room for more.
use super::inbound::{Inbound, Item};
use super::outbound::Outbound;
use super::reply::{self, Answer};
use super::slot::{self, Slot};
use super::{Ending, Load, PAYLOAD_MAX, REQUESTS_MAX};
use crate::disk::{Task, Tools};
use crate::export::gate::Gate;
use crate::export::roll::Member;
use crate::io::{Buffer, Completion, File, Io, Token};
use formats::nbd::request::check;
use formats::nbd::wire::Header;
use formats::nbd::{Action, Negotiated, Verdict};
use std::sync::Arc;

/// What was negotiated, and what is under way.
pub(super) struct Transmission {
    negotiated: Negotiated,
    gate: Arc<Gate>,
    /// Present as long as a request of it may touch the disk.
    member: Member,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Of all requests whose replies are not sent.
    load: Load,
    /// A request that waits for room.
    waiting: Option<Admission>,
    /// A write whose payload is coming in.
    writing: Option<Admission>,
}

#[derive(Clone, Copy)]
struct Admission {
    cookie: u64,
    action: Action,
}

impl Transmission {
    /// The start of it: nothing is under way.
    pub fn new(negotiated: Negotiated, gate: Arc<Gate>, socket: File) -> Self {
        Self {
            negotiated,
            member: gate.roll.join(socket),
            gate,
            slots: (0..REQUESTS_MAX).map(|_| None).collect(),
            free: (0..REQUESTS_MAX).rev().collect(),
            load: Load::default(),
            waiting: None,
            writing: None,
        }
    }

    /// The export's name.
    pub fn export(&self) -> &str {
        &self.negotiated.export.name
    }

    /// True where no request touches the disk.
    pub fn is_idle(&self) -> bool {
        self.free.len() == REQUESTS_MAX
    }

    /// These replies hold nothing any more.
    pub fn gone(&mut self, load: Load) {
        self.load.take(load);
    }

    /// Starts the requests that came, as long as there is room. Says when it is time to leave.
    pub fn take_in<I: Io>(
        &mut self,
        inbound: &mut Inbound,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
    ) -> Option<Ending> {
        if !self.member.may_begin(tools.waker) {
            return None;
        }
        loop {
            if let Some(admission) = self.waiting.take() {
                if !self.has_room(slot::bytes_of(&admission.action)) {
                    self.waiting = Some(admission);
                    return None;
                }
                self.admit(admission, inbound, out, tools, base);
            }
            // A request whose payload is coming in has its place; any other needs one for its reply.
            if self.writing.is_none() && !self.has_room(0) {
                return None;
            }
            match inbound.next()? {
                Item::Payload(payload) => {
                    let Admission { cookie, action } = self.writing.take().expect("a payload was expected");
                    self.start(cookie, action, Some(payload), out, tools, base);
                }
                Item::Header(bytes) => {
                    let Some(header) = Header::parse(&bytes) else { return Some(Ending::Magic) };
                    let ending = self.judge(&header, inbound, out);
                    if ending.is_some() {
                        return ending;
                    }
                }
            }
        }
    }

    /// A request's way: to its admission, to a refusal, or to the end of the session.
    fn judge(&mut self, header: &Header, inbound: &mut Inbound, out: &mut Outbound) -> Option<Ending> {
        match check(&self.negotiated, header) {
            Verdict::Do(action) => self.waiting = Some(Admission { cookie: header.cookie, action }),
            Verdict::Disconnect => return Some(Ending::Disconnected),
            Verdict::Hangup => return Some(Ending::TooLong(header.len)),
            Verdict::Refuse(refusal) => {
                inbound.skip(refusal.payload_len);
                let load = Load { requests: 1, bytes: 0 };
                self.load.add(load);
                self.reply(header.cookie, load, Answer::Failed(refusal.error, refusal.why.into()), out);
            }
        }
        None
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.load.requests < REQUESTS_MAX && (self.load.bytes == 0 || self.load.bytes + bytes <= PAYLOAD_MAX)
    }

    fn admit<I: Io>(
        &mut self,
        admission: Admission,
        inbound: &mut Inbound,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
    ) {
        let Admission { cookie, action } = admission;
        self.load.add(Load { requests: 1, bytes: slot::bytes_of(&action) });
        if let Action::Write { range, .. } = action {
            inbound.expect_payload(slot::take(tools, range.len()));
            self.writing = Some(admission);
        } else {
            self.start(cookie, action, None, out, tools, base);
        }
    }

    fn start<I: Io>(
        &mut self,
        cookie: u64,
        action: Action,
        payload: Option<Buffer>,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
    ) {
        let structured = self.negotiated.structured_replies;
        let slot = Slot::start(cookie, action, payload, structured, &self.gate, tools);
        let number = self.free.pop().expect("as many slots as requests");
        self.slots[number] = Some(slot);
        self.step(number, out, tools, base);
    }

    /// Takes one slot as far as it goes, its reply included.
    fn step<I: Io>(&mut self, number: usize, out: &mut Outbound, tools: &mut Tools<I>, base: Token) {
        let Some(slot) = &mut self.slots[number] else { return };
        if let Some(answer) = slot.step(&self.gate, tools, token(base, number)) {
            let (cookie, load) = (slot.cookie, Load { requests: 1, bytes: slot.bytes });
            self.slots[number] = None;
            self.free.push(number);
            self.reply(cookie, load, answer, out);
        }
    }

    fn reply(&self, cookie: u64, load: Load, answer: Answer, out: &mut Outbound) {
        reply::put(out, self.negotiated.structured_replies, cookie, answer);
        out.ends_reply(load);
    }

    /// Takes in what became of an operation of a slot; `local` is its token's distance from `base`.
    pub fn complete<I: Io>(
        &mut self,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
        local: u64,
        completion: Completion,
    ) {
        let number = (local / Task::TOKENS) as usize;
        let slot = self.slots[number].as_mut().expect("who has operations has a slot");
        slot.complete(tools, token(base, number), completion);
        self.step(number, out, tools, base);
    }

    /// Somebody that a request may wait for is done.
    pub fn wake<I: Io>(&mut self, out: &mut Outbound, tools: &mut Tools<I>, base: Token) {
        for number in 0..REQUESTS_MAX {
            if self.slots[number].as_ref().is_some_and(|slot| slot.blocked) {
                self.step(number, out, tools, base);
            }
        }
    }
}

fn token(base: Token, number: usize) -> Token {
    Token(base.0 + number as u64 * Task::TOKENS)
}
