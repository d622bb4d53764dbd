//! The desk: does or refuses what operators ask for, and steps the jobs of the exports.
//!
//! It knows no sockets: who asks is a number, and what it has to say without being asked, an event or an answer that
//! was waited for, is fetched by `take_news`.
use super::exports::{Export, layer_of};
use super::jobs::Active;
use crate::control::options::Cache;
use crate::control::qmp::Call;
use crate::control::{Code, Event, MirrorRequest, Mode, Refusal, Reply, Request, Status};
use crate::disk::Tools;
use crate::io::{Completion, Io, Token, Waker};
use crate::job::Phase;
use crate::mirror::Mirror;
use crate::open::{Identity, export_named, files_of, identity};
use crate::state::StateFolder;
use crate::target::NO_BLOCKING;
use formats::error::Result;
use formats::nbd::{Address, Server};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How many steps a job may take before others are looked at.
const STEPS: usize = 64;
const STEPS_TIME: Duration = Duration::from_millis(5);
/// Each job has so many tokens, as bits.
const SPAN: u32 = 8;

/// What comes of a request.
pub(super) type Answer = std::result::Result<Reply, Refusal>;

/// What the desk has to say without being asked.
pub(super) enum News {
    /// For everybody who listens.
    Event(Event),
    /// For the client that waited for it.
    Answer(u64, Answer),
}

pub(super) struct Desk {
    exports: Vec<Export>,
    /// The job of each export, by the export's number.
    jobs: BTreeMap<usize, Active>,
    cache: Cache,
    state: StateFolder,
    /// The Unix sockets that this daemon serves at.
    sockets: Vec<Identity>,
    /// Clients that wait for the end of an export's job, and what they wished for.
    waiting: Vec<(u64, usize, Wish)>,
    news: Vec<News>,
    /// Wakes who steps the desk.
    waker: Waker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Pivot,
    Cancel,
}

impl Desk {
    pub fn new(exports: Vec<Export>, cache: Cache, state: StateFolder, waker: Waker) -> Self {
        Self {
            exports,
            jobs: BTreeMap::new(),
            cache,
            state,
            sockets: Vec::new(),
            waiting: Vec::new(),
            news: Vec::new(),
            waker,
        }
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
                }
            }
        }
    }

    fn forget_job(&self, number: usize) {
        if let Err(error) = self.state.forget_job(&self.exports[number].name) {
            tracing::warn!("{}", error.one_line());
        }
    }

    /// The Unix sockets that this daemon serves at: none of them is a target.
    pub fn serves_at<'a>(&mut self, sockets: impl Iterator<Item = &'a Path>) {
        self.sockets = sockets.filter_map(|path| identity(path).ok()).collect();
    }

    /// True while a job is under way: then the desk is to be stepped from time to time.
    pub fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// True while guests wait at a closed gate: then it has to be stepped on.
    pub fn holds_gate(&self) -> bool {
        self.jobs.values().any(|active| active.job.holds_gate())
    }

    /// What it has to say since it was asked last.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Does what can be done. Never waits. The tokens from `base` on are the desk's.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) {
        let numbers: Vec<usize> = self.jobs.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.step_job(number, tools, token(base, number)));
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        let number = ((done.token.0 - base.0) >> SPAN) as usize;
        if let Some(active) = self.jobs.get_mut(&number) {
            active.job.complete(tools, token(base, number), done);
        }
    }

    /// What can be answered now; `None` where the client waits.
    pub fn handle(&mut self, client: u64, call: Call) -> Option<Answer> {
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
            // The thread's own affair.
            Request::Quit => Ok(Reply::Done {}),
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

    fn mirror(&mut self, request: &MirrorRequest) -> Answer {
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

    fn with_job(&mut self, name: &str, change: impl FnOnce(&mut Active)) -> Answer {
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

    fn step_job<I: Io>(&mut self, number: usize, tools: &mut Tools<I>, base: Token) {
        let Some(active) = self.jobs.get_mut(&number) else { return };
        let (mut steps, begun) = (0, tools.io.now());
        while active.job.step(tools, base) {
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
        self.news.push(News::Event(event));
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

    fn answer_waiting(&mut self, number: usize, answer: impl Fn(Wish) -> Answer) {
        let (these, others) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, of, _)| *of == number);
        self.waiting = others;
        let these: Vec<(u64, usize, Wish)> = these;
        self.news.extend(these.into_iter().map(|(client, _, wish)| News::Answer(client, answer(wish))));
    }

    /// Ends the jobs, and leaves every image durable and tidy. Nobody uses the exports any more.
    pub fn close(self) -> Result<()> {
        let mut left: BTreeMap<usize, Arc<Mirror>> =
            self.jobs.into_iter().filter_map(|(number, active)| Some((number, active.close()?))).collect();
        let mut outcome = Ok(());
        for (number, export) in self.exports.iter().enumerate() {
            let disk = export.gate.route().disk;
            let closed = if disk.read_only() { Ok(()) } else { disk.chain().top().close() };
            // Both sides are durable: the next start goes on from here, also after a reboot.
            if let Some(mirror) = left.remove(&number).filter(|_| closed.is_ok() && !disk.is_poisoned())
                && mirror.leave()
                && let Err(error) = self.state.sync_planes(&export.name)
            {
                tracing::warn!("{}", error.one_line());
            }
            outcome = outcome.and(closed);
        }
        outcome
    }
}

/// The first of a job's tokens.
fn token(base: Token, number: usize) -> Token {
    Token(base.0 + ((number as u64) << SPAN))
}

fn refuse(code: Code, message: String) -> Refusal {
    Refusal { code, message }
}
