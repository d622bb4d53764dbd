//! What somebody who has an image open keeps others from, in words.
use crate::control::TargetFormat;
use crate::control::options::Beside;
use crate::io::lock::{self, Denied, Hold};
use formats::error::{Error, Result};
use std::fs::File;
use std::path::Path;

/// Keeps others from writing to an image of `format` that is read.
pub fn to_read(path: &Path, file: &File, format: TargetFormat, beside: Beside) -> Result<()> {
    match beside {
        Beside::Nobody => take(path, file, Hold::Read).map(drop),
        Beside::RawWriters if format == TargetFormat::Raw => take(path, file, Hold::ReadBesideWriters).map(drop),
        Beside::RawWriters => take(path, file, Hold::Read).map(drop),
        Beside::Anybody => Ok(()),
    }
}

/// Keeps everybody off an image of `format` that is written. What was taken, where there are locks.
pub fn to_write(path: &Path, file: &File, format: TargetFormat) -> Result<Option<Hold>> {
    take(path, file, if format == TargetFormat::Raw { Hold::Write } else { Hold::WriteAndGrow })
}

/// Keeps every other blkmirror off a file that only blkmirror has. False where another one has it.
pub fn alone(path: &Path, file: &File) -> Result<bool> {
    match lock::alone(file) {
        Ok(()) => Ok(true),
        Err(Denied::ToBlkmirror) => Ok(false),
        Err(Denied::ToEverybody) => {
            tell_of_no_locks(path);
            Ok(true)
        }
        Err(denied) => Err(in_words(denied, true).at(path.display())),
    }
}

/// The locks of `first` for a second way into the same file.
pub(super) fn shared(first: &File, second: &File, hold: Hold) -> Result<()> {
    lock::share(first).and_then(|()| lock::join(second, hold)).map_err(|denied| in_words(denied, true))
}

fn take(path: &Path, file: &File, hold: Hold) -> Result<Option<Hold>> {
    match lock::take(file, hold) {
        Ok(()) => Ok(Some(hold)),
        Err(Denied::ToEverybody) => {
            tell_of_no_locks(path);
            Ok(None)
        }
        Err(denied) => Err(in_words(denied, hold.writes())),
    }
}

fn tell_of_no_locks(path: &Path) {
    tracing::warn!(
        "{}: its file system has no locks: see to it that no other program writes to it meanwhile",
        path.display()
    );
}

fn in_words(denied: Denied, to_write: bool) -> Error {
    const FORCE: &str = "convert, compare, info, map and check read it all the same with --force-share, and may find what \
                         is half written";
    match denied {
        Denied::ToBlkmirror if to_write => {
            Error::invalid("another export or another blkmirror writes to it, and an image has one writer")
        }
        Denied::ToAnother if to_write => Error::invalid(
            "another program has it open, QEMU or one of its tools or a blkmirror, and an image has one writer and \
             nobody else: end that one first",
        ),
        Denied::ToBlkmirror => Error::invalid(format!(
            "a blkmirror writes to it, and an image has one writer: read it by way of that one's export, or end that one \
             first; {FORCE}"
        )),
        Denied::ToAnother => Error::invalid(format!(
            "another program writes to it, QEMU or one of its tools: end that one first; {FORCE}"
        )),
        Denied::ToEverybody => Error::unsupported("its file system has no locks"),
        Denied::BySystem(error) => Error::io("locking it", error),
    }
}
