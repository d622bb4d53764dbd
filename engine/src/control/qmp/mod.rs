//! One QMP client's session: bytes in, calls out; answers and events in, bytes out.
//!
//! ```text
//! receive ─► frame ─► command ─► next_call ─► (the daemon) ─► answer ─► render ─┐
//!                        └─ what needs no daemon ──────────────────────────────►├─► output
//!                                                          event ──► event ─────┘
//! ```
//!
//! It is pure and stepped: it opens nothing, waits for nothing and takes the time as an argument.
//! Commands are answered in the order in which they came, one at a time, as QMP has it; a client
//! that wants to watch while it waits uses a second connection. What one client can make the daemon
//! hold is bounded: a message by `MESSAGE_LEN_MAX`, messages that wait by `wants_input`, what was
//! not sent yet by `OUTPUT_LEN_MAX`.
mod answers;
mod arguments;
mod command;
mod event;
mod frame;
mod problem;
mod render;
mod schema;
mod shape;

#[cfg(test)]
mod tests;

pub use frame::MESSAGE_LEN_MAX;

use crate::control::{Event, Refusal, Reply, Request};
use answers::{VersionInfo, VersionTriple};
use command::{JobCommand, Message, Plan};
use frame::{Frame, Framer};
use problem::Problem;
use render::Render;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::Duration;

/// How many bytes may wait for a client that does not read before it is given up.
pub const OUTPUT_LEN_MAX: usize = 1 << 20;

/// A client that has this many bytes to read is asked for no more commands.
const OUTPUT_LEN_BUSY: usize = 64 << 10;

/// A client that has this many messages waiting is asked for no more.
const WAITING_COUNT_BUSY: usize = 8;

/// QEMU's version whose names of commands, arguments and events are spoken.
const SPOKEN: [u32; 3] = [10, 0, 0];

/// One thing for the daemon to do, and to answer with `Client::answer`.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// What to do.
    pub request: Request,
    /// True: answer when it is done. False: answer when it has begun, or was refused.
    pub wait: bool,
}

/// One client's session.
#[derive(Debug, Default)]
pub struct Client {
    framer: Framer,
    waiting: VecDeque<Frame>,
    is_negotiated: bool,
    current: Option<Current>,
    output: Vec<u8>,
    is_lost: bool,
}

/// The command that is being answered.
#[derive(Debug)]
struct Current {
    id: Option<Value>,
    /// What the daemon was not asked yet.
    call: Option<Call>,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// The next reply is the answer.
    Last(Render),
    /// The next reply says how the job stands.
    FindJob(JobCommand),
}

impl Client {
    /// A client that has just connected: the greeting waits to be sent.
    pub fn new() -> Self {
        let mut client = Self::default();
        client.put(&json!({ "QMP": { "version": version(), "capabilities": [] } }));
        client
    }

    /// Takes in bytes that the client sent. What they ask for comes from `next_call`.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.framer.push(bytes, |frame| self.waiting.push_back(frame));
    }

    /// The next thing for the daemon to do; `None` where the client asks for nothing more, the call
    /// before was not answered yet, or answers wait to be read. So ask after `receive`, `answer` and
    /// `sent`.
    pub fn next_call(&mut self) -> Option<Call> {
        while self.current.is_none() && !self.is_lost && self.output.len() < OUTPUT_LEN_BUSY {
            let frame = self.waiting.pop_front()?;
            self.begin(frame);
        }
        self.current.as_mut()?.call.take()
    }

    /// Answers the call that `next_call` gave last.
    ///
    /// # Panics
    /// Where no call waits for an answer: that is the daemon's own mistake.
    pub fn answer(&mut self, result: Result<Reply, Refusal>) {
        let current = self.current.take().expect("an answer follows a call");
        assert!(current.call.is_none(), "the call was given out before it is answered");
        match (result, current.step) {
            (Ok(reply), Step::Last(render)) => self.finish(current.id, Ok(render(&reply))),
            (Ok(reply), Step::FindJob(command)) => match render::find(&reply, &command.id) {
                Some(job) => match command.call(job) {
                    Ok(Some(call)) => self.ask(current.id, call, Step::Last(render::nothing)),
                    Ok(None) => self.finish(current.id, Ok(json!({}))),
                    Err(problem) => self.finish(current.id, Err(problem)),
                },
                None => self.finish(current.id, Err(Problem::no_job(&command.id, command.block))),
            },
            (Err(refusal), _) => self.finish(current.id, Err(refusal.into())),
        }
    }

    /// Tells the client what happened `now`, the time since the Unix epoch.
    pub fn event(&mut self, event: &Event, now: Duration) {
        // QMP knows no events before the capabilities are negotiated.
        if !self.is_negotiated {
            return;
        }
        event::messages(event, now).iter().for_each(|message| self.put(message));
    }

    /// What is to be sent. Bytes stay in place until `sent`; new ones come behind them.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The first `len` bytes of `output` went out.
    pub fn sent(&mut self, len: usize) {
        self.output.drain(..len.min(self.output.len()));
    }

    /// True where more bytes should be received. A client that sends commands and reads no answers,
    /// or sends them faster than they are answered, is left waiting.
    pub fn wants_input(&self) -> bool {
        !self.is_lost && self.output.len() < OUTPUT_LEN_BUSY && self.waiting.len() < WAITING_COUNT_BUSY
    }

    /// True where the client has left more than `OUTPUT_LEN_MAX` unread: close its connection.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// True while a call is with the daemon.
    pub fn is_answering(&self) -> bool {
        self.current.is_some()
    }

    fn begin(&mut self, frame: Frame) {
        let (id, plan) = match parse(frame) {
            Ok(mut message) => {
                let id = message.as_object_mut().and_then(|members| members.remove("id"));
                (id, self.plan(message))
            }
            Err(problem) => (None, Err(problem)),
        };
        match plan {
            Ok(Plan::Answer(value)) => self.finish(id, Ok(value)),
            Ok(Plan::Ask(call, render)) => self.ask(id, call, Step::Last(render)),
            Ok(Plan::OfJob(command)) => {
                let call = Call { request: Request::Jobs, wait: false };
                self.ask(id, call, Step::FindJob(command));
            }
            Err(problem) => self.finish(id, Err(problem)),
        }
    }

    fn plan(&mut self, message: Value) -> Result<Plan, Problem> {
        let Message { execute, arguments } = Message::parse(message)?;
        match (execute.as_str(), self.is_negotiated) {
            ("qmp_capabilities", false) => {
                command::no_capabilities(arguments)?;
                self.is_negotiated = true;
                Ok(Plan::Answer(json!({})))
            }
            ("qmp_capabilities", true) => {
                Err(Problem::no_command("Capabilities negotiation is already complete, command ignored"))
            }
            (_, false) => Err(Problem::no_command("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (name, true) => command::plan(name, arguments),
        }
    }

    fn ask(&mut self, id: Option<Value>, call: Call, step: Step) {
        self.current = Some(Current { id, call: Some(call), step });
    }

    fn finish(&mut self, id: Option<Value>, result: Result<Value, Problem>) {
        let mut reply = match result {
            Ok(value) => json!({ "return": value }),
            Err(problem) => json!({ "error": problem.to_json() }),
        };
        if let Some(id) = id {
            reply["id"] = id;
        }
        self.put(&reply);
    }

    fn put(&mut self, message: &Value) {
        if self.is_lost {
            return;
        }
        let line = message.to_string();
        if self.output.len() + line.len() + 2 > OUTPUT_LEN_MAX {
            self.is_lost = true;
            return;
        }
        self.output.extend_from_slice(line.as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }
}

fn parse(frame: Frame) -> Result<Value, Problem> {
    match frame {
        // The parser bounds how deep values nest.
        Frame::Message(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| Problem::invalid(format!("JSON parse error: {error}")))
        }
        Frame::TooLong => Err(Problem::invalid(format!("a message is longer than {MESSAGE_LEN_MAX} bytes"))),
    }
}

/// What `query-version` and the greeting say.
fn version() -> VersionInfo {
    let [major, minor, micro] = SPOKEN;
    let package = concat!("blkmirror ", env!("CARGO_PKG_VERSION")).to_owned();
    VersionInfo { qemu: VersionTriple { major, minor, micro }, package }
}
