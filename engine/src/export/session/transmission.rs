//! The requests of one client: which are under way, and whether there is room for more.
use super::inbound::{Inbound, Item};
use super::outbound::Outbound;
use super::reply::{self, Answer};
use super::slot::{self, Slot};
use super::{Ending, Load, PAYLOAD_MAX, REQUESTS_MAX, SLOTS_MAX};
use crate::disk::{Status, Tools};
use crate::export::gate::Gate;
use crate::export::late::Late;
use crate::export::request::GuestRequest;
use crate::export::roll::Member;
use crate::io::{Buffer, Completion, Io, Op, Token};
use formats::nbd::request::{check, check_filter};
use formats::nbd::wire::Header;
use formats::nbd::{Action, Negotiated, ReplyTo, Verdict};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What was negotiated, and what is under way.
pub(super) struct Transmission {
    negotiated: Negotiated,
    gate: Arc<Gate>,
    /// Present as long as a request of it may touch the disk.
    member: Option<Member>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// What goes on behind the answers of requests, in their slots: no more than there are requests, for nobody begins
    /// anything of that kind while there is any.
    late: BTreeMap<usize, Late>,
    /// The token of the timer, and whether it runs.
    timer: (Token, bool),
    /// Of all requests whose replies are not sent.
    load: Load,
    /// A request that waits for room.
    waiting: Option<Admission>,
    /// Whose payload is coming in.
    expected: Option<Expected>,
}

#[derive(Clone, Copy)]
struct Admission {
    to: ReplyTo,
    action: Action,
}

/// Why no more is taken in.
pub(super) enum Stop {
    /// It may rest here, between two requests.
    Between,
    /// It has come to its end.
    Over(Ending),
}

/// What a payload belongs to.
enum Expected {
    /// A write that was admitted.
    Write(Admission),
    /// A BLOCK_STATUS that is to be judged by it.
    Filter(Header),
}

impl Transmission {
    /// The start of it: nothing is under way.
    pub fn new(negotiated: Negotiated, gate: Arc<Gate>, member: Member, timer: Token) -> Self {
        Self {
            negotiated,
            member: Some(member),
            gate,
            slots: (0..SLOTS_MAX).map(|_| None).collect(),
            free: (0..SLOTS_MAX).rev().collect(),
            late: BTreeMap::new(),
            timer: (timer, false),
            load: Load::default(),
            waiting: None,
            expected: None,
        }
    }

    /// The export's name.
    pub fn export(&self) -> &str {
        &self.negotiated.export.name
    }

    /// The way to its disk.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// True where no request touches the disk.
    pub fn is_idle(&self) -> bool {
        self.free.len() + self.late.len() == SLOTS_MAX
    }

    /// No request will come any more. False where something of its requests is under way still; it does not touch the
    /// disk that its client's next connection finds.
    pub fn leave(&mut self) -> bool {
        self.member = None;
        self.late.is_empty()
    }

    /// These replies hold nothing any more.
    pub fn gone(&mut self, load: Load) {
        self.load.take(load);
    }

    /// On another thread: the timer of the one before is forgotten.
    pub fn move_to(&mut self, timer: Token) {
        self.timer = (timer, false);
    }

    /// True where nothing of its requests is under way, late or not.
    pub fn is_still(&self) -> bool {
        self.is_idle() && self.late.is_empty()
    }

    /// Starts the requests that came, as long as there is room. Between two requests it stops there, where it `may_rest`.
    pub fn take_in<I: Io>(
        &mut self,
        inbound: &mut Inbound,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
        may_rest: bool,
    ) -> Option<Stop> {
        if may_rest && self.is_between(inbound) {
            return Some(Stop::Between);
        }
        if !self.member.as_mut().is_some_and(|member| member.may_begin(tools.waker)) {
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
            if may_rest && self.is_between(inbound) {
                return Some(Stop::Between);
            }
            // A request whose payload is coming in has its place; any other needs one for its reply.
            if self.expected.is_none() && !self.has_room(0) {
                return None;
            }
            match inbound.next()? {
                Item::Payload(payload) => match self.expected.take().expect("a payload was expected") {
                    Expected::Write(admission) => self.start(admission, Some(payload), out, tools, base),
                    Expected::Filter(header) => {
                        let verdict = check_filter(&self.negotiated, &header, &payload);
                        self.judge(&header, verdict, inbound, out);
                    }
                },
                Item::Header(bytes) => {
                    let header = Header::parse(self.negotiated.style, &bytes);
                    let Some(header) = header else { return Some(Stop::Over(Ending::Magic)) };
                    let verdict = check(&self.negotiated, &header);
                    let ending = self.judge(&header, verdict, inbound, out);
                    if ending.is_some() {
                        return ending.map(Stop::Over);
                    }
                }
            }
        }
    }

    /// No request has come in part, but for its header.
    fn is_between(&self, inbound: &Inbound) -> bool {
        self.waiting.is_none() && self.expected.is_none() && inbound.is_between()
    }

    /// What was agreed upon with the client.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// A request's way: to its admission, to a refusal, or to the end of the session.
    fn judge(
        &mut self,
        header: &Header,
        verdict: Verdict,
        inbound: &mut Inbound,
        out: &mut Outbound,
    ) -> Option<Ending> {
        let to = ReplyTo { style: self.negotiated.style, cookie: header.cookie, offset: header.offset };
        match verdict {
            Verdict::Do(action) => self.waiting = Some(Admission { to, action }),
            Verdict::Filter(len) => {
                // A few bytes: they cost no room.
                inbound.expect_payload(Buffer::alone(len));
                self.expected = Some(Expected::Filter(*header));
            }
            Verdict::Disconnect => return Some(Ending::Disconnected),
            Verdict::Hangup => return Some(Ending::TooLong(header.len)),
            Verdict::Refuse(refusal) => {
                inbound.skip(refusal.payload_len);
                let load = Load { requests: 1, bytes: 0 };
                self.load.add(load);
                self.reply(to, load, Answer::Failed(refusal.error, refusal.why.into()), out);
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
        self.load.add(Load { requests: 1, bytes: slot::bytes_of(&admission.action) });
        if let Action::Write { range, .. } = admission.action {
            inbound.expect_payload(slot::take(tools, range.len()));
            self.expected = Some(Expected::Write(admission));
        } else {
            self.start(admission, None, out, tools, base);
        }
    }

    fn start<I: Io>(
        &mut self,
        Admission { to, action }: Admission,
        payload: Option<Buffer>,
        out: &mut Outbound,
        tools: &mut Tools<I>,
        base: Token,
    ) {
        let slot = Slot::start(to, action, payload, &self.gate, tools);
        let number = self.free.pop().expect("as many slots as requests");
        self.slots[number] = Some(slot);
        self.step(number, out, tools, base);
    }

    /// Takes one slot as far as it goes, its reply included.
    fn step<I: Io>(&mut self, number: usize, out: &mut Outbound, tools: &mut Tools<I>, base: Token) {
        let Some(slot) = &mut self.slots[number] else { return };
        if let Some(answer) = slot.step(&self.negotiated, &self.gate, tools, token(base, number)) {
            let (to, load, late) = (slot.to, Load { requests: 1, bytes: slot.bytes }, slot.take_late());
            self.slots[number] = None;
            match late {
                None => self.free.push(number),
                Some(late) => {
                    self.late.insert(number, late);
                    self.step_late(number, tools, base);
                }
            }
            self.reply(to, load, answer, out);
        } else if let (Some(ends), (timer, false)) = (slot.patience_ends(), self.timer) {
            self.timer.1 = true;
            tools.io.submit(timer, Op::Timeout { after: ends.saturating_sub(tools.io.now()) });
        }
    }

    fn step_late<I: Io>(&mut self, number: usize, tools: &mut Tools<I>, base: Token) {
        let Some(late) = self.late.get_mut(&number) else { return };
        if late.step(tools, late_token(base, number)) == Status::Done
            && let Some(late) = self.late.remove(&number)
        {
            late.end();
            self.free.push(number);
        }
    }

    /// The timer has run: the patience of some requests may be over.
    pub fn look_at_the_time<I: Io>(&mut self, out: &mut Outbound, tools: &mut Tools<I>, base: Token) {
        self.timer.1 = false;
        for number in 0..SLOTS_MAX {
            if self.slots[number].as_ref().is_some_and(|slot| slot.patience_ends().is_some()) {
                self.step(number, out, tools, base);
            }
        }
    }

    fn reply(&self, to: ReplyTo, load: Load, answer: Answer, out: &mut Outbound) {
        reply::put(out, to, answer);
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
        let number = (local / GuestRequest::TOKENS) as usize;
        if let Some(late) = self.late.get_mut(&number) {
            late.complete(tools, late_token(base, number), completion);
            return self.step_late(number, tools, base);
        }
        let slot = self.slots[number].as_mut().expect("who has operations has a slot");
        slot.complete(tools, token(base, number), completion);
        self.step(number, out, tools, base);
    }

    /// Somebody that a request may wait for is done.
    pub fn wake<I: Io>(&mut self, out: &mut Outbound, tools: &mut Tools<I>, base: Token) {
        for number in 0..SLOTS_MAX {
            if self.slots[number].as_ref().is_some_and(|slot| slot.blocked) {
                self.step(number, out, tools, base);
            }
        }
        for number in self.late.keys().copied().collect::<Vec<_>>() {
            self.step_late(number, tools, base);
        }
    }
}

fn token(base: Token, number: usize) -> Token {
    Token(base.0 + number as u64 * GuestRequest::TOKENS)
}

fn late_token(base: Token, number: usize) -> Token {
    GuestRequest::of_target(token(base, number))
}
