//! What each command asks for: its name, its arguments, and what the daemon has to be asked.
use super::arguments::{
    BlockRebase, Cancel, CancelJob, Capabilities, ChangeJob, Device, DriveMirror, JobAbort, JobId, Map, MaybeExport,
    NamedExport, Nothing, Set, SetSpeed,
};
use super::problem::Problem;
use super::render::{self, Render};
use super::{Call, version};
use crate::control::{MirrorRequest, Mode, Request, libvirt};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What is done about a command.
#[derive(Debug)]
pub(super) enum Plan {
    /// This is the answer.
    Answer(Value),
    /// The daemon is asked, and its reply is written down so.
    Ask(Call, Render),
    /// The export that has this job is looked for first.
    OfJob(String, Verb),
}

/// What a QMP command does to a job, whose export is not known yet.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verb {
    Complete,
    Cancel { force: bool },
    Pause,
    Resume,
    SetSpeed(u64),
    Change(Mode),
}

impl Verb {
    /// The call, now that the export is known. QEMU's verbs answer when they have begun.
    pub(super) fn call(self, export: String) -> Call {
        let request = match self {
            Self::Complete => Request::Pivot(export),
            Self::Cancel { force } => Request::Cancel { export, force },
            Self::Pause => Request::Pause(export),
            Self::Resume => Request::Resume(export),
            Self::SetSpeed(speed) => Request::Set { export, speed: Some(speed), mode: None },
            Self::Change(mode) => Request::Set { export, speed: None, mode: Some(mode) },
        };
        Call { request, wait: false }
    }
}

type Parse = fn(Arguments) -> Result<Plan, Problem>;

/// Every command but `qmp_capabilities`, which is the session's own.
const COMMANDS: &[(&str, Parse)] = &[
    ("blkmirror-abort", |arguments| {
        let JobAbort { export, flags } = arguments.parse()?;
        let (request, wait) = libvirt::abort(export, flags)?;
        Ok(Plan::Ask(Call { request, wait }, render::whole))
    }),
    ("blkmirror-cancel", |arguments| {
        let Cancel { export, force } = arguments.parse()?;
        Ok(waiting(Request::Cancel { export, force }))
    }),
    ("blkmirror-finish", |arguments| arguments.parse().map(|NamedExport { export }| waiting(Request::Finish(export)))),
    ("blkmirror-map", |arguments| arguments.parse::<Map>()?.into_request().map(waiting)),
    ("blkmirror-mirror", |arguments| arguments.parse::<MirrorRequest>().map(|it| waiting(Request::Mirror(it)))),
    ("blkmirror-pause", |arguments| arguments.parse().map(|NamedExport { export }| waiting(Request::Pause(export)))),
    ("blkmirror-pivot", |arguments| arguments.parse().map(|NamedExport { export }| waiting(Request::Pivot(export)))),
    ("blkmirror-rebase", |arguments| {
        let BlockRebase { export, base, bandwidth, flags } = arguments.parse()?;
        Ok(waiting(libvirt::rebase(export, base, bandwidth, flags)?))
    }),
    ("blkmirror-resume", |arguments| arguments.parse().map(|NamedExport { export }| waiting(Request::Resume(export)))),
    ("blkmirror-set", |arguments| arguments.parse::<Set>()?.into_request().map(waiting)),
    ("blkmirror-status", |arguments| arguments.parse().map(|MaybeExport { export }| waiting(Request::Status(export)))),
    ("block-job-cancel", |arguments| {
        let CancelJob { device, force } = arguments.parse()?;
        Ok(Plan::OfJob(device, Verb::Cancel { force }))
    }),
    ("block-job-change", |arguments| {
        let ChangeJob { id, copy_mode, .. } = arguments.parse()?;
        Ok(Plan::OfJob(id, Verb::Change(copy_mode)))
    }),
    ("block-job-complete", |arguments| of_device(arguments, Verb::Complete)),
    ("block-job-pause", |arguments| of_device(arguments, Verb::Pause)),
    ("block-job-resume", |arguments| of_device(arguments, Verb::Resume)),
    ("block-job-set-speed", |arguments| {
        let SetSpeed { device, speed } = arguments.parse()?;
        Ok(Plan::OfJob(device, Verb::SetSpeed(speed)))
    }),
    ("drive-mirror", |arguments| {
        let request = arguments.parse::<DriveMirror>()?.into_request()?;
        Ok(Plan::Ask(Call { request: Request::Mirror(request), wait: false }, render::nothing))
    }),
    // QEMU's job-cancel always gives up at once, unlike block-job-cancel.
    ("job-cancel", |arguments| of_id(arguments, Verb::Cancel { force: true })),
    ("job-complete", |arguments| of_id(arguments, Verb::Complete)),
    ("job-pause", |arguments| of_id(arguments, Verb::Pause)),
    ("job-resume", |arguments| of_id(arguments, Verb::Resume)),
    ("query-block-jobs", |arguments| query(arguments, render::block_jobs)),
    ("query-commands", |arguments| arguments.parse().map(|Nothing {}| Plan::Answer(names()))),
    ("query-jobs", |arguments| query(arguments, render::jobs)),
    ("query-version", |arguments| arguments.parse().map(|Nothing {}| Plan::Answer(version()))),
    ("quit", |arguments| {
        let Nothing {} = arguments.parse()?;
        Ok(Plan::Ask(Call { request: Request::Quit, wait: false }, render::nothing))
    }),
];

/// The command called `name`.
///
/// # Errors
/// `CommandNotFound` where there is none; what is wrong with its arguments, by name.
pub(super) fn plan(name: &str, arguments: Value) -> Result<Plan, Problem> {
    let command = COMMANDS.iter().find(|(known, _)| *known == name);
    let (name, parse) = command.ok_or_else(|| unknown(name))?;
    parse(Arguments { command: name, members: arguments })
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

fn of_device(arguments: Arguments, verb: Verb) -> Result<Plan, Problem> {
    arguments.parse().map(|Device { device }| Plan::OfJob(device, verb))
}

fn of_id(arguments: Arguments, verb: Verb) -> Result<Plan, Problem> {
    arguments.parse().map(|JobId { id }| Plan::OfJob(id, verb))
}

fn query(arguments: Arguments, render: Render) -> Result<Plan, Problem> {
    let Nothing {} = arguments.parse()?;
    Ok(Plan::Ask(Call { request: Request::Status(None), wait: false }, render))
}

fn names() -> Value {
    let names = COMMANDS.iter().map(|(name, _)| *name).chain(["qmp_capabilities"]);
    names.map(|name| json!({ "name": name })).collect()
}

/// A name that is not ours may be of any length: a few of its letters are enough.
fn unknown(name: &str) -> Problem {
    let short: String = name.chars().take(64).collect();
    Problem::no_command(format!("The command {short} has not been found; query-commands lists them"))
}

fn no_members() -> Value {
    Value::Object(serde_json::Map::new())
}
