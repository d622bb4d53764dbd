//! Open files and sockets, exports of other servers, and the bell-push of a thread that waits in its ring.
use super::lock;
use super::memory::is_served;
use super::remote::Remote;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An open file or socket. Clones are the same one; the last that goes closes it.
#[derive(Clone, Debug)]
pub struct File(Arc<Inner>);

#[derive(Debug)]
enum Inner {
    Open(OwnedFd),
    /// On a file system in memory.
    InMemory(OwnedFd),
    /// On a file system that a process serves.
    Served(OwnedFd),
    Remote(Arc<Remote>),
    Simulated(Simulated),
}

/// A simulator's file: a number, and whether it was woken.
#[derive(Debug)]
struct Simulated {
    number: u32,
    woken: AtomicBool,
}

impl File {
    /// A real one.
    pub fn new(fd: impl Into<OwnedFd>) -> Self {
        Self(Arc::new(Inner::Open(fd.into())))
    }

    /// A real one on a file system that `is_in_memory`.
    pub fn of_memory(fd: impl Into<OwnedFd>) -> Self {
        Self(Arc::new(Inner::InMemory(fd.into())))
    }

    /// A real one that an image is in. Where a process serves its file system (FUSE), the kernel would have whoever
    /// submits an operation wait for those before it, for as long as that process likes: a thread of its own does.
    pub fn of_image(fd: impl Into<OwnedFd>) -> Self {
        let fd = fd.into();
        Self(Arc::new(if is_served(&fd) { Inner::Served(fd) } else { Inner::Open(fd) }))
    }

    /// True where nobody who has other things to do may begin an operation of it.
    pub(super) fn is_served(&self) -> bool {
        matches!(&*self.0, Inner::Served(_))
    }

    /// An export; only a `Remotes` queue can work on it.
    pub fn remote(remote: Arc<Remote>) -> Self {
        Self(Arc::new(Inner::Remote(remote)))
    }

    /// The export that it is, if it is one.
    pub fn as_remote(&self) -> Option<&Arc<Remote>> {
        match &*self.0 {
            Inner::Remote(remote) => Some(remote),
            Inner::Open(_) | Inner::InMemory(_) | Inner::Served(_) | Inner::Simulated(_) => None,
        }
    }

    /// A simulator's: nothing but a number.
    pub fn simulated(number: u32) -> Self {
        Self(Arc::new(Inner::Simulated(Simulated { number, woken: AtomicBool::new(false) })))
    }

    /// The simulator's number; `None` for a real file.
    pub fn number(&self) -> Option<u32> {
        match &*self.0 {
            Inner::Open(_) | Inner::InMemory(_) | Inner::Served(_) | Inner::Remote(_) => None,
            Inner::Simulated(simulated) => Some(simulated.number),
        }
    }

    /// Ends both directions of a socket, so that what waits on it is done.
    pub fn shut_down(&self) {
        if let Inner::Open(fd) = &*self.0 {
            // A socket whose peer is gone already has nothing left to shut.
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
    }

    /// True where the other end of a socket is closed, also when bytes of it wait to be received.
    pub fn hung_up(&self) -> bool {
        let Some(fd) = self.as_fd() else { return false };
        let mut asked = [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)];
        // An error means that it is no socket any more.
        poll(&mut asked, Some(&Timespec::default())).map_or(true, |answers| answers > 0)
    }

    /// Small messages are sent at once; a Unix socket does so anyway.
    pub fn no_delay(&self) {
        if let Some(fd) = self.as_fd() {
            // A socket that is not TCP has no such option.
            let _ = rustix::net::sockopt::set_tcp_nodelay(fd, true);
        }
    }

    /// Lets a Unix socket hold up to `len` bytes that its peer has not taken yet, as far as the system
    /// allows: a long reply is then handed over in few pieces. TCP finds its own measure.
    pub fn hold_to_send(&self, len: usize) {
        use rustix::net::{AddressFamily, sockopt};
        if let Some(fd) = self.as_fd().filter(|fd| sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)) {
            // Less is only slower. The system doubles what it is told, for its own bookkeeping.
            let _ = sockopt::set_socket_send_buffer_size(fd, len / 2);
        }
    }

    /// Nothing is written to it any more: others may read it.
    pub fn only_read(&self) {
        if let Some(fd) = self.as_fd() {
            lock::only_read(fd);
        }
    }

    /// Makes everything durable that was written before. Waits: for starting and stopping.
    pub fn flush_now(&self) -> io::Result<()> {
        match &*self.0 {
            Inner::Open(fd) | Inner::InMemory(fd) | Inner::Served(fd) => Ok(rustix::fs::fdatasync(fd)?),
            Inner::Remote(remote) => remote.flush_now(),
            Inner::Simulated(_) => Ok(()),
        }
    }

    /// The descriptor, where there is one.
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Inner::Open(fd) | Inner::InMemory(fd) | Inner::Served(fd) => Some(fd.as_fd()),
            Inner::Remote(_) | Inner::Simulated(_) => None,
        }
    }

    /// The descriptor of a file in memory.
    pub(super) fn in_memory(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Inner::InMemory(fd) => Some(fd.as_fd()),
            _ => None,
        }
    }

    pub(super) fn raw(&self) -> RawFd {
        self.as_fd().map_or(-1, |fd| fd.as_raw_fd())
    }
}

/// Wakes a thread that waits in its ring. Clones wake the same thread.
#[derive(Clone, Debug)]
pub struct Waker(File);

impl Waker {
    /// A new one; its thread keeps an `Op::Wake` of it under way.
    pub fn new() -> io::Result<Self> {
        Ok(Self(File::new(eventfd(0, EventfdFlags::CLOEXEC)?)))
    }

    /// A simulator's.
    pub fn simulated(number: u32) -> Self {
        Self(File::simulated(number))
    }

    /// Ends the `Op::Wake` that is under way, or the next one.
    pub fn wake(&self) {
        match &*self.0.0 {
            // Fails only where the counter is full: then the thread is being woken already.
            Inner::Open(fd) => drop(rustix::io::write(fd, &1u64.to_ne_bytes())),
            Inner::Simulated(simulated) => simulated.woken.store(true, Ordering::SeqCst),
            Inner::InMemory(_) | Inner::Served(_) | Inner::Remote(_) => unreachable!("a waker has an eventfd"),
        }
    }

    /// Whether a simulator's was woken since this was asked last.
    pub fn was_woken(&self) -> bool {
        match &*self.0.0 {
            Inner::Open(_) | Inner::InMemory(_) | Inner::Served(_) | Inner::Remote(_) => false,
            Inner::Simulated(simulated) => simulated.woken.swap(false, Ordering::SeqCst),
        }
    }

    /// True where both wake the same thread.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0.0, &other.0.0)
    }

    pub(super) fn file(&self) -> &File {
        &self.0
    }
}
