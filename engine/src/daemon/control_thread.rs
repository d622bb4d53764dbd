//! The control thread: takes connections in, answers operators, and steps the jobs.
use super::clients::Connection;
use super::exports::{Export, Table, layer_of};
use super::jobs::Active;
use super::listen::Listening;
use super::threads::Worker;
use crate::control::options::Cache;
use crate::control::qmp::Call;
use crate::control::{Code, Event, MirrorRequest, Mode, Refusal, Reply, Request, Status};
use crate::disk::Tools;
use crate::io::remote::Remotes;
use crate::io::{Arena, Buffer, Completion, File, Io, Op, Ring, Token, Wait, Waker};
use crate::job::Phase;
use crate::open::{Identity, export_named, files_of, identity};
use crate::state::StateFolder;
use crate::target::NO_BLOCKING;
use crate::tls::Credentials;
use formats::error::Result;
use formats::nbd::{Address, Server};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
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
/// How many steps a job may take before others are looked at.
const STEPS: usize = 64;
const STEPS_TIME: Duration = Duration::from_millis(5);
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
const JOB: u64 = 6;
const RESTED: u64 = 7;
/// Each client and each job has so many tokens, as bits.
const SPAN: u32 = 8;

pub(super) struct ControlThread {
    ring: Remotes<Ring>,
    arena: Arena,
    waker: Waker,
    signals: File,
    exports: Vec<Export>,
    /// The job of each export, by the export's number.
    jobs: BTreeMap<usize, Active>,
    table: Arc<Table>,
    cache: Cache,
    credentials: Option<Arc<Credentials>>,
    state: StateFolder,
    /// The Unix sockets that it serves at.
    sockets: Vec<Identity>,
    sessions: Vec<Worker>,
    clients: BTreeMap<u64, Connection>,
    client_next: u64,
    /// Clients that wait for the end of an export's job, and what they wished for.
    waiting: Vec<(u64, usize, Wish)>,
    /// Listeners whose last connection could not be taken in, with their tokens.
    resting: Vec<(Token, File)>,
    ticking: bool,
    ending: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Pivot,
    Cancel,
}

impl ControlThread {
    pub fn new(
        exports: Vec<Export>,
        table: Arc<Table>,
        cache: Cache,
        credentials: Option<Arc<Credentials>>,
        state: StateFolder,
    ) -> io::Result<Self> {
        let arena = Arena::new(ARENA_LEN);
        let (signals, signalled) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
        }
        Ok(Self {
            ring: Remotes::new(Ring::new(64, &arena)?),
            arena,
            waker: Waker::new()?,
            signals: File::new(signals),
            exports,
            jobs: BTreeMap::new(),
            table,
            cache,
            credentials,
            state,
            sockets: Vec::new(),
            sessions: Vec::new(),
            clients: BTreeMap::new(),
            client_next: 0,
            waiting: Vec::new(),
            resting: Vec::new(),
            ticking: false,
            ending: false,
        })
    }

    /// The exports' names, for the first line.
    pub fn names(&self) -> String {
        let name = |export: &Export| format!("{} ({})", export.name, export.serving());
        self.exports.iter().map(name).collect::<Vec<_>>().join(", ")
    }

    /// Goes on with the jobs that a kill or a stop interrupted.
    pub fn resume_jobs(&mut self) {
        for number in 0..self.exports.len() {
            let check = |request: &MirrorRequest| self.refuse_in_use(number, request);
            match Active::resume(&self.exports[number], self.cache, &self.state, &check) {
                Ok(Some(active)) => {
                    tracing::info!(export = self.exports[number].name, "its job goes on");
                    self.jobs.insert(number, active);
                }
                Ok(None) => self.forget_job(number),
                Err(failed) => {
                    let (request, refusal) = *failed;
                    tracing::error!(export = self.exports[number].name, "its job cannot go on: {refusal}");
                    self.exports[number].last = Some(Status {
                        phase: Phase::Failed.name().to_owned(),
                        job: request.job_id,
                        target: Some(request.target),
                        error: Some(refusal.message),
                        ..self.status(number)
                    });
                    self.forget_job(number);
                }
            }
        }
    }

    fn forget_job(&self, number: usize) {
        if let Err(error) = self.state.forget_job(&self.exports[number].name) {
            tracing::warn!("{}", error.one_line());
        }
    }

    /// Serves until it is told to end.
    pub fn run(&mut self, nbd: &[Listening], control: &Listening) -> io::Result<()> {
        let sockets = nbd.iter().filter_map(|listening| listening.path.as_deref());
        self.sockets = sockets.filter_map(|path| identity(path).ok()).collect();
        let listeners: Vec<(u64, File)> =
            nbd.iter().map(|listening| listening.file.clone()).zip(0..).map(|(f, n)| (n, f)).collect();
        self.ring.submit(token(WAKE, 0), Op::Wake { waker: self.waker.clone() });
        self.ring.submit(
            token(SIGNAL, 0),
            Op::Receive { socket: self.signals.clone(), buf: Buffer::alone(1), whole: false },
        );
        self.ring.submit(token(CONTROL, 0), Op::Accept { listener: control.file.clone(), accepted: None });
        for (number, listener) in &listeners {
            self.ring.submit(token(NBD, *number), Op::Accept { listener: listener.clone(), accepted: None });
        }
        let mut done = Vec::new();
        let mut farewell = None;
        loop {
            self.step();
            if self.jobs.values().any(|active| active.job.holds_gate()) {
                // Guests that wait at a closed gate would keep their sessions from ending.
                farewell = None;
            } else if self.ending {
                let until = *farewell.get_or_insert(self.ring.now() + FAREWELL);
                if self.clients.values().all(Connection::is_quiet) || self.ring.now() > until {
                    return Ok(());
                }
            }
            if !self.ticking && (!self.jobs.is_empty() || self.ending) {
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
            JOB => {
                if let Some(active) = self.jobs.get_mut(&((index >> SPAN) as usize)) {
                    let mut tools = Tools { io: &mut self.ring, arena: &self.arena, waker: &self.waker };
                    active.job.complete(&mut tools, token(JOB, index >> SPAN << SPAN), done);
                }
            }
            _ => unreachable!("a token of no kind"),
        }
    }

    /// Takes in who came, and listens on.
    fn accepted(&mut self, done: Completion, take: fn(&mut Self, File)) {
        let Op::Accept { listener, accepted } = done.op else { return };
        match (done.result, accepted) {
            (Ok(_), Some(socket)) if !self.ending => take(self, socket),
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
        self.sessions.retain(|session| !session.is_over());
        if self.sessions.len() >= SESSIONS_MAX {
            tracing::warn!("there are {SESSIONS_MAX} NBD connections already: one more is dropped");
            return;
        }
        socket.no_delay();
        match Worker::session(socket, Arc::clone(&self.table) as _, self.credentials.clone()) {
            Ok(session) => self.sessions.push(session),
            Err(error) => tracing::error!(%error, "a connection's thread could not be started"),
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
        let numbers: Vec<usize> = self.jobs.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.step_job(number));
        let clients: Vec<u64> = self.clients.keys().copied().collect();
        for id in clients {
            while let Some(call) = self.clients.get_mut(&id).and_then(Connection::next_call) {
                if let Some(answer) = self.handle(id, call) {
                    self.answer(id, answer);
                }
            }
            if let Some(client) = self.clients.get_mut(&id) {
                client.step(&mut self.ring, token(CLIENT, id << SPAN));
            }
        }
        self.clients.retain(|_, client| !client.is_over());
    }

    fn answer(&mut self, client: u64, answer: std::result::Result<Reply, Refusal>) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.answer(answer);
        }
    }

    /// What can be answered now; `None` where the client waits.
    fn handle(&mut self, client: u64, call: Call) -> Option<std::result::Result<Reply, Refusal>> {
        let answer = match call.request {
            Request::Status(None) => {
                Ok(Reply::All((0..self.exports.len()).map(|number| self.status(number)).collect()))
            }
            Request::Status(Some(name)) => self.find(&name).map(|number| Reply::One(Box::new(self.status(number)))),
            Request::Mirror(request) => self.mirror(&request),
            Request::Pivot(name) => match self.pivot(&name) {
                Ok(number) if call.wait => return self.wait_for(client, number, Wish::Pivot),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Cancel { export, force } => match self.cancel(&export, force) {
                Ok(number) if call.wait => return self.wait_for(client, number, Wish::Cancel),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Finish(name) => match self.finish(&name) {
                Ok(number) if call.wait => return self.wait_for(client, number, Wish::Cancel),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Pause(name) => self.with_job(&name, |active| active.job.pause(true)),
            Request::Resume(name) => self.with_job(&name, |active| active.job.pause(false)),
            Request::Set { export, mode: Some(Mode::WriteBlocking), .. } if self.is_remote(&export) => {
                Err(refuse(Code::ConfigUnsupported, format!("export {export}: {NO_BLOCKING}")))
            }
            Request::Set { export, speed, mode } => self.with_job(&export, |active| {
                if let Some(speed) = speed {
                    active.job.mirror().rate.set(speed);
                    active.job.mirror().work.ring();
                }
                if let Some(mode) = mode {
                    active.job.set_mode(mode);
                }
            }),
            Request::Quit => {
                self.ending = true;
                Ok(Reply::Done {})
            }
        };
        Some(answer)
    }

    /// True where the export's job has another server's export for its target.
    fn is_remote(&self, export: &str) -> bool {
        let active = self.find(export).ok().and_then(|number| self.jobs.get(&number));
        active.is_some_and(|active| active.job.mirror().target.is_remote())
    }

    /// The client is answered when the job of this export is over.
    fn wait_for<T>(&mut self, client: u64, number: usize, wish: Wish) -> Option<T> {
        self.waiting.push((client, number, wish));
        None
    }

    fn find(&self, name: &str) -> std::result::Result<usize, Refusal> {
        self.exports.iter().position(|export| export.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.exports.iter().map(|export| export.name.as_str()).collect();
            refuse(Code::InvalidArg, format!("there is no export {name}; there are: {}", names.join(", ")))
        })
    }

    fn status(&self, number: usize) -> Status {
        let export = &self.exports[number];
        let status = match (self.jobs.get(&number), &export.last) {
            (Some(active), _) => active.status(export),
            (None, Some(last)) => Status { serving: export.serving(), ..last.clone() },
            (None, None) => Status {
                export: export.name.clone(),
                serving: export.serving(),
                phase: "none".to_owned(),
                source: export.serving(),
                ..Status::default()
            },
        };
        // What is wrong with the disk itself matters more than what became of a job.
        let damage = export.gate.route().disk.damage();
        Status { error: damage.or(status.error), ..status }
    }

    fn mirror(&mut self, request: &MirrorRequest) -> std::result::Result<Reply, Refusal> {
        let number = self.find(&request.export)?;
        if self.jobs.contains_key(&number) {
            let message = format!("export {} has a copy job already: cancel it first", request.export);
            return Err(refuse(Code::BlockCopyActive, message));
        }
        let check = |request: &MirrorRequest| self.refuse_in_use(number, request);
        let (started, active) = Active::start(request, &self.exports[number], self.cache, &self.state, &check)?;
        if let Some(active) = active {
            self.jobs.insert(number, active);
            self.waker.wake();
        }
        Ok(Reply::Started(started))
    }

    /// A target that another export serves or another job writes would be written by two.
    fn refuse_in_use(&self, number: usize, request: &MirrorRequest) -> std::result::Result<(), Refusal> {
        let target = &request.target;
        if let Some(Address { server: Server::Unix { path }, .. }) = export_named(Path::new(target))
            && identity(Path::new(&path)).is_ok_and(|socket| self.sockets.contains(&socket))
        {
            let message = format!("{target}: that is this daemon's own socket: name another server's");
            return Err(refuse(Code::InvalidArg, message));
        }
        // What is not there yet is nobody's.
        let files = files_of(Path::new(target), request.format);
        let files: Vec<_> = files.iter().filter_map(|file| identity(file).ok()).collect();
        for (other, export) in self.exports.iter().enumerate().filter(|(other, _)| *other != number) {
            let served = export.gate.route().disk;
            let followed = self.jobs.get(&other).map(|active| Arc::clone(&active.job.mirror().target));
            if let Some(layer) = followed.iter().chain([&served]).find_map(|disk| layer_of(disk, &files)) {
                let message = format!("{target}: export {} uses it ({layer}): name another file", export.name);
                return Err(refuse(Code::InvalidArg, message));
            }
        }
        Ok(())
    }

    fn job(&mut self, name: &str) -> std::result::Result<(usize, &mut Active), Refusal> {
        let number = self.find(name)?;
        match self.jobs.get_mut(&number) {
            Some(active) => Ok((number, active)),
            None => Err(refuse(Code::InvalidArg, format!("export {name} has no copy job"))),
        }
    }

    fn with_job(&mut self, name: &str, change: impl FnOnce(&mut Active)) -> std::result::Result<Reply, Refusal> {
        change(self.job(name)?.1);
        self.waker.wake();
        Ok(Reply::Done {})
    }

    /// A job that may be ended now with a whole target.
    fn ready_job(&mut self, name: &str) -> std::result::Result<(usize, &mut Active), Refusal> {
        let (number, active) = self.job(name)?;
        if active.job.is_ending() {
            return Err(refuse(Code::OperationInvalid, format!("the job of export {name} is being ended already")));
        }
        match active.job.not_ready() {
            Some(reason) => Err(refuse(Code::BlockCopyActive, reason.one_line())),
            None => Ok((number, active)),
        }
    }

    fn finish(&mut self, name: &str) -> std::result::Result<usize, Refusal> {
        let (number, active) = self.ready_job(name)?;
        active.job.cancel(false);
        self.waker.wake();
        Ok(number)
    }

    fn pivot(&mut self, name: &str) -> std::result::Result<usize, Refusal> {
        let (number, _) = self.ready_job(name)?;
        let export = &self.exports[number];
        let record = export.record.clone().ok_or_else(|| {
            refuse(Code::OperationInvalid, format!("export {name} is read-only: it cannot be pivoted"))
        })?;
        if let Some(active) = self.jobs.get_mut(&number) {
            let end = active.switch(export);
            active.job.pivot(end, record);
        }
        self.waker.wake();
        Ok(number)
    }

    fn cancel(&mut self, name: &str, force: bool) -> std::result::Result<usize, Refusal> {
        let (number, active) = self.job(name)?;
        if active.job.is_ending() && !force {
            return Err(refuse(Code::OperationInvalid, format!("the job of export {name} is being ended already")));
        }
        active.job.cancel(force);
        self.waker.wake();
        Ok(number)
    }

    fn step_job(&mut self, number: usize) {
        let Some(active) = self.jobs.get_mut(&number) else { return };
        let base = token(JOB, (number as u64) << SPAN);
        let (mut steps, begun) = (0, self.ring.now());
        let mut tools = Tools { io: &mut self.ring, arena: &self.arena, waker: &self.waker };
        while active.job.step(&mut tools, base) {
            steps += 1;
            // A walk over a mapping that is not in memory is slow; a pivot of another export must not wait.
            if steps == STEPS || tools.io.now().saturating_sub(begun) > STEPS_TIME {
                self.waker.wake();
                break;
            }
        }
        active.measure();
        let (news, undone) = (active.news(), active.job.take_undone());
        if let Some(phase) = news {
            self.tell_phase(number, phase);
        }
        if let Some(reason) = undone {
            let refusal = refuse(Code::OperationFailed, reason);
            self.answer_waiting(number, |_| Err(refusal.clone()));
        }
        if news.is_some_and(Phase::is_over) {
            self.end_job(number);
        }
    }

    fn tell_phase(&mut self, number: usize, phase: Phase) {
        let status = self.status(number);
        let complete = self.jobs.get(&number).is_some_and(|active| active.job.is_complete());
        tracing::info!(export = status.export, phase = phase.name(), "job");
        let event = Event::Phase {
            export: status.export.clone(),
            job: status.job.clone().unwrap_or_default(),
            phase: phase.name().to_owned(),
            complete,
            status: Box::new(status),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.clients.values_mut().for_each(|client| client.event(&event, now));
    }

    fn end_job(&mut self, number: usize) {
        let status = self.status(number);
        let Some(mut active) = self.jobs.remove(&number) else { return };
        let phase = active.job.phase();
        let export = &mut self.exports[number];
        if let Some(record) = active.job.take_record() {
            export.record = Some(record);
        }
        active.close();
        self.forget_job(number);
        let export = &mut self.exports[number];
        export.last = Some(status.clone());
        self.answer_waiting(number, |wish| match (wish, phase) {
            (Wish::Pivot, Phase::Pivoted) | (Wish::Cancel, Phase::Cancelled) => Ok(Reply::Done {}),
            _ => {
                let why = status.error.clone().unwrap_or_else(|| format!("the job ended: {}", phase.name()));
                Err(refuse(Code::OperationFailed, why))
            }
        });
    }

    fn answer_waiting(&mut self, number: usize, answer: impl Fn(Wish) -> std::result::Result<Reply, Refusal>) {
        let (these, others) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, of, _)| *of == number);
        self.waiting = others;
        let these: Vec<(u64, usize, Wish)> = these;
        for (client, _, wish) in these {
            self.answer(client, answer(wish));
        }
    }

    /// Ends the sessions and the jobs, and leaves every image durable and tidy.
    pub fn close(self) -> Result<()> {
        self.sessions.iter().for_each(Worker::ask_to_end);
        self.sessions.into_iter().for_each(Worker::end);
        self.jobs.into_values().for_each(Active::close);
        let mut outcome = Ok(());
        for export in &self.exports {
            let disk = export.gate.route().disk;
            if !disk.read_only() {
                outcome = outcome.and(disk.chain().top().close());
            }
        }
        outcome
    }
}

fn token(kind: u64, index: u64) -> Token {
    Token(kind << KIND | index)
}

fn refuse(code: Code, message: String) -> Refusal {
    Refusal { code, message }
}
