//! The threads that serve NBD connections, and who is served by which.
//!
//! ```text
//! accept ─► a thread of its own ─► export chosen ─┬─► the disk has none: that thread is its first
//!                                                 └─► a thread of the disk with time to spare
//! a thread is busy ─► one of its connections, between two requests ─► a thread of the disk with time to spare, or one more
//! ```
//!
//! One thread for several connections answers, each time that it is awake, whoever has asked meanwhile. A thread for
//! each would make every request a sleep and a waking. So those of a disk share one as long as that has time to spare,
//! and have as many as there are processors at most.
//!
//! Connections of different disks never share a thread: one step may have to wait for its disk's tables.
mod crews;
mod thread;

#[cfg(test)]
mod tests;

use super::threads::joined;
use crate::export::session::{Directory, Handed, Session};
use crate::io::{Arena, File, Token, Waker};
use crate::tls::Credentials;
use crews::{Crews, Pace};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use thread::{Seat, Thread};

/// Whom a thread is started for.
pub(super) enum Client {
    /// Somebody who has just come.
    New(File),
    /// Somebody whom another process served before.
    Handed(Handed),
}

impl Client {
    fn socket(&self) -> &File {
        match self {
            Self::New(socket) | Self::Handed(Handed { socket, .. }) => socket,
        }
    }
}

/// All connections, and the threads that serve them.
pub(super) struct Connections {
    directory: Arc<dyn Directory>,
    credentials: Option<Arc<Credentials>>,
    crews: Arc<Crews>,
    connections: Vec<Connection>,
}

/// One connection, whichever thread serves it.
#[derive(Clone)]
struct Connection {
    stop: Arc<AtomicBool>,
    hand_over: Arc<AtomicBool>,
    waker: Waker,
    handed: Arc<Mutex<Option<Handed>>>,
}

impl Connections {
    /// None yet.
    pub fn new(directory: Arc<dyn Directory>, credentials: Option<Arc<Credentials>>) -> Self {
        Self::at(Pace::default(), directory, credentials)
    }

    /// The same, where threads are busy at another measure.
    fn at(pace: Pace, directory: Arc<dyn Directory>, credentials: Option<Arc<Credentials>>) -> Self {
        Self { directory, credentials, crews: Arc::new(Crews::new(pace)), connections: Vec::new() }
    }

    /// How many there are.
    pub fn count(&mut self) -> usize {
        self.connections.retain(|connection| !connection.is_over());
        self.crews.threads().retain(|thread| !thread.is_finished());
        self.connections.len()
    }

    #[cfg(test)]
    fn moves(&self) -> u64 {
        self.crews.moves.load(Ordering::SeqCst)
    }

    /// One more.
    pub fn begin(&mut self, client: Client) -> io::Result<()> {
        let connection = Connection {
            stop: Arc::default(),
            hand_over: Arc::default(),
            waker: Waker::new()?,
            handed: Arc::default(),
        };
        let (directory, credentials) = (Arc::clone(&self.directory), self.credentials.clone());
        let (crews, there) = (Arc::clone(&self.crews), connection.clone());
        let body = move || serve(client, directory, credentials, there, crews);
        self.crews.spawn(body)?;
        self.connections.push(connection);
        Ok(())
    }

    /// Ends all of them, their clients going on with somebody else where that is wanted: those who can.
    pub fn end(self, hand_over: bool) -> Vec<Handed> {
        self.connections.iter().for_each(|connection| connection.ask_to_end(hand_over));
        loop {
            // One that ends may have started another one.
            let threads = std::mem::take(&mut *self.crews.threads());
            if threads.is_empty() {
                break;
            }
            threads.into_iter().for_each(joined);
        }
        self.connections.iter().filter_map(Connection::handed).collect()
    }
}

impl Connection {
    /// Nobody serves it any more.
    fn is_over(&self) -> bool {
        Arc::strong_count(&self.handed) == 1
    }

    fn ask_to_end(&self, hand_over: bool) {
        let how = if hand_over { &self.hand_over } else { &self.stop };
        how.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    fn handed(&self) -> Option<Handed> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Its session, as far as the choice of an export.
    fn session(
        &self,
        client: Client,
        directory: Arc<dyn Directory>,
        credentials: Option<Arc<Credentials>>,
        arena: Arena,
        base: Token,
    ) -> io::Result<Session> {
        let waker = self.waker.clone();
        let session = match client {
            Client::New(socket) => Session::new(socket, directory, arena, waker, base).with_tls(credentials),
            Client::Handed(handed) => Session::resumed(handed, directory, arena, waker, base)
                .ok_or_else(|| io::Error::other("the export of a connection that was handed over is not there"))?,
        };
        Ok(session.stopped_by(Arc::clone(&self.stop)).handed_over_by(Arc::clone(&self.hand_over)))
    }
}

/// What a thread does: serves `client`, and once that has chosen a disk, others of that disk too.
fn serve(
    client: Client,
    directory: Arc<dyn Directory>,
    credentials: Option<Arc<Credentials>>,
    connection: Connection,
    crews: Arc<Crews>,
) {
    let socket = client.socket().clone();
    let begun = Thread::new(crews).and_then(|mut thread| {
        let session = connection.session(client, directory, credentials, thread.arena().clone(), Token(0))?;
        thread.take(Seat::new(session, connection, socket.clone()));
        Ok(thread)
    });
    match begun {
        Ok(thread) => thread.serve(),
        Err(error) => {
            tracing::error!(%error, "a connection's thread failed; the connection is dropped");
            socket.shut_down();
        }
    }
}
