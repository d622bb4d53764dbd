//! The threads: one a connection, one to a few for each job's copies. Each has a ring and memory of
//! its own, steps one thing, and waits in its ring.
use super::pool::pool;
use crate::copier::{Copier, Depth, Progress};
use crate::disk::Tools;
use crate::export::session::{self, ARENA_LEN, Directory, Ending, Handed, RING_DEPTH, Session};
use crate::io::remote::Remotes;
use crate::io::{Arena, File, Io, Op, Ring, Token, Turn, Wait, Waker};
use crate::mirror::Mirror;
use crate::tls::Credentials;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const WAKE: Token = Token(u64::MAX);
const TIMEOUT: Token = Token(u64::MAX - 1);

/// A thread that can be told to end.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    hand_over: Arc<AtomicBool>,
    handed: Arc<Mutex<Option<Handed>>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

/// Whom a connection's thread is for.
pub(super) enum Client {
    /// Somebody who has just come.
    New(File),
    /// Somebody whom another process served before.
    Handed(Handed),
}

impl Client {
    fn socket(&self) -> File {
        match self {
            Self::New(socket) | Self::Handed(Handed { socket, .. }) => socket.clone(),
        }
    }
}

impl Worker {
    /// A thread for one NBD connection.
    pub fn session(
        client: Client,
        directory: Arc<dyn Directory>,
        credentials: Option<Arc<Credentials>>,
    ) -> io::Result<Self> {
        let [stop, hand_over] = [(); 2].map(|()| Arc::<AtomicBool>::default());
        let handed = Arc::<Mutex<Option<Handed>>>::default();
        let waker = Waker::new()?;
        let (told, waker_there, handed_there) =
            ([&stop, &hand_over].map(Arc::clone), waker.clone(), Arc::clone(&handed));
        let socket = client.socket();
        let body = move || match serve(client, directory, credentials, waker_there, told) {
            Ok(left) => *handed_there.lock().unwrap_or_else(PoisonError::into_inner) = left,
            Err(error) => {
                tracing::error!(%error, "a connection's thread failed; the connection is dropped");
                socket.shut_down();
            }
        };
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(body)?;
        Ok(Self { stop, hand_over, handed, waker, thread: Some(thread) })
    }

    /// Asks a connection's thread to end, its client going on with somebody else.
    pub fn ask_to_hand_over(&self) {
        self.hand_over.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits for its end, after asking for that. Its client, where it can go on.
    pub fn handed(mut self) -> Option<Handed> {
        self.join();
        self.handed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A thread that copies for `mirror`: number `number` of `count`.
    pub fn copier(mirror: Arc<Mirror>, depth: Depth, number: u64, count: u64) -> io::Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let waker = Waker::new()?;
        let (stop_there, waker_there) = (Arc::clone(&stop), waker.clone());
        let start = mirror.source.size() / count * number;
        let body = move || {
            if let Err(error) = copy(&mirror, depth, start, &waker_there, &stop_there) {
                let what = "a copy thread failed".to_owned();
                mirror.fail(true, formats::error::Error::io(what, error));
            }
        };
        let thread = std::thread::Builder::new().name("copy".into()).spawn(body)?;
        let (hand_over, handed) = (Arc::default(), Arc::default());
        Ok(Self { stop, hand_over, handed, waker, thread: Some(thread) })
    }

    /// True where it has ended by itself.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Asks it to end when what it has under way is done.
    pub fn ask_to_end(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits for its end, after asking for it.
    pub fn end(mut self) {
        self.ask_to_end();
        self.join();
    }

    fn join(&mut self) {
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("a thread ended by a panic: please report what it said");
        }
    }
}

/// A thread that finds something out which takes long.
pub(super) struct Errand<T> {
    thread: JoinHandle<T>,
    is_over: Arc<AtomicBool>,
}

impl<T: Send + 'static> Errand<T> {
    /// Begins it; `waker` is called when it is over.
    pub fn begin(name: &str, waker: Waker, find: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let is_over = Arc::<AtomicBool>::default();
        let is_over_there = Arc::clone(&is_over);
        let body = move || {
            let found = find();
            is_over_there.store(true, Ordering::SeqCst);
            waker.wake();
            found
        };
        Ok(Self { thread: std::thread::Builder::new().name(name.into()).spawn(body)?, is_over })
    }

    /// True where it is over, or does nothing any more that takes long.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst) || self.thread.is_finished()
    }

    /// What was found; `None` where it panicked.
    pub fn end(self) -> Option<T> {
        self.thread.join().ok()
    }
}

fn serve(
    client: Client,
    directory: Arc<dyn Directory>,
    credentials: Option<Arc<Credentials>>,
    waker: Waker,
    [stop, hand_over]: [Arc<AtomicBool>; 2],
) -> io::Result<Option<Handed>> {
    let arena = Arena::allocate(ARENA_LEN)?;
    let mut ring = Remotes::new(Ring::new(RING_DEPTH, &arena)?.helped_by(pool(), Turn::Guest)?);
    let session = match client {
        Client::New(socket) => Session::new(socket, directory, arena, waker, Token(0)).with_tls(credentials),
        Client::Handed(handed) => Session::resumed(handed, directory, arena, waker, Token(0))
            .ok_or_else(|| io::Error::other("the export of a connection that was handed over is not there"))?,
    };
    let mut session = session.stopped_by(stop).handed_over_by(hand_over);
    let mut done = Vec::new();
    loop {
        if let session::Progress::Over(ending) = session.step(&mut ring, &mut done) {
            tracing::info!(export = session.export(), "connection ended: {ending}");
            if ending != Ending::HandedOver {
                return Ok(None);
            }
            ring.below().take_back(&mut done)?;
            return Ok(session.hand_over(done));
        }
        ring.reap(Wait::One, &mut done)?;
    }
}

fn copy(mirror: &Arc<Mirror>, depth: Depth, start: u64, waker: &Waker, stop: &AtomicBool) -> io::Result<()> {
    let arena = Arena::allocate(depth.memory())?;
    let mut ring = Remotes::new(Ring::new(depth.operations(), &arena)?.helped_by(pool(), Turn::Copy)?);
    let mut copier = Copier::new(Arc::clone(mirror), depth, start);
    let mut done = Vec::new();
    let mut timed = false;
    ring.submit(WAKE, Op::Wake { waker: waker.clone() });
    loop {
        let progress = copier.step(&mut Tools { io: &mut ring, arena: &arena, waker }, &mut done);
        if stop.load(Ordering::SeqCst) && copier.is_idle() {
            return Ok(());
        }
        if let (Progress::Throttled(wait), false) = (progress, timed) {
            timed = true;
            let after = wait.clamp(Duration::from_micros(100), Duration::from_millis(100));
            ring.submit(TIMEOUT, Op::Timeout { after });
        }
        ring.reap(Wait::One, &mut done)?;
        done.retain(|completion| match completion.token {
            WAKE => {
                ring.submit(WAKE, Op::Wake { waker: waker.clone() });
                false
            }
            TIMEOUT => {
                timed = false;
                false
            }
            _ => true,
        });
    }
}
