//! A thread's own connection to an export, stepped: it reaches the server, agrees with it, and reads.
//!
//! ```text
//! Connect ─► Receive ─► negotiation ─► Send … ─► replies: Send requests, Receive into the readers' buffers
//!                any error, or an answer that does not come in time ─► Lost: every reader fails
//! ```
//!
//! Of its own it has one operation of each kind under way at most: `Part` says which one is done.
use super::super::{Buffer, Completion, File, Op, Token};
use super::blocking::{say_goodbye, socket_for};
use super::{ANSWER_TIME_MAX, Remote, ended, late, lost, place, refused};
use crate::io::Gather;
use formats::nbd::client::{Ask, Event, Negotiation, Replies};
use formats::range::ByteRange;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

/// How much is received at a time, in bytes.
const PIECE_LEN: usize = 256 << 10;
/// Requests that are under way; those behind them wait here, for what a server does not take yet.
const REQUESTS_MAX: usize = 64;
/// How often it is looked whether an answer is late.
const LOOK: Duration = Duration::from_secs(1);

/// Which of its operations is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Connect,
    Send,
    Receive,
    Look,
}

impl Part {
    pub fn from_number(number: u64) -> Self {
        [Self::Connect, Self::Send, Self::Receive, Self::Look][number as usize]
    }
}

pub(super) struct Connection {
    remote: Arc<Remote>,
    stage: Stage,
    /// Absent before the first step, and where there is no socket to be had.
    socket: Option<File>,
    /// Not asked yet.
    waiting: VecDeque<Reader>,
    /// Asked, by the request's cookie.
    pub(super) asked: BTreeMap<u64, Reader>,
    outbound: Vec<u8>,
    sending: bool,
    receiving: bool,
    looking: bool,
    /// Since when the server owes something else than an answer: a connection, a negotiation.
    since: Duration,
}

enum Stage {
    New,
    Connecting,
    Negotiating(Box<Negotiation>),
    Open(Replies),
    Lost(String),
}

/// One `Op::Read`.
pub(super) struct Reader {
    token: Token,
    op: Op,
    /// What it wants and does not have yet.
    rest: ByteRange,
    /// What of it is asked.
    piece: ByteRange,
    since: Duration,
}

impl Reader {
    fn buf(&mut self) -> (u64, &mut Buffer) {
        let Op::Read { at, buf, .. } = &mut self.op else { unreachable!("readers read") };
        (*at, buf)
    }

    /// The place of what is asked in the buffer.
    fn place(&mut self) -> &mut [u8] {
        let piece = self.piece;
        let (at, buf) = self.buf();
        &mut buf[(piece.start - at) as usize..][..piece.len() as usize]
    }

    fn end(mut self, result: io::Result<()>) -> Completion {
        let start = self.buf().0;
        // Where nothing is wanted, the read began at the disk's end or behind it.
        let result = result.map(|()| self.rest.end.saturating_sub(start) as u32);
        Completion { token: self.token, op: self.op, result }
    }
}

impl Connection {
    pub fn new(remote: Arc<Remote>) -> Self {
        Self {
            remote,
            stage: Stage::New,
            socket: None,
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            outbound: Vec::new(),
            sending: false,
            receiving: false,
            looking: false,
            since: Duration::ZERO,
        }
    }

    pub fn is_to(&self, remote: &Arc<Remote>) -> bool {
        Arc::ptr_eq(&self.remote, remote)
    }

    /// True where nobody can ask it anything any more.
    pub fn is_forgotten(&self) -> bool {
        self.waiting.is_empty() && self.asked.is_empty() && Arc::strong_count(&self.remote) == 1
    }

    /// Takes in a read.
    pub fn start(&mut self, token: Token, mut op: Op, ready: &mut Vec<Completion>) {
        let Op::Read { at, buf, .. } = &mut op else { unreachable!("exports are read") };
        let rest = self.remote.on_disk(*at, buf.len());
        let reader = Reader { token, op, rest, piece: rest, since: Duration::ZERO };
        match rest.is_empty() {
            true => ready.push(reader.end(Ok(()))),
            false => self.waiting.push_back(reader),
        }
    }

    /// Starts what can be started.
    pub fn go_on(&mut self, now: Duration, ready: &mut Vec<Completion>, mut submit: impl FnMut(Part, Op)) {
        if matches!(self.stage, Stage::New) {
            self.connect(now, &mut submit);
        }
        self.ask(now);
        if let Stage::Lost(why) = &self.stage {
            let asked = std::mem::take(&mut self.asked).into_values();
            ready.extend(asked.chain(self.waiting.drain(..)).map(|reader| reader.end(Err(lost(why)))));
            return;
        }
        let Some(socket) = &self.socket else { return };
        let owed = !self.waiting.is_empty() || !self.asked.is_empty();
        if owed && !self.looking {
            self.looking = true;
            submit(Part::Look, Op::Timeout { after: LOOK });
        }
        if matches!(self.stage, Stage::Connecting) {
            return;
        }
        if !self.sending && !self.outbound.is_empty() {
            self.sending = true;
            let mut gather = Gather::default();
            gather.push_bytes(&std::mem::take(&mut self.outbound));
            submit(Part::Send, Op::Send { socket: socket.clone(), gather });
        }
        if !self.receiving {
            self.receiving = true;
            let buf = Buffer::alone(PIECE_LEN);
            submit(Part::Receive, Op::Receive { socket: socket.clone(), buf, whole: false });
        }
    }

    fn connect(&mut self, now: Duration, submit: &mut impl FnMut(Part, Op)) {
        self.since = now;
        match socket_for(&self.remote.peer) {
            Ok(socket) => {
                let socket = File::new(socket);
                self.socket = Some(socket.clone());
                self.stage = Stage::Connecting;
                submit(Part::Connect, Op::Connect { socket, peer: self.remote.peer.clone() });
            }
            Err(error) => self.lose(error.to_string()),
        }
    }

    /// Asks for as much as may be under way.
    fn ask(&mut self, now: Duration) {
        let Stage::Open(replies) = &mut self.stage else { return };
        while self.asked.len() < REQUESTS_MAX {
            let Some(mut reader) = self.waiting.pop_front() else { return };
            let piece = self.remote.piece(reader.rest);
            reader.piece = piece.intersect(reader.rest);
            reader.since = now;
            self.asked.insert(replies.ask(Ask::Read(piece), &mut self.outbound), reader);
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
        match part {
            Part::Connect => {}
            Part::Send => self.sending = false,
            Part::Receive => self.receiving = false,
            Part::Look => {
                self.looking = false;
                return self.look(now);
            }
        }
        match (result, op) {
            _ if matches!(self.stage, Stage::Lost(_)) => {}
            // What was asked before may be answered still: the other direction tells how it ends.
            (Err(_), Op::Send { .. }) => {}
            (Err(error), _) => self.lose(ended(error)),
            (Ok(_), Op::Connect { .. }) => {
                self.stage = Stage::Negotiating(Box::new(Negotiation::new(&self.remote.address.export)));
            }
            (Ok(count), Op::Send { gather, .. }) if (count as usize) < gather.remaining() => {
                self.lose("the server takes no requests".to_owned());
            }
            (Ok(0), Op::Receive { .. }) => self.lose(ended(ErrorKind::UnexpectedEof.into())),
            (Ok(count), Op::Receive { buf, .. }) => self.received(&buf[..count as usize], ready),
            (Ok(_), _) => {}
        }
    }

    fn received(&mut self, mut input: &[u8], ready: &mut Vec<Completion>) {
        if let Stage::Negotiating(negotiation) = &mut self.stage {
            match negotiation.step(&mut input, &mut self.outbound) {
                Ok(None) => return,
                Ok(Some(session)) if session == self.remote.session => self.stage = Stage::Open(Replies::new(session)),
                Ok(Some(_)) => return self.lose("the export is not what it was when it was opened".to_owned()),
                Err(error) => return self.lose(error.one_line()),
            }
        }
        while let Stage::Open(replies) = &mut self.stage {
            match replies.step(&mut input) {
                Ok(None) => return,
                Ok(Some(Event::Done { cookie, outcome })) => {
                    let reader = self.asked.remove(&cookie).expect("replies are of what was asked");
                    self.answered(reader, outcome.map_err(|failure| refused(&failure)), ready);
                }
                Ok(Some(event @ (Event::Data { cookie, .. } | Event::Zero { cookie, .. }))) => {
                    let reader = self.asked.get_mut(&cookie).expect("replies are of what was asked");
                    place(&event, reader.piece, reader.place());
                }
                Ok(Some(Event::Extent { .. })) => unreachable!("only reads are asked"),
                Err(error) => return self.lose(error.one_line()),
            }
        }
    }

    /// A piece of a read is there, or is not to be had.
    fn answered(&mut self, mut reader: Reader, outcome: io::Result<()>, ready: &mut Vec<Completion>) {
        reader.rest.start = reader.piece.end;
        match outcome {
            Ok(()) if !reader.rest.is_empty() => self.waiting.push_front(reader),
            outcome => ready.push(reader.end(outcome)),
        }
    }

    /// Gives up a server that is late.
    fn look(&mut self, now: Duration) {
        let oldest = match self.stage {
            Stage::Open(_) => self.asked.values().map(|reader| reader.since).min(),
            _ => Some(self.since),
        };
        if oldest.is_some_and(|since| now.saturating_sub(since) > ANSWER_TIME_MAX) {
            self.lose(late());
        }
    }

    fn lose(&mut self, why: String) {
        if let Some(socket) = &self.socket {
            socket.shut_down();
        }
        self.stage = Stage::Lost(why);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(socket) = &self.socket else { return };
        if let (Stage::Open(_), Some(fd), false) = (&self.stage, socket.as_fd(), self.sending) {
            say_goodbye(fd);
        }
        socket.shut_down();
    }
}
