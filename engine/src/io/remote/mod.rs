//! Exports of NBD servers as files: bytes at offsets, and where the holes are.
//!
//! ```text
//! formats: map ─► Storage: read_at, next_data, next_hole ──► Blocking: one connection, behind a lock
//! engine:  Op::Read, Write, Zero, Flush of a File ─► Remotes: one connection a thread and export, stepped in its ring
//! ```
//!
//! Whoever submits an `Op` does not know that its file is remote: `Remotes` wraps a thread's queue and carries
//! out what belongs to an export. A server that does not promise several connections (CAN_MULTI_CONN) may take
//! only one, as `qemu-nbd` does: there everything goes by the lock, one request at a time, and waits.
//!
//! A server has `CONNECT_TIME_MAX` to be reached and may be silent for `ANSWER_TIME_MAX` when it owes an answer; for
//! one of many it may take `REQUEST_TIME_MAX`. What takes longer, hangs up or breaks the protocol is lost. Of an
//! export that is read, everything under way on that connection fails, and what follows too. One that is written is
//! *kept*: its connections are made again, with rests between, for `RECONNECT_TIME_MAX` after the last answer; its
//! size and its abilities have to be what they were.
//!
//! A flush is sent on one connection and counts for all, where the server promises that (CAN_MULTI_CONN) or has
//! only that one. What a server may have lost when it went away is told by `Remote::take_doubtful`; see
//! `unflushed`. A mirror copies it once more. A guest that is served from here is told nothing: for it, as with
//! QEMU's client, a server that crashes and comes back is a disk that lost its cache.
//!
//! An address inside TLS (`nbds:`) is reached inside TLS or not at all, each connection by itself; see `inside`.
//!
//! Of an export that is written nobody knows where its holes are: block status is asked once, whether the whole
//! of it reads as zeroes, before the first write.
mod blocking;
mod connection;
mod held;
mod inside;
mod known;
mod limits;
mod queue;
mod request;
mod unflushed;

pub use queue::Remotes;

use super::Completion;
use crate::tls::ClientCredentials;
use blocking::Blocking;
use formats::error::{Context, Error, Result};
use formats::nbd::client::{Ask, Event, Failure, Session};
use formats::nbd::wire::state;
use formats::nbd::wire::transmission_flag::SEND_FLUSH;
use formats::nbd::{Address, Server};
use formats::range::ByteRange;
use formats::storage::Storage;
use known::Known;
use request::Request;
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketAddrUnix};
use std::io;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use unflushed::Unflushed;

/// How much is received at a time, in bytes.
const PIECE_LEN: usize = 256 << 10;
/// How long reaching a server may take, each of its addresses.
pub const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a server may take for an answer, and for the negotiation.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a request may take while its server answers others.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(300);
/// How long it may take where somebody waits who must not wait for long.
const HURRIED_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a server that is written to may be out of reach before requests fail.
pub const RECONNECT_TIME_MAX: Duration = Duration::from_secs(60);
/// The same where somebody has to hear of it soon, and tries again by itself.
const RECONNECT_TIME_SHORT: Duration = Duration::from_secs(5);
/// Longest request, in bytes; a power of two.
const REQUEST_LEN_MAX: u64 = 1 << 20;
/// Longest request for zeroes, which moves none: a server that writes them needs its time.
const ZERO_LEN_MAX: u64 = 32 << 20;
/// Of how much of the disk the extents are asked at a time, in bytes.
const STATUS_LEN: u64 = 1 << 30;

/// An export that is open.
#[derive(Debug)]
pub struct Remote {
    address: Address,
    /// Where its server was reached.
    peer: SocketAddrAny,
    /// For an address inside TLS, and for no other.
    credentials: Option<Arc<ClientCredentials>>,
    session: Session,
    writable: bool,
    /// Whether it read as zeroes when it was opened, where that was asked.
    zero: OnceLock<bool>,
    metadata: Mutex<Metadata>,
    unflushed: Mutex<Unflushed>,
    hurried: AtomicBool,
    fails_soon: AtomicBool,
    /// Counts what has to be known the order of: connections that were made, and first writes.
    clock: AtomicU64,
    /// How many of those that hold it are connections to it.
    connections: AtomicUsize,
}

/// What is behind the lock.
#[derive(Debug)]
struct Metadata {
    connection: Blocking,
    known: Known,
    /// When the connection was made, by the export's clock.
    established: u64,
}

impl Remote {
    /// Reaches the server and agrees with it. Waits: for opening. What is to be written is refused where its server
    /// does not take that. `certificates` is the folder for TLS where the address names none.
    pub fn open(address: &Address, writable: bool, certificates: Option<&Path>) -> Result<Arc<Self>> {
        let remote = Self::reach(address, writable, certificates).and_then(|remote| match writable {
            true => remote.refuse_writing().map(|()| remote),
            false => Ok(remote),
        });
        remote.map(Arc::new).map_err(|error| error.at(address))
    }

    fn reach(address: &Address, writable: bool, certificates: Option<&Path>) -> Result<Self> {
        let credentials = credentials(address, certificates)?.map(Arc::new);
        let mut failed = Error::invalid("the host has no address");
        for peer in peers(&address.server).context(|| "looking the server up")? {
            match Blocking::connect(&peer, address, credentials.as_ref()) {
                Ok((connection, session)) => {
                    let metadata = Mutex::new(Metadata { connection, known: Known::default(), established: 0 });
                    let unflushed = Mutex::new(Unflushed::new(session.size));
                    let (hurried, clock) = (AtomicBool::new(false), AtomicU64::new(0));
                    let fails_soon = AtomicBool::new(false);
                    let address = address.clone();
                    let connections = AtomicUsize::new(0);
                    return Ok(Self {
                        address,
                        peer,
                        credentials,
                        session,
                        writable,
                        zero: OnceLock::new(),
                        metadata,
                        unflushed,
                        hurried,
                        fails_soon,
                        clock,
                        connections,
                    });
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.session.size
    }

    /// Whether all of it is known to read as zeroes; not, where its server takes long to say so. Asked once, before
    /// anything is written. Waits: for opening.
    pub fn is_zero(&self) -> io::Result<bool> {
        match self.zero.get() {
            Some(zero) => Ok(*zero),
            None => self.look_for_data().map(|zero| *self.zero.get_or_init(|| zero)),
        }
    }

    fn look_for_data(&self) -> io::Result<bool> {
        if self.session.base_allocation.is_none() {
            return Ok(false);
        }
        let (begun, mut at, mut zero) = (Instant::now(), 0, true);
        while zero && at < self.session.size {
            if begun.elapsed() > ANSWER_TIME_MAX {
                return Ok(false);
            }
            let asked = ByteRange { start: at, end: self.session.size.min(at + STATUS_LEN) };
            let mut end = at;
            self.metadata().connection.exchange(Ask::BlockStatus(asked), &[], |event| {
                if let Event::Extent { range, state: found, .. } = event {
                    zero &= found & state::ZERO != 0;
                    end = range.end;
                }
            })?;
            at = end;
        }
        Ok(zero)
    }

    /// What its server may have lost since this was asked last: answered, and flushed too late to be sure of it.
    pub fn take_doubtful(&self) -> Vec<ByteRange> {
        self.unflushed().take_doubtful()
    }

    /// Makes everything durable that was answered before. Waits: for starting and stopping.
    pub fn flush_now(&self) -> io::Result<()> {
        if !self.writable || !self.session.has(SEND_FLUSH) {
            return Ok(());
        }
        let marks = self.unflushed().begin_flush();
        let flushed = self.exchange_again(Ask::Flush, &[], |_| {});
        self.unflushed().end_flush(marks, flushed.as_ref().ok().copied());
        flushed.map(|_| ())
    }

    /// By the connection that waits.
    fn carry_out(&self, mut request: Request) -> Completion {
        loop {
            let ask = request.ask(self, Duration::ZERO);
            let here = request.piece;
            let asked = match ask {
                Ask::Read(_) => self.exchange_again(ask, &[], |event| place(&event, here, request.place())),
                _ => self.exchange_again(ask, request.payload(), |_| {}),
            };
            match asked {
                Ok(established) if !request.advance(self, established) => {}
                asked => return request.end(self, asked.map(|_| ())),
            }
        }
    }

    /// Asks by the connection that waits; where that was lost, and the export is kept, by another one. The answer
    /// is when the connection was made.
    fn exchange_again(&self, ask: Ask, payload: &[u8], mut take: impl FnMut(Event<'_>)) -> io::Result<u64> {
        let mut metadata = self.metadata();
        let asked = metadata.connection.exchange(ask, payload, &mut take);
        if asked.is_ok() || !self.is_kept() || !metadata.connection.is_lost() {
            return asked.map(|()| metadata.established);
        }
        let (connection, session) = Blocking::connect(&self.peer, &self.address, self.credentials.as_ref())
            .map_err(|error| lost(&error.one_line()))?;
        if session != self.session {
            return Err(lost("the export is not what it was when it was opened"));
        }
        metadata.connection = connection;
        metadata.established = self.tick();
        metadata.connection.exchange(ask, payload, take)?;
        Ok(metadata.established)
    }

    /// True where a lost connection is made again.
    fn is_kept(&self) -> bool {
        self.writable
    }

    /// Somebody waits who must not wait for long.
    pub fn hurry(&self, on: bool) {
        self.hurried.store(on, Ordering::SeqCst);
    }

    /// Whoever asks tries again by itself, and has to hear soon that it is out of reach.
    pub fn fail_soon(&self, on: bool) {
        self.fails_soon.store(on, Ordering::SeqCst);
    }

    /// How long it may be out of reach before requests fail.
    fn reconnect_time_max(&self) -> Duration {
        match (self.hurried.load(Ordering::SeqCst), self.fails_soon.load(Ordering::SeqCst)) {
            (true, _) => Duration::ZERO,
            (false, true) => RECONNECT_TIME_SHORT,
            (false, false) => RECONNECT_TIME_MAX,
        }
    }

    /// How long a request may take while its server answers others.
    fn request_time_max(&self) -> Duration {
        if self.hurried.load(Ordering::SeqCst) { HURRIED_TIME_MAX } else { REQUEST_TIME_MAX }
    }

    /// How long its server may be silent that owes an answer.
    fn answer_time_max(&self) -> Duration {
        if self.hurried.load(Ordering::SeqCst) { HURRIED_TIME_MAX } else { ANSWER_TIME_MAX }
    }

    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next moment of its clock.
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Fills `bytes` from `at`; how many came is less where the disk ends. Waits.
    fn read_now(&self, at: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let wanted = self.on_disk(at, bytes.len());
        let mut metadata = self.metadata();
        let mut done = wanted.start;
        while done < wanted.end {
            let piece = self.piece(ByteRange { start: done, end: wanted.end });
            let here = ByteRange { start: done, end: piece.end.min(wanted.end) };
            let into = &mut bytes[(done - at) as usize..][..here.len() as usize];
            metadata.connection.exchange(Ask::Read(piece), &[], |event| place(&event, here, into))?;
            done = here.end;
        }
        Ok(wanted.len() as usize)
    }

    /// Whether the bytes at `at` are known to be zeroes, and up to where that goes on at least.
    fn status(&self, at: u64) -> io::Result<(bool, u64)> {
        if self.writable || self.session.base_allocation.is_none() {
            return Ok((false, self.session.size));
        }
        let mut metadata = self.metadata();
        if let Some(found) = metadata.known.find(at) {
            return Ok(found);
        }
        let minimum = u64::from(self.session.block_sizes.minimum);
        let start = at - at % minimum;
        let asked = ByteRange { start, end: self.session.size.min(start.saturating_add(STATUS_LEN)) };
        let Metadata { connection, known, .. } = &mut *metadata;
        known.forget_oldest(start);
        connection.exchange(Ask::BlockStatus(asked), &[], |event| known.add(&event))?;
        // An answer begins at what was asked: at `at`, or less than a block before.
        known.find(at).ok_or_else(|| io::Error::other("the server tells nothing of the bytes that it was asked of"))
    }

    fn metadata(&self) -> MutexGuard<'_, Metadata> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As its server shows it. One that is read is thought not to change while it is open.
impl Storage for Remote {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self.read_now(at, bytes)? == bytes.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.session.size)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        if at >= self.session.size {
            return Ok(None);
        }
        let (zero, end) = self.status(at)?;
        Ok(if zero { Some(end).filter(|end| *end < self.session.size) } else { Some(at) })
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        if at >= self.session.size {
            return Ok(self.session.size);
        }
        let (zero, end) = self.status(at)?;
        Ok(if zero { at } else { end })
    }
}

/// What is needed inside TLS, where the address says so. The server's certificate has to be for the name that the
/// address gives, else for the host; a socket's path is nobody's name.
fn credentials(address: &Address, certificates: Option<&Path>) -> Result<Option<ClientCredentials>> {
    let Some(names) = &address.tls else { return Ok(None) };
    let folder = names.certificates.as_deref().map(Path::new).or(certificates).ok_or_else(|| {
        Error::invalid(
            "TLS needs a folder of certificates: name one by tls-certificates=DIR in the address, or by \
             --tls-client-certificates",
        )
    })?;
    let server = match (&names.hostname, &address.server) {
        (Some(name), _) => name,
        (None, Server::Tcp { host, .. }) => host,
        (None, Server::Unix { .. }) => {
            return Err(Error::invalid(
                "a socket has no host's name to verify its server by: name whom the server's certificate is for, by \
                 tls-hostname=NAME",
            ));
        }
    };
    ClientCredentials::open(folder, server).map(Some)
}

fn peers(server: &Server) -> io::Result<Vec<SocketAddrAny>> {
    Ok(match server {
        Server::Tcp { host, port } => (host.as_str(), *port).to_socket_addrs()?.map(SocketAddrAny::from).collect(),
        Server::Unix { path } => vec![SocketAddrUnix::new(path.as_str())?.into()],
    })
}

/// Puts what `event` brings of the bytes `here` into `into`, which are their place.
fn place(event: &Event<'_>, here: ByteRange, into: &mut [u8]) {
    let came = match event {
        Event::Data { at, bytes, .. } => ByteRange { start: *at, end: at + bytes.len() as u64 },
        Event::Zero { range, .. } => *range,
        Event::Extent { .. } | Event::Done { .. } => return,
    };
    let both = came.intersect(here);
    if both.is_empty() {
        return;
    }
    let into = &mut into[(both.start - here.start) as usize..][..both.len() as usize];
    match event {
        Event::Data { bytes, .. } => into.copy_from_slice(&bytes[(both.start - came.start) as usize..][..into.len()]),
        _ => into.fill(0),
    }
}

/// The system's error for what a server did not do.
fn refused(failure: &Failure) -> io::Error {
    let error = io::Error::from_raw_os_error(i32::try_from(failure.errno).unwrap_or(Errno::INVAL.raw_os_error()));
    match failure.message.is_empty() {
        true => error,
        false => io::Error::new(error.kind(), format!("{error}: the server says {:?}", failure.message)),
    }
}

/// The error for a connection that is of no use any more.
fn lost(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, format!("the connection to the server is lost: {why}"))
}

/// Why a connection has come to an end, in words.
fn ended(error: io::Error) -> String {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionReset | UnexpectedEof => "the server hung up".to_owned(),
        _ => error.to_string(),
    }
}

/// Why a server that says nothing is given up.
fn late() -> String {
    format!("no answer within {} s", ANSWER_TIME_MAX.as_secs())
}

#[cfg(test)]
mod tests;
