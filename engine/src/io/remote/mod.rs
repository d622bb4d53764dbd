//! Exports of NBD servers as files: bytes at offsets, and where the holes are.
//!
//! ```text
//! formats: map ─► Storage: read_at, next_data, next_hole ──► Blocking: one connection, behind a lock
//! engine:  Op::Read of a File ─► Remotes: one connection a thread and export, stepped in its ring
//! ```
//!
//! Whoever submits an `Op` does not know that its file is remote: `Remotes` wraps a thread's queue and carries
//! out what belongs to an export. A server that does not promise several connections (CAN_MULTI_CONN) may take
//! only one, as `qemu-nbd` does: there everything goes by the lock, one request at a time, and waits.
//!
//! A server has `CONNECT_TIME_MAX` to be reached and `ANSWER_TIME_MAX` for each answer. What takes longer, hangs
//! up or breaks the protocol is lost: everything under way on that connection fails, and what follows too.
mod blocking;
mod connection;
mod known;
mod queue;

pub use queue::Remotes;

use blocking::Blocking;
use formats::error::{Context, Error, Result};
use formats::nbd::client::{Ask, Event, Failure, Session};
use formats::nbd::wire::transmission_flag::CAN_MULTI_CONN;
use formats::nbd::{Address, Server};
use formats::range::ByteRange;
use formats::storage::Storage;
use known::Known;
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketAddrUnix};
use std::io;
use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long reaching a server may take, each of its addresses.
pub const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a server may take for an answer, and for the negotiation.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest request, in bytes; a power of two.
const REQUEST_LEN_MAX: u64 = 1 << 20;
/// Of how much of the disk the extents are asked at a time, in bytes.
const STATUS_LEN: u64 = 1 << 30;

/// An export that is open to be read.
#[derive(Debug)]
pub struct Remote {
    address: Address,
    /// Where its server was reached.
    peer: SocketAddrAny,
    session: Session,
    metadata: Mutex<Metadata>,
}

/// What is behind the lock.
#[derive(Debug)]
struct Metadata {
    connection: Blocking,
    known: Known,
}

impl Remote {
    /// Reaches the server and agrees with it. Waits: for opening.
    pub fn open(address: &Address) -> Result<Arc<Self>> {
        if address.tls {
            return Err(Error::unsupported(format!(
                "{address}: TLS is not supported: reach the server by a Unix socket or through a tunnel, with nbd:"
            )));
        }
        let mut failed = Error::invalid(format!("{address}: the host has no address"));
        for peer in peers(&address.server).context(|| format!("{address}: looking the server up"))? {
            match Blocking::connect(&peer, &address.export) {
                Ok((connection, session)) => {
                    let metadata = Mutex::new(Metadata { connection, known: Known::default() });
                    return Ok(Arc::new(Self { address: address.clone(), peer, session, metadata }));
                }
                Err(error) => failed = error.at(address),
            }
        }
        Err(failed)
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
            metadata.connection.exchange(Ask::Read(piece), |event| place(&event, here, into))?;
            done = here.end;
        }
        Ok(wanted.len() as usize)
    }

    /// What of `len` bytes from `at` on is on the disk.
    fn on_disk(&self, at: u64, len: usize) -> ByteRange {
        let size = self.session.size;
        ByteRange { start: at.min(size), end: at.saturating_add(len as u64).min(size) }
    }

    /// The first request for `range`: aligned as the server wants it, and no longer than it may be.
    fn piece(&self, range: ByteRange) -> ByteRange {
        let sizes = self.session.block_sizes;
        let len_max = REQUEST_LEN_MAX.min(sizes.maximum.into());
        let aligned = range.align_outward(sizes.minimum.into()).prefix(len_max);
        ByteRange { start: aligned.start, end: aligned.end.min(self.session.size) }
    }

    /// Whether the bytes at `at` are known to be zeroes, and up to where that goes on at least.
    fn status(&self, at: u64) -> io::Result<(bool, u64)> {
        if self.session.base_allocation.is_none() {
            return Ok((false, self.session.size));
        }
        let mut metadata = self.metadata();
        if let Some(found) = metadata.known.find(at) {
            return Ok(found);
        }
        let minimum = u64::from(self.session.block_sizes.minimum);
        let start = at - at % minimum;
        let asked = ByteRange { start, end: self.session.size.min(start.saturating_add(STATUS_LEN)) };
        let Metadata { connection, known } = &mut *metadata;
        known.forget_oldest(start);
        connection.exchange(Ask::BlockStatus(asked), |event| known.add(&event))?;
        // An answer begins at what was asked: at `at`, or less than a block before.
        known.find(at).ok_or_else(|| io::Error::other("the server tells nothing of the bytes that it was asked of"))
    }

    fn metadata(&self) -> MutexGuard<'_, Metadata> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True where each thread may have a connection of its own.
    fn is_shared(&self) -> bool {
        self.session.flags & CAN_MULTI_CONN != 0
    }
}

/// As its server shows it, which is thought not to change while it is open.
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
