//! Locks by which the programs of one machine keep off each other's images: QEMU's, so that it keeps off ours.
//!
//! What may be done with a file has numbers. Who does it locks the byte `100 + number` of the file, and who lets nobody
//! else do it the byte `200 + number`. All of these are read locks, which any number of programs can have: a conflict is
//! found by looking for the opposite byte. Each locks first and looks then, so of two that come at one instant both may be
//! refused, and never both let in.
//!
//! One byte is our own. Who writes has it, and it alone of a kind that the kernel gives to one at a time. It tells another
//! blkmirror from QEMU, and a file that has it may still be written by a daemon that is dead:
//!
//! The locks belong to the open file, not to the process, and an operation that the kernel still has keeps that open. So who
//! gets the byte after a kill knows that nothing of the dead process can land any more. The order is thus: a second way into
//! the same file gets the locks as well, before anything goes by it.
//!
//! ```text
//! 100 reads    101 writes    103 changes the length             of QEMU's numbers 0 to 4, those that matter here
//! 200          201           203 the same, and lets nobody else
//! 300 a blkmirror that writes
//! 301 one that lives
//! ```
//!
//! The last byte is had by an open file that nothing is ever done to, so it goes with its process, whatever the kernel still
//! has of the others: who finds 300 without it waits, and who finds both would wait in vain.
// UNSAFETY: rustix knows only the locks of processes, and the system takes the description of one by its address.
#![expect(unsafe_code)]

use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const DOES: i64 = 100;
const LETS_NOBODY: i64 = 200;
const OURS: i64 = 300;
const LIVES: i64 = 301;

const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a file is open for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// To be read while nobody writes to it.
    Read,
    /// To be read, whoever writes to it meanwhile, as long as its length stays.
    ReadBesideWriters,
    /// To be written; its length stays.
    Write,
    /// To be written, and to grow.
    WriteAndGrow,
}

/// Why somebody cannot have a file.
#[derive(Debug)]
pub enum Denied {
    /// A blkmirror writes to it, or what a dead one left under way does.
    ToBlkmirror,
    /// Somebody has it open for what does not go together with this.
    ToAnother,
    /// There are no locks on its file system.
    ToEverybody,
    /// The system's error.
    BySystem(io::Error),
}

impl Hold {
    /// True where the file is written to.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::WriteAndGrow)
    }

    fn does(self) -> &'static [i64] {
        match self {
            Self::Read | Self::ReadBesideWriters => &[READ],
            Self::Write => &[READ, WRITE],
            Self::WriteAndGrow => &[READ, WRITE, RESIZE],
        }
    }

    fn lets_nobody(self) -> &'static [i64] {
        if self == Self::ReadBesideWriters { &[RESIZE] } else { &[WRITE, RESIZE] }
    }
}

/// Takes the locks of `hold`, or none.
pub fn take(file: impl AsFd, hold: Hold) -> Result<(), Denied> {
    if hold.writes() {
        alone(&file)?;
    }
    take_shared(&file, hold).inspect_err(|_| {
        // Without locks there is nothing to give back.
        let _ = set(&file, libc::F_UNLCK, 0, OURS + 1);
    })
}

fn take_shared(file: &impl AsFd, hold: Hold) -> Result<(), Denied> {
    let bytes = |base: i64, numbers: &'static [i64]| numbers.iter().map(move |number| base + number);
    for at in bytes(DOES, hold.does()).chain(bytes(LETS_NOBODY, hold.lets_nobody())) {
        set(file, libc::F_RDLCK, at, 1)?;
    }
    for at in bytes(LETS_NOBODY, hold.does()).chain(bytes(DOES, hold.lets_nobody())) {
        if others_have(file, at)? {
            let is_ours = !hold.writes() && others_have(file, OURS)?;
            return Err(if is_ours { Denied::ToBlkmirror } else { Denied::ToAnother });
        }
    }
    Ok(())
}

/// Takes our own byte, as a file's only writer.
pub fn alone(file: impl AsFd) -> Result<(), Denied> {
    match set(&file, libc::F_WRLCK, OURS, 1) {
        Err(Denied::ToAnother) => Err(Denied::ToBlkmirror),
        taken => taken,
    }
}

/// Lets a second way into the same file have our own byte as well.
pub fn share(file: impl AsFd) -> Result<(), Denied> {
    set(&file, libc::F_RDLCK, OURS, 1)
}

/// Takes the locks of `hold` for a second way into a file whose first one shares them.
pub fn join(file: impl AsFd, hold: Hold) -> Result<(), Denied> {
    let does = hold.does().iter().map(|number| DOES + number);
    let lets_nobody = hold.lets_nobody().iter().map(|number| LETS_NOBODY + number);
    does.chain(lets_nobody).chain([OURS]).try_for_each(|at| set(&file, libc::F_RDLCK, at, 1))
}

/// Nothing is written to the file any more: what is left are the locks of `Hold::Read`.
pub fn only_read(file: impl AsFd) {
    for at in [OURS, DOES + WRITE, DOES + RESIZE] {
        // Giving back what it does not have changes nothing.
        let _ = set(&file, libc::F_UNLCK, at, 1);
    }
}

/// True while a blkmirror writes to the file, or what a dead one left under way does.
pub fn is_written(file: impl AsFd) -> Result<bool, Denied> {
    others_have(&file, OURS)
}

/// A sign, as long as it is kept, that the process which writes to the file lives. `None` where there can be none: others
/// wait then, as for a dead one.
pub fn sign_of_life(file: impl AsFd) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let sign = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).ok()?;
    set(&sign, libc::F_RDLCK, LIVES, 1).ok().map(|()| sign)
}

/// True where a process that `is_written` tells of lives.
pub fn lives(file: impl AsFd) -> bool {
    others_have(&file, LIVES).is_ok_and(|lives| lives)
}

fn set(file: &impl AsFd, kind: i32, at: i64, len: i64) -> Result<(), Denied> {
    fcntl(file, libc::F_OFD_SETLK, &mut lock(kind, at, len)).map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Denied::ToAnother,
        _ => denied(error),
    })
}

/// Whether anybody has the byte by another open file.
fn others_have(file: &impl AsFd, at: i64) -> Result<bool, Denied> {
    let mut answer = lock(libc::F_WRLCK, at, 1);
    fcntl(file, libc::F_OFD_GETLK, &mut answer).map_err(denied)?;
    Ok(i32::from(answer.l_type) != libc::F_UNLCK)
}

fn denied(error: io::Error) -> Denied {
    match error.raw_os_error() {
        Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => Denied::ToEverybody,
        _ => Denied::BySystem(error),
    }
}

fn lock(kind: i32, at: i64, len: i64) -> libc::flock {
    let (kind, whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type: kind, l_whence: whence, l_start: at, l_len: len, l_pid: 0 }
}

fn fcntl(file: &impl AsFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    loop {
        // SAFETY: both commands read and write the one `flock` that the reference is to, and keep nothing of it.
        match unsafe { libc::fcntl(fd, command, std::ptr::from_mut(lock)) } {
            -1 => {}
            _ => return Ok(()),
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Denied, Hold, alone, is_written, join, lives, only_read, share, sign_of_life, take};
    use std::fs::File;
    use tempfile::NamedTempFile;

    fn again(file: &NamedTempFile) -> File {
        File::options().read(true).write(true).open(file).expect("it is there")
    }

    /// Whether `second` is let in beside `first`.
    fn together(first: Hold, second: Hold) -> bool {
        let file = NamedTempFile::new().expect("a temporary file");
        let (one, other) = (again(&file), again(&file));
        take(&one, first).expect("nobody has it");
        let taken = take(&other, second);
        if taken.is_err() {
            drop(one);
            // Who was refused has kept nothing back.
            let third = again(&file);
            take(&third, Hold::WriteAndGrow).expect("nobody has it");
        }
        taken.is_ok()
    }

    #[test]
    fn readers_go_together_and_writers_with_nobody_who_minds() {
        use Hold::{Read, ReadBesideWriters, Write, WriteAndGrow};
        let all = [Read, ReadBesideWriters, Write, WriteAndGrow];
        for (first, lets) in [
            (Read, [true, true, false, false]),
            (ReadBesideWriters, [true, true, true, false]),
            (Write, [false, true, false, false]),
            (WriteAndGrow, [false, false, false, false]),
        ] {
            assert_eq!(all.map(|second| together(first, second)), lets, "beside {first:?}");
        }
    }

    #[test]
    fn a_lock_lasts_as_long_as_any_way_in() {
        let file = NamedTempFile::new().expect("a temporary file");
        let (first, second) = (again(&file), again(&file));
        take(&first, Hold::WriteAndGrow).expect("nobody has it");
        assert!(matches!(join(&second, Hold::WriteAndGrow), Err(Denied::ToAnother)), "not shared yet");
        share(&first).expect("it has it");
        join(&second, Hold::WriteAndGrow).expect("shared");
        // The same open file by another name.
        let late = second.try_clone().expect("one more descriptor");
        drop((first, second));
        let next = again(&file);
        assert!(is_written(&next).expect("locks"));
        assert!(matches!(take(&next, Hold::Read), Err(Denied::ToBlkmirror)));
        assert!(matches!(alone(&next), Err(Denied::ToBlkmirror)));
        drop(late);
        assert!(!is_written(&next).expect("locks"));
        take(&next, Hold::Write).expect("nobody has it");
    }

    #[test]
    fn a_sign_of_life_goes_with_its_process_and_not_with_its_operations() {
        let file = NamedTempFile::new().expect("a temporary file");
        let (writer, next) = (again(&file), again(&file));
        take(&writer, Hold::Write).expect("nobody has it");
        let sign = sign_of_life(&writer).expect("locks");
        assert!(is_written(&next).expect("locks") && lives(&next));
        drop(sign);
        assert!(is_written(&next).expect("locks") && !lives(&next), "as a dead process's last write");
    }

    #[test]
    fn who_writes_no_more_lets_others_read() {
        let file = NamedTempFile::new().expect("a temporary file");
        let (writer, reader, next) = (again(&file), again(&file), again(&file));
        take(&writer, Hold::WriteAndGrow).expect("nobody has it");
        only_read(&writer);
        take(&reader, Hold::Read).expect("nobody writes");
        assert!(matches!(take(&next, Hold::WriteAndGrow), Err(Denied::ToAnother)), "it is read");
    }
}
