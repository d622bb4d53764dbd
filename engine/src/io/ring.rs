//! The kernel's queue: it owns every operation from its submission to its completion.
// UNSAFETY: submission entries carry raw pointers into what this module owns.
#![expect(unsafe_code)]

mod needed;
#[cfg(test)]
mod tests;

use super::memory::{carry_out, zero_mode};
use super::pool::{Helpers, Pool, Turn, carry_out_now};
use super::registered::Registered;
use super::{Arena, Buffer, Completion, File, Gather, Io, Op, Token, Until, Wait};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use needed::refuse_lacking;
use rustix::io::Errno;
use rustix::net::SocketAddrAny;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// `IORING_RECVSEND_POLL_FIRST` of `io_uring_enter(2)`: wait for the socket before the first try.
const POLL_FIRST: u16 = 1;

/// One thread's queue to the kernel. It stays on the thread that made it.
pub struct Ring {
    ring: IoUring,
    /// What the kernel has, by the number that its entry carries.
    in_kernel: Vec<Option<InKernel>>,
    free: Vec<usize>,
    /// Dropped after the ring.
    registered: Registered,
    /// Who computes for it; itself where there is nobody.
    helpers: Option<Helpers>,
    /// What it did itself and nobody took yet.
    ready: Vec<Completion>,
    started: Instant,
}

/// An operation that the kernel has, and what its entry points to beside its buffers.
struct InKernel {
    /// `None` where the ring itself wants to know.
    token: Option<Token>,
    op: Op,
    #[expect(dead_code, reason = "owned for the kernel, which has its address")]
    extra: Extra,
}

/// Boxed: its address is in the entry.
#[expect(dead_code, reason = "owned for the kernel, which has its address")]
enum Extra {
    None,
    Message(Box<Message>),
    Time(Box<Timespec>),
    Count(Box<u64>),
    Peer(Box<SocketAddrAny>),
}

/// The pieces of one send, as `sendmsg(2)` wants them.
struct Message {
    header: libc::msghdr,
    vectors: Vec<libc::iovec>,
}

impl Message {
    fn new(gather: &Gather) -> Box<Self> {
        let vectors = gather.slices().take(Gather::PIECES_MAX).map(vector).collect();
        // SAFETY: an empty message header is all zeroes and null pointers.
        let header = unsafe { std::mem::zeroed() };
        let mut message = Box::new(Self { header, vectors });
        message.header.msg_iov = message.vectors.as_mut_ptr();
        message.header.msg_iovlen = message.vectors.len();
        message
    }
}

fn vector(part: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }
}

impl Ring {
    /// A ring whose submission queue has room for `depth` operations (more are started early), with
    /// `arena` registered as far as it is used and the system allows that much locked memory.
    pub fn new(depth: u32, arena: &Arena) -> io::Result<Self> {
        let ring = Self::build(depth.next_power_of_two())?;
        refuse_lacking(&ring)?;
        Ok(Self {
            registered: Registered::new(&ring, arena),
            ring,
            in_kernel: Vec::new(),
            free: Vec::new(),
            helpers: None,
            ready: Vec::new(),
            started: Instant::now(),
        })
    }

    /// The same ring, whose `Op::Compute`s and `Op::Clone`s go to `pool`.
    pub fn helped_by(mut self, pool: Option<Pool>, turn: Turn) -> io::Result<Self> {
        self.helpers = pool.map(|pool| Helpers::new(pool, turn)).transpose()?;
        self.listen();
        Ok(self)
    }

    /// Wants to be woken when work comes back from the pool.
    fn listen(&mut self) {
        if let Some(helpers) = &self.helpers {
            let waker = helpers.waker().clone();
            self.start(None, Op::Wake { waker });
        }
    }

    /// The cheapest kind of ring that this kernel has.
    fn build(depth: u32) -> io::Result<IoUring> {
        let cheap = IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_cqsize(depth * 4).build(depth);
        match cheap {
            // Before Linux 6.1.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => IoUring::new(depth),
            other => other,
        }
        .map_err(with_remedy)
    }

    fn entry(&mut self, op: &mut Op, extra: &mut Extra) -> squeue::Entry {
        match op {
            Op::Read { file, at, buf } => self.read(file, *at, buf),
            Op::Write { file, at, buf } => self.write(file, *at, buf),
            Op::Zero { file, at, len, unmap } => {
                let mode = zero_mode(*unmap).bits() as i32;
                opcode::Fallocate::new(fd(file), *len).offset(*at).mode(mode).build()
            }
            Op::Flush { file } => opcode::Fsync::new(fd(file)).flags(FsyncFlags::DATASYNC).build(),
            Op::Prefetch { file, at, len } => {
                // Its length has 32 bits; a wish is a wish.
                let len = (*len).min(1 << 30) as libc::off_t;
                opcode::Fadvise::new(fd(file), len, libc::POSIX_FADV_WILLNEED).offset(*at).build()
            }
            Op::Receive { socket, buf, until } => {
                let (flags, how) = match until {
                    Until::Some => (0, 0),
                    Until::Later => (0, POLL_FIRST),
                    Until::Full => (libc::MSG_WAITALL, 0),
                };
                opcode::Recv::new(fd(socket), buf.address(), buf.len() as u32).flags(flags).ioprio(how).build()
            }
            Op::Send { socket, gather } => {
                let message = Message::new(gather);
                let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
                let entry = opcode::SendMsg::new(fd(socket), &raw const message.header).flags(flags).build();
                *extra = Extra::Message(message);
                entry
            }
            Op::Accept { listener, .. } => {
                opcode::Accept::new(fd(listener), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Compute { .. } | Op::Clone { .. } => unreachable!("the pool does"),
            Op::Connect { socket, peer } => {
                let peer = Box::new(peer.clone());
                let entry = opcode::Connect::new(fd(socket), peer.as_ptr().cast(), peer.addr_len()).build();
                *extra = Extra::Peer(peer);
                entry
            }
            Op::Timeout { after } => {
                let time = Box::new(Timespec::from(*after));
                let entry = opcode::Timeout::new(&raw const *time).build();
                *extra = Extra::Time(time);
                entry
            }
            Op::Wake { waker } => {
                let mut count = Box::new(0u64);
                let entry = opcode::Read::new(fd(waker.file()), (&raw mut *count).cast(), 8).build();
                *extra = Extra::Count(count);
                entry
            }
        }
    }

    fn read(&mut self, file: &File, at: u64, buf: &mut Buffer) -> squeue::Entry {
        let (start, len) = (buf.address(), buf.len() as u32);
        match self.registered.has(&self.ring, buf) {
            true => opcode::ReadFixed::new(fd(file), start, len, 0).offset(at).build(),
            false => opcode::Read::new(fd(file), start, len).offset(at).build(),
        }
    }

    fn write(&mut self, file: &File, at: u64, buf: &mut Buffer) -> squeue::Entry {
        let (start, len) = (buf.address().cast_const(), buf.len() as u32);
        match self.registered.has(&self.ring, buf) {
            true => opcode::WriteFixed::new(fd(file), start, len, 0).offset(at).build(),
            false => opcode::Write::new(fd(file), start, len).offset(at).build(),
        }
    }

    /// A place in the table for one more operation.
    fn slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.in_kernel.push(None);
            self.in_kernel.len() - 1
        })
    }

    fn take_done(&mut self, done: &mut Vec<Completion>) {
        let mut woken = false;
        for entry in self.ring.completion() {
            let slot = entry.user_data() as usize;
            let InKernel { token, op, .. } = self.in_kernel[slot].take().expect("one completion a submission");
            self.free.push(slot);
            match token {
                Some(token) => done.push(completion(token, op, &entry)),
                None => woken = true,
            }
        }
        if woken {
            self.listen();
        }
        done.append(&mut self.ready);
        if let Some(helpers) = &self.helpers {
            helpers.take(done);
        }
    }

    /// Cancels what is under way and waits until all of it is over; what was done of it is in `done`. Nothing is
    /// submitted any more.
    pub fn take_back(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        // It would be listened to for ever.
        self.helpers = None;
        while self.in_kernel.len() > self.free.len() {
            self.enter(Wait::No)?;
            // Nothing left to cancel is an error that says just that.
            let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
            self.reap(Wait::One, done)?;
        }
        Ok(())
    }

    /// Cancels what is under way with tokens in `whose` and waits until that is over; what was done, also of others, is
    /// in `done`.
    pub fn take_back_those(&mut self, whose: Range<Token>, done: &mut Vec<Completion>) -> io::Result<()> {
        loop {
            let theirs = |place: &Option<InKernel>| {
                place.as_ref().and_then(|one| one.token).is_some_and(|token| whose.contains(&token))
            };
            let Some(slot) = self.in_kernel.iter().position(theirs) else { return Ok(()) };
            self.enter(Wait::No)?;
            // An error says that it is over already.
            let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::user_data(slot as u64));
            self.reap(Wait::One, done)?;
        }
    }

    fn enter(&self, wait: Wait) -> io::Result<()> {
        // A deferred ring moves its completions only when it is asked for events, so ask always.
        let want = match wait {
            Wait::One if self.in_kernel.len() > self.free.len() => 1,
            _ => 0,
        };
        const GETEVENTS: u32 = 1;
        let queued = {
            // SAFETY: a shared look at the queue's length; entries are pushed through `&mut self`.
            let queue = unsafe { self.ring.submission_shared() };
            queue.len() as u32
        };
        // SAFETY: no argument is passed, and every queued entry points into `in_kernel`.
        match unsafe { self.ring.submitter().enter::<()>(queued, want, GETEVENTS, None) } {
            Ok(_) => Ok(()),
            // Interrupted, or no room for more completions yet: what is there is taken first.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INTR | Errno::BUSY | Errno::AGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Ring {
    fn start(&mut self, token: Option<Token>, mut op: Op) {
        let slot = self.slot();
        let mut extra = Extra::None;
        let is_served = op.file().is_some_and(File::is_served);
        let flags = if is_served { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = self.entry(&mut op, &mut extra).user_data(slot as u64).flags(flags);
        self.in_kernel[slot] = Some(InKernel { token, op, extra });
        loop {
            // SAFETY: what `entry` points into is in `in_kernel[slot]`, which is emptied only by this
            // entry's own completion. Moving a `Buffer` or a `Box` there does not move its memory.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: the kernel takes what is queued. It can refuse only for want of memory, which passes.
            if let Err(error) = self.enter(Wait::No) {
                tracing::warn!(%error, "the ring takes no submissions");
                std::thread::yield_now();
            }
        }
    }
}

/// Why there is no ring, and what helps.
fn with_remedy(error: io::Error) -> io::Error {
    let words = match Errno::from_io_error(&error) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "io_uring is not allowed: set the sysctl kernel.io_uring_disabled to 0 or, in a container, have its seccomp \
             filter allow io_uring_setup, io_uring_enter and io_uring_register"
        }
        Some(Errno::NOSYS) => {
            "there is no io_uring: it takes Linux 6.0 or newer, or a seccomp filter that does not hide io_uring_setup"
        }
        Some(Errno::NOMEM) => "no memory for an io_uring: raise the limit of locked memory (ulimit -l)",
        Some(Errno::MFILE) => "no descriptor is left for an io_uring: raise the limit of open files (ulimit -n)",
        _ => return error,
    };
    io::Error::new(error.kind(), words)
}

impl Io for Ring {
    fn submit(&mut self, token: Token, op: Op) {
        match (op, &self.helpers) {
            (op @ (Op::Compute { .. } | Op::Clone { .. }), Some(helpers)) => helpers.put(token, op),
            (op @ (Op::Compute { .. } | Op::Clone { .. }), None) => self.ready.push(carry_out_now(token, op)),
            (mut op, _) => match carry_out(&mut op) {
                Some(result) => self.ready.push(Completion { token, op, result }),
                None => self.start(Some(token), op),
            },
        }
    }

    fn send_at_once(&mut self, socket: &File, gather: &Gather) -> usize {
        // What is queued goes to the kernel by the next `reap`, and the rest of it then too.
        if !self.ring.submission().is_empty() {
            return 0;
        }
        let message = Message::new(gather);
        // SAFETY: the header points into `message` and `gather`, which both outlive the call.
        let count =
            unsafe { libc::sendmsg(socket.raw(), &raw const message.header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        usize::try_from(count).unwrap_or(0)
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.enter(if self.ready.is_empty() { wait } else { Wait::No })?;
        self.take_done(done);
        Ok(())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Ring {
    /// Buffers may go only when the kernel has let go of them.
    fn drop(&mut self) {
        let mut done = Vec::new();
        // What the pool has keeps its own buffers, and comes back to nobody.
        self.helpers = None;
        while self.in_kernel.len() > self.free.len() {
            // What is only queued cannot be cancelled: the wait below would start it, and a waking that
            // nobody sends is waited for without end.
            let _ = self.enter(Wait::No);
            // Nothing left to cancel is an error that says just that.
            let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
            if self.reap(Wait::One, &mut done).is_err() {
                // The kernel cannot be asked any more: what it may still write to is kept for good.
                std::mem::forget(std::mem::take(&mut self.in_kernel));
                std::mem::forget(self.registered.arena().clone());
                return;
            }
            done.clear();
        }
    }
}

fn fd(file: &File) -> Fd {
    Fd(file.raw())
}

fn completion(token: Token, mut op: Op, entry: &cqueue::Entry) -> Completion {
    let mut result = u32::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
    match &mut op {
        Op::Accept { accepted, .. } => {
            if let Ok(number) = result {
                // SAFETY: the kernel made this descriptor for this completion; nobody else has it.
                *accepted = Some(File::new(unsafe { OwnedFd::from_raw_fd(number as i32) }));
                result = Ok(0);
            }
        }
        Op::Timeout { .. } if matches!(&result, Err(e) if Errno::from_io_error(e) == Some(Errno::TIME)) => {
            result = Ok(0);
        }
        _ => {}
    }
    Completion { token, op, result }
}
