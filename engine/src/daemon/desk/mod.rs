//! The desk: does or refuses what operators ask for, and steps the jobs of the exports.
//!
//! It knows no sockets: who asks is a number, and what it has to say without being asked, an event or an answer that
//! was waited for, is fetched by `take_news`.
mod chain;
mod changes;
mod concluded;
mod ends;
mod reaching;
mod replacing;
mod rollback;
mod together;
mod verifying;

use super::exports::{Export, Table, layer_of};
use super::jobs::Active;
use crate::control::jobs::{IoStatus, JobInfo, JobStatus, is_id};
use crate::control::options::Reach;
use crate::control::qmp::Call;
use crate::control::{Code, Event, MirrorRequest, Refusal, Reply, Request, Started, Status, TargetFormat};
use crate::disk::Tools;
use crate::io::{Completion, Io, Token, Waker};
use crate::job::Phase;
use crate::mirror::Mirror;
use crate::open::{Identity, export_named, files_of, identity};
use crate::state::StateFolder;
use crate::target::Reached;
use chain::Lowering;
use changes::Removing;
use concluded::Concluded;
use ends::Wish;
use formats::error::Result;
use formats::nbd::{Address, Server};
use reaching::Reaching;
use replacing::Replacing;
use rollback::has_job;
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
    /// What is served, by numbers that are not given twice; the lowest is the default.
    exports: BTreeMap<usize, Export>,
    /// What sessions look exports up in.
    table: Arc<Table>,
    /// Exports that get another disk, and those that are being removed.
    replacing: BTreeMap<usize, Replacing>,
    removing: BTreeMap<usize, Removing>,
    /// Exports whose job begins when its target is reached.
    reaching: BTreeMap<usize, Reaching>,
    /// Exports whose job begins when the layers below its target are copied.
    lowering: BTreeMap<usize, Lowering>,
    /// The job of each export, by the export's number.
    jobs: BTreeMap<usize, Active>,
    concluded: Concluded,
    reach: Reach,
    state: StateFolder,
    /// The Unix sockets that this daemon serves at.
    sockets: Vec<Identity>,
    /// Clients that wait for the end of an export's job, and what they wished for.
    waiting: Vec<(u64, usize, Wish)>,
    news: Vec<News>,
    /// Wakes who steps the desk.
    waker: Waker,
}

impl Desk {
    pub fn new(exports: Vec<Export>, table: Arc<Table>, reach: Reach, state: StateFolder, waker: Waker) -> Self {
        exports.iter().for_each(|export| table.put(export));
        Self {
            exports: (0..).zip(exports).collect(),
            table,
            replacing: BTreeMap::new(),
            removing: BTreeMap::new(),
            reaching: BTreeMap::new(),
            lowering: BTreeMap::new(),
            jobs: BTreeMap::new(),
            concluded: Concluded::default(),
            reach,
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
        self.exports.values().map(name).collect::<Vec<_>>().join(", ")
    }

    /// Goes on with the jobs that a kill or a stop interrupted.
    pub fn resume_jobs(&mut self) {
        for number in self.exports.keys().copied().collect::<Vec<_>>() {
            if self.resume_chain(number) {
                continue;
            }
            let check = |request: &MirrorRequest| self.refuse_in_use(number, &request.target, request.format);
            match Active::resume(&self.exports[&number], &self.reach, &self.state, &check) {
                Ok(Some(active)) => {
                    tracing::info!(export = self.exports[&number].name, "its job goes on");
                    self.jobs.insert(number, active);
                }
                Ok(None) => self.forget_job(number),
                Err(failed) => {
                    let (request, refusal) = *failed;
                    tracing::error!(export = self.exports[&number].name, "its job cannot go on: {refusal}");
                    self.failed_to_resume(number, request, refusal);
                }
            }
        }
    }

    fn failed_to_resume(&mut self, number: usize, request: MirrorRequest, refusal: Refusal) {
        let status = Status {
            phase: Phase::Failed.name().to_owned(),
            job: request.job_id.clone(),
            target: Some(request.target),
            error: Some(refusal.message),
            // Its old disk has missed what was written since, and will miss more.
            rollback: self.was_way_back(number),
            ..self.status(number)
        };
        if let (Some(id), false) = (request.job_id, request.auto_dismiss) {
            self.keep(JobInfo {
                id,
                stands: JobStatus::Concluded,
                completing: false,
                complete: false,
                io_status: IoStatus::Ok,
                auto_finalize: request.auto_finalize,
                auto_dismiss: false,
                at: Box::new(status.clone()),
            });
        }
        self.export_mut(number).last = Some(status);
    }

    /// True where the job that is kept of an export is the way back from its pivot.
    fn was_way_back(&self, number: usize) -> bool {
        self.state.kept_job(&self.exports[&number].name).ok().flatten().is_some_and(|kept| kept.rollback)
    }

    fn forget_job(&self, number: usize) {
        if let Err(error) = self.state.forget_job(&self.exports[&number].name) {
            tracing::warn!("{}", error.one_line());
        }
    }

    /// The Unix sockets that this daemon serves at: none of them is a target.
    pub fn serves_at<'a>(&mut self, sockets: impl Iterator<Item = &'a Path>) {
        self.sockets = sockets.filter_map(|path| identity(path).ok()).collect();
    }

    /// True while a job is under way: then the desk is to be stepped from time to time.
    pub fn has_jobs(&self) -> bool {
        let changes = self.replacing.len() + self.removing.len() + self.reaching.len() + self.lowering.len();
        changes > 0 || !self.jobs.is_empty()
    }

    /// True while guests wait at a closed gate, or a disk is being replaced: then it has to be stepped on, for what was
    /// begun leaves an overlay that nobody knows of, or nobody hears that it is there.
    pub fn holds_gate(&self) -> bool {
        !self.replacing.is_empty() || self.jobs.values().any(|active| active.job.holds_gate())
    }

    /// Why nobody else can go on with what it has now, if so.
    pub fn refuse_hand_over(&self) -> Option<String> {
        let under_way = self.replacing.len() + self.removing.len() + self.reaching.len() + self.lowering.len();
        if under_way > 0 {
            return Some(
                "an export is being changed, or a job is about to begin: try again when that is done".to_owned(),
            );
        }
        let late = self.jobs.values().find_map(|active| active.job.lateness());
        late.map(|late| format!("what is under way cannot be waited for: {late}"))
    }

    /// What it has to say since it was asked last.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Does what can be done. Never waits. The tokens from `base` on are the desk's.
    pub fn step<I: Io>(&mut self, tools: &mut Tools<I>, base: Token) {
        let numbers: Vec<usize> = self.jobs.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.step_job(number, tools, token(base, number)));
        self.step_replacing(tools, base);
        self.step_removing(tools, base);
        self.step_reaching();
        self.step_lowering();
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete<I: Io>(&mut self, tools: &mut Tools<I>, base: Token, done: Completion) {
        let number = ((done.token.0 - base.0) >> SPAN) as usize;
        if let Some(active) = self.jobs.get_mut(&number) {
            active.job.complete(tools, token(base, number), done);
        } else if self.replacing.contains_key(&number) {
            self.complete_replacing(number, tools, token(base, number), done);
        } else if let Some(removing) = self.removing.get_mut(&number) {
            removing.complete(tools, token(base, number), done);
        }
    }

    fn export_mut(&mut self, number: usize) -> &mut Export {
        self.exports.get_mut(&number).expect("a number that was found")
    }

    /// What can be answered now; `None` where the client waits.
    pub fn handle(&mut self, client: u64, call: Call) -> Option<Answer> {
        let answer = self.act(client, call);
        self.jobs.values_mut().for_each(|active| active.keep(&self.state));
        let numbers: Vec<usize> = self.jobs.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.tell(number));
        answer
    }

    fn act(&mut self, client: u64, call: Call) -> Option<Answer> {
        let wait = call.wait;
        if let Some(answer) = self.act_on_lowering(client, &call.request, wait) {
            return answer;
        }
        let answer = match call.request {
            Request::Status(None) => Ok(Reply::All(self.exports.keys().map(|number| self.status(*number)).collect())),
            Request::Status(Some(name)) => self.find(&name).map(|number| Reply::One(Box::new(self.status(number)))),
            Request::Map { export, cells } => {
                self.job(&export).map(|(_, active)| Reply::Map(active.map(&export, cells)))
            }
            Request::Jobs => Ok(Reply::Jobs(self.all_jobs())),
            Request::Mirror(request) => match self.mirror(client, &request) {
                Ok(None) => return None,
                Ok(Some(started)) => Ok(Reply::Started(started)),
                Err(refusal) => Err(refusal),
            },
            Request::Pivot(request) => match self.pivot(&request, wait) {
                Ok(number) if wait => return self.wait_for(client, number, Wish::Pivot),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Cancel { export, force } => match self.cancel(&export, force, wait) {
                Ok(number) if wait => return self.wait_for(client, number, Wish::Cancel),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Finish(name) => match self.finish(&name, wait) {
                Ok(number) if wait => return self.wait_for(client, number, Wish::Cancel),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Finalize(name) => self.finalize(&name),
            Request::Dismiss(id) => self.dismiss(&id),
            Request::Pause(name) => self.with_job(&name, |active| active.job.pause(true)),
            Request::Resume(name) => self.with_job(&name, |active| active.job.pause(false)),
            Request::Set { export, changes } => {
                self.job(&export).and_then(|(_, active)| active.change(changes)).map(|()| {
                    self.waker.wake();
                    Reply::Done {}
                })
            }
            Request::PivotTogether { exports, verified } => match self.pivot_together(client, &exports, verified) {
                Ok(()) => return None,
                Err(refusal) => Err(refusal),
            },
            Request::Commit(name) => match self.commit(&name, wait) {
                Ok(number) if wait => return self.wait_for(client, number, Wish::Cancel),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Verify(name) => match self.verify(&name) {
                Ok(number) if wait => return self.wait_for(client, number, Wish::Verify),
                answer => answer.map(|_| Reply::Done {}),
            },
            Request::Snapshot(request) => match self.snapshot(client, &request) {
                Ok(()) => return None,
                Err(refusal) => Err(refusal),
            },
            Request::Resize { export, size } => match self.resize(client, &export, size) {
                Ok(true) => return None,
                Ok(false) => Ok(Reply::Done {}),
                Err(refusal) => Err(refusal),
            },
            Request::AddExport(options) => self.add_export(&options),
            Request::RemoveExport { export, force } => match self.remove_export(client, &export, force) {
                Ok(()) => return None,
                Err(refusal) => Err(refusal),
            },
            // The thread's own affair.
            Request::Quit | Request::HandOver(_) => Ok(Reply::Done {}),
        };
        Some(answer)
    }

    fn find(&self, name: &str) -> std::result::Result<usize, Refusal> {
        let found = self.exports.iter().find(|(_, export)| export.name == name).map(|(number, _)| *number);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.exports.values().map(|export| export.name.as_str()).collect();
            refuse(Code::InvalidArg, format!("there is no export {name}; there are: {}", names.join(", ")))
        })
    }

    fn status(&self, number: usize) -> Status {
        let export = &self.exports[&number];
        let nothing = || Status {
            export: export.name.clone(),
            serving: export.serving(),
            phase: "none".to_owned(),
            source: export.serving(),
            ..Status::default()
        };
        let status = match (self.jobs.get(&number), self.lowering.get(&number), &export.last) {
            (Some(active), ..) => active.status(export),
            (_, Some(lowering), _) => lowering.status(nothing()),
            (.., Some(last)) => Status { serving: export.serving(), ..last.clone() },
            _ => nothing(),
        };
        // What is wrong with the disk itself matters more than what became of a job.
        let damage = export.gate.route().disk.damage();
        Status { error: damage.or(status.error), ..status }
    }

    /// What was started, or is to be; `None` where the client waits until the target is reached.
    fn mirror(&mut self, client: u64, request: &MirrorRequest) -> std::result::Result<Option<Started>, Refusal> {
        let number = self.find(&request.export)?;
        self.refuse_mirror(number, request)?;
        match export_named(Path::new(&request.target)) {
            _ if request.chain => self.mirror_chain(number, request).map(Some),
            Some(address) => self.reach(client, number, request, address).map(|()| None),
            None => self.start_job(number, request, Reached::Nothing).map(Some),
        }
    }

    fn refuse_mirror(&self, number: usize, request: &MirrorRequest) -> std::result::Result<(), Refusal> {
        if let Some(active) = self.jobs.get(&number) {
            let message = match active.rolls_back() {
                true => has_job(&request.export, active),
                false => format!("export {} has a copy job already: cancel it first", request.export),
            };
            return Err(refuse(Code::BlockCopyActive, message));
        }
        self.refuse_changing(number)?;
        self.refuse_id(request)
    }

    fn start_job(
        &mut self,
        number: usize,
        request: &MirrorRequest,
        reached: Reached,
    ) -> std::result::Result<Started, Refusal> {
        let check = |request: &MirrorRequest| self.refuse_in_use(number, &request.target, request.format);
        let (started, active) =
            Active::start(request, reached, &self.exports[&number], &self.reach, &self.state, &check)?;
        if let Some(active) = active {
            self.jobs.insert(number, active);
            self.waker.wake();
        }
        Ok(started)
    }

    /// A job has a name of its own, also among those that have ended.
    fn refuse_id(&self, request: &MirrorRequest) -> std::result::Result<(), Refusal> {
        let id = request.job_id.as_ref().unwrap_or(&request.export);
        if *id != request.export && !is_id(id) {
            let what = "it has to begin with a letter, and to go on with letters, digits, '-', '.' and '_'";
            return Err(refuse(Code::InvalidArg, format!("Invalid job ID '{id}': {what}")));
        }
        self.refuse_id_in_use(id)
    }

    fn refuse_id_in_use(&self, id: &str) -> std::result::Result<(), Refusal> {
        let under_way = self.jobs.values().flat_map(|active| [Some(active.job.id()), active.id_of_back()]).flatten();
        let under_way = under_way.chain(self.lowering.values().map(Lowering::id));
        let remedy = match under_way.chain(self.concluded.ids()).find(|other| *other == id) {
            None => return Ok(()),
            Some(_) if self.concluded.ids().any(|other| other == id) => {
                "dismiss the job that has ended, or name another"
            }
            Some(_) => "name another",
        };
        Err(refuse(Code::InvalidArg, format!("Job ID '{id}' already in use: {remedy}")))
    }

    /// A target that another export serves or another job writes would be written by two.
    fn refuse_in_use(
        &self,
        number: usize,
        target: &str,
        format: Option<TargetFormat>,
    ) -> std::result::Result<(), Refusal> {
        if let Some(Address { server: Server::Unix { path }, .. }) = export_named(Path::new(target))
            && identity(Path::new(&path)).is_ok_and(|socket| self.sockets.contains(&socket))
        {
            let message = format!("{target}: that is this daemon's own socket: name another server's");
            return Err(refuse(Code::InvalidArg, message));
        }
        // What is not there yet is nobody's.
        let files = files_of(Path::new(target), format);
        let files: Vec<_> = files.iter().filter_map(|file| identity(file).ok()).collect();
        for (other, export) in self.exports.iter().filter(|(other, _)| **other != number) {
            let served = export.gate.route().disk;
            let followed = self.jobs.get(other).map(|active| Arc::clone(&active.job.mirror().target));
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
            None if self.lowering.contains_key(&number) => {
                let left = self.lowering[&number].left();
                let what = "still to copy: the layers below the top are being copied";
                let message = format!("export {name}: {left} bytes {what} (phase: seeding)");
                Err(refuse(Code::BlockCopyActive, message))
            }
            None => {
                let message = format!("export {name} has no copy job: start one with `blkmirror mirror` first");
                Err(refuse(Code::InvalidArg, message))
            }
        }
    }

    fn with_job(&mut self, name: &str, change: impl FnOnce(&mut Active)) -> Answer {
        change(self.job(name)?.1);
        self.waker.wake();
        Ok(Reply::Done {})
    }

    /// The jobs under way, and those that wait to be dismissed.
    fn all_jobs(&self) -> Vec<JobInfo> {
        let under_way = self.jobs.iter().map(|(number, active)| active.info(self.status(*number)));
        let begin = self.lowering.iter().map(|(number, lowering)| lowering.info(self.status(*number)));
        under_way.chain(begin).chain(self.concluded.iter().cloned()).collect()
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
        let (over, undone) = (active.job.phase().is_over(), active.job.take_undone());
        let errors = active.errors();
        let may_tell = active.may_tell();
        if undone.is_some() {
            active.drop_back(&self.state);
        }
        self.news.extend(errors.into_iter().map(News::Event));
        if may_tell {
            self.tell(number);
        }
        if let Some(reason) = undone {
            let refusal = refuse(Code::OperationFailed, reason);
            self.answer_waiting(number, |wish| (wish != Wish::Verify).then(|| Err(refusal.clone())));
        }
        self.answer_verified(number);
        if over {
            self.end_job(number);
        }
    }

    /// Tells what is new of a job.
    fn tell(&mut self, number: usize) {
        let path = match (self.jobs.get_mut(&number), self.lowering.get_mut(&number)) {
            (Some(active), _) => active.news(),
            (None, lowering) => lowering.and_then(Lowering::news),
        };
        let Some(path) = path else { return };
        let at = self.status(number);
        let job = match (self.jobs.get(&number), self.lowering.get(&number)) {
            (Some(active), _) => active.info(at),
            (None, Some(lowering)) => lowering.info(at),
            (None, None) => return,
        };
        let job = Box::new(job);
        tracing::info!(export = job.at.export, phase = job.at.phase, paused = job.at.paused, "job");
        self.news.push(News::Event(Event::Job { job, path }));
    }

    /// Ends the jobs, and leaves every image durable and tidy. Nobody uses the exports any more.
    pub fn close(self) -> Result<()> {
        self.lowering.into_values().for_each(Lowering::stop);
        let mut left: BTreeMap<usize, Arc<Mirror>> =
            self.jobs.into_iter().filter_map(|(number, active)| Some((number, active.close(false)?))).collect();
        let mut outcome = Ok(());
        for (number, export) in &self.exports {
            let disk = export.gate.route().disk;
            let closed = if disk.read_only() { Ok(()) } else { disk.chain().top().close() };
            // Both sides are durable: the next start goes on from here, also after a reboot.
            if let Some(mirror) = left.remove(number).filter(|_| closed.is_ok() && !disk.is_poisoned())
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
