//! QMP lines: whatever a client says, each message gets one answer, in order, with its id.
//!
//! Where messages end is written again here from the rule's sentence: an object ends with its
//! outermost brace or with its line, anything else with its line. A daemon that agrees to
//! everything, or refuses it, stands behind the session; what a job is told in its name is checked
//! against the jobs that it spoke of.
use arbitrary::{Arbitrary, Unstructured};
use engine::control::jobs::{IoStatus, JobInfo, JobStatus};
use engine::control::qmp::{Call, Client, MESSAGE_LEN_MAX, OUTPUT_LEN_MAX};
use engine::control::{Code, Event, Refusal, Reply, Request, Started, Status};
use serde_json::{Value, json};
use std::time::Duration;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Lengths of the pieces that arrive.
    cuts: &'a [u8],
    /// The first message is what a client has to begin with.
    negotiated: bool,
    said: Vec<Said<'a>>,
    /// What the daemon answers, and what happens in between.
    daemon: Vec<Deed>,
}

#[derive(Arbitrary, Debug)]
enum Said<'a> {
    Command {
        name: Name<'a>,
        id: Id<'a>,
        arguments: Arguments<'a>,
        line_end: bool,
    },
    Bytes(&'a [u8]),
    /// A text of so many KiB.
    Long(u8),
    /// An object as long as a message may be, and so many bytes more.
    Longest(i8),
    LineEnd,
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known(u8),
    Other(&'a str),
}

#[derive(Arbitrary, Debug)]
enum Id<'a> {
    None,
    Number(i64),
    Float(f64),
    Text(&'a str),
    List(Vec<Option<&'a str>>),
}

#[derive(Arbitrary, Debug)]
enum Arguments<'a> {
    None,
    /// Members that commands have, with values that they may have.
    Members(Vec<(u8, Member<'a>)>),
    /// JSON, or not.
    Raw(&'a str),
}

#[derive(Arbitrary, Debug)]
enum Member<'a> {
    Number(i64),
    Flag(bool),
    Text(&'a str),
    Word(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Deed {
    Done,
    Refuse,
    Started,
    /// So many jobs, in some phase.
    Jobs(u8, u8),
    Event(u8, bool),
}

const COMMANDS: [&str; 44] = [
    "qmp_capabilities",
    "blkmirror-cancel",
    "blkmirror-finish",
    "blkmirror-mirror",
    "blkmirror-pause",
    "blkmirror-pivot",
    "blkmirror-resume",
    "blkmirror-set",
    "blkmirror-status",
    "block-job-abort",
    "block-job-cancel",
    "block-job-change",
    "block-job-complete",
    "block-job-dismiss",
    "block-job-finalize",
    "block-job-pause",
    "block-job-resume",
    "block-job-set-speed",
    "block-rebase",
    "drive-mirror",
    "job-cancel",
    "job-complete",
    "job-dismiss",
    "job-finalize",
    "job-pause",
    "job-resume",
    "query-block-jobs",
    "query-commands",
    "query-jobs",
    "query-qmp-schema",
    "query-version",
    "quit",
    "query-block",
    "blkmirror-hand-over",
    "blkmirror-map",
    "blkmirror-export-add",
    "blkmirror-export-remove",
    "blkmirror-pivot-together",
    "blkmirror-snapshot",
    "blockdev-snapshot-sync",
    "blkmirror-resize",
    "block_resize",
    "blkmirror-verify",
    "blkmirror-commit",
];
const MEMBERS: [&str; 40] = [
    "reflink",
    "latency-factor",
    "deadline",
    "max-slowdown",
    "max-lag",
    "device",
    "target",
    "format",
    "sync",
    "mode",
    "speed",
    "granularity",
    "buf-size",
    "on-source-error",
    "on-target-error",
    "pause-budget",
    "copy-mode",
    "unmap",
    "job-id",
    "auto-finalize",
    "auto-dismiss",
    "id",
    "force",
    "export",
    "shallow",
    "reuse-external",
    "dry-run",
    "enable",
    "flags",
    "base",
    "bandwidth",
    "type",
    "cells",
    "file",
    "name",
    "exports",
    "snapshot-file",
    "size",
    "node-name",
    "chain",
];
const WORDS: [&str; 15] = [
    "full",
    "top",
    "none",
    "existing",
    "absolute-paths",
    "report",
    "stop",
    "enospc",
    "ignore",
    "background",
    "write-blocking",
    "qcow2",
    "raw",
    "job0",
    "mirror",
];
const STATUSES: [JobStatus; 10] = [
    JobStatus::Created,
    JobStatus::Running,
    JobStatus::Paused,
    JobStatus::Ready,
    JobStatus::Standby,
    JobStatus::Waiting,
    JobStatus::Pending,
    JobStatus::Aborting,
    JobStatus::Concluded,
    JobStatus::Null,
];
const PHASES: [&str; 8] = ["none", "seeding", "converging", "ready", "pivoting", "pivoted", "cancelled", "failed"];

fn one_of<T: Copy>(all: &[T], nth: u8) -> T {
    all[usize::from(nth) % all.len()]
}

impl Said<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Command { name, id, arguments, line_end } => {
                let name = match name {
                    Name::Known(nth) => one_of(&COMMANDS, *nth),
                    Name::Other(name) => name,
                };
                let mut text = format!("{{\"execute\":{}", json!(name));
                match id {
                    Id::None => {}
                    Id::Number(id) => text += &format!(",\"id\":{id}"),
                    Id::Float(id) => text += &format!(",\"id\":{}", json!(id)),
                    Id::Text(id) => text += &format!(",\"id\":{}", json!(id)),
                    Id::List(id) => text += &format!(",\"id\":{{\"a\":{}}}", json!(id)),
                }
                if let Some(arguments) = arguments.text() {
                    text += &format!(",\"arguments\":{arguments}");
                }
                text += if *line_end { "}\r\n" } else { "}" };
                text.into_bytes()
            }
            Self::Bytes(bytes) => bytes.to_vec(),
            Self::Long(kib) => vec![b'x'; usize::from(*kib) << 10],
            Self::Longest(more) => {
                let filler = MESSAGE_LEN_MAX.saturating_add_signed(isize::from(*more)) - br#"{"id":""}"#.len();
                [br#"{"id":""#, &vec![b'x'; filler][..], br#""}"#].concat()
            }
            Self::LineEnd => b"\n".to_vec(),
        }
    }
}

impl Arguments<'_> {
    fn text(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Raw(text) => Some((*text).into()),
            Self::Members(members) => {
                let member = |(name, member): &(u8, Member)| {
                    let value = match member {
                        Member::Number(number) => json!(number),
                        Member::Flag(flag) => json!(flag),
                        Member::Text(text) => json!(text),
                        Member::Word(nth) => json!(one_of(&WORDS, *nth)),
                    };
                    (one_of(&MEMBERS, *name).to_owned(), value)
                };
                Some(Value::Object(members.iter().map(member).collect()).to_string())
            }
        }
    }
}

/// Has a session as `data` says and compares.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut said: Vec<u8> = Vec::new();
    if input.negotiated {
        said.extend_from_slice(br#"{"execute":"qmp_capabilities","id":"first"}"#);
    }
    for more in input.said.iter().take(200) {
        said.extend(more.bytes());
        if said.len() > 512 << 10 {
            break;
        }
    }
    let mut session = Session {
        client: Client::new(),
        sent: Vec::new(),
        daemon: &input.daemon[..input.daemon.len().min(100)],
        next: 0,
        jobs: Vec::new(),
    };
    session.converse(&said, input.cuts);
    check(&session.sent, &said);
}

struct Session<'a> {
    client: Client,
    /// What the client got.
    sent: Vec<u8>,
    daemon: &'a [Deed],
    next: usize,
    /// The jobs that the daemon spoke of last.
    jobs: Vec<JobInfo>,
}

impl Session<'_> {
    fn converse(&mut self, said: &[u8], cuts: &[u8]) {
        let (mut rest, mut cuts) = (said, cuts.iter().cycle());
        loop {
            while let Some(call) = self.client.next_call() {
                assert!(self.client.is_answering() && self.client.next_call().is_none(), "one call at a time");
                self.check_call(&call);
                let answer = self.answer(&call.request);
                if let Ok(Reply::Jobs(jobs)) = &answer {
                    self.jobs = jobs.clone();
                }
                self.client.answer(answer);
            }
            assert!(!self.client.is_answering());
            let output = self.client.output();
            assert!(output.len() <= OUTPUT_LEN_MAX && !self.client.is_lost(), "a client that reads is not lost");
            let len = output.len();
            self.sent.extend_from_slice(output);
            self.client.sent(len);
            if len == 0 && rest.is_empty() {
                return;
            }
            // Nothing waits any more, or it was answered above; what was read makes room for the rest.
            if self.client.wants_input() {
                let cut = cuts.next().map_or(usize::MAX, |cut| usize::from(*cut) * 16 + 1 + said.len() / 256);
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                self.client.receive(piece);
                rest = more;
            }
        }
    }

    /// What a job is told by QEMU's commands is told one that is there, where it can be told so.
    fn check_call(&self, call: &Call) {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let of_export = |export: &String, allowed: &dyn Fn(&JobInfo) -> bool| {
            assert!(self.jobs.iter().any(|job| job.at.export == *export && allowed(job)), "{call:?}: {:?}", self.jobs);
        };
        let copies = |job: &JobInfo| matches!(job.stands, Created | Running | Paused | Ready | Standby);
        match &call.request {
            Request::Finalize(export) => of_export(export, &|job| job.stands == Pending),
            Request::Dismiss(id) => {
                assert!(self.jobs.iter().any(|job| job.id == *id && job.stands == Concluded), "{call:?}");
            }
            Request::Pause(export) if !call.wait => {
                of_export(export, &|job| (copies(job) || job.stands == Pending) && !job.at.paused);
            }
            Request::Resume(export) if !call.wait => {
                of_export(export, &|job| (copies(job) || job.stands == Pending) && job.at.paused);
            }
            Request::Set { export, .. } if !call.wait => {
                of_export(export, &|job| copies(job) || matches!(job.stands, Waiting | Pending));
            }
            // The others can also be asked for by libvirt's numbers, without a look at the jobs.
            _ => {}
        }
    }

    fn answer(&mut self, request: &Request) -> Result<Reply, Refusal> {
        loop {
            let deed = match self.daemon {
                [] => Deed::Done,
                deeds => deeds[self.next % deeds.len()],
            };
            // The last deed of a round is an answer, so that this ends.
            self.next += 1;
            match deed {
                Deed::Event(phase, paused) => {
                    let job = job(0, phase, paused);
                    let path = vec![one_of(&STATUSES, phase / 10), job.stands];
                    let event = Event::Job { job: Box::new(job), path };
                    self.client.event(&event, Duration::from_micros(self.next as u64));
                    if !self.next.is_multiple_of(self.daemon.len()) {
                        continue;
                    }
                    return Ok(Reply::Done {});
                }
                Deed::Refuse => return Err(Refusal::new(Code::BlockCopyActive, "no")),
                Deed::Started if matches!(request, Request::Mirror(_)) => {
                    return Ok(Reply::Started(Started { job: "job0".into(), notes: Vec::new() }));
                }
                Deed::Jobs(count, phase) if matches!(request, Request::Jobs) => {
                    return Ok(Reply::Jobs((0..count % 4).map(|nth| job(nth, phase, count >= 128)).collect()));
                }
                Deed::Jobs(count, phase) if matches!(request, Request::Status(_)) => {
                    return Ok(Reply::All((0..count % 4).map(|nth| status(nth, phase, false)).collect()));
                }
                Deed::Done | Deed::Started | Deed::Jobs(..) => return Ok(Reply::Done {}),
            }
        }
    }
}

fn job(nth: u8, stands: u8, paused: bool) -> JobInfo {
    JobInfo {
        id: format!("job{nth}"),
        stands: one_of(&STATUSES, stands),
        completing: stands >= 128,
        complete: stands >= 64,
        io_status: IoStatus::Ok,
        auto_finalize: paused,
        auto_dismiss: stands.is_multiple_of(2),
        at: Box::new(status(nth, stands, paused)),
    }
}

fn status(nth: u8, phase: u8, paused: bool) -> Status {
    Status {
        export: format!("e{nth}"),
        phase: one_of(&PHASES, phase).into(),
        paused,
        job: Some(format!("job{nth}")),
        ..Status::default()
    }
}

/// One message of the client; `None` is one that is too long.
type Message<'a> = Option<&'a [u8]>;

/// The complete messages of `said`.
fn messages(said: &[u8]) -> Vec<Message<'_>> {
    let mut found = Vec::new();
    for line in said.split_inclusive(|byte| *byte == b'\n') {
        let (mut rest, ended) = line.strip_suffix(b"\n").map_or((line, false), |line| (line, true));
        while let Some(start) = rest.iter().position(|byte| !b" \t\r".contains(byte)) {
            rest = &rest[start..];
            let closed = if rest[0] == b'{' { closing(rest) } else { None };
            let len = closed.unwrap_or(rest.len());
            if len > MESSAGE_LEN_MAX {
                found.push(None);
            } else if ended || closed.is_some() {
                found.push(Some(&rest[..len]));
            }
            rest = &rest[len..];
        }
    }
    found
}

/// Length of the object that `bytes` begin with, its braces being all that is looked at.
fn closing(bytes: &[u8]) -> Option<usize> {
    let (mut open, mut at) = (0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                // To the quote that ends it; a backslash takes the next byte with it.
                at += 1;
                while *bytes.get(at)? != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' | b'[' => open += 1,
            b'}' | b']' => open -= 1,
            _ => {}
        }
        at += 1;
        if open == 0 {
            return Some(at);
        }
    }
    None
}

/// The greeting, then an answer to each message; events in between.
fn check(sent: &[u8], said: &[u8]) {
    let text = std::str::from_utf8(sent).expect("JSON is UTF-8");
    let lines: Vec<&str> = text.split("\r\n").collect();
    let (last, lines) = lines.split_last().expect("a greeting");
    assert!(last.is_empty(), "every line is whole");
    let mut lines = lines.iter().map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON"));
    assert!(lines.next().is_some_and(|greeting| greeting["QMP"]["version"].is_object()));
    let replies: Vec<Value> = lines.filter(|line| line.get("event").is_none_or(|name| !name.is_string())).collect();
    let messages = messages(said);
    assert_eq!(replies.len(), messages.len(), "one answer each");
    let mut negotiated = false;
    for (reply, message) in replies.iter().zip(messages) {
        let message = message.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
        let id = message.as_ref().and_then(|message| message.as_object()?.get("id"));
        assert_eq!(reply.get("id"), id.map(in_words).as_ref());
        let (done, error) = (reply.get("return").is_some(), reply.get("error"));
        assert!(done != error.is_some(), "one of the two");
        if let Some(error) = error {
            assert!(error["class"].is_string() && error["desc"].is_string() && error["code"].is_string());
        }
        let name = message.as_ref().and_then(|message| message["execute"].as_str());
        match name {
            Some("qmp_capabilities") => assert!(!(done && negotiated), "once"),
            Some(_) => assert!(negotiated || !done, "nothing is done before the capabilities"),
            None => assert!(!done, "no command, nothing done"),
        }
        match name {
            Some("query-commands" | "query-qmp-schema" | "query-jobs" | "query-block-jobs") if done => {
                assert!(reply["return"].is_array());
            }
            Some("query-version") if done => assert!(reply["return"]["qemu"].is_object()),
            Some(name) if done => assert!(COMMANDS.contains(&name), "{name} is a command"),
            _ => {}
        }
        negotiated |= done;
    }
}

/// A number may lose its last digit on its way through text.
fn in_words(value: &Value) -> Value {
    serde_json::from_str(&value.to_string()).expect("what was written can be read")
}
