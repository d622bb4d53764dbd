//! A thread's queue that knows exports too: what belongs to one goes to its server, all else to the queue below.
use super::super::{Completion, File, Gather, Io, Op, Ring, Token, Wait};
use super::Remote;
use super::connection::{Connection, Part};
use super::request::Request;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// This bit and not the next higher one: the token of an operation of a connection's own.
const OWN: u64 = 1 << 62;
/// So many low bits say which part of a connection it is; those above, which connection.
const PART_BITS: u32 = 3;

/// A queue that carries out operations on exports by way of another queue.
///
/// A connection lives as long as somebody has its export open: where nobody has, it goes when the thread waits
/// next. Dropped, it hangs up, and whatever the queue below still has of it comes back to nobody.
pub struct Remotes<I: Io> {
    // Dropped first: sockets that are shut down let the queue below go sooner.
    pub(super) connections: Vec<(u64, Connection)>,
    next: u64,
    /// Done without the queue below.
    ready: Vec<Completion>,
    reaped: Vec<Completion>,
    pub(super) below: I,
}

impl<I: Io> Remotes<I> {
    /// A queue over `below`.
    pub fn new(below: I) -> Self {
        Self { connections: Vec::new(), next: 0, ready: Vec::new(), reaped: Vec::new(), below }
    }

    fn start(&mut self, remote: &Arc<Remote>, token: Token, op: Op) {
        if let Op::Prefetch { .. } = op {
            // A hint, which is heard and not passed on.
            return self.ready.push(Completion { token, op, result: Ok(0) });
        }
        if !remote.is_shared() {
            return self.ready.push(now(remote, token, op));
        }
        let number = self.connection(remote);
        self.connections[number].1.start(token, op, &mut self.ready);
        self.go_on(number);
    }

    /// Where the thread's connection to `remote` is.
    fn connection(&mut self, remote: &Arc<Remote>) -> usize {
        if let Some(number) = self.connections.iter().position(|(_, connection)| connection.is_to(remote)) {
            return number;
        }
        self.next += 1;
        self.connections.push((self.next, Connection::new(Arc::clone(remote))));
        self.connections.len() - 1
    }

    /// Starts what a connection can do next.
    fn go_on(&mut self, number: usize) {
        let (name, connection) = &mut self.connections[number];
        let base = OWN | *name << PART_BITS;
        let below = &mut self.below;
        let now = below.now();
        connection.go_on(now, &mut self.ready, |part, op| below.submit(Token(base | part as u64), op));
    }

    /// Takes in what the queue below has done; what is not for connections goes to `done`. Whether anything was.
    fn pass_on(&mut self, done: &mut Vec<Completion>) -> bool {
        let mut reaped = std::mem::take(&mut self.reaped);
        let own = reaped.iter().any(|completion| is_own(completion.token));
        for completion in reaped.drain(..) {
            match is_own(completion.token) {
                true => self.take(completion),
                false => done.push(completion),
            }
        }
        self.reaped = reaped;
        done.append(&mut self.ready);
        own
    }

    /// Takes in what became of a connection's own operation.
    fn take(&mut self, done: Completion) {
        let name = (done.token.0 & !OWN) >> PART_BITS;
        let place = self.connections.iter().position(|(other, _)| *other == name);
        // A connection that nobody wants any more has gone before what it had under way.
        let Some(number) = place else { return };
        let part = Part::from_number(done.token.0 & ((1 << PART_BITS) - 1));
        let now = self.below.now();
        self.connections[number].1.complete(part, done.op, done.result, now, &mut self.ready);
        self.go_on(number);
    }
}

impl<I: Io> Remotes<I> {
    /// The queue below.
    pub fn below(&mut self) -> &mut I {
        &mut self.below
    }
}

impl Remotes<Ring> {
    /// As `Ring::take_back_those`.
    pub fn take_back_those(&mut self, whose: Range<Token>, done: &mut Vec<Completion>) -> io::Result<()> {
        self.below.take_back_those(whose, &mut self.reaped)?;
        self.pass_on(done);
        Ok(())
    }
}

impl<I: Io> Io for Remotes<I> {
    fn submit(&mut self, token: Token, op: Op) {
        debug_assert!(!is_own(token), "a token that is kept for connections");
        match file_of(&op).and_then(File::as_remote).cloned() {
            Some(remote) => self.start(&remote, token, op),
            None => self.below.submit(token, op),
        }
    }

    fn send_at_once(&mut self, socket: &File, gather: &Gather) -> usize {
        self.below.send_at_once(socket, gather)
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.connections.retain(|(_, connection)| !connection.is_forgotten());
        let before = done.len();
        loop {
            done.append(&mut self.ready);
            // What is done already is not kept waiting by what is not.
            let wait = if done.len() > before { Wait::No } else { wait };
            self.below.reap(wait, &mut self.reaped)?;
            let own = self.pass_on(done);
            // What is a connection's own is not what the caller waits for.
            if wait == Wait::No || done.len() > before || !own {
                return Ok(());
            }
        }
    }

    fn now(&self) -> Duration {
        self.below.now()
    }
}

fn is_own(token: Token) -> bool {
    token.0 & (OWN | OWN << 1) == OWN
}

fn file_of(op: &Op) -> Option<&File> {
    match op {
        Op::Read { file, .. } | Op::Write { file, .. } | Op::Zero { file, .. } => Some(file),
        Op::Flush { file } | Op::Prefetch { file, .. } => Some(file),
        _ => None,
    }
}

/// Where the server takes one connection only: by that one, waiting.
fn now(remote: &Remote, token: Token, op: Op) -> Completion {
    let (request, checked) = Request::new(remote, token, op);
    match checked {
        Ok(()) if !request.is_empty() => remote.carry_out(request),
        outcome => request.end(remote, outcome),
    }
}
