//! A thread's own connection to an export, stepped: it reaches the server, agrees with it, reads and writes.
//!
//! ```text
//! Connect ─► Receive ─► negotiation ─► Send … ─► replies: Send requests, Receive into the readers' buffers
//!                           └─► TLS, where the address says so: from here on around everything; see `inside`
//!                any error, or an answer that does not come in time ─► Lost
//! Lost ─► read only: everything fails
//!     └─► writable: what was asked waits again; a rest, twice as long each time ─► Connect …
//!             RECONNECT_TIME_MAX after the last answer: what waits fails, and what comes gets one try
//! ```
//!
//! Everything that is asked again may be done twice and is the same: the bytes of a write belong to its
//! request until it is answered. A server that still has the first one in its queue may carry it out late; so a
//! connection is shut down before the next is made, which is all that a client can do.
//!
//! Of its own it has one operation of each kind under way at most: `Part` says which one is done. The next
//! connection is begun when those of the last are over, so that none is taken for another's.
use super::super::{Completion, File, Op, Token};
use super::blocking::{say_at_once, say_goodbye, socket_for};
use super::held::Held;
use super::inside::Inside;
use super::request::Request;
use super::{PIECE_LEN, Remote, ended, late, lost, place, refused};
use crate::fault::{Fault, planted};
use crate::io::{Buffer, Gather, Until};
use formats::nbd::client::{Event, Negotiation, Next, Replies};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// Requests that are under way; those behind them wait here, for what a server does not take yet.
const REQUESTS_MAX: usize = 64;
/// Bytes that may wait to be sent before another request is put behind them.
const OUTBOUND_MAX: usize = 2 << 20;
/// How often it is looked whether an answer is late.
const LOOK: Duration = Duration::from_secs(1);
/// The first rest before a server is reached again, and the longest.
const REST_MIN: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(2);

/// Which of its operations is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Connect,
    Send,
    Receive,
    Look,
    Rest,
}

impl Part {
    pub fn from_number(number: u64) -> Self {
        [Self::Connect, Self::Send, Self::Receive, Self::Look, Self::Rest][number as usize]
    }
}

pub(super) struct Connection {
    remote: Held,
    stage: Stage,
    /// Absent before the first step, and where there is no socket to be had.
    socket: Option<File>,
    /// Not asked yet.
    waiting: VecDeque<Request>,
    /// Asked, by the request's cookie.
    pub(super) asked: BTreeMap<u64, Request>,
    outbound: Gather,
    /// Answered while the last of their bytes were still being sent, with what the server said.
    early: Vec<(Request, io::Result<()>)>,
    /// Memory of the last receive, to be used again.
    inbox: Option<Buffer>,
    /// What everything goes through, from STARTTLS on.
    inside: Option<Inside>,
    connecting: bool,
    pub(super) sending: bool,
    receiving: bool,
    looking: bool,
    resting: bool,
    /// Since when the server owes something else than an answer: a connection, a negotiation.
    since: Duration,
    /// When something was sent or received last.
    moved: Duration,
    /// When the first loss was after the last answer.
    failing_since: Option<Duration>,
    /// The next rest.
    rest: Duration,
    /// When this connection was made, by the export's clock.
    established: u64,
}

enum Stage {
    New,
    Connecting,
    Negotiating(Box<Negotiation>),
    Open(Replies),
    /// Why, and until when it rests.
    Lost(String, Duration),
}

impl Connection {
    pub fn new(remote: Arc<Remote>) -> Self {
        Self {
            remote: Held::new(remote),
            stage: Stage::New,
            socket: None,
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            outbound: Gather::default(),
            early: Vec::new(),
            inbox: None,
            inside: None,
            connecting: false,
            sending: false,
            receiving: false,
            looking: false,
            resting: false,
            since: Duration::ZERO,
            moved: Duration::ZERO,
            failing_since: None,
            rest: REST_MIN,
            established: 0,
        }
    }

    pub fn is_to(&self, remote: &Arc<Remote>) -> bool {
        self.remote.is(remote)
    }

    /// True where nobody can ask it anything any more.
    pub fn is_forgotten(&self) -> bool {
        self.waiting.is_empty() && self.asked.is_empty() && self.early.is_empty() && self.remote.is_forgotten()
    }

    /// Takes in an operation.
    pub fn start(&mut self, token: Token, op: Op, ready: &mut Vec<Completion>) {
        let (request, checked) = Request::new(&self.remote, token, op);
        match checked {
            Ok(()) if !request.is_empty() => self.waiting.push_back(request),
            outcome => ready.push(request.end(&self.remote, outcome)),
        }
    }

    /// Starts what can be started.
    pub fn go_on(&mut self, now: Duration, ready: &mut Vec<Completion>, mut submit: impl FnMut(Part, Op)) {
        if matches!(self.stage, Stage::New) {
            self.connect(now, &mut submit);
        }
        self.reach_again(now, ready, &mut submit);
        self.ask(now);
        let owed = !self.waiting.is_empty() || !self.asked.is_empty();
        if owed && !self.looking {
            self.looking = true;
            submit(Part::Look, Op::Timeout { after: LOOK });
        }
        let Some(socket) = &self.socket else { return };
        if !matches!(self.stage, Stage::Negotiating(_) | Stage::Open(_)) {
            return;
        }
        let gather = match &mut self.inside {
            _ if self.sending => None,
            None if self.outbound.is_empty() => None,
            None => Some(std::mem::take(&mut self.outbound)),
            Some(inside) => inside.encrypt(&mut self.outbound),
        };
        if let Some(gather) = gather {
            self.sending = true;
            submit(Part::Send, Op::Send { socket: socket.clone(), gather });
        }
        if !self.receiving {
            self.receiving = true;
            let buf = self.inbox.take().unwrap_or_else(|| Buffer::alone(PIECE_LEN));
            submit(Part::Receive, Op::Receive { socket: socket.clone(), buf, until: Until::Some });
        }
    }

    /// A lost connection fails what waits for it, or is made again when it has rested.
    fn reach_again(&mut self, now: Duration, ready: &mut Vec<Completion>, submit: &mut impl FnMut(Part, Op)) {
        let Stage::Lost(why, until) = &self.stage else { return };
        // The bytes of what waits may be with what is being sent.
        if self.sending {
            return;
        }
        let until = *until;
        let max = self.remote.reconnect_time_max();
        let given_up = self.failing_since.is_none_or(|since| now.saturating_sub(since) >= max);
        if !self.remote.is_kept() || (given_up && now < until) {
            let error = |request: Request| request.end(&self.remote, Err(lost(why)));
            ready.extend(self.waiting.drain(..).map(error));
            return;
        }
        if self.waiting.is_empty() {
            return;
        }
        let is_quiet = !self.connecting && !self.receiving;
        if now >= until && is_quiet {
            self.connect(now, submit);
        } else if now < until && !self.resting {
            self.resting = true;
            submit(Part::Rest, Op::Timeout { after: until - now });
        }
    }

    fn connect(&mut self, now: Duration, submit: &mut impl FnMut(Part, Op)) {
        self.since = now;
        match socket_for(&self.remote.peer) {
            Ok(socket) => {
                let socket = File::new(socket);
                self.socket = Some(socket.clone());
                self.stage = Stage::Connecting;
                self.connecting = true;
                submit(Part::Connect, Op::Connect { socket, peer: self.remote.peer.clone() });
            }
            Err(error) => self.lose(error.to_string(), now),
        }
    }

    /// Asks for as much as may be under way.
    fn ask(&mut self, now: Duration) {
        let Stage::Open(replies) = &mut self.stage else { return };
        let in_plain = self.inside.is_none();
        assert!(!in_plain || self.remote.credentials.is_none(), "never in plain where TLS was asked for");
        let mut header = Vec::new();
        while self.asked.len() < REQUESTS_MAX && self.outbound.remaining() < OUTBOUND_MAX {
            let Some(mut request) = self.waiting.pop_front() else { return };
            header.clear();
            let cookie = replies.ask(request.ask(&self.remote, now), &mut header);
            self.outbound.push_bytes(&header);
            match in_plain {
                true => request.lend_payload().into_iter().for_each(|payload| self.outbound.push_buffer(payload)),
                false => self.outbound.push_bytes(request.payload()),
            }
            self.asked.insert(cookie, request);
        }
    }

    /// Takes in what became of its own operation.
    pub fn complete(
        &mut self,
        part: Part,
        op: Op,
        result: io::Result<u32>,
        now: Duration,
        ready: &mut Vec<Completion>,
    ) {
        if result.is_ok() && matches!(part, Part::Send | Part::Receive) {
            self.moved = now;
        }
        match part {
            Part::Connect => self.connecting = false,
            Part::Send => {
                self.sending = false;
                let Op::Send { gather, .. } = op else { unreachable!("a send was submitted") };
                return self.sent(gather, result, now, ready);
            }
            Part::Receive => self.receiving = false,
            Part::Rest => {
                self.resting = false;
                return;
            }
            Part::Look => {
                self.looking = false;
                return self.look(now);
            }
        }
        match (result, op) {
            _ if matches!(self.stage, Stage::Lost(..)) => {}
            (Err(error), _) => self.lose(ended(error), now),
            (Ok(_), Op::Connect { .. }) => {
                self.stage = Stage::Negotiating(Box::new(Negotiation::new(&self.remote.address)));
            }
            (Ok(0), Op::Receive { .. }) => self.lose(ended(ErrorKind::UnexpectedEof.into()), now),
            (Ok(count), Op::Receive { buf, .. }) => {
                if let Err(why) = self.received(&buf[..count as usize], ready) {
                    self.lose(why, now);
                }
                self.inbox = Some(buf);
            }
            (Ok(_), _) => {}
        }
    }

    /// Takes in what became of a send.
    fn sent(&mut self, gather: Gather, result: io::Result<u32>, now: Duration, ready: &mut Vec<Completion>) {
        match (result, &mut self.inside) {
            _ if matches!(self.stage, Stage::Lost(..)) => {}
            // What was asked before may be answered still: the other direction tells how it ends.
            (Err(_), _) => {}
            (Ok(count), _) if (count as usize) < gather.remaining() => {
                self.lose("the server takes no requests".to_owned(), now);
            }
            (Ok(_), Some(inside)) => return inside.sent(gather),
            (Ok(_), None) => {}
        }
        self.take_back(gather);
        for (request, outcome) in std::mem::take(&mut self.early) {
            self.answered(request, outcome, ready);
        }
    }

    /// The bytes that were lent to `gather` are their requests' again.
    fn take_back(&mut self, gather: Gather) {
        for payload in gather.into_buffers() {
            let early = self.early.iter_mut().map(|(request, _)| request);
            let mut requests = self.asked.values_mut().chain(&mut self.waiting).chain(early);
            let left = requests.try_fold(payload, |payload, request| match request.take_back(payload) {
                Some(payload) => ControlFlow::Continue(payload),
                None => ControlFlow::Break(()),
            });
            debug_assert!(left.is_break(), "bytes are of a request");
        }
    }

    /// An error says why the connection is of no use any more.
    fn received(&mut self, bytes: &[u8], ready: &mut Vec<Completion>) -> Result<(), String> {
        let Some(mut inside) = self.inside.take() else { return self.take_in(bytes, ready) };
        let decrypted = inside.decrypt(bytes);
        let taken = decrypted.and_then(|count| self.take_in(&inside.decrypted()[..count], ready));
        let has_ended = inside.has_ended();
        self.inside = Some(inside);
        match taken {
            Ok(()) if has_ended => Err(ended(ErrorKind::UnexpectedEof.into())),
            taken => taken,
        }
    }

    fn take_in(&mut self, mut input: &[u8], ready: &mut Vec<Completion>) -> Result<(), String> {
        if let Stage::Negotiating(negotiation) = &mut self.stage {
            let mut answer = Vec::new();
            let next = negotiation.step(&mut input, &mut answer).map_err(|error| error.one_line());
            self.outbound.push_bytes(&answer);
            match next? {
                Next::More => return Ok(()),
                Next::StartTls => {
                    let credentials = self.remote.credentials.as_ref();
                    let inside = Inside::new(credentials.expect("an address inside TLS has credentials"))?;
                    self.inside = Some(inside).filter(|_| !planted(Fault::PlainBehindStartTls));
                    let mut answer = Vec::new();
                    negotiation.inside_tls(&mut answer);
                    self.outbound.push_bytes(&answer);
                    return Ok(());
                }
                Next::Session(session) if session == self.remote.session => {
                    self.established = self.remote.tick();
                    self.stage = Stage::Open(Replies::new(session));
                }
                Next::Session(_) => return Err("the export is not what it was when it was opened".to_owned()),
            }
        }
        while let Stage::Open(replies) = &mut self.stage {
            match replies.step(&mut input).map_err(|error| error.one_line())? {
                None => break,
                Some(Event::Done { cookie, outcome }) => {
                    let request = self.asked.remove(&cookie).expect("replies are of what was asked");
                    (self.failing_since, self.rest) = (None, REST_MIN);
                    self.answered(request, outcome.map_err(|failure| refused(&failure)), ready);
                }
                Some(event @ (Event::Data { cookie, .. } | Event::Zero { cookie, .. })) => {
                    let request = self.asked.get_mut(&cookie).expect("replies are of what was asked");
                    place(&event, request.piece, request.place());
                }
                Some(Event::Extent { .. }) => unreachable!("nobody asks for extents here"),
            }
        }
        Ok(())
    }

    /// What was asked is done, or is not to be had.
    fn answered(&mut self, mut request: Request, outcome: io::Result<()>, ready: &mut Vec<Completion>) {
        match outcome {
            outcome if request.has_lent() && !planted(Fault::DoneBeforeSent) => self.early.push((request, outcome)),
            Ok(()) if !request.advance(&self.remote, self.established) => self.waiting.push_front(request),
            outcome => ready.push(request.end(&self.remote, outcome)),
        }
    }

    /// Gives up a server that is late.
    fn look(&mut self, now: Duration) {
        let oldest = match self.stage {
            Stage::Open(_) => self.asked.values().map(|request| request.since).min(),
            Stage::Lost(..) => None,
            _ => Some(self.since),
        };
        let Some(since) = oldest else { return };
        // On a slow line the last of many requests has its answer long after it was asked.
        let is_still = now.saturating_sub(since.max(self.moved)) > self.remote.answer_time_max();
        if is_still || now.saturating_sub(since) > self.remote.request_time_max() {
            self.lose(late(), now);
        }
    }

    /// It is of no use any more. What was asked is to be asked again, in the order in which it was.
    fn lose(&mut self, why: String, now: Duration) {
        if let Some(socket) = &self.socket {
            if let (Some(inside), Some(fd), false) = (&mut self.inside, socket.as_fd(), self.sending) {
                say_at_once(fd, &[], Some(inside));
            }
            socket.shut_down();
        }
        self.inside = None;
        if self.remote.is_kept() {
            tracing::warn!("{}: the connection is lost: {why}", self.remote.address);
        }
        std::mem::take(&mut self.asked).into_values().rev().for_each(|request| self.waiting.push_front(request));
        let unsent = std::mem::take(&mut self.outbound);
        self.take_back(unsent);
        self.failing_since.get_or_insert(now);
        self.stage = Stage::Lost(why, now + self.rest);
        self.rest = (2 * self.rest).min(REST_MAX);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(socket) = &self.socket else { return };
        if let (Stage::Open(_), Some(fd), false) = (&self.stage, socket.as_fd(), self.sending) {
            say_goodbye(fd, self.inside.as_mut());
        }
        socket.shut_down();
    }
}
