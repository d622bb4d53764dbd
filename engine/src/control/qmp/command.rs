//! What each command asks for: its name, its arguments, and what the daemon has to be asked.
//!
//! The table is the one definition: the parser, `query-commands` and `query-qmp-schema` come from it.
use super::answers::{BlockJobInfo, CommandInfo, Empty, JobInfo, SchemaInfo, VersionInfo};
use super::arguments::{
    BlockRebase, BlockResize, Cancel, CancelJob, Capabilities, ChangeJob, Device, DriveMirror, JobAbort, JobId,
    MapCells, MaybeExport, NamedExport, NamedExports, Nothing, RemoveExport, Resize, Set, SetSpeed, SnapshotSync,
    Verify,
};
use super::problem::Problem;
use super::render::{self, Render, value};
use super::schema::Schema;
use super::shape::{Shape, shape};
use super::{Call, event, version};
use crate::control::jobs::{self, JobVerb};
use crate::control::options::ExportOptions;
use crate::control::{
    Changes, HandOver, MirrorMap, MirrorRequest, Mode, PivotRequest, Request, SnapshotRequest, Started, Status, libvirt,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is done about a command.
#[derive(Debug)]
pub(super) enum Plan {
    /// This is the answer.
    Answer(Value),
    /// The daemon is asked, and its reply is written down so.
    Ask(Call, Render),
    /// The job is looked for first.
    OfJob(JobCommand),
}

/// What a QMP command says to a job, of which only the name is known yet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct JobCommand {
    pub(super) id: String,
    /// It is one of `block-job-*`, which have errors of their own.
    pub(super) block: bool,
    verb: Verb,
}

#[derive(Clone, Debug, PartialEq)]
enum Verb {
    Complete,
    Cancel { force: bool },
    Pause,
    Resume,
    SetSpeed(u64),
    Change(Mode),
    Finalize,
    Dismiss,
}

impl JobCommand {
    /// The call, now that it is known how the job stands, or none where there is nothing to do. QEMU's verbs answer
    /// when they have begun.
    ///
    /// # Errors
    /// That the job cannot be told this where it stands, in QEMU's words.
    pub(super) fn call(self, job: &jobs::JobInfo) -> Result<Option<Call>, Problem> {
        let verb = self.verb.kind();
        if !job.stands.takes(verb) {
            let (id, stands, verb) = (&self.id, word(&job.stands), word(&verb));
            let message = format!("Job '{id}' in state '{stands}' cannot accept command verb '{verb}'");
            return Err(Problem::not_now(message));
        }
        let export = job.at.export.clone();
        let request = match self.verb {
            // Asked for twice, it is asked for.
            Verb::Complete if job.completing => return Ok(None),
            Verb::Complete => Request::Pivot(PivotRequest::of(export)),
            Verb::Cancel { force } => Request::Cancel { export, force },
            Verb::Pause if job.at.paused => return Err(Problem::not_now("Job is already paused")),
            Verb::Pause => Request::Pause(export),
            Verb::Resume if !job.at.paused => return Err(Problem::not_now("Can't resume a job that was not paused")),
            Verb::Resume => Request::Resume(export),
            Verb::SetSpeed(speed) => {
                Request::Set { export, changes: Changes { speed: Some(speed), ..Changes::default() } }
            }
            Verb::Change(mode) => Request::Set { export, changes: Changes { mode: Some(mode), ..Changes::default() } },
            Verb::Finalize => Request::Finalize(export),
            Verb::Dismiss => Request::Dismiss(self.id),
        };
        Ok(Some(Call { request, wait: false }))
    }
}

impl Verb {
    fn kind(&self) -> JobVerb {
        match self {
            Self::Complete => JobVerb::Complete,
            Self::Cancel { .. } => JobVerb::Cancel,
            Self::Pause => JobVerb::Pause,
            Self::Resume => JobVerb::Resume,
            Self::SetSpeed(_) => JobVerb::SetSpeed,
            Self::Change(_) => JobVerb::Change,
            Self::Finalize => JobVerb::Finalize,
            Self::Dismiss => JobVerb::Dismiss,
        }
    }
}

/// One command.
struct Command {
    name: &'static str,
    takes: fn() -> Shape,
    gives: fn() -> Shape,
    plan: fn(Arguments) -> Result<Plan, Problem>,
}

/// A command: its name, the type of its arguments, that of its answer, and what is done.
macro_rules! command {
    ($name:literal, $takes:ty => $gives:ty, $plan:expr) => {
        Command {
            name: $name,
            takes: shape::<$takes>,
            gives: shape::<$gives>,
            plan: |arguments| {
                let plan: fn($takes) -> Result<Plan, Problem> = $plan;
                arguments.parse().and_then(plan)
            },
        }
    };
}

/// Every command but `qmp_capabilities`, which is the session's own.
const COMMANDS: &[Command] = &[
    command!("blkmirror-cancel", Cancel => Empty, |it| {
        Ok(waiting(Request::Cancel { export: it.export, force: it.force }))
    }),
    command!("blkmirror-commit", NamedExport => Empty, |it| Ok(waiting(Request::Commit(it.export)))),
    command!("blkmirror-export-add", ExportOptions => Empty, |it| Ok(waiting(Request::AddExport(it)))),
    command!("blkmirror-export-remove", RemoveExport => Empty, |it| {
        Ok(waiting(Request::RemoveExport { export: it.export, force: it.force }))
    }),
    command!("blkmirror-finish", NamedExport => Empty, |it| Ok(waiting(Request::Finish(it.export)))),
    command!("blkmirror-hand-over", HandOver => Empty, |it| Ok(waiting(Request::HandOver(it)))),
    command!("blkmirror-map", MapCells => MirrorMap, |it| it.into_request().map(waiting)),
    command!("blkmirror-mirror", MirrorRequest => Started, |it| Ok(waiting(Request::Mirror(it)))),
    command!("blkmirror-pause", NamedExport => Empty, |it| Ok(waiting(Request::Pause(it.export)))),
    command!("blkmirror-pivot", PivotRequest => Empty, |it| Ok(waiting(Request::Pivot(it)))),
    command!("blkmirror-pivot-together", NamedExports => Empty, |it| {
        Ok(waiting(Request::PivotTogether { exports: it.exports, verified: it.verified }))
    }),
    command!("blkmirror-resize", Resize => Empty, |it| {
        Ok(waiting(Request::Resize { export: it.export, size: it.size }))
    }),
    command!("blkmirror-resume", NamedExport => Empty, |it| Ok(waiting(Request::Resume(it.export)))),
    command!("blkmirror-set", Set => Empty, |it| it.into_request().map(waiting)),
    command!("blkmirror-snapshot", SnapshotRequest => Empty, |it| Ok(waiting(Request::Snapshot(it)))),
    command!("blkmirror-status", MaybeExport => Status, |it| Ok(waiting(Request::Status(it.export)))),
    command!("blkmirror-verify", Verify => Empty, |it| {
        Ok(Plan::Ask(Call { request: Request::Verify(it.export), wait: it.wait }, render::whole))
    }),
    command!("block-job-abort", JobAbort => Empty, |it| {
        let (request, wait) = libvirt::abort(it.export, it.flags)?;
        Ok(Plan::Ask(Call { request, wait }, render::whole))
    }),
    command!("block-job-cancel", CancelJob => Empty, |it| of_block_job(it.device, Verb::Cancel { force: it.force })),
    command!("block-job-change", ChangeJob => Empty, |it| of_block_job(it.id, Verb::Change(it.copy_mode))),
    command!("block-job-complete", Device => Empty, |it| of_block_job(it.device, Verb::Complete)),
    command!("block-job-dismiss", JobId => Empty, |it| of_block_job(it.id, Verb::Dismiss)),
    command!("block-job-finalize", JobId => Empty, |it| of_block_job(it.id, Verb::Finalize)),
    command!("block-job-pause", Device => Empty, |it| of_block_job(it.device, Verb::Pause)),
    command!("block-job-resume", Device => Empty, |it| of_block_job(it.device, Verb::Resume)),
    command!("block-job-set-speed", SetSpeed => Empty, |it| of_block_job(it.device, Verb::SetSpeed(it.speed))),
    command!("block-rebase", BlockRebase => Started, |it| {
        let request = libvirt::rebase(it.export, it.base, it.bandwidth, it.flags)?;
        Ok(waiting(Request::Mirror(MirrorRequest { dry_run: it.dry_run, ..request })))
    }),
    command!("block_resize", BlockResize => Empty, |it| it.into_request().map(waiting)),
    command!("blockdev-snapshot-sync", SnapshotSync => Empty, |it| {
        it.into_request().map(|request| waiting(Request::Snapshot(request)))
    }),
    command!("drive-mirror", DriveMirror => Empty, |it| {
        Ok(Plan::Ask(Call { request: Request::Mirror(it.into_request()?), wait: false }, render::nothing))
    }),
    // QEMU's job-cancel always gives up at once, unlike block-job-cancel.
    command!("job-cancel", JobId => Empty, |it| of_job(it.id, Verb::Cancel { force: true })),
    command!("job-complete", JobId => Empty, |it| of_job(it.id, Verb::Complete)),
    command!("job-dismiss", JobId => Empty, |it| of_job(it.id, Verb::Dismiss)),
    command!("job-finalize", JobId => Empty, |it| of_job(it.id, Verb::Finalize)),
    command!("job-pause", JobId => Empty, |it| of_job(it.id, Verb::Pause)),
    command!("job-resume", JobId => Empty, |it| of_job(it.id, Verb::Resume)),
    command!("query-block-jobs", Nothing => Vec<BlockJobInfo>, |Nothing {}| Ok(query(render::block_jobs))),
    command!("query-commands", Nothing => Vec<CommandInfo>, |Nothing {}| Ok(Plan::Answer(value(&names())))),
    command!("query-jobs", Nothing => Vec<JobInfo>, |Nothing {}| Ok(query(render::jobs))),
    command!("query-qmp-schema", Nothing => Vec<SchemaInfo>, |Nothing {}| Ok(Plan::Answer(value(&schema())))),
    command!("query-version", Nothing => VersionInfo, |Nothing {}| Ok(Plan::Answer(value(&version())))),
    command!("quit", Nothing => Empty, |Nothing {}| {
        Ok(Plan::Ask(Call { request: Request::Quit, wait: false }, render::nothing))
    }),
];

/// The session's own command.
const CAPABILITIES: &str = "qmp_capabilities";

/// The command called `name`.
///
/// # Errors
/// `CommandNotFound` where there is none; what is wrong with its arguments, by name.
pub(super) fn plan(name: &str, arguments: Value) -> Result<Plan, Problem> {
    let command = COMMANDS.iter().find(|command| command.name == name).ok_or_else(|| unknown(name))?;
    (command.plan)(Arguments { command: command.name, members: arguments })
}

/// A message that is a command. Its id was taken out before, for it is echoed whatever else is wrong.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Message {
    /// Which command.
    pub(super) execute: String,
    /// With what.
    #[serde(default = "no_members")]
    pub(super) arguments: Value,
}

impl Message {
    /// # Errors
    /// Which member is missing, unknown or of another type.
    pub(super) fn parse(message: Value) -> Result<Self, Problem> {
        if !message.is_object() {
            return Err(Problem::invalid("QMP input must be a JSON object"));
        }
        serde_json::from_value(message).map_err(|error| Problem::invalid(format!("QMP input: {error}")))
    }
}

/// Checks the arguments of `qmp_capabilities`: none was offered, so none can be enabled.
///
/// # Errors
/// Which capability cannot be had.
pub(super) fn no_capabilities(arguments: Value) -> Result<(), Problem> {
    let Capabilities { enable } = Arguments { command: "qmp_capabilities", members: arguments }.parse()?;
    match enable.first() {
        Some(name) => Err(Problem::unsupported(format!("qmp_capabilities: capability '{name}' is not offered"))),
        None => Ok(()),
    }
}

/// A command's arguments, not looked at yet.
pub(super) struct Arguments {
    command: &'static str,
    members: Value,
}

impl Arguments {
    fn parse<T: DeserializeOwned>(self) -> Result<T, Problem> {
        let command = self.command;
        if !self.members.is_object() {
            return Err(Problem::invalid(format!("{command}: 'arguments' is not an object")));
        }
        if let Some(name) = with_nul(&self.members) {
            return Err(Problem::invalid(format!("{command}: argument '{name}' has a NUL byte")));
        }
        serde_path_to_error::deserialize(self.members).map_err(|error| {
            let path = error.path().to_string();
            let what = error.into_inner();
            match path.as_str() {
                "." => Problem::invalid(format!("{command}: {what}")),
                _ => Problem::invalid(format!("{command}: argument '{path}': {what}")),
            }
        })
    }
}

/// The first member whose text no path and no name can have.
fn with_nul(members: &Value) -> Option<&str> {
    let members = members.as_object()?;
    let has_nul = |value: &Value| value.as_str().is_some_and(|text| text.contains('\0'));
    members.iter().find(|(_, value)| has_nul(value)).map(|(name, _)| name.as_str())
}

fn waiting(request: Request) -> Plan {
    Plan::Ask(Call { request, wait: true }, render::whole)
}

fn of_block_job(id: String, verb: Verb) -> Result<Plan, Problem> {
    Ok(Plan::OfJob(JobCommand { id, block: true, verb }))
}

fn of_job(id: String, verb: Verb) -> Result<Plan, Problem> {
    Ok(Plan::OfJob(JobCommand { id, block: false, verb }))
}

fn query(render: Render) -> Plan {
    Plan::Ask(Call { request: Request::Jobs, wait: false }, render)
}

fn names() -> Vec<CommandInfo> {
    let names = COMMANDS.iter().map(|command| command.name).chain([CAPABILITIES]);
    names.map(|name| CommandInfo { name: name.to_owned() }).collect()
}

fn schema() -> Vec<SchemaInfo> {
    let mut schema = Schema::default();
    for command in COMMANDS {
        schema.command(command.name, &(command.takes)(), &(command.gives)());
    }
    schema.command(CAPABILITIES, &shape::<Capabilities>(), &shape::<Empty>());
    event::describe(&mut schema);
    schema.into_entries()
}

/// One of our words as QMP has it.
fn word(of: &impl serde::Serialize) -> String {
    value(of).as_str().unwrap_or_default().to_owned()
}

/// A name that is not ours may be of any length: a few of its letters are enough.
fn unknown(name: &str) -> Problem {
    let short: String = name.chars().take(64).collect();
    Problem::no_command(format!("The command {short} has not been found; query-commands lists them"))
}

fn no_members() -> Value {
    Value::Object(serde_json::Map::new())
}
