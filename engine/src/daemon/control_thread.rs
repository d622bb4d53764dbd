//! The control thread: takes connections in, carries what operators say to the desk and back, and has the desk
//! stepped.
use super::clients::Connection;
use super::connections::{Client, Connections};
use super::desk::{Answer, Desk, News};
use super::exports::{Export, Table};
use super::handover;
use super::listen::Listening;
use crate::control::options::Reach;
use crate::control::{Code, HandOver, Refusal, Reply, Request};
use crate::disk::Tools;
use crate::export::session::Handed;
use crate::io::remote::Remotes;
use crate::io::{Arena, Buffer, Completion, File, Io, Op, Ring, Token, Until, Wait, Waker};
use crate::state::StateFolder;
use crate::tls::Credentials;
use formats::error::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// NBD connections at a time; one more is dropped.
const SESSIONS_MAX: usize = 1024;
/// Control connections at a time; one more is dropped.
const CLIENTS_MAX: usize = 64;
/// Memory for what the control thread itself reads and writes, in bytes.
const ARENA_LEN: usize = 1 << 20;
/// How often jobs are looked at when nothing else happens.
const TICK: Duration = Duration::from_millis(50);
/// How long to wait before connections are taken in again after one could not be.
const ACCEPT_REST: Duration = Duration::from_millis(200);
/// How long the last answers may take when the daemon ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// What a token belongs to: the top byte says which kind, the rest which one.
const KIND: u32 = 56;
const WAKE: u64 = 0;
const TICKS: u64 = 1;
const SIGNAL: u64 = 2;
const NBD: u64 = 3;
const CONTROL: u64 = 4;
const CLIENT: u64 = 5;
const DESK: u64 = 6;
const RESTED: u64 = 7;
/// Each client has so many tokens, as bits.
const SPAN: u32 = 8;

pub(super) struct ControlThread {
    ring: Remotes<Ring>,
    arena: Arena,
    waker: Waker,
    signals: File,
    desk: Desk,
    sessions: Connections,
    clients: BTreeMap<u64, Connection>,
    client_next: u64,
    /// Listeners whose last connection could not be taken in, with their tokens.
    resting: Vec<(Token, File)>,
    ticking: bool,
    ending: bool,
    /// What this daemon was started with, for a successor's words to be held against.
    words: Vec<String>,
    /// Who takes over.
    successor: Option<File>,
    /// Clients that came when nobody was let in any more.
    ungreeted: Vec<File>,
}

impl ControlThread {
    pub fn new(
        exports: Vec<Export>,
        table: Arc<Table>,
        reach: Reach,
        credentials: Option<Arc<Credentials>>,
        state: StateFolder,
        words: Vec<String>,
    ) -> io::Result<Self> {
        let (arena, waker) = (Arena::allocate(ARENA_LEN)?, Waker::new()?);
        let (signals, signalled) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
        }
        Ok(Self {
            ring: Remotes::new(Ring::new(64, &arena)?),
            arena,
            sessions: Connections::new(Arc::clone(&table) as _, credentials),
            desk: Desk::new(exports, table, reach, state, waker.clone()),
            waker,
            signals: File::new(signals),
            clients: BTreeMap::new(),
            client_next: 0,
            resting: Vec::new(),
            ticking: false,
            ending: false,
            words,
            successor: None,
            ungreeted: Vec::new(),
        })
    }

    /// The desk.
    pub fn desk(&mut self) -> &mut Desk {
        &mut self.desk
    }

    /// Serves until it is told to end.
    pub fn run(&mut self, nbd: &[Listening], control: &Listening) -> io::Result<()> {
        self.desk.serves_at(nbd.iter().filter_map(|listening| listening.path.as_deref()));
        let listeners: Vec<(u64, File)> =
            nbd.iter().map(|listening| listening.file.clone()).zip(0..).map(|(f, n)| (n, f)).collect();
        self.ring.submit(token(WAKE, 0), Op::Wake { waker: self.waker.clone() });
        self.ring.submit(
            token(SIGNAL, 0),
            Op::Receive { socket: self.signals.clone(), buf: Buffer::alone(1), until: Until::Later },
        );
        self.ring.submit(token(CONTROL, 0), Op::Accept { listener: control.file.clone(), accepted: None });
        for (number, listener) in &listeners {
            self.ring.submit(token(NBD, *number), Op::Accept { listener: listener.clone(), accepted: None });
        }
        let mut done = Vec::new();
        let mut farewell = None;
        loop {
            self.step();
            if self.desk.holds_gate() {
                // Guests that wait at a closed gate would keep their sessions from ending.
                farewell = None;
            } else if self.ending {
                let until = *farewell.get_or_insert(self.ring.now() + FAREWELL);
                if self.clients.values().all(Connection::is_quiet) || self.ring.now() > until {
                    return Ok(());
                }
            }
            if !self.ticking && (self.desk.has_jobs() || self.ending) {
                self.ticking = true;
                self.ring.submit(token(TICKS, 0), Op::Timeout { after: TICK });
            }
            self.ring.reap(Wait::One, &mut done)?;
            for completion in done.drain(..) {
                self.complete(completion);
            }
        }
    }

    fn complete(&mut self, done: Completion) {
        let index = done.token.0 & ((1 << KIND) - 1);
        match done.token.0 >> KIND {
            WAKE => self.ring.submit(done.token, Op::Wake { waker: self.waker.clone() }),
            TICKS => self.ticking = false,
            RESTED => {
                let rested = std::mem::take(&mut self.resting);
                rested.into_iter().for_each(|(token, listener)| self.accept(token, listener));
            }
            SIGNAL => {
                tracing::info!("a signal asks for the end");
                self.ending = true;
            }
            NBD => self.accepted(done, Self::take_session),
            CONTROL => self.accepted(done, Self::take_client),
            CLIENT => {
                if let Some(client) = self.clients.get_mut(&(index >> SPAN)) {
                    client.complete(token(CLIENT, index >> SPAN << SPAN), done);
                }
            }
            DESK => {
                let mut tools = Tools { io: &mut self.ring, arena: &self.arena, waker: &self.waker };
                self.desk.complete(&mut tools, token(DESK, 0), done);
            }
            _ => unreachable!("a token of no kind"),
        }
    }

    /// Takes in who came, and listens on.
    fn accepted(&mut self, done: Completion, take: fn(&mut Self, File)) {
        let Op::Accept { listener, accepted } = done.op else { return };
        match (done.result, accepted) {
            (Ok(_), Some(socket)) if !self.ending => take(self, socket),
            (Ok(_), Some(socket)) if done.token.0 >> KIND == NBD => self.ungreeted.push(socket),
            (Err(error), _) => {
                // Out of descriptors, most likely, which the kernel says at once each time: not so soon again.
                tracing::warn!(%error, "a connection could not be taken in");
                self.resting.push((done.token, listener));
                self.ring.submit(token(RESTED, 0), Op::Timeout { after: ACCEPT_REST });
                return;
            }
            _ => {}
        }
        self.accept(done.token, listener);
    }

    fn accept(&mut self, token: Token, listener: File) {
        if !self.ending {
            self.ring.submit(token, Op::Accept { listener, accepted: None });
        }
    }

    fn take_session(&mut self, socket: File) {
        if self.sessions.count() >= SESSIONS_MAX {
            tracing::warn!("there are {SESSIONS_MAX} NBD connections already: one more is dropped");
            return;
        }
        socket.no_delay();
        self.begin_session(Client::New(socket));
    }

    fn begin_session(&mut self, client: Client) {
        if let Err(error) = self.sessions.begin(client) {
            tracing::error!(%error, "a connection's thread could not be started");
        }
    }

    fn take_client(&mut self, socket: File) {
        if self.clients.len() >= CLIENTS_MAX {
            tracing::warn!("there are {CLIENTS_MAX} control connections already: one more is dropped");
            return;
        }
        self.clients.insert(self.client_next, Connection::new(socket));
        self.client_next += 1;
    }

    fn step(&mut self) {
        let mut tools = Tools { io: &mut self.ring, arena: &self.arena, waker: &self.waker };
        self.desk.step(&mut tools, token(DESK, 0));
        self.tell();
        let clients: Vec<u64> = self.clients.keys().copied().collect();
        for id in clients {
            while let Some(call) = self.clients.get_mut(&id).and_then(Connection::next_call) {
                if let Request::HandOver(wanted) = &call.request {
                    let answer = self.hand_over(id, wanted);
                    self.answer(id, answer);
                    continue;
                }
                self.ending |= call.request == Request::Quit;
                if let Some(answer) = self.desk.handle(id, call) {
                    self.answer(id, answer);
                }
            }
        }
        self.tell();
        for (id, client) in &mut self.clients {
            client.step(&mut self.ring, token(CLIENT, id << SPAN));
        }
        self.clients.retain(|_, client| !client.is_over());
    }

    /// Passes on what the desk has to say.
    fn tell(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for news in self.desk.take_news() {
            match news {
                News::Event(event) => self.clients.values_mut().for_each(|client| client.event(&event, now)),
                News::Answer(client, answer) => self.answer(client, answer),
            }
        }
    }

    fn answer(&mut self, client: u64, answer: Answer) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.answer(answer);
        }
    }

    /// Ends for the client, which is to take over, or says why not.
    fn hand_over(&mut self, id: u64, wanted: &HandOver) -> Answer {
        let Some(client) = self.clients.get(&id) else { return Ok(Reply::Done {}) };
        let busy = self.ending.then(|| "this daemon is ending".to_owned());
        let refused = busy.or_else(|| handover::refuse(wanted, &self.words, client.socket()));
        if let Some(message) = refused.or_else(|| self.desk.refuse_hand_over()) {
            return Err(Refusal { code: Code::OperationInvalid, message });
        }
        tracing::info!("another process takes over");
        self.successor = Some(client.socket().clone());
        self.ending = true;
        Ok(Reply::Done {})
    }

    /// Goes on with clients that another process, or an earlier life of this one, had.
    pub fn take_up(&mut self, clients: Vec<Handed>, new: Vec<File>) {
        clients.into_iter().for_each(|handed| self.begin_session(Client::Handed(handed)));
        new.into_iter().for_each(|socket| self.take_session(socket));
    }

    /// Who takes over, if somebody does.
    pub fn successor(&self) -> Option<File> {
        self.successor.clone()
    }

    /// Ends the sessions, and closes the desk. The clients that go on with somebody else, and those that were not greeted.
    pub fn close(mut self) -> (Result<()>, Vec<Handed>, Vec<File>) {
        let mut done = Vec::new();
        if let Err(error) = self.ring.below().take_back(&mut done) {
            tracing::warn!(%error, "what was under way cannot be taken back");
        }
        for Completion { token, op, .. } in done {
            if let (NBD, Op::Accept { accepted: Some(socket), .. }) = (token.0 >> KIND, op) {
                self.ungreeted.push(socket);
            }
        }
        let handed = self.sessions.end(self.successor.is_some());
        (self.desk.close(), handed, self.ungreeted)
    }
}

fn token(kind: u64, index: u64) -> Token {
    Token(kind << KIND | index)
}
