//! One connection that waits for each answer: for opening, for metadata, and for servers that take only one.
use super::super::Gather;
use super::inside::Inside;
use super::{ANSWER_TIME_MAX, CONNECT_TIME_MAX, PIECE_LEN, ended, late, lost, refused};
use crate::tls::ClientCredentials;
use formats::error::{Context, Error, Result};
use formats::nbd::Address;
use formats::nbd::client::{Ask, Event, Negotiation, Next, Replies, Session};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, set_tcp_nodelay};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType};
use rustix::net::{connect, recv, send, socket_with};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// A connection in its transmission phase.
#[derive(Debug)]
pub(super) struct Blocking {
    line: Line,
    replies: Replies,
    /// Why it is of no use any more.
    lost: Option<String>,
}

/// A socket, in plain or inside TLS, and what came by it and was not looked at yet.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    inside: Option<Inside>,
    /// What waits until TLS lets it out.
    outbound: Gather,
    received: Vec<u8>,
    start: usize,
    end: usize,
}

/// Why nothing more comes by a line.
enum Why {
    /// Nothing came for too long.
    Late,
    Ended(io::Error),
    /// TLS says so.
    Tls(String),
}

impl From<Why> for String {
    fn from(why: Why) -> Self {
        match why {
            Why::Late => late(),
            Why::Ended(error) => ended(error),
            Why::Tls(why) => why,
        }
    }
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

/// Says that no request follows, and ends TLS, if that can be said at once.
pub(super) fn say_goodbye(socket: impl AsFd, inside: Option<&mut Inside>) {
    let mut bytes = Vec::new();
    Replies::goodbye(&mut bytes);
    say_at_once(socket, &bytes, inside);
}

/// Says `words` and TLS' own last ones, if that can be done at once. Who does not hear them sees the end of the
/// connection.
pub(super) fn say_at_once(socket: impl AsFd, words: &[u8], inside: Option<&mut Inside>) {
    let encrypted = inside.map(|inside| inside.last_words(words));
    let pieces = encrypted.as_ref().map_or_else(|| vec![words], |gather| gather.slices().collect());
    for piece in pieces {
        let _ = send(&socket, piece, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

impl Blocking {
    /// Reaches the server at `peer` and agrees with it on what is at `address`, inside TLS where that says so.
    pub fn connect(
        peer: &SocketAddrAny,
        address: &Address,
        credentials: Option<&Arc<ClientCredentials>>,
    ) -> Result<(Self, Session)> {
        let socket = reach(peer).context(|| "connecting to the server")?;
        let received = vec![0; PIECE_LEN];
        let mut line = Line { socket, inside: None, outbound: Gather::default(), received, start: 0, end: 0 };
        let session = negotiate(&mut line, address, credentials)?;
        let replies = Replies::new(session.clone());
        Ok((Self { line, replies, lost: None }, session))
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
        self.line.send(&request, payload)?;
        loop {
            let mut input = self.line.rest();
            let before = input.len();
            let event = self.replies.step(&mut input).map_err(|error| error.one_line());
            let taken = before - input.len();
            match event? {
                Some(Event::Done { outcome, .. }) => {
                    self.line.start += taken;
                    return Ok(outcome.map_err(|failure| refused(&failure)));
                }
                Some(event) => take(event),
                None if begun.elapsed() > ANSWER_TIME_MAX => return Err(late()),
                None => {
                    self.line.receive()?;
                    continue;
                }
            }
            self.line.start += taken;
        }
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        if self.lost.is_none() {
            say_goodbye(&self.line.socket, self.line.inside.as_mut());
        }
    }
}

impl Line {
    /// What comes next is TLS, and so is what is said.
    fn start_tls(&mut self, credentials: &Arc<ClientCredentials>) -> Result<()> {
        self.inside = Some(Inside::new(credentials).map_err(Error::invalid)?);
        (self.start, self.end) = (0, 0);
        Ok(())
    }

    fn rest(&self) -> &[u8] {
        let bytes = self.inside.as_ref().map_or(&self.received[..], Inside::decrypted);
        &bytes[self.start..self.end]
    }

    /// Waits for more; inside TLS it may be nothing. What was there is used up.
    fn receive(&mut self) -> std::result::Result<(), Why> {
        (self.start, self.end) = (0, 0);
        let count = loop {
            match recv(&self.socket, &mut self.received[..], RecvFlags::empty()) {
                Ok((_, 0)) => return Err(Why::Ended(io::ErrorKind::UnexpectedEof.into())),
                Ok((_, count)) => break count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Why::Late),
                Err(error) => return Err(Why::Ended(error.into())),
            }
        };
        let Some(inside) = &mut self.inside else {
            self.end = count;
            return Ok(());
        };
        self.end = inside.decrypt(&self.received[..count]).map_err(|why| {
            // The server is told by an alert, and nothing else.
            say_at_once(&self.socket, &[], Some(inside));
            Why::Tls(why)
        })?;
        if self.end == 0 && inside.has_ended() {
            return Err(Why::Ended(io::ErrorKind::UnexpectedEof.into()));
        }
        self.send_encrypted()
    }

    /// Sends `bytes` and then `payload`; inside TLS, as soon as that lets them out.
    fn send(&mut self, bytes: &[u8], payload: &[u8]) -> std::result::Result<(), Why> {
        if self.inside.is_none() {
            return [bytes, payload].iter().try_for_each(|bytes| send_all(&self.socket, bytes));
        }
        self.outbound.push_bytes(bytes);
        self.outbound.push_bytes(payload);
        self.send_encrypted()
    }

    fn send_encrypted(&mut self) -> std::result::Result<(), Why> {
        let Some(inside) = &mut self.inside else { return Ok(()) };
        while let Some(gather) = inside.encrypt(&mut self.outbound) {
            gather.slices().try_for_each(|piece| send_all(&self.socket, piece))?;
            inside.sent(gather);
        }
        Ok(())
    }
}

fn negotiate(line: &mut Line, address: &Address, credentials: Option<&Arc<ClientCredentials>>) -> Result<Session> {
    let begun = Instant::now();
    let mut negotiation = Negotiation::new(address);
    loop {
        line.receive().map_err(|why| match (why, &line.inside) {
            (Why::Late, _) => Error::invalid(never_heard()),
            (Why::Tls(why), _) => Error::invalid(why),
            (Why::Ended(_), Some(inside)) if !inside.has_heard() => Error::invalid(inside.hung_up()),
            (Why::Ended(_), _) => negotiation.hung_up(),
        })?;
        let (mut input, mut out) = (line.rest(), Vec::new());
        let outcome = negotiation.step(&mut input, &mut out)?;
        line.start = line.end - input.len();
        match outcome {
            Next::Session(session) => {
                assert_eq!(line.inside.is_some(), address.tls.is_some(), "never in plain where TLS was asked for");
                return Ok(session);
            }
            Next::StartTls => {
                line.start_tls(credentials.expect("an address inside TLS has credentials"))?;
                negotiation.inside_tls(&mut out);
            }
            Next::More => {}
        }
        if begun.elapsed() > ANSWER_TIME_MAX {
            return Err(Error::invalid(never_heard()));
        }
        line.send(&out, &[]).map_err(|why| Error::invalid(String::from(why)))?;
    }
}

fn send_all(socket: &OwnedFd, mut bytes: &[u8]) -> std::result::Result<(), Why> {
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(Why::Late),
            // What the server said before it went is still to be heard: the other direction tells how it ends.
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(error) => return Err(Why::Ended(error.into())),
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
