//! One NBD connection, stepped: it takes in what came, starts what can be started, and never waits.
//!
//! ```text
//! socket ─► inbound ─► handshake ─► transmission ─► outbound ─► socket
//!                                     │     ▲
//!                                     ▼     │  a slot each, answered in the order they are done
//!                                   guest requests
//! ```
//!
//! Behind STARTTLS, `layer` is TLS between the socket and the two.
//!
//! A client can have `REQUESTS_MAX` requests and `PAYLOAD_MAX` bytes of payload under way, those
//! counted whose replies it has not taken yet. More stay in its socket until there is room.
//!
//! One thread may step several. So a step is bounded, and between the choice of an export and the first request, where
//! nothing is under way, a session can go to the thread of its disk: see `Progress::Chosen`.
//!
//! A connection ends when nothing of it is under way: what a client that is gone had asked for is
//! done to its end before, so that no late write of it can meet those of its next connection.
mod handed;
mod inbound;
mod layer;
mod outbound;
mod reply;
mod resting;
mod slot;
mod status;
mod transmission;

#[cfg(test)]
mod tests;

use super::gate::Gate;
use super::request::GuestRequest;
use super::roll::Member;
use crate::disk::Tools;
use crate::fault::{Fault, planted};
use crate::io::{Arena, Completion, File, Io, Op, Token, Waker};
use crate::tls::{Credentials, in_words};
use formats::nbd::handshake::Reason;
use formats::nbd::wire::Header;
use formats::nbd::{Exports, Handshake, Negotiated, Outcome, Tls};
pub use handed::Handed;
use inbound::Inbound;
use layer::Layer;
use outbound::Outbound;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use transmission::{Stop, Transmission};

/// Requests that one client may have under way.
pub const REQUESTS_MAX: usize = 64;
/// Payload that one client may have under way, in bytes; one request may always be.
pub const PAYLOAD_MAX: u64 = 64 << 20;
/// Memory for payload that the sessions of a thread should be given, in bytes; what does not fit there gets its own.
pub const ARENA_LEN: usize = 16 << 20;
/// Operations that the sessions of a thread have under way, most of the time.
pub const RING_DEPTH: u32 = 128;
/// A client that has not chosen an export by then is dropped.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// A client that leaves and does not take its last replies by then is dropped.
pub const LINGER_MAX: Duration = Duration::from_secs(10);

/// A client whose request has come in part and does not come whole by then is not handed over.
pub const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// How often one step takes in requests: a client whose requests are answered at once, one after the other, keeps nobody
/// else waiting for long.
const ROUNDS_MAX: usize = 4;
/// Requests, and writes to a target that outlast theirs.
const SLOTS_MAX: usize = 2 * REQUESTS_MAX;

/// Tokens, from the session's own on: its own operations, then `GuestRequest::TOKENS` for each slot.
const RECEIVE: u64 = 0;
const SEND: u64 = 1;
const WAKE: u64 = 2;
const DEADLINE: u64 = 3;
const LINGER: u64 = 4;
const PATIENCE: u64 = 5;
const HAND_OVER: u64 = 6;
const SLOTS: u64 = 8;
/// How many tokens a session uses.
pub const TOKENS: u64 = SLOTS + SLOTS_MAX as u64 * GuestRequest::TOKENS;

/// The disks that a client may ask for.
pub trait Directory: Exports + Send + Sync {
    /// Lets the client at `socket` in to the disk of this name, which is never empty. One step: who was let in is on
    /// the gate's roll before the disk can be taken away.
    fn enter(&self, name: &str, socket: File) -> Option<(Arc<Gate>, Member)>;
}

/// Where a session stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Step it again when something of it is done.
    Running,
    /// It has chosen its export, or it is between two requests and was asked to rest there: no request and no reply is
    /// under way. It goes on with `begin`, here or, after `move_to`, on another thread.
    Resting,
    /// Nothing of it touches a disk any more, and its socket is shut down: it can be dropped.
    Over(Ending),
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ending {
    /// As it should.
    #[error("the client disconnected")]
    Disconnected,
    /// Without a word.
    #[error("the client is gone")]
    Gone,
    /// On our wish.
    #[error("the server stops")]
    Stopped,
    /// Somebody else has the connection from now on.
    #[error("another process takes it over")]
    HandedOver,
    /// Before an export was chosen.
    #[error("handshake: {0}")]
    Handshake(Reason),
    /// What came is not what TLS should be, or the client is nobody that may come in.
    #[error("TLS: {0}")]
    Tls(String),
    /// Before an export was chosen.
    #[error("no export was chosen in {} s", HANDSHAKE_MAX.as_secs())]
    Deadline,
    /// Between the choice and the first request.
    #[error("the export {0:?} was taken away")]
    NoExport(String),
    /// The stream of requests makes no sense any more.
    #[error("a request does not begin with its magic number")]
    Magic,
    /// Longer than anybody would skip.
    #[error("a write of {0} bytes")]
    TooLong(u64),
}

/// What requests, and replies that were not sent yet, hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    requests: usize,
    bytes: u64,
}

impl Load {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
    }

    fn take(&mut self, other: Self) {
        self.requests -= other.requests;
        self.bytes -= other.bytes;
    }
}

/// One connection.
pub struct Session {
    socket: File,
    directory: Arc<dyn Directory>,
    arena: Arena,
    waker: Waker,
    base: Token,
    credentials: Option<Arc<Credentials>>,
    layer: Layer,
    inbound: Inbound,
    outbound: Outbound,
    phase: Phase,
    stop: Arc<AtomicBool>,
    hand_over: Arc<AtomicBool>,
    /// That was noticed.
    hands_over: bool,
    /// It is to rest between two requests.
    may_rest: bool,
    /// It is there.
    is_between: bool,
    /// The first step on this thread was made.
    begun: bool,
    /// The time is running for the last replies.
    lingers: bool,
    /// Set when no more is taken in.
    leaving: Option<Ending>,
}

enum Phase {
    New,
    Handshake(Box<Handshake>),
    Chosen(Box<Chosen>),
    Transmission(Box<Transmission>),
}

/// An export that was chosen.
struct Chosen {
    negotiated: Negotiated,
    gate: Arc<Gate>,
    member: Member,
}

impl Session {
    /// A session with the client at the other end of `socket`, whose operations are numbered from
    /// `base` on. `waker` wakes the thread that steps it, which keeps no `Op::Wake` of its own.
    pub fn new(socket: File, directory: Arc<dyn Directory>, arena: Arena, waker: Waker, base: Token) -> Self {
        Self {
            inbound: Inbound::new(socket.clone()),
            outbound: Outbound::new(socket.clone()),
            socket,
            directory,
            arena,
            waker,
            base,
            credentials: None,
            layer: Layer::Plain,
            phase: Phase::New,
            stop: Arc::default(),
            hand_over: Arc::default(),
            hands_over: false,
            may_rest: false,
            is_between: false,
            begun: false,
            lingers: false,
            leaving: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    #[cfg(test)]
    pub(crate) fn hand_over_soon(&self) {
        self.hand_over.store(true, Ordering::Release);
    }

    /// The same, ending when `stop` is true and the waker was called, and what is under way is done.
    #[must_use]
    pub fn stopped_by(self, stop: Arc<AtomicBool>) -> Self {
        Self { stop, ..self }
    }

    /// The same, ending between two requests when `hand_over` is true and the waker was called: see `hand_over`.
    #[must_use]
    pub fn handed_over_by(self, hand_over: Arc<AtomicBool>) -> Self {
        Self { hand_over, ..self }
    }

    /// The same, for clients that go on inside TLS.
    #[must_use]
    pub fn with_tls(self, credentials: Option<Arc<Credentials>>) -> Self {
        Self { credentials, ..self }
    }

    /// The name of the export that was chosen.
    pub fn export(&self) -> Option<&str> {
        match &self.phase {
            Phase::Chosen(chosen) => Some(&chosen.negotiated.export.name),
            Phase::Transmission(transmission) => Some(transmission.export()),
            Phase::New | Phase::Handshake(_) => None,
        }
    }

    /// The way to the disk that was chosen.
    pub fn gate(&self) -> Option<&Arc<Gate>> {
        match &self.phase {
            Phase::Chosen(chosen) => Some(&chosen.gate),
            Phase::Transmission(transmission) => Some(transmission.gate()),
            Phase::New | Phase::Handshake(_) => None,
        }
    }

    /// Takes in what is done and starts what can be started. Never waits. All of `done` is its own.
    pub fn step<I: Io>(&mut self, io: &mut I, done: &mut Vec<Completion>) -> Progress {
        if !std::mem::replace(&mut self.begun, true) {
            self.start(io);
        }
        done.drain(..).for_each(|completion| self.complete(io, completion));
        let mut rounds = 0..ROUNDS_MAX;
        loop {
            if self.leaving.is_none() {
                self.take_in(io);
            }
            if self.leaving.is_some() && self.is_idle() {
                self.layer.farewell();
            }
            // Replies that are gone make room for requests that came.
            let Some(gone) = self.outbound.submit(io, self.token(SEND), self.layer.tls()) else { break };
            self.gone(gone);
            if rounds.next().is_none() {
                self.waker.wake();
                break;
            }
        }
        let rests = self.is_between || matches!(self.phase, Phase::Chosen(_));
        if self.leaving.is_none() && !self.layer.is_starting() && !rests {
            self.inbound.submit(io, self.token(RECEIVE));
        }
        match &self.leaving {
            Some(ending) if self.is_idle() => {
                if *ending != Ending::HandedOver {
                    self.socket.shut_down();
                }
                let over = match &mut self.phase {
                    Phase::Transmission(transmission) => transmission.leave(),
                    _ => true,
                };
                if over { Progress::Over(ending.clone()) } else { Progress::Running }
            }
            Some(_) => {
                self.linger(io);
                Progress::Running
            }
            None if rests && (self.is_still() || planted(Fault::MoveBeforeSent)) => Progress::Resting,
            None => Progress::Running,
        }
    }

    fn start<I: Io>(&mut self, io: &mut I) {
        io.submit(self.token(WAKE), Op::Wake { waker: self.waker.clone() });
        if let Phase::New = self.phase {
            self.greet(io);
        }
    }

    fn greet<I: Io>(&mut self, io: &mut I) {
        let mode = self.credentials.as_ref().map_or(Tls::Off, |credentials| credentials.mode());
        let mut greeting = Vec::new();
        self.phase = Phase::Handshake(Box::new(Handshake::new(mode, &mut greeting)));
        self.outbound.bytes(&greeting);
        io.submit(self.token(DEADLINE), Op::Timeout { after: HANDSHAKE_MAX });
    }

    fn token(&self, own: u64) -> Token {
        Token(self.base.0 + own)
    }

    /// No request and no reply is under way.
    fn is_idle(&self) -> bool {
        let requests = match &self.phase {
            Phase::Transmission(transmission) => transmission.is_idle(),
            _ => true,
        };
        requests && self.is_silent()
    }

    /// The same, and nothing goes on behind a reply.
    fn is_still(&self) -> bool {
        let requests = match &self.phase {
            Phase::Transmission(transmission) => transmission.is_still(),
            _ => true,
        };
        requests && self.is_silent()
    }

    /// Nothing waits to be sent, and nothing is being sent.
    fn is_silent(&self) -> bool {
        self.outbound.is_idle() && (self.outbound.is_broken() || !self.layer.has_to_say())
    }

    fn complete<I: Io>(&mut self, io: &mut I, completion: Completion) {
        match completion.token.0 - self.base.0 {
            RECEIVE => self.received(completion.op, completion.result),
            SEND => {
                let (token, tls) = (self.token(SEND), self.layer.tls());
                if let Some(gone) = self.outbound.complete(io, token, tls, completion.op, completion.result) {
                    self.gone(gone);
                }
            }
            WAKE => {
                // First: who rings from now on is heard.
                io.submit(completion.token, completion.op);
                self.wake(io);
            }
            DEADLINE => self.deadline(),
            // Whoever has not listened until now does not.
            LINGER => self.socket.shut_down(),
            HAND_OVER if self.leaving.is_none() => {
                self.leave(Ending::Stopped);
                self.socket.shut_down();
            }
            HAND_OVER => {}
            PATIENCE => {
                let Phase::Transmission(transmission) = &mut self.phase else { unreachable!("requests come later") };
                let mut tools = Tools { io, arena: &self.arena, waker: &self.waker };
                transmission.look_at_the_time(&mut self.outbound, &mut tools, Token(self.base.0 + SLOTS));
            }
            slot => {
                let Phase::Transmission(transmission) = &mut self.phase else { unreachable!("slots come later") };
                let mut tools = Tools { io, arena: &self.arena, waker: &self.waker };
                transmission.complete(
                    &mut self.outbound,
                    &mut tools,
                    Token(self.base.0 + SLOTS),
                    slot - SLOTS,
                    completion,
                );
            }
        }
    }

    fn received(&mut self, op: Op, result: io::Result<u32>) {
        self.inbound.complete(op, result);
        if let Some(tls) = self.layer.tls()
            && let Err(error) = self.inbound.decrypt(tls)
        {
            self.leave(Ending::Tls(in_words(&error)));
        }
    }

    fn wake<I: Io>(&mut self, io: &mut I) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            let mut tools = Tools { io, arena: &self.arena, waker: &self.waker };
            transmission.wake(&mut self.outbound, &mut tools, Token(self.base.0 + SLOTS));
        }
    }

    fn deadline(&mut self) {
        if !matches!(self.phase, Phase::Transmission(_)) {
            self.leave(Ending::Deadline);
            self.socket.shut_down();
        }
    }

    /// The client took these replies, or never will.
    fn gone(&mut self, load: Load) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.gone(load);
        }
    }

    fn take_in<I: Io>(&mut self, io: &mut I) {
        if self.layer.is_starting() && self.is_silent() {
            self.start_tls();
        }
        self.shake_hands();
        let mut ending = None;
        let plain = matches!(self.layer, Layer::Plain);
        let hand_over = self.hand_over.load(Ordering::Acquire);
        if let Phase::Transmission(transmission) = &mut self.phase {
            if hand_over && !std::mem::replace(&mut self.hands_over, true) {
                io.submit(Token(self.base.0 + HAND_OVER), Op::Timeout { after: HAND_OVER_MAX });
            }
            let mut tools = Tools { io, arena: &self.arena, waker: &self.waker };
            let base = Token(self.base.0 + SLOTS);
            let hand_over = hand_over && plain;
            let may_rest = self.may_rest || hand_over;
            match transmission.take_in(&mut self.inbound, &mut self.outbound, &mut tools, base, may_rest) {
                Some(Stop::Between) if hand_over => ending = Some(Ending::HandedOver),
                Some(Stop::Between) => self.is_between = true,
                Some(Stop::Over(over)) => ending = Some(over),
                None => {}
            }
        }
        // The keys of TLS go nowhere, and who has chosen no export yet has nothing to lose.
        let stays = hand_over && (!plain || matches!(self.phase, Phase::New | Phase::Handshake(_)));
        let stopped = (stays || self.stop.load(Ordering::Acquire)).then_some(Ending::Stopped);
        let cut_off = self.outbound.is_broken() || (self.inbound.has_ended() && self.inbound.unread().is_empty());
        if let Some(ending) = ending.or(stopped).or(cut_off.then_some(Ending::Gone)) {
            self.leave(ending);
        }
    }

    /// The ACK has gone.
    fn start_tls(&mut self) {
        let credentials = self.credentials.as_ref().expect("without them no TLS is offered");
        match credentials.connection() {
            Ok(tls) => {
                self.layer = Layer::inside(tls);
                self.inbound.expect_tls();
            }
            Err(error) => self.leave(Ending::Tls(in_words(&error))),
        }
    }

    /// One option's replies at a time: what waits to be sent has that bound.
    fn shake_hands(&mut self) {
        while let Phase::Handshake(handshake) = &mut self.phase
            && self.leaving.is_none()
            && !self.layer.is_starting()
            && self.outbound.is_idle()
            && !self.inbound.unread().is_empty()
        {
            let unread = self.inbound.unread();
            let (mut rest, mut out) = (unread, Vec::new());
            let outcome = handshake.step(&mut rest, &*self.directory, &mut out);
            let taken = unread.len() - rest.len();
            self.inbound.advance(taken);
            self.outbound.bytes(&out);
            match outcome {
                Outcome::More => {}
                Outcome::StartTls => self.layer = Layer::Starting,
                Outcome::Closed(reason) => self.leave(Ending::Handshake(reason)),
                Outcome::Transmission(negotiated) => {
                    match self.directory.enter(&negotiated.export.name, self.socket.clone()) {
                        Some((gate, member)) => {
                            self.inbound.expect_requests(Header::bytes(negotiated.style));
                            self.phase = Phase::Chosen(Box::new(Chosen { negotiated: *negotiated, gate, member }));
                        }
                        None => self.leave(Ending::NoExport(negotiated.export.name)),
                    }
                }
            }
        }
    }

    /// Takes nothing in any more.
    fn leave(&mut self, ending: Ending) {
        self.leaving.get_or_insert(ending);
    }

    /// Lets what is under way come to its end, and the client take its last replies.
    fn linger(&mut self, io: &mut impl Io) {
        if !std::mem::replace(&mut self.lingers, true) {
            io.submit(self.token(LINGER), Op::Timeout { after: LINGER_MAX });
        }
    }
}
