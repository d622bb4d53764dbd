//! Who is connected to an export, so that nobody's late writes meet those of their successor.
//!
//! A client whose connection broke comes again and repeats what was not answered. What its old
//! connection has under way must not land after what the new one brings. Nobody knows whose
//! successor a connection is, so each one waits, before its first request, for all older ones whose
//! clients are gone by then. A client closes before it comes again, so those are all it needs.
use crate::bell::Bell;
use crate::io::{File, Waker};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The connections of one export.
#[derive(Debug, Default)]
pub struct Roll(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    present: Mutex<Present>,
    /// Rings when one leaves.
    left: Bell,
}

#[derive(Debug, Default)]
struct Present {
    last: u64,
    members: Vec<(u64, File)>,
}

/// One connection, present until it is dropped.
#[derive(Debug)]
pub struct Member {
    roll: Arc<Inner>,
    number: u64,
    /// Whose end it waits for.
    elders: Vec<u64>,
}

impl Roll {
    /// A connection by `socket` that has not begun yet.
    pub fn join(&self, socket: File) -> Member {
        let mut present = self.0.present();
        let gone = present.members.iter().filter(|(_, socket)| socket.hung_up());
        let elders = gone.map(|(number, _)| *number).collect();
        present.last += 1;
        let number = present.last;
        present.members.push((number, socket));
        Member { roll: Arc::clone(&self.0), number, elders }
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.0.present().members.len()
    }

    /// Ends all connections; each goes when what it has under way is done.
    pub fn expel(&self) {
        self.0.present().members.iter().for_each(|(_, socket)| socket.shut_down());
    }

    /// True where nobody is connected; else `waker` is called when that may have changed.
    pub fn is_empty(&self, waker: &Waker) -> bool {
        self.0.left.listen(waker);
        self.count() == 0
    }
}

impl Member {
    /// True where it may begin; else `waker` is called when that may have changed.
    pub fn may_begin(&mut self, waker: &Waker) -> bool {
        if !self.elders.is_empty() {
            self.roll.left.listen(waker);
            let present = self.roll.present();
            self.elders.retain(|elder| present.members.iter().any(|(number, _)| number == elder));
        }
        self.elders.is_empty()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.roll.present().members.retain(|(number, _)| *number != self.number);
        self.roll.left.ring();
    }
}

impl Inner {
    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Roll;
    use crate::io::{File, Waker};
    use std::os::unix::net::UnixStream;

    fn connection() -> (File, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        (File::new(ours), theirs)
    }

    #[test]
    fn only_elders_that_are_gone_are_waited_for() {
        let (roll, waker) = (Roll::default(), Waker::new().expect("an eventfd"));
        let (socket, theirs) = connection();
        let gone = roll.join(socket);
        let (socket, mut other) = connection();
        let mut there = roll.join(socket);
        assert!(there.may_begin(&waker), "nobody is gone");
        // Also with bytes that nobody has received yet.
        std::io::Write::write_all(&mut { &theirs }, b"late").expect("room in the socket");
        drop(theirs);
        let (socket, _new) = connection();
        let mut new = roll.join(socket);
        assert!(!new.may_begin(&waker));
        assert!(there.may_begin(&waker), "who has begun goes on");
        std::io::Write::write_all(&mut other, b"x").expect("room in the socket");
        drop(gone);
        assert!(new.may_begin(&waker), "the elder that is there is not waited for");
    }
}
