//! One thread that serves connections: those of one disk, or one that has not chosen its disk yet.
//!
//! It steps whoever has something done, in the order in which it was done, and waits in its ring. A connection goes to
//! another thread while it rests: everything of it that is under way here is taken back first, so that what comes of it
//! is known, and no waking is lost.
use super::Connection;
use super::crews::{Choice, Crews, Post};
use crate::daemon::pool::pool;
use crate::export::gate::Gate;
use crate::export::session::{self, ARENA_LEN, Ending, Progress, RING_DEPTH, Session};
use crate::io::remote::Remotes;
use crate::io::{Arena, Completion, File, Io, Op, Ring, Token, Turn, Wait, Waker};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The thread's own operation.
const WAKE: Token = Token(u64::MAX);
/// Each connection has so many tokens, as bits.
const SPAN: u32 = u64::BITS - session::TOKENS.leading_zeros();

/// A connection on its thread.
pub(super) struct Seat {
    session: Session,
    connection: Connection,
    socket: File,
    /// What its next step takes in.
    done: Vec<Completion>,
    /// How often it was stepped lately.
    steps: u64,
    /// It goes on with another process, and is not stepped any more.
    leaves: bool,
}

impl Seat {
    pub fn new(session: Session, connection: Connection, socket: File) -> Self {
        Self { session, connection, socket, done: Vec::new(), steps: 0, leaves: false }
    }
}

/// One thread, at the door or one of its disk's.
pub(super) struct Thread {
    // Dropped first: nothing of a connection is under way any more when it leaves its disk.
    ring: Remotes<Ring>,
    arena: Arena,
    waker: Waker,
    crews: Arc<Crews>,
    /// Whose they are by number, which no other one ever gets: what is left of those who are gone comes back to nobody.
    seats: BTreeMap<u64, Seat>,
    next: u64,
    /// Those to be stepped, in the order in which something of theirs was done.
    ready: VecDeque<u64>,
    /// How many are stepped.
    served: usize,
    /// Once it has a disk.
    post: Option<Post>,
    /// When it looked last how busy it is, and how much of the processor it had used by then.
    looked: (Instant, Duration),
}

impl Thread {
    /// One that serves nobody yet.
    pub fn new(crews: Arc<Crews>) -> io::Result<Self> {
        let (arena, waker) = (Arena::allocate(ARENA_LEN)?, Waker::new()?);
        let mut ring = Remotes::new(Ring::new(RING_DEPTH, &arena)?.helped_by(pool(), Turn::Guest)?);
        ring.submit(WAKE, Op::Wake { waker: waker.clone() });
        let (seats, ready, looked) = (BTreeMap::new(), VecDeque::new(), (Instant::now(), processor_time()));
        Ok(Self { ring, arena, waker, crews, seats, next: 0, ready, served: 0, post: None, looked })
    }

    /// Its memory.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// It is of `disk` from now on, and waits for one connection. Its waker.
    pub fn wait_for_one(&mut self, disk: Weak<Gate>) -> Waker {
        self.post = Some(Crews::man(&self.crews, disk, &self.waker));
        self.waker.clone()
    }

    /// Until nobody is left.
    pub fn serve(mut self) {
        if let Err(error) = self.run() {
            tracing::error!(%error, "a thread failed; its {} connections are dropped", self.seats.len());
            self.seats.values().for_each(|seat| seat.socket.shut_down());
        }
    }

    /// One more to serve.
    pub fn take(&mut self, seat: Seat) {
        self.seats.insert(self.next, seat);
        self.ready.push_back(self.next);
        self.next += 1;
        self.served += 1;
    }

    fn run(&mut self) -> io::Result<()> {
        let mut done = Vec::new();
        loop {
            self.look();
            while let Some(number) = self.ready.pop_front() {
                self.step(number)?;
            }
            if self.served == 0 && self.post.as_ref().is_none_or(Post::is_over) {
                return self.hand_over();
            }
            self.ring.reap(Wait::One, &mut done)?;
            done.drain(..).for_each(|completion| self.pass_on(completion));
        }
    }

    fn step(&mut self, number: u64) -> io::Result<()> {
        let Some(seat) = self.seats.get_mut(&number).filter(|seat| !seat.leaves) else { return Ok(()) };
        seat.steps += 1;
        match seat.session.step(&mut self.ring, &mut seat.done) {
            Progress::Running => {}
            Progress::Resting => self.settle(number)?,
            Progress::Over(ending) => {
                tracing::info!(export = seat.session.export(), "connection ended: {ending}");
                match ending {
                    Ending::HandedOver => seat.leaves = true,
                    _ => self.dismiss(number),
                }
                self.serves_one_fewer();
            }
        }
        Ok(())
    }

    fn dismiss(&mut self, number: u64) {
        if let Some(seat) = self.seats.remove(&number) {
            // Ends its waking, which the ring would have for good.
            seat.connection.waker.wake();
        }
    }

    fn serves_one_fewer(&mut self) {
        self.served -= 1;
        self.post.iter().for_each(|_| self.crews.serves_one_fewer(&self.waker));
    }

    /// Whose something is done is stepped next.
    fn pass_on(&mut self, completion: Completion) {
        if completion.token == WAKE {
            // First: who rings from now on is heard.
            self.ring.submit(WAKE, completion.op);
            return self.welcome();
        }
        let number = completion.token.0 >> SPAN;
        let Some(seat) = self.seats.get_mut(&number) else { return };
        if seat.done.is_empty() && !seat.leaves {
            self.ready.push_back(number);
        }
        seat.done.push(completion);
    }

    /// Lets those in who come from another thread.
    fn welcome(&mut self) {
        let arrivals = self.post.as_ref().map(Post::arrivals);
        for mut seat in arrivals.into_iter().flatten() {
            let done = std::mem::take(&mut seat.done);
            seat.session.move_to(self.arena.clone(), Token(self.next << SPAN), done);
            seat.session.begin();
            self.take(seat);
        }
    }

    /// A connection rests: it goes on here, or elsewhere.
    fn settle(&mut self, number: u64) -> io::Result<()> {
        let Some(seat) = self.seats.get_mut(&number) else { return Ok(()) };
        let Some(disk) = seat.session.gate().cloned() else { return Ok(()) };
        let there = match self.crews.choose(&disk, &self.waker) {
            Choice::Here => None,
            Choice::First(post) => {
                self.post = Some(post);
                None
            }
            Choice::There(waker) => Some(waker),
            Choice::OneMore => match self.crews.one_more(&disk) {
                Ok(waker) => Some(waker),
                Err(error) => {
                    tracing::warn!(%error, "a disk's next thread could not be started: it goes on with those it has");
                    None
                }
            },
        };
        match there {
            None => {
                seat.session.begin();
                self.ready.push_back(number);
                Ok(())
            }
            Some(there) => self.send(number, &there),
        }
    }

    /// Sends a connection that rests to another thread.
    fn send(&mut self, number: u64, there: &Waker) -> io::Result<()> {
        let whose = self.seats[&number].session.tokens();
        let mut done = Vec::new();
        // Also its waking: one that this ring took from now on would be nobody's.
        if let Err(error) = self.ring.take_back_those(whose, &mut done) {
            self.crews.serves_one_fewer(there);
            there.wake();
            return Err(error);
        }
        done.drain(..).for_each(|completion| self.pass_on(completion));
        if let Some(seat) = self.seats.remove(&number) {
            self.crews.deliver(seat, there);
            self.serves_one_fewer();
        }
        Ok(())
    }

    /// Looks how busy it is, and lets somebody go who may find a better place, if that is much.
    fn look(&mut self) {
        if self.post.is_none() {
            return;
        }
        let (now, used) = (Instant::now(), self.looked);
        let elapsed = now - used.0;
        if elapsed < self.crews.pace.window {
            return;
        }
        self.looked = (now, processor_time());
        let share = ((self.looked.1 - used.1).as_micros() * 100 / elapsed.as_micros().max(1)) as u64;
        self.crews.note(&self.waker, share);
        let all: u64 = self.seats.values().map(|seat| seat.steps).sum();
        // One that is not idle, and not the busiest: that is no less busy elsewhere.
        let mut active: Vec<_> = self.seats.iter().filter(|(_, seat)| !seat.leaves && seat.steps * 16 > all).collect();
        active.sort_by_key(|(_, seat)| seat.steps);
        let chosen =
            active.first().filter(|_| share >= self.crews.pace.busy && active.len() > 1).map(|(number, _)| **number);
        self.seats.values_mut().for_each(|seat| seat.steps = 0);
        if let Some(number) = chosen
            && let Some(seat) = self.seats.get_mut(&number)
            && seat.session.gate().is_some_and(|disk| self.crews.has_room(disk, &self.waker))
        {
            seat.session.rest();
            // Stepped at once: it may be silent for long.
            self.ready.push_back(number);
        }
    }

    /// Gives those away who go on with another process: all who are left.
    fn hand_over(&mut self) -> io::Result<()> {
        if self.seats.is_empty() {
            return Ok(());
        }
        let mut done = Vec::new();
        self.ring.below().take_back(&mut done)?;
        done.retain(|completion| completion.token != WAKE);
        done.drain(..).for_each(|completion| self.pass_on(completion));
        for seat in std::mem::take(&mut self.seats).into_values() {
            let handed = seat.session.hand_over(seat.done);
            *seat.connection.handed.lock().unwrap_or_else(PoisonError::into_inner) = handed;
        }
        Ok(())
    }
}

/// How much of the processor this thread has used.
fn processor_time() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.unsigned_abs() as u32)
}
