//! One connection that waits for each answer: for opening, for metadata, and for servers that take only one.
use super::{ANSWER_TIME_MAX, CONNECT_TIME_MAX, ended, late, lost, refused};
use formats::error::{Context, Error, Result};
use formats::nbd::client::{Ask, Event, Negotiation, Replies, Session};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, set_tcp_nodelay};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType};
use rustix::net::{connect, recv, send, socket_with};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// How much is received at a time, in bytes.
const PIECE_LEN: usize = 256 << 10;

/// A connection in its transmission phase.
#[derive(Debug)]
pub(super) struct Blocking {
    socket: OwnedFd,
    replies: Replies,
    inbound: Inbound,
    /// Why it is of no use any more.
    lost: Option<String>,
}

/// What came and was not looked at yet.
#[derive(Debug)]
struct Inbound {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// A socket for `peer`, not connected yet.
pub(super) fn socket_for(peer: &SocketAddrAny) -> io::Result<OwnedFd> {
    let socket = socket_with(peer.address_family(), SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if peer.address_family() != AddressFamily::UNIX {
        set_tcp_nodelay(&socket, true)?;
    }
    Ok(socket)
}

fn reach(peer: &SocketAddrAny) -> io::Result<OwnedFd> {
    let socket = socket_for(peer)?;
    // Of a socket that is connecting, it is the time to send that counts.
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIME_MAX))?;
    connect(&socket, peer).map_err(unreached)?;
    for side in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, side, Some(ANSWER_TIME_MAX))?;
    }
    Ok(socket)
}

/// Says that no request follows, if that can be said at once.
pub(super) fn say_goodbye(socket: impl AsFd) {
    let mut bytes = Vec::new();
    Replies::goodbye(&mut bytes);
    // A server that does not hear it sees the end of the connection.
    let _ = send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

impl Blocking {
    /// Reaches the server at `peer` and agrees with it on `export`.
    pub fn connect(peer: &SocketAddrAny, export: &str) -> Result<(Self, Session)> {
        let socket = reach(peer).context(|| "connecting to the server")?;
        let mut inbound = Inbound { bytes: vec![0; PIECE_LEN], start: 0, end: 0 };
        let session = negotiate(&socket, export, &mut inbound)?;
        let replies = Replies::new(session.clone());
        Ok((Self { socket, replies, inbound, lost: None }, session))
    }

    /// True where it is of no use any more.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Asks, with the bytes of a write, and gives `take` what comes until all is said.
    pub fn exchange(&mut self, ask: Ask, payload: &[u8], take: impl FnMut(Event<'_>)) -> io::Result<()> {
        if let Some(why) = &self.lost {
            return Err(lost(why));
        }
        match self.try_exchange(ask, payload, take) {
            Ok(outcome) => outcome,
            Err(why) => {
                let error = lost(&why);
                self.lost = Some(why);
                Err(error)
            }
        }
    }

    /// The outer error is the connection's end.
    fn try_exchange(
        &mut self,
        ask: Ask,
        payload: &[u8],
        mut take: impl FnMut(Event<'_>),
    ) -> std::result::Result<io::Result<()>, String> {
        let begun = Instant::now();
        let mut request = Vec::new();
        self.replies.ask(ask, &mut request);
        send_all(&self.socket, &request)?;
        send_all(&self.socket, payload)?;
        loop {
            let mut input = self.inbound.rest();
            let before = input.len();
            let event = self.replies.step(&mut input).map_err(|error| error.one_line());
            let taken = before - input.len();
            match event? {
                Some(Event::Done { outcome, .. }) => {
                    self.inbound.start += taken;
                    return Ok(outcome.map_err(|failure| refused(&failure)));
                }
                Some(event) => take(event),
                None if begun.elapsed() > ANSWER_TIME_MAX => return Err(late()),
                None => {
                    self.inbound.receive(&self.socket)?;
                    continue;
                }
            }
            self.inbound.start += taken;
        }
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        if self.lost.is_none() {
            say_goodbye(&self.socket);
        }
    }
}

impl Inbound {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Waits for more. What was there is used up.
    fn receive(&mut self, socket: &OwnedFd) -> std::result::Result<(), String> {
        (self.start, self.end) = (0, 0);
        loop {
            match recv(socket, &mut self.bytes[..], RecvFlags::empty()) {
                Ok((_, 0)) => return Err(ended(io::ErrorKind::UnexpectedEof.into())),
                Ok((_, count)) => {
                    self.end = count;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(late()),
                Err(error) => return Err(ended(error.into())),
            }
        }
    }
}

fn negotiate(socket: &OwnedFd, export: &str, inbound: &mut Inbound) -> Result<Session> {
    let begun = Instant::now();
    let mut negotiation = Negotiation::new(export);
    loop {
        if inbound.receive(socket).is_err() {
            let in_time = begun.elapsed() < ANSWER_TIME_MAX;
            return Err(if in_time { negotiation.hung_up() } else { Error::invalid(never_heard()) });
        }
        let mut input = &inbound.bytes[..inbound.end];
        let mut out = Vec::new();
        let session = negotiation.step(&mut input, &mut out)?;
        inbound.start = inbound.end - input.len();
        if let Some(session) = session {
            return Ok(session);
        }
        if begun.elapsed() > ANSWER_TIME_MAX {
            return Err(Error::invalid(never_heard()));
        }
        send_all(socket, &out).map_err(Error::invalid)?;
    }
}

fn send_all(socket: &OwnedFd, mut bytes: &[u8]) -> std::result::Result<(), String> {
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(late()),
            Err(error) => return Err(ended(error.into())),
        }
    }
    Ok(())
}

fn never_heard() -> String {
    format!("{}: the server may take one client at a time, and have one", late())
}

/// A Unix socket whose queue is full says "again", TCP "in progress".
fn unreached(error: Errno) -> io::Error {
    match error {
        Errno::AGAIN | Errno::INPROGRESS => {
            let why = format!("not reached within {} s", CONNECT_TIME_MAX.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, why)
        }
        error => error.into(),
    }
}
