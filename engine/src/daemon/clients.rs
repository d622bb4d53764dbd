//! The control socket's clients: bytes between their sockets and their QMP sessions.
use crate::control::qmp::{Call, Client};
use crate::control::{Event, Refusal, Reply};
use crate::io::{Buffer, Completion, File, Gather, Io, Op, Token, Until};
use std::time::Duration;

/// How much is taken from a client at a time, in bytes.
const RECEIVE_LEN: usize = 4096;
/// Local tokens.
const RECEIVE: u64 = 0;
const SEND: u64 = 1;

/// One client.
pub(super) struct Connection {
    socket: File,
    client: Client,
    receiving: bool,
    sending: bool,
    /// It hung up, or its socket failed.
    gone: bool,
}

impl Connection {
    pub fn new(socket: File) -> Self {
        Self { socket, client: Client::new(), receiving: false, sending: false, gone: false }
    }

    /// Starts what can be started. Never waits.
    pub fn step<I: Io>(&mut self, io: &mut I, base: Token) {
        if self.client.is_lost() {
            self.hang_up();
        }
        if self.gone {
            return;
        }
        if !self.sending && !self.client.output().is_empty() {
            let mut gather = Gather::default();
            gather.push_bytes(self.client.output());
            io.submit(Token(base.0 + SEND), Op::Send { socket: self.socket.clone(), gather });
            self.sending = true;
        }
        if !self.receiving && self.client.wants_input() {
            let buf = Buffer::alone(RECEIVE_LEN);
            io.submit(Token(base.0 + RECEIVE), Op::Receive { socket: self.socket.clone(), buf, until: Until::Later });
            self.receiving = true;
        }
    }

    /// Takes in what became of one of its operations; a step follows.
    pub fn complete(&mut self, base: Token, done: Completion) {
        match (done.token.0 - base.0, done.op, done.result) {
            (RECEIVE, Op::Receive { buf, .. }, Ok(count)) if count > 0 => {
                self.receiving = false;
                self.client.receive(&buf[..count as usize]);
            }
            (RECEIVE, ..) => {
                self.receiving = false;
                self.hang_up();
            }
            (_, _, Ok(count)) => {
                self.sending = false;
                self.client.sent(count as usize);
            }
            (_, _, Err(_)) => {
                self.sending = false;
                self.hang_up();
            }
        }
    }

    /// The client is at its other end.
    pub fn socket(&self) -> &File {
        &self.socket
    }

    pub fn next_call(&mut self) -> Option<Call> {
        if self.gone { None } else { self.client.next_call() }
    }

    pub fn answer(&mut self, result: Result<Reply, Refusal>) {
        self.client.answer(result);
    }

    pub fn event(&mut self, event: &Event, now: Duration) {
        self.client.event(event, now);
    }

    pub fn hang_up(&mut self) {
        self.gone = true;
        self.socket.shut_down();
    }

    /// True where nothing of it is under way and nobody will hear of it any more.
    pub fn is_over(&self) -> bool {
        self.gone && !self.receiving && !self.sending
    }

    /// True where everything that was said has been sent.
    pub fn is_quiet(&self) -> bool {
        self.gone || (!self.sending && self.client.output().is_empty())
    }
}
