//! Asks a running daemon, by QMP over its control socket. Waits; one question at a time.
use crate::failure::Failure;
use engine::control::{Code, MirrorMap, Status};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a daemon may take for what it only has to look up.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How long something may take to say that it is a daemon.
const GREETING_MAX: Duration = Duration::from_secs(10);

/// The longest line that a daemon may answer with.
const LINE_LEN_MAX: usize = 16 << 20;

/// A connection to a daemon.
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    received: Vec<u8>,
    /// How much of `received` has no line end in it.
    searched: usize,
}

/// What came of waiting for a line.
enum Line {
    Message(Value),
    TimeOut,
    HungUp,
}

#[derive(Deserialize)]
struct QmpError {
    desc: String,
    #[serde(default)]
    code: Option<Code>,
}

impl Client {
    /// Connects to the daemon whose control socket is at `path`.
    ///
    /// # Errors
    /// That nobody listens there and how to change it, or that it is no daemon's socket.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(path).map_err(|error| no_daemon(path, &error))?;
        let mut client = Self { path: path.into(), stream, received: Vec::new(), searched: 0 };
        match client.line(Some(GREETING_MAX))? {
            Line::Message(greeting) if greeting.get("QMP").is_some() => {}
            _ => {
                let what =
                    "not the control socket of a daemon: name the one that `blkmirror serve --control` was given";
                return Err(Failure::new(format!("{}: {what}", path.display())));
            }
        }
        client.call("qmp_capabilities", &json!({})).map(|_: Value| client)
    }

    /// Asks for something that is answered at once.
    ///
    /// # Errors
    /// The daemon's refusal, or that it does not answer.
    pub fn call<T: DeserializeOwned>(&mut self, command: &str, arguments: &impl Serialize) -> Result<T, Failure> {
        self.ask(command, arguments, Some(ANSWER_MAX))
    }

    /// Asks for something that is answered when it is done, however long that takes.
    ///
    /// # Errors
    /// The daemon's refusal, or that it hung up.
    pub fn call_and_wait<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: &impl Serialize,
    ) -> Result<T, Failure> {
        self.ask(command, arguments, None)
    }

    /// How one export stands.
    ///
    /// # Errors
    /// As for `call`.
    pub fn status(&mut self, export: &str) -> Result<Status, Failure> {
        self.call("blkmirror-status", &json!({ "export": export }))
    }

    /// How all exports stand.
    ///
    /// # Errors
    /// As for `call`.
    pub fn all(&mut self) -> Result<Vec<Status>, Failure> {
        self.call("blkmirror-status", &json!({}))
    }

    /// How the chunks of an export's job stand, in `cells` parts of the disk.
    ///
    /// # Errors
    /// As for `call`.
    pub fn map(&mut self, export: &str, cells: u64) -> Result<MirrorMap, Failure> {
        self.call("blkmirror-map", &json!({ "export": export, "cells": cells }))
    }

    /// Waits for something to happen, `wait_max` at most.
    ///
    /// # Errors
    /// That the daemon hung up.
    pub fn wait_for_event(&mut self, wait_max: Duration) -> Result<(), Failure> {
        match self.line(Some(wait_max))? {
            Line::Message(_) | Line::TimeOut => Ok(()),
            Line::HungUp => Err(self.hung_up()),
        }
    }

    /// Waits for the next event; `None` where the daemon has gone.
    ///
    /// # Errors
    /// The system's, of the socket.
    pub fn next_event(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            match self.line(None)? {
                Line::Message(message) if message.get("event").is_some() => return Ok(Some(message)),
                Line::Message(_) | Line::TimeOut => {}
                Line::HungUp => return Ok(None),
            }
        }
    }

    /// Waits until the daemon has gone, `wait_max` at most. False where it is still there.
    ///
    /// # Errors
    /// The system's, of the socket.
    pub fn wait_for_end(&mut self, wait_max: Duration) -> Result<bool, Failure> {
        let until = Instant::now() + wait_max;
        loop {
            match self.line(Some(until.saturating_duration_since(Instant::now())))? {
                Line::Message(_) => {}
                Line::TimeOut => return Ok(false),
                Line::HungUp => return Ok(true),
            }
        }
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: &impl Serialize,
        wait_max: Option<Duration>,
    ) -> Result<T, Failure> {
        let message = json!({ "execute": command, "arguments": arguments });
        self.stream.write_all(format!("{message}\n").as_bytes()).map_err(|error| self.lost(&error))?;
        let mut answer = self.answer(command, wait_max)?;
        if let Some(error) = answer.get_mut("error") {
            return Err(self.refusal(error.take()));
        }
        serde_json::from_value(answer["return"].take())
            .map_err(|error| Failure::new(format!("{}: answer to {command}: {error}", self.path.display())))
    }

    /// The next message that is no event.
    fn answer(&mut self, command: &str, wait_max: Option<Duration>) -> Result<Value, Failure> {
        let until = wait_max.map(|wait_max| Instant::now() + wait_max);
        loop {
            match self.line(until.map(|until| until.saturating_duration_since(Instant::now())))? {
                Line::Message(message) if message.get("event").is_some() => {}
                Line::Message(message) => return Ok(message),
                Line::HungUp => return Err(self.hung_up()),
                Line::TimeOut => {
                    let path = self.path.display();
                    let seconds = ANSWER_MAX.as_secs();
                    return Err(Failure::new(format!(
                        "{path}: the daemon has not answered {command} in {seconds} s: its log says what it does"
                    )));
                }
            }
        }
    }

    fn line(&mut self, wait_max: Option<Duration>) -> Result<Line, Failure> {
        let until = wait_max.map(|wait_max| Instant::now() + wait_max);
        loop {
            if let Some(line) = self.take_line() {
                let message = serde_json::from_slice(&line);
                return message.map(Line::Message).map_err(|error| {
                    Failure::new(format!("{}: what it says is no QMP: {error}", self.path.display()))
                });
            }
            if self.received.len() > LINE_LEN_MAX {
                let path = self.path.display();
                return Err(Failure::new(format!("{path}: a line is longer than {LINE_LEN_MAX} bytes")));
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Line::TimeOut);
            }
            match self.read(left) {
                Ok(0) => return Ok(Line::HungUp),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Line::HungUp),
                Err(error) => return Err(self.lost(&error)),
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end else {
            self.searched = self.received.len();
            return None;
        };
        let rest = self.received.split_off(self.searched + end + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.received, rest))
    }

    fn read(&mut self, wait_max: Option<Duration>) -> io::Result<usize> {
        self.stream.set_read_timeout(wait_max)?;
        let mut bytes = [0; 16 << 10];
        let len = self.stream.read(&mut bytes)?;
        self.received.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn refusal(&self, error: Value) -> Failure {
        match serde_json::from_value(error) {
            Ok(QmpError { desc, code }) => Failure::Refused { code, message: desc },
            Err(error) => Failure::new(format!("{}: an error that is no QMP: {error}", self.path.display())),
        }
    }

    fn hung_up(&self) -> Failure {
        Failure::new(format!("{}: the daemon hung up: its log says why", self.path.display()))
    }

    fn lost(&self, error: &io::Error) -> Failure {
        match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.hung_up(),
            _ => Failure::new(format!("{}: {error}", self.path.display())),
        }
    }
}

fn no_daemon(path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    Failure::new(match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            format!("no daemon listens at {path}: start one with `blkmirror serve --control {path} …`")
        }
        ErrorKind::PermissionDenied => format!("{path}: {error}: ask as the user who started the daemon"),
        _ => format!("{path}: {error}"),
    })
}
