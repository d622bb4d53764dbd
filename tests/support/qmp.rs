//! A QMP client: one question at a time, and what is heard meanwhile.
use super::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

/// A connection on which the capabilities are negotiated.
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that nobody has asked for yet.
    heard: Vec<Value>,
}

impl Qmp {
    /// Connects to the server at `socket`.
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let lines = BufReader::new(stream.try_clone().expect("one more descriptor"));
        let mut client = Self { stream, lines, heard: Vec::new() };
        let greeting = client.line();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        client.ok("qmp_capabilities", json!({}));
        client
    }

    /// Sends these bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("a server that reads");
    }

    /// Reads on, whatever comes, until `text` has come.
    #[track_caller]
    pub fn read_until(&mut self, text: &str) {
        let mut read = Vec::new();
        while !read.ends_with(text.as_bytes()) {
            let mut byte = [0];
            std::io::Read::read_exact(&mut self.lines, &mut byte).expect("a server that goes on");
            read.extend(byte);
        }
    }

    /// The next answer, whatever it answers.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.heard.push(line);
        }
    }

    /// What a command returns, or its error.
    #[track_caller]
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.send(format!("{}\n", json!({ "execute": command, "arguments": arguments })).as_bytes());
        let mut answer = self.answer();
        match answer.get_mut("error") {
            Some(error) => Err(error.take()),
            None => Ok(answer["return"].take()),
        }
    }

    /// What a command returns.
    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.ask(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// The error of a command that has to be refused.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> Value {
        match self.ask(command, arguments) {
            Ok(answer) => panic!("{command} is not refused: {answer}"),
            Err(error) => error,
        }
    }

    /// The first event from here on that `is` says it is; those before it are forgotten.
    #[track_caller]
    pub fn hear(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let event = if self.heard.is_empty() { self.line() } else { self.heard.remove(0) };
            if is(&event) {
                return event;
            }
            assert!(begun.elapsed() < PATIENCE, "{what} is not heard");
        }
    }

    /// The event of this name.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        self.hear(name, |event| event["event"] == name)
    }

    /// The job's change to this status.
    #[track_caller]
    pub fn status(&mut self, id: &str, status: &str) {
        self.hear(&format!("{id} {status}"), |event| {
            event["event"] == "JOB_STATUS_CHANGE" && event["data"] == json!({ "id": id, "status": status })
        });
    }

    /// True where the server has hung up: everything that it said is read and forgotten.
    pub fn is_dropped(&mut self) -> bool {
        let mut line = String::new();
        loop {
            line.clear();
            match self.lines.read_line(&mut line) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap_or_else(|error| panic!("nothing is heard: {error}"));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }
}
