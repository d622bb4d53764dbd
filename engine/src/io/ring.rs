//! The kernel's queue: it owns every operation from its submission to its completion.
// UNSAFETY: submission entries carry raw pointers into what this module owns.
#![expect(unsafe_code)]
use super::pool::{Helpers, Pool, Turn};
use super::{Arena, Buffer, Completion, File, Gather, Io, Op, Token, Wait};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::net::SocketAddrAny;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// One thread's queue to the kernel. It stays on the thread that made it.
pub struct Ring {
    ring: IoUring,
    /// What the kernel has, by the number that its entry carries.
    in_kernel: Vec<Option<InKernel>>,
    free: Vec<usize>,
    /// Memory that the kernel knows already, if it took it.
    registered: Option<Arena>,
    /// Who computes for it; itself where there is nobody.
    helpers: Option<Helpers>,
    /// What it computed itself and nobody took yet.
    computed: Vec<Completion>,
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
    /// `arena` registered where the system allows that much locked memory.
    pub fn new(depth: u32, arena: &Arena) -> io::Result<Self> {
        let ring = Self::build(depth.next_power_of_two())?;
        let (start, len) = arena.region();
        let region = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: the region lives as long as `registered`, which is dropped after the ring.
        let registered = unsafe { ring.submitter().register_buffers(std::slice::from_ref(&region)) };
        if let Err(error) = &registered {
            tracing::debug!(%error, "the ring's buffers are not registered: copies cost a little more");
        }
        Ok(Self {
            ring,
            in_kernel: Vec::new(),
            free: Vec::new(),
            registered: registered.is_ok().then(|| arena.clone()),
            helpers: None,
            computed: Vec::new(),
            started: Instant::now(),
        })
    }

    /// The same ring, whose `Op::Compute`s go to `pool`.
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
        .map_err(|error| match error.raw_os_error() {
            Some(number) if number == Errno::PERM.raw_os_error() => io::Error::new(
                error.kind(),
                "io_uring is switched off on this system: set the sysctl kernel.io_uring_disabled to 0",
            ),
            _ => error,
        })
    }

    fn entry(&self, op: &mut Op, extra: &mut Extra) -> squeue::Entry {
        match op {
            Op::Read { file, at, buf } => self.read(file, *at, buf),
            Op::Write { file, at, buf } => self.write(file, *at, buf),
            Op::Zero { file, at, len, unmap } => {
                let mode = if *unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
                let mode = (mode | FallocateFlags::KEEP_SIZE).bits() as i32;
                opcode::Fallocate::new(fd(file), *len).offset(*at).mode(mode).build()
            }
            Op::Flush { file } => opcode::Fsync::new(fd(file)).flags(FsyncFlags::DATASYNC).build(),
            Op::Prefetch { file, at, len } => {
                // Its length has 32 bits; a wish is a wish.
                let len = (*len).min(1 << 30) as libc::off_t;
                opcode::Fadvise::new(fd(file), len, libc::POSIX_FADV_WILLNEED).offset(*at).build()
            }
            Op::Receive { socket, buf, whole } => {
                let flags = if *whole { libc::MSG_WAITALL } else { 0 };
                opcode::Recv::new(fd(socket), buf.address(), buf.len() as u32).flags(flags).build()
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
            Op::Compute { .. } => unreachable!("the kernel does not compute"),
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

    fn read(&self, file: &File, at: u64, buf: &mut Buffer) -> squeue::Entry {
        let (start, len) = (buf.address(), buf.len() as u32);
        match &self.registered {
            Some(arena) if arena.has(buf) => opcode::ReadFixed::new(fd(file), start, len, 0).offset(at).build(),
            _ => opcode::Read::new(fd(file), start, len).offset(at).build(),
        }
    }

    fn write(&self, file: &File, at: u64, buf: &mut Buffer) -> squeue::Entry {
        let (start, len) = (buf.address().cast_const(), buf.len() as u32);
        match &self.registered {
            Some(arena) if arena.has(buf) => opcode::WriteFixed::new(fd(file), start, len, 0).offset(at).build(),
            _ => opcode::Write::new(fd(file), start, len).offset(at).build(),
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
        done.append(&mut self.computed);
        if let Some(helpers) = &self.helpers {
            helpers.take(done);
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
        let entry = self.entry(&mut op, &mut extra).user_data(slot as u64);
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

impl Io for Ring {
    fn submit(&mut self, token: Token, op: Op) {
        match (op, &self.helpers) {
            (Op::Compute { from, to, work }, Some(helpers)) => helpers.put(token, from, to, work),
            (Op::Compute { from, mut to, work }, None) => {
                let result = work.run(&from, &mut to);
                self.computed.push(Completion { token, op: Op::Compute { from, to, work }, result });
            }
            (op, _) => self.start(Some(token), op),
        }
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.enter(if self.computed.is_empty() { wait } else { Wait::No })?;
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
                std::mem::forget(self.registered.take());
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

#[cfg(test)]
mod tests {
    use super::super::{Arena, Buffer, File, Gather, Io, Op, Pool, Token, Turn, Wait, Waker, Work};
    use super::Ring;
    use std::time::Duration;

    fn run(ring: &mut Ring, op: Op) -> (Op, std::io::Result<u32>) {
        let mut done = Vec::new();
        ring.submit(Token(9), op);
        while done.is_empty() {
            ring.reap(Wait::One, &mut done).expect("a ring that works");
        }
        let completion = done.remove(0);
        assert_eq!(completion.token, Token(9));
        (completion.op, completion.result)
    }

    #[test]
    fn bytes_written_are_read_back_by_registered_and_other_buffers() {
        let arena = Arena::new(64 << 10);
        let mut ring = Ring::new(4, &arena).expect("a ring");
        let file = File::new(tempfile::tempfile().expect("a temporary file"));
        for mut buf in [arena.take(8192).expect("room"), Buffer::alone(8192)] {
            buf.fill(7);
            let (_, result) = run(&mut ring, Op::Write { file: file.clone(), at: 4096, buf });
            assert_eq!(result.expect("a write"), 8192);
        }
        let zero = Op::Zero { file: file.clone(), at: 8192, len: 4096, unmap: true };
        run(&mut ring, zero).1.expect("a hole");
        run(&mut ring, Op::Flush { file: file.clone() }).1.expect("a flush");
        let buf = arena.take(12288).expect("room");
        let (op, result) = run(&mut ring, Op::Read { file, at: 4096, buf });
        assert_eq!(result.expect("a read up to the end"), 8192);
        let Op::Read { buf, .. } = op else { panic!("the same operation") };
        assert!(buf[..4096].iter().all(|byte| *byte == 7) && buf[4096..8192].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn more_operations_than_the_queue_has_room_for_are_all_done() {
        let arena = Arena::new(4096);
        let mut ring = Ring::new(2, &arena).expect("a ring");
        let file = File::new(tempfile::tempfile().expect("a temporary file"));
        for n in 0..100 {
            ring.submit(Token(n), Op::Write { file: file.clone(), at: n, buf: Buffer::alone(1) });
        }
        let mut done = Vec::new();
        while done.len() < 100 {
            ring.reap(Wait::One, &mut done).expect("a ring that works");
        }
        let mut tokens: Vec<u64> = done.iter().map(|completion| completion.token.0).collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..100));
    }

    #[test]
    fn a_gather_arrives_in_order_and_a_waker_wakes() {
        let arena = Arena::new(4096);
        let mut ring = Ring::new(4, &arena).expect("a ring");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        let (ours, theirs) = (File::new(ours), File::new(theirs));
        let mut gather = Gather::default();
        gather.push_bytes(b"abc");
        let mut buf = arena.take(3).expect("room");
        buf.copy_from_slice(b"def");
        gather.push_buffer(buf);
        let (_, result) = run(&mut ring, Op::Send { socket: ours, gather });
        assert_eq!(result.expect("a send"), 6);
        let (op, _) = run(&mut ring, Op::Receive { socket: theirs, buf: Buffer::alone(6), whole: true });
        let Op::Receive { buf, .. } = op else { panic!("the same operation") };
        assert_eq!(&buf[..], b"abcdef");

        let waker = Waker::new().expect("an eventfd");
        waker.wake();
        run(&mut ring, Op::Wake { waker }).1.expect("a waking");
        run(&mut ring, Op::Timeout { after: Duration::from_millis(1) }).1.expect("an end");
    }

    /// A ring with an operation that was queued only hung for good when it was dropped: there was
    /// nothing to cancel yet, and then nobody to end it.
    #[test]
    fn a_ring_that_goes_lets_nothing_go_before_the_kernel_did() {
        for submitted in [true, false] {
            let arena = Arena::new(4096);
            let mut ring = Ring::new(4, &arena).expect("a ring");
            let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
            let buf = arena.take(100).expect("room");
            ring.submit(Token(1), Op::Receive { socket: File::new(ours), buf, whole: true });
            if submitted {
                ring.reap(Wait::No, &mut Vec::new()).expect("a ring that works");
            }
            drop(ring);
            assert!(arena.take(4096).is_some(), "the buffer came back");
        }
    }

    /// Rings with helpers and without: everything comes back, each with its own buffers and error.
    #[test]
    fn what_is_computed_comes_back_like_any_operation() {
        let pool = Pool::default();
        for _ in 0..2 {
            let pool = pool.clone();
            std::thread::spawn(move || pool.serve());
        }
        let arena = Arena::new(1 << 20);
        for helpers in [None, Some(pool)] {
            let ring = Ring::new(4, &arena).and_then(|ring| ring.helped_by(helpers, Turn::Guest));
            let mut ring = ring.expect("a ring");
            let compute = |number: u8| {
                let mut from = Buffer::alone(100);
                from.fill(number);
                let work = Work::new(|from, to| {
                    to[..from.len()].copy_from_slice(from);
                    if from[0] == 7 { Err(std::io::Error::other("seven")) } else { Ok(from.len()) }
                });
                Op::Compute { from, to: Buffer::alone(200), work }
            };
            (0..40).for_each(|number| ring.submit(Token(u64::from(number)), compute(number)));
            let mut done = Vec::new();
            while done.len() < 40 {
                ring.reap(Wait::One, &mut done).expect("a ring");
            }
            done.sort_unstable_by_key(|completion| completion.token);
            for (number, completion) in (0..).zip(done) {
                let Op::Compute { to, .. } = completion.op else { panic!("not what was asked") };
                assert_eq!(completion.token, Token(u64::from(number)));
                assert!(to[..100] == [number; 100]);
                assert_eq!(completion.result.ok(), (number != 7).then_some(100));
            }
            // A ring may go while the pool works for it.
            (0..40).for_each(|number| ring.submit(Token(0), compute(number)));
        }
    }
}
