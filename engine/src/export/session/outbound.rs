//! What a client is sent: every reply that is ready goes with the next send, one send at a time.
//!
//! A reply counts, with the memory it holds, until it is sent. So a client that asks and does not
//! listen soon cannot ask any more.
//!
//! Inside TLS a send is encrypted piece by piece, each when the one before it has gone.
use super::Load;
use crate::io::{Buffer, File, Gather, Io, Op, Token};
use crate::tls::Tls;
use std::io;

/// Bytes that a Unix socket holds by itself for a client that has not taken them yet.
const HOLDS: usize = 208 << 10;
/// How much it is asked to hold at most.
const HOLDS_MAX: usize = 2 << 20;

/// The sending half of a connection.
pub(super) struct Outbound {
    socket: File,
    /// What waits for the next send.
    waiting: Gather,
    waiting_load: Load,
    /// Memory of the last send, to be used again.
    spare: Gather,
    sending: Option<Load>,
    /// How much the socket holds: two replies, the one that the client takes and the next. Less makes long replies
    /// slow; with more, a client that takes all that is there before it asks again leaves the disk idle meanwhile.
    holds: usize,
    /// The client cannot be reached any more.
    broken: bool,
}

impl Outbound {
    /// Of `socket`.
    pub fn new(socket: File) -> Self {
        Self {
            socket,
            waiting: Gather::default(),
            waiting_load: Load::default(),
            spare: Gather::default(),
            sending: None,
            holds: HOLDS,
            broken: false,
        }
    }

    /// Adds bytes, which are copied.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.waiting.push_bytes(bytes);
    }

    /// Adds a buffer, which is not.
    pub fn buffer(&mut self, buffer: Buffer) {
        let wanted = (2 * buffer.len()).min(HOLDS_MAX);
        if wanted > self.holds {
            self.holds = wanted;
            self.socket.hold_to_send(wanted);
        }
        self.waiting.push_buffer(buffer);
    }

    /// A reply is complete; its request's load is given up when it is sent.
    pub fn ends_reply(&mut self, load: Load) {
        self.waiting_load.add(load);
    }

    /// True where nothing waits and nothing is being sent.
    pub fn is_idle(&self) -> bool {
        self.sending.is_none() && (self.broken || self.waiting.is_empty())
    }

    /// True where the client cannot be reached any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Sends what waits, unless a send is under way. Gives back the load of what is gone already, or never will be
    /// sent: there is room for more then.
    pub fn submit(&mut self, io: &mut impl Io, token: Token, tls: Option<&mut Tls>) -> Option<Load> {
        if self.broken {
            let nothing = self.waiting.is_empty();
            self.waiting.clear();
            let load = std::mem::take(&mut self.waiting_load);
            return (!nothing).then_some(load);
        }
        let has_to_say = tls.as_ref().is_some_and(|tls| tls.has_to_say());
        if self.sending.is_some() || (self.waiting.is_empty() && !has_to_say) {
            return None;
        }
        let gather = std::mem::replace(&mut self.waiting, std::mem::take(&mut self.spare));
        self.sending = Some(std::mem::take(&mut self.waiting_load));
        match tls {
            None => self.send(io, token, None, gather),
            Some(tls) => {
                let gather = tls.encrypt(gather);
                self.send(io, token, Some(tls), gather)
            }
        }
    }

    /// Takes in what became of a send. Gives back the load of the replies that are gone.
    pub fn complete(
        &mut self,
        io: &mut impl Io,
        token: Token,
        tls: Option<&mut Tls>,
        op: Op,
        result: io::Result<u32>,
    ) -> Option<Load> {
        let Op::Send { mut gather, .. } = op else { unreachable!("a send was submitted") };
        match result {
            Ok(count) if count > 0 => {
                gather.advance(count as usize);
                self.send(io, token, tls, gather)
            }
            _ => {
                self.broken = true;
                self.end(gather)
            }
        }
    }

    /// Sends `gather` and, inside TLS, what follows it: what the socket takes at once, and the rest when it does.
    fn send(&mut self, io: &mut impl Io, token: Token, mut tls: Option<&mut Tls>, mut gather: Gather) -> Option<Load> {
        loop {
            if !gather.is_empty() {
                gather.advance(io.send_at_once(&self.socket, &gather));
            }
            if !gather.is_empty() {
                io.submit(token, Op::Send { socket: self.socket.clone(), gather });
                return None;
            }
            match tls.as_mut().filter(|tls| tls.has_to_say()) {
                None => return self.end(gather),
                Some(tls) => {
                    gather.clear();
                    gather = tls.encrypt_more(gather);
                }
            }
        }
    }

    fn end(&mut self, mut gather: Gather) -> Option<Load> {
        gather.clear();
        self.spare = gather;
        self.sending.take()
    }
}
